//! The least that a case must compute and move, and what the machine can do: the share of the roofline (Williams,
//! Waterman and Patterson, "Roofline: an insightful visual performance model", 2009).
//!
//! Counted are products of matrices (a multiplication and an addition are two operations), once forward and twice backward,
//! with no padding and nothing computed twice; and bytes of weights, gradients, moments, and of cached keys and values,
//! each as often as it must cross the memory bus when nothing of it stays in a cache between passes. Activations are not
//! counted. So the share is that of a bound which nobody reaches.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::task::{Case, Line, Model};

/// A part of the work that is done as a whole before the next one begins.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Phase {
    /// Floating point operations.
    pub(crate) operations: f64,
    /// Bytes moved.
    pub(crate) bytes: f64,
}

/// What a machine can do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Rates {
    /// Floating point operations a second, in a large product of matrices.
    pub(crate) operations: f64,
    /// Bytes read a second, one after the other.
    pub(crate) bytes: f64,
}

impl Rates {
    /// The better of two measurements in each.
    pub(crate) fn best(self, other: Rates) -> Rates {
        Rates { operations: self.operations.max(other.operations), bytes: self.bytes.max(other.bytes) }
    }

    /// The least seconds for the phases, one after the other.
    pub(crate) fn bound(self, phases: &[Phase]) -> f64 {
        phases.iter().map(|phase| (phase.operations / self.operations).max(phase.bytes / self.bytes)).sum()
    }
}

const F32: f64 = 4.0;

impl Model {
    /// Elements of the matrices that every token is multiplied by: 12 C² a block.
    fn blocks(self) -> f64 {
        12.0 * (self.layers * self.width * self.width) as f64
    }

    /// Elements of the output head, which is the embedding too.
    fn head(self) -> f64 {
        (self.vocabulary * self.width) as f64
    }

    /// Operations of the blocks for `tokens` tokens that each see `seen` on average, themselves included.
    fn forward(self, tokens: f64, seen: f64) -> f64 {
        let attention = 4.0 * (self.layers * self.width) as f64 * seen;
        tokens * (2.0 * self.blocks() + attention)
    }

    /// Operations of the head for `tokens` tokens.
    fn logits(self, tokens: f64) -> f64 {
        2.0 * tokens * self.head()
    }

    /// One update: forward, backward, AdamW over weights, gradients and two moments.
    fn training(self, tokens: f64, seen: f64, predicted: f64) -> Vec<Phase> {
        let weights = self.blocks() + self.head();
        let operations = 3.0 * (self.forward(tokens, seen) + self.logits(predicted));
        // Weights are read forward and backward, gradients written once.
        let pass = Phase { operations, bytes: 3.0 * weights * F32 };
        // Weight, gradient and both moments are read; weight and moments written.
        let update = Phase { operations: 0.0, bytes: 7.0 * weights * F32 };
        vec![pass, update]
    }

    /// A forward pass without a backward one.
    fn reading(self, tokens: f64, seen: f64, predicted: f64, size: f64) -> Phase {
        let operations = self.forward(tokens, seen) + self.logits(predicted);
        Phase { operations, bytes: (self.blocks() + self.head()) * size }
    }

    /// Writing `response` tokens after `prompt` in each of `rows` rows. `size` is the bytes of an element.
    fn writing(self, rows: f64, prompt: usize, response: usize, size: f64) -> Vec<Phase> {
        let weights = (self.blocks() + self.head()) * size;
        let kept = 2.0 * (self.layers * self.width) as f64 * size;
        let mut phases = vec![Phase {
            operations: self.forward(rows * prompt as f64, (prompt + 1) as f64 / 2.0) + self.logits(rows),
            bytes: weights,
        }];
        phases.extend((prompt + 1..prompt + response).map(|seen| Phase {
            operations: self.forward(rows, seen as f64) + self.logits(rows),
            bytes: weights + rows * seen as f64 * kept,
        }));
        phases
    }
}

