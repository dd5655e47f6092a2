//! How a stage changes its weights.

use candle_core::Tensor;
use contract::{ConfigError, Conventions, Result, limits};
use indexmap::IndexMap;
use lm::{AdamW, AdamWOptions, Gradients, OptimizerState, Sgd, SgdOptions};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// AdamW or SGD, and the clipping before it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// How gradients become updates.
    #[serde(default)]
    pub method: Method,
    /// With `sgd`, the share of the last update's direction that goes into the next. 0.9 in the published program for response
    /// priming.
    #[serde(default)]
    #[schemars(extend("exclusiveMaximum" = 1.0), range(min = 0.0))]
    pub momentum: f64,
    /// AdamW's decay rates of the two moments.
    #[serde(default = "Optimizer::default_betas")]
    #[schemars(schema_with = "Optimizer::betas_schema")]
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    #[serde(default = "Optimizer::default_eps")]
    #[schemars(extend("exclusiveMinimum" = 0.0), range(max = 1.0))]
    pub eps: f64,
    /// Weight decay, applied to matrices: AdamW's decoupled, with `sgd` added to the gradient. Left out: 0.01 for models, for a soft prompt 0 (`reference`: 0.01).
    #[serde(default)]
    #[schemars(range(min = 0.0, max = limits::WEIGHT_DECAY))]
    pub weight_decay: Option<f64>,
    /// Whether weights of norms decay too, but for GPT-2's: the published programs know only its names, and so decay the norms
    /// of OPT and Llama. Left out: no (`reference`: yes).
    #[serde(default)]
    pub decay_norms: Option<bool>,
    /// Global norm that gradients are scaled down to; 0 switches clipping off.
    #[serde(default = "Optimizer::default_clip")]
    #[schemars(range(min = 0.0, max = limits::NORM))]
    pub clip: f64,
}

/// How gradients become updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    #[default]
    Adamw,
    /// Stochastic gradient descent, with momentum if asked for.
    Sgd,
}

/// What applies gradients, with all that it remembers.
pub(super) enum Applied {
    AdamW(AdamW),
    Sgd(Sgd),
}

impl Applied {
    pub(super) fn step(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        gradients: &Gradients,
        learning_rate: f64,
        scale: f64,
    ) -> Result<()> {
        match self {
            Applied::AdamW(adamw) => adamw.step(parameters, gradients, learning_rate, scale),
            Applied::Sgd(sgd) => sgd.step(parameters, gradients, learning_rate, scale),
        }
    }

    pub(super) fn to_state(&self) -> Result<OptimizerState> {
        match self {
            Applied::AdamW(adamw) => adamw.to_state(),
            Applied::Sgd(sgd) => sgd.to_state(),
        }
    }
}

impl Optimizer {
    fn betas_schema(_: &mut SchemaGenerator) -> Schema {
        let beta = json!({"type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0});
        json_schema!({"type": "array", "items": beta, "minItems": 2, "maxItems": 2})
    }

    fn default_betas() -> (f64, f64) {
        (0.9, 0.999)
    }

    fn default_eps() -> f64 {
        1e-8
    }

    fn default_clip() -> f64 {
        1.0
    }

    /// What applies gradients, with `default_decay` where no weight decay is given, going on from a state if there is one.
    pub(super) fn start(&self, default_decay: f64, state: Option<&OptimizerState>) -> Result<Applied> {
        let weight_decay = self.weight_decay.unwrap_or(default_decay);
        let decay_norms = self.decay_norms == Some(true);
        Ok(match self.method {
            Method::Adamw => {
                let options = AdamWOptions { betas: self.betas, eps: self.eps, weight_decay, decay_norms };
                Applied::AdamW(
                    state.map_or_else(|| Ok(AdamW::new(options)), |state| AdamW::from_state(options, state))?,
                )
            }
            Method::Sgd => {
                let options = SgdOptions { momentum: self.momentum, weight_decay, decay_norms };
                Applied::Sgd(state.map_or_else(|| Ok(Sgd::new(options)), |state| Sgd::from_state(options, state))?)
            }
        })
    }

    /// What is wrong with it: fields that nobody reads.
    pub fn errors(&self) -> Vec<ConfigError> {
        let unread = match self.method {
            Method::Adamw => vec![("momentum", self.momentum != 0.0, "sgd")],
            Method::Sgd => vec![
                ("betas", self.betas != Self::default_betas(), "adamw"),
                ("eps", self.eps != Self::default_eps(), "adamw"),
            ],
        };
        let error = |(field, _, method): (&str, bool, &str)| {
            ConfigError::at(&format!("optimizer.{field}"), format!("nothing reads `{field}` here"))
                .hint(format!("it belongs to `method: {method}`"))
        };
        unread.into_iter().filter(|(_, is_there, _)| *is_there).map(error).collect()
    }

    /// Fills in what follows the conventions in the optimiser of a model.
    pub fn fill_for_model(&mut self, conventions: Conventions) {
        if conventions == Conventions::Reference {
            self.decay_norms.get_or_insert(true);
        }
    }

    /// What gradients of that norm are multiplied by.
    pub(super) fn scale(&self, norm: f64) -> f64 {
        if self.clip > 0.0 { (self.clip / (norm + 1e-6)).min(1.0) } else { 1.0 }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            method: Method::default(),
            momentum: 0.0,
            betas: Self::default_betas(),
            eps: Self::default_eps(),
            weight_decay: None,
            decay_norms: None,
            clip: Self::default_clip(),
        }
    }
}
