//! `command`: any program as a stage.
//!
//! ```yaml
//! counts:
//!   kind: command
//!   in: {text: corpus}
//!   with:
//!     run: [python3, count.py, "{in.text}", "{out.counts}"]
//!     code: scripts
//!     inputs: {text: corpus}
//!     outputs: {counts: metrics}
//!     identity: [python3, --version]
//! ```
//!
//! The key holds what was declared: the command line, the content of `code`, what enters by `inputs`, the values of `env`, the names
//! of `secrets`, and what the `identity` command prints, for example the version of an interpreter. What a program reads
//! besides is not known to anybody, so declare it.
//!
//! The program starts in a folder with a copy of `code`, hashed when it was copied, so that an edit meanwhile changes nothing.
//! `{in.NAME}` is a folder with an input's files, read-only and its own, `{out.NAME}` an empty folder for an output's, `{code}` the
//! copy. Its environment is `PATH`, `HOME`, a `TMPDIR` of its own, `OMP_NUM_THREADS`, `CUDA_VISIBLE_DEVICES` (its own GPU with
//! `gpu: true`, else none), and what `env` and `secrets` say. What it prints goes to the stage's log, without the values of secrets.
//! It is killed with its children when the stage is, and when `timeout` is over. Outputs are read back as their type before
//! they count. Cost: inputs are written once more.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command as Process, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use contract::{
    About, AnyValue, Cause, ConfigError, Conventions, Env, Inputs, Operator, Outlook, Outputs, PortType, Ports, Result,
    Sink, Source, Stage, Step, limits,
};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The `with` of `command`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Program and arguments, without a shell; `{in.NAME}`, `{out.NAME}` and `{code}` stand for folders.
    pub run: Vec<String>,
    /// File or folder that the program is or reads; a copy of a folder is where it starts.
    #[serde(default)]
    pub code: Option<PathBuf>,
    /// Which files of the folder `code`, as names or patterns with one `*`; all where absent.
    #[serde(default)]
    pub files: Option<Vec<String>>,
    /// What it reads: a type for each input.
    #[serde(default)]
    pub inputs: BTreeMap<String, String>,
    /// What it makes: a type for each output.
    pub outputs: BTreeMap<String, String>,
    /// Variables of its environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Variables that are handed on from the environment of `pipeline`, whose values are in no key and no log.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// It needs a GPU: it has one for itself, which `CUDA_VISIBLE_DEVICES` names. In no key.
    #[serde(default)]
    pub gpu: bool,
    /// Seconds after which it is killed and the stage has failed. In no key.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0.0), range(max = limits::SECONDS))]
    pub timeout: Option<f64>,
    /// A command whose first line of output is in the key, such as the version of an interpreter.
    #[serde(default)]
    pub identity: Vec<String>,
    /// What that command printed. Filled in; not to be written.
    #[serde(default)]
    pub identified: Option<String>,
}

/// The kind.
pub struct Command;

/// The types that a program can read and make: all that are files.
const TYPES: [PortType; 13] = [
    PortType::Corpus,
    PortType::Tokenizer,
    PortType::Dataset,
    PortType::Model,
    PortType::Adapter,
    PortType::SoftPrompt,
    PortType::TeacherCache,
    PortType::Predictions,
    PortType::Metrics,
    PortType::Table,
    PortType::Figure,
    PortType::File,
    PortType::Dir,
];

fn port_type(name: &str) -> Option<PortType> {
    TYPES.into_iter().find(|port_type| port_type.name() == name)
}

