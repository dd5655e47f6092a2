//! `quantize`: the same model with its matrices in few bits, and what that costs.
//!
//! ```yaml
//! small:
//!   kind: quantize
//!   in: {model: train.student, data: data.valid}
//!   with: {format: q4_0}
//! ```
//!
//! A matrix becomes blocks of small integers with scales, as GGUF files hold them; it stays so in memory, in the store, and in
//! `export` with `gguf`. Passes decode while they compute, and gradients pass through, so that the model can stand as a teacher; a
//! stage that trains all of it decodes it first. Numbers are rounded to nearest without looking at any text, as `llama-quantize
//! --pure` does. Matrices whose rows blocks do not fill take the next larger format; norms, biases and tables of positions stay
//! as they are. Matrices of GPT-2 are quantised and saved alike, and decoded whole where a pass reads them, because they lie
//! transposed.
//! Inputs: `model`, and `data` to measure on. Outputs: `model`, and `metrics`: `bits_per_weight`; `weight_error`, the norm of the
//! difference of the matrices by theirs; with `data` the mean cross-entropy of a response token before (`loss_before`) and now
//! (`loss`), and `forward_kl`, from the model before to the one now, in nats a token. Cost: with `data` a pass of both models.

use anyhow::ensure;
use contract::limits;
use contract::{
    About, AnyValue, ConfigError, Dataset, Env, Facts, Inputs, Metrics, Operator, Outlook, Outputs, PortType, Ports,
    Result, Row, Sink, Stage, Step,
};
use lm::loss::{Divergence, Source, Target, divergence_values, log_probs};
use lm::{Format, LanguageModel};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::aligned::Aligned;
use crate::finite::{Behind, not_finite};
use crate::foresight;

/// The `with` of `quantize`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What matrices are written in: `q8_0`, next to exact; `q6_k`, `q5_1`, `q5_0`, `q5_k`; `q4_1`, `q4_0`, `q4_k`, an eighth of
    /// f32; `q3_k`, `q2_k`; or the half floats `f16` and `bf16`.
    pub format: Format,
    /// Only the first so many rows of `data`.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::ROWS))]
    pub rows: Option<u64>,
    /// Rows that go through the models at once: a matter of memory.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1, max = limits::BATCH))]
    pub batch: u64,
}

fn default_batch() -> u64 {
    16
}

/// The kind.
pub struct Quantize;

impl Stage for Quantize {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "quantize",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "writes the matrices of a model in few bits, and measures what that costs",
            example: "kind: quantize\nin: {model: train.student, data: data.valid}\nwith: {format: q4_0}",
            reads_clock: false,
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if config.format == Format::F32 {
            let error = ConfigError::at("format", "matrices are f32 as they are");
            errors.push(error.hint("choose a smaller one, as `q8_0`"));
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("model", PortType::Model, "the model")
            .optional("data", PortType::Dataset, "text to measure the difference on")
            .output("model", PortType::Model, "the same in few bits")
            .output("metrics", PortType::Metrics, "what it costs")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        if outlook.has("data") {
            foresight::reader(outlook, "model", None, "data");
            outlook.takes_rows("data", "rows", config.rows);
        } else {
            outlook.holds("model");
        }
        let model: Facts = outlook.input("model");
        outlook.output("model", model);
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Quantizing(config)))
    }
}

struct Quantizing(Config);

impl Operator for Quantizing {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let Config { format, rows, batch } = self.0;
        let model = inputs.take::<LanguageModel>("model")?.frozen();
        let data = inputs.take_optional::<Dataset>("data")?;
        let small = model.quantised(format)?;
        let (others, all) = small.matrices_not_in(format);
        if others > 0 {
            sink.note(&format!(
                "{others} of {all} matrices are in a larger format: rows are no multiples of the blocks of {format}"
            ));
        }
        let mut metrics = Metrics::default();
        metrics.0.insert("bits_per_weight".into(), json!(small.bits_per_weight()));
        metrics.0.insert("weight_error".into(), json!(small.distance_from(&model)?));
        if let Some(data) = data {
            let rows: Vec<&Row> = (data.rows.iter())
                .take(rows.map_or(usize::MAX, |rows| rows as usize))
                .filter(|row| Aligned::tokens_of(row) > 0)
                .collect();
            ensure!(
                !rows.is_empty(),
                "`data` has no response to measure anything on: leave it out, or choose another split"
            );
            let [before, now, distance] = measure(&model, &small, &rows, batch as usize, sink)?;
            metrics.0.insert("loss_before".into(), json!(before));
            metrics.0.insert("loss".into(), json!(now));
            metrics.0.insert("forward_kl".into(), json!(distance));
        }
        Ok(Outputs::new().with("model", small).with("metrics", metrics))
    }
}

