//! OPT: Zhang et al., "OPT: Open pre-trained transformer language models", 2022.
//!
//! As in the checkpoints, norms stand before each branch (and one at the end), or behind each sum of a branch, as in the model
//! of 350 million parameters; there the vectors of tokens are also narrower than the model, and two matrices lead in and out.
//! Differences from the paper: as for GPT-2, sequences are packed end to end, and a soft prompt may stand before each.
//! Dimensions: `N` tokens of the batch, `E` channels of a token's vector, `C` channels between, `I` channels inside the
//! feed-forward layer. Weights are `[out, in]` and named as in Hugging Face checkpoints.

use anyhow::ensure;
use candle_core::{Result as TensorResult, Tensor};
use contract::Result;
use serde::{Deserialize, Serialize};

use super::check::{at_least_one, multiple, not_negative, rate};
use super::{Architecture, Decoder, EndTokens, Names, Sizes, Weights, fields_of_transformers};
use crate::ops::{Attend, Block, Layer, LayerNorm, Layout, Ops, Positions};
use crate::terms::activation::Activation;

/// The row of the table of positions that belongs to position 0: those before were meant for padding.
const FIRST_POSITION: usize = 2;

/// Added to the variance in layer norms.
const EPSILON: f64 = 1e-5;

/// A Hugging Face `config.json` of the OPT family. Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptConfig {
    /// Class names, for those who open the folder in Python.
    #[serde(default = "default_architectures")]
    pub architectures: Vec<String>,
    /// Family, `opt`.
    pub model_type: String,
    /// Rows `V` of the embedding; may be more than the tokenizer has ids.
    pub vocab_size: usize,
    /// Channels `C` between embedding and head.
    pub hidden_size: usize,
    /// Channels `E` of a token's vector; `None` is `C`.
    #[serde(default)]
    pub word_embed_proj_dim: Option<usize>,
    /// Channels `I` inside the feed-forward layer.
    pub ffn_dim: usize,
    /// Transformer blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Nonlinearity of the feed-forward layer.
    #[serde(default = "default_activation")]
    pub activation_function: Activation,
    /// Longest sequence in tokens.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// Whether norms stand before the branches, or behind the sums.
    #[serde(default = "yes")]
    pub do_layer_norm_before: bool,
    /// Whether a model with norms before the branches lacks the one at its end.
    #[serde(default, rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    /// Whether the linear layers of the blocks have biases.
    #[serde(default = "yes")]
    pub enable_bias: bool,
    /// Whether norms have weights and biases; this crate computes no others.
    #[serde(default = "yes")]
    pub layer_norm_elementwise_affine: bool,
    /// Dropout of the two residual branches.
    #[serde(default = "default_dropout")]
    pub dropout: f32,
    /// Dropout of attention probabilities.
    #[serde(default)]
    pub attention_dropout: f32,
    /// Probability of leaving a block out in training; this crate leaves none out.
    #[serde(default)]
    pub layerdrop: f64,
    /// Standard deviation of initial weights.
    #[serde(default = "default_initializer_range")]
    pub init_std: f64,
    /// Whether the output head is the input embedding.
    #[serde(default = "yes")]
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

impl OptConfig {
    /// Channels `E` of a token's vector.
    pub fn embedding_width(&self) -> usize {
        self.word_embed_proj_dim.unwrap_or(self.hidden_size)
    }

    fn projects(&self) -> bool {
        self.embedding_width() != self.hidden_size
    }

    fn has_final_norm(&self) -> bool {
        self.do_layer_norm_before && !self.remove_final_layer_norm
    }
}

impl Decoder for OptConfig {
    const MODEL_TYPE: &str = "opt";
    const OPTIONS: &[&str] = &[];
    const NAMES: Names = Names {
        embedding: "model.decoder.embed_tokens.weight",
        head: "lm_head.weight",
        prefix: "model.",
        branch_ends: &["out_proj.weight", "fc2.weight"],
        tables: &["model.decoder.embed_positions.weight"],
        layout: Layout::OutIn,
    };

    fields_of_transformers!();

