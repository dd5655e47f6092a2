//! Many threads and processes on one store.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cache::{Key, Lookup, Record, Store};
use serde_json::json;

/// Names the store in which a test, run again in a process of its own, is to play its part.
const ROOT: &str = "CACHE_TEST_CONCURRENCY_ROOT";

fn key(name: &str) -> Key {
    Key::of(&json!({"name": name}))
}

fn publish(store: &Store, key: &Key, writer: usize) -> Record {
    let work = store.begin(key).unwrap();
    let output = work.output("data").unwrap();
    for index in 0..20 {
        fs::write(output.join(index.to_string()), format!("file {}", index % 15)).unwrap();
    }
    store.publish(work, &[("data".into(), "dir".into())], json!({"writer": writer})).unwrap()
}

/// A process that dies with the test, also when the test fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a test of this file again in another process.
fn spawn(test: &str, root: &Path) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    Process(command.args(["--exact", test]).env(ROOT, root).stdout(Stdio::null()).spawn().unwrap())
}

#[test]
fn many_threads_publish_one_key_and_agree() {
    let folder = tempfile::tempdir().unwrap();
    let records: Vec<Record> = thread::scope(|scope| {
        let publishers: Vec<_> = (0..8)
            .map(|writer| {
                let folder = folder.path();
                scope.spawn(move || {
                    let store = Store::open(folder).unwrap();
                    let record = publish(&store, &key("one"), writer);
                    store.open_artifact(&record.outputs["data"]).unwrap();
                    record
                })
            })
            .collect();
        publishers.into_iter().map(|publisher| publisher.join().unwrap()).collect()
    });
    assert!(records.iter().all(|record| *record == records[0]), "the first result stays for all");
    let store = Store::open(folder.path()).unwrap();
    assert_eq!(store.lookup(&key("one")).unwrap(), Lookup::Hit(records[0].clone()));
    assert_eq!(store.verify().unwrap().damage, []);
    assert_eq!(store.usage().unwrap().cas.files, 15, "equal bytes are kept once");
    assert_eq!(store.usage().unwrap().work.files, 0);
}

#[test]
fn threads_publish_the_same_bytes_under_many_keys() {
    let folder = tempfile::tempdir().unwrap();
    let store = &Store::open(folder.path()).unwrap();
    thread::scope(|scope| {
        for writer in 0..8 {
            scope.spawn(move || publish(store, &key(&writer.to_string()), writer));
        }
    });
    for writer in 0..8 {
        let record = store.lookup(&key(&writer.to_string())).unwrap().hit().expect("a hit");
        assert_eq!(record.info, json!({"writer": writer}));
    }
    assert_eq!((store.usage().unwrap().cas.files, store.keys().unwrap().len()), (15, 8));
}

#[test]
fn threads_that_find_a_damaged_folder_all_get_a_whole_one() {
    let folder = tempfile::tempdir().unwrap();
    let store = &Store::open(folder.path()).unwrap();
    let artifact = &publish(store, &key("one"), 0).outputs["data"];
    for _ in 0..10 {
        let path = store.open_artifact(artifact).unwrap();
        fs::remove_file(path.join("7")).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let path = store.open_artifact(artifact).unwrap();
                    for index in 0..20 {
                        let text = fs::read_to_string(path.join(index.to_string())).unwrap();
                        assert_eq!(text, format!("file {}", index % 15));
                    }
                });
            }
        });
    }
}

#[test]
fn one_process_at_a_time_computes_a_key() {
    const TEST: &str = "one_process_at_a_time_computes_a_key";
    let compute = |root: &Path| {
        let store = Store::open(&root.join("store")).unwrap();
        let _guard = store.lock(&key("one")).unwrap();
        if store.lookup(&key("one")).unwrap().hit().is_none() {
            let times = fs::read_to_string(root.join("times")).unwrap_or_default();
            thread::sleep(Duration::from_millis(50));
            publish(&store, &key("one"), 0);
            fs::write(root.join("times"), times + "computed\n").unwrap();
        }
    };
    if let Ok(root) = std::env::var(ROOT) {
        return compute(Path::new(&root));
    }
    let folder = tempfile::tempdir().unwrap();
    let children: Vec<_> = (0..4).map(|_| spawn(TEST, folder.path())).collect();
    for mut child in children {
        assert!(child.0.wait().unwrap().success());
    }
    assert_eq!(fs::read_to_string(folder.path().join("times")).unwrap(), "computed\n");
}

#[test]
fn processes_publish_one_key_without_a_lock() {
    const TEST: &str = "processes_publish_one_key_without_a_lock";
    if let Ok(root) = std::env::var(ROOT) {
        let store = Store::open(Path::new(&root)).unwrap();
        let record = publish(&store, &key("one"), std::process::id() as usize);
        store.open_artifact(&record.outputs["data"]).unwrap();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let children: Vec<_> = (0..4).map(|_| spawn(TEST, folder.path())).collect();
    for mut child in children {
        assert!(child.0.wait().unwrap().success());
    }
    let store = Store::open(folder.path()).unwrap();
    assert!(store.lookup(&key("one")).unwrap().hit().is_some());
    assert_eq!(store.verify().unwrap().damage, []);
    assert_eq!(store.usage().unwrap().cas.files, 15);
}

/// The owner of a folder is killed by a signal while it works: its folder goes and its lock is free, those of others stay.
#[test]
fn a_sweep_removes_the_folders_of_killed_processes_only() {
    const TEST: &str = "a_sweep_removes_the_folders_of_killed_processes_only";
    if let Ok(root) = std::env::var(ROOT) {
        let store = Store::open(Path::new(&root)).unwrap();
        let _guard = store.lock(&key("one")).unwrap();
        let work = store.begin(&key("one")).unwrap();
        fs::write(work.output("data").unwrap().join("half"), "half").unwrap();
        fs::write(store.runs().join("ready"), "").unwrap();
        loop {
            thread::park(); // until it is killed
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let mine = store.begin(&key("two")).unwrap();
    let mut child = spawn(TEST, folder.path());
    let begun = Instant::now();
    while !store.runs().join("ready").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the other process did not start");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(store.try_lock(&key("one")).unwrap().is_none(), "the other process holds the lock");
    assert_eq!(store.sweep().unwrap(), 0, "everybody is alive");
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    assert_eq!(store.sweep().unwrap(), 1);
    assert!(mine.path().exists());
    assert!(store.try_lock(&key("one")).unwrap().is_some());
    let left: BTreeSet<_> =
        fs::read_dir(folder.path().join("locks")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, BTreeSet::from(["work".into()]), "only the gate of the work folders stays");
}
