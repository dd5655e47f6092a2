//! Text to ids and back: a thin layer over the `tokenizers` library.
//!
//! What a person wrote is text. It becomes a control token (the end of a text, its beginning, a turn of a chat) only where it
//! is asked for: control tokens come from settings and templates, never from how data happens to be spelled.

use std::collections::BTreeMap;
use std::ops::Range;

use aho_corasick::{AhoCorasick, Match, MatchKind};
use anyhow::{Context, Result, anyhow, bail};
use contract::TokenizerFile;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use tokenizers::Tokenizer;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;

/// What becomes of a text that is spelled like a control token, such as `<|endoftext|>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SpecialTokens {
    /// It stays text, of the tokens that any other text has.
    Text,
    /// It becomes that token, as in the published programs.
    Parse,
}

/// Whether texts begin with the token that begins a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bos {
    /// As the tokenizer's files say.
    FromTokenizer,
    /// Yes, whatever they say.
    Yes,
    /// No.
    No,
}

impl Bos {
    /// The ids that a text begins with.
    ///
    /// Errors when a token is asked for that the tokenizer does not have.
    pub fn ids(self, tokenizer: &TokenizerFile) -> Result<Vec<u32>> {
        match self {
            Bos::FromTokenizer => Ok(tokenizer.prefix.clone()),
            Bos::No => Ok(Vec::new()),
            Bos::Yes if !tokenizer.prefix.is_empty() => Ok(tokenizer.prefix.clone()),
            Bos::Yes => {
                let begin = tokenizer.begin.context(
                    "`bos: yes` asks for the token that begins a text, and the tokenizer's files name none; say `bos: no`",
                )?;
                Ok(vec![begin])
            }
        }
    }
}

/// Puts the ids that a text begins with before it, unless it has them already.
pub(crate) fn begun(begin: &[u32], ids: Vec<u32>) -> Vec<u32> {
    if ids.starts_with(begin) { ids } else { [begin, &ids].concat() }
}

/// Ids of what follows a prompt in a whole text: both are one text; where its seam merges (the prompt's ids are no prefix of the
/// text's), what follows is tokenised by itself.
pub(crate) fn behind(
    prompt: &[u32],
    whole: &str,
    rest: &str,
    encode: impl Fn(&str) -> Result<Vec<u32>>,
) -> Result<Vec<u32>> {
    match encode(whole)?.strip_prefix(prompt) {
        Some(ids) => Ok(ids.to_vec()),
        None => encode(rest),
    }
}

/// A tokenizer ready for use. Encoding never adds a token that is not in the text, never cuts and never pads.
#[derive(Clone)]
pub struct Text {
    tokenizer: Tokenizer,
    end: u32,
    special_tokens: SpecialTokens,
    controls: Controls,
}

