//! Edits: what profiles, variants, ablation cells and `--set` do to the tree of a pipeline, by path.
//!
//! A path is how a person names a place: `params.seed`, `train.learn.divergence`, `train.carry.prompt`. It is looked up in
//! the tree as it stands, so that a wrong one is found before anything is built from it.

use std::fmt;

use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, did_you_mean, nearest};
use crate::language::kinds::{Kinds, WINDOW_FIELDS};
use crate::language::yaml::{Entry, Map, Node, Value};

/// Fields of a window inside a loop.
pub(crate) const LOOP_WINDOW_FIELDS: [&str; 8] = ["of", "rows", "take", "epochs", "repeat", "order", "seed", "last"];
/// Fields of a carried value.
pub(crate) const CARRY_FIELDS: [&str; 4] = ["from", "next", "keep", "keep_with"];

/// One change.
#[derive(Clone, Debug)]
pub(crate) struct Edit {
    /// The path as written.
    pub(crate) path: String,
    /// Where the path is written.
    pub(crate) span: Span,
    pub(crate) action: Action,
    /// Who wants it.
    pub(crate) owner: Owner,
}

/// What is done at the path.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Takes away what is there.
    Remove,
    /// Adds a stage or replaces a whole one.
    Stage(Node),
    /// Connects an edge elsewhere.
    Rebind(Node),
    /// Gives a value.
    Set(Node),
}

impl Action {
    /// The value it brings.
    pub(crate) fn node(&self) -> Option<&Node> {
        match self {
            Action::Remove => None,
            Action::Stage(node) | Action::Rebind(node) | Action::Set(node) => Some(node),
        }
    }
}

/// Who wants an edit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Profile(String),
    Variant(String),
    Ablation(String),
    CommandLine,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Profile(name) => write!(f, "profile `{name}`"),
            Owner::Variant(name) => write!(f, "variant `{name}`"),
            Owner::Ablation(name) => write!(f, "ablation `{name}`"),
            Owner::CommandLine => f.write_str("`--set`"),
        }
    }
}

/// Something an edit took away: what still refers to it is told who did.
#[derive(Clone, Debug)]
pub(crate) struct Removed {
    /// Keys from the root of the tree.
    pub(crate) keys: Vec<String>,
    pub(crate) span: Span,
    pub(crate) owner: Owner,
}

/// Why an edit could not be applied.
pub(crate) struct Refusal {
    pub(crate) diagnostic: Diagnostic,
    /// Because an earlier edit removed the place, which is no fault where other cells still have it.
    pub(crate) removed: bool,
}

/// Changes `tree`, and remembers what it takes away.
pub(crate) fn apply(tree: &mut Node, edit: &Edit, kinds: &Kinds, removed: &mut Vec<Removed>) -> Result<(), Refusal> {
    if let Action::Stage(node) = &edit.action {
        return add_stage(tree, edit, node.clone(), removed);
    }
    let found = locate(tree, edit, kinds, removed)?;
    let allowed = match (&edit.action, found.what) {
        (Action::Remove, What::Setting | What::Edge | What::Part | What::Stage) => {
            if found.exists {
                take(tree, &found.keys);
                removed.push(Removed { keys: found.keys, span: edit.span.clone(), owner: edit.owner.clone() });
                return Ok(());
            }
            let outer = found.keys[..found.keys.len() - 1].iter().map(String::as_str);
            let there = keys_of(tree.at(outer));
            Err(missing(tree, edit, &found.keys, &there, "there is nothing to remove"))
        }
        (Action::Remove, What::Fixed) => Err(wrong(edit, "it cannot be removed", "give it a value with `set`")),
        (Action::Rebind(_), What::Edge) => Ok(()),
        (Action::Rebind(_), _) => Err(wrong(edit, "it is no edge", "`rebind` takes paths such as `STAGE.in.PORT`")),
        (Action::Set(_), What::Edge) if edit.owner != Owner::CommandLine => {
            Err(wrong(edit, "it is an edge", "edges are changed with `rebind`"))
        }
        (Action::Set(_), What::Stage) => {
            Err(wrong(edit, "it is a whole stage", "replace a stage under `stages:`, or name one of its fields"))
        }
        (Action::Set(_), _) if !found.exists && !found.may_be_new => {
            Err(missing(tree, edit, &found.keys, &found.candidates, "there is nothing to set"))
        }
        (Action::Set(_), _) => Ok(()),
        (Action::Stage(_), _) => unreachable!("handled above"),
    };
    allowed.map_err(|diagnostic| Refusal { diagnostic, removed: false })?;
    let node = edit.action.node().expect("all other actions bring a value").clone();
    put(tree, &found.keys, node, edit).map_err(|diagnostic| Refusal { diagnostic, removed: false })
}

