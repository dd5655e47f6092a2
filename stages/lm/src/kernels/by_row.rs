//! Matrix products of which a row has the same bits whoever else is there: what decoding is made of.
//!
//! Few rows meet large weights, so the time goes into reading the weights, each once from main memory: with a handful of
//! rows a task runs along a few rows of the weight at a time, wide enough for memory to keep up; with more, along all of
//! the depth of a narrow panel, which then stays in the cache for the other rows.
//!
//! An element is one chain of fused multiply-adds in the order of the depth (or, against rows of the weight, sixteen chains
//! and a fixed tree), so neither threads, nor the shape of a tile, nor the width of the processor's vectors change a bit.

use std::sync::LazyLock;

use rayon::prelude::*;

use super::elementary::fused;
use super::elementwise;

/// Up to so many rows a product is bound by memory.
const FEW: usize = 16;

/// Rows of the weight that are read together, and how wide they are at most, where rows are few.
const STREAM: (usize, usize) = (16, 1536);

/// The same where they are more: a piece of the weight that fits the second cache.
const PANEL: (usize, usize) = (768, 192);

/// Rows of a transposed weight that one task takes.
const STRIP: usize = 128;

/// Lanes of sums along the depth.
const LANES: usize = 16;

/// `a weight + bias`: `[rows, depth]` times `[depth, columns]`.
pub(crate) fn product(a: &[f32], weight: &[f32], bias: &[f32], depth: usize) -> Vec<f32> {
    let columns = bias.len();
    assert!(depth > 0 && a.len().is_multiple_of(depth) && weight.len() == depth * columns, "sizes of a product");
    let rows = a.len() / depth;
    let mut out = elementwise::rows_of(bias, rows);
    let shared = Shared { data: out.as_mut_ptr(), stride: columns, rows };
    let (at_once, parts) =
        if rows <= FEW { (STREAM.0, cut(columns, STREAM.1, 1)) } else { (PANEL.0, cut(columns, PANEL.1, 4)) };
    let a = &interleave(a, depth, VECTORS.rows());
    parts.into_par_iter().for_each(|(start, end)| {
        let panel = Panel { a, weight, depth, at_once, start, end };
        match *VECTORS {
            // SAFETY: the processor has these instructions; tasks write columns of their own.
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => unsafe { panel_avx512(&panel, shared) },
            // SAFETY: tasks write columns of their own.
            Vectors::Native => unsafe { panel_by::<[f32; 8], 4, 3>(&panel, shared) },
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
    cut(columns, STRIP, 4).into_par_iter().for_each(|(start, end)| {
        match *VECTORS {
            // SAFETY: the processor has these instructions; tasks write columns of their own.
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => unsafe { dots_avx512(a, weight, depth, start, end, shared) },
            // SAFETY: tasks write columns of their own.
            Vectors::Native => unsafe { dots_by::<[f32; LANES], 2, 2>(a, weight, depth, start, end, shared) },
        }
    });
    out
}

/// `0..columns` in parts of at most `width`, and at least `parts` for each thread while they are wider than a tile.
/// Where they begin changes no bit.
fn cut(columns: usize, width: usize, parts: usize) -> Vec<(usize, usize)> {
    const TILE: usize = 48;
    let fair = columns.div_ceil(parts * rayon::current_num_threads()).next_multiple_of(TILE);
    let width = width.min(fair);
    (0..columns).step_by(width).map(|start| (start, columns.min(start + width))).collect()
}

/// Vector instructions to compile for.
enum Vectors {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// What the program was compiled for.
    Native,
}

impl Vectors {
    /// Rows of the largest tile of [`product`].
    fn rows(&self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => 8,
            Vectors::Native => 4,
        }
    }
}

/// Rows of the tile that `left` rows begin with.
fn tile_rows(left: usize, largest: usize) -> usize {
    [largest, 4, 2, 1].into_iter().find(|rows| *rows <= left).unwrap_or(1)
}

/// The rows of each tile interleaved, in the order in which it reads them: rows that lie far apart would push each other
/// out of the cache.
fn interleave(a: &[f32], depth: usize, largest: usize) -> Vec<f32> {
    let mut out = vec![0.0; a.len()];
    let (mut from, mut to) = (a, out.as_mut_slice());
    while !from.is_empty() {
        let rows = tile_rows(from.len() / depth, largest);
        let (tile, behind) = from.split_at(rows * depth);
        let (place, free) = to.split_at_mut(rows * depth);
        for (k, place) in place.chunks_exact_mut(rows).enumerate() {
            place.iter_mut().enumerate().for_each(|(r, place)| *place = tile[r * depth + k]);
        }
        (from, to) = (behind, free);
    }
    out
}

static VECTORS: LazyLock<Vectors> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    if cfg!(target_feature = "fma") && is_x86_feature_detected!("avx512f") {
        return Vectors::Avx512;
    }
    Vectors::Native
});

