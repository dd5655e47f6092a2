use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

use super::*;
use crate::settings::{Settings, Token};
use crate::testing::{Answer, Hub, Request, Server};

const OLD: &str = "00000000000000000000000000000000000000aa";
const NEW: &str = "00000000000000000000000000000000000000bb";

/// The names that the hub gives to what files hold.
fn names(body: &[u8], is_large: bool) -> String {
    if is_large {
        return format!("{:x}", Sha256::digest(body));
    }
    format!("{:x}", Sha1::digest([format!("blob {}\0", body.len()).as_bytes(), body].concat()))
}

struct Fixture {
    folder: tempfile::TempDir,
    server: Server,
    hub: Arc<Mutex<Hub>>,
    token: Option<Token>,
    offline: bool,
}

impl Fixture {
    fn new() -> Self {
        Fixture::answering(|request, hub| hub.answer(request, &names))
    }

    fn answering(answer: impl Fn(&Request, &Hub) -> Answer + Send + Sync + 'static) -> Self {
        let mut hub = Hub::default();
        let files = |config: &str| {
            vec![
                ("README.md", b"read me".to_vec()),
                ("config.json", config.as_bytes().to_vec()),
                ("model.safetensors", vec![7; 100_000]),
                ("deep/er/x y.txt", b"deep".to_vec()),
            ]
        };
        hub.commit("a/b", OLD, files("{}"));
        hub.commit("a/b", NEW, files("{\"new\": 1}"));
        hub.branch("a/b", "main", OLD);
        hub.commit("datasets/a/b", OLD, vec![("data/train.jsonl", b"rows".to_vec()), ("data/other", b"x".to_vec())]);
        hub.branch("datasets/a/b", "main", OLD);
        let hub = Arc::new(Mutex::new(hub));
        let known = Arc::clone(&hub);
        let server = Server::start(move |request| answer(request, &known.lock().unwrap()));
        Fixture { folder: tempfile::tempdir().unwrap(), server, hub, token: None, offline: false }
    }

    fn remote(&self) -> Remote {
        self.remote_at(&self.server.url)
    }

    fn remote_at(&self, endpoint: &str) -> Remote {
        Remote::new(Settings {
            endpoint: endpoint.to_owned(),
            token: self.token.clone(),
            offline: self.offline,
            hub: self.folder.path().join("hub"),
            own: self.folder.path().join("own"),
            backoff: Duration::ZERO,
        })
    }

    /// Fetches what a pipeline names so, as far as it is JSON, weights or rows.
    fn fetch(&self, text: &str) -> Result<PathBuf, String> {
        self.fetch_with(&self.remote(), text)
    }

    fn fetch_with(&self, remote: &Remote, text: &str) -> Result<PathBuf, String> {
        let at = HubPath::parse(text).unwrap();
        let fetched = remote.commit(&at).and_then(|commit| remote.fetch(&at, &commit, &wanted, &mut |_, _| {}));
        fetched.map_err(|error| format!("{error:#}"))
    }
}

fn wanted(names: &[String]) -> Vec<String> {
    let is_wanted = |name: &&String| [".json", ".safetensors", ".jsonl"].iter().any(|ending| name.ends_with(ending));
    names.iter().filter(is_wanted).cloned().collect()
}

#[test]
fn only_what_is_read_is_fetched_and_it_lies_as_others_expect() {
    let fixture = Fixture::new();
    let path = fixture.fetch("a/b").unwrap();
    let hub = fixture.folder.path().join("hub/models--a--b");
    assert_eq!(path, hub.join("snapshots").join(OLD));
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), vec![7; 100_000]);
    assert!(!path.join("README.md").exists());
    let link = |name: &str| fs::read_link(path.join(name)).unwrap().display().to_string();
    assert_eq!(link("config.json"), format!("../../blobs/{}", names(b"{}", false)));
    assert_eq!(link("model.safetensors"), format!("../../blobs/{}", names(&[7; 100_000], true)));
    assert_eq!(fs::read_to_string(hub.join("refs/main")).unwrap(), OLD);
    let log = fixture.server.log();
    let file = |name: &str| format!("/a/b/resolve/{OLD}/{name}");
    let large = [format!("HEAD {}", file("model.safetensors")), format!("GET {}", file("model.safetensors"))];
    assert_eq!(log[0], "GET /api/models/a/b/revision/main");
    assert_eq!(log[3..5], large);
    assert_eq!(log[5], format!("GET /large{}", file("model.safetensors")));
    // The second time only the branch is asked for.
    fixture.fetch("a/b").unwrap();
    assert_eq!(fixture.server.log().len(), log.len() + 1);
}

