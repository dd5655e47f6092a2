//! How a tokenizer on disk is read: once, where it comes in, and as `AutoTokenizer` of `transformers` 5 reads it.
//!
//! A folder says in many places what ids a text has. The class that `tokenizer_config.json` names (else `config.json`)
//! decides how much of `tokenizer.json` counts: the general class takes it as it is; those of GPT-2, Llama, Qwen2 and
//! GPT-NeoX take the vocabulary, the merges and the post-processor, and bring the rest themselves. Then tokens are added:
//! those of `added_tokens_decoder`, in older folders those of `special_tokens_map.json` and `added_tokens.json`; then
//! those with a role. All of it becomes one `tokenizer.json`, from which this program takes ids.
//!
//! Two things are left out on purpose: randomness (BPE dropout), and tokens that no file names, which the classes invent
//! and no model has a row for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use contract::tokenizer::{files_in, tokens};
use contract::{TokenizerFile, files};
use serde_json::{Map, Value as Json, json};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, Tokenizer};

use crate::sentencepiece;

/// A tokenizer that was read, and what is worth saying of it.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The tokenizer.
    pub tokenizer: TokenizerFile,
    /// What was done otherwise than its files say, as sentences.
    pub notes: Vec<String>,
}

/// Finds the tokenizer at `path`: a `tokenizer.json`, or a folder with one, or a folder with `vocab.json` and `merges.txt`
/// (byte-level BPE as GPT-2 and OPT were first published), or one with the `tokenizer.model` of SentencePiece.
///
/// The end token is `end_token` where given; else what the files of a folder say; else `<|endoftext|>`, `</s>` or
/// `<|end_of_text|>` if one of them is in the vocabulary.
pub fn open_tokenizer(path: &Path, end_token: Option<&str>) -> Result<Opened> {
    let place = path.display().to_string();
    let folder = if path.is_dir() {
        Folder { place, files: files_in(path)?, model: Settings::of_model(path) }
    } else {
        Folder::of_file(place, files::read(path, files::TOKENIZER)?)?
    };
    folder.open(end_token)
}

/// Opens a tokenizer from its files by name. `place` is what messages call it.
///
/// Errors as [`open_tokenizer`] does.
pub(crate) fn open_files(place: String, files: BTreeMap<String, Vec<u8>>, end_token: Option<&str>) -> Result<Opened> {
    Folder { place, files, model: Settings::default() }.open(end_token)
}

/// Whether a folder holds files of a tokenizer.
pub(crate) fn is_tokenizer(folder: &Path) -> bool {
    [MAIN, PIECES, "vocab.json"].iter().any(|name| folder.join(name).exists())
}

/// Names of the files of a folder that decide how its tokenizer is read.
pub fn sources() -> Vec<&'static str> {
    contract::tokenizer::FILES.into_iter().chain(["config.json", "*.jinja"]).collect()
}

const MAIN: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const PIECES: &str = "tokenizer.model";
const ROLES: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// Roles of tokens that every class knows, in the order in which they are added.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Where special tokens without a role are listed, today and once.
const EXTRA: &str = "extra_special_tokens";
const EXTRA_OF_OLD: &str = "additional_special_tokens";

/// End tokens by custom, where nothing names one.
const ENDS: [&str; 3] = ["<|endoftext|>", "</s>", "<|end_of_text|>"];

/// The special tokens of byte-level vocabularies that came without any settings.
const CUSTOMARY: [&str; 6] = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>"];

/// The files of a tokenizer, and what the model beside says of it.
struct Folder {
    /// What messages call it.
    place: String,
    files: BTreeMap<String, Vec<u8>>,
    model: Settings,
}

/// What a model's `config.json` says of its tokenizer.
#[derive(Default)]
struct Settings {
    class: Option<String>,
    family: Option<String>,
}

impl Settings {
    /// Nothing where the file cannot be read: who reads the model says so.
    fn of_model(folder: &Path) -> Self {
        let path = folder.join("config.json");
        let json = path.is_file().then(|| files::read_json::<Json>(&path, files::SETTINGS).ok()).flatten();
        let text = |key: &str| json.as_ref().and_then(|json| Some(json[key].as_str()?.to_owned()));
        Settings { class: text("tokenizer_class"), family: text("model_type") }
    }
}

