//! Columns of matrices: rows side by side, and in another order.

use rayon::prelude::*;

use super::ROW_BLOCK;

/// The rows of matrices side by side; with each its columns.
pub(crate) fn join(parts: &[(&[f32], usize)]) -> Vec<f32> {
    let width: usize = parts.iter().map(|(_, width)| width).sum();
    let mut out = vec![0.0; parts.iter().map(|(part, _)| part.len()).sum()];
    by_rows(&mut out, width, |row, mut out| {
        for (part, width) in parts {
            let (place, rest) = out.split_at_mut(*width);
            place.copy_from_slice(&part[row * width..][..*width]);
            out = rest;
        }
    });
    out
}

/// `count` of the `width` columns of `x`, from the `first` on.
pub(crate) fn part(x: &[f32], width: usize, first: usize, count: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / width * count];
    by_rows(&mut out, count, |row, out| out.copy_from_slice(&x[row * width + first..][..count]));
    out
}

/// Of rows that are `[a, b, D]` rows that are `[b, a, D]`; `width` is `a b D`.
pub(crate) fn regroup(x: &[f32], width: usize, [a, b]: [usize; 2]) -> Vec<f32> {
    let d = width / a / b;
    let mut out = vec![0.0; x.len()];
    by_rows(&mut out, width, |row, out| {
        let x = &x[row * width..][..width];
        for (place, out) in out.chunks_exact_mut(d).enumerate() {
            out.copy_from_slice(&x[(place % a * b + place / a) * d..][..d]);
        }
    });
    out
}

/// Lets `f` write every row of `out`.
fn by_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    out.par_chunks_mut(ROW_BLOCK * width).enumerate().for_each(|(block, out)| {
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            f(block * ROW_BLOCK + i, out);
        }
    });
}
