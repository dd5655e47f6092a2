//! Writing: batched decoding with a cache of keys and values.
//!
//! Rows come and go: every pass feeds the new token of each row that is being written and the whole prompt of each row
//! that has just been admitted; a finished row leaves at once and makes room for the next. A row's tokens do not depend
//! on that: on the CPU every operation gives a row the same bits whoever shares the pass, and draws are keyed by row and
//! position.

use anyhow::{Context, bail, ensure};
use candle_core::{Result as TensorResult, Tensor};
use contract::dataset::{answer, row_name};
use contract::random::{philox, uniform};
use contract::{End, Result};
use rayon::prelude::*;

use crate::config::{Activation, Config};
#[cfg(feature = "cuda")]
use crate::dtype::Dtype;
use crate::finite::NotFinite;
use crate::kernels::attention::softmax;
use crate::kernels::elementary::all_finite;
use crate::kernels::rope::{self, Turn};
use crate::kernels::tile::{self, Left};
use crate::kernels::{by_row, elementwise, layer_norm, rms_norm, swiglu};
use crate::model::LanguageModel;
use crate::ops::cpu::embed;
use crate::ops::{Attend, Input, Linear, Norm, Ops, Projection, Rotary, elements};
use crate::packed::Packed;
use crate::sample::{Choice, Sampling, Scratch, choose};

#[cfg(feature = "cuda")]
mod cuda;

/// How to write.
#[derive(Clone, Debug)]
pub struct Generate {
    /// How a token is chosen.
    pub sampling: Sampling,
    /// Longest response, end token included.
    pub max_new_tokens: usize,
    /// Longest prompt with its response, as those who read them ask; [`usize::MAX`] for none.
    pub longest: usize,
    /// The stage's seed.
    pub seed: u64,
    /// What the draws are for: [`contract::random::purpose::GENERATE`] or [`contract::random::purpose::EVALUATE`].
    pub purpose: u32,
    /// Epoch or round: another one, other draws.
    pub time: u32,
    /// Rows decoded together; changes speed and memory, no draw.
    pub batch: usize,
}

/// What to continue.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Row id: what the draws are keyed by.
    pub row: u64,
    /// Token ids, at least one.
    pub ids: &'a [u32],
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Token ids, with the end token if it came.
    pub ids: Vec<u32>,
    /// Log-probability of each under the model as it is: temperature 1, nothing filtered.
    pub log_probs: Vec<f32>,
    /// Whether the end token came.
    pub end: End,
}

impl Generated {
    /// What was said, without the token that ended it.
    pub fn answer(&self) -> &[u32] {
        answer(&self.ids, self.end)
    }
}

fn how_ended(response: &[u32], ends: &[u32]) -> End {
    if response.last().is_some_and(|last| ends.contains(last)) { End::Stop } else { End::Length }
}

