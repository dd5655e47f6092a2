//! A run as its events tell it, finished or not, here or on another machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use indexmap::{IndexMap, IndexSet};
use serde_json::{Map, Value as Json};

use crate::events::{Event, Status};

/// What has happened in a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Diary {
    /// Identifier of the run.
    pub run: String,
    /// What it ran on.
    pub devices: Vec<String>,
    pub threads: usize,
    /// How it ended; nothing while it goes on, and where it was killed.
    pub status: Option<Status>,
    /// Seconds of the run, when it is over.
    pub seconds: Option<f64>,
    /// All that are selected, by the name that the run gives them.
    pub stages: IndexMap<String, Stage>,
    /// Names of those of which anything was heard, in the order of that.
    heard: IndexSet<String>,
}

/// A stage in a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stage {
    /// Where it came to be known.
    pub key: Option<String>,
    pub fate: Fate,
    /// Why it runs or ran.
    pub reason: Option<String>,
    /// Seconds it took, in this run or when its result was made.
    pub seconds: Option<f64>,
    /// What is done, of what, in which unit.
    pub progress: Option<(u64, u64, String)>,
    /// What it measured on the way, by its part; not every row.
    pub rows: BTreeMap<Option<String>, Vec<Map<String, Json>>>,
}

/// What became of a stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Fate {
    /// It has not begun.
    #[default]
    Waiting,
    /// Another process runs it.
    Elsewhere,
    /// It began.
    Running,
    Ran,
    Reused,
    /// What went wrong, and where its own words are.
    Failed {
        error: String,
        log: String,
    },
    /// It needs a stage that failed.
    Skipped {
        needs: String,
    },
    /// It was told to stop.
    Stopped,
}

impl Diary {
    /// Reads the folder of a run. A line that is no event, such as the torn last one of a run that was killed, says nothing.
    pub(crate) fn read(folder: &Path) -> Option<Diary> {
        let bytes = fs::read(folder.join("events.jsonl")).ok()?;
        let mut diary = Diary::default();
        for line in bytes.split(|byte| *byte == b'\n') {
            if let Ok(event) = serde_json::from_slice(line) {
                diary.note(event);
            }
        }
        (!diary.run.is_empty()).then_some(diary)
    }

    /// The stages of which anything was heard, in the order of that.
    pub(crate) fn heard(&self) -> impl Iterator<Item = (&String, &Stage)> {
        self.heard.iter().filter_map(|name| self.stages.get_key_value(name))
    }

    fn stage(&mut self, name: String) -> &mut Stage {
        self.stages.entry(name).or_default()
    }

    fn set(&mut self, name: String, key: Option<String>, fate: Fate, reason: Option<String>, seconds: Option<f64>) {
        let stage = self.stage(name);
        let key = key.or_else(|| stage.key.take());
        *stage = Stage { key, fate, reason, seconds, ..std::mem::take(stage) };
    }

    fn note(&mut self, event: Event) {
        if let Some(stage) = event.stage()
            && !self.heard.contains(stage)
        {
            self.heard.insert(stage.to_owned());
        }
        match event {
            Event::RunStarted { run, devices, threads, stages, .. } => {
                (self.run, self.devices, self.threads) = (run, devices, threads);
                for stage in stages {
                    self.stage(stage);
                }
            }
            Event::StageReused { stage, key, recorded_seconds, .. } => {
                self.set(stage, Some(key), Fate::Reused, None, recorded_seconds);
            }
            Event::StageWaiting { stage, key } => self.set(stage, Some(key), Fate::Elsewhere, None, None),
            Event::StageStarted { stage, key, reason, .. } => {
                self.set(stage, Some(key), Fate::Running, Some(reason), None);
            }
            Event::StageResumed { stage, .. } => {
                let reason = self.stage(stage.clone()).reason.take();
                self.set(stage, None, Fate::Running, reason, None);
            }
            Event::StageFinished { stage, key, reason, seconds, .. } => {
                self.set(stage, Some(key), Fate::Ran, Some(reason), Some(seconds));
            }
            Event::StageFailed { stage, error, log, .. } => {
                self.set(stage, None, Fate::Failed { error, log }, None, None);
            }
            Event::StageSkipped { stage, needs } => self.set(stage, None, Fate::Skipped { needs }, None, None),
            Event::StageStopped { stage, .. } => self.set(stage, None, Fate::Stopped, None, None),
            Event::StageProgress { stage, part: None, done, total, unit } => {
                self.stage(stage).progress = Some((done, total, unit));
            }
            Event::StageMetrics { stage, part, row } => self.stage(stage).rows.entry(part).or_default().push(row),
            Event::RunFinished { status, seconds, .. } => (self.status, self.seconds) = (Some(status), Some(seconds)),
            Event::StageProgress { .. }
            | Event::StageWarned { .. }
            | Event::StageNoted { .. }
            | Event::StageCut { .. }
            | Event::RunStopping { .. } => {}
        }
    }

    /// What became of a stage: by its key, else by its name.
    pub(crate) fn of(&self, key: Option<&str>, name: &str) -> Option<&Stage> {
        let by_key = key.and_then(|key| self.stages.values().find(|stage| stage.key.as_deref() == Some(key)));
        by_key.or_else(|| self.stages.get(name).filter(|stage| key.is_none() || stage.key.is_none()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_killed_is_read_up_to_there() {
        let folder = tempfile::tempdir().unwrap();
        let events = [
            r#"{"event":"run_started","schema":1,"run":"r1","pipeline":"p.yaml","devices":["cpu"],"threads":2,"stages":["a","b","c"]}"#,
            r#"{"event":"stage_reused","stage":"a","key":"k1","recorded_seconds":1.0,"metrics":{}}"#,
            r#"{"event":"of_the_future","stage":"a"}"#,
            r#"{"event":"stage_started","stage":"b","key":"k2","reason":"x","log":"b.log"}"#,
            r#"{"event":"stage_metrics","stage":"b","part":null,"row":{"loss":2.5}}"#,
            r#"{"event":"stage_failed","stage":"b","fault":"memory","error":"too large","log":"b.log","log_end":[]}"#,
            r#"{"event":"stage_skipped","stage":"c","nee"#,
        ];
        fs::write(folder.path().join("events.jsonl"), events.join("\n")).unwrap();
        let diary = Diary::read(folder.path()).unwrap();
        assert_eq!((diary.run.as_str(), diary.status, diary.threads), ("r1", None, 2));
        assert_eq!(diary.of(Some("k1"), "elsewhere").unwrap().fate, Fate::Reused);
        let failed = diary.of(Some("k2"), "b").unwrap();
        assert_eq!(failed.fate, Fate::Failed { error: "too large".into(), log: "b.log".into() });
        assert_eq!(failed.rows[&None][0]["loss"], 2.5);
        assert_eq!(diary.of(None, "c").unwrap().fate, Fate::Waiting);
        assert!(Diary::read(&folder.path().join("none")).is_none());
    }
}
