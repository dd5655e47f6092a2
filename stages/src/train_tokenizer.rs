//! `train-tokenizer`: byte-level BPE over the training split of a corpus.
//!
//! ```yaml
//! tokenizer:
//!   kind: train-tokenizer
//!   in: {corpus: corpus}
//!   with: {vocab_size: 1024, template: task}
//! ```
//!
//! Input: `corpus`. Output: `tokenizer`, a folder that this program and `transformers` open. Cost: about a second for a
//! megabyte of text and a thousand tokens.
//!
//! Text is learned as `tokenize` will write it, template and persona lines included, so that their words become tokens.
//! The vocabulary holds the end token `<|endoftext|>` (id 0), the 256 bytes, then merges; any text can be encoded.

use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use contract::{
    About, AnyValue, ConfigError, Env, Folder, Inputs, Operator, Outputs, PortType, Ports, Sink, Stage, Step,
    TokenizerFile,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use crate::corpus::{self, CorpusRow, Split};
use crate::template::{Personas, Template};
use crate::text::byte_level;

/// The token that ends a text, and pads.
pub const END_TOKEN: &str = "<|endoftext|>";

/// Tokens that every vocabulary holds: the end token and the 256 bytes.
const BASE: usize = 257;

/// The stage kind.
pub struct TrainTokenizer;

/// Its `with`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Number of tokens, the end token and the 256 bytes included. Fewer come out where the text has no more to merge.
    #[schemars(range(min = 257))]
    pub vocab_size: usize,
    /// Text around the instruction: what `tokenize` will use.
    #[serde(default)]
    pub template: Template,
    /// Persona lines before some prompts, where some dataset will have them; none by default.
    #[serde(default)]
    pub personas: Option<Personas>,
    /// A pair seen less often is not merged. 2: what is seen once is no pattern.
    #[serde(default = "min_frequency")]
    #[schemars(range(min = 1))]
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
            version: 1,
            numerics: None,
            summary: "trains a byte-level BPE tokenizer on the training split of a corpus",
            example: "tokenizer:\n  kind: train-tokenizer\n  in: {corpus: corpus}\n  with: {vocab_size: 1024}\n",
            reads_clock: false,
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = Personas::errors(config.personas.as_ref());
        if config.vocab_size < BASE {
            errors.push(
                ConfigError::at("vocab_size", format!("expected {BASE} or more, got {}", config.vocab_size))
                    .hint("the end token and the 256 bytes are always there"),
            );
        }
        if config.min_frequency < 1 {
            errors.push(ConfigError::at("min_frequency", "expected 1 or more, got 0"));
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new().input("corpus", PortType::Corpus, "text by split; `train` is read").output(
            "tokenizer",
            PortType::Tokenizer,
            "the trained tokenizer",
        )
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
        let tokenizer = train(&rows, &self.config)?;
        if (tokenizer.size as usize) < self.config.vocab_size {
            sink.warn(&format!(
                "the text has no more to merge after {} tokens; `vocab_size` asked for {}",
                tokenizer.size, self.config.vocab_size
            ));
        }
        fs::create_dir_all(&self.folder)?;
        save(&tokenizer, &self.folder)?;
        Ok(Outputs::new().with("tokenizer", Folder::new(PortType::Tokenizer, &self.folder)))
    }
}

/// Trains on the text of `rows`.
fn train(rows: &[CorpusRow], config: &Config) -> Result<TokenizerFile> {
    let mut counts = HashMap::new();
    for row in rows {
        let mut text = config.personas.as_ref().and_then(|p| p.line(row.id)).unwrap_or_default();
        text.push_str(&config.template.prompt(row)?);
        text.push_str(&config.template.response(&row.output));
        count_words(&text, &mut counts)?;
    }
    let mut words: Vec<(String, u64)> = counts.into_iter().collect();
    words.sort_unstable();
    let (tokens, merges) = learn(&words, config.vocab_size, config.min_frequency);
    assemble(tokens, merges)
}

