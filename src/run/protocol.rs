//! What the runner and its workers say to each other: orders to the worker, and messages and an outcome from it, as
//! JSON lines.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cache::{Digest, Key};
use contract::{Facts, PortType, Source};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::graph::{Entry, Subgraph};
use crate::ground::trouble::Fault;
use crate::plan::key::SourcePart;

/// To the worker.
#[derive(Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub(crate) enum Order {
    /// The first line.
    Run(Box<Job>),
    /// Keep a cut and stop.
    Stop,
}

/// One subgraph to run.
#[derive(Serialize, Deserialize)]
pub(crate) struct Job {
    /// In canonical order, see [`crate::plan::key`].
    pub(crate) subgraph: Subgraph,
    /// Files outside of the pipeline that its stages name, with what the key says they hold.
    pub(crate) sources: Vec<(Source, SourcePart)>,
    /// Content that enters, by entry.
    pub(crate) inputs: BTreeMap<Entry, Input>,
    /// Folder `outputs/NAME` of each output, named as in the store, is made here.
    pub(crate) work: PathBuf,
    /// The store, for cuts.
    pub(crate) store: PathBuf,
    /// Key of the subgraph.
    pub(crate) key: Key,
    /// `cpu` or `cuda:N`: to an executor a card of its place, to the worker a card that it sees.
    pub(crate) device: String,
    /// Threads it may use.
    pub(crate) threads: usize,
    /// Seconds between two cuts.
    pub(crate) cut_seconds: f64,
}

/// An artifact to read.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Input {
    pub(crate) path: PathBuf,
    pub(crate) port_type: PortType,
    pub(crate) digest: Digest,
}

/// From the worker.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    /// While it works.
    Message(Message),
    /// The last one.
    Outcome(Outcome),
}

/// What a worker says while it works. `part` is the stage within a loop.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub(crate) enum Message {
    /// It goes on from a cut.
    Resumed { round: u64, rounds: u64 },
    /// So far, in `unit`s.
    Progress { part: Option<String>, done: u64, total: u64, unit: String },
    /// A row of metrics. Not all of them: rows that come fast are thinned out, for the artifact has them all.
    Metrics { part: Option<String>, row: Map<String, Json> },
    /// Something that may be wrong, for the user.
    Warned { part: Option<String>, text: String },
    /// Something worth knowing, for the user.
    Noted { part: Option<String>, text: String },
    /// A cut was kept.
    Cut { round: u64, rounds: u64 },
}

/// How a job ended, in the worker's words.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Outputs are written, with name in the store and type. Seconds are those of all attempts.
    Done {
        outputs: Vec<(String, PortType)>,
        /// What is known of them, by name.
        facts: BTreeMap<String, Facts>,
        seconds: f64,
        rounds: Option<u64>,
    },
    /// It went wrong.
    Failed { fault: Fault, text: String },
    /// A local file no longer holds what the key says, so that nothing was begun.
    Changed { source: PathBuf },
    /// It stopped because it was told to. It goes on from the newest cut, if there is one.
    Stopped,
}

impl Message {
    /// The same with other words for people.
    pub(crate) fn map_text(self, map: impl Fn(String) -> String) -> Self {
        match self {
            Message::Warned { part, text } => Message::Warned { part, text: map(text) },
            Message::Noted { part, text } => Message::Noted { part, text: map(text) },
            other => other,
        }
    }
}

impl Outcome {
    /// The same with other words for people.
    pub(crate) fn map_text(self, map: impl Fn(String) -> String) -> Self {
        match self {
            Outcome::Failed { fault, text } => Outcome::Failed { fault, text: map(text) },
            other => other,
        }
    }
}

/// Set by the coordinator to its own process id, so that a worker started an instant too late notices.
pub(crate) const PARENT: &str = "PIPELINE_PARENT";

/// What to do about a bug.
pub(crate) const REPORT: &str =
    "this is a bug in the program or in a library under it; please report it to its maintainers with the stage's log";
