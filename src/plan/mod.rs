//! Decisions: what is to be done about each subgraph, as values. `run` acts on them, each in its turn; `plan` shows
//! them in steps, as far as they can be made before anything runs.
//!
//! Nothing here prints, runs or writes to the store but what it remembers of files already hashed.

pub(crate) mod content;
pub(crate) mod foresee;
pub(crate) mod history;
pub mod key;
pub(crate) mod names;
mod preimage;
pub(crate) mod results;
pub(crate) mod selection;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

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

/// A subgraph whose result is in the store. Cheap to clone: plans and runs hand it around.
#[derive(Clone, Debug)]
pub struct Settled {
    /// What was run.
    pub action: Arc<Action>,
    /// Its result.
    pub record: Arc<Record>,
}

impl Settled {
    /// What an action gave.
    pub(crate) fn new(action: Action, record: Record) -> Self {
        Settled { action: Arc::new(action), record: Arc::new(record) }
    }

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

    /// Where it was, of a result that nobody made here.
    pub fn imported_from(&self) -> Option<String> {
        let paths = self.record.info.get("imported")?.as_array()?.iter().filter_map(|path| path.as_str());
        Some(paths.collect::<Vec<_>>().join(", "))
    }

    /// Seconds it took when it was made, over all attempts.
    pub fn seconds(&self) -> Option<f64> {
        self.record.info.get("seconds")?.as_f64()
    }

    /// When it was made, in seconds since 1970; earlier programs did not say.
    pub fn ended(&self) -> Option<f64> {
        self.record.info.get("ended")?.as_f64()
    }
}

/// What is to be done about a subgraph whose inputs are known.
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
    /// Its result is there, and it is to be made again.
    Again {
        /// What to run.
        action: Action,
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
}

/// Why a stage runs that has a result.
pub(crate) const FORCED: &str = "asked for with `--force`";

impl Decision {
    /// The same for a stage that is to run although it has a result.
    pub(crate) fn again_if(self, forced: bool) -> Self {
        match self {
            Decision::Cached(Settled { action, .. }) if forced => {
                Decision::Again { action: Arc::unwrap_or_clone(action) }
            }
            other => other,
        }
    }

    /// What it is about.
    pub fn action(&self) -> &Action {
        match self {
            Decision::Cached(settled) => &settled.action,
            Decision::Run { action, .. } | Decision::Again { action } | Decision::Resume { action, .. } => action,
        }
    }
}

/// How far a plan comes with one subgraph before anything runs.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one a subgraph, and most are decided")]
pub enum Step {
    /// All the way.
    Decided(Decision),
    /// Its key is not known before these have run.
    Waits {
        /// Subgraphs without a result.
        on: Vec<NodeIndex>,
    },
    /// It cannot run: what it depends on cannot be told.
    Impossible {
        /// Why.
        error: String,
    },
}

impl Step {
    /// What was decided, if anything could be.
    pub fn decision(&self) -> Option<&Decision> {
        match self {
            Step::Decided(decision) => Some(decision),
            Step::Waits { .. } | Step::Impossible { .. } => None,
        }
    }

    /// The result, if it is there.
    pub fn settled(&self) -> Option<&Settled> {
        match self.decision()? {
            Decision::Cached(settled) => Some(settled),
            Decision::Run { .. } | Decision::Again { .. } | Decision::Resume { .. } => None,
        }
    }
}

/// A step for every selected subgraph, in their order.
pub struct Plan {
    /// Steps.
    pub steps: Vec<(NodeIndex, Step)>,
}

impl Plan {
    /// Whether anything has to run.
    pub fn has_work(&self) -> bool {
        self.steps.iter().any(|(_, step)| step.settled().is_none())
    }

    /// What is settled, by subgraph.
    pub fn settled(&self) -> BTreeMap<NodeIndex, Settled> {
        self.steps.iter().filter_map(|(node, step)| Some((*node, step.settled()?.clone()))).collect()
    }
}

/// Decides for every selected subgraph as far as can be known without running any.
pub fn plan(graph: &Graph, selection: &Selection, registry: &Registry, store: &Store) -> Result<Plan> {
    let mut settled = BTreeMap::new();
    let mut steps = Vec::with_capacity(selection.order.len());
    for &node in &selection.order {
        let step = match inputs(graph, node, &settled) {
            Err(on) => Step::Waits { on },
            Ok(inputs) => match decide(&graph.subgraphs[node], &inputs, registry, store) {
                Ok(decision) => Step::Decided(decision.again_if(selection.forced.contains(&node))),
                Err(error) if is_store_trouble(&error) => return Err(error),
                Err(error) => Step::Impossible { error: format!("{error:#}") },
            },
        };
        if let Some(decision) = step.decision()
            && let Some(known) = known_result(decision, store)?
        {
            settled.insert(node, known);
        }
        steps.push((node, step));
    }
    Ok(Plan { steps })
}

/// The result by which keys below can be told. Files that are damaged or gone do not take with them what was made from
/// them.
fn known_result(decision: &Decision, store: &Store) -> Result<Option<Settled>> {
    match decision {
        Decision::Cached(settled) => Ok(Some(settled.clone())),
        Decision::Run { action, why: Why::ArtifactMissing { .. } | Why::ArtifactCorrupt { .. } } => {
            let record = store.record(&action.key)?;
            Ok(record.map(|record| Settled::new(action.clone(), record)))
        }
        Decision::Run { .. } | Decision::Again { .. } | Decision::Resume { .. } => Ok(None),
    }
}

/// Decides about one subgraph whose inputs are known.
///
/// Errors when its key cannot be computed, for example since a local file is missing, or when the store fails.
pub fn decide(node: &Node, inputs: &InputDigests, registry: &Registry, store: &Store) -> Result<Decision> {
    let action = action_of(node, inputs, registry, store)
        .with_context(|| format!("cannot tell what stage `{}` depends on", node.name))?;
    match store.lookup(&action.key)? {
        Lookup::Hit(record) => Ok(Decision::Cached(Settled::new(action, record))),
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

/// What a subgraph does with these inputs.
///
/// Errors when its key cannot be computed.
pub(crate) fn action_of(node: &Node, inputs: &InputDigests, registry: &Registry, store: &Store) -> Result<Action> {
    let mut content = |source: &Source| content::of(source, store);
    key::action(&node.subgraph, inputs, registry, &mut content)
}

/// What is known of what enters a subgraph, and by which entries something else will.
pub(crate) fn known_inputs(
    graph: &Graph,
    node: NodeIndex,
    settled: &BTreeMap<NodeIndex, Settled>,
) -> (InputDigests, Vec<String>) {
    let (mut inputs, mut missing) = (BTreeMap::new(), Vec::new());
    for edge in graph.subgraphs.edges_directed(node, Direction::Incoming) {
        let input = &edge.weight().input;
        match settled.get(&edge.source()).and_then(|before| before.artifact(&edge.weight().output)) {
            Some(artifact) => drop(inputs.insert(input.clone(), artifact.clone())),
            None => missing.push(input.to_string()),
        }
    }
    missing.sort_unstable();
    (inputs, missing)
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
