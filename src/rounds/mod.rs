//! Rounds: runs the stages of a loop one round after another, in one process.
//!
//! The one promise: *a loop may be cut between any two stage runs, or nowhere, and its results have the same bits.* So
//! all that passes from one stage run to the next is a value in `Held`: carried and kept values, outputs that are read
//! later, windows of the round, inner states. A cut writes it, resuming reads it, and `unroll` does both after every stage
//! run. Which rows a round sees and how far schedules are follow from the round alone.
//!
//! Values are passed by reference count: the last reader of a value in a round gets the loop's own reference, so
//! that a training stage may update its weights in place; whatever is read later, carried on or kept stays shared.
//!
//! This module knows no store and no process: a [`Host`] decides when to cut and where to.

mod cut;
pub(crate) mod flow;
mod keep;
pub(crate) mod program;
mod window;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow, bail, ensure};
use contract::{AnyValue, Env, Finding, Inputs, Machine, Metrics, PortType, Registry, Result, Sink, Step, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use self::flow::Part;
use crate::graph::{BodyStage, Entry, Every, Loop, Operator, Subgraph};
use cut::Held;
pub use cut::{Standing, standing};
use program::{Chosen, Program, Slot, Source};
use window::{Clock, Slicer};

/// A row of `metrics.jsonl`.
pub type MetricsRow = Map<String, Json>;

/// What surrounds a loop: it hears what happens and decides about cuts.
pub trait Host {
    /// Asked between two stage runs. `round_done` is true between two rounds, where a cut is smallest.
    fn ask(&mut self, round_done: bool) -> Ask;
    /// Keeps a cut: calls `write` with an empty folder. `number` counts stage runs, so it grows from cut to cut.
    fn keep_cut(&mut self, number: u64, standing: Standing, write: &dyn Fn(&Path) -> Result<()>) -> Result<()>;
    /// A round is done.
    fn round(&mut self, done: u64, rounds: u64);
    /// A stage of the loop added a row to its metrics.
    fn metrics(&mut self, stage: &str, row: &MetricsRow);
    /// A stage of the loop is so far.
    fn progress(&mut self, stage: &str, done: u64, total: u64, unit: &str);
    /// A stage of the loop warns of something.
    fn warn(&mut self, stage: &str, text: &str);
    /// A stage of the loop has something worth knowing to say.
    fn note(&mut self, stage: &str, text: &str);
}

/// What to do between two stage runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Go on.
    Continue,
    /// Keep a cut and go on.
    Cut,
    /// Keep a cut and stop.
    Stop,
}

/// How a loop ended.
pub enum Ended {
    /// It ran all its rounds.
    Finished(Finished),
    /// It was asked to stop and kept a cut.
    Stopped(Standing),
}

/// Results of a loop.
pub struct Finished {
    /// The kept value of each carried name, in their order.
    pub outputs: Vec<AnyValue>,
    /// Rows of `metrics.jsonl` of each stage, in their order.
    pub rows: Vec<Vec<MetricsRow>>,
    /// Rounds it had.
    pub rounds: u64,
    /// Seconds spent, over all attempts.
    pub seconds: f64,
}

/// Runs a loop to its end, or until its host asks it to stop.
///
/// `entries` holds the values that come from outside; `cut` is a folder that [`Host::keep_cut`] wrote earlier for the same
/// loop and the same entries. Each stage gets a scratch folder of its own below that of `env`.
pub fn run_loop(
    body: &Loop,
    entries: BTreeMap<Entry, AnyValue>,
    cut: Option<&Path>,
    registry: &Registry,
    env: &Env,
    host: &mut dyn Host,
) -> Result<Ended> {
    let mut run = LoopRun::start(body, entries, cut, registry, env)?;
    loop {
        run.run_stage(host)?;
        if run.held.position.round == run.clock.rounds {
            run.say_what_could_not_choose(host);
            return Ok(Ended::Finished(run.finish()?));
        }
        if body.unroll {
            run.cut_here()?;
        }
        match host.ask(run.held.position.stage == 0) {
            Ask::Continue => {}
            Ask::Cut => run.keep_cut(host)?,
            Ask::Stop => {
                run.keep_cut(host)?;
                return Ok(Ended::Stopped(run.standing()));
            }
        }
    }
}

