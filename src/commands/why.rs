//! `pipeline why`: the exact difference between what a stage is now and what it was when it last was something else; or, with
//! `--against`, what it is or was elsewhere.

use std::collections::BTreeMap;

use anyhow::Result;
use cache::Store;
use serde_json::Value as Json;

use super::plan::waits_on;
use super::{BadRequest, Workbench, read_store, say};
use crate::cli::{Target, WhyArgs};
use crate::graph::Graph;
use crate::language;
use crate::plan::history::{Change, History, Pipeline, as_kept, changes_since, find_run};
use crate::plan::key::{self, Action};
use crate::plan::names::Of;
use crate::plan::selection::{self, Alias, Selection};
use crate::plan::{self, Decision, Step};

pub(crate) fn why(args: &WhyArgs, bench: &Workbench) -> Result<()> {
    let target = &args.target;
    let graph = bench.load(target)?;
    let selection = selection::select(&graph, &target.wanted(&[]))?;
    let store = read_store(&target.store)?;
    let plan = plan::plan(&graph, &selection, bench.registry, &store)?;
    let settled = plan.settled();
    let history = History::open(&store, Pipeline::of(&target.file));
    let other = args.against.as_deref().map(|name| Other::find(name, target, bench, &store)).transpose()?;
    let compare = |aliases: &[Alias], action: &Action| -> Result<Option<(String, Vec<Change>)>> {
        match &other {
            None => {
                let found = history.changes(aliases, action, &store)?;
                Ok(found.map(|(run, changes)| (format!("run {run}"), changes)))
            }
            Some(other) => other.changes(aliases, action),
        }
    };
    let mut text = String::new();
    for (node, step) in plan.steps.iter().filter(|(node, _)| selection.named.contains(node)) {
        let (name, aliases) = (&selection.labels[node], &selection.aliases[node]);
        text += &match step {
            Step::Decided(decision) => {
                let action = decision.action();
                let changes = compare(aliases, action)?;
                let known = history.knows(aliases, &action.key);
                let made = made_by(decision, &history, aliases);
                format!("{name}: {}{made}, key {}\n{}", state(decision), action.key, compared(changes, known, &other))
            }
            Step::Waits { on } => {
                let (inputs, missing) = plan::known_inputs(&graph, *node, &settled);
                let action = plan::action_of(&graph.subgraphs[*node], &inputs, bench.registry, &store);
                // What an input will hold is not known yet, which is no change.
                let waits = |change: &Change| missing.iter().any(|entry| change.path.contains(entry.as_str()));
                let changes = match &action {
                    Ok(action) => compare(aliases, action)?,
                    Err(_) => None,
                };
                let changes = changes.map(|(what, mut changes)| {
                    changes.retain(|change| !waits(change) || change.new.as_ref().is_some_and(|new| !new.is_null()));
                    (what, changes)
                });
                format!("{name}: its key depends {}\n{}", waits_on(on, &selection), so_far(changes, &missing))
            }
            Step::Impossible { error } => format!("{name}: its key cannot be computed: {error}\n"),
        };
    }
    say(&text)
}

fn state(decision: &Decision) -> &'static str {
    match decision {
        Decision::Cached(_) => "cached",
        Decision::Run { .. } | Decision::Again { .. } => "will run",
        Decision::Resume { .. } => "will go on from a checkpoint",
    }
}

/// The first run that wanted a result that is there.
fn made_by(decision: &Decision, history: &History, aliases: &[Alias]) -> String {
    let Decision::Cached(settled) = decision else { return String::new() };
    history.first_with(aliases, &settled.action.key).map_or_else(String::new, |run| format!(" since run {run}"))
}

fn compared(changes: Option<(String, Vec<Change>)>, known: bool, other: &Option<Other>) -> String {
    match (changes, other) {
        (None, Some(other)) => format!("  `{}` has no such stage\n", other.name),
        (None, None) if known => "  the same as in every earlier run of this pipeline\n".into(),
        (None, None) => "  no earlier run of this pipeline had it\n".into(),
        (Some((what, changes)), _) => format!("  compared with {what}:\n{}", lines(&changes)),
    }
}

