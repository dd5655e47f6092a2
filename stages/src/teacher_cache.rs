//! `teacher-cache`: what a frozen teacher says of a fixed text, computed once and kept.
//!
//! ```yaml
//! said:
//!   kind: teacher-cache
//!   in: {teacher: teacher, data: data.train}
//!   with: {rows: 1500}
//! ```
//!
//! `distill` with this on its port `cache` never runs the teacher: however many epochs, variants and runs learn from the
//! text, its forward pass was paid once. `keep: hidden` keeps the final hidden state of every response token, and the
//! teacher's output head, the only part that still runs: it gives the same bits as the whole teacher would. `keep: {top_k: K}`
//! keeps the K likeliest tokens and the mass of the rest, and biases the loss downwards: see `TopK` of `lm`.
//! Inputs: `teacher`, `data`, and the teacher's soft prompt. Rows are found by id, and must have the prompt and the response
//! that the student reads; with `cache_prompts: any` in `distill` the teacher may read another prompt (response priming).
//! Outputs: `cache`. Cost: one forward pass of the teacher. Disk, per response token: 4 bytes a channel (`storage: bf16`: 2),
//! or 8 bytes a kept token; beside hidden states once the head, 4 bytes a channel for each token of the vocabulary.
//!
//! Measured on SmolLM2-135M-Instruct (4 bits a weight, 576 channels, 49,152 tokens) over 2,116 response tokens of GSM8K: hidden states take
//! 2,304 bytes a token (and 113 MB once), the 8 likeliest tokens 68, all logits (`{top_k: 49152}`) 393,220. In CPU time of the whole
//! process, prompts read among it, 94 response tokens a second are kept as hidden states, 75 as the 64 likeliest, 60 as all logits.

use anyhow::ensure;
use contract::limits;
use contract::{
    About, AnyValue, Cause, ConfigError, Dataset, Env, Facts, Inputs, Operator, Outlook, Outputs, PortType, Ports,
    Result, Row, Sink, Stage, Step,
};
use lm::loss::TopK;
use lm::{Dtype, Keep, LanguageModel, Response, Said, SoftPrompt, Storage, TeacherCacheWriter};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aligned::{Aligned, Reader, View};
use crate::finite::{Behind, explain};
use crate::foresight;

/// The `with` of `teacher-cache`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is kept of every response token: `hidden`, exact, or `{top_k: K}`, small and biased.
    #[serde(default)]
    pub keep: Keep,
    /// The type of the hidden states: `f32`, exact, or `bf16`, half the size and rounded to 8 bits.
    #[serde(default)]
    pub storage: Storage,
    /// Temperature of the probabilities that `top_k` keeps: that of the stages that learn from them.
    #[serde(default = "one")]
    #[schemars(range(min = limits::TEMPERATURE.0, max = limits::TEMPERATURE.1))]
    pub temperature: f64,
    /// Only the first so many rows, as a window's `rows`.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::ROWS))]
    pub rows: Option<u64>,
    /// Rows that go through the teacher at once: a matter of memory.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1, max = limits::BATCH))]
    pub batch: u64,
    /// Type that matrices are multiplied in; `bf16` needs a GPU.
    #[serde(default)]
    pub dtype: Dtype,
}

fn one() -> f64 {
    1.0
}

fn default_batch() -> u64 {
    16
}

/// The kind.
pub struct TeacherCaching;