impl Stage for Command {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "command",
            version: 1,
            numerics: None,
            summary: "runs any program, with declared inputs, outputs, code and environment",
            example: "kind: command\nin: {text: corpus}\nwith:\n  run: [python3, count.py, \"{in.text}\", \"{out.counts}\"]\n  \
                      code: scripts\n  inputs: {text: corpus}\n  outputs: {counts: metrics}\n  identity: [python3, --version]",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, _conventions: Conventions) {
        if !config.identity.is_empty() {
            config.identified = Some(identify(&config.identity));
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if config.run.first().is_none_or(String::is_empty) {
            errors.push(
                ConfigError::at("run", "there is no program to run").hint("write `run: [PROGRAM, ARGUMENT, ...]`"),
            );
        }
        if config.outputs.is_empty() {
            errors.push(
                ConfigError::at("outputs", "a stage without an output is of no use")
                    .hint("write `outputs: {NAME: TYPE}`"),
            );
        }
        for (field, ports) in [("inputs", &config.inputs), ("outputs", &config.outputs)] {
            for (name, found) in ports {
                if port_type(found).is_none() {
                    let known: Vec<String> = TYPES.iter().map(|known| format!("`{known}`")).collect();
                    let message = format!("there is no type `{found}`");
                    errors.push(
                        ConfigError::at(&format!("{field}.{name}"), message)
                            .hint(format!("choose one of {}", known.join(", "))),
                    );
                }
            }
        }
        for argument in &config.run {
            for name in placeholders(argument) {
                let known = match name.split_once('.') {
                    Some(("in", port)) => config.inputs.contains_key(port),
                    Some(("out", port)) => config.outputs.contains_key(port),
                    _ => name == "code" && config.code.is_some(),
                };
                if !known {
                    let hint =
                        "`{in.NAME}` and `{out.NAME}` are of `inputs` and `outputs`, `{code}` is the copy of `code`";
                    errors.push(ConfigError::at("run", format!("`{{{name}}}` stands for nothing")).hint(hint));
                }
            }
        }
        for name in config.secrets.iter().filter(|name| config.env.contains_key(*name)) {
            errors.push(ConfigError::at("secrets", format!("`{name}` is in `env`, too")).hint("keep one of the two"));
        }
        if config.files.is_some() && config.code.is_none() {
            errors.push(ConfigError::at("files", "there is no folder that they are of").hint("write `code: FOLDER`"));
        }
        if config.identity.is_empty() && config.identified.is_some() {
            errors.push(
                ConfigError::at("identified", "it is filled in by what `identity` prints")
                    .hint("write `identity: [PROGRAM, ...]`"),
            );
        }
        if let Some(error) = config.identified.as_deref().and_then(|text| text.strip_prefix(FAILED)) {
            errors.push(ConfigError::at("identity", format!("what the program is cannot be told: {error}")));
        }
        errors
    }

    fn ports(&self, config: &Config) -> Ports {
        let known = |ports: &BTreeMap<String, String>| -> Vec<(String, PortType)> {
            ports.iter().filter_map(|(name, found)| Some((name.clone(), port_type(found)?))).collect()
        };
        let ports = known(&config.inputs)
            .iter()
            .fold(Ports::new(), |ports, (name, port_type)| ports.input(name, *port_type, "what the program reads"));
        known(&config.outputs)
            .iter()
            .fold(ports, |ports, (name, port_type)| ports.output(name, *port_type, "what the program makes"))
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["gpu", "timeout"]
    }

    fn needs(&self, config: &Config) -> contract::Needs {
        contract::Needs { gpu: config.gpu }
    }

    fn sources(&self, config: &Config) -> Vec<Source> {
        let source = config.code.as_ref().map(|code| {
            let source = Source::new(&["code"], code);
            config.files.as_ref().map_or(source.clone(), |files| source.only(files))
        });
        source.into_iter().collect()
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        for name in config.secrets.iter().filter(|name| std::env::var_os(name).is_none()) {
            let message = format!("`{name}` is not in the environment");
            outlook.error([Cause::Field("secrets".into())], message, format!("set it: `export {name}=...`"));
        }
        // A file that is named and not declared can change without anybody noticing.
        let looks_local =
            |argument: &&String| argument.contains('.') && !argument.starts_with('-') && Path::new(argument).is_file();
        let own = |argument: &str| config.code.as_ref().is_some_and(|code| code.join(argument).exists());
        for argument in config.run.iter().filter(looks_local).filter(|argument| !own(argument)) {
            let message =
                format!("`{argument}` is a file that is not declared, so a change of it would not be noticed");
            outlook.warn([Cause::Field("run".into())], message, "name it, or its folder, as `code`");
        }
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Running { config, env: env.clone(), rounds: 0 }))
    }
}

/// What stands at the beginning of `identified` where the command failed.
const FAILED: &str = "failed: ";

