//! Losses on next-token distributions: cross-entropy and divergences, fused with the output head.
//!
//! A language model's logits are `hidden headᵀ`, `[N, V]` for N tokens, and at real vocabularies the largest thing in
//! training by far. Here they never exist whole: [`head_loss`] takes hidden states and heads, works on a chunk of
//! rows at a time, and has the gradients ready when it returns. Memory grows with N and with V, never with N times V.
//!
//! Which text the rows come from, which rows count and by how much (`weights`), is the caller's: an average over tokens
//! is weights of 1/N, a policy gradient is a cross-entropy whose weights are advantages.

use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Shape, Storage, StorageRef, Tensor, Var};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernels::elementary::LOG_FLOOR;
use crate::kernels::head::{Input, InputSource, InputTarget, active, head_terms};
use crate::ops::collect::{Contribution, deliver, is_collecting, is_differentiated};
pub use crate::top_k::TopK;

#[cfg(feature = "cuda")]
mod cuda;

/// How far the trainee's distribution is from a target's.
///
/// With `s` the trainee's and `t` the target's probabilities of the tokens, and the sum over the vocabulary; beside
/// it the derivative by the trainee's logits at temperature 1. At temperature τ both distributions are of
/// `logits / τ`, and the derivative is that of these, divided by τ; no factor τ² is added.
///
/// Logarithms of probabilities are taken as at least -10⁴, so that no token of probability 0 gives an infinity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Divergence {
    /// `KL(t ‖ s) = Σ t (ln t - ln s)`; `s - t`. Spreads over all that the target may say.
    ForwardKl,
    /// `KL(s ‖ t) = Σ s (ln s - ln t)`; `s (ln s - ln t - KL)`. Keeps to what the target says most.
    ReverseKl,
    /// Generalised Jensen-Shannon: `β KL(t ‖ m) + (1 - β) KL(s ‖ m)` with `m = β t + (1 - β) s`;
    /// `(1 - β) s (ln(s / m) - KL(s ‖ m))`.
    Jsd {
        /// Weight of the target in the mixture, above 0 and below 1.
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        beta: f64,
    },
    /// `KL(t ‖ m)` with `m = α t + (1 - α) s`; `(1 - α) s (Σ t s / m - t / m)`.
    SkewedForwardKl {
        /// Weight of the target in the mixture, above 0 and below 1.
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        alpha: f64,
    },
    /// `KL(s ‖ m)` with `m = (1 - α) t + α s`; `h - s Σ h` with `h = s (ln(s / m) - α s / m)`.
    SkewedReverseKl {
        /// Weight of the trainee in the mixture, above 0 and below 1.
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        alpha: f64,
    },
    /// `½ Σ |s - t|`; `h - s Σ h` with `h = ½ s sign(s - t)`.
    TotalVariation,
    /// `-1 / (α β) Σ (t^α s^β - α / (α + β) t^(α + β) - β / (α + β) s^(α + β))`; `h - s Σ h` with
    /// `h = (s^(α + β) - t^α s^β) / α`. Goes to forward KL for α = 1 as β goes to 0, and to reverse KL for β = 1 as α
    /// goes to 0.
    AlphaBeta {
        /// Exponent of the target, above 0.
        #[schemars(extend("exclusiveMinimum" = 0.0), range(max = contract::limits::EXPONENT))]
        alpha: f64,
        /// Exponent of the trainee, above 0.
        #[schemars(extend("exclusiveMinimum" = 0.0), range(max = contract::limits::EXPONENT))]
        beta: f64,
    },
}

impl Divergence {
    /// Its name in metrics, such as `reverse_kl`.
    pub fn name(self) -> &'static str {
        match self {
            Divergence::ForwardKl => "forward_kl",
            Divergence::ReverseKl => "reverse_kl",
            Divergence::Jsd { .. } => "jsd",
            Divergence::SkewedForwardKl { .. } => "skewed_forward_kl",
            Divergence::SkewedReverseKl { .. } => "skewed_reverse_kl",
            Divergence::TotalVariation => "total_variation",
            Divergence::AlphaBeta { .. } => "alpha_beta",
        }
    }

    /// Errors when a parameter is out of its range, and says what to use at the limit.
    pub fn validate(self) -> Result<()> {
        let between = |name: &str, value: f64, limits: &str| -> Result<()> {
            ensure!(
                value > 0.0 && value < 1.0,
                "`{name}` of divergence `{}` is {value}, expected a number above 0 and below 1; {limits}",
                self.name()
            );
            Ok(())
        };
        match self {
            Divergence::ForwardKl | Divergence::ReverseKl | Divergence::TotalVariation => Ok(()),
            Divergence::Jsd { beta } => {
                between("beta", beta, "it vanishes at both ends: use `forward-kl` or `reverse-kl`")
            }
            Divergence::SkewedForwardKl { alpha } => between("alpha", alpha, "for 0 use `forward-kl`"),
            Divergence::SkewedReverseKl { alpha } => between("alpha", alpha, "for 0 use `reverse-kl`"),
            Divergence::AlphaBeta { alpha, beta } => {
                for (name, value, limit) in [("alpha", alpha, "reverse-kl"), ("beta", beta, "forward-kl")] {
                    ensure!(
                        value > 0.0 && value.is_finite(),
                        "`{name}` of divergence `alpha_beta` is {value}, expected a number above 0; for 0 use `{limit}`"
                    );
                }
                Ok(())
            }
        }
    }
}

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

/// Errors when a temperature is not above 0, or so large or small that logits divided by it are no numbers or all the same.
pub fn check_temperature(temperature: f64) -> Result<()> {
    // Logits are multiplied by its inverse, in f32.
    ensure!(
        temperature > 0.0 && ((1.0 / temperature) as f32).is_normal(),
        "expected a number above 0, at most 1e37, got {temperature:?}"
    );
    Ok(())
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

/// Logits that a chunk of plain operations may have: 256 MiB in f32, of which a handful live at a time. Large,
/// because on an accelerator a chunk should fill the device.
const PLAIN_CHUNK_LOGITS: usize = 1 << 26;

/// Arguments that fit together.
#[derive(Clone, Copy)]
struct Request<'a> {
    hidden: &'a Tensor,
    head: &'a Tensor,
    labels: Option<(&'a [u32], f64)>,
    targets: &'a [Target<'a>],
    weights: &'a [f32],
}

