//! The frame of a chart with two axes.

pub(crate) use crate::figure::WIDTH;

use crate::figure::Canvas;
use crate::scale::Scale;
use crate::text::{fit, width};

/// What runs along an axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// With its unit, if it has one.
    pub label: String,
    /// Whether equal ratios are equal distances; only where every number is above 0.
    pub is_log: bool,
}

impl Axis {
    /// With equal distances.
    pub fn of(label: &str) -> Self {
        Axis { label: label.to_owned(), is_log: false }
    }

    /// With equal ratios.
    pub fn log(label: &str) -> Self {
        Axis { label: label.to_owned(), is_log: true }
    }
}

/// The height of a chart: small, to be set side by side where there is room.
pub(crate) const HEIGHT: f64 = 224.0;

/// Where things are inside of the axes.
pub(crate) struct Frame {
    pub(crate) x: Scale,
    pub(crate) y: Scale,
    pub(crate) right: f64,
    pub(crate) top: f64,
    pub(crate) bottom: f64,
}

/// Draws two axes over all that is to be shown, and leaves `margin` to the right of them.
pub(crate) fn frame(canvas: &mut Canvas, (x, xs): (&Axis, &[f64]), (y, ys): (&Axis, &[f64]), margin: f64) -> Frame {
    let (top, bottom) = (40.0, canvas.height - 34.0);
    let vertical = Scale::over(ys.iter().copied(), y.is_log, bottom, top);
    let ticks = vertical.ticks(4);
    let widest = ticks.iter().map(|(_, text)| width(text, 11.0)).fold(0.0, f64::max);
    let (left, right) = (widest + 12.0, canvas.width - 10.0 - margin);
    let horizontal = Scale::over(xs.iter().copied(), x.is_log, left, right);
    for (value, text) in &ticks {
        let at = vertical.at(*value);
        canvas.line("grid", (left, at), (right, at));
        canvas.text("quiet end", left - 5.0, at + 4.0, text);
    }
    canvas.text("quiet small", 4.0, 31.0, &fit(&y.label, 10.0, canvas.width - 8.0));
    canvas.line("axis", (left, bottom), (right, bottom));
    let mut taken = f64::NEG_INFINITY;
    for (value, text) in horizontal.ticks(((right - left) / 55.0) as usize) {
        let (at, half) = (horizontal.at(value), width(&text, 11.0) / 2.0);
        canvas.line("axis", (at, bottom), (at, bottom + 4.0));
        if at - half > taken && at + half < canvas.width {
            canvas.text("quiet middle", at, bottom + 16.0, &text);
            taken = at + half + 6.0;
        }
    }
    canvas.text("quiet small middle", (left + right) / 2.0, bottom + 29.0, &fit(&x.label, 10.0, right - left));
    Frame { x: horizontal, y: vertical, right, top, bottom }
}

/// Places for labels that would stand on one another, moved as little as is needed; `wanted` in any order.
pub(crate) fn spread(wanted: &[f64], apart: f64, top: f64, bottom: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]).then(a.cmp(b)));
    let mut places = wanted.to_vec();
    let mut above = top - apart;
    for &index in &order {
        places[index] = places[index].max(above + apart);
        above = places[index];
    }
    let mut below = bottom + apart;
    for &index in order.iter().rev() {
        places[index] = places[index].min(below - apart);
        below = places[index];
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_do_not_stand_on_one_another() {
        assert_eq!(spread(&[50.0, 10.0], 11.0, 0.0, 100.0), [50.0, 10.0]);
        assert_eq!(spread(&[50.0, 50.0, 50.0], 10.0, 0.0, 100.0), [50.0, 60.0, 70.0]);
        assert_eq!(spread(&[98.0, 99.0], 10.0, 0.0, 100.0), [90.0, 100.0]);
    }
}
