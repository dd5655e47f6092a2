//! Matrix products of which a row has the same bits whoever else is there: what decoding is made of.
//!
//! Few rows meet large weights, so the time goes into reading the weights. Each is read from main memory once: a task
//! takes a panel of columns, copies a piece of it side by side into its cache, and takes all rows through that.
//!
//! An element is a chain of fused multiply-adds in the order of the depth (or, against rows of the weight, sixteen chains
//! and a fixed tree), so neither threads nor the width of the processor's vectors change a bit.

use std::sync::LazyLock;

use rayon::prelude::*;

use super::elementary::fused;

/// Depth of one piece of a panel. After each, sums are added to the result: short sums, and pieces that fit a cache.
const DEPTH: usize = 512;

/// Columns of a panel.
const PANEL: usize = 192;

/// Rows of a transposed weight that one task takes.
const STRIP: usize = 128;

/// Lanes of sums along the depth.
const LANES: usize = 16;

/// `a weight + bias`: `[rows, depth]` times `[depth, columns]`.
pub(crate) fn product(a: &[f32], weight: &[f32], bias: Option<&[f32]>, depth: usize, columns: usize) -> Vec<f32> {
    assert!(depth > 0 && a.len().is_multiple_of(depth) && weight.len() == depth * columns, "sizes of a product");
    assert!(bias.is_none_or(|bias| bias.len() == columns), "size of a bias");
    let rows = a.len() / depth;
    let mut out = vec![0.0; rows * columns];
    let shared = Shared { data: out.as_mut_ptr(), stride: columns, rows };
    let panels: Vec<(usize, usize)> = cut(columns, PANEL, 32);
    panels.into_par_iter().for_each_init(Vec::new, |buffer, (start, end)| {
        let task = Panel { a, weight, bias, depth, columns, start, end };
        match *VECTORS {
            // SAFETY: the processor has these instructions; tasks write columns of their own.
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => unsafe { panel_avx512(&task, shared, buffer) },
            // SAFETY: tasks write columns of their own.
            Vectors::Native => unsafe { panel::<6, 16>(&task, shared, buffer) },
        }
    });
    out
}

/// `a weight^T`: `[rows, depth]` times `[columns, depth]` transposed.
pub(crate) fn product_transposed(a: &[f32], weight: &[f32], depth: usize) -> Vec<f32> {
    assert!(depth > 0 && a.len().is_multiple_of(depth) && weight.len().is_multiple_of(depth), "sizes of a product");
    let (rows, columns) = (a.len() / depth, weight.len() / depth);
    let mut out = vec![0.0; rows * columns];
    let shared = Shared { data: out.as_mut_ptr(), stride: columns, rows };
    let strips: Vec<(usize, usize)> = cut(columns, STRIP, 4);
    strips.into_par_iter().for_each(|(start, end)| {
        match *VECTORS {
            // SAFETY: the processor has these instructions; tasks write columns of their own.
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => unsafe { strip_avx512(a, weight, depth, start, end, shared) },
            // SAFETY: tasks write columns of their own.
            Vectors::Native => unsafe { strip::<2, 2>(a, weight, depth, start, end, shared) },
        }
    });
    out
}

/// `0..columns` in parts of about `width`, a multiple of `step`: at least four for each thread where that leaves any
/// work to a part. Where parts begin changes no bit.
fn cut(columns: usize, width: usize, step: usize) -> Vec<(usize, usize)> {
    let wanted = columns.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(step);
    let width = width.min(wanted);
    (0..columns).step_by(width.max(1)).map(|start| (start, columns.min(start + width))).collect()
}

/// Vector instructions to compile for.
enum Vectors {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// What the program was compiled for.
    Native,
}

static VECTORS: LazyLock<Vectors> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    if cfg!(target_feature = "fma") && is_x86_feature_detected!("avx512f") {
        return Vectors::Avx512;
    }
    Vectors::Native
});

/// The result, of which each task writes some columns.
#[derive(Clone, Copy)]
struct Shared {
    data: *mut f32,
    stride: usize,
    rows: usize,
}

// SAFETY: a pointer into a result that outlives all tasks; what they write does not overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Columns `start..end` of a row.
    ///
    /// # Safety
    ///
    /// Nobody else may use these elements while the slice lives.
    unsafe fn row<'a>(self, row: usize, start: usize, end: usize) -> &'a mut [f32] {
        assert!(row < self.rows && start <= end && end <= self.stride, "a place in the result");
        // SAFETY: within the result, by the assertion; exclusive, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride + start), end - start) }
    }
}

/// Columns `start..end` of a product.
struct Panel<'a> {
    a: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    depth: usize,
    columns: usize,
    start: usize,
    end: usize,
}

