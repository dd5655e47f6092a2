//! `distill`: the student learns from a teacher, plain or prompted, on given or generated text.
//!
//! ```yaml
//! learn:
//!   kind: distill
//!   in: {student: carry.student, teacher: teacher, prompt: tune.prompt, data: respond}
//!   with: {divergence: reverse-kl, learning_rate: 5e-4}
//! ```
//!
//! Loss: `weight` times the divergence between the student's and the teacher's distribution of every response token, plus
//! `cross_entropy` times the cross-entropy of the response. With half of each on given text and `forward-kl` this is
//! word-level KD; with `reverse-kl` on the student's own responses, and a prompt tuned for it, PromptKD (its section 3.3).
//!
//! On a fixed text the teacher need not run again and again: a `teacher-cache` on port `cache` stands for it. Where that
//! keeps hidden states, the student gets the same bits as from the teacher itself. Connect no `teacher` beside it: the
//! model would be read for nothing.
//!
//! With `view` the teacher reads other prompts before the same responses, such as those that `tokenize` primes: response
//! priming. Responses are aligned token by token, whatever stands before them.
//!
//! What the published program for response priming does instead is said by options: `alignment: index`, `pairing: lexicographic`,
//! `alpha` and `temperature_squared` for its loss, `optimizer: {method: sgd}`, and the schedule `{cosine: {falls_for: 0.5}}`.
//!
//! ```yaml
//! learn:
//!   kind: distill
//!   in: {student: carry.student, teachers: {maths: teacher-maths, prose: teacher-prose}, data: windows.batch}
//!   with: {divergence: forward-kl, route: {arithmetic: maths, geometry: maths, otherwise: prose}, learning_rate: 5e-4}
//! ```
//!
//! Of several `teachers` each row is learnt from one, by its family (`route`), or every token from all: then the divergence is
//! the sum of those from each, by `weights`. With `forward-kl` that has the gradient of the divergence from the mixture of
//! their distributions, with `reverse-kl` from their geometric mean: both ways in which teachers are averaged.
//!
//! The text on `contrast` is learnt beside `data`, in the same updates and with a divergence of its own: skewed forward KL on
//! what the teacher writes and skewed reverse KL on what the student writes is DistiLLM-2 (Ko et al., 2025, section 3).
//!
//! A teacher with another tokenizer is refused, unless `alignment: bytes` says that its tokens are matched with the student's by what
//! they spell, and `view` has the same rows in the teacher's tokens: their prompts are what it reads. Responses are put into the
//! shortest groups of tokens that spell the same bytes. Where a group has one token of each side, the teacher's distribution is
//! compared with the student's over the tokens with which the student begins to spell the teacher's; where it has several, their
//! probabilities are multiplied, and the two are compared as those of an event and its opposite. With one tokenizer on both sides that is
//! `alignment: response`. Unlike in GOLD, every comparison is of distributions, and no probabilities are compared by their rank. `aligned`
//! is the share of response tokens that are in a group.
//!
//! `hidden_states` adds a loss on what comes out of pairs of layers. `diagnostics` measures in every update how far the two agree
//! on its text, before the update: of each token the share of the student's likeliest tokens that are among the teacher's
//! (`overlap`), the probability that the student gives to the teacher's (`mass`) and the teacher to the student's
//! (`teacher_mass`), the entropy of both; and of the rows the mean `length` and the share that `ended` with an end token.
//!
//! Inputs: `student`, `data`, `teacher` and its soft prompt, `teachers`, or `cache`; `view`; `contrast`. Outputs: `model`, and a
//! row of metrics an update. Cost: a forward pass of the teacher (with a cache its head, or nothing), a forward and a backward
//! pass of the student; with `contrast` the same for that text.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use candle_core::{Device, Tensor};
use contract::random::purpose;
use contract::{
    About, Alone, AnyValue, Cause, ConfigError, Conventions, Dataset, Env, Inputs, Operator, Outlook, Outputs,
    PortType, Ports, Result, Sink, Stage, Step, limits,
};
use lm::loss::{Agreement, Divergence, Source, Target, head_loss};
use lm::{Architecture, Dropout, Head, Keep, LanguageModel, Lora, Projections, Prompts, SoftPrompt, TeacherCache};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::across::{Across, Comparison, Side};
use crate::aligned::{Aligned, Alignment, Pairing, View};
use crate::evaluate;
use crate::finite::Behind;
use crate::foresight;
use crate::hidden_states::{self, HiddenStates};
use crate::padding::Padding;
use crate::teachers::{self, By, Heard, Lesson, Teachers};
use crate::training::{self, Beside, MicroBatch, Parts, Trainer, Training};