/// Numbers that one instruction works on. Every method is inlined into code compiled for the instructions it needs.
trait Vector: Copy {
    const LANES: usize;

    fn splat(x: f32) -> Self;
    /// # Safety
    ///
    /// [`Vector::LANES`] elements must be readable.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    ///
    /// [`Vector::LANES`] elements must be writable.
    unsafe fn store(self, to: *mut f32);
    /// `self * b + c`, rounded once.
    fn fused(self, b: Self, c: Self) -> Self;
}

impl Vector for f32 {
    const LANES: usize = 1;

    #[inline(always)]
    fn splat(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { *to = self }
    }

    #[inline(always)]
    fn fused(self, b: f32, c: f32) -> f32 {
        fused(self, b, c)
    }
}

/// What the compiler makes of it with the instructions that the program was compiled for.
impl<const N: usize> Vector for [f32; N] {
    const LANES: usize = N;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; N]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise; an array is aligned as its elements are.
        unsafe { *from.cast() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise; an array is aligned as its elements are.
        unsafe { *to.cast() = self }
    }

    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        let mut out = c;
        for i in 0..N {
            out[i] = fused(self[i], b[i], c[i]);
        }
        out
    }
}

#[cfg(target_arch = "x86_64")]
impl Vector for std::arch::x86_64::__m512 {
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: only used where the processor was found to have AVX-512, as in what follows.
        unsafe { std::arch::x86_64::_mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_storeu_ps(to, self) }
    }

    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        // SAFETY: as in `splat`.
        unsafe { std::arch::x86_64::_mm512_fmadd_ps(self, b, c) }
    }
}

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

/// Columns `start..end` of a product, `at_once` rows of the weight at a time.
struct Panel<'a> {
    /// [Interleaved](interleave).
    a: &'a [f32],
    weight: &'a [f32],
    depth: usize,
    at_once: usize,
    start: usize,
    end: usize,
}

/// # Safety
///
/// The processor must have AVX-512, and see [`panel_by`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn panel_avx512(panel: &Panel<'_>, out: Shared) {
    // SAFETY: the caller's promise.
    unsafe { panel_by::<std::arch::x86_64::__m512, 8, 3>(panel, out) }
}

/// One panel, by tiles of up to `R` rows and `C` vectors of columns.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn panel_by<V: Vector, const R: usize, const C: usize>(panel: &Panel<'_>, out: Shared) {
    for from in (0..panel.depth).step_by(panel.at_once) {
        let depth = panel.at_once.min(panel.depth - from);
        let mut column = panel.start;
        while column < panel.end {
            // SAFETY: the caller's promise.
            column += unsafe {
                match panel.end - column {
                    left if left >= C * V::LANES => strip::<V, R, C>(panel, from, depth, out, column),
                    left if left >= V::LANES => strip::<V, R, 1>(panel, from, depth, out, column),
                    _ => strip::<f32, R, 1>(panel, from, depth, out, column),
                }
            };
        }
    }
}