/// A [`Source`] of some of the rows.
enum ChunkSource<'a> {
    Head(Tensor, &'a Tensor),
    TopK(TopK),
}

impl ChunkSource<'_> {
    fn view(&self) -> Source<'_> {
        match self {
            ChunkSource::Head(hidden, head) => Source::Head { hidden, head },
            ChunkSource::TopK(kept) => Source::TopK(kept),
        }
    }
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
            && self.targets.iter().all(|target| self.is_over_all(target))
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
            let rows = (PLAIN_CHUNK_LOGITS / self.head.dim(0)?).max(16);
            self.by_chunks(hidden_gradient, head_gradient, rows)
        }
    }

    /// Whether a target is over all of the vocabulary, token by token.
    #[cfg(feature = "cuda")]
    fn is_over_all(&self, target: &Target<'_>) -> bool {
        matches!(target.source, Source::Head { head, .. } if head.dims()[0] == self.head.dims()[0])
    }

    /// By the fused CPU kernel.
    fn fused(&self, hidden_gradient: bool, head_gradient: bool) -> Result<Answer> {
        let (hidden, head) = (Values::of(self.hidden)?, Values::of(self.head)?);
        let targets: Vec<Option<(Values, Values)>> = (self.targets.iter())
            .map(|target| match target.source {
                Source::Head { hidden, head } => Ok(Some((Values::of(hidden)?, Values::of(head)?))),
                Source::TopK(_) => Ok(None),
            })
            .collect::<Result<_>>()?;
        let (hidden, head) = (hidden.lock(), head.lock());
        let locked = targets.iter().map(|values| values.as_ref().map(|(hidden, head)| (hidden.lock(), head.lock())));
        let locked: Vec<_> = locked.collect();
        let input = Input {
            hidden: hidden.slice()?,
            head: head.slice()?,
            width: self.hidden.dim(1)?,
            vocabulary: self.head.dim(0)?,
            labels: self.labels,
            targets: (self.targets.iter().zip(&locked))
                .map(|(target, locked)| {
                    let source = match (target.source, locked) {
                        (Source::TopK(kept), _) => InputSource::TopK(kept),
                        (Source::Head { hidden: tensor, .. }, locked) => {
                            let (hidden, head) = locked.as_ref().expect("every head was locked above");
                            InputSource::Head { hidden: hidden.slice()?, head: head.slice()?, width: tensor.dim(1)? }
                        }
                    };
                    let Target { divergence, coefficient, temperature, .. } = *target;
                    Ok(InputTarget { source, divergence, coefficient, temperature })
                })
                .collect::<Result<_>>()?,
            weights: self.weights,
        };
        let output = head_terms(&input, hidden_gradient, head_gradient);
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        Ok(Answer {
            terms: output.terms,
            hidden_gradient: tensor(output.hidden_gradient, self.hidden)?,
            head_gradient: tensor(output.head_gradient, self.head)?,
        })
    }

    /// The rows that count, as devices index them.
    fn active(&self) -> Vec<u32> {
        active(self.weights).map(|row| row as u32).collect()
    }

    /// By plain operations and autograd, `rows` rows at a time, so that the graph of one chunk is all that lives.
    fn by_chunks(&self, hidden_gradient: bool, head_gradient: bool, rows: usize) -> Result<Answer> {
        let device = self.hidden.device();
        let active = self.active();
        let count = self.coefficients().len();
        let mut terms = vec![0.0; self.weights.len() * count];
        let mut hidden_parts = Vec::new();
        let mut head_sum: Option<Tensor> = None;
        let head = if head_gradient { variable(self.head)? } else { self.head.detach() };
        for chunk in active.chunks(rows) {
            let indices = Tensor::new(chunk, device)?;
            let select = |tensor: &Tensor| tensor.detach().index_select(&indices, 0);
            let hidden = select(self.hidden)?; // [R, C]
            let hidden = if hidden_gradient { variable(&hidden)? } else { hidden };
            let sources: Vec<ChunkSource> = (self.targets.iter())
                .map(|target| match target.source {
                    Source::Head { hidden, head } => Ok(ChunkSource::Head(select(hidden)?, head)),
                    Source::TopK(kept) => Ok(ChunkSource::TopK(kept.select(chunk))),
                })
                .collect::<Result<_>>()?;
            let targets: Vec<Target> = (self.targets.iter().zip(&sources))
                .map(|(target, source)| Target { source: source.view(), ..*target })
                .collect();
            let labels: Vec<u32> = match self.labels {
                Some((labels, _)) => chunk.iter().map(|&row| labels[row as usize]).collect(),
                None => Vec::new(),
            };
            let weights: Vec<f32> = chunk.iter().map(|&row| self.weights[row as usize]).collect();
            let part = Request {
                hidden: &hidden,
                head: &head,
                labels: self.labels.map(|(_, coefficient)| (labels.as_slice(), coefficient)),
                targets: &targets,
                weights: &weights,
            };
            let part_terms = Tensor::stack(&part.plain_terms()?, 1)?; // [R, terms]
            // The only wait for the device: once a chunk.
            let values = part_terms.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            for (values, &row) in values.iter().zip(chunk) {
                terms[row as usize * count..][..count].copy_from_slice(values);
            }
            if hidden_gradient || head_gradient {
                let weights = Tensor::new(weights.as_slice(), device)?.to_dtype(part_terms.dtype())?.unsqueeze(1)?;
                let coefficients = Tensor::new(part.coefficients(), device)?.to_dtype(part_terms.dtype())?;
                let loss = part_terms.broadcast_mul(&weights)?.broadcast_mul(&coefficients)?.sum_all()?;
                let mut gradients = loss.backward()?;
                if hidden_gradient {
                    hidden_parts.push(gradients.remove(&hidden).context("a chunk gave `hidden` no gradient")?);
                }
                if head_gradient {
                    let gradient = gradients.remove(&head).context("a chunk gave `head` no gradient")?;
                    head_sum = Some(match head_sum {
                        Some(sum) => (sum + gradient)?,
                        None => gradient,
                    });
                }
            }
        }
        let hidden_gradient = if hidden_gradient { Some(self.scatter(hidden_parts, &active)?) } else { None };
        let head_gradient = match head_sum {
            None if head_gradient => Some(self.head.zeros_like()?),
            sum => sum,
        };
        Ok(Answer { terms, hidden_gradient, head_gradient })
    }

    /// Gradients of the active rows, put where they belong; the other rows get zeros, `[N, C]`.
    fn scatter(&self, mut parts: Vec<Tensor>, active: &[u32]) -> Result<Tensor> {
        // Taking rows is faster on a device than adding them, and always in the same order.
        parts.push(self.hidden.narrow(0, 0, self.hidden.dim(0)?.min(1))?.zeros_like()?);
        let mut places = vec![active.len() as u32; self.weights.len()];
        for (place, &row) in active.iter().enumerate() {
            places[row as usize] = place as u32;
        }
        let places = Tensor::new(places, self.hidden.device())?;
        Ok(Tensor::cat(&parts, 0)?.index_select(&places, 0)?)
    }

    /// Terms by whole logits and plain operations: the cross-entropy, where there are labels, and the divergences,
    /// each `[N]`.
    fn plain_terms(&self) -> Result<Vec<Tensor>> {
        let logits = wide_logits(self.hidden, self.head)?; // [N, V]
        let mut terms = Vec::new();
        if let Some((labels, _)) = self.labels {
            let labels = Tensor::new(labels, self.hidden.device())?.unsqueeze(1)?; // [N, 1]
            terms.push(log_softmax(&logits, 1.0)?.gather(&labels, 1)?.squeeze(1)?.neg()?);
        }
        for target in self.targets {
            let (log_s, log_t) = match target.source {
                Source::Head { hidden, head } => {
                    let logits = logits.narrow(1, 0, head.dim(0)?)?;
                    let target_logits = wide_logits(&hidden.detach(), &head.detach())?;
                    (log_softmax(&logits, target.temperature)?, log_softmax(&target_logits, target.temperature)?)
                }
                Source::TopK(kept) => {
                    let logits = logits.narrow(1, 0, kept.vocabulary)?;
                    (kept.coarsened(&log_softmax(&logits, target.temperature)?)?, kept.classes(&logits)?)
                }
            };
            terms.push(plain_divergence(target.divergence, &log_s, &log_t.to_dtype(log_s.dtype())?)?);
        }
        Ok(terms)
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

/// A scalar whose backward pass hands out the gradients that are already there.
fn attach(value: f64, hidden: &Tensor, head: &Tensor, answer: Answer) -> Result<Tensor> {
    let Answer { hidden_gradient, head_gradient, .. } = answer;
    let dtype = wide(hidden.dtype());
    let on_cpu = matches!(hidden.device(), Device::Cpu) && hidden.dtype() == DType::F32 && head.dtype() == DType::F32;
    if on_cpu || hidden.device().is_cuda() {
        let head_gradient = Mutex::new(head_gradient);
        return Ok(hidden.apply_op2(head, Ready { value: value as f32, hidden_gradient, head_gradient })?);
    }
    // Elsewhere the same by plain operations: x g - x g is 0, and its derivative by the first x is g.
    let mut loss = Tensor::new(value, hidden.device())?.to_dtype(dtype)?;
    for (tensor, gradient) in [(hidden, hidden_gradient), (head, head_gradient)] {
        if let Some(gradient) = gradient {
            let product = (tensor * gradient.detach())?.sum_all()?;
            loss = (loss + (&product - product.detach())?.to_dtype(dtype)?)?;
        }
    }
    Ok(loss)
}

/// The custom operation behind [`attach`].
struct Ready {
    value: f32,
    hidden_gradient: Option<Tensor>,
    head_gradient: Mutex<Option<Tensor>>,
}

impl CustomOp2 for Ready {
    fn name(&self) -> &'static str {
        "head-loss"
    }

    fn cpu_fwd(
        &self,
        _hidden: &CpuStorage,
        _hidden_layout: &Layout,
        _head: &CpuStorage,
        _head_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.value]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &candle_core::CudaStorage,
        _hidden_layout: &Layout,
        _head: &candle_core::CudaStorage,
        _head_layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let value = hidden.device.clone_htod(&[self.value])?;
        Ok((candle_core::CudaStorage::wrap_cuda_slice(value, hidden.device.clone()), Shape::from(())))
    }

    fn bwd(
        &self,
        _hidden: &Tensor,
        head: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        // To read the factor is to wait for the device: not where it is known.
        let factor = if is_differentiated(result) { 1.0 } else { f64::from(gradient.to_scalar::<f32>()?) };
        let scaled = |stored: &Option<Tensor>| match stored {
            Some(stored) if factor != 1.0 => (stored * factor).map(Some),
            stored => Ok(stored.clone()),
        };
        let mut head_gradient = self.head_gradient.lock().expect("nothing panics while it is held");
        if head.is_variable() && is_collecting() && head_gradient.is_some() {
            // The largest gradient of all: candle would add it to zeros. Scaled or taken out, it is nobody else's.
            let own = if factor == 1.0 { head_gradient.take() } else { scaled(&head_gradient)? };
            if let Some(own) = own {
                deliver(head, Contribution::Dense(own))?;
            }
            return Ok((scaled(&self.hidden_gradient)?, None));
        }
        Ok((scaled(&self.hidden_gradient)?, scaled(&head_gradient)?))
    }
}

