//! Choosing the next token of every sequence, as [`sample`](crate::sample) does, and what follows from the choice: the
//! history grows, positions advance, finished sequences stop.

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};

use super::{Call, Module, module, rows_of};
use crate::terms::sampling::Sampling;

static MODULE: Module = module!("sample");

/// Threads that share a row.
const THREADS: u32 = 512;

/// Sequences that are being written, on the device. `[B]` where nothing else is said.
pub(crate) struct Writing {
    /// The tokens that end a response, however many.
    pub(crate) ends: CudaSlice<u32>,
    /// Folded row ids: what draws are keyed by.
    pub(crate) ids: CudaSlice<u32>,
    /// Tokens of each prompt.
    pub(crate) prompts: CudaSlice<u32>,
    /// Longest response of each.
    pub(crate) limits: CudaSlice<u32>,
    /// Tokens of each so far, prompt included.
    pub(crate) counts: CudaSlice<u32>,
    /// The position that the next token is fed at: that of the last one so far, and those of a soft prompt before it.
    pub(crate) positions: CudaSlice<u32>,
    /// The token to be fed next, coded as an input of an embedding.
    pub(crate) next: CudaSlice<i32>,
    /// Whether a sequence has ended, by an end token or its limit: 1, else 0. Nothing changes in one that has.
    pub(crate) finished: CudaSlice<u32>,
    /// Prompt and response, `[B, room]`.
    pub(crate) history: CudaSlice<u32>,
    /// Log-probability of each token of the response under the model as it is, `[B, most]`.
    pub(crate) log_probs: CudaSlice<f32>,
}

/// What draws are keyed by beside row and position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draws {
    pub(crate) seed: u64,
    pub(crate) time: u32,
    pub(crate) purpose: u32,
}

/// Chooses a token for each of the first rows of `writing` from `logits`, `[rows, V]`, and extends it by that.
/// Of the vocabulary only the first `tokens` are chosen from: the rest is padding.
///
/// The draw of the `k`th token of a response is `uniform(philox(seed, [k, row, time, purpose])[0])`. Weights of tokens are
/// counted in steps of 2^-40 of the largest one's, so that their sums have no rounding and no order. Positions advance by 1
/// except where the prompt has just been fed, which the host places at its last token's position first.
pub(crate) fn sample(
    device: &CudaDevice,
    logits: &impl DevicePtr<f32>,
    [vocabulary, tokens]: [usize; 2],
    writing: &mut Writing,
    sampling: &Sampling,
    draws: Draws,
) -> Result<()> {
    let rows = rows_of(logits.len(), vocabulary);
    let most_rows = writing.ids.len();
    assert!(rows <= most_rows, "rows that are written");
    let (room, most) = (writing.history.len() / most_rows.max(1), writing.log_probs.len() / most_rows.max(1));
    Call::named(device, &MODULE, "sample")
        .read(logits)
        .size(vocabulary)
        .size(tokens)
        .read(&writing.ids)
        .read(&writing.prompts)
        .read(&writing.limits)
        .write(&mut writing.counts)
        .write(&mut writing.positions)
        .write(&mut writing.next)
        .write(&mut writing.finished)
        .write(&mut writing.history)
        .size(room)
        .write(&mut writing.log_probs)
        .size(most)
        .float(sampling.temperature)
        .size(sampling.top_k)
        .float(sampling.top_p)
        .float(sampling.min_p)
        .float(sampling.repetition_penalty)
        .size(sampling.no_repeat_ngram)
        .size(draws.seed as usize)
        .size(draws.time as usize)
        .size(draws.purpose as usize)
        .read(&writing.ends)
        .size(writing.ends.len())
        .launch(rows as u32, THREADS, shared_bytes(vocabulary))
}

/// Shared memory in bytes: a bit a token twice, a bin each for counts and weights, and the weight of each 512 tokens.
fn shared_bytes(vocabulary: usize) -> usize {
    let words = vocabulary.div_ceil(32).next_multiple_of(2);
    2 * words * 4 + 2048 * 8 + vocabulary.div_ceil(512) * 8
}
