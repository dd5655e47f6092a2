//! The tokenizer that a dataset or a model carries: what gives its ids their meaning, and the files that it came in.
//!
//! A folder of a tokenizer is read once, at the door. From then on two things travel together: a `tokenizer.json` that says
//! all that ids come from, for this program, and the files as they were, for whoever opens what is exported.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::Result;
use crate::facts::{Bounds, Vocabulary};
use crate::value::write;

/// A tokenizer, shared by all that carry it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

const MAIN: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

/// What [`TokenizerFile::save`] adds to the files: numbers, and the `tokenizer.json` that ids come from where it is none
/// of the files.
const FACTS: &str = "pipeline_tokenizer.json";
const EFFECTIVE: &str = "effective_tokenizer.json";

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

    /// The same text for two tokenizers that give every id the same meaning.
    fn meaning(&self) -> String {
        // FNV-1a, 64 bits: tells tokenizers apart in an error message, guards nothing.
        let hash = self.json.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        format!("{hash:016x}")
    }

    /// The first difference between two tokenizers, as a lower-case fragment, where it can be told.
    pub fn difference(&self, other: &TokenizerFile) -> Option<String> {
        (self.size != other.size).then(|| format!("one has {} tokens and the other {}", self.size, other.size))
    }
}

/// The files of a folder that describe its tokenizer.
pub fn files_in(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let names = FILES.iter().filter(|name| folder.join(name).is_file());
    names.map(|name| Ok(((*name).to_owned(), read(&folder.join(name))?))).collect()
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
        let files = [("merges.txt", "a b"), ("chat_template.jinja", "\r\n{{ x }}"), ("vocab.json", "{ }")];
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
}