/// How a class reads a folder.
#[derive(Clone, Debug, PartialEq)]
enum Class {
    /// `tokenizer.json` as it is. The name is there where it stands for a class of its own that is not known here.
    AsItIs(Option<String>),
    Gpt2,
    Llama,
    Qwen2,
    GptNeoX,
}

/// A token that is to be added.
struct Role {
    /// Empty for those that are special without a role.
    key: String,
    token: AddedToken,
    /// Whether it is written as its text alone. `transformers` adds it then even where it is there with flags.
    is_text: bool,
    /// Whether no file names it: it counts where it exists.
    is_invented: bool,
}

impl Role {
    fn of(key: &str, token: &Json, is_invented: bool) -> Option<Self> {
        Some(Role {
            key: key.to_owned(),
            token: added_token(token, Some(true))?,
            is_text: token.is_string(),
            is_invented,
        })
    }
}

/// What is known of a tokenizer beside its `tokenizer.json`.
struct Wanted {
    class: Class,
    /// What `tokenizer_config.json` says, with older files read into it.
    settings: Map<String, Json>,
    /// Tokens by id.
    decoder: BTreeMap<u64, AddedToken>,
    roles: Vec<Role>,
}

impl Folder {
    /// A `tokenizer.json` alone: it is taken as it is, and made a folder that `transformers` opens.
    fn of_file(place: String, json: Vec<u8>) -> Result<Self> {
        let tokens = tokens(&object(&json, MAIN, &place)?);
        let settings = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
        let files = [(MAIN.to_owned(), json), (CONFIG.to_owned(), written(&settings))];
        let mut folder = Folder { place, files: files.into(), model: Settings::default() };
        if let Some(end) = ENDS.iter().find(|end| tokens.values().any(|token| token == *end)) {
            folder.end_with(end)?;
        }
        Ok(folder)
    }

    fn open(mut self, end_token: Option<&str>) -> Result<Opened> {
        if let Some(end) = end_token {
            self.end_with(end)?;
        }
        let (main, roles) = self.main()?;
        let mut notes = Vec::new();
        let wanted = self.wanted(main.as_ref(), roles, &mut notes)?;
        let base = self.base(&wanted, main.as_ref(), &mut notes)?;
        let is_known = |token: &str| {
            base.token_to_id(token).is_some() || wanted.decoder.values().any(|known| known.content == token)
        };
        if let Some(end) = end_token.filter(|end| !is_known(end)) {
            bail!("end token `{end}` is not in the vocabulary of `{}`", self.place);
        }
        let tokenizer =
            wanted.complete(base, main.as_ref()).with_context(|| format!("cannot read `{}`", self.place))?;
        let id = |token: &str| tokenizer.token_to_id(token);
        let role = |key: &str| wanted.role(key).and_then(id);
        let end = end_token.and_then(id).or_else(|| role("eos_token")).or_else(|| ENDS.into_iter().find_map(id));
        let end =
            end.with_context(|| format!("no end token is known for `{}`; name it with `end_token`", self.place))?;
        let vocabulary = tokenizer.get_vocab(true);
        let size = vocabulary.values().max().with_context(|| format!("`{}` has no token", self.place))? + 1;
        let (prefix, suffix) = around(&tokenizer)?;
        let json = text_of(&tokenizer)?;
        // The file itself, where it says the same.
        let json = match self.files.get(MAIN) {
            Some(file) if parse(file).and_then(|own| text_of(&own)).is_ok_and(|own| own == json) => file.clone(),
            _ => json.into_bytes(),
        };
        let tokenizer = TokenizerFile {
            end,
            size,
            begin: role("bos_token"),
            pad: role("pad_token"),
            unk: role("unk_token"),
            prefix,
            suffix,
            files: Arc::new(self.files),
            json: Arc::new(json),
        };
        Ok(Opened { tokenizer, notes })
    }

    /// Its `tokenizer.json`, or what a SentencePiece model says instead, with the tokens that the model gives a role.
    fn main(&self) -> Result<(Option<Json>, BTreeMap<&'static str, String>)> {
        if let Some(bytes) = self.files.get(MAIN) {
            return Ok((Some(object(bytes, MAIN, &self.place)?), BTreeMap::new()));
        }
        let is_bpe = ["vocab.json", "merges.txt"].iter().all(|name| self.files.contains_key(*name));
        let Some(bytes) = self.files.get(PIECES).filter(|_| !is_bpe) else { return Ok((None, BTreeMap::new())) };
        let model = sentencepiece::Model::read(bytes);
        let model = model.and_then(|model| Ok((Some(model.tokenizer()?), model.roles)));
        model.with_context(|| format!("`{PIECES}` of `{}` cannot be read", self.place))
    }

