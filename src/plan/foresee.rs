//! What can be known of stages before they run: facts flow along the edges of the graph, and every kind says what follows
//! for its stage (see [`contract::Outlook`], where the rules are).
//!
//! One walk serves all: `check`, `plan` and the start of `run` ask with what configurations and files say; during a run the
//! coordinator asks again whenever a result has come in, and a stage that cannot work fails at once instead of hours later;
//! a worker asks with the facts of the very values that enter.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;

use contract::{Cause, Facts, Finding, Location, Machine, Outlook, Registry, Source};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;

use crate::graph::{Entry, Exit, Graph, Operator, Origin, Subgraph};
use crate::ground::source::Place;
use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, Diagnostics};
use crate::plan::selection::{Selection, reach};
use crate::plan::{Settled, content, key};
use crate::rounds::flow::{Entering, Leaving, Part, Seen, look};

/// A walk over the graph that remembers what it has seen.
pub(crate) struct Foresight<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) selection: &'a Selection,
    pub(crate) registry: &'static Registry,
    machine: Machine,
    /// Of each subgraph, what was known of its entries and what was said.
    seen: HashMap<NodeIndex, (Entering, Seen)>,
    /// What is known of the outputs of each subgraph.
    known: HashMap<NodeIndex, Leaving>,
}

/// A finding about a stage of the graph.
#[derive(Clone, Debug)]
pub(crate) struct Foreseen {
    pub(crate) node: NodeIndex,
    part: Part,
    finding: Finding,
}

impl<'a> Foresight<'a> {
    /// Nothing seen yet.
    pub(crate) fn new(
        graph: &'a Graph,
        selection: &'a Selection,
        registry: &'static Registry,
        machine: Machine,
    ) -> Self {
        Foresight { graph, selection, registry, machine, seen: HashMap::new(), known: HashMap::new() }
    }

    /// All that is wrong or odd about selected stages without a result.
    pub(crate) fn look(&mut self, settled: &BTreeMap<NodeIndex, Settled>) -> Vec<Foreseen> {
        // Nothing is asked of what no stage without a result reads, directly or not.
        let open = self.selection.order.iter().copied().filter(|node| !settled.contains_key(node)).collect();
        let asked = reach(self.graph, open, Direction::Incoming);
        self.known.clear();
        self.walk(settled, asked.iter().filter_map(|node| self.selection.positions.get(node).copied()).collect())
    }

    /// What is wrong or odd about stages without a result of which more is known since these have one, or none any more.
    pub(crate) fn look_again(
        &mut self,
        settled: &BTreeMap<NodeIndex, Settled>,
        changed: impl IntoIterator<Item = NodeIndex>,
    ) -> Vec<Foreseen> {
        let positions = &self.selection.positions;
        self.walk(settled, changed.into_iter().filter_map(|node| positions.get(&node).copied()).collect())
    }

    /// Looks at what stands at these places in the order, and at all that reads what was said of them anew.
    fn walk(&mut self, settled: &BTreeMap<NodeIndex, Settled>, mut places: BTreeSet<usize>) -> Vec<Foreseen> {
        let mut found = Vec::new();
        while let Some(place) = places.pop_first() {
            let node = self.selection.order[place];
            let edges = self.graph.subgraphs.edges_directed(node, Direction::Incoming);
            let entries = edges.map(|edge| {
                let facts = self.known.get(&edge.source()).and_then(|outputs| outputs.get(&edge.weight().output));
                (edge.weight().input.clone(), facts.cloned().unwrap_or_default())
            });
            let entries: Entering = entries.collect();
            let result = settled.get(&node);
            let mut outputs = self.look_at(node, entries, result.is_some(), &mut found);
            outputs.extend(result.map(recorded).unwrap_or_default());
            let before = self.known.get(&node);
            if before.is_some_and(|before| *before != outputs) {
                let readers = self.graph.subgraphs.neighbors_directed(node, Direction::Outgoing);
                places.extend(readers.filter_map(|reader| self.selection.positions.get(&reader)));
            }
            self.known.insert(node, outputs);
        }
        found
    }

