//! Six rounds of each method against an independent PyTorch program, under both conventions.
//!
//! `tests/fixtures/parity/make_promptkd.py` and `make_methods.py` are these programs: written from the formulas, in float64, on
//! tiny random GPT-2s with greedy generation and without dropout. Every response must be equal; every loss part, gradient norm
//! and final weight must agree within 1e-4.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use contract::{AnyValue, Conventions, Dataset, End, Env, Inputs, Metrics, Operator, Row, Sink, Step, TokenizerFile};
use lm::{LanguageModel, SoftPrompt};
use serde_json::{Map, Value as Json, json};

const TOLERANCE: f64 = 1e-4;

fn parity() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity")
}

fn fixtures() -> PathBuf {
    parity().join("promptkd")
}

fn read(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
}

/// Keeps the last row of metrics.
#[derive(Default)]
struct Rows(Vec<Map<String, Json>>);

impl Sink for Rows {
    fn metrics(&mut self, row: Map<String, Json>) {
        self.0.push(row);
    }
    fn progress(&mut self, _done: u64, _total: u64, _unit: &str) {}
    fn warn(&mut self, text: &str) {
        println!("warning: {text}");
    }
    fn note(&mut self, text: &str) {
        println!("note: {text}");
    }
}

fn start(kind: &str, config: Json, conventions: Conventions) -> Box<dyn Operator> {
    let registry = stages::registry();
    let kind = registry.get(kind).unwrap();
    let env = Env { device: "cpu".into(), threads: 1, scratch: std::env::temp_dir() };
    kind.start(&kind.resolve(&config, conventions).unwrap(), &env, None).unwrap()
}

fn prompts() -> Dataset {
    let tokenizer = TokenizerFile::new("{}", 0, 61);
    let file = read("prompts.json");
    let listed = file.as_array().or_else(|| file["prompts"].as_array()).unwrap();
    let rows = listed.iter().enumerate().map(|(index, prompt)| {
        let ids = prompt.as_array().or_else(|| prompt["ids"].as_array()).or_else(|| prompt["prompt"].as_array());
        Row {
            id: index as u64,
            prompt: ids.unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect(),
            response: Vec::new(),
            end: End::Length,
            log_probs: None,
            references: Vec::new(),
            family: None,
        }
    });
    Dataset { rows: rows.collect(), tokenizer }
}

fn close(name: &str, found: f64, expected: f64) {
    let error = (found - expected).abs() / expected.abs().max(1.0);
    // The state of a layer and the gradient behind it must agree within 1e-5.
    let tolerance = if name.starts_with("hidden") || name.starts_with("cosine") { 1e-5 } else { TOLERANCE };
    assert!(error <= tolerance, "{name}: {found} instead of {expected}");
}

/// Entries whose exact gradient is zero, and which AdamW therefore moves by rounding noise: the key bias.
fn is_key_bias(name: &str, index: usize, length: usize) -> bool {
    name.ends_with("attn.c_attn.bias") && (length / 3..2 * length / 3).contains(&index)
}

fn compare_weights(name: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let found = found.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (index, (x, y)) in found.iter().zip(&expected).enumerate() {
        if !is_key_bias(name, index, found.len()) {
            assert!(f64::from((x - y).abs()) <= TOLERANCE, "{name}[{index}]: {x} instead of {y}");
        }
    }
}

