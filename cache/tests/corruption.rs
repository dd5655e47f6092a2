//! Whatever happens to the files of a store, a lookup is a whole hit or a miss, and publishing again mends it.

use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use cache::{Artifact, Digest, Key, Lookup, Record, Store, StoreError, Usage, Why, copy_source};
use serde_json::json;
use tempfile::TempDir;

const WEIGHTS: &[u8] = b"0123456789";

struct Fixture {
    folder: TempDir,
    store: Store,
    key: Key,
}

impl Fixture {
    /// A store with one published result.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let key = store.keep_preimage(&json!({"kind": "train"})).unwrap();
        let fixture = Fixture { folder, store, key };
        fixture.publish();
        fixture
    }

    fn publish(&self) -> Record {
        publish(&self.store, &self.key, &[("weights", WEIGHTS), ("deep/config", b"{}")])
    }

    fn miss(&self) -> Why {
        self.store.lookup(&self.key).unwrap().miss().expect("a miss")
    }

    fn artifact(&self) -> Artifact {
        self.store.lookup(&self.key).unwrap().hit().expect("a hit").outputs["model"].clone()
    }

    fn assert_whole(&self) {
        let path = self.store.open_artifact(&self.artifact()).unwrap();
        assert_eq!(files(&path), ["deep/config", "weights"]);
        assert_eq!(fs::read(path.join("weights")).unwrap(), WEIGHTS);
        assert_eq!(self.store.verify().unwrap().damage, []);
    }

    fn assert_mended(&self) {
        self.publish();
        self.assert_whole();
    }

    fn at(&self, part: &str, name: &str, from: usize) -> PathBuf {
        self.store.root().join(part).join(&name[..2]).join(&name[from..])
    }

    fn blob(&self) -> PathBuf {
        self.at("cas", &Digest::of(WEIGHTS).to_string(), 2)
    }

    fn record(&self) -> PathBuf {
        self.at("ac", &self.key.to_string(), 0)
    }

    /// The store as a process after the next boot sees it.
    fn after_boot(mut self) -> Self {
        fs::remove_dir_all(self.store.root().join("stamps")).unwrap();
        self.store = Store::open(self.store.root()).unwrap();
        self
    }
}

fn publish(store: &Store, key: &Key, files: &[(&str, &[u8])]) -> Record {
    let work = store.begin(key).unwrap();
    let output = work.output("model").unwrap();
    for (name, bytes) in files {
        fs::create_dir_all(output.join(name).parent().unwrap()).unwrap();
        fs::write(output.join(name), bytes).unwrap();
    }
    store.publish(work, &[("model".into(), "model".into())], json!({})).unwrap()
}

fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            found.extend(files(&entry.path()).into_iter().map(|inner| format!("{name}/{inner}")));
        } else {
            found.push(name);
        }
    }
    found.sort();
    found
}

/// Writes in place, as nobody should.
fn overwrite(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Writes in place and hides it, as far as anybody can.
fn overwrite_secretly(path: &Path, bytes: &[u8]) {
    sleep(Duration::from_millis(20)); // the clocks of file systems are coarse
    overwrite_with_its_times(path, bytes);
}

/// Writes in place and keeps the time at which it was written.
fn overwrite_with_its_times(path: &Path, bytes: &[u8]) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    overwrite(path, bytes);
    File::open(path).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
}

#[test]
fn a_published_result_is_a_hit_and_is_read_only() {
    let fixture = Fixture::new();
    fixture.assert_whole();
    assert_eq!(fs::metadata(fixture.blob()).unwrap().permissions().mode() & 0o777, 0o444);
    assert_eq!(fixture.artifact().bytes, 12);
    assert_eq!(fixture.store.keys().unwrap(), [fixture.key]);
    assert_eq!(fs::read_dir(fixture.store.root().join("work")).unwrap().count(), 0);
}

#[test]
fn a_changed_byte_is_a_miss() {
    let fixture = Fixture::new();
    overwrite(&fixture.blob(), b"0123x56789");
    let why = fixture.miss().to_string();
    assert!(why.starts_with("`weights` of output `model` is damaged: expected "), "{why}");
    fixture.assert_mended();
}

