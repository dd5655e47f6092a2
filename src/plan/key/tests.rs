//! Keys change with everything that matters and with nothing else.

use std::collections::BTreeSet;

use cache::{Digest, FileEntry, Store};
use contract::Conventions;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::fakes;
use crate::graph::{Every, Graph, Last, Mode, Node};
use crate::language::{self, Request};

const PIPELINE: &str = "
version: 1
name: keys
stages:
  data: {kind: rows, with: {rows: 24}}
  valid: {kind: rows, with: {rows: 5}}
  start: {kind: init}
  teacher: {kind: init, with: {value: 2.0}}
  train:
    loop:
      windows:
        batch: {of: data, rows: 20, take: 4, epochs: 2, order: shuffle, seed: 7}
        other: {of: valid, take: 2}
      carry:
        student: {from: start, next: learn.model, keep: {best: check.score, mode: max}}
        prompt: {from: start, next: tune.model, keep_with: student}
      stages:
        respond: {kind: respond, in: {model: carry.student, data: windows.batch}}
        tune: {kind: learn, in: {model: carry.prompt, teacher: carry.student, data: windows.other}}
        learn: {kind: learn, in: {model: carry.student, teacher: teacher, data: respond}, with: {rate: 0.05}}
        check: {kind: evaluate, every: epoch, in: {model: learn.model, data: valid}}
";

fn graph(text: &str) -> Graph {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.yaml");
    std::fs::write(&file, text).unwrap();
    let request = Request { file, ..Request::default() };
    language::load(&request, &fakes::registry(), &[]).unwrap_or_else(|diagnostics| panic!("{diagnostics}"))
}

fn body() -> Loop {
    let nodes = graph(PIPELINE).subgraphs;
    let found = nodes.node_weights().find_map(|Node { subgraph, .. }| match subgraph {
        Subgraph::Loop(body) => Some(body.clone()),
        Subgraph::Operator(_) => None,
    });
    found.unwrap()
}

fn artifact(content: &str, port_type: &str) -> Artifact {
    let files = vec![FileEntry { path: "f".into(), digest: Digest::of(content.as_bytes()), bytes: 1 }];
    Artifact { digest: Digest::of_tree(&files), port_type: port_type.into(), bytes: 1, files }
}

/// What enters the loop, by entry.
fn entry(text: &str) -> Entry {
    Entry::from(text.to_owned())
}

fn entries() -> InputDigests {
    [
        ("windows.batch", "data", "dataset"),
        ("windows.other", "valid", "dataset"),
        ("carry.student", "start", "model"),
        ("carry.prompt", "start", "model"),
        ("learn.teacher", "teacher", "model"),
        ("check.data", "valid", "dataset"),
    ]
    .map(|(text, content, port_type)| (entry(text), artifact(content, port_type)))
    .into()
}

fn made(subgraph: &Subgraph, inputs: &InputDigests) -> Action {
    let mut digest =
        |source: &Source| Ok(SourcePart::Content { content: Digest::of(source.at.to_string().as_bytes()) });
    action(subgraph, inputs, &fakes::registry(), &mut digest).unwrap()
}

fn key_of(body: &Loop, inputs: &InputDigests) -> Key {
    made(&Subgraph::Loop(body.clone()), inputs).key
}

#[test]
fn the_preimage_of_a_loop_is_as_reviewed() {
    let action = made(&Subgraph::Loop(body()), &entries());
    insta::assert_snapshot!(serde_json::to_string_pretty(&action.preimage).unwrap());
}

#[test]
fn the_preimage_of_a_stage_is_as_reviewed() {
    let registry = fakes::registry();
    let kind = registry.get("read-rows").unwrap();
    let config = kind.resolve(&json!({"path": "numbers.txt", "sleep": 3}), Conventions::Sound).unwrap();
    let ports = kind.ports(&config);
    let operator = Operator { kind: "read-rows".into(), config, ports, places: BTreeMap::new() };
    let action = made(&Subgraph::Operator(operator), &BTreeMap::new());
    assert_eq!(action.sources.len(), 1);
    insta::assert_snapshot!(serde_json::to_string_pretty(&action.preimage).unwrap());
}

/// One edit of a loop and of what enters it.
type Edit = fn(&mut Loop, &mut InputDigests);

