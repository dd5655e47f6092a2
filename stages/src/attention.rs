//! `attention`: how the heads of a model attend, how that differs from another model, and whether it goes with accuracy.
//!
//! ```yaml
//! heads:
//!   kind: attention
//!   in: {model: train.student, before: student0, data: data.test, predictions: score.predictions}
//!   with: {rows: 60}
//! ```
//!
//! Of every head, with `p` what a query gives to the keys it sees, in one text: `entropy`, the mean over queries of
//! `-sum p ln p`, in nats; `self_focus`, the mean of what a query gives to its own position; `density`, the share of pairs of query
//! and key with `p` over a threshold (published as "sparsity"); `similarity`, the cosine of the head's matrix and that of the head
//! of the same number in the layer before. With `before`, another model of the same shape: the same of it, `divergence`, the mean over queries
//! of the Jensen-Shannon divergence of the two models' `p`, in nats, and `variance`, that of the two entries of each pair, averaged over
//! the whole matrix: by which the published program finds heads that differ.
//!
//! With `predictions` of `evaluate` over the same rows: the correlation (Pearson) over rows of what a head does with
//! whether the answer is right. Of many heads some go with anything: with no connection at all one interval in twenty leaves 0
//! out, so `..._correlated` says which share of the heads does. Means are over texts; every interval is of 95 %, by bootstrap over
//! texts.
//!
//! Inputs: `model` and its soft prompt, `data`, `before`, `predictions`. Outputs: `metrics`, over all heads; `table`: `heads.csv`,
//! `layers.csv`, and where there is something to say `divergent.csv`, `accuracy.csv` and `maps.jsonl`, the matrices of chosen heads
//! with their tokens; `figures`: each number by layer, the divergence of every head, what goes with accuracy, and the chosen
//! heads. Layers and heads are counted from 0. Cost: a slow forward pass of each model over each text, in f32; memory for one
//! text, 4 bytes for each layer, head, query and key.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use candle_core::Tensor;
use chart::{Axis, Dots, Estimate, Figure, Heat, Lines, Series};
use contract::dataset::row_name;
use contract::limits;
use contract::{
    About, AnyValue, ConfigError, Conventions, Dataset, Env, Folder, Inputs, Longest, Metrics, Operator, Outlook,
    Outputs, PortType, Ports, Predictions, Result, Row, Sink, Stage, Step,
};
use lm::{LanguageModel, SoftPrompt};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use crate::finite::{Behind, not_finite};
use crate::interval::{Resamples, correlation, mean, round};
use crate::text::{SpecialTokens, Text};

/// The `with` of `attention`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What of a row is read.
    #[serde(default)]
    pub reads: Reads,
    /// Only the first so many rows.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::ROWS))]
    pub rows: Option<usize>,
    /// Only the first so many layers; the published program leaves out the last.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::LAYERS))]
    pub layers: Option<usize>,
    /// What a query must give to a key for the pair to count in `density`.
    #[serde(default = "tenth")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub threshold: f64,
    /// Which pairs `density` is a share of; left out: as the conventions say.
    #[serde(default)]
    pub density_of: Option<Pairs>,
    /// Heads whose matrices `maps.jsonl` has, of the first text. Left out: the two that diverge most, with `before`.
    #[serde(default)]
    pub maps: Option<Vec<Head>>,
}

/// What of a row is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Reads {
    /// The prompt, as in the published program.
    #[default]
    Prompt,
    /// The prompt and the response as given.
    Row,
}

/// Pairs of a query and a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Pairs {
    /// Those in which the key is not behind the query.
    Seen,
    /// All, as in the published program: half of them can be nothing but 0.
    All,
}

/// A head of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Its layer, counted from 0.
    #[schemars(range(min = 0, max = limits::LAYERS))]
    pub layer: usize,
    /// Its number in the layer, counted from 0.
    #[schemars(range(min = 0, max = limits::HEADS))]
    pub head: usize,
}

fn tenth() -> f64 {
    0.1
}

/// Heads that `divergent.csv` lists, as the published program does.
const LISTED: usize = 10;

/// Heads drawn where nobody chose any.
const DRAWN: usize = 2;

/// Tokens of a text that the picture of a head shows, from the first on: more cannot be read.
const SHOWN: usize = 96;

/// The kind.
pub struct Attention;

