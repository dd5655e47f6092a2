//! `adapt`: a model with a low-rank adapter that was trained elsewhere.
//!
//! ```yaml
//! lora:    {kind: download, with: {adapter: checkpoints/llama-dolly-lora}}
//! teacher: {kind: adapt, in: {model: llama, adapter: lora}}
//! ```
//!
//! The model stays as it is, quantised if it was, and the adapter lies on top. What comes out can be used wherever a model
//! can: as a teacher, or by `finetune` and `distill`, which go on with its adapter where their `lora` asks for the same.
//! Inputs: `model`, `adapter`. Output: `model`. Cost: none.

use contract::{About, AnyValue, Env, Inputs, Operator, Outlook, Outputs, PortType, Ports, Result, Sink, Stage, Step};
use lm::{Adapter, LanguageModel};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The `with` of `adapt`: there is nothing to set.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// The kind.
pub struct Adapt;

impl Stage for Adapt {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "adapt",
            version: 1,
            numerics: None,
            summary: "puts a low-rank adapter on a model",
            example: "kind: adapt\nin: {model: llama, adapter: lora}",
            reads_clock: false,
        }
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("model", PortType::Model, "the model that the adapter was trained for")
            .input("adapter", PortType::Adapter, "the adapter")
            .output("model", PortType::Model, "the model with the adapter on it")
    }

    fn foresee(&self, _config: &Config, outlook: &mut Outlook) {
        outlook.holds("model");
        let facts = outlook.input("model");
        outlook.output("model", facts);
    }

    fn start(&self, _config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Adapting))
    }
}

struct Adapting;

impl Operator for Adapting {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, _sink: &mut dyn Sink) -> Result<Outputs> {
        let model = inputs.take::<LanguageModel>("model")?;
        let adapter = inputs.take::<Adapter>("adapter")?;
        Ok(Outputs::new().with("model", model.with_adapter(&adapter)?))
    }
}
