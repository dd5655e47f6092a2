//! Boxes in boxes, and the lines between them.

use std::collections::BTreeMap;

use crate::figure::{Canvas, Figure, Table, pixels};
use crate::layout::lay_out;
use crate::text::{fit, width};

/// A graph. Lines that lead back, such as to the next round, are [`Line::Dotted`]; the others make no circle.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// What it is of.
    pub title: String,
    /// What is to be seen; without one, how much there is.
    pub description: Option<String>,
    /// What there is.
    pub nodes: Vec<Node>,
    /// What leads where.
    pub edges: Vec<Edge>,
}

/// A box.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its name, then what it is.
    pub lines: Vec<String>,
    /// How it looks.
    pub shape: Shape,
    /// How it fares.
    pub tone: Tone,
    /// The box that it is in.
    pub parent: Option<usize>,
}

/// The outline of a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Something that is done.
    Box,
    /// Something that enters part by part.
    Slanted,
    /// Something that is handed on.
    Round,
}

/// How something fares; its text says so, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Nothing is said.
    Plain,
    /// Done.
    Good,
    /// Not there.
    Faint,
    /// Gone wrong.
    Bad,
}

/// A line from one box to another.
#[derive(Clone, Debug, PartialEq)]
pub struct Edge {
    /// Index of a node.
    pub from: usize,
    /// Index of a node.
    pub to: usize,
    /// What goes along it.
    pub label: String,
    /// How it looks.
    pub line: Line,
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// From store to store.
    Thick,
    /// In memory.
    Thin,
    /// To the next round.
    Dotted,
}

const LINE: f64 = 14.0;
const PADDING: f64 = 14.0;
const MARGIN: f64 = 8.0;

/// A node in its place.
#[derive(Clone, Copy, Default)]
struct Placed {
    at: (f64, f64),
    size: (f64, f64),
}

impl Graph {
    /// The picture.
    pub fn draw(&self) -> Figure {
        let mut placed = vec![Placed::default(); self.nodes.len()];
        let mut bends: BTreeMap<usize, Vec<(f64, f64)>> = BTreeMap::new();
        let (inner_width, height) = self.place(None, &mut placed, &mut bends);
        let width = (inner_width + 2.0 * MARGIN).max(240.0);
        let top = 26.0;
        let shift = ((width - inner_width) / 2.0, top);
        for node in &mut placed {
            node.at = (node.at.0 + shift.0, node.at.1 + shift.1);
        }
        for point in bends.values_mut().flatten() {
            *point = (point.0 + shift.0, point.1 + shift.1);
        }
        let mut canvas = Canvas::new(width, top + height + MARGIN, &self.title);
        // Boxes that hold others first, so that lines are above them.
        let (groups, others): (Vec<usize>, Vec<usize>) = (0..self.nodes.len()).partition(|node| self.is_group(*node));
        for node in groups {
            self.draw_node(&mut canvas, node, placed[node]);
        }
        for (index, edge) in self.edges.iter().enumerate() {
            let between = bends.get(&index).map_or(&[][..], Vec::as_slice);
            self.draw_edge(&mut canvas, edge, between, &placed);
        }
        for node in others {
            self.draw_node(&mut canvas, node, placed[node]);
        }
        let description = self.description.clone().unwrap_or_else(|| self.in_words());
        Figure::new(&self.title, description, self.table(), canvas)
    }

    fn is_group(&self, node: usize) -> bool {
        self.nodes.iter().any(|other| other.parent == Some(node))
    }

    /// Lays out what is in `parent`, relative to it, and says how large it is.
    fn place(
        &self,
        parent: Option<usize>,
        placed: &mut [Placed],
        bends: &mut BTreeMap<usize, Vec<(f64, f64)>>,
    ) -> (f64, f64) {
        let items: Vec<usize> = (0..self.nodes.len()).filter(|node| self.nodes[*node].parent == parent).collect();
        for &item in &items {
            let own = self.size_of_text(item);
            placed[item].size = own;
            if self.is_group(item) {
                let (width, height) = self.place(Some(item), placed, bends);
                let size = ((width + 2.0 * PADDING).max(own.0), height + 2.0 * PADDING + LINE);
                placed[item].size = size;
                let shift = ((size.0 - width) / 2.0, PADDING + LINE);
                self.move_inside(item, shift, placed, bends);
            }
        }
        let (mut edges, mut which) = (Vec::new(), Vec::new());
        for (index, edge) in self.edges.iter().enumerate().filter(|(_, edge)| edge.line != Line::Dotted) {
            let ends = (self.within(edge.from, &items), self.within(edge.to, &items));
            if let (Some(from), Some(to)) = ends
                && from != to
            {
                edges.push((from, to));
                which.push(index);
            }
        }
        let sizes: Vec<(f64, f64)> = items.iter().map(|item| placed[*item].size).collect();
        let layout = lay_out(&sizes, &edges);
        for (item, corner) in items.iter().zip(&layout.corners) {
            placed[*item].at = *corner;
            if self.is_group(*item) {
                self.move_inside(*item, *corner, placed, bends);
            }
        }
        for (index, points) in which.into_iter().zip(layout.bends) {
            bends.insert(index, points);
        }
        layout.size
    }

