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
//! `vector`, which loads vectors, and in `cuda`, where kernels are launched.

pub(crate) mod adamw;
pub(crate) mod attention;
#[expect(unsafe_code, reason = "sets the length of what was written")]
pub(crate) mod buffer;
#[expect(unsafe_code, reason = "tasks share one result")]
pub(crate) mod by_row;
pub(crate) mod columns;
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "launches kernels")]
pub(crate) mod cuda;
pub(crate) mod elementary;
pub(crate) mod elementwise;
pub(crate) mod head;
pub(crate) mod layer_norm;
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
    use contract::random::{normal, philox};

    /// Standard normal numbers that depend on `seed` alone.
    pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| {
                let [a, b, ..] = philox(seed, [i as u32, 0, 0, 0]);
                normal(a, b).0
            })
            .collect()
    }

    /// Runs `f` in a pool of that many threads.
    pub(crate) fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads").install(f)
    }
}
