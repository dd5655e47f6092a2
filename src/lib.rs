//! The runner: from YAML text to a report. It touches no tensor.
//!
//! YAML text -> [`language`] -> [`graph`] -> [`plan`] -> [`run`] -> [`report`]. What is above in the list of modules stands on
//! what is below, and never the other way round.

mod cli;
mod commands;

pub mod language;
pub mod plan;
mod report;
pub mod rounds;
mod run;

mod events;
pub mod graph;

mod ground;

#[cfg(test)]
mod fake;
#[cfg(test)]
#[path = "../tests/it/fakes.rs"]
#[allow(unreachable_pub, reason = "the program with fake stages is made of the same file")]
mod fakes;

pub use commands::{Extras, main};
