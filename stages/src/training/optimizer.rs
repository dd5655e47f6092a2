//! How a stage changes its weights.

use contract::{Conventions, limits};
use lm::AdamWOptions;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// AdamW and the clipping before it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// AdamW's decay rates of the two moments.
    #[serde(default = "Optimizer::default_betas")]
    #[schemars(schema_with = "Optimizer::betas_schema")]
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    #[serde(default = "Optimizer::default_eps")]
    #[schemars(extend("exclusiveMinimum" = 0.0), range(max = 1.0))]
    pub eps: f64,
    /// Decoupled weight decay, applied to matrices; left out: 0.01 for models, for a soft prompt 0 (`reference`: 0.01).
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

    /// What AdamW is set to, with `default_decay` where no weight decay is given.
    pub(super) fn adamw(&self, default_decay: f64) -> AdamWOptions {
        AdamWOptions {
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay.unwrap_or(default_decay),
            decay_norms: self.decay_norms == Some(true),
        }
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
            betas: Self::default_betas(),
            eps: Self::default_eps(),
            weight_decay: None,
            decay_norms: None,
            clip: Self::default_clip(),
        }
    }
}
