//! Which stages a command is about: named ones, what they need, what needs them, and what is to run in any case.

use crate::harness::Project;

/// Two chains from one source: `source`, `left`, `right`, and `end` that reads both; `aside` reads nothing.
const DIAMOND: &str = "
version: 1
name: diamond
stages:
  source: {kind: rows, with: {rows: 6}}
  left: {kind: count, in: {data: source}, with: {file: left.txt, keep: 4}}
  right: {kind: count, in: {data: source}, with: {file: right.txt, keep: 3}}
  end: {kind: count, in: {data: left, other: right}, with: {file: end.txt}}
  aside: {kind: init}
";

/// The stages that a plan holds, in order.
fn planned(project: &Project, arguments: &str) -> Vec<String> {
    let plan = project.run(&format!("plan FILE {arguments}")).expect(0, &[]).stdout;
    // The last line sums up.
    let lines = plan.lines().count() - 1;
    plan.lines().take(lines).map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect()
}

#[test]
fn a_plus_says_which_way_a_selection_grows() {
    let project = Project::new(DIAMOND);
    for (arguments, expected) in [
        ("", "source left right end aside"),
        ("left", "source left"),
        ("+left", "source left"),
        ("left aside", "source left aside"),
        // What needs `left` needs `right`, too.
        ("left+", "source left right end"),
        ("--until left", "source left right aside"),
        ("--until left,right", "source left right aside"),
        ("source+ --until left", "source left right"),
    ] {
        assert_eq!(planned(&project, arguments).join(" "), expected, "{arguments}");
    }
    project.run("plan FILE lefd+").expect(2, &["no selected variant has a stage `lefd`; did you mean `left`?"]);
    project.run("plan FILE end --until left").expect(2, &["everything that is named needs `left`"]);
}

#[test]
fn only_the_named_stages_run_where_what_they_need_has_a_result() {
    let project = Project::new(DIAMOND);
    let missing = "`source` has no result, and `--only` keeps it from running";
    project.run("run FILE left --only").expect(2, &[missing]);
    project.run("plan FILE left --only").expect(2, &[missing]);
    assert_eq!(project.lines("left.txt"), 0, "nothing ran");
    project.run("run FILE source").expect(0, &["done: 1 ran"]);
    project.run("run FILE left --only").expect(0, &["done: 1 ran, 1 reused"]);
    project.run("run FILE end --only").expect(2, &["`right` has no result"]);
    project.run("run FILE right end --only").expect(0, &["done: 2 ran, 2 reused"]);
    project.run("run FILE --only").expect(2, &["<STAGE>"]);
}

#[test]
fn a_forced_stage_runs_again_and_says_whether_it_gave_the_same() {
    let project = Project::new(DIAMOND);
    project.run("run FILE").expect(0, &["done: 5 ran"]);
    let before = project.digests("");
    project
        .run("plan FILE end --force left")
        .expect(0, &["run                 left    asked for with `--force`", "depends-on-result   end     on `left`"]);
    let ran =
        project.run("run FILE --force left").expect(0, &["done: 1 ran, 4 reused", "it gave the same bytes as before"]);
    assert!(ran.words().contains(&"ran left".into()), "{:?}", ran.words());
    assert_eq!((project.lines("left.txt"), project.lines("end.txt")), (2, 1));
    assert_eq!(project.digests(""), before);
    project.run("run FILE --force left+").expect(0, &["done: 2 ran, 3 reused"]);
    project
        .run("run FILE aside --force left")
        .expect(2, &["`--force left` names a stage that is not among those to run"]);
}

#[test]
fn a_result_that_differs_when_it_is_made_again_is_said() {
    let pipeline = "
version: 1
name: moody
stages:
  source: {kind: rows, with: {rows: 6}}
  moody: {kind: moody, in: {data: source}, with: {file: mood.txt}}
  after: {kind: count, in: {data: moody}, with: {file: after.txt}}
";
    let project = Project::new(pipeline);
    project.run("run FILE").expect(0, &["done: 3 ran"]);
    project.run("run FILE --force moody").expect(
        0,
        &["it gave other bytes than before for `data`: the same key, another result", "done: 2 ran, 1 reused"],
    );
    project.run("run FILE").expect(0, &["done: 0 ran, 3 reused"]);
}

#[test]
fn fail_fast_stops_what_does_not_need_the_failed_stage() {
    let pipeline = "
version: 1
name: failing
stages:
  source: {kind: rows, with: {rows: 6}}
  broken: {kind: fail, in: {after: source}, with: {how: error}}
  aside: {kind: count, in: {data: source}, with: {file: aside.txt}}
";
    let project = Project::new(pipeline);
    project.run("run FILE --fail-fast").expect(1, &["failed: 1 ran, 0 reused, 1 failed"]);
    assert_eq!(project.lines("aside.txt"), 0);
    project.run("run FILE").expect(1, &["failed: 1 ran, 1 reused, 1 failed"]);
    assert_eq!(project.lines("aside.txt"), 1);
}

#[test]
fn what_the_most_work_waits_for_runs_first() {
    let pipeline = "
version: 1
name: paths
stages:
  source: {kind: rows, with: {rows: 6}}
  first: {kind: slow, in: {data: source}, with: {milliseconds: 300}}
  second: {kind: slow, in: {data: source}, with: {milliseconds: 301}}
  third: {kind: slow, in: {data: source}, with: {milliseconds: 302}}
  long: {kind: slow, in: {data: source}, with: {milliseconds: 900}}
";
    let project = Project::new(pipeline);
    let started = |arguments: &str| -> Vec<String> {
        let events = project.run(&format!("run FILE --json {arguments}")).expect(0, &[]).events();
        let started = events.iter().filter(|event| event["event"] == "stage_started");
        started.map(|event| event["stage"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(started("--jobs 1"), ["source", "first", "second", "third", "long"], "the order of the file");
    // Other keys, of which is known what they took before. Whatever is ready first takes a free place at once; when one comes free,
    // all are.
    let order = started("--jobs 2 --set source.seed=7");
    assert_ne!(order[4], "long", "{order:?}");
}

#[test]
fn a_stage_without_memory_beside_others_runs_once_more_alone() {
    let pipeline = "
version: 1
name: hungry
stages:
  source: {kind: rows, with: {rows: 6}}
  slow: {kind: slow, in: {data: source}, with: {milliseconds: 1500}}
  hungry: {kind: fail, in: {after: source}, with: {how: memory}}
";
    let said = "it runs once more, when no other stage does";
    let beside = Project::new(pipeline);
    beside.run("run FILE --jobs 2").expect(1, &[said, "failed: 2 ran, 0 reused, 1 failed"]);
    let alone = Project::new(pipeline).run("run FILE").expect(1, &["failed: 2 ran, 0 reused, 1 failed"]);
    assert!(!alone.stderr.contains(said), "{}", alone.stderr);
}
