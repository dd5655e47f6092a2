//! Causal self-attention over packed sequences: softmax(Q K^T scale) V for each sequence and head, straight from rows
//! that hold the queries of all heads, then the keys, then the values: `[N, (H + 2G) D]`.
//!
//! There are `G` heads of keys and values; with fewer than `H`, each is shared by `H / G` query heads that follow one
//! another (Ainslie et al., "GQA", 2023).
//!
//! A query may see all positions up to its own, or only a window of them (Beltagy et al., "Longformer", 2020): keys that no
//! query of a block sees are left out.
//!
//! Forward keeps nothing: backward computes the probabilities again, a block of queries at a time, so that memory grows
//! with the length of a sequence and not with its square.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::transposed;
use super::elementary::{exp, max, sum_of};
use super::masks;
use super::tile::{self, Left};
use crate::terms::dropout::Dropout;

/// Queries handled together.
const QUERIES: usize = 32;

/// Columns of scratch matrices are a multiple of this, so that products have no ragged edge.
const ALIGN: usize = 16;

/// What attention needs to know beside its input.
pub(crate) struct Attention<'a> {
    /// Where each sequence lies; together they cover all rows, in order.
    pub(crate) segments: &'a [Range<usize>],
    /// Row id of each sequence.
    pub(crate) rows: &'a [u64],
    /// Query heads `H`.
    pub(crate) heads: usize,
    /// Heads of keys and values `G`, a divisor of `H`.
    pub(crate) kv_heads: usize,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Positions that a query sees, its own and those before it; `None` is all.
    pub(crate) window: Option<usize>,
    /// Dropout of probabilities: rate, and the site of head 0; the others follow.
    pub(crate) dropout: Option<(Dropout, f32, u32)>,
}

impl Attention<'_> {
    /// Query heads that share their keys and values.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// The first position that a query at `position` sees through a window.
