//! The worker process: runs one subgraph and ends.
//!
//! A worker believes only its job: it reads the inputs it is given, writes to its work folder, and keeps cuts in the store.
//! It publishes nothing; that is for the coordinator, which holds the lock. It never outlives its coordinator.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use cache::{Digest, Store};
use contract::{AnyValue, Env, Facts, Inputs, PortType, Registry, Sink, Step};
use serde_json::{Map, Value as Json};

use crate::graph::{Entry, Loop, Operator, Subgraph};
use crate::ground::trouble::{Blamed, Fault};
use crate::plan::key;
use crate::rounds::{self, Ask, Ended, Host, MetricsRow, Standing};
use crate::run::protocol::{Input, Job, Message, Order, Outcome, PARENT, REPORT};
use crate::run::sources;

/// Training recurses deeply: the graph of a long sequence is dropped node by node.
const STACK: usize = 256 << 20;

/// How often rows and progress are reported, at most.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// Runs the job that comes on standard input. The exit status only says whether the protocol was kept to: what became of
/// the job is said on standard output.
pub(crate) fn run(registry: Registry) -> ExitCode {
    if let Err(error) = die_with_parent() {
        eprintln!("cannot tie this worker to its coordinator: {error:#}");
        return ExitCode::from(2);
    }
    let mut lines = io::stdin().lock().lines();
    let order = lines.next().and_then(Result::ok).and_then(|line| serde_json::from_str(&line).ok());
    let Some(Order::Run(job)) = order else {
        eprintln!("`pipeline worker` is started by `pipeline run`, which sends it a job; it is of no use by itself");
        return ExitCode::from(2);
    };
    drop(lines);
    std::panic::set_hook(Box::new(note_panic));
    let work = move || {
        start_threads(job.threads)?;
        let stop = Arc::new(Stop::default());
        let listening = Arc::clone(&stop);
        thread::Builder::new().spawn(move || listen(&listening)).context("cannot start a thread")?;
        work(*job, &registry, &stop)
    };
    let outcome = match thread::Builder::new().stack_size(STACK).spawn(work).map(thread::JoinHandle::join) {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => Err(of_panic(text_of(panic.as_ref())).into()),
        Err(error) => Err(anyhow!(error).context("cannot start a thread")),
    };
    send(&outcome.unwrap_or_else(|error| Outcome::Failed { fault: Fault::of(&error), text: format!("{error:#}") }));
    ExitCode::SUCCESS
}

/// Starts the threads that computations are spread over: later, on first use, a failure to do so would be a panic.
fn start_threads(threads: usize) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.with_context(|| format!("cannot start {threads} threads; ask for fewer with `--threads`"))
}

/// Where the last panic was.
static PANICKED_AT: Mutex<Option<String>> = Mutex::new(None);

/// Writes a panic to the log, as ever, and remembers its place.
fn note_panic(panic: &std::panic::PanicHookInfo) {
    eprintln!("{panic}");
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        // Under the standard library's own headline, by which it is left out of what people see of a log.
        eprintln!("stack backtrace:\n{}", backtrace.to_string().trim_end());
    }
    let place = panic.location().map(|place| format!("{}:{}", place.file(), place.line()));
    *PANICKED_AT.lock().unwrap_or_else(PoisonError::into_inner) = place;
}

/// A panic is a bug, unless it is the standard library's way to say that so much memory cannot even be asked for.
fn of_panic(text: &str) -> Blamed {
    if text == "capacity overflow" {
        let text =
            "more memory was asked for than any machine has; check the sizes in the stage's configuration".into();
        return Blamed { fault: Fault::Memory, text };
    }
    let place = PANICKED_AT.lock().unwrap_or_else(PoisonError::into_inner).take();
    let place = place.map(|place| format!(" at {place}")).unwrap_or_default();
    Blamed { fault: Fault::Bug, text: format!("panicked{place}: {text}; {REPORT}") }
}

/// Asks the kernel to kill this process when its parent dies, then looks whether it had died before.
fn die_with_parent() -> Result<()> {
    let Ok(expected) = std::env::var(PARENT) else { return Ok(()) };
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, set_parent_process_death_signal};
        set_parent_process_death_signal(Some(Signal::KILL)).context("the kernel refused")?;
    }
    let parent = rustix::process::getppid().map(|parent| parent.as_raw_nonzero().to_string());
    if parent.as_deref() != Some(&expected) {
        bail!("the coordinator is gone");
    }
    Ok(())
}

