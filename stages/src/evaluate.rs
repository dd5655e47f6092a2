//! `evaluate`: how good a model's answers are, and how close they are to a teacher's.
//!
//! ```yaml
//! score:
//!   kind: evaluate
//!   in: {model: train.student, data: data.test}
//!   with: {max_new_tokens: 48, seeds: [10, 20, 30, 40, 50]}
//! ```
//!
//! Generated answers, one sample a seed, are scored against every reference of the row; the best counts. `rouge_l` and
//! `exact_match` are in percent. `loss` is the mean cross-entropy of a response token as given. `reverse_kl` is the mean of
//! KL(model || teacher) over the tokens of the sampled answers, in nats a token.
//! Every metric has `mean`, `interval` (95 %, bootstrap over rows of their mean over seeds) and the value of each seed.
//! Inputs: `model`, `data`, and a `teacher` for `reverse_kl`. Outputs: `metrics`, `predictions`.
//! Cost: one generation of all rows a seed; a forward pass for `loss`; one of each model a seed for `reverse_kl`.

use anyhow::{Context, ensure};
use candle_core::Tensor;
use contract::random::{below, philox, purpose};
use contract::{
    About, AnyValue, ConfigError, Conventions, Dataset, End, Env, Inputs, Metrics, Operator, Outputs, PortType, Ports,
    Predictions, Result, Row, Sink, Stage, Step,
};
use lm::loss::{Divergence, Source, Target, divergence_values, log_probs};
use lm::sample::Sampling;
use lm::{Dtype, Generate, Generated, LanguageModel, Prompt, SoftPrompt, generate};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use crate::aligned::Aligned;
use crate::finite::{Behind, NEXT_TOKEN, explain, not_finite};
use crate::score;
use crate::student_generate::sampling_errors;
use crate::text::Text;

/// The `with` of `evaluate`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What to measure.
    #[serde(default = "default_metrics")]
    pub metrics: Vec<Metric>,
    /// Seeds of the sampled answers, one answer a row and seed; of no effect when greedy.
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// 1 samples from the model's own distribution, 0 is greedy.
    #[serde(default = "one")]
    pub temperature: f32,
    /// Samples among the so many likeliest tokens; 0: all.
    #[serde(default)]
    pub top_k: usize,
    /// Samples among the likeliest tokens that make up this probability; 1: all.
    #[serde(default = "one")]
    pub top_p: f32,
    /// Divides the logits of tokens that have occurred (Keskar et al., 2019); 1 switches it off.
    #[serde(default = "one")]
    pub repetition_penalty: f32,
    /// Forbids to repeat an n-gram of this length; 0 switches it off. Left out: as the conventions say.
    #[serde(default)]
    pub no_repeat_ngram: Option<usize>,
    /// Tokens an answer may have.
    #[serde(default = "default_max_new_tokens")]
    pub max_new_tokens: usize,
    /// Prompts are cut to their first so many tokens; left out: never (`reference`: 256).
    #[serde(default)]
    pub max_prompt_length: Option<usize>,
    /// Only the first so many rows.
    #[serde(default)]
    pub rows: Option<usize>,
    /// Whether words are stemmed before ROUGE-L compares them, as in the published figures.
    #[serde(default = "yes")]
    pub stem: bool,
    /// Type that matrices are multiplied in; `bf16` needs a GPU. Trained weights and moments are f32 either way.
    #[serde(default)]
    pub dtype: Dtype,
    /// Rows that go through the model at once: a matter of memory.
    #[serde(default = "default_batch")]
    pub batch: usize,
}

/// Something to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// ROUGE-L F1 of the answers, percent.
    RougeL,
    /// Share of answers equal to a reference but for case, punctuation and space, percent.
    ExactMatch,
    /// Mean cross-entropy of the given responses, nats a token.
    Loss,
    /// Mean KL(model || teacher) on the model's answers, nats a token.
    ReverseKl,
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

