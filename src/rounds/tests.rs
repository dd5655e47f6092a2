//! The bet: cut anywhere or nowhere, the result has the same bits.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use indexmap::IndexMap;
use proptest::prelude::*;

use super::*;
use crate::fakes::{self, Numbers};
use crate::graph::{Carry, Keep, Last, Mode, Operator as OperatorSpec, Order, Origin, PortRef, Window};

/// A host that stops at chosen numbers of stage runs, or keeps a cut there and goes on.
struct Scripted {
    folder: PathBuf,
    asked: u64,
    stop_at: BTreeSet<u64>,
    cut_at: BTreeSet<u64>,
    kept: Vec<u64>,
    warnings: Vec<String>,
}

impl Host for Scripted {
    fn ask(&mut self, _: bool) -> Ask {
        self.asked += 1;
        match (self.stop_at.contains(&self.asked), self.cut_at.contains(&self.asked)) {
            (true, _) => Ask::Stop,
            (_, true) => Ask::Cut,
            _ => Ask::Continue,
        }
    }

    fn keep_cut(&mut self, number: u64, _: Standing, write: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        let folder = self.folder.join(number.to_string());
        fs::create_dir_all(&folder)?;
        self.kept.push(number);
        write(&folder)
    }

    fn round(&mut self, _: u64, _: u64) {}
    fn metrics(&mut self, _: &str, _: &MetricsRow) {}
    fn progress(&mut self, _: &str, _: u64, _: u64, _: &str) {}
    fn warn(&mut self, stage: &str, text: &str) {
        self.warnings.push(format!("{stage}: {text}"));
    }
    fn note(&mut self, _: &str, _: &str) {}
}

/// What a loop leaves behind, as bytes.
#[derive(Debug, PartialEq)]
struct Left {
    outputs: Vec<Vec<u64>>,
    rows: String,
}

/// Runs a loop to its end, resuming after every stop from the newest cut.
fn run(body: &Loop, stop_at: &[u64], cut_at: &[u64]) -> Result<Left> {
    let registry = fakes::registry();
    let scratch = tempfile::tempdir()?;
    let mut cut: Option<PathBuf> = None;
    let mut host = Scripted {
        folder: scratch.path().join("cuts"),
        asked: 0,
        stop_at: stop_at.iter().copied().collect(),
        cut_at: cut_at.iter().copied().collect(),
        kept: vec![],
        warnings: Vec::new(),
    };
    for attempt in 0.. {
        let env = Env { device: "cpu".into(), threads: 1, scratch: scratch.path().join(attempt.to_string()) };
        match run_loop(body, entries(), cut.as_deref(), &registry, &env, &mut host)? {
            Ended::Finished(finished) => return Ok(left(&finished)),
            Ended::Stopped(_) => {
                let newest = host.kept.last().expect("a cut before every stop");
                cut = Some(host.folder.join(newest.to_string()));
            }
        }
    }
    unreachable!("the attempts do not end")
}

fn left(finished: &Finished) -> Left {
    let bits = |value: &AnyValue| {
        let numbers = Arc::clone(value).into_any().downcast::<Numbers>().unwrap();
        numbers.numbers.iter().map(|x| x.to_bits()).collect()
    };
    Left { outputs: finished.outputs.iter().map(bits).collect(), rows: serde_json::to_string(&finished.rows).unwrap() }
}

fn entry(text: &str) -> Entry {
    Entry::from(text.to_owned())
}

fn entries() -> BTreeMap<Entry, AnyValue> {
    let registry = fakes::registry();
    let make = |kind: &str, config: Json, port: &str| {
        let env = Env { device: "cpu".into(), threads: 1, scratch: PathBuf::new() };
        let kind = registry.get(kind).unwrap();
        let config = kind.resolve(&config, contract::Conventions::Sound).unwrap();
        let mut operator = kind.start(&config, &env, None).unwrap();
        let mut outputs = operator.run(Inputs::new(), &Step::once(), &mut Silent).unwrap();
        outputs.0.remove(port).unwrap()
    };
    BTreeMap::from([
        (entry("windows.batch"), make("rows", json!({"rows": 11}), "data")),
        (entry("windows.other"), make("rows", json!({"rows": 7, "seed": 4}), "data")),
        (entry("check.data"), make("rows", json!({"rows": 3, "seed": 5}), "data")),
        (entry("learn.teacher"), make("init", json!({"value": 2.0}), "model")),
        (entry("carry.student"), make("init", json!({"value": 1.0}), "model")),
        (entry("carry.prompt"), make("init", json!({"value": 3.0, "width": 2}), "model")),
    ])
}

