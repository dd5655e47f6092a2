//! Standard output, data for people and programs: all of it is written here, so that none is lost in silence. And standard
//! error, for the rest.

use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use ctor::ctor;
use rustix::io::Errno;

use crate::ground::terminal::has_colours;

/// Whether standard output was closed when the program began.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// Rust opens `/dev/null` in place of a standard output that is closed, before `main`. From then on nobody can tell them apart.
#[ctor(unsafe)]
fn look_before_rust_does() {
    let closed = rustix::io::fcntl_getfd(rustix::stdio::stdout()) == Err(Errno::BADF);
    CLOSED.store(closed, Ordering::Relaxed);
}

/// Writes to standard output, at once. A reader that has seen enough is no error.
pub(crate) fn say(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = if CLOSED.load(Ordering::Relaxed) {
        Err(Errno::BADF.into())
    } else {
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    };
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// Writes help and versions. Mistakes in the command line go to standard error and end the program.
pub(crate) fn say_help(help: &clap::Error) -> Result<()> {
    if help.use_stderr() {
        help.exit();
    }
    let text = help.render();
    say(&if has_colours(&io::stdout()) { text.ansi().to_string() } else { text.to_string() })
}

/// Says a line on standard error. A terminal that is gone does not stop a run, nor how it stops.
pub(crate) fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
