//! What the training stages share: text aligned by response token, micro-batches, and one optimiser update.
//!
//! A round of a loop is one update. The stage gives a loss for each micro-batch; here gradients are added up, clipped and
//! applied, and the numbers of the update become one row of `metrics.jsonl`.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use candle_core::{Device, Tensor};
use contract::{AnyValue, ConfigError, Conventions, Dataset, Result, Row, Sink, Step};
use lm::{
    AdamW, AdamWOptions, Architecture, Dropout, Gradients, LanguageModel, OptimizerState, Packed, Schedule, Warmup,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

/// How a stage changes its weights.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// AdamW's decay rates of the two moments.
    #[serde(default = "Optimizer::default_betas")]
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    #[serde(default = "Optimizer::default_eps")]
    pub eps: f64,
    /// Decoupled weight decay, applied to matrices; left out: 0.01 for models, for a soft prompt 0 (`reference`: 0.01).
    #[serde(default)]
    pub weight_decay: Option<f64>,
    /// Global norm that gradients are scaled down to; 0 switches clipping off.
    #[serde(default = "Optimizer::default_clip")]
    pub clip: f64,
}

impl Optimizer {
    fn default_betas() -> (f64, f64) {
        (0.9, 0.999)
    }

    fn default_eps() -> f64 {
        1e-8
    }

    fn default_clip() -> f64 {
        1.0
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            betas: Self::default_betas(),
            eps: Self::default_eps(),
            weight_decay: None,
            clip: Self::default_clip(),
        }
    }
}

/// The learning rate at update `k` of `K`: the part of a configuration that all training stages have.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Rate at the top of the schedule.
    pub peak: f64,
    /// How it goes on after the warm-up.
    pub schedule: Schedule,
    /// The first updates.
    pub warmup: Warmup,
}

impl Rate {
    /// From the fields `learning_rate`, `schedule`, `warmup` and `warmup_from_zero`.
    pub fn new(peak: f64, schedule: Schedule, warmup: u64, from_zero: Option<bool>) -> Self {
        Rate { peak, schedule, warmup: Warmup { updates: warmup, from_zero: from_zero.unwrap_or(false) } }
    }
}

/// What is wrong with the fields that all training stages have.
pub fn validate_rate(learning_rate: f64, optimizer: &Optimizer, micro_batch: Option<u64>) -> Vec<ConfigError> {
    let mut errors = Vec::new();
    if !(learning_rate.is_finite() && learning_rate >= 0.0) {
        errors.push(ConfigError::at("learning_rate", format!("expected a number of 0 or more, got {learning_rate}")));
    }
    let (first, second) = optimizer.betas;
    if !((0.0..1.0).contains(&first) && (0.0..1.0).contains(&second)) {
        errors
            .push(ConfigError::at("optimizer.betas", format!("expected two numbers below 1, got [{first}, {second}]")));
    }
    if micro_batch == Some(0) {
        errors.push(
            ConfigError::at("micro_batch", "expected 1 row or more, got 0")
                .hint("leave it out to take all rows at once"),
        );
    }
    errors
}

/// What is wrong with the shape of a new model. The vocabulary is not known yet and decides nothing here.
pub fn validate_init(init: Option<&Architecture>) -> Vec<ConfigError> {
    let found = init.and_then(|init| init.config(1, 0).err());
    found.map(|error| ConfigError::at("init", format!("{error:#}"))).into_iter().collect()
}

/// Text of some rows, laid out for a model, with the places that predict response tokens.
///
/// A response token is found by its place in its own response, so teacher and student agree on it whatever stands before
/// the prompt.
pub struct Aligned {
    /// Prompt and response without the last id, which is only predicted. Wanted are the tokens before each response
    /// token: those that predict one.
    pub packed: Packed,
    /// The response tokens.
    pub labels: Vec<u32>,
    /// Where the response tokens of each sequence lie in `labels`.
    pub responses: Vec<Range<usize>>,
}

