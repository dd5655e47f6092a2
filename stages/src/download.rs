//! `download`: where text, tokenizers, token files and models come into a pipeline.
//!
//! ```yaml
//! corpus:    {kind: download, with: {source: builtin:instruct, rows: 8000}}
//! dolly:     {kind: download, with: {source: dolly.jsonl.gz, split: {valid: 1000, test: 500}}}
//! sets:      {kind: download, with: {source: {train: a.jsonl, test: b.json}, limit: {train: 2000}}}
//! gpt2:      {kind: download, with: {tokenizer: checkpoints/gpt2}}
//! processed: {kind: download, with: {bin: processed/dolly, tokenizer: checkpoints/gpt2}}
//! teacher:   {kind: download, with: {model: checkpoints/gpt2-xl}}
//! student:   {kind: download, with: {model: "hub:HuggingFaceTB/SmolLM2-135M@93efa2f097d58c2a74874c7e644dbc9b0cee75a2"}}
//! quantised: {kind: download, with: {model: hub:owner/name-GGUF/name.Q4_K_M.gguf}}
//! gsm8k:     {kind: download, with: {source: hub:datasets/openai/gsm8k/main}}
//! web:       {kind: download, with: {source: {url: "https://example.org/dolly.jsonl", sha256: ...}}}
//! pretrain:  {kind: download, with: {source: openwebtext.txt, form: text-lines}}
//! ```
//!
//! No inputs. The configuration decides the outputs: `source` gives `corpus`; `tokenizer` alone gives `tokenizer`; `bin`
//! gives datasets `train`, `valid`, `test`; `model` gives `model`, with the adapter in its folder where there is one; `adapter` gives
//! `adapter`. Cost: reading the files, and fetching those that are
//! elsewhere; the built-in corpus takes a fraction of a second. The content of files, not their path, is part of the
//! result's key.
//!
//! `hub:[datasets/]OWNER/NAME[@REVISION][/PATH]` is a repository of the Hugging Face hub, or a file or folder in it, at a branch,
//! tag or commit, `main` unless given. In the key stands the commit that it is when a plan is made, so a branch that moves
//! gives another result, and a full commit needs nobody to be asked. Only files that are read are fetched, when the stage
//! runs, into the cache that `transformers` uses: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are
//! heeded. Of the web, by `url`, a file is taken whose digest is given, and the digest stands in the key.
//!
//! A file of rows is JSON lines, a JSON list, CSV or TSV, plain or gzipped, or Parquet; its bytes say which. Rows are told by their
//! columns: Alpaca's and MiniLLM's `instruction`, `input`, `output` (a text, or a list of right answers), `prompt`; Dolly's
//! `instruction`, `context`, `response`; GSM8K's `question`, `answer`; `prompt` with `completion`, which need
//! `template: ready` where they are tokenised. `fields` names others, or `none` for a column that is not to be read.
//! Conversations, `messages` with `role` and `content` or ShareGPT's `conversations` with `from` and `value`, become a row for
//! each answer, with all that was said before; they need `template: chat`. `split` counts conversations, `limit` rows. Documents,
//! to be continued and not answered, are rows of a `text` alone, or with `form: text-lines` the lines of a file of text.
//! In a folder, the files of a split are called after it (`valid` also `validation`), and there may be several parts, as in
//! `train-00000-of-00002.parquet`.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use contract::dataset::SPLIT_ROWS;
use contract::files::counted;
use contract::limits;
use contract::{
    About, AnyValue, Bounds, Cause, ConfigError, Dataset, Env, Facts, Folder, Inputs, Operator, Outlook, Outputs,
    PortType, Ports, Sink, Source, Stage, Step, TokenizerFile, Value,
};
use lm::{Adapter, ModelFolder};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value as Json;

pub use crate::address::{Address, Web};
use crate::columns::Columns;
pub use crate::columns::Fields;
use crate::corpus::{self, CorpusRow, Split};
use crate::gguf::open_any_tokenizer;
use crate::instruct::{self, Builtin, Sizes};
use crate::text::{SpecialTokens, Text};
use crate::tokenizer::Opened;
use crate::{mmidx, records};

/// Name of the first built-in corpus, for examples.
const BUILTIN: &str = "builtin:instruct";

/// Weights as they lie in repositories, the best first: often several of these are there, and one is enough.
const WEIGHTS: [&[&str]; 5] = [
    &["model.safetensors"],
    &["model.safetensors.index.json", "model-*.safetensors"],
    &["pytorch_model.bin"],
    &["pytorch_model.bin.index.json", "pytorch_model-*.bin"],
    &["*.gguf"],
];

/// The stage kind.
pub struct Download;

/// Its `with`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A corpus: `builtin:instruct`, instructions about a small world; `builtin:arithmetic`, word problems of one to three steps, or
    /// `builtin:arithmetic-told`, where training problems also say how to answer; a file of rows (JSON lines, a JSON list, CSV or TSV, plain or gzipped, or Parquet); a
    /// folder with such files named `train`, `valid` and `test` (`.jsonl`, `.json`, `.csv` or `.tsv`, each also with `.gz`, or
    /// `.parquet`); or such files by split. Each is a path, which begins in the folder that `pipeline` is started in,
    /// `hub:datasets/OWNER/NAME[@REVISION][/PATH]`, or `{url: ..., sha256: ...}`.
    #[serde(default)]
    pub source: Option<Place>,
    /// Training rows of the built-in corpus. 8000 unless given: enough for a small teacher to learn its tasks.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::ROWS))]
    pub rows: Option<usize>,
    /// Seed of the built-in corpus, 0 unless given.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::SEED))]
    pub seed: Option<u64>,
    /// How the rows of a file are divided; all of them train unless given.
    #[serde(default)]
    pub split: Option<Division>,
    /// What a file is, where its bytes do not say so.
    #[serde(default)]
    pub form: Option<Form>,
    /// Names of the columns of a row, where they are not found by themselves.
    #[serde(default)]
    pub fields: Fields,
    /// Most rows of each split; all unless given.
    #[serde(default)]
    pub limit: Limit,
    /// A tokenizer: a `tokenizer.json`, or a folder with one or with `vocab.json` and `merges.txt`; a path,
    /// `hub:OWNER/NAME[@REVISION]`, or `{url: ..., sha256: ...}`.
    #[serde(default)]
    pub tokenizer: Option<Address>,
    /// Text of the token that ends a text, where the tokenizer's files do not name it.
    #[serde(default)]
    pub end_token: Option<String>,
    /// A folder of token files as the reference programs write them: `train_0.bin`, `train_0.idx` and so on, with
    /// `train.jsonl` (the texts) beside where it is there. Needs `tokenizer`.
    #[serde(default)]
    pub bin: Option<Address>,
    /// A model with its tokenizer: a Hugging Face folder of `config.json` and weights (`model.safetensors`,
    /// `pytorch_model.bin`, several files that an index names, or the parts of tensor-parallel ranks in `mp4/`), a GGUF file, or
    /// a folder with the `.bin` of llama2.c. A path, `hub:OWNER/NAME[@REVISION][/PATH]`, or of a GGUF file
    /// `{url: ..., sha256: ...}`.
    #[serde(default)]
    pub model: Option<Address>,
    /// A low-rank adapter: a PEFT folder of `adapter_config.json` and `adapter_model.safetensors`; kind `adapt` puts it on a model.
    #[serde(default)]
    pub adapter: Option<Address>,
}

