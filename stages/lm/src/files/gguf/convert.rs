//! A model in the terms of llama.cpp: the metadata and the tensors of its GGUF file. The way back of [`super::model`].
//!
//! What llama.cpp would compute otherwise than the model was trained is refused: nobody should measure one model and ship
//! another. A window of attention is no obstacle: a text that is no longer than the window does not see it, so that is the length
//! that the file allows.
//!
//! Source: `convert_hf_to_gguf.py`, `gguf-py/gguf/tensor_mapping.py` and `src/llama-model.cpp` of llama.cpp.

use anyhow::{Context, bail, ensure};
use contract::Result;
use serde_json::Value as Json;

use super::GgufValue;
use super::model::{FREQUENCIES, POSITIONS, by_part, inverse, names, row_order};
use crate::families::rope::frequencies;
use crate::families::{Config, Family, RopeScaling};

/// A model as its GGUF file has it.
pub(crate) struct Converted {
    /// All that is not about the tokenizer.
    pub(crate) metadata: Vec<(String, GgufValue)>,
    pub(crate) tensors: Vec<ConvertedTensor>,
}

/// A tensor of a GGUF file.
pub(crate) struct ConvertedTensor {
    pub(crate) name: String,
    /// Sizes in row-major order.
    pub(crate) shape: Vec<usize>,
    pub(crate) from: From,
    /// Whether it is read number by number, and stays f32 whatever the matrices become.
    pub(crate) is_exact: bool,
}

/// Where the values of a tensor come from.
pub(crate) enum From {
    /// A parameter as it is.
    Parameter(String),
    /// A parameter whose rows are put in another order: row `i` is row `order[i]` of it.
    Reordered(String, Vec<usize>),
    /// A matrix, transposed.
    Transposed(String),
    /// These numbers.
    Numbers(Vec<f32>),
}

/// What llama.cpp calls a family's architecture; `None` where it knows none.
pub(crate) fn architecture(family: Family) -> Option<&'static str> {
    match family {
        Family::Llama | Family::Mistral => Some("llama"),
        Family::Qwen2 => Some("qwen2"),
        Family::Qwen3 => Some("qwen3"),
        Family::Gpt2 => Some("gpt2"),
        Family::GptNeox => Some("gptneox"),
        Family::Opt => None,
    }
}

/// The families whose models become GGUF files, for messages.
pub(crate) fn families() -> String {
    let known = Family::ALL.iter().filter(|family| architecture(**family).is_some());
    known.map(|family| format!("`{}`", family.name())).collect::<Vec<_>>().join(", ")
}

impl Converted {
    /// Errors where llama.cpp does not compute such a model.
    pub(crate) fn of(config: &Config) -> Result<Self> {
        let family = config.family();
        let name = architecture(family).with_context(|| {
            format!("llama.cpp computes no model of type `{}`: expected one of {}", family.name(), families())
        })?;
        let json = config.to_json()?;
        let said = Said { config, json: &json, family, name };
        Ok(Converted { metadata: said.metadata()?, tensors: said.tensors()? })
    }
}

struct Said<'a> {
    config: &'a Config,
    json: &'a Json,
    family: Family,
    name: &'static str,
}

