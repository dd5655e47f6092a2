//! Sizes side by side.

use crate::axes::{Axis, WIDTH};
use crate::dots::ticks;
use crate::figure::{Canvas, Figure, Table};
use crate::scale::{Scale, number};
use crate::style::class;
use crate::text::{fit, width};

/// Bars from 0, from top to bottom.
#[derive(Clone, Debug, PartialEq)]
pub struct Bars {
    /// What it is of.
    pub title: String,
    /// What is to be seen; without one, the largest.
    pub description: Option<String>,
    /// What was measured.
    pub value: Axis,
    /// A bar each.
    pub rows: Vec<Bar>,
}

/// One bar.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bar {
    /// Its name.
    pub label: String,
    /// How long it is.
    pub value: f64,
    /// The number in words, where it is not simply written, such as `2 min 03 s`.
    pub text: Option<String>,
    /// Which bars look alike.
    pub series: usize,
}

const ROW: f64 = 26.0;

impl Bars {
    /// The picture.
    pub fn draw(&self) -> Figure {
        let (top, bottom) = (26.0, 26.0 + ROW * self.rows.len() as f64);
        let mut canvas = Canvas::new(WIDTH, bottom + 36.0, &self.title);
        let (left, right) = (12.0, WIDTH - 12.0);
        let scale = Scale::over(self.rows.iter().map(|bar| bar.value).chain([0.0]), false, left, right);
        ticks(&mut canvas, &scale, (left, right), (top, bottom), &self.value.label);
        for (index, bar) in self.rows.iter().enumerate() {
            let y = top + ROW * index as f64;
            let text = bar.in_words();
            canvas.open_saying(&class(bar.series), &format!("{}: {text}", bar.label));
            canvas.text("", left, y + 11.0, &fit(&bar.label, 11.0, right - left - width(&text, 11.0) - 8.0));
            canvas.text("quiet end", right, y + 11.0, &text);
            if bar.value.is_finite() {
                let (zero, end) = (scale.at(0.0), scale.at(bar.value));
                canvas.rect("bar", (zero.min(end), y + 14.0), ((end - zero).abs().max(0.5), 8.0), 0.0);
            }
            canvas.close();
        }
        let finite = self.rows.iter().filter(|bar| bar.value.is_finite());
        let most = finite.max_by(|a, b| a.value.total_cmp(&b.value));
        let in_words = || {
            most.map_or_else(
                || format!("{}: no number.", self.value.label),
                |most| format!("{} is largest for {}, {}.", self.value.label, most.label, most.in_words()),
            )
        };
        let description = self.description.clone().unwrap_or_else(in_words);
        let rows = self.rows.iter().map(|bar| vec![bar.label.clone(), bar.in_words()]).collect();
        let table = Table { headings: vec!["of".into(), self.value.label.clone()], rows };
        Figure::new(&self.title, description, table, canvas)
    }
}

impl Bar {
    fn in_words(&self) -> String {
        self.text.clone().unwrap_or_else(|| number(self.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_begin_at_nothing() {
        let bar = |label: &str, value| Bar { label: label.into(), value, ..Bar::default() };
        let rows = vec![bar("teacher", 123.0), bar("student", -4.0), bar("lost", f64::NAN)];
        let figure = Bars { title: "Time".into(), description: None, value: Axis::of("seconds"), rows }.draw();
        assert_eq!(figure.description, "seconds is largest for teacher, 123.");
        assert_eq!(figure.svg().matches("class=\"bar\"").count(), 2);
    }
}
