//! What names in the store stand for, and stages whose key is to stay as it is.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Result, anyhow};
use cache::{Key, Named, Store};
use petgraph::graph::NodeIndex;
use serde::{Deserialize, Serialize};

use crate::graph::Graph;
use crate::plan::Plan;
use crate::plan::history::{Pipeline, changes_since};
use crate::plan::key::Action;
use crate::plan::selection::Selection;

/// The stage that a named result is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Of {
    /// The pipeline file as it was given.
    pub(crate) pipeline: String,
    /// Where it was.
    pub(crate) path: String,
    /// Label of the cell.
    pub(crate) cell: String,
    /// Top-level stage.
    pub(crate) stage: String,
    /// Whether the key of the stage is to stay.
    #[serde(default)]
    pub(crate) pinned: bool,
    /// What the places of its preimage were called.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) names: BTreeMap<String, String>,
}

impl Of {
    /// What a name says; little where another program wrote it.
    pub(crate) fn read(named: &Named) -> Of {
        serde_json::from_value(named.info.clone()).unwrap_or_default()
    }

    fn is_of(&self, pipeline: &Pipeline) -> bool {
        self.path == pipeline.path
    }

    /// The same file elsewhere: a project may have moved.
    fn may_be_of(&self, pipeline: &Pipeline) -> bool {
        Path::new(&self.path).file_name() == Path::new(&pipeline.path).file_name()
    }
}

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Of { pipeline, cell, stage, .. } = self;
        match cell.as_str() {
            "base" | "" => write!(f, "`{stage}` of {pipeline}"),
            cell => write!(f, "`{stage}` ({cell}) of {pipeline}"),
        }
    }
}

/// The pins of a pipeline, by name: those of this very file, else those of files that are called like it.
fn pins(store: &Store, pipeline: &Pipeline) -> Result<BTreeMap<String, (Key, Of)>> {
    let all = store.names()?.into_iter().map(|(name, named)| (name, (named.key, Of::read(&named))));
    let pinned: BTreeMap<String, (Key, Of)> = all.filter(|(_, (_, of))| of.pinned).collect();
    let own = pinned.values().any(|(_, of)| of.is_of(pipeline));
    let fits = |of: &Of| if own { of.is_of(pipeline) } else { of.may_be_of(pipeline) };
    Ok(pinned.into_iter().filter(|(_, (_, of))| fits(of)).collect())
}

/// The pin of a stage, with its name.
pub(crate) fn find_pin(
    store: &Store,
    pipeline: &Pipeline,
    cell: &str,
    stage: &str,
) -> Result<Option<(String, (Key, Of))>> {
    let found = pins(store, pipeline)?.into_iter();
    Ok(found.into_iter().find(|(_, (_, of))| of.cell == cell && of.stage == stage))
}

/// Stages of a graph whose key is to stay.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pins(BTreeMap<NodeIndex, (Key, Of)>);

impl Pins {
    /// Those of a pipeline, in the selected cells.
    pub(crate) fn of(graph: &Graph, store: &Store, pipeline: &Pipeline) -> Result<Pins> {
        let mut found = BTreeMap::new();
        for (key, of) in pins(store, pipeline)?.into_values() {
            for cell in graph.cells.iter().filter(|cell| cell.label == of.cell) {
                found.extend(cell.names.get(&of.stage).map(|node| (*node, (key, of.clone()))));
            }
        }
        Ok(Pins(found))
    }

    /// An error where the key of a stage is another than it is to be, with what changed.
    pub(crate) fn check(&self, node: NodeIndex, action: &Action, store: &Store) -> Result<()> {
        let Some((key, of)) = self.0.get(&node).filter(|(key, _)| *key != action.key) else { return Ok(()) };
        let changes = store.preimage(key)?.map(|old| changes_since(&old, &of.names, action)).transpose()?;
        let lines: Vec<String> = changes.unwrap_or_default().iter().map(|change| change.line_with_place()).collect();
        let what = if lines.is_empty() { String::new() } else { format!(": {}", lines.join("; ")) };
        Err(anyhow!(
            "`{}` is pinned, and its key would be another{what}; undo the change, or `pipeline unpin` it",
            of.stage
        ))
    }

    /// The first stage of a plan of which that is known already.
    pub(crate) fn check_plan(&self, plan: &Plan, selection: &Selection, store: &Store) -> Result<()> {
        let decided = plan.steps.iter().filter(|(node, _)| selection.positions.contains_key(node));
        for (node, decision) in decided.filter_map(|(node, step)| Some((*node, step.decision()?))) {
            self.check(node, decision.action(), store)?;
        }
        Ok(())
    }
}
