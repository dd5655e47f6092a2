//! Any program as a stage: what is in its key, what it may see, and that nothing of it is left.

use std::fs;

use crate::harness::{Project, Ran, is_alive, wait_until};

fn project(with: &str) -> Project {
    let pipeline = format!(
        "version: 1\nname: command\nstages:\n  made: {{kind: command, with: {{run: [sh, go.sh, \"{{out.it}}\"], code: code, outputs: {{it: file}}{with}}}}}\n  \
         read: {{kind: command, in: {{it: made}}, with: {{run: [sh, -c, 'cat \"$0\"/* > \"$1\"/copy', \"{{in.it}}\", \"{{out.it}}\"], inputs: {{it: file}}, outputs: {{it: file}}}}}}\n"
    );
    let project = Project::with_program(&pipeline, env!("CARGO_BIN_EXE_pipeline"));
    fs::create_dir(project.path("code")).unwrap();
    project.write("code/go.sh", "echo one > \"$1\"/text\n");
    project
}

/// What the last stage copied.
fn copied(project: &Project) -> String {
    let path = project.show("")["stages"]["read"]["outputs"]["it"]["path"].as_str().unwrap().to_owned();
    fs::read_to_string(format!("{path}/copy")).unwrap()
}

#[test]
fn what_is_declared_is_in_the_key_and_nothing_else() {
    let project = project("");
    project.run("run FILE").expect(0, &["done: 2 ran"]);
    assert_eq!(copied(&project), "one\n");
    project.run("run FILE").expect(0, &["done: 0 ran, 2 reused"]);
    // Where the code lies is in no key, what it holds is.
    fs::create_dir(project.path("elsewhere")).unwrap();
    fs::copy(project.path("code/go.sh"), project.path("elsewhere/go.sh")).unwrap();
    project.run("run FILE --set made.code=elsewhere").expect(0, &["done: 0 ran, 2 reused"]);
    project.write("code/go.sh", "echo one > \"$1\"/text # the same\n");
    project.run("plan FILE").expect(0, &["run                 made  code:", "depends-on-result   read"]);
    project.run("run FILE").expect(0, &["done: 1 ran, 1 reused"]);
    let mut command = project.command("plan FILE --set");
    Ran::new(command.arg("made.env={A: b}").output().unwrap()).expect(0, &["env: default -> {A: b}"]);
    project.run("why FILE made --set made.identity=[echo,new]").expect(0, &["identified: default -> new"]);
}

#[test]
fn a_program_sees_its_own_environment_and_secrets_are_in_no_log_and_no_key() {
    let with = ", env: {GREETING: hello}, secrets: [TOKEN]";
    let project = project(with);
    project
        .write("code/go.sh", "echo \"$GREETING $OTHER $TOKEN\" | tee \"$1\"/text; echo it is $TOKEN >&2; touch here\n");
    project.run("check FILE").expect(2, &["`TOKEN` is not in the environment", "export TOKEN="]);
    let run = |token: &str| {
        let mut command = project.command("run FILE");
        Ran::new(command.env("TOKEN", token).env("OTHER", "stray").output().unwrap())
    };
    run("s3cret").expect(0, &["done: 2 ran"]);
    assert_eq!(copied(&project), "hello  s3cret\n");
    run("another").expect(0, &["done: 0 ran"]);
    let logs = project.run("logs made").expect(0, &["hello  ***", "it is ***"]).stdout;
    assert!(!logs.contains("s3cret"), "{logs}");
    // Whatever the store keeps beside the result itself.
    for part in ["pre", "ac", "runs"] {
        let text = std::process::Command::new("grep")
            .args(["-r", "s3cret"])
            .arg(project.path(".pipeline").join(part))
            .output();
        assert_eq!(String::from_utf8_lossy(&text.unwrap().stdout), "", "{part}");
    }
    assert!(!project.path("here").exists() && !project.path("code/here").exists(), "it has a folder of its own");
}

#[test]
fn an_edit_while_a_program_runs_changes_nothing_and_is_said() {
    let project = project("");
    let hold = project.path("hold").display().to_string();
    let script = |word: &str| {
        format!("touch {hold}.here; while [ -e {hold} ]; do sleep 0.02; done; echo {word} > \"$1\"/text\n")
    };
    project.write("code/go.sh", &script("one"));
    project.write("hold", "");
    let running = project.start("run FILE");
    wait_until("it runs", || project.path("hold.here").exists());
    project.write("code/go.sh", &script("two"));
    fs::remove_file(project.path("hold")).unwrap();
    let said = "`code` changed since it was read; the result is that of what it held before";
    Ran::new(running.wait_with_output().unwrap()).expect(0, &[said, "done: 2 ran"]);
    project.run("run FILE").expect(0, &["done: 2 ran"]);
    assert_eq!(copied(&project), "two\n");
    project.write("code/go.sh", &script("one"));
    assert_eq!(copied(&project), "one\n");
}

