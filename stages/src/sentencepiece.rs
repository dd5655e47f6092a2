//! SentencePiece models (`tokenizer.model`) as a `tokenizer.json`: byte-pair encoding and unigram models, with their rules for
//! white space, their byte fallback and the map of characters that they were trained with.
//!
//! The ids are those that the SentencePiece library gives a text, with three exceptions, all of the library that reads
//! `tokenizer.json`. Characters are mapped a grapheme at a time, so that a map that joins several long ones is not followed.
//! What stands around a user-defined symbol is a text of its own, which begins and ends as a text does. And a unigram model
//! adds scores up in f64, not in f32, so that of two ways to divide a text that are as good as equal it may take the other:
//! in a text of two thousand or less.
//!
//! Source: Kudo and Richardson, "SentencePiece", 2018, and `sentencepiece_model.proto` of its repository.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value as Json, json};

/// Stands for a space.
const SPACE: &str = "\u{2581}";

/// A piece of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    pub(crate) sort: Sort,
}

/// What a piece is, by its number in models; GGUF files have the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Sort {
    pub(crate) fn of(number: u64) -> Result<Self> {
        Ok(match number {
            1 => Sort::Normal,
            2 => Sort::Unknown,
            3 => Sort::Control,
            4 => Sort::UserDefined,
            5 => Sort::Unused,
            6 => Sort::Byte,
            other => bail!("a piece of sort {other}: expected one from 1 to 6"),
        })
    }

    /// Its number.
    pub(crate) fn number(self) -> i64 {
        match self {
            Sort::Normal => 1,
            Sort::Unknown => 2,
            Sort::Control => 3,
            Sort::UserDefined => 4,
            Sort::Unused => 5,
            Sort::Byte => 6,
        }
    }

    /// The entry of a piece of this sort in `added_tokens`: of one that is found in a text before it is divided.
    pub(crate) fn added_token(self, id: usize, text: &str) -> Option<Json> {
        let special = match self {
            Sort::Control | Sort::Unknown => true,
            Sort::UserDefined => false,
            Sort::Normal | Sort::Unused | Sort::Byte => return None,
        };
        Some(json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special}))
    }
}

/// A model: its pieces by id, and how a text is prepared for them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) is_unigram: bool,
    pub(crate) byte_fallback: bool,
    /// Whether a text begins as if a space stood before it.
    pub(crate) space_before: bool,
    /// Whether spaces at both ends are taken away, and one of several is left.
    pub(crate) tidy_spaces: bool,
    /// The compiled map of characters; empty where they stay as they are.
    pub(crate) characters: Vec<u8>,
    /// Tokens by their role in `tokenizer_config.json`.
    pub(crate) roles: BTreeMap<&'static str, String>,
}

impl Model {
    /// Reads a `tokenizer.model`.
    ///
    /// Errors where it is no whole model, or one of a sort that is not read: of words or characters, with white space at the
    /// end of words, or with pieces out of use.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self> {
        let mut model = Model {
            pieces: Vec::new(),
            is_unigram: true,
            byte_fallback: false,
            space_before: true,
            tidy_spaces: true,
            characters: Vec::new(),
            roles: BTreeMap::new(),
        };
        let mut roles = [("unk_token", 0), ("bos_token", 1), ("eos_token", 2), ("pad_token", -1)];
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => model.pieces.push(read_piece(piece)?),
                (2, Field::Bytes(trainer)) => model.read_trainer(trainer, &mut roles)?,
                (3, Field::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        ensure!(!model.pieces.is_empty(), "it has no pieces");
        let unused = model.pieces.iter().position(|piece| piece.sort == Sort::Unused);
        ensure!(unused.is_none(), "piece {} is out of use", unused.unwrap_or_default());
        for (role, id) in roles {
            let piece = usize::try_from(id).ok().and_then(|id| model.pieces.get(id));
            model.roles.extend(piece.map(|piece| (role, piece.text.clone())));
        }
        Ok(model)
    }