/// The stage to run next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    round: u64,
    stage: usize,
}

struct LoopRun<'a> {
    /// The loop with its names, for people.
    body: &'a Loop,
    /// The same by places.
    program: Program,
    registry: &'a Registry,
    env: &'a Env,
    clock: Clock,
    slicers: Vec<Slicer>,
    /// What stages read from outside in every round.
    outside: BTreeMap<Entry, AnyValue>,
    /// Stages whose readers in the loop have limits: the longest row that all of them can take.
    rooms: BTreeMap<String, u64>,
    held: Held,
    stages: Vec<Started>,
    since: Instant,
    seconds_before: f64,
    /// Folder of the last cut of an unrolled loop.
    last_cut: Option<PathBuf>,
}

/// A stage in this process.
#[derive(Default)]
struct Started {
    operator: Option<Box<dyn contract::Operator>>,
    /// Ports connected when facts were last compared.
    agreed: Vec<String>,
}

impl<'a> LoopRun<'a> {
    fn start(
        body: &'a Loop,
        mut entries: BTreeMap<Entry, AnyValue>,
        cut: Option<&Path>,
        registry: &'a Registry,
        env: &'a Env,
    ) -> Result<Self> {
        ensure!(!body.stages.is_empty(), "the loop has no stages");
        let program = Program::of(body)?;
        let facts = entries.iter().map(|(entry, value)| (entry.clone(), value.facts())).collect();
        let mut slicers = Vec::with_capacity(body.windows.len());
        for (name, window) in &body.windows {
            let value = entries.remove(&Entry::Window(name.clone()));
            slicers.push(Slicer::new(name, window, value.ok_or_else(|| anyhow!("window `{name}` is not connected"))?)?);
        }
        let clock = window::clock(body, &slicers)?;
        let firsts: Vec<_> = program.carry.iter().map(|carried| entries.remove(&carried.entry)).collect();
        let (held, seconds_before) = match cut {
            Some(folder) => cut::load(folder, body, registry, env)
                .with_context(|| format!("cannot resume from `{}`", folder.display()))?,
            None => (Held::new(firsts, body.stages.len()), 0.0),
        };
        let seen = flow::look(&Subgraph::Loop(body.clone()), &facts, registry, &Machine::default());
        if let Some((part, finding)) = seen.findings.iter().find(|(_, finding)| finding.is_error) {
            match part {
                Part::Stage(stage) => bail!("stage `{stage}`: {}", in_words(finding)),
                Part::Window(window) => bail!("window `{window}`: {}", in_words(finding)),
                Part::Whole => bail!("{}", in_words(finding)),
            }
        }
        let stages = body.stages.iter().map(|_| Started::default()).collect();
        let since = Instant::now();
        Ok(LoopRun {
            body,
            program,
            registry,
            env,
            clock,
            slicers,
            outside: entries,
            rooms: seen.rooms,
            held,
            stages,
            since,
            seconds_before,
            last_cut: None,
        })
    }

    /// Runs the next stage that is due and moves on, over the end of the round if it was the last.
    fn run_stage(&mut self, host: &mut dyn Host) -> Result<()> {
        let Position { round, stage } = self.held.position;
        let step = self.step(round);
        if stage == 0 {
            self.enter_windows(round);
        }
        let (name, _) = self.stage(stage);
        self.run_operator(stage, &step, host).with_context(|| format!("stage `{name}`, round {}", round + 1))?;
        match (stage + 1..self.body.stages.len()).find(|&next| self.is_due(next, &step)) {
            Some(next) => self.held.position.stage = next,
            None => {
                self.end_round(&step);
                host.round(round + 1, self.clock.rounds);
            }
        }
        Ok(())
    }

