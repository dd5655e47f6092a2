//! Files of tensors: safetensors, in and out, and in alone what `torch.save` writes, GGUF, and the files of llama2.c.
//!
//! A safetensors file of ours may hold quantised matrices, as they lie in GGUF files: a tensor `NAME.Q4_0` of bytes, a row of
//! blocks a row, is the matrix `NAME` in that format. No parameter's name ends so.

use std::borrow::Cow;
use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use contract::Result;
use contract::files::{self, cannot, in_words};
use contract::value::write;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use serde_json::Value as Json;

use super::gguf::{Gguf, GgufModel, ModelTensor, Order, reordered};
use super::llama2c::Llama2cFile;
use super::pickle::PickleFile;
use crate::kernels::buffer::transposed;
use crate::kernels::decode::decode;
use crate::kernels::map::map;
use crate::terms::format::Format;
use crate::weights::encoded::{Bytes, Encoded};

/// Writes tensors as f32 to a safetensors file, with the metadata that PyTorch's readers ask for.
pub(crate) fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a String, &'a Tensor)>,
    metadata: Option<(String, String)>,
) -> Result<()> {
    let tensors = tensors.map(|(name, tensor)| (name.clone(), Parameter::Dense(tensor)));
    write_parameters(path, tensors, metadata)
}

/// A parameter that is to be written.
pub(crate) enum Parameter<'a> {
    /// As f32.
    Dense(&'a Tensor),
    /// As it is.
    Encoded(&'a Encoded),
}

/// The same of parameters, those that are encoded as they are: half floats as such, and blocks as bytes under a name that says
/// their format.
pub(crate) fn write_parameters<'a>(
    path: &Path,
    parameters: impl Iterator<Item = (String, Parameter<'a>)>,
    metadata: Option<(String, String)>,
) -> Result<()> {
    let mut stored = Vec::new();
    for (name, parameter) in parameters {
        stored.push(match parameter {
            Parameter::Dense(tensor) => {
                let values = tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
                let values = values.flatten_all()?.to_vec1::<f32>()?;
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                (name, Dtype::F32, tensor.dims().to_vec(), Cow::Owned(bytes))
            }
            Parameter::Encoded(matrix) => {
                let bytes = Cow::Borrowed(matrix.rows(0..matrix.rows));
                let shape = vec![matrix.rows, matrix.columns];
                match dtype_of(matrix.format) {
                    Some(dtype) => (name, dtype, shape, bytes),
                    None => {
                        let shape = vec![matrix.rows, bytes.len() / matrix.rows.max(1)];
                        (key_of_blocks(&name, matrix.format), Dtype::U8, shape, bytes)
                    }
                }
            }
        });
    }
    let views = stored
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    // One pair only: the order of a hash map must not reach the bytes.
    let (key, value) = metadata.unwrap_or(("format".to_owned(), "pt".to_owned()));
    write(path, &safetensors::serialize(views, Some(HashMap::from([(key, value)])))?)
}

/// A tensor that is going to be written to a safetensors file.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Entry {
    /// Errors where safetensors has no type for the format.
    pub(crate) fn new(name: &str, shape: &[usize], format: Format) -> Result<Self> {
        let dtype = dtype_of(format).with_context(|| format!("safetensors has no type {format}"))?;
        Ok(Entry { name: name.to_owned(), dtype, shape: shape.to_vec() })
    }

    /// Bytes of its numbers.
    pub(crate) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes a safetensors file a tensor at a time, each as `bytes` of its number gives it.
pub(crate) fn write_one_by_one(
    path: &Path,
    entries: &[Entry],
    mut bytes: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut end = 0;
    let infos = entries.iter().map(|entry| {
        let start = end;
        end += entry.bytes();
        let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (start, end) };
        (entry.name.clone(), info)
    });
    let infos = infos.collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut header = serde_json::to_vec(&Metadata::new(Some(metadata), infos)?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let failed = |error| cannot("write", path, error);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(failed)?;
    for (index, entry) in entries.iter().enumerate() {
        let bytes = bytes(index)?;
        ensure!(
            bytes.len() == entry.bytes(),
            "tensor `{}` has {} bytes, expected {}",
            entry.name,
            bytes.len(),
            entry.bytes()
        );
        file.write_all(&bytes).map_err(failed)?;
    }
    file.flush().map_err(failed)
}

/// All tensors of a safetensors file as f32, by name, and its metadata.
pub(crate) fn read_tensors(
    path: &Path,
    device: &Device,
) -> Result<(BTreeMap<String, Tensor>, HashMap<String, String>)> {
    let file = TensorFile::open(path)?;
    let read = |stored: &Stored| {
        let Stored { name, shape, .. } = stored;
        Ok((name.clone(), Tensor::from_vec(file.values(stored)?, shape.as_slice(), device)?))
    };
    let tensors = file.tensors()?.iter().map(read).collect::<Result<_>>()?;
    Ok((tensors, file.metadata()))
}

/// Writes JSON for people and programs.
pub(crate) fn write_json(path: &Path, json: &Json) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(json)?;
    text.push(b'\n');
    write(path, &text)
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    files::read(path, files::WEIGHTS)
}

