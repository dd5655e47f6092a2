//! Names for results, runs and what they left: nobody types a hash.

use std::fs;

use crate::harness::{Project, wait_until};
use crate::interrupts::HELD;

const PIPELINE: &str = "
version: 1
name: names
params: {size: 4}
stages:
  source: {kind: rows, with: {rows: 6}}
  first: {kind: count, in: {data: source}, with: {file: first.txt, keep: \"${params.size}\"}}
  second: {kind: count, in: {data: first}, with: {file: second.txt}}
variants:
  short: {set: {params.size: 2}}
";

#[test]
fn a_result_has_a_name_that_moves_only_when_told() {
    let project = Project::new(PIPELINE);
    project.run("tag best FILE first").expect(2, &["there is no store"]);
    project.run("run FILE --all").expect(0, &["done: 5 ran"]);
    project.run("tag best FILE first").expect(0, &["best  `first` of p.yaml"]);
    project.run("tag best FILE first").expect(0, &[]);
    project
        .run("tag best FILE first --variant short")
        .expect(2, &["`best` is the name of `first` of p.yaml; give it to this one with `--move`"]);
    project.run("tag best FILE first --variant short --move").expect(0, &["best  `first` (short) of p.yaml"]);
    project.run("tag a/b FILE first").expect(2, &["`a/b` is no name for a result"]);
    project.run("tag x FILE frist").expect(2, &["did you mean `first`?"]);
    project.run("tag x FILE first second").expect(2, &["name one stage"]);
    project.run("tag x FILE first --all").expect(2, &["`first` may be of `base`, `short`; select one variant"]);
    project.run("tag x FILE first --set params.size=1").expect(2, &["has no result yet"]);
    let tags = project.run("tags --json").expect(0, &[]).stdout;
    let tags: serde_json::Value = serde_json::from_str(&tags).unwrap();
    assert_eq!((&tags["best"]["of"]["cell"], tags.as_object().unwrap().len()), (&"short".into(), 1));
    project.run("untag best").expect(0, &[]);
    project.run("untag best").expect(2, &["nothing is called `best`"]);
}

#[test]
fn a_plan_fails_when_the_key_of_a_pinned_stage_would_change() {
    let project = Project::new(PIPELINE);
    project.run("run FILE").expect(0, &["done: 3 ran"]);
    project.run("pin FILE first").expect(0, &["p.first  `first` of p.yaml  pinned"]);
    project.run("tags").expect(0, &["p.first  `first` of p.yaml", "pinned"]);
    project.run("plan FILE").expect(0, &["cached"]);
    // A new key below is fine.
    project.run("run FILE --set second.keep=1").expect(0, &["done: 1 ran, 2 reused"]);
    let said = "`first` is pinned, and its key would be another: keep: 4 -> 3 (--set:1:13); undo the change";
    project.run("plan FILE --set params.size=3").expect(2, &[said]);
    project.run("run FILE --set params.size=3").expect(2, &[said]);
    assert_eq!(project.lines("first.txt"), 1, "nothing ran");
    // Another cell is not pinned.
    project.run("run FILE --variant short").expect(0, &["done: 2 ran, 1 reused"]);
    // Known only once its input is made: then it fails instead of running.
    let said = "`first` is pinned, and its key would be another: in.data";
    project.run("run FILE --set source.rows=7").expect(1, &["failed   first", said, "skipped  second"]);
    project.run("unpin FILE first").expect(0, &[]);
    project.run("unpin FILE first").expect(2, &["`first` is not pinned"]);
    project.run("run FILE --set params.size=3").expect(0, &["done: 2 ran, 1 reused"]);
}

#[test]
fn runs_are_listed_with_what_became_of_them_and_found_by_their_date() {
    let project = Project::new(PIPELINE);
    project.run("runs").expect(2, &["there is no store"]);
    project.run("run FILE").expect(0, &[]);
    project.run("run FILE --variant short").expect(0, &[]);
    let runs = project.run("runs --json").expect(0, &[]).stdout;
    let runs: serde_json::Value = serde_json::from_str(&runs).unwrap();
    let counts = |run: &serde_json::Value| (run["state"].as_str().unwrap().to_owned(), run["ran"].as_u64().unwrap());
    let all: Vec<_> = runs.as_array().unwrap().iter().map(counts).collect();
    assert_eq!(all, [("done".to_owned(), 3), ("done".to_owned(), 2)]);
    project.run("runs").expect(0, &["p.yaml  3 ran, 0 reused", "p.yaml  2 ran, 1 reused"]);
    let newest = runs[1]["run"].as_str().unwrap();
    project.run(&format!("runs {newest}")).expect(0, &["reused    source", "ran       second"]);
    // The newest of that day.
    project.run(&format!("runs {}", &newest[..8])).expect(0, &[newest, "reused    source"]);
    project.run("runs 1999").expect(2, &["no run begins with `1999`"]);
    project.run("logs").expect(0, &["== first (1)", "== second (1)"]);
    project.run("logs third").expect(2, &["stage `third` has no log in run", "logs are there of `first`, `second`"]);
    project.run("status").expect(0, &["nothing runs"]);
}

#[test]
fn what_runs_is_shown_and_its_log_is_followed_to_the_end() {
    let project = Project::new(&HELD.replace("WITH", "hold: true"));
    project.write("hold", "");
    let running = project.start("run FILE");
    wait_until("the first worker runs", || project.path("held").exists());
    project.run("status").expect(0, &["p.yaml  1 of 3 stages done", "running"]);
    project.run("runs").expect(0, &["running"]);
    project.run("cache gc --days 0").expect(2, &["somebody works with the store"]);
    let following = project.start("logs -f");
    fs::remove_file(project.path("hold")).unwrap();
    assert!(running.wait_with_output().unwrap().status.success());
    let followed = following.wait_with_output().unwrap();
    assert!(followed.status.success());
    assert!(String::from_utf8(followed.stdout).unwrap().contains("== held"), "it began with the stage");
    project.run("runs").expect(0, &["done"]);
}

#[test]
fn why_compares_with_a_run_a_name_and_a_variant() {
    let project = Project::new(PIPELINE);
    project.run("run FILE").expect(0, &[]);
    let runs: serde_json::Value = serde_json::from_str(&project.run("runs --json").stdout).unwrap();
    let run = runs[0]["run"].as_str().unwrap();
    project.run("tag four FILE first").expect(0, &[]);
    project.run("run FILE --variant short").expect(0, &[]);
    project
        .run("why FILE first --variant short --against four")
        .expect(0, &["compared with `four`, `first` of p.yaml:", "keep: 4 -> 2"]);
    let ran = project.run(&format!("why FILE --variant short --against {run}"));
    ran.expect(0, &[&format!("compared with run {run}:"), "keep: 4 -> 2    p.yaml:10:30", "nothing: it is the same"]);
    project
        .run("why FILE first --against short")
        .expect(0, &["compared with variant `short`:", "keep: 2 -> 4    p.yaml:4:16"]);
    project.run("why FILE --against nothing").expect(2, &["`nothing` is no run, no name of a result and no variant"]);
}

#[test]
fn why_says_of_a_stage_that_waits_what_has_changed_already() {
    let project = Project::new(PIPELINE);
    project.run("run FILE").expect(0, &[]);
    project
        .run("why FILE second --set params.size=1 --set second.note=new")
        .expect(0, &["second: its key depends on `first`", "so far:", "note: default -> new", "open: data"]);
    let ran = project.run("why FILE second --set params.size=1");
    ran.expect(0, &["nothing else has changed", "open: data"]);
}
