//! Choosing the next token from logits, with the semantics of Hugging Face's `generate`.
//!
//! A draw is given from outside as a uniform number, so that a choice is a pure function: it depends on no state, and
//! the batch a row is decoded in changes nothing.
//!
//! The order is: repetition penalty, no-repeat n-gram, temperature, top-k, top-p, min-p, draw.

use crate::kernels::elementary::{BLOCK, exp, max, sum_exp_block};
use crate::kernels::top_k::{rank, token_of};
pub use crate::terms::sampling::Sampling;

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the model's own distribution: over all rows of its head, temperature 1, no penalty, no filter.
    pub log_prob: f32,
}

/// Memory that [`choose`] uses again from token to token. What it holds never changes a choice.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Logits after penalty and n-grams.
    logits: Vec<f32>,
    /// Sum of the weights of each block of the vocabulary.
    block_sums: Vec<f64>,
    /// Tokens that the filters left: see [`rank`].
    ranked: Vec<u64>,
    /// The same in vocabulary order, with their weights.
    kept: Vec<(u32, f64)>,
}

/// Chooses the token whose share of [0, 1), in vocabulary order, holds `draw`.
///
/// `logits` are those of the model, `[V]`, of which the first `vocabulary` are of tokens and may be chosen, the rest being
/// padding; `history` is all before the token, prompt ++ response so far, ids below `vocabulary`;
/// `draw` is uniform in [0, 1) and not looked at when greedy, where the first of equal tokens wins. Where no-repeat
/// n-gram forbids every token, it is lifted. Finite logits are expected; with a NaN among them the choice is some
/// valid id.
///
/// Panics when `vocabulary` is 0 or more than V, or a token of `history` is not below it.
pub fn choose(
    logits: &[f32],
    vocabulary: usize,
    history: &[u32],
    sampling: &Sampling,
    draw: f32,
    scratch: &mut Scratch,
) -> Choice {
    let own = total_weight(logits, 1.0, &mut scratch.block_sums);
    let (all, logits) = (logits.len(), &logits[..vocabulary]);
    let token = if sampling.changes_logits() {
        let mut processed = std::mem::take(&mut scratch.logits);
        process(logits, history, sampling, &mut processed);
        let token = pick(&processed, sampling, draw, scratch);
        scratch.logits = processed;
        token
    } else if sampling.temperature == 1.0 && !sampling.filters() && vocabulary == all {
        // The sums are those of the distribution to draw from.
        draw_from_blocks(logits, own, 1.0, draw, &scratch.block_sums)
    } else {
        pick(logits, sampling, draw, scratch)
    };
    Choice { token: token as u32, log_prob: logits[token] - own.max - own.sum.ln() as f32 }
}

/// Chooses from a mixture of two models' distributions, `(1 - share) own + share other`, each after its own penalties,
/// temperature and filters: the teacher-mixed sampling of MiniLLM (Gu et al., 2024, section 2.2).
///
/// As [`choose`]; the log-probability is that of the mixture of the distributions as they are.
pub fn choose_mixed(
    [own, other]: [&[f32]; 2],
    share: f64,
    vocabulary: usize,
    history: &[u32],
    sampling: &Sampling,
    draw: f32,
    scratch: &mut Scratch,
) -> Choice {
    let [a, b] = [own, other].map(|logits| distribution(&logits[..vocabulary], history, sampling));
    let mixed = a.iter().zip(&b).map(|(a, b)| (1.0 - share) * f64::from(*a) + share * f64::from(*b));
    let total: f64 = mixed.clone().sum();
    let token = draw_from((0..).zip(mixed), f64::from(draw) * total);
    let mut probability = |logits: &[f32]| {
        let total = total_weight(logits, 1.0, &mut scratch.block_sums);
        (f64::from(logits[token as usize] - total.max) - total.sum.ln()).exp()
    };
    let mixed = (1.0 - share) * probability(own) + share * probability(other);
    Choice { token, log_prob: mixed.ln() as f32 }
}

