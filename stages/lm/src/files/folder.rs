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
use super::tensors::{Stored, TensorFile, write_json};
use super::tokenizer;
use crate::families::Config;
use crate::finite::first_not_finite;
use crate::weights::Weight;

/// A folder that holds a model this crate computes.
pub struct ModelFolder {
    path: PathBuf,
    /// Sizes and options.
    pub config: Config,
    pub(crate) generation: GenerationConfig,
    files: Vec<TensorFile>,
    index: Option<&'static str>,
    /// Where each parameter is, in the order of [`Config::parameter_shapes`].
    places: IndexMap<String, Place>,
    /// A head that is there although it is to be the embedding.
    second_head: Option<Place>,
}

/// A tensor in one of the files.
struct Place {
    file: usize,
    stored: Stored,
}

/// Names of the files of a folder that make a model without its tokenizer, or their endings.
pub const MODEL_FILES: [&str; 7] = [
    "config.json",
    generation::FILE,
    "*.safetensors",
    "model.safetensors.index.json",
    "*.bin",
    "pytorch_model.bin.index.json",
    "*.gguf",
];

impl ModelFolder {
    /// Looks into a folder: `config.json`, `generation_config.json`, and the headers of the files that hold its weights,
    /// `model.safetensors`, `pytorch_model.bin`, or those that an index names, or else a GGUF file (or the parts of one), by
    /// itself too, which says all that `config.json` would.
    ///
    /// Errors when the model is none that this crate computes, or tensors are missing, foreign, there twice, or of another
    /// shape or type than they must be: they name file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join("config.json").exists()
            && let Some(file) = Gguf::at(path)?
        {
            return ModelFolder::of_gguf(path, &file);
        }
        ensure!(path.is_dir(), "`{}` is no folder: expected that of a model, with its `config.json`", path.display());
        let config = Config::load(path)?;
        let (names, index) = weight_files(path)?;
        let files = names.iter().map(|name| TensorFile::open(&path.join(name))).collect::<Result<_>>()?;
        ModelFolder::of(path, config, files, index)
    }

    /// A model that a GGUF file describes by itself, at `path` or in that folder.
    fn of_gguf(path: &Path, file: &Path) -> Result<Self> {
        let (tensors, config) = TensorFile::open_gguf(file)?;
        ensure!(
            path.is_dir() || tensors.gguf_parts().is_some_and(|parts| parts.len() == 1),
            "`{}` is one of several files of a model: name their folder",
            path.display()
        );
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        ModelFolder::of(folder, Config::read(config, file)?, vec![tensors], None)
    }

    fn of(path: &Path, config: Config, files: Vec<TensorFile>, index: Option<&'static str>) -> Result<Self> {
        let generation = GenerationConfig::load(path)?;
        let mut folder = ModelFolder {
            path: path.to_owned(),
            config,
            generation,
            files,
            index,
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
                let expected = match shapes.get(&name) {
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
                ensure!(
                    *expected == stored.shape,
                    "{} has shape {:?}, expected {expected:?} by `config.json`",
                    place(),
                    stored.shape
                );
                stored.check_dtype().map_err(|error| anyhow!("{} {error}", place()))?;
                if let Some(first) = found.get(&name) {
                    let (also, in_file) = (&first.stored.name, self.files[first.file].path().display());
                    bail!("{} is there twice, also as `{also}` in `{in_file}`: remove one", place());
                }
                found.insert(name, Place { file, stored });
            }
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
    /// Errors when one is not finite: it names the tensor.
    pub fn check_values(&self) -> Result<Vec<String>> {
        for place in self.places.values().chain(&self.second_head) {
            let tensor = self.read(place, &Device::Cpu)?;
            if let Some(found) = first_not_finite(&tensor)? {
                let path = self.files[place.file].path().display();
                bail!("tensor `{}` in `{path}` holds {found}: get the model again", place.stored.name);
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
        let mut parameters = IndexMap::with_capacity(self.places.len());
        for (name, place) in &self.places {
            let weight = match self.files[place.file].encoded(&place.stored)? {
                Some(matrix) => Weight::encoded_on(matrix, device),
                None => Weight::new(self.read(place, device)?),
            };
            parameters.insert(name.clone(), weight);
        }
        if self.second_head.is_some() {
            let embedding = match parameters[self.config.embedding()].dense() {
                Some(values) => values.clone(),
                None => self.read(&self.places[self.config.embedding()], device)?,
            };
            if let Some(head) = self.unlike_head(&embedding)? {
                parameters.insert(self.config.head().to_owned(), Weight::new(head));
                self.config.untie();
            }
        }
        Ok(parameters)
    }

    /// The second head, where it is not the embedding.
    fn unlike_head(&self, embedding: &Tensor) -> Result<Option<Tensor>> {
        let Some(place) = &self.second_head else { return Ok(None) };
        let head = self.read(place, embedding.device())?;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        Ok((values(&head)? != values(embedding)?).then_some(head))
    }

    fn read(&self, place: &Place, device: &Device) -> Result<Tensor> {
        let values = self.files[place.file].values(&place.stored.name)?;
        Ok(Tensor::from_vec(values, place.stored.shape.as_slice(), device)?)
    }

    /// Copies the model without its tokenizer. What PyTorch packed becomes safetensors, in the type it has.
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
        copy("config.json")?;
        if self.path.join(generation::FILE).exists() {
            copy(generation::FILE)?;
        }
        if let [file] = &self.files[..]
            && file.is_pickle()
        {
            return file.convert(&to.join("model.safetensors"));
        }
        if self.files.iter().any(TensorFile::is_pickle) {
            return self.convert(to);
        }
        if let Some(index) = self.index {
            copy(index)?;
        }
        for file in &self.files {
            copy(name_of(file.path()))?;
        }
        Ok(())
    }

    /// Shards of PyTorch's become shards of safetensors.
    fn convert(&self, to: &Path) -> Result<()> {
        let mut map = serde_json::Map::new();
        for file in &self.files {
            let name = Path::new(name_of(file.path())).with_extension("safetensors");
            let name = name.to_string_lossy();
            for stored in file.tensors()? {
                map.insert(stored.name, name.as_ref().into());
            }
            file.convert(&to.join(name.as_ref()))?;
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": map});
        write_json(&to.join("model.safetensors.index.json"), &index)
    }
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// The names of the files that hold a folder's weights, and the index that names them.
fn weight_files(folder: &Path) -> Result<(Vec<String>, Option<&'static str>)> {
    for (single, index) in
        [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")]
    {
        if folder.join(single).exists() {
            return Ok((vec![single.to_owned()], None));
        }
        let path = folder.join(index);
        if path.exists() {
            return Ok((shards(folder, &path)?, Some(index)));
        }
    }
    if let Some(file) = Gguf::at(folder)? {
        return Ok((vec![name_of(&file).to_owned()], None));
    }
    bail!(
        "no weights in `{}`: expected `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`, \
         `pytorch_model.bin.index.json` or a `.gguf`",
        folder.display()
    )
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
