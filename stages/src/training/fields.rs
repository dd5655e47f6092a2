//! The fields that all training stages have in `with`.

use contract::Conventions;
use lm::Warmup;

use super::{Mean, Rate};

/// Writes the `with` of a training stage: its own fields, and behind them those that all such stages have.
///
/// A macro, because serde's `flatten` would put an end to `deny_unknown_fields`.
macro_rules! config {
    ($(#[$about:meta])* pub struct $name:ident { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($own)*
            /// Learning rate at the top of the schedule.
            #[schemars(range(min = 0.0, max = contract::limits::LEARNING_RATE))]
            pub learning_rate: f64,
            /// How the learning rate goes on after the warm-up.
            #[serde(default)]
            pub schedule: lm::Schedule,
            /// Updates of linear warm-up.
            #[serde(default)]
            #[schemars(range(min = 0, max = contract::limits::UPDATES))]
            pub warmup: u64,
            /// Whether the warm-up begins with an update at rate 0; left out: as the conventions say.
            #[serde(default)]
            pub warmup_from_zero: Option<bool>,
            /// Optimiser.
            #[serde(default)]
            pub optimizer: $crate::training::Optimizer,
            /// Rows that go through the models at once; left out: all. Fewer take less memory, and round otherwise: the last bits
            /// of the result depend on it, so another number is another result.
            #[serde(default)]
            #[schemars(range(min = 1, max = contract::limits::BATCH))]
            pub micro_batch: Option<u64>,
            /// Rows of an update in the recipe that this follows: where the pipeline makes it another number, the plan fails; left
            /// out: as many as there are.
            #[serde(default)]
            #[schemars(range(min = 1, max = contract::limits::BATCH))]
            pub effective_batch: Option<u64>,
            /// Whether what is trained keeps only the inputs of its blocks for the backward pass, and computes the rest again
            /// there: less memory, a third more time, the same bits.
            #[serde(default)]
            pub activation_checkpointing: bool,
            /// How the loss is averaged; left out: as the conventions say.
            #[serde(default)]
            pub mean: Option<$crate::training::Mean>,
            /// Type that matrices are multiplied in; `bf16` needs a GPU. Trained weights and moments are f32 either way.
            #[serde(default)]
            pub dtype: lm::Dtype,
            /// Seed of initial weights and dropout.
            #[serde(default)]
            #[schemars(range(min = 0, max = contract::limits::SEED))]
            pub seed: u64,
        }

        impl $crate::training::Training for $name {
            fn settings(&self) -> $crate::training::Settings {
                $crate::training::Settings {
                    learning_rate: self.learning_rate,
                    schedule: self.schedule,
                    warmup: self.warmup,
                    warmup_from_zero: self.warmup_from_zero,
                    optimizer: self.optimizer.clone(),
                    micro_batch: self.micro_batch,
                    effective_batch: self.effective_batch,
                    activation_checkpointing: self.activation_checkpointing,
                    mean: self.mean,
                    dtype: self.dtype,
                    seed: self.seed,
                }
            }

            fn fill_settings(&mut self, conventions: contract::Conventions) {
                let reference = conventions == contract::Conventions::Reference;
                self.mean.get_or_insert($crate::training::Mean::of(conventions));
                self.warmup_from_zero.get_or_insert(reference);
            }
        }
    };
}
pub(crate) use config;

config! {
    /// What all training stages are set to.
    pub struct Settings {}
}

/// The `with` of a training stage.
pub trait Training {
    /// The fields that all training stages have.
    fn settings(&self) -> Settings;

    /// Fills in those of them whose default follows the conventions.
    fn fill_settings(&mut self, conventions: Conventions);
}

impl Settings {
    /// The learning rate.
    pub fn rate(&self) -> Rate {
        let warmup = Warmup { updates: self.warmup, from_zero: self.warmup_from_zero.unwrap_or(false) };
        Rate { peak: self.learning_rate, schedule: self.schedule, warmup }
    }

    /// How the loss is averaged.
    pub fn mean(&self) -> Mean {
        self.mean.unwrap_or(Mean::Tokens)
    }
}

/// What is only a matter of memory, or only looked at, and changes no bit. Not so `micro_batch`: a matrix product over the tokens
/// of a few rows adds them up in another order than one over those of all rows.
pub const OUTSIDE_KEY: &[&str] = &["activation_checkpointing", "effective_batch"];
