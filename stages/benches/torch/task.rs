//! What is measured: a case at a scale, as both sides read it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use clap::ValueEnum;
use contract::random::{below, philox};
use contract::{TokenizerFile, Value};
use lm::{Architecture, Dtype, LanguageModel, Lora};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::roofline::SEEDS;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    /// One update on cross-entropy: forward, backward, clipped AdamW.
    Step,
    /// One update of a low-rank adapter on cross-entropy.
    Lora,
    /// One update on half cross-entropy, half forward KL to a teacher that is run as well.
    Distill,
    /// The same with the teacher's hidden states at hand: only its head is run.
    Cached,
    /// A whole round of PromptKD: the student writes, the teacher's prompt is tuned, the student is trained.
    Promptkd,
    /// A batch of prompts continued by a fixed number of tokens.
    Generate,
    /// Answers from several seeds, scored by ROUGE-L.
    Evaluate,
}

impl Case {
    /// The Python program of the case, beside this file.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Case::Step => "step.py",
            Case::Lora => "lora.py",
            Case::Distill | Case::Cached => "distill.py",
            Case::Promptkd => "promptkd.py",
            Case::Generate => "generate.py",
            Case::Evaluate => "evaluate.py",
        }
    }

    /// The ways in which PyTorch is tried; the fastest is the one to beat.
    pub(crate) fn ways(self) -> &'static [&'static str] {
        match self {
            Case::Step | Case::Lora | Case::Distill | Case::Cached => &["eager", "compiled"],
            Case::Promptkd => &["published", "tight"],
            Case::Generate | Case::Evaluate => &["generate", "loop"],
        }
    }

    /// Whether responses end by themselves, so that those of a batch differ in length.
    fn ends(self) -> bool {
        matches!(self, Case::Promptkd | Case::Evaluate)
    }

    fn name(self) -> String {
        self.to_possible_value().expect("no case is skipped").get_name().to_owned()
    }
}

/// Scale of models and batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scale {
    /// GPT-2 of 4 layers x 256 over 8192 tokens; its teacher 8 x 512.
    Tiny,
    /// GPT-2 small: 12 layers x 768 over 50257 tokens. It teaches 6 x 512.
    Small,
    /// GPT-2 small as the student of GPT-2 XL, 48 x 1600, in the published shape; for a GPU.
    Published,
}

/// Sizes of a GPT-2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Model {
    /// Blocks `L`.
    pub(crate) layers: usize,
    /// Channels `C`, 64 for each head.
    pub(crate) width: usize,
    /// Tokens `V`.
    pub(crate) vocabulary: usize,
}

/// How tokens are chosen, by the names that both sides use.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sampling {
    /// 0 is greedy.
    pub(crate) temperature: f32,
    /// 0 is off.
    pub(crate) top_k: usize,
    /// 1 is off.
    pub(crate) top_p: f32,
}

/// A case with its sizes: a line of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// What it is called in the table.
    pub(crate) name: String,
    /// What is measured.
    pub(crate) case: Case,
    /// The model that is trained, or writes.
    pub(crate) student: Model,
    /// The model that teaches; not in every case.
    pub(crate) teacher: Model,
    /// Rows of a batch.
    pub(crate) rows: usize,
    /// Tokens of a prompt. Where responses end by themselves, prompts have between half of it and all.
    pub(crate) prompt: usize,
    /// Tokens of a response, or the most it may have.
    pub(crate) response: usize,
    /// How responses are written.
    pub(crate) sampling: Sampling,
}

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0 };
const SAMPLED: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
const FILTERED: Sampling = Sampling { temperature: 1.0, top_k: 50, top_p: 0.95 };

