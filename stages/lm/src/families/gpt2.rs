//! GPT-2: Radford et al., "Language models are unsupervised multitask learners", 2019.
//!
//! Differences from the paper: sequences are packed end to end instead of padded, and a soft prompt (Lester et al., "The
//! power of scale for parameter-efficient prompt tuning", 2021) may stand before each. Dimensions: `N` tokens of the batch,
//! `C` channels, `V` vocabulary. Weights are `[in, out]` and named as in Hugging Face checkpoints.

use candle_core::{Result as TensorResult, Tensor};
use contract::Result;
use serde::{Deserialize, Serialize};

use super::check::{at_least_one, multiple, not_negative, rate};
use super::{Architecture, Decoder, EndTokens, Names, Sizes, Weights};
use crate::ops::{Attend, Block, Layer, LayerNorm, Layout, Ops, Positions};
use crate::terms::activation::Activation;

/// A Hugging Face `config.json` of the GPT-2 family. Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpt2Config {
    /// Class names, for those who open the folder in Python.
    #[serde(default = "default_architectures")]
    pub architectures: Vec<String>,
    /// Family, `gpt2`.
    #[serde(default = "default_model_type")]
    pub model_type: String,
    /// Rows `V` of the embedding; may be more than the tokenizer has ids.
    pub vocab_size: usize,
    /// Longest sequence in tokens.
    pub n_positions: usize,
    /// Channels `C` of the hidden state.
    pub n_embd: usize,
    /// Transformer blocks.
    pub n_layer: usize,
    /// Attention heads `H`.
    pub n_head: usize,
    /// Channels inside the feed-forward layer; `None` is `4 C`.
    #[serde(default)]
    pub n_inner: Option<usize>,
    /// Nonlinearity of the feed-forward layer.
    #[serde(default = "default_activation")]
    pub activation_function: Activation,
    /// Dropout of the two residual branches.
    #[serde(default = "default_dropout")]
    pub resid_pdrop: f32,
    /// Dropout of the embeddings.
    #[serde(default = "default_dropout")]
    pub embd_pdrop: f32,
    /// Dropout of attention probabilities.
    #[serde(default = "default_dropout")]
    pub attn_pdrop: f32,
    /// Added to the variance in layer norms.
    #[serde(default = "default_epsilon")]
    pub layer_norm_epsilon: f64,
    /// Standard deviation of initial weights.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// Whether scores are divided by the square root of the head's width.
    #[serde(default = "yes")]
    pub scale_attn_weights: bool,
    /// Whether scores of layer `i` are divided by `i + 1` as well.
    #[serde(default)]
    pub scale_attn_by_inverse_layer_idx: bool,
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
    pub pad_token_id: Option<u32>,
}

impl Gpt2Config {
    /// Channels inside the feed-forward layer.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }

    /// What attention scores of a layer are multiplied by.
    pub fn attention_scale(&self, layer: usize) -> f32 {
        let head_width = (self.n_embd / self.n_head) as f32;
        let by_width = if self.scale_attn_weights { 1.0 / head_width.sqrt() } else { 1.0 };
        if self.scale_attn_by_inverse_layer_idx { by_width / (layer + 1) as f32 } else { by_width }
    }
}

impl Decoder for Gpt2Config {
    const MODEL_TYPE: &str = "gpt2";
    const OPTIONS: &[&str] = &[];
    const NAMES: Names = Names {
        embedding: "transformer.wte.weight",
        head: "lm_head.weight",
        prefix: "transformer.",
        branch_ends: &["c_proj.weight"],
        tables: &["transformer.wpe.weight"],
        layout: Layout::InOut,
    };

