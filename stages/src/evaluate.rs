//! `evaluate`: how good a model's answers are, and how close they are to a teacher's.
//!
//! ```yaml
//! score:
//!   kind: evaluate
//!   in: {model: train.student, data: data.test}
//!   with: {max_new_tokens: 48, seeds: [10, 20, 30, 40, 50]}
//! ```
//!
//! Generated answers, one sample a seed, are scored against every reference of the row; the best counts. `rouge_l`,
//! `exact_match` and `strict_match` are in percent, as is `accuracy`: how often the final number of an answer is that of a right one
//! ([`crate::number`]). `majority_accuracy` is that of the number most frequent among a row's answers. `loss` is the mean cross-entropy of a response token as given. `reverse_kl` is the mean of
//! KL(model || teacher) over the tokens of the sampled answers, in nats a token. `confidence` says how sure the model is of its own
//! answers, at temperature 1: the probability of their tokens (the geometric mean of each answer); `max_probability` and `max_logit`
//! beside it are means over positions of the largest probability and of the largest logit, as the published programs for response
//! priming have them. All three are in `predictions` too: see `calibration`.
//! Every metric has `mean`, `interval` (95 %, bootstrap over rows of their mean over seeds) and the value of each seed. A metric
//! that finds nothing to compare is not measured, which is not 0: its `mean` is null, `not_measured` says why, and the stage
//! warns. Rows without anything to compare are left out of a mean.
//! Inputs: `model`, `data`, and a `teacher` for `reverse_kl`. Outputs: `metrics`, `predictions`.
//! Cost: one generation of all rows a seed; a forward pass for `loss`; one of each model a seed for `reverse_kl`, one of
//! the model for `confidence`.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use candle_core::Tensor;
use contract::limits;
use contract::outlook::Rows;
use contract::random::purpose;
use contract::{
    About, AnyValue, Cause, Check, ConfigError, Conventions, Dataset, End, Env, Extraction, Inputs, Longest, Metrics,
    Operator, Outlook, Outputs, PortType, Ports, Predictions, Result, Row, Sink, Stage, Step,
};
use lm::loss::{Confidence, Divergence, confidences, log_probs};
use lm::sample::Sampling;
use lm::{Dtype, Generate, Generated, LanguageModel, Prompt, SoftPrompt, generate};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use crate::aligned::{Aligned, Reader, View, by_row, divergences};
use crate::finite::{Behind, NEXT_TOKEN, explain, not_finite};
use crate::interval::{Resamples, round};
use crate::number::{self, Found};
use crate::padding::Padding;
use crate::score::{self, Words};
use crate::text::{Bos, SpecialTokens, Text, begun};
use crate::{foresight, writing};

/// The `with` of `evaluate`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What to measure.
    #[serde(default = "default_metrics")]
    pub metrics: Vec<Metric>,
    /// Seeds of the sampled answers, one answer a row and seed; of no effect when greedy.
    #[serde(default = "default_seeds")]
    #[schemars(inner(range(min = 0, max = limits::SEED)))]
    pub seeds: Vec<u64>,
    /// 1 samples from the model's own distribution, 0 is greedy.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0, max = limits::TEMPERATURE.1))]
    pub temperature: f32,
    /// Samples among the so many likeliest tokens; 0: all.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::VOCABULARY))]
    pub top_k: usize,
    /// Samples among the likeliest tokens that make up this probability; 1: all.
    #[serde(default = "one")]
    #[schemars(extend("exclusiveMinimum" = 0.0), range(max = 1.0))]
    pub top_p: f32,
    /// Of those, samples among tokens at least this likely as a share of the likeliest one's probability; 0: all.
    #[serde(default)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub min_p: f32,
    /// Divides the logits of tokens that have occurred (Keskar et al., 2019); 1 switches it off.
    #[serde(default = "one")]
    #[schemars(range(min = limits::PENALTY.0, max = limits::PENALTY.1))]
    pub repetition_penalty: f32,
    /// Forbids to repeat an n-gram of this length; 0 switches it off. Left out: as the conventions say.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::TOKENS))]
    pub no_repeat_ngram: Option<usize>,
    /// Tokens an answer may have.
    #[serde(default = "default_max_new_tokens")]
    #[schemars(range(min = 1, max = limits::TOKENS))]
    pub max_new_tokens: usize,
    /// Prompts are cut to their first so many tokens; left out: never (`reference`: 256).
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::TOKENS))]
    pub max_prompt_length: Option<usize>,
    /// Whether prompts begin with the token that begins a text: left out, as the data has them; `from-tokenizer` and `yes` put
    /// it before those that lack it (`reference`: `from-tokenizer`, as the published program does for OPT and Llama).
    #[serde(default)]
    pub bos: Option<Bos>,
    /// Only the first so many rows.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::ROWS))]
    pub rows: Option<usize>,
    /// What a word is to ROUGE-L: `ascii`, as in the published figures, or `unicode`, for text in any script.
    #[serde(default)]
    pub words: Words,
    /// Whether words are stemmed before ROUGE-L compares them, as in the published figures.
    #[serde(default = "yes")]
    pub stem: bool,
    /// Which number of an answer `accuracy` and `majority_accuracy` take for its final one.
    #[serde(default)]
    pub extraction: Extraction,
    /// Type that matrices are multiplied in; `bf16` needs a GPU. Trained weights and moments are f32 either way.
    #[serde(default)]
    pub dtype: Dtype,
    /// Rows that go through the model at once: a matter of memory.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1, max = limits::BATCH))]
    pub batch: usize,
}

