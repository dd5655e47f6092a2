//! Layer norm and RMS norm over the rows of a matrix, forward and backward.
//!
//! Both keep two numbers a row for the way back, `moments` `[N, 2]`: the mean (0 for RMS norm) and the reciprocal deviation.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceSlice};

use super::rows::{column_blocks, sum_parts};
use super::{Call, Element, Module, THREADS, module, rows_of, threads_for_row, unset};

static MODULE: Module = module!("norm");

/// Parameters of a norm, `[width]` each: with a bias a layer norm, without one an RMS norm.
pub(crate) struct Norm<'a, W> {
    pub(crate) weight: &'a W,
    pub(crate) bias: Option<&'a W>,
    pub(crate) eps: f32,
}

// Not derived: it is a copy of references, whatever `W` is.
impl<W> Clone for Norm<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Norm<'_, W> {}

impl<W: DeviceSlice<f32>> Norm<'_, W> {
    fn kernel(&self, suffix: &str) -> String {
        format!("{}_norm{suffix}", if self.bias.is_some() { "layer" } else { "rms" })
    }
}

/// The norm of every row of `x`.
pub(crate) fn forward<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    moments: &mut impl DevicePtrMut<f32>,
    x: &impl DevicePtr<T>,
    norm: Norm<'_, impl DevicePtr<f32>>,
) -> Result<()> {
    let rows = check(out.len(), x.len(), moments.len(), &norm);
    launch(Call::of::<T>(device, &MODULE, &norm.kernel("")).write(out).write(moments).read(x), norm, rows)
}

fn check<W: DevicePtr<f32>>(out: usize, x: usize, moments: usize, norm: &Norm<'_, W>) -> usize {
    let rows = rows_of(x, norm.weight.len());
    assert_eq!((out, moments), (x, 2 * rows), "elements and moments of a norm");
    assert!(norm.bias.is_none_or(|bias| bias.len() == norm.weight.len()), "weight and bias of a norm");
    rows
}

fn launch<'a, W: DevicePtr<f32>>(call: Call<'a>, norm: Norm<'a, W>, rows: usize) -> Result<()> {
    let width = norm.weight.len();
    let call = call.read(norm.weight);
    let call = match norm.bias {
        Some(bias) => call.read(bias),
        None => call.null(),
    };
    call.size(width).float(norm.eps).launch(rows as u32, threads_for_row(width, THREADS), 0)
}

/// Adds the gradient of `x`, from that of the result, `dy`, to `dx`.
pub(crate) fn backward<T: Element>(
    device: &CudaDevice,
    dx: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    norm: Norm<'_, impl DevicePtr<f32>>,
    moments: &impl DevicePtr<f32>,
    dy: &impl DevicePtr<T>,
) -> Result<()> {
    let rows = check(dx.len(), x.len(), moments.len(), &norm);
    assert_eq!(x.len(), dy.len(), "elements side by side");
    let width = norm.weight.len();
    Call::of::<T>(device, &MODULE, &norm.kernel("_backward"))
        .write(dx)
        .read(x)
        .read(norm.weight)
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
