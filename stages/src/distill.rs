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

use crate::aligned::{Alignment, Pairing, View};
use crate::evaluate;
use crate::finite::Behind;
use crate::foresight;
use crate::padding::Padding;
use crate::training::{self, MicroBatch, Trainer, Training};

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
        foresight::computes_in(outlook, config.dtype);
        outlook.output("model", model);
        if outlook.has("cache") {
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
        let teacher = inputs.take_optional::<LanguageModel>("teacher")?;
        let cache = inputs.take_optional::<TeacherCache>("cache")?;
        let view = View::take(&mut inputs)?.map(|view| view.paired(self.config.pairing));
        ensure!(
            view.is_none() || cache.is_none(),
            "`view` does nothing beside `cache`: connect it where the cache is made"
        );
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?;
        let prompt_before = inputs.take_optional::<SoftPrompt>("prompt_before")?;
        let config = self.config.clone();
        let (data, view) = config.alignment.rows(data, view)?;
        let (weight, cross_entropy) = config.weights();
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
        if let Some(head) = &head {
            let port = if cache.is_some() { "cache" } else { "teacher" };
            self.padding.say("student", &student.output_head()?, port, head, sink);
        }
        let head = head.map(|head| head.beside(student.vocab_size())).transpose()?;

        let name = config.divergence.name();
        let dropout = training::dropout(config.dropout, config.seed, step, purpose::DROPOUT);
        let teaching = prompt.as_ref().map(|prompt| prompt.vectors.detach());
        let behind = [Behind::new("student", &student, None)].into_iter();
        let behind: Vec<Behind<'_>> =
            behind.chain(teacher.iter().map(|teacher| Behind::new("teacher", teacher, teaching.as_ref()))).collect();
        let row = self.trainer.update(&student.parameters(), &data, step, sink, &behind, |batch, parts| {
            let read = view.as_ref().map(|view| batch.text.seen_in(view)).transpose()?;
            let read = read.as_ref().unwrap_or(&batch.text);
            let by_index = (config.alignment == Alignment::Index).then(|| [batch.text.by_index(), read.by_index()]);
            let [text, read] = by_index.as_ref().map_or([&batch.text, read], |[text, read]| [text, read]);
            let said = match (&cache, &teacher) {
                (Some(cache), _) => cache.read(&text.rows(), config.cache_prompts, &self.device)?,
                (None, Some(teacher)) => {
                    let prompt = config.prompt_of(batch, prompt.as_ref(), prompt_before.as_ref())?;
                    Said::Hidden(read.hidden(teacher, prompt.as_ref(), None)?)
                }
                (None, None) => bail!("there is nothing to learn from: connect `teacher`, or `cache`"),
            };
            let source = match &said {
                Said::TopK(kept) => Source::TopK(kept),
                Said::Hidden(hidden) => Source::Head { hidden, head: head.as_ref().context("there is no head")? },
            };
            let target =
                Target { source, divergence: config.divergence, coefficient: weight, temperature: config.temperature };
            let hidden = text.hidden(&student, None, dropout.as_ref())?; // [tokens, C]
            let labels = (cross_entropy != 0.0).then_some((text.labels.as_slice(), cross_entropy));
            let loss = head_loss(&hidden, &student.head()?, labels, &[target], &batch.weights())?;
            parts.add(name, loss.divergences[0]);
            parts.add("loss", weight * loss.divergences[0]);
            if let Some(value) = loss.cross_entropy {
                parts.add("cross_entropy", value);
                parts.add("loss", cross_entropy * value);
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
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::testing::{Log, row};

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(name)
    }

    fn model(name: &str) -> LanguageModel {
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
        let teacher: AnyValue = Arc::new(model("teacher"));
        let mut student: AnyValue = Arc::new(model("student"));
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
