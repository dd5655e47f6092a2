//! The model in a GGUF file, in the terms of Hugging Face: its `config.json`, and what its tensors are called there.
//!
//! llama.cpp turns neighbouring channels of a head by one rotary angle, in models of architecture `llama`; Hugging Face
//! checkpoints turn channels that lie half a head apart. Converters therefore reorder the rows of `q_proj` and `k_proj`,
//! and a reader has to undo it: [`row_order`]. Those of GPT-NeoX take queries, keys and values apart, and those of GPT-2
//! transpose its matrices. The architectures `qwen2` and `qwen3` are as in Hugging Face checkpoints.
//!
//! Source: `gguf-py/gguf/constants.py` and `tensor_mapping.py`, `convert_hf_to_gguf.py` of llama.cpp.

use anyhow::{Context, anyhow, bail, ensure};
use contract::Result;
use serde_json::{Value as Json, json};

use super::Gguf;
use crate::terms::format::Format;

/// What a GGUF file says of its model.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufModel {
    /// The `config.json` of a Hugging Face folder.
    pub config: Json,
    /// The tensors that are parameters, in the order of the file.
    pub tensors: Vec<ModelTensor>,
}

/// A tensor that is a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelTensor {
    /// Its place in [`Gguf::tensors`].
    pub index: usize,
    /// Its name in Hugging Face checkpoints.
    pub name: String,
    /// How it lies in the file.
    pub order: Order,
}

/// How a tensor lies in a file.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// As in Hugging Face checkpoints.
    Same,
    /// With its rows in another order: row `i` of the checkpoint is row `order[i]` of the file.
    Rows(Vec<usize>),
    /// Transposed. Blocks lie along what are columns then, so that its numbers have to be decoded.
    Transposed,
}

impl ModelTensor {
    /// Its shape in Hugging Face checkpoints.
    pub fn shape(&self, gguf: &Gguf) -> Vec<usize> {
        let shape = &gguf.tensors()[self.index].shape;
        if self.order == Order::Transposed { shape.iter().rev().copied().collect() } else { shape.clone() }
    }
}

/// For each row of a Hugging Face `q_proj` or `k_proj`, weights and biases alike, the row of the file that it is. `rows` are
/// those of all `heads`, which have an even number of rows each.
///
/// Within a head of `D` rows, rows `i` and `D/2 + i` of the checkpoint are rows `2i` and `2i + 1` of the file.
pub fn row_order(rows: usize, heads: usize) -> Vec<usize> {
    let width = rows / heads;
    let half = width / 2;
    (0..rows).map(|row| row / width * width + row % width % half * 2 + row % width / half).collect()
}

/// For each row of the file the row of the checkpoint, where queries, keys and values stand head by head in the checkpoint, and
/// one behind another in the file.
pub(super) fn by_part(rows: usize, heads: usize) -> Vec<usize> {
    let width = rows / heads / 3;
    let row = |part: usize, head: usize, channel: usize| (head * 3 + part) * width + channel;
    let heads = 0..heads;
    (0..3)
        .flat_map(|part| heads.clone().flat_map(move |head| (0..width).map(move |channel| row(part, head, channel))))
        .collect()
}

/// The way back of an order.
pub(super) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(to, from)| inverse[*from] = to);
    inverse
}

/// The rows of a matrix, or the numbers of a vector, in another order.
pub(crate) fn reordered(values: &[f32], order: &[usize]) -> Vec<f32> {
    let width = values.len() / order.len();
    order.iter().flat_map(|row| &values[row * width..][..width]).copied().collect()
}

/// An architecture of llama.cpp.
pub(super) struct Architecture {
    /// Its name in GGUF.
    name: &'static str,
    /// Its `model_type`.
    model_type: &'static str,
    /// Its class, for those who open the folder in Python.
    class: &'static str,
    names: Names,
}

