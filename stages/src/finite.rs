//! Errors of numbers that are not finite.

use anyhow::{Error, anyhow};
use candle_core::Tensor;
use contract::Row;
use contract::dataset::row_name;
use lm::{LanguageModel, NotFinite, Packed};

/// What is not finite when a model writes.
pub const NEXT_TOKEN: &str = "the distribution of the answer's next token";

/// A model behind a number.
#[derive(Clone, Copy)]
pub struct Behind<'a> {
    /// The port it came in by.
    pub port: &'a str,
    /// The model.
    pub model: &'a LanguageModel,
    /// Its soft prompt.
    pub prompt: Option<&'a Tensor>,
}

impl<'a> Behind<'a> {
    /// A model as it came in by `port`.
    pub fn new(port: &'a str, model: &'a LanguageModel, prompt: Option<&'a Tensor>) -> Self {
        Behind { port, model, prompt }
    }
}

/// The same for an error of a computation over `rows`, if it is of a number that is not finite: `row_at` says which of them
/// had the place that the error names.
pub fn explain<'r>(
    error: Error,
    what: &str,
    row_at: impl Fn(usize) -> Option<&'r Row>,
    models: &[Behind<'_>],
) -> Error {
    match error.downcast_ref().and_then(|NotFinite { index }| row_at(*index)) {
        Some(row) => not_finite(what, row, models),
        None => error,
    }
}

