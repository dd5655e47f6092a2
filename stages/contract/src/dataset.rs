//! Datasets: rows of prompt and response ids, with the tokenizer that made them.

use std::any::Any;
use std::borrow::Cow;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::Result;
use crate::facts::{Bounds, Facts, Longest};
use crate::port::PortType;
use crate::tokenizer::TokenizerFile;
use crate::value::{Value, write};

/// The splits of a corpus, in the order of their row ids.
pub const SPLITS: [&str; 3] = ["train", "valid", "test"];

/// The first row id of each split is this far from that of the split before: far enough for any corpus, and all ids stay
/// below 2^32.
pub const SPLIT_ROWS: u64 = 1 << 30;

/// Ids of several answers to one prompt are so far apart; the first has that of the row itself.
pub const ANSWERS: u64 = 1 << 32;

/// A row as people know it: `row 7 of `train``, counted from 1.
pub fn row_name(id: u64) -> String {
    let (answer, id) = (id / ANSWERS, id % ANSWERS);
    if answer > 0 {
        return format!("answer {} to {}", answer + 1, row_name(id));
    }
    match SPLITS.get((id / SPLIT_ROWS) as usize) {
        Some(split) => format!("row {} of `{split}`", id % SPLIT_ROWS + 1),
        None => format!("row {id}"),
    }
}

/// How a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// With the end token, which is the last id of the response.
    Stop,
    /// Cut off by a limit on length: the response has no end token.
    Length,
}

/// One example.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Names the row for life: random draws, teacher caches and predictions refer to it.
    pub id: u64,
    /// Ids of the prompt, without padding.
    pub prompt: Vec<u32>,
    /// Ids of the response, with the end token where [`End::Stop`].
    pub response: Vec<u32>,
    /// How the response ended.
    pub end: End,
    /// Log-probability of each response id under the model that wrote it, where one did.
    pub log_probs: Option<Vec<f32>>,
    /// Right answers as text, for scoring; empty where there are none.
    pub references: Vec<String>,
    /// Kind of task, where `tokenize` keeps what the corpus says of it.
    pub family: Option<String>,
}

impl Row {
    /// The response without the token that ended it.
    pub fn answer(&self) -> &[u32] {
        answer(&self.response, self.end)
    }
}

/// A response without the token that ended it.
pub fn answer(response: &[u32], end: End) -> &[u32] {
    match (end, response.split_last()) {
        (End::Stop, Some((_, said))) => said,
        _ => response,
    }
}

/// Rows with their tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// The examples, in order. Shared, so that a window of a dataset copies its rows only.
    pub rows: Vec<Row>,
    /// What gives the ids their meaning.
    pub tokenizer: TokenizerFile,
}

impl Dataset {
    /// The rows at `indices`, in that order.
    pub fn select(&self, indices: &[usize]) -> Dataset {
        Dataset { rows: indices.iter().map(|&i| self.rows[i].clone()).collect(), tokenizer: self.tokenizer.clone() }
    }

    /// Reads what [`Value::save`] wrote.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("dataset.safetensors");
        let bytes = read(&path)?;
        let tensors =
            SafeTensors::deserialize(&bytes).with_context(|| format!("`{}` is not a dataset", path.display()))?;
        let references_path = folder.join("references.json");
        let references: Vec<Vec<String>> = serde_json::from_slice(&read(&references_path)?)
            .with_context(|| format!("cannot parse `{}`", references_path.display()))?;
        let ids = words::<8, u64>(&tensors, "id", u64::from_le_bytes)?;
        let prompts = words::<4, u32>(&tensors, "prompt", u32::from_le_bytes)?;
        let prompt_lengths = words::<4, u32>(&tensors, "prompt_length", u32::from_le_bytes)?;
        let responses = words::<4, u32>(&tensors, "response", u32::from_le_bytes)?;
        let response_lengths = words::<4, u32>(&tensors, "response_length", u32::from_le_bytes)?;
        let ends = words::<1, u8>(&tensors, "end", u8::from_le_bytes)?;
        let written = words::<1, u8>(&tensors, "has_log_probs", u8::from_le_bytes)?;
        let log_probs = words::<4, f32>(&tensors, "log_prob", f32::from_le_bytes)?;
        let count = ids.len();
        let families = families(folder)?.unwrap_or_else(|| vec![None; count]);
        let (texts, others) = ([prompt_lengths.len(), response_lengths.len()], [references.len(), families.len()]);
        let mut per_row = texts.into_iter().chain([ends.len(), written.len()]).chain(others);
        ensure!(per_row.all(|n| n == count), "`{}` holds columns of different length", path.display());

        let (mut prompts, mut responses, mut log_probs) =
            (prompts.as_slice(), responses.as_slice(), log_probs.as_slice());
        let mut rows = Vec::with_capacity(count);
        for (i, (references, family)) in references.into_iter().zip(families).enumerate() {
            let response = split(&mut responses, response_lengths[i], &path)?;
            let log_probs =
                if written[i] == 1 { Some(split(&mut log_probs, response.len() as u32, &path)?) } else { None };
            rows.push(Row {
                id: ids[i],
                prompt: split(&mut prompts, prompt_lengths[i], &path)?,
                response,
                end: if ends[i] == 1 { End::Stop } else { End::Length },
                log_probs,
                references,
                family,
            });
        }
        Ok(Dataset { rows, tokenizer: TokenizerFile::load(folder)? })
    }
}

