//! [`Ops`] as candle tensor operations: the meaning of each, and the way on devices without kernels of our own.
//!
//! Uses only operations whose gradients candle computes; its fused softmax and norms lose gradients silently.

use candle_core::{D, Device, Result, Tensor};

use super::rotary::Rotary;
use super::{Attend, Block, Layer, LayerNorm, Layout, Ops, Positions, RmsNorm, Taps};
use crate::batch::{Input, Packed};
use crate::finite::is_finite;
use crate::kernels::masks;
use crate::terms::activation::Activation;
use crate::terms::dropout::Dropout;
use crate::weights::Weight;
use crate::weights::low_rank::LowRank;

/// Runs a forward pass over a batch.
pub(crate) struct Plain<'a> {
    batch: &'a Packed,
    dropout: Option<Dropout>,
    /// Blocks run so far, where it is watched, and the first of them whose result was not finite.
    watch: Option<(usize, Option<usize>)>,
    /// Who is shown how every layer attends.
    probe: Option<&'a mut Probe<'a>>,
    taps: Taps<Tensor>,
}

/// Is given the probabilities of a layer's attention, `[B, H, T, T]` by query and key, before dropout. Rows and columns behind
/// the end of a sequence mean nothing.
pub(crate) type Probe<'a> = dyn FnMut(&Tensor) -> Result<()> + 'a;

impl<'a> Plain<'a> {
    pub(crate) fn new(batch: &'a Packed, dropout: Option<Dropout>) -> Self {
        Plain { batch, dropout, watch: None, probe: None, taps: Taps::new(&[]) }
    }

    /// One that shows how every layer attends, one layer after the other.
    pub(crate) fn probing(batch: &'a Packed, probe: &'a mut Probe<'a>) -> Self {
        Plain { probe: Some(probe), ..Plain::new(batch, None) }
    }

    /// The same, keeping what comes out of the blocks `layers`, counted from 0.
    pub(crate) fn tapping(self, layers: &[usize]) -> Self {
        Plain { taps: Taps::new(layers), ..self }
    }

    /// The result of a pass and what was kept of its blocks side by side, in the order of the blocks.
    pub(crate) fn with_taps(&mut self, result: Tensor) -> Result<Tensor> {
        Tensor::cat(&[vec![result], self.taps.take()].concat(), D::Minus1)
    }

    /// One that notes which block's result is the first that is not finite.
    pub(crate) fn watching(batch: &'a Packed) -> Self {
        Plain { watch: Some((0, None)), ..Plain::new(batch, None) }
    }

    /// That block, counted from 0.
    pub(crate) fn broken_block(&self) -> Option<usize> {
        self.watch.and_then(|(_, broken)| broken)
    }

    fn drop(&self, x: &Tensor, rate: f32, site: u32) -> Result<Tensor> {
        let Some(dropout) = self.dropout.filter(|_| rate > 0.0) else { return Ok(x.clone()) };
        let (rows, width) = x.dims2()?;
        let mut mask = vec![0.0; rows * width];
        for (mask, (id, line)) in mask.chunks_exact_mut(width).zip(self.batch.keys(rows)) {
            masks::fill(mask, &dropout, rate, site, id, line);
        }
        let mask = Tensor::from_vec(mask, (rows, width), x.device())?;
        x * mask
    }

    /// The position of every row, where position 0 is `first`.
    fn at(&self, first: usize, device: &Device) -> Result<Tensor> {
        let at: Vec<u32> = self.batch.positions.iter().map(|position| first as u32 + position).collect();
        let count = at.len();
        Tensor::from_vec(at, count, device)
    }
}