/// A divergence of each row by plain operations, from log-probabilities `[N, V]`; `[N]`. The formulas stand at
/// [`Divergence`].
fn plain_divergence(divergence: Divergence, log_s: &Tensor, log_t: &Tensor) -> Result<Tensor> {
    let (s, t) = (log_s.exp()?, log_t.exp()?);
    let kl = |p: &Tensor, log_p: &Tensor, log_q: &Tensor| p * (log_p - log_q)?;
    // Logarithm of weight * p + (1 - weight) * q.
    let mix = |weight: f64, p: &Tensor, q: &Tensor| {
        ((p * weight)? + (q * (1.0 - weight))?)?.maximum(f64::from(f32::MIN_POSITIVE))?.log()
    };
    let summands = match divergence {
        Divergence::ForwardKl => kl(&t, log_t, log_s)?,
        Divergence::ReverseKl => kl(&s, log_s, log_t)?,
        Divergence::Jsd { beta } => {
            let log_m = mix(beta, &t, &s)?;
            ((kl(&t, log_t, &log_m)? * beta)? + (kl(&s, log_s, &log_m)? * (1.0 - beta))?)?
        }
        Divergence::SkewedForwardKl { alpha } => kl(&t, log_t, &mix(alpha, &t, &s)?)?,
        Divergence::SkewedReverseKl { alpha } => kl(&s, log_s, &mix(alpha, &s, &t)?)?,
        Divergence::TotalVariation => ((s - t)?.abs()? * 0.5)?,
        Divergence::AlphaBeta { alpha, beta } => {
            let both = alpha + beta;
            let cross = ((log_t * alpha)? + (log_s * beta)?)?.exp()?;
            let pure_t = ((log_t * both)?.exp()? * (alpha / both))?;
            let pure_s = ((log_s * both)?.exp()? * (beta / both))?;
            (((cross - pure_t)? - pure_s)? * (-1.0 / (alpha * beta)))?
        }
    };
    Ok(summands.sum(1)?)
}

