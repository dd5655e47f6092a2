//! The store: where things lie, and the short operations on preimages, records, locks and work folders.
//!
//! Publishing is in `publish`, reading artifacts in `artifact`, files of the outside in `source`, checkpoints in `cut`.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value as Json;

use crate::digest::{self, Digest, FileEntry};
use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::key::{Key, canonical};
use crate::lock::{self, Guard, IN_USE};
use crate::record::{self, Lookup, Record, Why};
use crate::stamp::{Identity, Stamp, Stamps, forget_old};
use crate::work::{self, Scratch, Work, Workplace};

/// Folders below the root.
const FOLDERS: [&str; 10] = ["cas", "trees", "ac", "pre", "cut", "names", "runs", "work", "locks", "stamps"];

/// Names the layout of the folders and the forms of the files; another one is refused rather than misread.
const FORMAT: &str = "pipeline-store-v1";

/// The form of action records.
pub(crate) const RECORD_FORM: &str = "pipeline-record-v1";

/// A content-addressed store in a folder, which any number of threads, processes and pipelines may use at once.
pub struct Store {
    root: PathBuf,
    pub(crate) disk: Disk,
    pub(crate) stamps: Stamps,
    place: Workplace,
}

/// How much a file of the store must be looked at before it is believed. What a disk loses without a trace is found by
/// reading alone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Care {
    /// It has the right length, and by its times nobody wrote to it.
    Untouched,
    /// And its bytes were hashed since the machine booted.
    HashedThisBoot,
    /// And they are hashed now.
    HashedNow,
}

/// What a file of the store turned out to be.
pub(crate) enum Condition {
    Whole,
    Missing,
    Damaged(String),
}

impl Store {
    /// Opens the store in the folder `root`, making it where needed. One that cannot be written can still be read.
    ///
    /// Errors when there is none and it cannot be made, or when it is of another format.
    pub fn open(root: &Path) -> Result<Store> {
        Self::open_on(root, Disk::default())
    }

    /// Opens the store in the folder `root` for who only reads: nothing is made, and a store that [is not
    /// there](Store::exists) looks like an empty one.
    ///
    /// Errors when it is of another format.
    pub fn open_to_read(root: &Path) -> Result<Store> {
        let store = Self::at(root, Disk::default())?;
        store.format()?;
        Ok(store)
    }

    pub(crate) fn open_on(root: &Path, disk: Disk) -> Result<Store> {
        let store = Self::at(root, disk)?;
        let exists = store.format()?;
        for folder in FOLDERS {
            match store.disk.make_folder(&store.root.join(folder)) {
                Err(error) if exists && error.is_read_only() => break,
                made => made?,
            }
        }
        if !exists {
            store.write_format()?;
        }
        Ok(store)
    }

    fn at(root: &Path, disk: Disk) -> Result<Store> {
        let root = std::path::absolute(root).map_err(StoreError::io("find", root))?;
        let place = Workplace { folder: root.join("work"), gate: root.join("locks/work"), disk: disk.clone() };
        let stamps = Stamps::open(&root.join("stamps"), disk.clone());
        Ok(Store { root, disk, stamps, place })
    }

    /// Whether there is a store in the folder.
    pub fn exists(&self) -> Result<bool> {
        self.format()
    }

    /// Whether anything can be added or removed here: one that cannot be written serves what it holds.
    pub fn can_be_written(&self) -> Result<bool> {
        match self.begin_scratch() {
            Err(error) if error.is_read_only() => Ok(false),
            begun => begun.map(|_| true),
        }
    }

    /// The store's own folder, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where runs keep their plan, events and logs.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Keeps what a key was made of, and returns the key.
    pub fn keep_preimage(&self, preimage: &Json) -> Result<Key> {
        let text = canonical(preimage);
        let key = Key::of_text(&text);
        let home = self.preimage_path(&key);
        let kept = match read_if_there(&home) {
            Ok(kept) => kept,
            Err(error) => error.into_damage().map(|_| None)?,
        };
        if kept.as_deref() != Some(text.as_bytes()) {
            let scratch = self.begin_scratch()?;
            let path = scratch.path.join("preimage");
            self.disk.write(&path, text.as_bytes())?;
            self.make_parent(&home)?;
            self.disk.rename(&path, &home)?;
        }
        Ok(key)
    }

    /// What a key was made of, with numbers and order of fields in canonical form; none if it was not kept or is damaged.
    pub fn preimage(&self, key: &Key) -> Result<Option<Json>> {
        let text = match read_if_there(&self.preimage_path(key)) {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(None),
            Err(error) => return error.into_damage().map(|_| None),
        };
        let preimage = serde_json::from_slice(&text).ok().filter(|preimage| Key::of(preimage) == *key);
        if preimage.is_none() {
            tracing::warn!(%key, "the kept preimage is damaged and is not used");
        }
        Ok(preimage)
    }

