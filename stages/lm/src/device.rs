//! Names of devices.

use anyhow::bail;
use candle_core::Device;
use contract::Result;

/// The device called `cpu` or `cuda:N`. A thread gets the same device for a name every time, so that
/// tensors of two calls can meet; another thread gets a stream of work of its own.
///
/// Errors when the name is neither, when the program was built without CUDA, or when there is no such GPU.
pub fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let Some(ordinal) = name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) else {
        bail!("unknown device `{name}`: expected `cpu` or `cuda:N`, for example `cuda:0`");
    };
    gpu(ordinal)
}

/// How many GPUs this program can use, or what they lack; nothing when it was built without CUDA.
pub fn gpus() -> Option<Result<usize>> {
    #[cfg(feature = "cuda")]
    return Some(crate::kernels::cuda::driver::gpus());
    #[cfg(not(feature = "cuda"))]
    None
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: usize) -> Result<Device> {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use anyhow::Context;

    use crate::kernels::cuda::driver;

    thread_local! {
        static OPEN: RefCell<BTreeMap<usize, Device>> = const { RefCell::new(BTreeMap::new()) };
    }
    OPEN.with_borrow_mut(|open| {
        if let Some(device) = open.get(&ordinal) {
            return Ok(device.clone());
        }
        driver::gpus()?;
        let device = driver::open(ordinal).with_context(|| format!("cannot open device `cuda:{ordinal}`"))?;
        Ok(open.entry(ordinal).or_insert(Device::Cuda(device)).clone())
    })
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: usize) -> Result<Device> {
    bail!("device `cuda:{ordinal}` needs a program built with `--features cuda`; this one runs on `cpu` only")
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

    #[cfg(feature = "cuda")]
    #[test]
    fn cuda_devices_are_opened_once() {
        match gpus().expect("built with CUDA") {
            Ok(count) => {
                let (first, second) = (device("cuda:0").unwrap(), device("cuda:0").unwrap());
                assert!(first.same_device(&second));
                assert!(device(&format!("cuda:{count}")).is_err());
            }
            Err(error) => assert_eq!(device("cuda:0").unwrap_err().to_string(), error.to_string()),
        }
    }
}