/// Continues every prompt until one of the model's end tokens, `max_new_tokens`, `longest`, or the end of the model's positions.
///
/// The vectors of `soft_prompt`, `[n, C]`, stand before every prompt. The draw for the `k`th token of a response (from 0)
/// is keyed by `(seed, [k, row, time, purpose])`. `progress` is told how many rows are finished.
///
/// Errors when a prompt is empty, holds an unknown id, or is longer than the model's positions, and with [`NotFinite`] when
/// the distribution of a next token is not made of numbers.
pub fn generate(
    model: &LanguageModel,
    soft_prompt: Option<&Tensor>,
    prompts: &[Prompt<'_>],
    options: &Generate,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Generated>> {
    check(model, soft_prompt, prompts, options)?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = model.device() {
        let generated = match model.dtype() {
            Dtype::F32 => cuda::generate::<f32>(device, model, soft_prompt, prompts, options, progress),
            Dtype::Bf16 => cuda::generate::<half::bf16>(device, model, soft_prompt, prompts, options, progress),
        }?;
        let finite = |generated: &Generated| generated.log_probs.iter().all(|log| log.is_finite());
        return match generated.iter().position(|generated| !finite(generated)) {
            Some(index) => bail!(NotFinite { index }),
            None => Ok(generated),
        };
    }
    let prompt_length = soft_prompt.map_or(0, |prompt| prompt.dims()[0]);
    let ends = model.ends();
    let mut waiting: Vec<usize> = (0..prompts.len()).collect();
    // Rows of one length take turns: those admitted together tend to need caches of one size. The longest come last
    // here, so that they are taken first.
    waiting.sort_by_key(|i| prompts[*i].ids.len());
    let mut finished: Vec<Option<Generated>> = vec![None; prompts.len()];
    let mut decoder = Decoder::new(model, soft_prompt)?;
    let mut rows: Vec<Row> = Vec::new();
    let mut done = 0;
    loop {
        while rows.len() < options.batch.max(1) {
            let Some(index) = waiting.pop() else { break };
            let prompt = &prompts[index];
            let row = Row::new(index, prompt, room(model, prompt_length, prompt, options));
            rows.push(row);
        }
        rows.retain_mut(|row| {
            let finished_now = row.is_finished(ends);
            if finished_now {
                finished[row.index] = Some(row.finish(ends));
                done += 1;
                progress(done);
            }
            !finished_now
        });
        if rows.is_empty() {
            if waiting.is_empty() {
                break;
            }
            continue;
        }
        // In one go on a thread of the pool: going there for each of its many small loops would cost more than they do.
        rayon::scope(|_| {
            let logits = decoder.logits(&mut rows)?;
            let with_logits = rows.par_iter_mut().zip(logits.par_chunks_exact(model.vocab_size()));
            with_logits.for_each(|(row, logits)| row.extend(logits, model.vocabulary(), options));
            Ok::<_, anyhow::Error>(())
        })?;
        if let Some(row) = rows.iter().find(|row| row.log_probs.last().is_some_and(|log| !log.is_finite())) {
            bail!(NotFinite { index: row.index });
        }
    }
    finished.into_iter().map(|row| row.context("a row was never finished")).collect()
}

/// The longest response to a prompt.
fn room(model: &LanguageModel, soft_length: usize, prompt: &Prompt<'_>, options: &Generate) -> usize {
    let own = model.config.positions() - soft_length - prompt.ids.len();
    options.max_new_tokens.min(own).min(options.longest.saturating_sub(prompt.ids.len()))
}

fn check(
    model: &LanguageModel,
    soft_prompt: Option<&Tensor>,
    prompts: &[Prompt<'_>],
    options: &Generate,
) -> Result<()> {
    options.sampling.validate()?;
    let prompt_length = match soft_prompt {
        Some(prompt) => {
            let (length, width) = prompt.dims2().context("a soft prompt has shape [length, width]")?;
            ensure!(width == model.width(), "soft prompt of width {width} for a model of width {}", model.width());
            length
        }
        None => 0,
    };
    for prompt in prompts {
        ensure!(!prompt.ids.is_empty(), "{} has an empty prompt: nothing to continue", row_name(prompt.row));
        let length = prompt.ids.len() + prompt_length;
        ensure!(
            length <= model.config.positions(),
            "the prompt of {} has {length} tokens: the model has {} positions, so shorten it",
            row_name(prompt.row),
            model.config.positions()
        );
        if let Some(id) = prompt.ids.iter().find(|id| **id as usize >= model.vocabulary()) {
            bail!(
                "{} has token id {id}, not in the model's vocabulary of {}",
                row_name(prompt.row),
                model.vocabulary()
            );
        }
    }
    Ok(())
}

/// A row that is being written.
struct Row {
    /// Its place among the prompts.
    index: usize,
    id: u64,
    /// Prompt and response so far.
    ids: Vec<u32>,
    prompt: usize,
    log_probs: Vec<f32>,
    /// Longest response.
    limit: usize,
    cache: Cache,
    scratch: Scratch,
}

impl Row {
    fn new(index: usize, prompt: &Prompt<'_>, limit: usize) -> Self {
        Row {
            index,
            id: prompt.row,
            ids: prompt.ids.to_vec(),
            prompt: prompt.ids.len(),
            log_probs: Vec::new(),
            limit,
            cache: Cache::default(),
            scratch: Scratch::default(),
        }
    }

    fn extend(&mut self, logits: &[f32], vocabulary: usize, options: &Generate) {
        let position = self.log_probs.len() as u32;
        let row = (self.id ^ self.id >> 32) as u32;
        let [word, ..] = philox(options.seed, [position, row, options.time, options.purpose]);
        let choice = choose(logits, vocabulary, &self.ids, &options.sampling, uniform(word), &mut self.scratch);
        let Choice { token, log_prob } = choice;
        self.ids.push(token);
        self.log_probs.push(if all_finite(logits) { log_prob } else { f32::NAN });
    }

    fn is_finished(&self, ends: &[u32]) -> bool {
        self.log_probs.len() >= self.limit || how_ended(&self.ids[self.prompt..], ends) == End::Stop
    }

    fn finish(&mut self, ends: &[u32]) -> Generated {
        let ids = self.ids.split_off(self.prompt);
        let end = how_ended(&ids, ends);
        Generated { ids, log_probs: std::mem::take(&mut self.log_probs), end }
    }
}

/// What computes the logits of the next token.
struct Decoder<'a> {
    model: &'a LanguageModel,
    soft_prompt: Option<Tensor>,
    soft_length: usize,
}

impl<'a> Decoder<'a> {
    fn new(model: &'a LanguageModel, soft_prompt: Option<&Tensor>) -> Result<Self> {
        let soft_prompt = soft_prompt.map(|prompt| prompt.detach().contiguous()).transpose()?;
        let soft_length = soft_prompt.as_ref().map_or(0, |prompt| prompt.dims()[0]);
        Ok(Decoder { model, soft_prompt, soft_length })
    }

    /// Logits of the next token of every row, `[rows, V]`.
    fn logits(&mut self, rows: &mut [Row]) -> Result<Vec<f32>> {
        if !self.model.device().is_cpu() {
            return self.logits_plain(rows);
        }
        let mut hidden = Vec::with_capacity(rows.len() * self.model.width());
        for rows in together(rows, |row| row.ids.len() + self.soft_length - row.cache.length) {
            hidden.extend(self.hidden(rows)?);
        }
        Ok(by_row::product_transposed(&hidden, &elements(self.model.head())?, self.model.width()))
    }

    /// Final hidden states of the last token of every row, `[rows, C]`; what is new of them goes into their caches.
    fn hidden(&self, rows: &mut [Row]) -> Result<Vec<f32>> {
        let mut pass = Cached { inputs: Vec::new(), positions: Vec::new(), counts: Vec::new(), caches: Vec::new() };
        for row in rows {
            let seen = row.cache.length;
            if seen == 0 {
                row.cache = Cache::new(&self.model.config, self.soft_length + row.prompt + row.limit);
                pass.inputs.extend((0..self.soft_length as u32).map(Input::Prompt));
            }
            let new = seen.saturating_sub(self.soft_length);
            pass.inputs.extend(row.ids[new..].iter().map(|id| Input::Token(*id)));
            let count = row.ids.len() + self.soft_length - seen;
            pass.positions.extend((seen..seen + count).map(|p| p as u32));
            pass.counts.push(count);
            pass.caches.push(&mut row.cache);
        }
        let positions = pass.positions.iter().max().map_or(0, |last| *last as usize + 1);
        let hidden = self.model.forward(&mut pass, self.soft_prompt.as_ref(), positions)?;
        for (cache, count) in pass.caches.iter_mut().zip(&pass.counts) {
            cache.length += count;
        }
        Ok(hidden)
    }

    /// The same by a whole forward pass over each row, without a cache: on devices without a kernel, and for tests.
    fn logits_plain(&self, rows: &[Row]) -> Result<Vec<f32>> {
        let mut batch = Packed::new();
        rows.iter().for_each(|row| batch.push(row.id, &row.ids));
        let model = self.model.frozen();
        let hidden = model.hidden(&batch, self.soft_prompt.as_ref(), None)?;
        let last: Vec<u32> = batch.segments.iter().map(|segment| segment.end as u32 - 1).collect();
        let last = Tensor::from_slice(&last, last.len(), model.device())?;
        Ok(hidden.index_select(&last, 0)?.matmul(&model.head().t()?)?.flatten_all()?.to_vec1()?)
    }
}

/// New tokens that go through the model together: more would take memory and gain no time.
const TOGETHER: usize = 1024;

/// Cuts rows into parts of at most [`TOGETHER`] new tokens, or of one row.
fn together(mut rows: &mut [Row], new_tokens: impl Fn(&Row) -> usize) -> Vec<&mut [Row]> {
    let mut parts = Vec::new();
    while !rows.is_empty() {
        let mut tokens = 0;
        let fit = rows.iter().take_while(|row| {
            tokens += new_tokens(row);
            tokens <= TOGETHER
        });
        let (part, rest) = rows.split_at_mut(fit.count().max(1));
        parts.push(part);
        rows = rest;
    }
    parts
}

/// Keys and values of what a row has seen.
#[derive(Default)]
struct Cache {
    length: usize,
    /// Room for so many positions.
    capacity: usize,
    layers: Vec<LayerCache>,
}

struct LayerCache {
    /// `[G D, capacity]`: scores of a query are then sums of rows.
    keys: Vec<f32>,
    /// `[G, capacity, D]`.
    values: Vec<f32>,
}

impl Cache {
    fn new(config: &Config, capacity: usize) -> Self {
        let width = config.kv_width();
        let capacity = capacity.next_multiple_of(ALIGN);
        let layer = || LayerCache { keys: vec![0.0; width * capacity], values: vec![0.0; width * capacity] };
        Cache { length: 0, capacity, layers: (0..config.layers()).map(|_| layer()).collect() }
    }
}

/// Columns of scores are computed in such steps.
const ALIGN: usize = 16;

/// [`Ops`] over the new tokens of each row, with the keys and values of those before.
struct Cached<'a> {
    inputs: Vec<Input>,
    positions: Vec<u32>,
    /// New tokens of each row.
    counts: Vec<usize>,
    caches: Vec<&'a mut Cache>,
}

impl Ops for Cached<'_> {
    type Array = Vec<f32>;

    fn embed(
        &mut self,
        tokens: &Tensor,
        positions: Option<&Tensor>,
        prompt: Option<&Tensor>,
    ) -> TensorResult<Vec<f32>> {
        embed(&self.inputs, &self.positions, tokens, positions, prompt)
    }

    fn layer_norm(&mut self, x: &Vec<f32>, norm: Norm<'_>, eps: f32) -> TensorResult<Vec<f32>> {
        Ok(layer_norm::forward(x, &elements(norm.weight)?, &elements(norm.bias)?, eps).0)
    }

    fn rms_norm(&mut self, x: &Vec<f32>, weight: &Tensor, eps: f32) -> TensorResult<Vec<f32>> {
        Ok(rms_norm::forward(x, &elements(weight)?, eps).0)
    }

    fn linear(&mut self, x: &Vec<f32>, linear: Linear<'_>) -> TensorResult<Vec<f32>> {
        Ok(by_row::product(x, &elements(linear.weight)?, &elements(linear.bias)?, linear.weight.dim(0)?))
    }

    fn project(&mut self, x: &Vec<f32>, layers: &[Projection<'_>]) -> TensorResult<Vec<f32>> {
        let mut parts = Vec::with_capacity(layers.len());
        for layer in layers {
            let (width, depth) = layer.weight.dims2()?;
            let mut out = by_row::product_transposed(x, &elements(layer.weight)?, depth);
            if let Some(bias) = layer.bias {
                let bias = elements(bias)?;
                out.chunks_exact_mut(width).for_each(|row| elementwise::add_to_row(row, 0, &bias));
            }
            parts.push((out, width));
        }
        if parts.len() == 1 {
            return Ok(parts.remove(0).0);
        }
        let rows = parts[0].0.len() / parts[0].1;
        let mut out = Vec::with_capacity(parts.iter().map(|(part, _)| part.len()).sum());
        for row in 0..rows {
            parts.iter().for_each(|(part, width)| out.extend_from_slice(&part[row * width..][..*width]));
        }
        Ok(out)
    }

    fn rotary(&mut self, mut x: Vec<f32>, rotary: Rotary<'_>) -> TensorResult<Vec<f32>> {
        let width = x.len() / self.positions.len();
        let angles = elements(rotary.angles)?;
        rope::rotate(&mut x, width, rotary.heads, rotary.head_width, &angles, &self.positions, Turn::Forth);
        Ok(x)
    }

    fn attention(&mut self, qkv: Vec<f32>, attend: Attend) -> TensorResult<Vec<f32>> {
        let rows = self.counts.iter().sum::<usize>();
        let channels = qkv.len() / rows;
        let width = attend.heads * attend.head_width(channels);
        let mut out = vec![0.0; rows * width];
        let (mut qkv, mut rest) = (qkv.as_slice(), out.as_mut_slice());
        let mut tasks = Vec::with_capacity(self.counts.len());
        for (cache, count) in self.caches.iter_mut().zip(&self.counts) {
            let (own, behind) = qkv.split_at(count * channels);
            let (place, free) = rest.split_at_mut(count * width);
            tasks.push((&mut **cache, own, place));
            (qkv, rest) = (behind, free);
        }
        tasks.into_par_iter().for_each(|(cache, qkv, out)| attend_row(cache, qkv, out, channels, attend));
        Ok(out)
    }

    fn activation(&mut self, x: Vec<f32>, activation: Activation) -> TensorResult<Vec<f32>> {
        Ok(elementwise::activation(&x, activation))
    }

    fn swiglu(&mut self, gate: Vec<f32>, up: Vec<f32>) -> TensorResult<Vec<f32>> {
        Ok(swiglu::forward(&gate, &up))
    }

    fn add(&mut self, mut x: Vec<f32>, y: Vec<f32>) -> TensorResult<Vec<f32>> {
        elementwise::add(&mut x, &y);
        Ok(x)
    }

    fn dropout(&mut self, x: Vec<f32>, _rate: f32, _site: u32) -> TensorResult<Vec<f32>> {
        Ok(x)
    }

    /// The last token of each row: the only one whose logits are wanted.
    fn text(&mut self, x: Vec<f32>) -> TensorResult<Vec<f32>> {
        let width = x.len() / self.counts.iter().sum::<usize>();
        let mut out = Vec::with_capacity(self.counts.len() * width);
        let mut end = 0;
        for count in &self.counts {
            end += count * width;
            out.extend_from_slice(&x[end - width..end]);
        }
        Ok(out)
    }
}

/// Attention of a row's new tokens over all it has seen.
fn attend_row(cache: &mut Cache, qkv: &[f32], out: &mut [f32], channels: usize, attend: Attend) {
    const QUERIES: usize = 32;
    let (length, capacity) = (cache.length, cache.capacity);
    let LayerCache { keys, values } = &mut cache.layers[attend.layer];
    let d = attend.head_width(channels);
    let (width, kv_width) = (attend.heads * d, attend.kv_heads * d);
    let count = out.len() / width;
    for (t, row) in qkv.chunks_exact(channels).enumerate() {
        let (new_keys, new_values) = row[width..].split_at(kv_width);
        for (c, key) in new_keys.iter().enumerate() {
            keys[c * capacity + length + t] = *key;
        }
        for (head, value) in new_values.chunks_exact(d).enumerate() {
            values[(head * capacity + length + t) * d..][..d].copy_from_slice(value);
        }
    }
    let mut scores = vec![0.0; QUERIES.min(count) * capacity];
    for head in 0..attend.heads {
        let kv_head = head * attend.kv_heads / attend.heads;
        let keys = &keys[kv_head * d * capacity..];
        let values = &values[kv_head * d * capacity..];
        for start in (0..count).step_by(QUERIES) {
            let block = QUERIES.min(count - start);
            let seen = length + start + block;
            let columns = seen.next_multiple_of(ALIGN);
            let queries = Left { data: &qkv[start * channels + head * d..], row: channels, depth: 1 };
            tile::product(&mut scores, capacity, queries, keys, capacity, block, columns, d, false);
            for i in 0..block {
                softmax(&mut scores[i * capacity..][..columns], length + start + i + 1, attend.scale);
            }
            let left = Left { data: &scores, row: capacity, depth: 1 };
            tile::product(&mut out[start * width + head * d..], width, left, values, d, block, d, seen, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use contract::TokenizerFile;

    use super::*;
    use crate::config::{Architecture, Family};

    #[test]
    fn rows_with_many_new_tokens_go_in_parts() {
        let ids = [3; 3 * TOGETHER];
        let lengths = [400, 600, 25, 1, TOGETHER + 5, 1, 1];
        let row = |index: usize| Row::new(index, &Prompt { row: 0, ids: &ids[..lengths[index]] }, 8);
        let mut rows: Vec<Row> = (0..lengths.len()).map(row).collect();
        let parts = together(&mut rows, |row| row.ids.len());
        assert!(parts.iter().map(|rows| rows.len()).eq([2, 2, 1, 2]));
        assert!(parts.into_iter().flatten().map(|row| row.index).eq(0..lengths.len()));
    }

    #[test]
    fn a_step_with_a_cache_gives_the_logits_of_a_whole_pass() {
        let shape = |family| Architecture { heads: Some(4), positions: Some(90), ..Architecture::new(family, 3, 32) };
        for architecture in [shape(Family::Gpt2), Architecture { kv_heads: Some(2), ..shape(Family::Llama) }] {
            steps_are_whole_passes(&architecture);
        }
    }

    fn steps_are_whole_passes(architecture: &Architecture) {
        let tokenizer = TokenizerFile::new("", 0, 31);
        let model = LanguageModel::init(architecture, tokenizer, 3, &Device::Cpu).unwrap();
        let soft = Tensor::ones((5, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
        for soft_prompt in [None, Some(&soft)] {
            let mut decoder = Decoder::new(&model, soft_prompt).unwrap();
            let text: Vec<u32> = (0..80).map(|t| (t * 7) % 31).collect();
            // A row that joins late, one longer than a block of queries, a short one.
            let row = |index, length| Row::new(index, &Prompt { row: index as u64, ids: &text[..length] }, 8);
            let mut rows = vec![row(0, 70), row(1, 2)];
            for step in 0..6 {
                if step == 3 {
                    rows.push(row(2, 33));
                }
                let plain = decoder.logits_plain(&rows).unwrap();
                let cached = decoder.logits(&mut rows).unwrap();
                assert_eq!(plain.len(), cached.len());
                for (cached, plain) in cached.iter().zip(&plain) {
                    assert!((cached - plain).abs() < 1e-5, "step {step}: {cached} {plain}");
                }
                for row in &mut rows {
                    row.ids.push((step * 11 + row.index as u32) % 31);
                }
            }
        }
    }
}