/// Any byte of any file, by the name that the blob has or that of the folder's file.
#[test]
fn a_byte_changed_secretly_is_a_miss_in_the_same_boot() {
    for (name, bytes) in [("weights", WEIGHTS), ("deep/config", b"{}")] {
        for at in 0..bytes.len() {
            let fixture = Fixture::new();
            let tree = fixture.store.open_artifact(&fixture.artifact()).unwrap();
            let blob = fixture.at("cas", &Digest::of(bytes).to_string(), 2);
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1 << (at % 8);
            overwrite_secretly(&if at % 2 == 0 { blob } else { tree.join(name) }, &flipped);
            let why = fixture.miss().to_string();
            assert!(why.starts_with(&format!("`{name}` of output `model` is damaged: ")), "{why}");
            fixture.assert_mended();
        }
    }
}

/// Any bit of anything that a store keeps, in the next boot: what is damaged is never used, and the same work mends it.
/// `CACHE_FLIPS=10000` is the long version.
#[test]
fn a_flipped_bit_is_found_before_it_is_used() {
    let flips: u64 = std::env::var("CACHE_FLIPS").map_or(120, |flips| flips.parse().expect("a number"));
    let preimage = json!({"kind": "train"});
    let state = |round: u64| format!("state {round}, and what belongs to it");
    let save = |fixture: &Fixture, round: u64| {
        fixture.store.save_cut(&fixture.key, round, |path| fs::write(path.join("state"), state(round))).unwrap();
    };
    let mut fixture = Fixture::new();
    let mut found = std::collections::BTreeMap::<String, u64>::new();
    for flip in 0..flips {
        save(&fixture, 1);
        save(&fixture, 2);
        let root = fixture.store.root().to_owned();
        let kept = |name: &String| ["cas/", "ac/", "pre/", "cut/"].iter().any(|part| name.starts_with(part));
        let all: Vec<String> = files(&root).into_iter().filter(kept).collect();
        // Spread without a pattern, and the same in every run.
        let digits = Digest::of(&flip.to_le_bytes()).to_string();
        let drawn = |at: usize| usize::from_str_radix(&digits[at..at + 8], 16).unwrap();
        let name = &all[drawn(0) % all.len()];
        let path = root.join(name);
        let (mut bytes, permissions) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().permissions());
        let at = drawn(8) % bytes.len();
        bytes[at] ^= 1 << (drawn(16) % 8);
        overwrite_with_its_times(&path, &bytes);
        fs::set_permissions(&path, permissions).unwrap();

        fixture = fixture.after_boot();
        let store = &fixture.store;
        let part = name.split('/').next().unwrap();
        let is_found = match part {
            "pre" => store.preimage(&fixture.key).unwrap().is_none(),
            "cut" => {
                let round = store.newest_cut(&fixture.key).unwrap().map(|cut| {
                    assert_eq!(fs::read_to_string(cut.path.join("state")).unwrap(), state(cut.round));
                    cut.round
                });
                // The older of two is looked at when the newer is none.
                round != Some(2) || name.contains("/1/")
            }
            "ac" => store.lookup(&fixture.key).unwrap().hit().is_none(),
            _ => match store.lookup(&fixture.key).unwrap().hit() {
                Some(record) => store.open_artifact(&record.outputs["model"]).is_err(),
                None => true,
            },
        };
        assert!(is_found, "byte {at} of `{name}`, flip {flip}");
        *found.entry(part.to_owned()).or_default() += 1;
        assert_eq!(fixture.store.keep_preimage(&preimage).unwrap(), fixture.key);
        fixture.store.drop_cuts(&fixture.key).unwrap();
        fixture.assert_mended();
    }
    println!("found: {found:?}");
    assert_eq!(found.len(), 4, "{found:?}");
}

