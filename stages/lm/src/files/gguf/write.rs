//! Writes GGUF, version 3, a tensor at a time.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, ensure};
use contract::Result;
use contract::files::cannot;

use super::{ARRAY, BOOL, FLOAT32, FORMATS, GgufValue, MAGIC, TEXT};
use crate::terms::format::Format;

/// Where tensors begin: at a multiple of this. It is what readers expect where nothing else is said.
const ALIGNMENT: usize = 32;

/// A tensor that is to be written.
pub(crate) struct Entry {
    pub(crate) name: String,
    /// Sizes in row-major order.
    pub(crate) shape: Vec<usize>,
    pub(crate) format: Format,
}

impl Entry {
    fn bytes(&self) -> Option<usize> {
        // A row is a whole number of blocks.
        self.format.bytes(*self.shape.last()?)?;
        self.format.bytes(self.shape.iter().product())
    }
}

/// Writes a file of metadata, in that order, and of tensors, each as `bytes` of its number gives it.
pub(crate) fn write(
    path: &Path,
    metadata: &[(String, GgufValue)],
    entries: &[Entry],
    mut bytes: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let header = header(3, metadata, entries)?;
    let failed = |error| cannot("write", path, error);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    file.write_all(&header).map_err(failed)?;
    for (index, entry) in entries.iter().enumerate() {
        let mut bytes = bytes(index)?;
        ensure!(Some(bytes.len()) == entry.bytes(), "tensor `{}` has {} bytes", entry.name, bytes.len());
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        file.write_all(&bytes).map_err(failed)?;
    }
    file.flush().map_err(failed)
}

/// What stands before the values.
pub(super) fn header(version: u32, metadata: &[(String, GgufValue)], entries: &[Entry]) -> Result<Vec<u8>> {
    let mut out = MAGIC.to_vec();
    out.extend(version.to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, item) in metadata {
        text(&mut out, key);
        value(&mut out, item);
    }
    let mut offset = 0_u64;
    for entry in entries {
        let bytes =
            entry.bytes().with_context(|| format!("tensor `{}` fills no blocks of {}", entry.name, entry.format))?;
        let number = FORMATS.iter().find(|(_, format)| *format == entry.format).map(|(number, _)| *number);
        text(&mut out, &entry.name);
        out.extend((entry.shape.len() as u32).to_le_bytes());
        out.extend(entry.shape.iter().rev().flat_map(|size| (*size as u64).to_le_bytes()));
        out.extend(number.context("a format without a number")?.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += bytes.next_multiple_of(ALIGNMENT) as u64;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.bytes());
}

/// Whole numbers have 32 bits where they fit, numbers of a list 32 bits with a sign: the types that llama.cpp asks for.
fn value(out: &mut Vec<u8>, value: &GgufValue) {
    fn list<T>(out: &mut Vec<u8>, kind: u32, items: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
        out.extend([ARRAY.to_le_bytes(), kind.to_le_bytes()].concat());
        out.extend((items.len() as u64).to_le_bytes());
        items.iter().for_each(|item| put(out, item));
    }
    let mut one = |kind: u32, bytes: &[u8]| out.extend([&kind.to_le_bytes(), bytes].concat());
    match value {
        GgufValue::Integer(number) => match u32::try_from(*number) {
            Ok(number) => one(4, &number.to_le_bytes()),
            Err(_) => one(11, &(*number as i64).to_le_bytes()),
        },
        GgufValue::Float(number) => one(FLOAT32, &(*number as f32).to_le_bytes()),
        GgufValue::Bool(value) => one(BOOL, &[(*value).into()]),
        GgufValue::Text(item) => {
            out.extend(TEXT.to_le_bytes());
            text(out, item);
        }
        GgufValue::Bytes(bytes) => list(out, 0, bytes, |out, byte| out.push(*byte)),
        GgufValue::Integers(numbers) => list(out, 5, numbers, |out, number| out.extend((*number as i32).to_le_bytes())),
        GgufValue::Floats(numbers) => {
            list(out, FLOAT32, numbers, |out, number| out.extend((*number as f32).to_le_bytes()));
        }
        GgufValue::Bools(values) => list(out, BOOL, values, |out, value| out.push((*value).into())),
        GgufValue::Texts(texts) => list(out, TEXT, texts, |out, item| text(out, item)),
    }
}