training::config! {
    /// The `with` of `distill`.
    pub struct Config {
        /// Divergence between student and teacher at every response token; `reverse-kl` is KL(student || teacher).
        pub divergence: Divergence,
        /// What the divergence counts in the loss.
        #[serde(default = "one")]
        #[schemars(range(min = 0.0, max = contract::limits::WEIGHT))]
        pub weight: f64,
        /// What the cross-entropy of the response counts in the loss.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = contract::limits::WEIGHT))]
        pub cross_entropy: f64,
        /// The share of the cross-entropy in the loss, of which the divergence has the rest: one number in place of `weight` and
        /// `cross_entropy`.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub alpha: Option<f64>,
        /// Temperature of both distributions in the divergence. Gradients shrink with its square; `temperature_squared` makes up
        /// for that.
        #[serde(default = "one")]
        #[schemars(range(min = contract::limits::TEMPERATURE.0, max = contract::limits::TEMPERATURE.1))]
        pub temperature: f64,
        /// Whether the divergence is multiplied by the square of `temperature` (Hinton et al., 2015, section 2).
        #[serde(default)]
        pub temperature_squared: bool,
        /// Where the two are compared.
        #[serde(default)]
        pub alignment: Alignment,
        /// Which row of `view` the teacher reads.
        #[serde(default)]
        pub pairing: Pairing,
        /// What each of several `teachers` counts, by its name. Left out: all alike.
        #[serde(default)]
        #[schemars(schema_with = "weights_schema")]
        pub weights: BTreeMap<String, f64>,
        /// Which of several `teachers` a row is learnt from: their names by its family, `otherwise` for all other families. A family
        /// that is not named has the teacher of its own name. `tokenize` keeps families with `keep_family`.
        #[serde(default)]
        pub route: Option<BTreeMap<String, String>>,
        /// How the text on `contrast` is learnt.
        #[serde(default)]
        pub contrast: Option<Contrast>,
        /// A loss on hidden states beside that on the next token.
        #[serde(default)]
        pub hidden_states: Option<crate::hidden_states::HiddenStates>,
        /// Measures in every update how far student and teacher agree.
        #[serde(default)]
        pub diagnostics: Option<Diagnostics>,
        /// Shape of a student with random weights; for when no `student` is connected.
        #[serde(default)]
        pub init: Option<Architecture>,
        /// Train a low-rank adapter, and leave the student's own weights as they are, quantised ones too. What comes out is the
        /// student with it.
        #[serde(default)]
        pub lora: Option<Lora>,
        /// Whether the student's dropout is on; its rates are the model's (a new model's are 0 unless `init` says otherwise).
        #[serde(default = "yes")]
        pub dropout: bool,
        /// Whether the rows of `cache` must have the prompts that the student reads, `same`, or `any`: for a teacher that is to
        /// read another text before the responses (response priming).
        #[serde(default)]
        pub cache_prompts: Prompts,
        /// Which prompt the teacher uses in the micro-batches before the last: `new`, or `old` as in the published program,
        /// whose prompt steps at the end of the round (connect `prompt_before`). Left out: as the conventions say.
        #[serde(default)]
        pub accumulation_prompt: Option<AccumulationPrompt>,
    }
}

/// How a second text is learnt.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Contrast {
    /// Divergence at its response tokens.
    pub divergence: Divergence,
    /// What the divergence counts in the loss, averaged over the response tokens of this text.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0, max = contract::limits::WEIGHT))]
    pub weight: f64,
}

