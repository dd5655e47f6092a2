//! A stage kind of your own beside the shipped ones: `shortest` keeps the rows with the shortest responses.
//!
//! ```text
//! cargo run --example custom_stage -- run shortest.yaml
//! cargo run --example custom_stage -- stages shortest
//! ```
//!
//! This is the whole program `pipeline` with one kind more. The first command runs the pipeline below and prints a table
//! with the longest response that was kept and the loss of a student who learned from these rows; a second time nothing
//! runs. The second prints the kind's page in the catalogue, made from the definitions here.

use std::process::ExitCode;

use contract::{
    About, AnyValue, ConfigError, Dataset, Env, Inputs, Metrics, Operator, Outputs, PortType, Ports, Result, Sink,
    Stage, Step,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

const PIPELINE: &str = "
version: 1
name: shortest
stages:
  corpus: {kind: download, with: {source: 'builtin:instruct', rows: 200, limit: {test: 20}}}
  tokenizer: {kind: train-tokenizer, in: {corpus: corpus}, with: {vocab_size: 400, template: task}}
  data: {kind: tokenize, in: {corpus: corpus, tokenizer: tokenizer}, with: {template: task, max_length: 96}}
  short: {kind: shortest, in: {data: data.train}, with: {rows: 64}}
  student:
    kind: finetune
    in: {data: short.data}
    with: {init: {architecture: gpt2, layers: 1, width: 32, positions: 128}, take: 16, epochs: 2, learning_rate: 3e-3}
  score: {kind: evaluate, in: {model: student, data: data.test}, with: {metrics: [loss]}}
report: {metrics: {longest kept: short.longest, loss: score.loss}}
";

fn main() -> ExitCode {
    let registry = stages::registry().with(Shortest);
    promptkd::main(
        registry,
        &[("shortest.yaml", PIPELINE)],
        &promptkd::Extras { score: stages::score::score, texts: stages::text::texts, gpus: stages::gpus },
    )
}

/// The kind: what it is called, what it reads and makes, how it is set.
struct Shortest;

/// The `with` of `shortest`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// How many rows to keep.
    rows: usize,
}

impl Stage for Shortest {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "shortest",
            version: 1, // part of the key: bumped when the same inputs give other bytes
            numerics: None,
            summary: "keeps the rows with the shortest responses",
            example: "kind: shortest\nin: {data: data.train}\nwith: {rows: 64}",
            reads_clock: false,
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let error = || ConfigError::at("rows", "expected 1 row or more, got 0");
        if config.rows == 0 { vec![error()] } else { Vec::new() }
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("data", PortType::Dataset, "rows to choose from")
            .output("data", PortType::Dataset, "the chosen rows, in their order")
            .output("metrics", PortType::Metrics, "`longest`: tokens of the longest response that was kept")
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Choosing(config)))
    }
}

/// The stage at work. It sees values, and neither keys nor the store.
struct Choosing(Config);

impl Operator for Choosing {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, _sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let length = |index: &usize| data.rows[*index].response.len();
        let mut chosen: Vec<usize> = (0..data.rows.len()).collect();
        chosen.sort_by_key(length);
        chosen.truncate(self.0.rows);
        chosen.sort_unstable();
        let longest = chosen.iter().map(length).max().unwrap_or(0);
        let metrics = Map::from_iter([("longest".to_owned(), json!(longest))]);
        Ok(Outputs::new().with("data", data.select(&chosen)).with("metrics", Metrics(metrics)))
    }
}
