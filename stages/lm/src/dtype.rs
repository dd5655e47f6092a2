//! The type that a model computes in.

use candle_core::{DType, Device};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What matrices are multiplied in. Weights that are trained, their gradients and the optimiser's moments are f32 always, and
/// so are sums, norms and losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the range of f32 and 8 bits of precision: faster, on a GPU only.
    Bf16,
}

impl Dtype {
    /// Errors when `device` does not compute in it.
    pub fn check(self, device: &Device) -> contract::Result<()> {
        anyhow::ensure!(
            self == Dtype::F32 || device.is_cuda(),
            "`dtype: bf16` needs a GPU: on the CPU set `dtype: f32`, or choose another device"
        );
        Ok(())
    }

    /// Candle's name of it.
    pub(crate) fn candle(self) -> DType {
        match self {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
        }
    }
}
