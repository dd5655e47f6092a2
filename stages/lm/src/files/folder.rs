//! Model folders, as others hand them on.
//!
//! A folder is looked into before anybody needs it: what its configuration asks for and what its files hold must be one
//! model, and one that this crate computes. That takes the headers of its files and no values, so that it can be done where
//! a pipeline is checked. The same look comes first whenever weights are read.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::{Device, Tensor};
use contract::{Facts, Result, TokenizerFile, files};
use indexmap::IndexMap;
use serde_json::Value as Json;

use super::generation::{self, GenerationConfig};
use super::gguf::Gguf;
use super::llama2c::Llama2cFile;
use super::parallel::{RANKS, Share, share};
use super::pickle::PickleFile;
use super::tensors::{Entry, Stored, TensorFile, write_json, write_one_by_one};
use super::tokenizer;
use crate::families::Config;
use crate::finite::first_not_finite;
use crate::kernels::encode::encode;
use crate::terms::format::Format;
use crate::weights::Weight;
use crate::weights::encoded::Encoded;

/// A folder that holds a model this crate computes.
pub struct ModelFolder {
    path: PathBuf,
    /// Sizes and options.
    pub config: Config,
    pub(crate) generation: GenerationConfig,
    files: Vec<TensorFile>,
    /// Whether each file is the part of a rank.
    is_parallel: bool,
    index: Option<&'static str>,
    /// Where each parameter is, in the order of [`Config::parameter_shapes`].
    places: IndexMap<String, Place>,
    /// A head that is there although it is to be the embedding.
    second_head: Option<Place>,
}

/// A tensor in one of the files, or its parts in all of them.
struct Place {
    parts: Vec<(usize, Stored)>,
    share: Share,
    /// Of the whole.
    shape: Vec<usize>,
}

/// Names of the files of a folder that make a model without its tokenizer, or their endings.
pub const MODEL_FILES: [&str; 8] = [
    "config.json",
    generation::FILE,
    "*.safetensors",
    "model.safetensors.index.json",
    "*.bin",
    "pytorch_model.bin.index.json",
    "*.gguf",
    "adapter/adapter_config.json",
];

