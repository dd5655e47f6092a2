//! Every change that the store makes to the file system goes through [`Disk`], one method a system call or nearly so.
//! A test can hence stop the store at any of them.

use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{Result, StoreError};

/// The modification time of every finished file in the store: 2000-01-01, in seconds of Unix time. Whoever writes to the
/// file moves it, so a file that still has it is as it was when it was sealed, however coarse the clock.
pub(crate) const SEAL_TIME: u64 = 946_684_800;

/// How many threads wait for the disk at once: the file system joins their syncs into few journal commits.
const SYNCING_THREADS: usize = 8;

/// The file system, as the store writes to it.
#[derive(Clone, Default)]
pub(crate) struct Disk {
    #[cfg(test)]
    pub(crate) faults: std::sync::Arc<crate::crash_safety::Faults>,
}

impl Disk {
    /// Makes a folder and those above it; fine when it exists.
    pub(crate) fn make_folder(&self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        self.step("make folder", path)?;
        fs::create_dir_all(path).map_err(StoreError::io("make folder", path))
    }

    /// Makes a folder; false when there is something of that name.
    pub(crate) fn make_new_folder(&self, path: &Path) -> Result<bool> {
        self.step("make folder", path)?;
        match fs::create_dir(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(StoreError::io("make folder", path)(error)),
        }
    }

    /// Writes a whole file, without syncing it.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        #[cfg(test)]
        if let Err(error) = self.step("write", path) {
            let _ = fs::write(path, &bytes[..bytes.len() / 2]); // a stop in the middle of a write
            return Err(error);
        }
        fs::write(path, bytes).map_err(StoreError::io("write", path))
    }

    /// Adds a line to a file in one system call, so that lines of several processes do not mix.
    pub(crate) fn append(&self, path: &Path, line: &str) -> Result<()> {
        self.step("append to", path)?;
        let file = File::options().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).map_err(StoreError::io("append to", path))
    }

    /// Makes a file read-only and gives it the time of a finished file.
    pub(crate) fn seal(&self, path: &Path) -> Result<()> {
        self.step("seal", path)?;
        let seal = || {
            fs::set_permissions(path, Permissions::from_mode(0o444))?;
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(SEAL_TIME);
            File::open(path)?.set_times(FileTimes::new().set_modified(time))
        };
        seal().map_err(StoreError::io("make read-only", path))
    }

    /// Waits until a file, or the entries of a folder, are on the disk.
    pub(crate) fn sync(&self, path: &Path) -> Result<()> {
        self.step("sync", path)?;
        if cfg!(test) && path.exists() {
            return Ok(()); // the tests stop the store hundreds of times, but not the machine
        }
        File::open(path).and_then(|file| file.sync_all()).map_err(StoreError::io("sync", path))
    }

    /// Renames, replacing a file that is there.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.step("rename to", to)?;
        fs::rename(from, to).map_err(StoreError::io("rename to", to))
    }

    /// Renames if nothing has the new name; whether it did. A file system that cannot do this in one step replaces a file.
    pub(crate) fn rename_new(&self, from: &Path, to: &Path) -> Result<bool> {
        self.step("rename to", to)?;
        let renamed = match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => fs::rename(from, to),
            result => result.map_err(io::Error::from),
        };
        match renamed {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty) => Ok(false),
            Err(error) => Err(StoreError::io("rename to", to)(error)),
        }
    }

    /// Gives a sealed file a second name, or makes a sealed copy where it cannot have one.
    pub(crate) fn link(&self, from: &Path, to: &Path) -> Result<()> {
        self.step("link", to)?;
        match fs::hard_link(from, to) {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => {
                self.copy(from, to)?;
                self.seal(to)
            }
            result => result.map_err(StoreError::io("link", to)),
        }
    }

    /// Copies a file.
    pub(crate) fn copy(&self, from: &Path, to: &Path) -> Result<()> {
        self.step("copy to", to)?;
        fs::copy(from, to).map(drop).map_err(StoreError::io("copy to", to))
    }

    /// Removes a file; fine when it is gone.
    pub(crate) fn remove_file(&self, path: &Path) -> Result<()> {
        self.step("remove", path)?;
        gone(fs::remove_file(path)).map_err(StoreError::io("remove", path))
    }

    /// Removes a folder and all in it; fine when it is gone.
    pub(crate) fn remove_folder(&self, path: &Path) -> Result<()> {
        self.step("remove", path)?;
        gone(fs::remove_dir_all(path)).map_err(StoreError::io("remove", path))
    }

    #[cfg(test)]
    fn step(&self, operation: &'static str, path: &Path) -> Result<()> {
        self.faults.step().map_err(StoreError::io(operation, path))
    }

    #[cfg(not(test))]
    fn step(&self, _operation: &'static str, _path: &Path) -> Result<()> {
        Ok(())
    }
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Does a job that waits for the disk for every item, several at once. Results come in the order of the items; after an
/// error no further item is begun.
pub(crate) fn in_parallel<T: Sync, R: Send>(items: &[T], job: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    if items.len() < 2 {
        return items.iter().map(job).collect();
    }
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<R>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let put = |index: usize, result| *results[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    thread::scope(|scope| {
        for _ in 0..SYNCING_THREADS.min(items.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    let result = job(item);
                    if result.is_err() {
                        next.store(items.len(), Ordering::Relaxed);
                    }
                    put(index, result);
                }
            });
        }
    });
    // Items are begun in order, so that one which was not begun comes after one that failed.
    let taken = results.into_iter().map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner));
    taken.map(|result| result.expect("an item is skipped only after an error")).collect()
}