    fn default_inner(width: usize) -> usize {
        4 * width
    }

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        let dropout = architecture.dropout.unwrap_or(0.0);
        OptConfig {
            architectures: default_architectures(),
            model_type: Self::MODEL_TYPE.to_owned(),
            vocab_size,
            hidden_size: architecture.width,
            word_embed_proj_dim: None,
            ffn_dim: architecture.inner.unwrap_or_else(|| architecture.default_inner()),
            num_hidden_layers: architecture.layers,
            num_attention_heads: architecture.heads(),
            activation_function: default_activation(),
            max_position_embeddings: architecture.positions(),
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            dropout,
            attention_dropout: dropout,
            layerdrop: 0.0,
            init_std: default_initializer_range(),
            tie_word_embeddings: architecture.tied.unwrap_or(true),
            bos_token_id: Some(end),
            eos_token_id: Some(EndTokens::One(end)),
            pad_token_id: Some(i64::from(end)),
        }
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocabulary: self.vocab_size,
            positions: self.max_position_embeddings,
            width: self.embedding_width(),
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_width: self.hidden_size,
            tied: self.tie_word_embeddings,
            initializer_range: self.init_std,
        }
    }

    fn validate(&self) -> Result<()> {
        at_least_one(&[
            ("layers", self.num_hidden_layers),
            ("width", self.hidden_size),
            ("width of the embedding", self.embedding_width()),
            ("inner channels", self.ffn_dim),
            ("heads", self.num_attention_heads),
            ("positions", self.max_position_embeddings),
            ("vocabulary size", self.vocab_size),
        ])?;
        multiple("width", self.hidden_size, self.num_attention_heads)?;
        [self.dropout, self.attention_dropout].into_iter().try_for_each(rate)?;
        ensure!(
            self.layer_norm_elementwise_affine,
            "`layer_norm_elementwise_affine` is false: expected norms with weights and biases"
        );
        ensure!(self.layerdrop == 0.0, "`layerdrop` is {}: expected 0, for no block is left out", self.layerdrop);
        not_negative(&[("`init_std`", self.init_std)])
    }

    fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, e, inner) = (self.hidden_size, self.embedding_width(), self.ffn_dim);
        let mut shapes = Vec::new();
        let mut push = |name: String, shape| shapes.push((format!("model.decoder.{name}"), shape));
        push("embed_tokens.weight".to_owned(), vec![self.vocab_size, e]);
        push("embed_positions.weight".to_owned(), vec![FIRST_POSITION + self.max_position_embeddings, c]);
        if self.projects() {
            push("project_in.weight".to_owned(), vec![c, e]);
        }
        for layer in 0..self.num_hidden_layers {
            for (name, to, from) in [
                ("self_attn.q_proj", c, c),
                ("self_attn.k_proj", c, c),
                ("self_attn.v_proj", c, c),
                ("self_attn.out_proj", c, c),
                ("fc1", inner, c),
                ("fc2", c, inner),
            ] {
                push(format!("layers.{layer}.{name}.weight"), vec![to, from]);
                if self.enable_bias {
                    push(format!("layers.{layer}.{name}.bias"), vec![to]);
                }
            }
            for norm in ["self_attn_layer_norm", "final_layer_norm"] {
                push(format!("layers.{layer}.{norm}.weight"), vec![c]);
                push(format!("layers.{layer}.{norm}.bias"), vec![c]);
            }
        }
        if self.has_final_norm() {
            push("final_layer_norm.weight".to_owned(), vec![c]);
            push("final_layer_norm.bias".to_owned(), vec![c]);
        }
        if self.projects() {
            push("project_out.weight".to_owned(), vec![e, c]);
        }
        shapes
    }

    fn forward<O: Ops>(&self, weights: &Weights<'_>, ops: &mut O, prompt: Option<&Tensor>) -> TensorResult<O::Array> {
        let name = |part: &str| format!("model.decoder.{part}");
        let tokens = weights.weight(Self::NAMES.embedding);
        let table = weights.table(&name("embed_positions.weight"))?;
        let positions = Positions { table, first: FIRST_POSITION };
        let mut x = if self.projects() {
            let e = ops.embed(tokens, None, prompt)?; // [N, E]
            let x = ops.linear(&e, &weights.layer(&name("project_in")))?; // [N, C]
            let positions = ops.positions(positions)?; // [N, C]
            ops.add(x, positions)?
        } else {
            ops.embed(tokens, Some(positions), prompt)? // [N, C]
        };
        for layer in 0..self.num_hidden_layers {
            x = ops.block(x, &TransformerBlock::new(self, weights, layer))?;
        }
        if self.has_final_norm() {
            x = ops.layer_norm(&x, &weights.norm(&name("final_layer_norm"), EPSILON))?;
        }
        if self.projects() {
            x = ops.linear(&x, &weights.layer(&name("project_out")))?; // [N, E]
        }
        Ok(x)
    }
}

