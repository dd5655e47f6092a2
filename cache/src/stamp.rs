//! Stamps: which files were hashed since the machine booted, and what the digest was.
//!
//! They spare reading bytes again, and hold no result: a lost stamp costs one more hash. Hence they are never synced, and
//! each boot has its own file of lines, to which all processes append.
//!
//! A stamp is of a file with the times it had when it was hashed. Whoever writes to a file moves its time of change, which
//! nobody can set: so a write shows here even where the file's other times were put back.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::digest::Digest;
use crate::disk::{Disk, SEAL_TIME};

/// A file of the outside that was written to within this time before it was hashed may be written to again without its
/// times showing it: clocks of file systems are coarse, those of file servers differ from ours.
const SAFE_AGE: Duration = Duration::from_secs(2);

/// Stamps of boots that nobody added to for this long are removed.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);

/// What changes when the bytes of a file change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: i128,
    /// The time of the last change of the file, its attributes or the number of its names.
    changed: i128,
}

impl Identity {
    /// What the system says of a file.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether the file is one of the store's, and still has the time that it was sealed with.
    pub(crate) fn is_sealed(&self) -> bool {
        self.modified == nanoseconds(SEAL_TIME as i64, 0)
    }

    /// Whether any later write will show in this identity, as seen at `now`, which is before the file is hashed.
    pub(crate) fn is_settled(&self, now: SystemTime) -> bool {
        let Ok(now) = now.duration_since(SystemTime::UNIX_EPOCH) else { return false };
        let last = self.modified.max(self.changed);
        last + SAFE_AGE.as_nanos() as i128 <= now.as_nanos() as i128
    }
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
}

/// The stamps of this boot.
pub(crate) struct Stamps {
    disk: Disk,
    /// None where the boot cannot be told from the last one: then stamps live as long as the process.
    path: Option<PathBuf>,
    known: Mutex<Known>,
}

/// What is remembered of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stamp {
    /// It was not hashed since the machine booted.
    None,
    /// It had this digest, and is as it was then.
    Of(Digest),
    /// It was hashed, and changed or was given another name since.
    Outdated,
}

#[derive(Default)]
struct Known {
    /// The newest stamp of each file, by device and inode.
    stamps: HashMap<(u64, u64), (Identity, Digest)>,
    /// How far the file has been read.
    read: u64,
}

impl Known {
    fn get(&self, identity: &Identity) -> Stamp {
        match self.stamps.get(&(identity.device, identity.inode)) {
            None => Stamp::None,
            Some((known, digest)) if known == identity => Stamp::Of(*digest),
            Some(_) => Stamp::Outdated,
        }
    }

    /// What it held before.
    fn put(&mut self, identity: Identity, digest: Digest) -> Option<(Identity, Digest)> {
        self.stamps.insert((identity.device, identity.inode), (identity, digest))
    }
}

impl Stamps {
    pub(crate) fn open(folder: &Path, disk: Disk) -> Self {
        Stamps { disk, path: boot().map(|boot| folder.join(boot)), known: Mutex::default() }
    }

    /// What is remembered of the file with this identity, by any process of this boot.
    pub(crate) fn get(&self, identity: &Identity) -> Stamp {
        let mut known = self.known();
        if !matches!(known.get(identity), Stamp::Of(_)) {
            self.read_on(&mut known);
        }
        known.get(identity)
    }

    /// Remembers that a file with this identity was hashed.
    pub(crate) fn put(&self, identity: Identity, digest: Digest) {
        let Identity { device, inode, bytes, modified, changed } = identity;
        if self.known().put(identity, digest) == Some((identity, digest)) {
            return;
        }
        if let Some(path) = &self.path {
            let line = format!("{digest} {device} {inode} {bytes} {modified} {changed}\n");
            if let Err(error) = self.disk.append(path, &line) {
                tracing::debug!(%error, "a stamp was not kept; the file will be hashed again");
            }
        }
    }

    fn read_on(&self, known: &mut Known) {
        let Some(path) = &self.path else { return };
        let Ok(mut file) = File::open(path) else { return };
        let mut text = Vec::new();
        if file.seek(SeekFrom::Start(known.read)).and_then(|_| file.read_to_end(&mut text)).is_err() {
            return;
        }
        // A line without an end is still being written.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        known.read += whole as u64;
        let lines = String::from_utf8_lossy(&text[..whole]);
        for (identity, digest) in lines.lines().filter_map(parse) {
            known.put(identity, digest);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One line; none if it is not whole, which an append to a full disk leaves behind.
fn parse(line: &str) -> Option<(Identity, Digest)> {
    let fields: Vec<&str> = line.split(' ').collect();
    let [digest, device, inode, bytes, modified, changed] = fields[..] else { return None };
    let identity = Identity {
        device: device.parse().ok()?,
        inode: inode.parse().ok()?,
        bytes: bytes.parse().ok()?,
        modified: modified.parse().ok()?,
        changed: changed.parse().ok()?,
    };
    Some((identity, digest.parse().ok()?))
}

/// A name that no other boot of this or another machine has.
fn boot() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let name = name.trim();
    let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    plain.then(|| name.to_string())
}

/// Removes files of earlier boots. A file of another machine that still uses it costs that machine some hashing.
pub(crate) fn forget_old(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        if modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > FORGOTTEN_AFTER)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(inode: u64) -> Identity {
        Identity { device: 1, inode, bytes: 3, modified: 4, changed: 5 }
    }

    #[test]
    fn stamps_reach_another_process_of_this_boot() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Stamps::open(folder.path(), Disk::default());
        let reader = Stamps::open(folder.path(), Disk::default());
        assert_eq!(reader.get(&identity(1)), Stamp::None);
        writer.put(identity(1), Digest::of(b"one"));
        writer.put(identity(1), Digest::of(b"later"));
        writer.put(identity(2), Digest::of(b"two"));
        if boot().is_some() {
            assert_eq!(reader.get(&identity(1)), Stamp::Of(Digest::of(b"later")));
        }
        assert_eq!(writer.get(&identity(2)), Stamp::Of(Digest::of(b"two")));
        assert_eq!(writer.get(&Identity { changed: 6, ..identity(2) }), Stamp::Outdated);
    }

    #[test]
    fn a_torn_line_is_not_believed() {
        let whole = format!("{} 1 2 3 4 5", Digest::of(b"x"));
        assert_eq!(parse(&whole), Some((identity(2), Digest::of(b"x"))));
        for torn in [&whole[..30], &whole[..whole.len() - 2], &format!("{}{whole}", &whole[..74])] {
            assert_eq!(parse(torn), None, "{torn}");
        }
    }

    #[test]
    fn a_fresh_file_is_not_settled() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let at = |modified: i128, changed: i128| Identity {
            modified: modified * 1_000_000_000,
            changed: changed * 1_000_000_000,
            ..identity(1)
        };
        assert!(at(997, 998).is_settled(now));
        assert!(!at(999, 998).is_settled(now));
        assert!(!at(5, 999).is_settled(now), "bytes changed and the time was set back");
        assert!(!at(2000, 5).is_settled(now), "from the future");
    }
}
