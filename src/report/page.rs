//! `pipeline report`: one page that says what was gained, what made it, and how sure that is. It needs no network, and no script unless
//! one is asked for; the same results give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use cache::{Key, Store};
use chart::{Tone, visible};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use petgraph::graph::NodeIndex;
use serde_json::Value as Json;
use sha2::{Digest as _, Sha256};

use crate::events::Status;
use crate::graph::{Graph, Operator, Subgraph};
use crate::ground::terminal::{figure, flow};
use crate::plan::history::{Change, show_value};
use crate::plan::selection::Selection;
use crate::plan::{Decision, Plan, Step};
use crate::report::answers::Exchange;
use crate::report::comparison::{Compared, Comparison, Entry, Figure, Repeat, setting};
use crate::report::curves::Curves;
use crate::report::diary::{Diary, Fate};
use crate::report::table::in_words;
use crate::report::{charts, draw, duration};

/// All that a page shows.
pub(crate) struct Page<'a> {
    /// Of the pipeline.
    pub name: &'a str,
    /// `pipeline run FILE ...`, which computes what is missing.
    pub command: Command<'a>,
    pub graph: &'a Graph,
    pub selection: &'a Selection,
    pub plan: &'a Plan,
    pub comparison: Option<&'a Comparison>,
    /// The newest run of the pipeline.
    pub diary: Option<&'a Diary>,
    pub curves: &'a [Curves],
    /// How many lines the curves are of, and how many there are.
    pub curves_of: (usize, usize),
    pub exchanges: &'a [Exchange],
    pub contrasts: &'a [Contrast],
    pub store: &'a Store,
    /// The folder that the page will be in: where links begin.
    pub folder: &'a Path,
    /// Whether it has a script.
    pub interactive: bool,
    /// Whether it will be written again soon.
    pub is_watched: bool,
}

/// The command line of a run, and of one stage of it.
pub(crate) struct Command<'a> {
    pub file: &'a str,
    /// Flags of every cell: profile and settings.
    pub common: Vec<String>,
    /// Flags that select the cells.
    pub cells: Vec<String>,
}

/// A stage, a field of its, and the value.
type Setting = (String, String, String);

/// What differs between a variant and what it is held against.
pub(crate) struct Contrast {
    pub label: String,
    pub than: String,
    /// A stage and a value that differs; or a stage that only one of the two has.
    pub changes: Vec<(String, Difference)>,
}

/// One thing that differs.
pub(crate) enum Difference {
    Value(Box<Change>),
    OnlyHere,
    OnlyThere,
}

