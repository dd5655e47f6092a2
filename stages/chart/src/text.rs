//! Text in a picture: what a reader of XML would obey is escaped, and how wide it is about.

/// The text on one line, with nothing hidden in it: control characters and marks that turn the direction of what follows stand
/// there as escapes, `\u{202e}`. Still to be escaped.
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => shown.push_str("\\n"),
            '\t' => shown.push(' '),
            c if is_hidden(c) => shown.extend(c.escape_unicode()),
            c => shown.push(c),
        }
    }
    shown
}

/// Control characters, separators of lines, marks of direction, and what XML does not allow.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
        || matches!(u32::from(c) & 0xffff, 0xfffe | 0xffff)
}

/// [`visible`] text for XML and HTML, between tags or in an attribute.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in visible(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Pixels that a text is wide, about: the fonts of readers differ.
pub(crate) fn width(text: &str, size: f64) -> f64 {
    let of = |c: char| match c {
        'i' | 'l' | 'j' | 't' | 'f' | 'I' | '.' | ',' | ' ' | '\'' | '|' | ':' => 0.36,
        'm' | 'w' | 'M' | 'W' | '%' => 0.9,
        '\u{1100}'.. => 1.0,
        c if c.is_uppercase() => 0.7,
        _ => 0.6,
    };
    text.chars().map(of).sum::<f64>() * size
}

/// The beginning of a text that fits into so many pixels.
pub(crate) fn fit(text: &str, size: f64, pixels: f64) -> String {
    let text = visible(text);
    if width(&text, size) <= pixels {
        return text;
    }
    let mut fitting = String::new();
    for c in text.chars() {
        fitting.push(c);
        if width(&fitting, size) + size > pixels {
            fitting.pop();
            break;
        }
    }
    fitting.trim_end().to_owned() + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_obeyed_and_nothing_is_hidden() {
        let hostile = "</script>\"'&\u{202e}a\u{0}\u{7}b\nc\u{ffff}";
        let safe = "&lt;/script&gt;&quot;&#39;&amp;\\u{202e}a\\u{0}\\u{7}b\\nc\\u{ffff}";
        assert_eq!(escape(hostile), safe);
        assert_eq!(escape("Grüße, 你好, שלום"), "Grüße, 你好, שלום");
    }

    #[test]
    fn what_does_not_fit_is_cut() {
        assert_eq!(fit("short", 10.0, 100.0), "short");
        let cut = fit("a very long text that goes on and on", 10.0, 100.0);
        assert!(cut.ends_with('…') && width(&cut, 10.0) <= 104.0, "{cut}");
        assert_eq!(fit("你好你好你好", 10.0, 30.0), "你好…");
    }
}
