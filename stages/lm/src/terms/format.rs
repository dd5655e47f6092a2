//! How the numbers of a matrix are written down in fewer bits than they are computed with.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A way to write numbers down: floats, or blocks of small integers that share scales, as GGUF files have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE half precision.
    F16,
    /// 16 bits, the upper half of F32.
    BF16,
    /// 4 bits and a scale.
    Q4_0,
    /// 4 bits, a scale and a minimum.
    Q4_1,
    /// 5 bits and a scale.
    Q5_0,
    /// 5 bits, a scale and a minimum.
    Q5_1,
    /// 8 bits and a scale.
    Q8_0,
    /// 2 bits, in blocks of blocks.
    #[serde(rename = "q2_k")]
    Q2K,
    /// 3 bits, in blocks of blocks.
    #[serde(rename = "q3_k")]
    Q3K,
    /// 4 bits, in blocks of blocks.
    #[serde(rename = "q4_k")]
    Q4K,
    /// 5 bits, in blocks of blocks.
    #[serde(rename = "q5_k")]
    Q5K,
    /// 6 bits, in blocks of blocks.
    #[serde(rename = "q6_k")]
    Q6K,
}

impl Format {
    /// All of them.
    pub(crate) const ALL: [Format; 13] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2K,
        Format::Q3K,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
    ];

    /// Its name, as ggml spells it.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::BF16 => "BF16",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q5_0 => "Q5_0",
            Format::Q5_1 => "Q5_1",
            Format::Q8_0 => "Q8_0",
            Format::Q2K => "Q2_K",
            Format::Q3K => "Q3_K",
            Format::Q4K => "Q4_K",
            Format::Q5K => "Q5_K",
            Format::Q6K => "Q6_K",
        }
    }

    /// Whether its numbers are integers in blocks.
    pub fn is_quantised(self) -> bool {
        self.block() > 1
    }

    /// Numbers that are written together: a row of a matrix has a multiple of so many.
    pub fn block(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q2K | Format::Q3K | Format::Q4K | Format::Q5K | Format::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => 2 + 16,
            Format::Q4_1 => 4 + 16,
            Format::Q5_0 => 2 + 4 + 16,
            Format::Q5_1 => 4 + 4 + 16,
            Format::Q8_0 => 2 + 32,
            Format::Q2K => 16 + 64 + 4,
            Format::Q3K => 32 + 64 + 12 + 2,
            Format::Q4K => 4 + 12 + 128,
            Format::Q5K => 4 + 12 + 32 + 128,
            Format::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Bytes of so many numbers; `None` where they do not fill blocks.
    pub fn bytes(self, count: usize) -> Option<usize> {
        count.is_multiple_of(self.block()).then(|| count / self.block() * self.block_bytes())
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
