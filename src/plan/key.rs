//! Keys: how the preimage of a subgraph is made, everything that may change its result and nothing else.
//!
//! The key of a result is the hash of its [`Preimage`]. Not in it: names of stages, paths, devices, threads, how often
//! a loop is cut, and fields that a kind names as a matter of memory only.
//!
//! Two rules keep old keys alive. A value equal to the `default` of its field in the kind's schema is left out, so a new
//! field at its default changes no key. Turned around: *changing a default changes what old keys mean*, so it needs a new
//! `version` of the kind. And stages, windows and carried values of a loop are numbered in an order that follows from
//! what they are (`in_canonical_order`), so neither their names nor their order in the file matter.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use cache::{Artifact, Key};
use contract::{About, Kind, PortType, Registry, Source};
use indexmap::IndexMap;
use serde_json::{Map, Value as Json, json};

use crate::graph::{BodyStage, Carry, Entry, Exit, Keep, Loop, Operator, Order, Origin, PortRef, Subgraph, Window};
pub use crate::plan::preimage::SourcePart;
use crate::plan::preimage::{
    CarryPart, ContentPart, KeepPart, LoopPart, OperatorPart, Preimage, ReadPart, SlicesPart, StagePart, WindowPart,
};
use crate::rounds::find_kind;
use crate::rounds::program::{Chosen, Program, Slot, Source as Read};

/// Content of what enters a subgraph, by entry.
pub type InputDigests = BTreeMap<Entry, Artifact>;

/// What is to be run, with its key.
#[derive(Clone, Debug)]
pub struct Action {
    /// Hash of the preimage.
    pub key: Key,
    /// All that may change the result, as JSON: it is compared with those that the store kept.
    pub preimage: Json,
    /// The subgraph; a loop is in canonical order, so that a place in it is what the preimage calls it.
    pub subgraph: Subgraph,
    /// Files outside of the pipeline that are read, with what the key says they hold.
    pub sources: Vec<(Source, SourcePart)>,
}

/// A file that a stage names cannot be read or found: the user's affair, not the store's.
#[derive(Debug, thiserror::Error)]
#[error("`{field}` of stage kind `{kind}`: {reason}")]
pub struct UnreadableSource {
    /// Field of `with`.
    pub field: String,
    /// Stage kind.
    pub kind: String,
    /// What went wrong.
    pub reason: String,
}

/// Makes the preimage of a subgraph. `content` says what a file or folder holds.
///
/// Errors when any part of it cannot be computed: a stage kind is unknown, a local file cannot be read, or a kind names a
/// source where its configuration has none. Then nothing can be cached, and nothing run.
pub fn action(
    subgraph: &Subgraph,
    inputs: &InputDigests,
    registry: &Registry,
    content: &mut dyn FnMut(&Source) -> Result<SourcePart>,
) -> Result<Action> {
    let mut maker = Maker { registry, inputs, content, sources: Vec::new() };
    let (subgraph, preimage) = match subgraph {
        Subgraph::Operator(operator) => {
            let read = |(entry, artifact): (&Entry, _)| {
                (entry.to_string(), ReadPart::Content(Some(ContentPart::of(artifact))))
            };
            let inputs = inputs.iter().map(read).collect();
            let stage = StagePart { operator: maker.operator(operator)?, every: None, inputs };
            (subgraph.clone(), Preimage::Stage(stage))
        }
        Subgraph::Loop(body) => {
            let stages = body.stages.iter();
            let described = stages.map(|(name, stage)| Ok((name.clone(), maker.operator(&stage.operator)?)));
            let described: Described = described.collect::<Result<_>>()?;
            let body = in_canonical_order(body, inputs, &described);
            let preimage = Preimage::Loop(maker.body(&body, described)?);
            (Subgraph::Loop(body), preimage)
        }
    };
    let preimage = serde_json::to_value(preimage)?;
    Ok(Action { key: Key::of(&preimage), preimage, subgraph, sources: maker.sources })
}

/// What each stage of a loop does, by name.
type Described = BTreeMap<String, OperatorPart>;

struct Maker<'a> {
    registry: &'a Registry,
    inputs: &'a InputDigests,
    content: &'a mut dyn FnMut(&Source) -> Result<SourcePart>,
    sources: Vec<(Source, SourcePart)>,
}

