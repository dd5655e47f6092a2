//! What a model is made of: [`Config`] as in a Hugging Face `config.json`, [`Architecture`] as a user asks for it.

mod gpt2;
mod llama;

use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use contract::limits;
use contract::{Bounds, Facts, Result, Vocabulary, files};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

pub use self::gpt2::Gpt2Config;
pub use self::llama::{LlamaConfig, RopeScaling};
use crate::ends::EndTokens;

/// Families of models this crate can compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Radford et al., "Language models are unsupervised multitask learners", 2019.
    Gpt2,
    /// Touvron et al., "LLaMA: Open and efficient foundation language models", 2023, with what Llama 2 and 3 added.
    Llama,
}

/// A model to be made from random weights. What is not said follows from the width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Family of the model.
    pub architecture: Family,
    /// Number of transformer blocks.
    #[schemars(range(min = 1, max = limits::LAYERS))]
    pub layers: usize,
    /// Channels of the hidden state.
    #[schemars(range(min = 1, max = limits::WIDTH))]
    pub width: usize,
    /// Attention heads, a divisor of `width`. Default: one for every 32 channels, and at least two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::HEADS))]
    pub heads: Option<usize>,
    /// Longest sequence in tokens, soft prompt included. Default: 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::TOKENS))]
    pub positions: Option<usize>,
    /// Probability of dropping an element in training, in the three places GPT-2 has: embeddings, attention, residual
    /// branches; in Llama in attention alone. Default: 0, as small models underfit before they overfit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub dropout: Option<f32>,
    /// Channels inside the feed-forward layer. Default: 4 times `width` for GPT-2; 8/3 of it for Llama, whose layer has three
    /// matrices instead of two, rounded up to a multiple of 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::WIDTH))]
    pub inner: Option<usize>,
    /// Whether the output head is the input embedding. Default: yes, as it is most of a small model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tied: Option<bool>,
    /// Heads of keys and values, a divisor of `heads`; of Llama alone. Default: as many as `heads`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::HEADS))]
    pub kv_heads: Option<usize>,
    /// Base of the rotary angles, larger for longer texts; of Llama alone. Default: 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = limits::ROPE_THETA))]
    pub rope_theta: Option<f64>,
}

impl Architecture {
    /// An architecture of which nothing but the size is said.
    pub fn new(architecture: Family, layers: usize, width: usize) -> Self {
        Architecture {
            architecture,
            layers,
            width,
            heads: None,
            positions: None,
            dropout: None,
            inner: None,
            tied: None,
            kv_heads: None,
            rope_theta: None,
        }
    }

    /// The same without what says no more than the default does: what is written out makes no other model.
    pub fn without_defaults(self) -> Self {
        fn unless<T: PartialEq>(value: Option<T>, default: T) -> Option<T> {
            value.filter(|value| *value != default)
        }
        let plain = Architecture::new(self.architecture, self.layers, self.width);
        let heads = self.heads();
        // What does not belong to a family stays, to be refused.
        let (kv_heads, rope_theta) = match self.architecture {
            Family::Gpt2 => (self.kv_heads, self.rope_theta),
            Family::Llama => (unless(self.kv_heads, heads), unless(self.rope_theta, llama::default_theta())),
        };
        Architecture {
            architecture: self.architecture,
            layers: self.layers,
            width: self.width,
            heads: unless(self.heads, plain.heads()),
            positions: unless(self.positions, plain.positions()),
            dropout: unless(self.dropout, 0.0),
            inner: unless(self.inner, plain.default_inner()),
            tied: unless(self.tied, true),
            kv_heads,
            rope_theta,
        }
    }

