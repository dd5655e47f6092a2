//! Runs that end: what runs, what is reused, what fails, and what is said of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use crate::harness::{Project, Ran, example, wait_until};
use crate::interrupts::HELD;

/// Prompt distillation in miniature.
pub(crate) const PROMPTKD: &str = "
version: 1
name: small
params: {seed: 1}
stages:
  data: {kind: rows, with: {rows: 24}}
  valid: {kind: rows, with: {rows: 5, seed: 2}}
  teacher: {kind: init, with: {value: 2.0}}
  student0:
    kind: learn
    in: {data: data, valid: valid}
    with: {take: 4, epochs: 3, rate: 0.2}
  prompt0: {kind: init, with: {value: 3.0, width: 2}}
  train:
    loop:
      windows:
        batch: {of: data, take: 4, epochs: 4, order: shuffle, seed: \"${params.seed}\"}
      carry:
        student: {from: student0, next: learn.model, keep: {best: check.score, mode: max}}
        prompt: {from: prompt0, next: tune.model, keep_with: student}
      stages:
        respond: {kind: respond, in: {model: carry.student, data: windows.batch}}
        tune: {kind: learn, in: {model: carry.prompt, teacher: carry.student, data: respond}}
        learn:
          kind: learn
          in: {model: carry.student, teacher: teacher, data: respond}
          with: {rate: 0.05, sleep: 10, count: rounds.txt}
        check: {kind: evaluate, every: epoch, in: {model: learn.model, data: valid}}
  score: {kind: evaluate, in: {model: train.student, data: valid}}
variants:
  slow: {set: {train.learn.rate: 0.01}}
ablations:
  seeds: {repeat: {params.seed: [1, 2, 3]}}
report: {metric: score.score, compare: [base, slow], seconds: [train]}
";

/// A chain that counts its runs: source, first, second.
fn chain(note: &str, keep: usize) -> String {
    format!(
        "
version: 1
name: chain
stages:
  source: {{kind: rows, with: {{rows: 6}}}}
  first: {{kind: count, in: {{data: source}}, with: {{file: first.txt, keep: {keep}, note: {note}}}}}
  second: {{kind: count, in: {{data: first}}, with: {{file: second.txt}}}}
"
    )
}

#[test]
fn a_second_run_reuses_everything_and_takes_well_under_a_second() {
    let project = Project::new(PROMPTKD);
    let first = project.run("run FILE").expect(0, &["done: 7 ran, 0 reused", "base", "seconds"]);
    let since = Instant::now();
    let second = project.run("run FILE").expect(0, &["done: 0 ran, 7 reused"]);
    assert!(since.elapsed().as_secs_f64() < 0.8, "{:?}", since.elapsed());
    assert_eq!(first.stdout, second.stdout, "a table holds figures of when things were made");
    project.run("plan FILE --check").expect(0, &["cached"]);
}

#[test]
fn a_variant_runs_only_what_differs() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &[]);
    let ran = project.run("run FILE --variant base,slow").expect(0, &["done: 2 ran, 7 reused", "slow"]);
    let words = ran.words();
    assert!(words.contains(&"ran train".into()) && words.contains(&"reused teacher".into()), "{words:?}");
    let shown = project.show("--variant base,slow");
    assert_eq!(shown["cells"]["slow"]["stages"]["train.learn"]["status"], "cached");
}

#[test]
fn equal_bytes_cut_off_all_work_below() {
    let project = Project::new(&chain("one", 4));
    project.run("run FILE").expect(0, &["done: 3 ran"]);
    // Another key for `first`, with the same result.
    project.write("p.yaml", &chain("two", 4));
    project
        .run("plan FILE")
        .expect(0, &["run                 first   note: one -> two", "depends-on-result   second  on `first`"]);
    project.run("run FILE").expect(0, &["done: 1 ran, 2 reused"]);
    project.write("p.yaml", &chain("two", 5));
    project.run("run FILE").expect(0, &["done: 2 ran, 1 reused"]);
    assert_eq!((project.lines("first.txt"), project.lines("second.txt")), (3, 2));
}

