//! What the language needs to know of stage kinds: which fields `with` may have, and whether a configuration is right.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use contract::{Alone, Kind, Registry, limits};
use jsonschema::Validator;
use serde_json::Value as Json;

/// Fields of a window, which stand in `with` where a training kind is used alone. There `seed` is the stage's too, and
/// `order_seed` that of the order by itself.
pub(crate) const WINDOW_FIELDS: [&str; 8] = ["rows", "take", "epochs", "rounds", "order", "order_seed", "seed", "last"];

/// All kinds of a registry, with their schemas.
pub(crate) struct Kinds<'a> {
    kinds: BTreeMap<&'static str, KindInfo<'a>>,
}

/// A kind with its schema.
pub(crate) struct KindInfo<'a> {
    pub(crate) kind: &'a dyn Kind,
    pub(crate) alone: Option<Alone>,
    registry: &'a Registry,
    schema: OnceCell<Schema>,
    validator: OnceCell<Validator>,
}

impl<'a> Kinds<'a> {
    pub(crate) fn new(registry: &'a Registry) -> Self {
        let info = |kind: &'a dyn Kind| KindInfo {
            kind,
            alone: kind.alone(),
            registry,
            schema: OnceCell::new(),
            validator: OnceCell::new(),
        };
        Kinds { kinds: registry.kinds().map(|kind| (kind.about().name, info(kind))).collect() }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&KindInfo<'a>> {
        self.kinds.get(name)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.kinds.keys().copied()
    }
}

impl KindInfo<'_> {
    /// Made when it is first asked for: a pipeline uses few of all kinds.
    pub(crate) fn schema(&self) -> &Schema {
        let schema = || self.registry.schema(self.kind.about().name).cloned().expect("a kind of the registry");
        self.schema.get_or_init(|| Schema(schema()))
    }

    /// Compiled once, when the first stage of the kind is checked.
    pub(crate) fn validator(&self) -> &Validator {
        let compile = || jsonschema::validator_for(&self.schema().0).expect("the schema of a kind is valid");
        self.validator.get_or_init(compile)
    }
}

/// A JSON Schema, asked about single fields.
pub(crate) struct Schema(pub(crate) Json);

/// The fields that a mapping may have.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    /// Names that the schema gives.
    pub(crate) names: Vec<String>,
    /// Whether other names are fine too.
    pub(crate) open: bool,
}

impl Schema {
    /// The fields below a path. A list's index is an element of the path.
    pub(crate) fn fields(&self, path: &[String]) -> Fields {
        let mut fields = Fields::default();
        for schema in self.subschemas(path) {
            let Some(object) = schema.as_object() else {
                fields.open |= schema == &Json::Bool(true);
                continue;
            };
            let properties = object.get("properties").and_then(Json::as_object);
            for name in properties.into_iter().flat_map(|p| p.keys()) {
                if !fields.names.contains(name) {
                    fields.names.push(name.clone());
                }
            }
            let is_object = object.get("type").is_none_or(|t| mentions(t, "object"));
            let typeless = ["const", "enum", "type"].iter().all(|key| !object.contains_key(*key));
            let more = object.get("additionalProperties");
            let closed = more == Some(&Json::Bool(false)) || properties.is_some() && more.is_none();
            fields.open |= is_object && !closed && (typeless || object.contains_key("type"));
        }
        fields
    }

    /// The texts that a field may be, where it is a choice.
    pub(crate) fn choices(&self, path: &[String]) -> Vec<String> {
        let mut choices = Vec::new();
        for schema in self.subschemas(path) {
            let listed = schema.get("enum").and_then(Json::as_array).into_iter().flatten();
            choices.extend(listed.chain(schema.get("const")).filter_map(Json::as_str).map(str::to_owned));
        }
        choices
    }

    /// The numbers that a field may be, in words, where they have a limit.
    pub(crate) fn range(&self, path: &[String]) -> Option<String> {
        let limit = |schema: &Json, key: &str| {
            let limit = schema.get(key).filter(|limit| limit.is_number())?.to_string();
            Some(limit.strip_suffix(".0").map(str::to_owned).unwrap_or(limit))
        };
        self.subschemas(path).into_iter().find_map(|schema| {
            let (least, most) = (limit(schema, "minimum"), limit(schema, "maximum"));
            let (above, below) = (limit(schema, "exclusiveMinimum"), limit(schema, "exclusiveMaximum"));
            Some(match (above, least, below, most) {
                (Some(above), _, Some(below), _) => format!("above {above} and below {below}"),
                (Some(above), _, None, Some(most)) => format!("above {above} and at most {most}"),
                (None, Some(least), Some(below), _) => format!("{least} or more and below {below}"),
                (None, Some(least), None, Some(most)) if most == limits::SEED.to_string() => format!("{least} or more"),
                (None, Some(least), None, Some(most)) => format!("from {least} to {most}"),
                (Some(above), _, None, None) => format!("above {above}"),
                (None, Some(least), None, None) => format!("{least} or more"),
                (None, None, Some(below), _) => format!("below {below}"),
                (None, None, None, most) => format!("at most {}", most?),
            })
        })
    }

