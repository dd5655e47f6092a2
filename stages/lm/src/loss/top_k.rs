//! The most likely tokens of a model's distributions.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::finite::NotFinite;
use crate::host::elements;
use crate::kernels::by_row;
use crate::kernels::elementary::LOG_FLOOR;
use crate::kernels::head::rows_per_chunk;
use crate::kernels::top_k::{NO_CLASS, most_likely, of_classes};
use crate::terms::divergence::check_temperature;
use crate::terms::top_k::{Classes, TopK};

impl TopK {
    /// Of `softmax(hidden headᵀ / temperature)`, best first, and of equally likely tokens the lower id first. `hidden` is
    /// `[N, D]`, `head` `[V, D]`. Chunked.
    ///
    /// Errors when shapes do not fit, `k` is not within 1 to V, or, with [`NotFinite`], a distribution is not made of numbers.
    pub fn of(hidden: &Tensor, head: &Tensor, k: usize, temperature: f64) -> Result<Self> {
        let vocabulary = head.dim(0)?;
        ensure!(k > 0 && k <= vocabulary, "`k` is {k}, expected 1 to {vocabulary}, the size of the vocabulary");
        check_temperature(temperature).context("temperature of a model")?;
        TopK::by_row(hidden, head, (vocabulary, k), |logits, tokens, log_probs| {
            most_likely(logits, (1.0 / temperature) as f32, tokens, log_probs)
        })
    }

    /// What `softmax(hidden headᵀ / temperature)` says of `count` classes of tokens: a distribution over the classes, without rest,
    /// whose ids are their numbers. `classes` has the class of each of the head's V tokens; what is of none counts as if it were not
    /// there. So a model speaks in the words of one that has another tokenizer.
    ///
    /// `hidden` is `[N, D]`, `head` `[V, D]`. Chunked. Errors as [`TopK::of`] does.
    pub fn of_classes(
        hidden: &Tensor,
        head: &Tensor,
        classes: &[Option<u32>],
        count: usize,
        temperature: f64,
    ) -> Result<Self> {
        let vocabulary = head.dim(0)?;
        ensure!(classes.len() == vocabulary, "{} of {vocabulary} tokens have a class", classes.len());
        let inside = classes.iter().flatten().all(|class| (*class as usize) < count);
        ensure!(inside && classes.iter().any(Option::is_some), "a token's class is none of the {count}");
        check_temperature(temperature).context("temperature of a model")?;
        let classes: Vec<u32> = classes.iter().map(|class| class.unwrap_or(NO_CLASS)).collect();
        TopK::by_row(hidden, head, (count, count), |logits, tokens, log_probs| {
            tokens.iter_mut().zip(0..).for_each(|(token, class)| *token = class);
            of_classes(logits, (1.0 / temperature) as f32, &classes, log_probs);
            LOG_FLOOR
        })
    }

