//! `exposure-bias`: how much a model's errors grow because it goes on from its own text.
//!
//! ```yaml
//! bias:
//!   kind: exposure-bias
//!   in: {model: train.student, teacher: teacher, data: data.test}
//!   with: {max_new_tokens: 48, samples: 3}
//! ```
//!
//! Arora et al., "Why exposure bias matters: An imitation learning perspective of error accumulation in language generation",
//! 2022, section 4. The error at a position is KL(teacher || model). `R(l)` is the sum of the errors at the first `l` positions of
//! text that the model wrote, `E(l)` the same of text that the teacher wrote; excess accumulated error is
//! `100 (R(l) - E(l)) / E(l)`, in percent: 0 for a model that errs no more where it went itself.
//!
//! `formula: corrected` averages a position over all texts that reach it, the first position included. `published` is what the
//! programs of MiniLLM and PromptKD compute: the position behind each token but the end token, so that the first is left out;
//! an average for every prompt of its samples, with 0.001 in the denominator, so that texts which have ended count as free of
//! error.
//!
//! Inputs: `model`, `teacher` and its soft prompt, `data` (its prompts). Outputs: `metrics` with the excess at length 16 and at
//! the end, and `table`, one line a length. In a loop, with `every: epoch`, a row of metrics each time. Cost: `samples` texts of each
//! of the two, and a forward pass of both over each.

use anyhow::ensure;
use contract::limits;
use contract::random::purpose;
use contract::{
    About, AnyValue, ConfigError, Conventions, Dataset, End, Env, Folder, Inputs, Metrics, Operator, Outlook, Outputs,
    PortType, Ports, Result, Row, Sink, Stage, Step,
};
use lm::loss::Divergence;
use lm::sample::Sampling;
use lm::{Dtype, Generate, LanguageModel, Prompt, SoftPrompt, generate};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use crate::aligned::{Reader, divergences};
use crate::finite::{Behind, NEXT_TOKEN, explain};
use crate::{foresight, writing};

/// The `with` of `exposure-bias`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Tokens of a text.
    #[schemars(range(min = 1, max = limits::TOKENS))]
    pub max_new_tokens: usize,
    /// Texts of each model for every prompt; 3 as published.
    #[serde(default = "default_samples")]
    #[schemars(range(min = 1, max = limits::BATCH))]
    pub samples: u64,
    /// 1 samples from a model's own distribution, 0 is greedy.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0, max = limits::TEMPERATURE.1))]
    pub temperature: f32,
    /// Forbids to repeat an n-gram of this length; 0 switches it off. Left out: as the conventions say.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::TOKENS))]
    pub no_repeat_ngram: Option<usize>,
    /// How errors are averaged; left out: as the conventions say.
    #[serde(default)]
    pub formula: Option<Formula>,
    /// Only the first so many rows.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::ROWS))]
    pub rows: Option<usize>,
    /// Rows that go through the models at once: a matter of memory.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1, max = limits::BATCH))]
    pub batch: usize,
    /// Type that matrices are multiplied in; `bf16` needs a GPU.
    #[serde(default)]
    pub dtype: Dtype,
    /// Seed of the draws.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::SEED))]
    pub seed: u64,
}

/// How errors are averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Formula {
    /// Over all texts that reach a position.
    Corrected,
    /// For every prompt over its samples, those that have ended counting as free of error.
    Published,
}

fn default_samples() -> u64 {
    3
}

fn one() -> f32 {
    1.0
}

fn default_batch() -> usize {
    64
}

/// The length whose excess the papers report.
const REPORTED: usize = 16;

/// The kind.
pub struct ExposureBias;

impl Stage for ExposureBias {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "exposure-bias",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "measures how errors grow because a model goes on from its own text",
            example: "kind: exposure-bias\nin: {model: train.student, teacher: teacher, data: data.test}\nwith: {max_new_tokens: 48}",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        let reference = conventions == Conventions::Reference;
        config.no_repeat_ngram.get_or_insert(if reference { 6 } else { 0 });
        config.formula.get_or_insert(if reference { Formula::Published } else { Formula::Corrected });
        if config.temperature == 0.0 {
            // Nothing is drawn.
            config.seed = 0;
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = writing::sampling_errors(&config.sampling());
        if config.temperature == 0.0 && config.samples > 1 {
            errors.push(ConfigError::at("samples", "greedy texts are all the same").hint("set `samples: 1`"));
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("model", PortType::Model, "whose errors are measured")
            .input("teacher", PortType::Model, "what they are measured by")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the teacher")
            .input("data", PortType::Dataset, "rows with the prompts")
            .output("metrics", PortType::Metrics, "the excess of accumulated errors, in percent")
            .output("table", PortType::Table, "errors and their excess by length")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        for model in ["model", "teacher"] {
            outlook.holds(model);
        }
        outlook.same_vocabulary(&["data", "model", "teacher"]);
        outlook.same_end("data", "model");
        outlook.same_width("teacher", "prompt");
        foresight::computes_in(outlook, config.dtype);
        outlook.takes_rows("data", "rows", config.rows.map(|rows| rows as u64));
        let rows = outlook.rows("data");
        // One token more than is written: what stands behind the last.
        outlook.writes("model", None, &rows, config.max_new_tokens as u64);
        outlook.writes("teacher", Some("prompt"), &rows, config.max_new_tokens as u64);
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Measuring { config, folder: env.scratch.join("exposure-bias") }))
    }
}