    /// Makes `end` the end token that the files name, for whoever reads them later.
    fn end_with(&mut self, end: &str) -> Result<()> {
        self.files.entry(CONFIG.to_owned()).or_insert_with(|| written(&json!({})));
        for name in [CONFIG, ROLES] {
            let Some(bytes) = self.files.get(name) else { continue };
            let mut settings = object(bytes, name, &self.place)?;
            if token_text(&settings["eos_token"]) != Some(end) {
                settings["eos_token"] = json!(end);
                self.files.insert(name.to_owned(), written(&settings));
            }
        }
        Ok(())
    }

    /// What the files beside `tokenizer.json` ask for. `roles` are those of a SentencePiece model.
    fn wanted(
        &self,
        main: Option<&Json>,
        roles: BTreeMap<&'static str, String>,
        notes: &mut Vec<String>,
    ) -> Result<Wanted> {
        let read = |name: &str| self.files.get(name).map(|bytes| object(bytes, name, &self.place)).transpose();
        let config = read(CONFIG)?.unwrap_or_else(|| json!({}));
        let is_bare = !self.files.contains_key(CONFIG) && self.model.family.is_none() && main.is_none();
        let class = if is_bare { Class::Gpt2 } else { self.class(&config, main, notes) };
        let mut settings = config.as_object().cloned().unwrap_or_default();
        let is_listed = settings.get(EXTRA).is_some_and(|extra| ![json!(null), json!([]), json!({})].contains(extra));
        if !is_listed && let Some(older) = settings.remove(EXTRA_OF_OLD) {
            settings.insert(EXTRA.into(), older);
        }
        if self.files.contains_key(MAIN) {
            // There the post-processor decides.
            settings.remove("add_bos_token");
            settings.remove("add_eos_token");
        }
        let mut decoder = BTreeMap::new();
        if let Some(tokens) = settings.get("added_tokens_decoder").and_then(Json::as_object) {
            for (id, token) in tokens {
                let id = id.parse().with_context(|| format!("{CONFIG} names an id `{id}`"))?;
                decoder.insert(id, added_token(token, None).with_context(|| format!("{CONFIG} has no token at {id}"))?);
            }
        } else {
            for (key, value) in read(ROLES)?.iter().filter_map(Json::as_object).flatten() {
                settings.insert(key.clone(), role_of_map(value));
            }
            for (token, id) in read(ADDED)?.iter().filter_map(Json::as_object).flatten() {
                let is_special = NAMED.iter().any(|key| settings.get(*key).and_then(token_text) == Some(token))
                    || listed(&settings, EXTRA).iter().any(|extra| token_text(extra) == Some(token));
                if let Some(id) = id.as_u64() {
                    decoder.insert(id, AddedToken::from(token.clone(), is_special));
                }
            }
            for token in main.iter().filter_map(|main| main["added_tokens"].as_array()).flatten() {
                if let (Some(id), Some(token)) = (token["id"].as_u64(), added_token(token, None)) {
                    decoder.insert(id, token);
                }
            }
        }
        for (role, token) in roles {
            settings.entry(role).or_insert_with(|| token.into());
        }
        let mut wanted = Wanted { class, settings, decoder, roles: Vec::new() };
        wanted.find_roles(main);
        if is_bare {
            wanted.roles.extend(CUSTOMARY.iter().filter_map(|token| Role::of("", &json!(token), true)));
        }
        Ok(wanted)
    }