    fn enter_windows(&mut self, round: u64) {
        for (index, slicer) in self.slicers.iter_mut().enumerate() {
            self.held.values.insert(Slot::Window(index), Arc::new(slicer.slice(round)));
        }
    }

    fn run_operator(&mut self, index: usize, step: &Step, host: &mut dyn Host) -> Result<()> {
        // A round may begin with a stage that is not due: then there is nothing to run but the round still passes.
        if !self.is_due(index, step) {
            return Ok(());
        }
        let (name, stage) = self.stage(index);
        let inputs = self.collect_inputs(index, step)?;
        self.check_inputs(index, &inputs)?;
        let mut operator = match self.stages[index].operator.take() {
            Some(operator) => operator,
            None => self.start_operator(index)?,
        };
        let mut sink = StageSink { stage: name, rows: &mut self.held.rows[index], host };
        let outputs = operator.run(inputs, step, &mut sink)?.0;
        check_outputs(&stage.operator.ports, &outputs)?;
        if let Some(metrics) = find_metrics(outputs.get("metrics")) {
            sink.metrics(numbers_of(&metrics, step));
        }
        self.stages[index].operator = Some(operator);
        self.measure(index, &outputs)?;
        for (port, value) in outputs {
            let slot = Slot::Output(index, port);
            if self.is_read_later(&slot, index, step) {
                self.held.values.insert(slot, value);
            } else {
                self.held.values.remove(&slot);
            }
        }
        Ok(())
    }

    fn start_operator(&mut self, index: usize) -> Result<Box<dyn contract::Operator>> {
        let operator = &self.stage(index).1.operator;
        let state = self.held.values.remove(&Slot::State(index));
        let env = Env { scratch: self.env.scratch.join(format!("s{index}")), ..self.env.clone() };
        fs::create_dir_all(&env.scratch).with_context(|| format!("cannot make folder `{}`", env.scratch.display()))?;
        let mut started = find_kind(self.registry, &operator.kind)?.start(&operator.config, &env, state)?;
        if let Some(room) = self.rooms.get(self.stage(index).0) {
            started.make_room(*room);
        }
        Ok(started)
    }

    /// Gathers the inputs of a stage; where it is the last to read a value, it gets the loop's own reference.
    fn collect_inputs(&mut self, index: usize, step: &Step) -> Result<Inputs> {
        let reads = &self.program.stages[index].inputs;
        let mut inputs = Inputs::new();
        for (place, input) in reads.iter().enumerate() {
            let value = match &input.source {
                Source::Outside(entry) => {
                    let value = self.outside.get(entry).cloned();
                    Some(value.ok_or_else(|| anyhow!("nothing enters the loop at `{entry}`"))?)
                }
                Source::Held(slot) => {
                    let again = reads[place + 1..].iter().any(|other| other.source == input.source);
                    if again || self.is_read_later(slot, index, step) {
                        self.held.values.get(slot).cloned()
                    } else {
                        self.held.values.remove(slot)
                    }
                }
            };
            // A carried value without a first value, or the output of a stage that has not run yet, is not connected.
            if let Some(value) = value {
                inputs.insert(&input.port, value);
            }
        }
        Ok(inputs)
    }

    /// Checks required ports, and the facts of what is connected whenever other ports are connected than last time.
    fn check_inputs(&mut self, index: usize, inputs: &Inputs) -> Result<()> {
        let (name, BodyStage { operator, .. }) = self.stage(index);
        let connected: Vec<String> = inputs.names().map(str::to_owned).collect();
        if connected != self.stages[index].agreed {
            check_inputs(operator, inputs, self.rooms.get(name).copied(), self.registry)?;
            self.stages[index].agreed = connected;
        }
        Ok(())
    }