/// What an order to stop meets.
#[derive(Default)]
struct Stop(Mutex<Standstill>);

#[derive(Default)]
struct Standstill {
    /// Whether the order has come.
    ordered: bool,
    /// Whether something was computed that only this process has, and that ends in a cut or an output if it is let.
    unsaved: bool,
}

impl Stop {
    /// The order has come. With nothing to keep it is obeyed at once; else the work goes on to where it can be kept. If that
    /// takes too long, the coordinator kills.
    fn order(&self) {
        let mut state = self.lock();
        state.ordered = true;
        if !state.unsaved {
            leave();
        }
    }

    /// There is something to keep now.
    fn has_unsaved(&self) {
        self.lock().unsaved = true;
    }

    /// All that was computed is kept: if the order has come meanwhile, this is the place to stop.
    fn all_saved(&self) {
        let mut state = self.lock();
        state.unsaved = false;
        if state.ordered {
            leave();
        }
    }

    fn is_ordered(&self) -> bool {
        self.lock().ordered
    }

    fn lock(&self) -> MutexGuard<'_, Standstill> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that it stopped, and ends whatever other threads are in the middle of.
fn leave() -> ! {
    send(&Outcome::Stopped);
    std::process::exit(0)
}

/// Hears orders until the coordinator is gone.
fn listen(stop: &Stop) {
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        if matches!(serde_json::from_str(&line), Ok(Order::Stop)) {
            stop.order();
        }
    }
    std::process::exit(1);
}

fn work(mut job: Job, registry: &Registry, stop: &Stop) -> Result<Outcome> {
    let since = Instant::now();
    let mut report = Report::new();
    let mut tell = |done: u64, all: Option<u64>| {
        let mebibytes = |bytes: u64| bytes.div_ceil(1 << 20);
        report.progress(None, mebibytes(done), mebibytes(all.unwrap_or(0).max(done)), "MiB");
    };
    if let Some(source) = sources::take(&mut job.subgraph, &job.sources, &job.work, registry, &mut tell)? {
        return Ok(Outcome::Changed { source });
    }
    let scratch = job.work.join("scratch");
    make(&scratch)?;
    let env = Env { device: job.device.clone(), threads: job.threads, scratch };
    let entries = load_inputs(&job.inputs, registry, &env)?;
    match &job.subgraph {
        Subgraph::Operator(operator) => run_once(&job, operator, entries, registry, &env, stop, since),
        Subgraph::Loop(body) => run_rounds(&job, body, entries, registry, &env, stop),
    }
}

/// Reads every distinct artifact once: entries that name the same content share the value.
fn load_inputs(inputs: &BTreeMap<Entry, Input>, registry: &Registry, env: &Env) -> Result<BTreeMap<Entry, AnyValue>> {
    let mut known: BTreeMap<(Digest, PortType), AnyValue> = BTreeMap::new();
    let mut entries = BTreeMap::new();
    for (entry, input) in inputs {
        let value = match known.get(&(input.digest, input.port_type)) {
            Some(value) => Arc::clone(value),
            None => {
                let value = registry.load(input.port_type, &input.path, env);
                value.with_context(|| format!("cannot read input `{entry}`"))?
            }
        };
        known.insert((input.digest, input.port_type), Arc::clone(&value));
        entries.insert(entry.clone(), value);
    }
    Ok(entries)
}

fn run_once(
    job: &Job,
    operator: &Operator,
    entries: BTreeMap<Entry, AnyValue>,
    registry: &Registry,
    env: &Env,
    stop: &Stop,
    since: Instant,
) -> Result<Outcome> {
    let mut inputs = Inputs::new();
    for (entry, value) in entries {
        inputs.insert(entry.to_string(), value);
    }
    rounds::check_inputs(operator, &inputs, None, registry)?;
    let mut sink = OnceSink { rows: Vec::new(), report: Report::new() };
    let kind = rounds::find_kind(registry, &operator.kind)?;
    let outputs = kind.start(&operator.config, env, None)?.run(inputs, &Step::once(), &mut sink)?.0;
    stop.has_unsaved();
    rounds::check_outputs(&operator.ports, &outputs)?;
    let mut written = Vec::new();
    for (port, value) in &outputs {
        written.push(save(&job.work, port, value)?);
    }
    let facts = known(outputs.iter().map(|(port, value)| (port.clone(), value)));
    // A training stage that runs once has rows too, and the port of that name is theirs unless it declares one itself.
    if !sink.rows.is_empty() && !outputs.contains_key("metrics") {
        written.push(save_rows(&job.work, "metrics", &sink.rows)?);
    }
    Ok(Outcome::Done { outputs: written, facts, seconds: since.elapsed().as_secs_f64(), rounds: None })
}