impl Stage for TeacherCaching {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "teacher-cache",
            // 2: fingerprints of prompts. 3: the head is kept beside hidden states.
            version: 3,
            numerics: Some(lm::NUMERICS),
            summary: "keeps what a frozen teacher says of a fixed text, so that it never runs twice",
            example: "kind: teacher-cache\nin: {teacher: teacher, data: data.train}\nwith: {keep: hidden}",
            reads_clock: false,
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let Config { keep, storage, temperature, .. } = config;
        let mut errors = Vec::new();
        match keep {
            Keep::TopK(_) if *storage != Storage::F32 => errors.push(
                ConfigError::at("storage", "only hidden states have a choice of type")
                    .hint("leave it out, or say `keep: hidden`"),
            ),
            Keep::Hidden if *temperature != 1.0 => errors.push(
                ConfigError::at("temperature", "hidden states serve every temperature")
                    .hint("leave it out, and set it where the cache is learnt from"),
            ),
            _ => {}
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("teacher", PortType::Model, "the teacher, frozen")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the teacher")
            .optional("view", PortType::Dataset, "rows of the same ids whose prompts the teacher reads instead")
            .input("data", PortType::Dataset, "the text, given or written once")
            .output("cache", PortType::TeacherCache, "what the teacher says of every response token")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let data = outlook.input("data");
        outlook.holds("teacher");
        outlook.same_vocabulary(&["data", "view", "teacher"]);
        outlook.same_end("data", "teacher");
        outlook.same_width("teacher", "prompt");
        outlook.reads("teacher", Some("prompt"), &outlook.rows("data").of_first(config.rows));
        outlook.takes_rows("data", "rows", config.rows);
        foresight::computes_in(outlook, config.dtype);
        if data.responses.most == 0 {
            let causes = [Cause::Input("data".into(), "source".into())];
            outlook.error(causes, "the text has no response to keep anything of", "choose another split");
        }
        outlook.output("cache", Facts { vocabulary: data.vocabulary, ..Facts::default() });
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Caching { config, env: env.clone() }))
    }
}

struct Caching {
    config: Config,
    env: Env,
}

impl Operator for Caching {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let Config { keep, storage, temperature, rows, batch, dtype } = self.config;
        let teacher = inputs.take::<LanguageModel>("teacher")?;
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let view = View::take(&mut inputs)?;
        let data = inputs.take::<Dataset>("data")?;
        let rows: Vec<&Row> = (data.rows.iter())
            .take(rows.map_or(usize::MAX, |rows| rows as usize))
            .filter(|row| Aligned::tokens_of(row) > 0)
            .collect();
        ensure!(!rows.is_empty(), "the text has no response to keep anything of");

        let responses: Vec<Response<'_>> = (rows.iter())
            .map(|row| Response { row: row.id, prompt: Aligned::prompt_of(row), tokens: Aligned::response_of(row) })
            .collect();
        // Of the model as it came: its head is kept exactly.
        let mut cache = TeacherCacheWriter::new(&self.env.scratch, &teacher, keep, storage, temperature, &responses)?;
        let teacher = teacher.frozen().computed_in(dtype)?;
        let head = teacher.output_head()?.of_tokens()?;
        let reader = Reader { model: &teacher, prompt: prompt.as_ref(), view: view.as_ref() };
        let mut done = 0;
        for rows in rows.chunks(batch as usize) {
            let text = Aligned::of(rows.iter().copied());
            let hidden = reader.hidden(&text)?; // [tokens, C]
            let said = match keep {
                Keep::Hidden => Ok(Said::Hidden(hidden)),
                Keep::TopK(k) => TopK::of(&hidden, &head, k, temperature).map(Said::TopK),
            };
            said.and_then(|said| cache.push(rows.len(), &said)).map_err(|error| {
                let row = |token| text.responses.iter().position(|response| response.contains(&token));
                let models = [Behind::new("teacher", &teacher, prompt.as_ref())];
                explain(error, "what the teacher says", |token| row(token).map(|row| rows[row]), &models)
            })?;
            done += rows.len() as u64;
            sink.progress(done, responses.len() as u64, "rows");
        }
        Ok(Outputs::new().with("cache", cache.finish()?))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::{Device, Tensor};
    use contract::{End, Kind, TokenizerFile};
    use lm::{Architecture, Family, Packed, TeacherCache};
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::corpus::{self, CorpusRow, Split};
    use crate::distill::Distill;
    use crate::testing::{Scratch, input, output};
    use crate::text::{SpecialTokens, Text};
    use crate::tokenize::Tokenize;