/// How agreement is measured. The output heads of both are multiplied with once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Diagnostics {
    /// How many of the likeliest tokens are compared.
    #[serde(default = "default_top_k")]
    #[schemars(range(min = 1, max = contract::limits::VOCABULARY))]
    pub top_k: usize,
}

fn default_top_k() -> usize {
    16
}

fn weights_schema(_: &mut SchemaGenerator) -> Schema {
    let weight = json!({"type": "number", "minimum": 0.0, "maximum": limits::WEIGHT});
    json_schema!({"type": "object", "additionalProperties": weight})
}

/// Which prompt the teacher uses while micro-batches accumulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AccumulationPrompt {
    /// The prompt as this round tuned it.
    New,
    /// The prompt as the round found it, but for the last micro-batch.
    Old,
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

/// The kind.
pub struct Distill;

impl Stage for Distill {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "distill",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "trains a student against a teacher, plain or prompted, on given or generated text",
            example: "kind: distill\nin: {student: carry.student, teacher: teacher, prompt: tune.prompt, data: respond}\nwith: {divergence: reverse-kl, learning_rate: 5e-4}",
            reads_clock: true,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.fill_settings(conventions);
        config.init = config.init.take().map(Architecture::without_defaults);
        config.optimizer.fill_for_model(conventions);
        config.accumulation_prompt.get_or_insert(match conventions {
            Conventions::Sound => AccumulationPrompt::New,
            Conventions::Reference => AccumulationPrompt::Old,
        });
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if let Err(error) = config.divergence.validate() {
            errors.push(ConfigError::at("divergence", format!("{error:#}")));
        }
        if let Some(Err(error)) = config.contrast.map(|contrast| contrast.divergence.validate()) {
            errors.push(ConfigError::at("contrast.divergence", format!("{error:#}")));
        }
        if config.route.is_some() && !config.weights.is_empty() {
            errors.push(
                ConfigError::at("weights", "`weights` and `route` both say who of the `teachers` is learnt from")
                    .hint("keep one of the two"),
            );
        }
        if config.alpha.is_some() && (config.weight, config.cross_entropy) != (1.0, 0.0) {
            errors.push(
                ConfigError::at("alpha", "`alpha` stands for `weight` and `cross_entropy`, and they are given too")
                    .hint("leave out one or the other"),
            );
        }
        let beside = config.hidden_states.is_some() || config.contrast.is_some();
        if config.weight == 0.0 && config.cross_entropy == 0.0 && !beside {
            errors.push(
                ConfigError::at("weight", "`weight` and `cross_entropy` are both 0, so the loss is 0")
                    .hint("leave `weight` out to learn from the teacher"),
            );
        }
        errors.extend(training::validate_init(config.init.as_ref()));
        errors.extend(config.optimizer.errors());
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("data", PortType::Dataset, "text to learn on: given, or written by a model")
            .optional("student", PortType::Model, "the student; without it, `init` says the shape")
            .optional("teacher", PortType::Model, "the teacher, frozen")
            .several("teachers", PortType::Model, "teachers, frozen, for `route` or `weights`")
            .optional("cache", PortType::TeacherCache, "what the teacher says of a fixed text, in place of running it")
            .optional("view", PortType::Dataset, "rows of the same ids whose prompts the teacher reads instead")
            .optional("contrast", PortType::Dataset, "text that is learnt in another way beside `data`")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the teacher")
            .optional(
                "prompt_before",
                PortType::SoftPrompt,
                "the prompt as the round found it, for `accumulation_prompt: old`",
            )
            .output("model", PortType::Model, "the trained student")
            .one_of(&["teacher", "cache", "teachers"])
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        training::OUTSIDE_KEY.to_vec()
    }

    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "student", next: "model", check: Some(evaluate::check_of_loss()) })
    }

    fn load_state(&self, folder: &Path, env: &Env) -> Result<AnyValue> {
        hidden_states::State::load(folder, env)
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let model = foresight::learner(
            outlook,
            "student",
            config.init.as_ref(),
            "data",
            config.lora.as_ref(),
            config.activation_checkpointing,
        );
        foresight::effective_batch(outlook, config.effective_batch, None);
        foresight::computes_in(outlook, config.dtype);
        outlook.output("model", model);
        config.foresee_contrast(outlook);
        if let Some(hidden_states) = &config.hidden_states {
            hidden_states.foresee(outlook);
        }
        if config.alignment == Alignment::Bytes {
            foresight::teacher_of_other_tokens(outlook);
            config.foresee_bytes(outlook);
        } else {
            teachers::foresee(outlook, config.by());
        }
        if outlook.has("cache") {
            outlook.same_vocabulary(&["data", "cache", "teacher"]);
            outlook.holds("teacher");
            if outlook.has("teacher") && !outlook.has("contrast") {
                outlook.warn(
                    [Cause::Input("teacher".into(), "model".into())],
                    "`teacher` is read whole, and not used beside `cache`",
                    "leave out the input `teacher`: the cache holds all that is learnt from",
                );
            }
        } else if outlook.has("teacher") && config.alignment != Alignment::Bytes {
            foresight::teacher(outlook, "teacher", Some("prompt"));
        }
        if config.alignment != Alignment::Response && outlook.has("cache") {
            outlook.error(
                [Cause::Field("alignment".into())],
                "a cache holds what the teacher says of responses alone",
                "connect `teacher` in place of `cache`",
            );
        }
        if config.pairing != Pairing::Id && !outlook.has("view") {
            outlook.error(
                [Cause::Field("pairing".into())],
                "without `view` the teacher reads what its student reads, and there is nothing to pair",
                "connect `view`, or leave `pairing` out",
            );
        }
        let accumulates = config.micro_batch.is_some_and(|rows| outlook.input("data").row_count().least > rows);
        let old = config.accumulation_prompt == Some(AccumulationPrompt::Old);
        if old && accumulates && outlook.has("prompt") && !outlook.has("prompt_before") {
            outlook.error(
                [Cause::Field("accumulation_prompt".into()), Cause::Field("micro_batch".into())],
                "`accumulation_prompt: old` needs the prompt as the round found it",
                "connect `prompt_before` to the carried prompt, or set `accumulation_prompt: new`",
            );
        }
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let (optimizer, projections) = state.map(hidden_states::State::split).unzip();
        let trainer = Trainer::new(config.settings(), 1e-2, optimizer);
        let device = lm::device(&env.device)?;
        let (projections, padding) = (projections.flatten(), Padding::default());
        Ok(Box::new(Distilling { device, trainer, config, cached: None, across: None, projections, padding }))
    }
}