/// Something to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// ROUGE-L F1 of the answers, percent.
    RougeL,
    /// Share of answers equal to a reference but for case, punctuation and space, percent; beside it `strict_match`, of those
    /// equal but for space at the ends, to which `-2` is not `2`.
    ExactMatch,
    /// Mean cross-entropy of the given responses, nats a token.
    Loss,
    /// Mean KL(model || teacher) on the model's answers, nats a token.
    ReverseKl,
    /// Share of answers whose final number is that of a right answer, percent.
    Accuracy,
    /// Share of rows in which the number most frequent among the answers of all seeds is right, percent; of equally frequent
    /// ones the first counts.
    MajorityAccuracy,
    /// How sure the model is of its answers, 0 to 1, with `max_probability` and `max_logit`.
    Confidence,
}

impl Metric {
    fn reads_answers(self) -> bool {
        self != Metric::Loss
    }
}

fn default_metrics() -> Vec<Metric> {
    vec![Metric::RougeL, Metric::ExactMatch, Metric::Loss]
}

fn default_seeds() -> Vec<u64> {
    vec![10, 20, 30, 40, 50]
}

fn default_max_new_tokens() -> usize {
    256
}

fn default_batch() -> usize {
    64
}

fn one() -> f32 {
    1.0
}

fn yes() -> bool {
    true
}

/// The kind.
pub struct Evaluate;

/// The loss on a validation set, by which a training stage used alone keeps its best round.
pub(crate) fn check_of_loss() -> Check {
    let with = json!({"metrics": ["loss"]});
    Check { valid: "valid", kind: "evaluate", with, model: "model", data: "data", metric: "loss" }
}

impl Stage for Evaluate {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "evaluate",
            version: 3,
            numerics: Some(lm::NUMERICS),
            summary: "scores a model's answers (ROUGE-L, exact match, numbers), its loss, and its distance to a teacher",
            example: "kind: evaluate\nin: {model: train.student, data: data.test}\nwith: {max_new_tokens: 48, seeds: [10, 20, 30, 40, 50]}",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        let reference = conventions == Conventions::Reference;
        config.no_repeat_ngram.get_or_insert(if reference { 6 } else { 0 });
        if reference {
            config.max_prompt_length.get_or_insert(256);
            config.bos.get_or_insert(Bos::FromTokenizer);
        }
        config.metrics.sort();
        config.metrics.dedup();
        if config.temperature == 0.0 && !config.seeds.is_empty() {
            // Nothing is drawn: all seeds give the same answers.
            config.seeds = default_seeds();
        }
        if !config.reads_numbers() {
            config.extraction = Extraction::default();
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = writing::sampling_errors(&config.sampling());
        if config.metrics.is_empty() {
            errors.push(ConfigError::at("metrics", "there is nothing to measure"));
        }
        if config.seeds.is_empty() && config.metrics.iter().any(|m| m.reads_answers()) {
            errors.push(ConfigError::at("seeds", "sampled answers need a seed").hint("`seeds: [10]`"));
        }
        errors
    }