impl Value for Dataset {
    fn port_type(&self) -> PortType {
        PortType::Dataset
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let rows = &self.rows;
        let column = |name, dtype, bytes: Vec<u8>, width: usize| (name, dtype, vec![bytes.len() / width], bytes);
        let columns = [
            column("id", Dtype::U64, rows.iter().flat_map(|r| r.id.to_le_bytes()).collect(), 8),
            column(
                "prompt",
                Dtype::U32,
                rows.iter().flat_map(|r| &r.prompt).flat_map(|t| t.to_le_bytes()).collect(),
                4,
            ),
            column(
                "prompt_length",
                Dtype::U32,
                rows.iter().flat_map(|r| (r.prompt.len() as u32).to_le_bytes()).collect(),
                4,
            ),
            column(
                "response",
                Dtype::U32,
                rows.iter().flat_map(|r| &r.response).flat_map(|t| t.to_le_bytes()).collect(),
                4,
            ),
            column(
                "response_length",
                Dtype::U32,
                rows.iter().flat_map(|r| (r.response.len() as u32).to_le_bytes()).collect(),
                4,
            ),
            column("end", Dtype::U8, rows.iter().map(|r| u8::from(r.end == End::Stop)).collect(), 1),
            column("has_log_probs", Dtype::U8, rows.iter().map(|r| u8::from(r.log_probs.is_some())).collect(), 1),
            column(
                "log_prob",
                Dtype::F32,
                rows.iter().filter_map(|r| r.log_probs.as_ref()).flatten().flat_map(|x| x.to_le_bytes()).collect(),
                4,
            ),
        ];
        let views = columns
            .iter()
            .map(|(name, dtype, shape, bytes)| Ok((*name, TensorView::new(*dtype, shape.clone(), bytes)?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        write(&folder.join("dataset.safetensors"), &safetensors::serialize(views, None)?)?;
        let references: Vec<&Vec<String>> = rows.iter().map(|r| &r.references).collect();
        write(&folder.join("references.json"), &serde_json::to_vec(&references)?)?;
        // Only where one has one: a dataset without is what it always was.
        if rows.iter().any(|row| row.family.is_some()) {
            let families: Vec<_> = rows.iter().map(|row| &row.family).collect();
            write(&folder.join(FAMILIES), &serde_json::to_vec(&families)?)?;
        }
        self.tokenizer.save(folder)
    }

    fn facts(&self) -> Facts {
        Facts {
            vocabulary: Some(self.tokenizer.vocabulary()),
            ends: Some(vec![self.tokenizer.end]),
            rows: vec![Bounds::exactly(self.rows.len() as u64)],
            prompt: Longest::of(self.rows.iter().map(|row| (row.id, row.prompt.len()))),
            text: Longest::of(self.rows.iter().map(|row| (row.id, row.prompt.len() + row.response.len()))),
            responses: Bounds::exactly(self.rows.iter().map(|row| row.response.len() as u64).sum()),
            ..Facts::default()
        }
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))
}

const FAMILIES: &str = "families.json";

fn families(folder: &Path) -> Result<Option<Vec<Option<String>>>> {
    let path = folder.join(FAMILIES);
    if !path.exists() {
        return Ok(None);
    }
    let families = serde_json::from_slice(&read(&path)?);
    Ok(Some(families.with_context(|| format!("cannot parse `{}`", path.display()))?))
}

fn words<const N: usize, T>(tensors: &SafeTensors<'_>, name: &str, parse: fn([u8; N]) -> T) -> Result<Vec<T>> {
    let tensor = tensors.tensor(name).with_context(|| format!("dataset without column `{name}`"))?;
    let bytes: Cow<'_, [u8]> = Cow::Borrowed(tensor.data());
    ensure!(bytes.len().is_multiple_of(N), "column `{name}` has a broken length");
    Ok(bytes.chunks_exact(N).map(|c| parse(c.try_into().expect("chunks are of size N"))).collect())
}

fn split<T: Clone>(rest: &mut &[T], length: u32, path: &Path) -> Result<Vec<T>> {
    ensure!(rest.len() >= length as usize, "`{}` ends inside a row", path.display());
    let (head, tail) = rest.split_at(length as usize);
    *rest = tail;
    Ok(head.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_dataset_loads_equal() {
        let tokenizer = TokenizerFile::new("{}", 3, 9);
        let row = |id, response: Vec<u32>, end, log_probs: Option<Vec<f32>>| Row {
            id,
            prompt: vec![1, 2, id as u32],
            response,
            end,
            log_probs,
            references: vec!["a".into(), "ü".into()],
            family: None,
        };
        let rows = vec![
            row(7, vec![4, 3], End::Stop, Some(vec![-0.1, f32::MIN_POSITIVE])),
            row(9, vec![], End::Length, None),
            row(u64::MAX, vec![5], End::Length, None),
        ];
        let dataset = Dataset { rows, tokenizer };
        let folder = tempfile::tempdir().unwrap();
        dataset.save(folder.path()).unwrap();
        assert_eq!(Dataset::load(folder.path()).unwrap(), dataset);
        assert!(!folder.path().join(FAMILIES).exists());
        let mut dataset = dataset;
        dataset.rows[1].family = Some("maths".into());
        dataset.save(folder.path()).unwrap();
        assert_eq!(Dataset::load(folder.path()).unwrap(), dataset);
    }
}
