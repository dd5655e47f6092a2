//! What a frozen model says of a text, kept on disk and read row by row.
//!
//! A cache holds, for every response token of every row, either the final hidden state before it or the likeliest tokens
//! there. It is found again by row id; fingerprints of prompt and response guard against another text under the same id. Files:
//!
//! - `cache.json`: what is kept, and of which model;
//! - `rows.safetensors`: per row, in order, its id, fingerprints and numbers of tokens of prompt and response, and shard;
//! - `shard-NNNNN.safetensors`: the values of whole rows, one after the other, `[tokens, ...]`;
//! - `head.safetensors`, beside hidden states: the model's output head, which turns them into probabilities;
//! - the model's tokenizer.
//!
//! Writing needs the memory of one row, reading that of the rows asked for.

use std::any::Any;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use candle_core::{DType, Device, Tensor};
use contract::dataset::row_name;
use contract::files::counted;
use contract::value::write;
use contract::{PortType, Result, TokenizerFile, Value};
use half::bf16;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensors};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::files::tensors::{read, read_tensors, write_json, write_tensors};
use crate::finite::NotFinite;
use crate::head::Head;
use crate::loss::TopK;
use crate::model::LanguageModel;

/// What is kept of every token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The final hidden state, and once the head that it is multiplied with: exact, and enough for every divergence and
    /// temperature.
    #[default]
    Hidden,
    /// So many of the likeliest tokens with their log-probabilities, and the mass of all others; see [`TopK`].
    TopK(#[schemars(range(min = 1, max = contract::limits::VOCABULARY))] usize),
}

/// The type that hidden states are kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// As they are.
    #[default]
    F32,
    /// Rounded to 8 bits of precision: half the size.
    Bf16,
}

/// What a cache says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// What is kept of every token.
    pub keep: Keep,
    /// The type of hidden states.
    pub storage: Storage,
    /// Temperature of the probabilities that [`Keep::TopK`] keeps.
    pub temperature: f64,
    /// Channels of a hidden state.
    pub width: usize,
    /// Fingerprint of the model's output head.
    pub head: u64,
}

impl Facts {
    /// Of a cache of what `model` says.
    fn of(model: &LanguageModel, keep: Keep, storage: Storage, temperature: f64) -> Result<Self> {
        Ok(Facts { keep, storage, temperature, width: model.width(), head: fingerprint_of_head(model)? })
    }

    /// The tensors of a shard.
    fn columns(&self) -> Vec<Column> {
        let column = |name, dtype, width| Column { name, dtype, width };
        match (self.keep, self.storage) {
            (Keep::Hidden, Storage::F32) => vec![column("hidden", Dtype::F32, self.width)],
            (Keep::Hidden, Storage::Bf16) => vec![column("hidden", Dtype::BF16, self.width)],
            (Keep::TopK(k), _) => vec![
                column("token", Dtype::U32, k),
                column("log_prob", Dtype::F32, k),
                column("log_rest", Dtype::F32, 1),
            ],
        }
    }

    fn bytes_per_token(&self) -> usize {
        self.columns().iter().map(Column::bytes).sum()
    }
}

/// A tensor of a shard, `[tokens, width]`.
struct Column {
    name: &'static str,
    dtype: Dtype,
    width: usize,
}

impl Column {
    /// Of a token.
    fn bytes(&self) -> usize {
        self.dtype.bitsize() / 8 * self.width
    }
}

/// What a model says of some tokens.
#[derive(Clone, Debug)]
pub enum Said {
    /// Final hidden states, `[tokens, width]`.
    Hidden(Tensor),
    /// The likeliest tokens.
    TopK(TopK),
}

/// A response of the text.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// Id of its row.
    pub row: u64,
    /// What stands before it.
    pub prompt: &'a [u32],
    /// The tokens of which something is said.
    pub tokens: &'a [u32],
}

/// Which prompts the responses of a cache may be read behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Prompts {
    /// Those that the teacher read.
    #[default]
    Same,
    /// Any: the teacher was meant to read another text than the student, such as one with instructions (response priming).
    Any,
}

/// Some text, for comparison.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Print {
    tokens: usize,
    fingerprint: u64,
}

impl Print {
    fn of(text: &[u32]) -> Self {
        Print { tokens: text.len(), fingerprint: fingerprint_of_words(text.iter().copied()) }
    }