#[test]
fn every_field_that_matters_changes_the_key() {
    let edits: &[(&str, Edit)] = &[
        ("nothing", |_, _| {}),
        ("rows of a window", |body, _| body.windows["batch"].rows = Some(19)),
        ("rows a round", |body, _| body.windows["batch"].take = 5),
        ("epochs", |body, _| body.windows["batch"].epochs = Some(3)),
        ("order", |body, _| body.windows["batch"].order = crate::graph::Order::Given),
        ("seed of a window", |body, _| body.windows["batch"].seed = 8),
        ("the last window", |body, _| body.windows["batch"].last = Last::Short),
        ("what a window slices", |_, inputs| drop(inputs.insert(entry("windows.batch"), artifact("x", "dataset")))),
        ("rounds", |body, _| body.rounds = Some(3)),
        ("a first value", |_, inputs| drop(inputs.insert(entry("carry.student"), artifact("x", "model")))),
        ("no first value", |_, inputs| drop(inputs.remove(&entry("carry.prompt")))),
        ("the type of a value", |body, _| body.carry["prompt"].port_type = contract::PortType::SoftPrompt),
        ("the next value", |body, _| body.carry["prompt"].next.stage = "learn".into()),
        ("keep the last", |body, _| body.carry["student"].keep = Keep::Last),
        ("keep the last of another", |body, _| body.carry["prompt"].keep = Keep::Last),
        ("keep by another metric", |body, _| {
            body.carry["student"].keep = Keep::Best { stage: "check".into(), metric: "loss".into(), mode: Mode::Max };
        }),
        ("keep the smallest", |body, _| {
            body.carry["student"].keep = Keep::Best { stage: "check".into(), metric: "score".into(), mode: Mode::Min };
        }),
        ("when a stage runs", |body, _| body.stages["check"].every = Every::Rounds(2)),
        ("a configuration", |body, _| body.stages["learn"].operator.config["rate"] = json!(0.06)),
        ("a default", |body, _| body.stages["learn"].operator.config["seed"] = json!(1)),
        ("an outside input", |_, inputs| drop(inputs.insert(entry("learn.teacher"), artifact("x", "model")))),
        ("an edge", |body, _| {
            body.stages["tune"].inputs["data"] = Origin::Window("batch".into());
        }),
        ("one edge less", |body, _| drop(body.stages["tune"].inputs.shift_remove("teacher"))),
        ("one stage less", |body, _| {
            body.stages["learn"].inputs["data"] = Origin::Window("batch".into());
            body.stages.shift_remove("respond");
        }),
    ];
    let mut seen = BTreeSet::new();
    for (what, edit) in edits {
        let (mut body, mut inputs) = (body(), entries());
        edit(&mut body, &mut inputs);
        assert!(seen.insert(key_of(&body, &inputs)), "{what} did not change the key");
    }
}

#[test]
fn how_and_where_a_loop_runs_changes_nothing() {
    let edits: &[Edit] = &[
        |body, _| body.unroll = true,
        |body, _| body.alone = true,
        |body, _| body.stages["learn"].operator.places.clear(),
    ];
    let before = key_of(&body(), &entries());
    for edit in edits {
        let (mut body, mut inputs) = (body(), entries());
        edit(&mut body, &mut inputs);
        assert_eq!(key_of(&body, &inputs), before);
    }
}

#[test]
fn the_seed_of_a_window_in_the_given_order_is_not_in_the_key() {
    let with_seed = |seed| {
        let mut body = body();
        body.windows["other"].order = crate::graph::Order::Given;
        body.windows["other"].seed = seed;
        key_of(&body, &entries())
    };
    assert_eq!(with_seed(1), with_seed(2));
}

/// The same loop with other names and in another order that respects its edges.
fn disguised(body: &Loop, inputs: &InputDigests, picks: &[Index]) -> (Loop, InputDigests) {
    let mut picks = picks.iter().cycle();
    let mut open: Vec<String> = body.stages.keys().cloned().collect();
    let mut other = body.clone();
    other.stages = IndexMap::new();
    while !open.is_empty() {
        let ready: Vec<String> = open
            .iter()
            .filter(|name| {
                body.stages[*name].inputs.values().all(|origin| match origin {
                    Origin::Stage(source) => !open.contains(&source.stage),
                    _ => true,
                })
            })
            .cloned()
            .collect();
        let next = ready[picks.next().unwrap().index(ready.len())].clone();
        open.retain(|name| *name != next);
        other.stages.insert(next.clone(), body.stages[&next].clone());
    }
    for _ in 0..picks.next().unwrap().index(4) {
        other.windows.reverse();
        let last = other.carry.len() - 1;
        other.carry.swap_indices(0, last);
    }
    renamed(&other, inputs)
}

