//! Files that are elsewhere: in repositories of the Hugging Face hub, and at https addresses.
//!
//! What is fetched is what its name says: a commit of the hub, or a digest. Every file is hashed before it counts, one that is
//! not whole never has its name, and a download that was cut goes on where it was. Files of the hub lie in the hub's own
//! cache, in its own layout, and are shared with `transformers` and its kin.
//!
//! Connections that fail in passing are tried again. Redirects are followed so far and no further, never from https to
//! http, and never with the token to another host. Nothing here prints a token, or the part of an address that may hold one.

mod checksum;
mod http;
mod hub;
mod settings;
mod web;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};
use contract::{HubPath, WebFile};

pub use crate::settings::Settings;

/// Told how much of a file is there: bytes, and how many there will be where that is known.
pub type Tell<'a> = &'a mut dyn FnMut(u64, Option<u64>);

/// Which files of a folder to fetch, of all that it has.
pub type Choose<'a> = &'a dyn Fn(&[String]) -> Vec<String>;

/// The way to files that are elsewhere.
pub struct Remote {
    settings: Settings,
    client: http::Client,
    /// What was looked up, or why it could not be: a process sees every branch at one commit, and asks once.
    commits: Mutex<HashMap<HubPath, Result<String, String>>>,
}

impl Remote {
    /// With these settings. Nothing is connected to before something is asked for.
    pub fn new(settings: Settings) -> Self {
        let client = http::Client::new(&settings);
        Remote { settings, client, commits: Mutex::default() }
    }

    /// The commit that a revision is now. A commit is itself; a branch or a tag is looked up, on the hub or, where that cannot
    /// be reached, in the hub's cache.
    pub fn commit(&self, at: &HubPath) -> Result<String> {
        if at.names_commit() {
            return Ok(at.revision.clone());
        }
        let key = HubPath { path: String::new(), ..at.clone() };
        let mut commits = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
        let found = commits.entry(key).or_insert_with(|| self.look_up(at).map_err(|error| format!("{error:#}")));
        found.clone().map_err(|text| anyhow!(text))
    }

    /// Where the files of a repository lie that `choose` names, if all of them are on this machine. Asks nobody.
    pub fn cached(&self, at: &HubPath, commit: &str, choose: Choose) -> Option<PathBuf> {
        hub::Repository::new(self, at, commit).cached(choose)
    }

    /// Brings those files of a repository here that `choose` names, and says where they lie: the file or folder that `at`
    /// names, in the hub's cache.
    pub fn fetch(&self, at: &HubPath, commit: &str, choose: Choose, tell: Tell) -> Result<PathBuf> {
        hub::Repository::new(self, at, commit).fetch(choose, tell)
    }

    /// Brings a file here that is at an address of the web, and says where it lies.
    pub fn fetch_web(&self, file: &WebFile, tell: Tell) -> Result<PathBuf> {
        web::fetch(self, file, tell)
    }
}

#[cfg(test)]
mod testing;
