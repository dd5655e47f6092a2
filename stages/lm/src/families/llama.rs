//! Llama: Touvron et al., "LLaMA: Open and efficient foundation language models", 2023; the same, "Llama 2", 2023; Grattafiori
//! et al., "The Llama 3 herd of models", 2024.
//!
//! Differences from the papers: as for GPT-2, sequences are packed end to end, and a soft prompt may stand before each. The
//! two channels that rotary positions turn together lie half a head apart. Dimensions: `N` tokens of the batch, `C`
//! channels, `H` query heads and `G` heads of keys and values with `D` channels each, `I` channels inside the feed-forward
//! layer. Weights are `[out, in]` and named as in Hugging Face checkpoints.

use anyhow::{bail, ensure};
use candle_core::{Result as TensorResult, Tensor};
use contract::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::architecture::ROPE_THETA;
use super::check::{at_least_one, multiple, not_negative};
use super::{Architecture, Decoder, EndTokens, Names, Sizes, Weights};
use crate::ops::rotary::Rotary;
use crate::ops::{Attend, Block, Layer, Layout, Ops, RmsNorm};

/// A Hugging Face `config.json` of the Llama family (1, 2, 3). Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Class names, for those who open the folder in Python.
    #[serde(default = "default_architectures")]
    pub architectures: Vec<String>,
    /// Family, `llama`.
    pub model_type: String,
    /// Rows `V` of the embedding; may be more than the tokenizer has ids.
    pub vocab_size: usize,
    /// Channels `C` of the hidden state.
    pub hidden_size: usize,
    /// Channels `I` inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub num_hidden_layers: usize,
    /// Query heads `H`.
    pub num_attention_heads: usize,
    /// Heads of keys and values `G`; `None` is `H`.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Channels `D` of a head; `None` is `C / H`.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Nonlinearity of the gate; this crate computes `silu` alone, also called `swish`.
    #[serde(default = "default_activation")]
    pub hidden_act: String,
    /// Longest sequence in tokens.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// Standard deviation of initial weights.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// Added to the mean square in norms.
    #[serde(default = "default_epsilon")]
    pub rms_norm_eps: f64,
    /// Whether the output head is the input embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Base of the rotary angles.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// How the angles are changed for texts longer than those of the first training.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the four projections of attention have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Dropout of attention probabilities.
    #[serde(default)]
    pub attention_dropout: f32,
    /// Whether the three projections of the feed-forward layer have biases.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Token that begins a text.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    #[serde(default)]
    pub eos_token_id: Option<EndTokens>,
    /// Token that pads; some published configurations say -1 for none.
    #[serde(default)]
    pub pad_token_id: Option<i64>,
}

/// Changes of the rotary angles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Every angle is divided by `factor` (Chen et al., "Extending context window of large language models via positional
    /// interpolation", 2023).
    Linear {
        /// How much longer texts may be.
        factor: f64,
    },
    /// Llama 3.1: slow angles are divided by `factor`, fast ones stay, those between are mixed.
    Llama3 {
        /// How much longer texts may be.
        factor: f64,
        /// Angles that turn fewer times than this in the original length are slow.
        low_freq_factor: f64,
        /// Angles that turn more often than this in the original length are fast.
        high_freq_factor: f64,
        /// The original length in tokens.
        original_max_position_embeddings: usize,
    },
}

impl RopeScaling {
    fn validate(&self) -> Result<()> {
        let above = |name: &str, number: f64, least: f64| {
            ensure!(
                number.is_finite() && number > least,
                "`{name}` of the rotary scaling is {number}: expected more than {least}"
            );
            Ok(())
        };
        match *self {
            RopeScaling::Linear { factor } => above("factor", factor, 0.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                above("factor", factor, 0.0)?;
                above("low_freq_factor", low_freq_factor, 0.0)?;
                above("high_freq_factor", high_freq_factor, low_freq_factor)?;
                above("original_max_position_embeddings", original_max_position_embeddings as f64, 0.0)
            }
        }
    }
}

impl LlamaConfig {
    /// Heads of keys and values `G`.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Channels `D` of a head.
    pub fn head_width(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// By how much each pair of channels of a head turns from one position to the next, `[D / 2]`, in radians. Every step
    /// is rounded as in `transformers`: at position 100 000 the last bit of an angle decides its third digit.
    pub(crate) fn rotary_frequencies(&self) -> Vec<f32> {
        let width = self.head_width();
        let plain = (0..width).step_by(2).map(|i| {
            let power = f64::from(i as f32 / width as f32);
            1.0 / self.rope_theta.powf(power) as f32
        });
        match self.rope_scaling {
            None => plain.collect(),
            Some(RopeScaling::Linear { factor }) => plain.map(|frequency| frequency / factor as f32).collect(),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let length = original_max_position_embeddings as f64;
                let scale = |frequency: f32| {
                    let wavelength = std::f32::consts::TAU / frequency;
                    if f64::from(wavelength) < length / high_freq_factor {
                        frequency
                    } else if f64::from(wavelength) > length / low_freq_factor {
                        frequency / factor as f32
                    } else {
                        let range = (high_freq_factor - low_freq_factor) as f32;
                        let fast = (length as f32 / wavelength - low_freq_factor as f32) / range;
                        (1.0 - fast) * frequency / factor as f32 + fast * frequency
                    }
                };
                plain.map(scale).collect()
            }
        }
    }
}

