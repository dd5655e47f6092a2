//! Fake stage kinds: fast, deterministic, and nasty where it matters. They stand in for the real ones in every test of the
//! runner. A "model" is a list of 64-bit numbers, and training it depends on the order of everything.

use std::any::Any;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use contract::dataset::{End, Row};
use contract::{
    About, Alone, AnyValue, Check, Dataset, Env, Facts, Folder, Inputs, Metrics, Operator, Outlook, Outputs, PortType,
    Ports, Predictions, Registry, Result, Sink, Source, Stage, Step, TokenizerFile, Value,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

/// Every fake kind.
pub fn registry() -> Registry {
    Registry::new(load)
        .with(Rows)
        .with(ReadRows)
        .with(Init)
        .with(Respond)
        .with(Learn)
        .with(Evaluate)
        .with(Fail)
        .with(Slow)
        .with(OnCard)
        .with(Count)
        .with(Moody)
        .with(Double)
}

fn load(port_type: PortType, folder: &Path, _env: &Env) -> Result<AnyValue> {
    Ok(match port_type {
        PortType::Dataset => Arc::new(Dataset::load(folder)?),
        PortType::Metrics => Arc::new(Metrics::load(folder)?),
        PortType::Model | PortType::SoftPrompt => Arc::new(Numbers::load(port_type, folder)?),
        other => Arc::new(Folder::new(other, folder)),
    })
}

/// A model, a soft prompt or the moments of an optimiser.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers {
    pub port_type: PortType,
    pub numbers: Vec<f64>,
}

impl Numbers {
    fn load(port_type: PortType, folder: &Path) -> Result<Self> {
        let path = folder.join("numbers.bin");
        let bytes = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let numbers = bytes.chunks_exact(8).map(|c| f64::from_le_bytes(c.try_into().expect("eight bytes"))).collect();
        Ok(Numbers { port_type, numbers })
    }
}

impl Value for Numbers {
    fn port_type(&self) -> PortType {
        self.port_type
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let bytes: Vec<u8> = self.numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        contract::value::write(&folder.join("numbers.bin"), &bytes)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

fn about(name: &'static str) -> About {
    About { name, version: 1, numerics: None, summary: "fake", example: "", reads_clock: false }
}

/// An operator made of a function.
struct Once<F>(F);

impl<F: FnMut(Inputs, &Step, &mut dyn Sink) -> Result<Outputs> + Send> Operator for Once<F> {
    fn run(&mut self, inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        (self.0)(inputs, step, sink)
    }
}

fn once(
    run: impl FnMut(Inputs, &Step, &mut dyn Sink) -> Result<Outputs> + Send + 'static,
) -> Result<Box<dyn Operator>> {
    Ok(Box::new(Once(run)))
}

/// Rows of made-up text.
struct Rows;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RowsConfig {
    rows: u64,
    #[serde(default)]
    seed: u64,
    #[serde(default = "words")]
    vocabulary: String,
}

fn words() -> String {
    "words".into()
}

impl Stage for Rows {
    type Config = RowsConfig;

    fn about(&self) -> About {
        about("rows")
    }

    fn ports(&self, _: &RowsConfig) -> Ports {
        Ports::new().output("data", PortType::Dataset, "rows")
    }

    fn start(&self, config: RowsConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |_, _, _| {
            let rows = (0..config.rows).map(|id| row(id, id * 31 + config.seed)).collect();
            Ok(Outputs::new().with("data", dataset(rows, &config.vocabulary)))
        })
    }
}

fn row(id: u64, number: u64) -> Row {
    let prompt = vec![(number % 97) as u32];
    Row {
        id,
        prompt,
        response: vec![(number % 89) as u32],
        end: End::Stop,
        log_probs: None,
        references: vec![],
        family: None,
    }
}

fn dataset(rows: Vec<Row>, vocabulary: &str) -> Dataset {
    Dataset { rows, tokenizer: TokenizerFile::new(vocabulary, 0, 97) }
}

/// Rows from a file of numbers, one a line: a source.
struct ReadRows;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ReadRowsConfig {
    path: PathBuf,
    /// Milliseconds to sleep before reading, so that a test can change the file meanwhile.
    #[serde(default)]
    before: u64,
    /// The same after reading.
    #[serde(default)]
    sleep: u64,
}

impl Stage for ReadRows {
    type Config = ReadRowsConfig;

