//! Models as Hugging Face folders.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::pickle::PthTensors;
use candle_core::{DType, Device, Tensor};
use contract::Result;
use contract::files::{self, in_words};
use contract::value::write;
use half::{bf16, f16};
use indexmap::IndexMap;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorView};
use serde_json::Value as Json;

use crate::config::Config;
use crate::model::LanguageModel;

/// Writes everything that [`LanguageModel::load`] and `transformers` read.
pub(crate) fn save(model: &LanguageModel, folder: &Path) -> Result<()> {
    let config = model.config.to_json()?;
    write_json(&folder.join("config.json"), &config)?;
    write_tensors(&folder.join("model.safetensors"), model.parameters().iter(), None)?;
    let generation = ["bos_token_id", "eos_token_id", "pad_token_id"].map(|key| (key.to_owned(), config[key].clone()));
    write_json(&folder.join("generation_config.json"), &Json::Object(generation.into_iter().collect()))?;
    model.tokenizer.save(folder)
}

/// The parameters of a model folder as f32, in the order of [`Config::parameter_shapes`].
pub(crate) fn parameters(folder: &Path, config: &Config, device: &Device) -> Result<IndexMap<String, Tensor>> {
    let shapes = config.parameter_shapes();
    let wanted: HashMap<&str, &[usize]> =
        shapes.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    let mut found: HashMap<String, Tensor> = HashMap::new();
    let mut head = None;
    let files = weight_files(folder)?;
    for file in &files {
        let mut keep = |stored: &str, shape: &[usize], values: &dyn Fn() -> Result<Vec<f32>>| -> Result<()> {
            let name = canonical(stored, config);
            match wanted.get(name.as_str()) {
                Some(expected) => {
                    ensure!(
                        *expected == shape,
                        "tensor `{stored}` in `{}` has shape {shape:?}, expected {expected:?} by `config.json`",
                        file.display()
                    );
                    let values = values().with_context(|| format!("in `{}`", file.display()))?;
                    found.insert(name, Tensor::from_vec(values, shape, device)?);
                }
                // A tied model that was saved with its head alone.
                None if name == HEAD && !found.contains_key(config.embedding()) => {
                    ensure!(
                        wanted[config.embedding()] == shape,
                        "tensor `{stored}` in `{}` has shape {shape:?}, expected {:?} by `config.json`",
                        file.display(),
                        wanted[config.embedding()]
                    );
                    let values = values().with_context(|| format!("in `{}`", file.display()))?;
                    head = Some(Tensor::from_vec(values, shape, device)?);
                }
                None if is_ignored(&name) => {}
                None => {
                    bail!("tensor `{stored}` in `{}` is none of the model that `config.json` describes", file.display())
                }
            }
            Ok(())
        };
        if file.extension().is_some_and(|e| e == "bin") {
            read_pickle(file, &mut keep)?;
        } else {
            read_safetensors(file, &mut keep)?;
        }
    }
    if let Some(head) = head {
        found.entry(config.embedding().to_owned()).or_insert(head);
    }
    let missing: Vec<&str> =
        shapes.iter().map(|(name, _)| name.as_str()).filter(|name| !found.contains_key(*name)).collect();
    if let Some(first) = missing.first() {
        let files: Vec<String> = files.iter().map(|f| format!("`{}`", f.display())).collect();
        bail!("tensor `{first}` is missing ({} of {} are) in {}", missing.len(), shapes.len(), files.join(", "));
    }
    let in_order = shapes.into_iter().map(|(name, _)| {
        let tensor = found.remove(&name).expect("checked to be there");
        (name, tensor)
    });
    Ok(in_order.collect())
}

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
    let mut tensors = BTreeMap::new();
    let header = read_safetensors(path, &mut |name, shape, values| {
        tensors.insert(name.to_owned(), Tensor::from_vec(values()?, shape, device)?);
        Ok(())
    })?;
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
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

