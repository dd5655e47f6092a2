//! Action records: which artifacts a key stands for. And the sealed text they are written in.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::digest::{Digest, FileEntry};
use crate::key::Key;

/// An accepted result for a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// What was asked for.
    pub key: Key,
    /// What came out, by port.
    pub outputs: BTreeMap<String, Artifact>,
    /// How it came about (seconds, device, build): kept for people, and part of no key.
    pub info: Json,
}

impl Record {
    /// Sum of its outputs' lengths in bytes.
    pub fn bytes(&self) -> u64 {
        self.outputs.values().map(|artifact| artifact.bytes).sum()
    }

    /// What is wrong with it, if anything.
    pub(crate) fn fault(&self) -> Option<String> {
        self.outputs.iter().find_map(|(port, artifact)| Some(format!("output `{port}`: {}", artifact.fault()?)))
    }
}

/// A folder of files, addressed by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Artifact {
    /// [`Digest::of_tree`] of `files`.
    pub digest: Digest,
    /// The type of the port it came from; the store only keeps it.
    pub port_type: String,
    /// Sum of the files' lengths in bytes.
    pub bytes: u64,
    /// Its files, sorted by the bytes of their paths.
    pub files: Vec<FileEntry>,
}

impl Artifact {
    /// Of files in any order.
    pub(crate) fn new(port_type: String, mut files: Vec<FileEntry>) -> Self {
        files.sort_unstable_by(|left, right| left.path.cmp(&right.path));
        let bytes = files.iter().map(|file| file.bytes).sum();
        Artifact { digest: Digest::of_tree(&files), port_type, bytes, files }
    }

    /// What is wrong with it, if anything: its digest is not that of its files, or a path leads out of the artifact.
    pub(crate) fn fault(&self) -> Option<String> {
        if Digest::of_tree(&self.files) != self.digest {
            return Some(format!("its files do not have the digest {}", self.digest.short()));
        }
        let leads_out = |file: &&FileEntry| file.path.split('/').any(|part| matches!(part, "" | "." | ".."));
        self.files.iter().find(leads_out).map(|file| format!("`{}` is not a path inside an artifact", file.path))
    }
}

/// What the store has for a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    /// A whole result.
    Hit(Record),
    /// None that could be served.
    Miss(Why),
}

impl Lookup {
    /// The record of a hit.
    pub fn hit(self) -> Option<Record> {
        match self {
            Lookup::Hit(record) => Some(record),
            Lookup::Miss(_) => None,
        }
    }

    /// The reason of a miss.
    pub fn miss(self) -> Option<Why> {
        match self {
            Lookup::Hit(_) => None,
            Lookup::Miss(why) => Some(why),
        }
    }
}

/// Why a lookup is a miss. Publishing the key again mends every one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // each field is named in the text
pub enum Why {
    /// Nothing was published, or it was forgotten.
    NoRecord,
    /// The record's checksum or content is wrong.
    RecordCorrupt { reason: String },
    /// A file is gone from the store.
    ArtifactMissing { port: String, file: String },
    /// A file is not what was published.
    ArtifactCorrupt { port: String, file: String, reason: String },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::NoRecord => write!(f, "no result is recorded for this key"),
            Why::RecordCorrupt { reason } => write!(f, "the record of the result is damaged: {reason}"),
            Why::ArtifactMissing { port, file } => write!(f, "`{file}` of output `{port}` is missing from the store"),
            Why::ArtifactCorrupt { port, file, reason } => {
                write!(f, "`{file}` of output `{port}` is damaged: {reason}")
            }
        }
    }
}

/// Writes a value as JSON below a line with its form's name and checksum.
pub(crate) fn seal_text(form: &str, value: &impl Serialize) -> Vec<u8> {
    let body = serde_json::to_vec(value).expect("records have string keys and no failing fields");
    let mut text = format!("{form} {}\n", Digest::of(&body)).into_bytes();
    text.extend(body);
    text.push(b'\n');
    text
}

/// Reads what [`seal_text`] wrote; the error says what is wrong with it.
pub(crate) fn unseal_text<T: DeserializeOwned>(form: &str, text: &[u8]) -> Result<T, String> {
    let end = text.iter().position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let head = String::from_utf8_lossy(&text[..end]);
    let Some((found, checksum)) = head.split_once(' ') else { return Err("its first line has no checksum".into()) };
    if found != form {
        return Err(format!("expected form `{form}`, got `{found}`"));
    }
    let body = text[end + 1..].strip_suffix(b"\n").ok_or("it is cut off")?;
    if Digest::of(body).to_string() != checksum {
        return Err("its checksum does not match its content".into());
    }
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record() -> Record {
        let file = |path: &str| FileEntry { path: path.into(), digest: Digest::of(b"content"), bytes: 7 };
        let artifact = Artifact::new("model".into(), vec![file("b"), file("a/c")]);
        let outputs = BTreeMap::from([("model".to_string(), artifact)]);
        Record { key: Key::of(&json!(1)), outputs, info: json!({"seconds": 1.5}) }
    }

    #[test]
    fn a_record_reads_back() {
        let text = seal_text("form", &record());
        assert_eq!(unseal_text::<Record>("form", &text), Ok(record()));
        assert_eq!(record().outputs["model"].bytes, 14);
        assert_eq!(record().outputs["model"].fault(), None);
    }

    #[test]
    fn no_flipped_bit_and_no_cut_goes_unseen() {
        let text = seal_text("form", &record());
        for index in 0..text.len() {
            let mut flipped = text.clone();
            flipped[index] ^= 1;
            assert!(unseal_text::<Record>("form", &flipped).is_err(), "byte {index}");
            assert!(unseal_text::<Record>("form", &text[..index]).is_err(), "cut at {index}");
        }
    }

    #[test]
    fn an_artifact_cannot_name_files_outside_of_itself() {
        for path in ["../x", "/etc/passwd", "a//b", ".", ""] {
            let file = FileEntry { path: path.into(), digest: Digest::of(b""), bytes: 0 };
            let fault = Artifact::new("dir".into(), vec![file]).fault();
            assert_eq!(fault, Some(format!("`{path}` is not a path inside an artifact")));
        }
        let mut artifact = record().outputs["model"].clone();
        artifact.files.pop();
        assert!(artifact.fault().unwrap().starts_with("its files do not have the digest"));
    }
}
