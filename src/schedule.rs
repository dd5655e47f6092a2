//! The coordinator: one thread that owns all state of a run, decides about each subgraph when its inputs are known, starts
//! attempts as slots come free, and turns what they say into events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cache::{Store, Why};
use contract::Registry;
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;

use crate::attempt::{Attempt, Control, Ended, Update, log_end};
use crate::device;
use crate::events::{Event, EventLog, SCHEMA, Status};
use crate::foresee::Foresight;
use crate::graph::{Graph, Subgraph};
use crate::history::{History, PlanFile, PlannedStage};
use crate::key::{self, Action, InputDigests};
use crate::plan::{self, Decision, Settled};
use crate::protocol::Message;
use crate::results;
use crate::selection::{Alias, Selection};

/// How to run. Nothing here is in a key.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Devices that workers are spread over, `cpu` or `cuda:N`.
    pub devices: Vec<String>,
    /// Threads of all workers together.
    pub threads: usize,
    /// Workers at a time.
    pub jobs: usize,
    /// Seconds between two cuts of a loop.
    pub cut_seconds: f64,
    /// Cut every loop after every stage run.
    pub unroll: bool,
}

/// What became of a run.
pub struct Summary {
    /// How it ended.
    pub status: Status,
    /// The signal that interrupted it.
    pub signal: Option<i32>,
    /// Stages that ran.
    pub ran: usize,
    /// Stages whose result was in the store.
    pub reused: usize,
    /// Name and error of each stage that went wrong, in the order it happened.
    pub failed: Vec<(String, anyhow::Error)>,
    /// Results, by subgraph.
    pub settled: BTreeMap<NodeIndex, Settled>,
}

/// What the coordinator waits for.
enum News {
    Attempt(NodeIndex, Update),
    Signal(i32),
}

/// Runs what is selected and not in the store. `name` is the pipeline file as given.
///
/// Errors when the store or the run's folder cannot be used; a stage that fails is no error here but part of the summary.
pub fn run(
    graph: &Graph,
    selection: &Selection,
    registry: &Registry,
    store: Arc<Store>,
    settings: &Settings,
    name: &str,
    reporter: &mut dyn crate::events::Reporter,
) -> Result<Summary> {
    store.sweep()?;
    let history = History::open(&store);
    let folder = new_run(&store)?;
    let (sender, news) = mpsc::channel();
    let signals = Signals::listen(sender.clone())?;
    let mut coordinator = Coordinator {
        graph,
        selection,
        registry,
        store,
        settings,
        history,
        foresight: Foresight::new(graph, selection, registry, device::machine(&settings.devices)),
        foreseen: BTreeSet::new(),
        looked_with: None,
        events: EventLog::create(&folder, reporter)?,
        plan_file: PlanFile { pipeline: name.to_owned(), stages: Vec::new() },
        folder,
        open: selection.order.iter().copied().collect(),
        settled: BTreeMap::new(),
        queue: VecDeque::new(),
        running: BTreeMap::new(),
        mended: BTreeMap::new(),
        planned_again: BTreeMap::new(),
        ran: 0,
        reused: 0,
        failed: Vec::new(),
        signal: None,
        sender,
    };
    let since = Instant::now();
    coordinator.start();
    let outcome = coordinator.work(&news);
    signals.close();
    let summary = coordinator.finish(since.elapsed(), outcome.is_err());
    outcome.map(|()| summary)
}

struct Coordinator<'a> {
    graph: &'a Graph,
    selection: &'a Selection,
    registry: &'a Registry,
    store: Arc<Store>,
    settings: &'a Settings,
    history: History,
    foresight: Foresight<'a>,
    /// Warnings that were given, so that each is given once.
    foreseen: BTreeSet<(NodeIndex, String)>,
    /// How many results there were when it was last looked ahead.
    looked_with: Option<usize>,
    events: EventLog<'a>,
    plan_file: PlanFile,
    folder: PathBuf,
    /// Selected, and neither settled, queued, running nor given up.
    open: BTreeSet<NodeIndex>,
    settled: BTreeMap<NodeIndex, Settled>,
    /// Decided to run, waiting for a slot.
    queue: VecDeque<Ready>,
    running: BTreeMap<NodeIndex, Running>,
    /// How often each subgraph was run again because its result was damaged when read.
    mended: BTreeMap<NodeIndex, u32>,
    /// How often each subgraph got another key since a local file changed.
    planned_again: BTreeMap<NodeIndex, u32>,
    ran: usize,
    reused: usize,
    failed: Vec<(String, anyhow::Error)>,
    signal: Option<i32>,
    sender: Sender<News>,
}

