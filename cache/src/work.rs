//! Work folders: the only place where a running stage writes, and where the store builds what it then renames into place.
//!
//! A folder belongs to the process that holds the kernel's lock on the file `owner` in it. When that process is gone, however
//! it ended, so is the lock, and [`sweep`] removes the folder.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::key::Key;
use crate::lock;

/// A folder in which one result comes into being. Dropping it removes the folder.
pub struct Work {
    key: Key,
    pub(crate) scratch: Scratch,
}

impl Work {
    pub(crate) fn begin(place: &Workplace, key: &Key) -> Result<Work> {
        Ok(Work { key: *key, scratch: Scratch::begin(place, &key.to_string())? })
    }

    /// What is being computed.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The folder, `work/<key>.<unique id>`.
    pub fn path(&self) -> &Path {
        &self.scratch.path
    }

    /// The folder for the files of one output, `outputs/<port>`, which exists when this returns.
    ///
    /// Errors when the port's name cannot name a folder.
    pub fn output(&self, port: &str) -> Result<PathBuf> {
        let path = self.output_path(port)?;
        self.scratch.disk.make_folder(&path)?;
        Ok(path)
    }

    /// A folder for files that nobody will keep, which exists when this returns.
    pub fn scratch(&self) -> Result<PathBuf> {
        let path = self.scratch.path.join("scratch");
        self.scratch.disk.make_folder(&path)?;
        Ok(path)
    }

    pub(crate) fn output_path(&self, port: &str) -> Result<PathBuf> {
        let plain = port.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !plain || port.is_empty() || port.starts_with('.') {
            return Err(StoreError::Port { port: port.into() });
        }
        Ok(self.scratch.path.join("outputs").join(port))
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("path", &self.scratch.path).finish_non_exhaustive()
    }
}

/// Where work folders are made.
#[derive(Clone)]
pub(crate) struct Workplace {
    pub(crate) folder: PathBuf,
    /// Held shared while a folder is made and its owner's lock taken, exclusively while orphans are looked for: otherwise
    /// a folder that has no owner yet would look like one that has none any more.
    pub(crate) gate: PathBuf,
    pub(crate) disk: Disk,
}

/// A folder of this process, removed when dropped.
pub(crate) struct Scratch {
    pub(crate) path: PathBuf,
    disk: Disk,
    /// Locked as long as it is open.
    _owner: File,
}

impl Scratch {
    pub(crate) fn begin(place: &Workplace, label: &str) -> Result<Scratch> {
        let gate = lock::open(&place.gate)?;
        lock::uninterrupted(|| gate.lock_shared()).map_err(StoreError::io("lock", &place.gate))?;
        let path = loop {
            let path = place.folder.join(format!("{label}.{}", unique()));
            if place.disk.make_new_folder(&path)? {
                break path;
            }
        };
        let owner = path.join("owner");
        let file = place.disk.write(&owner, b"").and_then(|()| lock::open(&owner));
        let locked = file.and_then(|file| lock::try_lock(&file, &owner).map(|locked| (file, locked)));
        match locked {
            Ok((file, true)) => Ok(Scratch { path, disk: place.disk.clone(), _owner: file }),
            Ok((_, false)) => unreachable!("nobody looks into a folder of work while its maker holds the gate"),
            Err(error) => {
                let _ = place.disk.remove_folder(&path);
                Err(error)
            }
        }
    }

    /// Removes something of the store at once for whoever looks: moves it here, where it goes with the folder.
    pub(crate) fn discard(&self, path: &Path) -> Result<()> {
        if fs::symlink_metadata(path).is_err() {
            return Ok(());
        }
        let bin = self.path.join(format!("discarded.{}", unique()));
        match self.disk.rename(path, &bin) {
            Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.disk.remove_folder(&self.path) {
            tracing::debug!(%error, "a work folder is left for the next sweep");
        }
    }
}

/// Removes the work folders whose process is gone. Returns how many there were.
pub(crate) fn sweep(place: &Workplace) -> Result<usize> {
    let orphans = orphans(place)?;
    for (path, _owner) in &orphans {
        if let Err(error) = place.disk.remove_folder(path) {
            tracing::warn!(%error, "an abandoned work folder cannot be removed");
        }
    }
    Ok(orphans.len())
}

/// Folders without an owner, with the locks that make us theirs.
fn orphans(place: &Workplace) -> Result<Vec<(PathBuf, Option<File>)>> {
    let gate = lock::open(&place.gate)?;
    lock::uninterrupted(|| gate.lock()).map_err(StoreError::io("lock", &place.gate))?;
    let mut orphans = Vec::new();
    for entry in fs::read_dir(&place.folder).map_err(StoreError::io("list", &place.folder))? {
        let path = entry.map_err(StoreError::io("list", &place.folder))?.path();
        let owner = path.join("owner");
        if !owner.exists() {
            // Its process died before it made the file, or after it removed it.
            orphans.push((path, None));
            continue;
        }
        let Ok(file) = lock::open(&owner) else { continue }; // its process is just removing it
        if lock::try_lock(&file, &owner)? {
            orphans.push((path, Some(file)));
        }
    }
    Ok(orphans)
}

/// A name that nobody has used, or hardly: who makes a folder of this name finds out.
fn unique() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    format!("{:x}-{:x}-{:x}", process::id(), now, COUNTER.fetch_add(1, Ordering::Relaxed))
}