fn six_rounds(conventions: Conventions, name: &str) {
    let expected = read("expected.json");
    let teacher = Arc::new(LanguageModel::load(&fixtures().join("teacher"), &Device::Cpu).unwrap());
    let mut student = Arc::new(LanguageModel::load(&fixtures().join("student"), &Device::Cpu).unwrap());
    let ids = Tensor::new(&[5u32, 17, 42], &Device::Cpu).unwrap();
    let mut prompt =
        Arc::new(SoftPrompt::new(teacher.embedding().unwrap().index_select(&ids, 0).unwrap(), &teacher).unwrap());
    let data = prompts();

    let micro_batch = if conventions == Conventions::Reference { json!(2) } else { Json::Null };
    let mut respond = start("student-generate", json!({"temperature": 0.0, "max_new_tokens": 10}), conventions);
    let tune_config = json!({"learning_rate": 1e-2, "micro_batch": micro_batch});
    let mut tune = start("prompt-tune", tune_config, conventions);
    let learn_config = json!({"divergence": "reverse-kl", "learning_rate": 1e-3, "micro_batch": micro_batch});
    let mut learn = start("distill", learn_config, conventions);

    for (round, expected) in expected[name]["rounds"].as_array().unwrap().iter().enumerate() {
        let step = Step { round: round as u64, rounds: 6, epoch: round as u64 / 3, rounds_per_epoch: 3 };
        let window: Vec<usize> = (0..4).map(|i| (4 * round + i) % data.rows.len()).collect();
        let mut sink = Rows::default();

        let mut inputs = Inputs::new();
        inputs.insert("model", student.clone());
        inputs.insert("data", Arc::new(data.select(&window)));
        let responses = respond.run(inputs, &step, &mut sink).unwrap().0.remove("data").unwrap();
        let written = responses.clone().into_any().downcast::<Dataset>().unwrap();
        let found: Vec<Vec<u32>> = written.rows.iter().map(|row| row.response.clone()).collect();
        assert_eq!(json!(found), expected["responses"], "responses of round {round}");

        let mut inputs = Inputs::new();
        inputs.insert("teacher", teacher.clone());
        inputs.insert("student", student.clone());
        inputs.insert("prompt", prompt.clone());
        inputs.insert("data", responses.clone());
        let tuned = tune.run(inputs, &step, &mut sink).unwrap().0.remove("prompt").unwrap();
        let tuned = tuned.into_any().downcast::<SoftPrompt>().unwrap();
        let row = sink.0.pop().unwrap();
        let number = |row: &Map<String, Json>, field: &str| row[field].as_f64().unwrap();
        close("guidance", number(&row, "guidance"), expected["guidance_loss"].as_f64().unwrap());
        close("regulariser", number(&row, "regulariser"), expected["regulariser_loss"].as_f64().unwrap());
        close("prompt gradient", number(&row, "gradient_norm"), expected["prompt_grad_norm"].as_f64().unwrap());
        let weights: Vec<f64> = expected["weights"]
            .as_array()
            .map(|list| list.iter().map(|w| w.as_f64().unwrap()).collect())
            .unwrap_or_else(|| vec![expected["weight"].as_f64().unwrap()]);
        let weight = weights.iter().sum::<f64>() / weights.len() as f64;
        close("regulariser weight", number(&row, "regulariser_weight"), weight);

        let mut inputs = Inputs::new();
        inputs.insert("teacher", teacher.clone());
        let only_reference = std::mem::replace(&mut student, teacher.clone());
        inputs.insert("student", only_reference);
        inputs.insert("prompt", tuned.clone());
        let before = std::mem::replace(&mut prompt, tuned);
        inputs.insert("prompt_before", before);
        inputs.insert("data", responses);
        let learnt = learn.run(inputs, &step, &mut sink).unwrap().0.remove("model").unwrap();
        student = learnt.into_any().downcast::<LanguageModel>().unwrap();
        let row = sink.0.pop().unwrap();
        close("student loss", number(&row, "reverse_kl"), expected["student_loss"].as_f64().unwrap());
        close("student gradient", number(&row, "gradient_norm"), expected["student_grad_norm"].as_f64().unwrap());
        assert_eq!(row["tokens"], expected["tokens"], "tokens of round {round}");
    }

    let finals = finals(&fixtures().join(format!("final_{name}.safetensors")));
    compare_weights("prompt", &prompt.vectors, &finals["prompt"]);
    compare_model(&student, &finals);
}

fn finals(file: &Path) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(file, &Device::Cpu).unwrap().into_iter().collect()
}

fn compare_model(student: &LanguageModel, finals: &BTreeMap<String, Tensor>) {
    let mut compared = 0;
    for (name, tensor) in &student.parameters() {
        if let Some(expected) = finals.get(name) {
            compare_weights(name, tensor, expected);
            compared += 1;
        }
    }
    assert_eq!(compared, student.parameters().len(), "every weight of the student is in the fixture");
}

fn model(folder: &str) -> Arc<LanguageModel> {
    Arc::new(LanguageModel::load(&parity().join(folder), &Device::Cpu).unwrap())
}

