//! Which rounds' values leave a loop: the one place that compares scores.

use std::collections::BTreeMap;

use super::program::{Carried, Chosen};
use crate::graph::Mode;

/// By the place of a carried value, the score that it is kept by.
pub(crate) type Scores = BTreeMap<usize, f64>;

/// The carried values whose value of this round is kept in place of the one before: those whose score, `measured` in this
/// round, is better than the `best` so far, and those that are kept with them. The first wins a tie, and any number wins
/// over none.
pub(crate) fn kept(carry: &[Carried], best: &Scores, measured: &Scores) -> Vec<usize> {
    let is_better = |place: usize| {
        let (Chosen::Best { mode, .. }, Some(&score)) = (&carry[place].keep, measured.get(&place)) else {
            return false;
        };
        best.get(&place).is_none_or(|&before| wins(*mode, score, before))
    };
    let is_kept = |&place: &usize| match carry[place].keep {
        Chosen::Last => false,
        Chosen::Best { .. } => is_better(place),
        // Values are kept with one that is kept for itself.
        Chosen::With(other) => is_better(other),
    };
    (0..carry.len()).filter(is_kept).collect()
}

fn wins(mode: Mode, score: f64, before: f64) -> bool {
    if before.is_nan() {
        return !score.is_nan();
    }
    match mode {
        Mode::Max => score > before,
        Mode::Min => score < before,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Entry;
    use crate::rounds::program::Slot;

    fn carried(keep: Chosen) -> Carried {
        Carried { entry: Entry::Carry("x".into()), next: Slot::Carry(0), comes_every_round: true, keep }
    }

    /// Kept by the largest, by the smallest, with the first, and as the last round leaves it.
    fn carry() -> Vec<Carried> {
        let best = |mode| Chosen::Best { stage: 0, metric: "score".into(), mode };
        [best(Mode::Max), best(Mode::Min), Chosen::With(0), Chosen::Last].map(carried).into()
    }

    #[test]
    fn the_better_is_kept_and_what_goes_with_it() {
        let best = Scores::from([(0, 1.0), (1, 1.0)]);
        let of = |first: f64, second: f64| kept(&carry(), &best, &Scores::from([(0, first), (1, second)]));
        assert_eq!(of(2.0, 2.0), [0, 2]);
        assert_eq!(of(0.0, 0.0), [1]);
        assert_eq!(of(1.0, 1.0), [0; 0], "the first wins a tie");
        assert_eq!(of(f64::NAN, f64::NAN), [0; 0]);
    }

    #[test]
    fn a_round_without_a_score_keeps_nothing_and_the_first_with_one_does() {
        assert_eq!(kept(&carry(), &Scores::from([(0, 1.0)]), &Scores::new()), [0; 0]);
        assert_eq!(kept(&carry(), &Scores::new(), &Scores::from([(0, -1.0)])), [0, 2]);
        assert_eq!(kept(&carry(), &Scores::from([(0, f64::NAN)]), &Scores::from([(0, -1.0)])), [0, 2]);
    }
}
