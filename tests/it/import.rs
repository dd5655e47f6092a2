//! Results that nobody made here.

use std::fs;

use crate::harness::Project;

const PIPELINE: &str = "
version: 1
name: adopted
stages:
  source: {kind: rows, with: {rows: 6}}
  model: {kind: learn, in: {data: source}, with: {take: 2, epochs: 1}}
  score: {kind: evaluate, in: {model: model, data: source}}
";

#[test]
fn a_folder_becomes_the_result_of_a_stage_and_is_known_to_be_foreign() {
    let elsewhere = Project::new(PIPELINE);
    elsewhere.run("run FILE").expect(0, &[]);
    let made = elsewhere.path("made");
    elsewhere.run(&format!("export FILE model.model --to {}", made.display())).expect(0, &[]);

    let project = Project::new(PIPELINE);
    let import = format!("import FILE model --from {}", made.display());
    project.run(&import).expect(2, &["the key of `model` depends on `source`; run that first"]);
    project.run("run FILE source").expect(0, &[]);
    project.run("import FILE model --from nowhere").expect(2, &["there is nothing at `nowhere`"]);
    fs::create_dir(project.path("empty")).unwrap();
    project.run("import FILE model --from empty").expect(2, &["`empty` cannot be read as a model"]);
    project.run(&import).expect(0, &["model"]);
    project.run(&import).expect(2, &["`model` has a result, which stays"]);
    project.run("plan FILE").expect(0, &["cached              model   imported from", "made"]);
    project.run("run FILE").expect(0, &["reused   model", "ran      score"]);
    let digest = |project: &Project| project.show("")["stages"]["model"]["outputs"]["model"]["digest"].clone();
    assert_eq!(digest(&project), digest(&elsewhere));
}
