//! One update.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Error, anyhow, bail, ensure};
use candle_core::Tensor;
use contract::{AnyValue, Dataset, Env, Result, Sink, Step};
use indexmap::IndexMap;
use lm::{Gradients, OptimizerState};
use serde_json::{Map, Value as Json, json};

use super::batches::{MicroBatch, Parts, micro_batches, single};
use super::fields::Settings;
use super::optimizer::Applied;
use super::rate::Rate;
use super::sum::{Order, Sum};
use crate::finite::{Behind, not_finite};

/// Applies updates and keeps the optimiser's state between them.
pub struct Trainer {
    settings: Settings,
    rate: Rate,
    default_decay: f64,
    optimizer: Option<Applied>,
    restored: Option<AnyValue>,
    warned: bool,
}

/// What a gradient may be for its square to be a number in f32, as AdamW's second moment needs it.
const MOST_GRADIENT: f64 = 1.8e19;

/// What to do about an update that failed.
fn advice(step: &Step, at_start: &str) -> String {
    // Before the first update no learning rate has done anything yet.
    if step.round == 0 { at_start.to_owned() } else { "lower `learning_rate`".to_owned() }
}

fn first_not_finite(tensors: &IndexMap<String, Tensor>) -> Result<Option<String>> {
    for (name, tensor) in tensors {
        if !lm::is_finite(tensor)? {
            return Ok(Some(name.clone()));
        }
    }
    Ok(None)
}

/// The error of a loss that is not finite: finds the row by taking one after the other.
fn broken_loss(
    part: &str,
    data: &Dataset,
    step: &Step,
    models: &[Behind<'_>],
    mut loss: impl FnMut(&MicroBatch, &mut Parts) -> Result<Tensor>,
) -> Error {
    let part = format!("`{part}` in update {}", step.round);
    let broken = data.rows.iter().find(|row| {
        single(row).is_some_and(|batch| {
            let mut parts = Parts::default();
            loss(&batch, &mut parts).is_err() || parts.not_finite().is_some()
        })
    });
    let error = match broken {
        Some(row) => not_finite(&part, row, models),
        None => anyhow!("{part} is not finite, though it is for every row alone"),
    };
    if step.round == 0 { error } else { anyhow!("{error:#}; if training made it so, lower `learning_rate`") }
}

impl Trainer {
    /// `default_decay` is the weight decay where none is given, `restored` what [`Trainer::state`] gave in an earlier process.
    pub fn new(settings: Settings, default_decay: f64, restored: Option<AnyValue>) -> Self {
        let rate = settings.rate();
        Trainer { settings, rate, default_decay, optimizer: None, restored, warned: false }
    }

    /// One update of `parameters`, in place, by the gradient of a loss over `data`.
    ///
    /// `loss` gives the loss of some of the rows, in which each token has the weight that [`MicroBatch::weights`] says, and
    /// adds its value and its parts by name. The row of metrics that comes back has their sums, and `tokens`, `update`,
    /// `learning_rate` and `gradient_norm`.
    ///
    /// Errors when no row has a response token, a gradient is missing, or a number is not finite: then it says on which row,
    /// and by what of the `models` behind the loss.
    pub fn update(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        data: &Dataset,
        step: &Step,
        sink: &mut dyn Sink,
        models: &[Behind<'_>],
        mut loss: impl FnMut(&MicroBatch, &mut Parts) -> Result<Tensor>,
    ) -> Result<Map<String, Json>> {
        self.warn_of_empty_rows(data, sink);
        let mut sum = Sum::new(Order::of(self.settings.mean()), lm::accumulate);
        let mut parts = Parts::default();
        let batches = micro_batches(data, self.settings.micro_batch, self.settings.mean())?;
        for batch in &batches {
            let value = loss(batch, &mut parts)?;
            if let Some(name) = parts.not_finite() {
                return Err(broken_loss(name, data, step, models, loss));
            }
            sum.add(lm::gradients(&value, parameters)?)?;
        }
        let gradients = sum.total()?.context("an update without rows")?;
        let mut row: Map<String, Json> = parts.iter().map(|(name, value)| (name.to_owned(), json!(value))).collect();
        row.insert("tokens".into(), json!(batches[0].tokens_of_batch));
        self.apply(parameters, &gradients, step, &mut row)?;
        Ok(row)
    }

    fn apply(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        gradients: &Gradients,
        step: &Step,
        row: &mut Map<String, Json>,
    ) -> Result<()> {
        let norm = lm::norm(gradients)?;
        if !norm.is_finite() {
            let name = first_not_finite(gradients)?.unwrap_or_default();
            bail!(
                "the gradient of `{name}` in update {} is not finite, though its loss is: {}",
                step.round,
                advice(
                    step,
                    "the weights that training begins with, or this round's rows, are too extreme to learn from"
                )
            );
        }
        let scale = self.settings.optimizer.scale(norm);
        ensure!(
            norm * scale < MOST_GRADIENT,
            "the gradient of update {} has norm {norm:e}, whose square is no number in f32: clip it (`optimizer.clip: 1.0`)",
            step.round
        );
        let learning_rate = self.rate.at(step);
        self.optimizer()?.step(parameters, gradients, learning_rate, scale)?;
        // Later updates would notice; of the last nobody computes a loss.
        if step.round + 1 == step.rounds && !lm::norm(parameters)?.is_finite() {
            let name = first_not_finite(parameters)?.unwrap_or_default();
            bail!("`{name}` is not finite after the last update: lower `learning_rate`");
        }
        row.insert("update".into(), json!(step.round));
        row.insert("learning_rate".into(), json!(learning_rate));
        row.insert("gradient_norm".into(), json!(norm));
        Ok(())
    }

    fn optimizer(&mut self) -> Result<&mut Applied> {
        if self.optimizer.is_none() {
            let restored = self.restored.take().map(|value| {
                let state = value.into_any().downcast::<OptimizerState>().ok();
                state.context("the saved state is not that of an optimiser")
            });
            let restored = restored.transpose()?;
            self.optimizer = Some(self.settings.optimizer.start(self.default_decay, restored.as_deref())?);
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

    /// Reads back what [`Trainer::state`] gave.
    pub fn load_state(folder: &Path, env: &Env) -> Result<AnyValue> {
        Ok(Arc::new(OptimizerState::load(folder, &lm::device(&env.device)?)?))
    }

    /// Warns once when a batch is smaller than asked for, since rows without a response are left out.
    fn warn_of_empty_rows(&mut self, data: &Dataset, sink: &mut dyn Sink) {
        let empty = data.rows.iter().filter(|row| row.response.is_empty()).count();
        if empty > 0 && !self.warned {
            self.warned = true;
            sink.warn(&format!("{empty} of {} rows have an empty response and teach nothing", data.rows.len()));
        }
    }
}