    fn ports(&self, config: &Config) -> Ports {
        let ports = Ports::new().input("model", PortType::Model, "whose answers are scored").input(
            "data",
            PortType::Dataset,
            "prompts, responses and references",
        );
        let doc = "the model that `reverse_kl` measures the distance to";
        let ports = if config.metrics.contains(&Metric::ReverseKl) {
            ports.input("teacher", PortType::Model, doc)
        } else {
            ports.optional("teacher", PortType::Model, doc)
        };
        ports
            .optional("view", PortType::Dataset, "rows of the same ids whose prompts `teacher` reads instead")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the model")
            .output("metrics", PortType::Metrics, "every metric with its interval and seeds")
            .output("predictions", PortType::Predictions, "every answer with its scores")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let data = outlook.input("data");
        let rows = config.seen(outlook.rows("data"));
        outlook.holds("model");
        outlook.same_vocabulary(&["data", "view", "model", "teacher"]);
        outlook.same_end("data", "model");
        outlook.same_width("model", "prompt");
        foresight::computes_in(outlook, config.dtype);
        outlook.takes_rows("data", "rows", config.rows.map(|rows| rows as u64));
        if data.row_count().most == 0 {
            let causes = [Cause::Input("data".into(), "source".into())];
            outlook.error(causes, "the data to evaluate on has no rows", "choose another split");
        } else if config.measures(Metric::Loss) && data.responses.most == 0 {
            outlook.error(
                [Cause::Field("metrics".into()), Cause::Input("data".into(), "source".into())],
                "`loss` is asked for, and no row has a response to measure it of",
                "leave `loss` out of `metrics`, or give rows with answers",
            );
        }
        if config.measures(Metric::Loss) {
            outlook.reads("model", Some("prompt"), &rows);
        }
        if config.metrics.iter().any(|metric| metric.reads_answers()) {
            outlook.writes("model", Some("prompt"), &rows, config.max_new_tokens as u64);
        }
        if config.measures(Metric::ReverseKl) {
            outlook.holds("teacher");
            // Of a row it reads the prompt and, as far as there is room, the answer.
            outlook.reads("teacher", None, &Rows { text: Longest::default(), ..rows });
        }
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Evaluating { config, padding: Padding::default(), warned: BTreeSet::new() }))
    }
}

impl Config {
    /// The rows that are evaluated, as far as they are known.
    fn seen(&self, rows: Rows) -> Rows {
        let Rows { mut prompt, mut text, port, .. } = rows.of_first(self.rows.map(|rows| rows as u64));
        if let Some(limit) = self.max_prompt_length.map(|limit| limit as u64) {
            // Which rows become shorter by how much is not known.
            text = if prompt.most.is_some_and(|most| most <= limit) { text } else { text.bound() };
            prompt = prompt.cut_to(limit);
        }
        let shorten = "set `max_prompt_length` to cut long prompts, or leave long rows out of the data";
        Rows { port, prompt, text, shorten }
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram: self.no_repeat_ngram.unwrap_or(0),
        }
    }

    fn measures(&self, metric: Metric) -> bool {
        self.metrics.contains(&metric)
    }

    fn reads_numbers(&self) -> bool {
        self.measures(Metric::Accuracy) || self.measures(Metric::MajorityAccuracy)
    }
}

struct Evaluating {
    config: Config,
    padding: Padding,
    /// What has been warned of: once is enough, however often a loop evaluates.
    warned: BTreeSet<String>,
}

impl Operator for Evaluating {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let config = &self.config;
        let model = inputs.take::<LanguageModel>("model")?.frozen().computed_in(config.dtype)?;
        let teacher = inputs.take_optional::<LanguageModel>("teacher")?;
        let teacher = teacher.map(|teacher| teacher.frozen().computed_in(config.dtype)).transpose()?;
        let view = View::take(&mut inputs)?;
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let data = inputs.take::<Dataset>("data")?;
        let rows = evaluated_rows(&data, config)?;
        ensure!(!rows.is_empty(), "the data to evaluate on has no rows");
        if let Some(teacher) = &teacher {
            self.padding.say("model", &model.output_head()?, "teacher", &teacher.output_head()?, sink);
        }

        let mut metrics = Map::new();
        let mut predictions = Vec::new();
        if config.measures(Metric::Loss) {
            metrics.insert("loss".into(), self.loss(&model, prompt.as_ref(), &rows)?);
        }
        if config.metrics.iter().any(|metric| metric.reads_answers()) {
            // The teacher reads the answers, all but their last token.
            let reader = teacher.as_ref().filter(|_| config.measures(Metric::ReverseKl));
            let longest = reader.map_or(usize::MAX, |teacher| teacher.config.positions().saturating_add(1));
            let answers = self.answer(&model, prompt.as_ref(), &rows, &data, longest, sink)?;
            let mut scores = Scores::new(config);
            for (seed, generated) in &answers {
                let before = predictions.len();
                scores.text(*seed, &rows, generated, &data, &mut predictions)?;
                if config.measures(Metric::Confidence) {
                    let sureness = self.sureness(&model, prompt.as_ref(), &rows, generated)?;
                    scores.sureness(*seed, &sureness, &mut predictions[before..]);
                }
                if let (true, Some(teacher)) = (config.measures(Metric::ReverseKl), &teacher) {
                    let own = Reader { model: &model, prompt: prompt.as_ref(), view: None };
                    let teacher = Reader { model: teacher, prompt: None, view: view.as_ref() };
                    scores.distance(*seed, self.reverse_kl(own, teacher, &rows, generated)?);
                }
            }
            scores.majority(&rows);
            metrics.extend(scores.summary());
            self.warn_of_answers(&answers, sink);
        }
        self.warn_of_gaps(&metrics, sink);
        Ok(Outputs::new().with("metrics", Metrics(metrics)).with("predictions", Predictions(predictions)))
    }
}

