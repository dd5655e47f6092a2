//! Makes room: drops results that nobody asked to keep, and what nothing refers to any more.
//!
//! A record goes before its files, so that whoever is stopped halfway leaves files without a record, which the next collection
//! removes, and never a record without its files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::digest::Digest;
use crate::error::{Result, StoreError};
use crate::key::Key;
use crate::lock::{self, IN_USE};
use crate::record::Record;
use crate::store::{Store, is_absence, list};
use crate::usage::{Size, size_of};

/// What may go.
#[derive(Clone, Debug, Default)]
pub struct Wish<'a> {
    /// Results that stay in any case, with their checkpoints and explanations.
    pub keep: BTreeSet<Key>,
    /// When each result was last wanted, as a text that sorts by time: the longest ago goes first, those not in here before all.
    pub last_wanted: BTreeMap<Key, &'a str>,
    /// Results are dropped until the files of those that stay take up at most so many bytes; without, all that may go do.
    pub limit: Option<u64>,
    /// Only say what would go.
    pub dry_run: bool,
}

/// What went, or would go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collection {
    /// Results, in the order they went, with the bytes that are free since no other result had them.
    pub results: Vec<(Key, u64)>,
    /// Files of artifacts, those of `results` and those that belonged to none.
    pub files: Size,
    /// Checkpoints of work that nobody asked to keep.
    pub checkpoints: Size,
    /// Files of the results that stay.
    pub left: Size,
}

/// Keeps results from being collected as long as it lives: held by who works with the store.
#[derive(Debug)]
pub struct InUse {
    /// Locked, shared, as long as it is open.
    _lock: fs::File,
}

impl Store {
    /// Says that the store is worked with: nothing is collected meanwhile. Any number of processes may say so at once.
    pub fn in_use(&self) -> Result<InUse> {
        let path = self.use_path();
        let file = lock::open(&path)?;
        lock::uninterrupted(|| file.lock_shared()).map_err(StoreError::io("lock", &path))?;
        Ok(InUse { _lock: file })
    }

    /// Drops results as wished, and all files that no result has.
    ///
    /// Errors when somebody [works](Store::in_use) with the store.
    pub fn collect(&self, wish: &Wish) -> Result<Collection> {
        let path = self.use_path();
        let gate = lock::open(&path)?;
        if !lock::try_lock(&gate, &path)? {
            return Err(StoreError::InUse { path: self.root().to_path_buf() });
        }
        let mut records = BTreeMap::new();
        for key in self.keys()? {
            match self.record(&key)? {
                Some(record) => drop(records.insert(key, record)),
                // It explains nothing and serves nobody.
                None if !wish.dry_run => self.forget(&key)?,
                None => {}
            }
        }
        let mut holders = Holders::of(records.values());
        let mut collection = Collection::default();
        let mut may_go: Vec<&Key> = records.keys().filter(|key| !wish.keep.contains(key)).collect();
        may_go.sort_by_key(|key| wish.last_wanted.get(key));
        for key in may_go {
            if wish.limit.is_some_and(|limit| holders.bytes <= limit) {
                break;
            }
            collection.results.push((*key, holders.drop(&records[key])));
        }
        if !wish.dry_run {
            for (key, _) in &collection.results {
                self.forget(key)?;
                self.disk.remove_file(&self.preimage_path(key))?;
            }
        }
        self.collect_files(wish, &holders, &mut collection)?;
        self.collect_cuts(wish, &records, &mut collection)?;
        Ok(collection)
    }

    /// Files and folders of artifacts that no record has.
    fn collect_files(&self, wish: &Wish, holders: &Holders, collection: &mut Collection) -> Result<()> {
        for (path, digits) in self.below("trees")? {
            let is_held = digits.parse().is_ok_and(|digest| holders.artifacts.contains_key(&digest));
            if !is_held {
                collection.files = collection.files + size_of(&path, true)?;
                if !wish.dry_run {
                    self.begin_scratch()?.discard(&path)?;
                }
            }
        }
        for (path, digits) in self.below("cas")? {
            let bytes = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(error) if is_absence(&error) => continue,
                Err(error) => return Err(StoreError::io("look at", &path)(error)),
            };
            let size = Size { files: 1, bytes };
            if digits.parse().is_ok_and(|digest| holders.blobs.contains_key(&digest)) {
                collection.left = collection.left + size;
                continue;
            }
            collection.files = collection.files + size;
            if !wish.dry_run {
                self.disk.remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Checkpoints of work that is not to be kept.
    fn collect_cuts(&self, wish: &Wish, records: &BTreeMap<Key, Record>, collection: &mut Collection) -> Result<()> {
        for (name, path) in list(&self.root().join("cut"))? {
            let Ok(key) = name.parse::<Key>() else { continue };
            if wish.keep.contains(&key) || wish.limit.is_some() && !records.contains_key(&key) {
                continue;
            }
            collection.checkpoints = collection.checkpoints + size_of(&path, false)?;
            if !wish.dry_run {
                self.drop_cuts(&key)?;
            }
        }
        Ok(())
    }

    fn use_path(&self) -> PathBuf {
        self.root().join("locks").join(IN_USE)
    }
}

/// How many results have each file and each artifact.
struct Holders {
    blobs: BTreeMap<Digest, u64>,
    artifacts: BTreeMap<Digest, u64>,
    /// Bytes of all files, each once.
    bytes: u64,
}

impl Holders {
    fn of<'a>(records: impl Iterator<Item = &'a Record>) -> Self {
        let mut holders = Holders { blobs: BTreeMap::new(), artifacts: BTreeMap::new(), bytes: 0 };
        for artifact in records.flat_map(|record| record.outputs.values()) {
            *holders.artifacts.entry(artifact.digest).or_default() += 1;
            for file in &artifact.files {
                let times = holders.blobs.entry(file.digest).or_default();
                if *times == 0 {
                    holders.bytes += file.bytes;
                }
                *times += 1;
            }
        }
        holders
    }

    /// Takes a record away; the bytes that nothing has any more.
    fn drop(&mut self, record: &Record) -> u64 {
        let mut free = 0;
        for artifact in record.outputs.values() {
            let_go(&mut self.artifacts, &artifact.digest);
            for file in &artifact.files {
                if let_go(&mut self.blobs, &file.digest) {
                    free += file.bytes;
                }
            }
        }
        self.bytes -= free;
        free
    }
}

/// One holder less; whether it was the last.
fn let_go(holders: &mut BTreeMap<Digest, u64>, digest: &Digest) -> bool {
    let Some(times) = holders.get_mut(digest) else { return false };
    *times -= 1;
    let was_last = *times == 0;
    if was_last {
        holders.remove(digest);
    }
    was_last
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A result with one output of these files.
    fn publish(store: &Store, number: u32, files: &[(&str, usize)]) -> Key {
        let key = store.keep_preimage(&json!(number)).unwrap();
        let work = store.begin(&key).unwrap();
        let folder = work.output("data").unwrap();
        for (name, bytes) in files {
            fs::write(folder.join(name), vec![name.as_bytes()[0]; *bytes]).unwrap();
        }
        store.publish(work, &[("data".into(), "dir".into())], json!({})).unwrap();
        key
    }

    fn setting() -> (tempfile::TempDir, Store, [Key; 3]) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        // `s` is in two of them.
        let keys = [
            publish(&store, 1, &[("a", 1000), ("s", 500)]),
            publish(&store, 2, &[("b", 100), ("s", 500)]),
            publish(&store, 3, &[("c", 10)]),
        ];
        (folder, store, keys)
    }

