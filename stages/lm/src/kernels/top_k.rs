//! The K most likely tokens of a distribution with the rest as one class, and divergences between such coarse
//! distributions.
//!
//! Letters: N rows, V vocabulary, K tokens that stand for themselves, `rest` the other V - K.

use std::collections::BinaryHeap;

use super::adaptive::share_of_head;
use super::elementary::{LOG_FLOOR, Normaliser, all_finite, exp, max};
use crate::terms::divergence::{Divergence, Rule, Token, for_rule};
use crate::terms::top_k::Classes;

/// Finds the `tokens.len()` most likely tokens of `softmax(logits * scale)`, best first and of equal ones the lower id
/// first, with their log-probabilities. Returns the logarithm of the mass of the others. `logits` are used up.
pub(crate) fn most_likely(logits: &mut [f32], scale: f32, tokens: &mut [u32], log_probs: &mut [f32]) -> f32 {
    let normaliser = Normaliser::of(logits, scale);
    tokens.copy_from_slice(&best(logits, tokens.len()));
    for (token, log_prob) in tokens.iter().zip(log_probs) {
        *log_prob = normaliser.log_probability(logits[*token as usize]);
    }
    let rest = Rest::of(logits, tokens, scale);
    rest.map_or(LOG_FLOOR, |rest| floored(rest.log_mass(normaliser)))
}

/// The ids of the `count` largest logits, in order.
pub(crate) fn best(logits: &[f32], count: usize) -> Vec<u32> {
    // The smallest of those kept lies on top: most logits are dismissed by one comparison with it.
    let mut kept = BinaryHeap::with_capacity(count + 1);
    let mut least = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if kept.len() < count {
            kept.push(std::cmp::Reverse(rank(token, logit)));
        } else if logit > least {
            kept.pop();
            kept.push(std::cmp::Reverse(rank(token, logit)));
        } else {
            continue;
        }
        least = kept.peek().map_or(least, |worst| logits[token_of(worst.0)]);
    }
    kept.into_sorted_vec().into_iter().map(|kept| token_of(kept.0) as u32).collect()
}

/// The softmax of the rest alone.
#[derive(Clone, Copy)]
struct Rest(Normaliser);

impl Rest {
    /// Puts negative infinity in the place of `tokens`; `None` where nothing remains.
    fn of(logits: &mut [f32], tokens: &[u32], scale: f32) -> Option<Self> {
        for &token in tokens {
            logits[token as usize] = f32::NEG_INFINITY;
        }
        if max(logits) == f32::NEG_INFINITY && logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            return None;
        }
        Some(Rest(Normaliser::of(logits, scale)))
    }

    /// Logarithm of its mass in the softmax of all.
    fn log_mass(self, all: Normaliser) -> f32 {
        (self.0.max - all.max) * all.scale + self.0.log_sum - all.log_sum
    }
}

/// At least [`LOG_FLOOR`]; a NaN stays one.
fn floored(log: f32) -> f32 {
    if log < LOG_FLOOR { LOG_FLOOR } else { log }
}

/// A class that counts for nothing.
pub(crate) const NO_CLASS: u32 = u32::MAX;

/// Log-probabilities of classes, `log_probs`, of the tokens of `softmax(logits * scale)`, where the token at each place is of the class
/// in `classes`: those of the tokens of a class are added up. Of those that are of no class it is as if they were not there.
pub(crate) fn of_classes(logits: &[f32], scale: f32, classes: &[u32], log_probs: &mut [f32]) {
    let counted = || logits.iter().zip(classes).filter(|(_, class)| **class != NO_CLASS);
    let max = counted().fold(f32::NEG_INFINITY, |most, (logit, _)| if *logit > most { *logit } else { most });
    let mut sums = vec![0.0_f64; log_probs.len()];
    for (logit, class) in counted() {
        sums[*class as usize] += (f64::from(*logit - max) * f64::from(scale)).exp();
    }
    let all: f64 = sums.iter().sum();
    for (sum, log_prob) in sums.iter().zip(log_probs) {
        *log_prob = floored((sum / all).ln() as f32);
    }
}

/// Divergence of an event's probability `exp(log_s)` from `exp(log_t)`, as of distributions over the event and its opposite, and its
/// derivative by `log_s`. No event is quite certain: its opposite has a probability of 1e-12 at least.
pub(crate) fn of_event(divergence: Divergence, log_s: f64, log_t: f64) -> (f64, f64) {
    let least = f64::from(LOG_FLOOR);
    let with_opposite = |log: f64| {
        let log = log.clamp(least, -1e-12);
        [log, (-log.exp_m1()).ln().max(least)]
    };
    let (s, t) = (with_opposite(log_s), with_opposite(log_t));
    let summand = |index: usize| {
        let (log_s, log_t) = (s[index], t[index]);
        let token = Token { s: log_s.exp() as f32, log_s: log_s as f32, t: log_t.exp() as f32, log_t: log_t as f32 };
        let summand = for_rule!(divergence, R(a, b) => R::summand(token, a as f32, b as f32));
        (f64::from(summand.value), f64::from(summand.slope))
    };
    let ((value, slope), (value_of_opposite, slope_of_opposite)) = (summand(0), summand(1));
    // What the event gains its opposite loses.
    (value + value_of_opposite, slope - slope_of_opposite * (s[0] - s[1]).exp())
}

