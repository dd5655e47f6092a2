//! The tokenizer that a dataset or a model carries: what gives its ids their meaning, and the files that it came in.
//!
//! A folder of a tokenizer is read once, at the door. From then on two things travel together: a `tokenizer.json` that says
//! all that ids come from, for this program, and the files as they were, for whoever opens what is exported.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::facts::{Bounds, Vocabulary};
use crate::value::write;
use crate::{Result, files};

/// A tokenizer, shared by all that carry it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct TokenizerFile {
    /// The `tokenizer.json` that ids come from: everything that the other files say of them is in it. Empty where a model
    /// came without a tokenizer.
    pub json: Arc<Vec<u8>>,
    /// Id of the token that ends a text.
    pub end: u32,
    /// Number of ids a model over it must have at least.
    pub size: u32,
    /// Id of the token that is said to begin a text. Whether texts do begin with it, `prefix` says.
    pub begin: Option<u32>,
    /// Id of the token that pads.
    pub pad: Option<u32>,
    /// Id of the token for what the vocabulary cannot spell.
    pub unk: Option<u32>,
    /// Ids that the tokenizer itself puts before a text.
    pub prefix: Vec<u32>,
    /// Ids that the tokenizer itself puts after a text.
    pub suffix: Vec<u32>,
    /// The files that it came in, by name, byte by byte.
    pub files: Arc<BTreeMap<String, Vec<u8>>>,
}

/// Without the bytes of its files: nobody reads a vocabulary in a message.
impl fmt::Debug for TokenizerFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: BTreeMap<&str, usize> =
            self.files.iter().map(|(name, bytes)| (name.as_str(), bytes.len())).collect();
        let TokenizerFile { json, end, size, begin, pad, unk, prefix, suffix, .. } = self;
        f.debug_struct("TokenizerFile")
            .field("bytes", &json.len())
            .field("end", end)
            .field("size", size)
            .field("roles", &(begin, pad, unk))
            .field("around", &(prefix, suffix))
            .field("files", &files)
            .finish()
    }
}

/// Names of the files that describe a tokenizer.
pub const FILES: [&str; 10] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    MAIN,
    "tokenizer.model",
    CONFIG,
    "vocab.json",
    "vocab.txt",
];

/// Folder of chat templates beside the first.
const TEMPLATES: &str = "additional_chat_templates";

const MAIN: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

/// What [`TokenizerFile::save`] adds to the files: numbers, and the `tokenizer.json` that ids come from where it is none
/// of the files.
const FACTS: &str = "pipeline_tokenizer.json";
const EFFECTIVE: &str = "effective_tokenizer.json";

/// Begins a meaning, so that those of other versions, which were made otherwise, are known as such.
const MEANING: &str = "3:";

/// Whether two tokenizers are known to give ids other meanings, by what [`TokenizerFile::vocabulary`] says of them.
pub(crate) fn is_other_meaning(a: &str, b: &str) -> bool {
    a != b && a.starts_with(MEANING) && b.starts_with(MEANING)
}

/// What is kept in [`FACTS`]. Older stores have the first two only.
#[derive(Serialize, Deserialize)]
struct TokenizerFacts {
    end: u32,
    size: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    begin: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pad: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unk: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    prefix: Vec<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    suffix: Vec<u32>,
}

impl TokenizerFile {
    /// A tokenizer that was made here, or is known by its `tokenizer.json` alone. It adds nothing to a text, and its end
    /// token begins and pads as well. The file by which `transformers` opens it is made for it.
    pub fn new(json: impl Into<Vec<u8>>, end: u32, size: u32) -> Self {
        let json = json.into();
        let mut files = BTreeMap::new();
        if !json.is_empty() {
            files.insert(CONFIG.to_owned(), config_of(&json, end));
            files.insert(MAIN.to_owned(), json.clone());
        }
        let role = Some(end);
        TokenizerFile {
            json: Arc::new(json),
            end,
            size,
            begin: role,
            pad: role,
            files: Arc::new(files),
            ..TokenizerFile::default()
        }
    }