struct Silent;

impl Sink for Silent {
    fn metrics(&mut self, _: MetricsRow) {}
    fn progress(&mut self, _: u64, _: u64, _: &str) {}
    fn warn(&mut self, _: &str) {}
    fn note(&mut self, _: &str) {}
}

fn operator(kind: &str, config: Json) -> OperatorSpec {
    let registry = fakes::registry();
    let kind_of = registry.get(kind).unwrap();
    let config = kind_of.resolve(&config, contract::Conventions::Sound).unwrap();
    let ports = kind_of.ports(&config);
    OperatorSpec { kind: kind.into(), config, ports, places: BTreeMap::new() }
}

fn stage(kind: &str, every: Every, config: Json, inputs: &[(&str, &str)]) -> BodyStage {
    let origin = |text: &str| match text.split_once('.') {
        None => Origin::Outside,
        Some(("windows", name)) => Origin::Window(name.into()),
        Some(("carry", name)) => Origin::Carry(name.into()),
        Some((stage, port)) => Origin::Stage(PortRef { stage: stage.into(), port: port.into() }),
    };
    let inputs = inputs.iter().map(|(port, from)| (port.to_string(), origin(from))).collect();
    BodyStage { operator: operator(kind, config), every, inputs }
}

fn carry(next: &str, keep: Keep) -> Carry {
    let (stage, port) = next.split_once('.').unwrap();
    Carry { port_type: PortType::Model, next: PortRef { stage: stage.into(), port: port.into() }, keep }
}

fn window(take: u64, epochs: Option<u64>) -> Window {
    Window { rows: None, take, epochs, order: Order::Shuffle, seed: 9, last: Last::Drop, places: BTreeMap::new() }
}

/// The loop of prompt distillation in miniature: the student answers, the prompt adapts to the student, the student
/// learns, and the best student is kept with its prompt. `now_and_then` feeds a carried value from a stage that runs
/// every third round only.
fn promptkd(epochs: u64, keep_best: bool, now_and_then: bool) -> Loop {
    let best = Keep::Best { stage: "check".into(), metric: "score".into(), mode: Mode::Max };
    let mut body = Loop {
        windows: IndexMap::from([("batch".into(), window(3, Some(epochs))), ("other".into(), window(2, None))]),
        carry: IndexMap::from([
            ("student".into(), carry("learn.model", if keep_best { best } else { Keep::Last })),
            ("prompt".into(), carry("tune.model", Keep::With("student".into()))),
        ]),
        stages: IndexMap::from([
            (
                "respond".into(),
                stage("respond", Every::Round, json!({}), &[("model", "carry.student"), ("data", "windows.batch")]),
            ),
            (
                "tune".into(),
                stage(
                    "learn",
                    if now_and_then { Every::Rounds(3) } else { Every::Round },
                    json!({"seed": 1}),
                    &[("model", "carry.prompt"), ("teacher", "carry.student"), ("data", "windows.other")],
                ),
            ),
            (
                "learn".into(),
                stage(
                    "learn",
                    Every::Round,
                    json!({"seed": 2}),
                    &[("model", "carry.student"), ("teacher", "outside"), ("data", "respond.data")],
                ),
            ),
            (
                "check".into(),
                stage("evaluate", Every::Epoch, json!({}), &[("model", "learn.model"), ("data", "outside")]),
            ),
        ]),
        rounds: None,
        unroll: false,
        alone: false,
    };
    if now_and_then {
        // A reader, in every round, of what is made in some.
        body.stages["learn"]
            .inputs
            .insert("teacher".into(), Origin::Stage(PortRef { stage: "tune".into(), port: "model".into() }));
    }
    body
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_loop_may_be_cut_anywhere_without_changing_a_bit(
        epochs in 1_u64..4,
        keep_best: bool,
        now_and_then: bool,
        unroll: bool,
        stop_at in prop::collection::vec(1_u64..40, 0..5),
        cut_at in prop::collection::vec(1_u64..40, 0..5),
    ) {
        let body = promptkd(epochs, keep_best, now_and_then);
        let whole = run(&body, &[], &[]).unwrap();
        let cut = run(&Loop { unroll, ..body }, &stop_at, &cut_at).unwrap();
        prop_assert_eq!(whole, cut);
    }
}