impl Command<'_> {
    /// With what selects all cells, behind a verb such as `run`.
    pub(crate) fn of_all(&self, verb: &str) -> String {
        let words = ["pipeline", verb, self.file].map(str::to_owned).into_iter();
        let words = words.chain(self.common.iter().cloned()).chain(self.cells.iter().cloned());
        words.map(|word| quoted(&word)).collect::<Vec<_>>().join(" ")
    }

    /// What runs a stage of one cell with all that it needs.
    pub(crate) fn of_cell(&self, cell: &crate::graph::Cell, stage: &str) -> String {
        let mut words = ["pipeline", "run", self.file].map(str::to_owned).to_vec();
        words.extend(self.common.iter().cloned());
        if cell.variant != "base" {
            words.extend(["--variant".to_owned(), cell.variant.clone()]);
        }
        for (path, value) in cell.over.iter().chain(&cell.repeat) {
            words.extend(["--set".to_owned(), format!("{path}={}", setting(value))]);
        }
        words.push(stage.to_owned());
        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Rules of the page; those of the charts come before.
const STYLE: &str = "\
body{background:var(--surface);color:var(--ink);font:16px/1.5 system-ui,'DejaVu Sans',sans-serif;margin:0 auto;max-width:76rem;padding:1rem}\
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.25rem;margin:2em 0 .5em;border-bottom:1px solid var(--grid)}h3{font-size:1rem;margin:1.2em 0 .3em}\
a{color:var(--link)}code,pre{font:.875em ui-monospace,'DejaVu Sans Mono',monospace}code{overflow-wrap:anywhere}\
nav ul{display:flex;flex-wrap:wrap;gap:.2em 1.2em;list-style:none;padding:0}\
.verdict{font-size:1.15rem;font-weight:600}.state{margin:.3em 0}.quiet{color:var(--quiet)}\
.good{color:var(--good)}.bad{color:var(--bad)}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}\
caption{text-align:left;color:var(--quiet);padding:.2em 0}\
th,td{padding:.25em .7em;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}\
td{white-space:nowrap}td.text{white-space:normal}\
th:first-child,td.text,th.text{text-align:left}td code[title]{white-space:nowrap}thead th{border-bottom:1px solid var(--quiet)}tbody th{font-weight:400}\
tr.best th,tr.best td{font-weight:600}tr.break th,tr.break td{border-top:1px solid var(--quiet)}\
small{color:var(--quiet);display:block}\
.wide{overflow-x:auto}.charts{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}\
.charts svg{width:100%}figure details{font-size:.85rem}summary{cursor:pointer}\
.said{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;text-align:left}\
td.text{max-width:38rem}dl{display:grid;grid-template-columns:max-content 1fr;gap:.2em 1em}dd{margin:0}\
:focus-visible{outline:2px solid var(--link)}\
@media (max-width:40rem){body{padding:.6rem;font-size:15px}dl{grid-template-columns:1fr}th,td{padding:.25em .45em}}\
@media print{body{max-width:none;font-size:11px}nav{display:none}.wide{overflow:visible}h2{break-after:avoid}figure,tr{break-inside:avoid}\
figure details,.settings,#stages th:last-child,#stages td:last-child{display:none}details::details-content{content-visibility:visible;display:block;height:auto}}";

/// What a page may do: nothing but look as it says.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// What an interactive page adds.
const SCRIPT: &str = include_str!("page.js");

/// Rules of what the script makes.
const SCRIPT_STYLE: &str = "\
.sort{all:unset;cursor:pointer}.sort:focus-visible{outline:2px solid var(--link)}\
th[aria-sort=ascending] .sort::after{content:' \\2191'}th[aria-sort=descending] .sort::after{content:' \\2193'}\
.reading{font-size:.8rem;margin:0;min-height:1.5em}input[type=search]{font:inherit;color:inherit;background:inherit;border:1px solid \
var(--quiet);padding:.2em .5em;margin:.3em 0}@media print{.reading,input[type=search]{display:none}}";

/// Seconds after which a browser shows a watched page anew.
const REFRESH: u32 = 5;

/// The policy of a page that may run one script, told by its hash.
fn policy(script: Option<&str>) -> String {
    let hash = script.map(|script| BASE64_STANDARD.encode(Sha256::digest(script)));
    POLICY.to_owned() + &hash.map_or_else(String::new, |hash| format!("; script-src 'sha256-{hash}'"))
}

impl Page<'_> {
    /// The page.
    pub(crate) fn html(&self) -> String {
        let stages = self.stages();
        let sections: Vec<(&str, &str, Markup)> = [
            ("comparison", "Comparison", self.table()),
            ("outcomes", "What was measured", self.outcomes()),
            ("curves", "Training", self.training()),
            ("answers", "Answers side by side", self.answers()),
            ("differences", "What differs", self.differences()),
            ("graph", "The graph", self.graph()),
            ("stages", "Stages", stage_table(&stages)),
            ("repeat", "Environment, and how to repeat it", self.environment()),
        ]
        .into_iter()
        .filter(|(.., markup)| !markup.0.is_empty())
        .collect();
        let title = format!("{}: report", visible(self.name));
        let script = self.interactive.then_some(SCRIPT);
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(policy(script));
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    @if self.is_watched { meta http-equiv="refresh" content=(REFRESH); }
                    title { (title) }
                    style { (PreEscaped(chart::style())) (PreEscaped(STYLE)) @if self.interactive { (PreEscaped(SCRIPT_STYLE)) } }
                }
                body {
                    header {
                        h1 { (visible(self.name)) }
                        (self.verdict(&stages))
                        nav aria-label="Sections" { ul { @for (id, heading, _) in &sections { li { a href={ "#" (id) } { (heading) } } } } }
                    }
                    main {
                        @for (id, heading, markup) in &sections {
                            section aria-labelledby={ (id) "-h" } id=(id) { h2 id={ (id) "-h" } { (heading) } (markup) }
                        }
                    }
                    @if let Some(script) = script { script { (PreEscaped(script)) } }
                }
            }
        };
        page.into_string()
    }

    /// What came of it, first of all.
    fn verdict(&self, stages: &[Stage]) -> Markup {
        let missing: Vec<&Stage> = stages.iter().filter(|stage| !stage.is_there).collect();
        let failed: Vec<&Stage> = stages.iter().filter(|stage| stage.error.is_some()).collect();
        let is_going_on = missing.iter().any(|stage| stage.state == RUNNING);
        let headline = self.comparison.and_then(Comparison::headline);
        html! {
            @if let Some(text) = &headline { p.verdict { (visible(text)) } }
            @else if !stages.is_empty() { p.verdict { "Nothing to compare: the pipeline has no report, or nothing that it compares has a result." } }
            @for stage in &failed {
                p.state.bad { strong { "Failed: " } a href={ "#" (stage.anchor) } { (visible(&stage.name)) } ": " (visible(stage.error.as_deref().unwrap_or_default())) }
            }
            @if missing.is_empty() {
                p.state { "All " (stages.len()) " stages have their results." }
            } @else {
                p.state.bad {
                    strong { @if is_going_on { "Not finished: " } @else { "Unfinished: " } }
                    (missing.len()) " of " (stages.len()) " stages have no result yet. "
                    code { (visible(&self.command.of_all("run"))) } " computes them."
                }
            }
            @if let Some((label, settings)) = self.settings() {
                details.settings {
                    summary { "Settings of " (visible(&label)) ", the best" }
                    div.wide role="region" tabindex="0" aria-label="Settings" {
                        table {
                            caption { "All settings of what is trained and scored, defaults too" }
                            thead { tr { th scope="col" { "stage" } th.text scope="col" { "setting" } th.text scope="col" { "value" } } }
                            tbody { @for (stage, field, value) in &settings { tr { th scope="row" { (visible(stage)) } td.text { (visible(field)) } td.text { (visible(value)) } } } }
                        }
                    }
                }
            }
        }
    }

    /// Of the best line: every setting of its loops and of what scores it.
    fn settings(&self) -> Option<(String, Vec<Setting>)> {
        let comparison = self.comparison?;
        let line = &comparison.lines[comparison.best()?];
        let cell = self.graph.cells.iter().find(|cell| line.cells.contains(&cell.label))?;
        let scored = comparison.measures.iter().filter_map(|measure| measure.metric.as_deref()?.split('.').next());
        let scored: BTreeSet<&str> = scored.collect();
        let mut rows = Vec::new();
        for (name, node) in &cell.names {
            let mut add = |stage: String, operator: &Operator| {
                for (field, value) in operator.config.as_object().into_iter().flatten() {
                    rows.push((stage.clone(), field.clone(), flow(value)));
                }
            };
            match &self.graph.subgraphs[*node].subgraph {
                Subgraph::Loop(body) if body.alone => {
                    body.stages.values().take(1).for_each(|it| add(name.clone(), &it.operator))
                }
                Subgraph::Loop(body) => {
                    body.stages.iter().for_each(|(part, it)| add(format!("{name}.{part}"), &it.operator))
                }
                Subgraph::Operator(operator) if scored.contains(name.as_str()) => add(name.clone(), operator),
                Subgraph::Operator(_) => {}
            }
        }
        (!rows.is_empty()).then(|| (line.label.clone(), rows))
    }

    fn table(&self) -> Markup {
        let Some(comparison) = self.comparison else { return html! {} };
        let best = comparison.best();
        html! {
            div.wide role="region" tabindex="0" aria-label="Table of the comparison" {
                table {
                    caption { "What was measured; each number leads to the stage that measured it" }
                    thead { tr {
                        th scope="col" { "variant" }
                        @for measure in &comparison.measures { th scope="col" { (visible(&measure.heading)) } }
                        @if comparison.has_seconds { th scope="col" { "seconds" } }
                    } }
                    tbody {
                        @for (index, line) in comparison.lines.iter().enumerate() {
                            tr.best[best == Some(index)] {
                                th scope="row" { (visible(&line.label)) }
                                @for entry in &line.figures { td { (number(entry)) } }
                                @if comparison.has_seconds { td { @if let Some(seconds) = line.seconds { (format!("{seconds:.1}")) } } }
                            }
                        }
                    }
                    @if !comparison.differences.is_empty() { tbody {
                        @for (index, difference) in comparison.differences.iter().enumerate() {
                            tr.break[index == 0] {
                                th scope="row" { (visible(&comparison.difference_label(difference))) }
                                @for compared in &difference.figures { td { (gain(compared)) } }
                                @if comparison.has_seconds { td {} }
                            }
                        }
                    } }
                }
            }
            @for note in comparison.verdicts().into_iter().chain(comparison.notes()) { p.quiet { (visible(&note)) } }
        }
    }

    fn outcomes(&self) -> Markup {
        let figures = self.comparison.map(charts::outcomes).unwrap_or_default();
        small_multiples("o", &figures)
    }

    fn training(&self) -> Markup {
        let (own, shared): (Vec<&Curves>, Vec<&Curves>) = self.curves.iter().partition(|curves| !curves.is_shared);
        let draw = |curves: &[&Curves]| curves.iter().map(|it| it.lines.draw()).collect::<Vec<_>>();
        let (shown, all) = self.curves_of;
        if self.curves.is_empty() {
            return html! {};
        }
        html! {
            p.quiet {
                "Lines are means over repeats and neighbouring updates, bands their range."
                @if shown < all { " Of " (all) " variants and settings " (shown) " are shown: the baseline and the best." }
                " All rows are in the files of the stages."
            }
            (small_multiples("t", &draw(&own)))
            @if !shared.is_empty() {
                @if own.is_empty() { (small_multiples("u", &draw(&shared))) }
                @else { details { summary { "What all share" } (small_multiples("u", &draw(&shared))) } }
            }
        }
    }

    fn answers(&self) -> Markup {
        if self.exchanges.is_empty() {
            return html! {};
        }
        let heading =
            self.comparison.and_then(|it| it.measures.first()).map_or("score", |measure| measure.heading.as_str());
        html! {
            @for (index, exchange) in self.exchanges.iter().enumerate() {
                h3 { (visible(&exchange.row)) ", " (exchange.why) }
                @if let Some(prompt) = &exchange.prompt { pre.said { (written(prompt)) } }
                div.wide role="region" tabindex="0" aria-label={ "Answers " (index + 1) } {
                    table {
                        caption { "Answers to " (visible(&exchange.row)) }
                        thead { tr { th scope="col" { "who" } th.text scope="col" { "answer" } th scope="col" { (visible(heading)) } } }
                        tbody {
                            @for said in &exchange.said {
                                tr {
                                    th scope="row" { (visible(&said.who)) }
                                    td.text { p.said { (written(&said.text)) } }
                                    td { @if let Some(score) = said.score { a href={ "#" (anchor(&said.key)) } { (figure(score)) } } }
                                }
                            }
                            @for reference in exchange.references.iter().take(5) {
                                tr { th scope="row" { "reference" } td.text { p.said { (written(reference)) } } td {} }
                            }
                        }
                    }
                }
            }
        }
    }

    fn differences(&self) -> Markup {
        html! {
            @for contrast in self.contrasts {
                h3 { (visible(&contrast.label)) " against " (visible(&contrast.than)) }
                @if contrast.changes.is_empty() { p.quiet { "Nothing that is known differs." } }
                @else {
                    div.wide role="region" tabindex="0" aria-label={ "What differs in " (visible(&contrast.label)) } {
                        table {
                            caption { "What goes into the keys, and differs; what follows from that is left out" }
                            thead { tr { th scope="col" { "stage" } th.text scope="col" { "what" } th.text scope="col" { (visible(&contrast.than)) } th.text scope="col" { (visible(&contrast.label)) } th.text scope="col" { "where" } } }
                            tbody { @for (stage, difference) in &contrast.changes { tr {
                                th scope="row" { (visible(stage)) }
                                @match difference {
                                    Difference::Value(change) => {
                                        td.text { (visible(&change.path)) }
                                        td.text { (side(change.old.as_ref(), change.new.as_ref())) }
                                        td.text { (side(change.new.as_ref(), change.old.as_ref())) }
                                        td.text { @if let Some(place) = &change.place { (visible(&format!("{}:{}", place.file, place.line))) } }
                                    }
                                    Difference::OnlyHere => { td.text { "the stage" } td.text { "not there" } td.text { "there" } td.text {} }
                                    Difference::OnlyThere => { td.text { "the stage" } td.text { "there" } td.text { "not there" } td.text {} }
                                }
                            } } }
                        }
                    }
                }
            }
        }
    }

    fn graph(&self) -> Markup {
        let best = self.comparison.and_then(|comparison| Some(&comparison.lines[comparison.best()?]));
        let cell = match best {
            Some(line) => self.graph.cells.iter().find(|cell| line.cells.contains(&cell.label)),
            None => self.graph.cells.first(),
        };
        let Some(cell) = cell else { return html! {} };
        let selected: BTreeSet<NodeIndex> = self.selection.order.iter().copied().collect();
        let nodes: BTreeSet<NodeIndex> = cell.names.values().copied().filter(|node| selected.contains(node)).collect();
        let steps: BTreeMap<NodeIndex, &Step> = self.plan.steps.iter().map(|(node, step)| (*node, step)).collect();
        let tone = |node: NodeIndex| {
            let is_there = steps.get(&node).is_some_and(|step| step.settled().is_some());
            let has_failed = matches!(self.fate(node).map(|(fate, _)| fate), Some(Fate::Failed { .. }));
            if is_there {
                Tone::Good
            } else if has_failed {
                Tone::Bad
            } else {
                Tone::Faint
            }
        };
        let picture = draw::picture(self.graph, &cell.label, &nodes, &tone);
        html! {
            p.quiet {
                "Thick lines lead through the store, thin ones through memory, dotted ones to the next round. "
                "A whole outline has a result, a dotted one has none yet, a dashed one has failed."
            }
            (PreEscaped(picture.draw().html("g")))
        }
    }

    /// What became of a subgraph in the newest run.
    fn fate(&self, node: NodeIndex) -> Option<(&Fate, &Diary)> {
        let diary = self.diary?;
        let step = self.plan.steps.iter().find(|(other, _)| *other == node).map(|(_, step)| step);
        let key = step.and_then(|step| step.decision()).map(|decision| decision.action().key.to_string());
        Some((&diary.of(key.as_deref(), &self.selection.labels[&node])?.fate, diary))
    }

    fn stages(&self) -> Vec<Stage> {
        let mut taken = BTreeSet::new();
        let rows = self.plan.steps.iter().map(|(node, step)| {
            let name = self.selection.labels[node].clone();
            let key = step.decision().map(|decision| decision.action().key);
            let settled = step.settled();
            let alias = self.selection.aliases[node].first();
            let cell = alias.and_then(|alias| self.graph.cells.iter().find(|cell| cell.label == alias.cell));
            let command = cell.zip(alias).map(|(cell, alias)| self.command.of_cell(cell, &alias.name));
            let fate = self.fate(*node);
            let error = match fate {
                Some((Fate::Failed { error, .. }, _)) if settled.is_none() => Some(error.clone()),
                _ => match step {
                    Step::Impossible { error } => Some(error.clone()),
                    _ => None,
                },
            };
            let log = match fate {
                Some((Fate::Failed { log, .. }, _)) if settled.is_none() && !log.is_empty() => Some(log.clone()),
                _ => None,
            };
            let outputs = settled.map(|settled| settled.outputs()).unwrap_or_default();
            let files = outputs.into_iter().map(|(output, artifact)| {
                (output.to_string(), relative(self.folder, &self.store.artifact_place(artifact)))
            });
            let anchor = key.map_or_else(|| format!("n{}", node.index()), |key| anchor(&key.to_string()));
            let anchor = if taken.insert(anchor.clone()) { anchor } else { format!("n{}", node.index()) };
            Stage {
                anchor,
                name,
                kind: kinds(&self.graph.subgraphs[*node].subgraph),
                state: state(step, fate),
                is_there: settled.is_some(),
                error,
                log,
                seconds: settled.and_then(|settled| settled.seconds()),
                key,
                files: files.collect(),
                command: command.unwrap_or_default(),
            }
        });
        rows.collect()
    }

    fn environment(&self) -> Markup {
        let settled = || self.plan.steps.iter().filter_map(|(_, step)| step.settled());
        let said = |field: &str| -> String {
            let values: BTreeSet<String> = settled()
                .filter_map(|settled| settled.record.info.get(field))
                .filter(|it| !it.is_null())
                .map(setting)
                .collect();
            values.into_iter().collect::<Vec<_>>().join(", ")
        };
        let seconds: f64 = settled().filter_map(|settled| settled.seconds()).sum();
        html! {
            dl {
                dt { "made by" } dd { "pipeline " (env!("CARGO_PKG_VERSION")) ", results by " (visible(&said("program"))) }
                dt { "devices of the results" } dd { (visible(&said("device"))) }
                dt { "threads of a stage" } dd { (visible(&said("threads"))) }
                dt { "time of all stages, when they were made" } dd { (duration(seconds)) }
                @if let Some(diary) = self.diary {
                    dt { "newest run" }
                    dd { code { (visible(&diary.run)) } " on " (visible(&diary.devices.join(", "))) ": " (match diary.status {
                        Some(Status::Done) => "done",
                        Some(Status::Failed) => "failed",
                        Some(Status::Interrupted) => "interrupted",
                        None => "goes on, or was killed",
                    }) }
                }
                dt { "to repeat it" } dd { code { (visible(&self.command.of_all("run"))) } }
            }
        }
    }
}

