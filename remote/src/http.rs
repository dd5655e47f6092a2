//! Requests that do not give up at once, and downloads that go on where they were.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use contract::files::{cannot, in_words};
use contract::location::{host_of, is_this_machine};
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE, RETRY_AFTER};
use ureq::{Agent, Body, Error as Failed};

use crate::checksum::Checksum;
use crate::settings::{Settings, Token};

/// Times that a download is tried before it has failed; what it gains counts anew.
const TRIES: u32 = 5;
/// Times that a question is asked. Somebody waits for the answer, and without a network there is none.
const QUESTIONS: u32 = 3;
/// Most redirects in a row: the hub needs two.
const REDIRECTS: usize = 8;
/// Longest that a server may ask to be left alone for.
const PATIENCE: Duration = Duration::from_secs(60);
/// A connection on which nothing comes for so long is cut.
const SILENCE: Duration = Duration::from_secs(30);
/// Most bytes of an answer that is no file.
const ANSWER: u64 = 64 << 20;

type Response = ureq::http::Response<Body>;

/// Makes requests.
pub(crate) struct Client {
    agent: Agent,
    backoff: Duration,
    endpoint: String,
    token: Option<Token>,
}

/// What to ask for.
#[derive(Clone, Copy)]
pub(crate) enum Ask {
    /// What the headers say. A redirect that names the file, or leads to another host, is an answer: the file is elsewhere.
    Headers,
    /// The content, from this byte on.
    Content(u64),
}

/// Why there is no answer.
pub(crate) enum Failure {
    /// It may go better in a moment, or when the server says.
    Passing(String, Option<Duration>),
    /// The server's last word.
    Refused(u16, String),
    /// Asking again changes nothing.
    Lasting(anyhow::Error),
}

impl Failure {
    fn passing(text: impl Into<String>) -> Self {
        Failure::Passing(text.into(), None)
    }
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Passing(text, _) | Failure::Refused(_, text) => anyhow!(text),
            Failure::Lasting(error) => error,
        }
    }
}