    /// The full configuration over a vocabulary.
    ///
    /// Errors when the numbers do not fit one another, or the family.
    pub fn config(&self, vocab_size: usize, end: u32) -> Result<Config> {
        self.check_sizes()?;
        let config = match self.architecture {
            Family::Gpt2 => {
                for (name, given) in [("kv_heads", self.kv_heads.is_some()), ("rope_theta", self.rope_theta.is_some())]
                {
                    ensure!(!given, "`{name}` is of architecture `llama` alone: leave it out for `gpt2`");
                }
                Config::Gpt2(Gpt2Config::of(self, vocab_size, end))
            }
            Family::Llama => Config::Llama(LlamaConfig::of(self, vocab_size, end)),
        };
        config.validate()?;
        Ok(config)
    }

    /// What is known of a model of this shape over a vocabulary.
    pub fn facts(&self, vocabulary: Option<Vocabulary>, ends: Option<Vec<u32>>) -> Facts {
        let size = vocabulary.as_ref().map_or(Bounds::ANY, |vocabulary| vocabulary.size);
        let with = |size: u64| self.config(size.clamp(1, LARGEST) as usize, 0).ok().map(|config| config.facts());
        let Some(least) = with(size.least) else { return Facts::default() };
        let most = size.exact().map_or(u64::MAX, |_| least.parameters.most);
        let parameters = Bounds { most, ..least.parameters };
        Facts { vocabulary, ends, embeddings: size, parameters, ..least }
    }

    /// Sizes whose products, added up over layers, stay within 64 bits or are counted as more than anyone has.
    fn check_sizes(&self) -> Result<()> {
        let sizes = [
            ("layers", Some(self.layers)),
            ("width", Some(self.width)),
            ("heads", self.heads),
            ("positions", self.positions),
            ("inner", self.inner),
            ("kv_heads", self.kv_heads),
        ];
        for (name, size) in sizes {
            let size = size.unwrap_or(0) as u64;
            ensure!(size <= LARGEST, "`{name}` is {size}: expected at most {LARGEST}");
        }
        Ok(())
    }

    fn default_inner(&self) -> usize {
        match self.architecture {
            Family::Gpt2 => 4 * self.width,
            Family::Llama => (8 * self.width).div_ceil(3).next_multiple_of(32),
        }
    }

    fn heads(&self) -> usize {
        self.heads.unwrap_or((self.width / 32).max(2))
    }

    fn positions(&self) -> usize {
        self.positions.unwrap_or(512)
    }
}

/// The largest number that a size can be: far above that of any model, and small enough for its multiples.
const LARGEST: u64 = 1 << 32;

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

/// A Hugging Face `config.json`, by family.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// GPT-2.
    Gpt2(Gpt2Config),
    /// Llama 1, 2 and 3.
    Llama(LlamaConfig),
}

