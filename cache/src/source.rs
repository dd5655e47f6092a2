//! Files and folders outside of the store, such as a pipeline's sources: their digests, and private copies of them.
//!
//! What a reader would read is what counts, so links are followed. Only plain files are ever opened: a pipe would wait for a
//! writer, and a device may have no end.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::OFlags;

use crate::digest::{self, Digest, FileEntry};
use crate::error::{Result, StoreError};
use crate::stamp::{Identity, Stamp};
use crate::store::Store;

/// Which files of a folder count, by their path inside.
pub type Takes<'a> = &'a dyn Fn(&str) -> bool;

impl Store {
    /// The digest of a file's bytes, or of a folder as [`Digest::of_tree`] has it.
    ///
    /// A file is read once per boot and again when it changed: its device, inode, length or times. A file that was written
    /// to in the last seconds is read each time, since its times would not show another write.
    ///
    /// Errors name the file that cannot be read or that changed meanwhile.
    pub fn digest_path(&self, path: &Path) -> Result<Digest> {
        self.digest_files(path, &|_| true)
    }

    /// As [`digest_path`](Store::digest_path), over those files of a folder that `takes` names.
    pub fn digest_files(&self, path: &Path, takes: Takes) -> Result<Digest> {
        digest_with(path, takes, |path, _| self.digest_file(path, true))
    }

    /// As [`digest_files`](Store::digest_files), but every byte is read now, whatever is remembered of it.
    pub fn digest_files_now(&self, path: &Path, takes: Takes) -> Result<Digest> {
        digest_with(path, takes, |path, _| self.digest_file(path, false))
    }

    fn digest_file(&self, path: &Path, may_remember: bool) -> Result<(Digest, u64)> {
        let now = SystemTime::now();
        let metadata = plain(path)?;
        let before = Identity::of(&metadata);
        if may_remember && let Stamp::Of(digest) = self.stamps.get(&before) {
            return Ok((digest, metadata.len()));
        }
        let file = open(path)?;
        let (digest, bytes) = read(path, &file, |_| Ok(()))?;
        let after = file.metadata().map_err(StoreError::io("look at", path))?;
        if Identity::of(&after) != before || after.len() != bytes {
            return Err(StoreError::Changed { path: path.into() });
        }
        if before.is_settled(now) {
            self.stamps.put(before, digest);
        }
        Ok((digest, bytes))
    }
}

/// Copies a file, or those files of a folder that `takes` names, to `to`, where nothing is yet. Returns the digest of what
/// the copy holds, as [`Store::digest_files`] would say it: bytes are hashed on their way, so that whoever reads the copy
/// reads what was hashed, whatever becomes of the original meanwhile.
///
/// A file system that can share the blocks of two files does so.
pub fn copy_source(from: &Path, to: &Path, takes: Takes) -> Result<Digest> {
    if from.is_dir() {
        make(to)?; // also where no file of it is taken
    }
    let copy = |path: &Path, name: Option<&str>| {
        copy_file(path, &name.map_or(to.to_path_buf(), |name| to.join(name)), &|| true)
    };
    digest_with(from, takes, copy)
}

/// The digest of a file or folder, where `of_file` gives that of a file, known by its path and its name in the folder.
fn digest_with(
    path: &Path,
    takes: Takes,
    of_file: impl Fn(&Path, Option<&str>) -> Result<(Digest, u64)>,
) -> Result<Digest> {
    if !fs::metadata(path).map_err(StoreError::io("find", path))?.is_dir() {
        return Ok(of_file(path, None)?.0);
    }
    let mut files = Vec::new();
    for (name, path) in files_behind(path)?.into_iter().filter(|(name, _)| takes(name)) {
        let (digest, bytes) = of_file(&path, Some(&name))?;
        files.push(FileEntry { path: name, digest, bytes });
    }
    Ok(Digest::of_tree(&files))
}

/// Copies a file as long as it is to `go_on`, and returns digest and length of what the copy holds.
pub(crate) fn copy_file(from: &Path, to: &Path, go_on: &dyn Fn() -> bool) -> Result<(Digest, u64)> {
    make(to.parent().expect("a copy lies in a folder"))?;
    let source = open(from)?;
    let mut target = File::create_new(to).map_err(StoreError::io("write", to))?;
    let goes_on = || if go_on() { Ok(()) } else { Err(StoreError::Stopped) };
    if share_blocks(&source, &target) {
        let copy = File::open(to).map_err(StoreError::io("read", to))?;
        return read(to, &copy, |_| goes_on());
    }
    read(from, &source, |bytes| {
        goes_on()?;
        target.write_all(bytes).map_err(StoreError::io("write", to))
    })
}

/// Makes `target` a copy of `source` that takes no room until one of them is written to; false where that cannot be done.
fn share_blocks(source: &File, target: &File) -> bool {
    #[cfg(target_os = "linux")]
    return rustix::fs::ioctl_ficlone(target, source).is_ok();
    #[cfg(not(target_os = "linux"))]
    return {
        let _ = (source, target);
        false
    };
}

/// Reads to the end a file that is as long as it was when it was opened: one that grows meanwhile may have no end.
fn read(path: &Path, file: &File, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<(Digest, u64)> {
    let length = file.metadata().map_err(StoreError::io("look at", path))?.len();
    let mut done = 0;
    let each = |bytes: &[u8]| {
        done += bytes.len() as u64;
        if done > length { Err(StoreError::Changed { path: path.into() }) } else { each(bytes) }
    };
    digest::of_stream(file, each, |error| StoreError::io("read", path)(error))
}

/// Opens a plain file, and nothing else.
fn open(path: &Path) -> Result<File> {
    plain(path)?;
    // Should a pipe have come in its place since, opening it does not wait.
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path);
    let file = file.map_err(StoreError::io("read", path))?;
    let metadata = file.metadata().map_err(StoreError::io("look at", path))?;
    if metadata.is_file() { Ok(file) } else { Err(StoreError::NotPlain { path: path.into() }) }
}

/// What the system says of a plain file; an error for anything else.
fn plain(path: &Path) -> Result<Metadata> {
    let metadata = fs::metadata(path).map_err(StoreError::io("find", path))?;
    if metadata.is_file() { Ok(metadata) } else { Err(StoreError::NotPlain { path: path.into() }) }
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(StoreError::io("make folder", folder))
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
