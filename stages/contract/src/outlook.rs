//! The outlook of a stage: what can be said of it before it runs, and the rules that decide whether it can work.
//!
//! The runner asks every kind, in the order of the graph, with what is known at that moment: at `check` from configurations
//! and files, during a run from the values that are there by then, in the worker from the inputs themselves. The rules are
//! written once, here, so that all three say the same.
//!
//! What cannot work is an error as soon as it is certain; what may be meant and is odd is a warning.

use std::collections::BTreeMap;

use crate::dataset::row_name;
use crate::facts::{Bounds, Facts, Longest, Peak, Vocabulary};
use crate::files::{counted, in_words};
use crate::port::several_of;
use crate::tokenizer::is_other_meaning;

/// Where a stage is going to run.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// `cpu` or `cuda:N`; empty where it is not known.
    pub device: String,
    /// Bytes of memory of that device, where they are known.
    pub memory: Option<u64>,
}

/// Something that is known to be wrong or odd before a stage runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether the stage cannot work; else it is a warning.
    pub is_error: bool,
    /// What is to blame, the first thing first.
    pub causes: Vec<Cause>,
    /// What is wrong, as a lower-case fragment.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// A setting that has to do with a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A field of the stage's own `with`, by its path with dots.
    Field(String),
    /// An input port, and the field of the stage before it that decides the fact in question.
    Input(String, String),
}

/// What is known when a stage is looked at, and what it says to that.
#[derive(Clone, Debug, Default)]
pub struct Outlook {
    /// Where it will run.
    pub machine: Machine,
    /// Longest row, prompt and response together, that all who read what it writes can take.
    pub room: Option<u64>,
    inputs: BTreeMap<String, Facts>,
    /// What is known of its outputs.
    pub outputs: BTreeMap<String, Facts>,
    /// What is wrong or odd.
    pub findings: Vec<Finding>,
    /// Longest row that it can take from an input.
    pub rooms: BTreeMap<String, u64>,
    memory: Vec<Need>,
}

/// Rows that a model is to read or to continue.
#[derive(Clone, Debug)]
pub struct Rows {
    /// The input that they come from.
    pub port: String,
    /// Longest prompt.
    pub prompt: Longest,
    /// Longest prompt with its response.
    pub text: Longest,
    /// What to do where they are too long.
    pub shorten: &'static str,
}

impl Rows {
    /// The same of the first so many rows alone, where that is said.
    pub fn of_first(self, rows: Option<u64>) -> Self {
        let first = rows.unwrap_or(u64::MAX);
        Rows { prompt: self.prompt.of_first(first), text: self.text.of_first(first), ..self }
    }
}

/// What a model can read beside its soft prompt, and why.
struct Room {
    tokens: u64,
    words: String,
}

/// A part of the memory that a stage needs at least.
#[derive(Clone, Debug)]
struct Need {
    words: String,
    bytes: u64,
    cause: Cause,
}

/// Bytes of a weight in memory: models are held in f32.
const WEIGHT: u64 = 4;
/// Bytes of a weight in training: itself, its gradient, and two moments.
const TRAINED: u64 = 16;
/// Numbers a channel that a block keeps of a token for the backward pass, at least: what went into its norms, its attention
/// and its feed-forward layer.
const KEPT: u64 = 10;

/// How a stage trains a model, as far as it decides how much memory that takes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Learner {
    /// The model is made by the stage.
    pub is_new: bool,
    /// A block keeps its input alone.
    pub checkpointing: bool,
    /// An adapter is trained, and the model itself is as it was.
    pub adapter: bool,
}

impl Outlook {
    /// Of a stage with these inputs connected, known or not.
    pub fn new(machine: Machine, inputs: BTreeMap<String, Facts>, room: Option<u64>) -> Self {
        Outlook { machine, inputs, room, ..Outlook::default() }
    }

    /// Whether a port is connected.
    pub fn has(&self, port: &str) -> bool {
        self.inputs.contains_key(port)
    }

    /// The values of an input that takes several, as the stage calls them.
    pub fn several(&self, port: &str) -> Vec<String> {
        let is_of = |input: &&String| several_of(input).is_some_and(|(of, _)| of == port);
        self.inputs.keys().filter(is_of).cloned().collect()
    }

    /// What is known of an input: of one that is not connected, nothing.
    pub fn input(&self, port: &str) -> Facts {
        self.inputs.get(port).cloned().unwrap_or_default()
    }

    /// Lets facts stand for a port that is not connected.
    pub fn assume(&mut self, port: &str, facts: Facts) {
        self.inputs.insert(port.to_owned(), facts);
    }

