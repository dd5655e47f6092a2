//! Writing, against whole forward passes.

use std::path::Path;

use candle_core::{Device, Tensor};
use contract::End;
use contract::random::purpose;
use lm::loss::log_probs;
use lm::sample::Sampling;
use lm::{Generate, Generated, LanguageModel, Packed, Prompt, generate};

use crate::{gap, small_llama, small_model, small_models, with_threads};

fn prompts() -> Vec<(u64, Vec<u32>)> {
    (0..9u32)
        .map(|i| (u64::from(i * i + 3), (0..1 + (i * 5) % 8).map(|t| 1 + (i * 7 + t * 3) % 39).collect()))
        .collect()
}

fn options(batch: usize) -> Generate {
    let (longest, purpose) = (usize::MAX, purpose::GENERATE);
    Generate { sampling: Sampling::default(), max_new_tokens: 12, longest, seed: 9, purpose, time: 2, batch }
}

fn write(model: &LanguageModel, soft_prompt: Option<&Tensor>, options: &Generate) -> Vec<Generated> {
    let prompts = prompts();
    let prompts: Vec<Prompt<'_>> = prompts.iter().map(|(row, ids)| Prompt { row: *row, ids }).collect();
    generate(model, soft_prompt, &prompts, options, &mut |_| {}).unwrap()
}

fn soft_prompt(model: &LanguageModel) -> Tensor {
    let width = model.width();
    let values: Vec<f32> = (0..3 * width).map(|i| (i as f32 * 0.7).sin()).collect();
    Tensor::from_vec(values, (3, width), &Device::Cpu).unwrap()
}

/// Small ones of every family, and one whose vectors of tokens are narrower than what is between them and the head.
fn models() -> Vec<LanguageModel> {
    let narrow = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity/families/opt-350m");
    small_models().into_iter().chain([LanguageModel::load(&narrow, &Device::Cpu).unwrap()]).collect()
}

#[test]
fn a_rows_text_does_not_depend_on_its_company_or_on_threads() {
    let model = small_model(0.0);
    let alone = write(&model, None, &options(1));
    assert!(alone.iter().any(|g| g.end == End::Stop) && alone.iter().any(|g| g.end == End::Length));
    for batch in [2, 5, 16] {
        for threads in [1, 2, 3] {
            assert!(
                alone == with_threads(threads, || write(&model, None, &options(batch))),
                "{batch} rows, {threads} threads"
            );
        }
    }
    let prompts = prompts();
    let last = [Prompt { row: prompts[8].0, ids: &prompts[8].1 }];
    assert_eq!(generate(&model, None, &last, &options(4), &mut |_| {}).unwrap()[0], alone[8]);
    assert_ne!(alone, write(&model, None, &Generate { seed: 10, ..options(4) }));
    assert_ne!(alone, write(&model, None, &Generate { time: 3, ..options(4) }));
    assert_ne!(alone, write(&model, None, &Generate { purpose: purpose::EVALUATE, ..options(4) }));
}

#[test]
fn log_probabilities_are_those_of_a_whole_forward_pass() {
    for model in models() {
        log_probabilities_are_whole(&model);
    }
}

fn log_probabilities_are_whole(model: &LanguageModel) {
    let soft = soft_prompt(model);
    for soft_prompt in [None, Some(&soft)] {
        for sampling in [Sampling::default(), Sampling { temperature: 0.7, top_k: 9, ..Sampling::default() }] {
            let texts = write(model, soft_prompt, &Generate { sampling, ..options(4) });
            for (text, (row, prompt)) in texts.iter().zip(prompts()) {
                let all = [prompt.as_slice(), &text.ids].concat();
                let mut batch = Packed::new();
                batch.push(row, &all[..all.len() - 1]);
                let hidden = model.hidden(&batch, soft_prompt, None).unwrap();
                let hidden = hidden.narrow(0, prompt.len() - 1, text.ids.len()).unwrap();
                let expected = log_probs(&hidden, &model.head().unwrap(), &text.ids).unwrap();
                assert!(gap(&text.log_probs, &expected) < 1e-5, "{:?} {expected:?}", text.log_probs);
            }
        }
    }
}

#[test]
fn a_llamas_rows_do_not_depend_on_their_company_or_on_threads() {
    let model = small_llama();
    let alone = write(&model, None, &options(1));
    assert!(alone.iter().any(|g| g.ids != alone[0].ids));
    for (batch, threads) in [(1, 3), (2, 1), (5, 2), (16, 3)] {
        let together = with_threads(threads, || write(&model, None, &options(batch)));
        assert!(alone == together, "{batch} rows, {threads} threads");
    }
}

#[test]
fn a_soft_prompt_changes_the_text_and_shifts_its_positions() {
    for model in models() {
        a_soft_prompt_is_text(&model);
    }
}

fn a_soft_prompt_is_text(model: &LanguageModel) {
    let greedy = Generate { sampling: Sampling::greedy(), ..options(4) };
    assert_ne!(write(model, None, &greedy), write(model, Some(&soft_prompt(model)), &greedy));
    // The vectors of tokens as a soft prompt are those tokens.
    let ids = Tensor::new(&[7u32, 8, 9], &Device::Cpu).unwrap();
    let vectors = model.embedding().unwrap().index_select(&ids, 0).unwrap();
    let short = [Prompt { row: 1, ids: &[10, 11] }];
    let long = [Prompt { row: 1, ids: &[7, 8, 9, 10, 11] }];
    let mut no_progress = |_| {};
    let soft = generate(model, Some(&vectors), &short, &options(1), &mut no_progress).unwrap();
    assert_eq!(soft, generate(model, None, &long, &options(1), &mut no_progress).unwrap());
}

#[test]
fn limits_end_a_row() {
    let model = small_model(0.0);
    let prompt: Vec<u32> = (1..=30).collect();
    let none = Generate { max_new_tokens: 0, ..options(2) };
    let mut seen = Vec::new();
    let prompts = [Prompt { row: 1, ids: &prompt }, Prompt { row: 2, ids: &prompt[..3] }];
    let texts = generate(&model, None, &prompts, &none, &mut |done| seen.push(done)).unwrap();
    assert!(texts.iter().all(|text| text.ids.is_empty() && text.end == End::Length));
    assert_eq!(seen, [1, 2]);

    // 32 positions leave room for two tokens.
    let texts = generate(&model, None, &prompts[..1], &options(2), &mut |_| {}).unwrap();
    assert!(texts[0].ids.len() <= 2);
    assert!(texts[0].end == End::Stop || texts[0].ids.len() == 2);

    let ids: Vec<u32> = vec![1; 33];
    let error = |ids: &[u32]| {
        let prompts = [Prompt { row: 5, ids }];
        generate(&model, None, &prompts, &options(2), &mut |_| {}).unwrap_err().to_string()
    };
    assert!(error(&ids).contains("row 6 of `train` has 33 tokens: the model has 32 positions"));
    assert!(error(&[]).contains("row 6 of `train` has an empty prompt"));
    assert!(error(&[40]).contains("token id 40, not in the model's vocabulary of 40"));
}
