//! Kinds and operators: how a stage describes itself and how it runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::bail;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::Result;
use crate::clock::Step;
use crate::location::Location;
use crate::outlook::Outlook;
use crate::port::{PortType, Ports};
use crate::value::{AnyValue, Inputs, Outputs};

/// Which defaults the quirk options of all stages take: sound ones, or those of the published programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Conventions {
    /// What is right.
    #[default]
    Sound,
    /// What the published programs do.
    Reference,
}

/// What a kind says of itself. Changing `version` drops cached results of the kind, so it is bumped only when the same
/// inputs and configuration give other bytes.
#[derive(Clone, Debug)]
pub struct About {
    /// Name in `kind:`.
    pub name: &'static str,
    /// Semantic version of the result.
    pub version: u32,
    /// Version of the numerics library behind the result, where one is.
    pub numerics: Option<u32>,
    /// One line for the catalogue.
    pub summary: &'static str,
    /// YAML that uses it.
    pub example: &'static str,
    /// Whether the clock of a loop changes its result.
    pub reads_clock: bool,
}

/// One thing wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Path of the field inside `with`, for example `["init", "layers"]`; empty for the whole.
    pub path: Vec<String>,
    /// What is wrong, as a lower-case fragment.
    pub message: String,
    /// What to do, if it can be said.
    pub hint: Option<String>,
}

impl ConfigError {
    /// An error at a field named with dots.
    pub fn at(path: &str, message: impl Into<String>) -> Self {
        let path = path.split('.').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        ConfigError { path, message: message.into(), hint: None }
    }

    /// Says what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A file or folder outside of the pipeline whose content decides the result. In the key stands what it holds: of a local one
/// the digest, of one that is elsewhere the commit or the digest that names it.
///
/// A running stage never meets the original. Before it starts, the runner fetches what is elsewhere, makes a private copy of
/// what the key says was there and puts the copy's path into the field. A file's copy has a name that says nothing, not even
/// an ending: bytes alone decide how it is read. The files of a folder keep their names, which are part of its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Path of the field inside `with` that names it; an item of a list is called by its index.
    pub field: Vec<String>,
    /// Where it is; a path begins in the folder that `pipeline` was started in.
    pub at: Location,
    /// Which files of a folder are read, as names inside of it or patterns with a `*`, such as `*.safetensors`; all where
    /// absent. Others are in no key, and are not there for the running stage.
    pub only: Option<Vec<String>>,
    /// Groups of patterns of which one is enough, the best first: of a folder that is elsewhere only the files of the first
    /// group that it has are fetched. Weights are often there in several formats.
    pub one_of: Vec<Vec<String>>,
}

impl Source {
    /// What the field `field` of `with` names, on this machine.
    pub fn new(field: &[&str], path: impl Into<PathBuf>) -> Self {
        Source::at(field, Location::Local(path.into()))
    }

    /// What the field `field` of `with` names, wherever it is.
    pub fn at(field: &[&str], at: Location) -> Self {
        let field = field.iter().map(|part| (*part).to_owned()).collect();
        Source { field, at, only: None, one_of: Vec::new() }
    }

    /// Of a folder, only the files with these names or patterns.
    pub fn only(mut self, files: &[impl AsRef<str>]) -> Self {
        self.only = Some(owned(files));
        self
    }

    /// Of these groups of files one is enough.
    pub fn one_of(mut self, groups: &[&[&str]]) -> Self {
        self.one_of = groups.iter().map(|group| owned(group)).collect();
        self
    }

    /// Whether a file of the folder is read, by its path inside with `/`.
    pub fn takes(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|patterns| fits_any(patterns, name))
    }

    /// Of a folder that is elsewhere, the files to fetch, of those that it has.
    pub fn choose(&self, names: &[String]) -> Vec<String> {
        let in_group = |group: &Vec<String>, name: &str| !name.contains('/') && fits_any(group, name);
        let best = self.one_of.iter().find(|group| names.iter().any(|name| in_group(group, name)));
        // Whatever has the ending of a group's files is one of theirs.
        let ending = |text: &str| text.rsplit_once('.').map(|(_, ending)| ending.to_owned());
        let endings: Vec<_> =
            self.one_of.iter().flatten().filter(|name| !name.ends_with(".json")).map(|name| ending(name)).collect();
        let is_wanted = |name: &&String| {
            let is_weights = self.one_of.iter().any(|group| fits_any(group, name)) || endings.contains(&ending(name));
            self.takes(name) && (!is_weights || best.is_some_and(|group| in_group(group, name)))
        };
        names.iter().filter(is_wanted).cloned().collect()
    }
}