    fn look_at(&mut self, node: NodeIndex, entries: Entering, has_result: bool, found: &mut Vec<Foreseen>) -> Leaving {
        let subgraph = &self.graph.subgraphs[node].subgraph;
        let fresh = self.seen.get(&node).is_none_or(|(before, _)| *before != entries);
        if fresh {
            let seen = look_at_hand(subgraph, &entries, self.registry, &self.machine);
            self.seen.insert(node, (entries, seen));
        }
        let (_, seen) = &self.seen[&node];
        if !has_result {
            let missing = missing_sources(subgraph, self.registry);
            let findings = missing.into_iter().chain(seen.findings.iter().cloned());
            found.extend(findings.map(|(part, finding)| Foreseen { node, part, finding }));
        }
        seen.outputs.clone()
    }

    /// Bytes of memory that a subgraph which was looked at needs at least, as far as they are known.
    pub(crate) fn memory(&self, node: NodeIndex) -> u64 {
        self.seen.get(&node).map_or(0, |(_, seen)| seen.memory)
    }

    /// The same as messages with places: errors, and what is only odd.
    pub(crate) fn diagnose(&mut self, settled: &BTreeMap<NodeIndex, Settled>) -> (Diagnostics, Diagnostics) {
        let found = self.look(settled);
        self.diagnostics(&found).by_gravity()
    }

    fn diagnostics(&self, found: &[Foreseen]) -> Diagnostics {
        let mut diagnostics: Vec<Diagnostic> = Vec::new();
        for foreseen in found {
            let diagnostic = self.diagnostic(foreseen);
            // Variants share what they do not change, and would say it again.
            let known = |other: &Diagnostic| other.message == diagnostic.message && other.place() == diagnostic.place();
            if !diagnostics.iter().any(known) {
                diagnostics.push(diagnostic);
            }
        }
        Diagnostics { diagnostics }
    }

    fn diagnostic(&self, foreseen: &Foreseen) -> Diagnostic {
        let Foreseen { finding, .. } = foreseen;
        let message = format!("`{}`: {}", self.name(foreseen), finding.message);
        let mut diagnostic = Diagnostic::new(message, finding.hint.clone());
        if !finding.is_error {
            diagnostic = diagnostic.warning();
        }
        let mut shown = Vec::new();
        for (place, words) in self.places(foreseen) {
            if let Some(span) = self.span(&place).filter(|span| !shown.contains(span)) {
                shown.push(span.clone());
                diagnostic = diagnostic.also(span, words);
            }
        }
        diagnostic
    }

    /// The same in one line, for events.
    pub(crate) fn line(&self, foreseen: &Foreseen) -> String {
        let Finding { message, hint, .. } = &foreseen.finding;
        let place = self.places(foreseen).into_iter().next();
        let place =
            place.map_or(String::new(), |(Place { file, line, column }, _)| format!(" ({file}:{line}:{column})"));
        let part = match &foreseen.part {
            Part::Stage(stage) if !self.is_alone(foreseen.node) => format!("`{stage}`: "),
            _ => String::new(),
        };
        format!("{part}{message}; {hint}{place}")
    }

    fn name(&self, foreseen: &Foreseen) -> String {
        let label = &self.selection.labels[&foreseen.node];
        match &foreseen.part {
            _ if self.is_alone(foreseen.node) => label.clone(),
            Part::Whole => label.clone(),
            Part::Stage(stage) => format!("{label}.{stage}"),
            Part::Window(window) => format!("{label}.windows.{window}"),
        }
    }

    fn is_alone(&self, node: NodeIndex) -> bool {
        let subgraph = &self.graph.subgraphs[node].subgraph;
        matches!(subgraph, Subgraph::Loop(_)) && subgraph.written_loop().is_none()
    }

    /// Where the causes of a finding are written, with a few words for each; at least the stage itself.
    fn places(&self, foreseen: &Foreseen) -> Vec<(Place, String)> {
        let Foreseen { node, part, finding } = foreseen;
        let found = finding.causes.iter().map(|cause| match cause {
            Cause::Field(field) => self.field(*node, part, field).map_or_else(
                || (self.graph.subgraphs[*node].place.clone(), String::new()),
                |place| (place, String::new()),
            ),
            Cause::Input(port, field) => self.maker_of(*node, part, port, field),
        });
        let places: Vec<_> = found.collect();
        if places.is_empty() { vec![(self.graph.subgraphs[*node].place.clone(), String::new())] } else { places }
    }

    fn operator(&self, node: NodeIndex, part: &Part) -> Option<&Operator> {
        match (&self.graph.subgraphs[node].subgraph, part) {
            (Subgraph::Operator(operator), _) => Some(operator),
            (Subgraph::Loop(body), Part::Stage(stage)) => Some(&body.stages.get(stage)?.operator),
            (Subgraph::Loop(_), _) => None,
        }
    }

