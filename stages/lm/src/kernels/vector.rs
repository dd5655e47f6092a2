//! Vector instructions, chosen at run time: the program is compiled for AVX2, and where the processor has AVX-512 the loops
//! that cost most use that.
//!
//! What a loop computes must not depend on how wide the vectors are, so that a number has the same bits on both.

#[cfg(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma", target_feature = "f16c"))]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::sync::LazyLock;

use half::{bf16, f16};

use super::bytes::Bytes;
use super::elementary::fused;

/// Work that is compiled for every kind of vector.
pub(super) trait Wide {
    type Output;

    /// Must be inlined, so that it is compiled for the instructions that `V` needs.
    fn run<V: Vector>(self) -> Self::Output;
}

/// Runs `work` with the widest vectors that the processor has.
#[inline]
pub(super) fn run<W: Wide>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    if *HAS_AVX_512 {
        // SAFETY: the processor has these instructions.
        return unsafe { run_avx_512(work) };
    }
    work.run::<Usual>()
}

/// What the program was compiled for.
#[cfg(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma", target_feature = "f16c"))]
type Usual = std::arch::x86_64::__m256;
#[cfg(not(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma", target_feature = "f16c")))]
type Usual = [f32; 8];

/// The same for a loop that the compiler turns into vector instructions by itself.
#[inline(always)]
pub(super) fn widen<T>(f: impl FnOnce() -> T) -> T {
    run(Loop(f))
}

struct Loop<F>(F);

impl<T, F: FnOnce() -> T> Wide for Loop<F> {
    type Output = T;

    #[inline(always)]
    fn run<V: Vector>(self) -> T {
        (self.0)()
    }
}

/// # Safety
///
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx_512<W: Wide>(work: W) -> W::Output {
    work.run::<std::arch::x86_64::__m512>()
}

/// Without fused multiply-adds everywhere else, wide vectors would round otherwise.
#[cfg(target_arch = "x86_64")]
static HAS_AVX_512: LazyLock<bool> = LazyLock::new(|| {
    let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl");
    let has = has && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq");
    has && cfg!(all(target_feature = "fma", target_feature = "f16c"))
});

