//! Curves over a number, with bands.

use crate::axes::{Axis, HEIGHT, WIDTH, frame, spread};
use crate::figure::{Canvas, Figure, Path, Table};
use crate::scale::{Scale, number};
use crate::style::class;
use crate::text::{fit, width};

/// Curves over a number. Points that are not finite are gaps.
#[derive(Clone, Debug, PartialEq)]
pub struct Lines {
    /// What it is of.
    pub title: String,
    /// What is to be seen; without one, where each curve begins and ends.
    pub description: Option<String>,
    /// What the points are over.
    pub x: Axis,
    /// What they are.
    pub y: Axis,
    /// The curves: more than eight cannot be told apart well.
    pub series: Vec<Series>,
}

/// One curve.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Its name, at its end; empty where there is one curve alone.
    pub label: String,
    /// In order of the first number.
    pub points: Vec<(f64, f64)>,
    /// Lowest and highest at each point; empty: no band.
    pub band: Vec<(f64, f64)>,
}

/// Points up to which each is marked.
const MARKED: usize = 30;

/// Rows of the table: the picture shows the rest, and who wants all of it reads the metrics themselves.
const ROWS: usize = 12;

impl Lines {
    /// The picture.
    pub fn draw(&self) -> Figure {
        let xs: Vec<f64> = self.series.iter().flat_map(|series| series.points.iter().map(|point| point.0)).collect();
        let ys: Vec<f64> = self
            .series
            .iter()
            .flat_map(|series| {
                series
                    .points
                    .iter()
                    .map(|point| point.1)
                    .chain(series.band.iter().flat_map(|(low, high)| [*low, *high]))
            })
            .collect();
        let mut canvas = Canvas::new(WIDTH, HEIGHT, &self.title);
        let widest = self.series.iter().map(|series| width(&series.label, 10.0)).fold(0.0, f64::max);
        let margin = if widest > 0.0 { widest.min(96.0) + 8.0 } else { 0.0 };
        let frame = frame(&mut canvas, (&self.x, &xs), (&self.y, &ys), margin);
        canvas.say_scales(&frame.x, &frame.y);
        for (index, series) in self.series.iter().enumerate() {
            canvas.open(&class(index));
            if !series.band.is_empty() {
                canvas.path("band", &band(series, &frame.x, &frame.y));
            }
            canvas.close();
        }
        let mut ends = Vec::new();
        for (index, series) in self.series.iter().enumerate() {
            canvas.open_saying(&class(index), &self.of(series));
            let shown = thinned(&series.points, &frame.x);
            let mut path = Path::default();
            for (x, y) in &shown {
                path.line_to(frame.x.at(*x), frame.y.at(*y));
            }
            canvas.path("line", &path.text());
            if series.points.len() <= MARKED {
                for (x, y) in &series.points {
                    canvas.mark("mean", index, (frame.x.at(*x), frame.y.at(*y)), 2.6);
                }
            }
            canvas.close();
            let last = series.points.iter().rev().find(|point| point.1.is_finite());
            ends.push(last.map_or(frame.top, |point| frame.y.at(point.1)));
        }
        if margin > 0.0 {
            for (index, at) in spread(&ends, 12.0, frame.top, frame.bottom).into_iter().enumerate() {
                let label = fit(&self.series[index].label, 10.0, margin - 8.0);
                canvas.open(&class(index));
                canvas.mark("mean", index, (frame.right + 4.0, at), 2.8);
                canvas.close();
                canvas.text("small", frame.right + 10.0, at + 3.5, &label);
            }
        }
        let description = self.description.clone().unwrap_or_else(|| self.in_words());
        Figure::new(&self.title, description, self.table(), canvas)
    }

    fn in_words(&self) -> String {
        let curves: String = self.series.iter().map(|series| format!(" {}.", self.of(series))).collect();
        format!("{} over {}.{curves}", self.y.label, self.x.label)
    }

    fn of(&self, series: &Series) -> String {
        let label = if series.label.is_empty() { "It" } else { &series.label };
        let mut finite = series.points.iter().filter(|point| point.1.is_finite());
        match (finite.next(), finite.next_back()) {
            (Some(first), Some(last)) => format!("{label} goes from {} to {}", number(first.1), number(last.1)),
            (Some(only), None) => format!("{label} is {}", number(only.1)),
            (None, _) => format!("{label} has no number"),
        }
    }