    /// Where a field is written: itself, a part of it, or what it is a part of.
    fn field(&self, node: NodeIndex, part: &Part, field: &str) -> Option<Place> {
        let places = match (&self.graph.subgraphs[node].subgraph, part) {
            (Subgraph::Loop(body), Part::Window(window)) => &body.windows.get(window)?.places,
            _ => &self.operator(node, part)?.places,
        };
        let inside = format!("{field}.");
        let outer = std::iter::successors(Some(field), |path| Some(path.rsplit_once('.')?.0));
        let exact = outer.clone().take(1).find_map(|path| places.get(path));
        let below = || places.iter().find(|(path, _)| path.starts_with(&inside)).map(|(_, place)| place);
        exact.or_else(below).or_else(|| outer.skip(1).find_map(|path| places.get(path))).cloned()
    }

    /// Follows an input to the stage that decides about `field`: what makes the value, or passes it on from its own input
    /// of that type.
    fn maker_of(&self, node: NodeIndex, part: &Part, port: &str, field: &str) -> (Place, String) {
        let (mut node, mut part, mut port) = (node, part.clone(), port.to_owned());
        // A value passes through few stages; one that is carried around comes back to where it was.
        for _ in 0..self.graph.subgraphs.node_count() + 8 {
            let Some((maker, of)) = self.before(node, &part, &port) else { break };
            let back = (maker, &of) == (node, &part);
            (node, part) = (maker, of);
            if let Some(place) = self.field(node, &part, field) {
                return (place, format!("`{}` has it from here", self.selection.labels[&node]));
            }
            let passed_on = self.operator(node, &part).and_then(|operator| {
                let made = operator.ports.outputs.iter().map(|output| output.port_type).collect::<Vec<_>>();
                let inputs = operator.ports.inputs.iter().filter(|input| made.contains(&input.port_type));
                inputs.map(|input| input.name.clone()).find(|input| self.before(node, &part, input).is_some())
            });
            match passed_on.filter(|_| !back) {
                Some(input) => port = input,
                None => break,
            }
        }
        let place = self.graph.subgraphs[node].place.clone();
        (place, format!("`{}` makes it", self.selection.labels.get(&node).map_or("", String::as_str)))
    }

    /// The stage that an input comes from.
    fn before(&self, node: NodeIndex, part: &Part, port: &str) -> Option<(NodeIndex, Part)> {
        let entry = match (&self.graph.subgraphs[node].subgraph, part) {
            (Subgraph::Loop(body), Part::Stage(stage)) => match body.stages.get(stage)?.inputs.get(port) {
                None => return Some((node, part.clone())),
                Some(Origin::Outside) => Entry::outside(stage, port),
                Some(Origin::Window(window)) => Entry::Window(window.clone()),
                Some(Origin::Stage(from)) => return Some((node, Part::Stage(from.stage.clone()))),
                Some(Origin::Carry(carry)) => {
                    let entry = Entry::Carry(carry.clone());
                    if self.source(node, &entry).is_none() {
                        return Some((node, Part::Stage(body.carry.get(carry)?.next.stage.clone())));
                    }
                    entry
                }
            },
            _ => Entry::Port(port.to_owned()),
        };
        let (maker, output) = self.source(node, &entry)?;
        let part = match (&self.graph.subgraphs[maker].subgraph, output) {
            (Subgraph::Loop(body), Exit::Kept(name)) => Part::Stage(body.carry.get(name)?.next.stage.clone()),
            (Subgraph::Loop(_), Exit::Metrics(stage)) => Part::Stage(stage.clone()),
            (_, _) => Part::Whole,
        };
        Some((maker, part))
    }

    fn source(&self, node: NodeIndex, entry: &Entry) -> Option<(NodeIndex, &Exit)> {
        let mut edges = self.graph.subgraphs.edges_directed(node, Direction::Incoming);
        let edge = edges.find(|edge| edge.weight().input == *entry)?;
        Some((edge.source(), &edge.weight().output))
    }