#[test]
fn names_comments_order_and_threads_change_no_key() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE --threads 1").expect(0, &[]);
    let rename = [
        ("respond:", "answer:"),
        ("data: respond}", "data: answer}"),
        ("student: {from", "pupil: {from"),
        ("carry.student", "carry.pupil"),
        ("keep_with: student}", "keep_with: pupil}"),
        ("train.student", "train.pupil"),
        ("batch: {of", "part: {of"),
        ("windows.batch", "windows.part"),
        ("teacher: {kind", "master: {kind"),
        ("teacher: teacher", "teacher: master"),
        ("version: 1", "# A comment.\nversion: 1"),
        ("{rate: 0.05, sleep: 10, count: rounds.txt}", "{sleep: 10, count: rounds.txt, rate: 5e-2, seed: 0}"),
    ];
    let renamed = rename.iter().fold(PROMPTKD.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "{old}");
        text.replace(old, new)
    });
    project.write("p.yaml", &renamed);
    project.run("plan FILE --check --threads 2 --device cpu --jobs 2").expect(0, &["cached", "master"]);
}

#[test]
fn results_do_not_depend_on_threads_jobs_or_unrolling() {
    let fused = Project::new(PROMPTKD);
    fused.run("run FILE --threads 1").expect(0, &[]);
    let unrolled = Project::new(PROMPTKD);
    unrolled.run("run FILE --unroll --jobs 2 --threads 4 --cut-every 0").expect(0, &["done: 7 ran"]);
    assert_eq!(fused.digests(""), unrolled.digests(""));
}

#[test]
fn a_failed_stage_stops_what_needs_it_and_nothing_else() {
    let pipeline = "
version: 1
name: failing
stages:
  source: {kind: rows, with: {rows: 6}}
  broken: {kind: fail, in: {after: source}, with: {how: error}}
  after: {kind: count, in: {data: broken}, with: {file: after.txt}}
  aside: {kind: count, in: {data: source}, with: {file: aside.txt}}
";
    let project = Project::new(pipeline);
    let ran = project.run("run FILE").expect(
        1,
        &["cannot go on: told to fail", "| about to go wrong", "needs `broken`", "failed: 2 ran, 0 reused, 1 failed"],
    );
    assert_eq!(ran.words(), ["ran source", "failed broken", "skipped after", "ran aside"]);
    let last = ran.stderr.lines().last().unwrap();
    assert_eq!(last, "error: stage `broken` failed, as said above");
    assert_eq!(ran.stderr.matches("told to fail").count(), 1, "an error is said once:\n{}", ran.stderr);
    assert_eq!((project.lines("after.txt"), project.lines("aside.txt")), (0, 1));
    // Nobody has said it yet where events go to another program.
    let error = "error: stage `broken` failed: cannot go on: told to fail";
    Project::new(pipeline).run("run FILE --json").expect(1, &[error]);
}

#[test]
fn a_failure_says_who_is_to_blame_and_stays_its_own() {
    let bug = "this is a bug in the program or in a library under it; please report it";
    let cases = [
        ("error", 1, "input", vec!["cannot go on: told to fail"]),
        ("disk", 4, "disk", vec!["cannot write `model.safetensors`: no storage space"]),
        (
            "memory",
            1,
            "memory",
            vec!["memory ran out: it asked for 1024.0 PiB more", "lower `micro_batch`", "`--jobs`"],
        ),
        ("sizes", 1, "memory", vec!["more memory was asked for than any machine has"]),
        ("panic", 1, "bug", vec!["panicked at ", "fakes.rs:", ": told to panic", bug]),
        ("abort", 1, "bug", vec!["the worker crashed (signal 6)", bug]),
    ];
    for (how, status, fault, said) in cases {
        let pipeline = format!(
            "version: 1\nname: crash\nstages:\n  broken: {{kind: fail, with: {{how: {how}}}}}\n  other: {{kind: init}}\n"
        );
        let project = Project::new(&pipeline);
        let mut command = project.command("run FILE");
        let ran = Ran::new(command.env("RUST_BACKTRACE", "1").output().unwrap());
        let ran = ran.expect(status, &said).expect(status, &["ran      other", "| about to go wrong"]);
        assert!(!ran.stderr.contains("backtrace"), "{}", ran.stderr);
        let events = Project::new(&pipeline).run("run FILE --json").expect(status, &[]).events();
        let failed = events.iter().find(|event| event["event"] == "stage_failed").unwrap();
        assert_eq!(failed["fault"], fault, "{how}");
    }
}

