//! Writing: batched decoding with a cache of keys and values.
//!
//! Rows come and go: every pass feeds the new token of each row that is being written and the whole prompt of each row
//! that has just been admitted; a finished row leaves at once and makes room for the next. A row's tokens do not depend
//! on that: on the CPU every operation gives a row the same bits whoever shares the pass, and draws are keyed by row and
//! position.

use anyhow::{Context, bail, ensure};
use candle_core::Tensor;
use contract::dataset::{answer, row_name};
use contract::random::{philox, uniform};
use contract::{End, Result};
use rayon::prelude::*;

use self::cpu::{Cache, Decoder};
use self::sample::{Choice, Scratch, choose, choose_mixed};
#[cfg(feature = "cuda")]
use crate::dtype::Dtype;
use crate::finite::NotFinite;
use crate::kernels::elementary::all_finite;
use crate::model::LanguageModel;
use crate::terms::sampling::Sampling;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod sample;

/// How to write.
#[derive(Clone, Debug)]
pub struct Generate {
    /// How a token is chosen.
    pub sampling: Sampling,
    /// Longest response, end token included.
    pub max_new_tokens: usize,
    /// Longest prompt with its response, as those who read them ask; [`usize::MAX`] for none.
    pub longest: usize,
    /// The stage's seed.
    pub seed: u64,
    /// What the draws are for: [`contract::random::purpose::GENERATE`] or [`contract::random::purpose::EVALUATE`].
    pub purpose: u32,
    /// Epoch or round: another one, other draws.
    pub time: u32,
    /// Rows decoded together; changes speed and memory, no draw.
    pub batch: usize,
}

/// Another model that has a say in every token.
#[derive(Clone, Copy)]
pub struct Mixed<'a> {
    /// It knows the same tokens.
    pub teacher: &'a LanguageModel,
    /// What its distribution counts, from 0 to 1; that of the model which writes counts the rest.
    pub share: f64,
}

/// What to continue.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Row id: what the draws are keyed by.
    pub row: u64,
    /// Token ids, at least one.
    pub ids: &'a [u32],
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Token ids, with the end token if it came.
    pub ids: Vec<u32>,
    /// Log-probability of each under the model as it is: temperature 1, nothing filtered.
    pub log_probs: Vec<f32>,
    /// Whether the end token came.
    pub end: End,
}

impl Generated {
    /// What was said, without the token that ended it.
    pub fn answer(&self) -> &[u32] {
        answer(&self.ids, self.end)
    }
}

fn how_ended(response: &[u32], ends: &[u32]) -> End {
    if response.last().is_some_and(|last| ends.contains(last)) { End::Stop } else { End::Length }
}

