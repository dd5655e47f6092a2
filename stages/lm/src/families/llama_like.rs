//! The decoder of Llama, and of the families that differ from it in details: RMS norms before each branch, rotary positions,
//! query heads that share keys and values, a gated feed-forward layer.
//!
//! Dimensions: `N` tokens of the batch, `C` channels, `H` query heads and `G` heads of keys and values with `D` channels each,
//! `I` channels inside the feed-forward layer. Weights are `[out, in]` and named as in Hugging Face checkpoints.

use anyhow::{bail, ensure};
use candle_core::{Result as TensorResult, Tensor};
use contract::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::architecture::ROPE_THETA;
use super::check::{at_least_one, multiple, not_negative, rate};
use super::rope::{self, RopeScaling};
use super::{Names, Sizes, Weights};
use crate::ops::rotary::Rotary;
use crate::ops::{Attend, Block, Layer, Layout, Ops, RmsNorm};

/// The part of a `Decoder` that its `decoder()`, a [`LlamaLike`], says.
macro_rules! decoder_like_llama {
    () => {
        const OPTIONS: &[&str] = &["kv_heads", "rope_theta"];
        const NAMES: crate::families::Names = crate::families::llama_like::NAMES;

        crate::families::fields_of_transformers!();

        fn default_inner(width: usize) -> usize {
            crate::families::llama_like::default_inner(width)
        }

        fn from_json(mut json: serde_json::Value) -> contract::Result<Self> {
            crate::families::llama_like::unify_rope(&mut json)?;
            crate::families::from_json(json)
        }

        fn sizes(&self) -> crate::families::Sizes {
            self.decoder().sizes
        }

        fn validate(&self) -> contract::Result<()> {
            self.decoder().validate()
        }

        fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
            self.decoder().parameter_shapes()
        }

        fn forward<O: crate::ops::Ops>(
            &self,
            weights: &crate::families::Weights<'_>,
            ops: &mut O,
            prompt: Option<&candle_core::Tensor>,
        ) -> candle_core::Result<O::Array> {
            self.decoder().forward(weights, ops, prompt)
        }
    };
}
pub(super) use decoder_like_llama;

/// The [`LlamaLike`] of a configuration, from the fields that those of all families have, and from what is its own.
macro_rules! llama_like {
    ($config:expr, head_dim: $head_dim:expr, biases: $biases:expr, norms_heads: $norms_heads:expr, windows: $windows:expr) => {{
        let config = $config;
        let (heads, head_dim) = (config.num_attention_heads, $head_dim);
        let kv_heads = config.num_key_value_heads.unwrap_or(heads);
        LlamaLike {
            sizes: Sizes {
                vocabulary: config.vocab_size,
                positions: config.max_position_embeddings,
                width: config.hidden_size,
                layers: config.num_hidden_layers,
                heads,
                // Of no heads: `validate` says so.
                kv_width: kv_heads * head_dim.unwrap_or(config.hidden_size.checked_div(heads).unwrap_or(0)),
                tied: config.tie_word_embeddings,
                initializer_range: config.initializer_range,
            },
            inner: config.intermediate_size,
            kv_heads,
            head_dim,
            activation: &config.hidden_act,
            eps: config.rms_norm_eps,
            dropout: config.attention_dropout,
            theta: config.rope_theta,
            scaling: config.rope_scaling.as_ref(),
            biases: $biases,
            norms_heads: $norms_heads,
            windows: $windows,
        }
    }};
}
pub(super) use llama_like;