struct Distilling {
    config: Config,
    device: Device,
    trainer: Trainer,
    /// The head of a cache, once that has been looked at; none for the likeliest tokens.
    cached: Option<Option<Head>>,
    /// The tokenizers, once they have been looked at, for `alignment: bytes`.
    across: Option<Arc<Across>>,
    /// From the student's channels to the teacher's, once both are known.
    projections: Option<Projections>,
    padding: Padding,
}

impl Operator for Distilling {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let contrast = inputs.take_optional::<Dataset>("contrast")?;
        let cache = inputs.take_optional::<TeacherCache>("cache")?;
        let view = View::take(&mut inputs)?.map(|view| view.paired(self.config.pairing));
        ensure!(
            view.is_none() || cache.is_none(),
            "`view` does nothing beside `cache`: connect it where the cache is made"
        );
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?;
        let prompt_before = inputs.take_optional::<SoftPrompt>("prompt_before")?;
        let (config, settings) = (self.config.clone(), self.config.settings());
        let (data, view) = config.alignment.rows(data, view)?;
        let shape = (config.init.as_ref(), config.lora.as_ref());
        let student = training::learner(&mut inputs, "student", shape, &settings, &data, &self.device)?;
        let cached = match &cache {
            Some(cache) if contrast.is_none() => {
                let teacher = inputs.take_optional::<LanguageModel>("teacher")?;
                self.head_of(cache, teacher.as_deref(), prompt.is_some())?
            }
            Some(cache) => self.head_of(cache, None, prompt.is_some())?,
            None => None,
        };
        let other = match config.alignment {
            Alignment::Bytes => Some(self.other(&mut inputs, &student)?),
            _ => None,
        };
        let teachers = Teachers::take(&mut inputs, &data, config.by(), config.dtype, &student)?;
        let own = student.output_head()?;
        if let Some(head) = &cached {
            self.padding.say("student", &own, "cache", head, sink);
        }
        for (port, head) in teachers.iter().flat_map(Teachers::heads) {
            self.padding.say("student", &own, &port, head, sink);
        }
        let cached = cached.map(|head| head.beside(student.vocab_size())).transpose()?;
        if let (Some(states), None) = (&config.hidden_states, &self.projections) {
            let width = teachers.as_ref().and_then(Teachers::width).context("there is no `teacher` to compare with")?;
            self.projections = Some(states.projections(&student, width, config.seed)?);
        }
        let parameters = hidden_states::all_of(&student, self.projections.as_ref());

