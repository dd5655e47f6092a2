//! `mix`: what a round learns from: given text, new text of the student's, or text that it wrote before.
//!
//! ```yaml
//! mixed:
//!   kind: mix
//!   in: {data: windows.batch, model: carry.student, scores: carry.scores}
//!   with: {capacity: 1000, max_new_tokens: 48, seed: 10}
//! ```
//!
//! The adaptive off-policy scheme of DistiLLM (Ko et al., "DistiLLM: Towards streamlined distillation for large language models",
//! 2024, section 3.2). A round learns from the student's text with a probability, the threshold, which begins at `threshold`
//! and rises by `rise` whenever the validation loss on `scores` is at least `tolerance` above what it was at the last rise, or
//! at first. Of these rounds a part has new text (`fresh`), which also goes into a replay buffer of `capacity` responses; the
//! others take as many responses out of the buffer. While that is not full, all of them have new text.
//!
//! The draw decides for a whole round, as published. It depends on the seed and the round alone. The buffer, the threshold and the
//! losses that it goes by are inner state, and part of every cut.
//!
//! Inputs: `data`, `model`, `scores`. Outputs: `data`; a row of metrics a round: `threshold`, the size of the `buffer`, and
//! whether the text is `fresh` or `replayed`. Cost: in a round with new text that of `student-generate`, else nothing.

use std::any::Any;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use contract::random::{permutation, philox, purpose, uniform};
use contract::{
    About, AnyValue, Bounds, Cause, ConfigError, Conventions, Dataset, Env, Facts, Inputs, Longest, Metrics, Operator,
    Outlook, Outputs, PortType, Ports, Result, Row, Sink, Stage, Step, TokenizerFile, Value, limits,
};
use lm::LanguageModel;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use crate::foresight;
use crate::writing::{self, CutOff, Writer};

writing::config! {
    /// The `with` of `mix`.
    pub struct Config {
        /// Responses that the buffer holds; the oldest make room. As published.
        #[serde(default = "default_capacity")]
        #[schemars(range(min = 1, max = limits::ROWS))]
        pub capacity: usize,
        /// Probability, at first, that a round learns from the student's text. As published.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub threshold: f64,
        /// What is added to it when the validation loss has grown; it never exceeds 1. As published.
        #[serde(default = "tenth")]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub rise: f64,
        /// By how much the validation loss must have grown, in nats a token. As published.
        #[serde(default = "tenth")]
        #[schemars(range(min = 0.0, max = limits::WEIGHT))]
        pub tolerance: f64,
        /// In which part of the student's rounds its text is new.
        #[serde(default)]
        pub fresh: Fresh,
        /// At which round the decay of `fresh` begins to count; left out: as the conventions say.
        #[serde(default)]
        pub count: Option<Count>,
        /// What becomes of a response that was cut off; left out: as the conventions say.
        #[serde(default)]
        pub cut_off: Option<crate::writing::CutOff>,
    }
}

/// In which part of the student's rounds its text is new, at round `k` of `K`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fresh {
    /// `1 - k / K`: the student changes less and less.
    #[default]
    Decreasing,
    /// One half.
    Constant,
    /// `k / K`.
    Increasing,
}

/// What `k` is in the first round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Count {
    /// 0.
    Rounds,
    /// 1, as in the published program.
    Published,
}

fn default_capacity() -> usize {
    1000
}

fn tenth() -> f64 {
    0.1
}

/// The kind.
pub struct Mix;

