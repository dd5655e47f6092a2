//! The numbers of PyTorch and `transformers`: `tests/fixtures/parity`, described in the README there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use contract::{End, TokenizerFile, Value};
use lm::loss::head_loss;
use lm::sample::Sampling;
use lm::{
    AdamW, AdamWOptions, Architecture, Family, Generate, Gradients, LanguageModel, OptimizerState, Packed, Prompt,
    Schedule, Warmup, accumulate, generate, gradients, learning_rate, norm,
};
use serde_json::Value as Json;

use crate::{flat, gap, is_noise};

const LLAMAS: [&str; 2] = ["llama/llama2", "llama/llama3"];

/// Two models of each of the other families, which between them use its options.
const FAMILIES: [&str; 11] = [
    "families/opt",
    "families/opt-350m",
    "families/mistral",
    "families/mistral-wide",
    "families/qwen2",
    "families/qwen2-tied",
    "families/qwen3",
    "families/qwen3-biased",
    "families/gpt_neox",
    "families/gpt_neox-serial",
    "families/llama-dynamic",
];

fn all() -> impl Iterator<Item = &'static str> {
    ["gpt2"].into_iter().chain(LLAMAS).chain(FAMILIES)
}

pub(crate) fn fixture(model: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity").join(model).join(name)
}

pub(crate) fn json(model: &str, name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(fixture(model, name)).unwrap()).unwrap()
}

pub(crate) fn expected(model: &str) -> BTreeMap<String, Vec<f32>> {
    let tensors = candle_core::safetensors::load(fixture(model, "expected.safetensors"), &Device::Cpu).unwrap();
    tensors.into_iter().map(|(name, tensor)| (name, flat(&tensor))).collect()
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

pub(crate) fn model(name: &str) -> LanguageModel {
    LanguageModel::load(&fixture(name, ""), &Device::Cpu).unwrap()
}

/// Rows of (prompt, response) as inputs, the places whose next token is part of a response, and those tokens.
pub(crate) fn packed(rows: &[(Vec<u32>, Vec<u32>)]) -> (Packed, Vec<u32>, Vec<u32>) {
    let (mut batch, mut places, mut labels) = (Packed::new(), Vec::new(), Vec::new());
    for (id, (prompt, response)) in rows.iter().enumerate() {
        let text = [prompt.as_slice(), response].concat();
        let start = batch.inputs.len();
        batch.push(id as u64, &text[..text.len() - 1]);
        places.extend((0..response.len()).map(|i| (start + prompt.len() - 1 + i) as u32));
        labels.extend(response);
    }
    (batch, places, labels)
}

pub(crate) fn batches(model: &str) -> Vec<Vec<(Vec<u32>, Vec<u32>)>> {
    let row = |row: &Json| (ids(&row["prompt"]), ids(&row["response"]));
    let batch = |batch: &Json| batch.as_array().unwrap().iter().map(row).collect();
    json(model, "batch.json").as_array().unwrap().iter().map(batch).collect()
}

/// The sum of -log p over response tokens, divided by `count`.
pub(crate) fn loss(model: &LanguageModel, rows: &[(Vec<u32>, Vec<u32>)], count: usize) -> Tensor {
    let (batch, places, labels) = packed(rows);
    let hidden = model.hidden(&batch, None, None).unwrap();
    let hidden = hidden.index_select(&Tensor::new(places, &Device::Cpu).unwrap(), 0).unwrap();
    let weights = vec![1.0 / count as f32; labels.len()];
    head_loss(&hidden, &model.head().unwrap(), Some((&labels, 1.0)), &[], &weights).unwrap().loss
}

pub(crate) fn tokens(rows: &[(Vec<u32>, Vec<u32>)]) -> usize {
    rows.iter().map(|(_, response)| response.len()).sum()
}

/// The gradient of a key's bias is zero where keys are not turned: rounding alone decides what AdamW makes of it.
pub(crate) fn without_key_bias(name: &str, values: &[f32]) -> Vec<f32> {
    let mut values = values.to_vec();
    if name.ends_with("attn.c_attn.bias") {
        let third = values.len() / 3;
        values[third..2 * third].fill(0.0);
    } else if is_noise(name) {
        values.fill(0.0);
    }
    values
}

#[test]
fn logits_are_those_of_transformers() {
    for name in all() {
        let (model, expected) = (model(name), expected(name));
        let (batch, ..) = packed(&batches(name)[0]);
        let logits = model.hidden(&batch, None, None).unwrap().matmul(&model.head().unwrap().t().unwrap()).unwrap();
        for (i, segment) in batch.segments.iter().enumerate() {
            let found = flat(&logits.narrow(0, segment.start, segment.len()).unwrap());
            let gap = gap(&found, &expected[&format!("logits.{i}")]);
            assert!(gap < 1e-5, "{name}, row {i}: {gap}");
        }
    }
}

#[test]
fn the_loss_and_gradients_of_llamas_are_those_of_pytorch() {
    for name in LLAMAS {
        let (model, expected, scalars) =
            (model(name).trainable().unwrap(), expected(name), json(name, "expected.json"));
        let rows = &batches(name)[0];
        let loss = loss(&model, rows, tokens(rows));
        let gradients = gradients(&loss, &model.parameters()).unwrap();
        let near = |found: f64, expected: &Json| (found / expected[0].as_f64().unwrap() - 1.0).abs() < 1e-5;
        assert!(near(f64::from(loss.to_scalar::<f32>().unwrap()), &scalars["losses"]), "{name}");
        assert!(near(norm(&gradients).unwrap(), &scalars["grad_norms"]), "{name}");
        assert_eq!(gradients.len(), expected.keys().filter(|key| key.starts_with("grad.")).count(), "{name}");
        for (parameter, gradient) in &gradients {
            let gap = gap(&flat(gradient), &expected[&format!("grad.{parameter}")]);
            assert!(gap < 1e-5, "{name}, gradient of {parameter}: {gap}");
        }
    }
}

#[test]
fn loss_gradients_and_five_updates_are_those_of_pytorch() {
    for name in ["gpt2"].into_iter().chain(FAMILIES) {
        updates_are_those_of_pytorch(name);
    }
}

fn updates_are_those_of_pytorch(of: &str) {
    let (model, expected, scalars) = (model(of).trainable().unwrap(), expected(of), json(of, "expected.json"));
    let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 1e-2, ..AdamWOptions::default() });
    let near = |what: &str, found: f64, expected: &Json| {
        let expected = expected.as_f64().unwrap();
        assert!((found / expected - 1.0).abs() < 1e-5, "{of}, {what}: {found}, expected {expected}");
    };
    for (step, rows) in batches(of).iter().enumerate() {
        let loss = loss(&model, rows, tokens(rows));
        near("loss", f64::from(loss.to_scalar::<f32>().unwrap()), &scalars["losses"][step]);
        let gradients = gradients(&loss, &model.parameters()).unwrap();
        if step == 0 {
            assert_eq!(gradients.len(), model.parameters().len());
            assert_eq!(gradients.len(), expected.keys().filter(|key| key.starts_with("grad.")).count(), "{of}");
            for (name, gradient) in &gradients {
                let expected = without_key_bias(name, &expected[&format!("grad.{name}")]);
                let gap = gap(&without_key_bias(name, &flat(gradient)), &expected);
                assert!(gap < 1e-5, "{of}, gradient of {name}: {gap}");
            }
        }
        let size = norm(&gradients).unwrap();
        near("gradient norm", size, &scalars["grad_norms"][step]);
        let rate = learning_rate(1e-3, Schedule::cosine(0.0), Warmup::default(), step as u64, 5);
        optimizer.step(&model.parameters(), &gradients, rate, (1.0 / (size + 1e-6)).min(1.0)).unwrap();
    }
    assert_eq!(optimizer.updates(), 5);
    for (name, parameter) in &model.parameters() {
        let Some(expected) = expected.get(&format!("after5.{name}")) else {
            assert_ne!(of, "gpt2");
            continue;
        };
        let expected = without_key_bias(name, expected);
        let gap = gap(&without_key_bias(name, &flat(parameter)), &expected);
        assert!(gap < 1e-5, "{name} after five updates: {gap}");
    }
}

