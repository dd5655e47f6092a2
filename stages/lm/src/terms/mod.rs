//! What is asked for, in words: plain data and formulas that loops, operations and losses share.

pub(crate) mod activation;
pub(crate) mod divergence;
pub(crate) mod dropout;
pub(crate) mod format;
pub(crate) mod formula;
pub(crate) mod sampling;
pub(crate) mod top_k;
