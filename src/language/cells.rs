//! Which cells a request selects: variants, crossed with the settings of an ablation, with the edits that lead to each.

use indexmap::IndexMap;
use serde_json::Value as Json;

use crate::ground::source::{Source, Span};
use crate::language::Request;
use crate::language::diagnostic::{Diagnostic, Problems, did_you_mean};
use crate::language::edit::{Action, Edit, Owner};
use crate::language::read::{self, Text, check_keys};
use crate::language::variants::{Layers, covers};
use crate::language::yaml::{self, Node};

/// Most cells of one ablation: more is a slip of the pen.
const MAX_CELLS: usize = 10_000;

/// One cell to be built.
pub(crate) struct CellPlan {
    pub(crate) label: String,
    pub(crate) variant: String,
    pub(crate) over: Vec<(String, Json)>,
    pub(crate) repeat: Vec<(String, Json)>,
    /// What leads from the base to the cell, in the order of application.
    pub(crate) edits: Vec<Edit>,
}

/// An ablation as written.
struct Ablation {
    over: Vec<Axis>,
    repeat: Vec<Axis>,
    variants: Vec<Text>,
}

/// A path with the values it takes.
struct Axis {
    path: String,
    span: Span,
    values: Vec<Node>,
}

/// The cells of a request: in order of its variants, then of the axes of its ablation, the last axis fastest.
pub(crate) fn select(request: &Request, tree: &Node, variants: &Layers, problems: &mut Problems) -> Vec<CellPlan> {
    let profiles = Layers::read(tree.get("profiles"), "profile", problems);
    let ablations = read_ablations(tree.get("ablations"), variants, problems);
    let profile = chosen("--profile", request.profile.as_deref(), profiles.names(), "profile", problems);
    let profile = profile.map(|name| profiles.edits(&name, problems)).unwrap_or_default();
    let names = ablations.keys().map(String::as_str);
    let ablation = chosen("--ablation", request.ablation.as_deref(), names, "ablation", problems);
    let ablation = ablation.map(|name| (&ablations[&name], Owner::Ablation(name)));
    let set: Vec<Edit> = request.set.iter().filter_map(|argument| problems.keep(parse_set(argument))).collect();

    if let Some((ablation, owner)) = &ablation {
        check_overridden(ablation, owner, &set, problems);
    }
    let grid = ablation.as_ref().map_or_else(|| vec![Point::default()], |(ablation, owner)| grid(ablation, owner));
    let listed = ablation.as_ref().map_or(&[][..], |(ablation, _)| &ablation.variants);
    let selected = selected_variants(request, listed, variants, problems);
    let count = selected.len() * grid.len();
    if count > MAX_CELLS {
        let message = format!("the request asks for {count} cells, which is more than {MAX_CELLS}");
        problems.push(Diagnostic::new(message, "split the ablation"));
        return Vec::new();
    }
    let mut cells = Vec::with_capacity(count);
    for variant in selected {
        let changes = variants.edits(&variant, problems);
        for point in &grid {
            let settings = point.over.iter().chain(&point.repeat);
            let label =
                settings.fold(variant.clone(), |label, (path, value)| format!("{label} {path}={}", show(value)));
            let edits = [&profile, &changes, &point.edits, &set].into_iter().flatten().cloned().collect();
            let (over, repeat) = (point.over.clone(), point.repeat.clone());
            cells.push(CellPlan { label, variant: variant.clone(), over, repeat, edits });
        }
    }
    cells
}

/// A setting as `--set` takes it.
fn show(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The command line wins, so cells would be named after settings that they do not have.
fn check_overridden(ablation: &Ablation, owner: &Owner, set: &[Edit], problems: &mut Problems) {
    for axis in ablation.over.iter().chain(&ablation.repeat) {
        let overlaps = |edit: &&Edit| covers(&edit.path, &axis.path) || covers(&axis.path, &edit.path);
        if let Some(edit) = set.iter().find(overlaps) {
            let message = format!("`--set` decides `{}`, which {owner} varies", edit.path);
            let diagnostic = Diagnostic::new(message, "leave out `--set`, or the ablation");
            problems.push(diagnostic.at(edit.span.clone(), "decided").also(axis.span.clone(), "varied"));
        }
    }
}

fn selected_variants(request: &Request, listed: &[Text], variants: &Layers, problems: &mut Problems) -> Vec<String> {
    let known = || variants.names().chain(["base"]);
    let mut selected: Vec<String> = Vec::new();
    if request.all_variants {
        selected.push("base".into());
        selected.extend(variants.names().map(str::to_owned));
    } else if !request.variants.is_empty() {
        for name in &request.variants {
            selected.extend(chosen("--variant", Some(name), known(), "variant", problems));
        }
    } else if !listed.is_empty() {
        selected.extend(listed.iter().map(|text| text.value.clone()));
    } else {
        selected.push("base".into());
    }
    let mut seen = std::collections::HashSet::new();
    selected.retain(|name| seen.insert(name.clone()));
    selected
}

/// The name a flag gives, if there is such a thing.
fn chosen<'a>(
    flag: &str,
    name: Option<&str>,
    known: impl Iterator<Item = &'a str>,
    what: &str,
    problems: &mut Problems,
) -> Option<String> {
    let name = name?;
    let known: Vec<&str> = known.collect();
    if known.contains(&name) {
        return Some(name.to_owned());
    }
    let hint = did_you_mean(name, what, known);
    let diagnostic = Diagnostic::new(format!("unknown {what} `{name}`"), hint);
    problems.push(diagnostic.at(Span::whole(&Source::new(flag, name)), "not in the pipeline"));
    None
}

