//! Profiles and variants: named lists of edits, which may extend one another.

use indexmap::IndexMap;

use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, Problems, did_you_mean};
use crate::language::edit::{Action, Edit, Owner};
use crate::language::read::{self, Text, check_keys};
use crate::language::yaml::{Map, Node};

/// The profiles or the variants of a file, as written.
pub(crate) struct Layers {
    what: &'static str,
    layers: IndexMap<String, Layer>,
}

struct Layer {
    key: Span,
    extends: Vec<Text>,
    edits: Vec<Edit>,
}

impl Layers {
    /// Reads a section; `what` is `profile` or `variant`. All of it is checked, selected or not.
    pub(crate) fn read(section: Option<&Node>, what: &'static str, problems: &mut Problems) -> Self {
        let owner = if what == "profile" { Owner::Profile } else { Owner::Variant };
        let mut layers = IndexMap::new();
        let section = section.and_then(|node| read::mapping(node, &format!("{what}s"), problems));
        for (name, entry) in section.into_iter().flatten() {
            read::check_name(name, &entry.key, problems);
            let Some(map) = read::mapping(&entry.node, name, problems) else { continue };
            let place = format!("{what} `{name}`");
            check_keys(map, &place, &["extends", "remove", "stages", "rebind", "set"], problems);
            let extends =
                map.get("extends").map(|entry| read::texts(&entry.node, "extends", problems)).unwrap_or_default();
            let edits = read_edits(map, &owner(name.clone()), problems);
            layers.insert(name.clone(), Layer { key: entry.key.clone(), extends, edits });
        }
        let layers = Layers { what, layers };
        for (name, layer) in &layers.layers {
            for parent in &layer.extends {
                layers.check_parent(name, parent, problems);
            }
        }
        layers
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.layers.keys().map(String::as_str)
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.layers.contains_key(name)
    }

    /// All edits of a layer, those of what it extends first.
    pub(crate) fn edits(&self, name: &str, problems: &mut Problems) -> Vec<Edit> {
        self.flatten(name, &mut Vec::new(), problems)
    }

    fn check_parent(&self, name: &str, parent: &Text, problems: &mut Problems) {
        if !self.contains(&parent.value) {
            let others = self.names().filter(|other| *other != name);
            let hint = did_you_mean(&parent.value, self.what, others);
            let message = format!("{} `{name}` extends `{}`, which does not exist", self.what, parent.value);
            problems.push(Diagnostic::new(message, hint).at(parent.span.clone(), "not found"));
        }
    }

    fn flatten(&self, name: &str, open: &mut Vec<String>, problems: &mut Problems) -> Vec<Edit> {
        let Some(layer) = self.layers.get(name) else { return Vec::new() };
        if let Some(first) = open.iter().position(|other| other == name) {
            let circle = open[first..].iter().chain([&open[first]]).map(|n| format!("`{n}`")).collect::<Vec<_>>();
            let message = format!("{}s extend each other in a circle: {}", self.what, circle.join(" -> "));
            problems.push(
                Diagnostic::new(message, "take one of the `extends` away").at(layer.key.clone(), "in the circle"),
            );
            return Vec::new();
        }
        open.push(name.to_owned());
        let mut edits: Vec<Edit> = Vec::new();
        for parent in &layer.extends {
            for edit in self.flatten(&parent.value, open, problems) {
                let decided = layer.edits.iter().any(|own| covers(&own.path, &edit.path));
                let same = |other: &Edit| other.path == edit.path && agree(&other.action, &edit.action);
                if decided || edits.iter().any(same) {
                    continue;
                }
                if let Some(other) = edits.iter().find(|other| disagree(other, &edit)) {
                    problems.push(conflict(self.what, name, other, &edit));
                } else if !edits.iter().any(|other| covers(&other.path, &edit.path)) {
                    // What is left are removals: that of the whole stands for those of its parts.
                    edits.retain(|other| !covers(&edit.path, &other.path));
                    edits.push(edit);
                }
            }
        }
        open.pop();
        edits.extend(layer.edits.iter().cloned());
        edits
    }
}

/// `remove`, `stages`, `rebind` and `set`, in the order in which they are applied.
fn read_edits(map: &Map, owner: &Owner, problems: &mut Problems) -> Vec<Edit> {
    let mut edits: Vec<Edit> = Vec::new();
    if let Some(entry) = map.get("remove") {
        for Text { value, span } in read::texts(&entry.node, "remove", problems) {
            edits.push(Edit { path: value, span, action: Action::Remove, owner: owner.clone() });
        }
    }
    for (section, action) in
        [("stages", Action::Stage as fn(Node) -> Action), ("rebind", Action::Rebind), ("set", Action::Set)]
    {
        let section = map.get(section).and_then(|entry| read::mapping(&entry.node, section, problems));
        for (path, entry) in section.into_iter().flatten() {
            let (path, span) = (path.clone(), entry.key.clone());
            edits.push(Edit { path, span, action: action(entry.node.clone()), owner: owner.clone() });
        }
    }
    for (i, edit) in edits.iter().enumerate() {
        if let Some(other) = edits[..i].iter().find(|other| other.path == edit.path) {
            let message = format!("{owner} changes `{}` twice", edit.path);
            let diagnostic = Diagnostic::new(message, "keep one of the two");
            problems.push(diagnostic.at(edit.span.clone(), "here again").also(other.span.clone(), "first here"));
        }
    }
    edits
}

/// Whether a change at `outer` decides what stands at `inner`.
pub(crate) fn covers(outer: &str, inner: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Whether two changes of one path do the same.
fn agree(a: &Action, b: &Action) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b) && a.node().map(Node::to_json) == b.node().map(Node::to_json)
}

/// Whether the result of two changes would depend on their order.
fn disagree(a: &Edit, b: &Edit) -> bool {
    let both_remove = matches!((&a.action, &b.action), (Action::Remove, Action::Remove));
    (covers(&a.path, &b.path) || covers(&b.path, &a.path)) && !both_remove
}

fn conflict(what: &str, child: &str, first: &Edit, second: &Edit) -> Diagnostic {
    let message = format!("{what} `{child}` extends two {what}s that disagree on `{}`", second.path);
    Diagnostic::new(message, format!("decide `{}` in `{child}`", second.path))
        .at(second.span.clone(), format!("changed by {}", second.owner))
        .also(first.span.clone(), format!("changed by {}", first.owner))
}