impl Stage for Evaluate {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "evaluate",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "scores a model's answers (ROUGE-L, exact match), its loss, and its distance to a teacher",
            example: "kind: evaluate\nin: {model: train.student, data: data.test}\nwith: {max_new_tokens: 48, seeds: [10, 20, 30, 40, 50]}",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        let reference = conventions == Conventions::Reference;
        config.no_repeat_ngram.get_or_insert(if reference { 6 } else { 0 });
        if reference {
            config.max_prompt_length.get_or_insert(256);
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = sampling_errors(&config.sampling());
        if config.metrics.is_empty() {
            errors.push(ConfigError::at("metrics", "there is nothing to measure"));
        }
        if config.seeds.is_empty() && config.metrics.iter().any(|m| m.reads_answers()) {
            errors.push(ConfigError::at("seeds", "sampled answers need a seed").hint("`seeds: [10]`"));
        }
        if config.batch == 0 {
            errors.push(ConfigError::at("batch", "expected 1 row or more, got 0"));
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
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the model")
            .output("metrics", PortType::Metrics, "every metric with its interval and seeds")
            .output("predictions", PortType::Predictions, "every answer with its scores")
            .agree("vocabulary", &["model", "data", "teacher"])
            .agree("width", &["model", "prompt"])
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Evaluating(config)))
    }
}

impl Config {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram: self.no_repeat_ngram.unwrap_or(0),
        }
    }

    fn measures(&self, metric: Metric) -> bool {
        self.metrics.contains(&metric)
    }
}

struct Evaluating(Config);

impl Operator for Evaluating {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let Evaluating(config) = &*self;
        let model = inputs.take::<LanguageModel>("model")?.frozen().computed_in(config.dtype)?;
        let teacher = inputs.take_optional::<LanguageModel>("teacher")?;
        let teacher = teacher.map(|teacher| teacher.frozen().computed_in(config.dtype)).transpose()?;
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let data = inputs.take::<Dataset>("data")?;
        let rows = evaluated_rows(&data, config);
        ensure!(!rows.is_empty(), "the data to evaluate on has no rows");

        let mut metrics = Map::new();
        let mut predictions = Vec::new();
        if config.measures(Metric::Loss) {
            metrics.insert("loss".into(), self.loss(&model, prompt.as_ref(), &rows)?);
        }
        if config.metrics.iter().any(|metric| metric.reads_answers()) {
            let answers = self.answer(&model, prompt.as_ref(), &rows, &data, sink)?;
            let mut scores = Scores::new(config, rows.len());
            for (seed, generated) in &answers {
                scores.text(*seed, &rows, generated, &data, &mut predictions)?;
                if let (true, Some(teacher)) = (config.measures(Metric::ReverseKl), &teacher) {
                    scores.distance(*seed, self.reverse_kl(&model, prompt.as_ref(), teacher, &rows, generated)?);
                }
            }
            metrics.extend(scores.summary());
        }
        Ok(Outputs::new().with("metrics", Metrics(metrics)).with("predictions", Predictions(predictions)))
    }
}

fn evaluated_rows(data: &Dataset, config: &Config) -> Vec<Row> {
    let rows = data.rows.iter().take(config.rows.unwrap_or(usize::MAX)).cloned();
    let limit = config.max_prompt_length.unwrap_or(usize::MAX);
    rows.map(|mut row| {
        row.prompt.truncate(limit);
        row
    })
    .collect()
}