/// The distribution that [`choose`] draws from, `[V]`; greedy gives all to one token.
pub fn distribution(logits: &[f32], history: &[u32], sampling: &Sampling) -> Vec<f32> {
    let mut processed = Vec::new();
    process(logits, history, sampling, &mut processed);
    let mut result = vec![0.0; logits.len()];
    if sampling.temperature == 0.0 {
        result[first_of_largest(&processed)] = 1.0;
        return result;
    }
    let mut scratch = Scratch::default();
    if !sampling.filters() {
        let Total { max, sum } = total_weight(&processed, sampling.temperature, &mut scratch.block_sums);
        let scale = scale(sampling.temperature);
        for (probability, logit) in result.iter_mut().zip(&processed) {
            *probability = (f64::from(exp((logit - max) * scale)) / sum) as f32;
        }
        return result;
    }
    keep(&processed, sampling, &mut scratch);
    let sum: f64 = scratch.kept.iter().map(|(_, weight)| weight).sum();
    for (token, weight) in scratch.kept {
        result[token as usize] = (weight / sum) as f32;
    }
    result
}

/// Logits with the repetition penalty and the n-grams that would occur again.
fn process(logits: &[f32], history: &[u32], sampling: &Sampling, processed: &mut Vec<f32>) {
    processed.clear();
    processed.extend_from_slice(logits);
    if sampling.repetition_penalty != 1.0 {
        for &token in history {
            // From the untouched logit: a token that occurred twice is punished once.
            let logit = logits[token as usize];
            let penalty = sampling.repetition_penalty;
            processed[token as usize] = if logit < 0.0 { logit * penalty } else { logit / penalty };
        }
    }
    let n = sampling.no_repeat_ngram;
    if n == 0 || history.len() < n {
        return;
    }
    let tail = &history[history.len() + 1 - n..];
    let forbidden = || history.windows(n).filter(|run| run[..n - 1] == *tail).map(|run| run[n - 1] as usize);
    let before: Vec<(usize, f32)> = forbidden().map(|token| (token, processed[token])).collect();
    for &(token, _) in &before {
        processed[token] = f32::NEG_INFINITY;
    }
    if processed.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        for (token, logit) in before {
            processed[token] = logit;
        }
    }
}

/// The token of `draw`, from logits that are ready but for temperature and filters.
fn pick(logits: &[f32], sampling: &Sampling, draw: f32, scratch: &mut Scratch) -> usize {
    if sampling.temperature == 0.0 {
        return first_of_largest(logits);
    }
    if !sampling.filters() {
        let total = total_weight(logits, sampling.temperature, &mut scratch.block_sums);
        return draw_from_blocks(logits, total, sampling.temperature, draw, &scratch.block_sums);
    }
    keep(logits, sampling, scratch);
    let total: f64 = scratch.kept.iter().map(|(_, weight)| weight).sum();
    draw_from(scratch.kept.iter().copied(), f64::from(draw) * total) as usize
}

fn first_of_largest(logits: &[f32]) -> usize {
    let largest = max(logits);
    logits.iter().position(|&logit| logit == largest).unwrap_or(0)
}

/// Sum of `exp((logit - max) / temperature)`, with the maximum.
#[derive(Clone, Copy)]
struct Total {
    max: f32,
    sum: f64,
}

fn total_weight(logits: &[f32], temperature: f32, block_sums: &mut Vec<f64>) -> Total {
    let (max, scale) = (max(logits), scale(temperature));
    block_sums.clear();
    block_sums.extend(logits.chunks(BLOCK).map(|block| f64::from(sum_exp_block(block, max, scale))));
    Total { max, sum: block_sums.iter().sum() }
}

/// Draws from the whole vocabulary: finds the block by its sum, and only there looks at single tokens.
fn draw_from_blocks(logits: &[f32], total: Total, temperature: f32, draw: f32, block_sums: &[f64]) -> usize {
    let threshold = f64::from(draw) * total.sum;
    let mut before = 0.0;
    let mut block = 0;
    for (index, &sum) in block_sums.iter().enumerate().filter(|&(_, &sum)| sum > 0.0) {
        // Without an end to this search the draw falls into the last block that has any weight.
        block = index;
        if before + sum > threshold {
            break;
        }
        before += sum;
    }
    let (start, scale) = (block * BLOCK, scale(temperature));
    let tokens = logits[start..].iter().take(BLOCK).enumerate();
    let weights = tokens.map(|(i, logit)| ((start + i) as u32, f64::from(exp((logit - total.max) * scale))));
    draw_from(weights, threshold - before) as usize
}

