//! What kinds there are: the catalogue for people, and a JSON Schema of pipeline files for editors.
//!
//! Both come from what the kinds say of themselves.

use std::fmt::Write as _;

use anyhow::{Result, bail};
use contract::{Check, Conventions, Kind, Port, Ports, Registry};
use serde_json::{Map, Value as Json, json};

use crate::ground::source::Source;
use crate::ground::terminal::{flow, wrap};
use crate::language::diagnostic::did_you_mean;
use crate::language::kinds::{Schema, WINDOW_FIELDS};
use crate::language::read::limits_of;
use crate::language::yaml::{self, Node, Value};

/// All kinds, a line each; or all about one of them.
///
/// Errors when there is no such kind.
pub fn catalogue(registry: &Registry, kind: Option<&str>) -> Result<String> {
    let Some(name) = kind else {
        let width = registry.kinds().map(|kind| kind.about().name.len()).max().unwrap_or(0);
        let line = |kind: &dyn Kind| format!("{:width$}  {}\n", kind.about().name, kind.about().summary);
        return Ok(registry.kinds().map(line).collect());
    };
    match registry.get(name) {
        Some(kind) => Ok(describe(kind)),
        None => {
            let names = registry.kinds().map(|kind| kind.about().name);
            bail!("unknown kind `{name}`; {}", did_you_mean(name, "kind", names))
        }
    }
}

fn describe(kind: &dyn Kind) -> String {
    let about = kind.about();
    let mut out = format!("{}  (version {})\n{}\n", about.name, about.version, about.summary);
    if let Some(ports) = example_ports(kind) {
        section(&mut out, "inputs", ports.inputs.iter().map(port_row).collect());
        section(&mut out, "outputs", ports.outputs.iter().map(port_row).collect());
    }
    let schema = Schema(kind.schema());
    let mut fields = Vec::new();
    collect_fields(&schema, &schema.0, "", &mut fields);
    if fields.is_empty() {
        out += "\nfields of `with`\n    none\n";
    }
    section(&mut out, "fields of `with`", fields);
    if let Some(alone) = kind.alone() {
        let mut text = format!(
            "used alone: a loop over windows of `{}` that hands out `{}`; `with` then takes {} too",
            alone.data,
            alone.next,
            crate::language::diagnostic::quoted(WINDOW_FIELDS)
        );
        if let Some(Check { valid, metric, .. }) = alone.check {
            text += &format!("; with a dataset on `{valid}`, the round with the least {metric} on it is kept");
        }
        let _ = writeln!(out, "\n{}", wrap(&text, PAGE).join("\n"));
    }
    let _ = writeln!(out, "\nexample");
    for line in about.example.trim_matches('\n').lines() {
        let _ = writeln!(out, "    {line}");
    }
    out
}

/// Name, what it is, what it is for.
type Row = [String; 3];

/// Columns that a page takes.
const PAGE: usize = 100;

/// A table where its rows fit, else a paragraph for each.
fn section(out: &mut String, title: &str, rows: Vec<Row>) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{title}");
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    let fits = 4 + first + 2 + second + 2 + width(2) <= PAGE;
    for [name, what, doc] in &rows {
        if fits {
            let _ = writeln!(out, "{}", format!("    {name:first$}  {what:second$}  {doc}").trim_end());
            continue;
        }
        let lines = wrap(&format!("{name}: {what}"), PAGE - 8).into_iter().chain(wrap(doc, PAGE - 8));
        for (line, indent) in lines.zip(std::iter::once(4).chain(std::iter::repeat(8))) {
            let _ = writeln!(out, "{:indent$}{line}", "");
        }
    }
}

fn port_row(port: &Port) -> Row {
    let optional = if port.required { "" } else { ", optional" };
    let several = if port.several { ", several by name" } else { "" };
    [port.name.clone(), format!("{}{several}{optional}", port.port_type), port.doc.clone()]
}

