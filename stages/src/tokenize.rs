//! `tokenize`: a corpus becomes datasets, rows of prompt ids and response ids.
//!
//! ```yaml
//! data:
//!   kind: tokenize
//!   in: {corpus: corpus, tokenizer: tokenizer}
//!   with: {template: alpaca, max_length: 512}
//! ```
//!
//! Inputs: `corpus`, `tokenizer`. Outputs: `train`, `valid`, `test`, each a dataset in the order of the corpus, with the
//! corpus's row ids and references; a split that the corpus lacks gives an empty dataset. Cost: some thousand rows
//! a second and core for texts of 200 tokens; a dataset holds 4 bytes a token.
//!
//! Prompt and answer are tokenised as one text, and the response is what follows the prompt's ids; the prompt begins as `bos`
//! says, and the end token is added. What is spelled like a control token stays text. Where the seam merges (the prompt's ids are no prefix of the text's), both are tokenised apart.
//!
//! `prime` puts text around what is asked, as a teacher may be shown it: the student reads a dataset without. Leave more room
//! there (`max_prompt_length`, `max_length`), so that no row is missing.
//!
//! `shots` puts training rows with their answers before what is asked in the rows to validate or test on: few-shot prompts, after a blank
//! line each, or in a chat as turns of their own.
//!
//! `template: chat` writes prompt and answer as the chat template does that the tokenizer carries. The response is then what
//! the assistant says, up to the token that ends its turn. A dataset has one response a row: of a conversation with several
//! answers `download` makes as many rows, each with all that was said before as its prompt. The template itself begins a
//! text, so `bos` adds something only where it is `yes`.
//!
//! ```yaml
//! pretrain:
//!   kind: tokenize
//!   in: {corpus: documents, tokenizer: tokenizer}
//!   with: {documents: {valid: 10000, train: 10000000}, max_length: 512}
//! ```
//!
//! `documents` makes rows of texts that ask nothing, as models are pretrained on: the ids of all documents of a split, an end
//! token behind each, stand in one line, and every `max_length` of them are a row; what is left over at the end is dropped. A
//! row's prompt is its first id and its response all others, so that every position but the last teaches.

use anyhow::{Context, Result, ensure};
use contract::dataset::{SPLITS, row_name};
use contract::limits;
use contract::{
    About, AnyValue, Bounds, ConfigError, Conventions, Dataset, End, Env, Facts, Folder, Inputs, Longest, Operator,
    Outlook, Outputs, PortType, Ports, Row, Sink, Stage, Step, TokenizerFile,
};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::chat::{Chat, Date, Exchange};
use crate::corpus::{self, CorpusRow, Split, Turn};
use crate::template::{Personas, Template, conversation};
use crate::text::{Bos, SpecialTokens, Text, begun, behind};

/// The stage kind.
pub struct Tokenize;

/// Its `with`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Text around the instruction.
    #[serde(default)]
    pub template: Template,
    /// Most tokens of prompt and response together, end token included. 512: what the distillation papers use.
    #[serde(default = "max_length")]
    #[schemars(range(min = 2, max = limits::TOKENS))]
    pub max_length: usize,
    /// Most tokens of a prompt. Training rows over it are dropped, as are those whose prompt leaves no room in
    /// `max_length`; rows to validate or test on are kept whole. 256: what the distillation papers use.
    #[serde(default = "max_prompt_length")]
    #[schemars(range(min = 1, max = limits::TOKENS))]
    pub max_prompt_length: usize,
    /// What happens to a row that is longer than `max_length`.
    #[serde(default)]
    pub too_long: TooLong,
    /// What becomes of text that is spelled like a control token, such as `<|endoftext|>`: `text` keeps it text, `parse` makes it
    /// that token. Left out: as the conventions say.
    #[serde(default)]
    pub special_tokens: Option<SpecialTokens>,
    /// Whether a prompt begins with the token that begins a text: `from-tokenizer`, `yes` or `no`. Left out: as the conventions
    /// say.
    #[serde(default)]
    pub bos: Option<Bos>,
    /// With `template: chat`, what the system says where a conversation does not begin with it. Left out: what the template
    /// says itself.
    #[serde(default)]
    pub system: Option<String>,
    /// With `template: chat`, the day for templates that write it, such as `2024-07-26`. Left out: templates are told of no
    /// day, so that a result does not depend on when it was made.
    #[serde(default)]
    pub date: Option<String>,
    /// Whether prompt and answer are tokenised as one text, or each as a text of its own.
    #[serde(default)]
    pub seam: Seam,
    /// Text around what is asked in every row, for a teacher that is to see it where its student does not. None by default.
    #[serde(default)]
    pub prime: Option<Prime>,
    /// So many training rows, the first ones, stand with their answers before what is asked in every row to validate or test on
    /// (few-shot). For evaluation with a model that was not trained on the task.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::BATCH))]
    pub shots: usize,
    /// Persona lines before the prompts of some training rows; none by default. For a teacher from random weights.
    #[serde(default)]
    pub personas: Option<Personas>,
    /// Whether rows keep the kind of task that the corpus names in its column `family` or `category`, or in the one that `fields`
    /// of `download` gives: a teacher can be chosen by it (`route` of `distill`).
    #[serde(default)]
    pub keep_family: bool,
    /// Makes rows of exactly `max_length` ids of documents. Left out: the corpus asks and answers.
    #[serde(default)]
    pub documents: Option<Documents>,
}