fn owned(texts: &[impl AsRef<str>]) -> Vec<String> {
    texts.iter().map(|text| text.as_ref().to_owned()).collect()
}

fn fits_any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| match pattern.split_once('*') {
        Some((start, end)) => name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end),
        None => name == pattern,
    })
}

/// How a training kind is used outside of a `loop:`, where it is short for a loop with this one stage.
///
/// The loop carries `carry` from input `carry` (where connected) and next takes output `next`; each round the stage sees
/// a window of input `data`. The fields of a window (`rows take epochs rounds order seed last`) then stand in `with`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alone {
    /// Input port that gets the window.
    pub data: &'static str,
    /// Input port that gets the carried value.
    pub carry: &'static str,
    /// Output port that becomes the carried value, and the name of the loop's output.
    pub next: &'static str,
    /// How the best round is chosen, where a validation set is connected.
    pub check: Option<Check>,
}

/// What a training kind used alone measures after every epoch, to keep the best round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Extra port of the training kind, for the dataset.
    pub valid: &'static str,
    /// Kind of the stage that measures.
    pub kind: &'static str,
    /// Its configuration.
    pub with: Json,
    /// Its input that gets what was trained.
    pub model: &'static str,
    /// Its input that gets the dataset.
    pub data: &'static str,
    /// Name in its metrics; the smallest is the best.
    pub metric: &'static str,
}

/// Where a stage runs. Nothing here may change a result beyond rounding.
#[derive(Clone, Debug)]
pub struct Env {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Threads it may use.
    pub threads: usize,
    /// A folder of its own for files; removed afterwards.
    pub scratch: PathBuf,
}

/// Variable in which a worker finds what `CUDA_VISIBLE_DEVICES` was when its run was started, if it was set.
pub const VISIBLE_CARDS: &str = "PIPELINE_VISIBLE_CARDS";

/// What a running stage needs of the machine. It decides where and beside whom it runs, and is in no key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// A GPU of its own, where the run has any; else it computes on the CPU.
    pub gpu: bool,
}

impl Needs {
    /// For what computes with models.
    pub const GPU: Needs = Needs { gpu: true };

    /// What both need together.
    pub fn and(self, other: Needs) -> Needs {
        Needs { gpu: self.gpu || other.gpu }
    }
}

/// What a running operator tells its runner.
pub trait Sink {
    /// Appends a row to the stage's `metrics.jsonl`. Only deterministic values.
    fn metrics(&mut self, row: Map<String, Json>);
    /// Says how far this run of the operator is, in `unit`s (for example `rows`).
    fn progress(&mut self, done: u64, total: u64, unit: &str);
    /// Tells the user of something that may be wrong and is not an error.
    fn warn(&mut self, text: &str);
    /// Tells the user something worth knowing.
    fn note(&mut self, text: &str);
}