    fn about(&self) -> About {
        about("read-rows")
    }

    fn ports(&self, _: &ReadRowsConfig) -> Ports {
        Ports::new().output("data", PortType::Dataset, "rows")
    }

    fn sources(&self, config: &ReadRowsConfig) -> Vec<Source> {
        vec![Source::new(&["path"], &config.path)]
    }

    fn start(&self, config: ReadRowsConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |_, _, _| {
            std::thread::sleep(Duration::from_millis(config.before));
            let cannot_read = || format!("cannot read `{}`", config.path.display());
            let text = fs::read_to_string(&config.path).with_context(cannot_read)?;
            std::thread::sleep(Duration::from_millis(config.sleep));
            let numbers = text.lines().enumerate();
            let row = |(id, line): (usize, &str)| {
                let number = line.parse().with_context(|| format!("line {}", id + 1)).with_context(cannot_read)?;
                Ok(row(id as u64, number))
            };
            let rows = numbers.map(row).collect::<Result<_>>()?;
            Ok(Outputs::new().with("data", dataset(rows, "words")))
        })
    }
}

/// A fresh model.
struct Init;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct InitConfig {
    #[serde(default)]
    value: f64,
    #[serde(default = "four")]
    width: usize,
}

fn four() -> usize {
    4
}

impl Stage for Init {
    type Config = InitConfig;

    fn about(&self) -> About {
        about("init")
    }

    fn ports(&self, _: &InitConfig) -> Ports {
        Ports::new().output("model", PortType::Model, "a model")
    }

    fn start(&self, config: InitConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |_, _, _| {
            let numbers = (0..config.width).map(|i| config.value + i as f64 / 7.0).collect();
            Ok(Outputs::new().with("model", Numbers { port_type: PortType::Model, numbers }))
        })
    }
}

/// Writes responses with a model: dataset to dataset.
struct Respond;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RespondConfig {
    #[serde(default)]
    seed: u64,
}

impl Stage for Respond {
    type Config = RespondConfig;

    fn about(&self) -> About {
        about("respond")
    }

    fn ports(&self, _: &RespondConfig) -> Ports {
        Ports::new().input("model", PortType::Model, "who writes").input("data", PortType::Dataset, "prompts").output(
            "data",
            PortType::Dataset,
            "responses",
        )
    }

    fn start(&self, config: RespondConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |mut inputs, step, _| {
            let model = inputs.take::<Numbers>("model")?;
            let mut data = (*inputs.take::<Dataset>("data")?).clone();
            for row in &mut data.rows {
                let draw = contract::random::philox(config.seed, [0, row.id as u32, step.round as u32, 2])[0];
                let bits = model.numbers.iter().fold(u64::from(draw), |bits, x| bits.rotate_left(7) ^ x.to_bits());
                row.response = vec![(bits % 89) as u32, (bits >> 32) as u32 % 89];
            }
            Ok(Outputs::new().with("data", data))
        })
    }
}

/// A training stage with momentum, that updates in place whenever it can. `state` is lost if it is not cut right.
struct Learn;

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LearnConfig {
    #[serde(default = "rate")]
    rate: f64,
    #[serde(default)]
    seed: u64,
    /// Milliseconds a round takes.
    #[serde(default)]
    sleep: u64,
    /// Round to fail in.
    #[serde(default)]
    fail_at: Option<u64>,
    /// Round in which it waits as long as there is a file `hold`.
    #[serde(default)]
    hold_at: Option<u64>,
    /// A file that gets a line for every round run.
    #[serde(default)]
    count: Option<PathBuf>,
}

