//! The nonlinearity of a feed-forward layer.

use serde::{Deserialize, Serialize};

/// The nonlinearity of the feed-forward layer, under its Hugging Face names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU in the tanh approximation.
    #[serde(alias = "gelu_pytorch_tanh", alias = "gelu_fast")]
    GeluNew,
    /// GELU by the error function.
    Gelu,
    /// max(x, 0).
    Relu,
}
