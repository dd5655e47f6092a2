//! How sure a number is: intervals over repeats and over rows, differences in pairs, and what many comparisons cost.
//!
//! Checked against scipy: `tests/fixtures/statistics`.

use contract::random::{below, philox, purpose};

/// How sure intervals and verdicts are.
pub(crate) const CONFIDENCE: f64 = 0.95;

/// A mean with its interval, and how often so large a mean comes of nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimated {
    pub mean: f64,
    /// Interval of [`CONFIDENCE`].
    pub interval: (f64, f64),
    /// Of the hypothesis that the mean is 0, two-sided.
    pub p: f64,
}

/// Mean of independent numbers with Student's t interval; nothing for fewer than two.
pub(crate) fn of_repeats(numbers: &[f64]) -> Option<Estimated> {
    let count = numbers.len() as f64;
    let degrees = numbers.len().checked_sub(2)? as f64 + 1.0;
    let mean = numbers.iter().sum::<f64>() / count;
    let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / degrees;
    let error = (variance / count).sqrt();
    let half = t_quantile((1.0 + CONFIDENCE) / 2.0, degrees) * error;
    // Numbers that are all the same leave no doubt.
    let p = match error == 0.0 {
        true => f64::from(u8::from(mean == 0.0)),
        false => 2.0 * (1.0 - t_below((mean / error).abs(), degrees)),
    };
    Some(Estimated { mean, interval: (mean - half, mean + half), p })
}

/// Pearson's correlation with the interval that Fisher's transformation gives it, and how often so large a one comes of
/// nothing; nothing for fewer than four pairs, nor where one side never changes.
pub(crate) fn correlation(pairs: &[(f64, f64)]) -> Option<Estimated> {
    let count = pairs.len() as f64;
    let degrees = pairs.len().checked_sub(4)? as f64 + 2.0;
    let centre = |side: fn(&(f64, f64)) -> f64| pairs.iter().map(side).sum::<f64>() / count;
    let (a, b) = (centre(|pair| pair.0), centre(|pair| pair.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| pairs.iter().map(|(x, y)| of(x - a, y - b)).sum::<f64>();
    let (both, left, right) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    if !(left > 0.0 && right > 0.0) {
        return None;
    }
    let mean = (both / (left * right).sqrt()).clamp(-1.0, 1.0);
    let half = NORMAL_QUANTILE / (count - 3.0).sqrt();
    let interval = ((mean.atanh() - half).tanh(), (mean.atanh() + half).tanh());
    let t = mean.abs() * (degrees / (1.0 - mean * mean)).sqrt();
    let p = if mean.abs() < 1.0 { 2.0 * (1.0 - t_below(t, degrees)) } else { 0.0 };
    Some(Estimated { mean, interval, p })
}

/// Where a share of (1 + [`CONFIDENCE`]) / 2 of the normal distribution lies below.
const NORMAL_QUANTILE: f64 = 1.959_963_984_540_054;

/// Resamples of a bootstrap.
const RESAMPLES: u32 = 2000;

/// A mean over rows, each a sum and what it is of, with its percentile interval by bootstrap: rows are drawn again, and each
/// brings all its samples along, so that it holds for other rows and other samples. Nothing where nothing is counted.
pub(crate) fn of_rows(rows: &[(f64, f64)]) -> Option<Estimated> {
    let ratio = |(sum, count): (f64, f64)| (count > 0.0).then(|| sum / count);
    let add = |a: (f64, f64), b: (f64, f64)| (a.0 + b.0, a.1 + b.1);
    let mean = ratio(rows.iter().copied().fold((0.0, 0.0), add))?;
    let resampled = |resample: u32| {
        let mut drawn = (0.0, 0.0);
        for four in 0..rows.len().div_ceil(4) {
            let words = philox(0, [four as u32, 1, resample, purpose::BOOTSTRAP]);
            for word in words.into_iter().take(rows.len() - 4 * four) {
                drawn = add(drawn, rows[below(word, 0, rows.len() as u64) as usize]);
            }
        }
        ratio(drawn)
    };
    let mut means: Vec<f64> = (0..RESAMPLES).filter_map(resampled).collect();
    means.sort_by(f64::total_cmp);
    let tail = (means.len() as f64 * (1.0 - CONFIDENCE) / 2.0) as usize;
    let (low, high) = (means[tail], means[means.len() - 1 - tail]);
    // One more on either side: no finite number of resamples shows that something never happens.
    let share = |count: usize| (count as f64 + 1.0) / (means.len() as f64 + 1.0);
    let below_zero = share(means.iter().filter(|mean| **mean <= 0.0).count());
    let above_zero = share(means.iter().filter(|mean| **mean >= 0.0).count());
    Some(Estimated { mean, interval: (low, high), p: (2.0 * below_zero.min(above_zero)).min(1.0) })
}

/// What is left of many hypotheses' chances when all of them are looked at (Holm, 1979): no more than 1 in 20 families has a
/// false discovery at 0.05.
pub(crate) fn holm(chances: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..chances.len()).collect();
    order.sort_by(|a, b| chances[*a].total_cmp(&chances[*b]));
    let mut adjusted = vec![0.0; chances.len()];
    let mut least: f64 = 0.0;
    for (rank, index) in order.into_iter().enumerate() {
        least = least.max((chances.len() - rank) as f64 * chances[index]).min(1.0);
        adjusted[index] = least;
    }
    adjusted
}

/// The share of Student's t distribution below `t`, which is not negative.
fn t_below(t: f64, degrees: f64) -> f64 {
    1.0 - 0.5 * incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t * t))
}

