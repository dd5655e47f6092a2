//! `pipeline report`: one page of what was gained, of what has a result.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use cache::Store;
use contract::Registry;
use petgraph::graph::NodeIndex;
use serde_json::Value as Json;

use super::{Extras, Workbench, read_store, say};
use crate::cli::{ReportArgs, Target};
use crate::graph::{Cell, Graph};
use crate::ground::signals;
use crate::language::Request;
use crate::plan::history::{History, Pipeline, changes_between};
use crate::plan::selection::{self, Selection};
use crate::plan::{self, Plan, Settled, key};
use crate::report::answers;
use crate::report::comparison::{self, Comparison, setting};
use crate::report::curves::{self, Curves, Group, Rows};
use crate::report::diary::Diary;
use crate::report::page::{Command, Contrast, Difference, Page};
use crate::run::folder::is_going_on;

/// How often a watched run is looked at.
const PERIOD: Duration = Duration::from_secs(2);

pub(crate) fn report(args: &ReportArgs, bench: &Workbench, extras: &Extras) -> Result<()> {
    let target = &args.target;
    let (graph, request) = bench.load_compared(target)?;
    let selection = selection::select(&graph, &target.wanted(&[]))?;
    let store = read_store(&target.store)?;
    let subject = Subject { args, registry: bench.registry, extras, graph, request, selection, store };
    let watch = signals::watch();
    let mut shown = None;
    loop {
        // Looked at before the results, so that what ends meanwhile is shown once more.
        let history = History::open(&subject.store, Pipeline::of(&target.file));
        let newest = history.runs().next();
        let goes_on = args.watch && newest.is_some_and(is_going_on);
        let heard = newest.and_then(|run| fs::metadata(run.join("events.jsonl")).ok()).map(|events| events.len());
        let is_first = shown.is_none();
        if shown.replace((goes_on, heard)) != Some((goes_on, heard)) {
            put(&args.output, &subject.page(&history, goes_on)?)?;
            if is_first {
                said(&args.output)?;
            }
        }
        if !goes_on {
            return Ok(());
        }
        watch.check()?;
        thread::sleep(PERIOD);
    }
}

/// What pages are written of.
struct Subject<'a> {
    args: &'a ReportArgs,
    registry: &'static Registry,
    extras: &'a Extras,
    graph: Graph,
    request: Request,
    selection: Selection,
    store: Store,
}

impl Subject<'_> {
    /// The page of the results that are there now.
    fn page(&self, history: &History, goes_on: bool) -> Result<String> {
        let Subject { args, graph, selection, store, .. } = self;
        let plan = plan::plan(graph, selection, self.registry, store)?;
        let settled = plan.settled();
        let diary = history.runs().find_map(Diary::read);
        let comparison = comparison::compare(graph, &settled, store)?;
        let (groups, all) = groups(graph, comparison.as_ref());
        let curves = curves(graph, &groups, &settled, diary.as_ref(), &selection.labels, store)?;
        let exchanges = match &comparison {
            Some(comparison) => answers::exchanges(comparison, graph, &settled, store, self.extras.texts)?,
            None => Vec::new(),
        };
        let contrasts = contrasts(graph, &groups, comparison.as_ref(), &plan)?;
        let file = args.target.file.display().to_string();
        let stem = args.target.file.file_stem();
        let name = stem.map_or_else(|| file.clone(), |stem| stem.to_string_lossy().into_owned());
        let output = std::path::absolute(&args.output).context("cannot find where the page is to be")?;
        let page = Page {
            name: &name,
            command: command(&args.target, &self.request, &file),
            graph,
            selection,
            plan: &plan,
            comparison: comparison.as_ref(),
            diary: diary.as_ref(),
            curves: &curves,
            curves_of: (groups.len(), all),
            exchanges: &exchanges,
            contrasts: &contrasts,
            store,
            folder: output.parent().unwrap_or(&output),
            interactive: args.interactive,
            is_watched: goes_on,
        };
        Ok(page.html())
    }
}

/// Writes a file that appears whole, and says so; `-` is standard output.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    put(path, text)?;
    said(path)
}

fn said(path: &Path) -> Result<()> {
    if path == Path::new("-") { Ok(()) } else { say(&format!("{}\n", path.display())) }
}

fn put(path: &Path, text: &str) -> Result<()> {
    if path == Path::new("-") {
        return say(text);
    }
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = fs::write(&draft, text).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        // What is left of the draft helps nobody.
        let _ = fs::remove_file(&draft);
    }
    written.with_context(|| format!("cannot write `{}`", path.display()))
}

/// The command line that computes what a page shows.
pub(super) fn command<'a>(target: &Target, request: &Request, file: &'a str) -> Command<'a> {
    let mut common = Vec::new();
    if let Some(profile) = &request.profile {
        common.extend(["--profile".to_owned(), profile.clone()]);
    }
    request.set.iter().for_each(|set| common.extend(["--set".to_owned(), set.clone()]));
    let mut cells = Vec::new();
    if let Some(ablation) = &request.ablation {
        cells.extend(["--ablation".to_owned(), ablation.clone()]);
    }
    if request.all_variants {
        cells.push("--all".to_owned());
    } else if !request.variants.is_empty() {
        cells.extend(["--variant".to_owned(), request.variants.join(",")]);
    }
    cells.extend(target.stages.iter().cloned());
    Command { file, common, cells }
}

/// Lines whose curves are shown: more cannot be told apart.
const LINES: usize = 8;