/// Of a stage that waits: what has changed already, and what of it is still open.
fn so_far(changes: Option<(String, Vec<Change>)>, missing: &[String]) -> String {
    let open = format!("    open: {}\n", missing.join(", "));
    match changes {
        Some((what, changes)) if !changes.is_empty() => {
            format!("  compared with {what}, so far:\n{}{open}", lines(&changes))
        }
        Some((what, _)) => format!("  compared with {what}, nothing else has changed\n{open}"),
        None => open,
    }
}

fn lines(changes: &[Change]) -> String {
    if changes.is_empty() {
        return "    nothing: it is the same\n".into();
    }
    let line = |change: &Change| {
        let place = change.place.as_ref().map(|place| format!("    {}:{}:{}", place.file, place.line, place.column));
        format!("    {}{}\n", change.line(), place.unwrap_or_default())
    };
    changes.iter().map(line).collect()
}

/// What a stage is compared with.
struct Other {
    /// As it was given.
    name: String,
    /// In words.
    what: String,
    stages: Vec<Made>,
}

/// What was made of a stage there.
struct Made {
    alias: Alias,
    preimage: Json,
    /// What the places in the preimage were called.
    names: BTreeMap<String, String>,
}

impl Other {
    /// A run, the name of a result, or a variant, in this order.
    fn find(name: &str, target: &Target, bench: &Workbench, store: &Store) -> Result<Other> {
        if let Ok(Some(named)) = store.named(name) {
            let of = Of::read(&named);
            let alias = Alias { name: of.stage.clone(), cell: of.cell.clone() };
            let preimage = store.preimage(&named.key)?;
            let stages =
                preimage.map(|preimage| Made { alias, preimage, names: of.names.clone() }).into_iter().collect();
            return Ok(Other { name: name.into(), what: format!("`{name}`, {of}"), stages });
        }
        if let Ok(run) = find_run(store, name) {
            let mut stages = Vec::new();
            for stage in run.stages {
                let preimage = store.preimage(&stage.key)?;
                stages.extend(preimage.map(|preimage| Made { alias: stage.alias, preimage, names: stage.names }));
            }
            return Ok(Other { name: name.into(), what: format!("run {}", run.id), stages });
        }
        let graph = match language::load(&target.request_of(name), bench.registry, bench.shipped) {
            Ok(graph) => graph,
            Err(_) => {
                let message = format!(
                    "`{name}` is no run, no name of a result and no variant; `pipeline runs` and `pipeline tags` list the former"
                );
                return Err(BadRequest(message).into());
            }
        };
        let selection = selection::select(&graph, &selection::Wanted::default())?;
        Ok(Other {
            name: name.into(),
            what: format!("variant `{name}`"),
            stages: planned(&graph, &selection, bench, store)?,
        })
    }

    fn changes(&self, aliases: &[Alias], action: &Action) -> Result<Option<(String, Vec<Change>)>> {
        let by = |fits: &dyn Fn(&Alias) -> bool| self.stages.iter().find(|made| fits(&made.alias));
        let same_name = |alias: &Alias| aliases.iter().any(|own| own.name == alias.name);
        let Some(Made { preimage, names, .. }) = by(&|alias| aliases.contains(alias)).or_else(|| by(&same_name)) else {
            return Ok(None);
        };
        Ok(Some((self.what.clone(), changes_since(preimage, names, action)?)))
    }
}

/// The preimages of a graph, as far as they can be told; inputs without a result are left out.
fn planned(graph: &Graph, selection: &Selection, bench: &Workbench, store: &Store) -> Result<Vec<Made>> {
    let settled = plan::plan(graph, selection, bench.registry, store)?.settled();
    let mut stages = Vec::new();
    for node in &selection.order {
        let (inputs, _) = plan::known_inputs(graph, *node, &settled);
        let Ok(action) = plan::action_of(&graph.subgraphs[*node], &inputs, bench.registry, store) else { continue };
        let preimage = as_kept(&action)?;
        let names = key::names_of(&action.subgraph);
        let made = |alias: &Alias| Made { alias: alias.clone(), preimage: preimage.clone(), names: names.clone() };
        stages.extend(selection.aliases[node].iter().map(made));
    }
    Ok(stages)
}
