//! One update.

use std::sync::Arc;

use anyhow::{Context, ensure};
use candle_core::Tensor;
use contract::{AnyValue, Dataset, Result, Sink, Step};
use indexmap::IndexMap;
use lm::{AdamW, AdamWOptions, Gradients, OptimizerState};
use serde_json::{Map, Value as Json, json};

use super::batches::{MicroBatch, Parts, micro_batches};
use super::fields::Settings;
use super::rate::Rate;
use super::sum::{Order, Sum};

/// Applies updates and keeps the optimiser's state between them.
pub struct Trainer {
    settings: Settings,
    rate: Rate,
    options: AdamWOptions,
    optimizer: Option<AdamW>,
    restored: Option<AnyValue>,
    warned: bool,
}

impl Trainer {
    /// `default_decay` is the weight decay where none is given, `restored` what [`Trainer::state`] gave in an earlier process.
    pub fn new(settings: Settings, default_decay: f64, restored: Option<AnyValue>) -> Self {
        let (rate, options) = (settings.rate(), settings.optimizer.adamw(default_decay));
        Trainer { settings, rate, options, optimizer: None, restored, warned: false }
    }

    /// One update of `parameters`, in place, by the gradient of a loss over `data`.
    ///
    /// `loss` gives the loss of some of the rows, in which each token has the weight that [`MicroBatch::weights`] says, and
    /// adds its value and its parts by name. The row of metrics that comes back has their sums, and `tokens`, `update`,
    /// `learning_rate` and `gradient_norm`.
    ///
    /// Errors when no row has a response token, or a gradient is missing or not finite.
    pub fn update(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        data: &Dataset,
        step: &Step,
        sink: &mut dyn Sink,
        mut loss: impl FnMut(&MicroBatch, &mut Parts) -> Result<Tensor>,
    ) -> Result<Map<String, Json>> {
        self.warn_of_empty_rows(data, sink);
        let mut sum = Sum::new(Order::of(self.settings.mean()), lm::accumulate);
        let mut parts = Parts::default();
        let batches = micro_batches(data, self.settings.micro_batch, self.settings.mean())?;
        for batch in &batches {
            let loss = loss(batch, &mut parts)?;
            sum.add(lm::gradients(&loss, parameters)?)?;
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
        ensure!(
            norm.is_finite(),
            "the gradient of update {} is not finite: lower `learning_rate`, or look at the data of this round",
            step.round
        );
        let learning_rate = self.rate.at(step);
        let scale = self.settings.optimizer.scale(norm);
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

    /// Warns once when a batch is smaller than asked for, since rows without a response are left out.
    fn warn_of_empty_rows(&mut self, data: &Dataset, sink: &mut dyn Sink) {
        let empty = data.rows.iter().filter(|row| row.response.is_empty()).count();
        if empty > 0 && !self.warned {
            self.warned = true;
            sink.warn(&format!("{empty} of {} rows have an empty response and teach nothing", data.rows.len()));
        }
    }
}
