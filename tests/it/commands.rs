//! The other commands.

use std::io::Write;
use std::process::Stdio;

use crate::harness::{Project, Ran};
use crate::runs::PROMPTKD;

#[test]
fn check_finds_errors_with_their_place() {
    let project = Project::new(PROMPTKD);
    project.run("check FILE --all").expect(0, &["ok: 2 cells, 9 distinct stages"]);
    project.write("p.yaml", &PROMPTKD.replace("rows: 24", "rws: 24"));
    project.run("check FILE").expect(2, &["p.yaml:6:", "rws"]);
    project.write("p.yaml", PROMPTKD);
    project.run("run nowhere.yaml").expect(2, &["nowhere.yaml"]);
    project.run("run FILE --device gpu").expect(2, &["unknown device `gpu`"]);
}

#[test]
fn origin_says_where_every_value_is_written() {
    let project = Project::new(PROMPTKD);
    let line = PROMPTKD.lines().position(|line| line.contains("rate: 0.05")).unwrap() + 1;
    let place = format!("train.learn.rate = 0.05  (p.yaml:{line}:");
    project
        .run("check FILE --origin")
        .expect(0, &[&place, "train.learn.seed = 0  (default)", "data.rows = 24  (p.yaml:6:"]);
    project.run("check FILE --origin --set train.learn.rate=0.5").expect(0, &["train.learn.rate = 0.5  (--set:1:"]);
}

#[test]
fn plan_says_what_would_run_and_why() {
    let project = Project::new(PROMPTKD);
    project
        .run("plan FILE --check")
        .expect(3, &["run                 data      not run before", "depends-on-result   train"]);
    project.run("run FILE").expect(0, &[]);
    project
        .run("plan FILE --set train.learn.rate=0.5")
        .expect(0, &["run                 train     learn.rate: 0.05 -> 0.5"]);
    project.run("plan FILE --check").expect(0, &[]);
}

#[test]
fn why_names_the_value_and_its_place() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &[]);
    project.run("why FILE train").expect(0, &["train: cached", "the same as in every earlier run"]);
    project.write("p.yaml", &PROMPTKD.replace("rate: 0.05", "rate: 0.07"));
    let line = PROMPTKD.lines().position(|line| line.contains("rate: 0.05")).unwrap() + 1;
    project
        .run("why FILE train")
        .expect(0, &["train: will run", "learn.rate: 0.05 -> 0.07", &format!("p.yaml:{line}:")]);
    project.run("why FILE score").expect(0, &["score: its key depends on `train`"]);
    // The default of a field is left out of the key, and its place is known all the same.
    project.write("p.yaml", &PROMPTKD.replace("rate: 0.2}", "rate: 0.1}"));
    project.run("why FILE student0").expect(0, &["step.rate: 0.2 -> default"]);
    project.run("why FILE train --variant slow").expect(0, &["depends on `student0`"]);
}

#[test]
fn a_new_variant_is_compared_with_the_base() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &[]);
    project.run("why FILE train --variant slow").expect(0, &["learn.rate: 0.05 -> 0.01"]);
}

#[test]
fn show_has_the_promised_form() {
    let project = Project::new(PROMPTKD);
    let shown = project.show("");
    assert_eq!(
        (&shown["stages"]["data"]["status"], &shown["stages"]["score"]["key"]),
        (&"run".into(), &serde_json::Value::Null)
    );
    project.run("run FILE").expect(0, &[]);
    let shown = project.show("");
    let stages = shown["stages"].as_object().unwrap();
    let train = &stages["train"];
    assert_eq!(train.as_object().unwrap().keys().collect::<Vec<_>>(), ["key", "status", "outputs", "metrics"]);
    assert_eq!(train["outputs"].as_object().unwrap().keys().collect::<Vec<_>>(), ["prompt", "student"]);
    let path = train["outputs"]["student"]["path"].as_str().unwrap();
    assert!(std::path::Path::new(path).join("numbers.bin").is_file());
    assert!(stages["train.learn"]["metrics"]["loss"].is_f64());
    let rows = stages["train.learn"]["outputs"]["metrics"]["path"].as_str().unwrap();
    assert_eq!(std::fs::read_to_string(format!("{rows}/metrics.jsonl")).unwrap().lines().count(), 24);
    assert!(stages["score"]["metrics"]["score"].is_f64());
    // A training stage used alone is shown as itself.
    assert!(
        stages["student0"]["outputs"].get("model").is_some() && stages["student0"]["outputs"].get("metrics").is_some()
    );
    assert!(stages["student0"]["metrics"]["check"]["loss"].is_f64());
    assert!(!stages.contains_key("student0.step"));
    project.run("show FILE score").expect(0, &["score  cached", "score = "]);
}

