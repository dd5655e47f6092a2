//! What models said to the same prompts, side by side: the best variant, the baseline, and the further rows of the report, such as
//! the first student and the teacher.

use std::collections::BTreeMap;

use anyhow::Result;
use cache::Store;
use contract::dataset::row_name;
use contract::random::philox;
use contract::{Dataset, PortType, TokenizerFile};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;
use serde_json::{Map, Value as Json};

use crate::graph::{Entry, Graph};
use crate::plan::Settled;
use crate::report::comparison::{Comparison, predictions, score_of};

/// One prompt with all that was said to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exchange {
    /// Name of the row.
    pub row: String,
    /// Why it is shown.
    pub why: &'static str,
    /// What the models were asked, with the template around it.
    pub prompt: Option<String>,
    /// Right answers.
    pub references: Vec<String>,
    pub said: Vec<Said>,
}

/// One answer.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub who: String,
    pub text: String,
    pub score: Option<f64>,
    /// Key of the stage that has scored it.
    pub key: String,
}

/// How many rows are shown of each sort.
const BEST: usize = 2;
const WORST: usize = 2;
const RANDOM: usize = 4;

/// Turns ids into text.
pub(crate) type Decode = fn(&TokenizerFile, &[&[u32]]) -> Result<Vec<String>>;

/// Answers to some rows: those that the best variant answers best and worst, and some that are drawn blindly.
pub(crate) fn exchanges(
    comparison: &Comparison,
    graph: &Graph,
    settled: &BTreeMap<NodeIndex, Settled>,
    store: &Store,
    decode: Decode,
) -> Result<Vec<Exchange>> {
    let Some(best) = comparison.best() else { return Ok(Vec::new()) };
    let baseline = comparison.differences.iter().find(|difference| difference.line == best).map(|it| it.baseline);
    let further = (0..comparison.lines.len()).filter(|line| comparison.lines[*line].variant.is_none());
    let mut speakers = Vec::new();
    for line in [best].into_iter().chain(baseline).chain(further) {
        speakers.extend(Speaker::of(line, comparison, graph, settled, store)?);
    }
    let Some(first) = speakers.first().filter(|speaker| speaker.line == best) else { return Ok(Vec::new()) };
    let better = comparison.measures[0].better;
    let mut ranked: Vec<(u64, f64)> = first.means().into_iter().map(|(id, score)| (id, better.score(score))).collect();
    // Equal scores in an order that says nothing, so that the first rows of the data are not preferred.
    let blind = |id: u64| philox(0, [id as u32, (id >> 32) as u32, 0, 0]);
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| blind(a.0).cmp(&blind(b.0))));
    let mut chosen: Vec<(u64, &'static str)> = Vec::new();
    chosen.extend(ranked.iter().take(BEST).map(|(id, _)| (*id, "among the best")));
    let rest = ranked.len().saturating_sub(BEST);
    chosen.extend(ranked.iter().rev().take(WORST.min(rest)).map(|(id, _)| (*id, "among the worst")));
    let mut others: Vec<u64> =
        ranked.iter().map(|(id, _)| *id).filter(|id| chosen.iter().all(|(other, _)| other != id)).collect();
    others.sort_by_key(|id| blind(*id));
    chosen.extend(others.into_iter().take(RANDOM).map(|id| (id, "drawn blindly")));

    let mut exchanges: Vec<Exchange> = chosen
        .iter()
        .map(|(id, why)| {
            let said = speakers.iter().filter_map(|speaker| speaker.said(*id)).collect();
            Exchange { row: row_name(*id), why, said, ..Exchange::default() }
        })
        .collect();
    if let Some(artifact) = data_of(graph, first.node, settled) {
        let data = Dataset::load(&store.open_artifact(artifact)?)?;
        for (exchange, (id, _)) in exchanges.iter_mut().zip(&chosen) {
            let Some(row) = data.rows.iter().find(|row| row.id == *id) else { continue };
            exchange.prompt = decode(&data.tokenizer, &[&row.prompt])?.pop();
            exchange.references = row.references.clone();
        }
    }
    Ok(exchanges)
}

/// A model whose answers are there.
struct Speaker {
    line: usize,
    who: String,
    node: NodeIndex,
    key: String,
    /// The metric that its answers are scored by.
    metric: String,
    answers: Vec<Map<String, Json>>,
}

impl Speaker {
    /// Of a line of a comparison, in its first repeat.
    fn of(
        line: usize,
        comparison: &Comparison,
        graph: &Graph,
        settled: &BTreeMap<NodeIndex, Settled>,
        store: &Store,
    ) -> Result<Option<Speaker>> {
        let shown = &comparison.lines[line];
        let Some(repeat) = shown.figures.first().and_then(|entry| entry.figure()?.repeats.first()) else {
            return Ok(None);
        };
        let cell = graph.cells.iter().find(|cell| cell.label == repeat.cell);
        let Some(node) = cell.and_then(|cell| cell.names.get(&repeat.stage)).copied() else { return Ok(None) };
        let Some(settled) = settled.get(&node) else { return Ok(None) };
        let answers = predictions(settled, store)?;
        if answers.is_empty() {
            return Ok(None);
        }
        let seed: Vec<String> = repeat.settings.iter().map(|(path, value)| format!("{path} {value}")).collect();
        let who = match seed.is_empty() || shown.variant.is_none() {
            true => shown.label.clone(),
            false => format!("{} ({})", shown.label, seed.join(", ")),
        };
        let metric = comparison.measures[0].metric.as_deref().and_then(|metric| metric.split_once('.'));
        let metric = metric.map_or_else(String::new, |(_, metric)| metric.to_owned());
        Ok(Some(Speaker { line, who, node, key: settled.action.key.to_string(), metric, answers }))
    }

    fn id(answer: &Map<String, Json>) -> Option<u64> {
        answer.get("id")?.as_u64()
    }

    /// The mean score of each row over its samples.
    fn means(&self) -> BTreeMap<u64, f64> {
        let mut sums: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
        for answer in &self.answers {
            if let (Some(id), Some(score)) = (Self::id(answer), score_of(answer, &self.metric)) {
                let (sum, count) = sums.entry(id).or_default();
                (*sum, *count) = (*sum + score, *count + 1.0);
            }
        }
        sums.into_iter().map(|(id, (sum, count))| (id, sum / count)).collect()
    }

    /// Its first sample for a row.
    fn said(&self, id: u64) -> Option<Said> {
        let answer = self.answers.iter().find(|answer| Self::id(answer) == Some(id))?;
        let text = answer.get("text")?.as_str()?.to_owned();
        Some(Said { who: self.who.clone(), text, score: score_of(answer, &self.metric), key: self.key.clone() })
    }
}

/// The dataset that a stage reads its prompts from.
fn data_of<'s>(
    graph: &Graph,
    node: NodeIndex,
    settled: &'s BTreeMap<NodeIndex, Settled>,
) -> Option<&'s cache::Artifact> {
    let mut edges = graph.subgraphs.edges_directed(node, Direction::Incoming);
    let is_data = |input: &Entry| *input == Entry::Port("data".into());
    let edge = edges.find(|edge| edge.weight().port_type == PortType::Dataset && is_data(&edge.weight().input))?;
    settled.get(&edge.source())?.artifact(&edge.weight().output)
}
