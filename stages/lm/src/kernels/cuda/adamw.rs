//! One update of AdamW over all parameters at once, and the norm of all gradients.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr};

use super::{Call, Module, THREADS, module, unset};
use crate::kernels::adamw::Update;

static MODULE: Module = module!("adamw");

/// Elements of a block. The same number stands in `adamw.cu`.
const CHUNK: usize = 8192;

/// A parameter, its gradient and its moments, elements side by side.
///
/// All but the gradient are changed, through views of which tensors give several at once: what reads or writes them is
/// launched on the same stream, before this or after it.
pub(crate) struct Parameter<'a> {
    pub(crate) weight: CudaView<'a, f32>,
    pub(crate) first: CudaView<'a, f32>,
    pub(crate) second: CudaView<'a, f32>,
    pub(crate) gradient: CudaView<'a, f32>,
    /// The weight is multiplied by this: `1 - rate * decay`.
    pub(crate) keep: f32,
}

/// Updates all `parameters` in one launch. The gradients are multiplied by `scale`, one number on the device; the fields
/// `scale` and `keep` of `update` are not looked at.
pub(crate) fn adamw(
    device: &CudaDevice,
    parameters: &[Parameter<'_>],
    update: Update,
    scale: &impl DevicePtr<f32>,
) -> Result<()> {
    let stream = device.cuda_stream();
    let mut table = Vec::with_capacity(parameters.len() * 5);
    for p in parameters {
        let count = p.weight.len();
        assert_eq!([p.first.len(), p.second.len(), p.gradient.len()], [count; 3], "elements side by side");
        table.extend([
            p.weight.device_ptr(&stream).0,
            p.first.device_ptr(&stream).0,
            p.second.device_ptr(&stream).0,
            p.gradient.device_ptr(&stream).0,
            count as u64 | u64::from(p.keep.to_bits()) << 32,
        ]);
    }
    let chunks = chunks(parameters.iter().map(|p| p.weight.len()));
    let (table, places) = (super::upload(device, table)?, super::upload(device, chunks.clone())?);
    Call::named(device, &MODULE, "adamw")
        .read(&table)
        .read(&places)
        .read(scale)
        .float(update.beta1)
        .float(update.beta2)
        .float(update.rest1)
        .float(update.rest2)
        .float(update.eps)
        .float(update.step)
        .float(update.correction)
        .launch(chunks.len() as u32 / 2, THREADS, 0)
}

/// Pairs of a tensor and a chunk of it, `[chunks, 2]`.
fn chunks(lengths: impl Iterator<Item = usize>) -> Vec<u32> {
    let pairs = |(tensor, length): (usize, usize)| {
        (0..length.div_ceil(CHUNK)).flat_map(move |chunk| [tensor as u32, chunk as u32])
    };
    lengths.enumerate().flat_map(pairs).collect()
}

/// The norm of all gradients, left on the device: `[1]`.
pub(crate) fn norm(device: &CudaDevice, gradients: &[CudaView<'_, f32>]) -> Result<CudaSlice<f64>> {
    let stream = device.cuda_stream();
    let table: Vec<u64> = gradients.iter().flat_map(|g| [g.device_ptr(&stream).0, g.len() as u64]).collect();
    let chunks = chunks(gradients.iter().map(|g| g.len()));
    let count = chunks.len() / 2;
    let (table, places) = (super::upload(device, table)?, super::upload(device, chunks)?);
    let (mut parts, mut norm) = (unset::<f64>(device, count.max(1))?, unset::<f64>(device, 1)?);
    Call::named(device, &MODULE, "squares").write(&mut parts).read(&table).read(&places).launch(
        count as u32,
        THREADS,
        0,
    )?;
    Call::named(device, &MODULE, "root_of_sum").write(&mut norm).read(&parts).size(count).launch(1, THREADS, 0)?;
    Ok(norm)
}
