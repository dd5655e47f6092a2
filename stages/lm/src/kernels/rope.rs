//! Rotary position embedding (Su et al., "RoFormer", 2021), in place: each pair of channels of a head is turned by an
//! angle that grows with the position.
//!
//! Of the `R` channels that are turned, all of a head or the first of them, channel `i` is paired with channel `i + R / 2`,
//! as in Hugging Face checkpoints, so that both halves are runs of memory.

use rayon::prelude::*;

use super::ROW_BLOCK;

/// Which way vectors are turned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// By the angle of the position.
    Forth,
    /// Back: the inverse, and so the gradient, of [`Turn::Forth`].
    Back,
}

/// The heads that are turned: the first of each row.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) count: usize,
    /// Channels of a head.
    pub(crate) width: usize,
    /// The first `R` of them are turned.
    pub(crate) turned: usize,
}

/// Turns heads of every row of `x`, each row `width` long; the channels behind them stay as they are.
///
/// Row `p` of `table` holds `R / 2` cosines and then `R / 2` sines, of the angles of position `p`.
pub(crate) fn rotate(x: &mut [f32], width: usize, heads: Heads, table: &[f32], at: &[u32], turn: Turn) {
    let Heads { count, width: head_width, turned } = heads;
    let half = turned / 2;
    let sign = if turn == Turn::Forth { 1.0 } else { -1.0 };
    x.par_chunks_mut(ROW_BLOCK * width).zip(at.par_chunks(ROW_BLOCK)).for_each(|(x, at)| {
        for (row, position) in x.chunks_exact_mut(width).zip(at) {
            let (cosines, sines) = table[*position as usize * turned..][..turned].split_at(half);
            for head in row[..count * head_width].chunks_exact_mut(head_width) {
                let (first, second) = head[..turned].split_at_mut(half);
                for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                    let sine = sine * sign;
                    (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
                }
            }
        }
    });
}
