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

use std::path::Path;

use candle_core::{Tensor, Var};
use contract::limits;
use contract::random::purpose;
use contract::{
    About, Alone, AnyValue, ConfigError, Conventions, Dataset, Env, Inputs, Operator, Outlook, Outputs, PortType,
    Ports, Result, Sink, Stage, Step,
};
use indexmap::IndexMap;
use lm::loss::{Divergence, Source, Target, head_loss, log_probs};
use lm::{LanguageModel, SoftPrompt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::aligned::Aligned;
use crate::finite::Behind;
use crate::foresight;
use crate::padding::Padding;
use crate::training::{self, MicroBatch, Parts, Trainer, Training};

training::config! {
    /// The `with` of `prompt-tune`.
    pub struct Config {
        /// Divergence between the prompted teacher and the student; `reverse-kl` is KL(prompted teacher || student).
        #[serde(default = "reverse_kl")]
        pub divergence: Divergence,
        /// Keeps the prompted teacher near the plain one.
        #[serde(default)]
        pub regulariser: Regulariser,
        /// Whether the teacher's dropout is on; left out: as the conventions say.
        #[serde(default)]
        pub teacher_dropout: Option<bool>,
    }
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
    #[schemars(range(min = 0.0, max = limits::WEIGHT))]
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
        config.fill_settings(conventions);
        config.teacher_dropout.get_or_insert(reference);
        config.regulariser.count.get_or_insert(if reference { Count::Published } else { Count::Updates });
        config.optimizer.weight_decay.get_or_insert(if reference { 1e-2 } else { 0.0 });
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = config.optimizer.errors();
        let divergences =
            [("divergence", config.divergence), ("regulariser.divergence", config.regulariser.divergence)];
        for (field, divergence) in divergences {
            if let Err(error) = divergence.validate() {
                errors.push(ConfigError::at(field, format!("{error:#}")));
            }
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
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        training::OUTSIDE_KEY.to_vec()
    }

    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "prompt", next: "prompt", check: None })
    }

    fn load_state(&self, folder: &Path, env: &Env) -> Result<AnyValue> {
        Trainer::load_state(folder, env)
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        foresight::reader(outlook, "teacher", Some("prompt"), "data");
        foresight::reader(outlook, "student", None, "data");
        foresight::effective_batch(outlook, config.effective_batch, None);
        foresight::computes_in(outlook, config.dtype);
        outlook.output("prompt", outlook.input("prompt"));
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, _env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Tuning {
            trainer: Trainer::new(config.settings(), 0.0, state),
            config,
            padding: Padding::default(),
        }))
    }
}

struct Tuning {
    config: Config,
    trainer: Trainer,
    padding: Padding,
}

/// The name of the prompt among the parameters of its optimiser.
const PROMPT: &str = "prompt_embeddings";

impl Operator for Tuning {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let config = &self.config;
        let data = inputs.take::<Dataset>("data")?;
        let teacher = inputs.take::<LanguageModel>("teacher")?.frozen().computed_in(config.dtype)?;
        let teacher = teacher.with_activation_checkpointing(config.activation_checkpointing);
        let student = inputs.take::<LanguageModel>("student")?.frozen().computed_in(config.dtype)?;
        let prompt = inputs.take::<SoftPrompt>("prompt")?;
        self.padding.say("teacher", &teacher.output_head()?, "student", &student.output_head()?, sink);

        // A new variable: whoever else holds the old prompt keeps it as it was.
        let vectors = Var::from_tensor(&prompt.vectors.copy()?)?.into_inner();
        let parameters = IndexMap::from([(PROMPT.to_owned(), vectors.clone())]);
        let behind = [
            Behind::new("teacher", &teacher, None),
            Behind::new("teacher", &teacher, Some(&vectors)),
            Behind::new("student", &student, None),
        ];
        let row = self.trainer.update(&parameters, &data, step, sink, &behind, |batch, parts| {
            if step.round == 0 {
                measure_start(batch, &teacher, &vectors, parts)?;
            }
            config.loss(batch, &teacher, &student, &vectors, step, parts)
        })?;
        if step.round == 0 {
            say_start(&row, sink);
        }
        sink.metrics(row);
        let tuned = SoftPrompt::new(vectors.detach(), &teacher)?;
        Ok(Outputs::new().with("prompt", tuned))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        self.trainer.state()
    }
}

