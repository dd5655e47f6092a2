//! `pipeline export`: copies an artifact out of the store; a model that others open gets a card.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use cache::{Artifact, Store};
use petgraph::graph::NodeIndex;

use super::{BadRequest, Workbench, existing_store, no_result, report, say};
use crate::cli::ExportArgs;
use crate::graph::{Exit, Graph};
use crate::ground::signals::{self, Watch};
use crate::plan;
use crate::plan::selection::{self, Selection, Wanted};
use crate::report::card::Card;

pub(crate) fn export(args: &ExportArgs, bench: &Workbench) -> Result<()> {
    let [name] = args.target.stages.as_slice() else {
        return Err(BadRequest("name one artifact to export, as `STAGE` or `STAGE.PORT`".into()).into());
    };
    let graph = bench.load(&args.target)?;
    let (stage, port) = split(&graph, name);
    // Of the one cell, what reads the artifact too: a card says how a model scores.
    let wanted = selection::select(&graph, &Wanted { stages: &[stage.to_owned()], ..Wanted::default() })?;
    let node = node(&graph, &wanted, stage)?;
    let selection = selection::select(&graph, &Wanted::default())?;
    let store = existing_store(&args.target.store)?;
    let all = plan::plan(&graph, &selection, bench.registry, &store)?.settled();
    let settled = all.get(&node).ok_or_else(|| no_result(stage))?;
    let exits: BTreeMap<String, (Exit, &Artifact)> =
        settled.outputs().into_iter().map(|(exit, artifact)| (exit.to_string(), (exit, artifact))).collect();
    let outputs: BTreeMap<String, &Artifact> =
        exits.iter().map(|(output, (_, artifact))| (output.clone(), *artifact)).collect();
    let (port, artifact) = match port {
        Some(port) => outputs.get_key_value(port),
        None if outputs.keys().filter(|port| !port.ends_with("metrics")).count() == 1 => {
            outputs.iter().find(|(port, _)| !port.ends_with("metrics"))
        }
        None => outputs.iter().next().filter(|_| outputs.len() == 1),
    }
    .ok_or_else(|| {
        let known: Vec<_> = outputs.keys().map(|port| format!("`{stage}.{port}`")).collect();
        BadRequest(format!("`{name}` names no single output; expected one of {}", known.join(", ")))
    })?;
    refuse_inside(&args.to, &store)?;
    let from = store.open_artifact(artifact)?;
    let cell = graph.cells.iter().find(|cell| cell.names.values().any(|other| *other == node));
    let card = match (kind_of(&from), cell) {
        (Some(is_adapter), Some(cell)) => {
            let name = args.to.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let file = args.target.file.display().to_string();
            let command = report::command(&args.target, &args.target.request(), &file).of_cell(cell, stage);
            let (graph, output) = (&graph, &exits[port].0);
            let card =
                Card { name: &name, graph, cell, node, output, settled: &all, store: &store, is_adapter, command };
            Some(card.markdown()?)
        }
        _ => None,
    };
    copy(&from, &args.to, card.as_deref(), &signals::watch())?;
    say(&format!("{}\n", args.to.display()))?;
    tracing::info!(stage, port, digest = %artifact.digest, "exported");
    Ok(())
}

/// What is copied into the store would be foreign there, and removed some day.
fn refuse_inside(to: &Path, store: &Store) -> Result<()> {
    let to = std::path::absolute(to).with_context(|| format!("cannot find `{}`", to.display()))?;
    // The nearest folder that is there decides, wherever links lead.
    let there = to.ancestors().find_map(|folder| fs::canonicalize(folder).ok());
    let root = fs::canonicalize(store.root()).context("cannot find the store")?;
    if there.is_some_and(|there| there.starts_with(root)) {
        let message =
            format!("`{}` is inside the store, which keeps its own files only; choose a folder outside", to.display());
        return Err(BadRequest(message).into());
    }
    Ok(())
}

/// `STAGE.PORT` in two; a name that is a stage as it stands has no port.
fn split<'n>(graph: &Graph, name: &'n str) -> (&'n str, Option<&'n str>) {
    let is_stage = |name: &str| graph.cells.iter().any(|cell| cell.names.contains_key(name));
    match name.split_once('.') {
        Some((stage, port)) if !is_stage(name) => (stage, Some(port)),
        _ => (name, None),
    }
}

/// The one subgraph that the stage's name stands for.
fn node(graph: &Graph, selection: &Selection, stage: &str) -> Result<NodeIndex> {
    let nodes: BTreeSet<_> = graph.cells.iter().filter_map(|cell| selection::find(graph, cell, stage)).collect();
    match nodes.iter().collect::<Vec<_>>().as_slice() {
        [node] => Ok(**node),
        several => {
            let labels: Vec<_> = several.iter().map(|node| format!("`{}`", selection.labels[node])).collect();
            let message = format!("`{stage}` stands for {}; select one variant", labels.join(", "));
            Err(BadRequest(message).into())
        }
    }
}

/// Whether a folder is a model that others open, and then whether it is an adapter; nothing for what has a card already.
fn kind_of(folder: &Path) -> Option<bool> {
    let has = |file: &str| folder.join(file).is_file();
    if has("README.md") {
        return None;
    }
    match (has("config.json"), has("adapter_config.json")) {
        (true, _) => Some(false),
        (false, true) => Some(true),
        (false, false) => None,
    }
}

/// How many bytes are copied before it is asked whether to go on.
const PART: u64 = 16 << 20;

/// Copies a folder whole, with a card where there is one: the copy appears under its name only when complete, and nothing is
/// left of one that is not.
fn copy(from: &Path, to: &Path, card: Option<&str>, watch: &Watch) -> Result<()> {
    if to.exists() && fs::read_dir(to).map_or(true, |mut entries| entries.next().is_some()) {
        bail!(BadRequest(format!("`{}` is already there; choose a new folder", to.display())));
    }
    let mut name = to.file_name().context("the folder to export to has no name")?.to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let draft = to.with_file_name(name);
    let write = |card| fs::write(draft.join("README.md"), card).context("cannot write the model's card");
    let outcome = copy_tree(from, &draft, watch)
        .and_then(|()| card.map_or(Ok(()), write))
        .and_then(|()| fs::rename(&draft, to).with_context(|| format!("cannot make folder `{}`", to.display())));
    if outcome.is_err() {
        // What is left of the draft helps nobody.
        let _ = fs::remove_dir_all(&draft);
    }
    outcome
}

fn copy_tree(from: &Path, to: &Path, watch: &Watch) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make folder `{}`", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read folder `{}`", from.display()))? {
        let entry = entry.with_context(|| format!("cannot read folder `{}`", from.display()))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy_tree(&source, &target, watch)?;
        } else {
            // Bytes only: files of the store are read-only, and their copies belong to the user.
            let mut reader = fs::File::open(&source).with_context(|| format!("cannot read `{}`", source.display()))?;
            let mut writer =
                fs::File::create(&target).with_context(|| format!("cannot write `{}`", target.display()))?;
            loop {
                watch.check()?;
                let copied = std::io::copy(&mut (&mut reader).take(PART), &mut writer);
                if copied.with_context(|| format!("cannot write `{}`", target.display()))? < PART {
                    break;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_is_interrupted_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("deep")).unwrap();
        fs::write(from.join("deep/file"), "text").unwrap();
        let error = copy(&from, &to, None, &Watch::after(15)).unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&signals::Interrupted(15)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "what is left is what was there");
    }
}