impl Decoder for LlamaConfig {
    const MODEL_TYPE: &str = "llama";
    const OPTIONS: &[&str] = &["kv_heads", "rope_theta"];
    const NAMES: Names = Names {
        embedding: "model.embed_tokens.weight",
        prefix: "model.",
        branch_ends: &["o_proj.weight", "down_proj.weight"],
    };

    fn default_inner(width: usize) -> usize {
        (8 * width).div_ceil(3).next_multiple_of(32)
    }

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        let width = architecture.width;
        LlamaConfig {
            architectures: default_architectures(),
            model_type: "llama".to_owned(),
            vocab_size,
            hidden_size: width,
            intermediate_size: architecture.inner.unwrap_or_else(|| architecture.default_inner()),
            num_hidden_layers: architecture.layers,
            num_attention_heads: architecture.heads(),
            num_key_value_heads: architecture.kv_heads,
            head_dim: None,
            hidden_act: default_activation(),
            max_position_embeddings: architecture.positions(),
            initializer_range: default_initializer_range(),
            rms_norm_eps: 1e-5,
            tie_word_embeddings: architecture.tied.unwrap_or(true),
            rope_theta: architecture.rope_theta.unwrap_or_else(default_theta),
            rope_scaling: None,
            attention_bias: false,
            attention_dropout: architecture.dropout.unwrap_or(0.0),
            mlp_bias: false,
            bos_token_id: Some(end),
            eos_token_id: Some(EndTokens::One(end)),
            pad_token_id: Some(i64::from(end)),
        }
    }

    fn from_json(mut json: Json) -> Result<Self> {
        // Newer files keep base and scaling together.
        if let Some(parameters) = json.as_object_mut().and_then(|json| json.remove("rope_parameters"))
            && !parameters.is_null()
        {
            if let Some(theta) = parameters.get("rope_theta") {
                json["rope_theta"] = theta.clone();
            }
            json["rope_scaling"] = parameters;
        }
        let scaling = &mut json["rope_scaling"];
        // Older files call the type `type`.
        let kind = scaling.get("rope_type").or(scaling.get("type")).and_then(Json::as_str).map(str::to_owned);
        match kind.as_deref() {
            None | Some("default") => *scaling = Json::Null,
            Some(kind @ ("linear" | "llama3")) => scaling["rope_type"] = kind.into(),
            Some(other) => bail!("rotary positions of type `{other}`: expected `default`, `linear` or `llama3`"),
        }
        super::from_json(json)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocabulary: self.vocab_size,
            positions: self.max_position_embeddings,
            width: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_width: self.kv_heads() * self.head_width(),
            tied: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
        }
    }

    fn layers_mut(&mut self) -> &mut usize {
        &mut self.num_hidden_layers
    }

    fn begin_and_ends(&self) -> (Option<u32>, Option<&EndTokens>) {
        (self.bos_token_id, self.eos_token_id.as_ref())
    }

    fn set_roles(&mut self, begin: Option<u32>, pad: Option<u32>) {
        self.bos_token_id = begin.or(self.bos_token_id);
        self.pad_token_id = pad.map(i64::from).or(self.pad_token_id);
    }

    fn untie(&mut self) {
        self.tie_word_embeddings = false;
    }

    fn validate(&self) -> Result<()> {
        at_least_one(&[
            ("layers", self.num_hidden_layers),
            ("width", self.hidden_size),
            ("inner channels", self.intermediate_size),
            ("heads", self.num_attention_heads),
            ("heads of keys and values", self.kv_heads()),
            ("positions", self.max_position_embeddings),
            ("vocabulary size", self.vocab_size),
        ])?;
        if self.head_dim.is_none() {
            multiple("width", self.hidden_size, self.num_attention_heads)?;
        }
        ensure!(
            self.num_attention_heads.is_multiple_of(self.kv_heads()),
            "{} heads cannot share {} heads of keys and values evenly: change one of them",
            self.num_attention_heads,
            self.kv_heads()
        );
        ensure!(
            self.head_width().is_multiple_of(2) && self.head_width() > 0,
            "a head has {} channels: expected an even number, for rotary positions turn pairs",
            self.head_width()
        );
        ensure!(
            ["silu", "swish"].contains(&self.hidden_act.as_str()),
            "the feed-forward layer's activation is `{}`: expected `silu`",
            self.hidden_act
        );
        let rate = self.attention_dropout;
        ensure!((0.0..1.0).contains(&rate), "dropout is {rate}: expected at least 0 and less than 1");
        ensure!(self.rope_theta > 0.0, "base of the rotary angles is {}: expected more than 0", self.rope_theta);
        not_negative(&[("`rms_norm_eps`", self.rms_norm_eps), ("`initializer_range`", self.initializer_range)])?;
        self.rope_scaling.as_ref().map_or(Ok(()), RopeScaling::validate)
    }

    fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_width(), self.kv_heads() * self.head_width());
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, c])];
        for layer in 0..self.num_hidden_layers {
            let mut push = |name: &str, shape| shapes.push((format!("model.layers.{layer}.{name}"), shape));
            push("input_layernorm.weight", vec![c]);
            for (name, to, from) in [("q", q, c), ("k", kv, c), ("v", kv, c), ("o", c, q)] {
                push(&format!("self_attn.{name}_proj.weight"), vec![to, from]);
                if self.attention_bias {
                    push(&format!("self_attn.{name}_proj.bias"), vec![to]);
                }
            }
            push("post_attention_layernorm.weight", vec![c]);
            for (name, to, from) in [("gate", inner, c), ("up", inner, c), ("down", c, inner)] {
                push(&format!("mlp.{name}_proj.weight"), vec![to, from]);
                if self.mlp_bias {
                    push(&format!("mlp.{name}_proj.bias"), vec![to]);
                }
            }
        }
        shapes.push(("model.norm.weight".to_owned(), vec![c]));
        shapes
    }

    fn forward<O: Ops>(&self, weights: &Weights<'_>, ops: &mut O, prompt: Option<&Tensor>) -> TensorResult<O::Array> {
        let embedding = weights.weight("model.embed_tokens.weight");
        let angles = weights.angles(|| self.rotary_frequencies())?;
        let mut x = ops.embed(embedding, None, prompt)?; // [N, C]
        for layer in 0..self.num_hidden_layers {
            x = ops.block(x, &TransformerBlock::new(self, weights, &angles, layer))?;
        }
        ops.rms_norm(&x, &weights.rms_norm("model.norm", self.rms_norm_eps))
    }
}

