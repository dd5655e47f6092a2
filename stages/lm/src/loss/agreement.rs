//! How far two models agree on the next token, beside how far apart they are: what on-policy distillation is watched by.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::host::elements;
use crate::kernels::by_row;
use crate::kernels::elementary::{Normaliser, exp};
use crate::kernels::head::rows_per_chunk;
use crate::kernels::top_k::best;

/// Sums over rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// The share of the k likeliest tokens of one that are among those of the other.
    pub overlap: f64,
    /// Probability that the trainee gives to the k likeliest tokens of the target.
    pub mass: f64,
    /// Probability that the target gives to the k likeliest tokens of the trainee.
    pub target_mass: f64,
    /// Entropy of the trainee's distribution, in nats.
    pub entropy: f64,
    /// Entropy of the target's.
    pub target_entropy: f64,
}

impl Agreement {
    /// Of `softmax(hidden headᵀ)` and `softmax(target_hidden target_headᵀ)`, whose heads are `[V, C]` and `[U, D]`, over the first
    /// U tokens where it is fewer. Chunked; no gradient.
    ///
    /// Errors when shapes do not fit, or `k` is not within 1 to U.
    pub fn of([hidden, head]: [&Tensor; 2], [target_hidden, target_head]: [&Tensor; 2], k: usize) -> Result<Self> {
        let rows = hidden.dims2().context("`hidden` of a model must be [rows, width]")?.0;
        let compared = target_head.dim(0)?.min(head.dim(0)?);
        ensure!(target_hidden.dim(0)? == rows, "the target has {} rows, expected {rows}", target_hidden.dim(0)?);
        ensure!(k > 0 && k <= compared, "`k` is {k}, expected 1 to {compared}, the size of the vocabulary");
        let narrow =
            |head: &Tensor| -> Result<Tensor> { Ok(head.detach().narrow(0, 0, compared)?.to_dtype(DType::F32)?) };
        let heads = [narrow(head)?, narrow(target_head)?];
        let mut total = Agreement::default();
        let chunk = rows_per_chunk(compared);
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            let logits = |hidden: &Tensor, head: &Tensor| -> Result<Vec<f32>> {
                let hidden = hidden.detach().narrow(0, start, count)?.to_dtype(DType::F32)?;
                if !hidden.device().is_cpu() {
                    return Ok(hidden.matmul(&head.t()?)?.flatten_all()?.to_vec1()?);
                }
                let (hidden, head) = (hidden.contiguous()?, head.contiguous()?);
                Ok(by_row::product_transposed(&elements(&hidden)?, &elements(&head)?, hidden.dim(1)?))
            };
            let (own, other) = (logits(hidden, &heads[0])?, logits(target_hidden, &heads[1])?);
            let each =
                own.par_chunks(compared).zip(other.par_chunks(compared)).map(|(own, other)| of_row(own, other, k));
            // In order: the same bits with any number of threads.
            for row in each.collect::<Vec<_>>() {
                total.overlap += row.overlap;
                total.mass += row.mass;
                total.target_mass += row.target_mass;
                total.entropy += row.entropy;
                total.target_entropy += row.target_entropy;
            }
        }
        Ok(total)
    }
}

fn of_row(own: &[f32], other: &[f32], k: usize) -> Agreement {
    let (own_all, other_all) = (Normaliser::of(own, 1.0), Normaliser::of(other, 1.0));
    let (own_best, other_best) = (best(own, k), best(other, k));
    let shared = own_best.iter().filter(|token| other_best.contains(token)).count();
    let mass = |all: Normaliser, logits: &[f32], tokens: &[u32]| -> f64 {
        tokens.iter().map(|token| f64::from(exp(all.log_probability(logits[*token as usize])))).sum()
    };
    let entropy = |all: Normaliser, logits: &[f32]| -> f64 {
        let term = |logit: &f32| {
            let log = all.log_probability(*logit);
            -f64::from(exp(log) * log)
        };
        logits.iter().map(term).sum()
    };
    Agreement {
        overlap: shared as f64 / k as f64,
        mass: mass(own_all, own, &other_best),
        target_mass: mass(other_all, other, &own_best),
        entropy: entropy(own_all, own),
        target_entropy: entropy(other_all, other),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn agreement_is_what_the_definitions_say() {
        let identity = Tensor::eye(4, DType::F32, &Device::Cpu).unwrap();
        let log = |p: [f32; 4]| Tensor::new(&[p.map(f32::ln)], &Device::Cpu).unwrap();
        let (own, other) = (log([0.4, 0.3, 0.2, 0.1]), log([0.1, 0.5, 0.05, 0.35]));
        let found = Agreement::of([&own, &identity], [&other, &identity], 2).unwrap();
        let near = |found: f64, right: f64| assert!((found - right).abs() < 1e-6, "{found}, expected {right}");
        near(found.overlap, 0.5);
        near(found.mass, 0.3 + 0.1);
        near(found.target_mass, 0.1 + 0.5);
        let entropy = |p: [f64; 4]| -> f64 { p.iter().map(|p| -p * p.ln()).sum() };
        near(found.entropy, entropy([0.4, 0.3, 0.2, 0.1]));
        near(found.target_entropy, entropy([0.1, 0.5, 0.05, 0.35]));
        let same = Agreement::of([&own, &identity], [&own, &identity], 4).unwrap();
        near(same.overlap, 1.0);
        near(same.mass, 1.0);
        assert!(Agreement::of([&own, &identity], [&other, &identity], 5).is_err());
    }
}
