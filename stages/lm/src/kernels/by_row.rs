//! Matrix products of which a row has the same bits whoever else is there: what decoding is made of.
//!
//! Few rows meet large weights, so the time goes into reading the weights, each once from main memory: with a handful of
//! rows a task runs along a few rows of the weight at a time, wide enough for memory to keep up; with more, along all of
//! the depth of a narrow panel, which then stays in the cache for the other rows.
//!
//! An element is one chain of fused multiply-adds in the order of the depth (or, against rows of the weight, sixteen chains
//! and a fixed tree), so neither threads, nor the shape of a tile, nor the width of the processor's vectors change a bit.

use rayon::prelude::*;

use super::decode::{GROUP, Layout, WithLayout, decode, with_layout};
use super::elementwise;
use super::vector::{self, Sixteen, Vector, Wide, prefetch};
use crate::terms::format::Format;

/// Up to so many rows a product is bound by memory.
const FEW: usize = 16;

/// Rows of the weight that are read together, and how wide they are at most, where rows are few.
const STREAM: (usize, usize) = (16, 1536);

/// The same where they are more: a piece of the weight that fits the second cache.
const PANEL: (usize, usize) = (768, 192);

/// Rows of a transposed weight that one task takes: whole tiles.
const STRIP: usize = 144;

/// Up to so many rows an encoded weight is decoded in registers.
const IN_REGISTERS: usize = 4;

/// Where they are more, rows of the weight that are decoded together: with few rows they stay in the first cache until they are
/// multiplied, with many in the second one, so that the others are read less often.
const DECODED: (usize, usize) = (12, 48);

/// How far ahead of the first rows a transposed weight is asked for, at least: what is read while memory answers.
const AHEAD: usize = 2048;

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
    let a = &interleave(a, depth, vector::run(TileRows));
    parts.into_par_iter().for_each(|(start, end)| {
        vector::run(Panel { a, weight, depth, at_once, start, end, out: shared });
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
        vector::run(Dots { a, weight: &weight[start * depth..end * depth], depth, start, end, out: shared });
    });
    out
}

