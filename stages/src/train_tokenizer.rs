//! `train-tokenizer`: byte-level BPE over the training split of a corpus.
//!
//! ```yaml
//! tokenizer:
//!   kind: train-tokenizer
//!   in: {corpus: corpus}
//!   with: {vocab_size: 1024, template: task}
//! ```
//!
//! Input: `corpus`. Output: `tokenizer`, a folder that this program and `transformers` open. Cost: a few seconds
//! for ten megabytes of text.
//!
//! Text is learned as `tokenize` will write it, template and persona lines included, so that their words become tokens.
//! The vocabulary holds the end token `<|endoftext|>` (id 0), the 256 bytes, then merges; any text can be encoded.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use contract::dataset::row_name;
use contract::limits;
use contract::{
    About, AnyValue, Bounds, Cause, Env, Facts, Folder, Inputs, Operator, Outlook, Outputs, PortType, Ports, Sink,
    Stage, Step, TokenizerFile, Vocabulary,
};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::fixed_length::FixedLength;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use crate::corpus::{self, CorpusRow, Split};
use crate::template::{Personas, Template};
use crate::text::byte_level;

/// The token that ends a text, and pads.
pub const END_TOKEN: &str = "<|endoftext|>";

/// Tokens that every vocabulary holds: the end token and the 256 bytes.
const BASE: usize = 257;

/// Longest word that is learnt from as one, in bytes; a longer one is learnt from in pieces. No word of any language is as
/// long, and what is as long is no word: numbers, keys, files in letters.
const LONGEST_WORD: usize = 1000;

/// The stage kind.
pub struct TrainTokenizer;

/// Its `with`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Number of tokens, the end token and the 256 bytes included. Fewer come out where the text has no more to merge.
    #[schemars(range(min = 257, max = limits::VOCABULARY))]
    pub vocab_size: usize,
    /// Text around the instruction: what `tokenize` will use.
    #[serde(default)]
    pub template: Template,
    /// Persona lines before some prompts, where some dataset will have them; none by default.
    #[serde(default)]
    pub personas: Option<Personas>,
    /// A pair seen less often is not merged. 2: what is seen once is no pattern.
    #[serde(default = "min_frequency")]
    #[schemars(range(min = 1, max = limits::COUNT))]
    pub min_frequency: u64,
}

fn min_frequency() -> u64 {
    2
}

impl Stage for TrainTokenizer {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "train-tokenizer",
            // 2: words of more than a thousand bytes are learnt from in pieces.
            version: 2,
            numerics: None,
            summary: "trains a byte-level BPE tokenizer on the training split of a corpus",
            example: "tokenizer:\n  kind: train-tokenizer\n  in: {corpus: corpus}\n  with: {vocab_size: 1024}\n",
            reads_clock: false,
        }
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new().input("corpus", PortType::Corpus, "text by split; `train` is read").output(
            "tokenizer",
            PortType::Tokenizer,
            "the trained tokenizer",
        )
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        if outlook.input("corpus").row_count().most == 0 {
            let causes = [Cause::Input("corpus".into(), "rows".into())];
            outlook.error(causes, "the corpus has no training rows to learn a tokenizer from", "give it some");
        }
        let size = Bounds { least: BASE as u64, most: config.vocab_size as u64 };
        let vocabulary = Vocabulary { size, ..Vocabulary::default() };
        outlook.output("tokenizer", Facts { vocabulary: Some(vocabulary), ends: Some(vec![0]), ..Facts::default() });
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Run { config, folder: env.scratch.join("tokenizer") }))
    }
}

struct Run {
    config: Config,
    folder: PathBuf,
}

impl Operator for Run {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let corpus = inputs.take::<Folder>("corpus")?;
        let rows = corpus::read(corpus.path(), Split::Train)?;
        ensure!(!rows.is_empty(), "the corpus has no training rows to learn a tokenizer from");
        say_long_words(&rows, sink);
        let tokenizer = train(&rows, &self.config)?;
        if (tokenizer.size as usize) < self.config.vocab_size {
            sink.warn(&format!(
                "the text has no more to merge after {} tokens; `vocab_size` asked for {}",
                tokenizer.size, self.config.vocab_size
            ));
        }
        fs::create_dir_all(&self.folder)?;
        tokenizer.save(&self.folder)?;
        Ok(Outputs::new().with("tokenizer", Folder::new(PortType::Tokenizer, &self.folder)))
    }
}