/// The fields of a mapping, those of inner mappings below them.
fn collect_fields(schema: &Schema, object: &Json, prefix: &str, rows: &mut Vec<Row>) {
    let required = object.get("required").and_then(Json::as_array);
    let properties = object.get("properties").and_then(Json::as_object);
    // One of several forms of the field above, such as `{jsd: {beta: 0.5}}`.
    let is_form = object.get("description").is_some() && properties.is_some_and(|fields| fields.len() == 1);
    for (name, field) in properties.into_iter().flatten() {
        let path = format!("{prefix}{name}");
        let is_required = required.is_some_and(|names| names.iter().any(|required| required == name));
        let default = match field.get("default") {
            Some(Json::Null) | None if is_required && !is_form => ", required".to_owned(),
            // Of a mapping, its fields have theirs.
            Some(Json::Null | Json::Object(_)) | None => String::new(),
            Some(default) => format!(", default {}", flow(default)),
        };
        let doc = [field, object].iter().find_map(|schema| schema.get("description").and_then(Json::as_str));
        let doc = doc.unwrap_or_default();
        let doc = doc.split_whitespace().collect::<Vec<_>>().join(" ");
        rows.push([path.clone(), format!("{}{default}", type_in_words(schema, field)), doc]);
        // A schema may contain itself; two levels below are all that a page shows.
        if path.matches('.').count() < 2 {
            for inner in schema.alternatives(field).into_iter().filter(|inner| inner.get("properties").is_some()) {
                collect_fields(schema, inner, &format!("{path}."), rows);
            }
        }
    }
}

fn type_in_words(schema: &Schema, field: &Json) -> String {
    let mut words: Vec<String> = Vec::new();
    for part in schema.alternatives(field) {
        let listed = part.get("enum").and_then(Json::as_array).into_iter().flatten().chain(part.get("const"));
        let choices: Vec<String> =
            listed.map(|value| value.as_str().map_or(value.to_string(), str::to_owned)).collect();
        let types = match part.get("type") {
            Some(Json::Array(types)) => types.iter().filter_map(Json::as_str).collect(),
            Some(Json::String(one)) => vec![one.as_str()],
            _ => Vec::new(),
        };
        let types = types.into_iter().filter(|name| *name != "null").map(|name| match name {
            "array" => {
                let items = part.get("items").map(|items| type_in_words(schema, items)).unwrap_or_default();
                format!("list of {items}")
            }
            "object" => "mapping".to_owned(),
            "string" => "text".to_owned(),
            other => other.to_owned(),
        });
        let found = if choices.is_empty() { types.collect() } else { choices };
        for word in found {
            if !words.contains(&word) {
                words.push(word);
            }
        }
    }
    if words.is_empty() { "any".to_owned() } else { words.join(" | ") }
}

/// The ports under the configuration of the kind's own example, or under an empty one.
fn example_ports(kind: &dyn Kind) -> Option<Ports> {
    let about = kind.about();
    let tree = yaml::parse(&Source::new("example", about.example)).ok();
    let mut with = tree.as_ref().and_then(|tree| find_with(tree, about.name)).unwrap_or_else(|| json!({}));
    // A kind used alone has the fields of a window in `with`, too; a kind may also have one of that name itself.
    let schema = kind.schema();
    let is_own = |field: &str| schema.pointer(&format!("/properties/{field}")).is_some();
    if let Some(with) = with.as_object_mut() {
        with.retain(|field, _| is_own(field) || !WINDOW_FIELDS.contains(&field.as_str()));
    }
    let config = [with, json!({})].iter().find_map(|with| kind.resolve(with, Conventions::Sound).ok())?;
    Some(kind.ports(&config))
}

/// The `with` of the first stage of that kind.
fn find_with(node: &Node, kind: &str) -> Option<Json> {
    match &node.value {
        Value::Map(map) if node.get("kind").and_then(Node::text) == Some(kind) => {
            Some(map.get("with").map_or_else(|| json!({}), |entry| entry.node.to_json()))
        }
        Value::Map(map) => map.values().find_map(|entry| find_with(&entry.node, kind)),
        Value::List(items) => items.iter().find_map(|item| find_with(item, kind)),
        _ => None,
    }
}

/// A JSON Schema of a whole pipeline file, for editors. It cannot say everything: names and types of edges are checked by
/// `load` alone.
pub fn json_schema(registry: &Registry) -> Json {
    let mut definitions = Map::new();
    let (mut alone, mut inside) = (Vec::new(), Vec::new());
    for kind in registry.kinds() {
        let with = own_definitions(kind, &mut definitions);
        inside.push(stage_schema(kind, with.clone(), true));
        alone.push(stage_schema(kind, with_window(kind, with), false));
    }
    definitions.insert("edges".into(), edges());
    definitions.insert("bodyStage".into(), json!({"oneOf": inside}));
    definitions.insert("loop".into(), loop_schema());
    alone.push(object(json!({"loop": {"$ref": "#/$defs/loop"}}), &["loop"]));
    definitions.insert("stage".into(), json!({"oneOf": alone}));
    definitions.insert("layer".into(), layer_schema());
    definitions.insert("report".into(), report_schema());
    let axes = json!({"type": "object", "additionalProperties": {"type": "array", "minItems": 1}});
    let names = json!({"type": "array", "items": {"type": "string"}});
    let ablation = object(json!({"over": axes, "repeat": axes, "variants": names}), &[]);
    let map_of = |definition: &str| json!({"type": "object", "additionalProperties": {"$ref": definition}});
    let mut schema = object(
        json!({
            "version": {"const": 1},
            "name": {"type": "string"},
            "include": {"anyOf": [{"type": "string"}, names]},
            "conventions": {"enum": ["sound", "reference"], "description": "Defaults of all options that differ between what is sound and what the published programs do."},
            "params": {"type": "object", "description": "Used as ${params.NAME}."},
            "stages": map_of("#/$defs/stage"),
            "profiles": map_of("#/$defs/layer"),
            "variants": map_of("#/$defs/layer"),
            "ablations": {"type": "object", "additionalProperties": ablation},
            "report": {"$ref": "#/$defs/report"},
        }),
        &[],
    );
    let map = schema.as_object_mut().expect("an object");
    map.insert("$schema".into(), json!("https://json-schema.org/draft/2020-12/schema"));
    map.insert("title".into(), json!("A pipeline"));
    map.insert("$defs".into(), Json::Object(definitions));
    schema
}

