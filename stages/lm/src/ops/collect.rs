//! Gradients of weights on their way from a backward pass to [`crate::gradients`].
//!
//! They do not travel through candle's gradient store, which would add each to zeros: a pass [`deliver`]s what it has, and
//! who asked for gradients [`collect`]s and [`merge`]s.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId, bail};

use super::{change, elements};
use crate::kernels::elementwise;

/// One contribution to the gradient of a parameter.
pub(crate) enum Contribution {
    /// All of its elements; nobody else holds the tensor.
    Dense(Tensor),
    /// Some rows: each place is a row of `gradient` and the row of the parameter that it belongs to.
    Rows { places: Vec<(usize, u32)>, gradient: Tensor },
}

thread_local! {
    /// Where gradients of weights go during a backward pass on this thread.
    static COLLECTED: RefCell<Option<HashMap<TensorId, Vec<Contribution>>>> = const { RefCell::new(None) };
}

/// Runs a backward pass; gives what it contributed to each parameter beside what candle keeps.
pub(crate) fn collect<T>(backward: impl FnOnce() -> Result<T>) -> Result<(T, HashMap<TensorId, Vec<Contribution>>)> {
    COLLECTED.replace(Some(HashMap::new()));
    let result = backward();
    let collected = COLLECTED.take().unwrap_or_default();
    Ok((result?, collected))
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
                let gradient = elements(&gradient)?;
                change(&total, |total| {
                    elementwise::add(total, &gradient);
                    Ok(())
                })?;
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

fn add_rows(total: &Tensor, places: &[(usize, u32)], gradient: &Tensor) -> Result<()> {
    let width = total.dim(1)?;
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

/// Gives a contribution to the gradient of `parameter`, a variable, to who collects them.
pub(crate) fn deliver(parameter: &Tensor, contribution: Contribution) -> Result<()> {
    COLLECTED.with_borrow_mut(|collected| match collected {
        Some(collected) => {
            collected.entry(parameter.id()).or_default().push(contribution);
            Ok(())
        }
        None => bail!("gradients of a model's weights are given by `lm::gradients`, not by `backward` alone"),
    })
}