/// The configuration that an architecture asks for: the fields that those of all families have, and what is its own.
macro_rules! config_like_llama {
    ($architecture:expr, $vocab_size:expr, $end:expr, {$($own:ident: $value:expr,)*}) => {{
        let (architecture, end): (&Architecture, u32) = ($architecture, $end);
        Self {
            architectures: default_architectures(),
            model_type: Self::MODEL_TYPE.to_owned(),
            vocab_size: $vocab_size,
            hidden_size: architecture.width,
            intermediate_size: architecture.inner.unwrap_or_else(|| architecture.default_inner()),
            num_hidden_layers: architecture.layers,
            num_attention_heads: architecture.heads(),
            num_key_value_heads: architecture.kv_heads,
            hidden_act: default_activation(),
            max_position_embeddings: architecture.positions(),
            initializer_range: default_initializer_range(),
            tie_word_embeddings: architecture.tied.unwrap_or(true),
            rope_theta: architecture.rope_theta.unwrap_or_else(default_theta),
            rope_scaling: None,
            attention_dropout: architecture.dropout.unwrap_or(0.0),
            bos_token_id: Some(end),
            eos_token_id: Some(EndTokens::One(end)),
            pad_token_id: Some(i64::from(end)),
            $($own: $value,)*
        }
    }};
}
pub(super) use config_like_llama;

/// Nonlinearity of the gate where a file names none.
pub(super) fn default_activation() -> String {
    "silu".to_owned()
}

/// Standard deviation of initial weights where a file names none.
pub(super) fn default_initializer_range() -> f64 {
    0.02
}

/// What is added to the mean square in norms where a file does not say.
pub(super) fn default_epsilon() -> f64 {
    1e-6
}

/// Base of the rotary angles where a file does not say.
pub(super) fn default_theta() -> f64 {
    ROPE_THETA
}

/// What parameters are called.
pub(super) const NAMES: Names = Names {
    embedding: "model.embed_tokens.weight",
    head: "lm_head.weight",
    prefix: "model.",
    branch_ends: &["o_proj.weight", "down_proj.weight"],
    tables: &[],
    layout: Layout::OutIn,
};

/// What a configuration says of such a decoder.
pub(super) struct LlamaLike<'a> {
    pub(super) sizes: Sizes,
    /// Channels `I`.
    pub(super) inner: usize,
    /// Heads of keys and values `G`.
    pub(super) kv_heads: usize,
    /// Channels `D` of a head; `None` is `C / H`.
    pub(super) head_dim: Option<usize>,
    /// Nonlinearity of the gate: `silu`, also called `swish`.
    pub(super) activation: &'a str,
    /// Added to the mean square in norms.
    pub(super) eps: f64,
    /// Dropout of attention probabilities.
    pub(super) dropout: f32,
    /// Base of the rotary angles.
    pub(super) theta: f64,
    pub(super) scaling: Option<&'a RopeScaling>,
    pub(super) biases: Biases,
    /// Whether each head of queries and keys is normalised before it is turned.
    pub(super) norms_heads: bool,
    pub(super) windows: Windows<'a>,
}

/// Which projections have biases.
#[derive(Clone, Copy, Default)]
pub(super) struct Biases {
    /// Those to queries, keys and values.
    pub(super) qkv: bool,
    /// That behind attention.
    pub(super) out: bool,
    /// The three of the feed-forward layer.
    pub(super) feed_forward: bool,
}

/// How much of a text the queries of each layer see.
#[derive(Clone, Copy)]
pub(super) struct Windows<'a> {
    /// Positions that a layer with a window sees.
    pub(super) size: Option<usize>,
    /// Which layers have it, where they are told one by one.
    pub(super) types: Option<&'a [LayerType]>,
    /// Where they are not: all from this one on.
    pub(super) from: usize,
}

/// The part of a `Decoder` of a family whose configuration tells which layers have windows.
macro_rules! keeps_windows {
    () => {
        fn keep_layers(&mut self, layers: &[usize]) {
            self.num_hidden_layers = layers.len();
            self.max_window_layers = layers.iter().filter(|layer| **layer < self.max_window_layers).count();
            self.layer_types = self.layer_types.take().map(|types| layers.iter().map(|layer| types[*layer]).collect());
        }
    };
}
pub(super) use keeps_windows;

/// What the queries of a layer see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// All positions up to their own.
    FullAttention,
    /// A window of positions that ends with their own.
    SlidingAttention,
}

