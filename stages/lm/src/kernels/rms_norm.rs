//! Root mean square normalisation (Zhang and Sennrich, 2019): y = x / sqrt(mean(x^2) + eps) * weight, over each row.

use rayon::prelude::*;

use super::elementary::sum_of;
use super::layer_norm::Moments;
use super::{ROW_BLOCK, sum_in_order};

/// Normalises the rows of `x`; gives what [`backward`] wants: a mean of 0, and the reciprocal root mean square.
pub(crate) fn forward(x: &[f32], weight: &[f32], eps: f32) -> (Vec<f32>, Vec<Moments>) {
    let width = weight.len();
    let mut out = vec![0.0; x.len()];
    let mut moments = vec![(0.0, 0.0); x.len() / width];
    out.par_chunks_mut(ROW_BLOCK * width)
        .zip(x.par_chunks(ROW_BLOCK * width))
        .zip(moments.par_chunks_mut(ROW_BLOCK))
        .for_each(|((out, x), moments)| {
            for ((out, x), moment) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(moments) {
                let scale = 1.0 / (sum_of(width, |i| x[i] * x[i]) / width as f32 + eps).sqrt();
                for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                    *out = x * scale * weight;
                }
                *moment = (0.0, scale);
            }
        });
    (out, moments)
}

/// Adds the gradient of `x` to `dx`; gives that of the weight where `parameters`.
pub(crate) fn backward(
    dx: &mut [f32],
    x: &[f32],
    weight: &[f32],
    moments: &[Moments],
    dy: &[f32],
    parameters: bool,
) -> Option<Vec<f32>> {
    let width = weight.len();
    let parts: Vec<Vec<f32>> = dx
        .par_chunks_mut(ROW_BLOCK * width)
        .zip(x.par_chunks(ROW_BLOCK * width))
        .zip(dy.par_chunks(ROW_BLOCK * width))
        .zip(moments.par_chunks(ROW_BLOCK))
        .map(|(((dx, x), dy), moments)| {
            let mut dweight = vec![0.0; if parameters { width } else { 0 }];
            let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width));
            for (((dx, x), dy), &(_, scale)) in rows.zip(moments) {
                // With n = x scale and g = dy weight: dx = scale (g - n mean(g n)).
                let gn_mean = sum_of(width, |i| dy[i] * weight[i] * (x[i] * scale)) / width as f32;
                for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                    *dx += scale * (dy * weight - x * scale * gn_mean);
                }
                for ((dweight, x), dy) in dweight.iter_mut().zip(x).zip(dy) {
                    *dweight += dy * (x * scale);
                }
            }
            dweight
        })
        .collect();
    parameters.then(|| sum_in_order(parts))
}
