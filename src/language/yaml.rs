//! YAML text into a tree of values that know where they are written.
//!
//! Every value and every key keeps its span, so that a message about a setting can point at it, however late it is found
//! wrong. This module knows YAML and nothing of pipelines; limits on size, depth and aliases stop texts that would grow
//! without bound.

use std::fmt;
use std::sync::Arc;

use indexmap::IndexMap;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Number, Value as Json};
use serde_saphyr::{DuplicateKeyPolicy, Location, Options, Spanned, UserMessageFormatter};

use crate::ground::source::{Source, Span};
use crate::language::diagnostic::Diagnostic;

/// A value and where it is written.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// What it is.
    pub value: Value,
    /// Where it is used.
    pub span: Span,
    /// Where it comes from, when a substitution put it here.
    pub from: Option<Span>,
}

/// What a value is.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// Nothing, `null` or `~`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(Number),
    /// Text.
    String(String),
    /// A list.
    List(Vec<Node>),
    /// A mapping, in file order.
    Map(Map),
}

/// A mapping, in file order.
pub(crate) type Map = IndexMap<String, Entry>;

/// A value of a mapping and where its key is written.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Where the key is.
    pub key: Span,
    /// The value.
    pub node: Node,
}

impl Node {
    /// A mapping without entries.
    pub(crate) fn empty_map(span: Span) -> Self {
        Node { value: Value::Map(Map::new()), span, from: None }
    }

    /// The mapping, if it is one.
    pub(crate) fn map(&self) -> Option<&Map> {
        if let Value::Map(map) = &self.value { Some(map) } else { None }
    }

    /// The mapping, if it is one.
    pub(crate) fn map_mut(&mut self) -> Option<&mut Map> {
        if let Value::Map(map) = &mut self.value { Some(map) } else { None }
    }

    /// The text, if it is one.
    pub(crate) fn text(&self) -> Option<&str> {
        if let Value::String(text) = &self.value { Some(text) } else { None }
    }

    /// The entry of that key, if this is a mapping that has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.map()?.get(key).map(|entry| &entry.node)
    }

    /// The value at the end of a path of keys.
    pub(crate) fn at<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> Option<&Node> {
        keys.into_iter().try_fold(self, |node, key| node.get(key))
    }

    /// Where the value was decided: the parameter behind a substitution, otherwise where it stands.
    pub(crate) fn origin(&self) -> &Span {
        self.from.as_ref().unwrap_or(&self.span)
    }

    /// Adds the texts that it is from to those that are known.
    pub(crate) fn collect_sources(&self, known: &mut Vec<Arc<Source>>) {
        for span in [&self.span].into_iter().chain(&self.from) {
            if !known.iter().any(|source| Arc::ptr_eq(source, &span.source)) {
                known.push(span.source.clone());
            }
        }
        match &self.value {
            Value::List(items) => items.iter().for_each(|item| item.collect_sources(known)),
            Value::Map(map) => map.values().for_each(|entry| entry.node.collect_sources(known)),
            _ => {}
        }
    }

    /// The value without places.
    pub(crate) fn to_json(&self) -> Json {
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Number(n) => Json::Number(n.clone()),
            Value::String(s) => Json::String(s.clone()),
            Value::List(items) => Json::Array(items.iter().map(Node::to_json).collect()),
            Value::Map(map) => Json::Object(map.iter().map(|(k, e)| (k.clone(), e.node.to_json())).collect()),
        }
    }

    /// The value in words, for messages: `the text `fast``, `a mapping`.
    pub(crate) fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Bool(b) => format!("`{b}`"),
            Value::Number(n) => {
                let Span { source, start, end } = self.origin();
                let written = &source.text[*start..*end];
                let is_same = written.parse().is_ok_and(|value: f64| Some(value) == n.as_f64());
                if is_same { format!("`{written}`") } else { format!("`{n}`") }
            }
            Value::String(s) => format!("the text `{s}`"),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }
}

/// Reads one document. An empty text is an empty mapping.
pub(crate) fn parse(source: &Arc<Source>) -> Result<Node, Diagnostic> {
    parse_from(source, 0)
}

/// Reads the document that begins at byte `start` of a source: the value of `--set path=value`.
pub(crate) fn parse_from(source: &Arc<Source>, start: usize) -> Result<Node, Diagnostic> {
    let text = &source.text[start..];
    let built = Builder { source, start };
    match serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options(DuplicateKeyPolicy::Error)) {
        Ok(raw) => Ok(built.node(raw)),
        Err(error) => Err(built.explain(&error)),
    }
}

/// YAML 1.2 scalars, and limits far above any pipeline but far below what would hurt.
fn options(duplicate_keys: DuplicateKeyPolicy) -> Options {
    serde_saphyr::options! {
        duplicate_keys: duplicate_keys,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
        budget: serde_saphyr::budget! { max_depth: 40, max_nodes: 1_000_000, max_aliases: 2_000, max_anchors: 1_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 50_000, max_replay_stack_depth: 16 },
    }
}

