//! Decoding with a cache of keys and values: what is kept, and attention of one new row of each sequence.
//!
//! The cache of a layer is `[B, Hkv, capacity, d]` for keys and the same for values. Places and lengths are read on the
//! device, so that a step of decoding is the same sequence of launches at every position.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaView, DevicePtr, DevicePtrMut};

use super::attention::Heads;
use super::{Call, Element, Module, THREADS, module, rows_of};

static MODULE: Module = module!("decode");

/// Positions that one block attends to: longer sequences are shared by several. The same number stands in `decode.cu`.
const SPLIT: usize = 256;

/// Copies keys and values of new rows to their places in the cache of a layer.
///
/// `qkv` is packed, `[N, (Hq + 2 Hkv) d]`; row `n` goes to position `positions[n]`, below the capacity, of sequence
/// `sequences[n]`, or of sequence `n` without that.
#[expect(clippy::too_many_arguments, reason = "what goes in and what comes out")]
pub(crate) fn append<T: Element>(
    device: &CudaDevice,
    keys: &mut impl DevicePtrMut<T>,
    values: &mut impl DevicePtrMut<T>,
    qkv: &impl DevicePtr<T>,
    sequences: Option<&CudaView<'_, u32>>,
    positions: &impl DevicePtr<u32>,
    heads: Heads,
    capacity: usize,
) -> Result<()> {
    let rows = rows_of(qkv.len(), heads.row());
    assert_eq!(keys.len(), values.len(), "keys and values of a cache");
    let room = rows_of(keys.len(), heads.keys * capacity * heads.width);
    assert!(sequences.map_or(rows <= room, |sequences| sequences.len() == rows), "a place in the cache a row");
    assert!(positions.len() >= rows, "a position a row");
    let count = rows * 2 * heads.keys * heads.width;
    Call::of::<T>(device, &MODULE, "append")
        .write(keys)
        .write(values)
        .read(qkv)
        .read_if(sequences)
        .read(positions)
        .size(heads.queries)
        .size(heads.keys)
        .size(heads.width)
        .size(capacity)
        .size(count)
        .launch(count.div_ceil(THREADS as usize) as u32, THREADS, 0)
}

/// Elements of scratch that [`attend`] needs.
pub(crate) fn scratch(rows: usize, heads: Heads, capacity: usize) -> usize {
    rows * heads.queries * capacity.div_ceil(SPLIT) * (heads.width + 2)
}

/// Attention of one new row of each sequence over the positions of its cache that it sees, up to `positions[b]`: `out` `[B, Hq d]`, from the
/// queries in `qkv`, packed `[B, (Hq + 2 Hkv) d]`.
///
/// A sequence's result does not depend on the others. `scratch` has [`scratch`] elements.
#[expect(clippy::too_many_arguments, reason = "what goes in and what comes out")]
pub(crate) fn attend<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    qkv: &impl DevicePtr<T>,
    keys: &impl DevicePtr<T>,
    values: &impl DevicePtr<T>,
    positions: &impl DevicePtr<u32>,
    scratch: &mut impl DevicePtrMut<f32>,
    heads: Heads,
    capacity: usize,
) -> Result<()> {
    let rows = rows_of(out.len(), heads.queries * heads.width);
    assert!(qkv.len() >= rows * heads.row() && positions.len() >= rows, "queries and positions of every row");
    let room = rows_of(keys.len(), heads.keys * capacity * heads.width);
    assert!(keys.len() == values.len() && rows <= room, "a place in the cache a row");
    assert!(scratch.len() >= self::scratch(rows, heads, capacity), "room for parts");
    assert!(heads.width <= 128, "heads of at most 128 channels");
    let splits = capacity.div_ceil(SPLIT);
    let grid = (rows as u32, heads.queries as u32, splits as u32);
    let combined = if splits > 1 { Some(&mut *scratch) } else { None };
    let call = Call::of::<T>(device, &MODULE, "attend").write(&mut *out);
    let call = match combined {
        Some(scratch) => call.write(scratch),
        None => call.null(),
    };
    call.read(qkv)
        .read(keys)
        .read(values)
        .read(positions)
        .size(heads.queries)
        .size(heads.keys)
        .size(heads.width)
        .float(heads.scale)
        .size(heads.seen())
        .size(capacity)
        .launch(grid, 128, 0)?;
    if splits == 1 {
        return Ok(());
    }
    Call::of::<T>(device, &MODULE, "combine")
        .write(out)
        .write(scratch)
        .read(positions)
        .size(heads.queries)
        .size(heads.width)
        .size(heads.seen())
        .size(splits)
        .launch((rows as u32, heads.queries as u32), 128, 0)
}
