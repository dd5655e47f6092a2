//! `pipeline plan`: what a run would do, and why.

use std::process::ExitCode;

use anyhow::Result;

use super::{Workbench, read_store, say, status, warn_or_fail};
use crate::cli::PlanArgs;
use crate::plan::history::{History, Pipeline};
use crate::plan::selection::{self, Selection};
use crate::plan::{self, Decision};
use crate::report::duration;
use crate::run::device;

pub(crate) fn plan(args: &PlanArgs, bench: &Workbench) -> Result<ExitCode> {
    let graph = bench.load(&args.target)?;
    let selection = selection::select(&graph, &args.target.stages)?;
    let store = read_store(&args.target.store)?;
    let plan = plan::plan(&graph, &selection, bench.registry, &store)?;
    let devices = device::devices(&args.target.device, bench.gpus)?;
    let foreseen = warn_or_fail(&graph, &selection, bench, &devices, &plan.settled());
    let history = History::open(&store, Pipeline::of(&args.target.file));
    let width = selection.width();
    let mut text = String::new();
    for (node, decision) in &plan.steps {
        let name = &selection.labels[node];
        let reason = match decision {
            Decision::Run { action, why } => history.reason(&selection.aliases[node], action, why, &store),
            other => in_words(other, &selection),
        };
        text += format!("{:<18}  {name:width$}  {reason}", word(decision)).trim_end();
        text.push('\n');
    }
    say(&text)?;
    foreseen?;
    if plan.steps.iter().any(|(_, decision)| matches!(decision, Decision::Impossible { .. })) {
        return Ok(ExitCode::from(status::BAD_REQUEST));
    }
    let work = args.check && plan.has_work();
    Ok(if work { ExitCode::from(status::WORK_FOUND) } else { ExitCode::SUCCESS })
}

/// The word for a decision, here and in `show`.
pub(crate) fn word(decision: &Decision) -> &'static str {
    match decision {
        Decision::Cached(_) => "cached",
        Decision::Run { .. } => "run",
        Decision::Resume { .. } => "resume",
        Decision::DependsOnResult { .. } => "depends-on-result",
        Decision::Impossible { .. } => "cannot-run",
    }
}

/// Why it was decided so; for what has to run, only what the store itself says.
pub(crate) fn in_words(decision: &Decision, selection: &Selection) -> String {
    match decision {
        Decision::Cached(settled) => {
            settled.seconds().map(|seconds| format!("took {} when made", duration(seconds))).unwrap_or_default()
        }
        Decision::Run { why, .. } => why.to_string(),
        Decision::Resume { round, rounds, .. } => format!("goes on after round {round} of {rounds}"),
        Decision::DependsOnResult { on } => {
            let names: Vec<_> = on.iter().map(|node| format!("`{}`", selection.labels[node])).collect();
            format!("on {}", names.join(", "))
        }
        Decision::Impossible { error } => error.clone(),
    }
}
