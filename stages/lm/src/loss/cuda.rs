//! The loss on a GPU: products by cuBLAS, and between them one kernel for all that a row of logits needs.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Tensor};

use super::{Answer, Request, Result, Source, bail, ensure};
use crate::kernels::cuda::head::{Compared, Slopes, TargetLogits, head_terms};
use crate::kernels::cuda::matmul::{Matrix, product};
use crate::kernels::cuda::{rows, unset, upload};
use crate::ops::cuda::{Number, Operand, tensor};

/// Logits that a chunk may have: 256 MiB in bf16. Large, because a chunk should fill the device.
const CHUNK_LOGITS: usize = 1 << 27;

impl Request<'_> {
    /// Terms and gradients in `T`, the type of the hidden states; the gradient of the head is f32. The host waits once, for
    /// the terms, when everything has been launched.
    pub(super) fn on_gpu<T: Number>(
        &self,
        device: &CudaDevice,
        chunk_logits: usize,
        wanted: [bool; 2],
    ) -> Result<Answer> {
        let [hidden_wanted, head_wanted] = wanted;
        let (width, vocabulary) = (self.hidden.dim(1)?, self.head.dim(0)?);
        let active = self.active();
        let columns = self.coefficients().len();
        let mut terms = vec![0.0; self.weights.len() * columns];
        if active.is_empty() {
            let hidden_gradient = hidden_wanted.then(|| self.hidden.detach().zeros_like()).transpose()?;
            let head_gradient = head_wanted.then(|| self.head.detach().zeros_like()).transpose()?;
            return Ok(Answer { terms, hidden_gradient, head_gradient });
        }
        let picked = if active.len() < self.weights.len() { Some(upload(device, active.clone())?) } else { None };
        let hidden = select::<T>(device, self.hidden, picked.as_ref())?;
        let hidden = hidden.view()?; // [active, C]
        let head = Operand::<T>::of(device, self.head)?;
        let head = head.view()?; // [V, C]
        let mut targets = Vec::with_capacity(self.targets.len());
        for target in self.targets {
            let Source::Head { hidden, head } = target.source else {
                bail!("a target of likeliest tokens is compared with by plain operations");
            };
            ensure!(!target.divergence.is_adaptive(), "an adaptive divergence is computed by plain operations");
            let width = hidden.dim(1)?;
            let hidden = select::<T>(device, hidden, picked.as_ref())?;
            targets.push((target, width, hidden, Operand::<T>::of(device, head)?));
        }
        let weights = upload(device, active.iter().map(|&row| self.weights[row as usize]).collect())?;
        let labels = match self.labels {
            Some((labels, coefficient)) => {
                let labels = active.iter().map(|&row| labels[row as usize]).collect();
                Some((upload(device, labels)?, coefficient))
            }
            None => None,
        };

        let mut active_terms = unset::<f64>(device, active.len() * columns)?;
        let mut hidden_gradient = hidden_wanted.then(|| unset::<T>(device, active.len() * width)).transpose()?;
        let mut head_gradient = head_wanted.then(|| unset::<f32>(device, vocabulary * width)).transpose()?;
        // Chunks of equal size: a last one of a single row would be slow.
        let chunks = active.len().div_ceil((chunk_logits / vocabulary).max(1));
        let rows = active.len().div_ceil(chunks);
        for first in (0..active.len()).step_by(rows) {
            let chunk = first..active.len().min(first + rows);
            let hidden = hidden.slice(chunk.start * width..chunk.end * width); // [R, C]
            let weights = weights.slice(chunk.clone());
            let mut terms = active_terms.slice_mut(chunk.start * columns..chunk.end * columns);
            let mut logits = unset::<T>(device, chunk.len() * vocabulary)?; // [R, V]
            product(device, &mut logits, Matrix::new(&hidden, width), Matrix::new(&head, width).transposed(), false)?;
            // With one target at most, slopes take the place of the logits.
            let mut own_slopes = if (hidden_wanted || head_wanted) && targets.len() > 1 {
                Some(unset::<T>(device, logits.len())?)
            } else {
                None
            };
            for index in 0..targets.len().max(1) {
                let labels = labels.as_ref().filter(|_| index == 0);
                let labels = labels.map(|(labels, coefficient)| (labels.slice(chunk.clone()), *coefficient));
                let target = match targets.get(index) {
                    Some((target, target_width, hidden, head)) => {
                        let target_width = *target_width;
                        let hidden = hidden.view()?.slice(chunk.start * target_width..chunk.end * target_width);
                        let head = head.view()?;
                        let mut logits = unset::<T>(device, chunk.len() * vocabulary)?;
                        let head = Matrix::new(&head, target_width).transposed();
                        product(device, &mut logits, Matrix::new(&hidden, target_width), head, false)?;
                        Some((target, logits))
                    }
                    None => None,
                };
                let target_logits = target.as_ref().map(|(_, logits)| logits.as_view());
                let compared = Compared {
                    labels: labels.as_ref().map(|(labels, coefficient)| (labels, *coefficient)),
                    target: target.as_ref().zip(target_logits.as_ref()).map(|((target, _), logits)| TargetLogits {
                        logits,
                        divergence: target.divergence,
                        coefficient: target.coefficient,
                        temperature: target.temperature,
                    }),
                };
                let slopes = match &mut own_slopes {
                    _ if !hidden_wanted && !head_wanted => Slopes::Unwanted,
                    None => Slopes::InPlace,
                    Some(slopes) => Slopes::Into { slopes, accumulate: index > 0 },
                };
                let column = if index == 0 { 0 } else { usize::from(self.labels.is_some()) + index };
                head_terms(device, &mut logits, vocabulary, compared, &weights, &mut terms, columns, column, slopes)?;
            }
            let slopes = Matrix::new(own_slopes.as_ref().unwrap_or(&logits), vocabulary); // [R, V]
            if let Some(gradient) = &mut hidden_gradient {
                let mut gradient = gradient.slice_mut(chunk.start * width..chunk.end * width);
                product(device, &mut gradient, slopes, Matrix::new(&head, width), false)?;
            }
            if let Some(gradient) = &mut head_gradient {
                product(device, gradient, slopes.transposed(), Matrix::new(&hidden, width), first > 0)?;
            }
        }
        let hidden_gradient = match (hidden_gradient, &picked) {
            (Some(gradient), Some(picked)) => {
                let mut whole = device.alloc_zeros::<T>(self.weights.len() * width)?;
                rows::scatter(device, &mut whole, &gradient, picked, width)?;
                Some(whole)
            }
            (gradient, _) => gradient,
        };
        for (values, &row) in device.clone_dtoh(&active_terms)?.chunks(columns).zip(&active) {
            terms[row as usize * columns..][..columns].copy_from_slice(values);
        }
        Ok(Answer {
            terms,
            hidden_gradient: hidden_gradient.map(|gradient| tensor(device, gradient, self.hidden.shape())),
            head_gradient: head_gradient.map(|gradient| tensor(device, gradient, self.head.shape())),
        })
    }

    /// As [`Request::on_gpu`], with chunks of the usual size.
    pub(super) fn on_gpu_by_type(&self, device: &CudaDevice, wanted: [bool; 2]) -> Result<Answer> {
        match self.hidden.dtype() {
            candle_core::DType::BF16 => self.on_gpu::<half::bf16>(device, CHUNK_LOGITS, wanted),
            _ => self.on_gpu::<f32>(device, CHUNK_LOGITS, wanted),
        }
    }
}

