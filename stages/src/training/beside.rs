//! Text beside an effective batch: what an update learns in another way than from its own rows.

use anyhow::ensure;
use contract::{Result, Row};

use super::{Mean, MicroBatch};
use crate::aligned::Aligned;

/// Rows of which every micro-batch of an update gets its share.
pub struct Beside<'a> {
    rows: &'a [Row],
    mean: Mean,
    /// Their response tokens.
    tokens: usize,
    /// Micro-batches so far.
    done: usize,
}

impl<'a> Beside<'a> {
    /// Errors with `otherwise` when no row has a response token.
    pub fn new(rows: &'a [Row], mean: Mean, otherwise: &str) -> Result<Self> {
        let tokens: usize = rows.iter().map(Aligned::tokens_of).sum();
        ensure!(tokens > 0, "{otherwise}");
        Ok(Beside { rows, mean, tokens, done: 0 })
    }

    /// What goes with the next micro-batch, and what each of its tokens counts.
    pub fn next(&mut self, batch: &MicroBatch) -> Option<(Aligned, f32)> {
        let place = |index: usize| self.rows.len() * index / batch.of;
        let text = Aligned::of(self.rows.get(place(self.done)..place(self.done + 1))?);
        self.done += 1;
        let count = match self.mean {
            Mean::Tokens => self.tokens,
            Mean::MicroBatches => text.tokens() * batch.of,
        };
        (text.tokens() > 0).then(|| (text, 1.0 / count as f32))
    }
}