/// What a file of a corpus is, where its bytes do not say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Text, each line of which is a document; `<@x(x!>` in it stands for a line break. So the reference programs keep the
    /// corpora that models are pretrained on.
    TextLines,
}

/// Where a corpus is.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// `builtin:instruct`, a file or a folder.
    One(Address),
    /// A file for each split.
    Files(Files),
}

/// Files by split; a split that is left out is empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// Rows to train on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<Address>,
    /// Rows to choose by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<Address>,
    /// Rows to report on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Address>,
}

impl Files {
    fn of(&self, split: Split) -> Option<&Address> {
        match split {
            Split::Train => self.train.as_ref(),
            Split::Valid => self.valid.as_ref(),
            Split::Test => self.test.as_ref(),
        }
    }
}

/// How one file is divided: the first rows validate, the next test, the rest train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Division {
    /// Rows at the beginning to validate on. The distillation papers take 1000 of Dolly.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::ROWS))]
    pub valid: usize,
    /// Rows after those to test on.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::ROWS))]
    pub test: usize,
}

/// Most rows of each split, from its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Of the training rows.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::ROWS))]
    pub train: Option<usize>,
    /// Of the validation rows.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::ROWS))]
    pub valid: Option<usize>,
    /// Of the test rows.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::ROWS))]
    pub test: Option<usize>,
}

impl Limit {
    fn of(&self, split: Split) -> usize {
        let limit = match split {
            Split::Train => self.train,
            Split::Valid => self.valid,
            Split::Test => self.test,
        };
        limit.unwrap_or(usize::MAX)
    }
}

impl Stage for Download {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "download",
            // 2: rows with a key twice, or two columns for the same thing, are refused. 3: a tokenizer is read from all its files
            // and kept with them. 4: all values of a model are looked at. 5: what PyTorch packed becomes one file in the order of
            // the model.
            version: 5,
            numerics: None,
            summary: "brings a corpus, a tokenizer, token files or a model into the pipeline",
            example: "corpus:\n  kind: download\n  with: {source: builtin:instruct, rows: 8000}\n",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, _conventions: contract::Conventions) {
        if config.is_builtin() {
            config.rows.get_or_insert(8000);
            config.seed.get_or_insert(0);
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let Config { source, rows, seed, split, form, fields, limit, tokenizer, end_token, bin, model, adapter } =
            config;
        let what = [source.is_some(), bin.is_some(), model.is_some(), adapter.is_some()];
        match what.iter().filter(|given| **given).count() {
            0 if tokenizer.is_some() => {}
            1 => {}
            0 => errors.push(ConfigError::at("", "nothing to bring in").hint(format!(
                "give `source`, `tokenizer`, `bin`, `model` or `adapter`; for example `source: {BUILTIN}`"
            ))),
            _ => {
                errors.push(ConfigError::at("", "expected one of `source`, `bin`, `model` and `adapter`, got several"))
            }
        }
        let mut unread = |field: &str, given: bool, by: &str| {
            if given {
                errors.push(
                    ConfigError::at(field, format!("nothing reads `{field}` here")).hint(format!("it belongs to {by}")),
                );
            }
        };
        let builtin = config.is_builtin();
        let one_file = matches!(source, Some(Place::One(_))) && !builtin;
        unread("rows", rows.is_some() && !builtin, &format!("`source: {BUILTIN}`; files have `limit`"));
        unread("seed", seed.is_some() && !builtin, &format!("`source: {BUILTIN}`"));
        unread("split", split.is_some() && !one_file, "a `source` that is one file");
        unread("form", form.is_some() && (source.is_none() || builtin), "a `source` of files");
        unread("fields", *fields != Fields::default() && (source.is_none() || builtin), "a `source` of files");
        unread("limit", *limit != Limit::default() && source.is_none(), "`source`");
        let without = source.is_some() || adapter.is_some();
        unread("tokenizer", tokenizer.is_some() && without, "a `download` of its own, or to `bin`");
        unread("end_token", end_token.is_some() && tokenizer.is_none() && model.is_none(), "`tokenizer` and `model`");
        if bin.is_some() && tokenizer.is_none() {
            errors.push(ConfigError::at("tokenizer", "`bin` needs the tokenizer that its ids come from"));
        }
        match source {
            Some(Place::One(Address::Text(name))) if name.starts_with("builtin:") && !builtin => {
                errors.push(ConfigError::at("source", format!("there is no built-in corpus `{name}`")).hint(format!(
                    "there are {}",
                    Builtin::ALL.map(|corpus| format!("`{}`", corpus.name())).join(", ")
                )))
            }
            Some(Place::Files(files)) if *files == Files::default() => {
                errors.push(ConfigError::at("source", "expected a file for `train`, `valid` or `test`"));
            }
            _ => {}
        }
        for (field, address) in config.addresses() {
            errors.extend(address.location().err().map(|text| ConfigError::at(&field.join("."), text)));
        }
        errors.extend(fields.errors());
        errors
    }

    fn ports(&self, config: &Config) -> Ports {
        let ports = Ports::new();
        if config.source.is_some() {
            ports.output("corpus", PortType::Corpus, "text by split")
        } else if config.bin.is_some() {
            ports
                .output("train", PortType::Dataset, "rows to train on")
                .output("valid", PortType::Dataset, "rows to choose by")
                .output("test", PortType::Dataset, "rows to report on")
        } else if config.model.is_some() {
            ports.output("model", PortType::Model, "the model with its tokenizer")
        } else if config.adapter.is_some() {
            ports.output("adapter", PortType::Adapter, "the adapter")
        } else {
            ports.output("tokenizer", PortType::Tokenizer, "the tokenizer")
        }
    }

    fn sources(&self, config: &Config) -> Vec<Source> {
        let source = |(field, address): (Vec<&'static str>, &Address)| {
            let source = Source::at(&field, address.location().ok()?);
            Some(match field[..] {
                ["source"] => source.only(&file_names()),
                // Token files, and the texts beside them.
                ["bin"] => source.only(&[file_names(), vec!["*.bin".into(), "*.idx".into()]].concat()),
                ["tokenizer"] => source.only(&crate::tokenizer::sources()),
                // Neither a page about the model nor what is left of its training.
                ["model"] => {
                    let files: Vec<&str> = lm::MODEL_FILES.into_iter().chain(crate::tokenizer::sources()).collect();
                    source.only(&files).one_of(&WEIGHTS)
                }
                ["adapter"] => source.only(&lm::ADAPTER_FILES),
                _ => source,
            })
        };
        config.addresses().into_iter().filter_map(source).collect()
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let Config { source, tokenizer, end_token, bin, model, .. } = config;
        let limited = |split: Split, rows: Bounds| rows.min(config.limit.of(split) as u64);
        if source.is_some() {
            let sizes = config.is_builtin().then(|| config.sizes());
            let rows = |split| sizes.map_or(Bounds::ANY, |sizes: Sizes| Bounds::exactly(sizes.of(split) as u64));
            let rows = Split::ALL.map(|split| limited(split, rows(split)));
            foresee_rows(config.rows.unwrap_or(0) as u64, outlook);
            outlook.output("corpus", Facts { rows: rows.to_vec(), ..Facts::default() });
            return;
        }
        // A path that leads nowhere is an error of its own.
        let there = |address: &'_ Option<Address>| address.as_ref().and_then(Address::path_at_hand);
        if let Some(path) = there(tokenizer)
            && let Some(tokenizer) = foresee_tokenizer(&path, end_token.as_deref(), "tokenizer", outlook)
            && bin.is_none()
        {
            let (vocabulary, ends) = (Some(tokenizer.vocabulary()), Some(vec![tokenizer.end]));
            outlook.output("tokenizer", Facts { vocabulary, ends, ..Facts::default() });
        }
        if let Some(path) = there(model) {
            foresee_model(&path, end_token.as_deref(), outlook);
        }
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Run { config, scratch: env.scratch.clone() }))
    }
}