/// The lines of a case.
pub(crate) fn lines(case: Case, scale: Scale) -> Vec<Line> {
    let model = |layers, width, vocabulary| Model { layers, width, vocabulary };
    let (tiny, small) = (model(4, 256, 8192), model(12, 768, 50_257));
    let (name, student, teacher) = match scale {
        Scale::Tiny => ("tiny", tiny, model(8, 512, 8192)),
        Scale::Small if matches!(case, Case::Step | Case::Lora | Case::Generate) => ("small", small, small),
        Scale::Small => ("small", model(6, 512, 50_257), small),
        Scale::Published => ("published", small, model(48, 1600, 50_257)),
    };
    let line = |rows, prompt, response| Line {
        name: format!("{name} {}", case.name()),
        case,
        student,
        teacher,
        rows,
        prompt,
        response,
        sampling: SAMPLED,
    };
    let (rows, response) = match (scale, case) {
        (Scale::Tiny, Case::Evaluate) => (32, 64),
        (Scale::Tiny, Case::Promptkd) => (8, 48),
        (Scale::Tiny, _) => (16, 64),
        (Scale::Small, Case::Generate) => (8, 32),
        (Scale::Small, Case::Evaluate) => (16, 32),
        (Scale::Small, Case::Promptkd) => (2, 64),
        (Scale::Small, _) => (4, 64),
        (Scale::Published, Case::Evaluate) => (256, 256),
        (Scale::Published, _) => (32, 256),
    };
    let prompt = if scale == Scale::Published { 256 } else { 64 };
    if case != Case::Generate {
        return vec![line(rows, prompt, response)];
    }
    let variants = [8, 64]
        .into_iter()
        .flat_map(|rows| [("greedy", GREEDY), ("sampled", SAMPLED), ("top-k/p", FILTERED)].map(|how| (rows, how)));
    let variants = variants.map(|(rows, (how, sampling))| {
        let line = line(rows, prompt, response);
        Line { name: format!("{} {rows} {how}", line.name), sampling, ..line }
    });
    variants.collect()
}

/// The line itself, and then with one size doubled and doubled again: rows, length, vocabulary, width.
pub(crate) fn doubled(line: &Line) -> Vec<(&'static str, usize, Line)> {
    let mut lines = vec![("-", 1, line.clone())];
    for size in ["rows", "length", "vocabulary", "width"] {
        for factor in [2, 4] {
            let mut larger = line.clone();
            let Line { student, teacher, .. } = &mut larger;
            match size {
                "rows" => larger.rows *= factor,
                "length" => (larger.prompt, larger.response) = (line.prompt * factor, line.response * factor),
                "vocabulary" => [student, teacher].into_iter().for_each(|model| model.vocabulary *= factor),
                _ => [student, teacher].into_iter().for_each(|model| model.width *= factor),
            }
            larger.name = format!("{} {size} x{factor}", line.name);
            lines.push((size, factor, larger));
        }
    }
    lines
}

/// A line made concrete: weights in folders, ids in lists.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The line.
    pub(crate) line: Line,
    /// `cpu` or `cuda:N`.
    pub(crate) device: String,
    /// What is computed in. Masters are f32 always.
    pub(crate) dtype: Dtype,
    /// Threads of a process.
    pub(crate) threads: usize,
    /// Folder of the student's weights.
    pub(crate) student: PathBuf,
    /// Folder of the teacher's weights.
    pub(crate) teacher: PathBuf,
    /// The token that ends a response. Outside of the vocabulary where responses have their full length.
    pub(crate) end: u32,
    /// Prompts of all rows.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Responses of all rows, with their end token where they end.
    pub(crate) responses: Vec<Vec<u32>>,
    /// A right answer to each prompt.
    pub(crate) references: Vec<String>,
    /// Tokens whose embeddings the soft prompt starts from.
    pub(crate) prompt_ids: Vec<u32>,
    /// Rate of AdamW.
    pub(crate) learning_rate: f64,
    /// Weight of PromptKD's regulariser.
    pub(crate) regulariser: f64,
    /// Seeds of an evaluation.
    pub(crate) seeds: Vec<u64>,
    /// Rows that an evaluation writes together.
    pub(crate) batch: usize,
}

