//! The table at the end of a run: a row for each compared variant, with intervals.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use cache::{Digest, Store};
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle, presets};
use indexmap::IndexMap;
use petgraph::graph::NodeIndex;
use serde_json::{Map, Value as Json};

use crate::graph::{Cell, Graph, MetricRef, Report};
use crate::ground::terminal::figure;
use crate::plan::Settled;
use crate::plan::results::{self, Measured};

/// Rows and columns, ready to be written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ReportTable {
    /// Headings, that of the labels first.
    pub headings: Vec<String>,
    /// Labels and figures.
    pub rows: Vec<Vec<String>>,
    /// What the intervals are, and the file's own caption.
    pub caption: Vec<String>,
}

/// Builds the table that the file asks for, of what is settled; `None` when it asks for none.
///
/// Cells that differ only in what an ablation repeats over make one row: mean ± half the width of the 95 % t-interval.
pub(crate) fn table(
    graph: &Graph,
    settled: &BTreeMap<NodeIndex, Settled>,
    store: &Store,
) -> Result<Option<ReportTable>> {
    let Some(report) = graph.cells.iter().find_map(|cell| cell.report.as_ref()) else { return Ok(None) };
    let numbers = Numbers { settled, store };
    let mut intervals = Intervals::default();
    let headings: Vec<&String> = report.metrics.keys().chain(further_headings(report)).collect();
    let mut row = |label: String, cells: &[&Cell], metrics: &IndexMap<String, MetricRef>, seconds: &[String]| {
        let mut row = vec![label];
        for heading in &headings {
            let metric = metrics.get(*heading);
            row.push(metric.map_or(Ok(String::new()), |metric| numbers.figure(cells, metric, &mut intervals))?);
        }
        if !report.seconds.is_empty() {
            row.push(numbers.seconds(cells, seconds));
        }
        Ok::<_, anyhow::Error>(row)
    };
    let groups = groups(graph, report);
    let Some(first) = groups.first() else { return Ok(None) };
    let mut rows = Vec::new();
    for group in &groups {
        rows.push(row(row_label(group[0]), group, &report.metrics, &report.seconds)?);
    }
    for (label, metrics) in &report.rows {
        rows.push(row(label.clone(), first, metrics, &[])?);
    }
    for (group, baseline) in paired(&groups, report) {
        let mut row = vec![format!("{} - {}", row_label(group[0]), row_label(baseline[0]))];
        for heading in &headings {
            let metric = report.metrics.get(*heading);
            row.push(metric.map_or(Ok(String::new()), |m| numbers.difference(group, baseline, m, &mut intervals))?);
        }
        row.extend((!report.seconds.is_empty()).then(String::new));
        rows.push(row);
    }
    // Of a run of some stages only, what they did not reach has nothing to show.
    rows.retain(|row| row[1..].iter().any(|figure| !matches!(figure.as_str(), "" | "-")));
    if rows.is_empty() {
        return Ok(None);
    }
    let label = ["variant".to_owned()].into_iter();
    let seconds = (!report.seconds.is_empty()).then(|| "seconds".to_owned());
    let headings = label.chain(headings.into_iter().cloned()).chain(seconds).collect();
    Ok(Some(ReportTable { headings, rows, caption: caption(report, &intervals) }))
}

/// The stages whose figures a report shows.
pub(crate) fn stages(graph: &Graph) -> BTreeSet<NodeIndex> {
    let Some(report) = graph.cells.iter().find_map(|cell| cell.report.as_ref()) else { return BTreeSet::new() };
    let metrics = report.metrics.values().chain(report.rows.values().flat_map(|row| row.values()));
    let names: BTreeSet<&String> = metrics.map(|metric| &metric.stage).chain(&report.seconds).collect();
    let of_cell = |cell: &Cell| names.iter().filter_map(|name| cell.names.get(*name).copied()).collect::<Vec<_>>();
    graph.cells.iter().flat_map(of_cell).collect()
}

/// Headings that only further rows have.
fn further_headings(report: &Report) -> impl Iterator<Item = &String> {
    let mut seen: Vec<&String> = report.metrics.keys().collect();
    let all = report.rows.values().flat_map(|row| row.keys());
    all.filter(move |heading| {
        let new = !seen.contains(heading);
        seen.push(heading);
        new
    })
}

