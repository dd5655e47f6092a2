//! What the columns of a row mean: which is asked, which is the answer.
//!
//! A row may also be a conversation: then every answer in it is a row, with what was said before. Columns are told by the names
//! that the published sets use; `fields` of `download` names others. A column that nothing understands is named once, two that
//! could mean the same are refused, and no row loses its prompt.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, bail, ensure};
use contract::{ConfigError, Sink};
use indexmap::IndexSet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::corpus::{CorpusRow, Turn};
use crate::records::{Record, TEXT};

/// Names of a row's columns. `none` is for a column that is not to be read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fields {
    /// What is asked: `instruction` or `question` unless given.
    #[serde(default)]
    pub instruction: Option<String>,
    /// Its context: `input` or `context` unless given.
    #[serde(default)]
    pub input: Option<String>,
    /// The answer, a text or a list of right ones: `output`, `response`, `answer` or `completion` unless given.
    #[serde(default)]
    pub output: Option<String>,
    /// A ready prompt: `prompt` unless given.
    #[serde(default)]
    pub prompt: Option<String>,
    /// The kind of task: `family` or `category` unless given.
    #[serde(default)]
    pub family: Option<String>,
    /// A document, which is to be continued and not answered: `text`, where a row asks and answers nothing, unless given.
    #[serde(default)]
    pub document: Option<String>,
}

/// In place of a name: no such column.
const NONE: &str = "none";

const INSTRUCTION: &[&str] = &["instruction", "question"];
const INPUT: &[&str] = &["input", "context"];
const OUTPUT: &[&str] = &["output", "response", "answer", "completion"];
const PROMPT: &[&str] = &["prompt"];
const FAMILY: &[&str] = &["family", "category"];
const DOCUMENT: &[&str] = &[TEXT];
const CONVERSATION: &[&str] = &["messages", "conversations", "conversation", "dialog", "dialogue"];

impl Fields {
    /// What is wrong with the names themselves.
    pub(crate) fn errors(&self) -> Vec<ConfigError> {
        let is_none = |name: &Option<String>| name.as_deref() == Some(NONE);
        let mut errors = Vec::new();
        let documents = self.document.as_ref().is_some_and(|name| name != NONE);
        let others = [
            ("instruction", &self.instruction),
            ("input", &self.input),
            ("output", &self.output),
            ("prompt", &self.prompt),
        ];
        for (field, _) in others.iter().filter(|(_, name)| documents && name.as_ref().is_some_and(|name| name != NONE))
        {
            let error = ConfigError::at(&format!("fields.{field}"), "a document asks and answers nothing");
            errors.push(error.hint("name either the column of the documents or those of questions and answers"));
        }
        if documents {
            return errors;
        }
        if is_none(&self.output) {
            let error = ConfigError::at("fields.output", "a row without an answer teaches nothing");
            errors.push(error.hint("name the column of the answers"));
        }
        if is_none(&self.instruction) && is_none(&self.prompt) {
            let error = ConfigError::at("fields.prompt", "neither an instruction nor a prompt is left to be asked");
            errors.push(error.hint("name the column of one of them"));
        }
        errors
    }
}

/// Turns the records of a corpus, from one file or several, into rows.
pub(crate) struct Columns<'a> {
    fields: &'a Fields,
    rows: usize,
    there: IndexSet<String>,
    read: BTreeSet<String>,
    /// Rows whose `references` lack the answer.
    foreign_references: usize,
    empty_answers: usize,
    empty_prompts: usize,
}

impl<'a> Columns<'a> {
    pub(crate) fn new(fields: &'a Fields) -> Self {
        Columns {
            fields,
            rows: 0,
            there: IndexSet::new(),
            read: BTreeSet::new(),
            foreign_references: 0,
            empty_answers: 0,
            empty_prompts: 0,
        }
    }

