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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_in_f32_alone() {
        assert!(Dtype::F32.check(&Device::Cpu).is_ok());
        let error = Dtype::Bf16.check(&Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("`dtype: bf16` needs a GPU"), "{error}");
        assert_eq!(serde_json::from_str::<Dtype>("\"bf16\"").unwrap(), Dtype::Bf16);
    }
}
