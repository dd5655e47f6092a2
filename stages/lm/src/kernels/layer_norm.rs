//! Layer normalisation (Ba et al., 2016): y = (x - mean) / sqrt(variance + eps) * weight + bias, over each row.

use rayon::prelude::*;

use super::elementary::sum_of;
use super::{ROW_BLOCK, buffer, sum_in_order};

/// Mean and reciprocal standard deviation of a row.
pub(crate) type Moments = (f32, f32);

/// Normalises the rows of `x`; gives the moments that [`backward`] wants.
pub(crate) fn forward(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> (Vec<f32>, Vec<Moments>) {
    let width = weight.len();
    let rows = x.len() / width;
    let bias = &bias[..width];
    let moments: Vec<Moments> =
        (0..rows).into_par_iter().with_min_len(ROW_BLOCK).map(|r| moments_of(&x[r * width..][..width], eps)).collect();
    let out = buffer::matrix(rows, width, |r| {
        let (x, (mean, scale)) = (&x[r * width..][..width], moments[r]);
        move |c| (x[c] - mean) * scale * weight[c] + bias[c]
    });
    (out, moments)
}

/// Adds the gradient of `x` to `dx`; gives those of weight and bias where `parameters`.
pub(crate) fn backward(
    dx: &mut [f32],
    x: &[f32],
    weight: &[f32],
    moments: &[Moments],
    dy: &[f32],
    parameters: bool,
) -> Option<(Vec<f32>, Vec<f32>)> {
    let width = weight.len();
    let parts: Vec<(Vec<f32>, Vec<f32>)> = dx
        .par_chunks_mut(ROW_BLOCK * width)
        .zip(x.par_chunks(ROW_BLOCK * width))
        .zip(dy.par_chunks(ROW_BLOCK * width))
        .zip(moments.par_chunks(ROW_BLOCK))
        .map(|(((dx, x), dy), moments)| {
            let part = if parameters { width } else { 0 };
            let (mut dweight, mut dbias) = (vec![0.0; part], vec![0.0; part]);
            let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width));
            for (((dx, x), dy), &(mean, scale)) in rows.zip(moments) {
                // With n = (x - mean) scale and g = dy weight: dx = scale (g - mean(g) - n mean(g n)).
                let g_mean = sum_of(width, |i| dy[i] * weight[i]) / width as f32;
                let gn_mean = sum_of(width, |i| dy[i] * weight[i] * ((x[i] - mean) * scale)) / width as f32;
                for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                    let n = (x - mean) * scale;
                    *dx += scale * (dy * weight - g_mean - n * gn_mean);
                }
                for ((dweight, x), dy) in dweight.iter_mut().zip(x).zip(dy) {
                    *dweight += dy * ((x - mean) * scale);
                }
                for (dbias, dy) in dbias.iter_mut().zip(dy) {
                    *dbias += dy;
                }
            }
            (dweight, dbias)
        })
        .collect();
    parameters.then(|| {
        let (dweights, dbiases) = parts.into_iter().unzip();
        (sum_in_order(dweights), sum_in_order(dbiases))
    })
}

#[inline(always)]
fn moments_of(x: &[f32], eps: f32) -> Moments {
    let count = x.len() as f32;
    let mean = sum_of(x.len(), |i| x[i]) / count;
    let variance = sum_of(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / count;
    (mean, 1.0 / (variance + eps).sqrt())
}