impl Aligned {
    /// Lays out `rows`. A row without response tokens adds nothing; one without a prompt cannot predict its first token.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let mut text = Aligned { packed: Packed::new(), labels: Vec::new(), responses: Vec::new() };
        let mut predicts = Vec::new();
        for row in rows {
            let ids: Vec<u32> = row.prompt.iter().chain(&row.response).copied().collect();
            let tokens = Aligned::tokens_of(row);
            if tokens == 0 {
                continue;
            }
            let first = ids.len() - tokens;
            let start = text.packed.ids.len();
            text.packed.push(row.id, &ids[..ids.len() - 1]);
            predicts.extend((first..ids.len()).map(|at| (start + at - 1) as u32));
            let before = text.labels.len();
            text.labels.extend(&ids[first..]);
            text.responses.push(before..text.labels.len());
        }
        text.packed.wanted = Some(predicts);
        text
    }

    /// The response tokens that a row adds: all of its response, but for the first where there is no prompt.
    pub fn response_of(row: &Row) -> &[u32] {
        let skipped = usize::from(row.prompt.is_empty() && !row.response.is_empty());
        &row.response[skipped..]
    }

    /// Number of response tokens that a row adds.
    pub fn tokens_of(row: &Row) -> usize {
        Aligned::response_of(row).len()
    }

    /// Number of response tokens.
    pub fn tokens(&self) -> usize {
        self.labels.len()
    }

    /// Row id and response tokens of every sequence, which is how a teacher cache finds what was said of them.
    pub fn rows(&self) -> Vec<(u64, &[u32])> {
        let rows = self.packed.rows.iter().zip(&self.responses);
        rows.map(|(id, response)| (*id, &self.labels[response.clone()])).collect()
    }

    /// Hidden states of a model (and soft prompt) where they predict response tokens, `[tokens, width]`.
    pub fn hidden(&self, model: &LanguageModel, prompt: Option<&Tensor>, dropout: Option<&Dropout>) -> Result<Tensor> {
        model.hidden(&self.packed, prompt, dropout)
    }
}

/// The micro-batches of an effective batch, with the weight of a token in each.
pub struct MicroBatch {
    /// The text.
    pub text: Aligned,
    /// What each of its tokens counts in the loss of the effective batch.
    pub token_weight: f32,
    /// True for the last one that has tokens.
    pub last: bool,
    /// How many micro-batches the effective batch has.
    pub of: usize,
}

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

/// Splits an effective batch. Fails when no row has a response token, since there is nothing to learn from.
pub fn micro_batches(data: &Dataset, micro_batch: Option<u64>, mean: Mean) -> Result<Vec<MicroBatch>> {
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
        MicroBatch { token_weight: 1.0 / share as f32, last: index + 1 == count, of: count, text }
    });
    Ok(batches.collect())
}

/// What is only a matter of memory: activation checkpointing, and under a mean over all tokens the split into micro-batches.
pub fn outside_key(mean: Option<Mean>) -> Vec<&'static str> {
    let mut fields = vec!["activation_checkpointing"];
    if mean != Some(Mean::MicroBatches) {
        fields.push("micro_batch");
    }
    fields
}

/// Applies updates and keeps the optimiser's state between them.
pub struct Trainer {
    rate: Rate,
    clip: f64,
    options: AdamWOptions,
    optimizer: Option<AdamW>,
    restored: Option<AnyValue>,
}

impl Trainer {
    /// `restored` is what [`Trainer::state`] gave in an earlier process.
    pub fn new(rate: Rate, optimizer: &Optimizer, default_decay: f64, restored: Option<AnyValue>) -> Self {
        let options = AdamWOptions {
            betas: optimizer.betas,
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay.unwrap_or(default_decay),
            ..AdamWOptions::default()
        };
        Trainer { rate, clip: optimizer.clip, options, optimizer: None, restored }
    }

