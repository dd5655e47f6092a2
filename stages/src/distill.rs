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
use lm::loss::{Divergence, Target, head_loss};
use lm::{Architecture, Dropout, Head, Keep, LanguageModel, Lora, Prompts, SoftPrompt, TeacherCache};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::aligned::{Aligned, Alignment, Pairing, View};
use crate::evaluate;
use crate::finite::Behind;
use crate::foresight;
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
        if config.weight == 0.0 && config.cross_entropy == 0.0 {
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
        Trainer::load_state(folder, env)
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
        foresight::computes_in(outlook, config.dtype);
        outlook.output("model", model);
        teachers::foresee(outlook, config.by());
        config.foresee_contrast(outlook);
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
        } else if outlook.has("teacher") {
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

    fn needs(&self) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let trainer = Trainer::new(config.settings(), 1e-2, state);
        let device = lm::device(&env.device)?;
        Ok(Box::new(Distilling { device, trainer, config, cached: None, padding: Padding::default() }))
    }
}

struct Distilling {
    config: Config,
    device: Device,
    trainer: Trainer,
    /// The head of a cache, once that has been looked at; none for the likeliest tokens.
    cached: Option<Option<Head>>,
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
        let teachers = Teachers::take(&mut inputs, &data, config.by(), config.dtype, &student)?;
        let own = student.output_head()?;
        if let Some(head) = &cached {
            self.padding.say("student", &own, "cache", head, sink);
        }
        for (port, teacher) in teachers.iter().flat_map(Teachers::models) {
            self.padding.say("student", &own, &port, &teacher.output_head()?, sink);
        }
        let cached = cached.map(|head| head.beside(student.vocab_size())).transpose()?;

        let teaching = prompt.as_ref().map(|prompt| prompt.vectors.detach());
        let models: Vec<_> = teachers.iter().flat_map(Teachers::models).collect();
        let behind = models.iter().map(|(port, model)| Behind::new(port, model, teaching.as_ref()));
        let behind: Vec<Behind<'_>> = [Behind::new("student", &student, None)].into_iter().chain(behind).collect();
        let dropout = training::dropout(config.dropout, config.seed, step, purpose::DROPOUT);
        let Config { temperature, alignment, .. } = config;
        let learning = Learning { student: &student, temperature, alignment, dropout };
        let none = "none of the rows of `contrast` has a response token";
        let mut beside = contrast.as_ref().map(|data| Beside::new(&data.rows, settings.mean(), none)).transpose()?;
        let row = self.trainer.update(&student.parameters(), &data, step, sink, &behind, |batch, parts| {
            let prompt = config.prompt_of(batch, prompt.as_ref(), prompt_before.as_ref())?;
            let taught = |text: &Aligned| match &teachers {
                Some(teachers) => teachers.lessons(text, |teacher, text| {
                    let seen = view.as_ref().map(|view| text.seen_in(view)).transpose()?;
                    alignment.read(seen.as_ref().unwrap_or(text)).hidden(teacher, prompt.as_ref(), None)
                }),
                None => bail!("there is nothing to learn from: connect `teacher`, `teachers` or `cache`"),
            };
            let lessons = match &cache {
                Some(cache) => {
                    let said = cache.read(&batch.text.rows(), config.cache_prompts, &self.device)?;
                    let heard = Heard { name: None, share: 1.0, said, head: cached.as_ref() };
                    vec![Lesson { tokens: None, heard: vec![heard] }]
                }
                None => taught(&batch.text)?,
            };
            let mut loss = learning.loss(Task::of(&config), &batch.text, batch.token_weight, &lessons, parts)?;
            let next = beside.as_mut().and_then(|beside| beside.next(batch));
            if let (Some((text, weight)), Some(contrast)) = (next, config.contrast) {
                let task = Task::of_contrast(contrast);
                loss = (loss + learning.loss(task, &text, weight, &taught(&text)?, parts)?)?;
            }
            Ok(loss)
        })?;
        sink.metrics(row);
        Ok(Outputs::new().with("model", student))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        self.trainer.state()
    }
}

impl Distilling {
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
#[derive(Clone, Copy)]
struct Task {
    divergence: Divergence,
    weight: f64,
    cross_entropy: f64,
    /// Before the names of its parts in metrics.
    prefix: &'static str,
}

impl Task {
    fn of(config: &Config) -> Self {
        let (weight, cross_entropy) = config.weights();
        Task { divergence: config.divergence, weight, cross_entropy, prefix: "" }
    }