/// `hidden headᵀ` in f32 at least, `[N, V]`.
fn wide_logits(hidden: &Tensor, head: &Tensor) -> Result<Tensor> {
    let dtype = wide(hidden.dtype());
    Ok(hidden.to_dtype(dtype)?.matmul(&head.to_dtype(dtype)?.t()?)?)
}

/// Log-probabilities of `logits / temperature` along the last dimension, at least -10⁴.
fn log_softmax(logits: &Tensor, temperature: f64) -> Result<Tensor> {
    // The maximum only guards against overflow: no gradient goes through it.
    let max = logits.detach().max_keepdim(1)?;
    let shifted = (logits.broadcast_sub(&max)? / temperature)?;
    let log_sum = shifted.exp()?.sum_keepdim(1)?.log()?;
    Ok(shifted.broadcast_sub(&log_sum)?.maximum(f64::from(LOG_FLOOR))?)
}

/// The type in which losses are computed.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

/// A variable with the values of `tensor`, cut off from how they were computed.
fn variable(tensor: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(tensor)?.into_inner())
}

/// The numbers of a tensor on the CPU in f32, row-major.
struct Values(Tensor);

/// Values that may not change while this lives.
struct Locked<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl Values {
    fn of(tensor: &Tensor) -> Result<Self> {
        Ok(Values(tensor.contiguous()?))
    }

    fn lock(&self) -> Locked<'_> {
        let (storage, layout) = self.0.storage_and_layout();
        Locked { storage, layout }
    }
}

impl Locked<'_> {
    fn slice(&self) -> Result<&[f32]> {
        let (Storage::Cpu(storage), Some((start, end))) = (&*self.storage, self.layout.contiguous_offsets()) else {
            bail!("found a tensor on another device or with gaps, expected a dense one on the CPU")
        };
        Ok(&storage.as_slice::<f32>()?[start..end])
    }
}

#[cfg(test)]
mod tests {
    use contract::random::{normal, philox};
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;
    use crate::kernels::head::rows_per_chunk;

    const CPU: Device = Device::Cpu;