/// Asks for a cache line that will be wanted soon. The address may be any.
#[inline(always)]
pub(super) fn prefetch(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of an address that does not exist does nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Numbers that one instruction works on. Every method is inlined into code compiled for the instructions it needs.
pub(super) trait Vector: Copy {
    const LANES: usize;

    /// Sixteen lanes with the same instructions.
    type Sixteen: Sixteen;

    fn splat(x: f32) -> Self;
    /// # Safety
    ///
    /// [`Vector::LANES`] elements must be readable.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    ///
    /// [`Vector::LANES`] elements must be writable.
    unsafe fn store(self, to: *mut f32);
    /// `self * b + c`, rounded once.
    fn fused(self, b: Self, c: Self) -> Self;
    fn plus(self, b: Self) -> Self;
    fn times(self, b: Self) -> Self;

    /// The first elements of a slice.
    #[inline(always)]
    fn of(slice: &[f32]) -> Self {
        let slice = &slice[..Self::LANES];
        // SAFETY: the slice has `LANES` elements.
        unsafe { Self::load(slice.as_ptr()) }
    }

    /// What a slice of fewer elements has, and zeros.
    #[inline(always)]
    fn part(slice: &[f32]) -> Self {
        let mut lanes = [0.0; MOST_LANES];
        lanes[..slice.len()].copy_from_slice(slice);
        Self::of(&lanes)
    }

    /// Overwrites the first elements of a slice.
    #[inline(always)]
    fn write(self, slice: &mut [f32]) {
        let slice = &mut slice[..Self::LANES];
        // SAFETY: the slice has `LANES` elements.
        unsafe { self.store(slice.as_mut_ptr()) }
    }

    /// The sum over the lanes: the upper half is added to the lower one, until one lane is left.
    #[inline(always)]
    fn total(self) -> f32 {
        let mut lanes = [0.0; MOST_LANES];
        self.write(&mut lanes);
        let mut width = Self::LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// That of each vector.
    #[inline(always)]
    fn totals(vectors: [Self; 16]) -> [f32; 16] {
        vectors.map(Self::total)
    }
}

/// Vectors of sixteen lanes, for what is written in groups of so many numbers.
pub(super) trait Sixteen: Vector {
    /// Integers with a sign.
    fn integers(bytes: Bytes) -> Self;
    /// IEEE half floats.
    fn halves(bytes: &[u8; 32]) -> Self;
    /// Upper halves of f32.
    fn upper_halves(bytes: &[u8; 32]) -> Self;
    /// One half float in all lanes.
    fn splat_half(bytes: [u8; 2]) -> Self;

    /// As an array.
    #[inline(always)]
    fn lanes(self) -> [f32; 16] {
        let mut lanes = [0.0; 16];
        self.write(&mut lanes);
        lanes
    }
}

/// Lanes of the widest vector.
const MOST_LANES: usize = 16;

impl Vector for f32 {
    const LANES: usize = 1;

    type Sixteen = [f32; 16];

    #[inline(always)]
    fn splat(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { *to = self }
    }

    #[inline(always)]
    fn fused(self, b: f32, c: f32) -> f32 {
        fused(self, b, c)
    }

    #[inline(always)]
    fn plus(self, b: f32) -> f32 {
        self + b
    }

    #[inline(always)]
    fn times(self, b: f32) -> f32 {
        self * b
    }
}

/// What the compiler makes of it with the instructions that the program was compiled for.
impl<const N: usize> Vector for [f32; N] {
    const LANES: usize = N;

    type Sixteen = [f32; 16];

    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; N]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise; an array is aligned as its elements are.
        unsafe { *from.cast() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise; an array is aligned as its elements are.
        unsafe { *to.cast() = self }
    }

    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        let mut out = c;
        for i in 0..N {
            out[i] = fused(self[i], b[i], c[i]);
        }
        out
    }

    #[inline(always)]
    fn plus(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + b[i])
    }

    #[inline(always)]
    fn times(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] * b[i])
    }
}

impl Sixteen for [f32; 16] {
    #[inline(always)]
    fn integers(bytes: Bytes) -> Self {
        bytes.array().map(f32::from)
    }

    #[inline(always)]
    fn halves(bytes: &[u8; 32]) -> Self {
        std::array::from_fn(|i| f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn upper_halves(bytes: &[u8; 32]) -> Self {
        std::array::from_fn(|i| bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn splat_half(bytes: [u8; 2]) -> Self {
        [f16::from_le_bytes(bytes).to_f32(); 16]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;

    #[test]
    fn totals_are_the_same_numbers_for_every_width() {
        struct Totals(Vec<f32>);
        impl Wide for Totals {
            type Output = [f32; 16];

            #[inline(always)]
            fn run<V: Vector>(self) -> [f32; 16] {
                if V::LANES == 16 {
                    V::totals(std::array::from_fn(|i| V::of(&self.0[16 * i..])))
                } else {
                    <[f32; 16]>::totals(std::array::from_fn(|i| <[f32; 16]>::of(&self.0[16 * i..])))
                }
            }
        }
        let values = numbers(1, 256);
        let halving = |i: usize| {
            let mut lanes = values[16 * i..][..16].to_vec();
            while lanes.len() > 1 {
                let upper = lanes.split_off(lanes.len() / 2);
                lanes.iter_mut().zip(upper).for_each(|(lane, x)| *lane += x);
            }
            lanes[0]
        };
        let expected: [f32; 16] = std::array::from_fn(halving);
        assert_eq!(run(Totals(values.clone())), expected);
        assert_eq!(Totals(values.clone()).run::<[f32; 8]>(), expected);
    }
}