    /// Writes the files as they came, and beside them what this program knows of them.
    pub fn save(&self, folder: &Path) -> Result<()> {
        if self.files.keys().any(|name| name.starts_with(TEMPLATES)) {
            let folder = folder.join(TEMPLATES);
            fs::create_dir_all(&folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
        }
        for (name, bytes) in self.files.iter() {
            write(&folder.join(name), bytes)?;
        }
        if !self.json.is_empty() && self.files.get(MAIN) != Some(&self.json) {
            write(&folder.join(EFFECTIVE), &self.json)?;
        }
        let TokenizerFile { end, size, begin, pad, unk, .. } = *self;
        let (prefix, suffix) = (self.prefix.clone(), self.suffix.clone());
        let facts = TokenizerFacts { end, size, begin, pad, unk, prefix, suffix };
        write(&folder.join(FACTS), &serde_json::to_vec(&facts)?)
    }

    /// Reads what [`TokenizerFile::save`] wrote.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(FACTS);
        let facts: TokenizerFacts =
            serde_json::from_slice(&read(&path)?).with_context(|| format!("cannot parse `{}`", path.display()))?;
        let files = files_in(folder)?;
        let effective = folder.join(EFFECTIVE);
        let json = if effective.exists() { read(&effective)? } else { files.get(MAIN).cloned().unwrap_or_default() };
        let TokenizerFacts { end, size, begin, pad, unk, prefix, suffix } = facts;
        Ok(TokenizerFile { json: Arc::new(json), end, size, begin, pad, unk, prefix, suffix, files: Arc::new(files) })
    }

    /// Whether a folder holds what [`TokenizerFile::save`] wrote.
    pub fn is_saved_in(folder: &Path) -> bool {
        folder.join(FACTS).is_file()
    }

    /// What gives ids their meaning, as a fact of all that carries this tokenizer.
    pub fn vocabulary(&self) -> Vocabulary {
        let meaning = (!self.json.is_empty()).then(|| self.meaning());
        Vocabulary { size: Bounds::exactly(self.size.into()), meaning, file: Some(self.clone()) }
    }

    /// The same text for two tokenizers that give every id the same meaning and divide text alike. How a file is written,
    /// what it cuts and pads, and what it puts around a text have no part in it, nor has the program that wrote it: the
    /// tokenizer of a GGUF file is that of the checkpoint it was made of.
    fn meaning(&self) -> String {
        let canonical = match serde_json::from_slice::<Json>(&self.json) {
            Ok(json) => Parts::of(&json).text(),
            Err(_) => String::from_utf8_lossy(&self.json).into_owned(),
        };
        // FNV-1a, 64 bits: tells tokenizers apart in an error message, guards nothing.
        let hash = canonical
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        format!("{MEANING}{hash:016x}")
    }

    /// The first difference from `other`, as a lower-case fragment that calls this one `here` and the other one `there`;
    /// `None` where they mean the same, or a file cannot be read.
    pub fn difference(&self, other: &TokenizerFile, here: &str, there: &str) -> Option<String> {
        let read = |file: &TokenizerFile| serde_json::from_slice::<Json>(&file.json).ok();
        let (own, others) = (read(self)?, read(other)?);
        Parts::of(&own).difference(&Parts::of(&others), here, there)
    }
}

/// What of a `tokenizer.json` decides which ids a text has, in a form that is the same however it is written.
struct Parts {
    tokens: BTreeMap<u32, String>,
    merges: Vec<(String, String)>,
    /// The rest, by the name of its part.
    rest: [(&'static str, Json); 4],
}

impl Parts {
    fn of(json: &Json) -> Self {
        let merges = json["model"]["merges"].as_array().into_iter().flatten().map(|merge| match merge {
            Json::String(text) => text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())),
            pair => Some((pair[0].as_str()?.to_owned(), pair[1].as_str()?.to_owned())),
        });
        let mut model = json["model"].clone();
        if let Some(model) = model.as_object_mut() {
            // Of a vocabulary only its scores are left.
            model.retain(|key, value| {
                !(["merges", "dropout"].contains(&key.as_str()) || key == "vocab" && value.is_object())
            });
            // An empty mark of the pieces of words is none.
            model.retain(|_, value| value != "");
        }
        let mut added = json["added_tokens"].clone();
        if let Some(added) = added.as_array_mut() {
            // A special token means its id in all cases: text does not become it.
            added.retain(|token| token["special"] != json!(true));
            added.sort_by_key(|token| token["id"].as_u64());
            if json["normalizer"].is_null() {
                // There is no difference between the text before and after.
                added.iter_mut().filter_map(Json::as_object_mut).for_each(|token| _ = token.remove("normalized"));
            }
        }
        let mut tokens = tokens(json);
        // Converters to GGUF fill a vocabulary up to the rows of its model.
        tokens.retain(|id, token| *token != format!("[PAD{id}]"));
        let rest = [
            ("normalizer", json["normalizer"].clone()),
            ("pre_tokenizer", Json::Array(words(&json["pre_tokenizer"]))),
            ("added_tokens", added),
            ("model", model),
        ];
        let rest = rest.map(|(name, value)| (name, without_defaults(value)));
        Parts { tokens, merges: merges.flatten().collect(), rest }
    }