impl Config {
    /// Sizes of the built-in corpus.
    fn sizes(&self) -> Sizes {
        Sizes { train: self.rows.unwrap_or(8000), valid: 200, test: 400 }
    }

    fn builtin(&self) -> Option<Builtin> {
        let Some(Place::One(Address::Text(name))) = &self.source else { return None };
        Builtin::ALL.into_iter().find(|corpus| corpus.name() == name)
    }

    fn is_builtin(&self) -> bool {
        self.builtin().is_some()
    }

    /// All that is read, each with its field.
    fn addresses(&self) -> Vec<(Vec<&'static str>, &Address)> {
        let mut found = Vec::new();
        match &self.source {
            Some(Place::One(address)) if !self.is_builtin() => found.push((vec!["source"], address)),
            Some(Place::Files(files)) => {
                let named = |split: Split| Some((vec!["source", split.name()], files.of(split)?));
                found.extend(Split::ALL.into_iter().filter_map(named));
            }
            _ => {}
        }
        let named =
            [("bin", &self.bin), ("tokenizer", &self.tokenizer), ("model", &self.model), ("adapter", &self.adapter)];
        found.extend(named.into_iter().filter_map(|(field, address)| Some((vec![field], address.as_ref()?))));
        found
    }
}

/// The rows of the built-in corpus: as many as have ids, and fit in memory while they are made.
fn foresee_rows(rows: u64, outlook: &mut Outlook) {
    /// Texts, references and their strings, in bytes: less than any row of the corpus takes.
    const ROW: u64 = 300;
    let cause = Cause::Field("rows".into());
    if rows > SPLIT_ROWS {
        let message = format!("`rows` is {rows}: expected at most {SPLIT_ROWS}");
        return outlook.error([cause], message, "the corpus repeats itself long before");
    }
    outlook.needs_bytes(&format!("{rows} rows of {ROW} bytes or more"), rows * ROW, cause);
}

/// Looks into the model at `path`, all but the values of its weights.
fn foresee_model(path: &Path, end_token: Option<&str>, outlook: &mut Outlook) {
    let field = || [Cause::Field("model".into())];
    let hint = "`pipeline stages download` says what a model folder holds";
    match ModelFolder::open(path) {
        Err(error) => outlook.error(field(), format!("{error:#}"), hint),
        Ok(model) => {
            let Some(tokenizer) = foresee_tokenizer(path, end_token, "model", outlook) else { return };
            if let Err(error) = model.check_tokenizer(&tokenizer) {
                return outlook.error(field(), format!("{error:#}"), hint);
            }
            for odd in model.oddities(&tokenizer) {
                outlook.warn(field(), odd, "`end_token` chooses the token that ends a text");
            }
            outlook.output("model", model.facts(&tokenizer));
        }
    }
}

/// The tokenizer at `path`, which `field` names.
fn foresee_tokenizer(
    path: &Path,
    end_token: Option<&str>,
    field: &str,
    outlook: &mut Outlook,
) -> Option<TokenizerFile> {
    match open_any_tokenizer(path, end_token) {
        Ok(Opened { tokenizer, .. }) => Some(tokenizer),
        Err(error) => {
            let hint = "it is read as `AutoTokenizer` of `transformers` reads it: save it anew from there if in doubt";
            outlook.error([Cause::Field(field.into())], format!("{error:#}"), hint);
            None
        }
    }
}

struct Run {
    config: Config,
    scratch: PathBuf,
}

impl Operator for Run {
    fn run(&mut self, _inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let Config { source, tokenizer, bin, model, adapter, end_token, .. } = &self.config;
        let end_token = end_token.as_deref();
        if let Some(source) = source {
            let folder = self.folder("corpus")?;
            for (split, rows) in Split::ALL.into_iter().zip(read_corpus(source, &self.config, sink)?) {
                corpus::write(&folder, split, &rows)?;
            }
            return Ok(Outputs::new().with("corpus", Folder::new(PortType::Corpus, folder)));
        }
        if let Some(model) = model {
            let folder = self.folder("model")?;
            let path = model.path()?;
            let model = ModelFolder::open(&path)?;
            let tokenizer = take_in(&path, end_token, sink)?;
            model.check_tokenizer(&tokenizer)?;
            model.check_values()?.iter().for_each(|odd| sink.warn(odd));
            model.copy(&folder)?;
            tokenizer.save(&folder)?;
            let adapter = path.join(lm::ADAPTER);
            if adapter.is_dir() {
                let adapter = Adapter::load(&adapter, &Device::Cpu)?;
                adapter.check(&model.config)?;
                let place = folder.join(lm::ADAPTER);
                fs::create_dir(&place).with_context(|| format!("cannot make folder `{}`", place.display()))?;
                adapter.save(&place)?;
            }
            return Ok(Outputs::new().with("model", Folder::new(PortType::Model, folder)));
        }
        if let Some(adapter) = adapter {
            let adapter = Adapter::load(&adapter.path()?, &Device::Cpu)?;
            adapter.check_values()?;
            return Ok(Outputs::new().with("adapter", adapter));
        }
        let path = tokenizer.as_ref().context("`download` has nothing to bring in")?;
        let tokenizer = take_in(&path.path()?, end_token, sink)?;
        if let Some(bin) = bin {
            return read_token_files(&bin.path()?, &tokenizer, sink);
        }
        let folder = self.folder("tokenizer")?;
        tokenizer.save(&folder)?;
        Ok(Outputs::new().with("tokenizer", Folder::new(PortType::Tokenizer, folder)))
    }
}

impl Run {
    fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.scratch.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
        Ok(folder)
    }
}

/// The splits of a corpus, limited, with their ids.
fn read_corpus(source: &Place, config: &Config, sink: &mut dyn Sink) -> Result<[Vec<CorpusRow>; 3]> {
    if let Some(corpus) = config.builtin() {
        let mut kept = Kept::new(config.limit);
        let made = instruct::generate(corpus, config.seed.unwrap_or(0), &config.sizes());
        for (split, rows) in Split::ALL.into_iter().zip(made) {
            kept.add(split, rows)?;
        }
        return Ok(kept.conclude(sink));
    }
    let mut columns = Columns::new(&config.fields);
    let mut kept = Kept::new(config.limit);
    let read = |path: &Path, columns: &mut Columns, keep: &mut dyn FnMut(Vec<CorpusRow>) -> Result<()>| {
        each_record(path, config.form, columns, keep)
    };
    match source {
        Place::One(address) if address.path()?.is_dir() => {
            let folder = &address.path()?;
            let path = folder.display();
            ensure!(
                config.split.is_none(),
                "`{path}` is a folder with a file for each split; `split` is for a single file"
            );
            let files = Split::ALL.map(|split| find(folder, split));
            ensure!(
                !files.iter().all(|files| files.as_ref().is_ok_and(Vec::is_empty)),
                "`{path}` holds no file of rows; expected `train`, `valid` or `test` with one of the endings {}",
                ENDINGS.map(|ending| format!("`.{ending}`")).join(", ")
            );
            for (split, files) in Split::ALL.into_iter().zip(files) {
                for file in files? {
                    read(&file, &mut columns, &mut |rows| kept.add(split, rows))?;
                }
            }
        }
        Place::One(address) => {
            let path = address.path()?;
            let division = config.split.unwrap_or_default();
            let mut count = 0;
            read(&path, &mut columns, &mut |rows| {
                count += 1;
                kept.add(division.split_of(count - 1), rows)
            })?;
            division.check(count, &path)?;
        }
        Place::Files(files) => {
            for split in Split::ALL {
                if let Some(address) = files.of(split) {
                    read(&address.path()?, &mut columns, &mut |rows| kept.add(split, rows))?;
                }
            }
        }
    }
    columns.conclude(sink)?;
    if kept.seen == [0; 3] {
        match source {
            Place::One(address) => bail!("`{}` has no rows", address.path()?.display()),
            Place::Files(_) => bail!("the files of the corpus have no rows"),
        }
    }
    // Who lists files by split has left the others out on purpose.
    for (split, _) in Split::ALL.into_iter().zip(kept.seen).filter(|(_, seen)| *seen == 0) {
        if matches!(source, Place::One(_)) {
            sink.warn(&format!("the corpus has no `{}` rows", split.name()));
        }
    }
    Ok(kept.conclude(sink))
}

