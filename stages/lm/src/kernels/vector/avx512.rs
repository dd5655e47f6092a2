//! Sixteen lanes, only used where the processor was found to have AVX-512: that is what makes the calls safe.

use std::arch::x86_64::*;

use super::{Sixteen, Vector};
use crate::kernels::bytes::Bytes;

impl Vector for __m512 {
    const LANES: usize = 16;

    type Sixteen = Self;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: the processor has AVX-512, as in what follows.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(to, self) }
    }

    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        // SAFETY: as in `splat`.
        unsafe { _mm512_fmadd_ps(self, b, c) }
    }

    #[inline(always)]
    fn plus(self, b: Self) -> Self {
        // SAFETY: as in `splat`.
        unsafe { _mm512_add_ps(self, b) }
    }

    #[inline(always)]
    fn times(self, b: Self) -> Self {
        // SAFETY: as in `splat`.
        unsafe { _mm512_mul_ps(self, b) }
    }

    /// Sixteen at once: half of what two vectors still have to add fits one.
    #[inline(always)]
    fn totals(vectors: [Self; 16]) -> [f32; 16] {
        // The order in which sums come out below; it is its own inverse.
        const REVERSED: [usize; 16] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];
        let vectors = REVERSED.map(|i| vectors[i]);
        // SAFETY: as in `splat`.
        unsafe {
            let halves: [Self; 8] = std::array::from_fn(|i| {
                let (a, b) = (vectors[i], vectors[i + 8]);
                _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
            });
            let quarters: [Self; 4] = std::array::from_fn(|i| {
                let (a, b) = (halves[i], halves[i + 4]);
                _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
            });
            let pairs: [Self; 2] = std::array::from_fn(|i| {
                let (a, b) = (quarters[i], quarters[i + 2]);
                _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(a, b), _mm512_shuffle_ps::<0b11_10_11_10>(a, b))
            });
            let [a, b] = pairs;
            let sums =
                _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b));
            let mut totals = [0.0; 16];
            sums.write(&mut totals);
            totals
        }
    }
}

impl Sixteen for __m512 {
    #[inline(always)]
    fn integers(bytes: Bytes) -> Self {
        // SAFETY: as in `splat`; `Bytes` are sixteen bytes, however they are kept.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(std::mem::transmute::<[i8; 16], __m128i>(bytes.array()))) }
    }

    #[inline(always)]
    fn halves(bytes: &[u8; 32]) -> Self {
        // SAFETY: 32 bytes are readable.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn upper_halves(bytes: &[u8; 32]) -> Self {
        // SAFETY: 32 bytes are readable.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn splat_half(bytes: [u8; 2]) -> Self {
        // SAFETY: as in `splat`.
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(bytes))) }
    }
}
