//! What is known beforehand is said beforehand: at `check`, or as soon as the data is there, and never after hours of training.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::harness::{Project, Ran};

/// A method in small: given text for the teacher, written text for student and prompt, given text to evaluate on.
const METHOD: &str = r#"
version: 1
stages:
  corpus: {kind: download, with: {source: {train: rows.jsonl, valid: rows.jsonl, test: rows.jsonl}}}
  tokenizer: {kind: train-tokenizer, in: {corpus: corpus}, with: {vocab_size: 257, template: none}}
  data: {kind: tokenize, in: {corpus: corpus, tokenizer: tokenizer}, with: {template: none, max_length: 400, max_prompt_length: 300}}
  teacher:
    kind: finetune
    in: {data: data.train}
    with: {init: {architecture: gpt2, layers: 1, width: 8, heads: 2, positions: 64}, take: 2, rounds: 1, learning_rate: 1e-3}
  student0:
    kind: finetune
    in: {data: data.train}
    with: {init: {architecture: llama, layers: 1, width: 8, heads: 2, positions: 64}, take: 2, rounds: 1, learning_rate: 1e-3}
  prompt0: {kind: prompt-init, in: {model: teacher}, with: {length: 4, from: end}}
  train:
    loop:
      windows: {batch: {of: data.train, take: 2, epochs: 2}}
      carry:
        student: {from: student0, next: learn.model}
        prompt: {from: prompt0, next: tune.prompt}
      stages:
        respond: {kind: student-generate, in: {model: carry.student, data: windows.batch}, with: {max_new_tokens: 8}}
        tune: {kind: prompt-tune, in: {teacher: teacher, student: carry.student, prompt: carry.prompt, data: respond}, with: {learning_rate: 1e-3}}
        learn: {kind: distill, in: {student: carry.student, teacher: teacher, prompt: tune.prompt, data: respond}, with: {divergence: reverse-kl, learning_rate: 1e-3}}
  score: {kind: evaluate, in: {model: train.student, teacher: teacher, data: data.test}, with: {metrics: [rouge_l, loss, reverse_kl], max_new_tokens: 8, seeds: [1]}}
"#;

/// Rows whose instructions have these many letters; each letter is a token.
fn rows(lengths: &[usize]) -> String {
    let row = |length: &usize| {
        format!("{{\"instruction\": \"{}\", \"output\": \"yes\"}}\n", "ab".repeat(300).get(..*length).unwrap())
    };
    lengths.iter().map(row).collect()
}

fn project(lengths: &[usize]) -> Project {
    let project = Project::with_program(METHOD, env!("CARGO_BIN_EXE_pipeline"));
    project.write("rows.jsonl", &rows(lengths));
    project
}

/// No stage that was started has failed: what cannot work was known before.
fn nothing_failed_late(ran: &Ran) -> bool {
    let known = ["positions", "no room for", "rows are taken a round"];
    let failed = ran.stderr.lines().filter(|line| line.starts_with("failed "));
    failed.into_iter().all(|line| known.iter().any(|words| line.contains(words)) && !line.contains(", round "))
}

#[test]
fn no_length_ends_a_stage_that_was_started() {
    let lengths = prop::collection::vec(1usize..60, 4..8);
    let sizes = (40u64..110, 40u64..110, 1u64..45, 1u64..40, 1u64..9);
    let mut runner = TestRunner::new(Config { cases: 24, ..Config::default() });
    runner
        .run(&(lengths, sizes), |(lengths, (teacher, student, vectors, new, take))| {
            let project = project(&lengths);
            let ran = project.run(&format!(
                "run FILE --set teacher.init.positions={teacher} --set student0.init.positions={student} \
                 --set prompt0.length={vectors} --set train.respond.max_new_tokens={new} \
                 --set train.windows.batch.take={take}"
            ));
            prop_assert!(nothing_failed_late(&ran), "{}", ran.stderr);
            // What is refused beforehand could not have worked.
            let longest = *lengths.iter().max().unwrap() as u64;
            let fits =
                longest + 5 <= teacher.min(student) + 1 && longest + vectors <= teacher && take <= lengths.len() as u64;
            prop_assert_eq!(ran.status == Some(0), fits, "{}", ran.stderr);
            Ok(())
        })
        .unwrap();
}

