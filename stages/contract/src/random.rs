//! Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A draw is a pure function of what it is for: the stage's seed, a constant purpose, the epoch or update, the row and
//! the position. So a row's draw changes neither with the batch it is in, nor with resumption, nor with threads.

/// Purposes, so that two uses of one seed never share numbers. A constant is never given to another use.
pub mod purpose {
    /// Order of rows in an epoch.
    pub const SHUFFLE: u32 = 1;
    /// Sampling of response tokens in training.
    pub const GENERATE: u32 = 2;
    /// Sampling of response tokens in evaluation.
    pub const EVALUATE: u32 = 3;
    /// Initial weights.
    pub const INIT: u32 = 4;
    /// Initial soft prompt.
    pub const PROMPT_INIT: u32 = 5;
    /// The built-in corpus.
    pub const CORPUS: u32 = 6;
    /// Resampled rows of an interval.
    pub const BOOTSTRAP: u32 = 7;
    /// Initial weights of low-rank adapters.
    pub const LORA: u32 = 8;
    /// Which rows are answered anew.
    pub const ON_POLICY: u32 = 9;
    /// Responses that a teacher writes.
    pub const TEACH: u32 = 10;
    /// Order of rollouts in a pass over them.
    pub const PASS: u32 = 11;
    /// Which text a round learns from.
    pub const MIX: u32 = 12;
    /// Which responses are taken out of a replay buffer.
    pub const REPLAY: u32 = 13;
    /// Initial maps between hidden states.
    pub const PROJECTION: u32 = 14;
    /// Persona lines of a dataset.
    pub const PERSONA: u32 = 0x40;
    /// Dropout of a student.
    pub const DROPOUT: u32 = 0x100;
    /// Dropout of a teacher.
    pub const TEACHER_DROPOUT: u32 = 0x10_000;
}

/// Four independent 32-bit words for a counter under a key. `counter` is, by custom, `[position, row, time, purpose]`.
#[inline]
pub fn philox(seed: u64, counter: [u32; 4]) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        let (p0, p1) = (M0 * u64::from(c0), M1 * u64::from(c2));
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// A number in [0, 1) from the upper 24 bits of a word: every value is exact in f32.
#[inline]
pub fn uniform(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Two independent standard normal numbers from two words (Box and Muller, 1958).
#[inline]
pub fn normal(a: u32, b: u32) -> (f32, f32) {
    // 1 - uniform lies in (0, 1], so that the logarithm is finite.
    let radius = (-2.0 * f64::from(1.0 - uniform(a)).ln()).sqrt();
    let angle = std::f64::consts::TAU * f64::from(uniform(b));
    ((radius * angle.cos()) as f32, (radius * angle.sin()) as f32)
}

/// A number below `bound`, which must not be 0, without noticeable bias (multiply and shift over 64 bits).
#[inline]
pub fn below(high: u32, low: u32, bound: u64) -> u64 {
    let word = (u64::from(high) << 32) | u64::from(low);
    ((u128::from(word) * u128::from(bound)) >> 64) as u64
}

/// A permutation of `0..count` for `(seed, purpose, time)` (Fisher and Yates).
pub fn permutation(count: usize, seed: u64, purpose: u32, time: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for i in (1..count).rev() {
        let [a, b, ..] = philox(seed, [i as u32, (i as u64 >> 32) as u32, time, purpose]);
        order.swap(i, below(a, b, i as u64 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_its_authors() {
        assert_eq!(philox(0, [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox(u64::MAX, [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let key = 0x299f_31d0_a409_3822;
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(key, counter), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn a_permutation_holds_every_index_once_and_depends_on_the_epoch() {
        let first = permutation(1000, 7, purpose::SHUFFLE, 0);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..1000));
        assert_ne!(first, permutation(1000, 7, purpose::SHUFFLE, 1));
        assert_eq!(first, permutation(1000, 7, purpose::SHUFFLE, 0));
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let numbers: Vec<f64> = (0..50_000)
            .flat_map(|i| {
                let [a, b, ..] = philox(1, [i, 0, 0, 0]);
                let (x, y) = normal(a, b);
                [f64::from(x), f64::from(y)]
            })
            .collect();
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / numbers.len() as f64;
        assert!(mean.abs() < 0.01, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
    }
}
