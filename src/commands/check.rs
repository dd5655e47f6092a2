//! `pipeline check`: reads a pipeline and says whether it is right; with `--origin`, what it comes to.

use std::collections::BTreeMap;

use anyhow::Result;
use contract::files::counted;
use serde_json::Value as Json;

use super::{Workbench, say, warn_or_fail};
use crate::cli::CheckArgs;
use crate::graph::{Operator, Subgraph};
use crate::ground::source::Place;
use crate::plan::selection;
use crate::run::device;

pub(crate) fn check(args: &CheckArgs, bench: &Workbench) -> Result<()> {
    let graph = bench.load(&args.target)?;
    let selection = selection::select(&graph, &args.target.wanted(&[]))?;
    let devices = device::devices(&args.target.device, bench.gpus)?;
    warn_or_fail(&graph, &selection, bench, &devices, &BTreeMap::new())?;
    let mut text = String::new();
    for node in selection.order.iter().filter(|_| args.origin) {
        let label = &selection.labels[node];
        match &graph.subgraphs[*node].subgraph {
            Subgraph::Operator(operator) => text += &origins(label, operator),
            Subgraph::Loop(body) => {
                for (stage, inner) in &body.stages {
                    text += &origins(&format!("{label}.{stage}"), &inner.operator);
                }
            }
        }
    }
    let (cells, stages) =
        (counted(graph.cells.len() as u64, "cell"), counted(selection.order.len() as u64, "distinct stage"));
    say(&format!("{text}ok: {cells}, {stages}\n"))
}

/// A line for every value of a stage: path, value, place.
fn origins(stage: &str, operator: &Operator) -> String {
    let mut values = Vec::new();
    flatten(&operator.config, String::new(), &mut values);
    let lines = values.into_iter().map(|(path, value)| {
        let place = match place(&operator.places, &path) {
            Some(Place { file, line, column }) => format!("{file}:{line}:{column}"),
            None => "default".into(),
        };
        format!("{stage}.{path} = {value}  ({place})\n")
    });
    lines.collect()
}

fn flatten(value: &Json, path: String, found: &mut Vec<(String, String)>) {
    match value {
        Json::Object(fields) if !fields.is_empty() => {
            for (name, inner) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(inner, path, found);
            }
        }
        other => found.push((path, other.to_string())),
    }
}

/// Where a value is written, or the mapping that it is in.
fn place<'p>(places: &'p BTreeMap<String, Place>, path: &str) -> Option<&'p Place> {
    let mut path = path;
    loop {
        if let Some(place) = places.get(path) {
            return Some(place);
        }
        path = path.rsplit_once('.')?.0;
    }
}