/// Writes the folder of a tokenizer: its own files, and the one by which `transformers` opens it.
pub(crate) fn save(tokenizer: &TokenizerFile, folder: &Path) -> Result<()> {
    tokenizer.save(folder)?;
    let end = crate::text::Text::new(tokenizer)?.token(tokenizer.end)?;
    let facts = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": false,
    });
    contract::value::write(&folder.join("tokenizer_config.json"), format!("{facts:#}\n").as_bytes())
}

/// Splits `text` into words as byte-level BPE does, each written in its alphabet of printable characters, one a byte.
fn count_words(text: &str, counts: &mut HashMap<String, u64>) -> Result<()> {
    let mut words = PreTokenizedString::from(text);
    ByteLevel::new(false, true, true)
        .pre_tokenize(&mut words)
        .map_err(|e| anyhow!("cannot split a text into words: {e}"))?;
    for (word, ..) in words.get_splits(OffsetReferential::Original, OffsetType::None) {
        match counts.get_mut(word) {
            Some(count) => *count += 1,
            None => drop(counts.insert(word.to_owned(), 1)),
        }
    }
    Ok(())
}

/// A pair of neighbouring tokens.
type Pair = (u32, u32);

/// Learns merges: again and again the most frequent pair, the one of smaller ids in a tie, becomes a token.
///
/// The library's trainer is not used because it can place merges by the order of a randomly seeded hash map where one
/// token comes about by two merges; the tokenizer of a cached pipeline must be the same file every time.
fn learn(words: &[(String, u64)], vocab_size: usize, min_frequency: u64) -> (Vec<String>, Vec<(String, String)>) {
    let mut tokens = vec![END_TOKEN.to_owned()];
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    tokens.extend(alphabet.into_iter().map(String::from));
    let mut ids: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut spelled: Vec<Vec<u32>> =
        words.iter().map(|(word, _)| word.chars().map(|c| ids[c.to_string().as_str()]).collect()).collect();

    let mut pairs = Pairs::default();
    for (word, spelling) in spelled.iter().enumerate() {
        pairs.add(word, spelling, words[word].1);
    }
    let mut merges = Vec::new();
    let mut merged_before = HashSet::new();
    while tokens.len() < vocab_size {
        let Some((pair, frequency)) = pairs.pop() else { break };
        if frequency < min_frequency {
            break;
        }
        let (left, right) = (tokens[pair.0 as usize].clone(), tokens[pair.1 as usize].clone());
        let merged = format!("{left}{right}");
        // A token may come about by two merges, and a pair with it may then appear a second time: it keeps its rank.
        if merged_before.insert(pair) {
            merges.push((left, right));
        }
        let id = *ids.entry(merged.clone()).or_insert_with(|| {
            tokens.push(merged);
            tokens.len() as u32 - 1
        });
        for word in pairs.words(pair) {
            let count = words[word].1;
            pairs.remove(&spelled[word], count);
            spelled[word] = merge(&spelled[word], pair, id);
            pairs.add(word, &spelled[word], count);
        }
    }
    (tokens, merges)
}

/// How often each pair occurs, and where.
#[derive(Default)]
struct Pairs {
    counts: HashMap<Pair, u64>,
    /// Words that hold the pair, or held it once.
    places: HashMap<Pair, BTreeSet<usize>>,
    /// Counts when they were last raised; those that fell since are found out when they come up.
    queue: BinaryHeap<(u64, std::cmp::Reverse<Pair>)>,
}

impl Pairs {
    fn add(&mut self, word: usize, spelling: &[u32], count: u64) {
        for pair in neighbours(spelling) {
            let total = self.counts.entry(pair).or_default();
            *total += count;
            self.places.entry(pair).or_default().insert(word);
            self.queue.push((*total, std::cmp::Reverse(pair)));
        }
    }

    fn remove(&mut self, spelling: &[u32], count: u64) {
        for pair in neighbours(spelling) {
            *self.counts.get_mut(&pair).expect("a pair of a word was counted") -= count;
        }
    }

