//! Rotary position embedding (Su et al., "RoFormer", 2021), in place: each pair of channels of a head is turned by an
//! angle that grows with the position.
//!
//! Channel `i` is paired with channel `i + D / 2`, as in Hugging Face checkpoints, so that both halves of a head are
//! runs of memory.

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

/// Turns the first `heads` heads of every row of `x`, each row `width` long; the channels behind them stay as they are.
///
/// Row `p` of `table` holds `D / 2` cosines and then `D / 2` sines, of the angles of position `p`.
pub(crate) fn rotate(
    x: &mut [f32],
    width: usize,
    heads: usize,
    head_width: usize,
    table: &[f32],
    at: &[u32],
    turn: Turn,
) {
    let half = head_width / 2;
    let sign = if turn == Turn::Forth { 1.0 } else { -1.0 };
    x.par_chunks_mut(ROW_BLOCK * width).zip(at.par_chunks(ROW_BLOCK)).for_each(|(x, at)| {
        for (row, position) in x.chunks_exact_mut(width).zip(at) {
            let (cosines, sines) = table[*position as usize * head_width..][..head_width].split_at(half);
            for head in row[..heads * head_width].chunks_exact_mut(head_width) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                    let sine = sine * sign;
                    (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
                }
            }
        }
    });
}