/// A value as the parser gives it, before it knows its source.
enum Raw {
    Scalar(Value),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Number(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Number(value.into())))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Raw, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("the number is not finite"))?;
        Ok(Raw::Scalar(Value::Number(number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::String(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Raw, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Raw::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Raw, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Raw::Map(map))
    }
}

/// Gives raw values their spans in a source.
struct Builder<'a> {
    source: &'a Arc<Source>,
    start: usize,
}

impl Builder<'_> {
    fn node(&self, raw: Spanned<Raw>) -> Node {
        let value = match raw.value {
            Raw::Scalar(value) => value,
            Raw::List(items) => Value::List(items.into_iter().map(|item| self.node(item)).collect()),
            Raw::Map(entries) => Value::Map(
                entries
                    .into_iter()
                    .map(|(key, node)| (key.value, Entry { key: self.span(key.defined, true), node: self.node(node) }))
                    .collect(),
            ),
        };
        let scalar = !matches!(value, Value::List(_) | Value::Map(_));
        Node { value, span: self.span(raw.defined, scalar), from: None }
    }

    /// Of lists and mappings only the first character: their end says nothing.
    fn span(&self, location: Location, scalar: bool) -> Span {
        let text = &self.source.text;
        let start = match location.span().byte_offset() {
            Some(offset) => self.start + offset as usize,
            None => self.offset_of(location),
        };
        let start = floor(text, start.min(text.len()));
        let end = if scalar { start + location.span().byte_len().unwrap_or(0) as usize } else { start };
        let end = floor(text, end.min(text.len()));
        // A plain scalar may carry the blanks before the next token.
        let end = start + text[start..end].trim_end().len();
        Span { source: self.source.clone(), start, end }
    }

    /// Errors of syntax say line and column only.
    fn offset_of(&self, location: Location) -> usize {
        let text = &self.source.text[self.start..];
        let lines = (location.line() as usize).saturating_sub(1);
        let line_start = text.split_inclusive('\n').take(lines).map(str::len).sum::<usize>();
        let columns = (location.column() as usize).saturating_sub(1);
        let column = text[line_start..].chars().take(columns).map(char::len_utf8).sum::<usize>();
        self.start + line_start + column
    }

    fn explain(&self, error: &serde_saphyr::Error) -> Diagnostic {
        use serde_saphyr::Error;
        let mut error = error.without_snippet();
        let at = self.span(error.location().unwrap_or(Location::UNKNOWN), true);
        while let Error::AliasError { error: inner, .. } = error {
            error = inner;
        }
        match error {
            Error::DuplicateMappingKey { key, .. } => {
                let key = key.as_deref().unwrap_or("?");
                let found = Diagnostic::new(
                    format!("key `{key}` stands twice in one mapping"),
                    "remove or rename one of the two",
                )
                .at(at.clone(), "here again");
                match self.first_key(key, at.start) {
                    Some(first) => found.also(first, "first here"),
                    None => found,
                }
            }
            Error::Budget { .. }
            | Error::AliasReplayCounterOverflow { .. }
            | Error::AliasReplayLimitExceeded { .. }
            | Error::AliasExpansionLimitExceeded { .. }
            | Error::AliasReplayStackDepthExceeded { .. } => Diagnostic::new(
                "the text grows too large or too deep",
                "write the values out, or split the file with `include:`",
            )
            .at(at, "too much from here on"),
            Error::NonFiniteFloat { .. } => {
                Diagnostic::new("a number is not finite", "give a number that is, or quote it if it is a text")
                    .at(at, "here")
            }
            Error::MultipleDocuments { .. } => {
                Diagnostic::new("the text holds several documents", "keep one: what follows `---` is another")
                    .at(at, "the second begins here")
            }
            Error::UnknownAnchor { .. } => Diagnostic::new(
                "an alias has no anchor",
                "write `&NAME` at the value that `*NAME` stands for, above it",
            )
            .at(at, "stands for nothing"),
            Error::UnsupportedTag { .. } => Diagnostic::new(
                "tags mean nothing in a pipeline",
                "leave the tag out; a text is quoted, a number is not",
            )
            .at(at, "a tag"),
            _ => Diagnostic::new(
                format!("not valid YAML: {}", plain(error)),
                "check indentation, quotes and brackets around this place",
            )
            .at(at, "the reader stopped here"),
        }
    }

    /// The earlier key of the mapping in which `key` stands again at byte `duplicate`: the one whose first occurrence is
    /// before that place and whose last is not.
    fn first_key(&self, key: &str, duplicate: usize) -> Option<Span> {
        let keys = |policy| {
            let text = &self.source.text[self.start..];
            let raw: Spanned<Raw> = serde_saphyr::from_str_with_options(text, options(policy)).ok()?;
            let mut found = Vec::new();
            find_keys(&self.node(raw), key, String::new(), &mut found);
            Some(found)
        };
        let last = keys(DuplicateKeyPolicy::LastWins)?;
        let again = |path: &str| last.iter().any(|(other, span)| other == path && span.start >= duplicate);
        let first = keys(DuplicateKeyPolicy::FirstWins)?.into_iter();
        first.filter(|(path, span)| span.start < duplicate && again(path)).map(|(_, span)| span).last()
    }
}