fn evaluated_rows(data: &Dataset, config: &Config) -> Result<Vec<Row>> {
    let begin = config.bos.map(|bos| bos.ids(&data.tokenizer)).transpose()?;
    let rows = data.rows.iter().take(config.rows.unwrap_or(usize::MAX)).cloned();
    let limit = config.max_prompt_length.unwrap_or(usize::MAX);
    let rows = rows.map(|mut row| {
        if let Some(begin) = &begin {
            row.prompt = begun(begin, row.prompt);
        }
        row.prompt.truncate(limit);
        row
    });
    Ok(rows.collect())
}

impl Evaluating {
    /// Warns of what was not measured, for want of anything to compare.
    fn warn_of_gaps(&mut self, metrics: &Map<String, Json>, sink: &mut dyn Sink) {
        for (name, value) in metrics {
            let text = match (&value["not_measured"], &value["left_out"]) {
                (Json::String(why), _) => format!("`{name}` is not measured: {why}"),
                (_, Json::String(which)) => format!("`{name}` leaves out {which}"),
                _ => continue,
            };
            if self.warned.insert(name.clone()) {
                sink.warn(&text);
            }
        }
    }

    fn warn_of_answers(&mut self, answers: &[(u64, Vec<Generated>)], sink: &mut dyn Sink) {
        let all: usize = answers.iter().map(|(_, generated)| generated.len()).sum();
        let mut written = answers.iter().flat_map(|(_, generated)| generated);
        let says_nothing = |it: &Generated| it.answer().is_empty();
        if written.all(says_nothing) && self.warned.insert("answers".to_owned()) {
            sink.warn(&format!("all {all} answers are empty: the model ends a text where it should begin"));
        }
    }

    /// One answer a row for every seed; a greedy answer does not depend on the seed and is made once.
    fn answer(
        &self,
        model: &LanguageModel,
        prompt: Option<&Tensor>,
        rows: &[Row],
        data: &Dataset,
        longest: usize,
        sink: &mut dyn Sink,
    ) -> Result<Vec<(u64, Vec<Generated>)>> {
        let config = &self.config;
        let seeds = if config.temperature == 0.0 { &config.seeds[..1] } else { &config.seeds[..] };
        let prompts: Vec<Prompt<'_>> = rows.iter().map(|row| Prompt { row: row.id, ids: &row.prompt }).collect();
        let total = (seeds.len() * rows.len()) as u64;
        let mut answers = Vec::with_capacity(seeds.len());
        for (index, &seed) in seeds.iter().enumerate() {
            let options = Generate {
                sampling: config.sampling(),
                max_new_tokens: config.max_new_tokens,
                longest,
                seed,
                purpose: purpose::EVALUATE,
                time: 0,
                batch: config.batch,
            };
            let before = (index * rows.len()) as u64;
            let mut progress = |done: usize| sink.progress(before + done as u64, total, "answers");
            let generated = generate(model, prompt, &prompts, &options, &mut progress)
                .map_err(|error| explain(error, NEXT_TOKEN, |at| rows.get(at), &[Behind::new("model", model, prompt)]))
                .with_context(|| format!("cannot answer the {} prompts", rows.len()))?;
            answers.push((seed, generated));
        }
        ensure!(data.tokenizer.size > 0, "the data has no tokenizer to read the answers with");
        Ok(answers)
    }

    fn loss(&self, model: &LanguageModel, prompt: Option<&Tensor>, rows: &[Row]) -> Result<Json> {
        let (mut sums, mut counts) = (Vec::new(), Vec::new());
        for chunk in rows.chunks(self.config.batch) {
            let text = Aligned::of(chunk);
            if text.tokens() == 0 {
                continue;
            }
            let found = log_probs(&text.hidden(model, prompt, None)?, &model.head()?, &text.labels)?;
            for (row, own) in by_row(chunk, &found) {
                let sum = -own.iter().map(|&p| f64::from(p)).sum::<f64>();
                if !sum.is_finite() {
                    return Err(not_finite("the loss", row, &[Behind::new("model", model, prompt)]));
                }
                sums.push(sum);
                counts.push(own.len() as f64);
            }
        }
        if sums.is_empty() {
            return Ok(not_measured(&format!("none of the {} rows has a response", rows.len())));
        }
        Ok(summarise(&[(None, ratio(&sums, &counts))], &[sums], &[counts]))
    }

