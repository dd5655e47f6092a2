//! Events: all that people and programs see of a run comes from these. One versioned schema, written to `events.jsonl` of
//! the run and, with `--json`, to standard output.
//!
//! Version 1. Fields may be added within a version, with a default, since events of earlier programs are read, too; a changed
//! meaning is a new one.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::ground::trouble::Fault;

/// Version of the schema.
pub(crate) const SCHEMA: u32 = 1;

/// Something that happened. `stage` is the name for people, `part` the stage within a loop.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// The first one.
    RunStarted {
        /// [`SCHEMA`].
        schema: u32,
        /// Identifier of the run, the name of its folder.
        run: String,
        /// Pipeline file as given.
        pipeline: String,
        /// `cpu` or `cuda:N`, one for each that is used.
        devices: Vec<String>,
        /// Threads of each worker.
        threads: usize,
        /// Selected stages.
        stages: Vec<String>,
    },
    /// Its result was in the store.
    StageReused {
        /// Name for people.
        stage: String,
        /// Key.
        key: String,
        /// Seconds it took when it was made.
        recorded_seconds: Option<f64>,
        /// What it measured.
        metrics: Map<String, Json>,
    },
    /// Another process runs the same key; its result will be used.
    StageWaiting {
        /// Name for people.
        stage: String,
        /// Key.
        key: String,
    },
    /// A worker runs it.
    StageStarted {
        /// Name for people.
        stage: String,
        /// Key.
        key: String,
        /// Why it runs.
        #[serde(default)]
        reason: String,
        /// Where the worker's own words go.
        log: String,
    },
    /// It goes on from a cut.
    StageResumed {
        /// Name for people.
        stage: String,
        /// Rounds done.
        round: u64,
        /// Rounds it has.
        rounds: u64,
    },
    /// So far, in units.
    StageProgress {
        /// Name for people.
        stage: String,
        /// Stage within a loop.
        part: Option<String>,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
        /// What is counted.
        unit: String,
    },
    /// A row of metrics; not every row, for the artifact has them all.
    StageMetrics {
        /// Name for people.
        stage: String,
        /// Stage within a loop.
        part: Option<String>,
        /// The row.
        row: Map<String, Json>,
    },
    /// Something to know that is no failure.
    StageWarned {
        /// Name for people.
        stage: String,
        /// Stage within a loop.
        part: Option<String>,
        /// In words.
        text: String,
    },
    /// Something worth knowing.
    StageNoted {
        /// Name for people.
        stage: String,
        /// Stage within a loop.
        part: Option<String>,
        /// In words.
        text: String,
    },
    /// A cut was kept: a restart goes on from here.
    StageCut {
        /// Name for people.
        stage: String,
        /// Rounds done.
        round: u64,
        /// Rounds it has.
        rounds: u64,
    },
    /// It ran and its result is in the store.
    StageFinished {
        /// Name for people.
        stage: String,
        /// Key.
        key: String,
        /// Why it ran.
        #[serde(default)]
        reason: String,
        /// Seconds, over all attempts.
        seconds: f64,
        /// What it measured.
        metrics: Map<String, Json>,
    },
    /// It went wrong.
    StageFailed {
        /// Name for people.
        stage: String,
        /// What is to blame.
        #[serde(default)]
        fault: Fault,
        /// What went wrong.
        error: String,
        /// Where the worker's own words are; empty when none was started.
        log: String,
        /// Their end.
        log_end: Vec<String>,
    },
    /// It needs a stage that failed.
    StageSkipped {
        /// Name for people.
        stage: String,
        /// The stage that failed.
        needs: String,
    },
    /// The run was told to stop: what runs keeps what it can and ends.
    RunStopping {
        /// The signal that told it.
        signal: i32,
        /// Seconds it takes at most.
        seconds: f64,
    },
    /// It was interrupted; where a cut was kept, the next run goes on there.
    StageStopped {
        /// Name for people.
        stage: String,
        /// Rounds done and all rounds, where a cut was kept.
        cut: Option<(u64, u64)>,
    },
    /// The last one.
    RunFinished {
        /// How it ended.
        status: Status,
        /// Stages that ran.
        ran: usize,
        /// Stages whose result was in the store, or came from another process.
        reused: usize,
        /// Stages that went wrong.
        failed: usize,
        /// Seconds of the run.
        seconds: f64,
    },
}

impl Event {
    /// The stage that it is about.
    pub(crate) fn stage(&self) -> Option<&str> {
        match self {
            Event::StageReused { stage, .. }
            | Event::StageWaiting { stage, .. }
            | Event::StageStarted { stage, .. }
            | Event::StageResumed { stage, .. }
            | Event::StageProgress { stage, .. }
            | Event::StageMetrics { stage, .. }
            | Event::StageWarned { stage, .. }
            | Event::StageNoted { stage, .. }
            | Event::StageCut { stage, .. }
            | Event::StageFinished { stage, .. }
            | Event::StageFailed { stage, .. }
            | Event::StageSkipped { stage, .. }
            | Event::StageStopped { stage, .. } => Some(stage),
            Event::RunStarted { .. } | Event::RunStopping { .. } | Event::RunFinished { .. } => None,
        }
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    /// Every selected stage has its result.
    Done,
    /// A stage went wrong.
    Failed,
    /// It was told to stop.
    Interrupted,
}

/// Shows events to someone.
pub(crate) trait Reporter {
    /// Shows one. What cannot be shown does not stop a run, whose results are in the store.
    fn show(&mut self, event: &Event);

    /// After the last event: an error when some could not be shown.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Writes every event to `events.jsonl` and hands it to a reporter.
pub(crate) struct EventLog<'a> {
    /// None where nothing is kept of the run.
    file: Option<File>,
    /// Whether a write has failed; said once.
    failed: bool,
    reporter: &'a mut dyn Reporter,
}

impl<'a> EventLog<'a> {
    /// Makes `events.jsonl` in the folder of a run, if there is one.
    pub(crate) fn create(run: Option<&Path>, reporter: &'a mut dyn Reporter) -> Result<Self> {
        let create = |run: &Path| {
            let path = run.join("events.jsonl");
            File::create(&path).with_context(|| format!("cannot write `{}`", path.display()))
        };
        let file = run.map(create).transpose()?;
        Ok(EventLog { file, failed: false, reporter })
    }

    /// Writes and shows an event. A full disk does not stop a run over its diary: the store will notice by itself.
    pub(crate) fn send(&mut self, event: &Event) {
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(line(event).as_bytes())
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::warn!(%error, "cannot write events; the run goes on without");
        }
        self.reporter.show(event);
    }
}

/// An event as a line of JSON.
pub(crate) fn line(event: &Event) -> String {
    let mut text = serde_json::to_string(event).expect("an event is JSON");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_event_has_exactly_the_promised_form() {
        let event = Event::RunFinished { status: Status::Done, ran: 2, reused: 3, failed: 0, seconds: 1.5 };
        assert_eq!(
            line(&event),
            "{\"event\":\"run_finished\",\"status\":\"done\",\"ran\":2,\"reused\":3,\"failed\":0,\"seconds\":1.5}\n"
        );
    }
}