#[test]
fn a_stage_that_needs_a_card_has_it_for_itself_and_no_other_gets_one() {
    let mut pipeline = "version: 1\nname: cards\nstages:\n  data: {kind: rows, with: {rows: 1}}\n".to_owned();
    for number in 0..5 {
        pipeline +=
            &format!("  s{number}: {{kind: on-card, in: {{data: data}}, with: {{file: log.txt, number: {number}}}}}\n");
    }
    for (mask, devices, expected) in [
        (None, "auto", vec!["cuda:0 0", "cuda:0 1"]),
        (Some("3,GPU-7"), "auto", vec!["cuda:0 3", "cuda:0 GPU-7"]),
        (None, "cuda:1", vec!["cuda:0 1"]),
        (None, "cpu", vec!["cpu "]),
    ] {
        let project = Project::new(&pipeline);
        let mut command = project.command(&format!("run FILE --jobs 3 --device {devices}"));
        command.env("FAKE_GPUS", "2").env_remove("CUDA_VISIBLE_DEVICES").env("XDG_RUNTIME_DIR", project.path("."));
        if let Some(mask) = mask {
            command.env("CUDA_VISIBLE_DEVICES", mask);
        }
        Ran::new(command.output().unwrap()).expect(0, &["done: 6 ran"]);
        let log = project.read("log.txt");
        let mut busy = BTreeSet::new();
        let mut used = BTreeSet::new();
        for line in log.lines() {
            let (what, place) = line.split_once(' ').unwrap();
            used.insert(place);
            match what {
                "begin" => assert!(busy.insert(place) || devices == "cpu", "a card is shared:\n{log}"),
                _ => drop(busy.remove(place)),
            }
        }
        assert_eq!(used.into_iter().collect::<Vec<_>>(), expected, "{log}");
    }
}

#[test]
fn two_runs_on_one_machine_share_out_its_cards() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let shared = tempfile::tempdir().unwrap();
    let start = |number: u32| {
        let stages: String = (0..3)
            .map(|stage| {
                let file = log.path().display();
                format!("  s{stage}: {{kind: on-card, in: {{data: data}}, with: {{file: {file}, number: {number}{stage}}}}}\n")
            })
            .collect();
        let head = "version: 1\nname: cards\nstages:\n  data: {kind: rows, with: {rows: 1}}\n";
        let project = Project::new(&format!("{head}{stages}"));
        let mut command = project.command("run FILE --jobs 2");
        command.env("FAKE_GPUS", "1").env_remove("CUDA_VISIBLE_DEVICES").env("XDG_RUNTIME_DIR", shared.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        (command.spawn().unwrap(), project)
    };
    let runs = [start(1), start(2)];
    let said = runs.map(|(run, _project)| {
        let ran = Ran::new(run.wait_with_output().unwrap()).expect(0, &["done: 4 ran"]);
        ran.stdout + &ran.stderr
    });
    assert!(said.iter().any(|said| said.contains("waits for `cuda:0`, which another run has")), "{said:?}");
    let lines = fs::read_to_string(log.path()).unwrap();
    let words: Vec<&str> = lines.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(words, ["begin", "end"].repeat(6), "two workers had the card at once");
}

#[test]
fn a_run_goes_on_with_the_program_it_was_started_with() {
    let program = std::env::temp_dir().join(format!("pipeline-{}", std::process::id()));
    fs::copy(example("fake-stages"), &program).unwrap();
    let pipeline = HELD.replace("WITH", "hold: true");
    let project = Project::with_program(&pipeline, &program);
    project.write("hold", "");
    let running = project.start("run FILE");
    wait_until("the first worker runs", || project.path("held").exists());
    fs::remove_file(&program).unwrap();
    fs::write(&program, "something else").unwrap();
    fs::remove_file(project.path("hold")).unwrap();
    let ran = Ran::new(running.wait_with_output().unwrap());
    fs::remove_file(&program).unwrap();
    ran.expect(0, &["done: 3 ran"]);
}

