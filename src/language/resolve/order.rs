//! Order of stages by their edges, and the circles that make one impossible.

use std::collections::VecDeque;

use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;

use crate::ground::source::Span;
use crate::language::diagnostic::Diagnostic;

/// Stages by name, in file order, and what reads what: an edge leads from the one read to the reader and is written at a
/// place.
pub(super) type Reading<'a> = DiGraph<&'a str, Span>;

/// An order in which every stage follows those that it reads, ties in file order. Errors hold a message a circle.
pub(super) fn order(reading: &Reading, hint: &str) -> Result<Vec<NodeIndex>, Vec<Diagnostic>> {
    let circles: Vec<Diagnostic> = tarjan_scc(reading)
        .into_iter()
        .filter(|members| members.len() > 1)
        .map(|members| describe(reading, &members, hint))
        .collect();
    if !circles.is_empty() {
        return Err(circles);
    }
    Ok(crate::graph::in_order(reading))
}

fn describe(reading: &Reading, members: &[NodeIndex], hint: &str) -> Diagnostic {
    let first = *members.iter().min().expect("a circle has members");
    let circle = shortest(reading, first);
    let mut names: Vec<String> = circle.iter().map(|edge| format!("`{}`", reading[edge.source()])).collect();
    names.push(names[0].clone());
    let mut diagnostic =
        Diagnostic::new(format!("stages wait for each other in a circle: {}", names.join(" -> ")), hint);
    for (i, edge) in circle.iter().enumerate() {
        let label = format!("`{}` reads `{}`", reading[edge.target()], reading[edge.source()]);
        diagnostic = if i == 0 {
            diagnostic.at(edge.weight().clone(), label)
        } else {
            diagnostic.also(edge.weight().clone(), label)
        };
    }
    diagnostic
}

/// The edges of the shortest way from a stage back to itself.
fn shortest<'a>(reading: &'a Reading, start: NodeIndex) -> Vec<petgraph::graph::EdgeReference<'a, Span>> {
    let mut queue = VecDeque::from([(start, Vec::new())]);
    let mut seen = vec![false; reading.node_count()];
    while let Some((node, way)) = queue.pop_front() {
        for edge in reading.edges(node) {
            let longer: Vec<_> = way.iter().copied().chain([edge]).collect();
            if edge.target() == start {
                return longer;
            }
            if !std::mem::replace(&mut seen[edge.target().index()], true) {
                queue.push_back((edge.target(), longer));
            }
        }
    }
    unreachable!("a member of a circle reaches itself")
}
