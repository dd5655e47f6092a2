//! `download`: where text, tokenizers, token files and models come into a pipeline.
//!
//! ```yaml
//! corpus:    {kind: download, with: {source: builtin:instruct, rows: 8000}}
//! dolly:     {kind: download, with: {source: dolly.jsonl.gz, split: {valid: 1000, test: 500}}}
//! sets:      {kind: download, with: {source: {train: a.jsonl, test: b.json}, limit: {train: 2000}}}
//! gpt2:      {kind: download, with: {tokenizer: checkpoints/gpt2}}
//! processed: {kind: download, with: {bin: processed/dolly, tokenizer: checkpoints/gpt2}}
//! teacher:   {kind: download, with: {model: checkpoints/gpt2-xl}}
//! ```
//!
//! No inputs. The configuration decides the outputs: `source` gives `corpus`; `tokenizer` alone gives `tokenizer`; `bin`
//! gives datasets `train`, `valid`, `test`; `model` gives `model`. Cost: reading the files; the built-in corpus takes a
//! fraction of a second. Files are local; their content, not their path, is part of the result's key.
//!
//! A file of rows is JSON lines, a JSON list, CSV or TSV, plain or gzipped; its bytes say which. Rows are told by their
//! columns: Alpaca's and MiniLLM's `instruction`, `input`, `output` (a text, or a list of right answers), `prompt`; Dolly's
//! `instruction`, `context`, `response`; GSM8K's `question`, `answer`; `prompt` with `completion`, which need
//! `template: ready` where they are tokenised. `fields` names others, or `none` for a column that is not to be read.
//! Conversations, `messages` with `role` and `content` or ShareGPT's `conversations` with `from` and `value`, become a row for
//! each answer, with all that was said before; they need `template: chat`. `split` counts conversations, `limit` rows.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use contract::dataset::SPLIT_ROWS;
use contract::files::counted;
use contract::limits;
use contract::{
    About, AnyValue, Bounds, Cause, ConfigError, Dataset, Env, Facts, Folder, Inputs, Operator, Outlook, Outputs,
    PortType, Ports, Sink, Source, Stage, Step, TokenizerFile,
};
use lm::ModelFolder;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::columns::Columns;
pub use crate::columns::Fields;
use crate::corpus::{self, CorpusRow, Split};
use crate::gguf::open_any_tokenizer;
use crate::instruct::{self, Sizes};
use crate::text::{SpecialTokens, Text};
use crate::tokenizer::Opened;
use crate::{mmidx, records};

/// Name of the built-in corpus.
const BUILTIN: &str = "builtin:instruct";

/// The stage kind.
pub struct Download;

/// Its `with`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A corpus: `builtin:instruct`; a file of rows (JSON lines, a JSON list, CSV or TSV, plain or gzipped); a folder with
    /// such files named `train`, `valid` and `test` (`.jsonl`, `.json`, `.csv` or `.tsv`, each also with `.gz`); or such files
    /// by split. Paths begin in the folder that `pipeline` is started in.
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
    /// Names of the columns of a row, where they are not found by themselves.
    #[serde(default)]
    pub fields: Fields,
    /// Most rows of each split; all unless given.
    #[serde(default)]
    pub limit: Limit,
    /// A tokenizer: a `tokenizer.json`, or a folder with one or with `vocab.json` and `merges.txt`.
    #[serde(default)]
    pub tokenizer: Option<String>,
    /// Text of the token that ends a text, where the tokenizer's files do not name it.
    #[serde(default)]
    pub end_token: Option<String>,
    /// A folder of token files as the reference programs write them: `train_0.bin`, `train_0.idx` and so on, with
    /// `train.jsonl` (the texts) beside where it is there. Needs `tokenizer`.
    #[serde(default)]
    pub bin: Option<String>,
    /// A model with its tokenizer: a Hugging Face folder of `config.json` and weights (`model.safetensors`,
    /// `pytorch_model.bin`, several files that an index names, or the parts of tensor-parallel ranks in `mp4/`), a GGUF file, or
    /// a folder with the `.bin` of llama2.c.
    #[serde(default)]
    pub model: Option<String>,
}

/// Where a corpus is.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// `builtin:instruct`, a file or a folder.
    One(String),
    /// A file for each split.
    Files(Files),
}

/// Files by split; a split that is left out is empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// Rows to train on.
    #[serde(default)]
    pub train: Option<String>,
    /// Rows to choose by.
    #[serde(default)]
    pub valid: Option<String>,
    /// Rows to report on.
    #[serde(default)]
    pub test: Option<String>,
}