const ARCHITECTURES: [Architecture; 5] = [
    Architecture { name: "llama", model_type: "llama", class: "LlamaForCausalLM", names: LLAMA },
    Architecture { name: "qwen2", model_type: "qwen2", class: "Qwen2ForCausalLM", names: LLAMA },
    Architecture { name: "qwen3", model_type: "qwen3", class: "Qwen3ForCausalLM", names: LLAMA },
    Architecture { name: "gpt2", model_type: "gpt2", class: "GPT2LMHeadModel", names: GPT2 },
    Architecture { name: "gptneox", model_type: "gpt_neox", class: "GPTNeoXForCausalLM", names: GPT_NEOX },
];

/// Factors of rotary frequencies, one for each pair of channels.
pub(super) const FREQUENCIES: &str = "rope_freqs.weight";
/// The table of positions.
pub(super) const POSITIONS: &str = "position_embd.weight";
const HEAD: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";
const NORM: &str = "output_norm";

/// What the parameters of an architecture are called in Hugging Face checkpoints.
pub(super) struct Names {
    /// The embedding, the head and, where there is one, the table of positions.
    whole: [(&'static str, &'static str); 3],
    /// The last norm.
    norm: &'static str,
    /// What stands before the number of a layer.
    layers: &'static str,
    /// The parts of a block, as llama.cpp and Hugging Face call them.
    parts: &'static [(&'static str, &'static str)],
}

