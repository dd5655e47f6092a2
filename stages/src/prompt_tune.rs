//! `prompt-tune`: the teacher's soft prompt moves towards what the student can follow.
//!
//! ```yaml
//! tune:
//!   kind: prompt-tune
//!   in: {teacher: teacher, student: carry.student, prompt: carry.prompt, data: respond}
//!   with: {divergence: reverse-kl, regulariser: {divergence: reverse-kl, coefficient: 1.0, schedule: linear-to-zero}}
//! ```
//!
//! Loss (PromptKD, section 3.2), at every response token, with p' the prompted teacher, p the plain one and q the student:
//! guidance D(p', q) + w D(p', p), where w falls from the coefficient to 0 over the run. Only the prompt is trained.
//! Inputs: `teacher`, `student`, `prompt`, and `data` that the student wrote. Outputs: `prompt`, a row of metrics an update.
//! Cost: a forward and a backward pass through the frozen teacher, a second forward while w is not 0, one of the student.

use anyhow::ensure;
use candle_core::{Tensor, Var};
use contract::random::purpose;
use contract::{
    About, Alone, AnyValue, ConfigError, Conventions, Dataset, Env, Inputs, Operator, Outputs, PortType, Ports, Result,
    Sink, Stage, Step,
};
use indexmap::IndexMap;
use lm::loss::{Divergence, Source, Target, head_loss, log_probs};
use lm::{Dtype, Gradients, LanguageModel, Schedule, SoftPrompt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use crate::training::{self, Aligned, Mean, MicroBatch, Optimizer, Parts, Rate, Trainer};

/// The `with` of `prompt-tune`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Divergence between the prompted teacher and the student; `reverse-kl` is KL(prompted teacher || student).
    #[serde(default = "reverse_kl")]
    pub divergence: Divergence,
    /// Keeps the prompted teacher near the plain one.
    #[serde(default)]
    pub regulariser: Regulariser,
    /// Learning rate at the top of the schedule.
    pub learning_rate: f64,
    /// How the learning rate goes on after the warm-up.
    #[serde(default)]
    pub schedule: Schedule,
    /// Updates of linear warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// Whether the warm-up begins with an update at rate 0; left out: as the conventions say.
    #[serde(default)]
    pub warmup_from_zero: Option<bool>,
    /// Optimiser of the prompt.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Whether the teacher's dropout is on; left out: as the conventions say.
    #[serde(default)]
    pub teacher_dropout: Option<bool>,
    /// Rows that go through the models at once; left out: all. A matter of memory, unless `mean` is `micro-batches`.
    #[serde(default)]
    pub micro_batch: Option<u64>,
    /// Whether the prompted teacher keeps only the inputs of its blocks for the backward pass, and computes the rest again there: less
    /// memory, a third more time, the same bits.
    #[serde(default)]
    pub activation_checkpointing: bool,
    /// How the loss is averaged; left out: as the conventions say.
    #[serde(default)]
    pub mean: Option<Mean>,
    /// Type that matrices are multiplied in; `bf16` needs a GPU. Trained weights and moments are f32 either way.
    #[serde(default)]
    pub dtype: Dtype,
    /// Seed of the teacher's dropout.
    #[serde(default)]
    pub seed: u64,
}

/// Keeps the prompted teacher near the plain one.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Regulariser {
    /// Divergence between prompted and plain teacher; `reverse-kl` is KL(prompted || plain).
    #[serde(default = "reverse_kl")]
    pub divergence: Divergence,
    /// Its weight at the beginning; 0 switches it off.
    #[serde(default = "one")]
    pub coefficient: f64,
    /// How the weight goes on.
    #[serde(default)]
    pub schedule: Decay,
    /// At which count the linear schedule begins; left out: as the conventions say.
    #[serde(default)]
    pub count: Option<Count>,
}

impl Default for Regulariser {
    fn default() -> Self {
        Regulariser { divergence: reverse_kl(), coefficient: one(), schedule: Decay::default(), count: None }
    }
}

/// How the regulariser's weight goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Falls linearly to 0 at the end of the run.
    #[default]
    LinearToZero,
    /// Stays.
    Constant,
}

/// What the linear schedule counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Count {
    /// Updates made: update k of K has weight 1 - k/K.
    Updates,
    /// The published program's counter, which starts at 1 and, while micro-batches accumulate, moves on before the last of
    /// them: 1 - (k+1)/K, and 1 - (k+2)/K in the last of several micro-batches.
    Published,
}

