//! What settled stages have measured, as trackers take it: a run for each key, with its settings and its numbers over steps.

use std::collections::BTreeMap;

use anyhow::Result;
use cache::Store;
use indexmap::IndexMap;
use petgraph::graph::NodeIndex;
use serde_json::{Map, Value as Json};

use crate::graph::{Graph, Operator, Subgraph};
use crate::ground::terminal::flow;
use crate::plan::Settled;
use crate::plan::results;
use crate::plan::selection::Selection;
use crate::report::curves::{self, clock, measured};

/// A settled stage for a tracker. Its key is its identity: exported twice, it is there once.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tracked {
    pub key: String,
    /// A name for people, unique in the pipeline.
    pub label: String,
    pub kind: String,
    /// The first cell that has it: variant, then settings.
    pub variant: String,
    pub cell: String,
    /// Every setting, defaults too.
    pub params: Vec<(String, String)>,
    /// By tag, numbers over steps.
    pub series: IndexMap<String, Vec<(i64, f64)>>,
    /// Seconds it took when it was made.
    pub seconds: f64,
    /// When that was over, in seconds since 1970; where it is not known, as if it had begun then.
    pub ended: f64,
}

impl Tracked {
    /// When it began, in seconds since 1970.
    pub(crate) fn started(&self) -> f64 {
        self.ended - self.seconds
    }

    /// When a step was: steps are spread over the seconds that the stage took.
    pub(crate) fn clock(&self) -> impl Fn(i64) -> f64 {
        let last = self.series.values().flatten().map(|(step, _)| *step).max().unwrap_or(0).max(1);
        let (started, seconds) = (self.started(), self.seconds);
        move |step| started + seconds * step as f64 / last as f64
    }
}

/// The settled stages that have measured anything, in the order of the plan.
pub(crate) fn tracked(
    graph: &Graph,
    selection: &Selection,
    settled: &BTreeMap<NodeIndex, Settled>,
    store: &Store,
) -> Result<Vec<Tracked>> {
    let mut found = Vec::new();
    for node in &selection.order {
        let Some(settled) = settled.get(node) else { continue };
        let series = series(&graph.subgraphs[*node].name, settled, store)?;
        if series.is_empty() {
            continue;
        }
        let seconds = settled.seconds().unwrap_or(0.0);
        let cell =
            selection.aliases[node].first().and_then(|alias| graph.cells.iter().find(|it| it.label == alias.cell));
        found.push(Tracked {
            key: settled.action.key.to_string(),
            label: selection.labels[node].clone(),
            kind: settled
                .action
                .subgraph
                .operators()
                .first()
                .map_or_else(String::new, |operator| operator.kind.clone()),
            variant: cell.map_or_else(String::new, |cell| cell.variant.clone()),
            cell: cell.map_or_else(String::new, |cell| cell.label.clone()),
            params: params(&graph.subgraphs[*node].subgraph),
            series,
            seconds,
            ended: settled.ended().unwrap_or(seconds),
        });
    }
    Ok(found)
}

/// `train.learn/loss` over updates; `score/rouge_l` at step 0.
fn series(name: &str, settled: &Settled, store: &Store) -> Result<IndexMap<String, Vec<(i64, f64)>>> {
    let mut series: IndexMap<String, Vec<(i64, f64)>> = IndexMap::new();
    for (part, rows) in curves::rows(settled, store)? {
        let place = part.map_or_else(|| name.to_owned(), |part| format!("{name}.{part}"));
        for (index, row) in rows.iter().enumerate() {
            let step = clock(row).map_or(index as i64, |(_, at)| at as i64);
            for (measure, value) in measured(row) {
                series.entry(format!("{place}/{measure}")).or_default().push((step, value));
            }
        }
    }
    if let Subgraph::Operator(_) = settled.action.subgraph {
        add(&mut series, name, &results::metrics(settled, store)?);
    }
    Ok(series)
}

fn add(series: &mut IndexMap<String, Vec<(i64, f64)>>, place: &str, metrics: &Map<String, Json>) {
    for (measure, value) in metrics {
        if let Some(number) = curves::number(value) {
            series.insert(format!("{place}/{measure}"), vec![(0, number)]);
        }
        if let Some([low, high]) = value.get("interval").and_then(Json::as_array).map(Vec::as_slice)
            && let (Some(low), Some(high)) = (low.as_f64(), high.as_f64())
        {
            series.insert(format!("{place}/{measure}/low"), vec![(0, low)]);
            series.insert(format!("{place}/{measure}/high"), vec![(0, high)]);
        }
    }
}

fn params(subgraph: &Subgraph) -> Vec<(String, String)> {
    let fields = |place: &str, operator: &Operator| -> Vec<(String, String)> {
        let config = operator.config.as_object().into_iter().flatten();
        config.map(|(field, value)| (format!("{place}{field}"), flow(value))).collect()
    };
    match subgraph {
        Subgraph::Operator(operator) => fields("", operator),
        Subgraph::Loop(body) if body.alone => {
            body.stages.values().take(1).flat_map(|it| fields("", &it.operator)).collect()
        }
        Subgraph::Loop(body) => {
            body.stages.iter().flat_map(|(part, it)| fields(&format!("{part}."), &it.operator)).collect()
        }
    }
}