const LLAMA: Names = Names {
    whole: [(EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight"), (POSITIONS, "")],
    norm: "model.norm",
    layers: "model.layers.",
    parts: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ],
};

const GPT2: Names = Names {
    whole: [(EMBEDDING, "transformer.wte.weight"), (HEAD, "lm_head.weight"), (POSITIONS, "transformer.wpe.weight")],
    norm: "transformer.ln_f",
    layers: "transformer.h.",
    parts: &[
        ("attn_norm", "ln_1"),
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_norm", "ln_2"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
};

const GPT_NEOX: Names = Names {
    whole: [(EMBEDDING, "gpt_neox.embed_in.weight"), (HEAD, "embed_out.weight"), (POSITIONS, "")],
    norm: "gpt_neox.final_layer_norm",
    layers: "gpt_neox.layers.",
    parts: &[
        ("attn_norm", "input_layernorm"),
        ("attn_qkv", "attention.query_key_value"),
        ("attn_output", "attention.dense"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
};

/// What the parameters of an architecture are called, by its name in GGUF.
pub(super) fn names(architecture: &str) -> Option<&'static Names> {
    ARCHITECTURES.iter().find(|known| known.name == architecture).map(|known| &known.names)
}

impl Names {
    /// The name in a Hugging Face checkpoint of a tensor in a file.
    fn in_checkpoint(&self, name: &str) -> Option<String> {
        if let Some((_, whole)) = self.whole.iter().find(|(own, whole)| *own == name && !whole.is_empty()) {
            return Some((*whole).to_owned());
        }
        let (rest, kind) = name.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
        if rest == NORM {
            return Some(format!("{}.{kind}", self.norm));
        }
        let (layer, rest) = rest.strip_prefix("blk.")?.split_once('.')?;
        let layer: u32 = layer.parse().ok()?;
        let (_, part) = self.parts.iter().find(|(own, _)| *own == rest)?;
        Some(format!("{}{layer}.{part}.{kind}", self.layers))
    }

    /// The way back.
    pub(super) fn in_gguf(&self, name: &str) -> Option<String> {
        if let Some((own, _)) = self.whole.iter().find(|(_, whole)| *whole == name) {
            return Some((*own).to_owned());
        }
        let (rest, kind) = name.rsplit_once('.')?;
        if rest == self.norm {
            return Some(format!("{NORM}.{kind}"));
        }
        let (layer, rest) = rest.strip_prefix(self.layers)?.split_once('.')?;
        let (own, _) = self.parts.iter().find(|(_, part)| *part == rest)?;
        Some(format!("blk.{layer}.{own}.{kind}"))
    }
}

/// Whether a tensor follows from the configuration.
fn is_constant(name: &str) -> bool {
    name == FREQUENCIES || name.ends_with(".attn_rot_embd") || name.ends_with(".attn_rot_embd.weight")
}

impl GgufModel {
    /// Reads what a file says of its model.
    ///
    /// Errors where its architecture is none of those above, where it asks for what Hugging Face models of that family do not
    /// compute, or where a tensor is none of the family; they name the file and the key or tensor.
    pub fn of(gguf: &Gguf) -> Result<Self> {
        Self::read(gguf).with_context(|| format!("`{}` holds no model that can be read", gguf.path().display()))
    }

    fn read(gguf: &Gguf) -> Result<Self> {
        let name = gguf.text("general.architecture").context("it names no `general.architecture`")?;
        let architecture = ARCHITECTURES.iter().find(|known| known.name == name).ok_or_else(|| {
            let names: Vec<String> = ARCHITECTURES.iter().map(|known| format!("`{}`", known.name)).collect();
            anyhow!("its architecture is `{name}`: expected one of {}", names.join(", "))
        })?;
        let said = Said { gguf, architecture };
        let config = match name {
            "gpt2" => said.gpt2()?,
            "gptneox" => said.gpt_neox()?,
            _ => said.llama_like()?,
        };
        let mut tensors = Vec::new();
        for (index, tensor) in gguf.tensors().iter().enumerate().filter(|(_, tensor)| !is_constant(&tensor.name)) {
            let to = architecture.names.in_checkpoint(&tensor.name);
            let to =
                to.with_context(|| format!("tensor `{}` is none of a model of architecture `{name}`", tensor.name))?;
            let order = said.order(&config, &to, &tensor.shape).with_context(|| format!("tensor `{}`", tensor.name))?;
            tensors.push(ModelTensor { index, name: to, order });
        }
        Ok(GgufModel { config, tensors })
    }
}

/// The metadata under the name of an architecture.
struct Said<'a> {
    gguf: &'a Gguf,
    architecture: &'a Architecture,
}

impl Said<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name)
    }

    /// A size that must be there. A list, which gives each layer its own, is none.
    fn size(&self, key: &str) -> Result<u64> {
        let key = self.key(key);
        let size = self.gguf.integer(&key).with_context(|| format!("`{key}` is no whole number"))?;
        ensure!(size > 0, "`{key}` is 0");
        Ok(size)
    }

    /// A size that may be there.
    fn optional(&self, key: &str) -> Result<Option<u64>> {
        self.gguf.metadata(&self.key(key)).map(|_| self.size(key)).transpose()
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.gguf.float(&self.key(key))
    }

    /// How a tensor of that name in Hugging Face checkpoints lies in the file.
    fn order(&self, config: &Json, name: &str, shape: &[usize]) -> Result<Order> {
        let heads = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
        let part = name.rsplit('.').nth(1).unwrap_or_default();
        let rows = shape.first().copied().unwrap_or(1);
        Ok(match (self.architecture.name, part) {
            ("llama", "q_proj" | "k_proj") => {
                let heads = heads(if part == "q_proj" { "num_attention_heads" } else { "num_key_value_heads" });
                ensure!(rows.is_multiple_of(2 * heads), "it has {rows} rows, which are no pairs in {heads} heads");
                Order::Rows(row_order(rows, heads))
            }
            ("gptneox", "query_key_value") => {
                let heads = heads("num_attention_heads");
                ensure!(
                    rows.is_multiple_of(3 * heads),
                    "it has {rows} rows: expected those of queries, keys and values of {heads} heads"
                );
                Order::Rows(inverse(&by_part(rows, heads)))
            }
            ("gpt2", "c_attn" | "c_proj" | "c_fc") if shape.len() == 2 => Order::Transposed,
            _ => Order::Same,
        })
    }

    /// Rows of the embedding.
    fn vocabulary(&self) -> Result<usize> {
        let embedding = self.gguf.tensor(EMBEDDING).with_context(|| format!("tensor `{EMBEDDING}` is missing"))?;
        let [vocabulary, _] = embedding.shape[..] else { bail!("tensor `{EMBEDDING}` is no matrix") };
        Ok(vocabulary)
    }

    /// What is added in norms.
    fn epsilon(&self, key: &str) -> Result<f64> {
        self.float(key).with_context(|| format!("`{}` is no number", self.key(key)))
    }

    fn gpt2(&self) -> Result<Json> {
        let Architecture { class, model_type, .. } = self.architecture;
        let mut config = json!({
            "architectures": [class],
            "model_type": model_type,
            "vocab_size": self.vocabulary()?,
            "n_positions": self.size("context_length")?,
            "n_embd": self.size("embedding_length")?,
            "n_layer": self.size("block_count")?,
            "n_head": self.size("attention.head_count")?,
            "n_inner": self.size("feed_forward_length")?,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": self.epsilon("attention.layer_norm_epsilon")?,
            "tie_word_embeddings": self.gguf.tensor(HEAD).is_none(),
        });
        self.name_tokens(&mut config);
        Ok(config)
    }

    fn gpt_neox(&self) -> Result<Json> {
        let Architecture { class, model_type, .. } = self.architecture;
        let (width, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        ensure!(width.is_multiple_of(heads), "its width of {width} is no multiple of its {heads} heads");
        let head_width = width / heads;
        let turned = self.optional("rope.dimension_count")?.unwrap_or(head_width);
        ensure!(turned <= head_width, "it turns {turned} channels of the {head_width} of a head");
        let theta = self.float("rope.freq_base").unwrap_or(10000.0);
        let mut config = json!({
            "architectures": [class],
            "model_type": model_type,
            "vocab_size": self.vocabulary()?,
            "hidden_size": width,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": heads,
            "hidden_act": "gelu",
            "max_position_embeddings": self.size("context_length")?,
            "use_parallel_residual": self.gguf.bool(&self.key("use_parallel_residual")).unwrap_or(true),
            "rotary_pct": turned as f64 / head_width as f64,
            "rotary_emb_base": theta,
            "rope_scaling": self.scaling(theta, turned)?,
            "attention_bias": true,
            "layer_norm_eps": self.epsilon("attention.layer_norm_epsilon")?,
            "tie_word_embeddings": self.gguf.tensor(HEAD).is_none(),
        });
        self.name_tokens(&mut config);
        Ok(config)
    }

    fn llama_like(&self) -> Result<Json> {
        let Architecture { name, class, .. } = self.architecture;
        ensure!(self.gguf.integer(&self.key("expert_count")).unwrap_or(0) == 0, "it is a mixture of experts");
        let positions = self.size("context_length")?;
        if let Some(window) = self.gguf.integer(&self.key("attention.sliding_window")) {
            ensure!(window == 0 || window >= positions, "it attends to {window} tokens only, a sliding window");
        }
        let (width, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        let kv_heads = self.optional("attention.head_count_kv")?.unwrap_or(heads);
        let head_width = self.optional("attention.key_length")?.unwrap_or(width / heads);
        let rotated = self.optional("rope.dimension_count")?.unwrap_or(head_width);
        ensure!(rotated == head_width, "it turns {rotated} of the {head_width} channels of a head: expected all");
        let values = self.optional("attention.value_length")?.unwrap_or(head_width);
        ensure!(values == head_width, "its values have {values} channels a head and its keys {head_width}");
        let theta = self.float("rope.freq_base").unwrap_or(10000.0);
        let mut config = json!({
            "architectures": [class],
            "model_type": name,
            "vocab_size": self.vocabulary()?,
            "hidden_size": width,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_width,
            "hidden_act": "silu",
            "max_position_embeddings": positions,
            "rms_norm_eps": self.epsilon("attention.layer_norm_rms_epsilon")?,
            "tie_word_embeddings": self.gguf.tensor(HEAD).is_none(),
            "rope_theta": theta,
            "rope_scaling": self.scaling(theta, head_width)?,
        });
        if *name == "llama" {
            config["attention_bias"] = self.gguf.tensor("blk.0.attn_q.bias").is_some().into();
            config["mlp_bias"] = self.gguf.tensor("blk.0.ffn_gate.bias").is_some().into();
        }
        self.name_tokens(&mut config);
        Ok(config)
    }

    /// Says in a configuration which tokens begin, end and pad.
    fn name_tokens(&self, config: &mut Json) {
        for (role, key) in [("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")] {
            config[role] = self.token(key).into();
        }
        // Models that chat end a turn with one of these and a text with the other.
        let mut ends: Vec<u64> = ["eos_token_id", "eot_token_id"].iter().filter_map(|key| self.token(key)).collect();
        ends.dedup();
        config["eos_token_id"] = match ends[..] {
            [] => Json::Null,
            [end] => end.into(),
            _ => ends.into(),
        };
    }

    fn token(&self, role: &str) -> Option<u64> {
        self.gguf.integer(&format!("tokenizer.ggml.{role}"))
    }

    /// `rope_scaling` of `config.json`.
    fn scaling(&self, theta: f64, head_width: u64) -> Result<Json> {
        let kind = self.gguf.text(&self.key("rope.scaling.type"));
        // Older files have the factor alone.
        let factor = self.float("rope.scaling.factor").or_else(|| self.float("rope.scale_linear"));
        let factor = factor.filter(|factor| *factor != 0.0);
        match (kind, factor, self.gguf.tensor(FREQUENCIES)) {
            (None | Some("none" | "llama3"), _, Some(_)) => self.llama3(theta, head_width),
            (Some("llama3"), _, None) => {
                bail!("its rotary angles are scaled as in Llama 3, and `{FREQUENCIES}` is missing")
            }
            (None | Some("linear"), Some(factor), None) if factor != 1.0 => {
                Ok(json!({"rope_type": "linear", "factor": factor}))
            }
            (None | Some("none" | "linear"), _, None) => Ok(Json::Null),
            (kind, ..) => bail!(
                "its rotary angles are scaled by the rule `{}`{}: expected `linear` alone, or the factors of Llama 3 alone",
                kind.unwrap_or("linear"),
                self.gguf.tensor(FREQUENCIES).map_or("", |_| " and by factors")
            ),
        }
    }

    /// The numbers of Llama 3 that give the factors in the file. Files do not hold them; all published models share two of
    /// them and the length of their first training, and the third is the largest factor.
    fn llama3(&self, theta: f64, head_width: u64) -> Result<Json> {
        let tensor = self.gguf.tensor(FREQUENCIES).expect("who asks has seen it");
        let pairs = head_width as usize / 2;
        ensure!(
            tensor.format == Format::F32 && tensor.shape == [pairs],
            "tensor `{FREQUENCIES}` is {} of shape {:?}: expected F32 of [{pairs}]",
            tensor.format.name(),
            tensor.shape
        );
        let bytes = self.gguf.read_all(tensor)?;
        let stored =
            bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().expect("chunks are of size 4")));
        let stored: Vec<f64> = stored.map(f64::from).collect();
        let factor = stored.iter().copied().fold(1.0, f64::max);
        let (low, high) = (1.0, 4.0);
        let known = self.gguf.integer(&self.key("rope.scaling.original_context_length"));
        let original = known.unwrap_or(8192) as f64;
        let expected = (0..pairs).map(|pair| {
            let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / head_width as f64);
            let fast = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / ((1.0 - fast) / factor + fast)
        });
        let is_that = stored.iter().zip(expected).all(|(stored, expected)| (stored / expected - 1.0).abs() < 1e-3);
        ensure!(
            is_that,
            "the factors of rotary angles in `{FREQUENCIES}` are not those of Llama 3 for a first length of {original}, \
             `low_freq_factor: {low}` and `high_freq_factor: {high}`"
        );
        Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original as u64,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::GgufValue;
    use super::super::tests::Writer;
    use super::*;
    use crate::families::rope::frequencies;
    use crate::families::{LlamaConfig, RopeScaling};

    /// A model of one layer: width 8, 2 heads of queries, 1 of keys and values.
    fn tiny(name: &str) -> Writer {
        let key = |key: &str| format!("{name}.{key}");
        let writer = Writer::new()
            .word("general.architecture", name)
            .number(&key("block_count"), 1)
            .number(&key("context_length"), 64)
            .number(&key("embedding_length"), 8)
            .number(&key("feed_forward_length"), 12)
            .number(&key("attention.head_count"), 2)
            .number(&key("attention.head_count_kv"), 1)
            .number("tokenizer.ggml.eos_token_id", 2)
            .key(&key("attention.layer_norm_rms_epsilon"), GgufValue::Float(1e-5));
        let tensors: [(&str, &[u64]); 11] = [
            ("token_embd", &[10, 8]),
            ("output_norm", &[8]),
            ("blk.0.attn_norm", &[8]),
            ("blk.0.attn_q", &[8, 8]),
            ("blk.0.attn_k", &[4, 8]),
            ("blk.0.attn_v", &[4, 8]),
            ("blk.0.attn_output", &[8, 8]),
            ("blk.0.ffn_norm", &[8]),
            ("blk.0.ffn_gate", &[12, 8]),
            ("blk.0.ffn_up", &[12, 8]),
            ("blk.0.ffn_down", &[8, 12]),
        ];
        tensors.iter().fold(writer, |w, (name, shape)| w.tensor(&format!("{name}.weight"), shape, Format::F32))
    }

    fn model(writer: &Writer) -> Result<GgufModel> {
        GgufModel::of(&writer.open())
    }

    fn error(writer: &Writer) -> String {
        format!("{:#}", model(writer).unwrap_err())
    }

    #[test]
    fn a_file_says_all_that_a_model_has() {
        let writer = tiny("llama").number("tokenizer.ggml.bos_token_id", 1);
        let GgufModel { config, tensors } = model(&writer).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let read = crate::Config::load(folder.path()).unwrap();
        let file = writer.open();
        let shapes: std::collections::BTreeMap<String, Vec<usize>> = read.parameter_shapes().into_iter().collect();
        let found = tensors.iter().map(|t| (t.name.clone(), file.tensors()[t.index].shape.clone())).collect();
        assert_eq!(shapes, found);
        assert_eq!((read.sizes().tied, read.sizes().kv_width, read.vocab_size()), (true, 4, 10));
        assert_eq!((read.begin(), read.ends()), (Some(1), &[2][..]));
        assert_eq!((&config["rms_norm_eps"], &config["rope_theta"]), (&json!(1e-5), &json!(10000.0)));
        let reordered = tensors.iter().filter(|tensor| tensor.order != Order::Same);
        let reordered: Vec<_> = reordered.map(|tensor| (tensor.name.as_str(), tensor.order.clone())).collect();
        assert_eq!(
            reordered,
            [
                ("model.layers.0.self_attn.q_proj.weight", Order::Rows(row_order(8, 2))),
                ("model.layers.0.self_attn.k_proj.weight", Order::Rows(row_order(4, 1)))
            ]
        );
    }

    #[test]
    fn other_architectures_have_their_own_names_and_no_other_order() {
        let qwen =
            tiny("qwen2").tensor("blk.0.attn_q.bias", &[8], Format::F32).tensor("output.weight", &[10, 8], Format::F32);
        let GgufModel { config, tensors } = model(&qwen).unwrap();
        assert_eq!((&config["model_type"], &config["tie_word_embeddings"]), (&json!("qwen2"), &json!(false)));
        assert!(tensors.iter().all(|tensor| tensor.order == Order::Same));
        let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert!(names.contains(&"model.layers.0.self_attn.q_proj.bias") && names.contains(&"lm_head.weight"));
        let qwen = tiny("qwen3").tensor("blk.0.attn_q_norm.weight", &[4], Format::F32);
        let qwen = model(&qwen.number("qwen3.attention.key_length", 16)).unwrap();
        assert_eq!(qwen.config["head_dim"], 16);
        assert_eq!(qwen.tensors.last().unwrap().name, "model.layers.0.self_attn.q_norm.weight");
        assert!(error(&tiny("mamba")).contains("architecture is `mamba`: expected one of `llama`, `qwen2`, `qwen3`"));
    }

    /// By another way: converters view a head as two halves and swap the axes.
    #[test]
    fn the_order_of_rows_undoes_that_of_converters() {
        let (heads, half) = (3, 4);
        let rows = heads * 2 * half;
        let mut file = Vec::new();
        for head in 0..heads {
            for channel in 0..half {
                for side in 0..2 {
                    file.push((head * 2 + side) * half + channel);
                }
            }
        }
        let restored: Vec<usize> = row_order(rows, heads).into_iter().map(|row| file[row]).collect();
        assert_eq!(restored, (0..rows).collect::<Vec<_>>());
    }

    #[test]
    fn the_scaling_of_llama_3_is_found_in_its_factors() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let plain = frequencies(64, 500_000.0, None);
        let pairs = plain.into_iter().zip(frequencies(64, 500_000.0, Some(&scaling)));
        let factors: Vec<f32> = pairs.map(|(plain, scaled)| plain / scaled).collect();
        assert!(factors.iter().any(|factor| *factor > 1.0 && *factor < 32.0), "{factors:?}");
        let file = |factors: &[f32]| {
            let bytes = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
            let writer = tiny("llama").key("llama.rope.freq_base", GgufValue::Float(500000.0));
            writer.number("llama.attention.key_length", 64).number("llama.attention.value_length", 64).values(
                FREQUENCIES,
                &[32],
                Format::F32,
                bytes,
            )
        };
        let found = model(&file(&factors)).unwrap();
        let found: LlamaConfig = serde_json::from_value(found.config).unwrap();
        assert_eq!(found.rope_scaling, Some(scaling));
        let mut other = factors;
        other[20] *= 1.5;
        assert!(error(&file(&other)).contains("are not those of Llama 3"));
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let cases = [
            (tiny("llama").number("llama.expert_count", 8), "mixture of experts"),
            (tiny("llama").number("llama.rope.dimension_count", 2), "turns 2 of the 4 channels"),
            (tiny("llama").number("llama.attention.value_length", 2), "values have 2 channels"),
            (tiny("llama").number("llama.attention.sliding_window", 16), "attends to 16 tokens only"),
            (tiny("llama").word("llama.rope.scaling.type", "yarn"), "by the rule `yarn`"),
            (tiny("llama").word("llama.rope.scaling.type", "llama3"), "`rope_freqs.weight` is missing"),
            (
                tiny("llama").tensor("blk.0.ffn_gate_exps.weight", &[1], Format::F32),
                "tensor `blk.0.ffn_gate_exps.weight` is none",
            ),
            (Writer::new(), "no `general.architecture`"),
            (Writer::new().word("general.architecture", "llama"), "`llama.context_length` is no whole number"),
        ];
        for (writer, expected) in cases {
            let error = error(&writer);
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let linear = tiny("llama").word("llama.rope.scaling.type", "linear");
        let linear = model(&linear.key("llama.rope.scaling.factor", GgufValue::Float(4.0))).unwrap();
        assert_eq!(linear.config["rope_scaling"], json!({"rope_type": "linear", "factor": 4.0}));
    }
}
