//! What variants gained, as numbers: every renderer of a table, and the page, shows the same.
//!
//! Cells that differ only in what an ablation repeats over make one line. Over several repeats a figure has a t interval; one
//! that was measured once has the interval that its stage gave it. Differences to the baseline are paired: by repeat, and where
//! there is one repeat alone, by row and sample, with the interval of a bootstrap over rows.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use cache::{Digest, Key, Store};
use contract::{PortType, Predictions};
use indexmap::IndexMap;
use petgraph::graph::NodeIndex;
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::graph::{Cell, Exit, Graph, MetricRef, Report};
use crate::plan::Settled;
use crate::plan::results::{self, Measured};
use crate::report::statistics::{self, CONFIDENCE, Estimated};

/// Lines, figures and differences.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Comparison {
    /// What was measured: a column each.
    pub measures: Vec<Measure>,
    /// What was compared, the variants first, then the further rows of the report.
    pub lines: Vec<Line>,
    /// How much each line has more than the baseline.
    pub differences: Vec<Difference>,
    /// How what was measured goes with one of the measures, over all cells.
    pub correlations: Vec<Correlation>,
    /// Lines, and stages that have one result in several of their repeats.
    pub same: BTreeSet<(String, String)>,
    /// Whether there is a column of seconds.
    #[serde(skip)]
    pub has_seconds: bool,
    /// The file's own words.
    pub caption: Option<String>,
}

/// Something that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Measure {
    /// What people call it.
    pub heading: String,
    /// Where the number is, in the variants.
    pub metric: Option<String>,
    /// Which way is better.
    pub better: Better,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Better {
    Higher,
    Lower,
}

impl Better {
    /// By the name of a metric: losses, distances and errors are better when lower.
    pub(crate) fn of(metric: &str) -> Self {
        const LOWER: [&str; 9] = ["loss", "kl", "perplexity", "nll", "error", "errors", "bias", "seconds", "distance"];
        let name = metric.rsplit('.').next().unwrap_or(metric);
        if name.split('_').any(|word| LOWER.contains(&word)) { Better::Lower } else { Better::Higher }
    }

    /// The larger the better.
    pub(crate) fn score(self, number: f64) -> f64 {
        if self == Better::Lower { -number } else { number }
    }
}

/// One thing compared.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    /// What people call it.
    pub label: String,
    /// Its variant; none for a further row of the report.
    pub variant: Option<String>,
    /// Settings of the ablation that it differs in.
    pub over: Settings,
    /// By measure.
    pub figures: Vec<Entry>,
    /// Mean seconds of the report's `seconds`, as they took when they were made.
    pub seconds: Option<f64>,
    /// Labels of its cells.
    pub cells: Vec<String>,
}

/// Paths and what they are set to.
pub(crate) type Settings = Vec<(String, Json)>;

/// A place of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum Entry {
    /// Nothing belongs here.
    Empty,
    /// There is no result yet.
    Missing,
    /// There was nothing to compare, which is not 0.
    NotMeasured,
    /// A number.
    Measured(Figure),
}

impl Entry {
    /// The number, if there is one.
    pub(crate) fn figure(&self) -> Option<&Figure> {
        match self {
            Entry::Measured(figure) => Some(figure),
            Entry::Empty | Entry::Missing | Entry::NotMeasured => None,
        }
    }
}

/// A number with its interval, and what that is of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub mean: f64,
    /// 95 %.
    pub interval: Option<(f64, f64)>,
    /// How many repeats it is the mean of.
    pub n: usize,
    /// What the interval is over.
    pub of: Of,
    /// Each repeat.
    pub repeats: Vec<Repeat>,
}

