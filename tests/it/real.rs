//! The real stages behind the real command line: PromptKD in miniature, and what may happen to it. Plus the shipped
//! pipelines as far as they can be judged without running them, and the examples.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use cache::{Artifact, Digest, FileEntry, Key, Store};
use contract::Conventions;
use contract::random::{below, philox};
use promptkd::graph::{Entry, Operator, Subgraph};
use promptkd::plan::key::{self, InputDigests, SourcePart};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Map, Value as Json, json};

use crate::harness::{Project, Ran, children, example, is_alive, shipped_pipelines, wait_until};

/// The whole method with the smallest models, nine stages.
const TINY: &str = include_str!("../fixtures/tiny.yaml");

/// What of [`TINY`] follows from its loop.
const AFTER_TRAIN: [&str; 3] = ["ran release", "ran score", "ran train"];

fn project(pipeline: &str) -> Project {
    Project::with_program(pipeline, env!("CARGO_BIN_EXE_pipeline"))
}

/// Digests of [`TINY`] on one thread when nobody disturbs it.
fn undisturbed() -> &'static [String] {
    static DIGESTS: OnceLock<Vec<String>> = OnceLock::new();
    DIGESTS.get_or_init(|| {
        let project = project(TINY);
        project.run("run FILE --threads 1").expect(0, &["done: 9 ran, 0 reused", "ROUGE-L", "reverse KL"]);
        project.digests("")
    })
}

/// The store of a project.
fn store(project: &Project, name: &str) -> Store {
    Store::open(&project.path(name)).unwrap()
}

fn assert_nothing_is_half_done(project: &Project) {
    assert_eq!(fs::read_dir(project.path(".pipeline/work")).unwrap().count(), 0);
    project.run("cache verify").expect(0, &[": 0 damaged"]);
}

// ---- the shipped pipelines and the catalogue

/// Names of a top-level section of a pipeline file.
fn names_in(section: &str, text: &str) -> Vec<String> {
    let lines = text.lines().skip_while(|line| *line != format!("{section}:")).skip(1);
    let inside = lines.take_while(|line| line.is_empty() || line.starts_with([' ', '#']));
    let names = inside.filter_map(|line| line.strip_prefix("  ")?.split_once(':').map(|(name, _)| name.to_owned()));
    names.filter(|name| !name.starts_with([' ', '#'])).collect()
}

#[test]
fn every_shipped_pipeline_is_right_in_every_profile_and_ablation() {
    let project = project("");
    let mut checked = 0;
    for path in shipped_pipelines() {
        let file = path.display();
        let names =
            |section: &str| with_included(&path).iter().flat_map(|text| names_in(section, text)).collect::<Vec<_>>();
        let profiles = names("profiles").into_iter().map(|name| format!("--all --profile {name}"));
        let ablations = names("ablations").into_iter().map(|name| format!("--ablation {name}"));
        for flags in ["--all".to_owned()].into_iter().chain(profiles).chain(ablations) {
            project.check_without_files(&format!("{file} {flags}"));
            checked += 1;
        }
    }
    assert!(checked > 60, "only {checked} selections were found");
}

/// The text of a pipeline and of the files that it includes.
fn with_included(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let includes = text.lines().skip_while(|line| !line.starts_with("include:"));
    let includes = includes.take_while(|line| line.starts_with("include:") || line.starts_with("  - "));
    let names = includes
        .flat_map(|line| line.trim_start_matches("include:").trim_start_matches("  -").split([' ', ',', '[', ']']));
    let beside =
        names.filter(|name| !name.is_empty()).map(|name| path.with_file_name(name)).filter(|path| path.is_file());
    let below: Vec<String> = beside.flat_map(|path| with_included(&path)).collect();
    [vec![text], below].concat()
}

/// The batch of each method is that of its recipe, whatever is done to the rest of the pipeline, or nothing runs.
#[test]
fn a_recipe_with_another_effective_batch_is_refused_before_anything_runs() {
    let project = project("");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/paper/cpu-gpt2.yaml").display().to_string();
    for (variant, setting, fields) in [
        ("base", "params.promptkd_take=16", 2),
        ("rkl", "train.windows.batch.take=64", 1),
        ("kd", "params.sft_take=32", 1),
        ("sft", "train.windows.batch.last=short", 0),
        ("minillm", "params.minillm_take=8", 1),
    ] {
        let ran = project.run(&format!("check {file} --variant {variant} --set {setting}"));
        let found = ran.stderr.matches("`effective_batch` says that an update has").count();
        // Whether a round may be short is known once the rows are.
        assert_eq!(found, fields, "{variant}: {}", ran.stderr);
    }
}

#[test]
fn every_kind_is_listed_and_described() {
    let project = project("");
    let listed = project.run("stages").expect(0, &[]).stdout;
    let names: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let registry = stages::registry();
    assert!(names.iter().copied().eq(registry.kinds().map(|kind| kind.about().name)), "{names:?}");
    for kind in registry.kinds() {
        let about = kind.about();
        let said = [about.summary, "\noutputs\n", "\nfields of `with`\n", "\nexample\n"];
        project.run(&format!("stages {}", about.name)).expect(0, &said);
    }
}

// ---- what runs again and what does not

#[test]
fn a_second_run_reuses_everything() {
    let project = project(TINY);
    let first = project.run("run FILE").expect(0, &["done: 9 ran, 0 reused"]);
    let second = project.run("run FILE").expect(0, &["done: 0 ran, 9 reused"]);
    assert_eq!(first.stdout, second.stdout);
    assert_eq!(project.digests(""), undisturbed());
}