/// A place in the tree.
struct Located {
    /// Keys from the root.
    keys: Vec<String>,
    what: What,
    exists: bool,
    /// Whether it is a known place for a value, though there is none.
    may_be_new: bool,
    /// Names that could have stood for the last part of the path.
    candidates: Vec<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum What {
    /// A value that has a default.
    Setting,
    /// A value that must be there.
    Fixed,
    /// A reference to an output.
    Edge,
    /// A whole carried value or window.
    Part,
    /// A whole stage.
    Stage,
}

fn locate(tree: &Node, edit: &Edit, kinds: &Kinds, removed: &[Removed]) -> Result<Located, Refusal> {
    let parts: Vec<&str> = edit.path.split('.').collect();
    let here = Locator { tree, edit, kinds, removed };
    match parts.as_slice() {
        ["conventions"] => Ok(here.found(&["conventions"], What::Setting, true, Vec::new())),
        ["conventions", ..] => Err(here.refuse("`conventions` is one word", "set `conventions` itself")),
        ["params", name] => Ok(here.found(&["params", name], What::Fixed, false, keys_of(tree.get("params")))),
        ["params", ..] => Err(here.refuse("a parameter is named `params.NAME`", "write one name after `params.`")),
        [stage, rest @ ..] => {
            let Some(node) = tree.at(["stages", stage]) else {
                let mut candidates = keys_of(tree.get("stages"));
                candidates.extend(["params".into(), "conventions".into()]);
                return Err(here.unknown(&["stages", stage], stage, "stage", &candidates));
            };
            match node.get("loop") {
                Some(body) => here.in_loop(stage, body, rest),
                None => here.in_stage(vec!["stages", stage], node, rest, false),
            }
        }
        [] => unreachable!("a split text has one part at least"),
    }
}

struct Locator<'a> {
    tree: &'a Node,
    edit: &'a Edit,
    kinds: &'a Kinds<'a>,
    removed: &'a [Removed],
}

