//! Qwen3: Yang et al., "Qwen3 technical report", 2025.
//!
//! A Llama whose heads of queries and keys are normalised, each by itself, before they are turned (Dehghani et al., "Scaling
//! vision transformers to 22 billion parameters", 2023), and some of whose layers may see a window of positions instead of
//! all.

use serde::{Deserialize, Serialize};

use super::llama_like::{
    Biases, LayerType, LlamaLike, Windows, config_like_llama, decoder_like_llama, default_activation, default_epsilon,
    default_initializer_range, default_theta, keeps_windows, llama_like,
};
use super::rope::RopeScaling;
use super::{Architecture, Decoder, EndTokens, Sizes};

/// A Hugging Face `config.json` of the Qwen3 family. Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Qwen3Config {
    /// Class names, for those who open the folder in Python.
    #[serde(default = "default_architectures")]
    pub architectures: Vec<String>,
    /// Family, `qwen3`.
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
    /// Channels `D` of a head.
    #[serde(default = "default_head_dim")]
    pub head_dim: usize,
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
    /// Whether layers have a window at all.
    #[serde(default)]
    pub use_sliding_window: bool,
    /// Positions that a query of a layer with a window sees, its own and those before it.
    #[serde(default = "default_window")]
    pub sliding_window: Option<usize>,
    /// The first layer that has a window, where `layer_types` does not tell.
    #[serde(default = "default_max_window_layers")]
    pub max_window_layers: usize,
    /// What the queries of each layer see; some published configurations leave it out.
    #[serde(default)]
    pub layer_types: Option<Vec<LayerType>>,
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

impl Qwen3Config {
    fn decoder(&self) -> LlamaLike<'_> {
        llama_like!(
            self,
            head_dim: Some(self.head_dim),
            biases: Biases { qkv: self.attention_bias, out: self.attention_bias, feed_forward: false },
            norms_heads: true,
            windows: Windows {
                size: self.sliding_window.filter(|_| self.use_sliding_window),
                types: self.layer_types.as_deref(),
                from: self.max_window_layers,
            }
        )
    }
}

impl Decoder for Qwen3Config {
    const MODEL_TYPE: &str = "qwen3";

    decoder_like_llama!();
    keeps_windows!();

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        config_like_llama!(architecture, vocab_size, end, {
            head_dim: architecture.width / architecture.heads(),
            rms_norm_eps: default_epsilon(),
            attention_bias: false,
            use_sliding_window: false,
            sliding_window: None,
            max_window_layers: default_max_window_layers(),
            layer_types: None,
        })
    }
}

fn default_architectures() -> Vec<String> {
    vec!["Qwen3ForCausalLM".to_owned()]
}

fn default_kv_heads() -> Option<usize> {
    Some(32)
}

fn default_positions() -> usize {
    1 << 15
}

fn default_window() -> Option<usize> {
    Some(4096)
}

fn default_head_dim() -> usize {
    128
}

fn default_max_window_layers() -> usize {
    28
}
