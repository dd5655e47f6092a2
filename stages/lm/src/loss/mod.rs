//! Losses on next-token distributions: cross-entropy and divergences, fused with the output head.
//!
//! A language model's logits are `hidden headᵀ`, `[N, V]` for N tokens, and at real vocabularies the largest thing in
//! training by far. Here they never exist whole: [`head_loss`] takes hidden states and heads, works on a chunk of
//! rows at a time, and has the gradients ready when it returns. Memory grows with N and with V, never with N times V.
//!
//! Which text the rows come from, which rows count and by how much (`weights`), is the caller's: an average over tokens
//! is weights of 1/N, a policy gradient is a cross-entropy whose weights are advantages.

mod agreement;
mod confidence;
#[cfg(feature = "cuda")]
mod cuda;
mod fused;
mod plain;
mod ready;
mod top_k;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

pub use self::agreement::Agreement;
pub use self::confidence::{Confidence, confidences};
use self::ready::attach;
use crate::kernels::head::active;
use crate::kernels::top_k::of_event;
pub use crate::terms::divergence::{Divergence, check_temperature};
pub use crate::terms::top_k::TopK;

/// A model to come close to. No gradient flows into it.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// What it says of the same N tokens.
    pub source: Source<'a>,
    /// How distance is measured.
    pub divergence: Divergence,
    /// Weight in the loss.
    pub coefficient: f64,
    /// Divides both models' logits, above 0.
    pub temperature: f64,
}

/// Where a target's distributions come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// `softmax(hidden headᵀ)`.
    Head {
        /// Its final hidden states, `[N, D]`.
        hidden: &'a Tensor,
        /// Its output head, `[U, D]`, over the first U of the V tokens: where it is fewer, both distributions are of these.
        head: &'a Tensor,
    },
    /// What was kept of them.
    TopK(&'a TopK),
}

/// A loss and its parts.
pub struct HeadLoss {
    /// Sum over rows of `weight × (coefficient × cross-entropy + Σ coefficient × divergence)`, a scalar. Its backward
    /// pass gives exact gradients to `hidden` and `head`, to each where it is a variable or was computed from one.
    pub loss: Tensor,
    /// Sum over rows of `weight × cross-entropy`, without its coefficient; `None` without labels.
    pub cross_entropy: Option<f64>,
    /// Sums over rows of `weight × divergence`, without coefficients, in the order of the targets.
    pub divergences: Vec<f64>,
}

/// Cross-entropy and divergences of the distributions `softmax(hidden headᵀ)`.
///
/// `hidden` is `[N, C]`, `head` `[V, C]`; `labels` are N tokens below V with the coefficient of their cross-entropy;
/// `weights` has one number a row, in which any average is expressed, and rows of weight 0 cost nothing.
///
/// On a CPU in f32 and on a GPU fused kernels do it, with logits of the type of `hidden`; else plain operations do, chunk by
/// chunk, in f32 at least. Either way gradients are computed here and only scaled in the backward pass.
///
/// Errors when shapes do not fit, a label is not below V, a parameter is out of range, or there is neither label nor
/// target.
pub fn head_loss(
    hidden: &Tensor,
    head: &Tensor,
    labels: Option<(&[u32], f64)>,
    targets: &[Target],
    weights: &[f32],
) -> Result<HeadLoss> {
    let request = Request::new(hidden, head, labels, targets, weights)?;
    let answer = request.answer(hidden.track_op(), head.track_op())?;
    let (cross_entropy, divergences) = request.totals(&answer.terms);
    let loss = attach(request.loss(cross_entropy, &divergences), hidden, head, answer)?;
    Ok(HeadLoss { loss, cross_entropy, divergences })
}