#[test]
fn threads_jobs_and_unrolling_change_no_bit() {
    for arguments in ["--threads 2", "--threads 3 --jobs 2 --cut-every 0", "--threads 2 --unroll"] {
        let project = project(TINY);
        project.run(&format!("run FILE {arguments}")).expect(0, &["done: 9 ran"]);
        assert_eq!(project.digests(""), undisturbed(), "{arguments}");
    }
}

#[test]
fn llamas_go_the_same_way_and_unrolling_changes_no_bit() {
    let llamas = TINY.replace("architecture: gpt2,", "architecture: llama, kv_heads: 1,");
    let [at_once, unrolled] = ["--threads 1", "--threads 3 --unroll"].map(|arguments| {
        let project = project(&llamas);
        project.run(&format!("run FILE {arguments}")).expect(0, &["done: 9 ran", "ROUGE-L"]);
        project.run("export FILE train.student --to student").expect(0, &[]);
        let config = fs::read_to_string(project.path("student/config.json")).unwrap();
        assert!(
            config.contains("\"model_type\": \"llama\"") && config.contains("\"num_key_value_heads\": 1"),
            "{config}"
        );
        project.digests("")
    });
    assert_eq!(at_once, unrolled);
    assert_ne!(at_once, undisturbed());
}

#[test]
fn a_change_inside_the_loop_runs_the_loop_and_what_follows() {
    let project = project(TINY);
    project.run("run FILE").expect(0, &[]);
    let ran = project.run("run FILE --set train.learn.learning_rate=4e-3").expect(0, &["done: 3 ran, 6 reused"]);
    let mut words = ran.words();
    words.retain(|word| word.starts_with("ran "));
    words.sort();
    assert_eq!(words, AFTER_TRAIN);
    // And back again.
    project.run("run FILE").expect(0, &["done: 0 ran, 9 reused"]);
    project
        .run("plan FILE --set train.learn.learning_rate=3e-3")
        .expect(0, &["run                 train      learn.learning_rate: ", "-> 0.003"]);
}

#[test]
fn names_comments_order_and_memory_settings_run_nothing_again() {
    let project = project(TINY);
    project.run("run FILE").expect(0, &[]);
    let memory = "--set train.learn.activation_checkpointing=true --set train.tune.activation_checkpointing=true \
                  --set train.respond.batch=3 --set train.check.batch=2 --set score.batch=1";
    project.run(&format!("plan FILE --check {memory}")).expect(0, &["cached"]);
    // Smaller parts of a batch are added up in another order: another result, by a few bits.
    for part in ["teacher", "train.learn", "train.tune"] {
        project.run(&format!("plan FILE --check --set {part}.micro_batch=2")).expect(3, &["micro_batch"]);
    }

    let edits = [
        ("version: 1\n", "# The same, in other words.\nversion: 1\n"),
        ("  corpus: {kind", "  text: {kind"),
        ("{corpus: corpus}", "{corpus: text}"),
        ("{corpus: corpus, tokenizer: tokenizer}", "{tokenizer: tokenizer, corpus: text}"),
        ("rows: 60, limit: {valid: 4, test: 6}", "limit: {test: 6, valid: 4}, rows: 60  "),
        ("        respond:", "        answer:"),
        ("data: respond", "data: answer"),
        ("        check:", "        look:"),
        ("best: check.loss", "best: look.loss"),
        ("student: {from: student0", "pupil: {from: student0"),
        ("carry.student", "carry.pupil"),
        ("keep_with: student", "keep_with: pupil"),
        ("train.student", "train.pupil"),
        ("learning_rate: 5e-3", "learning_rate: 0.005, weight: 1, seed: 0"),
        ("windows.batch", "windows.part"),
        ("        batch: {of", "        part: {of"),
    ];
    let disguised = edits.iter().fold(TINY.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "`{old}` is not in the pipeline");
        text.replace(old, new)
    });
    let (stages, report) = disguised.split_once("\nreport:").unwrap();
    let (start, score) = stages.split_once("  score:").unwrap();
    let (head, body) = start.split_once("stages:\n").unwrap();
    project.write("p.yaml", &format!("report:{report}\n{head}stages:\n  score:{score}\n{body}"));
    let plan = project.run("plan FILE --check").expect(0, &["text", "cached"]);
    assert_eq!(plan.stdout.lines().filter(|line| line.starts_with("cached")).count(), 9, "{}", plan.stdout);
}

// ---- a teacher that never runs twice

/// What [`TINY`] gains by this: KD on the given answers, with the teacher and with a cache of it.
const CACHED: &str = "
variants:
  kd:
    remove: [prompt0, train.carry.prompt, train.tune, train.learn.in.prompt, train.respond, release]
    rebind: {train.learn.in.data: windows.batch}
    set: {train.learn.divergence: forward-kl, train.learn.weight: 0.5, train.learn.cross_entropy: 0.5}
  cached:
    extends: [kd]
    remove: [train.learn.in.teacher]
    stages: {said: {kind: teacher-cache, in: {teacher: teacher, data: data.train}, with: {rows: 24}}}
    rebind: {train.learn.in.cache: said}
  likeliest:
    extends: [cached]
    set: {said.keep: {top_k: 5}}
ablations:
  students:
    variants: [cached]
    over: {train.learn.learning_rate: [1e-3, 2e-3, 4e-3], train.learn.divergence: [forward-kl, reverse-kl]}
";

