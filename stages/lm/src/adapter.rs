//! Low-rank adapters (LoRA): what is trained of a model whose own weights stay as they are. On disk, a PEFT folder.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use candle_core::{Device, Tensor};
use contract::random::{philox, purpose, uniform};
use contract::{PortType, Result, Value, files};
use indexmap::IndexMap;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::families::{Config, LinearLayer};
use crate::files::tensors::{read_tensors, write_json, write_tensors};
use crate::finite::first_not_finite;
use crate::weights::low_rank::LowRank;

/// What an adapter is made of: on each of some linear layers `y = W x + scale B A x`, with `A` and `B` alone trained (Hu et
/// al., "LoRA: Low-rank adaptation of large language models", 2021).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rank `r`: rows of `A` and columns of `B`. 8 unless given, enough in the paper.
    #[serde(default = "default_rank")]
    #[schemars(range(min = 1, max = contract::limits::WIDTH))]
    pub rank: usize,
    /// `scale` is `alpha / rank`; 16 unless given.
    #[serde(default = "default_alpha")]
    #[schemars(range(min = 0.0, max = contract::limits::WEIGHT))]
    pub alpha: f64,
    /// Probability with which `A` does not see an element of a layer's input, in training; apart from the model's own dropout.
    #[serde(default)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub dropout: f64,
    /// The linear layers that are adapted: their names in the checkpoint or how those end, as `q_proj` or `mlp.down_proj`; the
    /// output head's too (`lm_head`). All but the output head unless given.
    #[serde(default)]
    pub targets: Option<Vec<String>>,
    /// Biases that are trained, too.
    #[serde(default)]
    pub bias: Biases,
    /// Whether `scale` is `alpha / sqrt(rank)`, so that a higher rank does not learn more slowly (Kalajdzievski, "A rank
    /// stabilization scaling factor for fine-tuning with LoRA", 2023).
    #[serde(default)]
    pub rslora: bool,
}

/// Biases of the model that are trained beside an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Biases {
    /// None.
    #[default]
    None,
    /// All of the model, those of norms included.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f64 {
    16.0
}

impl Lora {
    /// What `B A x` counts.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Whether a linear layer is adapted, the last of a model being its output head.
    fn adapts(&self, layer: &str, is_head: bool) -> bool {
        match &self.targets {
            None => !is_head,
            Some(targets) => targets.iter().any(|target| ends_with(layer, target)),
        }
    }

    /// The layers that are adapted, each with its number among all.
    ///
    /// Errors when a target is none of the model's layers.
    pub(crate) fn layers(&self, config: &Config) -> Result<Vec<(usize, LinearLayer)>> {
        let layers = config.linear_layers();
        let head = layers.len() - 1;
        for target in self.targets.iter().flatten() {
            ensure!(
                layers.iter().any(|layer| ends_with(&layer.name, target)),
                "`targets` names `{target}`, which is no linear layer of the model: it has {}",
                kinds(&layers)
            );
        }
        Ok(layers.into_iter().enumerate().filter(|(i, layer)| self.adapts(&layer.name, *i == head)).collect())
    }
}