/// What an interval is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Of {
    /// Nothing: there is none.
    Nothing,
    /// What the stage measured, as it says.
    Stage,
    /// Repeats.
    Repeats,
    /// Rows with their samples, in pairs.
    Rows,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Repeat {
    /// What it is one of several by.
    pub settings: Settings,
    pub mean: f64,
    /// As its stage measured it.
    pub interval: Option<(f64, f64)>,
    /// Key of the stage that measured it.
    pub key: Key,
    /// That stage.
    pub stage: String,
    /// The cell that it is of.
    pub cell: String,
}

/// A line against the baseline.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Difference {
    /// Index of the line.
    pub line: usize,
    /// Index of the baseline's.
    pub baseline: usize,
    /// By measure.
    pub figures: Vec<Compared>,
}

/// How much more one line has than another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Compared {
    #[serde(flatten)]
    pub entry: Entry,
    /// How often so large a difference comes of nothing; none where that cannot be told.
    pub p: Option<f64>,
    /// The same, corrected for all differences of the measure.
    pub corrected: Option<f64>,
    pub verdict: Option<Verdict>,
}

/// How far two measures go together, over cells.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Correlation {
    /// Heading of a measure.
    pub measure: String,
    /// Heading of the one that the report asks about.
    pub with: String,
    /// Pearson's.
    pub r: f64,
    /// 95 %.
    pub interval: (f64, f64),
    /// Cells that have both.
    pub n: usize,
    /// How often so large a one comes of nothing.
    pub p: f64,
    /// The same, corrected for all of them.
    pub corrected: f64,
}

impl Correlation {
    fn in_words(&self) -> String {
        let Correlation { measure, with, r, interval: (low, high), n, corrected, .. } = self;
        let said = if *corrected < 1.0 - CONFIDENCE { "goes with" } else { "is not shown to go with" };
        format!("{measure} {said} {with}: r {r:.2} [{low:.2}, {high:.2}] over {n} cells")
    }
}

/// What can be said of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    Better,
    Worse,
    /// The two may well be the same.
    CannotBeToldApart,
    /// What there is says nothing of other repeats.
    TooFewRepeats,
}

impl Verdict {
    pub(crate) fn words(self) -> &'static str {
        match self {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::CannotBeToldApart => "cannot be told apart",
            Verdict::TooFewRepeats => "too few repeats to say",
        }
    }

    /// Of a difference over so many repeats. With two of them nothing can be said to be the same; with one, models that differ
    /// over rows may differ by their seed, but those that do not even do that cannot be told apart.
    fn of(better: Better, mean: f64, corrected: f64, of: Of, n: usize) -> Verdict {
        let differs = corrected < 1.0 - CONFIDENCE;
        match (differs, of) {
            (false, _) if n == 2 => Verdict::TooFewRepeats,
            (false, _) => Verdict::CannotBeToldApart,
            (true, Of::Repeats) if better.score(mean) > 0.0 => Verdict::Better,
            (true, Of::Repeats) => Verdict::Worse,
            (true, _) => Verdict::TooFewRepeats,
        }
    }
}

/// Compares what is settled, as the file's report asks; nothing where it asks for nothing, or nothing is there.
pub(crate) fn compare(
    graph: &Graph,
    settled: &BTreeMap<NodeIndex, Settled>,
    store: &Store,
) -> Result<Option<Comparison>> {
    match report(graph) {
        Some(report) => compare_as(report, graph, settled, store),
        None => Ok(None),
    }
}