#[test]
fn a_store_whose_path_is_not_utf8_is_refused_at_the_door() {
    let project = Project::new(PROMPTKD);
    let name = std::os::unix::ffi::OsStringExt::from_vec(b"st\xffre".to_vec());
    let name: std::ffi::OsString = name;
    for command in ["run FILE", "plan FILE", "cache du"] {
        let ran = Ran::new(project.command(command).env("PIPELINE_STORE", &name).output().unwrap());
        ran.expect(2, &["the path of the store", "is not UTF-8; choose another with `--store`"]);
    }
    assert!(!project.path("").join(&name).exists());
    // A working folder of that sort is fine where the store is elsewhere.
    let folder = project.path("").join(&name);
    fs::create_dir(&folder).unwrap();
    let mut command = project.command("run ../p.yaml");
    command.current_dir(&folder).env("PIPELINE_STORE", project.path("store"));
    Ran::new(command.output().unwrap()).expect(0, &["done: 7 ran"]);
}

#[test]
fn figures_that_rot_in_the_store_are_measured_again() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &[]);
    let before = project.digests("");
    let folder = project.show("")["stages"]["score"]["outputs"]["metrics"]["path"].as_str().unwrap().to_owned();
    damage(Path::new(&folder));
    project.run("run FILE").expect(0, &["ran      score", "done: 1 ran, 6 reused"]);
    project.run("plan FILE --check").expect(0, &[]);
    assert_eq!(project.digests(""), before);
}

#[test]
fn a_source_is_known_by_its_content_and_not_by_its_path() {
    let pipeline = |path: &str| {
        format!(
            "version: 1\nname: source\nstages:\n  read: {{kind: read-rows, with: {{path: {path}}}}}\n  model: {{kind: learn, in: {{data: read}}, with: {{take: 1, epochs: 1}}}}\n"
        )
    };
    let project = Project::new(&pipeline("a.txt"));
    project.write("a.txt", "1\n2\n3\n");
    project.run("run FILE").expect(0, &["done: 2 ran"]);
    project.write("b.txt", "1\n2\n3\n");
    project.write("p.yaml", &pipeline("b.txt"));
    project.run("run FILE").expect(0, &["done: 0 ran, 2 reused"]);
    project.write("b.txt", "1\n2\n4\n");
    project.run("run FILE").expect(0, &["done: 2 ran"]);
    project.write("p.yaml", &pipeline("c.txt"));
    project.run("plan FILE").expect(2, &["cannot-run          read", "c.txt"]);
    for command in ["check FILE", "plan FILE", "run FILE"] {
        project.run(command).expect(2, &["`read`: there is no file `c.txt`", "p.yaml:4:40"]);
    }
}

/// Two sources, one after the other; their stages are slow.
const SOURCES: &str = "
version: 1
name: source
stages:
  first: {kind: read-rows, with: {path: a.txt, before: 500}}
  second: {kind: read-rows, with: {path: b.txt}}
";

/// Digests of what a run makes of these files when nobody touches them.
fn undisturbed(a: &str, b: &str) -> Vec<String> {
    let project = Project::new(SOURCES);
    project.write("a.txt", a);
    project.write("b.txt", b);
    project.run("run FILE").expect(0, &["done: 2 ran"]);
    project.digests("")
}

/// Starts a run and waits until the first stage has its copy of `a.txt`.
fn start_reading(project: &Project) -> std::process::Child {
    project.write("a.txt", "1\n2\n3\n");
    project.write("b.txt", "1\n");
    let running = project.start("run FILE");
    wait_until("the source is copied", || {
        let work = fs::read_dir(project.path(".pipeline/work")).into_iter().flatten().flatten();
        work.into_iter().any(|folder| folder.path().join("scratch").is_dir())
    });
    running
}

#[test]
fn what_is_read_is_what_was_hashed_although_the_file_changes_and_changes_back() {
    let project = Project::new(SOURCES);
    let running = start_reading(&project);
    // Before the stage reads it.
    project.write("a.txt", "4\n5\n6\n");
    wait_until("the first stage has ended", || project.path(".pipeline/runs").is_dir() && ended(&project, "first"));
    project.write("a.txt", "1\n2\n3\n");
    let ran = Ran::new(running.wait_with_output().unwrap()).expect(0, &["done: 2 ran"]);
    assert!(ran.stderr.contains("warning  first") && ran.stderr.contains("`a.txt` changed since it was read"));
    assert_eq!(project.digests(""), undisturbed("1\n2\n3\n", "1\n"));
}

