//! How sure a number is that was measured over rows.

use contract::random::{below, philox, purpose};
use rayon::prelude::*;

/// Resamples of the rows behind an interval. A thousand put about 25 draws beyond either end of it.
const RESAMPLES: usize = 1000;

/// Rows drawn anew, with replacement, a thousand times (Efron, 1979). The draws depend on the number of rows alone.
pub struct Resamples(Vec<Vec<u32>>);

impl Resamples {
    /// Of so many rows.
    pub fn of(rows: usize) -> Self {
        let draw = |resample: usize| {
            let row = |draw: usize| {
                let [a, b, ..] = philox(0, [draw as u32, 0, resample as u32, purpose::BOOTSTRAP]);
                below(a, b, rows as u64) as u32
            };
            (0..rows).map(row).collect()
        };
        Resamples((0..RESAMPLES).into_par_iter().map(draw).collect())
    }

    /// The 2.5 and 97.5 percentiles of a statistic of the rows drawn, over the resamples in which it is something.
    pub fn interval(&self, statistic: impl Fn(&[u32]) -> Option<f64> + Sync) -> Option<[f64; 2]> {
        let mut values: Vec<f64> = self.0.par_iter().filter_map(|drawn| statistic(drawn)).collect();
        values.sort_by(f64::total_cmp);
        let tail = values.len() / 40;
        values.get(tail).zip(values.iter().rev().nth(tail)).map(|(low, high)| [round(*low), round(*high)])
    }

    /// That of a mean over rows, `sums / counts`.
    pub fn of_mean(&self, sums: &[f64], counts: &[f64]) -> Option<[f64; 2]> {
        self.interval(|drawn| {
            let of = |values: &[f64]| drawn.iter().map(|row| values[*row as usize]).sum::<f64>();
            let count = of(counts);
            (count > 0.0).then(|| of(sums) / count)
        })
    }
}

/// Six decimals: more than any of the metrics carries, few enough to read.
pub fn round(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// The mean of numbers; `None` of none.
pub fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.fold((0.0, 0.0), |(count, sum), value| (count + 1.0, sum + value));
    (count > 0.0).then(|| sum / count)
}

/// Pearson's correlation of two columns over the rows drawn; `None` where one of them is the same in all.
pub fn correlation(x: &[f64], y: &[f64], rows: &[u32]) -> Option<f64> {
    let at = |column: &[f64]| -> (Vec<f64>, f64) {
        let mean = rows.iter().map(|row| column[*row as usize]).sum::<f64>() / rows.len() as f64;
        let centred: Vec<f64> = rows.iter().map(|row| column[*row as usize] - mean).collect();
        let size = centred.iter().map(|value| value * value).sum::<f64>().sqrt();
        // What is left of equal numbers is rounding.
        (centred, if size > 1e-12 * mean.abs() { size } else { 0.0 })
    };
    let ((x, x_size), (y, y_size)) = (at(x), at(y));
    let product: f64 = x.iter().zip(&y).map(|(x, y)| x * y).sum();
    (x_size > 0.0 && y_size > 0.0).then(|| product / x_size / y_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_mean_and_shrinks_with_the_rows() {
        let width = |rows: usize| {
            let values: Vec<f64> = (0..rows).map(|row| (row % 10) as f64).collect();
            let [low, high] = Resamples::of(rows).of_mean(&values, &vec![1.0; rows]).unwrap();
            assert!(low < 4.5 && high > 4.5, "{low} {high}");
            high - low
        };
        // 2 x 1.96 x 2.87 / sqrt(rows)
        assert!((width(100) / 1.126 - 1.0).abs() < 0.1, "{}", width(100));
        assert!((width(900) / 0.375 - 1.0).abs() < 0.1, "{}", width(900));
        assert_eq!(Resamples::of(5).interval(|_| None), None);
    }

    #[test]
    fn a_correlation_is_that_of_the_textbook() {
        let all: Vec<u32> = (0..5).collect();
        // Anscombe's way: by hand, sums of products of deviations.
        let (x, y) = ([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]);
        assert!((correlation(&x, &y, &all).unwrap() - 0.8).abs() < 1e-12);
        assert!((correlation(&x, &x.map(|x| -x), &all).unwrap() + 1.0).abs() < 1e-12);
        assert_eq!(correlation(&x, &[0.1; 5], &all), None);
        assert_eq!(correlation(&x, &y, &[3, 3, 3]), None);
    }
}
