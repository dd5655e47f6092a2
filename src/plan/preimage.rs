//! A preimage: everything that can change the result of a subgraph, a field each. [`key`](super::key) makes it.
//!
//! Its JSON is hashed into the key and kept in the store, so names and forms of fields are those of every key there is.
//! A new field is left out at the value that results had without it; then no key changes.
//!
//! Parts of a loop are called by their places in its canonical order: windows `w0`, `w1`, carried values `c0`, stages
//! `s0`. An output of a stage is `s0.model`.

use cache::{Artifact, Digest};
use contract::PortType;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::graph::{Every, Last, Mode, Order};

/// All that can change the result of a subgraph.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Preimage {
    /// Of a stage outside of loops.
    Stage(StagePart),
    /// Of a loop.
    Loop(LoopPart),
}

/// A loop.
#[derive(Serialize)]
pub(crate) struct LoopPart {
    /// Datasets that enter by parts, by place.
    pub(crate) windows: IndexMap<String, WindowPart>,
    /// What one round hands to the next, by place.
    pub(crate) carry: IndexMap<String, CarryPart>,
    /// Cap on the rounds, or their number where no window has epochs.
    pub(crate) rounds: Option<u64>,
    /// The stages, by place.
    pub(crate) stages: IndexMap<String, StagePart>,
}

/// A window.
#[derive(Serialize)]
pub(crate) struct WindowPart {
    /// How it cuts the dataset up.
    #[serde(flatten)]
    pub(crate) slices: SlicesPart,
    /// The dataset.
    pub(crate) from: Option<ContentPart>,
}

/// How a window cuts a dataset up.
#[derive(Serialize)]
pub(crate) struct SlicesPart {
    /// Only the first so many rows.
    pub(crate) rows: Option<u64>,
    /// Rows a round.
    pub(crate) take: u64,
    /// Passes over the rows.
    pub(crate) epochs: Option<u64>,
    /// Order of rows within an epoch.
    pub(crate) order: Order,
    /// Seed of a shuffled order. Left out of a given one: nothing is drawn, so it changes nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    /// The last window of an epoch where the rows do not divide by `take`.
    pub(crate) last: Last,
}

/// A carried value.
#[derive(Serialize)]
pub(crate) struct CarryPart {
    /// Type of the value.
    #[serde(rename = "type")]
    pub(crate) port_type: PortType,
    /// Its first value, where one is connected.
    pub(crate) from: Option<ContentPart>,
    /// The output that it is in the next round.
    pub(crate) next: String,
    /// Which round's value leaves the loop.
    pub(crate) keep: KeepPart,
}

/// Which round's value leaves the loop.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum KeepPart {
    /// The last round's.
    Last,
    /// The same round as this carried value.
    With(String),
    /// The best round's.
    #[serde(untagged)]
    Best {
        /// What is measured, as an output of a stage: `s3.score`.
        best: String,
        /// Which way is better.
        mode: Mode,
    },
}

/// A stage, outside of loops or in one.
#[derive(Serialize)]
pub(crate) struct StagePart {
    /// What it does.
    #[serde(flatten)]
    pub(crate) operator: OperatorPart,
    /// When it runs in a loop. Left out outside of loops, where it runs once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) every: Option<Every>,
    /// What it reads, by port.
    pub(crate) inputs: IndexMap<String, ReadPart>,
}

/// What a stage does.
#[derive(Serialize)]
pub(crate) struct OperatorPart {
    /// Its kind.
    pub(crate) kind: &'static str,
    /// Version of what the kind makes of the same inputs and configuration.
    pub(crate) version: u32,
    /// Version of the numerics behind the result; left out where there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) numerics: Option<u32>,
    /// Whether it reads the clock of the loop; left out where it does not.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) clock: bool,
    /// `with`, without values at their default and fields that change no result. A file outside of the pipeline
    /// stands there as [`SourcePart`].
    pub(crate) config: Json,
}

/// A file or folder outside of the pipeline, by what it holds, in the place of where it is. Neither path, address, host nor
/// the name of a branch is in it; which files of a repository are read follows from the kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SourcePart {
    /// A local one, or one of the web that is named by the same hash.
    Content {
        /// Digest of its bytes; of a folder, of the files that are read.
        content: Digest,
    },
    /// On the Hugging Face hub.
    Hub {
        /// `OWNER/NAME` of a model, `datasets/OWNER/NAME` of a data set.
        hub: String,
        /// The commit.
        commit: String,
        /// The file or folder in it; left out where it is the whole.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        path: String,
    },
    /// Of the web, named by another hash.
    Sha256 {
        /// SHA-256 of its bytes.
        sha256: String,
    },
}

/// What an input of a stage reads.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum ReadPart {
    /// The same in every round: it came in from outside. Nothing where nothing is connected.
    Content(Option<ContentPart>),
    /// A place of the loop.
    Held(String),
}

/// An artifact that enters.
#[derive(Serialize)]
pub(crate) struct ContentPart {
    /// Its type.
    #[serde(rename = "type")]
    pub(crate) port_type: String,
    /// Digest of its files.
    pub(crate) digest: Digest,
}

impl ContentPart {
    /// Of an artifact.
    pub(crate) fn of(artifact: &Artifact) -> Self {
        ContentPart { port_type: artifact.port_type.clone(), digest: artifact.digest }
    }
}