/// # Safety
///
/// The processor must have AVX-512, and see [`panel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn panel_avx512(task: &Panel<'_>, out: Shared, buffer: &mut Vec<f32>) {
    // SAFETY: the caller's promise.
    unsafe { panel::<12, 32>(task, out, buffer) }
}

/// One panel, by tiles of up to `R` rows and `L` columns.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn panel<const R: usize, const L: usize>(task: &Panel<'_>, out: Shared, buffer: &mut Vec<f32>) {
    for from in (0..task.depth).step_by(DEPTH) {
        let depth = DEPTH.min(task.depth - from);
        pack::<L>(task, from, depth, buffer);
        for (index, packed) in buffer.chunks_exact(depth * L).enumerate() {
            let start = task.start + index * L;
            let end = task.end.min(start + L);
            let mut row = 0;
            while row < out.rows {
                let a = &task.a[row * task.depth + from..];
                // SAFETY: the caller's promise.
                let left = out.rows - row;
                row += unsafe {
                    match left {
                        left if left >= R => tile::<R, L>(a, task.depth, packed, out, row, start, end),
                        left if left >= 8 && R > 8 => tile::<8, L>(a, task.depth, packed, out, row, start, end),
                        left if left >= 4 => tile::<4, L>(a, task.depth, packed, out, row, start, end),
                        left if left >= 2 => tile::<2, L>(a, task.depth, packed, out, row, start, end),
                        _ => tile::<1, L>(a, task.depth, packed, out, row, start, end),
                    }
                };
            }
        }
    }
    if let Some(bias) = task.bias {
        for row in 0..out.rows {
            // SAFETY: the caller's promise.
            let out = unsafe { out.row(row, task.start, task.end) };
            out.iter_mut().zip(&bias[task.start..task.end]).for_each(|(out, bias)| *out += bias);
        }
    }
}

/// Rows `from..from + depth` of the panel's columns, `L` columns after `L` columns, zeros behind the last.
#[inline(always)]
fn pack<const L: usize>(task: &Panel<'_>, from: usize, depth: usize, buffer: &mut Vec<f32>) {
    let strips = (task.end - task.start).div_ceil(L);
    buffer.resize(strips * depth * L, 0.0);
    for k in 0..depth {
        let row = &task.weight[(from + k) * task.columns..][task.start..task.end];
        for (strip, piece) in row.chunks(L).enumerate() {
            let to = &mut buffer[(strip * depth + k) * L..][..L];
            match <&[f32; L]>::try_from(piece) {
                Ok(piece) => to.copy_from_slice(piece),
                Err(_) => {
                    to[..piece.len()].copy_from_slice(piece);
                    to[piece.len()..].fill(0.0);
                }
            }
        }
    }
}