impl ModelFolder {
    /// Looks into a folder: `config.json`, `generation_config.json`, and the headers of the files that hold its weights,
    /// `model.safetensors`, `pytorch_model.bin`, those that an index names, or those of the ranks of a tensor-parallel program,
    /// `mp4/pytorch_model_0.bin` and so on; or else a GGUF file (or the parts of one) or one of llama2.c, by itself too, which
    /// say all that `config.json` would.
    ///
    /// Errors when the model is none that this crate computes, or tensors are missing, foreign, there twice, or of another
    /// shape or type than they must be: they name file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join("config.json").exists() {
            if let Some(file) = Gguf::at(path)? {
                return ModelFolder::of_gguf(path, &file);
            }
            if let Some(file) = llama2c_at(path)? {
                let (tensors, config) = TensorFile::open_llama2c(&file)?;
                return ModelFolder::of(folder_of(path), Config::read(config, &file)?, vec![tensors], Kind::Alone);
            }
        }
        ensure!(path.is_dir(), "`{}` is no folder: expected that of a model, with its `config.json`", path.display());
        let config = Config::load(path)?;
        let (names, kind) = weight_files(path)?;
        let files = names.iter().map(|name| TensorFile::open(&path.join(name))).collect::<Result<_>>()?;
        ModelFolder::of(path, config, files, kind)
    }

    /// A model that a GGUF file describes by itself, at `path` or in that folder.
    fn of_gguf(path: &Path, file: &Path) -> Result<Self> {
        let (tensors, config) = TensorFile::open_gguf(file)?;
        ensure!(
            path.is_dir() || tensors.gguf_parts().is_some_and(|parts| parts.len() == 1),
            "`{}` is one of several files of a model: name their folder",
            path.display()
        );
        ModelFolder::of(folder_of(path), Config::read(config, file)?, vec![tensors], Kind::Alone)
    }

    fn of(path: &Path, config: Config, files: Vec<TensorFile>, kind: Kind) -> Result<Self> {
        let generation = GenerationConfig::load(path)?;
        let mut folder = ModelFolder {
            path: path.to_owned(),
            config,
            generation,
            files,
            is_parallel: kind == Kind::Parallel,
            index: if let Kind::Indexed(index) = kind { Some(index) } else { None },
            places: IndexMap::new(),
            second_head: None,
        };
        folder.find_tensors()?;
        Ok(folder)
    }

    fn find_tensors(&mut self) -> Result<()> {
        let shapes: IndexMap<String, Vec<usize>> = self.config.parameter_shapes().into_iter().collect();
        let (embedding, head) = (self.config.embedding(), self.config.head());
        let mut found: IndexMap<String, Place> = IndexMap::new();
        for (file, tensors) in self.files.iter().enumerate() {
            for stored in tensors.tensors()? {
                let name = canonical(&stored.name, &self.config);
                let whole = match shapes.get(&name) {
                    Some(shape) => shape,
                    // That of a tied model: the embedding under another name, or else a second matrix.
                    None if name == head => &shapes[embedding],
                    None if is_constant(&name) => continue,
                    None => bail!(
                        "tensor `{}` in `{}` is none of the model that `config.json` describes",
                        stored.name,
                        tensors.path().display()
                    ),
                };
                let place = || format!("tensor `{}` in `{}`", stored.name, tensors.path().display());
                let share = if self.is_parallel { share(&self.config, &name) } else { Share::Whole };
                let expected = share.part_shape(&name, whole, self.files.len())?;
                ensure!(
                    expected == stored.shape,
                    "{} has shape {:?}, expected {expected:?} by `config.json`",
                    place(),
                    stored.shape
                );
                stored.check_dtype().map_err(|error| anyhow!("{} {error}", place()))?;
                let parts = &mut found
                    .entry(name)
                    .or_insert_with(|| Place { parts: Vec::new(), share, shape: whole.clone() })
                    .parts;
                if let Some((first, also)) = parts.last().filter(|(first, _)| !self.is_parallel || *first == file) {
                    let in_file = self.files[*first].path().display();
                    bail!("{} is there twice, also as `{}` in `{in_file}`: remove one", place(), also.name);
                }
                parts.push((file, stored));
            }
        }
        let expected = if self.is_parallel { self.files.len() } else { 1 };
        if let Some((_, place)) = found.iter().find(|(_, place)| place.parts.len() < expected) {
            let is_there = |file: &usize| place.parts.iter().any(|(with, _)| with == file);
            let without = (0..expected).find(|file| !is_there(file)).unwrap_or(0);
            let (name, path) = (&place.parts[0].1.name, self.files[without].path().display());
            bail!("tensor `{name}` is missing in `{path}`, and there for other ranks");
        }
        if self.config.sizes().tied
            && let Some(place) = found.swap_remove(head)
        {
            if found.contains_key(embedding) {
                self.second_head = Some(place);
            } else {
                // A tied model that was saved with its head alone.
                found.insert(embedding.to_owned(), place);
            }
        }
        let missing: Vec<&String> = shapes.keys().filter(|name| !found.contains_key(*name)).collect();
        if let Some(first) = missing.first() {
            let files: Vec<String> = self.files.iter().map(|file| format!("`{}`", file.path().display())).collect();
            bail!("tensor `{first}` is missing ({} of {} are) in {}", missing.len(), shapes.len(), files.join(", "));
        }
        self.places = shapes
            .into_keys()
            .map(|name| {
                let place = found.swap_remove(&name).expect("none is missing");
                (name, place)
            })
            .collect();
        Ok(())
    }

    /// The tokenizer that was saved with the model.
    ///
    /// Errors as [`ModelFolder::check_tokenizer`] does.
    pub(crate) fn tokenizer(&self) -> Result<TokenizerFile> {
        let tokenizer = tokenizer::load(&self.path, &self.config)?;
        self.check_tokenizer(&tokenizer)?;
        Ok(tokenizer)
    }

    /// Errors where its tokenizer has ids that the model has no row for.
    pub fn check_tokenizer(&self, tokenizer: &TokenizerFile) -> Result<()> {
        ensure!(
            tokenizer.size as usize <= self.config.vocab_size(),
            "`{}` has a tokenizer of {} ids and a model of {}: expected at least as many",
            self.path.display(),
            tokenizer.size,
            self.config.vocab_size()
        );
        Ok(())
    }

    /// What is odd in a model beside its tokenizer, as sentences.
    pub fn oddities(&self, tokenizer: &TokenizerFile) -> Vec<String> {
        let path = self.path.display();
        let mut odd = Vec::new();
        let ends = self.ends(tokenizer);
        let named = self.config.ends();
        if !named.is_empty() && !named.contains(&tokenizer.end) {
            let ends: Vec<String> = ends.iter().map(u32::to_string).collect();
            odd.push(format!(
                "the tokenizer of `{path}` ends a text with token {}, and its `config.json` with {}: texts to learn from end \
                 with the former, and the model stops at any of {}",
                tokenizer.end,
                named.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
                ends.join(", ")
            ));
        }
        if let (Some(own), Some(other)) = (self.config.begin(), tokenizer.begin)
            && own != other
        {
            odd.push(format!(
                "the tokenizer of `{path}` begins a text with token {other}, and its `config.json` with {own}: the former counts"
            ));
        }
        odd
    }

    /// The tokens at which the model stops, that of its tokenizer first.
    pub fn ends(&self, tokenizer: &TokenizerFile) -> Vec<u32> {
        generation::ends(tokenizer, &self.config, &self.generation)
    }

    /// What follows from it for other stages.
    pub fn facts(&self, tokenizer: &TokenizerFile) -> Facts {
        Facts { vocabulary: Some(tokenizer.vocabulary()), ends: Some(self.ends(tokenizer)), ..self.config.facts() }
    }

    /// Reads every value. Gives what is odd, as sentences.
    ///
    /// Errors when one is not finite, or what ranks have in common differs between them: it names the tensor.
    pub fn check_values(&self) -> Result<Vec<String>> {
        for place in self.places.values().chain(&self.second_head) {
            let mut first: Option<Vec<f32>> = None;
            for (file, stored) in &place.parts {
                let path = self.files[*file].path().display();
                if self.files[*file].encoded(stored)?.is_some_and(|matrix| matrix.is_finite()) {
                    continue;
                }
                let values = self.files[*file].values(stored)?;
                let tensor = Tensor::from_vec(values, stored.shape.as_slice(), &Device::Cpu)?;
                if let Some(found) = first_not_finite(&tensor)? {
                    bail!("tensor `{}` in `{path}` holds {found}: get the model again", stored.name);
                }
                if self.is_parallel && place.share == Share::Whole {
                    let values = tensor.flatten_all()?.to_vec1()?;
                    ensure!(
                        *first.get_or_insert_with(|| values.clone()) == values,
                        "tensor `{}` in `{path}` is not that of the first rank: the files are not of one moment of one model",
                        stored.name
                    );
                }
            }
        }
        let embedding = &self.places[self.config.embedding()];
        if self.second_head.is_none() || self.unlike_head(&self.read(embedding, &Device::Cpu)?)?.is_none() {
            return Ok(Vec::new());
        }
        Ok(vec![format!(
            "`{}` says `tie_word_embeddings: true`, and its weights hold a head that is not the embedding: they are taken as \
             two matrices",
            self.path.join("config.json").display()
        )])
    }

    /// The parameters, in the order of [`Config::parameter_shapes`]: matrices in the type that the file has, where they can
    /// stay in it, all else as f32. A head that was to be the embedding and is another matrix stays, as in `transformers`;
    /// the configuration says so then.
    pub(crate) fn parameters(&mut self, device: &Device) -> Result<IndexMap<String, Weight>> {
        self.settle_head()?;
        let mut parameters = IndexMap::with_capacity(self.places.len());
        for (name, place) in &self.places {
            let weight = match self.encoded_at(place)? {
                Some(matrix) => Weight::encoded_on(matrix, device),
                None => Weight::new(self.read(place, device)?),
            };
            parameters.insert(name.clone(), weight);
        }
        Ok(parameters)
    }

    /// Makes a second head that is not the embedding a parameter, and drops one that is.
    pub(super) fn settle_head(&mut self) -> Result<()> {
        if self.second_head.is_some() {
            let embedding = self.read(&self.places[self.config.embedding()], &Device::Cpu)?;
            let is_other = self.unlike_head(&embedding)?.is_some();
            if let Some(head) = self.second_head.take().filter(|_| is_other) {
                self.places.insert(self.config.head().to_owned(), head);
                self.config.untie();
            }
        }
        Ok(())
    }

    /// Names and shapes of the parameters, in the order of [`Config::parameter_shapes`].
    pub(super) fn names(&self) -> Vec<(String, Vec<usize>)> {
        self.places.iter().map(|(name, place)| (name.clone(), place.shape.clone())).collect()
    }

    /// The values of a parameter, in row-major order.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.values_at(self.places.get(name).with_context(|| format!("there is no parameter `{name}`"))?)
    }

    /// A parameter as it lies in its file, where it is a matrix of half floats or quantised.
    pub(super) fn encoded(&self, name: &str) -> Result<Option<Encoded>> {
        self.encoded_at(self.places.get(name).with_context(|| format!("there is no parameter `{name}`"))?)
    }

    /// The type of a parameter in its file.
    pub(super) fn format(&self, name: &str) -> Option<Format> {
        Some(self.places.get(name)?.parts[0].1.format())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold its weights.
    pub(super) fn files(&self) -> &[TensorFile] {
        &self.files
    }

    fn encoded_at(&self, place: &Place) -> Result<Option<Encoded>> {
        match &place.parts[..] {
            [(file, stored)] => self.files[*file].encoded(stored),
            _ => Ok(None),
        }
    }

    /// The second head, where it is not the embedding.
    fn unlike_head(&self, embedding: &Tensor) -> Result<Option<Tensor>> {
        let Some(place) = &self.second_head else { return Ok(None) };
        let head = self.read(place, embedding.device())?;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        Ok((values(&head)? != values(embedding)?).then_some(head))
    }

    fn values_at(&self, place: &Place) -> Result<Vec<f32>> {
        let read = |(file, stored): &(usize, Stored)| self.files[*file].values(stored);
        if !self.is_parallel || place.share == Share::Whole {
            return read(&place.parts[0]);
        }
        let parts = place.parts.iter().map(read).collect::<Result<_>>()?;
        Ok(place.share.joined(&place.shape, parts))
    }

    fn read(&self, place: &Place, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.values_at(place)?, place.shape.as_slice(), device)?)
    }

    /// Copies the model without its tokenizer, in the types it has. What PyTorch or llama2.c packed becomes safetensors.
    pub fn copy(&self, to: &Path) -> Result<()> {
        let copy_as = |from: &Path, name: &str| {
            std::fs::copy(from, to.join(name)).map(drop).with_context(|| format!("cannot copy `{}`", from.display()))
        };
        let copy = |name: &str| copy_as(&self.path.join(name), name);
        if let [file] = &self.files[..]
            && let Some(parts) = file.gguf_parts()
        {
            write_json(&to.join("config.json"), &self.config.to_json()?)?;
            let count = parts.len();
            return parts.iter().enumerate().try_for_each(|(i, part)| {
                let name = match count {
                    1 => "model.gguf".to_owned(),
                    _ => format!("model-{:05}-of-{count:05}.gguf", i + 1),
                };
                copy_as(part, &name)
            });
        }
        if self.path.join("config.json").exists() {
            copy("config.json")?;
        } else {
            write_json(&to.join("config.json"), &self.config.to_json()?)?;
        }
        if self.path.join(generation::FILE).exists() {
            copy(generation::FILE)?;
        }
        if !self.files.iter().all(TensorFile::is_kept) {
            return self.write_as_kept(to);
        }
        if let Some(index) = self.index {
            copy(index)?;
        }
        for file in &self.files {
            copy(name_of(file.path()))?;
        }
        Ok(())
    }

    /// Writes all of it as one safetensors file, in the types it has.
    fn write_as_kept(&self, to: &Path) -> Result<()> {
        let head = self.second_head.as_ref().map(|place| (self.config.head(), place));
        let places: Vec<(&str, &Place)> =
            self.places.iter().map(|(name, place)| (name.as_str(), place)).chain(head).collect();
        let format = |place: &Place| match place.parts[0].1.format() {
            format @ (Format::F16 | Format::BF16) => format,
            _ => Format::F32,
        };
        let entries: Vec<Entry> =
            places.iter().map(|(name, place)| Entry::new(name, &place.shape, format(place))).collect::<Result<_>>()?;
        write_one_by_one(&to.join("model.safetensors"), &entries, |index| {
            let (name, place) = places[index];
            encode(format(place), &self.values_at(place)?).with_context(|| format!("tensor `{name}`"))
        })
    }
}

