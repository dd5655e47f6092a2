//! Losses of an output head and their gradients on a CPU, over chunks of rows.
//!
//! A chunk is as many rows as keep its logits within some megabytes. For each: logits of the trainee, logits of each
//! target, loss and its derivative by the logits row by row, and from that the gradients of hidden states and head.
//! Matrix products and rows are shared between threads; every number is added up in an order that depends on the shapes
//! alone, so that the bits are the same for any number of threads.
//!
//! Letters: N rows, C width of the trainee, D width of a target, V vocabulary, of which a target is over the first U, R rows
//! of a chunk.

use std::borrow::Cow;

use rayon::prelude::*;

use super::adaptive::share_of_head;
use super::elementary::{BLOCK, Normaliser, all_finite, exp, ln, sum};
use super::matmul::{Matrix, product, product_in, product_into};
use super::top_k;
use crate::terms::divergence::{Divergence, Rule, Token, for_rule};
use crate::terms::formula::Number;
use crate::terms::top_k::TopK;

/// What is asked for. Matrices are dense and row-major; their lengths must fit together.
pub(crate) struct Input<'a> {
    /// Final hidden states of the trainee, `[N, C]`.
    pub(crate) hidden: &'a [f32],
    /// Its output head, `[V, C]`.
    pub(crate) head: &'a [f32],
    /// C.
    pub(crate) width: usize,
    /// V.
    pub(crate) vocabulary: usize,
    /// Tokens below V, and the coefficient of their cross-entropy.
    pub(crate) labels: Option<(&'a [u32], f64)>,
    /// Distributions to come close to.
    pub(crate) targets: Vec<InputTarget<'a>>,
    /// `[N]`; a row of weight 0 costs nothing.
    pub(crate) weights: &'a [f32],
}

/// A distribution to come close to.
pub(crate) struct InputTarget<'a> {
    pub(crate) source: InputSource<'a>,
    pub(crate) divergence: Divergence,
    pub(crate) coefficient: f64,
    pub(crate) temperature: f64,
}

/// What a target's distribution is made of.
pub(crate) enum InputSource<'a> {
    /// Hidden states `[N, D]` and head `[U, D]` over the first U tokens, of width D.
    Head { hidden: &'a [f32], head: &'a [f32], width: usize },
    /// The K most likely tokens and the rest.
    TopK(&'a TopK),
}

/// What came out.
pub(crate) struct Output {
    /// Per row the cross-entropy, where there are labels, and then the divergence from each target; `[N, terms]`.
    /// Without weight and coefficient; 0 for rows of weight 0, not a number where a logit is not finite.
    pub(crate) terms: Vec<f64>,
    /// Gradient of the weighted sum by the hidden states, `[N, C]`, where asked for.
    pub(crate) hidden_gradient: Option<Vec<f32>>,
    /// Gradient by the head, `[V, C]`, where asked for.
    pub(crate) head_gradient: Option<Vec<f32>>,
}

/// Logits that one buffer may hold, as long as that leaves [`FEWEST_ROWS`]: 32 MiB. With GPT-2's vocabulary that is
/// 160 rows; 80 are a tenth slower, and all at once no faster.
const CHUNK_LOGITS: usize = 1 << 23;

/// A chunk has at least so many rows, since it reads and writes the whole head.
const FEWEST_ROWS: usize = 16;

/// And at most so many: more gain nothing.
const MOST_ROWS: usize = 1024;

/// Rows that are done at once.
pub(crate) fn rows_per_chunk(vocabulary: usize) -> usize {
    let rows = (CHUNK_LOGITS / vocabulary.max(1)).clamp(FEWEST_ROWS, MOST_ROWS);
    rows / FEWEST_ROWS * FEWEST_ROWS
}

/// The rows that count: those whose weight is not 0.
pub(crate) fn active(weights: &[f32]) -> impl Iterator<Item = usize> {
    (0..weights.len()).filter(|&row| weights[row] != 0.0)
}