    /// How sure the model is of every answer; `None` of one without tokens.
    fn sureness(
        &self,
        model: &LanguageModel,
        prompt: Option<&Tensor>,
        rows: &[Row],
        generated: &[Generated],
    ) -> Result<Vec<Option<Sureness>>> {
        let written = written(rows, generated);
        let mut found = Vec::with_capacity(rows.len());
        for chunk in written.chunks(self.config.batch) {
            let text = Aligned::of(chunk);
            let tokens = match text.tokens() {
                0 => Vec::new(),
                _ => confidences(&text.hidden(model, prompt, None)?, &model.head()?, &text.labels)?,
            };
            for (row, own) in by_row(chunk, &tokens) {
                let mean = |of: fn(&Confidence) -> f64| own.iter().map(of).sum::<f64>() / own.len() as f64;
                let sureness = Sureness {
                    confidence: mean(|token| token.log_prob).exp(),
                    max_probability: mean(|token| token.top_log_prob.exp()),
                    max_logit: mean(|token| token.top_logit),
                };
                if !own.is_empty() && !(sureness.confidence + sureness.max_logit).is_finite() {
                    return Err(not_finite("`confidence`", row, &[Behind::new("model", model, prompt)]));
                }
                found.push((!own.is_empty()).then_some(sureness));
            }
        }
        Ok(found)
    }

    /// Sum over tokens of KL(model || teacher), and the number of tokens, for every row.
    fn reverse_kl(
        &self,
        own: Reader<'_>,
        teacher: Reader<'_>,
        rows: &[Row],
        generated: &[Generated],
    ) -> Result<Vec<(f64, f64)>> {
        let written = written(rows, generated);
        let values = divergences(own, teacher, Divergence::ReverseKl, &written, self.config.batch)?;
        let distance = |(row, values): (&Row, Vec<f64>)| {
            let sum = values.iter().sum::<f64>();
            if !sum.is_finite() {
                let models = [Behind::new("model", own.model, own.prompt), Behind::new("teacher", teacher.model, None)];
                return Err(not_finite("`reverse_kl`", row, &models));
            }
            Ok((sum, values.len() as f64))
        };
        written.iter().zip(values).map(distance).collect()
    }
}

/// Rows with the answers in place of their responses.
fn written(rows: &[Row], generated: &[Generated]) -> Vec<Row> {
    let row = |(row, generated): (&Row, &Generated)| Row { response: generated.ids.clone(), ..row.clone() };
    rows.iter().zip(generated).map(row).collect()
}

/// How sure a model is of an answer.
#[derive(Clone, Copy)]
struct Sureness {
    /// The geometric mean of its tokens' probabilities.
    confidence: f64,
    /// The mean over positions of the largest probability.
    max_probability: f64,
    /// The mean over positions of the largest logit.
    max_logit: f64,
}

/// Scores of every row by metric and seed, as sums and counts, so that a mean is a ratio of sums.
struct Scores<'a> {
    config: &'a Config,
    by_metric: Vec<Measurement>,
    /// The numbers of each row's answers, in the order of the seeds.
    votes: Vec<Vec<f64>>,
}

/// One metric: for every seed, or for all of them together, the sum and the count of each row.
struct Measurement {
    metric: &'static str,
    seeds: Vec<Option<u64>>,
    sums: Vec<Vec<f64>>,
    counts: Vec<Vec<f64>>,
}

impl<'a> Scores<'a> {
    fn new(config: &'a Config) -> Self {
        Scores { config, by_metric: Vec::new(), votes: Vec::new() }
    }

    fn add(&mut self, metric: &'static str, seed: Option<u64>, sums: Vec<f64>, counts: Vec<f64>) {
        let found = self.by_metric.iter().position(|measurement| measurement.metric == metric);
        let index = found.unwrap_or_else(|| {
            self.by_metric.push(Measurement { metric, seeds: Vec::new(), sums: Vec::new(), counts: Vec::new() });
            self.by_metric.len() - 1
        });
        let measurement = &mut self.by_metric[index];
        measurement.seeds.push(seed);
        measurement.sums.push(sums);
        measurement.counts.push(counts);
    }

    /// Adds scores of every row; `None` where there is nothing to compare.
    fn add_scores(&mut self, metric: &'static str, seed: Option<u64>, scores: impl Iterator<Item = Option<f64>>) {
        let (sums, counts) = scores.map(|it| (it.unwrap_or(0.0), f64::from(u8::from(it.is_some())))).unzip();
        self.add(metric, seed, sums, counts);
    }

