//! What people see: a run as it goes on, the table at its end, the graph.

mod console;
pub(crate) mod draw;
pub(crate) mod table;

pub(crate) use console::{duration, reporter};