fn object(properties: Json, required: &[&str]) -> Json {
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

fn edges() -> Json {
    let edge = json!({"type": "string", "description": "STAGE or STAGE.OUTPUT"});
    let several = json!({"type": "object", "additionalProperties": edge, "description": "several values by name"});
    json!({"type": "object", "additionalProperties": {"anyOf": [edge, several]}})
}

/// A kind's schema, with its definitions moved to those of the whole under a prefix, and every field open to a parameter.
fn own_definitions(kind: &dyn Kind, definitions: &mut Map<String, Json>) -> Json {
    let prefix = format!("{}.", kind.about().name);
    let mut schema = kind.schema();
    relocate(&mut schema, &prefix);
    open_to_parameters(&mut schema);
    if let Some(map) = schema.as_object_mut() {
        map.shift_remove("$schema");
        if let Some(Json::Object(own)) = map.shift_remove("$defs") {
            definitions.extend(own.into_iter().map(|(name, schema)| (format!("{prefix}{name}"), schema)));
        }
    }
    schema
}

fn relocate(schema: &mut Json, prefix: &str) {
    match schema {
        Json::Object(map) => {
            if let Some(Json::String(reference)) = map.get_mut("$ref")
                && let Some(name) = reference.strip_prefix("#/$defs/")
            {
                *reference = format!("#/$defs/{prefix}{name}");
            }
            map.values_mut().for_each(|inner| relocate(inner, prefix));
        }
        Json::Array(items) => items.iter_mut().for_each(|item| relocate(item, prefix)),
        _ => {}
    }
}

/// Before substitution, any field at any depth may be `${params.NAME}`.
fn open_to_parameters(schema: &mut Json) {
    match schema {
        Json::Object(map) => {
            map.values_mut().for_each(open_to_parameters);
            let properties = map.get_mut("properties").and_then(Json::as_object_mut);
            properties.into_iter().flat_map(|p| p.values_mut()).for_each(open_field);
        }
        Json::Array(items) => items.iter_mut().for_each(open_to_parameters),
        _ => {}
    }
}

/// The field's own schema or a parameter; what editors show of the field stays on top.
fn open_field(field: &mut Json) {
    let mut own = field.take();
    let mut open = Map::new();
    for key in ["description", "default"] {
        if let Some(shown) = own.as_object_mut().and_then(|own| own.shift_remove(key)) {
            open.insert(key.into(), shown);
        }
    }
    open.insert("anyOf".into(), json!([own, {"type": "string", "pattern": r"\$\{params\."}]));
    *field = Json::Object(open);
}

fn stage_schema(kind: &dyn Kind, with: Json, in_loop: bool) -> Json {
    let about = kind.about();
    let mut properties = json!({
        "kind": {"const": about.name, "description": about.summary},
        "in": {"$ref": "#/$defs/edges"},
        "with": with,
    });
    if in_loop {
        let (least, most) = limits_of("every").into_inner();
        let rounds = json!({"type": "integer", "minimum": least, "maximum": most});
        properties["every"] = json!({"anyOf": [{"enum": ["round", "epoch"]}, rounds]});
    }
    object(properties, &["kind"])
}

/// A whole number, a parameter that brings one, or nothing at all.
fn whole_number(field: &str, doc: &str) -> Json {
    let parameter = json!({"type": "string", "pattern": r"\$\{params\."});
    let (least, most) = limits_of(field).into_inner();
    json!({"anyOf": [{"type": "integer", "minimum": least, "maximum": most}, parameter, {"type": "null"}], "description": doc})
}

fn rounds_field() -> Json {
    whole_number("rounds", "Number of rounds, or a cap on what `epochs` make.")
}

/// The fields of a window.
fn window_fields() -> Json {
    json!({
        "rows": whole_number("rows", "Only the first so many rows."),
        "take": whole_number("take", "Rows a round."),
        "epochs": whole_number("epochs", "Passes over the rows."),
        "order": {"enum": ["shuffle", "given"], "description": "Order of rows within an epoch."},
        "seed": whole_number("seed", "Seed of a shuffled order."),
        "last": {"enum": ["drop", "short"], "description": "What becomes of a last window with fewer rows."},
    })
}

/// Used alone, a training kind takes the fields of its window too.
fn with_window(kind: &dyn Kind, mut with: Json) -> Json {
    if kind.alone().is_none() {
        return with;
    }
    let (Json::Object(window), Some(own)) = (window_fields(), with.get_mut("properties").and_then(Json::as_object_mut))
    else {
        return with;
    };
    let order_seed = whole_number(
        "order_seed",
        "Seed of a shuffled order; left out: that of the stage, under `conventions: reference` 0.",
    );
    let more = [("rounds".to_owned(), rounds_field()), ("order_seed".to_owned(), order_seed)];
    for (name, field) in window.into_iter().chain(more) {
        own.entry(name).or_insert(field);
    }
    with
}

fn loop_schema() -> Json {
    let mut window = window_fields();
    window["of"] = json!({"type": "string", "description": "The dataset that enters."});
    window["repeat"] = json!({"const": "forever"});
    let best = object(json!({"best": {"type": "string"}, "mode": {"enum": ["max", "min"]}}), &["best", "mode"]);
    let carry = json!({
        "from": {"type": "string", "description": "What round 0 reads."},
        "next": {"type": "string", "description": "What later rounds read."},
        "keep": {"anyOf": [{"const": "last"}, best]},
        "keep_with": {"type": "string"},
    });
    let map_of = |schema: Json| json!({"type": "object", "additionalProperties": schema});
    object(
        json!({
            "windows": map_of(object(window, &["of", "take"])),
            "carry": map_of(object(carry, &["next"])),
            "stages": map_of(json!({"$ref": "#/$defs/bodyStage"})),
            "rounds": rounds_field(),
            "unroll": {"type": "boolean"},
        }),
        &["stages"],
    )
}

fn layer_schema() -> Json {
    let names = json!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]});
    object(
        json!({
            "extends": names,
            "remove": names,
            "rebind": {"$ref": "#/$defs/edges"},
            "stages": {"type": "object"},
            "set": {"type": "object"},
        }),
        &[],
    )
}

