//! What people see: a run as it goes on, what variants gained, the page that shows it, the graph.

pub(crate) mod answers;
pub(crate) mod card;
pub(crate) mod charts;
pub(crate) mod comparison;
mod console;
pub(crate) mod curves;
pub(crate) mod diary;
pub(crate) mod draw;
pub(crate) mod mlflow;
pub(crate) mod page;
pub(crate) mod scalars;
mod statistics;
pub(crate) mod table;
pub(crate) mod tfevents;

pub(crate) use console::{duration, reporter};
