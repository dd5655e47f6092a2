//! Publishing a result: its files become blobs, its outputs trees, and last of all its record appears.
//!
//! Whatever stops this halfway leaves no record, so nothing that is half there can be served. Files are moved, not copied.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::artifact::files_in;
use crate::digest::{self, FileEntry};
use crate::disk::{SEAL_TIME, in_parallel};
use crate::error::{Result, StoreError};
use crate::record::{self, Artifact, Lookup, Record};
use crate::store::{Care, Condition, RECORD_FORM, Store};
use crate::work::Work;

/// A file of an output, on its way.
struct Incoming {
    /// Its place among all incoming files.
    index: usize,
    /// The place of its output.
    port: usize,
    /// Path inside the output.
    name: String,
    path: PathBuf,
}

impl Store {
    /// Makes what was written to `work` the result for its key, and returns the record. `outputs` lists ports and their
    /// types; `info` is kept with the result.
    ///
    /// When another process was faster, its whole result stays and is returned: what was computed from it stays valid.
    /// Errors when an output was not written or holds links, or when the file system refuses; then nothing is published.
    pub fn publish(&self, work: Work, outputs: &[(String, String)], info: Json) -> Result<Record> {
        let key = *work.key();
        if let Lookup::Hit(earlier) = self.lookup(&key)? {
            return Ok(earlier);
        }
        let incoming = incoming(&work, outputs)?;
        let sealed = in_parallel(&incoming, |file| self.seal(file, &work))?;
        let mut changed = BTreeSet::new();
        let mut files = vec![Vec::new(); outputs.len()];
        for (file, (path, entry)) in incoming.iter().zip(sealed) {
            changed.insert(self.place_blob(&path, &entry)?);
            files[file.port].push(entry);
        }
        if !changed.is_empty() {
            changed.insert(self.root().join("cas"));
        }
        in_parallel(&changed.into_iter().collect::<Vec<_>>(), |folder| self.disk.sync(folder))?;
        let mut record = Record { key, outputs: Default::default(), info };
        for ((port, port_type), files) in outputs.iter().zip(files) {
            let artifact = Artifact::new(port_type.clone(), files);
            self.build_tree(&artifact)?;
            record.outputs.insert(port.clone(), artifact);
        }
        self.place_record(record, &work)
    }

    /// Makes a file ready to be a blob: read-only, hashed, and on the disk. Returns where it now is.
    fn seal(&self, file: &Incoming, work: &Work) -> Result<(PathBuf, FileEntry)> {
        let mut path = file.path.clone();
        let links = fs::symlink_metadata(&path).map_err(StoreError::io("look at", &path))?.nlink();
        if links > 1 {
            // Its other name, perhaps an input's, could be used to write to it, and must not be sealed.
            path = work.path().join(format!("copy.{}", file.index));
            self.disk.copy(&file.path, &path)?;
        }
        self.disk.seal(&path)?;
        let open = File::open(&path).map_err(StoreError::io("read", &path))?;
        let (digest, bytes) = digest::of_file(&open).map_err(StoreError::io("read", &path))?;
        self.disk.sync(&path)?;
        let metadata = open.metadata().map_err(StoreError::io("look at", &path))?;
        if metadata.mtime() != SEAL_TIME as i64 || metadata.len() != bytes {
            return Err(StoreError::Changed { path });
        }
        Ok((path, FileEntry { path: file.name.clone(), digest, bytes }))
    }

    /// Moves a sealed file into its place, unless an equal one is there. Returns the folder to sync.
    fn place_blob(&self, path: &Path, entry: &FileEntry) -> Result<PathBuf> {
        let blob = self.blob_path(&entry.digest);
        self.make_parent(&blob)?;
        let folder = blob.parent().expect("blobs lie in a folder").to_path_buf();
        if !self.disk.rename_new(path, &blob)? {
            if let Condition::Whole = self.inspect(&blob, entry, Care::HashedNow)? {
                return Ok(folder);
            }
            if blob.is_dir() {
                self.remove_blob(&blob)?;
            }
            self.disk.rename(path, &blob)?;
        }
        self.stamp(&blob, entry.digest);
        Ok(folder)
    }

    /// The last step: from here on the key is a hit.
    fn place_record(&self, record: Record, work: &Work) -> Result<Record> {
        let draft = work.path().join("record");
        let home = self.record_path(&record.key);
        self.disk.write(&draft, &record::seal_text(RECORD_FORM, &record))?;
        self.disk.sync(&draft)?;
        let preimage = self.preimage_path(&record.key);
        if preimage.exists() {
            self.disk.sync(&preimage)?; // `why` explains a result as long as there is one
        }
        self.make_parent(&home)?;
        if !self.disk.rename_new(&draft, &home)? {
            if let Lookup::Hit(earlier) = self.lookup(&record.key)? {
                return Ok(earlier);
            }
            self.disk.rename(&draft, &home)?;
        }
        for folder in [home.parent().expect("records lie in a folder"), &self.root().join("ac")] {
            self.disk.sync(folder)?;
        }
        Ok(record)
    }
}

/// The files of all outputs.
fn incoming(work: &Work, outputs: &[(String, String)]) -> Result<Vec<Incoming>> {
    let mut incoming = Vec::new();
    for (port, (name, _)) in outputs.iter().enumerate() {
        let folder = work.output_path(name)?;
        if !folder.is_dir() {
            return Err(StoreError::NoOutput { port: name.clone(), path: folder });
        }
        for (name, path) in files_in(&folder)? {
            incoming.push(Incoming { index: incoming.len(), port, name, path });
        }
    }
    Ok(incoming)
}