impl Stage for Attention {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "attention",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "measures how the heads of a model attend, how that changed, and whether it goes with accuracy",
            example: "kind: attention\nin: {model: train.student, before: student0, data: data.test, predictions: score.predictions}\nwith: {rows: 60}",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.density_of.get_or_insert(match conventions {
            Conventions::Sound => Pairs::Seen,
            Conventions::Reference => Pairs::All,
        });
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let layers = config.layers.unwrap_or(usize::MAX);
        let behind = config.maps.iter().flatten().find(|head| head.layer >= layers);
        let error = |head: &Head| {
            let message = format!("layer {} is not among the {layers} that are measured", head.layer);
            ConfigError::at("maps", message).hint("layers are counted from 0")
        };
        behind.map(error).into_iter().collect()
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("model", PortType::Model, "whose heads are measured")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the model")
            .optional(
                "before",
                PortType::Model,
                "a model of the same shape to compare with, such as the same before training",
            )
            .input("data", PortType::Dataset, "the texts")
            .optional("predictions", PortType::Predictions, "whether the model's answers to the same rows are right")
            .output("metrics", PortType::Metrics, "means over all heads, with intervals")
            .output(
                "table",
                PortType::Table,
                "heads, layers, the heads that differ most, and how each goes with accuracy",
            )
            .output("figures", PortType::Figure, "the same as pictures, and chosen heads with their tokens")
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        for model in ["model", "before"] {
            outlook.holds(model);
        }
        outlook.same_vocabulary(&["data", "model", "before"]);
        outlook.same_width("model", "prompt");
        outlook.takes_rows("data", "rows", config.rows.map(|rows| rows as u64));
        let mut rows = outlook.rows("data").of_first(config.rows.map(|rows| rows as u64));
        if config.reads == Reads::Prompt {
            rows.text = Longest::default();
        }
        outlook.reads("model", Some("prompt"), &rows);
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let folder = env.scratch.join("attention");
        Ok(Box::new(Measuring { config, tables: folder.join("table"), figures: folder.join("figures") }))
    }
}

struct Measuring {
    config: Config,
    tables: PathBuf,
    figures: PathBuf,
}

impl Operator for Measuring {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let config = &self.config;
        let model = inputs.take::<LanguageModel>("model")?;
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let before = inputs.take_optional::<LanguageModel>("before")?;
        let data = inputs.take::<Dataset>("data")?;
        let predictions = inputs.take_optional::<Predictions>("predictions")?;
        let rows = &data.rows[..data.rows.len().min(config.rows.unwrap_or(usize::MAX))];
        ensure!(!rows.is_empty(), "the data has no rows");

        let (mut own, mut others, mut distances) = (Vec::new(), Vec::new(), Vec::new());
        let mut first = None;
        for (done, row) in rows.iter().enumerate() {
            let attended = config.attended("model", &model, prompt.as_ref(), row)?;
            let earlier = match &before {
                Some(before) => {
                    let earlier = config.attended("before", before, prompt.as_ref(), row)?;
                    ensure!(
                        attended.shape() == earlier.shape(),
                        "`before` has {} layers of {} heads, and `model` {} of {}: they can be compared by head only where they have \
                         as many",
                        earlier.layers.len(),
                        earlier.heads,
                        attended.layers.len(),
                        attended.heads
                    );
                    others.push(config.measures(&earlier));
                    distances.push(attended.distances(&earlier));
                    Some(earlier)
                }
                None => None,
            };
            own.push(config.measures(&attended));
            first.get_or_insert((attended, earlier));
            sink.progress(done as u64 + 1, rows.len() as u64, "texts");
        }
        let (attended, earlier) = first.context("there is a text")?;
        let heads = attended.heads;
        let mut columns = Column::all(MEASURES, &own, "");
        columns.extend(Column::all(MEASURES, &others, "_before"));
        columns.extend(Column::all(DISTANCES, &distances, ""));