    fn table(&self) -> Table {
        let mut xs: Vec<f64> =
            self.series.iter().flat_map(|series| series.points.iter().map(|point| point.0)).collect();
        xs.sort_by(f64::total_cmp);
        xs.dedup();
        // Evenly spread, the first and the last among them.
        let count = xs.len().min(ROWS);
        let chosen = (0..count).map(|index| xs[if count > 1 { index * (xs.len() - 1) / (count - 1) } else { 0 }]);
        let name = |series: &Series| if series.label.is_empty() { self.y.label.clone() } else { series.label.clone() };
        let headings = std::iter::once(self.x.label.clone()).chain(self.series.iter().map(name)).collect();
        let at = |series: &Series, x: f64| {
            let index = series.points.partition_point(|point| point.0 < x);
            series.points.get(index).filter(|point| point.0 == x).map_or(String::new(), |point| number(point.1))
        };
        let row = |x: f64| std::iter::once(number(x)).chain(self.series.iter().map(|series| at(series, x))).collect();
        Table { headings, rows: chosen.map(row).collect() }
    }
}

/// Of every column of pixels the lowest and the highest point, in order: what the eye would see of all of them.
fn thinned(points: &[(f64, f64)], x: &Scale) -> Vec<(f64, f64)> {
    let mut kept = Vec::new();
    for column in columns(points, x) {
        let finite = (0..column.len()).filter(|index| column[*index].1.is_finite());
        let by = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        match (finite.clone().min_by(by), finite.clone().max_by(by)) {
            (Some(low), Some(high)) => {
                kept.push(column[low.min(high)]);
                if low != high {
                    kept.push(column[low.max(high)]);
                }
            }
            _ => kept.push(column[0]),
        }
    }
    kept
}

/// Neighbours that fall into the same pixel.
fn columns<'p>(points: &'p [(f64, f64)], x: &Scale) -> impl Iterator<Item = &'p [(f64, f64)]> {
    points.chunk_by(move |a, b| x.at(a.0).floor() == x.at(b.0).floor())
}

fn band(series: &Series, x: &Scale, y: &Scale) -> String {
    let (mut upper, mut lower) = (Vec::new(), Vec::new());
    let mut at = 0;
    for column in columns(&series.points, x) {
        let part = &series.band[at.min(series.band.len())..(at + column.len()).min(series.band.len())];
        at += column.len();
        let low = part.iter().map(|band| band.0).filter(|low| low.is_finite()).fold(f64::INFINITY, f64::min);
        let high = part.iter().map(|band| band.1).filter(|high| high.is_finite()).fold(f64::NEG_INFINITY, f64::max);
        if low <= high {
            upper.push((x.at(column[0].0), y.at(high)));
            lower.push((x.at(column[0].0), y.at(low)));
        }
    }
    let mut path = Path::default();
    for (x, y) in upper.into_iter().chain(lower.into_iter().rev()) {
        path.line_to(x, y);
    }
    let text = path.text();
    if text.is_empty() { text } else { text + "z" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(label: &str, count: usize, of: impl Fn(f64) -> f64) -> Series {
        let points = (0..count).map(|index| (index as f64, of(index as f64))).collect();
        Series { label: label.into(), points, band: Vec::new() }
    }

    fn lines(series: Vec<Series>) -> Lines {
        Lines { title: "Loss".into(), description: None, x: Axis::of("update"), y: Axis::of("loss"), series }
    }

    #[test]
    fn a_long_curve_keeps_its_peaks_and_costs_little() {
        let spike = |x: f64| if x == 7_777.0 { 50.0 } else { (x / 900.0).sin() };
        let figure = lines(vec![series("a", 20_000, spike)]).draw();
        let scale = Scale::over([0.0, 19_999.0], false, 30.0, 350.0);
        let kept = thinned(&series("a", 20_000, spike).points, &scale);
        assert!(kept.iter().any(|point| point.1 == 50.0) && kept.len() <= 660, "{}", kept.len());
        assert!(figure.svg().len() < 14_000, "{}", figure.svg().len());
        assert_eq!(figure.data.rows.len(), ROWS);
        assert_eq!(figure.data.rows[11][0], "19999");
    }

    #[test]
    fn gaps_and_nothing_at_all_are_drawn() {
        let holes = series("a", 9, |x| if x == 4.0 { f64::NAN } else { x });
        let text = lines(vec![holes]).draw().svg();
        let path = text.split("class=\"line\" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(path.matches('M').count(), 2, "{path}");
        assert_eq!(lines(vec![]).draw().description, "loss over update.");
        assert!(!lines(vec![series("a", 0, |x| x)]).draw().svg().contains("NaN"));
    }

    #[test]
    fn a_band_lies_around_its_curve() {
        let mut curve = series("a", 3, |x| x);
        curve.band = vec![(-1.0, 1.0), (0.0, 2.0), (1.0, 3.0)];
        assert!(lines(vec![curve]).draw().svg().contains("class=\"band\" d=\"M"));
    }

    #[test]
    fn equal_data_gives_equal_bytes() {
        let chart = lines(vec![series("a <b>", 50, f64::sqrt), series("b", 50, f64::cos)]);
        assert_eq!(chart.draw().svg(), chart.draw().svg());
        assert!(chart.draw().html("x").contains("a &lt;b&gt; goes from 0 to 7"));
    }
}