fn run_rounds(
    job: &Job,
    body: &Loop,
    entries: BTreeMap<Entry, AnyValue>,
    registry: &Registry,
    env: &Env,
    stop: &Stop,
) -> Result<Outcome> {
    let store = Store::open(&job.store)?;
    let cut = find_cut(&store, job, &env.scratch)?;
    let mut host = WorkerHost { job, store: &store, stop, last_cut: Instant::now(), report: Report::new() };
    match rounds::run_loop(body, entries, cut.as_deref(), registry, env, &mut host)? {
        Ended::Stopped(_) => Ok(Outcome::Stopped),
        Ended::Finished(finished) => {
            let mut written = Vec::new();
            for (index, value) in finished.outputs.iter().enumerate() {
                written.push(save(&job.work, &key::stored_value(index), value)?);
            }
            for (index, rows) in finished.rows.iter().enumerate() {
                written.push(save_rows(&job.work, &key::stored_metrics(index), rows)?);
            }
            let outputs = finished.outputs.iter().enumerate();
            let facts = known(outputs.map(|(index, value)| (key::stored_value(index), value)));
            let (seconds, rounds) = (finished.seconds, Some(finished.rounds));
            Ok(Outcome::Done { outputs: written, facts, seconds, rounds })
        }
    }
}

/// What is known of outputs; those of which nothing is are left out.
fn known<'a>(outputs: impl Iterator<Item = (String, &'a AnyValue)>) -> BTreeMap<String, Facts> {
    let facts = outputs.map(|(name, value)| (name, value.facts()));
    facts.filter(|(_, facts)| *facts != Facts::default()).collect()
}

/// The newest whole cut, as links of our own: values may be read where they lie, and the store drops old cuts.
fn find_cut(store: &Store, job: &Job, scratch: &Path) -> Result<Option<PathBuf>> {
    let Some(cut) = store.newest_cut(&job.key)? else { return Ok(None) };
    let Standing { round, rounds, .. } = rounds::standing(&cut.path)?;
    let folder = scratch.join("resumed");
    link_tree(&cut.path, &folder)?;
    send(&Message::Resumed { round, rounds });
    Ok(Some(folder))
}

fn link_tree(from: &Path, to: &Path) -> Result<()> {
    make(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read folder `{}`", from.display()))? {
        let entry = entry.with_context(|| format!("cannot read folder `{}`", from.display()))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            link_tree(&source, &target)?;
        } else if fs::hard_link(&source, &target).is_err() {
            fs::copy(&source, &target).with_context(|| format!("cannot copy `{}`", source.display()))?;
        }
    }
    Ok(())
}

fn save(work: &Path, name: &str, value: &AnyValue) -> Result<(String, PortType)> {
    let folder = work.join("outputs").join(name);
    make(&folder)?;
    value.save(&folder).with_context(|| format!("cannot save output `{name}`"))?;
    Ok((name.to_owned(), value.port_type()))
}

fn save_rows(work: &Path, name: &str, rows: &[MetricsRow]) -> Result<(String, PortType)> {
    let folder = work.join("outputs").join(name);
    make(&folder)?;
    rounds::write_rows(&folder, rows)?;
    Ok((name.to_owned(), PortType::Metrics))
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make folder `{}`", folder.display()))
}

/// Decides when a loop is cut.
struct WorkerHost<'a> {
    job: &'a Job,
    store: &'a Store,
    stop: &'a Stop,
    last_cut: Instant,
    report: Report,
}

