//! Six rounds of PromptKD against an independent PyTorch program, under both conventions.
//!
//! `tests/fixtures/parity/make_promptkd.py` is that program: written from the formulas, in float64, on tiny random GPT-2s
//! with greedy generation and without dropout. Every response must be equal; every loss part, gradient norm and final
//! weight must agree within 1e-4.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use contract::{Conventions, Dataset, End, Env, Inputs, Operator, Row, Sink, Step, TokenizerFile};
use lm::{LanguageModel, SoftPrompt};
use serde_json::{Map, Value as Json, json};

const TOLERANCE: f64 = 1e-4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/promptkd")
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
    assert!(error <= TOLERANCE, "{name}: {found} instead of {expected}");
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

    let finals = fixtures().join(format!("final_{name}.safetensors"));
    let finals: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(finals, &Device::Cpu).unwrap().into_iter().collect();
    compare_weights("prompt", &prompt.vectors, &finals["prompt"]);
    let mut compared = 0;
    for (name, tensor) in &student.parameters() {
        if let Some(expected) = finals.get(name) {
            compare_weights(name, tensor, expected);
            compared += 1;
        }
    }
    assert_eq!(compared, student.parameters().len(), "every weight of the student is in the fixture");
}

#[test]
fn six_sound_rounds_agree_with_pytorch() {
    six_rounds(Conventions::Sound, "sound");
}

#[test]
fn six_published_rounds_agree_with_pytorch() {
    six_rounds(Conventions::Reference, "reference");
}
