//! A loss whose gradients are ready when it is made.

use std::sync::Mutex;

use anyhow::Result;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Shape, Tensor};

use super::{Answer, wide};
use crate::ops::collect::{Contribution, deliver, is_collecting, is_differentiated};

/// A scalar whose backward pass hands out the gradients that are already there.
pub(super) fn attach(value: f64, hidden: &Tensor, head: &Tensor, answer: Answer) -> Result<Tensor> {
    let Answer { hidden_gradient, head_gradient, .. } = answer;
    let dtype = wide(hidden.dtype());
    let on_cpu = matches!(hidden.device(), Device::Cpu) && hidden.dtype() == DType::F32 && head.dtype() == DType::F32;
    if on_cpu || hidden.device().is_cuda() {
        let head_gradient = Mutex::new(head_gradient);
        return Ok(hidden.apply_op2(head, Ready { value: value as f32, hidden_gradient, head_gradient })?);
    }
    // Elsewhere the same by plain operations: x g - x g is 0, and its derivative by the first x is g.
    let mut loss = Tensor::new(value, hidden.device())?.to_dtype(dtype)?;
    for (tensor, gradient) in [(hidden, hidden_gradient), (head, head_gradient)] {
        if let Some(gradient) = gradient {
            let product = (tensor * gradient.detach())?.sum_all()?;
            loss = (loss + (&product - product.detach())?.to_dtype(dtype)?)?;
        }
    }
    Ok(loss)
}

/// The custom operation behind [`attach`].
struct Ready {
    value: f32,
    hidden_gradient: Option<Tensor>,
    head_gradient: Mutex<Option<Tensor>>,
}

impl CustomOp2 for Ready {
    fn name(&self) -> &'static str {
        "head-loss"
    }

    fn cpu_fwd(
        &self,
        _hidden: &CpuStorage,
        _hidden_layout: &Layout,
        _head: &CpuStorage,
        _head_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.value]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &candle_core::CudaStorage,
        _hidden_layout: &Layout,
        _head: &candle_core::CudaStorage,
        _head_layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let value = hidden.device.clone_htod(&[self.value])?;
        Ok((candle_core::CudaStorage::wrap_cuda_slice(value, hidden.device.clone()), Shape::from(())))
    }

    fn bwd(
        &self,
        _hidden: &Tensor,
        head: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        // To read the factor is to wait for the device: not where it is known.
        let factor = if is_differentiated(result) { 1.0 } else { f64::from(gradient.to_scalar::<f32>()?) };
        let scaled = |stored: &Option<Tensor>| match stored {
            Some(stored) if factor != 1.0 => (stored * factor).map(Some),
            stored => Ok(stored.clone()),
        };
        let mut head_gradient = self.head_gradient.lock().expect("nothing panics while it is held");
        if head.is_variable() && is_collecting() && head_gradient.is_some() {
            // The largest gradient of all: candle would add it to zeros. Scaled or taken out, it is nobody else's.
            let own = if factor == 1.0 { head_gradient.take() } else { scaled(&head_gradient)? };
            if let Some(own) = own {
                deliver(head, Contribution::Dense(own))?;
            }
            return Ok((scaled(&self.hidden_gradient)?, None));
        }
        Ok((scaled(&self.hidden_gradient)?, scaled(&head_gradient)?))
    }
}
