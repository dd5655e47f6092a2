//! Names of devices.

use anyhow::{Context, bail};
use candle_core::Device;
use contract::Result;

/// The device called `cpu` or `cuda:N`.
///
/// Errors when the name is neither, when the program was built without CUDA, or when there is no such GPU.
pub fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let Some(ordinal) = name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) else {
        bail!("unknown device `{name}`: expected `cpu` or `cuda:N`, for example `cuda:0`");
    };
    if cfg!(not(feature = "cuda")) {
        bail!("device `{name}` needs a program built with `--features cuda`; this one runs on `cpu` only");
    }
    Device::new_cuda(ordinal).with_context(|| format!("cannot open device `{name}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_names_are_devices() {
        assert!(matches!(device("cpu").unwrap(), Device::Cpu));
        for name in ["gpu", "cuda", "cuda:", "cuda:x", "CPU"] {
            assert!(device(name).unwrap_err().to_string().contains("expected `cpu` or `cuda:N`"), "{name}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_without_cuda_says_how_to_build() {
        assert!(device("cuda:0").unwrap_err().to_string().contains("--features cuda"));
    }
}