        let teaching = prompt.as_ref().map(|prompt| prompt.vectors.detach());
        let models = teachers.iter().flat_map(Teachers::models);
        let models: Vec<_> = models.chain(other.iter().map(|other| ("teacher".to_owned(), &other.teacher))).collect();
        let behind = models.iter().map(|(port, model)| Behind::new(port, model, teaching.as_ref()));
        let behind: Vec<Behind<'_>> = [Behind::new("student", &student, None)].into_iter().chain(behind).collect();
        let dropout = training::dropout(config.dropout, config.seed, step, purpose::DROPOUT);
        let Config { temperature, alignment, .. } = config;
        let projections = self.projections.as_ref();
        let learning = Learning { student: &student, temperature, alignment, dropout, projections };
        let layers = config.hidden_states.as_ref().map(HiddenStates::of_teacher).unwrap_or_default();
        let none = "none of the rows of `contrast` has a response token";
        let mut beside = contrast.as_ref().map(|data| Beside::new(&data.rows, settings.mean(), none)).transpose()?;
        let mut row = self.trainer.update(&parameters, &data, step, sink, &behind, |batch, parts| {
            let prompt = config.prompt_of(batch, prompt.as_ref(), prompt_before.as_ref())?;
            if let Some(other) = &other {
                return config.loss_across(other, batch, &learning, prompt.as_ref(), view.as_ref(), parts);
            }
            let taught = |text: &Aligned, layers: &[usize]| match &teachers {
                Some(teachers) => teachers.lessons(text, |teacher, text| {
                    let read = text.seen_by(view.as_ref())?;
                    alignment.read(&read).states(teacher, prompt.as_ref(), None, layers)
                }),
                None => bail!("there is nothing to learn from: connect `teacher`, `teachers` or `cache`"),
            };
            let lessons = match &cache {
                Some(cache) => {
                    let said = cache.read(&batch.text.rows(), config.cache_prompts, &self.device)?;
                    let heard = Heard { name: None, share: 1.0, said, head: cached.as_ref(), states: Vec::new() };
                    vec![Lesson { tokens: None, heard: vec![heard] }]
                }
                None => taught(&batch.text, &layers)?,
            };
            let mut loss = learning.loss(&Task::of(&config), &batch.text, batch.token_weight, &lessons, parts)?;
            let next = beside.as_mut().and_then(|beside| beside.next(batch));
            if let (Some((text, weight)), Some(contrast)) = (next, config.contrast) {
                let task = Task::of_contrast(contrast);
                loss = (loss + learning.loss(&task, &text, weight, &taught(&text, &[])?, parts)?)?;
            }
            Ok(loss)
        })?;
        if config.diagnostics.is_some() {
            let rows = data.rows.len().max(1) as f64;
            let ended = data.rows.iter().filter(|row| row.end == contract::End::Stop).count();
            row.insert("ended".into(), json!(ended as f64 / rows));
            let tokens: usize = data.rows.iter().map(|row| row.response.len()).sum();
            row.insert("length".into(), json!(tokens as f64 / rows));
        }
        sink.metrics(row);
        Ok(Outputs::new().with("model", student))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        let optimizer = self.trainer.state()?;
        Ok(match (&self.projections, optimizer) {
            (Some(projections), Some(optimizer)) if !projections.0.is_empty() => {
                Some(Arc::new(hidden_states::State { optimizer, projections: projections.copy()? }))
            }
            (_, optimizer) => optimizer,
        })
    }
}