/// The rows of each split that are kept, and how many there were.
struct Kept {
    limit: Limit,
    seen: [usize; 3],
    rows: [Vec<CorpusRow>; 3],
}

impl Kept {
    fn new(limit: Limit) -> Self {
        Kept { limit, seen: [0; 3], rows: Default::default() }
    }

    fn add(&mut self, split: Split, rows: Vec<CorpusRow>) -> Result<()> {
        for row in rows {
            let index = self.seen[split as usize];
            ensure!(index < Split::MOST_ROWS, "a split has at most {} rows", Split::MOST_ROWS);
            self.seen[split as usize] += 1;
            if index < self.limit.of(split) {
                self.rows[split as usize].push(CorpusRow { id: split.row_id(index), ..row });
            }
        }
        Ok(())
    }

    fn conclude(self, sink: &mut dyn Sink) -> [Vec<CorpusRow>; 3] {
        for (split, seen) in Split::ALL.into_iter().zip(self.seen) {
            let (name, limit) = (split.name(), self.limit.of(split));
            if limit != usize::MAX && limit > seen {
                sink.note(&format!("`limit` allows {limit} rows of `{name}`, and there are {seen}"));
            }
        }
        self.rows
    }
}

impl Division {
    /// The split of the row at `index` of the file.
    fn split_of(self, index: usize) -> Split {
        match index {
            _ if index < self.valid => Split::Valid,
            _ if index - self.valid < self.test => Split::Test,
            _ => Split::Train,
        }
    }

    fn check(self, rows: usize, path: &Path) -> Result<()> {
        let Division { valid, test } = self;
        ensure!(
            valid.saturating_add(test) <= rows,
            "`split` asks for {valid} rows to validate and {test} to test, but `{}` has {rows}",
            path.display()
        );
        Ok(())
    }
}

/// Endings of the files of rows in a folder. They only choose the file; its bytes say what it is.
const ENDINGS: [&str; 9] = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "tsv", "tsv.gz", "parquet"];

/// What the files of a split are called.
fn names_of(split: Split) -> &'static [&'static str] {
    match split {
        Split::Train => &["train"],
        Split::Valid => &["valid", "validation"],
        Split::Test => &["test"],
    }
}

/// Names of the files of rows in a folder: of whole splits, and of the parts of one.
fn file_names() -> Vec<String> {
    let names = Split::ALL.into_iter().flat_map(names_of);
    let endings = names.flat_map(|name| ENDINGS.map(|ending| (name, ending)));
    endings.flat_map(|(name, ending)| [format!("{name}.{ending}"), format!("{name}-*.{ending}")]).collect()
}

/// The files of a split in a folder: one, or all parts of one, in order.
///
/// Errors where it is there twice, or a part is missing.
fn find(folder: &Path, split: Split) -> Result<Vec<PathBuf>> {
    let names = names_of(split).iter().flat_map(|name| ENDINGS.map(|ending| (name, ending)));
    let mut found: Vec<Vec<PathBuf>> = Vec::new();
    for (name, ending) in names {
        let whole = folder.join(format!("{name}.{ending}"));
        if whole.exists() {
            found.push(vec![whole]);
        }
        let parts = parts(folder, name, ending)?;
        if !parts.is_empty() {
            found.push(parts);
        }
    }
    if let [first, second, ..] = &found[..] {
        let (first, second) = (first[0].display(), second[0].display());
        bail!("both `{first}` and `{second}` are there; name the files in `source`");
    }
    Ok(found.pop().unwrap_or_default())
}

/// The files `NAME-00000-of-00002.ENDING` and so on, as data sets of the hub are cut.
fn parts(folder: &Path, name: &str, ending: &str) -> Result<Vec<PathBuf>> {
    let mut counts = BTreeSet::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))? {
        let entry = entry.with_context(|| format!("cannot read folder `{}`", folder.display()))?.file_name();
        let inner = entry.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('-')?.strip_suffix(ending));
        let count =
            inner.and_then(|inner| inner.strip_suffix('.')?.split_once("-of-")).map(|(_, count)| count.to_owned());
        counts.extend(count.filter(|count| count.len() == 5 && count.bytes().all(|digit| digit.is_ascii_digit())));
    }
    let Some(count) = counts.pop_first() else { return Ok(Vec::new()) };
    ensure!(
        counts.is_empty(),
        "`{}` holds parts of more than one `{name}`; name the files in `source`",
        folder.display()
    );
    let part = |index: usize| folder.join(format!("{name}-{index:05}-of-{count}.{ending}"));
    let parts: Vec<PathBuf> = (0..count.parse()?).map(part).collect();
    match parts.iter().find(|part| !part.exists()) {
        Some(missing) => bail!("there is no file `{}`, and other parts of `{name}` are there", missing.display()),
        None => Ok(parts),
    }
}

/// Hands on the rows of one file, those of a conversation together.
fn each_record(
    path: &Path,
    form: Option<Form>,
    columns: &mut Columns,
    keep: &mut dyn FnMut(Vec<CorpusRow>) -> Result<()>,
) -> Result<()> {
    let take = |record| keep(columns.rows(record)?);
    match form {
        None => records::read(path, take),
        Some(Form::TextLines) => records::read_documents(path, take),
    }
}

/// All rows of one file, numbered from 0.
#[cfg(test)]
pub(crate) fn read_rows(path: &Path, fields: &Fields) -> Result<Vec<CorpusRow>> {
    let mut rows = Vec::new();
    each_record(path, None, &mut Columns::new(fields), &mut |found| {
        found.into_iter().for_each(|row| rows.push(CorpusRow { id: rows.len() as u64, ..row }));
        Ok(())
    })?;
    Ok(rows)
}