    /// How a text differs from this one, which the cache has.
    fn difference(self, other: Print) -> String {
        let Print { tokens, .. } = self;
        if tokens == other.tokens { format!("other {tokens} tokens than these") } else { format!("{tokens} tokens") }
    }
}

/// What a frozen model says of a text, on disk.
pub struct TeacherCache {
    /// What is kept.
    pub facts: Facts,
    tokenizer: TokenizerFile,
    folder: PathBuf,
    /// Removes the folder with the value, where it was made by it.
    _scratch: Option<TempDir>,
    places: HashMap<u64, Place>,
    shards: Vec<Shard>,
}

/// Where a row lies.
#[derive(Clone, Copy)]
struct Place {
    prompt: Print,
    response: Print,
    shard: usize,
    /// Its first token among those of the shard.
    start: usize,
}

/// A file of values.
struct Shard {
    file: File,
    /// First byte of each column.
    columns: Vec<u64>,
}

impl TeacherCache {
    /// What was said of responses, one after the other.
    ///
    /// Errors when a row is not in the cache, or its response is not the one that was kept, or, unless `prompts` allows it,
    /// not its prompt.
    pub fn read(&self, responses: &[Response<'_>], prompts: Prompts, device: &Device) -> Result<Said> {
        let places = responses.iter().map(|response| self.place(response, prompts)).collect::<Result<Vec<_>>>()?;
        let column = |index: usize| -> Result<Vec<u8>> {
            let bytes = self.facts.columns()[index].bytes();
            let mut all = vec![0; places.iter().map(|place| place.response.tokens * bytes).sum()];
            let mut rest = all.as_mut_slice();
            for place in &places {
                let Shard { file, columns } = &self.shards[place.shard];
                let (own, others) = rest.split_at_mut(place.response.tokens * bytes);
                file.read_exact_at(own, columns[index] + (place.start * bytes) as u64)
                    .with_context(|| format!("cannot read shard {} of the teacher cache", place.shard))?;
                rest = others;
            }
            Ok(all)
        };
        Ok(match self.facts.keep {
            Keep::TopK(k) => Said::TopK(TopK {
                vocabulary: self.tokenizer.size as usize,
                k,
                tokens: words(&column(0)?, u32::from_le_bytes),
                log_probs: words(&column(1)?, f32::from_le_bytes),
                log_rest: words(&column(2)?, f32::from_le_bytes),
            }),
            Keep::Hidden => {
                let bytes = column(0)?;
                let values: Vec<f32> = match self.facts.storage {
                    Storage::F32 => words(&bytes, f32::from_le_bytes),
                    Storage::Bf16 => words(&bytes, |word| bf16::from_le_bytes(word).to_f32()),
                };
                let tokens = values.len() / self.facts.width;
                Said::Hidden(Tensor::from_vec(values, (tokens, self.facts.width), device)?)
            }
        })
    }

    /// The output head of the model, as f32; `None` where hidden states are not kept.
    pub fn head(&self, device: &Device) -> Result<Option<Head>> {
        if self.facts.keep != Keep::Hidden {
            return Ok(None);
        }
        let path = self.folder.join(HEAD);
        let (mut tensors, _) = read_tensors(&path, device)?;
        let weight = tensors.remove("head").with_context(|| format!("`{}` holds no `head`", path.display()))?;
        let tokens = (self.tokenizer.size as usize).min(weight.dims2()?.0);
        Ok(Some(Head { weight, tokens }))
    }

    /// Errors when hidden states are kept that another model computed.
    pub fn check_head(&self, model: &LanguageModel) -> Result<()> {
        ensure!(
            self.facts.head == fingerprint_of_head(model)?,
            "the teacher cache was made by another model than this teacher: connect the one that made it"
        );
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.places.len()
    }

    fn place(&self, response: &Response<'_>, prompts: Prompts) -> Result<Place> {
        let row = row_name(response.row);
        let Some(place) = self.places.get(&response.row) else {
            bail!(
                "{row} is not in the teacher cache, which holds {}: make the cache of the dataset that is learnt from, \
                 and of all its rows that are used (`rows` of `teacher-cache`)",
                counted(self.places.len() as u64, "row")
            );
        };
        let (prompt, tokens) = (Print::of(response.prompt), Print::of(response.tokens));
        ensure!(
            place.response == tokens,
            "the response of {row}, {} tokens, is not the one in the teacher cache, {}: a cache is of one fixed text; make it \
             of the dataset that is learnt from, or connect `teacher` without `cache` where text changes from round to round",
            tokens.tokens,
            place.response.difference(tokens)
        );
        ensure!(
            prompts == Prompts::Any || place.prompt == prompt,
            "the prompt of {row}, {} tokens, is not the one that the teacher read, {}: make the cache of the dataset that is \
             learnt from, or say `cache_prompts: any` if the teacher is to read another prompt than the student",
            prompt.tokens,
            place.prompt.difference(prompt)
        );
        Ok(*place)
    }

    /// Reads what [`Value::save`] wrote. Values stay on disk, so the files must stay there.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("cache.json");
        let facts: Facts = serde_json::from_slice(&read(&path)?)
            .with_context(|| format!("`{}` does not describe a teacher cache", path.display()))?;
        let path = folder.join("rows.safetensors");
        let bytes = read(&path)?;
        let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("`{}` is broken", path.display()))?;
        let column = |name| tensors.tensor(name).with_context(|| format!("`{}` has no `{name}`", path.display()));
        let ids = words(column("id")?.data(), u64::from_le_bytes);
        let prints = |fingerprint, tokens| -> Result<Vec<Print>> {
            let fingerprints = words(column(fingerprint)?.data(), u64::from_le_bytes);
            let tokens = words(column(tokens)?.data(), u32::from_le_bytes);
            let pairs = fingerprints.into_iter().zip(tokens);
            Ok(pairs.map(|(fingerprint, tokens)| Print { tokens: tokens as usize, fingerprint }).collect())
        };
        let prompts = prints("prompt_fingerprint", "prompt_tokens")?;
        let responses = prints("fingerprint", "tokens")?;
        let shards = words(column("shard")?.data(), u32::from_le_bytes);
        let mut lengths = Vec::new();
        let mut places = HashMap::with_capacity(ids.len());
        for (((id, prompt), response), shard) in ids.into_iter().zip(prompts).zip(responses).zip(shards) {
            let shard = shard as usize;
            lengths.resize(lengths.len().max(shard + 1), 0);
            places.insert(id, Place { prompt, response, shard, start: lengths[shard] });
            lengths[shard] += response.tokens;
        }
        let shards = lengths.iter().enumerate().map(|(index, tokens)| {
            let path = folder.join(shard_name(index));
            Shard::open(&path, &facts, *tokens).with_context(|| format!("cannot read `{}`", path.display()))
        });
        let shards = shards.collect::<Result<_>>()?;
        let tokenizer = TokenizerFile::load(folder)?;
        Ok(TeacherCache { facts, tokenizer, folder: folder.to_owned(), _scratch: None, places, shards })
    }
}

