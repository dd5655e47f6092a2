//! Model folders, written for others: safetensors in one file or several, parts for the ranks of a tensor-parallel program, and
//! GGUF. A tensor at a time, so that a model need not fit into memory.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use contract::Result;
use contract::files::cannot;
use serde_json::json;

use super::folder::ModelFolder;
use super::gguf::GgufValue;
use super::gguf::convert::{self, Converted, ConvertedTensor, From};
use super::gguf::{reordered, write as gguf};
use super::parallel::{RANKS, share, transpose};
use super::pickle;
use super::tensors::{Entry, TensorFile, dtype_of, write_json, write_one_by_one};
use crate::families::Family;
use crate::kernels::encode::encode;
use crate::terms::format::Format;

/// Whether llama.cpp computes models of that family, by its name in pipelines.
pub fn is_in_llama_cpp(family: &str) -> bool {
    let known = Family::ALL.iter().find(|known| known.name() == family);
    known.is_some_and(|family| convert::architecture(*family).is_some())
}

/// The families whose models llama.cpp computes, for messages.
pub fn families_in_llama_cpp() -> String {
    convert::families()
}

/// The format in which a matrix with rows of `columns` numbers is written where `wanted` is asked for: that, if its blocks fill
/// rows, else the one that llama.cpp takes instead.
pub(crate) fn fitting(wanted: Format, columns: usize) -> Format {
    let instead = match wanted {
        Format::Q2K | Format::Q3K => Format::Q4_0,
        Format::Q4K => Format::Q5_0,
        Format::Q5K => Format::Q5_1,
        Format::Q6K => Format::Q8_0,
        other => other,
    };
    [wanted, instead].into_iter().find(|format| columns.is_multiple_of(format.block())).unwrap_or(Format::F16)
}

impl ModelFolder {
    /// Whether all weights are plain safetensors, without quantised matrices.
    pub fn is_plain(&self) -> bool {
        self.files().iter().all(TensorFile::is_safetensors)
            && self.names().iter().all(|(name, _)| self.format(name).is_some_and(|format| !format.is_quantised()))
    }

    /// Writes the weights as safetensors, in `format` (`None`: each as it is, what is quantised as f32), in files of at most
    /// `shard` bytes: as `transformers` divides and names them.
    ///
    /// Errors where a number is beyond the range of the format: it names the tensor.
    pub fn write_safetensors(&mut self, to: &Path, format: Option<Format>, shard: Option<u64>) -> Result<()> {
        self.settle_head()?;
        let entry = |(name, shape): (String, Vec<usize>)| {
            let own = self.format(&name).filter(|format| !format.is_quantised()).unwrap_or(Format::F32);
            Ok((Entry::new(&name, &shape, format.unwrap_or(own))?, format.unwrap_or(own)))
        };
        let entries = self.names().into_iter().map(entry).collect::<Result<Vec<_>>>()?;
        let shards = shards(entries, shard.unwrap_or(u64::MAX));
        let count = shards.len();
        let (mut map, mut numbers, mut bytes) = (std::collections::BTreeMap::new(), 0, 0);
        for (index, shard) in shards.into_iter().enumerate() {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let (entries, formats): (Vec<Entry>, Vec<Format>) = shard.into_iter().unzip();
            write_one_by_one(&to.join(&file), &entries, |index| {
                let name = &entries[index].name;
                encode(formats[index], &self.values(name)?).with_context(|| format!("tensor `{name}`"))
            })?;
            for entry in &entries {
                numbers += entry.shape.iter().product::<usize>();
                bytes += entry.bytes();
                map.insert(entry.name.clone(), file.clone());
            }
        }
        if count > 1 {
            let index = json!({"metadata": {"total_parameters": numbers, "total_size": bytes}, "weight_map": map});
            write_json(&to.join("model.safetensors.index.json"), &index)?;
        }
        Ok(())
    }

