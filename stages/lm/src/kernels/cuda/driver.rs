//! What the driver is asked before any kernel runs.

use std::ptr::from_mut;

use anyhow::{Context, bail};
use candle_core::cuda::CudaDevice;
use candle_core::cuda::cudarc::cublas::sys::{cublasGetProperty, cublasStatus_t, libraryPropertyType_t};
use candle_core::cuda::cudarc::curand::sys::{curandGetVersion, curandStatus_t};
use candle_core::cuda::cudarc::driver::{CudaContext, result, sys};
use contract::Result;

/// How many GPUs are visible. Nothing is allocated on them.
///
/// Errors when there is none, or when CUDA's libraries are not found.
pub(crate) fn gpus() -> Result<usize> {
    let count = CudaContext::device_count().context("no NVIDIA GPU with a driver is visible")?;
    let mut version = 0;
    // SAFETY: both functions write one integer, through a pointer to one.
    let (products, numbers) = unsafe {
        (
            cublasGetProperty(libraryPropertyType_t::MAJOR_VERSION, from_mut(&mut version)),
            curandGetVersion(&mut version),
        )
    };
    if products != cublasStatus_t::CUBLAS_STATUS_SUCCESS || numbers != curandStatus_t::CURAND_STATUS_SUCCESS {
        bail!(
            "there is a GPU, but CUDA's libraries libcublas and libcurand are not found; name their folder in \
             CUDA_SHIM_PATH, for example `site-packages/nvidia/cu13/lib` where PyTorch is installed"
        );
    }
    Ok(usize::try_from(count)?)
}

/// Opens a GPU whose freed memory is kept for the next allocation: training allocates the same sizes again and again.
///
/// All work on it goes into one stream.
pub(crate) fn open(ordinal: usize) -> Result<CudaDevice> {
    let device = CudaDevice::new_with_stream(ordinal)?;
    let context = device.cuda_stream().context().clone();
    let mut keep = u64::MAX;
    // SAFETY: with one stream there is nothing to order by events. The pool is that of a device that was just opened, and
    // its threshold is one 64-bit number.
    unsafe {
        device.disable_event_tracking();
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, from_mut(&mut keep).cast())?;
    }
    Ok(device)
}
