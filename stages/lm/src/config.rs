//! What a model is made of: [`Config`] as in a Hugging Face `config.json`, [`Architecture`] as a user asks for it.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use contract::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Families of models this crate can compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Radford et al., "Language models are unsupervised multitask learners", 2019.
    Gpt2,
}

/// A model to be made from random weights. What is not said follows from the width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Family of the model.
    pub architecture: Family,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Channels of the hidden state.
    pub width: usize,
    /// Attention heads, a divisor of `width`. Default: one for every 32 channels, and at least two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Longest sequence in tokens, soft prompt included. Default: 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<usize>,
    /// Probability of dropping an element in training, in the three places GPT-2 has: embeddings, attention, residual
    /// branches. Default: 0, as small models underfit before they overfit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f32>,
}

impl Architecture {
    /// The full configuration over a vocabulary.
    ///
    /// Errors when the numbers do not fit one another.
    pub fn config(&self, vocab_size: usize, end: u32) -> Result<Config> {
        let Family::Gpt2 = self.architecture;
        let dropout = self.dropout.unwrap_or(0.0);
        let config = Config {
            architectures: default_architectures(),
            model_type: default_model_type(),
            vocab_size,
            n_positions: self.positions.unwrap_or(512),
            n_embd: self.width,
            n_layer: self.layers,
            n_head: self.heads.unwrap_or((self.width / 32).max(2)),
            n_inner: None,
            activation_function: Activation::GeluNew,
            resid_pdrop: dropout,
            embd_pdrop: dropout,
            attn_pdrop: dropout,
            layer_norm_epsilon: default_epsilon(),
            initializer_range: default_initializer_range(),
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
            bos_token_id: Some(end),
            eos_token_id: Some(end),
            pad_token_id: Some(end),
        };
        config.validate()?;
        Ok(config)
    }
}

/// The nonlinearity of the feed-forward layer, under its Hugging Face names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU in the tanh approximation.
    #[serde(alias = "gelu_pytorch_tanh", alias = "gelu_fast")]
    GeluNew,
    /// GELU by the error function.
    Gelu,
    /// max(x, 0).
    Relu,
}

/// A Hugging Face `config.json` of the GPT-2 family. Keys this crate has no use for are dropped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
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
    /// Token that ends a text.
    #[serde(default)]
    pub eos_token_id: Option<u32>,
    /// Token that pads.
    #[serde(default)]
    pub pad_token_id: Option<u32>,
}

impl Config {
    /// Reads `config.json` from a folder. The families this crate cannot compute are an error.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let json: serde_json::Value =
            serde_json::from_slice(&text).with_context(|| format!("`{}` is not JSON", path.display()))?;
        if let Some(family) = json.get("model_type").and_then(|f| f.as_str())
            && family != "gpt2"
        {
            bail!("`{}` describes a model of type `{family}`: expected `gpt2`", path.display());
        }
        let config: Config = serde_json::from_value(json)
            .with_context(|| format!("`{}` is not the configuration of a GPT-2 model", path.display()))?;
        config.validate().with_context(|| format!("`{}` does not add up", path.display()))?;
        Ok(config)
    }

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

    /// Names and shapes of all parameters, in the fixed order in which the model keeps them.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
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
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, c]));
        }
        shapes
    }

    fn validate(&self) -> Result<()> {
        let sizes = [
            ("layers", self.n_layer),
            ("width", self.n_embd),
            ("heads", self.n_head),
            ("positions", self.n_positions),
            ("vocabulary size", self.vocab_size),
        ];
        for (name, size) in sizes {
            ensure!(size > 0, "number of {name} is 0: expected at least 1");
        }
        ensure!(
            self.n_embd.is_multiple_of(self.n_head),
            "width {} is not a multiple of {} heads: change one of them",
            self.n_embd,
            self.n_head
        );
        for rate in [self.resid_pdrop, self.embd_pdrop, self.attn_pdrop] {
            ensure!((0.0..1.0).contains(&rate), "dropout is {rate}: expected at least 0 and less than 1");
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn architecture(width: usize) -> Architecture {
        Architecture { architecture: Family::Gpt2, layers: 4, width, heads: None, positions: None, dropout: None }
    }

    #[test]
    fn heads_follow_from_the_width() {
        for (width, heads) in [(32, 2), (64, 2), (96, 3), (192, 6), (768, 24)] {
            assert_eq!(architecture(width).config(100, 0).unwrap().n_head, heads, "{width}");
        }
    }

    #[test]
    fn a_width_that_heads_do_not_divide_is_an_error() {
        let error = Architecture { heads: Some(5), ..architecture(32) }.config(100, 0).unwrap_err();
        assert_eq!(error.to_string(), "width 32 is not a multiple of 5 heads: change one of them");
        assert!(Architecture { layers: 0, ..architecture(32) }.config(100, 0).is_err());
        assert!(Architecture { dropout: Some(1.0), ..architecture(32) }.config(100, 0).is_err());
    }

    #[test]
    fn a_misspelt_field_is_an_error() {
        let text = r#"{"architecture": "gpt2", "layers": 2, "width": 32, "head": 4}"#;
        assert!(serde_json::from_str::<Architecture>(text).unwrap_err().to_string().contains("head"));
    }

    #[test]
    fn a_foreign_family_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), r#"{"model_type": "opt"}"#).unwrap();
        let error = Config::load(folder.path()).unwrap_err();
        assert!(error.to_string().contains("`opt`: expected `gpt2`"), "{error}");
    }
}
