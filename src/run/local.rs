//! The executor of this machine: a worker is `pipeline worker`, a child process that gets its orders on standard input,
//! says what it has to say on standard output, and writes its log to standard error.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use contract::VISIBLE_CARDS;
use contract::files::in_words;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::ground::memory;
use crate::ground::trouble::{Blamed, Fault};
use crate::run::cards::Cards;
use crate::run::executor::{Claim, Control, Ending, Executor, Running};
use crate::run::folder::log_end;
use crate::run::protocol::{Job, Line, Message, Order, Outcome, PARENT, REPORT};

/// Starts workers on this machine.
pub(crate) struct Local {
    cards: Cards,
}

impl Local {
    pub(crate) fn new() -> Self {
        Local { cards: Cards::new() }
    }
}

impl Executor for Local {
    fn claim(&self, device: &str) -> Result<Option<Claim>> {
        let (card, _) = visible(device, mask().as_deref());
        if card.is_empty() {
            return Ok(Some(Box::new(())));
        }
        Ok(self.cards.take(&card)?.map(|held| Box::new(held) as Claim))
    }

    fn start(&self, mut job: Job, log: &Path) -> Result<Box<dyn Running>> {
        let (mask, device) = visible(&job.device, mask().as_deref());
        job.device = device;
        let threads = job.threads;
        let order = line(&Order::Run(Box::new(job)))?;
        let child = start_process(&mask, threads, log)?;
        tracing::info!(worker = child.id(), "started");
        let state = State { id: Some(Pid::from_child(&child)), stdin: None, stopping: false };
        Ok(Box::new(Worker { child, order, log: log.to_owned(), reached: Arc::new(Reached(Mutex::new(state))) }))
    }
}

/// A worker process.
struct Worker {
    child: Child,
    /// Its first line: the job.
    order: Vec<u8>,
    log: PathBuf,
    reached: Arc<Reached>,
}

/// The process as other threads reach it.
struct Reached(Mutex<State>);

/// What of it can be reached now.
struct State {
    /// Of the process and its group, as long as no other process can have it.
    id: Option<Pid>,
    /// From when the job was sent until the worker had its last word.
    stdin: Option<ChildStdin>,
    /// Whether it was told to stop.
    stopping: bool,
}

impl Running for Worker {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.reached) as Arc<dyn Control>
    }

    /// The thread that started the process must live as long as the process: the kernel ties the one to the other.
    fn wait(mut self: Box<Self>, say: &mut dyn FnMut(Message)) -> Result<Ending> {
        self.send_job();
        let outcome = self.hear(say)?;
        self.reached.lock().stdin = None;
        let status = self.end()?;
        let died = || cause_of_death(status, &log_end(&self.log, 100), memory::limit());
        Ok(outcome.map_or_else(|| Ending::Died(died()), Ending::Told))
    }
}

impl Worker {
    /// Sends the job, and the order to stop if that came meanwhile.
    fn send_job(&mut self) {
        let mut stdin = self.child.stdin.take().expect("standard input is a pipe");
        // A worker that dies at once cannot read its job; its exit says more than the broken pipe. Nothing is held
        // meanwhile: one that does not read must still be killed.
        let _ = stdin.write_all(&self.order);
        let mut state = self.reached.lock();
        if state.stopping {
            tell_to_stop(&mut stdin);
        }
        state.stdin = Some(stdin);
    }

    /// Hands on what the worker says until it says how it ended, or is silent.
    fn hear(&mut self, say: &mut dyn FnMut(Message)) -> Result<Option<Outcome>> {
        let stdout = self.child.stdout.take().expect("standard output is a pipe");
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot hear the worker")?;
            match serde_json::from_str(&line) {
                Ok(Line::Outcome(outcome)) => return Ok(Some(outcome)),
                Ok(Line::Message(message)) => say(message),
                // A library that prints: its words belong to the log.
                Err(_) => append(&self.log, &line),
            }
        }
        Ok(None)
    }

    /// Waits for the worker to end, then ends whatever it started. Only after that is its id given back to the system, so
    /// that no other process can be meant.
    fn end(&mut self) -> Result<ExitStatus> {
        let id = Pid::from_child(&self.child);
        let _ = waitid(WaitId::Pid(id), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let mut state = self.reached.lock();
        let _ = kill_process_group(id, Signal::KILL);
        state.id = None;
        drop(state);
        self.child.wait().context("cannot wait for the worker")
    }
}

impl Reached {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Control for Reached {
    fn stop(&self) {
        let mut state = self.lock();
        state.stopping = true;
        if let Some(stdin) = &mut state.stdin {
            tell_to_stop(stdin);
        }
    }