/// Reads `path=value`, the value as YAML.
fn parse_set(argument: &str) -> Result<Edit, Diagnostic> {
    let source = Source::new("--set", argument);
    let Some(equals) = argument.find('=').filter(|&i| i > 0) else {
        let diagnostic = Diagnostic::new(format!("`--set {argument}` gives no value"), "write `--set path=value`");
        return Err(diagnostic.at(Span::whole(&source), "expected `path=value`"));
    };
    let value = yaml::parse_from(&source, equals + 1).map_err(|mut error| {
        // The shell has taken its own quotes away.
        if argument[equals + 1..]
            .trim_start()
            .starts_with(['{', '[', '"', '\'', '&', '*', '!', '|', '>', '%', '@', '`'])
        {
            error.hint = format!(
                "close what is open; a text that begins so is quoted for YAML, inside of the shell's quotes: `--set '{}=\"...\"'`",
                &argument[..equals]
            );
        }
        error
    })?;
    let span = Span { source: source.clone(), start: 0, end: equals };
    let path = argument[..equals].to_owned();
    Ok(Edit { path, span, action: Action::Set(value), owner: Owner::CommandLine })
}

fn read_ablations(section: Option<&Node>, variants: &Layers, problems: &mut Problems) -> IndexMap<String, Ablation> {
    let mut ablations = IndexMap::new();
    let section = section.and_then(|node| read::mapping(node, "ablations", problems));
    for (name, entry) in section.into_iter().flatten() {
        read::check_name(name, &entry.key, problems);
        let Some(map) = read::mapping(&entry.node, name, problems) else { continue };
        check_keys(map, &format!("ablation `{name}`"), &["over", "repeat", "variants"], problems);
        let mut axes = |key| {
            let section = map.get(key).and_then(|entry| read::mapping(&entry.node, key, problems));
            let axes = section.into_iter().flatten().map(|(path, entry)| {
                let values = read::list(&entry.node, path, problems).unwrap_or_default().to_vec();
                if values.is_empty() {
                    let message = format!("`{path}` of ablation `{name}` takes no value");
                    let diagnostic = Diagnostic::new(message, "give a list with one value or more");
                    problems.push(diagnostic.at(entry.key.clone(), "no values"));
                }
                Axis { path: path.clone(), span: entry.key.clone(), values }
            });
            axes.collect::<Vec<_>>()
        };
        let (over, repeat) = (axes("over"), axes("repeat"));
        for axis in &repeat {
            if let Some(other) = over.iter().find(|other| other.path == axis.path) {
                let message = format!("ablation `{name}` both compares and repeats over `{}`", axis.path);
                let diagnostic = Diagnostic::new(message, "take it away from `over` or from `repeat`");
                problems.push(diagnostic.at(axis.span.clone(), "repeated").also(other.span.clone(), "compared"));
            }
        }
        let listed = map.get("variants").map(|entry| read::texts(&entry.node, "variants", problems));
        let listed = listed.unwrap_or_default();
        for Text { value, span } in listed.iter().filter(|text| text.value != "base" && !variants.contains(&text.value))
        {
            problems.push(read::unknown("variant", value, span, variants.names(), &[], &[]));
        }
        let known = |text: &Text| text.value == "base" || variants.contains(&text.value);
        let listed = listed.into_iter().filter(known).collect();
        ablations.insert(name.clone(), Ablation { over, repeat, variants: listed });
    }
    ablations
}

/// One combination of the settings of an ablation.
#[derive(Clone, Default)]
struct Point {
    over: Vec<(String, Json)>,
    repeat: Vec<(String, Json)>,
    edits: Vec<Edit>,
}

fn grid(ablation: &Ablation, owner: &Owner) -> Vec<Point> {
    let mut points = vec![Point::default()];
    let axes = ablation.over.iter().map(|axis| (axis, false)).chain(ablation.repeat.iter().map(|axis| (axis, true)));
    for (axis, repeated) in axes {
        let extended = points.iter().take(MAX_CELLS + 1).flat_map(|point| {
            axis.values.iter().map(move |value| {
                let mut point = point.clone();
                let settings = if repeated { &mut point.repeat } else { &mut point.over };
                settings.push((axis.path.clone(), value.to_json()));
                let (path, span) = (axis.path.clone(), axis.span.clone());
                point.edits.push(Edit { path, span, action: Action::Set(value.clone()), owner: owner.clone() });
                point
            })
        });
        points = extended.take(MAX_CELLS + 1).collect();
    }
    points
}
