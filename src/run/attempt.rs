//! One attempt at one subgraph, start to end, on a thread of its own: take the lock, look again, run a worker, publish.
//!
//! It decides nothing about other stages. What happens goes to the coordinator as [`Update`]s, the last of which says how
//! it ended.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow};
use cache::{Artifact, Lookup, Record, Store, StoreError};
use contract::PortType;
use contract::files::in_words;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde_json::{Map, Value as Json, json};

use crate::graph::Entry;
use crate::ground::memory;
use crate::ground::trouble::{Blamed, Fault, own_panic};
use crate::plan::Settled;
use crate::plan::key::{Action, InputDigests};
use crate::plan::results;
use crate::run::protocol::{Input, Job, Message, Order, PARENT, REPORT};
use crate::run::slots::{self, Slot};
use crate::run::sources;

/// What an attempt says.
pub(crate) enum Update {
    /// Another process holds the lock of this key.
    Waiting,
    /// A worker was started.
    Started,
    /// The worker said something other than how it ended.
    Said(Message),
    /// It is over.
    Ended(Ended),
}

/// How an attempt ended.
pub(crate) enum Ended {
    /// The result is in the store, and this is what it measured.
    Ran(Record, Map<String, Json>),
    /// Another process put it there.
    Reused(Record, Map<String, Json>),
    /// It went wrong.
    Failed(anyhow::Error),
    /// A local file no longer holds what the key says: the key has to be made again.
    Changed { source: PathBuf },
    /// An input was damaged and is gone: what made it has to run again.
    Damaged { entry: Entry },
    /// It was told to stop.
    Stopped,
}

/// What an attempt needs.
pub(crate) struct Attempt {
    /// Name for people.
    pub(crate) stage: String,
    pub(crate) action: Action,
    pub(crate) inputs: InputDigests,
    pub(crate) store: Arc<Store>,
    pub(crate) slot: Slot,
    pub(crate) cut_seconds: f64,
    /// Where the worker's standard error goes.
    pub(crate) log: PathBuf,
    /// Tells the coordinator.
    pub(crate) say: Box<dyn Fn(Update) + Send>,
    pub(crate) control: Arc<Control>,
}

/// How the coordinator reaches a running worker.
#[derive(Default)]
pub(crate) struct Control(Mutex<State>);

#[derive(Default)]
struct State {
    stdin: Option<ChildStdin>,
    pid: Option<Pid>,
    /// Whether a worker was started: before that there is nothing to lose.
    begun: bool,
    stopping: bool,
}

impl Control {
    /// Tells the worker to keep a cut and stop; if it is not started yet, it never will be.
    pub(crate) fn stop(&self) {
        let mut state = self.lock();
        state.stopping = true;
        if let Some(stdin) = &mut state.stdin {
            // A worker that is gone needs no telling.
            let _ = line(&Order::Stop).map(|order| stdin.write_all(&order));
        }
    }

