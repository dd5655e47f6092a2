//! A server of this machine for tests: it answers as it is told, also wrongly, and plays the hub.

#![allow(dead_code, reason = "the tests of the command line use it, too, and not all of it")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    /// How often the same was asked before.
    pub(crate) before: usize,
}

impl Request {
    /// The first byte that is asked for.
    pub(crate) fn from(&self) -> usize {
        let range =
            self.headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        range.unwrap_or(0)
    }
}

/// What is answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The length that it gives, where that is another.
    pub(crate) length: Option<usize>,
    /// Bytes of the body after which the connection is cut.
    pub(crate) cut: Option<usize>,
    /// Whether the connection is left open after the cut, and nothing comes.
    pub(crate) hangs: bool,
}

impl Answer {
    pub(crate) fn status(status: u16) -> Self {
        Answer { status, ..Answer::default() }
    }

    /// A file, from where it is asked for.
    pub(crate) fn file(request: &Request, body: &[u8]) -> Self {
        let (from, all) = (request.from(), body.len());
        match from {
            0 => Answer { body: body.to_vec(), ..Answer::status(200) },
            from if from < all => Answer { body: body[from..].to_vec(), ..Answer::status(206) }
                .with("Content-Range", &format!("bytes {from}-{}/{all}", all - 1)),
            _ => Answer::status(416).with("Content-Range", &format!("bytes */{all}")),
        }
    }

    pub(crate) fn redirect(to: &str) -> Self {
        Answer::status(302).with("Location", to)
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

type Requests = Arc<Mutex<Vec<Request>>>;

/// A server that answers until the process ends.
pub(crate) struct Server {
    pub(crate) url: String,
    requests: Requests,
}

impl Server {
    pub(crate) fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Requests::default();
        let (seen, answer) = (Arc::clone(&requests), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                // A client that goes away is no concern of the server.
                thread::spawn(move || serve(&stream.unwrap(), &seen, &*answer));
            }
        });
        Server { url, requests }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// `GET /path` of each request so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.requests().iter().map(|request| format!("{} {}", request.method, request.path)).collect()
    }
}

fn serve(stream: &TcpStream, seen: &Requests, answer: &dyn Fn(&Request) -> Answer) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':')?;
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let request = {
        let mut seen = seen.lock().unwrap();
        let before = seen.iter().filter(|other| (&other.method, &other.path) == (&method, &path)).count();
        seen.push(Request { method, path, headers, before });
        seen.last()?.clone()
    };
    let Answer { status, headers, body, length, cut, hangs } = answer(&request);
    let mut head =
        format!("HTTP/1.1 {status} it\r\nConnection: close\r\nContent-Length: {}\r\n", length.unwrap_or(body.len()));
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    let body = if request.method == "HEAD" { &[] } else { &body[..cut.unwrap_or(body.len())] };
    let mut stream = stream;
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(b"\r\n").ok()?;
    stream.write_all(body).ok()?;
    if hangs {
        loop {
            thread::park();
        }
    }
    Some(())
}

/// A file of a repository: its path and what it holds.
pub(crate) type Files = Vec<(&'static str, Vec<u8>)>;

/// The hub: repositories with their commits, and the branches of them.
#[derive(Clone, Default)]
pub(crate) struct Hub {
    commits: BTreeMap<(String, String), Files>,
    branches: BTreeMap<(String, String), String>,
}

impl Hub {
    /// Adds a commit of a repository.
    pub(crate) fn commit(&mut self, repository: &str, commit: &str, files: Files) {
        self.commits.insert((repository.to_owned(), commit.to_owned()), files);
    }

    /// Lets a branch be a commit.
    pub(crate) fn branch(&mut self, repository: &str, branch: &str, commit: &str) {
        self.branches.insert((repository.to_owned(), branch.to_owned()), commit.to_owned());
    }

    /// As the hub answers. A file named `*.safetensors` is a large one: it is named by `X-Linked-Etag`, and lies elsewhere.
    pub(crate) fn answer(&self, request: &Request, names: &dyn Fn(&[u8], bool) -> String) -> Answer {
        self.found(request, names).unwrap_or_else(|| Answer::status(404).with("X-Error-Code", "RepoNotFound"))
    }

    fn found(&self, request: &Request, names: &dyn Fn(&[u8], bool) -> String) -> Option<Answer> {
        if let Some(rest) = request.path.strip_prefix("/api/") {
            let (repository, revision) = rest.strip_prefix("models/").unwrap_or(rest).split_once("/revision/")?;
            let key = (repository.to_owned(), revision.to_owned());
            let commit = self.branches.get(&key).cloned().unwrap_or(revision.to_owned());
            let files = self.commits.get(&(key.0, commit.clone()))?;
            let siblings: Vec<String> =
                files.iter().map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}")).collect();
            let body = format!("{{\"sha\": \"{commit}\", \"siblings\": [{}]}}", siblings.join(", "));
            return Some(Answer { body: body.into_bytes(), ..Answer::status(200) });
        }
        let is_elsewhere = request.path.starts_with("/large/");
        let path = request.path.strip_prefix("/large").unwrap_or(&request.path).trim_start_matches('/');
        let (repository, rest) = path.split_once("/resolve/")?;
        let (commit, name) = rest.split_once('/')?;
        let files = self.commits.get(&(repository.to_owned(), commit.to_owned()))?;
        let (_, body) = files.iter().find(|(other, _)| *other == name)?;
        if is_elsewhere {
            return Some(Answer::file(request, body));
        }
        let is_large = name.ends_with(".safetensors");
        let etag = format!("\"{}\"", names(body, is_large));
        let answer = if is_large {
            Answer::redirect(&format!("/large/{path}"))
                .with("X-Linked-Etag", &etag)
                .with("X-Linked-Size", &body.len().to_string())
                .with("ETag", "\"of-the-redirect\"")
        } else {
            Answer::file(request, body).with("ETag", &etag)
        };
        Some(answer.with("X-Repo-Commit", commit))
    }
}
