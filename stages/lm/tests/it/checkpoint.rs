//! Model folders, in and out.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use contract::{TokenizerFile, Value};
use lm::{AdamW, AdamWOptions, Architecture, Family, Gradients, LanguageModel, OptimizerState, Packed};

use crate::{flat, small_model};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/checkpoint").join(name)
}

/// A folder with the fixture's configuration and some of its files, under new names.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in [("config.json", "config.json")].iter().chain(files) {
        fs::copy(fixture(from), folder.path().join(to)).unwrap();
    }
    folder
}

fn load(folder: &Path) -> LanguageModel {
    LanguageModel::load(folder, &Device::Cpu).unwrap()
}

fn error(folder: &Path) -> String {
    format!("{:#}", LanguageModel::load(folder, &Device::Cpu).err().expect("an error"))
}

fn weights(model: &LanguageModel) -> Vec<(String, Vec<f32>)> {
    model.parameters().iter().map(|(name, tensor)| (name.clone(), flat(tensor))).collect()
}

/// Every file of a folder with its bytes.
fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn a_saved_model_reopens_bit_equal_and_saves_the_same_bytes() {
    let json = r#"{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<end>"}]}"#;
    let tokenizer = TokenizerFile::new(json, 2, 3);
    let architecture = Architecture {
        heads: Some(4),
        positions: Some(9),
        dropout: Some(0.1),
        ..Architecture::new(Family::Gpt2, 1, 16)
    };
    let model = LanguageModel::init(&architecture, tokenizer, 1, &Device::Cpu).unwrap();
    let [first, second] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    model.save(first.path()).unwrap();
    let loaded = load(first.path());
    assert_eq!(loaded.config, model.config);
    assert_eq!(loaded.tokenizer, model.tokenizer);
    assert!(weights(&loaded) == weights(&model));
    loaded.save(second.path()).unwrap();
    assert!(bytes(first.path()) == bytes(second.path()));
    let names: Vec<_> = bytes(first.path()).into_iter().map(|(name, _)| name).collect();
    let expected = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pipeline_tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    let config = fs::read_to_string(first.path().join("tokenizer_config.json")).unwrap();
    assert!(config.contains(r#""eos_token": "<end>""#), "{config}");
}

#[test]
fn pytorch_and_safetensors_files_hold_the_same_model() {
    let safetensors = load(folder(&[("model.safetensors", "model.safetensors")]).path());
    let pytorch = load(folder(&[("pytorch_model.bin", "pytorch_model.bin")]).path());
    assert!(weights(&safetensors) == weights(&pytorch));
    assert_eq!((safetensors.tokenizer.end, safetensors.tokenizer.size), (10, 11));
}

#[test]
fn half_precision_becomes_f32() {
    let kept = load(folder(&[("bf16.safetensors", "model.safetensors")]).path());
    // Its matrices stay as they are on disk until they are trained.
    assert!(kept.parameters().values().all(|parameter| parameter.rank() == 1));
    let rounded = kept.trainable().unwrap();
    let exact = load(folder(&[("model.safetensors", "model.safetensors")]).path());
    for ((name, rounded), (_, exact)) in weights(&rounded).iter().zip(weights(&exact)) {
        for (rounded, exact) in rounded.iter().zip(exact) {
            assert_eq!(*rounded, half::bf16::from_f32(exact).to_f32(), "{name}");
        }
    }
}

#[test]
fn shards_and_names_without_a_prefix_are_read() {
    let tensors = candle_core::safetensors::load(fixture("model.safetensors"), &Device::Cpu).unwrap();
    let (mut shards, mut map) = ([(); 2].map(|()| std::collections::HashMap::new()), serde_json::Map::new());
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        let name = name.strip_prefix("transformer.").unwrap().to_owned();
        map.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
        shards[i % 2].insert(name, tensor);
    }
    let folder = folder(&[]);
    for (i, shard) in shards.iter().enumerate() {
        candle_core::safetensors::save(shard, folder.path().join(format!("part-{i}.safetensors"))).unwrap();
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let whole = self::folder(&[("model.safetensors", "model.safetensors")]);
    assert!(weights(&load(folder.path())) == weights(&load(whole.path())));

    fs::remove_file(folder.path().join("part-1.safetensors")).unwrap();
    assert!(error(folder.path()).contains("part-1.safetensors"));
}

#[test]
fn broken_folders_are_explained() {
    let empty = folder(&[]);
    assert!(
        error(empty.path()).contains(
            "expected `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`, `pytorch_model"
        )
    );

    let truncated = folder(&[("model.safetensors", "model.safetensors")]);
    let path = truncated.path().join("model.safetensors");
    let content = fs::read(&path).unwrap();
    for length in [0, 5, 100, content.len() - 1] {
        fs::write(&path, &content[..length]).unwrap();
        let error = error(truncated.path());
        assert!(error.contains("is not a whole safetensors file"), "{error}");
    }

    let tensors = || candle_core::safetensors::load(fixture("model.safetensors"), &Device::Cpu).unwrap();
    let name = "transformer.h.0.mlp.c_fc.bias".to_owned();
    let mut missing = tensors();
    missing.remove(&name);
    candle_core::safetensors::save(&missing, &path).unwrap();
    assert!(error(truncated.path()).contains("tensor `transformer.h.0.mlp.c_fc.bias` is missing (1 of 16 are) in"));

    let mut misshapen = tensors();
    misshapen.insert(name, Tensor::zeros(7, DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&misshapen, &path).unwrap();
    let text = error(truncated.path());
    assert!(text.contains("`transformer.h.0.mlp.c_fc.bias`") && text.contains("shape [7], expected [32]"), "{text}");

    let mut foreign = tensors();
    foreign.insert("transformer.h.1.ln_1.bias".into(), Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&foreign, &path).unwrap();
    assert!(error(truncated.path()).contains("is none of the model that `config.json` describes"));

    fs::remove_file(path).unwrap();
    fs::write(truncated.path().join("pytorch_model.bin"), b"not a zip").unwrap();
    assert!(error(truncated.path()).contains("PyTorch 1.6 or later"));
}

#[test]
fn a_model_smaller_than_its_tokenizer_is_an_error() {
    let folder = folder(&[("model.safetensors", "model.safetensors")]);
    fs::write(folder.path().join("tokenizer.json"), r#"{"model": {"vocab": {"a": 11}}}"#).unwrap();
    assert!(error(folder.path()).contains("a tokenizer of 12 ids and a model of 11"));
}

/// Checkpoints as others published them, in the folder that `PIPELINE_TEST_WEIGHTS` names.
#[test]
fn published_checkpoints_open() {
    let weights = PathBuf::from(std::env::var_os("PIPELINE_TEST_WEIGHTS").unwrap_or_default());
    for (name, width, vocabulary) in [("tiny-gpt2-random", 2, 21), ("fake-gpt2-random", 2, 50257)] {
        let folder = weights.join(name);
        if !folder.exists() {
            println!("skipped: `{}` is not there", folder.display());
            continue;
        }
        let model = load(&folder);
        assert_eq!((model.width(), model.vocab_size()), (width, vocabulary));
        let mut batch = Packed::new();
        batch.push(0, &[1, 2, 3]);
        assert!(flat(&model.hidden(&batch, None, None).unwrap()).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_clone_has_storage_of_its_own_and_a_frozen_view_has_not() {
    let model = small_model(0.0).trainable().unwrap();
    let (clone, view) = (model.deep_clone().unwrap(), model.frozen());
    let before = weights(&model);
    let gradients: Gradients =
        model.parameters().iter().map(|(name, p)| (name.clone(), p.detach().ones_like().unwrap())).collect();
    let mut optimizer = AdamW::new(AdamWOptions::default());
    optimizer.step(&model.parameters(), &gradients, 0.1, 1.0).unwrap();
    assert!(weights(&clone) == before);
    assert!(weights(&view) == weights(&model) && weights(&view) != before);
    assert!(view.parameters().values().all(|p| !p.is_variable()));

    let folder = tempfile::tempdir().unwrap();
    let state = optimizer.to_state().unwrap();
    optimizer.step(&model.parameters(), &gradients, 0.1, 1.0).unwrap();
    state.save(folder.path()).unwrap();
    let again = tempfile::tempdir().unwrap();
    OptimizerState::load(folder.path(), &Device::Cpu).unwrap().save(again.path()).unwrap();
    assert!(bytes(folder.path()) == bytes(again.path()));
}