fn with_cache() -> Project {
    project(&format!("{TINY}{CACHED}"))
}

#[test]
fn a_student_of_a_cached_teacher_has_the_same_bits() {
    let project = with_cache();
    let student = |arguments: &str| {
        let shown = project.show(arguments);
        shown["stages"]["train"]["outputs"]["student"]["digest"].as_str().unwrap().to_owned()
    };
    let micro_batches = "--set train.learn.micro_batch=3";
    for (store, set, how) in [("a", "", ""), ("b", micro_batches, "--threads 3"), ("c", "", "--unroll")] {
        let plain = format!("--variant kd {set} --store {store}");
        project.run(&format!("run FILE {plain} {how}")).expect(0, &["ran      train"]);
        let cached = format!("--variant cached {set} --set said.batch=5 --store {store}");
        project.run(&format!("run FILE {cached} {how}")).expect(0, &["ran      said", "ran      train"]);
        assert_eq!(student(&cached), student(&plain), "{set} {how}");
    }
}

#[test]
fn settings_of_the_student_share_one_cache_and_a_second_run_computes_nothing() {
    let project = with_cache();
    // Six students and their scores; what stands before the loop is computed once.
    let ran = project.run("run FILE --ablation students").expect(0, &["done: 18 ran, 0 reused"]);
    let counted = |word: &str| ran.words().iter().filter(|said| said.as_str() == word).count();
    assert_eq!(["ran said", "ran teacher", "ran train", "ran score"].map(counted), [1, 1, 6, 6]);
    project.run("plan FILE --ablation students --check").expect(0, &["cached"]);
    project.run("run FILE --ablation students").expect(0, &["done: 0 ran, 18 reused"]);
    // Another way of keeping is another cache, and needs no teacher.
    let ran = project.run("run FILE --variant likeliest").expect(0, &["ran      said", "done: 3 ran, 5 reused"]);
    assert!(ran.words().contains(&"reused teacher".to_owned()), "{:?}", ran.words());
}

#[test]
fn a_cache_that_does_not_fit_the_text_says_what_to_do() {
    let project = with_cache();
    project.run("run FILE --variant cached --set said.rows=20").expect(
        1,
        &["failed   train", "is not in the teacher cache, which holds 20 rows", "`rows` of `teacher-cache`"],
    );
    let written = "  written:
    extends: [cached]
    stages: {train.respond: {kind: student-generate, in: {model: carry.student, data: windows.batch}, with: {max_new_tokens: 8}}}
    rebind: {train.learn.in.data: respond}
ablations:";
    project.write("p.yaml", &format!("{TINY}{CACHED}").replace("ablations:", written));
    project
        .run("run FILE --variant written")
        .expect(1, &["failed   train", "is not the one in the teacher cache, ", "a cache is of one fixed text"]);
    let alone = "  alone:
    extends: [likeliest]
    remove: [train.learn.in.cache]
ablations:";
    project.write("p.yaml", &format!("{TINY}{CACHED}").replace("ablations:", alone));
    project
        .run("check FILE --variant alone")
        .expect(2, &["`train.learn` needs one of its inputs `teacher`, `cache`", "removed by variant"]);
}

// ---- death

fn kill(pid: u32) {
    // It may have ended by itself.
    let _ = kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL);
}

/// Starts a run and waits until the loop `train` has kept its first cut. The rest of its events is still to be read.
fn start_until_cut(project: &Project, arguments: &str) -> (Child, impl Iterator<Item = Json> + use<>) {
    let mut running = project.start(&format!("run FILE --json {arguments}"));
    let lines = BufReader::new(running.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut events = lines.map(|line| serde_json::from_str::<Json>(&line).unwrap());
    let cut = events.find(|event| event["event"] == "stage_cut" && event["stage"] == "train");
    assert!(cut.is_some(), "the loop was never cut");
    (running, events)
}

#[test]
fn a_killed_coordinator_takes_its_worker_along_and_costs_no_bit() {
    for arguments in ["--cut-every 0", "--cut-every 0 --unroll"] {
        let project = project(TINY);
        let (mut running, _events) = start_until_cut(&project, arguments);
        let workers = children(running.id());
        kill(running.id());
        running.wait().unwrap();
        wait_until("no worker outlives its coordinator", || workers.iter().all(|worker| !is_alive(*worker)));
        project.run("run FILE").expect(0, &["resumed  train", "reused   teacher"]);
        assert_eq!(project.digests(""), undisturbed(), "{arguments}");
        assert_nothing_is_half_done(&project);
    }
}

#[test]
fn a_killed_worker_fails_its_stage_and_costs_no_bit() {
    let project = project(TINY);
    let (mut running, events) = start_until_cut(&project, "--cut-every 0");
    children(running.id()).into_iter().for_each(kill);
    let events: Vec<Json> = events.collect();
    assert_eq!(running.wait().unwrap().code(), Some(1));
    let failed = events.iter().find(|event| event["event"] == "stage_failed").unwrap();
    assert_eq!(failed["stage"], "train");
    assert!(failed["error"].as_str().unwrap().contains("killed"), "{failed}");
    project.run("run FILE").expect(0, &["resumed  train"]);
    assert_eq!(project.digests(""), undisturbed());
    assert_nothing_is_half_done(&project);
}

#[test]
fn a_run_killed_at_random_moments_ends_with_the_same_bits() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = now.as_nanos() as u64;
    let project = project(TINY);
    for attempt in 0..12 {
        let mut running = project.start("run FILE --cut-every 0 --threads 2");
        let [high, low, ..] = philox(seed, [attempt, 0, 0, 0]);
        std::thread::sleep(Duration::from_millis(below(high, low, 150)));
        let workers = children(running.id());
        match attempt % 3 {
            0 => workers.iter().copied().for_each(kill),
            _ => kill(running.id()),
        }
        running.wait().unwrap();
        wait_until("no worker outlives its coordinator", || workers.iter().all(|worker| !is_alive(*worker)));
    }
    project.run("run FILE").expect(0, &["done"]);
    assert_eq!(project.digests(""), undisturbed(), "moments drawn from seed {seed}");
    assert_nothing_is_half_done(&project);
}