/// A teacher with another tokenizer.
struct Other {
    across: Arc<Across>,
    teacher: LanguageModel,
    /// `[V, C]`, of the tokens it has.
    head: Tensor,
}

impl Distilling {
    /// The teacher on `teacher`, whose tokenizer is another; the two are looked at once.
    fn other(&mut self, inputs: &mut Inputs, student: &LanguageModel) -> Result<Other> {
        let teacher =
            inputs.take_optional::<LanguageModel>("teacher")?.context("`alignment: bytes` needs `teacher`")?;
        let teacher = teacher.frozen().computed_in(self.config.dtype)?;
        let across = match &self.across {
            Some(across) => Arc::clone(across),
            None => Arc::new(Across::new(&student.tokenizer, &teacher.tokenizer)?),
        };
        let head = teacher.output_head()?.of_tokens()?;
        Ok(Other { across: Arc::clone(self.across.insert(across)), teacher, head })
    }

    /// The head that the hidden states of a cache are multiplied with. A cache and what is connected beside it make sense in
    /// one way only.
    fn head_of(&mut self, cache: &TeacherCache, teacher: Option<&LanguageModel>, prompt: bool) -> Result<Option<Head>> {
        if let Some(head) = &self.cached {
            return Ok(head.clone());
        }
        ensure!(
            !prompt,
            "`prompt` does nothing beside `cache`, which holds what the teacher said when it was made: connect the \
             prompt to the `teacher-cache` stage, or learn without a cache"
        );
        let (learnt, kept) = (self.config.temperature, cache.facts.temperature);
        match (cache.facts.keep, teacher) {
            (Keep::Hidden, None) => {}
            (Keep::Hidden, Some(teacher)) => cache.check_head(teacher)?,
            (Keep::TopK(_), Some(_)) => {
                bail!("the cache keeps the likeliest tokens, so no teacher is needed: remove the input `teacher`")
            }
            (Keep::TopK(_), None) => ensure!(
                learnt == kept,
                "`temperature` is {learnt}, and the cache keeps the likeliest tokens at temperature {kept}: give both \
                 stages the same, or let the cache `keep: hidden`"
            ),
        }
        let head = cache.head(&self.device)?.map(|head| head.computed_in(self.config.dtype)).transpose()?;
        Ok(self.cached.insert(head).clone())
    }
}

/// What is learnt of a text.
#[derive(Clone)]
struct Task {
    divergence: Divergence,
    weight: f64,
    cross_entropy: f64,
    hidden_states: Option<HiddenStates>,
    diagnostics: Option<Diagnostics>,
    /// Before the names of its parts in metrics.
    prefix: &'static str,
}

impl Task {
    fn of(config: &Config) -> Self {
        let Config { divergence, diagnostics, ref hidden_states, .. } = *config;
        let (weight, cross_entropy) = config.weights();
        Task { divergence, weight, cross_entropy, hidden_states: hidden_states.clone(), diagnostics, prefix: "" }
    }

    fn of_contrast(Contrast { divergence, weight }: Contrast) -> Self {
        let (hidden_states, diagnostics) = (None, None);
        Task { divergence, weight, cross_entropy: 0.0, hidden_states, diagnostics, prefix: "contrast_" }
    }
}

/// The student as it learns.
struct Learning<'a> {
    student: &'a LanguageModel,
    temperature: f64,
    alignment: Alignment,
    dropout: Option<Dropout>,
    projections: Option<&'a Projections>,
}