/// How documents become rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Documents {
    /// Rows from the beginning of the training documents that become the split `valid`. The published programs take 10,000.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::ROWS))]
    pub valid: usize,
    /// Most rows to train on after those; all unless given. The published programs take 10 or 20 million.
    #[serde(default)]
    #[schemars(range(min = 1, max = limits::ROWS))]
    pub train: Option<usize>,
    /// Whether a line break stands between a document and its end token, as the published programs leave it there from the
    /// line that a document was. Left out: as the conventions say.
    #[serde(default)]
    pub line_break: Option<bool>,
}

/// Text around what is asked; `{answer}` in it stands for the row's first right answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Prime {
    /// Directly before it.
    #[serde(default)]
    pub before: String,
    /// Directly behind it.
    #[serde(default)]
    pub after: String,
}

impl Prime {
    fn around(&self, row: &CorpusRow) -> CorpusRow {
        let answer = row.references.first().unwrap_or(&row.output);
        let [before, after] = [&self.before, &self.after].map(|text| text.replace("{answer}", answer));
        let around = |asked: &str| format!("{before}{asked}{after}");
        let mut turns = row.turns.clone();
        if let Some(asked) = turns.iter_mut().rfind(|turn| turn.role == "user") {
            asked.content = around(&asked.content);
        }
        let prompt = row.prompt.as_deref().map(around);
        CorpusRow { instruction: around(&row.instruction), prompt, turns, ..row.clone() }
    }
}

/// How the ids of prompt and answer come about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Seam {
    /// The answer goes on where the prompt ends, and is followed by the end token.
    #[default]
    Joined,
    /// Both are texts of their own, begun as `bos` says, and no end token follows: as the published program for response priming
    /// tokenises what it never puts together.
    Apart,
}

/// What happens to a row that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// The response is cut; it then has no end token.
    #[default]
    Cut,
    /// The row is left out of the training split, and cut in the others.
    Drop,
}

fn max_length() -> usize {
    512
}

fn max_prompt_length() -> usize {
    256
}

impl Stage for Tokenize {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "tokenize",
            // 2: spelling is text, and prompts begin as the tokenizer says.
            version: 2,
            numerics: None,
            summary: "turns a corpus into datasets of prompt ids and response ids",
            example: "data:\n  kind: tokenize\n  in: {corpus: corpus, tokenizer: tokenizer}\n  with: {template: alpaca, \
                      max_length: 512}\n",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        let reference = conventions == Conventions::Reference;
        config.special_tokens.get_or_insert(if reference { SpecialTokens::Parse } else { SpecialTokens::Text });
        config.bos.get_or_insert(if reference { Bos::No } else { Bos::FromTokenizer });
        if let Some(documents) = &mut config.documents {
            documents.line_break.get_or_insert(reference);
        }
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("corpus", PortType::Corpus, "text by split")
            .input("tokenizer", PortType::Tokenizer, "what turns it into ids")
            .output("train", PortType::Dataset, "rows to train on")
            .output("valid", PortType::Dataset, "rows to choose by")
            .output("test", PortType::Dataset, "rows to report on")
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let is_chat = config.template == Template::Chat;
        for (field, is_there) in [("system", config.system.is_some()), ("date", config.date.is_some())] {
            if is_there && !is_chat {
                let error = ConfigError::at(field, format!("`{field}` is there, and no chat template reads it"));
                errors.push(error.hint("it belongs to `template: chat`"));
            }
        }
        let for_answers = [
            ("template", config.template != Template::default()),
            ("max_prompt_length", config.max_prompt_length != max_prompt_length()),
            ("too_long", config.too_long != TooLong::default()),
            ("personas", config.personas.is_some()),
            ("keep_family", config.keep_family),
            ("seam", config.seam != Seam::default()),
            ("shots", config.shots > 0),
        ];
        for (field, _) in for_answers.iter().filter(|(_, is_there)| *is_there && config.documents.is_some()) {
            let error = ConfigError::at(field, format!("nothing reads `{field}` here"));
            errors.push(error.hint("`documents` are cut into rows of `max_length`, and have no prompt"));
        }
        if is_chat && config.seam == Seam::Apart {
            let error = ConfigError::at("seam", "a chat template writes prompt and answer as one text");
            errors.push(error.hint("leave `seam` out, or choose another `template`"));
        }
        if let Some(Err(error)) = config.date.as_ref().map(|date| date.parse::<Date>()) {
            errors.push(ConfigError::at("date", error.to_string()));
        }
        errors
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let Facts { vocabulary, ends, .. } = outlook.input("tokenizer");
        let rows = outlook.input("corpus").rows;
        if config.documents.is_some() {
            for split in SPLITS {
                let facts = Facts {
                    vocabulary: vocabulary.clone(),
                    ends: ends.clone(),
                    rows: vec![Bounds::ANY],
                    prompt: Longest::at_most(Some(1)),
                    text: Longest::at_most(Some(config.max_length as u64)),
                    ..Facts::default()
                };
                outlook.output(split, facts);
            }
            return;
        }
        let (longest, prompt) = (config.max_length as u64, config.max_prompt_length.min(config.max_length - 1) as u64);
        for (index, split) in SPLITS.into_iter().enumerate() {
            // Training rows may be dropped; the others are kept, however long their prompt.
            let train = split == Split::Train.name();
            let known = rows.get(index).copied().unwrap_or_default();
            let facts = Facts {
                vocabulary: vocabulary.clone(),
                ends: ends.clone(),
                rows: vec![if train { Bounds::at_most(known.most) } else { known }],
                prompt: Longest::at_most(train.then_some(prompt)),
                text: Longest::at_most(train.then_some(longest)),
                ..Facts::default()
            };
            outlook.output(split, facts);
        }
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Run { config }))
    }
}