#[test]
fn a_program_dies_with_its_children_however_the_run_ends() {
    for signal in ["KILL", "INT"] {
        let project = project("");
        let pid = project.path("pid").display().to_string();
        project.write("code/go.sh", &format!("sleep 600 &\necho $! > {pid}.new; mv {pid}.new {pid}; wait\n"));
        let running = project.start("run FILE");
        wait_until("its child runs", || project.path("pid").exists());
        let child: u32 = project.read("pid").trim().parse().unwrap();
        let id = running.id().to_string();
        let killed = std::process::Command::new("kill").args([&format!("-{signal}"), &id]).status().unwrap();
        assert!(killed.success());
        drop(running.wait_with_output());
        wait_until("the child is gone", || !crate::harness::is_alive(child));
        project.write("code/go.sh", "echo one > \"$1\"/text\n");
        project.run("run FILE").expect(0, &["done: 2 ran"]);
    }
}

#[test]
fn what_a_program_does_wrong_is_said() {
    let cases = [
        ("echo so it ends >&2; exit 3\n", "`sh` ended with exit status 3: so it ends"),
        ("kill -SEGV $$\n", "`sh` ended with signal 11"),
        ("true\n", "wrote nothing for output `it`"),
    ];
    for (script, said) in cases {
        let project = project("");
        project.write("code/go.sh", script);
        project.run("run FILE").expect(1, &[said, "skipped  read"]);
    }
    let project = project("");
    for (set, said) in [
        ("made.run=[]", "there is no program to run"),
        ("made.run=[sh, \"{in.x}\"]", "`{in.x}` stands for nothing"),
        ("made.outputs={it: fiel}", "there is no type `fiel`"),
        ("made.identity=[no-such-program]", "cannot run `no-such-program`"),
    ] {
        let mut command = project.command("check FILE");
        Ran::new(command.args(["--set", set]).output().unwrap()).expect(2, &[said]);
    }
    project.write("stray.sh", "true\n");
    let mut command = project.command("check FILE --set");
    Ran::new(command.arg("made.run=[sh,stray.sh]").output().unwrap())
        .expect(0, &["`stray.sh` is a file that is not declared"]);
}

#[test]
fn a_program_that_takes_too_long_is_killed_with_its_children() {
    let project = project(", timeout: 0.4");
    let pid = project.path("pid").display().to_string();
    project.write("code/go.sh", &format!("sleep 600 &\necho $! > {pid}; echo waiting >&2; wait\n"));
    project.run("run FILE").expect(1, &["did not end within 0.4 s, its `timeout`", "its last words: waiting"]);
    let child: u32 = project.read("pid").trim().parse().unwrap();
    wait_until("its child is gone", || !is_alive(child));
    // The limit is in no key, and does not hold up what ends before.
    project.write("code/go.sh", "echo one > \"$1\"/text\n");
    project.run("run FILE").expect(0, &["done: 2 ran"]);
    project.run("run FILE --set made.timeout=600").expect(0, &["done: 0 ran"]);
    project.run("check FILE --set made.timeout=0").expect(2, &["timeout"]);
}

#[test]
fn a_program_sees_a_card_only_where_it_needs_one() {
    let project = project("");
    project.write("code/go.sh", "echo \"cards: $CUDA_VISIBLE_DEVICES\" > \"$1\"/text\n");
    for (gpu, seen) in [("false", "cards: \n"), ("true", "cards: 2,GPU-7\n")] {
        let mut command = project.command(&format!("run FILE --device cpu --force made --set made.gpu={gpu}"));
        Ran::new(command.env("CUDA_VISIBLE_DEVICES", "2,GPU-7").output().unwrap()).expect(0, &["done: "]);
        assert_eq!(copied(&project), seen, "gpu: {gpu}");
    }
}

#[test]
fn a_metrics_file_that_is_none_is_refused() {
    let pipeline = "version: 1\nname: c\nstages:\n  m: {kind: command, with: {run: [sh, -c, 'echo x > \"$0\"/metrics.json', \"{out.m}\"], outputs: {m: metrics}}}\n";
    let project = Project::with_program(pipeline, env!("CARGO_BIN_EXE_pipeline"));
    project.run("run FILE").expect(1, &["what the program wrote for output `m` is no metrics"]);
}

#[test]
fn the_example_counts_words() {
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        return; // no Python here
    }
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let project = Project::with_program(
        &fs::read_to_string(root.join("examples/command.yaml")).unwrap(),
        env!("CARGO_BIN_EXE_pipeline"),
    );
    fs::create_dir(project.path("examples")).unwrap();
    fs::copy(root.join("examples/count_words.py"), project.path("examples/count_words.py")).unwrap();
    project.run("run FILE").expect(0, &["done: 2 ran", "words an answer"]);
    project.run("logs words").expect(0, &["read "]);
}
