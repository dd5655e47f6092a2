//! [`Ops`] by the fused loops of a [`Backend`], with a tape for the way back.
//!
//! To candle a whole forward pass is one operation: its backward pass runs the tape. That saves what candle's own engine
//! does for every intermediate (a zeroed buffer and an addition each), lets gradients be added where they lie, and frees
//! each activation as soon as nothing needs it. Only what leads to a variable is recorded; frozen weights cost no
//! gradient. Gradients of weights are [delivered](super::collect).
//!
//! What is cheap to compute again is not kept: results of norms and nonlinearities. With activation checkpointing (Chen et
//! al., "Training deep nets with sublinear memory cost", 2016) nothing within a block is kept either: the backward pass runs
//! each block again, from its input. Everything comes out with the bits it had, since dropout draws from counters.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};

use super::backend::Backend;
use super::collect::{Contribution, deliver};
use super::rotary::Rotary;
use super::{Attend, Block, Layer, LayerNorm, Ops, Positions, RmsNorm, Taps, side_by_side};
use crate::batch::{Input, Packed};
use crate::kernels::attention::Attention;
use crate::kernels::rope::Turn;
use crate::terms::activation::Activation;
use crate::terms::dropout::Dropout;
use crate::weights::Weight;
use crate::weights::low_rank::LowRank;

/// Runs a forward pass over rows, and remembers it if a gradient will be wanted.
pub(crate) struct Tape<B: Backend> {
    backend: B,
    batch: Arc<Packed>,
    dropout: Option<Dropout>,
    steps: Vec<Step<B>>,
    nodes: usize,
    keeping: Keeping,
    taps: Taps<Array<B>>,
}

/// What is kept of a forward pass for the way back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keeping {
    /// All that is not cheap to compute again.
    Activations,
    /// The inputs of blocks.
    BlockInputs,
    Nothing,
}

/// A result of the tape.
pub(crate) struct Array<B: Backend> {
    data: Arc<B::Buffer>,
    width: usize,
    /// Where its gradient goes; `None` when it depends on no variable.
    node: Option<usize>,
    /// How to get the data again from what is kept anyway, if it is cheap.
    again: Option<Again<B>>,
}

impl<B: Backend> Clone for Array<B> {
    fn clone(&self) -> Self {
        Array { data: self.data.clone(), width: self.width, node: self.node, again: self.again.clone() }
    }
}

/// Computes a result a second time.
type Again<B> = Arc<dyn Fn(&B) -> Result<<B as Backend>::Buffer> + Send + Sync>;

/// One operation's way back.
type Step<B> = Box<dyn FnOnce(&mut Backward<B>) -> Result<()> + Send>;

impl<B: Backend> Tape<B> {
    /// A tape for a forward pass over a batch.
    pub(crate) fn new(backend: B, batch: Packed, dropout: Option<Dropout>) -> Self {
        Tape::keeping(Keeping::Activations, backend, Arc::new(batch), dropout)
    }

    /// The same, keeping only the inputs of blocks: their insides are computed again on the way back.
    pub(crate) fn checkpointing(backend: B, batch: Packed, dropout: Option<Dropout>) -> Self {
        Tape::keeping(Keeping::BlockInputs, backend, Arc::new(batch), dropout)
    }

    fn keeping(keeping: Keeping, backend: B, batch: Arc<Packed>, dropout: Option<Dropout>) -> Self {
        Tape { backend, batch, dropout, steps: Vec::new(), nodes: 0, keeping, taps: Taps::new(&[]) }
    }

    /// The same, keeping what comes out of the blocks `layers`, counted from 0.
    pub(crate) fn tapping(self, layers: &[usize]) -> Self {
        Tape { taps: Taps::new(layers), ..self }
    }

    /// The result of a pass and what was kept of its blocks side by side, in the order of the blocks.
    pub(crate) fn with_taps(&mut self, result: Array<B>) -> Result<Array<B>> {
        let taps = self.taps.take();
        if taps.is_empty() { Ok(result) } else { self.join(std::iter::once(result).chain(taps).collect()) }
    }