/// Waits as long as there is a file `hold`, after having made a file `held`.
fn hold() -> Result<()> {
    fs::write("held", "")?;
    while Path::new("hold").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn rate() -> f64 {
    0.1
}

/// How often a model was updated in place, by all stages of this process.
pub static UPDATES_IN_PLACE: AtomicUsize = AtomicUsize::new(0);

struct Learner {
    config: LearnConfig,
    moments: Arc<Numbers>,
}

impl Stage for Learn {
    type Config = LearnConfig;

    fn about(&self) -> About {
        About { reads_clock: true, ..about("learn") }
    }

    fn ports(&self, _: &LearnConfig) -> Ports {
        Ports::new()
            .optional("model", PortType::Model, "where to begin")
            .input("data", PortType::Dataset, "rows to learn from")
            .optional("teacher", PortType::Model, "whom to follow")
            .output("model", PortType::Model, "the model after the update")
    }

    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "model", next: "model", check: Some(check_of_loss()) })
    }

    fn load_state(&self, folder: &Path, _: &Env) -> Result<AnyValue> {
        Ok(Arc::new(Numbers::load(PortType::State, folder)?))
    }

    fn start(&self, config: LearnConfig, _: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let fresh = || Arc::new(Numbers { port_type: PortType::State, numbers: vec![0.0; 4] });
        let moments = state.map(|state| state.into_any().downcast().expect("our own state")).unwrap_or_else(fresh);
        Ok(Box::new(Learner { config, moments }))
    }
}

impl Operator for Learner {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        append_line(self.config.count.as_deref(), &step.round.to_string())?;
        std::thread::sleep(Duration::from_millis(self.config.sleep));
        if self.config.hold_at == Some(step.round) {
            hold()?;
        }
        if self.config.fail_at == Some(step.round) {
            bail!("told to fail in round {}", step.round);
        }
        let data = inputs.take::<Dataset>("data")?;
        let teacher = inputs.take_optional::<Numbers>("teacher")?;
        let fresh = || Arc::new(Numbers { port_type: PortType::Model, numbers: vec![0.5; 4] });
        let mut model = inputs.take_optional::<Numbers>("model")?.unwrap_or_else(fresh);
        if Arc::get_mut(&mut model).is_some() {
            UPDATES_IN_PLACE.fetch_add(1, Ordering::Relaxed);
        }
        let target: f64 = data.rows.iter().map(|row| f64::from(row.prompt[0] + 3 * row.response[0]) / 7.0).sum();
        let decay = 1.0 - step.round as f64 / step.rounds as f64;
        let moments = Arc::make_mut(&mut self.moments);
        moments.numbers.resize(model.numbers.len(), 0.0);
        let mut loss = 0.0;
        for (i, weight) in Arc::make_mut(&mut model).numbers.iter_mut().enumerate() {
            let pull = teacher.as_ref().map_or(0.0, |teacher| teacher.numbers[i % teacher.numbers.len()] - *weight);
            let gradient = (target / (i + 2) as f64).sin() - pull / 3.0 + self.config.seed as f64 / 11.0;
            moments.numbers[i] = 0.9 * moments.numbers[i] + gradient;
            *weight -= self.config.rate * decay * moments.numbers[i];
            loss += gradient * gradient;
        }
        let row = json!({"update": step.round, "loss": loss, "learning_rate": self.config.rate * decay});
        sink.metrics(row.as_object().expect("written as an object").clone());
        Ok(Outputs::new().with_shared("model", model))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        Ok(Some(self.moments.clone()))
    }
}

/// The score on a validation set, by which `learn` used alone keeps its best round.
fn check_of_loss() -> Check {
    let with = json!({"metrics": ["loss"]});
    Check { valid: "valid", kind: "evaluate", with, model: "model", data: "data", metric: "loss" }
}

/// Scores a model.
struct Evaluate;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct EvaluateConfig {
    #[serde(default)]
    metrics: Vec<String>,
    /// Report the score as an object with `mean` and `interval`.
    #[serde(default)]
    interval: bool,
    /// Find nothing to compare: a score without a number.
    #[serde(default)]
    nothing: bool,
    /// What the model is said to have answered to every row.
    #[serde(default)]
    say: Option<String>,
    /// How often it repeats that.
    #[serde(default = "once_only")]
    times: usize,
}

fn once_only() -> usize {
    1
}

impl Stage for Evaluate {
    type Config = EvaluateConfig;

    fn about(&self) -> About {
        about("evaluate")
    }

    fn ports(&self, config: &EvaluateConfig) -> Ports {
        let ports = Ports::new()
            .input("model", PortType::Model, "whom to score")
            .input("data", PortType::Dataset, "rows to score it on")
            .output("metrics", PortType::Metrics, "numbers");
        if config.say.is_some() { ports.output("predictions", PortType::Predictions, "answers") } else { ports }
    }

