//! `pipeline run` and `pipeline compare`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;

use ::cache::Store;
use anyhow::Result;
use petgraph::graph::NodeIndex;

use super::outlook::Outlook;
use super::{BadRequest, Workbench, only_named, open_store, read_store, report as report_page, say, status};
use crate::cli::{CompareArgs, RunArgs, TableArgs, TableFormat};
use crate::graph::Graph;
use crate::ground::output::tell;
use crate::ground::signals;
use crate::ground::trouble::Fault;
use crate::plan::foresee::Foresight;
use crate::plan::history::{History, Pipeline};
use crate::plan::names::Pins;
use crate::plan::selection;
use crate::plan::{self, Settled};
use crate::report;
use crate::report::comparison;
use crate::report::table::{self, Form, View};
use crate::run::device;
use crate::run::{self, Settings, Summary};

/// Runs what the flags select.
pub(crate) fn run(args: &RunArgs, bench: &Workbench) -> Result<ExitCode> {
    let graph = bench.load(&args.target)?;
    run_graph(args, &graph, bench)
}

/// Shows the variants that the file's report compares, unless flags select others, as far as their results are there; runs
/// them first where that is asked for.
pub(crate) fn compare(args: CompareArgs, bench: &Workbench) -> Result<ExitCode> {
    let CompareArgs { run, how: args } = args;
    if args.json && !run {
        return Err(BadRequest("`--json` prints the events of a run: say `--run` as well".into()).into());
    }
    let (graph, _) = bench.load_compared(&args.target)?;
    if comparison::report(&graph).is_none() {
        return Err(BadRequest(format!(
            "`{}` has no `report`, so there is nothing to compare; add one, such as `report: {{metric: score.rouge_l}}`",
            args.target.file.display()
        ))
        .into());
    }
    if run { run_graph(&args, &graph, bench) } else { show_results(&args, &graph, bench) }
}

/// Prints the table of what is in the store, and says what of it is missing.
fn show_results(args: &RunArgs, graph: &Graph, bench: &Workbench) -> Result<ExitCode> {
    let selection = selection::select(graph, &args.target.wanted(&[]))?;
    let store = read_store(&args.target.store)?;
    let plan = plan::plan(graph, &selection, bench.registry, &store)?;
    print_table(args, graph, &plan.settled(), &store)?;
    let reported = comparison::stages(graph);
    let missing: Vec<_> = plan
        .steps
        .iter()
        .filter(|(node, step)| reported.contains(node) && step.settled().is_none())
        .map(|(node, _)| format!("`{}`", selection.labels[node]))
        .collect();
    if missing.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    tell(&format!("note: there is no result yet of {}; `--run` computes what is missing", missing.join(", ")));
    Ok(ExitCode::from(status::WORK_FOUND))
}

fn run_graph(args: &RunArgs, graph: &Graph, bench: &Workbench) -> Result<ExitCode> {
    let target = &args.target;
    let selection = selection::select(graph, &target.wanted(&args.force))?;
    let settings = settings(args, bench)?;
    let store = open_store(&target.store)?;
    // What cannot work is refused before anything runs; what is only odd is said by the run itself.
    let plan = plan::plan(graph, &selection, bench.registry, &store)?;
    only_named(target, &selection, &plan)?;
    let pipeline = Pipeline::of(&target.file);
    let pins = Pins::of(graph, &store, &pipeline)?;
    pins.check_plan(&plan, &selection, &store)?;
    let mut foresight = Foresight::new(graph, &selection, bench.registry, device::machine(&settings.devices));
    let (errors, _) = foresight.diagnose(&plan.settled());
    if !errors.diagnostics.is_empty() {
        return Err(errors.into());
    }
    let outlook = Outlook::of(graph, &selection, &plan, &History::open(&store, pipeline.clone()), &store);
    outlook.check_room(&store)?;
    if outlook.has_work() && graph.cells.len() > 1 && !args.json {
        tell(&outlook.line());
    }
    let mut reporter = report::reporter(args.json, selection.width());
    let summary = {
        let _span = tracing::info_span!("run", pipeline = pipeline.pipeline).entered();
        run::run(plan, pins, foresight, Arc::clone(&store), &settings, &pipeline, reporter.as_mut())?
    };
    let shown = if args.json { reporter.finish() } else { print_table(args, graph, &summary.settled, &store) };
    conclude(&summary, args.json, shown)
}

fn print_table(args: &RunArgs, graph: &Graph, settled: &BTreeMap<NodeIndex, Settled>, store: &Store) -> Result<()> {
    let Some(comparison) = comparison::compare(graph, settled, store)? else { return Ok(()) };
    let (form, view) = shape(&args.table);
    let file = args.target.file.display().to_string();
    let name = args.target.file.file_stem().map_or_else(|| file.clone(), |stem| stem.to_string_lossy().into_owned());
    let command = report_page::command(&args.target, &args.target.request(), &file).of_all("compare");
    say(&table::write(&comparison, form, &view, &name, &command)?)
}

fn shape(args: &TableArgs) -> (Form, View) {
    let TableArgs { format, markdown, transpose, only_differing, columns } = args.clone();
    let form = match format {
        _ if markdown => Form::Markdown,
        TableFormat::Text => Form::Text,
        TableFormat::Markdown => Form::Markdown,
        TableFormat::Latex => Form::Latex,
        TableFormat::Csv => Form::Csv,
        TableFormat::Json => Form::Json,
    };
    (form, View { transpose, only_differing, columns })
}

fn settings(args: &RunArgs, bench: &Workbench) -> Result<Settings> {
    let target = &args.target;
    if args.cut_every.is_nan() || args.cut_every < 0.0 {
        return Err(BadRequest(format!("`--cut-every` is {}, expected seconds of at least 0", args.cut_every)).into());
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(Settings {
        devices: device::devices(&target.device, bench.gpus)?,
        threads: target.threads.map_or(cores, usize::from),
        jobs: usize::from(target.jobs),
        cut_seconds: args.cut_every,
        unroll: args.unroll,
        fail_fast: args.fail_fast,
    })
}

/// Says last what went wrong first, and how to go on. With `json` nothing was said in words so far. What was not `shown` on
/// standard output counts where nothing worse happened.
fn conclude(summary: &Summary, json: bool, shown: Result<()>) -> Result<ExitCode> {
    if let Some((stage, error)) = summary.failed.first() {
        match json {
            true => tell(&format!("error: stage `{stage}` failed: {error:#}")),
            false => tell(&format!("error: stage `{stage}` failed, as said above")),
        }
    }
    if let Some(signal) = summary.signal {
        tell("interrupted: the same command goes on from here");
        return Ok(ExitCode::from(signals::status(signal)));
    }
    match summary.failed.first() {
        Some((_, error)) => Ok(ExitCode::from(Fault::of(error).status())),
        None => shown.map(|()| ExitCode::SUCCESS),
    }
}