impl Host for WorkerHost<'_> {
    fn ask(&mut self, round_done: bool) -> Ask {
        let interval = Duration::try_from_secs_f64(self.job.cut_seconds).unwrap_or(Duration::MAX);
        // Between rounds a cut is smallest; within a long round one is taken all the same.
        let due = if round_done { interval } else { interval.saturating_mul(2) };
        self.stop.has_unsaved();
        if self.stop.is_ordered() {
            Ask::Stop
        } else if self.last_cut.elapsed() >= due {
            Ask::Cut
        } else {
            Ask::Continue
        }
    }

    fn keep_cut(&mut self, number: u64, standing: Standing, write: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        let kept = self.store.save_cut(&self.job.key, number, write);
        self.last_cut = Instant::now();
        match kept {
            Ok(()) => {
                send(&Message::Cut { round: standing.round, rounds: standing.rounds });
                self.stop.all_saved();
            }
            // The work itself is unharmed, so it goes on; only a restart would lose more of it.
            Err(error) => self.report.warn(None, &format!("{:#}; the stage goes on without", anyhow!(error))),
        }
        Ok(())
    }

    fn round(&mut self, done: u64, rounds: u64) {
        self.stop.has_unsaved();
        self.report.progress(None, done, rounds, "rounds");
    }

    fn metrics(&mut self, stage: &str, row: &MetricsRow) {
        self.report.metrics(Some(stage), row);
    }

    fn progress(&mut self, stage: &str, done: u64, total: u64, unit: &str) {
        self.report.progress(Some(stage), done, total, unit);
    }

    fn warn(&mut self, stage: &str, text: &str) {
        self.report.warn(Some(stage), text);
    }

    fn note(&mut self, stage: &str, text: &str) {
        self.report.note(Some(stage), text);
    }
}

/// What a stage outside of loops says.
struct OnceSink {
    rows: Vec<MetricsRow>,
    report: Report,
}

impl Sink for OnceSink {
    fn metrics(&mut self, row: MetricsRow) {
        self.report.metrics(None, &row);
        self.rows.push(row);
    }

    fn progress(&mut self, done: u64, total: u64, unit: &str) {
        self.report.progress(None, done, total, unit);
    }

    fn warn(&mut self, text: &str) {
        self.report.warn(None, text);
    }

    fn note(&mut self, text: &str) {
        self.report.note(None, text);
    }
}

/// Tells the coordinator, not too often.
struct Report {
    /// When what was last said, by sort and part.
    last: BTreeMap<(&'static str, Option<String>), Instant>,
    /// What was warned of or noted, so that it is said once: in a loop the same thing tends to come in every round.
    told: BTreeSet<(Option<String>, String)>,
}

impl Report {
    fn new() -> Self {
        Report { last: BTreeMap::new(), told: BTreeSet::new() }
    }

    fn is_due(&mut self, sort: &'static str, part: Option<&str>) -> bool {
        let slot = (sort, part.map(str::to_owned));
        let due = self.last.get(&slot).is_none_or(|last| last.elapsed() >= REPORT_EVERY);
        if due {
            self.last.insert(slot, Instant::now());
        }
        due
    }

    fn metrics(&mut self, part: Option<&str>, row: &Map<String, Json>) {
        if self.is_due("metrics", part) {
            send(&Message::Metrics { part: part.map(str::to_owned), row: row.clone() });
        }
    }

    fn progress(&mut self, part: Option<&str>, done: u64, total: u64, unit: &str) {
        if (part.is_none() && done == total) || self.is_due("progress", part) {
            send(&Message::Progress { part: part.map(str::to_owned), done, total, unit: unit.to_owned() });
        }
    }

    fn warn(&mut self, part: Option<&str>, text: &str) {
        self.tell(part, text, |part, text| Message::Warned { part, text });
    }

    fn note(&mut self, part: Option<&str>, text: &str) {
        self.tell(part, text, |part, text| Message::Noted { part, text });
    }

    fn tell(&mut self, part: Option<&str>, text: &str, message: fn(Option<String>, String) -> Message) {
        let (part, text) = (part.map(str::to_owned), text.to_owned());
        if self.told.insert((part.clone(), text.clone())) {
            send(&message(part, text));
        }
    }
}

/// One line at a time, whichever thread has something to say.
static OUT: Mutex<()> = Mutex::new(());

fn send(said: &impl serde::Serialize) {
    let _one_at_a_time = OUT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut line = serde_json::to_vec(said).expect("messages and outcomes are JSON");
    line.push(b'\n');
    let mut out = io::stdout().lock();
    if out.write_all(&line).and_then(|()| out.flush()).is_err() {
        // Nobody listens any more.
        std::process::exit(1);
    }
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
