//! Resolves a spec into the graph: configurations checked, names looked up, types compared, circles found.
//!
//! It goes in three steps. First every stage's configuration is checked, which decides its ports. Then every reference
//! finds its output. Last the subgraphs of the cell join the graph of all cells, where those that do the same with the
//! same inputs are one node.

mod alone;
mod body;
mod config;
mod order;
mod reference;

use std::collections::HashMap;

use contract::port::several_of;
use contract::{PortType, Ports};
use indexmap::IndexMap;
use petgraph::graph::NodeIndex;
use serde_json::{Value as Json, json};

use crate::graph::{Entry, Exit, Graph, Handoff, MetricRef, Node, Operator, Report, Subgraph};
use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, Problems};
use crate::language::kinds::Kinds;
use crate::language::read::{self, Text};
use crate::language::removal;
use crate::language::spec::{OperatorSpec, ReportSpec, Spec, StageSpec};
use order::Reading;
use reference::{Outer, Output, Want, outputs_of};

/// The graph of all cells while it is built.
#[derive(Default)]
pub(crate) struct Assembly {
    pub(crate) graph: Graph,
    /// What each node does and reads, so that other cells find it.
    known: HashMap<String, NodeIndex>,
}

/// A stage whose configuration is checked; its edges are not resolved yet.
enum Checked<'a> {
    Operator(&'a OperatorSpec, Operator),
    Alone(Box<alone::Checked<'a>>),
    Loop(body::Checked<'a>),
}

impl Checked<'_> {
    fn outputs(&self) -> Option<Vec<Output>> {
        match self {
            Checked::Operator(_, operator) => Some(outputs_of(&operator.ports)),
            Checked::Alone(alone) => Some(alone.outputs()),
            Checked::Loop(body) => body.outputs(),
        }
    }
}

/// A subgraph and what it reads.
struct Wired {
    subgraph: Subgraph,
    edges: Vec<Edge>,
}

/// An edge into a subgraph.
struct Edge {
    input: Entry,
    /// Top-level stage that is read.
    stage: String,
    output: Exit,
    port_type: PortType,
    /// Where it is written.
    span: Span,
}

/// Adds the stages of one cell to the graph. Gives what their names stand for, and the table; `None` where something is
/// wrong.
///
/// `variants` are all that the file knows, `base` too.
pub(crate) fn cell(
    spec: &Spec,
    variant: &str,
    variants: &[&str],
    kinds: &Kinds,
    assembly: &mut Assembly,
    problems: &mut Problems,
) -> Option<(IndexMap<String, NodeIndex>, Option<Report>)> {
    let checked: IndexMap<&str, Option<Checked>> =
        spec.stages.iter().map(|(name, stage)| (name.as_str(), check(name, stage, spec, kinds, problems))).collect();
    let outputs = checked.iter().map(|(name, stage)| (*name, stage.as_ref().and_then(Checked::outputs))).collect();
    let outer = Outer { outputs, removed: &spec.removed };
    let mut wired = IndexMap::new();
    for (name, stage) in checked {
        let Some(stage) = stage else { continue };
        let stage = match stage {
            Checked::Operator(spec, operator) => wire(name, spec, operator, &outer, problems),
            Checked::Alone(alone) => alone.wire(name, &outer, problems),
            Checked::Loop(body) => body.wire(name, &outer, problems),
        };
        wired.insert(name, stage);
    }
    let order = problems_to_none(stage_order(&wired), problems);
    let report = spec.report.as_ref().map(|report| resolve_report(report, spec, variant, variants, problems));
    let order = order.filter(|_| problems.0.is_empty())?;
    let mut names: IndexMap<String, NodeIndex> = IndexMap::new();
    for name in order {
        let stage = wired.swap_remove(name.as_str()).expect("the order holds every stage once");
        let node = assembly.add(&name, stage, spec.stages[&name].span(), &names);
        names.insert(name, node);
    }
    // In file order, for people.
    names.sort_by_key(|name, _| spec.stages.get_index_of(name));
    Some((names, report))
}

fn check<'a>(
    name: &str,
    stage: &'a StageSpec,
    spec: &Spec,
    kinds: &Kinds,
    problems: &mut Problems,
) -> Option<Checked<'a>> {
    match stage {
        StageSpec::Loop(body) => body::check(name, body, spec, kinds, problems).map(Checked::Loop),
        StageSpec::Operator(operator) => {
            let info = config::kind(operator, kinds, problems)?;
            if let Some(contract) = &info.alone {
                return alone::check(name, operator, contract, info, spec, kinds, problems)
                    .map(|alone| Checked::Alone(Box::new(alone)));
            }
            let resolved = config::operator(operator, info, &[], spec.conventions, problems)?;
            Some(Checked::Operator(operator, resolved))
        }
    }
}

