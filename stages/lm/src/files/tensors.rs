//! Files of tensors: safetensors, in and out, and in alone what `torch.save` writes, and GGUF.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::pickle::PthTensors;
use candle_core::{DType, Device, Tensor};
use contract::Result;
use contract::files::{self, cannot, in_words};
use contract::value::write;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use serde_json::Value as Json;

use super::gguf::{Gguf, GgufModel, ModelTensor, row_order};
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
    let mut stored = Vec::new();
    for (name, tensor) in tensors {
        let values = tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        stored.push((name.as_str(), tensor.dims().to_vec(), bytes));
    }
    let views =
        stored.iter().map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    // One pair only: the order of a hash map must not reach the bytes.
    let (key, value) = metadata.unwrap_or(("format".to_owned(), "pt".to_owned()));
    write(path, &safetensors::serialize(views, Some(HashMap::from([(key, value)])))?)
}

/// All tensors of a safetensors file as f32, by name, and its metadata.
pub(crate) fn read_tensors(
    path: &Path,
    device: &Device,
) -> Result<(BTreeMap<String, Tensor>, HashMap<String, String>)> {
    let file = TensorFile::open(path)?;
    let read = |Stored { name, shape, .. }: &Stored| {
        Ok((name.clone(), Tensor::from_vec(file.values(name)?, shape.as_slice(), device)?))
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
    Pickle(PthTensors),
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
            pickle(path)?
        } else {
            safetensors(path)?
        };
        Ok(TensorFile { path: path.to_owned(), kind })
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

    /// Whether it has to be unpacked by PyTorch's rules.
    pub(crate) fn is_pickle(&self) -> bool {
        matches!(self.kind, Kind::Pickle(_))
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
            Kind::Pickle(_) | Kind::Gguf { .. } => HashMap::new(),
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
                    Ok(Stored { name, shape: info.shape.clone(), written: Written::As(info.dtype) })
                })
                .collect::<Result<Vec<_>>>()?,
            Kind::Pickle(file) => {
                let infos: BTreeMap<_, _> = file.tensor_infos().iter().collect();
                let stored = infos.into_iter().map(|(name, info)| {
                    let dtype = match info.dtype {
                        DType::F32 => Dtype::F32,
                        DType::F16 => Dtype::F16,
                        DType::BF16 => Dtype::BF16,
                        DType::F64 => Dtype::F64,
                        DType::I64 => Dtype::I64,
                        DType::U8 => Dtype::U8,
                        other => bail!("tensor `{name}` in `{}` has type {other:?}", self.path.display()),
                    };
                    let shape = info.layout.shape().dims().to_vec();
                    Ok(Stored { name: name.clone(), shape, written: Written::As(dtype) })
                });
                stored.collect::<Result<_>>()?
            }
            Kind::Gguf { file, tensors } => {
                let stored = tensors.iter().map(|ModelTensor { index, name, .. }| {
                    let tensor = &file.tensors()[*index];
                    let written = match tensor.format {
                        Format::F32 => Written::As(Dtype::F32),
                        Format::F16 => Written::As(Dtype::F16),
                        Format::BF16 => Written::As(Dtype::BF16),
                        quantised => Written::Quantised(quantised),
                    };
                    Stored { name: name.clone(), shape: tensor.shape.clone(), written }
                });
                stored.collect()
            }
        };
        Ok(tensors)
    }

    /// The values of a tensor as f32, in row-major order.
    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let values = match &self.kind {
            Kind::Safetensors { file, start, header, .. } => {
                let info = header.info(name).context("a tensor without a place")?;
                let (from, to) = info.data_offsets;
                let mut file = file.borrow_mut();
                file.seek(SeekFrom::Start(start + from as u64))
                    .map_err(anyhow::Error::from)
                    .and_then(|_| to_f32(info.dtype, &mut *file, to - from))
            }
            Kind::Pickle(file) => unpack(file, name),
            Kind::Gguf { file, tensors } => from_gguf(file, tensors, name),
        };
        values.with_context(|| format!("cannot read tensor `{name}` in `{}`", self.path.display()))
    }

    /// A matrix of half floats, or a quantised one, as it lies in the file; `None` for all else.
    pub(crate) fn encoded(&self, stored: &Stored) -> Result<Option<Encoded>> {
        let format = match stored.written {
            Written::As(Dtype::F16) => Format::F16,
            Written::As(Dtype::BF16) => Format::BF16,
            Written::As(_) => return Ok(None),
            Written::Quantised(format) => format,
        };
        let [rows, columns] = stored.shape[..] else { return Ok(None) };
        if let Kind::Gguf { file, tensors } = &self.kind {
            let ModelTensor { index, interleaved_heads, .. } = named(tensors, &stored.name)?;
            let bytes = Bytes::Owned(file.read_all(&file.tensors()[*index])?.into());
            let matrix = Encoded::new(format, rows, columns, bytes)?;
            return Ok(Some(match interleaved_heads {
                Some(heads) => matrix.reordered(&row_order(rows, *heads)),
                None => matrix,
            }));
        }
        let Kind::Safetensors { file, start, header, mapped } = &self.kind else { return Ok(None) };
        let info = header.info(&stored.name).context("a tensor without a place")?;
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

    /// Writes all of it as a safetensors file, a tensor at a time.
    pub(crate) fn convert(&self, to: &Path) -> Result<()> {
        let tensors = self.tensors()?;
        let mut infos = Vec::with_capacity(tensors.len());
        let mut end = 0;
        for Stored { name, shape, written } in &tensors {
            let start = end;
            let dtype = kept(*written);
            end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
            infos.push((name.clone(), TensorInfo { dtype, shape: shape.clone(), data_offsets: (start, end) }));
        }
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut header = serde_json::to_vec(&Metadata::new(Some(metadata), infos)?)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let failed = |error| cannot("write", to, error);
        let mut file = BufWriter::new(File::create(to).map_err(failed)?);
        file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(failed)?;
        for Stored { name, written, .. } in &tensors {
            let values = self.values(name)?;
            let bytes: Vec<u8> = match kept(*written) {
                Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
                Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
            file.write_all(&bytes).map_err(failed)?;
        }
        file.flush().map_err(failed)
    }
}

impl Stored {
    /// Errors where its numbers are none that this crate reads.
    pub(crate) fn check_dtype(&self) -> Result<()> {
        match self.written {
            Written::As(Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) | Written::Quantised(_) => Ok(()),
            Written::As(other) => bail!("has type {other:?}, expected F32, F16, BF16 or F64"),
        }
    }
}

/// The type in which numbers of a type are kept: all that is read of them fits.
fn kept(written: Written) -> Dtype {
    match written {
        Written::As(dtype @ (Dtype::F16 | Dtype::BF16)) => dtype,
        _ => Dtype::F32,
    }
}

fn named<'a>(tensors: &'a [ModelTensor], name: &str) -> Result<&'a ModelTensor> {
    tensors.iter().find(|tensor| tensor.name == name).context("a tensor without a place")
}

