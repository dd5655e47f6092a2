//! The tokenizer in a GGUF file, as the files of a Hugging Face tokenizer, and the way back.
//!
//! Two makes are read, by `tokenizer.ggml.model`: `gpt2`, byte-level BPE, whose rule for words `tokenizer.ggml.pre` names; and
//! `llama`, SentencePiece BPE with its scores. Rules for words are those of llama.cpp, which are those of the tokenizers that the
//! files were made from; `transformers` reads a file of `smollm` and its like without the rule that every digit is a word.
//!
//! Source: `src/llama-vocab.cpp` and `gguf-py/gguf/constants.py` of llama.cpp.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use contract::TokenizerFile;
use lm::{Gguf, GgufValue};
use serde_json::{Map, Value as Json, json};

use crate::chat::template_in;
use crate::sentencepiece::{Model, Piece, Sort};
use crate::tokenizer::{Opened, QWEN2_WORDS, beginning_and_end, is_tokenizer, open_files, open_tokenizer};

/// Opens the tokenizer in a GGUF file. Its files are a `tokenizer.json` and a `tokenizer_config.json`, with the chat template
/// where there is one. The end token is `end_token` where given, else what the file says.
///
/// Errors where the file holds no tokenizer, or one of a make or with a rule for words that is not known; they name the file.
pub fn open_gguf_tokenizer(gguf: &Gguf, end_token: Option<&str>) -> Result<Opened> {
    let place = gguf.path().display().to_string();
    let mut notes = Vec::new();
    let files = files(gguf, &mut notes).with_context(|| format!("the tokenizer of `{place}` cannot be read"))?;
    let mut opened = open_files(place.clone(), files, end_token)?;
    opened.notes.extend(notes.into_iter().map(|note: String| format!("`{place}` {note}")));
    Ok(opened)
}

/// Finds the tokenizer at `path`: as [`open_tokenizer`] does, else the one in the GGUF file that `path` is, or that the folder
/// holds.
///
/// Errors as both do.
pub fn open_any_tokenizer(path: &Path, end_token: Option<&str>) -> Result<Opened> {
    match Gguf::at(path)?.filter(|_| !is_tokenizer(path)) {
        Some(file) => open_gguf_tokenizer(&Gguf::open(&file)?, end_token),
        None => open_tokenizer(path, end_token),
    }
}

/// A key of the metadata that is about the tokenizer.
fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

/// Roles by the names that they have in GGUF.
const ROLES: [(&str, &str); 4] = [
    ("bos_token", "bos_token_id"),
    ("eos_token", "eos_token_id"),
    ("unk_token", "unknown_token_id"),
    ("pad_token", "padding_token_id"),
];

fn files(gguf: &Gguf, notes: &mut Vec<String>) -> Result<BTreeMap<String, Vec<u8>>> {
    let make = gguf.text(&key("model")).context("it names no `tokenizer.ggml.model`")?;
    let tokens = gguf.texts(&key("tokens")).context("it has no `tokenizer.ggml.tokens`")?;
    let sorts = sorts(gguf, tokens)?;
    let (mut json, begins) = match make {
        "gpt2" => byte_level(gguf, tokens, &sorts, notes)?,
        "llama" => (sentencepiece(gguf, tokens, &sorts)?, true),
        other => bail!("it is of make `{other}`: expected `gpt2` or `llama`"),
    };
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    let mut roles = BTreeMap::new();
    for (role, name) in ROLES {
        let Some(id) = gguf.integer(&key(name)) else { continue };
        let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
        let token = token.with_context(|| format!("`{}` is {id}, and there are {} tokens", key(name), tokens.len()))?;
        config.insert(role.into(), token.clone().into());
        roles.insert(role, (token.clone(), id as u32));
    }
    let role = |flag: &str, default: bool, role: &str| {
        gguf.bool(&key(flag)).unwrap_or(default).then(|| roles.get(role).cloned()).flatten()
    };
    json["post_processor"] =
        beginning_and_end(role("add_bos_token", begins, "bos_token"), role("add_eos_token", false, "eos_token"));
    if let Some(template) = gguf.text("tokenizer.chat_template") {
        config.insert("chat_template".into(), template.into());
    }
    let config = format!("{:#}\n", Json::Object(config));
    Ok([("tokenizer.json", json.to_string()), ("tokenizer_config.json", config)]
        .map(|(name, text)| (name.to_owned(), text.into_bytes()))
        .into())
}