    /// The class that `AutoTokenizer` would make.
    fn class(&self, config: &Json, main: Option<&Json>, notes: &mut Vec<String>) -> Class {
        let named = config["tokenizer_class"].as_str().or(self.model.class.as_deref());
        let named = named.map(|name| name.strip_suffix("Fast").unwrap_or(name));
        let family = self.model.family.as_deref().and_then(class_of_family);
        // Classes that model families bring along where their files name another.
        let is_overruled = self.model.family.as_deref() == Some("qwen2");
        let is_byte_level = || main.is_some_and(|main| main.to_string().contains("\"ByteLevel\""));
        let name = match (named, family) {
            (Some("LlamaTokenizer"), _) if !is_overruled && is_byte_level() => GENERAL,
            (Some(named), Some(family)) if named != family => match family {
                GENERAL => GENERAL,
                family if is_overruled => family,
                _ => named,
            },
            (Some(name), _) | (None, Some(name)) => name,
            (None, None) => GENERAL,
        };
        match name {
            "GPT2Tokenizer" => Class::Gpt2,
            "LlamaTokenizer" => Class::Llama,
            "Qwen2Tokenizer" => Class::Qwen2,
            "GPTNeoXTokenizer" => Class::GptNeoX,
            GENERAL | "PreTrainedTokenizer" | "BloomTokenizer" => Class::AsItIs(None),
            other => {
                notes.push(format!(
                    "the tokenizer of `{}` is of class `{other}`, which is not known here: its ids come from \
                     `{MAIN}` as it is",
                    self.place
                ));
                Class::AsItIs(Some(other.to_owned()))
            }
        }
    }

    /// The tokenizer before tokens are added beyond those of `tokenizer.json`.
    fn base(&self, wanted: &Wanted, main: Option<&Json>, notes: &mut Vec<String>) -> Result<Tokenizer> {
        let mut json = match (main, &wanted.class) {
            (Some(main), Class::AsItIs(_)) => main.clone(),
            (Some(main), class) => {
                let mut json = class.around(vocabulary(&main["model"]), main["model"]["merges"].clone(), wanted);
                json["post_processor"] = main["post_processor"].clone();
                json
            }
            (None, class) => {
                let class = if let Class::AsItIs(_) = class { &Class::Gpt2 } else { class };
                let (vocabulary, merges) = self.vocabulary_files()?;
                class.around(vocabulary, merges, wanted)
            }
        };
        if let Some(dropout) = main.and_then(|main| main["model"]["dropout"].as_f64()).filter(|dropout| *dropout != 0.0)
        {
            notes.push(format!(
                "`model.dropout: {dropout}` in `{MAIN}` of `{}` is switched off: a text has the same ids each time",
                self.place
            ));
        }
        for key in ["truncation", "padding"] {
            json[key] = Json::Null;
        }
        if wanted.settings.get("clean_up_tokenization_spaces") == Some(&json!(true)) && json["model"]["type"] != "BPE" {
            json["decoder"] = tidied(&json["decoder"]);
        }
        if json["model"].get("dropout").is_some() {
            json["model"]["dropout"] = Json::Null;
        }
        serde_json::from_value(json)
            .map_err(|e| anyhow!("cannot read `{}`: not a tokenizer that can be used here: {e}", self.place))
    }

    /// The vocabulary and the merges of a folder without `tokenizer.json`.
    fn vocabulary_files(&self) -> Result<(Json, Json)> {
        let (Some(vocabulary), Some(merges)) = (self.files.get("vocab.json"), self.files.get("merges.txt")) else {
            bail!(
                "`{}` holds no tokenizer: expected `{MAIN}`, `{PIECES}`, or `vocab.json` with `merges.txt`",
                self.place
            )
        };
        let vocabulary = object(vocabulary, "vocab.json", &self.place)?;
        let merges =
            std::str::from_utf8(merges).with_context(|| format!("`merges.txt` of `{}` is not UTF-8", self.place))?;
        let pairs = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        let pairs = pairs.map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [left, right] => Ok(json!([left, right])),
            _ => bail!("`merges.txt` of `{}`: expected two tokens in `{line}`", self.place),
        });
        Ok((vocabulary, Json::Array(pairs.collect::<Result<_>>()?)))
    }
}

