//! Values: what operators hand to one another, in memory or through the store.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use serde_json::{Map, Value as Json};

use crate::Result;
use crate::facts::Facts;
use crate::port::{PortType, several_of};

/// Something that travels along an edge.
///
/// Immutable to those who read it. An operator that holds the only `Arc` may take the value apart and update it in
/// place: the runner gives up its own reference to a value when nobody reads it later in the round.
pub trait Value: Any + Send + Sync {
    /// Which ports it fits.
    fn port_type(&self) -> PortType;

    /// Writes the value into `folder`, which exists and is empty. Loading the folder again gives an equal value, bit for
    /// bit, and equal values write equal bytes: no times, no paths, no order of a hash map.
    fn save(&self, folder: &Path) -> Result<()>;

    /// What is known of it that other stages may have to agree with. Only what follows from the value itself.
    fn facts(&self) -> Facts {
        Facts::default()
    }

    /// For the way back to the concrete type.
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

/// A shared value of any type.
pub type AnyValue = Arc<dyn Value>;

/// The inputs of one run of an operator, by port.
#[derive(Default)]
pub struct Inputs(BTreeMap<String, AnyValue>);

impl Inputs {
    /// No inputs; `insert` adds them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Connects a port.
    pub fn insert(&mut self, port: impl Into<String>, value: AnyValue) {
        self.0.insert(port.into(), value);
    }

    /// Takes a required input out. If nobody else reads the value, the result is the only reference.
    ///
    /// Errors when the port is not connected or holds a value of another Rust type.
    pub fn take<T: Value>(&mut self, port: &str) -> Result<Arc<T>> {
        self.take_optional(port)?.ok_or_else(|| anyhow!("input `{port}` is not connected"))
    }

    /// Takes an optional input out; `None` when it is not connected.
    pub fn take_optional<T: Value>(&mut self, port: &str) -> Result<Option<Arc<T>>> {
        let Some(value) = self.0.remove(port) else { return Ok(None) };
        let found = value.port_type();
        match value.into_any().downcast::<T>() {
            Ok(value) => Ok(Some(value)),
            Err(_) => bail!("input `{port}` holds a {found}, which this stage cannot read"),
        }
    }

    /// Takes all values of an input that takes several, by name.
    pub fn take_several<T: Value>(&mut self, port: &str) -> Result<Vec<(String, Arc<T>)>> {
        let inputs: Vec<String> = self.names().map(str::to_owned).collect();
        let of_port = inputs.iter().filter_map(|input| Some((input, several_of(input).filter(|of| of.0 == port)?.1)));
        of_port.map(|(input, name)| Ok((name.to_owned(), self.take(input)?))).collect()
    }

    /// The inputs that are connected, in the order of their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Looks at an input without taking it.
    pub fn get(&self, port: &str) -> Option<&AnyValue> {
        self.0.get(port)
    }

    /// Whether a port is connected.
    pub fn has(&self, port: &str) -> bool {
        self.0.contains_key(port)
    }
}

/// The outputs of one run of an operator, by port.
#[derive(Default)]
pub struct Outputs(pub BTreeMap<String, AnyValue>);

impl Outputs {
    /// No outputs; `with` adds them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an output.
    pub fn with(mut self, port: &str, value: impl Value) -> Self {
        self.0.insert(port.into(), Arc::new(value));
        self
    }

    /// Adds an output that is already shared.
    pub fn with_shared(mut self, port: &str, value: AnyValue) -> Self {
        self.0.insert(port.into(), value);
        self
    }
}

/// Named numbers, as `metrics.json`. A name maps to a number, or to an object with `mean`, `interval` and `seeds`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(pub Map<String, Json>);

impl Metrics {
    /// The number that `name` stands for: itself, or its `mean`.
    pub fn number(&self, name: &str) -> Option<f64> {
        match self.0.get(name)? {
            Json::Object(parts) => parts.get("mean")?.as_f64(),
            other => other.as_f64(),
        }
    }

    /// Reads `metrics.json` from a folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("metrics.json");
        let text = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        Ok(Metrics(
            serde_json::from_slice(&text).with_context(|| format!("`{}` is not a JSON object", path.display()))?,
        ))
    }
}

impl Value for Metrics {
    fn port_type(&self) -> PortType {
        PortType::Metrics
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(&self.0)?;
        text.push(b'\n');
        write(&folder.join("metrics.json"), &text)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// Generated text, as `predictions.jsonl`: a JSON object a line with `id`, `seed`, `text` and scores.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predictions(pub Vec<Map<String, Json>>);

impl Predictions {
    /// Reads `predictions.jsonl` from a folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("predictions.jsonl");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let rows = text.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        Ok(Predictions(rows.with_context(|| format!("`{}` is not JSON lines", path.display()))?))
    }
}

impl Value for Predictions {
    fn port_type(&self) -> PortType {
        PortType::Predictions
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let mut text = Vec::new();
        for row in &self.0 {
            serde_json::to_writer(&mut text, row)?;
            text.push(b'\n');
        }
        write(&folder.join("predictions.jsonl"), &text)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// Files that are read where they lie: a corpus, a tokenizer, a file, a folder.
#[derive(Clone, Debug)]
pub struct Folder {
    port_type: PortType,
    path: PathBuf,
}

impl Folder {
    /// Files under `path`, which must stay there and unchanged while the value lives.
    pub fn new(port_type: PortType, path: impl Into<PathBuf>) -> Self {
        Folder { port_type, path: path.into() }
    }

    /// Where the files are.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Value for Folder {
    fn port_type(&self) -> PortType {
        self.port_type
    }

    fn save(&self, folder: &Path) -> Result<()> {
        copy_tree(&self.path, folder)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// Writes one file; the error names it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write `{}`", path.display()))
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("cannot read folder `{}`", from.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read folder `{}`", from.display()))?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir_all(&target).with_context(|| format!("cannot make folder `{}`", target.display()))?;
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)
                .with_context(|| format!("cannot copy `{}` to `{}`", entry.path().display(), target.display()))?;
        }
    }
    Ok(())
}