    fn text(
        &mut self,
        seed: u64,
        rows: &[Row],
        generated: &[Generated],
        data: &Dataset,
        predictions: &mut Vec<Map<String, Json>>,
    ) -> Result<()> {
        let tokenizer = Text::new(&data.tokenizer, SpecialTokens::Text)?;
        let scored = rows.par_iter().zip(generated).map(|(row, generated)| {
            Ok(Scored::of(&tokenizer.decode(generated.answer())?, &row.references, self.config))
        });
        let scored: Vec<Scored> = scored.collect::<Result<_>>()?;
        let config = self.config;
        for ((row, generated), Scored { text, rouge_l, exact_match, strict_match, found, correct }) in
            rows.iter().zip(generated).zip(&scored)
        {
            let mut prediction = json!({
                "id": row.id, "seed": seed, "text": text,
                "rouge_l": rouge_l, "exact_match": exact_match, "strict_match": strict_match,
                "tokens": generated.ids.len(), "end": if generated.end == End::Stop { "stop" } else { "length" },
            });
            if config.reads_numbers() {
                prediction["number"] = json!(found.map(|found| found.value));
                prediction["rule"] = json!(found.map(|found| found.rule));
                prediction["correct"] = json!(correct);
            }
            predictions.push(prediction.as_object().cloned().unwrap_or_default());
        }
        let mut add = |metric, score: fn(&Scored) -> Option<f64>| {
            self.add_scores(metric, Some(seed), scored.iter().map(score));
        };
        if config.measures(Metric::RougeL) {
            add("rouge_l", |it| it.rouge_l);
        }
        if config.measures(Metric::ExactMatch) {
            add("exact_match", |it| it.exact_match);
            add("strict_match", |it| it.strict_match);
        }
        self.numbers(seed, &scored);
        let lengths = generated.iter().map(|generated| generated.ids.len() as f64).collect();
        self.add("response_tokens", Some(seed), lengths, vec![1.0; generated.len()]);
        Ok(())
    }

    fn numbers(&mut self, seed: u64, scored: &[Scored]) {
        if self.config.measures(Metric::Accuracy) {
            self.add_scores("accuracy", Some(seed), scored.iter().map(|it| it.correct.map(percent)));
        }
        self.votes.resize(scored.len(), Vec::new());
        for (votes, scored) in self.votes.iter_mut().zip(scored) {
            votes.extend(scored.found.map(|found| found.value));
        }
    }

    /// Adds how sure the model is of every answer, to the metrics and to what is said of the answers.
    fn sureness(&mut self, seed: u64, answers: &[Option<Sureness>], predictions: &mut [Map<String, Json>]) {
        let parts = |it: &Sureness| [it.confidence, it.max_probability, it.max_logit];
        for (place, name) in ["confidence", "max_probability", "max_logit"].into_iter().enumerate() {
            let values = answers.iter().map(|answer| answer.as_ref().map(|answer| parts(answer)[place]));
            for (prediction, value) in predictions.iter_mut().zip(values.clone()) {
                prediction.insert(name.to_owned(), json!(value.map(round)));
            }
            self.add_scores(name, Some(seed), values);
        }
    }

    fn distance(&mut self, seed: u64, rows: Vec<(f64, f64)>) {
        let (sums, counts) = rows.into_iter().unzip();
        self.add("reverse_kl", Some(seed), sums, counts);
    }

    /// What most answers to each row say, when all of them have been read.
    fn majority(&mut self, rows: &[Row]) {
        if self.config.measures(Metric::MajorityAccuracy) {
            let said = self.votes.iter().map(|votes| number::majority(votes));
            let correct = said.zip(rows).map(|(said, row)| number::correct(said, &right_numbers(row)));
            let scores: Vec<_> = correct.map(|correct| correct.map(percent)).collect();
            self.add_scores("majority_accuracy", None, scores.into_iter());
        }
    }

    fn summary(&self) -> Map<String, Json> {
        let summarised = self.by_metric.iter().map(|Measurement { metric, seeds, sums, counts }| {
            let means = sums.iter().zip(counts).map(|(sums, counts)| ratio(sums, counts));
            let by_seed: Vec<(Option<u64>, Option<f64>)> = seeds.iter().copied().zip(means).collect();
            let mut summary = summarise(&by_seed, sums, counts);
            let (all, gaps) = gaps(counts);
            let lacking = self.lacking(metric);
            if gaps == all {
                summary = not_measured(&format!("none of the {all} rows has {lacking}"));
            } else if gaps > 0 && lacking != "an answer" {
                summary["left_out"] = json!(format!("{gaps} of {all} rows, which have not {lacking}"));
            }
            ((*metric).to_owned(), summary)
        });
        summarised.collect()
    }

    /// What a metric compares with, as words behind "has".
    fn lacking(&self, metric: &str) -> &'static str {
        match (metric, self.config.words) {
            ("rouge_l", Words::Ascii) => {
                "a right answer with a word of ASCII letters or digits, all that `words: ascii` sees (`words: unicode` is for \
                 other scripts)"
            }
            ("rouge_l", Words::Unicode) => "a right answer with a word",
            ("reverse_kl" | "confidence" | "max_probability" | "max_logit", _) => "an answer",
            ("accuracy" | "majority_accuracy", _) => "a right answer with a number",
            _ => "a right answer with text",
        }
    }
}

/// The rows, and those of them in which no seed found anything to compare.
fn gaps(counts: &[Vec<f64>]) -> (usize, usize) {
    let rows = counts[0].len();
    (rows, (0..rows).filter(|&row| counts.iter().all(|seed| seed[row] == 0.0)).count())
}