/// A disk that loses bytes moves no times, as a write before the next boot that puts them back moves none that count.
#[test]
fn a_byte_changed_secretly_is_found_before_it_is_read_in_the_next_boot() {
    type Use = fn(&Fixture, &Artifact) -> Result<(), StoreError>;
    let uses: [Use; 2] = [
        |fixture, artifact| fixture.store.open_artifact(artifact).map(drop),
        |fixture, artifact| fixture.store.copy_artifact(artifact, &fixture.folder.path().join("copy"), &|| true),
    ];
    for used in uses {
        let fixture = Fixture::new();
        let artifact = fixture.artifact();
        overwrite_secretly(&fixture.blob(), b"0123x56789");
        let fixture = fixture.after_boot();
        assert_eq!(fixture.artifact(), artifact, "a lookup reads nothing");
        let error = used(&fixture, &artifact).unwrap_err();
        assert!(matches!(&error, StoreError::Corrupt { file, .. } if file == "weights"), "{error}");
        assert!(!error.is_io());
        assert_eq!(fixture.miss(), Why::ArtifactMissing { port: "model".into(), file: "weights".into() });
        fixture.assert_mended();
    }
}

#[test]
fn a_copy_has_the_files_of_the_artifact_and_stops_when_told() {
    let fixture = Fixture::new();
    let (artifact, copy) = (fixture.artifact(), fixture.folder.path().join("copy"));
    fixture.store.copy_artifact(&artifact, &copy, &|| true).unwrap();
    assert_eq!(files(&copy), ["deep/config", "weights"]);
    assert_eq!(fs::read(copy.join("weights")).unwrap(), WEIGHTS);
    assert!(!fs::metadata(copy.join("weights")).unwrap().permissions().readonly(), "it belongs to who asked for it");
    let stopped = fixture.store.copy_artifact(&artifact, &fixture.folder.path().join("other"), &|| false);
    assert!(matches!(stopped, Err(StoreError::Stopped)));
    fixture.assert_whole();
}

#[test]
fn an_open_artifact_is_known_to_be_as_it_was_or_not() {
    let fixture = Fixture::new();
    let artifact = fixture.artifact();
    let path = fixture.store.open_artifact(&artifact).unwrap();
    fixture.store.check_artifact(&artifact).unwrap();
    overwrite_secretly(&path.join("weights"), b"x123456789");
    assert!(matches!(fixture.store.check_artifact(&artifact), Err(StoreError::Corrupt { .. })));
}

#[test]
fn who_only_reads_makes_no_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open_to_read(&folder.path().join("mistyped")).unwrap();
    let key = Key::of(&json!(1));
    assert!(!store.exists().unwrap());
    assert_eq!(store.lookup(&key).unwrap().miss(), Some(Why::NoRecord));
    assert_eq!((store.cut_standing(&key).unwrap(), store.keys().unwrap()), (None, vec![]));
    store.digest_path(&Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(Store::open_to_read(Fixture::new().store.root()).is_ok());
}

#[test]
fn where_a_checkpoint_stands_is_told_without_removing_any() {
    let fixture = Fixture::new();
    let (store, key) = (&fixture.store, &Key::of(&json!("unfinished")));
    for round in [1, 2] {
        store.save_cut(key, round, |path| fs::write(path.join("state"), format!("state {round}"))).unwrap();
    }
    let state = store.root().join("cut").join(key.to_string()).join("2/files/state");
    let standing = || store.cut_standing(key).unwrap().map(|cut| cut.round);
    fs::write(&state, "staTe 2").unwrap();
    assert_eq!(standing(), Some(2), "bytes are not read");
    fs::write(&state, "cut").unwrap();
    assert_eq!(standing(), Some(1));
    assert!(state.exists(), "nor is anything removed");
    assert_eq!(store.newest_cut(key).unwrap().map(|cut| cut.round), Some(1));
    assert!(!state.exists());
}