/// What a line must do at least. `size` is the bytes of an element in what is frozen,
/// `tokens_in_all` how many were written, which counts where responses end by themselves.
pub(crate) fn phases(line: &Line, size: f64, tokens_in_all: f64) -> Vec<Phase> {
    let Line { student, teacher, prompt, response, .. } = *line;
    let rows = line.rows as f64;
    let length = (prompt + response - 1) as f64;
    let (tokens, seen, predicted) = (rows * length, (length + 1.0) / 2.0, rows * response as f64);
    let mut phases = Vec::new();
    match line.case {
        Case::Step => phases = student.training(tokens, seen, tokens),
        // Forward, and backward to the activations alone; the adapter is next to nothing.
        Case::Lora => {
            phases = vec![student.reading(tokens, seen, tokens, size), student.reading(tokens, seen, tokens, size)]
        }
        Case::Distill => {
            phases.push(teacher.reading(tokens, seen, predicted, size));
            phases.extend(student.training(tokens, seen, predicted));
        }
        Case::Cached => {
            let operations = teacher.logits(predicted);
            phases.push(Phase { operations, bytes: teacher.head() * size });
            phases.extend(student.training(tokens, seen, predicted));
        }
        Case::Promptkd => {
            let (tokens, seen, predicted, written) = mean_sizes(line, tokens_in_all);
            let reading = |model: Model| model.reading(tokens, seen, predicted, size);
            phases = student.writing(rows, prompt * 3 / 4, written as usize, size);
            // Plain teacher, student, prompted teacher and its backward pass, which is for activations only; the prompted
            // teacher again.
            phases.extend([reading(teacher), reading(student), reading(teacher), reading(teacher), reading(teacher)]);
            phases.extend(student.training(tokens, seen, predicted));
        }
        Case::Generate => phases = student.writing(rows, prompt, response, size),
        Case::Evaluate => {
            let (.., written) = mean_sizes(line, tokens_in_all / SEEDS as f64);
            for _ in 0..SEEDS {
                phases.extend(student.writing(rows, prompt * 3 / 4, written as usize, size));
            }
        }
    }
    phases
}

/// Seeds of an evaluation.
pub(crate) const SEEDS: u64 = 3;

/// Where responses end by themselves, after `tokens` in all: mean tokens fed, tokens seen, tokens predicted of all rows, and tokens a row.
fn mean_sizes(line: &Line, tokens: f64) -> (f64, f64, f64, f64) {
    let rows = line.rows as f64;
    let written = tokens / rows;
    let length = 0.75 * line.prompt as f64 + written - 1.0;
    (rows * length, (length + 1.0) / 2.0, rows * written, written)
}

/// The machine's rates by our product of matrices, and by all threads reading.
pub(crate) fn measure(device: &Device) -> Result<Rates> {
    Ok(Rates { operations: product_rate(device)?, bytes: if device.is_cpu() { read_rate() } else { 0.0 } })
}

fn product_rate(device: &Device) -> Result<f64> {
    let (n, dtype) = if device.is_cpu() { (3072, DType::F32) } else { (8192, DType::BF16) };
    let matrix = Tensor::randn(0.0f32, 1.0, (n, n), device)?.to_dtype(dtype)?;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        device.synchronize()?;
        let start = Instant::now();
        black_box(matrix.matmul(&matrix)?);
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}

fn read_rate() -> f64 {
    const COUNT: usize = 1 << 28;
    const LANES: usize = 64;
    let values = vec![1u32; COUNT];
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        // Integers, since a sum of floats would have to keep its order and wait for each addition.
        let sums = values.par_chunks(1 << 20).map(|part| {
            part.chunks_exact(LANES).fold([0u32; LANES], |mut sums, block| {
                sums.iter_mut().zip(block).for_each(|(sum, value)| *sum = sum.wrapping_add(*value));
                sums
            })
        });
        let total: u32 = sums.map(|lanes| lanes.iter().fold(0u32, |a, b| a.wrapping_add(*b))).sum();
        black_box(total);
        best = best.min(start.elapsed().as_secs_f64());
    }
    (COUNT * size_of::<u32>()) as f64 / best
}