    /// Moves all that is in a box.
    fn move_inside(
        &self,
        group: usize,
        by: (f64, f64),
        placed: &mut [Placed],
        bends: &mut BTreeMap<usize, Vec<(f64, f64)>>,
    ) {
        for (node, place) in placed.iter_mut().enumerate() {
            if node != group && self.is_inside(node, group) {
                place.at = (place.at.0 + by.0, place.at.1 + by.1);
            }
        }
        for (index, points) in bends {
            let edge = &self.edges[*index];
            if [edge.from, edge.to].iter().all(|end| *end != group && self.is_inside(*end, group)) {
                for point in points {
                    *point = (point.0 + by.0, point.1 + by.1);
                }
            }
        }
    }

    fn is_inside(&self, node: usize, group: usize) -> bool {
        let mut at = Some(node);
        while let Some(node) = at {
            if node == group {
                return true;
            }
            at = self.nodes[node].parent;
        }
        false
    }

    /// Which of the items a node is, or is in.
    fn within(&self, node: usize, items: &[usize]) -> Option<usize> {
        items.iter().position(|item| self.is_inside(node, *item))
    }

    fn size_of_text(&self, node: usize) -> (f64, f64) {
        let lines = &self.nodes[node].lines;
        let widest = lines.iter().map(|line| width(line, 11.0)).fold(30.0, f64::max);
        (widest.min(190.0) + 20.0, LINE * lines.len().max(1) as f64 + 10.0)
    }

    fn draw_node(&self, canvas: &mut Canvas, index: usize, Placed { at: (x, y), size: (wide, high) }: Placed) {
        let node = &self.nodes[index];
        let is_group = self.is_group(index);
        let tone = match node.tone {
            Tone::Plain => "",
            Tone::Good => " good",
            Tone::Faint => " faint",
            Tone::Bad => " bad",
        };
        let class = format!("{}{tone}", if is_group { "group" } else { "box" });
        canvas.open_saying("node", &node.lines.join(", "));
        match node.shape {
            Shape::Box => canvas.rect(&class, (x, y), (wide, high), 3.0),
            Shape::Round => canvas.rect(&class, (x, y), (wide, high), high / 2.0),
            Shape::Slanted => {
                let path = format!(
                    "M{} {}h{}l-8 {}h-{}z",
                    pixels(x + 4.0),
                    pixels(y),
                    pixels(wide),
                    pixels(high),
                    pixels(wide)
                );
                canvas.path(&class, &path);
            }
        }
        for (line, text) in node.lines.iter().enumerate() {
            if is_group {
                canvas.text("", x + 8.0, y + 15.0 + LINE * line as f64, &fit(text, 11.0, wide - 12.0));
                continue;
            }
            let class = if line == 0 { "middle" } else { "quiet small middle" };
            canvas.text(class, x + wide / 2.0, y + 15.0 + LINE * line as f64, &fit(text, 11.0, 190.0));
        }
        canvas.close();
    }

