//! The inner loops, on slices of `f32`: everything that costs time on a CPU.
//!
//! Rules all of them keep:
//!
//! - **The same bits with any number of threads.** Work is cut into blocks whose size depends on the shapes alone; sums
//!   over rows are made per block and then added in the order of the blocks.
//! - **The same bits for a row, whoever shares its batch**, in everything that computes forward.
//! - Loops over channels are written in fixed lanes, so that the compiler turns them into vector instructions.
//!
//! `unsafe` stands around the matrix product in `matmul`, in `by_row`, whose tasks share one result, in `buffer`, in
//! `vector` and `bytes`, which load vectors, in `map`, and in `cuda`, where kernels are launched.

pub(crate) mod adamw;
pub(crate) mod adaptive;
pub(crate) mod attention;
#[expect(unsafe_code, reason = "sets the length of what was written")]
pub(crate) mod buffer;
#[expect(unsafe_code, reason = "tasks share one result")]
pub(crate) mod by_row;
#[expect(unsafe_code, reason = "vector instructions on bytes")]
mod bytes;
pub(crate) mod columns;
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "launches kernels")]
pub(crate) mod cuda;
pub(crate) mod decode;
pub(crate) mod elementary;
pub(crate) mod elementwise;
pub(crate) mod encode;
pub(crate) mod head;
pub(crate) mod layer_norm;
#[expect(unsafe_code, reason = "maps files")]
pub(crate) mod map;
pub(crate) mod masks;
#[expect(unsafe_code, reason = "calls a matrix product that takes raw pointers")]
pub(crate) mod matmul;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;
pub(crate) mod tile;
pub(crate) mod top_k;
#[expect(unsafe_code, reason = "vector instructions are chosen at run time")]
mod vector;

/// Rows that one task handles: fixed, because it decides the order of sums.
pub(crate) const ROW_BLOCK: usize = 32;

/// Elements that one task of an elementwise loop handles.
pub(crate) const BLOCK: usize = 16 * 1024;

/// Adds the vectors of `parts` in order.
pub(crate) fn sum_in_order(parts: Vec<Vec<f32>>) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        total.iter_mut().zip(&part).for_each(|(t, p)| *t += p);
    }
    total
}

#[cfg(test)]
pub(crate) mod testing {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};
    use contract::random::{normal, philox};

    use crate::terms::format::Format;

    /// Standard normal numbers that depend on `seed` alone.
    pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| {
                let [a, b, ..] = philox(seed, [i as u32, 0, 0, 0]);
                normal(a, b).0
            })
            .collect()
    }

    /// Numbers written down in a format by candle: its bytes, and what it reads from them.
    pub(crate) fn written(format: Format, numbers: Vec<f32>) -> (Vec<u8>, Vec<f32>) {
        let dtype = match format {
            Format::F32 => GgmlDType::F32,
            Format::F16 => GgmlDType::F16,
            Format::BF16 => GgmlDType::BF16,
            Format::Q4_0 => GgmlDType::Q4_0,
            Format::Q4_1 => GgmlDType::Q4_1,
            Format::Q5_0 => GgmlDType::Q5_0,
            Format::Q5_1 => GgmlDType::Q5_1,
            Format::Q8_0 => GgmlDType::Q8_0,
            Format::Q2K => GgmlDType::Q2K,
            Format::Q3K => GgmlDType::Q3K,
            Format::Q4K => GgmlDType::Q4K,
            Format::Q5K => GgmlDType::Q5K,
            Format::Q6K => GgmlDType::Q6K,
        };
        let count = numbers.len();
        let numbers = Tensor::from_vec(numbers, count, &Device::Cpu).expect("a vector");
        let written = QTensor::quantize(&numbers, dtype).expect("numbers that fill blocks");
        let read = written.dequantize(&Device::Cpu).and_then(|read| read.to_vec1()).expect("what was written");
        (written.data().expect("bytes in main memory").into_owned(), read)
    }

    /// Runs `f` in a pool of that many threads.
    pub(crate) fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads").install(f)
    }
}
