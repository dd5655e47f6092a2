//! A finished picture with what is said of it, and how it is written.

use std::fmt::Write as _;

use crate::scale::Scale;
use crate::style::style;
use crate::text::{escape, fit};

/// A picture, its title, what is to be seen in it, and its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// What it is of.
    pub title: String,
    /// What is to be seen, in words.
    pub description: String,
    /// What it is drawn from; of curves with many points, some.
    pub data: Table,
    size: (f64, f64),
    /// What its axes go over, for programs.
    scales: String,
    body: String,
}

/// Pixels up to which a picture fits a telephone.
pub(crate) const WIDTH: f64 = 360.0;

/// Numbers as text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Of the columns; the first is that of the labels.
    pub headings: Vec<String>,
    /// A label, then figures.
    pub rows: Vec<Vec<String>>,
}

impl Figure {
    pub(crate) fn new(title: &str, description: String, data: Table, canvas: Canvas) -> Self {
        let Canvas { width, height, scales, body } = canvas;
        Figure { title: title.to_owned(), description, data, size: (width, height), scales, body }
    }

    /// Its width over its height.
    pub fn aspect(&self) -> f64 {
        self.size.0 / self.size.1
    }

    /// Pixels it is wide at the size that its text is meant for.
    pub fn width(&self) -> f64 {
        self.size.0
    }

    /// A part of a page: the picture, and below it the numbers, folded away. `id` is unique on the page.
    pub fn html(&self, id: &str) -> String {
        let (id, title) = (escape(id), escape(&self.title));
        let picture = self.picture(&format!("aria-labelledby=\"{id}-t {id}-d\""), &id, "");
        // What is wider than a telephone is moved sideways in a box of its own, by keys too.
        let picture = match self.size.0 > WIDTH {
            true => {
                format!("<div class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"{title}\">{picture}</div>")
            }
            false => picture,
        };
        format!(
            "<figure class=\"chart\">{picture}<details><summary>Numbers of “{title}”</summary>\
             <div class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"Numbers of {title}\">{}</div></details></figure>",
            self.data.html(&self.title)
        )
    }

    /// A file that stands alone: with its style, and its numbers as comma separated text in `metadata`.
    pub fn svg(&self) -> String {
        let extra = format!(
            "<metadata>{}</metadata><style>{}</style><rect class=\"paper\" width=\"100%\" height=\"100%\"/>",
            // Line breaks are meant here.
            self.data.csv().lines().map(escape).collect::<Vec<_>>().join("\n"),
            style()
        );
        let mut text = self.picture("xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\"", "chart", &extra);
        text.push('\n');
        text
    }

    fn picture(&self, attributes: &str, id: &str, extra: &str) -> String {
        let (width, height) = (pixels(self.size.0), pixels(self.size.1));
        format!(
            "<svg {attributes}{} role=\"img\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">\
             <title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>{extra}{}</svg>",
            self.scales,
            escape(&self.title),
            escape(&self.description),
            self.body
        )
    }
}

impl Table {
    /// With headings for columns and rows, and a caption.
    pub fn html(&self, caption: &str) -> String {
        let mut text = format!("<table><caption>{}</caption><thead><tr>", escape(caption));
        for heading in &self.headings {
            let _ = write!(text, "<th scope=\"col\">{}</th>", escape(heading));
        }
        text += "</tr></thead><tbody>";
        for row in &self.rows {
            text += "<tr>";
            for (index, cell) in row.iter().enumerate() {
                let cell = escape(cell);
                let _ = if index == 0 {
                    write!(text, "<th scope=\"row\">{cell}</th>")
                } else {
                    write!(text, "<td>{cell}</td>")
                };
            }
            text += "</tr>";
        }
        text + "</tbody></table>"
    }

    /// Comma separated, as RFC 4180 has it.
    pub fn csv(&self) -> String {
        let field = |text: &String| {
            if text.contains([',', '"', '\n', '\r']) {
                format!("\"{}\"", text.replace('"', "\"\""))
            } else {
                text.clone()
            }
        };
        let line = |fields: &Vec<String>| fields.iter().map(field).collect::<Vec<_>>().join(",") + "\n";
        std::iter::once(&self.headings).chain(&self.rows).map(line).collect()
    }
}

/// What is being drawn.
pub(crate) struct Canvas {
    pub(crate) width: f64,
    pub(crate) height: f64,
    scales: String,
    body: String,
}

impl Canvas {
    /// An empty picture with its title at the top.
    pub(crate) fn new(width: f64, height: f64, title: &str) -> Self {
        let mut canvas = Canvas { width, height, scales: String::new(), body: String::new() };
        canvas.text("name", 4.0, 15.0, &fit(title, 12.5, width - 8.0));
        canvas
    }

    /// Says what the axes go over.
    pub(crate) fn say_scales(&mut self, x: &Scale, y: &Scale) {
        self.scales = format!(" data-x=\"{}\" data-y=\"{}\"", x.in_words(), y.in_words());
    }

