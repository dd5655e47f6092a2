//! `pipeline runs`, `logs` and `status`: what earlier runs did, and what goes on now.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value as Json, json};

use super::{BadRequest, existing_store, pretty, say};
use crate::cli::{LogsArgs, RunsArgs, StatusArgs};
use crate::events::{Standing, Tale};
use crate::ground::signals;
use crate::ground::terminal::printable;
use crate::plan::history::{PastRun, find_run, past_runs};
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
        let tale = Tale::read(&run.folder);
        let state = state(run, &tale);
        let counts = format!("{} ran, {} reused", tale.ran(), tale.reused());
        let failed = if tale.failed() > 0 { format!(", {} failed", tale.failed()) } else { String::new() };
        let took = tale.seconds.map(duration).unwrap_or_default();
        text += format!("{}  {state:<11}  {took:>12}  {}  {counts}{failed}", run.id, printable(&run.pipeline.pipeline))
            .trim_end();
        text.push('\n');
        all.push(json!({
            "run": run.id, "pipeline": run.pipeline.pipeline, "path": run.pipeline.path, "state": state,
            "ran": tale.ran(), "reused": tale.reused(), "failed": tale.failed(), "seconds": tale.seconds,
        }));
    }
    say(&if args.json { pretty(&Json::Array(all)) } else { text })
}

/// The stages of one run.
fn one(run: &PastRun, as_json: bool) -> Result<()> {
    let tale = Tale::read(&run.folder);
    if as_json {
        let stages: serde_json::Map<String, Json> =
            tale.stages.iter().map(|(stage, standing)| (stage.clone(), standing.to_json())).collect();
        let shown = json!({
            "run": run.id, "pipeline": run.pipeline.pipeline, "state": state(run, &tale), "stages": stages,
        });
        return say(&pretty(&shown));
    }
    say(&format!("{}  {}  {}\n{}", run.id, run.pipeline.pipeline, state(run, &tale), stages(&tale)))
}

/// A line for each stage of a run.
fn stages(tale: &Tale) -> String {
    let width = tale.stages.keys().map(|stage| stage.chars().count()).max().unwrap_or_default();
    let line = |(stage, standing): (&String, &Standing)| {
        let took = standing.seconds.map(duration).unwrap_or_default();
        let progress = standing.progress.as_ref().filter(|_| standing.state == "running");
        let what = progress.map(|(done, total, unit)| format!("{done} of {total} {unit}"));
        let what = what.or_else(|| standing.text.clone()).unwrap_or_default();
        format!("  {:<8}  {stage:width$}  {took:>12}  {}", standing.state, printable(&what)).trim_end().to_owned()
            + "\n"
    };
    tale.stages.iter().map(line).collect()
}

fn state(run: &PastRun, tale: &Tale) -> String {
    match &tale.status {
        Some(status) => status.clone(),
        None if is_going_on(&run.folder) => "running".into(),
        None => "killed".into(),
    }
}

/// What goes on now.
pub(crate) fn status(args: &StatusArgs) -> Result<()> {
    let store = existing_store(&args.store)?;
    let mut going_on: Vec<PastRun> = past_runs(&store).filter(|run| is_going_on(&run.folder)).collect();
    going_on.reverse();
    if args.json {
        let shown = going_on.iter().map(|run| {
            let tale = Tale::read(&run.folder);
            let stages: serde_json::Map<String, Json> =
                tale.stages.iter().map(|(stage, standing)| (stage.clone(), standing.to_json())).collect();
            json!({"run": run.id, "pipeline": run.pipeline.pipeline, "selected": tale.selected, "stages": stages})
        });
        return say(&pretty(&Json::Array(shown.collect())));
    }
    if going_on.is_empty() {
        return say("nothing runs; `pipeline runs` lists what did\n");
    }
    for run in &going_on {
        let tale = Tale::read(&run.folder);
        let ended = tale.stages.values().filter(|standing| standing.state != "running").count();
        say(&format!("{}  {}  {ended} of {} stages done\n", run.id, run.pipeline.pipeline, tale.selected))?;
        let running = Tale { stages: tale.stages.into_iter().filter(|(_, s)| s.state == "running").collect(), ..tale };
        say(&stages(&running))?;
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