/// One side of a difference. A whole part of a loop that only one of them has is there or not there.
fn side(own: Option<&Json>, other: Option<&Json>) -> String {
    let is_part = |value: Option<&Json>| value.is_some_and(|it| it.get("config").or_else(|| it.get("next")).is_some());
    match own {
        Some(_) if other.is_none() && is_part(own) => "there".into(),
        None if is_part(other) => "not there".into(),
        _ => visible(&show_value(own, "default")),
    }
}

/// A stage as the page shows it.
struct Stage {
    anchor: String,
    name: String,
    kind: String,
    state: &'static str,
    is_there: bool,
    error: Option<String>,
    log: Option<String>,
    seconds: Option<f64>,
    key: Option<Key>,
    files: Vec<(String, String)>,
    command: String,
}

const RUNNING: &str = "running";

/// What can be said of a stage: absent, failed and unfinished are three different words.
fn state(step: &Step, fate: Option<(&Fate, &Diary)>) -> &'static str {
    let has_ended = fate.is_some_and(|(_, diary)| diary.status.is_some());
    match (step, fate.map(|(fate, _)| fate)) {
        (Step::Decided(Decision::Cached(_)), Some(Fate::Ran)) => "ran",
        (Step::Decided(Decision::Cached(_)), _) => "reused",
        (_, Some(Fate::Failed { .. })) => "failed",
        (_, Some(Fate::Running | Fate::Elsewhere)) if !has_ended => RUNNING,
        (Step::Decided(Decision::Resume { .. }), _) | (_, Some(Fate::Running | Fate::Elsewhere | Fate::Stopped)) => {
            "unfinished"
        }
        (_, Some(Fate::Skipped { .. })) => "skipped",
        (Step::Impossible { .. }, _) => "cannot run",
        _ => "not run",
    }
}