/// All rows of `C` vectors of columns of a panel. Gives the columns.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn strip<V: Vector, const R: usize, const C: usize>(
    panel: &Panel<'_>,
    from: usize,
    depth: usize,
    out: Shared,
    column: usize,
) -> usize {
    let weight = &panel.weight[from * out.stride + column..];
    // More rows than a few find the weight in the cache, and memory has time enough.
    let streams = out.rows <= FEW && from + depth < panel.depth;
    let mut row = 0;
    while row < out.rows {
        let ahead = streams && row == 0;
        let rows = tile_rows(out.rows - row, R);
        let a = &panel.a[row * panel.depth + from * rows..][..rows * depth];
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                4 => tile::<V, 4, C>(a, weight, out, row, column, ahead),
                2 => tile::<V, 2, C>(a, weight, out, row, column, ahead),
                1 => tile::<V, 1, C>(a, weight, out, row, column, ahead),
                _ => tile::<V, R, C>(a, weight, out, row, column, ahead),
            }
        };
        row += rows;
    }
    C * V::LANES
}

/// `R` rows by `C` vectors of columns, kept in registers over the depth of `a`, `[depth, R]`.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const C: usize>(
    a: &[f32],
    weight: &[f32],
    out: Shared,
    row: usize,
    column: usize,
    ahead: bool,
) {
    let (stride, depth) = (out.stride, a.len() / R);
    let weight = &weight[..(depth - 1) * stride + C * V::LANES];
    // SAFETY: the caller's promise; `k` is below `depth`, to which the weight was cut, and `a` has `R` times as much.
    unsafe {
        let mut sums: [[V; C]; R] = std::array::from_fn(|r| {
            let out = out.row(row + r, column, column + C * V::LANES);
            std::array::from_fn(|c| V::load(out.as_ptr().add(c * V::LANES)))
        });
        for k in 0..depth {
            let w = weight.as_ptr().add(k * stride);
            if ahead {
                // What this task reads after these `depth` rows, while it works on them.
                for line in (0..C * V::LANES).step_by(16) {
                    prefetch(w.wrapping_add(depth * stride + line));
                }
            }
            let w: [V; C] = std::array::from_fn(|c| V::load(w.add(c * V::LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = V::splat(*a.get_unchecked(k * R + r));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = a.fused(w, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = out.row(row + r, column, column + C * V::LANES);
            for (c, sum) in sums.iter().enumerate() {
                sum.store(out.as_mut_ptr().add(c * V::LANES));
            }
        }
    }
}

/// Asks for a cache line that will be wanted soon. The address may be any.
#[inline(always)]
fn prefetch(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of an address that does not exist does nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// # Safety
///
/// The processor must have AVX-512, and see [`dots_by`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn dots_avx512(a: &[f32], weight: &[f32], depth: usize, start: usize, end: usize, out: Shared) {
    // SAFETY: the caller's promise.
    unsafe { dots_by::<std::arch::x86_64::__m512, 8, 3>(a, weight, depth, start, end, out) }
}

/// Products with rows `start..end` of a transposed weight, by tiles of `R` rows and `C` columns.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn dots_by<V: Vector, const R: usize, const C: usize>(
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
                    (true, left) if left >= R => dots::<V, R, C>(a, w, depth, out, row, column),
                    (true, left) if left >= 4 => dots::<V, 4, C>(a, w, depth, out, row, column),
                    (true, left) if left >= 2 => dots::<V, 2, C>(a, w, depth, out, row, column),
                    (true, _) => dots::<V, 1, C>(a, w, depth, out, row, column),
                    (false, _) => dots::<V, 1, 1>(a, w, depth, out, row, column),
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
unsafe fn dots<V: Vector, const R: usize, const C: usize>(
    a: &[f32],
    weight: &[f32],
    depth: usize,
    out: Shared,
    row: usize,
    column: usize,
) -> usize {
    let a: [&[f32]; R] = std::array::from_fn(|r| &a[r * depth..][..depth]);
    let w: [&[f32]; C] = std::array::from_fn(|c| &weight[c * depth..][..depth]);
    let whole = depth / LANES * LANES;
    let mut sums = [[V::splat(0.0); C]; R];
    for k in (0..whole).step_by(LANES) {
        // SAFETY: `k + LANES` is at most `depth`, the length of all.
        unsafe {
            let w: [V; C] = std::array::from_fn(|c| V::load(w[c].as_ptr().add(k)));
            for (sums, a) in sums.iter_mut().zip(&a) {
                let a = V::load(a.as_ptr().add(k));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = a.fused(w, *sum);
                }
            }
        }
    }
    for (r, (sums, a)) in sums.iter().zip(&a).enumerate() {
        // SAFETY: the caller's promise.
        let out = unsafe { out.row(row + r, column, column + C) };
        for ((sum, w), out) in sums.iter().zip(&w).zip(out) {
            let mut lanes = [0.0f32; LANES];
            // SAFETY: there are `LANES` of them.
            unsafe { sum.store(lanes.as_mut_ptr()) };
            for (lane, (a, w)) in lanes.iter_mut().zip(a[whole..].iter().zip(&w[whole..])) {
                *lane = fused(*a, *w, *lane);
            }
            let mut width = LANES / 2;
            while width > 0 {
                for lane in 0..width {
                    lanes[lane] += lanes[lane + width];
                }
                width /= 2;
            }
            *out = lanes[0];
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

    fn both(a: &[f32], weight: &[f32], bias: &[f32], k: usize, n: usize) -> [Vec<f32>; 2] {
        let mut turned = vec![0.0; n * k];
        for i in 0..k {
            (0..n).for_each(|j| turned[j * k + i] = weight[i * n + j]);
        }
        [product(a, weight, bias, k), product_transposed(a, &turned, k)]
    }

    #[test]
    fn products_are_right() {
        for (k, n) in SHAPES {
            let (a, weight, bias) = (numbers(1, 15 * k), numbers(2, k * n), numbers(3, n));
            let [with_bias, transposed] = both(&a, &weight, &bias, k, n);
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
            let (a, weight, bias) = (numbers(1, 40 * k), numbers(2, k * n), numbers(3, n));
            let all = both(&a, &weight, &bias, k, n);
            assert!(all == with_threads(3, || both(&a, &weight, &bias, k, n)), "{k} {n}: threads");
            for rows in 1..40 {
                let some = both(&a[..rows * k], &weight, &bias, k, n);
                for (some, all) in some.iter().zip(&all) {
                    assert!(*some == all[..rows * n], "depth {k}, columns {n}, rows {rows}");
                }
            }
        }
    }

    #[test]
    fn the_width_of_vectors_changes_no_bit() {
        for (k, n) in SHAPES {
            let (a, weight, bias) = (numbers(1, 21 * k), numbers(2, k * n), numbers(3, n));
            let expected = product(&a, &weight, &bias, k);
            let mut out = elementwise::rows_of(&bias, 21);
            let shared = Shared { data: out.as_mut_ptr(), stride: n, rows: 21 };
            let panel = Panel { a: &interleave(&a, k, 4), weight: &weight, depth: k, at_once: 100, start: 0, end: n };
            // SAFETY: there is one task.
            unsafe { panel_by::<[f32; 8], 4, 3>(&panel, shared) };
            assert!(out == expected, "{k} {n}");
            let turned: Vec<f32> = numbers(4, n * k);
            let expected = product_transposed(&a, &turned, k);
            // SAFETY: there is one task.
            unsafe { dots_by::<[f32; LANES], 2, 2>(&a, &turned, k, 0, n, shared) };
            assert!(out == expected, "{k} {n} transposed");
        }
    }
}