    fn read_trainer(&mut self, bytes: &[u8], roles: &mut [(&str, i32); 4]) -> Result<()> {
        for field in Fields(bytes) {
            match field? {
                (3, Field::Number(kind)) => {
                    ensure!([1, 2].contains(&kind), "its model has type {kind}: expected 1 (unigram) or 2 (BPE)");
                    self.is_unigram = kind == 1;
                }
                (24, Field::Number(suffix)) => {
                    ensure!(suffix == 0, "white space ends its words: expected it to begin them")
                }
                (35, Field::Number(fallback)) => self.byte_fallback = fallback != 0,
                // Negative numbers stand for none.
                (field @ 40..=43, Field::Number(id)) => roles[field as usize - 40].1 = id as i32,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Result<()> {
        for field in Fields(bytes) {
            match field? {
                (2, Field::Bytes(map)) => self.characters = map.to_vec(),
                (3, Field::Number(before)) => self.space_before = before != 0,
                (4, Field::Number(tidy)) => self.tidy_spaces = tidy != 0,
                (5, Field::Number(escape)) => ensure!(escape != 0, "it keeps spaces as they are"),
                _ => {}
            }
        }
        Ok(())
    }

    /// The `tokenizer.json` that gives a text the same ids.
    ///
    /// Errors where pieces repeat, and where the map of characters is damaged.
    pub(crate) fn tokenizer(&self) -> Result<Json> {
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(self.pieces.len());
        for (id, Piece { text, .. }) in self.pieces.iter().enumerate() {
            ensure!(!text.is_empty(), "piece {id} is empty");
            if let Some(first) = ids.insert(text, id) {
                bail!("pieces {first} and {id} are both `{text}`");
            }
        }
        let added = self.pieces.iter().enumerate().filter_map(|(id, piece)| piece.sort.added_token(id, &piece.text));
        let model = if self.is_unigram { self.unigram()? } else { self.bpe(&ids)? };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.space_before {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": {"type": "Sequence", "normalizers": self.normalizers()?}, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
        }))
    }

    fn normalizers(&self) -> Result<Vec<Json>> {
        let replace = |pattern: Json, by: &str| json!({"type": "Replace", "pattern": pattern, "content": by});
        let mut normalizers = Vec::new();
        if !self.characters.is_empty() {
            check_characters(&self.characters)?;
            normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(&self.characters)}));
        }
        if self.tidy_spaces {
            // At the end the library no longer tells a space from what stands for one.
            normalizers.push(replace(json!({"Regex": format!(r"\A +|[ {SPACE}]+\z")}), ""));
            normalizers.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if self.space_before {
            normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        }
        normalizers.push(replace(json!({"String": " "}), SPACE));
        Ok(normalizers)
    }

    fn unigram(&self) -> Result<Json> {
        let unknown = self.pieces.iter().position(|piece| piece.sort == Sort::Unknown);
        let unknown = unknown.context("no piece stands for the unknown")?;
        let infinite = self.pieces.iter().position(|piece| !piece.score.is_finite());
        ensure!(infinite.is_none(), "the score of piece {} is not finite", infinite.unwrap_or_default());
        let pieces: Vec<Json> = self.pieces.iter().map(|piece| json!([piece.text, f64::from(piece.score)])).collect();
        Ok(json!({"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": self.byte_fallback}))
    }

    /// The model holds no merges: a pair is merged where what comes of it is a piece, the best one first.
    fn bpe(&self, ids: &HashMap<&str, usize>) -> Result<Json> {
        let mut merges: Vec<(f32, &str, &str)> = Vec::new();
        for (id, Piece { text, score, .. }) in
            self.pieces.iter().enumerate().filter(|(_, piece)| piece.sort == Sort::Normal)
        {
            ensure!(text.len() <= LONGEST, "piece {id} has {} bytes: at most {LONGEST} are read", text.len());
            let splits = text.char_indices().skip(1).map(|(middle, _)| text.split_at(middle));
            let splits = splits.filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right));
            merges.extend(splits.map(|(left, right)| (*score, left, right)));
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())));
        let merges: Vec<Json> = merges.into_iter().map(|(_, left, right)| json!([left, right])).collect();
        let vocabulary: serde_json::Map<String, Json> =
            self.pieces.iter().enumerate().map(|(id, piece)| (piece.text.clone(), json!(id))).collect();
        let unknown = self.pieces.iter().find(|piece| piece.sort == Sort::Unknown).map(|piece| piece.text.as_str());
        Ok(json!({"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": self.byte_fallback, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges}))
    }
}

/// Most bytes of a piece that others are merged into: trainers allow 16 characters, by default.
const LONGEST: usize = 1024;

