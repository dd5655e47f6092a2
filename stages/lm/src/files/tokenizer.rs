//! The tokenizer of a model folder.

use std::path::Path;

use anyhow::Context;
use contract::files;
use contract::tokenizer::tokens;
use contract::{Result, TokenizerFile};
use serde_json::Value as Json;

use crate::families::Config;

/// The tokenizer that was saved with a model. Of a folder that is not ours, the `tokenizer.json` as it is, with the end
/// token of the configuration.
pub(crate) fn load(folder: &Path, config: &Config) -> Result<TokenizerFile> {
    if TokenizerFile::is_saved_in(folder) {
        return TokenizerFile::load(folder);
    }
    let end = *config.ends().first().with_context(|| {
        format!("`{}` names no end token: set `eos_token_id`", folder.join("config.json").display())
    })?;
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        return Ok(TokenizerFile::new("", end, config.vocab_size() as u32));
    }
    let json = files::read(&path, files::TOKENIZER)?;
    let words: Json = serde_json::from_slice(&json).with_context(|| format!("`{}` is not JSON", path.display()))?;
    let size = tokens(&words).keys().next_back().map_or(0, |id| id + 1);
    Ok(TokenizerFile::new(json, end, size))
}