/// The same by candle's autograd on whole `[N, V]` logits: what [`head_loss`] is tested against. Memory grows with N
/// times V.
pub fn head_loss_plain(
    hidden: &Tensor,
    head: &Tensor,
    labels: Option<(&[u32], f64)>,
    targets: &[Target],
    weights: &[f32],
) -> Result<HeadLoss> {
    let request = Request::new(hidden, head, labels, targets, weights)?;
    let terms = request.plain_terms()?;
    let weights = Tensor::new(weights, hidden.device())?.to_dtype(terms[0].dtype())?;
    let sums = terms.iter().map(|term| (term * &weights)?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
    let mut loss = Tensor::zeros((), terms[0].dtype(), hidden.device())?;
    for (sum, coefficient) in sums.iter().zip(request.coefficients()) {
        loss = (loss + (sum * coefficient)?)?;
    }
    let values = sums.iter().map(scalar).collect::<Result<Vec<_>>>()?;
    let (cross_entropy, divergences) = request.split(&values);
    Ok(HeadLoss { loss, cross_entropy, divergences })
}

/// Log-probability of each row's label under `softmax(hidden headᵀ)`, `[N]`. Chunked; no gradient.
pub fn log_probs(hidden: &Tensor, head: &Tensor, labels: &[u32]) -> Result<Vec<f32>> {
    let weights = vec![1.0; labels.len()];
    let request = Request::new(hidden, head, Some((labels, 1.0)), &[], &weights)?;
    Ok(request.answer(false, false)?.terms.iter().map(|&value| -value as f32).collect())
}

/// Divergence of every row from each target, without weight and coefficient: one list of N values a target. Chunked;
/// no gradient.
pub fn divergence_values(hidden: &Tensor, head: &Tensor, targets: &[Target]) -> Result<Vec<Vec<f64>>> {
    let weights = vec![1.0; hidden.dim(0)?];
    let request = Request::new(hidden, head, None, targets, &weights)?;
    let terms = request.answer(false, false)?.terms;
    Ok((0..targets.len()).map(|t| terms.iter().skip(t).step_by(targets.len()).copied().collect()).collect())
}

/// Divergence of an event from a target's, where the trainee gives it the probability `exp(log_s)` and the target `exp(log_t)`: that
/// of two distributions over the event and its opposite. Beside it the derivative by `log_s`.
///
/// An event is a coarsening of what tokens are drawn one after the other, so that no f-divergence is larger than over the tokens.
pub fn event_divergence(divergence: Divergence, log_s: f64, log_t: f64) -> (f64, f64) {
    of_event(divergence, log_s, log_t)
}

/// Arguments that fit together.
#[derive(Clone, Copy)]
struct Request<'a> {
    hidden: &'a Tensor,
    head: &'a Tensor,
    labels: Option<(&'a [u32], f64)>,
    targets: &'a [Target<'a>],
    weights: &'a [f32],
}

/// Terms of every row and gradients of the loss.
struct Answer {
    /// `[N, terms]`, as in [`crate::kernels::head::Output::terms`].
    terms: Vec<f64>,
    hidden_gradient: Option<Tensor>,
    head_gradient: Option<Tensor>,
}

