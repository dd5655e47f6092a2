//! Running: the coordinator, its attempts, and the executors that start workers for them.

mod attempt;
mod cards;
mod coordinator;
pub(crate) mod device;
mod executor;
pub(crate) mod folder;
mod local;
mod protocol;
mod slots;
mod sources;
pub(crate) mod worker;

pub(crate) use coordinator::{Settings, Summary, run};