    /// The word that is written at a place.
    fn span(&self, place: &Place) -> Option<Span> {
        let source = self.graph.sources.iter().find(|source| source.name == place.file)?;
        let line_start = source.line_start(place.line)?;
        let rest = &source.text[line_start..];
        let start = line_start + rest.char_indices().nth(place.column - 1).map_or(rest.len(), |(at, _)| at);
        let word = source.text[start..].find(|c: char| c.is_whitespace() || ",:}]#".contains(c));
        let end = word.map_or(source.text.len(), |length| start + length).max(start);
        Some(Span { source: source.clone(), start, end })
    }
}

impl Foreseen {
    pub(crate) fn is_error(&self) -> bool {
        self.finding.is_error
    }
}

/// Looks at a subgraph, and into those of its files that are elsewhere but have been fetched before.
fn look_at_hand(subgraph: &Subgraph, entries: &Entering, registry: &Registry, machine: &Machine) -> Seen {
    let here = |source: Source| Some((content::at_hand(&source)?.to_str()?.to_owned(), source));
    let at_hand = subgraph.operators().into_iter().enumerate().flat_map(|(index, operator)| {
        sources_of(operator, registry).into_iter().filter_map(here).map(move |found| (index, found))
    });
    let at_hand: Vec<(usize, (String, Source))> = at_hand.collect();
    if at_hand.is_empty() {
        return look(subgraph, entries, registry, machine);
    }
    let mut subgraph = subgraph.clone();
    let mut operators = subgraph.operators_mut();
    let mut fetched: Vec<(String, String)> = Vec::new();
    for (index, (path, source)) in at_hand {
        let Operator { config, kind, .. } = &mut *operators[index];
        if key::put(config, &source.field, path.as_str().into(), kind).is_ok() {
            fetched.push((path, source.at.to_string()));
        }
    }
    let mut seen = look(&subgraph, entries, registry, machine);
    for (_, finding) in &mut seen.findings {
        let as_written = |text: &String, (path, written): &(String, String)| text.replace(path, written);
        finding.message = fetched.iter().fold(finding.message.clone(), |text, place| as_written(&text, place));
        finding.hint = fetched.iter().fold(finding.hint.clone(), |text, place| as_written(&text, place));
    }
    seen
}

/// The files outside of the pipeline that a stage names.
fn sources_of(operator: &Operator, registry: &Registry) -> Vec<Source> {
    registry.get(&operator.kind).map(|kind| kind.sources(&operator.config)).unwrap_or_default()
}

/// Whether a source is where it is said to be, as far as that is known without fetching it; else why not, and what to do.
fn is_there(source: &Source) -> Result<(), (anyhow::Error, &'static str)> {
    match &source.at {
        Location::Local(path) => match fs::metadata(path) {
            Ok(_) => Ok(()),
            Err(error) => {
                Err((contract::files::cannot("read", path, error), "give the path of a file or folder that is there"))
            }
        },
        Location::Hub(at) => content::REMOTE
            .commit(at)
            .map(drop)
            .map_err(|error| (error, "a full commit after `@` needs nobody to look it up")),
        // Nobody is asked before it is read.
        Location::Web(_) => Ok(()),
    }
}

/// Files that a stage names and that are not there.
fn missing_sources(subgraph: &Subgraph, registry: &Registry) -> Vec<(Part, Finding)> {
    let operators: Vec<(Part, &Operator)> = match subgraph {
        Subgraph::Operator(operator) => vec![(Part::Whole, operator)],
        Subgraph::Loop(body) => {
            let stages = body.stages.iter();
            stages.map(|(name, stage)| (Part::Stage(name.clone()), &stage.operator)).collect()
        }
    };
    let mut missing = Vec::new();
    for (part, operator) in operators {
        for source in sources_of(operator, registry) {
            let Err((error, hint)) = is_there(&source) else { continue };
            let mut outlook = Outlook::default();
            outlook.error([Cause::Field(source.field.join("."))], format!("{error:#}"), hint);
            missing.extend(outlook.findings.into_iter().map(|finding| (part.clone(), finding)));
        }
    }
    missing
}

/// The facts that were kept with a result. Results of earlier versions have none.
fn recorded(settled: &Settled) -> Leaving {
    let info = &settled.record.info;
    let facts = info.get("facts").and_then(|facts| serde_json::from_value(facts.clone()).ok());
    let facts: BTreeMap<String, Facts> = facts.unwrap_or_default();
    let exits = crate::plan::key::outputs(&settled.action.subgraph).into_iter();
    exits.filter_map(|(exit, stored)| Some((exit, facts.get(&stored)?.clone()))).collect()
}
