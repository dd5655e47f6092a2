//! What a file holds, by the hashes that others name files by.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use contract::FileDigest;
use contract::files::cannot;
use sha1::{Digest as _, Sha1};
use sha2::Sha256;

/// What a file must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    Sha256(String),
    Blake3(String),
    /// As git hashes a file: SHA-1 of a short head and the content.
    Git(String),
}

impl Checksum {
    /// What the name that the hub gives a file says of its content: large files are named by SHA-256, others as git does.
    pub(crate) fn of_etag(etag: &str) -> Option<Self> {
        let is_hexadecimal = etag.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit));
        match etag.len() {
            64 if is_hexadecimal => Some(Checksum::Sha256(etag.to_owned())),
            40 if is_hexadecimal => Some(Checksum::Git(etag.to_owned())),
            _ => None,
        }
    }

    fn expected(&self) -> &str {
        let (Checksum::Sha256(digits) | Checksum::Blake3(digits) | Checksum::Git(digits)) = self;
        digits
    }

    /// The same hash of a file.
    fn of(&self, path: &Path) -> Result<String> {
        let mut file = File::open(path).map_err(|error| cannot("read", path, error))?;
        let length = file.metadata().map_err(|error| cannot("look at", path, error))?.len();
        let mut each = |take: &mut dyn FnMut(&[u8])| -> Result<()> {
            let mut buffer = vec![0; 1 << 18];
            loop {
                match file.read(&mut buffer).map_err(|error| cannot("read", path, error))? {
                    0 => return Ok(()),
                    read => take(&buffer[..read]),
                }
            }
        };
        Ok(match self {
            Checksum::Sha256(_) => {
                let mut hash = Sha256::new();
                each(&mut |bytes| hash.update(bytes))?;
                hexadecimal(&hash.finalize())
            }
            Checksum::Git(_) => {
                let mut hash = Sha1::new();
                hash.update(format!("blob {length}\0"));
                each(&mut |bytes| hash.update(bytes))?;
                hexadecimal(&hash.finalize())
            }
            Checksum::Blake3(_) => {
                let mut hash = blake3::Hasher::new();
                each(&mut |bytes| {
                    hash.update(bytes);
                })?;
                hash.finalize().to_hex().to_string()
            }
        })
    }

    /// Whether a file holds it; else what it holds.
    pub(crate) fn check(&self, path: &Path) -> Result<Result<(), Mismatch>> {
        let found = self.of(path)?;
        let expected = self.expected().to_owned();
        Ok(if found == expected { Ok(()) } else { Err(Mismatch { name: self.name(), expected, found }) })
    }

    fn name(&self) -> &'static str {
        match self {
            Checksum::Sha256(_) => "SHA-256",
            Checksum::Blake3(_) => "BLAKE3",
            Checksum::Git(_) => "hash of git",
        }
    }
}

impl From<&FileDigest> for Checksum {
    fn from(digest: &FileDigest) -> Self {
        match digest {
            FileDigest::Sha256(digits) => Checksum::Sha256(digits.clone()),
            FileDigest::Blake3(digits) => Checksum::Blake3(digits.clone()),
        }
    }
}

/// A file that holds something else.
#[derive(Debug)]
pub(crate) struct Mismatch {
    name: &'static str,
    expected: String,
    found: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { name, expected, found } = self;
        write!(f, "its {name} is {found}, expected {expected}")
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_that_others_compute() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "hello\n").unwrap();
        // `git hash-object`, `sha256sum` and `b3sum` of the same file.
        let right = [
            Checksum::of_etag("ce013625030ba8dba906f756967f9e9ca394464a").unwrap(),
            Checksum::of_etag("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03").unwrap(),
            Checksum::Blake3(blake3::hash(b"hello\n").to_hex().to_string()),
        ];
        for checksum in right {
            assert!(checksum.check(&path).unwrap().is_ok(), "{checksum:?}");
            std::fs::write(folder.path().join("other"), "hello").unwrap();
            let mismatch = checksum.check(&folder.path().join("other")).unwrap().unwrap_err().to_string();
            assert!(mismatch.contains(&format!("expected {}", checksum.expected())), "{mismatch}");
        }
        assert_eq!(Checksum::of_etag("W/whatever"), None);
    }
}