/// The parameters of one transformer block, and what the configuration says of it.
#[derive(Clone)]
struct TransformerBlock {
    last: bool,
    /// Whether norms stand before the branches, or behind the sums.
    norm_before: bool,
    attend: Attend,
    activation: Activation,
    dropout: f32,
    /// Dropout sites at the ends of the two residual branches.
    branch_sites: [u32; 2],
    self_attn_layer_norm: LayerNorm,
    /// Queries, keys, values.
    qkv_proj: [Layer; 3],
    out_proj: Layer,
    final_layer_norm: LayerNorm,
    fc1: Layer,
    fc2: Layer,
}

impl TransformerBlock {
    /// Finds the parameters by their names.
    fn new(config: &OptConfig, weights: &Weights<'_>, layer: usize) -> Self {
        let name = |part: &str| format!("model.decoder.layers.{layer}.{part}");
        let linear = |part: &str| weights.layer(&name(part));
        let norm = |part: &str| weights.norm(&name(part), EPSILON);
        // Every place that drops elements has a number of its own: one a head, and two a block for the branches.
        let heads = config.num_attention_heads;
        let site = (1 + layer * (heads + 2)) as u32;
        let scale = 1.0 / ((config.hidden_size / heads) as f32).sqrt();
        let dropout = config.attention_dropout;
        TransformerBlock {
            last: layer + 1 == config.num_hidden_layers,
            norm_before: config.do_layer_norm_before,
            attend: Attend { layer, heads, kv_heads: heads, scale, window: None, dropout, site },
            activation: config.activation_function,
            dropout: config.dropout,
            branch_sites: [0, 1].map(|branch| site + (heads + branch) as u32),
            self_attn_layer_norm: norm("self_attn_layer_norm"),
            qkv_proj: ["q", "k", "v"].map(|part| linear(&format!("self_attn.{part}_proj"))),
            out_proj: linear("self_attn.out_proj"),
            final_layer_norm: norm("final_layer_norm"),
            fc1: linear("fc1"),
            fc2: linear("fc2"),
        }
    }

    fn attention<O: Ops>(&self, ops: &mut O, h: &O::Array) -> TensorResult<O::Array> {
        let qkv = ops.side_by_side(h, &self.qkv_proj)?; // [N, 3C]
        ops.attention(qkv, self.attend) // [N, C]
    }

    fn feed_forward<O: Ops>(&self, ops: &mut O, h: &O::Array) -> TensorResult<O::Array> {
        let m = ops.linear(h, &self.fc1)?; // [N, I]
        let m = ops.activation(m, self.activation)?;
        let m = ops.linear(&m, &self.fc2)?; // [N, C]
        ops.dropout(m, self.dropout, self.branch_sites[1])
    }
}

impl Block for TransformerBlock {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> TensorResult<O::Array> {
        let a = if self.norm_before {
            let h = ops.layer_norm(&x, &self.self_attn_layer_norm)?; // [N, C]
            self.attention(ops, &h)?
        } else {
            self.attention(ops, &x)?
        };
        // Behind the last attention no row reads another: the others are done with, and N is the number of those wanted.
        let (x, a) = if self.last { (ops.wanted(x)?, ops.wanted(a)?) } else { (x, a) };
        let a = ops.linear(&a, &self.out_proj)?; // [N, C]
        let a = ops.dropout(a, self.dropout, self.branch_sites[0])?;
        let x = ops.add(x, a)?;

        if self.norm_before {
            let h = ops.layer_norm(&x, &self.final_layer_norm)?; // [N, C]
            let m = self.feed_forward(ops, &h)?;
            ops.add(x, m)
        } else {
            let x = ops.layer_norm(&x, &self.self_attn_layer_norm)?; // [N, C]
            let m = self.feed_forward(ops, &x)?;
            let x = ops.add(x, m)?;
            ops.layer_norm(&x, &self.final_layer_norm)
        }
    }
}

fn default_architectures() -> Vec<String> {
    vec!["OPTForCausalLM".to_owned()]
}

fn default_activation() -> Activation {
    Activation::Relu
}

fn default_positions() -> usize {
    2048
}

fn default_dropout() -> f32 {
    0.1
}

fn default_initializer_range() -> f64 {
    0.02
}

fn yes() -> bool {
    true
}
