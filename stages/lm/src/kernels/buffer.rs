//! New matrices, written by all threads at once: without a first pass that fills them with zeros.

use rayon::prelude::*;

use super::ROW_BLOCK;

/// A matrix of `rows` rows of `width` elements, where element `c` of row `r` is `element(r)(c)`.
#[inline(always)]
pub(crate) fn matrix<F: Fn(usize) -> f32>(rows: usize, width: usize, element: impl Fn(usize) -> F + Sync) -> Vec<f32> {
    let length = rows * width;
    let mut out = Vec::with_capacity(length);
    let blocks = out.spare_capacity_mut()[..length].par_chunks_mut((ROW_BLOCK * width).max(1));
    blocks.enumerate().for_each(|(block, out)| {
        for (r, out) in out.chunks_exact_mut(width).enumerate() {
            let element = element(block * ROW_BLOCK + r);
            for (c, out) in out.iter_mut().enumerate() {
                out.write(element(c));
            }
        }
    });
    // SAFETY: the blocks are the first `length` elements, blocks and their rows are whole, and each element of a row was
    // written.
    unsafe { out.set_len(length) };
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
    }
}