    /// The result as a tensor, `[rows, width]`, differentiable where it depends on variables. `anchor` is one of the
    /// variables, if any is.
    pub(crate) fn finish(self, result: Array<B>, anchor: Option<&Tensor>, prompt: Option<&Tensor>) -> Result<Tensor> {
        let shape = Shape::from((B::len(&result.data) / result.width, result.width));
        let data = take(&self.backend, result.data)?;
        let Some((node, anchor)) = result.node.zip(anchor) else {
            return self.backend.tensor(data, shape);
        };
        let output = (self.backend.storage(data)?, shape);
        let pass = Pass { output: Mutex::new(Some(output)), tape: Mutex::new(Some((self, node))) };
        anchor.apply_op2(prompt.unwrap_or(anchor), pass)
    }

    fn array(&mut self, data: B::Buffer, width: usize, tracked: bool) -> Array<B> {
        self.shared(Arc::new(data), width, tracked)
    }

    fn shared(&mut self, data: Arc<B::Buffer>, width: usize, tracked: bool) -> Array<B> {
        let node = tracked.then(|| {
            self.nodes += 1;
            self.nodes - 1
        });
        Array { data, width, node, again: None }
    }

    fn record(&mut self, step: impl FnOnce(&mut Backward<B>) -> Result<()> + Send + 'static) {
        if self.keeping != Keeping::Nothing {
            self.steps.push(Box::new(step));
        }
    }

    /// The gradients of what was recorded, from that of its last result.
    fn backward(self, last: usize, gradient: Arc<B::Buffer>) -> Result<Backward<B>> {
        let gradients = (0..self.nodes).map(|_| None).collect();
        let mut backward = Backward { backend: self.backend, gradients, prompt: None };
        backward.gradients[last] = Some(gradient);
        for step in self.steps.into_iter().rev() {
            step(&mut backward)?;
        }
        Ok(backward)
    }
}

impl<B: Backend> Ops for Tape<B> {
    type Array = Array<B>;