impl Stage for Mix {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "mix",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "chooses between given text, new text of the student's, and what it wrote before",
            example: "kind: mix\nin: {data: windows.batch, model: carry.student, scores: carry.scores}\nwith: {capacity: 1000, max_new_tokens: 48, seed: 10}",
            reads_clock: true,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.cut_off.get_or_insert(CutOff::of(conventions));
        config.count.get_or_insert(match conventions {
            Conventions::Sound => Count::Rounds,
            Conventions::Reference => Count::Published,
        });
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        writing::sampling_errors(&config.sampling())
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("data", PortType::Dataset, "given text, whose prompts the student answers")
            .input("model", PortType::Model, "the student")
            .optional("scores", PortType::Metrics, "what `evaluate` last measured: its `loss` moves the threshold")
            .output("data", PortType::Dataset, "what this round learns from")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn load_state(&self, folder: &Path, _env: &Env) -> Result<AnyValue> {
        Ok(Arc::new(State::load(folder)?))
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        outlook.holds("model");
        outlook.same_vocabulary(&["data", "model"]);
        outlook.same_end("data", "model");
        foresight::computes_in(outlook, config.dtype);
        let data = outlook.input("data");
        let rows = data.row_count();
        if rows.least > config.capacity as u64 {
            outlook.error(
                [Cause::Field("capacity".into())],
                format!("a round has {} rows, and the buffer holds {}", rows.least, config.capacity),
                "raise `capacity`, or lower `take` of the window",
            );
        }
        if config.threshold == 0.0 && !outlook.has("scores") {
            outlook.warn(
                [Cause::Field("threshold".into())],
                "the student's text is never learnt from: `threshold` is 0, and no `scores` raise it",
                "connect the metrics of an `evaluate` stage that measures `loss` to `scores`, by a carried value",
            );
        }
        let written = outlook.writes("model", None, &outlook.rows("data"), config.max_new_tokens as u64);
        let longest = data.text.most.zip(written.most).map(|(given, new)| given.max(new));
        outlook.output("data", Facts { text: Longest::at_most(longest), responses: Bounds::ANY, ..data });
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, _env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let state = state.map(|state| state.into_any().downcast::<State>().ok().context("not the state of `mix`"));
        let state = match state.transpose()? {
            Some(state) => State::clone(&state),
            None => State { threshold: config.threshold, ..State::default() },
        };
        Ok(Box::new(Mixing { config, longest: usize::MAX, state }))
    }
}

struct Mixing {
    config: Config,
    /// Prompt and response together, as all who read them can take.
    longest: usize,
    state: State,
}

/// Where the text of a round comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Given,
    Fresh,
    Replayed,
}

impl Operator for Mixing {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let model = inputs.take::<LanguageModel>("model")?;
        if let Some(scores) = inputs.take_optional::<Metrics>("scores")? {
            let Some(loss) = scores.number("loss") else {
                bail!("`scores` has no `loss` to go by: let the stage before it measure that (`metrics: [loss]`)")
            };
            self.state.measure(loss, &self.config);
        }
        let take = data.rows.len();
        let capacity = self.config.capacity;
        ensure!(take <= capacity, "a round has {take} rows, and the buffer holds {capacity}: raise `capacity`");
        let from = self.config.draw(&self.state, step);
        let rows = match from {
            From::Given => data.rows.clone(),
            From::Fresh => {
                let rows = self.write(&model.frozen().computed_in(self.config.dtype)?, &data, step, sink)?;
                self.state.push(&rows, capacity);
                rows
            }
            From::Replayed => {
                let order = permutation(capacity, self.config.seed, purpose::REPLAY, step.round as u32);
                order[..take].iter().map(|place| self.state.buffer[*place].clone()).collect()
            }
        };
        self.state.tokenizer.get_or_insert_with(|| data.tokenizer.clone());
        let mut row = Map::new();
        row.insert("update".into(), json!(step.round));
        row.insert("threshold".into(), json!(self.state.threshold));
        row.insert("buffer".into(), json!(self.state.buffer.len()));
        row.insert("fresh".into(), json!(u8::from(from == From::Fresh)));
        row.insert("replayed".into(), json!(u8::from(from == From::Replayed)));
        sink.metrics(row);
        Ok(Outputs::new().with("data", Dataset { rows, tokenizer: data.tokenizer.clone() }))
    }

    fn make_room(&mut self, longest: u64) {
        self.longest = usize::try_from(longest).unwrap_or(usize::MAX);
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        Ok(self.state.tokenizer.is_some().then(|| -> AnyValue { Arc::new(self.state.clone()) }))
    }
}

impl Mixing {
    fn write(&self, model: &LanguageModel, data: &Dataset, step: &Step, sink: &mut dyn Sink) -> Result<Vec<Row>> {
        let options = self.config.options(self.longest, purpose::GENERATE, step.round as u32);
        let force_end = self.config.cut_off == Some(CutOff::ForcedEnd);
        let asked: Vec<&Row> = data.rows.iter().collect();
        Writer { model, teacher: None }.answer(&asked, &options, force_end, data.tokenizer.end, sink)
    }
}

impl Config {
    /// Where the text of this round comes from.
    fn draw(&self, state: &State, step: &Step) -> From {
        let [word, ..] = philox(self.seed, [0, 0, step.round as u32, purpose::MIX]);
        let drawn = f64::from(uniform(word));
        let counted = step.round + u64::from(self.count == Some(Count::Published));
        let past = counted as f64 / step.rounds as f64;
        let fresh = match self.fresh {
            Fresh::Decreasing => 1.0 - past,
            Fresh::Constant => 0.5,
            Fresh::Increasing => past,
        };
        if drawn >= state.threshold {
            From::Given
        } else if drawn < state.threshold * fresh || state.buffer.len() < self.capacity {
            From::Fresh
        } else {
            From::Replayed
        }
    }
}

