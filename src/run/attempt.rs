//! One attempt at one subgraph, start to end, on a thread of its own: take the lock, look again, have an executor run
//! it, publish.
//!
//! It decides nothing about other stages. What happens goes to the coordinator as [`Update`]s, the last of which says how
//! it ended.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use cache::{Artifact, Guard, Lookup, Record, Store, StoreError, Work};
use contract::{PortType, Source};
use serde_json::{Map, Value as Json, json};

use crate::graph::Entry;
use crate::ground::clock;
use crate::ground::trouble::{Blamed, own_panic};
use crate::plan::key::{self, Action, InputDigests};
use crate::plan::results;
use crate::plan::{Settled, content};
use crate::run::executor::{Claim, Control, Ending, Executor, Running};
use crate::run::protocol::{Input, Job, Message, Outcome};
use crate::run::slots::Slot;
use crate::run::sources;

/// How often it is looked whether a device has come free.
const PATIENCE: Duration = Duration::from_millis(100);

/// What an attempt says.
pub(crate) enum Update {
    /// Another process holds the lock of this key.
    Waiting,
    /// A worker was started.
    Started,
    /// The worker said something.
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
    /// Whether there is a result, which is to be made again.
    pub(crate) again: bool,
    pub(crate) store: Arc<Store>,
    pub(crate) slot: Slot,
    pub(crate) cut_seconds: f64,
    /// Where workers are started.
    pub(crate) executor: Arc<dyn Executor>,
    /// Where the worker's log goes.
    pub(crate) log: PathBuf,
    /// Tells the coordinator.
    pub(crate) say: Box<dyn Fn(Update) + Send>,
    /// What it is told.
    pub(crate) orders: Arc<Orders>,
}

/// What the coordinator orders an attempt to do, whether its worker runs yet or not.
#[derive(Default)]
pub(crate) struct Orders(Mutex<State>);

#[derive(Default)]
struct State {
    /// Reaches the worker, from when one was started: before that there is nothing to lose.
    control: Option<Arc<dyn Control>>,
    stopping: bool,
}

impl Orders {
    /// Tells the worker to keep a cut and stop; if it is not started yet, it never will be.
    pub(crate) fn stop(&self) {
        if let Some(control) = self.no_more() {
            control.stop();
        }
    }

    /// Kills the worker with all that it started; if it is not started yet, it never will be.
    pub(crate) fn kill(&self) {
        if let Some(control) = self.no_more() {
            control.kill();
        }
    }

    /// Whether a worker was started, so that there may be something to keep.
    pub(crate) fn has_begun(&self) -> bool {
        self.lock().control.is_some()
    }

    /// Starts a worker, unless it was told to stop before.
    fn start(&self, start: impl FnOnce() -> Result<Box<dyn Running>>) -> Result<Option<Box<dyn Running>>> {
        // Held until the worker can be reached, so that no order to stop falls between.
        let mut state = self.lock();
        if state.stopping {
            return Ok(None);
        }
        let running = start()?;
        state.control = Some(running.control());
        Ok(Some(running))
    }

    /// From now on nothing is started. What reaches the worker that was.
    fn no_more(&self) -> Option<Arc<dyn Control>> {
        let mut state = self.lock();
        state.stopping = true;
        state.control.clone()
    }

    fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attempt {
    /// Runs on a thread of its own, which lives as long as the worker that it starts: the executor may tie the one to
    /// the other.
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
        let _lock = self.lock()?;
        // Whoever had the lock before may have done the work.
        if !self.again
            && let Lookup::Hit(record) = self.store.lookup(&key)?
        {
            let (record, metrics) = self.measured(record)?;
            return Ok(Ended::Reused(record, metrics));
        }
        let Some(_device) = self.device()? else { return Ok(Ended::Stopped) };
        let inputs = match self.open_inputs()? {
            Ok(inputs) => inputs,
            Err(entry) => return Ok(Ended::Damaged { entry }),
        };
        self.store.keep_preimage(&self.action.preimage)?;
        let work = self.store.begin(&key)?;
        match self.execute(work.path(), inputs)? {
            Ending::Told(outcome) => self.conclude(work, outcome),
            Ending::Died(_) if self.orders.is_stopping() => Ok(Ended::Stopped),
            Ending::Died(cause) => Err(anyhow!(cause)),
        }
    }

    /// Sets its device aside, once no other run has it; nothing where the attempt is told to stop before.
    fn device(&self) -> Result<Option<Claim>> {
        let device = &self.slot.device;
        let mut waits = false;
        while !self.orders.is_stopping() {
            if let Some(claim) = self.executor.claim(device)? {
                return Ok(Some(claim));
            }
            if !std::mem::replace(&mut waits, true) {
                let text = format!("waits for `{device}`, which another run has");
                (self.say)(Update::Said(Message::Noted { part: None, text }));
            }
            thread::sleep(PATIENCE);
        }
        Ok(None)
    }

    /// Takes the lock of the key, which nobody else has then, here or in another process.
    fn lock(&self) -> Result<Guard> {
        if let Some(lock) = self.store.try_lock(&self.action.key)? {
            return Ok(lock);
        }
        (self.say)(Update::Waiting);
        Ok(self.store.lock(&self.action.key)?)
    }

