//! Draws the graph as Mermaid, as DOT, or as a picture.
//!
//! A loop is a box with its round inside; other subgraphs are single shapes. A thick line is a handoff through the store, a
//! thin one a value in memory, a dotted one what the next round begins with. Types stand on the lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;

use chart::Tone;
use contract::files::counted;

use crate::graph::{Entry, Every, Exit, Graph, Loop, Node, Origin, Subgraph};

/// The graph in Mermaid's flowchart language.
pub(crate) fn draw_mermaid(graph: &Graph) -> String {
    let mut out = String::from("flowchart TD\n");
    for drawn in drawing(graph, &|_| true) {
        match drawn {
            Part::Open { id, label, .. } => {
                let _ = writeln!(out, "    subgraph {id} [\"{}\"]", mermaid_text(&label));
            }
            Part::Close => out.push_str("    end\n"),
            Part::Shape { id, label, shape, .. } => {
                let (open, close) = match shape {
                    Shape::Stage => ("[\"", "\"]"),
                    Shape::Window => ("[/\"", "\"/]"),
                    Shape::Carried => ("([\"", "\"])"),
                };
                let _ = writeln!(out, "    {id}{open}{}{close}", mermaid_text(&label));
            }
            Part::Line { from, to, label, line, .. } => {
                let arrow = match line {
                    Line::Handoff => "==>",
                    Line::Memory => "-->",
                    Line::NextRound => "-.->",
                };
                let _ = writeln!(out, "    {from} {arrow}|\"{}\"| {to}", mermaid_text(&label));
            }
        }
    }
    out
}

/// The graph in the language of Graphviz.
pub(crate) fn draw_dot(graph: &Graph) -> String {
    let mut out = String::from("digraph pipeline {\n    node [shape=box];\n");
    for drawn in drawing(graph, &|_| true) {
        match drawn {
            Part::Open { id, label, .. } => {
                let _ = writeln!(out, "    subgraph cluster_{id} {{\n    label={};", dot_text(&label));
            }
            Part::Close => out.push_str("    }\n"),
            Part::Shape { id, label, shape, .. } => {
                let shape = match shape {
                    Shape::Stage => "box",
                    Shape::Window => "parallelogram",
                    Shape::Carried => "ellipse",
                };
                let _ = writeln!(out, "    {id} [label={}, shape={shape}];", dot_text(&label));
            }
            Part::Line { from, to, label, line, .. } => {
                let style = match line {
                    Line::Handoff => "style=bold, penwidth=2",
                    Line::Memory => "style=solid",
                    Line::NextRound => "style=dotted, constraint=false",
                };
                let _ = writeln!(out, "    {from} -> {to} [label={}, {style}];", dot_text(&label));
            }
        }
    }
    out + "}\n"
}

/// Some subgraphs as a picture; `tone` says how each fares.
pub(crate) fn picture(
    graph: &Graph,
    title: &str,
    nodes: &BTreeSet<NodeIndex>,
    tone: &dyn Fn(NodeIndex) -> Tone,
) -> chart::Graph {
    let mut picture = chart::Graph { title: title.to_owned(), description: None, nodes: Vec::new(), edges: Vec::new() };
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut parent = None;
    for drawn in drawing(graph, &|node| nodes.contains(&node)) {
        match drawn {
            Part::Open { id, label, node } => {
                parent = Some(picture.nodes.len());
                places.insert(id, picture.nodes.len());
                let (lines, tone) = (vec![label], tone(node));
                picture.nodes.push(chart::Node { lines, shape: chart::Shape::Box, tone, parent: None });
            }
            Part::Close => parent = None,
            Part::Shape { id, label, shape, node } => {
                let shape = match shape {
                    Shape::Stage => chart::Shape::Box,
                    Shape::Window => chart::Shape::Slanted,
                    Shape::Carried => chart::Shape::Round,
                };
                let lines = label.lines().map(str::to_owned).collect();
                let tone = if parent.is_some() { Tone::Plain } else { tone(node) };
                places.insert(id, picture.nodes.len());
                picture.nodes.push(chart::Node { lines, shape, tone, parent });
            }
            Part::Line { from, to, label, line, .. } => {
                let line = match line {
                    Line::Handoff => chart::Line::Thick,
                    Line::Memory => chart::Line::Thin,
                    Line::NextRound => chart::Line::Dotted,
                };
                picture.edges.push(chart::Edge { from: places[&from], to: places[&to], label, line });
            }
        }
    }
    picture
}