/// Datasets from the reference programs' token files. References come from the texts beside, else from the ids.
fn read_token_files(folder: &Path, tokenizer: &TokenizerFile, sink: &mut dyn Sink) -> Result<Outputs> {
    let text = Text::new(tokenizer, SpecialTokens::Text)?;
    let mut outputs = Outputs::new();
    let mut found = 0;
    for split in Split::ALL {
        let prefix = folder.join(split.name());
        let records = if mmidx::exists(&prefix) { mmidx::read(&prefix)? } else { Vec::new() };
        if records.is_empty() {
            sink.warn(&format!("`{}` has no `{}` rows", folder.display(), split.name()));
        }
        found += records.len();
        let outside = records.iter().flat_map(|(prompt, response)| prompt.iter().chain(response)).max();
        if let Some(id) = outside.filter(|id| **id >= tokenizer.size) {
            bail!("`{}` holds the id {id}, but the tokenizer has {} tokens", prefix.display(), tokenizer.size);
        }
        let mut references = references_beside(folder, split, records.len())?;
        let mut rows = Vec::with_capacity(records.len());
        for (index, record) in records.into_iter().enumerate() {
            let references = match &mut references {
                Some(lists) => std::mem::take(&mut lists[index]),
                None if record.1.is_empty() => Vec::new(),
                None => vec![text.decode(&record.1)?],
            };
            rows.push(mmidx::row(split.row_id(index), record, tokenizer.end, references));
        }
        outputs = outputs.with(split.name(), Dataset { rows, tokenizer: tokenizer.clone() });
    }
    ensure!(found > 0, "`{}` holds no token files: expected `train_0.bin` with `train_0.idx`", folder.display());
    Ok(outputs)
}

fn references_beside(folder: &Path, split: Split, rows: usize) -> Result<Option<Vec<Vec<String>>>> {
    let files = find(folder, split)?;
    let Some(path) = files.first() else { return Ok(None) };
    let fields = Fields::default();
    let (mut columns, mut references) = (Columns::new(&fields), Vec::new());
    for file in &files {
        each_record(file, None, &mut columns, &mut |rows| {
            references.extend(rows.into_iter().map(|row| row.references));
            Ok(())
        })?;
    }
    ensure!(
        references.len() == rows,
        "`{}` has {}, but the token files beside it have {rows}",
        path.display(),
        counted(references.len() as u64, "row")
    );
    Ok(Some(references))
}

/// Reads a tokenizer, and says what was done otherwise than its files say.
fn take_in(path: &Path, end_token: Option<&str>, sink: &mut dyn Sink) -> Result<TokenizerFile> {
    let Opened { tokenizer, notes } = open_any_tokenizer(path, end_token)?;
    notes.iter().for_each(|note| sink.warn(note));
    Ok(tokenizer)
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Place::One(address) => address.serialize(serializer),
            Place::Files(files) => files.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PlaceVisitor;
        impl<'de> Visitor<'de> for PlaceVisitor {
            type Value = Place;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "`{BUILTIN}`, a path, `hub:OWNER/NAME`, `{{url: ..., sha256: ...}}`, or these by split")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Place, E> {
                Ok(Place::One(Address::Text(text.to_owned())))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Place, A::Error> {
                let map = Json::deserialize(MapAccessDeserializer::new(map))?;
                let read = if map.get("url").is_some() {
                    Address::deserialize(map).map(Place::One)
                } else {
                    Files::deserialize(map).map(Place::Files)
                };
                read.map_err(A::Error::custom)
            }
        }
        deserializer.deserialize_any(PlaceVisitor)
    }
}

impl JsonSchema for Place {
    fn schema_name() -> Cow<'static, str> {
        "Place".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (web, files) = (generator.subschema_for::<Web>(), generator.subschema_for::<Files>());
        json_schema!({"anyOf": [{"type": "string"}, web, files]})
    }
}

#[cfg(test)]
mod tests {
    use contract::{Conventions, End, Kind};
    use serde_json::json;

    use super::*;
    use crate::testing::{Scratch, folder, output, shared_data};

    fn download(with: Json) -> Result<([Vec<CorpusRow>; 3], Vec<String>)> {
        let scratch = Scratch::new();
        let (outputs, log) = scratch.run(&Download, with, vec![])?;
        let folder = folder(&outputs, "corpus");
        Ok((Split::ALL.map(|split| corpus::read(&folder, split).unwrap()), log.warnings))
    }

    fn error(with: Json) -> String {
        format!("{:#}", download(with).err().unwrap())
    }

    #[test]
    fn the_built_in_corpus_comes_in_the_sizes_asked() {
        let ([train, valid, test], warnings) = download(json!({"source": "builtin:instruct", "rows": 900})).unwrap();
        assert_eq!([train.len(), valid.len(), test.len()], [900, 200, 400]);
        assert_eq!(warnings, Vec::<String>::new());
        let limit = json!({"source": "builtin:instruct", "rows": 900, "limit": {"train": 10, "test": 3}});
        let ([few, valid, test], _) = download(limit).unwrap();
        assert_eq!((few[..] == train[..10], valid.len(), test.len()), (true, 200, 3));
    }

    #[test]
    fn rows_of_every_known_layout_become_one_form() {
        let scratch = Scratch::new();
        let rows = [
            json!({"instruction": "i", "context": "c", "response": "r", "category": "open_qa"}),
            json!({"instruction": "i", "input": "", "output": "r"}),
            json!({"instruction": "i", "prompt": "### i", "input": "c", "output": ["r", "s"]}),
            json!({"prompt": "p", "completion": "r"}),
            json!({"question": "i", "answer": "r"}),
        ];
        let text = rows.iter().map(|row| format!("{row}\n")).collect::<String>();
        let ([train, ..], _) = download(json!({"source": scratch.file("a.jsonl", text)})).unwrap();
        let row = |id, input: &str, prompt: Option<&str>, references: &[&str]| CorpusRow {
            id,
            instruction: "i".into(),
            input: input.into(),
            prompt: prompt.map(str::to_owned),
            turns: Vec::new(),
            output: "r".into(),
            references: references.iter().map(|r| r.to_string()).collect(),
            family: None,
        };
        let expected = [
            CorpusRow { family: Some("open_qa".into()), ..row(0, "c", None, &["r"]) },
            row(1, "", None, &["r"]),
            row(2, "c", Some("### i"), &["r", "s"]),
            CorpusRow { instruction: String::new(), ..row(3, "", Some("p"), &["r"]) },
            row(4, "", None, &["r"]),
        ];
        assert_eq!(train, expected);
    }

    #[test]
    fn other_field_names_are_mapped_and_unknown_ones_are_listed() {
        let scratch = Scratch::new();
        let path = scratch.file("a.jsonl", "{\"q\": \"i\", \"a\": \"r\"}\n");
        let ([train, ..], _) =
            download(json!({"source": path, "fields": {"instruction": "q", "output": "a"}})).unwrap();
        assert_eq!((train[0].instruction.as_str(), train[0].output.as_str()), ("i", "r"));
        let message = error(json!({"source": path}));
        assert!(message.contains("a.jsonl:1` has no `instruction`") && message.contains("only `q`, `a`"), "{message}");
        let message = error(json!({"source": path, "fields": {"instruction": "q"}}));
        assert!(message.contains("fields: {output: ...}"), "{message}");
        let number = scratch.file("b.jsonl", "{\"question\": \"i\", \"answer\": 2.50}\n");
        assert!(
            error(json!({"source": number}))
                .contains("b.jsonl:1`: expected text or a list of texts in `answer`, got 2.5")
        );
        let message = error(json!({"source": path, "fields": {"instruction": "q", "output": "a", "input": "contxt"}}));
        assert!(message.contains("no row has the column `contxt`, which `fields: {input: contxt}` names"), "{message}");
    }

