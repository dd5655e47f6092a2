//! What people see: a run as it goes on, what variants gained, the page that shows it, the graph.

pub(crate) mod answers;
pub(crate) mod charts;
pub(crate) mod comparison;
mod console;
pub(crate) mod curves;
pub(crate) mod diary;
pub(crate) mod draw;
pub(crate) mod page;
mod statistics;
pub(crate) mod table;

pub(crate) use console::{duration, reporter};
