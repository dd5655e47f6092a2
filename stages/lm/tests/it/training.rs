//! Gradients and updates of whole models.

use candle_core::{Device, Tensor, Var};
use contract::random::purpose;
use lm::loss::head_loss;
use lm::{AdamW, AdamWOptions, Dropout, Gradients, LanguageModel, Packed, accumulate, gradients};

use crate::{flat, gap, is_noise, small_model, small_models, with_threads};

fn rows() -> Vec<Vec<u32>> {
    [7, 3, 12, 1, 9]
        .iter()
        .zip(0u32..)
        .map(|(length, i)| (0..*length).map(|t| (i * 13 + t * 5) % 40).collect())
        .collect()
}

/// The mean of -log p of the next token, over `count` tokens.
fn loss(model: &LanguageModel, rows: &[(u64, Vec<u32>)], prompt: Option<&Tensor>, dropout: Option<&Dropout>) -> Tensor {
    let (mut batch, mut labels) = (Packed::new(), Vec::new());
    for (id, ids) in rows {
        batch.push(*id, ids);
        labels.extend(ids.iter().map(|id| (id * 3 + 1) % 40));
    }
    let hidden = model.hidden(&batch, prompt, dropout).unwrap();
    let weights = vec![1.0 / 32.0; labels.len()];
    head_loss(&hidden, &model.head().unwrap(), Some((&labels, 1.0)), &[], &weights).unwrap().loss
}

fn batch() -> Vec<(u64, Vec<u32>)> {
    rows().into_iter().zip(100..).map(|(ids, id)| (id, ids)).collect()
}

fn values(gradients: &Gradients) -> Vec<Vec<f32>> {
    gradients.values().map(flat).collect()
}

#[test]
fn every_parameter_gets_a_finite_gradient_that_is_not_zero() {
    let model = small_model(0.1).trainable().unwrap();
    let dropout = Dropout { seed: 1, update: 0, purpose: purpose::DROPOUT };
    let gradients = gradients(&loss(&model, &batch(), None, Some(&dropout)), &model.parameters()).unwrap();
    assert!(gradients.keys().eq(model.parameters().keys()));
    for (name, gradient) in &gradients {
        let gradient = flat(gradient);
        assert!(gradient.iter().all(|g| g.is_finite()) && gradient.iter().any(|g| *g != 0.0), "{name}");
    }
}

#[test]
fn parameters_that_a_loss_does_not_depend_on_are_named() {
    let model = small_model(0.0).trainable().unwrap();
    let hidden = (model.embedding().unwrap() * 2.0).unwrap();
    let loss = head_loss(&hidden, &model.head().unwrap(), Some((&[1; 40], 1.0)), &[], &[1.0; 40]).unwrap().loss;
    let error = gradients(&loss, &model.parameters()).unwrap_err().to_string();
    assert!(error.contains("`transformer.wpe.weight`, `transformer.h.0.ln_1.weight`"), "{error}");
    assert!(!error.contains("wte"), "{error}");
}

#[test]
fn backward_without_a_collector_is_an_error_not_a_lost_gradient() {
    let model = small_model(0.0).trainable().unwrap();
    let error = loss(&model, &batch(), None, None).backward().unwrap_err().to_string();
    assert!(error.contains("lm::gradients"), "{error}");
}

#[test]
fn gradients_have_the_same_bits_with_any_number_of_threads() {
    let model = small_model(0.1).trainable().unwrap();
    let dropout = Dropout { seed: 1, update: 0, purpose: purpose::DROPOUT };
    // Long enough for several blocks of rows.
    let batch: Vec<(u64, Vec<u32>)> =
        (0..12).map(|i| (i, (0..30).map(|t| (i as u32 * 7 + t) % 40).collect())).collect();
    let run = || values(&gradients(&loss(&model, &batch, None, Some(&dropout)), &model.parameters()).unwrap());
    let one = with_threads(1, run);
    for threads in [2, 3] {
        assert!(one == with_threads(threads, run), "{threads} threads");
    }
}

#[test]
fn dropout_does_not_change_with_the_split_of_a_batch() {
    let model = small_model(0.3).trainable().unwrap();
    let dropout = Dropout { seed: 4, update: 7, purpose: purpose::DROPOUT };
    let of = |rows: &[(u64, Vec<u32>)], dropout: Option<&Dropout>| {
        values(&gradients(&loss(&model, rows, None, dropout), &model.parameters()).unwrap())
    };
    let whole = of(&batch(), Some(&dropout));
    for size in [1, 2] {
        let mut total = Gradients::new();
        for part in batch().chunks(size) {
            accumulate(&mut total, gradients(&loss(&model, part, None, Some(&dropout)), &model.parameters()).unwrap())
                .unwrap();
        }
        for (part, whole) in values(&total).iter().zip(&whole) {
            assert!(gap(part, whole) < 2e-5);
        }
    }
    assert_ne!(whole, of(&batch(), None));
    assert_ne!(whole, of(&batch(), Some(&Dropout { update: 8, ..dropout })));
    assert_ne!(whole, of(&batch(), Some(&Dropout { purpose: purpose::TEACHER_DROPOUT, ..dropout })));
}