/// [`product_transposed`] with a weight of a format, decoded on the way: the bits that the decoded one gives.
pub(crate) fn product_encoded(a: &[f32], format: Format, bytes: &[u8], depth: usize) -> Vec<f32> {
    let row = format.bytes(depth).expect("a row is a number of blocks");
    assert!(depth > 0 && a.len().is_multiple_of(depth) && bytes.len().is_multiple_of(row), "sizes of a product");
    let (rows, columns) = (a.len() / depth, bytes.len() / row);
    let mut out = vec![0.0; rows * columns];
    let shared = Shared { data: out.as_mut_ptr(), stride: columns, rows };
    cut(columns, STRIP, 4).into_par_iter().for_each(|(start, end)| {
        let bytes = &bytes[start * row..end * row];
        if rows <= IN_REGISTERS && depth.is_multiple_of(GROUP) {
            with_layout(format, EncodedDots { a, bytes, depth, start, out: shared });
            return;
        }
        let at_once = if rows <= FEW { DECODED.0 } else { DECODED.1 };
        let mut part = vec![0.0; at_once.min(end - start) * depth];
        for (i, bytes) in bytes.chunks(at_once * row).enumerate() {
            let start = start + i * at_once;
            let end = end.min(start + at_once);
            let weight = &mut part[..(end - start) * depth];
            decode(format, bytes, weight);
            vector::run(Dots { a, weight, depth, start, end, out: shared });
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

/// Rows of the largest tile of [`product`], by the number of registers.
struct TileRows;

impl Wide for TileRows {
    type Output = usize;

    #[inline(always)]
    fn run<V: Vector>(self) -> usize {
        if V::LANES == 16 { 8 } else { 4 }
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
    let tiles = a.par_chunks(largest * depth).zip(out.par_chunks_mut(largest * depth));
    tiles.for_each(|(mut from, mut to)| {
        while !from.is_empty() {
            let rows = tile_rows(from.len() / depth, largest);
            let (tile, behind) = from.split_at(rows * depth);
            let (place, free) = to.split_at_mut(rows * depth);
            for (k, place) in place.chunks_exact_mut(rows).enumerate() {
                place.iter_mut().enumerate().for_each(|(r, place)| *place = tile[r * depth + k]);
            }
            (from, to) = (behind, free);
        }
    });
    out
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

/// Columns `start..end` of a product, `at_once` rows of the weight at a time. Nobody else uses these columns of `out`.
struct Panel<'a> {
    /// [Interleaved](interleave).
    a: &'a [f32],
    weight: &'a [f32],
    depth: usize,
    at_once: usize,
    start: usize,
    end: usize,
    out: Shared,
}

impl Wide for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        // SAFETY: the columns are this panel's own.
        unsafe { if V::LANES == 16 { panel_by::<V, 8, 3>(&self) } else { panel_by::<V, 4, 3>(&self) } }
    }
}

/// One panel, by tiles of up to `R` rows and `C` vectors of columns.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn panel_by<V: Vector, const R: usize, const C: usize>(panel: &Panel<'_>) {
    for from in (0..panel.depth).step_by(panel.at_once) {
        let depth = panel.at_once.min(panel.depth - from);
        let mut column = panel.start;
        while column < panel.end {
            // SAFETY: the caller's promise.
            column += unsafe {
                match panel.end - column {
                    left if left >= C * V::LANES => strip::<V, R, C>(panel, from, depth, column),
                    left if left >= V::LANES => strip::<V, R, 1>(panel, from, depth, column),
                    _ => strip::<f32, R, 1>(panel, from, depth, column),
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
    column: usize,
) -> usize {
    let out = panel.out;
    let weight = &panel.weight[from * out.stride + column..];
    // What this task reads next, asked for while it works: the rows of the weight behind these, or where rows of the batch
    // are more, and memory has time enough, the columns beside these.
    let (asks, ahead) = if out.rows <= FEW { (0, depth * out.stride) } else { (R, C * V::LANES) };
    let mut row = 0;
    while row < out.rows {
        let ahead = (row == asks).then_some(ahead);
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
    ahead: Option<usize>,
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
            if let Some(ahead) = ahead {
                for line in (0..C * V::LANES).step_by(16) {
                    prefetch(w.wrapping_add(ahead + line));
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

/// Products with rows `start..end` of a transposed weight, those that are given. Nobody else uses these columns of `out`.
struct Dots<'a> {
    a: &'a [f32],
    weight: &'a [f32],
    depth: usize,
    start: usize,
    end: usize,
    out: Shared,
}

impl Wide for Dots<'_> {
    type Output = ();

    /// By tiles of up to sixteen sums: as many as [`Vector::totals`] adds up at once, and as square as registers allow.
    #[inline(always)]
    fn run<V: Vector>(self) {
        // SAFETY: the columns are this task's own.
        unsafe {
            match (V::LANES, self.out.rows) {
                (LANES, 8..) => dots_by::<V, 8, 2>(&self),
                (LANES, 4..) => dots_by::<V, 4, 4>(&self),
                (LANES, 2..) => dots_by::<V, 2, 8>(&self),
                (LANES, _) => dots_by::<V, 1, 16>(&self),
                (_, 4..) => dots_by::<V, 4, 3>(&self),
                _ => dots_by::<V::Sixteen, 2, 2>(&self),
            }
        }
    }
}

/// Tiles of up to `R` rows and `C` columns.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn dots_by<V: Vector, const R: usize, const C: usize>(task: &Dots<'_>) {
    let mut row = 0;
    while row < task.out.rows {
        // SAFETY: the caller's promise.
        row += unsafe {
            match task.out.rows - row {
                left if left >= R => dots_of_rows::<V, R, C>(task, row),
                4.. => dots_of_rows::<V, 4, C>(task, row),
                2.. => dots_of_rows::<V, 2, C>(task, row),
                _ => dots_of_rows::<V, 1, C>(task, row),
            }
        };
    }
}

/// All columns of a task for `R` rows, which then stay in the first cache. Gives `R`.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn dots_of_rows<V: Vector, const R: usize, const C: usize>(task: &Dots<'_>, row: usize) -> usize {
    let whole = task.start + (task.end - task.start) / C * C;
    // SAFETY: the caller's promise.
    unsafe {
        (task.start..whole).step_by(C).for_each(|column| dots::<V, R, C>(task, row, column));
        (whole..task.end).for_each(|column| dots::<V, R, 1>(task, row, column));
    }
    R
}

/// Products of `R` rows with `C` rows of the weight, at most sixteen. Where a vector has half of the lanes, they are summed up
/// in two passes: so there are registers for larger tiles.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn dots<V: Vector, const R: usize, const C: usize>(task: &Dots<'_>, row: usize, column: usize) {
    let depth = task.depth;
    let a: [&[f32]; R] = std::array::from_fn(|r| &task.a[(row + r) * depth..][..depth]);
    let w: [&[f32]; C] = std::array::from_fn(|c| &task.weight[(column - task.start + c) * depth..][..depth]);
    let ahead = AHEAD.max(C * depth);
    let ahead = (row == 0 && (column + C) * depth + ahead <= task.end * depth).then_some(ahead);
    let mut sums = lane_sums::<V, R, C>(a, w, 0, ahead);
    if V::LANES < LANES {
        let upper = lane_sums::<V, R, C>(a, w, V::LANES, None);
        sums = std::array::from_fn(|r| std::array::from_fn(|c| sums[r][c].plus(upper[r][c])));
    }
    let zero = V::splat(0.0);
    let totals = V::totals(std::array::from_fn(|i| if i < R * C { sums[i / C][i % C] } else { zero }));
    for (r, totals) in totals.chunks_exact(C).take(R).enumerate() {
        // SAFETY: the caller's promise.
        unsafe { task.out.row(row + r, column, column + C) }.copy_from_slice(totals);
    }
}

/// Of the products of rows of one length those summands that belong to [`Vector::LANES`] of the [`LANES`], from `first` on.
/// `ahead` is how far ahead the weight is asked for.
#[inline(always)]
fn lane_sums<V: Vector, const R: usize, const C: usize>(
    a: [&[f32]; R],
    w: [&[f32]; C],
    first: usize,
    ahead: Option<usize>,
) -> [[V; C]; R] {
    let depth = a[0].len();
    let whole = depth / LANES * LANES;
    let mut sums = [[V::splat(0.0); C]; R];
    if R == 1 {
        // One row of the weight after the other, as they lie: memory is what this waits for.
        for (c, w) in w.iter().enumerate() {
            for k in (first..whole).step_by(LANES) {
                if let Some(ahead) = ahead {
                    prefetch(w.as_ptr().wrapping_add(k + ahead));
                }
                // SAFETY: from `k - first`, a multiple of `LANES`, so many are within `depth`, the length of both.
                unsafe {
                    let (a, w) = (V::load(a[0].as_ptr().add(k)), V::load(w.as_ptr().add(k)));
                    sums[0][c] = a.fused(w, sums[0][c]);
                }
            }
        }
    } else {
        for k in (first..whole).step_by(LANES) {
            if let Some(ahead) = ahead {
                w.iter().for_each(|w| prefetch(w.as_ptr().wrapping_add(k + ahead)));
            }
            // SAFETY: as above, for all of them.
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
    }
    let rest = (whole + first).min(depth)..(whole + first + V::LANES).min(depth);
    if !rest.is_empty() {
        let w: [V; C] = std::array::from_fn(|c| V::part(&w[c][rest.clone()]));
        for (sums, a) in sums.iter_mut().zip(&a) {
            let a = V::part(&a[rest.clone()]);
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = a.fused(w, *sum);
            }
        }
    }
    sums
}

/// The same with rows of a weight in blocks, for few rows: a group of numbers is decoded in registers for all of them.
struct EncodedDots<'a> {
    a: &'a [f32],
    bytes: &'a [u8],
    depth: usize,
    start: usize,
    out: Shared,
}

impl WithLayout for EncodedDots<'_> {
    #[inline(always)]
    fn run<L: Layout, V: Vector>(self) {
        let mut row = 0;
        while row < self.out.rows {
            // SAFETY: the columns are this task's own.
            row += unsafe {
                match self.out.rows - row {
                    4.. => encoded_dots::<L, V::Sixteen, 4>(&self, row),
                    2.. => encoded_dots::<L, V::Sixteen, 2>(&self, row),
                    _ => encoded_dots::<L, V::Sixteen, 1>(&self, row),
                }
            };
        }
    }
}

/// All columns of a task for `R` rows, of which the sums fit the registers beside what decoding needs. Gives `R`.
///
/// # Safety
///
/// Nobody else may use these columns of `out`.
#[inline(always)]
unsafe fn encoded_dots<L: Layout, V: Sixteen, const R: usize>(task: &EncodedDots<'_>, row: usize) -> usize {
    let depth = task.depth;
    let a: [&[f32]; R] = std::array::from_fn(|r| &task.a[(row + r) * depth..][..depth]);
    for (i, w) in task.bytes.chunks_exact(depth / L::NUMBERS * L::BYTES).enumerate() {
        let mut sums = [V::splat(0.0); R];
        for (i, block) in w.chunks_exact(L::BYTES).enumerate() {
            let scales = L::scales(block);
            let a: [&[f32]; R] = std::array::from_fn(|r| &a[r][i * L::NUMBERS..][..L::NUMBERS]);
            for group in 0..L::NUMBERS / GROUP {
                let w = L::group(block, &scales, group);
                for (sum, a) in sums.iter_mut().zip(&a) {
                    *sum = V::of(&a[group * GROUP..]).fused(w, *sum);
                }
            }
        }
        let column = task.start + i;
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            let out = unsafe { task.out.row(row + r, column, column + 1) };
            out[0] = sum.total();
        }
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{numbers, with_threads, written};

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
    fn an_encoded_weight_gives_the_bits_of_the_decoded_one() {
        for format in Format::ALL {
            // Rows that fill no group of numbers, where a format has no blocks.
            let odd = (!format.is_quantised()).then_some((37, 20));
            for (k, n) in [(256, 1), (256, 130), (768, 33)].into_iter().chain(odd) {
                let (bytes, _) = written(format, numbers(2, k * n));
                let mut decoded = vec![0.0; k * n];
                decode(format, &bytes, &mut decoded);
                for rows in [1, 2, 3, 4, 5, 7, 17] {
                    let a = numbers(1, rows * k);
                    let expected = product_transposed(&a, &decoded, k);
                    let found = product_encoded(&a, format, &bytes, k);
                    assert!(found == expected, "{format}, {rows} rows, {k} {n}");
                    assert!(found == with_threads(3, || product_encoded(&a, format, &bytes, k)), "{format}: threads");
                    if rows <= IN_REGISTERS && k.is_multiple_of(GROUP) {
                        let mut out = vec![0.0; rows * n];
                        let shared = Shared { data: out.as_mut_ptr(), stride: n, rows };
                        let dots = EncodedDots { a: &a, bytes: &bytes, depth: k, start: 0, out: shared };
                        with_layout(format, ByArrays(dots));
                        assert!(out == expected, "{format}, {rows} rows, {k} {n}, by arrays");
                    }
                }
            }
        }
    }

    /// Work without vector instructions of its own: what the compiler makes of it.
    struct ByArrays<W>(W);

    impl<W: WithLayout> WithLayout for ByArrays<W> {
        fn run<L: Layout, V: Vector>(self) {
            self.0.run::<L, [f32; 8]>();
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
            let a_by_4 = &interleave(&a, k, 4);
            Panel { a: a_by_4, weight: &weight, depth: k, at_once: 100, start: 0, end: n, out: shared }
                .run::<[f32; 8]>();
            assert!(out == expected, "{k} {n}");
            let turned: Vec<f32> = numbers(4, n * k);
            let expected = product_transposed(&a, &turned, k);
            Dots { a: &a, weight: &turned, depth: k, start: 0, end: n, out: shared }.run::<[f32; 8]>();
            assert!(out == expected, "{k} {n} transposed");
        }
    }
}
