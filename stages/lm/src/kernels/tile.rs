//! Small matrix products without any overhead: the steps of attention, a few dozen rows and columns each.
//!
//! Each element is one chain of fused multiply-adds in the order of the depth, whatever the shape; so a row's bits do not
//! depend on the others.

use super::elementary::fused;

/// A small operand `a`: element `(i, k)` is `data[i * row + k * depth]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) depth: usize,
}

/// `out[i][j] (+)= sum over k of a(i, k) * b[k][j]`, for `rows` x `columns` results and `depth` summands. Rows of `out`
/// and `b` lie `out_stride` and `b_stride` apart.
#[expect(clippy::too_many_arguments, reason = "the sizes and strides of three matrices")]
#[inline]
pub(crate) fn product(
    out: &mut [f32],
    out_stride: usize,
    a: Left<'_>,
    b: &[f32],
    b_stride: usize,
    rows: usize,
    columns: usize,
    depth: usize,
    accumulate: bool,
) {
    let mut column = 0;
    while column < columns {
        let left = columns - column;
        let b = &b[column.min(b.len())..];
        let out = &mut out[column..];
        if left >= 64 && rows < 4 {
            // Few rows: more columns side by side, so that no addition waits for the one before.
            strip::<64>(out, out_stride, a, b, b_stride, rows, depth, accumulate);
            column += 64;
        } else if left >= 16 {
            strip::<16>(out, out_stride, a, b, b_stride, rows, depth, accumulate);
            column += 16;
        } else if left >= 8 {
            strip::<8>(out, out_stride, a, b, b_stride, rows, depth, accumulate);
            column += 8;
        } else {
            strip::<1>(out, out_stride, a, b, b_stride, rows, depth, accumulate);
            column += 1;
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the sizes and strides of three matrices")]
#[inline(always)]
fn strip<const L: usize>(
    out: &mut [f32],
    out_stride: usize,
    a: Left<'_>,
    b: &[f32],
    b_stride: usize,
    rows: usize,
    depth: usize,
    accumulate: bool,
) {
    let mut row = 0;
    while row + 4 <= rows {
        block::<4, L>(&mut out[row * out_stride..], out_stride, a, row, b, b_stride, depth, accumulate);
        row += 4;
    }
    while row < rows {
        block::<1, L>(&mut out[row * out_stride..], out_stride, a, row, b, b_stride, depth, accumulate);
        row += 1;
    }
}

/// `R` rows by `L` columns, kept in registers over the whole depth.
#[expect(clippy::too_many_arguments, reason = "the sizes and strides of three matrices")]
#[inline(always)]
fn block<const R: usize, const L: usize>(
    out: &mut [f32],
    out_stride: usize,
    a: Left<'_>,
    row: usize,
    b: &[f32],
    b_stride: usize,
    depth: usize,
    accumulate: bool,
) {
    let mut sums = [[0.0f32; L]; R];
    if accumulate {
        for (r, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&out[r * out_stride..][..L]);
        }
    }
    // Rows are cut to length, and columns are read at once, so that no index is checked in the loop.
    if a.depth == 1 {
        let rows: [&[f32]; R] = std::array::from_fn(|r| &a.data[(row + r) * a.row..][..depth]);
        for k in 0..depth {
            add(&mut sums, rows.map(|row| row[k]), &b[k * b_stride..]);
        }
    } else {
        for k in 0..depth {
            let column = &a.data[k * a.depth + row * a.row..];
            add(&mut sums, std::array::from_fn(|r| column[r * a.row]), &b[k * b_stride..]);
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        out[r * out_stride..][..L].copy_from_slice(sums);
    }
}

/// `sums += a b`, for a column of `a` and a row of `b`.
#[inline(always)]
fn add<const R: usize, const L: usize>(sums: &mut [[f32; L]; R], a: [f32; R], b: &[f32]) {
    let b: &[f32; L] = b[..L].try_into().expect("a slice of length L");
    for (sums, a) in sums.iter_mut().zip(a) {
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = fused(a, *b, *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;

    #[test]
    fn products_are_right_for_every_remainder() {
        for (rows, depth, columns) in
            [(1, 1, 1), (4, 8, 16), (5, 7, 25), (7, 32, 43), (2, 9, 150), (3, 0, 9), (36, 32, 48)]
        {
            let (a, b) = (numbers(1, rows * depth), numbers(2, depth * columns));
            for (row, along) in [(depth, 1), (1, rows)] {
                let left = Left { data: &a, row, depth: along };
                let mut out = vec![0.5; rows * (columns + 3)];
                product(&mut out, columns + 3, left, &b, columns, rows, columns, depth, true);
                for i in 0..rows {
                    for j in 0..columns {
                        let expected: f32 = (0..depth).map(|k| a[i * row + k * along] * b[k * columns + j]).sum();
                        let found = out[i * (columns + 3) + j];
                        assert!((found - expected - 0.5).abs() < 1e-5, "{rows} {depth} {columns}: {found} {expected}");
                    }
                    assert_eq!(
                        out[i * (columns + 3) + columns..][..3],
                        [0.5; 3],
                        "nothing is written beside the result"
                    );
                }
            }
        }
    }
}