/// A file of tensors whose values stay on disk until they are asked for.
pub(crate) struct TensorFile {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Safetensors { file: RefCell<File>, start: u64, header: Metadata, mapped: OnceCell<Arc<Mmap>> },
    Pickle(PickleFile),
    Llama2c(Llama2cFile),
    Gguf { file: Gguf, tensors: Vec<ModelTensor> },
}

/// What a file says of a tensor before its values are read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    written: Written,
}

/// How the numbers of a tensor are written.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Written {
    As(Dtype),
    /// In blocks of few bits a number.
    Quantised(Format),
}

impl TensorFile {
    /// Reads what is in a file, and no values. A file that begins as GGUF does is one, whatever it is called, and its tensors go
    /// by the names that Hugging Face gives them; one that ends in `.bin` is one of PyTorch's.
    ///
    /// Errors when it is cut short, or not what its ending says.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if Gguf::is(path) {
            return Ok(TensorFile::open_gguf(path)?.0);
        }
        let kind = if path.extension().is_some_and(|extension| extension == "bin") {
            Kind::Pickle(PickleFile::open(path)?)
        } else {
            safetensors(path)?
        };
        Ok(TensorFile { path: path.to_owned(), kind })
    }

    /// A file of llama2.c, with the `config.json` that it stands for.
    pub(crate) fn open_llama2c(path: &Path) -> Result<(Self, Json)> {
        let (file, config) = Llama2cFile::open(path)?;
        Ok((TensorFile { path: path.to_owned(), kind: Kind::Llama2c(file) }, config))
    }

    /// The same of a GGUF file (or of all of a split one), with the `config.json` that it stands for.
    pub(crate) fn open_gguf(path: &Path) -> Result<(Self, Json)> {
        let file = Gguf::open(path)?;
        let GgufModel { config, tensors } = GgufModel::of(&file)?;
        Ok((TensorFile { path: path.to_owned(), kind: Kind::Gguf { file, tensors } }, config))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is safetensors, or GGUF: what a folder of ours may hold.
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self.kind, Kind::Safetensors { .. } | Kind::Gguf { .. })
    }

    /// Whether it is safetensors.
    pub(crate) fn is_safetensors(&self) -> bool {
        matches!(self.kind, Kind::Safetensors { .. })
    }

    /// The files that a GGUF model is in.
    pub(crate) fn gguf_parts(&self) -> Option<Vec<&Path>> {
        match &self.kind {
            Kind::Gguf { file, .. } => Some(file.paths().collect()),
            _ => None,
        }
    }

    fn metadata(&self) -> HashMap<String, String> {
        match &self.kind {
            Kind::Safetensors { header, .. } => header.metadata().clone().unwrap_or_default(),
            _ => HashMap::new(),
        }
    }

    /// Its tensors, in the order of their values or of their names.
    ///
    /// Errors where one is of a type that has no name here; whether its numbers can be read is asked of
    /// [`Stored::check_dtype`].
    pub(crate) fn tensors(&self) -> Result<Vec<Stored>> {
        let tensors = match &self.kind {
            Kind::Safetensors { header, .. } => header
                .offset_keys()
                .into_iter()
                .map(|name| {
                    let info = header.info(&name).context("a tensor without a place")?;
                    match blocks(&name, info) {
                        None => Ok(Stored { name, shape: info.shape.clone(), written: Written::As(info.dtype) }),
                        Some(stored) => stored.with_context(|| format!("tensor `{name}` in `{}`", self.path.display())),
                    }
                })
                .collect::<Result<Vec<_>>>()?,
            Kind::Pickle(file) => {
                let stored = file.tensors().iter().map(|(name, tensor)| Stored {
                    name: name.clone(),
                    shape: tensor.shape.clone(),
                    written: Written::As(tensor.dtype),
                });
                stored.collect()
            }
            Kind::Llama2c(file) => {
                let stored = file.tensors().iter().map(|tensor| Stored {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    written: Written::As(Dtype::F32),
                });
                stored.collect()
            }
            Kind::Gguf { file, tensors } => {
                let stored = tensors.iter().map(|tensor| {
                    let format = match tensor.order {
                        Order::Transposed => Format::F32,
                        _ => file.tensors()[tensor.index].format,
                    };
                    let written = dtype_of(format).map_or(Written::Quantised(format), Written::As);
                    Stored { name: tensor.name.clone(), shape: tensor.shape(file), written }
                });
                stored.collect()
            }
        };
        Ok(tensors)
    }

    /// The values of a tensor as f32, in row-major order.
    pub(crate) fn values(&self, stored: &Stored) -> Result<Vec<f32>> {
        let name = &stored.name;
        let values = match (&self.kind, stored.written) {
            (Kind::Safetensors { .. }, Written::Quantised(_)) => self.encoded(stored).and_then(|matrix| {
                let matrix = matrix.context("a tensor without a place")?;
                let mut values = vec![0.0; matrix.rows * matrix.columns];
                matrix.decode(0..matrix.rows, &mut values);
                Ok(values)
            }),
            (Kind::Safetensors { file, start, header, .. }, Written::As(dtype)) => {
                let info = header.info(name).context("a tensor without a place")?;
                let (from, to) = info.data_offsets;
                let mut file = file.borrow_mut();
                file.seek(SeekFrom::Start(start + from as u64))
                    .map_err(anyhow::Error::from)
                    .and_then(|_| to_f32(dtype, &mut *file, to - from))
            }
            (Kind::Pickle(file), Written::As(dtype)) => {
                file.bytes(name).and_then(|bytes| to_f32(dtype, &mut bytes.as_slice(), bytes.len()))
            }
            (Kind::Llama2c(file), _) => file.values(name),
            (Kind::Gguf { file, tensors }, _) => from_gguf(file, tensors, name),
            (Kind::Pickle(_), Written::Quantised(_)) => unreachable!("PyTorch's files hold plain numbers"),
        };
        values.with_context(|| format!("cannot read tensor `{name}` in `{}`", self.path.display()))
    }

    /// A matrix of half floats, or a quantised one, as it lies in the file; `None` for all else.
    pub(crate) fn encoded(&self, stored: &Stored) -> Result<Option<Encoded>> {
        let format = stored.format();
        if format == Format::F32 {
            return Ok(None);
        }
        let [rows, columns] = stored.shape[..] else { return Ok(None) };
        if let Kind::Gguf { file, tensors } = &self.kind {
            let ModelTensor { index, order, .. } = named(tensors, &stored.name)?;
            let bytes = Bytes::Owned(file.read_all(&file.tensors()[*index])?.into());
            let matrix = Encoded::new(format, rows, columns, bytes)?;
            return Ok(Some(match order {
                Order::Rows(order) => matrix.reordered(order),
                _ => matrix,
            }));
        }
        let Kind::Safetensors { file, start, header, mapped } = &self.kind else { return Ok(None) };
        let key = match stored.written {
            Written::As(_) => stored.name.clone(),
            Written::Quantised(format) => key_of_blocks(&stored.name, format),
        };
        let info = header.info(&key).context("a tensor without a place")?;
        let bytes = match mapped.get() {
            Some(bytes) => bytes.clone(),
            None => {
                let bytes = map(&file.borrow()).map_err(|error| cannot("read", &self.path, error))?;
                mapped.get_or_init(|| Arc::new(bytes)).clone()
            }
        };
        let (from, to) = info.data_offsets;
        let place = *start as usize + from..*start as usize + to;
        ensure!(place.end <= bytes.len(), "`{}` was cut short while it was read", self.path.display());
        Ok(Some(Encoded::new(format, rows, columns, Bytes::Mapped(bytes, place))?))
    }
}