fn renamed(body: &Loop, inputs: &InputDigests) -> (Loop, InputDigests) {
    let new = |name: &str| format!("{name}-2");
    let port = |source: &PortRef| PortRef { stage: new(&source.stage), port: source.port.clone() };
    let mut other = body.clone();
    other.windows = body.windows.iter().map(|(name, window)| (new(name), window.clone())).collect();
    other.carry = body
        .carry
        .iter()
        .map(|(name, carry)| {
            let keep = match &carry.keep {
                Keep::Last => Keep::Last,
                Keep::Best { stage, metric, mode } => {
                    Keep::Best { stage: new(stage), metric: metric.clone(), mode: *mode }
                }
                Keep::With(other) => Keep::With(new(other)),
            };
            (new(name), Carry { port_type: carry.port_type, next: port(&carry.next), keep })
        })
        .collect();
    other.stages = body
        .stages
        .iter()
        .map(|(name, stage)| {
            let mut stage = stage.clone();
            for origin in stage.inputs.values_mut() {
                *origin = match &*origin {
                    Origin::Outside => Origin::Outside,
                    Origin::Window(name) => Origin::Window(new(name)),
                    Origin::Carry(name) => Origin::Carry(new(name)),
                    Origin::Stage(source) => Origin::Stage(port(source)),
                };
            }
            (new(name), stage)
        })
        .collect();
    let entry = |entry: &Entry| match entry {
        Entry::Port(port) => Entry::Port(port.clone()),
        Entry::Window(name) => Entry::Window(new(name)),
        Entry::Carry(name) => Entry::Carry(new(name)),
        Entry::Outside(read) => Entry::Outside(port(read)),
    };
    (other, inputs.iter().map(|(name, artifact)| (entry(name), artifact.clone())).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn names_and_order_in_the_file_are_not_in_the_key(picks in prop::collection::vec(any::<Index>(), 8)) {
        let (body, inputs) = (body(), entries());
        let (other, other_inputs) = disguised(&body, &inputs, &picks);
        prop_assert_eq!(key_of(&body, &inputs), key_of(&other, &other_inputs));
    }
}

#[test]
fn a_loop_in_canonical_order_still_respects_its_edges() {
    let Subgraph::Loop(ordered) = made(&Subgraph::Loop(body()), &entries()).subgraph else { panic!("it was a loop") };
    for (index, stage) in ordered.stages.values().enumerate() {
        for origin in stage.inputs.values() {
            if let Origin::Stage(source) = origin {
                assert!(ordered.stages.get_index_of(&source.stage).unwrap() < index);
            }
        }
    }
}

#[test]
fn values_equal_to_a_default_are_left_out_at_any_depth() {
    let schema = json!({
        "properties": {
            "plain": {"default": 3},
            "nested": {"$ref": "#/$defs/Inner"},
            "maybe": {"anyOf": [{"$ref": "#/$defs/Inner"}, {"type": "null"}], "default": null},
            "either": {"anyOf": [{"$ref": "#/$defs/Inner"}, {"properties": {"deep": {"default": 2}}}]},
            "needed": {"type": "integer"}
        },
        "$defs": {"Inner": {"properties": {"deep": {"default": 1}}}}
    });
    let check = |config: Json, expected: Json| assert_eq!(without_defaults(&config, &schema), expected);
    check(json!({"plain": 3, "needed": 3}), json!({"needed": 3}));
    check(json!({"plain": 4}), json!({"plain": 4}));
    check(json!({"nested": {"deep": 1}}), json!({"nested": {}}));
    check(json!({"nested": {"deep": 2}}), json!({"nested": {"deep": 2}}));
    check(json!({"maybe": null}), json!({}));
    check(json!({"maybe": {"deep": 1}}), json!({"maybe": {}}));
    // Which of two shapes it is cannot be told, so nothing is left out.
    check(json!({"either": {"deep": 1}}), json!({"either": {"deep": 1}}));
    check(json!({"unknown": 1}), json!({"unknown": 1}));
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_its_field() {
    let registry = fakes::registry();
    let kind = registry.get("read-rows").unwrap();
    let config = kind.resolve(&json!({"path": "nowhere.txt"}), Conventions::Sound).unwrap();
    let ports = kind.ports(&config);
    let operator = Operator { kind: "read-rows".into(), config, ports, places: BTreeMap::new() };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let mut digest = |source: &Source| crate::plan::content::of(source, &store);
    let error = action(&Subgraph::Operator(operator), &BTreeMap::new(), &registry, &mut digest).unwrap_err();
    assert!(error.to_string().starts_with("`path` of stage kind `read-rows`: "), "{error}");
    assert!(error.to_string().contains("nowhere.txt"), "{error}");
}

/// A kind whose sources lie wherever its configuration says.
struct Listed;

#[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
struct ListedConfig {
    /// Files, in order.
    #[serde(default)]
    code: Vec<String>,
    /// Files with a name.
    #[serde(default)]
    named: Vec<BTreeMap<String, String>>,
    /// Fields that it says are sources.
    #[serde(default)]
    says: Vec<Vec<String>>,
    /// A field that it leaves out of the key.
    #[serde(default)]
    leaves_out_code: bool,
}

impl contract::Stage for Listed {
    type Config = ListedConfig;

    fn about(&self) -> About {
        About { name: "listed", ..fakes::registry().get("read-rows").unwrap().about() }
    }

    fn ports(&self, _: &ListedConfig) -> contract::Ports {
        contract::Ports::new()
    }

    fn sources(&self, config: &ListedConfig) -> Vec<Source> {
        let path = |field: &Vec<String>| format!("at-{}", field.join("-"));
        let source = |field: &Vec<String>| Source { field: field.clone(), ..Source::new(&[], path(field)) };
        config.says.iter().map(source).collect()
    }

    fn outside_key(&self, config: &ListedConfig) -> Vec<&'static str> {
        if config.leaves_out_code { vec!["says", "code"] } else { vec!["says"] }
    }

    fn start(
        &self,
        _: ListedConfig,
        _: &contract::Env,
        _: Option<contract::AnyValue>,
    ) -> Result<Box<dyn contract::Operator>> {
        anyhow::bail!("never started")
    }
}

fn listed(config: Json) -> Result<Action> {
    let registry = fakes::registry().with(Listed);
    let config = registry.get("listed").unwrap().resolve(&config, Conventions::Sound).unwrap();
    let operator = Operator { kind: "listed".into(), config, ports: contract::Ports::new(), places: BTreeMap::new() };
    let mut digest =
        |source: &Source| Ok(SourcePart::Content { content: Digest::of(source.at.to_string().as_bytes()) });
    action(&Subgraph::Operator(operator), &BTreeMap::new(), &registry, &mut digest)
}

#[test]
fn sources_in_lists_are_in_the_key_by_content_and_their_paths_are_not() {
    let config = |code: [&str; 2], name: &str| {
        json!({
            "code": code,
            "named": [{"name": name, "other": "kept"}],
            "says": [["code", "0"], ["code", "1"], ["named", "0", "name"]],
        })
    };
    let action = listed(config(["a.py", "b.py"], "c.py")).unwrap();
    assert_eq!(action.sources.len(), 3);
    let content = |text: &str| json!({"content": Digest::of(text.as_bytes()).to_string()});
    let keyed = &action.preimage["stage"]["config"];
    assert_eq!(keyed["code"], json!([content("at-code-0"), content("at-code-1")]));
    assert_eq!(keyed["named"], json!([{"name": content("at-named-0-name"), "other": "kept"}]));
    assert_eq!(listed(config(["x.py", "y.py"], "z.py")).unwrap().key, action.key, "paths are in no key");
}

#[test]
fn a_source_that_cannot_be_put_into_the_key_is_an_error() {
    for field in [&["code", "1"][..], &["code", "x"], &["code", "0", "deep"], &["nothing"], &["named", "0", "name"]] {
        let error = listed(json!({"code": ["a.py"], "says": [field]})).unwrap_err().to_string();
        let field = field.join(".");
        assert!(error.contains(&format!("`listed` names a source `{field}` that its configuration")), "{error}");
    }
    let error = listed(json!({"code": ["a.py"], "says": [["code", "0"]], "leaves_out_code": true})).unwrap_err();
    assert!(error.to_string().contains("`listed` names the source `code` and leaves it out of the key"), "{error}");
}
