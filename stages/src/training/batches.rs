//! An effective batch and its micro-batches.

use anyhow::ensure;
use contract::{Conventions, Dataset, Result, Row};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aligned::Aligned;

/// How the loss of an effective batch is averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mean {
    /// Over all tokens of the effective batch, however it is split.
    Tokens,
    /// Of the micro-batches' token means, as in the published programs.
    MicroBatches,
}

impl Mean {
    /// The default under the conventions.
    pub fn of(conventions: Conventions) -> Self {
        match conventions {
            Conventions::Sound => Mean::Tokens,
            Conventions::Reference => Mean::MicroBatches,
        }
    }
}

/// Some rows of an effective batch, which go through the models at once.
pub struct MicroBatch {
    /// The text.
    pub text: Aligned,
    /// What each of its tokens counts in the loss of the effective batch.
    pub token_weight: f32,
    /// True for the last one that has tokens.
    pub last: bool,
    /// How many micro-batches the effective batch has.
    pub of: usize,
    /// Response tokens of the effective batch.
    pub tokens_of_batch: usize,
}

impl MicroBatch {
    /// The weight of every token, for a loss.
    pub fn weights(&self) -> Vec<f32> {
        vec![self.token_weight; self.text.tokens()]
    }
}

/// Splits an effective batch. Fails when no row has a response token, since there is nothing to learn from.
pub(super) fn micro_batches(data: &Dataset, micro_batch: Option<u64>, mean: Mean) -> Result<Vec<MicroBatch>> {
    let size = micro_batch.map_or(data.rows.len(), |n| n as usize).max(1);
    let texts: Vec<Aligned> = data.rows.chunks(size).map(Aligned::of).filter(|text| text.tokens() > 0).collect();
    let tokens: usize = texts.iter().map(Aligned::tokens).sum();
    ensure!(tokens > 0, "none of the {} rows of this batch has a response token", data.rows.len());
    let count = texts.len();
    let batches = texts.into_iter().enumerate().map(|(index, text)| {
        let share = match mean {
            Mean::Tokens => tokens,
            Mean::MicroBatches => text.tokens() * count,
        };
        let token_weight = 1.0 / share as f32;
        MicroBatch { token_weight, last: index + 1 == count, of: count, tokens_of_batch: tokens, text }
    });
    Ok(batches.collect())
}

/// A row by itself; `None` where it has no response token.
pub(super) fn single(row: &Row) -> Option<MicroBatch> {
    let text = Aligned::of([row]);
    let tokens = text.tokens();
    (tokens > 0).then(|| MicroBatch {
        text,
        token_weight: 1.0 / tokens as f32,
        last: true,
        of: 1,
        tokens_of_batch: tokens,
    })
}

/// A loss and its parts, by name, each a sum over the tokens of some rows.
#[derive(Clone, Debug, Default)]
pub struct Parts(IndexMap<String, f64>);

impl Parts {
    /// Adds to a part.
    pub fn add(&mut self, name: &str, value: f64) {
        match self.0.get_mut(name) {
            Some(sum) => *sum += value,
            None => drop(self.0.insert(name.to_owned(), value)),
        }
    }

    /// One that is not finite.
    pub(super) fn not_finite(&self) -> Option<&str> {
        self.iter().find(|(_, value)| !value.is_finite()).map(|(name, _)| name)
    }

    /// By name, in the order in which they came.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

#[cfg(test)]
mod tests {

    use contract::TokenizerFile;

    use super::*;
    use crate::testing::row;

    #[test]
    fn token_weights_add_up_to_one_under_both_means() {
        let tokenizer = TokenizerFile::new("", 0, 9);
        let rows = vec![row(0, &[1], &[2, 3, 4]), row(1, &[1], &[2]), row(2, &[1], &[5])];
        let data = Dataset { rows, tokenizer };
        for mean in [Mean::Tokens, Mean::MicroBatches] {
            let batches = micro_batches(&data, Some(2), mean).unwrap();
            let total: f32 = batches.iter().flat_map(MicroBatch::weights).sum();
            assert!((total - 1.0).abs() < 1e-6, "{mean:?}: {total}");
        }
        let weights: Vec<f32> =
            micro_batches(&data, Some(2), Mean::MicroBatches).unwrap().iter().map(|b| b.token_weight).collect();
        assert_eq!(weights, [1.0 / 8.0, 1.0 / 2.0]);
    }

    #[test]
    fn every_token_counts_alike_however_a_batch_is_split() {
        let rows = vec![row(0, &[1], &[2, 3, 4]), row(1, &[1], &[2]), row(2, &[1], &[5])];
        let data = Dataset { rows, tokenizer: TokenizerFile::new("", 0, 9) };
        for size in 1..=3 {
            let batches = micro_batches(&data, Some(size), Mean::Tokens).unwrap();
            assert!(batches.iter().flat_map(MicroBatch::weights).all(|weight| weight == 1.0 / 5.0), "{size}");
        }
    }
}
