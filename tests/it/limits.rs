//! Every number that a pipeline file may hold has limits: a walk over all schemas finds the numbers, and each is tried below
//! its least, at both ends and above its most, in a file that is checked as people's are.

use std::collections::BTreeMap;

use promptkd::language::{self, Request};
use serde_json::{Map, Value as Json, json};

/// A number of a schema.
struct Field {
    kind: String,
    /// Keys and places in lists.
    path: Vec<String>,
    schema: Json,
}

/// One value of a field.
struct Trial {
    field: usize,
    value: Json,
    allowed: bool,
}

#[test]
fn every_number_of_every_kind_has_limits_that_are_kept() {
    let registry = stages::registry();
    let mut fields = Vec::new();
    for kind in registry.kinds() {
        let schema = kind.schema();
        let mut walk = Walk { root: &schema, kind: kind.about().name, fields: &mut fields };
        walk.visit(&schema, &mut Vec::new());
    }
    assert!(fields.len() > 100, "a walk over all schemas finds more than {} numbers", fields.len());
    let trials: Vec<Trial> = fields.iter().enumerate().flat_map(|(field, what)| trials(field, &what.schema)).collect();
    let mut text = String::from("version: 1\nstages:\n");
    for (index, Trial { field, value, .. }) in trials.iter().enumerate() {
        let Field { kind, path, .. } = &fields[*field];
        let schema = registry.get(kind).unwrap().schema();
        let with = with_value(&schema, &schema, path, value);
        text += &format!("  s{index}: {{kind: {kind}, with: {with}}}\n");
    }
    let refused = refused(&text, &registry);
    for (index, Trial { field, value, allowed }) in trials.iter().enumerate() {
        let Field { kind, path, .. } = &fields[*field];
        let path = path.join(".");
        let said = refused.get(&(index + 3)).cloned().unwrap_or_default();
        let about = said.iter().any(|message| message.starts_with(&format!("`{path}` must be")));
        assert_eq!(about, !allowed, "`{path}` of `{kind}` is {value}: {said:?}");
    }
    println!("{} numbers of {} kinds, {} values tried", fields.len(), registry.kinds().count(), trials.len());
}

#[test]
fn the_numbers_of_a_loop_have_limits_too() {
    let registry = stages::registry();
    let schema = language::json_schema(&registry);
    let mut fields = Vec::new();
    let definition = &schema["$defs"]["loop"];
    let mut walk = Walk { root: &schema, kind: "loop", fields: &mut fields };
    walk.visit(&definition["properties"]["windows"]["additionalProperties"], &mut vec!["window".into()]);
    walk.visit(&definition["properties"]["rounds"], &mut vec!["rounds".into()]);
    assert_eq!(fields.len(), 5, "rows, take, epochs, seed and rounds");
    for (index, field) in fields.iter().enumerate() {
        for Trial { value, allowed, .. } in trials(index, &field.schema) {
            let name = field.path.last().unwrap();
            let mut window = json!({"of": "data", "take": 1, "epochs": 1});
            let mut body = json!({"stages": {}});
            if name == "rounds" {
                body["rounds"] = value.clone();
            } else {
                window[name] = value.clone();
            }
            body["windows"] = json!({"window": window});
            let text = format!("version: 1\nstages:\n  l: {{loop: {body}}}\n");
            let said = refused(&text, &registry).remove(&3).unwrap_or_default();
            let about = said.iter().any(|message| message.starts_with(&format!("`{name}` must be")));
            assert_eq!(about, !allowed, "`{name}` is {value}: {said:?}");
        }
    }
}

/// What is said of each line of a pipeline.
fn refused(text: &str, registry: &contract::Registry) -> BTreeMap<usize, Vec<String>> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.yaml");
    std::fs::write(&file, text).unwrap();
    let found = language::load(&Request { file, ..Request::default() }, registry, &[]).unwrap_err();
    let mut refused: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for diagnostic in found.diagnostics {
        let line = diagnostic.labels.first().map_or(0, |label| label.span.place().line);
        refused.entry(line).or_default().push(diagnostic.message);
    }
    refused
}

