//! What is trained on top of a frozen matrix.

use candle_core::{Result, Tensor, Var};

/// Two thin matrices whose product is added to a frozen one: `W + scale B A` (Hu et al., "LoRA: Low-rank adaptation of large
/// language models", 2021, section 4.1). A clone is a handle of the same ones.
#[derive(Clone)]
pub(crate) struct LowRank {
    /// `[r, in]`.
    pub(crate) a: Tensor,
    /// `[out, r]`.
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    /// Share of the elements of the layer's input that `A` does not see while it is trained.
    pub(crate) dropout: f32,
    /// Dropout site.
    pub(crate) site: u32,
}

impl LowRank {
    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(LowRank { a: f(&self.a)?, b: f(&self.b)?, ..*self })
    }

    /// As variables. Those that are variables already are taken as they are.
    pub(crate) fn trainable(&self) -> Result<Self> {
        self.map(|part| Ok(Var::from_tensor(part)?.into_inner()))
    }

    /// A view through which no gradient flows. It sees later updates.
    pub(crate) fn frozen(&self) -> Self {
        LowRank { a: self.a.detach(), b: self.b.detach(), ..*self }
    }

    /// An independent, frozen copy.
    pub(crate) fn deep_clone(&self) -> Result<Self> {
        self.map(|part| part.detach().copy())
    }

    /// `scale B`, through which no gradient flows.
    pub(crate) fn scaled_b(&self) -> Result<Tensor> {
        self.b.detach().affine(self.scale, 0.0)
    }

    /// `scale B A`, `[out, in]`; differentiable.
    pub(crate) fn product(&self) -> Result<Tensor> {
        self.b.matmul(&self.a)? * self.scale
    }
}
