//! Charts as SVG, for a page or alone.
//!
//! | chart | shows |
//! |---|---|
//! | [`Lines`] | curves over a number, with bands |
//! | [`Dots`] | a row for each thing measured: every repeat, the mean, its interval |
//! | [`Sweep`] | the same over a number that was varied |
//! | [`Bars`] | sizes side by side |
//! | [`Heat`] | a number for each pair of two things |
//! | [`Graph`] | boxes in boxes, and the lines between them |
//!
//! Each is plain data with a `draw`, which gives a [`Figure`]: a picture with a title, a description that says in words what is to
//! be seen, and its numbers as a table. A figure is written as a part of a page ([`Figure::html`], which needs the rules of
//! [`style`] once) or as a file that stands alone ([`Figure::svg`]).
//!
//! Pictures have no colour of their own: strokes and fills are classes, so that light, dark and print are a matter of the style.
//! Nothing is told by colour alone: a series has a dash, a mark and a name, too. Equal data gives equal bytes, and every text is
//! escaped, marks of direction and control characters among it.
//!
//! ```
//! use chart::{Axis, Lines, Series};
//!
//! let points = vec![(1.0, 3.2), (2.0, 2.1), (3.0, 1.4)];
//! let series = vec![Series { label: "base".into(), points, band: vec![] }];
//! let figure = Lines { title: "Loss".into(), description: None, x: Axis::of("update"), y: Axis::of("loss"), series }.draw();
//! assert_eq!(figure.description, "loss over update. base goes from 3.2 to 1.4.");
//! assert!(figure.svg().starts_with("<svg"));
//! ```

mod axes;
mod bars;
mod dots;
mod figure;
mod graph;
mod heat;
mod layout;
mod lines;
mod scale;
mod style;
mod sweep;
mod text;

pub use axes::Axis;
pub use bars::{Bar, Bars};
pub use dots::{Dots, Estimate};
pub use figure::{Figure, Table};
pub use graph::{Edge, Graph, Line, Node, Shape, Tone};
pub use heat::Heat;
pub use lines::{Lines, Series};
pub use scale::number;
pub use style::style;
pub use sweep::{Sweep, Swept};
pub use text::{escape, visible};
