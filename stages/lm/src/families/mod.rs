//! Families of models: of each the configuration, the names of its parameters, and its forward pass, in a file of its own.
//!
//! A family is a [`Decoder`] and a line in the list of [`families`].

mod architecture;
mod check;
mod ends;
mod llama_like;
pub(crate) mod rope;

use std::fmt::Debug;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::{Device, Result as TensorResult, Tensor};
use contract::{Bounds, Facts, Result, files};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

pub use self::architecture::Architecture;
pub use self::ends::EndTokens;
pub use self::llama_like::LayerType;
pub use self::rope::RopeScaling;
use crate::ops::rotary::Angles;
use crate::ops::{Layer, LayerNorm, Layout, Ops, RmsNorm};
use crate::weights::Weight;

/// Declares the families: a module, the name of the family, its configuration, and its paper.
macro_rules! families {
    ($($(#[$doc:meta])* $module:ident: $name:ident($config:ident),)*) => {
        $(mod $module;)*
        $(pub use self::$module::$config;)*

        /// Families of models this crate can compute.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum Family {
            $($(#[$doc])* $name,)*
        }

        impl Family {
            /// All of them.
            pub const ALL: &[Family] = &[$(Family::$name),*];

            /// Its name in pipelines and in `config.json`.
            pub fn name(self) -> &'static str {
                match self { $(Family::$name => $config::MODEL_TYPE,)* }
            }

            /// The options of an [`Architecture`] that it takes beside those that all take.
            fn options(self) -> &'static [&'static str] {
                match self { $(Family::$name => $config::OPTIONS,)* }
            }

            fn default_inner(self, width: usize) -> usize {
                match self { $(Family::$name => $config::default_inner(width),)* }
            }

            fn config(self, architecture: &Architecture, vocab_size: usize, end: u32) -> Config {
                match self { $(Family::$name => Config::$name($config::of(architecture, vocab_size, end)),)* }
            }

            fn read(self, json: Json) -> Result<Config> {
                Ok(match self { $(Family::$name => Config::$name($config::from_json(json)?),)* })
            }
        }

        /// A Hugging Face `config.json`, by family.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Config {
            $($(#[$doc])* $name($config),)*
        }

        impl Config {
            /// Whose it is.
            pub fn family(&self) -> Family {
                match self { $(Config::$name(_) => Family::$name,)* }
            }
        }

        /// Runs the same on the configuration of any family.
        macro_rules! of_any {
            ($of:expr, $it:ident => $run:expr) => {
                match $of { $(Config::$name($it) => $run,)* }
            };
        }
    };
}

families! {
    /// Radford et al., "Language models are unsupervised multitask learners", 2019.
    gpt2: Gpt2(Gpt2Config),
    /// Black et al., "GPT-NeoX-20B: An open-source autoregressive language model", 2022, and Pythia.
    gpt_neox: GptNeox(GptNeoxConfig),
    /// Touvron et al., "LLaMA: Open and efficient foundation language models", 2023, with what Llama 2 and 3 added.
    llama: Llama(LlamaConfig),
    /// Jiang et al., "Mistral 7B", 2023: a Llama with a window of attention.
    mistral: Mistral(MistralConfig),
    /// Zhang et al., "OPT: Open pre-trained transformer language models", 2022.
    opt: Opt(OptConfig),
    /// Yang et al., "Qwen2 technical report", 2024, and Qwen2.5: a Llama with biases.
    qwen2: Qwen2(Qwen2Config),
    /// Yang et al., "Qwen3 technical report", 2025: a Llama that normalises heads.
    qwen3: Qwen3(Qwen3Config),
}

impl Family {
    /// Whether it takes an option that not all do.
    fn takes(self, option: &str) -> bool {
        self.options().contains(&option)
    }

    /// The names of some families, for people.
    fn named(which: impl Fn(Family) -> bool) -> Vec<String> {
        Family::ALL.iter().filter(|family| which(**family)).map(|family| format!("`{}`", family.name())).collect()
    }
}

/// The part of a [`Decoder`] that is in the fields that most families have in common.
macro_rules! fields_of_transformers {
    () => {
        fn layers_mut(&mut self) -> &mut usize {
            &mut self.num_hidden_layers
        }

        fn begin_and_ends(&self) -> (Option<u32>, Option<&EndTokens>) {
            (self.bos_token_id, self.eos_token_id.as_ref())
        }

        fn set_roles(&mut self, begin: Option<u32>, pad: Option<u32>) {
            self.bos_token_id = begin.or(self.bos_token_id);
            self.pad_token_id = pad.map(i64::from).or(self.pad_token_id);
        }

        fn untie(&mut self) {
            self.tie_word_embeddings = false;
        }
    };
}
use fields_of_transformers;

/// What a family is. It is the type of its `config.json`.
trait Decoder: Clone + Debug + PartialEq + Serialize + DeserializeOwned {
    /// `model_type` in `config.json`.
    const MODEL_TYPE: &str;

    /// The options of an [`Architecture`] that it takes beside those that all take.
    const OPTIONS: &[&str];

    /// What its parameters are called.
    const NAMES: Names;

    /// Channels inside the feed-forward layer of a model of which nothing but the width is said.
    fn default_inner(width: usize) -> usize;

    /// The configuration that an architecture asks for.
    fn of(architecture: &Architecture, vocab_size: usize, end: u32) -> Self;

    /// Reads the parsed `config.json`, in any form that `transformers` reads.
    fn from_json(json: Json) -> Result<Self> {
        from_json(json)
    }

    /// Errors when its numbers do not fit one another.
    fn validate(&self) -> Result<()>;

    /// Its sizes.
    fn sizes(&self) -> Sizes;

    /// The number of its layers, to be changed.
    fn layers_mut(&mut self) -> &mut usize;

    /// Changes it to that of a model of these of its layers, in rising order.
    fn keep_layers(&mut self, layers: &[usize]) {
        *self.layers_mut() = layers.len();
    }

    /// Tokens that begin a text, and that end one.
    fn begin_and_ends(&self) -> (Option<u32>, Option<&EndTokens>);

    /// Names the tokens that begin a text and pad, where there are some.
    fn set_roles(&mut self, begin: Option<u32>, pad: Option<u32>);

    /// Lets the output head be a matrix of its own.
    fn untie(&mut self);

    /// Names and shapes of all parameters but the head's, in the fixed order in which a model keeps them.
    fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)>;

    /// Token ids to final hidden states, by the operations of `ops`.
    fn forward<O: Ops>(&self, weights: &Weights<'_>, ops: &mut O, prompt: Option<&Tensor>) -> TensorResult<O::Array>;
}

/// What the parameters of a family are called.
struct Names {
    /// The input embedding, `[V, C]`.
    embedding: &'static str,
    /// The output head, `[V, C]`, where it is not the input embedding.
    head: &'static str,
    /// Stands before the names of all parameters but the head's.
    prefix: &'static str,
    /// How the names of matrices end that end a residual branch.
    branch_ends: &'static [&'static str],
    /// The tables of vectors beside the input embedding. All other matrices are those of linear layers.
    tables: &'static [&'static str],
    /// How the matrices of its linear layers lie in memory, but for the output head, which is `OutIn`.
    layout: Layout,
}