// ---- two at a time

#[test]
fn two_runs_at_once_share_the_work() {
    let project = project(TINY);
    let both = [project.start("run FILE --json"), project.start("run FILE --json")];
    let mut ran = Vec::new();
    for running in both {
        let events = Ran::new(running.wait_with_output().unwrap()).expect(0, &[]).events();
        let finished = events.iter().filter(|event| event["event"] == "stage_finished");
        ran.extend(finished.map(|event| event["key"].as_str().unwrap().to_owned()));
    }
    let distinct: BTreeSet<&String> = ran.iter().collect();
    assert_eq!((ran.len(), distinct.len()), (9, 9), "each key runs once");
    assert_eq!(project.digests(""), undisturbed());
}

// ---- damage

/// The blob of the largest file of a stage's first output.
fn blob(project: &Project, stage: &str) -> PathBuf {
    let key: Key = project.show("")["stages"][stage]["key"].as_str().unwrap().parse().unwrap();
    let record = store(project, ".pipeline").lookup(&key).unwrap().hit().unwrap();
    let artifact = record.outputs.into_values().next().unwrap();
    let digest = artifact.files.into_iter().max_by_key(|file| file.bytes).unwrap().digest.to_string();
    project.path(&format!(".pipeline/cas/{}/{}", &digest[..2], &digest[2..]))
}

/// Flips a bit in the middle of a file.
fn flip(path: &Path) {
    let permissions = fs::metadata(path).unwrap().permissions();
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, permissions).unwrap();
}

#[test]
fn a_flipped_bit_in_the_store_is_computed_again_and_nothing_else() {
    for stage in ["tokenizer", "data", "teacher", "train", "score"] {
        let project = project(TINY);
        project.run("run FILE").expect(0, &[]);
        flip(&blob(&project, stage));
        project.run("run FILE").expect(0, &[&format!("ran      {stage}"), "done: 1 ran, 8 reused"]);
        assert_eq!(project.digests(""), undisturbed(), "{stage}");
        assert_nothing_is_half_done(&project);
    }
}

#[test]
fn a_bit_that_rots_without_a_trace_is_found_by_verifying() {
    let project = project(TINY);
    project.run("run FILE").expect(0, &[]);
    let path = blob(&project, "teacher");
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    flip(&path);
    File::open(&path).unwrap().set_modified(time).unwrap();
    project.run("cache verify").expect(4, &["removed file `cas/", " damaged"]);
    project.run("run FILE").expect(0, &["ran      teacher", "done: 1 ran, 8 reused"]);
    assert_eq!(project.digests(""), undisturbed());
    assert_nothing_is_half_done(&project);
}

// ---- what cannot be read

/// A pipeline that brings in a corpus from a file.
fn reading(path: &str) -> String {
    format!("version: 1\nname: reading\nstages:\n  corpus: {{kind: download, with: {{source: {path}}}}}\n")
}

#[test]
fn sources_that_cannot_be_read_are_named() {
    let project = project("");
    std::os::unix::fs::symlink("gone", project.path("dangling.jsonl")).unwrap();
    let _socket = UnixListener::bind(project.path("socket.jsonl")).unwrap();
    project.write("rows.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": \"c\", \"answ\n");
    project.write("fields.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": \"c\"}\n");
    for path in ["nowhere.jsonl", "dangling.jsonl"] {
        project.write("p.yaml", &reading(path));
        project.run("run FILE").expect(2, &[&format!("error: `corpus`: there is no file `{path}`"), "p.yaml:4:43"]);
    }
    for (path, said) in [
        ("socket.jsonl", "`socket.jsonl` is neither a plain file nor a folder"),
        ("rows.jsonl", "`rows.jsonl:2` is not JSON"),
        ("fields.jsonl", "`fields.jsonl:2` has no `output`"),
    ] {
        project.write("p.yaml", &reading(path));
        project.run("run FILE").expect(1, &["failed   corpus", "error: stage `corpus` failed", said]);
        assert_eq!(store(&project, ".pipeline").keys().unwrap(), [], "{path}");
    }
    project.write("rows.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n");
    project.write("p.yaml", &reading("rows.jsonl"));
    project.run("run FILE").expect(0, &["done: 1 ran"]);
}

#[test]
fn a_checkpoint_that_was_cut_short_is_named_and_not_published() {
    let project = project(TINY);
    project.run("run FILE teacher").expect(0, &[]);
    project.run("export FILE teacher --to checkpoint").expect(0, &[]);
    let weights = project.path("checkpoint/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    project.write(
        "p.yaml",
        "
version: 1
name: checkpoint
stages:
  teacher: {kind: download, with: {model: checkpoint}}
  prompt: {kind: prompt-init, in: {model: teacher}, with: {length: 2, from: end}}
",
    );
    for length in [whole.len() - 100, 40, 0] {
        fs::write(&weights, &whole[..length]).unwrap();
        project
            .run("run FILE --store other")
            .expect(2, &["`teacher`: `checkpoint/model.safetensors` is not a whole safetensors file", "get it again"]);
        assert!(!project.path("other").exists() || store(&project, "other").keys().unwrap().is_empty());
    }
    fs::write(&weights, &whole).unwrap();
    project.run("run FILE --store other").expect(0, &["done: 2 ran"]);
}

