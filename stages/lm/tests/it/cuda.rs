//! The engine on a GPU against the engine on the CPU. Without a GPU the tests say so and pass.

use candle_core::{Device, Tensor, Var};
use contract::Value;
use contract::random::purpose;
use indexmap::IndexMap;
use lm::loss::{Divergence, Source, Target, divergence_values, head_loss, log_probs};
use lm::sample::Sampling;
use lm::{
    AdamW, AdamWOptions, Biases, Dropout, Dtype, Generate, Gradients, LanguageModel, Lora, Packed, Prompt, accumulate,
    generate, gradients, norm,
};

use crate::{gap, is_noise, small_model, small_models};

/// The first GPU.
fn gpu() -> Option<Device> {
    match lm::device("cuda:0") {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("skipped: no GPU ({error:#})");
            None
        }
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().to_device(&Device::Cpu).unwrap();
    tensor.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The same model elsewhere, frozen.
fn on(device: &Device, model: &LanguageModel) -> LanguageModel {
    let folder = tempfile::tempdir().unwrap();
    model.save(folder.path()).unwrap();
    LanguageModel::load(folder.path(), device).unwrap()
}

/// The small model, with matrices rounded to bf16, so that converting them loses nothing.
fn model() -> LanguageModel {
    rounded(small_model(0.1))
}

/// One of each family, and one with an adapter on all its layers and its head.
fn models() -> Vec<LanguageModel> {
    let adapted = rounded(adapted(&model()));
    small_models().into_iter().map(rounded).chain([adapted]).collect()
}

fn adapted(model: &LanguageModel) -> LanguageModel {
    let targets = Some(["c_attn", "c_proj", "c_fc", "lm_head"].map(str::to_owned).to_vec());
    let lora = Lora { rank: 3, alpha: 6.0, dropout: 0.2, targets, bias: Biases::All, rslora: false };
    let mut adapter = model.with_new_adapter(&lora, 4).unwrap().adapter().unwrap();
    for (name, tensor) in &mut adapter.tensors {
        if name.ends_with("lora_B.weight") {
            let values: Vec<f32> = (0..tensor.elem_count()).map(|i| ((i * 29 % 61) as f32 - 30.0) / 256.0).collect();
            *tensor = Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap();
        }
    }
    model.with_adapter(&adapter).unwrap()
}

fn rounded(model: LanguageModel) -> LanguageModel {
    let model = model.trainable().unwrap();
    for parameter in model.parameters().values() {
        let rounded = parameter.detach().to_dtype(candle_core::DType::BF16).unwrap();
        Var::from_tensor(parameter).unwrap().set(&rounded.to_dtype(candle_core::DType::F32).unwrap()).unwrap();
    }
    model.frozen()
}

fn batch() -> Packed {
    let mut batch = Packed::new();
    for (i, length) in [7u32, 3, 12, 1, 20, 0, 9].into_iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|t| (i as u32 * 13 + t * 5) % 40).collect();
        batch.push(100 + i as u64, &ids);
    }
    batch
}

const DIVERGENCES: [Divergence; 7] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::Jsd { beta: 0.3 },
    Divergence::SkewedForwardKl { alpha: 0.1 },
    Divergence::SkewedReverseKl { alpha: 0.1 },
    Divergence::TotalVariation,
    Divergence::AlphaBeta { alpha: 0.2, beta: 0.7 },
];

