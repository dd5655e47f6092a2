//! Reads the whole store and removes what is damaged, so that it becomes a miss.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::artifact::files_in;
use crate::cut::Reading;
use crate::digest::{Digest, FileEntry};
use crate::error::Result;
use crate::key::Key;
use crate::record::Why;
use crate::store::{Care, Condition, Store, hash_file, list};

/// What [`Store::verify`] read, found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Number of files of artifacts that were read.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Number of folders of artifacts.
    pub trees: u64,
    /// Number of action records.
    pub records: u64,
    /// Number of preimages.
    pub preimages: u64,
    /// Number of checkpoints.
    pub cuts: u64,
    /// All that was damaged, in the order it was found. Each of these was removed.
    pub damage: Vec<Damage>,
}

/// Something damaged, which was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// What it is.
    pub part: Part,
    /// Where it was, below the root of the store.
    pub path: PathBuf,
    /// What was wrong.
    pub reason: String,
}

/// A part of the store, and what its loss means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// A file of artifacts: results that hold it are computed again.
    Blob,
    /// A folder of an artifact: it is built again from blobs.
    Tree,
    /// A result: it is computed again.
    Record,
    /// The explanation of a key: written again when the key is next used.
    Preimage,
    /// A checkpoint: the one before is used.
    Cut,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (part, consequence) = match self.part {
            Part::Blob => ("file", "results that hold it are computed again when needed"),
            Part::Tree => ("artifact folder", "it is built again when needed"),
            Part::Record => ("record", "its result is computed again when needed"),
            Part::Preimage => ("preimage", "it is written again when its key is used"),
            Part::Cut => ("checkpoint", "an earlier one is used"),
        };
        write!(f, "removed {part} `{}`: {}; {consequence}", self.path.display(), self.reason)
    }
}

impl Store {
    /// Hashes every blob and reads every tree, record, preimage and checkpoint. Removes what is damaged, and records whose
    /// files are gone, so that each becomes a miss that the next run mends.
    ///
    /// Safe while others work: at worst a result is computed once more. Takes as long as reading the store.
    pub fn verify(&self) -> Result<Verification> {
        let mut report = Verification::default();
        self.verify_blobs(&mut report)?;
        self.verify_trees(&mut report)?;
        self.verify_records(&mut report)?;
        self.verify_preimages(&mut report)?;
        self.verify_cuts(&mut report)?;
        Ok(report)
    }

    fn verify_blobs(&self, report: &mut Verification) -> Result<()> {
        for (path, digits) in self.below("cas")? {
            report.blobs += 1;
            let condition = match digits.parse::<Digest>() {
                Ok(digest) => {
                    let bytes = std::fs::symlink_metadata(&path).map_or(0, |metadata| metadata.len());
                    report.bytes += bytes;
                    self.inspect(&path, &FileEntry { path: String::new(), digest, bytes }, Care::HashedNow)?
                }
                Err(error) => Condition::Damaged(error.to_string()),
            };
            if let Condition::Damaged(reason) = condition {
                self.remove_blob(&path)?;
                self.note(report, Part::Blob, &path, reason);
            }
        }
        Ok(())
    }

    fn verify_trees(&self, report: &mut Verification) -> Result<()> {
        for (path, digits) in self.below("trees")? {
            report.trees += 1;
            if let Some(reason) = self.tree_fault(&path, &digits)? {
                self.begin_scratch()?.discard(&path)?;
                self.note(report, Part::Tree, &path, reason);
            }
        }
        Ok(())
    }

    fn tree_fault(&self, path: &Path, digits: &str) -> Result<Option<String>> {
        let found = match files_in(path) {
            Ok(found) => found,
            Err(error) => return error.into_damage().map(Some),
        };
        let mut files = Vec::new();
        for (name, path) in found {
            let (digest, bytes) = match hash_file(&path) {
                Ok(found) => found,
                Err(error) => return error.into_damage().map(Some),
            };
            files.push(FileEntry { path: name, digest, bytes });
        }
        let digest = Digest::of_tree(&files);
        Ok((digest.to_string() != digits).then(|| format!("its files have the digest {}", digest.short())))
    }

    fn verify_records(&self, report: &mut Verification) -> Result<()> {
        for (path, name) in self.below_by_name("ac")? {
            report.records += 1;
            let why = match name.parse::<Key>() {
                Ok(key) => self.lookup(&key)?.miss(),
                Err(error) => Some(Why::RecordCorrupt { reason: error.to_string() }),
            };
            if let Some(why) = why {
                self.disk.remove_file(&path)?;
                self.note(report, Part::Record, &path, why.to_string());
            }
        }
        Ok(())
    }

    fn verify_preimages(&self, report: &mut Verification) -> Result<()> {
        for (path, name) in self.below_by_name("pre")? {
            report.preimages += 1;
            let whole = match name.parse::<Key>() {
                Ok(key) => self.preimage(&key)?.is_some(),
                Err(_) => false,
            };
            if !whole {
                self.disk.remove_file(&path)?;
                self.note(report, Part::Preimage, &path, "it does not have the hash of its name".into());
            }
        }
        Ok(())
    }

    fn verify_cuts(&self, report: &mut Verification) -> Result<()> {
        for (name, _) in list(&self.root().join("cut"))? {
            let Ok(key) = name.parse::<Key>() else { continue };
            for (round, path) in self.cuts(&key)? {
                report.cuts += 1;
                if let Some(reason) = self.cut_fault(&key, round, &path, Reading::Bytes)? {
                    self.begin_scratch()?.discard(&path)?;
                    self.note(report, Part::Cut, &path, reason);
                }
            }
        }
        Ok(())
    }

    /// What lies in `part/ab/rest`, with the name `abrest`.
    pub(crate) fn below(&self, part: &str) -> Result<Vec<(PathBuf, String)>> {
        let mut found = Vec::new();
        for (first, folder) in list(&self.root().join(part))? {
            found.extend(list(&folder)?.into_iter().map(|(rest, path)| (path, format!("{first}{rest}"))));
        }
        Ok(found)
    }

    /// What lies in `part/ab/name`, with its name.
    fn below_by_name(&self, part: &str) -> Result<Vec<(PathBuf, String)>> {
        let mut found = Vec::new();
        for (_, folder) in list(&self.root().join(part))? {
            found.extend(list(&folder)?.into_iter().map(|(name, path)| (path, name)));
        }
        Ok(found)
    }

    fn note(&self, report: &mut Verification, part: Part, path: &Path, reason: String) {
        let path = path.strip_prefix(self.root()).unwrap_or(path).to_path_buf();
        report.damage.push(Damage { part, path, reason });
    }
}
