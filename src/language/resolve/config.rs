//! Checks the `with` of a stage against its kind: every error at once, each at the place where it is written.

use std::collections::BTreeMap;

use contract::{ConfigError, Conventions};
use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::{JsonType, ValidationError};
use serde_json::Value as Json;

use crate::graph::Operator;
use crate::ground::source::Place;
use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, Problems, did_you_mean, quoted};
use crate::language::kinds::{KindInfo, Kinds, WINDOW_FIELDS};
use crate::language::read::{Text, with_origin};
use crate::language::spec::OperatorSpec;
use crate::language::yaml::{Node, Value};

/// Looks the kind of a stage up.
pub(super) fn kind<'k, 'r>(
    spec: &OperatorSpec,
    kinds: &'k Kinds<'r>,
    problems: &mut Problems,
) -> Option<&'k KindInfo<'r>> {
    let Text { value: name, span } = spec.kind.as_ref()?;
    let info = kinds.get(name);
    if info.is_none() {
        let hint = did_you_mean(name, "kind", kinds.names());
        let diagnostic = Diagnostic::new(format!("unknown kind `{name}`"), hint);
        problems.push(diagnostic.at(span.clone(), "no such kind"));
    }
    info
}

/// A stage's operator: its `with` checked and filled in, its ports under it.
///
/// `aside` are fields of `with` that are not the stage's own: those of the window where a training kind is used alone.
pub(super) fn operator(
    spec: &OperatorSpec,
    info: &KindInfo,
    aside: &[&str],
    conventions: Conventions,
    problems: &mut Problems,
) -> Option<Operator> {
    let mut with = spec.with.clone();
    if let Some(map) = with.map_mut() {
        map.retain(|key, _| !aside.contains(&key.as_str()));
    }
    let config = with.to_json();
    let check = Check { info, with: &with, stage: &spec.span };
    let mut errors: Vec<Diagnostic> =
        info.validator().iter_errors(&config).flat_map(|error| check.explain(&error)).collect();
    check.find_fractions(&mut Vec::new(), &with, &mut errors);
    if !errors.is_empty() {
        errors.into_iter().for_each(|error| problems.push(error));
        return None;
    }
    match info.kind.resolve(&config, conventions) {
        Ok(config) => {
            let ports = info.kind.ports(&config);
            let mut places = BTreeMap::new();
            collect_places(&spec.with, "", &mut places);
            Some(Operator { kind: info.kind.about().name.to_owned(), config, ports, places })
        }
        Err(errors) => {
            errors.iter().for_each(|error| problems.push(check.disagreement(error)));
            None
        }
    }
}

/// Where each value of `with` was decided, by path with dots.
fn collect_places(node: &Node, path: &str, places: &mut BTreeMap<String, Place>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match &node.value {
        Value::Map(map) => map.iter().for_each(|(key, entry)| collect_places(&entry.node, &below(key), places)),
        value => {
            places.insert(path.to_owned(), node.origin().place());
            if let Value::List(items) = value {
                for (i, item) in items.iter().enumerate().filter(|(_, item)| item.map().is_some()) {
                    collect_places(item, &below(&i.to_string()), places);
                }
            }
        }
    }
}

struct Check<'a> {
    info: &'a KindInfo<'a>,
    with: &'a Node,
    /// The name of the stage, for what is not there.
    stage: &'a Span,
}