struct Run {
    config: Config,
}

impl Operator for Run {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let corpus = inputs.take::<Folder>("corpus")?;
        let tokenizer = TokenizerFile::load(inputs.take::<Folder>("tokenizer")?.path())?;
        let text = Text::new(&tokenizer, self.config.special_tokens())?;
        let chat = self.config.chat(&tokenizer)?;
        let begin = match self.config.bos.unwrap_or(Bos::FromTokenizer) {
            // A chat template says itself how a text begins.
            Bos::FromTokenizer if chat.is_some() => Vec::new(),
            bos => bos.ids(&tokenizer)?,
        };
        if let Some(documents) = self.config.documents {
            let corpus = Split::ALL.map(|split| corpus::read(corpus.path(), split));
            let [train, valid, test] = corpus;
            let corpus = [train?, valid?, test?];
            for (split, rows) in Split::ALL.into_iter().zip(&corpus) {
                self.config.say_what_is_spelled(rows, split, &text, sink);
            }
            let chunks = Chunks { documents, length: self.config.max_length, text: &text, begin: &begin };
            let mut outputs = Outputs::new();
            for (split, rows) in Split::ALL.into_iter().zip(chunks.of(&corpus, sink)?) {
                outputs = outputs.with(split.name(), Dataset { rows, tokenizer: tokenizer.clone() });
            }
            return Ok(outputs);
        }
        let mut writer =
            Writer { config: &self.config, text: &text, chat: chat.as_ref(), begin: &begin, shots: Vec::new() };
        let mut outputs = Outputs::new();
        for (done, split) in Split::ALL.into_iter().enumerate() {
            let rows = corpus::read(corpus.path(), split)?;
            if split == Split::Train {
                ensure!(
                    rows.len() >= self.config.shots,
                    "`shots` asks for {} training rows, and there are {}",
                    self.config.shots,
                    rows.len()
                );
                writer.shots = rows[..self.config.shots].to_vec();
            }
            self.config.say_what_is_spelled(&rows, split, &text, sink);
            let (rows, counts) = writer.tokenize(&rows, split)?;
            counts.report(&rows, split, &self.config, sink)?;
            outputs = outputs.with(split.name(), Dataset { rows, tokenizer: tokenizer.clone() });
            sink.progress(done as u64 + 1, Split::ALL.len() as u64, "splits");
        }
        Ok(outputs)
    }
}

impl Config {
    fn special_tokens(&self) -> SpecialTokens {
        self.special_tokens.unwrap_or(SpecialTokens::Text)
    }

    /// The chat template, where one is asked for.
    fn chat(&self, tokenizer: &TokenizerFile) -> Result<Option<Chat>> {
        if self.template != Template::Chat {
            return Ok(None);
        }
        let chat = Chat::new(tokenizer, self.special_tokens())?;
        Ok(Some(match &self.date {
            Some(date) => chat.on(date.parse()?),
            None => chat,
        }))
    }

    /// Says which rows are spelled like control tokens, and what becomes of them.
    fn say_what_is_spelled(&self, rows: &[CorpusRow], split: Split, text: &Text, sink: &mut dyn Sink) {
        let spelled = |row: &CorpusRow| {
            let CorpusRow { instruction, input, prompt, output, turns, .. } = row;
            let parts = [Some(instruction), Some(input), prompt.as_ref(), Some(output)];
            let turns = turns.iter().map(|turn| &turn.content);
            parts.into_iter().flatten().chain(turns).find_map(|part| text.spelled_in(part).map(str::to_owned))
        };
        let found: Vec<(u64, String)> =
            rows.par_iter().filter_map(|row| spelled(row).map(|token| (row.id, token))).collect();
        let Some((first, token)) = found.first() else { return };
        let counted = match found.len() {
            1 => "1 row".to_owned(),
            several => format!("{several} rows"),
        };
        let (first, split) = (row_name(*first), split.name());
        let held =
            format!("{counted} of `{split}` hold what is spelled like a control token, first {first} with `{token}`");
        match self.special_tokens() {
            SpecialTokens::Text => {
                sink.note(&format!("{held}: it is kept as text (`special_tokens: parse` makes tokens of it)"));
            }
            SpecialTokens::Parse => {
                sink.warn(&format!("{held}: it becomes that token (`special_tokens: text` keeps it as text)"));
            }
        }
    }
}

/// What became of the rows of one split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    read: usize,
    long_prompts: usize,
    long_rows: usize,
    cut: usize,
}

impl Counts {
    fn report(&self, rows: &[Row], split: Split, config: &Config, sink: &mut dyn Sink) -> Result<()> {
        let Counts { read, long_prompts, long_rows, cut } = *self;
        let Config { max_length, max_prompt_length, .. } = *config;
        let name = split.name();
        if long_prompts > 0 {
            let room = max_prompt_length.min(max_length - 1);
            sink.warn(&format!("{long_prompts} of {read} rows of `{name}` dropped: prompt over {room} tokens"));
        }
        if long_rows > 0 {
            sink.warn(&format!("{long_rows} of {read} rows of `{name}` dropped: over {max_length} tokens"));
        }
        if cut > 0 {
            sink.warn(&format!("{cut} of {read} rows of `{name}` cut to {max_length} tokens"));
        }
        ensure!(
            read == 0 || !rows.is_empty(),
            "all {read} rows of `{name}` are too long; raise `max_length` ({max_length}) or `max_prompt_length` \
             ({max_prompt_length})"
        );
        let tokens = |part: fn(&Row) -> usize| rows.iter().map(part).sum::<usize>();
        let row = json!({
            "split": name,
            "rows": rows.len(),
            "dropped": long_prompts + long_rows,
            "cut": cut,
            "prompt_tokens": tokens(|row| row.prompt.len()),
            "response_tokens": tokens(|row| row.response.len()),
        });
        sink.metrics(row.as_object().expect("an object was written").clone());
        Ok(())
    }
}

