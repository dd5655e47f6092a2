//! GPT-NeoX: Black et al., "GPT-NeoX-20B: An open-source autoregressive language model", 2022; Biderman et al., "Pythia: A
//! suite for analyzing large language models across training and scaling", 2023.
//!
//! The two branches of a block may stand side by side: both read what goes into it. Rotary positions turn a part of each head.
//! One matrix makes queries, keys and values, those of a head together. Differences from the paper: as for GPT-2, sequences
//! are packed end to end, and a soft prompt may stand before each. Dimensions: `N` tokens of the batch, `C` channels, `H` heads
//! of `D` channels, of which `R` are turned, `I` channels inside the feed-forward layer. Weights are `[out, in]` and named as in
//! Hugging Face checkpoints.

use anyhow::ensure;
use candle_core::{Result as TensorResult, Tensor};
use contract::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::architecture::ROPE_THETA;
use super::check::{at_least_one, multiple, not_negative, rate};
use super::rope::{self, RopeScaling};
use super::{Architecture, Decoder, EndTokens, Names, Sizes, Weights, fields_of_transformers};
use crate::ops::rotary::Rotary;
use crate::ops::{Attend, Block, Layer, LayerNorm, Layout, Ops};
use crate::terms::activation::Activation;

/// A Hugging Face `config.json` of the GPT-NeoX family. Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GptNeoxConfig {
    /// Class names, for those who open the folder in Python.
    #[serde(default = "default_architectures")]
    pub architectures: Vec<String>,
    /// Family, `gpt_neox`.
    pub model_type: String,
    /// Rows `V` of the embedding; may be more than the tokenizer has ids.
    pub vocab_size: usize,
    /// Channels `C` of the hidden state.
    pub hidden_size: usize,
    /// Channels `I` inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub num_hidden_layers: usize,
    /// Attention heads `H`.
    pub num_attention_heads: usize,
    /// Nonlinearity of the feed-forward layer.
    #[serde(default = "default_activation")]
    pub hidden_act: Activation,
    /// Longest sequence in tokens.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// Whether the two branches of a block stand side by side.
    #[serde(default = "yes")]
    pub use_parallel_residual: bool,
    /// The share of a head's channels that rotary positions turn.
    #[serde(default = "default_rotary_share")]
    pub rotary_pct: f64,
    /// Base of the rotary angles.
    #[serde(default = "default_theta")]
    pub rotary_emb_base: f64,
    /// How the angles are changed for texts longer than those of the first training.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the two projections of attention have biases.
    #[serde(default = "yes")]
    pub attention_bias: bool,
    /// Dropout of attention probabilities.
    #[serde(default)]
    pub attention_dropout: f32,
    /// Dropout of the embeddings and of the two residual branches.
    #[serde(default)]
    pub hidden_dropout: f32,
    /// Added to the variance in layer norms.
    #[serde(default = "default_epsilon")]
    pub layer_norm_eps: f64,
    /// Standard deviation of initial weights.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// Whether the output head is the input embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Token that begins a text.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    #[serde(default)]
    pub eos_token_id: Option<EndTokens>,
    /// Token that pads.
    #[serde(default)]
    pub pad_token_id: Option<i64>,
}

impl GptNeoxConfig {
    /// Channels `D` of a head.
    pub fn head_width(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Channels `R` of a head that are turned.
    pub fn turned(&self) -> usize {
        (self.head_width() as f64 * self.rotary_pct) as usize
    }
}

impl Decoder for GptNeoxConfig {
    const MODEL_TYPE: &str = "gpt_neox";
    const OPTIONS: &[&str] = &["rope_theta"];
    const NAMES: Names = Names {
        embedding: "gpt_neox.embed_in.weight",
        head: "embed_out.weight",
        prefix: "gpt_neox.",
        branch_ends: &["attention.dense.weight", "dense_4h_to_h.weight"],
        tables: &[],
        layout: Layout::OutIn,
    };

    fields_of_transformers!();

