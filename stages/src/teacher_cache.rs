//! `teacher-cache`: what a frozen teacher says of a fixed text, computed once and kept.
//!
//! ```yaml
//! said:
//!   kind: teacher-cache
//!   in: {teacher: teacher, data: data.train}
//!   with: {rows: 1500}
//! ```
//!
//! `distill` with this on its port `cache` never runs the teacher: however many epochs, variants and runs learn from the
//! text, its forward pass was paid once. `keep: hidden` keeps the final hidden state of every response token, from which
//! the teacher's head, the only part that still runs, gives the same bits as the whole teacher would. `keep: {top_k: K}`
//! keeps the K likeliest tokens and the mass of the rest, needs no teacher at all, and biases the loss downwards: see
//! `TopK` of `lm`.
//! Inputs: `teacher`, `data`, and the teacher's soft prompt. The text before the responses may be another one than the
//! student reads (a text prompt for the teacher): rows are found by id, and only responses must be the same.
//! Outputs: `cache`. Cost: one forward pass of the teacher. Disk, per response token: 4 bytes a channel (`storage: bf16`: 2),
//! or 8 bytes a kept token.

use anyhow::ensure;
use candle_core::Device;
use contract::{
    About, AnyValue, ConfigError, Dataset, Env, Inputs, Operator, Outputs, PortType, Ports, Result, Row, Sink, Stage,
    Step,
};
use lm::loss::TopK;
use lm::{CacheFacts, Keep, LanguageModel, Said, SoftPrompt, Storage, TeacherCacheWriter};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::training::Aligned;

/// The `with` of `teacher-cache`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is kept of every response token: `hidden`, exact, or `{top_k: K}`, small and biased.
    #[serde(default)]
    pub keep: Keep,
    /// The type of the hidden states: `f32`, exact, or `bf16`, half the size and rounded to 8 bits.
    #[serde(default)]
    pub storage: Storage,
    /// Temperature of the probabilities that `top_k` keeps: that of the stages that learn from them.
    #[serde(default = "one")]
    pub temperature: f64,
    /// Only the first so many rows, as a window's `rows`.
    #[serde(default)]
    pub rows: Option<u64>,
    /// Rows that go through the teacher at once: a matter of memory.
    #[serde(default = "default_batch")]
    pub batch: u64,
}

fn one() -> f64 {
    1.0
}

fn default_batch() -> u64 {
    16
}

/// The kind.
pub struct TeacherCaching;

impl Stage for TeacherCaching {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "teacher-cache",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "keeps what a frozen teacher says of a fixed text, so that it never runs twice",
            example: "kind: teacher-cache\nin: {teacher: teacher, data: data.train}\nwith: {keep: hidden}",
            reads_clock: false,
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let Config { keep, storage, temperature, rows, batch } = config;
        let mut errors = Vec::new();
        match keep {
            Keep::TopK(0) => errors.push(ConfigError::at("keep.top_k", "expected 1 token or more, got 0")),
            Keep::TopK(_) if *storage != Storage::F32 => errors.push(
                ConfigError::at("storage", "only hidden states have a choice of type")
                    .hint("leave it out, or say `keep: hidden`"),
            ),
            Keep::Hidden if *temperature != 1.0 => errors.push(
                ConfigError::at("temperature", "hidden states serve every temperature")
                    .hint("leave it out, and set it where the cache is learnt from"),
            ),
            _ => {}
        }
        if !(temperature.is_finite() && *temperature > 0.0) {
            errors.push(ConfigError::at("temperature", format!("expected a number above 0, got {temperature}")));
        }
        for (field, value) in [("rows", rows.unwrap_or(1)), ("batch", *batch)] {
            if value == 0 {
                errors.push(ConfigError::at(field, "expected 1 row or more, got 0"));
            }
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("teacher", PortType::Model, "the teacher, frozen")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the teacher")
            .input("data", PortType::Dataset, "the text, given or written once")
            .output("cache", PortType::TeacherCache, "what the teacher says of every response token")
            .agree("vocabulary", &["teacher", "data"])
            .agree("width", &["teacher", "prompt"])
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Caching { config, env: env.clone() }))
    }
}

struct Caching {
    config: Config,
    env: Env,
}

impl Operator for Caching {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let Config { keep, storage, temperature, rows, batch } = self.config;
        let teacher = inputs.take::<LanguageModel>("teacher")?.frozen();
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let data = inputs.take::<Dataset>("data")?;
        let rows: Vec<&Row> = (data.rows.iter())
            .take(rows.map_or(usize::MAX, |rows| rows as usize))
            .filter(|row| Aligned::tokens_of(row) > 0)
            .collect();
        ensure!(!rows.is_empty(), "the text has no response to keep anything of");

        let responses: Vec<_> = rows.iter().map(|row| (row.id, Aligned::response_of(row))).collect();
        let facts = CacheFacts::of(&teacher, keep, storage, temperature)?;
        let mut cache = TeacherCacheWriter::new(&self.env.scratch, facts, data.tokenizer.clone(), &responses)?;
        let mut done = 0;
        for rows in rows.chunks(batch as usize) {
            let text = Aligned::of(rows.iter().copied());
            let hidden = text.hidden(&teacher, prompt.as_ref(), None)?; // [tokens, C]
            let said = match keep {
                Keep::Hidden => Said::Hidden(hidden),
                Keep::TopK(k) => Said::TopK(TopK::of(&hidden, teacher.head(), k, temperature)?),
            };
            cache.push(rows.len(), &said)?;
            done += rows.len() as u64;
            sink.progress(done, responses.len() as u64, "rows");
        }
        Ok(Outputs::new().with("cache", cache.finish()?))
    }
}
