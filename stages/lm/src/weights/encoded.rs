//! A frozen matrix in the type it has on disk.

use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use memmap2::Mmap;
use rayon::prelude::*;

use crate::kernels::decode::decode;
use crate::kernels::elementary::all_finite;
use crate::terms::format::Format;

/// A matrix `[rows, columns]` of half floats or quantised blocks in main memory. A row is a whole number of blocks. A clone
/// is a handle of the same bytes.
#[derive(Clone)]
pub(crate) struct Encoded {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    bytes: Bytes,
}

/// Bytes that nobody changes.
#[derive(Clone)]
pub(crate) enum Bytes {
    Owned(Arc<Vec<u8>>),
    /// Some bytes of a file.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Owned(bytes) => bytes,
            Bytes::Mapped(file, range) => &file[range.clone()],
        }
    }
}

/// Rows a task decodes.
const PART: usize = 64;

impl Encoded {
    /// Errors where the bytes are not those of such a matrix.
    pub(crate) fn new(format: Format, rows: usize, columns: usize, bytes: Bytes) -> Result<Self> {
        let expected = format.bytes(columns).and_then(|row| row.checked_mul(rows));
        if expected != Some(bytes.len()) {
            candle_core::bail!("{} bytes for a matrix [{rows}, {columns}] of {format}", bytes.len());
        }
        Ok(Encoded { format, rows, columns, bytes })
    }

    /// Bytes of a row.
    fn row_bytes(&self) -> usize {
        self.columns / self.format.block() * self.format.block_bytes()
    }

    /// The bytes of some rows.
    pub(crate) fn rows(&self, rows: Range<usize>) -> &[u8] {
        &self.bytes[rows.start * self.row_bytes()..rows.end * self.row_bytes()]
    }

    /// The numbers of some rows, row after row.
    pub(crate) fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        decode(self.format, self.rows(rows), out);
    }

    /// Whether all numbers are finite.
    pub(crate) fn is_finite(&self) -> bool {
        (0..self.rows).into_par_iter().step_by(PART).all(|first| {
            let rows = first..self.rows.min(first + PART);
            let mut values = vec![0.0; rows.len() * self.columns];
            self.decode(rows, &mut values);
            all_finite(&values)
        })
    }

    /// All numbers, as f32.
    pub(crate) fn tensor(&self, device: &Device) -> Result<Tensor> {
        let mut values = vec![0.0; self.rows * self.columns];
        values.par_chunks_mut((PART * self.columns).max(1)).enumerate().for_each(|(part, values)| {
            let first = part * PART;
            self.decode(first..self.rows.min(first + PART), values);
        });
        Tensor::from_vec(values, (self.rows, self.columns), device)
    }

    /// The same matrix with its rows in another order: row `i` is row `order[i]` of this one.
    pub(crate) fn reordered(&self, order: &[usize]) -> Self {
        let bytes = order.iter().flat_map(|row| self.rows(*row..row + 1)).copied().collect();
        Encoded { bytes: Bytes::Owned(Arc::new(bytes)), rows: order.len(), ..self.clone() }
    }
}