impl Text {
    /// Opens the tokenizer that a dataset or model carries.
    pub fn new(file: &TokenizerFile, special_tokens: SpecialTokens) -> Result<Self> {
        let (mut tokenizer, controls) = open(file).context("cannot read the tokenizer")?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| anyhow!("cannot read the tokenizer: {e}"))?;
        tokenizer.set_encode_special_tokens(special_tokens == SpecialTokens::Text);
        Ok(Text { tokenizer, end: file.end, special_tokens, controls })
    }

    /// Id of the token that ends a text.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Ids of `text`. What is spelled like a control token is treated as [`SpecialTokens`] says.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_as_it_is(text)?;
        let is_text = self.special_tokens == SpecialTokens::Text;
        if is_text && self.controls.are_in(&ids) { self.encode_apart(text) } else { Ok(ids) }
    }

    fn encode_as_it_is(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| anyhow!("cannot tokenise a text: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The library leaves a control token alone where the vocabulary has it as an ordinary piece too. A spelling that is
    /// torn behind its first character is no such piece.
    fn encode_apart(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = self.torn(rest) {
            ids.extend(self.encode_as_it_is(before)?);
            rest = after;
        }
        ids.extend(self.encode_as_it_is(rest)?);
        match ids.iter().find(|id| self.controls.is(**id)) {
            Some(id) => bail!(
                "a text becomes the control token `{}` and cannot be told from it; take it out of the data, or say \
                 `special_tokens: parse`",
                self.token(*id)?
            ),
            None => Ok(ids),
        }
    }

    /// A text in two behind the first character of the first control token that is spelled in it.
    pub(crate) fn torn<'t>(&self, text: &'t str) -> Option<(&'t str, &'t str)> {
        let start = self.place_spelled_in(text)?.start;
        let first = text[start..].chars().next().map_or(0, char::len_utf8);
        Some(text.split_at(start + first))
    }

    /// The control token that is spelled in a text, if one is.
    pub fn spelled_in<'t>(&self, text: &'t str) -> Option<&'t str> {
        self.place_spelled_in(text).map(|place| &text[place])
    }

    /// Where that is: the first place.
    pub(crate) fn place_spelled_in(&self, text: &str) -> Option<Range<usize>> {
        self.controls.spelled(text).map(|found| found.range())
    }

    /// Whether an id is that of a control token.
    pub fn is_control(&self, id: u32) -> bool {
        self.controls.is(id)
    }

    /// Ids of each text, in order, on all threads.
    pub fn encode_all(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    /// Text of `ids`, special tokens left out. Ids that are not in the vocabulary are left out too.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|e| anyhow!("cannot turn ids into text: {e}"))
    }

    /// Text of each list of ids, in order, on all threads.
    pub fn decode_all(&self, ids: &[impl AsRef<[u32]> + Sync]) -> Result<Vec<String>> {
        ids.par_iter().map(|ids| self.decode(ids.as_ref())).collect()
    }

    /// The token that `id` stands for, as the vocabulary writes it.
    pub fn token(&self, id: u32) -> Result<String> {
        self.tokenizer.id_to_token(id).with_context(|| format!("the id {id} is not in the vocabulary"))
    }

    /// Number of tokens of `text`.
    pub fn count(&self, text: &str) -> Result<usize> {
        Ok(self.encode(text)?.len())
    }
}

/// Text of each list of ids, special tokens left out, for people to read.
pub fn texts(tokenizer: &TokenizerFile, ids: &[&[u32]]) -> Result<Vec<String>> {
    Text::new(tokenizer, SpecialTokens::Text)?.decode_all(ids)
}

/// Tokens that steer: added as special ones, or known to begin, end or pad. What stands for the unspellable is none, for it
/// comes from any text.
#[derive(Clone)]
struct Controls {
    /// In order.
    ids: Vec<u32>,
    spellings: AhoCorasick,
}

impl Controls {
    fn is(&self, id: u32) -> bool {
        self.ids.binary_search(&id).is_ok()
    }

    fn are_in(&self, ids: &[u32]) -> bool {
        ids.iter().any(|id| self.is(*id))
    }

    fn spelled(&self, text: &str) -> Option<Match> {
        self.spellings.find(text)
    }
}

/// The library's tokenizer, in which every control token is marked as one.
fn open(file: &TokenizerFile) -> Result<(Tokenizer, Controls)> {
    let mut json: Json = serde_json::from_slice(&file.json).context("not JSON")?;
    let roles = [Some(file.end), file.begin, file.pad];
    let mut controls = BTreeMap::new();
    let added = json.get_mut("added_tokens").and_then(Json::as_array_mut);
    for token in added.into_iter().flatten() {
        let Some(id) = token["id"].as_u64().and_then(|id| u32::try_from(id).ok()) else { continue };
        if Some(id) != file.unk && (token["special"] == true || roles.contains(&Some(id))) {
            token["special"] = true.into();
            let spelling = token["content"].as_str().unwrap_or_default();
            controls.extend((!spelling.is_empty()).then(|| (id, spelling.to_owned())));
        }
    }
    let bytes = serde_json::to_vec(&json)?;
    let tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| anyhow!("not a tokenizer that can be used here: {e}"))?;
    let spellings = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(controls.values())?;
    Ok((tokenizer, Controls { ids: controls.into_keys().collect(), spellings }))
}