/// What became of one row.
enum Fate {
    Kept(Row),
    Cut(Row),
    LongPrompt,
    LongRow,
}

/// What makes rows of ids.
struct Writer<'a> {
    config: &'a Config,
    text: &'a Text,
    chat: Option<&'a Chat>,
    /// Ids that a prompt begins with.
    begin: &'a [u32],
    /// Rows that stand, with their answers, before others.
    shots: Vec<CorpusRow>,
}

impl Writer<'_> {
    /// Tokenises one split, in order, on all threads.
    fn tokenize(&self, rows: &[CorpusRow], split: Split) -> Result<(Vec<Row>, Counts)> {
        let fates: Vec<Fate> = rows.par_iter().map(|row| self.fate(row, split)).collect::<Result<_>>()?;
        let mut counts = Counts { read: rows.len(), ..Counts::default() };
        let mut kept = Vec::with_capacity(rows.len());
        for fate in fates {
            match fate {
                Fate::Kept(row) => kept.push(row),
                Fate::Cut(row) => {
                    counts.cut += 1;
                    kept.push(row);
                }
                Fate::LongPrompt => counts.long_prompts += 1,
                Fate::LongRow => counts.long_rows += 1,
            }
        }
        Ok((kept, counts))
    }

    fn fate(&self, row: &CorpusRow, split: Split) -> Result<Fate> {
        ensure!(
            !row.is_document(),
            "{} is a document, which asks and answers nothing; `documents: {{}}` makes rows of documents",
            row_name(row.id)
        );
        let train = split == Split::Train;
        let Config { max_length, max_prompt_length, too_long, ref personas, .. } = *self.config;
        let line = personas.as_ref().filter(|_| train).and_then(|personas| personas.line(row.id));
        let primed = self.config.prime.as_ref().map(|prime| prime.around(row));
        let asked = primed.as_ref().unwrap_or(row);
        let shots = if train { &[] } else { self.shots.as_slice() };
        let Exchange { prompt, mut response } = self.exchange(asked, line, shots).with_context(|| row_name(row.id))?;
        if train && (prompt.len() > max_prompt_length || prompt.len() >= max_length) {
            return Ok(Fate::LongPrompt);
        }
        let room = max_length.saturating_sub(prompt.len());
        let is_long = response.len() > room;
        if is_long && train && too_long == TooLong::Drop {
            return Ok(Fate::LongRow);
        }
        response.truncate(room);
        let end = if is_long || self.config.seam == Seam::Apart { End::Length } else { End::Stop };
        let family = row.family.clone().filter(|_| self.config.keep_family);
        let references = row.references.clone();
        let row = Row { id: row.id, prompt, response, end, log_probs: None, references, family };
        Ok(if is_long { Fate::Cut(row) } else { Fate::Kept(row) })
    }

    /// Prompt and response, whole. `line` stands before what is asked, and `shots` before all.
    fn exchange(&self, row: &CorpusRow, line: Option<String>, shots: &[CorpusRow]) -> Result<Exchange> {
        let Writer { config, text, chat, begin, .. } = *self;
        let line = line.unwrap_or_default();
        let Some(chat) = chat else {
            let template = config.template;
            let shot = |row: &CorpusRow| Ok(template.prompt(row)? + &template.response(&row.output) + "\n\n");
            let prompt_text = shots.iter().map(shot).collect::<Result<String>>()? + &line + &template.prompt(row)?;
            let plain = text.encode(&prompt_text)?;
            if config.seam == Seam::Apart {
                let [prompt, response] = [plain, text.encode(&row.output)?].map(|ids| begun(begin, ids));
                return Ok(Exchange { prompt, response });
            }
            let response = after(&prompt_text, &plain, &config.template.response(&row.output), text)?;
            return Ok(Exchange { prompt: begun(begin, plain), response });
        };
        let mut turns = conversation(row);
        if let Some(asked) = turns.iter_mut().rfind(|turn| turn.role == "user") {
            asked.content.insert_str(0, &line);
        }
        if let Some(system) = config.system.as_ref().filter(|_| turns.first().is_none_or(|turn| turn.role != "system"))
        {
            turns.insert(0, Turn { role: "system".to_owned(), content: system.clone() });
        }
        let behind_system = usize::from(turns.first().is_some_and(|turn| turn.role == "system"));
        let shot = |row: &CorpusRow| {
            let answer = Turn { role: "assistant".to_owned(), content: row.output.clone() };
            conversation(row).into_iter().filter(|turn| turn.role != "system").chain([answer])
        };
        turns.splice(behind_system..behind_system, shots.iter().flat_map(shot));
        let Exchange { prompt, response } = chat.exchange(&turns, &row.output)?;
        Ok(Exchange { prompt: begun(begin, prompt), response })
    }
}

/// What makes rows of documents.
struct Chunks<'a> {
    documents: Documents,
    /// Ids of a row.
    length: usize,
    text: &'a Text,
    /// Ids that a document begins with.
    begin: &'a [u32],
}