#[test]
fn a_file_or_a_folder_of_a_repository_is_fetched_alone() {
    let fixture = Fixture::new();
    let path = fixture.fetch("datasets/a/b/data").unwrap();
    assert!(path.ends_with(format!("datasets--a--b/snapshots/{OLD}/data")), "{path:?}");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    let path = fixture.fetch("a/b/README.md").unwrap();
    assert_eq!(fs::read(path).unwrap(), b"read me");
    let error = fixture.fetch("a/b/nowhere").unwrap_err();
    assert!(
        error.contains("`hub:a/b/nowhere` is not in the repository; there are `README.md`, `config.json`"),
        "{error}"
    );
    let error = fixture.fetch("a/b/deep").unwrap_err();
    assert!(error.contains("`hub:a/b/deep` has no file that is read here; there are `er/x y.txt`"), "{error}");
}

#[test]
fn without_a_network_the_cache_does_and_says_what_it_lacks() {
    let mut fixture = Fixture::new();
    fixture.fetch("a/b").unwrap();
    let asked = fixture.server.requests().len();
    // A hub that cannot be reached, and one that is not to be asked.
    let nobody = "http://127.0.0.1:1";
    let remote = fixture.remote_at(nobody);
    let commit = remote.commit(&HubPath::parse("a/b").unwrap()).unwrap();
    assert_eq!(commit, OLD);
    fixture.fetch_with(&remote, "a/b").unwrap();
    let error = fixture.fetch_with(&remote, "a/c").unwrap_err();
    assert!(
        error.contains("cannot be reached") && error.contains("give a commit, as `hub:a/c@COMMIT`, or go online"),
        "{error}"
    );
    fixture.offline = true;
    fixture.fetch("a/b").unwrap();
    fixture.fetch(&format!("a/b@{OLD}")).unwrap();
    let error = fixture.fetch("a/b@v2").unwrap_err();
    assert!(error.contains("`HF_HUB_OFFLINE` is set") && error.contains("`hub:a/b@COMMIT`, or go online"), "{error}");
    let error = fixture.fetch(&format!("a/b@{NEW}")).unwrap_err();
    assert!(error.contains("which files") && error.contains("go online once"), "{error}");
    assert_eq!(fixture.server.requests().len(), asked);
}

#[test]
fn a_snapshot_that_others_fetched_in_part_is_not_taken_for_whole() {
    let fixture = Fixture::new();
    let at = HubPath::parse("a/b").unwrap();
    let remote = fixture.remote();
    assert_eq!(remote.cached(&at, OLD, &wanted), None);
    fixture.fetch("a/b/config.json").unwrap();
    assert_eq!(remote.cached(&at, OLD, &wanted), None);
    let file = HubPath::parse("a/b/config.json").unwrap();
    assert!(remote.cached(&file, OLD, &wanted).is_some());
    fixture.fetch("a/b").unwrap();
    assert!(remote.cached(&at, OLD, &wanted).is_some());
    assert_eq!(remote.cached(&at, NEW, &wanted), None);
}

#[test]
fn a_branch_that_moves_is_another_commit_and_a_process_sees_one_of_them() {
    let fixture = Fixture::new();
    let at = HubPath::parse("a/b").unwrap();
    let remote = fixture.remote();
    assert_eq!(remote.commit(&at).unwrap(), OLD);
    fixture.hub.lock().unwrap().branch("a/b", "main", NEW);
    assert_eq!(remote.commit(&at).unwrap(), OLD);
    let path = fixture.fetch("a/b").unwrap();
    assert_eq!(fs::read(path.join("config.json")).unwrap(), b"{\"new\": 1}");
    // What did not change is not fetched again.
    let large = |line: &&String| line.starts_with("GET /large");
    fixture.fetch(&format!("a/b@{OLD}")).unwrap();
    assert_eq!(fixture.server.log().iter().filter(large).count(), 1);
}