/// Byte-level BPE with the word pattern of GPT-2 around `model`.
pub(crate) fn byte_level(model: BPE) -> Tokenizer {
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    tokenizer
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Tokenizers of several makes, each with controls spelled `<s>`, `</s>` (not marked as special) and `<|turn|>`.
    fn makes() -> Vec<(&'static str, TokenizerFile)> {
        let bytes: Vec<String> = (b' '..=b'~').map(|byte| char::from(byte).to_string()).collect();
        let words = ["<unk>", "<s>", "</s>", "<|turn|>"].map(str::to_owned).into_iter().chain(bytes);
        let words: Vec<String> = words.chain(["▁".into(), "Ġ".into(), "hello".into()]).collect();
        let vocabulary: serde_json::Map<String, Json> =
            words.iter().cloned().zip((0..).map(|id: u32| id.into())).collect();
        let added = |special: bool, id: u32, content: &str| {
            json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false})
        };
        let tokens = json!([
            added(true, 0, "<unk>"),
            added(true, 1, "<s>"),
            added(false, 2, "</s>"),
            added(true, 3, "<|turn|>")
        ]);
        let file = |model: Json, pre_tokenizer: Json| {
            let json = json!({"version": "1.0", "added_tokens": tokens, "normalizer": null, "pre_tokenizer": pre_tokenizer,
                "post_processor": null, "decoder": null, "model": model});
            let size = words.len() as u32;
            TokenizerFile { unk: Some(0), begin: Some(1), ..TokenizerFile::new(json.to_string(), 2, size) }
        };
        let bpe = json!({"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"});
        // A merge that makes a control token of ordinary pieces.
        let mut merging = bpe.clone();
        merging["vocab"]["<s"] = json!(words.len());
        merging["merges"] = json!([["<", "s"], ["<s", ">"]]);
        let pieces: Vec<Json> =
            words.iter().map(|word| json!([word, if word.len() > 1 { -1.0 } else { -9.0 }])).collect();
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        vec![
            ("bpe", file(bpe.clone(), bytes)),
            ("merging bpe", file(merging, Json::Null)),
            (
                "metaspace",
                file(bpe, json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false})),
            ),
            (
                "words",
                file(
                    json!({"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}),
                    json!({"type": "WhitespaceSplit"}),
                ),
            ),
            ("unigram", file(json!({"type": "Unigram", "unk_id": 0, "vocab": pieces}), Json::Null)),
        ]
    }

    proptest! {
        #[test]
        fn no_spelling_becomes_a_control_token(parts in prop::collection::vec("<s>|</s>|<\\|turn\\|>|<unk>|hello| |[a-z]{1,3}|<|>|/", 0..12)) {
            for (make, file) in makes() {
                let text = Text::new(&file, SpecialTokens::Text).unwrap();
                let ids = text.encode(&parts.concat()).unwrap();
                prop_assert!(!ids.iter().any(|id| [1, 2, 3].contains(id)), "{make}: {parts:?} gives {ids:?}");
            }
        }
    }

    #[test]
    fn a_spelling_is_parsed_where_it_is_asked_for_and_told_either_way() {
        for (make, file) in makes() {
            let text = Text::new(&file, SpecialTokens::Parse).unwrap();
            assert!(text.encode("hello<|turn|>").unwrap().ends_with(&[3]), "{make}");
            assert_eq!(text.spelled_in("a <|turn|> b</s>"), Some("<|turn|>"), "{make}");
            assert_eq!(text.spelled_in("a < s > <unk>"), None, "{make}");
        }
    }

    #[test]
    fn text_without_controls_has_the_same_ids_either_way() {
        for (make, file) in makes() {
            let [kept, parsed] = [SpecialTokens::Text, SpecialTokens::Parse].map(|how| Text::new(&file, how).unwrap());
            for sample in ["hello", " hello world", "a<b>c", "x < y"] {
                assert_eq!(kept.encode(sample).unwrap(), parsed.encode(sample).unwrap(), "{make}: {sample}");
            }
        }
    }

    #[test]
    fn a_text_begins_as_is_asked_for() {
        let file = TokenizerFile { begin: Some(7), ..TokenizerFile::default() };
        let adding = TokenizerFile { prefix: vec![7], ..file.clone() };
        let ids = |bos: Bos, file: &TokenizerFile| bos.ids(file).unwrap();
        assert_eq!((ids(Bos::FromTokenizer, &file), ids(Bos::FromTokenizer, &adding)), (vec![], vec![7]));
        assert_eq!((ids(Bos::Yes, &file), ids(Bos::Yes, &adding)), (vec![7], vec![7]));
        assert_eq!((ids(Bos::No, &file), ids(Bos::No, &adding)), (vec![], vec![]));
        let error = Bos::Yes.ids(&TokenizerFile::default()).unwrap_err().to_string();
        assert!(error.contains("`bos: no`"), "{error}");
        assert_eq!((begun(&[7], vec![1]), begun(&[7], vec![7, 1])), (vec![7, 1], vec![7, 1]));
    }
}
