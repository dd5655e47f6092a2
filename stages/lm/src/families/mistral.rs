//! Mistral: Jiang et al., "Mistral 7B", 2023.
//!
//! A Llama whose queries may see a window of positions instead of all. While it writes, keys and values of all positions are
//! kept, also of those that no query will see.

use serde::{Deserialize, Serialize};

use super::llama_like::{
    Biases, LlamaLike, Windows, config_like_llama, decoder_like_llama, default_activation, default_epsilon,
    default_initializer_range, default_theta, llama_like,
};
use super::rope::RopeScaling;
use super::{Architecture, Decoder, EndTokens, Sizes};

/// A Hugging Face `config.json` of the Mistral family. Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MistralConfig {
    /// Class names, for those who open the folder in Python.
    #[serde(default = "default_architectures")]
    pub architectures: Vec<String>,
    /// Family, `mistral`.
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
    #[serde(default = "default_kv_heads")]
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
    /// Positions that a query sees, its own and those before it; `None` is all.
    #[serde(default = "default_window")]
    pub sliding_window: Option<usize>,
    /// Dropout of attention probabilities.
    #[serde(default)]
    pub attention_dropout: f32,
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

impl MistralConfig {
    fn decoder(&self) -> LlamaLike<'_> {
        llama_like!(
            self,
            head_dim: self.head_dim,
            biases: Biases::default(),
            norms_heads: false,
            windows: Windows { size: self.sliding_window, types: None, from: 0 }
        )
    }
}

impl Decoder for MistralConfig {
    const MODEL_TYPE: &str = "mistral";

    decoder_like_llama!();

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        config_like_llama!(architecture, vocab_size, end, {
            head_dim: None,
            rms_norm_eps: default_epsilon(),
            sliding_window: None,
        })
    }
}

fn default_architectures() -> Vec<String> {
    vec!["MistralForCausalLM".to_owned()]
}

fn default_kv_heads() -> Option<usize> {
    Some(8)
}

fn default_positions() -> usize {
    1 << 17
}

fn default_window() -> Option<usize> {
    Some(4096)
}