/// Rows of the fixture of several methods.
fn rows_of(list: &Json) -> Vec<Row> {
    let ids = |list: &Json| -> Vec<u32> { serde_json::from_value(list.clone()).unwrap() };
    let row = |row: &Json| Row {
        id: row["id"].as_u64().unwrap(),
        prompt: ids(&row["prompt"]),
        response: ids(&row["response"]),
        end: End::Stop,
        log_probs: None,
        references: Vec::new(),
        family: None,
    };
    list.as_array().unwrap().iter().map(row).collect()
}

/// A stage of a method, and the rows of metrics that it writes.
struct Stage {
    operator: Box<dyn Operator>,
    sink: Rows,
}

impl Stage {
    fn new(kind: &str, config: Json, conventions: Conventions) -> Self {
        Stage { operator: start(kind, config, conventions), sink: Rows::default() }
    }

    fn run(&mut self, step: &Step, inputs: Vec<(&str, AnyValue)>, output: &str) -> AnyValue {
        let mut given = Inputs::new();
        inputs.into_iter().for_each(|(port, value)| given.insert(port, value));
        self.operator.run(given, step, &mut self.sink).unwrap().0.remove(output).unwrap()
    }
}

fn downcast<T: contract::Value>(value: AnyValue) -> Arc<T> {
    value.into_any().downcast::<T>().ok().unwrap()
}

fn merged(one: Json, other: Json) -> Json {
    let mut one = one;
    one.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
    one
}

/// Six rounds of a method of `make_methods.py` under one convention.
fn six_rounds_of(method: &str, conventions: Conventions) {
    let convention = if conventions == Conventions::Reference { "reference" } else { "sound" };
    let json = |name: &str| -> Json {
        serde_json::from_slice(&std::fs::read(parity().join("methods").join(name)).unwrap()).unwrap()
    };
    let (given, expected) = (json("rows.json"), json("expected.json"));
    let settings = &given["settings"];
    let tokenizer = TokenizerFile::new("{}", 0, 61);
    let dataset = |rows: Vec<Row>| -> AnyValue { Arc::new(Dataset { rows, tokenizer: tokenizer.clone() }) };
    let (data, valid) = (rows_of(&given["data"]), dataset(rows_of(&given["valid"])));

    let writing = json!({"temperature": 0.0, "max_new_tokens": 10, "seed": settings["seed"]});
    let learning = |more: Json| {
        let micro_batch = if conventions == Conventions::Reference { json!(2) } else { Json::Null };
        merged(json!({"learning_rate": 1e-3, "micro_batch": micro_batch}), more)
    };
    let forward = json!({"skewed-forward-kl": {"alpha": 0.1}});
    let (write, learn) = match method {
        "gkd" => (
            Some(("student-generate", json!({"fraction": 0.5}))),
            json!({"divergence": {"jsd": {"beta": 0.5}}, "diagnostics": {"top_k": 8}}),
        ),
        "distillm" => {
            let mut mixing = settings.clone();
            mixing.as_object_mut().unwrap().remove("seed");
            (Some(("mix", mixing)), json!({"divergence": forward}))
        }
        "distillm-2" => (
            Some(("student-generate", json!({}))),
            json!({
                "divergence": forward, "weight": 0.5,
                "contrast": {"divergence": {"skewed-reverse-kl": {"alpha": 0.1}}, "weight": 0.5},
            }),
        ),
        "weighted" => (None, json!({"divergence": "forward-kl", "weights": {"first": 0.7, "second": 0.3}})),
        "hidden" => {
            let states = json!({"layers": [[0, 1], [1, 2]], "weight": 0.5});
            (None, json!({"divergence": "reverse-kl", "hidden_states": states}))
        }
        "cosine" => {
            let states = json!({"layers": [[0, 0], [1, 1]], "distance": "cosine", "weight": 2.0});
            (None, json!({"divergence": "reverse-kl", "hidden_states": states}))
        }
        other => panic!("no method `{other}`"),
    };
    let mut write = write.map(|(kind, more)| Stage::new(kind, merged(writing.clone(), more), conventions));
    let mut learn = Stage::new("distill", learning(learn), conventions);
    let measuring = json!({"metrics": ["loss"], "no_repeat_ngram": 0, "max_prompt_length": 64, "bos": "no"});
    let mut check = Stage::new("evaluate", measuring, conventions);

    let (teacher, mut student) = (model("promptkd/teacher"), model("promptkd/student"));
    let teachers: Vec<(&str, AnyValue)> = match method {
        "weighted" => vec![("teachers/first", teacher.clone()), ("teachers/second", model("gpt2"))],
        "cosine" => vec![("teacher", model("gpt2"))],
        _ => vec![("teacher", teacher)],
    };
    let mut measure = |student: &Arc<LanguageModel>, step: &Step| -> Arc<Metrics> {
        downcast(check.run(step, vec![("model", student.clone()), ("data", valid.clone())], "metrics"))
    };
    let mut scores = (method == "distillm").then(|| measure(&student, &Step::once()));
    for (round, expected) in expected[method][convention].as_array().unwrap().iter().enumerate() {
        let step = Step { round: round as u64, rounds: 6, epoch: round as u64 / 2, rounds_per_epoch: 2 };
        let rows: Vec<Row> = (0..4).map(|i| data[(4 * round + i) % data.len()].clone()).collect();
        let window = dataset(rows);
        let written = write.as_mut().map(|write| {
            let mut inputs: Vec<(&str, AnyValue)> = vec![("model", student.clone()), ("data", window.clone())];
            inputs.extend(scores.clone().map(|scores| ("scores", scores as AnyValue)));
            write.run(&step, inputs, "data")
        });
        if let Some(written) = &written {
            let rows = downcast::<Dataset>(written.clone());
            let found: Vec<_> = rows.rows.iter().map(|row| row.response.clone()).collect();
            assert_eq!(json!(found), expected["responses"], "{method}, {convention}: responses of round {round}");
        }
        let texts: Vec<(&str, AnyValue)> = match (method, written) {
            ("distillm-2", Some(written)) => vec![("data", window), ("contrast", written)],
            (_, Some(written)) => vec![("data", written)],
            (_, None) => vec![("data", window)],
        };
        let inputs = teachers.clone().into_iter().chain(texts).chain([("student", student as AnyValue)]);
        student = downcast(learn.run(&step, inputs.collect(), "model"));
        if scores.is_some() && round % 2 == 1 {
            scores = Some(measure(&student, &step));
        }
        for (name, right) in expected.as_object().unwrap() {
            let what = format!("{method}, {convention}: {name} of round {round}");
            match name.as_str() {
                "responses" => {}
                "source" => {
                    let row = write.as_ref().unwrap().sink.0.last().unwrap();
                    let found = ["fresh", "replayed"].into_iter().find(|name| row[*name] == 1).unwrap_or("given");
                    assert_eq!(found, right.as_str().unwrap(), "{what}");
                }
                "threshold" => close(
                    &what,
                    write.as_ref().unwrap().sink.0.last().unwrap()[name].as_f64().unwrap(),
                    right.as_f64().unwrap(),
                ),
                "valid_loss" => close(&what, scores.as_ref().unwrap().number("loss").unwrap(), right.as_f64().unwrap()),
                _ => {
                    let found = &learn.sink.0.last().unwrap()[name];
                    close(&what, found.as_f64().unwrap(), right.as_f64().unwrap());
                }
            }
        }
    }
    let file = parity().join(format!("methods/final_{method}_{convention}.safetensors"));
    compare_model(&student, &finals(&file));
}

