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
//! A teacher with another tokenizer is refused, unless `alignment: bytes` says that its tokens are matched with the student's by what
//! they spell, and `view` has the same rows in the teacher's tokens: their prompts are what it reads. Responses are put into the
//! shortest groups of tokens that spell the same bytes. Where a group has one token of each side, the teacher's distribution is
//! compared with the student's over the tokens with which the student begins to spell the teacher's; where it has several, their
//! probabilities are multiplied, and the two are compared as those of an event and its opposite. With one tokenizer on both sides that is
//! `alignment: ids`. Unlike in GOLD, every comparison is of distributions, and no probabilities are compared by their rank. `aligned`
//! is the share of response tokens that are in a group.
//!
//! Inputs: `student`, `data`, `teacher` and its soft prompt, or `cache`; `view`. Outputs: `model`, and a row of metrics an update.
//! Cost: a forward pass of the teacher (with a cache its head, or nothing), a forward and a backward pass of the student.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use candle_core::{Device, Tensor};
use contract::random::purpose;
use contract::{
    About, Alone, AnyValue, Cause, ConfigError, Conventions, Dataset, Env, Inputs, Operator, Outlook, Outputs,
    PortType, Ports, Result, Sink, Stage, Step,
};
use lm::loss::{Divergence, Source, Target, head_loss};
use lm::{Architecture, Head, Keep, LanguageModel, Lora, Prompts, Said, SoftPrompt, TeacherCache};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::across::{Across, Comparison, Side};
use crate::aligned::{Reader, View};
use crate::evaluate;
use crate::finite::Behind;
use crate::foresight;
use crate::padding::Padding;
use crate::training::{self, MicroBatch, Parts, Trainer, Training};

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
        /// Temperature of both distributions in the divergence. Gradients shrink with its square; no factor makes up for it.
        #[serde(default = "one")]
        #[schemars(range(min = contract::limits::TEMPERATURE.0, max = contract::limits::TEMPERATURE.1))]
        pub temperature: f64,
        /// How a teacher's tokens are matched with the student's: `ids`, for one tokenizer; or `bytes`, by what they spell, for another
        /// one, which needs `view`.
        #[serde(default)]
        pub alignment: Alignment,
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

/// How a teacher's tokens are matched with the student's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Alignment {
    /// Token by token: both have one tokenizer.
    #[default]
    Ids,
    /// In groups of tokens that spell the same bytes.
    Bytes,
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
        if config.weight == 0.0 && config.cross_entropy == 0.0 {
            errors.push(
                ConfigError::at("weight", "`weight` and `cross_entropy` are both 0, so the loss is 0")
                    .hint("leave `weight` out to learn from the teacher"),
            );
        }
        errors.extend(training::validate_init(config.init.as_ref()));
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("data", PortType::Dataset, "text to learn on: given, or written by a model")
            .optional("student", PortType::Model, "the student; without it, `init` says the shape")
            .optional("teacher", PortType::Model, "the teacher, frozen")
            .optional("cache", PortType::TeacherCache, "what the teacher says of a fixed text, in place of running it")
            .optional("view", PortType::Dataset, "rows of the same ids whose prompts the teacher reads instead")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the teacher")
            .optional(
                "prompt_before",
                PortType::SoftPrompt,
                "the prompt as the round found it, for `accumulation_prompt: old`",
            )
            .output("model", PortType::Model, "the trained student")
            .one_of(&["teacher", "cache"])
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
        foresight::effective_batch(outlook, config.effective_batch, None);
        foresight::computes_in(outlook, config.dtype);
        outlook.output("model", model);
        if config.alignment == Alignment::Bytes {
            foresight::teacher_of_other_tokens(outlook);
        } else if outlook.has("cache") {
            outlook.same_vocabulary(&["data", "cache", "teacher"]);
            outlook.holds("teacher");
            if outlook.has("teacher") {
                outlook.warn(
                    [Cause::Input("teacher".into(), "model".into())],
                    "`teacher` is read whole, and not used beside `cache`",
                    "leave out the input `teacher`: the cache holds all that is learnt from",
                );
            }
        } else if outlook.has("teacher") {
            foresight::teacher(outlook);
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
        Ok(Box::new(Distilling { device, trainer, config, cached: None, across: None, padding: Padding::default() }))
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
    padding: Padding,
}