#[test]
fn a_sweep_removes_checkpoints_of_finished_work_only() {
    let fixture = Fixture::new();
    let unfinished = Key::of(&json!("unfinished"));
    for key in [&fixture.key, &unfinished] {
        fixture.store.save_cut(key, 1, |path| fs::write(path.join("state"), "state")).unwrap();
    }
    let guard = fixture.store.lock(&fixture.key).unwrap();
    fixture.store.sweep().unwrap();
    assert!(fixture.store.newest_cut(&fixture.key).unwrap().is_some(), "somebody is at work on it");
    drop(guard);
    fixture.store.sweep().unwrap();
    assert_eq!(fixture.store.newest_cut(&fixture.key).unwrap(), None);
    assert!(fixture.store.newest_cut(&unfinished).unwrap().is_some());
}

#[test]
fn a_truncated_file_is_a_miss() {
    let fixture = Fixture::new();
    overwrite(&fixture.blob(), b"01234");
    assert_eq!(fixture.miss().to_string(), "`weights` of output `model` is damaged: expected 10 bytes, got 5");
    fixture.assert_mended();
}

#[test]
fn a_removed_file_is_a_miss() {
    let fixture = Fixture::new();
    fs::remove_file(fixture.blob()).unwrap();
    assert_eq!(fixture.miss().to_string(), "`weights` of output `model` is missing from the store");
    fixture.assert_mended();
}

#[test]
fn a_folder_or_link_in_place_of_a_file_is_a_miss() {
    let fixture = Fixture::new();
    fs::remove_file(fixture.blob()).unwrap();
    fs::create_dir_all(fixture.blob().join("inner")).unwrap();
    assert_eq!(fixture.miss().to_string(), "`weights` of output `model` is damaged: expected a plain file");
    fixture.assert_mended();

    let elsewhere = fixture.folder.path().join("elsewhere");
    fs::rename(fixture.blob(), &elsewhere).unwrap();
    symlink(&elsewhere, fixture.blob()).unwrap();
    assert_eq!(fixture.miss().to_string(), "`weights` of output `model` is damaged: expected a plain file");
    fixture.assert_mended();
}

#[test]
fn a_damaged_record_is_a_miss() {
    let fixture = Fixture::new();
    let text = fs::read(fixture.record()).unwrap();
    let other = Key::of(&json!({"kind": "other"}));
    publish(&fixture.store, &other, &[("weights", b"other")]);
    let of_other = fs::read(fixture.at("ac", &other.to_string(), 0)).unwrap();
    for (damaged, reason) in [
        (&text[..text.len() / 2], "it is cut off"),
        (&text[..10], "it has no first line"),
        (b"".as_slice(), "it has no first line"),
        (
            &String::from_utf8(text.clone()).unwrap().replace("weights", "height_").into_bytes(),
            "its checksum does not match its content",
        ),
        (b"record-of-tomorrow 00\n{}\n", "expected form `pipeline-record-v1`, got `record-of-tomorrow`"),
        (&of_other, &format!("it is the record of {}", other.short())),
    ] {
        fs::write(fixture.record(), damaged).unwrap();
        assert_eq!(fixture.miss().to_string(), format!("the record of the result is damaged: {reason}"));
        fixture.assert_mended();
    }
    fs::remove_file(fixture.record()).unwrap();
    assert_eq!(fixture.miss(), Why::NoRecord);
    fixture.assert_mended();
}

#[test]
fn a_damaged_folder_of_an_artifact_is_built_again() {
    let fixture = Fixture::new();
    let path = fixture.store.open_artifact(&fixture.artifact()).unwrap();
    let damages: [fn(&Path); 6] = [
        |path| fs::remove_dir_all(path).unwrap(),
        |path| fs::remove_file(path.join("weights")).unwrap(),
        |path| fs::write(path.join("deep/extra"), "").unwrap(),
        |path| fs::rename(path.join("weights"), path.join("renamed")).unwrap(),
        |path| symlink("weights", path.join("link")).unwrap(),
        |path| {
            fs::remove_file(path.join("weights")).unwrap();
            fs::write(path.join("weights"), "x123456789").unwrap();
        },
    ];
    for damage in damages {
        damage(&path);
        fixture.assert_whole();
    }
}