    /// Says what will be known of an output.
    pub fn output(&mut self, port: &str, facts: Facts) {
        self.outputs.insert(port.to_owned(), facts);
    }

    /// Says that the stage cannot work.
    pub fn error(&mut self, causes: impl Into<Vec<Cause>>, message: impl Into<String>, hint: impl Into<String>) {
        let (message, hint) = (message.into(), hint.into());
        self.findings.push(Finding { is_error: true, causes: causes.into(), message, hint });
    }

    /// Says that something is odd.
    pub fn warn(&mut self, causes: impl Into<Vec<Cause>>, message: impl Into<String>, hint: impl Into<String>) {
        let (message, hint) = (message.into(), hint.into());
        self.findings.push(Finding { is_error: false, causes: causes.into(), message, hint });
    }

    /// Ids mean the same on all of `ports`; those not connected are left out.
    pub fn same_vocabulary(&mut self, ports: &[&str]) {
        let known = ports.iter().filter_map(|port| Some((*port, self.input(port).vocabulary?)));
        let known: Vec<(&str, Vocabulary)> = known.collect();
        let Some(((first, expected), others)) = known.split_first() else { return };
        for (port, found) in others {
            let Some(difference) = difference(first, expected, port, found) else { continue };
            let causes = [Cause::Input((*port).into(), "model".into()), Cause::Input((*first).into(), "model".into())];
            self.error(
                causes,
                format!("inputs `{first}` and `{port}` must have the same vocabulary, but {difference}"),
                "give both the same tokenizer",
            );
        }
    }

    /// The rows of `data` end with a token that `model` stops at.
    pub fn same_end(&mut self, data: &str, model: &str) {
        let (Some(written), Some(known)) = (self.input(data).ends, self.input(model).ends) else { return };
        if let Some(end) = written.iter().find(|end| !known.contains(end)) {
            let known: Vec<_> = known.iter().map(u32::to_string).collect();
            self.error(
                [Cause::Input(model.into(), "model".into()), Cause::Input(data.into(), "tokenizer".into())],
                format!("the rows of `{data}` end with token {end}, and `{model}` stops at {}", known.join(", ")),
                "say `end_token` where the tokenizer or the model comes in, so that both end a text alike",
            );
        }
    }

    /// A soft prompt is as wide as its model.
    pub fn same_width(&mut self, model: &str, prompt: &str) {
        let (Some(own), Some(other)) = (self.input(model).width, self.input(prompt).width) else { return };
        if own != other {
            self.error(
                [Cause::Input(prompt.into(), "length".into()), Cause::Input(model.into(), "init.width".into())],
                format!("`{prompt}` is a soft prompt of width {other}, and `{model}` has width {own}"),
                format!("connect the prompt that was made for `{model}`"),
            );
        }
    }

    /// The rows of an input as they are.
    pub fn rows(&self, port: &str) -> Rows {
        let Facts { prompt, text, .. } = self.input(port);
        let shorten = "lower `max_length` or `max_prompt_length` where the rows are made";
        Rows { port: port.to_owned(), prompt, text, shorten }
    }

    /// `model` reads rows whole, behind its soft prompt where one is connected. Who writes these rows learns of the limit.
    pub fn reads(&mut self, model: &str, soft_prompt: Option<&str>, rows: &Rows) {
        let Some(Room { tokens, words }) = self.room(model, soft_prompt) else { return };
        // The last token of a row is predicted and never read.
        let most = tokens.saturating_add(1);
        let least = self.rooms.entry(rows.port.clone()).or_insert(most);
        *least = most.min(*least);
        let (causes, hint) = self.too_long(model, soft_prompt, rows);
        let (prompt, text) = (rows.prompt.peak(), rows.text.peak());
        if let Some(peak) = prompt.filter(|peak| peak.tokens > tokens) {
            self.error(causes, prompt_too_long(peak, model, &words), hint);
        } else if let Some(peak) = text.filter(|peak| peak.tokens > most) {
            let row = row_name(peak.row);
            let message = format!("{row} has {} tokens, and `{model}` takes {most} at most: {words}", peak.tokens);
            self.error(causes, message, hint);
        } else if let (Some(peak), None, Some(longest)) =
            (prompt, text, rows.text.most.filter(|longest| *longest > most))
        {
            let message = format!(
                "rows may become {longest} tokens long, and `{model}` takes {most} at most: {words}; the prompt of {} has {}",
                row_name(peak.row),
                peak.tokens
            );
            self.warn(causes, message, "lower `max_new_tokens` where they are written");
        }
    }

