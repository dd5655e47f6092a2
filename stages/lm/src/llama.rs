//! Llama: Touvron et al., "LLaMA: Open and efficient foundation language models", 2023; the same, "Llama 2", 2023; Grattafiori
//! et al., "The Llama 3 herd of models", 2024.
//!
//! Differences from the papers: as for GPT-2, sequences are packed end to end, and a soft prompt may stand before each. The
//! two channels that rotary positions turn together lie half a head apart. Dimensions: `N` tokens of the batch, `C`
//! channels, `H` query heads and `G` heads of keys and values with `D` channels each, `I` channels inside the feed-forward
//! layer. Weights are `[out, in]` and named as in Hugging Face checkpoints.

use std::sync::{Arc, Mutex};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::config::LlamaConfig;
use crate::ops::{Attend, Block, Ops, Projection, Rotary};

/// The parameters of a model by their roles.
pub(crate) struct Llama<'a> {
    config: &'a LlamaConfig,
    embed_tokens: &'a Tensor,
    layers: Vec<Layer>,
    norm: &'a Tensor,
}

/// Weight of a linear layer, and its bias if it has one.
#[derive(Clone)]
struct Affine {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Affine {
    fn projection(&self) -> Projection<'_> {
        Projection { weight: &self.weight, bias: self.bias.as_ref() }
    }
}

/// The parameters of one transformer block, and what the configuration says of it.
#[derive(Clone)]
struct Layer {
    last: bool,
    eps: f32,
    attend: Attend,
    /// Channels `D` of a head.
    head_width: usize,
    /// Cosines and sines of the positions, `[P, D]`.
    angles: Tensor,
    input_layernorm: Tensor,
    /// Queries, keys, values.
    qkv_proj: [Affine; 3],
    o_proj: Affine,
    post_attention_layernorm: Tensor,
    gate_proj: Affine,
    up_proj: Affine,
    down_proj: Affine,
}

impl<'a> Llama<'a> {
    /// Finds the parameters by their names. `angles` cover all positions in use.
    pub(crate) fn new(config: &'a LlamaConfig, angles: &Tensor, get: impl Fn(&str) -> Option<&'a Tensor>) -> Self {
        let weight = |name: &str| get(&format!("{name}.weight")).expect("a model has all its parameters");
        let affine = |name: &str| Affine { weight: weight(name).clone(), bias: get(&format!("{name}.bias")).cloned() };
        let head_width = config.head_width();
        let layer = |layer: usize| {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let (heads, kv_heads) = (config.num_attention_heads, config.kv_heads());
            let scale = 1.0 / (head_width as f32).sqrt();
            let site = (layer * heads) as u32;
            Layer {
                last: layer + 1 == config.num_hidden_layers,
                eps: config.rms_norm_eps as f32,
                attend: Attend { layer, heads, kv_heads, scale, dropout: config.attention_dropout, site },
                head_width,
                angles: angles.clone(),
                input_layernorm: weight(&name("input_layernorm")).clone(),
                qkv_proj: ["q", "k", "v"].map(|part| affine(&name(&format!("self_attn.{part}_proj")))),
                o_proj: affine(&name("self_attn.o_proj")),
                post_attention_layernorm: weight(&name("post_attention_layernorm")).clone(),
                gate_proj: affine(&name("mlp.gate_proj")),
                up_proj: affine(&name("mlp.up_proj")),
                down_proj: affine(&name("mlp.down_proj")),
            }
        };
        Llama {
            config,
            embed_tokens: weight("model.embed_tokens"),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            norm: weight("model.norm"),
        }
    }

    /// Token ids to final hidden states, by the operations of `ops`.
    pub(crate) fn forward<O: Ops>(&self, ops: &mut O, prompt: Option<&Tensor>) -> Result<O::Array> {
        let mut x = ops.embed(self.embed_tokens, None, prompt)?; // [N, C]
        for layer in &self.layers {
            x = ops.block(x, layer)?;
        }
        ops.rms_norm(&x, self.norm, self.config.rms_norm_eps as f32)
    }
}

impl Block for Layer {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> Result<O::Array> {
        let h = ops.rms_norm(&x, &self.input_layernorm, self.eps)?; // [N, C]
        let qkv = ops.project(&h, &self.qkv_proj.each_ref().map(Affine::projection))?; // [N, (H + 2G) D]
        let qkv = ops.rotary(qkv, self.rotary())?; // [N, (H + 2G) D]
        let a = ops.attention(qkv, self.attend)?; // [N, H D]
        // Behind the last attention no row reads another: the others are done with, and N is the number of those wanted.
        let (x, a) = if self.last { (ops.text(x)?, ops.text(a)?) } else { (x, a) };
        let a = ops.project(&a, &[self.o_proj.projection()])?; // [N, C]
        let x = ops.add(x, a)?;

        let h = ops.rms_norm(&x, &self.post_attention_layernorm, self.eps)?; // [N, C]
        let gate = ops.project(&h, &[self.gate_proj.projection()])?; // [N, I]
        let up = ops.project(&h, &[self.up_proj.projection()])?; // [N, I]
        let m = ops.swiglu(gate, up)?; // [N, I]
        let m = ops.project(&m, &[self.down_proj.projection()])?; // [N, C]
        ops.add(x, m)
    }
}

impl Layer {
    /// Queries and keys are turned, values are not.
    fn rotary(&self) -> Rotary<'_> {
        let heads = self.attend.heads + self.attend.kv_heads;
        Rotary { heads, head_width: self.head_width, angles: &self.angles }
    }
}

/// Cosines and sines of rotary positions, for as many positions as were asked for so far. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Angles(Arc<Mutex<Option<Tensor>>>);

impl Angles {
    /// `[P, D]` with `P` at least `positions`: for each position the `D / 2` cosines and then the `D / 2` sines.
    pub(crate) fn table(&self, config: &LlamaConfig, positions: usize, device: &Device) -> Result<Tensor> {
        let mut known = self.0.lock().expect("nothing panics while it is held");
        if let Some(table) = &*known
            && table.dim(0)? >= positions
        {
            return Ok(table.clone());
        }
        let positions = positions.next_power_of_two();
        let frequencies = config.rotary_frequencies();
        let width = 2 * frequencies.len();
        let mut table = vec![0.0; positions * width];
        table.par_chunks_exact_mut(width).enumerate().for_each(|(position, row)| {
            let (cosines, sines) = row.split_at_mut(width / 2);
            for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&frequencies) {
                // The angle is rounded as in `transformers`; what follows is exact to the last bit but one.
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                (*cosine, *sine) = (c as f32, s as f32);
            }
        });
        let table = Tensor::from_vec(table, (positions, width), device)?;
        *known = Some(table.clone());
        Ok(table)
    }
}
