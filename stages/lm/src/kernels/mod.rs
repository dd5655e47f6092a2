//! Numeric loops on slices: what the engine spends its time in. Every one has a plain-tensor twin elsewhere.
//!
//! The only place of the crate where `unsafe` is allowed.

pub(crate) mod elementary;
pub(crate) mod head;
