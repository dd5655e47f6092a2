//! Training curves, from the rows that the stages of loops have kept: one curve for each line of a comparison, the mean of its
//! repeats with their range.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use cache::Store;
use chart::{Axis, Lines, Series};
use indexmap::IndexMap;
use petgraph::graph::NodeIndex;
use serde_json::{Map, Value as Json};

use crate::graph::{Cell, Exit, Graph, Subgraph};
use crate::plan::Settled;

/// A row of metrics.
pub(crate) type Row = Map<String, Json>;

/// Rows of every stage of a loop, by its name there; of a stage that trains alone without one.
pub(crate) type Rows = Vec<(Option<String>, Vec<Row>)>;

/// Curves over the updates of a loop, for one number that a stage of it measures.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Curves {
    /// `train.learn`, or the stage itself where it trains alone.
    pub stage: String,
    /// What is measured.
    pub name: String,
    /// Whether all lines share the stage.
    pub is_shared: bool,
    pub lines: Lines,
}

/// The clock of a row, best first.
const CLOCKS: [&str; 3] = ["update", "round", "epoch"];

/// Rows of every stage of a loop, whole where the loop has a result.
pub(crate) fn rows(settled: &Settled, store: &Store) -> Result<Rows> {
    let Subgraph::Loop(body) = &settled.action.subgraph else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for stage in body.stages.keys() {
        let Some(artifact) = settled.artifact(&Exit::Metrics(stage.clone())) else { continue };
        let path = store.open_artifact(artifact)?.join("metrics.jsonl");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let rows: Result<Vec<Row>, _> = text.lines().map(serde_json::from_str).collect();
        let rows = rows.with_context(|| format!("`{}` is not JSON lines", path.display()))?;
        let is_own = body.alone && body.stages.get_index_of(stage) == Some(0);
        found.push(((!is_own).then(|| stage.clone()), rows));
    }
    Ok(found)
}

/// A number of a row: itself, or its mean.
pub(crate) fn number(value: &Json) -> Option<f64> {
    value.as_f64().or_else(|| value.get("mean")?.as_f64())
}

/// Where a row is, and what that counts.
pub(crate) fn clock(row: &Row) -> Option<(&'static str, f64)> {
    CLOCKS.iter().find_map(|clock| Some((*clock, row.get(*clock)?.as_f64()?)))
}

/// The numbers of a row that are no clock.
pub(crate) fn measured(row: &Row) -> impl Iterator<Item = (&String, f64)> {
    row.iter()
        .filter(|(name, _)| !CLOCKS.contains(&name.as_str()))
        .filter_map(|(name, value)| Some((name, number(value)?)))
}

/// A line of a comparison: what it is called, and its cells.
pub(crate) struct Group<'g> {
    pub label: String,
    pub cells: Vec<&'g Cell>,
}