    fn of_contrast(Contrast { divergence, weight }: Contrast) -> Self {
        Task { divergence, weight, cross_entropy: 0.0, prefix: "contrast_" }
    }
}

/// The student as it learns.
struct Learning<'a> {
    student: &'a LanguageModel,
    temperature: f64,
    alignment: Alignment,
    dropout: Option<Dropout>,
}

impl Learning<'_> {
    /// The loss of a text of whose tokens each counts `token_weight`.
    fn loss(
        &self,
        task: Task,
        text: &Aligned,
        token_weight: f32,
        lessons: &[Lesson<'_>],
        parts: &mut Parts,
    ) -> Result<Tensor> {
        let Task { divergence, weight, cross_entropy, prefix } = task;
        let hidden = self.alignment.read(text).hidden(self.student, None, self.dropout.as_ref())?; // [tokens, C]
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
            let found = head_loss(&lesson.rows_of(&hidden)?, &head, labels, &targets, &weights)?;
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
        }
        total.context("a text without tokens")
    }
}

impl Config {
    /// What decides between several teachers.
    fn by(&self) -> By<'_> {
        self.route.as_ref().map_or(By::Weights(&self.weights), By::Route)
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
mod tests {
    use std::collections::HashMap;

    use contract::{Kind, TokenizerFile};
    use indexmap::IndexMap;
    use lm::{AdamW, AdamWOptions, Family, Gradients};
    use serde_json::{Map, Value as Json};

    use super::*;
    use crate::testing::{Log, Scratch, output, row};

    fn tokenizer() -> TokenizerFile {
        TokenizerFile::new("{}", 0, 40)
    }

    fn model(layers: usize, width: usize, seed: u64) -> Arc<LanguageModel> {
        let shape =
            Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(Family::Gpt2, layers, width) };
        Arc::new(LanguageModel::init(&shape, tokenizer(), seed, &Device::Cpu).unwrap())
    }

    /// Four rows of two families in turn.
    fn data() -> Arc<Dataset> {
        let texts: [(&[u32], &[u32]); 4] =
            [(&[1, 2, 3], &[4, 5, 0]), (&[6], &[7, 8, 9, 0]), (&[10, 11], &[12]), (&[13, 14], &[15, 16, 0])];
        let rows = texts.into_iter().enumerate().map(|(id, (prompt, response))| contract::Row {
            family: Some(["sum", "letter"][id % 2].into()),
            ..row(id as u64, prompt, response)
        });
        Arc::new(Dataset { rows: rows.collect(), tokenizer: tokenizer() })
    }