#[test]
fn export_copies_verified_bytes_and_never_overwrites() {
    let project = Project::new(PROMPTKD);
    project.run("export FILE teacher --to out").expect(2, &["there is no store at `.pipeline`"]);
    project.run("run FILE data").expect(0, &[]);
    project.run("export FILE teacher --to out").expect(2, &["`teacher` has no result yet"]);
    project.run("run FILE").expect(0, &[]);
    project.run("export FILE train.student --to out").expect(0, &["out"]);
    let kept = project.show("")["stages"]["train"]["outputs"]["student"]["path"].as_str().unwrap().to_owned();
    let bytes = |folder: &str| std::fs::read(format!("{folder}/numbers.bin")).unwrap();
    assert_eq!(bytes(&kept), bytes(project.path("out").to_str().unwrap()));
    assert!(!std::fs::metadata(project.path("out/numbers.bin")).unwrap().permissions().readonly());
    project.run("export FILE train.student --to out").expect(2, &["`out` is already there"]);
    project.run("export FILE train --to other").expect(2, &["`train.prompt`", "`train.student`"]);
    project.run("export FILE teacher --to teacher").expect(0, &[]);
    assert!(project.path("teacher/numbers.bin").is_file());
    std::os::unix::fs::symlink(".pipeline/cas", project.path("link")).unwrap();
    for inside in [".pipeline/teacher", ".pipeline/cas/aa/teacher", "link/teacher"] {
        project
            .run(&format!("export FILE teacher --to {inside}"))
            .expect(2, &["is inside the store", "a folder outside"]);
    }
    project.run("cache verify").expect(0, &[": 0 damaged"]);
}

#[test]
fn who_only_reads_makes_no_store() {
    let project = Project::new(PROMPTKD);
    for reading in ["plan FILE", "why FILE", "show FILE"] {
        project.run(&format!("{reading} --store mistyped")).expect(0, &["note: there is no store at `mistyped` yet"]);
    }
    for reading in ["export FILE teacher --to out", "cache du", "cache verify"] {
        project.run(&format!("{reading} --store mistyped")).expect(2, &["error: there is no store at `mistyped`"]);
    }
    assert!(!project.path("mistyped").exists());
}

/// A stage is known by what it was made from, although that is damaged by now.
#[test]
fn what_is_below_damage_is_shown() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &[]);
    let whole = project.show("score");
    let path = whole["stages"]["teacher"]["outputs"].as_object().unwrap().values().next().unwrap()["path"].clone();
    let file = std::fs::read_dir(path.as_str().unwrap()).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_file(&file).unwrap();
    let digest = |name: &str| -> std::path::PathBuf {
        let digest = whole["stages"][name]["outputs"].as_object().unwrap().values().next().unwrap();
        digest["path"].as_str().unwrap().into()
    };
    assert!(digest("score").exists());
    let store = cache::Store::open(&project.path(".pipeline")).unwrap();
    let key: cache::Key = whole["stages"]["teacher"]["key"].as_str().unwrap().parse().unwrap();
    let record = store.record(&key).unwrap().unwrap();
    for artifact in record.outputs.values() {
        for file in &artifact.files {
            let name = file.digest.to_string();
            std::fs::remove_file(project.path(".pipeline/cas").join(&name[..2]).join(&name[2..])).unwrap();
        }
    }
    let shown = project.show("score");
    assert_eq!(shown["stages"]["teacher"]["status"], "run");
    assert_eq!(shown["stages"]["score"], whole["stages"]["score"]);
    project.run("plan FILE").expect(0, &["run                 teacher", "cached              score"]);
    project.run("run FILE").expect(0, &["ran      teacher", "done: 1 ran, 6 reused"]);
}

#[test]
fn a_shipped_pipeline_runs_in_any_folder_and_can_be_copied() {
    let project = Project::new("");
    project.run("run shipped.yaml").expect(0, &["done: 2 ran"]);
    project.run("init shipped.yaml").expect(0, &["shipped.yaml"]);
    assert!(project.read("shipped.yaml").contains("name: shipped"));
    project.run("run shipped.yaml").expect(0, &["done: 0 ran, 2 reused"]);
}

#[test]
fn score_is_lent_by_the_stages() {
    let project = Project::new("");
    project.write("p.jsonl", "{}\n{}\n");
    project.write("r.jsonl", "{}\n");
    let ran = project.run("score --predictions p.jsonl --references r.jsonl --json").expect(0, &[]);
    let scores: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&scores["predictions"], &scores["references"]), (&2.into(), &1.into()));
    project.run("score --predictions none.jsonl --references r.jsonl").expect(4, &["none.jsonl"]);
}

#[test]
fn the_store_can_be_measured_and_verified() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE --store elsewhere").expect(0, &[]);
    project.run("cache du --store elsewhere").expect(0, &["artifacts", "checkpoints", "all"]);
    let usage: serde_json::Value =
        serde_json::from_str(&project.run("cache du --store elsewhere --json").stdout).unwrap();
    assert!(usage["cas"]["bytes"].as_u64().unwrap() > 0);
    assert_eq!(usage["cut"]["files"], 0, "checkpoints of finished work are dropped");
    project.run("cache verify --store elsewhere").expect(0, &[": 0 damaged"]);
    assert!(!project.path(".pipeline").exists());
}