/// What each token is; an ordinary one where the file does not say.
fn sorts(gguf: &Gguf, tokens: &[String]) -> Result<Vec<Sort>> {
    let Some(numbers) = gguf.integers(&key("token_type")) else { return Ok(vec![Sort::Normal; tokens.len()]) };
    ensure!(numbers.len() == tokens.len(), "it has {} tokens and says what {} are", tokens.len(), numbers.len());
    // Some writers say 0 where they know nothing.
    numbers.iter().map(|number| Sort::of(u64::try_from(*number).unwrap_or(u64::MAX).max(1))).collect()
}

/// How a text is divided into words before it is tokenised.
struct Words {
    /// The patterns, one after another on what the ones before left. What is between two matches is a word as well.
    patterns: &'static [&'static str],
    /// Whether a text is composed first: one letter where there are a letter and an accent.
    composes: bool,
    /// Whether a word that is a token is taken as one, whatever the merges say.
    prefers_words: bool,
    /// Whether a text begins with the token for it where the file does not say.
    begins: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Words {
    fn of(name: &str) -> Option<Self> {
        let plain = |patterns| Words { patterns, composes: false, prefers_words: false, begins: false };
        let whole = |patterns| Words { prefers_words: true, begins: true, ..plain(patterns) };
        Some(match name {
            "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" => plain(&[GPT2]),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
                plain(&[r"\p{N}", GPT2])
            }
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
                whole(&[LLAMA3])
            }
            "tekken" => whole(&[TEKKEN]),
            "qwen2" | "deepseek-r1-qwen" | "megrez" => Words { composes: true, ..plain(&[QWEN2_WORDS]) },
            _ => return None,
        })
    }
}

/// The `tokenizer.json` of a byte-level BPE, and whether a text begins with the token for it unless the file denies it.
fn byte_level(gguf: &Gguf, tokens: &[String], sorts: &[Sort], notes: &mut Vec<String>) -> Result<(Json, bool)> {
    let name = gguf.text(&key("pre")).unwrap_or_else(|| {
        notes.push("does not say how its tokenizer divides text into words: it is taken to do it as GPT-2 does".into());
        "gpt-2"
    });
    let words = Words::of(name)
        .with_context(|| format!("its rule for words, `tokenizer.ggml.pre`, is `{name}`, which is not known here"))?;
    let merges = gguf.texts(&key("merges")).context("it has no `tokenizer.ggml.merges`")?;
    let merges = merges.iter().map(|merge| {
        // The left one may be a space, where a token is not written in the letters of bytes.
        let middle = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(index, _)| index);
        let middle = middle.with_context(|| format!("`{merge}` is no merge of two tokens"))?;
        Ok(json!([&merge[..middle], &merge[middle + 1..]]))
    });
    let merges = merges.collect::<Result<Vec<Json>>>()?;
    let mut seen = HashSet::new();
    let mut vocabulary = Map::new();
    let mut added = Vec::new();
    for (id, (token, sort)) in tokens.iter().zip(sorts).enumerate() {
        ensure!(seen.insert(token.as_str()), "token {id}, `{token}`, is there twice");
        vocabulary.insert(token.clone(), id.into());
        added.extend(sort.added_token(id, token).filter(|_| !token.is_empty()));
    }
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let pieces: Vec<Json> = words.patterns.iter().map(split).chain([bytes.clone()]).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": words.composes.then(|| json!({"type": "NFC"})),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces}, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": words.prefers_words,
            "vocab": vocabulary, "merges": merges},
    });
    Ok((json, words.begins))
}

