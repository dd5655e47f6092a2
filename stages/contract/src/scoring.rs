//! What `pipeline score` asks of the stages.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// Which number of an answer is its final one.
    pub extraction: Extraction,
}

/// Which number of a worked answer is its final one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Extraction {
    /// That behind `####`, with which the answers of GSM8K end.
    Strict,
    /// The last number, wherever it is.
    Flexible,
    /// As `strict`; where there is none, as `flexible`.
    #[default]
    Gsm8k,
    /// As the published program for response priming: `\boxed{18}`, the only number of the first line, the number behind
    /// `the final answer is`, the last number. It sees no signs.
    Published,
}
