//! The numbers of a [`Format`], decoded.
//!
//! The layouts are those of ggml: a block holds its scales as half floats and then its integers, several to a byte; a K block
//! of 256 numbers has a scale (and some a minimum) for every 16 or 32 of them, in 4 or 6 bits. Each number is computed by the
//! operations of ggml in their order, so that it has the bits that other readers of the same file see.

use half::{bf16, f16};

use super::vector::widen;
use crate::terms::format::Format;

/// Decodes blocks that follow one another.
pub(crate) fn decode(format: Format, blocks: &[u8], out: &mut [f32]) {
    assert_eq!(format.bytes(out.len()), Some(blocks.len()), "{} numbers of {format}", out.len());
    match format {
        Format::F32 => floats(blocks, out, f32::from_le_bytes),
        Format::F16 => floats(blocks, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Format::BF16 => floats(blocks, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Format::Q4_0 => each::<18, 32>(blocks, out, q4_0),
        Format::Q4_1 => each::<20, 32>(blocks, out, q4_1),
        Format::Q5_0 => each::<22, 32>(blocks, out, q5_0),
        Format::Q5_1 => each::<24, 32>(blocks, out, q5_1),
        Format::Q8_0 => each::<34, 32>(blocks, out, q8_0),
        Format::Q2K => each::<84, 256>(blocks, out, q2_k),
        Format::Q3K => each::<110, 256>(blocks, out, q3_k),
        Format::Q4K => each::<144, 256>(blocks, out, q4_k),
        Format::Q5K => each::<176, 256>(blocks, out, q5_k),
        Format::Q6K => each::<210, 256>(blocks, out, q6_k),
    }
}

fn floats<const BYTES: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; BYTES]) -> f32) {
    let (bytes, _) = bytes.as_chunks::<BYTES>();
    widen(|| out.iter_mut().zip(bytes).for_each(|(out, bytes)| *out = number(*bytes)));
}

#[inline(always)]
fn each<const BYTES: usize, const COUNT: usize>(
    blocks: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; COUNT]),
) {
    let ((blocks, _), (out, _)) = (blocks.as_chunks::<BYTES>(), out.as_chunks_mut::<COUNT>());
    widen(|| blocks.iter().zip(out).for_each(|(block, out)| decode(block, out)));
}

/// The half float at a place of a block.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low and high halves of 16 bytes: the first 16 numbers of a block, and the others.
#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [f32; 32], number: impl Fn(usize, u8) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for (j, (byte, (low, high))) in bytes[..16].iter().zip(low.iter_mut().zip(high)).enumerate() {
        *low = number(j, byte & 0xf);
        *high = number(j + 16, byte >> 4);
    }
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    nibbles(&block[2..], out, |_, q| f32::from(q as i8 - 8) * d);
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    nibbles(&block[4..], out, |_, q| f32::from(q) * d + m);
}

/// The fifth bit of number `j`, in its place.
#[inline(always)]
fn fifth(bits: u32, j: usize) -> u8 {
    ((bits >> j & 1) << 4) as u8
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, bits) = (half(block, 0), u32::from_le_bytes([block[2], block[3], block[4], block[5]]));
    nibbles(&block[6..], out, |j, q| f32::from((q | fifth(bits, j)) as i8 - 16) * d);
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], out, |j, q| f32::from(q | fifth(bits, j)) * d + m);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(out, q)| *out = f32::from(*q as i8) * d);
}

#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, q) = block[..80].split_at(16);
    let (d, least) = (half(block, 80), half(block, 82));
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        // Eight groups of 16 share 32 bytes, two bits each.
        let (bytes, shift) = (&q[i / 8 * 32 + i % 2 * 16..][..16], i % 8 / 2 * 2);
        let (scale, minimum) = (d * f32::from(scales[i] & 0xf), least * f32::from(scales[i] >> 4));
        out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = scale * f32::from(byte >> shift & 3) - minimum);
    }
}

#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (third, rest) = block.split_at(32);
    let (q, scales) = (&rest[..64], &rest[64..76]);
    let d = half(block, 108);
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        // Of a scale's six bits four lie in the first eight bytes, two in the last four.
        let low = scales[i % 8] >> (i / 8 * 4) & 0xf;
        let high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
        let scale = d * f32::from((low | high << 4) as i8 - 32);
        let (first, shift) = (i % 2 * 16, i % 8 / 2 * 2);
        let (bytes, third) = (&q[i / 8 * 32 + first..][..16], &third[first..][..16]);
        let bit = i / 2;
        for (out, (byte, third)) in out.iter_mut().zip(bytes.iter().zip(third)) {
            let number = (byte >> shift & 3) as i8 - if third >> bit & 1 == 0 { 4 } else { 0 };
            *out = scale * f32::from(number);
        }
    }
}

/// Scale and minimum of group `j` of eight, six bits each, from 12 bytes.
#[inline(always)]
fn scale_and_minimum(bytes: &[u8], j: usize) -> (f32, f32) {
    let (scale, minimum) = if j < 4 {
        (bytes[j] & 63, bytes[j + 4] & 63)
    } else {
        (bytes[j + 4] & 0xf | bytes[j - 4] >> 6 << 4, bytes[j + 4] >> 4 | bytes[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, least) = (half(block, 0), half(block, 2));
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], i);
        let (scale, minimum) = (d * scale, least * minimum);
        let (bytes, shift) = (&block[16 + i / 2 * 32..][..32], i % 2 * 4);
        out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = scale * f32::from(byte >> shift & 0xf) - minimum);
    }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, least) = (half(block, 0), half(block, 2));
    let fifth = &block[16..48];
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], i);
        let (scale, minimum) = (d * scale, least * minimum);
        let (bytes, shift) = (&block[48 + i / 2 * 32..][..32], i % 2 * 4);
        for (out, (byte, fifth)) in out.iter_mut().zip(bytes.iter().zip(fifth)) {
            *out = scale * f32::from(byte >> shift & 0xf | (fifth >> i & 1) << 4) - minimum;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, rest) = block.split_at(128);
    let (high, scales) = (&rest[..64], &rest[64..80]);
    let d = half(block, 208);
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[i] as i8);
        // Of 128 numbers, 64 bytes hold low halves, first those of the former 64; 32 bytes hold two bits of four numbers.
        let (part, group) = (i / 8, i % 8);
        let (low, low_shift) = (&low[part * 64 + group % 4 * 16..][..16], group / 4 * 4);
        let (high, high_shift) = (&high[part * 32 + group % 2 * 16..][..16], group / 2 * 2);
        for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
            let number = (low >> low_shift & 0xf | (high >> high_shift & 3) << 4) as i8 - 32;
            *out = scale * f32::from(number);
        }
    }
}

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
