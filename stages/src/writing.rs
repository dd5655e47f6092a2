//! How a model writes, for all stages that let one.

use contract::{ConfigError, Conventions, End, Result, Row, Sink, limits};
use lm::sample::Sampling;
use lm::{Generate, Generated, LanguageModel, Mixed, Prompt, generate, generate_mixed};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::finite::{Behind, NEXT_TOKEN, explain};

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
            /// Of those, samples among tokens at least this likely as a share of the likeliest one's probability; 0: all.
            #[serde(default)]
            #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
            pub min_p: f32,
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
                let Self { temperature, top_k, top_p, min_p, .. } = *self;
                lm::sample::Sampling { temperature, top_k, top_p, min_p, ..Default::default() }
            }

            /// How rows are answered, prompt and response together at most `longest` tokens. `purpose` and `time` tell draws apart.
            fn options(&self, longest: usize, purpose: u32, time: u32) -> lm::Generate {
                lm::Generate {
                    sampling: self.sampling(),
                    max_new_tokens: self.max_new_tokens,
                    longest,
                    seed: self.seed,
                    purpose,
                    time,
                    batch: self.batch,
                }
            }
        }
    };
}
pub(crate) use config;

/// What becomes of a response that was cut off by its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CutOff {
    /// It stays as it is: there is no end to learn.
    Open,
    /// Its last token is replaced by the end token, as in the published program.
    ForcedEnd,
}

impl CutOff {
    /// The default under the conventions.
    pub fn of(conventions: Conventions) -> Self {
        match conventions {
            Conventions::Sound => CutOff::Open,
            Conventions::Reference => CutOff::ForcedEnd,
        }
    }
}

/// Who answers in a round of training.
pub(crate) struct Writer<'a> {
    pub(crate) model: &'a LanguageModel,
    /// A teacher that has a say in every token, and its share.
    pub(crate) teacher: Option<(&'a LanguageModel, f64)>,
}

impl Writer<'_> {
    /// The rows with new responses and their log-probabilities. With `force_end` a response that is cut off ends with the
    /// token `end` all the same.
    pub(crate) fn answer(
        &self,
        asked: &[&Row],
        options: &Generate,
        force_end: bool,
        end: u32,
        sink: &mut dyn Sink,
    ) -> Result<Vec<Row>> {
        let prompts: Vec<Prompt<'_>> = asked.iter().map(|row| Prompt { row: row.id, ids: &row.prompt }).collect();
        let total = prompts.len() as u64;
        let mut progress = |done| sink.progress(done as u64, total, "rows");
        let generated = match self.teacher {
            None => generate(self.model, None, &prompts, options, &mut progress),
            Some((teacher, share)) => {
                generate_mixed(self.model, Mixed { teacher, share }, &prompts, options, &mut progress)
            }
        };
        let behind = [Behind::new("model", self.model, None)].into_iter();
        let behind: Vec<Behind<'_>> =
            behind.chain(self.teacher.iter().map(|(teacher, _)| Behind::new("teacher", teacher, None))).collect();
        let generated = generated.map_err(|error| explain(error, NEXT_TOKEN, |at| asked.get(at).copied(), &behind))?;
        let answered = asked.iter().zip(generated);
        Ok(answered.map(|(row, generated)| answered_by(row, generated, force_end, end)).collect())
    }
}

fn answered_by(row: &Row, generated: Generated, force_end: bool, end_token: u32) -> Row {
    let Generated { mut ids, log_probs, mut end } = generated;
    if let (End::Length, true, Some(last)) = (end, force_end, ids.last_mut()) {
        *last = end_token;
        end = End::Stop;
    }
    Row { response: ids, end, log_probs: Some(log_probs), ..row.clone() }
}

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