impl Evaluating {
    /// One answer a row for every seed; a greedy answer does not depend on the seed and is made once.
    fn answer(
        &self,
        model: &LanguageModel,
        prompt: Option<&Tensor>,
        rows: &[Row],
        data: &Dataset,
        sink: &mut dyn Sink,
    ) -> Result<Vec<(u64, Vec<Generated>)>> {
        let Evaluating(config) = self;
        let seeds = if config.temperature == 0.0 { &config.seeds[..1] } else { &config.seeds[..] };
        let prompts: Vec<Prompt<'_>> = rows.iter().map(|row| Prompt { row: row.id, ids: &row.prompt }).collect();
        let total = (seeds.len() * rows.len()) as u64;
        let mut answers = Vec::with_capacity(seeds.len());
        for (index, &seed) in seeds.iter().enumerate() {
            let options = Generate {
                sampling: config.sampling(),
                max_new_tokens: config.max_new_tokens,
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
        for chunk in rows.chunks(self.0.batch) {
            let text = Aligned::of(chunk);
            if text.tokens() == 0 {
                continue;
            }
            let found = log_probs(&text.hidden(model, prompt, None)?, model.head(), &text.labels)?;
            let mut rest = found.as_slice();
            for row in chunk {
                let (own, after) = rest.split_at(Aligned::tokens_of(row));
                rest = after;
                let sum = -own.iter().map(|&p| f64::from(p)).sum::<f64>();
                if !sum.is_finite() {
                    return Err(not_finite("the loss", row, &[Behind::new("model", model, prompt)]));
                }
                sums.push(sum);
                counts.push(own.len() as f64);
            }
        }
        ensure!(counts.iter().sum::<f64>() > 0.0, "the data to evaluate on has no response to measure the loss of");
        Ok(summarise(&[(None, ratio(&sums, &counts))], &[sums], &[counts]))
    }

    /// Sum over tokens of KL(model || teacher), and the number of tokens, for every row.
    fn reverse_kl(
        &self,
        model: &LanguageModel,
        prompt: Option<&Tensor>,
        teacher: &LanguageModel,
        rows: &[Row],
        generated: &[Generated],
    ) -> Result<Vec<(f64, f64)>> {
        let mut distances = Vec::with_capacity(rows.len());
        let head = teacher.head_beside(model)?;
        let written: Vec<Row> = rows
            .iter()
            .zip(generated)
            .map(|(row, generated)| Row { response: generated.ids.clone(), ..row.clone() })
            .collect();
        for chunk in written.chunks(self.0.batch) {
            let text = Aligned::of(chunk);
            let values = if text.tokens() == 0 {
                Vec::new()
            } else {
                let own = text.hidden(model, prompt, None)?;
                let other = text.hidden(teacher, None, None)?;
                let teacher = Target {
                    source: Source::Head { hidden: &other, head: &head },
                    divergence: Divergence::ReverseKl,
                    coefficient: 1.0,
                    temperature: 1.0,
                };
                divergence_values(&own, model.head(), &[teacher])?.remove(0)
            };
            let mut rest = values.as_slice();
            for row in chunk {
                let (own, after) = rest.split_at(Aligned::tokens_of(row));
                rest = after;
                let sum = own.iter().sum::<f64>();
                if !sum.is_finite() {
                    let models = [Behind::new("model", model, prompt), Behind::new("teacher", teacher, None)];
                    return Err(not_finite("`reverse_kl`", row, &models));
                }
                distances.push((sum, own.len() as f64));
            }
        }
        Ok(distances)
    }
}

/// Scores of every row by metric and seed, as sums and counts, so that a mean is a ratio of sums.
struct Scores<'a> {
    config: &'a Config,
    rows: usize,
    by_metric: Vec<Measurement>,
}

/// One metric: for every seed, the sum and the count of each row.
struct Measurement {
    metric: &'static str,
    seeds: Vec<u64>,
    sums: Vec<Vec<f64>>,
    counts: Vec<Vec<f64>>,
}

impl<'a> Scores<'a> {
    fn new(config: &'a Config, rows: usize) -> Self {
        Scores { config, rows, by_metric: Vec::new() }
    }

