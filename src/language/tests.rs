use std::path::Path;

use serde_json::json;

use super::*;
use crate::fake::registry;
use crate::graph::{Keep, Mode, Node as GraphNode, Origin, PortRef, Subgraph};
use crate::report::draw::{draw_dot, draw_mermaid};

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
    let mut entries: Vec<String> = graph
        .subgraphs
        .edges_directed(graph.cells[0].names["train"], petgraph::Incoming)
        .map(|edge| edge.weight().input.to_string())
        .collect();
    entries.sort_unstable();
    assert_eq!(
        entries,
        ["carry.prompt", "carry.student", "check.data", "learn.teacher", "tune.teacher", "windows.batch"]
    );
}

#[test]
fn rows_are_shuffled_by_the_stages_seed_or_from_0_as_published() {
    let stages = EXAMPLE.split_once("stages:").unwrap().1.split_once("  teacher:").unwrap().0;
    let seed = |conventions: &str, fields: &str| {
        let text = format!(
            "version: 1\nconventions: {conventions}\nparams: {{prompt_length: 7}}\nstages:{stages}  learn: {{kind: finetune, in: {{data: data.train}}, with: \
             {{take: 4, epochs: 1, seed: 5, {fields}}}}}\n"
        );
        let graph = base(&text);
        let Subgraph::Loop(learn) = &node(&graph, 0, "learn").subgraph else { panic!("not a loop") };
        assert_eq!(learn.stages["step"].operator.config["seed"], json!(5));
        learn.windows["data"].seed
    };
    assert_eq!((seed("sound", ""), seed("reference", "")), (5, 0));
    assert_eq!((seed("sound", "order_seed: 3"), seed("reference", "order_seed: 3")), (3, 3));
}

#[test]
fn an_input_may_take_several_values_by_name() {
    const ONE: &str = "prompt: tune.prompt, data: respond}";
    assert!(EXAMPLE.contains(ONE));
    let with = |more: &str| EXAMPLE.replace(ONE, &format!("prompt: tune.prompt, data: respond, {more}}}"));
    let text = with("advisers: {first: teacher, second: student0}");
    let whole = base(&text);
    let Subgraph::Loop(train) = &node(&whole, 0, "train").subgraph else { panic!("not a loop") };
    let inputs = &train.stages["learn"].inputs;
    assert_eq!(["advisers/first", "advisers/second"].map(|name| &inputs[name]), [&Origin::Outside; 2]);
    let edges = whole.subgraphs.edges_directed(whole.cells[0].names["train"], petgraph::Incoming);
    let entries: Vec<String> = edges.map(|edge| edge.weight().input.to_string()).collect();
    assert!(entries.contains(&"learn.advisers/second".to_owned()), "{entries:?}");
    assert!(draw_mermaid(&whole).contains("advisers"));

    let one = "  one: {remove: [train.learn.in.advisers.first], rebind: {train.learn.in.advisers.second: teacher}}\n";
    let edited = text.replace("variants:\n", &format!("variants:\n{one}"));
    let changed = graph(&edited, &Request { variants: vec!["one".into()], ..Request::default() });
    let Subgraph::Loop(train) = &node(&changed, 0, "train").subgraph else { panic!("not a loop") };
    let inputs = train.stages["learn"].inputs.keys().filter(|input| input.starts_with("advisers"));
    assert_eq!(inputs.collect::<Vec<_>>(), ["advisers/second"]);

    for (more, expected) in [
        ("advisers: teacher", "input `advisers` of kind `distill` takes several values by name"),
        ("advisors: {first: teacher}", "kind `distill` has no input `advisors`"),
        ("advisers: {first: data.train}", "`train.learn.in.advisers/first` takes `model`"),
        ("advisers: {first.one: teacher}", "`first.one` cannot be a name"),
    ] {
        let error = load_text(&with(more), &Request::default()).expect_err(more).to_string();
        assert!(error.contains(expected), "{more}: {error}");
    }
    let one = EXAMPLE.replace("prompt: tune.prompt, data: respond}", "prompt: {one: tune.prompt}, data: respond}");
    let error = load_text(&one, &Request::default()).err().unwrap().to_string();
    assert!(error.contains("input `prompt` of kind `distill` takes one value"), "{error}");
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
            assert!(diagnostic.place().is_some(), "no place: {}", diagnostic.message);
        }
        let name = file.file_stem().unwrap().to_str().unwrap();
        insta::with_settings!({snapshot_path => "../../tests/fixtures/broken", prepend_module_to_snapshot => false, omit_expression => true}, {
            insta::assert_snapshot!(name, text);
        });
    }
}