/// The same, as another report asks.
pub(crate) fn compare_as(
    report: &Report,
    graph: &Graph,
    settled: &BTreeMap<NodeIndex, Settled>,
    store: &Store,
) -> Result<Option<Comparison>> {
    let mut numbers = Numbers::read(report, graph, settled, store)?;
    let measures: Vec<Measure> = headings(report).into_iter().map(|heading| measure(report, heading)).collect();
    let groups = groups(graph, report);
    let Some(first) = groups.first() else { return Ok(None) };
    let mut lines = Vec::new();
    let mut kept = Vec::new();
    for group in &groups {
        let (variant, over) = (Some(group[0].variant.clone()), group[0].over.clone());
        let figures = numbers.figures(&measures, group, &report.metrics);
        let seconds = numbers.seconds(group, &report.seconds);
        lines.push(Line { label: label(group[0]), variant, over, figures, seconds, cells: cells(group) });
        kept.push(group.as_slice());
    }
    for (name, metrics) in &report.rows {
        let figures = numbers.figures(&measures, first, metrics);
        let (label, over, cells) = (name.clone(), Vec::new(), cells(first));
        lines.push(Line { label, variant: None, over, figures, seconds: None, cells });
    }
    // Of a run of some stages only, what they did not reach has nothing to show.
    let has_something = |line: &Line| line.seconds.is_some() || line.figures.iter().any(has_something);
    let positions: Vec<Option<usize>> = lines
        .iter()
        .scan(0, |next, line| Some(has_something(line).then(|| std::mem::replace(next, *next + 1))))
        .collect();
    let mut differences = Vec::new();
    for (own, other) in paired(&groups, report) {
        let (Some(line), Some(baseline)) = (positions[own], positions[other]) else { continue };
        let mut figures = Vec::new();
        for measure in &measures {
            figures.push(match report.metrics.get(&measure.heading) {
                Some(metric) => numbers.difference(kept[own], kept[other], metric)?,
                None => Compared { entry: Entry::Empty, p: None, corrected: None, verdict: None },
            });
        }
        if figures.iter().any(|figure| figure.entry.figure().is_some()) {
            differences.push(Difference { line, baseline, figures });
        }
    }
    lines.retain(has_something);
    if lines.is_empty() {
        return Ok(None);
    }
    judge(&measures, &mut differences);
    let correlations = correlations(report, &measures, &lines);
    let (same, caption, has_seconds) = (numbers.same, report.caption.clone(), !report.seconds.is_empty());
    Ok(Some(Comparison { measures, lines, differences, correlations, same, has_seconds, caption }))
}

fn has_something(entry: &Entry) -> bool {
    !matches!(entry, Entry::Empty | Entry::Missing)
}

/// The report that the file asks for.
pub(crate) fn report(graph: &Graph) -> Option<&Report> {
    graph.cells.iter().find_map(|cell| cell.report.as_ref())
}

/// The stages whose figures a report shows.
pub(crate) fn stages(graph: &Graph) -> BTreeSet<NodeIndex> {
    report(graph).map(|report| stages_of(report, graph)).unwrap_or_default()
}

fn stages_of(report: &Report, graph: &Graph) -> BTreeSet<NodeIndex> {
    let metrics = report.metrics.values().chain(report.rows.values().flat_map(|row| row.values()));
    let names: BTreeSet<&String> = metrics.map(|metric| &metric.stage).chain(&report.seconds).collect();
    let of_cell = |cell: &Cell| names.iter().filter_map(|name| cell.names.get(*name).copied()).collect::<Vec<_>>();
    graph.cells.iter().flat_map(of_cell).collect()
}

/// The headings of the variants, then those that only further rows have.
fn headings(report: &Report) -> Vec<&String> {
    let mut headings: Vec<&String> = Vec::new();
    for heading in report.metrics.keys().chain(report.rows.values().flat_map(|row| row.keys())) {
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    headings
}

fn measure(report: &Report, heading: &str) -> Measure {
    let own = report.metrics.get(heading);
    let any = own.or_else(|| report.rows.values().find_map(|row| row.get(heading)));
    let better = any.map_or(Better::Higher, |metric| Better::of(&metric.metric));
    let metric = own.map(|metric| format!("{}.{}", metric.stage, metric.metric));
    Measure { heading: heading.to_owned(), metric, better }
}

/// Cells of one line each, in the order that the report compares variants in.
fn groups<'g>(graph: &'g Graph, report: &Report) -> Vec<Vec<&'g Cell>> {
    let position = |cell: &Cell| report.compare.iter().position(|variant| *variant == cell.variant);
    let mut cells: Vec<&Cell> =
        graph.cells.iter().filter(|cell| report.compare.is_empty() || position(cell).is_some()).collect();
    cells.sort_by_key(|cell| position(cell));
    let mut groups: IndexMap<String, Vec<&Cell>> = IndexMap::new();
    for cell in cells {
        groups.entry(label(cell)).or_default().push(cell);
    }
    groups.into_values().collect()
}

