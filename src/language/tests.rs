use std::path::Path;

use serde_json::json;

use super::*;
use crate::fake::registry;
use crate::graph::{Keep, Mode, Node as GraphNode, Origin, PortRef, Subgraph};

const EXAMPLE: &str = include_str!("../../tests/fixtures/promptkd.yaml");

/// Loads a text as if it were a shipped pipeline.
fn load_text(text: &str, request: &Request) -> Result<Graph, Diagnostics> {
    load(&Request { file: "test.yaml".into(), ..request.clone() }, &registry(), &[("test.yaml", text)])
}

fn graph(text: &str, request: &Request) -> Graph {
    load_text(text, request).unwrap_or_else(|error| panic!("{error}"))
}

fn base(text: &str) -> Graph {
    graph(text, &Request::default())
}

fn node<'a>(graph: &'a Graph, cell: usize, name: &str) -> &'a GraphNode {
    &graph.subgraphs[graph.cells[cell].names[name]]
}

#[test]
fn the_example_becomes_a_graph() {
    let graph = base(EXAMPLE);
    let names: Vec<&str> = graph.cells[0].names.keys().map(String::as_str).collect();
    assert_eq!(names, ["corpus", "tokenizer", "data", "teacher", "student0", "prompt0", "train", "score"]);
    assert_eq!(graph.subgraphs.node_count(), 8);
    let Subgraph::Loop(train) = &node(&graph, 0, "train").subgraph else { panic!("not a loop") };
    assert_eq!(train.stages.keys().collect::<Vec<_>>(), ["respond", "tune", "learn", "check"]);
    assert_eq!(train.windows["batch"].seed, 10);
    let best = Keep::Best { stage: "check".into(), metric: "rouge_l".into(), mode: Mode::Max };
    assert_eq!(train.carry["student"].keep, best);
    assert_eq!(train.carry["prompt"].keep, Keep::With("student".into()));
    let learn = &train.stages["learn"];
    assert_eq!(learn.inputs["data"], Origin::Stage(PortRef { stage: "respond".into(), port: "data".into() }));
    assert_eq!(learn.inputs["teacher"], Origin::Outside);
    assert_eq!(learn.operator.config["force_end"], json!(false));
    assert_eq!(learn.operator.places["learning_rate"].line, 44);
    let mut entries: Vec<&str> = graph
        .subgraphs
        .edges_directed(graph.cells[0].names["train"], petgraph::Incoming)
        .map(|edge| edge.weight().input.as_str())
        .collect();
    entries.sort_unstable();
    assert_eq!(
        entries,
        ["carry.prompt", "carry.student", "check.data", "learn.teacher", "tune.teacher", "windows.batch"]
    );
}
