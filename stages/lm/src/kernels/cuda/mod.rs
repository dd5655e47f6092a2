//! The loops of [`kernels`](super) on a CUDA device: one `.cu` file a group, and a Rust file beside it that launches it.
//!
//! What the files have in common:
//!
//! - Matrices are dense and row-major, in `f32` or `bf16` ([`Element`]); sums and everything between reading and writing are
//!   in f32. Vectors of parameters (biases, weights of norms) and gradients of parameters are f32 always.
//! - The same bits come out whenever the same launch is repeated: no floating-point atomics, sums in a fixed order.
//! - Everything goes to the device's one stream, in order; nothing waits for the host. So a sequence of launches over
//!   fixed buffers can be captured as a graph.
//! - Where nothing is to be done (no rows), nothing is launched.
//! - Lengths are checked here, and panic: they follow from the shapes of the caller, never from a user.

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod decode;
pub(crate) mod driver;
pub(crate) mod elementwise;
pub(crate) mod embed;
pub(crate) mod head;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod sample;

#[cfg(test)]
mod tests;

use std::marker::PhantomData;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use half::bf16;

use crate::terms::dropout::Dropout;

/// What a matrix on the device is made of.
pub(crate) trait Element: DeviceRepr + ValidAsZeroBits + Copy + Send + Sync + 'static {
    /// Behind the underscore in the names of its kernels.
    const SUFFIX: &'static str;
}

impl Element for f32 {
    const SUFFIX: &'static str = "f32";
}

impl Element for bf16 {
    const SUFFIX: &'static str = "bf16";
}

/// Compiled kernels of one `.cu` file.
struct Module {
    name: &'static str,
    ptx: &'static str,
}

/// The module of `NAME.cu`.
macro_rules! module {
    ($name:literal) => {
        crate::kernels::cuda::Module {
            name: concat!("lm_", $name),
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),
        }
    };
}
use module;

/// Dropout of a matrix: the elements that [`masks::fill`](super::masks::fill) drops, whichever rows share the matrix.
#[derive(Clone, Copy)]
pub(crate) struct Mask<'a> {
    pub(crate) dropout: Dropout,
    /// Share of elements that are dropped.
    pub(crate) rate: f32,
    /// Which mask of the model.
    pub(crate) site: u32,
    /// What every row is keyed by: see [`row_keys`].
    pub(crate) keys: &'a CudaSlice<u32>,
}

/// For every row the folded row id of its sequence and its position in it: `[N, 2]`, for [`Mask::keys`].
pub(crate) fn row_keys(segments: &[std::ops::Range<usize>], ids: &[u64]) -> Vec<u32> {
    let rows = segments.iter().zip(ids);
    rows.flat_map(|(segment, id)| (0..segment.len() as u32).flat_map(|line| [fold(*id), line])).collect()
}

/// A row id as random numbers are keyed by it.
pub(crate) fn fold(id: u64) -> u32 {
    (id ^ id >> 32) as u32
}

/// Threads of a block for loops over single elements.
const THREADS: u32 = 256;

/// Elements that a thread moves at a time. The same number stands in `common.cuh`.
const PACK: usize = 8;

/// Blocks for a loop over `count` elements, [`PACK`] of them a thread.
fn blocks(count: usize) -> u32 {
    count.div_ceil(PACK * THREADS as usize) as u32
}

/// Threads of a block that works on one row: one for each [`PACK`] columns, in whole warps, at most `most`.
fn threads_for_row(width: usize, most: u32) -> u32 {
    (width.div_ceil(PACK) as u32).next_multiple_of(32).clamp(32, most)
}

/// A launch in the making: a kernel, and its arguments in their order.
struct Call<'a> {
    device: &'a CudaDevice,
    stream: Arc<CudaStream>,
    module: &'static Module,
    kernel: String,
    /// Addresses and numbers. A kernel reads as many bytes of each as its parameter has, lowest first.
    arguments: Vec<u64>,
    /// The buffers whose addresses are in `arguments` stay borrowed until the launch.
    buffers: PhantomData<&'a ()>,
}

impl<'a> Call<'a> {
    /// Of the kernel `root_SUFFIX`.
    fn of<T: Element>(device: &'a CudaDevice, module: &'static Module, root: &str) -> Self {
        Self::named(device, module, format!("{root}_{}", T::SUFFIX))
    }

    fn named(device: &'a CudaDevice, module: &'static Module, kernel: impl Into<String>) -> Self {
        let (stream, kernel) = (device.cuda_stream(), kernel.into());
        Call { device, stream, module, kernel, arguments: Vec::new(), buffers: PhantomData }
    }

    /// A buffer that the kernel reads.
    fn read<T>(mut self, buffer: &'a impl DevicePtr<T>) -> Self {
        // Guards order the use of a buffer by several streams; there is one.
        self.arguments.push(buffer.device_ptr(&self.stream).0);
        self
    }

    /// A buffer that the kernel reads, or a null pointer.
    fn read_if<T>(mut self, buffer: Option<&CudaView<'a, T>>) -> Self {
        self.arguments.push(buffer.map_or(0, |buffer| buffer.device_ptr(&self.stream).0));
        self
    }