/// Names the first row with a word that is no word.
fn say_long_words(rows: &[CorpusRow], sink: &mut dyn Sink) {
    let longest = |text: &String| text.split_whitespace().map(str::len).max().unwrap_or(0);
    let found: Vec<(u64, usize)> = rows
        .par_iter()
        .filter_map(|row| {
            let CorpusRow { instruction, input, prompt, output, .. } = row;
            let parts = [Some(instruction), Some(input), prompt.as_ref(), Some(output)];
            let bytes = parts.into_iter().flatten().map(longest).max().unwrap_or(0);
            (bytes > LONGEST_WORD).then_some((row.id, bytes))
        })
        .collect();
    if let Some((first, bytes)) = found.first() {
        sink.note(&format!(
            "{} of {} rows have a word of more than {LONGEST_WORD} bytes, first {} with {bytes}: it is learnt from in pieces",
            found.len(),
            rows.len(),
            row_name(*first)
        ));
    }
}

/// Trains on the text of `rows`. Ties go to the pair of smaller ids, so the result depends on the text alone.
fn train(rows: &[CorpusRow], config: &Config) -> Result<TokenizerFile> {
    let texts = rows.iter().map(|row| {
        let mut text = config.personas.as_ref().and_then(|personas| personas.line(row.id)).unwrap_or_default();
        text.push_str(&config.template.prompt(row)?);
        text.push_str(&config.template.response(&row.output));
        Ok(text)
    });
    let texts = texts.collect::<Result<Vec<String>>>()?;
    // A byte is merged away once at most; the trainer makes room for as many tokens as it is told.
    let bytes: usize = texts.iter().map(String::len).sum();
    let trainer = BpeTrainer::builder()
        .vocab_size(config.vocab_size.min(BASE + bytes))
        .min_frequency(config.min_frequency)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_TOKEN, true)])
        .show_progress(false)
        .build();
    let mut tokenizer = byte_level(BPE::default());
    let words = tokenizer.get_pre_tokenizer().cloned();
    // The trainer takes time by the square of the longest word.
    let pieces = words.iter().cloned().chain([FixedLength::new(LONGEST_WORD).into()]).collect();
    tokenizer.with_pre_tokenizer(Some(Sequence::new(pieces)));
    tokenizer
        .train(&mut TrainerWrapper::from(trainer), texts.iter())
        .map_err(|e| anyhow!("cannot train a tokenizer: {e}"))?;
    tokenizer.with_pre_tokenizer(words);
    finish(&tokenizer)
}

fn finish(tokenizer: &Tokenizer) -> Result<TokenizerFile> {
    let json = tokenizer.to_string(false).map_err(|e| anyhow!("cannot write a tokenizer: {e}"))?;
    let end = tokenizer.token_to_id(END_TOKEN).context("the trained tokenizer has no end token")?;
    let size = tokenizer.get_vocab_size(true) as u32;
    Ok(TokenizerFile::new(json, end, size))
}