#[test]
fn a_source_that_changes_or_goes_after_it_was_read_leaves_the_result_and_is_said() {
    let edits: [fn(&Project); 2] =
        [|project| project.write("a.txt", "4\n5\n6\n"), |project| fs::remove_file(project.path("a.txt")).unwrap()];
    for edit in edits {
        let project = Project::new(SOURCES);
        let running = start_reading(&project);
        edit(&project);
        let said = ["`a.txt` changed since it was read; the result is that of what it held before", "done: 2 ran"];
        Ran::new(running.wait_with_output().unwrap()).expect(0, &said);
        project.write("a.txt", "1\n2\n3\n");
        project.run("plan FILE --check").expect(0, &["cached"]);
        assert_eq!(project.digests(""), undisturbed("1\n2\n3\n", "1\n"));
    }
}

#[test]
fn a_source_edited_before_its_stage_starts_gets_the_stage_another_key() {
    let project = Project::new(SOURCES);
    let running = start_reading(&project);
    project.write("b.txt", "7\n8\n");
    let said = ["`b.txt` changed since this run looked at it; what it holds now is used", "done: 2 ran, 0 reused"];
    Ran::new(running.wait_with_output().unwrap()).expect(0, &said);
    project.run("plan FILE --check").expect(0, &["cached"]);
    assert_eq!(project.digests(""), undisturbed("1\n2\n3\n", "7\n8\n"));
}

#[test]
fn a_stage_speaks_of_its_sources_as_they_are_written() {
    let project = Project::new(SOURCES);
    project.write("a.txt", "1\ntwo\n");
    project.write("b.txt", "1\n");
    let ran = project.run("run FILE").expect(1, &["cannot read `a.txt`: line 2"]);
    assert!(!ran.stderr.contains("sources/0"), "{}", ran.stderr);
}

/// Whether a stage of the only run has ended.
fn ended(project: &Project, stage: &str) -> bool {
    let run = fs::read_dir(project.path(".pipeline/runs")).unwrap().flatten().next();
    let events = run.map(|run| fs::read_to_string(run.path().join("events.jsonl")).unwrap_or_default());
    events.unwrap_or_default().lines().any(|line| line.contains("stage_finished") && line.contains(stage))
}

#[test]
fn damage_in_the_store_heals_itself() {
    let project = Project::new(&chain("one", 4));
    project.run("run FILE").expect(0, &[]);
    let before = project.digests("");
    let output = project.show("")["stages"]["first"]["outputs"]["data"]["path"].as_str().unwrap().to_owned();
    damage(Path::new(&output));
    // Something new that reads the damaged artifact.
    project.write(
        "p.yaml",
        &format!("{}  third: {{kind: count, in: {{data: first}}, with: {{file: third.txt}}}}\n", chain("one", 4)),
    );
    project.run("run FILE").expect(0, &["ran      third"]);
    assert_eq!(project.digests("source first second"), before);
    assert_eq!(project.lines("first.txt"), 2);
    project.run("cache verify").expect(0, &[": 0 damaged"]);
}

/// Changes a byte of every file.
fn damage(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let mut permissions = fs::metadata(&path).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        fs::set_permissions(&path, permissions).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn vocabularies_that_disagree_are_found_before_a_stage_runs() {
    let project = Project::new(
        "
version: 1
name: disagree
stages:
  words: {kind: rows, with: {rows: 2}}
  letters: {kind: rows, with: {rows: 2, vocabulary: letters}}
  both: {kind: count, in: {data: words, other: letters}, with: {file: both.txt}}
",
    );
    project
        .run("run FILE")
        .expect(1, &["inputs `data` and `other` must have the same vocabulary, but `data` has 97 tokens"]);
    assert_eq!(project.lines("both.txt"), 0);
}

#[test]
fn only_the_named_stages_run_with_what_they_need() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE teacher").expect(0, &["done: 1 ran"]);
    let ran = project.run("run FILE train.check").expect(0, &["done: 5 ran, 1 reused"]);
    assert!(!ran.words().contains(&"ran score".into()));
    project.run("run FILE trian").expect(2, &["no selected variant has a stage `trian`; did you mean `train`?"]);
}

