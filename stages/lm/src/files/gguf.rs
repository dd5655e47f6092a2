//! GGUF, the files of llama.cpp: metadata, and tensors whose values stay on disk until they are asked for.
//!
//! Versions 2 and 3 in the little-endian order, as one file or split into several. A file is not to be believed: what it says
//! of lengths and places is held against its size before anything is read or allocated.
//!
//! Source: the specification, `docs/gguf.md` in the repository `ggml-org/ggml`, and `ggml-common.h` for the sizes of blocks.

pub(crate) mod convert;
mod model;
pub(crate) mod write;

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use contract::Result;
use contract::files::{self, cannot, in_words};
use indexmap::IndexMap;

use crate::terms::format::Format;

pub(crate) use self::model::reordered;
pub use self::model::{GgufModel, ModelTensor, Order, row_order};

/// An open GGUF file, or all files of a split one.
#[derive(Debug)]
pub struct Gguf {
    /// The files, in the order of their numbers.
    parts: Vec<Part>,
    metadata: IndexMap<String, GgufValue>,
    tensors: Vec<GgufTensor>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// A whole number of any type.
    Integer(i128),
    /// A number of either type. Those of 32 bits are the decimal number that was meant: 1e-5, not 9.999999747378752e-6.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// A text.
    Text(String),
    /// Numbers of 8 bits, signed ones as they lie in memory.
    Bytes(Vec<u8>),
    /// Whole numbers of 16 bits and more.
    Integers(Vec<i64>),
    /// Numbers of either type, as above.
    Floats(Vec<f64>),
    /// Yes or no, several times.
    Bools(Vec<bool>),
    /// Texts.
    Texts(Vec<String>),
}

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Its name, as llama.cpp has it.
    pub name: String,
    /// Sizes in row-major order, `[out, in]` for a matrix: the reverse of what the file says.
    pub shape: Vec<usize>,
    /// How its numbers are written.
    pub format: Format,
    /// Its first byte, counted from the beginning of its file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Number of its file.
    part: usize,
}

/// The formats of numbers that are read, by their numbers in files.
const FORMATS: [(u32, Format); 13] = [
    (0, Format::F32),
    (1, Format::F16),
    (2, Format::Q4_0),
    (3, Format::Q4_1),
    (6, Format::Q5_0),
    (7, Format::Q5_1),
    (8, Format::Q8_0),
    (10, Format::Q2K),
    (11, Format::Q3K),
    (12, Format::Q4K),
    (13, Format::Q5K),
    (14, Format::Q6K),
    (30, Format::BF16),
];

/// Names of types that are known and not read, for messages.
const OTHER_TYPES: [(u32, &str); 20] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

fn format_of(number: u32) -> Result<Format> {
    let known = FORMATS.iter().find(|(known, _)| *known == number).map(|(_, format)| *format);
    known.ok_or_else(|| {
        let name = OTHER_TYPES.iter().find(|(other, _)| *other == number).map_or("unknown", |(_, name)| name);
        let names: Vec<_> = FORMATS.iter().map(|(_, format)| format.name()).collect();
        anyhow!("has type {number} ({name}): expected one of {}", names.join(", "))
    })
}

impl GgufTensor {
    /// Bytes of a row, which is what the last size counts.
    pub fn row_bytes(&self) -> usize {
        self.shape.last().copied().unwrap_or(1) / self.format.block() * self.format.block_bytes()
    }
}

/// Most bytes of metadata and of what is said of tensors. The largest vocabularies take a tenth of it.
const HEADER: u64 = 128 << 20;
/// Sizes that a tensor may have.
const DIMENSIONS: u32 = 4;
/// Most files that a model may be split into.
const PARTS: usize = 4096;

impl Gguf {
    /// Whether a file begins as GGUF does. A file that cannot be read does not.
    pub fn is(path: &Path) -> bool {
        let mut magic = [0; 4];
        let file = files::open(path, files::WEIGHTS).map(files::Input::into_file);
        file.is_ok_and(|mut file| file.read_exact(&mut magic).is_ok() && magic == *MAGIC)
    }

