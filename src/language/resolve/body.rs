//! Loops: windows, carried values and the stages of a round.

use contract::PortType;
use indexmap::IndexMap;

use crate::graph::{BodyStage, Carry, Entry, Every, Exit, Keep, Loop, Operator, Origin, PortRef, Subgraph, Window};
use crate::language::diagnostic::{Diagnostic, Problems};
use crate::language::kinds::Kinds;
use crate::language::read::{self, Text};
use crate::language::resolve::config;
use crate::language::resolve::order::{Reading, order};
use crate::language::resolve::reference::{Outer, Output, Want, choose, outputs_of, split};
use crate::language::resolve::{Edge, PortsOf, Wired};
use crate::language::spec::{CarrySpec, InputSpec, KeepSpec, LoopSpec, OperatorSpec, Spec};
use crate::language::{Removed, removal};

/// A loop whose configurations are checked and whose carried values have types.
pub(super) struct Checked<'a> {
    spec: &'a LoopSpec,
    /// `None` for a stage at fault.
    operators: IndexMap<&'a str, Option<Operator>>,
    carried: IndexMap<&'a str, Option<(PortRef, PortType)>>,
    keep: IndexMap<&'a str, Keep>,
}

pub(super) fn check<'a>(
    name: &str,
    spec: &'a LoopSpec,
    all: &Spec,
    kinds: &Kinds,
    problems: &mut Problems,
) -> Option<Checked<'a>> {
    let operators: IndexMap<&str, Option<Operator>> = spec
        .stages
        .iter()
        .map(|(stage, spec)| {
            let info = config::kind(spec, kinds, problems);
            let operator = info.and_then(|info| config::operator(spec, info, &[], all.conventions, problems));
            (stage.as_str(), operator)
        })
        .collect();
    let inside = Inside { name, spec, operators: &operators, removed: &all.removed };
    let carried = spec.carry.iter().map(|(value, carry)| (value.as_str(), inside.next(value, carry, problems)));
    let carried = carried.collect();
    let keep = spec.carry.iter().filter_map(|(value, carry)| {
        let keep = inside.keep(value, carry, problems)?;
        Some((value.as_str(), keep))
    });
    let keep = keep.collect();
    Some(Checked { spec, operators, carried, keep })
}

/// What names mean in a loop before its edges are known.
struct Inside<'a> {
    name: &'a str,
    spec: &'a LoopSpec,
    operators: &'a IndexMap<&'a str, Option<Operator>>,
    removed: &'a [Removed],
}

impl Inside<'_> {
    /// The output that a carried value becomes, and its type.
    fn next(&self, value: &str, carry: &CarrySpec, problems: &mut Problems) -> Option<(PortRef, PortType)> {
        let text = carry.next.as_ref()?;
        let (stage, output) = split(&text.value);
        let Some(operator) = self.operators.get(stage) else {
            problems.push(self.unknown_stage(stage, text));
            return None;
        };
        let reader = format!("{}.carry.{value}.next", self.name);
        let want = Want { reader: &reader, port: value, port_type: None };
        let outputs = outputs_of(&operator.as_ref()?.ports);
        let found = choose(stage, output, &outputs, text, &want, self.removed, problems)?;
        Some((PortRef { stage: stage.to_owned(), port: found.name }, found.port_type))
    }

    fn keep(&self, value: &str, carry: &CarrySpec, problems: &mut Problems) -> Option<Keep> {
        match &carry.keep {
            KeepSpec::Last => Some(Keep::Last),
            KeepSpec::Best { metric: text, mode } => {
                let (stage, metric) = text.value.split_once('.').expect("read with a dot");
                if !self.operators.contains_key(stage) {
                    problems.push(self.unknown_stage(stage, text));
                    return None;
                }
                Some(Keep::Best { stage: stage.to_owned(), metric: metric.to_owned(), mode: *mode })
            }
            KeepSpec::With(text) => self.keep_with(value, text, problems),
        }
    }

    fn keep_with(&self, value: &str, text: &Text, problems: &mut Problems) -> Option<Keep> {
        let other = &text.value;
        let Some(leader) = self.spec.carry.get(other) else {
            let names = self.spec.carry.keys().map(String::as_str).filter(|name| *name != value);
            let keys = ["stages", self.name, "loop", "carry", other];
            problems.push(read::unknown("carried value", other, &text.span, names, self.removed, &keys));
            return None;
        };
        if let KeepSpec::With(further) = &leader.keep {
            let message = format!("`{value}` is kept with `{other}`, which is itself kept with `{}`", further.value);
            let diagnostic = Diagnostic::new(message, "name the value that has `keep`");
            problems.push(diagnostic.at(text.span.clone(), "here").also(further.span.clone(), "and here"));
            return None;
        }
        Some(Keep::With(other.clone()))
    }

    fn unknown_stage(&self, stage: &str, text: &Text) -> Diagnostic {
        let keys = ["stages", self.name, "loop", "stages", stage];
        read::unknown("stage", stage, &text.span, self.operators.keys().copied(), self.removed, &keys)
    }
}