impl Task {
    /// Draws weights and ids, and writes them to `folder`. The file to give both sides is `folder/task.json`.
    pub(crate) fn write(line: &Line, device: &str, threads: usize, folder: &Path) -> Result<Task> {
        let Line { case, rows, prompt, response, .. } = *line;
        let vocabulary = line.student.vocabulary as u32;
        let end = if case.ends() { 0 } else { vocabulary };
        // Of a row's longest length: all of it, or somewhere between half of it and all.
        let length =
            |longest: usize, row: usize| if case.ends() { longest - row * longest / (2 * rows) } else { longest };
        let prompts: Vec<Vec<u32>> = (0..rows).map(|row| text(vocabulary, length(prompt, row), row, 1)).collect();
        let mut responses: Vec<Vec<u32>> =
            (0..rows).map(|row| text(vocabulary, length(response, row), row, 2)).collect();
        let references = responses.iter().map(|ids| words(&ids[..ids.len() / 2])).collect();
        if case.ends() {
            responses.iter_mut().for_each(|ids| *ids.last_mut().expect("a response has tokens") = end);
        }
        let likely_end = case.ends().then_some(3.0 / response as f64);
        let lora = (case == Case::Lora).then(|| serde_json::from_value(json!({"rank": 8}))).transpose()?;
        write_model(line.student, 1, end, likely_end, lora.as_ref(), &folder.join("student"))?;
        if matches!(case, Case::Distill | Case::Cached | Case::Promptkd) {
            write_model(line.teacher, 2, end, likely_end, None, &folder.join("teacher"))?;
        }
        let task = Task {
            line: line.clone(),
            device: device.to_owned(),
            dtype: if device == "cpu" { Dtype::F32 } else { Dtype::Bf16 },
            threads,
            student: folder.join("student"),
            teacher: folder.join("teacher"),
            end,
            prompts,
            responses,
            references,
            prompt_ids: text(vocabulary, 7, 0, 3),
            learning_rate: 1e-4,
            regulariser: 1.0,
            seeds: (1..=SEEDS).collect(),
            batch: rows.min(64),
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

/// Random ids, without 0.
fn text(vocabulary: u32, length: usize, row: usize, purpose: u32) -> Vec<u32> {
    let id = |position: usize| {
        let [a, b, ..] = philox(0, [position as u32, row as u32, 0, purpose]);
        1 + below(a, b, u64::from(vocabulary) - 1) as u32
    };
    (0..length).map(id).collect()
}

/// Random weights in a folder that `transformers` reads. With `likely_end`, about that is the probability of the end
/// token after any text.
fn write_model(
    model: Model,
    seed: u64,
    end: u32,
    likely_end: Option<f64>,
    lora: Option<&Lora>,
    folder: &Path,
) -> Result<()> {
    let Model { layers, width, vocabulary } = model;
    let tokenizer = match likely_end {
        Some(_) => TokenizerFile::new(tokenizer(vocabulary as u32, end)?, end, vocabulary as u32),
        None => TokenizerFile::new("", end, vocabulary as u32),
    };
    let architecture: Architecture = serde_json::from_value(json!({
        "architecture": "gpt2", "layers": layers, "width": width, "heads": width / 64, "positions": 1024, "dropout": 0.0,
    }))?;
    let model = LanguageModel::init(&architecture, tokenizer, seed, &lm::device("cpu")?)?.trainable()?;
    if let Some(probability) = likely_end {
        favour(&model, end, (vocabulary as f64 * probability).ln())?;
    }
    let model = lora.map_or(Ok(model.frozen()), |lora| model.with_new_adapter(lora, seed))?;
    fs::create_dir_all(folder)?;
    model.save(folder)
}

/// Adds about `logit` to the logit of a token everywhere: a direction of hidden states that the last norm's bias always
/// has, and that the token's row of the head asks for.
fn favour(model: &LanguageModel, token: u32, logit: f64) -> Result<()> {
    const ASK: f64 = 0.3;
    let (width, device) = (model.width(), model.device());
    let direction = |length: f64| {
        let sign = |c: usize| if c.is_multiple_of(2) { 1.0 } else { -1.0 };
        let scale = length / (width as f64).sqrt();
        Tensor::from_vec((0..width).map(|c| (sign(c) * scale) as f32).collect::<Vec<_>>(), (1, width), device)
    };
    let bias = Var::from_tensor(&model.parameters()["transformer.ln_f.bias"])?;
    bias.set(&direction(logit / ASK)?.squeeze(0)?)?;
    let embedding = Var::from_tensor(model.embedding()?)?;
    let row = token as usize..token as usize + 1;
    embedding.set(&embedding.slice_assign(&[row, 0..width], &direction(ASK)?)?)?;
    Ok(())
}

/// A tokenizer whose tokens are invented words.
fn tokenizer(vocabulary: u32, end: u32) -> Result<Vec<u8>> {
    const END: &str = "<|endoftext|>";
    let vocabulary: BTreeMap<String, u32> =
        (0..vocabulary).map(|id| (if id == end { END.to_owned() } else { word(id) }, id)).collect();
    let added = json!({
        "id": end, "content": END, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
    });
    Ok(serde_json::to_vec(&json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END},
    }))?)
}

fn words(ids: &[u32]) -> String {
    ids.iter().map(|id| word(*id)).collect::<Vec<_>>().join(" ")
}

/// A word of three syllables for an id below 70³, with an ending that stemming takes away from some.
fn word(id: u32) -> String {
    let syllable = |n: u32| {
        ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"][n as usize / 5 % 14].to_owned()
            + ["a", "e", "i", "o", "u"][n as usize % 5]
    };
    let ending = ["", "", "s", "ing"][id as usize % 4];
    syllable(id % 70) + &syllable(id / 70 % 70) + &syllable(id / 4900 % 70) + ending
}