impl Wanted {
    /// The tokens with a role: those that the files name, else those of the class.
    fn find_roles(&mut self, main: Option<&Json>) {
        // A saved padding names its token, for classes that do not name one themselves.
        let padding = main.filter(|_| matches!(self.class, Class::AsItIs(_) | Class::Llama));
        let padding = padding.and_then(|main| main["padding"]["pad_token"].as_str());
        let defaults = self.class.roles();
        let own = self.settings.iter().filter(|(key, _)| key.ends_with("_token") && !NAMED.contains(&key.as_str()));
        let titled = self.settings.get(EXTRA).and_then(Json::as_object).into_iter().flatten();
        let own: Vec<(String, Json)> = own.chain(titled).map(|(key, token)| (key.clone(), token.clone())).collect();
        let named = NAMED.iter().filter_map(|key| {
            let default = defaults.iter().find(|(role, _)| role == key).map(|(_, token)| json!(token));
            let given = self.settings.get(*key).cloned();
            let given = given.or_else(|| padding.filter(|_| *key == "pad_token").map(|token| json!(token)));
            let is_invented = given.is_none();
            Some(((*key).to_owned(), given.or(default)?, is_invented))
        });
        let all = named.chain(own.into_iter().map(|(key, token)| (key, token, false)));
        let roles = all.filter_map(|(key, token, is_invented)| {
            let role = Role::of(&key, &token, is_invented)?;
            let known = self.decoder.values().rev().find(|known| known.content == role.token.content);
            Some(match known {
                Some(known) => Role { token: known.clone(), is_text: false, ..role },
                None => role,
            })
        });
        let extra = [EXTRA, EXTRA_OF_OLD].map(|key| listed(&self.settings, key));
        let extra = extra.into_iter().find(|tokens| !tokens.is_empty()).unwrap_or_default();
        self.roles = roles.chain(extra.iter().filter_map(|token| Role::of("", token, false))).collect();
        // What another role names is there, and is added in the first place that asks for it.
        let named = self.roles.iter().filter(|role| !role.is_invented).map(|role| role.token.content.clone());
        let named: BTreeSet<String> = named.collect();
        self.roles.iter_mut().for_each(|role| role.is_invented &= !named.contains(&role.token.content));
    }

    fn role(&self, key: &str) -> Option<&str> {
        self.roles.iter().find(|role| role.key == key).map(|role| role.token.content.as_str())
    }

    /// Adds the tokens, and gives the post-processor its last form.
    fn complete(&self, mut tokenizer: Tokenizer, main: Option<&Json>) -> Result<Tokenizer> {
        let known = tokenizer.get_added_tokens_decoder();
        let listed = self.decoder.values().filter(|token| !known.values().any(|own| own == *token));
        let mut tokens: Vec<(AddedToken, bool)> = listed.map(|token| (token.clone(), false)).collect();
        let names = known.values().chain(tokens.iter().map(|(token, _)| token)).map(|token| token.content.clone());
        let names: BTreeSet<String> = names.collect();
        for Role { token, is_text, is_invented, .. } in &self.roles {
            let is_there = names.contains(&token.content) || tokens.contains(&(token.clone(), *is_text));
            if !is_there && (!is_invented || tokenizer.token_to_id(&token.content).is_some()) {
                tokens.push((token.clone(), *is_text));
            }
        }
        let has_role = |token: &AddedToken| {
            self.roles.iter().any(|role| !role.key.is_empty() && role.token.content == token.content)
        };
        let tokens =
            tokens.into_iter().map(|(token, _)| AddedToken { special: token.special || has_role(&token), ..token });
        let tokens: Vec<_> = tokens.collect();
        let fail = |e| anyhow!("its tokens cannot be added: {e}");
        tokenizer.add_tokens(tokens).map_err(fail)?;
        if self.class == Class::Qwen2 {
            // This class marks all of them once more.
            let special = self.roles.iter().map(|role| &role.token.content);
            let special = special.filter(|token| tokenizer.token_to_id(token).is_some());
            let special: Vec<_> = special.map(|token| AddedToken::from(token.clone(), true)).collect();
            tokenizer.add_tokens(special).map_err(fail)?;
        }
        let has_own = main.is_some_and(|main| main["post_processor"].is_object());
        let is_asked = ["add_bos_token", "add_eos_token"].iter().any(|key| self.settings.contains_key(*key));
        if self.class == Class::GptNeoX || is_asked || !has_own {
            let processor = self.template(&tokenizer)?;
            tokenizer.with_post_processor(processor);
        }
        Ok(tokenizer)
    }

    /// A beginning and an end where the settings ask for them.
    fn template(&self, tokenizer: &Tokenizer) -> Result<Option<PostProcessorWrapper>> {
        let asked = |key: &str, role: &str| {
            let token = self.settings.get(key).and_then(Json::as_bool)?.then(|| self.role(role))??;
            Some((token.to_owned(), tokenizer.token_to_id(token)?))
        };
        let (begin, end) = (asked("add_bos_token", "bos_token"), asked("add_eos_token", "eos_token"));
        Ok(serde_json::from_value(beginning_and_end(begin, end))?)
    }
}