fn reverse_kl() -> Divergence {
    Divergence::ReverseKl
}

fn one() -> f64 {
    1.0
}

/// The kind.
pub struct PromptTune;

impl Stage for PromptTune {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "prompt-tune",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "tunes the teacher's soft prompt with guidance from the student",
            example: "kind: prompt-tune\nin: {teacher: teacher, student: carry.student, prompt: carry.prompt, data: respond}\nwith: {learning_rate: 5e-4}",
            reads_clock: true,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        let reference = conventions == Conventions::Reference;
        config.mean.get_or_insert(Mean::of(conventions));
        config.warmup_from_zero.get_or_insert(conventions == Conventions::Reference);
        config.teacher_dropout.get_or_insert(reference);
        config.regulariser.count.get_or_insert(if reference { Count::Published } else { Count::Updates });
        config.optimizer.weight_decay.get_or_insert(if reference { 1e-2 } else { 0.0 });
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = training::validate_rate(config.learning_rate, &config.optimizer, config.micro_batch);
        let divergences =
            [("divergence", config.divergence), ("regulariser.divergence", config.regulariser.divergence)];
        for (field, divergence) in divergences {
            if let Err(error) = divergence.validate() {
                errors.push(ConfigError::at(field, format!("{error:#}")));
            }
        }
        if config.regulariser.coefficient < 0.0 {
            let message = format!("expected 0 or more, got {}", config.regulariser.coefficient);
            errors.push(ConfigError::at("regulariser.coefficient", message).hint("0 switches the regulariser off"));
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("teacher", PortType::Model, "the teacher, frozen")
            .input("student", PortType::Model, "the student, frozen, whose guidance the prompt follows")
            .input("prompt", PortType::SoftPrompt, "the prompt as it is")
            .input("data", PortType::Dataset, "text to tune on, usually the student's own")
            .output("prompt", PortType::SoftPrompt, "the prompt after one update")
            .agree("vocabulary", &["teacher", "student", "data"])
            .agree("width", &["teacher", "prompt"])
    }

    fn outside_key(&self, config: &Config) -> Vec<&'static str> {
        training::outside_key(config.mean)
    }

    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "prompt", next: "prompt", valid: None })
    }

    fn start(&self, config: Config, _env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let rate = Rate::new(config.learning_rate, config.schedule, config.warmup, config.warmup_from_zero);
        let trainer = Trainer::new(rate, &config.optimizer, 0.0, state);
        Ok(Box::new(Tuning { trainer, config, warned: false }))
    }
}

struct Tuning {
    config: Config,
    trainer: Trainer,
    warned: bool,
}

/// The name of the prompt among the parameters of its optimiser.
const PROMPT: &str = "prompt_embeddings";

impl Operator for Tuning {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let teacher = inputs.take::<LanguageModel>("teacher")?.frozen().computed_in(self.config.dtype)?;
        let teacher = teacher.with_activation_checkpointing(self.config.activation_checkpointing);
        let student = inputs.take::<LanguageModel>("student")?.frozen().computed_in(self.config.dtype)?;
        let prompt = inputs.take::<SoftPrompt>("prompt")?;
        training::warn_of_empty_rows(&data, &mut self.warned, sink);

        // A new variable: whoever else holds the old prompt keeps it as it was.
        let vectors = Var::from_tensor(&prompt.vectors.copy()?)?;
        let parameters = IndexMap::from([(PROMPT.to_owned(), vectors.as_tensor().clone())]);
        let mut gradients = Gradients::default();
        let mut parts = Parts::default();
        let mut weight_sum = 0.0;
        let mut tokens = 0;
        let batches =
            training::micro_batches(&data, self.config.micro_batch, self.config.mean.unwrap_or(Mean::Tokens))?;
        if step.round == 0 {
            self.compare_start(&batches, &teacher, vectors.as_tensor(), &mut parts, sink)?;
        }
        for batch in &batches {
            let weight = self.regulariser_weight(step, batch);
            let gradient = self.batch(batch, weight, &teacher, &student, vectors.as_tensor(), step, &mut parts)?;
            lm::accumulate(&mut gradients, lm::gradients(&gradient, &parameters)?)?;
            weight_sum += weight / batch.of as f64;
            tokens += batch.text.tokens();
        }
        let mut row: Map<String, Json> = parts.into_row();
        row.insert("regulariser_weight".into(), json!(weight_sum));
        row.insert("tokens".into(), tokens.into());
        self.trainer.update(&parameters, &gradients, step, &mut row)?;
        sink.metrics(row);
        let tuned = SoftPrompt::new(vectors.as_tensor().detach(), &teacher)?;
        Ok(Outputs::new().with("prompt", tuned))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        self.trainer.state()
    }
}

