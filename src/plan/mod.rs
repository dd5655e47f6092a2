//! Decisions: what is to be done about each subgraph, as values. `plan` shows them and `run` acts on them.
//!
//! Nothing here prints, runs or writes to the store but what it remembers of files already hashed.

pub(crate) mod foresee;
pub(crate) mod history;
pub mod key;
mod preimage;
pub(crate) mod results;
pub(crate) mod selection;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use cache::{Artifact, Lookup, Record, Store, Why};
use contract::{Registry, Source};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;

use crate::graph::{Exit, Graph, Node};
use crate::ground::trouble::is_store_trouble;
use crate::plan::key::{Action, InputDigests};
use crate::plan::selection::Selection;
use crate::rounds;

/// A subgraph whose result is in the store.
#[derive(Clone, Debug)]
pub struct Settled {
    /// What was run.
    pub action: Action,
    /// Its result.
    pub record: Record,
}

impl Settled {
    /// The artifact of an output.
    pub fn artifact(&self, output: &Exit) -> Option<&Artifact> {
        self.outputs().remove(output)
    }

    /// Every output. A stage outside of loops may have rows of metrics without a port for them.
    pub fn outputs(&self) -> BTreeMap<Exit, &Artifact> {
        let exits: BTreeMap<String, Exit> =
            key::outputs(&self.action.subgraph).into_iter().map(|(exit, stored)| (stored, exit)).collect();
        let exit = |stored: &String| exits.get(stored).cloned().unwrap_or_else(|| Exit::Port(stored.clone()));
        self.record.outputs.iter().map(|(stored, artifact)| (exit(stored), artifact)).collect()
    }

    /// Seconds it took when it was made, over all attempts.
    pub fn seconds(&self) -> Option<f64> {
        self.record.info.get("seconds")?.as_f64()
    }
}

/// What is to be done about one subgraph.
#[derive(Clone, Debug)]
pub enum Decision {
    /// Its result is there.
    Cached(Settled),
    /// It has to run, from the beginning.
    Run {
        /// What to run.
        action: Action,
        /// Why there is no result.
        why: Why,
    },
    /// It has to run, and a cut says where to go on.
    Resume {
        /// What to run.
        action: Action,
        /// Rounds done.
        round: u64,
        /// Rounds it has.
        rounds: u64,
    },
    /// It cannot run: what it depends on cannot be told.
    Impossible {
        /// Why.
        error: String,
    },
    /// Its key is not known before these have run.
    DependsOnResult {
        /// Subgraphs without a result.
        on: Vec<NodeIndex>,
    },
}

/// A decision for every selected subgraph, in their order.
pub struct Plan {
    /// Decisions.
    pub steps: Vec<(NodeIndex, Decision)>,
}

impl Plan {
    /// Whether anything has to run.
    pub fn has_work(&self) -> bool {
        self.steps.iter().any(|(_, decision)| !matches!(decision, Decision::Cached(_)))
    }

    /// What is settled, by subgraph.
    pub fn settled(&self) -> BTreeMap<NodeIndex, Settled> {
        let settled = self.steps.iter().filter_map(|(node, decision)| match decision {
            Decision::Cached(settled) => Some((*node, settled.clone())),
            _ => None,
        });
        settled.collect()
    }
}

/// Decides for every selected subgraph as far as can be known without running any.
pub fn plan(graph: &Graph, selection: &Selection, registry: &Registry, store: &Store) -> Result<Plan> {
    let mut settled = BTreeMap::new();
    let mut steps = Vec::with_capacity(selection.order.len());
    for &node in &selection.order {
        let decision = match inputs(graph, node, &settled) {
            Err(on) => Decision::DependsOnResult { on },
            Ok(inputs) => match decide(&graph.subgraphs[node], &inputs, registry, store) {
                Ok(decision) => decision,
                Err(error) if is_store_trouble(&error) => return Err(error),
                Err(error) => Decision::Impossible { error: format!("{error:#}") },
            },
        };
        match &decision {
            Decision::Cached(found) => drop(settled.insert(node, found.clone())),
            // Files that are damaged or gone do not take with them what was made from them.
            Decision::Run { action, why: Why::ArtifactMissing { .. } | Why::ArtifactCorrupt { .. } } => {
                if let Some(record) = store.record(&action.key)? {
                    settled.insert(node, Settled { action: action.clone(), record });
                }
            }
            _ => {}
        }
        steps.push((node, decision));
    }
    Ok(Plan { steps })
}

/// Decides about one subgraph whose inputs are known.
///
/// Errors when its key cannot be computed, for example since a local file is missing, or when the store fails.
pub fn decide(node: &Node, inputs: &InputDigests, registry: &Registry, store: &Store) -> Result<Decision> {
    let mut digest = |source: &Source| Ok(store.digest_files(&source.path, &|name| source.takes(name))?);
    let action = key::action(&node.subgraph, inputs, registry, &mut digest)
        .with_context(|| format!("cannot tell what stage `{}` depends on", node.name))?;
    match store.lookup(&action.key)? {
        Lookup::Hit(record) => Ok(Decision::Cached(Settled { action, record })),
        Lookup::Miss(why) => Ok(match store.cut_standing(&action.key)? {
            // A cut that cannot be read is no cut.
            Some(cut) => match rounds::standing(&cut.path) {
                Ok(standing) => Decision::Resume { action, round: standing.round, rounds: standing.rounds },
                Err(_) => Decision::Run { action, why },
            },
            None => Decision::Run { action, why },
        }),
    }
}

/// What enters a subgraph, by entry; or the subgraphs whose results are missing.
pub fn inputs(
    graph: &Graph,
    node: NodeIndex,
    settled: &BTreeMap<NodeIndex, Settled>,
) -> Result<InputDigests, Vec<NodeIndex>> {
    let mut inputs = BTreeMap::new();
    let mut missing = BTreeSet::new();
    for edge in graph.subgraphs.edges_directed(node, Direction::Incoming) {
        let artifact = settled.get(&edge.source()).and_then(|before| before.artifact(&edge.weight().output));
        match artifact {
            Some(artifact) => drop(inputs.insert(edge.weight().input.clone(), artifact.clone())),
            None => drop(missing.insert(edge.source())),
        }
    }
    if missing.is_empty() { Ok(inputs) } else { Err(missing.into_iter().collect()) }
}
