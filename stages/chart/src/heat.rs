//! A number for each pair of two things.

use crate::axes::WIDTH;
use crate::figure::{Canvas, Figure, Table};
use crate::scale::number;
use crate::style::STEPS;
use crate::text::{fit, visible, width};

/// A map of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Heat {
    /// What it is of.
    pub title: String,
    /// What is to be seen; without one, where the largest and the smallest are.
    pub description: Option<String>,
    /// What the numbers are.
    pub value: String,
    /// What runs down, and the names of the rows.
    pub down: (String, Vec<String>),
    /// What runs across, and the names of the columns.
    pub across: (String, Vec<String>),
    /// Row by row; nothing, or what is not finite, is an empty place.
    pub values: Vec<Vec<Option<f64>>>,
}

impl Heat {
    /// The picture.
    pub fn draw(&self) -> Figure {
        let (rows, columns) = (&self.down.1, &self.across.1);
        let labels = rows.iter().map(|row| width(row, 11.0)).fold(20.0, f64::max).min(110.0);
        let (left, top) = (labels + 12.0, 58.0);
        let cell = ((WIDTH - left - 6.0) / columns.len().max(1) as f64).min(90.0);
        let high = if cell >= 26.0 { 26.0 } else { cell.max(2.0) };
        let mut canvas = Canvas::new(WIDTH, top + high * rows.len() as f64 + 12.0, &self.title);
        let corner = format!("{} (down), {} (across)", self.down.0, self.across.0);
        canvas.text("quiet small", 4.0, 31.0, &fit(&corner, 10.0, WIDTH - 8.0));
        let numbers = || self.values.iter().flatten().flatten().copied().filter(|number| number.is_finite());
        let (low, high_value) = numbers().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        // Where they stand too close, only every so many have their name.
        let every = (24.0 / cell).ceil().max(1.0) as usize;
        for (index, column) in columns.iter().enumerate().step_by(every) {
            let x = left + cell * (index as f64 + 0.5);
            canvas.text("small middle", x, top - 6.0, &fit(column, 10.0, cell * every as f64));
        }
        let every = (12.0 / high).ceil().max(1.0) as usize;
        for (index, row) in rows.iter().enumerate() {
            let y = top + high * index as f64;
            if index % every == 0 {
                canvas.text("end", left - 6.0, y + high / 2.0 + 4.0, &fit(row, 11.0, labels));
            }
            for (at, column) in columns.iter().enumerate() {
                let value = self.values.get(index).and_then(|row| row.get(at)).copied().flatten();
                let Some(value) = value.filter(|value| value.is_finite()) else { continue };
                let share = if high_value > low { (value - low) / (high_value - low) } else { 0.5 };
                let step = ((share * STEPS as f64) as usize).min(STEPS - 1);
                let x = left + cell * at as f64;
                canvas.open_saying("cell", &format!("{row}, {column}: {}", number(value)));
                let gap = if cell > 8.0 { 1.0 } else { 0.0 };
                canvas.rect(&format!("h{step}"), (x, y), (cell - gap, high - gap), 0.0);
                let text = visible(&number(value));
                if width(&text, 11.0) < cell - 2.0 && high >= 14.0 {
                    canvas.text("middle", x + cell / 2.0, y + high / 2.0 + 4.0, &text);
                }
                canvas.close();
            }
        }
        let description = self.description.clone().unwrap_or_else(|| self.in_words());
        Figure::new(&self.title, description, self.table(), canvas)
    }

    fn in_words(&self) -> String {
        let mut all = Vec::new();
        for (row, values) in self.down.1.iter().zip(&self.values) {
            for (column, value) in self.across.1.iter().zip(values) {
                all.extend(value.filter(|value| value.is_finite()).map(|value| (value, row, column)));
            }
        }
        let place = |(value, row, column): &(f64, &String, &String)| format!("{} at {row}, {column}", number(*value));
        let by = |a: &&(f64, &String, &String), b: &&(f64, &String, &String)| a.0.total_cmp(&b.0);
        match (all.iter().max_by(by), all.iter().min_by(by)) {
            (Some(most), Some(least)) => {
                format!("{} is highest, {}, and lowest, {}.", self.value, place(most), place(least))
            }
            _ => format!("{}: no number.", self.value),
        }
    }

    fn table(&self) -> Table {
        let headings = std::iter::once(self.down.0.clone()).chain(self.across.1.iter().cloned()).collect();
        let cell = |value: &Option<f64>| value.map_or(String::new(), number);
        let row = |(row, values): (&String, &Vec<Option<f64>>)| {
            std::iter::once(row.clone()).chain(values.iter().map(cell)).collect()
        };
        Table { headings, rows: self.down.1.iter().zip(&self.values).map(row).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heat(rows: usize, columns: usize) -> Heat {
        let names = |what: &str, count: usize| (0..count).map(|index| format!("{what}{index}")).collect();
        let values =
            (0..rows).map(|row| (0..columns).map(|column| (row != column).then_some((row * column) as f64)).collect());
        Heat {
            title: "Map".into(),
            description: None,
            value: "loss".into(),
            down: ("layer".into(), names("l", rows)),
            across: ("head".into(), names("h", columns)),
            values: values.collect(),
        }
    }

    #[test]
    fn the_ends_are_said_and_holes_stay_empty() {
        let figure = heat(3, 3).draw();
        assert_eq!(figure.description, "loss is highest, 2 at l2, h1, and lowest, 0 at l0, h1.");
        assert_eq!(figure.svg().matches("<rect class=\"h").count(), 6);
        assert_eq!(figure.data.rows[2], ["l2", "0", "2", ""]);
    }

    #[test]
    fn a_large_map_has_no_text_inside() {
        let svg = heat(60, 100).draw().svg();
        assert!(svg.matches("<text").count() < 120, "{}", svg.matches("<text").count());
    }
}