    fn text(&self) -> String {
        json!([self.tokens, self.merges, self.rest]).to_string()
    }

    fn difference(&self, other: &Parts, here: &str, there: &str) -> Option<String> {
        let ids = self.tokens.keys().chain(other.tokens.keys()).collect::<BTreeSet<_>>();
        let id = ids.into_iter().find(|id| self.tokens.get(id) != other.tokens.get(id));
        if let Some(id) = id {
            return Some(match (self.tokens.get(id), other.tokens.get(id)) {
                (Some(a), Some(b)) => format!("id {id} is `{a}` in `{here}` and `{b}` in `{there}`"),
                (a, b) => {
                    let (token, who, not) = match a.or(b) {
                        Some(token) if a.is_some() => (token, here, there),
                        token => (token?, there, here),
                    };
                    format!("`{who}` has a token `{token}` with id {id}, and `{not}` has none")
                }
            });
        }
        let merges = self.merges.len().max(other.merges.len());
        let merge = (0..merges).find(|index| self.merges.get(*index) != other.merges.get(*index));
        if let Some(index) = merge {
            let name = |merges: &[(String, String)]| {
                merges.get(index).map_or("none".to_owned(), |(left, right)| format!("`{left}` with `{right}`"))
            };
            return Some(format!(
                "merge {} is {} in `{here}` and {} in `{there}`",
                index + 1,
                name(&self.merges),
                name(&other.merges)
            ));
        }
        let parts = self.rest.iter().zip(&other.rest);
        let ((name, a), (_, b)) = parts.into_iter().find(|((_, a), (_, b))| a != b)?;
        Some(format!("`{name}` is {} in `{here}` and {} in `{there}`", short(a, b), short(b, a)))
    }
}

/// The steps that divide a text into words, those that have several names under one of them.
fn words(json: &Json) -> Vec<Json> {
    /// What `ByteLevel` divides a text by, unless told not to.
    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"});
    match json["type"].as_str() {
        None => Vec::new(),
        Some("Sequence") => json["pretokenizers"].as_array().into_iter().flatten().flat_map(words).collect(),
        Some("Digits") if json["individual_digits"] == true => vec![split(r"\p{N}")],
        Some("ByteLevel") if json["use_regex"] != false && json["add_prefix_space"] == false => {
            let mut bytes = json.clone();
            bytes["use_regex"] = false.into();
            vec![split(GPT2), bytes]
        }
        _ => vec![json.clone()],
    }
}

/// Drops what is as it would be without being written.
fn without_defaults(value: Json) -> Json {
    match value {
        Json::Object(fields) => {
            // Where a token was found in the text has no part in its id.
            let is_default = |key: &str, value: &Json| {
                value.is_null()
                    || *value == json!(false)
                    || key == "trim_offsets"
                    || (key == "use_regex" && *value == json!(true))
            };
            let fields = fields.into_iter().filter(|(key, value)| !is_default(key, value));
            Json::Object(fields.map(|(key, value)| (key, without_defaults(value))).collect())
        }
        Json::Array(items) => Json::Array(items.into_iter().map(without_defaults).collect()),
        other => other,
    }
}

