//! Where a file or folder is: on this machine, in a repository of the Hugging Face hub, or at an address of the web.
//!
//! A location that is elsewhere says what its content is: the hub by a commit, the web by a digest. So the same name never
//! stands for two things, and what serves it (a host, a mirror, a cache) does not matter.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where a file or folder is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Location {
    /// On this machine.
    Local(PathBuf),
    /// On the Hugging Face hub.
    Hub(HubPath),
    /// At an address of the web.
    Web(WebFile),
}

/// A repository of the Hugging Face hub, or a file or folder in it: `hub:[datasets/]OWNER/NAME[@REVISION][/PATH]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HubPath {
    /// `OWNER/NAME` of a model, `datasets/OWNER/NAME` of a data set.
    pub repository: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// Path inside with `/`; empty for the whole repository.
    pub path: String,
}

/// A file at an address of the web.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebFile {
    /// Its address.
    pub url: String,
    /// What it must hold.
    pub digest: FileDigest,
}

/// The digest of a file's bytes, in lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileDigest {
    /// SHA-256, as the hub and most others publish.
    Sha256(String),
    /// BLAKE3, as the store has it: the result is the same as from a local file with these bytes.
    Blake3(String),
}

/// What a text that names a place on the hub begins with.
pub const HUB: &str = "hub:";

/// The branch that is meant where none is named.
const MAIN: &str = "main";

impl HubPath {
    /// Reads what follows `hub:`. Errors say what is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            format!(
                "`{HUB}{text}` {what}; expected `{HUB}OWNER/NAME`, `{HUB}OWNER/NAME@REVISION`, or these with `/PATH/IN/IT`, \
                     for a data set with `datasets/` in front"
            )
        };
        let (kind, rest) = match text.strip_prefix("datasets/") {
            Some(rest) => ("datasets/", rest),
            None => ("", text.strip_prefix("models/").unwrap_or(text)),
        };
        let mut parts = rest.splitn(3, '/');
        let (owner, name, path) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let (name, revision) = name.split_once('@').unwrap_or((name, MAIN));
        // In a path, a slash of a revision is written as in an address.
        let revision = revision.replace("%2F", "/");
        let is_name = |name: &str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !name.is_empty() && !name.starts_with('.') && !name.contains("..") && name.chars().all(fits)
        };
        if !is_name(owner) || !is_name(name) {
            return Err(wrong("names no repository"));
        }
        if !revision.split('/').all(is_name) {
            return Err(wrong("names no revision"));
        }
        let path = path.trim_end_matches('/');
        if !path.is_empty() && !is_inside(path) {
            return Err(wrong("names no path inside of the repository"));
        }
        Ok(HubPath { repository: format!("{kind}{owner}/{name}"), revision, path: path.to_owned() })
    }

    /// Whether the revision is a commit, of which there is nothing to look up.
    pub fn names_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

/// Whether a text is a commit: 40 hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
}

/// Whether a path with `/` leads to something inside of a folder, and is written in the one way to do so.
pub fn is_inside(path: &str) -> bool {
    path.split('/').all(|part| !["", ".", ".."].contains(&part)) && !path.contains(['\\', '\0'])
}

impl WebFile {
    /// Errors when it is no address from which a file may be taken, or its digest is none.
    pub fn check(&self) -> Result<(), String> {
        let WebFile { url, digest } = self;
        let Some(host) = host_of(url) else {
            return Err(format!("`{self}` is no address that begins with `https://`"));
        };
        if host.contains('@') {
            // Never printed: it is in every message about the address.
            return Err(
                "an address with a name or password in it would be kept with the pipeline; give one without".into()
            );
        }
        if !url.starts_with("https://") && !is_this_machine(url) {
            return Err(format!("`{self}` is not encrypted; give an address that begins with `https://`"));
        }
        let (FileDigest::Sha256(digits) | FileDigest::Blake3(digits)) = digest;
        if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit)) {
            return Err(format!("expected 64 lower-case hexadecimal digits, got `{digits}`"));
        }
        Ok(())
    }
}