/// Scores of one answer in percent; `None` where there is nothing to compare with.
struct Scored {
    text: String,
    rouge_l: Option<f64>,
    exact_match: Option<f64>,
    strict_match: Option<f64>,
    /// Its final number, if anybody asked for it.
    found: Option<Found>,
    correct: Option<bool>,
}

/// The numbers of the right answers, which are cleaned like the given ones.
fn right_numbers(row: &Row) -> Vec<f64> {
    number::right(&cleaned(&row.references))
}

fn cleaned(references: &[String]) -> Vec<String> {
    references.iter().map(|reference| score::clean(reference)).collect()
}

fn percent(holds: bool) -> f64 {
    if holds { 100.0 } else { 0.0 }
}

impl Scored {
    /// Of an answer as it was generated. Both sides are cleaned alike.
    fn of(text: &str, references: &[String], config: &Config) -> Self {
        let text = score::clean(text);
        let references = cleaned(references);
        let references = references.as_slice();
        let stemming = if config.stem { score::Stemming::Porter } else { score::Stemming::Off };
        let rouge_l = score::rouge_l_by(&text, references, config.words, stemming).map(|score| 100.0 * score);
        let comparable = references.iter().any(|reference| !reference.trim().is_empty());
        let share = |equal: bool| comparable.then_some(percent(equal));
        let exact_match = share(score::exact_match(&text, references));
        let strict_match = share(score::strict_match(&text, references));
        let (mut found, mut correct) = (None, None);
        if config.reads_numbers() {
            found = number::of(&text, config.extraction);
            correct = number::correct(found.map(|found| found.value), &number::right(references));
        }
        Scored { text, rouge_l, exact_match, strict_match, found, correct }
    }
}

/// `None` where nothing was counted.
fn ratio(sums: &[f64], counts: &[f64]) -> Option<f64> {
    let count: f64 = counts.iter().sum();
    (count > 0.0).then(|| sums.iter().sum::<f64>() / count)
}

/// In place of a summary.
fn not_measured(why: &str) -> Json {
    json!({"mean": null, "interval": null, "not_measured": why})
}