/// Every group with the one it is measured against, by index: that of the baseline with the same settings.
fn paired(groups: &[Vec<&Cell>], report: &Report) -> Vec<(usize, usize)> {
    let Some(baseline) = &report.baseline else { return Vec::new() };
    let others = groups.iter().enumerate().filter(|(_, group)| group[0].variant != *baseline);
    let pair = others.filter_map(|(index, group)| {
        let is_baseline = |other: &Vec<&Cell>| other[0].variant == *baseline && other[0].over == group[0].over;
        Some((index, groups.iter().position(is_baseline)?))
    });
    pair.collect()
}

fn label(cell: &Cell) -> String {
    let over = cell.over.iter().map(|(path, value)| format!(" {path}={}", setting(value)));
    format!("{}{}", cell.variant, over.collect::<String>())
}

/// A setting as the command line takes it.
pub(crate) fn setting(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn cells(group: &[&Cell]) -> Vec<String> {
    group.iter().map(|cell| cell.label.clone()).collect()
}

/// Corrects the chances of each measure for how many differences it has, and says what follows.
fn judge(measures: &[Measure], differences: &mut [Difference]) {
    for (index, measure) in measures.iter().enumerate() {
        let of_measure = || differences.iter().filter_map(|difference| difference.figures[index].p);
        let mut corrected = statistics::holm(&of_measure().collect::<Vec<_>>()).into_iter();
        for compared in differences.iter_mut().map(|difference| &mut difference.figures[index]) {
            let Some(figure) = compared.entry.figure() else { continue };
            compared.corrected = compared.p.and_then(|_| corrected.next());
            let known = compared.corrected.map(|p| Verdict::of(measure.better, figure.mean, p, figure.of, figure.n));
            compared.verdict = Some(known.unwrap_or(Verdict::TooFewRepeats));
        }
    }
}

/// How the other measures go with the one that the report asks about. Each cell counts once, and what several share as well.
fn correlations(report: &Report, measures: &[Measure], lines: &[Line]) -> Vec<Correlation> {
    let Some(with) = report.correlate.as_ref().and_then(|wanted| measures.iter().position(|it| it.heading == *wanted))
    else {
        return Vec::new();
    };
    let of = |measure: usize| -> BTreeMap<&str, &Repeat> {
        let variants = lines.iter().filter(|line| line.variant.is_some());
        let figures = variants.filter_map(|line| line.figures[measure].figure());
        figures.flat_map(|figure| &figure.repeats).map(|repeat| (repeat.cell.as_str(), repeat)).collect()
    };
    let heading = |measure: usize| measures[measure].heading.clone();
    let others = of(with);
    let mut found = Vec::new();
    for measure in (0..measures.len()).filter(|measure| *measure != with) {
        let pair = |(cell, own): (&str, &Repeat)| {
            let other = others.get(cell)?;
            Some(((own.key, other.key), (own.mean, other.mean)))
        };
        let pairs: BTreeMap<(Key, Key), (f64, f64)> = of(measure).into_iter().filter_map(pair).collect();
        let pairs: Vec<(f64, f64)> = pairs.into_values().collect();
        if let Some(Estimated { mean, interval, p }) = statistics::correlation(&pairs) {
            found.push(Correlation {
                measure: heading(measure),
                with: heading(with),
                r: mean,
                interval,
                n: pairs.len(),
                p,
                corrected: p,
            });
        }
    }
    let corrected = statistics::holm(&found.iter().map(|correlation| correlation.p).collect::<Vec<_>>());
    found.iter_mut().zip(corrected).for_each(|(correlation, corrected)| correlation.corrected = corrected);
    found
}

/// What the stages measured.
struct Numbers<'a> {
    settled: &'a BTreeMap<NodeIndex, Settled>,
    store: &'a Store,
    metrics: BTreeMap<NodeIndex, Map<String, Json>>,
    predictions: BTreeMap<NodeIndex, Vec<Map<String, Json>>>,
    same: BTreeSet<(String, String)>,
}

