//! Random dropping of elements in training.

/// Random dropping of elements in training. The rates are the model's.
///
/// A mask is a function of the seed, the update, the purpose with the place in the model, the row id and the position:
/// it does not change with the batch a row is in, nor with how a batch is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropout {
    /// The stage's seed.
    pub seed: u64,
    /// The update, from 0.
    pub update: u32,
    /// [`contract::random::purpose::DROPOUT`] or [`contract::random::purpose::TEACHER_DROPOUT`].
    pub purpose: u32,
}
