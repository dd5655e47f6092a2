//! Running: the coordinator, its attempts, and the worker processes that they start.

mod attempt;
mod coordinator;
pub(crate) mod device;
mod folder;
mod protocol;
mod slots;
mod sources;
pub(crate) mod worker;

pub(crate) use coordinator::{Settings, Summary, run};
