//! Training, once for all stages that train: what they are set to, and one update.
//!
//! A round of a loop is one update of an effective batch. A training stage gives the loss of some rows, and that is all it
//! has to say: [`Trainer::update`] splits the batch, adds up gradients, clips them, applies them, and gives back the
//! numbers of the update for `metrics.jsonl`.

mod batches;
mod beside;
mod fields;
mod optimizer;
mod rate;
mod sum;
mod update;

use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use candle_core::Device;
use contract::{ConfigError, Dataset, Inputs, Result, Step};
use lm::{Architecture, Dropout, LanguageModel, Lora};

pub use batches::{Mean, MicroBatch, Parts};
pub use beside::Beside;
pub(crate) use fields::config;
pub use fields::{OUTSIDE_KEY, Settings, Training};
pub use optimizer::{Method, Optimizer};
pub use rate::Rate;
pub use update::Trainer;

/// What is wrong with the shape of a new model. The vocabulary is not known yet and decides nothing here.
pub fn validate_init(init: Option<&Architecture>) -> Vec<ConfigError> {
    let found = init.and_then(|init| init.config(1, 0).err());
    found.map(|error| ConfigError::at("init", format!("{error:#}"))).into_iter().collect()
}

/// The model that a stage trains, ready for it: the one on `port`, else a new one of the shape `init`.
pub fn learner(
    inputs: &mut Inputs,
    port: &str,
    (init, lora): (Option<&Architecture>, Option<&Lora>),
    settings: &Settings,
    data: &Dataset,
    device: &Device,
) -> Result<LanguageModel> {
    let Settings { seed, dtype, activation_checkpointing, .. } = *settings;
    let model = match inputs.take_optional(port)? {
        Some(model) => model,
        None => Arc::new(initial(init, port, data, seed, device)?),
    };
    Ok(own(model, lora, seed)?.computed_in(dtype)?.with_activation_checkpointing(activation_checkpointing))
}

/// Takes a carried model for training: the only reference is updated in place, of a shared one that is copied which is
/// trained. With `lora` that is an adapter, a new one where the model has none.
fn own(model: Arc<LanguageModel>, lora: Option<&Lora>, seed: u64) -> Result<LanguageModel> {
    match lora {
        Some(lora) => model.check_adapter(lora)?,
        None => ensure!(
            !model.has_adapter(),
            "the model has an adapter: give `lora` to go on with it, or merge the two first (kind `merge`)"
        ),
    }
    let model = Arc::try_unwrap(model).or_else(|shared| shared.deep_clone())?;
    match lora.filter(|_| !model.has_adapter()) {
        Some(lora) => model.with_new_adapter(lora, seed)?.trainable(),
        None => model.trainable(),
    }
}

/// The first value of a model that is trained from nothing. `port` is where one could have been connected.
fn initial(
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
    model.with_context(|| format!("cannot make a {port} with random weights"))
}

/// Dropout of a training forward pass, at the model's rates.
pub fn dropout(on: bool, seed: u64, step: &Step, purpose: u32) -> Option<Dropout> {
    on.then_some(Dropout { seed, update: step.round as u32, purpose })
}