impl Windows<'_> {
    /// Every query sees all that is before it.
    pub(super) const NONE: Windows<'static> = Windows { size: None, types: None, from: 0 };

    fn of(&self, layer: usize) -> Option<usize> {
        let slides = match self.types {
            Some(types) => types.get(layer) == Some(&LayerType::SlidingAttention),
            None => layer >= self.from,
        };
        self.size.filter(|_| slides)
    }

    fn validate(&self, layers: usize) -> Result<()> {
        ensure!(self.size != Some(0), "`sliding_window` is 0: expected at least 1");
        let Some(types) = self.types else { return Ok(()) };
        ensure!(types.len() == layers, "`layer_types` has {} entries for {layers} layers", types.len());
        ensure!(
            self.size.is_some() || !types.contains(&LayerType::SlidingAttention),
            "`layer_types` has layers with a window and no `sliding_window` is in use"
        );
        Ok(())
    }
}

/// Channels inside the feed-forward layer of a model of which nothing but the width is said: it has three matrices instead
/// of two.
pub(super) fn default_inner(width: usize) -> usize {
    (8 * width).div_ceil(3).next_multiple_of(32)
}

/// Brings what files say of rotary positions into one form; all channels of a head are turned.
pub(super) fn unify_rope(json: &mut Json) -> Result<()> {
    match rope::unify(json, "rope_theta")? {
        Some(share) if share.as_f64() != Some(1.0) => bail!("`partial_rotary_factor` is {share}: expected 1"),
        _ => Ok(()),
    }
}

impl LlamaLike<'_> {
    /// Channels `D` of a head.
    pub(super) fn head_width(&self) -> usize {
        self.head_dim.unwrap_or(self.sizes.width / self.sizes.heads)
    }

    /// By how much each pair of channels of a head turns from one position to the next, `[D / 2]`, in radians.
    pub(super) fn frequencies(&self) -> Vec<f32> {
        rope::frequencies(self.head_width(), self.theta, self.scaling)
    }

    pub(super) fn validate(&self) -> Result<()> {
        let Sizes { vocabulary, positions, width, layers, heads, initializer_range, .. } = self.sizes;
        at_least_one(&[
            ("layers", layers),
            ("width", width),
            ("inner channels", self.inner),
            ("heads", heads),
            ("heads of keys and values", self.kv_heads),
            ("positions", positions),
            ("vocabulary size", vocabulary),
        ])?;
        if self.head_dim.is_none() {
            multiple("width", width, heads)?;
        }
        ensure!(
            heads.is_multiple_of(self.kv_heads),
            "{heads} heads cannot share {} heads of keys and values evenly: change one of them",
            self.kv_heads
        );
        ensure!(
            self.head_width().is_multiple_of(2) && self.head_width() > 0,
            "a head has {} channels: expected an even number, for rotary positions turn pairs",
            self.head_width()
        );
        ensure!(
            ["silu", "swish"].contains(&self.activation),
            "the feed-forward layer's activation is `{}`: expected `silu`",
            self.activation
        );
        rate(self.dropout)?;
        ensure!(self.theta > 0.0, "base of the rotary angles is {}: expected more than 0", self.theta);
        not_negative(&[("`rms_norm_eps`", self.eps), ("`initializer_range`", initializer_range)])?;
        self.scaling.map_or(Ok(()), RopeScaling::validate)?;
        self.windows.validate(layers)
    }

    pub(super) fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, inner, d) = (self.sizes.width, self.inner, self.head_width());
        let (q, kv) = (self.sizes.heads * d, self.kv_heads * d);
        let Biases { qkv, out, feed_forward } = self.biases;
        let mut shapes = vec![(NAMES.embedding.to_owned(), vec![self.sizes.vocabulary, c])];
        for layer in 0..self.sizes.layers {
            let mut push = |name: &str, shape| shapes.push((format!("model.layers.{layer}.{name}"), shape));
            push("input_layernorm.weight", vec![c]);
            for (name, to, from, biased) in [("q", q, c, qkv), ("k", kv, c, qkv), ("v", kv, c, qkv), ("o", c, q, out)] {
                push(&format!("self_attn.{name}_proj.weight"), vec![to, from]);
                if biased {
                    push(&format!("self_attn.{name}_proj.bias"), vec![to]);
                }
            }
            if self.norms_heads {
                push("self_attn.q_norm.weight", vec![d]);
                push("self_attn.k_norm.weight", vec![d]);
            }
            push("post_attention_layernorm.weight", vec![c]);
            for (name, to, from) in [("gate", inner, c), ("up", inner, c), ("down", c, inner)] {
                push(&format!("mlp.{name}_proj.weight"), vec![to, from]);
                if feed_forward {
                    push(&format!("mlp.{name}_proj.bias"), vec![to]);
                }
            }
        }
        shapes.push(("model.norm.weight".to_owned(), vec![c]));
        shapes
    }

    pub(super) fn forward<O: Ops>(
        &self,
        weights: &Weights<'_>,
        ops: &mut O,
        prompt: Option<&Tensor>,
    ) -> TensorResult<O::Array> {
        let embedding = weights.weight(NAMES.embedding);
        let angles = weights.angles(|| self.frequencies())?;
        let mut x = ops.embed(embedding, None, prompt)?; // [N, C]
        for layer in 0..self.sizes.layers {
            x = ops.block(x, &TransformerBlock::new(self, weights, &angles, layer))?;
        }
        ops.rms_norm(&x, &weights.rms_norm("model.norm", self.eps))
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
    /// Of each head of queries, and of each of keys.
    head_norms: Option<[RmsNorm; 2]>,
    o_proj: Layer,
    post_attention_layernorm: RmsNorm,
    gate_proj: Layer,
    up_proj: Layer,
    down_proj: Layer,
}