#[test]
fn a_download_of_the_hub_goes_on_where_it_was_and_is_looked_at() {
    let fixture = Fixture::answering(|request, hub| {
        let answer = hub.answer(request, &names);
        let is_cut = request.path.starts_with("/large") && request.before == 0;
        Answer { cut: is_cut.then_some(60_000), ..answer }
    });
    let partial =
        fixture.folder.path().join(format!("hub/models--a--b/blobs/{}.incomplete", names(&[7; 100_000], true)));
    fixture.fetch("a/b").unwrap();
    let asked: Vec<usize> = fixture.server.requests().iter().map(Request::from).filter(|from| *from > 0).collect();
    assert_eq!((asked, partial.exists()), (vec![60_000; 2], false));
    // A blob that was damaged since is fetched again.
    let blob = partial.with_extension("");
    fs::write(&blob, vec![8; 100_000]).unwrap();
    fixture.fetch("a/b").unwrap();
    assert_eq!(fs::read(blob).unwrap(), vec![7; 100_000]);
}

#[test]
fn what_holds_something_else_or_has_another_length_is_refused() {
    let fixture = Fixture::answering(|request, hub| {
        let answer = hub.answer(request, &names);
        if request.path.starts_with("/large") { Answer::file(request, &[9; 100_000]) } else { answer }
    });
    let error = fixture.fetch("a/b").unwrap_err();
    assert!(error.contains("cannot fetch `model.safetensors` of `hub:a/b`: what came is not"), "{error}");
    assert!(error.contains(&names(&[7; 100_000], true)) && error.contains(&names(&[9; 100_000], true)), "{error}");
    let fixture = Fixture::answering(|request, hub| {
        let answer = hub.answer(request, &names);
        if request.path.starts_with("/large") { Answer::file(request, &[7; 90_000]) } else { answer }
    });
    let error = fixture.fetch("a/b").unwrap_err();
    assert!(error.contains("gives a length of 90000 bytes, expected 100000"), "{error}");
}

#[test]
fn a_refusal_says_what_to_do() {
    let mut fixture = Fixture::answering(|request, _| {
        let is_known = request.headers.get("authorization").is_some_and(|token| token == "Bearer hidden-token");
        Answer::status(if is_known { 403 } else { 401 }).with("X-Error-Code", "GatedRepo")
    });
    let error = fixture.fetch("a/b").unwrap_err();
    let page = format!("accept its conditions on {}/a/b, and set `HF_TOKEN`", fixture.server.url);
    assert!(
        error.contains("401 (GatedRepo)") && error.contains("there is no token") && error.contains(&page),
        "{error}"
    );
    fixture.token = Some(Token("hidden-token".into()));
    let error = fixture.fetch("a/b").unwrap_err();
    assert!(error.contains("the token that is used may not read it") && !error.contains("hidden"), "{error}");
    let fixture = Fixture::new();
    let error = fixture.fetch("a/nothing").unwrap_err();
    assert!(error.contains("404 (RepoNotFound)") && error.contains("no such repository, revision or file"), "{error}");
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_it_redirects_to() {
    let store = Server::start(|request| Answer::file(request, &[7; 100_000]));
    let elsewhere = store.url.clone();
    let mut fixture = Fixture::answering(move |request, hub| {
        let mut answer = hub.answer(request, &names);
        for (name, value) in &mut answer.headers {
            if name == "Location" {
                *value = format!("{elsewhere}/signed?signature=x");
            }
        }
        answer
    });
    fixture.token = Some(Token("hidden-token".into()));
    fixture.fetch("a/b").unwrap();
    let sent = |server: &Server| server.requests().iter().filter(|r| r.headers.contains_key("authorization")).count();
    assert_eq!((sent(&fixture.server), sent(&store)), (fixture.server.requests().len(), 0));
    assert_eq!(store.log(), ["GET /signed?signature=x"]);
}

#[test]
fn a_hub_that_lies_about_names_writes_nowhere_else() {
    let answers: [fn(&str) -> String; 3] = [
        |_| format!("{{\"sha\": \"{OLD}\", \"siblings\": [{{\"rfilename\": \"../../x.json\"}}]}}"),
        |_| "{\"sha\": \"../x\", \"siblings\": []}".into(),
        |_| "<html>".into(),
    ];
    for answer in answers {
        let fixture = Fixture::answering(move |request, _| Answer {
            body: answer(&request.path).into_bytes(),
            ..Answer::status(200)
        });
        let error = fixture.fetch("a/b").unwrap_err();
        assert!(error.contains("the hub's answer about `hub:a/b`"), "{error}");
        assert!(!fixture.folder.path().join("hub").exists());
    }
    let fixture = Fixture::answering(|request, hub| {
        let answer = hub.answer(request, &names);
        if request.path.starts_with("/api") { answer } else { Answer::status(200).with("ETag", "\"../../x\"") }
    });
    assert!(fixture.fetch("a/b").unwrap_err().contains("no `ETag`"));
}
