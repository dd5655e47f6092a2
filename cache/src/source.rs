//! Digests of files and folders outside of the store, such as a pipeline's sources.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::digest::{self, Digest, FileEntry};
use crate::error::{Result, StoreError};
use crate::stamp::Identity;
use crate::store::Store;

impl Store {
    /// The digest of a file's bytes, or of a folder as [`Digest::of_tree`] has it. Links are followed: what counts is what a
    /// reader would read.
    ///
    /// A file is read once per boot and again when it changed: its device, inode, length or times. A file that was written
    /// to in the last seconds is read each time, since its times would not show another write.
    ///
    /// Errors name the file that cannot be read or that changed meanwhile.
    pub fn digest_path(&self, path: &Path) -> Result<Digest> {
        let metadata = fs::metadata(path).map_err(StoreError::io("find", path))?;
        if !metadata.is_dir() {
            return Ok(self.digest_file(path)?.0);
        }
        let mut files = Vec::new();
        for (name, path) in files_behind(path)? {
            let (digest, bytes) = self.digest_file(&path)?;
            files.push(FileEntry { path: name, digest, bytes });
        }
        Ok(Digest::of_tree(&files))
    }

    fn digest_file(&self, path: &Path) -> Result<(Digest, u64)> {
        let now = SystemTime::now();
        let metadata = fs::metadata(path).map_err(StoreError::io("find", path))?;
        if !metadata.is_file() {
            return Err(StoreError::NotPlain { path: path.into() }); // opening a pipe would wait for a writer
        }
        let before = Identity::of_outside(&metadata);
        if let Some(digest) = self.stamps.get(&before) {
            return Ok((digest, metadata.len()));
        }
        let file = File::open(path).map_err(StoreError::io("read", path))?;
        let (digest, bytes) = digest::of_file(&file).map_err(StoreError::io("read", path))?;
        let after = file.metadata().map_err(StoreError::io("look at", path))?;
        if Identity::of_outside(&after) != before || after.len() != bytes {
            return Err(StoreError::Changed { path: path.into() });
        }
        if before.is_settled(now) {
            self.stamps.put(before, digest);
        }
        Ok((digest, bytes))
    }
}

/// The files below a folder and behind its links, as (path inside with `/`, path), sorted by the bytes of the former. A circle
/// of links ends in the system's own error.
fn files_behind(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    let mut folders = vec![(String::new(), folder.to_path_buf())];
    while let Some((prefix, folder)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(StoreError::io("list", &folder))? {
            let entry = entry.map_err(StoreError::io("list", &folder))?;
            let path = entry.path();
            let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else {
                return Err(StoreError::Name { path });
            };
            if fs::metadata(&path).map_err(StoreError::io("find", &path))?.is_dir() {
                folders.push((name + "/", path));
            } else {
                files.push((name, path));
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}
