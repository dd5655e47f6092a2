//! The coordinator: one thread that owns all state of a run, has each subgraph decided about when its inputs are known, starts
//! attempts as slots come free, and turns what they say into events.
//!
//! It reads nothing that may be large itself: whatever hashes runs on another thread and sends its [`News`], so that an
//! interrupt is heard at once. Threads that still hash when a run is over are left behind, and end with the process.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use cache::{InUse, Store};
use contract::{Needs, Registry};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;
use serde_json::{Map, Value as Json};

use crate::events::{Event, EventLog, SCHEMA, Status};
use crate::graph::{Entry, Graph, Node, Subgraph};
use crate::ground::memory;
use crate::ground::signals::{self, GRACE};
use crate::ground::trouble::{Fault, is_damage, is_store_trouble, own_panic};
use crate::plan::foresee::Foresight;
use crate::plan::history::{History, Pipeline, PlanLog, PlannedStage};
use crate::plan::key::{self, Action, InputDigests};
use crate::plan::names::Pins;
use crate::plan::results;
use crate::plan::selection::{Alias, Selection, reach};
use crate::plan::{self, Decision, Plan, Settled, Step};
use crate::run::attempt::{Attempt, Ended, Orders, Update};
use crate::run::executor::Executor;
use crate::run::folder::{log_end, log_path, new_run};
use crate::run::local::Local;
use crate::run::protocol::Message;
use crate::run::slots::{self, Slot, Slots};

/// How to run. Nothing here is in a key.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// `cpu`, or the cards that stages which need one are given, a card each: `cuda:N`.
    pub devices: Vec<String>,
    /// Threads of all workers together.
    pub threads: usize,
    /// Workers at a time.
    pub jobs: usize,
    /// Seconds between two cuts of a loop.
    pub cut_seconds: f64,
    /// Cut every loop after every stage run.
    pub unroll: bool,
    /// Stop as soon as a stage fails.
    pub fail_fast: bool,
}

/// What became of a run.
pub(crate) struct Summary {
    /// The signal that interrupted it.
    pub signal: Option<i32>,
    /// Name and error of each stage that went wrong, in the order it happened.
    pub failed: Vec<(String, anyhow::Error)>,
    /// Results, by subgraph.
    pub settled: BTreeMap<NodeIndex, Settled>,
}

/// What the coordinator waits for.
enum News {
    Decided(NodeIndex, InputDigests, Result<Box<Decided>>),
    Attempt(NodeIndex, Update),
    Signal(i32),
}

/// A decision, and for a result that is there what it measured.
struct Decided {
    decision: Decision,
    metrics: Map<String, Json>,
}

/// A subgraph to decide about, in whole: it is decided about on another thread.
struct Question {
    node: NodeIndex,
    subgraph: Node,
    inputs: InputDigests,
    forced: bool,
    /// What the plan said already.
    planned: Option<Decision>,
}

/// How long killed workers may take to be gone before nobody waits for them any more.
const LAST_BREATH: Duration = Duration::from_millis(400);