/// What `mix` knows of earlier rounds.
#[derive(Clone, Debug, Default, PartialEq)]
struct State {
    /// Responses of the student, the oldest first.
    buffer: VecDeque<Row>,
    /// Of the rows; there from the first round on.
    tokenizer: Option<TokenizerFile>,
    threshold: f64,
    /// The validation loss that the next is compared with.
    reference: Option<f64>,
    /// The one that was last seen: of one measurement nothing follows twice.
    seen: Option<f64>,
}

impl State {
    /// Takes notice of a validation loss.
    fn measure(&mut self, loss: f64, config: &Config) {
        if self.seen.replace(loss) == Some(loss) {
            return;
        }
        match self.reference {
            None => self.reference = Some(loss),
            Some(reference) if loss >= reference + config.tolerance => {
                self.threshold = (self.threshold + config.rise).min(1.0);
                self.reference = Some(loss);
            }
            Some(_) => {}
        }
    }

    fn push(&mut self, rows: &[Row], capacity: usize) {
        self.buffer.extend(rows.iter().cloned());
        self.buffer.drain(..self.buffer.len().saturating_sub(capacity));
    }

    fn load(folder: &Path) -> Result<Self> {
        let Dataset { rows, tokenizer } = Dataset::load(folder)?;
        let path = folder.join(FILE);
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let numbers: Numbers =
            serde_json::from_slice(&bytes).with_context(|| format!("cannot parse `{}`", path.display()))?;
        Ok(State {
            buffer: rows.into(),
            tokenizer: Some(tokenizer),
            threshold: f64::from_bits(numbers.threshold),
            reference: numbers.reference.map(f64::from_bits),
            seen: numbers.seen.map(f64::from_bits),
        })
    }
}

const FILE: &str = "mix.json";

/// `mix.json`: numbers by their bits, because JSON has no infinity.
#[derive(Serialize, Deserialize)]
struct Numbers {
    threshold: u64,
    reference: Option<u64>,
    seen: Option<u64>,
}