        let resamples = Resamples::of(rows.len());
        let mut metrics = Map::new();
        for column in &columns {
            metrics.insert(column.name.clone(), column.summary(&resamples));
        }
        std::fs::create_dir_all(&self.tables)?;
        std::fs::create_dir_all(&self.figures)?;
        let write = |name: &str, text: &str| contract::value::write(&self.tables.join(name), text.as_bytes());
        let draw = |name: &str, figure: Figure| {
            contract::value::write(&self.figures.join(format!("{name}.svg")), figure.svg().as_bytes())
        };
        for name in MEASURES.iter().chain(&DISTANCES[..1]) {
            let found: Vec<&Column> =
                columns.iter().filter(|it| it.name.strip_suffix("_before").unwrap_or(&it.name) == *name).collect();
            if !found.is_empty() {
                draw(&format!("{name}-by-layer"), by_layer_drawn(name, &found, heads, &resamples))?;
            }
        }
        write("heads.csv", &by_head(&columns, heads))?;
        write("layers.csv", &by_layer(&columns, heads))?;
        let divergent = columns.iter().find(|column| column.name == "divergence").map(|column| column.largest(heads));
        if let Some(divergent) = &divergent {
            write("divergent.csv", &listed(&columns, heads, divergent))?;
            let column = columns.iter().find(|column| column.name == "divergence").context("it was measured")?;
            draw("divergence-by-head", by_head_drawn(column, heads))?;
        }
        if let Some(predictions) = &predictions {
            let right = Right::of(predictions, rows)?;
            write("accuracy.csv", &right.correlations(&columns[..MEASURES.len()], heads, &mut metrics))?;
            draw("accuracy", correlations_drawn(&metrics))?;
        }
        let chosen = config.maps.clone().or(divergent.map(|heads| heads[..heads.len().min(DRAWN)].to_vec()));
        if let Some(chosen) = chosen.filter(|chosen| !chosen.is_empty()) {
            let tokens = config.tokens(&rows[0], &data, prompt.as_ref())?;
            let models = [("model", Some(&attended)), ("before", earlier.as_ref())];
            let mut maps = String::new();
            for head in chosen {
                for (model, attended) in models.iter().filter_map(|(name, found)| Some((name, (*found)?))) {
                    let of = row_name(rows[0].id);
                    let map =
                        json!({"row": of, "model": model, "layer": head.layer, "head": head.head, "tokens": tokens});
                    let matrix = attended.at(head)?;
                    maps += &with_matrix(map, matrix, attended.length).to_string();
                    maps.push('\n');
                    let whose = if *model == "before" { ", of the model before" } else { "" };
                    let title = format!("Layer {}, head {}{whose}", head.layer, head.head);
                    draw(&format!("map-{}-{}-{model}", head.layer, head.head), map_drawn(title, &tokens, matrix))?;
                }
            }
            write("maps.jsonl", &maps)?;
        }
        Ok(Outputs::new()
            .with("metrics", Metrics(metrics))
            .with("table", Folder::new(PortType::Table, &self.tables))
            .with("figures", Folder::new(PortType::Figure, &self.figures)))
    }
}

impl Config {
    /// The ids of a row that are read.
    fn text(&self, row: &Row) -> Vec<u32> {
        match self.reads {
            Reads::Prompt => row.prompt.clone(),
            Reads::Row => [row.prompt.as_slice(), &row.response].concat(),
        }
    }

    /// The tokens of a text as they are written, behind those of a soft prompt. Ids, where the data has no tokenizer.
    fn tokens(&self, row: &Row, data: &Dataset, prompt: Option<&Tensor>) -> Result<Vec<String>> {
        let text = (!data.tokenizer.json.is_empty()).then(|| Text::new(&data.tokenizer, SpecialTokens::Text));
        let text = text.transpose()?;
        let word = |id: u32| match &text {
            // What is no text by itself, such as a control token, goes by its name.
            Some(text) => match text.decode(&[id])?.as_str() {
                "" | "\u{fffd}" => text.token(id),
                word => Ok(word.to_owned()),
            },
            None => Ok(id.to_string()),
        };
        let before = prompt.map_or(0, |prompt| prompt.dims()[0]);
        let prompt = (1..=before).map(|vector| Ok(format!("[prompt {vector}]")));
        prompt.chain(self.text(row).into_iter().map(word)).collect()
    }

    fn attended(&self, port: &str, model: &LanguageModel, prompt: Option<&Tensor>, row: &Row) -> Result<Attended> {
        let layers = model.attention(&self.text(row), prompt).with_context(|| row_name(row.id))?;
        let (heads, length, _) = layers[0].dims3()?;
        let layers = layers.iter().take(self.layers.unwrap_or(usize::MAX)).map(|layer| layer.flatten_all()?.to_vec1());
        let layers: Vec<Vec<f32>> = layers.collect::<candle_core::Result<_>>()?;
        if layers.iter().flatten().any(|p| !p.is_finite()) {
            return Err(not_finite("how the model attends in", row, &[Behind::new(port, model, prompt)]));
        }
        Ok(Attended { heads, length, layers })
    }

    /// What every head does, layer by layer.
    fn measures(&self, attended: &Attended) -> Vec<[Option<f64>; 4]> {
        let all = self.density_of == Some(Pairs::All);
        let measure = |index: usize| {
            let (layer, head) = (index / attended.heads, index % attended.heads);
            let p = attended.matrix(layer, head);
            let before = layer.checked_sub(1).map(|layer| attended.matrix(layer, head));
            let length = attended.length;
            let queries = || p.chunks_exact(length).enumerate();
            let mean =
                |of: &dyn Fn(usize, &[f32]) -> f64| queries().map(|(at, p)| of(at, p)).sum::<f64>() / length as f64;
            let pairs = if all { length * length } else { length * (length + 1) / 2 };
            let dense = p.iter().filter(|p| f64::from(**p) > self.threshold).count();
            [
                Some(mean(&|_, p| p.iter().map(|p| entropy(f64::from(*p))).sum())),
                Some(mean(&|at, p| f64::from(p[at]))),
                Some(dense as f64 / pairs as f64),
                before.map(|before| cosine(p, before)),
            ]
        };
        (0..attended.layers.len() * attended.heads).into_par_iter().map(measure).collect()
    }
}

