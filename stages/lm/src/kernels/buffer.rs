//! New buffers, written by all threads at once: without a first pass that fills them with zeros.

use rayon::prelude::*;

use super::vector::widen;
use super::{BLOCK, ROW_BLOCK};

/// A matrix of `rows` rows of `width` elements, where element `c` of row `r` is `element(r)(c)`.
#[inline(always)]
pub(crate) fn matrix<F: Fn(usize) -> f32>(rows: usize, width: usize, element: impl Fn(usize) -> F + Sync) -> Vec<f32> {
    let length = rows * width;
    let mut out = Vec::with_capacity(length);
    let blocks = out.spare_capacity_mut()[..length].par_chunks_mut((ROW_BLOCK * width).max(1));
    blocks.enumerate().for_each(|(block, out)| {
        for (r, out) in out.chunks_exact_mut(width).enumerate() {
            let element = element(block * ROW_BLOCK + r);
            widen(|| {
                for (c, out) in out.iter_mut().enumerate() {
                    out.write(element(c));
                }
            });
        }
    });
    // SAFETY: the blocks are the first `length` elements, blocks and their rows are whole, and each element of a row was
    // written.
    unsafe { out.set_len(length) };
    out
}

/// `f` of every element of `x`.
#[inline(always)]
pub(crate) fn map(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    let blocks = out.spare_capacity_mut()[..x.len()].par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK));
    blocks.for_each(|(out, x)| {
        widen(|| {
            for (out, x) in out.iter_mut().zip(x) {
                out.write(f(*x));
            }
        });
    });
    // SAFETY: the blocks of both sides are the first `x.len()` elements, and each was written.
    unsafe { out.set_len(x.len()) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_written() {
        for (rows, width) in [(0, 5), (3, 0), (1, 1), (31, 3), (32, 4), (70, 17)] {
            let out = matrix(rows, width, |r| move |c| (r * width + c) as f32);
            assert!(out.iter().copied().eq((0..rows * width).map(|i| i as f32)), "{rows} x {width}");
        }
        for length in [0, 1, BLOCK - 1, BLOCK + 1, 3 * BLOCK] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            assert!(map(&x, |x| 2.0 * x).iter().zip(&x).filter(|(y, x)| **y == 2.0 * **x).count() == length);
        }
    }
}
