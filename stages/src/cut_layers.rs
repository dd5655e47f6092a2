//! `cut-layers`: a smaller model made of some layers of a larger one, to begin a student from.
//!
//! ```yaml
//! student0:
//!   kind: cut-layers
//!   in: {model: teacher}
//!   with: {keep: {evenly: 6}}
//! ```
//!
//! Embeddings, the last norm, the output head and the tokenizer stay. What is left speaks badly until it is trained, and
//! learns much faster than from random weights: Sanh et al., "DistilBERT", 2019, section 2, takes every other layer; Shleifer
//! and Rush, "Pre-trained summarization distillation", 2020, compares choices and finds evenly spaced ones best.
//! Inputs: `model`, quantised too. Outputs: `model`, in the types that it has. Cost: none.

use anyhow::ensure;
use contract::limits;
use contract::{
    About, AnyValue, Bounds, Cause, ConfigError, Env, Facts, Inputs, Operator, Outlook, Outputs, PortType, Ports,
    Result, Sink, Stage, Step,
};
use lm::LanguageModel;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The `with` of `cut-layers`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which layers stay.
    pub keep: Keep,
}

/// Layers that stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// So many, the first and the last among them, with gaps as equal as can be.
    Evenly(#[schemars(range(min = 1, max = limits::LAYERS))] usize),
    /// The first so many.
    First(#[schemars(range(min = 1, max = limits::LAYERS))] usize),
    /// These, counted from 0, in rising order.
    Layers(#[schemars(inner(range(min = 0, max = limits::LAYERS)))] Vec<usize>),
}

impl Keep {
    /// The layers that stay of so many.
    ///
    /// Errors when there are not so many.
    fn of(&self, count: usize) -> Result<Vec<usize>> {
        let layers = match self {
            Keep::Evenly(1) => vec![0],
            // Rounded to the nearest; a half goes up.
            Keep::Evenly(kept) => {
                (0..*kept).map(|i| (2 * i * count.saturating_sub(1) + kept - 1) / (2 * (kept - 1))).collect()
            }
            Keep::First(kept) => (0..*kept).collect(),
            Keep::Layers(layers) => layers.clone(),
        };
        let last = layers.iter().max().copied().unwrap_or(0);
        ensure!(
            layers.len() <= count && last < count,
            "`keep` asks for {} and the model has {count} layers, counted from 0: ask for fewer",
            match self {
                Keep::Layers(_) => format!("layer {last}"),
                _ => format!("{} layers", layers.len()),
            }
        );
        Ok(layers)
    }

    fn len(&self) -> usize {
        match self {
            Keep::Evenly(kept) | Keep::First(kept) => *kept,
            Keep::Layers(layers) => layers.len(),
        }
    }
}

/// The kind.
pub struct CutLayers;

impl Stage for CutLayers {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "cut-layers",
            version: 2,
            numerics: None,
            summary: "makes a smaller model of some layers of a larger one",
            example: "kind: cut-layers\nin: {model: teacher}\nwith: {keep: {evenly: 6}}",
            reads_clock: false,
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        match &config.keep {
            Keep::Layers(layers) if layers.is_empty() => {
                vec![ConfigError::at("keep", "no layer stays").hint("name at least one, counted from 0")]
            }
            Keep::Layers(layers) if !layers.is_sorted_by(|a, b| a < b) => vec![
                ConfigError::at("keep", "the layers are not in rising order")
                    .hint("name each once, the one nearest to the input first"),
            ],
            _ => Vec::new(),
        }
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new().input("model", PortType::Model, "the larger model").output(
            "model",
            PortType::Model,
            "the smaller one",
        )
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let facts = outlook.input("model");
        if let Some(layers) = facts.layers
            && let Err(error) = config.keep.of(layers as usize)
        {
            outlook.error(
                [Cause::Field("keep".into()), Cause::Input("model".into(), "init.layers".into())],
                error.to_string(),
                format!("`model` has {layers} layers"),
            );
        }
        outlook.holds("model");
        let layers = Some(config.keep.len() as u64);
        let parameters = Bounds { least: 0, ..facts.parameters };
        outlook.output("model", Facts { layers, parameters, ..facts });
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Cutting(config)))
    }
}

struct Cutting(Config);

impl Operator for Cutting {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, _sink: &mut dyn Sink) -> Result<Outputs> {
        let model = inputs.take::<LanguageModel>("model")?;
        let layers = self.0.keep.of(model.config.layers())?;
        Ok(Outputs::new().with("model", model.cut_to(&layers)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_chosen_as_asked() {
        let evenly = |kept, count| Keep::Evenly(kept).of(count).unwrap();
        assert_eq!(evenly(10, 30), [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]);
        assert_eq!(evenly(3, 12), [0, 6, 11]);
        assert_eq!((evenly(1, 4), evenly(4, 4)), (vec![0], vec![0, 1, 2, 3]));
        assert_eq!(Keep::First(3).of(4).unwrap(), [0, 1, 2]);
        assert_eq!(Keep::Layers(vec![0, 3]).of(4).unwrap(), [0, 3]);
        for keep in [Keep::Evenly(5), Keep::First(5), Keep::Layers(vec![4])] {
            assert!(keep.of(4).unwrap_err().to_string().contains("the model has 4 layers"), "{keep:?}");
        }
    }

    #[test]
    fn odd_lists_are_errors() {
        let errors = |layers: &[usize]| CutLayers.validate(&Config { keep: Keep::Layers(layers.to_vec()) }).len();
        assert_eq!((errors(&[]), errors(&[2, 1]), errors(&[1, 1]), errors(&[0, 2])), (1, 1, 1, 0));
    }
}