/// The post-processor that puts tokens before and after a text, each with its id; null where there are none.
pub(crate) fn beginning_and_end(begin: Option<(String, u32)>, end: Option<(String, u32)>) -> Json {
    if begin.is_none() && end.is_none() {
        return Json::Null;
    }
    let piece = |token: &Option<(String, u32)>, of: u8| {
        token.as_ref().map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": of}}))
    };
    let side = |name: &str, of: u8| {
        let text = json!({"Sequence": {"id": name, "type_id": of}});
        piece(&begin, of).into_iter().chain([text]).chain(piece(&end, of)).collect::<Vec<_>>()
    };
    let special = begin
        .iter()
        .chain(&end)
        .map(|(token, id)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})));
    let special: Map<String, Json> = special.collect();
    let pair = [side("A", 0), side("B", 1)].concat();
    json!({"type": "TemplateProcessing", "single": side("A", 0), "pair": pair, "special_tokens": special})
}

/// The class for whatever brings nothing of its own.
const GENERAL: &str = "TokenizersBackend";

/// The class that `transformers` connects with a family of models.
fn class_of_family(family: &str) -> Option<&'static str> {
    Some(match family {
        "gpt2" | "gpt_neo" | "gptj" | "opt" | "phi" | "codegen" | "starcoder2" | "dbrx" | "jais2" => "GPT2Tokenizer",
        "gpt_neox" | "mamba" | "mamba2" | "falcon_mamba" | "mpt" | "olmo" | "olmoe" | "rwkv" | "xlstm" => {
            "GPTNeoXTokenizer"
        }
        "qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe" | "qwen3_next" => "Qwen2Tokenizer",
        "gemma" | "gemma2" | "gemma3" | "gemma3_text" | "recurrent_gemma" => "GemmaTokenizer",
        "cohere" | "cohere2" => "CohereTokenizer",
        "code_llama" => "CodeLlamaTokenizer",
        "mistral" | "mistral3" | "ministral" | "ministral3" | "mixtral" | "granite" | "granitemoe"
        | "granitemoehybrid" | "granitemoeshared" | "olmo2" | "olmo3" | "flex_olmo" | "stablelm" | "glm" | "glm4"
        | "glm4_moe" | "gpt_bigcode" | "persimmon" | "phi3" | "phimoe" | "arctic" | "internlm2" | "internlm3"
        | "jamba" | "minicpm3" | "nemotron" | "fuyu" | "ernie4_5" | "minimax_m2" => GENERAL,
        _ => return None,
    })
}

impl Class {
    /// Tokens that the class gives a role where no file does.
    fn roles(&self) -> &'static [(&'static str, &'static str)] {
        match self {
            Class::AsItIs(_) => &[],
            Class::Gpt2 => {
                &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")]
            }
            Class::Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Class::Qwen2 => {
                &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]
            }
            Class::GptNeoX => &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
                ("pad_token", "<|padding|>"),
            ],
        }
    }

    /// The `tokenizer.json` that the class makes of a vocabulary and merges, without added tokens.
    fn around(&self, vocabulary: Json, merges: Json, wanted: &Wanted) -> Json {
        let flag = |key: &str| wanted.settings.get(key).and_then(Json::as_bool);
        let space = flag("add_prefix_space");
        let is_llama = *self == Class::Llama;
        let affix = if is_llama { Json::Null } else { json!("") };
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": affix,
            "end_of_word_suffix": affix, "fuse_unk": is_llama, "byte_fallback": is_llama, "ignore_merges": false,
            "vocab": vocabulary, "merges": if merges.is_array() { merges } else { json!([]) },
        });
        let bytes = |space: bool, words: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": words});
        let nfc = json!({"type": "NFC"});
        let (normalizer, pieces, decoder) = match self {
            Class::Llama => {
                let space = space.unwrap_or(true);
                let prepend = match (space, flag("legacy").unwrap_or(false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                let pieces =
                    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend, "split": false});
                let mut decoders = vec![
                    json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                    json!({"type": "ByteFallback"}),
                    json!({"type": "Fuse"}),
                ];
                if space {
                    decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                (Json::Null, pieces, json!({"type": "Sequence", "decoders": decoders}))
            }
            Class::Qwen2 => {
                let words = json!({
                    "type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": false,
                });
                let pieces = [words, bytes(space.unwrap_or(false), false)];
                (nfc, json!({"type": "Sequence", "pretokenizers": pieces}), bytes(true, true))
            }
            Class::GptNeoX => (nfc, bytes(space.unwrap_or(false), true), bytes(true, true)),
            Class::Gpt2 | Class::AsItIs(_) => (Json::Null, bytes(space.unwrap_or(false), true), bytes(true, true)),
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": normalizer,
            "pre_tokenizer": pieces, "post_processor": null, "decoder": decoder, "model": model,
        })
    }
}

