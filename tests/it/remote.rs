//! Files of the hub and of the web, from the command line, with a server of this machine in their place.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use cache::Digest;
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Project, Ran, wait_until};

#[path = "../../remote/src/testing.rs"]
mod testing;
use testing::{Answer, Hub, Request, Server};

const OLD: &str = "00000000000000000000000000000000000000aa";
const NEW: &str = "00000000000000000000000000000000000000bb";
const TOKEN: &str = "hidden-token";

/// Any name will do that says what a file holds.
fn names(body: &[u8], _is_large: bool) -> String {
    Digest::of(body).short()
}

fn rows(answer: &str) -> Vec<u8> {
    (0..5).map(|i| format!("{{\"question\": \"q{i}\", \"answer\": \"{answer}\"}}\n")).collect::<String>().into_bytes()
}

fn serve(hub: &Arc<Mutex<Hub>>) -> Server {
    let hub = Arc::clone(hub);
    Server::start(move |request| hub.lock().unwrap().answer(request, &names))
}

/// The program in a project, asking `server`, with caches of the project's own called `caches`.
fn command(project: &Project, server: &Server, caches: &str, arguments: &str) -> Command {
    let mut command = project.command(arguments);
    for name in [
        "HF_TOKEN_PATH",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "http_proxy",
        "HTTP_PROXY",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_HOME", project.path(caches))
        .env("XDG_CACHE_HOME", project.path(caches))
        .env("HF_ENDPOINT", &server.url)
        .env("HF_TOKEN", TOKEN)
        .env("PIPELINE_LOG", "trace");
    command
}

fn run(mut command: Command) -> Ran {
    let ran = Ran::new(command.output().unwrap());
    assert!(!format!("{}{}", ran.stdout, ran.stderr).contains("hidden"), "a secret is shown: {}", ran.stderr);
    ran
}

/// Looks through every file of a folder for something that nobody is to see.
fn assert_no_secret(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            assert_no_secret(&entry);
        } else {
            let bytes = std::fs::read(&entry).unwrap();
            assert!(!bytes.windows(6).any(|window| window == b"hidden"), "a secret is in {}", entry.display());
        }
    }
}

fn project(with: &str) -> Project {
    let pipeline = format!("version: 1\nname: remote\nstages:\n  data: {{kind: download, with: {with}}}\n");
    Project::with_program(&pipeline, env!("CARGO_BIN_EXE_pipeline"))
}

#[test]
fn the_key_is_that_of_the_commit_whoever_serves_it() {
    let mut hub = Hub::default();
    let files = |answer| vec![("README.md", b"read me".to_vec()), ("data/train.jsonl", rows(answer))];
    hub.commit("datasets/o/rows", OLD, files("a"));
    hub.commit("datasets/o/rows", NEW, files("b"));
    hub.branch("datasets/o/rows", "main", OLD);
    let hub = Arc::new(Mutex::new(hub));
    let server = serve(&hub);
    let project = project("{source: hub:datasets/o/rows/data}");
    let go = |arguments: &str| run(command(&project, &server, "caches", arguments));

    // Before it runs only the branch is looked up.
    go("check FILE").expect(0, &[]);
    go("plan FILE").expect(0, &["data"]);
    assert!(server.log().iter().all(|line| line == "GET /api/datasets/o/rows/revision/main"), "{:?}", server.log());
    assert_eq!(go("run FILE").expect(0, &[]).words(), ["ran data"]);
    let fetched = |server: &Server| server.log().iter().filter(|line| line.starts_with("GET /datasets")).count();
    assert_eq!(fetched(&server), 1, "{:?}", server.log());
    assert_eq!(go("run FILE").expect(0, &[]).words(), ["reused data"]);

    // Another host with the same commit, and caches that hold nothing: it is the same result.
    let mirror = serve(&hub);
    assert_eq!(run(command(&project, &mirror, "others", "run FILE")).expect(0, &[]).words(), ["reused data"]);
    assert_eq!(fetched(&mirror), 0);

    // A branch that moves is another result, and what changed is the commit.
    hub.lock().unwrap().branch("datasets/o/rows", "main", NEW);
    go("why FILE data").expect(0, &["will run", "source.commit", OLD, NEW, "p.yaml:4"]);
    assert_eq!(go("run FILE").expect(0, &[]).words(), ["ran data"]);
    let text = std::fs::read_to_string(project.path("p.yaml")).unwrap();
    project.write("p.yaml", &text.replace("o/rows/", &format!("o/rows@{OLD}/")));
    assert_eq!(go("run FILE").expect(0, &[]).words(), ["reused data"]);
    assert_no_secret(&project.path(".pipeline"));
    assert!(server.requests().iter().all(|request| request.headers["authorization"] == format!("Bearer {TOKEN}")));
}