    const EVERY_DIVERGENCE: [Divergence; 9] = [
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta: 0.1 },
        Divergence::Jsd { beta: 0.7 },
        Divergence::SkewedForwardKl { alpha: 0.1 },
        Divergence::SkewedReverseKl { alpha: 0.1 },
        Divergence::TotalVariation,
        Divergence::AlphaBeta { alpha: 0.2, beta: 0.7 },
        Divergence::AlphaBeta { alpha: 1.0, beta: 0.5 },
    ];

    /// Everything a loss is computed from, in f64; [`Case::tensors`] rounds.
    struct Case {
        hidden: Vec<f32>,
        head: Vec<f32>,
        target_hidden: Vec<f32>,
        target_head: Vec<f32>,
        labels: Vec<u32>,
        weights: Vec<f32>,
        rows: usize,
        width: usize,
        target_width: usize,
        vocabulary: usize,
    }

    type Loss = fn(&Tensor, &Tensor, Option<(&[u32], f64)>, &[Target], &[f32]) -> Result<HeadLoss>;

    struct Tensors {
        hidden: Tensor,
        head: Tensor,
        target_hidden: Tensor,
        target_head: Tensor,
    }

    fn noise(seed: u64, count: usize, deviation: f32) -> Vec<f32> {
        (0..count as u32)
            .map(|i| {
                let [a, b, ..] = philox(seed, [i, 0, 0, 0]);
                normal(a, b).0 * deviation
            })
            .collect()
    }

    impl Case {
        fn new(rows: usize, vocabulary: usize, width: usize, seed: u64) -> Self {
            let target_width = width + 3;
            Case {
                hidden: noise(seed, rows * width, 1.0),
                head: noise(seed + 1, vocabulary * width, 2.0 / (width as f32).sqrt()),
                target_hidden: noise(seed + 2, rows * target_width, 1.0),
                target_head: noise(seed + 3, vocabulary * target_width, 2.5 / (target_width as f32).sqrt()),
                labels: (0..rows as u32).map(|i| philox(seed + 4, [i, 0, 0, 0])[0] % vocabulary as u32).collect(),
                // Every fourth row is left out.
                weights: (0..rows).map(|i| if i % 4 == 3 { 0.0 } else { (1 + i % 3) as f32 / rows as f32 }).collect(),
                rows,
                width,
                target_width,
                vocabulary,
            }
        }

        fn tensors(&self, dtype: DType, trainable_head: bool) -> Tensors {
            let tensor = |values: &[f32], rows: usize, columns: usize| {
                Tensor::from_slice(values, (rows, columns), &CPU).unwrap().to_dtype(dtype).unwrap()
            };
            let head = tensor(&self.head, self.vocabulary, self.width);
            Tensors {
                hidden: variable(&tensor(&self.hidden, self.rows, self.width)).unwrap(),
                head: if trainable_head { variable(&head).unwrap() } else { head },
                target_hidden: tensor(&self.target_hidden, self.rows, self.target_width),
                target_head: tensor(&self.target_head, self.vocabulary, self.target_width),
            }
        }
    }

    impl Tensors {
        fn target(&self, divergence: Divergence, coefficient: f64, temperature: f64) -> Target<'_> {
            let source = Source::Head { hidden: &self.target_hidden, head: &self.target_head };
            Target { source, divergence, coefficient, temperature }
        }
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Largest difference, relative to the largest of the right numbers.
    fn gap(found: &[f64], right: &[f64]) -> f64 {
        assert_eq!(found.len(), right.len());
        let scale = right.iter().fold(1e-30_f64, |scale, x| scale.max(x.abs()));
        let gap = found
            .iter()
            .zip(right)
            .fold(0.0_f64, |gap, (a, b)| if (a - b).is_nan() { f64::NAN } else { gap.max((a - b).abs()) });
        gap / scale
    }

    fn assert_close(found: &[f64], right: &[f64], tolerance: f64, what: &str) {
        let gap = gap(found, right);
        assert!(gap < tolerance, "{what} is off by {gap:e}");
    }

    /// The value and both gradients of `loss`, the latter scaled by its backward pass from `loss * 3`.
    fn gradients(loss: &HeadLoss, tensors: &Tensors) -> (Vec<f64>, Vec<f64>) {
        let gradients = (&loss.loss * 3.0).unwrap().backward().unwrap();
        (numbers(gradients.get(&tensors.hidden).unwrap()), numbers(gradients.get(&tensors.head).unwrap()))
    }

    /// [`head_loss`] in f32 against its twin in f64.
    fn check_against_the_twin(case: &Case, labels: Option<f64>, terms: &[(Divergence, f64, f64)]) {
        let (narrow, wide) = (case.tensors(DType::F32, true), case.tensors(DType::F64, true));
        let targets = |tensors| -> Vec<Target> {
            let tensors: &Tensors = tensors;
            terms
                .iter()
                .map(|&(divergence, coefficient, temperature)| tensors.target(divergence, coefficient, temperature))
                .collect()
        };
        let labels = labels.map(|coefficient| (case.labels.as_slice(), coefficient));
        let fused = head_loss(&narrow.hidden, &narrow.head, labels, &targets(&narrow), &case.weights).unwrap();
        let twin = head_loss_plain(&wide.hidden, &wide.head, labels, &targets(&wide), &case.weights).unwrap();
        let what = format!("{terms:?} at {} rows, {} tokens", case.rows, case.vocabulary);
        let (fused_loss, twin_loss) = (scalar(&fused.loss).unwrap(), scalar(&twin.loss).unwrap());
        assert_close(&[fused_loss], &[twin_loss], 1e-5, &format!("loss of {what}"));
        assert_close(&fused.divergences, &twin.divergences, 1e-5, &format!("divergences of {what}"));
        assert_eq!(fused.cross_entropy.is_some(), twin.cross_entropy.is_some());
        if let (Some(fused), Some(twin)) = (fused.cross_entropy, twin.cross_entropy) {
            assert_close(&[fused], &[twin], 1e-5, &format!("cross-entropy of {what}"));
        }
        let ((hidden, head), (right_hidden, right_head)) = (gradients(&fused, &narrow), gradients(&twin, &wide));
        assert_close(&hidden, &right_hidden, 1e-5, &format!("hidden gradient of {what}"));
        assert_close(&head, &right_head, 1e-5, &format!("head gradient of {what}"));
    }

    #[test]
    fn the_kernel_agrees_with_its_twin_for_every_divergence_and_shape() {
        for (rows, vocabulary, width) in [(1, 5, 4), (7, 33, 8), (9, 512, 16), (5, 1030, 12)] {
            let case = Case::new(rows, vocabulary, width, 11);
            for divergence in EVERY_DIVERGENCE {
                check_against_the_twin(&case, None, &[(divergence, 1.0, 1.0)]);
                check_against_the_twin(&case, None, &[(divergence, 0.5, 2.0)]);
            }
        }
    }

    #[test]
    fn the_kernel_agrees_with_its_twin_for_sums_of_terms() {
        let case = Case::new(13, 101, 8, 5);
        check_against_the_twin(&case, Some(1.0), &[]);
        check_against_the_twin(&case, Some(0.5), &[(Divergence::ForwardKl, 0.5, 1.0)]);
        let (guidance, regulariser) = ((Divergence::ReverseKl, 1.0, 1.0), (Divergence::ReverseKl, -0.25, 1.5));
        check_against_the_twin(&case, None, &[guidance, regulariser]);
    }

    #[test]
    fn the_kernel_agrees_with_its_twin_across_chunks() {
        let vocabulary = 70_001;
        // 113 rows have weight: one more than a chunk.
        assert_eq!(rows_per_chunk(vocabulary), 112);
        check_against_the_twin(&Case::new(150, vocabulary, 4, 3), Some(0.5), &[(Divergence::ReverseKl, 0.5, 1.0)]);
    }

    #[test]
    fn chunks_of_plain_operations_agree_with_the_twin() {
        let case = Case::new(11, 37, 6, 8);
        for trainable_head in [true, false] {
            let (tensors, twin_tensors) = (case.tensors(DType::F64, trainable_head), case.tensors(DType::F64, true));
            let labels = Some((case.labels.as_slice(), 0.3));
            let target = tensors.target(Divergence::Jsd { beta: 0.4 }, 0.7, 1.3);
            let targets = [target];
            let request = Request::new(&tensors.hidden, &tensors.head, labels, &targets, &case.weights).unwrap();
            let answer = request.by_chunks(true, trainable_head, 3).unwrap();
            assert_eq!(answer.head_gradient.is_some(), trainable_head);
            let twin_targets = [twin_tensors.target(Divergence::Jsd { beta: 0.4 }, 0.7, 1.3)];
            let twin = head_loss_plain(&twin_tensors.hidden, &twin_tensors.head, labels, &twin_targets, &case.weights)
                .unwrap();
            let (cross_entropy, divergences) = request.totals(&answer.terms);
            assert_close(&[cross_entropy.unwrap()], &[twin.cross_entropy.unwrap()], 1e-12, "cross-entropy");
            assert_close(&divergences, &twin.divergences, 1e-12, "divergence");
            let loss =
                attach(request.loss(cross_entropy, &divergences), &tensors.hidden, &tensors.head, answer).unwrap();
            assert_close(&numbers(&loss), &numbers(&twin.loss), 1e-12, "loss");
            let (found, right) =
                ((&loss * 2.0).unwrap().backward().unwrap(), (&twin.loss * 2.0).unwrap().backward().unwrap());
            let of = |store: &candle_core::backprop::GradStore, tensor: &Tensor| numbers(store.get(tensor).unwrap());
            assert_close(&of(&found, &tensors.hidden), &of(&right, &twin_tensors.hidden), 1e-12, "hidden gradient");
            if trainable_head {
                assert_close(&of(&found, &tensors.head), &of(&right, &twin_tensors.head), 1e-12, "head gradient");
            }
        }
    }

    #[test]
    fn the_twin_agrees_with_finite_differences() {
        let case = Case::new(3, 7, 4, 21);
        for divergence in EVERY_DIVERGENCE {
            let tensors = case.tensors(DType::F64, true);
            let value = |hidden: &Tensor, head: &Tensor| -> HeadLoss {
                let labels = Some((case.labels.as_slice(), 0.2));
                head_loss_plain(hidden, head, labels, &[tensors.target(divergence, 0.8, 1.7)], &case.weights).unwrap()
            };
            let gradients = value(&tensors.hidden, &tensors.head).loss.backward().unwrap();
            for (which, tensor) in [&tensors.hidden, &tensors.head].into_iter().enumerate() {
                let analytic = numbers(gradients.get(tensor).unwrap());
                let at = numbers(tensor);
                for i in 0..at.len() {
                    let moved = |step: f64| {
                        let mut moved = at.clone();
                        moved[i] += step;
                        let moved = Tensor::from_vec(moved, tensor.shape(), &CPU).unwrap();
                        let loss =
                            if which == 0 { value(&moved, &tensors.head) } else { value(&tensors.hidden, &moved) };
                        scalar(&loss.loss).unwrap()
                    };
                    let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                    assert!((slope - analytic[i]).abs() < 1e-7, "{divergence:?}: element {i} of argument {which}");
                }
            }
        }
    }

    /// A case of the fixtures.
    #[derive(Deserialize)]
    struct Fixture {
        name: String,
        kind: String,
        temperature: f64,
        alpha: Option<f64>,
        beta: Option<f64>,
        values: Vec<f64>,
    }

    impl Fixture {
        fn divergence(&self) -> Option<Divergence> {
            let (alpha, beta) = (self.alpha.unwrap_or(f64::NAN), self.beta.unwrap_or(f64::NAN));
            Some(match self.kind.as_str() {
                "cross_entropy" => return None,
                "forward_kl" => Divergence::ForwardKl,
                "reverse_kl" => Divergence::ReverseKl,
                "jsd" => Divergence::Jsd { beta },
                "skewed_forward" => Divergence::SkewedForwardKl { alpha },
                "skewed_reverse" => Divergence::SkewedReverseKl { alpha },
                "total_variation" => Divergence::TotalVariation,
                "alpha_beta" => Divergence::AlphaBeta { alpha, beta },
                other => panic!("unknown kind {other}"),
            })
        }
    }

    /// With the identity as head, hidden states are logits.
    #[test]
    fn values_and_gradients_agree_with_the_ones_computed_by_others() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/parity/divergences");
        let fixtures: Vec<Fixture> =
            serde_json::from_slice(&std::fs::read(format!("{folder}/cases.json")).unwrap()).unwrap();
        let bytes = std::fs::read(format!("{folder}/expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let read = |name: &str| -> Tensor {
            let view = file.tensor(name).unwrap();
            let values: Vec<f32> = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            Tensor::from_vec(values, view.shape(), &CPU).unwrap()
        };
        let labels: Vec<u32> = (file.tensor("labels").unwrap().data().chunks(8))
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
            .collect();
        let (student, teacher) = (variable(&read("student_logits")).unwrap(), read("teacher_logits"));
        let (rows, vocabulary) = student.dims2().unwrap();
        let identity = Tensor::eye(vocabulary, DType::F32, &CPU).unwrap();
        assert_eq!(fixtures.len(), 14);
        for fixture in &fixtures {
            let target = fixture.divergence().map(|divergence| Target {
                source: Source::Head { hidden: &teacher, head: &identity },
                divergence,
                coefficient: 1.0,
                temperature: fixture.temperature,
            });
            let targets: Vec<Target> = target.into_iter().collect();
            let with_labels = targets.is_empty().then_some((labels.as_slice(), 1.0));
            let values = match with_labels {
                Some((labels, _)) => {
                    log_probs(&student, &identity, labels).unwrap().iter().map(|&x| -f64::from(x)).collect()
                }
                None => divergence_values(&student, &identity, &targets).unwrap().remove(0),
            };
            for (found, right) in values.iter().zip(&fixture.values) {
                assert!((found / right - 1.0).abs() < 1e-5, "{}: {found}, expected {right}", fixture.name);
            }
            let gradient = numbers(&read(&format!("{}.grad", fixture.name)));
            for loss in [head_loss, head_loss_plain] {
                let loss = loss(&student, &identity, with_labels, &targets, &vec![1.0; rows]).unwrap();
                let total: f64 = fixture.values.iter().sum();
                assert_close(&[scalar(&loss.loss).unwrap()], &[total], 1e-5, &fixture.name);
                let store = loss.loss.backward().unwrap();
                assert_close(&numbers(store.get(&student).unwrap()), &gradient, 1e-5, &fixture.name);
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        for case in [Case::new(200, 1024, 48, 1), Case::new(75, 50_257, 16, 2)] {
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let tensors = case.tensors(DType::F32, true);
                    let targets = [tensors.target(Divergence::ReverseKl, 0.5, 1.0)];
                    let labels = Some((case.labels.as_slice(), 0.5));
                    let loss = head_loss(&tensors.hidden, &tensors.head, labels, &targets, &case.weights).unwrap();
                    let (hidden, head) = gradients(&loss, &tensors);
                    (loss.divergences, loss.cross_entropy, hidden, head)
                })
            };
            let alone = run(1);
            for threads in [2, 3] {
                assert!(run(threads) == alone, "{threads} threads at vocabulary {}", case.vocabulary);
            }
        }
    }

    #[test]
    fn a_frozen_head_gets_no_gradient_and_a_frozen_loss_has_none() {
        let case = Case::new(4, 10, 4, 2);
        let tensors = case.tensors(DType::F32, false);
        let targets = [tensors.target(Divergence::ForwardKl, 1.0, 1.0)];
        let loss = head_loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
        let store = loss.loss.backward().unwrap();
        assert!(store.get(&tensors.head).is_none());
        assert!(store.get(&tensors.hidden).is_some());
        assert!(store.get(&tensors.target_hidden).is_none() && store.get(&tensors.target_head).is_none());

        let request = Request::new(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
        assert!(request.answer(true, false).unwrap().head_gradient.is_none());
        let frozen = head_loss(&tensors.hidden.detach(), &tensors.head, None, &targets, &case.weights).unwrap();
        assert!(!frozen.loss.track_op());
        assert_eq!(scalar(&frozen.loss).unwrap(), scalar(&loss.loss).unwrap());
    }

    #[test]
    fn a_head_computed_from_a_variable_gets_its_gradient() {
        let case = Case::new(4, 10, 4, 2);
        let tensors = case.tensors(DType::F32, true);
        let targets = [tensors.target(Divergence::ForwardKl, 1.0, 1.0)];
        let doubled = (&tensors.head * 2.0).unwrap();
        let through = head_loss(&tensors.hidden, &doubled, None, &targets, &case.weights).unwrap();
        let right = head_loss_plain(&tensors.hidden, &doubled, None, &targets, &case.weights).unwrap();
        let of = |loss: &HeadLoss| numbers(loss.loss.backward().unwrap().get(&tensors.head).unwrap());
        assert_close(&of(&through), &of(&right), 1e-5, "head gradient");
    }

    #[test]
    fn rows_of_weight_zero_change_nothing_and_get_no_gradient() {
        let case = Case::new(8, 20, 4, 9);
        let tensors = case.tensors(DType::F32, true);
        let targets = [tensors.target(Divergence::ReverseKl, 1.0, 1.0)];
        let loss = head_loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
        let (hidden, _) = gradients(&loss, &tensors);
        for row in 0..8 {
            let silent = hidden[row * 4..][..4].iter().all(|&x| x == 0.0);
            assert_eq!(silent, row % 4 == 3, "row {row}");
        }
        for weights in [vec![0.0; 8], Vec::new()] {
            let rows = weights.len();
            let hidden = variable(&tensors.hidden.narrow(0, 0, rows).unwrap()).unwrap();
            let target_hidden = tensors.target_hidden.narrow(0, 0, rows).unwrap();
            let targets =
                [Target { source: Source::Head { hidden: &target_hidden, head: &tensors.target_head }, ..targets[0] }];
            let loss = head_loss(&hidden, &tensors.head, None, &targets, &weights).unwrap();
            assert_eq!(scalar(&loss.loss).unwrap(), 0.0);
            let store = loss.loss.backward().unwrap();
            assert!(numbers(store.get(&tensors.head).unwrap()).iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn a_view_with_gaps_is_read_as_what_it_shows() {
        let case = Case::new(4, 10, 4, 2);
        let tensors = case.tensors(DType::F32, true);
        let target_head = tensors.target_head.t().unwrap().contiguous().unwrap().t().unwrap();
        let targets = [tensors.target(Divergence::ForwardKl, 1.0, 1.0)];
        let shown =
            [Target { source: Source::Head { hidden: &tensors.target_hidden, head: &target_head }, ..targets[0] }];
        let values = |targets: &[Target]| divergence_values(&tensors.hidden, &tensors.head, targets).unwrap();
        assert_eq!(values(&shown), values(&targets));
    }

    #[test]
    fn a_broken_model_gives_nan_and_not_a_number() {
        let case = Case::new(4, 600, 4, 2);
        let mut tensors = case.tensors(DType::F32, true);
        let mut broken = case.target_hidden.clone();
        broken[0] = f32::NAN;
        tensors.target_hidden = Tensor::from_vec(broken, (4, 7), &CPU).unwrap();
        for divergence in EVERY_DIVERGENCE {
            let targets = [tensors.target(divergence, 1.0, 1.0)];
            for loss in [head_loss, head_loss_plain] {
                let loss = loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
                assert!(loss.divergences[0].is_nan(), "{divergence:?} hides a NaN");
            }
        }
    }

    /// Logits of some hundreds: most probabilities are 0 in f32, and models are sure of different tokens.
    #[test]
    fn far_apart_distributions_give_finite_losses_and_gradients() {
        let case = Case::new(4, 40, 4, 6);
        let scaled = |dtype| {
            let mut tensors = case.tensors(dtype, true);
            tensors.hidden = variable(&(&tensors.hidden * 128.0).unwrap()).unwrap();
            tensors.target_hidden = (&tensors.target_hidden * 128.0).unwrap();
            tensors
        };
        let (narrow, wide) = (scaled(DType::F32), scaled(DType::F64));
        for divergence in EVERY_DIVERGENCE {
            let run = |loss: fn(&Tensor, &Tensor, _, &[Target], &[f32]) -> Result<HeadLoss>, tensors: &Tensors| {
                let targets = [tensors.target(divergence, 1.0, 1.0)];
                let loss = loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
                let (hidden, head) = gradients(&loss, tensors);
                (loss.divergences[0], hidden, head)
            };
            let (value, hidden, head) = run(head_loss, &narrow);
            let (right_value, right_hidden, right_head) = run(head_loss_plain, &wide);
            assert!(
                (value - right_value).abs() < 1e-3 + 1e-5 * right_value,
                "{divergence:?}: {value}, not {right_value}"
            );
            // The gradients may be close to 0, the head's because of inputs of some hundreds less so.
            let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).fold(0.0_f64, |gap, (a, b)| gap.max((a - b).abs()));
            assert!(hidden.iter().chain(&head).all(|x| x.is_finite()), "{divergence:?}");
            assert!(apart(&hidden, &right_hidden) < 1e-2, "{divergence:?}: {}", apart(&hidden, &right_hidden));
            assert!(apart(&head, &right_head) < 1.0, "{divergence:?}: {}", apart(&head, &right_head));
        }
    }

    #[test]
    fn a_chunk_has_bounded_logits_and_enough_rows() {
        for vocabulary in [1, 61, 1024, 32_000, 50_257, 151_936, 262_144] {
            let rows = rows_per_chunk(vocabulary);
            assert!((16..=1024).contains(&rows), "{rows} rows at {vocabulary}");
            assert!(rows == 16 || rows * vocabulary * 4 <= 32 << 20, "{rows} rows at {vocabulary}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
        /// Each is zero between equal distributions and positive otherwise; the gradient has no component that
        /// softmax ignores.
        #[test]
        fn divergences_are_distances(which in 0..EVERY_DIVERGENCE.len(), seed in 0..1000_u64, temperature in 0.5..3.0) {
            let case = Case::new(3, 30, 30, seed);
            let tensors = case.tensors(DType::F32, false);
            let identity = Tensor::eye(30, DType::F32, &CPU).unwrap();
            let divergence = EVERY_DIVERGENCE[which];
            let other = Tensor::from_vec(noise(seed + 9, 90, 2.0), (3, 30), &CPU).unwrap();
            let target = |hidden| {
                let source = Source::Head { hidden, head: &identity };
                Target { source, divergence, coefficient: 1.0, temperature }
            };
            let twin = tensors.hidden.detach();
            let same = divergence_values(&tensors.hidden, &identity, &[target(&twin)]).unwrap().remove(0);
            prop_assert!(same.iter().all(|value| value.abs() < 1e-5), "{same:?}");
            let loss = head_loss(&tensors.hidden, &identity, None, &[target(&other)], &[1.0; 3]).unwrap();
            prop_assert!(loss.divergences[0] > 1e-3);
            let store = loss.loss.backward().unwrap();
            for row in numbers(store.get(&tensors.hidden).unwrap()).chunks(30) {
                prop_assert!(row.iter().sum::<f64>().abs() < 1e-5);
            }
        }
    }

    #[test]
    fn divergences_are_written_as_strings_or_maps() {
        let read = |text: &str| serde_json::from_str::<Divergence>(text);
        assert_eq!(read(r#""reverse-kl""#).unwrap(), Divergence::ReverseKl);
        assert_eq!(read(r#"{"jsd": {"beta": 0.5}}"#).unwrap(), Divergence::Jsd { beta: 0.5 });
        let alpha_beta = Divergence::AlphaBeta { alpha: 0.2, beta: 0.7 };
        assert_eq!(read(r#"{"alpha-beta": {"alpha": 0.2, "beta": 0.7}}"#).unwrap(), alpha_beta);
        assert!(read(r#"{"jsd": {"beta": 0.5, "alpha": 1.0}}"#).is_err());
        assert!(read(r#""jsd""#).is_err());
        for divergence in EVERY_DIVERGENCE {
            assert_eq!(read(&serde_json::to_string(&divergence).unwrap()).unwrap(), divergence);
            divergence.validate().unwrap();
        }
    }

    /// A trainee whose head has eleven rows of padding: a target without them sees it as if they were not there, while the
    /// cross-entropy is over all rows.
    #[test]
    fn a_target_over_fewer_tokens_is_compared_over_those() {
        let case = Case::new(9, 30, 6, 5);
        let (narrow, wide) = (case.tensors(DType::F32, true), case.tensors(DType::F64, true));
        for divergence in EVERY_DIVERGENCE {
            for temperature in [1.0, 1.7] {
                let parts = |tensors: &Tensors, loss: Loss| {
                    let head = tensors.target_head.narrow(0, 0, 19).unwrap();
                    let source = Source::Head { hidden: &tensors.target_hidden, head: &head };
                    let target = Target { source, divergence, coefficient: 0.6, temperature };
                    let labels = Some((case.labels.as_slice(), 0.4));
                    let loss: HeadLoss =
                        loss(&tensors.hidden, &tensors.head, labels, &[target], &case.weights).unwrap();
                    let store = loss.loss.backward().unwrap();
                    let gradients = [&tensors.hidden, &tensors.head].map(|tensor| numbers(store.get(tensor).unwrap()));
                    let alone = tensors.head.detach().narrow(0, 0, 19).unwrap();
                    let values = divergence_values(&tensors.hidden.detach(), &alone, &[target]).unwrap().remove(0);
                    let expected: f64 = values.iter().zip(&case.weights).map(|(v, w)| v * f64::from(*w)).sum();
                    (loss.cross_entropy.unwrap(), loss.divergences[0], expected, gradients)
                };
                let (found, right) = (parts(&narrow, head_loss), parts(&wide, head_loss_plain));
                let chunked = parts(&wide, head_loss);
                for found in [&found, &chunked] {
                    assert!((found.0 - right.0).abs() < 1e-5 && (found.1 - right.1).abs() < 1e-5, "{divergence:?}");
                    assert!((found.1 - found.2).abs() < 1e-6, "{divergence:?}: {} {}", found.1, found.2);
                    for (found, right) in found.3.iter().flatten().zip(right.3.iter().flatten()) {
                        assert!((found - right).abs() < 1e-5, "{divergence:?}: {found} {right}");
                    }
                }
            }
        }
    }

    #[test]
    fn arguments_that_do_not_fit_are_named() {
        let case = Case::new(2, 10, 4, 2);
        let tensors = case.tensors(DType::F32, true);
        let labels = |labels: &'static [u32]| Some((labels, 1.0));
        let message = |labels, targets: &[Target], weights: &[f32]| {
            let result = head_loss(&tensors.hidden, &tensors.head, labels, targets, weights);
            result.err().map(|error| format!("{error:#}")).expect("an error")
        };
        let both = [1.0, 1.0];
        assert_eq!(message(None, &[], &both), "a loss needs labels or a target, found neither");
        assert_eq!(message(labels(&[0]), &[], &both), "found 1 labels, expected 2, one a row");
        assert_eq!(message(labels(&[0, 1]), &[], &[1.0]), "found 1 weights, expected 2, one a row");
        let outside = "label 10 of row 1 is outside of the vocabulary, expected less than 10";
        assert_eq!(message(labels(&[0, 10]), &[], &both), outside);
        let target = tensors.target(Divergence::ForwardKl, 1.0, 1.0);
        let larger = Tensor::cat(&[&tensors.target_head, &tensors.target_head], 0).unwrap();
        let other = "`head` of target 0 has shape [20, 7], expected [10, 7]: both models must share a vocabulary";
        assert_eq!(
            message(
                None,
                &[Target { source: Source::Head { hidden: &tensors.target_hidden, head: &larger }, ..target }],
                &both
            ),
            other
        );
        for temperature in [0.0, 1e-60, 1e39, 1e308, f64::INFINITY, f64::NAN] {
            let found = message(None, &[Target { temperature, ..target }], &both);
            assert!(found.starts_with("temperature of target 0: expected a number above 0"), "{found}");
            assert!(found.ends_with(&format!("got {temperature:?}")), "{found}");
        }
        let skewed = Divergence::SkewedReverseKl { alpha: 1.0 };
        let range = "`alpha` of divergence `skewed_reverse_kl` is 1, expected a number above 0 and below 1; for 0 use `reverse-kl`";
        assert_eq!(message(None, &[Target { divergence: skewed, ..target }], &both), range);
    }
}