struct Ready {
    node: NodeIndex,
    action: Action,
    inputs: InputDigests,
    reason: String,
}

struct Running {
    control: Arc<Control>,
    thread: JoinHandle<()>,
    slot: usize,
    ready: Ready,
    log: PathBuf,
    /// For another process that runs the same key.
    waiting: bool,
}

impl Coordinator<'_> {
    fn start(&mut self) {
        let event = Event::RunStarted {
            schema: SCHEMA,
            run: self.folder.file_name().unwrap_or_default().to_string_lossy().into(),
            pipeline: self.plan_file.pipeline.clone(),
            devices: self.settings.devices.clone(),
            threads: self.threads(),
            stages: self.selection.order.iter().map(|&node| self.label(node)).collect(),
        };
        self.events.send(&event);
    }

    /// Until nothing is open that could run, or nothing runs any more after an interrupt.
    fn work(&mut self, news: &Receiver<News>) -> Result<()> {
        loop {
            self.decide_open()?;
            self.look_ahead();
            self.fill_slots();
            if self.running.is_empty() {
                return Ok(());
            }
            match news.recv_timeout(Duration::from_secs(3600)) {
                Ok(News::Attempt(node, update)) => self.hear(node, update)?,
                Ok(News::Signal(signal)) => self.interrupt(signal),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the coordinator holds a sender itself"),
            }
        }
    }

    /// Decides about everything whose inputs are known; a result in the store may make further inputs known.
    fn decide_open(&mut self) -> Result<()> {
        for node in self.selection.order.clone() {
            if self.signal.is_some() || !self.open.contains(&node) {
                continue;
            }
            let Ok(inputs) = plan::inputs(self.graph, node, &self.settled) else { continue };
            self.open.remove(&node);
            match plan::decide(&self.graph.subgraphs[node], &inputs, self.registry, &self.store) {
                Ok(decision) => self.act(node, inputs, decision)?,
                // The store itself failing ends the run; a file of the user's that cannot be read fails its stage.
                Err(error) if is_store_trouble(&error) => return Err(error),
                Err(error) => self.fail(node, error, None),
            }
        }
        Ok(())
    }

    /// With every result more is known of what is left: a stage that cannot work fails now, and not when its turn comes.
    fn look_ahead(&mut self) {
        if self.looked_with.replace(self.settled.len()) == Some(self.settled.len()) {
            return;
        }
        for foreseen in self.foresight.look(&self.settled) {
            let node = foreseen.node;
            let waits = self.open.contains(&node) || self.queue.iter().any(|ready| ready.node == node);
            let line = self.foresight.line(&foreseen);
            if !waits {
                continue;
            }
            if foreseen.is_error() {
                self.open.remove(&node);
                self.queue.retain(|ready| ready.node != node);
                self.fail(node, anyhow::anyhow!(line), None);
            } else if self.foreseen.insert((node, line.clone())) {
                let stage = self.label(node);
                self.events.send(&Event::StageWarned { stage, part: None, text: line });
            }
        }
    }

    fn act(&mut self, node: NodeIndex, inputs: InputDigests, decision: Decision) -> Result<()> {
        let (action, reason) = match decision {
            Decision::Cached(settled) => {
                self.note(node, &settled.action)?;
                self.reuse(node, settled);
                return Ok(());
            }
            Decision::DependsOnResult { .. } | Decision::Impossible { .. } => {
                unreachable!("`decide` is asked with inputs that are known, and returns errors as such")
            }
            Decision::Resume { action, round, rounds } => (action, format!("goes on after round {round} of {rounds}")),
            Decision::Run { action, why } => {
                let reason = reason(&self.selection.aliases[&node], &action, &why, &self.history, &self.store);
                (action, reason)
            }
        };
        self.note(node, &action)?;
        tracing::debug!(stage = self.label(node), key = %action.key, reason, "to run");
        self.queue.push_back(Ready { node, action: self.unrolled(action), inputs, reason });
        Ok(())
    }

    fn unrolled(&self, mut action: Action) -> Action {
        if let (true, Subgraph::Loop(body)) = (self.settings.unroll, &mut action.subgraph) {
            body.unroll = true;
        }
        action
    }

    /// Notes a key in `plan.json`, for `why` of later runs.
    fn note(&mut self, node: NodeIndex, action: &Action) -> Result<()> {
        self.store.keep_preimage(&action.preimage)?;
        let names = key::names_of(&action.subgraph);
        let stage = |alias: &Alias| PlannedStage { alias: alias.clone(), key: action.key, names: names.clone() };
        // A stage whose result was damaged is decided about again.
        let aliases = &self.selection.aliases[&node];
        self.plan_file.stages.retain(|stage| !aliases.contains(&stage.alias));
        self.plan_file.stages.extend(aliases.iter().map(stage));
        self.plan_file.write(&self.folder)
    }

    fn fill_slots(&mut self) {
        while self.signal.is_none() && self.running.len() < self.settings.jobs {
            // The same key twice, in two variants that the front end could not see to be the same: one run serves both.
            let busy: Vec<_> = self.running.values().map(|running| running.ready.action.key).collect();
            let Some(at) = self.queue.iter().position(|ready| !busy.contains(&ready.action.key)) else { return };
            let ready = self.queue.remove(at).expect("the position was just found");
            self.begin(ready);
        }
    }

    fn begin(&mut self, ready: Ready) {
        let node = ready.node;
        let taken: BTreeSet<_> = self.running.values().map(|running| running.slot).collect();
        let slot = (0..).find(|slot| !taken.contains(slot)).expect("some number is free");
        let control = Arc::new(Control::default());
        let log = self.log_path(node);
        let sender = self.sender.clone();
        let attempt = Attempt {
            stage: self.label(node),
            action: ready.action.clone(),
            inputs: ready.inputs.clone(),
            store: Arc::clone(&self.store),
            device: self.settings.devices[slot % self.settings.devices.len()].clone(),
            threads: self.threads(),
            cut_seconds: self.settings.cut_seconds,
            log: log.clone(),
            // Nobody listens once the run is over.
            say: Box::new(move |update| drop(sender.send(News::Attempt(node, update)))),
            control: Arc::clone(&control),
        };
        let thread = attempt.spawn();
        self.running.insert(node, Running { control, thread, slot, ready, log, waiting: false });
    }

    fn hear(&mut self, node: NodeIndex, update: Update) -> Result<()> {
        let stage = self.label(node);
        let Some(running) = self.running.get_mut(&node) else { return Ok(()) };
        running.waiting = matches!(update, Update::Waiting);
        let key = running.ready.action.key.to_string();
        match update {
            Update::Waiting => self.events.send(&Event::StageWaiting { stage, key }),
            Update::Started => {
                let (reason, log) = (running.ready.reason.clone(), running.log.display().to_string());
                self.events.send(&Event::StageStarted { stage, key, reason, log });
            }
            Update::Said(message) => self.pass_on(stage, message),
            Update::Ended(ended) => return self.end(node, ended),
        }
        Ok(())
    }

    fn pass_on(&mut self, stage: String, message: Message) {
        self.events.send(&match message {
            Message::Resumed { round, rounds } => Event::StageResumed { stage, round, rounds },
            Message::Progress { part, done, total, unit } => Event::StageProgress { stage, part, done, total, unit },
            Message::Metrics { part, row } => Event::StageMetrics { stage, part, row },
            Message::Warned { part, text } => Event::StageWarned { stage, part, text },
            Message::Cut { round, rounds } => Event::StageCut { stage, round, rounds },
            Message::Done { .. } | Message::Failed { .. } | Message::Changed { .. } | Message::Stopped { .. } => return,
        });
    }

    fn end(&mut self, node: NodeIndex, ended: Ended) -> Result<()> {
        let running = self.running.remove(&node).expect("it was running a moment ago");
        // Its last word was its end, so there is nothing to wait for.
        let _ = running.thread.join();
        let Ready { action, reason, .. } = running.ready;
        match ended {
            Ended::Ran(record) => {
                self.ran += 1;
                let settled = Settled { action, record };
                let (stage, key) = (self.label(node), settled.action.key.to_string());
                let seconds = settled.seconds().unwrap_or_default();
                let metrics = results::metrics(&settled, &self.store).unwrap_or_default();
                self.events.send(&Event::StageFinished { stage, key, reason, seconds, metrics });
                self.settled.insert(node, settled);
            }
            Ended::Reused(record) => self.reuse(node, Settled { action, record }),
            Ended::Stopped(cut) => {
                let stage = self.label(node);
                self.events.send(&Event::StageStopped { stage, cut });
            }
            Ended::Damaged { entry } => self.mend(node, &entry),
            Ended::Changed { source } => self.plan_again(node, &source),
            Ended::Failed(error) if is_store_trouble(&error) => return Err(error),
            Ended::Failed(error) => self.fail(node, error, Some(&running.log)),
        }
        Ok(())
    }

    fn reuse(&mut self, node: NodeIndex, settled: Settled) {
        self.reused += 1;
        let (stage, key) = (self.label(node), settled.action.key.to_string());
        let metrics = results::metrics(&settled, &self.store).unwrap_or_default();
        self.events.send(&Event::StageReused { stage, key, recorded_seconds: settled.seconds(), metrics });
        self.settled.insert(node, settled);
    }

    /// An input was damaged: the damaged artifact is gone, so what made it is open again, and so is this subgraph.
    fn mend(&mut self, node: NodeIndex, entry: &str) {
        let edges = self.graph.subgraphs.edges_directed(node, Direction::Incoming);
        let Some(maker) = edges.filter(|edge| edge.weight().input == entry).map(|edge| edge.source()).next() else {
            let error = anyhow::anyhow!("input `{entry}` is damaged, and nothing in the pipeline makes it");
            return self.fail(node, error, None);
        };
        let times = self.mended.entry(maker).or_default();
        *times += 1;
        if *times > 2 {
            let error = anyhow::anyhow!(
                "input `{entry}` was damaged {times} times in this run; check the disk under the store, then run again"
            );
            return self.fail(node, error, None);
        }
        let text = format!("its result was damaged in the store and is made again for `{}`", self.label(node));
        let stage = self.label(maker);
        self.events.send(&Event::StageWarned { stage, part: None, text });
        self.settled.remove(&maker);
        self.open.extend([maker, node]);
    }

    /// A local file changed between the plan and the start, so the stage has another key now.
    fn plan_again(&mut self, node: NodeIndex, source: &Path) {
        let times = self.planned_again.entry(node).or_default();
        *times += 1;
        let source = source.display();
        if *times > 2 {
            let error = anyhow::anyhow!("`{source}` keeps changing; run again when nothing writes to it");
            return self.fail(node, error, None);
        }
        let text = format!("`{source}` changed since this run looked at it; what it holds now is used");
        self.events.send(&Event::StageWarned { stage: self.label(node), part: None, text });
        self.open.insert(node);
    }

    /// Shows the failure at once and gives up whatever needs the stage.
    fn fail(&mut self, node: NodeIndex, error: anyhow::Error, log: Option<&Path>) {
        let stage = self.label(node);
        let log_end = log.map(|log| log_end(log, 20)).unwrap_or_default();
        self.events.send(&Event::StageFailed {
            stage: stage.clone(),
            error: format!("{error:#}"),
            log: log.map(|log| log.display().to_string()).unwrap_or_default(),
            log_end,
        });
        for after in self.selection.order.clone() {
            if self.open.contains(&after) && self.needs(after, node) {
                self.open.remove(&after);
                self.events.send(&Event::StageSkipped { stage: self.label(after), needs: stage.clone() });
            }
        }
        self.failed.push((stage, error));
    }

    fn needs(&self, node: NodeIndex, other: NodeIndex) -> bool {
        petgraph::algo::has_path_connecting(&self.graph.subgraphs, other, node, None)
    }

    /// The first interrupt cuts and stops, the second kills.
    fn interrupt(&mut self, signal: i32) {
        let first = self.signal.replace(self.signal.unwrap_or(signal)).is_none();
        for running in self.running.values() {
            if first { running.control.stop() } else { running.control.kill() }
        }
        // What waits for another process has no worker that could stop.
        let given_up = |running: &Running| !first || running.waiting;
        let nodes: Vec<_> =
            self.running.iter().filter(|(_, running)| given_up(running)).map(|(node, _)| *node).collect();
        for node in nodes {
            self.running.remove(&node);
            let stage = self.label(node);
            self.events.send(&Event::StageStopped { stage, cut: None });
        }
    }

    /// Says how it ended. After trouble with the store workers may still run, whose results could not be kept.
    fn finish(mut self, elapsed: Duration, store_failed: bool) -> Summary {
        self.running.values().for_each(|running| running.control.kill());
        let status = match (self.signal, self.failed.is_empty() && !store_failed) {
            (Some(_), _) => Status::Interrupted,
            (None, false) => Status::Failed,
            (None, true) => Status::Done,
        };
        let (ran, reused, failed) = (self.ran, self.reused, self.failed.len());
        self.events.send(&Event::RunFinished { status, ran, reused, failed, seconds: elapsed.as_secs_f64() });
        Summary { status, signal: self.signal, ran, reused, failed: self.failed, settled: self.settled }
    }

    fn label(&self, node: NodeIndex) -> String {
        self.selection.labels[&node].clone()
    }

    /// Threads of one worker: they share what there is.
    fn threads(&self) -> usize {
        (self.settings.threads / self.settings.jobs.max(1)).max(1)
    }

    /// `runs/<id>/<stage>.<attempt>.log`, the first attempt that has none yet.
    fn log_path(&self, node: NodeIndex) -> PathBuf {
        let plain = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let stage: String = self.label(node).chars().map(plain).collect();
        let paths = (1..).map(|attempt| self.folder.join(format!("{stage}.{attempt}.log")));
        paths.into_iter().find(|path| !path.exists()).expect("some number is free")
    }
}