/// The files that hold a folder's weights.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    for (single, index) in
        [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")]
    {
        let path = folder.join(single);
        if path.exists() {
            return Ok(vec![path]);
        }
        let path = folder.join(index);
        if path.exists() {
            let json: Json = files::read_json(&path, files::SETTINGS)?;
            let map = json["weight_map"]
                .as_object()
                .ok_or_else(|| anyhow!("`{}` has no object `weight_map`", path.display()))?;
            let shards: BTreeSet<&str> = map.values().filter_map(Json::as_str).collect();
            return Ok(shards.into_iter().map(|shard| folder.join(shard)).collect());
        }
    }
    bail!(
        "no weights in `{}`: expected `model.safetensors`, `model.safetensors.index.json` or `pytorch_model.bin`",
        folder.display()
    )
}

/// The name with which a checkpoint of the bare model would have been saved with its head.
fn canonical(name: &str, config: &Config) -> String {
    if name.starts_with(config.prefix()) || name == HEAD {
        name.to_owned()
    } else {
        format!("{}{name}", config.prefix())
    }
}

/// The output head, where it is not the input embedding.
const HEAD: &str = "lm_head.weight";

/// Causal masks and rotary frequencies that old checkpoints hold, and a head that is the embedding anyway.
fn is_ignored(name: &str) -> bool {
    let constants = [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"];
    constants.iter().any(|constant| name.ends_with(constant)) || name == HEAD
}

/// What is done with each tensor of a file: its name, its shape, and how to get its elements.
type Keep<'a> = dyn FnMut(&str, &[usize], &dyn Fn() -> Result<Vec<f32>>) -> Result<()> + 'a;

/// Gives the header. Of the values, one tensor's are in memory at a time.
fn read_safetensors(path: &Path, keep: &mut Keep<'_>) -> Result<Metadata> {
    let file = files::open(path, files::WEIGHTS)?;
    let (length, mut file) = (file.size(), file.into_file());
    let (start, header) = read_header(&mut file, length)
        .map_err(|e| anyhow!("`{}` is not a whole safetensors file ({e:#}): get it again", path.display()))?;
    let file = RefCell::new(file);
    for name in header.offset_keys() {
        let info = header.info(&name).context("a tensor without a place")?;
        keep(&name, &info.shape, &|| {
            let (from, to) = info.data_offsets;
            let mut file = file.borrow_mut();
            file.seek(SeekFrom::Start(start + from as u64))?;
            to_f32(&name, info.dtype, &mut *file, to - from)
        })?;
    }
    Ok(header)
}

/// Most bytes of a header: what the format allows.
const HEADER: u64 = 100_000_000;

/// Where the values begin, and what the header says of them.
fn read_header(file: &mut impl Read, length: u64) -> Result<(u64, Metadata)> {
    let mut size = [0; 8];
    file.read_exact(&mut size)?;
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

fn read_pickle(path: &Path, keep: &mut Keep<'_>) -> Result<()> {
    let advice = "expected what `torch.save` of PyTorch 1.6 or later writes; convert the model to safetensors";
    let file = PthTensors::new(path, None).with_context(|| format!("cannot read `{}`: {advice}", path.display()))?;
    let mut names: Vec<&String> = file.tensor_infos().keys().collect();
    names.sort();
    ensure!(!names.is_empty(), "no tensors in `{}`: {advice}", path.display());
    for name in names {
        let shape = file.tensor_infos()[name].layout.shape().dims().to_vec();
        keep(name, &shape, &|| {
            let tensor = file.get(name)?.with_context(|| format!("tensor `{name}` cannot be read"))?;
            Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        })?;
    }
    Ok(())
}

/// The values that the next `bytes` of a file hold.
fn to_f32(name: &str, dtype: Dtype, file: &mut impl Read, bytes: usize) -> Result<Vec<f32>> {
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
        other => bail!("tensor `{name}` has type {other:?}, expected F32, F16, BF16 or F64"),
    }
}
