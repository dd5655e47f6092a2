//! Facts: what is known of a value, often long before the value itself is at hand.
//!
//! They flow along the edges of a graph. A kind says what follows for its outputs from its configuration and the facts of
//! its inputs ([`crate::Stage::foresee`]); a value at hand says what it is ([`crate::Value::facts`]). Whatever is not known
//! is left open, and what is decided from it is decided later.

use serde::{Deserialize, Serialize};

use crate::tokenizer::TokenizerFile;

/// A whole number between two bounds, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// It is not smaller.
    pub least: u64,
    /// It is not larger; [`u64::MAX`] where there is no bound.
    pub most: u64,
}

impl Bounds {
    /// Nothing is known.
    pub const ANY: Bounds = Bounds { least: 0, most: u64::MAX };

    /// Known.
    pub const fn exactly(number: u64) -> Self {
        Bounds { least: number, most: number }
    }

    /// Known from above.
    pub const fn at_most(most: u64) -> Self {
        Bounds { least: 0, most }
    }

    /// The number, where it is known.
    pub fn exact(self) -> Option<u64> {
        (self.least == self.most).then_some(self.least)
    }

    /// Bounds of the smaller of this number and `other`.
    pub fn min(self, other: u64) -> Self {
        Bounds { least: self.least.min(other), most: self.most.min(other) }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds::ANY
    }
}

/// How long the longest of some rows is, in tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Longest {
    /// No row is longer, where that is known.
    pub most: Option<u64>,
    /// Rows that are longer than all before them, in order; of very many the last. Empty where no row is known.
    peaks: Vec<Peak>,
}

/// A row that is longer than all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peak {
    /// Its place among the rows, from 0.
    pub place: u64,
    /// Its id.
    pub row: u64,
    /// Its length in tokens.
    pub tokens: u64,
}

impl Longest {
    /// Rows sorted by length would all be peaks: the longest are enough.
    const PEAKS: usize = 64;

    /// Of rows at hand: their ids and lengths in order.
    pub fn of(rows: impl IntoIterator<Item = (u64, usize)>) -> Self {
        let mut peaks: Vec<Peak> = Vec::new();
        for (place, (row, tokens)) in rows.into_iter().enumerate() {
            if peaks.last().is_none_or(|longest| longest.tokens < tokens as u64) {
                peaks.push(Peak { place: place as u64, row, tokens: tokens as u64 });
            }
        }
        let most = peaks.last().map_or(0, |longest| longest.tokens);
        peaks.drain(..peaks.len().saturating_sub(Self::PEAKS));
        Longest { most: Some(most), peaks }
    }

    /// Of rows that are not at hand.
    pub fn at_most(most: Option<u64>) -> Self {
        Longest { most, peaks: Vec::new() }
    }

    /// The longest row that is known to be there.
    pub fn peak(&self) -> Option<Peak> {
        self.peaks.last().copied()
    }

    /// The same of the first `rows` rows alone.
    pub fn of_first(&self, rows: u64) -> Self {
        let peaks: Vec<Peak> = self.peaks.iter().copied().take_while(|peak| peak.place < rows).collect();
        Longest { most: self.most, peaks }
    }

    /// The same where every row is cut to `tokens`.
    pub fn cut_to(&self, tokens: u64) -> Self {
        let cut = |peak: &Peak| Peak { tokens: peak.tokens.min(tokens), ..*peak };
        Longest {
            most: Some(self.most.map_or(tokens, |most| most.min(tokens))),
            peaks: self.peaks.iter().map(cut).collect(),
        }
    }

    /// Nothing but the bound.
    pub fn bound(&self) -> Self {
        Longest::at_most(self.most)
    }
}

/// What gives ids their meaning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vocabulary {
    /// How many ids it has.
    pub size: Bounds,
    /// The same for two tokenizers that give the same ids the same meaning, else another; `None` where it is not known.
    pub meaning: Option<String>,
    /// The tokenizer itself, where it is at hand: for telling what differs.
    #[serde(skip)]
    pub file: Option<TokenizerFile>,
}

/// What is known of a value. A field that says nothing of the value's type stays open.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Of a tokenizer, and of what carries one.
    #[serde(skip_serializing_if = "is_open")]
    pub vocabulary: Option<Vocabulary>,
    /// Ids that end a text: of a dataset the one that its rows end with, of a model all that it stops at.
    #[serde(skip_serializing_if = "is_open")]
    pub ends: Option<Vec<u32>>,
    /// Rows of a dataset; of a corpus those of `train`, `valid` and `test`.
    #[serde(skip_serializing_if = "is_open")]
    pub rows: Vec<Bounds>,
    /// Longest prompt of a dataset.
    #[serde(skip_serializing_if = "is_open")]
    pub prompt: Longest,
    /// Longest prompt with its response.
    #[serde(skip_serializing_if = "is_open")]
    pub text: Longest,
    /// Response tokens of a dataset, all rows together.
    #[serde(skip_serializing_if = "is_open")]
    pub responses: Bounds,
    /// Positions of a model: its longest sequence, soft prompt included.
    #[serde(skip_serializing_if = "is_open")]
    pub positions: Option<u64>,
    /// Family of a model, by its name in pipelines.
    #[serde(skip_serializing_if = "is_open")]
    pub family: Option<String>,
    /// Blocks of a model.
    #[serde(skip_serializing_if = "is_open")]
    pub layers: Option<u64>,
    /// Channels of a model's hidden state, or of a soft prompt's vectors.
    #[serde(skip_serializing_if = "is_open")]
    pub width: Option<u64>,
    /// Vectors of a soft prompt.
    #[serde(skip_serializing_if = "is_open")]
    pub vectors: Option<u64>,
    /// Rows of a model's embedding; may be more than its tokenizer has ids.
    #[serde(skip_serializing_if = "is_open")]
    pub embeddings: Bounds,
    /// Parameters of a model.
    #[serde(skip_serializing_if = "is_open")]
    pub parameters: Bounds,
}

fn is_open<T: Default + PartialEq>(fact: &T) -> bool {
    *fact == T::default()
}

impl Facts {
    /// The rows of a dataset.
    pub fn row_count(&self) -> Bounds {
        self.rows.first().copied().unwrap_or_default()
    }
}