fn caption(report: &Report, intervals: &Intervals) -> Vec<String> {
    let mut caption = Vec::new();
    if !intervals.repeats.is_empty() {
        let counts: Vec<String> = intervals.repeats.iter().map(usize::to_string).collect();
        let paired = if report.baseline.is_some() { "; differences are paired by repeat" } else { "" };
        let over = counts.join(" or ");
        caption.push(format!("±: half the width of the 95 % t-interval of the mean over {over} repeats{paired}"));
    }
    caption.extend(intervals.same.iter().map(|(row, stage)| {
        format!("`{row}`: some of its repeats are none, for `{stage}` has the same result in them; it counts once")
    }));
    if intervals.own {
        caption.push("[low, high]: 95 % interval, as the stage measured it".to_owned());
    }
    caption.extend(report.caption.clone());
    caption
}

/// What sorts of intervals the table shows.
#[derive(Default)]
struct Intervals {
    /// Over how many repeats there are figures.
    repeats: BTreeSet<usize>,
    own: bool,
    /// Rows, and stages that have one result in several repeats.
    same: BTreeSet<(String, String)>,
}

/// Cells of one row each, in the order that the report compares variants in.
fn groups<'g>(graph: &'g Graph, report: &Report) -> Vec<Vec<&'g Cell>> {
    let mut groups: Vec<Vec<&Cell>> = Vec::new();
    let position = |cell: &Cell| report.compare.iter().position(|variant| *variant == cell.variant);
    let mut cells: Vec<&Cell> =
        graph.cells.iter().filter(|cell| report.compare.is_empty() || position(cell).is_some()).collect();
    cells.sort_by_key(|cell| position(cell));
    for cell in cells {
        match groups.iter_mut().find(|group| group[0].variant == cell.variant && group[0].over == cell.over) {
            Some(group) => group.push(cell),
            None => groups.push(vec![cell]),
        }
    }
    groups
}

/// Every group with the one it is measured against: that of the baseline with the same settings.
fn paired<'a, 'g>(groups: &'a [Vec<&'g Cell>], report: &Report) -> Vec<(&'a [&'g Cell], &'a [&'g Cell])> {
    let Some(baseline) = &report.baseline else { return Vec::new() };
    let others = groups.iter().filter(|group| group[0].variant != *baseline);
    let pair = others.filter_map(|group| {
        let mut against = groups.iter().filter(|other| other[0].variant == *baseline);
        Some((group.as_slice(), against.find(|other| other[0].over == group[0].over)?.as_slice()))
    });
    pair.collect()
}

fn row_label(cell: &Cell) -> String {
    let show = |value: &Json| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let over = cell.over.iter().map(|(path, value)| format!(" {path}={}", show(value)));
    format!("{}{}", cell.variant, over.collect::<String>())
}

struct Numbers<'a> {
    settled: &'a BTreeMap<NodeIndex, Settled>,
    store: &'a Store,
}