impl Config {
    fn sampling(&self) -> Sampling {
        let no_repeat_ngram = self.no_repeat_ngram.unwrap_or(0);
        Sampling { temperature: self.temperature, no_repeat_ngram, ..Sampling::default() }
    }
}

struct Measuring {
    config: Config,
    folder: std::path::PathBuf,
}

/// The two models.
#[derive(Clone, Copy)]
struct Pair<'a> {
    model: Reader<'a>,
    teacher: Reader<'a>,
}

impl Operator for Measuring {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let config = &self.config;
        let model = inputs.take::<LanguageModel>("model")?.frozen().computed_in(config.dtype)?;
        let teacher = inputs.take::<LanguageModel>("teacher")?.frozen().computed_in(config.dtype)?;
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let data = inputs.take::<Dataset>("data")?;
        let rows = &data.rows[..data.rows.len().min(config.rows.unwrap_or(usize::MAX))];
        ensure!(!rows.is_empty(), "there is no prompt to go on from");
        let pair = Pair {
            model: Reader { model: &model, prompt: None, view: None },
            teacher: Reader { model: &teacher, prompt: prompt.as_ref(), view: None },
        };
        let mut done = 0;
        let total = 2 * config.samples * rows.len() as u64;
        let mut accumulated = |by_teacher: bool, sink: &mut dyn Sink| {
            let errors = self.errors(&pair, rows, by_teacher, sink, &mut done, total)?;
            Ok::<_, anyhow::Error>(config.accumulate(&errors))
        };
        let (own, others) = (accumulated(false, sink)?, accumulated(true, sink)?);
        let lengths = own.len().min(others.len());
        ensure!(lengths > 0 && others[0] > 0.0, "the two models say the same: there is no error to compare with");
        let excess: Vec<f64> = (own.iter().zip(&others)).map(|(own, other)| 100.0 * (own - other) / other).collect();

        let mut table = "length,model_errors,teacher_errors,excess_percent\n".to_owned();
        for length in 0..lengths {
            table += &format!("{},{},{},{}\n", length + 1, own[length], others[length], excess[length]);
        }
        std::fs::create_dir_all(&self.folder)?;
        contract::value::write(&self.folder.join("exposure_bias.csv"), table.as_bytes())?;
        let last = excess[lengths - 1];
        let reported = excess.get(REPORTED - 1).copied().unwrap_or(last);
        let mut metrics = Map::new();
        metrics.insert("excess_error_16".into(), json!(reported));
        metrics.insert("excess_error".into(), json!(last));
        metrics.insert("lengths".into(), json!(lengths));
        let mut row = metrics.clone();
        row.insert("update".into(), json!(step.round));
        sink.metrics(row);
        Ok(Outputs::new().with("metrics", Metrics(metrics)).with("table", Folder::new(PortType::Table, &self.folder)))
    }
}

/// Errors by prompt, sample and position.
type Errors = Vec<Vec<Vec<f64>>>;

impl Measuring {
    fn errors(
        &self,
        pair: &Pair<'_>,
        rows: &[Row],
        by_teacher: bool,
        sink: &mut dyn Sink,
        done: &mut u64,
        total: u64,
    ) -> Result<Errors> {
        let config = &self.config;
        let prompts: Vec<Prompt<'_>> = rows.iter().map(|row| Prompt { row: row.id, ids: &row.prompt }).collect();
        let mut errors: Errors = vec![Vec::new(); rows.len()];
        for sample in 0..config.samples {
            let options = Generate {
                sampling: config.sampling(),
                max_new_tokens: config.max_new_tokens,
                longest: usize::MAX,
                seed: config.seed,
                purpose: purpose::EVALUATE,
                time: (2 * sample + u64::from(by_teacher)) as u32,
                batch: config.batch,
            };
            let (writer, port) = if by_teacher { (pair.teacher, "teacher") } else { (pair.model, "model") };
            let Reader { model: who, prompt: soft, .. } = writer;
            let before = *done;
            let mut progress = |rows| sink.progress(before + rows as u64, total, "texts");
            let written = generate(who, soft, &prompts, &options, &mut progress);
            let written = written
                .map_err(|error| explain(error, NEXT_TOKEN, |at| rows.get(at), &[Behind::new(port, who, soft)]))?;
            *done += rows.len() as u64;
            let texts: Vec<Row> = (rows.iter().zip(written))
                .map(|(row, written)| Row { response: config.read(written.ids, written.end), ..row.clone() })
                .collect();
            let found = divergences(pair.model, pair.teacher, Divergence::ForwardKl, &texts, config.batch)?;
            for (index, found) in found.into_iter().enumerate() {
                let first = usize::from(config.formula == Some(Formula::Published));
                errors[index].push(found[first.min(found.len())..].to_vec());
            }
        }
        Ok(errors)
    }
}

