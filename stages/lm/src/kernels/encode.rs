//! Numbers, encoded in a [`Format`]: the way back of [`super::decode`].
//!
//! Each block is computed by the operations of ggml's reference in their order, so that a file has the bytes that llama.cpp and
//! the `gguf` package of Python would write: scales as half floats, numbers divided by the scale as it was before it was
//! rounded. The K formats search for their scales; that is left to candle.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use contract::Result;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::terms::format::Format;

/// Numbers that a task encodes: a multiple of every block.
const PART: usize = 64 * 1024;

/// The largest half float.
const LARGEST_HALF: f32 = 65504.0;

/// Encodes numbers that fill blocks, one block after another.
///
/// Errors where one is not finite, or too large for the half floats in which blocks keep their scales.
pub(crate) fn encode(format: Format, numbers: &[f32]) -> Result<Vec<u8>> {
    let bytes = format.bytes(numbers.len());
    let bytes = bytes.ok_or_else(|| anyhow::anyhow!("{} numbers fill no blocks of {format}", numbers.len()))?;
    let largest = match format {
        Format::F32 | Format::BF16 => f32::MAX,
        _ => LARGEST_HALF,
    };
    if let Some(wrong) = numbers.iter().find(|number| number.is_nan() || number.abs() > largest) {
        anyhow::bail!("{wrong} cannot be written in {format}, which holds numbers up to {largest}");
    }
    let mut out = vec![0; bytes];
    let part_bytes = PART / format.block() * format.block_bytes();
    let parts = numbers.par_chunks(PART).zip(out.par_chunks_mut(part_bytes));
    parts.try_for_each(|(numbers, out)| encode_part(format, numbers, out))?;
    Ok(out)
}

fn encode_part(format: Format, numbers: &[f32], out: &mut [u8]) -> Result<()> {
    match format {
        Format::F32 => each::<1, 4>(numbers, out, |[x], out| *out = x.to_le_bytes()),
        Format::F16 => each::<1, 2>(numbers, out, |[x], out| *out = f16::from_f32(*x).to_le_bytes()),
        Format::BF16 => each::<1, 2>(numbers, out, |[x], out| *out = bf16::from_f32(*x).to_le_bytes()),
        Format::Q4_0 => each(numbers, out, q4_0),
        Format::Q4_1 => each(numbers, out, q4_1),
        Format::Q5_0 => each(numbers, out, q5_0),
        Format::Q5_1 => each(numbers, out, q5_1),
        Format::Q8_0 => each(numbers, out, q8_0),
        Format::Q2K => by_candle(GgmlDType::Q2K, numbers, out)?,
        Format::Q3K => by_candle(GgmlDType::Q3K, numbers, out)?,
        Format::Q4K => by_candle(GgmlDType::Q4K, numbers, out)?,
        Format::Q5K => by_candle(GgmlDType::Q5K, numbers, out)?,
        Format::Q6K => by_candle(GgmlDType::Q6K, numbers, out)?,
    }
    Ok(())
}

fn by_candle(dtype: GgmlDType, numbers: &[f32], out: &mut [u8]) -> Result<()> {
    let numbers = Tensor::new(numbers, &Device::Cpu)?;
    out.copy_from_slice(&QTensor::quantize(&numbers, dtype)?.data()?);
    Ok(())
}

fn each<const COUNT: usize, const BYTES: usize>(
    numbers: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; COUNT], &mut [u8; BYTES]),
) {
    let ((blocks, _), (out, _)) = (numbers.as_chunks::<COUNT>(), out.as_chunks_mut::<BYTES>());
    blocks.iter().zip(out).for_each(|(block, out)| encode(block, out));
}

/// The number of the largest magnitude, with its sign: of several the first.
fn extreme(block: &[f32; 32]) -> f32 {
    block.iter().fold(0.0, |largest: f32, x| if x.abs() > largest.abs() { *x } else { largest })
}

