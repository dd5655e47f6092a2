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
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde_json::json;

use crate::key::{Action, InputDigests};
use crate::protocol::{Input, Job, Message, Order};
use crate::sources;
use crate::worker::PARENT;

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
    /// The result is in the store.
    Ran(Record),
    /// Another process put it there.
    Reused(Record),
    /// It went wrong.
    Failed(anyhow::Error),
    /// A local file no longer holds what the key says: the key has to be made again.
    Changed { source: PathBuf },
    /// An input was damaged and is gone: what made it has to run again.
    Damaged { entry: String },
    /// It was told to stop. Where a cut was kept: rounds done and all rounds.
    Stopped(Option<(u64, u64)>),
}

/// What an attempt needs.
pub(crate) struct Attempt {
    /// Name for people.
    pub(crate) stage: String,
    pub(crate) action: Action,
    pub(crate) inputs: InputDigests,
    pub(crate) store: Arc<Store>,
    pub(crate) device: String,
    pub(crate) threads: usize,
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
    stopping: bool,
}

impl Control {
    /// Tells the worker to keep a cut and stop; if it is not started yet, it never will be.
    pub(crate) fn stop(&self) {
        let mut state = self.lock();
        state.stopping = true;
        if let Some(stdin) = &mut state.stdin {
            // A worker that is gone needs no telling.
            let _ = send(stdin, &Order::Stop);
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
    pub(crate) fn spawn(self) -> thread::JoinHandle<()> {
        thread::spawn(move || {
            let _span = tracing::info_span!("stage", name = self.stage, key = %self.action.key).entered();
            // Should the runner itself be at fault, the run must hear of an end all the same.
            let ended = catch_unwind(AssertUnwindSafe(|| self.run()));
            let ended = ended.unwrap_or_else(|_| Err(anyhow!("the runner panicked; its message is above")));
            let ended = ended.unwrap_or_else(Ended::Failed);
            (self.say)(Update::Ended(ended));
        })
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
            return Ok(Ended::Reused(record));
        }
        let paths = match self.open_inputs()? {
            Ok(paths) => paths,
            Err(entry) => return Ok(Ended::Damaged { entry }),
        };
        self.store.keep_preimage(&self.action.preimage)?;
        let work = self.store.begin(&key)?;
        let (ended, status) = match self.run_worker(work.path(), &paths)? {
            Some(ended) => ended,
            None => return Ok(Ended::Stopped(None)),
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
                    "device": self.device,
                    "threads": self.threads,
                    "program": env!("CARGO_PKG_VERSION"),
                });
                let record = self.store.publish(work, &outputs, info)?;
                tracing::info!(seconds, "published");
                // Checkpoints of finished work only take room.
                let _ = self.store.drop_cuts(&key);
                self.compare_sources();
                Ok(Ended::Ran(record))
            }
            Some(Message::Failed { error }) => Ok(Ended::Failed(anyhow!(error))),
            Some(Message::Changed { source }) => {
                // The file's times may not have shown it, so that the next key must not trust them.
                for (source, _) in &self.action.sources {
                    let _ = self.store.digest_files_now(&source.path, &|name| source.takes(name));
                }
                Ok(Ended::Changed { source })
            }
            Some(Message::Stopped { cut }) => Ok(Ended::Stopped(cut)),
            _ if self.control.is_stopping() => Ok(Ended::Stopped(None)),
            _ => Ok(Ended::Failed(anyhow!("the worker ended without a result: {}", in_words(status)))),
        }
    }

    /// Verified folders of the inputs, by entry; or the entry whose artifact turned out to be damaged.
    fn open_inputs(&self) -> Result<Result<BTreeMap<String, Input>, String>> {
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
        inputs: &BTreeMap<String, Input>,
    ) -> Result<Option<(Option<Message>, ExitStatus)>> {
        let job = Job {
            subgraph: self.action.subgraph.clone(),
            sources: self.action.sources.clone(),
            inputs: inputs.clone(),
            work: work.to_owned(),
            store: self.store.root().to_owned(),
            key: self.action.key,
            device: self.device.clone(),
            threads: self.threads,
            cut_seconds: self.cut_seconds,
        };
        let mut child = {
            // Held until the worker can be reached, so that no order to stop falls between.
            let mut state = self.control.lock();
            if state.stopping {
                return Ok(None);
            }
            let mut child = self.start_process()?;
            let mut stdin = child.stdin.take().expect("standard input is a pipe");
            // A worker that dies at once cannot read its job; its exit says more than the broken pipe.
            let _ = send(&mut stdin, &Order::Run(Box::new(job)));
            state.stdin = Some(stdin);
            state.pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            child
        };
        (self.say)(Update::Started);
        tracing::info!(worker = child.id(), "started");
        let last = self.hear(&mut child, work)?;
        self.control.lock().stdin = None;
        self.end_group(&child);
        let status = child.wait().context("cannot wait for the worker")?;
        Ok(Some((last, status)))
    }

    fn start_process(&self) -> Result<Child> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("cannot write log `{}`", self.log.display()))?;
        let mut command = Command::new(program);
        command
            .arg("worker")
            .env(PARENT, std::process::id().to_string())
            .env("RAYON_NUM_THREADS", self.threads.to_string())
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

    /// Hands on what the worker says until it is silent; returns how it says it ended.
    fn hear(&self, child: &mut Child, work: &Path) -> Result<Option<Message>> {
        let as_written = |text: String| sources::as_written(&text, &self.action.sources, work);
        let stdout = child.stdout.take().expect("standard output is a pipe");
        let mut last = None;
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot hear the worker")?;
            match serde_json::from_str::<Message>(&line).map(|message| message.map_text(as_written)) {
                Ok(message) if message.is_last() => last = Some(message),
                Ok(message) => (self.say)(Update::Said(message)),
                // A library that prints: its words belong to the log.
                Err(_) => append(&self.log, &line),
            }
        }
        Ok(last)
    }

    /// A result must never be bound to inputs that are not those it was made from.
    fn check_inputs(&self) -> Result<()> {
        for (entry, artifact) in &self.inputs {
            self.store.open_artifact(artifact).with_context(|| format!("input `{entry}` changed while it was read"))?;
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

fn send(stdin: &mut ChildStdin, order: &Order) -> Result<()> {
    let mut line = serde_json::to_vec(order)?;
    line.push(b'\n');
    stdin.write_all(&line)?;
    Ok(stdin.flush()?)
}

fn append(log: &Path, line: &str) {
    if let Ok(mut file) = File::options().append(true).open(log) {
        let _ = writeln!(file, "{line}");
    }
}

fn in_words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match status.signal() {
        Some(9) => "killed, as the system does when memory runs out (signal 9)".into(),
        Some(signal) => format!("killed by signal {signal}"),
        None => format!("exit status {}", status.code().unwrap_or_default()),
    }
}

/// The last lines of a log.
pub(crate) fn log_end(log: &Path, lines: usize) -> Vec<String> {
    let Ok(file) = File::open(log) else { return Vec::new() };
    let mut end = VecDeque::with_capacity(lines + 1);
    for line in BufReader::new(file).lines().map_while(Result::ok) {
        end.push_back(line);
        if end.len() > lines {
            end.pop_front();
        }
    }
    end.into()
}