/// A linear layer of a model.
#[derive(PartialEq)]
pub(crate) struct LinearLayer {
    /// Its name, the part of its parameters' names before `.weight`.
    pub(crate) name: String,
    /// Channels that go in.
    pub(crate) inputs: usize,
    /// Channels that come out.
    pub(crate) outputs: usize,
}

/// Sizes of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// Rows `V` of the embedding; may be more than the tokenizer has ids.
    pub vocabulary: usize,
    /// Longest sequence in tokens.
    pub positions: usize,
    /// Channels `C` of the vectors that go in and of the hidden states that come out: of input embedding, soft prompts and
    /// output head. Some families are wider or narrower between.
    pub width: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads `H`.
    pub heads: usize,
    /// Channels of the keys of a token, all heads together; its values have as many.
    pub kv_width: usize,
    /// Whether the output head is the input embedding.
    pub tied: bool,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
}

/// The parameters of a model by their names, and what else a forward pass needs.
pub(crate) struct Weights<'a> {
    pub(crate) parameters: &'a IndexMap<String, Weight>,
    /// How the matrices of linear layers lie.
    pub(crate) layout: Layout,
    pub(crate) angles: &'a Angles,
    pub(crate) device: &'a Device,
    /// Rows stand at positions below this.
    pub(crate) positions: usize,
}