#[test]
fn without_a_network_what_was_fetched_is_read_and_else_the_way_out_is_said() {
    let mut hub = Hub::default();
    hub.commit("datasets/o/rows", OLD, vec![("train.jsonl", rows("a"))]);
    hub.branch("datasets/o/rows", "main", OLD);
    let server = serve(&Arc::new(Mutex::new(hub)));
    let project = project("{source: hub:datasets/o/rows}");
    let offline = || {
        let mut command = command(&project, &server, "caches", "run FILE");
        command.env("HF_HUB_OFFLINE", "1");
        run(command)
    };
    let ran = offline()
        .expect(2, &["`HF_HUB_OFFLINE` is set", "give a commit, as `hub:datasets/o/rows@COMMIT`, or go online"]);
    assert!(ran.stderr.contains("p.yaml:4"), "{}", ran.stderr);
    assert_eq!(server.log(), Vec::<String>::new());
    run(command(&project, &server, "caches", "run FILE")).expect(0, &[]);
    let asked = server.log().len();
    std::fs::remove_dir_all(project.path(".pipeline")).unwrap();
    assert_eq!(offline().expect(0, &[]).words(), ["ran data"]);
    assert_eq!(server.log().len(), asked);

    // A hub that is not there at all: what it was last is taken, and that is said.
    let mut nobody = serve(&Arc::default());
    nobody.url = "http://127.0.0.1:1".into();
    let ran = run(command(&project, &nobody, "caches", "run FILE")).expect(0, &["cannot be reached", OLD]);
    assert_eq!(ran.words(), ["reused data"]);
    let refused = run(command(&project, &nobody, "nothing", "run FILE"));
    refused.expect(2, &["`127.0.0.1:1` cannot be reached", "or go online"]);
}

#[test]
fn a_file_of_the_web_is_known_by_its_digest() {
    let body = rows("a");
    let digest = Digest::of(&body);
    let served = body.clone();
    let server = Server::start(move |request| match request.path.as_str() {
        "/rows?key=hidden-key" => Answer::redirect("/elsewhere?signature=hidden-signature"),
        _ => Answer::file(request, &served),
    });
    let with = |digest: &str| format!("{{source: {{url: \"{}/rows?key=hidden-key\", {digest}}}}}", server.url);
    let project = project(&with(&format!("blake3: {digest}")));
    let go = |arguments: &str| run(command(&project, &server, "caches", arguments));
    go("plan FILE").expect(0, &["data"]);
    assert_eq!(server.log(), Vec::<String>::new());
    assert_eq!(go("run FILE").expect(0, &[]).words(), ["ran data"]);
    // The same bytes from a disk are the same result.
    let text = std::fs::read_to_string(project.path("p.yaml")).unwrap();
    std::fs::write(project.path("rows.jsonl"), &body).unwrap();
    project
        .write("p.yaml", "version: 1\nname: remote\nstages:\n  data: {kind: download, with: {source: rows.jsonl}}\n");
    assert_eq!(go("run FILE").expect(0, &[]).words(), ["reused data"]);

    let wrong = "0f".repeat(32);
    project.write("p.yaml", &text.replace(&digest.to_string(), &wrong));
    go("run FILE").expect(1, &["what came is not what was asked for", &digest.to_string(), &wrong, "/rows`"]);
    project.write("p.yaml", &text.replace("blake3", "sha256"));
    go("run FILE").expect(1, &["its SHA-256 is"]);
    // Nor is a store told of the parts of an address that may be secret.
    assert_no_secret(&project.path(".pipeline"));
}

#[test]
fn an_address_without_a_digest_or_without_encryption_is_refused() {
    let refused = |with: &str, said: &[&str]| project(with).run("check FILE").expect(2, said);
    refused("{source: \"https://example.org/rows\"}", &["`{url: ..., sha256: ...}`", "p.yaml:4"]);
    refused("{source: {url: \"https://example.org/rows\"}}", &["one of `sha256` and `blake3`"]);
    let digest = "0f".repeat(32);
    refused(&format!("{{source: {{url: \"http://example.org/rows\", sha256: {digest}}}}}"), &["is not encrypted"]);
    refused("{model: \"hub:gpt2\"}", &["expected `hub:OWNER/NAME`"]);
}

