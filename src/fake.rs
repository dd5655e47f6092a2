//! Fake kinds for tests: the ports and fields of the real ones, as far as the language is concerned. They never run.

use anyhow::bail;
use contract::{
    About, Alone, AnyValue, Check, ConfigError, Conventions, Env, Operator, PortType, Ports, Registry, Result, Stage,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// How two distributions differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Divergence {
    /// Of the student from the teacher.
    ForwardKl,
    /// Of the teacher from the student.
    #[default]
    ReverseKl,
}

/// A model from random weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Init {
    /// Family of the model.
    pub(crate) architecture: String,
    /// Number of blocks.
    pub(crate) layers: u64,
    /// Width of the residual stream.
    pub(crate) width: u64,
}

/// A term that fades out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Regulariser {
    /// What it measures.
    #[serde(default)]
    pub(crate) divergence: Divergence,
    /// Weight in the loss.
    pub(crate) coefficient: f64,
    /// How the weight changes.
    pub(crate) schedule: String,
}

macro_rules! kind {
    ($stage:ident, $config:ident, $name:literal, $summary:literal, $example:literal,
     {$($(#[$attribute:meta])* $field:ident: $type:ty,)*}, $ports:expr $(, $($extra:tt)*)?) => {
        #[doc = $summary]
        #[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $config { $($(#[$attribute])* pub(crate) $field: $type,)* }
        pub(crate) struct $stage;
        impl Stage for $stage {
            type Config = $config;
            fn about(&self) -> About {
                About {
                    name: $name, version: 1, numerics: None, summary: $summary, example: $example, reads_clock: false,
                }
            }
            fn ports(&self, _config: &$config) -> Ports { $ports }
            fn start(&self, _: $config, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn Operator>> {
                bail!("a fake kind does not run")
            }
            $($($extra)*)?
        }
    };
}

kind!(Download, DownloadConfig, "download", "Fetches a corpus.", "corpus: {kind: download, with: {source: 'builtin:x'}}", {
    /// Where it comes from.
    source: String,
    /// How many rows; all where absent.
    #[serde(default)]
    rows: Option<u64>,
}, Ports::new().output("corpus", PortType::Corpus, "the texts"));

kind!(TrainTokenizer, TrainTokenizerConfig, "train-tokenizer", "Trains a tokenizer.",
    "tokenizer: {kind: train-tokenizer, in: {corpus: corpus}, with: {vocab_size: 512}}", {
    /// Number of tokens.
    vocab_size: u64,
}, Ports::new().input("corpus", PortType::Corpus, "texts").output("tokenizer", PortType::Tokenizer, "the tokenizer"));

kind!(Tokenize, TokenizeConfig, "tokenize", "Turns texts into rows of ids.",
    "data: {kind: tokenize, in: {corpus: corpus, tokenizer: tokenizer}, with: {template: alpaca, max_length: 96}}", {
    /// How prompt and response are joined.
    template: String,
    /// Longest row, in tokens.
    max_length: u64,
}, Ports::new()
    .input("corpus", PortType::Corpus, "texts")
    .input("tokenizer", PortType::Tokenizer, "what cuts them")
    .output("train", PortType::Dataset, "rows to learn from")
    .output("valid", PortType::Dataset, "rows to choose by")
    .output("test", PortType::Dataset, "rows to score"));

kind!(Finetune, FinetuneConfig, "finetune", "Trains a model on given text.",
    "teacher: {kind: finetune, in: {data: data.train}, with: {take: 16, epochs: 4}}", {
    /// A model from random weights, where no `model` is connected.
    #[serde(default)]
    init: Option<Init>,
    /// Step size of the optimiser.
    #[serde(default = "millesimal")]
    learning_rate: f64,
    /// Seed of dropout and of initial weights.
    #[serde(default)]
    seed: u64,
}, Ports::new()
    .optional("model", PortType::Model, "where training begins")
    .input("data", PortType::Dataset, "rows of a window")
    .output("model", PortType::Model, "the trained model")
    .output("metrics", PortType::Metrics, "its losses"),
    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "model", next: "model", check: Some(check_of_loss()) })
    });

kind!(Distill, DistillConfig, "distill", "Trains a student to follow a teacher.",
    "learn: {kind: distill, in: {student: student0, teacher: teacher, data: data.train}, with: {take: 16, epochs: 1}}", {
    /// What is made small.
    #[serde(default)]
    divergence: Divergence,
    /// Step size of the optimiser.
    #[serde(default = "millesimal")]
    learning_rate: f64,
    /// Where a response that was cut off ends.
    #[serde(default)]
    force_end: Option<bool>,
    /// Seed of dropout.
    #[serde(default)]
    seed: u64,
}, Ports::new()
    .input("student", PortType::Model, "what learns")
    .input("teacher", PortType::Model, "what is followed")
    .optional("prompt", PortType::SoftPrompt, "put before the teacher's text")
    .several("advisers", PortType::Model, "others that are followed, by name")
    .input("data", PortType::Dataset, "rows of a window")
    .output("model", PortType::Model, "the student afterwards"),
    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "student", next: "model", check: Some(check_of_loss()) })
    }
    fn fill(&self, config: &mut DistillConfig, conventions: Conventions) {
        config.force_end.get_or_insert(conventions == Conventions::Reference);
    });

