//! What the runner and the stages agree on.
//!
//! The runner reads YAML, computes keys, starts processes and drives loops; stages do the work. They meet here:
//! a [`Kind`] describes itself (configuration, typed ports, clocks) and starts an [`Operator`]; operators exchange
//! [`Value`]s, each of which can be written to a folder and read back without losing a bit. That last property is what
//! lets the runner cut a loop anywhere, so no value may keep anything outside of what it saves.
//!
//! This crate knows no tensor, no YAML and no key.

pub mod clock;
pub mod dataset;
pub mod facts;
pub mod files;
pub mod kind;
pub mod limits;
pub mod location;
pub mod outlook;
pub mod port;
pub mod random;
pub mod scoring;
pub mod tokenizer;
pub mod value;

pub use clock::Step;
pub use dataset::{Dataset, End, Row};
pub use facts::{Bounds, Facts, Longest, Vocabulary};
pub use kind::{
    About, Alone, Check, ConfigError, Conventions, Env, Kind, Needs, Operator, Registry, Sink, Source, Stage,
    VISIBLE_CARDS,
};
pub use location::{FileDigest, HubPath, Location, WebFile};
pub use outlook::{Cause, Finding, Learner, Machine, Outlook};
pub use port::{Port, PortType, Ports};
pub use scoring::{Extraction, Scoring};
pub use tokenizer::TokenizerFile;
pub use value::{AnyValue, Folder, Inputs, Metrics, Outputs, Predictions, Value};

/// Errors cross the contract as text with a chain of causes; the runner adds which stage and where its log is.
pub type Result<T, E = anyhow::Error> = std::result::Result<T, E>;