/// The numbers of a tensor, its rows in the order of Hugging Face.
fn from_gguf(file: &Gguf, tensors: &[ModelTensor], name: &str) -> Result<Vec<f32>> {
    let ModelTensor { index, interleaved_heads, .. } = named(tensors, name)?;
    let tensor = &file.tensors()[*index];
    let bytes = file.read_all(tensor)?;
    let mut values = vec![0.0; tensor.shape.iter().product()];
    decode(tensor.format, &bytes, &mut values);
    let Some(heads) = interleaved_heads else { return Ok(values) };
    let rows = tensor.shape[0];
    let width = values.len() / rows;
    Ok(row_order(rows, *heads).iter().flat_map(|row| &values[row * width..][..width]).copied().collect())
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

fn pickle(path: &Path) -> Result<Kind> {
    let advice = "expected what `torch.save` of PyTorch 1.6 or later writes; convert the model to safetensors";
    // For what is no regular file, or none that can be read.
    files::open(path, files::WEIGHTS)?;
    let file = PthTensors::new(path, None).with_context(|| format!("cannot read `{}`: {advice}", path.display()))?;
    ensure!(!file.tensor_infos().is_empty(), "no tensors in `{}`: {advice}", path.display());
    Ok(Kind::Pickle(file))
}

fn unpack(file: &PthTensors, name: &str) -> Result<Vec<f32>> {
    let tensor = file.get(name)?.context("its values are not there")?;
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// The values that the next `bytes` of a file hold.
fn to_f32(dtype: Dtype, file: &mut impl Read, bytes: usize) -> Result<Vec<f32>> {
    fn words<const N: usize>(file: &mut impl Read, bytes: usize, parse: impl Fn([u8; N]) -> f32) -> Result<Vec<f32>> {
        /// Bytes read at a time, a multiple of every size of a number.
        const PIECE: usize = 1 << 20;
        let mut values = Vec::with_capacity(bytes / N);
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