/// The `tokenizer.json` of a SentencePiece BPE.
fn sentencepiece(gguf: &Gguf, tokens: &[String], sorts: &[Sort]) -> Result<Json> {
    let scores = gguf.floats(&key("scores")).context("it has no `tokenizer.ggml.scores`")?;
    ensure!(scores.len() == tokens.len(), "it has {} tokens and {} scores", tokens.len(), scores.len());
    let pieces = tokens.iter().zip(scores).zip(sorts);
    let pieces = pieces.map(|((text, score), sort)| Piece { text: text.clone(), score: *score as f32, sort: *sort });
    let flag = |name: &str, default: bool| gguf.bool(&key(name)).unwrap_or(default);
    let model = Model {
        pieces: pieces.collect(),
        is_unigram: false,
        byte_fallback: sorts.contains(&Sort::Byte),
        space_before: flag("add_space_prefix", true),
        tidy_spaces: flag("remove_extra_whitespaces", false),
        characters: gguf.bytes(&key("precompiled_charsmap")).unwrap_or_default().to_vec(),
        roles: BTreeMap::new(),
    };
    model.tokenizer()
}

/// The metadata by which llama.cpp reads a tokenizer, beside a model with so many `rows` of tokens that stops at `ends`.
///
/// Unicode is not composed by llama.cpp, so that a text that is not (NFC) may have other ids there than by this tokenizer.
///
/// Errors where llama.cpp divides no text as it does, or finds other pieces.
pub fn tokenizer_metadata(tokenizer: &TokenizerFile, rows: usize, ends: &[u32]) -> Result<Vec<(String, GgufValue)>> {
    ensure!(!tokenizer.json.is_empty(), "the model has no tokenizer: a GGUF file holds both");
    let json: Json = serde_json::from_slice(&tokenizer.json).context("the tokenizer is not JSON")?;
    let vocabulary = contract::tokenizer::tokens(&json);
    let size = rows.max(tokenizer.size as usize);
    let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
    let mut sorts = vec![Sort::Unused; size];
    for (id, token) in &vocabulary {
        ensure!((*id as usize) < size, "token {id} is outside of the vocabulary of {size}");
        tokens[*id as usize] = token.clone();
        sorts[*id as usize] = Sort::Normal;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let id = added["id"].as_u64().context("an added token has no id")? as usize;
        ensure!(id < size, "added token {id} is outside of the vocabulary");
        sorts[id] = if added["special"] == true { Sort::Control } else { Sort::UserDefined };
    }
    let mut metadata = Vec::new();
    let mut push = |name: &str, value: GgufValue| metadata.push((key(name), value));
    let is_byte_level = json["pre_tokenizer"].to_string().contains("\"ByteLevel\"");
    ensure!(
        json["model"]["type"] == "BPE",
        "llama.cpp is given tokenizers of type BPE here, and this is of type {}",
        json["model"]["type"]
    );
    if is_byte_level {
        let merges = merges(&json)?.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
        push("model", GgufValue::Text("gpt2".into()));
        push("pre", GgufValue::Text(rule_for_words(&json)?.into()));
        push("merges", GgufValue::Texts(merges));
    } else {
        if let Some(unknown) = tokenizer.unk.or_else(|| id_of(&vocabulary, &json["model"]["unk_token"])) {
            sorts[unknown as usize] = Sort::Unknown;
        }
        for (token, sort) in tokens.iter().zip(&mut sorts).filter(|(_, sort)| **sort == Sort::Normal) {
            let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            if is_byte && json["model"]["byte_fallback"] == true {
                *sort = Sort::Byte;
            }
        }
        push("model", GgufValue::Text("llama".into()));
        push("pre", GgufValue::Text("default".into()));
        push("scores", GgufValue::Floats(scores(&json, &tokens, &sorts)?));
        push("add_space_prefix", GgufValue::Bool(space_before(&json)?));
    }
    push("tokens", GgufValue::Texts(tokens));
    push("token_type", GgufValue::Integers(sorts.into_iter().map(Sort::number).collect()));
    let TokenizerFile { begin, end, pad, unk, .. } = *tokenizer;
    for ((_, name), id) in ROLES.into_iter().zip([begin, Some(end), unk, pad]) {
        if let Some(id) = id {
            push(name, GgufValue::Integer(id.into()));
        }
    }
    if let Some(other) = ends.iter().find(|id| **id != end) {
        push("eot_token_id", GgufValue::Integer((*other).into()));
    }
    let around = |ids: &[u32], role: Option<u32>, place: &str| {
        ensure!(
            ids.is_empty() || ids.len() == 1 && role == Some(ids[0]),
            "the tokenizer puts the ids {ids:?} {place} a text, and llama.cpp none but one with that role"
        );
        Ok(GgufValue::Bool(!ids.is_empty()))
    };
    push("add_bos_token", around(&tokenizer.prefix, begin, "before")?);
    push("add_eos_token", around(&tokenizer.suffix, Some(end), "behind")?);
    if let Some(template) = template_in(tokenizer)? {
        metadata.push(("tokenizer.chat_template".into(), GgufValue::Text(template)));
    }
    Ok(metadata)
}