/// Means over response tokens: the loss of both models, and the forward KL from the first to the second.
fn measure(
    model: &LanguageModel,
    small: &LanguageModel,
    rows: &[&Row],
    batch: usize,
    sink: &mut dyn Sink,
) -> Result<[f64; 3]> {
    let (mut sums, mut tokens, mut done) = ([0.0; 3], 0, 0);
    for chunk in rows.chunks(batch) {
        let text = Aligned::of(chunk.iter().copied());
        let [hidden, own] = [text.hidden(model, None, None)?, text.hidden(small, None, None)?];
        let target = Target {
            source: Source::Head { hidden: &hidden, head: &model.head()? },
            divergence: Divergence::ForwardKl,
            coefficient: 1.0,
            temperature: 1.0,
        };
        let losses = [(&hidden, model), (&own, small)].map(|(hidden, model)| -> Result<Vec<f64>> {
            Ok(log_probs(hidden, &model.head()?, &text.labels)?.into_iter().map(|p| -f64::from(p)).collect())
        });
        let [before, now] = losses;
        let measured = [before?, now?, divergence_values(&own, &small.head()?, &[target])?.remove(0)];
        for (sum, values) in sums.iter_mut().zip(&measured) {
            for (row, response) in chunk.iter().zip(&text.responses) {
                let of_row: f64 = values[response.clone()].iter().sum();
                if !of_row.is_finite() {
                    let models = [Behind::new("model", small, None), Behind::new("the model before", model, None)];
                    return Err(not_finite("what is measured", row, &models));
                }
                *sum += of_row;
            }
        }
        tokens += text.tokens();
        done += chunk.len() as u64;
        sink.progress(done, rows.len() as u64, "rows");
    }
    Ok(sums.map(|sum| sum / tokens as f64))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;
    use contract::Value;
    use lm::{Architecture, Packed};
    use serde_json::Value as Json;

    use super::*;
    use crate::testing::{Scratch, output, row};

    fn model(family: &str, width: usize) -> Arc<LanguageModel> {
        let architecture =
            json!({"architecture": family, "layers": 2, "width": width, "inner": 2 * width, "positions": 32});
        let architecture: Architecture = serde_json::from_value(architecture).unwrap();
        let tokenizer = crate::train_tokenizer::from_merges(&["h e", "l l"]);
        Arc::new(LanguageModel::init(&architecture, tokenizer, 3, &Device::Cpu).unwrap())
    }

    fn data(model: &LanguageModel) -> AnyValue {
        let rows = (0..5).map(|id| row(id, &[5, 6 + id as u32, 7], &[8, 9 + id as u32, 0])).collect();
        Arc::new(Dataset { rows, tokenizer: model.tokenizer.clone() })
    }

    fn run(model: &Arc<LanguageModel>, with: Json) -> (Arc<LanguageModel>, Arc<Metrics>, Vec<String>) {
        let inputs = vec![("model", model.clone() as AnyValue), ("data", data(model))];
        let (outputs, log) = Scratch::new().run(&Quantize, with, inputs).unwrap();
        (output(&outputs, "model"), output(&outputs, "metrics"), log.notes)
    }

    fn hidden(model: &LanguageModel) -> Vec<f32> {
        let mut batch = Packed::new();
        batch.push(0, &[3, 200, 17, 80, 9]);
        model.hidden(&batch, None, None).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn fewer_bits_cost_more_and_are_counted() {
        for family in ["llama", "gpt2", "opt", "gpt_neox", "qwen3"] {
            let model = model(family, 256);
            let mut last = (0.0, 0.0);
            for (format, bits) in
                [("bf16", 16.0), ("q8_0", 8.5), ("q6_k", 6.5625), ("q5_0", 5.5), ("q4_0", 4.5), ("q2_k", 2.625)]
            {
                let (small, metrics, notes) = run(&model, json!({"format": format}));
                let number = |name: &str| metrics.number(name).unwrap();
                assert!(notes.is_empty(), "{family}, {format}: {notes:?}");
                // Norms and tables of positions have 32 bits.
                assert!((bits..bits + 2.0).contains(&number("bits_per_weight")), "{family}, {format}: {metrics:?}");
                assert!(
                    number("weight_error") > last.0 && number("forward_kl") > last.1,
                    "{family}, {format}: {metrics:?}"
                );
                assert!((number("loss") - number("loss_before")).abs() < 0.5, "{family}, {format}: {metrics:?}");
                last = (number("weight_error"), number("forward_kl"));
                // Saved and loaded, it says the same to the bit, and is saved to the same bytes.
                let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
                small.save(folders[0].path()).unwrap();
                let again = LanguageModel::load(folders[0].path(), &Device::Cpu).unwrap();
                assert!(hidden(&again) == hidden(&small), "{family}, {format}");
                again.save(folders[1].path()).unwrap();
                let bytes =
                    folders.each_ref().map(|folder| std::fs::read(folder.path().join("model.safetensors")).unwrap());
                assert!(bytes[0] == bytes[1], "{family}, {format}");
            }
            assert!(last.0 > 0.05 && last.0 < 0.5, "{family}: {last:?}");
        }
    }

    #[test]
    fn rows_that_blocks_do_not_fill_take_the_next_larger_format() {
        let model = model("llama", 96);
        let (small, metrics, notes) = run(&model, json!({"format": "q4_k", "rows": 2}));
        assert_eq!(notes, ["15 of 15 matrices are in a larger format: rows are no multiples of the blocks of Q4_K"]);
        let bits = metrics.number("bits_per_weight").unwrap();
        assert!((5.5..5.7).contains(&bits), "{bits}");
        assert!(hidden(&small).iter().all(|x| x.is_finite()));
        let again = small.quantised(Format::Q5_0).unwrap();
        assert!(hidden(&again) == hidden(&small));
    }

    #[test]
    fn a_model_alone_is_not_measured() {
        let inputs = vec![("model", model("llama", 64) as AnyValue)];
        let (outputs, _) = Scratch::new().run(&Quantize, json!({"format": "f16"}), inputs).unwrap();
        let metrics: Arc<Metrics> = output(&outputs, "metrics");
        assert_eq!(metrics.0.keys().collect::<Vec<_>>(), ["bits_per_weight", "weight_error"]);
        let errors = Quantize.validate(&serde_json::from_value(json!({"format": "f32"})).unwrap());
        assert_eq!(errors[0].path, ["format"]);
    }
}