impl Config {
    /// Reads `config.json` from a folder. The families this crate cannot compute are an error.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let json: Json = files::read_json(&path, files::SETTINGS)?;
        ensure!(json.is_object(), "`{}` is not a JSON object", path.display());
        let family = json.get("model_type").and_then(Json::as_str).unwrap_or("gpt2").to_owned();
        refuse_options(&json).with_context(|| format!("`{}` asks for what is not computed", path.display()))?;
        let config = match family.as_str() {
            "gpt2" => from_json(json).map(Config::Gpt2),
            "llama" => LlamaConfig::from_json(json).map(Config::Llama),
            _ => bail!("`{}` describes a model of type `{family}`: expected `gpt2` or `llama`", path.display()),
        };
        let config = config
            .with_context(|| format!("`{}` is not the configuration of a model of type `{family}`", path.display()))?;
        config.validate().with_context(|| format!("`{}` does not add up", path.display()))?;
        Ok(config)
    }

    /// What [`Config::load`] and `transformers` read.
    pub(crate) fn to_json(&self) -> Result<Json> {
        Ok(match self {
            Config::Gpt2(config) => serde_json::to_value(config)?,
            Config::Llama(config) => serde_json::to_value(config)?,
        })
    }

    /// Names the tokens that begin a text and pad, where the tokenizer knows some.
    pub(crate) fn set_roles(&mut self, begin: Option<u32>, pad: Option<u32>) {
        match self {
            Config::Gpt2(config) => {
                config.bos_token_id = begin.or(config.bos_token_id);
                config.pad_token_id = pad.or(config.pad_token_id);
            }
            Config::Llama(config) => {
                config.bos_token_id = begin.or(config.bos_token_id);
                config.pad_token_id = pad.map(i64::from).or(config.pad_token_id);
            }
        }
    }

    /// Rows `V` of the embedding; may be more than the tokenizer has ids.
    pub fn vocab_size(&self) -> usize {
        match self {
            Config::Gpt2(config) => config.vocab_size,
            Config::Llama(config) => config.vocab_size,
        }
    }

    /// Longest sequence in tokens.
    pub fn positions(&self) -> usize {
        match self {
            Config::Gpt2(config) => config.n_positions,
            Config::Llama(config) => config.max_position_embeddings,
        }
    }

    /// Channels `C` of the hidden state.
    pub fn width(&self) -> usize {
        match self {
            Config::Gpt2(config) => config.n_embd,
            Config::Llama(config) => config.hidden_size,
        }
    }

    /// Transformer blocks.
    pub fn layers(&self) -> usize {
        match self {
            Config::Gpt2(config) => config.n_layer,
            Config::Llama(config) => config.num_hidden_layers,
        }
    }

    /// Query heads `H`.
    pub fn heads(&self) -> usize {
        match self {
            Config::Gpt2(config) => config.n_head,
            Config::Llama(config) => config.num_attention_heads,
        }
    }

    /// Channels of the keys of a token, all heads together; its values have as many.
    pub fn kv_width(&self) -> usize {
        match self {
            Config::Gpt2(config) => config.n_embd,
            Config::Llama(config) => config.kv_heads() * config.head_width(),
        }
    }

    /// Whether the output head is the input embedding.
    pub fn tied(&self) -> bool {
        match self {
            Config::Gpt2(config) => config.tie_word_embeddings,
            Config::Llama(config) => config.tie_word_embeddings,
        }
    }

    /// Standard deviation of initial weights.
    pub fn initializer_range(&self) -> f64 {
        match self {
            Config::Gpt2(config) => config.initializer_range,
            Config::Llama(config) => config.initializer_range,
        }
    }

    /// Number of parameters. Its terms are counted without naming each, so that a size nobody could hold is a number, too.
    pub fn parameter_count(&self) -> u64 {
        let count = |layers: usize| {
            let shapes = self.with_layers(layers).parameter_shapes();
            shapes
                .iter()
                .map(|(_, shape)| shape.iter().fold(1, |n: u128, size| n.saturating_mul(*size as u128)))
                .sum::<u128>()
        };
        let (none, one) = (count(0), count(1));
        let all = none.saturating_add((one - none).saturating_mul(self.layers() as u128));
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    fn with_layers(&self, layers: usize) -> Self {
        let mut config = self.clone();
        match &mut config {
            Config::Gpt2(config) => config.n_layer = layers,
            Config::Llama(config) => config.num_hidden_layers = layers,
        }
        config
    }

    /// What follows from it for other stages.
    pub fn facts(&self) -> Facts {
        Facts {
            positions: Some(self.positions() as u64),
            layers: Some(self.layers() as u64),
            width: Some(self.width() as u64),
            embeddings: Bounds::exactly(self.vocab_size() as u64),
            parameters: Bounds::exactly(self.parameter_count()),
            ..Facts::default()
        }
    }

    /// Token that begins a text.
    pub fn begin(&self) -> Option<u32> {
        match self {
            Config::Gpt2(config) => config.bos_token_id,
            Config::Llama(config) => config.bos_token_id,
        }
    }

    /// Lets the output head be a matrix of its own.
    pub(crate) fn untie(&mut self) {
        match self {
            Config::Gpt2(config) => config.tie_word_embeddings = false,
            Config::Llama(config) => config.tie_word_embeddings = false,
        }
    }

    /// Tokens that end a text.
    pub fn ends(&self) -> &[u32] {
        let ends = match self {
            Config::Gpt2(config) => &config.eos_token_id,
            Config::Llama(config) => &config.eos_token_id,
        };
        ends.as_ref().map_or(&[], EndTokens::as_slice)
    }

    /// Name of the input embedding, `[V, C]`.
    pub(crate) fn embedding(&self) -> &'static str {
        match self {
            Config::Gpt2(_) => "transformer.wte.weight",
            Config::Llama(_) => "model.embed_tokens.weight",
        }
    }

    /// Before the names of all parameters but the head's.
    pub(crate) fn prefix(&self) -> &'static str {
        match self {
            Config::Gpt2(_) => "transformer.",
            Config::Llama(_) => "model.",
        }
    }

    /// Whether a parameter of that name ends a residual branch.
    pub(crate) fn ends_branch(&self, name: &str) -> bool {
        match self {
            Config::Gpt2(_) => name.ends_with("c_proj.weight"),
            Config::Llama(_) => name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight"),
        }
    }

    /// Names and shapes of all parameters, in the fixed order in which the model keeps them.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            Config::Gpt2(config) => config.parameter_shapes(),
            Config::Llama(config) => config.parameter_shapes(),
        }
    }

    fn validate(&self) -> Result<()> {
        match self {
            Config::Gpt2(config) => config.validate(),
            Config::Llama(config) => config.validate(),
        }
    }
}