impl Weights<'_> {
    /// A matrix or vector.
    fn weight(&self, name: &str) -> &Weight {
        self.parameters.get(name).expect("a model has all its parameters")
    }

    fn vector(&self, name: &str) -> &Tensor {
        self.weight(name).dense().expect("matrices alone are kept encoded")
    }

    /// A table that is read as tensors are.
    fn table(&self, name: &str) -> TensorResult<&Tensor> {
        self.weight(name).tensor()
    }

    fn norm(&self, name: &str, eps: f64) -> LayerNorm {
        let part = |part: &str| self.vector(&format!("{name}.{part}")).clone();
        LayerNorm { weight: part("weight"), bias: part("bias"), eps: eps as f32 }
    }

    fn rms_norm(&self, name: &str, eps: f64) -> RmsNorm {
        RmsNorm { weight: self.vector(&format!("{name}.weight")).clone(), eps: eps as f32 }
    }

    /// The angles of rotary positions: see [`Angles::table`].
    fn angles(&self, frequencies: impl FnOnce() -> Vec<f32>) -> TensorResult<Tensor> {
        self.angles.table(frequencies, self.positions, self.device)
    }

    /// A linear layer: `NAME.weight`, and `NAME.bias` where there is one.
    fn layer(&self, name: &str) -> Layer {
        let name_of_bias = format!("{name}.bias");
        let bias = self.parameters.contains_key(&name_of_bias).then(|| self.vector(&name_of_bias).clone());
        Layer { weight: self.weight(&format!("{name}.weight")).clone(), bias, layout: self.layout }
    }
}

/// The name of the layer that a matrix is of.
pub(crate) fn layer_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