/// Losses and gradients of all rows.
pub(crate) fn head_terms(input: &Input, hidden_gradient: bool, head_gradient: bool) -> Output {
    let (width, vocabulary) = (input.width, input.vocabulary);
    let active: Vec<usize> = active(input.weights).collect();
    let count = usize::from(input.labels.is_some()) + input.targets.len();
    let mut output = Output {
        terms: vec![0.0; input.weights.len() * count],
        hidden_gradient: hidden_gradient.then(|| vec![0.0; input.hidden.len()]),
        head_gradient: None,
    };
    // Without targets there is one buffer in place of three, for three times the rows.
    let most = rows_per_chunk(if input.targets.is_empty() { vocabulary.div_ceil(3) } else { vocabulary });
    // Chunks of equal size: a last one of a single row would be slow, and a long sum for it less accurate.
    let chunks = active.len().div_ceil(most);
    let rows = active.len().div_ceil(chunks.max(1));
    let mut buffers = Buffers::new(rows, vocabulary, input.targets.is_empty(), hidden_gradient || head_gradient);
    for chunk in active.chunks(rows.max(1)) {
        let hidden = select(input.hidden, width, chunk); // [R, C]
        let (terms, slopes) = buffers.terms(input, &hidden, chunk); // [R, terms], [R, V]
        for (terms, &row) in terms.chunks(count).zip(chunk) {
            output.terms[row * count..(row + 1) * count].copy_from_slice(terms);
        }
        if let Some(gradient) = &mut output.hidden_gradient {
            let mut rows = vec![0.0; chunk.len() * width];
            product_into(&mut rows, Matrix::new(slopes, vocabulary), Matrix::new(input.head, width), false);
            for (values, &row) in rows.chunks(width).zip(chunk) {
                gradient[row * width..(row + 1) * width].copy_from_slice(values);
            }
        }
        if head_gradient {
            let (slopes, hidden) = (Matrix::new(slopes, vocabulary).transposed(), Matrix::new(&hidden, width));
            match &mut output.head_gradient {
                Some(gradient) => product_into(gradient, slopes, hidden, true),
                None => output.head_gradient = Some(product(slopes, hidden)),
            }
        }
    }
    if head_gradient && output.head_gradient.is_none() {
        output.head_gradient = Some(vec![0.0; input.head.len()]);
    }
    output
}

/// The rows at `indices`, copied only where they do not follow each other.
fn select<'a>(matrix: &'a [f32], width: usize, indices: &[usize]) -> Cow<'a, [f32]> {
    let (first, last) = (indices[0], indices[indices.len() - 1]);
    if last - first + 1 == indices.len() {
        return Cow::Borrowed(&matrix[first * width..(last + 1) * width]);
    }
    Cow::Owned(indices.iter().flat_map(|&row| &matrix[row * width..(row + 1) * width]).copied().collect())
}

/// All memory that grows with the vocabulary, reused from chunk to chunk: three times `[R, V]`, or once without targets.
struct Buffers {
    vocabulary: usize,
    gradient: bool,
    logits: Vec<f32>,
    target: Vec<f32>,
    slopes: Vec<f32>,
}

impl Buffers {
    fn new(rows: usize, vocabulary: usize, no_target: bool, gradient: bool) -> Self {
        let size = rows * vocabulary;
        Buffers {
            vocabulary,
            gradient,
            logits: Vec::new(),
            target: vec![0.0; if no_target { 0 } else { size }],
            slopes: vec![0.0; if gradient && !no_target { size } else { 0 }],
        }
    }

