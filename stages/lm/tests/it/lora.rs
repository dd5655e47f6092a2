//! Low-rank adapters, and the numbers of PEFT: `tests/fixtures/parity/lora`.

use std::path::PathBuf;

use candle_core::{Device, Tensor, Var};
use contract::Value;
use lm::sample::Sampling;
use lm::{
    AdamW, AdamWOptions, Adapter, Biases, Generate, LanguageModel, Lora, Packed, Prompt, Schedule, Warmup, generate,
    gradients, learning_rate, norm,
};

use crate::parity::{batches, expected, fixture, json, loss, model, packed, tokens, without_key_bias};
use crate::{flat, gap};

const CASES: [&str; 5] = ["gpt2", "llama", "qwen2", "opt", "gpt_neox"];

fn folder(case: &str) -> PathBuf {
    fixture("lora", case)
}

fn scalars(case: &str) -> serde_json::Value {
    json(&format!("lora/{case}"), "expected.json")
}

fn base(case: &str) -> String {
    scalars(case)["base"].as_str().unwrap().to_owned()
}

fn adapted(case: &str) -> LanguageModel {
    let adapter = Adapter::load(&folder(case), &Device::Cpu).unwrap();
    model(&base(case)).with_adapter(&adapter).unwrap()
}

fn logits(model: &LanguageModel, batch: &Packed) -> Tensor {
    model.hidden(batch, None, None).unwrap().matmul(&model.head().unwrap().t().unwrap()).unwrap()
}

#[test]
fn logits_are_those_of_peft_merged_or_not() {
    for case in CASES {
        let (batch, ..) = packed(&batches(&base(case))[0]);
        let expected = expected(&format!("lora/{case}"));
        let adapted = adapted(case);
        for model in [&adapted, &adapted.merged().unwrap()] {
            let logits = logits(model, &batch);
            for (i, segment) in batch.segments.iter().enumerate() {
                let found = flat(&logits.narrow(0, segment.start, segment.len()).unwrap());
                let gap = gap(&found, &expected[&format!("logits.{i}")]);
                assert!(gap < 1e-5, "{case}, row {i}: {gap}");
            }
        }
    }
}

#[test]
fn gradients_and_updates_are_those_of_peft_and_nothing_else_is_trained() {
    for case in CASES {
        let (expected, scalars) = (expected(&format!("lora/{case}")), scalars(case));
        let model = adapted(case).trainable().unwrap();
        let before = self::model(&base(case));
        let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 1e-2, ..AdamWOptions::default() });
        let near = |what: &str, found: f64, expected: &serde_json::Value| {
            let expected = expected.as_f64().unwrap();
            assert!((found / expected - 1.0).abs() < 1e-5, "{case}, {what}: {found}, expected {expected}");
        };
        for (step, rows) in batches(&base(case)).iter().enumerate() {
            let loss = loss(&model, rows, tokens(rows));
            near("loss", f64::from(loss.to_scalar::<f32>().unwrap()), &scalars["losses"][step]);
            let gradients = gradients(&loss, &model.parameters()).unwrap();
            if step == 0 {
                assert_eq!(gradients.len(), expected.keys().filter(|key| key.starts_with("grad.")).count(), "{case}");
                for (name, gradient) in &gradients {
                    let right = without_key_bias(name, &expected[&format!("grad.{name}")]);
                    let gap = gap(&without_key_bias(name, &flat(gradient)), &right);
                    assert!(gap < 1e-5, "{case}, gradient of {name}: {gap}");
                }
            }
            let size = norm(&gradients).unwrap();
            near("gradient norm", size, &scalars["grad_norms"][step]);
            let rate = learning_rate(1e-3, Schedule::cosine(0.0), Warmup::default(), step as u64, 5);
            optimizer.step(&model.parameters(), &gradients, rate, (1.0 / (size + 1e-6)).min(1.0)).unwrap();
        }
        // Of GPT-NeoX's keys a part is not turned: the gradient of its biases is rounding.
        let parameters = model.parameters();
        for (name, parameter) in parameters.iter().filter(|(name, _)| !name.ends_with("query_key_value.bias")) {
            let right = without_key_bias(name, &expected[&format!("after.{name}")]);
            let gap = gap(&without_key_bias(name, &flat(parameter)), &right);
            assert!(gap < 1e-5, "{case}, {name} after the updates: {gap}");
        }
        // Below the adapter the model is as it was.
        let adapter = model.adapter().unwrap();
        let trained = before.parameters().into_iter().filter(|(name, _)| !adapter.tensors.contains_key(name));
        let saved = tempfile::tempdir().unwrap();
        model.save(saved.path()).unwrap();
        let weights = candle_core::safetensors::load(saved.path().join("model.safetensors"), &Device::Cpu).unwrap();
        for (name, values) in trained {
            assert!(flat(&values) == flat(&weights[&name]), "{case}: {name}");
        }
    }
}