fn id_of(vocabulary: &BTreeMap<u32, String>, token: &Json) -> Option<u32> {
    let token = token.as_str()?;
    vocabulary.iter().find(|(_, known)| *known == token).map(|(id, _)| *id)
}

fn merges(json: &Json) -> Result<Vec<(String, String)>> {
    let merges = json["model"]["merges"].as_array().context("the tokenizer has no merges")?;
    let pair = |merge: &Json| match merge {
        Json::String(text) => text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())),
        pair => Some((pair[0].as_str()?.to_owned(), pair[1].as_str()?.to_owned())),
    };
    merges.iter().map(|merge| pair(merge).with_context(|| format!("{merge} is no merge of two tokens"))).collect()
}

/// The name in llama.cpp of the rule by which a byte-level tokenizer divides text into words.
fn rule_for_words(json: &Json) -> Result<&'static str> {
    const NAMES: [&str; 6] = ["gpt-2", "smollm", "llama-bpe", "tekken", "qwen2", "default"];
    let unknown = || format!("llama.cpp has no rule that divides text into words as {} does", json["pre_tokenizer"]);
    let pieces = match &json["pre_tokenizer"]["pretokenizers"] {
        Json::Array(pieces) => pieces.clone(),
        _ => vec![json["pre_tokenizer"].clone()],
    };
    let mut patterns = Vec::new();
    for piece in &pieces {
        match piece["type"].as_str() {
            Some("Split") if piece["behavior"] == "Isolated" && piece["invert"] != true => {
                patterns.push(piece["pattern"]["Regex"].as_str().with_context(unknown)?);
            }
            Some("Digits") if piece["individual_digits"] == true => patterns.push(r"\p{N}"),
            Some("ByteLevel") => {
                ensure!(
                    piece["add_prefix_space"] != true,
                    "the tokenizer puts a space before a text, and llama.cpp does not"
                );
                // What is not said is yes.
                if piece["use_regex"] != false {
                    patterns.push(GPT2);
                }
            }
            _ => bail!("{}", unknown()),
        }
    }
    let normalizer = &json["normalizer"];
    ensure!(
        normalizer.is_null() || normalizer["type"] == "NFC",
        "the tokenizer changes text before it divides it, by {normalizer}, and llama.cpp does not"
    );
    let name = NAMES.into_iter().find(|name| Words::of(name).is_some_and(|words| words.patterns == patterns));
    name.with_context(unknown)
}