/// Every mapping below `node` that has `key`, by its path, and where the key is.
fn find_keys(node: &Node, key: &str, path: String, found: &mut Vec<(String, Span)>) {
    match &node.value {
        Value::Map(map) => {
            if let Some(entry) = map.get(key) {
                found.push((path.clone(), entry.key.clone()));
            }
            for (name, entry) in map {
                find_keys(&entry.node, key, format!("{path}/{name}"), found);
            }
        }
        Value::List(items) => {
            for (i, item) in items.iter().enumerate() {
                find_keys(item, key, format!("{path}/{i}"), found);
            }
        }
        _ => {}
    }
}

/// The parser's message on one line, without the place, which is shown beside it.
fn plain(error: &serde_saphyr::Error) -> String {
    let text = error.render_with_formatter(&UserMessageFormatter);
    let text = text.split(" at line ").next().unwrap_or(&text);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.trim_end_matches('.').to_owned()
}

/// The nearest character boundary at or before `index`.
fn floor(text: &str, mut index: usize) -> usize {
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::source::Place;

    fn read(text: &str) -> Node {
        parse(&Source::new("test.yaml", text)).unwrap_or_else(|error| panic!("{}", error.message))
    }

    fn spanned(node: &Node) -> &str {
        &node.span.source.text[node.span.start..node.span.end]
    }

    #[test]
    fn scalars_follow_yaml_1_2() {
        let node = read("a: 2e-3\nb: yes\nc: '3'\nd: 0x10\ne: ~\nf: true\ng: -4\nh: 1.0\n");
        assert_eq!(
            node.to_json(),
            serde_json::json!({"a": 0.002, "b": "yes", "c": "3", "d": 16, "e": null, "f": true, "g": -4, "h": 1.0})
        );
        assert!(node.get("h").unwrap().to_json().is_f64());
    }

    #[test]
    fn values_and_keys_know_their_place() {
        let node = read("first: 1\nouter:\n  ärger: {deep: [x, \"${params.y}\"]}\n");
        let outer = node.map().unwrap()["outer"].node.map().unwrap();
        assert_eq!(outer["ärger"].key.place(), Place { file: "test.yaml".into(), line: 3, column: 3 });
        let Value::List(items) = &node.at(["outer", "ärger", "deep"]).unwrap().value else { panic!("not a list") };
        assert_eq!(items[1].span.place().column, 21);
        assert_eq!(spanned(&items[1]), "\"${params.y}\"");
        assert_eq!(spanned(&items[0]), "x");
    }

    #[test]
    fn a_part_of_an_argument_keeps_its_offset() {
        let node = parse_from(&Source::new("--set", "train.learn.rate=2e-3"), 17).unwrap();
        assert_eq!((node.span.start, node.to_json()), (17, serde_json::json!(0.002)));
    }

    #[test]
    fn aliases_point_at_their_definition() {
        let node = read("a: &shared {x: 1}\nb: *shared\n");
        assert_eq!(node.at(["b", "x"]).unwrap().span.place().line, 1);
    }

    #[test]
    fn a_duplicate_key_shows_both_places() {
        let error = parse(&Source::new("t", "x: {a: 1}\ny:\n  a: 1\n  b: {a: 2}\n  a: 3\n")).unwrap_err();
        assert_eq!(error.labels[0].span.place().line, 5);
        assert_eq!(error.labels[1].span.place().line, 3);
    }

    #[test]
    fn a_bomb_of_aliases_is_stopped() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..9 {
            let row = vec![format!("*a{}", i - 1); 10].join(", ");
            text += &format!("a{i}: &a{i} [{row}]\n");
        }
        assert!(parse(&Source::new("bomb", text)).unwrap_err().message.contains("too large"));
    }

    #[test]
    fn what_is_wrong_but_well_formed_is_not_called_a_matter_of_brackets() {
        let cases = [
            ("a: .nan", "not finite"),
            ("a: 1e999", "not finite"),
            ("a: 1\n---\nb: 2\n", "several documents"),
            ("a: *none", "no anchor"),
            ("a: !mine 3", "tags mean nothing"),
            ("a: !mine {b: 1}", "tags mean nothing"),
            ("a: !mine [1]", "tags mean nothing"),
        ];
        for (text, said) in cases {
            let error = parse(&Source::new("t", text)).unwrap_err();
            assert!(error.message.contains(said) && !error.hint.contains("brackets"), "{text}: {}", error.message);
        }
        assert_eq!(read("a: !!str 3").to_json(), serde_json::json!({"a": "3"}));
    }

    #[test]
    fn deep_nesting_is_stopped() {
        let text = "[".repeat(100) + &"]".repeat(100);
        assert!(parse(&Source::new("deep", text)).is_err());
    }
}
