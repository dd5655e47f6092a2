//! The two sides as processes that live as long as their line: one request a line on their standard input, one answer a
//! line of JSON on their standard output.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write, stdout};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The first answer: the side has loaded its models.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Ready {
    /// Resident memory before any model was loaded, KiB.
    pub(crate) idle_kib: u64,
}

/// The answer to `run` and `check`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ran {
    /// What the work took.
    pub(crate) seconds: f64,
    /// Tokens that were trained on, or written.
    pub(crate) tokens: usize,
    /// Losses, or written tokens: what must be the same on both sides.
    pub(crate) checks: Vec<f64>,
}

/// The answer to `end`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// Largest resident memory of the process, KiB.
    pub(crate) peak_kib: u64,
    /// Largest memory on the accelerator, KiB, where there is one; 0 where its driver does not tell.
    pub(crate) device_kib: Option<u64>,
}

/// Gives an answer, in the process of our side.
pub(crate) fn say(answer: &impl Serialize) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer)?)?;
    Ok(out.flush()?)
}

/// A field of the kernel's account of this process, KiB.
pub(crate) fn memory(field: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("memory is measured on Linux only")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    number.with_context(|| format!("the kernel tells no `{field}`"))
}

/// A side that is running.
pub(crate) struct Side {
    name: String,
    child: Child,
    requests: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// Resident memory before any model was loaded, KiB.
    pub(crate) idle_kib: u64,
}

impl Side {
    /// Starts a process and waits until it is ready.
    pub(crate) fn start(name: &str, command: &mut Command) -> Result<Side> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let requests = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut side = Side { name: name.to_owned(), child, requests, answers, idle_kib: 0 };
        side.idle_kib = side.answer::<Ready>()?.idle_kib;
        Ok(side)
    }

    /// Lets it do its work once; as a check, on what is given instead of what is drawn.
    pub(crate) fn run(&mut self, check: bool) -> Result<Ran> {
        self.ask(if check { "check" } else { "run" })
    }

    /// Ends it.
    pub(crate) fn end(mut self) -> Result<Ended> {
        let ended = self.ask("end")?;
        self.child.wait()?;
        Ok(ended)
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &str) -> Result<T> {
        writeln!(self.requests, "{request}").with_context(|| format!("{} is gone", self.name))?;
        self.answer()
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let Some(line) = self.answers.next() else {
            bail!("{} ended without an answer ({})", self.name, self.child.wait()?);
        };
        let line = line?;
        serde_json::from_str(&line).with_context(|| format!("{} answered `{line}`", self.name))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // After `end` it is gone already; after an error nobody waits for it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