    /// Terms of the rows of one chunk, `[R, terms]`, and the derivative of their weighted sum by the logits, `[R, V]`
    /// (empty where no gradient is asked for).
    fn terms(&mut self, input: &Input, hidden: &[f32], chunk: &[usize]) -> (Vec<f64>, &[f32]) {
        let vocabulary = self.vocabulary;
        let head = Matrix::new(input.head, input.width);
        product_in(&mut self.logits, Matrix::new(hidden, input.width), head.transposed());
        if let (Some((labels, coefficient)), []) = (input.labels, input.targets.as_slice()) {
            return self.cross_entropies(labels, coefficient, input.weights, chunk);
        }
        let logits = &self.logits;
        let slopes_length = self.slopes.len().min(logits.len());
        let slopes = &mut self.slopes[..slopes_length];
        slopes.fill(0.0);
        let weights: Vec<f64> = chunk.iter().map(|&row| f64::from(input.weights[row])).collect();
        let count = usize::from(input.labels.is_some()) + input.targets.len();
        let mut terms = vec![0.0; chunk.len() * count];

        // Rows of an empty matrix: one empty slice a row.
        let slope_width = if slopes.is_empty() { 0 } else { vocabulary };
        let mut slope_rows: Vec<&mut [f32]> = split_rows(slopes, slope_width, chunk.len());
        if let Some((labels, coefficient)) = input.labels {
            slope_rows
                .par_iter_mut()
                .zip(logits.par_chunks(vocabulary))
                .zip(terms.par_chunks_mut(count))
                .enumerate()
                .for_each(|(i, ((slopes, logits), terms))| {
                    terms[0] = cross_entropy(logits, labels[chunk[i]] as usize, weights[i] * coefficient, slopes);
                });
        }
        for (t, target) in input.targets.iter().enumerate() {
            let term = t + usize::from(input.labels.is_some());
            let compared = match target.source {
                InputSource::Head { head, width, .. } => head.len() / width,
                InputSource::TopK(kept) => kept.vocabulary,
            };
            let scratch = &mut self.target[..chunk.len() * compared];
            if let InputSource::Head { hidden, head, width } = target.source {
                let hidden = select(hidden, width, chunk); // [R, D]
                product_into(scratch, Matrix::new(&hidden, width), Matrix::new(head, width).transposed(), false);
            }
            slope_rows
                .par_iter_mut()
                .zip(logits.par_chunks(vocabulary))
                .zip(scratch.par_chunks_mut(compared))
                .zip(terms.par_chunks_mut(count))
                .enumerate()
                .for_each(|(i, (((slopes, logits), scratch), terms))| {
                    let (factor, temperature) = (weights[i] * target.coefficient, target.temperature);
                    let (logits, open) = (&logits[..compared], slopes.len().min(compared));
                    let slopes = &mut slopes[..open];
                    terms[term] = match target.source {
                        InputSource::Head { .. } => {
                            divergence(target.divergence, logits, scratch, temperature, factor, slopes)
                        }
                        InputSource::TopK(kept) => {
                            let classes = kept.row(chunk[i]);
                            top_k::divergence(target.divergence, logits, classes, scratch, temperature, factor, slopes)
                        }
                    };
                });
        }
        (terms, &self.slopes[..slopes_length])
    }

    /// [`Buffers::terms`] of labels alone: slopes take the place of logits.
    fn cross_entropies(
        &mut self,
        labels: &[u32],
        coefficient: f64,
        weights: &[f32],
        chunk: &[usize],
    ) -> (Vec<f64>, &[f32]) {
        let gradient = self.gradient;
        let rows = self.logits.par_chunks_mut(self.vocabulary).zip(chunk);
        let term = |(logits, &row): (&mut [f32], &usize)| {
            let label = labels[row] as usize;
            if !all_finite(logits) {
                return f64::NAN;
            }
            let normaliser = Normaliser::of(logits, 1.0);
            let term = -f64::from(normaliser.log_probability(logits[label]));
            if gradient {
                let factor = (f64::from(weights[row]) * coefficient) as f32;
                logits.iter_mut().for_each(|x| *x = factor * exp(normaliser.log_probability(*x)));
                logits[label] -= factor;
            }
            term
        };
        let terms: Vec<f64> = rows.map(term).collect();
        (terms, if gradient { &self.logits } else { &[] })
    }
}

/// `count` rows of `width`, which may be 0.
fn split_rows(mut matrix: &mut [f32], width: usize, count: usize) -> Vec<&mut [f32]> {
    (0..count)
        .map(|_| {
            let (row, rest) = std::mem::take(&mut matrix).split_at_mut(width);
            matrix = rest;
            row
        })
        .collect()
}