impl Maker<'_> {
    /// Kind, version and configuration.
    fn operator(&mut self, operator: &Operator) -> Result<OperatorPart> {
        let kind = find_kind(self.registry, &operator.kind)?;
        let schema = self.registry.schema(&operator.kind).context("a kind that is known has a schema")?;
        let config = without_defaults(&self.config(operator, kind)?, schema);
        let About { name, version, numerics, reads_clock, summary: _, example: _ } = kind.about();
        Ok(OperatorPart { kind: name, version, numerics, clock: reads_clock, config })
    }

    /// The configuration with the content of sources in the place of their paths, without what stays out of the key.
    fn config(&mut self, operator: &Operator, kind: &dyn Kind) -> Result<Json> {
        let mut config = operator.config.clone();
        let known = self.sources.len();
        for source in kind.sources(&operator.config) {
            let part = (self.content)(&source).map_err(|error| UnreadableSource {
                field: source.field.join("."),
                kind: operator.kind.clone(),
                reason: format!("{error:#}"),
            })?;
            put(&mut config, &source.field, serde_json::to_value(&part)?, &operator.kind)?;
            self.sources.push((source, part));
        }
        for field in kind.outside_key(&operator.config) {
            let named = |(source, _): &(Source, SourcePart)| source.field.first().is_some_and(|first| first == field);
            ensure!(
                !self.sources[known..].iter().any(named),
                "stage kind `{}` names the source `{field}` and leaves it out of the key: a fault of the kind",
                operator.kind
            );
            if let Json::Object(fields) = &mut config {
                fields.shift_remove(field);
            }
        }
        Ok(config)
    }

    /// Everything about a loop, which is in canonical order.
    fn body(&self, body: &Loop, described: Described) -> Result<LoopPart> {
        // Whoever gives a loop another field decides here whether it changes results.
        let Loop { windows, carry, stages: _, rounds, unroll: _, alone: _ } = body;
        let program = Program::of(body)?;
        let windows = windows.iter().enumerate().map(|(index, (name, window))| {
            let from = self.entry(&Entry::Window(name.clone()));
            (Slot::Window(index).to_string(), WindowPart { slices: slices(window), from })
        });
        let carry = carry.values().zip(&program.carry).enumerate().map(|(index, (carry, by_place))| {
            let part = CarryPart {
                port_type: carry.port_type,
                from: self.entry(&by_place.entry),
                next: by_place.next.to_string(),
                keep: keep(&by_place.keep),
            };
            (Slot::Carry(index).to_string(), part)
        });
        Ok(LoopPart {
            windows: windows.collect(),
            carry: carry.collect(),
            rounds: *rounds,
            stages: self.stages(body, &program, described),
        })
    }

    fn stages(&self, body: &Loop, program: &Program, mut described: Described) -> IndexMap<String, StagePart> {
        let mut parts = IndexMap::new();
        for (index, ((name, stage), by_place)) in body.stages.iter().zip(&program.stages).enumerate() {
            let operator = described.remove(name).expect("every stage was described");
            let inputs = by_place.inputs.iter().map(|input| {
                let read = match &input.source {
                    Read::Outside(entry) => ReadPart::Content(self.entry(entry)),
                    Read::Held(slot) => ReadPart::Held(slot.to_string()),
                };
                (input.port.clone(), read)
            });
            let part = StagePart { operator, every: Some(stage.every), inputs: inputs.collect() };
            parts.insert(format!("s{index}"), part);
        }
        parts
    }

    fn entry(&self, entry: &Entry) -> Option<ContentPart> {
        self.inputs.get(entry).map(ContentPart::of)
    }
}

/// A loop with its windows, carried values and stages in an order that follows from what they are, not from their names
/// or their order in the file. Stages stay in an order that respects their edges.
///
/// Each part gets a colour: first the hash of what it is by itself, then, as often as there are parts, the hash of that
/// with the colours of its neighbours. Parts of the same colour are alike, and any order of them is the same loop.
fn in_canonical_order(body: &Loop, inputs: &InputDigests, described: &Described) -> Loop {
    let mut colours = Colours::first(body, inputs, described);
    for _ in 0..body.stages.len() + body.carry.len() {
        colours = colours.next(body);
    }
    let depths = depths(body);
    let mut ordered = body.clone();
    ordered.windows.sort_by_cached_key(|name, _| colours.windows[name]);
    ordered.carry.sort_by_cached_key(|name, carry| (carry.port_type, colours.carry[name]));
    // Among stages that could run at the same time, what is carried on is made last: by then nobody else reads the value
    // that it may update in place.
    let is_carried = |name: &String| body.carry.values().any(|carry| carry.next.stage == *name);
    ordered.stages.sort_by_cached_key(|name, stage| {
        (depths[name], is_carried(name), stage.operator.kind.clone(), colours.stages[name])
    });
    ordered
}

/// Colours by name.
struct Colours {
    windows: IndexMap<String, Key>,
    carry: IndexMap<String, Key>,
    stages: IndexMap<String, Key>,
}

