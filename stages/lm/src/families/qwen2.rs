//! Qwen2: Yang et al., "Qwen2 technical report", 2024; the same, "Qwen2.5 technical report", 2024.
//!
//! A Llama whose projections to queries, keys and values have biases, and whose last layers may see a window of positions
//! instead of all.

use serde::{Deserialize, Serialize};

use super::llama_like::{
    Biases, LayerType, LlamaLike, Windows, config_like_llama, decoder_like_llama, default_activation, default_epsilon,
    default_initializer_range, default_theta, keeps_windows, llama_like,
};
use super::rope::RopeScaling;
use super::{Architecture, Decoder, EndTokens, Sizes};

/// A Hugging Face `config.json` of the Qwen2 family. Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Qwen2Config {
    /// Class names, for those who open the folder in Python.
    #[serde(default = "default_architectures")]
    pub architectures: Vec<String>,
    /// Family, `qwen2`.
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
    /// Channels `D` of a head; `None` is `C / H`, and left out, for `transformers` takes it as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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

impl Qwen2Config {
    fn decoder(&self) -> LlamaLike<'_> {
        llama_like!(
            self,
            head_dim: self.head_dim,
            biases: Biases { qkv: true, out: false, feed_forward: false },
            norms_heads: false,
            windows: Windows {
                size: self.sliding_window.filter(|_| self.use_sliding_window),
                types: self.layer_types.as_deref(),
                from: self.max_window_layers,
            }
        )
    }
}

impl Decoder for Qwen2Config {
    const MODEL_TYPE: &str = "qwen2";

    decoder_like_llama!();
    keeps_windows!();

    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self {
        config_like_llama!(architecture, vocab_size, end, {
            head_dim: None,
            rms_norm_eps: default_epsilon(),
            use_sliding_window: false,
            sliding_window: None,
            max_window_layers: default_max_window_layers(),
            layer_types: None,
        })
    }
}

fn default_architectures() -> Vec<String> {
    vec!["Qwen2ForCausalLM".to_owned()]
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

fn default_max_window_layers() -> usize {
    28
}
