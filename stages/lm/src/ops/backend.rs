//! What a [`Tape`](super::tape::Tape) computes with: the arithmetic of every operation and of its way back, on one kind of
//! device.
//!
//! The tape knows the order of things and who needs a gradient; a backend knows buffers and loops.

use std::sync::Arc;

use candle_core::{Result, Shape, Storage, Tensor};

use super::rotary::Rotary;
use super::{Layer, LayerNorm, Positions, RmsNorm};
use crate::batch::Packed;
use crate::kernels::attention::Attention;
use crate::kernels::rope::Turn;
use crate::terms::activation::Activation;
use crate::terms::dropout::Dropout;
use crate::weights::Weight;

/// Loops over buffers of a device. A buffer is `[rows, channels]`, row after row; weights are tensors on that device.
pub(crate) trait Backend: Clone + Send + Sync + 'static {
    /// Activations and their gradients.
    type Buffer: Send + Sync + 'static;
    /// What the way back of a norm wants to know of each row.
    type Moments: Send + 'static;
    /// What the way back of attention wants to know beside its input.
    type Attended: Send + 'static;

    /// Elements of a buffer.
    fn len(buffer: &Self::Buffer) -> usize;
    fn zeros(&self, length: usize) -> Result<Self::Buffer>;
    fn copy(&self, x: &Self::Buffer) -> Result<Self::Buffer>;
    /// A contiguous tensor's elements.
    fn buffer(&self, tensor: &Tensor) -> Result<Self::Buffer>;
    fn tensor(&self, x: Self::Buffer, shape: Shape) -> Result<Tensor>;
    /// The buffer as candle's storage, for the result of a custom operation.
    fn storage(&self, x: Self::Buffer) -> Result<Storage>;

    /// The vectors of tokens, prompt and, where they have some, positions, added.
    fn embed(
        &self,
        batch: &Packed,
        tokens: &Weight,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> Result<Self::Buffer>;
    /// The gradient of the prompt, of `shape` and in f32: the sums of the rows where each of its vectors stands.
    fn embed_backward_prompt(&self, batch: &Packed, dy: &Self::Buffer, width: usize, shape: Shape) -> Result<Tensor>;

    /// The vector of every row's position.
    fn positions(&self, batch: &Packed, positions: Positions<'_>) -> Result<Self::Buffer>;

    fn layer_norm(&self, x: &Self::Buffer, norm: &LayerNorm) -> Result<(Self::Buffer, Self::Moments)>;
    /// Adds the gradient of `x` to `dx`; gives those of weight and bias where `parameters`.
    fn layer_norm_backward(
        &self,
        dx: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Tensor,
        moments: &Self::Moments,
        dy: &Self::Buffer,
        parameters: bool,
    ) -> Result<Option<(Tensor, Tensor)>>;

    /// Root mean square norm of runs of as many channels as the weight has; its moments have a mean of 0.
    fn rms_norm(&self, x: &Self::Buffer, norm: &RmsNorm) -> Result<(Self::Buffer, Self::Moments)>;
    /// Adds the gradient of `x` to `dx`; gives that of the weight where `parameters`.
    fn rms_norm_backward(
        &self,
        dx: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Tensor,
        moments: &Self::Moments,
        dy: &Self::Buffer,
        parameters: bool,
    ) -> Result<Option<Tensor>>;

    /// What linear layers make of `x`, side by side.
    fn linear(&self, x: &Self::Buffer, layers: &[Layer]) -> Result<Self::Buffer>;
    /// Adds what a linear layer, its bias aside, makes of `x` to its columns of `out`, which begin at `first` of `channels`.
    fn linear_add(
        &self,
        out: &mut Self::Buffer,
        channels: usize,
        first: usize,
        x: &Self::Buffer,
        layer: &Layer,
    ) -> Result<()>;
    /// The gradient of `x`: the sum over the layers, whose gradients stand side by side in `dy`, from column `first` of
    /// `channels` on.
    fn linear_backward_input(
        &self,
        dy: &Self::Buffer,
        channels: usize,
        first: usize,
        layers: &[Layer],
    ) -> Result<Self::Buffer>;
    /// The gradient of a layer's matrix, in its layout. Its columns of the `channels` of `dy` begin at `first`.
    fn linear_backward_weight(
        &self,
        x: &Self::Buffer,
        dy: &Self::Buffer,
        channels: usize,
        first: usize,
        layer: &Layer,
    ) -> Result<Tensor>;
    /// The gradients of the biases of layers side by side, as many columns of `dy` each: those that are wanted.
    fn linear_backward_biases(&self, dy: &Self::Buffer, biases: &[(usize, bool)]) -> Result<Vec<Option<Tensor>>>;

    /// The rows of buffers side by side; with each its channels.
    fn join(&self, parts: &[(&Self::Buffer, usize)]) -> Result<Self::Buffer>;
    /// The way back: `count` of the `width` columns of `x`, from the `first` on.
    fn columns(&self, x: &Self::Buffer, width: usize, first: usize, count: usize) -> Result<Self::Buffer>;
    /// Of rows that are `[a, b, D]` rows that are `[b, a, D]`; `width` is `a b D`.
    fn regroup(&self, x: &Self::Buffer, width: usize, groups: [usize; 2]) -> Result<Self::Buffer>;

    /// Turns heads in place.
    fn rotate(&self, x: &mut Self::Buffer, width: usize, rotary: &Rotary, batch: &Packed, turn: Turn) -> Result<()>;

    /// `[N, H D]` from queries, keys and values `[N, (H + 2G) D]`; `width` is `H D`.
    fn attention(
        &self,
        qkv: &Self::Buffer,
        width: usize,
        attention: &Attention<'_>,
    ) -> Result<(Arc<Self::Buffer>, Self::Attended)>;
    /// The gradient of `qkv`, from that of the result.
    fn attention_backward(
        &self,
        qkv: &Self::Buffer,
        attended: &Self::Attended,
        dy: &Self::Buffer,
        width: usize,
        attention: &Attention<'_>,
    ) -> Result<Self::Buffer>;

    fn activation(&self, x: &Self::Buffer, activation: Activation) -> Result<Self::Buffer>;
    /// Multiplies `dy` by the derivative at `x`.
    fn activation_backward(&self, dy: &mut Self::Buffer, x: &Self::Buffer, activation: Activation) -> Result<()>;

    /// `silu(gate) * up`.
    fn swiglu(&self, gate: &Self::Buffer, up: &Self::Buffer) -> Result<Self::Buffer>;
    /// Puts the gradients of `gate` and `up` in their places.
    fn swiglu_backward(&self, gate: &mut Self::Buffer, up: &mut Self::Buffer, dy: &Self::Buffer) -> Result<()>;

    /// `x += y`.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<()>;
    /// Drops elements of `x`; its own way back.
    fn dropout(
        &self,
        x: &mut Self::Buffer,
        width: usize,
        batch: &Packed,
        dropout: &Dropout,
        rate: f32,
        site: u32,
    ) -> Result<()>;

    /// Some rows of `x`.
    fn select(&self, x: &Self::Buffer, width: usize, rows: &[u32]) -> Result<Self::Buffer>;
    /// The way back: the rows of `dy` at their places among `count` rows, zeros elsewhere.
    fn select_backward(&self, dy: &Self::Buffer, width: usize, rows: &[u32], count: usize) -> Result<Self::Buffer>;
}
