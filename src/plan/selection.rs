//! Which subgraphs a command is about, and what they are called.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use anyhow::Result;
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use serde::{Deserialize, Serialize};

use crate::graph::{self, Cell, Graph, Subgraph};
use crate::ground::trouble::BadRequest;

/// Subgraphs in an order that respects their handoffs, and a name for each.
#[derive(Clone, Debug)]
pub struct Selection {
    /// What is wanted with all that it needs.
    pub order: Vec<NodeIndex>,
    /// A name for people, unique in the graph: the stage's, and where another cell has another stage of that name, with
    /// its own cell's label.
    pub labels: BTreeMap<NodeIndex, String>,
    /// What each cell calls it.
    pub aliases: BTreeMap<NodeIndex, Vec<Alias>>,
}

impl Selection {
    /// Width of the longest name of what is selected.
    pub fn width(&self) -> usize {
        self.order.iter().map(|node| self.labels[node].chars().count()).max().unwrap_or(0)
    }
}

/// What a cell calls a subgraph.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Alias {
    /// Top-level name.
    pub name: String,
    /// Label of the cell.
    pub cell: String,
}

/// Selects the named stages with all that they need; without names, everything.
///
/// A name is `STAGE` or `LOOP.STAGE`, in any cell. Errors when no cell has it.
pub(crate) fn select(graph: &Graph, stages: &[String]) -> Result<Selection> {
    let mut wanted = BTreeSet::new();
    for stage in stages {
        let found: Vec<_> = graph.cells.iter().filter_map(|cell| find(graph, cell, stage)).collect();
        if found.is_empty() {
            return Err(unknown(graph, stage).into());
        }
        wanted.extend(found);
    }
    if stages.is_empty() {
        wanted.extend(graph.subgraphs.node_indices());
    }
    let wanted = with_needs(graph, wanted);
    let order = graph::in_order(&graph.subgraphs).into_iter().filter(|node| wanted.contains(node)).collect();
    Ok(Selection { order, labels: labels(graph), aliases: aliases(graph) })
}

/// The subgraph that a name stands for in a cell: `STAGE`, or `LOOP.STAGE`.
pub(crate) fn find(graph: &Graph, cell: &Cell, name: &str) -> Option<NodeIndex> {
    if let Some(node) = cell.names.get(name) {
        return Some(*node);
    }
    let (outer, inner) = name.split_once('.')?;
    let node = *cell.names.get(outer)?;
    match &graph.subgraphs[node].subgraph {
        Subgraph::Loop(body) => body.stages.contains_key(inner).then_some(node),
        Subgraph::Operator(_) => None,
    }
}

fn unknown(graph: &Graph, name: &str) -> BadRequest {
    let names: BTreeSet<String> = graph.cells.iter().flat_map(|cell| names_in(graph, cell)).collect();
    let near = names.iter().map(|known| (strsim::damerau_levenshtein(known, name), known)).min();
    let hint = match near {
        Some((distance, known)) if distance <= 1 + name.len() / 3 => format!("; did you mean `{known}`?"),
        _ => format!(
            "; the pipeline has {}",
            names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        ),
    };
    BadRequest(format!("no selected variant has a stage `{name}`{hint}"))
}

fn names_in(graph: &Graph, cell: &Cell) -> Vec<String> {
    let inner = |(name, node): (&String, &NodeIndex)| {
        let body = graph.subgraphs[*node].subgraph.written_loop();
        body.iter().flat_map(|body| body.stages.keys()).map(|stage| format!("{name}.{stage}")).collect()
    };
    cell.names.iter().flat_map(|entry| [vec![entry.0.clone()], inner(entry)].concat()).collect()
}

fn with_needs(graph: &Graph, wanted: BTreeSet<NodeIndex>) -> BTreeSet<NodeIndex> {
    let mut queue: VecDeque<_> = wanted.iter().copied().collect();
    let mut found = wanted;
    while let Some(node) = queue.pop_front() {
        for before in graph.subgraphs.neighbors_directed(node, Direction::Incoming) {
            if found.insert(before) {
                queue.push_back(before);
            }
        }
    }
    found
}

fn aliases(graph: &Graph) -> BTreeMap<NodeIndex, Vec<Alias>> {
    let mut aliases: BTreeMap<NodeIndex, Vec<Alias>> = BTreeMap::new();
    for cell in &graph.cells {
        for (name, node) in &cell.names {
            aliases.entry(*node).or_default().push(Alias { name: name.clone(), cell: cell.label.clone() });
        }
    }
    aliases
}

fn labels(graph: &Graph) -> BTreeMap<NodeIndex, String> {
    let mut labels = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for cell in &graph.cells {
        for (name, node) in &cell.names {
            labels.entry(*node).or_insert_with(|| {
                let label = if taken.insert(name.clone()) { name.clone() } else { format!("{name} ({})", cell.label) };
                taken.insert(label.clone());
                label
            });
        }
    }
    labels
}