#[test]
fn two_processes_run_a_key_once() {
    let pipeline = "
version: 1
name: once
stages:
  source: {kind: rows, with: {rows: 6}}
  slow: {kind: slow, in: {data: source}, with: {milliseconds: 500}}
  counted: {kind: count, in: {data: slow}, with: {file: counted.txt}}
";
    let project = Project::new(pipeline);
    let both = [project.start("run FILE"), project.start("run FILE")];
    for running in both {
        Ran::new(running.wait_with_output().unwrap()).expect(0, &["done"]);
    }
    assert_eq!(project.lines("counted.txt"), 1);
}

#[test]
fn events_are_json_lines_that_end_with_the_promised_one() {
    let project = Project::new(PROMPTKD);
    let ran = project.run("run FILE --json").expect(0, &[]);
    assert_eq!(ran.stderr, "");
    let events = ran.events();
    assert_eq!((&events[0]["event"], &events[0]["schema"]), (&"run_started".into(), &1.into()));
    let last = events.last().unwrap().as_object().unwrap();
    assert_eq!(last.keys().collect::<Vec<_>>(), ["event", "status", "ran", "reused", "failed", "seconds"]);
    assert_eq!((&last["event"], &last["status"], &last["ran"]), (&"run_finished".into(), &"done".into(), &7.into()));
    let rows = events.iter().filter(|event| event["event"] == "stage_metrics" && event["part"] == "learn");
    assert!(rows.clone().count() > 0 && rows.clone().all(|event| event["row"]["loss"].is_f64()));
    let run = fs::read_dir(project.path(".pipeline/runs")).unwrap().flatten().next().unwrap().path();
    assert_eq!(fs::read_to_string(run.join("events.jsonl")).unwrap(), ran.stdout);
    assert!(run.join("plan.jsonl").is_file() && run.join("train.1.log").is_file());
}

#[test]
fn warnings_of_a_stage_reach_the_user() {
    let project = Project::new(
        "version: 1\nname: w\nstages:\n  a: {kind: rows, with: {rows: 1}}\n  b: {kind: count, in: {data: a}, with: {file: b.txt, warn: look here}}\n",
    );
    project.run("run FILE").expect(0, &["warning  b", "look here"]);
}

#[test]
fn notes_of_a_stage_reach_the_user_in_words_and_as_events() {
    let pipeline = "version: 1\nname: n\nstages:\n  a: {kind: rows, with: {rows: 1}}\n  b: {kind: count, in: {data: a}, with: {file: b.txt, say: the loss is 2}}\n";
    Project::new(pipeline).run("run FILE").expect(0, &["note     b ", "the loss is 2"]);
    let events = Project::new(pipeline).run("run FILE --json").expect(0, &[]).events();
    let noted = events.iter().find(|event| event["event"] == "stage_noted").unwrap();
    assert_eq!((&noted["stage"], &noted["text"]), (&"b".into(), &"the loss is 2".into()));
}

#[test]
fn repeats_become_one_row_with_an_interval() {
    let project = Project::new(PROMPTKD);
    let ran = project
        .run("run FILE --ablation seeds --markdown")
        .expect(0, &["± ", "| variant |", "t-interval of the mean over 3 repeats"]);
    assert_eq!(ran.stdout.lines().filter(|line| line.starts_with("| base")).count(), 1, "{}", ran.stdout);
}

#[test]
fn variants_are_measured_against_the_baseline() {
    let project = Project::new(&PROMPTKD.replace("compare: [base, slow]", "compare: [base, slow], baseline: base"));
    let ran = project.run("run FILE --all --markdown").expect(0, &["| slow ", "| slow - base "]);
    let figure = |label: &str| -> f64 {
        let row = ran.stdout.lines().find(|line| line.split('|').nth(1).is_some_and(|cell| cell.trim() == label));
        row.unwrap().split('|').nth(2).unwrap().split_whitespace().next().unwrap().parse().unwrap()
    };
    let difference = figure("slow") - figure("base");
    assert!((figure("slow - base") - difference).abs() < 0.011, "{}", ran.stdout);
}