    pub(crate) fn open(&mut self, class: &str) {
        let _ = write!(self.body, "<g class=\"{class}\">");
    }

    pub(crate) fn close(&mut self) {
        self.body += "</g>";
    }

    /// A group of shapes that says something when pointed at.
    pub(crate) fn open_saying(&mut self, class: &str, words: &str) {
        let _ = write!(self.body, "<g class=\"{class}\"><title>{}</title>", escape(words));
    }

    pub(crate) fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let _ = write!(self.body, "<text{class} x=\"{}\" y=\"{}\">{}</text>", pixels(x), pixels(y), escape(text));
    }

    pub(crate) fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let mut path = Path::default();
        path.line_to(x1, y1);
        path.line_to(x2, y2);
        self.path(class, &path.text());
    }

    pub(crate) fn rect(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64), round: f64) {
        let round = if round > 0.0 { format!(" rx=\"{}\"", pixels(round)) } else { String::new() };
        let [x, y, width, height] = [x, y, width, height].map(pixels);
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"{round}/>"
        );
    }

    pub(crate) fn path(&mut self, class: &str, path: &str) {
        if !path.is_empty() {
            let _ = write!(self.body, "<path class=\"{class}\" d=\"{path}\"/>");
        }
    }

    /// The mark of a series: each has its own shape.
    pub(crate) fn mark(&mut self, class: &str, series: usize, (x, y): (f64, f64), size: f64) {
        if !(x.is_finite() && y.is_finite()) {
            return;
        }
        let corners: &[(f64, f64)] = match series % 4 {
            0 => {
                let [x, y, size] = [x, y, size].map(pixels);
                let _ = write!(self.body, "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"{size}\"/>");
                return;
            }
            1 => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            2 => &[(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
            _ => &[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
        };
        let mut path = Path::default();
        for (dx, dy) in corners {
            path.line_to(x + dx * size, y + dy * size);
        }
        self.path(class, &(path.text() + "z"));
    }
}

/// A line through points, written short: in steps of a tenth of a pixel from one point to the next.
#[derive(Default)]
pub(crate) struct Path {
    text: String,
    last: Option<(i64, i64)>,
}

impl Path {
    /// Goes on to a point, or begins there. At a point that is nowhere the line has a gap.
    pub(crate) fn line_to(&mut self, x: f64, y: f64) {
        if !(x.is_finite() && y.is_finite()) {
            self.last = None;
            return;
        }
        let here = (tenths(x), tenths(y));
        match self.last.replace(here) {
            None => {
                let _ = write!(self.text, "M{}{}", tenth(here.0), joined(here.1));
            }
            Some(last) if last == here => {}
            Some((x, y)) => {
                let _ = write!(self.text, "l{}{}", tenth(here.0 - x), joined(here.1 - y));
            }
        }
    }

    pub(crate) fn text(self) -> String {
        self.text
    }
}

fn tenths(pixels: f64) -> i64 {
    (pixels * 10.0).round() as i64
}

/// A length in tenths of a pixel as a number.
fn tenth(tenths: i64) -> String {
    let (sign, size) = (if tenths < 0 { "-" } else { "" }, tenths.unsigned_abs());
    match (size / 10, size % 10) {
        (whole, 0) => format!("{sign}{whole}"),
        (0, part) => format!("{sign}.{part}"),
        (whole, part) => format!("{sign}{whole}.{part}"),
    }
}

/// The same behind another number: a minus parts them as well as a space.
fn joined(tenths: i64) -> String {
    if tenths < 0 { tenth(tenths) } else { format!(" {}", tenth(tenths)) }
}

/// A length as it is written.
pub(crate) fn pixels(length: f64) -> String {
    tenth(tenths(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_short_and_has_gaps() {
        let mut path = Path::default();
        for (x, y) in [(1.0, 2.0), (1.5, 1.0), (f64::NAN, 0.0), (3.0, 3.25), (3.0, 3.25), (3.1, 3.0)] {
            path.line_to(x, y);
        }
        assert_eq!(path.text(), "M1 2l.5-1M3 3.3l.1-.3");
        assert_eq!(pixels(-0.04), "0");
    }

    #[test]
    fn a_table_is_written_for_pages_and_for_programs() {
        let rows = vec![vec!["a,\"b\"".into(), "<1>".into()]];
        let table = Table { headings: vec!["name".into(), "x".into()], rows };
        assert_eq!(table.csv(), "name,x\n\"a,\"\"b\"\"\",<1>\n");
        let html = table.html("A & B");
        assert!(html.contains("<caption>A &amp; B</caption>") && html.contains("<td>&lt;1&gt;</td>"), "{html}");
        assert!(html.contains("<th scope=\"row\">a,&quot;b&quot;</th>"), "{html}");
    }
}
