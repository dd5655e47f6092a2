//! Locks of the kernel on small files: they are gone with the process that held them, however it ended.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};

/// Name of the lock of those who work with a store.
pub(crate) const IN_USE: &str = "use";

/// Holds a lock until it is dropped.
#[derive(Debug)]
pub struct Guard {
    path: PathBuf,
    /// Closing it gives the lock up.
    file: File,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Safe although others may wait on this very file: who gets the lock of a removed file looks again. A file that
        // cannot be removed is only litter.
        if matches!(is_still_at(&self.file, &self.path), Ok(true)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Takes the lock at `path`, waiting for it.
pub(crate) fn take(path: &Path) -> Result<Guard> {
    loop {
        let file = open(path)?;
        uninterrupted(|| file.lock()).map_err(StoreError::io("lock", path))?;
        if is_still_at(&file, path)? {
            return Ok(Guard { path: path.into(), file });
        }
    }
}

/// Takes the lock at `path` if nobody holds it.
///
/// Errors when the file cannot be made or locked.
pub fn try_take(path: &Path) -> Result<Option<Guard>> {
    loop {
        let file = open(path)?;
        if !try_lock(&file, path)? {
            return Ok(None);
        }
        if is_still_at(&file, path)? {
            return Ok(Some(Guard { path: path.into(), file }));
        }
    }
}

/// Locks an open file if nobody else has; whether it did.
pub(crate) fn try_lock(file: &File, path: &Path) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(StoreError::io("lock", path)(error)),
    }
}

/// Opens or makes a file to lock.
pub(crate) fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(StoreError::io("open lock file", path))
}

/// Repeats a wait that a signal broke off.
pub(crate) fn uninterrupted(mut wait: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match wait() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => return result,
        }
    }
}

/// Whether `path` still names the file that was opened: its last holder removes it, and then the lock protects nothing.
fn is_still_at(file: &File, path: &Path) -> Result<bool> {
    let ours = file.metadata().map_err(StoreError::io("look at", path))?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("look at", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn one_holder_at_a_time_although_the_file_is_removed_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let inside = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _guard = take(&path).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "somebody else is inside");
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(!path.exists(), "the last holder removes the file");
    }

    #[test]
    fn a_held_lock_is_not_taken_and_a_dropped_one_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let guard = try_take(&path).unwrap().expect("nobody holds it");
        assert!(try_take(&path).unwrap().is_none());
        drop(guard);
        assert!(try_take(&path).unwrap().is_some());
    }

    #[test]
    fn a_lock_file_that_somebody_removed_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        drop(take(&path).unwrap());
        let guard = take(&path).unwrap();
        fs::remove_file(&path).unwrap();
        drop(guard);
        assert!(try_take(&path).unwrap().is_some());
    }
}