    /// The GGUF file that `path` is or, of a folder, the only one that it holds: of a split one the first part.
    ///
    /// Errors where a folder cannot be read, or holds several models.
    pub fn at(path: &Path) -> Result<Option<PathBuf>> {
        if !path.is_dir() {
            return Ok(Gguf::is(path).then(|| path.to_owned()));
        }
        let entries = std::fs::read_dir(path).map_err(|error| cannot("read", path, error))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| name.ends_with(".gguf")).collect();
        names.sort();
        let other_parts = |name: &String| name.contains("-of-") && !name.contains("-00001-of-");
        if names.iter().any(|name| name.contains("-00001-of-")) {
            names.retain(|name| !other_parts(name));
        }
        match &names[..] {
            [] => Ok(None),
            [name] => Ok(Some(path.join(name))),
            _ => {
                let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
                bail!("`{}` holds several models, {}: name the file of one", path.display(), names.join(", "))
            }
        }
    }

    /// Reads what is in a file, and no values of tensors. Of a split model any of the files, `NAME-00001-of-00003.gguf`,
    /// opens all of them; the metadata is that of the first.
    ///
    /// Errors where a file is cut short, is of another version or byte order, or says what cannot be; they name the file.
    pub fn open(path: &Path) -> Result<Self> {
        let paths = parts(path)?;
        let count = paths.len();
        let mut whole = Gguf { parts: Vec::new(), metadata: IndexMap::new(), tensors: Vec::new() };
        let mut names = HashSet::new();
        for (index, path) in paths.into_iter().enumerate() {
            let file = files::open(&path, files::WEIGHTS)?;
            let (size, file) = (file.size(), file.into_file());
            let wrong = |error| anyhow!("`{}` is not a whole GGUF file ({error:#}): get it again", path.display());
            let header = Header::read(&file, size, index).map_err(wrong)?;
            let place = (header.integer("split.no").unwrap_or(0), header.integer("split.count").unwrap_or(1).max(1));
            ensure!(
                place == (index as u64, count as u64),
                "`{}` says that it is file {} of {}: by its name it is file {} of {count}",
                path.display(),
                place.0 + 1,
                place.1,
                index + 1
            );
            for tensor in &header.tensors {
                let is_new = names.insert(tensor.name.clone());
                ensure!(is_new, "`{}` has tensor `{}`, which is there twice", path.display(), tensor.name);
            }
            if index == 0 {
                whole.metadata = header.metadata;
            }
            whole.tensors.extend(header.tensors);
            whole.parts.push(Part { path, file });
        }
        if let Some(expected) = whole.integer("split.tensors.count") {
            ensure!(
                expected == whole.tensors.len() as u64,
                "`{}` and the files beside it hold {} tensors, and by its header {expected}",
                whole.path().display(),
                whole.tensors.len()
            );
        }
        Ok(whole)
    }

    /// The file, or the first one.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// All files, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// A value of the metadata.
    pub fn metadata(&self, key: &str) -> Option<&GgufValue> {
        self.metadata.get(key)
    }

    /// A text of the metadata; `None` where there is none or it is something else, as for those below.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata(key).and_then(GgufValue::text)
    }

    /// A whole number that is not negative.
    pub fn integer(&self, key: &str) -> Option<u64> {
        self.metadata(key).and_then(GgufValue::integer)
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata(key)? {
            GgufValue::Float(number) => Some(*number),
            GgufValue::Integer(number) => Some(*number as f64),
            _ => None,
        }
    }

    /// Yes or no.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata(key)? {
            GgufValue::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// Several texts.
    pub fn texts(&self, key: &str) -> Option<&[String]> {
        match self.metadata(key)? {
            GgufValue::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    /// Several whole numbers.
    pub fn integers(&self, key: &str) -> Option<&[i64]> {
        match self.metadata(key)? {
            GgufValue::Integers(numbers) => Some(numbers),
            _ => None,
        }
    }

    /// Several numbers.
    pub fn floats(&self, key: &str) -> Option<&[f64]> {
        match self.metadata(key)? {
            GgufValue::Floats(numbers) => Some(numbers),
            _ => None,
        }
    }

    /// Several bytes.
    pub fn bytes(&self, key: &str) -> Option<&[u8]> {
        match self.metadata(key)? {
            GgufValue::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// Reads bytes of a tensor of this file, `from` the one of that number on, until the buffer is full. Any number of threads
    /// may do so at once.
    ///
    /// Errors where the file has become shorter.
    ///
    /// # Panics
    ///
    /// Where more is asked for than the tensor has.
    pub fn read(&self, tensor: &GgufTensor, from: u64, buffer: &mut [u8]) -> Result<()> {
        assert!(from.saturating_add(buffer.len() as u64) <= tensor.bytes, "more bytes than `{}` has", tensor.name);
        let Part { path, file } = &self.parts[tensor.part];
        file.read_exact_at(buffer, tensor.offset + from)
            .map_err(|error| cannot("read", path, error).context(format!("tensor `{}`", tensor.name)))
    }

    /// All bytes of a tensor.
    pub fn read_all(&self, tensor: &GgufTensor) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let length = usize::try_from(tensor.bytes).ok();
        length.and_then(|length| bytes.try_reserve_exact(length).ok()).with_context(|| {
            format!("tensor `{}` has {}, more than there is memory for", tensor.name, in_words(tensor.bytes))
        })?;
        bytes.resize(tensor.bytes as usize, 0);
        self.read(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }
}

impl GgufValue {
    fn text(&self) -> Option<&str> {
        match self {
            GgufValue::Text(text) => Some(text),
            _ => None,
        }
    }

    fn integer(&self) -> Option<u64> {
        match self {
            GgufValue::Integer(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }
}

/// The paths of all files of a model, from that of one.
fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    let numbers = path.file_name().and_then(|name| name.to_str()).and_then(|name| {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let number_of = |text: &str| (text.len() == 5).then(|| text.parse::<usize>().ok()).flatten();
        Some((stem, number_of(number)?, number_of(count)?))
    });
    let Some((stem, number, count)) = numbers else { return Ok(vec![path.to_owned()]) };
    ensure!((1..=count).contains(&number), "`{}` has no number from 1 to {count}", path.display());
    ensure!(count <= PARTS, "`{}` is one of {count} files: at most {PARTS} are read", path.display());
    Ok((1..=count).map(|number| path.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf"))).collect())
}

const MAGIC: &[u8; 4] = b"GGUF";

/// What stands before the values.
struct Header {
    metadata: IndexMap<String, GgufValue>,
    tensors: Vec<GgufTensor>,
}

impl Header {
    fn read(file: &File, size: u64, part: usize) -> Result<Self> {
        let mut cursor =
            Cursor { stream: BufReader::new(file), read: 0, end: size.min(HEADER), is_capped: size > HEADER };
        ensure!(cursor.array::<4>()? == *MAGIC, "it does not begin with `GGUF`");
        let version = cursor.u32()?;
        ensure!(version & 0xffff != 0, "its numbers are big-endian: expected little-endian");
        ensure!([2, 3].contains(&version), "it has version {version}: expected 2 or 3");
        // A tensor has at least a name's length, a number of sizes, a type and an offset; a key its length, a type and a byte.
        let tensors = cursor.count(24)?;
        let keys = cursor.count(13)?;
        let mut metadata = IndexMap::new();
        for _ in 0..keys {
            let key = cursor.text()?;
            let value = cursor.value().with_context(|| format!("key `{}`", short(&key)))?;
            ensure!(!metadata.contains_key(&key), "key `{}` is there twice", short(&key));
            metadata.insert(key, value);
        }
        let mut header = Header { metadata, tensors: Vec::new() };
        for _ in 0..tensors {
            header.tensors.push(cursor.tensor(part)?);
        }
        let alignment = header.integer("general.alignment").unwrap_or(32);
        ensure!(alignment.is_power_of_two() && alignment <= 1 << 30, "its alignment is {alignment}");
        header.place(cursor.read.next_multiple_of(alignment), alignment, size)?;
        Ok(header)
    }

    fn integer(&self, key: &str) -> Option<u64> {
        self.metadata.get(key).and_then(GgufValue::integer)
    }

    /// Counts offsets from the beginning of the file, where they were from that of the values, and checks that each tensor
    /// has a place of its own.
    fn place(&mut self, start: u64, alignment: u64, size: u64) -> Result<()> {
        for tensor in &mut self.tensors {
            let GgufTensor { name, offset, bytes, .. } = tensor;
            ensure!(
                offset.is_multiple_of(alignment),
                "tensor `{}` begins at {offset}, no multiple of {alignment}",
                short(name)
            );
            let from = start.checked_add(*offset);
            let end = from.and_then(|from| from.checked_add(*bytes));
            ensure!(
                end.is_some_and(|end| end <= size),
                "tensor `{}` ends behind the {size} bytes of the file",
                short(name)
            );
            *offset += start;
        }
        let mut places: Vec<&GgufTensor> = self.tensors.iter().collect();
        places.sort_by_key(|tensor| tensor.offset);
        for pair in places.windows(2) {
            let [one, other] = pair else { unreachable!("windows are of size 2") };
            ensure!(
                one.offset + one.bytes <= other.offset,
                "tensors `{}` and `{}` overlap",
                short(&one.name),
                short(&other.name)
            );
        }
        Ok(())
    }
}

/// Reads what a header is made of, and no byte behind its end.
struct Cursor<R> {
    stream: R,
    read: u64,
    end: u64,
    /// Whether the file goes on behind the end.
    is_capped: bool,
}

impl<R: Read> Cursor<R> {
    fn left(&self) -> u64 {
        self.end - self.read
    }

    /// Errors where fewer bytes are left.
    fn need(&self, bytes: u64) -> Result<()> {
        ensure!(
            bytes <= self.left() || !self.is_capped,
            "its header has more than {}, which is the most that is read",
            in_words(HEADER)
        );
        ensure!(bytes <= self.left(), "it ends where {bytes} more bytes are expected");
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.need(buffer.len() as u64)?;
        self.stream.read_exact(buffer)?;
        self.read += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things that take at least so many bytes each, all of which must be there.
    fn count(&mut self, least: u64) -> Result<u64> {
        let count = self.u64()?;
        self.need(count.saturating_mul(least))?;
        Ok(count)
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        self.need(count)?;
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String> {
        let count = self.count(1)?;
        String::from_utf8(self.bytes(count)?)
            .map_err(|error| anyhow!("`{}` is not UTF-8", short(&String::from_utf8_lossy(error.as_bytes()))))
    }

    fn value(&mut self) -> Result<GgufValue> {
        let kind = self.u32()?;
        if kind == ARRAY { self.values() } else { self.scalar(kind) }
    }

    fn scalar(&mut self, kind: u32) -> Result<GgufValue> {
        Ok(match kind {
            FLOAT32 => GgufValue::Float(meant(f32::from_le_bytes(self.array()?))),
            FLOAT64 => GgufValue::Float(f64::from_le_bytes(self.array()?)),
            BOOL => GgufValue::Bool(self.array::<1>()? != [0]),
            TEXT => GgufValue::Text(self.text()?),
            kind => GgufValue::Integer(self.whole(kind)?),
        })
    }

    fn whole(&mut self, kind: u32) -> Result<i128> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => u32::from_le_bytes(self.array()?).into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            10 => u64::from_le_bytes(self.array()?).into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            other => bail!("type {other}: expected one from 0 to 12"),
        })
    }

    fn values(&mut self) -> Result<GgufValue> {
        fn all<T>(count: u64, mut next: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
            (0..count).map(|_| next()).collect()
        }
        let kind = self.u32()?;
        let least = match kind {
            0 | 1 | BOOL => 1,
            2 | 3 => 2,
            4..=FLOAT32 => 4,
            TEXT | 10..=FLOAT64 => 8,
            ARRAY => bail!("a list of lists, which is not read"),
            other => bail!("a list of type {other}: expected one from 0 to 12"),
        };
        let count = self.count(least)?;
        Ok(match kind {
            0 | 1 => GgufValue::Bytes(self.bytes(count)?),
            BOOL => GgufValue::Bools(self.bytes(count)?.into_iter().map(|byte| byte != 0).collect()),
            TEXT => GgufValue::Texts(all(count, || self.text())?),
            FLOAT32 => GgufValue::Floats(all(count, || Ok(meant(f32::from_le_bytes(self.array()?))))?),
            FLOAT64 => GgufValue::Floats(all(count, || Ok(f64::from_le_bytes(self.array()?)))?),
            kind => GgufValue::Integers(all(count, || {
                let number = self.whole(kind)?;
                i64::try_from(number).map_err(|_| anyhow!("{number} is too large"))
            })?),
        })
    }

    fn tensor(&mut self, part: usize) -> Result<GgufTensor> {
        let name = self.text()?;
        let tensor = || format!("tensor `{}`", short(&name));
        let dimensions = self.u32()?;
        ensure!(dimensions <= DIMENSIONS, "{} has {dimensions} sizes: expected at most {DIMENSIONS}", tensor());
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        let format = format_of(self.u32()?).map_err(|error| anyhow!("{} {error}", tensor()))?;
        let offset = self.u64()?;
        let (block, block_bytes) = (format.block() as u64, format.block_bytes() as u64);
        let row = shape.first().copied().unwrap_or(1);
        ensure!(!shape.contains(&0), "{} has a size of 0", tensor());
        ensure!(
            row.is_multiple_of(block),
            "{} has rows of {row}, no multiple of the blocks of {}",
            tensor(),
            format.name()
        );
        let bytes = shape.iter().try_fold(1_u64, |all, size| all.checked_mul(*size));
        let bytes = bytes.and_then(|numbers| (numbers / block).checked_mul(block_bytes));
        let bytes = bytes.filter(|bytes| *bytes <= files::WEIGHTS.bytes);
        let bytes = bytes.with_context(|| format!("{} has sizes {shape:?}, more than any file holds", tensor()))?;
        let shape = shape.into_iter().rev().map(|size| size as usize).collect();
        Ok(GgufTensor { name, shape, format, offset, bytes, part })
    }
}

// Numbers of types of values; the others are whole numbers.
const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const FLOAT64: u32 = 12;

/// The shortest decimal number that is this one in 32 bits.
fn meant(number: f32) -> f64 {
    if number.is_finite() { number.to_string().parse().expect("a number is one") } else { number.into() }
}

/// Names in messages, and not too much of them.
fn short(name: &str) -> String {
    let name: String = name.chars().map(|c| if c.is_control() { '?' } else { c }).take(81).collect();
    if name.chars().count() <= 80 { name } else { format!("{}...", name.chars().take(80).collect::<String>()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// Writes GGUF files.
    #[derive(Clone, Default)]
    pub(crate) struct Writer {
        version: u32,
        keys: Vec<(String, GgufValue)>,
        tensors: Vec<(String, Vec<u64>, Format, Vec<u8>)>,
    }

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    impl Writer {
        pub(crate) fn new() -> Self {
            Writer { version: 3, ..Writer::default() }
        }

        pub(crate) fn key(mut self, key: &str, value: GgufValue) -> Self {
            self.keys.push((key.into(), value));
            self
        }

        pub(crate) fn number(self, key: &str, value: i128) -> Self {
            self.key(key, GgufValue::Integer(value))
        }

        pub(crate) fn word(self, key: &str, value: &str) -> Self {
            self.key(key, GgufValue::Text(value.into()))
        }

        /// A tensor of zeros with this row-major shape.
        pub(crate) fn tensor(self, name: &str, shape: &[u64], format: Format) -> Self {
            let numbers: u64 = shape.iter().product();
            self.values(name, shape, format, vec![0; numbers as usize / format.block() * format.block_bytes()])
        }

        pub(crate) fn values(mut self, name: &str, shape: &[u64], format: Format, values: Vec<u8>) -> Self {
            self.tensors.push((name.into(), shape.to_vec(), format, values));
            self
        }

        pub(crate) fn bytes(&self) -> Vec<u8> {
            let entries: Vec<write::Entry> = self
                .tensors
                .iter()
                .map(|(name, shape, format, _)| write::Entry {
                    name: name.clone(),
                    shape: shape.iter().map(|size| *size as usize).collect(),
                    format: *format,
                })
                .collect();
            let mut bytes = write::header(self.version, &self.keys, &entries).unwrap();
            for (_, _, _, values) in &self.tensors {
                bytes.extend(values);
                bytes.resize(bytes.len().next_multiple_of(32), 0);
            }
            bytes
        }

        pub(crate) fn open(&self) -> Gguf {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), self.bytes()).unwrap();
            Gguf::open(file.path()).unwrap()
        }
    }

    fn sample() -> Writer {
        Writer::new()
            .word("general.architecture", "llama")
            .number("llama.block_count", 2)
            .number("small", -5)
            .key("eps", GgufValue::Float(1e-5))
            .key("yes", GgufValue::Bool(true))
            .key("words", GgufValue::Texts(vec!["a".into(), "".into(), "ü".into()]))
            .key("kinds", GgufValue::Integers(vec![1, -3]))
            .key("scores", GgufValue::Floats(vec![0.1, -2.0]))
            .key("map", GgufValue::Bytes(vec![1, 255]))
            .key("flags", GgufValue::Bools(vec![true, false]))
            .values("a", &[3], Format::F32, (0..12).collect())
            .tensor("b", &[2, 32], Format::Q4_1)
            .tensor("c", &[3, 2, 256], Format::Q6K)
    }

    fn open(bytes: &[u8]) -> Result<Gguf> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        Gguf::open(file.path())
    }

    fn error(bytes: &[u8]) -> String {
        format!("{:#}", open(bytes).unwrap_err())
    }

    #[test]
    fn what_was_written_is_read() {
        for version in [2, 3] {
            let writer = Writer { version, ..sample() };
            let file = writer.open();
            for (key, value) in &writer.keys {
                assert_eq!(file.metadata(key), Some(value));
            }
            assert_eq!(file.float("eps"), Some(1e-5));
            assert_eq!(
                (file.integer("small"), file.text("small"), file.integer("llama.block_count")),
                (None, None, Some(2))
            );
            let tensors: Vec<_> = file
                .tensors()
                .iter()
                .map(|t| (t.name.as_str(), &t.shape[..], t.format, t.bytes, t.row_bytes()))
                .collect();
            let expected = [
                ("a", &[3][..], Format::F32, 12, 12),
                ("b", &[2, 32], Format::Q4_1, 40, 20),
                ("c", &[3, 2, 256], Format::Q6K, 1260, 210),
            ];
            assert_eq!(tensors, expected);
            assert!(file.tensors().iter().all(|tensor| tensor.offset.is_multiple_of(32)));
            let a = file.tensor("a").unwrap();
            assert_eq!(file.read_all(a).unwrap(), (0..12).collect::<Vec<u8>>());
            let mut some = [0; 3];
            file.read(a, 4, &mut some).unwrap();
            assert_eq!(some, [4, 5, 6]);
        }
    }

    #[test]
    fn a_split_model_is_opened_by_any_of_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = |number: usize| folder.path().join(format!("model-{number:05}-of-00002.gguf"));
        let part = |number: i128| Writer::new().number("split.no", number).number("split.count", 2);
        let first = part(0).number("split.tensors.count", 2).word("who", "first").tensor("a", &[1], Format::F32);
        let second = part(1).word("who", "second").values("b", &[1], Format::F32, vec![1, 2, 3, 4]);
        fs::write(path(1), first.bytes()).unwrap();
        let error = Gguf::open(&path(1)).unwrap_err().to_string();
        assert!(error.contains("there is no file") && error.contains("00002-of-00002"), "{error}");
        fs::write(path(2), second.bytes()).unwrap();
        for number in [1, 2] {
            let file = Gguf::open(&path(number)).unwrap();
            assert_eq!((file.text("who"), file.tensors().len()), (Some("first"), 2));
            assert_eq!(file.read_all(file.tensor("b").unwrap()).unwrap(), [1, 2, 3, 4]);
        }
        fs::write(path(2), part(1).tensor("a", &[1], Format::F32).bytes()).unwrap();
        let error = Gguf::open(&path(1)).unwrap_err().to_string();
        assert!(error.contains("tensor `a`, which is there twice"), "{error}");
        fs::write(path(2), part(0).bytes()).unwrap();
        let error = Gguf::open(&path(1)).unwrap_err().to_string();
        assert!(error.contains("says that it is file 1 of 2: by its name it is file 2 of 2"), "{error}");
        fs::write(path(2), part(1).bytes()).unwrap();
        let error = Gguf::open(&path(1)).unwrap_err().to_string();
        assert!(error.contains("hold 1 tensors, and by its header 2"), "{error}");
    }

    #[test]
    fn a_file_that_ends_early_is_refused_wherever_it_ends() {
        let bytes = sample().bytes();
        // The last tensor is padded.
        let end = bytes.len() - (1260_usize.next_multiple_of(32) - 1260);
        assert!(open(&bytes[..end]).is_ok());
        for length in (0..end).step_by(7).chain([end - 1]) {
            let error = error(&bytes[..length]);
            assert!(error.contains("is not a whole GGUF file"), "{length}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let bytes = sample().bytes();
        let find = |part: &[u8]| bytes.windows(part.len()).position(|window| window == part).unwrap();
        let with = |place: usize, new: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[place..place + new.len()].copy_from_slice(new);
            error(&bytes)
        };
        let huge = u64::MAX.to_le_bytes();
        // Behind the name of `b` stand the number of its sizes, two sizes, its type and its offset.
        let b = find(&[&text("b")[..], &2_u32.to_le_bytes()].concat()) + 9;
        let words = find(b"words") + 5;
        let cases: [(usize, &[u8], &str); 14] = [
            (0, b"GGML", "does not begin with `GGUF`"),
            (4, &3_u32.to_be_bytes(), "big-endian"),
            (4, &1_u32.to_le_bytes(), "version 1: expected 2 or 3"),
            (8, &huge, "more bytes are expected"),
            (16, &huge, "more bytes are expected"),
            (24, &huge, "more bytes are expected"),
            (words, &77_u32.to_le_bytes(), "key `words`: type 77"),
            (words + 4, &ARRAY.to_le_bytes(), "key `words`: a list of lists"),
            (words + 8, &huge, "key `words`: it ends where"),
            (b, &5_u32.to_le_bytes(), "tensor `b` has 5 sizes"),
            (b + 4, &33_u64.to_le_bytes(), "tensor `b` has rows of 33, no multiple of the blocks of Q4_1"),
            (b + 12, &huge, "more than any file holds"),
            (b + 20, &16_u32.to_le_bytes(), "tensor `b` has type 16 (IQ2_XXS)"),
            (b + 24, &0_u64.to_le_bytes(), "tensors `a` and `b` overlap"),
        ];
        for (place, new, expected) in cases {
            let error = with(place, new);
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let error_of = |writer: Writer| error(&writer.bytes());
        assert!(with(b + 24, &8_u64.to_le_bytes()).contains("tensor `b` begins at 8, no multiple of 32"));
        assert!(with(b + 24, &(1_u64 << 40).to_le_bytes()).contains("tensor `b` ends behind the"));
        assert!(with(b + 24, &(u64::MAX - 31).to_le_bytes()).contains("tensor `b` ends behind the"));
        assert!(error_of(sample().number("yes", 1)).contains("key `yes` is there twice"));
        assert!(error_of(sample().tensor("a", &[1], Format::F32)).contains("tensor `a`, which is there twice"));
        assert!(error_of(sample().number("general.alignment", 3)).contains("its alignment is 3"));
        assert!(error_of(sample().tensor("d", &[0], Format::F32)).contains("tensor `d` has a size of 0"));
    }

    /// A file of holes takes no room on disk and has any size: what it claims must not be allocated.
    #[test]
    fn a_header_has_a_largest_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut bytes = MAGIC.to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(1_u64.to_le_bytes());
        bytes.extend([text("k"), ARRAY.to_le_bytes().to_vec(), TEXT.to_le_bytes().to_vec()].concat());
        bytes.extend((1_u64 << 36).to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        let error = Gguf::open(&path).unwrap_err().to_string();
        assert!(error.contains("its header has more than 128.0 MiB"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            begins_well in any::<bool>(),
        ) {
            if begins_well {
                bytes.splice(0..0, [MAGIC.to_vec(), 3_u32.to_le_bytes().to_vec(), vec![1, 0, 0, 0, 0, 0, 0, 0], vec![1, 0, 0, 0, 0, 0, 0, 0]].concat());
            }
            _ = open(&bytes);
        }

        #[test]
        fn no_change_of_a_file_makes_it_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), end in any::<prop::sample::Index>()) {
            let mut bytes = sample().bytes();
            let header = bytes.len() - 1500;
            for (place, byte) in changes {
                bytes[place.index(header)] = byte;
            }
            bytes.truncate(end.index(bytes.len()).max(header));
            if let Ok(file) = open(&bytes) {
                for tensor in file.tensors() {
                    prop_assert_eq!(file.read_all(tensor).unwrap().len() as u64, tensor.bytes);
                }
            }
        }
    }
}