impl<'a> Checked<'a> {
    /// The carried values, and the metrics of its stages as `STAGE.metrics`. `None` where a part of it is at fault, since
    /// what it would give is then not known.
    pub(super) fn outputs(&self) -> Option<Vec<Output>> {
        let whole = self.carried.values().all(Option::is_some) && self.operators.values().all(Option::is_some);
        if self.spec.broken || !whole {
            return None;
        }
        let carried = self.carried.iter().filter_map(|(name, carried)| {
            let (_, port_type) = carried.as_ref()?;
            Some(Output { name: (*name).to_owned(), exit: Exit::Kept((*name).to_owned()), port_type: *port_type })
        });
        let measured = self.operators.iter().filter_map(|(stage, operator)| {
            let port = operator.as_ref()?.ports.find_output("metrics")?;
            let exit = Exit::Metrics((*stage).to_owned());
            let port_type = port.port_type;
            (port_type == PortType::Metrics).then(|| Output { name: exit.to_string(), exit, port_type })
        });
        Some(carried.chain(measured).collect())
    }

    pub(super) fn wire(mut self, name: &str, outer: &Outer, problems: &mut Problems) -> Wired {
        let mut edges = Vec::new();
        for (window, spec) in &self.spec.windows {
            let Some(text) = &spec.of else { continue };
            let reader = format!("{name}.windows.{window}.of");
            let want = Want { reader: &reader, port: window, port_type: Some(PortType::Dataset) };
            if let Some((stage, output)) = outer.find(name, text, &want, problems) {
                edges.push(Edge::new(Entry::Window(window.clone()), stage, output, text.span.clone()));
            }
        }
        for (value, spec) in &self.spec.carry {
            let Some(text) = &spec.from else { continue };
            let reader = format!("{name}.carry.{value}.from");
            let Some((_, port_type)) = &self.carried[value.as_str()] else {
                // Its type is not known; that it exists can be checked all the same.
                outer.producer(name, text, &reader, problems);
                continue;
            };
            let want = Want { reader: &reader, port: value, port_type: Some(*port_type) };
            if let Some((stage, output)) = outer.find(name, text, &want, problems) {
                edges.push(Edge::new(Entry::Carry(value.clone()), stage, output, text.span.clone()));
            }
        }
        let mut reading = Reading::new();
        let nodes: IndexMap<&str, _> = self.spec.stages.keys().map(|n| (n.as_str(), reading.add_node(n))).collect();
        let mut inputs: IndexMap<&str, IndexMap<String, Origin>> = IndexMap::new();
        for (stage, spec) in &self.spec.stages {
            let Some(operator) = &self.operators[stage.as_str()] else { continue };
            let full = format!("{name}.{stage}");
            let keys = ["stages", name, "loop", "stages", stage];
            PortsOf { name: &full, keys: &keys, spec, operator, extra: &[] }.check(outer, problems);
            let reader = Reader { body: &self, name, stage, spec, operator, outer };
            let origins = inputs.entry(stage.as_str()).or_default();
            for (port, input) in &spec.inputs {
                let Some(origin) = reader.origin(port, input, &mut edges, problems) else { continue };
                if let Origin::Stage(read) = &origin {
                    reading.add_edge(nodes[read.stage.as_str()], nodes[stage.as_str()], input.source.span.clone());
                }
                origins.insert(port.clone(), origin);
            }
        }
        let ordered = match order(&reading, "read last round's value as `carry.NAME`") {
            Ok(ordered) => ordered.into_iter().map(|node| reading[node]).collect(),
            Err(circles) => {
                problems.0.extend(circles);
                Vec::new()
            }
        };
        let mut stages = IndexMap::new();
        for stage in ordered {
            let (Some(Some(operator)), Some(inputs)) = (self.operators.swap_remove(stage), inputs.swap_remove(stage))
            else {
                continue;
            };
            let every = self.spec.stages[stage].every.as_ref().map_or(Every::Round, |(every, _)| *every);
            stages.insert(stage.to_owned(), BodyStage { operator, every, inputs });
        }
        Wired { subgraph: Subgraph::Loop(self.finish(stages)), edges }
    }