/// The parameters of one transformer block, and what the configuration says of it.
#[derive(Clone)]
struct TransformerBlock {
    last: bool,
    attend: Attend,
    /// Queries and keys are turned, values are not.
    rotary: Rotary,
    input_layernorm: RmsNorm,
    /// Queries, keys, values.
    qkv_proj: [Layer; 3],
    o_proj: Layer,
    post_attention_layernorm: RmsNorm,
    gate_proj: Layer,
    up_proj: Layer,
    down_proj: Layer,
}

impl TransformerBlock {
    /// Finds the parameters by their names. `angles` cover all positions in use.
    fn new(config: &LlamaConfig, weights: &Weights<'_>, angles: &Tensor, layer: usize) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |part: &str| weights.layer(&name(part), Layout::OutIn);
        let norm = |part: &str| weights.rms_norm(&name(part), config.rms_norm_eps);
        let (heads, kv_heads) = (config.num_attention_heads, config.kv_heads());
        let (head_width, dropout) = (config.head_width(), config.attention_dropout);
        let scale = 1.0 / (head_width as f32).sqrt();
        TransformerBlock {
            last: layer + 1 == config.num_hidden_layers,
            attend: Attend { layer, heads, kv_heads, scale, dropout, site: (layer * heads) as u32 },
            rotary: Rotary { heads: heads + kv_heads, head_width, angles: angles.clone() },
            input_layernorm: norm("input_layernorm"),
            qkv_proj: ["q", "k", "v"].map(|part| linear(&format!("self_attn.{part}_proj"))),
            o_proj: linear("self_attn.o_proj"),
            post_attention_layernorm: norm("post_attention_layernorm"),
            gate_proj: linear("mlp.gate_proj"),
            up_proj: linear("mlp.up_proj"),
            down_proj: linear("mlp.down_proj"),
        }
    }
}

impl Block for TransformerBlock {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> TensorResult<O::Array> {
        let h = ops.rms_norm(&x, &self.input_layernorm)?; // [N, C]
        let qkv = ops.side_by_side(&h, &self.qkv_proj)?; // [N, (H + 2G) D]
        let qkv = ops.rotary(qkv, &self.rotary)?; // [N, (H + 2G) D]
        let a = ops.attention(qkv, self.attend)?; // [N, H D]
        // Behind the last attention no row reads another: the others are done with, and N is the number of those wanted.
        let (x, a) = if self.last { (ops.wanted(x)?, ops.wanted(a)?) } else { (x, a) };
        let a = ops.linear(&a, &self.o_proj)?; // [N, C]
        let x = ops.add(x, a)?;

        let h = ops.rms_norm(&x, &self.post_attention_layernorm)?; // [N, C]
        let gate = ops.linear(&h, &self.gate_proj)?; // [N, I]
        let up = ops.linear(&h, &self.up_proj)?; // [N, I]
        let m = ops.swiglu(gate, up)?; // [N, I]
        let m = ops.linear(&m, &self.down_proj)?; // [N, C]
        ops.add(x, m)
    }
}

fn default_architectures() -> Vec<String> {
    vec!["LlamaForCausalLM".to_owned()]
}

fn default_activation() -> String {
    "silu".to_owned()
}

fn default_positions() -> usize {
    2048
}

fn default_initializer_range() -> f64 {
    0.02
}

fn default_epsilon() -> f64 {
    1e-6
}

fn default_theta() -> f64 {
    ROPE_THETA
}
