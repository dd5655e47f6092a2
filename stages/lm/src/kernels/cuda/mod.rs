//! The kernels on a CUDA device: one `.cu` file a group, compiled to PTX by `build.rs`.
//!
//! A kernel is `extern "C" __global__` with a name of its own, so that the software device (`stages/lm/cuda/software`) finds
//! it by that name.

/// The PTX of `NAME.cu`.
#[cfg_attr(not(test), expect(unused_macros, reason = "no operation has a kernel yet"))]
macro_rules! ptx {
    ($name:literal) => {
        include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx"))
    };
}

#[cfg(test)]
mod tests {
    use candle_core::cuda::cudarc::driver::{LaunchConfig, PushKernelArg};

    #[test]
    fn a_kernel_of_ours_runs() {
        let Some(device) = super::testing::device() else { return };
        let count = 1000usize;
        let kernel = device.get_or_load_custom_func("fill_f32", "fill", ptx!("fill")).unwrap();
        let mut filled = device.alloc_zeros::<f32>(count).unwrap();
        let mut launch = kernel.builder();
        launch.arg(&mut filled).arg(&count).arg(&1.5f32);
        // SAFETY: the kernel writes `count` elements and nothing else.
        unsafe { launch.launch(LaunchConfig::for_num_elems(count as u32)) }.unwrap();
        assert_eq!(device.clone_dtoh(&filled).unwrap(), vec![1.5; count]);
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use candle_core::Device;
    use candle_core::cuda::CudaDevice;

    /// The first CUDA device, or none with a line that says that a test was skipped.
    pub(crate) fn device() -> Option<CudaDevice> {
        match Device::new_cuda(0).and_then(|device| Ok(device.as_cuda_device()?.clone())) {
            Ok(device) => Some(device),
            Err(error) => {
                eprintln!("skipped: no CUDA device ({error})");
                None
            }
        }
    }
}