/// Lines of the comparison with their cells, the baseline and the best before others; and how many there are.
fn groups<'g>(graph: &'g Graph, comparison: Option<&Comparison>) -> (Vec<Group<'g>>, usize) {
    let Some(comparison) = comparison else {
        let group = |cell: &'g Cell| Group { label: cell.label.clone(), cells: vec![cell] };
        return (graph.cells.iter().take(LINES).map(group).collect(), graph.cells.len());
    };
    let lines: Vec<usize> =
        (0..comparison.lines.len()).filter(|line| comparison.lines[*line].variant.is_some()).collect();
    let all = lines.len();
    let mut shown = lines;
    if all > LINES {
        let better = comparison.measures.first().map(|measure| measure.better);
        let score = |line: &usize| {
            let figure = comparison.lines[*line].figures.first().and_then(|entry| entry.figure());
            better.zip(figure).map_or(f64::NEG_INFINITY, |(better, figure)| better.score(figure.mean))
        };
        let is_baseline = |line: &usize| comparison.differences.iter().any(|difference| difference.baseline == *line);
        shown.sort_by(|a, b| score(b).total_cmp(&score(a)));
        if let Some(baseline) = shown.iter().skip(LINES).position(is_baseline) {
            let line = shown.remove(LINES + baseline);
            shown.insert(0, line);
        }
        shown.truncate(LINES);
        shown.sort_unstable();
    }
    let group = |line: usize| {
        let line = &comparison.lines[line];
        let cells = graph.cells.iter().filter(|cell| line.cells.contains(&cell.label)).collect();
        Group { label: line.label.clone(), cells }
    };
    (shown.into_iter().map(group).collect(), all)
}

/// Of settled stages from their files; of others from what the newest run has said of them.
fn curves(
    graph: &Graph,
    groups: &[Group<'_>],
    settled: &BTreeMap<NodeIndex, Settled>,
    diary: Option<&Diary>,
    labels: &BTreeMap<NodeIndex, String>,
    store: &Store,
) -> Result<Vec<Curves>> {
    let mut rows_of = |node: NodeIndex| -> Result<Rows> {
        match settled.get(&node) {
            Some(settled) => curves::rows(settled, store),
            None => {
                let said =
                    diary.and_then(|diary| diary.of(None, &labels[&node]).or_else(|| diary.stages.get(&labels[&node])));
                let rows = said.into_iter().flat_map(|stage| &stage.rows);
                Ok(rows.map(|(part, rows)| (part.clone(), rows.clone())).collect())
            }
        }
    };
    let several = groups.iter().any(|group| group.cells[0].variant != groups[0].cells[0].variant);
    let named: Vec<Group<'_>> = groups
        .iter()
        .map(|group| {
            let (cell, is_repeat) = (group.cells[0], group.cells.len() == 1 && !group.cells[0].repeat.is_empty());
            let label = if is_repeat { group.label.clone() } else { short(cell, several) };
            Group { label, cells: group.cells.clone() }
        })
        .collect();
    curves::curves(graph, &named, &mut rows_of)
}

/// What tells a line from others, for the end of a curve: `kd learning_rate=0.001`, without the variant where all have it.
fn short(cell: &Cell, has_variant: bool) -> String {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let over = cell.over.iter().map(|(path, value)| format!("{}={}", last(path), setting(value)));
    let variant = (has_variant || cell.over.is_empty()).then(|| cell.variant.clone());
    variant.into_iter().chain(over).collect::<Vec<_>>().join(" ")
}

/// What differs between each line and the baseline, or the first of them, in their first cells.
fn contrasts(
    graph: &Graph,
    groups: &[Group<'_>],
    comparison: Option<&Comparison>,
    plan: &Plan,
) -> Result<Vec<Contrast>> {
    let baseline = comparison.and_then(|it| Some(it.lines[it.differences.first()?.baseline].label.clone()));
    let than = groups.iter().find(|group| Some(&group.label) == baseline.as_ref()).or_else(|| groups.first());
    let Some(than) = than else { return Ok(Vec::new()) };
    let actions: BTreeMap<NodeIndex, &key::Action> =
        plan.steps.iter().filter_map(|(node, step)| Some((*node, step.decision()?.action()))).collect();
    let mut contrasts = Vec::new();
    for group in groups.iter().filter(|group| group.label != than.label) {
        let (Some(here), Some(there)) = (group.cells.first(), than.cells.first()) else { continue };
        let mut changes = Vec::new();
        for (name, node) in &here.names {
            let Some(other) = there.names.get(name) else {
                changes.push((name.clone(), Difference::OnlyHere));
                continue;
            };
            if node == other || graph.subgraphs[*node].subgraph == graph.subgraphs[*other].subgraph {
                continue;
            }
            let (Some(new), Some(old)) = (actions.get(node), actions.get(other)) else { continue };
            let found = changes_between(old, new)?;
            // Other inputs follow from other stages, which are listed themselves.
            let is_content = |value: &Option<Json>| value.as_ref().is_some_and(|value| value.get("digest").is_some());
            let own = found.into_iter().filter(|change| !(is_content(&change.old) && is_content(&change.new)));
            changes.extend(own.map(|change| (name.clone(), Difference::Value(Box::new(change)))));
        }
        let gone = there.names.keys().filter(|name| !here.names.contains_key(*name));
        changes.extend(gone.map(|name| (name.clone(), Difference::OnlyThere)));
        contrasts.push(Contrast { label: group.label.clone(), than: than.label.clone(), changes });
    }
    Ok(contrasts)
}
