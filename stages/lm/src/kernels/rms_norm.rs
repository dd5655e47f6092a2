//! Root mean square normalisation (Zhang and Sennrich, 2019): y = x / sqrt(mean(x^2) + eps) * weight, over each row.

use rayon::prelude::*;

use super::elementary::sum_of;
use super::layer_norm::Moments;
use super::{ROW_BLOCK, buffer, sum_in_order};

/// Normalises the rows of `x`; gives what [`backward`] wants: a mean of 0, and the reciprocal root mean square.
pub(crate) fn forward(x: &[f32], weight: &[f32], eps: f32) -> (Vec<f32>, Vec<Moments>) {
    let width = weight.len();
    let rows = x.len() / width;
    let scale_of = |x: &[f32]| 1.0 / (sum_of(width, |i| x[i] * x[i]) / width as f32 + eps).sqrt();
    let moments: Vec<Moments> =
        (0..rows).into_par_iter().with_min_len(ROW_BLOCK).map(|r| (0.0, scale_of(&x[r * width..][..width]))).collect();
    let out = buffer::matrix(rows, width, |r| {
        let (x, (_, scale)) = (&x[r * width..][..width], moments[r]);
        move |c| x[c] * scale * weight[c]
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