/// A tokenizer of the end token, the bytes and some merges, each `LEFT RIGHT`.
#[cfg(test)]
pub(crate) fn from_merges(merges: &[&str]) -> TokenizerFile {
    use std::collections::BTreeSet;
    let merges: Vec<(String, String)> =
        merges.iter().map(|m| m.split_once(' ').unwrap()).map(|(left, right)| (left.into(), right.into())).collect();
    let bytes: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
    let tokens = [END_TOKEN.to_owned()].into_iter().chain(bytes.into_iter().map(String::from));
    let tokens = tokens.chain(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let vocabulary: tokenizers::models::bpe::Vocab = tokens.zip(0..).collect();
    let mut tokenizer = byte_level(BPE::builder().vocab_and_merges(vocabulary, merges).build().unwrap());
    tokenizer.add_special_tokens([AddedToken::from(END_TOKEN, true)]).unwrap();
    finish(&tokenizer).unwrap()
}

/// A tokenizer trained on some rows of the built-in corpus.
#[cfg(test)]
pub(crate) fn trained(vocab_size: usize) -> TokenizerFile {
    use crate::instruct::{Builtin, Sizes, generate};

    let [rows, ..] = generate(Builtin::Instruct, 0, &Sizes { train: 400, valid: 0, test: 0 });
    let config = serde_json::json!({"vocab_size": vocab_size, "template": "task"});
    train(&rows, &serde_json::from_value(config).unwrap()).unwrap()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::instruct::{Builtin, Sizes, generate};
    use crate::template::persona_line;
    use crate::testing::{Scratch, folder, input};
    use crate::text::{SpecialTokens, Text};

    fn builtin() -> Vec<CorpusRow> {
        let [train, ..] = generate(Builtin::Instruct, 0, &Sizes { train: 8000, valid: 0, test: 0 });
        train
    }

    fn config(json: serde_json::Value) -> Config {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_persona_line_is_seven_tokens_and_answers_are_short() {
        let rows = builtin();
        for template in ["task", "alpaca"] {
            let config = config(json!({"vocab_size": 1024, "template": template, "personas": {}}));
            let tokenizer = train(&rows, &config).unwrap();
            let text = Text::new(&tokenizer, SpecialTokens::Parse).unwrap();
            assert_eq!((tokenizer.size, tokenizer.end), (1024, 0));
            let line = persona_line("student");
            assert_eq!(line, "Suppose you are a student.\n");
            assert_eq!(text.count(&line).unwrap(), 7);
            // At the seam too: the line's ids stand unchanged before a prompt.
            let prompt = config.template.prompt(&rows[0]).unwrap();
            let whole = text.encode(&format!("{line}{prompt}")).unwrap();
            assert_eq!(whole, [text.encode(&line).unwrap(), text.encode(&prompt).unwrap()].concat());
            let tokens = |part: &dyn Fn(&CorpusRow) -> String| -> Vec<usize> {
                rows.iter().map(|row| text.count(&part(row)).unwrap()).collect()
            };
            let responses = tokens(&|row| config.template.response(&row.output));
            let mean = responses.iter().sum::<usize>() as f64 / responses.len() as f64;
            assert!((11.0..18.0).contains(&mean), "{mean}");
            assert!(*responses.iter().max().unwrap() <= 45);
            let prompts = tokens(&|row| config.template.prompt(row).unwrap());
            assert!(prompts.iter().zip(&responses).all(|(p, r)| p + r < 96));
        }
    }

    /// Whoever changes what is learned gives `train-tokenizer` a new version.
    #[test]
    fn the_tokenizer_is_the_one_that_this_version_trains() {
        let tokenizer = train(&builtin(), &config(json!({"vocab_size": 1024, "template": "task"}))).unwrap();
        assert_eq!((tokenizer.size, tokenizer.vocabulary().meaning.as_deref()), (1024, Some("3:cfbabce135001084")));
    }

    #[test]
    fn the_same_text_gives_the_same_bytes_on_any_number_of_threads() {
        let rows = builtin();
        let config = config(json!({"vocab_size": 700, "template": "task"}));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| train(&rows, &config).unwrap())
        };
        let first = on(1);
        // Maps inside of the library are seeded anew each time.
        assert!([1, 2, 2, 4].into_iter().all(|threads| on(threads) == first));
    }

    #[test]
    fn ties_go_to_the_smaller_ids_and_rare_pairs_are_left() {
        let learned = |text: &str, frequency: u64| {
            let row = CorpusRow { instruction: text.into(), output: String::new(), ..builtin().remove(0) };
            let config = config(json!({"vocab_size": 300, "template": "none", "min_frequency": frequency}));
            let json: serde_json::Value = serde_json::from_slice(&train(&[row], &config).unwrap().json).unwrap();
            serde_json::from_value::<Vec<(String, String)>>(json["model"]["merges"].clone()).unwrap()
        };
        let pair = |left: &str, right: &str| (left.to_owned(), right.to_owned());
        assert_eq!(learned("cd", 1), [pair("c", "d")]);
        assert_eq!(learned("cd", 2), []);
        assert_eq!(learned("abcab", 1), [pair("a", "b"), pair("c", "ab"), pair("ab", "cab")]);
        assert_eq!(learned("aaaa", 1), [pair("a", "a"), pair("aa", "aa")]);
    }

    #[test]
    fn any_text_can_be_encoded_and_comes_back() {
        let text = Text::new(&from_merges(&["a b"]), SpecialTokens::Parse).unwrap();
        for sample in ["", "ab abc", " ü\u{2028}日本\u{0} \t\r\n😀 ", "Ġ"] {
            assert_eq!(text.decode(&text.encode(sample).unwrap()).unwrap(), sample);
        }
        assert_eq!(text.count("ab").unwrap(), 1);
        assert_eq!(text.encode("a<|endoftext|>").unwrap().last(), Some(&0));
    }

    #[test]
    fn the_folder_opens_here_and_a_small_text_is_said_to_be_small() {
        let scratch = Scratch::new();
        let corpus_folder = scratch.path().join("corpus");
        fs::create_dir(&corpus_folder).unwrap();
        let [train, ..] = generate(Builtin::Instruct, 0, &Sizes { train: 3, valid: 0, test: 0 });
        corpus::write(&corpus_folder, Split::Train, &train).unwrap();
        let run = |with| scratch.run(&TrainTokenizer, with, vec![("corpus", input(PortType::Corpus, &corpus_folder))]);
        let (outputs, log) = run(json!({"vocab_size": 5000})).unwrap();
        assert!(log.warnings[0].contains("no more to merge"), "{:?}", log.warnings);
        let folder = folder(&outputs, "tokenizer");
        let saved = TokenizerFile::load(&folder).unwrap();
        let opened = crate::tokenizer::open_tokenizer(&folder, None).unwrap();
        assert_eq!((saved, vec![]), (opened.tokenizer, opened.notes));
        let facts: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.join("tokenizer_config.json")).unwrap()).unwrap();
        assert_eq!(facts["eos_token"], END_TOKEN);
        corpus::write(&corpus_folder, Split::Train, &[]).unwrap();
        let error = run(json!({"vocab_size": 300})).err().unwrap().to_string();
        assert!(error.contains("no training rows"), "{error}");
    }
}
