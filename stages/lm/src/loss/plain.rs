//! The loss by plain operations and autograd: on devices without a kernel, and what kernels are tested against.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};

use super::{Answer, Divergence, Request, Source, Target, TopK, wide};
use crate::kernels::adaptive::share_of_head;
use crate::kernels::elementary::LOG_FLOOR;
use crate::terms::divergence::{Rule, Token, for_rule};
use crate::terms::formula::{Formula, Given, Operation};

/// Logits that a chunk of plain operations may have: 256 MiB in f32, of which a handful live at a time. Large,
/// because on an accelerator a chunk should fill the device.
const CHUNK_LOGITS: usize = 1 << 26;

/// Rows of a chunk.
pub(super) fn rows_per_chunk(vocabulary: usize) -> usize {
    (CHUNK_LOGITS / vocabulary).max(16)
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

impl Request<'_> {
    /// By plain operations and autograd, `rows` rows at a time, so that the graph of one chunk is all that lives.
    pub(super) fn by_chunks(&self, hidden_gradient: bool, head_gradient: bool, rows: usize) -> Result<Answer> {
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
    pub(super) fn plain_terms(&self) -> Result<Vec<Tensor>> {
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
            terms.push(divergence(target.divergence, &log_s, &log_t.to_dtype(log_s.dtype())?)?);
        }
        Ok(terms)
    }
}

/// A divergence of each row by plain operations, from log-probabilities `[N, V]`; `[N]`.
fn divergence(divergence: Divergence, log_s: &Tensor, log_t: &Tensor) -> Result<Tensor> {
    let formula = Formula::default();
    let [s, log_s_given, t, log_t_given, a, b] = Given::ALL.map(|given| formula.given(given));
    let token = Token { s, log_s: log_s_given, t, log_t: log_t_given };
    let value = for_rule!(divergence, R(_a, _b) => R::summand(token, a, b).value);
    // Of every row, `[N, 1]`.
    let shares = |head: f64| -> Result<Tensor> {
        let rows = |log: &Tensor| -> Result<Vec<Vec<f32>>> {
            Ok(log.detach().exp()?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2()?)
        };
        let share = |(t, s): (Vec<f32>, Vec<f32>)| share_of_head(head, &t.into_iter().zip(s).collect::<Vec<_>>());
        let shares: Vec<f64> = rows(log_t)?.into_iter().zip(rows(log_s)?).map(share).collect();
        Ok(Tensor::from_vec(shares, (log_s.dim(0)?, 1), log_s.device())?)
    };
    let parameters = match divergence {
        Divergence::AdaptiveKl { head } => [shares(head)?, Tensor::new(0.0, log_s.device())?],
        other => {
            let [a, b] = other.parameters(|head| head).map(|value| Tensor::new(value, log_s.device()));
            [a?, b?]
        }
    };
    let number = |value: &Tensor| -> Result<Tensor> { Ok(value.to_dtype(log_s.dtype())?.broadcast_as(log_s.shape())?) };
    let mut operate = |operation: Operation<Tensor>| -> Result<Tensor> {
        Ok(match operation {
            Operation::Given(Given::S) => log_s.exp()?,
            Operation::Given(Given::LogS) => log_s.clone(),
            Operation::Given(Given::T) => log_t.exp()?,
            Operation::Given(Given::LogT) => log_t.clone(),
            Operation::Given(Given::A) => number(&parameters[0])?,
            Operation::Given(Given::B) => number(&parameters[1])?,
            Operation::Add(x, y) => (x + y)?,
            Operation::Sub(x, y) => (x - y)?,
            Operation::Mul(x, y) => (x * y)?,
            Operation::Div(x, y) => (x / y)?,
            Operation::Neg(x) => x.neg()?,
            Operation::Half(x) => (x * 0.5)?,
            Operation::Complement(x) => (1.0 - x)?,
            Operation::Abs(x) => x.abs()?,
            Operation::Sign(x) => x.sign()?,
            Operation::Exp(x) => x.exp()?,
            Operation::AboveZero(x) => above_zero(&x)?,
            // Apart: the derivative of a ratio would divide by the square of `y`, which may be 0.
            Operation::LogRatio(x, y) => (above_zero(&x)?.log()? - y.log()?)?,
        })
    };
    Ok(formula.compute(value, &mut operate)?.sum(1)?)
}

fn above_zero(x: &Tensor) -> Result<Tensor> {
    Ok(x.maximum(f64::from(f32::MIN_POSITIVE))?)
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

/// A variable with the values of `tensor`, cut off from how they were computed.
pub(super) fn variable(tensor: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(tensor)?.into_inner())
}