    /// Has the executor run the subgraph in a work folder. One that was told to stop before it began has stopped.
    fn execute(&self, work: &Path, inputs: BTreeMap<Entry, Input>) -> Result<Ending> {
        let job = Job {
            subgraph: self.action.subgraph.clone(),
            sources: self.action.sources.clone(),
            inputs,
            work: work.to_owned(),
            store: self.store.root().to_owned(),
            key: self.action.key,
            device: self.slot.device.clone(),
            threads: self.slot.threads,
            cut_seconds: self.cut_seconds,
        };
        let Some(running) = self.orders.start(|| self.executor.start(job, &self.log))? else {
            return Ok(Ending::Told(Outcome::Stopped));
        };
        (self.say)(Update::Started);
        let as_written = |text: String| sources::as_written(&text, &self.action.sources, work);
        match running.wait(&mut |message| (self.say)(Update::Said(message.map_text(as_written))))? {
            Ending::Told(outcome) => Ok(Ending::Told(outcome.map_text(as_written))),
            Ending::Died(cause) => Ok(Ending::Died(cause)),
        }
    }

    fn conclude(&self, work: Work, outcome: Outcome) -> Result<Ended> {
        match outcome {
            Outcome::Done { outputs, facts, seconds, rounds } => {
                let info = json!({
                    "seconds": seconds,
                    "ended": clock::now().as_secs_f64(),
                    "rounds": rounds,
                    "facts": facts,
                    "device": self.slot.device,
                    "threads": self.slot.threads,
                    "program": env!("CARGO_PKG_VERSION"),
                });
                let record = self.publish(work, outputs, info)?;
                tracing::info!(seconds, "published");
                let (record, metrics) = self.measured(record)?;
                Ok(Ended::Ran(record, metrics))
            }
            Outcome::Failed { fault, text } => Err(anyhow!(Blamed { fault, text })),
            Outcome::Changed { source } => {
                // The file's times may not have shown it, so that the next key must not trust them.
                for (source, path) in self.local_sources() {
                    let _ = self.store.digest_files_now(path, &|name| source.takes(name));
                }
                Ok(Ended::Changed { source })
            }
            Outcome::Stopped => Ok(Ended::Stopped),
        }
    }

    /// Puts what the worker left in its folder into the store.
    fn publish(&self, work: Work, outputs: Vec<(String, PortType)>, info: Json) -> Result<Record> {
        self.check_inputs()?;
        let outputs: Vec<_> =
            outputs.into_iter().map(|(name, port_type)| (name, port_type.name().to_owned())).collect();
        let before = if self.again { self.store.record(&self.action.key)? } else { None };
        if before.is_some() {
            // The first whole result of a key stays as long as it is there.
            self.store.forget(&self.action.key)?;
        }
        let record = self.store.publish(work, &outputs, info)?;
        if let Some(before) = before {
            self.compare_results(&before, &record);
        }
        // Checkpoints of finished work only take room.
        let _ = self.store.drop_cuts(&self.action.key);
        self.compare_sources();
        Ok(record)
    }

    /// A stage that was made again should have given the same bytes.
    fn compare_results(&self, before: &Record, now: &Record) {
        let digest = |record: &Record, output: &String| record.outputs.get(output).map(|artifact| artifact.digest);
        let names = key::outputs(&self.action.subgraph).into_iter();
        let other = names.filter(|(_, stored)| digest(before, stored) != digest(now, stored));
        let other: Vec<String> = other.map(|(exit, _)| format!("`{exit}`")).collect();
        let message = match other.is_empty() {
            true => Message::Noted { part: None, text: "it gave the same bytes as before".into() },
            false => {
                let text =
                    format!("it gave other bytes than before for {}: the same key, another result", other.join(", "));
                Message::Warned { part: None, text }
            }
        };
        (self.say)(Update::Said(message));
    }

    /// What a record measured, read here because it may have to be hashed first.
    fn measured(&self, record: Record) -> Result<(Record, Map<String, Json>)> {
        let settled = Settled::new(self.action.clone(), record);
        let metrics = results::metrics(&settled, &self.store)?;
        Ok((Arc::unwrap_or_clone(settled.record), metrics))
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
            if source.at.local().is_some() && content::of(source, &self.store).ok().as_ref() != Some(before) {
                let path = &source.at;
                let text = format!("`{path}` changed since it was read; the result is that of what it held before");
                (self.say)(Update::Said(Message::Warned { part: None, text }));
            }
        }
    }

    /// What is elsewhere is named by its content, and cannot change.
    fn local_sources(&self) -> impl Iterator<Item = (&Source, &Path)> {
        self.action.sources.iter().filter_map(|(source, _)| Some((source, source.at.local()?)))
    }
}

fn input(artifact: &Artifact, path: PathBuf) -> Result<Input> {
    let port_type: PortType = serde_json::from_value(json!(artifact.port_type))
        .with_context(|| format!("this program knows no type `{}`", artifact.port_type))?;
    Ok(Input { path, port_type, digest: artifact.digest })
}

#[cfg(test)]
mod tests;