    /// Of `vocabulary` tokens, what `keep` makes of the logits of every row: K of them with their log-probabilities, and the
    /// logarithm of the rest.
    fn by_row(
        hidden: &Tensor,
        head: &Tensor,
        (vocabulary, k): (usize, usize),
        keep: impl Fn(&mut [f32], &mut [u32], &mut [f32]) -> f32 + Sync,
    ) -> Result<Self> {
        let (rows, width) = hidden.dims2().context("`hidden` of a model must be [rows, width]")?;
        let (columns, head_width) = head.dims2().context("`head` of a model must be [vocabulary, width]")?;
        ensure!(width == head_width, "`head` has width {head_width}, expected {width} as in `hidden`");
        let mut kept = TopK {
            vocabulary,
            k,
            tokens: vec![0; rows * k],
            log_probs: vec![0.0; rows * k],
            log_rest: vec![0.0; rows],
        };
        let chunk = rows_per_chunk(columns);
        let head = head.detach().to_dtype(DType::F32)?;
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            let hidden = hidden.detach().narrow(0, start, count)?.to_dtype(DType::F32)?; // [R, D]
            let mut logits = logits(&hidden, &head)?; // [R, V]
            let places = start * k..(start + count) * k;
            let tokens = kept.tokens[places.clone()].par_chunks_mut(k);
            let outputs =
                tokens.zip(kept.log_probs[places].par_chunks_mut(k)).zip(&mut kept.log_rest[start..][..count]);
            outputs.zip(logits.par_chunks_mut(columns)).for_each(|(((tokens, log_probs), log_rest), logits)| {
                *log_rest = keep(logits, tokens, log_probs);
            });
        }
        let finite = |row: usize| {
            let Classes { log_probs, log_rest, .. } = kept.row(row);
            log_rest.is_finite() && log_probs.iter().all(|log| log.is_finite())
        };
        if let Some(index) = (0..rows).find(|row| !finite(*row)) {
            bail!(NotFinite { index });
        }
        Ok(kept)
    }

    /// Log-probabilities of the tokens and, where there is one, the rest: `[N, K]` or `[N, K + 1]`.
    pub(crate) fn classes(&self, logits: &Tensor) -> Result<Tensor> {
        let (rows, vocabulary) = logits.dims2()?;
        let of_tokens = Tensor::from_slice(&self.log_probs, (rows, self.k), logits.device())?;
        if self.k == vocabulary {
            return Ok(of_tokens);
        }
        let of_rest = Tensor::from_slice(&self.log_rest, (rows, 1), logits.device())?;
        Ok(Tensor::cat(&[of_tokens, of_rest], 1)?)
    }

    /// Log-probabilities `[N, V]` of the trainee made as coarse as this, in the shape of [`TopK::classes`].
    pub(crate) fn coarsened(&self, log_s: &Tensor) -> Result<Tensor> {
        let (rows, vocabulary) = log_s.dims2()?;
        let tokens = Tensor::from_slice(&self.tokens, (rows, self.k), log_s.device())?;
        let of_tokens = log_s.gather(&tokens, 1)?; // [N, K]
        if self.k == vocabulary {
            return Ok(of_tokens);
        }
        // As good as negative infinity, but for its gradient, which is a number.
        let nowhere = Tensor::full(-1e30_f32, (rows, self.k), log_s.device())?.to_dtype(log_s.dtype())?;
        let rest = (log_s + log_s.zeros_like()?.scatter_add(&tokens, &nowhere, 1)?)?;
        let max = rest.detach().max_keepdim(1)?;
        let of_rest = (rest.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?; // [N, 1]
        Ok(Tensor::cat(&[of_tokens, of_rest.maximum(f64::from(LOG_FLOOR))?], 1)?)
    }
}