impl Config {
    /// The response whose tokens are predicted at the positions that count. Published, the position behind the last token of a
    /// text that was cut off counts, too: any token may stand there, for nobody reads it.
    fn read(&self, mut ids: Vec<u32>, end: End) -> Vec<u32> {
        if self.formula == Some(Formula::Published) && end == End::Length {
            ids.push(0);
        }
        ids
    }

    /// The sum of the errors at the first `l` positions, for `l` from 1 on.
    fn accumulate(&self, errors: &Errors) -> Vec<f64> {
        let longest = errors.iter().flatten().map(Vec::len).max().unwrap_or(0);
        let mut sum = 0.0;
        let at = |position: usize| match self.formula {
            Some(Formula::Published) => {
                let of_prompt = |samples: &Vec<Vec<f64>>| {
                    let found = samples.iter().filter_map(|sample| sample.get(position));
                    let (count, sum) = found.fold((0.0, 0.0), |(count, sum), error| (count + 1.0, sum + error));
                    sum / (count + 1e-3)
                };
                errors.iter().map(of_prompt).sum::<f64>() / errors.len() as f64
            }
            _ => {
                let found = errors.iter().flatten().filter_map(|sample| sample.get(position));
                let (count, sum) = found.fold((0.0, 0.0), |(count, sum), error| (count + 1.0, sum + error));
                sum / count
            }
        };
        let accumulated = (0..longest).map(|position| {
            sum += at(position);
            sum
        });
        accumulated.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::Device;
    use contract::Kind;
    use serde_json::Value as Json;

    use super::*;
    use crate::testing::{Scratch, output, row};

    fn json(name: &str) -> Json {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity");
        serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
    }

    fn model(name: &str) -> Arc<LanguageModel> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/promptkd").join(name);
        Arc::new(LanguageModel::load(&folder, &Device::Cpu).unwrap())
    }

    fn measure(model: &Arc<LanguageModel>, teacher: &Arc<LanguageModel>, config: Json) -> (Metrics, Vec<[f64; 4]>) {
        let prompts = json("promptkd/prompts.json");
        let prompts = prompts.as_array().unwrap().iter().enumerate();
        let rows = prompts.map(|(id, it)| {
            let prompt: Vec<u32> = serde_json::from_value(it["prompt"].clone()).unwrap();
            row(id as u64, &prompt, &[1])
        });
        let data = Dataset { rows: rows.collect(), tokenizer: model.tokenizer.clone() };
        let inputs: Vec<(&str, AnyValue)> =
            vec![("model", model.clone()), ("teacher", teacher.clone()), ("data", Arc::new(data))];
        let kind: &dyn Kind = &ExposureBias;
        let scratch = Scratch::new();
        let outputs = scratch.run(kind, config, inputs.into_iter().collect()).unwrap().0;
        let table =
            std::fs::read_to_string(output::<Folder>(&outputs, "table").path().join("exposure_bias.csv")).unwrap();
        let lines = table.lines().skip(1).map(|line| {
            let numbers: Vec<f64> = line.split(',').map(|number| number.parse().unwrap()).collect();
            numbers.try_into().unwrap()
        });
        (Metrics(output::<Metrics>(&outputs, "metrics").0.clone()), lines.collect())
    }

    /// `make_exposure.py` is the other program.
    #[test]
    fn both_formulas_are_those_of_an_independent_program() {
        let (student, teacher) = (model("student"), model("teacher"));
        let expected = json("exposure/expected.json");
        for formula in ["corrected", "published"] {
            let config = json!({"max_new_tokens": 20, "samples": 1, "temperature": 0.0, "formula": formula});
            let (metrics, table) = measure(&student, &teacher, config);
            let expected = &expected[formula];
            let right = |column: &str, at: usize| expected[column][at].as_f64().unwrap();
            assert_eq!(table.len(), expected["excess"].as_array().unwrap().len(), "{formula}");
            for (at, [length, own, other, excess]) in table.into_iter().enumerate() {
                assert_eq!(length as usize, at + 1);
                for (found, column) in [(own, "model"), (other, "teacher"), (excess, "excess")] {
                    let right = right(column, at);
                    let near = (found - right).abs() < 1e-4 * right.abs().max(1.0);
                    assert!(near, "{formula}, {column} at {length}: {found}, expected {right}");
                }
            }
            let reported = metrics.number("excess_error_16").unwrap();
            assert!((reported - right("excess", 15)).abs() < 1e-2);
        }
    }

    #[test]
    fn a_model_that_is_its_own_teacher_has_no_errors_to_compare() {
        let teacher = model("teacher");
        let kind: &dyn Kind = &ExposureBias;
        let data = Dataset { rows: vec![row(0, &[1, 2], &[3])], tokenizer: teacher.tokenizer.clone() };
        let inputs: Vec<(&str, AnyValue)> =
            vec![("model", teacher.clone()), ("teacher", teacher), ("data", Arc::new(data))];
        let error = Scratch::new().run(kind, json!({"max_new_tokens": 4}), inputs.into_iter().collect()).err().unwrap();
        assert!(error.to_string().contains("the two models say the same"), "{error}");
    }
}