impl Tuning {
    #[expect(clippy::too_many_arguments, reason = "the terms of one formula")]
    fn batch(
        &self,
        batch: &MicroBatch,
        weight: f64,
        teacher: &LanguageModel,
        student: &LanguageModel,
        vectors: &Tensor,
        step: &Step,
        parts: &mut Parts,
    ) -> Result<Tensor> {
        let Config { divergence, regulariser, seed, .. } = &self.config;
        let text = &batch.text;
        let dropout =
            training::dropout(self.config.teacher_dropout == Some(true), *seed, step, purpose::TEACHER_DROPOUT);
        let prompted = text.hidden(teacher, Some(vectors), dropout.as_ref())?; // [tokens, C of the teacher]
        let student_hidden = text.hidden(student, None, None)?; // [tokens, C]
        let plain = if regulariser.coefficient != 0.0 { Some(text.hidden(teacher, None, None)?) } else { None };
        let guide = Target {
            source: Source::Head { hidden: &student_hidden, head: student.head() },
            divergence: *divergence,
            coefficient: 1.0,
            temperature: 1.0,
        };
        let near = plain.as_ref().map(|hidden| Target {
            source: Source::Head { hidden, head: teacher.head() },
            divergence: regulariser.divergence,
            coefficient: weight,
            temperature: 1.0,
        });
        let targets: Vec<Target<'_>> = std::iter::once(guide).chain(near).collect();
        let weights = vec![batch.token_weight; text.tokens()];
        let loss = head_loss(&prompted, teacher.head(), None, &targets, &weights)?;
        parts.add("guidance", loss.divergences[0]);
        parts.add("loss", loss.divergences[0]);
        if let Some(regulariser) = loss.divergences.get(1) {
            parts.add("regulariser", *regulariser);
            parts.add("loss", weight * regulariser);
        }
        Ok(loss.loss)
    }

    fn regulariser_weight(&self, step: &Step, batch: &MicroBatch) -> f64 {
        let Regulariser { coefficient, schedule, count, .. } = &self.config.regulariser;
        let counted = match count {
            Some(Count::Published) if batch.of > 1 && batch.last => step.round + 2,
            Some(Count::Published) => step.round + 1,
            _ => step.round,
        };
        match schedule {
            Decay::Constant => *coefficient,
            Decay::LinearToZero => coefficient * (1.0 - counted as f64 / step.rounds as f64),
        }
    }

    /// Whether the start prompt harms the teacher: the loss of the plain and of the prompted one on the same text.
    fn compare_start(
        &self,
        batches: &[MicroBatch],
        teacher: &LanguageModel,
        vectors: &Tensor,
        parts: &mut Parts,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let vectors = vectors.detach();
        let loss = |text: &Aligned, prompt: Option<&Tensor>| -> Result<f64> {
            let probabilities = log_probs(&text.hidden(teacher, prompt, None)?, teacher.head(), &text.labels)?;
            Ok(-probabilities.iter().map(|&p| f64::from(p)).sum::<f64>())
        };
        let tokens: usize = batches.iter().map(|b| b.text.tokens()).sum();
        let (mut plain, mut prompted) = (0.0, 0.0);
        for batch in batches {
            plain += loss(&batch.text, None)? / tokens as f64;
            prompted += loss(&batch.text, Some(&vectors))? / tokens as f64;
        }
        ensure!(prompted.is_finite(), "the prompted teacher's loss is not finite at the start");
        parts.add("plain_teacher_loss", plain);
        parts.add("prompted_teacher_loss", prompted);
        let words = format!(
            "before tuning, the teacher's loss on this round's text is {plain:.3} plain and {prompted:.3} prompted"
        );
        if prompted > plain + 0.5 {
            sink.warn(&format!("{words}: the start prompt harms it"))
        } else {
            sink.note(&words)
        }
        Ok(())
    }
}
