//! The runner: from YAML text to a report. It touches no tensor.
//!
//! YAML text -> spec -> [`graph`] -> plan -> schedule -> report.

#![forbid(unsafe_code)]

pub mod diagnostic;
pub mod graph;
pub mod yaml;