kind!(PromptInit, PromptInitConfig, "prompt-init", "Begins a soft prompt.",
    "prompt0: {kind: prompt-init, in: {model: teacher}, with: {length: 7, text: Hello}}", {
    /// Number of virtual tokens.
    length: u64,
    /// Text that its vectors begin as.
    #[serde(default)]
    text: Option<String>,
}, Ports::new().input("model", PortType::Model, "the teacher").output("prompt", PortType::SoftPrompt, "the prompt"),
    fn validate(&self, config: &PromptInitConfig) -> Vec<ConfigError> {
        if config.length == 0 && config.text.is_some() {
            return vec![ConfigError::at("length", "a prompt without length has no text").hint("take `text` away")];
        }
        Vec::new()
    });

kind!(StudentGenerate, StudentGenerateConfig, "student-generate", "Lets the student answer.",
    "respond: {kind: student-generate, in: {model: carry.student, data: windows.batch}, with: {max_new_tokens: 48}}", {
    /// Of sampling.
    #[serde(default = "one")]
    temperature: f64,
    /// Longest answer.
    max_new_tokens: u64,
    /// Seed of sampling.
    #[serde(default)]
    seed: u64,
}, Ports::new()
    .input("model", PortType::Model, "what answers")
    .input("data", PortType::Dataset, "prompts")
    .output("data", PortType::Dataset, "prompts with new answers"));

kind!(PromptTune, PromptTuneConfig, "prompt-tune", "Tunes a soft prompt.",
    "tune: {kind: prompt-tune, in: {teacher: teacher, student: carry.student, prompt: carry.prompt, data: respond}}", {
    /// What is made small.
    #[serde(default)]
    divergence: Divergence,
    /// Keeps the prompted teacher near the plain one.
    #[serde(default)]
    regulariser: Option<Regulariser>,
}, Ports::new()
    .input("teacher", PortType::Model, "what is prompted")
    .input("student", PortType::Model, "what is to be met")
    .input("prompt", PortType::SoftPrompt, "the prompt so far")
    .input("data", PortType::Dataset, "rows")
    .output("prompt", PortType::SoftPrompt, "the prompt afterwards"));

/// The loss on a validation set, by which a training stage used alone keeps its best round.
fn check_of_loss() -> Check {
    let with = json!({"metrics": ["loss"]});
    Check { valid: "valid", kind: "evaluate", with, model: "model", data: "data", metric: "loss" }
}

kind!(Evaluate, EvaluateConfig, "evaluate", "Measures a model.",
    "score: {kind: evaluate, in: {model: student, data: data.test}, with: {seeds: [10, 20]}}", {
    /// Seeds of sampling.
    #[serde(default)]
    seeds: Vec<u64>,
    /// What is measured.
    #[serde(default)]
    metrics: Vec<String>,
}, Ports::new()
    .input("model", PortType::Model, "what is measured")
    .input("data", PortType::Dataset, "rows with right answers")
    .output("metrics", PortType::Metrics, "the numbers")
    .output("predictions", PortType::Predictions, "the answers"));

fn millesimal() -> f64 {
    1e-3
}

fn one() -> f64 {
    1.0
}

/// All of them.
pub(crate) fn registry() -> Registry {
    Registry::new(|port_type, _, _| bail!("a fake kind loads no `{port_type}`"))
        .with(Download)
        .with(TrainTokenizer)
        .with(Tokenize)
        .with(Finetune)
        .with(Distill)
        .with(PromptInit)
        .with(StudentGenerate)
        .with(PromptTune)
        .with(Evaluate)
}