/// `hidden headᵀ`, row after row. On the CPU a row's bits do not depend on the rows beside it.
fn logits(hidden: &Tensor, head: &Tensor) -> Result<Vec<f32>> {
    if !hidden.device().is_cpu() {
        return Ok(hidden.matmul(&head.t()?)?.flatten_all()?.to_vec1()?);
    }
    let (width, hidden, head) = (hidden.dim(1)?, hidden.contiguous()?, head.contiguous()?);
    let (hidden, head) = (elements(&hidden)?, elements(&head)?);
    Ok(by_row::product_transposed(&hidden, &head, width))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::kernels::testing::{numbers, with_threads};
    use crate::loss::{Divergence, HeadLoss, Source, Target, divergence_values, head_loss, head_loss_plain};
    use crate::terms::divergence::tests::EVERY_DIVERGENCE;

    const CPU: Device = Device::Cpu;

    const ROWS: usize = 7;
    const WIDTH: usize = 5;

    fn tensor(seed: u64, rows: usize, columns: usize, dtype: DType) -> Tensor {
        Tensor::from_vec(numbers(seed, rows * columns), (rows, columns), &CPU).unwrap().to_dtype(dtype).unwrap()
    }

    fn variable(tensor: Tensor) -> Tensor {
        Var::from_tensor(&tensor).unwrap().into_inner()
    }

    /// Trainee `[ROWS, WIDTH]` and `[V, WIDTH]`, then the target's in another width.
    fn models(vocabulary: usize, dtype: DType) -> [Tensor; 4] {
        [
            variable(tensor(1, ROWS, WIDTH, dtype)),
            variable(tensor(2, vocabulary, WIDTH, dtype)),
            tensor(3, ROWS, WIDTH + 2, dtype),
            tensor(4, vocabulary, WIDTH + 2, dtype),
        ]
    }

    fn target(kept: &TopK, divergence: Divergence, temperature: f64) -> Target<'_> {
        Target { source: Source::TopK(kept), divergence, coefficient: 0.8, temperature }
    }

    fn doubles(tensor: &Tensor) -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn near(found: &[f64], right: &[f64], tolerance: f64, what: &str) {
        let largest = right.iter().fold(1e-30_f64, |a, b| a.max(b.abs()));
        assert_eq!(found.len(), right.len(), "{what}");
        for (found, right) in found.iter().zip(right) {
            assert!((found - right).abs() <= tolerance * largest, "{what}: {found}, expected {right}");
        }
    }

    /// Weights of the rows: one of them is 0.
    const WEIGHTS: [f32; ROWS] = [0.1, 0.3, 0.0, 0.2, 0.2, 0.1, 0.4];

    type Loss = fn(&Tensor, &Tensor, Option<(&[u32], f64)>, &[Target], &[f32]) -> Result<HeadLoss>;

    /// Value, and gradients of hidden states and head, beside a cross-entropy.
    fn run(loss: Loss, [hidden, head, ..]: &[Tensor; 4], target: Target) -> [Vec<f64>; 3] {
        let labels = [0, 1, 2, 3, 2, 1, 0];
        let loss = loss(hidden, head, Some((&labels, 0.3)), &[target], &WEIGHTS).unwrap();
        let store = (&loss.loss * 3.0).unwrap().backward().unwrap();
        let gradient = |tensor| doubles(store.get(tensor).unwrap());
        let divergence = loss.divergences[0];
        [vec![divergence, doubles(&loss.loss)[0]], gradient(hidden), gradient(head)]
    }

    #[test]
    fn the_most_likely_tokens_are_found_in_order() {
        for (vocabulary, temperature) in [(6, 1.0), (700, 0.7), (1030, 2.0)] {
            let [.., hidden, head] = models(vocabulary, DType::F32);
            let logits = hidden.matmul(&head.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
            for k in [1, 5, 6] {
                let kept = TopK::of(&hidden, &head, k, temperature).unwrap();
                assert_eq!(kept.rows(), ROWS);
                for (row, logits) in logits.iter().enumerate() {
                    let mut order: Vec<usize> = (0..vocabulary).collect();
                    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
                    let weights: Vec<f64> = logits.iter().map(|x| (f64::from(*x) / temperature).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let found = kept.row(row);
                    for (place, token) in order[..k].iter().enumerate() {
                        assert_eq!(found.tokens[place] as usize, *token);
                        let right = (weights[*token] / total).ln();
                        assert!((f64::from(found.log_probs[place]) - right).abs() < 1e-5 * (1.0 + right.abs()));
                    }
                    let rest: f64 = order[k..].iter().map(|token| weights[*token]).sum();
                    let right = (rest / total).ln().max(-1e4);
                    assert!(
                        (f64::from(found.log_rest) - right).abs() < 1e-5 * (1.0 + right.abs()),
                        "{found:?} {right}"
                    );
                }
            }
        }
    }

    #[test]
    fn of_equally_likely_tokens_the_first_are_kept() {
        let head = Tensor::from_vec(vec![1.0_f32, 2.0, 2.0, 0.5, 2.0, 1.0], (6, 1), &CPU).unwrap();
        let hidden = Tensor::ones((1, 1), DType::F32, &CPU).unwrap();
        assert_eq!(TopK::of(&hidden, &head, 2, 1.0).unwrap().tokens, [1, 2]);
        assert_eq!(TopK::of(&hidden, &head, 5, 1.0).unwrap().tokens, [1, 2, 4, 0, 5]);
    }

    #[test]
    fn the_kernel_agrees_with_its_twin() {
        for (vocabulary, k) in [(5, 1), (33, 4), (33, 32), (600, 40), (1030, 1)] {
            let (narrow, wide) = (models(vocabulary, DType::F32), models(vocabulary, DType::F64));
            for (divergence, temperature) in EVERY_DIVERGENCE.into_iter().zip([1.0, 1.0, 2.0, 0.7, 1.5, 1.0, 1.0, 1.2])
            {
                let kept = TopK::of(&narrow[2], &narrow[3], k, temperature).unwrap();
                let found = run(head_loss, &narrow, target(&kept, divergence, temperature));
                let right = run(head_loss_plain, &wide, target(&kept, divergence, temperature));
                let chunked = run(head_loss, &wide, target(&kept, divergence, temperature));
                for (i, right) in right.iter().enumerate() {
                    near(&found[i], right, 1e-5, &format!("{divergence:?}, {k} of {vocabulary}, part {i}"));
                    near(&chunked[i], right, 1e-10, &format!("{divergence:?} in chunks, part {i}"));
                }
            }
        }
    }

    #[test]
    fn keeping_every_token_is_the_whole_divergence() {
        let vocabulary = 21;
        let models = models(vocabulary, DType::F32);
        let kept = TopK::of(&models[2], &models[3], vocabulary, 1.3).unwrap();
        assert!(kept.log_rest.iter().all(|log| *log == LOG_FLOOR));
        let source = Source::Head { hidden: &models[2], head: &models[3] };
        for divergence in EVERY_DIVERGENCE {
            let coarse = target(&kept, divergence, 1.3);
            for loss in [head_loss as Loss, head_loss_plain] {
                let (found, right) = (run(loss, &models, coarse), run(loss, &models, Target { source, ..coarse }));
                for (found, right) in found.iter().zip(&right) {
                    near(found, right, 2e-5, &format!("{divergence:?}"));
                }
            }
        }
    }

    #[test]
    fn a_trainee_with_padding_is_compared_over_the_tokens_that_were_kept() {
        let (models, padded) = (models(21, DType::F32), models(33, DType::F32));
        let kept = TopK::of(&models[2], &models[3], 4, 1.3).unwrap();
        let head = variable(Tensor::cat(&[&models[1], &padded[1].narrow(0, 21, 12).unwrap()], 0).unwrap());
        for divergence in EVERY_DIVERGENCE {
            let targets = [target(&kept, divergence, 1.3)];
            let right = head_loss(&models[0], &models[1], None, &targets, &WEIGHTS).unwrap();
            let right_store = right.loss.backward().unwrap();
            for loss in [head_loss as Loss, head_loss_plain] {
                let found = loss(&models[0], &head, None, &targets, &WEIGHTS).unwrap();
                near(&found.divergences, &right.divergences, 2e-5, &format!("{divergence:?}"));
                let store = found.loss.backward().unwrap();
                let gradient = store.get(&head).unwrap();
                let of_tokens = doubles(&gradient.narrow(0, 0, 21).unwrap());
                near(&of_tokens, &doubles(right_store.get(&models[1]).unwrap()), 2e-5, &format!("{divergence:?}"));
                assert!(doubles(&gradient.narrow(0, 21, 12).unwrap()).iter().all(|x| *x == 0.0));
            }
        }
    }

    /// Of an f-divergence. The alpha-beta one here has exponents that do not add up to 1.
    #[test]
    fn fewer_tokens_never_give_a_larger_divergence() {
        let vocabulary = 60;
        let [hidden, head, target_hidden, target_head] = models(vocabulary, DType::F32);
        for divergence in &EVERY_DIVERGENCE[..6] {
            let values = |k| {
                let kept = TopK::of(&target_hidden, &target_head, k, 1.0).unwrap();
                divergence_values(&hidden, &head, &[target(&kept, *divergence, 1.0)]).unwrap().remove(0)
            };
            let mut before = values(1);
            for k in [2, 5, 20, 59, 60] {
                let now = values(k);
                assert!(before.iter().zip(&now).all(|(a, b)| *a <= b + 1e-6 && *a >= -1e-6), "{divergence:?}, {k}");
                before = now;
            }
        }
    }

    #[test]
    fn gradients_are_what_differences_of_the_value_give() {
        let models = models(11, DType::F64);
        let [hidden, head, ..] = &models;
        // No gradient flows through the share of an adaptive one.
        for divergence in EVERY_DIVERGENCE.into_iter().filter(|divergence| !divergence.is_adaptive()) {
            let kept = TopK::of(&models[2], &models[3], 3, 1.7).unwrap();
            let value = |hidden: &Tensor, head: &Tensor| {
                let loss = head_loss_plain(hidden, head, None, &[target(&kept, divergence, 1.7)], &WEIGHTS).unwrap();
                doubles(&loss.loss)[0]
            };
            // The fused kernel's gradients, against differences of its twin in f64.
            let narrow = [hidden, head].map(|tensor| variable(tensor.to_dtype(DType::F32).unwrap()));
            let targets = [target(&kept, divergence, 1.7)];
            let store = head_loss(&narrow[0], &narrow[1], None, &targets, &WEIGHTS).unwrap().loss.backward().unwrap();
            for (which, (tensor, narrow)) in [hidden, head].into_iter().zip(&narrow).enumerate() {
                let (found, at) = (doubles(store.get(narrow).unwrap()), doubles(tensor));
                let slope = |i: usize| {
                    let moved = |step: f64| {
                        let mut moved = at.clone();
                        moved[i] += step;
                        let moved = Tensor::from_vec(moved, tensor.shape(), &CPU).unwrap();
                        if which == 0 { value(&moved, head) } else { value(hidden, &moved) }
                    };
                    (moved(1e-5) - moved(-1e-5)) / 2e-5
                };
                let right: Vec<f64> = (0..at.len()).map(slope).collect();
                near(&found, &right, 1e-5, &format!("{divergence:?}, argument {which}"));
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let models = models(5000, DType::F32);
        let all = || {
            let kept = TopK::of(&models[2], &models[3], 9, 1.0).unwrap();
            let loss = run(head_loss, &models, target(&kept, Divergence::ReverseKl, 1.0));
            (kept, loss)
        };
        let one = with_threads(1, all);
        assert!([2, 3].into_iter().all(|threads| with_threads(threads, all) == one));
    }

    /// Logits of some hundreds: nothing is left for the rest, or for the kept tokens.
    #[test]
    fn far_apart_distributions_give_finite_losses_and_gradients() {
        let [hidden, head, target_hidden, target_head] = models(40, DType::F32);
        let hidden = variable((hidden * 200.0).unwrap().detach());
        let kept = TopK::of(&(target_hidden * 200.0).unwrap(), &target_head, 2, 1.0).unwrap();
        for divergence in EVERY_DIVERGENCE {
            let loss = head_loss(&hidden, &head, None, &[target(&kept, divergence, 1.0)], &[1.0; ROWS]).unwrap();
            let store = loss.loss.backward().unwrap();
            let gradients = [&hidden, &head].map(|tensor| doubles(store.get(tensor).unwrap()));
            assert!(loss.divergences[0].is_finite() && gradients.iter().flatten().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn a_broken_trainee_gives_nan_and_a_broken_target_an_error() {
        let models = models(12, DType::F32);
        let broken = (&models[2] * f64::NAN).unwrap();
        let error = TopK::of(&broken, &models[3], 2, 1.0).unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&NotFinite { index: 0 }));
        let kept = TopK::of(&models[2], &models[3], 2, 1.0).unwrap();
        let hidden = (&models[0] * f64::NAN).unwrap();
        for divergence in EVERY_DIVERGENCE {
            for loss in [head_loss as Loss, head_loss_plain] {
                let loss = loss(&hidden, &models[1], None, &[target(&kept, divergence, 1.0)], &WEIGHTS).unwrap();
                assert!(loss.divergences[0].is_nan(), "{divergence:?} hides a NaN");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let [hidden, head, target_hidden, target_head] = models(12, DType::F32);
        let error = |k| TopK::of(&target_hidden, &target_head, k, 1.0).unwrap_err().to_string();
        assert_eq!(error(0), "`k` is 0, expected 1 to 12, the size of the vocabulary");
        assert_eq!(error(13), "`k` is 13, expected 1 to 12, the size of the vocabulary");
        let kept = TopK::of(&target_hidden, &target_head, 2, 1.0).unwrap();
        let message = |kept: &TopK| {
            let targets = [target(kept, Divergence::ForwardKl, 1.0)];
            head_loss(&hidden, &head, None, &targets, &WEIGHTS).err().unwrap().to_string()
        };
        assert_eq!(message(&kept.select(&[0, 1])), "target 0 has 2 rows, expected 7");
        let larger = TopK { vocabulary: 13, ..kept.clone() };
        let other = "target 0 is over 13 tokens, expected 12 at most: both models must share a vocabulary";
        assert_eq!(message(&larger), other);
        let mut other = kept.clone();
        other.tokens[3] = 12;
        let outside = "target 0 keeps token 12, expected less than 12: both models must share a vocabulary";
        assert_eq!(message(&other), outside);
    }
}
