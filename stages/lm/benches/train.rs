//! Milliseconds of one update, its share of matrix products, and the memory of the process: at shapes where a
//! comparison with other programs means something. `train SHAPE LENGTH [REPEATS]`.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use contract::TokenizerFile;
use lm::loss::head_loss;
use lm::{AdamW, AdamWOptions, Architecture, Family, LanguageModel, Packed, gradients, norm};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let length: usize = arguments.get(1).map_or(256, |a| a.parse().unwrap());
    let repeats: usize = arguments.get(2).map_or(5, |a| a.parse().unwrap());
    let (layers, width, heads, vocabulary) = match arguments.first().map_or("tiny", |a| a) {
        "small" => (12, 768, 12, 50257),
        _ => (4, 256, 4, 8192),
    };
    let architecture = Architecture {
        heads: Some(heads),
        positions: Some(1024),
        dropout: Some(0.0),
        ..Architecture::new(Family::Gpt2, layers, width)
    };
    let tokenizer = TokenizerFile { json: Arc::new(Vec::new()), end: 0, size: vocabulary };
    let model = LanguageModel::init(&architecture, tokenizer, 0, &Device::Cpu).unwrap().trainable().unwrap();
    let mut batch = Packed::new();
    for row in 0..8u32 {
        let ids: Vec<u32> = (0..length as u32).map(|t| (row * 977 + t * 3131) % vocabulary).collect();
        batch.push(u64::from(row), &ids);
    }
    let labels: Vec<u32> = batch.ids.iter().map(|id| (id * 7) % vocabulary).collect();
    let weights = vec![1.0 / labels.len() as f32; labels.len()];
    let mut optimizer = AdamW::new(AdamWOptions::default());
    let mut times = Vec::new();
    let mut parts = [0.0f64; 5];
    for i in 0..=repeats {
        let mut marks = [Instant::now(); 6];
        let hidden: Tensor = model.hidden(&batch, None, None).unwrap();
        marks[1] = Instant::now();
        let loss = head_loss(&hidden, model.head(), Some((&labels, 1.0)), &[], &weights).unwrap().loss;
        marks[2] = Instant::now();
        let gradients = gradients(&loss, model.parameters()).unwrap();
        drop((loss, hidden));
        marks[3] = Instant::now();
        let scale = (1.0 / norm(&gradients).unwrap()).min(1.0);
        marks[4] = Instant::now();
        optimizer.step(model.parameters(), &gradients, 1e-4, scale).unwrap();
        drop(gradients);
        marks[5] = Instant::now();
        if i > 0 {
            times.push((marks[5] - marks[0]).as_secs_f64());
            (0..5).for_each(|p| parts[p] += (marks[p + 1] - marks[p]).as_secs_f64() * 1e3 / repeats as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let (l, c, v, t) = (layers as f64, width as f64, f64::from(vocabulary), batch.ids.len() as f64);
    let flops = 6.0 * t * (12.0 * l * c * c + v * c) + 6.0 * l * t * (length as f64 + 1.0) * c;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("?").trim();
    println!(
        "{layers}x{width} 8x{length}: best {:.1} median {:.1} ms {:.1} GFLOP/s HWM {peak}; forward {:.1} head {:.1} backward {:.1} norm {:.1} adamw {:.1}",
        times[0] * 1e3,
        median * 1e3,
        flops / median / 1e9,
        parts[0],
        parts[1],
        parts[2],
        parts[3],
        parts[4]
    );
}