/// Options that change what `transformers` computes and are not known here, each with the values that change nothing.
/// Options that neither knows are nobody's.
fn refuse_options(config: &Json) -> Result<()> {
    let off = [Json::Null, json!(false), json!({}), json!([])];
    for option in
        ["quantization_config", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads"]
    {
        let value = config.get(option).unwrap_or(&Json::Null);
        ensure!(off.contains(value), "`{option}` is {}", short(value));
    }
    let turned = config.get("partial_rotary_factor").unwrap_or(&Json::Null);
    ensure!(
        turned.is_null() || turned.as_f64() == Some(1.0),
        "`partial_rotary_factor` is {}: expected 1",
        short(turned)
    );
    Ok(())
}

fn short(value: &Json) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 { text } else { format!("{}...", text.chars().take(80).collect::<String>()) }
}

/// A configuration from its JSON. Errors name the field.
fn from_json<T: DeserializeOwned>(json: Json) -> Result<T> {
    serde_path_to_error::deserialize(json).map_err(|error| {
        let path = error.path().to_string();
        let what = error.into_inner();
        if path == "." { anyhow!("{what}") } else { anyhow!("`{path}`: {what}") }
    })
}

fn at_least_one(sizes: &[(&str, usize)]) -> Result<()> {
    for (name, size) in sizes {
        ensure!(*size > 0, "{name} is 0: expected at least 1");
    }
    Ok(())
}

fn not_negative(numbers: &[(&str, f64)]) -> Result<()> {
    for (name, number) in numbers {
        ensure!(number.is_finite() && *number >= 0.0, "{name} is {number}: expected at least 0");
    }
    Ok(())
}

