//! Where a trainee's distribution is off: on what its target finds likely, or on the rest.

use super::top_k::{rank, token_of};

/// Tokens that are put in order at first; the head of a sure target has fewer.
const FIRST: usize = 64;

/// The share of `Σ |t - s|` that lies on the head: on the likeliest token of the target and those next to it that have at most
/// the probability `head` together with it. Of equally likely tokens the first comes first. `tokens` are `(t, s)`, of which
/// there is one at least; of equal distributions the share is one half.
pub(crate) fn share_of_head(head: f64, tokens: &[(f32, f32)]) -> f64 {
    let gap = |(t, s): (f32, f32)| (f64::from(t) - f64::from(s)).abs();
    let total: f64 = tokens.iter().map(|token| gap(*token)).sum();
    if total == 0.0 {
        return 0.5;
    }
    let mut ranks: Vec<u64> = tokens.iter().enumerate().map(|(token, (t, _))| rank(token, *t)).collect();
    let (mut sorted, mut mass, mut of_head) = (0, 0.0, 0.0);
    while sorted < ranks.len() {
        // In growing portions: only the head need be in order.
        let next = (8 * sorted).clamp(FIRST.min(ranks.len()), ranks.len());
        if next < ranks.len() {
            ranks[sorted..].select_nth_unstable_by(next - sorted - 1, |a, b| b.cmp(a));
        }
        ranks[sorted..next].sort_unstable_by(|a, b| b.cmp(a));
        for (place, rank) in ranks[sorted..next].iter().enumerate() {
            let token = tokens[token_of(*rank)];
            mass += f64::from(token.0);
            if mass > head && sorted + place > 0 {
                return of_head / total;
            }
            of_head += gap(token);
        }
        sorted = next;
    }
    of_head / total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;

    fn distribution(seed: u64, count: usize, spread: f32) -> Vec<f32> {
        let weights: Vec<f64> = numbers(seed, count).into_iter().map(|x| f64::from(x * spread).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| (weight / total) as f32).collect()
    }

    #[test]
    fn the_head_is_what_sorting_all_gives() {
        for (count, spread, head) in [(1, 1.0, 0.5), (5, 3.0, 0.5), (700, 4.0, 0.9), (5000, 0.1, 0.5), (3000, 9.0, 0.2)]
        {
            let (t, s) = (distribution(1, count, spread), distribution(2, count, spread));
            let tokens: Vec<(f32, f32)> = t.into_iter().zip(s).collect();
            let mut sorted = tokens.clone();
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
            let (mut mass, mut of_head) = (0.0, 0.0);
            for (place, (t, s)) in sorted.iter().enumerate() {
                mass += f64::from(*t);
                if mass <= head || place == 0 {
                    of_head += f64::from((t - s).abs());
                }
            }
            let total: f64 = tokens.iter().map(|(t, s)| f64::from((t - s).abs())).sum();
            let right = if total == 0.0 { 0.5 } else { of_head / total };
            assert!((share_of_head(head, &tokens) - right).abs() < 1e-5, "{count} tokens");
        }
    }

    #[test]
    fn a_likeliest_token_is_head_whatever_it_weighs() {
        assert!((share_of_head(0.5, &[(0.9, 0.8), (0.1, 0.2)]) - 0.5).abs() < 1e-6);
        assert!((share_of_head(0.5, &[(0.1, 0.4), (0.5, 0.4), (0.4, 0.2)]) - 1.0 / 6.0).abs() < 1e-6);
        assert_eq!(share_of_head(0.5, &[(0.3, 0.3), (0.7, 0.7)]), 0.5);
    }
}