#[test]
fn training_updates_in_place_and_nobody_else_notices() {
    let body = promptkd(2, true, false);
    let before = fakes::UPDATES_IN_PLACE.load(Ordering::Relaxed);
    let fused = run(&body, &[], &[]).unwrap();
    assert!(fakes::UPDATES_IN_PLACE.load(Ordering::Relaxed) > before, "no update in place happened");
    // The other way round: read by one more stage after the update, the carried value has to survive it.
    let mut shared = body.clone();
    let late = stage("evaluate", Every::Round, json!({}), &[("model", "carry.student"), ("data", "windows.batch")]);
    shared.stages.insert("late".into(), late);
    let shared = run(&shared, &[], &[]).unwrap();
    assert_eq!(fused.outputs, shared.outputs);
}

#[test]
fn a_late_reader_sees_the_value_the_round_began_with() {
    let mut body = promptkd(1, false, false);
    let score = |from: &str| stage("evaluate", Every::Round, json!({}), &[("model", from), ("data", "windows.batch")]);
    body.stages.shift_insert(0, "early".into(), score("carry.student"));
    body.stages.insert("late".into(), score("carry.student"));
    body.stages.insert("after".into(), score("learn.model"));
    let left = run(&body, &[], &[]).unwrap();
    let rows: Vec<Vec<MetricsRow>> = serde_json::from_str(&left.rows).unwrap();
    let (early, late, after) = (&rows[0], &rows[5], &rows[6]);
    assert_eq!(early, late);
    assert_ne!(late, after);
}

#[test]
fn the_best_round_is_kept_with_its_companion() {
    let mut body = promptkd(3, true, false);
    body.carry["student"].keep = Keep::Best { stage: "check".into(), metric: "score".into(), mode: Mode::Min };
    let kept = run(&body, &[], &[]).unwrap();
    let rows: Vec<Vec<MetricsRow>> = serde_json::from_str(&kept.rows).unwrap();
    let scores: Vec<f64> = rows[3].iter().map(|row| row["score"].as_f64().unwrap()).collect();
    let best = scores.iter().enumerate().fold(0, |best, (at, score)| if *score < scores[best] { at } else { best });
    assert_ne!(best, scores.len() - 1, "the fixture is of no use if the last round is the best");
    let round = rows[3][best]["round"].as_u64().unwrap();
    assert_eq!(kept.outputs, run_until(&body, round + 1));
}

#[test]
fn the_first_of_equal_rounds_is_kept() {
    let mut body = promptkd(3, true, false);
    // A student that never changes scores the same in every epoch, while the prompt goes on.
    let inputs = [("model", "carry.student"), ("data", "respond.data")];
    body.stages["learn"] = stage("learn", Every::Round, json!({"rate": 0.0}), &inputs);
    let kept = run(&body, &[], &[]).unwrap();
    assert_eq!(kept.outputs, run_until(&body, 3));
    let said = warnings(&body);
    assert!(said.len() == 1 && said[0].starts_with("check: `"), "{said:?}");
    assert!(said[0].contains("measurements, so it could not choose: the first `student` is kept"), "{said:?}");
    assert_eq!(warnings(&promptkd(3, true, false)), [""; 0]);
}

#[test]
fn without_any_measurement_the_last_round_is_kept_and_that_is_said() {
    let mut body = promptkd(3, true, false);
    let inputs = [("model", "learn.model"), ("data", "outside")];
    body.stages["check"] = stage("evaluate", Every::Epoch, json!({"nothing": true}), &inputs);
    let last = run(&promptkd(3, false, false), &[], &[]).unwrap();
    assert_eq!(run(&body, &[], &[]).unwrap().outputs, last.outputs);
    assert_eq!(run(&body, &[2, 7], &[4]).unwrap().outputs, last.outputs);
    let said = ["check: `score` was never measured, so it could not choose: the last `student` is kept"];
    assert_eq!(warnings(&body), said);
}

/// What a loop warns of.
fn warnings(body: &Loop) -> Vec<String> {
    let (scratch, folder) = (tempfile::tempdir().unwrap(), PathBuf::new());
    let env = Env { device: "cpu".into(), threads: 1, scratch: scratch.path().into() };
    let (stop_at, cut_at) = (BTreeSet::new(), BTreeSet::new());
    let mut host = Scripted { folder, asked: 0, stop_at, cut_at, kept: Vec::new(), warnings: Vec::new() };
    run_loop(body, entries(), None, &fakes::registry(), &env, &mut host).unwrap();
    host.warnings
}

