//! `pipeline plan`: what a run would do, and why.

use std::process::ExitCode;

use anyhow::Result;
use petgraph::graph::NodeIndex;
use serde_json::json;

use super::outlook::{self, Outlook};
use super::{Workbench, only_named, pretty, read_store, say, status, warn_or_fail};
use crate::cli::PlanArgs;
use crate::plan::history::{History, Pipeline};
use crate::plan::names::Pins;
use crate::plan::selection::{self, Selection};
use crate::plan::{self, Decision, Step};
use crate::report::duration;
use crate::run::device;

pub(crate) fn plan(args: &PlanArgs, bench: &Workbench) -> Result<ExitCode> {
    let graph = bench.load(&args.target)?;
    let selection = selection::select(&graph, &args.target.wanted(&args.force))?;
    let store = read_store(&args.target.store)?;
    let plan = plan::plan(&graph, &selection, bench.registry, &store)?;
    only_named(&args.target, &selection, &plan)?;
    let devices = device::devices(&args.target.device, bench.gpus)?;
    let foreseen = warn_or_fail(&graph, &selection, bench, &devices, &plan.settled());
    let pipeline = Pipeline::of(&args.target.file);
    let pins = Pins::of(&graph, &store, &pipeline)?;
    let history = History::open(&store, pipeline);
    let width = selection.width();
    let mut text = String::new();
    let mut stages = Vec::new();
    for (node, step) in &plan.steps {
        let name = &selection.labels[node];
        let reason = match step {
            Step::Decided(Decision::Cached(settled)) => match settled.imported_from() {
                Some(from) => format!("imported from {from}"),
                None => {
                    settled.seconds().map(|seconds| format!("took {} when made", duration(seconds))).unwrap_or_default()
                }
            },
            Step::Decided(Decision::Run { action, why }) => {
                history.reason(&selection.aliases[node], action, why, &store)
            }
            Step::Decided(Decision::Again { .. }) => plan::FORCED.to_owned(),
            Step::Decided(Decision::Resume { round, rounds, .. }) => {
                format!("goes on after round {round} of {rounds}")
            }
            Step::Waits { on } => waits_on(on, &selection),
            Step::Impossible { error } => error.clone(),
        };
        let cost = if step.settled().is_none() { history.cost(&selection.aliases[node], &store) } else { None };
        stages.push(json!({
            "stage": name,
            "status": word(step),
            "key": step.decision().map(|decision| decision.action().key),
            "reason": reason,
            "expected_seconds": cost.map(|cost| cost.seconds),
            "expected_bytes": cost.map(|cost| cost.bytes),
        }));
        let expected = outlook::expected(step, cost);
        text += format!("{:<18}  {name:width$}  {reason}{expected}", word(step)).trim_end();
        text.push('\n');
    }
    let outlook = Outlook::of(&graph, &selection, &plan, &history, &store);
    say(&match args.json {
        true => pretty(&json!({"stages": stages, "outlook": outlook.to_json()})),
        false => format!("{text}{}\n", outlook.line()),
    })?;
    foreseen?;
    outlook.check_room(&store)?;
    pins.check_plan(&plan, &selection, &store)?;
    if plan.steps.iter().any(|(_, step)| matches!(step, Step::Impossible { .. })) {
        return Ok(ExitCode::from(status::BAD_REQUEST));
    }
    let work = args.check && plan.has_work();
    Ok(if work { ExitCode::from(status::WORK_FOUND) } else { ExitCode::SUCCESS })
}

/// The word for a step, here and in `show`.
pub(crate) fn word(step: &Step) -> &'static str {
    match step {
        Step::Decided(Decision::Cached(_)) => "cached",
        Step::Decided(Decision::Run { .. } | Decision::Again { .. }) => TO_RUN,
        Step::Decided(Decision::Resume { .. }) => "resume",
        Step::Waits { .. } => "depends-on-result",
        Step::Impossible { .. } => "cannot-run",
    }
}

/// The word for what has no result.
pub(crate) const TO_RUN: &str = "run";

/// The stages that have to run first, after "depends".
pub(crate) fn waits_on(stages: &[NodeIndex], selection: &Selection) -> String {
    let names: Vec<_> = stages.iter().map(|node| format!("`{}`", selection.labels[node])).collect();
    format!("on {}", names.join(", "))
}
