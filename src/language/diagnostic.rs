//! Messages about a pipeline: what is wrong, where it is written, what to do.
//!
//! Reading goes on after an error, so that one run shows all of them. Each message has one hint and needs no colour to be
//! understood.

use std::fmt::{self, Write as _};

use crate::ground::source::Span;
use crate::ground::terminal::{self, printable, printable_in_place};

/// Longest excerpt of a line that is shown, in characters, where no terminal is narrower.
const WIDTH: usize = 140;

/// One thing wrong, or odd.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    /// What is wrong, as a lower-case fragment.
    pub message: String,
    /// The place at fault, then others that have to do with it. None where no text is at fault, such as a file that does
    /// not exist.
    pub labels: Vec<Label>,
    /// What to do.
    pub hint: String,
    /// Whether it is only odd, and stops nothing.
    pub is_warning: bool,
    /// The variant or ablation cell in which it is wrong, where it is not the base.
    pub cell: Option<String>,
}

/// A place and what is to be said there.
#[derive(Clone, Debug)]
pub struct Label {
    /// Where.
    pub span: Span,
    /// What, in a few words.
    pub text: String,
}

impl Diagnostic {
    /// A message with its hint.
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Diagnostic { message: message.into(), labels: Vec::new(), hint: hint.into(), is_warning: false, cell: None }
    }

    /// Makes it one that stops nothing.
    pub fn warning(self) -> Self {
        Diagnostic { is_warning: true, ..self }
    }

    /// Points at the place at fault.
    pub fn at(mut self, span: Span, label: impl Into<String>) -> Self {
        self.labels.insert(0, Label { span, text: label.into() });
        self
    }

    /// Points at another place that has to do with it.
    pub fn also(mut self, span: Span, label: impl Into<String>) -> Self {
        self.labels.push(Label { span, text: label.into() });
        self
    }

    /// The place at fault.
    pub fn place(&self) -> Option<&Span> {
        self.labels.first().map(|label| &label.span)
    }
}

/// All that is wrong with a request or a pipeline. Ends a command with status 2.
///
/// `{}` prints plain text, `{:#}` with colours; [`terminal::has_colours`] says which of the two standard error can show.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    /// In the order of the files.
    pub diagnostics: Vec<Diagnostic>,
}

impl Diagnostics {
    /// Errors, and what is only odd.
    pub(crate) fn by_gravity(self) -> (Diagnostics, Diagnostics) {
        let (warnings, errors) = self.diagnostics.into_iter().partition(|diagnostic| diagnostic.is_warning);
        (Diagnostics { diagnostics: errors }, Diagnostics { diagnostics: warnings })
    }
}

impl From<Diagnostic> for Diagnostics {
    fn from(diagnostic: Diagnostic) -> Self {
        Diagnostics { diagnostics: vec![diagnostic] }
    }
}

impl std::error::Error for Diagnostics {}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, diagnostic) in self.diagnostics.iter().enumerate() {
            if i > 0 {
                f.write_char('\n')?;
            }
            write_one(f, diagnostic, if f.alternate() { &COLOURED } else { &PLAIN })?;
        }
        Ok(())
    }
}

/// Collects what is wrong while reading goes on.
#[derive(Debug, Default)]
pub(crate) struct Problems(pub(crate) Vec<Diagnostic>);

impl Problems {
    /// Adds one.
    pub(crate) fn push(&mut self, diagnostic: Diagnostic) {
        self.0.push(diagnostic);
    }

    /// The value, or `None` with its error kept.
    pub(crate) fn keep<T>(&mut self, result: Result<T, Diagnostic>) -> Option<T> {
        result.map_err(|diagnostic| self.push(diagnostic)).ok()
    }