/// A piece of a drawing, in the order in which it is written; `node` is the subgraph that it is, or is in.
enum Part {
    Open {
        id: String,
        label: String,
        node: NodeIndex,
    },
    Close,
    Shape {
        id: String,
        label: String,
        shape: Shape,
        node: NodeIndex,
    },
    /// `ports` are what it leaves and what it enters.
    Line {
        from: String,
        to: String,
        label: String,
        ports: [String; 2],
        line: Line,
    },
}

impl Part {
    fn ports(&self) -> Option<&[String; 2]> {
        match self {
            Part::Line { ports, .. } => Some(ports),
            _ => None,
        }
    }
}

enum Shape {
    Stage,
    Window,
    Carried,
}

enum Line {
    Handoff,
    Memory,
    NextRound,
}

/// The subgraphs that are shown, and what leads from one of them to another.
fn drawing(graph: &Graph, is_shown: &dyn Fn(NodeIndex) -> bool) -> Vec<Part> {
    let mut parts = Vec::new();
    for index in graph.subgraphs.node_indices().filter(|index| is_shown(*index)) {
        let node = &graph.subgraphs[index];
        let name = shown_name(graph, index, is_shown);
        match &node.subgraph {
            Subgraph::Operator(operator) => {
                let label = format!("{name}\n{}", operator.kind);
                parts.push(Part::Shape { id: id(index), label, shape: Shape::Stage, node: index });
            }
            Subgraph::Loop(body) if body.alone => {
                let kind = body.stages.values().next().map_or("", |stage| stage.operator.kind.as_str());
                let label = format!("{name}\n{kind}, {}", rounds(body));
                parts.push(Part::Shape { id: id(index), label, shape: Shape::Stage, node: index });
            }
            Subgraph::Loop(body) => draw_loop(index, &name, body, &mut parts),
        }
    }
    let edges = graph.subgraphs.edge_references();
    for edge in edges.filter(|edge| is_shown(edge.source()) && is_shown(edge.target())) {
        let handoff = edge.weight();
        parts.push(Part::Line {
            from: leaves(edge.source(), &graph.subgraphs[edge.source()], &handoff.output),
            to: enters(edge.target(), &graph.subgraphs[edge.target()], &handoff.input),
            label: handoff.port_type.name().to_owned(),
            ports: [handoff.output.to_string(), entered(&handoff.input)],
            line: Line::Handoff,
        });
    }
    name_ports(&mut parts);
    parts
}

/// Lines between the same two shapes would all say the same: each says what it brings, or as what where they bring the same.
fn name_ports(parts: &mut [Part]) {
    let mut lines: BTreeMap<(String, String), Vec<&mut Part>> = BTreeMap::new();
    for part in parts {
        if let Part::Line { from, to, .. } = part {
            lines.entry((from.clone(), to.clone())).or_default().push(part);
        }
    }
    for mut same in lines.into_values().filter(|lines| lines.len() > 1) {
        let left: BTreeSet<String> =
            same.iter().filter_map(|part| part.ports().map(|[from, _]| from.clone())).collect();
        let which = usize::from(left.len() < same.len());
        for part in &mut same {
            if let Part::Line { label, ports, .. } = part {
                let word = if which == 0 { "" } else { "as " };
                *label = format!("{label} ({word}{})", ports[which]);
            }
        }
    }
}

/// The port that a handoff enters, as a person wrote it.
fn entered(entry: &Entry) -> String {
    match entry {
        Entry::Outside(read) => read.port.clone(),
        entry => entry.to_string(),
    }
}