fn wire(name: &str, spec: &OperatorSpec, operator: Operator, outer: &Outer, problems: &mut Problems) -> Wired {
    let ports = PortsOf { name, keys: &["stages", name], spec, operator: &operator, extra: &[] };
    ports.check(outer, problems);
    let mut edges = Vec::new();
    for (port, input) in &spec.inputs {
        let Some(known) = operator.ports.find_input(port) else { continue };
        let reader = format!("{name}.in.{port}");
        let want = Want { reader: &reader, port, port_type: Some(known.port_type) };
        if let Some((stage, output)) = outer.find(name, &input.source, &want, problems) {
            edges.push(Edge::new(Entry::Port(port.clone()), stage, output, input.source.span.clone()));
        }
    }
    Wired { subgraph: Subgraph::Operator(operator), edges }
}

impl Edge {
    fn new(input: Entry, stage: String, output: Output, span: Span) -> Self {
        Edge { input, stage, output: output.exit, port_type: output.port_type, span }
    }
}

/// The ports of a stage and what is connected to them.
struct PortsOf<'a> {
    /// As in messages: `train.learn`.
    name: &'a str,
    /// Keys from the root of the tree.
    keys: &'a [&'a str],
    spec: &'a OperatorSpec,
    operator: &'a Operator,
    /// Ports that are not the kind's own.
    extra: &'a [&'a str],
}

impl PortsOf<'_> {
    /// Every port that is connected exists, and every port that must be connected is.
    fn check(&self, outer: &Outer, problems: &mut Problems) {
        let kind = &self.operator.kind;
        let known =
            || self.operator.ports.inputs.iter().map(|port| port.name.as_str()).chain(self.extra.iter().copied());
        let is_known = |port: &str| self.operator.ports.find_input(port).is_some() || self.extra.contains(&port);
        for (port, input) in self.spec.inputs.iter().filter(|(port, _)| !is_known(port)) {
            let named = self.operator.ports.inputs.iter().find(|known| known.name == *port && known.several);
            let diagnostic = match (named, several_of(port)) {
                (Some(_), _) => Diagnostic::new(
                    format!("input `{port}` of kind `{kind}` takes several values by name"),
                    format!("write `{port}: {{NAME: {}}}`", input.source.value),
                ),
                (None, Some((one, name))) if known().any(|known| known == one) => Diagnostic::new(
                    format!("input `{one}` of kind `{kind}` takes one value"),
                    format!("write `{one}: {}`, without the name `{name}`", input.source.value),
                ),
                (None, several) => {
                    let port = several.map_or(port.as_str(), |(port, _)| port);
                    let hint = crate::language::diagnostic::did_you_mean(port, "input", known());
                    Diagnostic::new(format!("kind `{kind}` has no input `{port}`"), hint)
                }
            };
            problems.push(diagnostic.at(input.port.clone(), "not an input"));
        }
        for port in self.operator.ports.inputs.iter().filter(|port| port.required) {
            let message = || format!("`{}` lacks its input `{}`, a `{}`", self.name, port.name, port.port_type);
            self.needs_one_of(&[&port.name], message, outer, problems);
        }
        for ports in &self.operator.ports.one_of {
            let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
            let message =
                || format!("`{}` needs one of its inputs {}", self.name, crate::language::diagnostic::quoted(&ports));
            self.needs_one_of(&ports, message, outer, problems);
        }
    }

    fn needs_one_of(&self, ports: &[&str], message: impl Fn() -> String, outer: &Outer, problems: &mut Problems) {
        let is_connected = |input: &String| ports.contains(&several_of(input).map_or(input.as_str(), |(port, _)| port));
        if self.spec.inputs.keys().any(is_connected) {
            return;
        }
        let removed = ports.iter().find_map(|port| removal(outer.removed, &[self.keys, &["in", port]].concat()));
        let diagnostic = match removed {
            Some(removed) => Diagnostic::new(message(), "rebind the input instead of removing it")
                .at(self.spec.span.clone(), "still needs it")
                .also(removed.span.clone(), format!("removed by {}", removed.owner)),
            None => Diagnostic::new(message(), format!("write `{}: STAGE` under `in:`", ports[0]))
                .at(self.spec.span.clone(), "not connected"),
        };
        problems.push(diagnostic);
    }
}