impl<'a> Numbers<'a> {
    fn read(
        report: &Report,
        graph: &Graph,
        settled: &'a BTreeMap<NodeIndex, Settled>,
        store: &'a Store,
    ) -> Result<Self> {
        let mut metrics = BTreeMap::new();
        for node in stages_of(report, graph) {
            if let Some(settled) = settled.get(&node) {
                metrics.insert(node, results::metrics(settled, store)?);
            }
        }
        Ok(Numbers { settled, store, metrics, predictions: BTreeMap::new(), same: BTreeSet::new() })
    }

    fn figures(&mut self, measures: &[Measure], cells: &[&Cell], metrics: &IndexMap<String, MetricRef>) -> Vec<Entry> {
        let of = |measure: &Measure| match metrics.get(&measure.heading) {
            Some(metric) => self.figure(cells, metric),
            None => Entry::Empty,
        };
        measures.iter().map(of).collect()
    }

    fn figure(&mut self, cells: &[&Cell], metric: &MetricRef) -> Entry {
        let mut found: Vec<Repeat> = Vec::new();
        let mut seen: BTreeMap<Vec<Digest>, &Cell> = BTreeMap::new();
        for cell in cells {
            // A stage that all repeats share, such as a teacher's score, is one measurement. What was made with another
            // setting and has the same bytes is no other.
            let Some(settled) = self.stage(cell, &metric.stage) else { continue };
            match seen.insert(digests(settled), cell) {
                None => found.extend(self.repeat(cell, metric)),
                Some(other) => {
                    let is_meant = other.names.get(&metric.stage) == cell.names.get(&metric.stage)
                        && other.names.values().ne(cell.names.values());
                    if !is_meant {
                        self.same.insert((label(cell), metric.stage.clone()));
                    }
                }
            }
        }
        let numbers: Vec<f64> = found.iter().map(|repeat| repeat.mean).collect();
        match (found.as_slice(), statistics::of_repeats(&numbers)) {
            ([], _) if self.is_not_measured(cells, metric) => Entry::NotMeasured,
            ([], _) => Entry::Missing,
            (_, Some(estimated)) => over_repeats(estimated, found),
            ([alone, ..], None) => {
                let (mean, interval) = (alone.mean, alone.interval);
                let of = if interval.is_some() { Of::Stage } else { Of::Nothing };
                Entry::Measured(Figure { mean, interval, n: 1, of, repeats: found })
            }
        }
    }

