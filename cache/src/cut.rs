//! Checkpoints: what a cut of a loop hands to its own continuation. The newest whole one counts, and two are kept, so that
//! damage to one costs a stretch of work and not all of it.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::artifact::files_in;
use crate::digest::FileEntry;
use crate::disk::in_parallel;
use crate::error::{Result, StoreError};
use crate::key::Key;
use crate::record::{seal_text, unseal_text};
use crate::store::{Store, hash_file, list, read_if_there};

/// The form of manifests.
const FORM: &str = "pipeline-cut-v1";

/// How many checkpoints of a key are kept.
const KEPT: usize = 2;

/// A whole checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// How many rounds it is after, as the writer numbered it.
    pub round: u64,
    /// The folder that the writer filled. To be read only.
    pub path: PathBuf,
}

/// How a checkpoint is compared with its manifest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    /// By names and lengths.
    Lengths,
    /// And by bytes.
    Bytes,
}

/// What a checkpoint holds; lies beside the folder `files`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    key: Key,
    round: u64,
    files: Vec<FileEntry>,
}

impl Store {
    /// Keeps a checkpoint. `write` fills the empty folder that it is given; when it fails, nothing is kept and its error is the
    /// source of [`StoreError::Cut`]. A checkpoint of the same round is replaced, and all but the newest two are removed.
    ///
    /// To be called by the holder of the key's lock.
    pub fn save_cut<E>(&self, key: &Key, round: u64, write: impl FnOnce(&Path) -> Result<(), E>) -> Result<()>
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let scratch = self.begin_scratch()?;
        let draft = scratch.path.join("cut");
        let folder = draft.join("files");
        self.disk.make_folder(&folder)?;
        write(&folder).map_err(|error| StoreError::Cut { round, source: error.into() })?;
        let files = in_parallel(&files_in(&folder)?, |(name, path)| {
            self.disk.sync(path)?;
            let (digest, bytes) = hash_file(path)?;
            Ok(FileEntry { path: name.clone(), digest, bytes })
        })?;
        let mut folders: Vec<PathBuf> =
            files.iter().filter_map(|file| Some(folder.join(&file.path).parent()?.into())).collect();
        folders.dedup();
        let manifest = draft.join("manifest");
        self.disk.write(&manifest, &seal_text(FORM, &Manifest { key: *key, round, files }))?;
        folders.extend([manifest, folder, draft.clone()]);
        in_parallel(&folders, |path| self.disk.sync(path))?;

        let cuts = self.cuts_path(key);
        let home = cuts.join(round.to_string());
        self.disk.make_folder(&cuts)?;
        scratch.discard(&home)?;
        self.disk.rename(&draft, &home)?;
        self.disk.sync(&cuts)?;
        self.disk.sync(&self.root().join("cut"))?;
        for (_, old) in self.cuts(key)?.iter().skip(KEPT) {
            scratch.discard(old)?;
        }
        Ok(())
    }

    /// The newest checkpoint as far as manifests, names and lengths tell, for who only wants to know where work stands:
    /// bytes are not read, and nothing is removed. Who goes on from it asks for the [`newest_cut`](Store::newest_cut).
    pub fn cut_standing(&self, key: &Key) -> Result<Option<Cut>> {
        for (round, path) in self.cuts(key)? {
            if self.cut_fault(key, round, &path, Reading::Lengths)?.is_none() {
                return Ok(Some(Cut { round, path: path.join("files") }));
            }
        }
        Ok(None)
    }

    /// The newest checkpoint that is whole: all its bytes are read and compared. Damaged ones are removed on the way.
    ///
    /// To be called by the holder of the key's lock.
    pub fn newest_cut(&self, key: &Key) -> Result<Option<Cut>> {
        for (round, path) in self.cuts(key)? {
            match self.cut_fault(key, round, &path, Reading::Bytes)? {
                None => return Ok(Some(Cut { round, path: path.join("files") })),
                Some(reason) => {
                    tracing::warn!(%key, round, reason, "a damaged checkpoint is removed");
                    self.begin_scratch()?.discard(&path)?;
                }
            }
        }
        Ok(None)
    }

    /// Removes all checkpoints of a key.
    pub fn drop_cuts(&self, key: &Key) -> Result<()> {
        let cuts = self.cuts_path(key);
        if cuts.exists() { self.begin_scratch()?.discard(&cuts) } else { Ok(()) }
    }

    /// Removes the checkpoints of finished work, which whoever finished it had no time to drop.
    pub(crate) fn sweep_cuts(&self) -> Result<()> {
        for (name, _) in list(&self.root().join("cut"))? {
            let Ok(key) = name.parse::<Key>() else { continue };
            if self.lookup(&key)?.hit().is_some()
                && let Some(_guard) = self.try_lock(&key)?
            {
                self.drop_cuts(&key)?;
            }
        }
        Ok(())
    }

    /// The checkpoints of a key, the newest first, whole or not.
    pub(crate) fn cuts(&self, key: &Key) -> Result<Vec<(u64, PathBuf)>> {
        let found = list(&self.cuts_path(key))?.into_iter();
        let mut cuts: Vec<_> = found.filter_map(|(name, path)| Some((name.parse().ok()?, path))).collect();
        cuts.sort_unstable_by(|left, right| right.cmp(left));
        Ok(cuts)
    }

    /// What is wrong with a checkpoint, if anything.
    pub(crate) fn cut_fault(&self, key: &Key, round: u64, path: &Path, reading: Reading) -> Result<Option<String>> {
        let text = match read_if_there(&path.join("manifest")) {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(Some("it has no manifest".into())),
            Err(error) => return error.into_damage().map(Some),
        };
        let manifest = match unseal_text::<Manifest>(FORM, &text) {
            Ok(manifest) if (manifest.key, manifest.round) == (*key, round) => manifest,
            Ok(_) => return Ok(Some("its manifest is that of another checkpoint".into())),
            Err(reason) => return Ok(Some(format!("its manifest is damaged: {reason}"))),
        };
        let found = match files_in(&path.join("files")) {
            Ok(found) => found,
            Err(error) => return error.into_damage().map(Some),
        };
        if !found.iter().map(|(name, _)| name).eq(manifest.files.iter().map(|file| &file.path)) {
            return Ok(Some("it does not have the files of its manifest".into()));
        }
        for ((name, path), file) in found.iter().zip(&manifest.files) {
            let is_as_written = match reading {
                Reading::Lengths => {
                    fs::metadata(path).map(|found| found.len() == file.bytes).map_err(StoreError::io("look at", path))
                }
                Reading::Bytes => hash_file(path).map(|found| found == (file.digest, file.bytes)),
            };
            match is_as_written {
                Ok(true) => {}
                Ok(false) => return Ok(Some(format!("`{name}` is not as it was written"))),
                Err(error) => return error.into_damage().map(|reason| Some(format!("`{name}`: {reason}"))),
            }
        }
        Ok(None)
    }
}