/// Divergence of `softmax(logits / temperature)`, made as coarse as `target`, from `target`. Adds `factor` times its
/// derivative by `logits` to `slopes`, unless that is empty. `scratch` has the length of `logits`.
///
/// With `h = s df/ds` of every class and `H` their sum, the derivative is `(h - s H) / temperature` for a token that
/// stands for itself. One of the rest gets its share, by its probability among the rest, of that of the rest's class.
pub(crate) fn divergence(
    divergence: Divergence,
    logits: &[f32],
    target: Classes<'_>,
    scratch: &mut [f32],
    temperature: f64,
    factor: f64,
    slopes: &mut [f32],
) -> f64 {
    if !all_finite(logits) {
        return f64::NAN;
    }
    let scale = (1.0 / temperature) as f32;
    scratch.copy_from_slice(logits);
    let rest = Rest::of(scratch, target.tokens, scale);
    let all = normaliser(logits, target.tokens, rest, scale);
    let log_s = |token: &u32| all.log_probability(logits[*token as usize]);
    let log_s_of_rest = rest.map_or(LOG_FLOOR, |rest| floored(rest.log_mass(all)));
    let [a, b] = divergence.parameters(|head| {
        let of_tokens = target.tokens.iter().map(log_s).zip(target.log_probs.iter().copied());
        let classes = of_tokens.chain([(log_s_of_rest, target.log_rest)]);
        let classes: Vec<(f32, f32)> = classes.map(|(log_s, log_t)| (exp(floored(log_t)), exp(log_s))).collect();
        share_of_head(head, &classes)
    });
    let mut value = 0.0;
    let mut slope_sum = 0.0;
    let mut class = |log_s: f32, log_t: f32| {
        let log_t = floored(log_t);
        let s = exp(log_s);
        let token = Token { s, log_s, t: exp(log_t), log_t };
        let summand = for_rule!(divergence, R(_a, _b) => R::summand(token, a as f32, b as f32));
        value += f64::from(summand.value);
        slope_sum += f64::from(summand.slope);
        (s, summand.slope)
    };
    let of_tokens: Vec<(f32, f32)> =
        target.tokens.iter().map(log_s).zip(target.log_probs).map(|(log_s, log_t)| class(log_s, *log_t)).collect();
    let of_rest = class(log_s_of_rest, target.log_rest);
    if !slopes.is_empty() {
        let (factor, slope_sum) = ((factor / temperature) as f32, slope_sum as f32);
        let change = |(s, slope): (f32, f32)| factor * (slope - s * slope_sum);
        if let Some(Rest(rest)) = rest {
            let change = change(of_rest);
            for (slope, logit) in slopes.iter_mut().zip(&*scratch) {
                // The tokens that stand for themselves are at negative infinity here: nothing is added to them.
                *slope += change * exp(rest.log_probability(*logit));
            }
        }
        for (token, of_token) in target.tokens.iter().zip(of_tokens) {
            slopes[*token as usize] += change(of_token);
        }
    }
    value
}

/// The normaliser of all logits, from that of the rest: no second pass over the vocabulary.
fn normaliser(logits: &[f32], tokens: &[u32], rest: Option<Rest>, scale: f32) -> Normaliser {
    let chosen = || tokens.iter().map(|token| logits[*token as usize]);
    let max = chosen().chain(rest.map(|rest| rest.0.max)).fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let of_rest =
        rest.map_or(0.0, |Rest(rest)| f64::from(exp((rest.max - max) * scale)) * f64::from(rest.log_sum).exp());
    let sum = of_rest + chosen().map(|logit| f64::from(exp((logit - max) * scale))).sum::<f64>();
    Normaliser { max, scale, log_sum: sum.ln() as f32 }
}

/// A number that is greater for a better token: by logit, and of equal ones the lower id.
pub(crate) fn rank(token: usize, logit: f32) -> u64 {
    // Adding 0 makes the negative zero equal to the positive one. The bits of floats then only need their sign
    // repaired.
    let bits = (logit + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!(token as u32))
}

pub(crate) fn token_of(rank: u64) -> usize {
    !(rank as u32) as usize
}