    fn draw_edge(&self, canvas: &mut Canvas, edge: &Edge, between: &[(f64, f64)], placed: &[Placed]) {
        let (from, to) = (placed[edge.from], placed[edge.to]);
        let what = format!("{} to {}: {}", self.name(edge.from), self.name(edge.to), edge.label);
        let middle = |node: Placed| node.at.0 + node.size.0 / 2.0;
        if edge.line == Line::Dotted {
            canvas.open_saying("edge", &what);
            // Around the side, from the right of one to the right of the other.
            let (a, b) = (
                (from.at.0 + from.size.0, from.at.1 + from.size.1 / 2.0),
                (to.at.0 + to.size.0, to.at.1 + to.size.1 / 2.0),
            );
            let out = a.0.max(b.0) + 26.0;
            let text = format!(
                "M{} {}C{} {} {} {} {} {}",
                pixels(a.0),
                pixels(a.1),
                pixels(out),
                pixels(a.1),
                pixels(out),
                pixels(b.1),
                pixels(b.0 + 5.0),
                pixels(b.1)
            );
            canvas.path("dotted", &text);
            let [x, y] = [pixels(b.0), pixels(b.1)];
            canvas.path("dotted-tip", &format!("M{x} {y}l6-3.5v7z"));
            canvas.close();
            return;
        }
        let (class, start) = match edge.line {
            Line::Thick => ("thick", (middle(from), from.at.1 + from.size.1)),
            _ => ("thin", (middle(from), from.at.1 + from.size.1)),
        };
        // Lines that end in one box come apart, in the order in which they come.
        let same: Vec<&Edge> =
            self.edges.iter().filter(|other| other.to == edge.to && other.line != Line::Dotted).collect();
        let mut from_left: Vec<(f64, usize)> =
            same.iter().enumerate().map(|(index, other)| (middle(placed[other.from]), index)).collect();
        from_left.sort_by(|a, b| a.0.total_cmp(&b.0));
        let own = same.iter().position(|other| std::ptr::eq(*other, edge)).unwrap_or_default();
        let rank = from_left.iter().position(|(_, index)| *index == own).unwrap_or_default();
        let share = (rank as f64 + 1.0) / (same.len() as f64 + 1.0);
        let spread = (to.size.0 * 0.8).min(24.0 * same.len() as f64);
        let end = (middle(to) + (share - 0.5) * spread, to.at.1);
        canvas.open_saying("edge", &what);
        let mut text = format!("M{} {}", pixels(start.0), pixels(start.1));
        let mut last = start;
        for point in between.iter().copied().chain([(end.0, end.1 - 5.0)]) {
            let bend = (point.1 - last.1) / 2.0;
            let ends = [last.0, last.1 + bend, point.0, point.1 - bend, point.0, point.1].map(pixels);
            text += &format!("C{}", ends.join(" "));
            last = point;
        }
        canvas.path(class, &text);
        canvas.path("tip", &format!("M{} {}l-3.5-6h7z", pixels(end.0), pixels(end.1)));
        canvas.close();
    }

    fn name(&self, node: usize) -> String {
        let own = self.nodes[node].lines.first().cloned().unwrap_or_default();
        match self.nodes[node].parent {
            Some(parent) => format!("{}.{own}", self.name(parent)),
            None => own,
        }
    }

    fn in_words(&self) -> String {
        let groups = (0..self.nodes.len()).filter(|node| self.is_group(*node)).count();
        let boxes = self.nodes.len() - groups;
        let inside = if groups > 0 { format!(", some of them in {groups} larger") } else { String::new() };
        format!("{boxes} boxes{inside}, and {} lines between them.", self.edges.len())
    }

    fn table(&self) -> Table {
        let headings = ["from", "to", "what"].map(str::to_owned).to_vec();
        let row = |edge: &Edge| vec![self.name(edge.from), self.name(edge.to), edge.label.clone()];
        Table { headings, rows: self.edges.iter().map(row).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, parent: Option<usize>) -> Node {
        Node { lines: vec![name.into()], shape: Shape::Box, tone: Tone::Plain, parent }
    }

    fn edge(from: usize, to: usize, line: Line) -> Edge {
        Edge { from, to, label: "model".into(), line }
    }

    #[test]
    fn what_is_in_a_box_is_drawn_inside_of_it() {
        let nodes =
            vec![node("data", None), node("train", None), node("a", Some(1)), node("b", Some(1)), node("score", None)];
        let edges =
            vec![edge(0, 2, Line::Thick), edge(2, 3, Line::Thin), edge(3, 2, Line::Dotted), edge(3, 4, Line::Thick)];
        let graph = Graph { title: "Graph".into(), description: None, nodes, edges };
        let mut placed = vec![Placed::default(); 5];
        graph.place(None, &mut placed, &mut BTreeMap::new());
        let inside = |inner: Placed, outer: Placed| {
            inner.at.0 >= outer.at.0
                && inner.at.1 >= outer.at.1
                && inner.at.0 + inner.size.0 <= outer.at.0 + outer.size.0
                && inner.at.1 + inner.size.1 <= outer.at.1 + outer.size.1
        };
        assert!(inside(placed[2], placed[1]) && inside(placed[3], placed[1]));
        assert!(placed[0].at.1 < placed[1].at.1 && placed[1].at.1 < placed[4].at.1);
        let figure = graph.draw();
        assert_eq!(figure.description, "4 boxes, some of them in 1 larger, and 4 lines between them.");
        assert_eq!(figure.data.rows[1], ["train.a", "train.b", "model"]);
        assert_eq!(figure.svg().matches("class=\"dotted\"").count(), 1);
    }
}