/// Loss, parts and gradients of a step that uses everything: dropout, a soft prompt, rows that are not wanted or weigh
/// nothing, cross-entropy and two targets.
fn step(student: &LanguageModel, teacher: &LanguageModel, prompt: &Tensor, update: u32) -> (Vec<f64>, Gradients) {
    let device = student.device();
    let dropout = Dropout { seed: 3, update, purpose: purpose::DROPOUT };
    let wanted: Vec<u32> = (0..52).filter(|token| token % 5 != 2).collect();
    let labels: Vec<u32> = wanted.iter().map(|token| token * 7 % 40).collect();
    let weights: Vec<f32> =
        wanted.iter().map(|token| if token % 4 == 3 { 0.0 } else { 0.02 * (1 + token % 3) as f32 }).collect();
    let batch = Packed { wanted: Some(wanted), ..batch() };
    let plain = teacher.hidden(&batch, None, None).unwrap();
    let prompted = teacher.hidden(&batch, Some(&prompt.detach()), None).unwrap();
    let hidden = student.hidden(&batch, Some(prompt), Some(&dropout)).unwrap();
    assert_eq!(hidden.device().location(), device.location());
    let head = teacher.head().unwrap();
    let target = |hidden, divergence, coefficient, temperature| Target {
        source: Source::Head { hidden, head: &head },
        divergence,
        coefficient,
        temperature,
    };
    let targets =
        [target(&plain, Divergence::ReverseKl, 0.8, 1.0), target(&prompted, Divergence::Jsd { beta: 0.4 }, 0.5, 2.0)];
    let loss = head_loss(&hidden, &student.head().unwrap(), Some((&labels, 0.7)), &targets, &weights).unwrap();
    let mut parameters = student.parameters();
    parameters.extend([("prompt".to_owned(), prompt.clone())]);
    let mut values = vec![f64::from(flat(&loss.loss)[0])];
    values.extend(loss.cross_entropy);
    values.extend(loss.divergences);
    (values, gradients(&loss.loss, &parameters).unwrap())
}

fn prompt(device: &Device) -> Tensor {
    let values: Vec<f32> = (0..4 * 32).map(|i| ((i * 37 % 101) as f32 - 50.0) / 128.0).collect();
    Var::from_vec(values, (4, 32), device).unwrap().into_inner()
}

#[test]
fn cuda_step_in_f32_is_that_of_the_cpu() {
    let Some(device) = gpu() else { return };
    for model in models() {
        step_in_f32(&device, &model);
    }
}

fn step_in_f32(device: &Device, model: &LanguageModel) {
    let [here, there] = [&Device::Cpu, device].map(|device| {
        let model = on(device, model);
        step(&model.deep_clone().unwrap().trainable().unwrap(), &model, &prompt(device), 5)
    });
    for (found, expected) in there.0.iter().zip(&here.0) {
        assert!((found - expected).abs() < 1e-5 * expected.abs().max(0.1), "{found}, expected {expected}");
    }
    assert_eq!(there.1.len(), here.1.len());
    for (name, expected) in &here.1 {
        let gap = gap(&flat(&there.1[name]), &flat(expected));
        assert!(gap < 2e-5 || is_noise(name), "{name}: {gap}");
    }
    assert!((norm(&there.1).unwrap() / norm(&here.1).unwrap() - 1.0).abs() < 1e-5);
}

#[test]
fn cuda_step_in_bf16_is_near_that_of_the_cpu() {
    let Some(device) = gpu() else { return };
    for model in models() {
        step_in_bf16(&device, &model);
    }
}

fn step_in_bf16(device: &Device, model: &LanguageModel) {
    let here = step(&model.deep_clone().unwrap().trainable().unwrap(), model, &prompt(&Device::Cpu), 5);
    let model = on(device, model);
    let student = model.deep_clone().unwrap().trainable().unwrap().computed_in(Dtype::Bf16).unwrap();
    let teacher = model.computed_in(Dtype::Bf16).unwrap();
    let there = step(&student, &teacher, &prompt(device), 5);
    for (found, expected) in there.0.iter().zip(&here.0) {
        assert!((found - expected).abs() < 0.02 * expected.abs().max(0.1), "{found}, expected {expected}");
    }
    for (name, expected) in &here.1 {
        assert_eq!(there.1[name].dtype(), candle_core::DType::F32, "{name}");
        let gap = gap(&flat(&there.1[name]), &flat(expected));
        assert!(gap < 0.06 || is_noise(name), "{name}: {gap}");
    }
}