    #[test]
    fn what_is_not_kept_goes_with_the_files_that_it_alone_has() {
        let (folder, store, [first, second, third]) = setting();
        let wish = Wish { keep: BTreeSet::from([second]), ..Wish::default() };
        let expected = Collection {
            results: if first < third { vec![(first, 1000), (third, 10)] } else { vec![(third, 10), (first, 1000)] },
            files: Size { files: 2, bytes: 1010 },
            checkpoints: Size::default(),
            left: Size { files: 2, bytes: 600 },
        };
        assert_eq!(store.collect(&Wish { dry_run: true, ..wish.clone() }).unwrap(), expected);
        assert!(store.lookup(&first).unwrap().hit().is_some(), "a dry run removes nothing");
        assert_eq!(store.collect(&wish).unwrap(), expected);
        assert!(store.lookup(&first).unwrap().hit().is_none() && store.preimage(&first).unwrap().is_none());
        let kept = store.lookup(&second).unwrap().hit().unwrap();
        let path = store.open_artifact(&kept.outputs["data"]).unwrap();
        assert_eq!(fs::read(path.join("s")).unwrap(), vec![b's'; 500]);
        assert_eq!(store.verify().unwrap().damage, []);
        assert_eq!(store.usage().unwrap().cas, Size { files: 2, bytes: 600 });
        assert_eq!(store.collect(&wish).unwrap().files, Size::default(), "nothing is left to go");
        drop(folder);
    }

    #[test]
    fn under_a_limit_the_longest_unwanted_goes_first_and_no_more_than_must() {
        let (_folder, store, [first, second, third]) = setting();
        let last_wanted = BTreeMap::from([(first, "2026-03"), (second, "2026-01"), (third, "2026-02")]);
        let collect = |limit, dry_run| {
            let wish = Wish { limit: Some(limit), last_wanted: last_wanted.clone(), dry_run, ..Wish::default() };
            store.collect(&wish).unwrap().results
        };
        assert_eq!(collect(1610, true), []);
        assert_eq!(collect(1609, true), [(second, 100)]);
        assert_eq!(collect(1501, true), [(second, 100), (third, 10)]);
        assert_eq!(collect(0, false), [(second, 100), (third, 10), (first, 1500)]);
        assert_eq!(store.keys().unwrap(), []);
    }

    #[test]
    fn nothing_is_collected_while_somebody_works_with_the_store() {
        let (_folder, store, _) = setting();
        let here = [store.in_use().unwrap(), store.in_use().unwrap()];
        assert!(matches!(store.collect(&Wish::default()), Err(StoreError::InUse { .. })));
        store.sweep().unwrap();
        assert!(matches!(store.collect(&Wish::default()), Err(StoreError::InUse { .. })), "a sweep frees no lock");
        drop(here);
        assert_eq!(store.collect(&Wish::default()).unwrap().results.len(), 3);
    }

    #[test]
    fn files_and_checkpoints_that_nothing_has_go_too() {
        let (_folder, store, [first, ..]) = setting();
        let unfinished = Key::of(&json!(9));
        store.save_cut(&unfinished, 1, |folder| fs::write(folder.join("state"), [7; 30])).unwrap();
        store.forget(&first).unwrap();
        let keep: BTreeSet<Key> = store.keys().unwrap().into_iter().collect();
        let kept = Wish { keep: keep.iter().copied().chain([unfinished]).collect(), ..Wish::default() };
        let collection = store.collect(&kept).unwrap();
        assert_eq!((collection.files, collection.checkpoints), (Size { files: 1, bytes: 1000 }, Size::default()));
        assert!(store.newest_cut(&unfinished).unwrap().is_some());
        let collection = store.collect(&Wish { keep, ..Wish::default() }).unwrap();
        assert!(collection.checkpoints.bytes >= 30);
        assert!(store.newest_cut(&unfinished).unwrap().is_none());
    }
}