impl Locator<'_> {
    fn in_loop(&self, name: &str, body: &Node, rest: &[&str]) -> Result<Located, Refusal> {
        let inside = |keys: &[&'static str]| [&["stages", name, "loop"], keys].concat();
        match rest {
            [] => Ok(self.found(&["stages", name], What::Stage, false, Vec::new())),
            [part @ ("windows" | "carry"), item, field @ ..] => {
                let part = if *part == "windows" { "windows" } else { "carry" };
                let mut keys: Vec<&str> = inside(&[part]);
                keys.push(item);
                self.in_part(part, keys, keys_of(body.get(part)), field)
            }
            [part @ ("windows" | "carry")] => {
                Err(self.refuse(&format!("`{part}` holds several values"), &format!("name one: `{name}.{part}.NAME`")))
            }
            [stage, rest @ ..] if body.at(["stages", stage]).is_some() => {
                let mut keys: Vec<&str> = inside(&["stages"]);
                keys.push(stage);
                let node = body.at(["stages", stage]).expect("just seen");
                self.in_stage(keys, node, rest, true)
            }
            ["rounds"] => Ok(self.found(&inside(&["rounds"]), What::Setting, true, Vec::new())),
            ["unroll"] => Ok(self.found(&inside(&["unroll"]), What::Setting, true, Vec::new())),
            [other, ..] => {
                let mut candidates = keys_of(body.get("stages"));
                candidates.extend(["windows", "carry", "rounds", "unroll"].map(str::to_owned));
                let mut keys: Vec<&str> = inside(&["stages"]);
                keys.push(other);
                Err(self.unknown(&keys, other, "stage", &candidates))
            }
        }
    }

    /// A window or a carried value, or a field of one.
    fn in_part<'k>(
        &self,
        part: &str,
        mut keys: Vec<&'k str>,
        names: Vec<String>,
        field: &[&'k str],
    ) -> Result<Located, Refusal> {
        let name = *keys.last().expect("ends with the name");
        let exists = names.iter().any(|known| known == name);
        if !exists && !field.is_empty() {
            let what = if part == "windows" { "window" } else { "carried value" };
            return Err(self.unknown(&keys, name, what, &names));
        }
        let Some((first, deeper)) = field.split_first() else {
            let whole = self.edit.action.node().is_some_and(|node| node.map().is_some());
            return Ok(self.found(&keys, What::Part, whole, names));
        };
        let fields: &[&str] = if part == "windows" { &LOOP_WINDOW_FIELDS } else { &CARRY_FIELDS };
        if !fields.contains(first) {
            let candidates: Vec<String> = fields.iter().map(|&f| f.into()).collect();
            keys.push(first);
            return Err(self.unknown(&keys, first, "field", &candidates));
        }
        keys.push(first);
        keys.extend(deeper);
        let what = if ["of", "from", "next"].contains(first) { What::Edge } else { What::Setting };
        Ok(self.found(&keys, what, true, Vec::new()))
    }

    fn in_stage<'k>(
        &self,
        mut keys: Vec<&'k str>,
        node: &Node,
        rest: &[&'k str],
        in_loop: bool,
    ) -> Result<Located, Refusal> {
        let kind = node.get("kind").and_then(Node::text).and_then(|kind| self.kinds.get(kind));
        let top = kind.map(|kind| kind.schema().fields(&[])).unwrap_or_default();
        match rest {
            [] => Ok(self.found(&keys, What::Stage, false, Vec::new())),
            ["in", port] => {
                keys.extend(["in", port]);
                Ok(self.found(&keys, What::Edge, true, keys_of(node.get("in"))))
            }
            ["in", port, name] => {
                keys.extend(["in", port, name]);
                Ok(self.found(&keys, What::Edge, true, keys_of(node.at(["in", port]))))
            }
            ["in", ..] => Err(self.refuse("an edge is named `STAGE.in.PORT`", "write one port after `in.`")),
            ["every"] if in_loop && !top.names.iter().any(|name| name == "every") => {
                keys.push("every");
                Ok(self.found(&keys, What::Setting, true, Vec::new()))
            }
            ["kind", ..] => {
                Err(self.refuse("the kind of a stage cannot be set", "replace the whole stage under `stages:`"))
            }
            ["with"] => Err(self.refuse("`with` is no single value", "name a field: `STAGE.FIELD`")),
            ["with", fields @ ..] | fields => {
                keys.push("with");
                keys.extend(fields);
                let path: Vec<String> = fields.iter().map(|&f| f.to_owned()).collect();
                let (last, above) = path.split_last().expect("`[]` and `with` alone are matched before");
                let known = kind.map(|kind| kind.schema().fields(above)).unwrap_or_default();
                let mut names = known.names;
                let alone = !in_loop && above.is_empty() && kind.is_some_and(|kind| kind.alone.is_some());
                if alone {
                    names.extend(WINDOW_FIELDS.map(str::to_owned));
                }
                // Of an unknown kind no field is known: the kind is the error to show, later.
                let may_be_new = known.open || kind.is_none() || names.contains(last);
                let outer = keys[..keys.len() - 1].iter().copied();
                names.extend(keys_of(self.tree.at(outer)));
                Ok(self.found(&keys, What::Setting, may_be_new, names))
            }
        }
    }

    fn found(&self, keys: &[&str], what: What, may_be_new: bool, candidates: Vec<String>) -> Located {
        let exists = self.tree.at(keys.iter().copied()).is_some();
        let keys = keys.iter().map(|&key| key.to_owned()).collect();
        Located { keys, what, exists, may_be_new, candidates }
    }

    fn refuse(&self, message: &str, hint: &str) -> Refusal {
        let diagnostic = wrong(self.edit, message, hint);
        Refusal { diagnostic, removed: false }
    }

    fn unknown(&self, keys: &[&str], name: &str, what: &str, candidates: &[String]) -> Refusal {
        if let Some(removed) = removal(self.removed, keys) {
            let diagnostic = Diagnostic::new(
                format!("`{}` is to be changed, but {} removes it", self.edit.path, removed.owner),
                "do not change what is removed, or do not remove it",
            );
            let diagnostic =
                diagnostic.at(self.edit.span.clone(), "changed here").also(removed.span.clone(), "removed here");
            return Refusal { diagnostic, removed: true };
        }
        let hint = did_you_mean(name, what, candidates.iter().map(String::as_str));
        let diagnostic = Diagnostic::new(format!("`{}`: unknown {what} `{name}`", self.edit.path), hint)
            .at(self.edit.span.clone(), format!("asked for by {}", self.edit.owner));
        Refusal { diagnostic, removed: false }
    }
}

/// The edit that took away what stood at `keys`, or something around it.
pub(crate) fn removal<'a>(removed: &'a [Removed], keys: &[&str]) -> Option<&'a Removed> {
    removed
        .iter()
        .find(|removed| removed.keys.len() <= keys.len() && removed.keys.iter().zip(keys).all(|(a, b)| a == b))
}

fn keys_of(node: Option<&Node>) -> Vec<String> {
    node.and_then(Node::map).map(|map| map.keys().cloned().collect()).unwrap_or_default()
}

fn wrong(edit: &Edit, message: &str, hint: &str) -> Diagnostic {
    Diagnostic::new(format!("`{}`: {message}", edit.path), hint)
        .at(edit.span.clone(), format!("asked for by {}", edit.owner))
}