impl Chunks<'_> {
    /// The rows of all splits, of which `corpus` has the documents.
    fn of(&self, corpus: &[Vec<CorpusRow>; 3], sink: &mut dyn Sink) -> Result<[Vec<Row>; 3]> {
        let Documents { valid, train, .. } = self.documents;
        let is_given = !corpus[Split::Valid as usize].is_empty();
        ensure!(
            valid == 0 || !is_given,
            "the corpus has documents to validate on, so that `documents: {{valid: {valid}}}` would make them twice"
        );
        let mut chunks = Split::ALL.map(|_| Vec::new());
        for split in Split::ALL {
            let ids = self.ids(&corpus[split as usize])?;
            let rest = ids.len() % self.length;
            if rest > 0 {
                let held = format!("the last {rest} of {} tokens of `{}` make no row", ids.len(), split.name());
                sink.note(&format!("{held} of {}", self.length));
            }
            chunks[split as usize] = ids.chunks_exact(self.length).map(<[u32]>::to_vec).collect();
        }
        let [training, validating, _] = &mut chunks;
        if valid > 0 {
            ensure!(
                training.len() > valid,
                "`documents` asks for {valid} rows to validate on, and there are {} in all",
                training.len()
            );
            validating.extend(training.drain(..valid));
        }
        training.truncate(train.unwrap_or(usize::MAX));
        let mut rows = Split::ALL.map(|_| Vec::new());
        for (split, chunks) in Split::ALL.into_iter().zip(chunks) {
            ensure!(chunks.len() <= Split::MOST_ROWS, "a split has at most {} rows", Split::MOST_ROWS);
            let metrics = json!({"split": split.name(), "rows": chunks.len(), "tokens": chunks.len() * self.length});
            sink.metrics(metrics.as_object().expect("an object was written").clone());
            let chunks = chunks.into_iter().enumerate();
            rows[split as usize] = chunks.map(|(index, ids)| self.row(split.row_id(index), ids)).collect();
        }
        Ok(rows)
    }

    /// The ids of documents, one after the other, an end token behind each.
    fn ids(&self, rows: &[CorpusRow]) -> Result<Vec<u32>> {
        let of_row = |row: &CorpusRow| -> Result<Vec<u32>> {
            ensure!(
                row.is_document(),
                "{} asks or answers something; `documents` is for a corpus of texts alone",
                row_name(row.id)
            );
            let ids = match self.documents.line_break {
                Some(true) => self.text.encode(&format!("{}\n", row.output))?,
                _ => self.text.encode(&row.output)?,
            };
            let mut ids = begun(self.begin, ids);
            ids.push(self.text.end());
            Ok(ids)
        };
        let ids: Vec<Vec<u32>> = rows.par_iter().map(of_row).collect::<Result<_>>()?;
        Ok(ids.concat())
    }

    fn row(&self, id: u64, mut ids: Vec<u32>) -> Row {
        let response = ids.split_off(1);
        let end = if response.last() == Some(&self.text.end()) { End::Stop } else { End::Length };
        Row { id, prompt: ids, response, end, log_probs: None, references: Vec::new(), family: None }
    }
}