/// All that a graph means, whatever the order of the file and wherever its values are written.
fn meaning(graph: &Graph) -> serde_json::Value {
    let cells = graph.cells.iter().map(|cell| {
        let mut stages: Vec<_> = cell
            .names
            .iter()
            .map(|(name, node)| {
                let mut reads: Vec<String> = graph
                    .subgraphs
                    .edges_directed(*node, petgraph::Incoming)
                    .map(|edge| {
                        let (handoff, source) = (edge.weight(), petgraph::visit::EdgeRef::source(&edge));
                        let read = cell.names.iter().find(|(_, node)| **node == source).map(|(name, _)| name);
                        format!("{} <- {}.{}", handoff.input, read.unwrap(), handoff.output)
                    })
                    .collect();
                reads.sort_unstable();
                let subgraph = crate::language::resolve::identity(&graph.subgraphs[*node].subgraph);
                (name.clone(), json!([subgraph, reads]))
            })
            .collect();
        stages.sort_by(|a, b| a.0.cmp(&b.0));
        json!({"label": cell.label, "stages": stages})
    });
    cells.collect()
}

/// `value` with the keys of every mapping in another order.
fn shuffled(value: &serde_json::Value, seed: u64) -> serde_json::Value {
    match value {
        serde_json::Value::Object(map) => {
            let order = contract::random::permutation(map.len(), seed, contract::random::purpose::SHUFFLE, 0);
            let entries: Vec<_> = map.iter().collect();
            order.into_iter().map(|i| (entries[i].0.clone(), shuffled(entries[i].1, seed + i as u64 + 1))).collect()
        }
        serde_json::Value::Array(items) => items.iter().map(|item| shuffled(item, seed + 1)).collect(),
        other => other.clone(),
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_order_of_keys_does_not_matter(seed in proptest::prelude::any::<u32>()) {
        let tree = crate::language::yaml::parse(&crate::ground::source::Source::new("example", EXAMPLE)).unwrap().to_json();
        let request = Request { all_variants: true, ..Request::default() };
        let text = shuffled(&tree, u64::from(seed)).to_string();
        let sorted = |graph: &Graph| {
            let mut cells = meaning(graph).as_array().unwrap().clone();
            cells.sort_by_key(|cell| cell["label"].to_string());
            cells
        };
        proptest::prop_assert_eq!(sorted(&graph(&text, &request)), sorted(&graph(EXAMPLE, &request)));
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    /// Cuts and insertions at random places: whatever comes of it is a graph, or messages that can be shown.
    #[test]
    fn no_text_makes_the_reader_panic(
        edits in proptest::collection::vec((0.0..1.0_f64, 0..12_usize, 0..INSERTED.len()), 1..5)
    ) {
        let mut text = EXAMPLE.to_owned();
        for (at, cut, inserted) in edits {
            let start = (at * text.len() as f64) as usize;
            let end = (start + cut).min(text.len());
            text.replace_range(start..end, INSERTED[inserted]);
        }
        let request = Request { all_variants: true, ablation: Some("prompt-length".into()), ..Request::default() };
        if let Err(error) = load_text(&text, &request) {
            proptest::prop_assert!(!error.diagnostics.is_empty());
            proptest::prop_assert!(error.to_string().contains("hint: "));
        }
    }
}

/// Pieces that mean something somewhere. ASCII, as the example is.
const INSERTED: [&str; 16] = [
    "",
    "\n",
    ": ",
    "{",
    "}",
    "[]",
    "null",
    "- x",
    "train",
    "carry.student",
    "${params.x}",
    "&a ",
    "*a",
    "loop: {}",
    "1e9",
    "\t",
];

#[test]
fn comments_and_spelling_do_not_matter() {
    let other = EXAMPLE
        .replace("2e-3", "0.002")
        .replace("conventions: sound", "conventions: \"sound\"   # the default\n")
        .replace("seeds: [10, 20,", "seeds: [10,\n      20,");
    assert_ne!(other, EXAMPLE);
    assert_eq!(meaning(&base(&other)), meaning(&base(EXAMPLE)));
}

const PREFIX: &str = "
version: 1
params: {seed: 5}
stages:
  corpus: {kind: download, with: {source: a}}
  tokenizer: {kind: train-tokenizer, in: {corpus: corpus}, with: {vocab_size: 64}}
  data: {kind: tokenize, in: {corpus: corpus, tokenizer: tokenizer}, with: {template: plain, max_length: 8}}
";

fn with_stages(more: &str) -> String {
    format!("{PREFIX}{more}")
}

fn inputs(graph: &Graph, name: &str) -> Vec<String> {
    let mut inputs: Vec<String> = graph
        .subgraphs
        .edges_directed(graph.cells[0].names[name], petgraph::Incoming)
        .map(|edge| format!("{} <- {}", edge.weight().input, edge.weight().output))
        .collect();
    inputs.sort_unstable();
    inputs
}

#[test]
fn a_training_kind_used_alone_becomes_a_loop_with_one_stage() {
    let graph = base(&with_stages(
        "  start: {kind: finetune, in: {data: data.train}, with: {take: 4, rounds: 3, order: given, last: short, rows: 9}}
  learn: {kind: distill, in: {student: start, teacher: start, data: data.train, valid: data.valid}, with: {take: 2, epochs: 7, seed: 3, divergence: forward-kl}}
",
    ));
    let Subgraph::Loop(start) = &node(&graph, 0, "start").subgraph else { panic!("not a loop") };
    assert!(start.alone && start.rounds == Some(3));
    let window = &start.windows["data"];
    assert_eq!((window.rows, window.take, window.epochs, window.seed), (Some(9), 4, None, 0));
    assert_eq!((window.order, window.last), (crate::graph::Order::Given, crate::graph::Last::Short));
    assert_eq!(start.carry["model"].keep, Keep::Last);
    assert_eq!(start.stages.keys().collect::<Vec<_>>(), ["step"]);
    assert_eq!(inputs(&graph, "start"), ["windows.data <- train"]);

    let Subgraph::Loop(learn) = &node(&graph, 0, "learn").subgraph else { panic!("not a loop") };
    assert_eq!(learn.windows["data"].epochs, Some(7));
    assert_eq!(learn.windows["data"].seed, 3, "the seed goes to the window");
    let step = &learn.stages["step"];
    assert_eq!(step.operator.config["seed"], json!(3), "and to the stage");
    assert!(step.operator.config.get("take").is_none());
    assert_eq!(step.operator.places["take"].file, "test.yaml", "places cover the window too");
    assert_eq!(step.inputs["student"], Origin::Carry("model".into()));
    assert_eq!(step.inputs["data"], Origin::Window("data".into()));
    assert_eq!(step.inputs["teacher"], Origin::Outside);
    let check = &learn.stages["check"];
    assert_eq!((check.every, check.operator.kind.as_str()), (crate::graph::Every::Epoch, "evaluate"));
    assert_eq!(check.operator.config["metrics"], json!(["loss"]));
    assert_eq!(check.inputs["model"], Origin::Stage(PortRef { stage: "step".into(), port: "model".into() }));
    assert_eq!(learn.carry["model"].keep, Keep::Best { stage: "check".into(), metric: "loss".into(), mode: Mode::Min });
    assert_eq!(
        inputs(&graph, "learn"),
        ["carry.model <- model", "check.data <- valid", "step.teacher <- model", "windows.data <- train"]
    );
}

#[test]
fn outputs_of_a_loop_are_carried_values_and_metrics_of_its_stages() {
    let graph = base(&with_stages(
        "  start: {kind: finetune, in: {data: data.train}, with: {take: 4, rounds: 3}}
  more:
    loop:
      rounds: 4
      unroll: true
      windows: {text: {of: data.train, take: 2, repeat: forever}}
      carry: {student: {from: start, next: learn}}
      stages:
        check: {kind: evaluate, every: 2, in: {model: learn, data: data.valid}}
        learn: {kind: distill, in: {student: carry.student, teacher: start, data: windows.text}}
  score: {kind: evaluate, in: {model: more, data: data.test}}
",
    ));
    assert_eq!(inputs(&graph, "score"), ["data <- test", "model <- student"]);
    let Subgraph::Loop(more) = &node(&graph, 0, "more").subgraph else { panic!("not a loop") };
    assert!(more.unroll && !more.alone && more.rounds == Some(4));
    assert_eq!(more.stages.keys().collect::<Vec<_>>(), ["learn", "check"], "in the order of a round");
    assert_eq!(more.stages["check"].every, crate::graph::Every::Rounds(2));
}

#[test]
fn a_stage_of_the_loop_hides_one_of_the_same_name_outside() {
    let graph = base(&with_stages(
        "  start: {kind: finetune, in: {data: data.train}, with: {take: 4, rounds: 3}}
  answers: {kind: student-generate, in: {model: start, data: data.train}, with: {max_new_tokens: 2}}
  more:
    loop:
      windows: {text: {of: answers, take: 2, epochs: 1}}
      carry: {student: {from: start, next: learn.model}}
      stages:
        answers: {kind: student-generate, in: {model: carry.student, data: windows.text}, with: {max_new_tokens: 2}}
        learn: {kind: distill, in: {student: carry.student, teacher: start, data: answers}}
",
    ));
    let Subgraph::Loop(more) = &node(&graph, 0, "more").subgraph else { panic!("not a loop") };
    assert_eq!(
        more.stages["learn"].inputs["data"],
        Origin::Stage(PortRef { stage: "answers".into(), port: "data".into() })
    );
    assert!(inputs(&graph, "more").contains(&"windows.text <- data".to_owned()));
}

fn variants(names: &[&str]) -> Request {
    Request { variants: names.iter().map(|&name| name.to_owned()).collect(), ..Request::default() }
}

#[test]
fn variants_share_what_they_do_not_change() {
    let graph = graph(EXAMPLE, &variants(&["base", "no-prompt", "forward-kl", "both"]));
    assert_eq!(
        graph.cells.iter().map(|c| c.label.as_str()).collect::<Vec<_>>(),
        ["base", "no-prompt", "forward-kl", "both"]
    );
    let at = |cell: usize, name: &str| graph.cells[cell].names[name];
    for name in ["corpus", "tokenizer", "data", "teacher", "student0"] {
        assert!((1..4).all(|cell| at(cell, name) == at(0, name)), "{name}");
    }
    assert_eq!(at(2, "prompt0"), at(0, "prompt0"));
    assert!(!graph.cells[1].names.contains_key("prompt0"));
    let trains = [at(0, "train"), at(1, "train"), at(2, "train"), at(3, "train")];
    assert_eq!(trains.iter().collect::<std::collections::HashSet<_>>().len(), 4);
    assert_eq!(graph.subgraphs.node_count(), 6 + 4 + 4, "a training and a score each");
    let Subgraph::Loop(both) = &graph.subgraphs[at(3, "train")].subgraph else { panic!("not a loop") };
    assert_eq!(both.stages["learn"].operator.config["divergence"], json!("forward-kl"));
    assert!(!both.stages["learn"].inputs.contains_key("prompt") && !both.carry.contains_key("prompt"));
    assert!(petgraph::algo::toposort(&graph.subgraphs, None).is_ok());
}

#[test]
fn stages_with_other_names_and_the_same_work_are_one_node() {
    let text = with_stages(
        "  first: {kind: finetune, in: {data: data.train}, with: {take: 4, epochs: 3}}
variants:
  renamed:
    remove: [first]
    stages: {second: {kind: finetune, with: {epochs: 3, take: 4, order: shuffle}, in: {data: data.train}}}
",
    );
    let graph = graph(&text, &variants(&["base", "renamed"]));
    assert_eq!(graph.cells[0].names["first"], graph.cells[1].names["second"]);
    assert_eq!(graph.subgraphs[graph.cells[1].names["second"]].name, "first", "the name in the first cell");
}

#[test]
fn later_layers_win_and_places_say_which_did() {
    let text = EXAMPLE.replace(
        "profiles:",
        "profiles:\n  big: {set: {train.learn.learning_rate: 1.0, teacher.learning_rate: 2.0, params.seed: 77}}",
    );
    let text = text.replace(
        "variants:\n",
        "variants:\n  quick: {set: {train.learn.learning_rate: 3.0, score.seeds: {append: [60]}}}\n",
    );
    let request = Request {
        profile: Some("big".into()),
        variants: vec!["quick".into()],
        set: vec!["params.seed=4".into(), "conventions=reference".into(), "train.windows.batch.take=8".into()],
        ..Request::default()
    };
    let graph = graph(&text, &request);
    let Subgraph::Loop(train) = &node(&graph, 0, "train").subgraph else { panic!("not a loop") };
    let learn = &train.stages["learn"].operator;
    assert_eq!((&learn.config["learning_rate"], &learn.config["force_end"]), (&json!(3.0), &json!(true)));
    assert_eq!(train.windows["batch"].take, 8);
    let respond = &train.stages["respond"].operator;
    assert_eq!(respond.config["seed"], json!(4));
    assert_eq!((respond.places["seed"].file.as_str(), respond.places["seed"].column), ("--set", 13));
    let Subgraph::Loop(teacher) = &node(&graph, 0, "teacher").subgraph else { panic!("not a loop") };
    let teacher = &teacher.stages["step"].operator;
    assert_eq!(teacher.config["learning_rate"], json!(2.0));
    let line = text.lines().position(|line| line.starts_with("  big:")).unwrap() + 1;
    assert_eq!(teacher.places["learning_rate"].line, line);
    let Subgraph::Operator(score) = &node(&graph, 0, "score").subgraph else { panic!("not an operator") };
    assert_eq!(score.config["seeds"], json!([10, 20, 30, 40, 50, 60]));
}

#[test]
fn a_child_decides_where_its_parents_disagree() {
    let text = EXAMPLE.replace(
        "variants:\n",
        "variants:\n  slow: {set: {train.learn.learning_rate: 1e-5}}\n  fast: {set: {train.learn.learning_rate: 1e-2}}\n  \
         same: {extends: [slow], set: {train.learn.seed: 1}}\n  child: {extends: [slow, fast], set: {train.learn.learning_rate: 1e-3}}\n  \
         diamond: {extends: [slow, same]}\n",
    );
    let rate = |variant: &str| {
        let graph = graph(&text, &variants(&[variant]));
        let Subgraph::Loop(train) = &node(&graph, 0, "train").subgraph else { panic!("not a loop") };
        train.stages["learn"].operator.config["learning_rate"].clone()
    };
    assert_eq!(rate("child"), json!(1e-3));
    assert_eq!(rate("diamond"), json!(1e-5), "one edit that two parents inherit is no conflict");
}

#[test]
fn a_removed_stage_can_be_replaced_or_rebound() {
    let text = EXAMPLE.replace(
        "variants:\n",
        "variants:\n  fixed-prompt: {remove: [train.carry.prompt, train.tune], rebind: {train.learn.in.prompt: prompt0}}\n  \
         other: {stages: {train.respond: {kind: student-generate, in: {model: teacher, data: windows.batch}, with: {max_new_tokens: 3}}}}\n",
    );
    let graph = graph(&text, &variants(&["fixed-prompt", "other"]));
    let Subgraph::Loop(fixed) = &node(&graph, 0, "train").subgraph else { panic!("not a loop") };
    assert_eq!(fixed.stages["learn"].inputs["prompt"], Origin::Outside);
    let Subgraph::Loop(other) = &node(&graph, 1, "train").subgraph else { panic!("not a loop") };
    assert_eq!(other.stages["respond"].inputs["model"], Origin::Outside);
    assert_eq!(other.stages.keys().next().unwrap(), "respond", "it keeps its place");
}

#[test]
fn an_ablation_is_a_grid_with_repetitions() {
    let request = Request { ablation: Some("prompt-length".into()), ..Request::default() };
    let graph = graph(EXAMPLE, &request);
    assert_eq!(graph.cells.len(), 12);
    assert_eq!(graph.cells[4].label, "base params.prompt_length=3 params.seed=20");
    assert_eq!(graph.cells[4].over, [("params.prompt_length".to_owned(), json!(3))]);
    assert_eq!(graph.cells[4].repeat, [("params.seed".to_owned(), json!(20))]);
    let count =
        |name: &str| graph.cells.iter().map(|cell| cell.names[name]).collect::<std::collections::HashSet<_>>().len();
    assert_eq!((count("teacher"), count("prompt0"), count("student0"), count("train")), (1, 4, 3, 12));
}

#[test]
fn an_ablation_crosses_with_the_variants_it_lists() {
    let text = EXAMPLE.replace(
        "ablations:\n",
        "ablations:\n  rates: {variants: [base, no-prompt], over: {train.learn.learning_rate: [0.1, 0.2], train.tune.divergence: [forward-kl]}}\n",
    );
    let request = Request { ablation: Some("rates".into()), ..Request::default() };
    let labels =
        |request: &Request| graph(&text, request).cells.into_iter().map(|cell| cell.variant).collect::<Vec<_>>();
    assert_eq!(
        labels(&request),
        ["base", "base", "no-prompt", "no-prompt"],
        "a setting leaves alone who lacks its place"
    );
    let request = Request { variants: vec!["forward-kl".into()], ..request };
    assert_eq!(labels(&request), ["forward-kl", "forward-kl"], "the command line decides");
}

#[test]
fn a_setting_that_no_selected_cell_has_a_place_for_is_an_error() {
    let set = vec!["train.tune.divergence=forward-kl".to_owned()];
    let both = Request { set: set.clone(), ..variants(&["base", "no-prompt"]) };
    assert_eq!(graph(EXAMPLE, &both).cells.len(), 2);
    let error = load_text(EXAMPLE, &Request { set, ..variants(&["no-prompt"]) }).unwrap_err().to_string();
    assert!(error.contains("variant `no-prompt` removes it") && error.contains("--> --set:1:1"), "{error}");
}

#[test]
fn a_parameter_that_nothing_reads_cannot_be_set_or_repeated() {
    let text = EXAMPLE.replace("params: {", "params: {unused: 1, ");
    assert_eq!(base(&text).cells.len(), 1, "it may stand there");
    let request = Request { set: vec!["params.unused=2".into()], ..Request::default() };
    let error = load_text(&text, &request).unwrap_err();
    assert_eq!(error.diagnostics[0].message, "`--set` changes `params.unused`, which nothing reads");
    let text = text.replace("repeat: {params.seed:", "repeat: {params.unused:");
    let request = Request { ablation: Some("prompt-length".into()), ..Request::default() };
    let error = load_text(&text, &request).unwrap_err();
    assert_eq!(error.diagnostics.len(), 1);
    assert!(error.diagnostics[0].message.contains("ablation `prompt-length` changes `params.unused`"));
}

#[test]
fn the_command_line_cannot_decide_what_an_ablation_varies() {
    let set = vec!["params.seed=1".to_owned()];
    let request = Request { set, ablation: Some("prompt-length".into()), ..Request::default() };
    let error = load_text(EXAMPLE, &request).unwrap_err();
    assert_eq!(error.diagnostics.len(), 1);
    assert_eq!(error.diagnostics[0].message, "`--set` decides `params.seed`, which ablation `prompt-length` varies");
}

#[test]
fn a_setting_goes_below_what_is_not_written_yet() {
    let request =
        Request { set: vec!["prompt0.text=Hello there".into(), "data.max_length=9".into()], ..Request::default() };
    let text = EXAMPLE.replace(", text: Suppose you are a student.", "");
    let graph = graph(&text, &request);
    let Subgraph::Operator(prompt) = &node(&graph, 0, "prompt0").subgraph else { panic!("not an operator") };
    assert_eq!(prompt.config["text"], json!("Hello there"));
}

#[test]
fn an_empty_value_of_a_window_counts_as_left_out() {
    let text = EXAMPLE.replace("rows: 1500, take: 16, epochs: 32,", "rows: null, take: 16, epochs: 32, rounds: null,");
    assert_ne!(text, EXAMPLE);
    let graph = base(&text);
    let Subgraph::Loop(alone) = &node(&graph, 0, "student0").subgraph else { panic!("not a loop") };
    assert_eq!((alone.windows[0].rows, alone.rounds), (None, None));
}

#[test]
fn a_baseline_must_be_compared() {
    let with_baseline = |name: &str| {
        let report = format!("report: {{metric: score.rouge_l, baseline: {name},");
        EXAMPLE.replace("report: {metric: score.rouge_l,", &report)
    };
    let graph = base(&with_baseline("no-prompt"));
    assert_eq!(graph.cells[0].report.as_ref().unwrap().baseline.as_deref(), Some("no-prompt"));
    let errors = load_text(&with_baseline("no-promt"), &Request::default()).unwrap_err().to_string();
    assert!(errors.contains("`baseline` names `no-promt`") && errors.contains("no-prompt`?"), "{errors}");
}

#[test]
fn what_is_correlated_must_be_measured() {
    let with = |name: &str| {
        let report = format!("report: {{metric: score.rouge_l, correlate: {name},");
        EXAMPLE.replace("report: {metric: score.rouge_l,", &report)
    };
    assert_eq!(base(&with("rouge_l")).cells[0].report.as_ref().unwrap().correlate.as_deref(), Some("rouge_l"));
    let errors = load_text(&with("rouge"), &Request::default()).unwrap_err().to_string();
    assert!(errors.contains("`correlate` names `rouge`") && errors.contains("rouge_l`?"), "{errors}");
}

#[test]
fn the_report_is_resolved() {
    let text = EXAMPLE.replace(
        "report: {metric: score.rouge_l,",
        "report: {metrics: {Rouge-L: score.rouge_l, ours: train.check.loss}, seconds: [train], caption: Nothing, \
         rows: {teacher: {Rouge-L: teacher.loss}},",
    );
    let report = base(&text).cells[0].report.clone().unwrap();
    assert_eq!(report.compare, ["base", "no-prompt", "forward-kl"]);
    assert_eq!(
        (report.metrics["ours"].stage.as_str(), report.metrics["ours"].metric.as_str()),
        ("train", "check.loss")
    );
    assert_eq!(report.rows["teacher"]["Rouge-L"].metric, "loss");
    assert_eq!((report.seconds, report.caption), (vec!["train".to_owned()], Some("Nothing".to_owned())));
    let heading = base(EXAMPLE).cells[0].report.clone().unwrap().metrics.keys().next().unwrap().clone();
    assert_eq!(heading, "rouge_l");
}

#[test]
fn a_variant_outside_of_the_comparison_may_lack_what_is_compared() {
    let text = EXAMPLE.replace("variants:\n", "variants:\n  unscored: {remove: [score]}\n");
    assert!(!graph(&text, &variants(&["unscored"])).cells[0].names.contains_key("score"));
}

#[test]
fn an_error_of_the_base_shows_once_for_all_variants() {
    let text = EXAMPLE.replace("vocab_size: 1024", "vocab_size: many");
    let error = load_text(&text, &Request { all_variants: true, ..Request::default() }).unwrap_err();
    assert_eq!(error.diagnostics.len(), 1);
    assert_eq!(error.diagnostics[0].cell, None);
}

#[test]
fn the_drawings_show_boxes_types_and_handoffs() {
    let graph = graph(EXAMPLE, &variants(&["base", "no-prompt"]));
    insta::assert_snapshot!("mermaid", draw_mermaid(&graph));
    insta::assert_snapshot!("dot", draw_dot(&base(EXAMPLE)));
}