/// Mean over seeds, and the 2.5 and 97.5 percentiles of that mean when rows are drawn anew, with replacement
/// (Efron, 1979; for ROUGE: Lin, 2004). Something was counted.
fn summarise(by_seed: &[(Option<u64>, Option<f64>)], sums: &[Vec<f64>], counts: &[Vec<f64>]) -> Json {
    let rows = sums[0].len();
    let over_seeds = |columns: &[Vec<f64>], row: usize| columns.iter().map(|c| c[row]).sum::<f64>();
    let row_sums: Vec<f64> = (0..rows).map(|row| over_seeds(sums, row)).collect();
    let row_counts: Vec<f64> = (0..rows).map(|row| over_seeds(counts, row)).collect();
    let interval = Resamples::of(rows).of_mean(&row_sums, &row_counts);
    let measured: Vec<f64> = by_seed.iter().filter_map(|(_, value)| *value).collect();
    let mean = measured.iter().sum::<f64>() / measured.len().max(1) as f64;
    let mut summary = json!({"mean": round(mean), "interval": interval});
    if by_seed.iter().any(|(seed, _)| seed.is_some()) {
        let seeds =
            by_seed.iter().filter_map(|(seed, value)| Some((seed.as_ref()?.to_string(), json!(value.map(round)))));
        summary["seeds"] = Json::Object(seeds.collect());
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_over_seeds_and_the_interval_holds_it() {
        let sums = vec![vec![0.0, 100.0, 50.0, 50.0], vec![10.0, 90.0, 60.0, 40.0]];
        let counts = vec![vec![1.0; 4]; 2];
        let by_seed = [(Some(10), Some(50.0)), (Some(20), Some(50.0))];
        let summary = summarise(&by_seed, &sums, &counts);
        assert_eq!(summary["mean"], 50.0);
        assert_eq!(summary["seeds"]["20"], 50.0);
        let (low, high) = (summary["interval"][0].as_f64().unwrap(), summary["interval"][1].as_f64().unwrap());
        assert!((5.0..50.0).contains(&low) && (50.0..95.0).contains(&high), "{low} {high}");
    }

    #[test]
    fn a_row_that_is_always_the_same_has_an_interval_of_no_width() {
        let summary = summarise(&[(None, Some(2.0))], &[vec![4.0, 4.0]], &[vec![2.0, 2.0]]);
        assert_eq!(summary["interval"], json!([2.0, 2.0]));
    }

    #[test]
    fn the_loss_is_a_mean_over_tokens() {
        assert_eq!(ratio(&[4.0, 2.0], &[7.0, 1.0]), Some(0.75));
        assert_eq!(ratio(&[], &[]), None);
    }

    fn scored(references: &[&[&str]], config: Json) -> (Map<String, Json>, Vec<String>) {
        let mut config = config;
        config["temperature"] = json!(0);
        let config: Config = serde_json::from_value(config).unwrap();
        let mut stage = Evaluating { config: config.clone(), padding: Padding::default(), warned: BTreeSet::new() };
        let mut scores = Scores::new(&config);
        let scored: Vec<Scored> = references
            .iter()
            .map(|it| Scored::of("水 25", &it.iter().map(|text| text.to_string()).collect::<Vec<_>>(), &config))
            .collect();
        for (metric, score) in
            [("rouge_l", (|it| it.rouge_l) as fn(&Scored) -> Option<f64>), ("exact_match", |it| it.exact_match)]
        {
            scores.add_scores(metric, Some(1), scored.iter().map(score));
        }
        let metrics = scores.summary();
        let mut log = crate::testing::Log::default();
        // However often a loop evaluates, it is said once.
        (0..3).for_each(|_| stage.warn_of_gaps(&metrics, &mut log));
        (metrics, log.warnings)
    }

    #[test]
    fn what_has_nothing_to_compare_is_not_measured_and_said_once() {
        // Not measured, measured as 0, and measured over the rows that can be.
        for (references, words, rouge_l, exact_match, said) in [
            (
                &[&["水"][..], &["火"]][..],
                "ascii",
                None,
                Some(0.0),
                vec!["`rouge_l` is not measured: none of the 2 rows"],
            ),
            (&[&["水"], &["火"]], "unicode", Some(100.0 / 3.0), Some(0.0), vec![]),
            (&[&["x"], &["y"]], "ascii", Some(0.0), Some(0.0), vec![]),
            (&[&["2.5"], &["火"]], "ascii", Some(0.0), Some(0.0), vec!["`rouge_l` leaves out 1 of 2 rows"]),
            (&[&["", " "], &[]], "unicode", None, None, vec!["`rouge_l` is not", "`exact_match` is not measured"]),
        ] {
            let (metrics, warnings) = scored(references, json!({"words": words}));
            let mean = |name: &str| metrics[name]["mean"].as_f64();
            assert_eq!(mean("rouge_l"), rouge_l.map(round), "{references:?}");
            assert_eq!(mean("exact_match"), exact_match, "{references:?}");
            assert_eq!(warnings.len(), said.len(), "{warnings:?}");
            for (found, expected) in warnings.iter().zip(said) {
                assert!(found.starts_with(expected), "{found}");
            }
        }
    }

    #[test]
    fn accuracy_is_over_seeds_and_the_majority_over_their_numbers() {
        let config = json!({"metrics": ["accuracy", "majority_accuracy"]});
        let config: Config = serde_json::from_value(config).unwrap();
        let mut scores = Scores::new(&config);
        let row = |id: u64, references: &[&str]| {
            let references = references.iter().map(|text| text.to_string()).collect();
            Row { references, ..crate::testing::row(id, &[1], &[1]) }
        };
        let rows = [row(0, &["nothing", "2 + 3<n>#### 5"]), row(1, &["nothing"]), row(2, &["9"])];
        for (seed, texts) in [["#### 5", "1", "8"], ["it is 4", "1", "9.0"], ["$5.00", "1", "8"]].iter().enumerate() {
            let scored: Vec<_> =
                rows.iter().zip(texts).map(|(row, text)| Scored::of(text, &row.references, &config)).collect();
            scores.numbers(seed as u64, &scored);
        }
        scores.majority(&rows);
        let metrics = scores.summary();
        let seeds = json!({"0": 50.0, "1": 50.0, "2": 50.0});
        assert_eq!((&metrics["accuracy"]["mean"], &metrics["accuracy"]["seeds"]), (&json!(50.0), &seeds));
        let majority = &metrics["majority_accuracy"];
        assert_eq!((&majority["mean"], majority.get("seeds")), (&json!(50.0), None));
        for metric in ["accuracy", "majority_accuracy"] {
            assert_eq!(metrics[metric]["left_out"], "1 of 3 rows, which have not a right answer with a number");
        }
    }

    #[test]
    fn numbers_are_read_only_when_asked_for_and_by_the_rule_asked_for() {
        let scored = |config: Json| {
            let config = serde_json::from_value(config).unwrap();
            let scored = Scored::of("the answer is 5, or -6", &["#### 5".to_owned()], &config);
            (scored.found.map(|found| (found.value, found.rule.name())), scored.correct)
        };
        assert_eq!(scored(json!({})), (None, None));
        assert_eq!(scored(json!({"metrics": ["accuracy"]})), (Some((-6.0, "flexible")), Some(false)));
        let published = json!({"metrics": ["accuracy"], "extraction": "published"});
        assert_eq!(scored(published), (Some((5.0, "answer-is")), Some(true)));
        let strict = json!({"metrics": ["majority_accuracy"], "extraction": "strict"});
        assert_eq!(scored(strict), (None, Some(false)));
    }
}
