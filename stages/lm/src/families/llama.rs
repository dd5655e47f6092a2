//! Llama: Touvron et al., "LLaMA: Open and efficient foundation language models", 2023; the same, "Llama 2", 2023; Grattafiori
//! et al., "The Llama 3 herd of models", 2024.
//!
//! Differences from the papers: as for GPT-2, sequences are packed end to end, and a soft prompt may stand before each. The
//! two channels that rotary positions turn together lie half a head apart. Dimensions: `N` tokens of the batch, `C`
//! channels, `H` query heads and `G` heads of keys and values with `D` channels each, `I` channels inside the feed-forward
//! layer. Weights are `[out, in]` and named as in Hugging Face checkpoints.

use serde::{Deserialize, Serialize};

use super::llama_like::{
    Biases, LlamaLike, Windows, config_like_llama, decoder_like_llama, default_activation, default_epsilon,
    default_initializer_range, default_theta, llama_like,
};
use super::rope::RopeScaling;
use super::{Architecture, Decoder, EndTokens, Sizes};

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

impl LlamaConfig {
    pub(super) fn decoder(&self) -> LlamaLike<'_> {
        llama_like!(
            self,
            head_dim: self.head_dim,
            biases: Biases { qkv: self.attention_bias, out: self.attention_bias, feed_forward: self.mlp_bias },
            norms_heads: false,
            windows: Windows::NONE
        )
    }
}

impl Decoder for LlamaConfig {
    const MODEL_TYPE: &str = "llama";

    decoder_like_llama!();

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        config_like_llama!(architecture, vocab_size, end, {
            head_dim: None,
            rms_norm_eps: 1e-5,
            attention_bias: false,
            mlp_bias: false,
        })
    }
}

fn default_architectures() -> Vec<String> {
    vec!["LlamaForCausalLM".to_owned()]
}

fn default_positions() -> usize {
    2048
}