    /// How much more `cells` have than `baseline`, repeat by repeat; where that is one, row by row.
    fn difference(&mut self, cells: &[&Cell], baseline: &[&Cell], metric: &MetricRef) -> Result<Compared> {
        let mut pairs: Vec<(Repeat, &Cell, &Cell)> = Vec::new();
        let mut seen = BTreeSet::new();
        for &cell in cells {
            let Some(&other) = baseline.iter().find(|other| other.repeat == cell.repeat) else { continue };
            let results = [cell, other].map(|cell| self.stage(cell, &metric.stage).map(digests));
            if let (Some(own), Some(than)) = (self.repeat(cell, metric), self.repeat(other, metric))
                && seen.insert(results)
            {
                let mean = own.mean - than.mean;
                pairs.push((Repeat { mean, interval: None, ..own }, cell, other));
            }
        }
        let numbers: Vec<f64> = pairs.iter().map(|(repeat, ..)| repeat.mean).collect();
        let nothing = |entry| Compared { entry, p: None, corrected: None, verdict: None };
        if let Some(estimated) = statistics::of_repeats(&numbers) {
            let repeats = pairs.into_iter().map(|(repeat, ..)| repeat).collect();
            return Ok(Compared { p: Some(estimated.p), ..nothing(over_repeats(estimated, repeats)) });
        }
        let Some((repeat, cell, other)) = pairs.pop() else { return Ok(nothing(Entry::Missing)) };
        let by_row = self.by_row(cell, other, metric)?;
        let mean = repeat.mean;
        let interval = by_row.map(|estimated| estimated.interval);
        let of = if interval.is_some() { Of::Rows } else { Of::Nothing };
        let entry = Entry::Measured(Figure { mean, interval, n: 1, of, repeats: vec![repeat] });
        Ok(Compared { p: by_row.map(|estimated| estimated.p), ..nothing(entry) })
    }

    /// The difference over the rows that both have answered, sample by sample; nothing where the answers do not have that score.
    fn by_row(&mut self, cell: &Cell, other: &Cell, metric: &MetricRef) -> Result<Option<Estimated>> {
        let mut scores = [cell, other].map(|_| BTreeMap::new());
        for (scores, cell) in scores.iter_mut().zip([cell, other]) {
            let Some(node) = cell.names.get(&metric.stage).copied() else { return Ok(None) };
            for row in self.predictions(node)? {
                if let (Some(id), Some(score)) = (row.get("id"), score_of(row, &metric.metric)) {
                    let sample = row.get("seed").map(Json::to_string).unwrap_or_default();
                    scores.insert((id.to_string(), sample), score);
                }
            }
        }
        let [own, than] = scores;
        let mut rows: BTreeMap<&String, (f64, f64)> = BTreeMap::new();
        for (at, score) in &own {
            if let Some(other) = than.get(at) {
                let (sum, count) = rows.entry(&at.0).or_default();
                (*sum, *count) = (*sum + score - other, *count + 1.0);
            }
        }
        Ok(if rows.len() < 2 { None } else { statistics::of_rows(&rows.into_values().collect::<Vec<_>>()) })
    }

    fn predictions(&mut self, node: NodeIndex) -> Result<&[Map<String, Json>]> {
        if !self.predictions.contains_key(&node) {
            let rows = match self.settled.get(&node) {
                Some(settled) => predictions(settled, self.store)?,
                None => Vec::new(),
            };
            self.predictions.insert(node, rows);
        }
        Ok(&self.predictions[&node])
    }

    fn is_not_measured(&self, cells: &[&Cell], metric: &MetricRef) -> bool {
        let of = |cell: &&Cell| self.metrics.get(cell.names.get(&metric.stage)?);
        cells.iter().filter_map(of).any(|metrics| results::is_not_measured(metrics, &metric.metric))
    }

    fn repeat(&self, cell: &Cell, metric: &MetricRef) -> Option<Repeat> {
        let node = cell.names.get(&metric.stage)?;
        let Measured { mean, interval } = results::number(self.metrics.get(node)?, &metric.metric)?;
        let key = self.settled.get(node)?.action.key;
        let (settings, stage) = (cell.repeat.clone(), metric.stage.clone());
        Some(Repeat { settings, mean, interval, key, stage, cell: cell.label.clone() })
    }

    /// Seconds of the stages when they were made, the mean over the cells.
    fn seconds(&self, cells: &[&Cell], stages: &[String]) -> Option<f64> {
        let of_cell = |cell: &&Cell| -> Option<f64> {
            let there = stages.iter().filter(|stage| cell.names.contains_key(*stage));
            there.map(|stage| self.stage(cell, stage)?.seconds()).sum()
        };
        let seconds: Vec<f64> = cells.iter().filter_map(of_cell).collect();
        (!stages.is_empty() && !seconds.is_empty()).then(|| seconds.iter().sum::<f64>() / seconds.len() as f64)
    }