    fn start(&self, config: EvaluateConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |mut inputs, _, _| {
            let model = inputs.take::<Numbers>("model")?;
            let data = inputs.take::<Dataset>("data")?;
            let rows = data.rows.len() as f64;
            let score = model.numbers.iter().map(|x| (x * rows).sin()).sum::<f64>();
            let shown = if config.nothing {
                json!({"mean": null, "interval": null, "not_measured": "there is nothing to compare"})
            } else if config.interval {
                json!({"mean": score, "interval": [score - 0.5, score + 0.5], "seeds": {"10": score}})
            } else {
                json!(score)
            };
            let metrics = Metrics(Map::from_iter([("score".into(), shown), ("loss".into(), json!(-score))]));
            let outputs = Outputs::new().with("metrics", metrics);
            let Some(say) = &config.say else { return Ok(outputs) };
            let answers = data.rows.iter().map(|row| {
                let noise = (row.id as f64 * 12.9).sin();
                let answer = json!({"id": row.id, "seed": 1, "text": say.repeat(config.times), "score": score + noise});
                answer.as_object().cloned().unwrap_or_default()
            });
            Ok(outputs.with("predictions", Predictions(answers.collect())))
        })
    }
}

/// Fails, in one of several ways.
struct Fail;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FailConfig {
    /// `error`, `panic`, `abort`, `disk`, `memory` or `sizes`.
    how: String,
}

impl Stage for Fail {
    type Config = FailConfig;

    fn about(&self) -> About {
        about("fail")
    }

    fn ports(&self, _: &FailConfig) -> Ports {
        Ports::new().optional("after", PortType::Dataset, "anything").output("data", PortType::Dataset, "never")
    }

    fn start(&self, config: FailConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |_, _, _| {
            eprintln!("about to go wrong");
            match config.how.as_str() {
                "panic" => panic!("told to panic"),
                "abort" => std::process::abort(),
                "disk" => Err(io::Error::from(io::ErrorKind::StorageFull)).context("cannot write `model.safetensors`"),
                // More than a process can address.
                "memory" => bail!("{}", std::hint::black_box(Vec::<u8>::with_capacity(1 << 60)).capacity()),
                "sizes" => bail!("{}", std::hint::black_box(vec![0u64; usize::MAX]).len()),
                _ => Err(anyhow::anyhow!("told to fail").context("cannot go on")),
            }
        })
    }
}

/// Passes rows on after a while.
struct Slow;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SlowConfig {
    #[serde(default)]
    milliseconds: u64,
    /// Wait as long as there is a file `hold`.
    #[serde(default)]
    hold: bool,
    /// Wait so while the result is saved.
    #[serde(default)]
    hold_save: bool,
}

impl Stage for Slow {
    type Config = SlowConfig;

    fn about(&self) -> About {
        about("slow")
    }

    fn ports(&self, _: &SlowConfig) -> Ports {
        pass_on()
    }

    fn foresee(&self, _: &SlowConfig, outlook: &mut Outlook) {
        foresee_pass_on(outlook);
    }

    fn start(&self, config: SlowConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |mut inputs, _, sink| {
            sink.progress(0, 1, "naps");
            std::thread::sleep(Duration::from_millis(config.milliseconds));
            if config.hold {
                hold()?;
            }
            let data = inputs.take::<Dataset>("data")?;
            Ok(match config.hold_save {
                true => Outputs::new().with("data", SlowToSave(data)),
                false => Outputs::new().with_shared("data", data),
            })
        })
    }
}

/// Rows that take their time to be saved.
struct SlowToSave(Arc<Dataset>);

impl Value for SlowToSave {
    fn port_type(&self) -> PortType {
        self.0.port_type()
    }

