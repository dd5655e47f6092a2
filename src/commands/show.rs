//! `pipeline show`: keys, outputs and metrics.
//!
//! The JSON form: `{"stages": {NAME: {"key", "status", "outputs": {PORT: {"digest", "path"}}, "metrics": {...}}}}`. A stage
//! of a loop is `LOOP.NAME`, with status, metrics and, once they exist, its rows as output `metrics`. When several cells
//! are selected: `{"cells": {LABEL: {"stages": ...}}}`. `key` is null where it cannot be known yet. Every `path` has been
//! verified and can be read in place.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use cache::{Artifact, Key, Store};
use petgraph::graph::NodeIndex;
use serde_json::{Map, Value as Json, json};

use super::plan::{TO_RUN, word};
use super::{Workbench, pretty, read_store, say};
use crate::cli::ShowArgs;
use crate::graph::{Cell, Exit, Graph, Subgraph};
use crate::ground::trouble::is_damage;
use crate::plan::results;
use crate::plan::selection;
use crate::plan::{self, Settled, Step};

pub(crate) fn show(args: &ShowArgs, bench: &Workbench) -> Result<()> {
    let graph = bench.load(&args.target)?;
    let selection = selection::select(&graph, &args.target.wanted(&[]))?;
    let store = read_store(&args.target.store)?;
    let plan = plan::plan(&graph, &selection, bench.registry, &store)?;
    let steps: BTreeMap<NodeIndex, Step> = plan.steps.into_iter().collect();
    let mut cells = Map::new();
    for cell in &graph.cells {
        cells.insert(cell.label.clone(), json!({ "stages": stages(&graph, cell, &steps, &store)? }));
    }
    let shown = match cells.len() {
        1 => cells.into_iter().next().map_or(Json::Null, |(_, cell)| cell),
        _ => json!({ "cells": cells }),
    };
    if args.json { say(&pretty(&shown)) } else { say(&text(&shown)) }
}

fn stages(graph: &Graph, cell: &Cell, steps: &BTreeMap<NodeIndex, Step>, store: &Store) -> Result<Map<String, Json>> {
    let mut stages = Map::new();
    for (name, node) in &cell.names {
        let Some(step) = steps.get(node) else { continue };
        let key = step.decision().map(|decision| decision.action().key);
        let subgraph = &graph.subgraphs[*node].subgraph;
        match step.settled() {
            Some(settled) => match add_settled(name, settled, store, &mut stages) {
                // Found out only now, where all bytes are read: it has no result any more.
                Err(error) if is_damage(&error) => add_missing(name, subgraph, key, TO_RUN, &mut stages),
                added => added?,
            },
            None => add_missing(name, subgraph, key, word(step), &mut stages),
        }
    }
    Ok(stages)
}

fn add_settled(name: &str, settled: &Settled, store: &Store, stages: &mut Map<String, Json>) -> Result<()> {
    let metrics = results::metrics(settled, store)?;
    let mut outputs = Map::new();
    let mut inner: BTreeMap<String, Json> = BTreeMap::new();
    for (output, artifact) in settled.outputs() {
        let shown = shown(artifact, store)?;
        match (&settled.action.subgraph, output) {
            // The rows of a training stage used alone are its own.
            (Subgraph::Loop(body), Exit::Metrics(stage))
                if body.alone && body.stages.get_index_of(&stage) == Some(0) =>
            {
                outputs.insert("metrics".to_owned(), shown);
            }
            (Subgraph::Loop(body), Exit::Metrics(stage)) if !body.alone => drop(inner.insert(stage, shown)),
            (_, output) => drop(outputs.insert(output.to_string(), shown)),
        }
    }
    let key = settled.action.key.to_string();
    let whole = if inner.is_empty() { Json::Object(metrics.clone()) } else { json!({}) };
    stages.insert(name.into(), json!({"key": key, "status": "cached", "outputs": outputs, "metrics": whole}));
    for stage in settled.action.subgraph.written_loop().into_iter().flat_map(|body| body.stages.keys()) {
        let outputs: Map<_, _> = inner.remove(stage).map(|rows| ("metrics".to_owned(), rows)).into_iter().collect();
        let metrics = metrics.get(stage).cloned().unwrap_or_else(|| json!({}));
        let stage_json = json!({"key": key, "status": "cached", "outputs": outputs, "metrics": metrics});
        stages.insert(format!("{name}.{stage}"), stage_json);
    }
    Ok(())
}

/// A stage without a result: its key, if that can be told, and the word for what is to be done.
fn add_missing(name: &str, subgraph: &Subgraph, key: Option<Key>, status: &str, stages: &mut Map<String, Json>) {
    let shown = json!({"key": key, "status": status, "outputs": {}, "metrics": {}});
    stages.insert(name.into(), shown.clone());
    for stage in subgraph.written_loop().into_iter().flat_map(|body| body.stages.keys()) {
        stages.insert(format!("{name}.{stage}"), shown.clone());
    }
}

fn shown(artifact: &Artifact, store: &Store) -> Result<Json> {
    let path = store.open_artifact(artifact)?;
    Ok(json!({"digest": artifact.digest.to_string(), "path": path.display().to_string()}))
}

/// The same for people.
fn text(shown: &Json) -> String {
    if let Some(cells) = shown.get("cells").and_then(Json::as_object) {
        return cells.iter().map(|(label, cell)| format!("== {label}\n{}", text(cell))).collect();
    }
    let stages = shown.get("stages").and_then(Json::as_object).into_iter().flatten();
    stages.map(|(name, stage)| stage_text(name, stage)).collect()
}

fn stage_text(name: &str, stage: &Json) -> String {
    let key = stage["key"].as_str().map_or(String::new(), |key| format!("  {}", &key[..12]));
    let mut text = format!("{name}  {}{key}\n", stage["status"].as_str().unwrap_or_default());
    for (port, output) in stage["outputs"].as_object().into_iter().flatten() {
        text += &format!("  {port}: {}\n", output["path"].as_str().unwrap_or_default());
    }
    let rows = last_of(stage).map(|rows| format!("   (the last of {rows} rows)")).unwrap_or_default();
    for (metric, value) in stage["metrics"].as_object().into_iter().flatten() {
        text += &format!("  {metric} = {value}{rows}\n");
    }
    text
}

/// How many rows of metrics a stage has, where it has several: what is shown is the last.
fn last_of(stage: &Json) -> Option<usize> {
    let folder = stage["outputs"]["metrics"]["path"].as_str()?;
    let rows = fs::read_to_string(Path::new(folder).join("metrics.jsonl")).ok()?.lines().count();
    (rows > 1).then_some(rows)
}
