//! `pipeline why`: the exact difference between what a stage is now and what it was when it last was something else.

use std::collections::BTreeSet;

use anyhow::Result;

use super::plan::waits_on;
use super::{Workbench, read_store, say};
use crate::cli::Target;
use crate::plan::history::{Change, History, Pipeline};
use crate::plan::selection;
use crate::plan::{self, Decision, Step};

pub(crate) fn why(target: &Target, bench: &Workbench) -> Result<()> {
    let graph = bench.load(target)?;
    let selection = selection::select(&graph, &target.stages)?;
    let store = read_store(&target.store)?;
    let plan = plan::plan(&graph, &selection, bench.registry, &store)?;
    let named: BTreeSet<_> = graph
        .cells
        .iter()
        .flat_map(|cell| target.stages.iter().filter_map(|stage| selection::find(&graph, cell, stage)))
        .collect();
    let history = History::open(&store, Pipeline::of(&target.file));
    let mut text = String::new();
    for (node, step) in plan.steps.iter().filter(|(node, _)| named.is_empty() || named.contains(node)) {
        let name = &selection.labels[node];
        text += &match step {
            Step::Decided(decision) => {
                let (aliases, action) = (&selection.aliases[node], decision.action());
                let changes = history.changes(aliases, action, &store)?;
                let known = history.knows(aliases, &action.key);
                format!("{name}: {}, key {}\n{}", state(decision), action.key, compared(changes, known))
            }
            Step::Waits { on } => {
                let on = waits_on(on, &selection);
                format!("{name}: its key depends {on}, with no result yet; ask about that first\n")
            }
            Step::Impossible { error } => format!("{name}: its key cannot be computed: {error}\n"),
        };
    }
    say(&text)
}

fn state(decision: &Decision) -> &'static str {
    match decision {
        Decision::Cached(_) => "cached",
        Decision::Run { .. } => "will run",
        Decision::Resume { .. } => "will go on from a checkpoint",
    }
}

fn compared(changes: Option<(String, Vec<Change>)>, known: bool) -> String {
    match changes {
        None if known => "  the same as in every earlier run of this pipeline\n".into(),
        None => "  no earlier run of this pipeline had it\n".into(),
        Some((run, changes)) => {
            let mut text = format!("  compared with run {run}:\n");
            for change in &changes {
                text += &format!("    {}", change.line());
                if let Some(place) = &change.place {
                    text += &format!("    {}:{}:{}", place.file, place.line, place.column);
                }
                text.push('\n');
            }
            text
        }
    }
}
