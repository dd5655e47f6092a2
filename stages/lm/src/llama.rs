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
use crate::ops::{Attend, Ops, Projection, Rotary};

/// The parameters of a model by their roles.
pub(crate) struct Llama<'a> {
    config: &'a LlamaConfig,
    embed_tokens: &'a Tensor,
    layers: Vec<Layer<'a>>,
    norm: &'a Tensor,
    /// Cosines and sines of the positions, `[P, D]`.
    angles: Tensor,
}

/// The parameters of one transformer block.
struct Layer<'a> {
    input_layernorm: &'a Tensor,
    /// Queries, keys, values.
    qkv_proj: [Projection<'a>; 3],
    o_proj: Projection<'a>,
    post_attention_layernorm: &'a Tensor,
    gate_proj: Projection<'a>,
    up_proj: Projection<'a>,
    down_proj: Projection<'a>,
}

impl<'a> Llama<'a> {
    /// Finds the parameters by their names. `angles` cover all positions in use.
    pub(crate) fn new(config: &'a LlamaConfig, angles: Tensor, get: impl Fn(&str) -> Option<&'a Tensor>) -> Self {
        let weight = |name: &str| get(&format!("{name}.weight")).expect("a model has all its parameters");
        let projection = |name: &str| Projection { weight: weight(name), bias: get(&format!("{name}.bias")) };
        let layer = |layer: usize| {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            Layer {
                input_layernorm: weight(&name("input_layernorm")),
                qkv_proj: ["q", "k", "v"].map(|part| projection(&name(&format!("self_attn.{part}_proj")))),
                o_proj: projection(&name("self_attn.o_proj")),
                post_attention_layernorm: weight(&name("post_attention_layernorm")),
                gate_proj: projection(&name("mlp.gate_proj")),
                up_proj: projection(&name("mlp.up_proj")),
                down_proj: projection(&name("mlp.down_proj")),
            }
        };
        Llama {
            config,
            embed_tokens: weight("model.embed_tokens"),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            norm: weight("model.norm"),
            angles,
        }
    }

    /// Token ids to final hidden states, by the operations of `ops`.
    pub(crate) fn forward<O: Ops>(&self, ops: &mut O, prompt: Option<&Tensor>) -> Result<O::Array> {
        let eps = self.config.rms_norm_eps as f32;
        let mut x = ops.embed(self.embed_tokens, None, prompt)?; // [N, C]
        for (index, layer) in self.layers.iter().enumerate() {
            let h = ops.rms_norm(&x, layer.input_layernorm, eps)?; // [N, C]
            let qkv = ops.project(&h, &layer.qkv_proj)?; // [N, (H + 2G) D]
            let qkv = ops.rotary(qkv, self.rotary())?; // [N, (H + 2G) D]
            let a = ops.attention(qkv, self.attend(index))?; // [N, H D]
            let a = ops.project(&a, &[layer.o_proj])?; // [N, C]
            x = ops.add(x, a)?;

            let h = ops.rms_norm(&x, layer.post_attention_layernorm, eps)?; // [N, C]
            let gate = ops.project(&h, &[layer.gate_proj])?; // [N, I]
            let up = ops.project(&h, &[layer.up_proj])?; // [N, I]
            let m = ops.swiglu(gate, up)?; // [N, I]
            let m = ops.project(&m, &[layer.down_proj])?; // [N, C]
            x = ops.add(x, m)?;
        }
        let x = ops.text(x)?; // [N, C] without the prompt's rows
        ops.rms_norm(&x, self.norm, eps)
    }

    /// Queries and keys are turned, values are not.
    fn rotary(&self) -> Rotary<'_> {
        let heads = self.config.num_attention_heads + self.config.kv_heads();
        Rotary { heads, head_width: self.config.head_width(), angles: &self.angles }
    }

    fn attend(&self, layer: usize) -> Attend {
        let config = self.config;
        let (heads, kv_heads) = (config.num_attention_heads, config.kv_heads());
        let scale = 1.0 / (config.head_width() as f32).sqrt();
        Attend { layer, heads, kv_heads, scale, dropout: config.attention_dropout, site: (layer * heads) as u32 }
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