impl Operator for Distilling {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let teacher = inputs.take_optional::<LanguageModel>("teacher")?;
        let cache = inputs.take_optional::<TeacherCache>("cache")?;
        let view = View::take(&mut inputs)?;
        ensure!(
            view.is_none() || cache.is_none(),
            "`view` does nothing beside `cache`: connect it where the cache is made"
        );
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?;
        let prompt_before = inputs.take_optional::<SoftPrompt>("prompt_before")?;
        let config = self.config.clone();
        let shape = (config.init.as_ref(), config.lora.as_ref());
        let student = training::learner(&mut inputs, "student", shape, &config.settings(), &data, &self.device)?;
        let (teacher, head) = match &cache {
            Some(cache) => (None, self.head_of(cache, teacher.as_deref(), prompt.is_some())?),
            None => {
                let teacher = teacher.map(|teacher| teacher.frozen().computed_in(config.dtype)).transpose()?;
                let head = teacher.as_ref().map(LanguageModel::output_head).transpose()?;
                (teacher, head)
            }
        };
        let across = match &teacher {
            Some(teacher) if config.alignment == Alignment::Bytes => Some(self.across(&student, teacher)?),
            _ => None,
        };
        if let Some(head) = head.as_ref().filter(|_| across.is_none()) {
            let port = if cache.is_some() { "cache" } else { "teacher" };
            self.padding.say("student", &student.output_head()?, port, head, sink);
        }
        let rows = if across.is_some() { None } else { Some(student.vocab_size()) };
        let head = head.map(|head| rows.map_or_else(|| head.of_tokens(), |rows| head.beside(rows))).transpose()?;

        let name = config.divergence.name();
        let dropout = training::dropout(config.dropout, config.seed, step, purpose::DROPOUT);
        let teaching = prompt.as_ref().map(|prompt| prompt.vectors.detach());
        let behind = [Behind::new("student", &student, None)].into_iter();
        let behind: Vec<Behind<'_>> =
            behind.chain(teacher.iter().map(|teacher| Behind::new("teacher", teacher, teaching.as_ref()))).collect();
        let row = self.trainer.update(&student.parameters(), &data, step, sink, &behind, |batch, parts| {
            let text = &batch.text;
            if let (Some(across), Some(teacher), Some(head)) = (&across, &teacher, &head) {
                let prompt = config.prompt_of(batch, prompt.as_ref(), prompt_before.as_ref())?;
                let reader = Reader { model: teacher, prompt: prompt.as_ref(), view: view.as_ref() };
                let hidden = text.hidden(&student, None, dropout.as_ref())?;
                return config.loss_across(across, batch, (&hidden, &student.head()?), (reader, head), parts);
            }
            let said = match (&cache, &teacher) {
                (Some(cache), _) => cache.read(&text.rows(), config.cache_prompts, &self.device)?,
                (None, Some(teacher)) => {
                    let prompt = config.prompt_of(batch, prompt.as_ref(), prompt_before.as_ref())?;
                    let reader = Reader { model: teacher, prompt: prompt.as_ref(), view: view.as_ref() };
                    Said::Hidden(reader.hidden(text)?)
                }
                (None, None) => bail!("there is nothing to learn from: connect `teacher`, or `cache`"),
            };
            let source = match &said {
                Said::TopK(kept) => Source::TopK(kept),
                Said::Hidden(hidden) => Source::Head { hidden, head: head.as_ref().context("there is no head")? },
            };
            let target = Target {
                source,
                divergence: config.divergence,
                coefficient: config.weight,
                temperature: config.temperature,
            };
            let hidden = text.hidden(&student, None, dropout.as_ref())?; // [tokens, C]
            let labels = (config.cross_entropy != 0.0).then_some((text.labels.as_slice(), config.cross_entropy));
            let loss = head_loss(&hidden, &student.head()?, labels, &[target], &batch.weights())?;
            parts.add(name, loss.divergences[0]);
            parts.add("loss", config.weight * loss.divergences[0]);
            if let Some(cross_entropy) = loss.cross_entropy {
                parts.add("cross_entropy", cross_entropy);
                parts.add("loss", config.cross_entropy * cross_entropy);
            }
            Ok(loss.loss)
        })?;
        sink.metrics(row);
        Ok(Outputs::new().with("model", student))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        self.trainer.state()
    }
}