/// Finds the numbers below a schema.
struct Walk<'a> {
    root: &'a Json,
    kind: &'a str,
    fields: &'a mut Vec<Field>,
}

impl Walk<'_> {
    fn visit(&mut self, schema: &Json, path: &mut Vec<String>) {
        let schema = followed(schema, self.root);
        let is = |name: &str| {
            schema["type"] == name || schema["type"].as_array().is_some_and(|all| all.contains(&json!(name)))
        };
        if is("integer") || is("number") {
            let known = self.fields.iter().any(|field| field.kind == self.kind && field.path == *path);
            if !known {
                self.fields.push(Field { kind: self.kind.into(), path: path.clone(), schema: schema.clone() });
            }
        }
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            path.push(name.clone());
            self.visit(inner, path);
            path.pop();
        }
        if schema["items"].is_object() {
            path.push("0".into());
            self.visit(&schema["items"], path);
            path.pop();
        }
        for choice in choices(schema) {
            self.visit(choice, path);
        }
    }
}

fn followed<'a>(schema: &'a Json, root: &'a Json) -> &'a Json {
    match schema["$ref"].as_str() {
        Some(reference) => followed(root.pointer(reference.strip_prefix('#').unwrap()).unwrap(), root),
        None => schema,
    }
}

fn choices(schema: &Json) -> impl Iterator<Item = &Json> {
    ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten()
}

/// Values below, at and above the limits of a field, which it must have.
fn trials(field: usize, schema: &Json) -> Vec<Trial> {
    let whole =
        schema["type"] == "integer" || schema["type"].as_array().is_some_and(|all| all.contains(&json!("integer")));
    let end = |inside: &str, outside: &str| match (schema.get(inside), schema.get(outside)) {
        (_, Some(limit)) => (limit.clone(), false),
        (Some(limit), None) => (limit.clone(), true),
        (None, None) => panic!("a number without `{inside}`: {schema}"),
    };
    let (least, at_least) = end("minimum", "exclusiveMinimum");
    let (most, at_most) = end("maximum", "exclusiveMaximum");
    let beyond = |limit: &Json, step: i8| match limit.as_u64().filter(|_| whole) {
        Some(0) if step < 0 => json!(-1),
        Some(limit) if step < 0 => json!(limit - 1),
        Some(limit) => limit.checked_add(1).map_or_else(|| json!(1e20), |above| json!(above)),
        None => {
            let limit = limit.as_f64().unwrap();
            json!(limit + f64::from(step) * (limit.abs() * 1e-9).max(1e-9))
        }
    };
    let trial = |value, allowed| Trial { field, value, allowed };
    vec![
        trial(beyond(&least, -1), false),
        trial(least, at_least),
        trial(most.clone(), at_most),
        trial(beyond(&most, 1), false),
        trial(if whole { json!(1.0) } else { json!("many") }, false),
    ]
}

/// The smallest value of a schema that has `value` at `path`.
fn with_value(schema: &Json, root: &Json, path: &[String], value: &Json) -> Json {
    let schema = followed(schema, root);
    let Some((first, rest)) = path.split_first() else { return value.clone() };
    if schema["items"].is_object() && first == "0" {
        let count = schema["minItems"].as_u64().unwrap_or(1) as usize;
        let mut items = vec![smallest(&schema["items"], root); count];
        items[0] = with_value(&schema["items"], root, rest, value);
        return Json::Array(items);
    }
    if let Some(inner) = schema["properties"].get(first) {
        let Json::Object(mut fields) = smallest(schema, root) else { panic!("a schema with properties is an object") };
        fields.insert(first.clone(), with_value(inner, root, rest, value));
        return Json::Object(fields);
    }
    let holds = |choice: &&Json| has_path(choice, root, path);
    let choice = choices(schema).find(holds).unwrap_or_else(|| panic!("nothing at {path:?} in {schema}"));
    with_value(choice, root, path, value)
}

