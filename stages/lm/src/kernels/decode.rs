//! The numbers of a [`Format`], decoded.
//!
//! The layouts are those of ggml: a block holds its scales as half floats and then its integers, several to a byte; a K block
//! of 256 numbers has a scale (and some a minimum) for every 16 or 32 of them, in 4 or 6 bits. Each number is computed by the
//! operations of ggml in their order, so that it has the bits that other readers of the same file see.
//!
//! In every format sixteen neighbours share their scale, so that they are decoded together, into registers ([`Layout`]).

use super::bytes::Bytes;
use super::vector::{self, Sixteen, Vector, Wide};
use crate::terms::format::Format;

/// Decodes blocks that follow one another.
pub(crate) fn decode(format: Format, blocks: &[u8], out: &mut [f32]) {
    assert_eq!(format.bytes(out.len()), Some(blocks.len()), "{} numbers of {format}", out.len());
    with_layout(format, Decode { blocks, out });
}

struct Decode<'a> {
    blocks: &'a [u8],
    out: &'a mut [f32],
}

impl WithLayout for Decode<'_> {
    #[inline(always)]
    fn run<L: Layout, V: Vector>(self) {
        let blocks = self.blocks.chunks_exact(L::BYTES);
        let tail = blocks.remainder();
        let mut outs = self.out.chunks_exact_mut(L::NUMBERS);
        for (block, out) in blocks.zip(&mut outs) {
            let scales = L::scales::<V::Sixteen>(block);
            for (group, out) in out.chunks_exact_mut(GROUP).enumerate() {
                L::group(block, &scales, group).write(out);
            }
        }
        let out = outs.into_remainder();
        if !out.is_empty() {
            // Formats without blocks: one number after another, so that any number of them may be left.
            let (mut block, mut numbers) = (vec![0; L::BYTES], [0.0; GROUP]);
            block[..tail.len()].copy_from_slice(tail);
            L::group(&block, &L::scales::<V::Sixteen>(&block), 0).write(&mut numbers);
            out.copy_from_slice(&numbers[..out.len()]);
        }
    }
}

/// Numbers that are decoded together.
pub(super) const GROUP: usize = 16;

/// How numbers lie in a block. Those of a format without blocks count as blocks of one group.
///
/// A number is an integer times a scale, and in some formats something is added. Both have so few bits that the product is
/// exact: to add with one rounding or with two is the same.
pub(super) trait Layout {
    /// Bytes of a block.
    const BYTES: usize;
    /// Its numbers, a multiple of [`GROUP`].
    const NUMBERS: usize;

    /// What the groups of a block are scaled and moved by.
    type Scales<V: Sixteen>;

    /// Those of a block of [`Layout::BYTES`].
    fn scales<V: Sixteen>(block: &[u8]) -> Self::Scales<V>;

    /// Sixteen numbers of it, those from `GROUP * group` on.
    fn group<V: Sixteen>(block: &[u8], scales: &Self::Scales<V>, group: usize) -> V;
}

/// Work on blocks, compiled for each layout and for every kind of vector.
pub(super) trait WithLayout {
    /// Must be inlined, as [`Wide::run`].
    fn run<L: Layout, V: Vector>(self);
}

/// Runs `work` with the layout of a format and the widest vectors that the processor has.
pub(super) fn with_layout(format: Format, work: impl WithLayout) {
    struct As<L, W>(W, std::marker::PhantomData<L>);

    impl<L: Layout, W: WithLayout> Wide for As<L, W> {
        type Output = ();

        #[inline(always)]
        fn run<V: Vector>(self) {
            self.0.run::<L, V>();
        }
    }

    fn run<L: Layout>(work: impl WithLayout) {
        vector::run(As::<L, _>(work, std::marker::PhantomData));
    }

    match format {
        Format::F32 => run::<F32>(work),
        Format::F16 => run::<F16>(work),
        Format::BF16 => run::<BF16>(work),
        Format::Q4_0 => run::<Q4_0>(work),
        Format::Q4_1 => run::<Q4_1>(work),
        Format::Q5_0 => run::<Q5_0>(work),
        Format::Q5_1 => run::<Q5_1>(work),
        Format::Q8_0 => run::<Q8_0>(work),
        Format::Q2K => run::<Q2K>(work),
        Format::Q3K => run::<Q3K>(work),
        Format::Q4K => run::<Q4K>(work),
        Format::Q5K => run::<Q5K>(work),
        Format::Q6K => run::<Q6K>(work),
    }
}