impl Check<'_> {
    /// A violation of the schema in the words of the language. One may hold several faults.
    fn explain(&self, error: &ValidationError) -> Vec<Diagnostic> {
        let path = path_of(error);
        let kind = self.info.kind.about().name;
        match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected } => {
                unexpected.iter().map(|field| self.unknown_field(&path, field)).collect()
            }
            ValidationErrorKind::Required { property } => {
                let field = dotted(&joined(&path, property.as_str().unwrap_or_default()));
                let diagnostic = Diagnostic::new(
                    format!("kind `{kind}` needs `{field}`"),
                    format!("write `{field}: ...` under `with:`"),
                );
                vec![diagnostic.at(self.key(&path), format!("`{field}` is missing"))]
            }
            ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
                self.alternatives(&path, context)
            }
            ValidationErrorKind::Type { kind } => vec![self.wrong_type(&path, &type_names(kind))],
            ValidationErrorKind::Enum { .. } | ValidationErrorKind::Constant { .. } => vec![self.wrong_choice(&path)],
            ValidationErrorKind::Minimum { .. }
            | ValidationErrorKind::Maximum { .. }
            | ValidationErrorKind::ExclusiveMinimum { .. }
            | ValidationErrorKind::ExclusiveMaximum { .. } => vec![self.out_of_range(&path)],
            _ => {
                let text = error.to_string().replace('"', "`");
                vec![self.wrong(&path, format!("`{}`: {text}", dotted(&path)), "give a value within the limit")]
            }
        }
    }

    fn out_of_range(&self, path: &[String]) -> Diagnostic {
        let range = self.info.schema().range(path).unwrap_or_default();
        let (node, _) = self.node(path);
        let message = format!("`{}` must be {range}, got {}", dotted(path), node.describe());
        self.wrong(path, message, &format!("give a number that is {range}"))
    }

    /// To JSON `1.0` is a whole number; to the types of the stages it is not.
    fn find_fractions(&self, path: &mut Vec<String>, node: &Node, errors: &mut Vec<Diagnostic>) {
        let mut below = |step: String, inner: &Node| {
            path.push(step);
            self.find_fractions(path, inner, errors);
            path.pop();
        };
        match &node.value {
            Value::Map(map) => map.iter().for_each(|(key, entry)| below(key.clone(), &entry.node)),
            Value::List(items) => items.iter().enumerate().for_each(|(at, item)| below(at.to_string(), item)),
            Value::Number(number) if number.is_f64() && self.info.schema().is_whole(path) => {
                let value = number.as_f64().unwrap_or_default();
                if value.fract() == 0.0 && value.abs() < 1e15 {
                    let message = format!("`{}` must be a whole number, got {}", dotted(path), node.describe());
                    errors.push(self.wrong(path, message, &format!("write `{value}`")));
                }
            }
            _ => {}
        }
    }

    /// What is wrong with a choice that has settings of its own, or should have.
    fn wrong_form(&self, path: &[String]) -> Option<Diagnostic> {
        let forms = self.info.schema().forms(path);
        let (node, _) = self.node(path);
        let field = dotted(path);
        let known = |name: &str| forms.iter().find(|(form, _)| form == name);
        match &node.value {
            Value::String(text) => {
                let form = known(text)?;
                let message = format!("`{field}`: `{text}` has settings of its own");
                Some(self.wrong(path, message, &format!("write `{field}: {}`", written(form))))
            }
            Value::Map(map) if !forms.is_empty() => {
                let mut names = map.keys();
                let (first, second) = (names.next(), names.next());
                match (first, second) {
                    (Some(first), None) if known(first).is_some() => None,
                    (Some(first), None) => {
                        let all = forms.iter().map(|(name, _)| name.as_str());
                        let hint = did_you_mean(first, "choice", all);
                        Some(self.wrong(&joined(path, first), format!("`{field}` has no choice `{first}`"), &hint))
                    }
                    (None, _) => Some(self.wrong_choice(path)),
                    (Some(first), Some(second)) => {
                        let message = format!("`{field}` is one choice, and `{first}` and `{second}` are several");
                        Some(self.wrong(path, message, "keep one of them"))
                    }
                }
            }
            _ => None,
        }
    }

    /// What is wrong with the alternative that was most likely meant; if none was, what the alternatives are.
    fn alternatives(&self, path: &[String], context: &[Vec<ValidationError>]) -> Vec<Diagnostic> {
        if let Some(form) = self.wrong_form(path) {
            return vec![form];
        }
        let has_forms = !self.info.schema().forms(path).is_empty();
        let other_shape = |error: &ValidationError| match error.kind() {
            // Another of the choices that have settings of their own.
            ValidationErrorKind::AdditionalProperties { .. } | ValidationErrorKind::Required { .. } => {
                has_forms && path_of(error).len() == path.len()
            }
            ValidationErrorKind::Type { .. } => path_of(error).len() == path.len(),
            ValidationErrorKind::Constant { .. } => true,
            ValidationErrorKind::Enum { .. } => path_of(error).len() == path.len(),
            ValidationErrorKind::OneOfNotValid { .. } | ValidationErrorKind::AnyOf { .. } => {
                path_of(error).len() == path.len() && !self.info.schema().choices(path).is_empty()
            }
            _ => false,
        };
        if let Some(meant) = context.iter().find(|errors| !errors.iter().any(other_shape)) {
            return meant.iter().flat_map(|error| self.explain(error)).collect();
        }
        let all = || context.iter().flatten();
        let is_constant = |error: &&ValidationError| matches!(error.kind(), ValidationErrorKind::Constant { .. });
        if let Some(tag) = all().filter(is_constant).map(path_of).find(|tag| tag.len() > path.len()) {
            return vec![self.wrong_choice(&tag)];
        }
        if !self.info.schema().choices(path).is_empty() {
            return vec![self.wrong_choice(path)];
        }
        let types = all().filter_map(|error| match error.kind() {
            ValidationErrorKind::Type { kind } if path_of(error).len() == path.len() => Some(type_names(kind)),
            _ => None,
        });
        let mut types: Vec<String> = types.flatten().collect();
        types.dedup();
        vec![self.wrong_type(path, &types)]
    }

    fn unknown_field(&self, path: &[String], field: &str) -> Diagnostic {
        let kind = self.info.kind.about().name;
        let full = joined(path, field);
        let on_window = path.is_empty() && self.info.alone.is_some() && WINDOW_FIELDS.contains(&field);
        let hint = if on_window {
            "in a loop, rows are taken by its windows: write it on an entry of `windows`".to_owned()
        } else {
            let known = self.info.schema().fields(path).names;
            let extra = if path.is_empty() && self.info.alone.is_some() { &WINDOW_FIELDS[..] } else { &[] };
            did_you_mean(field, "field", known.iter().map(String::as_str).chain(extra.iter().copied()))
        };
        Diagnostic::new(format!("unknown field `{}` of kind `{kind}`", dotted(&full)), hint)
            .at(self.key(&full), "not a field")
    }

    fn wrong_choice(&self, path: &[String]) -> Diagnostic {
        let mut choices = self.info.schema().choices(path);
        let (node, _) = self.node(path);
        let given = node.text().unwrap_or_default();
        choices.extend(self.info.schema().forms(path).iter().map(written));
        let hint = did_you_mean(given, "value", choices.iter().map(String::as_str));
        let message = format!("`{}` must be one of {}, got {}", dotted(path), quoted(&choices), node.describe());
        self.wrong(path, message, &hint)
    }

    fn wrong_type(&self, path: &[String], types: &[String]) -> Diagnostic {
        let (node, _) = self.node(path);
        let mut expected: Vec<&str> = types.iter().map(|name| in_words(name)).collect();
        // Nothing at all is an answer, but never the one to suggest.
        if expected.len() > 1 {
            expected.retain(|word| *word != "nothing");
        }
        let expected = expected.join(" or ");
        let quoted = node.text().is_some_and(|text| text.parse::<f64>().is_ok() && expected.contains("number"));
        let hint = if quoted { "take the quotes away".to_owned() } else { format!("give {expected}") };
        self.wrong(path, format!("`{}` must be {expected}, got {}", dotted(path), node.describe()), &hint)
    }

    /// Fields that disagree, as the kind itself says it.
    fn disagreement(&self, error: &ConfigError) -> Diagnostic {
        let message = match dotted(&error.path) {
            field if field.is_empty() => error.message.clone(),
            field => format!("`{field}`: {}", error.message),
        };
        let kind = self.info.kind.about().name;
        let hint = error.hint.clone().unwrap_or_else(|| format!("`pipeline stages {kind}` lists its fields"));
        self.wrong(&error.path, message, &hint)
    }

    fn wrong(&self, path: &[String], message: String, hint: &str) -> Diagnostic {
        let (node, whole) = self.node(path);
        let is_scalar = !matches!(node.value, Value::Map(_) | Value::List(_));
        let span = if whole && is_scalar { node.span.clone() } else { self.key(path) };
        with_origin(Diagnostic::new(message, hint).at(span, format!("in kind `{}`", self.info.kind.about().name)), node)
    }

    /// The value at a path or, where it is not written, the nearest one around it.
    fn node(&self, path: &[String]) -> (&Node, bool) {
        let mut node = self.with;
        for step in path {
            let next = match &node.value {
                Value::List(items) => step.parse().ok().and_then(|i: usize| items.get(i)),
                _ => node.get(step),
            };
            let Some(next) = next else { return (node, false) };
            node = next;
        }
        (node, true)
    }

    /// The key that leads to a path, or the nearest one that is written.
    fn key(&self, path: &[String]) -> Span {
        for length in (0..path.len()).rev() {
            let (outer, whole) = self.node(&path[..length]);
            if let Some(entry) = outer.map().and_then(|map| map.get(&path[length])).filter(|_| whole) {
                return entry.key.clone();
            }
        }
        self.stage.clone()
    }
}