/// The type of a format's numbers, where they are no blocks.
pub(crate) fn dtype_of(format: Format) -> Option<Dtype> {
    match format {
        Format::F32 => Some(Dtype::F32),
        Format::F16 => Some(Dtype::F16),
        Format::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

impl Stored {
    /// The format of its numbers; wider types count as f32, which is what they are read as.
    pub(crate) fn format(&self) -> Format {
        match self.written {
            Written::As(Dtype::F16) => Format::F16,
            Written::As(Dtype::BF16) => Format::BF16,
            Written::As(_) => Format::F32,
            Written::Quantised(format) => format,
        }
    }

    /// Errors where its numbers are none that this crate reads.
    pub(crate) fn check_dtype(&self) -> Result<()> {
        match self.written {
            Written::As(Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) | Written::Quantised(_) => Ok(()),
            Written::As(other) => bail!("has type {other:?}, expected F32, F16, BF16 or F64"),
        }
    }
}

/// The tensor of a safetensors file in which the blocks of a matrix lie.
fn key_of_blocks(name: &str, format: Format) -> String {
    format!("{name}.{format}")
}

/// The matrix whose blocks a tensor of a safetensors file holds, where its name says so.
fn blocks(key: &str, info: &TensorInfo) -> Option<Result<Stored>> {
    let (name, spelt) = key.rsplit_once('.')?;
    let format = Format::ALL.into_iter().find(|format| format.is_quantised() && format.name() == spelt)?;
    let (Dtype::U8, [rows, bytes]) = (info.dtype, &info.shape[..]) else {
        return Some(Err(anyhow!("it has type {:?} and shape {:?}: expected rows of bytes", info.dtype, info.shape)));
    };
    if !bytes.is_multiple_of(format.block_bytes()) {
        return Some(Err(anyhow!("it has rows of {bytes} bytes, which are no blocks of {format}")));
    }
    let shape = vec![*rows, bytes / format.block_bytes() * format.block()];
    Some(Ok(Stored { name: name.to_owned(), shape, written: Written::Quantised(format) }))
}

fn named<'a>(tensors: &'a [ModelTensor], name: &str) -> Result<&'a ModelTensor> {
    tensors.iter().find(|tensor| tensor.name == name).context("a tensor without a place")
}