    /// One update of `parameters`, in place. `row` gets `update`, `learning_rate` and `gradient_norm`.
    pub fn update(
        &mut self,
        parameters: &indexmap::IndexMap<String, Tensor>,
        gradients: &Gradients,
        step: &Step,
        row: &mut Map<String, Json>,
    ) -> Result<()> {
        let norm = lm::norm(gradients)?;
        ensure!(
            norm.is_finite(),
            "the gradient of update {} is not finite: lower `learning_rate`, or look at the data of this round",
            step.round
        );
        let scale = if self.clip > 0.0 { (self.clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let Rate { peak, schedule, warmup } = self.rate;
        let learning_rate = lm::learning_rate(peak, schedule, warmup, step.round, step.rounds);
        self.optimizer()?.step(parameters, gradients, learning_rate, scale)?;
        row.insert("update".into(), json!(step.round));
        row.insert("learning_rate".into(), json!(learning_rate));
        row.insert("gradient_norm".into(), json!(norm));
        Ok(())
    }

    fn optimizer(&mut self) -> Result<&mut AdamW> {
        if self.optimizer.is_none() {
            let optimizer = match self.restored.take() {
                None => AdamW::new(self.options),
                Some(value) => {
                    let state = value.into_any().downcast::<OptimizerState>().ok();
                    let state = state.context("the saved state is not that of an optimiser")?;
                    AdamW::from_state(self.options, &state)?
                }
            };
            self.optimizer = Some(optimizer);
        }
        Ok(self.optimizer.as_mut().expect("it was just made"))
    }

    /// Moments and counts, for a cut.
    pub fn state(&self) -> Result<Option<AnyValue>> {
        match (&self.optimizer, &self.restored) {
            (Some(optimizer), _) => Ok(Some(Arc::new(optimizer.to_state()?))),
            (None, restored) => Ok(restored.clone()),
        }
    }
}

/// Takes a carried model for training: the only reference is updated in place, a shared one is copied first.
pub fn own(model: Arc<LanguageModel>) -> Result<LanguageModel> {
    match Arc::try_unwrap(model) {
        Ok(model) => model.trainable(),
        Err(shared) => shared.deep_clone()?.trainable(),
    }
}

/// The first value of a model that is trained from nothing. `port` is where one could have been connected.
pub fn initial(
    init: Option<&Architecture>,
    port: &str,
    data: &Dataset,
    seed: u64,
    device: &Device,
) -> Result<LanguageModel> {
    let Some(init) = init else {
        bail!("there is no {port} to train: connect `{port}`, or give `init` with the shape of a new one");
    };
    let model = LanguageModel::init(init, data.tokenizer.clone(), seed, device);
    model.with_context(|| format!("cannot make a {port} with random weights"))?.trainable()
}

/// Dropout of a training forward pass, at the model's rates.
pub fn dropout(on: bool, seed: u64, step: &Step, purpose: u32) -> Option<Dropout> {
    on.then_some(Dropout { seed, update: step.round as u32, purpose })
}

/// Sums of a loss and its parts over micro-batches, by name.
#[derive(Default)]
pub struct Parts(Map<String, Json>);

impl Parts {
    /// Adds to a part.
    pub fn add(&mut self, name: &str, value: f64) {
        let sum = self.0.get(name).and_then(Json::as_f64).unwrap_or(0.0) + value;
        self.0.insert(name.into(), json!(sum));
    }

    /// The row so far.
    pub fn into_row(self) -> Map<String, Json> {
        self.0
    }
}

/// Warns once when a batch is much smaller than asked for, since rows without a response are left out.
pub fn warn_of_empty_rows(data: &Dataset, warned: &mut bool, sink: &mut dyn Sink) {
    let empty = data.rows.iter().filter(|row| row.response.is_empty()).count();
    if empty > 0 && !*warned {
        *warned = true;
        sink.warn(&format!("{empty} of {} rows have an empty response and teach nothing", data.rows.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{End, TokenizerFile};

    fn row(id: u64, prompt: &[u32], response: &[u32]) -> Row {
        Row {
            id,
            prompt: prompt.to_vec(),
            response: response.to_vec(),
            end: End::Stop,
            log_probs: None,
            references: Vec::new(),
        }
    }

    #[test]
    fn every_response_token_is_predicted_from_the_place_before_it() {
        let text = Aligned::of(&[row(0, &[1, 2, 3], &[4, 5]), row(1, &[6], &[]), row(2, &[], &[7, 8])]);
        assert_eq!(text.packed.ids, [1, 2, 3, 4, 7]);
        assert_eq!(text.packed.wanted, Some(vec![2, 3, 4]));
        assert_eq!(text.labels, [4, 5, 8]);
        assert_eq!(text.rows(), [(0, &[4, 5][..]), (2, &[8][..])]);
    }

    #[test]
    fn token_weights_add_up_to_one_under_both_means() {
        let tokenizer = TokenizerFile { json: Arc::new(Vec::new()), end: 0, size: 9 };
        let rows = vec![row(0, &[1], &[2, 3, 4]), row(1, &[1], &[2]), row(2, &[1], &[5])];
        let data = Dataset { rows, tokenizer };
        for mean in [Mean::Tokens, Mean::MicroBatches] {
            let batches = micro_batches(&data, Some(2), mean).unwrap();
            let total: f32 = batches.iter().map(|b| b.token_weight * b.text.tokens() as f32).sum();
            assert!((total - 1.0).abs() < 1e-6, "{mean:?}: {total}");
        }
        let weights: Vec<f32> =
            micro_batches(&data, Some(2), Mean::MicroBatches).unwrap().iter().map(|b| b.token_weight).collect();
        assert_eq!(weights, [1.0 / 8.0, 1.0 / 2.0]);
    }
}