/// What llama.cpp goes by in place of merges: the piece of the highest score is put together first.
///
/// Errors where it would put together what no merge does.
fn scores(json: &Json, tokens: &[String], sorts: &[Sort]) -> Result<Vec<f64>> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    let mut pairs: HashSet<(String, String)> = HashSet::new();
    for (rank, (left, right)) in merges(json)?.into_iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
        pairs.insert((left, right));
    }
    let known: HashSet<&str> = tokens.iter().map(String::as_str).collect();
    for (token, _) in tokens.iter().zip(sorts).filter(|(_, sort)| **sort == Sort::Normal) {
        let splits = token.char_indices().skip(1).map(|(middle, _)| token.split_at(middle));
        let mut splits = splits.filter(|(left, right)| known.contains(left) && known.contains(right));
        let is_left_out = |(left, right): &(&str, &str)| !pairs.contains(&((*left).to_owned(), (*right).to_owned()));
        if let Some((left, right)) = splits.find(is_left_out) {
            bail!("llama.cpp would merge `{left}` and `{right}`, which the tokenizer does not");
        }
    }
    let last = ranks.len() + pairs.len();
    let score = |(token, sort): (&String, &Sort)| match sort {
        Sort::Normal => 0.0 - ranks.get(token).copied().unwrap_or(last) as f64,
        _ => 0.0,
    };
    Ok(tokens.iter().zip(sorts).map(score).collect())
}

