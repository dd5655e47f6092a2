//! A loop with its names resolved into places, once: what each stage reads, what is carried on, and what decides which round
//! is kept. Names stay with the [`Loop`], for people.

use std::fmt;

use anyhow::{Context, Result};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::graph::{Entry, Every, Keep, Loop, Mode, Origin, PortRef};

/// Where a value of a loop is held. Numbers are places among the loop's windows, carried values and stages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Slot {
    Window(usize),
    Carry(usize),
    Kept(usize),
    Output(usize, String),
    /// Inner state of a stage that is not started yet.
    State(usize),
}

/// As preimages call it.
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Window(window) => write!(f, "w{window}"),
            Slot::Carry(carry) => write!(f, "c{carry}"),
            Slot::Kept(carry) => write!(f, "c{carry}.kept"),
            Slot::Output(stage, port) => write!(f, "s{stage}.{port}"),
            Slot::State(stage) => write!(f, "s{stage}.state"),
        }
    }
}

/// A loop by places.
pub(crate) struct Program {
    /// What is carried from round to round.
    pub(crate) carry: Vec<Carried>,
    /// The stages in the order in which they run.
    pub(crate) stages: Vec<Stage>,
}

/// A carried value.
pub(crate) struct Carried {
    /// Where its first value enters.
    pub(crate) entry: Entry,
    /// The output that it is in the next round.
    pub(crate) next: Slot,
    /// Whether that output is made in every round.
    pub(crate) comes_every_round: bool,
    /// What decides which round's value leaves the loop.
    pub(crate) keep: Chosen,
}

/// What decides which round's value leaves the loop.
pub(crate) enum Chosen {
    /// The last round's does.
    Last,
    /// The best round's by what the stage measures.
    Best { stage: usize, metric: String, mode: Mode },
    /// That of the same round as another carried value.
    With(usize),
}

/// A stage.
pub(crate) struct Stage {
    /// What it reads.
    pub(crate) inputs: Vec<Input>,
    /// Whether it runs in every round.
    pub(crate) every_round: bool,
}

/// An input of a stage.
pub(crate) struct Input {
    /// Its port.
    pub(crate) port: String,
    /// Where its value is.
    pub(crate) source: Source,
}

/// Where the value of an input is.
#[derive(PartialEq)]
pub(crate) enum Source {
    /// The same in every round: it came in from outside.
    Outside(Entry),
    /// In the loop.
    Held(Slot),
}

impl Program {
    /// Errors when a name stands for nothing, which the front end lets nobody write.
    pub(crate) fn of(body: &Loop) -> Result<Program> {
        let stages = body.stages.iter().map(|(name, stage)| {
            let inputs = stage.inputs.iter().map(|(port, origin)| {
                let source = match origin {
                    Origin::Outside => Source::Outside(Entry::outside(name, port)),
                    Origin::Window(window) => Source::Held(Slot::Window(place(&body.windows, window)?)),
                    Origin::Carry(carry) => Source::Held(Slot::Carry(place(&body.carry, carry)?)),
                    Origin::Stage(output) => Source::Held(output_of(body, output)?),
                };
                Ok(Input { port: port.clone(), source })
            });
            Ok(Stage { inputs: inputs.collect::<Result<_>>()?, every_round: stage.every == Every::Round })
        });
        let carry = body.carry.iter().map(|(name, carry)| {
            let keep = match &carry.keep {
                Keep::Last => Chosen::Last,
                Keep::Best { stage, metric, mode } => {
                    Chosen::Best { stage: place(&body.stages, stage)?, metric: metric.clone(), mode: *mode }
                }
                Keep::With(other) => Chosen::With(place(&body.carry, other)?),
            };
            let comes_every_round = body.stages.get(&carry.next.stage).is_some_and(|stage| stage.every == Every::Round);
            Ok(Carried {
                entry: Entry::Carry(name.clone()),
                next: output_of(body, &carry.next)?,
                comes_every_round,
                keep,
            })
        });
        Ok(Program { carry: carry.collect::<Result<_>>()?, stages: stages.collect::<Result<_>>()? })
    }
}

impl Stage {
    /// Whether it reads what a slot holds.
    pub(crate) fn reads(&self, slot: &Slot) -> bool {
        self.inputs.iter().any(|input| matches!(&input.source, Source::Held(read) if read == slot))
    }
}

fn output_of(body: &Loop, output: &PortRef) -> Result<Slot> {
    Ok(Slot::Output(place(&body.stages, &output.stage)?, output.port.clone()))
}

fn place<T>(among: &IndexMap<String, T>, name: &str) -> Result<usize> {
    among.get_index_of(name).with_context(|| format!("the loop has nothing called `{name}`: a fault of this program"))
}