/// How Qwen2 divides text into words.
pub(crate) const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The vocabulary of a model as BPE holds it: token to id.
fn vocabulary(model: &Json) -> Json {
    let piece = |(id, piece): (usize, &Json)| {
        let token = piece.as_str().or_else(|| piece[0].as_str())?;
        Some((token.to_owned(), json!(id)))
    };
    match &model["vocab"] {
        Json::Array(pieces) => Json::Object(pieces.iter().enumerate().filter_map(piece).collect()),
        vocabulary => vocabulary.clone(),
    }
}

/// A decoder that takes away the spaces before punctuation and short forms, as `transformers` does on the finished text.
fn tidied(decoder: &Json) -> Json {
    /// No token begins with it.
    const NO_MARK: &str = "\u{0}";
    // Without a decoder tokens are joined by spaces.
    let joined = json!({"type": "WordPiece", "prefix": NO_MARK, "cleanup": false});
    let decoder = if decoder.is_null() { joined } else { decoder.clone() };
    let short = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"]
        .map(|text| json!({"type": "Replace", "pattern": {"String": text}, "content": text.trim()}));
    let decoders: Vec<Json> = [decoder, json!({"type": "Fuse"})].into_iter().chain(short).collect();
    json!({"type": "Sequence", "decoders": decoders})
}

/// The ids that a tokenizer puts before and after a text.
fn around(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let fail = |e| anyhow!("cannot try the tokenizer: {e}");
    // Some text that has an id at all: else one could not tell before from after.
    let vocabulary = tokenizer.get_vocab(false);
    let first = vocabulary.iter().min_by_key(|(_, id)| **id).map(|(token, _)| token.clone());
    let probes = ["a", "0", "."].into_iter().map(str::to_owned).chain(first);
    for probe in probes {
        let plain = tokenizer.encode_fast(probe.as_str(), false).map_err(fail)?.get_ids().to_vec();
        let whole = tokenizer.encode_fast(probe.as_str(), true).map_err(fail)?.get_ids().to_vec();
        let place = (0..whole.len()).find(|place| whole[*place..].starts_with(&plain));
        if let Some(place) = place.filter(|_| !plain.is_empty()) {
            return Ok((whole[..place].to_vec(), whole[place + plain.len()..].to_vec()));
        }
    }
    Ok((Vec::new(), Vec::new()))
}

/// Special tokens without a role of their own, under a key that lists them.
fn listed<'a>(settings: &'a Map<String, Json>, key: &str) -> &'a [Json] {
    settings.get(key).and_then(Json::as_array).map_or(&[], Vec::as_slice)
}

/// A role in `special_tokens_map.json`: what is written out there is special.
fn role_of_map(value: &Json) -> Json {
    let mut value = value.clone();
    if let Some(token) = value.as_object_mut().filter(|token| token.contains_key("content")) {
        token.insert("special".into(), json!(true));
    }
    value
}

/// The text of a token that is written as such or as an object.
fn token_text(token: &Json) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// A token as the files write it; `special` where they do not say.
fn added_token(json: &Json, special: Option<bool>) -> Option<AddedToken> {
    let flag = |key: &str| json.get(key).and_then(Json::as_bool);
    let special = flag("special").or(special).unwrap_or(false);
    let mut token = AddedToken::from(token_text(json)?, special);
    token = token.single_word(flag("single_word").unwrap_or(false));
    token = token.lstrip(flag("lstrip").unwrap_or(false)).rstrip(flag("rstrip").unwrap_or(false));
    Some(token.normalized(flag("normalized").unwrap_or(!special)))
}

fn object(bytes: &[u8], name: &str, place: &str) -> Result<Json> {
    let text = std::str::from_utf8(bytes).with_context(|| format!("`{name}` of `{place}` is not UTF-8"))?;
    let json: Json = files::json(text.trim_start_matches('\u{feff}'), &format!("{place}/{name}"))?;
    ensure!(json.is_object(), "`{name}` of `{place}` is no JSON object");
    Ok(json)
}

