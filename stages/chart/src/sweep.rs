//! What was measured over a number that was varied: a point a repeat, the mean, its interval.

use crate::axes::{Axis, HEIGHT, WIDTH, frame, spread};
use crate::dots::{Estimate, in_words};
use crate::figure::{Canvas, Figure, Path, Table};
use crate::scale::number;
use crate::style::class;
use crate::text::{fit, width};

/// Estimates over a number that was varied.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// What it is of.
    pub title: String,
    /// What is to be seen; without one, the largest and the smallest mean.
    pub description: Option<String>,
    /// What was varied.
    pub x: Axis,
    /// What was measured.
    pub y: Axis,
    /// A line each.
    pub series: Vec<Swept>,
}

/// One line of a sweep.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Swept {
    /// Its name; empty where there is one alone.
    pub label: String,
    /// The number set, and what was measured with it; in order.
    pub points: Vec<(f64, Estimate)>,
}

impl Sweep {
    /// The picture.
    pub fn draw(&self) -> Figure {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let xs: Vec<f64> = points().map(|point| point.0).collect();
        let ys: Vec<f64> = points().flat_map(|point| point.1.numbers()).collect();
        let mut canvas = Canvas::new(WIDTH, HEIGHT, &self.title);
        let widest = self.series.iter().map(|series| width(&series.label, 10.0)).fold(0.0, f64::max);
        let margin = if widest > 0.0 { widest.min(96.0) + 8.0 } else { 0.0 };
        let frame = frame(&mut canvas, (&self.x, &xs), (&self.y, &ys), margin);
        let mut ends = Vec::new();
        for (index, series) in self.series.iter().enumerate() {
            // Side by side where several have a point at the same number.
            let aside = (index as f64 - (self.series.len() as f64 - 1.0) / 2.0) * 4.0;
            let at = |x: f64, y: f64| (frame.x.at(x) + aside, frame.y.at(y));
            canvas.open(&class(index));
            let mut path = Path::default();
            for (x, estimate) in &series.points {
                let (x, y) = at(*x, estimate.mean);
                path.line_to(x, y);
            }
            canvas.path("line", &path.text());
            for (x, estimate) in &series.points {
                let set = number(*x);
                let label = if series.label.is_empty() { set } else { format!("{}, {set}", series.label) };
                canvas.open_saying("point", &format!("{label}: {}", estimate.in_words()));
                if let Some((low, high)) = estimate.interval.filter(|(low, high)| low.is_finite() && high.is_finite()) {
                    canvas.line("whisker", at(*x, low), at(*x, high));
                    for end in [low, high] {
                        let (x, y) = at(*x, end);
                        canvas.line("whisker", (x - 3.0, y), (x + 3.0, y));
                    }
                }
                for repeat in &estimate.repeats {
                    canvas.mark("repeat", index, at(*x, *repeat), 2.4);
                }
                canvas.mark("mean", index, at(*x, estimate.mean), 3.6);
                canvas.close();
            }
            canvas.close();
            ends.push(series.points.last().map_or(frame.top, |point| frame.y.at(point.1.mean)));
        }
        if margin > 0.0 {
            for (index, at) in spread(&ends, 12.0, frame.top, frame.bottom).into_iter().enumerate() {
                canvas.open(&class(index));
                canvas.mark("mean", index, (frame.right + 4.0, at), 2.8);
                canvas.close();
                canvas.text("small", frame.right + 10.0, at + 3.5, &fit(&self.series[index].label, 10.0, margin - 8.0));
            }
        }
        let rows = self.rows();
        let description = self.description.clone().unwrap_or_else(|| in_words(&self.y.label, &rows));
        let mut headings = vec!["of".to_owned()];
        headings.extend(Estimate::HEADINGS.map(str::to_owned));
        let row =
            |(label, estimate): &(String, Estimate)| std::iter::once(label.clone()).chain(estimate.cells()).collect();
        let table = Table { headings, rows: rows.iter().map(row).collect() };
        Figure::new(&self.title, description, table, canvas)
    }

    fn rows(&self) -> Vec<(String, Estimate)> {
        let mut rows = Vec::new();
        for series in &self.series {
            for (x, estimate) in &series.points {
                let set = format!("{} {}", self.x.label, number(*x));
                let label = if series.label.is_empty() { set } else { format!("{}, {set}", series.label) };
                rows.push((label, estimate.clone()));
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_setting_is_said() {
        let point = |x: f64, mean: f64| {
            (x, Estimate { repeats: vec![mean - 1.0, mean + 1.0], mean, interval: Some((mean - 2.0, mean + 2.0)) })
        };
        let series =
            vec![Swept { label: String::new(), points: vec![point(1e-3, 76.0), point(1e-2, 77.3), point(1e-1, 70.0)] }];
        let (x, y) = (Axis::log("learning rate"), Axis::of("ROUGE-L"));
        let figure = Sweep { title: "Rates".into(), description: None, x, y, series }.draw();
        assert!(
            figure.description.contains("highest for learning rate 0.01, 77.3 [75.3, 79.3]"),
            "{}",
            figure.description
        );
        assert_eq!(figure.svg().matches("\"repeat\"").count(), 6);
        assert_eq!(figure.data.rows[1], ["learning rate 0.01", "77.3", "75.3", "79.3", "76.3 78.3"]);
    }
}
