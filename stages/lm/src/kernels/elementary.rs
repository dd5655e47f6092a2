//! Exponential, hyperbolic tangent, logarithm and sums, written so that loops over slices become vector code.
//!
//! No branch and no call inside: on a target with AVX2 and FMA the compiler turns a loop over these into eight lanes.
//! A NaN that goes in comes out, so that a broken model is never hidden.

/// Sums are taken over blocks of this many elements in f32, and over blocks in f64: short enough to stay in the first
/// cache and for rounding not to build up over a large vocabulary.
pub(crate) const BLOCK: usize = 512;

/// Below this the exponential is exactly 0: what would be a subnormal number costs time and carries no information.
const SMALLEST: f32 = -87.0;

/// Partial sums that a vector loop keeps.
const LANES: usize = 16;

/// ln 2 in two parts; the first, 355 / 512, has few bits, so that its product with an exponent is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// Euler's number to the power of `x`, for `x` up to 88; 0 below -87. Within 2 units in the last place.
///
/// `x = k ln 2 + r` with an integer `k` and `|r| <= ln 2 / 2`; the series of `e^r` to degree 7 leaves less than half a
/// unit, and `2^k` is written straight into the exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < SMALLEST { SMALLEST } else { x };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let k = shifted - ROUND;
    let r = k.mul_add(-LN_2_LOW, k.mul_add(-LN_2_HIGH, clamped));
    let series = (1.0_f32 / 5040.0)
        .mul_add(r, 1.0 / 720.0)
        .mul_add(r, 1.0 / 120.0)
        .mul_add(r, 1.0 / 24.0)
        .mul_add(r, 1.0 / 6.0)
        .mul_add(r, 0.5)
        .mul_add(r, 1.0)
        .mul_add(r, 1.0);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < SMALLEST { 0.0 } else { series * power }
}

/// Natural logarithm of a positive normal number. Within 2 units in the last place.
///
/// `x = 2^k m` with `m` around 1, and `ln m = 2 artanh((m - 1) / (m + 1))` as a series.
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    /// Bits of sqrt(1/2): `m` lies between this and twice this.
    const HALF_ROOT: u32 = 0x3f35_04f3;
    let offset = x.to_bits().wrapping_sub(HALF_ROOT);
    let k = (offset as i32 >> 23) as f32;
    let m = f32::from_bits((offset & 0x007f_ffff).wrapping_add(HALF_ROOT));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let tail = (2.0_f32 / 9.0).mul_add(z, 2.0 / 7.0).mul_add(z, 2.0 / 5.0).mul_add(z, 2.0 / 3.0) * z;
    // 2 s = (m - 1) - s (m - 1), and m - 1 is exact: less is lost than in 2 s itself.
    let series = s.mul_add(tail, -(s * (m - 1.0))) + (m - 1.0);
    let logarithm = k.mul_add(LN_2_HIGH, k.mul_add(LN_2_LOW, series));
    // The bits of a NaN would pass for a number.
    if x.is_nan() { x } else { logarithm }
}

/// Sum of one block, in an order that does not depend on the machine.
#[inline(always)]
pub(crate) fn sum(block: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = block.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// `a * b + c`, rounded once where the processor has an instruction for it.
#[inline(always)]
pub(crate) fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

/// Hyperbolic tangent, within 2e-7.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let e = exp(2.0 * x.clamp(-10.0, 10.0));
    (e - 1.0) / (e + 1.0)
}

/// Sum of `f(i)` for `i` in `0..count`, in an order that does not depend on the machine.
#[inline(always)]
pub(crate) fn sum_of(count: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = count / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(start + lane);
        }
    }
    for i in whole..count {
        lanes[i - whole] += f(i);
    }
    // Halving the lanes keeps additions side by side.
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest element; negative infinity where there is none. NaN is passed over.
#[inline(always)]
pub(crate) fn max(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *x);
        }
    }
    lanes.into_iter().fold(rest, larger)
}

/// Whether all numbers are finite.
#[inline(always)]
pub(crate) fn all_finite(row: &[f32]) -> bool {
    // Zero times a finite number is zero; times another it is not a number.
    let mut lanes = [0.0_f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|x| x * 0.0).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * 0.0;
        }
    }
    lanes.iter().sum::<f32>() + rest == 0.0
}