    fn embed(
        &mut self,
        tokens: &Weight,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> Result<Array<B>> {
        let (_, width) = tokens.dims2()?;
        let out = self.backend.embed(&self.batch, tokens, positions, prompt)?;
        let first = positions.map_or(0, |positions| positions.first);
        let (tokens, positions) = (leaf_of(tokens)?, positions.map(|p| leaf(p.table)).transpose()?.flatten());
        let prompt = prompt.filter(|p| p.track_op()).map(|p| p.shape().clone());
        let out = self.array(out, width, tokens.is_some() || positions.is_some() || prompt.is_some());
        if let Some(node) = out.node {
            let batch = self.batch.clone();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                if let Some(shape) = prompt {
                    backward.prompt = Some(backward.backend.embed_backward_prompt(&batch, &dy, width, shape)?);
                }
                if tokens.is_none() && positions.is_none() {
                    return Ok(());
                }
                let dy = take(&backward.backend, dy)?;
                let gradient = backward.backend.tensor(dy, Shape::from((batch.inputs.len(), width)))?;
                if let Some(tokens) = tokens {
                    let id = |(row, input): (usize, &Input)| match input {
                        Input::Token(id) => Some((row, *id)),
                        Input::Prompt(_) => None,
                    };
                    let places = batch.inputs.iter().enumerate().filter_map(id).collect();
                    deliver(&tokens, Contribution::Rows { places, gradient: gradient.clone() })?;
                }
                if let Some(positions) = positions {
                    deliver(&positions, Contribution::Rows { places: of_positions(&batch, first), gradient })?;
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn positions(&mut self, positions: Positions<'_>) -> Result<Array<B>> {
        let Positions { table, first } = positions;
        let width = table.dim(1)?;
        let out = self.backend.positions(&self.batch, positions)?;
        let table = leaf(table)?;
        let out = self.array(out, width, table.is_some());
        if let Some((node, table)) = out.node.zip(table) {
            let batch = self.batch.clone();
            self.record(move |backward| {
                let dy = backward.take_own(node)?;
                let gradient = backward.backend.tensor(dy, Shape::from((batch.positions.len(), width)))?;
                deliver(&table, Contribution::Rows { places: of_positions(&batch, first), gradient })
            });
        }
        Ok(out)
    }

    fn layer_norm(&mut self, x: &Array<B>, norm: &LayerNorm) -> Result<Array<B>> {
        let (out, moments) = self.backend.layer_norm(&x.data, norm)?;
        let parameters = [leaf(&norm.weight)?, leaf(&norm.bias)?];
        let wanted = parameters.iter().any(Option::is_some);
        let mut out = self.array(out, x.width, x.node.is_some() || wanted);
        if let Some(node) = out.node {
            let (x_again, norm_again) = (x.data.clone(), norm.clone());
            out.again = Some(Arc::new(move |backend| Ok(backend.layer_norm(&x_again, &norm_again)?.0)));
            let (weight, x_node, x) = (norm.weight.clone(), x.node, x.data.clone());
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let mut dx = backward.sum(x_node, B::len(&x))?;
                let gradients = backward.backend.layer_norm_backward(&mut dx, &x, &weight, &moments, &dy, wanted)?;
                let gradients = gradients.into_iter().flat_map(|(weight, bias)| [weight, bias]);
                for (parameter, gradient) in parameters.into_iter().zip(gradients) {
                    if let Some(parameter) = parameter {
                        deliver(&parameter, Contribution::Dense(gradient))?;
                    }
                }
                if let Some(node) = x_node {
                    backward.gradients[node] = Some(Arc::new(dx));
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn rms_norm(&mut self, x: &Array<B>, norm: &RmsNorm) -> Result<Array<B>> {
        let (out, moments) = self.backend.rms_norm(&x.data, norm)?;
        let parameter = leaf(&norm.weight)?;
        let mut out = self.array(out, x.width, x.node.is_some() || parameter.is_some());
        if let Some(node) = out.node {
            let (x_again, norm_again) = (x.data.clone(), norm.clone());
            out.again = Some(Arc::new(move |backend| Ok(backend.rms_norm(&x_again, &norm_again)?.0)));
            let (weight, x_node, x) = (norm.weight.clone(), x.node, x.data.clone());
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let mut dx = backward.sum(x_node, B::len(&x))?;
                let wanted = parameter.is_some();
                let gradient = backward.backend.rms_norm_backward(&mut dx, &x, &weight, &moments, &dy, wanted)?;
                if let Some((weight, gradient)) = parameter.zip(gradient) {
                    deliver(&weight, Contribution::Dense(gradient))?;
                }
                if let Some(node) = x_node {
                    backward.gradients[node] = Some(Arc::new(dx));
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn side_by_side(&mut self, x: &Array<B>, layers: &[Layer]) -> Result<Array<B>> {
        let (width, depth) = side_by_side(layers)?;
        if x.width != depth {
            bail!("a linear layer over {depth} channels got {}", x.width);
        }
        // The parameters of each layer that want a gradient.
        let weights = layers.iter().map(|layer| leaf_of(&layer.weight)).collect::<Result<Vec<_>>>()?;
        let biases = layers.iter().map(|layer| Ok(layer.bias.as_ref().map(leaf).transpose()?.flatten()));
        let biases = biases.collect::<Result<Vec<_>>>()?;
        let mut out = self.backend.linear(&x.data, layers)?;
        let mut adapted = Vec::new();
        let mut first = 0;
        for layer in layers {
            if let Some(low_rank) = layer.weight.low_rank() {
                let place = Place { channels: width, first };
                adapted.push(Adapted::forward(
                    low_rank,
                    place,
                    self.dropout,
                    &self.backend,
                    &self.batch,
                    &x.data,
                    &mut out,
                )?);
            }
            first += layer.outputs()?;
        }
        let reads_x = weights.iter().any(Option::is_some) || adapted.iter().any(Adapted::is_trained);
        let wanted = reads_x || biases.iter().any(Option::is_some);
        let out = self.array(out, width, x.node.is_some() || wanted);
        if let Some(node) = out.node {
            let (layers, batch) = (layers.to_vec(), self.batch.clone());
            let (x_node, kept) = (x.node, reads_x.then(|| Kept::of(x)));
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let backend = backward.backend.clone();
                let kept = kept.map(|x| x.get(&backend)).transpose()?;
                let mut first = 0;
                for (layer, weight) in layers.iter().zip(&weights) {
                    if let (Some(x), Some(weight)) = (&kept, weight) {
                        let gradient = backend.linear_backward_weight(x, &dy, width, first, layer)?;
                        deliver(weight, Contribution::Dense(gradient))?;
                    }
                    first += layer.outputs()?;
                }
                if biases.iter().any(Option::is_some) {
                    let wanted = layers.iter().zip(&biases).map(|(layer, bias)| Ok((layer.outputs()?, bias.is_some())));
                    let gradients = backend.linear_backward_biases(&dy, &wanted.collect::<Result<Vec<_>>>()?)?;
                    for (bias, gradient) in biases.iter().zip(gradients) {
                        if let Some((bias, gradient)) = bias.as_ref().zip(gradient) {
                            deliver(bias, Contribution::Dense(gradient))?;
                        }
                    }
                }
                let mut dx = x_node.map(|_| backend.linear_backward_input(&dy, width, 0, &layers)).transpose()?;
                for adapted in adapted {
                    adapted.backward(&backend, &batch, kept.as_deref(), &dy, dx.as_mut())?;
                }
                if let Some((node, dx)) = x_node.zip(dx) {
                    backward.add(node, dx)?;
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn join(&mut self, parts: Vec<Array<B>>) -> Result<Array<B>> {
        let width = parts.iter().map(|part| part.width).sum();
        let data = self.backend.join(&parts.iter().map(|part| (&*part.data, part.width)).collect::<Vec<_>>())?;
        let out = self.array(data, width, parts.iter().any(|part| part.node.is_some()));
        if let Some(node) = out.node {
            let parts: Vec<_> = parts.into_iter().map(|part| (part.node, part.width)).collect();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let mut first = 0;
                for (node, part) in parts {
                    if let Some(node) = node {
                        let dx = backward.backend.columns(&dy, width, first, part)?;
                        backward.add(node, dx)?;
                    }
                    first += part;
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn regroup(&mut self, x: Array<B>, [a, b]: [usize; 2]) -> Result<Array<B>> {
        let width = x.width;
        let data = self.backend.regroup(&x.data, width, [a, b])?;
        let out = self.array(data, width, x.node.is_some());
        if let Some((node, from)) = out.node.zip(x.node) {
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let dx = backward.backend.regroup(&dy, width, [b, a])?;
                backward.add(from, dx)
            });
        }
        Ok(out)
    }

    fn rotary(&mut self, x: Array<B>, rotary: &Rotary) -> Result<Array<B>> {
        let (width, from) = (x.width, x.node);
        let mut data = take(&self.backend, x.data)?;
        self.backend.rotate(&mut data, width, rotary, &self.batch, Turn::Forth)?;
        let out = self.array(data, width, from.is_some());
        if let Some((node, from)) = out.node.zip(from) {
            let (batch, rotary) = (self.batch.clone(), rotary.clone());
            self.record(move |backward| {
                let mut dy = backward.take_own(node)?;
                backward.backend.rotate(&mut dy, width, &rotary, &batch, Turn::Back)?;
                backward.add(from, dy)
            });
        }
        Ok(out)
    }

    fn attention(&mut self, qkv: Array<B>, attend: Attend) -> Result<Array<B>> {
        let width = attend.heads * attend.head_width(qkv.width);
        let dropout = self.dropout.filter(|_| attend.dropout > 0.0).map(|d| (d, attend.dropout, attend.site));
        let (out, attended) = self.backend.attention(&qkv.data, width, &spec(&self.batch, attend, dropout))?;
        let out = self.shared(out, width, qkv.node.is_some());
        if let Some((node, from)) = out.node.zip(qkv.node) {
            let batch = self.batch.clone();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let attention = spec(&batch, attend, dropout);
                let dx = backward.backend.attention_backward(&qkv.data, &attended, &dy, width, &attention)?;
                backward.add(from, dx)
            });
        }
        Ok(out)
    }

    fn activation(&mut self, x: Array<B>, activation: Activation) -> Result<Array<B>> {
        let out = self.backend.activation(&x.data, activation)?;
        let mut out = self.array(out, x.width, x.node.is_some());
        if let Some((node, from)) = out.node.zip(x.node) {
            let x_again = x.data.clone();
            out.again = Some(Arc::new(move |backend| backend.activation(&x_again, activation)));
            self.record(move |backward| {
                let mut dy = backward.take_own(node)?;
                backward.backend.activation_backward(&mut dy, &x.data, activation)?;
                backward.add(from, dy)
            });
        }
        Ok(out)
    }

    fn swiglu(&mut self, gate: Array<B>, up: Array<B>) -> Result<Array<B>> {
        let out = self.backend.swiglu(&gate.data, &up.data)?;
        let mut out = self.array(out, gate.width, gate.node.is_some() || up.node.is_some());
        if let Some(node) = out.node {
            let (gate_again, up_again) = (gate.data.clone(), up.data.clone());
            out.again = Some(Arc::new(move |backend| backend.swiglu(&gate_again, &up_again)));
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let backend = backward.backend.clone();
                let (mut dgate, mut dup) = (take(&backend, gate.data)?, take(&backend, up.data)?);
                backend.swiglu_backward(&mut dgate, &mut dup, &dy)?;
                for (node, gradient) in [(gate.node, dgate), (up.node, dup)] {
                    if let Some(node) = node {
                        backward.add(node, gradient)?;
                    }
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn add(&mut self, x: Array<B>, y: Array<B>) -> Result<Array<B>> {
        let tracked = x.node.is_some() || y.node.is_some();
        let mut sum = take(&self.backend, y.data)?;
        self.backend.add(&mut sum, &x.data)?;
        let out = self.array(sum, x.width, tracked);
        if let Some(node) = out.node {
            self.record(move |backward| {
                let dy = backward.take(node)?;
                for node in [x.node, y.node].into_iter().flatten() {
                    backward.share(node, &dy)?;
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn dropout(&mut self, x: Array<B>, rate: f32, site: u32) -> Result<Array<B>> {
        let Some(dropout) = self.dropout.filter(|_| rate > 0.0) else { return Ok(x) };
        let (width, from) = (x.width, x.node);
        let mut data = take(&self.backend, x.data)?;
        self.backend.dropout(&mut data, width, &self.batch, &dropout, rate, site)?;
        let out = self.array(data, width, from.is_some());
        if let Some((node, from)) = out.node.zip(from) {
            let batch = self.batch.clone();
            self.record(move |backward| {
                let mut dy = backward.take_own(node)?;
                backward.backend.dropout(&mut dy, width, &batch, &dropout, rate, site)?;
                backward.add(from, dy)
            });
        }
        Ok(out)
    }

    fn wanted(&mut self, x: Array<B>) -> Result<Array<B>> {
        let Some(wanted) = &self.batch.wanted else { return Ok(x) };
        let width = x.width;
        let out = self.backend.select(&x.data, width, wanted)?;
        let out = self.array(out, width, x.node.is_some());
        if let Some((node, from)) = out.node.zip(x.node) {
            let batch = self.batch.clone();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let wanted = batch.wanted.as_deref().unwrap_or_default();
                let dx = backward.backend.select_backward(&dy, width, wanted, batch.inputs.len())?;
                backward.add(from, dx)
            });
        }
        Ok(out)
    }

    fn block<T: Block>(&mut self, x: Array<B>, block: &T) -> Result<Array<B>> {
        let out = self.run_block(x, block)?;
        if let Some(layer) = self.taps.next() {
            let rows = B::len(&out.data) / out.width;
            let alias = Array { again: None, ..out.clone() };
            // The last block has chosen already.
            let kept = if rows == self.batch.inputs.len() { self.wanted(alias)? } else { alias };
            self.taps.kept.push((layer, kept));
        }
        Ok(out)
    }
}

impl<B: Backend> Tape<B> {
    fn run_block<T: Block>(&mut self, x: Array<B>, block: &T) -> Result<Array<B>> {
        if self.keeping != Keeping::BlockInputs {
            return block.forward(self, x);
        }
        let start = |keeping| Tape::keeping(keeping, self.backend.clone(), self.batch.clone(), self.dropout);
        let (input, width, from) = (x.data.clone(), x.width, x.node);
        let out = block.forward(&mut start(Keeping::Nothing), x)?;
        let mut again = start(Keeping::Activations);
        let out = self.shared(out.data, out.width, out.node.is_some());
        if let Some(node) = out.node {
            let block = block.clone();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let x = again.shared(input, width, from.is_some());
                let entry = x.node;
                let Some(last) = block.forward(&mut again, x)?.node else {
                    bail!("a block that was run again led to no variable any more");
                };
                let mut inside = again.backward(last, dy)?;
                match entry.zip(from) {
                    Some((entry, from)) => backward.share(from, &inside.take(entry)?),
                    None => Ok(()),
                }
            });
        }
        Ok(out)
    }
}

/// Where the results of a layer stand among those of others: from column `first` of `channels` on.
#[derive(Clone, Copy)]
struct Place {
    channels: usize,
    first: usize,
}

/// What of low rank lies on a linear layer, in a pass: `y += scale B A drop(x)`, in two thin products.
struct Adapted<B: Backend> {
    low_rank: LowRank,
    place: Place,
    dropout: Option<Dropout>,
    /// `A drop(x)`, `[rows, r]`.
    inner: B::Buffer,
}

impl<B: Backend> Adapted<B> {
    fn forward(
        low_rank: &LowRank,
        place: Place,
        dropout: Option<Dropout>,
        backend: &B,
        batch: &Packed,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<Self> {
        let dropout = dropout.filter(|_| low_rank.dropout > 0.0);
        let a = Layer::thin(&low_rank.a);
        let inner = match dropout {
            None => backend.linear(x, std::slice::from_ref(&a))?,
            Some(dropout) => {
                let x = dropped(low_rank, &dropout, backend, batch, backend.copy(x)?)?;
                backend.linear(&x, std::slice::from_ref(&a))?
            }
        };
        backend.linear_add(out, place.channels, place.first, &inner, &Layer::thin(&low_rank.scaled_b()?))?;
        Ok(Adapted { low_rank: low_rank.clone(), place, dropout, inner })
    }

    fn is_trained(&self) -> bool {
        self.low_rank.a.is_variable()
    }

    /// Delivers the gradients of both matrices where they are trained, from `x`; adds that of `x` to `dx`.
    fn backward(
        self,
        backend: &B,
        batch: &Packed,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: Option<&mut B::Buffer>,
    ) -> Result<()> {
        let Adapted { low_rank, place: Place { channels, first }, dropout, inner } = self;
        let (a, b) = (Layer::thin(&low_rank.a), Layer::thin(&low_rank.scaled_b()?));
        let (rank, inputs) = a.weight.dims2()?;
        let dinner = backend.linear_backward_input(dy, channels, first, std::slice::from_ref(&b))?; // [rows, r]
        if let (Some(x), true) = (x, low_rank.a.is_variable()) {
            let gradient = backend.linear_backward_weight(&inner, dy, channels, first, &b)?;
            deliver(&low_rank.b, Contribution::Dense(gradient.affine(low_rank.scale, 0.0)?))?;
            let gradient = match &dropout {
                None => backend.linear_backward_weight(x, &dinner, rank, 0, &a)?,
                Some(dropout) => {
                    let x = dropped(&low_rank, dropout, backend, batch, backend.copy(x)?)?;
                    backend.linear_backward_weight(&x, &dinner, rank, 0, &a)?
                }
            };
            deliver(&low_rank.a, Contribution::Dense(gradient))?;
        }
        match (dx, &dropout) {
            (None, _) => Ok(()),
            (Some(dx), None) => {
                let back = Layer { layout: super::Layout::InOut, ..a };
                backend.linear_add(dx, inputs, 0, &dinner, &back)
            }
            (Some(dx), Some(dropout)) => {
                let through = backend.linear_backward_input(&dinner, rank, 0, std::slice::from_ref(&a))?;
                backend.add(dx, &dropped(&low_rank, dropout, backend, batch, through)?)
            }
        }
    }
}

/// `x` as `A` sees it, or the gradient of what it saw as that of `x`.
fn dropped<B: Backend>(
    low_rank: &LowRank,
    dropout: &Dropout,
    backend: &B,
    batch: &Packed,
    mut x: B::Buffer,
) -> Result<B::Buffer> {
    let (_, width) = low_rank.a.dims2()?;
    backend.dropout(&mut x, width, batch, dropout, low_rank.dropout, low_rank.site)?;
    Ok(x)
}

/// Data that a step wants to have again.
enum Kept<B: Backend> {
    Data(Arc<B::Buffer>),
    Again(Again<B>),
}

impl<B: Backend> Kept<B> {
    fn of(x: &Array<B>) -> Self {
        match &x.again {
            Some(again) => Kept::Again(again.clone()),
            None => Kept::Data(x.data.clone()),
        }
    }

    fn get(self, backend: &B) -> Result<Arc<B::Buffer>> {
        match self {
            Kept::Data(data) => Ok(data),
            Kept::Again(again) => Ok(Arc::new(again(backend)?)),
        }
    }
}

/// The row of its table that belongs to each row's position, where position 0 has row `first`.
fn of_positions(batch: &Packed, first: usize) -> Vec<(usize, u32)> {
    batch.positions.iter().map(|position| first as u32 + position).enumerate().collect()
}

fn spec(batch: &Packed, attend: Attend, dropout: Option<(Dropout, f32, u32)>) -> Attention<'_> {
    let Attend { heads, kv_heads, scale, window, .. } = attend;
    Attention { segments: &batch.segments, rows: &batch.rows, heads, kv_heads, scale, window, dropout }
}

/// The data itself where nobody else holds it, else a copy.
fn take<B: Backend>(backend: &B, data: Arc<B::Buffer>) -> Result<B::Buffer> {
    Arc::try_unwrap(data).or_else(|shared| backend.copy(&shared))
}

/// A weight that wants a gradient; `None` for a frozen one.
///
/// Errors for a weight that is itself computed from variables: its gradient would be lost.
fn leaf(weight: &Tensor) -> Result<Option<Tensor>> {
    if !weight.is_variable() && weight.track_op() {
        bail!("a weight was computed from a variable: only variables and frozen tensors can be weights of a model");
    }
    Ok(weight.is_variable().then(|| weight.clone()))
}

/// The same of a parameter: what is kept encoded is frozen.
fn leaf_of(weight: &Weight) -> Result<Option<Tensor>> {
    Ok(weight.dense().map(leaf).transpose()?.flatten())
}

/// Gradients on their way back.
struct Backward<B: Backend> {
    backend: B,
    gradients: Vec<Option<Arc<B::Buffer>>>,
    prompt: Option<Tensor>,
}

impl<B: Backend> Backward<B> {
    /// The whole gradient of a node: all its readers came later, and have run.
    fn take(&mut self, node: usize) -> Result<Arc<B::Buffer>> {
        match self.gradients[node].take() {
            Some(gradient) => Ok(gradient),
            None => bail!("a result of the model was computed and not used"),
        }
    }

    /// The same, to change.
    fn take_own(&mut self, node: usize) -> Result<B::Buffer> {
        let gradient = self.take(node)?;
        take(&self.backend, gradient)
    }

    /// What has been added to a node so far, to add more in place.
    fn owned(&mut self, node: usize) -> Result<Option<B::Buffer>> {
        self.gradients[node].take().map(|gradient| take(&self.backend, gradient)).transpose()
    }

    /// The same, or zeros where nothing was added, or no gradient is wanted.
    fn sum(&mut self, node: Option<usize>, length: usize) -> Result<B::Buffer> {
        match node.map(|node| self.owned(node)).transpose()?.flatten() {
            Some(so_far) => Ok(so_far),
            None => self.backend.zeros(length),
        }
    }

    fn add(&mut self, node: usize, gradient: B::Buffer) -> Result<()> {
        let gradient = match self.owned(node)? {
            Some(mut so_far) => {
                self.backend.add(&mut so_far, &gradient)?;
                so_far
            }
            None => gradient,
        };
        self.gradients[node] = Some(Arc::new(gradient));
        Ok(())
    }

    fn share(&mut self, node: usize, gradient: &Arc<B::Buffer>) -> Result<()> {
        let gradient = match self.owned(node)? {
            Some(mut so_far) => {
                self.backend.add(&mut so_far, gradient)?;
                Arc::new(so_far)
            }
            None => gradient.clone(),
        };
        self.gradients[node] = Some(gradient);
        Ok(())
    }
}

/// A forward pass that was run, as one operation of candle: of the anchor and the prompt.
struct Pass<B: Backend> {
    output: Mutex<Option<(Storage, Shape)>>,
    /// With the node of the last result.
    tape: Mutex<Option<(Tape<B>, usize)>>,
}

impl<B: Backend> Pass<B> {
    fn output(&self) -> (Storage, Shape) {
        let output = self.output.lock().expect("nothing panics while it is held").take();
        output.expect("an operation is applied once")
    }
}

impl<B: Backend> CustomOp2 for Pass<B> {
    fn name(&self) -> &'static str {
        "language-model"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.output() {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => bail!("weights on the cpu with results elsewhere"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        match self.output() {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => bail!("weights on a gpu with results elsewhere"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some((tape, last)) = self.tape.lock().expect("nothing panics while it is held").take() else {
            bail!("a second backward pass through the same hidden states: compute them again first");
        };
        let gradient = tape.backend.buffer(&gradient.contiguous()?)?;
        Ok((None, tape.backward(last, Arc::new(gradient))?.prompt))
    }
}