    /// `model` continues the prompts of rows by up to `new` tokens, or as far as there is room. Gives what is known of the
    /// longest row then.
    pub fn writes(&mut self, model: &str, soft_prompt: Option<&str>, rows: &Rows, new: u64) -> Longest {
        let own = self.room(model, soft_prompt);
        let room = own.iter().map(|room| room.tokens).chain(self.room).min();
        let longest = rows.prompt.most.map(|most| most.saturating_add(new));
        let longest = Longest::at_most(longest.into_iter().chain(room).min());
        let Some(peak) = rows.prompt.peak() else { return longest };
        if let Some(Room { words, .. }) = own.as_ref().filter(|own| peak.tokens > own.tokens) {
            let (causes, hint) = self.too_long(model, soft_prompt, rows);
            self.error(causes, prompt_too_long(peak, model, words), hint);
        } else if let Some(room) = room.filter(|room| peak.tokens.saturating_add(new) > *room) {
            let who = if own.is_some_and(|own| own.tokens == room) { "the model" } else { "who reads them" };
            let message = format!(
                "answers to long prompts end before `max_new_tokens: {new}`: {who} takes {room} tokens at most, and the prompt \
                 of {} has {}",
                row_name(peak.row),
                peak.tokens
            );
            let fit = room.saturating_sub(peak.tokens).max(1);
            let hint = format!("`max_new_tokens: {fit}` gives all answers the same limit");
            self.warn([Cause::Field("max_new_tokens".into())], message, hint);
        }
        longest
    }

    /// The tokens that a model can read. A soft prompt that is connected and not known might have any length.
    fn room(&self, model: &str, soft_prompt: Option<&str>) -> Option<Room> {
        let positions = self.input(model).positions?;
        let Some(port) = soft_prompt.filter(|port| self.has(port)) else {
            return Some(Room { tokens: positions, words: format!("it has {positions} positions") });
        };
        let vectors = self.input(port).vectors?;
        let words = format!("it has {positions} positions, {vectors} of them taken by its soft prompt");
        Some(Room { tokens: positions.saturating_sub(vectors), words })
    }

    /// What decides whether rows fit, and what to do where they do not.
    fn too_long(&self, model: &str, soft_prompt: Option<&str>, rows: &Rows) -> (Vec<Cause>, String) {
        let soft_prompt = soft_prompt.filter(|port| self.has(port));
        let others =
            [Cause::Input(rows.port.clone(), "max_length".into()), Cause::Input(model.into(), "init.positions".into())];
        let causes = soft_prompt.map(|port| Cause::Input(port.into(), "length".into())).into_iter().chain(others);
        let fewer = if soft_prompt.is_some() { "give the soft prompt fewer vectors, " } else { "" };
        (causes.collect(), format!("{fewer}{}, or take a model of more `positions`", rows.shorten))
    }

    /// The stage reads at least `rows` rows of `data` where that is asked for by `field`.
    pub fn takes_rows(&mut self, data: &str, field: &str, rows: Option<u64>) {
        let known = self.input(data).row_count();
        let Some(rows) = rows else { return };
        if known.most < rows {
            let causes = [Cause::Field(field.into())];
            self.warn(
                causes,
                more_than_there_are(field, rows, data, known),
                format!("leave `{field}` out to take all"),
            );
        }
    }

    /// The stage holds a model, frozen.
    pub fn holds(&mut self, port: &str) {
        if self.has(port) {
            let facts = self.input(port);
            self.needs_memory(
                format!("for `{port}`"),
                facts.parameters,
                WEIGHT,
                Cause::Input(port.into(), largest(&facts)),
            );
        }
    }

    /// The stage trains the model on a port, or a new one, on the rows of `data`.
    pub fn trains(&mut self, port: &str, data: &str, Learner { is_new, checkpointing, adapter }: Learner) {
        let facts = self.input(port);
        let field = largest(&facts);
        let cause = if is_new { Cause::Field(field) } else { Cause::Input(port.into(), field) };
        let Facts { parameters, layers, width, .. } = facts;
        let each = if adapter { WEIGHT } else { TRAINED };
        self.needs_memory(format!("to train `{port}`"), parameters, each, cause.clone());
        // The longest row goes through it some time, and maybe others beside.
        let tokens = self.input(data).text.peak().map_or(0, |peak| peak.tokens);
        let kept = if checkpointing { 1 } else { KEPT };
        let sizes = [tokens, layers.unwrap_or(0), width.unwrap_or(0), kept * WEIGHT];
        let bytes = sizes.into_iter().fold(1, u64::saturating_mul);
        self.needs_bytes(
            &format!("{} to keep what its blocks did with a row of {tokens} tokens", in_words(bytes)),
            bytes,
            cause,
        );
    }

