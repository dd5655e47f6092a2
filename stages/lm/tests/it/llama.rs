//! Llamas on disk and in training.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use contract::Value;
use contract::random::purpose;
use lm::loss::head_loss;
use lm::sample::Sampling;
use lm::{AdamWOptions, Generate, LanguageModel, Packed, Prompt, generate, gradients};
use serde_json::{Value as Json, json};

use crate::{flat, small_models, with_threads};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity/llama").join(name)
}

fn load(folder: &Path) -> LanguageModel {
    LanguageModel::load(folder, &Device::Cpu).unwrap()
}

fn weights(model: &LanguageModel) -> Vec<(String, Vec<f32>)> {
    model.parameters().iter().map(|(name, tensor)| (name.clone(), flat(tensor))).collect()
}

fn edit(folder: &Path, change: impl FnOnce(&mut Json)) {
    let path = folder.join("config.json");
    let mut config: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

/// A folder with the configuration of a fixture and these tensors.
fn folder(name: &str, tensors: &HashMap<String, Tensor>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture(name).join("config.json"), folder.path().join("config.json")).unwrap();
    candle_core::safetensors::save(tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

#[test]
fn a_saved_llama_reopens_bit_equal() {
    for name in ["llama2", "llama3"] {
        let model = load(&fixture(name));
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path()).unwrap();
        let again = load(folder.path());
        assert_eq!(again.config, model.config);
        assert!(weights(&again) == weights(&model));
    }
}

#[test]
fn shards_bare_names_and_old_constants_are_read() {
    let tensors = candle_core::safetensors::load(fixture("llama2").join("model.safetensors"), &Device::Cpu).unwrap();
    let (mut shards, mut map) = ([(); 2].map(|()| HashMap::new()), serde_json::Map::new());
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        let name = name.strip_prefix("model.").unwrap_or(&name).to_owned();
        map.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
        shards[i % 2].insert(name, tensor);
    }
    let constant = "layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    shards[0].insert(constant, Tensor::new(&[1.0f32, 0.1, 0.01], &Device::Cpu).unwrap());
    let folder = folder("llama2", &HashMap::new());
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    for (i, shard) in shards.iter().enumerate() {
        candle_core::safetensors::save(shard, folder.path().join(format!("part-{i}.safetensors"))).unwrap();
    }
    fs::write(folder.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    assert!(weights(&load(folder.path())) == weights(&load(&fixture("llama2"))));
}

#[test]
fn a_tied_model_may_be_stored_by_its_head() {
    let mut tensors =
        candle_core::safetensors::load(fixture("llama3").join("model.safetensors"), &Device::Cpu).unwrap();
    let embedding = tensors.remove("model.embed_tokens.weight").unwrap();
    tensors.insert("lm_head.weight".to_owned(), embedding.clone());
    assert!(weights(&load(folder("llama3", &tensors).path())) == weights(&load(&fixture("llama3"))));
    tensors.insert("lm_head.weight".to_owned(), embedding.narrow(0, 0, 5).unwrap().contiguous().unwrap());
    let error = LanguageModel::load(folder("llama3", &tensors).path(), &Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("tensor `lm_head.weight`") && error.contains("shape [5, 24], expected [61, 24]"), "{error}");
}

#[test]
fn what_cannot_be_computed_is_an_error() {
    let tensors = candle_core::safetensors::load(fixture("llama2").join("model.safetensors"), &Device::Cpu).unwrap();
    for (key, value, expected) in [
        ("hidden_act", json!("gelu"), "activation is `gelu`: expected `silu`"),
        ("rope_parameters", json!({"rope_type": "yarn"}), "rotary positions of type `yarn`"),
        ("num_key_value_heads", json!(3), "cannot share 3 heads"),
        ("head_dim", json!(5), "a head has 5 channels"),
        ("attention_bias", json!(true), "tensor `model.layers.0.self_attn.q_proj.bias` is missing (8 of"),
    ] {
        let folder = folder("llama2", &tensors);
        edit(folder.path(), |config| config[key] = value);
        let error = format!("{:#}", LanguageModel::load(folder.path(), &Device::Cpu).err().expect(key));
        assert!(error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn norms_and_biases_do_not_decay() {
    let [sound, published] = [false, true].map(|decay_norms| AdamWOptions { decay_norms, ..AdamWOptions::default() });
    let model = load(&fixture("llama3"));
    for name in model.parameters().keys() {
        let norm = name.contains("layernorm") || name == "model.norm.weight";
        assert_eq!(sound.decays(name), !norm && !name.ends_with("bias"), "{name}");
        assert_eq!(published.decays(name), !name.ends_with("bias"), "{name}");
    }
}

#[test]
fn neither_company_nor_threads_change_a_bit() {
    for model in small_models() {
        alone_and_in_company(&model.trainable().unwrap());
    }
}

fn alone_and_in_company(model: &LanguageModel) {
    let texts: Vec<Vec<u32>> = (0..5u32).map(|i| (0..18 + i * 3).map(|t| (i * 13 + t * 7) % 40).collect()).collect();
    let mut batch = Packed::new();
    texts.iter().zip(0..).for_each(|(ids, row)| batch.push(row, ids));
    let run = || {
        let hidden = model.hidden(&batch, None, None).unwrap();
        let labels: Vec<u32> = (0..batch.inputs.len() as u32).map(|i| i * 3 % 40).collect();
        let weights = vec![0.1; labels.len()];
        let loss = head_loss(&hidden, &model.head().unwrap(), Some((&labels, 1.0)), &[], &weights).unwrap().loss;
        let gradients = gradients(&loss, &model.parameters()).unwrap();
        (flat(&hidden), gradients.values().map(flat).collect::<Vec<_>>())
    };
    let whole = run();
    for threads in [1, 2, 3] {
        assert!(with_threads(threads, run) == whole, "{threads} threads");
    }
    for (segment, (ids, row)) in batch.segments.iter().zip(texts.iter().zip(0..)) {
        let mut alone = Packed::new();
        alone.push(row, ids);
        let alone = flat(&model.hidden(&alone, None, None).unwrap());
        assert!(alone == whole.0[segment.start * 32..segment.end * 32], "row {row}");
    }
}

/// A small Llama as others published it, in the folder that `PIPELINE_TEST_WEIGHTS` names. The ids are what
/// `transformers` writes greedily: "... a little girl named Lily lived in a small house with ...".
#[test]
fn a_published_llama_writes_the_text_of_transformers() {
    let weights = PathBuf::from(std::env::var_os("PIPELINE_TEST_WEIGHTS").unwrap_or_default());
    let folder = weights.join("tinystories-656k-llama");
    if !folder.exists() {
        println!("skipped: `{}` is not there; set PIPELINE_TEST_WEIGHTS", folder.display());
        return;
    }
    let options = Generate {
        sampling: Sampling::greedy(),
        max_new_tokens: RESPONSE.len(),
        longest: usize::MAX,
        seed: 0,
        purpose: purpose::GENERATE,
        time: 0,
        batch: 1,
    };
    let prompt = Prompt { row: 0, ids: &PROMPT };
    let texts = generate(&load(&folder), None, &[prompt], &options, &mut |_| {}).unwrap();
    assert_eq!(texts[0].ids, RESPONSE);
}

/// `<|start_story|> Once upon a time`.
const PROMPT: [u32; 6] = [1, 80, 147, 201, 282, 57];
const RESPONSE: [u32; 32] = [
    313, 598, 303, 1049, 1468, 267, 628, 333, 94, 1210, 263, 251, 604, 94, 1030, 94, 1030, 94, 436, 220, 1053, 615,
    303, 328, 552, 319, 1269, 163, 1945, 897, 645, 1188,
];