fn has_path(schema: &Json, root: &Json, path: &[String]) -> bool {
    let schema = followed(schema, root);
    let Some((first, rest)) = path.split_first() else { return true };
    let below = schema["properties"].get(first).or_else(|| schema.get("items").filter(|_| first == "0"));
    below.is_some_and(|inner| has_path(inner, root, rest)) || choices(schema).any(|choice| has_path(choice, root, path))
}

/// A value that a schema allows.
fn smallest(schema: &Json, root: &Json) -> Json {
    let schema = followed(schema, root);
    if let Some(value) = schema.get("const").or_else(|| schema["enum"].get(0)) {
        return value.clone();
    }
    if let Some(choice) = choices(schema).next() {
        return smallest(choice, root);
    }
    if let Some(properties) = schema["properties"].as_object() {
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str);
        let fields: Map<String, Json> =
            required.map(|name| (name.to_owned(), smallest(&properties[name], root))).collect();
        return Json::Object(fields);
    }
    match schema["type"].as_str() {
        Some("string") => json!("x"),
        Some("boolean") => json!(false),
        Some("array") => json!([]),
        _ => schema.get("minimum").cloned().unwrap_or(json!(0.5)),
    }
}

#[test]
fn what_changes_no_result_makes_no_other_configuration() {
    let registry = stages::registry();
    let resolved = |kind: &str, with: Json| {
        let kind = registry.get(kind).unwrap();
        kind.resolve(&with, contract::Conventions::Sound).unwrap_or_else(|errors| panic!("{}", errors[0].message))
    };
    let model = |init: Json| resolved("finetune", json!({"init": init, "learning_rate": 1e-3}));
    let gpt2 = json!({"architecture": "gpt2", "layers": 2, "width": 64});
    let written_out = json!({"architecture": "gpt2", "layers": 2, "width": 64, "heads": 2, "positions": 512, "dropout": 0.0,
        "inner": 256, "tied": true});
    assert_eq!(model(gpt2.clone()), model(written_out));
    assert_ne!(model(gpt2.clone()), model(json!({"architecture": "gpt2", "layers": 2, "width": 64, "inner": 255})));
    let llama = json!({"architecture": "llama", "layers": 2, "width": 96});
    let written_out = json!({"architecture": "llama", "layers": 2, "width": 96, "heads": 3, "kv_heads": 3, "inner": 256,
        "rope_theta": 1e4});
    assert_eq!(model(llama.clone()), model(written_out));
    assert_ne!(model(llama), model(json!({"architecture": "llama", "layers": 2, "width": 96, "kv_heads": 1})));
    let evaluate = |with| resolved("evaluate", with);
    let orders = [json!(["loss", "rouge_l"]), json!(["rouge_l", "loss"]), json!(["loss", "rouge_l", "loss"])];
    assert!(
        orders.iter().all(|metrics| evaluate(json!({"metrics": metrics})) == evaluate(json!({"metrics": orders[0]})))
    );
    assert_eq!(evaluate(json!({"temperature": 0, "seeds": [7]})), evaluate(json!({"temperature": 0})));
    assert_ne!(evaluate(json!({"seeds": [7]})), evaluate(json!({})));
    let answers = |with| resolved("student-generate", with);
    assert_eq!(
        answers(json!({"temperature": 0, "max_new_tokens": 4, "seed": 7})),
        answers(json!({"temperature": 0, "max_new_tokens": 4}))
    );
    let prompt = |with| resolved("prompt-init", with);
    assert_eq!(prompt(json!({"length": 2, "from": "end", "seed": 7})), prompt(json!({"length": 2, "from": "end"})));
}
