//! Text to ids and back: a thin layer over the `tokenizers` library that always leaves special tokens out, and the ways
//! to find a tokenizer on disk.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use contract::{TokenizerFile, files};
use rayon::prelude::*;
use serde_json::Value as Json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Tokenizer};

/// A tokenizer ready for use. Encoding never adds a special token, never cuts and never pads.
#[derive(Clone)]
pub struct Text {
    tokenizer: Tokenizer,
    end: u32,
}

impl Text {
    /// Opens the tokenizer that a dataset or model carries.
    pub fn new(file: &TokenizerFile) -> Result<Self> {
        let mut tokenizer = parse(&file.json).context("cannot read the tokenizer")?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| anyhow!("cannot read the tokenizer: {e}"))?;
        Ok(Text { tokenizer, end: file.end })
    }

    /// Id of the token that ends a text.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Ids of `text`. The literal text of an added token, such as `<|endoftext|>`, becomes that token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| anyhow!("cannot tokenise a text: {e}"))?;
        Ok(encoding.get_ids().to_vec())
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

/// Finds the tokenizer at `path`: a `tokenizer.json`, or a folder with one, or a folder with `vocab.json` and `merges.txt`
/// (byte-level BPE as GPT-2 and OPT were first published).
///
/// The end token is `end_token` where given; for a folder what `pipeline_tokenizer.json`, `tokenizer_config.json` or
/// `special_tokens_map.json` say; else `<|endoftext|>`, `</s>` or `<|end_of_text|>` if one of them is in the vocabulary.
pub fn open_tokenizer(path: &Path, end_token: Option<&str>) -> Result<TokenizerFile> {
    let is_folder = path.is_dir();
    if is_folder && end_token.is_none() && path.join("pipeline_tokenizer.json").is_file() {
        return TokenizerFile::load(path);
    }
    let file = if is_folder { path.join("tokenizer.json") } else { path.to_owned() };
    let (json, tokenizer) = if is_folder && !file.is_file() {
        let tokenizer = from_vocabulary(path)?;
        (tokenizer.to_string(false).map_err(|e| anyhow!("cannot write a tokenizer: {e}"))?.into_bytes(), tokenizer)
    } else {
        let json = files::read(&file, files::TOKENIZER)?;
        let tokenizer = parse(&json).with_context(|| format!("cannot read `{}`", file.display()))?;
        (json, tokenizer)
    };
    let declared = match (end_token, is_folder) {
        (Some(token), _) => Some(token.to_owned()),
        (None, true) => declared_end(path)?,
        (None, false) => None,
    };
    let end = match declared {
        Some(token) => tokenizer
            .token_to_id(&token)
            .with_context(|| format!("end token `{token}` is not in the vocabulary of `{}`", path.display()))?,
        None => ["<|endoftext|>", "</s>", "<|end_of_text|>"]
            .iter()
            .find_map(|token| tokenizer.token_to_id(token))
            .with_context(|| format!("no end token is known for `{}`; name it with `end_token`", path.display()))?,
    };
    let vocabulary = tokenizer.get_vocab(true);
    let size = vocabulary.values().max().with_context(|| format!("`{}` has no token", path.display()))? + 1;
    Ok(TokenizerFile::new(json, end, size))
}

fn parse(json: &[u8]) -> Result<Tokenizer> {
    Tokenizer::from_bytes(json).map_err(|e| anyhow!("not a tokenizer that can be used here: {e}"))
}

/// The end token that the files beside a tokenizer name.
fn declared_end(folder: &Path) -> Result<Option<String>> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        let json: Json = files::read_json(&path, files::SETTINGS)?;
        // A token is written as its text, or as an object with its text under `content`.
        let token = &json["eos_token"];
        if let Some(token) = token.as_str().or_else(|| token["content"].as_str()) {
            return Ok(Some(token.to_owned()));
        }
    }
    Ok(None)
}

