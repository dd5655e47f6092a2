//! What is said of models that pad their vocabularies differently.

use contract::Sink;
use lm::Head;

/// Says once that two models are compared over the tokens that both know.
#[derive(Default)]
pub(crate) struct Padding {
    said: bool,
}

impl Padding {
    pub(crate) fn say(&mut self, port: &str, head: &Head, other_port: &str, other: &Head, sink: &mut dyn Sink) {
        if !self.said && head.rows() != other.rows() {
            self.said = true;
            sink.note(&format!(
                "`{port}` has {} rows in its output head and `{other_port}` {}: they are compared over the {} tokens of their \
                 tokenizer, and what is behind them is padding",
                head.rows(),
                other.rows(),
                head.tokens.min(other.tokens),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;
    use contract::{AnyValue, Dataset, Kind, TokenizerFile};
    use lm::{Architecture, Family, LanguageModel, SoftPrompt};
    use serde_json::{Value as Json, json};

    use crate::testing::{Scratch, output, row};
    use crate::{distill, evaluate, prompt_tune, student_generate, teacher_cache};

    fn tokenizer(size: u32) -> TokenizerFile {
        let vocabulary: serde_json::Map<String, Json> = (0..size).map(|id| (format!("t{id}"), json!(id))).collect();
        let json = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}});
        TokenizerFile::new(json.to_string(), 0, size)
    }

    /// A model over 40 tokens whose embedding has so many rows more. The others do not depend on that.
    fn model(layers: usize, padding: u32) -> AnyValue {
        let shape = Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(Family::Gpt2, layers, 16) };
        let mut model = LanguageModel::init(&shape, tokenizer(40 + padding), 1, &Device::Cpu).unwrap();
        model.tokenizer = tokenizer(40);
        assert_eq!((model.vocabulary(), model.vocab_size()), (40, 40 + padding as usize));
        Arc::new(model)
    }

    fn data() -> AnyValue {
        let rows = vec![row(3, &[1, 2], &[39, 4]), row(9, &[5], &[7, 0])];
        Arc::new(Dataset { rows, tokenizer: tokenizer(40) })
    }

    fn rows(kind: &dyn Kind, config: Json, inputs: Vec<(&str, AnyValue)>) -> Json {
        let inputs = inputs.into_iter().chain([("data", data())]).collect();
        json!(Scratch::new().run(kind, config, inputs).unwrap().1.rows)
    }

    #[test]
    fn a_padded_target_teaches_what_it_teaches_without_padding() {
        for divergence in ["forward-kl", "reverse-kl"] {
            let config = json!({"divergence": divergence, "learning_rate": 1e-3});
            let learnt = |padding| {
                let inputs = vec![("student", model(1, 0)), ("teacher", model(2, padding))];
                rows(&distill::Distill, config.clone(), inputs)
            };
            assert_eq!(learnt(8), learnt(0), "{divergence}");
            let cached = |padding| {
                let inputs = vec![("teacher", model(2, padding)), ("data", data())];
                let keep = json!({"keep": {"top_k": 40}});
                let scratch = Scratch::new();
                let made = scratch.run(&teacher_cache::TeacherCaching, keep, inputs).unwrap().0;
                rows(
                    &distill::Distill,
                    config.clone(),
                    vec![("student", model(1, 3)), ("cache", made.0["cache"].clone())],
                )
            };
            assert_eq!(cached(8), cached(0), "{divergence}");
        }
        let prompt = || -> AnyValue {
            let Ok(teacher) = model(2, 0).into_any().downcast::<LanguageModel>() else { panic!("a model") };
            Arc::new(
                SoftPrompt::new(teacher.embedding().unwrap().narrow(0, 3, 2).unwrap().contiguous().unwrap(), &teacher)
                    .unwrap(),
            )
        };
        let tuned = |padding| {
            let inputs = vec![("teacher", model(2, 0)), ("student", model(1, padding)), ("prompt", prompt())];
            rows(&prompt_tune::PromptTune, json!({"learning_rate": 1e-3}), inputs)
        };
        assert_eq!(tuned(8), tuned(0));
        let distance = |padding| {
            let config = json!({"metrics": ["reverse_kl"], "seeds": [1, 2], "max_new_tokens": 6});
            let inputs = vec![("model", model(1, 0)), ("teacher", model(2, padding)), ("data", data())];
            let outputs = Scratch::new().run(&evaluate::Evaluate, config, inputs).unwrap().0;
            output::<contract::Metrics>(&outputs, "metrics").0.clone()
        };
        assert_eq!(distance(8)["reverse_kl"], distance(0)["reverse_kl"]);
    }

    #[test]
    fn padding_is_never_written() {
        // Most of the rows are padding, and at first all are about as likely.
        let inputs = vec![("model", model(1, 400)), ("data", data())];
        let config = json!({"max_new_tokens": 28, "seed": 4});
        let outputs = Scratch::new().run(&student_generate::StudentGenerate, config, inputs).unwrap().0;
        let written = output::<Dataset>(&outputs, "data");
        let ids: Vec<u32> = written.rows.iter().flat_map(|row| row.response.clone()).collect();
        assert!(ids.len() > 4 && ids.iter().all(|id| *id < 40), "{ids:?}");
    }
}
