//! The tokens that end a text, as configurations name them.

use serde::{Deserialize, Serialize};

/// The tokens that end a text, as configurations have them: one or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EndTokens {
    /// The only one.
    One(u32),
    /// All of them.
    Several(Vec<u32>),
}

impl EndTokens {
    /// All of them, in their order.
    pub fn as_slice(&self) -> &[u32] {
        match self {
            EndTokens::One(end) => std::slice::from_ref(end),
            EndTokens::Several(ends) => ends,
        }
    }
}
