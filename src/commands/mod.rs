//! The commands, a file each, and the way from an error to an exit status.

mod cache;
mod check;
mod complete;
mod doctor;
mod export;
mod import;
mod names;
mod outlook;
mod plan;
mod plot;
mod report;
mod run;
mod runs;
mod score;
mod show;
mod track;
mod watch;
mod why;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use ::cache::{Store, StoreError};
use anyhow::{Context, Result};
use clap::Parser;
use contract::{Registry, Scoring};
use petgraph::graph::NodeIndex;
use serde_json::Value as Json;

use crate::cli::{Cli, Command, Format, StoreArgs, Target};
use crate::graph::Graph;
use crate::ground::output::tell;
use crate::ground::output::{say, say_help};
use crate::ground::signals::{self, Interrupted};
use crate::ground::terminal::{has_colours, printable_lines};
use crate::ground::trouble::{BadRequest, is_store_trouble, status};
use crate::language::{self, Diagnostics, Request};
use crate::plan::foresee::Foresight;
use crate::plan::selection::Selection;
use crate::plan::{Plan, Settled};
use crate::report::answers::Decode;
use crate::report::draw;
use crate::run::device;

/// What the stages give the command line besides their kinds.
pub struct Extras {
    /// Scores a file of predictions against one of references: names and numbers.
    pub score: fn(&Scoring) -> Result<Json>,
    /// Turns lists of ids into text by a tokenizer, for people to read.
    pub texts: Decode,
    /// How many GPUs stages can use, or what they lack; nothing when they were built without CUDA.
    pub gpus: fn() -> Option<Result<usize>>,
}

/// What every command may need.
pub(crate) struct Workbench<'a> {
    pub(crate) registry: &'static Registry,
    pub(crate) shipped: &'a [(&'a str, &'a str)],
    pub(crate) gpus: fn() -> Option<Result<usize>>,
}

impl Workbench<'_> {
    /// The graph that the flags select.
    pub(crate) fn load(&self, target: &Target) -> Result<Graph> {
        Ok(language::load(&target.request(), self.registry, self.shipped)?)
    }

    /// The graph of the variants that the file's report compares, unless flags select others; and what is asked for by that.
    pub(crate) fn load_compared(&self, target: &Target) -> Result<(Graph, Request)> {
        let mut request = target.request();
        let graph = language::load(&request, self.registry, self.shipped)?;
        let selects = !request.variants.is_empty() || request.all_variants || request.ablation.is_some();
        let compared = graph.cells.iter().find_map(|cell| cell.report.as_ref()).map(|report| &report.compare);
        match compared.filter(|compared| !selects && !compared.is_empty()) {
            Some(compared) => {
                request.variants = compared.clone();
                Ok((language::load(&request, self.registry, self.shipped)?, request))
            }
            None => Ok((graph, request)),
        }
    }
}

/// The program: reads the command line, does what it says and gives the exit status. `shipped` are the pipelines that are
/// compiled in, by name and text.
pub fn main(registry: Registry, shipped: &[(&str, &str)], extras: &Extras) -> ExitCode {
    start_logging();
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(help) => {
            return say_help(&help).map_or_else(|error| ExitCode::from(complain(&error)), |()| ExitCode::SUCCESS);
        }
    };
    if let Command::Worker = command {
        return crate::run::worker::run(registry);
    }
    if let Err(error) = signals::listen() {
        return ExitCode::from(complain(&error));
    }
    // It lives as long as the program: a thread that still decides may outlive the command that asked.
    let registry: &'static Registry = Box::leak(Box::new(registry));
    let bench = Workbench { registry, shipped, gpus: extras.gpus };
    dispatch(command, &bench, extras).unwrap_or_else(|error| ExitCode::from(complain(&error)))
}