    const VOCABULARY: u32 = 40;

    fn tokenizer() -> TokenizerFile {
        TokenizerFile::new("{}", 0, VOCABULARY)
    }

    fn model(layers: usize, width: usize, seed: u64) -> AnyValue {
        let shape = Architecture {
            heads: Some(2),
            positions: Some(32),
            dropout: Some(0.1),
            ..Architecture::new(Family::Gpt2, layers, width)
        };
        Arc::new(LanguageModel::init(&shape, tokenizer(), seed, &Device::Cpu).unwrap())
    }

    fn teacher() -> AnyValue {
        model(2, 64, 1)
    }

    /// Nine rows of many lengths; one has no response, one no prompt, one is a single token.
    fn data() -> Dataset {
        let ids = |seed: u32, count: u32| (0..count).map(|i| (seed * 7 + i * i + 3 * i) % VOCABULARY).collect();
        let lengths = [(3, 4), (1, 1), (5, 9), (4, 0), (0, 6), (8, 2), (2, 7), (1, 3), (6, 5)];
        let row = |(index, (prompt, response)): (usize, (u32, u32))| Row {
            id: (1 << 40) - index as u64,
            prompt: ids(index as u32, prompt),
            response: ids(index as u32 + 20, response),
            end: End::Stop,
            log_probs: None,
            references: Vec::new(),
            family: None,
        };
        Dataset { rows: lengths.into_iter().enumerate().map(row).collect(), tokenizer: tokenizer() }
    }

    fn soft_prompt() -> AnyValue {
        let Ok(teacher) = teacher().into_any().downcast::<LanguageModel>() else { panic!("a model") };
        let vectors = teacher.embedding().unwrap().narrow(0, 3, 4).unwrap().contiguous().unwrap();
        Arc::new(SoftPrompt::new(vectors, &teacher).unwrap())
    }

    fn cache(scratch: &Scratch, config: Json, prompted: bool) -> AnyValue {
        let mut inputs: Vec<(&str, AnyValue)> = vec![("teacher", teacher()), ("data", Arc::new(data()))];
        inputs.extend(prompted.then(|| ("prompt", soft_prompt())));
        output::<TeacherCache>(&scratch.run(&TeacherCaching, config, inputs).unwrap().0, "cache")
    }

    /// The files of a value, by name.
    fn files(value: &AnyValue) -> Vec<(String, Vec<u8>)> {
        let folder = tempfile::tempdir().unwrap();
        value.save(folder.path()).unwrap();
        let entries = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries.map(|path| (name(&path), std::fs::read(&path).unwrap())).collect();
        files.sort();
        files
    }

    fn name(path: &Path) -> String {
        path.file_name().unwrap().to_str().unwrap().to_owned()
    }

