//! Terms of a loss on next tokens and their slopes, from logits: what [`head`](crate::kernels::head) does between its
//! products.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut};

use super::{Call, Element, Module, module, rows_of};
use crate::terms::divergence::{Divergence, Rule, for_rule};

static MODULE: Module = module!("head");

/// Threads that share a row.
const THREADS: u32 = 512;

/// What the rows are compared with.
#[derive(Clone, Copy)]
pub(crate) struct Compared<'a, T> {
    /// Tokens below V, `[R]`, and the coefficient of their cross-entropy.
    pub(crate) labels: Option<(&'a CudaView<'a, u32>, f64)>,
    /// A distribution to come close to.
    pub(crate) target: Option<TargetLogits<'a, T>>,
}

/// Logits of a target, `[R, V]`.
#[derive(Clone, Copy)]
pub(crate) struct TargetLogits<'a, T> {
    pub(crate) logits: &'a CudaView<'a, T>,
    pub(crate) divergence: Divergence,
    pub(crate) coefficient: f64,
    pub(crate) temperature: f64,
}

/// Where the derivative of the weighted sum of all terms by the logits goes, `[R, V]`.
pub(crate) enum Slopes<'a, T> {
    /// Nowhere.
    Unwanted,
    /// Over the logits.
    InPlace,
    /// To a matrix of their own: written, or added to what is there from another target.
    Into { slopes: &'a mut CudaSlice<T>, accumulate: bool },
}

/// Terms of every row of `logits`, `[R, V]`: its cross-entropy where there are labels, and its divergence from the target
/// where there is one, without weight and coefficient; 0 for rows of weight 0.
///
/// They go to the columns `column ..` of `terms`, `[R, columns]`. `weights` is `[R]`. For more targets than one, the first
/// launch writes slopes to a matrix of their own, and one more launch a target adds to them.
#[expect(clippy::too_many_arguments, reason = "what goes in and what comes out")]
pub(crate) fn head_terms<T: Element>(
    device: &CudaDevice,
    logits: &mut impl DevicePtrMut<T>,
    vocabulary: usize,
    compared: Compared<'_, T>,
    weights: &impl DevicePtr<f32>,
    terms: &mut impl DevicePtrMut<f64>,
    columns: usize,
    column: usize,
    slopes: Slopes<'_, T>,
) -> Result<()> {
    let rows = rows_of(logits.len(), vocabulary);
    let Compared { labels, target } = compared;
    let count = usize::from(labels.is_some()) + usize::from(target.is_some());
    assert!(column + count <= columns && terms.len() == rows * columns, "columns of terms");
    assert_eq!(weights.len(), rows, "a weight a row");
    assert!(labels.is_none_or(|(labels, _)| labels.len() == rows), "a label a row");
    assert!(target.is_none_or(|target| target.logits.len() == logits.len()), "logits of a target");
    let call = Call::of::<T>(device, &MODULE, "head_terms");
    let (call, accumulate) = match slopes {
        Slopes::Unwanted => (call.write(logits).null(), false),
        Slopes::InPlace => (call.write_twice(logits), false),
        Slopes::Into { slopes, accumulate } => {
            assert_eq!(slopes.len(), logits.len(), "a slope a logit");
            (call.write(logits).write(slopes), accumulate)
        }
    };
    let (kind, a, b) = match target {
        Some(target) => for_rule!(target.divergence, R(a, b) => (R::NUMBER, a, b)),
        None => (0, 0.0, 0.0),
    };
    let (coefficient, temperature) = target.map_or((0.0, 1.0), |target| (target.coefficient, target.temperature));
    call.size(usize::from(accumulate))
        .read_if(labels.map(|(labels, _)| labels))
        .double(labels.map_or(0.0, |(_, coefficient)| coefficient))
        .read_if(target.map(|target| target.logits))
        .size(kind)
        .float(a as f32)
        .float(b as f32)
        .double(coefficient)
        .double(temperature)
        .read(weights)
        .write(terms)
        .size(columns)
        .size(column)
        .size(vocabulary)
        .launch(rows as u32, THREADS, 0)
}