#[test]
fn cuda_step_gives_the_same_bits_twice() {
    let Some(device) = gpu() else { return };
    let model = on(&device, &model());
    let [one, two] = [(); 2].map(|()| {
        let student = model.deep_clone().unwrap().trainable().unwrap().computed_in(Dtype::Bf16).unwrap();
        let (values, gradients) = step(&student, &model, &prompt(&device), 1);
        (values, gradients.values().map(flat).collect::<Vec<_>>())
    });
    assert!(one == two);
}

#[test]
fn cuda_losses_of_every_divergence() {
    let Some(device) = gpu() else { return };
    let numbers = |seed: u32, count: usize, scale: f32| -> Vec<f32> {
        (0..count as u32).map(|i| ((i * 131 + seed * 977) % 257) as f32 / 128.0 * scale - scale).collect()
    };
    for (rows, vocabulary) in [(1, 3), (9, 77), (5, 1030)] {
        let labels: Vec<u32> = (0..rows as u32).map(|row| row * 5 % vocabulary as u32).collect();
        let weights: Vec<f32> = (0..rows).map(|row| 0.1 + row as f32).collect();
        for (divergence, temperature) in DIVERGENCES.into_iter().zip([1.0, 0.7, 2.0].into_iter().cycle()) {
            let [here, there] = [&Device::Cpu, &device].map(|device| {
                let tensor = |seed, rows, width, scale| {
                    Tensor::from_vec(numbers(seed, rows * width, scale), (rows, width), device).unwrap()
                };
                let hidden = Var::from_tensor(&tensor(1, rows, 24, 1.0)).unwrap().into_inner();
                let head = Var::from_tensor(&tensor(2, vocabulary, 24, 0.7)).unwrap().into_inner();
                let (other, other_head) = (tensor(3, rows, 16, 1.0), tensor(4, vocabulary, 16, 0.9));
                let source = Source::Head { hidden: &other, head: &other_head };
                let target = Target { source, divergence, coefficient: 1.3, temperature };
                let loss = head_loss(&hidden, &head, Some((&labels, 0.6)), &[target], &weights).unwrap();
                let parameters: IndexMap<_, _> =
                    [("hidden".to_owned(), hidden.clone()), ("head".to_owned(), head.clone())].into();
                let gradients = gradients(&loss.loss, &parameters).unwrap();
                let values = divergence_values(&hidden, &head, &[target]).unwrap().remove(0);
                let log_probs = log_probs(&hidden, &head, &labels).unwrap();
                let parts = [loss.cross_entropy.unwrap(), loss.divergences[0], f64::from(flat(&loss.loss)[0])];
                let parts: Vec<f32> = parts.into_iter().chain(values).map(|x| x as f32).chain(log_probs).collect();
                (parts, flat(&gradients["hidden"]), flat(&gradients["head"]))
            });
            let gaps = [gap(&there.0, &here.0), gap(&there.1, &here.1), gap(&there.2, &here.2)];
            assert!(gaps.iter().all(|gap| *gap < 2e-5), "{divergence:?} over {rows} of {vocabulary}: {gaps:?}");
        }
    }
}

#[test]
fn cuda_training_follows_that_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let [here, there] = [Device::Cpu, device].map(|device| {
        let teacher = on(&device, &model());
        let student = teacher.deep_clone().unwrap().trainable().unwrap();
        let prompt = prompt(&device);
        let mut parameters = student.parameters();
        parameters.extend([("prompt".to_owned(), prompt.clone())]);
        // With such an eps an update is smooth in the gradient also where that is nothing but rounding.
        let options = AdamWOptions { eps: 1e-3, ..AdamWOptions::default() };
        let mut optimizer = AdamW::new(options);
        for update in 0..4 {
            let mut sum = Gradients::default();
            for part in 0..2 {
                accumulate(&mut sum, step(&student, &teacher, &prompt, 2 * update + part).1).unwrap();
            }
            if update == 2 {
                optimizer = AdamW::from_state(options, &optimizer.to_state().unwrap()).unwrap();
            }
            optimizer.step(&parameters, &sum, 1e-3, 0.5).unwrap();
        }
        parameters.into_iter().map(|(name, parameter)| (name, flat(&parameter))).collect::<IndexMap<_, _>>()
    });
    for (name, expected) in &here {
        for (found, expected) in there[name].iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{name}: {found}, expected {expected}");
        }
    }
}