/// Declares a layout: its name, the bytes and numbers of a block, its scales, and how a group of numbers is made.
macro_rules! layout {
    (
        $name:ident, $bytes:literal, $numbers:literal,
        scales<$v:ident>($of:ident) -> $scales:ty $make:block,
        group($block:ident, $by:ident, $group:ident) $decode:block
    ) => {
        struct $name;

        impl Layout for $name {
            const BYTES: usize = $bytes;
            const NUMBERS: usize = $numbers;

            type Scales<$v: Sixteen> = $scales;

            #[inline(always)]
            fn scales<$v: Sixteen>(block: &[u8]) -> $scales {
                let $of: &[u8; $bytes] = block.first_chunk().expect("a whole block");
                $make
            }

            #[inline(always)]
            fn group<$v: Sixteen>(block: &[u8], $by: &$scales, $group: usize) -> $v {
                let $block: &[u8; $bytes] = block.first_chunk().expect("a whole block");
                $decode
            }
        }
    };
}

/// The half float at a place of a block, in all lanes.
#[inline(always)]
fn half<V: Sixteen>(block: &[u8], at: usize) -> V {
    V::splat_half([block[at], block[at + 1]])
}

/// Sixteen bytes of a block.
#[inline(always)]
fn bytes(block: &[u8], at: usize) -> Bytes {
    Bytes::of(block[at..].first_chunk().expect("sixteen bytes within the block"))
}

/// A word of a block.
#[inline(always)]
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*block[at..].first_chunk().expect("four bytes within the block"))
}

layout!(F32, 64, 16, scales<V>(_block) -> () {}, group(block, _scales, _group) {
    let (words, _) = block.as_chunks();
    let numbers: [f32; GROUP] = std::array::from_fn(|i| f32::from_le_bytes(words[i]));
    V::of(&numbers)
});

layout!(F16, 32, 16, scales<V>(_block) -> () {}, group(block, _scales, _group) { V::halves(block) });

layout!(BF16, 32, 16, scales<V>(_block) -> () {}, group(block, _scales, _group) { V::upper_halves(block) });

// Blocks of 32: the first group of numbers in the lower halves of sixteen bytes, the second in the upper ones.

layout!(Q4_0, 18, 32, scales<V>(block) -> V { half(block, 0) }, group(block, scale, group) {
    V::integers(bytes(block, 2).field(4 * group, 0xf).minus(8)).times(*scale)
});

layout!(Q4_1, 20, 32, scales<V>(block) -> [V; 2] { [half(block, 0), half(block, 2)] }, group(block, scales, group) {
    V::integers(bytes(block, 4).field(4 * group, 0xf)).fused(scales[0], scales[1])
});

layout!(Q5_0, 22, 32, scales<V>(block) -> V { half(block, 0) }, group(block, scale, group) {
    let fifth = Bytes::bits(u16::from_le_bytes([block[2 + 2 * group], block[3 + 2 * group]]));
    V::integers(bytes(block, 6).field(4 * group, 0xf).with(fifth, 4).minus(16)).times(*scale)
});

layout!(Q5_1, 24, 32, scales<V>(block) -> [V; 2] { [half(block, 0), half(block, 2)] }, group(block, scales, group) {
    let fifth = Bytes::bits(u16::from_le_bytes([block[4 + 2 * group], block[5 + 2 * group]]));
    V::integers(bytes(block, 8).field(4 * group, 0xf).with(fifth, 4)).fused(scales[0], scales[1])
});

layout!(Q8_0, 34, 32, scales<V>(block) -> V { half(block, 0) }, group(block, scale, group) {
    V::integers(bytes(block, 2 + 16 * group)).times(*scale)
});

// Blocks of 256, with a scale and perhaps a minimum for each group or two of them.

layout!(
    Q2K, 84, 256,
    scales<V>(block) -> [[f32; 16]; 2] {
        let both = bytes(block, 0);
        let (scales, minima) = (V::integers(both.field(0, 0xf)), V::integers(both.field(4, 0xf)));
        [scales.times(half(block, 80)).lanes(), minima.times(half(block, 82)).lanes()]
    },
    group(block, scales, group) {
        // Eight groups share 32 bytes, two bits each.
        let integers = bytes(block, 16 + group / 8 * 32 + group % 2 * 16).field(group % 8 / 2 * 2, 3);
        V::integers(integers).fused(V::splat(scales[0][group]), V::splat(-scales[1][group]))
    }
);

