//! Loops over single elements: nonlinearities, sums, bias.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{map, matrix};
use super::elementary::{exp, tanh};
use super::vector::widen;
use super::{BLOCK, ROW_BLOCK, sum_in_order};
use crate::terms::activation::Activation;

/// sqrt(2 / pi), of the tanh approximation of GELU.
const ROOT: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// The nonlinearity of every element.
pub(crate) fn activation(x: &[f32], activation: Activation) -> Vec<f32> {
    match activation {
        Activation::GeluNew => map(x, |x| 0.5 * x * (1.0 + tanh(ROOT * (x + CUBIC * x * x * x)))),
        Activation::Gelu => map(x, |x| x * normal_below(x)),
        Activation::Relu => map(x, |x| if x > 0.0 { x } else { 0.0 }),
    }
}

/// Multiplies `dy` by the derivative of the nonlinearity at `x`.
pub(crate) fn activation_backward(dy: &mut [f32], x: &[f32], activation: Activation) {
    match activation {
        Activation::GeluNew => update(dy, x, |dy, x| {
            let t = tanh(ROOT * (x + CUBIC * x * x * x));
            dy * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * ROOT * (1.0 + 3.0 * CUBIC * x * x))
        }),
        Activation::Gelu => update(dy, x, |dy, x| {
            const DENSITY_AT_0: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
            dy * (normal_below(x) + x * DENSITY_AT_0 * exp(-0.5 * x * x))
        }),
        Activation::Relu => update(dy, x, |dy, x| if x > 0.0 { dy } else { 0.0 }),
    }
}

/// Probability that a standard normal number is below `x`.
#[inline(always)]
fn normal_below(x: f32) -> f32 {
    0.5 * (1.0 + candle_core::cpu::erf::erf_f32(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    update(x, y, |x, y| x + y);
}

/// Writes `bias` into every row.
pub(crate) fn rows_of(bias: &[f32], rows: usize) -> Vec<f32> {
    matrix(rows, bias.len(), |_| move |c| bias[c])
}

/// Adds `row` to the row of `matrix` at `place`.
pub(crate) fn add_to_row(matrix: &mut [f32], place: usize, row: &[f32]) {
    let to = &mut matrix[place * row.len()..][..row.len()];
    to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
}

/// The sums of some of the `width` columns: the gradient of a bias.
pub(crate) fn sum_rows(x: &[f32], width: usize, columns: Range<usize>) -> Vec<f32> {
    let parts = x.par_chunks(ROW_BLOCK * width).map(|block| {
        let mut total = vec![0.0; columns.len()];
        for row in block.chunks_exact(width) {
            total.iter_mut().zip(&row[columns.clone()]).for_each(|(t, x)| *t += x);
        }
        total
    });
    let total = sum_in_order(parts.collect());
    if total.is_empty() { vec![0.0; columns.len()] } else { total }
}

#[inline(always)]
fn update(x: &mut [f32], y: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    assert_eq!(x.len(), y.len(), "elements side by side");
    x.par_chunks_mut(BLOCK).zip(y.par_chunks(BLOCK)).for_each(|(x, y)| {
        widen(|| x.iter_mut().zip(y).for_each(|(x, y)| *x = f(*x, *y)));
    });
}