    /// What a student has become after an update on all of the data, the second half first, and its metrics.
    fn learn(
        scratch: &Scratch,
        config: &Json,
        inputs: &[(&'static str, AnyValue)],
    ) -> contract::Result<(AnyValue, Json)> {
        let mut data = data();
        data.rows.rotate_left(4);
        let mut all: Vec<(&str, AnyValue)> = vec![("data", Arc::new(data)), ("student", model(1, 16, 2))];
        all.extend(inputs.iter().cloned());
        let (outputs, log) = scratch.run(&Distill, config.clone(), all)?;
        Ok((outputs.0["model"].clone(), json!(log.rows)))
    }

    #[test]
    fn a_student_of_the_cache_has_the_bits_of_one_of_the_teacher() {
        let scratch = Scratch::new();
        for (prompted, change) in [
            (false, json!({"divergence": "reverse-kl"})),
            (false, json!({"divergence": "forward-kl", "temperature": 2.0, "weight": 0.5, "cross_entropy": 0.5})),
            (true, json!({"divergence": {"jsd": {"beta": 0.3}}})),
        ] {
            for (micro_batch, batch) in [(json!(null), 16), (json!(1), 4), (json!(4), 1)] {
                let mut config = change.clone();
                config["learning_rate"] = json!(1e-2);
                config["micro_batch"] = micro_batch;
                let mut plain = vec![("teacher", teacher())];
                plain.extend(prompted.then(|| ("prompt", soft_prompt())));
                let right = learn(&scratch, &config, &plain).unwrap();
                let kept = cache(&scratch, json!({"batch": batch}), prompted);
                // A teacher beside it is no use, and no harm.
                for inputs in [vec![("cache", kept.clone())], vec![("teacher", teacher()), ("cache", kept)]] {
                    let found = learn(&scratch, &config, &inputs).unwrap();
                    assert!(files(&found.0) == files(&right.0), "{config}: other weights");
                    assert_eq!(found.1, right.1, "{config}");
                }
            }
        }
    }

    #[test]
    fn rows_that_go_through_the_teacher_together_change_no_bit() {
        let scratch = Scratch::new();
        for keep in [json!("hidden"), json!({"top_k": 5})] {
            let made = |batch| files(&cache(&scratch, json!({"keep": keep, "batch": batch}), true));
            let right = made(16);
            assert!(right.iter().any(|(name, bytes)| name == "shard-00000.safetensors" && bytes.len() > 1000));
            assert!([1, 2, 5].into_iter().all(|batch| made(batch) == right), "{keep}");
        }
    }

    #[test]
    fn likeliest_tokens_teach_without_a_teacher() {
        let scratch = Scratch::new();
        let config = json!({"divergence": "forward-kl", "temperature": 1.5, "learning_rate": 1e-2, "micro_batch": 4});
        let (_, right) = learn(&scratch, &config, &[("teacher", teacher())]).unwrap();
        let loss = |k: u32| {
            let kept = cache(&scratch, json!({"keep": {"top_k": k}, "temperature": 1.5}), false);
            let (_, rows) = learn(&scratch, &config, &[("cache", kept)]).unwrap();
            [rows[0]["forward_kl"].as_f64().unwrap(), rows[0]["gradient_norm"].as_f64().unwrap()]
        };
        let right = [right[0]["forward_kl"].as_f64().unwrap(), right[0]["gradient_norm"].as_f64().unwrap()];
        let all = loss(VOCABULARY);
        assert!(all.iter().zip(right).all(|(all, right)| (all / right - 1.0).abs() < 1e-3), "{all:?} {right:?}");
        let few = loss(3);
        assert!(few[0] > 0.0 && few[0] < right[0], "{few:?}, not below {right:?}");
    }

    #[test]
    fn half_the_bytes_lose_little() {
        let scratch = Scratch::new();
        let config = json!({"divergence": "forward-kl", "learning_rate": 1e-2});
        let norm = |storage: &str| {
            let made = cache(&scratch, json!({"storage": storage}), false);
            let bytes = files(&made).iter().find(|(name, _)| name.starts_with("shard")).unwrap().1.len();
            let (_, rows) = learn(&scratch, &config, &[("cache", made)]).unwrap();
            (bytes, rows[0]["gradient_norm"].as_f64().unwrap())
        };
        let ((whole, right), (half, found)) = (norm("f32"), norm("bf16"));
        assert!(half < whole * 55 / 100, "{half} of {whole} bytes");
        assert!(found != right && (found / right - 1.0).abs() < 1e-2, "{found} {right}");
    }

    #[test]
    fn what_does_not_go_together_says_what_to_do() {
        let scratch = Scratch::new();
        let config = json!({"divergence": "forward-kl", "learning_rate": 1e-2});
        let hidden = || ("cache", cache(&scratch, json!({}), false));
        let top_k = || ("cache", cache(&scratch, json!({"keep": {"top_k": 3}}), false));
        let few = || ("cache", cache(&scratch, json!({"rows": 3}), false));
        let error = |inputs: &[(&'static str, AnyValue)], config: &Json| {
            learn(&scratch, config, inputs).err().map(|error| format!("{error:#}")).expect("an error")
        };
        let warm = json!({"divergence": "forward-kl", "learning_rate": 1e-2, "temperature": 2.0});
        for (inputs, config, said) in [
            (vec![], &config, "connect `teacher`, `teachers` or `cache`"),
            (vec![hidden(), ("teacher", model(2, 64, 5))], &config, "was made by another model than this teacher"),
            (vec![hidden(), ("teacher", model(1, 16, 5))], &config, "was made by another model than this teacher"),
            (
                vec![hidden(), ("teacher", teacher()), ("prompt", soft_prompt())],
                &config,
                "`prompt` does nothing beside",
            ),
            (vec![top_k(), ("teacher", teacher())], &config, "remove the input `teacher`"),
            (vec![top_k()], &warm, "`temperature` is 2, and the cache keeps the likeliest tokens at temperature 1"),
            (vec![few(), ("teacher", teacher())], &config, "is not in the teacher cache, which holds 3 rows"),
        ] {
            let found = error(&inputs, config);
            assert!(found.contains(said), "{found}");
        }
    }

    /// A teacher that reads more than the student does, by mistake or on purpose.
    #[test]
    fn a_cache_behind_other_prompts_must_be_meant() {
        let scratch = Scratch::new();
        let mut primed = data();
        primed.rows.iter_mut().filter(|row| !row.prompt.is_empty()).for_each(|row| row.prompt.insert(0, 9));
        let inputs = vec![("teacher", teacher()), ("data", Arc::new(primed) as AnyValue)];
        let cache = scratch.run(&TeacherCaching, json!({}), inputs).unwrap().0;
        let inputs = [("cache", cache.0["cache"].clone())];
        let mut config = json!({"divergence": "forward-kl", "learning_rate": 1e-2});
        let error = learn(&scratch, &config, &inputs).err().map(|error| format!("{error:#}")).expect("an error");
        assert!(
            error.contains("is not the one that the teacher read") && error.contains("`cache_prompts: any`"),
            "{error}"
        );
        config["cache_prompts"] = json!("any");
        learn(&scratch, &config, &inputs).unwrap();
    }

    /// A tokenizer without a chat template, and one with.
    fn tokenizers() -> [(TokenizerFile, &'static str); 2] {
        let fixture: Json = serde_json::from_str(include_str!("../tests/fixtures/chat.json")).unwrap();
        let style = &fixture["templates"]["llama3"];
        let settings = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": style["begin"],
            "eos_token": "<|endoftext|>", "chat_template": style["template"]});
        let files = [("tokenizer.json", &fixture["tokenizer"]), ("tokenizer_config.json", &settings)];
        let files = files.map(|(name, json)| (name.to_owned(), json.to_string().into_bytes())).into();
        let chat = crate::tokenizer::open_files("a".into(), files, None).unwrap().tokenizer;
        [(crate::train_tokenizer::from_merges(&[]), "none"), (chat, "chat")]
    }

    /// Response priming rests on this: whatever a teacher is told before the question, its distributions of the answer's tokens are
    /// those of the same model that reads prefix, question and answer as one text, by itself, bit for bit.
    #[test]
    fn a_primed_teacher_says_of_an_answer_what_it_says_in_the_whole_text() {
        let scratch = Scratch::new();
        let row = |(id, (asked, answer)): (usize, (&str, &str))| CorpusRow {
            id: id as u64,
            instruction: asked.into(),
            output: answer.into(),
            references: vec![answer.into()],
            ..CorpusRow::default()
        };
        let texts = [("a b", "c"), ("abc abc abc", "b c b c a a"), ("c", "a b c")];
        let corpus = scratch.path().join("corpus");
        std::fs::create_dir(&corpus).unwrap();
        corpus::write(&corpus, Split::Train, &texts.into_iter().enumerate().map(row).collect::<Vec<_>>()).unwrap();
        [Split::Valid, Split::Test].iter().for_each(|split| corpus::write(&corpus, *split, &[]).unwrap());
        for (file, template) in tokenizers() {
            let folder = scratch.path().join(template);
            std::fs::create_dir(&folder).unwrap();
            file.save(&folder).unwrap();
            let text = Text::new(&file, SpecialTokens::Text).unwrap();
            let shape =
                Architecture { heads: Some(2), positions: Some(512), ..Architecture::new(Family::Llama, 2, 32) };
            let teacher = Arc::new(LanguageModel::init(&shape, file.clone(), 3, &Device::Cpu).unwrap());
            let rows = |before: &str| {
                let with = json!({"template": template, "max_prompt_length": 400, "prime": {"before": before}});
                let inputs = vec![
                    ("corpus", input(PortType::Corpus, &corpus)),
                    ("tokenizer", input(PortType::Tokenizer, &folder)),
                ];
                output::<Dataset>(&scratch.run(&Tokenize, with, inputs).unwrap().0, "train")
            };
            let data = rows("");
            for before in ["", "a", "b a c. ", &"a c b ".repeat(50)] {
                let seen = rows(before);
                let aligned = Aligned::of(&data.rows);
                let view = View::of(seen.clone());
                let reader = Reader { model: &teacher, prompt: None, view: Some(&view) };
                let said = reader.hidden(&aligned).unwrap();
                let inputs: Vec<(&str, AnyValue)> =
                    vec![("teacher", teacher.clone()), ("data", data.clone()), ("view", seen.clone())];
                let cache =
                    output::<TeacherCache>(&scratch.run(&TeacherCaching, json!({}), inputs).unwrap().0, "cache");
                let Said::Hidden(cached) = cache.read(&aligned.rows(), lm::Prompts::Same, &Device::Cpu).unwrap() else {
                    panic!("hidden states")
                };
                let head = teacher.output_head().unwrap().weight;
                let distributions = |hidden: &Tensor| TopK::of(hidden, &head, head.dims()[0], 1.0).unwrap();
                for ((row, seen), labels) in data.rows.iter().zip(&seen.rows).zip(&aligned.responses) {
                    let ids = [seen.prompt.as_slice(), &row.response].concat();
                    if template == "none" {
                        let (asked, answer) = texts[row.id as usize];
                        let whole = text.encode(&format!("{before}{asked}\n{answer}")).unwrap();
                        assert_eq!(ids, [whole, vec![text.end()]].concat());
                    }
                    assert!(ids.len() - row.prompt.len() - row.response.len() >= before.len() / 6, "{before}");
                    let mut alone = Packed::new();
                    alone.push(99, &ids);
                    let alone = teacher.hidden(&alone, None, None).unwrap();
                    let expected = distributions(&alone.narrow(0, seen.prompt.len() - 1, row.response.len()).unwrap());
                    for found in [&said, &cached] {
                        let found = distributions(&found.narrow(0, labels.start, labels.len()).unwrap());
                        assert!(found == expected, "{template}, behind {} bytes", before.len());
                    }
                }
            }
        }
    }

    #[test]
    fn fields_that_disagree_are_named() {
        let faults = |config: Json| {
            let errors =
                Kind::resolve(&TeacherCaching, &config, contract::Conventions::Sound).err().unwrap_or_default();
            errors.iter().map(|error| error.path.join(".")).collect::<Vec<_>>()
        };
        assert_eq!(faults(json!({"keep": {"top_k": 2}, "storage": "bf16"})), ["storage"]);
        assert_eq!(faults(json!({"temperature": 2.0})), ["temperature"]);
        assert_eq!(faults(json!({"keep": {"top_k": 2}, "temperature": 2.0})), [""; 0]);
    }
}
