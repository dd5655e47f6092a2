//! One update of AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), in place.

use rayon::prelude::*;

use super::BLOCK;

/// The numbers of one update, the same for every element of a parameter.
#[derive(Clone, Copy)]
pub(crate) struct Update {
    /// What the gradient is multiplied by first: the clipping factor.
    pub(crate) scale: f32,
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    /// `1 - beta1`, rounded once.
    pub(crate) rest1: f32,
    /// `1 - beta2`, rounded once.
    pub(crate) rest2: f32,
    pub(crate) eps: f32,
    /// The weight is multiplied by this: `1 - rate * decay`.
    pub(crate) keep: f32,
    /// `rate / (1 - beta1^k)`.
    pub(crate) step: f32,
    /// `1 / sqrt(1 - beta2^k)`.
    pub(crate) correction: f32,
}

/// Updates `weights` and both moments from `gradient`.
pub(crate) fn update(weights: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], u: Update) {
    let blocks = weights.par_chunks_mut(BLOCK).zip(first.par_chunks_mut(BLOCK)).zip(second.par_chunks_mut(BLOCK));
    blocks.zip(gradient.par_chunks(BLOCK)).for_each(|(((weights, first), second), gradient)| {
        let elements = weights.iter_mut().zip(first).zip(second).zip(gradient);
        for (((weight, first), second), gradient) in elements {
            let g = gradient * u.scale;
            *first = u.beta1 * *first + u.rest1 * g;
            *second = u.beta2 * *second + u.rest2 * g * g;
            *weight = *weight * u.keep - u.step * *first / (second.sqrt() * u.correction + u.eps);
        }
    });
}