/// The first token up to which the weights exceed `threshold`; by rounding there may be none, then the last that has
/// a weight.
fn draw_from(weights: impl Iterator<Item = (u32, f64)>, threshold: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = 0;
    for (token, weight) in weights.filter(|(_, weight)| *weight > 0.0) {
        sum += weight;
        last = token;
        if sum > threshold {
            break;
        }
    }
    last
}

/// Finds the tokens that top-k, top-p and min-p leave, and their weights, in vocabulary order. At least one.
fn keep(logits: &[f32], sampling: &Sampling, scratch: &mut Scratch) {
    let Scratch { ranked, kept, block_sums, .. } = scratch;
    ranked.clear();
    let possible = logits.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY);
    ranked.extend(possible.map(|(token, &logit)| rank(token, logit)));
    if sampling.top_k > 0 && sampling.top_k < ranked.len() {
        let (_, &mut last, _) = ranked.select_nth_unstable_by(sampling.top_k - 1, |a, b| b.cmp(a));
        ranked.retain(|&key| key >> 32 >= last >> 32);
    }
    let (max, scale) = (max(logits), scale(sampling.temperature));
    let weight = |key: u64| f64::from(exp((logits[token_of(key)] - max) * scale));
    if sampling.top_p < 1.0 {
        let total = if sampling.top_k > 0 {
            // In order of rank, so that no detail of the selection shows in the last digit.
            ranked.sort_unstable_by(|a, b| b.cmp(a));
            ranked.iter().map(|&key| weight(key)).sum()
        } else {
            total_weight(logits, sampling.temperature, block_sums).sum
        };
        let count = nucleus(ranked, f64::from(sampling.top_p) * total, weight);
        ranked.truncate(count);
    }
    kept.clear();
    // The likeliest token weighs 1.
    let left = ranked.iter().map(|&key| (token_of(key) as u32, weight(key)));
    kept.extend(left.filter(|(_, weight)| *weight >= f64::from(sampling.min_p)));
    kept.sort_unstable_by_key(|(token, _)| *token);
    if kept.is_empty() {
        kept.push((first_of_largest(logits) as u32, 1.0));
    }
}

/// Brings the fewest best tokens that together weigh `needed` to the front, and counts them. Sorts only about as many
/// as it keeps.
fn nucleus(ranked: &mut [u64], needed: f64, weight: impl Fn(u64) -> f64) -> usize {
    let mut size = 64;
    loop {
        size = size.min(ranked.len());
        if size < ranked.len() {
            ranked.select_nth_unstable_by(size, |a, b| b.cmp(a));
        }
        let best = &mut ranked[..size];
        best.sort_unstable_by(|a, b| b.cmp(a));
        let mut sum = 0.0;
        for (count, &key) in best.iter().enumerate() {
            sum += weight(key);
            if sum >= needed {
                return count + 1;
            }
        }
        if size == ranked.len() {
            return size;
        }
        size *= 8;
    }
}

/// What logits are multiplied by. Finite also for the smallest temperature, so that the best token keeps its weight
/// of 1.
fn scale(temperature: f32) -> f32 {
    (1.0 / temperature).min(f32::MAX)
}

#[cfg(test)]
mod tests {
    use contract::random::{philox, uniform};
    use serde::Deserialize;

    use super::*;

    /// A case of the fixtures.
    #[derive(Deserialize)]
    struct Fixture {
        name: String,
        settings: Settings,
        history: Vec<u32>,
        logits: Vec<f32>,
        probabilities: Vec<f64>,
    }

    #[derive(Deserialize)]
    struct Settings {
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
        no_repeat_ngram_size: usize,
    }