fn path_of(error: &ValidationError) -> Vec<String> {
    let pointer = error.instance_path().as_str();
    pointer.split('/').skip(1).map(|part| part.replace("~1", "/").replace("~0", "~")).collect()
}

fn joined(path: &[String], field: &str) -> Vec<String> {
    path.iter().cloned().chain([field.to_owned()]).collect()
}

fn dotted(path: &[String]) -> String {
    path.join(".")
}

/// How a choice with settings is written.
fn written((name, fields): &(String, Vec<String>)) -> String {
    let fields: Vec<String> = fields.iter().map(|field| format!("{field}: ...")).collect();
    format!("{{{name}: {{{}}}}}", fields.join(", "))
}

fn type_names(kind: &TypeKind) -> Vec<String> {
    match kind {
        TypeKind::Single(one) => vec![one.to_string()],
        TypeKind::Multiple(set) => set.iter().map(|one: JsonType| one.to_string()).collect(),
    }
}

fn in_words(json_type: &str) -> &str {
    match json_type {
        "null" => "nothing",
        "boolean" => "`true` or `false`",
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "text",
        "array" => "a list",
        "object" => "a mapping",
        other => other,
    }
}

/// The resolved configuration of a stage that the program itself adds.
pub(super) fn built_in(info: &KindInfo, config: &Json, conventions: Conventions) -> Result<Operator, Vec<ConfigError>> {
    let config = info.kind.resolve(config, conventions)?;
    let ports = info.kind.ports(&config);
    Ok(Operator { kind: info.kind.about().name.to_owned(), config, ports, places: BTreeMap::new() })
}

