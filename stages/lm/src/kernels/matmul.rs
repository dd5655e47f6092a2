//! The matrix product, by the `gemm` crate, behind bounds checks.
//!
//! `gemm` gives each element of the result to one thread, which adds its products in an order that depends on the depth
//! alone; with the depth cut at [`DEPTH`] here, on nothing at all. It has two other ways for tiny results, which are not
//! taken. So neither threads nor the number of rows change a bit.

use gemm::Parallelism;

use super::buffer::transposed;

/// Depth of one call: `gemm` itself never cuts shorter sums.
pub(crate) const DEPTH: usize = 512;

/// Multiplications below which a product runs on one thread.
const ONE_THREAD: usize = 48 * 48 * 64;

/// Elements of a result up to which `gemm` adds in another order where both operands are dense along the depth.
const TINY: usize = 16 * 16;

/// Rows for which a transposed operand is turned first.
const WORTH_TURNING: usize = 64;

/// A matrix in a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix of `columns` columns, row after row.
    pub(crate) fn new(data: &'a [f32], columns: usize) -> Self {
        assert!(columns > 0 && data.len().is_multiple_of(columns), "{} elements in rows of {columns}", data.len());
        Matrix { data, rows: data.len() / columns, columns, row_stride: columns, column_stride: 1 }
    }

    /// `columns` columns, from `first` on, of rows of `stride` elements.
    pub(crate) fn part(data: &'a [f32], stride: usize, first: usize, columns: usize) -> Self {
        assert!(columns > 0 && first + columns <= stride, "columns {first}..{} of {stride}", first + columns);
        let rows = Matrix::new(data, stride).rows;
        Matrix { data: &data[first.min(data.len())..], rows, columns, row_stride: stride, column_stride: 1 }
    }

    pub(crate) fn rows(self) -> usize {
        self.rows
    }

    pub(crate) fn columns(self) -> usize {
        self.columns
    }

    /// Whether its columns are dense and longer than its rows: `gemm` would take a third longer for it, since what it reads
    /// together lies far apart.
    fn is_deep_and_transposed(self) -> bool {
        self.row_stride == 1 && self.column_stride > 1 && self.rows > self.columns
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Matrix {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// `a b`, row after row.
pub(crate) fn product(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let mut out = Vec::new();
    product_in(&mut out, a, b);
    out
}

/// Puts `a b` in place of what `out` holds, in the same memory if that is large enough.
pub(crate) fn product_in(out: &mut Vec<f32>, a: Matrix<'_>, b: Matrix<'_>) {
    let length = a.rows * b.columns;
    out.clear();
    if a.columns == 0 {
        out.resize(length, 0.0);
        return;
    }
    out.reserve_exact(length);
    // SAFETY: the capacity is `rows * columns` of the result, and without `accumulate` every element is written, none read.
    unsafe {
        multiply(out.as_mut_ptr(), b.columns, a, b, false);
        out.set_len(length);
    }
}

/// `out = a b`, or `out += a b`.
pub(crate) fn product_into(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    assert_eq!(out.len(), a.rows * b.columns, "size of a product");
    if a.columns == 0 {
        if !accumulate {
            out.fill(0.0);
        }
        return;
    }
    // SAFETY: `out` has `rows * columns` elements, all initialised.
    unsafe { multiply(out.as_mut_ptr(), b.columns, a, b, accumulate) }
}

/// The same for some columns of `out`, from `first` on, whose rows have `stride` elements.
pub(crate) fn product_into_columns(
    out: &mut [f32],
    stride: usize,
    first: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    accumulate: bool,
) {
    assert!(out.len() == a.rows * stride && first + b.columns <= stride, "place of a product");
    assert!(a.columns > 0, "a product has depth");
    if a.rows > 0 {
        // SAFETY: the last element written is `first + b.columns - 1` of the last row of `out`; all are initialised.
        unsafe { multiply(out.as_mut_ptr().add(first), stride, a, b, accumulate) }
    }
}

/// # Safety
///
/// `out` must be valid for writes of `a.rows` times `b.columns` elements, `stride` apart, and initialised if `accumulate`.
unsafe fn multiply(out: *mut f32, stride: usize, a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    assert_eq!(a.columns, b.rows, "depth of a product");
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    if a.rows == 1 {
        // A lone row goes as one of two, or `gemm` would add in another order.
        let mut two = vec![0.0; 2 * b.columns];
        let a = Matrix { rows: 2, row_stride: 0, ..a };
        // SAFETY: the caller's promise, which is for the first row; `two` has both.
        unsafe {
            if accumulate {
                out.copy_to(two.as_mut_ptr(), b.columns);
            }
            multiply(two.as_mut_ptr(), b.columns, a, b, accumulate);
            out.copy_from(two.as_ptr(), b.columns);
        }
        return;
    }
    let both_dense_along_the_depth = a.column_stride == 1 && b.row_stride == 1 && b.column_stride > 1;
    let tiny = both_dense_along_the_depth && a.rows * b.columns <= TINY;
    if tiny || b.is_deep_and_transposed() && a.rows >= WORTH_TURNING {
        let turned = transposed(b.data, b.column_stride, b.columns, b.rows, b.columns);
        // SAFETY: the caller's promise; the operand is the same.
        return unsafe { multiply(out, stride, a, Matrix::new(&turned, b.columns), accumulate) };
    }
    let work = a.rows * b.columns * a.columns;
    let threads = if work < ONE_THREAD { 1 } else { rayon::current_num_threads() };
    for start in (0..a.columns).step_by(DEPTH) {
        let depth = DEPTH.min(a.columns - start);
        // SAFETY: a `Matrix` holds all elements its strides reach, `start + depth` stays within the depth of both, and
        // `out` is the caller's promise; after the first part all of it is initialised.
        unsafe {
            gemm::gemm(
                a.rows,
                b.columns,
                depth,
                out,
                1,
                stride as isize,
                accumulate || start > 0,
                a.data.as_ptr().add(start * a.column_stride),
                a.column_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr().add(start * b.row_stride),
                b.column_stride as isize,
                b.row_stride as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(threads),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{numbers, with_threads};

    fn plain(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f64> {
        let at = |m: Matrix<'_>, i: usize, j: usize| f64::from(m.data[i * m.row_stride + j * m.column_stride]);
        let mut out = Vec::new();
        for i in 0..a.rows {
            out.extend((0..b.columns).map(|j| (0..a.columns).map(|k| at(a, i, k) * at(b, k, j)).sum::<f64>()));
        }
        out
    }

    #[test]
    fn products_are_right_for_every_orientation_and_depth() {
        for (m, k, n) in [(1, 1, 1), (3, 2, 5), (7, 13, 17), (33, 600, 29), (64, 192, 96), (1, 192, 70), (5, 0, 3)] {
            let (a, b) = (numbers(1, m * k), numbers(2, k * n));
            let (at, bt) = (numbers(3, m * k), numbers(4, k * n));
            let a = [Matrix { data: &a, rows: m, columns: k, row_stride: k, column_stride: 1 }, {
                Matrix { data: &at, rows: m, columns: k, row_stride: 1, column_stride: m }
            }];
            let b = [Matrix { data: &b, rows: k, columns: n, row_stride: n, column_stride: 1 }, {
                Matrix { data: &bt, rows: k, columns: n, row_stride: 1, column_stride: k }
            }];
            for (a, b) in [(a[0], b[0]), (a[0], b[1]), (a[1], b[0]), (a[1], b[1])] {
                let expected = plain(a, b);
                let mut added = vec![1.0; m * n];
                product_into(&mut added, a, b, true);
                for ((found, expected), added) in product(a, b).iter().zip(&expected).zip(&added) {
                    let room = 1e-6 * (10 + k) as f64;
                    assert!((f64::from(*found) - expected).abs() < room, "{m} {k} {n}: {found} {expected}");
                    assert!((f64::from(*added) - expected - 1.0).abs() < room, "{m} {k} {n}");
                }
            }
        }
    }

    #[test]
    fn turning_an_operand_changes_no_bit() {
        for (m, k, n) in [(64, 700, 130), (100, 1030, 33), (70, 64, 2), (65, 40, 16)] {
            let (a, b) = (numbers(1, m * k), numbers(2, n * k));
            let turned = transposed(&b, k, n, k, n);
            let operands = [Matrix::new(&b, k).transposed(), Matrix::new(&turned, n)];
            let [found, expected] = operands.map(|b| product(Matrix::new(&a, k), b));
            assert!(found == expected, "{m} {k} {n}");
        }
    }

    #[test]
    fn other_rows_do_not_change_a_bit() {
        for (k, n) in [(32, 2), (32, 33), (600, 64), (192, 300)] {
            let (a, b) = (numbers(1, 40 * k), numbers(2, k * n));
            for b in [Matrix::new(&b, n), Matrix::new(&b, k).transposed()] {
                let all = product(Matrix::new(&a, k), b);
                for rows in 1..40 {
                    let some = product(Matrix::new(&a[..rows * k], k), b);
                    assert!(some == all[..rows * n], "{rows} of 40 rows, {k} {n}");
                    let mut added = vec![1.0; rows * n];
                    product_into(&mut added, Matrix::new(&a[..rows * k], k), b, true);
                    let mut expected = vec![1.0; 40 * n];
                    product_into(&mut expected, Matrix::new(&a, k), b, true);
                    assert!(added == expected[..rows * n], "{rows} of 40 rows, {k} {n}, added");
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        for (m, k, n) in [(576, 192, 576), (192, 576, 768), (576, 768, 192), (576, 192, 1024), (40, 1300, 33)] {
            let (a, b) = (numbers(1, m * k), numbers(2, k * n));
            let run = || {
                let dx = product(Matrix::new(&a, k), Matrix::new(&b, n));
                let dw = product(Matrix::new(&a, m).transposed(), Matrix::new(&a, m));
                (dx, dw)
            };
            let one = with_threads(1, run);
            for threads in [2, 3, 5] {
                assert!(one == with_threads(threads, run), "{m} {k} {n} with {threads} threads");
            }
        }
    }
}
