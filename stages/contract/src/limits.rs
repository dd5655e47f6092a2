//! How far numbers in a pipeline file may go.
//!
//! A field's schema carries its limits, as a range: from there come the refusal with file and line, the page of
//! `pipeline stages KIND` and what editors say. What lies within them may still be too much for a machine: sizes are judged
//! by the memory they take, lengths by the positions of models.

/// Rows of a file, a split, a window.
pub const ROWS: u64 = 1 << 31;
/// Rows that go through a model at once.
pub const BATCH: u64 = 1 << 20;
/// Tokens of a text, positions of a model, vectors of a soft prompt.
pub const TOKENS: u64 = 1 << 24;
/// Ids of a vocabulary.
pub const VOCABULARY: u64 = 1 << 24;
/// Blocks of a model.
pub const LAYERS: u64 = 1 << 12;
/// Channels of a hidden state, or inside a feed-forward layer.
pub const WIDTH: u64 = 1 << 20;
/// Heads of attention.
pub const HEADS: u64 = 1 << 12;
/// Base of rotary angles.
pub const ROPE_THETA: f64 = 1e12;
/// Updates, rounds, epochs: more than a century of them.
pub const UPDATES: u64 = 1 << 40;
/// Times that something must occur.
pub const COUNT: u64 = 1 << 40;
/// Any seed.
pub const SEED: u64 = u64::MAX;
/// Learning rates.
pub const LEARNING_RATE: f64 = 1e3;
/// What a term counts in a loss.
pub const WEIGHT: f64 = 1e6;
/// Weight decay: with the learning rate, the share that is taken away in an update.
pub const WEIGHT_DECAY: f64 = 1e3;
/// Norms of gradients.
pub const NORM: f64 = 1e9;
/// Exponents of probabilities.
pub const EXPONENT: f64 = 1e2;
/// Logits divided by less overflow, divided by more they are all alike in f32.
pub const TEMPERATURE: (f64, f64) = (1e-3, 1e3);
/// Repetition penalties.
pub const PENALTY: (f64, f64) = (1e-3, 1e3);
/// Seconds that a program may take: three years.
pub const SECONDS: f64 = 1e8;