    fn needs_memory(&mut self, what: String, parameters: Bounds, each: u64, cause: Cause) {
        let parameters = parameters.least;
        let bytes = parameters.saturating_mul(each);
        let words = format!("{} {what} of {} parameters", in_words(bytes), count(parameters));
        self.memory.push(Need { words, bytes, cause });
    }

    /// The stage needs so many bytes of memory for something else, at least.
    pub fn needs_bytes(&mut self, words: &str, bytes: u64, cause: Cause) {
        self.memory.push(Need { words: words.to_owned(), bytes, cause });
    }

    /// The memory that the stage needs at least, as far as that is known.
    pub fn memory(&self) -> u64 {
        self.memory.iter().fold(0, |sum, need| sum.saturating_add(need.bytes))
    }

    /// Holds the memory that is needed against the machine's. For the runner, once the kind has said all.
    pub fn finish(mut self) -> Self {
        let Some(memory) = self.machine.memory else { return self };
        let needed = self.memory();
        if needed <= memory / 2 {
            return self;
        }
        let mut needs = self.memory.clone();
        needs.retain(|need| need.bytes > 0);
        needs.sort_by_key(|need| std::cmp::Reverse(need.bytes));
        let words: Vec<_> = needs.iter().map(|need| need.words.as_str()).collect();
        let words = format!("{}, and this machine has {}", words.join(", "), in_words(memory));
        let cause = vec![needs[0].cause.clone()];
        if needed > memory {
            let message = format!("it needs {} of memory or more: {words}", in_words(needed));
            self.error(cause, message, "make it smaller, or run it on a larger machine");
            // Those who would read what it makes need not say the same.
            self.outputs.values_mut().for_each(|facts| facts.parameters = Bounds::ANY);
        } else {
            let message = format!("it needs {words}: with the rest that may be too much");
            self.warn(cause, message, "a smaller model, `micro_batch` and `activation_checkpointing` need less");
        }
        self
    }
}

fn prompt_too_long(peak: Peak, model: &str, words: &str) -> String {
    let row = row_name(peak.row);
    format!("the prompt of {row} has {} tokens, which leaves `{model}` no room for a response: {words}", peak.tokens)
}

/// `rows` asked for where there are fewer.
pub fn more_than_there_are(field: &str, rows: u64, data: &str, known: Bounds) -> String {
    let at_most = if known.exact().is_some() { "" } else { "at most " };
    format!("`{field}` asks for {}, and `{data}` has {at_most}{}", counted(rows, "row"), known.most)
}

/// The field of a model's shape that is furthest above what is usual.
fn largest(facts: &Facts) -> String {
    let size = |size: Option<u64>, usual| size.unwrap_or(0) / usual;
    let sizes = [
        ("layers", size(facts.layers, 12)),
        ("width", size(facts.width, 768)),
        ("positions", size(facts.positions, 1024)),
    ];
    let (name, _) = sizes.into_iter().max_by_key(|(_, times)| *times).expect("there are three");
    format!("init.{name}")
}

/// How two vocabularies differ in a way that matters.
fn difference(first: &str, expected: &Vocabulary, second: &str, found: &Vocabulary) -> Option<String> {
    let sizes = expected.size.exact().zip(found.size.exact());
    match (&expected.meaning, &found.meaning) {
        (Some(a), Some(b)) if is_other_meaning(a, b) => {
            let files = expected.file.as_ref().zip(found.file.as_ref());
            let detail = files.and_then(|(a, b)| a.difference(b, first, second));
            Some(match (sizes, detail) {
                (_, Some(detail)) => detail,
                (Some((a, b)), None) if a != b => format!("`{first}` has {a} tokens and `{second}` has {b}"),
                (Some((a, _)), None) => format!("`{first}` has {a} tokens and `{second}` has {a} others"),
                (None, None) => "the same ids stand for other tokens".into(),
            })
        }
        _ => None,
    }
}

