//! Elementary functions as polynomials without branches, so that loops over them become vector instructions, and sums
//! in a fixed number of lanes.

/// Lanes of sums: two AVX2 registers, so that two chains of additions run side by side.
pub(crate) const LANES: usize = 16;

/// `a * b + c`, rounded once where the processor has an instruction for it.
#[inline(always)]
pub(crate) fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to about one unit in the last place, for x in [-87, 88]; clamped outside.
///
/// x = k ln 2 + r with |r| <= ln(2) / 2; e^r by the polynomial of the Cephes library, 2^k through the exponent's bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4; // exact in few bits, so that k * LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let k = fused(x, std::f32::consts::LOG2_E, ROUND) - ROUND;
    let r = fused(-k, LN2_LOW, fused(-k, LN2_HIGH, x));
    let p = fused(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = fused(p, r, 8.333_452e-3);
    let p = fused(p, r, 4.166_579_6e-2);
    let p = fused(p, r, 1.666_666_5e-1);
    let p = fused(p, r, 0.5);
    let e = fused(p * r, r, r) + 1.0;
    // |k| <= 127, so the exponent stays that of a normal number. The cast is exact: k is an integer.
    e * f32::from_bits(((k as i32 + 127) << 23) as u32)
}

/// tanh x, to about 1e-7 absolute.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let e = exp(2.0 * x.clamp(-10.0, 10.0));
    (e - 1.0) / (e + 1.0)
}

/// The sum of `f(i)` for `i` in `0..count`, in a fixed order.
#[inline(always)]
pub(crate) fn sum(count: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = count / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(start + lane);
        }
    }
    for i in whole..count {
        lanes[i - whole] += f(i);
    }
    fold(lanes, |a, b| a + b)
}

/// The largest of `values`; the lowest number when there is none.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::MIN; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, *value);
    }
    fold(lanes, larger)
}

/// Halves the lanes until one is left.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        for i in -86_999..88_000 {
            let x = i as f32 * 1e-3;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 2.4e-7, "exp({x}) = {found}, expected {expected}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::MIN) < 2e-38 && exp(f32::MAX).is_finite());
    }

    #[test]
    fn tanh_is_right_to_two_parts_in_ten_million() {
        for i in -30_000..30_000 {
            let x = i as f32 * 1e-3;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 2e-7, "tanh({x})");
        }
    }

    #[test]
    fn sums_and_maxima_use_every_element() {
        for count in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..count).map(|i| i as f32 - 50.0).collect();
            assert_eq!(sum(count, |i| values[i]), values.iter().sum::<f32>());
            assert_eq!(max(&values), values.iter().copied().fold(f32::MIN, f32::max));
        }
    }
}
