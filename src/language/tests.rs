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

/// A request as the last line of a broken file asks for: `# --variant a,b --set path=value`.
fn request_of(file: &Path) -> Request {
    let text = std::fs::read_to_string(file).unwrap();
    let mut request = Request { file: file.to_owned(), ..Request::default() };
    let flags = text.lines().last().and_then(|line| line.strip_prefix("# ")).unwrap_or_default();
    let words: Vec<&str> = flags.split_whitespace().collect();
    for pair in words.chunks(2) {
        match pair {
            ["--variant", names] => request.variants = names.split(',').map(str::to_owned).collect(),
            ["--profile", name] => request.profile = Some((*name).to_owned()),
            ["--ablation", name] => request.ablation = Some((*name).to_owned()),
            ["--set", setting] => request.set.push((*setting).to_owned()),
            other => panic!("unknown flag {other:?}"),
        }
    }
    request
}

#[test]
fn every_broken_file_is_explained_in_one_pass() {
    let mut files: Vec<_> = std::fs::read_dir("tests/fixtures/broken")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    assert!(files.len() >= 18);
    for file in files {
        let error = load(&request_of(&file), &registry(), &[]).expect_err(&format!("{} is broken", file.display()));
        let text = error.to_string();
        let starting = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(starting("hint: "), error.diagnostics.len(), "one hint each:\n{text}");
        assert_eq!(starting("error: "), error.diagnostics.len(), "messages of one line:\n{text}");
        for diagnostic in &error.diagnostics {
            assert!(diagnostic.label.is_some(), "no place: {}", diagnostic.message);
        }
        let name = file.file_stem().unwrap().to_str().unwrap();
        insta::with_settings!({snapshot_path => "../../tests/fixtures/broken", prepend_module_to_snapshot => false, omit_expression => true}, {
            insta::assert_snapshot!(name, text);
        });
    }
}
