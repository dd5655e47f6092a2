//! Writing on the CPU, and on devices without kernels of their own.

use candle_core::{Result as TensorResult, Tensor};
use contract::Result;
use rayon::prelude::*;

use super::Row;
use crate::batch::{Input, Packed};
use crate::families::Config;
use crate::host::elements;
use crate::kernels::attention::{first_column, first_seen, softmax};
use crate::kernels::rope::Turn;
use crate::kernels::tile::{self, Left};
use crate::kernels::{by_row, columns, elementwise, layer_norm, rms_norm, swiglu};
use crate::model::LanguageModel;
use crate::ops::cpu::{embed, positions, rotate};
use crate::ops::rotary::Rotary;
use crate::ops::{Attend, Layer, LayerNorm, Layout, Ops, Positions, RmsNorm};
use crate::terms::activation::Activation;
use crate::weights::Weight;

/// What computes the logits of the next token.
pub(super) struct Decoder<'a> {
    model: &'a LanguageModel,
    soft_prompt: Option<Tensor>,
    soft_length: usize,
    /// Which of a row's caches are its own.
    place: usize,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(model: &'a LanguageModel, soft_prompt: Option<&Tensor>) -> Result<Self> {
        let soft_prompt = soft_prompt.map(|prompt| prompt.detach().contiguous()).transpose()?;
        let soft_length = soft_prompt.as_ref().map_or(0, |prompt| prompt.dims()[0]);
        Ok(Decoder { model, soft_prompt, soft_length, place: 0 })
    }

    /// That of another model which has a say in the same rows.
    pub(super) fn of_other(model: &'a LanguageModel) -> Result<Self> {
        Ok(Decoder { place: 1, ..Decoder::new(model, None)? })
    }

    /// Logits of the next token of every row, `[rows, V]`.
    pub(super) fn logits(&mut self, rows: &mut [Row]) -> Result<Vec<f32>> {
        if !self.model.device().is_cpu() {
            return self.logits_plain(rows);
        }
        let mut hidden = Vec::with_capacity(rows.len() * self.model.width());
        for rows in together(rows, |row| row.ids.len() + self.soft_length - row.caches[self.place].length) {
            hidden.extend(self.hidden(rows)?);
        }
        let head = self.model.head_weight();
        let mut logits = transposed(&hidden, head, self.model.width())?;
        add_low_rank(&mut logits, &hidden, head)?;
        Ok(logits)
    }

    /// Final hidden states of the last token of every row, `[rows, C]`; what is new of them goes into their caches.
    fn hidden(&self, rows: &mut [Row]) -> Result<Vec<f32>> {
        let mut pass = Cached { inputs: Vec::new(), positions: Vec::new(), counts: Vec::new(), caches: Vec::new() };
        for row in rows {
            let cache = &mut row.caches[self.place];
            let seen = cache.length;
            if seen == 0 {
                *cache = Cache::new(&self.model.config, self.soft_length + row.prompt + row.limit);
                pass.inputs.extend((0..self.soft_length as u32).map(Input::Prompt));
            }
            let new = seen.saturating_sub(self.soft_length);
            pass.inputs.extend(row.ids[new..].iter().map(|id| Input::Token(*id)));
            let count = row.ids.len() + self.soft_length - seen;
            pass.positions.extend((seen..seen + count).map(|p| p as u32));
            pass.counts.push(count);
            pass.caches.push(cache);
        }
        let positions = pass.positions.iter().max().map_or(0, |last| *last as usize + 1);
        let hidden = self.model.forward(&mut pass, self.soft_prompt.as_ref(), positions)?;
        for (cache, count) in pass.caches.iter_mut().zip(&pass.counts) {
            cache.length += count;
        }
        Ok(hidden)
    }

    /// The same by a whole forward pass over each row, without a cache: on devices without a kernel, and for tests.
    pub(super) fn logits_plain(&self, rows: &[Row]) -> Result<Vec<f32>> {
        let mut batch = Packed::new();
        rows.iter().for_each(|row| batch.push(row.id, &row.ids));
        let model = self.model.frozen();
        let hidden = model.hidden(&batch, self.soft_prompt.as_ref(), None)?;
        let last: Vec<u32> = batch.segments.iter().map(|segment| segment.end as u32 - 1).collect();
        let last = Tensor::from_slice(&last, last.len(), model.device())?;
        Ok(hidden.index_select(&last, 0)?.matmul(&model.head()?.t()?)?.flatten_all()?.to_vec1()?)
    }
}

/// New tokens that go through the model together: more would take memory and gain no time.
pub(super) const TOGETHER: usize = 1024;