#[test]
fn an_interval_of_the_stage_itself_is_shown() {
    let project = Project::new(
        "
version: 1
name: own
stages:
  data: {kind: rows, with: {rows: 3}}
  model: {kind: init}
  score: {kind: evaluate, in: {model: model, data: data}, with: {interval: true}}
report: {metric: score.score, caption: In miniature}
",
    );
    let ran = project.run("run FILE").expect(0, &["In miniature", "as the stage measured it"]);
    assert!(ran.stdout.contains('['), "{}", ran.stdout);
}

#[test]
fn a_later_stage_reads_where_a_stage_of_a_loop_ended() {
    let after = "  after: {kind: double, in: {of: train.check.metrics}}\nvariants:";
    let project = Project::new(&PROMPTKD.replacen("variants:", after, 1));
    project.run("run FILE after").expect(0, &["ran      after"]);
    let shown = project.show("");
    let metric = |stage: &str, name: &str| shown["stages"][stage]["metrics"][name].as_f64().unwrap();
    assert_eq!(metric("after", "twice"), 2.0 * metric("train.check", "loss"));
}

#[test]
fn compare_shows_what_is_there_and_runs_nothing_by_itself() {
    let project = Project::new(PROMPTKD);
    let nothing = project
        .run("compare FILE")
        .expect(3, &["there is no store at `.pipeline`", "no result yet of `train`, `score`"]);
    assert_eq!(nothing.stdout, "");
    assert!(!project.path(".pipeline").exists());
    project.run("run FILE").expect(0, &["done: 7 ran"]);
    let some =
        project.run("compare FILE").expect(3, &["no result yet of `train (slow)`, `score (slow)`; `--run` computes"]);
    assert!(some.stdout.contains("base") && !some.stdout.contains("slow"), "{}", some.stdout);
    assert!(some.words().is_empty());
    project.run("compare FILE --json").expect(2, &["say `--run` as well"]);
    project.run("compare FILE --run").expect(0, &["done: 2 ran, 7 reused", "base", "slow"]);
    let all = project.run("compare FILE").expect(0, &["base", "slow"]);
    assert_eq!(all.stderr, "");
}

/// Repeats whose results are one and the same are no repeats, whether their keys are equal or not.
#[test]
fn repeats_without_effect_count_once_and_are_named() {
    let ablations = "ablations:
  keys: {repeat: {valid.seed: [2, 2]}}
  bytes: {repeat: {train.learn.sleep: [10, 11, 12]}}
";
    let project = Project::new(&PROMPTKD.replace("ablations:\n", ablations));
    for ablation in ["keys", "bytes"] {
        let ran = project
            .run(&format!("run FILE --ablation {ablation}"))
            .expect(0, &["`base`: some of its repeats are none, for `score` has the same result in them"]);
        assert!(!ran.stdout.contains('±'), "{}", ran.stdout);
    }
}

#[test]
fn a_store_that_cannot_be_written_serves_what_it_holds() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &["done: 7 ran"]);
    let runs = || fs::read_dir(project.path(".pipeline/runs")).unwrap().count();
    let before = runs();
    // A superuser may write anywhere, and becomes nobody for this.
    let is_superuser = rustix::process::getuid().is_root();
    let folder = project.path("");
    assert!(std::process::Command::new("chmod").args(["-R", "a-w,a+rX"]).arg(&folder).status().unwrap().success());
    let as_reader = |arguments: &str| {
        let mut command = project.command(arguments);
        if is_superuser {
            std::os::unix::process::CommandExt::uid(&mut command, 65534);
        }
        crate::harness::Ran::new(command.output().unwrap())
    };
    as_reader("run FILE").expect(0, &["done: 0 ran, 7 reused", "base"]);
    as_reader("plan FILE --check").expect(0, &["cached"]);
    as_reader("show FILE score").expect(0, &["score = "]);
    as_reader("compare FILE --variant base").expect(0, &["base"]);
    as_reader("run FILE --variant slow").expect(4, &["stage `train", "has to run, and the store", "cannot be written"]);
    assert_eq!(runs(), before);
    assert!(std::process::Command::new("chmod").args(["-R", "u+w"]).arg(&folder).status().unwrap().success());
}
