//! How a model writes, for all stages that let one.

use contract::{ConfigError, limits};
use lm::sample::Sampling;

/// Writes the `with` of a stage that answers prompts: how a token is chosen, then its own fields, and behind them those that are
/// no matter of the method.
///
/// A macro, because serde's `flatten` would put an end to `deny_unknown_fields`.
macro_rules! config {
    ($(#[$about:meta])* pub struct $name:ident { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            /// 1 samples from the model's own distribution, as the methods ask; 0 is greedy.
            #[serde(default = "crate::writing::one")]
            #[schemars(range(min = 0.0, max = contract::limits::TEMPERATURE.1))]
            pub temperature: f32,
            /// Samples among the so many likeliest tokens; 0: all.
            #[serde(default)]
            #[schemars(range(min = 0, max = contract::limits::VOCABULARY))]
            pub top_k: usize,
            /// Samples among the likeliest tokens that make up this probability; 1: all.
            #[serde(default = "crate::writing::one")]
            #[schemars(extend("exclusiveMinimum" = 0.0), range(max = 1.0))]
            pub top_p: f32,
            /// Tokens a response may have.
            #[schemars(range(min = 1, max = contract::limits::TOKENS))]
            pub max_new_tokens: usize,
            $($own)*
            /// Rows that are decoded together: a matter of memory.
            #[serde(default = "crate::writing::default_batch")]
            #[schemars(range(min = 1, max = contract::limits::BATCH))]
            pub batch: usize,
            /// Type that matrices are multiplied in; `bf16` needs a GPU. Trained weights and moments are f32 either way.
            #[serde(default)]
            pub dtype: lm::Dtype,
            /// Seed of the draws.
            #[serde(default)]
            #[schemars(range(min = 0, max = contract::limits::SEED))]
            pub seed: u64,
        }

        impl $name {
            fn sampling(&self) -> lm::sample::Sampling {
                let Self { temperature, top_k, top_p, .. } = *self;
                lm::sample::Sampling { temperature, top_k, top_p, ..Default::default() }
            }
        }
    };
}
pub(crate) use config;

pub(crate) fn one() -> f32 {
    1.0
}

pub(crate) fn default_batch() -> usize {
    256
}

/// What is wrong with sampling options.
pub(crate) fn sampling_errors(sampling: &Sampling) -> Vec<ConfigError> {
    let mut errors = Vec::new();
    if sampling.temperature > 0.0 && f64::from(sampling.temperature) < limits::TEMPERATURE.0 {
        let message = format!("expected 0 or at least {}, got {}", limits::TEMPERATURE.0, sampling.temperature);
        errors.push(ConfigError::at("temperature", message).hint("0 is greedy"));
    }
    errors
}
