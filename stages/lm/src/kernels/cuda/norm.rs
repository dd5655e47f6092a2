//! Layer norm and RMS norm over the rows of a matrix, forward and backward.
//!
//! Both keep two numbers a row for the way back, `moments` `[N, 2]`: the mean (0 for RMS norm) and the reciprocal deviation.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut};

use super::rows::{column_blocks, sum_parts};
use super::{Call, Element, Module, THREADS, module, rows_of, threads_for_row, unset};

static MODULE: Module = module!("norm");

/// Which norm. A layer norm has a bias, an RMS norm has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Layer,
    Rms,
}

impl Kind {
    fn kernel(self, suffix: &str) -> String {
        let kind = match self {
            Kind::Layer => "layer",
            Kind::Rms => "rms",
        };
        format!("{kind}_norm{suffix}")
    }
}

/// The norm of every row of `x`, with `weight` and `bias` `[width]`: a layer norm where there is a bias, else an RMS norm.
pub(crate) fn forward<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    moments: &mut impl DevicePtrMut<f32>,
    x: &impl DevicePtr<T>,
    weight: &impl DevicePtr<f32>,
    bias: Option<&CudaView<'_, f32>>,
    eps: f32,
) -> Result<()> {
    let width = weight.len();
    let rows = check(out.len(), x.len(), moments.len(), width);
    assert!(bias.is_none_or(|bias| bias.len() == width), "weight and bias of a norm");
    let kind = if bias.is_some() { Kind::Layer } else { Kind::Rms };
    Call::of::<T>(device, &MODULE, &kind.kernel(""))
        .write(out)
        .write(moments)
        .read(x)
        .read(weight)
        .read_if(bias)
        .size(width)
        .float(eps)
        .launch(rows as u32, threads_for_row(width, THREADS), 0)
}

fn check(out: usize, x: usize, moments: usize, width: usize) -> usize {
    let rows = rows_of(x, width);
    assert_eq!((out, moments), (x, 2 * rows), "elements and moments of a norm");
    rows
}

/// Adds the gradient of `x`, from that of the result, `dy`, to `dx`.
pub(crate) fn backward<T: Element>(
    device: &CudaDevice,
    kind: Kind,
    dx: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    weight: &impl DevicePtr<f32>,
    moments: &impl DevicePtr<f32>,
    dy: &impl DevicePtr<T>,
) -> Result<()> {
    let width = weight.len();
    let rows = check(dx.len(), x.len(), moments.len(), width);
    assert_eq!(x.len(), dy.len(), "elements side by side");
    Call::of::<T>(device, &MODULE, &kind.kernel("_backward"))
        .write(dx)
        .read(x)
        .read(weight)
        .read(moments)
        .read(dy)
        .size(width)
        .launch(rows as u32, threads_for_row(width, THREADS), 0)
}

/// The gradients of weight and, where there is one, bias, `[width]` each.
pub(crate) fn backward_parameters<T: Element>(
    device: &CudaDevice,
    dweight: &mut impl DevicePtrMut<f32>,
    dbias: Option<&mut CudaSlice<f32>>,
    x: &impl DevicePtr<T>,
    moments: &impl DevicePtr<f32>,
    dy: &impl DevicePtr<T>,
) -> Result<()> {
    let width = dweight.len();
    let rows = rows_of(x.len(), width);
    assert_eq!((dy.len(), moments.len()), (x.len(), 2 * rows), "elements and moments of a norm");
    let (blocks, _) = column_blocks(rows, width);
    let mut parts = unset::<f32>(device, blocks as usize * 2 * width)?;
    Call::of::<T>(device, &MODULE, "norm_parameters")
        .write(&mut parts)
        .read(x)
        .read(moments)
        .read(dy)
        .size(rows)
        .size(width)
        .launch(column_blocks(rows, width), THREADS, 0)?;
    sum_parts(device, dweight, &parts, blocks as usize, 2 * width)?;
    let Some(dbias) = dbias else { return Ok(()) };
    let biases: CudaView<'_, f32> = parts.slice(width.min(parts.len())..);
    sum_parts(device, dbias, &biases, blocks as usize, 2 * width)
}
