//! The store is stopped at every change it makes to the file system, and must be right afterwards.
//!
//! A stop for good (a crash: nothing works any more, not even cleaning up) and a single failure (disk full for a moment) are
//! tried at each step in turn, until an operation gets through without meeting its fault.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};

use serde_json::json;

use crate::disk::Disk;
use crate::{Digest, Key, Lookup, Record, Result, Store, StoreError};

/// When the file system fails.
#[derive(Default)]
pub(crate) struct Faults {
    /// Steps that still succeed.
    left: AtomicI64,
    mode: AtomicU8,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Never = 0,
    /// One step fails, the next ones succeed.
    Once = 1,
    /// All steps fail from then on.
    Dead = 2,
    /// The process is killed.
    Kill = 3,
    /// All steps are refused, and nothing can be changed.
    ReadOnly = 4,
}

impl Faults {
    pub(crate) fn step(&self) -> io::Result<()> {
        let mode = self.mode.load(Ordering::SeqCst);
        if mode == Mode::Never as u8 {
            return Ok(());
        }
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        let fails = if mode == Mode::Once as u8 { left == 0 } else { left <= 0 };
        if fails && mode == Mode::Kill as u8 {
            std::process::abort();
        }
        let kind = if mode == Mode::ReadOnly as u8 { ErrorKind::ReadOnlyFilesystem } else { ErrorKind::StorageFull };
        if fails { Err(kind.into()) } else { Ok(()) }
    }

    fn arm(&self, mode: Mode, steps: i64) {
        self.left.store(steps, Ordering::SeqCst);
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// Whether the fault was met.
    fn was_met(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }
}

fn faulty_store(root: &Path) -> (Store, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    (Store::open_on(root, Disk { faults: faults.clone() }).unwrap(), faults)
}

fn key() -> Key {
    Key::of(&json!({"kind": "test"}))
}

/// Two outputs, with a file in a folder, equal files, an empty file, and a file with a second name elsewhere.
fn publish(store: &Store, outside: &Path) -> Result<Record> {
    let work = store.begin(&key())?;
    let model = work.output("model")?;
    fs::create_dir(model.join("deep")).unwrap();
    fs::write(model.join("weights"), vec![7; 10_000]).unwrap();
    fs::write(model.join("deep/same"), "same").unwrap();
    fs::write(model.join("empty"), "").unwrap();
    let metrics = work.output("metrics")?;
    fs::write(metrics.join("same"), "same").unwrap();
    fs::hard_link(outside, metrics.join("linked")).unwrap();
    let outputs = [("model".into(), "model".into()), ("metrics".into(), "metrics".into())];
    store.publish(work, &outputs, json!({"seconds": 1}))
}

fn assert_whole(store: &Store, record: &Record) {
    let model = store.open_artifact(&record.outputs["model"]).unwrap();
    assert_eq!(fs::read(model.join("weights")).unwrap(), vec![7; 10_000]);
    assert_eq!(fs::read_to_string(model.join("deep/same")).unwrap(), "same");
    assert_eq!(fs::read_to_string(model.join("empty")).unwrap(), "");
    let metrics = store.open_artifact(&record.outputs["metrics"]).unwrap();
    assert_eq!(fs::read_to_string(metrics.join("linked")).unwrap(), "linked");
}

/// A store after a stop is whole or a clean miss, and a second try succeeds. Returns whether it was a hit.
fn assert_sound(root: &Path, outside: &Path) -> bool {
    let store = Store::open(root).unwrap();
    let verification = store.verify().unwrap();
    assert_eq!(verification.damage, [], "nothing half done may lie where results lie");
    let found = store.lookup(&key()).unwrap();
    if let Lookup::Hit(record) = &found {
        assert_whole(&store, record);
    }
    let record = publish(&store, outside).unwrap();
    assert_whole(&store, &record);
    assert_eq!(store.lookup(&key()).unwrap(), Lookup::Hit(record));
    store.sweep().unwrap();
    assert_eq!(fs::read_dir(root.join("work")).unwrap().count(), 0, "work folders are left");
    assert_eq!(fs::read_to_string(outside).unwrap(), "linked");
    assert!(!fs::metadata(outside).unwrap().permissions().readonly(), "a file of others was sealed");
    matches!(found, Lookup::Hit(_))
}

#[test]
fn publishing_may_be_stopped_at_every_step() {
    for mode in [Mode::Once, Mode::Dead] {
        let (mut hits, mut misses) = (0, 0);
        for steps in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let (root, outside) = (folder.path().join("store"), folder.path().join("outside"));
            fs::write(&outside, "linked").unwrap();
            let (store, faults) = faulty_store(&root);
            faults.arm(mode, steps);
            let published = publish(&store, &outside);
            let met = faults.was_met();
            if let Err(error) = &published {
                assert!(met && error.is_io(), "{error}");
            }
            drop(store);
            let hit = assert_sound(&root, &outside);
            assert!(hit || published.is_err(), "{mode:?} at {steps}: a published result is gone");
            *if hit { &mut hits } else { &mut misses } += 1;
            if !met {
                break;
            }
        }
        assert!(
            misses > 30 && hits > 1,
            "{mode:?}: expected stops before and after the record, got {misses} and {hits}"
        );
    }
}

