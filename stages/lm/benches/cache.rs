//! What a teacher cache gains in word-level KD, and how much of what it could:
//!
//!     cargo bench --profile dev --workspace --bench cache
//!
//! Per shape: milliseconds of an update of the student with the teacher running and with its cache, the least of several;
//! the gain; the gain that floating-point operations allow; the share of it that is reached; milliseconds that reading
//! the cache takes. A part of the name picks lines.
//!
//! Operations are counted by token: a model's forward pass takes 2 N and a training step 6 N, with N the parameters of
//! its blocks and its head, without embeddings; a cached teacher takes those of its head, 2 V d. So the gain may be
//! `(2 N_T + 6 N_S) / (2 V d_T + 6 N_S)`.

use std::time::Instant;

use candle_core::{Device, Tensor};
use contract::TokenizerFile;
use lm::loss::{Divergence, Source, Target, TopK, head_loss};
use lm::{
    AdamW, AdamWOptions, Architecture, Family, Keep, LanguageModel, Packed, Prompts, Response, Said, Storage,
    TeacherCache, TeacherCacheWriter, gradients, norm,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const VOCABULARY: usize = 8192;
const ROWS: usize = 8;
const LENGTH: usize = 256;

fn main() -> anyhow::Result<()> {
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let titles = ["teacher ms", "cached ms", "gain", "allowed", "share", "reading ms"];
    println!("{:>16} {}", "", titles.map(|title| format!("{title:>10}")).join(" "));
    for (layers, width, heads) in [(8, 512, 8), (12, 768, 12)] {
        let teacher = model(layers, width, heads)?;
        let student = model(4, 256, 4)?.trainable()?;
        for keep in [Keep::Hidden, Keep::TopK(64)] {
            let name = format!("{layers} x {width} {}", if keep == Keep::Hidden { "hidden" } else { "top 64" });
            if name.contains(&wanted) {
                line(&name, &teacher, &student, keep)?;
            }
        }
    }
    Ok(())
}

fn line(name: &str, teacher: &LanguageModel, student: &LanguageModel, keep: Keep) -> anyhow::Result<()> {
    let texts: Vec<Vec<u32>> = (0..ROWS as u32).map(text).collect();
    let mut batch = Packed::new();
    texts.iter().zip(0..).for_each(|(ids, row)| batch.push(row, ids));
    let responses: Vec<Response<'_>> =
        texts.iter().zip(0..).map(|(ids, row)| Response { row, prompt: &[], tokens: ids }).collect();
    let scratch = tempfile::tempdir()?;
    let cache = cache(teacher, &batch, &responses, keep, scratch.path())?;
    let read = || cache.read(&responses, Prompts::Same, &Device::Cpu);

    let mut optimizer = AdamW::new(AdamWOptions::default());
    let mut update = |said: Said| -> anyhow::Result<()> {
        let source = match &said {
            Said::Hidden(hidden) => Source::Head { hidden, head: &teacher.head()? },
            Said::TopK(kept) => Source::TopK(kept),
        };
        let target = Target { source, divergence: Divergence::ForwardKl, coefficient: 1.0, temperature: 1.0 };
        let hidden = student.hidden(&batch, None, None)?;
        let weights = vec![1.0 / (ROWS * LENGTH) as f32; ROWS * LENGTH];
        let loss = head_loss(&hidden, &student.head()?, None, &[target], &weights)?;
        let gradients = gradients(&loss.loss, &student.parameters())?;
        drop(loss);
        let scale = (1.0 / norm(&gradients)?).min(1.0);
        optimizer.step(&student.parameters(), &gradients, 1e-5, scale)
    };
    let (mut plain, mut cached, mut reading) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    for _ in 0..6 {
        plain = plain.min(time(|| update(Said::Hidden(teacher.hidden(&batch, None, None)?)))?);
        cached = cached.min(time(|| update(read()?))?);
        reading = reading.min(time(|| read().map(drop))?);
    }
    let (of_teacher, of_student) = (2.0 * parameters(teacher), 6.0 * parameters(student));
    let of_head = if keep == Keep::Hidden { (2 * VOCABULARY * teacher.width()) as f64 } else { 0.0 };
    let (gain, allowed) = (plain / cached, (of_teacher + of_student) / (of_head + of_student));
    println!(
        "{name:>16} {plain:>10.1} {cached:>10.1} {gain:>10.2} {allowed:>10.2} {:>9.0}% {reading:>10.2}",
        100.0 * gain / allowed
    );
    Ok(())
}

/// Of the blocks and the head.
fn parameters(model: &LanguageModel) -> f64 {
    let all: usize = model.parameters().values().map(Tensor::elem_count).sum();
    let positions = model.config.positions() * model.width();
    (all - positions) as f64
}

fn cache(
    teacher: &LanguageModel,
    batch: &Packed,
    responses: &[Response<'_>],
    keep: Keep,
    scratch: &std::path::Path,
) -> anyhow::Result<TeacherCache> {
    let mut writer = TeacherCacheWriter::new(scratch, teacher, keep, Storage::F32, 1.0, responses)?;
    let hidden = teacher.hidden(batch, None, None)?;
    let said = match keep {
        Keep::Hidden => Said::Hidden(hidden),
        Keep::TopK(k) => Said::TopK(TopK::of(&hidden, &teacher.head()?, k, 1.0)?),
    };
    writer.push(responses.len(), &said)?;
    writer.finish()
}

fn text(row: u32) -> Vec<u32> {
    (0..LENGTH as u32).map(|t| (row * 977 + t * 31) % VOCABULARY as u32).collect()
}

fn model(layers: usize, width: usize, heads: usize) -> anyhow::Result<LanguageModel> {
    let shape =
        Architecture { heads: Some(heads), positions: Some(LENGTH), ..Architecture::new(Family::Gpt2, layers, width) };
    let tokenizer = TokenizerFile::new("", 0, VOCABULARY as u32);
    LanguageModel::init(&shape, tokenizer, 0, &Device::Cpu)
}

/// Milliseconds.
fn time(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}