    fn default_inner(width: usize) -> usize {
        4 * width
    }

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        let dropout = architecture.dropout.unwrap_or(0.0);
        GptNeoxConfig {
            architectures: default_architectures(),
            model_type: Self::MODEL_TYPE.to_owned(),
            vocab_size,
            hidden_size: architecture.width,
            intermediate_size: architecture.inner.unwrap_or_else(|| architecture.default_inner()),
            num_hidden_layers: architecture.layers,
            num_attention_heads: architecture.heads(),
            hidden_act: default_activation(),
            max_position_embeddings: architecture.positions(),
            use_parallel_residual: true,
            rotary_pct: default_rotary_share(),
            rotary_emb_base: architecture.rope_theta.unwrap_or_else(default_theta),
            rope_scaling: None,
            attention_bias: true,
            attention_dropout: dropout,
            hidden_dropout: dropout,
            layer_norm_eps: default_epsilon(),
            initializer_range: default_initializer_range(),
            tie_word_embeddings: architecture.tied.unwrap_or(true),
            bos_token_id: Some(end),
            eos_token_id: Some(EndTokens::One(end)),
            pad_token_id: Some(i64::from(end)),
        }
    }

    fn from_json(mut json: Json) -> Result<Self> {
        if let Some(share) = rope::unify(&mut json, "rotary_emb_base")? {
            json["rotary_pct"] = share;
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
            kv_width: self.hidden_size,
            tied: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
        }
    }

    fn validate(&self) -> Result<()> {
        at_least_one(&[
            ("layers", self.num_hidden_layers),
            ("width", self.hidden_size),
            ("inner channels", self.intermediate_size),
            ("heads", self.num_attention_heads),
            ("positions", self.max_position_embeddings),
            ("vocabulary size", self.vocab_size),
        ])?;
        multiple("width", self.hidden_size, self.num_attention_heads)?;
        let (share, turned) = (self.rotary_pct, self.turned());
        ensure!((0.0..=1.0).contains(&share), "`rotary_pct` is {share}: expected a share, at most 1");
        ensure!(
            turned > 0 && turned.is_multiple_of(2),
            "`rotary_pct` {share} turns {turned} of the {} channels of a head: expected an even number, for rotary positions \
             turn pairs",
            self.head_width()
        );
        [self.attention_dropout, self.hidden_dropout].into_iter().try_for_each(rate)?;
        let theta = self.rotary_emb_base;
        ensure!(theta > 0.0, "base of the rotary angles is {theta}: expected more than 0");
        not_negative(&[("`layer_norm_eps`", self.layer_norm_eps), ("`initializer_range`", self.initializer_range)])?;
        self.rope_scaling.as_ref().map_or(Ok(()), RopeScaling::validate)
    }

    fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, inner) = (self.hidden_size, self.intermediate_size);
        let mut shapes = vec![(Self::NAMES.embedding.to_owned(), vec![self.vocab_size, c])];
        for layer in 0..self.num_hidden_layers {
            let mut push = |name: &str, shape| shapes.push((format!("gpt_neox.layers.{layer}.{name}"), shape));
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                push(&format!("{norm}.weight"), vec![c]);
                push(&format!("{norm}.bias"), vec![c]);
            }
            for (name, to, from, biased) in [
                ("attention.query_key_value", 3 * c, c, self.attention_bias),
                ("attention.dense", c, c, self.attention_bias),
                ("mlp.dense_h_to_4h", inner, c, true),
                ("mlp.dense_4h_to_h", c, inner, true),
            ] {
                push(&format!("{name}.weight"), vec![to, from]);
                if biased {
                    push(&format!("{name}.bias"), vec![to]);
                }
            }
        }
        shapes.push(("gpt_neox.final_layer_norm.weight".to_owned(), vec![c]));
        shapes.push(("gpt_neox.final_layer_norm.bias".to_owned(), vec![c]));
        shapes
    }

    fn forward<O: Ops>(&self, weights: &Weights<'_>, ops: &mut O, prompt: Option<&Tensor>) -> TensorResult<O::Array> {
        let embedding = weights.weight(Self::NAMES.embedding);
        let frequencies = || rope::frequencies(self.turned(), self.rotary_emb_base, self.rope_scaling.as_ref());
        let angles = weights.angles(frequencies)?;
        let x = ops.embed(embedding, None, prompt)?; // [N, C]
        let mut x = ops.dropout(x, self.hidden_dropout, 0)?;
        for layer in 0..self.num_hidden_layers {
            x = ops.block(x, &TransformerBlock::new(self, weights, &angles, layer))?;
        }
        ops.layer_norm(&x, &weights.norm("gpt_neox.final_layer_norm", self.layer_norm_eps))
    }
}