    fn config(more: Json) -> Json {
        let mut config = json!({"divergence": "reverse-kl", "cross_entropy": 0.25, "learning_rate": 1e-2, "seed": 1});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    fn learn(more: Json, inputs: Vec<(&str, AnyValue)>) -> Result<(Arc<LanguageModel>, Map<String, Json>)> {
        let inputs = inputs.into_iter().chain([("student", model(1, 16, 1) as AnyValue)]).collect();
        let (outputs, Log { mut rows, .. }) = Scratch::new().run(&Distill, config(more), inputs)?;
        Ok((output(&outputs, "model"), rows.remove(0)))
    }

    fn values(parameters: &IndexMap<String, Tensor>) -> Vec<Vec<u32>> {
        let bits = |tensor: &Tensor| {
            let values: Vec<f32> = tensor.detach().flatten_all().unwrap().to_vec1().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        parameters.values().map(bits).collect()
    }

    /// The loss of one row by one teacher, and its gradient, where a token counts `weight`.
    fn alone(student: &LanguageModel, teacher: &LanguageModel, row: &contract::Row, weight: f32) -> (f64, Gradients) {
        let text = Aligned::of([row]);
        let said = lm::Said::Hidden(text.hidden(&teacher.frozen(), None, None).unwrap());
        let head = teacher.frozen().head().unwrap();
        let lesson = Lesson { tokens: None, heard: vec![Heard { name: None, share: 1.0, said, head: Some(&head) }] };
        let learning = Learning { student, temperature: 1.0, alignment: Alignment::Response, dropout: None };
        let resolved = Kind::resolve(&Distill, &config(json!({})), Conventions::Sound).unwrap();
        let task = Task::of(&serde_json::from_value(resolved).unwrap());
        let mut parts = Parts::default();
        let loss = learning.loss(task, &text, weight, &[lesson], &mut parts).unwrap();
        let value = parts.iter().find(|(name, _)| *name == "reverse_kl").unwrap().1;
        (value, lm::gradients(&loss, &student.parameters()).unwrap())
    }

    /// Every row of a routed run has the loss and the gradient that it has in a run with its teacher alone, and their sum is
    /// made in the same order: so it can be made here, and the weights that come out have the same bits.
    #[test]
    fn two_routed_teachers_are_two_runs_bit_for_bit() {
        let (maths, prose, data) = (model(2, 24, 2), model(3, 20, 3), data());
        let inputs = || -> Vec<(&str, AnyValue)> {
            vec![("teachers/maths", maths.clone()), ("teachers/prose", prose.clone()), ("data", data.clone())]
        };
        let routed = json!({"route": {"sum": "maths", "otherwise": "prose"}, "micro_batch": 1});
        let (found, metrics) = learn(routed.clone(), inputs()).unwrap();

        let student = Arc::try_unwrap(model(1, 16, 1)).ok().unwrap().trainable().unwrap();
        let tokens: usize = data.rows.iter().map(Aligned::tokens_of).sum();
        let weight = 1.0 / tokens as f32;
        let rows = data.rows.iter().zip([&maths, &prose, &maths, &prose]);
        let (losses, gradients): (Vec<f64>, Vec<Gradients>) =
            rows.map(|(row, teacher)| alone(&student, teacher, row, weight)).unzip();
        let [mut first, second, mut third, fourth] = <[Gradients; 4]>::try_from(gradients).ok().unwrap();
        lm::accumulate(&mut first, second).unwrap();
        lm::accumulate(&mut third, fourth).unwrap();
        lm::accumulate(&mut first, third).unwrap();
        let norm = lm::norm(&first).unwrap();
        assert_eq!(metrics["gradient_norm"].as_f64().unwrap().to_bits(), norm.to_bits());
        let mut optimizer = AdamW::new(AdamWOptions::default());
        optimizer.step(&student.parameters(), &first, 1e-2, (1.0 / (norm + 1e-6)).min(1.0)).unwrap();
        assert!(values(&found.parameters()) == values(&student.parameters()), "other bits");
        for (name, right) in [
            ("reverse_kl_maths", losses[0] + losses[2]),
            ("reverse_kl_prose", losses[1] + losses[3]),
            ("reverse_kl", losses[0] + losses[1] + losses[2] + losses[3]),
        ] {
            assert_eq!(metrics[name].as_f64().unwrap().to_bits(), right.to_bits(), "{name}");
        }

        // All rows at once, in which each teacher reads its own and the student all, say the same but for rounding.
        let mut at_once = routed;
        at_once.as_object_mut().unwrap().remove("micro_batch");
        let (_, together) = learn(at_once, inputs()).unwrap();
        for name in ["loss", "cross_entropy", "reverse_kl", "reverse_kl_maths", "gradient_norm"] {
            let [a, b] = [&metrics, &together].map(|row| row[name].as_f64().unwrap());
            assert!((a / b - 1.0).abs() < 1e-5, "{name}: {a} and {b}");
        }
        // Where all rows have one teacher, the run is that with this teacher alone.
        let (all, _) = learn(json!({"route": {"otherwise": "prose"}}), inputs()).unwrap();
        let (one, _) = learn(json!({}), vec![("teacher", prose.clone()), ("data", data.clone())]).unwrap();
        assert!(values(&all.parameters()) == values(&one.parameters()));
    }

    #[test]
    fn a_family_has_the_teacher_of_its_name_and_none_is_an_error() {
        let (maths, prose, data) = (model(2, 24, 2), model(3, 20, 3), data());
        let learn = |route: Json, [first, second]: [&str; 2]| {
            learn(
                json!({"route": route}),
                vec![(first, maths.clone() as AnyValue), (second, prose.clone()), ("data", data.clone())],
            )
        };
        let by_name = learn(json!({}), ["teachers/sum", "teachers/letter"]).unwrap();
        let by_route = learn(json!({"sum": "a", "letter": "b"}), ["teachers/a", "teachers/b"]).unwrap();
        assert!(values(&by_name.0.parameters()) == values(&by_route.0.parameters()));
        let error = learn(json!({"sum": "a"}), ["teachers/a", "teachers/b"]).err().unwrap().to_string();
        assert!(error.contains("nobody teaches row 2 of `train`, which is of family `letter`"), "{error}");
    }

    #[test]
    fn weights_are_shares_of_the_divergence() {
        let (maths, prose, data) = (model(2, 24, 2), model(3, 20, 3), data());
        let inputs = || -> Vec<(&str, AnyValue)> {
            vec![("teachers/maths", maths.clone()), ("teachers/prose", prose.clone()), ("data", data.clone())]
        };
        let (model, metrics) = learn(json!({"weights": {"maths": 1.0, "prose": 0.0}}), inputs()).unwrap();
        let (one, alone) = learn(json!({}), vec![("teacher", maths.clone()), ("data", data.clone())]).unwrap();
        assert_eq!((&metrics["loss"], &metrics["reverse_kl"]), (&alone["loss"], &alone["reverse_kl"]));
        assert!(values(&model.parameters()) == values(&one.parameters()));
        let (_, alike) = learn(json!({}), inputs()).unwrap();
        let number = |name: &str| alike[name].as_f64().unwrap();
        let mean = (number("reverse_kl_maths") + number("reverse_kl_prose")) / 2.0;
        assert!((number("reverse_kl") - mean).abs() < 1e-12);
    }

    #[test]
    fn what_is_said_of_teachers_that_are_not_there_is_refused() {
        let known = |ports: &[&str]| {
            let facts = ports.iter().map(|port| ((*port).to_owned(), contract::Facts::default()));
            Outlook::new(contract::Machine::default(), facts.collect(), None)
        };
        let several = &["student", "data", "teachers/maths", "teachers/prose"][..];
        for (more, ports, expected) in [
            (json!({"weights": {"maths": 1.0}}), several, "`weights` does not say what `prose` counts"),
            (json!({"weights": {"x": 1.0}}), several, "`weights` names `x`, who is none of the `teachers`"),
            (json!({"route": {"sum": "math"}}), several, "`route` names `math`, who is none of the `teachers`"),
            (json!({}), &["student", "data", "teacher", "teachers/a"], "`teacher` is connected beside `teachers`"),
            (json!({}), &["student", "data", "teacher", "contrast"], "nothing says how `contrast` is learnt"),
            (
                json!({"contrast": {"divergence": "reverse-kl"}}),
                &["student", "data", "teacher"],
                "nothing comes in by `contrast`",
            ),
        ] {
            let config = Kind::resolve(&Distill, &config(more), Conventions::Sound).unwrap();
            let mut outlook = known(ports);
            Kind::foresee(&Distill, &config, &mut outlook);
            let found: Vec<_> = outlook.findings.iter().filter(|finding| finding.is_error).collect();
            assert!(found.iter().any(|finding| finding.message == expected), "{expected}: {found:?}");
        }
        let both = config(json!({"route": {}, "weights": {"a": 1.0}}));
        assert!(Kind::resolve(&Distill, &both, Conventions::Sound).is_err());
    }

    #[test]
    fn a_contrast_is_a_second_loss_in_the_same_update() {
        let (teacher, data) = (model(2, 24, 2), data());
        let other: AnyValue = Arc::new(data.select(&[2, 1]));
        let inputs = |contrast: bool| -> Vec<(&str, AnyValue)> {
            let contrast = contrast.then(|| ("contrast", other.clone()));
            [("teacher", teacher.clone() as AnyValue), ("data", data.clone())].into_iter().chain(contrast).collect()
        };
        let contrast = json!({"contrast": {"divergence": "forward-kl", "weight": 0.5}});
        let (_, found) = learn(contrast.clone(), inputs(true)).unwrap();
        let (_, own) = learn(json!({}), inputs(false)).unwrap();
        let beside = vec![("teacher", teacher.clone() as AnyValue), ("data", other.clone())];
        let (_, beside) = learn(json!({"divergence": "forward-kl", "cross_entropy": 0.0}), beside).unwrap();
        let number = |row: &Map<String, Json>, name: &str| row[name].as_f64().unwrap();
        assert_eq!(found["reverse_kl"], own["reverse_kl"]);
        assert_eq!(found["contrast_forward_kl"], beside["forward_kl"]);
        let right = number(&own, "loss") + 0.5 * number(&beside, "loss");
        assert!((number(&found, "loss") - right).abs() < 1e-12);
        // Split into micro-batches it is the same mean over tokens.
        let mut split = contrast;
        split["micro_batch"] = json!(1);
        let (_, split) = learn(split, inputs(true)).unwrap();
        for name in ["loss", "contrast_forward_kl", "gradient_norm"] {
            assert!((number(&found, name) / number(&split, name) - 1.0).abs() < 1e-5, "{name}");
        }
    }

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(name)
    }

    fn published(name: &str) -> LanguageModel {
        LanguageModel::load(&fixture(&format!("promptkd/{name}")), &Device::Cpu).unwrap()
    }

    /// `make_priming.py` is the other program: questions by index, sorted as words, the published loss, SGD, a cosine that rises
    /// again.
    #[test]
    fn the_published_training_of_response_priming_is_that_of_pytorch() {
        let expected: Json = serde_json::from_slice(&std::fs::read(fixture("priming/expected.json")).unwrap()).unwrap();
        let ids = |json: &Json| serde_json::from_value::<Vec<u32>>(json.clone()).unwrap();
        let (prefix, items) = (ids(&expected["prefix"]), expected["items"].as_array().unwrap());
        let tokenizer = TokenizerFile::new("", 0, 61);
        let rows = |before: &[u32]| {
            let of_item = |(id, item): (usize, &Json)| {
                row(id as u64, &[before, &ids(&item["question"])].concat(), &ids(&item["answer"]))
            };
            items.iter().enumerate().map(of_item).collect::<Vec<_>>()
        };
        let (data, view) = (rows(&[]), Dataset { rows: rows(&prefix), tokenizer: tokenizer.clone() });
        let view: AnyValue = Arc::new(view);

        let config = json!({
            "divergence": "reverse-kl", "alpha": expected["alpha"], "temperature": expected["temperature"],
            "temperature_squared": true, "alignment": "index", "pairing": "lexicographic",
            "learning_rate": expected["rate"], "schedule": {"cosine": {"falls_for": 0.5}},
            "optimizer": {"method": "sgd", "momentum": expected["momentum"], "weight_decay": expected["weight_decay"], "clip": 0.0},
        });
        let kind: &dyn Kind = &Distill;
        let env = Env { device: "cpu".into(), threads: 1, scratch: std::env::temp_dir() };
        let config = kind.resolve(&config, Conventions::Sound).unwrap();
        let mut operator = kind.start(&config, &env, None).unwrap();
        let teacher: AnyValue = Arc::new(published("teacher"));
        let mut student: AnyValue = Arc::new(published("student"));
        let updates = expected["updates"].as_array().unwrap();
        for (round, right) in updates.iter().enumerate() {
            if round == updates.len() / 2 {
                // What is remembered goes through a file on the way.
                let folder = tempfile::tempdir().unwrap();
                operator.state().unwrap().unwrap().save(folder.path()).unwrap();
                let state = kind.load_state(folder.path(), &env).unwrap();
                operator = kind.start(&config, &env, Some(state)).unwrap();
            }
            let mut inputs = Inputs::new();
            let window = Dataset { rows: vec![data[round % data.len()].clone()], tokenizer: tokenizer.clone() };
            inputs.insert("data", Arc::new(window));
            inputs.insert("student", student);
            inputs.insert("teacher", teacher.clone());
            inputs.insert("view", view.clone());
            let per_epoch = data.len() as u64;
            let step = Step {
                round: round as u64,
                rounds: 2 * per_epoch,
                epoch: round as u64 / per_epoch,
                rounds_per_epoch: per_epoch,
            };
            let mut log = Log::default();
            student = operator.run(inputs, &step, &mut log).unwrap().0.remove("model").unwrap();
            for name in ["loss", "cross_entropy", "reverse_kl", "learning_rate"] {
                let (found, right) = (log.rows[0][name].as_f64().unwrap(), right[name].as_f64().unwrap());
                let tolerance = if name == "learning_rate" { 1e-12 } else { 1e-4 };
                assert!(
                    (found - right).abs() <= tolerance * right.abs().max(1.0),
                    "{name} of update {round}: {found}, {right}"
                );
            }
        }
        let Ok(student) = student.into_any().downcast::<LanguageModel>() else { panic!("a model") };
        let right: HashMap<String, Tensor> =
            candle_core::safetensors::load(fixture("priming/final.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(right.len(), student.parameters().len());
        for (name, found) in student.parameters() {
            let gap = (found.detach() - &right[&name]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(gap.to_scalar::<f32>().unwrap() < 1e-4, "{name}: {gap}");
        }
    }

    #[test]
    fn options_that_disagree_are_named() {
        let faults = |config: Json| {
            let mut config = config;
            config["divergence"] = json!("reverse-kl");
            config["learning_rate"] = json!(1e-3);
            let kind: &dyn Kind = &Distill;
            let errors = kind.resolve(&config, Conventions::Sound).err().unwrap_or_default();
            errors.iter().map(|error| error.path.join(".")).collect::<Vec<_>>()
        };
        assert_eq!(faults(json!({"alpha": 0.5, "weight": 0.5})), ["alpha"]);
        assert_eq!(faults(json!({"optimizer": {"momentum": 0.9}})), ["optimizer.momentum"]);
        assert_eq!(faults(json!({"optimizer": {"method": "sgd", "eps": 1e-6}})), ["optimizer.eps"]);
        assert_eq!(faults(json!({"alpha": 1.0, "optimizer": {"method": "sgd"}})), [""; 0]);
    }
}