    /// Looks a key up. Damage is a miss, and the next [`publish`](Store::publish) of the key mends it.
    ///
    /// Files are looked at, and read only where their times do not tell that nobody wrote to them. What a disk loses without
    /// a trace is found when the bytes are used: by [`open_artifact`](Store::open_artifact) and
    /// [`copy_artifact`](Store::copy_artifact), which read them all. Errors only when the file system refuses to answer.
    pub fn lookup(&self, key: &Key) -> Result<Lookup> {
        let record = match self.read_record(key)? {
            Ok(record) => record,
            Err(why) => return Ok(Lookup::Miss(why)),
        };
        for (port, artifact) in &record.outputs {
            for file in &artifact.files {
                let (port, path) = (port.clone(), file.path.clone());
                match self.inspect(&self.blob_path(&file.digest), file, Care::Untouched)? {
                    Condition::Whole => {}
                    Condition::Missing => return Ok(Lookup::Miss(Why::ArtifactMissing { port, file: path })),
                    Condition::Damaged(reason) => {
                        return Ok(Lookup::Miss(Why::ArtifactCorrupt { port, file: path, reason }));
                    }
                }
            }
        }
        Ok(Lookup::Hit(record))
    }

    /// What was published under a key, whether or not its files are still whole; none if its record is not.
    pub fn record(&self, key: &Key) -> Result<Option<Record>> {
        Ok(self.read_record(key)?.ok())
    }

    /// The keys that have a record, in order, whole or not.
    pub fn keys(&self) -> Result<Vec<Key>> {
        let mut keys = Vec::new();
        for (_, folder) in list(&self.root.join("ac"))? {
            keys.extend(list(&folder)?.iter().filter_map(|(name, _)| name.parse::<Key>().ok()));
        }
        keys.sort_unstable();
        Ok(keys)
    }

    /// Drops the record of a key, so that it is a miss. Its files stay, for other records may share them.
    pub fn forget(&self, key: &Key) -> Result<()> {
        self.disk.remove_file(&self.record_path(key))
    }

    /// Waits for the lock of a key: who holds it is the only one on this machine to compute it.
    pub fn lock(&self, key: &Key) -> Result<Guard> {
        lock::take(&self.lock_path(key))
    }

    /// Takes the lock of a key, unless somebody else has it.
    pub fn try_lock(&self, key: &Key) -> Result<Option<Guard>> {
        lock::try_take(&self.lock_path(key))
    }

    /// Makes a work folder for a key. It is removed when dropped, or by [`sweep`](Store::sweep) if the process dies.
    pub fn begin(&self, key: &Key) -> Result<Work> {
        Work::begin(&self.place, key)
    }

    /// Removes what processes that are gone left behind, and returns how many work folders there were. Their lock files go,
    /// too, checkpoints of work that is finished, and stamps of boots long ago. Safe at any time.
    pub fn sweep(&self) -> Result<usize> {
        for (name, path) in list(&self.root.join("locks"))? {
            // Those two are never removed: several hold them at once.
            if path != self.place.gate && name != IN_USE {
                drop(lock::try_take(&path)?); // who gives a lock up removes its file
            }
        }
        self.sweep_cuts()?;
        forget_old(&self.root.join("stamps"));
        work::sweep(&self.place)
    }

    /// A folder of the store's own in which to build what is then renamed.
    pub(crate) fn begin_scratch(&self) -> Result<Scratch> {
        Scratch::begin(&self.place, "store")
    }

    /// The record of a key, if it is there and whole; its files are not looked at.
    pub(crate) fn read_record(&self, key: &Key) -> Result<Result<Record, Why>> {
        let text = match read_if_there(&self.record_path(key)) {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(Err(Why::NoRecord)),
            Err(error) => return error.into_damage().map(|reason| Err(Why::RecordCorrupt { reason })),
        };
        let checked = record::unseal_text::<Record>(RECORD_FORM, &text).and_then(|record| match record.fault() {
            None if record.key == *key => Ok(record),
            None => Err(format!("it is the record of {}", record.key.short())),
            Some(fault) => Err(fault),
        });
        Ok(checked.map_err(|reason| Why::RecordCorrupt { reason }))
    }