    /// The rows that a record holds, each with the id 0: one, or of a conversation one for each answer.
    pub(crate) fn rows(&mut self, record: Record) -> Result<Vec<CorpusRow>> {
        let Record { fields: object, place } = record;
        for name in object.keys().filter(|name| !self.there.contains(name.as_str())).collect::<Vec<_>>() {
            self.there.insert(name.clone());
        }
        let Fields { instruction, prompt, output, document, .. } = self.fields;
        let asked = [(instruction, INSTRUCTION), (prompt, PROMPT), (output, OUTPUT)];
        let is_row = asked.iter().any(|(name, usual)| {
            name.as_ref().is_some_and(|name| name != NONE)
                || candidates(&object, name, usual).iter().any(|(_, value)| says_something(value))
        });
        let spoken = CONVERSATION.iter().find_map(|name| Some((*name, object.get(*name)?.as_array()?)));
        let text = find(&object, "document", document, DOCUMENT).map_err(|error| anyhow!("`{place}` {error}"))?;
        let names_document = document.as_ref().is_some_and(|name| name != NONE);
        if let Some((name, value)) = text.filter(|_| names_document || !is_row && spoken.is_none()) {
            return Ok(vec![self.document(name, value, &place)?]);
        }
        if names_document {
            bail!(unknown(&place, &object, "document", "document"));
        }
        match spoken.filter(|_| !is_row) {
            Some((name, turns)) => {
                let rows = conversation(turns).and_then(|turns| answered(&turns));
                let rows = rows.map_err(|error| anyhow!("`{place}`: {error} in `{name}`"))?;
                self.read.insert(name.to_owned());
                self.rows += rows.len();
                self.empty_answers += rows.iter().filter(|row| row.output.trim().is_empty()).count();
                self.empty_prompts += rows.iter().filter(|row| row.instruction.trim().is_empty()).count();
                Ok(rows)
            }
            None => self.row(&object, &place).map(|row| vec![row]),
        }
    }

    fn document(&mut self, name: &str, value: &Json, place: &str) -> Result<CorpusRow> {
        let found = text(value);
        let text = found.with_context(|| format!("`{place}`: expected text in `{name}`, got {}", describe(value)))?;
        if !self.read.contains(name) {
            self.read.insert(name.to_owned());
        }
        self.rows += 1;
        Ok(CorpusRow::document(text))
    }

    fn row(&mut self, object: &Map<String, Json>, place: &str) -> Result<CorpusRow> {
        let fields = self.fields;
        let one = |option, name, usual| find(object, option, name, usual).map_err(|error| anyhow!("`{place}` {error}"));
        let instruction = one("instruction", &fields.instruction, INSTRUCTION)?;
        let input = one("input", &fields.input, INPUT)?;
        let output = one("output", &fields.output, OUTPUT)?;
        let prompt = one("prompt", &fields.prompt, PROMPT)?;
        // A label: nothing is learnt from it, so the first will do.
        let family = candidates(object, &fields.family, FAMILY).into_iter().find(|(_, value)| says_something(value));

        let asks = |found: Option<(&str, &Json)>| found.is_some_and(|(_, value)| !value.is_null());
        if !asks(instruction) && !asks(prompt) {
            bail!(unknown(place, object, "`instruction`, `question` or `prompt`", "instruction"));
        }
        let Some((answer, output)) = output else {
            bail!(unknown(place, object, "`output`, `response`, `answer` or `completion`", "output"))
        };
        let answers = texts(answer, output, place)?;
        let whole = |found: Option<(&str, &Json)>| match found {
            None | Some((_, Json::Null)) => Ok(None),
            Some((name, value)) => text(value)
                .map(Some)
                .with_context(|| format!("`{place}`: expected text in `{name}`, got {}", describe(value))),
        };
        let mut row = CorpusRow {
            id: 0,
            instruction: whole(instruction)?.unwrap_or_default(),
            input: whole(input)?.unwrap_or_default(),
            prompt: whole(prompt)?,
            turns: Vec::new(),
            output: answers[0].clone(),
            references: answers,
            family: family.and_then(|(_, value)| match value {
                Json::Null | Json::Array(_) | Json::Object(_) => None,
                Json::String(text) => Some(text.clone()),
                label => Some(label.to_string()),
            }),
        };

        let family = family.filter(|_| row.family.is_some());
        let read = [instruction, input, prompt, family].into_iter().flatten().map(|(name, _)| name);
        let mut read: Vec<&str> = read.chain([answer]).collect();
        let references = object.get("references").and_then(Json::as_array);
        if let Some(list) = references.and_then(|list| list.iter().map(text).collect::<Option<Vec<_>>>()) {
            if list.contains(&row.output) {
                row.references = list;
                read.push("references");
            } else {
                self.foreign_references += 1;
            }
        }
        for name in read {
            if !self.read.contains(name) {
                self.read.insert(name.to_owned());
            }
        }
        self.rows += 1;
        self.empty_answers += usize::from(row.output.trim().is_empty());
        let asked = [Some(&row.instruction), Some(&row.input), row.prompt.as_ref()];
        self.empty_prompts += usize::from(asked.into_iter().flatten().all(|text| text.trim().is_empty()));
        Ok(row)
    }

