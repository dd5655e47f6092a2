//! The pipeline language: from a file and the flags of a command to a [`Graph`].
//!
//! A file is read into a tree of values with their places; includes are merged below it. For every selected cell, edits
//! are applied to that tree in a fixed order (profile, variant, ablation cell, command line), parameters are put in, and
//! what results is read as a typed spec and resolved. Everything that is wrong is said in one pass.

pub(crate) mod catalogue;
mod cells;
pub(crate) mod diagnostic;
mod document;
mod edit;
pub(crate) mod kinds;
mod params;
pub(crate) mod read;
mod resolve;
pub(crate) mod spec;
mod variants;
pub(crate) mod yaml;

use std::collections::BTreeSet;
use std::path::PathBuf;

use contract::Registry;

pub use crate::language::catalogue::{catalogue, json_schema};
pub use crate::language::diagnostic::{Diagnostic, Diagnostics};
pub use document::{Found, find_file, init};
pub(crate) use edit::{Removed, removal};

use crate::graph::{Cell, Graph};
use crate::language::diagnostic::Problems;
use crate::language::resolve::Assembly;
use crate::language::yaml::Node;
use cells::CellPlan;
use edit::{Edit, Owner};
use kinds::Kinds;
use spec::Spec;
use variants::Layers;

/// What a command is asked to look at: a pipeline, and which cells of it.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The pipeline, as typed.
    pub file: PathBuf,
    /// Where and at what scale.
    pub profile: Option<String>,
    /// Which experiments; empty for the base, or for those of the ablation.
    pub variants: Vec<String>,
    /// All of them, the base too.
    pub all_variants: bool,
    /// Which grid of settings.
    pub ablation: Option<String>,
    /// Single settings, `path=value`.
    pub set: Vec<String>,
}

/// What a pipeline's text names, whether or not it is right.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outline {
    /// `STAGE` and `LOOP.STAGE`.
    pub(crate) stages: Vec<String>,
    /// With `base`.
    pub(crate) variants: Vec<String>,
    pub(crate) profiles: Vec<String>,
    pub(crate) ablations: Vec<String>,
    /// Paths that can be set: parameters, and the fields that stages write.
    pub(crate) settings: Vec<String>,
}

/// The names in a pipeline; none of a text that is no YAML.
pub(crate) fn outline(file: &std::path::Path, shipped: &[(&str, &str)]) -> Option<Outline> {
    let tree = document::load(file, shipped).ok()?;
    let names = |node: Option<&Node>| -> Vec<String> {
        node.and_then(Node::map).into_iter().flatten().map(|(name, _)| name.clone()).collect()
    };
    let below = |prefix: &str, node: Option<&Node>| -> Vec<String> {
        names(node).iter().map(|name| format!("{prefix}.{name}")).collect()
    };
    let mut found = Outline {
        variants: [vec!["base".to_owned()], names(tree.get("variants"))].concat(),
        profiles: names(tree.get("profiles")),
        ablations: names(tree.get("ablations")),
        settings: below("params", tree.get("params")),
        ..Outline::default()
    };
    for (name, entry) in tree.get("stages").and_then(Node::map).into_iter().flatten() {
        found.stages.push(name.clone());
        found.settings.extend(below(name, entry.node.get("with")));
        let inner = entry.node.at(["loop", "stages"]).and_then(Node::map);
        for (stage, inner) in inner.into_iter().flatten() {
            let full = format!("{name}.{stage}");
            found.settings.extend(below(&full, inner.node.get("with")));
            found.stages.push(full);
        }
    }
    Some(found)
}

/// Reads a pipeline into the graph of all cells that a request selects.
///
/// `shipped` are the pipelines compiled in, by name and text. Errors hold everything that is wrong with the file and the
/// request together.
pub fn load(request: &Request, registry: &Registry, shipped: &[(&str, &str)]) -> Result<Graph, Diagnostics> {
    let tree = document::load(&request.file, shipped)?;
    let mut problems = Problems::default();
    let kinds = Kinds::new(registry);
    let variants = Layers::read(tree.get("variants"), "variant", &mut problems);
    let cells = cells::select(request, &tree, &variants, &mut problems);
    let mut assembly = Assembly::default();
    let mut tracking = Tracking::default();
    for plan in &cells {
        let mut found = Problems::default();
        let cell = read_cell(&tree, plan, &kinds, &variants, &mut tracking, &mut assembly, &mut found);
        assembly.graph.cells.extend(cell);
        problems.absorb(found, (plan.label != "base").then_some(&plan.label));
    }
    tracking.finish(&cells, &tree, &mut problems);
    problems.finish(assembly.finish())
}