/// Whether the name of a layer is `target`, or ends with it after a dot: how PEFT reads `target_modules`.
fn ends_with(layer: &str, target: &str) -> bool {
    layer.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The last parts of the names of layers, each once.
fn last_parts(layers: &[LinearLayer]) -> Vec<&str> {
    let mut parts: Vec<&str> = Vec::new();
    for layer in layers {
        let part = layer.name.rsplit('.').next().unwrap_or(&layer.name);
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    parts
}

fn kinds(layers: &[LinearLayer]) -> String {
    last_parts(layers).iter().map(|part| format!("`{part}`")).collect::<Vec<_>>().join(", ")
}

/// What was trained of a model, without the model.
#[derive(Clone)]
pub struct Adapter {
    /// What it is made of.
    pub lora: Lora,
    /// `LAYER.lora_A.weight` `[r, in]`, `LAYER.lora_B.weight` `[out, r]` and biases, by the names of the model's layers and
    /// parameters.
    pub tensors: IndexMap<String, Tensor>,
    /// Whether PEFT is to take its layers for those of GPT-2, whose matrices lie the other way round.
    fan_in_fan_out: bool,
}

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The folder of a model's adapter, in the model's.
pub const ADAPTER: &str = "adapter";

/// The files of an adapter's folder.
pub const ADAPTER_FILES: [&str; 2] = [CONFIG, TENSORS];
/// What PEFT puts before the names of a model's parameters.
const PREFIX: &str = "base_model.model.";
/// What PEFT calls an adapted layer's own bias.
const BASE_BIAS: &str = ".base_layer.bias";
/// The name of `A`, behind that of a layer.
pub(crate) const A: &str = ".lora_A.weight";
/// The name of `B`, behind that of a layer.
pub(crate) const B: &str = ".lora_B.weight";

/// Dropout sites of adapters are behind all that a model has.
const SITES: u32 = 1 << 31;

impl Adapter {
    pub(crate) fn of(lora: Lora, tensors: IndexMap<String, Tensor>, config: &Config) -> Self {
        Adapter { lora, tensors, fan_in_fan_out: config.layout() == crate::ops::Layout::InOut }
    }

    /// A new adapter, which changes nothing yet: `A` is uniform within `1 / sqrt(in)`, as in PEFT, and `B` is zero. Each
    /// number depends on the seed, its layer's number and its place alone.
    ///
    /// Errors when a target is none of the model's layers.
    pub(crate) fn new(lora: &Lora, config: &Config, seed: u64, device: &Device) -> Result<Self> {
        let mut tensors = IndexMap::new();
        for (index, LinearLayer { name, inputs, outputs }) in lora.layers(config)? {
            let mut values = vec![0.0; lora.rank * inputs];
            let bound = 1.0 / (inputs as f32).sqrt();
            values.par_chunks_mut(4).enumerate().for_each(|(i, out)| {
                let words = philox(seed, [i as u32, 0, index as u32, purpose::LORA]);
                out.iter_mut().zip(words).for_each(|(out, word)| *out = bound * (2.0 * uniform(word) - 1.0));
            });
            tensors.insert(format!("{name}{A}"), Tensor::from_vec(values, (lora.rank, inputs), device)?);
            let zeros = Tensor::zeros((outputs, lora.rank), candle_core::DType::F32, device)?;
            tensors.insert(format!("{name}{B}"), zeros);
        }
        Ok(Adapter::of(lora.clone(), tensors, config))
    }

    /// What lies on the layers of a model, by their names.
    ///
    /// Errors when the two do not fit.
    pub(crate) fn parts(&self, config: &Config) -> Result<IndexMap<String, LowRank>> {
        let mut parts = IndexMap::new();
        for (index, LinearLayer { name, inputs, outputs }) in config.linear_layers().into_iter().enumerate() {
            let [a, b] = [A, B].map(|part| self.tensors.get(&format!("{name}{part}")));
            let (a, b) = match (a, b) {
                (None, None) => continue,
                (Some(a), Some(b)) => (a.clone(), b.clone()),
                _ => bail!("of the adapter's matrices for `{name}` one is missing"),
            };
            let rank = self.lora.rank;
            for (part, tensor, expected) in [(A, &a, [rank, inputs]), (B, &b, [outputs, rank])] {
                ensure!(
                    tensor.dims() == expected,
                    "the adapter's `{name}{part}` has shape {:?}, and the model needs {expected:?}: it was made for another model",
                    tensor.dims()
                );
            }
            let (scale, dropout) = (self.lora.scale(), self.lora.dropout as f32);
            parts.insert(name, LowRank { a, b, scale, dropout, site: SITES + index as u32 });
        }
        Ok(parts)
    }

    /// Reads a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// Errors name the file, and what of it is not computed here.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let path = folder.join(CONFIG);
        let config: Json = files::read_json(&path, files::SETTINGS)?;
        let Written { r, lora_alpha, lora_dropout, bias, use_rslora, fan_in_fan_out } = Written::read(&config)
            .with_context(|| format!("`{}` is not that of a LoRA adapter that is computed here", path.display()))?;
        let file = folder.join(TENSORS);
        let mut tensors = IndexMap::new();
        for (name, tensor) in read_tensors(&file, device)?.0 {
            let Some(own) = name.strip_prefix(PREFIX) else {
                bail!("`{}` has a tensor `{name}`: expected names that begin with `{PREFIX}`", file.display());
            };
            // The embedding as it was: PEFT adds it where the head is adapted.
            if !own.ends_with(".base_layer.weight") {
                tensors.insert(own.replace(BASE_BIAS, ".bias"), tensor);
            }
        }
        ensure!(!tensors.is_empty(), "`{}` holds no tensor", file.display());
        let layers = tensors.keys().filter_map(|name| name.strip_suffix(A)).map(str::to_owned).collect();
        let targets = Some(layers);
        let lora =
            Lora { rank: r, alpha: lora_alpha, dropout: lora_dropout, targets, bias: bias.into(), rslora: use_rslora };
        Ok(Adapter { lora, tensors, fan_in_fan_out })
    }

    /// Errors where it is no adapter for a model of that shape, or one of its numbers is not finite.
    pub fn check(&self, config: &Config) -> Result<()> {
        self.parts(config)?;
        self.check_values()
    }

    /// Errors where one of its numbers is not finite: it names the tensor.
    pub fn check_values(&self) -> Result<()> {
        for (name, tensor) in &self.tensors {
            if let Some(found) = first_not_finite(tensor)? {
                bail!("the adapter's `{name}` holds {found}: get it again");
            }
        }
        Ok(())
    }

    /// The names of the adapted layers.
    fn adapted(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().filter_map(|name| name.strip_suffix(A))
    }
}

/// What is read of PEFT's `adapter_config.json`.
#[derive(Deserialize)]
struct Written {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    bias: WrittenBias,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WrittenBias {
    #[default]
    None,
    All,
    LoraOnly,
}

impl From<WrittenBias> for Biases {
    fn from(bias: WrittenBias) -> Self {
        match bias {
            WrittenBias::None => Biases::None,
            WrittenBias::All => Biases::All,
            WrittenBias::LoraOnly => Biases::LoraOnly,
        }
    }
}

impl From<Biases> for WrittenBias {
    fn from(bias: Biases) -> Self {
        match bias {
            Biases::None => WrittenBias::None,
            Biases::All => WrittenBias::All,
            Biases::LoraOnly => WrittenBias::LoraOnly,
        }
    }
}

impl Written {
    fn read(config: &Json) -> Result<Self> {
        /// What makes an adapter compute something else.
        const OTHERWISE: [&str; 11] = [
            "use_dora",
            "use_qalora",
            "use_bdlora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "lora_bias",
            "target_parameters",
            "trainable_token_indices",
            "layer_replication",
            "alora_invocation_tokens",
        ];
        let kind = config["peft_type"].as_str().unwrap_or("nothing");
        ensure!(kind == "LORA", "it describes `{kind}`: expected `LORA`");
        let is_off = |value: &Json| match value {
            Json::Null | Json::Bool(false) => true,
            Json::Object(fields) => fields.is_empty(),
            Json::Array(items) => items.is_empty(),
            _ => false,
        };
        for field in OTHERWISE {
            if let Some(value) = config.get(field).filter(|value| !is_off(value)) {
                bail!(
                    "`{field}` is {value}, which is not computed here: merge the adapter with PEFT and use the whole model"
                );
            }
        }
        let written: Written = Deserialize::deserialize(config)?;
        ensure!(written.r > 0, "its rank `r` is 0");
        ensure!(
            (0.0..1.0).contains(&written.lora_dropout),
            "`lora_dropout` is {}: expected from 0 to 1",
            written.lora_dropout
        );
        Ok(written)
    }
}

impl Value for Adapter {
    fn port_type(&self) -> PortType {
        PortType::Adapter
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let Lora { rank, alpha, dropout, bias, rslora, .. } = &self.lora;
        // PEFT's own field is a whole number.
        let alpha = if alpha.fract() == 0.0 { json!(*alpha as i64) } else { json!(alpha) };
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": null,
            "inference_mode": true,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": self.adapted().collect::<Vec<_>>(),
            "bias": WrittenBias::from(*bias),
            "use_rslora": rslora,
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": null,
        });
        write_json(&folder.join(CONFIG), &config)?;
        let tensors: IndexMap<String, &Tensor> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                let adapted =
                    name.strip_suffix(".bias").filter(|layer| self.tensors.contains_key(&format!("{layer}{A}")));
                let name = adapted.map_or_else(|| name.clone(), |layer| format!("{layer}{BASE_BIAS}"));
                (format!("{PREFIX}{name}"), tensor)
            })
            .collect();
        write_tensors(&folder.join(TENSORS), tensors.iter().map(|(name, tensor)| (name, *tensor)), None)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}
