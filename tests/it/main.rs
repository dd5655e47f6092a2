//! Tests of the command line: the runner with fake stages as a real process, in a folder of its own.

mod commands;
mod harness;
mod interrupts;
mod runs;