#[cfg(test)]
mod tests {
    use contract::{About, AnyValue, Env, Ports, Registry, Result, Stage};
    use schemars::JsonSchema;
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::ground::source::Source;
    use crate::language::yaml::parse;

    /// Every shape that a field may have.
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Shapes {
        #[serde(default)]
        size: Option<u64>,
        #[serde(default)]
        mode: Option<Mode>,
        #[serde(default)]
        how: Option<How>,
        #[serde(default)]
        parts: Vec<Part>,
    }

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        /// First.
        Fast,
        /// Second.
        Slow,
    }

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
    enum How {
        /// Cut into pieces.
        Cut { pieces: u64 },
        /// Left whole.
        Whole { name: String },
    }

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Part {
        weight: f64,
    }

    struct Shaper;

    impl Stage for Shaper {
        type Config = Shapes;
        fn about(&self) -> About {
            About { name: "shaper", version: 1, numerics: None, summary: "", example: "", reads_clock: false }
        }
        fn ports(&self, _: &Shapes) -> Ports {
            Ports::new()
        }
        fn start(&self, _: Shapes, _: &Env, _: Option<AnyValue>) -> Result<Box<dyn contract::Operator>> {
            anyhow::bail!("does not run")
        }
    }

    /// Message, hint and what the caret is under.
    fn faults(with: &str) -> Vec<[String; 3]> {
        let registry = Registry::new(|_, _, _| anyhow::bail!("loads nothing")).with(Shaper);
        let kinds = Kinds::new(&registry);
        let with = parse(&Source::new("t.yaml", with)).unwrap();
        let stage = with.span.clone();
        let spec = OperatorSpec { span: stage, kind: None, inputs: Default::default(), with, every: None };
        let mut problems = Problems::default();
        let operator = operator(&spec, kinds.get("shaper").unwrap(), &[], Conventions::Sound, &mut problems);
        assert_eq!(operator.is_some(), problems.0.is_empty());
        let shown = |span: &Span| span.source.text[span.start..span.end].to_owned();
        problems.0.into_iter().map(|d| [shown(d.place().unwrap()), d.message.clone(), d.hint]).collect()
    }

    fn fault(with: &str) -> [String; 3] {
        let mut faults = faults(with);
        assert_eq!(faults.len(), 1, "{faults:#?}");
        faults.remove(0)
    }

    #[test]
    fn right_values_of_every_shape_are_accepted() {
        for with in ["{}", "{size: ~, mode: fast, how: {kind: cut, pieces: 2}, parts: [{weight: 1}, {weight: 2e-3}]}"] {
            assert_eq!(faults(with), Vec::<[String; 3]>::new());
        }
    }

    #[test]
    fn a_wrong_choice_lists_the_choices() {
        let [at, message, hint] = fault("mode: fsat");
        assert_eq!(message, "`mode` must be one of `fast`, `slow`, got the text `fsat`");
        assert_eq!((at.as_str(), hint.as_str()), ("fsat", "did you mean `fast`?"));
        assert_eq!(fault("mode: 3")[1], "`mode` must be one of `fast`, `slow`, got `3`");
    }

    #[test]
    fn an_alternative_is_told_by_its_tag() {
        let [at, message, hint] = fault("how: {kind: cutt, pieces: 3}");
        assert_eq!(message, "`how.kind` must be one of `cut`, `whole`, got the text `cutt`");
        assert_eq!((at.as_str(), hint.as_str()), ("cutt", "did you mean `cut`?"));
        assert_eq!(
            fault("how: {kind: cut, pieces: few}")[1],
            "`how.pieces` must be a whole number, got the text `few`"
        );
        assert_eq!(fault("how: {kind: whole}")[1], "kind `shaper` needs `how.name`");
        assert_eq!(fault("how: {kind: cut, pieces: 1, size: 2}")[1], "unknown field `how.size` of kind `shaper`");
    }

    #[test]
    fn the_type_of_an_optional_value_is_said_without_nothing() {
        let [at, message, hint] = fault("size: \"12\"");
        assert_eq!(message, "`size` must be a whole number, got the text `12`");
        assert_eq!((at.as_str(), hint.as_str()), ("\"12\"", "take the quotes away"));
        assert_eq!(fault("size: -1")[0], "-1");
    }

    #[test]
    fn a_fault_in_a_list_points_at_its_item() {
        let [at, message, _] = fault("parts: [{weight: 1}, {weight: heavy}]");
        assert_eq!(
            (at.as_str(), message.as_str()),
            ("heavy", "`parts.1.weight` must be a number, got the text `heavy`")
        );
        assert_eq!(fault("parts: [{wieght: 1, weight: 1}]")[0], "wieght");
    }
}
