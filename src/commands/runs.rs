//! `pipeline runs`, `logs` and `status`: what earlier runs did, and what goes on now.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value as Json, json};

use super::{BadRequest, existing_store, pretty, say};
use crate::cli::{LogsArgs, RunsArgs, StatusArgs};
use crate::events::Status;
use crate::ground::signals;
use crate::ground::terminal::printable;
use crate::plan::history::{PastRun, find_run, past_runs};
use crate::report::diary::{Diary, Fate, Stage};
use crate::report::duration;
use crate::run::folder::{is_going_on, logs_of};

/// Lists runs, the newest last; or the stages of one.
pub(crate) fn runs(args: &RunsArgs) -> Result<()> {
    let store = existing_store(&args.store)?;
    if let Some(name) = &args.run {
        let run = find_run(&store, name)?;
        return one(&run, args.json);
    }
    let mut runs: Vec<PastRun> = past_runs(&store).take(args.last).collect();
    runs.reverse();
    let mut text = String::new();
    let mut all = Vec::new();
    for run in &runs {
        let diary = read(run);
        let state = state(run, &diary);
        let count = |word: &str| diary.stages.values().filter(|stage| word_of(&stage.fate) == word).count();
        let [ran, reused, failed] = ["ran", "reused", "failed"].map(count);
        let counts = format!("{ran} ran, {reused} reused");
        let and_failed = if failed > 0 { format!(", {failed} failed") } else { String::new() };
        let took = diary.seconds.map(duration).unwrap_or_default();
        text +=
            format!("{}  {state:<11}  {took:>12}  {}  {counts}{and_failed}", run.id, printable(&run.pipeline.pipeline))
                .trim_end();
        text.push('\n');
        all.push(json!({
            "run": run.id, "pipeline": run.pipeline.pipeline, "path": run.pipeline.path, "state": state,
            "ran": ran, "reused": reused, "failed": failed, "seconds": diary.seconds,
        }));
    }
    say(&if args.json { pretty(&Json::Array(all)) } else { text })
}

/// The stages of one run.
fn one(run: &PastRun, as_json: bool) -> Result<()> {
    let diary = read(run);
    if as_json {
        let shown = json!({
            "run": run.id, "pipeline": run.pipeline.pipeline, "state": state(run, &diary), "stages": for_programs(&diary),
        });
        return say(&pretty(&shown));
    }
    let stages: Vec<(&String, &Stage)> = diary.heard().collect();
    say(&format!("{}  {}  {}\n{}", run.id, run.pipeline.pipeline, state(run, &diary), lines(&stages)))
}

/// Nothing has happened where no events can be read.
fn read(run: &PastRun) -> Diary {
    Diary::read(&run.folder).unwrap_or_default()
}

/// What became of a stage, in the words of the console.
fn word_of(fate: &Fate) -> &'static str {
    match fate {
        Fate::Waiting => "",
        Fate::Elsewhere => "waiting",
        Fate::Running => "running",
        Fate::Ran => "ran",
        Fate::Reused => "reused",
        Fate::Failed { .. } => "failed",
        Fate::Skipped { .. } => "skipped",
        Fate::Stopped => "stopped",
    }
}

/// Why it ran, or what went wrong.
fn text_of(stage: &Stage) -> Option<String> {
    match &stage.fate {
        Fate::Elsewhere => Some("another process runs it".into()),
        Fate::Failed { error, .. } => Some(error.clone()),
        Fate::Skipped { needs } => Some(format!("needs `{needs}`")),
        _ => stage.reason.clone(),
    }
}

/// The stages of which anything was heard.
fn for_programs(diary: &Diary) -> serde_json::Map<String, Json> {
    let shown = |stage: &Stage| {
        let progress = stage.progress.as_ref();
        let progress = progress.map(|(done, total, unit)| json!({"done": done, "total": total, "unit": unit}));
        let (state, text) = (word_of(&stage.fate), text_of(stage));
        json!({"state": state, "key": stage.key, "seconds": stage.seconds, "progress": progress, "text": text})
    };
    diary.heard().map(|(name, stage)| (name.clone(), shown(stage))).collect()
}

