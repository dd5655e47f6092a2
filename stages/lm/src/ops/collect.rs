//! Gradients of weights on their way from a backward pass to [`crate::gradients`].
//!
//! They do not travel through candle's gradient store, which would add each to zeros: a pass [`deliver`]s what it has, and
//! who asked for gradients [`collect`]s and [`merge`]s.

use std::cell::RefCell;
use std::collections::HashMap;

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId, bail};

use crate::host::{change, elements};
use crate::kernels::elementwise;

/// One contribution to the gradient of a parameter.
pub(crate) enum Contribution {
    /// All of its elements; nobody else holds the tensor.
    Dense(Tensor),
    /// Some rows: each place is a row of `gradient` and the row of the parameter that it belongs to.
    Rows { places: Vec<(usize, u32)>, gradient: Tensor },
}

/// A backward pass that is running.
struct Collected {
    loss: TensorId,
    contributions: HashMap<TensorId, Vec<Contribution>>,
}

thread_local! {
    /// Where gradients of weights go during a backward pass on this thread.
    static COLLECTED: RefCell<Option<Collected>> = const { RefCell::new(None) };
}

/// Runs the backward pass of `loss`; gives what it contributed to each parameter beside what candle keeps.
pub(crate) fn collect(loss: &Tensor) -> Result<(GradStore, HashMap<TensorId, Vec<Contribution>>)> {
    COLLECTED.replace(Some(Collected { loss: loss.id(), contributions: HashMap::new() }));
    let store = loss.backward();
    let collected = COLLECTED.take().map(|collected| collected.contributions).unwrap_or_default();
    Ok((store?, collected))
}

/// Adds the contributions to `total`, the gradient so far, which nobody else may hold.
pub(crate) fn merge(
    total: Option<Tensor>,
    contributions: Vec<Contribution>,
    parameter: &Tensor,
) -> Result<Option<Tensor>> {
    // Whole gradients first: single rows are then added to one of them, and not to zeros made for them.
    let (dense, rows): (Vec<_>, Vec<_>) =
        contributions.into_iter().partition(|contribution| matches!(contribution, Contribution::Dense(_)));
    let mut total = total;
    for contribution in dense.into_iter().chain(rows) {
        total = Some(match (total, contribution) {
            (None, Contribution::Dense(gradient)) => gradient,
            (None, Contribution::Rows { places, gradient }) => {
                let total = parameter.detach().zeros_like()?;
                add_rows(&total, &places, &gradient)?;
                total
            }
            (Some(total), Contribution::Dense(gradient)) => {
                add(&total, &gradient)?;
                total
            }
            (Some(total), Contribution::Rows { places, gradient }) => {
                add_rows(&total, &places, &gradient)?;
                total
            }
        });
    }
    Ok(total)
}

/// `total += other`, in place; both f32 and on one device.
pub(crate) fn add(total: &Tensor, other: &Tensor) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = total.device() {
        use super::cuda;
        use crate::kernels::cuda::elementwise;
        return cuda::view(other, |other| cuda::change(total, |total| elementwise::add::<f32>(device, total, other)));
    }
    let other = elements(other)?;
    change(total, |total| {
        elementwise::add(total, &other);
        Ok(())
    })
}

fn add_rows(total: &Tensor, places: &[(usize, u32)], gradient: &Tensor) -> Result<()> {
    let width = total.dim(1)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = total.device() {
        return super::cuda::add_rows(device, total, places, gradient, width);
    }
    let gradient = elements(gradient)?;
    change(total, |total| {
        for (row, place) in places {
            elementwise::add_to_row(total, *place as usize, &gradient[row * width..][..width]);
        }
        Ok(())
    })
}

/// Whether gradients of weights are being collected on this thread.
pub(crate) fn is_collecting() -> bool {
    COLLECTED.with_borrow(Option::is_some)
}

/// Whether the backward pass that is running on this thread is that of `tensor`: then its gradient is 1.
pub(crate) fn is_differentiated(tensor: &Tensor) -> bool {
    COLLECTED.with_borrow(|collected| collected.as_ref().is_some_and(|collected| collected.loss == tensor.id()))
}

/// Gives a contribution to the gradient of `parameter`, a variable, to who collects them.
pub(crate) fn deliver(parameter: &Tensor, contribution: Contribution) -> Result<()> {
    COLLECTED.with_borrow_mut(|collected| match collected {
        Some(collected) => {
            collected.contributions.entry(parameter.id()).or_default().push(contribution);
            Ok(())
        }
        None => bail!("gradients of a model's weights are given by `lm::gradients`, not by `backward` alone"),
    })
}