#[test]
fn a_download_that_is_interrupted_goes_on_where_it_was() {
    const SENT: usize = 300_000;
    let body: Vec<u8> = rows("a").repeat(3000);
    let digest = Digest::of(&body);
    let served = body.clone();
    let server = Server::start(move |request: &Request| {
        let is_first = request.before == 0;
        Answer { cut: is_first.then_some(SENT), hangs: is_first, ..Answer::file(request, &served) }
    });
    let project = project(&format!("{{source: {{url: \"{}/rows\", blake3: {digest}}}}}", server.url));
    let running =
        command(&project, &server, "caches", "run FILE").stderr(std::process::Stdio::piped()).spawn().unwrap();
    let partial = project.path(&format!("caches/pipeline/web/blake3-{digest}.incomplete"));
    wait_until("the download is in the middle", || {
        std::fs::metadata(&partial).is_ok_and(|file| file.len() == SENT as u64)
    });
    kill_process(Pid::from_raw(running.id() as i32).unwrap(), Signal::TERM).unwrap();
    Ran::new(running.wait_with_output().unwrap()).expect(143, &["interrupted: the same command goes on"]);
    assert_eq!(std::fs::read(&partial).unwrap(), body[..SENT]);
    assert_eq!(run(command(&project, &server, "caches", "run FILE")).expect(0, &[]).words(), ["ran data"]);
    let asked: Vec<usize> = server.requests().iter().map(Request::from).collect();
    assert_eq!(asked, [0, SENT]);
    assert!(!partial.exists());
}

#[test]
fn a_model_of_the_hub_is_looked_into_once_it_is_there() {
    let made = Project::with_program(
        "
version: 1
name: made
stages:
  corpus: {kind: download, with: {source: builtin:instruct, rows: 60}}
  tokenizer: {kind: train-tokenizer, in: {corpus: corpus}, with: {vocab_size: 300}}
  data: {kind: tokenize, in: {corpus: corpus, tokenizer: tokenizer}, with: {template: task, max_length: 64}}
  model:
    kind: finetune
    in: {data: data.train}
    with: {init: {architecture: gpt2, layers: 1, width: 8}, rows: 8, take: 8, epochs: 1, learning_rate: 1e-3}
",
        env!("CARGO_BIN_EXE_pipeline"),
    );
    made.run("run FILE").expect(0, &[]);
    made.run("export FILE model --to model").expect(0, &[]);
    let mut files = vec![("README.md", b"read me".to_vec()), ("pytorch_model.bin", b"not needed".to_vec())];
    for entry in std::fs::read_dir(made.path("model")).unwrap().map(|entry| entry.unwrap()) {
        let name: &'static str = entry.file_name().into_string().unwrap().leak();
        files.push((name, std::fs::read(entry.path()).unwrap()));
    }
    let mut hub = Hub::default();
    hub.commit("o/m", OLD, files);
    hub.branch("o/m", "v1", OLD);
    let server = serve(&Arc::new(Mutex::new(hub)));
    let project = project("{model: hub:o/m@v1}");
    let go = |arguments: &str| run(command(&project, &server, "caches", arguments));
    assert_eq!(go("run FILE").expect(0, &[]).words(), ["ran data"]);
    let log = server.log();
    assert!(log.iter().any(|line| line.starts_with("GET /large/o/m/resolve")), "{log:?}");
    assert!(!log.iter().any(|line| line.ends_with("README.md") || line.ends_with(".bin")), "{log:?}");
    go("export FILE data --to back").expect(0, &[]);
    let bytes = |path: &Path| std::fs::read(path.join("model.safetensors")).unwrap();
    assert_eq!(bytes(&project.path("back")), bytes(&made.path("model")));
    // Now that its files are here, what cannot work is said before anything runs, of the model as it was written.
    project.write("p.yaml", &project.read("p.yaml").replace("hub:o/m@v1", "hub:o/m@v1, end_token: nowhere"));
    go("check FILE").expect(2, &["nowhere", "hub:o/m@v1"]);
    assert!(!go("check FILE").stderr.contains("caches"));
}