    /// Kills the worker with all that it started.
    pub(crate) fn kill(&self) {
        let mut state = self.lock();
        state.stopping = true;
        if let Some(pid) = state.pid {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    /// Whether a worker was started, so that there may be something to keep.
    pub(crate) fn has_begun(&self) -> bool {
        self.lock().begun
    }

    fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attempt {
    /// Runs on a thread of its own. The thread that starts a worker must live as long as the worker: the kernel ties the
    /// worker to it.
    pub(crate) fn spawn(self) -> Result<()> {
        let attempt = move || {
            let _span = tracing::info_span!("stage", name = self.stage, key = %self.action.key).entered();
            // Should the runner itself be at fault, the run must hear of an end all the same.
            let ended = catch_unwind(AssertUnwindSafe(|| self.run())).unwrap_or_else(|_| Err(own_panic()));
            (self.say)(Update::Ended(ended.unwrap_or_else(Ended::Failed)));
        };
        thread::Builder::new().spawn(attempt).context("cannot start a thread for a stage")?;
        Ok(())
    }

    fn run(&self) -> Result<Ended> {
        let key = self.action.key;
        let _lock = match self.store.try_lock(&key)? {
            Some(lock) => lock,
            None => {
                (self.say)(Update::Waiting);
                self.store.lock(&key)?
            }
        };
        // Whoever had the lock before may have done the work.
        if let Lookup::Hit(record) = self.store.lookup(&key)? {
            let (record, metrics) = self.measured(record)?;
            return Ok(Ended::Reused(record, metrics));
        }
        let paths = match self.open_inputs()? {
            Ok(paths) => paths,
            Err(entry) => return Ok(Ended::Damaged { entry }),
        };
        self.store.keep_preimage(&self.action.preimage)?;
        let work = self.store.begin(&key)?;
        let (ended, status) = match self.run_worker(work.path(), &paths)? {
            Some(ended) => ended,
            None => return Ok(Ended::Stopped),
        };
        match ended {
            Some(Message::Done { outputs, facts, seconds, rounds }) => {
                self.check_inputs()?;
                let outputs: Vec<_> =
                    outputs.into_iter().map(|(name, port_type)| (name, port_type.name().to_owned())).collect();
                let info = json!({
                    "seconds": seconds,
                    "rounds": rounds,
                    "facts": facts,
                    "device": self.slot.device,
                    "threads": self.slot.threads,
                    "program": env!("CARGO_PKG_VERSION"),
                });
                let record = self.store.publish(work, &outputs, info)?;
                tracing::info!(seconds, "published");
                // Checkpoints of finished work only take room.
                let _ = self.store.drop_cuts(&key);
                self.compare_sources();
                let (record, metrics) = self.measured(record)?;
                Ok(Ended::Ran(record, metrics))
            }
            Some(Message::Failed { fault, text }) => Err(anyhow!(Blamed { fault, text })),
            Some(Message::Changed { source }) => {
                // The file's times may not have shown it, so that the next key must not trust them.
                for (source, _) in &self.action.sources {
                    let _ = self.store.digest_files_now(&source.path, &|name| source.takes(name));
                }
                Ok(Ended::Changed { source })
            }
            Some(Message::Stopped) => Ok(Ended::Stopped),
            _ if self.control.is_stopping() => Ok(Ended::Stopped),
            _ => Err(anyhow!(cause_of_death(status, &log_end(&self.log, 100), memory::limit()))),
        }
    }

    /// What a record measured, read here because it may have to be hashed first.
    fn measured(&self, record: Record) -> Result<(Record, Map<String, Json>)> {
        let settled = Settled { action: self.action.clone(), record };
        let metrics = results::metrics(&settled, &self.store)?;
        Ok((settled.record, metrics))
    }

    /// Verified folders of the inputs, by entry; or the entry whose artifact turned out to be damaged.
    fn open_inputs(&self) -> Result<Result<BTreeMap<Entry, Input>, Entry>> {
        let mut opened = BTreeMap::new();
        for (entry, artifact) in &self.inputs {
            match self.store.open_artifact(artifact) {
                Ok(path) => drop(opened.insert(entry.clone(), input(artifact, path)?)),
                Err(StoreError::Corrupt { .. }) => return Ok(Err(entry.clone())),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Ok(opened))
    }

    /// Runs a worker to its end. `None` when it was told to stop before it began; otherwise its last word, if it had one,
    /// and its exit status.
    fn run_worker(
        &self,
        work: &Path,
        inputs: &BTreeMap<Entry, Input>,
    ) -> Result<Option<(Option<Message>, ExitStatus)>> {
        let (mask, device) = slots::visible(&self.slot.device, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref());
        let order = line(&Order::Run(Box::new(Job {
            subgraph: self.action.subgraph.clone(),
            sources: self.action.sources.clone(),
            inputs: inputs.clone(),
            work: work.to_owned(),
            store: self.store.root().to_owned(),
            key: self.action.key,
            device,
            threads: self.slot.threads,
            cut_seconds: self.cut_seconds,
        })))?;
        let mut child = {
            // Held until the worker can be killed, so that no order to stop falls between.
            let mut state = self.control.lock();
            if state.stopping {
                return Ok(None);
            }
            let child = self.start_process(&mask)?;
            state.pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            state.begun = true;
            child
        };
        let mut stdin = child.stdin.take().expect("standard input is a pipe");
        // A worker that dies at once cannot read its job; its exit says more than the broken pipe.
        let _ = stdin.write_all(&order);
        {
            let mut state = self.control.lock();
            if state.stopping {
                let _ = line(&Order::Stop).map(|order| stdin.write_all(&order));
            }
            state.stdin = Some(stdin);
        }
        (self.say)(Update::Started);
        tracing::info!(worker = child.id(), "started");
        let last = self.hear(&mut child, work)?;
        self.control.lock().stdin = None;
        self.end_group(&child);
        let status = child.wait().context("cannot wait for the worker")?;
        Ok(Some((last, status)))
    }

    fn start_process(&self, mask: &str) -> Result<Child> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("cannot write log `{}`", self.log.display()))?;
        let mut command = Command::new(own_program()?);
        command
            .arg0("pipeline")
            .arg("worker")
            .env("CUDA_VISIBLE_DEVICES", mask)
            .env(PARENT, std::process::id().to_string())
            .env("RAYON_NUM_THREADS", self.slot.threads.to_string())
            // A worker allocates the same large buffers in every round: the allocator keeps freed ones for a minute, not for
            // a second, since getting fresh pages from the kernel costs a tenth of a training step.
            .env("MIMALLOC_PURGE_DELAY", "60000")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // An interrupt from the terminal is for the coordinator, which tells its workers what to do.
            .process_group(0);
        command.spawn().context("cannot start a worker")
    }

    /// Waits for the worker to end, then ends whatever it started. Only after that is its id given back to the system, so
    /// that no other process can be meant.
    fn end_group(&self, child: &Child) {
        let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return };
        let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let mut state = self.control.lock();
        let _ = kill_process_group(pid, Signal::KILL);
        state.pid = None;
    }

    /// Hands on what the worker says until it says how it ended, or is silent.
    fn hear(&self, child: &mut Child, work: &Path) -> Result<Option<Message>> {
        let as_written = |text: String| sources::as_written(&text, &self.action.sources, work);
        let stdout = child.stdout.take().expect("standard output is a pipe");
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot hear the worker")?;
            match serde_json::from_str::<Message>(&line).map(|message| message.map_text(as_written)) {
                Ok(message) if message.is_last() => return Ok(Some(message)),
                Ok(message) => (self.say)(Update::Said(message)),
                // A library that prints: its words belong to the log.
                Err(_) => append(&self.log, &line),
            }
        }
        Ok(None)
    }

