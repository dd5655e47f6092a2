//! What can be to blame when something goes wrong, and the exit status that tells of it.

use std::collections::TryReserveError;
use std::error::Error;
use std::io::{self, ErrorKind};

use anyhow::anyhow;
use cache::StoreError;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Exit statuses other than those of a process that was told to end.
pub(crate) mod status {
    pub(crate) const STAGE_FAILED: u8 = 1;
    pub(crate) const BAD_REQUEST: u8 = 2;
    pub(crate) const WORK_FOUND: u8 = 3;
    pub(crate) const STORE: u8 = 4;
}

/// The request itself was wrong: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadRequest(pub String);

/// What is to blame for a stage that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fault {
    /// The disk is full, or refuses to be read or written.
    Disk,
    /// There is not enough memory, of the machine or of its GPU.
    Memory,
    /// What the stage was given: its configuration or its data.
    #[default]
    Input,
    /// This program, or a library under it.
    Bug,
}

/// A failure whose blame is known, in words.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Blamed {
    pub(crate) fault: Fault,
    pub(crate) text: String,
}

impl Fault {
    /// Who is to blame for an error of a stage: the first of its causes that says so, else what the stage was given.
    pub(crate) fn of(error: &anyhow::Error) -> Fault {
        let by_type = error.chain().find_map(of_cause);
        by_type.or_else(|| of_text(&format!("{error:#}"))).unwrap_or(Fault::Input)
    }

    /// The exit status of a run in which such a failure came first.
    pub(crate) fn status(self) -> u8 {
        match self {
            Fault::Disk => status::STORE,
            Fault::Memory | Fault::Input | Fault::Bug => status::STAGE_FAILED,
        }
    }
}

fn of_cause(cause: &(dyn Error + 'static)) -> Option<Fault> {
    if let Some(blamed) = cause.downcast_ref::<Blamed>() {
        return Some(blamed.fault);
    }
    if cause.is::<TryReserveError>() {
        return Some(Fault::Memory);
    }
    if cause.downcast_ref::<StoreError>().is_some_and(StoreError::is_io) {
        return Some(Fault::Disk);
    }
    of_io(cause.downcast_ref::<io::Error>()?)
}

fn of_io(error: &io::Error) -> Option<Fault> {
    match error.kind() {
        ErrorKind::OutOfMemory => Some(Fault::Memory),
        ErrorKind::StorageFull
        | ErrorKind::QuotaExceeded
        | ErrorKind::FileTooLarge
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::StaleNetworkFileHandle => Some(Fault::Disk),
        _ => (error.raw_os_error() == Some(Errno::IO.raw_os_error())).then_some(Fault::Disk),
    }
}

/// Some libraries hand on the words of an error and not the error.
fn of_text(text: &str) -> Option<Fault> {
    let by_number = text.split("(os error ").skip(1).find_map(|rest| {
        let number = rest.split(')').next()?.parse().ok()?;
        of_io(&io::Error::from_raw_os_error(number))
    });
    let text = text.to_ascii_lowercase();
    let memory = ["out of memory", "out_of_memory", "cannot allocate memory"].iter().any(|words| text.contains(words));
    by_number.or(memory.then_some(Fault::Memory))
}

/// Whether the store or the disk under it failed, so that no stage could do better.
pub(crate) fn is_store_trouble(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<StoreError>()).any(StoreError::is_io)
}

/// Whether something in the store turned out to be damaged: who asks again hears that it is not there.
pub(crate) fn is_damage(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(StoreError::Corrupt { .. }))
}

/// For a thread of the coordinator's own that did not come back.
pub(crate) fn own_panic() -> anyhow::Error {
    anyhow!(Blamed { fault: Fault::Bug, text: "the runner itself panicked; its message is above".into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_cause_of_an_error_says_who_is_to_blame_however_it_is_wrapped() {
        let disk = [Errno::NOSPC, Errno::DQUOT, Errno::FBIG, Errno::ROFS, Errno::IO];
        let input = [Errno::NOENT, Errno::ACCESS, Errno::ISDIR, Errno::PIPE];
        let cases = (disk.map(|errno| (errno, Fault::Disk)).into_iter())
            .chain(input.map(|errno| (errno, Fault::Input)))
            .chain([(Errno::NOMEM, Fault::Memory)]);
        for (errno, expected) in cases {
            let error = || io::Error::from_raw_os_error(errno.raw_os_error());
            let typed =
                Err::<(), _>(error()).context("cannot write `model.safetensors`").context("step 7").unwrap_err();
            assert_eq!(Fault::of(&typed), expected, "{errno}");
            // As a library gives it that keeps the words alone.
            assert_eq!(Fault::of(&anyhow!("serialisation failed: {}", error())), expected, "{errno}");
        }
    }

    #[test]
    fn what_nothing_else_is_to_blame_for_is_the_input() {
        assert_eq!(Fault::of(&anyhow!("row 7 has no answer")), Fault::Input);
        assert_eq!(Fault::of(&anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")")), Fault::Memory);
        let reserve = Vec::<u64>::new().try_reserve(usize::MAX).unwrap_err();
        assert_eq!(Fault::of(&anyhow::Error::from(reserve).context("while rows were read")), Fault::Memory);
        let blamed = Blamed { fault: Fault::Bug, text: "out of memory".into() };
        assert_eq!(Fault::of(&anyhow::Error::from(blamed).context("stage")), Fault::Bug);
    }
}