/// The error that `what` of `row` is not finite, with the cause in the models behind it, where it can be found: runs them
/// again, slowly.
pub fn not_finite(what: &str, row: &Row, models: &[Behind<'_>]) -> Error {
    let mut text = Packed::new();
    text.push(row.id, &[row.prompt.as_slice(), &row.response].concat());
    let cause = models.iter().find_map(|Behind { port, model, prompt }| {
        let found = model.find_not_finite(&text, *prompt).unwrap_or_else(|error| Some(format!("{error:#}")))?;
        Some(format!("`{port}` is to blame: {found}"))
    });
    let cause = cause.unwrap_or_else(|| "all weights and hidden states behind it are finite".to_owned());
    anyhow!("{what} of {} is not finite; {cause}", row_name(row.id))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Device, Tensor, Var};
    use contract::{AnyValue, Dataset, Kind, TokenizerFile};
    use lm::{Architecture, Family, LanguageModel, SoftPrompt};
    use serde_json::{Value as Json, json};

    use crate::testing::{Scratch, row};
    use crate::{distill, evaluate, finetune, prompt_init, prompt_tune, student_generate, teacher_cache};

    fn tokenizer() -> TokenizerFile {
        TokenizerFile::new("{}", 0, 40)
    }

    fn model(family: Family) -> LanguageModel {
        let shape = Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(family, 2, 16) };
        LanguageModel::init(&shape, tokenizer(), 1, &Device::Cpu).unwrap()
    }

    /// The same with one weight of `name` replaced.
    fn broken(family: Family, name: &str, value: f32) -> Arc<LanguageModel> {
        let model = model(family).trainable().unwrap();
        let weight = &model.parameters()[name];
        let mut values = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let last = values.len() - 1;
        values[if name.contains("wpe") { 0 } else { last }] = value;
        let values = Tensor::from_vec(values, weight.shape(), &Device::Cpu).unwrap();
        Var::from_tensor(weight).unwrap().set(&values).unwrap();
        Arc::new(model.frozen())
    }

    /// Ends with the last token of the vocabulary, whose embedding is the last.
    fn data() -> AnyValue {
        let rows = vec![row(3, &[1, 2], &[39, 4]), row((2 << 30) + 6, &[5], &[39, 0])];
        Arc::new(Dataset { rows, tokenizer: tokenizer() })
    }

    fn prompt() -> AnyValue {
        let model = model(Family::Gpt2);
        let vectors = model.embedding().unwrap().narrow(0, 3, 2).unwrap().contiguous().unwrap();
        Arc::new(SoftPrompt::new(vectors, &model).unwrap())
    }

    /// All that computes with a model, with it at one port, and a port's name for messages.
    fn errors(family: Family, model: &Arc<LanguageModel>) -> Vec<(&'static str, String)> {
        let scratch = Scratch::new();
        let whole: AnyValue = Arc::new(self::model(family));
        let run = |kind: &dyn Kind, config: Json, inputs: &[(&str, &AnyValue)]| {
            let inputs = inputs.iter().map(|(port, value)| (*port, Arc::clone(*value)));
            let result = scratch.run(kind, config, inputs.chain([("data", data())]).collect());
            result.err().map_or_else(|| "no error".to_owned(), |error| format!("{error:#}"))
        };
        let model: AnyValue = model.clone();
        let evaluating = |metric: &str| json!({"metrics": [metric], "seeds": [1], "max_new_tokens": 4});
        let learning = json!({"learning_rate": 1e-3, "divergence": "reverse-kl"});
        let mut errors = vec![
            ("model", run(&evaluate::Evaluate, evaluating("loss"), &[("model", &model)])),
            ("model", run(&student_generate::StudentGenerate, json!({"max_new_tokens": 4}), &[("model", &model)])),
            ("model", run(&finetune::Finetune, json!({"learning_rate": 1e-3}), &[("model", &model)])),
            ("teacher", run(&teacher_cache::TeacherCaching, json!({"keep": {"top_k": 3}}), &[("teacher", &model)])),
            ("teacher", run(&distill::Distill, learning.clone(), &[("student", &whole), ("teacher", &model)])),
            ("student", run(&distill::Distill, learning.clone(), &[("student", &model), ("teacher", &whole)])),
        ];
        if family == Family::Gpt2 {
            let tuning = json!({"learning_rate": 1e-3});
            for (port, teacher, student) in [("teacher", &model, &whole), ("student", &whole, &model)] {
                let inputs = [("teacher", teacher), ("student", student), ("prompt", &prompt())];
                errors.push((port, run(&prompt_tune::PromptTune, tuning.clone(), &inputs)));
            }
        }
        errors
    }

    #[test]
    fn a_broken_weight_anywhere_is_named_by_all_that_compute() {
        for (family, count) in [(Family::Gpt2, 28), (Family::Llama, 20)] {
            let names: Vec<String> = model(family).parameters().keys().cloned().collect();
            assert_eq!(names.len(), count);
            for (index, name) in names.iter().enumerate() {
                let value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][index % 3];
                for (port, error) in errors(family, &broken(family, name, value)) {
                    let expected = format!("`{port}` is to blame: its weight `{name}` holds {value} (1 of ");
                    assert!(error.contains(&expected), "{value} in {name}: {error}");
                    assert!(error.contains("row 4 of `train` is not finite"), "{value} in {name}: {error}");
                    // Nothing was learnt yet.
                    assert!(!error.contains("learning_rate"), "{error}");
                }
            }
        }
    }

    #[test]
    fn weights_that_are_finite_and_overflow_are_told_by_the_layer() {
        for (name, place) in [
            ("transformer.h.0.mlp.c_proj.bias", "not behind layer 1 of 2"),
            ("transformer.h.1.mlp.c_proj.bias", "not behind layer 2 of 2"),
            ("transformer.ln_f.bias", "its logits are not"),
        ] {
            // Two of them in one sum are no number any more.
            let model = model(Family::Gpt2).trainable().unwrap();
            let weight = &model.parameters()[name];
            let large = Tensor::full(2e38_f32, weight.shape(), &Device::Cpu).unwrap();
            Var::from_tensor(weight).unwrap().set(&large).unwrap();
            if name.contains("ln_f") {
                let head = model.embedding().unwrap();
                Var::from_tensor(head).unwrap().set(&head.ones_like().unwrap().detach()).unwrap();
            } else {
                let other = &model.parameters()[&name.replace("mlp", "attn")];
                Var::from_tensor(other).unwrap().set(&large).unwrap();
            }
            let (_, error) = errors(Family::Gpt2, &Arc::new(model.frozen())).swap_remove(0);
            assert!(error.contains("is not finite") && error.contains(place), "{name}: {error}");
        }
    }

    #[test]
    fn a_prompt_does_not_start_from_broken_embeddings() {
        let model: AnyValue = broken(Family::Gpt2, "transformer.wte.weight", f32::NAN);
        let run = |config: Json| Scratch::new().run(&prompt_init::PromptInit, config, vec![("model", model.clone())]);
        let end = run(json!({"length": 2, "from": "end"}));
        assert!(end.is_ok(), "its embedding is another one");
        let ended = broken(Family::Gpt2, "transformer.wpe.weight", f32::NAN);
        assert!(ended.find_not_finite(&lm::Packed::new(), None).unwrap().unwrap().contains("transformer.wpe.weight"));
    }

    #[test]
    fn a_model_that_training_breaks_is_not_a_result() {
        let inputs: Vec<(&str, AnyValue)> = vec![("data", data()), ("model", Arc::new(model(Family::Gpt2)))];
        let config = json!({"learning_rate": 1e38, "optimizer": {"weight_decay": 0.0}});
        let error = Scratch::new().run(&finetune::Finetune, config, inputs).err().expect("an error").to_string();
        assert!(error.contains("is not finite after the last update: lower `learning_rate`"), "{error}");
    }
}
