//! Typed, named ports: what may be connected to what.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What travels along an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortType {
    /// Text by split: `train.jsonl`, `valid.jsonl`, `test.jsonl`.
    Corpus,
    /// A Hugging Face tokenizer folder.
    Tokenizer,
    /// Rows of prompt and response ids with their tokenizer.
    Dataset,
    /// A Hugging Face model folder with its tokenizer.
    Model,
    /// A low-rank adapter.
    Adapter,
    /// A PEFT prompt-tuning folder.
    SoftPrompt,
    /// What a frozen teacher computed, kept.
    TeacherCache,
    /// Inner state of a training stage: moments, buffers.
    State,
    /// Generated text with scores, a line a row.
    Predictions,
    /// Named numbers.
    Metrics,
    /// Rows and columns for a person.
    Table,
    /// A picture.
    Figure,
    /// One file.
    File,
    /// Any folder.
    Dir,
}

impl PortType {
    /// The name used in YAML, documentation and on disk.
    pub fn name(self) -> &'static str {
        match self {
            PortType::Corpus => "corpus",
            PortType::Tokenizer => "tokenizer",
            PortType::Dataset => "dataset",
            PortType::Model => "model",
            PortType::Adapter => "adapter",
            PortType::SoftPrompt => "soft-prompt",
            PortType::TeacherCache => "teacher-cache",
            PortType::State => "state",
            PortType::Predictions => "predictions",
            PortType::Metrics => "metrics",
            PortType::Table => "table",
            PortType::Figure => "figure",
            PortType::File => "file",
            PortType::Dir => "dir",
        }
    }
}

impl fmt::Display for PortType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One named input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Name, as in `in: {NAME: ...}` or `stage.NAME`.
    pub name: String,
    /// What travels along it.
    pub port_type: PortType,
    /// Whether the stage cannot run without it. Outputs are always made.
    pub required: bool,
    /// Whether it takes several values by names of the reader's choice, as in `in: {NAME: {FIRST: ..., SECOND: ...}}`. A stage
    /// knows them as the inputs `NAME/FIRST` and `NAME/SECOND`.
    #[serde(default)]
    pub several: bool,
    /// One line for the catalogue.
    pub doc: String,
}

/// All ports of a kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// What it reads.
    pub inputs: Vec<Port>,
    /// What it makes.
    pub outputs: Vec<Port>,
    /// Optional inputs of which at least one must be connected.
    #[serde(default)]
    pub one_of: Vec<Vec<String>>,
}

impl Ports {
    /// No port; the `input` and `output` methods add them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a required input.
    pub fn input(self, name: &str, port_type: PortType, doc: &str) -> Self {
        self.add_input(name, port_type, true, doc)
    }

    /// Adds an input that may be left unconnected.
    pub fn optional(self, name: &str, port_type: PortType, doc: &str) -> Self {
        self.add_input(name, port_type, false, doc)
    }

    /// Adds an input that takes any number of values, by name.
    pub fn several(mut self, name: &str, port_type: PortType, doc: &str) -> Self {
        self.inputs.push(Port { several: true, ..port(name, port_type, false, doc) });
        self
    }

    fn add_input(mut self, name: &str, port_type: PortType, required: bool, doc: &str) -> Self {
        self.inputs.push(port(name, port_type, required, doc));
        self
    }

    /// Adds an output.
    pub fn output(mut self, name: &str, port_type: PortType, doc: &str) -> Self {
        self.outputs.push(port(name, port_type, true, doc));
        self
    }

    /// Asks that at least one of the optional inputs `ports` is connected.
    pub fn one_of(mut self, ports: &[&str]) -> Self {
        self.one_of.push(ports.iter().map(|p| p.to_string()).collect());
        self
    }

    /// The input of that name: of `NAME/FIRST` the input `NAME` that takes several values.
    pub fn find_input(&self, name: &str) -> Option<&Port> {
        let (name, several) = several_of(name).map_or((name, false), |(port, _)| (port, true));
        self.inputs.iter().find(|p| p.name == name && p.several == several)
    }

    /// The output of that name.
    pub fn find_output(&self, name: &str) -> Option<&Port> {
        self.outputs.iter().find(|p| p.name == name)
    }
}

fn port(name: &str, port_type: PortType, required: bool, doc: &str) -> Port {
    Port { name: name.into(), port_type, required, several: false, doc: doc.into() }
}

/// Between an input that takes several values and the name of one of them. No name holds it.
const BETWEEN: char = '/';

/// What a stage calls the value `name` of the input `port`, which takes several.
pub fn one_of_several(port: &str, name: &str) -> String {
    format!("{port}{BETWEEN}{name}")
}

/// The input and the name of the value, where an input takes several.
pub fn several_of(input: &str) -> Option<(&str, &str)> {
    input.split_once(BETWEEN)
}
