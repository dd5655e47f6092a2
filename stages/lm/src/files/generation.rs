//! How a model writes, as its folder says, and the tokens that end a text.
//!
//! Data is written with one, the tokenizer's. A model may have learnt to say others as well: chat models end a turn with
//! their own. `config.json` names some and `generation_config.json` others, each one or a list, and `transformers` stops at
//! those of the latter where it is there. All of them end a text here: a model that says any of them has no more to say.

use std::path::Path;

use contract::{Result, TokenizerFile, files};
use serde_json::{Value as Json, json};

use crate::families::{Config, EndTokens};

/// The file of a model folder that says how the model writes.
pub(crate) const FILE: &str = "generation_config.json";

/// A `generation_config.json` as it was read; nothing where a folder has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GenerationConfig(Option<Json>);

impl GenerationConfig {
    /// Errors when the file is there and is not what it should be.
    pub(crate) fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(GenerationConfig(None));
        }
        let json: Json = files::read_json(&path, files::SETTINGS)?;
        anyhow::ensure!(json.is_object(), "`{}` is not a JSON object", path.display());
        if let Some(ends) = json.get("eos_token_id").filter(|ends| !ends.is_null()) {
            anyhow::ensure!(
                serde_json::from_value::<EndTokens>(ends.clone()).is_ok(),
                "`{}` has `eos_token_id: {ends}`: expected a token id or a list of ids",
                path.display()
            );
        }
        Ok(GenerationConfig(Some(json)))
    }

    fn ends(&self) -> Vec<u32> {
        self.0.as_ref().map_or_else(Vec::new, named)
    }

    /// What is written beside the model's `config`: what was read, with all of `ends`.
    pub(crate) fn beside(&self, config: &Json, ends: &[u32]) -> Json {
        let mut json = self.0.clone().unwrap_or_else(|| {
            let roles = ["bos_token_id", "eos_token_id", "pad_token_id"];
            Json::Object(roles.into_iter().map(|role| (role.to_owned(), config[role].clone())).collect())
        });
        let known = named(self.0.as_ref().unwrap_or(config));
        if ends.iter().any(|end| !known.contains(end)) {
            json["eos_token_id"] = if let [end] = ends { json!(end) } else { json!(ends) };
        }
        json
    }
}

/// The end tokens that a configuration names.
fn named(config: &Json) -> Vec<u32> {
    let ends = serde_json::from_value::<EndTokens>(config["eos_token_id"].clone());
    ends.map_or_else(|_| Vec::new(), |ends| ends.as_slice().to_vec())
}

/// All tokens at which a model stops, the tokenizer's first: those there are tokens for.
pub(crate) fn ends(tokenizer: &TokenizerFile, config: &Config, generation: &GenerationConfig) -> Vec<u32> {
    let mut ends = vec![tokenizer.end];
    for end in config.ends().iter().copied().chain(generation.ends()) {
        if !ends.contains(&end) && (end as usize) < config.vocab_size() {
            ends.push(end);
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::families::{Architecture, Family};

    #[test]
    fn every_end_counts_once_and_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = TokenizerFile::new("", 3, 20);
        let config = Architecture::new(Family::Llama, 1, 32).config(20, 5).unwrap();
        let none = GenerationConfig::load(folder.path()).unwrap();
        assert_eq!(ends(&tokenizer, &config, &none), [3, 5]);
        assert_eq!(none.beside(&config.to_json().unwrap(), &[3, 5])["eos_token_id"], json!([3, 5]));
        let write = |text: &str| fs::write(folder.path().join(FILE), text).unwrap();
        write(r#"{"eos_token_id": [7, 5, 99], "top_k": 4}"#);
        let some = GenerationConfig::load(folder.path()).unwrap();
        // There is no token 99.
        assert_eq!(ends(&tokenizer, &config, &some), [3, 5, 7]);
        let beside = some.beside(&config.to_json().unwrap(), &[3, 5, 7]);
        assert_eq!((&beside["eos_token_id"], &beside["top_k"]), (&json!([3, 5, 7]), &json!(4)));
        assert_eq!(some.beside(&config.to_json().unwrap(), &[7, 5])["eos_token_id"], json!([7, 5, 99]));
        write(r#"{"eos_token_id": null}"#);
        assert_eq!(ends(&tokenizer, &config, &GenerationConfig::load(folder.path()).unwrap()), [3, 5]);
        for wrong in [r#"{"eos_token_id": "</s>"}"#, r#"{"eos_token_id": -1}"#, "[]"] {
            write(wrong);
            let error = GenerationConfig::load(folder.path()).unwrap_err().to_string();
            assert!(error.contains(FILE), "{error}");
        }
    }
}