    /// Says what was found, once for the corpus.
    ///
    /// Errors when `fields` names a column that no row has.
    pub(crate) fn conclude(self, sink: &mut dyn Sink) -> Result<()> {
        let Fields { instruction, input, output, prompt, family, document } = self.fields;
        let named = [
            ("instruction", instruction),
            ("input", input),
            ("output", output),
            ("prompt", prompt),
            ("family", family),
            ("document", document),
        ];
        for (option, name) in named {
            let Some(name) = name.as_ref().filter(|name| *name != NONE) else { continue };
            ensure!(
                self.rows == 0 || self.there.contains(name),
                "no row has the column `{name}`, which `fields: {{{option}: {name}}}` names; there are {}",
                listed(self.there.iter().map(String::as_str))
            );
        }
        let unread: Vec<&str> =
            self.there.iter().map(String::as_str).filter(|name| !self.read.contains(*name)).collect();
        if !unread.is_empty() {
            sink.note(&format!("nothing reads the columns {}; `fields` can name them", listed(unread.iter().copied())));
        }
        let mut warn = |count: usize, what: &str| {
            if count > 0 {
                sink.warn(&format!("{count} of {} rows {what}", self.rows));
            }
        };
        warn(self.empty_answers, "have an empty answer");
        warn(self.empty_prompts, "ask nothing: instruction, input and prompt are empty");
        warn(self.foreign_references, "have `references` without their answer; these are not taken for right answers");
        Ok(())
    }
}

/// The column that is meant. Errors where two of the usual names say different things.
fn find<'a>(
    object: &'a Map<String, Json>,
    option: &str,
    name: &'a Option<String>,
    usual: &[&'a str],
) -> Result<Option<(&'a str, &'a Json)>> {
    let there = candidates(object, name, usual);
    let mut telling = there.iter().filter(|(_, value)| says_something(value));
    let Some((one, value)) = telling.next() else { return Ok(there.first().copied()) };
    if let Some((other, _)) = telling.find(|(_, other)| other != value) {
        bail!("has both `{one}` and `{other}`; name the one that is meant with `fields: {{{option}: {one}}}`");
    }
    Ok(Some((one, value)))
}

/// The column of the given name, else those of the usual names that are there.
fn candidates<'a>(
    object: &'a Map<String, Json>,
    name: &'a Option<String>,
    usual: &[&'a str],
) -> Vec<(&'a str, &'a Json)> {
    let column = |name: &'a str| object.get(name).map(|value| (name, value));
    match name {
        Some(name) if name == NONE => Vec::new(),
        Some(name) => column(name).into_iter().collect(),
        None => usual.iter().copied().filter_map(column).collect(),
    }
}

fn says_something(value: &Json) -> bool {
    !value.is_null() && value != ""
}

fn unknown(place: &str, object: &Map<String, Json>, wanted: &str, option: &str) -> String {
    let names = listed(object.keys().map(String::as_str));
    let names = if object.is_empty() { "it is empty".to_owned() } else { format!("only {names}") };
    format!("`{place}` has no {wanted}, {names}; name it with `fields: {{{option}: ...}}`")
}