fn prompts() -> Vec<Vec<u32>> {
    [3usize, 1, 9, 2, 14, 5, 1, 20]
        .iter()
        .enumerate()
        .map(|(row, length)| (0..*length).map(|t| 1 + (row * 11 + t * 7) as u32 % 39).collect())
        .collect()
}

#[test]
fn cuda_writes_what_the_cpu_writes() {
    let Some(device) = gpu() else { return };
    for model in models() {
        writes_the_same(&device, &model);
    }
}

fn writes_the_same(device: &Device, model: &LanguageModel) {
    let plain = Sampling::default();
    let all = [
        Sampling::greedy(),
        plain.clone(),
        Sampling { temperature: 0.7, top_k: 7, ..plain.clone() },
        Sampling { top_p: 0.8, repetition_penalty: 1.3, ..plain.clone() },
        Sampling { no_repeat_ngram: 2, temperature: 0.0, ..plain },
    ];
    let prompts = prompts();
    let prompts: Vec<Prompt<'_>> =
        prompts.iter().zip(7u64..).map(|(ids, row)| Prompt { row: row << 33 | row, ids }).collect();
    let models = [&Device::Cpu, device].map(|device| on(device, model));
    let soft = models.each_ref().map(|model| prompt(model.device()).detach());
    for (index, sampling) in all.into_iter().enumerate() {
        for (batch, prompted) in [(8, false), (3, true)] {
            let options = Generate {
                sampling: sampling.clone(),
                max_new_tokens: 21,
                longest: usize::MAX,
                seed: 5 + index as u64,
                purpose: purpose::GENERATE,
                time: 2,
                batch,
            };
            let [here, there] = [0, 1].map(|i| {
                let soft = prompted.then_some(&soft[i]);
                let mut done = 0;
                let rows = generate(&models[i], soft, &prompts, &options, &mut |count| done = count).unwrap();
                assert_eq!(done, prompts.len());
                rows
            });
            for (row, (found, expected)) in there.iter().zip(&here).enumerate() {
                assert_eq!((&found.ids, found.end), (&expected.ids, expected.end), "{sampling:?}, row {row}");
                assert!(gap(&found.log_probs, &expected.log_probs) < 1e-4, "{sampling:?}, row {row}");
            }
        }
    }
}

#[test]
fn cuda_writes_in_bf16() {
    let Some(device) = gpu() else { return };
    let prompts = prompts();
    let prompts: Vec<Prompt<'_>> = prompts.iter().zip(7u64..).map(|(ids, row)| Prompt { row, ids }).collect();
    let options = Generate {
        sampling: Sampling::greedy(),
        max_new_tokens: 12,
        longest: usize::MAX,
        seed: 5,
        purpose: purpose::GENERATE,
        time: 2,
        batch: 4,
    };
    let here = generate(&model(), None, &prompts, &options, &mut |_| ()).unwrap();
    let there = on(&device, &model()).computed_in(Dtype::Bf16).unwrap();
    let there = generate(&there, None, &prompts, &options, &mut |_| ()).unwrap();
    // The first token sees the same text on both; later ones follow from it.
    let near = there.iter().zip(&here).filter(|(found, expected)| {
        found.ids[0] == expected.ids[0] && (found.log_probs[0] - expected.log_probs[0]).abs() < 0.1
    });
    assert!(near.count() >= 7, "{there:?}, expected {here:?}");
}