/// What the stages of loops of these lines have measured; `rows_of` gives the rows of a subgraph. What all lines share comes
/// last.
pub(crate) fn curves(
    graph: &Graph,
    groups: &[Group<'_>],
    rows_of: &mut dyn FnMut(NodeIndex) -> Result<Rows>,
) -> Result<Vec<Curves>> {
    // Lines that have the same subgraphs under a name have one curve.
    let mut by_name: IndexMap<String, IndexMap<Vec<NodeIndex>, Vec<&str>>> = IndexMap::new();
    for group in groups {
        let names: IndexMap<&String, ()> =
            group.cells.iter().flat_map(|cell| cell.names.keys()).map(|name| (name, ())).collect();
        for name in names.into_keys() {
            let mut nodes: Vec<NodeIndex> =
                group.cells.iter().filter_map(|cell| cell.names.get(name).copied()).collect();
            nodes.sort();
            nodes.dedup();
            if nodes.iter().any(|node| matches!(graph.subgraphs[*node].subgraph, Subgraph::Loop(_))) {
                by_name.entry(name.clone()).or_default().entry(nodes).or_default().push(&group.label);
            }
        }
    }
    let mut found = Vec::new();
    for (name, lines) in by_name {
        let is_shared = lines.len() == 1;
        // By part, number and clock: a curve for each line.
        let mut charts: IndexMap<Which, Vec<(String, Points)>> = IndexMap::new();
        for (nodes, labels) in lines {
            let label = if is_shared { String::new() } else { labels.join(", ") };
            let mut points: IndexMap<Which, Points> = IndexMap::new();
            for node in nodes {
                for (part, rows) in rows_of(node)? {
                    for row in &rows {
                        let Some((clock, at)) = clock(row) else { continue };
                        for (measure, value) in measured(row) {
                            points.entry((part.clone(), measure.clone(), clock)).or_default().push((at, value));
                        }
                    }
                }
            }
            for (which, points) in points {
                charts.entry(which).or_default().push((label.clone(), points));
            }
        }
        // The loss first, then in the order in which they were measured.
        let parts: Vec<Option<String>> = charts.keys().map(|(part, ..)| part.clone()).collect();
        charts.sort_by_cached_key(|(part, measure, _), _| {
            (parts.iter().position(|other| other == part), measure != "loss")
        });
        for ((part, measure, clock), curves) in charts {
            // What never changes, or was measured once, is no curve.
            let is_same = |of: fn(&(f64, f64)) -> f64| {
                let mut all = curves.iter().flat_map(|(_, points)| points).map(of);
                let first = all.next();
                all.all(|value| Some(value) == first)
            };
            if is_same(|point| point.0) || is_same(|point| point.1) {
                continue;
            }
            let stage = part.map_or_else(|| name.clone(), |part| format!("{name}.{part}"));
            let series = curves.into_iter().map(|(label, points)| summarised(label, points)).collect();
            let (title, x, y) = (format!("{stage}: {measure}"), Axis::of(clock), Axis::of(&measure));
            let lines = Lines { title, description: None, x, y, series };
            found.push(Curves { stage, name: measure, is_shared, lines });
        }
    }
    found.sort_by_key(|curves| curves.is_shared);
    Ok(found)
}

/// Part of a loop, number and clock.
type Which = (Option<String>, String, &'static str);

/// A number at a time, of all repeats.
type Points = Vec<(f64, f64)>;

/// Points of a curve on a page: neighbours become their mean, with their range as a band.
const POINTS: usize = 80;

fn summarised(label: String, points: Points) -> Series {
    let (low, high) =
        points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), point| (a.min(point.0), b.max(point.0)));
    let mut times: Vec<f64> = points.iter().map(|point| point.0).collect();
    times.sort_by(f64::total_cmp);
    times.dedup();
    let is_long = times.len() > POINTS;
    let place = |time: f64| match is_long {
        true => (((time - low) / (high - low) * POINTS as f64) as u64).min(POINTS as u64 - 1),
        false => times.partition_point(|other| *other < time) as u64,
    };
    let mut places: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
    for point in points {
        places.entry(place(point.0)).or_default().push(point);
    }
    let mean = |of: &mut dyn Iterator<Item = f64>, count: usize| of.sum::<f64>() / count as f64;
    let mut series = Series { label, ..Series::default() };
    for points in places.values() {
        let count = points.len();
        let at = mean(&mut points.iter().map(|point| point.0), count);
        series.points.push((at, mean(&mut points.iter().map(|point| point.1), count)));
        let ends =
            points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), point| (a.min(point.1), b.max(point.1)));
        series.band.push(ends);
    }
    if series.band.iter().all(|(low, high)| low == high) {
        series.band.clear();
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_is_its_means_and_ranges() {
        let points: Points =
            (0..2000).flat_map(|x| [(f64::from(x), f64::from(x)), (f64::from(x), f64::from(x) + 2.0)]).collect();
        let series = summarised("a".into(), points);
        assert_eq!((series.points.len(), series.band.len()), (POINTS, POINTS));
        assert_eq!(series.points[0], (12.0, 13.0), "the first 25 updates of two repeats");
        assert_eq!(series.band[0], (0.0, 26.0));
        let short = summarised("b".into(), vec![(1.0, 5.0), (2.0, 6.0)]);
        assert_eq!(short.points, [(1.0, 5.0), (2.0, 6.0)]);
        assert!(short.band.is_empty());
    }
}
