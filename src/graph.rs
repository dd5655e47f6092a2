//! The graph: what the file asks for, with every name resolved and every edge checked.
//!
//! An operator is one stage of the file. Operators are partitioned into subgraphs, each of which runs in one process; an
//! edge between subgraphs is a handoff through the store. Outside loops every operator is a subgraph of its own; a loop is
//! one subgraph, and a training stage used alone is a loop with one stage. A subgraph that several variants share is one
//! node here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use contract::{PortType, Ports};
use indexmap::IndexMap;
use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::ground::source::{Place, Source};

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

/// A value that crosses from one subgraph to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// Where it leaves a subgraph.
    pub output: Exit,
    /// Where it enters another.
    pub input: Entry,
    /// What crosses.
    pub port_type: PortType,
}

/// Where a value enters a subgraph.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum Entry {
    /// An input of the only stage.
    Port(String),
    /// The dataset that a window cuts up: `windows.NAME`.
    Window(String),
    /// The first value of what is carried: `carry.NAME`.
    Carry(String),
    /// An input of a stage of the loop, the same in every round: `STAGE.PORT`.
    Outside(PortRef),
}

/// Where a value leaves a subgraph.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// An output of the only stage.
    Port(String),
    /// The kept one of the carried values of that name.
    Kept(String),
    /// What a stage of the loop measured, row by row: `STAGE.metrics`.
    Metrics(String),
}

impl Entry {
    /// An input of a stage of a loop.
    pub fn outside(stage: &str, port: &str) -> Self {
        Entry::Outside(PortRef { stage: stage.to_owned(), port: port.to_owned() })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Entry::Port(port) => f.write_str(port),
            Entry::Window(name) => write!(f, "windows.{name}"),
            Entry::Carry(name) => write!(f, "carry.{name}"),
            Entry::Outside(PortRef { stage, port }) => write!(f, "{stage}.{port}"),
        }
    }
}

impl From<Entry> for String {
    fn from(entry: Entry) -> Self {
        entry.to_string()
    }
}

impl From<String> for Entry {
    fn from(text: String) -> Self {
        match text.split_once('.') {
            None => Entry::Port(text),
            Some(("windows", name)) => Entry::Window(name.to_owned()),
            Some(("carry", name)) => Entry::Carry(name.to_owned()),
            Some((stage, port)) => Entry::outside(stage, port),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Port(name) | Exit::Kept(name) => f.write_str(name),
            Exit::Metrics(stage) => write!(f, "{stage}.metrics"),
        }
    }
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

impl Subgraph {
    /// The loop, where the file writes one: a training stage used alone is shown as the stage that it is.
    pub fn written_loop(&self) -> Option<&Loop> {
        match self {
            Subgraph::Loop(body) if !body.alone => Some(body),
            Subgraph::Loop(_) | Subgraph::Operator(_) => None,
        }
    }

    /// The stages in it.
    pub(crate) fn operators(&self) -> Vec<&Operator> {
        match self {
            Subgraph::Operator(operator) => vec![operator],
            Subgraph::Loop(body) => body.stages.values().map(|stage| &stage.operator).collect(),
        }
    }

    /// The same, in the same order, to be changed.
    pub(crate) fn operators_mut(&mut self) -> Vec<&mut Operator> {
        match self {
            Subgraph::Operator(operator) => vec![operator],
            Subgraph::Loop(body) => body.stages.values_mut().map(|stage| &mut stage.operator).collect(),
        }
    }
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
    /// What enters by parts, in file order. [`Entry::Window`] brings the whole dataset.
    pub windows: IndexMap<String, Window>,
    /// What one round hands to the next, in file order. [`Entry::Carry`] brings the first value, where it is connected;
    /// [`Exit::Kept`] is the kept one.
    pub carry: IndexMap<String, Carry>,
    /// The stages in an order that respects their edges within a round, ties in file order.
    pub stages: IndexMap<String, BodyStage>,
    /// Cap on the rounds, or their number where no window has epochs.
    pub rounds: Option<u64>,
    /// Cut after every stage of every round instead of when it is time. Changes no result, so it is in no key.
    pub unroll: bool,
    /// Made from a training kind used alone: the first of `stages`, whose outputs are shown as those of the loop. In no key.
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
    /// From outside the loop, the same in every round: [`Entry::Outside`].
    Outside,
    /// This round's window.
    Window(String),
    /// The carried value as the round found it.
    Carry(String),
    /// An output of a stage that runs earlier in the round.
    Stage(PortRef),
}

/// An output of a stage of the loop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// The heading whose correlation with all others over the cells is told.
    pub correlate: Option<String>,
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

/// Topological order, and within it as close to the file as the handoffs allow.
pub(crate) fn in_order<N, E>(graph: &DiGraph<N, E>) -> Vec<NodeIndex> {
    let neighbours = |node, direction| -> BTreeSet<NodeIndex> { graph.neighbors_directed(node, direction).collect() };
    let mut needs: BTreeMap<NodeIndex, usize> = BTreeMap::new();
    for node in graph.node_indices() {
        needs.insert(node, neighbours(node, Direction::Incoming).len());
    }
    let ready = needs.iter().filter(|(_, needs)| **needs == 0).map(|(node, _)| *node);
    let mut ready: BTreeSet<NodeIndex> = ready.collect();
    let mut order = Vec::with_capacity(needs.len());
    while let Some(next) = ready.pop_first() {
        for node in neighbours(next, Direction::Outgoing) {
            if let Some(left) = needs.get_mut(&node) {
                *left -= 1;
                if *left == 0 {
                    ready.insert(node);
                }
            }
        }
        order.push(next);
    }
    assert!(order.len() == needs.len(), "a graph is free of cycles");
    order
}