    /// Writes the weights as the parts of so many ranks, `mp4/pytorch_model_0.bin` and so on, in `format` (`None`: f32).
    ///
    /// Errors where ranks cannot share a tensor evenly: it names the tensor.
    pub fn write_tensor_parallel(&mut self, to: &Path, format: Option<Format>, ranks: usize) -> Result<()> {
        ensure!((1..=RANKS).contains(&ranks), "there cannot be {ranks} ranks: expected 1 to {RANKS}");
        self.settle_head()?;
        let format = format.unwrap_or(Format::F32);
        let dtype = dtype_of(format).with_context(|| format!("PyTorch has no type {format}"))?;
        let names = self.names();
        let part = |(name, shape): &(String, Vec<usize>)| share(&self.config, name).part_shape(name, shape, ranks);
        let shapes = names.iter().map(part).collect::<Result<Vec<_>>>()?;
        let mut tensors: Vec<pickle::Saved<'_>> = names
            .iter()
            .zip(&shapes)
            .enumerate()
            .map(|(storage, ((name, _), shape))| pickle::Saved { name, shape: shape.clone(), storage })
            .collect();
        if self.config.sizes().tied {
            // A `state_dict()` has the head under its own name as well.
            let embedding = names.iter().position(|(name, _)| name == self.config.embedding());
            let storage = embedding.context("a model has an embedding")?;
            tensors.push(pickle::Saved { name: self.config.head(), shape: shapes[storage].clone(), storage });
        }
        let folder = to.join(format!("mp{ranks}"));
        fs::create_dir_all(&folder).map_err(|error| cannot("make", &folder, error))?;
        for rank in 0..ranks {
            let path = folder.join(format!("pytorch_model_{rank}.bin"));
            pickle::write(&path, dtype, &tensors, |storage| {
                let (name, shape) = &names[storage];
                let part = share(&self.config, name).part(shape, self.values(name)?, ranks, rank);
                encode(format, &part).with_context(|| format!("tensor `{name}`"))
            })?;
        }
        Ok(())
    }

    /// Writes a GGUF file with the matrices in `format`, as `llama-quantize --pure` would, and vectors in f32; `metadata` is that
    /// of its tokenizer. What is in that format already stays as it is.
    ///
    /// Errors where llama.cpp does not compute such a model.
    pub fn write_gguf(&mut self, to: &Path, format: Format, metadata: Vec<(String, GgufValue)>) -> Result<()> {
        self.settle_head()?;
        let Converted { metadata: mut all, tensors } = Converted::of(&self.config)?;
        all.push(("general.file_type".to_owned(), GgufValue::Integer(file_type(format))));
        if format.is_quantised() {
            all.push(("general.quantization_version".to_owned(), GgufValue::Integer(2)));
        }
        all.extend(metadata);
        let entries: Vec<gguf::Entry> = tensors
            .iter()
            .map(|tensor| gguf::Entry {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                format: match tensor.shape.last() {
                    Some(columns) if !tensor.is_exact => fitting(format, *columns),
                    _ => Format::F32,
                },
            })
            .collect();
        gguf::write(to, &all, &entries, |index| {
            let (tensor, entry) = (&tensors[index], &entries[index]);
            self.gguf_bytes(tensor, entry.format).with_context(|| format!("tensor `{}`", tensor.name))
        })
    }

    fn gguf_bytes(&self, tensor: &ConvertedTensor, format: Format) -> Result<Vec<u8>> {
        let as_it_is = match &tensor.from {
            From::Parameter(name) => self.encoded(name)?,
            From::Reordered(name, order) => self.encoded(name)?.map(|matrix| matrix.reordered(order)),
            From::Transposed(_) | From::Numbers(_) => None,
        };
        if let Some(matrix) = as_it_is.filter(|matrix| matrix.format == format) {
            return Ok(matrix.rows(0..matrix.rows).to_vec());
        }
        let values = match &tensor.from {
            From::Parameter(name) => self.values(name)?,
            From::Reordered(name, order) => reordered(&self.values(name)?, order),
            From::Transposed(name) => {
                let (rows, columns) = (tensor.shape[1], tensor.shape[0]);
                transpose(&self.values(name)?, rows, columns)
            }
            From::Numbers(values) => values.clone(),
        };
        encode(format, &values)
    }
}

/// The number by which llama.cpp calls what most tensors of a file are (`llama_ftype`).
fn file_type(format: Format) -> i128 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q8_0 => 7,
        Format::Q5_0 => 8,
        Format::Q5_1 => 9,
        Format::Q2K => 10,
        Format::Q3K => 12,
        Format::Q4K => 15,
        Format::Q5K => 17,
        Format::Q6K => 18,
        Format::BF16 => 32,
    }
}

/// Divides tensors into files: a file is closed before the tensor that would make it larger than `most`, and a tensor that is
/// larger by itself has one of its own.
fn shards(entries: Vec<(Entry, Format)>, most: u64) -> Vec<Vec<(Entry, Format)>> {
    let (mut shards, mut current, mut size) = (Vec::new(), Vec::new(), 0);
    for entry in entries {
        let bytes = entry.0.bytes() as u64;
        if bytes > most {
            shards.push(vec![entry]);
            continue;
        }
        if size + bytes > most {
            shards.push(std::mem::take(&mut current));
            size = 0;
        }
        size += bytes;
        current.push(entry);
    }
    if !current.is_empty() {
        shards.push(current);
    }
    shards
}