fn kinds(subgraph: &Subgraph) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    let operators = match subgraph {
        Subgraph::Loop(body) if body.alone => subgraph.operators().into_iter().take(1).collect(),
        _ => subgraph.operators(),
    };
    for operator in operators {
        if !kinds.contains(&operator.kind.as_str()) {
            kinds.push(&operator.kind);
        }
    }
    kinds.join(", ")
}

fn stage_table(stages: &[Stage]) -> Markup {
    html! {
        div.wide role="region" tabindex="0" aria-label="Table of the stages" {
            table {
                caption { "Every stage: what became of it in the newest run, what it took when it was made, its key and files, and what runs it" }
                thead { tr { th scope="col" { "stage" } th.text scope="col" { "kind" } th.text scope="col" { "state" } th scope="col" { "time" } th.text scope="col" { "key" } th.text scope="col" { "files" } th.text scope="col" { "command" } } }
                tbody {
                    @for stage in stages {
                        tr id=(stage.anchor) {
                            th scope="row" { (visible(&stage.name)) }
                            td.text { (visible(&stage.kind)) }
                            td.text {
                                span.bad[!stage.is_there] { (stage.state) }
                                @if let Some(error) = &stage.error { small { (written(error)) } }
                                @if let Some(log) = &stage.log { small { "log: " code { (visible(log)) } } }
                            }
                            td data-value=[stage.seconds] { @if let Some(seconds) = stage.seconds { (duration(seconds)) } }
                            td.text { @if let Some(key) = &stage.key { code title=(key) { (key.short()) } } }
                            td.text { @for (output, path) in &stage.files { a href=(path) { (visible(output)) } " " } }
                            td.text { code { (visible(&stage.command)) } }
                        }
                    }
                }
            }
        }
    }
}

