//! What the store takes up, and making room.

use serde_json::Value as Json;

use crate::harness::Project;

const PIPELINE: &str = "
version: 1
name: space
stages:
  source: {kind: rows, with: {rows: 600}}
  first: {kind: count, in: {data: source}, with: {file: first.txt, keep: 400}}
variants:
  half: {set: {first.keep: 300}}
  same: {set: {first.note: other}}
";

fn json(project: &Project, command: &str) -> Json {
    serde_json::from_str(&project.run(command).expect(0, &[]).stdout).unwrap()
}

#[test]
fn every_stage_says_what_it_takes_up_and_what_of_that_is_its_own() {
    let project = Project::new(PIPELINE);
    project.run("run FILE --all").expect(0, &["done: 4 ran"]);
    let stages = json(&project, "cache du --stages --json");
    let found = |stage: &str| {
        let all = stages.as_array().unwrap();
        let found = all.iter().find(|found| found["stage"] == stage).unwrap_or_else(|| panic!("{stage}: {stages}"));
        (found["bytes"].as_u64().unwrap(), found["own"].as_u64().unwrap())
    };
    let (source, own) = found("`source` of p.yaml");
    assert!(source > 0 && own > 0);
    // Other keys and the same bytes: what they share is neither's own.
    let (base, same) = (found("`first` of p.yaml"), found("`first` (same) of p.yaml"));
    assert_eq!(base.0, same.0);
    assert!(base.1 < base.0 && same.1 < same.0, "{stages}");
    project.run("cache du --stages").expect(0, &["`first` (half) of p.yaml", "1 result"]);
}

#[test]
fn what_no_recent_run_wanted_goes_and_what_has_a_name_stays() {
    let project = Project::new(PIPELINE);
    project.run("run FILE --all").expect(0, &["done: 4 ran"]);
    // All of it is of today.
    project.run("cache gc").expect(0, &["dropped 0 results"]);
    project.run("tag half FILE first --variant half").expect(0, &[]);
    let would = project.run("cache gc --days 0 --dry-run").expect(0, &["`source` of p.yaml", "would drop 3 results"]);
    assert!(!would.stdout.contains("(half)"), "{}", would.stdout);
    project.run("plan FILE --all --check").expect(0, &[]);
    project.run("cache gc --days 0").expect(0, &["dropped 3 results"]);
    project.run("cache verify").expect(0, &["0 damaged"]);
    project.run("tags").expect(0, &["half"]);
    // The source is made again, with the same bytes, and what was kept is found.
    project.run("run FILE --variant half").expect(0, &["ran      source", "reused   first"]);
    project.run("cache gc --days 0 --limit 1kB").expect(0, &["dropped 1 result"]);
    project.run("cache gc --limit 1Gi").expect(2, &["`Gi` is no unit"]);
}