impl<'a> Request<'a> {
    fn new(
        hidden: &'a Tensor,
        head: &'a Tensor,
        labels: Option<(&'a [u32], f64)>,
        targets: &'a [Target<'a>],
        weights: &'a [f32],
    ) -> Result<Self> {
        let (rows, width) = hidden.dims2().context("`hidden` of a loss must be [rows, width]")?;
        let (vocabulary, head_width) = head.dims2().context("`head` of a loss must be [vocabulary, width]")?;
        ensure!(width == head_width, "`head` has width {head_width}, expected {width} as in `hidden`");
        ensure!(width > 0 && vocabulary > 0, "`head` is empty: [{vocabulary}, {width}]");
        ensure!(weights.len() == rows, "found {} weights, expected {rows}, one a row", weights.len());
        ensure!(labels.is_some() || !targets.is_empty(), "a loss needs labels or a target, found neither");
        if let Some((labels, _)) = labels {
            ensure!(labels.len() == rows, "found {} labels, expected {rows}, one a row", labels.len());
            if let Some(row) = labels.iter().position(|&label| label as usize >= vocabulary) {
                bail!(
                    "label {} of row {row} is outside of the vocabulary, expected less than {vocabulary}",
                    labels[row]
                );
            }
        }
        for (i, target) in targets.iter().enumerate() {
            target.divergence.validate()?;
            match target.source {
                Source::TopK(kept) => kept.check(rows, vocabulary, &format!("target {i}"))?,
                Source::Head { hidden, head } => {
                    let (found, width) = hidden.dims2().context("`hidden` of a target must be [rows, width]")?;
                    ensure!(found == rows, "target {i} has {found} rows, expected {rows}");
                    let expected = [head.dim(0)?.clamp(1, vocabulary), width];
                    ensure!(
                        head.dims() == expected,
                        "`head` of target {i} has shape {:?}, expected {expected:?}: both models must share a vocabulary",
                        head.dims()
                    );
                }
            }
            check_temperature(target.temperature).with_context(|| format!("temperature of target {i}"))?;
        }
        Ok(Request { hidden, head, labels, targets, weights })
    }

    /// Computes terms and the gradients asked for, by the kernel where there is one.
    fn answer(&self, hidden_gradient: bool, head_gradient: bool) -> Result<Answer> {
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), DType::F32 | DType::BF16) = (self.hidden.device(), self.hidden.dtype())
            && self.targets.iter().all(|target| self.is_over_all(target) && !target.divergence.is_adaptive())
        {
            return self.on_gpu_by_type(device, [hidden_gradient, head_gradient]);
        }
        let fits = |tensor: &Tensor| tensor.dtype() == DType::F32 && matches!(tensor.device(), Device::Cpu);
        let all_fit = |target: &Target| match target.source {
            Source::Head { hidden, head } => fits(hidden) && fits(head),
            Source::TopK(_) => true,
        };
        if fits(self.hidden) && fits(self.head) && self.targets.iter().all(all_fit) {
            self.fused(hidden_gradient, head_gradient)
        } else {
            self.by_chunks(hidden_gradient, head_gradient, plain::rows_per_chunk(self.head.dim(0)?))
        }
    }

    /// Whether a target is over all of the vocabulary, token by token.
    #[cfg(feature = "cuda")]
    fn is_over_all(&self, target: &Target<'_>) -> bool {
        matches!(target.source, Source::Head { head, .. } if head.dims()[0] == self.head.dims()[0])
    }

    /// The rows that count, as devices index them.
    fn active(&self) -> Vec<u32> {
        active(self.weights).map(|row| row as u32).collect()
    }

    /// Of the terms, in their order.
    fn coefficients(&self) -> Vec<f64> {
        self.labels
            .iter()
            .map(|(_, coefficient)| *coefficient)
            .chain(self.targets.iter().map(|t| t.coefficient))
            .collect()
    }

    /// Weighted sums over the rows: of the cross-entropy and of the divergences.
    fn totals(&self, terms: &[f64]) -> (Option<f64>, Vec<f64>) {
        let count = self.coefficients().len();
        let mut sums = vec![0.0; count];
        for (terms, &weight) in terms.chunks(count).zip(self.weights) {
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum += f64::from(weight) * term;
            }
        }
        self.split(&sums)
    }

    fn split(&self, sums: &[f64]) -> (Option<f64>, Vec<f64>) {
        match self.labels {
            Some(_) => (Some(sums[0]), sums[1..].to_vec()),
            None => (None, sums.to_vec()),
        }
    }

    fn loss(&self, cross_entropy: Option<f64>, divergences: &[f64]) -> f64 {
        cross_entropy
            .iter()
            .chain(divergences)
            .zip(self.coefficients())
            .map(|(sum, coefficient)| sum * coefficient)
            .sum()
    }
}

/// The type in which losses are computed.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

#[cfg(test)]
mod tests;
