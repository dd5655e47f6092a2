//! A row for each thing measured: every repeat, the mean, its interval.

use crate::axes::{Axis, WIDTH};
use crate::figure::{Canvas, Figure, Table};
use crate::scale::{Scale, number};
use crate::style::class;
use crate::text::{fit, width};

/// A number as it was measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Of each repeat; empty where there is the mean alone.
    pub repeats: Vec<f64>,
    /// What stands for it.
    pub mean: f64,
    /// Where it may lie.
    pub interval: Option<(f64, f64)>,
}

impl Estimate {
    pub(crate) fn numbers(&self) -> impl Iterator<Item = f64> {
        let ends = self.interval.into_iter().flat_map(|(low, high)| [low, high]);
        self.repeats.iter().copied().chain([self.mean]).chain(ends)
    }

    pub(crate) fn in_words(&self) -> String {
        match self.interval {
            Some((low, high)) => format!("{} [{}, {}]", number(self.mean), number(low), number(high)),
            None => number(self.mean),
        }
    }

    pub(crate) fn cells(&self) -> Vec<String> {
        let (low, high) = self.interval.map_or_else(Default::default, |(low, high)| (number(low), number(high)));
        let repeats = self.repeats.iter().map(|repeat| number(*repeat)).collect::<Vec<_>>().join(" ");
        vec![number(self.mean), low, high, repeats]
    }

    pub(crate) const HEADINGS: [&str; 4] = ["mean", "low", "high", "repeats"];
}

/// Rows of dots with whiskers.
#[derive(Clone, Debug, PartialEq)]
pub struct Dots {
    /// What it is of.
    pub title: String,
    /// What is to be seen; without one, the largest and the smallest mean.
    pub description: Option<String>,
    /// What was measured.
    pub value: Axis,
    /// A name and what was measured of it, from top to bottom.
    pub rows: Vec<(String, Estimate)>,
    /// A number to hold the others against, such as the mean of a baseline or 0 for differences.
    pub mark: Option<f64>,
}

const ROW: f64 = 29.0;

impl Dots {
    /// The picture.
    pub fn draw(&self) -> Figure {
        let (top, bottom) = (26.0, 26.0 + ROW * self.rows.len() as f64);
        let mut canvas = Canvas::new(WIDTH, bottom + 36.0, &self.title);
        let (left, right) = (12.0, WIDTH - 12.0);
        let numbers = self.rows.iter().flat_map(|(_, estimate)| estimate.numbers()).chain(self.mark);
        let scale = Scale::over(numbers, self.value.is_log, left, right);
        ticks(&mut canvas, &scale, (left, right), (top, bottom), &self.value.label);
        if let Some(mark) = self.mark {
            canvas.line("mark", (scale.at(mark), top), (scale.at(mark), bottom));
        }
        for (index, (label, estimate)) in self.rows.iter().enumerate() {
            let y = top + ROW * index as f64;
            let figure = number(estimate.mean);
            let room = right - left - width(&figure, 11.0) - 8.0;
            canvas.text("", left, y + 11.0, &fit(label, 11.0, room));
            canvas.text("quiet end", right, y + 11.0, &figure);
            canvas.open_saying(&class(index), &format!("{label}: {}", estimate.in_words()));
            whisker(&mut canvas, &scale, estimate, y + 20.0);
            for repeat in &estimate.repeats {
                canvas.mark("repeat", index, (scale.at(*repeat), y + 20.0), 2.6);
            }
            canvas.mark("mean", index, (scale.at(estimate.mean), y + 20.0), 4.0);
            canvas.close();
        }
        let description = self.description.clone().unwrap_or_else(|| in_words(&self.value.label, &self.rows));
        Figure::new(&self.title, description, table(&self.rows), canvas)
    }
}

/// Round numbers below, with a line up from each.
pub(crate) fn ticks(
    canvas: &mut Canvas,
    scale: &Scale,
    (left, right): (f64, f64),
    (top, bottom): (f64, f64),
    label: &str,
) {
    let mut taken = f64::NEG_INFINITY;
    for (value, text) in scale.ticks(6) {
        let (at, half) = (scale.at(value), width(&text, 11.0) / 2.0);
        if at - half > taken {
            canvas.line("grid", (at, top), (at, bottom));
            canvas.text("quiet middle", at.clamp(left + half - 8.0, right - half + 8.0), bottom + 14.0, &text);
            taken = at + half + 6.0;
        }
    }
    canvas.line("axis", (left, bottom), (right, bottom));
    canvas.text("quiet small middle", (left + right) / 2.0, bottom + 29.0, &fit(label, 10.0, right - left));
}

fn whisker(canvas: &mut Canvas, scale: &Scale, estimate: &Estimate, y: f64) {
    if let Some((low, high)) = estimate.interval.filter(|(low, high)| low.is_finite() && high.is_finite()) {
        let (low, high) = (scale.at(low), scale.at(high));
        canvas.line("whisker", (low, y), (high, y));
        for end in [low, high] {
            canvas.line("whisker", (end, y - 3.5), (end, y + 3.5));
        }
    }
}

pub(crate) fn in_words(what: &str, rows: &[(String, Estimate)]) -> String {
    let finite = || rows.iter().filter(|(_, estimate)| estimate.mean.is_finite());
    let by = |a: &&(String, Estimate), b: &&(String, Estimate)| a.1.mean.total_cmp(&b.1.mean);
    match (finite().max_by(by), finite().min_by(by)) {
        (Some(most), Some(least)) if most.0 != least.0 => format!(
            "{what} is highest for {}, {}, and lowest for {}, {}.",
            most.0,
            most.1.in_words(),
            least.0,
            least.1.in_words()
        ),
        (Some(only), _) => format!("{what} of {} is {}.", only.0, only.1.in_words()),
        (None, _) => format!("{what}: no number."),
    }
}

fn table(rows: &[(String, Estimate)]) -> Table {
    let headings = std::iter::once("of").chain(Estimate::HEADINGS).map(str::to_owned).collect();
    let row = |(label, estimate): &(String, Estimate)| std::iter::once(label.clone()).chain(estimate.cells()).collect();
    Table { headings, rows: rows.iter().map(row).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_repeat_the_mean_and_its_interval_are_there() {
        let estimate = Estimate { repeats: vec![1.0, 2.0, 3.0], mean: 2.0, interval: Some((-0.48, 4.48)) };
        let alone = Estimate { mean: 5.0, ..Estimate::default() };
        let rows = vec![("base".into(), estimate), ("other".into(), alone)];
        let dots = Dots { title: "Score".into(), description: None, value: Axis::of("score"), rows, mark: Some(2.0) };
        let figure = dots.draw();
        assert_eq!(figure.description, "score is highest for other, 5, and lowest for base, 2 [-0.48, 4.48].");
        let svg = figure.svg();
        let count = |what: &str| svg.matches(what).count();
        assert_eq!([count("\"repeat\""), count("\"mean\""), count("\"whisker\""), count("\"mark\"")], [3, 2, 3, 1]);
        assert_eq!(figure.data.rows[0], ["base", "2", "-0.48", "4.48", "1 2 3"]);
    }
}