impl TransformerBlock {
    /// Finds the parameters by their names. `angles` cover all positions in use.
    fn new(model: &LlamaLike<'_>, weights: &Weights<'_>, angles: &Tensor, layer: usize) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |part: &str| weights.layer(&name(part));
        let norm = |part: &str| weights.rms_norm(&name(part), model.eps);
        let (heads, kv_heads, head_width) = (model.sizes.heads, model.kv_heads, model.head_width());
        let scale = 1.0 / (head_width as f32).sqrt();
        let (window, dropout) = (model.windows.of(layer), model.dropout);
        TransformerBlock {
            last: layer + 1 == model.sizes.layers,
            attend: Attend { layer, heads, kv_heads, scale, window, dropout, site: (layer * heads) as u32 },
            rotary: Rotary { heads: heads + kv_heads, head_width, turned: head_width, angles: angles.clone() },
            input_layernorm: norm("input_layernorm"),
            qkv_proj: ["q", "k", "v"].map(|part| linear(&format!("self_attn.{part}_proj"))),
            head_norms: model.norms_heads.then(|| ["q", "k"].map(|part| norm(&format!("self_attn.{part}_norm")))),
            o_proj: linear("self_attn.o_proj"),
            post_attention_layernorm: norm("post_attention_layernorm"),
            gate_proj: linear("mlp.gate_proj"),
            up_proj: linear("mlp.up_proj"),
            down_proj: linear("mlp.down_proj"),
        }
    }

    /// Queries, keys and values of all heads, `[N, (H + 2G) D]`.
    fn qkv<O: Ops>(&self, ops: &mut O, h: &O::Array) -> TensorResult<O::Array> {
        let Some([q_norm, k_norm]) = &self.head_norms else { return ops.side_by_side(h, &self.qkv_proj) };
        let [q_proj, k_proj, v_proj] = &self.qkv_proj;
        let q = ops.linear(h, q_proj)?; // [N, H D]
        let q = ops.rms_norm(&q, q_norm)?; // [N, H D]
        let k = ops.linear(h, k_proj)?; // [N, G D]
        let k = ops.rms_norm(&k, k_norm)?; // [N, G D]
        let v = ops.linear(h, v_proj)?; // [N, G D]
        ops.join(vec![q, k, v])
    }
}

impl Block for TransformerBlock {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> TensorResult<O::Array> {
        let h = ops.rms_norm(&x, &self.input_layernorm)?; // [N, C]
        let qkv = self.qkv(ops, &h)?; // [N, (H + 2G) D]
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