fn report_schema() -> Json {
    let number = json!({"type": "string", "pattern": r"^[^.]+\..+$", "description": "STAGE.METRIC"});
    let headings = json!({"type": "object", "additionalProperties": number});
    let names = json!({"type": "array", "items": {"type": "string"}});
    object(
        json!({
            "metric": number,
            "metrics": headings,
            "compare": names,
            "baseline": {"type": "string"},
            "correlate": {"type": "string"},
            "seconds": names,
            "rows": {"type": "object", "additionalProperties": headings},
            "caption": {"type": "string"},
        }),
        &[],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::registry;

    #[test]
    fn the_list_has_a_line_for_every_kind() {
        let text = catalogue(&registry(), None).unwrap();
        assert_eq!(text.lines().count(), registry().kinds().count());
        assert!(text.contains("distill           Trains a student to follow a teacher.\n"), "{text}");
    }

    #[test]
    fn a_page_shows_ports_fields_and_example() {
        insta::assert_snapshot!(catalogue(&registry(), Some("finetune")).unwrap());
    }

    #[test]
    fn an_unknown_kind_is_an_error_with_a_near_miss() {
        let error = catalogue(&registry(), Some("finetun")).unwrap_err().to_string();
        assert_eq!(error, "unknown kind `finetun`; did you mean `finetune`?");
    }

    #[test]
    fn the_schema_accepts_a_pipeline_and_refuses_an_unknown_field() {
        let validator = jsonschema::validator_for(&json_schema(&registry())).unwrap();
        let source = Source::new("promptkd.yaml", include_str!("../../tests/fixtures/promptkd.yaml"));
        let mut pipeline = yaml::parse(&source).unwrap().to_json();
        let errors: Vec<String> = validator.iter_errors(&pipeline).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{errors:#?}");
        pipeline["stages"]["teacher"]["with"]["learning_rte"] = json!(1);
        assert!(!validator.is_valid(&pipeline));
    }
}