#[test]
fn a_write_into_an_artifact_is_seen_and_a_secret_one_after_the_next_boot() {
    let fixture = Fixture::new();
    let path = fixture.store.open_artifact(&fixture.artifact()).unwrap();
    overwrite(&path.join("weights"), b"x123456789"); // the blob has the same bytes on the disk
    assert!(matches!(fixture.miss(), Why::ArtifactCorrupt { .. }));
    fixture.assert_mended();

    let fixture = fixture.after_boot();
    overwrite_secretly(&path.join("weights"), b"x123456789");
    assert!(fixture.store.open_artifact(&fixture.artifact()).is_err());
    fixture.assert_mended();
}

#[test]
fn a_copy_of_the_store_without_its_times_still_hits() {
    let fixture = Fixture::new();
    let copy = fixture.folder.path().join("copy");
    for name in files(fixture.store.root()) {
        fs::create_dir_all(copy.join(&name).parent().unwrap()).unwrap();
        fs::write(copy.join(&name), fs::read(fixture.store.root().join(&name)).unwrap()).unwrap();
    }
    Fixture { store: Store::open(&copy).unwrap(), ..fixture }.assert_whole();
}

#[test]
fn verify_removes_what_is_damaged_and_says_so() {
    let fixture = Fixture::new();
    let key = Key::of(&json!("checkpoints"));
    fixture.store.save_cut(&key, 7, |path| fs::write(path.join("state"), "state")).unwrap();
    overwrite_secretly(&fixture.blob(), b"0123x56789");
    overwrite(&fixture.at("pre", &fixture.key.to_string(), 0), b"{}");
    fs::write(fixture.store.root().join("cut").join(key.to_string()).join("7/files/state"), "stale").unwrap();

    let verification = fixture.store.verify().unwrap();
    let found: Vec<_> = verification.damage.iter().map(|damage| damage.to_string()).collect();
    assert_eq!(found.len(), 5, "{found:#?}");
    for (text, (part, reason)) in found.iter().zip([
        ("file `cas/", "; results that hold it are computed again when needed"),
        ("artifact folder `trees/", "; it is built again when needed"),
        ("record `ac/", "is missing from the store; its result is computed again when needed"),
        ("preimage `pre/", "hash of its name; it is written again when its key is used"),
        ("checkpoint `cut/", "`state` is not as it was written; an earlier one is used"),
    ]) {
        assert!(text.starts_with(&format!("removed {part}")) && text.ends_with(reason), "{text}");
    }
    assert_eq!((verification.blobs, verification.trees, verification.records), (2, 1, 1));
    assert_eq!((verification.preimages, verification.cuts, verification.bytes), (1, 1, 12));
    assert_eq!(fixture.store.verify().unwrap().damage, [], "the second time all is well");
    assert_eq!(fixture.store.newest_cut(&key).unwrap(), None);
    assert_eq!(fixture.miss(), Why::NoRecord);
    fixture.assert_mended();
}

#[test]
fn a_damaged_preimage_is_absent_and_kept_again() {
    let fixture = Fixture::new();
    let preimage = json!({"kind": "train"});
    assert_eq!(fixture.store.preimage(&fixture.key).unwrap(), Some(preimage.clone()));
    overwrite(&fixture.at("pre", &fixture.key.to_string(), 0), b"{\"kind\": ");
    assert_eq!(fixture.store.preimage(&fixture.key).unwrap(), None);
    assert_eq!(fixture.store.keep_preimage(&preimage).unwrap(), fixture.key);
    assert_eq!(fixture.store.preimage(&fixture.key).unwrap(), Some(preimage));
}

#[test]
fn equal_bytes_are_kept_once() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let one = publish(store, &Key::of(&json!(1)), &[("copy", WEIGHTS), ("again", WEIGHTS), ("other", b"other")]);
    let two = publish(store, &Key::of(&json!(2)), &[("copy", WEIGHTS), ("again", WEIGHTS), ("other", b"other")]);
    assert_eq!(one.outputs, two.outputs);
    let Usage { cas, trees, ac, artifacts, .. } = store.usage().unwrap();
    assert_eq!((cas.files, cas.bytes), (3, 10 + 2 + 5));
    assert_eq!((artifacts.files, artifacts.bytes), (3, 12 + 25 + 25));
    assert_eq!((trees.files, ac.files), (0, 3));
}