impl Distilling {
    /// What is known of two tokenizers, which are looked at once.
    fn across(&mut self, student: &LanguageModel, teacher: &LanguageModel) -> Result<Arc<Across>> {
        if self.across.is_none() {
            self.across = Some(Arc::new(Across::new(&student.tokenizer, &teacher.tokenizer)?));
        }
        Ok(self.across.clone().expect("it was made just now"))
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

impl Config {
    /// The loss of some rows with a teacher that has another tokenizer.
    fn loss_across(
        &self,
        across: &Across,
        batch: &MicroBatch,
        (hidden, head): (&Tensor, &Tensor),
        (teacher, teacher_head): (Reader<'_>, &Tensor),
        parts: &mut Parts,
    ) -> Result<Tensor> {
        let text = &batch.text;
        let view = teacher.view.context("`alignment: bytes` needs `view`: the rows in the teacher's tokens")?;
        let vectors = teacher.prompt.map_or(Ok(0), |prompt| prompt.dim(0))?;
        let room = teacher.model.config.positions().saturating_sub(vectors);
        let read = across.pair(&text.rows(), view, room)?;
        let said = read.text.hidden(teacher.model, teacher.prompt, None)?;
        let student = Side { hidden, head, labels: &text.labels };
        let teacher = Side { hidden: &said, head: teacher_head, labels: &read.text.labels };
        let Config { divergence, weight, temperature, cross_entropy, .. } = *self;
        let comparison = Comparison { divergence, coefficient: weight, temperature };
        let weights = batch.weights();
        let (mut loss, distance) = across.loss(&read.groups, student, teacher, comparison, &weights)?;
        parts.add(divergence.name(), distance);
        parts.add("loss", weight * distance);
        let grouped: usize = read.groups.iter().map(|group| group.student.len()).sum();
        parts.add("aligned", grouped as f64 / batch.tokens_of_batch as f64);
        if cross_entropy != 0.0 {
            let labels = Some((text.labels.as_slice(), cross_entropy));
            let of_labels = head_loss(hidden, head, labels, &[], &weights)?;
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
mod tests {
    use lm::Family;
    use serde_json::{Map, Value as Json, json};

    use super::*;
    use crate::testing::{Scratch, output, row};

    fn tokenizer() -> contract::TokenizerFile {
        let vocabulary: Map<String, Json> = (0..40).map(|id| (format!("t{id}"), json!(id))).collect();
        let json = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}});
        contract::TokenizerFile::new(json.to_string(), 0, 40)
    }

    fn model(layers: usize, seed: u64, dropout: f32) -> LanguageModel {
        let shape = Architecture {
            heads: Some(2),
            positions: Some(32),
            dropout: Some(dropout),
            ..Architecture::new(Family::Gpt2, layers, 16)
        };
        LanguageModel::init(&shape, tokenizer(), seed, &Device::Cpu).unwrap()
    }

    /// An update: the student and its numbers.
    fn learn(config: &Json, student: LanguageModel, teacher: LanguageModel) -> (Arc<LanguageModel>, Map<String, Json>) {
        let rows = vec![row(3, &[1, 2], &[39, 4, 7, 0]), row(9, &[5, 6], &[8, 0])];
        let data: AnyValue = Arc::new(Dataset { rows, tokenizer: tokenizer() });
        let mut whole = json!({"divergence": "forward-kl", "learning_rate": 1e-2});
        config.as_object().unwrap().iter().for_each(|(name, value)| whole[name] = value.clone());
        let inputs: Vec<(&str, AnyValue)> =
            vec![("student", Arc::new(student)), ("teacher", Arc::new(teacher)), ("data", data)];
        let (outputs, mut log) = Scratch::new().run(&Distill, whole, inputs).unwrap();
        (output(&outputs, "model"), log.rows.remove(0))
    }

    fn of(model: &LanguageModel) -> Vec<Vec<f32>> {
        model.parameters().values().map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    #[test]
    fn an_update_lowers_the_divergence_from_the_teacher() {
        for divergence in ["forward-kl", "reverse-kl", "total-variation"] {
            let config = json!({"divergence": divergence});
            let (student, first) = learn(&config, model(1, 1, 0.0), model(2, 2, 0.0));
            assert_eq!(student.config.layers(), 1, "the student has its own shape");
            let name = divergence.replace('-', "_");
            assert_eq!(first["loss"], first[&name]);
            let again = student.deep_clone().unwrap();
            let (_, second) = learn(&config, again, model(2, 2, 0.0));
            assert!(second[&name].as_f64() < first[&name].as_f64(), "{first:?} {second:?}");
            assert_ne!(of(&student), of(&model(1, 1, 0.0)));
        }
    }

    #[test]
    fn the_students_dropout_is_on_and_the_teachers_is_off() {
        let loss = |config: Json, student: f32, teacher: f32| {
            learn(&config, model(1, 1, student), model(2, 2, teacher)).1["forward_kl"].as_f64().unwrap()
        };
        let without = loss(json!({}), 0.0, 0.0);
        assert_ne!(loss(json!({}), 0.3, 0.0), without, "the student's is on");
        assert_eq!(loss(json!({"dropout": false}), 0.3, 0.0), without);
        assert_eq!(loss(json!({}), 0.0, 0.3), without, "the teacher's is off");
    }

    #[test]
    fn a_teacher_that_could_be_trained_stays_as_it_is() {
        let teacher = model(2, 2, 0.0).trainable().unwrap();
        assert!(teacher.parameters().values().all(Tensor::is_variable));
        assert!(!teacher.frozen().parameters().values().any(Tensor::is_variable), "no gradient flows into it");
        let (right, _) = learn(&json!({}), model(1, 1, 0.0), model(2, 2, 0.0));
        let (found, _) = learn(&json!({}), model(1, 1, 0.0), teacher);
        assert_eq!(of(&found), of(&right));
    }

    #[test]
    fn an_adapter_of_the_head_learns() {
        let config = json!({"lora": {"rank": 2, "targets": ["lm_head"]}});
        let (student, first) = learn(&config, model(1, 1, 0.0), model(2, 2, 0.0));
        let adapter = student.adapter().unwrap();
        let moved = |tensor: &Tensor| tensor.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 0.0;
        // The second matrix begins as zeros.
        assert!(adapter.tensors.values().all(moved));
        let again = student.deep_clone().unwrap();
        let (_, second) = learn(&config, again, model(2, 2, 0.0));
        assert!(second["forward_kl"].as_f64() < first["forward_kl"].as_f64(), "{first:?} {second:?}");
    }
}
