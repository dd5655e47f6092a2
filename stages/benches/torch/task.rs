//! What is measured: a case at a shape, as both sides read it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use contract::random::{below, philox};
use contract::{TokenizerFile, Value};
use lm::{Architecture, LanguageModel};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// What is measured. Its name is that of the Python program beside this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    /// One update on cross-entropy: forward, backward, clipped AdamW.
    Step,
    /// A batch of prompts continued by a fixed number of tokens.
    Generate,
}

impl Case {
    /// The Python program of the case.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Case::Step => "step.py",
            Case::Generate => "generate.py",
        }
    }

    /// The ways in which PyTorch is tried; the fastest is the one to beat.
    pub(crate) fn ways(self) -> &'static [&'static str] {
        match self {
            Case::Step => &["eager", "compiled"],
            Case::Generate => &["generate", "loop"],
        }
    }
}

/// Scale of models and batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scale {
    /// GPT-2 of 4 layers x 256 over 8192 tokens.
    Tiny,
    /// GPT-2 small: 12 layers x 768 over 50257 tokens.
    Small,
}

/// Sizes of a GPT-2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Model {
    /// Blocks `L`.
    pub layers: usize,
    /// Channels `C`, 64 for each head.
    pub width: usize,
    /// Tokens `V`.
    pub vocabulary: usize,
}

/// How tokens are chosen, by the names that both sides use.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: usize,
    /// 1 is off.
    pub top_p: f32,
}

/// A case with its sizes: a line of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// What it is called in the table.
    pub name: String,
    /// What is measured.
    pub case: Case,
    /// The model that is trained, or writes.
    pub student: Model,
    /// Rows of a batch.
    pub rows: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a response.
    pub response: usize,
    /// How responses are written.
    pub sampling: Sampling,
}

/// A line made concrete: weights in folders, ids in lists.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The line.
    pub line: Line,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32` or `bf16`: what is computed in. Masters are f32 always.
    pub dtype: String,
    /// Threads of a process.
    pub threads: usize,
    /// Folder of the student's weights.
    pub student: PathBuf,
    /// Prompts of all rows.
    pub prompts: Vec<Vec<u32>>,
    /// Responses of all rows.
    pub responses: Vec<Vec<u32>>,
    /// Rate of AdamW.
    pub learning_rate: f64,
}

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0 };
const SAMPLED: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
const FILTERED: Sampling = Sampling { temperature: 1.0, top_k: 50, top_p: 0.95 };

/// The lines of a case.
pub(crate) fn lines(case: Case, scale: Scale) -> Vec<Line> {
    let (name, student) = match scale {
        Scale::Tiny => ("tiny", Model { layers: 4, width: 256, vocabulary: 8192 }),
        Scale::Small => ("small", Model { layers: 12, width: 768, vocabulary: 50_257 }),
    };
    let line = Line {
        name: format!("{name} {}", case.to_possible_value().expect("no case is skipped").get_name()),
        case,
        student,
        rows: 8,
        prompt: 64,
        response: 64,
        sampling: GREEDY,
    };
    match case {
        Case::Step => vec![Line { rows: if scale == Scale::Tiny { 16 } else { 8 }, ..line }],
        Case::Generate => {
            let response = if scale == Scale::Tiny { 64 } else { 32 };
            let variants = [8, 64].into_iter().flat_map(|rows| {
                [("greedy", GREEDY), ("sampled", SAMPLED), ("top-k/p", FILTERED)].map(|how| (rows, how))
            });
            let variants = variants.map(|(rows, (how, sampling))| Line {
                name: format!("{} {rows} {how}", line.name),
                rows,
                response,
                sampling,
                ..line.clone()
            });
            variants.collect()
        }
    }
}

impl Task {
    /// Draws weights and ids, and writes them to `folder`. The file to give both sides is `folder/task.json`.
    pub(crate) fn write(line: &Line, device: &str, threads: usize, folder: &Path) -> Result<Task> {
        let student = folder.join("student");
        write_model(line.student, 1, &student)?;
        let text = |length: usize, purpose: u32| -> Vec<Vec<u32>> {
            (0..line.rows as u32)
                .map(|row| (0..length as u32).map(|t| token(line.student.vocabulary, [t, row, 0, purpose])).collect())
                .collect()
        };
        let task = Task {
            line: line.clone(),
            device: device.to_owned(),
            dtype: if device == "cpu" { "f32" } else { "bf16" }.to_owned(),
            threads,
            student,
            prompts: text(line.prompt, 1),
            responses: text(line.response, 2),
            learning_rate: 1e-4,
        };
        fs::write(folder.join("task.json"), serde_json::to_vec(&task)?)?;
        Ok(task)
    }

    /// Reads what [`Task::write`] wrote.
    pub(crate) fn read(path: &Path) -> Result<Task> {
        let text = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

fn token(vocabulary: usize, counter: [u32; 4]) -> u32 {
    let [a, b, ..] = philox(0, counter);
    below(a, b, vocabulary as u64) as u32
}

/// Random weights in a folder that `transformers` reads. The end token is outside of the vocabulary, so that every
/// response has its full length.
fn write_model(model: Model, seed: u64, folder: &Path) -> Result<()> {
    let Model { layers, width, vocabulary } = model;
    let tokenizer = TokenizerFile { json: Arc::default(), end: vocabulary as u32, size: vocabulary as u32 };
    let architecture: Architecture = serde_json::from_value(json!({
        "architecture": "gpt2", "layers": layers, "width": width, "heads": width / 64, "positions": 1024, "dropout": 0.0,
    }))?;
    let model = LanguageModel::init(&architecture, tokenizer, seed, &lm::device("cpu")?)?;
    fs::create_dir_all(folder)?;
    model.save(folder)
}
