//! The most likely tokens of distributions, kept in place of the whole.

use anyhow::{Result, bail, ensure};

/// The K most likely tokens of N distributions, and the mass of all others.
///
/// The distributions are over V tokens. A trainee with more is compared by its distribution over the first V of them.
///
/// A divergence from it compares K + 1 classes: those tokens, and the rest as one, for which the trainee's probabilities
/// are added up. That is a coarsening. An f-divergence (every [`Divergence`](super::divergence::Divergence) but [`AlphaBeta`](super::divergence::Divergence::AlphaBeta), which is one
/// only where its exponents add up to 1) is never above its full value then, and equal to it where trainee and target
/// agree on how the rest is spread. So the loss is biased downwards, the less the more mass is kept; how the target
/// spreads the rest is not learnt: the trainee's own spread stays as it is, scaled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopK {
    /// V.
    pub vocabulary: usize,
    /// K, from 1 to V.
    pub k: usize,
    /// `[N, K]`, below V; distinct within a row.
    pub tokens: Vec<u32>,
    /// Their log-probabilities, `[N, K]`, at the temperature that the target is used with.
    pub log_probs: Vec<f32>,
    /// Logarithms of the mass of all other tokens, `[N]`; -10⁴ where there is none.
    pub log_rest: Vec<f32>,
}

/// One row of a coarse distribution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Classes<'a> {
    /// `[K]`, distinct and below V.
    pub(crate) tokens: &'a [u32],
    /// `[K]`.
    pub(crate) log_probs: &'a [f32],
    /// Logarithm of the rest's mass.
    pub(crate) log_rest: f32,
}

impl TopK {
    /// Number of rows N.
    pub fn rows(&self) -> usize {
        self.log_rest.len()
    }

    pub(crate) fn row(&self, row: usize) -> Classes<'_> {
        let places = row * self.k..(row + 1) * self.k;
        Classes {
            tokens: &self.tokens[places.clone()],
            log_probs: &self.log_probs[places],
            log_rest: self.log_rest[row],
        }
    }

    pub(crate) fn select(&self, rows: &[u32]) -> TopK {
        let classes = || rows.iter().map(|&row| self.row(row as usize));
        TopK {
            vocabulary: self.vocabulary,
            k: self.k,
            tokens: classes().flat_map(|row| row.tokens).copied().collect(),
            log_probs: classes().flat_map(|row| row.log_probs).copied().collect(),
            log_rest: classes().map(|row| row.log_rest).collect(),
        }
    }

    pub(crate) fn check(&self, rows: usize, vocabulary: usize, name: &str) -> Result<()> {
        let TopK { vocabulary: own, k, tokens, log_probs, log_rest } = self;
        ensure!(log_rest.len() == rows, "{name} has {} rows, expected {rows}", log_rest.len());
        ensure!(
            *own <= vocabulary,
            "{name} is over {own} tokens, expected {vocabulary} at most: both models must share a vocabulary"
        );
        let vocabulary = *own;
        ensure!(*k > 0 && *k <= vocabulary, "{name} keeps {k} tokens, expected 1 to {vocabulary}");
        let found = [tokens.len(), log_probs.len()];
        ensure!(found == [rows * k; 2], "{name} has {found:?} tokens and log-probabilities, expected {}", rows * k);
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            bail!("{name} keeps token {token}, expected less than {vocabulary}: both models must share a vocabulary");
        }
        Ok(())
    }
}
