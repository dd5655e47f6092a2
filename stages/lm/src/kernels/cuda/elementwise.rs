//! Loops over single elements: nonlinearities, sums, bias, dropout, conversions.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaView, DevicePtr, DevicePtrMut};

use super::{Call, Element, Mask, Module, THREADS, blocks, module, rows_of, threads_for_row};
use crate::terms::activation::Activation;

static MODULE: Module = module!("elementwise");

/// `x += y`, elements side by side.
pub(crate) fn add<T: Element>(device: &CudaDevice, x: &mut impl DevicePtrMut<T>, y: &impl DevicePtr<T>) -> Result<()> {
    let count = x.len();
    assert_eq!(count, y.len(), "elements side by side");
    Call::of::<T>(device, &MODULE, "add").write(x).read(y).size(count).launch(blocks(count), THREADS, 0)
}

/// Copies `x` into `out`, in its type.
pub(crate) fn cast<To: Element, From: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<To>,
    x: &impl DevicePtr<From>,
) -> Result<()> {
    let count = x.len();
    assert_eq!(count, out.len(), "elements side by side");
    let kernel = format!("convert_{}_{}", From::SUFFIX, To::SUFFIX);
    Call::named(device, &MODULE, kernel).write(out).read(x).size(count).launch(blocks(count), THREADS, 0)
}

fn root(activation: Activation) -> &'static str {
    match activation {
        Activation::GeluNew => "gelu_tanh",
        Activation::Gelu => "gelu_erf",
        Activation::Relu => "relu",
    }
}

/// The nonlinearity of every element.
pub(crate) fn activation<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    activation: Activation,
) -> Result<()> {
    let count = x.len();
    assert_eq!(count, out.len(), "elements side by side");
    Call::of::<T>(device, &MODULE, root(activation)).write(out).read(x).size(count).launch(blocks(count), THREADS, 0)
}

/// Multiplies `dy` by the derivative of the nonlinearity at `x`.
pub(crate) fn activation_backward<T: Element>(
    device: &CudaDevice,
    dy: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    activation: Activation,
) -> Result<()> {
    let count = x.len();
    assert_eq!(count, dy.len(), "elements side by side");
    Call::of::<T>(device, &MODULE, &format!("{}_backward", root(activation))).write(dy).read(x).size(count).launch(
        blocks(count),
        THREADS,
        0,
    )
}

/// `out = silu(gate) up`, elements side by side.
pub(crate) fn swiglu<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    gate: &impl DevicePtr<T>,
    up: &impl DevicePtr<T>,
) -> Result<()> {
    let count = out.len();
    assert!(gate.len() == count && up.len() == count, "elements side by side");
    Call::of::<T>(device, &MODULE, "swiglu").write(out).read(gate).read(up).size(count).launch(
        blocks(count),
        THREADS,
        0,
    )
}

/// The gradients of `gate` and `up` from that of the result, `dy`.
pub(crate) fn swiglu_backward<T: Element>(
    device: &CudaDevice,
    dgate: &mut impl DevicePtrMut<T>,
    dup: &mut impl DevicePtrMut<T>,
    dy: &impl DevicePtr<T>,
    gate: &impl DevicePtr<T>,
    up: &impl DevicePtr<T>,
) -> Result<()> {
    let count = dy.len();
    let lengths = [dgate.len(), dup.len(), gate.len(), up.len()];
    assert_eq!(lengths, [count; 4], "elements side by side");
    Call::of::<T>(device, &MODULE, "swiglu_backward")
        .write(dgate)
        .write(dup)
        .read(dy)
        .read(gate)
        .read(up)
        .size(count)
        .launch(blocks(count), THREADS, 0)
}

/// `x = dropout(x + bias)`, with what is there of the two; `x` is `[N, width]`.
///
/// The gradient of a dropout is a dropout again, of the gradient.
pub(crate) fn bias_dropout<T: Element>(
    device: &CudaDevice,
    x: &mut impl DevicePtrMut<T>,
    bias: Option<&CudaView<'_, f32>>,
    mask: Option<Mask<'_>>,
    width: usize,
) -> Result<()> {
    let rows = rows_of(x.len(), width);
    assert!(bias.is_none_or(|bias| bias.len() == width), "one bias a column");
    assert!(mask.is_none_or(|mask| mask.keys.len() == 2 * rows), "a pair of keys a row");
    Call::of::<T>(device, &MODULE, "bias_dropout").write(x).read_if(bias).size(width).mask(mask).launch(
        rows as u32,
        threads_for_row(width, THREADS),
        0,
    )
}
