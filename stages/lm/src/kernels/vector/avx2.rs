//! Eight lanes, and sixteen by two of them. The program is compiled for these instructions, else this file is not: the safety
//! of all calls is that of their pointers.

use std::arch::x86_64::*;

use super::{Sixteen, Vector};
use crate::kernels::bytes::Bytes;

impl Vector for __m256 {
    const LANES: usize = 8;

    type Sixteen = [__m256; 2];

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: the program has these instructions.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(to, self) }
    }

    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        // SAFETY: the program has these instructions.
        unsafe { _mm256_fmadd_ps(self, b, c) }
    }

    #[inline(always)]
    fn plus(self, b: Self) -> Self {
        // SAFETY: the program has these instructions.
        unsafe { _mm256_add_ps(self, b) }
    }

    #[inline(always)]
    fn times(self, b: Self) -> Self {
        // SAFETY: the program has these instructions.
        unsafe { _mm256_mul_ps(self, b) }
    }

    #[inline(always)]
    fn total(self) -> f32 {
        // SAFETY: the program has these instructions.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    /// Eight at once: half of what two vectors still have to add fits one.
    #[inline(always)]
    fn totals(vectors: [Self; 16]) -> [f32; 16] {
        let mut totals = [0.0; 16];
        let (eights, _) = vectors.as_chunks::<8>();
        for (vectors, totals) in eights.iter().zip(totals.chunks_exact_mut(8)) {
            // The order in which sums come out below, taken back.
            let vectors = [0, 4, 1, 5, 2, 6, 3, 7].map(|i| vectors[i]);
            // SAFETY: the program has these instructions.
            let sums = unsafe {
                let halves: [Self; 4] = std::array::from_fn(|i| {
                    let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
                    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
                });
                let quarters: [Self; 2] = std::array::from_fn(|i| {
                    let (a, b) = (halves[2 * i], halves[2 * i + 1]);
                    _mm256_add_ps(_mm256_shuffle_ps::<0b01_00_01_00>(a, b), _mm256_shuffle_ps::<0b11_10_11_10>(a, b))
                });
                let [a, b] = quarters;
                _mm256_add_ps(_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b))
            };
            sums.write(totals);
        }
        totals
    }
}

impl Vector for [__m256; 2] {
    const LANES: usize = 16;

    type Sixteen = Self;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        [__m256::splat(x); 2]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { [__m256::load(from), __m256::load(from.add(8))] }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            self[0].store(to);
            self[1].store(to.add(8));
        }
    }

    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        [self[0].fused(b[0], c[0]), self[1].fused(b[1], c[1])]
    }

    #[inline(always)]
    fn plus(self, b: Self) -> Self {
        [self[0].plus(b[0]), self[1].plus(b[1])]
    }

    #[inline(always)]
    fn times(self, b: Self) -> Self {
        [self[0].times(b[0]), self[1].times(b[1])]
    }

    #[inline(always)]
    fn total(self) -> f32 {
        self[0].plus(self[1]).total()
    }

    #[inline(always)]
    fn totals(vectors: [Self; 16]) -> [f32; 16] {
        __m256::totals(vectors.map(|[low, high]| low.plus(high)))
    }
}

impl Sixteen for [__m256; 2] {
    #[inline(always)]
    fn integers(bytes: Bytes) -> Self {
        let bytes = bytes.vector();
        // SAFETY: the program has these instructions.
        unsafe {
            let (low, high) = (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn halves(bytes: &[u8; 32]) -> Self {
        let from: *const __m128i = bytes.as_ptr().cast();
        // SAFETY: two times sixteen bytes are readable.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))] }
    }

    #[inline(always)]
    fn upper_halves(bytes: &[u8; 32]) -> Self {
        let from: *const __m128i = bytes.as_ptr().cast();
        // SAFETY: two times sixteen bytes are readable.
        unsafe {
            [from, from.add(1)].map(|from| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            })
        }
    }

    #[inline(always)]
    fn splat_half(bytes: [u8; 2]) -> Self {
        // SAFETY: the program has these instructions.
        unsafe { [_mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(bytes))); 2] }
    }
}
