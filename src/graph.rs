//! The graph: what the file asks for, with every name resolved and every edge checked.
//!
//! An operator is one stage of the file. Operators are partitioned into subgraphs, each of which runs in one process; an
//! edge between subgraphs is a handoff through the store. Outside loops every operator is a subgraph of its own; a loop is
//! one subgraph, and a training stage used alone is a loop with one stage. A subgraph that several variants share is one
//! node here.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::{PortType, Ports};
use indexmap::IndexMap;
use petgraph::graph::{DiGraph, NodeIndex};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::yaml::Source;

/// All that is to be run, for every selected cell.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Subgraphs and the handoffs between them. Free of cycles.
    pub subgraphs: DiGraph<Node, Handoff>,
    /// The selected cells, in the order asked for: one a variant, or one a cell of an ablation.
    pub cells: Vec<Cell>,
    /// The texts that places are in.
    pub sources: Vec<Arc<Source>>,
}

/// One selected combination of variant and settings, and what its stage names stand for.
#[derive(Clone, Debug)]
pub struct Cell {
    /// What a person calls it: `base`, `no-prompt`, `no-prompt params.seed=20`.
    pub label: String,
    /// The variant, `base` where none.
    pub variant: String,
    /// Settings of the ablation cell (path, value), without those it repeats over.
    pub over: Vec<(String, Json)>,
    /// Settings it is repeated over: cells that differ in these alone make one row of a report.
    pub repeat: Vec<(String, Json)>,
    /// Top-level names, in file order.
    pub names: IndexMap<String, NodeIndex>,
    /// The table at the end, if the file has one.
    pub report: Option<Report>,
}

/// One subgraph.
#[derive(Clone, Debug)]
pub struct Node {
    /// Name in the first cell that has it. Never in a key.
    pub name: String,
    /// What it does.
    pub subgraph: Subgraph,
    /// Where it is written.
    pub place: Place,
}

/// A place in a file, for messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The file as given.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
}

/// A value that crosses from one subgraph to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// Output of the subgraph it leaves: a port, or for a loop a carried name or `STAGE.metrics`.
    pub output: String,
    /// Entry of the subgraph it reaches: a port, or for a loop `windows.NAME`, `carry.NAME` or `STAGE.PORT`.
    pub input: String,
    /// What crosses.
    pub port_type: PortType,
}

/// What one process runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subgraph {
    /// One stage, once.
    Operator(Operator),
    /// Stages, round after round.
    Loop(Loop),
}

/// One stage with its configuration resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Operator {
    /// Stage kind.
    pub kind: String,
    /// `with`, checked, every default filled in.
    pub config: Json,
    /// Its ports under that configuration.
    pub ports: Ports,
    /// Where each value of `with` is written, by path with dots (`learning_rate`, `init.layers`); for messages and `why`.
    pub places: BTreeMap<String, Place>,
}

/// A loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loop {
    /// What enters by parts, in file order. Entry `windows.NAME` brings the whole dataset.
    pub windows: IndexMap<String, Window>,
    /// What one round hands to the next, in file order. Entry `carry.NAME` brings the first value, where it is connected;
    /// the loop's output `NAME` is the kept value.
    pub carry: IndexMap<String, Carry>,
    /// The stages in an order that respects their edges within a round, ties in file order.
    pub stages: IndexMap<String, BodyStage>,
    /// Cap on the rounds, or their number where no window has epochs.
    pub rounds: Option<u64>,
    /// Cut after every stage of every round instead of when it is time. Changes no result, so it is in no key.
    pub unroll: bool,
    /// Made from a training kind used alone. Then `stages` are `step` and, where a validation set is connected, `check`;
    /// outputs are shown as those of the stage itself. In no key.
    pub alone: bool,
}

/// How a dataset enters a loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Only the first so many rows.
    pub rows: Option<u64>,
    /// Rows a round.
    pub take: u64,
    /// Passes over the rows; at most one window has it, and it fixes the number of rounds.
    pub epochs: Option<u64>,
    /// Order of rows within an epoch.
    pub order: Order,
    /// Seed of a shuffled order.
    pub seed: u64,
    /// The last window of an epoch where the rows do not divide by `take`.
    pub last: Last,
    /// Where its fields are written; for messages.
    #[serde(skip)]
    pub places: BTreeMap<String, Place>,
}

/// Order of rows within an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// As in the dataset.
    Given,
    /// Drawn anew for every epoch.
    Shuffle,
}

/// What becomes of a last window with fewer rows than `take`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Last {
    /// Left out of the epoch.
    Drop,
    /// Used as it is.
    Short,
}

/// A carried value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Carry {
    /// Type of the value.
    pub port_type: PortType,
    /// What it is in the next round; also in the round that runs the stage only now and then (latest value so far).
    pub next: PortRef,
    /// Which round's value leaves the loop.
    pub keep: Keep,
}

/// Which round's value leaves the loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The last round's.
    Last,
    /// The best round's by a metric of a stage; the first wins a tie. Measured whenever that stage runs.
    Best {
        /// Stage of the loop.
        stage: String,
        /// Name in its metrics.
        metric: String,
        /// Which way is better.
        mode: Mode,
    },
    /// The same round as another carried value.
    With(String),
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Larger.
    Max,
    /// Smaller.
    Min,
}

/// A stage of a loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BodyStage {
    /// What it does.
    pub operator: Operator,
    /// When it runs.
    pub every: Every,
    /// Where each connected input comes from.
    pub inputs: IndexMap<String, Origin>,
}

/// When a stage of a loop runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Every {
    /// In every round.
    Round,
    /// After the last round of each epoch, and after the last round.
    Epoch,
    /// After every so many rounds, and after the last round.
    Rounds(u64),
}

/// Where an input of a loop's stage comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// From outside the loop, the same in every round: entry `STAGE.PORT`.
    Outside,
    /// This round's window.
    Window(String),
    /// The carried value as the round found it.
    Carry(String),
    /// An output of a stage that runs earlier in the round.
    Stage(PortRef),
}

/// An output of a stage of the loop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRef {
    /// Stage of the loop.
    pub stage: String,
    /// Its output port.
    pub port: String,
}

/// The table at the end of a run.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Report {
    /// Columns: heading and where the number is.
    pub metrics: IndexMap<String, MetricRef>,
    /// Variants to compare, a row each.
    pub compare: Vec<String>,
    /// The variant that the others are measured against, a row of differences each.
    pub baseline: Option<String>,
    /// Stages whose measured seconds are added up in a column of their own; empty: no such column.
    pub seconds: Vec<String>,
    /// Further rows: label, then heading and where the number is. For stages that all variants share.
    pub rows: IndexMap<String, IndexMap<String, MetricRef>>,
    /// A line below the table.
    pub caption: Option<String>,
}

/// A number that a stage measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricRef {
    /// Top-level stage.
    pub stage: String,
    /// Name in its metrics.
    pub metric: String,
}