impl Colours {
    fn first(body: &Loop, inputs: &InputDigests, described: &Described) -> Self {
        let entry = |entry: Entry| inputs.get(&entry).map(ContentPart::of);
        let windows = body.windows.iter().map(|(name, window)| {
            (name.clone(), Key::of(&json!([slices(window), entry(Entry::Window(name.clone()))])))
        });
        let carry = body.carry.iter().map(|(name, carry)| {
            let keep = match &carry.keep {
                Keep::Best { metric, mode, .. } => json!([metric, mode]),
                Keep::Last => json!("last"),
                Keep::With(_) => json!("with"),
            };
            (name.clone(), Key::of(&json!([carry.port_type.name(), keep, entry(Entry::Carry(name.clone()))])))
        });
        let stages = body.stages.iter().map(|(name, stage)| {
            let outside = stage.inputs.iter().filter(|(_, origin)| **origin == Origin::Outside);
            let entries: BTreeMap<_, _> = outside.map(|(port, _)| (port, entry(Entry::outside(name, port)))).collect();
            (name.clone(), Key::of(&json!([described[name], stage.every, entries])))
        });
        Colours { windows: windows.collect(), carry: carry.collect(), stages: stages.collect() }
    }

    fn next(&self, body: &Loop) -> Self {
        let stages = body.stages.iter().map(|(name, stage)| {
            let inputs: BTreeMap<_, _> =
                stage.inputs.iter().map(|(port, origin)| (port, self.of_origin(origin))).collect();
            (name.clone(), Key::of(&json!([self.stages[name].to_string(), inputs])))
        });
        let carry = body.carry.iter().map(|(name, carry)| {
            let kept_by = match &carry.keep {
                Keep::Best { stage, .. } => self.stages.get(stage),
                Keep::With(other) => self.carry.get(other),
                Keep::Last => None,
            };
            let next = self.of_port(&carry.next);
            (name.clone(), Key::of(&json!([self.carry[name].to_string(), next, kept_by.map(Key::to_string)])))
        });
        Colours { windows: self.windows.clone(), carry: carry.collect(), stages: stages.collect() }
    }

    fn of_origin(&self, origin: &Origin) -> String {
        let colour =
            |colours: &IndexMap<String, Key>, name: &String| colours.get(name).map_or(String::new(), Key::to_string);
        match origin {
            Origin::Outside => String::new(),
            Origin::Window(name) => colour(&self.windows, name),
            Origin::Carry(name) => colour(&self.carry, name),
            Origin::Stage(source) => self.of_port(source),
        }
    }

    fn of_port(&self, source: &PortRef) -> String {
        self.stages.get(&source.stage).map_or(String::new(), |colour| format!("{colour}.{}", source.port))
    }
}

/// The length of the longest chain of stages that leads to each stage within a round.
fn depths(body: &Loop) -> BTreeMap<String, usize> {
    let mut depths = BTreeMap::new();
    // The stages come in an order that respects their edges.
    for (name, stage) in &body.stages {
        let before = stage.inputs.values().filter_map(|origin| match origin {
            Origin::Stage(source) => depths.get(&source.stage).map(|depth: &usize| depth + 1),
            _ => None,
        });
        let depth = before.max().unwrap_or(0);
        depths.insert(name.clone(), depth);
    }
    depths
}

fn keep(keep: &Chosen) -> KeepPart {
    match keep {
        Chosen::Last => KeepPart::Last,
        Chosen::Best { stage, metric, mode } => {
            KeepPart::Best { best: Slot::Output(*stage, metric.clone()).to_string(), mode: *mode }
        }
        Chosen::With(other) => KeepPart::With(Slot::Carry(*other).to_string()),
    }
}

fn slices(window: &Window) -> SlicesPart {
    let Window { rows, take, epochs, order, seed, last, places: _ } = window;
    let seed = Some(*seed).filter(|_| *order != Order::Given);
    SlicesPart { rows: *rows, take: *take, epochs: *epochs, order: *order, seed, last: *last }
}

/// Puts a value in the place of a source's field; an item of a list is called by its index.
///
/// Errors when the configuration has no such field: the source would stay out of the key, and its path in it.
pub(crate) fn put(config: &mut Json, field: &[String], value: Json, kind: &str) -> Result<()> {
    let mut at = config;
    for name in field {
        let inner = match at {
            Json::Array(items) => name.parse().ok().and_then(|index: usize| items.get_mut(index)),
            other => other.get_mut(name.as_str()),
        };
        at = inner.with_context(|| {
            let field = field.join(".");
            format!(
                "stage kind `{kind}` names a source `{field}` that its configuration does not have: a fault of the kind"
            )
        })?;
    }
    *at = value;
    Ok(())
}

/// A configuration without the values that its schema gives as defaults.
fn without_defaults(config: &Json, schema: &Json) -> Json {
    strip(config, schema, schema)
}