    /// Takes all problems of another collection over, said to be of `cell`. What is already here is not repeated: a fault
    /// of the base would otherwise show once for every variant.
    pub(crate) fn absorb(&mut self, other: Problems, cell: Option<&str>) {
        for mut diagnostic in other.0 {
            let known = |d: &Diagnostic| d.message == diagnostic.message && d.place() == diagnostic.place();
            if !self.0.iter().any(known) {
                diagnostic.cell = cell.map(str::to_owned);
                self.0.push(diagnostic);
            }
        }
    }

    /// `value` if nothing is wrong.
    pub(crate) fn finish<T>(self, value: T) -> Result<T, Diagnostics> {
        if self.0.is_empty() { Ok(value) } else { Err(Diagnostics { diagnostics: self.0 }) }
    }
}

/// The candidate that `name` was most likely meant to be.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let close = |candidate: &&str| {
        let distance = strsim::damerau_levenshtein(&name.to_lowercase(), &candidate.to_lowercase());
        // A third of the letters may differ, but a name of one or two letters is not like every other.
        distance <= (name.chars().count().max(candidate.chars().count()) / 3).max(1)
            && distance < candidate.chars().count()
    };
    candidates
        .into_iter()
        .filter(close)
        .min_by_key(|candidate| strsim::damerau_levenshtein(&name.to_lowercase(), &candidate.to_lowercase()))
}

/// A hint for an unknown name: the nearest known one, otherwise all of them.
pub(crate) fn did_you_mean<'a>(name: &str, what: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    let candidates: Vec<&str> = candidates.into_iter().collect();
    match nearest(name, candidates.iter().copied()) {
        Some(candidate) => format!("did you mean `{candidate}`?"),
        None if candidates.is_empty() => format!("there is no {what} here"),
        None => format!("known {what}s: {}", quoted(candidates)),
    }
}

/// Names in backticks, with commas.
pub(crate) fn quoted<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    names.into_iter().map(|name| format!("`{}`", name.as_ref())).collect::<Vec<_>>().join(", ")
}

/// Escape sequences around the parts of a message.
struct Style {
    error: &'static str,
    warning: &'static str,
    frame: &'static str,
    caret: &'static str,
    other: &'static str,
    hint: &'static str,
    bold: &'static str,
    off: &'static str,
}

const PLAIN: Style = Style { error: "", warning: "", frame: "", caret: "", other: "", hint: "", bold: "", off: "" };
const COLOURED: Style = Style {
    error: "\x1b[1;31m",
    warning: "\x1b[1;33m",
    frame: "\x1b[34m",
    caret: "\x1b[31m",
    other: "\x1b[34m",
    hint: "\x1b[1;32m",
    bold: "\x1b[1m",
    off: "\x1b[0m",
};

fn write_one(f: &mut fmt::Formatter<'_>, diagnostic: &Diagnostic, style: &Style) -> fmt::Result {
    let Style { error, hint, bold, off, .. } = style;
    let (colour, word) = if diagnostic.is_warning { (style.warning, "warning") } else { (*error, "error") };
    writeln!(f, "{colour}{word}{off}{bold}: {}{off}", printable(&diagnostic.message))?;
    for (i, label) in diagnostic.labels.iter().enumerate() {
        write_excerpt(f, label, i == 0, style)?;
    }
    if let Some(cell) = &diagnostic.cell {
        writeln!(f, "  in: {cell}")?;
    }
    writeln!(f, "{hint}hint{off}: {}", printable(&diagnostic.hint))
}

fn write_excerpt(f: &mut fmt::Formatter<'_>, label: &Label, at_fault: bool, style: &Style) -> fmt::Result {
    let place = label.span.place();
    let gutter = " ".repeat(place.line.to_string().len());
    let (line, column, length) = excerpt(&label.span);
    let Style { frame, off, .. } = style;
    let (arrow, mark, colour) = if at_fault { ("-->", "^", style.caret) } else { (":::", "-", style.other) };
    writeln!(f, "{gutter}{frame}{arrow}{off} {}:{}:{}", printable(&place.file), place.line, place.column)?;
    writeln!(f, "{gutter} {frame}|{off}")?;
    writeln!(f, "{frame}{} |{off} {line}", place.line)?;
    let (blank, marks) = (" ".repeat(column), mark.repeat(length));
    writeln!(f, "{gutter} {frame}|{off} {blank}{colour}{marks} {}{off}", printable(&label.text))
}