fn greedy(max_new_tokens: usize, batch: usize) -> Generate {
    let longest = usize::MAX;
    Generate { sampling: Sampling::greedy(), max_new_tokens, longest, seed: 0, purpose: 2, time: 0, batch }
}

#[test]
fn greedy_text_is_that_of_transformers() {
    for name in all() {
        let cases = json(name, "expected.json")["greedy"].as_array().unwrap().clone();
        let prompts: Vec<Vec<u32>> = cases.iter().map(|case| ids(&case["prompt"])).collect();
        let prompts: Vec<Prompt<'_>> = prompts.iter().zip(0..).map(|(ids, row)| Prompt { row, ids }).collect();
        let most = cases.iter().map(|case| ids(&case["response"]).len()).max().unwrap();
        assert_eq!(most, if name.starts_with("families/") { 64 } else { 12 });
        for batch in [1, 3, 4] {
            let texts = generate(&model(name), None, &prompts, &greedy(most, batch), &mut |_| {}).unwrap();
            for (text, case) in texts.iter().zip(&cases) {
                assert_eq!(text.ids, ids(&case["response"]), "{name}");
                assert_eq!(text.end == End::Stop, text.ids.last() == Some(&0));
                assert_eq!(text.log_probs.len(), text.ids.len());
            }
        }
    }
}

