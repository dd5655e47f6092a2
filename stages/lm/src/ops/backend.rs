//! What a [`Tape`](super::tape::Tape) computes with: the arithmetic of every operation and of its way back, on one kind of
//! device.
//!
//! The tape knows the order of things and who needs a gradient; a backend knows buffers and loops.

use std::sync::Arc;

use candle_core::{Result, Shape, Storage, Tensor};

use super::{Dropout, Linear, Norm, Rows};
use crate::config::Activation;
use crate::kernels::attention::Attention;

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

    /// The vectors of tokens, prompt and positions, added.
    fn embed(&self, rows: &Rows, tokens: &Tensor, positions: &Tensor, prompt: Option<&Tensor>) -> Result<Self::Buffer>;
    /// The gradient of the prompt, of `shape` and in f32: the sums of the rows where each of its vectors stands.
    fn embed_backward_prompt(&self, rows: &Rows, dy: &Self::Buffer, width: usize, shape: Shape) -> Result<Tensor>;

    fn layer_norm(&self, x: &Self::Buffer, norm: Norm<'_>, eps: f32) -> Result<(Self::Buffer, Self::Moments)>;
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

    /// `x weight + bias`.
    fn linear(&self, x: &Self::Buffer, linear: Linear<'_>) -> Result<Self::Buffer>;
    /// `dy weight^T`.
    fn linear_backward_input(&self, dy: &Self::Buffer, weight: &Tensor) -> Result<Self::Buffer>;
    /// `x^T dy`, `[depth, width]`, and the sum of the rows of `dy`, `[width]`.
    fn linear_backward_weight(
        &self,
        x: &Self::Buffer,
        dy: &Self::Buffer,
        depth: usize,
        width: usize,
    ) -> Result<(Tensor, Tensor)>;

    /// `[N, C]` from queries, keys and values `[N, 3C]`.
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

    /// `x += y`.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<()>;
    /// Drops elements of `x`; its own way back.
    fn dropout(
        &self,
        x: &mut Self::Buffer,
        width: usize,
        rows: &Rows,
        dropout: &Dropout,
        rate: f32,
        site: u32,
    ) -> Result<()>;

    /// Some rows of `x`.
    fn select(&self, x: &Self::Buffer, width: usize, rows: &[u32]) -> Result<Self::Buffer>;
    /// The way back: the rows of `dy` at their places among `count` rows, zeros elsewhere.
    fn select_backward(&self, dy: &Self::Buffer, width: usize, rows: &[u32], count: usize) -> Result<Self::Buffer>;
}