fn draw_loop(node: NodeIndex, name: &str, body: &Loop, parts: &mut Vec<Part>) {
    let id = &id(node);
    parts.push(Part::Open { id: id.clone(), label: format!("{name}: {}", rounds(body)), node });
    for (window, spec) in &body.windows {
        let label = format!("{window}\n{} a round", counted(spec.take, "row"));
        parts.push(Part::Shape { id: inner(id, "windows", window), label, shape: Shape::Window, node });
    }
    for carried in body.carry.keys() {
        parts.push(Part::Shape {
            id: inner(id, "carry", carried),
            label: carried.clone(),
            shape: Shape::Carried,
            node,
        });
    }
    for (stage, spec) in &body.stages {
        let every = match spec.every {
            Every::Round => String::new(),
            Every::Epoch => ", every epoch".to_owned(),
            Every::Rounds(rounds) => format!(", every {rounds} rounds"),
        };
        let label = format!("{stage}\n{}{every}", spec.operator.kind);
        parts.push(Part::Shape { id: inner(id, "stage", stage), label, shape: Shape::Stage, node });
    }
    for (stage, spec) in &body.stages {
        for (port, origin) in &spec.inputs {
            let from = match origin {
                Origin::Outside => continue,
                Origin::Window(window) => inner(id, "windows", window),
                Origin::Carry(carried) => inner(id, "carry", carried),
                Origin::Stage(read) => inner(id, "stage", &read.stage),
            };
            let label = spec.operator.ports.find_input(port).map_or(String::new(), |port| port.port_type.to_string());
            let to = inner(id, "stage", stage);
            let left = match origin {
                Origin::Stage(read) => read.port.clone(),
                Origin::Outside | Origin::Window(_) | Origin::Carry(_) => String::new(),
            };
            parts.push(Part::Line { from, to, label, ports: [left, port.clone()], line: Line::Memory });
        }
    }
    for (carried, spec) in &body.carry {
        let (from, to) = (inner(id, "stage", &spec.next.stage), inner(id, "carry", carried));
        let ports = [spec.next.port.clone(), carried.clone()];
        parts.push(Part::Line { from, to, label: spec.port_type.to_string(), ports, line: Line::NextRound });
    }
    parts.push(Part::Close);
}

/// How long a loop runs, in words.
fn rounds(body: &Loop) -> String {
    let epochs = body.windows.values().find_map(|window| window.epochs);
    match (epochs, body.rounds) {
        (Some(epochs), Some(rounds)) => format!("{}, {} at most", counted(epochs, "epoch"), counted(rounds, "round")),
        (Some(epochs), None) => counted(epochs, "epoch"),
        (None, Some(rounds)) => counted(rounds, "round"),
        (None, None) => "rounds".to_owned(),
    }
}

/// The name of a subgraph, with the first cell that has it where the name stands for several.
fn shown_name(graph: &Graph, index: NodeIndex, is_shown: &dyn Fn(NodeIndex) -> bool) -> String {
    let name = &graph.subgraphs[index].name;
    let shown = graph.subgraphs.node_indices().filter(|node| is_shown(*node));
    let same = shown.filter(|node| graph.subgraphs[*node].name == *name).count();
    let cell = graph.cells.iter().find(|cell| cell.names.values().any(|node| *node == index));
    match cell {
        Some(cell) if same > 1 => format!("{name} ({})", cell.label),
        _ => name.clone(),
    }
}

fn id(index: NodeIndex) -> String {
    format!("n{}", index.index())
}

/// The shape of something inside of a loop. Names may hold `-`, which identifiers may not; no two names become one.
fn inner(id: &str, section: &str, name: &str) -> String {
    format!("{id}_{section}_{}", name.replace('_', "__").replace('-', "_d"))
}

/// The shape that a handoff comes from: in a loop, what made its output.
fn leaves(index: NodeIndex, node: &Node, exit: &Exit) -> String {
    match exit {
        Exit::Kept(carried) if is_box(node) => inner(&id(index), "carry", carried),
        Exit::Metrics(stage) if is_box(node) => inner(&id(index), "stage", stage),
        Exit::Port(_) | Exit::Kept(_) | Exit::Metrics(_) => id(index),
    }
}

/// The shape that a handoff leads to: in a loop, what it enters.
fn enters(index: NodeIndex, node: &Node, entry: &Entry) -> String {
    match entry {
        _ if !is_box(node) => id(index),
        Entry::Port(_) => id(index),
        Entry::Window(window) => inner(&id(index), "windows", window),
        Entry::Carry(carried) => inner(&id(index), "carry", carried),
        Entry::Outside(read) => inner(&id(index), "stage", &read.stage),
    }
}

fn is_box(node: &Node) -> bool {
    node.subgraph.written_loop().is_some()
}

fn mermaid_text(label: &str) -> String {
    label.replace('"', "#quot;").replace('\n', "<br/>")
}

fn dot_text(label: &str) -> String {
    format!("\"{}\"", label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}
