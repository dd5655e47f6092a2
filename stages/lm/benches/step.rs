//! Milliseconds of a training step and tokens per second of decoding, at the shapes of the embedded pipeline and at
//! those of GPT-2 small. `cargo bench -p lm` prints a table; an argument picks the lines that contain it.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use contract::TokenizerFile;
use lm::loss::head_loss;
use lm::sample::Sampling;
use lm::{
    AdamW, AdamWOptions, Architecture, Dropout, Family, Generate, LanguageModel, Packed, Prompt, generate, gradients,
    norm,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a line of the table runs.
type Line<'a> = &'a dyn Fn(&LanguageModel);

fn main() {
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    for (name, layers, width, heads, vocabulary, repeats) in [
        ("teacher 4x192", 4, 192, 6, 1024, 40),
        ("student 2x32", 2, 32, 2, 1024, 100),
        ("small 12x768", 12, 768, 12, 50257, 3),
    ] {
        let lines: [(&str, Line<'_>); 4] = [
            ("plain train", &|model| train(model, 0.0, repeats)),
            ("dropout train", &|model| train(model, 0.1, repeats)),
            ("gradient of a soft prompt", &|model| tune(model, repeats)),
            ("decode", &|model| decode(model, repeats.min(10))),
        ];
        for (line, run) in lines {
            if format!("{name}: {line}").contains(&wanted) {
                print!("{name}: {line}: ");
                run(&model(layers, width, heads, vocabulary));
            }
        }
    }
}

fn model(layers: usize, width: usize, heads: usize, vocabulary: u32) -> LanguageModel {
    let architecture = Architecture {
        heads: Some(heads),
        positions: Some(512),
        dropout: Some(0.1),
        ..Architecture::new(Family::Gpt2, layers, width)
    };
    let tokenizer = TokenizerFile { json: Arc::new(Vec::new()), end: 0, size: vocabulary };
    LanguageModel::init(&architecture, tokenizer, 0, &Device::Cpu).expect("a model")
}

/// 16 rows of 36 tokens.
fn batch() -> Packed {
    let mut batch = Packed::new();
    for row in 0..16u32 {
        let ids: Vec<u32> = (0..36).map(|t| (row * 97 + t * 31) % 1000).collect();
        batch.push(u64::from(row), &ids);
    }
    batch
}

fn train(model: &LanguageModel, dropout: f32, repeats: usize) {
    let model = model.deep_clone().and_then(LanguageModel::trainable).expect("a trainable model");
    let batch = batch();
    let mut optimizer = AdamW::new(AdamWOptions::default());
    let mut update = 0;
    report(repeats, || {
        let dropout = (dropout > 0.0).then_some(Dropout { seed: 0, update, purpose: 0x100 });
        update += 1;
        let hidden = model.hidden(&batch, None, dropout.as_ref()).expect("hidden states");
        let loss = cross_entropy(&hidden, model.head(), &batch);
        let gradients = gradients(&loss, model.parameters()).expect("gradients");
        drop(loss);
        let scale = (1.0 / norm(&gradients).expect("a norm")).min(1.0);
        optimizer.step(model.parameters(), &gradients, 1e-4, scale).expect("an update");
    });
}

fn tune(model: &LanguageModel, repeats: usize) {
    let prompt = model.embedding().narrow(0, 0, 7).expect("seven vectors").contiguous().expect("a copy");
    let prompt = candle_core::Var::from_tensor(&prompt).expect("a variable");
    let batch = batch();
    report(repeats, || {
        let hidden = model.hidden(&batch, Some(&prompt), None).expect("hidden states");
        let loss = cross_entropy(&hidden, model.head(), &batch);
        let parameters = [("prompt".to_owned(), prompt.as_tensor().clone())].into_iter().collect();
        gradients(&loss, &parameters).expect("gradients");
    });
}

fn cross_entropy(hidden: &Tensor, head: &Tensor, batch: &Packed) -> Tensor {
    let labels: Vec<u32> = batch.ids.iter().map(|id| (id * 7) % 1000).collect();
    let weights = vec![1.0 / labels.len() as f32; labels.len()];
    head_loss(hidden, head, Some((&labels, 1.0)), &[], &weights).expect("a loss").loss
}

fn decode(model: &LanguageModel, repeats: usize) {
    let batch = batch();
    let prompts: Vec<Prompt<'_>> = batch
        .segments
        .iter()
        .zip(&batch.rows)
        .map(|(segment, row)| Prompt { row: *row, ids: &batch.ids[segment.clone()] })
        .collect();
    let options =
        Generate { sampling: Sampling::default(), max_new_tokens: 48, seed: 0, purpose: 2, time: 0, batch: 16 };
    let mut tokens = 0;
    let start = Instant::now();
    for _ in 0..repeats {
        let rows = generate(model, None, &prompts, &options, &mut |_| {}).expect("text");
        tokens += rows.iter().map(|row| row.ids.len()).sum::<usize>();
    }
    println!("{:.0} tokens/s, 16 rows of 36 + 48", tokens as f64 / start.elapsed().as_secs_f64());
}

/// Best and median time of `work`.
fn report(repeats: usize, mut work: impl FnMut()) {
    work();
    let mut times: Vec<f64> = (0..repeats)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{:.2} ms best, {:.2} ms median", times[0], times[times.len() / 2]);
}