/// How weights lie in a folder.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// In one file.
    Alone,
    /// In several, which an index names.
    Indexed(&'static str),
    /// In one for each rank.
    Parallel,
}

/// The folder that a path is, or that a file is in.
fn folder_of(path: &Path) -> &Path {
    if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) }
}

/// The file of llama2.c that `path` is or, of a folder, the only `.bin` that it holds.
fn llama2c_at(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() {
        return Ok(Llama2cFile::is(path).then(|| path.to_owned()));
    }
    let entries = std::fs::read_dir(path).map_err(|error| files::cannot("read", path, error))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let files: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|ending| ending == "bin") && !PickleFile::is(path)).collect();
    Ok(if let [file] = &files[..] { Some(file.clone()) } else { None })
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// The names of the files that hold a folder's weights, and how they do.
fn weight_files(folder: &Path) -> Result<(Vec<String>, Kind)> {
    for (single, index) in
        [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")]
    {
        if folder.join(single).exists() {
            return Ok((vec![single.to_owned()], Kind::Alone));
        }
        let path = folder.join(index);
        if path.exists() {
            return Ok((shards(folder, &path)?, Kind::Indexed(index)));
        }
    }
    if let Some(file) = Gguf::at(folder)? {
        return Ok((vec![name_of(&file).to_owned()], Kind::Alone));
    }
    if let Some(names) = ranks(folder)? {
        return Ok((names, Kind::Parallel));
    }
    bail!(
        "no weights in `{}`: expected `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`, \
         `pytorch_model.bin.index.json`, `mp4/pytorch_model_0.bin` and so on, or a `.gguf`",
        folder.display()
    )
}

/// The files of all ranks, where a folder has one `mpN`.
fn ranks(folder: &Path) -> Result<Option<Vec<String>>> {
    let entries = std::fs::read_dir(folder).map_err(|error| files::cannot("read", folder, error))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<(usize, String)> =
        names.filter_map(|name| Some((name.strip_prefix("mp")?.parse().ok()?, name))).collect();
    found.sort();
    let (count, name) = match &found[..] {
        [] => return Ok(None),
        [(count, name)] => (*count, name),
        [(_, one), (_, other), ..] => {
            bail!("`{}` holds a model for several numbers of ranks, `{one}` and `{other}`: keep one", folder.display())
        }
    };
    ensure!(
        (1..=RANKS).contains(&count),
        "`{name}` in `{}` is for {count} ranks: at most {RANKS} are read",
        folder.display()
    );
    let files: Vec<String> = (0..count).map(|rank| format!("{name}/pytorch_model_{rank}.bin")).collect();
    if let Some(missing) = files.iter().find(|file| !folder.join(file).exists()) {
        bail!("`{}` has no `{missing}`: get the parts of all {count} ranks", folder.display());
    }
    Ok(Some(files))
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<String>> {
    let json: Json = files::read_json(index, files::SETTINGS)?;
    let map =
        json["weight_map"].as_object().ok_or_else(|| anyhow!("`{}` has no object `weight_map`", index.display()))?;
    let mut shards = BTreeSet::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().with_context(|| format!("`{}` names no file for `{tensor}`", index.display()))?;
        let mut parts = Path::new(shard).components();
        let is_name = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        ensure!(is_name, "`{}` names `{shard}`: expected a file beside it", index.display());
        shards.insert(shard.to_owned());
    }
    ensure!(!shards.is_empty(), "`{}` names no file of weights", index.display());
    let missing: Vec<&String> = shards.iter().filter(|shard| !folder.join(shard).exists()).collect();
    if let Some(first) = missing.first() {
        let rest = if missing.len() > 1 { format!(" (and {} more)", missing.len() - 1) } else { String::new() };
        bail!("`{}` names `{first}`{rest}, which is not there: get the whole model", index.display());
    }
    Ok(shards.into_iter().collect())
}

/// The name with which a checkpoint of the bare model would have been saved with its head. Whatever a family calls that,
/// `transformers` knows it as `lm_head`, too.
fn canonical(name: &str, config: &Config) -> String {
    if name == "lm_head.weight" {
        config.head().to_owned()
    } else if name.starts_with(config.prefix()) || name == config.head() {
        name.to_owned()
    } else {
        format!("{}{name}", config.prefix())
    }
}

/// Causal masks and rotary frequencies that old checkpoints hold.
fn is_constant(name: &str) -> bool {
    [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"].iter().any(|constant| name.ends_with(constant))
}
