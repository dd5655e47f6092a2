//! What people see: text that a terminal may be given, and how wide it is.

use std::io::{self, IsTerminal};

use serde_json::Value as Json;

/// The text on one line, with nothing in it that a terminal or a reader would obey: control characters, line breaks, and the
/// marks that turn the direction of what follows stand there as escapes.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => shown.push_str("\\n"),
            '\t' => shown.push(' '),
            c if is_obeyed(c) => shown.extend(c.escape_unicode()),
            c => shown.push(c),
        }
    }
    shown
}

/// The same with one character for each, for text under which something is marked.
pub(crate) fn printable_in_place(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_whitespace() {
                ' '
            } else if is_obeyed(c) {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// A message that may have several lines: those after the first are set off, so that none is taken for one of the program's.
pub(crate) fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n    | ")
}

/// Control characters, line and paragraph separators, and marks of direction.
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Whether a stream shows colours: a terminal, and `NO_COLOR` unset or empty.
pub(crate) fn has_colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Columns of the terminal behind standard error; `None` where that is no terminal.
pub(crate) fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stderr()).ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// Words on lines of at most `width` columns, where no word is longer than that.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A number with as many digits as a table needs: two after the point, four below 1.
pub(crate) fn figure(number: f64) -> String {
    let size = number.abs();
    let digits = match size {
        _ if !number.is_finite() => return number.to_string(),
        _ if size >= 1.0 => 2,
        _ if size >= 1e-3 || size == 0.0 => 4,
        _ => return format!("{number:.2e}"),
    };
    let text = format!("{number:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A value as one line of YAML.
pub(crate) fn flow(value: &Json) -> String {
    match value {
        Json::String(text) => text.clone(),
        Json::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Json::Object(fields) => {
            let fields: Vec<_> = fields.iter().map(|(name, value)| format!("{name}: {}", flow(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_for_a_terminal_to_obey() {
        let text = "a\u{1b}[31mb\rc\u{202e}d\u{2028}e\nf\u{7}";
        assert_eq!(printable(text), "a\\u{1b}[31mb\\u{d}c\\u{202e}d\\u{2028}e\\nf\\u{7}");
        assert_eq!(printable_in_place("\ta\u{202e}b"), " a\u{fffd}b");
        assert_eq!(printable_lines("x\nok: done"), "x\n    | ok: done");
        assert_eq!(printable("Grüße, 你好, שלום"), "Grüße, 你好, שלום");
    }

    #[test]
    fn lines_are_as_full_as_they_can_be() {
        assert_eq!(wrap("one two three  four", 9), ["one two", "three", "four"]);
        assert_eq!(wrap("unbreakable", 3), ["unbreakable"]);
        assert!(wrap("", 5).is_empty());
    }

    #[test]
    fn figures_have_as_many_digits_as_a_table_needs() {
        let cases = [
            (61.234, "61.23"),
            (1.5, "1.5"),
            (0.12345, "0.1235"),
            (0.0, "0"),
            (1.2e-5, "1.20e-5"),
            (-3.0, "-3"),
            (100.0, "100"),
        ];
        for (number, expected) in cases {
            assert_eq!(figure(number), expected);
        }
    }
}
