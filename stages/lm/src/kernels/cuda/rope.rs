//! Rotary positions of queries and keys, in place.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};

use super::{Call, Element, Module, THREADS, module, rows_of};

static MODULE: Module = module!("rope");

/// Turns the first `turned` channels of each of the first `heads` heads, `width` channels each, of every row of `x`,
/// `[N, stride]`: in packed queries, keys and values, the heads of queries and keys. With `back` it turns them back: what
/// happens to their gradients.
///
/// `angles` hold the cosines and sines of each position, `[P, 2, turned / 2]`; `positions` are `[N]`, below P.
#[expect(clippy::too_many_arguments, reason = "shapes of a strided matrix")]
pub(crate) fn rope<T: Element>(
    device: &CudaDevice,
    x: &mut impl DevicePtrMut<T>,
    positions: &impl DevicePtr<u32>,
    angles: &impl DevicePtr<f32>,
    heads: usize,
    width: usize,
    turned: usize,
    stride: usize,
    back: bool,
) -> Result<()> {
    let rows = rows_of(x.len(), stride);
    assert!(heads * width <= stride, "{heads} heads of {width} in rows of {stride}");
    assert!(turned <= width && turned.is_multiple_of(2), "{turned} channels of {width} to turn");
    assert!(positions.len() >= rows, "a position a row");
    rows_of(angles.len(), turned);
    let count = rows * heads * (turned / 2);
    Call::of::<T>(device, &MODULE, "rotate")
        .write(x)
        .read(positions)
        .read(angles)
        .size(heads)
        .size(width)
        .size(turned)
        .size(stride)
        .float(if back { -1.0 } else { 1.0 })
        .size(count)
        .launch(count.div_ceil(THREADS as usize) as u32, THREADS, 0)
}