impl Config {
    /// Reads `config.json` from a folder. The families this crate cannot compute are an error.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        Config::read(files::read_json(&path, files::SETTINGS)?, &path)
    }

    /// The configuration in a parsed `config.json`, which came from `path`.
    pub(crate) fn read(json: Json, path: &Path) -> Result<Self> {
        ensure!(json.is_object(), "`{}` is not a JSON object", path.display());
        let name = json.get("model_type").and_then(Json::as_str).unwrap_or(Gpt2Config::MODEL_TYPE).to_owned();
        check::refuse_options(&json).with_context(|| format!("`{}` asks for what is not computed", path.display()))?;
        let Some(family) = Family::ALL.iter().find(|family| family.name() == name) else {
            let known = Family::named(|_| true).join(", ");
            bail!("`{}` describes a model of type `{name}`: expected one of {known}", path.display());
        };
        let config = family
            .read(json)
            .with_context(|| format!("`{}` is not the configuration of a model of type `{name}`", path.display()))?;
        config.validate().with_context(|| format!("`{}` does not add up", path.display()))?;
        Ok(config)
    }

    /// What [`Config::load`] and `transformers` read.
    pub(crate) fn to_json(&self) -> Result<Json> {
        Ok(of_any!(self, config => serde_json::to_value(config))?)
    }

    fn validate(&self) -> Result<()> {
        of_any!(self, config => config.validate())
    }

    /// Sizes and options that all families have.
    pub fn sizes(&self) -> Sizes {
        of_any!(self, config => config.sizes())
    }

    /// Heads of keys and values.
    pub(crate) fn kv_heads(&self) -> usize {
        let fewer = self.to_json().ok().and_then(|json| json["num_key_value_heads"].as_u64());
        fewer.map_or(self.sizes().heads, |heads| heads as usize)
    }

    /// Rows `V` of the embedding; may be more than the tokenizer has ids.
    pub fn vocab_size(&self) -> usize {
        self.sizes().vocabulary
    }

    /// Longest sequence in tokens.
    pub fn positions(&self) -> usize {
        self.sizes().positions
    }

    /// Channels `C` of the vectors that go in and of the hidden states that come out.
    pub fn width(&self) -> usize {
        self.sizes().width
    }

    /// Transformer blocks.
    pub fn layers(&self) -> usize {
        self.sizes().layers
    }

    /// Names the tokens that begin a text and pad, where the tokenizer knows some.
    pub(crate) fn set_roles(&mut self, begin: Option<u32>, pad: Option<u32>) {
        of_any!(self, config => config.set_roles(begin, pad));
    }

    /// Lets the output head be a matrix of its own.
    pub(crate) fn untie(&mut self) {
        of_any!(self, config => config.untie());
    }

    /// Token that begins a text.
    pub fn begin(&self) -> Option<u32> {
        of_any!(self, config => config.begin_and_ends().0)
    }

    /// Tokens that end a text.
    pub fn ends(&self) -> &[u32] {
        of_any!(self, config => config.begin_and_ends().1).map_or(&[], EndTokens::as_slice)
    }

    fn names(&self) -> Names {
        fn of<D: Decoder>(_: &D) -> Names {
            D::NAMES
        }
        of_any!(self, config => of(config))
    }

    /// Name of the input embedding, `[V, C]`.
    pub(crate) fn embedding(&self) -> &'static str {
        self.names().embedding
    }

    /// Name of the output head, where it is not the input embedding.
    pub(crate) fn head(&self) -> &'static str {
        self.names().head
    }

    /// Before the names of all parameters but the head's.
    pub(crate) fn prefix(&self) -> &'static str {
        self.names().prefix
    }

    /// How the matrices of linear layers lie in memory, but for the output head.
    pub(crate) fn layout(&self) -> Layout {
        self.names().layout
    }

    /// Whether a parameter of that name is a table of vectors beside the input embedding.
    pub(crate) fn is_table(&self, name: &str) -> bool {
        self.names().tables.contains(&name)
    }

    /// All linear layers, the output head last.
    pub(crate) fn linear_layers(&self) -> Vec<LinearLayer> {
        let Names { embedding, head, tables, layout, .. } = self.names();
        let Sizes { vocabulary, width, .. } = self.sizes();
        let mut layers = Vec::new();
        for (name, shape) in of_any!(self, config => config.parameter_shapes()) {
            if let [rows, columns] = shape[..]
                && name != embedding
                && !tables.contains(&name.as_str())
            {
                let [outputs, inputs] = if layout == Layout::InOut { [columns, rows] } else { [rows, columns] };
                layers.push(LinearLayer { name: layer_of(&name).to_owned(), inputs, outputs });
            }
        }
        layers.push(LinearLayer { name: layer_of(head).to_owned(), inputs: width, outputs: vocabulary });
        layers
    }

    /// Whether a parameter of that name ends a residual branch.
    pub(crate) fn ends_branch(&self, name: &str) -> bool {
        self.names().branch_ends.iter().any(|end| name.ends_with(end))
    }

    /// Names and shapes of all parameters, in the fixed order in which the model keeps them.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let Sizes { vocabulary, width, tied, .. } = self.sizes();
        let mut shapes = of_any!(self, config => config.parameter_shapes());
        if !tied {
            shapes.push((self.head().to_owned(), vec![vocabulary, width]));
        }
        shapes
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

    /// The same of some of its layers alone.
    pub(crate) fn of_layers(&self, layers: &[usize]) -> Self {
        let mut config = self.clone();
        of_any!(&mut config, config => config.keep_layers(layers));
        config
    }

    fn with_layers(&self, layers: usize) -> Self {
        let mut config = self.clone();
        of_any!(&mut config, config => *config.layers_mut() = layers);
        config
    }

    /// The same with other fields.
    #[cfg(test)]
    pub(crate) fn with(&self, fields: &Json) -> Self {
        let mut json = self.to_json().expect("a configuration is JSON");
        let fields = fields.as_object().expect("fields");
        fields.iter().for_each(|(key, value)| json[key] = value.clone());
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("config.json"), json.to_string()).expect("a file");
        Config::load(folder.path()).expect("a configuration that is computed")
    }

    /// What follows from it for other stages.
    pub fn facts(&self) -> Facts {
        Facts {
            positions: Some(self.positions() as u64),
            family: Some(self.family().name().to_owned()),
            layers: Some(self.layers() as u64),
            width: Some(self.width() as u64),
            embeddings: Bounds::exactly(self.vocab_size() as u64),
            parameters: Bounds::exactly(self.parameter_count()),
            ..Facts::default()
        }
    }

    /// Final hidden states by the operations of `ops`.
    pub(crate) fn forward<O: Ops>(
        &self,
        weights: &Weights<'_>,
        ops: &mut O,
        prompt: Option<&Tensor>,
    ) -> TensorResult<O::Array> {
        of_any!(self, config => config.forward(weights, ops, prompt))
    }
}

