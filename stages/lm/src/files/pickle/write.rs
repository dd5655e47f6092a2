//! Writes what `torch.load` reads, with `weights_only=True` too: the pickle that `torch.save` makes of a `state_dict()`, in
//! protocol 2.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::bail;
use contract::Result;
use contract::files::cannot;
use safetensors::Dtype;

use super::zip;

/// A tensor that is to be written.
pub(crate) struct Saved<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: Vec<usize>,
    /// Number of its storage: that of a tensor before it where both are the same.
    pub(crate) storage: usize,
}

/// Writes a file of tensors of one type, whose storages come from `bytes` one by one.
pub(crate) fn write(
    path: &Path,
    dtype: Dtype,
    tensors: &[Saved<'_>],
    mut bytes: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let failed = |error| cannot("write", path, error);
    let mut archive = zip::Writer::new(BufWriter::new(File::create(path).map_err(failed)?));
    let root = path.file_stem().map_or("archive".into(), |stem| stem.to_string_lossy());
    archive.entry(&format!("{root}/data.pkl"), &program(dtype, tensors)?).map_err(failed)?;
    archive.entry(&format!("{root}/byteorder"), b"little").map_err(failed)?;
    let storages = tensors.iter().map(|tensor| tensor.storage).max().map_or(0, |last| last + 1);
    for storage in 0..storages {
        archive.entry(&format!("{root}/data/{storage}"), &bytes(storage)?).map_err(failed)?;
    }
    archive.entry(&format!("{root}/version"), b"3\n").map_err(failed)?;
    archive.finish().map_err(failed)
}

fn program(dtype: Dtype, tensors: &[Saved<'_>]) -> Result<Vec<u8>> {
    let class = match dtype {
        Dtype::F32 => "FloatStorage",
        Dtype::F16 => "HalfStorage",
        Dtype::BF16 => "BFloat16Storage",
        other => bail!("no tensors of {other:?} are written"),
    };
    let mut out = vec![0x80, 2];
    out.extend(b"ccollections\nOrderedDict\n)R(");
    for Saved { name, shape, storage } in tensors {
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{class}\n").bytes());
        text(&mut out, &storage.to_string());
        text(&mut out, "cpu");
        number(&mut out, shape.iter().product());
        out.extend(b"tQK\0");
        sizes(&mut out, shape.iter().copied());
        let strides = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product());
        sizes(&mut out, strides);
        // It asks for no gradient and has no hooks.
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn number(out: &mut Vec<u8>, number: usize) {
    match i32::try_from(number) {
        Ok(number) => {
            out.push(b'J');
            out.extend(number.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 8]);
            out.extend((number as u64).to_le_bytes());
        }
    }
}

fn sizes(out: &mut Vec<u8>, sizes: impl Iterator<Item = usize>) {
    out.push(b'(');
    sizes.for_each(|size| number(out, size));
    out.push(b't');
}
