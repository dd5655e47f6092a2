//! What a run would take: how much of it is there, how long the rest took when it was last made, and whether the disk has room.

use anyhow::Result;
use cache::Store;
use contract::files::{counted, in_words as bytes};
use serde_json::{Value as Json, json};

use super::BadRequest;
use crate::graph::Graph;
use crate::plan::history::{Cost, History};
use crate::plan::selection::Selection;
use crate::plan::{Plan, Step};
use crate::report::duration;

/// Sums over a plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outlook {
    cells: usize,
    /// Stages of all cells, as if none were shared.
    written: usize,
    stages: usize,
    cached: usize,
    /// Of what is not cached: what it took last time, and how many stages never ran.
    expected: Cost,
    unknown: usize,
}

impl Outlook {
    /// Sums over a plan for a graph.
    pub(crate) fn of(graph: &Graph, selection: &Selection, plan: &Plan, history: &History, store: &Store) -> Self {
        let aliases = selection.order.iter().map(|node| selection.aliases[node].len());
        let mut outlook = Outlook {
            cells: graph.cells.len(),
            written: aliases.sum(),
            stages: selection.order.len(),
            ..Outlook::default()
        };
        for (node, step) in &plan.steps {
            if step.settled().is_some() {
                outlook.cached += 1;
            } else if let Some(cost) = history.cost(&selection.aliases[node], store) {
                outlook.expected.seconds += cost.seconds;
                outlook.expected.bytes += cost.bytes;
            } else {
                outlook.unknown += 1;
            }
        }
        outlook
    }

    /// Whether anything has to run.
    pub(crate) fn has_work(&self) -> bool {
        self.cached < self.stages
    }

    /// In one line: `12 cells, 30 distinct stages (58 % shared): 10 cached, 20 to run at most, about 2 h 03 min`.
    pub(crate) fn line(&self) -> String {
        let Outlook { cells, written, stages, cached, expected, unknown } = self;
        let shared = match (cells, written.saturating_sub(*stages)) {
            (0 | 1, _) => String::new(),
            (cells, saved) => {
                let percent = 100.0 * saved as f64 / *written.max(&1) as f64;
                format!(
                    "{}, {} ({percent:.0} % shared): ",
                    counted(*cells as u64, "cell"),
                    counted(*stages as u64, "distinct stage")
                )
            }
        };
        let left = stages - cached;
        let time = match left - unknown {
            0 => String::new(),
            _ => format!(", about {} and {}", duration(expected.seconds), bytes(expected.bytes)),
        };
        let unknown = match (left, unknown) {
            (0, _) | (_, 0) => String::new(),
            (left, unknown) if left == *unknown => ", never made before".into(),
            (_, unknown) => format!(" beside {unknown} never made before"),
        };
        format!("{shared}{cached} cached, {left} to run at most{time}{unknown}")
    }

    /// For programs.
    pub(crate) fn to_json(&self) -> Json {
        json!({
            "cells": self.cells, "stages": self.stages, "written": self.written, "cached": self.cached,
            "expected_seconds": self.expected.seconds, "expected_bytes": self.expected.bytes, "never_made": self.unknown,
        })
    }

    /// An error where what is to run took more than the disk has left when it was last made.
    pub(crate) fn check_room(&self, store: &Store) -> Result<()> {
        // Of a file system that does not say it there is enough.
        let Some(free) = free(store) else { return Ok(()) };
        if self.expected.bytes <= free {
            return Ok(());
        }
        let message = format!(
            "the results would take about {}, as they did last time, and {} are free under the store `{}`; make room, for \
             example with `pipeline cache gc`",
            bytes(self.expected.bytes),
            bytes(free),
            store.root().display()
        );
        Err(BadRequest(message).into())
    }
}

/// Bytes that are free under a store.
fn free(store: &Store) -> Option<u64> {
    let there = store.root().ancestors().find(|folder| folder.exists())?;
    let found = rustix::fs::statvfs(there).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// What a stage that is to run took last time, for the end of its line.
pub(crate) fn expected(step: &Step, cost: Option<Cost>) -> String {
    match (step.settled(), cost) {
        (None, Some(cost)) => format!("  (took {} last time)", duration(cost.seconds)),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_there_and_what_the_rest_took() {
        let outlook = Outlook { cells: 1, written: 7, stages: 7, cached: 7, ..Outlook::default() };
        assert_eq!(outlook.line(), "7 cached, 0 to run at most");
        let expected = Cost { seconds: 7384.0, bytes: 3 << 30 };
        let outlook = Outlook { cells: 12, written: 72, stages: 30, cached: 10, expected, unknown: 0 };
        let text =
            "12 cells, 30 distinct stages (58 % shared): 10 cached, 20 to run at most, about 2 h 03 min and 3.0 GiB";
        assert_eq!(outlook.line(), text);
        assert_eq!(Outlook { unknown: 3, ..outlook.clone() }.line(), format!("{text} beside 3 never made before"));
        let fresh = Outlook { cells: 1, written: 7, stages: 7, unknown: 7, ..Outlook::default() };
        assert_eq!(fresh.line(), "0 cached, 7 to run at most, never made before");
    }
}