#[test]
fn six_rounds_with_losses_on_hidden_states_agree_with_pytorch() {
    for method in ["hidden", "cosine"] {
        six_rounds_of(method, Conventions::Sound);
        six_rounds_of(method, Conventions::Reference);
    }
}

#[test]
fn six_rounds_of_gkd_agree_with_pytorch() {
    six_rounds_of("gkd", Conventions::Sound);
    six_rounds_of("gkd", Conventions::Reference);
}

#[test]
fn six_rounds_of_distillm_agree_with_pytorch() {
    six_rounds_of("distillm", Conventions::Sound);
    six_rounds_of("distillm", Conventions::Reference);
}

#[test]
fn six_rounds_of_distillm_2_agree_with_pytorch() {
    six_rounds_of("distillm-2", Conventions::Sound);
    six_rounds_of("distillm-2", Conventions::Reference);
}

#[test]
fn six_rounds_with_two_weighted_teachers_agree_with_pytorch() {
    six_rounds_of("weighted", Conventions::Sound);
    six_rounds_of("weighted", Conventions::Reference);
}

#[test]
fn six_sound_rounds_agree_with_pytorch() {
    six_rounds(Conventions::Sound, "sound");
}

#[test]
fn six_published_rounds_agree_with_pytorch() {
    six_rounds(Conventions::Reference, "reference");
}
