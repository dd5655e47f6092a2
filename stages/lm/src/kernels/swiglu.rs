//! The gated linear unit with SiLU (Shazeer, "GLU variants improve transformer", 2020): silu(gate) * up, element by element.

use rayon::prelude::*;

use super::BLOCK;
use super::elementary::exp;

/// `silu(gate) * up`.
pub(crate) fn forward(gate: &[f32], up: &[f32]) -> Vec<f32> {
    assert_eq!(gate.len(), up.len(), "elements side by side");
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK)).for_each(|((out, gate), up)| {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(*gate) * up;
        }
    });
    out
}

/// Puts the gradients of `gate` and `up` in their places, given that of the result.
pub(crate) fn backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    assert_eq!((gate.len(), up.len()), (dy.len(), dy.len()), "elements side by side");
    let blocks = gate.par_chunks_mut(BLOCK).zip(up.par_chunks_mut(BLOCK)).zip(dy.par_chunks(BLOCK));
    blocks.for_each(|((gate, up), dy)| {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let s = sigmoid(*gate);
            let silu = *gate * s;
            // silu'(g) = s + g s (1 - s).
            (*gate, *up) = (dy * *up * (s + silu * (1.0 - s)), dy * silu);
        }
    });
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    // Farther out the result would be a subnormal number. A NaN passes through the comparison.
    let negated = if x < -80.0 { 80.0 } else { -x };
    1.0 / (1.0 + exp(negated))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_gates_are_open_or_shut_and_nan_is_not_hidden() {
        let y = forward(&[-1e30, -100.0, 0.0, 100.0, 1e30, f32::NAN], &[1.0, 1.0, 1.0, 3.0, 2.0, 1.0]);
        assert!(y[..2].iter().all(|y| y.abs() < 1e-4), "{y:?}");
        assert_eq!(y[2..5], [0.0, 300.0, 2e30]);
        assert!(y[5].is_nan());
    }
}