/// The parameters of one transformer block, and what the configuration says of it.
#[derive(Clone)]
struct TransformerBlock {
    last: bool,
    /// Whether the feed-forward layer reads what goes into the block, or what attention has been added to.
    parallel: bool,
    attend: Attend,
    /// Queries and keys are turned, values are not.
    rotary: Rotary,
    activation: Activation,
    dropout: f32,
    /// Dropout sites at the ends of the two residual branches.
    branch_sites: [u32; 2],
    input_layernorm: LayerNorm,
    query_key_value: Layer,
    dense: Layer,
    post_attention_layernorm: LayerNorm,
    dense_h_to_4h: Layer,
    dense_4h_to_h: Layer,
}

impl TransformerBlock {
    /// Finds the parameters by their names. `angles` cover all positions in use.
    fn new(config: &GptNeoxConfig, weights: &Weights<'_>, angles: &Tensor, layer: usize) -> Self {
        let name = |part: &str| format!("gpt_neox.layers.{layer}.{part}");
        let linear = |part: &str| weights.layer(&name(part));
        let norm = |part: &str| weights.norm(&name(part), config.layer_norm_eps);
        // Every place that drops elements has a number of its own: one a head, and two a block for the branches.
        let (heads, head_width) = (config.num_attention_heads, config.head_width());
        let site = (1 + layer * (heads + 2)) as u32;
        let (scale, dropout) = (1.0 / (head_width as f32).sqrt(), config.attention_dropout);
        TransformerBlock {
            last: layer + 1 == config.num_hidden_layers,
            parallel: config.use_parallel_residual,
            attend: Attend { layer, heads, kv_heads: heads, scale, window: None, dropout, site },
            rotary: Rotary { heads: 2 * heads, head_width, turned: config.turned(), angles: angles.clone() },
            activation: config.hidden_act,
            dropout: config.hidden_dropout,
            branch_sites: [0, 1].map(|branch| site + (heads + branch) as u32),
            input_layernorm: norm("input_layernorm"),
            query_key_value: linear("attention.query_key_value"),
            dense: linear("attention.dense"),
            post_attention_layernorm: norm("post_attention_layernorm"),
            dense_h_to_4h: linear("mlp.dense_h_to_4h"),
            dense_4h_to_h: linear("mlp.dense_4h_to_h"),
        }
    }
}

impl Block for TransformerBlock {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> TensorResult<O::Array> {
        let h = ops.layer_norm(&x, &self.input_layernorm)?; // [N, C]
        let qkv = ops.linear(&h, &self.query_key_value)?; // [N, H 3 D]
        let qkv = ops.regroup(qkv, [self.attend.heads, 3])?; // [N, 3 H D]
        let qkv = ops.rotary(qkv, &self.rotary)?;
        let a = ops.attention(qkv, self.attend)?; // [N, C]
        // Behind the last attention no row reads another: the others are done with, and N is the number of those wanted.
        let (x, a) = if self.last { (ops.wanted(x)?, ops.wanted(a)?) } else { (x, a) };
        let a = ops.linear(&a, &self.dense)?; // [N, C]
        let a = ops.dropout(a, self.dropout, self.branch_sites[0])?;
        let (x, beside) = if self.parallel { (x, Some(a)) } else { (ops.add(x, a)?, None) };

        let h = ops.layer_norm(&x, &self.post_attention_layernorm)?; // [N, C]
        let m = ops.linear(&h, &self.dense_h_to_4h)?; // [N, I]
        let m = ops.activation(m, self.activation)?;
        let m = ops.linear(&m, &self.dense_4h_to_h)?; // [N, C]
        let m = ops.dropout(m, self.dropout, self.branch_sites[1])?;
        let m = match beside {
            Some(a) => ops.add(m, a)?,
            None => m,
        };
        ops.add(x, m)
    }
}

fn default_architectures() -> Vec<String> {
    vec!["GPTNeoXForCausalLM".to_owned()]
}

fn default_activation() -> Activation {
    Activation::Gelu
}

fn default_positions() -> usize {
    2048
}

fn default_rotary_share() -> f64 {
    0.25
}

fn default_theta() -> f64 {
    ROPE_THETA
}

fn default_epsilon() -> f64 {
    1e-5
}

fn default_initializer_range() -> f64 {
    0.02
}

fn yes() -> bool {
    true
}
