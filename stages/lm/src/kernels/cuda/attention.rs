//! Causal attention over packed sequences: softmax(Q Kᵀ scale) V for each sequence and head, with the softmax taken block by
//! block of keys, so that memory grows with the number of rows (Dao et al., "FlashAttention", 2022).
//!
//! Heads of queries may share heads of keys and values (Ainslie et al., "GQA", 2023): head `h` of `Hq` takes those of
//! `h Hkv / Hq`. A query may see all positions up to its own or a window of them; tiles of keys that none of a tile of
//! queries sees are not read.

use std::ops::Range;

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use candle_core::{Result, bail};

use super::{Call, Element, Module, fold, module, rows_of, unset, upload};
use crate::terms::dropout::Dropout;

static MODULE: Module = module!("attention");

/// Rows of a tile of queries or keys, and threads of a block. The same numbers stand in `attention.cu`.
const TILE: usize = 64;
const THREADS: u32 = 128;

/// Widths of heads that kernels are made for: a head is filled up with zeros to the next one.
const WIDTHS: [usize; 4] = [32, 64, 96, 128];

/// The heads of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Heads of queries, `Hq`.
    pub(crate) queries: usize,
    /// Heads of keys and values, `Hkv`: a divisor of `Hq`.
    pub(crate) keys: usize,
    /// Channels of a head, `d`, at most 128.
    pub(crate) width: usize,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Positions that a query sees, its own and those before it; `None` is all.
    pub(crate) window: Option<usize>,
}

impl Heads {
    /// The window as kernels are told it: without one, more than any sequence has positions.
    pub(super) fn seen(&self) -> usize {
        const ALL: usize = 1 << 30;
        self.window.map_or(ALL, |window| window.min(ALL))
    }

    /// Elements of a row of packed queries, keys and values.
    pub(crate) fn row(&self) -> usize {
        (self.queries + 2 * self.keys) * self.width
    }
}

/// The sequences of a batch, cut into tiles, on the device.
pub(crate) struct Sequences {
    /// For each tile: first row and length of its sequence, its own first row within it, and the folded row id.
    tiles: CudaSlice<u32>,
    count: usize,
    rows: usize,
}

impl Sequences {
    /// Of sequences that lie at `segments` and have these row ids.
    pub(crate) fn new(device: &CudaDevice, segments: &[Range<usize>], ids: &[u64]) -> Result<Self> {
        let mut tiles: Vec<[u32; 4]> = Vec::new();
        for (segment, id) in segments.iter().zip(ids) {
            let tile = |first| [segment.start as u32, segment.len() as u32, first as u32, fold(*id)];
            tiles.extend((0..segment.len()).step_by(TILE).map(tile));
        }
        // Those with the most to do begin first: the last queries of the longest sequences.
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile[2]));
        let (count, rows) = (tiles.len(), segments.iter().map(|segment| segment.end).max().unwrap_or(0));
        Ok(Sequences { tiles: upload(device, tiles.concat())?, count, rows })
    }
}

/// Dropout of probabilities: rate, and the site of head 0; the others follow.
pub(crate) type ProbabilityDropout = Option<(Dropout, f32, u32)>;

/// Writes the result, `out` `[N, Hq d]`, and for the way back the logarithm of each softmax' denominator, `normalisers`
/// `[Hq, N]`. `qkv` is packed, `[N, (Hq + 2 Hkv) d]`: a row's queries, then its keys, then its values.
///
/// Errors where heads are wider than 128.
pub(crate) fn forward<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    normalisers: &mut impl DevicePtrMut<f32>,
    qkv: &impl DevicePtr<T>,
    sequences: &Sequences,
    heads: Heads,
    dropout: ProbabilityDropout,
) -> Result<()> {
    let padded = padded(heads.width)?;
    let rows = rows_of(out.len(), heads.queries * heads.width);
    assert!(rows >= sequences.rows && normalisers.len() == rows * heads.queries, "rows of attention");
    let parts = parts::<T>(qkv.device_ptr(qkv.stream()).0, qkv.len(), rows, heads);
    Call::of::<T>(device, &MODULE, &format!("attention_{padded}"))
        .write(out)
        .write(normalisers)
        .parts(&parts, heads)
        .read(&sequences.tiles)
        .heads(heads, rows)
        .dropout(dropout)
        .size(usize::from(dropout.is_some()))
        .launch((sequences.count as u32, heads.queries as u32), THREADS, forward_bytes::<T>(padded))
}