    fn finish(mut self, stages: IndexMap<String, BodyStage>) -> Loop {
        let windows = self.spec.windows.iter().filter_map(|(name, spec)| {
            let fields = &spec.fields;
            let epochs = fields.epochs.as_ref().map(|(epochs, _)| *epochs);
            let (rows, order, seed, last) = (fields.rows, fields.order, fields.seed, fields.last);
            let places = fields.places.clone();
            Some((name.clone(), Window { rows, take: fields.take?, epochs, order, seed, last, places }))
        });
        let windows = windows.collect();
        let keep = &mut self.keep;
        let carry = self.carried.into_iter().filter_map(|(name, carried)| {
            let (next, port_type) = carried?;
            Some((name.to_owned(), Carry { port_type, next, keep: keep.swap_remove(name)? }))
        });
        let carry = carry.collect();
        let (rounds, unroll) = (self.spec.rounds, self.spec.unroll);
        Loop { windows, carry, stages, rounds, unroll, alone: false }
    }
}

/// A stage of a loop, looking for what it reads.
struct Reader<'a> {
    body: &'a Checked<'a>,
    /// Of the loop.
    name: &'a str,
    stage: &'a str,
    spec: &'a OperatorSpec,
    operator: &'a Operator,
    outer: &'a Outer<'a>,
}