/// A count for people: `1.2 G`.
pub fn count(number: u64) -> String {
    const UNITS: [&str; 7] = ["", " k", " M", " G", " T", " P", " E"];
    let (mut value, mut unit) = (number as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }

    let digits = usize::from(unit > 0 && value < 10.0);
    format!("{value:.digits$}{}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(prompts: &[usize], texts: &[usize]) -> Facts {
        let rows = |lengths: &[usize]| Longest::of((0..).zip(lengths.iter().copied()));
        Facts { prompt: rows(prompts), text: rows(texts), ..Facts::default() }
    }

    fn model(positions: u64) -> Facts {
        Facts { positions: Some(positions), ..Facts::default() }
    }

    fn outlook(inputs: impl IntoIterator<Item = (&'static str, Facts)>) -> Outlook {
        let inputs = inputs.into_iter().map(|(port, facts)| (port.to_owned(), facts)).collect();
        Outlook::new(Machine::default(), inputs, None)
    }

    fn said(outlook: &Outlook) -> Vec<(bool, &str)> {
        outlook.findings.iter().map(|finding| (finding.is_error, finding.message.as_str())).collect()
    }

    #[test]
    fn a_row_fits_up_to_its_last_token_which_is_only_predicted() {
        for (length, fits) in [(9, true), (10, true), (11, false)] {
            let soft = Facts { vectors: Some(3), ..Facts::default() };
            let mut outlook = outlook([("data", data(&[4], &[length])), ("model", model(12)), ("prompt", soft)]);
            let rows = outlook.rows("data");
            outlook.reads("model", Some("prompt"), &rows);
            assert_eq!(outlook.findings.is_empty(), fits, "{length}: {:?}", said(&outlook));
            assert_eq!(outlook.rooms["data"], 10);
        }
    }

    #[test]
    fn what_is_not_known_is_never_an_error() {
        let unknown = || Facts::default();
        for soft in [None, Some(unknown())] {
            let inputs = [("data", data(&[90], &[99])), ("model", unknown())];
            let soft = soft.map(|facts| ("prompt", facts));
            let mut outlook = outlook(inputs.into_iter().chain(soft));
            let rows = outlook.rows("data");
            outlook.reads("model", Some("prompt"), &rows);
            outlook.same_vocabulary(&["data", "model"]);
            outlook.same_end("data", "model");
            outlook.same_width("model", "prompt");
            outlook.holds("model");
            assert_eq!(said(&outlook.finish()), []);
        }
    }

    #[test]
    fn writing_ends_at_the_room_of_the_readers_and_says_so() {
        let mut outlook = outlook([("model", model(100)), ("data", data(&[10, 30], &[20, 40]))]);
        outlook.room = Some(50);
        let rows = outlook.rows("data");
        assert_eq!(outlook.writes("model", None, &rows, 20), Longest::at_most(Some(50)));
        assert_eq!(said(&outlook), []);
        assert_eq!(outlook.writes("model", None, &rows, 21), Longest::at_most(Some(50)));
        assert!(
            matches!(said(&outlook)[..], [(false, text)] if text.contains("who reads them takes 50 tokens at most")),
            "{outlook:?}"
        );
    }

    #[test]
    fn only_what_no_machine_of_that_size_could_hold_is_refused() {
        let found = |parameters: u64, memory: u64| {
            let size = |least| Facts { parameters: Bounds { least, most: u64::MAX }, ..Facts::default() };
            let mut outlook = outlook([("teacher", size(parameters)), ("model", size(10))]);
            outlook.machine.memory = Some(memory);
            outlook.holds("teacher");
            outlook.trains("model", "data", Learner { is_new: true, ..Learner::default() });
            outlook.finish().findings.pop().map(|finding| (finding.is_error, finding.message))
        };
        assert_eq!(found(100, 1120), None);
        assert!(matches!(found(100, 560), Some((false, text)) if text.contains("this machine has 560 B")));
        assert!(matches!(found(100, 559), Some((true, text)) if text.starts_with("it needs 560 B of memory or more")));
        assert!(matches!(found(u64::MAX, 1 << 50), Some((true, _))));
    }

    #[test]
    fn the_longest_of_the_first_rows_is_theirs() {
        let longest = Longest::of([(7, 3), (8, 5), (9, 4), (10, 9)]);
        let tokens = |rows| longest.of_first(rows).peak().map(|peak| (peak.row, peak.tokens));
        assert_eq!([tokens(0), tokens(1), tokens(3), tokens(4)], [None, Some((7, 3)), Some((8, 5)), Some((10, 9))]);
        let sorted = Longest::of((0..1000).map(|row| (row, row as usize)));
        assert_eq!(sorted.peak().map(|peak| peak.tokens), Some(999));
        assert_eq!(serde_json::from_str::<Longest>(&serde_json::to_string(&sorted).unwrap()).unwrap(), sorted);
    }

    #[test]
    fn counts_are_short() {
        assert_eq!([count(7), count(1_234), count(1_200_000_000)], ["7", "1.2 k", "1.2 G"]);
    }
}