#[test]
fn a_saved_model_keeps_its_adapter_to_the_bit_and_the_adapter_is_what_peft_wrote() {
    for case in CASES {
        let model = adapted(case);
        let saved = tempfile::tempdir().unwrap();
        model.save(saved.path()).unwrap();
        let loaded = LanguageModel::load(saved.path(), &Device::Cpu).unwrap();
        assert_eq!(loaded.adapter().unwrap().lora, model.adapter().unwrap().lora);
        let (batch, ..) = packed(&batches(&base(case))[0]);
        assert!(flat(&logits(&loaded, &batch)) == flat(&logits(&model, &batch)), "{case}");
        let [own, peft] = [saved.path().join("adapter"), folder(case)].map(|folder| {
            let tensors = candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu);
            let mut tensors: Vec<_> = tensors.unwrap().into_iter().map(|(name, it)| (name, flat(&it))).collect();
            tensors.retain(|(name, _)| !name.ends_with("base_layer.weight"));
            tensors.sort_by(|a, b| a.0.cmp(&b.0));
            tensors
        });
        assert!(own == peft, "{case}");
        // Saved once more, from where it was loaded, it has the same bytes.
        let again = tempfile::tempdir().unwrap();
        loaded.save(again.path()).unwrap();
        for name in
            ["config.json", "model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
        {
            let [one, two] = [&saved, &again].map(|folder| std::fs::read(folder.path().join(name)).unwrap());
            assert!(one == two, "{case}: {name}");
        }
    }
}

#[test]
fn writing_follows_the_adapter() {
    for case in CASES {
        let model = adapted(case);
        let prompts = [vec![1, 2, 3], vec![4], vec![5, 6, 7, 8, 9]];
        let prompts: Vec<Prompt<'_>> = prompts.iter().zip(0..).map(|(ids, row)| Prompt { row, ids }).collect();
        let (sampling, longest) = (Sampling::greedy(), usize::MAX);
        let options = Generate { sampling, max_new_tokens: 20, longest, seed: 0, purpose: 2, time: 0, batch: 2 };
        let text = |model: &LanguageModel| {
            let texts = generate(model, None, &prompts, &options, &mut |_| {}).unwrap();
            texts.into_iter().map(|text| text.ids).collect::<Vec<_>>()
        };
        assert_eq!(text(&model), text(&model.merged().unwrap()), "{case}");
        assert_ne!(text(&model), text(&self::model(&base(case))), "{case}");
    }
}

#[test]
fn a_new_adapter_changes_nothing_and_then_learns() {
    let lora = Lora { rank: 4, alpha: 8.0, dropout: 0.1, targets: None, bias: Biases::None, rslora: false };
    for case in CASES {
        let plain = model(&base(case));
        let new = |seed| plain.with_new_adapter(&lora, seed).unwrap();
        let (batch, ..) = packed(&batches(&base(case))[0]);
        assert!(flat(&logits(&new(1), &batch)) == flat(&logits(&plain, &batch)), "{case}");
        let first = |seed| flat(&new(seed).adapter().unwrap().tensors[0]);
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        let a = new(1).adapter().unwrap().tensors[0].clone();
        let bound = 1.0 / (a.dims()[1] as f32).sqrt();
        let largest = first(1).iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        assert!(largest <= bound && largest > 0.8 * bound, "{case}: {largest} of {bound}");
        // `B` is zero, so that the gradient of `A` is at first, and every matrix has one.
        let model = new(1).trainable().unwrap();
        let rows = &batches(&base(case))[0];
        let gradients = gradients(&loss(&model, rows, tokens(rows)), &model.parameters()).unwrap();
        assert_eq!(gradients.len(), model.parameters().len(), "{case}");
        for (name, gradient) in &gradients {
            let size = flat(gradient).iter().map(|x| x.abs()).sum::<f32>();
            assert_eq!(size == 0.0, name.ends_with("lora_A.weight"), "{case}, {name}: {size}");
        }
    }
}

#[test]
fn what_does_not_fit_says_so() {
    let lora = |targets: &[&str]| Lora {
        rank: 2,
        alpha: 4.0,
        dropout: 0.0,
        targets: Some(targets.iter().map(|target| (*target).to_owned()).collect()),
        bias: Biases::None,
        rslora: false,
    };
    let plain = model("gpt2");
    let error = plain.with_new_adapter(&lora(&["q_proj"]), 0).err().unwrap().to_string();
    assert!(error.contains("`q_proj`") && error.contains("`c_attn`, `c_proj`, `c_fc`, `lm_head`"), "{error}");
    let adapted = plain.with_new_adapter(&lora(&["c_attn"]), 0).unwrap();
    assert!(adapted.with_new_adapter(&lora(&["c_attn"]), 0).err().unwrap().to_string().contains("merge that first"));
    assert!(adapted.cut_to(&[0]).err().unwrap().to_string().contains("merge that first"));
    assert!(plain.merged().err().unwrap().to_string().contains("nothing to merge"));
    assert!(adapted.check_adapter(&lora(&["c_attn"])).is_ok());
    for other in [lora(&["c_attn", "c_fc"]), Lora { rank: 3, ..lora(&["c_attn"]) }] {
        assert!(adapted.check_adapter(&other).unwrap_err().to_string().contains("rank 2, alpha 4"));
    }
    let other = model("families/qwen2").with_adapter(&Adapter::load(&folder("llama"), &Device::Cpu).unwrap());
    assert!(other.err().is_some());

    let copy = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(folder("gpt2").join(name), copy.path().join(name)).unwrap();
    }
    let path = copy.path().join("adapter_config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["use_dora"] = true.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let error = format!("{:#}", Adapter::load(copy.path(), &Device::Cpu).err().unwrap());
    assert!(error.contains("`use_dora` is true") && error.contains("adapter_config.json"), "{error}");
}

#[test]
fn a_copy_trains_by_itself_over_the_same_weights() {
    let model = adapted("llama").trainable().unwrap();
    let copy = model.deep_clone().unwrap().trainable().unwrap();
    let (name, values) = model.parameters().into_iter().next().unwrap();
    Var::from_tensor(&values).unwrap().set(&values.detach().zeros_like().unwrap()).unwrap();
    assert!(flat(&copy.parameters()[&name]).iter().any(|x| *x != 0.0));
}
