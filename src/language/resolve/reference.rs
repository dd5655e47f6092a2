//! Finds the output that a reference such as `data.train` means.

use contract::{PortType, Ports};
use indexmap::IndexMap;

use crate::graph::Exit;
use crate::language::diagnostic::{Diagnostic, Problems, did_you_mean, quoted};
use crate::language::read::{self, Text};
use crate::language::{Removed, removal};

/// Something that can be read.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Output {
    /// What stands after the dot.
    pub(super) name: String,
    /// Where it leaves its subgraph.
    pub(super) exit: Exit,
    pub(super) port_type: PortType,
}

/// All outputs of a kind, under their own names.
pub(super) fn outputs_of(ports: &Ports) -> Vec<Output> {
    let output = |port: &contract::Port| Output {
        name: port.name.clone(),
        exit: Exit::Port(port.name.clone()),
        port_type: port.port_type,
    };
    ports.outputs.iter().map(output).collect()
}

/// What reads.
pub(super) struct Want<'a> {
    /// How the reader is called in messages: `train.learn.in.data`.
    pub(super) reader: &'a str,
    /// A name that decides among several outputs: the reading port's.
    pub(super) port: &'a str,
    /// The type that fits, where it is known.
    pub(super) port_type: Option<PortType>,
}

/// What top-level stages give. `None` for one that is itself at fault: nothing more is said of it.
pub(super) struct Outer<'a> {
    pub(super) outputs: IndexMap<&'a str, Option<Vec<Output>>>,
    pub(super) removed: &'a [Removed],
}

impl Outer<'_> {
    /// The stage and the output that `text` means, read from the top-level stage `own`.
    pub(super) fn find(
        &self,
        own: &str,
        text: &Text,
        want: &Want,
        problems: &mut Problems,
    ) -> Option<(String, Output)> {
        let outputs = self.producer(own, text, want.reader, problems)?;
        let (stage, output) = split(&text.value);
        let found = choose(stage, output, outputs, text, want, self.removed, problems)?;
        Some((stage.to_owned(), found))
    }

    /// The outputs of the stage that `text` names; `None` where there is no such stage or where it is itself at fault.
    pub(super) fn producer(&self, own: &str, text: &Text, reader: &str, problems: &mut Problems) -> Option<&[Output]> {
        let (stage, _) = split(&text.value);
        let diagnostic = if stage == own {
            Diagnostic::new(
                format!("`{reader}` reads `{own}`, which it is or is part of"),
                "a value comes back to its own loop as `carry.NAME`",
            )
            .at(text.span.clone(), "reads itself")
        } else if let Some(outputs) = self.outputs.get(stage) {
            return outputs.as_deref();
        } else if matches!(stage, "windows" | "carry") {
            Diagnostic::new(
                format!("`{reader}` reads `{}`, but it is in no loop", text.value),
                "name a stage; windows and carried values are there for the stages of their loop",
            )
            .at(text.span.clone(), "only in a loop")
        } else {
            let names = self.outputs.keys().copied();
            read::unknown("stage", stage, &text.span, names, self.removed, &["stages", stage])
        };
        problems.push(diagnostic);
        None
    }
}

/// A reference's stage and, where it is written, its output.
pub(super) fn split(text: &str) -> (&str, Option<&str>) {
    match text.split_once('.') {
        Some((stage, output)) => (stage, Some(output)),
        None => (text, None),
    }
}

/// The output meant: the one named; otherwise the only one, the one named like the port, or the only one that fits.
pub(super) fn choose(
    stage: &str,
    output: Option<&str>,
    outputs: &[Output],
    text: &Text,
    want: &Want,
    removed: &[Removed],
    problems: &mut Problems,
) -> Option<Output> {
    let fits = |candidate: &&Output| want.port_type.is_none_or(|port_type| candidate.port_type == port_type);
    let found = match output {
        Some(name) => outputs.iter().find(|candidate| candidate.name == name),
        None if outputs.len() == 1 => outputs.first(),
        None => outputs.iter().find(|candidate| candidate.name == want.port).or_else(|| {
            let mut fitting = outputs.iter().filter(fits);
            fitting.next().filter(|_| fitting.next().is_none())
        }),
    };
    let diagnostic = match found {
        Some(found) if fits(&found) => return Some(found.clone()),
        Some(found) => wrong_type(stage, found, outputs, text, want),
        None => not_found(stage, output, outputs, text, want, removed),
    };
    problems.push(diagnostic);
    None
}

fn wrong_type(stage: &str, found: &Output, outputs: &[Output], text: &Text, want: &Want) -> Diagnostic {
    let wanted = want.port_type.expect("any type fits where none is wanted");
    let fitting = outputs.iter().filter(|other| other.port_type == wanted).map(|o| format!("{stage}.{}", o.name));
    let fitting: Vec<String> = fitting.collect();
    let hint = if fitting.is_empty() {
        format!("connect a stage that gives `{wanted}`")
    } else {
        format!("write {}", quoted(&fitting))
    };
    let given = &found.port_type;
    Diagnostic::new(format!("`{}` takes `{wanted}`, but `{}` gives `{given}`", want.reader, text.value), hint)
        .at(text.span.clone(), format!("this is `{given}`"))
}

fn not_found(
    stage: &str,
    output: Option<&str>,
    outputs: &[Output],
    text: &Text,
    want: &Want,
    removed: &[Removed],
) -> Diagnostic {
    let names = outputs.iter().map(|output| output.name.as_str());
    let Some(name) = output else {
        let choices: Vec<String> = outputs.iter().map(|output| format!("{stage}.{}", output.name)).collect();
        let message = format!("`{}` reads `{stage}`, which has {} outputs", want.reader, outputs.len());
        let hint = if choices.is_empty() {
            format!("`{stage}` only writes files; read another stage")
        } else {
            format!("name one: {}", quoted(&choices))
        };
        return Diagnostic::new(message, hint).at(text.span.clone(), "which one is meant?");
    };
    // A carried value is an output of its loop, and a variant may have taken it away.
    let keys = ["stages", stage, "loop", "carry", name];
    if removal(removed, &keys).is_some() {
        return read::unknown("carried value", name, &text.span, names, removed, &keys);
    }
    let hint = did_you_mean(name, "output", names);
    Diagnostic::new(format!("`{stage}` has no output `{name}`"), hint).at(text.span.clone(), "not found")
}