impl Client {
    pub(crate) fn new(settings: &Settings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Each is looked at before it is followed.
            .max_redirects(0)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_per_read(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .user_agent(concat!("pipeline/", env!("CARGO_PKG_VERSION")))
            .build();
        let Settings { endpoint, token, backoff, .. } = settings.clone();
        Client { agent: config.into(), backoff, endpoint, token }
    }

    /// The content of an answer that is no file.
    pub(crate) fn text(&self, url: &str) -> Result<String, Failure> {
        self.persist(|| {
            let mut response = self.once(url, Ask::Content(0))?;
            let text = response.body_mut().with_config().limit(ANSWER).read_to_string();
            text.map_err(|error| Failure::passing(format!("the answer of {} was cut: {}", host(url), words(&error))))
        })
    }

    /// The headers of an answer.
    pub(crate) fn headers(&self, url: &str) -> Result<Response, Failure> {
        self.persist(|| self.once(url, Ask::Headers))
    }

    /// Brings `url` into the file `partial`, after what is there of it. `size` is how long it will be, where that is known.
    ///
    /// A file that turns out to be another is begun again. When this returns, the file has the length that the server gave;
    /// what it holds is for the caller to look at.
    pub(crate) fn download(
        &self,
        url: &str,
        partial: &Path,
        size: Option<u64>,
        tell: &mut dyn FnMut(u64, Option<u64>),
    ) -> Result<()> {
        let (mut most, mut tries) = (length(partial)?, 0);
        loop {
            match self.download_once(url, partial, size, tell) {
                Ok(()) => return Ok(()),
                Err(Failure::Passing(text, wait)) => {
                    let there = length(partial)?;
                    // Who gains ground is in no loop.
                    tries = if there > most { 1 } else { tries + 1 };
                    most = most.max(there);
                    if tries >= TRIES {
                        bail!(
                            "{text}, {TRIES} times in a row; {} are kept, and the same command goes on",
                            in_words(there)
                        );
                    }
                    self.wait(tries, wait);
                }
                Err(failure) => return Err(failure.into()),
            }
        }
    }

    fn download_once(
        &self,
        url: &str,
        partial: &Path,
        size: Option<u64>,
        tell: &mut dyn FnMut(u64, Option<u64>),
    ) -> Result<(), Failure> {
        let local = |what: &'static str| move |error: io::Error| Failure::Lasting(cannot(what, partial, error));
        let mut file = OpenOptions::new().create(true).append(true).open(partial).map_err(local("write"))?;
        let mut done = file.metadata().map_err(local("look at"))?.len();
        if size.is_some_and(|size| done > size) {
            file.set_len(0).map_err(local("write"))?;
            done = 0;
        }
        if done > 0 && Some(done) == size {
            return Ok(());
        }
        let mut response = self.once(url, Ask::Content(done))?;
        let range = header(&response, CONTENT_RANGE.as_str()).unwrap_or_default();
        match response.status().as_u16() {
            206 if range
                .strip_prefix("bytes ")
                .and_then(|range| range.split_once('-'))
                .is_some_and(|(from, _)| from.parse() == Ok(done)) => {}
            // It holds no more than what is there.
            416 if range.strip_prefix("bytes */").is_some_and(|all| all.parse() == Ok(done)) => return Ok(()),
            206 | 416 => {
                file.set_len(0).map_err(local("write"))?;
                return Err(Failure::passing(format!("{} has another file now than what is there of it", host(url))));
            }
            // It does not go on, but begins again.
            _ if done > 0 => {
                file.set_len(0).map_err(local("write"))?;
                done = 0;
            }
            _ => {}
        }
        let rest = header(&response, CONTENT_LENGTH.as_str()).and_then(|length| length.parse::<u64>().ok());
        let all = rest.map(|rest| done + rest);
        if let (Some(all), Some(size)) = (all, size)
            && all != size
        {
            return Err(Failure::passing(format!("{} gives a length of {all} bytes, expected {size}", host(url))));
        }
        let mut stream = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 17];
        loop {
            let read = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(Failure::passing(format!(
                        "{} cut the connection after {done} bytes: {error}",
                        host(url)
                    )));
                }
            };
            file.write_all(&buffer[..read]).map_err(local("write"))?;
            done += read as u64;
            tell(done, all.or(size));
        }
        match all.or(size) {
            Some(all) if all != done => {
                Err(Failure::passing(format!("{} ended after {done} of {all} bytes", host(url))))
            }
            _ => file.sync_all().map_err(local("write")),
        }
    }

    /// Asks again where it failed in passing.
    fn persist<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        for tries in 1.. {
            match attempt() {
                Err(Failure::Passing(_, wait)) if tries < QUESTIONS => self.wait(tries, wait),
                Err(Failure::Passing(text, wait)) => {
                    return Err(Failure::Passing(format!("{text}, {QUESTIONS} times in a row"), wait));
                }
                other => return other,
            }
        }
        unreachable!("the last try returns")
    }

    fn wait(&self, tries: u32, asked: Option<Duration>) {
        thread::sleep(asked.unwrap_or(self.backoff * 2_u32.pow(tries - 1)));
    }

    /// One request, with the redirects that it leads to.
    fn once(&self, url: &str, ask: Ask) -> Result<Response, Failure> {
        let mut url = url.to_owned();
        let mut seen = HashSet::new();
        while seen.len() <= REDIRECTS {
            if !seen.insert(url.clone()) {
                return Err(Failure::Lasting(anyhow!("{} redirects in a circle", host(&url))));
            }
            let response = self.send(&url, ask)?;
            let status = response.status().as_u16();
            match status {
                301 | 302 | 303 | 307 | 308 => {
                    let to = header(&response, LOCATION.as_str());
                    let to = to.and_then(|to| joined(&url, &to));
                    let Some(to) = to else {
                        return Err(Failure::Lasting(anyhow!("{} redirects to nowhere", host(&url))));
                    };
                    let is_safe = to.starts_with("https://") || is_this_machine(&to) && is_this_machine(&url);
                    if !is_safe {
                        return Err(Failure::Lasting(anyhow!(
                            "{} redirects to an address that is not encrypted",
                            host(&url)
                        )));
                    }
                    let is_told = header(&response, "x-linked-etag").is_some() || origin(&to) != origin(&url);
                    if matches!(ask, Ask::Headers) && is_told {
                        return Ok(response);
                    }
                    url = to;
                }
                200..=299 | 416 => return Ok(response),
                _ => return Err(self.refusal(&url, status, &response)),
            }
        }
        Err(Failure::Lasting(anyhow!("{} redirects more than {REDIRECTS} times", host(&url))))
    }

    fn send(&self, url: &str, ask: Ask) -> Result<Response, Failure> {
        let mut request = match ask {
            Ask::Headers => self.agent.head(url),
            Ask::Content(_) => self.agent.get(url),
        };
        // As it is: a length is that of the file.
        request = request.header(ACCEPT_ENCODING, "identity");
        if let Ask::Content(from @ 1..) = ask {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        if let Some(Token(token)) = &self.token
            && origin(url) == origin(&self.endpoint)
        {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        request.call().map_err(|error| {
            let text = format!("{} cannot be reached: {}", host(url), words(&error));
            match error {
                Failed::BadUri(_) | Failed::Http(_) | Failed::InvalidProxyUrl => Failure::Lasting(anyhow!(text)),
                _ => Failure::passing(text),
            }
        })
    }

    /// What a server's refusal means.
    fn refusal(&self, url: &str, status: u16, response: &Response) -> Failure {
        let host = host(url);
        // The hub says in a word what is missing.
        let word = header(response, "x-error-code").filter(|word| word.chars().all(|c| c.is_ascii_alphanumeric()));
        let word = word.map(|word| format!(" ({word})")).unwrap_or_default();
        match status {
            429 | 408 | 500..=599 => {
                let what = if status == 429 { "was asked too often".into() } else { format!("answers with {status}") };
                let wait = header(response, RETRY_AFTER.as_str()).and_then(|seconds| seconds.parse().ok());
                match wait.map(Duration::from_secs) {
                    Some(wait) if wait > PATIENCE => Failure::Lasting(anyhow!(
                        "{host} {what}, and wants to be left alone for {} seconds; try again then",
                        wait.as_secs()
                    )),
                    wait => Failure::Passing(format!("{host} {what}"), wait),
                }
            }
            _ => Failure::Refused(status, format!("{host} answers with {status}{word}")),
        }
    }
}

/// Downloads into `partial`, looks at what it holds, and gives it its name. What is left of an earlier try may be of
/// something else: then it is begun again, once.
pub(crate) fn settle(
    checksum: Option<&Checksum>,
    partial: &Path,
    whole: &Path,
    mut download: impl FnMut() -> Result<()>,
) -> Result<()> {
    loop {
        let begun = length(partial)?;
        download()?;
        if let Some(checksum) = checksum
            && let Err(mismatch) = checksum.check(partial)?
        {
            fs::remove_file(partial).map_err(|error| cannot("remove", partial, error))?;
            if begun > 0 {
                continue;
            }
            bail!("what came is not what was asked for: {mismatch}");
        }
        return fs::rename(partial, whole).map_err(|error| cannot("write", whole, error));
    }
}

/// The text of a header.
pub(crate) fn header(response: &Response, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.trim().to_owned())
}

