//! `pipeline watch`: shows a run from its events alone, wherever it runs.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{BadRequest, existing_store};
use crate::cli::WatchArgs;
use crate::events::Event;
use crate::ground::signals;
use crate::plan::history::folders;
use crate::report;

/// How often it is looked whether anything has happened.
const PERIOD: Duration = Duration::from_millis(250);

pub(crate) fn watch(args: &WatchArgs) -> Result<()> {
    let folder = folder(args)?;
    let path = folder.join("events.jsonl");
    let mut tail = Tail { path: &path, offset: 0, rest: Vec::new() };
    let first = tail.new_events()?;
    let width = first.iter().find_map(|event| match event {
        Event::RunStarted { stages, .. } => stages.iter().map(|stage| stage.chars().count()).max(),
        _ => None,
    });
    let mut reporter = report::reporter(args.json, width.unwrap_or(0));
    let watch = signals::watch();
    let mut events = first;
    loop {
        for event in &events {
            reporter.show(event);
            if matches!(event, Event::RunFinished { .. }) {
                return reporter.finish();
            }
        }
        if args.once {
            return reporter.finish();
        }
        watch.check()?;
        std::thread::sleep(PERIOD);
        events = tail.new_events()?;
    }
}

/// The folder of the run that is named: a path, an identifier, or the newest.
fn folder(args: &WatchArgs) -> Result<PathBuf> {
    if let Some(run) = args.run.as_ref().filter(|run| run.join("events.jsonl").is_file()) {
        return Ok(run.clone());
    }
    let store = existing_store(&args.store)?;
    let runs = store.runs();
    let found = match &args.run {
        Some(run) => Some(runs.join(run)),
        None => folders(&store).into_iter().next(),
    };
    let found = found.filter(|folder| folder.join("events.jsonl").is_file());
    found.ok_or_else(|| {
        let what = args.run.as_ref().map_or_else(|| "any run".to_owned(), |run| format!("a run `{}`", run.display()));
        BadRequest(format!("there are no events of {what} in `{}`", runs.display())).into()
    })
}

/// The end of a file that grows.
struct Tail<'p> {
    path: &'p Path,
    offset: u64,
    /// The beginning of a line whose end is not there yet.
    rest: Vec<u8>,
}

impl Tail<'_> {
    /// What came since the last time. Lines that are no event known here are passed over.
    fn new_events(&mut self) -> Result<Vec<Event>> {
        let cannot = || format!("cannot read `{}`", self.path.display());
        let mut file = match File::open(self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(cannot),
        };
        file.seek(SeekFrom::Start(self.offset)).with_context(cannot)?;
        self.offset += file.read_to_end(&mut self.rest).with_context(cannot)? as u64;
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else { return Ok(Vec::new()) };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        Ok(whole.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_line_counts_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut tail = Tail { path: &path, offset: 0, rest: Vec::new() };
        assert!(tail.new_events().unwrap().is_empty(), "not there yet");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"{\"event\":\"stage_skipped\",\"stage\":\"a\",\"needs\":\"b\"}\n{\"event\":\"stage_sk")
            .unwrap();
        assert_eq!(tail.new_events().unwrap().len(), 1);
        assert!(tail.new_events().unwrap().is_empty());
        file.write_all(b"ipped\",\"stage\":\"c\",\"needs\":\"b\"}\n{\"event\":\"unknown\"}\n").unwrap();
        let events = tail.new_events().unwrap();
        assert!(matches!(events.as_slice(), [Event::StageSkipped { stage, .. }] if stage == "c"), "{events:?}");
    }
}