#[test]
fn the_first_result_of_a_key_stays_until_it_is_forgotten() {
    let fixture = Fixture::new();
    let first = fixture.artifact();
    let again = publish(&fixture.store, &fixture.key, &[("weights", b"others")]);
    assert_eq!(again.outputs["model"], first);
    fixture.store.forget(&fixture.key).unwrap();
    assert_eq!(fixture.miss(), Why::NoRecord);
    let other = publish(&fixture.store, &fixture.key, &[("weights", b"others")]);
    assert_ne!(other.outputs["model"], first);
    assert_eq!(fixture.store.lookup(&fixture.key).unwrap(), Lookup::Hit(other));
}

#[test]
fn outputs_that_cannot_be_kept_are_refused_and_nothing_is_published() {
    let fixture = Fixture::new();
    let key = Key::of(&json!("refused"));
    let refused = |port: &str, write: &dyn Fn(&Path)| {
        let work = fixture.store.begin(&key).unwrap();
        write(&work.output("model").unwrap());
        let error = fixture.store.publish(work, &[(port.into(), "model".into())], json!({})).unwrap_err();
        assert_eq!(fixture.store.lookup(&key).unwrap().miss(), Some(Why::NoRecord));
        assert!(!error.is_io());
        error.to_string()
    };
    assert!(
        refused("model", &|path| symlink("x", path.join("link")).unwrap())
            .contains("link` is neither a plain file nor a folder")
    );
    let socket = fixture.folder.path().join("socket"); // a short path, as sockets need
    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(refused("model", &|path| fs::rename(&socket, path.join("socket")).unwrap()).contains("socket` is neither"));
    assert!(refused("other", &|_| ()).starts_with("output `other` was not written: expected a folder `"));
    for port in ["", "..", "a/b", ".hidden"] {
        assert!(refused(port, &|_| ()).starts_with(&format!("`{port}` cannot name an output; expected ")));
    }
    assert_eq!(fs::read_dir(fixture.store.root().join("work")).unwrap().count(), 0);
}

#[test]
fn an_output_may_be_empty() {
    let fixture = Fixture::new();
    let record = publish(&fixture.store, &Key::of(&json!("empty")), &[]);
    let path = fixture.store.open_artifact(&record.outputs["model"]).unwrap();
    assert_eq!(fs::read_dir(path).unwrap().count(), 0);
}

#[test]
fn a_store_of_another_format_is_refused() {
    let fixture = Fixture::new();
    fs::write(fixture.store.root().join("format"), "pipeline-store-v9\n").unwrap();
    let error = Store::open(fixture.store.root()).err().unwrap().to_string();
    assert!(
        error.ends_with("has format `pipeline-store-v9`, expected `pipeline-store-v1`; choose another folder"),
        "{error}"
    );
}

#[test]
fn a_store_that_cannot_be_made_is_an_io_error_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Store::open(&file).err().unwrap();
    assert_eq!(error.to_string(), format!("cannot make folder `{}`", file.join("cas").display()));
    assert!(error.is_io());
}

#[test]
fn a_source_that_changes_changes_its_digest_although_its_length_stays() {
    let fixture = Fixture::new();
    let source = fixture.folder.path().join("source");
    fs::write(&source, "one").unwrap();
    assert_eq!(fixture.store.digest_path(&source).unwrap(), Digest::of(b"one"));
    fs::write(&source, "two").unwrap();
    assert_eq!(fixture.store.digest_path(&source).unwrap(), Digest::of(b"two"));
    overwrite_secretly(&source, b"six");
    assert_eq!(fixture.store.digest_path(&source).unwrap(), Digest::of(b"six"));
}

