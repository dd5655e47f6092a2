//! A place where jobs run, as attempts know it: a job goes in; what its worker says, and how it ended, come back. How
//! the place starts a worker, reaches it and finds out why it died is known to that place alone.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use crate::ground::trouble::Blamed;
use crate::run::protocol::{Job, Message, Outcome};

/// A place where jobs run.
pub(crate) trait Executor: Send + Sync {
    /// Sets a device aside until what is returned is dropped; nothing while others on the same machine have it.
    ///
    /// Errors when it cannot be told who has it.
    fn claim(&self, device: &str) -> Result<Option<Claim>>;

    /// Starts a worker for a job and returns at once, without waiting for anything that it does: orders wait meanwhile.
    /// The device of the job is one of this place's. `log` is the file for what the worker writes that is no message.
    ///
    /// Errors when no worker can be started.
    fn start(&self, job: Job, log: &Path) -> Result<Box<dyn Running>>;
}

/// A device that is set aside.
pub(crate) type Claim = Box<dyn Send>;

/// A job whose worker was started.
pub(crate) trait Running {
    /// What reaches the worker from other threads, until it has ended and after.
    fn control(&self) -> Arc<dyn Control>;

    /// Hears the worker to its end, handing on what it says meanwhile, and tells how it ended. By then nothing that it
    /// started runs any more.
    ///
    /// It belongs on the thread that started the worker: a place may tie the worker to that thread.
    ///
    /// Errors when the worker cannot be heard any more.
    fn wait(self: Box<Self>, say: &mut dyn FnMut(Message)) -> Result<Ending>;
}

/// What reaches a worker. One that is gone needs no telling.
pub(crate) trait Control: Send + Sync {
    /// Tells the worker to keep a cut and stop.
    fn stop(&self);

    /// Kills the worker with all that it started.
    fn kill(&self);
}

/// How a job ended.
pub(crate) enum Ending {
    /// As its worker said.
    Told(Outcome),
    /// Without a word, for a reason that its end tells as far as it can.
    Died(Blamed),
}