/// Runs what is selected and not in the store, of which `foresight` may have seen something before, from where a plan that was
/// just made leaves off. A store that cannot be written serves a run whose results are all there; nothing is kept of such a
/// run.
///
/// Errors when the store or the run's folder cannot be used; a stage that fails is no error here but part of the summary.
pub(crate) fn run(
    plan: Plan,
    pins: Pins,
    foresight: Foresight<'_>,
    store: Arc<Store>,
    settings: &Settings,
    pipeline: &Pipeline,
    reporter: &mut dyn crate::events::Reporter,
) -> Result<Summary> {
    let (sender, news) = mpsc::channel();
    let signal_sender = sender.clone();
    let signals = signals::take(move |signal| drop(signal_sender.send(News::Signal(signal))));
    let history = History::open(&store, pipeline.clone());
    let diary = if store.can_be_written()? {
        let in_use = store.in_use()?;
        store.sweep()?;
        let (folder, owner) = new_run(&store)?;
        Some(Diary { plan: PlanLog::create(&folder, pipeline)?, folder, _owner: owner, _in_use: in_use })
    } else {
        None
    };
    let Foresight { graph, selection, registry, .. } = foresight;
    let mut coordinator = Coordinator {
        graph,
        selection,
        registry,
        store,
        settings,
        history,
        pins,
        foresight,
        foreseen: BTreeSet::new(),
        changed: None,
        events: EventLog::create(diary.as_ref().map(|diary| diary.folder.as_path()), reporter)?,
        pipeline: pipeline.pipeline.clone(),
        diary,
        urgency: None,
        slots: Slots::new(&settings.devices, settings.threads, settings.jobs, memory::limit()),
        executor: Arc::new(Local::new()),
        open: selection.order.iter().copied().collect(),
        askable: (0..selection.order.len()).collect(),
        deciding: 0,
        forced: selection.forced.clone(),
        settled: BTreeMap::new(),
        queue: VecDeque::new(),
        running: BTreeMap::new(),
        mended: BTreeMap::new(),
        planned_again: BTreeMap::new(),
        ran: 0,
        reused: 0,
        failed: Vec::new(),
        stopping: None,
        sender,
    };
    let since = Instant::now();
    coordinator.start();
    coordinator.take_over(plan);
    let outcome = coordinator.work(&news);
    let summary = coordinator.finish(since.elapsed(), outcome.is_err());
    drop(signals);
    outcome.map(|()| summary)
}

struct Coordinator<'a> {
    graph: &'a Graph,
    selection: &'a Selection,
    registry: &'static Registry,
    store: Arc<Store>,
    settings: &'a Settings,
    history: History,
    pins: Pins,
    foresight: Foresight<'a>,
    /// Warnings that were given, so that each is given once.
    foreseen: BTreeSet<(NodeIndex, String)>,
    /// What got a result, or lost it, since it was last looked ahead; nothing before that.
    changed: Option<Vec<NodeIndex>>,
    events: EventLog<'a>,
    /// The pipeline file as given.
    pipeline: String,
    /// Where the run is written down; nothing in a store that cannot be written.
    diary: Option<Diary>,
    /// Seconds from the beginning of each subgraph to the end of the run, as it last took; asked for once something waits for a
    /// slot.
    urgency: Option<BTreeMap<NodeIndex, f64>>,
    slots: Slots,
    /// Where workers are started.
    executor: Arc<dyn Executor>,
    /// Selected, and neither settled, being decided about, queued, running nor given up.
    open: BTreeSet<NodeIndex>,
    /// Places in the order of open ones whose inputs may all be known.
    askable: BTreeSet<usize>,
    /// How many are being decided about.
    deciding: usize,
    /// Those that are to run although they have a result, until they do.
    forced: BTreeSet<NodeIndex>,
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
    stopping: Option<Stopping>,
    sender: Sender<News>,
}

/// The folder of a run, and its plan there.
struct Diary {
    folder: PathBuf,
    plan: PlanLog,
    /// Says that the run goes on.
    _owner: File,
    /// Keeps what others find useless where it is.
    _in_use: InUse,
}

/// The run is to stop.
struct Stopping {
    /// By this signal, the first that came; none where a stage failed.
    signal: Option<i32>,
    /// When what still runs is killed, and after that when it is given up.
    until: Instant,
    killed: bool,
}

struct Ready {
    node: NodeIndex,
    action: Action,
    inputs: InputDigests,
    needs: Needs,
    /// Whether it has a result, which is to be made again.
    again: bool,
    /// Whether it is to have the machine for itself, since memory ran out when it had not.
    alone: bool,
    reason: String,
    /// The newest cut: rounds done and all rounds.
    cut: Option<(u64, u64)>,
}

struct Running {
    orders: Arc<Orders>,
    slot: Slot,
    ready: Ready,
    log: PathBuf,
}