impl Value for TeacherCache {
    fn port_type(&self) -> PortType {
        PortType::TeacherCache
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let shards =
            (0..self.shards.len()).map(shard_name).chain(self.folder.join(HEAD).exists().then(|| HEAD.to_owned()));
        let others = ["cache.json", "rows.safetensors"];
        for name in others.map(str::to_owned).into_iter().chain(shards) {
            let (from, to) = (self.folder.join(&name), folder.join(&name));
            // The files are never written to again, so a second name does for a copy, where there can be one.
            if fs::hard_link(&from, &to).is_err() {
                fs::copy(&from, &to).with_context(|| format!("cannot copy `{}`", from.display()))?;
            }
        }
        self.tokenizer.save(folder)
    }

    fn facts(&self) -> contract::Facts {
        contract::Facts { vocabulary: Some(self.tokenizer.vocabulary()), ..Default::default() }
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl Shard {
    /// Errors when the file is not one of `tokens` tokens.
    fn open(path: &Path, facts: &Facts, tokens: usize) -> Result<Self> {
        let file = File::open(path)?;
        let expected = ShardLayout::new(facts, tokens)?;
        let mut header = vec![0; expected.header.len()];
        file.read_exact_at(&mut header, 0)?;
        let bytes = file.metadata()?.len();
        ensure!(
            header == expected.header && bytes == expected.bytes,
            "it is not what `cache.json` and `rows.safetensors` describe: make the cache again"
        );
        Ok(Shard { file, columns: expected.columns })
    }
}

/// The layout of a shard follows from what is kept and how many tokens it has.
struct ShardLayout {
    header: Vec<u8>,
    columns: Vec<u64>,
    bytes: u64,
}

impl ShardLayout {
    fn new(facts: &Facts, tokens: usize) -> Result<Self> {
        let mut offset = 0;
        let tensors: Vec<(String, TensorInfo)> = (facts.columns().into_iter())
            .map(|column| {
                let start = offset;
                offset += tokens * column.bytes();
                let Column { name, dtype, width } = column;
                (name.to_owned(), TensorInfo { dtype, shape: vec![tokens, width], data_offsets: (start, offset) })
            })
            .collect();
        let starts: Vec<usize> = tensors.iter().map(|(_, info)| info.data_offsets.0).collect();
        let mut text = serde_json::to_vec(&Metadata::new(None, tensors)?)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let header = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        let columns = starts.iter().map(|start| (header.len() + start) as u64).collect();
        Ok(ShardLayout { bytes: (header.len() + offset) as u64, header, columns })
    }
}

/// Bytes of values that a shard has at most, unless one row has more.
const SHARD_BYTES: usize = 1 << 30;

/// Where the output head is.
const HEAD: &str = "head.safetensors";

fn shard_name(index: usize) -> String {
    format!("shard-{index:05}.safetensors")
}

/// A row of a cache that is being written.
struct Entry {
    id: u64,
    prompt: Print,
    response: Print,
    shard: usize,
}

/// Writes a [`TeacherCache`], row after row.
pub struct TeacherCacheWriter {
    facts: Facts,
    tokenizer: TokenizerFile,
    scratch: TempDir,
    rows: Vec<Entry>,
    shards: Vec<Shard>,
    /// Rows written so far, and tokens in the shard of the next.
    done: usize,
    start: usize,
}

impl TeacherCacheWriter {
    /// A cache of what `model` says of `rows`, in a folder of its own below `scratch`. `temperature` is that of the
    /// probabilities that [`Keep::TopK`] keeps.
    ///
    /// Errors when two rows have the same id, or the disk refuses.
    pub fn new(
        scratch: &Path,
        model: &LanguageModel,
        keep: Keep,
        storage: Storage,
        temperature: f64,
        rows: &[Response<'_>],
    ) -> Result<Self> {
        let facts = Facts::of(model, keep, storage, temperature)?;
        let writer = Self::with_shards_of(SHARD_BYTES, scratch, facts, model.tokenizer.clone(), rows)?;
        if keep == Keep::Hidden {
            let path = writer.scratch.path().join(HEAD);
            write_tensors(&path, [(&"head".to_owned(), &model.head()?)].into_iter(), None)?;
        }
        Ok(writer)
    }

    fn with_shards_of(
        shard_bytes: usize,
        scratch: &Path,
        facts: Facts,
        tokenizer: TokenizerFile,
        rows: &[Response<'_>],
    ) -> Result<Self> {
        let scratch = TempDir::with_prefix_in("teacher-cache", scratch)?;
        let most = (shard_bytes / facts.bytes_per_token()).max(1);
        let mut placed = Vec::with_capacity(rows.len());
        let mut lengths: Vec<usize> = Vec::new();
        let mut seen = HashMap::with_capacity(rows.len());
        for (index, Response { row: id, prompt, tokens }) in rows.iter().enumerate() {
            if let Some(other) = seen.insert(*id, index) {
                bail!(
                    "rows {other} and {index} of the text have the same id {id}: a teacher cache tells rows apart by it"
                );
            }
            match lengths.last_mut() {
                Some(length) if *length + tokens.len() <= most => *length += tokens.len(),
                _ => lengths.push(tokens.len()),
            }
            let (prompt, response) = (Print::of(prompt), Print::of(tokens));
            placed.push(Entry { id: *id, prompt, response, shard: lengths.len() - 1 });
        }
        let shards = lengths.iter().enumerate().map(|(index, tokens)| {
            let path = scratch.path().join(shard_name(index));
            let layout = ShardLayout::new(&facts, *tokens)?;
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            file.write_all_at(&layout.header, 0)?;
            file.set_len(layout.bytes)?;
            Ok(Shard { file, columns: layout.columns })
        });
        let shards = shards.collect::<Result<_>>().context("cannot make the files of a teacher cache")?;
        Ok(TeacherCacheWriter { facts, tokenizer, scratch, rows: placed, shards, done: 0, start: 0 })
    }

    /// Adds what was said of the next `rows` rows.
    ///
    /// Errors when it is not as many tokens as they have, not what the cache keeps, or, with [`NotFinite`], not finite.
    pub fn push(&mut self, rows: usize, said: &Said) -> Result<()> {
        let columns: Vec<Vec<u8>> = match (said, self.facts.keep) {
            (Said::Hidden(hidden), Keep::Hidden) => {
                let values = hidden.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                    bail!(NotFinite { index: place / self.facts.width });
                }
                vec![match self.facts.storage {
                    Storage::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
                    Storage::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
                }]
            }
            (Said::TopK(kept), Keep::TopK(k)) if kept.k == k => vec![
                kept.tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
                kept.log_probs.iter().flat_map(|log| log.to_le_bytes()).collect(),
                kept.log_rest.iter().flat_map(|log| log.to_le_bytes()).collect(),
            ],
            _ => bail!("this is not what the cache keeps"),
        };
        let next = self.rows.get(self.done..self.done + rows).context("these are more rows than the cache has")?;
        let tokens: usize = next.iter().map(|row| row.response.tokens).sum();
        for (values, column) in columns.iter().zip(self.facts.columns()) {
            let (name, found, expected) = (column.name, values.len(), tokens * column.bytes());
            ensure!(found == expected, "`{name}` of {tokens} tokens has {found} bytes, expected {expected}");
        }
        let mut before = 0;
        for (offset, Entry { response, shard, .. }) in next.iter().enumerate() {
            let tokens = response.tokens;
            let first_of_shard = self.done + offset == 0 || self.rows[self.done + offset - 1].shard != *shard;
            self.start = if first_of_shard { 0 } else { self.start };
            let Shard { file, columns: starts } = &self.shards[*shard];
            for ((values, column), start) in columns.iter().zip(self.facts.columns()).zip(starts) {
                let bytes = column.bytes();
                let own = &values[before * bytes..(before + tokens) * bytes];
                file.write_all_at(own, start + (self.start * bytes) as u64).context("cannot write a teacher cache")?;
            }
            self.start += tokens;
            before += tokens;
        }
        self.done += rows;
        Ok(())
    }

    /// The whole cache.
    ///
    /// Errors when rows are missing.
    pub fn finish(self) -> Result<TeacherCache> {
        let TeacherCacheWriter { facts, tokenizer, scratch, rows, done, .. } = self;
        ensure!(done == rows.len(), "{done} of {} rows were written", rows.len());
        let folder = scratch.path();
        write_json(&folder.join("cache.json"), &serde_json::to_value(facts)?)?;
        let wide = |number: fn(&Entry) -> u64| rows.iter().flat_map(|row| number(row).to_le_bytes()).collect();
        let short =
            |number: fn(&Entry) -> usize| rows.iter().flat_map(|row| (number(row) as u32).to_le_bytes()).collect();
        let columns: [(&str, Dtype, usize, Vec<u8>); 6] = [
            ("id", Dtype::U64, 8, wide(|row| row.id)),
            ("fingerprint", Dtype::U64, 8, wide(|row| row.response.fingerprint)),
            ("tokens", Dtype::U32, 4, short(|row| row.response.tokens)),
            ("prompt_fingerprint", Dtype::U64, 8, wide(|row| row.prompt.fingerprint)),
            ("prompt_tokens", Dtype::U32, 4, short(|row| row.prompt.tokens)),
            ("shard", Dtype::U32, 4, short(|row| row.shard)),
        ];
        let views = columns
            .iter()
            .map(|(name, dtype, bytes, data)| Ok((*name, TensorView::new(*dtype, vec![data.len() / bytes], data)?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        write(&folder.join("rows.safetensors"), &safetensors::serialize(views, None)?)?;
        tokenizer.save(folder)?;
        let cache = TeacherCache::load(folder)?;
        Ok(TeacherCache { _scratch: Some(scratch), ..cache })
    }
}

/// FNV-1a, 64 bits, over words: tells texts and models apart, guards against no ill will.
fn fingerprint_of_words(words: impl Iterator<Item = u32>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn fingerprint_of_head(model: &LanguageModel) -> Result<u64> {
    let head = model.head()?.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
    Ok(fingerprint_of_words(head.to_vec1::<f32>()?.into_iter().map(f32::to_bits)))
}

fn words<const N: usize, T>(bytes: &[u8], parse: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.chunks_exact(N).map(|word| parse(word.try_into().expect("chunks are of size N"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;

    const WIDTH: usize = 6;

    fn tokenizer() -> TokenizerFile {
        TokenizerFile::new("{}", 0, 9)
    }

    fn facts(keep: Keep, storage: Storage) -> Facts {
        Facts { keep, storage, temperature: 1.0, width: WIDTH, head: 77 }
    }

    /// Rows of several lengths, one after the other.
    const RESPONSES: [Response<'_>; 4] =
        [response(9, &[1, 2, 3]), response(2, &[4]), response(u64::MAX, &[5, 6]), response(3, &[1, 2, 3, 7, 8])];

    const fn response(row: u64, tokens: &[u32]) -> Response<'_> {
        Response { row, prompt: &[8, 6], tokens }
    }
    const TOKENS: usize = 11;

    fn hidden() -> Tensor {
        Tensor::from_vec(numbers(1, TOKENS * WIDTH), (TOKENS, WIDTH), &Device::Cpu).unwrap()
    }

    fn top_k() -> TopK {
        let tokens = (0..TOKENS * 2).map(|i| (i * 5 % 9) as u32).collect();
        TopK { vocabulary: 9, k: 2, tokens, log_probs: numbers(2, TOKENS * 2), log_rest: numbers(3, TOKENS) }
    }

    /// A cache of [`RESPONSES`] in shards of a few tokens, written in pieces of one and three rows.
    fn cache(scratch: &Path, facts: Facts, said: &Said) -> TeacherCache {
        let shard_bytes = 4 * facts.bytes_per_token();
        let mut writer =
            TeacherCacheWriter::with_shards_of(shard_bytes, scratch, facts, tokenizer(), &RESPONSES).unwrap();
        for (rows, start, tokens) in [(1, 0, 3), (3, 3, 8)] {
            let part = match said {
                Said::Hidden(hidden) => Said::Hidden(hidden.narrow(0, start, tokens).unwrap()),
                Said::TopK(kept) => {
                    Said::TopK(kept.select(&(start as u32..(start + tokens) as u32).collect::<Vec<_>>()))
                }
            };
            writer.push(rows, &part).unwrap();
        }
        writer.finish().unwrap()
    }

    /// What is kept of the rows of [`RESPONSES`] at `places`, in the order of `places`.
    fn assert_holds(cache: &TeacherCache, places: &[usize]) {
        let rows: Vec<Response<'_>> = places.iter().map(|place| RESPONSES[*place]).collect();
        let starts = [0, 3, 4, 6];
        let tokens = places.iter().flat_map(|&place| starts[place]..starts[place] + RESPONSES[place].tokens.len());
        let tokens: Vec<u32> = tokens.map(|token| token as u32).collect();
        match cache.read(&rows, Prompts::Same, &Device::Cpu).unwrap() {
            Said::TopK(found) => assert_eq!(found, top_k().select(&tokens)),
            Said::Hidden(found) => {
                let count = tokens.len();
                let right = hidden().index_select(&Tensor::from_vec(tokens, count, &Device::Cpu).unwrap(), 0).unwrap();
                let exact = cache.facts.storage == Storage::F32;
                let right =
                    if exact { right } else { right.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap() };
                assert_eq!(found.to_vec2::<f32>().unwrap(), right.to_vec2::<f32>().unwrap());
            }
        }
    }

    #[test]
    fn a_saved_cache_loads_bit_equal_and_any_rows_are_read_in_any_order() {
        for (keep, storage) in
            [(Keep::Hidden, Storage::F32), (Keep::Hidden, Storage::Bf16), (Keep::TopK(2), Storage::F32)]
        {
            let said = if keep == Keep::Hidden { Said::Hidden(hidden()) } else { Said::TopK(top_k()) };
            let [scratch, saved] = [0, 1].map(|_| tempfile::tempdir().unwrap());
            let made = cache(scratch.path(), facts(keep, storage), &said);
            made.save(saved.path()).unwrap();
            assert_holds(&made, &[0, 1, 2, 3]);
            drop(made);
            assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "a value leaves nothing behind");
            let loaded = TeacherCache::load(saved.path()).unwrap();
            assert_eq!((loaded.facts, loaded.rows()), (facts(keep, storage), 4));
            assert_eq!(loaded.facts().vocabulary, Some(tokenizer().vocabulary()));
            assert!(loaded.shards.len() > 1);
            for places in [&[0, 1, 2, 3][..], &[3, 0], &[2], &[1, 1], &[]] {
                assert_holds(&loaded, places);
            }
        }
    }

    #[test]
    fn shards_are_safetensors_that_others_read() {
        let scratch = tempfile::tempdir().unwrap();
        let made = cache(scratch.path(), facts(Keep::TopK(2), Storage::F32), &Said::TopK(top_k()));
        let bytes = fs::read(made.folder.join("shard-00000.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let log_probs = tensors.tensor("log_prob").unwrap();
        assert_eq!((log_probs.dtype(), log_probs.shape()), (Dtype::F32, &[4, 2][..]));
        assert_eq!(words(log_probs.data(), f32::from_le_bytes), top_k().log_probs[..8]);
        assert_eq!(tensors.tensor("log_rest").unwrap().shape(), [4, 1]);
    }

    #[test]
    fn another_text_is_an_error_that_says_what_to_do() {
        let scratch = tempfile::tempdir().unwrap();
        let cache = cache(scratch.path(), facts(Keep::Hidden, Storage::F32), &Said::Hidden(hidden()));
        let read = |row: Response<'_>, prompts| cache.read(&[row], prompts, &Device::Cpu);
        let error = |row: Response<'_>, prompts| read(row, prompts).unwrap_err().to_string();
        for prompts in [Prompts::Same, Prompts::Any] {
            let missing = error(response(5, &[1]), prompts);
            assert!(missing.starts_with("row 6 of `train` is not in the teacher cache, which holds 4 rows: make"));
            for (other, difference) in [
                (&[1, 2, 4][..], "3 tokens, is not the one in the teacher cache, other 3 tokens than these"),
                (&[1, 2], "2 tokens, is not the one in the teacher cache, 3 tokens"),
                (&[2, 1, 3], "3 tokens, is not the one in the teacher cache, other 3 tokens than these"),
                (&[], "0 tokens, is not the one in the teacher cache, 3 tokens"),
            ] {
                let found = error(response(9, other), prompts);
                assert!(found.starts_with(&format!("the response of row 10 of `train`, {difference}: ")), "{found}");
            }
        }
        for (prompt, difference) in [
            (&[8, 7][..], "2 tokens, is not the one that the teacher read, other 2 tokens than these"),
            (&[1, 8, 6], "3 tokens, is not the one that the teacher read, 2 tokens"),
            (&[], "0 tokens, is not the one that the teacher read, 2 tokens"),
        ] {
            let row = Response { prompt, ..RESPONSES[0] };
            let found = error(row, Prompts::Same);
            assert!(found.starts_with(&format!("the prompt of row 10 of `train`, {difference}: ")), "{found}");
            assert!(
                found.ends_with("say `cache_prompts: any` if the teacher is to read another prompt than the student")
            );
            assert!(read(row, Prompts::Any).is_ok());
        }
    }

    #[test]
    fn what_is_written_must_be_what_was_announced() {
        let scratch = tempfile::tempdir().unwrap();
        let facts = facts(Keep::Hidden, Storage::F32);
        let new = |rows: &[Response<'_>]| {
            TeacherCacheWriter::with_shards_of(SHARD_BYTES, scratch.path(), facts, tokenizer(), rows)
        };
        let writer = || new(&RESPONSES).unwrap();
        let error = |rows, said: &Said| writer().push(rows, said).unwrap_err().to_string();
        let all = Said::Hidden(hidden());
        assert_eq!(error(3, &all), "`hidden` of 6 tokens has 264 bytes, expected 144");
        assert_eq!(error(5, &all), "these are more rows than the cache has");
        assert_eq!(error(4, &Said::TopK(top_k())), "this is not what the cache keeps");
        let broken = Said::Hidden((hidden() * f64::NAN).unwrap());
        assert_eq!(error(4, &broken), "what the model says at place 0 is not finite");
        assert_eq!(writer().finish().err().unwrap().to_string(), "0 of 4 rows were written");
        let twice = new(&[response(4, &[1]); 2]);
        assert!(twice.err().unwrap().to_string().starts_with("rows 0 and 1 of the text have the same id 4"));
    }

    #[test]
    fn a_shard_that_was_cut_short_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        let made = cache(scratch.path(), facts(Keep::Hidden, Storage::F32), &Said::Hidden(hidden()));
        let path = made.folder.join("shard-00001.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = format!("{:#}", TeacherCache::load(&made.folder).err().unwrap());
        assert!(error.contains("shard-00001.safetensors`") && error.contains("make the cache again"), "{error}");
    }
}