/// Adds `R` rows of a piece of the product to the result; the sums stay in registers over the whole piece. Gives `R`.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn tile<const R: usize, const L: usize>(
    a: &[f32],
    a_stride: usize,
    packed: &[f32],
    out: Shared,
    row: usize,
    start: usize,
    end: usize,
) -> usize {
    let depth = packed.len() / L;
    let a: [&[f32]; R] = std::array::from_fn(|r| &a[r * a_stride..][..depth]);
    let mut sums = [[0.0f32; L]; R];
    for (k, b) in packed.chunks_exact(L).enumerate() {
        for (sums, a) in sums.iter_mut().zip(&a) {
            // SAFETY: there are `depth` chunks.
            let x = unsafe { *a.get_unchecked(k) };
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = fused(x, *b, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: the caller's promise.
        let out = unsafe { out.row(row + r, start, end) };
        if let Ok(out) = <&mut [f32; L]>::try_from(&mut *out) {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        } else {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
    }
    R
}

/// # Safety
///
/// The processor must have AVX-512, and see [`strip`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn strip_avx512(a: &[f32], weight: &[f32], depth: usize, start: usize, end: usize, out: Shared) {
    // SAFETY: the caller's promise.
    unsafe { strip::<6, 4>(a, weight, depth, start, end, out) }
}

/// Products with rows `start..end` of a transposed weight, by tiles of `R` rows and `C` columns.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn strip<const R: usize, const C: usize>(
    a: &[f32],
    weight: &[f32],
    depth: usize,
    start: usize,
    end: usize,
    out: Shared,
) {
    let mut column = start;
    while column < end {
        let w = &weight[column * depth..];
        let wide = end - column >= C;
        let mut row = 0;
        while row < out.rows {
            let a = &a[row * depth..];
            let left = out.rows - row;
            // SAFETY: the caller's promise.
            row += unsafe {
                match (wide, left) {
                    (true, left) if left >= R => dots::<R, C>(a, w, depth, out, row, column),
                    (true, left) if left >= 2 => dots::<2, C>(a, w, depth, out, row, column),
                    (true, _) => dots::<1, C>(a, w, depth, out, row, column),
                    (false, _) => dots::<1, 1>(a, w, depth, out, row, column),
                }
            };
        }
        column += if wide { C } else { 1 };
    }
}

/// Products of `R` rows with `C` rows of the weight. Gives `R`.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn dots<const R: usize, const C: usize>(
    a: &[f32],
    weight: &[f32],
    depth: usize,
    out: Shared,
    row: usize,
    column: usize,
) -> usize {
    let a: [&[f32]; R] = std::array::from_fn(|r| &a[r * depth..][..depth]);
    let w: [&[f32]; C] = std::array::from_fn(|c| &weight[c * depth..][..depth]);
    let mut sums = [[[0.0f32; LANES]; C]; R];
    let whole = depth / LANES * LANES;
    for k in (0..whole).step_by(LANES) {
        for (sums, a) in sums.iter_mut().zip(&a) {
            let a = &a[k..k + LANES];
            for (sums, w) in sums.iter_mut().zip(&w) {
                for ((sum, a), w) in sums.iter_mut().zip(a).zip(&w[k..k + LANES]) {
                    *sum = fused(*a, *w, *sum);
                }
            }
        }
    }
    for (r, (sums, a)) in sums.iter_mut().zip(&a).enumerate() {
        // SAFETY: the caller's promise.
        let out = unsafe { out.row(row + r, column, column + C) };
        for ((sums, w), out) in sums.iter_mut().zip(&w).zip(out) {
            for (lane, (a, w)) in a[whole..].iter().zip(&w[whole..]).enumerate() {
                sums[lane] = fused(*a, *w, sums[lane]);
            }
            let mut width = LANES / 2;
            while width > 0 {
                for lane in 0..width {
                    sums[lane] += sums[lane + width];
                }
                width /= 2;
            }
            *out = sums[0];
        }
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{numbers, with_threads};

    /// Depths on both sides of a piece, columns on both sides of tiles and panels.
    const SHAPES: [(usize, usize); 9] =
        [(1, 1), (7, 3), (32, 96), (32, 61), (192, 576), (768, 192), (1600, 70), (512, 33), (515, 400)];

    fn both(a: &[f32], weight: &[f32], bias: Option<&[f32]>, k: usize, n: usize) -> [Vec<f32>; 2] {
        let mut turned = vec![0.0; n * k];
        for i in 0..k {
            (0..n).for_each(|j| turned[j * k + i] = weight[i * n + j]);
        }
        [product(a, weight, bias, k, n), product_transposed(a, &turned, k)]
    }

    #[test]
    fn products_are_right() {
        for (k, n) in SHAPES {
            let (a, weight, bias) = (numbers(1, 15 * k), numbers(2, k * n), numbers(3, n));
            let [with_bias, transposed] = both(&a, &weight, Some(&bias), k, n);
            for i in 0..15 {
                for j in 0..n {
                    let products = (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(weight[l * n + j]));
                    let expected = products.sum::<f64>();
                    let room = 1e-6 * (10 + k) as f64;
                    let found = f64::from(with_bias[i * n + j]) - f64::from(bias[j]);
                    assert!((found - expected).abs() < room, "{k} {n}: {found}, expected {expected}");
                    let found = f64::from(transposed[i * n + j]);
                    assert!((found - expected).abs() < room, "{k} {n} transposed: {found}, expected {expected}");
                }
            }
        }
    }

    #[test]
    fn neither_other_rows_nor_threads_change_a_bit() {
        for (k, n) in SHAPES {
            let (a, weight) = (numbers(1, 40 * k), numbers(2, k * n));
            let all = both(&a, &weight, None, k, n);
            assert!(all == with_threads(3, || both(&a, &weight, None, k, n)), "{k} {n}: threads");
            for rows in 1..40 {
                let some = both(&a[..rows * k], &weight, None, k, n);
                for (some, all) in some.iter().zip(&all) {
                    assert!(*some == all[..rows * n], "depth {k}, columns {n}, rows {rows}");
                }
            }
        }
    }

    #[test]
    fn the_width_of_vectors_changes_no_bit() {
        for (k, n) in SHAPES {
            let (a, weight) = (numbers(1, 21 * k), numbers(2, k * n));
            let expected = product(&a, &weight, None, k, n);
            let mut out = vec![0.0; 21 * n];
            let shared = Shared { data: out.as_mut_ptr(), stride: n, rows: 21 };
            let task = Panel { a: &a, weight: &weight, bias: None, depth: k, columns: n, start: 0, end: n };
            // SAFETY: there is one task.
            unsafe { panel::<6, 16>(&task, shared, &mut Vec::new()) };
            assert!(out == expected, "{k} {n}");
            let turned: Vec<f32> = numbers(4, n * k);
            let expected = product_transposed(&a, &turned, k);
            // SAFETY: there is one task.
            unsafe { strip::<2, 2>(&a, &turned, k, 0, n, shared) };
            assert!(out == expected, "{k} {n} transposed");
        }
    }
}