fn read_cell(
    tree: &Node,
    plan: &CellPlan,
    kinds: &Kinds,
    variants: &Layers,
    tracking: &mut Tracking,
    assembly: &mut Assembly,
    problems: &mut Problems,
) -> Option<Cell> {
    let mut tree = tree.clone();
    let mut removed = Vec::new();
    for edit in &plan.edits {
        let result = edit::apply(&mut tree, edit, kinds, &mut removed);
        tracking.note(edit, result, problems);
    }
    let before = problems.0.len();
    tracking.used.extend(params::substitute(&mut tree, problems));
    tree.collect_sources(&mut assembly.graph.sources);
    let unknown: Vec<_> = problems.0[before..].iter().filter_map(|d| d.place().cloned()).collect();
    let spec = Spec::read(&tree, removed, problems);
    let known: Vec<&str> = variants.names().chain(["base"]).collect();
    let cell = resolve::cell(&spec, &plan.variant, &known, kinds, assembly, problems);
    // A value that could not be put in is not wrong in a second way.
    let mut seen = 0;
    problems.0.retain(|diagnostic| {
        seen += 1;
        seen <= before + unknown.len() || diagnostic.place().is_none_or(|span| !unknown.contains(span))
    });
    let (names, report) = cell?;
    Some(Cell {
        label: plan.label.clone(),
        variant: plan.variant.clone(),
        over: plan.over.clone(),
        repeat: plan.repeat.clone(),
        names,
        report,
    })
}

/// What must hold for a request as a whole: each of its settings takes effect in one cell at least.
#[derive(Default)]
struct Tracking {
    /// Parameters that some cell reads.
    used: BTreeSet<String>,
    /// Paths of settings that found their place in some cell.
    applied: BTreeSet<String>,
    /// Settings whose place a variant removes.
    without_place: Vec<(String, Diagnostic)>,
}

impl Tracking {
    fn note(&mut self, edit: &Edit, result: Result<(), edit::Refusal>, problems: &mut Problems) {
        match result {
            Ok(()) => {
                self.applied.insert(edit.path.clone());
            }
            // A setting of a whole request leaves those variants alone that have no place for it.
            Err(refusal) if refusal.removed && matches!(edit.owner, Owner::Ablation(_) | Owner::CommandLine) => {
                self.without_place.push((edit.path.clone(), refusal.diagnostic));
            }
            Err(refusal) => problems.push(refusal.diagnostic),
        }
    }

    fn finish(self, cells: &[CellPlan], tree: &Node, problems: &mut Problems) {
        let mut late = Problems::default();
        for (path, diagnostic) in self.without_place {
            if !self.applied.contains(&path) {
                late.push(diagnostic);
            }
        }
        let unread = |path: &str| path.strip_prefix("params.").is_some_and(|name| !self.used.contains(name));
        for edit in cells.iter().flat_map(|cell| &cell.edits).filter(|edit| unread(&edit.path)) {
            if matches!(edit.owner, Owner::Ablation(_) | Owner::CommandLine) && self.applied.contains(&edit.path) {
                let message = format!("{} changes `{}`, which nothing reads", edit.owner, edit.path);
                let hint = format!("use it in a stage as `\"${{{}}}\"`, or do not set it", edit.path);
                late.push(Diagnostic::new(message, hint).at(edit.span.clone(), "has no effect"));
            }
        }
        let params = tree.get("params").and_then(Node::map);
        for (name, entry) in params.into_iter().flatten().filter(|(name, _)| !self.used.contains(*name)) {
            let place = entry.key.place();
            tracing::debug!(file = place.file, line = place.line, "parameter `{name}` is read by nothing");
        }
        problems.absorb(late, None);
    }
}

#[cfg(test)]
mod tests;