/// A line for each stage.
fn lines(stages: &[(&String, &Stage)]) -> String {
    let width = stages.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
    let line = |(name, stage): &(&String, &Stage)| {
        let took = stage.seconds.map(duration).unwrap_or_default();
        let progress = stage.progress.as_ref().filter(|_| stage.fate == Fate::Running);
        let what = progress.map(|(done, total, unit)| format!("{done} of {total} {unit}"));
        let what = what.or_else(|| text_of(stage)).unwrap_or_default();
        let word = word_of(&stage.fate);
        format!("  {word:<8}  {name:width$}  {took:>12}  {}", printable(&what)).trim_end().to_owned() + "\n"
    };
    stages.iter().map(line).collect()
}

fn state(run: &PastRun, diary: &Diary) -> &'static str {
    match diary.status {
        Some(Status::Done) => "done",
        Some(Status::Failed) => "failed",
        Some(Status::Interrupted) => "interrupted",
        None if is_going_on(&run.folder) => "running",
        None => "killed",
    }
}

/// What goes on now.
pub(crate) fn status(args: &StatusArgs) -> Result<()> {
    let store = existing_store(&args.store)?;
    let mut going_on: Vec<PastRun> = past_runs(&store).filter(|run| is_going_on(&run.folder)).collect();
    going_on.reverse();
    if args.json {
        let shown = going_on.iter().map(|run| {
            let diary = read(run);
            let (selected, stages) = (diary.stages.len(), for_programs(&diary));
            json!({"run": run.id, "pipeline": run.pipeline.pipeline, "selected": selected, "stages": stages})
        });
        return say(&pretty(&Json::Array(shown.collect())));
    }
    if going_on.is_empty() {
        return say("nothing runs; `pipeline runs` lists what did\n");
    }
    for run in &going_on {
        let diary = read(run);
        let (running, ended): (Vec<_>, Vec<_>) = diary.heard().partition(|(_, stage)| stage.fate == Fate::Running);
        let (ended, selected) = (ended.len(), diary.stages.len());
        say(&format!("{}  {}  {ended} of {selected} stages done\n", run.id, run.pipeline.pipeline))?;
        say(&lines(&running))?;
    }
    Ok(())
}

/// Prints the logs of a run, of one stage or of all; follows them as long as it goes on.
pub(crate) fn logs(args: &LogsArgs) -> Result<()> {
    let store = existing_store(&args.store)?;
    let Some(newest) = past_runs(&store).next() else {
        return Err(BadRequest("nothing has run in this store yet".into()).into());
    };
    // One word may be a run, or a stage: then the newest run is meant in which it said anything.
    let of_stage = |stage: &String| {
        let said = past_runs(&store).find(|run| !logs_of(&run.folder, Some(stage)).is_empty());
        (said.unwrap_or_else(|| newest.clone()), Some(stage.clone()))
    };
    let (run, stage) = match args.names.as_slice() {
        [] => (newest.clone(), None),
        [one] => find_run(&store, one).map_or_else(|_| of_stage(one), |run| (run, None)),
        [run, stage, ..] => (find_run(&store, run)?, Some(stage.clone())),
    };
    let found = || logs_of(&run.folder, stage.as_deref());
    if found().is_empty() && !(args.follow && is_going_on(&run.folder)) {
        let known: Vec<String> = logs_of(&run.folder, None).iter().map(|log| format!("`{}`", log.stage)).collect();
        let known = if known.is_empty() {
            "no stage has a log there".to_owned()
        } else {
            format!("logs are there of {}", known.join(", "))
        };
        let what = stage.map_or_else(
            || format!("run `{}` has no logs", run.id),
            |stage| format!("stage `{stage}` has no log in run `{}`", run.id),
        );
        return Err(BadRequest(format!("{what}; {known}")).into());
    }
    let watch = signals::watch();
    let mut read: Vec<(PathBuf, u64)> = Vec::new();
    loop {
        let goes_on = args.follow && is_going_on(&run.folder);
        for log in found() {
            let known = read.iter().position(|(path, _)| *path == log.path);
            let place = known.unwrap_or_else(|| {
                read.push((log.path.clone(), 0));
                read.len() - 1
            });
            if known.is_none() && stage.is_none() {
                say(&format!("== {} ({})\n", log.stage, log.attempt))?;
            }
            read[place].1 = print_from(&log.path, read[place].1)?;
        }
        if !goes_on {
            return Ok(());
        }
        watch.check()?;
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Prints what stands in a file from a byte on. Returns where it ends.
fn print_from(path: &Path, start: u64) -> Result<u64> {
    let mut file = File::open(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(start))
        .and_then(|_| file.read_to_end(&mut bytes))
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    say(&String::from_utf8_lossy(&bytes))?;
    Ok(start + bytes.len() as u64)
}