fn small_multiples(prefix: &str, figures: &[chart::Figure]) -> Markup {
    if figures.is_empty() {
        return html! {};
    }
    html! { div.charts { @for (index, figure) in figures.iter().enumerate() { (PreEscaped(figure.html(&format!("{prefix}{index}")))) } } }
}

/// A number with links to what measured it.
fn number(entry: &Entry) -> Markup {
    match entry {
        Entry::Empty => html! {},
        Entry::Missing => html! { span.bad { "no result" } },
        Entry::NotMeasured => html! { "not measured" },
        Entry::Measured(figure) => linked(figure),
    }
}

fn linked(figure: &Figure) -> Markup {
    match figure.repeats.as_slice() {
        [alone] => html! { a href={ "#" (anchor(&alone.key.to_string())) } { (in_words(figure)) } },
        several => {
            html! { (in_words(figure)) small { @for repeat in several { a href={ "#" (anchor(&repeat.key.to_string())) } { (repeat_label(repeat)) } " " } } }
        }
    }
}

fn repeat_label(repeat: &Repeat) -> String {
    let values: Vec<String> = repeat.settings.iter().map(|(_, value)| setting(value)).collect();
    if values.is_empty() { visible(&repeat.stage) } else { visible(&values.join(",")) }
}

fn gain(compared: &Compared) -> Markup {
    let Some(figure) = compared.entry.figure() else { return number(&compared.entry) };
    let verdict = compared.verdict.map_or("", |verdict| verdict.words());
    let tone = match verdict {
        "better" => "good",
        "worse" => "bad",
        _ => "",
    };
    let chance = compared.corrected.map(|p| format!("corrected p {}", self::figure(p)));
    html! { (in_words(figure)) small class=(tone) title=[chance] { (verdict) } }
}

