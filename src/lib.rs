//! The runner: from YAML text to a report. It touches no tensor.
//!
//! YAML text -> spec -> [`graph`] -> [`plan`] -> [`schedule`] -> [`report`].

mod attempt;
pub mod catalogue;
mod cli;
pub mod commands;
mod device;
pub mod diagnostic;
pub mod draw;
pub mod events;
#[cfg(test)]
mod fake;
#[cfg(test)]
#[path = "../tests/it/fakes.rs"]
#[allow(unreachable_pub, reason = "the program with fake stages is made of the same file")]
mod fakes;
mod foresee;
pub mod graph;
pub mod history;
pub mod key;
pub mod language;
mod memory;
mod output;
pub mod plan;
mod protocol;
pub mod report;
mod resolve;
pub mod results;
pub mod rounds;
mod run_folder;
pub mod schedule;
pub mod selection;
mod signals;
mod slots;
mod sources;
pub mod table;
mod terminal;
pub mod trouble;
mod worker;
pub mod yaml;

pub use commands::{Extras, main};
