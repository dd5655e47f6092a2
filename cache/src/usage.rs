//! What the store takes up.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use crate::error::{Result, StoreError};
use crate::store::{Store, is_absence};

/// Files and their lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Number of files.
    pub files: u64,
    /// Sum of their lengths in bytes.
    pub bytes: u64,
}

impl std::ops::Add for Size {
    type Output = Size;

    fn add(self, other: Size) -> Size {
        Size { files: self.files + other.files, bytes: self.bytes + other.bytes }
    }
}

/// What each part of the store takes up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Blobs: the bytes of all artifacts, each kept once.
    pub cas: Size,
    /// Files of artifacts' folders that are copies; links to blobs take nothing.
    pub trees: Size,
    /// Action records.
    pub ac: Size,
    /// Preimages of keys.
    pub pre: Size,
    /// Checkpoints.
    pub cut: Size,
    /// Records and logs of runs.
    pub runs: Size,
    /// What running stages have written so far.
    pub work: Size,
    /// The outputs of all records: their number, and their bytes as if each were kept on its own.
    pub artifacts: Size,
}

impl Usage {
    /// Bytes of all parts together.
    pub fn bytes(&self) -> u64 {
        [self.cas, self.trees, self.ac, self.pre, self.cut, self.runs, self.work].iter().map(|size| size.bytes).sum()
    }
}

impl Store {
    /// Measures the store. What others write or remove meanwhile may be counted or not.
    pub fn usage(&self) -> Result<Usage> {
        let of = |part: &str| size_of(&self.root().join(part), false);
        let mut artifacts = Size::default();
        for key in self.keys()? {
            for artifact in self.read_record(&key)?.iter().flat_map(|record| record.outputs.values()) {
                artifacts.files += 1;
                artifacts.bytes += artifact.bytes;
            }
        }
        Ok(Usage {
            cas: of("cas")?,
            trees: size_of(&self.root().join("trees"), true)?,
            ac: of("ac")?,
            pre: of("pre")?,
            cut: of("cut")?,
            runs: of("runs")?,
            work: of("work")?,
            artifacts,
        })
    }
}

/// The size of all files below a folder; `only_copies` leaves out those that are links to blobs.
pub(crate) fn size_of(folder: &Path, only_copies: bool) -> Result<Size> {
    let mut size = Size::default();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if is_absence(&error) => continue, // removed by others meanwhile
            Err(error) => return Err(StoreError::io("list", &folder)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(StoreError::io("list", &folder))?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if is_absence(&error) => continue,
                Err(error) => return Err(StoreError::io("look at", &entry.path())(error)),
            };
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if !only_copies || metadata.nlink() == 1 {
                size.files += 1;
                size.bytes += metadata.len();
            }
        }
    }
    Ok(size)
}
