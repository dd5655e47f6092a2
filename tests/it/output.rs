//! Standard output that cannot be written: every command says so, and nothing that was computed is lost.

use std::process::Command;

use crate::harness::{Project, Ran};
use crate::runs::PROMPTKD;

/// The program in a shell, so that its standard output can be closed or full.
fn redirected(project: &Project, arguments: &str, to: &str) -> Ran {
    let program = project.command(arguments);
    let words = std::iter::once(program.get_program()).chain(program.get_args());
    let line: Vec<String> = words.map(|word| format!("'{}'", word.display())).collect();
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec {} {to}", line.join(" "))]).current_dir(project.path(""));
    Ran::new(shell.env_remove("PIPELINE_STORE").output().unwrap())
}

const TROUBLE: &str = "cannot write to standard output";

#[test]
fn nothing_is_written_to_an_output_that_is_full_or_closed_in_silence() {
    let project = Project::new(PROMPTKD);
    let commands = [
        "--help",
        "run --help",
        "--version",
        "run FILE --json",
        "run FILE",
        "compare FILE",
        "compare FILE --format json",
        "report FILE -o -",
        "plot FILE score.score",
        "watch --once --json",
        "track tensorboard FILE --to tracked",
        "plan FILE",
        "check FILE",
        "show FILE",
        "show FILE --json",
        "why FILE score",
        "graph FILE",
        "stages",
        "stages learn",
        "schema",
        "init shipped.yaml",
        "export FILE score --to out",
        "cache du",
        "cache verify",
    ];
    for to in ["> /dev/full", ">&-"] {
        for arguments in commands {
            let _ = std::fs::remove_file(project.path("shipped.yaml"));
            let _ = std::fs::remove_dir_all(project.path("out"));
            let ran = redirected(&project, arguments, to);
            assert_eq!(ran.status, Some(4), "`{arguments} {to}`: {}", ran.stderr);
            assert!(ran.stderr.contains(TROUBLE), "`{arguments} {to}`: {}", ran.stderr);
        }
    }
    // What ran is kept.
    project.run("run FILE").expect(0, &["done: 0 ran, 7 reused"]);
}

#[test]
fn a_reader_that_has_seen_enough_and_an_output_that_nobody_wants_are_no_trouble() {
    let project = Project::new(PROMPTKD);
    for to in ["| true", "> /dev/null", "<> /dev/null >&0"] {
        let ran = redirected(&project, "run FILE --json", to);
        assert_eq!((ran.status, ran.stderr.contains(TROUBLE)), (Some(0), false), "{to}: {}", ran.stderr);
    }
}

#[test]
fn a_stage_that_failed_weighs_more_than_an_output_that_is_full() {
    let project = Project::new("version: 1\nstages:\n  fails: {kind: fail, with: {how: error}}\n");
    let ran = redirected(&project, "run FILE --json", "> /dev/full");
    assert_eq!(ran.status, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("error: stage `fails` failed"), "{}", ran.stderr);
}