    /// The most frequent pair with its count.
    fn pop(&mut self) -> Option<(Pair, u64)> {
        while let Some((count, std::cmp::Reverse(pair))) = self.queue.pop() {
            let now = self.counts[&pair];
            if now == count && now > 0 {
                return Some((pair, now));
            }
            // Only what fell is put back: a count that rose stands in the queue already.
            if 0 < now && now < count {
                self.queue.push((now, std::cmp::Reverse(pair)));
            }
        }
        None
    }

    fn words(&mut self, pair: Pair) -> BTreeSet<usize> {
        self.places.remove(&pair).unwrap_or_default()
    }
}

fn neighbours(spelling: &[u32]) -> impl Iterator<Item = Pair> {
    spelling.windows(2).map(|pair| (pair[0], pair[1]))
}

/// Replaces each occurrence of `pair`, from the left.
fn merge(spelling: &[u32], pair: Pair, id: u32) -> Vec<u32> {
    let mut merged = Vec::with_capacity(spelling.len());
    let mut rest = spelling;
    while let Some((&first, tail)) = rest.split_first() {
        if tail.first() == Some(&pair.1) && first == pair.0 {
            merged.push(id);
            rest = &tail[1..];
        } else {
            merged.push(first);
            rest = tail;
        }
    }
    merged
}

/// A tokenizer of tokens (by id) and merges (by rank).
fn assemble(tokens: Vec<String>, merges: Vec<(String, String)>) -> Result<TokenizerFile> {
    let size = tokens.len() as u32;
    let vocabulary = tokens.into_iter().zip(0..).collect::<tokenizers::models::bpe::Vocab>();
    let model = BPE::builder().vocab_and_merges(vocabulary, merges).build();
    let mut tokenizer = byte_level(model.map_err(|e| anyhow!("cannot build a tokenizer: {e}"))?);
    tokenizer
        .add_special_tokens([AddedToken::from(END_TOKEN, true)])
        .map_err(|e| anyhow!("cannot build a tokenizer: {e}"))?;
    let json = tokenizer.to_string(false).map_err(|e| anyhow!("cannot write a tokenizer: {e}"))?;
    Ok(TokenizerFile { json: Arc::new(json.into_bytes()), end: 0, size })
}

/// A tokenizer of the bytes and some merges, each `LEFT RIGHT`.
#[cfg(test)]
pub(crate) fn from_merges(merges: &[&str]) -> TokenizerFile {
    let (mut tokens, _) = learn(&[], BASE, 1);
    let merges: Vec<_> = merges.iter().map(|m| m.split_once(' ').unwrap()).collect();
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    assemble(tokens, merges.into_iter().map(|(left, right)| (left.into(), right.into())).collect()).unwrap()
}

#[cfg(test)]
mod tests {
    use tokenizers::models::bpe::BpeTrainer;
    use tokenizers::{Model, Trainer};

    use super::*;
    use crate::instruct::{Sizes, generate};
    use crate::template::persona_line;
    use crate::testing::{Scratch, folder, input, shared_data};
    use crate::text::Text;

    fn builtin() -> Vec<CorpusRow> {
        let [train, ..] = generate(0, &Sizes { train: 8000, valid: 0, test: 0 });
        train
    }

    fn config(json: serde_json::Value) -> Config {
        serde_json::from_value(json).unwrap()
    }

    fn counted(text: &str) -> Vec<(String, u64)> {
        let mut counts = HashMap::new();
        count_words(text, &mut counts).unwrap();
        let mut words: Vec<_> = counts.into_iter().collect();
        words.sort_unstable();
        words
    }

    #[test]
    fn the_persona_line_is_seven_tokens_and_answers_are_short() {
        let rows = builtin();
        for template in ["task", "alpaca"] {
            let config = config(json!({"vocab_size": 1024, "template": template, "personas": {}}));
            let tokenizer = train(&rows, &config).unwrap();
            let text = Text::new(&tokenizer).unwrap();
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
            println!("{template}: response mean {mean}, longest {:?}", responses.iter().max());
            assert!((11.0..18.0).contains(&mean), "{mean}");
            assert!(*responses.iter().max().unwrap() <= 45);
            if template == "task" {
                let prompts = tokens(&|row| config.template.prompt(row).unwrap());
                println!("prompt mean {}", prompts.iter().sum::<usize>() as f64 / prompts.len() as f64);
                assert!(prompts.iter().zip(&responses).all(|(p, r)| p + r < 96));
            }
        }
    }