    /// A result must never be bound to inputs that are not those it was made from.
    fn check_inputs(&self) -> Result<()> {
        for (entry, artifact) in &self.inputs {
            self.store
                .check_artifact(artifact)
                .with_context(|| format!("input `{entry}` changed while it was read"))?;
        }
        Ok(())
    }

    /// The stage read what the key says, whatever became of the files since. Who edits one meanwhile should know that this
    /// run was not about the edit.
    fn compare_sources(&self) {
        for (source, before) in &self.action.sources {
            if self.store.digest_files(&source.path, &|name| source.takes(name)).ok() != Some(*before) {
                let path = source.path.display();
                let text = format!("`{path}` changed since it was read; the result is that of what it held before");
                (self.say)(Update::Said(Message::Warned { part: None, text }));
            }
        }
    }
}

fn input(artifact: &Artifact, path: PathBuf) -> Result<Input> {
    let port_type: PortType = serde_json::from_value(json!(artifact.port_type))
        .with_context(|| format!("this program knows no type `{}`", artifact.port_type))?;
    Ok(Input { path, port_type, digest: artifact.digest })
}

/// An order as a line of JSON.
fn line(order: &Order) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(order).context("cannot write the worker's job")?;
    line.push(b'\n');
    Ok(line)
}

fn append(log: &Path, line: &str) {
    if let Ok(mut file) = File::options().append(true).open(log) {
        let _ = writeln!(file, "{line}");
    }
}

