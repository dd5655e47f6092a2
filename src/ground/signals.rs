//! TERM, INT and HUP: one rule for every command.
//!
//! A signal ends the process at once, with the status that a shell gives a process ended by it. Whoever has something to put
//! in order takes the signals over for that time: then the first asks to stop, and the second, or the end of [`GRACE`],
//! means now. A thread of its own sees to that, so that no read, no lock and no file system that hangs can hold it up.

use std::fs;
use std::io::{self, Write};
use std::process;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long who took the signals over may go on after the first.
pub(crate) const GRACE: Duration = Duration::from_secs(4);

/// What comes on top before the process ends whatever it does: for last words.
const LAST_WORDS: Duration = Duration::from_millis(800);

/// Hears of a signal in place of the process being ended.
type Taker = Box<dyn Fn(i32) + Send>;

static TAKER: Mutex<Option<Taker>> = Mutex::new(None);

/// Starts to listen, for the rest of the process.
pub(crate) fn listen() -> Result<()> {
    let mut wanted = vec![SIGINT, SIGTERM];
    // Who starts a program with `nohup` wants it to outlive the terminal.
    if !is_ignored(SIGHUP) {
        wanted.push(SIGHUP);
    }
    let mut signals = Signals::new(wanted).context("cannot listen for signals")?;
    let heed = move || {
        let mut first = None;
        for signal in signals.forever() {
            let again = first.is_some();
            heed(*first.get_or_insert(signal), again);
        }
    };
    thread::Builder::new().name("signals".into()).spawn(heed).context("cannot start a thread")?;
    Ok(())
}

fn heed(signal: i32, again: bool) {
    match &*taker() {
        None => end(signal),
        Some(taker) => taker(signal),
    }
    let patience = if again { LAST_WORDS } else { GRACE + LAST_WORDS };
    thread::spawn(move || {
        thread::sleep(patience);
        end(signal);
    });
}

/// Takes the signals over until what it returns is dropped.
pub(crate) fn take(heed: impl Fn(i32) + Send + 'static) -> Taken {
    *taker() = Some(Box::new(heed));
    Taken(())
}

/// The signals are taken over as long as it lives.
pub(crate) struct Taken(());

impl Drop for Taken {
    fn drop(&mut self) {
        *taker() = None;
    }
}

/// Takes the signals over for work that asks itself, often enough, whether it may go on.
pub(crate) fn watch() -> Watch {
    let came = Arc::new(AtomicI32::new(0));
    let signal = Arc::clone(&came);
    Watch { came, _taken: take(move |number| signal.store(number, Ordering::Relaxed)) }
}

/// Whether a signal has come since [`watch`].
pub(crate) struct Watch {
    came: Arc<AtomicI32>,
    _taken: Taken,
}

impl Watch {
    /// As if a signal had come.
    #[cfg(test)]
    pub(crate) fn after(signal: i32) -> Self {
        let watch = watch();
        watch.came.store(signal, Ordering::Relaxed);
        watch
    }

    /// Errors with [`Interrupted`] once a signal has come.
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        match self.came.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Interrupted(signal)),
        }
    }
}

/// A signal asked to stop, and that was done: nothing else is wrong.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted(pub(crate) i32);

fn taker() -> MutexGuard<'static, Option<Taker>> {
    TAKER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The exit status of a process that a signal ended, as a shell has it.
pub(crate) fn status(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

fn end(signal: i32) -> ! {
    // Who closed the terminal does not read it.
    let _ = writeln!(io::stderr(), "interrupted");
    process::exit(status(signal).into())
}

/// Whether whoever started this process told it to ignore a signal.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