fn missing(tree: &Node, edit: &Edit, keys: &[String], candidates: &[String], message: &str) -> Diagnostic {
    let (last, outer) = keys.split_last().expect("a place has a key");
    let prefix = edit.path.rsplit_once('.').map_or("", |(prefix, _)| prefix);
    let hint = match nearest(last, candidates.iter().map(String::as_str)) {
        Some(near) if prefix.is_empty() => format!("did you mean `{near}`?"),
        Some(near) => format!("did you mean `{prefix}.{near}`?"),
        None => did_you_mean(last, "name", candidates.iter().map(String::as_str)),
    };
    let diagnostic = wrong(edit, message, &hint);
    match tree.at(outer.iter().map(String::as_str)) {
        Some(node) if node.map().is_some_and(|map| !map.is_empty()) => {
            diagnostic.also(node.span.clone(), "looked for in this mapping")
        }
        _ => diagnostic,
    }
}

/// Takes the entry away.
fn take(tree: &mut Node, keys: &[String]) {
    let (last, outer) = keys.split_last().expect("a place has a key");
    let mut node = tree;
    for key in outer {
        node = &mut node.map_mut().and_then(|map| map.get_mut(key)).expect("the place exists").node;
    }
    node.map_mut().expect("the place exists").shift_remove(last);
}

/// Puts a value in, with the mappings on the way to it.
fn put(tree: &mut Node, keys: &[String], value: Node, edit: &Edit) -> Result<(), Diagnostic> {
    let (last, outer) = keys.split_last().expect("a place has a key");
    let mut node = tree;
    for key in outer {
        let empty = || Entry { key: edit.span.clone(), node: Node::empty_map(edit.span.clone()) };
        let Some(map) = node.map_mut() else { return Err(not_a_mapping(edit, key)) };
        node = &mut map.entry(key.clone()).or_insert_with(empty).node;
        if matches!(node.value, Value::Null) {
            node.value = Value::Map(Map::new());
        }
    }
    let Some(map) = node.map_mut() else { return Err(not_a_mapping(edit, last)) };
    let old = map.get(last).map(|entry| &entry.node);
    let value = appended(old, value, edit)?;
    map.insert(last.clone(), Entry { key: edit.span.clone(), node: value });
    Ok(())
}

fn not_a_mapping(edit: &Edit, key: &str) -> Diagnostic {
    wrong(edit, &format!("what is above `{key}` is not a mapping"), "set the whole value instead")
}

/// `{append: [...]}` stands for the old list with more at its end; any other value for itself.
fn appended(old: Option<&Node>, value: Node, edit: &Edit) -> Result<Node, Diagnostic> {
    let Some(more) = value.map().filter(|map| map.len() == 1).and_then(|map| map.get("append")) else {
        return Ok(value);
    };
    match (old.map(|old| &old.value), &more.node.value) {
        (Some(Value::List(old)), Value::List(more_items)) => {
            let items = old.iter().chain(more_items).cloned().collect();
            Ok(Node { value: Value::List(items), span: more.node.span.clone(), from: None })
        }
        (_, Value::List(_)) => Err(wrong(edit, "there is no list to append to", "give the whole list")),
        _ => Err(wrong(edit, "`append` needs a list", "write `append: [VALUE]`")),
    }
}

/// Adds `NAME` or `LOOP.NAME`, or replaces the stage of that name where it stands.
fn add_stage(tree: &mut Node, edit: &Edit, stage: Node, removed: &mut Vec<Removed>) -> Result<(), Refusal> {
    let refuse = |diagnostic| Refusal { diagnostic, removed: false };
    let parts: Vec<&str> = edit.path.split('.').collect();
    let keys: Vec<&str> = match parts.as_slice() {
        [name] => vec!["stages", name],
        [name, inner] if tree.at(["stages", name, "loop"]).is_some() => vec!["stages", name, "loop", "stages", inner],
        [name, _] => {
            let loops = tree.get("stages").and_then(Node::map).into_iter().flatten();
            let loops = loops.filter(|(_, entry)| entry.node.get("loop").is_some()).map(|(name, _)| name.as_str());
            let hint = did_you_mean(name, "loop", loops);
            return Err(refuse(wrong(edit, &format!("there is no loop `{name}`"), &hint)));
        }
        _ => return Err(refuse(wrong(edit, "it is no name of a stage", "write `NAME` or `LOOP.NAME`"))),
    };
    let keys: Vec<String> = keys.into_iter().map(str::to_owned).collect();
    removed.retain(|old| old.keys != keys);
    put(tree, &keys, stage, edit).map_err(refuse)
}