/// A value for a message: its first part that differs from `other`, and not too much of it.
fn short(value: &Json, other: &Json) -> String {
    let part = match (value, other) {
        (Json::Object(fields), Json::Object(others)) => {
            fields.iter().find(|(key, value)| others.get(*key) != Some(*value)).map(|(key, value)| json!({key: value}))
        }
        (Json::Array(items), Json::Array(others)) => items
            .iter()
            .enumerate()
            .find(|(index, item)| others.get(*index) != Some(*item))
            .map(|(_, item)| item.clone()),
        _ => Some(value.clone()),
    };
    let Some(part) = part.filter(|part| !part.is_null()) else { return "nothing".into() };
    let text = part.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The files of a folder that describe its tokenizer.
pub fn files_in(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut names: Vec<String> = FILES.iter().map(|name| (*name).to_owned()).collect();
    for entry in fs::read_dir(folder.join(TEMPLATES)).into_iter().flatten() {
        let name = entry.with_context(|| format!("cannot read `{}`", folder.join(TEMPLATES).display()))?.file_name();
        names.extend(name.to_str().filter(|name| name.ends_with(".jinja")).map(|name| format!("{TEMPLATES}/{name}")));
    }
    names.retain(|name| folder.join(name).exists());
    names.into_iter().map(|name| Ok((name.clone(), files::read(&folder.join(name), files::TOKENIZER)?))).collect()
}

/// The tokens of a `tokenizer.json` by id.
pub fn tokens(tokenizer: &Json) -> BTreeMap<u32, String> {
    let id = |json: &Json| json.as_u64().and_then(|id| u32::try_from(id).ok());
    let mut tokens = BTreeMap::new();
    if let Some(vocabulary) = tokenizer["model"]["vocab"].as_object() {
        tokens.extend(vocabulary.iter().filter_map(|(token, json)| Some((id(json)?, token.clone()))));
    }
    if let Some(pieces) = tokenizer["model"]["vocab"].as_array() {
        // Unigram models list [piece, score] in the order of ids.
        let piece = |(id, json): (usize, &Json)| Some((id as u32, json[0].as_str()?.to_owned()));
        tokens.extend(pieces.iter().enumerate().filter_map(piece));
    }
    if let Some(added) = tokenizer["added_tokens"].as_array() {
        tokens.extend(added.iter().filter_map(|t| Some((id(&t["id"])?, t["content"].as_str()?.to_owned()))));
    }
    tokens
}

/// A `tokenizer_config.json` for a tokenizer that came without.
fn config_of(json: &[u8], end: u32) -> Vec<u8> {
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    let token = serde_json::from_slice(json).ok().and_then(|json| tokens(&json).remove(&end));
    if let Some(token) = token {
        for role in ["bos_token", "eos_token", "pad_token"] {
            config[role] = json!(token);
        }
    }
    format!("{config:#}\n").into_bytes()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = r#"{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "</s>": 2}}}"#;

    fn saved(tokenizer: &TokenizerFile) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        folder
    }

    #[test]
    fn a_saved_tokenizer_loads_equal_whatever_it_came_in() {
        let own = TokenizerFile::new(ABC, 2, 3);
        let files = [
            ("merges.txt", "a b"),
            ("chat_template.jinja", "\r\n{{ x }}"),
            ("vocab.json", "{ }"),
            ("additional_chat_templates/tool.jinja", "t"),
        ];
        let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()));
        let foreign = TokenizerFile {
            unk: Some(0),
            begin: Some(1),
            pad: None,
            prefix: vec![1],
            suffix: vec![2, 2],
            files: Arc::new(files.into()),
            ..own.clone()
        };
        let none = TokenizerFile { files: Arc::default(), ..TokenizerFile::new("", 2, 3) };
        for tokenizer in [own, foreign, none] {
            assert_eq!(TokenizerFile::load(saved(&tokenizer).path()).unwrap(), tokenizer);
        }
    }

    #[test]
    fn files_of_older_stores_load() {
        let folder = saved(&TokenizerFile::new(ABC, 2, 3));
        fs::write(folder.path().join(FACTS), r#"{"end":2,"size":3}"#).unwrap();
        let loaded = TokenizerFile::load(folder.path()).unwrap();
        assert_eq!((loaded.end, loaded.size, loaded.begin, &loaded.prefix[..]), (2, 3, None, &[][..]));
        assert_eq!(loaded.json.as_slice(), ABC.as_bytes());
    }

    #[test]
    fn a_tokenizer_made_here_says_its_end_to_transformers() {
        let folder = saved(&TokenizerFile::new(ABC, 2, 3));
        let config: Json = serde_json::from_slice(&read(&folder.path().join(CONFIG)).unwrap()).unwrap();
        assert_eq!((&config["eos_token"], &config["bos_token"]), (&json!("</s>"), &json!("</s>")));
    }

    #[test]
    fn words_are_divided_alike_under_any_name() {
        let split = |regex: &str, behavior| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": false});
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": regex, "use_regex": regex});
        let sequence = |steps: Json| json!({"type": "Sequence", "pretokenizers": steps});
        let tokenizer = |words: &Json| {
            let json =
                json!({"pre_tokenizer": words, "model": {"type": "BPE", "vocab": {"a": 0, "[PAD2]": 2}, "merges": []}});
            TokenizerFile::new(json.to_string(), 0, 3)
        };
        let gpt2 = split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "Isolated");
        let digits = split(r"\p{N}", "Isolated");
        let named = sequence(json!([{"type": "Digits", "individual_digits": true}, bytes(true)]));
        let spelt = sequence(json!([digits, gpt2, bytes(false)]));
        let difference = |a: &Json, b: &Json| tokenizer(a).difference(&tokenizer(b), "x", "y");
        assert_eq!(difference(&named, &spelt), None);
        assert_eq!(difference(&bytes(true), &sequence(json!([gpt2, bytes(false)]))), None);
        assert_eq!(tokenizer(&named).meaning(), tokenizer(&spelt).meaning());
        assert!(difference(&named, &bytes(true)).unwrap().starts_with("`pre_tokenizer` is "));
        assert!(difference(&bytes(true), &bytes(false)).is_some());
        let spaced = json!({"type": "ByteLevel", "add_prefix_space": true});
        assert!(difference(&bytes(true), &spaced).is_some());
        let removed = sequence(json!([split(r"\p{N}", "Removed"), bytes(true)]));
        assert!(difference(&named, &removed).is_some());
        // What only fills a vocabulary up is no token.
        let plain = TokenizerFile::new(r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#, 0, 1);
        assert_eq!(plain.difference(&tokenizer(&Json::Null), "x", "y"), None);
    }

    #[test]
    fn the_first_difference_is_named() {
        let json = |change: &dyn Fn(&mut Json)| {
            let mut json = json!({
                "truncation": null, "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "use_regex": true},
                "post_processor": null, "added_tokens": [{"id": 2, "content": "</s>", "special": true}, {"id": 3, "content": "ab", "normalized": false}],
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2, "ab": 3}, "merges": [["a", "b"]]},
            });
            change(&mut json);
            TokenizerFile::new(json.to_string(), 2, 4)
        };
        let file = json(&|_| ());
        let same: [&dyn Fn(&mut Json); 7] = [
            &|json| json["model"]["merges"] = json!(["a b"]),
            &|json| json["truncation"] = json!({"max_length": 9}),
            &|json| json["post_processor"] = json!({"type": "ByteLevel"}),
            &|json| json["model"]["dropout"] = json!(null),
            &|json| json["added_tokens"][1]["normalized"] = json!(true),
            &|json| json["added_tokens"][0]["lstrip"] = json!(true),
            &|json| json["model"]["unk_token"] = json!(null),
        ];
        for change in same {
            let other = json(change);
            assert_eq!((file.difference(&other, "x", "y"), other.meaning()), (None, file.meaning()));
        }
        type Change<'a> = &'a dyn Fn(&mut Json);
        let cases: [(Change<'_>, &str); 6] = [
            (
                &|json| json["model"]["vocab"] = json!({"b": 0, "a": 1, "</s>": 2, "ab": 3}),
                "id 0 is `a` in `x` and `b` in `y`",
            ),
            (&|json| json["model"]["vocab"]["c"] = json!(4), "`y` has a token `c` with id 4, and `x` has none"),
            (
                &|json| json["model"]["merges"] = json!([["b", "a"]]),
                "merge 1 is `a` with `b` in `x` and `b` with `a` in `y`",
            ),
            (&|json| json["model"]["merges"] = json!([]), "merge 1 is `a` with `b` in `x` and none in `y`"),
            (
                &|json| json["normalizer"] = json!({"type": "NFC"}),
                "`normalizer` is nothing in `x` and {\"type\":\"NFC\"} in `y`",
            ),
            (
                &|json| json["model"]["byte_fallback"] = json!(true),
                "`model` is nothing in `x` and {\"byte_fallback\":true} in `y`",
            ),
        ];
        for (change, expected) in cases {
            let other = json(change);
            assert_eq!(file.difference(&other, "x", "y").as_deref(), Some(expected));
            assert_ne!(file.meaning(), other.meaning());
        }
    }
}