/// Bytes of a file; none where it is not there.
pub(crate) fn length(path: &Path) -> Result<u64> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(cannot("look at", path, error)),
    }
}

/// A lock on a file, as long as it is held: two processes that write the same download would spoil it.
pub(crate) fn lock(path: &Path) -> Result<File> {
    make(path.parent().context("a lock lies in a folder")?)?;
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = file.map_err(|error| cannot("write", path, error))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|error| cannot("lock", path, error.into()))?;
    Ok(file)
}

pub(crate) fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| cannot("make folder", folder, error))
}

/// A path as it stands in an address.
pub(crate) fn escaped(path: &str) -> String {
    let each = |byte: u8| match byte {
        b'/' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        byte if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    path.bytes().map(each).collect()
}

/// What messages call the server of an address. The rest of an address may hold a secret.
fn host(url: &str) -> String {
    format!("`{}`", host_of(url).unwrap_or_default())
}

fn origin(url: &str) -> Option<(&str, &str)> {
    Some((url.split_once("://")?.0, host_of(url)?))
}

/// Where a redirect leads.
fn joined(from: &str, to: &str) -> Option<String> {
    let (scheme, host) = origin(from)?;
    let to = to.split('#').next()?;
    if to.contains("://") {
        return host_of(to).map(|_| to.to_owned());
    }
    if let Some(rest) = to.strip_prefix("//") {
        return Some(format!("{scheme}://{rest}"));
    }
    if to.starts_with('/') {
        return Some(format!("{scheme}://{host}{to}"));
    }
    let path = from.split(['?', '#']).next()?;
    let (folder, _) = path.rsplit_once('/').filter(|(folder, _)| folder.len() > scheme.len() + 2)?;
    Some(format!("{folder}/{to}"))
}

/// What went wrong, without an address.
fn words(error: &Failed) -> String {
    match error {
        Failed::BadUri(_) | Failed::Http(_) => "its address is not well formed".into(),
        Failed::HostNotFound => "no such host is known".into(),
        other => other.to_string(),
    }
}
