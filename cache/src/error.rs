//! What can go wrong in the store. Damage to a cached result is no error where it can be a miss instead.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

/// Result of a store operation.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why an operation on the store could not be done.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // each field is named in the message
pub enum StoreError {
    /// The file system refused: disk full, no permission, unreadable.
    #[error("cannot {operation} `{}`", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },

    /// Bytes of an artifact are not those that were published. The next lookup is a miss.
    #[error("`{file}` is damaged in the store ({reason}); run again to compute it anew")]
    Corrupt { artifact: crate::Digest, file: String, reason: String },

    /// A link, socket or device where a plain file or folder is needed.
    #[error("`{}` is neither a plain file nor a folder; put a copy of the file there", path.display())]
    NotPlain { path: PathBuf },

    /// Digests are over names in UTF-8.
    #[error("the name of `{}` is not UTF-8; rename it", path.display())]
    Name { path: PathBuf },

    /// Somebody wrote to a file between its first and its last byte.
    #[error("`{}` changed while it was hashed; run again when nothing writes to it", path.display())]
    Changed { path: PathBuf },

    /// A promised output is not there.
    #[error("output `{port}` was not written: expected a folder `{}`", path.display())]
    NoOutput { port: String, path: PathBuf },

    /// A port's name is the name of a folder.
    #[error("`{port}` cannot name an output; expected letters, digits, `-`, `_` or `.`, not starting with `.`")]
    Port { port: String },

    /// A name is the name of a file.
    #[error("`{name}` is no name for a result; expected letters, digits, `-`, `_` or `.`, not starting with `.`")]
    NoName { name: String },

    /// What is wanted would take away what others work with.
    #[error("somebody works with the store `{}`; try again when they are done", path.display())]
    InUse { path: PathBuf },

    /// The store was written by another version of this program.
    #[error("store `{}` has format `{found}`, expected `{expected}`; choose another folder", path.display())]
    Format { path: PathBuf, found: String, expected: &'static str },

    /// Who asked for it wants it no more.
    #[error("stopped as asked")]
    Stopped,

    /// The caller's own writer of a checkpoint failed.
    #[error("cannot write the checkpoint of round {round}")]
    Cut { round: u64, source: Box<dyn Error + Send + Sync> },
}

impl StoreError {
    /// Whether the file system is to blame (disk full, permissions, a failing disk), and not the caller or a stage.
    pub fn is_io(&self) -> bool {
        let mut cause: Option<&(dyn Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if error.is::<io::Error>() {
                return true;
            }
            cause = error.source();
        }
        false
    }

    /// Whether a change was refused since nothing may be changed there: by permissions, or on the whole file system.
    pub fn is_read_only(&self) -> bool {
        let refused = [io::ErrorKind::ReadOnlyFilesystem, io::ErrorKind::PermissionDenied];
        matches!(self, StoreError::Io { source, .. } if refused.contains(&source.kind()))
    }

    /// What a failure to read a file of the store says about it, if it means that the file is not as it was written: gone, of
    /// another kind, or lost by the disk. Anything else, such as too many open files, says nothing about the file.
    pub(crate) fn into_damage(self) -> Result<String> {
        const LOST_BY_THE_DISK: i32 = rustix::io::Errno::IO.raw_os_error();
        match self {
            StoreError::NotPlain { .. } | StoreError::Name { .. } => Ok(self.to_string()),
            StoreError::Io { ref source, .. } => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok("a part of it is missing".into()),
                io::ErrorKind::IsADirectory => Ok("expected a plain file, got a folder".into()),
                _ if source.raw_os_error() == Some(LOST_BY_THE_DISK) => Ok(source.to_string()),
                _ => Err(self),
            },
            _ => Err(self),
        }
    }

    /// For `map_err`: `operation` is a verb that reads well before a path.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
        move |source| StoreError::Io { operation, path: path.to_path_buf(), source }
    }
}