fn strip(config: &Json, schema: &Json, root: &Json) -> Json {
    let Json::Object(fields) = config else { return config.clone() };
    let Some(properties) = properties_of(schema, root) else { return config.clone() };
    let kept = fields.iter().filter_map(|(name, value)| {
        let Some(field) = properties.get(name) else { return Some((name.clone(), value.clone())) };
        (field.get("default") != Some(value)).then(|| (name.clone(), strip(value, field, root)))
    });
    Json::Object(kept.collect())
}

/// The properties of an object, through references and `Option`.
fn properties_of<'a>(schema: &'a Json, root: &'a Json) -> Option<&'a Map<String, Json>> {
    if let Some(properties) = schema.get("properties") {
        return properties.as_object();
    }
    if let Some(reference) = schema.get("$ref").and_then(Json::as_str) {
        return properties_of(root.pointer(reference.strip_prefix('#')?)?, root);
    }
    let choices = schema.get("anyOf").or_else(|| schema.get("allOf"))?.as_array()?;
    let mut objects = choices.iter().filter_map(|choice| properties_of(choice, root));
    // With several shapes to choose from nothing can be left out without asking which of them it is.
    objects.next().filter(|_| objects.next().is_none())
}

/// Outputs of a subgraph: where they leave it, and their names in the store.
///
/// A stage's outputs are its ports. A loop's are its carried values, then the metrics of each stage; in the store they are
/// called by their place, for names are in no key.
pub fn outputs(subgraph: &Subgraph) -> Vec<(Exit, String)> {
    match subgraph {
        Subgraph::Operator(operator) => {
            operator.ports.outputs.iter().map(|port| (Exit::Port(port.name.clone()), port.name.clone())).collect()
        }
        Subgraph::Loop(body) => {
            let carry = body.carry.keys().enumerate();
            let carry = carry.map(|(index, name)| (Exit::Kept(name.clone()), stored_value(index)));
            let stages = body.stages.keys().enumerate();
            carry.chain(stages.map(|(index, name)| (Exit::Metrics(name.clone()), stored_metrics(index)))).collect()
        }
    }
}

/// The same with their types. What a stage of a loop measured is of a type of its own.
pub(crate) fn typed_outputs(subgraph: &Subgraph) -> Vec<(Exit, String, PortType)> {
    let port_type = |exit: &Exit| match (subgraph, exit) {
        (Subgraph::Operator(operator), Exit::Port(name)) => operator.ports.find_output(name).map(|port| port.port_type),
        (Subgraph::Loop(body), Exit::Kept(name)) => body.carry.get(name).map(|carry| carry.port_type),
        _ => Some(PortType::Metrics),
    };
    let typed = |(exit, stored)| port_type(&exit).map(|port_type| (exit, stored, port_type));
    outputs(subgraph).into_iter().filter_map(typed).collect()
}

/// What the kept value of a carried place is called in the store.
pub(crate) fn stored_value(carry: usize) -> String {
    Slot::Carry(carry).to_string()
}

/// What the metrics of a stage's place are called in the store.
pub(crate) fn stored_metrics(stage: usize) -> String {
    Slot::Output(stage, "metrics".into()).to_string()
}

/// A preimage with the names of the file in place of places, for people.
pub fn with_names(preimage: &Json, names: &BTreeMap<String, String>) -> Json {
    let renamed = |text: &str| -> Option<String> {
        let (place, rest) = text.split_once('.').map_or((text, None), |(place, rest)| (place, Some(rest)));
        let name = names.get(place)?;
        Some(rest.map_or_else(|| name.clone(), |rest| format!("{name}.{rest}")))
    };
    match preimage {
        Json::Object(fields) => {
            let fields = fields.iter().map(|(name, value)| {
                // A configuration is the user's own text.
                let value = if name == "config" { value.clone() } else { with_names(value, names) };
                (renamed(name).unwrap_or_else(|| name.clone()), value)
            });
            Json::Object(fields.collect())
        }
        Json::Array(values) => Json::Array(values.iter().map(|value| with_names(value, names)).collect()),
        Json::String(text) => renamed(text).map_or_else(|| preimage.clone(), Json::String),
        other => other.clone(),
    }
}

/// What the places of a loop are called in the file: `s0` is `respond`.
pub fn names_of(subgraph: &Subgraph) -> BTreeMap<String, String> {
    let Subgraph::Loop(Loop { windows, carry, stages, .. }) = subgraph else { return BTreeMap::new() };
    fn numbered<'a, T>(
        letter: &'static str,
        map: &'a IndexMap<String, T>,
        prefix: &'static str,
    ) -> impl Iterator<Item = (String, String)> + 'a {
        map.keys().enumerate().map(move |(index, name)| (format!("{letter}{index}"), format!("{prefix}{name}")))
    }
    let stages = numbered::<BodyStage>("s", stages, "");
    stages.chain(numbered::<Carry>("c", carry, "carry.")).chain(numbered::<Window>("w", windows, "windows.")).collect()
}

#[cfg(test)]
mod tests;