    fn default_inner(width: usize) -> usize {
        4 * width
    }

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        let dropout = architecture.dropout.unwrap_or(0.0);
        Gpt2Config {
            architectures: default_architectures(),
            model_type: default_model_type(),
            vocab_size,
            n_positions: architecture.positions(),
            n_embd: architecture.width,
            n_layer: architecture.layers,
            n_head: architecture.heads(),
            n_inner: architecture.inner,
            activation_function: Activation::GeluNew,
            resid_pdrop: dropout,
            embd_pdrop: dropout,
            attn_pdrop: dropout,
            layer_norm_epsilon: default_epsilon(),
            initializer_range: default_initializer_range(),
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: architecture.tied.unwrap_or(true),
            bos_token_id: Some(end),
            eos_token_id: Some(EndTokens::One(end)),
            pad_token_id: Some(end),
        }
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocabulary: self.vocab_size,
            positions: self.n_positions,
            width: self.n_embd,
            layers: self.n_layer,
            heads: self.n_head,
            kv_width: self.n_embd,
            tied: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
        }
    }

    fn layers_mut(&mut self) -> &mut usize {
        &mut self.n_layer
    }

    fn begin_and_ends(&self) -> (Option<u32>, Option<&EndTokens>) {
        (self.bos_token_id, self.eos_token_id.as_ref())
    }

    fn set_roles(&mut self, begin: Option<u32>, pad: Option<u32>) {
        self.bos_token_id = begin.or(self.bos_token_id);
        self.pad_token_id = pad.or(self.pad_token_id);
    }

    fn untie(&mut self) {
        self.tie_word_embeddings = false;
    }

    fn validate(&self) -> Result<()> {
        at_least_one(&[
            ("layers", self.n_layer),
            ("width", self.n_embd),
            ("inner channels", self.inner()),
            ("heads", self.n_head),
            ("positions", self.n_positions),
            ("vocabulary size", self.vocab_size),
        ])?;
        multiple("width", self.n_embd, self.n_head)?;
        [self.resid_pdrop, self.embd_pdrop, self.attn_pdrop].into_iter().try_for_each(rate)?;
        not_negative(&[
            ("`layer_norm_epsilon`", self.layer_norm_epsilon),
            ("`initializer_range`", self.initializer_range),
        ])
    }

    fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, inner) = (self.n_embd, self.inner());
        let mut shapes = vec![
            ("transformer.wte.weight".to_owned(), vec![self.vocab_size, c]),
            ("transformer.wpe.weight".to_owned(), vec![self.n_positions, c]),
        ];
        for layer in 0..self.n_layer {
            let of_block: [(&str, Vec<usize>); 12] = [
                ("ln_1.weight", vec![c]),
                ("ln_1.bias", vec![c]),
                ("attn.c_attn.weight", vec![c, 3 * c]),
                ("attn.c_attn.bias", vec![3 * c]),
                ("attn.c_proj.weight", vec![c, c]),
                ("attn.c_proj.bias", vec![c]),
                ("ln_2.weight", vec![c]),
                ("ln_2.bias", vec![c]),
                ("mlp.c_fc.weight", vec![c, inner]),
                ("mlp.c_fc.bias", vec![inner]),
                ("mlp.c_proj.weight", vec![inner, c]),
                ("mlp.c_proj.bias", vec![c]),
            ];
            shapes.extend(of_block.map(|(name, shape)| (format!("transformer.h.{layer}.{name}"), shape)));
        }
        shapes.push(("transformer.ln_f.weight".to_owned(), vec![c]));
        shapes.push(("transformer.ln_f.bias".to_owned(), vec![c]));
        shapes
    }

    fn forward<O: Ops>(&self, weights: &Weights<'_>, ops: &mut O, prompt: Option<&Tensor>) -> TensorResult<O::Array> {
        let (wte, wpe) = (weights.weight("transformer.wte.weight"), weights.table("transformer.wpe.weight")?);
        let x = ops.embed(wte, Some(Positions::new(wpe)), prompt)?; // [N, C]
        let mut x = ops.dropout(x, self.embd_pdrop, 0)?;
        for layer in 0..self.n_layer {
            x = ops.block(x, &TransformerBlock::new(self, weights, layer))?;
        }
        ops.layer_norm(&x, &weights.norm("transformer.ln_f", self.layer_norm_epsilon))
    }
}

/// The parameters of one transformer block, and what the configuration says of it.
#[derive(Clone)]
struct TransformerBlock {
    last: bool,
    attend: Attend,
    activation: Activation,
    resid_pdrop: f32,
    /// Dropout sites at the ends of the two residual branches.
    branch_sites: [u32; 2],
    ln_1: LayerNorm,
    c_attn: Layer,
    attn_c_proj: Layer,
    ln_2: LayerNorm,
    c_fc: Layer,
    mlp_c_proj: Layer,
}

impl TransformerBlock {
    /// Finds the parameters by their names.
    fn new(config: &Gpt2Config, weights: &Weights<'_>, layer: usize) -> Self {
        let name = |part: &str| format!("transformer.h.{layer}.{part}");
        let linear = |part: &str| weights.layer(&name(part));
        let norm = |part: &str| weights.norm(&name(part), config.layer_norm_epsilon);
        // Every place that drops elements has a number of its own: one a head, and two a block for the branches.
        let heads = config.n_head;
        let site = (1 + layer * (heads + 2)) as u32;
        let (scale, dropout) = (config.attention_scale(layer), config.attn_pdrop);
        TransformerBlock {
            last: layer + 1 == config.n_layer,
            attend: Attend { layer, heads, kv_heads: heads, scale, window: None, dropout, site },
            activation: config.activation_function,
            resid_pdrop: config.resid_pdrop,
            branch_sites: [0, 1].map(|branch| site + (heads + branch) as u32),
            ln_1: norm("ln_1"),
            c_attn: linear("attn.c_attn"),
            attn_c_proj: linear("attn.c_proj"),
            ln_2: norm("ln_2"),
            c_fc: linear("mlp.c_fc"),
            mlp_c_proj: linear("mlp.c_proj"),
        }
    }
}

impl Block for TransformerBlock {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> TensorResult<O::Array> {
        let h = ops.layer_norm(&x, &self.ln_1)?; // [N, C]
        let qkv = ops.linear(&h, &self.c_attn)?; // [N, 3C]
        let a = ops.attention(qkv, self.attend)?; // [N, C]
        // Behind the last attention no row reads another: the others are done with, and N is the number of those wanted.
        let (x, a) = if self.last { (ops.wanted(x)?, ops.wanted(a)?) } else { (x, a) };
        let a = ops.linear(&a, &self.attn_c_proj)?; // [N, C]
        let a = ops.dropout(a, self.resid_pdrop, self.branch_sites[0])?;
        let x = ops.add(x, a)?;

        let h = ops.layer_norm(&x, &self.ln_2)?; // [N, C]
        let m = ops.linear(&h, &self.c_fc)?; // [N, 4C]
        let m = ops.activation(m, self.activation)?;
        let m = ops.linear(&m, &self.mlp_c_proj)?; // [N, C]
        let m = ops.dropout(m, self.resid_pdrop, self.branch_sites[1])?;
        ops.add(x, m)
    }
}

fn default_architectures() -> Vec<String> {
    vec!["GPT2LMHeadModel".to_owned()]
}

fn default_model_type() -> String {
    "gpt2".to_owned()
}

fn default_activation() -> Activation {
    Activation::GeluNew
}

fn default_dropout() -> f32 {
    0.1
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
