//! The output head of a model by itself, which is all that is needed of a target whose hidden states are at hand.

use candle_core::Tensor;
use contract::Result;

use crate::dtype::Dtype;

/// An output head: logits are `hidden weight^T`.
#[derive(Clone, Debug)]
pub struct Head {
    /// `[V, C]`.
    pub weight: Tensor,
    /// Rows that there are tokens for, the first of `V`: those behind are padding.
    pub tokens: usize,
}

impl Head {
    /// Rows `V`, padding included.
    pub fn rows(&self) -> usize {
        self.weight.dims()[0]
    }

    /// The rows that there are tokens for.
    pub fn of_tokens(&self) -> Result<Tensor> {
        Ok(self.weight.narrow(0, 0, self.tokens)?)
    }

    /// The rows by which a target is compared with a trainee whose head has `rows`: families pad their sizes differently.
    pub fn beside(&self, rows: usize) -> Result<Tensor> {
        if self.rows() == rows { Ok(self.weight.clone()) } else { self.of_tokens() }
    }

    /// The head, to be computed in `dtype`.
    ///
    /// Errors when its device does not compute in that type.
    pub fn computed_in(self, dtype: Dtype) -> Result<Self> {
        dtype.check(self.weight.device())?;
        Ok(Head { weight: self.weight.to_dtype(dtype.candle())?, ..self })
    }
}