/// Whether a text begins as if a space stood before it, in a tokenizer of pieces.
///
/// Errors where a text is changed otherwise.
fn space_before(json: &Json) -> Result<bool> {
    let parts = |json: &Json, list: &str| match &json[list] {
        Json::Array(parts) => parts.clone(),
        _ if json.is_null() => Vec::new(),
        _ => vec![json.clone()],
    };
    let (mut before, mut marks_spaces) = (false, false);
    let normalizers = parts(&json["normalizer"], "normalizers");
    for part in normalizers.into_iter().chain(parts(&json["pre_tokenizer"], "pretokenizers")) {
        match part["type"].as_str() {
            Some("Prepend") if part["prepend"] == "\u{2581}" => before = true,
            Some("Replace") if part["pattern"]["String"] == " " && part["content"] == "\u{2581}" => marks_spaces = true,
            Some("Metaspace") if part["replacement"] == "\u{2581}" => {
                marks_spaces = true;
                before |= part["prepend_scheme"] != "never" && part["add_prefix_space"] != false;
            }
            _ => bail!("the tokenizer changes text by {part}, and llama.cpp does not"),
        }
    }
    ensure!(marks_spaces, "the tokenizer is neither one of bytes nor of SentencePiece's, which llama.cpp knows");
    Ok(before)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::text::{SpecialTokens, Text};

    const NAMES: [&str; 4] = ["smollm", "llama-bpe", "qwen2", "llama"];

    fn fixture(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/gguf/{name}.gguf"))
    }

    fn open(name: &str) -> Opened {
        open_gguf_tokenizer(&Gguf::open(&fixture(name)).unwrap(), None).unwrap()
    }

    /// A file in which bytes are others, as many of them.
    fn changed(name: &str, from: &str, to: &str) -> Result<Opened> {
        let mut bytes = fs::read(fixture(name)).unwrap();
        let place = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        bytes[place..place + from.len()].copy_from_slice(to.as_bytes());
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        open_gguf_tokenizer(&Gguf::open(file.path())?, None)
    }

    #[test]
    fn ids_are_those_of_the_tokenizers_that_the_files_were_made_from() {
        let expected: Json = serde_json::from_str(include_str!("../tests/fixtures/gguf/ids.json")).unwrap();
        let texts: Vec<String> = serde_json::from_value(expected["texts"].clone()).unwrap();
        for name in NAMES {
            let ids: Vec<Vec<u32>> = serde_json::from_value(expected[name].clone()).unwrap();
            assert_eq!((ids.len(), texts.len()), (252, 252), "{name}");
            let text = Text::new(&open(name).tokenizer, SpecialTokens::Parse).unwrap();
            for (sample, ids) in texts.iter().zip(&ids) {
                assert_eq!(text.encode(sample).unwrap(), *ids, "{name}: {sample:?}");
            }
        }
    }

    #[test]
    fn a_file_has_the_tokenizer_of_its_checkpoint_though_it_is_written_otherwise() {
        let texts: Json = serde_json::from_str(include_str!("../tests/fixtures/gguf/ids.json")).unwrap();
        let texts: Vec<String> = serde_json::from_value(texts["texts"].clone()).unwrap();
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let file = open("smollm").tokenizer;
        let mut json: Json = serde_json::from_slice(&file.json).unwrap();
        json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [digits, bytes]});
        let checkpoint = TokenizerFile { json: Arc::new(json.to_string().into_bytes()), ..file.clone() };
        assert_eq!(file.difference(&checkpoint, "file", "checkpoint"), None);
        let [one, other] = [&file, &checkpoint].map(|tokenizer| Text::new(tokenizer, SpecialTokens::Parse).unwrap());
        for text in &texts {
            assert_eq!(one.encode(text).unwrap(), other.encode(text).unwrap(), "{text:?}");
        }
    }

    #[test]
    fn roles_and_the_beginning_of_a_text_are_those_of_the_file() {
        let Opened { tokenizer: file, notes } = open("smollm");
        assert_eq!((file.begin, file.end, file.pad, file.unk, file.size), (Some(1), 2, Some(0), None, 421));
        assert_eq!((file.prefix, notes), (vec![], Vec::<String>::new()));
        let config: Json = serde_json::from_slice(&file.files["tokenizer_config.json"]).unwrap();
        assert!(config["chat_template"].as_str().unwrap().contains("eos_token"));
        assert_eq!(open("llama-bpe").tokenizer.prefix, [1]);
        let llama = open("llama").tokenizer;
        assert_eq!((llama.prefix, llama.unk), (vec![1], Some(0)));
    }

    #[test]
    fn control_tokens_in_a_text_stay_text_where_that_is_asked_for() {
        let file = open("smollm").tokenizer;
        let text = Text::new(&file, SpecialTokens::Text).unwrap();
        let ids = text.encode("a<|im_end|>b<think>").unwrap();
        assert!(!ids.contains(&2) && ids.last() == Some(&420), "{ids:?}");
        assert_eq!(text.decode(&ids).unwrap(), "a<|im_end|>b<think>");
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let error = |name: &str, from: &str, to: &str| format!("{:#}", changed(name, from, to).unwrap_err());
        assert!(error("smollm", "smollm", "smoxxm").contains("`tokenizer.ggml.pre`, is `smoxxm`"));
        assert!(error("smollm", "gpt2", "bert").contains("it is of make `bert`: expected `gpt2` or `llama`"));
        assert!(error("smollm", "ggml.merges", "ggml.mergex").contains("no `tokenizer.ggml.merges`"));
        assert!(error("llama", "ggml.scores", "ggml.scorex").contains("no `tokenizer.ggml.scores`"));
        let opened = changed("smollm", "ggml.pre", "ggml.prx").unwrap();
        assert!(opened.notes[0].contains("does not say how its tokenizer divides text"), "{:?}", opened.notes);
        // Where no role names an end, a customary spelling does.
        let opened = changed("smollm", "ggml.eos_token_id", "ggml.eos_token_ix").unwrap();
        assert_eq!(opened.tokenizer.end, 0);
    }

    proptest! {
        #[test]
        fn no_change_of_a_file_makes_it_panic(
            name in prop::sample::select(&NAMES[..]),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        ) {
            let mut bytes = fs::read(fixture(name)).unwrap();
            for (place, byte) in changes {
                let length = bytes.len();
                bytes[place.index(length)] = byte;
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), bytes).unwrap();
            let opened = Gguf::open(file.path()).and_then(|gguf| open_gguf_tokenizer(&gguf, None));
            if let Ok(text) = opened.and_then(|opened| Text::new(&opened.tokenizer, SpecialTokens::Text)) {
                _ = text.encode("What is １２ <|im_end|>?\n");
            }
        }
    }
}
