//! The runner: from YAML text to a report. It touches no tensor.
//!
//! YAML text -> spec -> [`graph`] -> plan -> schedule -> report.

#![forbid(unsafe_code)]

pub mod catalogue;
pub mod diagnostic;
pub mod draw;
#[cfg(test)]
mod fake;
pub mod graph;
pub mod language;
mod resolve;
pub mod yaml;