/// A started stage. In a loop it runs once a round and may keep inner state between rounds.
pub trait Operator: Send {
    /// Does the work of one round.
    fn run(&mut self, inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs>;

    /// Told before the first run: the longest row, prompt and response together, that all who read its outputs in the
    /// same loop can take. It follows from the loop's stages and inputs, all of which are in its key.
    fn make_room(&mut self, _longest: u64) {}

    /// All that the next round needs beyond its inputs, as a value of type `state`; `None` when there is nothing.
    fn state(&self) -> Result<Option<AnyValue>> {
        Ok(None)
    }
}

/// A stage kind as the runner sees it. Implement [`Stage`]; this follows.
pub trait Kind: Send + Sync {
    /// Name, version, documentation.
    fn about(&self) -> About;
    /// JSON Schema of `with`.
    fn schema(&self) -> Json;
    /// Checks `with` and fills every default in, those of `conventions` too.
    fn resolve(&self, config: &Json, conventions: Conventions) -> Result<Json, Vec<ConfigError>>;
    /// Ports under a resolved configuration.
    fn ports(&self, config: &Json) -> Ports;
    /// Files outside of the pipeline that a resolved configuration names.
    fn sources(&self, config: &Json) -> Vec<Source>;
    /// Fields of a resolved configuration that change no result beyond rounding, such as how many rows fit in memory.
    fn outside_key(&self, config: &Json) -> Vec<&'static str>;
    /// How it is used alone, for training kinds.
    fn alone(&self) -> Option<Alone>;
    /// Reads back, from the folder that its `save` wrote, what an operator's [`Operator::state`] gave.
    fn load_state(&self, folder: &Path, env: &Env) -> Result<AnyValue>;
    /// What can be said before it runs: see [`Stage::foresee`].
    fn foresee(&self, config: &Json, outlook: &mut Outlook);
    /// What it needs of the machine, under a resolved configuration.
    fn needs(&self, config: &Json) -> Needs;
    /// Starts it. `state` is what an earlier operator's [`Operator::state`] gave.
    fn start(&self, config: &Json, env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>>;
}

/// A stage kind as its file writes it: typed configuration, ports, start.
pub trait Stage: Send + Sync + 'static {
    /// Configuration, the `with` of the stage. Use `deny_unknown_fields`, a `#[serde(default)]` on every optional
    /// field, and a doc comment on each: the catalogue and the JSON Schema are made from it.
    type Config: Serialize + DeserializeOwned + JsonSchema;

    /// Name, version, documentation.
    fn about(&self) -> About;

    /// Fills in the options whose default follows the conventions.
    fn fill(&self, _config: &mut Self::Config, _conventions: Conventions) {}

    /// What no type can say, such as two fields that disagree. Runs after [`Stage::fill`].
    fn validate(&self, _config: &Self::Config) -> Vec<ConfigError> {
        Vec::new()
    }

    /// Ports. Only sources may let the configuration decide them.
    fn ports(&self, config: &Self::Config) -> Ports;

    /// Files outside of the pipeline that the configuration names.
    fn sources(&self, _config: &Self::Config) -> Vec<Source> {
        Vec::new()
    }

    /// Fields that change no result beyond rounding, such as how many rows fit in memory. They are left out of the key.
    fn outside_key(&self, _config: &Self::Config) -> Vec<&'static str> {
        Vec::new()
    }

    /// How it is used alone, for training kinds.
    fn alone(&self) -> Option<Alone> {
        None
    }

    /// Reads back, from the folder that its `save` wrote, what an operator's [`Operator::state`] gave. Only the kind knows
    /// what that is, so whoever has a state reads it here.
    fn load_state(&self, _folder: &Path, _env: &Env) -> Result<AnyValue> {
        bail!("stages of kind `{}` have no inner state", self.about().name)
    }
    /// What can be said before it runs, from the configuration, the files it names and the facts of its inputs: what will
    /// be known of its outputs, what cannot work, what is odd. Asked again whenever more is known, so it must be quick.
    fn foresee(&self, _config: &Self::Config, _outlook: &mut Outlook) {}

    /// What it needs of the machine: no more than a place on the CPU, unless it says so.
    fn needs(&self, _config: &Self::Config) -> Needs {
        Needs::default()
    }

    /// Starts it.
    fn start(&self, config: Self::Config, env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>>;
}

impl<S: Stage> Kind for S {
    fn about(&self) -> About {
        Stage::about(self)
    }

    fn schema(&self) -> Json {
        serde_json::to_value(schemars::schema_for!(S::Config)).expect("a schema is JSON")
    }

    fn resolve(&self, config: &Json, conventions: Conventions) -> Result<Json, Vec<ConfigError>> {
        let mut config: S::Config =
            serde_json::from_value(config.clone()).map_err(|e| vec![ConfigError::at("", e.to_string())])?;
        self.fill(&mut config, conventions);
        let errors = self.validate(&config);
        if errors.is_empty() {
            Ok(serde_json::to_value(&config).expect("a configuration is JSON"))
        } else {
            Err(errors)
        }
    }

    fn ports(&self, config: &Json) -> Ports {
        Stage::ports(self, &typed::<S>(config))
    }

    fn sources(&self, config: &Json) -> Vec<Source> {
        Stage::sources(self, &typed::<S>(config))
    }