    /// Notes the scores that carried values are kept by, should this stage measure one.
    fn measure(&mut self, index: usize, outputs: &BTreeMap<String, AnyValue>) -> Result<()> {
        for (carry, carried) in self.program.carry.iter().enumerate() {
            let Chosen::Best { stage, metric, .. } = &carried.keep else { continue };
            if *stage != index {
                continue;
            }
            let metrics = outputs.values().find_map(|output| find_metrics(Some(output)));
            let metrics = metrics.ok_or_else(|| anyhow!("the stage has no metrics to keep the best round by"))?;
            let Some(score) = metrics.number(metric) else {
                // It found nothing to compare, and has said so: this round has no score.
                if metrics.0.contains_key(metric) {
                    continue;
                }
                let known: Vec<_> = metrics.0.keys().map(|name| format!("`{name}`")).collect();
                bail!("the stage measures no `{metric}` to keep the best round by; it measures {}", known.join(", "));
            };
            self.held.measured.insert(carry, score);
        }
        Ok(())
    }

    /// Hands carried values on, keeps those whose round was the best so far and forgets what was this round's alone.
    fn end_round(&mut self, step: &Step) {
        let next = |carry: &program::Carried| self.held.values.get(&carry.next).cloned();
        let nexts: Vec<Option<AnyValue>> = self.program.carry.iter().map(next).collect();
        let kept = keep::kept(&self.program.carry, &self.held.scores, &self.held.measured);
        for &index in &kept {
            if let Some(value) = nexts[index].clone().or_else(|| self.carried(index)) {
                self.held.values.insert(Slot::Kept(index), value);
            }
        }
        let measured = std::mem::take(&mut self.held.measured);
        self.held.scores.extend(measured.into_iter().filter(|(carry, _)| kept.contains(carry)));
        for (index, next) in nexts.into_iter().enumerate() {
            if let Some(next) = next {
                self.held.values.insert(Slot::Carry(index), next);
            }
        }
        let stages = &self.program.stages;
        self.held.values.retain(|slot, _| match slot {
            Slot::Window(_) => false,
            Slot::Output(stage, _) => !stages[*stage].every_round,
            Slot::Carry(_) | Slot::Kept(_) | Slot::State(_) => true,
        });
        self.held.position = Position { round: step.round + 1, stage: 0 };
    }

    /// Warns of a best round that nothing chose: its metric was never measured, or was always the same.
    fn say_what_could_not_choose(&self, host: &mut dyn Host) {
        for (name, carry) in self.body.carry.keys().zip(&self.program.carry) {
            let Chosen::Best { stage, metric, .. } = &carry.keep else { continue };
            let rows = &self.held.rows[*stage];
            let scores: Vec<f64> = rows.iter().filter_map(|row| row.get(metric)?.as_f64()).collect();
            let text = match scores.as_slice() {
                [] => format!("`{metric}` was never measured, so it could not choose: the last `{name}` is kept"),
                [first, others @ ..] if !others.is_empty() && others.iter().all(|score| score == first) => format!(
                    "`{metric}` was {} in all {} measurements, so it could not choose: the first `{name}` is kept",
                    crate::ground::terminal::figure(*first),
                    scores.len()
                ),
                _ => continue,
            };
            host.warn(self.stage(*stage).0, &text);
        }
    }

    fn finish(mut self) -> Result<Finished> {
        let mut outputs = Vec::with_capacity(self.body.carry.len());
        for (index, name) in self.body.carry.keys().enumerate() {
            let value =
                self.held.values.remove(&Slot::Kept(index)).or_else(|| self.held.values.remove(&Slot::Carry(index)));
            outputs.push(value.ok_or_else(|| anyhow!("carried value `{name}` was never made"))?);
        }
        let seconds = self.seconds();
        Ok(Finished { outputs, rows: self.held.rows, rounds: self.clock.rounds, seconds })
    }