/// The turns of a conversation, in the form of OpenAI (`role`, `content`) or of ShareGPT (`from`, `value`).
fn conversation(turns: &[Json]) -> Result<Vec<Turn>> {
    let turn = |(index, turn): (usize, &Json)| {
        let part = |names: [&str; 2]| {
            let value = names.iter().find_map(|name| turn.get(*name));
            value
                .and_then(Json::as_str)
                .with_context(|| format!("turn {} has no text in `{}` or `{}`", index + 1, names[0], names[1]))
        };
        let (role, content) = (part(["role", "from"])?, part(["content", "value"])?);
        let role = match role {
            "human" => "user",
            "gpt" | "chatgpt" | "model" => "assistant",
            other => other,
        };
        Ok(Turn { role: role.to_owned(), content: content.to_owned() })
    };
    turns.iter().enumerate().map(turn).collect()
}

/// A row for each answer of the assistant, with all that was said before it. What it says before anybody asks is no answer.
fn answered(turns: &[Turn]) -> Result<Vec<CorpusRow>> {
    let mut rows = Vec::new();
    for (index, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.role == "assistant") {
        let before = &turns[..index];
        let Some(asked) = before.iter().rfind(|turn| turn.role == "user") else { continue };
        rows.push(CorpusRow {
            instruction: asked.content.clone(),
            // A question alone is all there is.
            turns: if before.len() > 1 { before.to_vec() } else { Vec::new() },
            output: turn.content.clone(),
            references: vec![turn.content.clone()],
            ..CorpusRow::default()
        });
    }
    ensure!(!rows.is_empty(), "no `user` is answered by an `assistant`");
    Ok(rows)
}

/// All right answers of a record that has no other use: a reference to score against.
pub(crate) fn answers(record: &Record) -> Result<Vec<String>> {
    let Record { fields, place } = record;
    let found = find(fields, "output", &None, OUTPUT).map_err(|error| anyhow!("`{place}` {error}"))?;
    let Some((name, value)) = found else {
        let columns = listed(fields.keys().map(String::as_str));
        bail!("`{place}` has no `output`, `response`, `answer` or `completion`, only {columns}")
    };
    texts(name, value, place)
}

/// The text in the column `name` of a record.
pub(crate) fn text_in(record: &Record, name: &str) -> Result<String> {
    let Record { fields, place } = record;
    let value = fields
        .get(name)
        .with_context(|| format!("`{place}` has no `{name}`, only {}", listed(fields.keys().map(String::as_str))))?;
    match value {
        // An empty cell of a table: an empty answer.
        Json::Null => Ok(String::new()),
        value => text(value).with_context(|| format!("`{place}`: expected text in `{name}`, got {}", describe(value))),
    }
}

fn texts(name: &str, value: &Json, place: &str) -> Result<Vec<String>> {
    let texts = match value {
        Json::Array(list) => list.iter().map(text).collect::<Option<Vec<_>>>().filter(|list| !list.is_empty()),
        one => text(one).map(|text| vec![text]),
    };
    texts.with_context(|| format!("`{place}`: expected text or a list of texts in `{name}`, got {}", describe(value)))
}

/// A text, or what has one spelling as text.
pub(crate) fn text(value: &Json) -> Option<String> {
    match value {
        Json::String(text) => Some(text.clone()),
        // The digits of other numbers, such as `2.50`, are not known any more.
        Json::Number(number) if number.is_i64() || number.is_u64() => Some(number.to_string()),
        _ => None,
    }
}

fn describe(value: &Json) -> String {
    match value {
        Json::Null => "nothing".into(),
        Json::Array(list) if list.is_empty() => "an empty list".into(),
        Json::Array(_) => "a list with something else in it".into(),
        Json::Object(_) => "an object".into(),
        Json::Number(number) => format!("{number}; write it in quotes, as it is to be spelled"),
        other => other.to_string(),
    }
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const MOST: usize = 20;
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(MOST);
    let text = names.iter().take(MOST).cloned().collect::<Vec<_>>().join(", ");
    if more == 0 { text } else { format!("{text} and {more} more") }
}