fn read_piece(bytes: &[u8]) -> Result<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, sort: Sort::Normal };
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(text)) => piece.text = str::from_utf8(text).context("a piece is not UTF-8")?.to_owned(),
            (2, Field::Word(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Number(sort)) => piece.sort = Sort::of(sort)?,
            _ => {}
        }
    }
    Ok(piece)
}

/// A value in a message of Protocol Buffers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Field<'a> {
    Number(u64),
    Word(u32),
    Long,
    Bytes(&'a [u8]),
}

/// The fields of a message, with their numbers. After an error there are none.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.context("it is no whole SentencePiece model"))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => Field::Number(self.number()?),
            1 => self.take(8).map(|_| Field::Long)?,
            2 => {
                let length = self.number()?;
                Field::Bytes(self.take(usize::try_from(length).ok()?)?)
            }
            5 => Field::Word(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        (key >> 3 != 0).then_some((key >> 3, value))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// Seven bits a byte, the lowest first; the eighth says that more follow.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }
}

/// Errors where a compiled map of characters leads outside of itself. What follows it does not look.
///
/// The map is the length of a trie in bytes, the trie, and the texts that its leaves point into, each ended by a zero. The trie
/// is a double array: a unit has a label, a place for its children relative to its own, and whether one of them is a leaf.
fn check_characters(map: &[u8]) -> Result<()> {
    let is_sound = || {
        let (length, rest) = map.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (trie, texts) = rest.split_at_checked(length)?;
        let texts = str::from_utf8(texts).ok()?;
        let (words, []) = trie.as_chunks::<4>() else { return None };
        let units: Vec<usize> = words.iter().map(|word| u32::from_le_bytes(*word) as usize).collect();
        const LEAF: usize = 1 << 31;
        let is_leaf = |unit: usize| unit & LEAF != 0;
        (!units.is_empty()).then_some(())?;
        // No search goes on from a leaf, and each begins at the first unit, whatever that is.
        for (place, unit) in units.iter().enumerate().filter(|(place, unit)| *place == 0 || !is_leaf(**unit)) {
            let children = place ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6));
            // Those of all bytes: they differ from one another in the last eight bits.
            ((children | 0xff) < units.len()).then_some(())?;
            if unit >> 8 & 1 == 1 {
                let text = units[children] & (LEAF - 1);
                (text <= texts.len() && texts.is_char_boundary(text)).then_some(())?;
            }
        }
        Some(())
    };
    is_sound().context("its map of characters is damaged")
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        let digits = (0..4).map(|index| char::from(DIGITS[(word >> (18 - 6 * index) & 63) as usize]));
        text.extend(digits.take(chunk.len() + 1));
        text.extend(std::iter::repeat_n('=', 3 - chunk.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use contract::TokenizerFile;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::shared_data;
    use crate::text::{SpecialTokens, Text};
    use crate::tokenizer::open_tokenizer;

    const MODELS: [(&str, &[u8]); 4] = [
        ("unigram", include_bytes!("../tests/fixtures/sentencepiece/unigram.model")),
        ("unigram-bytes", include_bytes!("../tests/fixtures/sentencepiece/unigram-bytes.model")),
        ("bpe", include_bytes!("../tests/fixtures/sentencepiece/bpe.model")),
        ("bpe-bytes", include_bytes!("../tests/fixtures/sentencepiece/bpe-bytes.model")),
    ];

    fn open(model: &[u8], more: &[(&str, &str)]) -> Result<TokenizerFile> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.model"), model).unwrap();
        for (name, text) in more {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Ok(open_tokenizer(folder.path(), None)?.tokenizer)
    }

    #[test]
    fn ids_are_those_of_the_sentencepiece_library() {
        let expected: Json = serde_json::from_str(include_str!("../tests/fixtures/sentencepiece/ids.json")).unwrap();
        let texts: Vec<String> = serde_json::from_value(expected["texts"].clone()).unwrap();
        for (name, model) in MODELS {
            let ids: Vec<Vec<u32>> = serde_json::from_value(expected[name].clone()).unwrap();
            assert_eq!(ids.len(), 249, "{name}");
            let text = Text::new(&open(model, &[]).unwrap(), SpecialTokens::Text).unwrap();
            for (sample, ids) in texts.iter().zip(&ids) {
                assert_eq!(text.encode(sample).unwrap(), *ids, "{name}: {sample:?}");
            }
        }
    }

    #[test]
    fn a_text_comes_back_and_roles_are_those_of_the_model() {
        for (name, model) in MODELS {
            let file = open(model, &[]).unwrap();
            let pad = (name == "bpe").then_some(3);
            assert_eq!((file.unk, file.begin, file.end, file.pad), (Some(0), Some(1), 2, pad), "{name}");
            let text = Text::new(&file, SpecialTokens::Text).unwrap();
            let sample = "What is the capital of France?";
            assert_eq!(text.decode(&text.encode(sample).unwrap()).unwrap(), sample, "{name}");
            assert_eq!(text.encode("<s>").unwrap().iter().find(|id| **id == 1), None, "{name}");
        }
        let bpe = Text::new(&open(MODELS[2].1, &[]).unwrap(), SpecialTokens::Text).unwrap();
        assert!(bpe.encode("a<sep>b").unwrap().iter().any(|id| bpe.token(*id).unwrap() == "<sep>"));
    }

    #[test]
    fn files_beside_the_model_count() {
        let config = r#"{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "eos_token": "<unk>"}"#;
        let file = open(MODELS[3].1, &[("tokenizer_config.json", config)]).unwrap();
        assert_eq!((file.prefix, file.end), (vec![1], 0));
        let merges = [("vocab.json", r#"{"a": 0, "b": 1, "ab": 2, "</s>": 3}"#), ("merges.txt", "a b\n")];
        let file = open(MODELS[3].1, &merges).unwrap();
        assert_eq!(file.size, 4);
    }

    #[test]
    fn the_tokenizer_of_llama_2_gives_its_known_ids() {
        let Some(data) = shared_data("tokenizers/llama2") else { return };
        let file = open_tokenizer(&data, None).unwrap().tokenizer;
        assert_eq!((file.size, file.begin, file.end), (32000, Some(1), 2));
        let text = Text::new(&file, SpecialTokens::Text).unwrap();
        assert_eq!(text.encode("Hello world").unwrap(), [15043, 3186]);
        assert_eq!(text.encode(" Hello").unwrap(), [29871, 15043]);
        assert_eq!(text.encode("\u{0}ü").unwrap(), [29871, 3, 29993]);
    }

    #[test]
    fn what_is_not_read_is_refused_by_name() {
        let error = |model: &[u8]| format!("{:#}", open(model, &[]).unwrap_err());
        assert!(error(b"Hello").contains("no whole SentencePiece model"));
        assert!(error(b"").contains("it has no pieces"));
        let whole = Model::read(MODELS[0].1).unwrap();
        let of = |change: &dyn Fn(&mut Model)| {
            let mut model = whole.clone();
            change(&mut model);
            model.tokenizer().unwrap_err().to_string()
        };
        assert!(of(&|model| model.pieces[9] = model.pieces[8].clone()).contains("pieces 8 and 9 are both"));
        assert!(of(&|model| model.pieces[0].sort = Sort::Control).contains("stands for the unknown"));
        assert!(of(&|model| model.pieces[7].score = f32::NAN).contains("score of piece 7 is not finite"));
        for damage in [|map: &mut Vec<u8>| map.truncate(40), |map: &mut Vec<u8>| map[7] |= 0x80] {
            assert!(of(&|model| damage(&mut model.characters)).contains("map of characters is damaged"));
        }
    }

    #[test]
    fn base64_is_what_others_read() {
        let cases = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    /// What comes of a model must also be safe to use.
    fn try_out(model: &[u8]) {
        let Ok(text) = open(model, &[]).and_then(|file| Text::new(&file, SpecialTokens::Text)) else { return };
        for sample in ["What is the capital of France?", " １２ ﬁ e\u{301} \u{0} 😀 \n\t", "日本 <s>"] {
            _ = text.encode(sample);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            try_out(&bytes);
        }

        #[test]
        fn no_change_of_a_model_makes_it_panic(
            which in 0..MODELS.len(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
            in_characters in any::<bool>(),
        ) {
            let mut bytes = MODELS[which].1.to_vec();
            // The map of characters stands at the end.
            let from = if in_characters { bytes.len() - bytes.len() / 4 } else { 0 };
            for (place, byte) in changes {
                let length = bytes.len();
                bytes[from + place.index(length - from)] = byte;
            }
            try_out(&bytes);
        }
    }
}
