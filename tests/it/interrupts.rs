//! Runs that are cut short: by an interrupt, by the death of a worker, by the death of everything. The same command goes
//! on, no step by hand is needed, no process is left, and the results have the same bits.

use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Project, Ran, children, is_alive, wait_until};
use crate::runs::PROMPTKD;

/// Rounds that the loop of the pipeline has.
const ROUNDS: usize = 24;

fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // It may have ended by itself.
    let _ = kill_process(pid, signal);
}

/// Digests of a run that nobody disturbed.
fn undisturbed() -> Vec<String> {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &[]);
    project.digests("")
}

/// Starts a run and waits until the loop is in its `round`th round.
fn start_until_round(project: &Project, arguments: &str, round: usize) -> Child {
    let running = project.start(arguments);
    wait_until("the loop runs", || project.lines("rounds.txt") >= round);
    running
}

fn wait(running: Child) -> Ran {
    Ran::new(running.wait_with_output().unwrap())
}

#[test]
fn an_interrupt_cuts_and_the_same_command_goes_on() {
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let project = Project::new(PROMPTKD);
        let running = start_until_round(&project, "run FILE", 5);
        kill(running.id(), signal);
        let stopped =
            wait(running).expect(status, &["stopped  train", "the next run goes on after round", "interrupted: "]);
        assert!(stopped.stderr.lines().last().unwrap().starts_with("interrupted: the same command goes on"));
        project.run("plan FILE --check").expect(3, &["resume", "train     goes on after round"]);
        project.run("run FILE").expect(0, &["resumed  train"]);
        assert_eq!(project.lines("rounds.txt"), ROUNDS, "an interrupt loses no round");
        assert_eq!(project.digests(""), undisturbed());
    }
}

#[test]
fn an_interrupt_between_loops_leaves_nothing_half_done() {
    let project = Project::new(
        "
version: 1
name: slow
stages:
  source: {kind: rows, with: {rows: 6}}
  slow: {kind: slow, in: {data: source}, with: {milliseconds: 60000}}
",
    );
    let running = project.start("run FILE --json");
    // The log is that of the slow stage: the worker of the stage before it comes and goes.
    let runs = project.path(".pipeline/runs");
    let has_log =
        || std::fs::read_dir(&runs).is_ok_and(|mut all| all.any(|run| run.unwrap().path().join("slow.1.log").exists()));
    wait_until("the slow stage runs", || has_log() && children(running.id()).len() == 1);
    let worker = children(running.id())[0];
    std::thread::sleep(Duration::from_millis(100));
    kill(running.id(), Signal::INT);
    let ran = wait(running).expect(130, &[]);
    let events = ran.events();
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["status"]), (&"run_finished".into(), &"interrupted".into()));
    wait_until("the worker is gone", || !is_alive(worker));
    assert_eq!(std::fs::read_dir(project.path(".pipeline/work")).unwrap().count(), 0);
}

#[test]
fn a_second_interrupt_kills() {
    let pipeline = PROMPTKD.replace("sleep: 10", "sleep: 60000");
    let project = Project::new(&pipeline);
    let running = start_until_round(&project, "run FILE", 1);
    let worker = children(running.id())[0];
    kill(running.id(), Signal::INT);
    std::thread::sleep(Duration::from_millis(200));
    assert!(is_alive(worker), "one interrupt lets the round end");
    kill(running.id(), Signal::INT);
    wait(running).expect(130, &["interrupted"]);
    wait_until("the worker is gone", || !is_alive(worker));
}

/// Rows, a stage that can be held, and one that needs it.
pub(crate) const HELD: &str = "
version: 1
name: held
stages:
  source: {kind: rows, with: {rows: 6}}
  held: {kind: slow, in: {data: source}, with: {WITH}}
  after: {kind: count, in: {data: held}, with: {file: after.txt}}
";