/// Ids of a response after a prompt, with the end token.
fn after(prompt: &str, prompt_ids: &[u32], response: &str, text: &Text) -> Result<Vec<u32>> {
    let mut ids = behind(prompt_ids, &format!("{prompt}{response}"), response, |part| text.encode(part))?;
    ids.push(text.end());
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::mmidx;
    use crate::testing::{Log, Scratch, input, output, shared_data};

    /// A tokenizer whose tokens are the 256 bytes (end token 0) and the merges given.
    fn bytes(merges: &[&str]) -> (Text, TokenizerFile) {
        let file = crate::train_tokenizer::from_merges(merges);
        (Text::new(&file, SpecialTokens::Parse).unwrap(), file)
    }

    fn tokenize(rows: &[CorpusRow], split: Split, config: &Config, text: &Text) -> Result<(Vec<Row>, Counts)> {
        Writer { config, text, chat: None, begin: &[], shots: Vec::new() }.tokenize(rows, split)
    }

    fn row(id: u64, instruction: &str, output: &str) -> CorpusRow {
        CorpusRow {
            id,
            instruction: instruction.into(),
            input: String::new(),
            prompt: None,
            turns: Vec::new(),
            output: output.into(),
            references: vec![output.into(), "other".into()],
            family: None,
        }
    }

    fn config(json: serde_json::Value) -> Config {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn what_primes_stands_around_what_is_asked_and_may_hold_the_answer() {
        let (text, _) = bytes(&[]);
        let prime = json!({"before": "As a teacher: ", "after": " (it is {answer})"});
        let rows = |prime: Option<&serde_json::Value>| {
            let config = config(json!({"template": "task", "prime": prime}));
            tokenize(&[row(7, "Hi", "Yo")], Split::Train, &config, &text).unwrap().0.remove(0)
        };
        let (primed, plain) = (rows(Some(&prime)), rows(None));
        assert_eq!(text.decode(&primed.prompt).unwrap(), "Task: As a teacher: Hi (it is Yo)\nAnswer:");
        assert_eq!((primed.response, primed.id), (plain.response, plain.id));
    }

    #[test]
    fn a_row_is_prompt_and_response_with_the_end_token() {
        let (text, _) = bytes(&[]);
        let config = config(json!({"template": "task"}));
        let (rows, counts) = tokenize(&[row(7, "Hi", "Yo")], Split::Test, &config, &text).unwrap();
        assert_eq!(counts, Counts { read: 1, ..Counts::default() });
        let Row { id, prompt, response, end, references, .. } = &rows[0];
        assert_eq!((*id, *end, references.len()), (7, End::Stop, 2));
        assert_eq!(text.decode(prompt).unwrap(), "Task: Hi\nAnswer:");
        assert_eq!((text.decode(response).unwrap().as_str(), response.last()), (" Yo", Some(&text.end())));
    }

    #[test]
    fn shots_stand_before_what_is_asked_but_not_in_training() {
        let (text, _) = bytes(&[]);
        let config = config(json!({"template": "task", "shots": 2}));
        let shots = vec![row(0, "1+1", "2"), row(1, "1+2", "3")];
        let writer = Writer { config: &config, text: &text, chat: None, begin: &[], shots };
        let prompt = |split| text.decode(&writer.tokenize(&[row(7, "Hi", "Yo")], split).unwrap().0[0].prompt).unwrap();
        let shown = "Task: 1+1\nAnswer: 2\n\nTask: 1+2\nAnswer: 3\n\nTask: Hi\nAnswer:";
        assert_eq!((prompt(Split::Train).as_str(), prompt(Split::Test).as_str()), ("Task: Hi\nAnswer:", shown));
    }

    #[test]
    fn texts_of_their_own_begin_alike_and_do_not_end() {
        let (text, _) = bytes(&["a b"]);
        let config = config(json!({"template": "none", "seam": "apart"}));
        let writer = Writer { config: &config, text: &text, chat: None, begin: &[9], shots: Vec::new() };
        let row = writer.tokenize(&[row(0, "xa", "b")], Split::Train).unwrap().0.remove(0);
        let ids = |sample: &str| [vec![9], text.encode(sample).unwrap()].concat();
        assert_eq!((row.prompt, row.response, row.end), (ids("xa"), ids("b"), End::Length));
    }

    #[test]
    fn a_seam_that_merges_is_tokenised_apart() {
        let (text, _) = bytes(&["a b"]);
        let ids = |sample: &str| text.encode(sample).unwrap();
        assert_eq!(ids("xab").len(), 2);
        assert_eq!(after("xa", &ids("xa"), "b", &text).unwrap(), [ids("b"), vec![text.end()]].concat());
        assert_eq!(after("xa", &ids("xa"), "c", &text).unwrap(), [ids("c"), vec![text.end()]].concat());
    }

    #[test]
    fn long_rows_are_cut_or_dropped_and_long_prompts_leave_training_only() {
        let (text, _) = bytes(&[]);
        // Prompts of 2 and 5 bytes, responses of a line break, 4 bytes and the end token.
        let rows = [row(0, "ab", "1234"), row(1, "abcde", "1234")];
        let run = |split, json| tokenize(&rows, split, &config(json), &text).unwrap();
        let tight = json!({"template": "none", "max_length": 6, "max_prompt_length": 4});
        let (train, counts) = run(Split::Train, tight.clone());
        assert_eq!(counts, Counts { read: 2, long_prompts: 1, long_rows: 0, cut: 1 });
        assert_eq!((train.len(), train[0].response.len(), train[0].end), (1, 4, End::Length));
        let (test, counts) = run(Split::Test, tight);
        assert_eq!((test.len(), test[1].prompt.len(), test[1].response.len(), counts.cut), (2, 5, 1, 2));
        let (train, counts) = run(Split::Train, json!({"template": "none", "max_length": 8, "too_long": "drop"}));
        assert_eq!(counts, Counts { read: 2, long_prompts: 0, long_rows: 1, cut: 0 });
        assert_eq!((train.len(), train[0].end), (1, End::Stop));
        let (valid, counts) = run(Split::Valid, json!({"template": "none", "max_length": 4, "too_long": "drop"}));
        assert_eq!((valid[1].prompt.len(), valid[1].response.len(), counts.cut), (5, 0, 2));
    }

    #[test]
    fn personas_stand_before_training_prompts_only() {
        let (text, _) = bytes(&[]);
        let config = config(json!({"template": "task", "personas": {"fraction": 1.0}}));
        let prompt = |split| {
            let (rows, _) = tokenize(&[row(3, "Hi", "Yo")], split, &config, &text).unwrap();
            text.decode(&rows[0].prompt).unwrap()
        };
        let train = prompt(Split::Train);
        assert!(train.starts_with("Suppose you are a") && train.ends_with(".\nTask: Hi\nAnswer:"), "{train}");
        assert_eq!(prompt(Split::Valid), "Task: Hi\nAnswer:");
    }

    /// The published program's own loop: ids of a line with its line break, then the end token, into a buffer that is cut
    /// wherever it is long enough; the first rows validate.
    fn as_published(lines: &[&str], text: &Text, length: usize, valid: usize, train: usize) -> [Vec<Vec<u32>>; 2] {
        let (mut buffer, mut made) = (Vec::new(), [Vec::new(), Vec::new()]);
        for line in lines {
            buffer.extend(text.encode(&format!("{line}\n")).unwrap());
            buffer.push(text.end());
            while buffer.len() >= length {
                let rest = buffer.split_off(length);
                let split = usize::from(made[0].len() >= valid);
                made[split].push(std::mem::replace(&mut buffer, rest));
            }
        }
        made[1].truncate(train);
        made
    }

    #[test]
    fn documents_are_joined_and_cut_as_the_published_program_does_it() {
        let (text, _) = bytes(&["t h"]);
        let documents = ["the first", "a", "", "another one\nof two lines", "the end"];
        let rows: Vec<CorpusRow> = documents.iter().map(|text| CorpusRow::document((*text).to_owned())).collect();
        let mut log = Log::default();
        for (length, valid, train) in [(4, 2, 100), (7, 1, 3), (16, 0, 100)] {
            let documents_part = Documents { valid, train: Some(train), line_break: Some(true) };
            let chunks = Chunks { documents: documents_part, length, text: &text, begin: &[] };
            let [training, validating, _] = chunks.of(&[rows.clone(), vec![], vec![]], &mut log).unwrap();
            let [expected_valid, expected_train] = as_published(&documents, &text, length, valid, train);
            let whole = |rows: &[Row]| -> Vec<Vec<u32>> {
                rows.iter().map(|row| [&row.prompt[..], &row.response].concat()).collect()
            };
            assert_eq!((whole(&validating), whole(&training)), (expected_valid, expected_train), "{length}");
            // Everything but the last position is a target, and nothing is forced on a row that ends in the middle.
            for row in validating.iter().chain(&training) {
                assert_eq!((row.prompt.len(), row.response.len()), (1, length - 1));
                assert_eq!(row.end == End::Stop, row.response.last() == Some(&text.end()));
            }
            assert_eq!(training[0].id, Split::Train.row_id(0));
        }
        assert_eq!(log.notes[0], "the last 6 of 48 tokens of `train` make no row of 7");
    }

    #[test]
    fn documents_begin_as_asked_and_every_split_is_its_own() {
        let (text, _) = bytes(&[]);
        let corpus = ["ab", "cd", "ef"].map(|text| vec![CorpusRow::document(text.to_owned()); 2]);
        let chunks = |documents| Chunks { documents, length: 2, text: &text, begin: &[9] };
        let end = text.end();
        let [train, valid, test] = chunks(Documents::default()).of(&corpus, &mut Log::default()).unwrap();
        let a = text.encode("ab").unwrap();
        assert_eq!((train[0].prompt[0], &train[0].response), (9, &a[..1].to_vec()));
        assert_eq!((train[1].prompt[0], &train[1].response), (a[1], &vec![end]));
        assert_eq!([train.len(), valid.len(), test.len()], [4; 3]);
        let error =
            chunks(Documents { valid: 1, ..Documents::default() }).of(&corpus, &mut Log::default()).unwrap_err();
        assert!(error.to_string().contains("would make them twice"), "{error}");
        let alone = [corpus[0].clone(), vec![], vec![]];
        let error = chunks(Documents { valid: 4, ..Documents::default() }).of(&alone, &mut Log::default()).unwrap_err();
        assert!(error.to_string().contains("asks for 4 rows to validate on, and there are 4 in all"), "{error}");
    }

    #[test]
    fn documents_and_answers_are_not_taken_for_each_other() {
        let (text, _) = bytes(&[]);
        let document = CorpusRow::document("a".into());
        let error = tokenize(&[document], Split::Train, &config(json!({})), &text).unwrap_err().to_string();
        assert!(error.contains("row 1 of `train` is a document") && error.contains("`documents: {}`"), "{error}");
        let chunks = Chunks { documents: Documents::default(), length: 2, text: &text, begin: &[] };
        let corpus = [vec![row(0, "Hi", "Yo")], vec![], vec![]];
        let error = chunks.of(&corpus, &mut Log::default()).unwrap_err().to_string();
        assert!(error.contains("row 1 of `train` asks or answers something"), "{error}");
        let resolved = |with, conventions| contract::Kind::resolve(&Tokenize, &with, conventions);
        for (conventions, expected) in [(Conventions::Sound, false), (Conventions::Reference, true)] {
            let config = resolved(json!({"documents": {}}), conventions).unwrap();
            assert_eq!(config["documents"]["line_break"], expected);
        }
        let errors =
            resolved(json!({"documents": {}, "template": "task", "too_long": "drop"}), Conventions::Sound).unwrap_err();
        let fields: Vec<String> = errors.iter().map(|error| error.path.join(".")).collect();
        assert_eq!(fields, ["template", "too_long"]);
    }

    #[test]
    fn the_stage_gives_three_datasets_and_says_what_it_left_out() {
        let scratch = Scratch::new();
        let (_, file) = bytes(&[]);
        let tokenizer = scratch.path().join("tokenizer");
        let folder = scratch.path().join("corpus");
        fs::create_dir(&tokenizer).unwrap();
        fs::create_dir(&folder).unwrap();
        file.save(&tokenizer).unwrap();
        corpus::write(&folder, Split::Train, &[row(0, "ab", "12"), row(1, "abcdefgh", "1")]).unwrap();
        corpus::write(&folder, Split::Valid, &[]).unwrap();
        corpus::write(&folder, Split::Test, &[row(9, "ab", "1")]).unwrap();
        let run = |with| {
            let inputs = vec![
                ("corpus", input(PortType::Corpus, &folder)),
                ("tokenizer", input(PortType::Tokenizer, &tokenizer)),
            ];
            scratch.run(&Tokenize, with, inputs)
        };
        let (outputs, log): (_, Log) = run(json!({"template": "none", "max_prompt_length": 4})).unwrap();
        let lengths = ["train", "valid", "test"].map(|port| output::<Dataset>(&outputs, port).rows.len());
        assert_eq!(lengths, [1, 0, 1]);
        assert_eq!(log.warnings, ["1 of 2 rows of `train` dropped: prompt over 4 tokens"]);
        assert_eq!((log.rows[0]["dropped"].as_u64(), log.rows[0]["response_tokens"].as_u64()), (Some(1), Some(4)));
        let error = run(json!({"template": "none", "max_prompt_length": 1})).err().unwrap().to_string();
        assert!(error.contains("all 2 rows of `train` are too long"), "{error}");
    }

    #[test]
    fn a_chat_is_written_by_the_template_of_the_tokenizer() {
        let fixture: serde_json::Value = serde_json::from_str(include_str!("../tests/fixtures/chat.json")).unwrap();
        let style = &fixture["templates"]["llama3"];
        let settings = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": style["begin"],
            "eos_token": "<|endoftext|>", "chat_template": style["template"]});
        let files = [("tokenizer.json", &fixture["tokenizer"]), ("tokenizer_config.json", &settings)];
        let files = files.map(|(name, json)| (name.to_owned(), json.to_string().into_bytes())).into();
        let file = crate::tokenizer::open_files("a".into(), files, None).unwrap().tokenizer;
        let scratch = Scratch::new();
        let (tokenizer, folder) = (scratch.path().join("tokenizer"), scratch.path().join("corpus"));
        fs::create_dir(&tokenizer).unwrap();
        fs::create_dir(&folder).unwrap();
        file.save(&tokenizer).unwrap();
        let turn = |role: &str, content: &str| Turn { role: role.into(), content: content.into() };
        let turns = vec![turn("system", "S"), turn("user", "a"), turn("assistant", "b"), turn("user", "c<|eot_id|>")];
        let rows = [row(0, "Hi", "Yo"), CorpusRow { turns, ..row(1, "c", "d") }];
        corpus::write(&folder, Split::Train, &rows).unwrap();
        corpus::write(&folder, Split::Valid, &[]).unwrap();
        corpus::write(&folder, Split::Test, &[]).unwrap();
        let run = |with| {
            let inputs = vec![
                ("corpus", input(PortType::Corpus, &folder)),
                ("tokenizer", input(PortType::Tokenizer, &tokenizer)),
            ];
            scratch.run(&Tokenize, with, inputs)
        };
        // A shot is turns of its own, behind what the system says.
        let text = Text::new(&file, SpecialTokens::Parse).unwrap();
        let chat = Chat::new(&file, SpecialTokens::Text).unwrap();
        let config = config(json!({"template": "chat", "system": "Be brief."}));
        let writer =
            Writer { config: &config, text: &text, chat: Some(&chat), begin: &[], shots: vec![rows[0].clone()] };
        let shown = writer.tokenize(&[row(5, "Ho", "Ya")], Split::Test).unwrap().0.remove(0);
        let turns =
            [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Ho")].map(|(a, b)| turn(a, b));
        let Exchange { prompt, response } = chat.exchange(&turns, "Ya").unwrap();
        assert_eq!((shown.prompt, shown.response), (prompt, response));
        let (outputs, log): (_, Log) = run(json!({"template": "chat", "system": "Be brief."})).unwrap();
        let text = Text::new(&file, SpecialTokens::Parse).unwrap();
        // As it is written, with control tokens.
        let written = |ids: &[u32]| ids.iter().map(|id| text.token(*id).unwrap()).collect::<String>().replace('Ċ', "/");
        let head = |role: &str| format!("<|start_header_id|>{role}<|end_header_id|>//");
        let (system, user, assistant) = (head("system"), head("user"), head("assistant"));
        let rows = &output::<Dataset>(&outputs, "train").rows;
        let expected = format!("<|begin_of_text|>{system}BeĠbrief.<|eot_id|>{user}Hi<|eot_id|>{assistant}");
        assert_eq!((written(&rows[0].prompt), written(&rows[0].response)), (expected, "Yo<|eot_id|>".to_owned()));
        assert_eq!(rows[0].prompt.iter().filter(|id| Some(**id) == file.begin).count(), 1);
        let said = format!("{user}a<|eot_id|>{assistant}b<|eot_id|>{user}c<|eot_id|><|eot_id|>{assistant}");
        assert_eq!(written(&rows[1].prompt), format!("<|begin_of_text|>{system}S<|eot_id|>{said}"));
        let ends = rows[1].prompt.iter().filter(|id| rows[1].response.last() == Some(*id)).count();
        // What the user spells is no end of a turn.
        assert_eq!((ends, log.notes.len()), (4, 1));

        let error = |with| format!("{:#}", run(with).err().unwrap());
        assert!(error(json!({"template": "alpaca"})).contains("`template: chat`"));
        assert!(error(json!({"template": "chat", "date": "tomorrow"})).contains("expected one such as 2024-07-26"));
        assert!(error(json!({"template": "task", "system": "x"})).contains("no chat template reads it"));
    }

    #[test]
    fn the_reference_rows_are_tokenised_byte_for_byte() {
        let (Some(golden), Some(gpt2)) = (shared_data("golden"), shared_data("tokenizers/gpt2")) else { return };
        let tokenizer = crate::tokenizer::open_tokenizer(&gpt2, None).unwrap().tokenizer;
        let text = Text::new(&tokenizer, SpecialTokens::Parse).unwrap();
        let lines = crate::download::read_rows(&golden.join("dolly-dev-order.jsonl.gz"), &Default::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for template in ["ready", "alpaca"] {
            let config = config(json!({"template": template, "max_length": 100_000}));
            let (rows, counts) = tokenize(&lines, Split::Train, &config, &text).unwrap();
            assert_eq!(counts, Counts { read: 1000, ..Counts::default() });
            mmidx::write(&folder.path().join("valid"), &rows, tokenizer.size).unwrap();
            for extension in ["bin", "idx"] {
                let read = |path: &Path| fs::read(path).unwrap();
                let written = read(&folder.path().join(format!("valid_0.{extension}")));
                assert!(written == read(&golden.join(format!("gpt2-valid_0.{extension}"))), "{template} {extension}");
            }
        }
    }
}
