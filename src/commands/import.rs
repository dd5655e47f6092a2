//! `pipeline import`: files that are there become the result of a stage, as if it had made them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cache::Record;
use contract::{Env, PortType};
use serde_json::json;

use super::names::one_stage;
use super::{BadRequest, Workbench, open_store, say};
use crate::cli::ImportArgs;
use crate::graph::Exit;
use crate::plan::key::{self, Action};
use crate::plan::selection::{self, Wanted};
use crate::plan::{self, Decision, Step};

/// Publishes what is brought under the key that the stage has now.
pub(crate) fn import(args: &ImportArgs, bench: &Workbench) -> Result<()> {
    let target = &args.target;
    let graph = bench.load(target)?;
    let (_, stage, node) = one_stage(&graph, target)?;
    let selection = selection::select(&graph, &Wanted { stages: &target.stages, ..Wanted::default() })?;
    let store = open_store(&target.store)?;
    let plan = plan::plan(&graph, &selection, bench.registry, &store)?;
    let step = plan.steps.iter().find(|(other, _)| *other == node).map(|(_, step)| step);
    let action = match step {
        Some(Step::Decided(Decision::Cached(_))) => {
            let message = format!("`{stage}` has a result, which stays; `pipeline export` copies it out");
            return Err(BadRequest(message).into());
        }
        Some(Step::Decided(decision)) => decision.action(),
        Some(Step::Waits { on }) => {
            let on: Vec<String> = on.iter().map(|node| format!("`{}`", selection.labels[node])).collect();
            let message = format!("the key of `{stage}` depends on {}; run that first, or import it", on.join(", "));
            return Err(BadRequest(message).into());
        }
        Some(Step::Impossible { error }) => return Err(BadRequest(error.clone()).into()),
        None => return Err(selection::unknown(&graph, stage).into()),
    };
    let brought = brought(args, stage, action)?;
    let lock = store.try_lock(&action.key)?;
    let Some(_lock) = lock else {
        return Err(BadRequest(format!("`{stage}` runs just now, in another process")).into());
    };
    let _in_use = store.in_use()?;
    let work = store.begin(&action.key)?;
    let scratch = work.scratch()?;
    let mut outputs = Vec::new();
    let mut facts = BTreeMap::new();
    for Brought { stored, port_type, path } in &brought {
        let folder = work.output(stored)?;
        copy(path, &folder, *port_type)?;
        // What cannot be read as what it is to be is refused here, and not by whoever reads it.
        let env = Env { device: "cpu".into(), threads: 1, scratch: scratch.clone() };
        let value = bench.registry.load(*port_type, &folder, &env);
        let value = value.map_err(|error| {
            // The person knows the original, and not the copy.
            let why = format!("{error:#}").replace(&folder.display().to_string(), &path.display().to_string());
            BadRequest(format!("`{}` cannot be read as a {port_type}: {why}", path.display()))
        })?;
        facts.insert(stored.clone(), value.facts());
        outputs.push((stored.clone(), port_type.name().to_owned()));
    }
    store.keep_preimage(&action.preimage)?;
    let from: Vec<String> = brought.iter().map(|brought| shown(&brought.path)).collect();
    let info = json!({"seconds": 0.0, "facts": facts, "imported": from, "program": env!("CARGO_PKG_VERSION")});
    let record: Record = store.publish(work, &outputs, info)?;
    for (stored, artifact) in &record.outputs {
        say(&format!(
            "{stage}  {stored}  {}  {}\n",
            artifact.digest.short(),
            contract::files::in_words(artifact.bytes)
        ))?;
    }
    Ok(())
}

/// One output, and where its files are.
struct Brought {
    /// Name in the store.
    stored: String,
    port_type: PortType,
    path: PathBuf,
}

/// `PATH`, for a stage with one output that is not its metrics, or `OUTPUT=PATH`.
fn brought(args: &ImportArgs, stage: &str, action: &Action) -> Result<Vec<Brought>> {
    let known: Vec<(Exit, String, PortType)> = key::typed_outputs(&action.subgraph);
    let names = || known.iter().map(|(exit, _, _)| format!("`{exit}=PATH`")).collect::<Vec<_>>().join(", ");
    let mut brought = Vec::new();
    for given in &args.from {
        let named = given.split_once('=').and_then(|(name, path)| {
            let found = known.iter().find(|(exit, _, _)| exit.to_string() == name)?;
            Some((found, path))
        });
        let plain = || {
            let mut main = known.iter().filter(|(_, _, port_type)| *port_type != PortType::Metrics);
            main.next().filter(|_| main.next().is_none()).map(|found| (found, given.as_str()))
        };
        let Some(((_, stored, port_type), path)) = named.or_else(plain) else {
            return Err(BadRequest(format!("`{stage}` has several outputs; say which: {}", names())).into());
        };
        let path = PathBuf::from(path);
        if !path.exists() {
            let message = format!("there is nothing at `{}`{}", path.display(), contract::files::looked_for(&path));
            return Err(BadRequest(message).into());
        }
        brought.push(Brought { stored: stored.clone(), port_type: *port_type, path });
    }
    Ok(brought)
}

/// A folder as it is; a file by itself into the folder.
fn copy(from: &Path, to: &Path, port_type: PortType) -> Result<()> {
    if from.is_dir() {
        std::fs::remove_dir(to).with_context(|| format!("cannot make folder `{}` anew", to.display()))?;
        return Ok(cache::copy_source(from, to, &|_| true).map(drop)?);
    }
    let name = from.file_name().and_then(|name| name.to_str()).context("the file has no name in UTF-8")?;
    // The types that are one file under a name of their own.
    let name = match port_type {
        PortType::Metrics => "metrics.json",
        PortType::Predictions => "predictions.jsonl",
        _ => name,
    };
    Ok(cache::copy_source(from, &to.join(name), &|_| true).map(drop)?)
}

/// Where it was, for people.
fn shown(path: &Path) -> String {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}
