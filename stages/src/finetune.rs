//! `finetune`: supervised fine-tuning, from a checkpoint or from random weights.
//!
//! ```yaml
//! teacher:
//!   kind: finetune
//!   in: {data: data.train, valid: data.valid}
//!   with: {init: {architecture: gpt2, layers: 4, width: 192}, take: 16, learning_rate: 2e-3}
//! ```
//!
//! Loss: cross-entropy of the response tokens, the end token included, given the prompt and the tokens before.
//! Inputs: `data`, and `model` to start from. Outputs: `model`, and a row of metrics an update.
//! Cost: one forward and backward pass a round, 6 x parameters x tokens floating-point operations.

use std::path::Path;

use candle_core::Device;
use contract::random::purpose;
use contract::{
    About, Alone, AnyValue, ConfigError, Conventions, Dataset, Env, Inputs, Operator, Outlook, Outputs, PortType,
    Ports, Result, Sink, Stage, Step,
};
use lm::loss::head_loss;
use lm::{Architecture, Lora};

use crate::evaluate;
use crate::finite::Behind;
use crate::foresight;
use crate::training::{self, Trainer, Training};

training::config! {
    /// The `with` of `finetune`.
    pub struct Config {
        /// Shape of a model with random weights; for when no `model` is connected.
        #[serde(default)]
        pub init: Option<Architecture>,
        /// Train a low-rank adapter, and leave the model's own weights as they are, quantised ones too. What comes out is the
        /// model with it.
        #[serde(default)]
        pub lora: Option<Lora>,
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
            example: "kind: finetune\nin: {data: data.train, valid: data.valid}\nwith: {init: {architecture: gpt2, layers: 4, width: 192}, take: 16, learning_rate: 2e-3}",
            reads_clock: true,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.fill_settings(conventions);
        config.init = config.init.take().map(Architecture::without_defaults);
        config.optimizer.fill_for_model(conventions);
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = training::validate_init(config.init.as_ref());
        errors.extend(config.optimizer.errors());
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("data", PortType::Dataset, "text to learn from")
            .optional("model", PortType::Model, "the model to start from; without it, `init` says the shape")
            .output("model", PortType::Model, "the trained model")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        training::OUTSIDE_KEY.to_vec()
    }

    fn alone(&self) -> Option<Alone> {
        Some(Alone { data: "data", carry: "model", next: "model", check: Some(evaluate::check_of_loss()) })
    }

    fn load_state(&self, folder: &Path, env: &Env) -> Result<AnyValue> {
        Trainer::load_state(folder, env)
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let model = foresight::learner(
            outlook,
            "model",
            config.init.as_ref(),
            "data",
            config.lora.as_ref(),
            config.activation_checkpointing,
        );
        foresight::effective_batch(outlook, config.effective_batch, None);
        foresight::computes_in(outlook, config.dtype);
        outlook.output("model", model);
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
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
        let Config { init, lora, seed, dropout, .. } = &self.config;
        let (shape, settings) = ((init.as_ref(), lora.as_ref()), self.config.settings());
        let model = training::learner(&mut inputs, "model", shape, &settings, &data, &self.device)?;
        let dropout = training::dropout(*dropout, *seed, step, purpose::DROPOUT);
        let behind = [Behind::new("model", &model, None)];
        let row = self.trainer.update(&model.parameters(), &data, step, sink, &behind, |batch, parts| {
            let hidden = batch.text.hidden(&model, None, dropout.as_ref())?; // [tokens, C]
            let labels = Some((batch.text.labels.as_slice(), 1.0));
            let loss = head_loss(&hidden, &model.head()?, labels, &[], &batch.weights())?;
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use candle_core::Tensor;
    use contract::Kind;
    use lm::LanguageModel;
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::testing::{Log, output, row};

    fn fixtures() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity")
    }

    fn read(name: &str) -> Json {
        serde_json::from_slice(&std::fs::read(fixtures().join("conventions").join(name)).unwrap()).unwrap()
    }

    fn ids(list: &Json) -> Vec<u32> {
        list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    /// Three updates of a tiny Llama: how a loss is averaged, what decays, where a warm-up begins. `make_conventions.py` is
    /// the other program.
    #[test]
    fn a_llama_is_trained_as_pytorch_does_it_under_both_conventions() {
        for (conventions, name) in [(Conventions::Sound, "sound"), (Conventions::Reference, "reference")] {
            let config = json!({
                "learning_rate": 1e-2, "warmup": 2, "micro_batch": 2, "optimizer": {"weight_decay": 0.5},
            });
            let config = Kind::resolve(&Finetune, &config, conventions).unwrap();
            let env = Env { device: "cpu".into(), threads: 1, scratch: std::env::temp_dir() };
            let mut operator = Kind::start(&Finetune, &config, &env, None).unwrap();
            let model = LanguageModel::load(&fixtures().join("llama/llama2"), &Device::Cpu).unwrap();
            let tokenizer = model.tokenizer.clone();
            let mut model: Arc<LanguageModel> = Arc::new(model);
            let (batches, expected) = (read("batches.json"), read("expected.json"));
            for (round, expected) in expected[name].as_array().unwrap().iter().enumerate() {
                let rows = batches[round].as_array().unwrap().iter().enumerate();
                let rows = rows.map(|(id, it)| row(id as u64, &ids(&it["prompt"]), &ids(&it["response"]))).collect();
                let mut inputs = Inputs::new();
                inputs.insert("data", Arc::new(Dataset { rows, tokenizer: tokenizer.clone() }));
                inputs.insert("model", model);
                let step = Step { round: round as u64, rounds: 3, epoch: 0, rounds_per_epoch: 3 };
                let mut log = Log::default();
                model = output(&operator.run(inputs, &step, &mut log).unwrap(), "model");
                for field in ["loss", "gradient_norm"] {
                    let (found, right) = (log.rows[0][field].as_f64().unwrap(), expected[field].as_f64().unwrap());
                    assert!((found / right - 1.0).abs() < 1e-5, "{name}, {field} of update {round}: {found}, {right}");
                }
            }
            let path = fixtures().join(format!("conventions/final_{name}.safetensors"));
            let finals: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
            assert_eq!(finals.len(), model.parameters().len());
            for (parameter, found) in &model.parameters() {
                let difference = (found.detach() - &finals[parameter]).unwrap().abs().unwrap();
                let difference = difference.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
                assert!(difference < 1e-4, "{name}: `{parameter}` is off by {difference}");
            }
        }
    }
}
