//! Vector instructions, chosen at run time: the program is compiled for AVX2, and where the processor has AVX-512 the loops
//! that cost most use that.
//!
//! What a loop computes must not depend on how wide the vectors are, so that a number has the same bits on both.

use std::sync::LazyLock;

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
    work.run::<[f32; 8]>()
}

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
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn run_avx_512<W: Wide>(work: W) -> W::Output {
    work.run::<std::arch::x86_64::__m512>()
}

/// Without fused multiply-adds everywhere else, wide vectors would round otherwise.
#[cfg(target_arch = "x86_64")]
static HAS_AVX_512: LazyLock<bool> = LazyLock::new(|| {
    let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl");
    let has = has && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq");
    has && cfg!(target_feature = "fma")
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

    /// The sum over the lanes of each vector: the upper half is added to the lower one, until one lane is left.
    #[inline(always)]
    fn totals(vectors: [Self; 16]) -> [f32; 16] {
        vectors.map(|vector| {
            let mut lanes = [0.0; MOST_LANES];
            vector.write(&mut lanes);
            let mut width = Self::LANES / 2;
            while width > 0 {
                for lane in 0..width {
                    lanes[lane] += lanes[lane + width];
                }
                width /= 2;
            }
            lanes[0]
        })
    }
}

/// Lanes of the widest vector.
const MOST_LANES: usize = 16;

impl Vector for f32 {
    const LANES: usize = 1;

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
}

/// What the compiler makes of it with the instructions that the program was compiled for.
impl<const N: usize> Vector for [f32; N] {
    const LANES: usize = N;

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
}

#[cfg(target_arch = "x86_64")]
impl Vector for std::arch::x86_64::__m512 {
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: only used where the processor was found to have AVX-512, as in what follows.
        unsafe { std::arch::x86_64::_mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_storeu_ps(to, self) }
    }

    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        // SAFETY: as in `splat`.
        unsafe { std::arch::x86_64::_mm512_fmadd_ps(self, b, c) }
    }
    /// Sixteen at once: half of what two vectors still have to add fits one.
    #[inline(always)]
    fn totals(vectors: [Self; 16]) -> [f32; 16] {
        use std::arch::x86_64::{_mm512_add_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps};
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