/// The carried values after so many rounds, read from a cut.
fn run_until(body: &Loop, rounds: u64) -> Vec<Vec<u64>> {
    let registry = fakes::registry();
    let scratch = tempfile::tempdir().unwrap();
    let env = Env { device: "cpu".into(), threads: 1, scratch: scratch.path().into() };
    let mut run = LoopRun::start(body, entries(), None, &registry, &env).unwrap();
    let mut host = Scripted {
        folder: scratch.path().into(),
        asked: 0,
        stop_at: BTreeSet::new(),
        cut_at: BTreeSet::new(),
        kept: vec![],
        warnings: Vec::new(),
    };
    while run.held.position.round < rounds {
        run.run_stage(&mut host).unwrap();
    }
    let outputs = (0..body.carry.len()).map(|index| run.carried(index).unwrap()).collect();
    left(&Finished { outputs, rows: vec![], rounds, seconds: 0.0 }).outputs
}

#[test]
fn seconds_add_up_over_attempts() {
    let mut body = promptkd(1, false, false);
    body.stages["learn"] = stage(
        "learn",
        Every::Round,
        json!({"sleep": 20}),
        &[("model", "carry.student"), ("teacher", "outside"), ("data", "respond.data")],
    );
    let registry = fakes::registry();
    let scratch = tempfile::tempdir().unwrap();
    let env = Env { device: "cpu".into(), threads: 1, scratch: scratch.path().into() };
    let mut host = Scripted {
        folder: scratch.path().join("cuts"),
        asked: 0,
        stop_at: BTreeSet::from([6]),
        cut_at: BTreeSet::new(),
        kept: vec![],
        warnings: Vec::new(),
    };
    let Ended::Stopped(stopped) = run_loop(&body, entries(), None, &registry, &env, &mut host).unwrap() else {
        panic!("it should have stopped")
    };
    assert!(stopped.seconds >= 0.04, "two rounds of 20 ms: {}", stopped.seconds);
    let cut = host.folder.join(host.kept[0].to_string());
    assert_eq!(standing(&cut).unwrap().round, 2);
    let Ended::Finished(finished) = run_loop(&body, entries(), Some(&cut), &registry, &env, &mut host).unwrap() else {
        panic!("it should have finished")
    };
    assert!(finished.seconds >= 0.06, "three rounds of 20 ms: {}", finished.seconds);
}

#[test]
fn a_carried_value_without_a_first_one_is_not_connected_in_round_0() {
    let body = promptkd(1, false, false);
    let registry = fakes::registry();
    let scratch = tempfile::tempdir().unwrap();
    let env = Env { device: "cpu".into(), threads: 1, scratch: scratch.path().into() };
    let mut host = Scripted {
        folder: scratch.path().into(),
        asked: 0,
        stop_at: BTreeSet::new(),
        cut_at: BTreeSet::new(),
        kept: vec![],
        warnings: Vec::new(),
    };
    let mut without_prompt = entries();
    without_prompt.remove(&entry("carry.prompt"));
    assert!(run_loop(&body, without_prompt, None, &registry, &env, &mut host).is_ok());
    let mut without_student = entries();
    without_student.remove(&entry("carry.student"));
    let error = run_loop(&body, without_student, None, &registry, &env, &mut host).err().unwrap();
    assert_eq!(format!("{error:#}"), "stage `respond`, round 1: required input `model` has no value");
}

#[test]
fn errors_name_the_stage_and_the_round() {
    let check = |stage_name: &str, kind: &str, config: Json, inputs: &[(&str, &str)], expected: &str| {
        let mut body = promptkd(2, true, false);
        let every = body.stages[stage_name].every;
        body.stages[stage_name] = stage(kind, every, config, inputs);
        let error = run(&body, &[], &[]).unwrap_err();
        assert_eq!(format!("{error:#}"), expected);
    };
    let inputs = [("model", "carry.student"), ("data", "respond.data")];
    check("learn", "learn", json!({"fail_at": 1}), &inputs, "stage `learn`, round 2: told to fail in round 1");
    let mut body = promptkd(2, true, false);
    body.carry["student"].keep = Keep::Best { stage: "check".into(), metric: "rouge".into(), mode: Mode::Max };
    let error = format!("{:#}", run(&body, &[], &[]).unwrap_err());
    assert_eq!(
        error,
        "stage `check`, round 3: the stage measures no `rouge` to keep the best round by; it measures `score`, `loss`"
    );
}
