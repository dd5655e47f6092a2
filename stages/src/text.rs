//! Text to ids and back: a thin layer over the `tokenizers` library that always leaves special tokens out.

use anyhow::{Context, Result, anyhow};
use contract::TokenizerFile;
use rayon::prelude::*;
use tokenizers::Tokenizer;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;

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

fn parse(json: &[u8]) -> Result<Tokenizer> {
    Tokenizer::from_bytes(json).map_err(|e| anyhow!("not a tokenizer that can be used here: {e}"))
}

/// Byte-level BPE with the word pattern of GPT-2 around `model`.
pub(crate) fn byte_level(model: BPE) -> Tokenizer {
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    tokenizer
}