    fn add(&mut self, metric: &'static str, seed: u64, sums: Vec<f64>, counts: Vec<f64>) {
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

    fn text(
        &mut self,
        seed: u64,
        rows: &[Row],
        generated: &[Generated],
        data: &Dataset,
        predictions: &mut Vec<Map<String, Json>>,
    ) -> Result<()> {
        let tokenizer = Text::new(&data.tokenizer)?;
        let stemming = if self.config.stem { score::Stemming::Porter } else { score::Stemming::Off };
        let scored: Vec<(String, f64, f64)> = rows
            .par_iter()
            .zip(generated)
            .map(|(row, generated)| {
                let text = score::clean(&tokenizer.decode(&generated.ids)?);
                let rouge_l = score::rouge_l_with(&text, &row.references, stemming);
                let exact_match = f64::from(u8::from(score::exact_match(&text, &row.references)));
                Ok((text, 100.0 * rouge_l, 100.0 * exact_match))
            })
            .collect::<Result<_>>()?;
        for ((row, generated), (text, rouge_l, exact_match)) in rows.iter().zip(generated).zip(&scored) {
            let prediction = json!({
                "id": row.id, "seed": seed, "text": text, "rouge_l": rouge_l, "exact_match": exact_match,
                "tokens": generated.ids.len(), "end": if generated.end == End::Stop { "stop" } else { "length" },
            });
            predictions.push(prediction.as_object().cloned().unwrap_or_default());
        }
        let ones = vec![1.0; self.rows];
        if self.config.measures(Metric::RougeL) {
            self.add("rouge_l", seed, scored.iter().map(|s| s.1).collect(), ones.clone());
        }
        if self.config.measures(Metric::ExactMatch) {
            self.add("exact_match", seed, scored.iter().map(|s| s.2).collect(), ones.clone());
        }
        self.add("response_tokens", seed, generated.iter().map(|g| g.ids.len() as f64).collect(), ones);
        Ok(())
    }

    fn distance(&mut self, seed: u64, rows: Vec<(f64, f64)>) {
        let (sums, counts) = rows.into_iter().unzip();
        self.add("reverse_kl", seed, sums, counts);
    }

    fn summary(&self) -> Map<String, Json> {
        let summarised = self.by_metric.iter().map(|Measurement { metric, seeds, sums, counts }| {
            let means = sums.iter().zip(counts).map(|(sums, counts)| ratio(sums, counts));
            let by_seed: Vec<(Option<u64>, f64)> = seeds.iter().copied().map(Some).zip(means).collect();
            ((*metric).to_owned(), summarise(&by_seed, sums, counts))
        });
        summarised.collect()
    }
}

fn ratio(sums: &[f64], counts: &[f64]) -> f64 {
    let count: f64 = counts.iter().sum();
    if count > 0.0 { sums.iter().sum::<f64>() / count } else { 0.0 }
}

/// Resamples of the rows behind an interval. A thousand put about 25 draws beyond either end of it.
const RESAMPLES: usize = 1000;

/// Mean over seeds, and the 2.5 and 97.5 percentiles of that mean when rows are drawn anew, with replacement
/// (Efron, 1979; for ROUGE: Lin, 2004).
fn summarise(by_seed: &[(Option<u64>, f64)], sums: &[Vec<f64>], counts: &[Vec<f64>]) -> Json {
    let rows = sums[0].len();
    let over_seeds = |columns: &[Vec<f64>], row: usize| columns.iter().map(|c| c[row]).sum::<f64>();
    let row_sums: Vec<f64> = (0..rows).map(|row| over_seeds(sums, row)).collect();
    let row_counts: Vec<f64> = (0..rows).map(|row| over_seeds(counts, row)).collect();
    let mut means: Vec<f64> = (0..RESAMPLES)
        .into_par_iter()
        .map(|resample| {
            let (mut sum, mut count) = (0.0, 0.0);
            for draw in 0..rows {
                let [a, b, ..] = philox(0, [draw as u32, 0, resample as u32, purpose::BOOTSTRAP]);
                let row = below(a, b, rows as u64) as usize;
                sum += row_sums[row];
                count += row_counts[row];
            }
            if count > 0.0 { sum / count } else { 0.0 }
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let interval = [means[RESAMPLES / 40], means[RESAMPLES - 1 - RESAMPLES / 40]];
    let mean = by_seed.iter().map(|(_, value)| value).sum::<f64>() / by_seed.len() as f64;
    let mut summary = json!({"mean": round(mean), "interval": interval.map(round)});
    if by_seed.iter().any(|(seed, _)| seed.is_some()) {
        let seeds = by_seed.iter().filter_map(|(seed, value)| Some((seed.as_ref()?.to_string(), json!(round(*value)))));
        summary["seeds"] = Json::Object(seeds.collect());
    }
    summary
}

/// Six decimals: more than any of the metrics carries, few enough to read.
fn round(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_over_seeds_and_the_interval_holds_it() {
        let sums = vec![vec![0.0, 100.0, 50.0, 50.0], vec![10.0, 90.0, 60.0, 40.0]];
        let counts = vec![vec![1.0; 4]; 2];
        let by_seed = [(Some(10), 50.0), (Some(20), 50.0)];
        let summary = summarise(&by_seed, &sums, &counts);
        assert_eq!(summary["mean"], 50.0);
        assert_eq!(summary["seeds"]["20"], 50.0);
        let (low, high) = (summary["interval"][0].as_f64().unwrap(), summary["interval"][1].as_f64().unwrap());
        assert!((5.0..50.0).contains(&low) && (50.0..95.0).contains(&high), "{low} {high}");
    }

    #[test]
    fn a_row_that_is_always_the_same_has_an_interval_of_no_width() {
        let summary = summarise(&[(None, 2.0)], &[vec![4.0, 4.0]], &[vec![2.0, 2.0]]);
        assert_eq!(summary["interval"], json!([2.0, 2.0]));
    }
}