/// Minus the log-probability of `label`. Adds `factor * (softmax(logits) - onehot(label))` to `slopes`, unless that
/// is empty.
fn cross_entropy(logits: &[f32], label: usize, factor: f64, slopes: &mut [f32]) -> f64 {
    if !all_finite(logits) {
        return f64::NAN;
    }
    let normaliser = Normaliser::of(logits, 1.0);
    if !slopes.is_empty() {
        let factor = factor as f32;
        for (slope, logit) in slopes.iter_mut().zip(logits) {
            *slope += factor * exp(normaliser.log_probability(*logit));
        }
        slopes[label] -= factor;
    }
    -f64::from(normaliser.log_probability(logits[label]))
}

/// Divergence of `softmax(logits / temperature)` from `softmax(target / temperature)`. Adds `factor` times its
/// derivative by `logits` to `slopes`, unless that is empty. `target` is used up.
pub(crate) fn divergence(
    divergence: Divergence,
    logits: &[f32],
    target: &mut [f32],
    temperature: f64,
    factor: f64,
    slopes: &mut [f32],
) -> f64 {
    let parameters = divergence.parameters(|head| {
        let scale = (1.0 / temperature) as f32;
        let (of_logits, of_target) = (Normaliser::of(logits, scale), Normaliser::of(target, scale));
        let token = |(s, t): (&f32, &f32)| (exp(of_target.log_probability(*t)), exp(of_logits.log_probability(*s)));
        let tokens: Vec<(f32, f32)> = logits.iter().zip(target.iter()).map(token).collect();
        share_of_head(head, &tokens)
    });
    for_rule!(divergence, R(_a, _b) => by_rule::<R>(parameters, logits, target, temperature, factor, slopes))
}

impl Number for f32 {
    #[inline(always)]
    fn half(self) -> f32 {
        0.5 * self
    }

    #[inline(always)]
    fn complement(self) -> f32 {
        1.0 - self
    }

    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }

    #[inline(always)]
    fn sign(self) -> f32 {
        let sign = if self > 0.0 { 1.0 } else { -1.0 };
        if self == 0.0 { 0.0 } else { sign }
    }

    #[inline(always)]
    fn exp(self) -> f32 {
        exp(self)
    }

    #[inline(always)]
    fn above_zero(self) -> f32 {
        if self < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { self }
    }

    #[inline(always)]
    fn log_ratio(self, y: f32) -> f32 {
        ln((self / y).above_zero())
    }
}

/// Value and slopes for one rule: `dD/dz = (h - s sum(h)) / temperature`.
fn by_rule<R: Rule>(
    parameters: [f64; 2],
    logits: &[f32],
    target: &mut [f32],
    temperature: f64,
    factor: f64,
    slopes: &mut [f32],
) -> f64 {
    if !(all_finite(logits) && all_finite(target)) {
        return f64::NAN;
    }
    let [a, b] = parameters.map(|parameter| parameter as f32);
    let scale = (1.0 / temperature) as f32;
    let (of_logits, of_target) = (Normaliser::of(logits, scale), Normaliser::of(target, scale));
    let mut values = [0.0_f32; BLOCK];
    let (mut value, mut slope_sum) = (0.0_f64, 0.0_f64);
    for (logits, target) in logits.chunks(BLOCK).zip(target.chunks_mut(BLOCK)) {
        let values = &mut values[..logits.len()];
        for ((logit, target), value) in logits.iter().zip(target.iter_mut()).zip(values.iter_mut()) {
            let (log_s, log_t) = (of_logits.log_probability(*logit), of_target.log_probability(*target));
            let summand = R::summand(Token { s: exp(log_s), log_s, t: exp(log_t), log_t }, a, b);
            (*value, *target) = (summand.value, summand.slope);
        }
        value += f64::from(sum(values));
        slope_sum += f64::from(sum(target));
    }
    let (factor, slope_sum) = ((factor / temperature) as f32, slope_sum as f32);
    for ((slope, logit), h) in slopes.iter_mut().zip(logits).zip(target.iter()) {
        *slope += factor * (h - exp(of_logits.log_probability(*logit)) * slope_sum);
    }
    value
}