#[test]
fn answers_end_where_those_who_read_them_have_no_more_room() {
    let project = project(&[10, 20, 30, 20]);
    let flags = "--set prompt0.length=30 --set train.respond.max_new_tokens=20";
    project.run(&format!("run FILE {flags}")).expect(
        0,
        &[
            "`respond`: answers to long prompts end before `max_new_tokens: 20`: who reads them takes 35 tokens",
            "row 3 of `train`",
        ],
    );
}

#[test]
fn a_row_is_named_as_people_know_it_before_anything_is_trained() {
    let project = project(&[10, 80, 5]);
    let ran = project
        .run("run FILE --jobs 1")
        .expect(1, &["failed   teacher", "the prompt of row 2 of `train` has 80 tokens", "64 positions", "(p.yaml:6:"]);
    assert_eq!(
        ran.words(),
        [
            "ran corpus",
            "ran tokenizer",
            "ran data",
            "failed teacher",
            "skipped prompt0",
            "skipped train",
            "skipped score",
            "failed student0"
        ]
    );
}

#[test]
fn sizes_are_judged_before_anything_is_made() {
    let project = project(&[10, 10]);
    for (setting, said) in [
        ("teacher.init.width=1000000", "`teacher`: it needs"),
        (r#"teacher.init={"architecture":"gpt2","layers":4096,"width":65536}"#, "of memory or more"),
        (r#"teacher.init={"architecture":"llama","layers":4096,"width":1000000,"positions":64}"#, "of memory or more"),
        ("prompt0.length=10000000", "leaves no room for text in the 64 positions"),
    ] {
        for command in ["check", "plan", "run"] {
            project.run(&format!("{command} FILE --set {setting}")).expect(2, &[said, "--set:1:"]);
        }
    }
    project.run("check FILE --set tokenizer.vocab_size=10000000").expect(0, &["ok: "]);
    project.run("run FILE --set tokenizer.vocab_size=10000000 tokenizer").expect(0, &["done: 2 ran"]);
}

#[test]
fn settings_that_cannot_work_or_do_nothing_are_said_at_check() {
    let project = project(&[10, 10, 10]);
    project
        .run("check FILE --device cpu --set train.learn.dtype=bf16")
        .expect(2, &["`train.learn`: `dtype: bf16` needs a GPU"]);
    let builtin = METHOD.replace(
        "{source: {train: rows.jsonl, valid: rows.jsonl, test: rows.jsonl}}",
        "{source: builtin:instruct, rows: 20}",
    );
    project.write("b.yaml", &builtin);
    project
        .run("check b.yaml --set train.windows.batch.take=21")
        .expect(2, &["`train.windows.batch`: 21 rows are taken a round"]);
    project
        .run("check b.yaml --set train.windows.batch.rows=9999")
        .expect(0, &["`rows` asks for 9999 rows", "at most 20"]);
    project.run("check b.yaml --set score.rows=9999").expect(0, &["`score`: `rows` asks for 9999 rows", "has 400"]);
    project.run("check b.yaml --set corpus.rows=0").expect(2, &["`rows` must be from 1 to"]);
    project.run("check b.yaml --set corpus.limit.train=0").expect(2, &["`tokenizer`: the corpus has no training rows"]);
    project
        .run("check b.yaml --set corpus.rows=10000000000")
        .expect(2, &["`rows` must be from 1 to 2147483648, got `10000000000`"]);
    let given = "--set train.windows.batch.order=given";
    project.run(&format!("run FILE {given}")).expect(0, &["the last 1 of 3 rows are in no round"]);
}