/// A configuration from its JSON. Errors name the field.
fn from_json<T: DeserializeOwned>(json: Json) -> Result<T> {
    serde_path_to_error::deserialize(json).map_err(|error| {
        let path = error.path().to_string();
        let what = error.into_inner();
        if path == "." { anyhow!("{what}") } else { anyhow!("`{path}`: {what}") }
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

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
            other => bail!("a Llama was read as {other:?}"),
        }
    }

    #[test]
    fn heads_follow_from_the_width() {
        for (width, heads) in [(32, 2), (64, 2), (96, 3), (192, 6), (768, 24)] {
            assert_eq!(architecture(width).config(100, 0).unwrap().sizes().heads, heads, "{width}");
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
        fs::write(folder.path().join("config.json"), r#"{"model_type": "bert"}"#).unwrap();
        let error = Config::load(folder.path()).unwrap_err();
        assert!(error.to_string().contains("`bert`: expected one of `gpt2`, `gpt_neox`, `llama`, "), "{error}");
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
        let takers = "`llama`, `mistral`, `qwen2`, `qwen3`";
        assert_eq!(text, format!("`kv_heads` is of architecture {takers} alone: leave it out for `gpt2`"));
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
        let plain = llama(r#""rope_theta": 100.0"#).unwrap().decoder().frequencies();
        assert_eq!(plain, [1.0, 0.1]);
        let scaled = llama(r#""rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4}"#).unwrap();
        assert_eq!(scaled.decoder().frequencies(), [0.25, 0.025]);
    }

    #[test]
    fn the_name_of_a_family_is_that_of_its_configurations() {
        for family in Family::ALL {
            assert_eq!(serde_json::to_value(family).unwrap(), family.name());
            let made = Architecture::new(*family, 2, 64).config(100, 0).unwrap();
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("config.json"), made.to_json().unwrap().to_string()).unwrap();
            assert_eq!(Config::load(folder.path()).unwrap(), made, "{family:?}");
        }
    }

    /// What is said of a configuration that is made for `family` and then changed.
    fn changed(family: Family, key: &str, value: Json) -> Result<Config> {
        let mut json = Architecture::new(family, 2, 64).config(100, 0)?.to_json()?;
        json[key] = value;
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("config.json"), json.to_string())?;
        Config::load(folder.path())
    }

    #[test]
    fn options_that_are_not_computed_are_refused() {
        use Family::*;
        for (family, key, value, expected) in [
            (Llama, "num_attention_heads", json!(0), "heads is 0: expected at least 1"),
            (Opt, "layer_norm_elementwise_affine", json!(false), "norms with weights and biases"),
            (Opt, "layerdrop", json!(0.1), "`layerdrop` is 0.1: expected 0"),
            (Opt, "activation_function", json!("tanh"), "`activation_function`"),
            (Mistral, "sliding_window", json!(0), "`sliding_window` is 0"),
            (Qwen2, "layer_types", json!(["full_attention"]), "`layer_types` has 1 entries for 2 layers"),
            (Qwen2, "layer_types", json!(["full_attention", "sliding_attention"]), "no `sliding_window` is in use"),
            (Qwen3, "layer_types", json!(["full_attention", "chunked_attention"]), "`layer_types[1]`"),
            (Qwen3, "head_dim", json!(7), "a head has 7 channels"),
            (Qwen3, "rope_parameters", json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` is 0.5"),
            (Mistral, "rope_parameters", json!({"rope_type": "yarn"}), "rotary positions of type `yarn`"),
            (GptNeox, "rotary_pct", json!(0.1), "turns 3 of the 32 channels of a head"),
            (GptNeox, "rotary_pct", json!(1.5), "`rotary_pct` is 1.5"),
            (GptNeox, "rope_parameters", json!({"partial_rotary_factor": 0.05}), "turns 1 of the 32"),
        ] {
            let error = format!("{:#}", changed(family, key, value).expect_err(key));
            assert!(error.contains(expected), "{family:?}, {key}: {error}");
        }
        // `transformers` would take a width of heads that is null as it is.
        assert_eq!(Architecture::new(Qwen2, 2, 64).config(100, 0).unwrap().to_json().unwrap().get("head_dim"), None);
        let both = json!({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5});
        let Ok(Config::GptNeox(neox)) = changed(GptNeox, "rope_parameters", both) else { panic!("not a GPT-NeoX") };
        assert_eq!((neox.rotary_pct, neox.rotary_emb_base, neox.turned()), (0.5, 500.0, 16));
        assert_eq!(neox.rope_scaling, Some(RopeScaling::Dynamic { factor: 2.0 }));
    }

    #[test]
    fn published_oddities_of_token_ids_are_read() {
        let config = llama(r#""eos_token_id": [7, 8], "pad_token_id": -1"#).unwrap();
        assert_eq!(Config::Llama(config).ends(), [7, 8]);
        assert_eq!(Config::Llama(llama(r#""eos_token_id": 5"#).unwrap()).ends(), [5]);
        assert!(Config::Llama(llama(r#""eos_token_id": null"#).unwrap()).ends().is_empty());
    }
}
