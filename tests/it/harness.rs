//! A folder with a pipeline file, and the program run in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

/// A temporary folder with `p.yaml` in it.
pub(crate) struct Project {
    folder: tempfile::TempDir,
    program: PathBuf,
}

impl Project {
    /// For the program with fake stages.
    pub(crate) fn new(pipeline: &str) -> Self {
        Self::with_program(pipeline, example("fake-stages"))
    }

    /// For any program with this command line.
    pub(crate) fn with_program(pipeline: &str, program: impl Into<PathBuf>) -> Self {
        let project = Project { folder: tempfile::tempdir().unwrap(), program: program.into() };
        project.write("p.yaml", pipeline);
        project
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Number of lines of a file; 0 where there is none.
    pub(crate) fn lines(&self, name: &str) -> usize {
        self.read(name).lines().count()
    }

    /// The program with arguments separated by spaces; `FILE` stands for `p.yaml`.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments.split_whitespace().map(|argument| if argument == "FILE" { "p.yaml" } else { argument }))
            .current_dir(self.folder.path())
            .env_remove("PIPELINE_STORE")
            .env_remove("PIPELINE_CUT_SECONDS")
            .env("NO_COLOR", "1");
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, arguments: &str) -> Ran {
        Ran::new(self.command(arguments).output().unwrap())
    }

    /// Checks a pipeline some of whose files nobody has here, on a machine without a network: nothing else may be wrong with it.
    #[track_caller]
    pub(crate) fn check_without_files(&self, arguments: &str) {
        let mut command = self.command(&format!("check {arguments}"));
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.path("hub"));
        let ran = Ran::new(command.output().unwrap());
        let errors: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let is_elsewhere =
            |error: &&str| error.contains("there is no file") || error.contains("`HF_HUB_OFFLINE` is set");
        assert!(errors.iter().all(is_elsewhere), "{}", ran.stderr);
        let status = if errors.is_empty() { 0 } else { 2 };
        ran.expect(status, &[]);
    }

    /// Starts the program and leaves it running.
    pub(crate) fn start(&self, arguments: &str) -> Child {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// `show --json`.
    pub(crate) fn show(&self, arguments: &str) -> Json {
        let ran = self.run(&format!("show FILE --json {arguments}"));
        assert_eq!(ran.status, Some(0), "{}", ran.stderr);
        serde_json::from_str(&ran.stdout).unwrap()
    }

    /// Digest of every output of every stage.
    pub(crate) fn digests(&self, arguments: &str) -> Vec<String> {
        let shown = self.show(arguments);
        let stages = shown["stages"].as_object().unwrap();
        let mut digests = Vec::new();
        for (name, stage) in stages {
            assert_eq!(stage["status"], "cached", "stage `{name}`");
            for (port, output) in stage["outputs"].as_object().unwrap() {
                digests.push(format!("{name}.{port} {}", output["digest"].as_str().unwrap()));
            }
        }
        digests
    }
}

/// What a finished program left.
pub(crate) struct Ran {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn new(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Checks the exit status and that the output has each of these.
    #[track_caller]
    pub(crate) fn expect(self, status: i32, said: &[&str]) -> Self {
        let all = format!("{}{}", self.stdout, self.stderr);
        assert_eq!(self.status, Some(status), "{all}");
        for text in said {
            assert!(all.contains(text), "`{text}` is not in:\n{all}");
        }
        self
    }

    /// The status word of each stage, as `ran train`.
    pub(crate) fn words(&self) -> Vec<String> {
        const WORDS: [&str; 6] = ["ran", "reused", "failed", "skipped", "stopped", "resumed"];
        let words = self.stderr.lines().map(|line| line.split_whitespace().take(2).collect::<Vec<_>>());
        words.filter(|words| WORDS.contains(&words[0])).map(|words| words.join(" ")).collect()
    }

    /// Events of `--json`.
    pub(crate) fn events(&self) -> Vec<Json> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Waits until something holds.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Processes whose parent is `pid`.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|child| parent(*child) == Some(pid)).collect()
}

/// Whether a process still runs; one that has ended but was not yet waited for does not.
pub(crate) fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|fields| fields[0] != "Z" && fields[0] != "X")
}

fn parent(pid: u32) -> Option<u32> {
    stat(pid)?[1].parse().ok()
}

/// State and parent, the fields after the name in parentheses.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(text.rsplit_once(") ")?.1.split_whitespace().take(2).map(str::to_owned).collect())
}

/// An example of this package, which is built along with the tests.
pub(crate) fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let target = tests.ancestors().find(|folder| folder.join("examples").is_dir()).map(Path::to_owned);
    let program = target.unwrap_or_default().join("examples").join(name);
    assert!(program.is_file(), "`{}` is missing; build it with `cargo build --example {name}`", program.display());
    program
}

/// Files below `pipelines/`, in order.
pub(crate) fn shipped_files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let below = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let all = below(&folder).into_iter().flat_map(|path| if path.is_dir() { below(&path) } else { vec![path] });
    let mut files: Vec<PathBuf> = all.filter(|path| path.extension().is_some_and(|found| found == "yaml")).collect();
    files.sort();
    files
}

/// Those that are whole pipelines; the others are parts of them.
pub(crate) fn shipped_pipelines() -> Vec<PathBuf> {
    let is_whole = |path: &PathBuf| fs::read_to_string(path).unwrap().lines().any(|line| line == "version: 1");
    shipped_files().into_iter().filter(is_whole).collect()
}

/// A shipped file as people name it: `promptkd.yaml`, `paper/gpt2-base.yaml`.
pub(crate) fn shipped_name(path: &Path) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    path.strip_prefix(folder).unwrap().display().to_string()
}