fn from_vocabulary(folder: &Path) -> Result<Tokenizer> {
    let (vocabulary, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    for path in [&vocabulary, &merges] {
        ensure!(
            path.is_file(),
            "`{}` holds no tokenizer: expected `tokenizer.json`, or `vocab.json` with `merges.txt`",
            folder.display()
        );
        files::open(path, files::TOKENIZER)?;
    }
    let (Some(vocabulary), Some(merges)) = (vocabulary.to_str(), merges.to_str()) else {
        bail!("`{}` is not UTF-8", folder.display());
    };
    let model = BPE::from_file(vocabulary, merges)
        .build()
        .map_err(|e| anyhow!("cannot read the vocabulary in `{}`: {e}", folder.display()))?;
    let mut tokenizer = byte_level(model);
    let special: Vec<_> = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>"]
        .into_iter()
        .filter(|token| tokenizer.token_to_id(token).is_some())
        .map(|token| AddedToken::from(token, true))
        .collect();
    tokenizer.add_special_tokens(special).map_err(|e| anyhow!("cannot read `{}`: {e}", folder.display()))?;
    Ok(tokenizer)
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
    use std::fs;

    use super::*;
    use crate::testing::shared_data;

    #[test]
    fn gpt2_gives_the_known_ids_from_each_of_its_forms() {
        let Some(data) = shared_data("tokenizers/gpt2") else { return };
        let folder = open_tokenizer(&data, None).unwrap();
        let file = open_tokenizer(&data.join("tokenizer.json"), None).unwrap();
        let first_form = tempfile::tempdir().unwrap();
        fs::copy(data.join("encoder.json"), first_form.path().join("vocab.json")).unwrap();
        fs::copy(data.join("vocab.bpe"), first_form.path().join("merges.txt")).unwrap();
        let first_form = open_tokenizer(first_form.path(), None).unwrap();
        for tokenizer in [&folder, &file, &first_form] {
            assert_eq!((tokenizer.end, tokenizer.size), (50256, 50257));
            let text = Text::new(tokenizer).unwrap();
            let ids = text.encode("Hello world! Knowledge distillation.").unwrap();
            assert_eq!(ids, [15496, 995, 0, 20414, 1233, 40903, 13]);
            assert_eq!(text.decode(&ids).unwrap(), "Hello world! Knowledge distillation.");
            assert_eq!(text.encode("a<|endoftext|>").unwrap(), [64, 50256]);
            assert_eq!(text.decode(&[64, 50256]).unwrap(), "a");
        }
        assert_eq!(folder.vocabulary(), file.vocabulary());
    }

    #[test]
    fn opt_is_gpt2_with_other_numbers() {
        let (Some(opt), Some(gpt2)) = (shared_data("tokenizers/opt"), shared_data("tokenizers/gpt2")) else { return };
        let folder = tempfile::tempdir().unwrap();
        fs::copy(opt.join("gpt2-vocab.json"), folder.path().join("vocab.json")).unwrap();
        fs::copy(opt.join("gpt2-merges.txt"), folder.path().join("merges.txt")).unwrap();
        let opt = open_tokenizer(folder.path(), Some("</s>")).unwrap();
        assert_eq!((opt.end, opt.size), (2, 50265));
        let opt_text = Text::new(&opt).unwrap();
        let gpt2_text = Text::new(&open_tokenizer(&gpt2, None).unwrap()).unwrap();
        let text = " Déjà vu, 12 years ago.";
        let names = |t: &Text, ids: &[u32]| ids.iter().map(|id| t.tokenizer.id_to_token(*id)).collect::<Vec<_>>();
        let (a, b) = (opt_text.encode(text).unwrap(), gpt2_text.encode(text).unwrap());
        assert_eq!(names(&opt_text, &a), names(&gpt2_text, &b));
        assert_ne!(a, b);
    }

    #[test]
    fn the_end_token_comes_from_the_files_beside_the_tokenizer() {
        let Some(llama) = shared_data("weights/tinystories-656k-llama") else { return };
        assert_eq!(open_tokenizer(&llama, None).unwrap().end, 2); // `<|end_story|>`
        assert_eq!(open_tokenizer(&llama, Some("<|start_story|>")).unwrap().end, 1);
        let error = open_tokenizer(&llama, Some("<eot>")).unwrap_err().to_string();
        assert!(error.contains("end token `<eot>` is not in the vocabulary"), "{error}");
        let error = open_tokenizer(&llama.join("tokenizer.json"), None).unwrap_err().to_string();
        assert!(error.contains("`end_token`"), "{error}");
    }

    #[test]
    fn a_folder_without_tokenizer_says_what_was_expected() {
        let folder = tempfile::tempdir().unwrap();
        let error = open_tokenizer(folder.path(), None).unwrap_err().to_string();
        assert!(error.contains("expected `tokenizer.json`"), "{error}");
    }
}
