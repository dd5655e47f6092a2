//! Small readers over the tree: each gives a value or says what is wrong with it.

use std::ops::RangeInclusive;

use contract::limits;

use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, Problems, did_you_mean, quoted};
use crate::language::edit::{Removed, removal};
use crate::language::yaml::{Entry, Map, Node, Value};

/// Names that paths give a meaning.
const RESERVED: [&str; 11] =
    ["windows", "carry", "next", "keep", "in", "with", "params", "conventions", "base", "loop", "stages"];

/// Text and where it is written.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    pub(crate) value: String,
    pub(crate) span: Span,
}

/// The entries of a mapping; nothing at all counts as an empty one.
pub(crate) fn mapping<'a>(node: &'a Node, what: &str, problems: &mut Problems) -> Option<&'a Map> {
    static EMPTY: std::sync::LazyLock<Map> = std::sync::LazyLock::new(Map::new);
    match &node.value {
        Value::Map(map) => Some(map),
        Value::Null => Some(&EMPTY),
        _ => {
            problems.push(wrong_type(node, what, "a mapping"));
            None
        }
    }
}

/// The items of a list.
pub(crate) fn list<'a>(node: &'a Node, what: &str, problems: &mut Problems) -> Option<&'a [Node]> {
    match &node.value {
        Value::List(items) => Some(items),
        _ => {
            problems.push(wrong_type(node, what, "a list"));
            None
        }
    }
}

/// Text.
pub(crate) fn text(node: &Node, what: &str, problems: &mut Problems) -> Option<Text> {
    match &node.value {
        Value::String(value) => Some(Text { value: value.clone(), span: node.span.clone() }),
        _ => {
            problems.push(wrong_type(node, what, "text"));
            None
        }
    }
}

/// A list of texts; one text alone counts as a list of it.
pub(crate) fn texts(node: &Node, what: &str, problems: &mut Problems) -> Vec<Text> {
    match &node.value {
        Value::String(_) => text(node, what, problems).into_iter().collect(),
        Value::List(items) => items.iter().filter_map(|item| text(item, what, problems)).collect(),
        _ => {
            problems.push(wrong_type(node, what, "a list of texts"));
            Vec::new()
        }
    }
}

/// An entry that says something: an empty value, which a parameter may bring, counts as left out.
pub(crate) fn given<'a>(map: &'a Map, key: &str) -> Option<&'a Entry> {
    map.get(key).filter(|entry| !matches!(entry.node.value, Value::Null))
}

/// The whole numbers that a field of a loop, of a window or of `every` may be.
pub(crate) fn limits_of(field: &str) -> RangeInclusive<u64> {
    match field {
        "rows" | "take" => 1..=limits::ROWS,
        "epochs" | "rounds" | "every" => 1..=limits::UPDATES,
        _ => 0..=limits::SEED,
    }
}

/// A whole number within the limits of `field`.
pub(crate) fn whole(node: &Node, field: &str, problems: &mut Problems) -> Option<u64> {
    let number = if let Value::Number(number) = &node.value { number.as_u64() } else { None };
    let (least, most) = limits_of(field).into_inner();
    let within = number.filter(|number| (least..=most).contains(number));
    if within.is_none() {
        let range =
            if most == limits::SEED { format!("of {least} or more") } else { format!("from {least} to {most}") };
        problems.push(wrong_type(node, field, &format!("a whole number {range}")));
    }
    within
}

/// `true` or `false`.
pub(crate) fn boolean(node: &Node, what: &str, problems: &mut Problems) -> Option<bool> {
    match node.value {
        Value::Bool(value) => Some(value),
        _ => {
            problems.push(wrong_type(node, what, "`true` or `false`"));
            None
        }
    }
}

/// One of several words.
pub(crate) fn choice<T: Copy>(node: &Node, what: &str, choices: &[(&str, T)], problems: &mut Problems) -> Option<T> {
    let given = node.text();
    let found = choices.iter().find(|(name, _)| given == Some(name)).map(|(_, value)| *value);
    if found.is_none() {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let message = format!("`{what}` must be one of {}, got {}", quoted(&names), node.describe());
        let hint = did_you_mean(given.unwrap_or_default(), "value", names);
        problems.push(with_origin(Diagnostic::new(message, hint).at(node.span.clone(), "not one of them"), node));
    }
    found
}

/// Says that a value is of the wrong type.
pub(crate) fn wrong_type(node: &Node, what: &str, expected: &str) -> Diagnostic {
    let message = format!("`{what}` must be {expected}, got {}", node.describe());
    with_origin(Diagnostic::new(message, format!("give {expected}")).at(node.span.clone(), "wrong value"), node)
}

/// Shows the parameter behind a substituted value.
pub(crate) fn with_origin(diagnostic: Diagnostic, node: &Node) -> Diagnostic {
    match &node.from {
        Some(from) => diagnostic.also(from.clone(), "the value comes from here"),
        None => diagnostic,
    }
}

/// Reports every key that is not in `known`.
pub(crate) fn check_keys(map: &Map, what: &str, known: &[&str], problems: &mut Problems) {
    for (key, entry) in map {
        if !known.contains(&key.as_str()) {
            let hint = did_you_mean(key, "key", known.iter().copied());
            let message = format!("unknown key `{key}` in {what}");
            problems.push(Diagnostic::new(message, hint).at(entry.key.clone(), "not known here"));
        }
    }
}

/// Reports a name that cannot be used.
pub(crate) fn check_name(name: &str, span: &Span, problems: &mut Problems) {
    // On the command line, what begins with `-` is a flag.
    let plain = !name.is_empty()
        && !name.starts_with('-')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if !plain {
        let message = format!("`{name}` cannot be a name");
        problems.push(
            Diagnostic::new(message, "use letters, digits, `_` and, but for the first, `-`")
                .at(span.clone(), "not a name"),
        );
    } else if RESERVED.contains(&name) {
        let message = format!("`{name}` is a reserved name");
        problems
            .push(Diagnostic::new(message, "choose another name").at(span.clone(), "means something else in paths"));
    }
}

/// A name that stands for nothing: says who removed it, or what it was likely meant to be.
pub(crate) fn unknown<'a>(
    what: &str,
    name: &str,
    span: &Span,
    candidates: impl IntoIterator<Item = &'a str>,
    removed: &[Removed],
    keys: &[&str],
) -> Diagnostic {
    match removal(removed, keys) {
        Some(removal) => Diagnostic::new(
            format!("{} removes {what} `{name}`, which is still used", removal.owner),
            "remove or rebind what uses it in the same place",
        )
        .at(span.clone(), "used here")
        .also(removal.span.clone(), "removed here"),
        None => Diagnostic::new(format!("unknown {what} `{name}`"), did_you_mean(name, what, candidates))
            .at(span.clone(), "not found"),
    }
}