impl Files {
    fn of(&self, split: Split) -> Option<&String> {
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
        let Config { source, rows, seed, split, fields, limit, tokenizer, end_token, bin, model } = config;
        let what = [source.is_some(), bin.is_some(), model.is_some()];
        match what.iter().filter(|given| **given).count() {
            0 if tokenizer.is_some() => {}
            1 => {}
            0 => errors.push(
                ConfigError::at("", "nothing to bring in")
                    .hint(format!("give `source`, `tokenizer`, `bin` or `model`; for example `source: {BUILTIN}`")),
            ),
            _ => errors.push(ConfigError::at("", "expected one of `source`, `bin` and `model`, got several")),
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
        unread("fields", *fields != Fields::default() && (source.is_none() || builtin), "a `source` of files");
        unread("limit", *limit != Limit::default() && source.is_none(), "`source`");
        unread("tokenizer", tokenizer.is_some() && source.is_some(), "a `download` of its own, or to `bin`");
        unread("end_token", end_token.is_some() && tokenizer.is_none() && model.is_none(), "`tokenizer` and `model`");
        if bin.is_some() && tokenizer.is_none() {
            errors.push(ConfigError::at("tokenizer", "`bin` needs the tokenizer that its ids come from"));
        }
        match source {
            Some(Place::One(name)) if name.starts_with("builtin:") && !builtin => errors.push(
                ConfigError::at("source", format!("there is no built-in corpus `{name}`"))
                    .hint(format!("there is `{BUILTIN}`")),
            ),
            Some(Place::Files(files)) if *files == Files::default() => {
                errors.push(ConfigError::at("source", "expected a file for `train`, `valid` or `test`"));
            }
            _ => {}
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
        } else {
            ports.output("tokenizer", PortType::Tokenizer, "the tokenizer")
        }
    }

    fn sources(&self, config: &Config) -> Vec<Source> {
        let source = |field: &[&str], path: &String| Source::new(field, path);
        let corpus = match &config.source {
            Some(Place::One(path)) if !config.is_builtin() => vec![source(&["source"], path).only(&file_names())],
            Some(Place::Files(files)) => Split::ALL
                .into_iter()
                .filter_map(|split| files.of(split).map(|path| source(&["source", split.name()], path)))
                .collect(),
            _ => Vec::new(),
        };
        // Token files, and the texts beside them.
        let token_files: Vec<String> = file_names().into_iter().chain(["*.bin".into(), "*.idx".into()]).collect();
        let bin = config.bin.as_ref().map(|path| source(&["bin"], path).only(&token_files));
        let tokenizer = config.tokenizer.as_ref();
        let tokenizer = tokenizer.map(|path| source(&["tokenizer"], path).only(&crate::tokenizer::sources()));
        // Neither a page about the model nor what is left of its training.
        let model_files: Vec<&str> = lm::MODEL_FILES.into_iter().chain(crate::tokenizer::sources()).collect();
        let model = config.model.as_ref().map(|path| source(&["model"], path).only(&model_files));
        corpus.into_iter().chain(bin).chain(tokenizer).chain(model).collect()
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
        let there = |path: &'_ Option<String>| path.as_ref().map(PathBuf::from).filter(|path| path.exists());
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

    fn is_builtin(&self) -> bool {
        self.source == Some(Place::One(BUILTIN.to_owned()))
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
        let Config { source, tokenizer, bin, model, end_token, .. } = &self.config;
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
            let path = Path::new(model);
            let model = ModelFolder::open(path)?;
            let tokenizer = take_in(path, end_token, sink)?;
            model.check_tokenizer(&tokenizer)?;
            model.check_values()?.iter().for_each(|odd| sink.warn(odd));
            model.copy(&folder)?;
            tokenizer.save(&folder)?;
            return Ok(Outputs::new().with("model", Folder::new(PortType::Model, folder)));
        }
        let path = tokenizer.as_ref().context("`download` has nothing to bring in")?;
        let tokenizer = take_in(Path::new(path), end_token, sink)?;
        if let Some(bin) = bin {
            return read_token_files(Path::new(bin), &tokenizer, sink);
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
    if config.is_builtin() {
        let mut kept = Kept::new(config.limit);
        for (split, rows) in Split::ALL.into_iter().zip(instruct::generate(config.seed.unwrap_or(0), &config.sizes())) {
            kept.add(split, rows)?;
        }
        return Ok(kept.conclude(sink));
    }
    let mut columns = Columns::new(&config.fields);
    let mut kept = Kept::new(config.limit);
    match source {
        Place::One(path) if Path::new(path).is_dir() => {
            let folder = Path::new(path);
            ensure!(
                config.split.is_none(),
                "`{path}` is a folder with a file for each split; `split` is for a single file"
            );
            let files = Split::ALL.map(|split| find(folder, split));
            ensure!(
                !files.iter().all(|file| matches!(file, Ok(None))),
                "`{path}` holds no file of rows; expected `train`, `valid` or `test` with one of the endings {}",
                ENDINGS.map(|ending| format!("`.{ending}`")).join(", ")
            );
            for (split, file) in Split::ALL.into_iter().zip(files) {
                if let Some(file) = file? {
                    each_record(&file, &mut columns, |rows| kept.add(split, rows))?;
                }
            }
        }
        Place::One(path) => {
            let division = config.split.unwrap_or_default();
            let mut count = 0;
            each_record(Path::new(path), &mut columns, |rows| {
                count += 1;
                kept.add(division.split_of(count - 1), rows)
            })?;
            division.check(count, path)?;
        }
        Place::Files(files) => {
            for split in Split::ALL {
                if let Some(path) = files.of(split) {
                    each_record(Path::new(path), &mut columns, |rows| kept.add(split, rows))?;
                }
            }
        }
    }
    columns.conclude(sink)?;
    if kept.seen == [0; 3] {
        match source {
            Place::One(path) => bail!("`{path}` has no rows"),
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

    fn check(self, rows: usize, path: &str) -> Result<()> {
        let Division { valid, test } = self;
        ensure!(
            valid.saturating_add(test) <= rows,
            "`split` asks for {valid} rows to validate and {test} to test, but `{path}` has {rows}"
        );
        Ok(())
    }
}

/// Endings of the files of rows in a folder. They only choose the file; its bytes say what it is.
const ENDINGS: [&str; 8] = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "tsv", "tsv.gz"];

/// Names of the files of rows in a folder.
fn file_names() -> Vec<String> {
    let of = |split: Split| ENDINGS.map(|ending| format!("{}.{ending}", split.name()));
    Split::ALL.into_iter().flat_map(of).collect()
}

/// The one file of a split in a folder.
fn find(folder: &Path, split: Split) -> Result<Option<PathBuf>> {
    let names = ENDINGS.map(|ending| format!("{}.{ending}", split.name()));
    let mut found = names.iter().map(|name| folder.join(name)).filter(|path| path.exists());
    let first = found.next();
    if let (Some(first), Some(second)) = (&first, found.next()) {
        bail!("both `{}` and `{}` are there; name the files in `source`", first.display(), second.display());
    }
    Ok(first)
}

/// Hands on the rows of one file, those of a conversation together.
fn each_record(path: &Path, columns: &mut Columns, mut keep: impl FnMut(Vec<CorpusRow>) -> Result<()>) -> Result<()> {
    records::read(path, |record| keep(columns.rows(record)?))
}

/// All rows of one file, numbered from 0.
#[cfg(test)]
pub(crate) fn read_rows(path: &Path, fields: &Fields) -> Result<Vec<CorpusRow>> {
    let mut rows = Vec::new();
    each_record(path, &mut Columns::new(fields), |found| {
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
    let Some(path) = find(folder, split)? else { return Ok(None) };
    let fields = Fields::default();
    let mut references = Vec::new();
    each_record(&path, &mut Columns::new(&fields), |rows| {
        references.extend(rows.into_iter().map(|row| row.references));
        Ok(())
    })?;
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
            Place::One(path) => serializer.serialize_str(path),
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
                write!(f, "`{BUILTIN}`, a path, or paths by split")
            }

            fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Place, E> {
                Ok(Place::One(path.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Place, A::Error> {
                Files::deserialize(MapAccessDeserializer::new(map)).map(Place::Files)
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
        let files = generator.subschema_for::<Files>();
        json_schema!({"anyOf": [{"type": "string"}, files]})
    }
}

#[cfg(test)]
mod tests {
    use contract::{Conventions, End, Kind};
    use serde_json::{Value as Json, json};

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
        assert!(errors(json!({"source": 3})).contains("`builtin:instruct`, a path, or paths by split"));
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
