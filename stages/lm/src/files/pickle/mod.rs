//! What `torch.save` writes of a dictionary of tensors, and of a module's `state_dict()`: `pytorch_model.bin`, in and out.
//!
//! A file is an archive of a pickle, which describes the tensors, and of storages, which hold their numbers as they lie in
//! memory. Nothing of a pickle is run: see `machine.rs`. What it says of storages, sizes and strides is held against the
//! file before anything is read or allocated.

mod machine;
mod write;
mod zip;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use contract::Result;
use contract::files::{self, in_words};
use indexmap::IndexMap;
use safetensors::Dtype;

use self::machine::{Described, shown};
pub(crate) use self::write::{Saved, write};
use self::zip::Place;

/// An open file of tensors, whose values stay on disk until they are asked for.
pub(crate) struct PickleFile {
    file: File,
    tensors: IndexMap<String, PickleTensor>,
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PickleTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    strides: Vec<usize>,
    /// Its first byte in the file.
    start: u64,
    /// Numbers from its first to its last one in the storage, both included.
    span: usize,
}

/// What older versions of PyTorch begin a file with: a pickle of this number.
const OLD_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e";

impl PickleFile {
    /// Whether a file begins as what `torch.save` writes, today or once.
    pub(crate) fn is(path: &Path) -> bool {
        let mut magic = [0; OLD_MAGIC.len()];
        let read = files::open(path, files::WEIGHTS).map(|file| file.into_file().read_at(&mut magic, 0));
        read.is_ok_and(|read| read.is_ok()) && (magic.starts_with(zip::MAGIC) || magic == OLD_MAGIC)
    }

    /// Reads what is in a file, and no values.
    ///
    /// Errors when it is cut short, asks Python for anything that no tensor needs, or says what cannot be.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = files::open(path, files::WEIGHTS)?;
        let (size, file) = (file.size(), file.into_file());
        Self::read(file, size).map_err(|error| anyhow!("`{}` is no model of PyTorch's ({error:#})", path.display()))
    }

    fn read(file: File, size: u64) -> Result<Self> {
        let mut magic = [0; OLD_MAGIC.len()];
        let read = file.read_at(&mut magic, 0)?;
        ensure!(
            magic[..read] != *OLD_MAGIC,
            "it is of a version before 1.6: write it anew in Python, `torch.save(torch.load(PATH, weights_only=True), PATH)`"
        );
        ensure!(
            magic.starts_with(zip::MAGIC),
            "it does not begin as what `torch.save` of PyTorch 1.6 or later writes: get it again, or convert the model to safetensors"
        );
        let entries = zip::entries(&file, size)?;
        let root = zip::root(&entries)?;
        let entry = |name: &str| entries.get(&format!("{root}/{name}")).copied();
        let bytes = |place: Place| {
            let mut bytes = vec![0; place.size as usize];
            file.read_exact_at(&mut bytes, place.start).map(|()| bytes)
        };
        if let Some(place) = entry("byteorder").filter(|place| place.size <= 16) {
            ensure!(bytes(place)? == b"little", "its numbers are big-endian: expected little-endian");
        }
        let pickle = entry("data.pkl").context("it holds no `data.pkl`")?;
        ensure!(
            pickle.size <= machine::LONGEST,
            "its pickle has {}, and at most {} are read",
            in_words(pickle.size),
            in_words(machine::LONGEST)
        );
        let mut tensors = IndexMap::new();
        for (name, described) in machine::run(&bytes(pickle)?)? {
            let key = &described.storage.key;
            let place = entry(&format!("data/{key}")).with_context(|| {
                format!("tensor `{}` lies in storage `{}`, which is not there", shown(&name), shown(key))
            })?;
            let tensor = PickleTensor::of(&described, place).with_context(|| format!("tensor `{}`", shown(&name)))?;
            tensors.insert(name, tensor);
        }
        Ok(PickleFile { file, tensors })
    }

    /// Its tensors, in its order.
    pub(crate) fn tensors(&self) -> &IndexMap<String, PickleTensor> {
        &self.tensors
    }

    /// The bytes of a tensor's numbers, in row-major order.
    pub(crate) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let tensor = self.tensors.get(name).context("a tensor without a place")?;
        let width = tensor.dtype.bitsize() / 8;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(tensor.span * width).context("there is no memory for it")?;
        bytes.resize(tensor.span * width, 0);
        self.file.read_exact_at(&mut bytes, tensor.start)?;
        if tensor.is_in_order() {
            return Ok(bytes);
        }
        let count: usize = tensor.shape.iter().product();
        let mut ordered = Vec::with_capacity(count * width);
        let mut at = vec![0; tensor.shape.len()];
        for _ in 0..count {
            let place: usize = at.iter().zip(&tensor.strides).map(|(index, stride)| index * stride).sum();
            ordered.extend_from_slice(&bytes[place * width..][..width]);
            for (index, size) in at.iter_mut().zip(&tensor.shape).rev() {
                *index += 1;
                if *index < *size {
                    break;
                }
                *index = 0;
            }
        }
        Ok(ordered)
    }
}

impl PickleTensor {
    /// Errors where a tensor is not within its storage, or a storage is not what lies at its place.
    fn of(described: &Described, place: Place) -> Result<Self> {
        let Described { storage, offset, shape, strides } = described;
        let width = storage.dtype.bitsize() as u64 / 8;
        ensure!(
            storage.count.checked_mul(width) == Some(place.size),
            "its storage is said to hold {} numbers of {:?}, and has {} bytes",
            storage.count,
            storage.dtype,
            place.size
        );
        ensure!(shape.len() == strides.len(), "it has {} sizes and {} strides", shape.len(), strides.len());
        let count = shape.iter().try_fold(1_u64, |all, size| all.checked_mul(*size));
        // One that repeats numbers of its storage would make much of little.
        let count = count.filter(|count| *count <= storage.count);
        let count =
            count.with_context(|| format!("it has sizes {shape:?}, more than its storage of {}", storage.count))?;
        let last = if count == 0 {
            Some(0)
        } else {
            shape
                .iter()
                .zip(strides)
                .try_fold(1_u64, |end, (size, stride)| end.checked_add((size - 1).checked_mul(*stride)?))
        };
        let end = last.and_then(|last| last.checked_add(*offset)).filter(|end| *end <= storage.count);
        ensure!(
            end.is_some(),
            "it has sizes {shape:?}, strides {strides:?} and offset {offset}, which lead out of its storage of {} numbers",
            storage.count
        );
        let sizes = |numbers: &[u64]| numbers.iter().map(|number| *number as usize).collect::<Vec<_>>();
        Ok(PickleTensor {
            dtype: storage.dtype,
            shape: sizes(shape),
            strides: sizes(strides),
            start: place.start + offset * width,
            span: last.unwrap_or(0) as usize,
        })
    }

    /// Whether its numbers lie one behind another, the last index running fastest.
    fn is_in_order(&self) -> bool {
        let mut stride = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(size, found)| {
            let is = *size == 1 || *found == stride;
            stride *= size;
            is
        }) && self.span == self.shape.iter().product::<usize>()
    }
}

#[cfg(test)]
mod tests;