impl Learning<'_> {
    /// The loss of a text of whose tokens each counts `token_weight`.
    fn loss(
        &self,
        task: &Task,
        text: &Aligned,
        token_weight: f32,
        lessons: &[Lesson<'_>],
        parts: &mut Parts,
    ) -> Result<Tensor> {
        let Task { divergence, weight, cross_entropy, ref hidden_states, diagnostics, prefix } = *task;
        let layers = hidden_states.as_ref().map(HiddenStates::of_student).unwrap_or_default();
        let read = self.alignment.read(text);
        let (hidden, states) = read.states(self.student, None, self.dropout.as_ref(), &layers)?; // [tokens, C]
        let head = self.student.head()?;
        let name = format!("{prefix}{}", divergence.name());
        let mut total: Option<Tensor> = None;
        for lesson in lessons {
            let targets = lesson.heard.iter().map(|heard| {
                let coefficient = weight * heard.share;
                Ok(Target { source: heard.source()?, divergence, coefficient, temperature: self.temperature })
            });
            let targets: Vec<Target<'_>> = targets.collect::<Result<_>>()?;
            let labels = lesson.labels_of(&text.labels);
            let weights = vec![token_weight; labels.len()];
            let labels = (cross_entropy != 0.0).then_some((labels.as_slice(), cross_entropy));
            let own = lesson.rows_of(&hidden)?;
            let found = head_loss(&own, &head, labels, &targets, &weights)?;
            if let Some(Diagnostics { top_k }) = diagnostics {
                for heard in &lesson.heard {
                    let Source::Head { hidden, head: other } = heard.source()? else {
                        bail!("`diagnostics` need whole distributions, and the cache keeps the likeliest tokens alone")
                    };
                    let agreement = Agreement::of([&own, &head], [hidden, other], top_k)?;
                    let share = heard.share * f64::from(token_weight);
                    for (name, sum) in named(agreement) {
                        parts.add(name, share * sum);
                    }
                }
            }
            for (heard, value) in lesson.heard.iter().zip(&found.divergences) {
                parts.add(&name, heard.share * value);
                if let Some(teacher) = heard.name {
                    parts.add(&format!("{name}_{teacher}"), *value);
                }
                parts.add("loss", weight * heard.share * value);
            }
            if let Some(value) = found.cross_entropy {
                parts.add("cross_entropy", value);
                parts.add("loss", cross_entropy * value);
            }
            total = Some(match total {
                None => found.loss,
                Some(total) => (total + found.loss)?,
            });
            if let Some((wanted, [heard])) = hidden_states.as_ref().zip(lesson.heard.first_chunk::<1>()) {
                let projections = self.projections.context("there are no projections")?;
                let (loss, value) = wanted.loss(&states, &heard.states, projections, token_weight)?;
                parts.add(wanted.name(), value);
                parts.add("loss", wanted.weight * value);
                total = total.map(|total| total + loss).transpose()?;
            }
        }
        total.context("a text without tokens")
    }
}