    fn stage(&self, cell: &Cell, name: &str) -> Option<&'a Settled> {
        self.settled.get(cell.names.get(name)?)
    }
}

fn over_repeats(estimated: Estimated, repeats: Vec<Repeat>) -> Entry {
    let (mean, interval, n) = (estimated.mean, Some(estimated.interval), repeats.len());
    Entry::Measured(Figure { mean, interval, n, of: Of::Repeats, repeats })
}

/// The answers that a stage wrote down; none where it writes none.
pub(crate) fn predictions(settled: &Settled, store: &Store) -> Result<Vec<Map<String, Json>>> {
    let operators = settled.action.subgraph.operators();
    let port = operators.iter().flat_map(|operator| &operator.ports.outputs);
    let Some(port) = port.into_iter().find(|port| port.port_type == PortType::Predictions) else {
        return Ok(Vec::new());
    };
    match settled.artifact(&Exit::Port(port.name.clone())) {
        Some(artifact) => Ok(Predictions::load(&store.open_artifact(artifact)?)?.0),
        None => Ok(Vec::new()),
    }
}

/// What an answer scored by a metric, if it is scored by that. A share of right answers is kept as yes or no.
pub(crate) fn score_of(answer: &Map<String, Json>, metric: &str) -> Option<f64> {
    match answer.get(if metric == "accuracy" { "correct" } else { metric })? {
        Json::Bool(is_right) => Some(if *is_right { 100.0 } else { 0.0 }),
        other => other.as_f64(),
    }
}

/// What a stage gave, by content.
fn digests(settled: &Settled) -> Vec<Digest> {
    settled.outputs().values().map(|artifact| artifact.digest).collect()
}

impl Comparison {
    /// `no-prompt - sft`.
    pub(crate) fn difference_label(&self, difference: &Difference) -> String {
        format!("{} - {}", self.lines[difference.line].label, self.lines[difference.baseline].label)
    }

    /// For each measure what can be said, in a sentence; nothing where nothing was held against a baseline.
    pub(crate) fn verdicts(&self) -> Vec<String> {
        let sentence = |(index, measure): (usize, &Measure)| {
            let mut said: BTreeMap<(Verdict, &str), Vec<&str>> = BTreeMap::new();
            for difference in &self.differences {
                if let Some(verdict) = difference.figures[index].verdict {
                    let than = self.lines[difference.baseline].variant.as_deref().unwrap_or_default();
                    said.entry((verdict, than)).or_default().push(&self.lines[difference.line].label);
                }
            }
            let than = said.keys().next()?.1.to_owned();
            let parts: Vec<String> = said
                .iter()
                .map(|((verdict, _), labels)| format!("{}: {}", verdict.words(), labels.join(", ")))
                .collect();
            Some(format!("{} against {than}: {}", measure.heading, parts.join("; ")))
        };
        self.measures.iter().enumerate().filter_map(sentence).collect()
    }