/// A training stage used alone: a loop with one stage, which can be held in one of its rounds.
const HELD_LOOP: &str = "
version: 1
name: held
stages:
  source: {kind: rows, with: {rows: 24}}
  held: {kind: learn, in: {data: source}, with: {take: 4, epochs: 2, WITH}}
  after: {kind: evaluate, in: {model: held, data: source}}
";

/// Work that would take for ever is told to stop in the middle. It is said at once, the run ends, and the next one, with
/// nothing in its way, ends with the bits of one that nobody disturbed.
#[test]
fn a_stop_is_heard_in_every_kind_of_work_and_the_next_run_goes_on() {
    let anew = "the next run begins it anew";
    let works = [
        // What the worker is doing: pipeline, its field, flags, whether the worker hangs, where the next run goes on.
        ("runs a stage outside of loops", HELD, "hold: true", "", false, anew),
        ("saves a result", HELD, "hold_save: true", "", false, anew),
        ("is in the first round of a loop", HELD_LOOP, "hold_at: 0", "", false, anew),
        (
            "is in a round after a cut",
            HELD_LOOP,
            "hold_at: 7",
            "--cut-every 0",
            false,
            "the next run goes on after round 7 of 12",
        ),
        ("is in a round, the cut long ago", HELD_LOOP, "hold_at: 7", "", false, anew),
        ("does not answer", HELD, "hold: true", "", true, anew),
        ("does not answer, after a cut", HELD_LOOP, "hold_at: 7", "--cut-every 0", true, "goes on after round 7 of 12"),
    ];
    let signals = [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)];
    for (number, (what, pipeline, field, flags, hangs, onward)) in works.into_iter().enumerate() {
        let (signal, status) = signals[number % signals.len()];
        let project = Project::new(&pipeline.replace("WITH", field));
        project.write("hold", "");
        let running = project.start(&format!("run FILE {flags}"));
        wait_until("the work is in the middle", || project.path("held").exists());
        if hangs {
            kill(children(running.id())[0], Signal::STOP);
        }
        kill(running.id(), signal);
        let stopped = wait(running).expect(status, &["stopping: ", "stopped  held", onward]);
        assert!(stopped.stderr.ends_with("interrupted: the same command goes on from here\n"), "{what}");
        std::fs::remove_file(project.path("hold")).unwrap();
        project.run("run FILE").expect(0, &["ran      held", "ran      after"]);
        assert_eq!(std::fs::read_dir(project.path(".pipeline/work")).unwrap().count(), 0, "{what}");
        let undisturbed = Project::new(&pipeline.replace("WITH", field));
        undisturbed.run("run FILE").expect(0, &[]);
        assert_eq!(project.digests(""), undisturbed.digests(""), "{what}");
    }
}

#[test]
fn a_stop_is_heard_while_a_source_is_hashed() {
    let project = Project::new(
        "
version: 1
name: hashing
stages:
  data: {kind: read-rows, with: {path: rows.txt}}
  other: {kind: init}
",
    );
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        // Hours of zeros to hash, which take no room.
        let source = std::fs::File::create(project.path("rows.txt")).unwrap();
        source.set_len(8 << 40).unwrap();
        let running = project.start("run FILE");
        wait_until("the run begins", || std::fs::read_dir(project.path(".pipeline/runs")).is_ok());
        std::thread::sleep(Duration::from_millis(200));
        kill(running.id(), signal);
        wait(running).expect(status, &["interrupted"]);
        let planning = project.start("plan FILE");
        std::thread::sleep(Duration::from_millis(300));
        kill(planning.id(), signal);
        wait(planning).expect(status, &["interrupted"]);
        assert_eq!(std::fs::read_dir(project.path(".pipeline/work")).unwrap().count(), 0);
    }
    project.write("rows.txt", "1\n2\n");
    project.run("run FILE").expect(0, &["done: 2 ran"]);
}

