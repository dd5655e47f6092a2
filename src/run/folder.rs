//! The folder of a run: `runs/<id>` of the store, with the run's plan, events and logs.

use std::collections::VecDeque;
use std::fs::{self, File, TryLockError};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cache::Store;

use crate::ground::clock::{now, utc};

/// Name of the file that the process of a run holds locked as long as it goes on.
const OWNER: &str = "owner";

/// Makes `runs/<id>`; identifiers sort by time. The file tells others that the run goes on, as long as it is open.
pub(crate) fn new_run(store: &Store) -> Result<(PathBuf, File)> {
    let folder = store.runs().join(format!("{}-{}", utc(now()), std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
    let path = folder.join(OWNER);
    let owner = File::create(&path).and_then(|file| file.lock().map(|()| file));
    let owner = owner.with_context(|| format!("cannot lock `{}`", path.display()))?;
    Ok((folder, owner))
}

/// Whether the process of a run is there.
pub(crate) fn is_going_on(run: &Path) -> bool {
    let locked = |file: File| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
    File::open(run.join(OWNER)).is_ok_and(locked)
}

/// What identifiers of runs begin with that are so many days old.
pub(crate) fn days_ago(days: u64) -> String {
    utc(now().saturating_sub(Duration::from_secs(days.saturating_mul(86_400))))
}

/// The log of an attempt at a stage.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Log {
    /// The stage, as a file is called.
    pub(crate) stage: String,
    /// Which attempt, from 1.
    pub(crate) attempt: u64,
    pub(crate) path: PathBuf,
}

/// The logs of a run, of one stage or of all.
pub(crate) fn logs_of(run: &Path, stage: Option<&str>) -> Vec<Log> {
    let entries = fs::read_dir(run).into_iter().flatten().flatten();
    let log = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_suffix(".log")?;
        let (stage, attempt) = name.rsplit_once('.')?;
        Some(Log { stage: stage.to_owned(), attempt: attempt.parse().ok()?, path })
    };
    let mut logs: Vec<Log> = entries.filter_map(|entry| log(entry.path())).collect();
    logs.retain(|log| stage.is_none_or(|stage| log.stage == file_name(stage)));
    logs.sort_unstable();
    logs
}

/// A stage's name as files are called.
fn file_name(stage: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    stage.chars().map(plain).collect()
}

/// `<stage>.<attempt>.log` in the folder of a run, of the first attempt that has none yet.
pub(crate) fn log_path(folder: &Path, stage: &str) -> PathBuf {
    let stage = file_name(stage);
    let paths = (1..).map(|attempt| folder.join(format!("{stage}.{attempt}.log")));
    paths.into_iter().find(|path| !path.exists()).expect("some number is free")
}

/// The last lines of a log, without what only helps who mends the program: the log itself has it.
pub(crate) fn log_end(log: &Path, lines: usize) -> Vec<String> {
    let Ok(file) = File::open(log) else { return Vec::new() };
    let mut end = VecDeque::with_capacity(lines + 1);
    let mut in_backtrace = false;
    for line in BufReader::new(file).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        in_backtrace = line == "stack backtrace:" || in_backtrace && is_frame(&line);
        if in_backtrace || line.starts_with("note: ") && line.contains("RUST_BACKTRACE") {
            continue;
        }
        end.push_back(line);
        if end.len() > lines {
            end.pop_front();
        }
    }
    end.into()
}

/// Whether a line is of a backtrace: `  12: name`, or `      at file:line`.
fn is_frame(line: &str) -> bool {
    let text = line.trim_start();
    let number = text.split(':').next().unwrap_or_default();
    line.starts_with(' ') && (text.starts_with("at ") || number.bytes().all(|byte| byte.is_ascii_digit()))
        || line.starts_with("note: Some details are omitted")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_shown_without_backtraces() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let text = "one\nthread 'x' panicked at a.rs:1:2:\noh\nstack backtrace:\n   0: rust_begin_unwind\n             \
                    at /rustc/x/panicking.rs:697:5\n   1: core::panicking::panic_fmt\nnote: Some details are omitted, run with \
                    `RUST_BACKTRACE=full` for a verbose backtrace.\ntwo \u{e9}\nnote: run with `RUST_BACKTRACE=1` environment \
                    variable to display a backtrace\n";
        std::fs::write(&log, [text.as_bytes(), b"\xffthree\n"].concat()).unwrap();
        assert_eq!(log_end(&log, 20), ["one", "thread 'x' panicked at a.rs:1:2:", "oh", "two \u{e9}", "\u{fffd}three"]);
        assert_eq!(log_end(&log, 1), ["\u{fffd}three"]);
    }
}