/// Sum of `exp((x - max) * scale)` over one block, the shifted exponentials being at most 1.
#[inline(always)]
pub(crate) fn sum_exp_block(block: &[f32], max: f32, scale: f32) -> f32 {
    let mut exponentials = [0.0_f32; BLOCK];
    let exponentials = &mut exponentials[..block.len()];
    for (e, x) in exponentials.iter_mut().zip(block) {
        *e = exp((x - max) * scale);
    }
    sum(exponentials)
}

/// What turns logits into log-probabilities: `(x - max) * scale - log_sum`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normaliser {
    pub(crate) max: f32,
    pub(crate) scale: f32,
    pub(crate) log_sum: f32,
}

impl Normaliser {
    /// Of the softmax of `logits * scale`. Keeping the maximum apart keeps the digits that large logits would cost.
    pub(crate) fn of(logits: &[f32], scale: f32) -> Self {
        let max = max(logits);
        let sum: f64 = logits.chunks(BLOCK).map(|block| f64::from(sum_exp_block(block, max, scale))).sum();
        Normaliser { max, scale, log_sum: sum.ln() as f32 }
    }

    /// Log-probability of a token, at least -10^4: a logit of negative infinity then weighs nothing and breaks nothing.
    #[inline(always)]
    pub(crate) fn log_probability(self, logit: f32) -> f32 {
        let log = (logit - self.max) * self.scale - self.log_sum;
        if log < LOG_FLOOR { LOG_FLOOR } else { log }
    }
}

/// Least log-probability.
pub(crate) const LOG_FLOOR: f32 = -1e4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        for i in 0..200_000 {
            let x = -87.0 + i as f32 * (87.0 + 20.0) / 200_000.0;
            let right = f64::from(x).exp();
            let error = (f64::from(exp(x)) - right).abs() / right;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_right_to_two_parts_in_ten_million() {
        for i in -30_000..30_000 {
            let x = i as f32 * 1e-3;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 2e-7, "tanh({x})");
        }
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn sums_use_every_element() {
        for count in [0, 1, 15, 16, 17, 100] {
            assert_eq!(sum_of(count, |i| i as f32 - 50.0), (0..count).map(|i| i as f32 - 50.0).sum::<f32>());
        }
    }

    #[test]
    fn ln_is_right_to_two_units_in_the_last_place() {
        let mut x = f32::MIN_POSITIVE;
        while x < 1e38 {
            let right = f64::from(x).ln();
            let error = (f64::from(ln(x)) - right).abs();
            assert!(error <= 2.0 * f64::from(f32::EPSILON) * right.abs(), "ln({x:e}) is off by {error:e}");
            x *= 1.000_37;
        }
        for near in [1.0 - 1e-4, 1.0 - f32::EPSILON, 1.0 + f32::EPSILON, 1.0 + 1e-5] {
            let right = f64::from(near).ln();
            assert!((f64::from(ln(near)) / right - 1.0).abs() < 2.0 * f64::from(f32::EPSILON), "ln({near})");
        }
        assert_eq!(ln(1.0), 0.0);
        assert!(ln(f32::NAN).is_nan());
    }

    #[test]
    fn log_probabilities_add_up_to_one_and_survive_infinite_logits() {
        for length in [1, 15, 16, 17, 511, 513, 5000] {
            let mut logits: Vec<f32> = (0..length).map(|i| ((i * 37) % 101) as f32 * 0.3 + 1000.0).collect();
            if length > 1 {
                logits[length / 2] = f32::NEG_INFINITY;
            }
            let normaliser = Normaliser::of(&logits, 0.5);
            let total: f64 = logits.iter().map(|&x| f64::from(normaliser.log_probability(x)).exp()).sum();
            assert!((total - 1.0).abs() < 1e-6, "{length} logits add up to {total}");
        }
    }

    #[test]
    fn one_number_that_is_not_finite_is_found_anywhere() {
        for length in [1, 15, 16, 17, 40] {
            let mut row: Vec<f32> = (0..length).map(|i| i as f32 - 7.0).collect();
            assert!(all_finite(&row));
            for place in 0..length {
                for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let finite = std::mem::replace(&mut row[place], broken);
                    assert!(!all_finite(&row), "{broken} at {place} of {length}");
                    row[place] = finite;
                }
            }
        }
        assert!(all_finite(&[]) && all_finite(&[f32::MAX, f32::MIN, -0.0]));
    }

    #[test]
    fn a_nan_is_not_hidden() {
        let normaliser = Normaliser::of(&[0.0, f32::NAN, 1.0], 1.0);
        assert!(normaliser.log_probability(0.0).is_nan());
    }
}
