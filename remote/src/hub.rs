//! Repositories of the Hugging Face hub, in the hub's cache.
//!
//! The cache is laid out as `huggingface_hub` does it: `models--OWNER--NAME/blobs/ETAG` holds a file, under the name that the
//! hub gives its content; `snapshots/COMMIT/PATH` is a link to it, and `refs/REVISION` says which commit a branch was. A file
//! that is not whole is `blobs/ETAG.incomplete`. What the cache does not keep, the list of the files of a commit, is kept in
//! a cache of our own: without it nobody could tell a whole snapshot from one of which somebody else needed a part.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use contract::HubPath;
use contract::files::cannot;
use contract::location::{is_commit, is_inside};
use serde::Deserialize;

use crate::checksum::Checksum;
use crate::http::{Failure, escaped, header, lock, make, settle};
use crate::{Choose, Remote, Tell};

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// A repository at a commit.
pub(crate) struct Repository<'a> {
    remote: &'a Remote,
    at: &'a HubPath,
    commit: &'a str,
}

impl Remote {
    /// The commit that a branch or a tag is.
    pub(crate) fn look_up(&self, at: &HubPath) -> Result<String> {
        let way_out =
            format!("give a commit, as `{}`, or go online", HubPath { revision: "COMMIT".into(), ..at.clone() });
        let cached = || {
            let path = self.folder(at).join("refs").join(&at.revision);
            let commit = fs::read_to_string(path).ok()?.trim().to_owned();
            is_commit(&commit).then_some(commit)
        };
        if self.settings.offline {
            return cached().with_context(|| {
                format!("`HF_HUB_OFFLINE` is set, and the hub's cache does not know which commit `{at}` is; {way_out}")
            });
        }
        match self.revision(at, &at.revision) {
            Ok(revision) => {
                self.keep_list(at, &revision)?;
                Ok(revision.sha)
            }
            Err(Failure::Passing(text, _)) => {
                let commit = cached().with_context(|| {
                    format!("{text}; the hub's cache does not know which commit `{at}` is, either: {way_out}")
                })?;
                tracing::warn!("{text}; `{at}` is taken to be the commit {commit}, as it was when it was last fetched");
                Ok(commit)
            }
            Err(failure) => Err(self.explained(at, failure)),
        }
    }

    fn revision(&self, at: &HubPath, revision: &str) -> Result<Revision, Failure> {
        let kind = if at.repository.starts_with("datasets/") { "" } else { "models/" };
        let revision = escaped(revision).replace('/', "%2F");
        let url = format!("{}/api/{kind}{}/revision/{revision}", self.settings.endpoint, at.repository);
        let text = self.client.text(&url)?;
        let wrong = |what: String| Failure::Lasting(anyhow!("the hub's answer about `{at}` {what}"));
        let found: Revision =
            serde_json::from_str(&text).map_err(|error| wrong(format!("is not understood: {error}")))?;
        if !is_commit(&found.sha) {
            return Err(wrong("names no commit".into()));
        }
        match found.siblings.iter().find(|file| !is_inside(&file.rfilename)) {
            Some(file) => Err(wrong(format!("names a file outside of it, {:?}", file.rfilename))),
            None => Ok(found),
        }
    }

    /// What to do where the hub refuses.
    fn explained(&self, at: &HubPath, failure: Failure) -> anyhow::Error {
        let HubPath { repository, .. } = at;
        match failure {
            Failure::Refused(status @ (401 | 403), text) => {
                let who = if self.settings.token.is_some() {
                    "the token that is used may not read it"
                } else {
                    "there is no token"
                };
                let page = format!("{}/{repository}", self.settings.endpoint);
                let again = if status == 401 { ", or does not exist" } else { "" };
                anyhow!(
                    "{text} for `{at}`: it is private or gated{again}, and {who}; accept its conditions on {page}, and set \
                     `HF_TOKEN` or log in with `hf auth login`"
                )
            }
            Failure::Refused(404, text) => {
                anyhow!(
                    "{text} for `{at}`: there is no such repository, revision or file, or it is private (see `HF_TOKEN`)"
                )
            }
            other => anyhow::Error::from(other).context(format!("cannot fetch `{at}`")),
        }
    }