#[test]
fn a_student_can_begin_as_some_layers_of_its_teacher() {
    let project = project(TINY);
    project.write(
        "cut.yaml",
        "
version: 1
name: cut
include: p.yaml
stages:
  deep: {kind: finetune, in: {data: data.train}, with: {init: {architecture: llama, layers: 3, width: 16, positions: 224}, take: 12, rounds: 1, learning_rate: 1e-2}}
  short: {kind: cut-layers, in: {model: deep}, with: {keep: {layers: [0, 2]}}}
  student: {kind: distill, in: {student: short, teacher: deep, data: data.train}, with: {divergence: forward-kl, take: 12, rounds: 1, learning_rate: 1e-3}}
",
    );
    project.run("run cut.yaml student").expect(0, &["done: 6 ran"]);
    project
        .run("run cut.yaml short --set short.keep.layers=[3]")
        .expect(2, &["`keep` asks for layer 3 and the model has 3 layers, counted from 0: ask for fewer"]);
}

// ---- what is trained of a model

/// What [`TINY`] gains by this: an adapter of the student is trained, over the student, which stays as it is.
const ADAPTED: &str = "
variants:
  lora:
    set: {train.learn.lora: {rank: 2, alpha: 4, dropout: 0.1}, train.learn.learning_rate: 0.02}
  merged:
    extends: [lora]
    stages: {whole: {kind: merge, in: {model: train.student}}}
    rebind: {score.in.model: whole, release.in.model: whole}
";

#[test]
fn an_adapter_is_trained_and_cut_anywhere_it_has_the_same_bits() {
    let text = format!("{TINY}{ADAPTED}");
    let [at_once, unrolled] = ["--threads 1", "--threads 2 --unroll"].map(|arguments| {
        let project = project(&text);
        project.run(&format!("run FILE --variant lora {arguments}")).expect(0, &["done: 9 ran", "ROUGE-L"]);
        let digests = project.digests("--variant lora");
        project.run("export FILE train.student --variant lora --to student").expect(0, &[]);
        // Weights of the student's own are those that it began with: the same blob.
        project.run("export FILE student0 --variant lora --to before").expect(0, &[]);
        let [before, after] =
            ["before", "student"].map(|to| fs::read(project.path(to).join("model.safetensors")).unwrap());
        assert!(before == after);
        let adapter = fs::read_to_string(project.path("student/adapter/adapter_config.json")).unwrap();
        assert!(adapter.contains("\"r\": 2") && adapter.contains("\"lora_dropout\": 0.1"), "{adapter}");
        // In one piece it answers alike.
        project.run("run FILE --variant merged").expect(0, &["done: 3 ran, 7 reused"]);
        // What was exported comes in again: with its adapter, or the adapter by itself.
        project.write(
            "again.yaml",
            "
version: 1
name: again
include: p.yaml
stages:
  whole: {kind: download, with: {model: student}}
  part: {kind: download, with: {adapter: student/adapter}}
  plain: {kind: download, with: {model: before}}
  joined: {kind: adapt, in: {model: plain, adapter: part}}
  of-whole: {kind: evaluate, in: {model: whole, data: data.test}, with: {metrics: [loss]}}
  of-joined: {kind: evaluate, in: {model: joined, data: data.test}, with: {metrics: [loss]}}
  of-plain: {kind: evaluate, in: {model: plain, data: data.test}, with: {metrics: [loss]}}
",
        );
        // The two are the same bytes, so that the second is not measured again.
        project.run("run again.yaml of-whole of-joined of-plain").expect(0, &["done: 6 ran, 4 reused"]);
        let losses = ["of-whole", "of-joined", "of-plain"].map(|stage| {
            let shown = project.run(&format!("show again.yaml {stage} --json")).expect(0, &[]);
            let shown: Json = serde_json::from_str(&shown.stdout).unwrap();
            shown["stages"][stage]["metrics"]["loss"]["mean"].as_f64().unwrap()
        });
        assert!(losses[0] == losses[1] && losses[0] != losses[2], "{losses:?}");
        let scores = ["lora", "merged"].map(|variant| {
            let shown = project.run(&format!("show FILE score --variant {variant} --json")).expect(0, &[]);
            let shown: Json = serde_json::from_str(&shown.stdout).unwrap();
            shown["stages"]["score"]["metrics"]["rouge_l"]["mean"].as_f64().unwrap()
        });
        assert!((scores[0] - scores[1]).abs() < 1e-9, "{scores:?}");
        digests
    });
    assert_eq!(at_once, unrolled);
}

#[test]
fn an_adapter_that_is_there_is_not_trained_away_in_silence() {
    let project = project(&format!(
        "{TINY}{ADAPTED}
  again:
    extends: [lora]
    stages:
      more: {{kind: finetune, in: {{data: data.train, model: train.student}}, with: {{take: 8, rounds: 2, learning_rate: 1e-3}}}}
"
    ));
    project
        .run("run FILE more --variant again")
        .expect(1, &["the model has an adapter: give `lora` to go on with it, or merge the two first (kind `merge`)"]);
    project
        .run("run FILE more --variant again --set more.lora.rank=3")
        .expect(1, &["the model has an adapter of rank 2, alpha 4", "`lora` asks for another"]);
    project
        .run("run FILE more --variant again --set more.lora.rank=2 --set more.lora.alpha=4 --set more.lora.dropout=0.1")
        .expect(0, &["done: 1 ran"]);
    project
        .run("run FILE more --variant again --set train.learn.lora.targets=[q_proj]")
        .expect(1, &["`targets` names `q_proj`, which is no linear layer of the model: it has `c_attn`"]);
}

