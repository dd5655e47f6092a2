//! Parameters: `${params.NAME}` in any text of a stage, the only substitution.

use std::collections::BTreeSet;

use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, Problems, did_you_mean};
use crate::language::read;
use crate::language::yaml::{Map, Node, Value};

/// Puts the parameters of `tree` in where they are used, and gives the names of those that were.
///
/// A text that is one substitution becomes the parameter's value, of whatever type; within a longer text the parameter
/// must be a scalar. `$${` stands for `${`.
pub(crate) fn substitute(tree: &mut Node, problems: &mut Problems) -> BTreeSet<String> {
    let params = match tree.get("params") {
        Some(node) => read::mapping(node, "params", problems).cloned().unwrap_or_default(),
        None => Map::new(),
    };
    for (name, entry) in &params {
        read::check_name(name, &entry.key, problems);
        forbid(&entry.node, problems);
    }
    let mut substitution = Substitution { params, used: BTreeSet::new(), problems };
    for section in ["conventions", "stages", "report"] {
        if let Some(entry) = tree.map_mut().and_then(|map| map.get_mut(section)) {
            substitution.walk(&mut entry.node);
        }
    }
    substitution.used
}

/// Parameters do not use one another.
fn forbid(node: &Node, problems: &mut Problems) {
    match &node.value {
        Value::String(text) if text.contains("${") => {
            let diagnostic = Diagnostic::new("a parameter cannot use another one", "write the value out");
            problems.push(diagnostic.at(node.span.clone(), "used here"));
        }
        Value::List(items) => items.iter().for_each(|item| forbid(item, problems)),
        Value::Map(map) => map.values().for_each(|entry| forbid(&entry.node, problems)),
        _ => {}
    }
}

struct Substitution<'a> {
    params: Map,
    used: BTreeSet<String>,
    problems: &'a mut Problems,
}

impl Substitution<'_> {
    fn walk(&mut self, node: &mut Node) {
        match &mut node.value {
            Value::List(items) => items.iter_mut().for_each(|item| self.walk(item)),
            Value::Map(map) => map.values_mut().for_each(|entry| self.walk(&mut entry.node)),
            Value::String(text) if text.contains("${") => {
                let text = std::mem::take(text);
                if let Some((value, from)) = self.replace(&text, &node.span) {
                    node.value = value;
                    node.from = from;
                }
            }
            _ => {}
        }
    }

    /// The value of a text with substitutions, and where the last parameter in it is written.
    fn replace(&mut self, text: &str, span: &Span) -> Option<(Value, Option<Span>)> {
        if let Some(name) = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'))
            && !name.contains('}')
        {
            let node = self.look_up(name, span)?;
            return Some((moved(&node.value, span, &node.span), Some(node.span)));
        }
        let (mut result, mut rest, mut from) = (String::new(), text, None);
        while let Some(start) = rest.find("${") {
            if rest[..start].ends_with('$') {
                result += &rest[..start - 1];
                result += "${";
                rest = &rest[start + 2..];
                continue;
            }
            let Some(end) = rest[start..].find('}') else {
                let diagnostic = Diagnostic::new("a substitution does not end", "write `${params.NAME}`");
                self.problems.push(diagnostic.at(span.clone(), "`}` is missing"));
                return None;
            };
            let node = self.look_up(&rest[start + 2..start + end], span)?;
            result += &rest[..start];
            match &node.value {
                Value::String(text) => result += text,
                Value::Bool(_) | Value::Number(_) => result += &node.to_json().to_string(),
                _ => {
                    let message = format!("{} cannot stand inside of a text", node.describe());
                    let diagnostic = Diagnostic::new(message, "use the parameter alone: `\"${params.NAME}\"`");
                    self.problems.push(diagnostic.at(span.clone(), "used here").also(node.span, "the parameter"));
                    return None;
                }
            }
            from = Some(node.span);
            rest = &rest[start + end + 1..];
        }
        Some((Value::String(result + rest), from))
    }

    fn look_up(&mut self, name: &str, span: &Span) -> Option<Node> {
        let Some(name) = name.strip_prefix("params.") else {
            let message = format!("`${{{name}}}` is no parameter");
            let diagnostic = Diagnostic::new(message, "write `${params.NAME}`, or `$${` for the text `${`");
            self.problems.push(diagnostic.at(span.clone(), "only parameters are substituted"));
            return None;
        };
        match self.params.get(name) {
            Some(entry) => {
                self.used.insert(name.to_owned());
                Some(entry.node.clone())
            }
            None => {
                let hint = did_you_mean(name, "parameter", self.params.keys().map(String::as_str));
                let diagnostic = Diagnostic::new(format!("unknown parameter `{name}`"), hint);
                self.problems.push(diagnostic.at(span.clone(), "used here"));
                None
            }
        }
    }
}