    /// Looks at a file of the store, which should hold the bytes of `expected`.
    pub(crate) fn inspect(&self, path: &Path, expected: &FileEntry, care: Care) -> Result<Condition> {
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if is_absence(&error) => return Ok(Condition::Missing),
            Err(error) => return Err(StoreError::io("look at", path)(error)),
        };
        if !metadata.is_file() {
            return Ok(Condition::Damaged("expected a plain file".into()));
        }
        if metadata.len() != expected.bytes {
            return Ok(Condition::Damaged(format!("expected {} bytes, got {}", expected.bytes, metadata.len())));
        }
        let identity = Identity::of(&metadata);
        let believed = match self.stamps.get(&identity) {
            Stamp::Of(digest) => care != Care::HashedNow && digest == expected.digest,
            Stamp::None => care == Care::Untouched && identity.is_sealed(),
            Stamp::Outdated => false,
        };
        if believed {
            return Ok(Condition::Whole);
        }
        let now = SystemTime::now();
        let digest = match hash_file(path) {
            Ok((digest, _)) => digest,
            Err(error) => return error.into_damage().map(Condition::Damaged),
        };
        if digest != expected.digest {
            // Remembered, for a store that cannot be written keeps it.
            self.stamps.put(identity, digest);
            return Ok(Condition::Damaged(format!("expected {}, got {}", expected.digest.short(), digest.short())));
        }
        if identity.is_sealed() {
            self.stamps.put(identity, digest);
        } else if self.disk.seal(path).is_ok() {
            // It had the right bytes all the same: a copy of the store, for example.
            self.stamp(path, digest);
        } else if identity.is_settled(now) {
            self.stamps.put(identity, digest);
        }
        Ok(Condition::Whole)
    }

    /// Remembers that a file, which the store itself has just moved, named or sealed, was hashed before that.
    pub(crate) fn stamp(&self, path: &Path, digest: Digest) {
        // One that is gone again needs none.
        let Ok(metadata) = fs::symlink_metadata(path) else { return };
        let identity = Identity::of(&metadata);
        if identity.is_sealed() {
            self.stamps.put(identity, digest);
        }
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        let digits = digest.to_string();
        self.root.join("cas").join(&digits[..2]).join(&digits[2..])
    }

    pub(crate) fn tree_path(&self, digest: &Digest) -> PathBuf {
        let digits = digest.to_string();
        self.root.join("trees").join(&digits[..2]).join(&digits[2..])
    }

    pub(crate) fn record_path(&self, key: &Key) -> PathBuf {
        let digits = key.to_string();
        self.root.join("ac").join(&digits[..2]).join(digits)
    }

    pub(crate) fn preimage_path(&self, key: &Key) -> PathBuf {
        let digits = key.to_string();
        self.root.join("pre").join(&digits[..2]).join(digits)
    }

    pub(crate) fn cuts_path(&self, key: &Key) -> PathBuf {
        self.root.join("cut").join(key.to_string())
    }

    /// Makes the folder in which `path` is to lie.
    pub(crate) fn make_parent(&self, path: &Path) -> Result<()> {
        self.disk.make_folder(path.parent().expect("paths in the store lie below its root"))
    }

    /// The lock of those who build the folder of an artifact.
    pub(crate) fn lock_tree(&self, digest: &Digest) -> Result<Guard> {
        lock::take(&self.root.join("locks").join(format!("{digest}.tree")))
    }

    fn lock_path(&self, key: &Key) -> PathBuf {
        self.root.join("locks").join(key.to_string())
    }

    /// Whether there is a store, of this format. Errors when there is one of another.
    fn format(&self) -> Result<bool> {
        let found = read_if_there(&self.root.join("format"))?;
        match found.map(|text| String::from_utf8_lossy(&text).trim().to_string()).as_deref() {
            Some(FORMAT) => Ok(true),
            None | Some("") => Ok(false),
            Some(found) => Err(StoreError::Format { path: self.root.clone(), found: found.into(), expected: FORMAT }),
        }
    }

    fn write_format(&self) -> Result<()> {
        let scratch = self.begin_scratch()?;
        let draft = scratch.path.join("format");
        self.disk.write(&draft, format!("{FORMAT}\n").as_bytes())?;
        self.disk.rename(&draft, &self.root.join("format"))
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("root", &self.root).finish_non_exhaustive()
    }
}

/// Names and paths in a folder, in the order of the names; nothing if it is gone. Names that are not UTF-8 are not the store's.
pub(crate) fn list(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_absence(&error) => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", folder)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::io("list", folder))?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

pub(crate) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_absence(&error) => Ok(None),
        Err(error) => Err(StoreError::io("read", path)(error)),
    }
}

/// Nothing is there.
pub(crate) fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Digest and length of a file.
pub(crate) fn hash_file(path: &Path) -> Result<(Digest, u64)> {
    File::open(path).and_then(|file| digest::of_file(&file)).map_err(StoreError::io("read", path))
}