fn least_and_most(block: &[f32; 32]) -> (f32, f32) {
    block.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), x| (least.min(*x), most.max(*x)))
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn put_half(out: &mut [u8], x: f32) {
    out[..2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
}

/// Numbers of a block as small integers: of each the lower four bits, the former 16 in the lower halves of 16 bytes, and the
/// fifth bits of all, the first number's lowest.
fn pack(block: &[f32; 32], out: &mut [u8], number: impl Fn(f32) -> u8) -> u32 {
    let numbers = block.map(number);
    for (j, out) in out[..16].iter_mut().enumerate() {
        *out = numbers[j] & 0xf | numbers[j + 16] << 4;
    }
    numbers.iter().rev().fold(0, |bits, number| bits << 1 | u32::from(number >> 4 & 1))
}

fn q4_0(block: &[f32; 32], out: &mut [u8; 18]) {
    let scale = extreme(block) / -8.0;
    let by = inverse(scale);
    put_half(out, scale);
    pack(block, &mut out[2..], |x| ((x * by + 8.5) as u8).min(15));
}

fn q4_1(block: &[f32; 32], out: &mut [u8; 20]) {
    let (least, most) = least_and_most(block);
    let scale = (most - least) / 15.0;
    let by = inverse(scale);
    put_half(out, scale);
    put_half(&mut out[2..], least);
    pack(block, &mut out[4..], |x| (((x - least) * by + 0.5) as u8).min(15));
}

fn q5_0(block: &[f32; 32], out: &mut [u8; 22]) {
    let scale = extreme(block) / -16.0;
    let by = inverse(scale);
    put_half(out, scale);
    let fifth = pack(block, &mut out[6..], |x| ((x * by + 16.5) as u8).min(31));
    out[2..6].copy_from_slice(&fifth.to_le_bytes());
}

fn q5_1(block: &[f32; 32], out: &mut [u8; 24]) {
    let (least, most) = least_and_most(block);
    let scale = (most - least) / 31.0;
    let by = inverse(scale);
    put_half(out, scale);
    put_half(&mut out[2..], least);
    let fifth = pack(block, &mut out[8..], |x| (((x - least) * by + 0.5) as u8).min(31));
    out[4..8].copy_from_slice(&fifth.to_le_bytes());
}

fn q8_0(block: &[f32; 32], out: &mut [u8; 34]) {
    let scale = extreme(block).abs() / 127.0;
    let by = inverse(scale);
    put_half(out, scale);
    out[2..].iter_mut().zip(block).for_each(|(out, x)| *out = (x * by).round() as i8 as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::decode::decode;
    use crate::kernels::testing::{numbers, with_threads, written};

    #[test]
    fn every_format_is_written_as_candle_writes_it() {
        let mut sample = numbers(7, 4096);
        // A block of zeros, one of a single number, and ties between halves.
        sample[..32].fill(0.0);
        sample[32..64].fill(-0.75);
        sample[64..96].iter_mut().enumerate().for_each(|(i, x)| *x = i as f32 - 15.5);
        for format in Format::ALL {
            let (expected, _) = written(format, sample.clone());
            assert!(encode(format, &sample).unwrap() == expected, "{format}");
        }
    }

    #[test]
    fn what_was_decoded_is_encoded_to_the_same_numbers() {
        for format in [Format::F32, Format::F16, Format::BF16, Format::Q4_0, Format::Q5_0, Format::Q8_0] {
            let decoded = |bytes: &[u8]| {
                let mut numbers = vec![0.0; 4096];
                decode(format, bytes, &mut numbers);
                numbers
            };
            let once = decoded(&encode(format, &numbers(9, 4096)).unwrap());
            let twice = decoded(&encode(format, &once).unwrap());
            let gap = once.iter().zip(&twice).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(gap < 3e-3, "{format}: {gap}");
        }
    }

    #[test]
    fn threads_change_nothing_and_what_cannot_be_written_is_an_error() {
        let many = numbers(3, 3 * PART + 512);
        for format in [Format::Q8_0, Format::Q6K] {
            let [one, four] = [1, 4].map(|threads| with_threads(threads, || encode(format, &many).unwrap()));
            assert!(one == four, "{format}");
        }
        let error = |format, x| encode(format, &[x; 32]).unwrap_err().to_string();
        assert_eq!(error(Format::Q8_0, 1e5), "100000 cannot be written in Q8_0, which holds numbers up to 65504");
        assert!(error(Format::F16, f32::NAN).contains("NaN cannot be written in F16"));
        assert!(error(Format::Q4K, 1.0).contains("32 numbers fill no blocks of Q4_K"));
        assert!(encode(Format::BF16, &[1e38]).is_ok());
    }
}
