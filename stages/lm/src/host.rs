//! The numbers of tensors in main memory, as slices.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

/// The elements of an `f32` tensor in main memory, without a copy.
///
/// Errors when it is elsewhere, of another type, or not contiguous.
pub(crate) fn elements(tensor: &Tensor) -> Result<impl Deref<Target = [f32]> + '_> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = contiguous(layout)?;
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        bail!("expected a tensor of f32 on the cpu, got {:?} on {:?}", tensor.dtype(), tensor.device().location());
    }
    Ok(Elements { storage, range })
}

/// Lets `f` change the elements of a tensor in place. All who share its storage see the change.
pub(crate) fn change<T>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<T> + Send) -> Result<T>
where
    T: Send,
{
    /// `InplaceOp1` is called through a shared reference, hence the cells.
    struct Change<F, T>(std::sync::Mutex<(Option<F>, Option<T>)>);
    impl<F: FnOnce(&mut [f32]) -> Result<T>, T> InplaceOp1 for Change<F, T> {
        fn name(&self) -> &'static str {
            "change"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let range = contiguous(layout)?;
            let CpuStorage::F32(data) = storage else { bail!("expected a tensor of f32") };
            let mut cells = self.0.lock().expect("nothing panics while it is held");
            let f = cells.0.take().expect("an operation is applied once");
            cells.1 = Some(f(&mut data[range])?);
            Ok(())
        }
    }
    let change = Change(std::sync::Mutex::new((Some(f), None)));
    tensor.inplace_op1(&change)?;
    let (_, result) = change.0.into_inner().expect("nothing panics while it is held");
    Ok(result.expect("an operation that was applied has a result"))
}

struct Elements<S> {
    storage: S,
    range: Range<usize>,
}

impl<S: Deref<Target = Storage>> Deref for Elements<S> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            _ => unreachable!("checked when it was made"),
        }
    }
}

pub(crate) fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}
