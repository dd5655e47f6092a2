//! What the documents promise about stage kinds, examples and pipelines.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::{Project, shipped_files, shipped_name, shipped_pipelines};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text of a document; empty where there is none, so that a test lists all that is missing from it.
fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_default()
}

/// The files of a folder with that extension, in order.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    files.sort();
    assert!(!files.is_empty(), "there is no `.{extension}` file in `{folder}`");
    files
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap()
}

/// The comment that a pipeline file opens with, without the `#`.
fn head(pipeline: &Path) -> Vec<String> {
    let text = fs::read_to_string(pipeline).unwrap();
    text.lines().map_while(|line| line.strip_prefix('#')).map(|line| line.trim().to_owned()).collect()
}

#[test]
fn every_kind_has_a_file_of_its_own_and_is_named_in_the_documents() {
    let documents = document("README.md") + &document("ARCHITECTURE.md");
    let mut missing = Vec::new();
    for kind in stages::registry().kinds() {
        let kind = kind.about().name;
        let file = format!("stages/src/{}.rs", kind.replace('-', "_"));
        if !root().join(&file).is_file() {
            missing.push(format!("`{file}`, the file of kind `{kind}`"));
        }
        if !documents.contains(&format!("`{kind}`")) {
            missing.push(format!("`{kind}`, in README.md or ARCHITECTURE.md"));
        }
    }
    assert!(missing.is_empty(), "missing:\n  {}", missing.join("\n  "));
}

#[test]
fn every_example_says_how_it_is_run_and_is_in_the_readme() {
    let readme = document("README.md");
    let mut missing = Vec::new();
    for path in files("examples", "rs") {
        let example = name(&path).trim_end_matches(".rs");
        let command = format!("cargo run --example {example}");
        let text = fs::read_to_string(&path).unwrap();
        if !text.lines().take_while(|line| line.starts_with("//!")).any(|line| line.contains(&command)) {
            missing.push(format!("`{command}`, at the head of examples/{example}.rs"));
        }
        if ![format!("{example}.rs"), format!("--example {example}")].iter().any(|said| readme.contains(said)) {
            missing.push(format!("`examples/{example}.rs`, in README.md"));
        }
    }
    assert!(missing.is_empty(), "missing:\n  {}", missing.join("\n  "));
}

#[test]
fn every_pipeline_is_compiled_in_and_in_the_readme() {
    let (readme, main) = (document("README.md"), document("src/main.rs"));
    let wholes = shipped_pipelines().into_iter().map(|path| ("README.md", &readme, shipped_name(&path)));
    let all = shipped_files().into_iter().map(|path| ("src/main.rs", &main, shipped_name(&path)));
    let missing = wholes.chain(all).filter(|(_, text, name)| !text.contains(name.as_str()));
    let missing: Vec<String> = missing.map(|(place, _, name)| format!("`{name}`, in {place}")).collect();
    assert!(missing.is_empty(), "missing:\n  {}", missing.join("\n  "));
}

/// Right up to what only a run would find: `check` takes the flags that `run` is documented with.
#[test]
fn the_head_of_every_pipeline_names_commands_that_are_right() {
    let project = Project::with_program("", env!("CARGO_BIN_EXE_pipeline"));
    for path in shipped_pipelines() {
        let head = head(&path);
        let commands: BTreeSet<String> = head.iter().filter_map(|line| pipeline_command(line)).collect();
        assert!(!commands.is_empty(), "{}: no `pipeline run` or `pipeline compare` in its head", path.display());
        for command in &commands {
            assert!(command.contains(&shipped_name(&path)), "{}: `{command}` names another file", path.display());
            let (_, arguments) = command.split_once(' ').unwrap();
            project.check_without_files(arguments);
        }
        assert!(commands.iter().any(|command| command.starts_with("run ")), "{}: {commands:?}", path.display());
    }
}

/// `run FILE ...` from a line such as `pipeline run FILE ...   what it is for`.
fn pipeline_command(line: &str) -> Option<String> {
    let command = line.strip_prefix("pipeline ")?;
    let command = command.split("   ").next().unwrap_or(command).trim();
    ["run ", "compare "].iter().any(|verb| command.starts_with(verb)).then(|| command.to_owned())
}

/// Pages that fit a terminal, on which every field says what it is and what it is for.
#[test]
fn every_kind_has_a_page_that_can_be_read() {
    let project = Project::with_program("", env!("CARGO_BIN_EXE_pipeline"));
    let kinds = project.run("stages").expect(0, &[]).stdout;
    for kind in kinds.lines().map(|line| line.split_whitespace().next().unwrap()) {
        let page = project.run(&format!("stages {kind}")).expect(0, &["fields of `with`", "example"]).stdout;
        let wide = page.lines().find(|line| line.chars().count() > 100 && !line.starts_with("      "));
        assert_eq!(wide, None, "{kind}");
        assert!(!page.contains("list of ,") && !page.contains("list of any") && !page.contains(": any"), "{page}");
        let fields = page.split("fields of `with`\n").nth(1).unwrap().split("\n\n").next().unwrap();
        let lines: Vec<&str> = fields.lines().collect();
        let is_name = |line: &str| line.starts_with("    ") && !line.starts_with("     ");
        let is_table = lines.iter().all(|line| is_name(line));
        for (line, next) in lines.iter().zip(lines.iter().skip(1).chain([&""])) {
            let has_text =
                if is_table { line.split("  ").filter(|part| !part.is_empty()).count() >= 3 } else { !is_name(next) };
            assert!(
                !is_name(line) || (has_text && !next.is_empty() || is_table),
                "{kind}: `{line}` says not what it is for"
            );
        }
    }
}

/// A seeded bug that has lost its place, or the test that is to catch it, would catch nothing any more.
#[test]
fn every_seeded_bug_has_its_place_and_its_test() {
    let bugs: Vec<serde_json::Value> = serde_json::from_str(&document("tests/seeded/bugs.json")).unwrap();
    let table = document("tests/seeded/README.md");
    let mut wrong = Vec::new();
    for bug in &bugs {
        let text = |field: &str| bug[field].as_str().unwrap();
        let found = document(text("file")).matches(text("right")).count();
        if found != 1 {
            wrong.push(format!("`{}`: its text is {found} times in {}", text("name"), text("file")));
        }
        let (package, test) = (bug["test"][0].as_str().unwrap(), bug["test"][1].as_str().unwrap());
        let folder = match package {
            "lm" => "stages/lm/src",
            "stages" => "stages/src",
            _ => "src",
        };
        let (module, name) = test.rsplit_once("::").unwrap();
        let tests = format!("{folder}/{}", module.replace("::", "/"));
        // In a file of their own, or in that of what they test.
        let (code, _) = tests.rsplit_once('/').unwrap();
        let files = [format!("{tests}.rs"), format!("{code}.rs"), format!("{code}/mod.rs")];
        let code: String = files.iter().map(|file| document(file)).collect();
        if !code.contains(&format!("fn {name}(")) {
            wrong.push(format!("`{}`: there is no test `{test}`", text("name")));
        }
        if !table.contains(&format!("| `{}` |", text("name"))) || !table.contains(&format!("`{name}`")) {
            wrong.push(format!("`{}` is not in the table of tests/seeded/README.md", text("name")));
        }
    }
    assert!(bugs.len() >= 20 && wrong.is_empty(), "{} bugs:\n  {}", bugs.len(), wrong.join("\n  "));
}