fn written(json: &Json) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

fn parse(json: &[u8]) -> Result<Tokenizer> {
    Tokenizer::from_bytes(json).map_err(|e| anyhow!("not a tokenizer that can be used here: {e}"))
}

fn text_of(tokenizer: &Tokenizer) -> Result<String> {
    tokenizer.to_string(false).map_err(|e| anyhow!("cannot write a tokenizer: {e}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::shared_data;
    use crate::text::{SpecialTokens, Text};

    fn open(path: &Path, end_token: Option<&str>) -> Result<TokenizerFile> {
        Ok(open_tokenizer(path, end_token)?.tokenizer)
    }

    #[test]
    fn gpt2_gives_the_known_ids_from_each_of_its_forms() {
        let Some(data) = shared_data("tokenizers/gpt2") else { return };
        let folder = open(&data, None).unwrap();
        let file = open(&data.join("tokenizer.json"), None).unwrap();
        let first_form = tempfile::tempdir().unwrap();
        fs::copy(data.join("encoder.json"), first_form.path().join("vocab.json")).unwrap();
        fs::copy(data.join("vocab.bpe"), first_form.path().join("merges.txt")).unwrap();
        let first_form = open(first_form.path(), None).unwrap();
        for tokenizer in [&folder, &file, &first_form] {
            assert_eq!((tokenizer.end, tokenizer.size), (50256, 50257));
            let text = Text::new(tokenizer, SpecialTokens::Parse).unwrap();
            let ids = text.encode("Hello world! Knowledge distillation.").unwrap();
            assert_eq!(ids, [15496, 995, 0, 20414, 1233, 40903, 13]);
            assert_eq!(text.decode(&ids).unwrap(), "Hello world! Knowledge distillation.");
            assert_eq!(text.encode("a<|endoftext|>").unwrap(), [64, 50256]);
            assert_eq!(text.decode(&[64, 50256]).unwrap(), "a");
        }
        assert_eq!(folder.vocabulary().meaning, file.vocabulary().meaning);
        assert_eq!(folder.difference(&file, "folder", "file"), None);
    }

    #[test]
    fn opt_is_gpt2_with_other_numbers() {
        let (Some(opt), Some(gpt2)) = (shared_data("tokenizers/opt"), shared_data("tokenizers/gpt2")) else { return };
        let folder = tempfile::tempdir().unwrap();
        fs::copy(opt.join("gpt2-vocab.json"), folder.path().join("vocab.json")).unwrap();
        fs::copy(opt.join("gpt2-merges.txt"), folder.path().join("merges.txt")).unwrap();
        let opt = open(folder.path(), Some("</s>")).unwrap();
        assert_eq!((opt.end, opt.size), (2, 50265));
        let opt_text = Text::new(&opt, SpecialTokens::Parse).unwrap();
        let gpt2_text = Text::new(&open(&gpt2, None).unwrap(), SpecialTokens::Parse).unwrap();
        let text = " Déjà vu, 12 years ago.";
        let names = |t: &Text, ids: &[u32]| ids.iter().map(|id| t.token(*id).unwrap()).collect::<Vec<_>>();
        let (a, b) = (opt_text.encode(text).unwrap(), gpt2_text.encode(text).unwrap());
        assert_eq!(names(&opt_text, &a), names(&gpt2_text, &b));
        assert_ne!(a, b);
    }

    #[test]
    fn the_end_token_comes_from_the_files_beside_the_tokenizer() {
        let Some(llama) = shared_data("weights/tinystories-656k-llama") else { return };
        assert_eq!(open(&llama, None).unwrap().end, 2); // `<|end_story|>`
        assert_eq!(open(&llama, Some("<|start_story|>")).unwrap().end, 1);
        let error = open(&llama, Some("<eot>")).unwrap_err().to_string();
        assert!(error.contains("end token `<eot>` is not in the vocabulary"), "{error}");
        let error = open(&llama.join("tokenizer.json"), None).unwrap_err().to_string();
        assert!(error.contains("`end_token`"), "{error}");
    }

    #[test]
    fn a_folder_without_tokenizer_says_what_was_expected() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(folder.path(), None).unwrap_err().to_string();
        assert!(error.contains("expected `tokenizer.json`"), "{error}");
    }
}
