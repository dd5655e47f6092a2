//! One update against one teacher.

use lm::Family;
use serde_json::{Map, Value as Json, json};

use super::*;
use crate::testing::{Scratch, output, row};

fn tokenizer() -> contract::TokenizerFile {
    let vocabulary: Map<String, Json> = (0..40).map(|id| (format!("t{id}"), json!(id))).collect();
    let json = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}});
    contract::TokenizerFile::new(json.to_string(), 0, 40)
}

fn model(layers: usize, seed: u64, dropout: f32) -> LanguageModel {
    let shape = Architecture {
        heads: Some(2),
        positions: Some(32),
        dropout: Some(dropout),
        ..Architecture::new(Family::Gpt2, layers, 16)
    };
    LanguageModel::init(&shape, tokenizer(), seed, &Device::Cpu).unwrap()
}

/// An update: the student and its numbers.
fn learn(config: &Json, student: LanguageModel, teacher: LanguageModel) -> (Arc<LanguageModel>, Map<String, Json>) {
    let rows = vec![row(3, &[1, 2], &[39, 4, 7, 0]), row(9, &[5, 6], &[8, 0])];
    let data: AnyValue = Arc::new(Dataset { rows, tokenizer: tokenizer() });
    let mut whole = json!({"divergence": "forward-kl", "learning_rate": 1e-2});
    config.as_object().unwrap().iter().for_each(|(name, value)| whole[name] = value.clone());
    let inputs: Vec<(&str, AnyValue)> =
        vec![("student", Arc::new(student)), ("teacher", Arc::new(teacher)), ("data", data)];
    let (outputs, mut log) = Scratch::new().run(&Distill, whole, inputs).unwrap();
    (output(&outputs, "model"), log.rows.remove(0))
}

fn of(model: &LanguageModel) -> Vec<Vec<f32>> {
    model.parameters().values().map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

#[test]
fn an_update_lowers_the_divergence_from_the_teacher() {
    for divergence in ["forward-kl", "reverse-kl", "total-variation"] {
        let config = json!({"divergence": divergence});
        let (student, first) = learn(&config, model(1, 1, 0.0), model(2, 2, 0.0));
        assert_eq!(student.config.layers(), 1, "the student has its own shape");
        let name = divergence.replace('-', "_");
        assert_eq!(first["loss"], first[&name]);
        // Weight decay alone would lower it, too.
        assert!(first["gradient_norm"].as_f64().unwrap() > 1e-3, "{first:?}");
        let again = student.deep_clone().unwrap();
        let (_, second) = learn(&config, again, model(2, 2, 0.0));
        assert!(second[&name].as_f64() < first[&name].as_f64(), "{first:?} {second:?}");
        assert_ne!(of(&student), of(&model(1, 1, 0.0)));
    }
}

#[test]
fn the_students_dropout_is_on_and_the_teachers_is_off() {
    let loss = |config: Json, student: f32, teacher: f32| {
        learn(&config, model(1, 1, student), model(2, 2, teacher)).1["forward_kl"].as_f64().unwrap()
    };
    let without = loss(json!({}), 0.0, 0.0);
    assert_ne!(loss(json!({}), 0.3, 0.0), without, "the student's is on");
    assert_eq!(loss(json!({"dropout": false}), 0.3, 0.0), without);
    assert_eq!(loss(json!({}), 0.0, 0.3), without, "the teacher's is off");
}

#[test]
fn a_teacher_that_could_be_trained_stays_as_it_is() {
    let teacher = model(2, 2, 0.0).trainable().unwrap();
    assert!(teacher.parameters().values().all(Tensor::is_variable));
    assert!(!teacher.frozen().parameters().values().any(Tensor::is_variable), "no gradient flows into it");
    let (right, _) = learn(&json!({}), model(1, 1, 0.0), model(2, 2, 0.0));
    let (found, _) = learn(&json!({}), model(1, 1, 0.0), teacher);
    assert_eq!(of(&found), of(&right));
}

#[test]
fn an_adapter_of_the_head_learns() {
    let config = json!({"lora": {"rank": 2, "targets": ["lm_head"]}});
    let (student, first) = learn(&config, model(1, 1, 0.0), model(2, 2, 0.0));
    let adapter = student.adapter().unwrap();
    let moved = |tensor: &Tensor| tensor.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 0.0;
    // The second matrix begins as zeros.
    assert!(adapter.tensors.values().all(moved));
    let again = student.deep_clone().unwrap();
    let (_, second) = learn(&config, again, model(2, 2, 0.0));
    assert!(second["forward_kl"].as_f64() < first["forward_kl"].as_f64(), "{first:?} {second:?}");
}