    fn outside_key(&self, config: &Json) -> Vec<&'static str> {
        Stage::outside_key(self, &typed::<S>(config))
    }

    fn alone(&self) -> Option<Alone> {
        Stage::alone(self)
    }

    fn load_state(&self, folder: &Path, env: &Env) -> Result<AnyValue> {
        Stage::load_state(self, folder, env)
    }

    fn foresee(&self, config: &Json, outlook: &mut Outlook) {
        Stage::foresee(self, &typed::<S>(config), outlook)
    }

    fn needs(&self, config: &Json) -> Needs {
        Stage::needs(self, &typed::<S>(config))
    }

    fn start(&self, config: &Json, env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Stage::start(self, typed::<S>(config), env, state)
    }
}

fn typed<S: Stage>(config: &Json) -> S::Config {
    serde_json::from_value(config.clone()).expect("a resolved configuration reads back")
}

/// All kinds, and how values are read back from a folder.
pub struct Registry {
    kinds: BTreeMap<&'static str, Known>,
    load: LoadValue,
}

/// A kind, and its schema from when it was first asked for: a pipeline asks once a stage.
struct Known {
    kind: Box<dyn Kind>,
    schema: OnceLock<Json>,
}

/// Reads a value of that type from the folder that [`crate::Value::save`] wrote. Inner states are read by
/// [`Kind::load_state`].
pub type LoadValue = fn(PortType, &Path, &Env) -> Result<AnyValue>;

impl Registry {
    /// A registry without kinds.
    pub fn new(load: LoadValue) -> Self {
        Registry { kinds: BTreeMap::new(), load }
    }

    /// Adds a kind under the name it gives itself.
    pub fn with(mut self, kind: impl Kind + 'static) -> Self {
        self.kinds.insert(kind.about().name, Known { kind: Box::new(kind), schema: OnceLock::new() });
        self
    }

    /// The kind of that name.
    pub fn get(&self, name: &str) -> Option<&dyn Kind> {
        self.kinds.get(name).map(|known| known.kind.as_ref())
    }

    /// The [`Kind::schema`] of the kind of that name, made once.
    pub fn schema(&self, name: &str) -> Option<&Json> {
        self.kinds.get(name).map(|known| known.schema.get_or_init(|| known.kind.schema()))
    }

    /// All kinds, by name.
    pub fn kinds(&self) -> impl Iterator<Item = &dyn Kind> {
        self.kinds.values().map(|known| known.kind.as_ref())
    }

    /// Reads a value back.
    pub fn load(&self, port_type: PortType, folder: &Path, env: &Env) -> Result<AnyValue> {
        (self.load)(port_type, folder, env)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_weights_in_several_formats_the_best_one_is_fetched() {
        let groups: [&[&str]; 3] =
            [&["model.safetensors"], &["model.safetensors.index.json", "model-*.safetensors"], &["*.gguf"]];
        let source = Source::new(&["model"], "x").only(&[
            "config.json",
            "*.safetensors",
            "model.safetensors.index.json",
            "*.gguf",
        ]);
        let source = source.one_of(&groups);
        let chosen = |names: &[&str]| source.choose(&owned(names)).join(" ");
        let all = [
            "README.md",
            "config.json",
            "model.safetensors",
            "adapter.safetensors",
            "onnx/model.safetensors",
            "a.gguf",
        ];
        assert_eq!(chosen(&all), "config.json model.safetensors");
        let index = ["model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "a.gguf"];
        assert_eq!(chosen(&index), index[..3].join(" "));
        assert_eq!(chosen(&["config.json", "a.gguf", "x.safetensors"]), "config.json a.gguf");
        assert_eq!(Source::new(&["source"], "x").choose(&owned(&all)).len(), all.len());
    }

    #[test]
    fn a_pattern_has_one_star_anywhere() {
        let source = Source::new(&["source"], "x").only(&["train-*.parquet", "*.bin", "a"]);
        let taken = ["train-1.parquet", "x.bin", "a", "train-.parquet"];
        assert!(taken.iter().all(|name| source.takes(name)));
        assert!(
            ["train.parquet", "bin", "b", "train-1.parquet.gz", "xtrain-1.parquet"]
                .iter()
                .all(|name| !source.takes(name))
        );
    }
}