#[test]
fn a_run_that_was_told_to_outlive_its_terminal_does() {
    let project = Project::new(&HELD.replace("WITH", "hold: true"));
    project.write("hold", "");
    let plain = project.command("run FILE");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(plain.get_program()).args(plain.get_args());
    command.current_dir(plain.get_current_dir().unwrap()).stdout(std::process::Stdio::null());
    let running = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    wait_until("the stage runs", || project.path("held").exists());
    kill(running.id(), Signal::HUP);
    std::thread::sleep(Duration::from_millis(100));
    std::fs::remove_file(project.path("hold")).unwrap();
    wait(running).expect(0, &["done: 3 ran"]);
}

#[test]
fn a_killed_run_leaves_no_process_and_ends_with_the_same_bits() {
    let expected = undisturbed();
    let project = Project::new(PROMPTKD);
    for round in [2, 7, 13] {
        let mut running = start_until_round(&project, "run FILE --cut-every 0.02", round);
        let workers = children(running.id());
        assert!(!workers.is_empty());
        kill(running.id(), Signal::KILL);
        assert_eq!(running.wait().unwrap().signal(), Some(9));
        wait_until("no worker outlives its coordinator", || workers.iter().all(|worker| !is_alive(*worker)));
    }
    project.run("run FILE").expect(0, &["resumed  train"]);
    assert_eq!(project.digests(""), expected);
}

#[test]
fn a_run_may_be_killed_at_any_moment() {
    let project = Project::new(PROMPTKD);
    for milliseconds in [3, 10, 20, 35, 50, 80, 120, 170, 230] {
        let mut running = project.start("run FILE --cut-every 0");
        std::thread::sleep(Duration::from_millis(milliseconds));
        let workers = children(running.id());
        kill(running.id(), Signal::KILL);
        running.wait().unwrap();
        wait_until("no worker outlives its coordinator", || workers.iter().all(|worker| !is_alive(*worker)));
    }
    project.run("run FILE").expect(0, &["done"]);
    assert_eq!(project.digests(""), undisturbed());
    assert_eq!(
        std::fs::read_dir(project.path(".pipeline/work")).unwrap().count(),
        0,
        "a run sweeps what the dead left"
    );
}

#[test]
fn a_killed_worker_fails_its_stage_and_the_next_run_goes_on() {
    let project = Project::new(PROMPTKD);
    let running = start_until_round(&project, "run FILE --cut-every 0", 6);
    for worker in children(running.id()) {
        kill(worker, Signal::KILL);
    }
    let killed = wait(running).expect(1, &["killed, as the system does when memory runs out", "needs `train`"]);
    assert!(killed.words().contains(&"failed train".into()));
    project.run("run FILE").expect(0, &["resumed  train", "done: 2 ran"]);
    assert_eq!(project.digests(""), undisturbed());
}

#[test]
fn a_failing_round_is_run_again_from_the_newest_cut_once_mended() {
    let failing = PROMPTKD.replace("sleep: 10", "sleep: 10, fail_at: 9");
    let project = Project::new(&failing);
    project.run("run FILE --cut-every 0").expect(1, &["stage `learn`, round 10: told to fail in round 9"]);
    // Another configuration is another key, so nothing of the failed attempt is used.
    project.write("p.yaml", PROMPTKD);
    let ran = project.run("run FILE").expect(0, &["ran      train"]);
    assert!(!ran.words().contains(&"resumed train".into()));
    assert_eq!(project.digests(""), undisturbed());
}

#[test]
fn a_run_that_waits_for_another_can_be_interrupted() {
    let project = Project::new(&PROMPTKD.replace("sleep: 10", "sleep: 200"));
    let first = start_until_round(&project, "run FILE", 1);
    let second = project.start("run FILE");
    wait_until("the second run waits", || {
        let runs = std::fs::read_dir(project.path(".pipeline/runs")).unwrap().flatten();
        let events = runs.map(|run| std::fs::read_to_string(run.path().join("events.jsonl")).unwrap_or_default());
        events.into_iter().any(|text| text.contains("stage_waiting"))
    });
    kill(second.id(), Signal::INT);
    wait(second).expect(130, &["stopped  train"]);
    kill(first.id(), Signal::INT);
    wait(first).expect(130, &["stopped  train"]);
}
