//! Tests of the command line as a real process, in a folder of its own: the runner with fake stages, then with the real
//! ones; and of what the documents promise.

#[cfg(feature = "stages")]
mod command;
mod commands;
#[cfg(feature = "stages")]
mod docs;
#[cfg(feature = "stages")]
mod floors;
mod foreseen;
mod harness;
mod import;
mod interrupts;
mod kills;
#[cfg(feature = "stages")]
mod limits;
mod names;
mod output;
#[cfg(feature = "stages")]
mod real;
#[cfg(feature = "stages")]
mod remote;
mod reports;
mod runs;
mod selection;
mod space;