/// Cuts rows into parts of at most [`TOGETHER`] new tokens, or of one row.
pub(super) fn together(mut rows: &mut [Row], new_tokens: impl Fn(&Row) -> usize) -> Vec<&mut [Row]> {
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
pub(super) struct Cache {
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
        let width = config.sizes().kv_width;
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
        tokens: &Weight,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> TensorResult<Vec<f32>> {
        embed(&self.inputs, &self.positions, tokens, positions, prompt)
    }

    fn positions(&mut self, table: Positions<'_>) -> TensorResult<Vec<f32>> {
        positions(&self.positions, table)
    }

    fn layer_norm(&mut self, x: &Vec<f32>, norm: &LayerNorm) -> TensorResult<Vec<f32>> {
        Ok(layer_norm::forward(x, &elements(&norm.weight)?, &elements(&norm.bias)?, norm.eps).0)
    }

    fn rms_norm(&mut self, x: &Vec<f32>, norm: &RmsNorm) -> TensorResult<Vec<f32>> {
        Ok(rms_norm::forward(x, &elements(&norm.weight)?, norm.eps).0)
    }

    fn side_by_side(&mut self, x: &Vec<f32>, layers: &[Layer]) -> TensorResult<Vec<f32>> {
        let part = |layer: &Layer| {
            let bias = layer.bias.as_ref().map(elements).transpose()?;
            let mut out = match (layer.layout, bias) {
                (Layout::InOut, Some(bias)) => {
                    by_row::product(x, &elements(layer.weight.tensor()?)?, &bias, layer.inputs()?)
                }
                (Layout::InOut, None) => {
                    let zeros = vec![0.0; layer.outputs()?];
                    by_row::product(x, &elements(layer.weight.tensor()?)?, &zeros, layer.inputs()?)
                }
                (Layout::OutIn, bias) => {
                    let mut out = transposed(x, &layer.weight, layer.inputs()?)?;
                    if let Some(bias) = bias {
                        out.chunks_exact_mut(bias.len()).for_each(|row| elementwise::add_to_row(row, 0, &bias));
                    }
                    out
                }
            };
            add_low_rank(&mut out, x, &layer.weight)?;
            Ok((out, layer.outputs()?))
        };
        let mut parts = layers.iter().map(part).collect::<TensorResult<Vec<_>>>()?;
        if parts.len() == 1 {
            return Ok(parts.remove(0).0);
        }
        Ok(columns::join(&parts.iter().map(|(part, width)| (part.as_slice(), *width)).collect::<Vec<_>>()))
    }

    fn join(&mut self, parts: Vec<Vec<f32>>) -> TensorResult<Vec<f32>> {
        let rows = self.positions.len();
        Ok(columns::join(&parts.iter().map(|part| (part.as_slice(), part.len() / rows)).collect::<Vec<_>>()))
    }

    fn regroup(&mut self, x: Vec<f32>, groups: [usize; 2]) -> TensorResult<Vec<f32>> {
        Ok(columns::regroup(&x, x.len() / self.positions.len(), groups))
    }

    fn rotary(&mut self, mut x: Vec<f32>, rotary: &Rotary) -> TensorResult<Vec<f32>> {
        let width = x.len() / self.positions.len();
        rotate(&mut x, width, rotary, &self.positions, Turn::Forth)?;
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
    fn wanted(&mut self, x: Vec<f32>) -> TensorResult<Vec<f32>> {
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

/// Adds to what a matrix made of `x` what lies on it makes of it.
fn add_low_rank(out: &mut [f32], x: &[f32], weight: &Weight) -> TensorResult<()> {
    let Some(low_rank) = weight.low_rank() else { return Ok(()) };
    let (rank, inputs) = low_rank.a.dims2()?;
    let inner = by_row::product_transposed(x, &elements(&low_rank.a)?, inputs);
    elementwise::add(out, &by_row::product_transposed(&inner, &elements(&low_rank.scaled_b()?)?, rank));
    Ok(())
}

/// `a weight^T`, where the weight may be encoded.
fn transposed(a: &[f32], weight: &Weight, depth: usize) -> TensorResult<Vec<f32>> {
    Ok(match weight.encoded() {
        Some(weight) => by_row::product_encoded(a, weight.format, weight.rows(0..weight.rows), depth),
        None => by_row::product_transposed(a, &elements(weight.tensor()?)?, depth),
    })
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
            // What no query of the block sees is left out: columns before `from`, which are then the first.
            let from = first_column(length + start, attend.window);
            let seen = length + start + block - from;
            let columns = seen.next_multiple_of(ALIGN);
            let queries = Left { data: &qkv[start * channels + head * d..], row: channels, depth: 1 };
            tile::product(&mut scores, capacity, queries, &keys[from..], capacity, block, columns, d, false);
            for i in 0..block {
                let position = length + start + i;
                let first = first_seen(position, attend.window);
                softmax(&mut scores[i * capacity..][..columns], first - from, position + 1 - from, attend.scale);
            }
            let left = Left { data: &scores, row: capacity, depth: 1 };
            let values = &values[from * d..];
            tile::product(&mut out[start * width + head * d..], width, left, values, d, block, d, seen, false);
        }
    }
}