    fn save(&self, folder: &Path) -> Result<()> {
        hold()?;
        self.0.save(folder)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// Needs a card: says in a file when it begins and ends, where, and what it sees.
struct OnCard;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct OnCardConfig {
    file: PathBuf,
    /// Changes the key and nothing else.
    number: u64,
}

impl Stage for OnCard {
    type Config = OnCardConfig;

    fn about(&self) -> About {
        about("on-card")
    }

    fn ports(&self, _: &OnCardConfig) -> Ports {
        pass_on()
    }

    fn needs(&self, _: &OnCardConfig) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: OnCardConfig, env: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let seen = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let place = format!("{} {seen}", env.device);
        once(move |mut inputs, _, _| {
            append_line(Some(&config.file), &format!("begin {place}"))?;
            std::thread::sleep(Duration::from_millis(400));
            append_line(Some(&config.file), &format!("end {place}"))?;
            Ok(Outputs::new().with_shared("data", inputs.take::<Dataset>("data")?))
        })
    }
}

/// Passes rows on, cut to a length, and adds a line to a file each time it runs.
struct Count;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CountConfig {
    /// Gets a line each time.
    file: PathBuf,
    /// How many rows to pass on.
    #[serde(default)]
    keep: Option<usize>,
    /// Changes the key and nothing else.
    #[serde(default)]
    note: Option<String>,
    #[serde(default)]
    warn: Option<String>,
    #[serde(default)]
    say: Option<String>,
}

impl Stage for Count {
    type Config = CountConfig;

    fn about(&self) -> About {
        about("count")
    }

    fn ports(&self, _: &CountConfig) -> Ports {
        pass_on()
    }

    fn foresee(&self, _: &CountConfig, outlook: &mut Outlook) {
        foresee_pass_on(outlook);
    }

    fn start(&self, config: CountConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |mut inputs, _, sink| {
            append_line(Some(&config.file), "ran")?;
            if let Some(text) = &config.warn {
                sink.warn(text);
            }
            if let Some(text) = &config.say {
                sink.note(text);
            }
            let data = inputs.take::<Dataset>("data")?;
            let keep = config.keep.unwrap_or(data.rows.len()).min(data.rows.len());
            Ok(Outputs::new().with("data", data.select(&(0..keep).collect::<Vec<_>>())))
        })
    }
}

/// Passes on one row fewer each time it runs: a stage that does not do the same twice.
struct Moody;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MoodyConfig {
    /// Gets a line each time.
    file: PathBuf,
}

impl Stage for Moody {
    type Config = MoodyConfig;

    fn about(&self) -> About {
        about("moody")
    }

    fn ports(&self, _: &MoodyConfig) -> Ports {
        pass_on()
    }

    fn start(&self, config: MoodyConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(move |mut inputs, _, _| {
            append_line(Some(&config.file), "ran")?;
            let times = fs::read_to_string(&config.file)?.lines().count();
            let data = inputs.take::<Dataset>("data")?;
            Ok(Outputs::new().with("data", data.select(&(times..data.rows.len()).collect::<Vec<_>>())))
        })
    }
}

/// Reads a loss and doubles it: metrics to metrics.
struct Double;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct DoubleConfig {}

impl Stage for Double {
    type Config = DoubleConfig;

    fn about(&self) -> About {
        about("double")
    }

    fn ports(&self, _: &DoubleConfig) -> Ports {
        Ports::new().input("of", PortType::Metrics, "numbers").output("metrics", PortType::Metrics, "twice the loss")
    }

    fn start(&self, _: DoubleConfig, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        once(|mut inputs, _, _| {
            let loss = inputs.take::<Metrics>("of")?.number("loss").context("no `loss` to double")?;
            Ok(Outputs::new().with("metrics", Metrics(Map::from_iter([("twice".into(), json!(2.0 * loss))]))))
        })
    }
}

fn pass_on() -> Ports {
    Ports::new()
        .input("data", PortType::Dataset, "rows")
        .optional("other", PortType::Dataset, "rows with the same vocabulary")
        .output("data", PortType::Dataset, "the same rows")
}

fn foresee_pass_on(outlook: &mut Outlook) {
    outlook.same_vocabulary(&["data", "other"]);
    let Facts { vocabulary, .. } = outlook.input("data");
    outlook.output("data", Facts { vocabulary, ..Facts::default() });
}

fn append_line(file: Option<&Path>, line: &str) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    let mut file = fs::OpenOptions::new().create(true).append(true).open(file)?;
    file.write_all(format!("{line}\n").as_bytes())?;
    Ok(())
}