impl Config {
    /// Guidance and regulariser of some rows.
    fn loss(
        &self,
        batch: &MicroBatch,
        teacher: &LanguageModel,
        student: &LanguageModel,
        vectors: &Tensor,
        step: &Step,
        parts: &mut Parts,
    ) -> Result<Tensor> {
        let Config { divergence, regulariser, .. } = self;
        let (text, weight) = (&batch.text, self.regulariser_weight(step, batch));
        let dropout = training::dropout(self.teacher_dropout == Some(true), self.seed, step, purpose::TEACHER_DROPOUT);
        let prompted = text.hidden(teacher, Some(vectors), dropout.as_ref())?; // [tokens, C of the teacher]
        let student_hidden = text.hidden(student, None, None)?; // [tokens, C]
        let plain = if regulariser.coefficient != 0.0 { Some(text.hidden(teacher, None, None)?) } else { None };
        let student_head = student.output_head()?.beside(teacher.vocab_size())?;
        let guide = Target {
            source: Source::Head { hidden: &student_hidden, head: &student_head },
            divergence: *divergence,
            coefficient: 1.0,
            temperature: 1.0,
        };
        let head = teacher.head()?;
        let near = plain.as_ref().map(|hidden| Target {
            source: Source::Head { hidden, head: &head },
            divergence: regulariser.divergence,
            coefficient: weight,
            temperature: 1.0,
        });
        let targets: Vec<Target<'_>> = std::iter::once(guide).chain(near).collect();
        let loss = head_loss(&prompted, &head, None, &targets, &batch.weights())?;
        parts.add("guidance", loss.divergences[0]);
        parts.add("loss", loss.divergences[0]);
        if let Some(regulariser) = loss.divergences.get(1) {
            parts.add("regulariser", *regulariser);
            parts.add("loss", weight * regulariser);
        }
        parts.add("regulariser_weight", weight / batch.of as f64);
        Ok(loss.loss)
    }

    fn regulariser_weight(&self, step: &Step, batch: &MicroBatch) -> f64 {
        let Regulariser { coefficient, schedule, count, .. } = &self.regulariser;
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
}

const PLAIN_LOSS: &str = "plain_teacher_loss";
const PROMPTED_LOSS: &str = "prompted_teacher_loss";

/// The loss of the plain and of the prompted teacher on the same text, a mean over the tokens of the effective batch.
fn measure_start(batch: &MicroBatch, teacher: &LanguageModel, vectors: &Tensor, parts: &mut Parts) -> Result<()> {
    let vectors = vectors.detach();
    for (name, prompt) in [(PLAIN_LOSS, None), (PROMPTED_LOSS, Some(&vectors))] {
        let text: &Aligned = &batch.text;
        let probabilities = log_probs(&text.hidden(teacher, prompt, None)?, &teacher.head()?, &text.labels)?;
        let loss = -probabilities.iter().map(|&p| f64::from(p)).sum::<f64>();
        parts.add(name, loss / batch.tokens_of_batch as f64);
    }
    Ok(())
}

/// Says whether the start prompt harms the teacher.
fn say_start(row: &Map<String, Json>, sink: &mut dyn Sink) {
    let [plain, prompted] = [PLAIN_LOSS, PROMPTED_LOSS].map(|name| row[name].as_f64().unwrap_or(f64::NAN));
    let words = format!(
        "before tuning, the teacher's loss on this round's text is {plain:.3} plain and {prompted:.3} prompted"
    );
    if prompted > plain + 0.5 {
        sink.warn(&format!("{words}: the start prompt harms it"));
    } else {
        sink.note(&words);
    }
}