fn stage_order(wired: &IndexMap<&str, Wired>) -> Result<Vec<String>, Vec<Diagnostic>> {
    let mut reading = Reading::new();
    let nodes: HashMap<&str, NodeIndex> = wired.keys().map(|name| (*name, reading.add_node(*name))).collect();
    for (name, stage) in wired {
        for edge in &stage.edges {
            // A stage at fault is not among them.
            if let Some(from) = nodes.get(edge.stage.as_str()) {
                reading.add_edge(*from, nodes[name], edge.span.clone());
            }
        }
    }
    let order = order::order(&reading, "cut the circle, or carry the value from round to round in a `loop:`")?;
    Ok(order.into_iter().map(|node| reading[node].to_owned()).collect())
}

fn problems_to_none<T>(result: Result<T, Vec<Diagnostic>>, problems: &mut Problems) -> Option<T> {
    result.map_err(|found| problems.0.extend(found)).ok()
}

fn resolve_report(
    report: &ReportSpec,
    spec: &Spec,
    variant: &str,
    variants: &[&str],
    problems: &mut Problems,
) -> Report {
    let stages = || spec.stages.keys().map(String::as_str);
    for text in report.compare.iter().filter(|text| !variants.contains(&text.value.as_str())) {
        problems.push(read::unknown("variant", &text.value, &text.span, variants.iter().copied(), &[], &[]));
    }
    // A variant outside of the comparison may lack what the comparison shows.
    let compared = report.compare.is_empty() || report.compare.iter().any(|text| text.value == variant);
    let number = |text: &Text| {
        let (stage, metric) = text.value.split_once('.').expect("read with a dot");
        let known = spec.stages.contains_key(stage);
        let fault = read::unknown("stage", stage, &text.span, stages(), &spec.removed, &["stages", stage]);
        (MetricRef { stage: stage.to_owned(), metric: metric.to_owned() }, (!known).then_some(fault))
    };
    let mut faults = Vec::new();
    let mut numbers = |headings: &IndexMap<String, Text>| {
        let numbers = headings.iter().map(|(heading, text)| {
            let (number, fault) = number(text);
            faults.extend(fault);
            (heading.clone(), number)
        });
        numbers.collect::<IndexMap<_, _>>()
    };
    let metrics = numbers(&report.metrics);
    let rows = report.rows.iter().map(|(label, headings)| (label.clone(), numbers(headings))).collect();
    for text in report.seconds.iter().filter(|text| !spec.stages.contains_key(&text.value)) {
        let keys = ["stages", text.value.as_str()];
        // A stage that only some variants have costs the others nothing.
        if removal(&spec.removed, &keys).is_none() {
            faults.push(read::unknown("stage", &text.value, &text.span, stages(), &[], &keys));
        }
    }
    if compared {
        problems.0.extend(faults);
    }
    let texts = |texts: &[Text]| texts.iter().map(|text| text.value.clone()).collect();
    Report {
        metrics,
        compare: texts(&report.compare),
        baseline: report.baseline.clone(),
        correlate: report.correlate.clone(),
        seconds: texts(&report.seconds),
        rows,
        caption: report.caption.clone(),
    }
}

impl Assembly {
    /// The node that does this with these inputs: one that another cell has already, or a new one.
    fn add(&mut self, name: &str, stage: Wired, span: &Span, names: &IndexMap<String, NodeIndex>) -> NodeIndex {
        let mut sources: Vec<Json> = stage
            .edges
            .iter()
            .map(|edge| json!([edge.input, names[&edge.stage].index(), edge.output.to_string()]))
            .collect();
        sources.sort_by_key(Json::to_string);
        let identity = cache::canonical(&json!({"subgraph": identity(&stage.subgraph), "sources": sources}));
        if let Some(node) = self.known.get(&identity) {
            return *node;
        }
        let subgraphs = &mut self.graph.subgraphs;
        let node = subgraphs.add_node(Node { name: name.to_owned(), subgraph: stage.subgraph, place: span.place() });
        for edge in stage.edges {
            let handoff = Handoff { output: edge.output, input: edge.input, port_type: edge.port_type };
            subgraphs.add_edge(names[&edge.stage], node, handoff);
        }
        self.known.insert(identity, node);
        node
    }

    /// The whole graph.
    pub(crate) fn finish(self) -> Graph {
        debug_assert!(petgraph::algo::toposort(&self.graph.subgraphs, None).is_ok(), "each cell was ordered");
        self.graph
    }
}

/// What a subgraph does, wherever its values are written. Ports follow from kind and configuration.
pub(crate) fn identity(subgraph: &Subgraph) -> Json {
    let mut subgraph = subgraph.clone();
    for operator in subgraph.operators_mut() {
        operator.places.clear();
        operator.ports = Ports::default();
    }
    serde_json::to_value(subgraph).expect("a subgraph is JSON")
}