/// The numbers of a tensor as they stand in Hugging Face checkpoints.
fn from_gguf(file: &Gguf, tensors: &[ModelTensor], name: &str) -> Result<Vec<f32>> {
    let ModelTensor { index, order, .. } = named(tensors, name)?;
    let tensor = &file.tensors()[*index];
    let bytes = file.read_all(tensor)?;
    let mut values = vec![0.0; tensor.shape.iter().product()];
    decode(tensor.format, &bytes, &mut values);
    Ok(match (order, &tensor.shape[..]) {
        (Order::Rows(order), _) => reordered(&values, order),
        (Order::Transposed, [rows, columns]) => transposed(&values, *columns, *rows, *columns, *rows),
        _ => values,
    })
}

fn safetensors(path: &Path) -> Result<Kind> {
    let file = files::open(path, files::WEIGHTS)?;
    let (length, mut file) = (file.size(), file.into_file());
    let (start, header) = read_header(&mut file, length)
        .map_err(|e| anyhow!("`{}` is not a whole safetensors file ({e:#}): get it again", path.display()))?;
    Ok(Kind::Safetensors { file: RefCell::new(file), start, header, mapped: OnceCell::new() })
}

/// Most bytes of a header: what the format allows.
const HEADER: u64 = 100_000_000;