    /// The folder of a repository in the hub's cache.
    fn folder(&self, at: &HubPath) -> PathBuf {
        self.settings.hub.join(folder_name(at))
    }

    /// Where the list of the files of a commit is kept.
    fn list(&self, at: &HubPath, commit: &str) -> PathBuf {
        self.settings.own.join("hub").join(folder_name(at)).join(format!("{commit}.json"))
    }

    fn keep_list(&self, at: &HubPath, revision: &Revision) -> Result<()> {
        let path = self.list(at, &revision.sha);
        let names: Vec<&String> = revision.siblings.iter().map(|file| &file.rfilename).collect();
        let text = serde_json::to_vec(&names)?;
        make(path.parent().context("a list lies in a folder")?)?;
        let new = path.with_extension(format!("{}.new", std::process::id()));
        fs::write(&new, text).map_err(|error| cannot("write", &new, error))?;
        fs::rename(&new, &path).map_err(|error| cannot("write", &path, error))
    }
}

/// `models--OWNER--NAME` or `datasets--OWNER--NAME`.
fn folder_name(at: &HubPath) -> String {
    let kind = if at.repository.starts_with("datasets/") { "" } else { "models--" };
    format!("{kind}{}", at.repository.replace('/', "--"))
}

impl<'a> Repository<'a> {
    pub(crate) fn new(remote: &'a Remote, at: &'a HubPath, commit: &'a str) -> Self {
        Repository { remote, at, commit }
    }

    fn snapshot(&self) -> PathBuf {
        self.remote.folder(self.at).join("snapshots").join(self.commit)
    }

    /// Where what is named lies.
    fn named(&self) -> PathBuf {
        if self.at.path.is_empty() { self.snapshot() } else { self.snapshot().join(&self.at.path) }
    }

    pub(crate) fn cached(&self, choose: Choose) -> Option<PathBuf> {
        if !self.named().is_file() {
            let files = self.chosen(&self.known_list()?, choose).ok()?;
            files.iter().all(|file| self.snapshot().join(file).is_file()).then_some(())?;
        }
        Some(self.named())
    }

    pub(crate) fn fetch(&self, choose: Choose, tell: Tell) -> Result<PathBuf> {
        for file in self.files(choose)? {
            self.fetch_file(&file, tell)?;
        }
        if !self.at.names_commit() {
            // As others do, so that the branch is known to all of them when there is no network.
            let path = self.remote.folder(self.at).join("refs").join(&self.at.revision);
            make(path.parent().context("a reference lies in a folder")?)?;
            fs::write(&path, self.commit).map_err(|error| cannot("write", &path, error))?;
        }
        Ok(self.named())
    }

    /// Paths in the repository of what is to be fetched.
    fn files(&self, choose: Choose) -> Result<Vec<String>> {
        if self.named().is_file() {
            return Ok(vec![self.at.path.clone()]);
        }
        let all = match self.known_list() {
            Some(all) => all,
            None if self.remote.settings.offline => bail!(
                "`HF_HUB_OFFLINE` is set, and which files `{}` has at the commit {} is not known; go online once",
                self.at,
                self.commit
            ),
            None => {
                let revision = self.remote.revision(self.at, self.commit);
                let revision = revision.map_err(|failure| self.remote.explained(self.at, failure))?;
                ensure!(
                    revision.sha == self.commit,
                    "the hub names another commit for `{}`: {}",
                    self.at,
                    revision.sha
                );
                self.remote.keep_list(self.at, &revision)?;
                revision.siblings.into_iter().map(|file| file.rfilename).collect()
            }
        };
        self.chosen(&all, choose)
    }