#[inline]
pub(crate) fn first_seen(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// The same of a block of queries from `position` on, moved back to where columns may begin.
#[inline]
pub(crate) fn first_column(position: usize, window: Option<usize>) -> usize {
    first_seen(position, window) / ALIGN * ALIGN
}

/// `[N, H D]` from `[N, (H + 2G) D]`; `width` is `H D`.
pub(crate) fn forward(qkv: &[f32], width: usize, attention: &Attention<'_>) -> Vec<f32> {
    let parts = groups(attention, |task| task.forward(qkv, width, attention));
    join(&parts, width / attention.heads, attention, attention.heads)
}

/// The gradient `[N, (H + 2G) D]` of `qkv` from that of the result, `[N, H D]`.
pub(crate) fn backward(qkv: &[f32], dy: &[f32], width: usize, attention: &Attention<'_>) -> Vec<f32> {
    let parts = groups(attention, |task| task.backward(qkv, dy, width, attention));
    join(&parts, width / attention.heads, attention, attention.heads + 2 * attention.kv_heads)
}

/// Scores of one query against keys become probabilities. Of the first `count` keys it sees those from `first` on; the
/// others, and what lies behind, become 0.
#[inline]
pub(crate) fn softmax(scores: &mut [f32], first: usize, count: usize, scale: f32) {
    let (before, scores) = scores.split_at_mut(first);
    before.fill(0.0);
    let count = count - first;
    let (scores, hidden) = scores.split_at_mut(count);
    let largest = max(scores);
    for score in scores.iter_mut() {
        *score = exp((*score - largest) * scale);
    }
    let inverse = 1.0 / sum_of(count, |i| scores[i]);
    scores.iter_mut().for_each(|score| *score *= inverse);
    hidden.fill(0.0);
}

/// The query heads of one sequence that share their keys and values.
struct Task {
    rows: Range<usize>,
    row_id: u64,
    kv_head: usize,
}

fn groups<T: Send>(attention: &Attention<'_>, work: impl Fn(Task) -> T + Sync) -> Vec<T> {
    let count = attention.segments.len() * attention.kv_heads;
    let task = |i: usize| {
        let (segment, kv_head) = (i / attention.kv_heads, i % attention.kv_heads);
        work(Task { rows: attention.segments[segment].clone(), row_id: attention.rows[segment], kv_head })
    };
    (0..count).into_par_iter().map(task).collect()
}

/// Lays the results of tasks side by side, `[N, heads D]`: each holds matrices `[T, D]`, those of its query heads first,
/// then, where `heads` counts them too, one for keys and one for values.
fn join(results: &[Vec<f32>], d: usize, attention: &Attention<'_>, heads: usize) -> Vec<f32> {
    let (kv_heads, group) = (attention.kv_heads, attention.group());
    let mut out = vec![0.0; attention.segments.iter().map(|segment| segment.len() * heads * d).sum()];
    let mut rest = out.as_mut_slice();
    let mut places = Vec::with_capacity(attention.segments.len());
    for segment in attention.segments {
        let (place, behind) = rest.split_at_mut(segment.len() * heads * d);
        places.push(place);
        rest = behind;
    }
    places.into_par_iter().enumerate().for_each(|(segment, place)| {
        let count = attention.segments[segment].len();
        for (t, row) in place.chunks_exact_mut(heads * d).enumerate() {
            for (head, piece) in row.chunks_exact_mut(d).enumerate() {
                let (task, matrix) = match head.checked_sub(attention.heads) {
                    None => (head / group, head % group),
                    Some(head) => (head % kv_heads, group + head / kv_heads),
                };
                let from = (matrix * count + t) * d;
                piece.copy_from_slice(&results[segment * kv_heads + task][from..from + d]);
            }
        }
    });
    out
}

impl Task {
    fn forward(&self, qkv: &[f32], width: usize, attention: &Attention<'_>) -> Vec<f32> {
        let d = width / attention.heads;
        let row = d * (attention.heads + 2 * attention.kv_heads);
        let count = self.rows.len();
        let stride = count.next_multiple_of(ALIGN);
        let [queries, keys, values] = self.parts(qkv, row, d, attention);
        let keys = transposed(keys, row, count, d, stride);
        let mut out = vec![0.0; attention.group() * count * d];
        let mut probabilities = vec![0.0; QUERIES.min(count) * stride];
        let mut mask = vec![0.0; if attention.dropout.is_some() { stride } else { 0 }];
        for (i, out) in out.chunks_exact_mut((count * d).max(1)).enumerate() {
            let head = self.kv_head * attention.group() + i;
            for start in (0..count).step_by(QUERIES) {
                let block = QUERIES.min(count - start);
                let seen = start + block;
                let from = first_column(start, attention.window);
                let queries = Left { data: &queries[start * row + i * d..], row, depth: 1 };
                self.probabilities(&mut probabilities, queries, &keys, start, block, d, stride, attention);
                if attention.dropout.is_some() {
                    for i in 0..block {
                        let row = &mut probabilities[i * stride..][..start + i + 1];
                        self.mask(&mut mask[..row.len()], head, start + i, attention);
                        row.iter_mut().zip(&mask).for_each(|(p, m)| *p *= m);
                    }
                }
                let left = Left { data: &probabilities[from..], row: stride, depth: 1 };
                tile::product(&mut out[start * d..], d, left, &values[from * row..], row, block, d, seen - from, false);
            }
        }
        out
    }

    fn backward(&self, qkv: &[f32], dy: &[f32], width: usize, attention: &Attention<'_>) -> Vec<f32> {
        let (d, group) = (width / attention.heads, attention.group());
        let row = d * (attention.heads + 2 * attention.kv_heads);
        let count = self.rows.len();
        let stride = count.next_multiple_of(ALIGN);
        let [queries, keys, values] = self.parts(qkv, row, d, attention);
        let transposed_keys = transposed(keys, row, count, d, stride);
        let transposed_values = transposed(values, row, count, d, stride);
        let dy = &dy[(self.rows.start * width + self.kv_head * group * d).min(dy.len())..];

        let mut out = vec![0.0; (group + 2) * count * d];
        let (dq, rest) = out.split_at_mut(group * count * d);
        let (dk, dv) = rest.split_at_mut(count * d);
        let mut p = vec![0.0; QUERIES.min(count) * stride];
        let mut dp = p.clone();
        let mut mask = vec![0.0; if attention.dropout.is_some() { stride } else { 0 }];
        for (i, dq) in dq.chunks_exact_mut((count * d).max(1)).enumerate() {
            let head = self.kv_head * group + i;
            for start in (0..count).step_by(QUERIES) {
                let block = QUERIES.min(count - start);
                let seen = start + block;
                let columns = seen.next_multiple_of(ALIGN);
                let from = first_column(start, attention.window);
                let queries = &queries[start * row + i * d..];
                let left = Left { data: queries, row, depth: 1 };
                self.probabilities(&mut p, left, &transposed_keys, start, block, d, stride, attention);
                let dy = &dy[start * width + i * d..];
                let left = Left { data: dy, row: width, depth: 1 };
                let values = &transposed_values[from..];
                tile::product(&mut dp[from..], stride, left, values, stride, block, columns - from, d, false);
                for i in 0..block {
                    let first = first_seen(start + i, attention.window);
                    let (p, hidden) = p[i * stride..][..columns].split_at_mut(start + i + 1);
                    let (dp, dhidden) = dp[i * stride..][..columns].split_at_mut(start + i + 1);
                    dp[from..first].fill(0.0);
                    let (p, dp) = (&mut p[first..], &mut dp[first..]);
                    if attention.dropout.is_some() {
                        self.mask(&mut mask[..start + i + 1], head, start + i, attention);
                        dp.iter_mut().zip(&mask[first..]).for_each(|(dp, m)| *dp *= m);
                    }
                    // Softmax: ds = p (dp - sum(p dp)).
                    let mean = sum_of(p.len(), |j| p[j] * dp[j]);
                    dp.iter_mut().zip(p.iter()).for_each(|(dp, p)| *dp = p * (*dp - mean) * attention.scale);
                    if attention.dropout.is_some() {
                        p.iter_mut().zip(&mask[first..]).for_each(|(p, m)| *p *= m);
                    }
                    hidden.fill(0.0);
                    dhidden.fill(0.0);
                }
                let (p, dp, keys, seen) = (&p[from..], &dp[from..], &keys[from * row..], seen - from);
                let left = Left { data: dp, row: stride, depth: 1 };
                tile::product(&mut dq[start * d..], d, left, keys, row, block, d, seen, false);
                let left = Left { data: dp, row: 1, depth: stride };
                tile::product(&mut dk[from * d..], d, left, queries, row, seen, d, block, true);
                let left = Left { data: p, row: 1, depth: stride };
                tile::product(&mut dv[from * d..], d, left, dy, width, seen, d, block, true);
            }
        }
        out
    }

    /// Where the queries of the first head, the keys and the values begin; their rows lie `row` apart.
    fn parts<'a>(&self, qkv: &'a [f32], row: usize, d: usize, attention: &Attention<'_>) -> [&'a [f32]; 3] {
        let keys = attention.heads + self.kv_head;
        let heads = [self.kv_head * attention.group(), keys, keys + attention.kv_heads];
        heads.map(|head| &qkv[(self.rows.start * row + head * d).min(qkv.len())..])
    }

    #[expect(clippy::too_many_arguments, reason = "sizes of one block")]
    fn probabilities(
        &self,
        out: &mut [f32],
        queries: Left<'_>,
        keys: &[f32],
        start: usize,
        block: usize,
        d: usize,
        stride: usize,
        attention: &Attention<'_>,
    ) {
        let (from, columns) = (first_column(start, attention.window), (start + block).next_multiple_of(ALIGN));
        tile::product(&mut out[from..], stride, queries, &keys[from..], stride, block, columns - from, d, false);
        for i in 0..block {
            let first = first_seen(start + i, attention.window);
            let scores = &mut out[i * stride + from..][..columns - from];
            softmax(scores, first - from, start + i + 1 - from, attention.scale);
        }
    }

    fn mask(&self, out: &mut [f32], head: usize, query: usize, attention: &Attention<'_>) {
        let (dropout, rate, site) = attention.dropout.as_ref().expect("asked for with dropout only");
        masks::fill(out, dropout, *rate, site + head as u32, self.row_id, query as u32);
    }
}
