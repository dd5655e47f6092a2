//! What settled stages measured, read from their artifacts.

use anyhow::Result;
use cache::Store;
use contract::{Metrics, PortType};
use serde_json::{Map, Value as Json};

use crate::graph::{Exit, Subgraph};
use crate::plan::Settled;

/// A number, with the interval that the stage itself gave it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    /// The number or its mean.
    pub mean: f64,
    /// 95 % interval.
    pub interval: Option<(f64, f64)>,
}

/// What a stage measured, by name.
///
/// A stage outside of loops: its `metrics.json`, or the last row of its `metrics.jsonl`. A loop: for each of its stages
/// the last row of its `metrics.jsonl`, by the stage's name. A training stage used alone: the last row of its own, with
/// that of its validation under `check`.
pub(crate) fn metrics(settled: &Settled, store: &Store) -> Result<Map<String, Json>> {
    match &settled.action.subgraph {
        Subgraph::Operator(operator) => {
            let ports = operator.ports.outputs.iter().filter(|port| port.port_type == PortType::Metrics);
            let port = ports.map(|port| port.name.as_str()).min_by_key(|name| *name != "metrics");
            read(settled, &Exit::Port(port.unwrap_or("metrics").to_owned()), store)
        }
        Subgraph::Loop(body) => {
            let row = |stage: &String| read(settled, &Exit::Metrics(stage.clone()), store);
            let own = body.stages.keys().next().filter(|_| body.alone);
            let mut metrics = own.map(row).transpose()?.unwrap_or_default();
            for stage in body.stages.keys().filter(|stage| Some(*stage) != own) {
                metrics.insert(stage.clone(), Json::Object(row(stage)?));
            }
            Ok(metrics)
        }
    }
}

/// A number that a stage measured, by its name in [`metrics`]; dots lead into a loop. `None` when it measured none.
pub(crate) fn number(metrics: &Map<String, Json>, name: &str) -> Option<Measured> {
    if let Some(value) = metrics.get(name) {
        return measured(value);
    }
    let (outer, inner) = name.split_once('.')?;
    number(metrics.get(outer)?.as_object()?, inner)
}

/// Whether a stage was to measure that and found nothing to compare: neither a number nor nothing.
pub(crate) fn is_not_measured(metrics: &Map<String, Json>, name: &str) -> bool {
    match (metrics.get(name), name.split_once('.')) {
        (Some(value), _) => value.get("not_measured").is_some(),
        (None, Some((outer, inner))) => {
            metrics.get(outer).and_then(Json::as_object).is_some_and(|inside| is_not_measured(inside, inner))
        }
        (None, None) => false,
    }
}

fn measured(value: &Json) -> Option<Measured> {
    let Some(fields) = value.as_object() else {
        return Some(Measured { mean: value.as_f64()?, interval: None });
    };
    let bounds = fields.get("interval").and_then(Json::as_array);
    let interval = bounds.and_then(|bounds| Some((bounds.first()?.as_f64()?, bounds.get(1)?.as_f64()?)));
    Some(Measured { mean: fields.get("mean")?.as_f64()?, interval })
}

/// The `metrics.json` of an output; that of a training stage is the last row of its `metrics.jsonl`.
fn read(settled: &Settled, output: &Exit, store: &Store) -> Result<Map<String, Json>> {
    match settled.artifact(output) {
        Some(artifact) => Ok(Metrics::load(&store.open_artifact(artifact)?)?.0),
        None => Ok(Map::new()),
    }
}