fn multiple(name: &str, size: usize, heads: usize) -> Result<()> {
    ensure!(size.is_multiple_of(heads), "{name} {size} is not a multiple of {heads} heads: change one of them");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn architecture(width: usize) -> Architecture {
        Architecture::new(Family::Gpt2, 4, width)
    }

    fn llama(text: &str) -> Result<LlamaConfig> {
        let json = r#"{"model_type": "llama", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 4, MORE}"#;
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("config.json"), json.replace("MORE", text))?;
        match Config::load(folder.path())? {
            Config::Llama(config) => Ok(config),
            Config::Gpt2(_) => bail!("a Llama was read as a GPT-2"),
        }
    }

    #[test]
    fn heads_follow_from_the_width() {
        for (width, heads) in [(32, 2), (64, 2), (96, 3), (192, 6), (768, 24)] {
            assert_eq!(architecture(width).config(100, 0).unwrap().heads(), heads, "{width}");
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
        assert!(error.to_string().contains("`opt`: expected `gpt2` or `llama`"), "{error}");
    }

    #[test]
    fn the_shape_of_a_llama_follows_from_its_width() {
        let shapes = |architecture: Architecture| architecture.config(100, 0).unwrap().parameter_shapes();
        let small = Architecture { kv_heads: Some(1), ..Architecture::new(Family::Llama, 1, 64) };
        let shapes_of: std::collections::HashMap<_, _> = shapes(small.clone()).into_iter().collect();
        assert_eq!(shapes_of["model.layers.0.mlp.gate_proj.weight"], [192, 64]);
        assert_eq!(shapes_of["model.layers.0.self_attn.k_proj.weight"], [32, 64]);
        assert!(!shapes_of.contains_key("lm_head.weight"));
        assert_eq!(shapes(Architecture { tied: Some(false), ..small }).last().unwrap().0, "lm_head.weight");
    }

    #[test]
    fn heads_that_cannot_share_and_fields_of_another_family_are_errors() {
        let error = |architecture: Architecture| architecture.config(100, 0).unwrap_err().to_string();
        let llama = Architecture::new(Family::Llama, 1, 64);
        let text = error(Architecture { heads: Some(4), kv_heads: Some(3), ..llama.clone() });
        assert_eq!(text, "4 heads cannot share 3 heads of keys and values evenly: change one of them");
        assert!(error(Architecture { heads: Some(64), ..llama }).contains("a head has 1 channels"));
        let text = error(Architecture { kv_heads: Some(1), ..architecture(64) });
        assert_eq!(text, "`kv_heads` is of architecture `llama` alone: leave it out for `gpt2`");
    }

    #[test]
    fn old_and_new_forms_of_rotary_scaling_are_the_same() {
        let llama3 =
            r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64"#;
        let forms = [
            format!(r#""rope_theta": 5e5, "rope_scaling": {{"rope_type": "llama3", {llama3}}}"#),
            format!(r#""rope_theta": 5e5, "rope_scaling": {{"type": "llama3", {llama3}}}"#),
            format!(r#""rope_parameters": {{"rope_type": "llama3", "rope_theta": 5e5, {llama3}}}"#),
        ];
        let [first, rest @ ..] = forms.map(|form| llama(&form).unwrap());
        assert!(matches!(first.rope_scaling, Some(RopeScaling::Llama3 { original_max_position_embeddings: 64, .. })));
        assert_eq!(first.rope_theta, 5e5);
        assert!(rest.iter().all(|config| *config == first));
        for plain in [r#""rope_scaling": null"#, r#""rope_parameters": {"rope_type": "default", "rope_theta": 1e4}"#] {
            let config = llama(plain).unwrap();
            assert_eq!((config.rope_theta, config.rope_scaling), (1e4, None));
        }
        let error = llama(r#""rope_scaling": {"rope_type": "yarn", "factor": 2.0}"#).unwrap_err();
        assert!(format!("{error:#}").contains("rotary positions of type `yarn`"), "{error:#}");
    }

    #[test]
    fn linear_scaling_stretches_every_angle() {
        let plain = llama(r#""rope_theta": 100.0"#).unwrap().rotary_frequencies();
        assert_eq!(plain, [1.0, 0.1]);
        let scaled = llama(r#""rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4}"#).unwrap();
        assert_eq!(scaled.rotary_frequencies(), [0.25, 0.025]);
    }

    #[test]
    fn published_oddities_of_token_ids_are_read() {
        let config = llama(r#""eos_token_id": [7, 8], "pad_token_id": -1"#).unwrap();
        assert_eq!(Config::Llama(config).ends(), [7, 8]);
        assert_eq!(Config::Llama(llama(r#""eos_token_id": 5"#).unwrap()).ends(), [5]);
        assert!(Config::Llama(llama(r#""eos_token_id": null"#).unwrap()).ends().is_empty());
    }
}
