//! Text before it is tokenised, in one normal form: `train.jsonl`, `valid.jsonl` and `test.jsonl`, a JSON object a line.
//!
//! `download` writes it whatever the source looked like; `train-tokenizer` and `tokenize` read it. Row ids are unique
//! over all splits and fit in 32 bits, so that every random draw about a row is a draw of its own.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use contract::dataset::SPLIT_ROWS;
use serde::{Deserialize, Serialize};

/// Part of a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Split {
    /// What models and tokenizers learn from.
    Train,
    /// What decides which round is kept.
    Valid,
    /// What results are reported on.
    Test,
}

impl Split {
    /// All splits, in the order of their ids.
    pub const ALL: [Split; 3] = [Split::Train, Split::Valid, Split::Test];

    /// Name in file names and ports.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Valid => "valid",
            Split::Test => "test",
        }
    }

    /// Most rows of a split.
    pub const MOST_ROWS: usize = SPLIT_ROWS as usize;

    /// Id of the row at `index` of this split. The splits are 2^30 apart: far enough for any corpus, and below 2^32.
    pub fn row_id(self, index: usize) -> u64 {
        self as u64 * SPLIT_ROWS + index as u64
    }
}

/// What one side of a conversation says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turn {
    /// Who: `system`, `user`, `assistant` or what else a chat template knows.
    pub role: String,
    /// What.
    pub content: String,
}

/// One example, or a document: a text that answers nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusRow {
    /// Unique over the splits.
    pub id: u64,
    /// What is asked. May be empty where the row has a ready `prompt`.
    pub instruction: String,
    /// Further context of the instruction; mostly empty.
    pub input: String,
    /// The whole prompt, where the source came with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// The conversation before the answer, where it is more than the instruction, which is the last thing that the user says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<Turn>,
    /// The answer to learn, or the document.
    pub output: String,
    /// All right answers, `output` among them; of a document none.
    pub references: Vec<String>,
    /// Kind of task, where the source names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
}

impl CorpusRow {
    /// A text that answers nothing.
    pub fn document(text: String) -> Self {
        CorpusRow { output: text, ..CorpusRow::default() }
    }

    /// Whether it is one.
    pub fn is_document(&self) -> bool {
        let asks = [&self.instruction, &self.input, self.prompt.as_ref().unwrap_or(&self.input)];
        asks.iter().all(|text| text.is_empty()) && self.turns.is_empty() && self.references.is_empty()
    }
}

/// Writes one split into the folder of a corpus.
pub fn write(folder: &Path, split: Split, rows: &[CorpusRow]) -> Result<()> {
    let mut text = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut text, row)?;
        text.push(b'\n');
    }
    contract::value::write(&folder.join(format!("{}.jsonl", split.name())), &text)
}

/// Reads one split of a corpus.
pub fn read(folder: &Path, split: Split) -> Result<Vec<CorpusRow>> {
    let path = folder.join(format!("{}.jsonl", split.name()));
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut rows = Vec::new();
    let mut ids = HashSet::new();
    for (index, line) in text.lines().enumerate() {
        let place = || format!("{}:{}", path.display(), index + 1);
        let row: CorpusRow =
            serde_json::from_str(line).with_context(|| format!("`{}` is not a row of a corpus", place()))?;
        ensure!(ids.insert(row.id), "`{}` repeats the row id {}", place(), row.id);
        rows.push(row);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u64) -> CorpusRow {
        CorpusRow {
            id,
            instruction: "Say \"ü\"\nplease.".into(),
            input: String::new(),
            prompt: None,
            turns: Vec::new(),
            output: "ü".into(),
            references: vec!["ü".into(), "u".into()],
            family: Some("say".into()),
        }
    }

    #[test]
    fn rows_read_back_equal() {
        let folder = tempfile::tempdir().unwrap();
        let turns = vec![Turn { role: "user".into(), content: "Hi.".into() }];
        let rows = vec![row(0), CorpusRow { prompt: Some("p".into()), family: None, turns, ..row(1) }];
        write(folder.path(), Split::Valid, &rows).unwrap();
        assert_eq!(read(folder.path(), Split::Valid).unwrap(), rows);
    }

    #[test]
    fn a_repeated_id_is_named_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), Split::Train, &[row(0), row(7), row(7)]).unwrap();
        let error = read(folder.path(), Split::Train).unwrap_err().to_string();
        assert!(error.contains("train.jsonl:3") && error.contains("row id 7"), "{error}");
    }

    #[test]
    fn ids_of_the_splits_never_meet_and_fit_in_32_bits() {
        assert_eq!(Split::Valid.row_id(3), (1 << 30) + 3);
        assert!(Split::Test.row_id((1 << 30) - 1) <= u64::from(u32::MAX));
    }
}