impl Said<'_> {
    fn number(&self, key: &str) -> Result<f64> {
        self.json[key].as_f64().with_context(|| format!("its configuration has no number `{key}`"))
    }

    fn refuse(&self, is_other: bool, what: &str) -> Result<()> {
        ensure!(!is_other, "llama.cpp computes models of type `{}` otherwise: {what}", self.family.name());
        Ok(())
    }

    /// Tokens that a text may have.
    fn length(&self) -> usize {
        let windows = self.json["sliding_window"].as_u64().filter(|_| self.json["use_sliding_window"] != false);
        self.config.positions().min(windows.map_or(usize::MAX, |window| window as usize))
    }

    fn metadata(&self) -> Result<Vec<(String, GgufValue)>> {
        let sizes = self.config.sizes();
        let mut metadata = vec![("general.architecture".to_owned(), GgufValue::Text(self.name.to_owned()))];
        let mut push = |key: &str, value: GgufValue| metadata.push((format!("{}.{key}", self.name), value));
        let size = |size: usize| GgufValue::Integer(size as i128);
        let inner = match self.config {
            Config::Gpt2(config) => config.inner(),
            _ => self.number("intermediate_size")? as usize,
        };
        push("block_count", size(sizes.layers));
        push("context_length", size(self.length()));
        push("embedding_length", size(sizes.width));
        push("feed_forward_length", size(inner));
        push("attention.head_count", size(sizes.heads));
        let epsilon = |key: &str| Ok::<_, anyhow::Error>(GgufValue::Float(self.number(key)?));
        match self.config {
            Config::Gpt2(config) => {
                self.refuse(
                    self.json["activation_function"] != "gelu_new",
                    "its `activation_function` is not `gelu_new`",
                )?;
                self.refuse(
                    config.scale_attn_by_inverse_layer_idx || !config.scale_attn_weights,
                    "its attention is scaled by layer, or not at all",
                )?;
                push("attention.layer_norm_epsilon", epsilon("layer_norm_epsilon")?);
                return Ok(metadata);
            }
            Config::GptNeox(config) => {
                self.refuse(self.json["hidden_act"] != "gelu", "its `hidden_act` is not `gelu`")?;
                self.refuse(!config.attention_bias, "its attention has no biases")?;
                push("attention.layer_norm_epsilon", epsilon("layer_norm_eps")?);
                push("rope.dimension_count", size(config.turned()));
                push("rope.freq_base", GgufValue::Float(config.rotary_emb_base));
                push("use_parallel_residual", GgufValue::Bool(config.use_parallel_residual));
            }
            _ => {
                let head_width = sizes.kv_width / self.config.kv_heads();
                push("attention.head_count_kv", size(self.config.kv_heads()));
                push("attention.key_length", size(head_width));
                push("attention.value_length", size(head_width));
                push("attention.layer_norm_rms_epsilon", epsilon("rms_norm_eps")?);
                push("rope.dimension_count", size(head_width));
                push("rope.freq_base", GgufValue::Float(self.number("rope_theta")?));
                push("vocab_size", size(sizes.vocabulary));
                let has_biases = self.json["attention_bias"] == true;
                self.refuse(self.family == Family::Qwen3 && has_biases, "its attention has biases")?;
            }
        }
        let scaling = &self.json["rope_scaling"];
        match scaling["rope_type"].as_str() {
            // That of Llama 3 is a tensor; a dynamic one begins behind the last position.
            None | Some("dynamic") => {}
            Some("llama3") => {
                let original = scaling["original_max_position_embeddings"].as_u64().unwrap_or(8192);
                push("rope.scaling.original_context_length", GgufValue::Integer(original.into()));
            }
            Some("linear") => {
                let factor = scaling["factor"].as_f64().context("its rotary scaling has no `factor`")?;
                push("rope.scaling.type", GgufValue::Text("linear".into()));
                push("rope.scaling.factor", GgufValue::Float(factor));
            }
            Some(other) => bail!("its rotary angles are scaled by the rule `{other}`, which is not written"),
        }
        Ok(metadata)
    }

    fn tensors(&self) -> Result<Vec<ConvertedTensor>> {
        let heads = self.config.sizes().heads;
        let names = names(self.name).context("an architecture without names")?;
        let mut tensors = Vec::new();
        for (from, shape) in self.config.parameter_shapes() {
            let name = names.in_gguf(&from).with_context(|| format!("parameter `{from}` has no name in GGUF"))?;
            let part = from.rsplit('.').nth(1).unwrap_or_default();
            let transposed = || shape.iter().rev().copied().collect();
            let (from, shape) = match part {
                "q_proj" if self.name == "llama" => (reordered(&from, &interleaved(shape[0], heads)), shape),
                "k_proj" if self.name == "llama" => {
                    (reordered(&from, &interleaved(shape[0], self.config.kv_heads())), shape)
                }
                "query_key_value" => (reordered(&from, &by_part(shape[0], heads)), shape),
                "c_attn" | "c_proj" | "c_fc" if shape.len() == 2 => {
                    let turned = transposed();
                    (From::Transposed(from), turned)
                }
                _ => (From::Parameter(from), shape),
            };
            // Vectors, and the table of positions, whose rows are added.
            let is_exact = shape.len() == 1 || name == POSITIONS;
            tensors.push(ConvertedTensor { name, shape, from, is_exact });
        }
        let scaling = self.json["rope_scaling"].clone();
        if let Ok(scaling @ RopeScaling::Llama3 { .. }) = serde_json::from_value(scaling) {
            let (width, theta) = (self.config.sizes().kv_width / self.config.kv_heads(), self.number("rope_theta")?);
            let [plain, scaled] = [None, Some(&scaling)].map(|scaling| frequencies(width, theta, scaling));
            let factors: Vec<f32> = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
            tensors.push(ConvertedTensor {
                name: FREQUENCIES.to_owned(),
                shape: vec![factors.len()],
                from: From::Numbers(factors),
                is_exact: true,
            });
        }
        Ok(tensors)
    }
}

fn reordered(from: &str, order: &[usize]) -> From {
    From::Reordered(from.to_owned(), order.to_vec())
}

/// For each row of the file the row of the checkpoint: the way back of [`row_order`].
fn interleaved(rows: usize, heads: usize) -> Vec<usize> {
    inverse(&row_order(rows, heads))
}