/// The first line of a span, cropped around it; the column of its first character in that text and its length there,
/// which is 1 at least.
fn excerpt(span: &Span) -> (String, usize, usize) {
    let text = &span.source.text;
    let from = text[..span.start].rfind('\n').map_or(0, |i| i + 1);
    let to = text[span.start..].find('\n').map_or(text.len(), |i| span.start + i);
    let line: Vec<char> = printable_in_place(&text[from..to]).chars().collect();
    let column = text[from..span.start].chars().count();
    let length = text[span.start..span.end.clamp(span.start, to)].chars().count().max(1);
    // What stands before a line, and dots, have their place, too.
    let width = terminal::width().map_or(WIDTH, |columns| columns.saturating_sub(12).clamp(20, WIDTH));
    if line.len() <= width {
        return (line.into_iter().collect(), column, length);
    }
    let first = column.saturating_sub(width / 3).min(line.len().saturating_sub(width));
    let last = (first + width).min(line.len());
    let dots = if first > 0 { "..." } else { "" };
    let shown: String = line[first..last].iter().collect();
    let column = column - first + dots.len();
    (format!("{dots}{shown}{}", if last < line.len() { "..." } else { "" }), column, length.min(width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::source::Source;

    fn span(text: &str, start: usize, end: usize) -> Span {
        Span { source: Source::new("a.yaml", text), start, end }
    }

    #[test]
    fn a_message_shows_both_places_and_one_hint() {
        let text = "first: 1\nsecond:\n  third: x\n";
        let diagnostic = Diagnostic::new("they disagree", "choose one")
            .at(span(text, 26, 27), "this")
            .also(span(text, 0, 5), "that");
        let shown = Diagnostics::from(diagnostic).to_string();
        let expected = "error: they disagree\n --> a.yaml:3:10\n  |\n3 |   third: x\n  |          ^ this\n \
                        ::: a.yaml:1:1\n  |\n1 | first: 1\n  | ----- that\nhint: choose one\n";
        assert_eq!(shown, expected);
    }

    #[test]
    fn colours_change_nothing_but_escape_sequences() {
        let diagnostics = Diagnostics::from(Diagnostic::new("wrong", "do").at(span("a: 1", 3, 4), "here"));
        let (mut bare, mut escaped) = (String::new(), false);
        for c in format!("{diagnostics:#}").chars() {
            match c {
                '\x1b' => escaped = true,
                'm' if escaped => escaped = false,
                c if !escaped => bare.push(c),
                _ => {}
            }
        }
        assert_eq!(bare, diagnostics.to_string());
        assert_ne!(format!("{diagnostics:#}"), diagnostics.to_string());
    }

    #[test]
    fn a_long_line_is_cropped_around_the_caret() {
        let text = "x".repeat(500) + "HERE" + &"y".repeat(500);
        let shown = Diagnostics::from(Diagnostic::new("wrong", "do").at(span(&text, 500, 504), "")).to_string();
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines.iter().all(|line| line.len() < WIDTH + 20));
        let caret = lines[4].find("^^^^").unwrap();
        assert_eq!(&lines[3][caret..caret + 4], "HERE");
    }

    #[test]
    fn names_are_suggested_when_near_and_not_otherwise() {
        assert_eq!(nearest("learning_rte", ["take", "learning_rate"]), Some("learning_rate"));
        assert_eq!(nearest("studnet0", ["student0", "teacher"]), Some("student0"));
        assert_eq!(nearest("zebra", ["student0", "teacher"]), None);
        assert_eq!(nearest("a", ["b"]), None);
    }
}
