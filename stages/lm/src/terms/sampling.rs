//! How a next token is chosen: what the CPU and a GPU are asked for.

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How tokens are chosen. The default samples from the model's distribution as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token always (and then top-k, top-p and min-p have nothing to do).
    pub temperature: f32,
    /// Keeps this many of the most likely tokens, and those as likely as the last of them; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens that together reach this probability, at least one; of equally likely ones
    /// those with lower ids. 1 keeps all.
    pub top_p: f32,
    /// Of those left, keeps tokens at least this likely as a share of the likeliest one's probability (Nguyen et al., "Turning up
    /// the heat", 2024); 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits of tokens that already occurred, prompt included, and multiplies negative ones; 1 is
    /// off.
    pub repetition_penalty: f32,
    /// No run of this many tokens may occur twice, prompt included; 0 is off.
    pub no_repeat_ngram: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, no_repeat_ngram: 0 }
    }
}

impl Sampling {
    /// The most likely token always.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, ..Self::default() }
    }

    /// Errors when a number is out of its range.
    pub fn validate(&self) -> Result<()> {
        let Sampling { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        ensure!(
            temperature >= 0.0 && temperature.is_finite(),
            "`temperature` is {temperature}, expected a number of at least 0"
        );
        ensure!(top_p > 0.0 && top_p <= 1.0, "`top_p` is {top_p}, expected a number above 0 and at most 1");
        ensure!((0.0..1.0).contains(&min_p), "`min_p` is {min_p}, expected a number from 0 to below 1");
        ensure!(
            repetition_penalty > 0.0 && repetition_penalty.is_finite(),
            "`repetition_penalty` is {repetition_penalty}, expected a number above 0"
        );
        Ok(())
    }

    pub(crate) fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0 || self.no_repeat_ngram > 0
    }

    pub(crate) fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}