impl Value for State {
    fn port_type(&self) -> PortType {
        PortType::State
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let tokenizer = self.tokenizer.clone().context("a state before the first round")?;
        Dataset { rows: self.buffer.iter().cloned().collect(), tokenizer }.save(folder)?;
        let bits = |number: Option<f64>| number.map(f64::to_bits);
        let numbers =
            Numbers { threshold: self.threshold.to_bits(), reference: bits(self.reference), seen: bits(self.seen) };
        contract::value::write(&folder.join(FILE), &serde_json::to_vec(&numbers)?)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use contract::{End, Kind};
    use lm::{Architecture, Family};

    use super::*;
    use crate::testing::{Log, Scratch, output, row};

    fn tokenizer() -> TokenizerFile {
        TokenizerFile::new("{}", 0, 40)
    }

    fn config(json: serde_json::Value) -> Config {
        let resolved = Kind::resolve(&Mix, &json, Conventions::Sound).unwrap();
        serde_json::from_value(resolved).unwrap()
    }

    #[test]
    fn the_threshold_rises_when_the_loss_has_grown_since_the_last_rise() {
        let config = config(json!({"max_new_tokens": 4, "rise": 0.4}));
        let mut state = State::default();
        let thresholds: Vec<f64> = [2.0, 2.05, 2.05, 2.1, 2.1, 2.1, 2.15, 1.0, 2.25, 2.4]
            .into_iter()
            .map(|loss| {
                state.measure(loss, &config);
                state.threshold
            })
            .collect();
        // Compared with 2.0, then 2.1, 2.25; a fall moves nothing, and one measurement counts once.
        assert_eq!(thresholds, [0.0, 0.0, 0.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.8, 1.0]);
    }

    #[test]
    fn draws_fall_into_three_parts() {
        let full =
            |threshold| State { threshold, buffer: (0..8).map(|id| row(id, &[1], &[2])).collect(), ..State::default() };
        for (fresh, share) in [("decreasing", 0.75), ("constant", 0.5), ("increasing", 0.25)] {
            let config = config(json!({"max_new_tokens": 4, "capacity": 8, "fresh": fresh, "seed": 3}));
            let mut counts = [0; 3];
            // A quarter of the way; the draw goes by the round, so the clock is stretched with it.
            for round in 0..4000 {
                let step = Step { round, rounds: (4 * round).max(1), ..Step::once() };
                counts[config.draw(&full(0.6), &step) as usize] += 1;
            }
            let near = |found: usize, part: f64| (found as f64 / 4000.0 - part).abs() < 0.03;
            let [given, new, old] = counts;
            assert!(
                near(given, 0.4) && near(new, 0.6 * share) && near(old, 0.6 * (1.0 - share)),
                "{fresh}: {counts:?}"
            );
            let step = Step { round: 5, rounds: 10, ..Step::once() };
            let empty = State { threshold: 1.0, ..State::default() };
            assert_eq!(config.draw(&empty, &step), From::Fresh, "there is nothing to replay");
        }
    }

    #[test]
    fn the_oldest_responses_make_room() {
        let mut state = State::default();
        for first in [0, 3, 6] {
            let rows: Vec<Row> = (first..first + 3).map(|id| row(id, &[1], &[2])).collect();
            state.push(&rows, 5);
        }
        assert_eq!(state.buffer.iter().map(|row| row.id).collect::<Vec<_>>(), [4, 5, 6, 7, 8]);
    }

    const ROUNDS: u64 = 12;

    /// Rounds with a state that is saved and loaded after those in `cuts`.
    fn rounds(cuts: &[u64]) -> (Vec<Vec<Row>>, Vec<Map<String, serde_json::Value>>) {
        let json = json!({"max_new_tokens": 4, "capacity": 6, "threshold": 0.5, "rise": 0.25, "seed": 1});
        let config = Kind::resolve(&Mix, &json, Conventions::Sound).unwrap();
        let env = Env { device: "cpu".into(), threads: 1, scratch: std::env::temp_dir() };
        let shape = Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(Family::Gpt2, 1, 16) };
        let model = Arc::new(LanguageModel::init(&shape, tokenizer(), 1, &Device::Cpu).unwrap());
        let mut operator = Kind::start(&Mix, &config, &env, None).unwrap();
        let (mut texts, mut log) = (Vec::new(), Log::default());
        for round in 0..ROUNDS {
            let rows = (0..3).map(|id| row(round * 3 + id, &[1 + id as u32, 7], &[5, 0])).collect();
            let mut inputs = Inputs::new();
            inputs.insert("data", Arc::new(Dataset { rows, tokenizer: tokenizer() }));
            inputs.insert("model", model.clone());
            let loss = json!({"mean": 1.0 + round as f64 / 20.0});
            inputs.insert("scores", Arc::new(Metrics([("loss".to_owned(), loss)].into_iter().collect())));
            let step = Step { round, rounds: ROUNDS, epoch: 0, rounds_per_epoch: ROUNDS };
            let outputs = operator.run(inputs, &step, &mut log).unwrap();
            texts.push(output::<Dataset>(&outputs, "data").rows.clone());
            if cuts.contains(&round) {
                let scratch = Scratch::new();
                operator.state().unwrap().unwrap().save(scratch.path()).unwrap();
                let state = Stage::load_state(&Mix, scratch.path(), &env).unwrap();
                operator = Kind::start(&Mix, &config, &env, Some(state)).unwrap();
            }
        }
        (texts, log.rows)
    }

    #[test]
    fn buffer_and_threshold_survive_a_cut_after_any_round() {
        let (texts, metrics) = rounds(&[]);
        let sum = |name: &str| metrics.iter().map(|row| row[name].as_u64().unwrap()).sum::<u64>();
        assert!(sum("fresh") > 1 && sum("replayed") > 1 && sum("fresh") + sum("replayed") < ROUNDS, "{metrics:?}");
        assert!(metrics[ROUNDS as usize - 1]["threshold"].as_f64() > metrics[0]["threshold"].as_f64());
        let log_probs = |rows: &[Row]| rows.iter().filter(|row| row.log_probs.is_some()).count();
        for (text, metrics) in texts.iter().zip(&metrics) {
            let own = metrics["fresh"] == 1 || metrics["replayed"] == 1;
            assert_eq!(log_probs(text), if own { 3 } else { 0 });
            assert!(own || text.iter().all(|row| row.end == End::Stop && row.response == [5, 0]));
        }
        for cut in 0..ROUNDS {
            assert_eq!(rounds(&[cut]), (texts.clone(), metrics.clone()), "cut after round {cut}");
        }
        assert_eq!(rounds(&(0..ROUNDS).collect::<Vec<_>>()), (texts, metrics), "cut after every round");
    }

    #[test]
    fn a_round_that_the_buffer_cannot_hold_is_refused() {
        let mut outlook = Outlook::new(
            contract::Machine::default(),
            [("data".to_owned(), Facts { rows: vec![Bounds::exactly(16)], ..Facts::default() })].into(),
            None,
        );
        Stage::foresee(&Mix, &config(json!({"max_new_tokens": 4, "capacity": 8, "threshold": 1.0})), &mut outlook);
        assert!(outlook.findings[0].is_error && outlook.findings[0].message.contains("16 rows"), "{outlook:?}");
    }
}