layout!(
    Q3K, 110, 256,
    scales<V>(block) -> [f32; 16] {
        // Of a scale's six bits four lie in the first eight bytes, two in the last four.
        let low = [word(block, 96), word(block, 100)];
        let (low, high) = (Bytes::of_words([low[0], low[1], low[0] >> 4, low[1] >> 4]), word(block, 104));
        let high = Bytes::of_words([high, high >> 2, high >> 4, high >> 6]);
        V::integers(low.field(0, 0xf).with(high.field(0, 3), 4).minus(32)).times(half(block, 108)).lanes()
    },
    group(block, scales, group) {
        // Eight groups share 32 bytes, two bits each; 32 other bytes hold the third bit of all.
        let third = bytes(block, group % 2 * 16).field(group / 2, 1);
        let integers = bytes(block, 32 + group / 8 * 32 + group % 2 * 16).field(group % 8 / 2 * 2, 3);
        V::integers(integers.with(third, 2).minus(4)).times(V::splat(scales[group]))
    }
);

/// Scales and then minima of eight times 32 numbers, six bits each, from 12 bytes.
#[inline(always)]
fn scales_and_minima<V: Sixteen>(block: &[u8]) -> [f32; 16] {
    let [first, second, third] = [word(block, 4), word(block, 8), word(block, 12)];
    const LOW: u32 = 0x0f0f_0f0f;
    const TOP: u32 = 0x3030_3030;
    let scales = [first & (LOW | TOP), third & LOW | first >> 2 & TOP];
    let minima = [second & (LOW | TOP), third >> 4 & LOW | second >> 2 & TOP];
    let integers = V::integers(Bytes::of_words([scales[0], scales[1], minima[0], minima[1]])).lanes();
    let (d, least) = (half::<V>(block, 0).lanes()[0], half::<V>(block, 2).lanes()[0]);
    std::array::from_fn(|i| integers[i] * if i < 8 { d } else { least })
}

layout!(Q4K, 144, 256, scales<V>(block) -> [f32; 16] { scales_and_minima::<V>(block) }, group(block, scales, group) {
    let integers = bytes(block, 16 + group / 4 * 32 + group % 2 * 16).field(group / 2 % 2 * 4, 0xf);
    V::integers(integers).fused(V::splat(scales[group / 2]), V::splat(-scales[8 + group / 2]))
});

layout!(Q5K, 176, 256, scales<V>(block) -> [f32; 16] { scales_and_minima::<V>(block) }, group(block, scales, group) {
    let fifth = bytes(block, 16 + group % 2 * 16).field(group / 2, 1);
    let integers = bytes(block, 48 + group / 4 * 32 + group % 2 * 16).field(group / 2 % 2 * 4, 0xf);
    V::integers(integers.with(fifth, 4)).fused(V::splat(scales[group / 2]), V::splat(-scales[8 + group / 2]))
});

layout!(
    Q6K, 210, 256,
    scales<V>(block) -> [f32; 16] { V::integers(bytes(block, 192)).times(half(block, 208)).lanes() },
    group(block, scales, group) {
        // Of 128 numbers, 64 bytes hold low halves, first those of the former 64; 32 bytes hold two bits of four numbers.
        let (part, group_of_part) = (group / 8, group % 8);
        let low = bytes(block, part * 64 + group_of_part % 4 * 16).field(group_of_part / 4 * 4, 0xf);
        let high = bytes(block, 128 + part * 32 + group_of_part % 2 * 16).field(group_of_part / 2 * 2, 3);
        V::integers(low.with(high, 4).minus(32)).times(V::splat(scales[group]))
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{numbers, written};

    #[test]
    fn every_format_is_read_as_candle_reads_it() {
        for format in Format::ALL {
            let (bytes, expected) = written(format, numbers(7, 2048));
            assert_eq!(format.bytes(2048), Some(bytes.len()), "{format}");
            let mut found = vec![0.0; 2048];
            decode(format, &bytes, &mut found);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    (found - expected).abs() <= 1e-6 * expected.abs(),
                    "{format}[{i}]: {found}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn any_bytes_are_numbers() {
        let bytes: Vec<u8> = (0..=255u8)
            .cycle()
            .scan(1u8, |state, x| {
                *state = state.wrapping_mul(29).wrapping_add(x);
                Some(*state)
            })
            .take(210 * 16)
            .collect();
        for format in Format::ALL {
            let mut out = vec![0.0; 256 * format.block()];
            let blocks: Vec<u8> = bytes.iter().cycle().take(format.bytes(out.len()).unwrap()).copied().collect();
            decode(format, &blocks, &mut out);
        }
    }
}