/// Continues every prompt until one of the model's end tokens, `max_new_tokens`, `longest`, or the end of the model's positions.
///
/// The vectors of `soft_prompt`, `[n, C]`, stand before every prompt. The draw for the `k`th token of a response (from 0)
/// is keyed by `(seed, [k, row, time, purpose])`. `progress` is told how many rows are finished.
///
/// Errors when a prompt is empty, holds an unknown id, or is longer than the model's positions, and with [`NotFinite`] when
/// the distribution of a next token is not made of numbers.
pub fn generate(
    model: &LanguageModel,
    soft_prompt: Option<&Tensor>,
    prompts: &[Prompt<'_>],
    options: &Generate,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Generated>> {
    check(model, soft_prompt, prompts, options)?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = model.device() {
        // The kernels that write know whole matrices alone.
        let whole = model.has_adapter().then(|| model.merged()?.computed_in(model.dtype())).transpose()?;
        let model = whole.as_ref().unwrap_or(model);
        let generated = match model.dtype() {
            Dtype::F32 => cuda::generate::<f32>(device, model, soft_prompt, prompts, options, progress),
            Dtype::Bf16 => cuda::generate::<half::bf16>(device, model, soft_prompt, prompts, options, progress),
        }?;
        let finite = |generated: &Generated| generated.log_probs.iter().all(|log| log.is_finite());
        return match generated.iter().position(|generated| !finite(generated)) {
            Some(index) => bail!(NotFinite { index }),
            None => Ok(generated),
        };
    }
    write(model, soft_prompt, None, prompts, options, progress)
}

/// The same by two models: every token is drawn from a mixture of their distributions. Its log-probability is that of the
/// mixture. On a GPU this computes every row whole for each token.
///
/// Errors as [`generate`] does, for either model.
pub fn generate_mixed(
    model: &LanguageModel,
    mixed: Mixed<'_>,
    prompts: &[Prompt<'_>],
    options: &Generate,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Generated>> {
    check(model, None, prompts, options)?;
    check(mixed.teacher, None, prompts, options).context("of the teacher who has a say")?;
    write(model, None, Some(mixed), prompts, options, progress)
}

fn write(
    model: &LanguageModel,
    soft_prompt: Option<&Tensor>,
    mixed: Option<Mixed<'_>>,
    prompts: &[Prompt<'_>],
    options: &Generate,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Generated>> {
    let prompt_length = soft_prompt.map_or(0, |prompt| prompt.dims()[0]);
    let ends = model.ends();
    let mut waiting: Vec<usize> = (0..prompts.len()).collect();
    // Rows of one length take turns: those admitted together tend to need caches of one size. The longest come last
    // here, so that they are taken first.
    waiting.sort_by_key(|i| prompts[*i].ids.len());
    let mut finished: Vec<Option<Generated>> = vec![None; prompts.len()];
    let mut decoder = Decoder::new(model, soft_prompt)?;
    let mut other = mixed.map(|mixed| Decoder::of_other(mixed.teacher)).transpose()?;
    let vocabulary = mixed.map_or(usize::MAX, |mixed| mixed.teacher.vocabulary()).min(model.vocabulary());
    let mut rows: Vec<Row> = Vec::new();
    let mut done = 0;
    loop {
        while rows.len() < options.batch.max(1) {
            let Some(index) = waiting.pop() else { break };
            let prompt = &prompts[index];
            let most = mixed.map_or(usize::MAX, |mixed| room(mixed.teacher, 0, prompt, options));
            let row = Row::new(index, prompt, most.min(room(model, prompt_length, prompt, options)));
            rows.push(row);
        }
        rows.retain_mut(|row| {
            let finished_now = row.is_finished(ends);
            if finished_now {
                finished[row.index] = Some(row.finish(ends));
                done += 1;
                progress(done);
            }
            !finished_now
        });
        if rows.is_empty() {
            if waiting.is_empty() {
                break;
            }
            continue;
        }
        // In one go on a thread of the pool: going there for each of its many small loops would cost more than they do.
        rayon::scope(|_| {
            let logits = decoder.logits(&mut rows)?;
            if let Some((mixed, other)) = mixed.zip(other.as_mut()) {
                let others = other.logits(&mut rows)?;
                let pairs = logits
                    .par_chunks_exact(model.vocab_size())
                    .zip(others.par_chunks_exact(mixed.teacher.vocab_size()));
                let with_logits = rows.par_iter_mut().zip(pairs);
                with_logits
                    .for_each(|(row, (own, other))| row.extend_mixed([own, other], mixed.share, vocabulary, options));
                return Ok(());
            }
            let with_logits = rows.par_iter_mut().zip(logits.par_chunks_exact(model.vocab_size()));
            with_logits.for_each(|(row, logits)| row.extend(logits, vocabulary, options));
            Ok::<_, anyhow::Error>(())
        })?;
        if let Some(row) = rows.iter().find(|row| row.log_probs.last().is_some_and(|log| !log.is_finite())) {
            bail!(NotFinite { index: row.index });
        }
    }
    finished.into_iter().map(|row| row.context("a row was never finished")).collect()
}

/// The longest response to a prompt.
fn room(model: &LanguageModel, soft_length: usize, prompt: &Prompt<'_>, options: &Generate) -> usize {
    let own = model.config.positions() - soft_length - prompt.ids.len();
    options.max_new_tokens.min(own).min(options.longest.saturating_sub(prompt.ids.len()))
}

fn check(
    model: &LanguageModel,
    soft_prompt: Option<&Tensor>,
    prompts: &[Prompt<'_>],
    options: &Generate,
) -> Result<()> {
    options.sampling.validate()?;
    let prompt_length = match soft_prompt {
        Some(prompt) => {
            let (length, width) = prompt.dims2().context("a soft prompt has shape [length, width]")?;
            ensure!(width == model.width(), "soft prompt of width {width} for a model of width {}", model.width());
            length
        }
        None => 0,
    };
    for prompt in prompts {
        ensure!(!prompt.ids.is_empty(), "{} has an empty prompt: nothing to continue", row_name(prompt.row));
        let length = prompt.ids.len() + prompt_length;
        ensure!(
            length <= model.config.positions(),
            "the prompt of {} has {length} tokens: the model has {} positions, so shorten it",
            row_name(prompt.row),
            model.config.positions()
        );
        if let Some(id) = prompt.ids.iter().find(|id| **id as usize >= model.vocabulary()) {
            bail!(
                "{} has token id {id}, not in the model's vocabulary of {}",
                row_name(prompt.row),
                model.vocabulary()
            );
        }
    }
    Ok(())
}

/// A row that is being written.
struct Row {
    /// Its place among the prompts.
    index: usize,
    id: u64,
    /// Prompt and response so far.
    ids: Vec<u32>,
    prompt: usize,
    log_probs: Vec<f32>,
    /// Longest response.
    limit: usize,
    /// Of the model, and of another that has a say.
    caches: [Cache; 2],
    scratch: Scratch,
}

impl Row {
    fn new(index: usize, prompt: &Prompt<'_>, limit: usize) -> Self {
        Row {
            index,
            id: prompt.row,
            ids: prompt.ids.to_vec(),
            prompt: prompt.ids.len(),
            log_probs: Vec::new(),
            limit,
            caches: Default::default(),
            scratch: Scratch::default(),
        }
    }

    /// The draw for the next token.
    fn draw(&self, options: &Generate) -> f32 {
        let position = self.log_probs.len() as u32;
        let row = (self.id ^ self.id >> 32) as u32;
        let [word, ..] = philox(options.seed, [position, row, options.time, options.purpose]);
        uniform(word)
    }

    fn extend(&mut self, logits: &[f32], vocabulary: usize, options: &Generate) {
        let draw = self.draw(options);
        let choice = choose(logits, vocabulary, &self.ids, &options.sampling, draw, &mut self.scratch);
        self.push(choice, all_finite(logits));
    }

    fn extend_mixed(&mut self, logits: [&[f32]; 2], share: f64, vocabulary: usize, options: &Generate) {
        let draw = self.draw(options);
        let Row { ids, scratch, .. } = self;
        let choice = choose_mixed(logits, share, vocabulary, ids, &options.sampling, draw, scratch);
        self.push(choice, logits.into_iter().all(all_finite));
    }

    fn push(&mut self, choice: Choice, finite: bool) {
        let Choice { token, log_prob } = choice;
        self.ids.push(token);
        self.log_probs.push(if finite { log_prob } else { f32::NAN });
    }

    fn is_finished(&self, ends: &[u32]) -> bool {
        self.log_probs.len() >= self.limit || how_ended(&self.ids[self.prompt..], ends) == End::Stop
    }

    fn finish(&mut self, ends: &[u32]) -> Generated {
        let ids = self.ids.split_off(self.prompt);
        let end = how_ended(&ids, ends);
        Generated { ids, log_probs: std::mem::take(&mut self.log_probs), end }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use contract::TokenizerFile;

    use serde_json::{Value as Json, json};

    use super::cpu::{TOGETHER, together};
    use super::*;
    use crate::families::{Architecture, Family};

    #[test]
    fn rows_with_many_new_tokens_go_in_parts() {
        let ids = [3; 3 * TOGETHER];
        let lengths = [400, 600, 25, 1, TOGETHER + 5, 1, 1];
        let row = |index: usize| Row::new(index, &Prompt { row: 0, ids: &ids[..lengths[index]] }, 8);
        let mut rows: Vec<Row> = (0..lengths.len()).map(row).collect();
        let parts = together(&mut rows, |row| row.ids.len());
        assert!(parts.iter().map(|rows| rows.len()).eq([2, 2, 1, 2]));
        assert!(parts.into_iter().flatten().map(|row| row.index).eq(0..lengths.len()));
    }

    #[test]
    fn a_step_with_a_cache_gives_the_logits_of_a_whole_pass() {
        let shape = |family| Architecture { heads: Some(4), positions: Some(90), ..Architecture::new(family, 3, 32) };
        let shared = |family| Architecture { kv_heads: Some(2), ..shape(family) };
        for (architecture, more) in [
            (shape(Family::Gpt2), json!({})),
            (shared(Family::Llama), json!({})),
            (shape(Family::Opt), json!({})),
            (shared(Family::Mistral), json!({"sliding_window": 20})),
            (shared(Family::Mistral), json!({"sliding_window": 1})),
            (shared(Family::Qwen2), json!({"use_sliding_window": true, "sliding_window": 37, "max_window_layers": 1})),
            (shared(Family::Qwen3), json!({})),
            (shape(Family::GptNeox), json!({})),
        ] {
            steps_are_whole_passes(&architecture, &more);
        }
    }

    fn steps_are_whole_passes(architecture: &Architecture, more: &Json) {
        let tokenizer = TokenizerFile::new("", 0, 31);
        let mut model = LanguageModel::init(architecture, tokenizer, 3, &Device::Cpu).unwrap();
        model.config = model.config.with(more);
        let soft = Tensor::ones((5, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
        for soft_prompt in [None, Some(&soft)] {
            let mut decoder = Decoder::new(&model, soft_prompt).unwrap();
            let text: Vec<u32> = (0..80).map(|t| (t * 7) % 31).collect();
            // A row that joins late, one longer than a block of queries, a short one.
            let row = |index, length| Row::new(index, &Prompt { row: index as u64, ids: &text[..length] }, 8);
            let mut rows = vec![row(0, 70), row(1, 2)];
            for step in 0..6 {
                if step == 3 {
                    rows.push(row(2, 33));
                }
                let plain = decoder.logits_plain(&rows).unwrap();
                let cached = decoder.logits(&mut rows).unwrap();
                assert_eq!(plain.len(), cached.len());
                for (cached, plain) in cached.iter().zip(&plain) {
                    assert!((cached - plain).abs() < 1e-5, "step {step}: {cached} {plain}");
                }
                for row in &mut rows {
                    row.ids.push((step * 11 + row.index as u32) % 31);
                }
            }
        }
    }
}