/// A parameter's value as it stands at the place of use.
fn moved(value: &Value, span: &Span, from: &Span) -> Value {
    let node =
        |node: &Node| Node { value: moved(&node.value, span, from), span: span.clone(), from: Some(from.clone()) };
    match value {
        Value::List(items) => Value::List(items.iter().map(node).collect()),
        Value::Map(map) => Value::Map(
            map.iter()
                .map(|(key, entry)| {
                    (key.clone(), crate::language::yaml::Entry { key: entry.key.clone(), node: node(&entry.node) })
                })
                .collect(),
        ),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::source::Source;
    use crate::language::yaml::parse;
    use serde_json::json;

    fn substituted(text: &str) -> (Node, BTreeSet<String>, Problems) {
        let mut tree = parse(&Source::new("t.yaml", text)).unwrap();
        let mut problems = Problems::default();
        let used = substitute(&mut tree, &mut problems);
        (tree, used, problems)
    }

    #[test]
    fn a_whole_substitution_keeps_its_type_and_its_origin() {
        let text = "params: {seed: 10, list: [1, 2], text: \"10\"}\n\
                    stages: {a: \"${params.seed}\", b: \"${params.list}\", c: \"${params.text}\"}\n";
        let (tree, used, problems) = substituted(text);
        assert!(problems.0.is_empty());
        assert_eq!(tree.get("stages").unwrap().to_json(), json!({"a": 10, "b": [1, 2], "c": "10"}));
        assert_eq!(used.len(), 3);
        let node = tree.at(["stages", "a"]).unwrap();
        assert_eq!((node.span.place().line, node.origin().place().line), (2, 1));
    }

    #[test]
    fn a_substitution_inside_a_text_gives_text() {
        let text =
            "params: {n: 7, name: x}\nstages: {a: \"p-${params.n}-${params.name}\", b: \"$${HOME} ${params.n}\"}\n";
        let (tree, _, problems) = substituted(text);
        assert!(problems.0.is_empty());
        assert_eq!(tree.get("stages").unwrap().to_json(), json!({"a": "p-7-x", "b": "${HOME} 7"}));
    }

    #[test]
    fn what_is_no_parameter_is_an_error() {
        for (text, hint) in [
            ("params: {seed: 1}\nstages: {a: \"${params.sed}\"}", "did you mean `seed`?"),
            ("stages: {a: \"${HOME}\"}", "write `${params.NAME}`, or `$${` for the text `${`"),
            ("stages: {a: \"x${params.n\"}", "write `${params.NAME}`"),
            ("params: {l: [1]}\nstages: {a: \"x${params.l}\"}", "use the parameter alone: `\"${params.NAME}\"`"),
            ("params: {l: 1, m: \"${params.l}\"}\nstages: {a: 1}", "write the value out"),
        ] {
            let (_, _, problems) = substituted(text);
            assert_eq!(problems.0.iter().map(|d| d.hint.as_str()).collect::<Vec<_>>(), [hint], "{text}");
        }
    }
}