    /// A buffer that the kernel writes.
    fn write<T>(mut self, buffer: &'a mut impl DevicePtrMut<T>) -> Self {
        self.arguments.push(buffer.device_ptr_mut(&self.stream).0);
        self
    }

    /// A buffer that the kernel takes twice: what it writes and what it reads.
    fn write_twice<T>(mut self, buffer: &'a mut impl DevicePtrMut<T>) -> Self {
        let address = buffer.device_ptr_mut(&self.stream).0;
        self.arguments.extend([address; 2]);
        self
    }

    /// A null pointer.
    fn null(mut self) -> Self {
        self.arguments.push(0);
        self
    }

    /// A whole number: `int`, `unsigned` or `long long` in the kernel.
    fn size(mut self, number: usize) -> Self {
        self.arguments.push(number as u64);
        self
    }

    /// A `float`.
    fn float(mut self, number: f32) -> Self {
        self.arguments.push(u64::from(number.to_bits()));
        self
    }

    /// A `double`.
    fn double(mut self, number: f64) -> Self {
        self.arguments.push(number.to_bits());
        self
    }

    /// A `Mask` without its site; with null keys where there is no dropout.
    fn mask(mut self, mask: Option<Mask<'a>>) -> Self {
        let keys = mask.map_or(0, |mask| mask.keys.device_ptr(&self.stream).0);
        self.arguments.push(keys);
        self.dropout(mask.map(|mask| (mask.dropout, mask.rate, mask.site)))
    }

    /// Seed, update, purpose, threshold and factor of a dropout.
    fn dropout(self, dropout: Option<(Dropout, f32, u32)>) -> Self {
        let none = Dropout { seed: 0, update: 0, purpose: 0 };
        let (dropout, rate, site) = dropout.unwrap_or((none, 0.0, 0));
        // As in `masks::fill`: an element is dropped when its 32 bits are below the rate's share of them.
        let threshold = (f64::from(rate) * 4_294_967_296.0) as u32;
        let purpose = dropout.purpose.wrapping_add(site);
        self.size(dropout.seed as usize)
            .size(dropout.update as usize)
            .size(purpose as usize)
            .size(threshold as usize)
            .float(1.0 / (1.0 - rate))
    }

    /// Starts blocks of `threads`, with so many bytes of shared memory beside what the kernel declares.
    fn launch(self, blocks: impl Into<Grid>, threads: u32, shared: usize) -> Result<()> {
        let Grid(grid_dim) = blocks.into();
        if grid_dim.0 == 0 || grid_dim.1 == 0 || grid_dim.2 == 0 {
            return Ok(());
        }
        let function = self.device.get_or_load_custom_func(&self.kernel, self.module.name, self.module.ptx)?;
        if shared > SHARED_WITHOUT_ASKING {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared as i32).w()?;
        }
        let mut builder = function.builder();
        for argument in &self.arguments {
            builder.arg(argument);
        }
        let config = LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: shared as u32 };
        // SAFETY: every launch is in a function that gives the arguments in the order and of the types that the kernel
        // declares, and has checked that all elements the kernel touches lie in the buffers. Buffers that are written are
        // borrowed exclusively until here, and what is enqueued later on the same stream runs later.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

/// Dynamic shared memory that a launch gets without an attribute of the function, in bytes, with room for what is declared.
const SHARED_WITHOUT_ASKING: usize = 40 * 1024;

/// Blocks of a launch in up to three directions.
struct Grid((u32, u32, u32));

impl From<u32> for Grid {
    fn from(x: u32) -> Self {
        Grid((x, 1, 1))
    }
}

impl From<(u32, u32)> for Grid {
    fn from((x, y): (u32, u32)) -> Self {
        Grid((x, y, 1))
    }
}

impl From<(u32, u32, u32)> for Grid {
    fn from(grid: (u32, u32, u32)) -> Self {
        Grid(grid)
    }
}

/// Rows of a matrix of that many elements.
///
/// Panics when the last row is not whole.
#[track_caller]
fn rows_of(elements: usize, width: usize) -> usize {
    assert!(width > 0 && elements.is_multiple_of(width), "{elements} elements in rows of {width}");
    elements / width
}

/// A buffer whose elements are not set: for what will be written before it is read.
pub(crate) fn unset<T: DeviceRepr>(device: &CudaDevice, length: usize) -> Result<CudaSlice<T>> {
    // SAFETY: elements are numbers, any bits of which are valid; whoever reads them before they are written gets nonsense.
    unsafe { device.alloc::<T>(length) }
}

/// A copy on the device of numbers of the host, of at least one element.
pub(crate) fn upload<T: DeviceRepr + Default + Clone + 'static>(
    device: &CudaDevice,
    mut numbers: Vec<T>,
) -> Result<CudaSlice<T>> {
    numbers.resize(numbers.len().max(1), T::default());
    device.clone_htod(&numbers)
}

#[cfg(test)]
pub(crate) mod testing {
    use candle_core::Device;
    use candle_core::cuda_backend::CudaDevice;

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