/// The rows of `hidden` that count.
fn select<'a, T: Number>(
    device: &CudaDevice,
    hidden: &'a Tensor,
    picked: Option<&CudaSlice<u32>>,
) -> Result<Operand<'a, T>> {
    let whole = Operand::of(device, hidden)?;
    let Some(picked) = picked else { return Ok(whole) };
    let width = hidden.dim(1)?;
    let mut rows = unset(device, picked.len() * width)?;
    rows::gather(device, &mut rows, &whole.view()?, picked, width)?;
    Ok(Operand::Own(rows))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::{Divergence, Target};
    use super::*;
    use crate::kernels::cuda::testing::device;
    use crate::kernels::testing::numbers;

    /// Rows of weight 0, two targets, labels: the same however rows are cut into chunks, and as on the CPU.
    #[test]
    fn chunks_change_nothing() {
        let Some(gpu) = device() else { return };
        let (rows, vocabulary) = (11, 19);
        let labels: Vec<u32> = (0..rows as u32).map(|row| row * 3 % 19).collect();
        let weights: Vec<f32> = (0..rows).map(|row| if row % 4 == 1 { 0.0 } else { 0.1 * row as f32 }).collect();
        let answers = [Device::Cpu, Device::Cuda(gpu.clone())].map(|device| {
            let tensor = |seed, rows: usize, width: usize| {
                Tensor::from_vec(numbers(seed, rows * width), (rows, width), &device).unwrap()
            };
            let (hidden, head) = (tensor(1, rows, 8), tensor(2, vocabulary, 8));
            let (other, other_head) = (tensor(3, rows, 5), tensor(4, vocabulary, 5));
            let target = |divergence, temperature| Target {
                source: Source::Head { hidden: &other, head: &other_head },
                divergence,
                coefficient: 0.7,
                temperature,
            };
            let targets = [target(Divergence::ForwardKl, 1.0), target(Divergence::Jsd { beta: 0.3 }, 2.0)];
            for targets in [&targets[..0], &targets[..1], &targets] {
                let request = Request::new(&hidden, &head, Some((&labels, 0.4)), targets, &weights).unwrap();
                let whole = request.answer(true, true).unwrap();
                if device.is_cuda() {
                    let parts = request.on_gpu::<f32>(&gpu, 4 * vocabulary, [true, true]).unwrap();
                    near(&parts.terms, &whole.terms);
                    near(&flat(&parts.hidden_gradient), &flat(&whole.hidden_gradient));
                    near(&flat(&parts.head_gradient), &flat(&whole.head_gradient));
                }
            }
            let request = Request::new(&hidden, &head, Some((&labels, 0.4)), &targets, &weights).unwrap();
            let Answer { terms, hidden_gradient, head_gradient } = request.answer(true, true).unwrap();
            (terms, flat(&hidden_gradient), flat(&head_gradient))
        });
        let [here, there] = answers;
        near(&there.0, &here.0);
        near(&there.1, &here.1);
        near(&there.2, &here.2);
    }

    fn flat(tensor: &Option<Tensor>) -> Vec<f64> {
        let tensor = tensor.as_ref().unwrap().to_device(&Device::Cpu).unwrap();
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
    }

    fn near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 2e-5, "{found}, expected {expected}");
        }
    }
}