/// The first line that a command prints, or why it prints none.
fn identify(command: &[String]) -> String {
    let output = Process::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).output();
    let output = match output {
        Ok(output) => output,
        Err(error) => return format!("{FAILED}cannot run `{}`: {error}", command[0]),
    };
    let text = [output.stdout, output.stderr].concat();
    let line = String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned();
    match output.status.success() && !line.is_empty() {
        true => line,
        false => format!("{FAILED}`{}` ended with {} and printed `{line}`", command.join(" "), output.status),
    }
}

/// Names between braces that begin as those that stand for folders.
fn placeholders(argument: &str) -> Vec<String> {
    let inside = argument.split('{').skip(1).filter_map(|rest| rest.split_once('}')).map(|(name, _)| name);
    let is_ours = |name: &&str| name.starts_with("in.") || name.starts_with("out.") || *name == "code";
    inside.filter(is_ours).map(str::to_owned).collect()
}

struct Running {
    config: Config,
    env: Env,
    /// How often it ran: in a loop each round has its own folder.
    rounds: u64,
}

impl Operator for Running {
    fn run(&mut self, inputs: Inputs, _step: &Step, _sink: &mut dyn Sink) -> Result<Outputs> {
        self.rounds += 1;
        let place = self.env.scratch.join(format!("command.{}", self.rounds));
        let mut folders = BTreeMap::new();
        for name in self.config.inputs.keys() {
            let folder = make(&place.join("in").join(name))?;
            let value = inputs.get(name).with_context(|| format!("input `{name}` is not connected"))?;
            Arc::clone(value).save(&folder)?;
            make_read_only(&folder)?;
            folders.insert(format!("in.{name}"), folder);
        }
        for name in self.config.outputs.keys() {
            folders.insert(format!("out.{name}"), make(&place.join("out").join(name))?);
        }
        let mut start = make(&place.join("here"))?;
        if let Some(code) = &self.config.code {
            let code = std::path::absolute(code).context("cannot find the copy of the code")?;
            folders.insert("code".into(), code.clone());
            if code.is_dir() {
                start = code;
            }
        }
        self.execute(&folders, &start, &make(&place.join("tmp"))?)?;
        let mut outputs = Outputs::new();
        for (name, found) in &self.config.outputs {
            let folder = &folders[&format!("out.{name}")];
            let is_empty = fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
            if is_empty {
                bail!(
                    "the program ended well and wrote nothing for output `{name}`; it is to write into `{{out.{name}}}`"
                );
            }
            let port_type = port_type(found).with_context(|| format!("there is no type `{found}`"))?;
            let value = crate::load(port_type, folder, &self.env);
            let value =
                value.with_context(|| format!("what the program wrote for output `{name}` is no {port_type}"))?;
            outputs = outputs.with_shared(name, value);
        }
        Ok(outputs)
    }
}

impl Running {
    fn execute(&self, folders: &BTreeMap<String, PathBuf>, start: &Path, tmp: &Path) -> Result<()> {
        let Config { run, env, secrets, .. } = &self.config;
        let filled = |argument: &String| {
            folders.iter().fold(argument.clone(), |argument, (name, folder)| {
                argument.replace(&format!("{{{name}}}"), &folder.display().to_string())
            })
        };
        let arguments: Vec<String> = run.iter().map(filled).collect();
        let mut process = Process::new(&arguments[0]);
        process.args(&arguments[1..]).current_dir(start).env_clear().stdin(Stdio::null());
        process.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        for name in ["PATH", "HOME", "LD_LIBRARY_PATH"] {
            process.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        process.envs(cards(self.config.gpu, &self.env.device).map(|cards| ("CUDA_VISIBLE_DEVICES", cards)));
        process.env("TMPDIR", tmp).env("OMP_NUM_THREADS", self.env.threads.to_string()).envs(env);
        let mut hidden = Vec::new();
        for name in secrets {
            let value = std::env::var(name).with_context(|| format!("`{name}` is not in the environment"))?;
            process.env(name, &value);
            hidden.extend(Some(value).filter(|value| !value.is_empty()));
        }
        let child = process.spawn().with_context(|| format!("cannot run `{}`", arguments[0]))?;
        let limit = self.config.timeout.map(Duration::from_secs_f64);
        let (status, last) = Guarded::new(child)?.wait(hidden, limit)?;
        let Some(status) = status else {
            let seconds = self.config.timeout.unwrap_or_default();
            bail!("`{}` did not end within {seconds} s, its `timeout`, and was killed; its last words: {last}", run[0]);
        };
        if status.success() {
            return Ok(());
        }
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        };
        let said = if last.is_empty() { String::new() } else { format!(": {last}") };
        bail!("`{}` ended with {how}{said}", run[0])
    }
}