    /// Writes everything, forgets everything, reads everything: the loop goes on as if it had been resumed.
    fn cut_here(&mut self) -> Result<()> {
        let folder = self.env.scratch.join("cut").join(self.number().to_string());
        fs::create_dir_all(&folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
        self.gather_states()?;
        cut::save(&self.held, self.clock.rounds, self.seconds(), &folder)?;
        self.held = Held::default();
        self.stages.fill_with(Started::default);
        (self.held, _) = cut::load(&folder, self.body, self.registry, self.env)?;
        // Values may lie in the cut they were read from, so the one before goes only now.
        if let Some(before) = self.last_cut.replace(folder) {
            fs::remove_dir_all(&before).with_context(|| format!("cannot remove `{}`", before.display()))?;
        }
        Ok(())
    }

    fn keep_cut(&mut self, host: &mut dyn Host) -> Result<()> {
        self.gather_states()?;
        let number = self.number();
        let standing = self.standing();
        host.keep_cut(number, standing, &|folder| cut::save(&self.held, standing.rounds, standing.seconds, folder))?;
        self.forget_states();
        Ok(())
    }

    /// Puts the inner states of started stages beside the other values.
    fn gather_states(&mut self) -> Result<()> {
        for (index, started) in self.stages.iter().enumerate() {
            let Some(operator) = &started.operator else { continue };
            let name = &self.body.stages.keys()[index];
            if let Some(state) = operator.state().with_context(|| format!("inner state of stage `{name}`"))? {
                let found = state.port_type();
                ensure!(found == PortType::State, "inner state of stage `{name}` is a {found}, not a state");
                self.held.values.insert(Slot::State(index), state);
            }
        }
        Ok(())
    }

    /// Drops the gathered states again: running stages hold their own, and may update it in place.
    fn forget_states(&mut self) {
        for (index, started) in self.stages.iter().enumerate() {
            if started.operator.is_some() {
                self.held.values.remove(&Slot::State(index));
            }
        }
    }

    /// Whether a slot must still hold its value after stage `index` has run in this round.
    fn is_read_later(&self, slot: &Slot, index: usize, step: &Step) -> bool {
        let Program { carry, stages } = &self.program;
        let later = |at: usize| at > index && self.is_due(at, step);
        let is_read_later = || stages.iter().enumerate().any(|(at, stage)| later(at) && stage.reads(slot));
        match slot {
            Slot::Kept(_) | Slot::State(_) => true,
            Slot::Window(_) => is_read_later(),
            // Where the next value comes only now and then, this one may be needed in the next round too.
            Slot::Carry(carried) => !carry[*carried].comes_every_round || is_read_later(),
            Slot::Output(made_by, _) => {
                // Rounds without the stage read the latest value so far.
                let latest = || !stages[*made_by].every_round && stages.iter().any(|stage| stage.reads(slot));
                carry.iter().any(|carried| carried.next == *slot) || latest() || is_read_later()
            }
        }
    }

    fn is_due(&self, index: usize, step: &Step) -> bool {
        match self.stage(index).1.every {
            Every::Round => true,
            Every::Epoch => step.ends_epoch() || step.is_last(),
            Every::Rounds(rounds) => (step.round + 1).is_multiple_of(rounds.max(1)) || step.is_last(),
        }
    }

    fn step(&self, round: u64) -> Step {
        let Clock { rounds, rounds_per_epoch } = self.clock;
        Step { round, rounds, epoch: round / rounds_per_epoch, rounds_per_epoch }
    }

    fn stage(&self, index: usize) -> (&'a String, &'a BodyStage) {
        self.body.stages.get_index(index).expect("positions stay within the stages")
    }

    fn carried(&self, index: usize) -> Option<AnyValue> {
        self.held.values.get(&Slot::Carry(index)).cloned()
    }

    /// Counts the positions of a loop.
    fn number(&self) -> u64 {
        let Position { round, stage } = self.held.position;
        round * self.body.stages.len() as u64 + stage as u64
    }

    fn standing(&self) -> Standing {
        Standing { round: self.held.position.round, rounds: self.clock.rounds, seconds: self.seconds() }
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.since.elapsed().as_secs_f64()
    }
}

impl Held {
    fn new(firsts: Vec<Option<AnyValue>>, stages: usize) -> Self {
        let firsts = firsts.into_iter().enumerate();
        let values = firsts.filter_map(|(index, value)| Some((Slot::Carry(index), value?))).collect();
        Held { values, rows: vec![Vec::new(); stages], ..Held::default() }
    }
}

/// Adds rows to a stage's metrics and tells the host.
struct StageSink<'a> {
    stage: &'a str,
    rows: &'a mut Vec<MetricsRow>,
    host: &'a mut dyn Host,
}

