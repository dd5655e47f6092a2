//! A quantised model of others, as it lies in its file, against `transformers` on the same weights, dequantised.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use contract::random::purpose;
use lm::sample::Sampling;
use lm::{Generate, LanguageModel, Packed, Prompt, generate};
use serde_json::Value as Json;

use crate::{flat, gap};

/// SmolLM2-135M-Instruct in Q4_1: the file that `SMOLLM2` names; README.md says how to get it.
fn smollm2() -> Option<PathBuf> {
    let path = std::env::var_os("SMOLLM2").map(PathBuf::from);
    if path.is_none() {
        println!("skipped: set SMOLLM2 to the path of `SmolLM2-135M-Instruct.Q4_1.gguf`");
    }
    path
}

fn fixture() -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity/smollm2/smollm2.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn numbers(json: &Json) -> Vec<f32> {
    json.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

#[test]
fn smollm2_says_what_it_says_in_transformers() {
    let Some(path) = smollm2() else { return };
    let model = LanguageModel::load(&path, &Device::Cpu).unwrap();
    let expected = fixture();
    let text = ids(&expected["ids"]);
    let mut batch = Packed::new();
    batch.push(0, &text);
    let hidden = model.hidden(&batch, None, None).unwrap();
    let logits = hidden.matmul(&model.head().unwrap().t().unwrap()).unwrap();
    let row = |row: usize| flat(&logits.narrow(0, row, 1).unwrap());
    for (row, expected) in [(row(0), &expected["first"]), (row(text.len() - 1), &expected["last"])] {
        let expected = numbers(expected);
        let found: Vec<f32> = row.iter().step_by(row.len() / expected.len()).take(expected.len()).copied().collect();
        let gap = gap(&found, &expected);
        assert!(gap < 2e-5, "logits differ by {gap} of the largest");
    }

    let options = Generate {
        sampling: Sampling::greedy(),
        max_new_tokens: 48,
        longest: usize::MAX,
        seed: 0,
        purpose: purpose::EVALUATE,
        time: 0,
        batch: 1,
    };
    let prompts = [Prompt { row: 0, ids: &text }];
    let answers = generate(&model, None, &prompts, &options, &mut |_| {}).unwrap();
    assert_eq!(answers[0].ids, ids(&expected["greedy"]));
}

#[test]
fn a_gradient_reaches_what_stands_before_quantised_layers() {
    let Some(path) = smollm2() else { return };
    let model = LanguageModel::load(&path, &Device::Cpu).unwrap();
    let mut batch = Packed::new();
    batch.push(0, &ids(&fixture()["ids"])[..12]);
    let start = model.embedding().unwrap().narrow(0, 100, 2).unwrap().contiguous().unwrap();
    let loss = |prompt: &Tensor| {
        let hidden = model.hidden(&batch, Some(prompt), None).unwrap();
        hidden.sqr().unwrap().mean_all().unwrap()
    };
    let prompt = candle_core::Var::from_tensor(&start).unwrap();
    let gradient = loss(&prompt).backward().unwrap().remove(&prompt).unwrap();
    // Along the gradient itself the loss rises by its norm.
    let norm = gradient.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f32>().unwrap();
    let step = 1e-2;
    let moved = |by: f64| (&start + (&gradient * (by / f64::from(norm))).unwrap()).unwrap();
    let value = |prompt: &Tensor| f64::from(loss(prompt).to_scalar::<f32>().unwrap());
    let slope = (value(&moved(step)) - value(&moved(-step))) / (2.0 * step);
    assert!((slope / f64::from(norm) - 1.0).abs() < 0.02, "slope {slope}, norm of the gradient {norm}");
}