/// The host of an address, with what else stands between `//` and the path.
pub fn host_of(url: &str) -> Option<&str> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
    rest.split(['/', '?', '#']).next().filter(|host| !host.is_empty())
}

/// Whether an address is one of this machine, to which nobody listens on the way.
pub fn is_this_machine(url: &str) -> bool {
    let Some(host) = host_of(url) else { return false };
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.ends_with(']') { host } else { name });
    ["localhost", "127.0.0.1", "[::1]"].contains(&name)
}

impl Location {
    /// The path, where it is on this machine.
    pub fn local(&self) -> Option<&Path> {
        match self {
            Location::Local(path) => Some(path),
            Location::Hub(_) | Location::Web(_) => None,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Local(path) => path.display().fmt(f),
            Location::Hub(path) => path.fmt(f),
            Location::Web(file) => file.fmt(f),
        }
    }
}

/// As it is written in a pipeline.
impl fmt::Display for HubPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HubPath { repository, revision, path } = self;
        write!(f, "{HUB}{repository}")?;
        if revision != MAIN {
            write!(f, "@{}", revision.replace('/', "%2F"))?;
        }
        if path.is_empty() { Ok(()) } else { write!(f, "/{path}") }
    }
}

/// Without what follows a `?`: there some addresses have a secret.
impl fmt::Display for WebFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.split(['?', '#']).next().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_on_the_hub_reads_back_as_it_is_written() {
        let cases = [
            ("a/b", ("a/b", "main", "")),
            ("a/b@v1.0", ("a/b", "v1.0", "")),
            ("datasets/a/b/data/x.parquet", ("datasets/a/b", "main", "data/x.parquet")),
            ("datasets/a/b@refs%2Fpr%2F1/data", ("datasets/a/b", "refs/pr/1", "data")),
        ];
        for (text, (repository, revision, path)) in cases {
            let read = HubPath::parse(text).unwrap();
            assert_eq!((&*read.repository, &*read.revision, &*read.path), (repository, revision, path), "{text}");
            assert_eq!(read.to_string(), format!("hub:{text}"));
        }
        assert_eq!(HubPath::parse("models/a/b/").unwrap().to_string(), "hub:a/b");
        let commit = HubPath::parse(&format!("a/b@{}", "0a".repeat(20))).unwrap();
        assert!(commit.names_commit() && !HubPath::parse("a/b@0a").unwrap().names_commit());
        for text in ["", "gpt2", "a/", "/b", "a/..", "a/b@", "a/b@../x", "a/b/../c", "a/b//c", "a b/c", "datasets/a"] {
            let error = HubPath::parse(text).unwrap_err();
            assert!(error.contains("expected `hub:OWNER/NAME`"), "{text}: {error}");
        }
    }

    #[test]
    fn an_address_is_encrypted_or_of_this_machine_and_shows_no_secret() {
        let file = |url: &str| WebFile { url: url.into(), digest: FileDigest::Sha256("0f".repeat(32)) };
        for url in
            ["https://x.org/a", "http://localhost:80/a", "http://127.0.0.1:9/", "http://[::1]/a", "http://[::1]:8/a"]
        {
            assert_eq!(file(url).check(), Ok(()), "{url}");
        }
        let refused = |url: &str| file(url).check().unwrap_err();
        for url in ["http://x.org/a", "http://localhost.x.org/a", "http://x.org/localhost"] {
            assert!(refused(url).contains("is not encrypted"), "{url}");
        }
        assert!(refused("ftp://x.org/a").contains("no address"));
        assert!(refused("https:///a").contains("no address"));
        let error = refused("https://me:secret@x.org/a");
        assert!(error.contains("name or password") && !error.contains("secret"), "{error}");
        assert_eq!(file("https://x.org/a?key=secret").to_string(), "https://x.org/a");
        let digest = WebFile { url: "https://x.org/a".into(), digest: FileDigest::Blake3("0F".repeat(32)) };
        assert!(digest.check().unwrap_err().contains("64 lower-case"));
    }
}