impl Sink for StageSink<'_> {
    fn metrics(&mut self, row: MetricsRow) {
        self.host.metrics(self.stage, &row);
        self.rows.push(row);
    }

    fn progress(&mut self, done: u64, total: u64, unit: &str) {
        self.host.progress(self.stage, done, total, unit);
    }

    fn warn(&mut self, text: &str) {
        self.host.warn(self.stage, text);
    }

    fn note(&mut self, text: &str) {
        self.host.note(self.stage, text);
    }
}

/// The kind of a stage; the error says that this program does not have it.
pub(crate) fn find_kind<'r>(registry: &'r Registry, name: &str) -> Result<&'r dyn contract::Kind> {
    registry.get(name).ok_or_else(|| anyhow!("this program has no stage kind `{name}`"))
}

/// Checks that required ports are connected and that the stage can work with what is: the last line of defence, for most of
/// it was known before.
pub(crate) fn check_inputs(operator: &Operator, inputs: &Inputs, room: Option<u64>, registry: &Registry) -> Result<()> {
    for port in operator.ports.inputs.iter().filter(|port| port.required) {
        ensure!(inputs.has(&port.name), "required input `{}` has no value", port.name);
    }
    let facts = inputs.names().filter_map(|name| Some((name.to_owned(), inputs.get(name)?.facts()))).collect();
    let outlook = flow::outlook(operator, facts, room, registry, &Machine::default());
    match outlook.findings.iter().find(|finding| finding.is_error) {
        Some(finding) => bail!("{}", in_words(finding)),
        None => Ok(()),
    }
}

fn in_words(finding: &Finding) -> String {
    format!("{}; {}", finding.message, finding.hint)
}

/// Checks that every declared output was made, with its type, and nothing else.
pub(crate) fn check_outputs(ports: &contract::Ports, outputs: &BTreeMap<String, AnyValue>) -> Result<()> {
    for port in &ports.outputs {
        let value = outputs.get(&port.name).ok_or_else(|| anyhow!("output `{}` was not made", port.name))?;
        let found = value.port_type();
        ensure!(found == port.port_type, "output `{}` is a {found}, expected a {}", port.name, port.port_type);
    }
    match outputs.keys().find(|name| ports.find_output(name).is_none()) {
        Some(unknown) => Err(anyhow!("output `{unknown}` was made but never declared")),
        None => Ok(()),
    }
}

/// Writes `metrics.jsonl` into a folder, and its last row as `metrics.json`: so the folder is a value of type metrics, which
/// says where the stage ended.
pub fn write_rows(folder: &Path, rows: &[MetricsRow]) -> Result<()> {
    cut::write_rows(&folder.join("metrics.jsonl"), rows)?;
    Metrics(rows.last().cloned().unwrap_or_default()).save(folder)
}

fn find_metrics(value: Option<&AnyValue>) -> Option<Arc<Metrics>> {
    let value = value.filter(|value| value.port_type() == PortType::Metrics)?;
    Arc::clone(value).into_any().downcast::<Metrics>().ok()
}

/// A row of what a stage measured: the clock and the plain numbers.
fn numbers_of(metrics: &Metrics, step: &Step) -> MetricsRow {
    let mut row = Map::new();
    row.insert("round".into(), json!(step.round));
    row.insert("epoch".into(), json!(step.epoch));
    let numbers = metrics.0.keys().filter_map(|name| Some((name.clone(), json!(metrics.number(name)?))));
    row.extend(numbers);
    row
}

#[cfg(test)]
mod tests;
