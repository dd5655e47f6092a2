//! Digests of bytes, files and trees.

use std::fs::File;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};

/// Gives a 32-byte hash its text form: 64 lower-case hexadecimal digits in `Display`, `FromStr` and serde.
macro_rules! hexadecimal {
    ($name:ident) => {
        impl $name {
            /// From its 32 bytes.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// Its 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first 12 digits, for people.
            pub fn short(&self) -> String {
                self.to_string()[..12].to_string()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::digest::NotHexadecimal;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let lower_case = text.bytes().all(|digit| !digit.is_ascii_uppercase());
                match blake3::Hash::from_hex(text) {
                    Ok(hash) if lower_case => Ok(Self(*hash.as_bytes())),
                    _ => Err($crate::digest::NotHexadecimal(text.into())),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use hexadecimal;

/// The BLAKE3 hash of some bytes, or of a tree of files ([`Digest::of_tree`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

hexadecimal!(Digest);

/// A text that should have been a digest or a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected 64 lower-case hexadecimal digits, got `{0}`")]
pub struct NotHexadecimal(pub(crate) String);

/// One file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Path inside the artifact, parts joined by `/`.
    pub path: String,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub bytes: u64,
}

impl Digest {
    /// Of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Of a folder: over the path, length and digest of each file, in the order of `files`, which must be that of the
    /// paths' bytes. Empty folders, modes and times do not count.
    pub fn of_tree(files: &[FileEntry]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"pipeline-tree-v1");
        for file in files {
            hasher.update(&(file.path.len() as u64).to_le_bytes()); // no two lists give the same bytes
            hasher.update(file.path.as_bytes());
            hasher.update(&file.bytes.to_le_bytes());
            hasher.update(&file.digest.0);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Reads an open file to its end. Returns the digest and how many bytes there were.
///
/// The file is read, not mapped: somebody who truncates a mapped file kills the process that reads it.
pub(crate) fn of_file(file: &File) -> io::Result<(Digest, u64)> {
    of_stream(file, |_| Ok(()), |error| error)
}

/// As [`of_file`], and hands on every piece that was read. `failed` says what an error of reading means to the caller.
pub(crate) fn of_stream<E>(
    mut file: &File,
    mut each: impl FnMut(&[u8]) -> Result<(), E>,
    failed: impl Fn(io::Error) -> E,
) -> Result<(Digest, u64), E> {
    const BUFFER: u64 = 4 << 20;
    const WORTH_SHARING: usize = 256 << 10; // below it, threads cost more than they save
    let mut hasher = blake3::Hasher::new();
    let length = file.metadata().map_err(&failed)?.len();
    let mut buffer = vec![0; (length + 1).min(BUFFER) as usize];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok((Digest(*hasher.finalize().as_bytes()), hasher.count())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        each(&buffer[..read])?;
        match read {
            WORTH_SHARING.. => hasher.update_rayon(&buffer[..read]),
            _ => hasher.update(&buffer[..read]),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, content: &[u8]) -> FileEntry {
        FileEntry { path: path.into(), digest: Digest::of(content), bytes: content.len() as u64 }
    }

    #[test]
    fn text_form_is_64_digits_and_reads_back() {
        // BLAKE3 of no bytes, from the algorithm's published test vectors.
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(empty.parse(), Ok(Digest::of(b"")));
        assert_eq!(serde_json::to_string(&Digest::of(b"")).unwrap(), format!("\"{empty}\""));
        assert_eq!(serde_json::from_str::<Digest>(&format!("\"{empty}\"")).unwrap(), Digest::of(b""));
        assert_eq!(Digest::of(b"").short(), "af1349b9f5f9");
    }

    #[test]
    fn other_texts_are_refused() {
        let upper = Digest::of(b"").to_string().to_uppercase();
        for text in ["", "af13", upper.as_str(), &"g".repeat(64), &"a".repeat(65)] {
            let error = text.parse::<Digest>().unwrap_err().to_string();
            assert_eq!(error, format!("expected 64 lower-case hexadecimal digits, got `{text}`"));
        }
    }

    #[test]
    fn a_file_has_the_digest_of_its_bytes_whatever_its_size() {
        let folder = tempfile::tempdir().unwrap();
        for length in [0, 1, 1000, 300_000, (4 << 20) - 1, 4 << 20, (9 << 20) + 3] {
            let bytes: Vec<u8> = (0..length).map(|index: usize| (index * 31 % 251) as u8).collect();
            let path = folder.path().join("file");
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(of_file(&File::open(&path).unwrap()).unwrap(), (Digest::of(&bytes), length as u64));
        }
    }

    #[test]
    fn a_tree_changes_with_names_and_bytes_and_borders() {
        let trees = [
            vec![],
            vec![entry("a", b"1")],
            vec![entry("b", b"1")],
            vec![entry("a", b"2")],
            vec![entry("a", b"1"), entry("b", b"")],
            vec![entry("a/b", b"1")],
        ];
        for (index, left) in trees.iter().enumerate() {
            for right in &trees[..index] {
                assert_ne!(Digest::of_tree(left), Digest::of_tree(right), "{left:?} and {right:?}");
            }
        }
    }
}