    /// The choices of a field that have settings of their own, and which: `jsd` with `beta` is written `{jsd: {beta: 0.5}}`.
    pub(crate) fn forms(&self, path: &[String]) -> Vec<(String, Vec<String>)> {
        let schemas = self.subschemas(path).into_iter();
        let form = |schema: &Json| {
            let (name, _) = schema.get("properties")?.as_object().filter(|all| all.len() == 1)?.iter().next()?;
            let required = schema.get("required")?.as_array()?;
            required.iter().any(|field| field == name).then(|| name.clone())
        };
        let named = schemas.filter_map(form);
        named.map(|name| (name.clone(), self.fields(&[path, &[name]].concat()).names)).collect()
    }

    /// Whether a field takes whole numbers and no others.
    pub(crate) fn is_whole(&self, path: &[String]) -> bool {
        let types: Vec<&Json> = self.subschemas(path).into_iter().filter_map(|schema| schema.get("type")).collect();
        types.iter().any(|types| mentions(types, "integer")) && !types.iter().any(|types| mentions(types, "number"))
    }

    /// Every schema that a value at `path` may have to meet, references and alternatives followed.
    fn subschemas(&self, path: &[String]) -> Vec<&Json> {
        let mut schemas = self.alternatives(&self.0);
        for step in path {
            schemas = schemas
                .into_iter()
                .filter_map(|schema| match schema.get("properties").and_then(|p| p.get(step)) {
                    Some(property) => Some(property),
                    None if step.parse::<usize>().is_ok() && schema.get("items").is_some() => schema.get("items"),
                    None => schema.get("additionalProperties").filter(|more| *more != &Json::Bool(false)),
                })
                .flat_map(|schema| self.alternatives(schema))
                .collect();
        }
        schemas
    }

    /// `schema` and what it refers to or is composed of.
    pub(crate) fn alternatives<'a>(&'a self, schema: &'a Json) -> Vec<&'a Json> {
        if let Some(reference) = schema.get("$ref").and_then(Json::as_str) {
            let target = reference.strip_prefix('#').and_then(|pointer| self.0.pointer(pointer));
            return target.map(|target| self.alternatives(target)).unwrap_or_default();
        }
        let parts = ["anyOf", "oneOf", "allOf"].iter().filter_map(|key| schema.get(*key)).filter_map(Json::as_array);
        let parts: Vec<&Json> = parts.flatten().flat_map(|part| self.alternatives(part)).collect();
        let says_more = schema.get("properties").is_some() || parts.is_empty();
        parts.into_iter().chain(says_more.then_some(schema)).collect()
    }
}

/// Whether a schema's `type` is `name` or a list with it.
fn mentions(types: &Json, name: &str) -> bool {
    match types {
        Json::Array(types) => types.iter().any(|t| t == name),
        one => one == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn path(text: &str) -> Vec<String> {
        text.split('.').filter(|part| !part.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn fields_are_found_through_references_and_options() {
        let schema = Schema(json!({
            "type": "object",
            "properties": {
                "init": {"anyOf": [{"$ref": "#/$defs/Init"}, {"type": "null"}]},
                "env": {"type": "object", "additionalProperties": {"type": "string"}},
                "anything": true,
                "list": {"type": "array", "items": {"$ref": "#/$defs/Init"}}
            },
            "additionalProperties": false,
            "$defs": {"Init": {"type": "object", "properties": {"layers": {"type": "integer"}}, "additionalProperties": false}}
        }));
        assert_eq!(schema.fields(&path("init")).names, ["layers"]);
        assert_eq!(schema.fields(&path("list.0")).names, ["layers"]);
        assert!(!schema.fields(&path("")).open && !schema.fields(&path("init")).open);
        assert!(schema.fields(&path("env")).open && schema.fields(&path("anything")).open);
        assert!(!schema.fields(&path("init.layers")).open);
    }

    #[test]
    fn choices_are_found_as_constants_and_as_lists() {
        let schema = Schema(json!({"properties": {
            "a": {"oneOf": [{"const": "x"}, {"const": "y", "description": "second"}]},
            "b": {"type": "string", "enum": ["u", "v"]}
        }}));
        assert_eq!(schema.choices(&path("a")), ["x", "y"]);
        assert_eq!(schema.choices(&path("b")), ["u", "v"]);
    }
}