impl Reader<'_> {
    /// Where an input comes from: a window, a carried value, a stage of the loop, or from outside, which adds an edge.
    fn origin(&self, port: &str, input: &InputSpec, edges: &mut Vec<Edge>, problems: &mut Problems) -> Option<Origin> {
        let known = self.operator.ports.find_input(port)?;
        let text = &input.source;
        let reader = format!("{}.{}.in.{port}", self.name, self.stage);
        let want = Want { reader: &reader, port, port_type: Some(known.port_type) };
        match split(&text.value) {
            ("windows", item) => {
                let windows = self.body.spec.windows.keys().map(String::as_str);
                let name = self.part("windows", "window", item, windows, text, problems)?;
                self.check_type(PortType::Dataset, text, &want, problems)?;
                Some(Origin::Window(name))
            }
            ("carry", item) => {
                let carried = self.body.spec.carry.keys().map(String::as_str);
                let name = self.part("carry", "carried value", item, carried, text, problems)?;
                let (_, port_type) = self.body.carried[name.as_str()].as_ref()?;
                self.check_type(*port_type, text, &want, problems)?;
                self.check_first_round(&name, known.required, text, problems);
                Some(Origin::Carry(name))
            }
            (stage, output) => match self.body.operators.get(stage) {
                Some(operator) => self.inside(stage, output, operator.as_ref()?, text, &want, problems),
                None => self.outside(stage, port, text, &want, edges, problems),
            },
        }
    }

    fn inside(
        &self,
        stage: &str,
        output: Option<&str>,
        operator: &Operator,
        text: &Text,
        want: &Want,
        problems: &mut Problems,
    ) -> Option<Origin> {
        if stage == self.stage {
            let diagnostic = Diagnostic::new(
                format!("`{}` reads its own output", want.reader),
                "read last round's value as `carry.NAME`",
            );
            problems.push(diagnostic.at(text.span.clone(), "reads itself"));
            return None;
        }
        let found = choose(stage, output, &outputs_of(&operator.ports), text, want, self.outer.removed, problems)?;
        self.check_rounds(stage, text, want, problems);
        Some(Origin::Stage(PortRef { stage: stage.to_owned(), port: found.name }))
    }

    fn outside(
        &self,
        stage: &str,
        port: &str,
        text: &Text,
        want: &Want,
        edges: &mut Vec<Edge>,
        problems: &mut Problems,
    ) -> Option<Origin> {
        let keys = ["stages", self.name, "loop", "stages", stage];
        if !self.outer.outputs.contains_key(stage) {
            // A name of the loop or one from outside: look near both.
            let inner = self.body.operators.keys().copied();
            let candidates = inner.chain(self.outer.outputs.keys().copied());
            let outer_keys = ["stages", stage];
            let keys = if removal(self.outer.removed, &keys).is_some() { &keys[..] } else { &outer_keys[..] };
            problems.push(read::unknown("stage", stage, &text.span, candidates, self.outer.removed, keys));
            return None;
        }
        let (stage, output) = self.outer.find(self.name, text, want, problems)?;
        edges.push(Edge::new(Entry::outside(self.stage, port), stage, output, text.span.clone()));
        Some(Origin::Outside)
    }

    /// The name in `windows.NAME` or `carry.NAME`.
    fn part<'n>(
        &self,
        section: &str,
        what: &str,
        item: Option<&str>,
        names: impl Iterator<Item = &'n str>,
        text: &Text,
        problems: &mut Problems,
    ) -> Option<String> {
        let names: Vec<&str> = names.collect();
        let item = item.unwrap_or_default();
        if names.contains(&item) {
            return Some(item.to_owned());
        }
        let keys = ["stages", self.name, "loop", section, item];
        problems.push(if item.is_empty() {
            let choices: Vec<String> = names.iter().map(|name| format!("{section}.{name}")).collect();
            let hint = format!("name one: {}", crate::language::diagnostic::quoted(choices));
            Diagnostic::new(format!("`{section}` alone names no {what}"), hint).at(text.span.clone(), "which one?")
        } else {
            read::unknown(what, item, &text.span, names, self.outer.removed, &keys)
        });
        None
    }

    fn check_type(&self, given: PortType, text: &Text, want: &Want, problems: &mut Problems) -> Option<()> {
        let wanted = want.port_type.filter(|wanted| *wanted != given);
        let Some(wanted) = wanted else { return Some(()) };
        let message = format!("`{}` takes `{wanted}`, but `{}` gives `{given}`", want.reader, text.value);
        let diagnostic = Diagnostic::new(message, format!("connect something that gives `{wanted}`"));
        problems.push(diagnostic.at(text.span.clone(), format!("this is `{given}`")));
        None
    }

    /// In round 0 a carried value is what `from` names: without it nothing is there.
    fn check_first_round(&self, name: &str, required: bool, text: &Text, problems: &mut Problems) {
        let carry = &self.body.spec.carry[name];
        if required && carry.from.is_none() {
            let message = format!("carried value `{name}` has no `from`, but the first round needs it");
            let diagnostic = Diagnostic::new(message, "write `from: STAGE` with what round 0 reads");
            problems
                .push(diagnostic.at(carry.span.clone(), "starts with nothing").also(text.span.clone(), "read here"));
        }
    }

    /// What runs now and then cannot feed what runs more often.
    fn check_rounds(&self, stage: &str, text: &Text, want: &Want, problems: &mut Problems) {
        let every = |spec: &OperatorSpec| spec.every.as_ref().map_or(Every::Round, |(every, _)| *every);
        let producer = &self.body.spec.stages[stage];
        if every(producer) == Every::Round || every(producer) == every(self.spec) {
            return;
        }
        let message = format!("`{}` reads `{stage}`, which does not run in all of its rounds", want.reader);
        let mut diagnostic = Diagnostic::new(message, "carry the value, and read its latest as `carry.NAME`")
            .at(text.span.clone(), "not there in every round");
        if let Some((_, span)) = &producer.every {
            diagnostic = diagnostic.also(span.clone(), "runs now and then");
        }
        problems.push(diagnostic);
    }
}
