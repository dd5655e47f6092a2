//! Sixteen bytes at once: what small integers are taken out of.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Sixteen bytes, each an integer of eight bits, with or without a sign.
#[derive(Clone, Copy)]
pub(super) struct Bytes(Inner);

#[cfg(all(target_arch = "x86_64", target_feature = "ssse3"))]
type Inner = __m128i;
#[cfg(not(all(target_arch = "x86_64", target_feature = "ssse3")))]
type Inner = [u8; 16];

#[cfg(all(target_arch = "x86_64", target_feature = "ssse3"))]
impl Bytes {
    #[inline(always)]
    pub(super) fn of(bytes: &[u8; 16]) -> Self {
        // SAFETY: sixteen bytes are readable, at any address; the program is compiled for these instructions, as for all below.
        Bytes(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }

    /// Of every byte the bits of `mask`, once it is shifted down by so many. Those above its highest bit must not be asked for.
    #[inline(always)]
    pub(super) fn field(self, shift: usize, mask: u8) -> Self {
        // SAFETY: as in `of`. What is shifted in from the byte above is not in the mask.
        Bytes(unsafe {
            let shifted = _mm_srl_epi16(self.0, _mm_cvtsi32_si128(shift as i32));
            _mm_and_si128(shifted, _mm_set1_epi8(mask as i8))
        })
    }

    /// `self + 2^shift high`, for bytes that have no bit in common and of which none overflows.
    #[inline(always)]
    pub(super) fn with(self, high: Self, shift: usize) -> Self {
        // SAFETY: as in `of`.
        Bytes(unsafe { _mm_or_si128(self.0, _mm_sll_epi16(high.0, _mm_cvtsi32_si128(shift as i32))) })
    }

    #[inline(always)]
    pub(super) fn minus(self, subtrahend: i8) -> Self {
        // SAFETY: as in `of`.
        Bytes(unsafe { _mm_sub_epi8(self.0, _mm_set1_epi8(subtrahend)) })
    }

    /// 1 where a bit is set, the lowest first.
    #[inline(always)]
    pub(super) fn bits(bits: u16) -> Self {
        // SAFETY: as in `of`.
        Bytes(unsafe {
            let place = _mm_set_epi8(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
            let bytes = _mm_shuffle_epi8(_mm_cvtsi32_si128(i32::from(bits)), place);
            let own = _mm_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(bytes, own), own), _mm_set1_epi8(1))
        })
    }

    /// As the processor has them.
    #[inline(always)]
    pub(super) fn vector(self) -> __m128i {
        self.0
    }
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "ssse3")))]
impl Bytes {
    #[inline(always)]
    pub(super) fn of(bytes: &[u8; 16]) -> Self {
        Bytes(*bytes)
    }

    /// Of every byte the bits of `mask`, once it is shifted down by so many. Those above its highest bit must not be asked for.
    #[inline(always)]
    pub(super) fn field(self, shift: usize, mask: u8) -> Self {
        Bytes(self.0.map(|byte| byte >> shift & mask))
    }

    /// `self + 2^shift high`, for bytes that have no bit in common and of which none overflows.
    #[inline(always)]
    pub(super) fn with(self, high: Self, shift: usize) -> Self {
        Bytes(std::array::from_fn(|i| self.0[i] | high.0[i] << shift))
    }

    #[inline(always)]
    pub(super) fn minus(self, subtrahend: i8) -> Self {
        Bytes(self.0.map(|byte| byte.wrapping_sub(subtrahend as u8)))
    }

    /// 1 where a bit is set, the lowest first.
    #[inline(always)]
    pub(super) fn bits(bits: u16) -> Self {
        Bytes(std::array::from_fn(|i| (bits >> i & 1) as u8))
    }
}

impl Bytes {
    #[inline(always)]
    pub(super) fn of_words(words: [u32; 4]) -> Self {
        let mut bytes = [0; 16];
        bytes.chunks_exact_mut(4).zip(words).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_le_bytes()));
        Bytes::of(&bytes)
    }

    #[inline(always)]
    pub(super) fn array(self) -> [i8; 16] {
        // SAFETY: sixteen bytes either way, of which any bits are a number.
        unsafe { std::mem::transmute(self.0) }
    }
}