/// Only here can a boot be told from the one before.
#[cfg(target_os = "linux")]
#[test]
fn an_old_source_is_read_once_per_boot_and_a_fresh_one_each_time() {
    let fixture = Fixture::new();
    let stamps = |digest: &Digest| {
        let stamps = fixture.store.root().join("stamps");
        let texts: String = files(&stamps).iter().map(|name| fs::read_to_string(stamps.join(name)).unwrap()).collect();
        texts.lines().filter(|line| line.starts_with(&digest.to_string())).count()
    };
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let digest = Digest::of(&fs::read(&old).unwrap());
    assert_eq!(fixture.store.digest_path(&old).unwrap(), digest);
    assert_eq!(stamps(&digest), 1);
    assert_eq!(fixture.store.digest_path(&old).unwrap(), digest);
    assert_eq!(stamps(&digest), 1);

    let fresh = fixture.folder.path().join("fresh");
    fs::write(&fresh, "fresh").unwrap();
    assert_eq!(fixture.store.digest_path(&fresh).unwrap(), Digest::of(b"fresh"));
    assert_eq!(stamps(&Digest::of(b"fresh")), 0, "another write within the clock's step would not show");
}

#[test]
fn a_source_folder_has_the_digest_of_an_artifact_with_its_files() {
    let fixture = Fixture::new();
    let source = fixture.folder.path().join("source");
    fs::create_dir_all(source.join("deep")).unwrap();
    fs::write(source.join("weights"), WEIGHTS).unwrap();
    let elsewhere = fixture.folder.path().join("elsewhere");
    fs::write(&elsewhere, "{}").unwrap();
    symlink(&elsewhere, source.join("deep/config")).unwrap();
    let digest = fixture.store.digest_path(&source).unwrap();
    assert_eq!(digest, fixture.artifact().digest);
    fs::write(&elsewhere, "[]").unwrap();
    assert_ne!(fixture.store.digest_path(&source).unwrap(), digest, "links are followed");
}

#[test]
fn a_source_that_cannot_be_read_is_named() {
    let fixture = Fixture::new();
    let source = fixture.folder.path().join("source");
    fs::create_dir(&source).unwrap();
    symlink("nowhere", source.join("dangling")).unwrap();
    let error = fixture.store.digest_path(&source).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot find `{}`", source.join("dangling").display()));
    fs::remove_file(source.join("dangling")).unwrap();
    symlink(".", source.join("circle")).unwrap();
    assert!(fixture.store.digest_path(&source).unwrap_err().is_io());
    let socket = fixture.folder.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(matches!(fixture.store.digest_path(&socket), Err(StoreError::NotPlain { .. })));
}

#[test]
fn a_copy_of_a_source_has_the_digest_of_what_it_holds() {
    let fixture = Fixture::new();
    let at = |name: &str| fixture.folder.path().join(name);
    fs::create_dir_all(at("source/deep")).unwrap();
    fs::write(at("elsewhere"), vec![7; 5 << 20]).unwrap();
    fs::write(at("source/weights"), WEIGHTS).unwrap();
    fs::write(at("source/README.md"), "not read").unwrap();
    symlink(at("elsewhere"), at("source/deep/big")).unwrap();
    let all = |_: &str| true;
    let some = |name: &str| name != "README.md";
    for (from, takes, expected) in [
        ("elsewhere", &all as cache::Takes, vec![""]),
        ("source", &all, vec!["README.md", "deep/big", "weights"]),
        ("source", &some, vec!["deep/big", "weights"]),
        ("source", &|_| false, vec![]),
    ] {
        let copy = at("copy");
        let digest = copy_source(&at(from), &copy, takes).unwrap();
        assert_eq!(digest, fixture.store.digest_files(&at(from), takes).unwrap());
        assert_eq!(digest, fixture.store.digest_path(&copy).unwrap(), "the copy is as it was hashed");
        let found = if copy.is_dir() { files(&copy) } else { vec![String::new()] };
        assert_eq!(found, expected);
        if copy.is_dir() { fs::remove_dir_all(&copy).unwrap() } else { fs::remove_file(&copy).unwrap() }
    }
    let before = fixture.store.digest_files(&at("source"), &some).unwrap();
    fs::write(at("source/README.md"), "other words").unwrap();
    assert_eq!(fixture.store.digest_files(&at("source"), &some).unwrap(), before, "what is not read does not count");
}