/// The test runs itself in another process, which is killed at a step. Many steps have been tried above; this shows that a
/// real death leaves what the simulated one does, and that its locks and folders are free.
#[test]
fn a_killed_process_leaves_no_lock_and_no_folder() {
    const ROOT: &str = "CACHE_TEST_KILLED_ROOT";
    const STEPS: &str = "CACHE_TEST_KILLED_STEPS";
    if let (Ok(root), Ok(steps)) = (std::env::var(ROOT), std::env::var(STEPS)) {
        let root = Path::new(&root);
        let (store, faults) = faulty_store(&root.join("store"));
        let _guard = store.lock(&key()).unwrap();
        faults.arm(Mode::Kill, steps.parse().unwrap());
        publish(&store, &root.join("outside")).unwrap();
        return;
    }
    for steps in [0, 1, 2, 8, 20, 30, 1000] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("outside"), "linked").unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash_safety::a_killed_process_leaves_no_lock_and_no_folder"])
            .env(ROOT, folder.path())
            .env(STEPS, steps.to_string())
            .output()
            .unwrap();
        assert_eq!(child.status.success(), steps == 1000, "{}", String::from_utf8_lossy(&child.stdout));
        let store = Store::open(&folder.path().join("store")).unwrap();
        assert!(store.try_lock(&key()).unwrap().is_some(), "the lock outlived its process");
        let hit = assert_sound(&folder.path().join("store"), &folder.path().join("outside"));
        assert!(hit || steps != 1000);
    }
}

#[test]
fn saving_a_checkpoint_may_be_stopped_at_every_step() {
    let save = |store: &Store, round: u64| {
        store.save_cut(&key(), round, |path| -> io::Result<()> {
            fs::create_dir(path.join("deep"))?;
            fs::write(path.join("deep/state"), format!("state {round}"))
        })
    };
    for mode in [Mode::Once, Mode::Dead] {
        for steps in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let (store, faults) = faulty_store(folder.path());
            save(&store, 1).unwrap();
            save(&store, 2).unwrap();
            faults.arm(mode, steps);
            let saved = save(&store, 3);
            let met = faults.was_met();
            assert!(met || saved.is_ok());
            drop(store);

            let store = Store::open(folder.path()).unwrap();
            let cut = store.newest_cut(&key()).unwrap().expect("an earlier checkpoint is there");
            assert!(cut.round == 3 || (cut.round == 2 && saved.is_err()), "{mode:?} at {steps}: {cut:?}");
            assert_eq!(fs::read_to_string(cut.path.join("deep/state")).unwrap(), format!("state {}", cut.round));
            assert_eq!(store.verify().unwrap().damage, []);
            save(&store, 3).unwrap();
            assert_eq!(store.cuts(&key()).unwrap().iter().map(|(round, _)| *round).collect::<Vec<_>>(), [3, 2]);
            store.sweep().unwrap();
            assert_eq!(fs::read_dir(folder.path().join("work")).unwrap().count(), 0);
            if !met {
                break;
            }
        }
    }
}

