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
    /// Where each of them stands in that order.
    pub positions: BTreeMap<NodeIndex, usize>,
    /// What was named itself; everything where nothing was.
    pub named: BTreeSet<NodeIndex>,
    /// What is to run although it has a result.
    pub forced: BTreeSet<NodeIndex>,
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

/// Which stages are asked for, as the command line names them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted<'a> {
    /// `STAGE` or `+STAGE`, with all that it needs; `STAGE+`, with all that needs it. Without any: everything.
    pub(crate) stages: &'a [String],
    /// What needs one of these is left out.
    pub(crate) until: &'a [String],
    /// These run although they have a result.
    pub(crate) force: &'a [String],
}

/// Selects what is asked for, with all that it needs.
///
/// A name is `STAGE` or `LOOP.STAGE`, in any cell. Errors when no cell has it, or nothing is left.
pub(crate) fn select(graph: &Graph, wanted: &Wanted) -> Result<Selection> {
    let Wanted { stages, until, force } = wanted;
    let mut named = match stages.is_empty() {
        true => graph.subgraphs.node_indices().collect(),
        false => all_named(graph, stages)?,
    };
    let last = all_named(graph, until)?;
    let after: BTreeSet<NodeIndex> =
        reach(graph, last.clone(), Direction::Outgoing).difference(&last).copied().collect();
    named.retain(|node| !after.contains(node));
    if named.is_empty() {
        return Err(BadRequest(format!(
            "everything that is named needs `{}`; name another `--until`",
            until.join("`, `")
        ))
        .into());
    }
    let forced = all_named(graph, force)?;
    let selected = reach(graph, named.clone(), Direction::Incoming);
    if let Some(stray) = forced.iter().find(|node| !selected.contains(node)) {
        let name = &graph.subgraphs[*stray].name;
        return Err(BadRequest(format!("`--force {name}` names a stage that is not among those to run")).into());
    }
    let order: Vec<_> = graph::in_order(&graph.subgraphs).into_iter().filter(|node| selected.contains(node)).collect();
    let positions = order.iter().enumerate().map(|(at, node)| (*node, at)).collect();
    Ok(Selection { order, positions, named, forced, labels: labels(graph), aliases: aliases(graph) })
}

/// What names stand for, in all cells; with a `+` behind it, with all that needs it.
fn all_named(graph: &Graph, names: &[String]) -> Result<BTreeSet<NodeIndex>> {
    let mut all = BTreeSet::new();
    for written in names {
        let name = written.strip_prefix('+').unwrap_or(written);
        let (name, downstream) = name.strip_suffix('+').map_or((name, false), |name| (name, true));
        let found: BTreeSet<_> = graph.cells.iter().filter_map(|cell| find(graph, cell, name)).collect();
        if found.is_empty() {
            return Err(unknown(graph, name).into());
        }
        all.extend(if downstream { reach(graph, found, Direction::Outgoing) } else { found });
    }
    Ok(all)
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

/// What is said of a name that no stage has.
pub(crate) fn unknown(graph: &Graph, name: &str) -> BadRequest {
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

/// Subgraphs with all that they need, or with all that needs them.
pub(crate) fn reach(graph: &Graph, from: BTreeSet<NodeIndex>, direction: Direction) -> BTreeSet<NodeIndex> {
    let mut queue: VecDeque<_> = from.iter().copied().collect();
    let mut found = from;
    while let Some(node) = queue.pop_front() {
        for next in graph.subgraphs.neighbors_directed(node, direction) {
            if found.insert(next) {
                queue.push_back(next);
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