/// What [`TINY`] gains by this: MiniLLM, on responses in which the teacher has a say; GKD, half on-policy; SeqKD; DistiLLM with a
/// buffer of two rounds, and DistiLLM-2; two teachers by family; a loss on hidden states, with a learned projection.
const METHODS: &str = "
variants:
  minillm:
    remove: [prompt0, train.carry.prompt, train.tune, release]
    stages:
      train.learn:
        kind: policy-gradient
        in: {student: carry.student, teacher: teacher, data: respond, text: data.valid}
        with: {learning_rate: 5e-3, passes: 2, batch: 4}
    rebind: {train.respond.in.teacher: teacher}
  plain:
    remove: [prompt0, train.carry.prompt, train.tune, train.learn.in.prompt, release]
  gkd:
    extends: [plain]
    set: {train.respond.fraction: 0.5, train.learn.divergence: {jsd: {beta: 0.5}}}
  seqkd:
    remove: [prompt0, train, release]
    stages:
      taught: {kind: teacher-generate, in: {teacher: teacher, data: data.train}, with: {max_new_tokens: 8, samples: 2}}
      learnt: {kind: finetune, in: {data: taught, valid: data.valid, model: student0}, with: {take: 8, epochs: 1, learning_rate: 5e-3}}
    rebind: {score.in.model: learnt}
  distillm:
    extends: [plain]
    stages:
      start: {kind: evaluate, in: {model: student0, data: data.valid}, with: {metrics: [loss]}}
      train.respond:
        kind: mix
        in: {data: windows.batch, model: carry.student, scores: carry.scores}
        with: {threshold: 0.7, rise: 0.3, tolerance: 0, capacity: 16, max_new_tokens: 8, seed: 4}
    set:
      train.windows.batch.epochs: 3
      train.carry.scores: {from: start.metrics, next: check.metrics}
      train.learn.divergence: {skewed-forward-kl: {alpha: 0.1}}
  distillm-2:
    extends: [plain]
    rebind: {train.learn.in.data: windows.batch, train.learn.in.contrast: respond}
    set:
      train.learn.divergence: {skewed-forward-kl: {alpha: 0.1}}
      train.learn.contrast: {divergence: {skewed-reverse-kl: {alpha: 0.1}}}
      train.learn.micro_batch: 3
  routed:
    extends: [plain]
    stages:
      labelled: {kind: tokenize, in: {corpus: corpus, tokenizer: tokenizer}, with: {template: task, max_length: 160, keep_family: true}}
    remove: [train.learn.in.teacher]
    rebind:
      train.windows.batch.of: labelled.train
      train.learn.in.teachers.first: teacher
      train.learn.in.teachers.second: student0
    set: {train.learn.route: {read: second, animal: second, otherwise: first}}
  states:
    extends: [plain]
    set: {train.learn.hidden_states: {layers: [[0, 0]]}, train.learn.divergence: {adaptive-kl: {head: 0.5}}, train.learn.diagnostics: {top_k: 4}}
";

#[test]
fn other_methods_are_edits_of_the_graph_and_cut_anywhere_they_have_the_same_bits() {
    let text = format!("{TINY}{METHODS}");
    let later = [("distillm", 8), ("distillm-2", 7), ("routed", 8), ("states", 7)];
    for (variant, ran) in [("minillm", 7), ("gkd", 7), ("seqkd", 8)].into_iter().chain(later) {
        let [at_once, unrolled] = ["--threads 1", "--threads 2 --unroll"].map(|arguments| {
            let project = project(&text);
            let done = format!("done: {ran} ran");
            project.run(&format!("run FILE --variant {variant} {arguments}")).expect(0, &[&done, "ROUGE-L"]);
            project.digests(&format!("--variant {variant}"))
        });
        assert_eq!(at_once, unrolled, "{variant}");
    }
}