/// Where a share `p` of at least a half of Student's t distribution lies below.
fn t_quantile(p: f64, degrees: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while t_below(high, degrees) < p {
        (low, high) = (high, high * 2.0);
    }
    // Bisection, until neighbours are left.
    while let middle = (low + high) / 2.0
        && low < middle
        && middle < high
    {
        if t_below(middle, degrees) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// The regularised incomplete beta function, by its continued fraction (Lentz's way of adding it up).
fn incomplete_beta(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    if x > (a + 1.0) / (a + b + 2.0) {
        // It converges fast on the other side only.
        return 1.0 - incomplete_beta(b, a, 1.0 - x);
    }
    let scale = (ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (-x).ln_1p()).exp() / a;
    let tiny = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / tiny(1.0 - (a + b) * x / (a + 1.0));
    let mut sum = d;
    for step in 1..1000 {
        let m = f64::from(step);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let mut change = 1.0;
        for term in [even, odd] {
            d = 1.0 / tiny(1.0 + term * d);
            c = tiny(1.0 + term / c);
            change = c * d;
            sum *= change;
        }
        if (change - 1.0).abs() < 1e-15 {
            break;
        }
    }
    scale * sum
}

/// The logarithm of the gamma function of a positive number (Lanczos, 1964, with g = 7 and nine terms).
fn ln_gamma(x: f64) -> f64 {
    const TERMS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = x - 1.0;
    let terms = TERMS.iter().zip(1..).map(|(term, index)| term / (x + f64::from(index)));
    let sum = 0.999_999_999_999_809_9 + terms.sum::<f64>();
    let t = x + 7.5;
    0.5 * std::f64::consts::TAU.ln() + (x + 0.5) * t.ln() - t + sum.ln()
}

#[cfg(test)]
mod tests {
    use contract::random::normal;
    use serde_json::Value as Json;

    use super::*;

    fn cases() -> Json {
        serde_json::from_str(include_str!("../../tests/fixtures/statistics/cases.json")).unwrap()
    }

    fn numbers(value: &Json) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    #[track_caller]
    fn near(own: f64, other: &Json, tolerance: f64) {
        let other = other.as_f64().unwrap();
        assert!((own - other).abs() <= tolerance * other.abs().max(1e-9), "{own} and {other}");
    }

    #[test]
    fn intervals_and_chances_are_those_of_scipy() {
        let cases = cases();
        for case in cases["quantiles"].as_array().unwrap().iter().filter(|case| case["p"] != 0.5) {
            near(t_quantile(case["p"].as_f64().unwrap(), case["degrees"].as_f64().unwrap()), &case["t"], 1e-9);
        }
        for case in cases["means"].as_array().unwrap() {
            let own = of_repeats(&numbers(&case["numbers"])).unwrap();
            near(own.mean, &case["mean"], 1e-12);
            near(own.interval.0, &case["low"], 1e-9);
            near(own.interval.1, &case["high"], 1e-9);
        }
        for case in cases["paired"].as_array().unwrap() {
            let (a, b) = (numbers(&case["a"]), numbers(&case["b"]));
            let own = of_repeats(&a.iter().zip(&b).map(|(a, b)| a - b).collect::<Vec<_>>()).unwrap();
            near(own.mean, &case["mean"], 1e-9);
            near(own.interval.0, &case["low"], 1e-7);
            near(own.interval.1, &case["high"], 1e-7);
            near(own.p, &case["p"], 1e-7);
        }
        assert_eq!((of_repeats(&[]), of_repeats(&[1.0])), (None, None));
        assert_eq!(of_repeats(&[2.0, 2.0]).unwrap(), Estimated { mean: 2.0, interval: (2.0, 2.0), p: 0.0 });
    }

    #[test]
    fn correlations_are_those_of_scipy() {
        for case in cases()["correlations"].as_array().unwrap() {
            let pairs: Vec<_> = numbers(&case["a"]).into_iter().zip(numbers(&case["b"])).collect();
            let own = correlation(&pairs).unwrap();
            near(own.mean, &case["r"], 1e-9);
            near(own.interval.0, &case["low"], 1e-9);
            near(own.interval.1, &case["high"], 1e-9);
            near(own.p, &case["p"], 1e-7);
        }
        assert_eq!(correlation(&[(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]), None, "too few");
        assert_eq!(correlation(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]), None, "one side never changes");
        let straight = correlation(&[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0), (4.0, 8.0)]).unwrap();
        assert_eq!((straight.mean, straight.interval, straight.p), (1.0, (1.0, 1.0), 0.0));
    }

    #[test]
    fn many_comparisons_are_corrected_as_by_holm() {
        for case in cases()["holm"].as_array().unwrap() {
            let own = holm(&numbers(&case["p"]));
            own.iter().zip(case["adjusted"].as_array().unwrap()).for_each(|(own, other)| near(*own, other, 1e-12));
        }
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn the_bootstrap_is_that_of_scipy() {
        let case = &cases()["bootstrap"];
        let rows: Vec<_> = numbers(&case["sums"]).into_iter().zip(numbers(&case["counts"])).collect();
        let own = of_rows(&rows).unwrap();
        near(own.mean, &case["mean"], 1e-12);
        // Both draw at random: an end is known to about a hundredth of the width.
        let width = case["high"].as_f64().unwrap() - case["low"].as_f64().unwrap();
        for (own, other) in [(own.interval.0, &case["low"]), (own.interval.1, &case["high"])] {
            assert!((own - other.as_f64().unwrap()).abs() < 0.04 * width, "{own} and {other}");
        }
        assert_eq!(of_rows(&[]), None);
        assert_eq!(of_rows(&[(1.0, 0.0)]), None);
    }

    /// Standard normal numbers, of a case.
    fn drawn(case: u32, count: u32) -> Vec<f64> {
        let pair = |at: u32| {
            let [a, b, ..] = philox(11, [at, case, 0, 0]);
            normal(a, b)
        };
        (0..count).map(|at| f64::from(pair(at).0)).collect()
    }

    /// The share of comparisons of a thing with itself, plus `gain` standard errors, that are called different.
    fn called(cases: u32, count: u32, gain: f64, estimate: impl Fn(&[f64]) -> Option<Estimated>) -> f64 {
        let is_called = |case: &u32| {
            let (a, b) = (drawn(2 * case, count), drawn(2 * case + 1, count));
            let shift = gain * (2.0 / f64::from(count)).sqrt();
            let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b + shift).collect();
            estimate(&differences).is_some_and(|found| found.p < 1.0 - CONFIDENCE)
        };
        f64::from((0..cases).filter(is_called).count() as u32) / f64::from(cases)
    }

    #[test]
    fn what_is_the_same_is_called_different_one_time_in_twenty() {
        for count in [3, 5, 10] {
            let share = called(200, count, 0.0, of_repeats);
            assert!((0.02..=0.08).contains(&share), "{count} repeats: {share}");
        }
        let share = called(200, 100, 0.0, |rows| of_rows(&rows.iter().map(|row| (*row, 1.0)).collect::<Vec<_>>()));
        assert!((0.02..=0.08).contains(&share), "rows: {share}");
    }

    /// With 30 repeats a difference of two standard errors is found half the time: 1 - T(t - 2), T noncentral, is 0.49.
    #[test]
    fn what_differs_is_found_as_often_as_theory_says() {
        let share = called(1000, 30, 2.0, of_repeats);
        assert!((share - 0.49).abs() < 0.05, "{share}");
    }

    /// The interval over repeats does not depend on their number being few: it covers the truth 19 times in 20.
    #[test]
    fn the_chance_and_the_interval_say_the_same() {
        for case in 0..300 {
            let found = of_repeats(&drawn(case, 4)).unwrap();
            let outside = found.interval.0 > 0.0 || found.interval.1 < 0.0;
            assert_eq!(outside, found.p < 1.0 - CONFIDENCE, "{found:?}");
        }
    }
}
