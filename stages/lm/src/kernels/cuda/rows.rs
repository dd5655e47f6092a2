//! Rows: their sum, and moving them, whole or some of their columns.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};

use super::{Call, Element, Module, THREADS, module, rows_of, threads_for_row, unset};

static MODULE: Module = module!("rows");

/// Rows and columns of a block of a sum over rows. The same numbers stand in `columns.cuh`.
pub(super) const COLUMN_ROWS: usize = 64;
const COLUMN_WIDTH: usize = 256;

/// Blocks of a sum over rows.
pub(super) fn column_blocks(rows: usize, width: usize) -> (u32, u32) {
    (rows.div_ceil(COLUMN_ROWS) as u32, width.div_ceil(COLUMN_WIDTH) as u32)
}

/// The sum of the rows of `x`, `[width]`: the gradient of a bias.
pub(crate) fn sum_rows<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<f32>,
    x: &impl DevicePtr<T>,
) -> Result<()> {
    let width = out.len();
    let rows = rows_of(x.len(), width);
    let (blocks, _) = column_blocks(rows, width);
    let mut parts = unset::<f32>(device, blocks as usize * width)?;
    Call::of::<T>(device, &MODULE, "sum_rows").write(&mut parts).read(x).size(rows).size(width).launch(
        column_blocks(rows, width),
        THREADS,
        0,
    )?;
    sum_parts(device, out, &parts, blocks as usize, width)
}

/// Adds up `count` vectors as long as `out` that begin `stride` elements apart in `parts`, in a fixed order.
pub(super) fn sum_parts(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<f32>,
    parts: &impl DevicePtr<f32>,
    count: usize,
    stride: usize,
) -> Result<()> {
    let width = out.len();
    assert!(count == 0 || (count - 1) * stride + width <= parts.len(), "parts of a sum");
    Call::named(device, &MODULE, "sum_parts").write(out).read(parts).size(count).size(stride).size(width).launch(
        width.div_ceil(32) as u32,
        THREADS,
        0,
    )
}

/// `out[i] = x[indices[i]]`, rows of `width`. Indices must be rows of `x`.
pub(crate) fn gather<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    indices: &impl DevicePtr<u32>,
    width: usize,
) -> Result<()> {
    assert_eq!(rows_of(out.len(), width), indices.len(), "an index a row");
    Call::of::<T>(device, &MODULE, "gather").write(out).read(x).read(indices).size(width).launch(
        indices.len() as u32,
        threads_for_row(width, THREADS),
        0,
    )
}

/// `out[indices[i]] = x[i]`, rows of `width`; the other rows of `out` stay. Indices must be different rows of `out`.
pub(crate) fn scatter<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    indices: &impl DevicePtr<u32>,
    width: usize,
) -> Result<()> {
    assert_eq!(rows_of(x.len(), width), indices.len(), "an index a row");
    Call::of::<T>(device, &MODULE, "scatter").write(out).read(x).read(indices).size(width).launch(
        indices.len() as u32,
        threads_for_row(width, THREADS),
        0,
    )
}

/// Copies `count` columns of every row of `from`, `[N, from_stride]`, to those of `to`, `[N, to_stride]`. Where the columns
/// begin, there the views that are given begin.
pub(crate) fn copy_columns<T: Element>(
    device: &CudaDevice,
    to: &mut impl DevicePtrMut<T>,
    from: &impl DevicePtr<T>,
    [to_stride, from_stride]: [usize; 2],
    count: usize,
    rows: usize,
) -> Result<()> {
    let fits = |length, stride| rows == 0 || (rows - 1) * stride + count <= length;
    assert!(fits(to.len(), to_stride) && fits(from.len(), from_stride), "columns of two matrices");
    let call = Call::of::<T>(device, &MODULE, "copy_columns").write(to).read(from).size(to_stride).size(from_stride);
    call.size(count).launch(rows as u32, threads_for_row(count, THREADS), 0)
}

/// Of rows of `x` that are `[a, b, d]` rows of `out` that are `[b, a, d]`; `width` is `a b d`.
pub(crate) fn regroup<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    [a, b]: [usize; 2],
    width: usize,
) -> Result<()> {
    rows_of(x.len(), width);
    assert!(out.len() == x.len() && width.is_multiple_of(a * b), "the same elements in another order");
    let count = x.len();
    let call = Call::of::<T>(device, &MODULE, "regroup").write(out).read(x).size(a).size(b).size(width / a / b);
    call.size(count).launch(count.div_ceil(THREADS as usize) as u32, THREADS, 0)
}