    fn kill(&self) {
        if let Some(id) = self.lock().id {
            let _ = kill_process_group(id, Signal::KILL);
        }
    }
}

fn tell_to_stop(stdin: &mut ChildStdin) {
    // A worker that is gone needs no telling.
    let _ = line(&Order::Stop).map(|order| stdin.write_all(&order));
}

fn start_process(mask: &str, threads: usize, log: &Path) -> Result<Child> {
    let words = File::options().create(true).append(true).open(log);
    let words = words.with_context(|| format!("cannot write log `{}`", log.display()))?;
    let mut command = Command::new(own_program()?);
    command
        .arg0("pipeline")
        .arg("worker")
        .env_remove(VISIBLE_CARDS)
        .envs(self::mask().map(|all| (VISIBLE_CARDS, all)))
        .env("CUDA_VISIBLE_DEVICES", mask)
        .env(PARENT, std::process::id().to_string())
        .env("RAYON_NUM_THREADS", threads.to_string())
        // A worker allocates the same large buffers in every round: the allocator keeps freed ones for a minute, not
        // for a second, since getting fresh pages from the kernel costs a tenth of a training step.
        .env("MIMALLOC_PURGE_DELAY", "60000")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(words)
        // An interrupt from the terminal is for the coordinator, which tells its workers what to do.
        .process_group(0);
    command.spawn().context("cannot start a worker")
}

/// This program, as it was started: on Linux also when its file has since been replaced or removed.
fn own_program() -> Result<PathBuf> {
    let itself = Path::new("/proc/self/exe");
    if itself.exists() {
        return Ok(itself.to_owned());
    }
    std::env::current_exe().context("cannot find this program's own file")
}

/// `CUDA_VISIBLE_DEVICES` as this process found it.
fn mask() -> Option<String> {
    std::env::var("CUDA_VISIBLE_DEVICES").ok()
}

/// What `CUDA_VISIBLE_DEVICES` of a worker has to be, and the device's name under it: the worker sees its own card and no
/// other, and on the CPU none. `mask` is the variable as the coordinator found it, through which cards are numbered.
fn visible(device: &str, mask: Option<&str>) -> (String, String) {
    let Some(number) = device.strip_prefix("cuda:") else { return (String::new(), device.to_owned()) };
    let of_mask = || mask?.split(',').nth(number.parse().ok()?).map(str::trim);
    (of_mask().unwrap_or(number).to_owned(), "cuda:0".into())
}

/// An order as a line of JSON.
fn line(order: &Order) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(order).context("cannot write the worker's job")?;
    line.push(b'\n');
    Ok(line)
}

fn append(log: &Path, line: &str) {
    if let Ok(mut file) = File::options().append(true).open(log) {
        let _ = writeln!(file, "{line}");
    }
}

/// Why a worker ended without a word, as far as its end tells. `log` is the end of what it wrote, `memory` what it could have.
fn cause_of_death(status: ExitStatus, log: &[String], memory: Option<u64>) -> Blamed {
    const KILLED: i32 = Signal::KILL.as_raw();
    const TERMINATED: i32 = Signal::TERM.as_raw();
    const ABORTED: i32 = Signal::ABORT.as_raw();
    const FILE_TOO_LARGE: i32 = Signal::XFSZ.as_raw();
    let had = memory.map(|bytes| format!(", of {} that it may have", in_words(bytes))).unwrap_or_default();
    let (fault, text) = match (status.signal(), log.iter().rev().find_map(|line| refused_bytes(line))) {
        (Some(ABORTED), Some(bytes)) => {
            (Fault::Memory, format!("memory ran out: it asked for {} more{had}; {USE_LESS}", in_words(bytes)))
        }
        (Some(signal @ (KILLED | TERMINATED)), _) => {
            let had = memory.map(|bytes| format!("; it may have {}", in_words(bytes))).unwrap_or_default();
            let text = format!("the worker was killed, as the system does when memory runs out (signal {signal}{had})");
            (Fault::Memory, format!("{text}; if nobody killed it, {USE_LESS}"))
        }
        (Some(FILE_TOO_LARGE), _) => (Fault::Disk, "a file grew larger than `ulimit -f` allows".into()),
        (Some(signal), _) => (Fault::Bug, format!("the worker crashed (signal {signal}): {REPORT}")),
        (None, _) => {
            let code = status.code().unwrap_or_default();
            (Fault::Bug, format!("the worker ended without a result (exit status {code}): {REPORT}"))
        }
    };
    Blamed { fault, text }
}

const USE_LESS: &str =
    "lower `micro_batch` or `batch`, make the model smaller, or run fewer stages at a time with `--jobs`";

/// How much memory was refused, where a line of a log says so: the standard library's last words.
fn refused_bytes(line: &str) -> Option<u64> {
    line.split_once("memory allocation of ")?.1.split_once(" bytes failed")?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_a_worker_ended_says_who_is_to_blame() {
        let cause = |raw, log: &str| {
            let log: Vec<String> = log.lines().map(str::to_owned).collect();
            let Blamed { fault, text } = cause_of_death(ExitStatus::from_raw(raw), &log, Some(24 << 30));
            (fault, text)
        };
        let (fault, text) = cause(6, "training\nmemory allocation of 8589934592 bytes failed\n");
        assert_eq!(fault, Fault::Memory);
        assert!(text.starts_with("memory ran out: it asked for 8.0 GiB more, of 24.0 GiB that it may have"), "{text}");
        let (fault, text) = cause(9, "");
        assert_eq!(fault, Fault::Memory);
        assert!(text.contains("(signal 9; it may have 24.0 GiB)") && text.contains("`micro_batch`"), "{text}");
        for (raw, sign) in [(6, "(signal 6)"), (11, "(signal 11)"), (7 << 8, "(exit status 7)")] {
            let (fault, text) = cause(raw, "");
            assert_eq!(fault, Fault::Bug);
            assert!(text.contains(sign) && text.contains("this is a bug"), "{text}");
        }
        assert_eq!(cause(25, "").0, Fault::Disk);
    }

    #[test]
    fn a_worker_sees_its_card_alone_through_the_mask_that_was_set() {
        let pair = |mask: &str, device: &str| (mask.to_owned(), device.to_owned());
        assert_eq!(visible("cpu", Some("2,3")), pair("", "cpu"));
        assert_eq!(visible("cuda:1", None), pair("1", "cuda:0"));
        assert_eq!(visible("cuda:1", Some("2, 5")), pair("5", "cuda:0"));
        assert_eq!(visible("cuda:0", Some("GPU-8a,MIG-1/2")), pair("GPU-8a", "cuda:0"));
    }
}