/// The place of a stage on the page.
fn anchor(key: &str) -> String {
    format!("k{}", key.get(..16).unwrap_or(key))
}

/// Characters of a text that are shown.
const SHOWN: usize = 1500;

/// A text with its line breaks, and nothing hidden in it; of a long one the beginning.
fn written(text: &str) -> String {
    let beginning: String = text.chars().take(SHOWN).collect();
    let shown = beginning.split('\n').map(visible).collect::<Vec<_>>().join("\n");
    match text.chars().count() {
        0 => "(nothing)".to_owned(),
        all if all > SHOWN => format!("{shown}… ({all} characters in all)"),
        _ => shown,
    }
}

/// The way from a folder to a path, by which a page finds its files wherever both are moved together.
fn relative(folder: &Path, path: &Path) -> String {
    let shared = folder.components().zip(path.components()).take_while(|(a, b)| a == b).count();
    let up = folder.components().skip(shared).map(|_| Component::ParentDir);
    let way: PathBuf = up.chain(path.components().skip(shared)).collect();
    let text = way.to_string_lossy();
    // What an address would read as something else.
    let escaped = |c: char| match c {
        '%' | '?' | '#' | '"' | '<' | '>' | ' ' => format!("%{:02X}", u32::from(c)),
        c => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_shown_as_text() {
        assert_eq!(
            written("</script>\n\u{202e}a\u{0}"),
            "</script>\n\\u{202e}a\\u{0}",
            "what maud escapes is left to it"
        );
        let long = "x".repeat(1 << 20);
        assert!(written(&long).ends_with("x… (1048576 characters in all)") && written(&long).len() < 2000);
        assert_eq!(html! { p { (written("</p><script>")) } }.into_string(), "<p>&lt;/p&gt;&lt;script&gt;</p>");
    }

    #[test]
    fn links_lead_from_the_page_to_the_store() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(way("/a/b", "/a/b/.pipeline/trees/x"), ".pipeline/trees/x");
        assert_eq!(way("/a/out", "/a/.pipe line/t#"), "../.pipe%20line/t%23");
    }

    #[test]
    fn commands_can_be_pasted() {
        assert_eq!([quoted("a=1e-3"), quoted("x y"), quoted("it's")], ["a=1e-3", "'x y'", "'it'\\''s'"]);
    }
}
