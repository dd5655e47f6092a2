//! Training, once for all stages that train: what they are set to, and one update.
//!
//! A round of a loop is one update of an effective batch. A training stage gives the loss of some rows, and that is all it
//! has to say: [`Trainer::update`] splits the batch, adds up gradients, clips them, applies them, and gives back the
//! numbers of the update for `metrics.jsonl`.

mod batches;
mod fields;
mod optimizer;
mod rate;
mod sum;
mod update;

use std::sync::Arc;

use anyhow::{Context, bail};
use candle_core::Device;
use contract::{ConfigError, Dataset, Result, Step};
use lm::{Architecture, Dropout, LanguageModel};

pub use batches::{Mean, MicroBatch, Parts};
pub(crate) use fields::config;
pub use fields::{OUTSIDE_KEY, Settings, Training};
pub use optimizer::Optimizer;
pub use rate::Rate;
pub use update::Trainer;

/// What is wrong with the shape of a new model. The vocabulary is not known yet and decides nothing here.
pub fn validate_init(init: Option<&Architecture>) -> Vec<ConfigError> {
    let found = init.and_then(|init| init.config(1, 0).err());
    found.map(|error| ConfigError::at("init", format!("{error:#}"))).into_iter().collect()
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