/// This program, as it was started: on Linux also when its file has since been replaced or removed.
fn own_program() -> Result<PathBuf> {
    let itself = Path::new("/proc/self/exe");
    if itself.exists() {
        return Ok(itself.to_owned());
    }
    std::env::current_exe().context("cannot find this program's own file")
}

/// Why a worker ended without a word, as far as its end tells. `log` is the end of what it wrote, `memory` what it could have.
fn cause_of_death(status: ExitStatus, log: &[String], memory: Option<u64>) -> Blamed {
    use std::os::unix::process::ExitStatusExt;
    const KILLED: i32 = Signal::KILL.as_raw();
    const TERMINATED: i32 = Signal::TERM.as_raw();
    const ABORTED: i32 = Signal::ABORT.as_raw();
    const FILE_TOO_LARGE: i32 = Signal::XFSZ.as_raw();
    let had = memory.map(|bytes| format!(", of {} that it may have", in_words(bytes))).unwrap_or_default();
    let (fault, text) = match (status.signal(), log.iter().rev().find_map(|line| refused_bytes(line))) {
        (Some(ABORTED), Some(bytes)) => {
            (Fault::Memory, format!("memory ran out: it asked for {} more{had}; {USE_LESS}", in_words(bytes)))
        }
        (Some(signal @ (KILLED | TERMINATED)), _) => {
            let had = memory.map(|bytes| format!("; it may have {}", in_words(bytes))).unwrap_or_default();
            let text = format!("the worker was killed, as the system does when memory runs out (signal {signal}{had})");
            (Fault::Memory, format!("{text}; if nobody killed it, {USE_LESS}"))
        }
        (Some(FILE_TOO_LARGE), _) => (Fault::Disk, "a file grew larger than `ulimit -f` allows".into()),
        (Some(signal), _) => (Fault::Bug, format!("the worker crashed (signal {signal}): {REPORT}")),
        (None, _) => {
            let code = status.code().unwrap_or_default();
            (Fault::Bug, format!("the worker ended without a result (exit status {code}): {REPORT}"))
        }
    };
    Blamed { fault, text }
}

const USE_LESS: &str =
    "lower `micro_batch` or `batch`, make the model smaller, or run fewer stages at a time with `--jobs`";

/// How much memory was refused, where a line of a log says so: the standard library's last words.
fn refused_bytes(line: &str) -> Option<u64> {
    line.split_once("memory allocation of ")?.1.split_once(" bytes failed")?.0.parse().ok()
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
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_way_a_worker_ended_says_who_is_to_blame() {
        let cause = |raw, log: &str| {
            let log: Vec<String> = log.lines().map(str::to_owned).collect();
            let Blamed { fault, text } = cause_of_death(ExitStatus::from_raw(raw), &log, Some(24 << 30));
            (fault, text)
        };
        let (fault, text) = cause(6, "training\nmemory allocation of 8589934592 bytes failed\n");
        assert_eq!(fault, Fault::Memory);
        assert!(text.starts_with("memory ran out: it asked for 8.0 GiB more, of 24.0 GiB that it may have"), "{text}");
        let (fault, text) = cause(9, "");
        assert_eq!(fault, Fault::Memory);
        assert!(text.contains("(signal 9; it may have 24.0 GiB)") && text.contains("`micro_batch`"), "{text}");
        for (raw, sign) in [(6, "(signal 6)"), (11, "(signal 11)"), (7 << 8, "(exit status 7)")] {
            let (fault, text) = cause(raw, "");
            assert_eq!(fault, Fault::Bug);
            assert!(text.contains(sign) && text.contains("this is a bug"), "{text}");
        }
        assert_eq!(cause(25, "").0, Fault::Disk);
    }

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