/// The cards that a program may see: with one of its own, that one; where it needs one and this run knows of none, such as with
/// a `pipeline` built without CUDA, those that the run itself could have seen; else none.
fn cards(needs_one: bool, device: &str) -> Option<OsString> {
    match (needs_one, device) {
        (false, _) => Some(OsString::new()),
        (true, "cpu") => std::env::var_os(contract::VISIBLE_CARDS),
        (true, _) => std::env::var_os("CUDA_VISIBLE_DEVICES"),
    }
}

/// A process that is killed with its group when this process ends, however that ends: a watcher waits for a pipe to close.
struct Guarded {
    child: Child,
    watcher: Child,
    /// Closed when this process is gone.
    _open: ChildStdin,
}

impl Guarded {
    fn new(mut child: Child) -> Result<Self> {
        let watcher = Process::new("/bin/sh")
            .args(["-c", "read -r nothing; kill -KILL -\"$1\"", "sh", &child.id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        let mut watcher = match watcher {
            Ok(watcher) => watcher,
            Err(error) => {
                let _ = child.kill();
                return Err(error).context("cannot start what watches over a command");
            }
        };
        let open = watcher.stdin.take().expect("standard input is a pipe");
        Ok(Guarded { child, watcher, _open: open })
    }

    /// Waits for the process, and then ends whatever it started. Gives how it ended, unless the limit of time was over before, and
    /// its last words.
    fn wait(mut self, hidden: Vec<String>, limit: Option<Duration>) -> Result<(Option<ExitStatus>, String)> {
        let last = Arc::new(Mutex::new(VecDeque::new()));
        let stdout = self.child.stdout.take().expect("standard output is a pipe");
        let stderr = self.child.stderr.take().expect("standard error is a pipe");
        let hidden = Arc::new(hidden);
        let listen = |stream: Box<dyn Read + Send>| {
            let (hidden, last) = (Arc::clone(&hidden), Arc::clone(&last));
            thread::spawn(move || log(stream, &hidden, &last))
        };
        let listeners = [listen(Box::new(stdout)), listen(Box::new(stderr))];
        let id = Pid::from_child(&self.child);
        // Until it is waited for, nobody else can have its number.
        let has_ended = limit.is_none_or(|limit| ends_within(id, limit));
        if has_ended {
            let _ = waitid(WaitId::Pid(id), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        }
        let _ = kill_process_group(id, Signal::KILL);
        let _ = self.watcher.kill();
        let _ = self.watcher.wait();
        let status = self.child.wait().context("cannot wait for the program")?;
        for listener in listeners {
            let _ = listener.join();
        }
        let last = last.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((has_ended.then_some(status), last.iter().cloned().collect::<Vec<_>>().join(" | ")))
    }
}

/// Whether a child ends in time.
fn ends_within(id: Pid, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    while !matches!(waitid(WaitId::Pid(id), options), Ok(Some(_))) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        thread::sleep(left.min(Duration::from_millis(20)));
    }
    true
}

/// Writes what a program says to the stage's log, line by line, without secrets. The last lines are remembered.
fn log(stream: Box<dyn Read + Send>, hidden: &[String], last: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(stream).split(b'\n').map_while(std::io::Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        let line = hidden.iter().fold(line, |line, secret| line.replace(secret.as_str(), "***"));
        let _ = writeln!(std::io::stderr(), "{line}");
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.push_back(line.trim().to_owned());
        if last.len() > 3 {
            last.pop_front();
        }
    }
}

fn make(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
    std::path::absolute(folder).with_context(|| format!("cannot find `{}`", folder.display()))
}

/// Takes the right to write away from all files.
fn make_read_only(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))? {
        let path = entry.with_context(|| format!("cannot read folder `{}`", folder.display()))?.path();
        if path.is_dir() {
            make_read_only(&path)?;
        } else {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444))
                .with_context(|| format!("cannot make `{}` read-only", path.display()))?;
        }
    }
    Ok(())
}
