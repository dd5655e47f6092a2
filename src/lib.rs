//! The runner: from YAML text to a report. It touches no tensor.
//!
//! YAML text -> spec -> [`graph`] -> plan -> schedule -> report.

#![forbid(unsafe_code)]

mod attempt;
mod cli;
pub mod commands;
mod device;
pub mod events;
pub mod graph;
pub mod history;
pub mod key;
pub mod plan;
mod protocol;
pub mod report;
pub mod results;
pub mod rounds;
pub mod schedule;
pub mod selection;
pub mod table;
mod worker;