/// `-p ln p`.
fn entropy(p: f64) -> f64 {
    if p > 0.0 { -p * p.ln() } else { 0.0 }
}

/// Of two matrices that are not zero.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// How a model attends in one text.
struct Attended {
    heads: usize,
    length: usize,
    /// `[heads, length, length]` by layer.
    layers: Vec<Vec<f32>>,
}

impl Attended {
    fn shape(&self) -> (usize, usize) {
        (self.layers.len(), self.heads)
    }

    /// What every query of a head gives to every key.
    fn matrix(&self, layer: usize, head: usize) -> &[f32] {
        let size = self.length * self.length;
        &self.layers[layer][head * size..][..size]
    }

    fn at(&self, Head { layer, head }: Head) -> Result<&[f32]> {
        let (layers, heads) = self.shape();
        ensure!(
            layer < layers && head < heads,
            "`maps` asks for head {head} of layer {layer}: there are {layers} layers of {heads} heads, counted from 0"
        );
        Ok(self.matrix(layer, head))
    }

    /// How far every head is from that of another model.
    fn distances(&self, other: &Attended) -> Vec<[Option<f64>; 2]> {
        let distance = |index: usize| {
            let (layer, head) = (index / self.heads, index % self.heads);
            let (mut divergence, mut variance) = (0.0, 0.0);
            for (p, q) in self.matrix(layer, head).iter().zip(other.matrix(layer, head)) {
                let (p, q) = (f64::from(*p), f64::from(*q));
                divergence += entropy((p + q) / 2.0) - (entropy(p) + entropy(q)) / 2.0;
                variance += ((p - q) / 2.0).powi(2);
            }
            [Some(divergence / self.length as f64), Some(variance / (self.length * self.length) as f64)]
        };
        (0..self.layers.len() * self.heads).into_par_iter().map(distance).collect()
    }
}

const MEASURES: [&str; 4] = ["entropy", "self_focus", "density", "similarity"];
const DISTANCES: [&str; 2] = ["divergence", "variance"];

/// A number of every head, in every text.
struct Column {
    name: String,
    /// By text and head, layer after layer; heads of the first layer have no similarity.
    values: Vec<Vec<Option<f64>>>,
}

impl Column {
    /// Those of what was found in each text; none of nothing.
    fn all<const N: usize>(names: [&str; N], texts: &[Vec<[Option<f64>; N]>], suffix: &str) -> Vec<Column> {
        if texts.is_empty() {
            return Vec::new();
        }
        let column = |(index, name): (usize, &&str)| {
            let of_text = |heads: &Vec<[Option<f64>; N]>| heads.iter().map(|values| values[index]).collect();
            Column { name: format!("{name}{suffix}"), values: texts.iter().map(of_text).collect() }
        };
        names.iter().enumerate().map(column).collect()
    }

    fn head_count(&self) -> usize {
        self.values[0].len()
    }

    /// The mean over texts of the mean over some heads.
    fn mean(&self, heads: std::ops::Range<usize>) -> Option<f64> {
        mean(self.values.iter().filter_map(|text| mean(text[heads.clone()].iter().copied().flatten())))
    }

    /// The value of each text, over some heads.
    fn by_text(&self, heads: std::ops::Range<usize>) -> Option<Vec<f64>> {
        self.values.iter().map(|text| mean(text[heads.clone()].iter().copied().flatten())).collect()
    }

    fn summary(&self, resamples: &Resamples) -> Json {
        match self.by_text(0..self.head_count()) {
            Some(texts) => {
                let interval = resamples.of_mean(&texts, &vec![1.0; texts.len()]);
                json!({"mean": mean(texts.into_iter()).map(round), "interval": interval})
            }
            None => json!({"mean": null, "interval": null, "not_measured": "there is one layer, and none before it"}),
        }
    }

    /// The heads with the largest values, that of the largest first.
    fn largest(&self, heads: usize) -> Vec<Head> {
        let mut found: Vec<(usize, f64)> =
            (0..self.head_count()).filter_map(|index| Some((index, self.mean(index..index + 1)?))).collect();
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        let head = |(index, _): &(usize, f64)| Head { layer: index / heads, head: index % heads };
        found.iter().take(LISTED).map(head).collect()
    }
}