#[test]
fn a_store_that_cannot_be_made_is_a_status_of_its_own() {
    let project = Project::new(PROMPTKD);
    project.write("file", "");
    project.run("run FILE --store file/store").expect(4, &["error: "]);
}

#[test]
fn drawing_and_catalogue_come_from_the_same_definitions() {
    let project = Project::new(PROMPTKD);
    project.run("graph FILE").expect(0, &["flowchart", "learn"]);
    project.run("graph FILE --format dot").expect(0, &["digraph"]);
    project.run("stages learn").expect(0, &["learn"]);
    project.run("schema").expect(0, &["\"stages\""]);
}

#[test]
fn a_pipeline_may_come_through_a_pipe() {
    let project = Project::new("");
    let through = |arguments: &str, text: &str| {
        let mut command = project.command(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        Ran::new(child.wait_with_output().unwrap())
    };
    for name in ["-", "/dev/stdin"] {
        through(&format!("check {name}"), PROMPTKD).expect(0, &["ok: 1 cell, 7 distinct stages"]);
        through(&format!("check {name}"), "version: 2\n").expect(2, &["`version: 1`, got"]);
    }
    through("run - score", PROMPTKD).expect(0, &["done: 7 ran"]);
    // Read once, looked at twice.
    through("compare - --run", PROMPTKD).expect(0, &["done: 2 ran, 7 reused", "slow"]);
    project.run("check p").expect(2, &["no pipeline `p`: there is no such file", "did you mean `p.yaml`?"]);
}

/// What a name can hold must not be obeyed by a terminal, nor be taken for what the program says.
#[test]
fn names_are_shown_and_not_obeyed() {
    let project = Project::new("version: 1\nname: n\nstages:\n  \"a\\u202Eb\\nok: 1 cell\\u001b[31m\": {kind: rows}\n");
    let ran = project.run("check FILE").expect(2, &["`a\\u{202e}b\\nok: 1 cell\\u{1b}[31m` cannot be a name"]);
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(!said.contains(['\u{202e}', '\u{1b}']) && !said.lines().any(|line| line.starts_with("ok: ")), "{said}");
    let name = "x\u{202e}\nok: 1 cell.yaml";
    let ran = Ran::new(project.command("check").arg(name).output().unwrap());
    assert!(
        !ran.stderr.contains('\u{202e}') && !ran.stderr.lines().any(|line| line.starts_with("ok: ")),
        "{}",
        ran.stderr
    );
    let usage = Ran::new(project.command("run").env("PIPELINE_STORE", "s").output().unwrap());
    assert!(
        usage.stderr.contains("Usage: fake-stages run <FILE> [STAGE]...")
            || usage.stderr.contains("run [OPTIONS] <FILE>"),
        "{}",
        usage.stderr
    );
}

#[test]
fn a_shell_completes_the_names_in_a_pipeline() {
    let project = Project::new(crate::runs::PROMPTKD);
    for (words, expected) in [
        ("run p.yaml train.l", "train.learn\n"),
        ("run p.yaml --variant s", "slow\n"),
        ("run p.yaml --ablation s", "seeds\n"),
        ("why p.yaml --set params.", "params.seed=\n"),
        ("run nowhere.yaml t", ""),
    ] {
        assert_eq!(project.run(&format!("complete -- {words}")).expect(0, &[]).stdout, expected, "{words}");
    }
    for shell in ["bash", "zsh", "fish"] {
        project.run(&format!("completions {shell}")).expect(0, &["complete -- "]);
    }
}

#[test]
fn doctor_and_a_plan_speak_to_programs() {
    let project = Project::new(crate::runs::PROMPTKD);
    let doctor: serde_json::Value = serde_json::from_str(&project.run("doctor --json").expect(0, &[]).stdout).unwrap();
    assert!(doctor["hashing"].as_f64().unwrap() > 1e6 && doctor["store"]["free"].as_u64().is_some(), "{doctor}");
    project.run("run FILE teacher").expect(0, &[]);
    let plan: serde_json::Value = serde_json::from_str(&project.run("plan FILE --json").expect(0, &[]).stdout).unwrap();
    let status = |stage: &str| {
        let stages = plan["stages"].as_array().unwrap();
        stages.iter().find(|found| found["stage"] == stage).unwrap()["status"].clone()
    };
    assert_eq!(
        (status("teacher"), status("data"), status("train")),
        ("cached".into(), "run".into(), "depends-on-result".into())
    );
    assert_eq!((&plan["outlook"]["cached"], &plan["outlook"]["never_made"]), (&1.into(), &6.into()));
}