#[test]
fn a_prompt_is_trained_through_a_frozen_model() {
    let model = small_model(0.0);
    let start = model.embedding().unwrap().narrow(0, 5, 3).unwrap().contiguous().unwrap();
    let prompt = Var::from_tensor(&start).unwrap();
    let parameters = [("prompt_embeddings".to_owned(), prompt.as_tensor().clone())].into_iter().collect();
    let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 0.0, ..AdamWOptions::default() });
    let mut losses = Vec::new();
    for _ in 0..30 {
        let loss = loss(&model, &batch(), Some(&prompt), None);
        losses.push(loss.to_scalar::<f32>().unwrap());
        let gradients = gradients(&loss, &parameters).unwrap();
        optimizer.step(&parameters, &gradients, 0.05, 1.0).unwrap();
    }
    assert!(losses[29] < losses[0] - 0.1, "{losses:?}");
    // One element, against the difference of two losses.
    let loss_at = |by: f32| {
        let mut values = flat(&start);
        values[40] += by;
        let prompt = Tensor::from_vec(values, (3, 32), &Device::Cpu).unwrap();
        f64::from(loss(&model, &batch(), Some(&prompt), None).to_scalar::<f32>().unwrap())
    };
    prompt.set(&start).unwrap();
    let gradient = gradients(&loss(&model, &batch(), Some(&prompt), None), &parameters).unwrap();
    let gradient = f64::from(flat(&gradient["prompt_embeddings"])[40]);
    let difference = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2;
    assert!((gradient - difference).abs() < 2e-2 * gradient.abs().max(0.05), "{gradient} {difference}");
}

#[test]
fn wanted_tokens_are_those_of_the_whole_batch() {
    for model in small_models() {
        wanted_tokens_of(&model.trainable().unwrap());
    }
}

fn wanted_tokens_of(model: &LanguageModel) {
    let dropout = Dropout { seed: 3, update: 7, purpose: purpose::DROPOUT };
    let prompt = model.embedding().unwrap().detach().narrow(0, 5, 3).unwrap();
    let prompt = Var::from_tensor(&prompt).unwrap().into_inner();
    let mut whole = Packed::new();
    rows().iter().zip(100..).for_each(|(ids, id)| whole.push(id, ids));
    let wanted = vec![2, 6, 7, 30];
    let part = Packed { wanted: Some(wanted.clone()), ..whole.clone() };
    let indices = Tensor::new(wanted.as_slice(), &Device::Cpu).unwrap();
    for prompt in [None, Some(&prompt)] {
        let whole = model.hidden(&whole, prompt, Some(&dropout)).unwrap().index_select(&indices, 0).unwrap();
        let part = model.hidden(&part, prompt, Some(&dropout)).unwrap();
        assert_eq!(flat(&whole), flat(&part));
        let mut parameters = model.parameters();
        parameters.extend(prompt.map(|prompt| ("prompt".to_owned(), prompt.clone())));
        let [whole, part] = [whole, part].map(|hidden| {
            let loss =
                head_loss(&hidden, &model.head().unwrap(), Some((&[1, 2, 3, 4], 1.0)), &[], &[0.25; 4]).unwrap().loss;
            gradients(&loss, &parameters).unwrap()
        });
        for (name, gradient) in &whole {
            assert!(is_noise(name) || gap(&flat(&part[name]), &flat(gradient)) < 1e-6, "{name}");
        }
    }
}

#[test]
fn a_batch_that_does_not_fit_is_an_error() {
    let model = small_model(0.0);
    let error = |ids: &[u32], prompt: Option<&Tensor>| {
        let mut batch = Packed::new();
        batch.push(8, ids);
        model.hidden(&batch, prompt, None).unwrap_err().to_string()
    };
    let prompt = |width| Tensor::zeros((4, width), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(error(&[1; 33], None).contains("row 9 of `train` has 33 tokens"));
    assert!(error(&[1; 30], Some(&prompt(32))).contains("row 9 of `train` has 34 tokens with the soft prompt"));
    assert!(error(&[1, 40], None).contains("token id 40"));
    assert!(error(&[1], Some(&prompt(8))).contains("soft prompt of width 8 for a model of width 32"));
    let wanted = |ids: &[u32], wanted: &[u32]| {
        let mut batch = Packed { wanted: Some(wanted.to_vec()), ..Packed::new() };
        batch.push(8, ids);
        model.hidden(&batch, None, None).unwrap_err().to_string()
    };
    assert!(wanted(&[1], &[1]).contains("token 1 is wanted of a batch of 1"));
    assert!(wanted(&[1, 2], &[1, 0]).contains("must be in order"));
    let empty = model.hidden(&Packed::new(), None, None).unwrap();
    assert_eq!(empty.dims(), [0, 32]);
}
