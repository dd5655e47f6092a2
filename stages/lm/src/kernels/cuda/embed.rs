//! Vectors of tokens, prompt and positions, and the gradients of their tables.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut};

use super::{Call, Element, Module, THREADS, module, rows_of, threads_for_row, upload};
use crate::batch::Input;

static MODULE: Module = module!("embed");

/// An input as [`embed`] reads it: token ids from 0, and `-1 - i` for vector `i` of the prompt.
pub(crate) fn code(input: Input) -> i32 {
    match input {
        Input::Token(id) => id as i32,
        Input::Prompt(i) => -1 - i as i32,
    }
}

/// Tables of vectors of `width` elements.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'a, T> {
    /// `[V, width]`.
    pub(crate) tokens: &'a CudaView<'a, T>,
    /// The soft prompt, `[n, width]`, where inputs are of one.
    pub(crate) prompt: Option<&'a CudaView<'a, T>>,
    /// `[P, width]`, where positions have vectors of their own.
    pub(crate) positions: Option<&'a CudaView<'a, T>>,
}

/// For every row the vector of its input, [`code`]d, plus that of its position.
///
/// `out` is `[N, width]`, `inputs` and `at` `[N]`. Ids and positions must be rows of their tables.
pub(crate) fn embed<T: Element>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<T>,
    inputs: &impl DevicePtr<i32>,
    at: &impl DevicePtr<u32>,
    tables: Tables<'_, T>,
    width: usize,
) -> Result<()> {
    let rows = rows_of(out.len(), width);
    assert_eq!((inputs.len(), at.len()), (rows, rows), "an input and a position a row");
    Call::of::<T>(device, &MODULE, "embed")
        .write(out)
        .read(inputs)
        .read(at)
        .read(tables.tokens)
        .read_if(tables.prompt)
        .read_if(tables.positions)
        .size(width)
        .launch(rows as u32, threads_for_row(width, THREADS), 0)
}

/// Which rows of a gradient belong to which row of a table: what makes [`add_groups`] deterministic.
pub(crate) struct Groups {
    /// Rows of the gradient, those of one place together.
    order: CudaSlice<u32>,
    /// Where each place begins in `order`, and at last its end.
    starts: CudaSlice<u32>,
    /// Rows of the table.
    ids: CudaSlice<u32>,
    /// How many places.
    count: usize,
}

impl Groups {
    /// From pairs of a row of the gradient and the row of the table that it belongs to.
    pub(crate) fn new(device: &CudaDevice, pairs: impl IntoIterator<Item = (u32, u32)>) -> Result<Self> {
        let mut pairs: Vec<(u32, u32)> = pairs.into_iter().map(|(row, id)| (id, row)).collect();
        pairs.sort_unstable();
        let (mut starts, mut ids) = (Vec::new(), Vec::new());
        for (i, (id, _)) in pairs.iter().enumerate() {
            if ids.last() != Some(id) {
                starts.push(i as u32);
                ids.push(*id);
            }
        }
        starts.push(pairs.len() as u32);
        let order: Vec<u32> = pairs.iter().map(|(_, row)| *row).collect();
        Ok(Groups {
            count: ids.len(),
            order: upload(device, order)?,
            starts: upload(device, starts)?,
            ids: upload(device, ids)?,
        })
    }
}

/// Adds rows of `dy`, `[N, width]`, to the rows of `table`, `[V, width]`, that they belong to: the gradient of an embedding.
pub(crate) fn add_groups<T: Element>(
    device: &CudaDevice,
    table: &mut impl DevicePtrMut<f32>,
    dy: &impl DevicePtr<T>,
    groups: &Groups,
    width: usize,
) -> Result<()> {
    rows_of(table.len(), width);
    rows_of(dy.len(), width);
    Call::of::<T>(device, &MODULE, "add_groups")
        .write(table)
        .read(dy)
        .read(&groups.order)
        .read(&groups.starts)
        .read(&groups.ids)
        .size(width)
        .launch((groups.count as u32, width.div_ceil(256) as u32), THREADS, 0)
}
