//! Texts and places in them.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A text with the name it goes by in messages.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// The file as given, or the flag whose argument it is.
    pub name: String,
    /// All of it.
    pub text: String,
    /// Where each line begins, in bytes.
    lines: Vec<usize>,
}

impl Source {
    /// A text that spans can share.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Arc<Self> {
        let text = text.into();
        let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Arc::new(Source { name: name.into(), text, lines })
    }

    /// The byte at which a line begins, counted from 1; none where there is no such line.
    pub fn line_start(&self, line: usize) -> Option<usize> {
        self.lines.get(line.checked_sub(1)?).copied()
    }
}

/// A part of a source, from byte `start` to before byte `end`.
#[derive(Clone, PartialEq, Eq)]
pub struct Span {
    /// Where it is.
    pub source: Arc<Source>,
    /// First byte.
    pub start: usize,
    /// After the last byte.
    pub end: usize,
}

impl Span {
    /// All of a source.
    pub fn whole(source: &Arc<Source>) -> Self {
        Span { source: source.clone(), start: 0, end: source.text.len() }
    }

    /// File, line and column of the first character.
    pub fn place(&self) -> Place {
        let Source { name, text, lines } = &*self.source;
        let line = lines.partition_point(|begin| *begin <= self.start);
        let column = text[lines[line - 1]..self.start].chars().count() + 1;
        Place { file: name.clone(), line, column }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}..{}", self.source.name, self.start, self.end)
    }
}

/// A place in a file, for messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The file as given.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
}
