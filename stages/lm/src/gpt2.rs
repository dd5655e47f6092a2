//! GPT-2: Radford et al., "Language models are unsupervised multitask learners", 2019.
//!
//! Differences from the paper: sequences are packed end to end instead of padded, and a soft prompt (Lester et al., "The
//! power of scale for parameter-efficient prompt tuning", 2021) may stand before each. Dimensions: `N` tokens of the batch,
//! `C` channels, `V` vocabulary. Weights are `[in, out]` and named as in Hugging Face checkpoints.

use candle_core::{Result, Tensor};

use crate::config::{Activation, Gpt2Config};
use crate::ops::{Attend, Block, Linear, Norm, Ops};

/// The parameters of a model by their roles.
pub(crate) struct Gpt2<'a> {
    config: &'a Gpt2Config,
    wte: &'a Tensor,
    wpe: &'a Tensor,
    blocks: Vec<TransformerBlock>,
    ln_f: Affine,
}

/// Weight and bias of a norm or a linear layer.
#[derive(Clone)]
struct Affine {
    weight: Tensor,
    bias: Tensor,
}

impl Affine {
    fn norm(&self) -> Norm<'_> {
        Norm { weight: &self.weight, bias: &self.bias }
    }

    fn linear(&self) -> Linear<'_> {
        Linear { weight: &self.weight, bias: &self.bias }
    }
}

/// The parameters of one transformer block, and what the configuration says of it.
#[derive(Clone)]
struct TransformerBlock {
    last: bool,
    eps: f32,
    attend: Attend,
    activation: Activation,
    resid_pdrop: f32,
    /// Dropout sites at the ends of the two residual branches.
    branch_sites: [u32; 2],
    ln_1: Affine,
    c_attn: Affine,
    attn_c_proj: Affine,
    ln_2: Affine,
    c_fc: Affine,
    mlp_c_proj: Affine,
}

impl<'a> Gpt2<'a> {
    /// Finds the parameters by their names.
    pub(crate) fn new(config: &'a Gpt2Config, get: impl Fn(&str) -> Option<&'a Tensor>) -> Self {
        let get = |name: &str| get(name).expect("a model has all its parameters");
        let affine = |name: &str| Affine {
            weight: get(&format!("{name}.weight")).clone(),
            bias: get(&format!("{name}.bias")).clone(),
        };
        let block = |layer: usize| {
            let part = |name: &str| affine(&format!("transformer.h.{layer}.{name}"));
            // Every place that drops elements has a number of its own: one a head, and two a block for the branches.
            let site = (1 + layer * (config.n_head + 2)) as u32;
            let heads = config.n_head;
            TransformerBlock {
                last: layer + 1 == config.n_layer,
                eps: config.layer_norm_epsilon as f32,
                attend: Attend {
                    layer,
                    heads,
                    kv_heads: heads,
                    scale: config.attention_scale(layer),
                    dropout: config.attn_pdrop,
                    site,
                },
                activation: config.activation_function,
                resid_pdrop: config.resid_pdrop,
                branch_sites: [0, 1].map(|branch| site + (heads + branch) as u32),
                ln_1: part("ln_1"),
                c_attn: part("attn.c_attn"),
                attn_c_proj: part("attn.c_proj"),
                ln_2: part("ln_2"),
                c_fc: part("mlp.c_fc"),
                mlp_c_proj: part("mlp.c_proj"),
            }
        };
        Gpt2 {
            config,
            wte: get("transformer.wte.weight"),
            wpe: get("transformer.wpe.weight"),
            blocks: (0..config.n_layer).map(block).collect(),
            ln_f: affine("transformer.ln_f"),
        }
    }

    /// Token ids to final hidden states, by the operations of `ops`.
    pub(crate) fn forward<O: Ops>(&self, ops: &mut O, prompt: Option<&Tensor>) -> Result<O::Array> {
        let x = ops.embed(self.wte, Some(self.wpe), prompt)?; // [N, C]
        let mut x = ops.dropout(x, self.config.embd_pdrop, 0)?;
        for block in &self.blocks {
            x = ops.block(x, block)?;
        }
        ops.layer_norm(&x, self.ln_f.norm(), self.config.layer_norm_epsilon as f32)
    }
}

impl Block for TransformerBlock {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> Result<O::Array> {
        let h = ops.layer_norm(&x, self.ln_1.norm(), self.eps)?; // [N, C]
        let qkv = ops.linear(&h, self.c_attn.linear())?; // [N, 3C]
        let a = ops.attention(qkv, self.attend)?; // [N, C]
        // Behind the last attention no row reads another: the others are done with, and N is the number of those wanted.
        let (x, a) = if self.last { (ops.text(x)?, ops.text(a)?) } else { (x, a) };
        let a = ops.linear(&a, self.attn_c_proj.linear())?; // [N, C]
        let a = ops.dropout(a, self.resid_pdrop, self.branch_sites[0])?;
        let x = ops.add(x, a)?;

        let h = ops.layer_norm(&x, self.ln_2.norm(), self.eps)?; // [N, C]
        let m = ops.linear(&h, self.c_fc.linear())?; // [N, 4C]
        let m = ops.activation(m, self.activation)?;
        let m = ops.linear(&m, self.mlp_c_proj.linear())?; // [N, C]
        let m = ops.dropout(m, self.resid_pdrop, self.branch_sites[1])?;
        ops.add(x, m)
    }
}