    #[test]
    fn the_same_text_gives_the_same_bytes_on_any_number_of_threads() {
        let rows = builtin();
        let config = config(json!({"vocab_size": 700, "template": "task"}));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| train(&rows, &config).unwrap())
        };
        assert!(on(1) == on(2));
    }

    #[test]
    fn merges_are_those_of_the_librarys_trainer() {
        let text = "low low low low low lower lower newest newest newest newest newest newest widest widest widest";
        let mut trainer = BpeTrainer::builder()
            .vocab_size(275)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_TOKEN, true)])
            .build();
        let words = counted(text);
        let spelled = words.iter().flat_map(|(word, count)| std::iter::repeat_n(word, *count as usize));
        trainer.feed(spelled, |word| Ok(vec![word.to_owned()])).unwrap();
        let mut model = BPE::default();
        trainer.train(&mut model).unwrap();
        let (tokens, _) = learn(&words, 275, 2);
        assert!(tokens.len() > BASE + 10);
        assert_eq!(tokens.len(), model.get_vocab_size());
        for (id, token) in tokens.iter().enumerate() {
            assert_eq!(model.token_to_id(token), Some(id as u32), "{token}");
        }
    }

    #[test]
    fn ties_go_to_the_smaller_ids_and_rare_pairs_are_left() {
        let learned = |text, frequency| learn(&counted(text), 300, frequency).1;
        let pair = |left: &str, right: &str| (left.to_owned(), right.to_owned());
        assert_eq!(learned("cd", 1), [pair("c", "d")]);
        assert_eq!(learned("cd", 2), []);
        assert_eq!(learned("abcab", 1), [pair("a", "b"), pair("c", "ab"), pair("ab", "cab")]);
        assert_eq!(learned("aaaa", 1), [pair("a", "a"), pair("aa", "aa")]);
    }

    #[test]
    fn a_pair_that_comes_up_again_keeps_its_first_rank() {
        let Some(path) = shared_data("corpus/cs336-corpus.en") else { return };
        let text = fs::read_to_string(path).unwrap();
        let words = counted(&text);
        let (tokens, merges) = learn(&words, 3000, 2);
        assert_eq!(merges.iter().collect::<HashSet<_>>().len(), merges.len());
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), tokens.len());
        let learned = Text::new(&assemble(tokens, merges).unwrap()).unwrap();
        assert_eq!(learned.decode(&learned.encode(&text).unwrap()).unwrap(), text);
    }

    #[test]
    fn any_text_can_be_encoded_and_comes_back() {
        let text = Text::new(&from_merges(&["a b"])).unwrap();
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
        let [train, ..] = generate(0, &Sizes { train: 3, valid: 0, test: 0 });
        corpus::write(&corpus_folder, Split::Train, &train).unwrap();
        let run = |with| {
            scratch.run(&TrainTokenizer, with, vec![("corpus", input(PortType::Corpus, &corpus_folder))])
        };
        let (outputs, log) = run(json!({"vocab_size": 5000})).unwrap();
        assert!(log.warnings[0].contains("no more to merge"), "{:?}", log.warnings);
        let folder = folder(&outputs, "tokenizer");
        let saved = TokenizerFile::load(&folder).unwrap();
        let opened = crate::text::open_tokenizer(&folder.join("tokenizer.json"), None).unwrap();
        assert_eq!(saved, opened);
        let facts: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.join("tokenizer_config.json")).unwrap()).unwrap();
        assert_eq!(facts["eos_token"], END_TOKEN);
        let error = run(json!({"vocab_size": 100})).err().unwrap().to_string();
        assert!(error.contains("expected 257 or more, got 100"), "{error}");
        corpus::write(&corpus_folder, Split::Train, &[]).unwrap();
        let error = run(json!({"vocab_size": 300})).err().unwrap().to_string();
        assert!(error.contains("no training rows"), "{error}");
    }
}