/// The numbers of an agreement, by their names in metrics.
fn named(agreement: Agreement) -> [(&'static str, f64); 5] {
    let Agreement { overlap, mass, target_mass, entropy, target_entropy } = agreement;
    [
        ("overlap", overlap),
        ("mass", mass),
        ("teacher_mass", target_mass),
        ("entropy", entropy),
        ("teacher_entropy", target_entropy),
    ]
}

impl Config {
    /// What decides between several teachers.
    fn by(&self) -> By<'_> {
        self.route.as_ref().map_or(By::Weights(&self.weights), By::Route)
    }

    /// What has no meaning where tokens are not the same.
    fn foresee_bytes(&self, outlook: &mut Outlook) {
        let wanted = [("hidden_states", self.hidden_states.is_some()), ("diagnostics", self.diagnostics.is_some())];
        for (field, _) in wanted.iter().filter(|(_, is_there)| *is_there) {
            outlook.error(
                [Cause::Field((*field).into()), Cause::Field("alignment".into())],
                format!("`{field}` compares token by token, which teachers with other tokens do not have"),
                format!("leave out `{field}`, or `alignment`"),
            );
        }
    }

    fn foresee_contrast(&self, outlook: &mut Outlook) {
        if outlook.has("contrast") != self.contrast.is_some() {
            let (message, hint) = match self.contrast {
                Some(_) => {
                    ("nothing comes in by `contrast`", "connect a dataset to `contrast`, or leave the setting out")
                }
                None => ("nothing says how `contrast` is learnt", "`with: {contrast: {divergence: ...}}`"),
            };
            outlook.error([Cause::Field("contrast".into())], message, hint);
            return;
        }
        if self.contrast.is_some() {
            if self.alignment != Alignment::Response {
                outlook.error(
                    [Cause::Field("alignment".into())],
                    "`contrast` is compared at its responses, and `data` elsewhere",
                    "leave one of the two out",
                );
            }
            outlook.same_vocabulary(&["data", "contrast"]);
            for port in ["student", "teacher"] {
                outlook.reads(port, None, &outlook.rows("contrast"));
            }
        }
    }

    /// What the divergence and the cross-entropy count in the loss.
    fn weights(&self) -> (f64, f64) {
        let (weight, cross_entropy) =
            self.alpha.map_or((self.weight, self.cross_entropy), |alpha| (1.0 - alpha, alpha));
        let scale = if self.temperature_squared { self.temperature * self.temperature } else { 1.0 };
        (weight * scale, cross_entropy)
    }

    /// The loss of some rows with a teacher that has another tokenizer.
    fn loss_across(
        &self,
        other: &Other,
        batch: &MicroBatch,
        learning: &Learning<'_>,
        prompt: Option<&Tensor>,
        view: Option<&View>,
        parts: &mut Parts,
    ) -> Result<Tensor> {
        let Other { across, teacher, head } = other;
        let view = view.context("`alignment: bytes` needs `view`: the rows in the teacher's tokens")?;
        let vectors = prompt.map_or(Ok(0), |prompt| prompt.dim(0))?;
        let room = teacher.config.positions().saturating_sub(vectors);
        let read = across.pair(&batch.text.rows(), view, room)?;
        let said = read.text.hidden(teacher, prompt, None)?;
        let teacher = Side { hidden: &said, head, labels: &read.text.labels };
        let hidden = batch.text.hidden(learning.student, None, learning.dropout.as_ref())?; // [tokens, C]
        let head = learning.student.head()?;
        let student = Side { hidden: &hidden, head: &head, labels: &batch.text.labels };
        let Task { divergence, weight, cross_entropy, .. } = Task::of(self);
        let comparison = Comparison { divergence, coefficient: weight, temperature: self.temperature };
        let weights = batch.weights();
        let (mut loss, distance) = across.loss(&read.groups, student, teacher, comparison, &weights)?;
        parts.add(divergence.name(), distance);
        parts.add("loss", weight * distance);
        let grouped: usize = read.groups.iter().map(|group| group.student.len()).sum();
        parts.add("aligned", grouped as f64 / batch.tokens_of_batch as f64);
        if cross_entropy != 0.0 {
            let labels = Some((student.labels, cross_entropy));
            let of_labels = head_loss(&hidden, &head, labels, &[], &weights)?;
            let value = of_labels.cross_entropy.context("there are labels")?;
            parts.add("cross_entropy", value);
            parts.add("loss", cross_entropy * value);
            loss = (loss + of_labels.loss)?;
        }
        Ok(loss)
    }

    /// The soft prompt that the teacher has in a micro-batch.
    fn prompt_of(
        &self,
        batch: &MicroBatch,
        prompt: Option<&Arc<SoftPrompt>>,
        prompt_before: Option<&Arc<SoftPrompt>>,
    ) -> Result<Option<Tensor>> {
        let old = self.accumulation_prompt == Some(AccumulationPrompt::Old);
        let chosen = match (prompt, prompt_before) {
            (Some(_), None) if old && batch.of > 1 => bail!(
                "`accumulation_prompt: old` needs the prompt as the round found it: connect `prompt_before` to the \
                 carried prompt, or set `accumulation_prompt: new`"
            ),
            (Some(_), Some(before)) if old && !batch.last => Some(before),
            (prompt, _) => prompt,
        };
        Ok(chosen.map(|prompt| prompt.vectors.detach()))
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod update_tests;