impl Ops for Plain<'_> {
    type Array = Tensor;

    fn embed(&mut self, tokens: &Weight, positions: Option<Positions<'_>>, prompt: Option<&Tensor>) -> Result<Tensor> {
        let tokens = tokens.tensor()?;
        let device = tokens.device();
        let mut ids = Vec::new();
        // Where each row's vector is found in tokens ++ prompt.
        let mut places = Vec::with_capacity(self.batch.inputs.len());
        let texts = self.batch.inputs.iter().filter(|input| matches!(input, Input::Token(_))).count();
        for input in &self.batch.inputs {
            match input {
                Input::Token(id) => {
                    places.push(ids.len() as u32);
                    ids.push(*id);
                }
                Input::Prompt(i) => places.push(texts as u32 + i),
            }
        }
        let count = ids.len();
        let mut vectors = tokens.index_select(&Tensor::from_vec(ids, count, device)?, 0)?; // [N, C]
        if let Some(prompt) = prompt {
            let count = places.len();
            let places = Tensor::from_vec(places, count, device)?;
            vectors = Tensor::cat(&[&vectors, prompt], 0)?.index_select(&places, 0)?;
        }
        match positions {
            Some(Positions { table, first }) => vectors + table.index_select(&self.at(first, device)?, 0)?,
            None => Ok(vectors),
        }
    }

    fn positions(&mut self, Positions { table, first }: Positions<'_>) -> Result<Tensor> {
        table.index_select(&self.at(first, table.device())?, 0)
    }

    fn layer_norm(&mut self, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = centred.broadcast_div(&(variance + f64::from(norm.eps))?.sqrt()?)?;
        normal.broadcast_mul(&norm.weight)?.broadcast_add(&norm.bias)
    }

    fn rms_norm(&mut self, x: &Tensor, norm: &RmsNorm) -> Result<Tensor> {
        let ((rows, width), head) = (x.dims2()?, norm.weight.elem_count());
        let heads = x.reshape((rows, width / head, head))?;
        let mean_square = heads.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = heads.broadcast_div(&(mean_square + f64::from(norm.eps))?.sqrt()?)?;
        normal.broadcast_mul(&norm.weight)?.reshape((rows, width))
    }

    fn side_by_side(&mut self, x: &Tensor, layers: &[Layer]) -> Result<Tensor> {
        let linear = |layer: &Layer| {
            let mut y = match layer.layout {
                Layout::InOut => x.matmul(layer.weight.tensor()?)?,
                Layout::OutIn => x.matmul(&layer.weight.tensor()?.t()?)?,
            };
            if let Some(LowRank { a, b, scale, dropout, site }) = layer.weight.low_rank() {
                let x = self.drop(x, *dropout, *site)?;
                y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * *scale)?)?;
            }
            layer.bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
        };
        Tensor::cat(&layers.iter().map(linear).collect::<Result<Vec<_>>>()?, 1)
    }

    fn join(&mut self, parts: Vec<Tensor>) -> Result<Tensor> {
        Tensor::cat(&parts, 1)
    }

    fn regroup(&mut self, x: Tensor, [a, b]: [usize; 2]) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        x.reshape((rows, a, b, width / a / b))?.transpose(1, 2)?.reshape((rows, width))
    }

    fn rotary(&mut self, x: Tensor, rotary: &Rotary) -> Result<Tensor> {
        let Rotary { heads, head_width, turned, ref angles } = *rotary;
        let ((rows, width), half) = (x.dims2()?, turned / 2);
        let angles = angles.index_select(&self.at(0, x.device())?, 0)?.reshape((rows, 1, 2, half))?;
        let (cosine, sine) = (angles.narrow(2, 0, 1)?, angles.narrow(2, 1, 1)?); // [N, 1, 1, R / 2]
        let heads_of = x.narrow(1, 0, heads * head_width)?.reshape((rows, heads, head_width))?;
        let pairs = heads_of.narrow(2, 0, turned)?.reshape((rows, heads, 2, half))?;
        let (a, b) = (pairs.narrow(2, 0, 1)?, pairs.narrow(2, 1, 1)?);
        let first = (a.broadcast_mul(&cosine)? - b.broadcast_mul(&sine)?)?;
        let second = (b.broadcast_mul(&cosine)? + a.broadcast_mul(&sine)?)?;
        let pairs = Tensor::cat(&[first, second], 2)?.reshape((rows, heads, turned))?;
        let heads_of = Tensor::cat(&[pairs, heads_of.narrow(2, turned, head_width - turned)?], 2)?;
        let rest = x.narrow(1, heads * head_width, width - heads * head_width)?;
        Tensor::cat(&[heads_of.reshape((rows, heads * head_width))?, rest], 1)
    }

    fn attention(&mut self, qkv: Tensor, attend: Attend) -> Result<Tensor> {
        let Attend { heads, kv_heads, .. } = attend;
        let (count, d) = (qkv.dim(0)?, attend.head_width(qkv.dim(1)?));
        let width = heads * d;
        let device = qkv.device();
        // Sequences side by side, [B, T]. What stands behind a short one is never read: it comes later than all its
        // queries, and its own results are left out below.
        let batch = self.batch.segments.len();
        let longest = self.batch.segments.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        if longest == 0 {
            return Tensor::zeros((count, width), qkv.dtype(), device);
        }
        let mut padded = vec![0u32; batch * longest];
        let mut back = Vec::with_capacity(count);
        for (b, segment) in self.batch.segments.iter().enumerate() {
            for (t, row) in segment.clone().enumerate() {
                padded[b * longest + t] = row as u32;
                back.push((b * longest + t) as u32);
            }
        }
        let padded = Tensor::from_vec(padded, batch * longest, device)?;
        let qkv = qkv.index_select(&padded, 0)?.reshape((batch, longest, heads + 2 * kv_heads, d))?.transpose(1, 2)?;
        let part = |first, count| qkv.narrow(1, first, count)?.contiguous();
        // Each head of keys or values as often as query heads read it.
        let shared = |first| {
            let shape = (batch, kv_heads, heads / kv_heads, longest, d);
            part(first, kv_heads)?.unsqueeze(2)?.broadcast_as(shape)?.reshape((batch, heads, longest, d))
        };
        let queries = part(0, heads)?; // [B, H, T, D]
        let (keys, values) = (shared(heads)?, shared(heads + kv_heads)?); // [B, H, T, D]
        let scores = (queries.matmul(&keys.t()?)? * f64::from(attend.scale))?; // [B, H, T, T]
        let window = attend.window.unwrap_or(longest);
        let seen = |query: usize, key: usize| key <= query && query - key < window;
        let of_query = |i| (0..longest).map(move |j| if seen(i, j) { 0.0 } else { f32::NEG_INFINITY });
        let hidden = (0..longest).flat_map(of_query);
        let hidden = Tensor::from_iter(hidden, device)?.reshape((longest, longest))?;
        let scores = scores.broadcast_add(&hidden)?;
        let mut probabilities = candle_nn::ops::softmax(&scores, D::Minus1)?;
        if let Some(probe) = &mut self.probe {
            probe(&probabilities)?;
        }
        if let Some(dropout) = self.dropout.filter(|_| attend.dropout > 0.0) {
            let mut mask = vec![1.0; batch * heads * longest * longest];
            for (line, out) in mask.chunks_exact_mut(longest).enumerate() {
                let (b, head, query) = (line / longest / heads, line / longest % heads, line % longest);
                let site = attend.site + head as u32;
                masks::fill(out, &dropout, attend.dropout, site, self.batch.rows[b], query as u32);
            }
            probabilities = (probabilities * Tensor::from_vec(mask, (batch, heads, longest, longest), device)?)?;
        }
        let out = probabilities.matmul(&values)?.transpose(1, 2)?.reshape((batch * longest, width))?;
        out.index_select(&Tensor::from_vec(back, count, device)?, 0)
    }

    fn activation(&mut self, x: Tensor, activation: Activation) -> Result<Tensor> {
        match activation {
            Activation::GeluNew => x.gelu(),
            Activation::Gelu => x.gelu_erf(),
            Activation::Relu => x.relu(),
        }
    }

    fn swiglu(&mut self, gate: Tensor, up: Tensor) -> Result<Tensor> {
        gate.silu()? * up
    }

    fn add(&mut self, x: Tensor, y: Tensor) -> Result<Tensor> {
        x + y
    }

    fn dropout(&mut self, x: Tensor, rate: f32, site: u32) -> Result<Tensor> {
        self.drop(&x, rate, site)
    }

    fn wanted(&mut self, x: Tensor) -> Result<Tensor> {
        let Some(wanted) = &self.batch.wanted else { return Ok(x) };
        x.index_select(&Tensor::from_slice(wanted, wanted.len(), x.device())?, 0)
    }

    fn block<T: Block>(&mut self, x: Tensor, block: &T) -> Result<Tensor> {
        let x = block.forward(self, x)?;
        if let Some((blocks, broken)) = &mut self.watch {
            if broken.is_none() && !is_finite(&x)? {
                *broken = Some(*blocks);
            }
            *blocks += 1;
        }
        if let Some(layer) = self.taps.next() {
            let kept = if x.dim(0)? == self.batch.inputs.len() { self.wanted(x.clone())? } else { x.clone() };
            self.taps.kept.push((layer, kept));
        }
        Ok(x)
    }
}