#[test]
fn keeping_a_preimage_and_building_a_folder_may_be_stopped_at_every_step() {
    let preimage = json!({"kind": "test"});
    for mode in [Mode::Once, Mode::Dead] {
        for steps in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let (root, outside) = (folder.path().join("store"), folder.path().join("outside"));
            fs::write(&outside, "linked").unwrap();
            let (store, faults) = faulty_store(&root);
            let record = publish(&store, &outside).unwrap();
            let artifact = &record.outputs["model"];
            fs::remove_file(store.tree_path(&artifact.digest).join("weights")).unwrap();
            faults.arm(mode, steps);
            let kept = store.keep_preimage(&preimage);
            let opened = store.open_artifact(artifact);
            let met = faults.was_met();
            assert!(met || (kept.is_ok() && opened.is_ok()));
            for result in [kept.map(drop), opened.map(drop)] {
                assert!(!matches!(result, Err(StoreError::Corrupt { .. })), "a full disk is not damage");
            }
            drop(store);

            let store = Store::open(&root).unwrap();
            assert_eq!(store.keep_preimage(&preimage).unwrap(), key());
            assert_eq!(store.preimage(&key()).unwrap(), Some(preimage.clone()));
            assert_whole(&store, &record);
            assert!(assert_sound(&root, &outside));
            if !met {
                break;
            }
        }
    }
}

#[test]
fn opening_a_store_may_be_stopped_at_every_step() {
    for steps in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let faults = Arc::new(Faults::default());
        faults.arm(Mode::Dead, steps);
        let opened = Store::open_on(folder.path(), Disk { faults: faults.clone() });
        assert!(faults.was_met() || opened.is_ok());
        drop(opened);
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.lookup(&key()).unwrap().miss().unwrap().to_string(), "no result is recorded for this key");
        assert_eq!(store.blob_path(&Digest::of(b"")).parent().unwrap(), folder.path().join("cas/af"));
        if !faults.was_met() {
            break;
        }
    }
}

#[test]
fn a_store_that_cannot_be_written_serves_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let (root, outside) = (folder.path().join("store"), folder.path().join("linked"));
    fs::write(&outside, "linked").unwrap();
    let record = publish(&Store::open(&root).unwrap(), &outside).unwrap();
    assert_whole(&Store::open(&root).unwrap(), &record);
    let weights = root.join("cas").join(&Digest::of(&[7; 10_000]).to_string()[..2]);
    let blob = fs::read_dir(weights).unwrap().next().unwrap().unwrap().path();
    fs::remove_dir(root.join("runs")).unwrap(); // one that it cannot make is not missed

    let faults = Arc::new(Faults::default());
    faults.arm(Mode::ReadOnly, 0);
    let store = Store::open_on(&root, Disk { faults: faults.clone() }).unwrap();
    assert!(!store.can_be_written().unwrap());
    assert_eq!(store.lookup(&key()).unwrap(), Lookup::Hit(record.clone()));
    assert_whole(&store, &record);
    let copy = folder.path().join("copy");
    store.copy_artifact(&record.outputs["model"], &copy, &|| true).unwrap();
    assert_eq!(fs::read(copy.join("weights")).unwrap(), vec![7; 10_000]);
    assert!(publish(&store, &outside).unwrap_err().is_read_only());

    // What is damaged cannot be removed, and is a miss all the same.
    fs::set_permissions(&blob, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    fs::write(&blob, vec![8; 10_000]).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(crate::disk::SEAL_TIME);
    fs::File::open(&blob).unwrap().set_times(fs::FileTimes::new().set_modified(time)).unwrap();
    let error = store.open_artifact(&record.outputs["model"]).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    assert!(matches!(store.lookup(&key()).unwrap(), Lookup::Miss(_)));
    assert!(blob.exists());

    let nowhere = folder.path().join("nowhere");
    assert!(Store::open_on(&nowhere, Disk { faults }).unwrap_err().is_read_only());
}