#[test]
fn what_is_no_plain_file_is_never_opened_as_a_source() {
    let fixture = Fixture::new();
    let pipe = fixture.folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let copy = fixture.folder.path().join("copy");
    for path in [pipe.as_path(), Path::new("/dev/zero"), Path::new("/dev/null")] {
        assert!(matches!(fixture.store.digest_path(path), Err(StoreError::NotPlain { .. })));
        assert!(matches!(copy_source(path, &copy, &|_| true), Err(StoreError::NotPlain { .. })));
    }
    assert!(!copy.exists());
}

#[test]
fn a_source_that_grows_without_end_is_not_read_without_end() {
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};
    let fixture = Fixture::new();
    let source = fixture.folder.path().join("source");
    fs::write(&source, vec![1; 1 << 20]).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut file = File::options().append(true).open(&source).unwrap();
            for _ in 0..500 {
                if !done.load(Ordering::Relaxed) {
                    file.write_all(&[2; 1 << 16]).unwrap();
                }
            }
        });
        for copy in ["one", "two", "three"] {
            let copy = fixture.folder.path().join(copy);
            match copy_source(&source, &copy, &|_| true) {
                Ok(digest) => assert_eq!(digest, Digest::of(&fs::read(&copy).unwrap())),
                Err(error) => assert!(matches!(error, StoreError::Changed { .. }), "{error}"),
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn the_newest_whole_checkpoint_counts_and_two_are_kept() {
    let fixture = Fixture::new();
    let (store, key) = (&fixture.store, &fixture.key);
    let save = |round: u64| {
        store.save_cut(key, round, |path| fs::write(path.join("state"), format!("state {round}"))).unwrap();
    };
    let newest = || {
        let cut = store.newest_cut(key).unwrap()?;
        assert_eq!(fs::read_to_string(cut.path.join("state")).unwrap(), format!("state {}", cut.round));
        Some(cut.round)
    };
    let folder = store.root().join("cut").join(key.to_string());
    assert_eq!(newest(), None);
    for round in [2, 9, 10] {
        save(round);
        assert_eq!(newest(), Some(round));
    }
    assert!(!folder.join("2").exists() && folder.join("9").exists());

    let damages: [fn(&Path); 5] = [
        |cut| fs::write(cut.join("files/state"), "state 11").unwrap(),
        |cut| fs::write(cut.join("files/extra"), "").unwrap(),
        |cut| fs::remove_file(cut.join("files/state")).unwrap(),
        |cut| fs::remove_file(cut.join("manifest")).unwrap(),
        |cut| fs::write(cut.join("manifest"), &fs::read(cut.join("manifest")).unwrap()[..99]).unwrap(),
    ];
    for damage in damages {
        save(10);
        damage(&folder.join("10"));
        assert_eq!(newest(), Some(9));
        assert!(!folder.join("10").exists(), "the damaged one is removed");
    }
    fs::rename(folder.join("9"), folder.join("12")).unwrap();
    assert_eq!(newest(), None, "a checkpoint under another round's name is not believed");

    save(13);
    store.drop_cuts(key).unwrap();
    store.drop_cuts(key).unwrap();
    assert_eq!(newest(), None);
    assert!(!folder.exists());
}

#[test]
fn a_failed_writer_of_a_checkpoint_leaves_the_old_one() {
    let fixture = Fixture::new();
    let (store, key) = (&fixture.store, &fixture.key);
    store.save_cut(key, 1, |path| fs::write(path.join("state"), "good")).unwrap();
    let failed = store.save_cut(key, 1, |path| {
        fs::write(path.join("state"), "half")?;
        Err(io::Error::from(io::ErrorKind::StorageFull))
    });
    let error = failed.unwrap_err();
    assert_eq!(error.to_string(), "cannot write the checkpoint of round 1");
    assert!(error.is_io());
    let cut = store.newest_cut(key).unwrap().unwrap();
    assert_eq!(fs::read_to_string(cut.path.join("state")).unwrap(), "good");
    let failed = store.save_cut(key, 2, |_| Err("the caller's own reason"));
    assert!(!failed.unwrap_err().is_io());
}