    #[test]
    fn rows_that_could_mean_two_things_are_refused_and_others_are_read() {
        let scratch = Scratch::new();
        let read = |row: Json, fields: Json| {
            let path = scratch.file("a.jsonl", row.to_string());
            download(json!({"source": {"train": path}, "fields": fields})).map(|([mut train, ..], _)| train.remove(0))
        };
        let refused = |row: Json| format!("{:#}", read(row, json!({})).unwrap_err());
        let both = json!({"question": "a", "instruction": "b", "output": "c"});
        assert!(refused(both.clone()).contains("has both `instruction` and `question`; name the one"));
        assert_eq!(read(both, json!({"instruction": "question"})).unwrap().instruction, "a");
        let same = json!({"question": "a", "instruction": "a", "input": null, "context": "x", "output": "c"});
        assert_eq!(read(same, json!({})).unwrap().input, "x");
        let chat = json!({"messages": [{"role": "user", "content": "a"}]});
        assert!(refused(chat).contains("a.jsonl:1`: no `user` is answered by an `assistant` in `messages`"));
        let chat = json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]});
        assert!(refused(chat).contains("turn 1 has no text in `content` or `value` in `messages`"));
        assert!(refused(json!({"instruction": null, "output": "b"})).contains("a.jsonl:1` has no `instruction`"));
        assert!(refused(json!({"instruction": "a", "output": null})).contains("in `output`, got nothing"));

        let numbers = read(json!({"instruction": 1, "output": [2, "3"], "category": 4.5}), json!({})).unwrap();
        assert_eq!((numbers.instruction.as_str(), numbers.references), ("1", vec!["2".into(), "3".into()]));
        assert_eq!(numbers.family.as_deref(), Some("4.5"));
        for category in [json!({"a": 1}), json!([1]), json!(null)] {
            let row = json!({"instruction": "a", "output": "b", "category": category});
            assert_eq!(read(row, json!({})).unwrap().family, None);
        }
        let row = json!({"instruction": "a", "input": "x", "output": "b", "category": "c", "prompt": "p"});
        let row = read(row, json!({"input": "none", "family": "none", "prompt": "none"})).unwrap();
        assert_eq!((row.input.as_str(), row.family, row.prompt), ("", None, None));
    }

    #[test]
    fn every_answer_of_a_conversation_is_a_row_and_all_of_them_are_in_one_split() {
        let scratch = Scratch::new();
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let turns =
            [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")];
        let of_old = json!({"conversations": [{"from": "gpt", "value": "0"}, {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]});
        let alone = json!({"messages": [turn("user", "q"), turn("assistant", "r")]});
        let rows = [json!({"messages": turns}), of_old, alone].map(|row| format!("{row}\n")).concat();
        let path = scratch.file("a.jsonl", rows);
        let ([train, valid, _], _) = download(json!({"source": path, "split": {"valid": 1}})).unwrap();
        let said = |row: &CorpusRow| {
            let turns: Vec<String> = row.turns.iter().map(|turn| format!("{}:{}", turn.role, turn.content)).collect();
            (row.instruction.clone(), turns.join(" "), row.output.clone())
        };
        let expected = [("a", "system:s user:a", "b"), ("c", "system:s user:a assistant:b user:c", "d")];
        let own = |(a, b, c): (&str, &str, &str)| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(valid.iter().map(said).collect::<Vec<_>>(), expected.map(own));
        let expected = [("x", "assistant:0 user:x", "y"), ("q", "", "r")];
        assert_eq!(train.iter().map(said).collect::<Vec<_>>(), expected.map(own));
        assert_eq!((valid[1].id, &valid[1].references), (Split::Valid.row_id(1), &vec!["d".to_owned()]));
    }

    #[test]
    fn what_is_odd_about_a_corpus_is_said_once() {
        let scratch = Scratch::new();
        let rows = "{\"id\":7,\"question\":\"a\",\"answer\":\"\"}\n{\"question\":\"\",\"answer\":\"b\",\"references\":[\"c\"],\"x\":1}\n";
        let path = scratch.file("a.jsonl", rows);
        let with = json!({"source": {"train": path, "valid": path}, "limit": {"train": 9}});
        let (outputs, log) = scratch.run(&Download, with, vec![]).unwrap();
        drop(outputs);
        assert_eq!(
            log.warnings,
            [
                "2 of 4 rows have an empty answer",
                "2 of 4 rows ask nothing: instruction, input and prompt are empty",
                "2 of 4 rows have `references` without their answer; these are not taken for right answers",
            ]
        );
        assert_eq!(
            log.notes,
            [
                "nothing reads the columns `id`, `references`, `x`; `fields` can name them",
                "`limit` allows 9 rows of `train`, and there are 2",
            ]
        );
    }

    #[test]
    fn the_name_of_a_file_changes_nothing() {
        let scratch = Scratch::new();
        let rows = "{\"question\":\"a\",\"answer\":\"b\"}\n";
        let expected = download(json!({"source": scratch.file("a.jsonl", rows)})).unwrap();
        for name in ["a", "a.gz", "a.json.gz", "a.csv", "a.parquet", "Zeilen, größer.jsonl\n.gz"] {
            assert_eq!(download(json!({"source": scratch.file(name, rows)})).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn one_file_is_divided_and_files_and_folders_are_not() {
        let scratch = Scratch::new();
        let rows = |count: usize| {
            (0..count).map(|i| format!("{{\"question\":\"{i}\",\"answer\":\"a\"}}\n")).collect::<String>()
        };
        let one = scratch.file("one.jsonl", rows(10));
        let (splits, _) = download(json!({"source": one, "split": {"valid": 3, "test": 2}})).unwrap();
        let first = splits.each_ref().map(|rows| (rows.len(), rows[0].instruction.clone(), rows[0].id));
        assert_eq!(first, [(5, "5".into(), 0), (3, "0".into(), 1 << 30), (2, "3".into(), 2 << 30)]);
        let message = error(json!({"source": one, "split": {"valid": 11}}));
        assert!(
            message.contains("asks for 11 rows to validate and 0 to test") && message.contains("has 10"),
            "{message}"
        );

        scratch.file("set/train.jsonl", rows(4));
        scratch.file("set/test.json", "[{\"question\":\"x\",\"answer\":\"y\"}]");
        let folder = scratch.path().join("set");
        let (splits, warnings) = download(json!({"source": folder})).unwrap();
        assert_eq!(splits.each_ref().map(Vec::len), [4, 0, 1]);
        assert_eq!(warnings, ["the corpus has no `valid` rows"]);
        assert!(error(json!({"source": folder, "split": {}})).contains("is a folder"));
        scratch.file("set/test.jsonl", rows(1));
        assert!(error(json!({"source": folder})).contains("test.json` are there"));
        scratch.file("other/readme", "");
        let message = error(json!({"source": scratch.path().join("other")}));
        assert!(message.contains("holds no file of rows; expected `train`, `valid` or `test`"), "{message}");
        let limited = json!({"source": one, "split": {"valid": 3}, "limit": {"train": 2, "valid": 1}});
        let (splits, _) = download(limited).unwrap();
        assert_eq!(
            splits.each_ref().map(|rows| rows.iter().map(|r| r.instruction.as_str()).collect::<Vec<_>>()),
            [vec!["3", "4"], vec!["0"], vec![]]
        );

        let files = json!({"source": {"valid": one, "test": scratch.path().join("set/train.jsonl")}});
        let (splits, _) = download(files).unwrap();
        assert_eq!(splits.each_ref().map(Vec::len), [0, 10, 4]);
    }

    #[test]
    fn a_split_may_be_in_parts_as_on_the_hub() {
        let scratch = Scratch::new();
        let row = |text: &str| format!("{{\"question\":\"{text}\",\"answer\":\"a\"}}\n");
        scratch.file("set/train-00001-of-00002.jsonl", row("b"));
        let folder = scratch.path().join("set");
        let message = error(json!({"source": folder}));
        assert!(message.contains("train-00000-of-00002.jsonl`, and other parts of `train` are there"), "{message}");
        scratch.file("set/train-00000-of-00002.jsonl", row("a"));
        scratch.file("set/validation-00000-of-00001.jsonl", row("v"));
        scratch.file("set/train-notes.jsonl", row("x"));
        let ([train, valid, test], _) = download(json!({"source": folder})).unwrap();
        let asked: Vec<&str> = train.iter().chain(&valid).map(|row| row.instruction.as_str()).collect();
        assert_eq!((asked, test.len()), (vec!["a", "b", "v"], 0));
        scratch.file("set/train-00000-of-00003.jsonl", row("c"));
        assert!(error(json!({"source": folder})).contains("parts of more than one `train`"));
        fs::remove_file(folder.join("train-00000-of-00003.jsonl")).unwrap();
        scratch.file("set/valid.csv", "question,answer\nx,y\n");
        assert!(error(json!({"source": folder})).contains("validation-00000-of-00001.jsonl` are there"));
    }

    #[test]
    fn parquet_is_read_by_its_columns() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/parquet");
        let read = |name: &str, fields: &Json| {
            download(json!({"source": {"train": folder.join(name)}, "fields": fields})).map(|([train, ..], _)| train)
        };
        for fields in [json!({"instruction": "id", "output": "question"}), json!({"document": "question"})] {
            let rows = read("zstd.parquet", &fields).unwrap();
            assert_eq!(rows, read("rows.jsonl", &fields).unwrap());
            assert_eq!((rows.len(), rows[7].output.as_str()), (20, "question 2"));
        }
        let error = format!("{:#}", read("snappy.parquet", &json!({"output": "picture"})).unwrap_err());
        assert!(
            error.contains("snappy.parquet, row 1`: expected text") && error.contains("in `picture`, got an object"),
            "{error}"
        );
        let error = format!("{:#}", read("snappy.parquet", &json!({"output": "answers"})).unwrap_err());
        assert!(error.contains("row 1`: expected text or a list of texts in `answers`, got an empty list"), "{error}");
    }

    #[test]
    fn conversations_and_lists_of_answers_come_from_parquet() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/parquet/plain.parquet");
        let mut rows = Vec::new();
        let fields = Fields::default();
        let mut columns = Columns::new(&fields);
        records::read(&path, |mut record| {
            // Without a question it is a conversation, without a conversation an answered question.
            let (mut asked, index) = (record.fields.clone(), rows.len() / 2);
            record.fields.retain(|name, _| name == "messages");
            asked.retain(|name, _| name != "messages");
            let answers = asked.shift_remove("answers").unwrap();
            rows.extend(columns.rows(record)?.into_iter().take(1));
            asked.insert("answer".into(), if index % 3 == 0 { "none".into() } else { answers });
            rows.extend(columns.rows(records::Record { fields: asked, place: "here".into() })?);
            Ok(())
        })
        .unwrap();
        assert_eq!(rows.len(), 40);
        assert_eq!((rows[4].instruction.as_str(), rows[4].output.as_str()), ("Frage 2?", "üü"));
        assert_eq!((rows[5].instruction.as_str(), rows[5].input.as_str()), ("question 2", "context 2"));
        assert_eq!(rows[5].references, ["a2", "same"]);
        assert_eq!(rows[3].input, "");
    }

    #[test]
    fn rows_of_a_text_alone_are_documents() {
        let scratch = Scratch::new();
        let lines = scratch.file("a.jsonl", "{\"text\": \"one\\ntwo\", \"id\": 3}\n{\"text\": \"\"}\n");
        let text = scratch.file("a.txt", "one<@x(x!>two\n");
        let documents = |with: Json| download(with).map(|([train, ..], warnings)| (train, warnings));
        let (rows, warnings) = documents(json!({"source": {"train": lines}})).unwrap();
        assert_eq!((rows[0].output.as_str(), rows.iter().all(CorpusRow::is_document)), ("one\ntwo", true));
        assert_eq!(warnings, Vec::<String>::new());
        let (of_text, _) = documents(json!({"source": {"train": text}, "form": "text-lines"})).unwrap();
        assert_eq!(of_text[0], rows[0]);
        let (named, _) = documents(json!({"source": {"train": lines}, "fields": {"document": "text"}})).unwrap();
        assert_eq!(named, rows);
        // Beside a question and an answer, a text is a column like others.
        let both = scratch.file("b.jsonl", "{\"question\": \"q\", \"answer\": \"a\", \"text\": \"t\"}\n");
        assert_eq!(documents(json!({"source": {"train": both}})).unwrap().0[0].output, "a");
        assert_eq!(
            documents(json!({"source": {"train": both}, "fields": {"document": "text"}})).unwrap().0[0].output,
            "t"
        );
        let message = error(json!({"source": {"train": both}, "fields": {"document": "body"}}));
        assert!(
            message.contains("b.jsonl:1` has no document") && message.contains("fields: {document: ...}"),
            "{message}"
        );
        let config = json!({"source": "a", "fields": {"document": "t", "output": "o"}});
        let errors = Download.resolve(&config, Conventions::Sound).unwrap_err();
        assert_eq!(
            (errors[0].path.join("."), errors[0].message.as_str()),
            ("fields.output".into(), "a document asks and answers nothing")
        );
    }

    #[test]
    fn what_is_elsewhere_is_named_with_its_field_and_only_what_is_read_is_taken() {
        let sources = |with: Json| Kind::sources(&Download, &Download.resolve(&with, Conventions::Sound).unwrap());
        let [model] = &sources(json!({"model": "hub:a/b@v1"}))[..] else { panic!("one source") };
        let there = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "a.gguf"];
        let there = there.map(str::to_owned);
        assert_eq!(model.choose(&there).join(" "), "config.json model.safetensors tokenizer.json");
        let [tokenizer] = &sources(json!({"tokenizer": "hub:a/b"}))[..] else { panic!("one source") };
        assert_eq!(tokenizer.choose(&there).join(" "), "config.json tokenizer.json");
        let web = json!({"url": "https://x.org/a", "sha256": "0f".repeat(32)});
        let found = sources(json!({"source": {"train": web, "test": "hub:datasets/a/b/t.parquet"}}));
        let found: Vec<String> =
            found.iter().map(|source| format!("{} {}", source.field.join("."), source.at)).collect();
        assert_eq!(found, ["source.train https://x.org/a", "source.test hub:datasets/a/b/t.parquet"]);
        assert_eq!(sources(json!({"source": web})).len(), 1);
        let errors = |with: Json| {
            let errors = Download.resolve(&with, Conventions::Sound).unwrap_err();
            errors.into_iter().map(|e| format!("{} {}", e.path.join("."), e.message)).collect::<Vec<_>>().join("; ")
        };
        assert!(errors(json!({"model": "hub:gpt2"})).contains("model `hub:gpt2` names no repository"));
        assert!(
            errors(json!({"source": {"test": "https://x.org/a"}})).contains("source.test an address of the web needs")
        );
        assert!(errors(json!({"source": "builtin:instruct", "form": "text-lines"})).contains("form nothing reads"));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let scratch = Scratch::new();
        assert!(error(json!({"source": "nowhere.jsonl"})).contains("nowhere.jsonl"));
        let bad = scratch.file("bad.jsonl", "{\"question\":\"a\",\"answer\":\"b\"}\n{\"question\":");
        assert!(error(json!({"source": bad})).contains("bad.jsonl:2` is not JSON"));
        assert!(error(json!({"source": scratch.file("empty.jsonl", "")})).contains("no rows"));
    }

    #[test]
    fn options_that_nothing_reads_are_errors_with_a_way_out() {
        let errors = |with: Json| {
            let errors = Download.resolve(&with, Conventions::Sound).unwrap_err();
            errors.into_iter().map(|e| format!("{} {}", e.path.join("."), e.message)).collect::<Vec<_>>().join("; ")
        };
        assert!(errors(json!({})).contains("nothing to bring in"));
        assert!(errors(json!({"source": "a", "model": "b"})).contains("got several"));
        assert!(errors(json!({"source": "a", "rows": 3, "seed": 1})).contains("seed nothing reads `seed` here"));
        assert!(errors(json!({"source": "builtin:instruct", "split": {}})).contains("split nothing reads"));
        assert!(errors(json!({"source": "builtin:other"})).contains("no built-in corpus `builtin:other`"));
        assert!(errors(json!({"source": {}})).contains("expected a file"));
        assert!(errors(json!({"bin": "a"})).contains("`bin` needs the tokenizer"));
        assert!(
            errors(json!({"source": 3}))
                .contains("`builtin:instruct`, a path, `hub:OWNER/NAME`, `{url: ..., sha256: ...}`, or these")
        );
        assert!(errors(json!({"source": {"trian": "a"}})).contains("trian"));
        assert!(errors(json!({"source": "a", "fields": {"output": "none"}})).contains("fields.output a row without"));
        let nothing = json!({"source": "a", "fields": {"instruction": "none", "prompt": "none"}});
        assert!(errors(nothing).contains("fields.prompt neither an instruction nor a prompt"));
    }

    #[test]
    fn the_configuration_decides_the_ports_and_the_sources() {
        let seen = |with: Json| {
            let config = Download.resolve(&with, Conventions::Sound).unwrap();
            let ports = Kind::ports(&Download, &config).outputs.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
            let sources = Kind::sources(&Download, &config).iter().map(|s| s.field.join(".")).collect::<Vec<_>>();
            format!("{} < {}", ports.join(" "), sources.join(" "))
        };
        assert_eq!(seen(json!({"source": "builtin:instruct"})), "corpus < ");
        assert_eq!(seen(json!({"source": "a.jsonl"})), "corpus < source");
        assert_eq!(seen(json!({"source": {"train": "a", "test": "b"}})), "corpus < source.train source.test");
        assert_eq!(seen(json!({"tokenizer": "a"})), "tokenizer < tokenizer");
        assert_eq!(seen(json!({"tokenizer": "a", "bin": "b"})), "train valid test < bin tokenizer");
        assert_eq!(seen(json!({"model": "a"})), "model < model");
        assert_eq!(seen(json!({"adapter": "a"})), "adapter < adapter");
    }

    #[test]
    fn the_published_sets_are_read_as_they_are() {
        let Some(data) = shared_data("README.md") else { return };
        let rows = |name: &str| read_rows(&data.with_file_name(name), &Fields::default());
        let sets = [
            ("dolly/dolly-train.jsonl.gz", 13427),
            ("dolly/dolly-dev.jsonl.gz", 1000),
            ("dolly/dolly-eval-1of2.jsonl", 250),
            ("self-instruct/selfinst-minillm-242.jsonl", 242),
            ("vicuna/vicuna-minillm-80.jsonl", 80),
            ("sni/sni-11plus-1of2.jsonl.gz", 1145),
            ("unnatural/uinst-short-1of2.jsonl", 525),
            ("gsm8k/train.jsonl.gz", 7473),
            ("alpaca/alpaca-subset-1of2.json.gz", 1000),
        ];
        for (name, count) in sets {
            let rows = rows(name).unwrap();
            assert_eq!(rows.len(), count, "{name}");
            assert!(rows.iter().all(|row| !row.references.is_empty()), "{name}");
        }
        assert!(rows("sni/sni-11plus-1of2.jsonl.gz").unwrap().iter().any(|row| row.references.len() > 1));
        let error = rows("self-instruct/seed_tasks.jsonl").unwrap_err().to_string();
        assert!(error.contains("seed_tasks.jsonl:1` has no `output`") && error.contains("`instances`"), "{error}");
    }

    #[test]
    fn token_files_of_the_reference_become_datasets() {
        let (Some(golden), Some(gpt2)) = (shared_data("golden"), shared_data("tokenizers/gpt2")) else { return };
        let scratch = Scratch::new();
        for extension in ["bin", "idx"] {
            let bytes = fs::read(golden.join(format!("gpt2-valid_0.{extension}"))).unwrap();
            scratch.file(&format!("data/valid_0.{extension}"), bytes);
        }
        let with = json!({"bin": scratch.path().join("data"), "tokenizer": gpt2});
        let read = || {
            let (outputs, log) = scratch.run(&Download, with.clone(), vec![]).unwrap();
            assert_eq!(log.warnings.len(), 2);
            output::<Dataset>(&outputs, "valid")
        };
        let texts = read_rows(&golden.join("dolly-dev-order.jsonl.gz"), &Fields::default()).unwrap();
        let from_ids = read();
        scratch.file("data/valid.jsonl.gz", fs::read(golden.join("dolly-dev-order.jsonl.gz")).unwrap());
        let from_texts = read();
        for dataset in [&from_ids, &from_texts] {
            assert_eq!(dataset.rows.len(), 1000);
            assert!(dataset.rows.iter().all(|row| row.end == End::Stop));
            for (row, text) in dataset.rows.iter().zip(&texts) {
                assert_eq!(row.references, text.references);
            }
        }
        assert_eq!(from_ids, from_texts);
    }

    #[test]
    fn a_tokenizer_comes_as_a_folder_whatever_it_was() {
        let Some(gpt2) = shared_data("tokenizers/gpt2") else { return };
        let scratch = Scratch::new();
        let bare = scratch.file("bare/tokenizer.json", fs::read(gpt2.join("tokenizer.json")).unwrap());
        for path in [gpt2.clone(), bare] {
            let (outputs, _) = scratch.run(&Download, json!({"tokenizer": path}), vec![]).unwrap();
            let folder = folder(&outputs, "tokenizer");
            let file = TokenizerFile::load(&folder).unwrap();
            assert_eq!((file.end, file.size), (50256, 50257));
            let text = fs::read(folder.join("tokenizer_config.json")).unwrap();
            let facts: Json = serde_json::from_slice(&text).unwrap();
            assert_eq!(facts["eos_token"], "<|endoftext|>");
            assert_eq!(facts["tokenizer_class"] == "GPT2Tokenizer", path == gpt2);
        }
        let with = json!({"tokenizer": gpt2, "end_token": "<eot>"});
        let error = scratch.run(&Download, with, vec![]).err().unwrap().to_string();
        assert!(error.contains("end token `<eot>`"), "{error}");
    }

    #[test]
    fn a_model_comes_with_its_tokenizer() {
        let Some(model) = shared_data("weights/tinystories-656k-llama") else { return };
        let scratch = Scratch::new();
        let (outputs, _) = scratch.run(&Download, json!({"model": model}), vec![]).unwrap();
        let copied = folder(&outputs, "model");
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            assert_eq!(fs::read(copied.join(name)).unwrap(), fs::read(model.join(name)).unwrap(), "{name}");
        }
        assert_eq!(TokenizerFile::load(&copied).unwrap().end, 2);
        let empty = Scratch::new();
        let error = scratch.run(&Download, json!({"model": empty.path()}), vec![]).err().unwrap().to_string();
        assert!(error.contains("config.json"), "{error}");
    }
}
