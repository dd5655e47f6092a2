//! Small matrix products without any overhead: the steps of attention, a few dozen rows and columns each.
//!
//! Each element is one chain of fused multiply-adds in the order of the depth, whatever the shape; so a row's bits do not
//! depend on the others.

use super::vector::{self, Vector, Wide, prefetch};

/// A small operand `a`: element `(i, k)` is `data[i * row + k * depth]`, and one of the two steps is 1.
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
    assert!(a.row == 1 || a.depth == 1, "neither rows nor columns of a matrix are dense");
    vector::run(Product { out, out_stride, a, b, b_stride, rows, columns, depth, accumulate });
}

/// Rows of the right operand that are asked for ahead.
const AHEAD: usize = 8;

struct Product<'a> {
    out: &'a mut [f32],
    out_stride: usize,
    a: Left<'a>,
    b: &'a [f32],
    b_stride: usize,
    rows: usize,
    columns: usize,
    depth: usize,
    accumulate: bool,
}

impl Wide for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let mut column = 0;
        while column < self.columns {
            let left = self.columns - column;
            column += match left / V::LANES {
                0 if left >= 8 => self.strip::<[f32; 8], 1>(column),
                0 => self.strip::<f32, 1>(column),
                1 => self.strip::<V, 1>(column),
                // With few rows more columns side by side, so that no addition waits for the one before, and memory is read
                // as it lies.
                8.. if self.rows < 4 => self.strip::<V, 8>(column),
                6.. if self.rows < 4 => self.strip::<V, 6>(column),
                4.. if self.rows < 4 => self.strip::<V, 4>(column),
                _ => self.strip::<V, 2>(column),
            };
        }
    }
}

impl Product<'_> {
    /// All rows of `C` vectors of columns. Gives the columns.
    #[inline(always)]
    fn strip<V: Vector, const C: usize>(&mut self, column: usize) -> usize {
        let mut row = 0;
        while row < self.rows {
            row += match self.rows - row {
                // As many sums as there are registers for.
                8.. if C <= 2 && V::LANES == 16 => self.block::<V, 8, C>(row, column),
                4.. if C <= 2 => self.block::<V, 4, C>(row, column),
                _ => self.block::<V, 1, C>(row, column),
            };
        }
        C * V::LANES
    }

    /// `R` rows by `C` vectors of columns, kept in registers over the whole depth. Gives `R`.
    #[inline(always)]
    fn block<V: Vector, const R: usize, const C: usize>(&mut self, row: usize, column: usize) -> usize {
        let width = C * V::LANES;
        let mut sums = [[V::splat(0.0); C]; R];
        if self.accumulate {
            for (r, sums) in sums.iter_mut().enumerate() {
                let out = &self.out[(row + r) * self.out_stride + column..][..width];
                *sums = std::array::from_fn(|c| V::of(&out[c * V::LANES..]));
            }
        }
        let (a, b) = (self.a, &self.b[column.min(self.b.len())..]);
        // Rows are cut to length, and columns are read at once, so that no index is checked in the loop.
        if a.depth == 1 {
            let rows: [&[f32]; R] = std::array::from_fn(|r| &a.data[(row + r) * a.row..][..self.depth]);
            for k in 0..self.depth {
                if R == 1 {
                    // One row waits for memory: what it reads next is asked for ahead.
                    let next = b.as_ptr().wrapping_add((k + AHEAD) * self.b_stride);
                    (0..width).step_by(16).for_each(|line| prefetch(next.wrapping_add(line)));
                }
                add(&mut sums, &std::array::from_fn(|r| rows[r][k]), &b[k * self.b_stride..]);
            }
        } else {
            for k in 0..self.depth {
                let column = a.data[k * a.depth + row..].first_chunk().expect("a column of the operand");
                add(&mut sums, column, &b[k * self.b_stride..]);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = &mut self.out[(row + r) * self.out_stride + column..][..width];
            sums.iter().zip(out.chunks_exact_mut(V::LANES)).for_each(|(sum, out)| sum.write(out));
        }
        R
    }
}

/// `sums += a b`, for a column of `a` and a row of `b`.
#[inline(always)]
fn add<V: Vector, const R: usize, const C: usize>(sums: &mut [[V; C]; R], a: &[f32; R], b: &[f32]) {
    let b = &b[..C * V::LANES];
    let b: [V; C] = std::array::from_fn(|c| V::of(&b[c * V::LANES..]));
    for (sums, a) in sums.iter_mut().zip(a) {
        let a = V::splat(*a);
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = a.fused(b, *sum);
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