/// Why a stage without a result runs, in a few words.
pub(crate) fn reason(aliases: &[Alias], action: &Action, why: &Why, history: &History, store: &Store) -> String {
    if *why != Why::NoRecord {
        return why.to_string();
    }
    if history.knows(aliases, &action.key) {
        return "not finished, or its result is gone".into();
    }
    match history.changes(aliases, action, store) {
        Ok(Some((_, changes))) => match changes.as_slice() {
            [] => "not run before under this name".into(),
            [only] => only.line(),
            [first, rest @ ..] => format!("{} (and {} more)", first.line(), rest.len()),
        },
        Ok(None) => "not run before".into(),
        Err(error) => format!("no result; what changed cannot be told: {error:#}"),
    }
}

/// Whether the store or the disk failed, so that no stage could do better.
pub(crate) fn is_store_trouble(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<cache::StoreError>());
    causes.any(cache::StoreError::is_io)
}

/// Makes `runs/<id>`; identifiers sort by time.
fn new_run(store: &Store) -> Result<PathBuf> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let folder = store.runs().join(format!("{}-{}", utc(now), std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
    Ok(folder)
}

/// A time since 1970 as `20260131-235959.123`, in UTC (days to date as in Hinnant's "chrono-compatible low-level date
/// algorithms").
fn utc(time: Duration) -> String {
    let (days, seconds) = ((time.as_secs() / 86_400) as i64, time.as_secs() % 86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}.{:03}", time.subsec_millis())
}

/// Interrupts, as news.
struct Signals {
    handle: signal_hook::iterator::Handle,
    thread: JoinHandle<()>,
}

impl Signals {
    fn listen(sender: Sender<News>) -> Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let mut signals =
            signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).context("cannot listen for interrupts")?;
        let handle = signals.handle();
        let thread = thread::spawn(move || {
            for signal in &mut signals {
                let _ = sender.send(News::Signal(signal));
            }
        });
        Ok(Signals { handle, thread })
    }

    fn close(self) {
        self.handle.close();
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_named_by_the_date() {
        let check = |seconds: u64, expected| assert_eq!(utc(Duration::from_millis(seconds * 1000 + 7)), expected);
        check(0, "19700101-000000.007");
        check(951_782_399, "20000228-235959.007");
        check(951_782_400, "20000229-000000.007");
        check(1_767_225_599, "20251231-235959.007");
    }
}