impl Coordinator<'_> {
    fn start(&mut self) {
        let event = Event::RunStarted {
            schema: SCHEMA,
            run: self.run_name(),
            pipeline: self.pipeline.clone(),
            devices: self.settings.devices.clone(),
            threads: self.slots.threads(),
            stages: self.selection.order.iter().map(|&node| self.label(node)).collect(),
        };
        self.events.send(&event);
    }

    /// Until nothing is open that could run, or nothing runs any more after an interrupt.
    fn work(&mut self, news: &Receiver<News>) -> Result<()> {
        loop {
            if self.stopping.is_none() {
                self.decide_next();
                if self.deciding == 0 {
                    self.look_ahead();
                    self.fill_slots()?;
                }
            }
            if self.running.is_empty() && (self.stopping.is_some() || self.deciding == 0) {
                return Ok(());
            }
            let until = self.stopping.as_ref().map(|stopping| stopping.until);
            let patience = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
            match news.recv_timeout(patience.min(Duration::from_secs(3600))) {
                Ok(News::Decided(node, inputs, decided)) => self.act(node, inputs, decided)?,
                Ok(News::Attempt(node, update)) => self.hear(node, update)?,
                Ok(News::Signal(signal)) => self.interrupt(signal),
                Err(RecvTimeoutError::Timeout) => self.run_out(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the coordinator holds a sender itself"),
            }
        }
    }

    /// Begins with what the plan decided from results that are there.
    fn take_over(&mut self, plan: Plan) {
        let settled = plan.settled();
        let mut questions = Vec::new();
        for (node, step) in plan.steps {
            let Step::Decided(decision) = step else { continue };
            if let Ok(inputs) = plan::inputs(self.graph, node, &settled) {
                questions.push(self.question(node, inputs, Some(decision)));
            }
        }
        self.ask(questions);
    }

    /// Has all those decided about whose inputs are known; results in the store may make further inputs known.
    fn decide_next(&mut self) {
        if self.deciding > 0 {
            return;
        }
        let mut questions = Vec::new();
        for place in std::mem::take(&mut self.askable) {
            let node = self.selection.order[place];
            if self.open.contains(&node)
                && let Ok(inputs) = plan::inputs(self.graph, node, &self.settled)
            {
                questions.push(self.question(node, inputs, None));
            }
        }
        self.ask(questions);
    }

    fn question(&self, node: NodeIndex, inputs: InputDigests, planned: Option<Decision>) -> Question {
        let (subgraph, forced) = (self.graph.subgraphs[node].clone(), self.forced.contains(&node));
        Question { node, subgraph, inputs, forced, planned }
    }

    /// Has subgraphs decided about, in that order, on another thread.
    fn ask(&mut self, questions: Vec<Question>) {
        if questions.is_empty() {
            return;
        }
        for question in &questions {
            self.open.remove(&question.node);
        }
        self.deciding += questions.len();
        let registry = self.registry;
        let (store, sender) = (Arc::clone(&self.store), self.sender.clone());
        thread::spawn(move || {
            for question in questions {
                let (node, inputs) = (question.node, question.inputs.clone());
                let decide = || decide_and_measure(question, registry, &store);
                let decided = catch_unwind(AssertUnwindSafe(decide)).unwrap_or_else(|_| Err(own_panic()));
                if sender.send(News::Decided(node, inputs, decided)).is_err() {
                    return; // nobody listens once the run is over
                }
            }
        });
    }

    /// A result is there: those that read it may have all inputs now.
    fn settle(&mut self, node: NodeIndex, settled: Settled) {
        self.settled.insert(node, settled);
        self.note_change(node);
        let readers = self.graph.subgraphs.neighbors_directed(node, Direction::Outgoing);
        self.askable.extend(readers.filter_map(|reader| self.selection.positions.get(&reader)));
    }

    /// It is to be decided about again.
    fn reopen(&mut self, node: NodeIndex) {
        self.open.insert(node);
        self.note_change(node);
        self.askable.extend(self.selection.positions.get(&node));
    }

    fn note_change(&mut self, node: NodeIndex) {
        if let Some(changed) = &mut self.changed {
            changed.push(node);
        }
    }

    /// With every result more is known of what is left: a stage that cannot work fails now, and not when its turn comes.
    fn look_ahead(&mut self) {
        let found = match self.changed.replace(Vec::new()) {
            None => self.foresight.look(&self.settled),
            Some(changed) => self.foresight.look_again(&self.settled, changed),
        };
        for foreseen in found {
            let node = foreseen.node;
            let waits = self.open.contains(&node) || self.queue.iter().any(|ready| ready.node == node);
            let line = self.foresight.line(&foreseen);
            if !waits {
                continue;
            }
            if foreseen.is_error() {
                self.open.remove(&node);
                self.queue.retain(|ready| ready.node != node);
                self.fail(node, anyhow!(line), None);
            } else if self.foreseen.insert((node, line.clone())) {
                let stage = self.label(node);
                self.events.send(&Event::StageWarned { stage, part: None, text: line });
            }
        }
    }

    fn act(&mut self, node: NodeIndex, inputs: InputDigests, decided: Result<Box<Decided>>) -> Result<()> {
        self.deciding -= 1;
        let Decided { decision, metrics } = match decided {
            Ok(decided) => *decided,
            // The store itself failing ends the run; a file of the user's that cannot be read fails its stage.
            Err(error) if is_store_trouble(&error) => return Err(error),
            Err(error) => {
                self.fail(node, error, None);
                return Ok(());
            }
        };
        if let Err(error) = self.pins.check(node, decision.action(), &self.store) {
            self.fail(node, error, None);
            return Ok(());
        }
        let again = matches!(decision, Decision::Again { .. });
        let (action, reason, cut) = match decision {
            Decision::Cached(settled) => {
                self.note(node, &settled.action)?;
                self.reuse(node, settled, metrics);
                return Ok(());
            }
            Decision::Resume { action, round, rounds } => {
                (action, format!("goes on after round {round} of {rounds}"), Some((round, rounds)))
            }
            Decision::Again { action } => (action, plan::FORCED.to_owned(), None),
            Decision::Run { action, why } => {
                let reason = self.history.reason(&self.selection.aliases[&node], &action, &why, &self.store);
                (action, reason, None)
            }
        };
        self.note(node, &action)?;
        tracing::debug!(stage = self.label(node), key = %action.key, reason, "to run");
        let needs = slots::needs(&action.subgraph, self.registry);
        let ready = Ready { node, action: self.unrolled(action), inputs, needs, again, alone: false, reason, cut };
        self.enqueue(ready);
        Ok(())
    }

    /// Of stages that run side by side, those come first that the most work waits for; else all run in the order of the file.
    fn enqueue(&mut self, ready: Ready) {
        if self.settings.jobs < 2 {
            return self.queue.push_back(ready);
        }
        let urgency =
            self.urgency.get_or_insert_with(|| urgencies(self.graph, self.selection, &self.history, &self.store));
        let place = self.queue.partition_point(|other| urgency[&other.node] >= urgency[&ready.node]);
        self.queue.insert(place, ready);
    }

    fn unrolled(&self, mut action: Action) -> Action {
        if let (true, Subgraph::Loop(body)) = (self.settings.unroll, &mut action.subgraph) {
            body.unroll = true;
        }
        action
    }

    /// Notes a key in the run's plan, for `why` of later runs.
    fn note(&mut self, node: NodeIndex, action: &Action) -> Result<()> {
        let Some(diary) = &mut self.diary else { return Ok(()) };
        self.store.keep_preimage(&action.preimage)?;
        let names = key::names_of(&action.subgraph);
        let stage = |alias: &Alias| PlannedStage { alias: alias.clone(), key: action.key, names: names.clone() };
        diary.plan.add(self.selection.aliases[&node].iter().map(stage))
    }

    /// Starts what is queued and finds what it needs free. The same key twice, in two variants that the front end could not
    /// see to be the same, runs once and serves both.
    fn fill_slots(&mut self) -> Result<()> {
        if self.running.values().any(|running| running.ready.alone) {
            return Ok(());
        }
        let mut at = 0;
        while self.slots.has_place()
            && let Some(ready) = self.queue.get(at)
        {
            let is_running = |running: &Running| running.ready.action.key == ready.action.key;
            let twin_runs = self.running.values().any(is_running);
            let waits = twin_runs || ready.alone && !self.running.is_empty();
            match if waits { None } else { self.slots.take(ready.needs, self.foresight.memory(ready.node)) } {
                Some(slot) => {
                    let ready = self.queue.remove(at).expect("it was looked at just now");
                    self.begin(ready, slot)?;
                }
                None => at += 1,
            }
        }
        Ok(())
    }

    fn begin(&mut self, ready: Ready, slot: Slot) -> Result<()> {
        let node = ready.node;
        let Some(diary) = &self.diary else {
            // What the file system says to that is the reason.
            let reason =
                self.store.begin(&ready.action.key).err().map_or_else(|| anyhow!("it is read-only"), Into::into);
            return Err(reason.context(format!(
                "stage `{}` has to run, and the store `{}` cannot be written",
                self.label(node),
                self.store.root().display()
            )));
        };
        let orders = Arc::new(Orders::default());
        let log = log_path(&diary.folder, &self.label(node));
        let sender = self.sender.clone();
        let attempt = Attempt {
            stage: self.label(node),
            action: ready.action.clone(),
            inputs: ready.inputs.clone(),
            again: ready.again,
            store: Arc::clone(&self.store),
            slot: slot.clone(),
            cut_seconds: self.settings.cut_seconds,
            executor: Arc::clone(&self.executor),
            log: log.clone(),
            // Nobody listens once the run is over.
            say: Box::new(move |update| drop(sender.send(News::Attempt(node, update)))),
            orders: Arc::clone(&orders),
        };
        attempt.spawn()?;
        self.running.insert(node, Running { orders, slot, ready, log });
        Ok(())
    }

    fn hear(&mut self, node: NodeIndex, update: Update) -> Result<()> {
        let stage = self.label(node);
        let Some(running) = self.running.get_mut(&node) else { return Ok(()) };
        let key = running.ready.action.key.to_string();
        match update {
            Update::Waiting => self.events.send(&Event::StageWaiting { stage, key }),
            Update::Started => {
                let (reason, log) = (running.ready.reason.clone(), running.log.display().to_string());
                self.events.send(&Event::StageStarted { stage, key, reason, log });
            }
            Update::Said(message) => {
                if let Message::Resumed { round, rounds } | Message::Cut { round, rounds } = message {
                    running.ready.cut = Some((round, rounds));
                }
                self.pass_on(stage, message);
            }
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
            Message::Noted { part, text } => Event::StageNoted { stage, part, text },
            Message::Cut { round, rounds } => Event::StageCut { stage, round, rounds },
        });
    }

    fn end(&mut self, node: NodeIndex, ended: Ended) -> Result<()> {
        let running = self.running.remove(&node).expect("it was running a moment ago");
        self.slots.give_back(running.slot);
        let Ready { action, inputs, needs, again, reason, cut, .. } = running.ready;
        if matches!(ended, Ended::Ran(..)) {
            self.forced.remove(&node);
        }
        match ended {
            Ended::Ran(record, metrics) => {
                self.ran += 1;
                let settled = Settled::new(action, record);
                let (stage, key) = (self.label(node), settled.action.key.to_string());
                let seconds = settled.seconds().unwrap_or_default();
                self.events.send(&Event::StageFinished { stage, key, reason, seconds, metrics });
                self.settle(node, settled);
            }
            Ended::Reused(record, metrics) => self.reuse(node, Settled::new(action, record), metrics),
            Ended::Stopped => self.stopped(node, cut),
            Ended::Damaged { entry } => self.mend(node, &entry),
            Ended::Changed { source } => self.plan_again(node, &source),
            Ended::Failed(error) if is_store_trouble(&error) => return Err(error),
            // Beside others it had less memory than there is: a stage that fails alone fails for good.
            Ended::Failed(error) if Fault::of(&error) == Fault::Memory && !self.running.is_empty() => {
                let text = format!("{error:#}; it runs once more, when no other stage does");
                self.events.send(&Event::StageWarned { stage: self.label(node), part: None, text });
                self.queue.push_back(Ready { node, action, inputs, needs, again, alone: true, reason, cut });
            }
            Ended::Failed(error) => self.fail(node, error, Some(&running.log)),
        }
        Ok(())
    }

    fn reuse(&mut self, node: NodeIndex, settled: Settled, metrics: Map<String, Json>) {
        self.reused += 1;
        let (stage, key) = (self.label(node), settled.action.key.to_string());
        self.events.send(&Event::StageReused { stage, key, recorded_seconds: settled.seconds(), metrics });
        self.settle(node, settled);
    }

    fn stopped(&mut self, node: NodeIndex, cut: Option<(u64, u64)>) {
        let stage = self.label(node);
        self.events.send(&Event::StageStopped { stage, cut });
    }

    /// An input was damaged: the damaged artifact is gone, so what made it is open again, and so is this subgraph.
    fn mend(&mut self, node: NodeIndex, entry: &Entry) {
        let edges = self.graph.subgraphs.edges_directed(node, Direction::Incoming);
        let Some(maker) = edges.filter(|edge| edge.weight().input == *entry).map(|edge| edge.source()).next() else {
            let error = anyhow!("input `{entry}` is damaged, and nothing in the pipeline makes it");
            return self.fail(node, error, None);
        };
        let times = self.mended.entry(maker).or_default();
        *times += 1;
        if *times > 2 {
            let error = anyhow!(
                "input `{entry}` was damaged {times} times in this run; check the disk under the store, then run again"
            );
            return self.fail(node, error, None);
        }
        let text = format!("its result was damaged in the store and is made again for `{}`", self.label(node));
        let stage = self.label(maker);
        self.events.send(&Event::StageWarned { stage, part: None, text });
        self.settled.remove(&maker);
        self.reopen(maker);
        self.reopen(node);
    }

    /// A local file changed between the plan and the start, so the stage has another key now.
    fn plan_again(&mut self, node: NodeIndex, source: &Path) {
        let times = self.planned_again.entry(node).or_default();
        *times += 1;
        let source = source.display();
        if *times > 2 {
            let error = anyhow!("`{source}` keeps changing; run again when nothing writes to it");
            return self.fail(node, error, None);
        }
        let text = format!("`{source}` changed since this run looked at it; what it holds now is used");
        self.events.send(&Event::StageWarned { stage: self.label(node), part: None, text });
        self.reopen(node);
    }

    /// Shows the failure at once and gives up whatever needs the stage.
    fn fail(&mut self, node: NodeIndex, error: anyhow::Error, log: Option<&Path>) {
        let stage = self.label(node);
        let log_end = log.map(|log| log_end(log, 20)).unwrap_or_default();
        self.events.send(&Event::StageFailed {
            stage: stage.clone(),
            fault: Fault::of(&error),
            error: format!("{error:#}"),
            log: log.map(|log| log.display().to_string()).unwrap_or_default(),
            log_end,
        });
        let after = reach(self.graph, BTreeSet::from([node]), Direction::Outgoing);
        let after: BTreeSet<usize> =
            after.iter().filter_map(|after| self.selection.positions.get(after).copied()).collect();
        for place in after {
            let after = self.selection.order[place];
            if self.open.remove(&after) {
                self.events.send(&Event::StageSkipped { stage: self.label(after), needs: stage.clone() });
            }
        }
        self.failed.push((stage, error));
        if self.settings.fail_fast && self.stopping.is_none() {
            self.stop(None);
        }
    }

    /// The first interrupt cuts and stops, the second kills.
    fn interrupt(&mut self, signal: i32) {
        if let Some(stopping) = &mut self.stopping {
            stopping.signal.get_or_insert(signal);
            self.kill_all();
            return self.give_up(|_| true);
        }
        self.events.send(&Event::RunStopping { signal, seconds: (GRACE + LAST_BREATH).as_secs_f64() });
        self.stop(Some(signal));
    }

    /// Starts nothing any more, and tells what runs to keep what it can and stop.
    fn stop(&mut self, signal: Option<i32>) {
        self.stopping = Some(Stopping { signal, until: Instant::now() + GRACE, killed: false });
        for running in self.running.values() {
            running.orders.stop();
        }
        // What has no worker yet, since it waits for another process or reads its inputs, has nothing to lose.
        self.give_up(|running| !running.orders.has_begun());
    }

    /// The time to stop in order has run out: workers are killed, and then nothing is waited for.
    fn run_out(&mut self) {
        let Some(stopping) = &mut self.stopping else { return };
        if std::mem::replace(&mut stopping.killed, true) {
            return self.give_up(|_| true);
        }
        stopping.until = Instant::now() + LAST_BREATH;
        self.kill_all();
    }

    fn kill_all(&self) {
        self.running.values().for_each(|running| running.orders.kill());
    }

    /// Waits no longer for some attempts. Their threads may stay behind, but start no worker any more.
    fn give_up(&mut self, which: impl Fn(&Running) -> bool) {
        let nodes = self.running.iter().filter(|(_, running)| which(running)).map(|(node, _)| *node);
        for node in nodes.collect::<Vec<_>>() {
            let running = self.running.remove(&node).expect("it was just listed");
            self.stopped(node, running.ready.cut);
        }
    }

    /// Says how it ended. After trouble with the store workers may still run, whose results could not be kept.
    fn finish(mut self, elapsed: Duration, store_failed: bool) -> Summary {
        self.kill_all();
        let signal = self.stopping.as_ref().and_then(|stopping| stopping.signal);
        let status = match (signal, self.failed.is_empty() && !store_failed) {
            (Some(_), _) => Status::Interrupted,
            (None, false) => Status::Failed,
            (None, true) => Status::Done,
        };
        let (ran, reused, failed) = (self.ran, self.reused, self.failed.len());
        self.events.send(&Event::RunFinished { status, ran, reused, failed, seconds: elapsed.as_secs_f64() });
        Summary { signal, failed: self.failed, settled: self.settled }
    }

    fn label(&self, node: NodeIndex) -> String {
        self.selection.labels[&node].clone()
    }

    /// Identifier of the run; empty where nothing is kept of it.
    fn run_name(&self) -> String {
        let name = self.diary.as_ref().and_then(|diary| diary.folder.file_name());
        name.map_or_else(String::new, |name| name.to_string_lossy().into())
    }
}

