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
use lm::{Architecture, Dtype, Gradients, LanguageModel, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::training::{self, Mean, Optimizer, Parts, Rate, Trainer};

/// The `with` of `finetune`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Shape of a model with random weights; for when no `model` is connected.
    #[serde(default)]
    pub init: Option<Architecture>,
    /// Learning rate at the top of the schedule.
    pub learning_rate: f64,
    /// How the learning rate goes on after the warm-up.
    #[serde(default)]
    pub schedule: Schedule,
    /// Updates of linear warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// Whether the warm-up begins with an update at rate 0; left out: as the conventions say.
    #[serde(default)]
    pub warmup_from_zero: Option<bool>,
    /// Optimiser.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Whether the model's dropout is on; its rates are the model's (a new model's are 0 unless `init` says otherwise).
    #[serde(default = "yes")]
    pub dropout: bool,
    /// Rows that go through the model at once; left out: all. A matter of memory, unless `mean` is `micro-batches`.
    #[serde(default)]
    pub micro_batch: Option<u64>,
    /// Whether the model keeps only the inputs of its blocks for the backward pass, and computes the rest again there: less
    /// memory, a third more time, the same bits.
    #[serde(default)]
    pub activation_checkpointing: bool,
    /// How the loss is averaged; left out: as the conventions say.
    #[serde(default)]
    pub mean: Option<Mean>,
    /// Type that matrices are multiplied in; `bf16` needs a GPU. Trained weights and moments are f32 either way.
    #[serde(default)]
    pub dtype: Dtype,
    /// Seed of initial weights and dropout.
    #[serde(default)]
    pub seed: u64,
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
        config.mean.get_or_insert(Mean::of(conventions));
        config.warmup_from_zero.get_or_insert(conventions == Conventions::Reference);
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = training::validate_rate(config.learning_rate, &config.optimizer, config.micro_batch);
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
        let rate = Rate::new(config.learning_rate, config.schedule, config.warmup, config.warmup_from_zero);
        let trainer = Trainer::new(rate, &config.optimizer, 1e-2, state);
        Ok(Box::new(Finetuning { device: lm::device(&env.device)?, trainer, config, warned: false }))
    }
}

struct Finetuning {
    config: Config,
    device: Device,
    trainer: Trainer,
    warned: bool,
}

impl Operator for Finetuning {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let model = match inputs.take_optional::<LanguageModel>("model")? {
            Some(model) => training::own(model)?,
            None => training::initial(self.config.init.as_ref(), "model", &data, self.config.seed, &self.device)?,
        };
        let model =
            model.computed_in(self.config.dtype)?.with_activation_checkpointing(self.config.activation_checkpointing);
        training::warn_of_empty_rows(&data, &mut self.warned, sink);

        let mut gradients = Gradients::default();
        let mut parts = Parts::default();
        let mut tokens = 0;
        let mean = self.config.mean.unwrap_or(Mean::Tokens);
        for batch in training::micro_batches(&data, self.config.micro_batch, mean)? {
            let text = &batch.text;
            let dropout = training::dropout(self.config.dropout, self.config.seed, step, purpose::DROPOUT);
            let hidden = text.hidden(&model, None, dropout.as_ref())?; // [tokens, C]
            let weights = vec![batch.token_weight; text.tokens()];
            let loss = head_loss(&hidden, model.head(), Some((&text.labels, 1.0)), &[], &weights)?;
            lm::accumulate(&mut gradients, lm::gradients(&loss.loss, model.parameters())?)?;
            parts.add("loss", loss.cross_entropy.unwrap_or_default());
            tokens += text.tokens();
        }
        let mut row = parts.into_row();
        row.insert("cross_entropy".into(), row["loss"].clone());
        row.insert("tokens".into(), tokens.into());
        self.trainer.update(model.parameters(), &gradients, step, &mut row)?;
        sink.metrics(row);
        Ok(Outputs::new().with("model", model))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        self.trainer.state()
    }
}
