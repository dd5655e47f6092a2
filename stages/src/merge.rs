//! `merge`: a model with a low-rank adapter as one without.
//!
//! ```yaml
//! whole: {kind: merge, in: {model: train.student}}
//! ```
//!
//! What the adapter adds to a matrix is added to it, and the matrix is f32 from then on: a quantised model grows. Needed for
//! programs that know no adapters, and before all of a model is trained or its layers are cut; stages here read models with
//! adapters as they are. Inputs: `model`. Output: `model`. Cost: a product of two thin matrices for each that is adapted.

use contract::{About, AnyValue, Env, Inputs, Operator, Outlook, Outputs, PortType, Ports, Result, Sink, Stage, Step};
use lm::LanguageModel;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The `with` of `merge`: there is nothing to set.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// The kind.
pub struct Merge;

impl Stage for Merge {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "merge",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "makes one model of a model and the low-rank adapter on it",
            example: "kind: merge\nin: {model: train.student}",
            reads_clock: false,
        }
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new().input("model", PortType::Model, "a model with an adapter").output(
            "model",
            PortType::Model,
            "the same in one piece",
        )
    }

    fn foresee(&self, _config: &Config, outlook: &mut Outlook) {
        outlook.holds("model");
        let facts = outlook.input("model");
        outlook.output("model", facts);
    }

    fn start(&self, _config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Merging))
    }
}

struct Merging;

impl Operator for Merging {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, _sink: &mut dyn Sink) -> Result<Outputs> {
        let model = inputs.take::<LanguageModel>("model")?;
        Ok(Outputs::new().with("model", model.merged()?))
    }
}