#[test]
fn a_replay_buffer_and_its_threshold_survive_kills() {
    let text = format!("{TINY}{METHODS}");
    let undisturbed = {
        let project = project(&text);
        project.run("run FILE --variant distillm --threads 1").expect(0, &["done: 8 ran"]);
        project.digests("--variant distillm")
    };
    let project = project(&text);
    // Killed after every cut, until nothing is left to be killed.
    let mut kills = 0;
    loop {
        let mut running = project.start("run FILE --variant distillm --json --cut-every 0 --threads 2");
        let lines = BufReader::new(running.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut events = lines.map(|line| serde_json::from_str::<Json>(&line).unwrap());
        if events.any(|event| event["event"] == "stage_cut" && event["stage"] == "train") {
            kill(running.id());
            kills += 1;
        }
        if running.wait().unwrap().success() {
            break;
        }
    }
    assert!(kills > 1, "the loop was cut {kills} times");
    assert_eq!(project.digests("--variant distillm"), undisturbed);
    assert_nothing_is_half_done(&project);
}

/// What [`TINY`] gains by this: the teacher is told how to answer, and writes what the student learns, which is not told.
const PRIMED: &str = "
variants:
  primed:
    remove: [prompt0, train, release]
    stages:
      told: {kind: tokenize, in: {corpus: corpus, tokenizer: tokenizer}, with: {template: task, max_length: 220, max_prompt_length: 200, prime: {before: 'As a teacher: '}}}
      taught: {kind: teacher-generate, in: {teacher: teacher, data: data.train, view: told.train}, with: {rows: 24, max_new_tokens: 8}}
      learnt: {kind: distill, in: {student: student0, teacher: teacher, view: told.train, data: taught}, with: {divergence: reverse-kl, take: 8, epochs: 1, learning_rate: 5e-3}}
    rebind: {score.in.model: learnt, score.in.view: told.test}
  cached:
    extends: [primed]
    remove: [learnt.in.teacher, learnt.in.view]
    stages: {said: {kind: teacher-cache, in: {teacher: teacher, view: told.train, data: taught}}}
    rebind: {learnt.in.cache: said}
  blind:
    extends: [primed]
    remove: [taught.in.view, learnt.in.view]
";

#[test]
fn a_primed_teacher_is_heard_by_a_student_that_is_not_told() {
    let project = project(&format!("{TINY}{PRIMED}"));
    project.run("run FILE --variant primed,cached,blind").expect(0, &["reverse KL"]);
    let digest = |variant: &str, stage: &str, port: &str| {
        let shown = project.run(&format!("show FILE {stage} --variant {variant} --json")).expect(0, &[]);
        let shown: Json = serde_json::from_str(&shown.stdout).unwrap();
        shown["stages"][stage]["outputs"][port]["digest"].as_str().unwrap().to_owned()
    };
    // From hidden states that were kept it learns the same bits; from a teacher that is not told, something else.
    assert_eq!(digest("primed", "learnt", "model"), digest("cached", "learnt", "model"));
    assert_ne!(digest("primed", "taught", "data"), digest("blind", "taught", "data"));
    assert_ne!(digest("primed", "learnt", "model"), digest("blind", "learnt", "model"));
    project
        .run("run FILE --variant primed --set told.max_prompt_length=45")
        .expect(1, &["`view` has no prompt for row ", "`max_prompt_length`"]);
}

// ---- a disk that takes no more

/// Runs `run p.yaml` where no file may grow beyond so many blocks of 512 bytes: to a program the same as a full disk.
fn run_with_little_disk(project: &Project, blocks: u32, arguments: &str) -> Ran {
    let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    let plain = project.command(&format!("run FILE {arguments}"));
    let mut command = Command::new("sh");
    command.args(["-c", &limited, "sh"]).arg(plain.get_program()).args(plain.get_args());
    command.current_dir(plain.get_current_dir().unwrap());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    Ran::new(command.stdin(Stdio::null()).output().unwrap())
}

#[test]
fn a_full_disk_fails_the_stage_and_leaves_nothing_behind() {
    let project = project(TINY);
    // The teacher's weights take 48 KiB; all that is made before takes less than 30.
    let ran = run_with_little_disk(&project, 60, "--cut-every 0");
    let ran = ran.expect(4, &["failed   teacher", "model.safetensors", "File too large", "skipped  train"]);
    assert!(ran.words().contains(&"ran data".to_owned()), "{:?}", ran.words());
    assert_nothing_is_half_done(&project);
    let records = store(&project, ".pipeline").keys().unwrap().len();
    project.run("run FILE").expect(0, &[&format!("done: {} ran, {records} reused", 9 - records)]);
    assert_eq!(project.digests(""), undisturbed());
}

#[test]
fn a_disk_that_takes_next_to_nothing_fails_the_run_and_the_next_one_goes_on() {
    // Nothing at all fails the store; with a little more it is a stage that fails first.
    for blocks in [0, 1, 4] {
        let project = project(TINY);
        run_with_little_disk(&project, blocks, "").expect(4, &["error: ", "File too large"]);
        project.run("run FILE").expect(0, &["done: "]);
        assert_eq!(project.digests(""), undisturbed(), "{blocks} blocks");
        assert_nothing_is_half_done(&project);
    }
}

// ---- keys

/// One small configuration of every kind.
fn samples() -> Vec<(&'static str, Conventions, Json)> {
    let sound = |kind, config| (kind, Conventions::Sound, config);
    let reference = |kind, config| (kind, Conventions::Reference, config);
    vec![
        sound("adapt", json!({})),
        sound("attention", json!({"rows": 60})),
        reference("attention", json!({})),
        sound("calibration", json!({})),
        reference("calibration", json!({})),
        sound(
            "command",
            json!({
                "run": ["cp", "{in.text}/train.jsonl", "{out.copy}"], "inputs": {"text": "corpus"},
                "outputs": {"copy": "dir"}, "env": {"LANG": "C"}, "secrets": ["TOKEN"],
            }),
        ),
        sound("cut-layers", json!({"keep": {"evenly": 6}})),
        sound("distill", json!({"divergence": "reverse-kl", "learning_rate": 5e-4, "micro_batch": 4})),
        reference("distill", json!({"divergence": "forward-kl", "learning_rate": 5e-4, "micro_batch": 4})),
        sound("download", json!({"source": "builtin:instruct"})),
        sound("evaluate", json!({"max_new_tokens": 48, "batch": 7})),
        reference("evaluate", json!({})),
        sound("export", json!({"dtype": "bf16"})),
        sound("exposure-bias", json!({"max_new_tokens": 48, "batch": 7})),
        reference("exposure-bias", json!({"max_new_tokens": 48})),
        sound("finetune", json!({"init": {"architecture": "gpt2", "layers": 2, "width": 32}, "learning_rate": 2e-3})),
        reference("finetune", json!({"learning_rate": 2e-3, "micro_batch": 4})),
        sound("merge", json!({})),
        sound("mix", json!({"max_new_tokens": 48, "batch": 7})),
        reference("mix", json!({"max_new_tokens": 48})),
        sound("policy-gradient", json!({"learning_rate": 5e-6, "batch": 64})),
        reference("policy-gradient", json!({"learning_rate": 5e-6, "padded_to": 256})),
        sound("prompt-init", json!({"length": 7, "text": "Suppose you are a student."})),
        sound("prompt-tune", json!({"learning_rate": 1e-3})),
        reference("prompt-tune", json!({"learning_rate": 1e-3})),
        sound("quantize", json!({"format": "q4_0", "batch": 4})),
        sound("student-generate", json!({"max_new_tokens": 48, "batch": 7})),
        reference("student-generate", json!({"max_new_tokens": 48})),
        sound("teacher-cache", json!({"keep": {"top_k": 8}, "batch": 4})),
        sound("teacher-generate", json!({"max_new_tokens": 48, "batch": 7})),
        reference("teacher-generate", json!({"max_new_tokens": 48})),
        sound("tokenize", json!({"template": "task", "max_length": 96})),
        reference("tokenize", json!({"documents": {"valid": 10000}})),
        sound("train-tokenizer", json!({"vocab_size": 1024})),
    ]
}

/// Changing this snapshot means that results computed before are not found any more, or worse, that they still are though
/// the program would now compute others: see what `key` says of defaults and versions.
#[test]
fn the_keys_of_every_kind_are_as_reviewed() {
    let registry = stages::registry();
    let mut preimages = Map::new();
    let mut sampled = BTreeSet::new();
    for (name, conventions, config) in samples() {
        let kind = registry.get(name).unwrap_or_else(|| panic!("there is no kind `{name}`"));
        let config = kind.resolve(&config, conventions).unwrap_or_else(|errors| panic!("`{name}`: {errors:?}"));
        let ports = kind.ports(&config);
        let inputs: InputDigests =
            ports.inputs.iter().map(|port| (Entry::Port(port.name.clone()), artifact(port))).collect();
        let operator = Operator { kind: name.into(), config, ports, places: BTreeMap::new() };
        let mut digest = |source: &contract::Source| {
            Ok(SourcePart::Content { content: Digest::of(source.at.to_string().as_bytes()) })
        };
        let action = key::action(&Subgraph::Operator(operator), &inputs, &registry, &mut digest).unwrap();
        let mut stage = action.preimage["stage"].clone();
        // Digests of inputs are the same for every kind.
        stage["inputs"] = stage["inputs"].as_object().unwrap().keys().cloned().collect();
        preimages.insert(format!("{name}, {}", json!(conventions).as_str().unwrap()), stage);
        sampled.insert(name);
    }
    let without: Vec<&str> =
        registry.kinds().map(|kind| kind.about().name).filter(|name| !sampled.contains(name)).collect();
    assert!(without.is_empty(), "kinds without a sample of their key in `samples`: {}", without.join(", "));
    insta::assert_snapshot!(serde_json::to_string_pretty(&preimages).unwrap());
}

fn artifact(port: &contract::Port) -> Artifact {
    let files = vec![FileEntry { path: "file".into(), digest: Digest::of(port.name.as_bytes()), bytes: 1 }];
    Artifact { digest: Digest::of_tree(&files), port_type: port.port_type.name().into(), bytes: 1, files }
}

// ---- examples

fn run_example(name: &str) -> String {
    Ran::new(Command::new(example(name)).output().unwrap()).expect(0, &[]).stdout
}

#[test]
fn the_example_of_the_store_computes_finds_explains_and_heals() {
    let printed = run_example("store");
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 4, "{printed}");
    assert_eq!(lines[0], "computed  longer than 3: no result is recorded for this key");
    assert_eq!(lines[1], "found     longer than 3");
    assert!(lines[2].ends_with("; `longer_than` was 3 and is 5"), "{printed}");
    assert!(lines[3].starts_with("computed  longer than 3: `count.txt` of output `count` is damaged: "), "{printed}");
}

#[test]
fn the_example_of_training_learns_its_sentences() {
    let printed = run_example("train_tiny");
    let losses: Vec<f64> = printed.lines().filter_map(|line| line.split_once("loss ")?.1.parse().ok()).collect();
    assert!(losses.len() >= 5 && losses[0] > 3.2 && losses[losses.len() - 1] < 0.05, "{printed}");
    assert!(printed.ends_with("small models run where large ones do not fit\n"), "{printed}");
    assert_eq!(printed.lines().filter(|line| !line.starts_with("update ")).count(), 4, "{printed}");
}

#[test]
fn the_example_of_a_stage_kind_runs_its_pipeline() {
    let project = Project::with_program("", example("custom_stage"));
    project.run("run shortest.yaml").expect(0, &["ran      short ", "done: 6 ran", "longest kept", "loss"]);
    project.run("run shortest.yaml").expect(0, &["done: 0 ran, 6 reused"]);
    project
        .run("stages shortest")
        .expect(0, &["keeps the rows with the shortest responses", "rows to choose from", "How many"]);
    project.run("check shortest.yaml --set short.rows=0").expect(2, &["expected 1 row or more, got 0"]);
}
