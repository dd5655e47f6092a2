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

/// The first `columns` of `rows` rows that lie `stride` apart, as rows: `[columns, length]`, with zeros behind the `rows`th
/// element of each.
pub(crate) fn transposed(x: &[f32], stride: usize, rows: usize, columns: usize, length: usize) -> Vec<f32> {
    /// Elements along a row and along a column that are read together: what is written fills cache lines.
    const ALONG: usize = 8;
    const ACROSS: usize = 16;
    assert!(rows <= length, "a result too short for {rows} rows");
    let mut out = Vec::with_capacity(columns * length);
    let bands = out.spare_capacity_mut()[..columns * length].par_chunks_mut((ALONG * length).max(1));
    bands.with_min_len((BLOCK / (ALONG * length).max(1)).max(1)).enumerate().for_each(|(band, out)| {
        let first = band * ALONG;
        let width = ALONG.min(columns - first);
        for start in (0..rows).step_by(ACROSS) {
            if width == ALONG && start + ACROSS <= rows {
                let read = |r: usize| *x[(start + r) * stride + first..].first_chunk::<ALONG>().expect("a whole row");
                let tile: [_; ACROSS] = std::array::from_fn(read);
                for (c, out) in out.chunks_exact_mut(length).enumerate() {
                    for (out, row) in out[start..start + ACROSS].iter_mut().zip(&tile) {
                        out.write(row[c]);
                    }
                }
            } else {
                for (c, out) in out.chunks_exact_mut(length).enumerate() {
                    for r in start..rows.min(start + ACROSS) {
                        out[r].write(x[r * stride + first + c]);
                    }
                }
            }
        }
        for out in out.chunks_exact_mut(length) {
            out[rows..].iter_mut().for_each(|out| _ = out.write(0.0));
        }
    });
    // SAFETY: the bands are the first `columns * length` elements; of each row of them `rows` elements were written, and
    // those behind.
    unsafe { out.set_len(columns * length) };
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
        for (rows, columns, length) in [(0, 3, 2), (1, 1, 1), (16, 8, 16), (40, 64, 48), (37, 21, 37), (100, 1000, 112)]
        {
            let stride = columns + 3;
            let x: Vec<f32> = (0..rows * stride).map(|i| i as f32 + 1.0).collect();
            let expected = (0..columns * length).map(|i| (i / length, i % length));
            let expected = expected.map(|(c, r)| if r < rows { x[r * stride + c] } else { 0.0 });
            assert!(transposed(&x, stride, rows, columns, length).into_iter().eq(expected), "{rows} x {columns}");
        }
        for length in [0, 1, BLOCK - 1, BLOCK + 1, 3 * BLOCK] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            assert!(map(&x, |x| 2.0 * x).iter().zip(&x).filter(|(y, x)| **y == 2.0 * **x).count() == length);
        }
    }
}