    fn fixtures() -> Vec<(Fixture, Sampling)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/parity/sampling/cases.json");
        let fixtures: Vec<Fixture> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(fixtures.len() > 20);
        let sampling = |fixture: &Fixture| Sampling {
            temperature: fixture.settings.temperature,
            top_k: fixture.settings.top_k,
            top_p: fixture.settings.top_p,
            min_p: fixture.settings.min_p,
            repetition_penalty: fixture.settings.repetition_penalty,
            no_repeat_ngram: fixture.settings.no_repeat_ngram_size,
        };
        fixtures.into_iter().map(|fixture| (sampling(&fixture), fixture)).map(|(s, f)| (f, s)).collect()
    }

    fn draws(count: u32) -> impl Iterator<Item = f32> {
        (0..count).map(|i| uniform(philox(17, [i, 0, 0, 0])[0]))
    }

    /// Logits as of a trained model: a few good tokens and a long tail.
    fn lively_logits(count: usize, seed: u64) -> Vec<f32> {
        (0..count as u32).map(|i| -(uniform(philox(seed, [i, 0, 0, 0])[0]) + 1e-6).ln()).collect()
    }

    #[test]
    fn distributions_agree_with_the_ones_computed_by_others() {
        for (fixture, sampling) in fixtures() {
            sampling.validate().unwrap();
            let found = distribution(&fixture.logits, &fixture.history, &sampling);
            for (token, (&found, &right)) in found.iter().zip(&fixture.probabilities).enumerate() {
                assert_eq!(found > 0.0, right > 0.0, "{}: token {token} is kept or not", fixture.name);
                let gap = (f64::from(found) - right).abs();
                assert!(gap <= 1e-5 * right, "{}: token {token} has {found}, expected {right}", fixture.name);
            }
        }
    }

    /// Every choice is the inverse of the cumulated distribution, so [`choose`] and [`distribution`] cannot differ.
    #[test]
    fn choices_follow_the_distribution_in_vocabulary_order() {
        let mut scratch = Scratch::default();
        for (fixture, sampling) in fixtures() {
            for draw in draws(300).chain([0.0, 1.0 - f32::EPSILON / 2.0]) {
                let token = choose(
                    &fixture.logits,
                    fixture.logits.len(),
                    &fixture.history,
                    &sampling,
                    draw,
                    &mut scratch,
                )
                .token as usize;
                let before: f64 = fixture.probabilities[..token].iter().sum();
                let after = before + fixture.probabilities[token];
                let draw = f64::from(draw);
                assert!(fixture.probabilities[token] > 0.0, "{}: {token} at {draw}", fixture.name);
                assert!(before - 1e-6 <= draw && draw <= after + 1e-6, "{}: {token} at {draw}", fixture.name);
            }
        }
    }

    #[test]
    fn a_mixture_lies_between_its_parts_and_its_log_probability_is_its_own() {
        let [own, other] = [3, 4].map(|seed| lively_logits(700, seed));
        let softmax = |logits: &[f32]| {
            let weights: Vec<f64> = logits.iter().map(|logit| f64::from(*logit).exp()).collect();
            let sum: f64 = weights.iter().sum();
            weights.into_iter().map(|weight| weight / sum).collect::<Vec<_>>()
        };
        let (a, b) = (softmax(&own), softmax(&other));
        let (sampling, mut scratch) = (Sampling::default(), Scratch::default());
        for share in [0.0, 0.2, 1.0] {
            let mixed: Vec<f64> = a.iter().zip(&b).map(|(a, b)| (1.0 - share) * a + share * b).collect();
            for draw in draws(200) {
                let choice = choose_mixed([&own, &other], share, 700, &[], &sampling, draw, &mut scratch);
                let token = choice.token as usize;
                let before: f64 = mixed[..token].iter().sum();
                let draw = f64::from(draw);
                assert!(before - 1e-5 <= draw && draw <= before + mixed[token] + 1e-5, "{token} at {draw}");
                assert!((f64::from(choice.log_prob) - mixed[token].ln()).abs() < 1e-5);
            }
        }
        for draw in draws(50) {
            let alone = choose(&own, 700, &[], &sampling, draw, &mut scratch).token;
            assert_eq!(choose_mixed([&own, &other], 0.0, 700, &[], &sampling, draw, &mut scratch).token, alone);
        }
    }

    /// Pearson's chi-square statistic has mean k - 1 and deviation sqrt(2 (k - 1)); five deviations never happen by
    /// chance, and the draws are the same in every run anyway.
    #[test]
    fn frequencies_agree_with_probabilities() {
        let logits = lively_logits(2000, 3);
        let mut scratch = Scratch::default();
        let plain = Sampling::default();
        let all = [
            plain.clone(),
            Sampling { temperature: 0.7, ..plain.clone() },
            Sampling { temperature: 1.5, top_k: 40, ..plain.clone() },
            Sampling { top_p: 0.9, repetition_penalty: 1.2, ..plain },
        ];
        for sampling in all {
            let history = [1, 5, 9];
            let probabilities = distribution(&logits, &history, &sampling);
            let mut counts = vec![0_u32; logits.len()];
            let total = 20_000;
            for draw in draws(total) {
                counts[choose(&logits, logits.len(), &history, &sampling, draw, &mut scratch).token as usize] += 1;
            }
            // Tokens expected less than ten times are taken together.
            let (mut cells, mut rare) = (Vec::new(), (0.0, 0.0));
            for (&count, &probability) in counts.iter().zip(&probabilities) {
                let (count, expected) = (f64::from(count), f64::from(probability) * f64::from(total));
                if expected < 10.0 {
                    rare = (rare.0 + count, rare.1 + expected);
                } else {
                    cells.push((count, expected));
                }
            }
            cells.extend((rare.1 > 1.0).then_some(rare));
            let statistic: f64 = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
            let freedom = cells.len() as f64 - 1.0;
            assert!(freedom > 5.0);
            let deviations = (statistic - freedom) / (2.0 * freedom).sqrt();
            assert!(deviations.abs() < 5.0, "{sampling:?}: {statistic} at {freedom} degrees of freedom");
        }
    }

    #[test]
    fn filters_keep_what_a_full_sort_keeps() {
        let logits = lively_logits(30_000, 8);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let weights: Vec<f64> = order.iter().map(|&i| f64::from(logits[i] - logits[order[0]]).exp()).collect();
        let total: f64 = weights.iter().sum();
        for top_p in [0.01, 0.3, 0.9, 0.99, 0.9999] {
            let sampling = Sampling { top_p, ..Sampling::default() };
            let kept = distribution(&logits, &[], &sampling).iter().filter(|p| **p > 0.0).count();
            let mut sum = 0.0;
            let right = 1 + weights
                .iter()
                .position(|w| {
                    sum += w;
                    sum >= f64::from(top_p) * total
                })
                .unwrap();
            // The last digit of the sums may decide about one token.
            assert!(kept.abs_diff(right) <= 1, "{kept} kept at {top_p}, expected {right}");
        }
        for top_k in [1, 64, 5000] {
            let sampling = Sampling { top_k, ..Sampling::default() };
            let found = distribution(&logits, &[], &sampling);
            let worst = logits[order[top_k - 1]];
            for (logit, probability) in logits.iter().zip(found) {
                assert_eq!(probability > 0.0, *logit >= worst);
            }
        }
    }

    #[test]
    fn of_equal_tokens_the_lower_ids_stay_and_the_first_is_the_greedy_one() {
        let logits = [0.0, 2.0, 2.0, -1.0, 2.0];
        let kept = |sampling: Sampling| -> Vec<usize> {
            let probabilities = distribution(&logits, &[], &sampling);
            (0..5).filter(|&i| probabilities[i] > 0.0).collect()
        };
        assert_eq!(kept(Sampling { top_p: 0.5, ..Sampling::default() }), [1, 2]);
        assert_eq!(kept(Sampling { top_p: 1e-6, ..Sampling::default() }), [1]);
        // Top-k keeps all that are as good as the last.
        assert_eq!(kept(Sampling { top_k: 2, ..Sampling::default() }), [1, 2, 4]);
        assert_eq!(kept(Sampling::greedy()), [1]);
        let mut scratch = Scratch::default();
        assert_eq!(choose(&logits, logits.len(), &[], &Sampling::greedy(), 0.99, &mut scratch).token, 1);
    }

    #[test]
    fn greedy_obeys_penalty_and_ngrams() {
        let logits = [1.0, 3.0, 2.9, -1.0];
        let mut scratch = Scratch::default();
        let mut greedy = |history: &[u32], sampling: Sampling| {
            choose(&logits, logits.len(), history, &Sampling { temperature: 0.0, ..sampling }, 0.0, &mut scratch).token
        };
        assert_eq!(greedy(&[1], Sampling::default()), 1);
        assert_eq!(greedy(&[1], Sampling { repetition_penalty: 1.1, ..Sampling::default() }), 2);
        assert_eq!(greedy(&[0, 1, 0], Sampling { no_repeat_ngram: 2, ..Sampling::default() }), 2);
        assert_eq!(
            greedy(&[0, 1, 2, 3], Sampling { no_repeat_ngram: 1, ..Sampling::default() }),
            1,
            "all are forbidden"
        );
    }

    #[test]
    fn log_probabilities_are_the_models_own() {
        let logits = lively_logits(777, 4);
        let log_sum = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let mut scratch = Scratch::default();
        let everything = Sampling {
            temperature: 0.5,
            top_k: 9,
            top_p: 0.8,
            min_p: 0.1,
            repetition_penalty: 1.5,
            no_repeat_ngram: 1,
        };
        for sampling in [Sampling::default(), Sampling::greedy(), everything] {
            for draw in draws(20) {
                let choice = choose(&logits, logits.len(), &[3, 4, 5], &sampling, draw, &mut scratch);
                let right = f64::from(logits[choice.token as usize]) - log_sum;
                assert!((f64::from(choice.log_prob) - right).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn extreme_logits_and_temperatures_give_a_token_with_weight() {
        let mut scratch = Scratch::default();
        let logits = [f32::NEG_INFINITY, 300.0, -300.0, 299.0, f32::NEG_INFINITY];
        for temperature in [f32::MIN_POSITIVE / 4.0, 1e-3, 1.0, 1e6] {
            for (top_k, top_p) in [(0, 1.0), (2, 1.0), (0, 0.5)] {
                let sampling = Sampling { temperature, top_k, top_p, ..Sampling::default() };
                for draw in draws(50).chain([0.0, 1.0 - f32::EPSILON / 2.0]) {
                    let choice = choose(&logits, logits.len(), &[], &sampling, draw, &mut scratch);
                    assert!([1, 2, 3].contains(&choice.token), "{sampling:?}");
                    assert!(temperature > 1e-2 || choice.token == 1);
                }
            }
        }
        let forbidden = [f32::NEG_INFINITY; 3];
        let sampling = Sampling { top_k: 2, ..Sampling::default() };
        assert!(choose(&forbidden, forbidden.len(), &[], &sampling, 0.5, &mut scratch).token < 3);
        assert!(choose(&[f32::NAN, 1.0], 2, &[], &Sampling::default(), 0.5, &mut scratch).token < 2);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let message = |sampling: Sampling| sampling.validate().unwrap_err().to_string();
        let plain = Sampling::default;
        assert_eq!(
            message(Sampling { temperature: -1.0, ..plain() }),
            "`temperature` is -1, expected a number of at least 0"
        );
        assert_eq!(
            message(Sampling { top_p: 0.0, ..plain() }),
            "`top_p` is 0, expected a number above 0 and at most 1"
        );
        assert_eq!(
            message(Sampling { repetition_penalty: 0.0, ..plain() }),
            "`repetition_penalty` is 0, expected a number above 0"
        );
        assert!(serde_json::from_str::<Sampling>(r#"{"topk": 3}"#).is_err());
        assert_eq!(serde_json::from_str::<Sampling>(r#"{"top_k": 3}"#).unwrap(), Sampling { top_k: 3, ..plain() });
    }

    #[test]
    fn padding_is_never_chosen_however_likely_and_counts_in_the_softmax() {
        let tokens = 700;
        let padded: Vec<f32> = lively_logits(tokens, 3).into_iter().chain([9.0; 68]).collect();
        let all: f64 = padded.iter().map(|&logit| f64::from(logit).exp()).sum();
        let mut scratch = Scratch::default();
        for sampling in [
            Sampling::default(),
            Sampling::greedy(),
            Sampling { top_k: 5, ..Sampling::default() },
            Sampling { top_p: 0.9, temperature: 0.7, ..Sampling::default() },
            Sampling { repetition_penalty: 1.3, no_repeat_ngram: 1, ..Sampling::default() },
        ] {
            for draw in draws(200).chain([0.0, 1.0 - f32::EPSILON / 2.0]) {
                let found = choose(&padded, tokens, &[4, 9], &sampling, draw, &mut scratch);
                let alone = choose(&padded[..tokens], tokens, &[4, 9], &sampling, draw, &mut scratch);
                assert_eq!(found.token, alone.token, "{sampling:?}");
                let right = f64::from(padded[found.token as usize]) - all.ln();
                assert!((f64::from(found.log_prob) - right).abs() < 1e-5, "{} {right}", found.log_prob);
            }
        }
    }
}