fn dispatch(command: Command, bench: &Workbench, extras: &Extras) -> Result<ExitCode> {
    match command {
        Command::Run(args) => return run::run(&args, bench),
        Command::Compare(args) => return run::compare(args, bench),
        Command::Report(args) => report::report(&args, bench, extras)?,
        Command::Plot(args) => plot::plot(&args, bench)?,
        Command::Track(args) => track::track(&args, bench)?,
        Command::Watch(args) => watch::watch(&args)?,
        Command::Plan(args) => return plan::plan(&args, bench),
        Command::Check(args) => check::check(&args, bench)?,
        Command::Show(args) => show::show(&args, bench)?,
        Command::Why(args) => why::why(&args, bench)?,
        Command::Import(args) => import::import(&args, bench)?,
        Command::Doctor(args) => doctor::doctor(&args, bench)?,
        Command::Tag(args) => names::tag(&args, bench)?,
        Command::Tags(args) => names::tags(&args)?,
        Command::Untag(args) => names::untag(&args)?,
        Command::Pin(target) => names::pin(&target, bench)?,
        Command::Unpin(target) => names::unpin(&target, bench)?,
        Command::Runs(args) => runs::runs(&args)?,
        Command::Logs(args) => runs::logs(&args)?,
        Command::Status(args) => runs::status(&args)?,
        Command::Graph(args) => {
            let graph = bench.load(&args.target)?;
            say(&match args.format {
                Format::Mermaid => draw::draw_mermaid(&graph),
                Format::Dot => draw::draw_dot(&graph),
            })?;
        }
        Command::Stages { kind } => say(&language::catalogue(bench.registry, kind.as_deref())?)?,
        Command::Schema => say(&pretty(&language::json_schema(bench.registry)))?,
        Command::Export(args) => export::export(&args, bench)?,
        Command::Init { name, to } => {
            for path in language::init(&name, bench.shipped, &to)? {
                say(&format!("{}\n", path.display()))?;
            }
        }
        Command::Score(args) => score::score(&args, extras)?,
        Command::Cache(command) => return cache::cache(&command),
        Command::Completions { shell } => complete::completions(shell)?,
        Command::Complete { words } => complete::complete(&words, bench)?,
        Command::Worker => unreachable!("workers never come here"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints an error and finds its exit status.
fn complain(error: &anyhow::Error) -> u8 {
    if let Some(diagnostics) = error.downcast_ref::<Diagnostics>() {
        eprint(diagnostics);
        return status::BAD_REQUEST;
    }
    if let Some(Interrupted(signal)) = error.downcast_ref() {
        tell("interrupted");
        return signals::status(*signal);
    }
    tell(&format!("error: {}", printable_lines(&format!("{error:#}"))));
    if let Some(StoreError::NoName { .. } | StoreError::InUse { .. }) = error.downcast_ref() {
        return status::BAD_REQUEST;
    }
    if is_store_trouble(error)
        || error.chain().any(|cause| cause.is::<io::Error>() || cause.is::<::cache::StoreError>())
    {
        status::STORE
    } else {
        status::BAD_REQUEST
    }
}

/// With `--only`, an error where something has to run that is not named.
pub(crate) fn only_named(target: &Target, selection: &Selection, plan: &Plan) -> Result<()> {
    let open = plan.steps.iter().filter(|(node, step)| step.settled().is_none() && !selection.named.contains(node));
    let missing: Vec<String> = open.map(|(node, _)| format!("`{}`", selection.labels[node])).collect();
    if !target.only || missing.is_empty() {
        return Ok(());
    }
    let (verb, missing) = (if missing.len() == 1 { "has" } else { "have" }, missing.join(", "));
    Err(BadRequest(format!(
        "{missing} {verb} no result, and `--only` keeps it from running; name it too, or leave `--only` out"
    ))
    .into())
}

/// What is foreseen of stages without a result, on standard error. An error where one of them cannot work.
pub(crate) fn warn_or_fail(
    graph: &Graph,
    selection: &Selection,
    bench: &Workbench,
    devices: &[String],
    settled: &BTreeMap<NodeIndex, Settled>,
) -> Result<()> {
    let mut foresight = Foresight::new(graph, selection, bench.registry, device::machine(devices));
    let (errors, warnings) = foresight.diagnose(settled);
    if !warnings.diagnostics.is_empty() {
        eprint(&warnings);
    }
    if errors.diagnostics.is_empty() { Ok(()) } else { Err(errors.into()) }
}

fn eprint(diagnostics: &Diagnostics) {
    tell(&if has_colours(&io::stderr()) { format!("{diagnostics:#}") } else { diagnostics.to_string() });
}

/// Opens the store that the flags name, and makes it where there is none.
pub(crate) fn open_store(args: &StoreArgs) -> Result<Arc<Store>> {
    Ok(Arc::new(Store::open(&store_path(args)?)?))
}

/// Opens the store that the flags name, to read. Where there is none that is said, and it is as if it were empty: a
/// pipeline that never ran has none yet.
pub(crate) fn read_store(args: &StoreArgs) -> Result<Store> {
    let store = Store::open_to_read(&store_path(args)?)?;
    if !store.exists()? {
        tell(&format!("note: there is no store at `{}` yet; `--store` names another", args.store.display()));
    }
    Ok(store)
}

/// Opens the store that the flags name, for a command that is of no use without.
pub(crate) fn existing_store(args: &StoreArgs) -> Result<Store> {
    let store = Store::open_to_read(&store_path(args)?)?;
    if store.exists()? {
        return Ok(store);
    }
    Err(BadRequest(format!("there is no store at `{}`; name it with `--store`", args.store.display())).into())
}

/// Absolute, for workers and for links.
fn store_path(args: &StoreArgs) -> Result<PathBuf> {
    let root = &args.store;
    let root = std::path::absolute(root).with_context(|| format!("cannot find `{}`", root.display()))?;
    if root.to_str().is_none() {
        let message =
            format!("the path of the store, `{}`, is not UTF-8; choose another with `--store`", root.display());
        return Err(BadRequest(message).into());
    }
    Ok(root)
}

/// What is said where a stage that is asked for has no result.
fn no_result(stage: &str) -> BadRequest {
    BadRequest(format!("stage `{stage}` has no result yet; run it first: `pipeline run FILE {stage}`"))
}

pub(crate) fn pretty(value: &Json) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("JSON can be written");
    text.push('\n');
    text
}

/// Logs of the program itself go to standard error, as much as `PIPELINE_LOG` asks for.
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PIPELINE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // What fetches files would log addresses, and some of them hold a secret.
    let filter = ["ureq", "ureq_proto", "rustls"].iter().fold(filter, |filter, library| {
        filter.add_directive(format!("{library}=off").parse().expect("a name and a level"))
    });
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A test may have set one up already.
    let _ = logger.try_init();
}
