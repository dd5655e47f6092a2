//! What `pipeline score` asks of the stages.

use std::path::PathBuf;

/// Two files to compare, and how.
#[derive(Clone, Debug, Default)]
pub struct Scoring {
    /// Rows with `text`.
    pub predictions: PathBuf,
    /// Rows with right answers.
    pub references: PathBuf,
    /// Pair the first with the first, whatever their ids.
    pub by_line: bool,
    /// Compare words of any script, not of ASCII alone.
    pub unicode: bool,
}