/// A cell of a table.
fn cell(value: Option<f64>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

/// Lines of a table: what stands first in each, and the heads it is about.
fn table(first: &str, columns: &[Column], lines: impl Iterator<Item = (String, std::ops::Range<usize>)>) -> String {
    let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
    let mut table = format!("{first},{}\n", names.join(","));
    for (label, heads) in lines {
        let cells: Vec<String> = columns.iter().map(|column| cell(column.mean(heads.clone()))).collect();
        let _ = writeln!(table, "{label},{}", cells.join(","));
    }
    table
}

fn by_head(columns: &[Column], heads: usize) -> String {
    let all = 0..columns[0].head_count();
    let lines = all.map(|index| (format!("{},{}", index / heads, index % heads), index..index + 1));
    table("layer,head", columns, lines)
}

fn by_layer(columns: &[Column], heads: usize) -> String {
    let layers = 0..columns[0].head_count() / heads;
    table("layer", columns, layers.map(|layer| (layer.to_string(), layer * heads..(layer + 1) * heads)))
}

fn listed(columns: &[Column], heads: usize, chosen: &[Head]) -> String {
    let line = |Head { layer, head }: &Head| {
        let index = layer * heads + head;
        (format!("{layer},{head}"), index..index + 1)
    };
    table("layer,head", columns, chosen.iter().map(line))
}

/// A number by layer, of one model or of both, with its interval over texts.
fn by_layer_drawn(name: &str, columns: &[&Column], heads: usize, resamples: &Resamples) -> Figure {
    let series = columns.iter().map(|column| {
        let layers = (0..column.head_count() / heads).filter_map(|layer| {
            let texts = column.by_text(layer * heads..(layer + 1) * heads)?;
            let interval = resamples.of_mean(&texts, &vec![1.0; texts.len()]);
            let mean = mean(texts.into_iter())?;
            Some(((layer as f64, mean), interval.map_or((mean, mean), |[low, high]| (low, high))))
        });
        let (points, band) = layers.unzip();
        let label = if column.name.ends_with("_before") { "before" } else { "model" };
        Series { label: if columns.len() > 1 { label.into() } else { String::new() }, points, band }
    });
    let words = name.replace('_', " ");
    let unit = if ["entropy", "divergence"].contains(&name) { ", nats" } else { "" };
    let title = format!("{}{} of heads, by layer", words[..1].to_uppercase(), &words[1..]);
    let (x, y) = (Axis::of("layer"), Axis::of(&format!("{words}{unit}; band: 95 % interval over texts")));
    Lines { title, description: None, x, y, series: series.collect() }.draw()
}

/// How far every head is from that of the other model.
fn by_head_drawn(column: &Column, heads: usize) -> Figure {
    let names = |count: usize| (0..count).map(|index| index.to_string()).collect::<Vec<_>>();
    let layers = column.head_count() / heads;
    let row = |layer: usize| (layer * heads..(layer + 1) * heads).map(|index| column.mean(index..index + 1)).collect();
    Heat {
        title: "Divergence from the model before".into(),
        description: None,
        value: "Jensen-Shannon divergence in nats".into(),
        down: ("layer".into(), names(layers)),
        across: ("head".into(), names(heads)),
        values: (0..layers).map(row).collect(),
    }
    .draw()
}

/// How each measure goes with accuracy, where that can be said.
fn correlations_drawn(metrics: &Map<String, Json>) -> Figure {
    let row = |name: &&str| {
        let found = &metrics[&format!("{name}_correlation")];
        let [low, high] = [0, 1].map(|end| found["interval"][end].as_f64());
        let estimate = Estimate { repeats: Vec::new(), mean: found["mean"].as_f64()?, interval: low.zip(high) };
        Some((name.replace('_', " "), estimate))
    };
    Dots {
        title: "What goes with right answers".into(),
        description: None,
        value: Axis::of("correlation over texts, 95 % interval"),
        rows: MEASURES.iter().filter_map(row).collect(),
        mark: Some(0.0),
    }
    .draw()
}

/// What the queries of a head give to the keys they see.
fn map_drawn(title: String, tokens: &[String], matrix: &[f32]) -> Figure {
    let shown = tokens.len().min(SHOWN);
    let names = tokens[..shown].to_vec();
    let row = |query: usize| {
        let given = &matrix[query * tokens.len()..][..shown];
        given.iter().enumerate().map(|(key, p)| (key <= query).then_some(f64::from(*p))).collect()
    };
    Heat {
        title,
        description: None,
        value: "attention".into(),
        down: ("query".into(), names.clone()),
        across: ("key".into(), names),
        values: (0..shown).map(row).collect(),
    }
    .draw()
}

/// Puts the matrix of a head into what is said of it, a list a query.
fn with_matrix(mut map: Json, matrix: &[f32], length: usize) -> Json {
    map["attention"] = matrix.chunks_exact(length).collect();
    map
}

/// How often the answers to each text are right, from 0 to 1.
struct Right(Vec<f64>);

impl Right {
    /// Errors when the predictions do not say it of a row.
    fn of(predictions: &Predictions, rows: &[Row]) -> Result<Self> {
        let mut answers: HashMap<u64, Vec<bool>> = HashMap::new();
        for prediction in &predictions.0 {
            let (id, correct) = (prediction.get("id").and_then(Json::as_u64), prediction.get("correct"));
            if let (Some(id), Some(correct)) = (id, correct.and_then(Json::as_bool)) {
                answers.entry(id).or_default().push(correct);
            }
        }
        let of_row = |row: &Row| {
            let answers = answers.get(&row.id).with_context(|| {
                format!(
                    "`predictions` do not say whether the answer to {} is right: give `evaluate` the same rows and `metrics: \
                     [accuracy]`, and rows whose right answers have a number",
                    row_name(row.id)
                )
            })?;
            Ok(answers.iter().filter(|correct| **correct).count() as f64 / answers.len() as f64)
        };
        Ok(Right(rows.iter().map(of_row).collect::<Result<_>>()?))
    }

    /// How every measure goes with it: of each head a line, and of all heads a line and a metric.
    fn correlations(&self, columns: &[Column], heads: usize, metrics: &mut Map<String, Json>) -> String {
        let (all, resamples): (Vec<u32>, _) = ((0..self.0.len() as u32).collect(), Resamples::of(self.0.len()));
        let with = |values: &[f64]| {
            let interval = resamples.interval(|rows| correlation(values, &self.0, rows));
            correlation(values, &self.0, &all).zip(interval)
        };
        let mut table = "measure,layer,head,correlation,low,high\n".to_owned();
        let mut line = |label: String, found: Option<(f64, [f64; 2])>| {
            let cells = found.map(|(value, [low, high])| format!("{value},{low},{high}"));
            let _ = writeln!(table, "{label},{}", cells.as_deref().unwrap_or(",,"));
        };
        for column in columns {
            let name = &column.name;
            let count = column.head_count();
            let whole = column.by_text(0..count).and_then(|texts| with(&texts));
            line(format!("{name},,"), whole);
            let of_head = |index: usize| column.by_text(index..index + 1).and_then(|texts| with(&texts));
            let found: BTreeMap<usize, _> = (0..count).into_par_iter().map(|index| (index, of_head(index))).collect();
            for (index, found) in &found {
                line(format!("{name},{},{}", index / heads, index % heads), *found);
            }
            let measured: Vec<&[f64; 2]> = found.values().flatten().map(|(_, interval)| interval).collect();
            let apart = measured.iter().filter(|[low, high]| *low > 0.0 || *high < 0.0).count();
            let whole = match whole {
                Some((value, interval)) => json!({"mean": round(value), "interval": interval}),
                None => {
                    json!({"mean": null, "interval": null, "not_measured": "one of the two is the same in every text"})
                }
            };
            metrics.insert(format!("{name}_correlation"), whole);
            let share = (!measured.is_empty()).then(|| round(100.0 * apart as f64 / measured.len() as f64));
            metrics.insert(format!("{name}_correlated"), json!(share));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::Device;
    use contract::{Kind, TokenizerFile};
    use lm::{Architecture, Family};

    use super::*;
    use crate::testing::{Log, Scratch, output, row};

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(name)
    }

    fn json_of(name: &str) -> Json {
        serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
    }

    fn load(name: &str) -> Arc<LanguageModel> {
        Arc::new(LanguageModel::load(&fixture(name), &Device::Cpu).unwrap())
    }

    /// The first row of the first batch of a fixture.
    fn first_row(name: &str) -> Row {
        let first = &json_of(&format!("{name}/batch.json"))[0][0];
        let ids = |part: &str| serde_json::from_value::<Vec<u32>>(first[part].clone()).unwrap();
        row(7, &ids("prompt"), &ids("response"))
    }

    /// Metrics, files by name, and what was said.
    type Ran = (Map<String, Json>, BTreeMap<String, String>, Log);

    fn run(config: Json, inputs: Vec<(&str, AnyValue)>) -> Result<Ran> {
        let kind: &dyn Kind = &Attention;
        let scratch = Scratch::new();
        let (outputs, log) = scratch.run(kind, config, inputs)?;
        let folders = ["table", "figures"].map(|port| output::<Folder>(&outputs, port).path().to_owned());
        let files = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap());
        let files = files
            .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read_to_string(entry.path()).unwrap()));
        Ok((output::<Metrics>(&outputs, "metrics").0.clone(), files.collect(), log))
    }

    /// Lines of a table by the name of their columns.
    fn lines(table: &str) -> Vec<BTreeMap<String, Option<f64>>> {
        let mut lines = table.lines();
        let names: Vec<&str> = lines.next().unwrap().split(',').collect();
        let line =
            |line: &str| names.iter().zip(line.split(',')).map(|(n, v)| (n.to_string(), v.parse().ok())).collect();
        lines.map(line).collect()
    }

    fn inputs(model: &Arc<LanguageModel>, rows: Vec<Row>) -> Vec<(&'static str, AnyValue)> {
        vec![("model", model.clone()), ("data", Arc::new(Dataset { rows, tokenizer: model.tokenizer.clone() }))]
    }

    #[test]
    fn attention_is_that_of_transformers_and_its_measures_those_of_numpy() {
        let expected = json_of("attention/expected.json");
        let tensors = candle_core::safetensors::load(fixture("attention/expected.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(tensors.len(), 14);
        for (name, tensor) in &tensors {
            let (model, row) = (load(name), first_row(name));
            let ids = [row.prompt.as_slice(), &row.response].concat();
            let found = Tensor::stack(&model.attention(&ids, None).unwrap(), 0).unwrap();
            assert_eq!(found.dims(), tensor.dims(), "{name}");
            let gap = (found - tensor).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(gap.to_scalar::<f32>().unwrap() < 1e-5, "{name}: {gap}");
            for (pairs, density) in [("seen", "density"), ("all", "density_of_all")] {
                let config = json!({"reads": "row", "density_of": pairs});
                let (metrics, files, _) = run(config, inputs(&model, vec![row.clone()])).unwrap();
                let heads = lines(&files["heads.csv"]);
                let count = tensor.dims()[1];
                assert_eq!(heads.len(), count * tensor.dims()[0]);
                for (index, line) in heads.iter().enumerate() {
                    let (layer, head) = (index / count, index % count);
                    assert_eq!((line["layer"], line["head"]), (Some(layer as f64), Some(head as f64)));
                    for (column, key) in [("entropy", "entropy"), ("self_focus", "self_focus"), ("density", density)] {
                        let right = expected[name][key][layer][head].as_f64().unwrap();
                        let found = line[column].unwrap();
                        assert!(
                            (found - right).abs() < 1e-5,
                            "{name}, {column} of {layer}.{head}: {found}, expected {right}"
                        );
                    }
                    let right =
                        layer.checked_sub(1).and_then(|layer| expected[name]["similarity"][layer][head].as_f64());
                    let gap = line["similarity"].zip(right).map(|(found, right)| (found - right).abs());
                    assert_eq!(line["similarity"].is_some(), right.is_some(), "{name}");
                    assert!(gap.is_none_or(|gap| gap < 1e-5), "{name}, similarity of {layer}.{head}");
                }
                let whole = heads.iter().map(|line| line["entropy"].unwrap()).sum::<f64>() / heads.len() as f64;
                assert!((metrics["entropy"]["mean"].as_f64().unwrap() - whole).abs() < 1e-6);
                assert_eq!(lines(&files["layers.csv"]).len(), tensor.dims()[0]);
            }
        }
    }

    #[test]
    fn the_distance_of_two_models_is_that_of_numpy_and_the_farthest_heads_come_first() {
        let expected = &json_of("attention/expected.json")["mixed"];
        let [model, before] = ["families/qwen2", "families/qwen2-tied"].map(load);
        let mut all = inputs(&model, vec![first_row("families/qwen2")]);
        all.push(("before", before));
        let (metrics, files, _) = run(json!({"reads": "row"}), all).unwrap();
        let heads = lines(&files["heads.csv"]);
        for (index, line) in heads.iter().enumerate() {
            for column in ["divergence", "variance"] {
                let (found, right) = (line[column].unwrap(), expected[column][index / 4][index % 4].as_f64().unwrap());
                assert!((found - right).abs() < 1e-5, "{column} of head {index}: {found}, expected {right}");
            }
        }
        let mut largest: Vec<f64> = heads.iter().map(|line| line["divergence"].unwrap()).collect();
        largest.sort_by(|a, b| b.total_cmp(a));
        let listed: Vec<f64> = lines(&files["divergent.csv"]).iter().map(|line| line["divergence"].unwrap()).collect();
        assert_eq!(listed, largest);
        // The two that differ most, in both models, each row of them a distribution over what is seen.
        let maps: Vec<Json> = files["maps.jsonl"].lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            maps.iter().map(|map| map["model"].as_str().unwrap()).collect::<Vec<_>>(),
            ["model", "before"].repeat(2)
        );
        for map in &maps {
            let matrix: Vec<Vec<f64>> = serde_json::from_value(map["attention"].clone()).unwrap();
            assert_eq!((matrix.len(), map["tokens"].as_array().unwrap().len()), (11, 11));
            for (query, row) in matrix.iter().enumerate() {
                assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-5 && row[query + 1..].iter().all(|p| *p == 0.0));
            }
        }
        let drawn: Vec<&str> = files.keys().filter_map(|name| name.strip_suffix(".svg")).collect();
        assert_eq!(drawn.len(), 5 + 1 + 4, "{drawn:?}");
        assert!(files["divergence-by-head.svg"].contains("Jensen-Shannon divergence in nats is highest, "));
        // Below the diagonal a place for each pair, above it none.
        let map = files.iter().find(|(name, _)| name.starts_with("map-")).unwrap().1;
        assert_eq!(map.matches("<g class=\"cell\">").count(), 11 * 12 / 2);
        assert!(metrics["entropy_before"]["mean"].is_number() && metrics["divergence"]["mean"].as_f64().unwrap() > 0.0);
    }

    /// A tiny model, and rows of different lengths.
    fn small() -> (Arc<LanguageModel>, Vec<Row>) {
        let shape = Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(Family::Gpt2, 2, 16) };
        let model = LanguageModel::init(&shape, TokenizerFile::new("", 0, 40), 1, &Device::Cpu).unwrap();
        let rows = (0..12u32).map(|id| row(id.into(), &(1..=3 + id).collect::<Vec<u32>>(), &[1]));
        (Arc::new(model), rows.collect())
    }

    #[test]
    fn what_goes_with_accuracy_is_found_and_what_cannot_is_not_measured() {
        let (model, rows) = small();
        let predictions = |right: &dyn Fn(u64) -> bool| -> AnyValue {
            let row = |id| json!({"id": id, "seed": 10, "text": "", "correct": right(id)}).as_object().unwrap().clone();
            Arc::new(Predictions((0..12).map(row).collect()))
        };
        // The heads of a model that knows nothing spread over all there is: entropy grows with the length.
        let mut with = inputs(&model, rows.clone());
        with.push(("predictions", predictions(&|id| id >= 6)));
        let (metrics, files, _) = run(json!({}), with).unwrap();
        let correlation = &metrics["entropy_correlation"];
        assert!(correlation["mean"].as_f64().unwrap() > 0.7 && correlation["interval"][0].as_f64().unwrap() > 0.5);
        assert_eq!(metrics["entropy_correlated"], 100.0);
        let table = lines(&files["accuracy.csv"]);
        // All heads and each, of four measures; those of the first layer have no similarity.
        assert_eq!(table.len(), 4 * 5);
        assert_eq!(table.iter().filter(|line| line["correlation"].is_none()).count(), 2);

        let mut with = inputs(&model, rows.clone());
        with.push(("predictions", predictions(&|_| false)));
        let (metrics, ..) = run(json!({}), with).unwrap();
        assert!(metrics["entropy_correlation"]["mean"].is_null() && metrics["entropy_correlated"].is_null());

        let mut with = inputs(&model, rows);
        with.push(("predictions", Arc::new(Predictions(Vec::new()))));
        let error = run(json!({}), with).err().unwrap().to_string();
        assert!(error.contains("row 1 of `train` is right: give `evaluate`"), "{error}");
    }

    #[test]
    fn a_soft_prompt_is_attended_to_and_heads_that_are_not_there_are_named() {
        let (model, rows) = small();
        let vectors = model.embedding().unwrap().narrow(0, 3, 2).unwrap().contiguous().unwrap();
        let prompt: AnyValue = Arc::new(SoftPrompt::new(vectors, &model).unwrap());
        let mut with = inputs(&model, rows[..1].to_vec());
        with.push(("prompt", prompt));
        let (_, files, _) = run(json!({"maps": [{"layer": 1, "head": 0}]}), with).unwrap();
        let map: Json = serde_json::from_str(&files["maps.jsonl"]).unwrap();
        assert_eq!(map["tokens"], json!(["[prompt 1]", "[prompt 2]", "1", "2", "3"]));
        assert_eq!(map["attention"].as_array().unwrap().len(), 5);
        let error = run(json!({"maps": [{"layer": 2, "head": 0}]}), inputs(&model, rows)).err().unwrap().to_string();
        assert!(error.contains("head 0 of layer 2: there are 2 layers of 2 heads"), "{error}");
    }
}