    /// What the intervals are, and the file's own caption.
    pub(crate) fn notes(&self) -> Vec<String> {
        let figures = || {
            let own = self.lines.iter().flat_map(|line| &line.figures);
            let more =
                self.differences.iter().flat_map(|difference| &difference.figures).map(|compared| &compared.entry);
            own.chain(more).filter_map(Entry::figure)
        };
        let has = |of: Of| figures().any(|figure| figure.of == of);
        let mut notes = Vec::new();
        let repeats: BTreeSet<usize> =
            figures().filter(|figure| figure.of == Of::Repeats).map(|figure| figure.n).collect();
        if !repeats.is_empty() {
            let over = repeats.iter().map(usize::to_string).collect::<Vec<_>>().join(" or ");
            let paired = if self.differences.is_empty() { "" } else { "; differences are paired by repeat" };
            notes.push(format!("±: half the width of the 95 % t-interval of the mean over {over} repeats{paired}"));
        }
        notes.extend(self.same.iter().map(|(row, stage)| {
            format!("`{row}`: some of its repeats are none, for `{stage}` has the same result in them; it counts once")
        }));
        if has(Of::Stage) {
            notes.push("[low, high]: 95 % interval, as the stage measured it".to_owned());
        }
        if has(Of::Rows) {
            notes.push(
                "[low, high] of a difference: 95 % interval by paired bootstrap over rows with their samples; it says nothing of \
                 other training seeds"
                    .to_owned(),
            );
        }
        let verdicts = self.verdicts();
        if !verdicts.is_empty() {
            let most = self.differences.len();
            let corrected = if most > 1 { format!(", corrected for {most} comparisons (Holm)") } else { String::new() };
            notes.push(format!("verdicts: at 95 %{corrected}"));
        }
        notes.extend(self.correlations.iter().map(Correlation::in_words));
        if self.correlations.len() > 1 {
            let most = self.correlations.len();
            notes.push(format!("correlations: Pearson's over cells, 95 % by Fisher, corrected for {most} (Holm)"));
        }
        notes.extend(self.caption.clone());
        notes
    }

    /// The variant that is best by the first measure.
    pub(crate) fn best(&self) -> Option<usize> {
        let measure = self.measures.first()?;
        let number = |line: &Line| Some(line.figures[0].figure()?.mean).filter(|mean| mean.is_finite());
        let variants = self.lines.iter().enumerate().filter(|(_, line)| line.variant.is_some());
        let scored = variants.filter_map(|(index, line)| Some((measure.better.score(number(line)?), index)));
        // Of equals the first.
        scored.rev().max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, index)| index)
    }

    /// In a line: what is best by the first measure, and how sure that is.
    pub(crate) fn headline(&self) -> Option<String> {
        let (measure, best) = (self.measures.first()?, self.best()?);
        let line = &self.lines[best];
        let figure = super::table::in_words(line.figures[0].figure()?);
        let mut text = format!("{} has the best {}: {figure}", line.label, measure.heading);
        if let Some(difference) = self.differences.iter().find(|difference| difference.line == best)
            && let (Some(gain), Some(verdict)) = (difference.figures[0].entry.figure(), difference.figures[0].verdict)
        {
            let than = &self.lines[difference.baseline].label;
            text += &format!("; {} more than {than}: {}", super::table::in_words(gain), verdict.words());
        }
        Some(text + ".")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_better_follows_from_what_is_measured() {
        for metric in ["loss", "reverse_kl", "check.loss", "perplexity", "exposure.excess_error"] {
            assert_eq!(Better::of(metric), Better::Lower, "{metric}");
        }
        for metric in ["rouge_l", "exact_match", "accuracy", "check.rouge_l", "tokens"] {
            assert_eq!(Better::of(metric), Better::Higher, "{metric}");
        }
    }

    #[test]
    fn a_verdict_needs_repeats() {
        let of = |mean, p, of, n| Verdict::of(Better::Higher, mean, p, of, n);
        assert_eq!(of(1.0, 0.01, Of::Repeats, 3), Verdict::Better);
        assert_eq!(of(-1.0, 0.01, Of::Repeats, 3), Verdict::Worse);
        assert_eq!(Verdict::of(Better::Lower, -1.0, 0.01, Of::Repeats, 3), Verdict::Better);
        assert_eq!(of(1.0, 0.06, Of::Repeats, 3), Verdict::CannotBeToldApart);
        assert_eq!(of(1.0, 0.06, Of::Repeats, 2), Verdict::TooFewRepeats);
        assert_eq!(of(1.0, 0.001, Of::Rows, 1), Verdict::TooFewRepeats);
        assert_eq!(of(1.0, 0.3, Of::Rows, 1), Verdict::CannotBeToldApart);
    }
}