/// Seconds from the beginning of each subgraph to the end of the longest chain that begins with it, as stages last took. Those
/// that never ran count as the mean of the others.
fn urgencies(graph: &Graph, selection: &Selection, history: &History, store: &Store) -> BTreeMap<NodeIndex, f64> {
    let cost = |node: &NodeIndex| history.cost(&selection.aliases[node], store).map(|cost| cost.seconds);
    let known: Vec<Option<f64>> = selection.order.iter().map(cost).collect();
    let (sum, number) = known.iter().flatten().fold((0.0, 0.0), |(sum, number), seconds| (sum + seconds, number + 1.0));
    let mean = if number > 0.0 { sum / number } else { 1.0 };
    let mut urgencies: BTreeMap<NodeIndex, f64> = BTreeMap::new();
    for (node, seconds) in selection.order.iter().zip(known).rev() {
        let after = graph.subgraphs.neighbors_directed(*node, Direction::Outgoing);
        let longest =
            after.filter_map(|after| urgencies.get(&after)).fold(0.0, |longest: f64, other| longest.max(*other));
        urgencies.insert(*node, seconds.unwrap_or(mean) + longest);
    }
    urgencies
}

/// Decides about a subgraph, and reads what a result that is there measured. One whose figures turn out to be damaged is no
/// result: the store has dropped it then, and asked again it says so.
fn decide_and_measure(question: Question, registry: &Registry, store: &Store) -> Result<Box<Decided>> {
    let Question { subgraph, inputs, forced, planned, .. } = question;
    let decide = || Ok::<_, anyhow::Error>(plan::decide(&subgraph, &inputs, registry, store)?.again_if(forced));
    let mut decision = planned.map_or_else(decide, Ok)?;
    while let Decision::Cached(settled) = &decision {
        match results::metrics(settled, store) {
            Ok(metrics) => return Ok(Box::new(Decided { decision, metrics })),
            Err(error) if is_damage(&error) => decision = decide()?,
            Err(error) => return Err(error),
        }
    }
    Ok(Box::new(Decided { decision, metrics: Map::new() }))
}