/// Where the values begin, and what the header says of them.
fn read_header(file: &mut impl Read, length: u64) -> Result<(u64, Metadata)> {
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(|_| anyhow!("it has {length} bytes"))?;
    let size = u64::from_le_bytes(size);
    ensure!(size <= length.saturating_sub(8), "its header is cut off");
    ensure!(size <= HEADER, "its header has {}, and at most {} are read", in_words(size), in_words(HEADER));
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header)?;
    let header: Metadata = serde_json::from_slice(&header)?;
    let expected = 8 + size + header.data_len() as u64;
    ensure!(length == expected, "it has {length} bytes, and by its header {expected}");
    Ok((8 + size, header))
}

/// The values that the next `bytes` of a file hold.
fn to_f32(dtype: Dtype, file: &mut impl Read, bytes: usize) -> Result<Vec<f32>> {
    fn words<const N: usize>(file: &mut impl Read, bytes: usize, parse: impl Fn([u8; N]) -> f32) -> Result<Vec<f32>> {
        /// Bytes read at a time, a multiple of every size of a number.
        const PIECE: usize = 1 << 20;
        let mut values = Vec::new();
        values.try_reserve_exact(bytes / N).context("there is no memory for it")?;
        let mut piece = vec![0; PIECE.min(bytes)];
        let mut left = bytes;
        while left > 0 {
            let piece = &mut piece[..PIECE.min(left)];
            file.read_exact(piece)?;
            values.extend(piece.chunks_exact(N).map(|word| parse(word.try_into().expect("chunks are of size N"))));
            left -= piece.len();
        }
        Ok(values)
    }
    match dtype {
        Dtype::F32 => words(file, bytes, f32::from_le_bytes),
        Dtype::F16 => words(file, bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => words(file, bytes, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F64 => words(file, bytes, |b| f64::from_le_bytes(b) as f32),
        other => bail!("it has type {other:?}, expected F32, F16, BF16 or F64"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::kernels::encode::encode;
    use crate::kernels::testing::numbers;

    fn file(header: &str, values: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), values].concat()
    }

    fn open(bytes: &[u8]) -> Result<TensorFile> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        TensorFile::open(file.path())
    }

    /// Opens bytes and, where they are a file, reads all of it: of what is there no more than the file is long can come.
    fn exhaust(bytes: &[u8]) {
        let Ok(file) = open(bytes) else { return };
        let Ok(tensors) = file.tensors() else { return };
        for stored in tensors.iter().filter(|stored| stored.check_dtype().is_ok()) {
            // A block of 256 numbers has 84 bytes at least.
            if let Ok(values) = file.values(stored) {
                assert!(values.len() == stored.shape.iter().product::<usize>() && values.len() <= 4 * bytes.len());
            }
            _ = file.encoded(stored);
        }
    }

    fn sample() -> Vec<u8> {
        let header = r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F16","shape":[2,2],"data_offsets":[24,32]},"c.weight.Q8_0":{"dtype":"U8","shape":[2,34],"data_offsets":[32,100]}}"#;
        file(header, &[1; 100])
    }

    #[test]
    fn blocks_are_kept_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        for format in Format::ALL {
            let bytes = encode(format, &numbers(3, 3 * 512)).unwrap();
            let matrix = Encoded::new(format, 3, 512, Bytes::Owned(bytes.clone().into())).unwrap();
            let norm = Tensor::new(&[1.0_f32, 2.0], &Device::Cpu).unwrap();
            let parameters = [("w".to_owned(), Parameter::Encoded(&matrix)), ("n".to_owned(), Parameter::Dense(&norm))];
            write_parameters(&path, parameters.into_iter(), None).unwrap();
            let file = TensorFile::open(&path).unwrap();
            let stored = file.tensors().unwrap().into_iter().find(|stored| stored.name == "w").unwrap();
            assert_eq!((stored.shape.as_slice(), stored.format()), (&[3, 512][..], format));
            if format != Format::F32 {
                let read = file.encoded(&stored).unwrap().unwrap();
                assert!(read.format == format && read.rows(0..3) == bytes, "{format}");
            }
            let values = matrix.tensor(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(file.values(&stored).unwrap() == values, "{format}");
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let error = |bytes: &[u8]| {
            let error = open(bytes).and_then(|file| file.tensors().map(drop)).unwrap_err();
            format!("{error:#}")
        };
        let entry = |shape: &str, dtype: &str, places: &str| {
            let name = if dtype == "U8" { "w.Q4_0" } else { "w" };
            file(&format!(r#"{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{places}}}}}"#), &[0; 36])
        };
        let cases = [
            (
                include_bytes!("../../../../tests/fixtures/checkpoint/hostile/header.safetensors").to_vec(),
                "its header is cut off",
            ),
            (
                include_bytes!("../../../../tests/fixtures/checkpoint/hostile/overlap.safetensors").to_vec(),
                "is not a whole",
            ),
            (entry("[9]", "F32", "[0,36]"), ""),
            (entry("[10]", "F32", "[0,36]"), "is not a whole"),
            (entry("[9]", "F32", "[4,40]"), "is not a whole"),
            (entry("[4294967296,4294967296,4294967296]", "F32", "[0,36]"), "is not a whole"),
            (entry("[2,18]", "U8", "[0,36]"), ""),
            (entry("[3,12]", "U8", "[0,36]"), "rows of 12 bytes, which are no blocks of Q4_0"),
            (entry("[36]", "U8", "[0,36]"), "expected rows of bytes"),
            (b"\x10\0\0\0\0\0\0\0{\"a\":".to_vec(), "its header is cut off"),
        ];
        for (bytes, expected) in cases {
            if expected.is_empty() {
                open(&bytes).unwrap().tensors().unwrap();
            } else {
                let error = error(&bytes);
                assert!(error.contains(expected), "{expected}: {error}");
            }
        }
        exhaust(&sample());
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(
            text in r#"(\{|\}|\[|\]|,|:|"a"|"w.Q4_0"|"dtype"|"shape"|"data_offsets"|"F32"|"U8"|"F16"|-?[0-9]{1,20}|null){0,40}"#,
            values in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            exhaust(&file(&text, &values));
        }

        #[test]
        fn no_sizes_lead_out_of_a_file(
            axes in prop::collection::vec(prop_oneof![0_u64..20, any::<u64>()], 0..4),
            from in prop_oneof![0_u64..40, any::<u64>()],
            to in prop_oneof![0_u64..40, any::<u64>()],
            dtype in prop::sample::select(vec!["F32", "F16", "BF16", "F64", "U8", "I64", "F4"]),
            name in prop::sample::select(vec!["w", "w.Q4_0", "w.Q6_K", ".Q8_0"]),
            count in 0_usize..40,
        ) {
            let header = format!(r#"{{"{name}":{{"dtype":"{dtype}","shape":{axes:?},"data_offsets":[{from},{to}]}}}}"#);
            exhaust(&file(&header, &vec![7; count]));
        }

        #[test]
        fn no_change_of_a_file_makes_it_panic(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            end in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = sample();
            for (place, byte) in changes {
                let length = bytes.len();
                bytes[place.index(length)] = byte;
            }
            if let Some(end) = end {
                bytes.truncate(end.index(bytes.len()));
            }
            exhaust(&bytes);
        }
    }
}