/// Writes the gradients of queries, keys and values, packed, from that of the result, `dout`. Rows in no sequence stay as they are.
#[expect(clippy::too_many_arguments, reason = "what goes in and what comes out")]
pub(crate) fn backward<T: Element>(
    device: &CudaDevice,
    gradients: &mut impl DevicePtrMut<T>,
    qkv: &impl DevicePtr<T>,
    out: &impl DevicePtr<T>,
    dout: &impl DevicePtr<T>,
    normalisers: &impl DevicePtr<f32>,
    sequences: &Sequences,
    heads: Heads,
    dropout: ProbabilityDropout,
) -> Result<()> {
    let padded = padded(heads.width)?;
    let rows = rows_of(out.len(), heads.queries * heads.width);
    assert!(rows >= sequences.rows && normalisers.len() == rows * heads.queries, "rows of attention");
    assert_eq!(out.len(), dout.len(), "a gradient of every element");
    let mut products = unset::<f32>(device, (rows * heads.queries).max(1))?;
    Call::of::<T>(device, &MODULE, "attention_products")
        .write(&mut products)
        .read(out)
        .read(dout)
        .size(rows)
        .size(heads.queries)
        .size(heads.width)
        .launch((rows * heads.queries).div_ceil(4) as u32, THREADS, 0)?;
    let parts = |address, length| self::parts::<T>(address, length, rows, heads);
    let qkv = parts(qkv.device_ptr(qkv.stream()).0, qkv.len());
    let (stream, length) = (device.cuda_stream(), gradients.len());
    let [dq, dk, dv] = parts(gradients.device_ptr_mut(&stream).0, length);
    for (kernel, gradients, blocks) in [("queries", &[dq][..], heads.queries), ("keys", &[dk, dv], heads.keys)] {
        Call::of::<T>(device, &MODULE, &format!("attention_{kernel}_{padded}"))
            .parts(gradients, heads)
            .parts(&qkv, heads)
            .read(dout)
            .read(normalisers)
            .read(&products)
            .read(&sequences.tiles)
            .heads(heads, rows)
            .dropout(dropout)
            .size(usize::from(dropout.is_some()))
            .launch((sequences.count as u32, blocks as u32), THREADS, backward_bytes::<T>(padded))?;
    }
    Ok(())
}

fn padded(width: usize) -> Result<usize> {
    match WIDTHS.into_iter().find(|padded| width <= *padded) {
        Some(padded) => Ok(padded),
        None => bail!("heads of {width} channels: attention on a GPU is made for at most 128"),
    }
}

impl Call<'_> {
    /// Some of the [`parts`] of packed rows: address and distance of rows of each.
    fn parts(self, addresses: &[u64], heads: Heads) -> Self {
        addresses.iter().fold(self, |call, address| call.size(*address as usize).size(heads.row()))
    }

    fn heads(self, heads: Heads, rows: usize) -> Self {
        self.size(rows).size(heads.queries).size(heads.keys).size(heads.width).float(heads.scale).size(heads.seen())
    }
}

/// Addresses of queries, keys and values, or their gradients, in packed rows that begin at `address`.
fn parts<T>(address: u64, length: usize, rows: usize, heads: Heads) -> [u64; 3] {
    assert_eq!(length, rows * heads.row(), "packed queries, keys and values");
    let (queries, keys) = (heads.queries * heads.width, heads.keys * heads.width);
    [0, queries, queries + keys].map(|offset| address + (offset * size_of::<T>()) as u64)
}

/// Shared memory of the kernels, in bytes: tiles of rows that are a little longer than a head, so that rows begin in
/// different banks, and what each of four warps keeps for itself. The same sums are in `attention.cu`.
fn forward_bytes<T: Element>(padded: usize) -> usize {
    3 * tile_bytes::<T>(padded) + 4 * 16 * 72 * 4
}

fn backward_bytes<T: Element>(padded: usize) -> usize {
    4 * tile_bytes::<T>(padded) + 4 * 2 * 16 * 40 * size_of::<T>()
}

fn tile_bytes<T: Element>(padded: usize) -> usize {
    TILE * (padded + 8) * size_of::<T>()
}