impl Numbers<'_> {
    /// One figure of the table; `-` when the stage has not run or is not there.
    fn figure(&self, cells: &[&Cell], metric: &MetricRef, intervals: &mut Intervals) -> Result<String> {
        let mut found = Vec::new();
        let mut seen: BTreeMap<Vec<Digest>, &Cell> = BTreeMap::new();
        for cell in cells {
            // A stage that all repeats share, such as a teacher's score, is one measurement. What was made with another
            // setting and has the same bytes is no other.
            let Some(settled) = self.stage(cell, &metric.stage) else { continue };
            match seen.insert(digests(settled), cell) {
                None => found.extend(self.measured(cell, metric)?),
                Some(other) => {
                    let is_meant = other.names.get(&metric.stage) == cell.names.get(&metric.stage)
                        && other.names.values().ne(cell.names.values());
                    if !is_meant {
                        intervals.same.insert((row_label(cell), metric.stage.clone()));
                    }
                }
            }
        }
        Ok(match found.as_slice() {
            [] if self.is_not_measured(cells, metric)? => "not measured".into(),
            [] => "-".into(),
            [Measured { mean, interval: None }] => figure(*mean),
            [Measured { mean, interval: Some((low, high)) }] => {
                intervals.own = true;
                format!("{} [{}, {}]", figure(*mean), figure(*low), figure(*high))
            }
            several => {
                let means: Vec<f64> = several.iter().map(|measured| measured.mean).collect();
                self.over_repeats(&means, intervals)
            }
        })
    }

    fn over_repeats(&self, numbers: &[f64], intervals: &mut Intervals) -> String {
        let (mean, half) = t_interval(numbers);
        intervals.repeats.insert(numbers.len());
        format!("{} ± {}", figure(mean), figure(half))
    }

    /// How much more `cells` have than `baseline`, repeat by repeat.
    fn difference(
        &self,
        cells: &[&Cell],
        baseline: &[&Cell],
        metric: &MetricRef,
        intervals: &mut Intervals,
    ) -> Result<String> {
        let mut differences = Vec::new();
        let mut seen = BTreeSet::new();
        for cell in cells {
            let Some(other) = baseline.iter().find(|other| other.repeat == cell.repeat) else { continue };
            let results = [cell, *other].map(|cell| self.stage(cell, &metric.stage).map(digests));
            if let (Some(own), Some(other)) = (self.measured(cell, metric)?, self.measured(other, metric)?)
                && seen.insert(results)
            {
                differences.push(own.mean - other.mean);
            }
        }
        Ok(match differences.as_slice() {
            [] => "-".into(),
            [one] => figure(*one),
            several => self.over_repeats(several, intervals),
        })
    }

    fn is_not_measured(&self, cells: &[&Cell], metric: &MetricRef) -> Result<bool> {
        for settled in cells.iter().filter_map(|cell| self.stage(cell, &metric.stage)) {
            if results::is_not_measured(&results::metrics(settled, self.store)?, &metric.metric) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn measured(&self, cell: &Cell, metric: &MetricRef) -> Result<Option<Measured>> {
        let Some(settled) = self.stage(cell, &metric.stage) else { return Ok(None) };
        let metrics: Map<String, Json> = results::metrics(settled, self.store)?;
        Ok(results::number(&metrics, &metric.metric))
    }

    /// Seconds of the stages when they were made, the mean over the cells.
    fn seconds(&self, cells: &[&Cell], stages: &[String]) -> String {
        let of_cell = |cell: &&Cell| -> Option<f64> {
            stages
                .iter()
                .filter(|stage| cell.names.contains_key(*stage))
                .map(|stage| self.stage(cell, stage)?.seconds())
                .sum()
        };
        let seconds: Vec<f64> = cells.iter().filter_map(of_cell).collect();
        if stages.is_empty() {
            return String::new();
        }
        if seconds.is_empty() {
            return "-".into();
        }
        format!("{:.1}", seconds.iter().sum::<f64>() / seconds.len() as f64)
    }

    fn stage(&self, cell: &Cell, name: &str) -> Option<&Settled> {
        self.settled.get(cell.names.get(name)?)
    }
}

/// What a stage gave, by content.
fn digests(settled: &Settled) -> Vec<Digest> {
    settled.outputs().values().map(|artifact| artifact.digest).collect()
}

/// Mean and half the width of its 95 % t-interval.
pub(crate) fn t_interval(numbers: &[f64]) -> (f64, f64) {
    let count = numbers.len() as f64;
    let mean = numbers.iter().sum::<f64>() / count;
    if numbers.len() < 2 {
        return (mean, f64::NAN);
    }
    let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, t_quantile(numbers.len() - 1) * (variance / count).sqrt())
}

/// The 97.5 % quantile of Student's t with so many degrees of freedom.
fn t_quantile(degrees: usize) -> f64 {
    const EXACT: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
    ];
    // Beyond the table: the first terms of the expansion around the normal quantile, right to three digits.
    let n = degrees as f64;
    EXACT.get(degrees.saturating_sub(1)).copied().unwrap_or(1.959_964 + 2.372_27 / n + 2.822_5 / (n * n))
}

impl ReportTable {
    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        let lines = presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none());
        let mut table = self.table(lines);
        table.set_content_arrangement(ContentArrangement::Disabled);
        self.with_caption(&table.trim_fmt(), "")
    }

    /// As Markdown.
    pub(crate) fn markdown(&self) -> String {
        self.with_caption(&self.table(presets::ASCII_MARKDOWN).to_string(), "\n")
    }

    fn table(&self, style: TableStyle) -> Table {
        let mut table = Table::new();
        table.load_style(style).set_header(&self.headings);
        for row in &self.rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    fn with_caption(&self, table: &str, gap: &str) -> String {
        let mut text = format!("{table}\n");
        if !self.caption.is_empty() {
            text += gap;
        }
        for line in &self.caption {
            text += &format!("{line}\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_student() {
        // By hand: mean 2, standard deviation 1, three numbers: 4.303 / sqrt(3).
        let (mean, half) = t_interval(&[1.0, 2.0, 3.0]);
        assert_eq!(mean, 2.0);
        assert!((half - 2.4843).abs() < 1e-3, "{half}");
        // From tables: 2.0003 for 60 degrees of freedom, 1.9799 for 120.
        assert!((t_quantile(60) - 2.0003).abs() < 1e-3 && (t_quantile(120) - 1.9799).abs() < 1e-3);
        assert!((t_quantile(30) - t_quantile(31)).abs() < 5e-3);
    }
}