#[test]
fn what_is_saved_is_what_transformers_saved() {
    for name in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        model(name).save(folder.path()).unwrap();
        assert_eq!(model(name).config, lm::Config::load(folder.path()).unwrap(), "{name}");
        let [saved, expected] = [folder.path().to_owned(), fixture(name, "")].map(|folder| {
            let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
            let tensor = |(name, tensor): (String, Tensor)| (name, (tensor.dims().to_vec(), flat(&tensor)));
            tensors.into_iter().map(tensor).collect::<BTreeMap<_, _>>()
        });
        assert!(saved == expected, "{name}");
    }
}

#[test]
fn gradients_do_not_depend_on_how_a_batch_is_split() {
    let model = model("gpt2").trainable().unwrap();
    let rows = batches("gpt2").concat();
    let count = tokens(&rows);
    let by_parts = |size: usize| {
        let mut total = Gradients::new();
        for part in rows.chunks(size) {
            let part = gradients(&loss(&model, part, count), &model.parameters()).unwrap();
            accumulate(&mut total, part).unwrap();
        }
        total
    };
    let whole = by_parts(rows.len());
    for size in [1, 2, 4, 7] {
        for (name, gradient) in by_parts(size) {
            let gap = gap(&without_key_bias(&name, &flat(&gradient)), &without_key_bias(&name, &flat(&whole[&name])));
            assert!(gap < 1e-5, "{name} in parts of {size}: {gap}");
        }
    }
}

#[test]
fn an_interrupted_training_ends_with_the_same_bits() {
    let train = |model: &LanguageModel, optimizer: &mut AdamW, batches: &[Vec<(Vec<u32>, Vec<u32>)>]| {
        for rows in batches {
            let gradients = gradients(&loss(model, rows, tokens(rows)), &model.parameters()).unwrap();
            optimizer.step(&model.parameters(), &gradients, 1e-3, 0.5).unwrap();
        }
    };
    let bits = |model: &LanguageModel| model.parameters().values().map(flat).collect::<Vec<_>>();
    let options = AdamWOptions::default();
    let batches = batches("gpt2");

    let unbroken = model("gpt2").trainable().unwrap();
    train(&unbroken, &mut AdamW::new(options), &batches);

    let first = model("gpt2").trainable().unwrap();
    let mut optimizer = AdamW::new(options);
    train(&first, &mut optimizer, &batches[..2]);
    let [weights, state] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    first.save(weights.path()).unwrap();
    optimizer.to_state().unwrap().save(state.path()).unwrap();
    let second = LanguageModel::load(weights.path(), &Device::Cpu).unwrap().trainable().unwrap();
    let loaded = OptimizerState::load(state.path(), &Device::Cpu).unwrap();
    let mut optimizer = AdamW::from_state(options, &loaded).unwrap();
    assert_eq!(optimizer.updates(), 2);
    train(&second, &mut optimizer, &batches[2..]);
    assert!(bits(&unbroken) == bits(&second));
}

#[test]
fn tiny_models_learn_a_batch_by_heart() {
    let shape = |family| Architecture { positions: Some(32), ..Architecture::new(family, 2, 32) };
    learns_by_heart(&shape(Family::Gpt2));
    learns_by_heart(&Architecture { kv_heads: Some(1), ..shape(Family::Llama) });
}

fn learns_by_heart(architecture: &Architecture) {
    let tokenizer = TokenizerFile::new("", 0, 40);
    let model = LanguageModel::init(architecture, tokenizer, 5, &Device::Cpu).unwrap().trainable().unwrap();
    let row = |i: u32| {
        ((0..5).map(|t| 1 + (i * 5 + t * 3) % 39).collect(), (0..6).map(|t| (i * 11 + t * t * 7) % 40).collect())
    };
    let rows: Vec<(Vec<u32>, Vec<u32>)> = (0..6).map(row).collect();
    let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 0.0, ..AdamWOptions::default() });
    for update in 0..150 {
        let gradients = gradients(&loss(&model, &rows, tokens(&rows)), &model.parameters()).unwrap();
        let rate = learning_rate(5e-3, Schedule::Constant, Warmup { updates: 10, from_zero: false }, update, 150);
        let scale = (1.0 / norm(&gradients).unwrap()).min(1.0);
        optimizer.step(&model.parameters(), &gradients, rate, scale).unwrap();
    }
    let left = loss(&model, &rows, tokens(&rows)).to_scalar::<f32>().unwrap();
    assert!(left < 0.02, "{left}");
    let prompts: Vec<Prompt<'_>> = rows.iter().zip(0..).map(|((ids, _), row)| Prompt { row, ids }).collect();
    let texts = generate(&model, None, &prompts, &greedy(6, 4), &mut |_| {}).unwrap();
    for (text, (_, response)) in texts.iter().zip(&rows) {
        let end = response.iter().position(|id| *id == 0).map_or(response.len(), |at| at + 1);
        assert_eq!(text.ids, response[..end]);
    }
}