    fn known_list(&self) -> Option<Vec<String>> {
        let text = fs::read(self.remote.list(self.at, self.commit)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Of all files of the repository those that are to be fetched: the one that is named, or of a folder those that are
    /// chosen by their names in it.
    fn chosen(&self, all: &[String], choose: Choose) -> Result<Vec<String>> {
        let HubPath { path, .. } = self.at;
        if all.contains(path) {
            return Ok(vec![path.clone()]);
        }
        let folder = if path.is_empty() { String::new() } else { format!("{path}/") };
        let inside: Vec<String> = all.iter().filter_map(|file| Some(file.strip_prefix(&folder)?.to_owned())).collect();
        let chosen: Vec<String> = choose(&inside).iter().map(|file| format!("{folder}{file}")).collect();
        if chosen.is_empty() {
            let there = if inside.is_empty() { all } else { &inside };
            let listed: Vec<String> = there.iter().take(20).map(|file| format!("`{file}`")).collect();
            let what = if inside.is_empty() { "is not in the repository" } else { "has no file that is read here" };
            bail!("`{}` {what}; there are {}", self.at, listed.join(", "));
        }
        Ok(chosen)
    }

    /// Brings one file into the snapshot, unless it is there whole.
    fn fetch_file(&self, file: &str, tell: Tell) -> Result<()> {
        let link = self.snapshot().join(file);
        if self.is_whole(&link)? {
            return Ok(());
        }
        if self.remote.settings.offline {
            bail!("`HF_HUB_OFFLINE` is set, and `{file}` of `{}` is not in the hub's cache; go online once", self.at);
        }
        let HubPath { repository, .. } = self.at;
        let url = format!("{}/{repository}/resolve/{}/{}", self.remote.settings.endpoint, self.commit, escaped(file));
        let head = self.remote.client.headers(&url).map_err(|failure| self.remote.explained(self.at, failure))?;
        if let Some(commit) = header(&head, "x-repo-commit") {
            ensure!(commit == self.commit, "the hub gives `{file}` of `{}` at another commit, {commit}", self.at);
        }
        // Of a large file, which another host serves, these are the hub's words; `etag` and the length would be of the redirect.
        let linked = header(&head, "x-linked-etag");
        let size = if linked.is_some() || head.status().is_redirection() { "x-linked-size" } else { "content-length" };
        let size = header(&head, size).and_then(|size| size.parse().ok());
        let etag = linked
            .or_else(|| header(&head, "etag"))
            .map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        let is_name =
            |etag: &String| !etag.is_empty() && etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        let etag =
            etag.filter(is_name).with_context(|| format!("the hub gives `{file}` of `{}` no `ETag`", self.at))?;

        let folder = self.remote.folder(self.at);
        let blob = folder.join("blobs").join(&etag);
        let locks = self.remote.settings.hub.join(".locks").join(folder_name(self.at));
        let _lock = lock(&locks.join(format!("{etag}.lock")))?;
        make(&folder.join("blobs"))?;
        if !self.is_whole(&blob)? {
            self.download(file, &url, &blob, size, tell)?;
        }
        self.link(&link, &format!("blobs/{etag}"), file)
    }

    /// Whether a file is there and holds what its name in the cache says. Where links cannot be made, files have no such name.
    fn is_whole(&self, path: &Path) -> Result<bool> {
        let Ok(blob) = fs::canonicalize(path) else { return Ok(false) };
        let name = blob.file_name().and_then(|name| name.to_str()).and_then(Checksum::of_etag);
        match name {
            Some(checksum) => Ok(checksum.check(&blob)?.is_ok()),
            None => Ok(blob.is_file()),
        }
    }

    fn download(&self, file: &str, url: &str, blob: &Path, size: Option<u64>, tell: Tell) -> Result<()> {
        let partial = blob.with_extension("incomplete");
        let name = blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let place = || format!("cannot fetch `{file}` of `{}`", self.at);
        settle(Checksum::of_etag(name).as_ref(), &partial, blob, || {
            self.remote.client.download(url, &partial, size, tell)
        })
        .with_context(place)
    }

    /// A link from the snapshot to the blob, relative, so that the cache can be moved.
    fn link(&self, link: &Path, blob: &str, file: &str) -> Result<()> {
        make(link.parent().context("a file lies in a folder")?)?;
        let up = "../".repeat(2 + file.matches('/').count());
        let new = link.with_file_name(format!(".{}.new", std::process::id()));
        let _ = fs::remove_file(&new);
        symlink(format!("{up}{blob}"), &new).map_err(|error| cannot("write", &new, error))?;
        fs::rename(&new, link).map_err(|error| cannot("write", link, error))
    }
}

#[cfg(test)]
mod tests;
