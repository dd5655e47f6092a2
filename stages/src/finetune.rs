//! `finetune`: supervised fine-tuning, from a checkpoint or from random weights.
//!
//! ```yaml
//! teacher:
//!   kind: finetune
//!   in: {data: data.train, valid: data.valid}
//!   with: {init: {architecture: gpt2, layers: 4, width: 192}, take: 16, epochs: 4, learning_rate: 2e-3}
//! ```
//!
//! Loss: cross-entropy of the response tokens, the end token included, given the prompt and the tokens before.
//! Inputs: `data`, and `model` to start from. Outputs: `model`, and a row of metrics an update.
//! Cost: one forward and backward pass a round, 6 x parameters x tokens floating-point operations.

use candle_core::Device;
use contract::random::purpose;
use contract::{
    About, Alone, AnyValue, ConfigError, Conventions, Dataset, Env, Inputs, Operator, Outputs, PortType, Ports, Result,
    Sink, Stage, Step,
};
use lm::loss::head_loss;
use lm::{Architecture, LanguageModel};

use crate::training::{self, Trainer, Training};

training::config! {
    /// The `with` of `finetune`.
    pub struct Config {
        /// Shape of a model with random weights; for when no `model` is connected.
        #[serde(default)]
        pub init: Option<Architecture>,
        /// Whether the model's dropout is on; its rates are the model's (a new model's are 0 unless `init` says otherwise).
        #[serde(default = "yes")]
        pub dropout: bool,
    }
}

fn yes() -> bool {
    true
}

/// The kind.
pub struct Finetune;

impl Stage for Finetune {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "finetune",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "trains a model on given text, from a checkpoint or from random weights",
            example: "kind: finetune\nin: {data: data.train, valid: data.valid}\nwith: {init: {architecture: gpt2, layers: 4, width: 192}, take: 16, epochs: 4, learning_rate: 2e-3}",
            reads_clock: true,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.fill_settings(conventions);
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = config.settings().validate();
        errors.extend(training::validate_init(config.init.as_ref()));
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("data", PortType::Dataset, "text to learn from")
            .optional("model", PortType::Model, "the model to start from; without it, `init` says the shape")
            .output("model", PortType::Model, "the trained model")
            .agree("vocabulary", &["data", "model"])
    }

    fn outside_key(&self, config: &Config) -> Vec<&'static str> {
        training::outside_key(config.mean)
    }

    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "model", next: "model", valid: Some("valid") })
    }

    fn start(&self, config: Config, env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let trainer = Trainer::new(config.settings(), 1e-2, state);
        Ok(Box::new(Finetuning { device: lm::device(&env.device)?, trainer, config }))
    }
}

struct Finetuning {
    config: Config,
    device: Device,
    trainer: Trainer,
}

impl Operator for Finetuning {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let Config { init, seed, dropout, dtype, activation_checkpointing, .. } = &self.config;
        let model = match inputs.take_optional::<LanguageModel>("model")? {
            Some(model) => training::own(model)?,
            None => training::initial(init.as_ref(), "model", &data, *seed, &self.device)?,
        };
        let model = model.computed_in(*dtype)?.with_activation_checkpointing(*activation_checkpointing);
        let dropout = training::dropout(*dropout, *seed, step, purpose::DROPOUT);
        let row = self.trainer.update(model.parameters(), &data, step, sink, |batch, parts| {
            let hidden = batch.text.hidden(&model, None, dropout.as_ref())?; // [tokens, C]
            let labels = Some((batch.text.labels.as_slice(), 1.0));
            let loss = head_loss(&hidden, model.head(), labels, &[], &batch.weights())?;
            let cross_entropy = loss.cross_entropy.unwrap_or_default();
            parts.add("loss", cross_entropy);
            parts.add("cross_entropy", cross_entropy);
            Ok(loss.loss)
        })?;
        sink.metrics(row);
        Ok(Outputs::new().with("model", model))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        self.trainer.state()
    }
}
