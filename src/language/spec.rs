//! The spec: what the file says, typed, with places; names are not resolved yet.

use std::collections::BTreeMap;

use contract::Conventions;
use contract::port::one_of_several;
use indexmap::IndexMap;

use crate::graph::{Every, Last, Mode, Order};
use crate::ground::source::Place;
use crate::ground::source::Span;
use crate::language::diagnostic::{Diagnostic, Problems, did_you_mean};
use crate::language::edit::{CARRY_FIELDS, LOOP_WINDOW_FIELDS, Removed};
use crate::language::read::{self, Text, check_keys, check_name, mapping};
use crate::language::yaml::{Map, Node, Value};

/// One cell of a pipeline: all edits applied, all parameters put in.
pub(crate) struct Spec {
    pub(crate) conventions: Conventions,
    pub(crate) stages: IndexMap<String, StageSpec>,
    pub(crate) report: Option<ReportSpec>,
    /// What edits took away, for messages.
    pub(crate) removed: Vec<Removed>,
}

/// A top-level stage.
pub(crate) enum StageSpec {
    Operator(OperatorSpec),
    Loop(LoopSpec),
}

impl StageSpec {
    pub(crate) fn span(&self) -> &Span {
        match self {
            StageSpec::Operator(operator) => &operator.span,
            StageSpec::Loop(body) => &body.span,
        }
    }
}

/// A stage with a kind.
pub(crate) struct OperatorSpec {
    /// Its name in the file.
    pub(crate) span: Span,
    /// Absent where that is itself the fault, which is then said already.
    pub(crate) kind: Option<Text>,
    /// Port, where it is written, and what it reads.
    pub(crate) inputs: IndexMap<String, InputSpec>,
    /// A mapping.
    pub(crate) with: Node,
    pub(crate) every: Option<(Every, Span)>,
}

/// An edge as written.
pub(crate) struct InputSpec {
    pub(crate) port: Span,
    pub(crate) source: Text,
}

/// A loop.
pub(crate) struct LoopSpec {
    /// Its name in the file.
    pub(crate) span: Span,
    pub(crate) windows: IndexMap<String, WindowSpec>,
    pub(crate) carry: IndexMap<String, CarrySpec>,
    pub(crate) stages: IndexMap<String, OperatorSpec>,
    pub(crate) rounds: Option<u64>,
    pub(crate) unroll: bool,
    /// Whether a part of it could not be read, so that nothing is said of its outputs.
    pub(crate) broken: bool,
}

/// A window of a loop.
pub(crate) struct WindowSpec {
    pub(crate) of: Option<Text>,
    pub(crate) fields: WindowFields,
}

/// The numbers of a window, in a loop or in the `with` of a training kind used alone.
pub(crate) struct WindowFields {
    pub(crate) rows: Option<u64>,
    pub(crate) take: Option<u64>,
    pub(crate) epochs: Option<(u64, Span)>,
    pub(crate) order: Order,
    pub(crate) seed: u64,
    pub(crate) last: Last,
    /// Where each is written.
    pub(crate) places: BTreeMap<String, Place>,
}

/// A carried value.
pub(crate) struct CarrySpec {
    pub(crate) span: Span,
    pub(crate) from: Option<Text>,
    pub(crate) next: Option<Text>,
    pub(crate) keep: KeepSpec,
}

/// Which round's value leaves the loop.
pub(crate) enum KeepSpec {
    Last,
    Best { metric: Text, mode: Mode },
    With(Text),
}

/// The table at the end.
pub(crate) struct ReportSpec {
    pub(crate) metrics: IndexMap<String, Text>,
    pub(crate) compare: Vec<Text>,
    pub(crate) baseline: Option<String>,
    pub(crate) correlate: Option<String>,
    pub(crate) seconds: Vec<Text>,
    pub(crate) rows: IndexMap<String, IndexMap<String, Text>>,
    pub(crate) caption: Option<String>,
}

impl Spec {
    /// Reads a whole tree.
    pub(crate) fn read(tree: &Node, removed: Vec<Removed>, problems: &mut Problems) -> Self {
        if let Some(name) = tree.get("name") {
            read::text(name, "name", problems);
        }
        let choices = [("sound", Conventions::Sound), ("reference", Conventions::Reference)];
        let conventions =
            tree.get("conventions").and_then(|node| read::choice(node, "conventions", &choices, problems));
        let mut stages = IndexMap::new();
        let section = tree.get("stages").and_then(|node| mapping(node, "stages", problems));
        for (name, entry) in section.into_iter().flatten() {
            check_name(name, &entry.key, problems);
            stages.insert(name.clone(), read_stage(name, &entry.key, &entry.node, problems));
        }
        if tree.get("stages").is_none_or(|node| node.map().is_none_or(Map::is_empty)) {
            let at = Span { end: tree.span.start, ..tree.span.clone() };
            let diagnostic = Diagnostic::new("the pipeline has no stages", "add stages under `stages:`");
            problems.push(diagnostic.at(at, "in this file"));
        }
        let report = tree.get("report").and_then(|node| read_report(node, problems));
        Spec { conventions: conventions.unwrap_or_default(), stages, report, removed }
    }
}

fn read_stage(name: &str, span: &Span, node: &Node, problems: &mut Problems) -> StageSpec {
    let Some(body) = node.get("loop") else {
        let operator = read_operator(name, span, node, problems);
        if let Some((_, every)) = &operator.every {
            let diagnostic = Diagnostic::new(
                format!("`{name}` says `every`, but it is in no loop"),
                "take `every` away, or move the stage into a `loop:`",
            );
            problems.push(diagnostic.at(every.clone(), "only in a loop"));
        }
        return StageSpec::Operator(operator);
    };
    check_keys(node.map().expect("it has `loop`"), &format!("loop `{name}`"), &["loop"], problems);
    StageSpec::Loop(read_loop(name, span, body, problems))
}

/// Always gives a stage, so that what reads it is not told that it does not exist.
fn read_operator(name: &str, span: &Span, node: &Node, problems: &mut Problems) -> OperatorSpec {
    let with = Node::empty_map(span.clone());
    let mut operator = OperatorSpec { span: span.clone(), kind: None, inputs: IndexMap::new(), with, every: None };
    let Some(map) = mapping(node, name, problems) else { return operator };
    check_keys(map, &format!("stage `{name}`"), &["kind", "in", "with", "every"], problems);
    let inputs = map.get("in").and_then(|entry| mapping(&entry.node, &format!("{name}.in"), problems));
    for (port, entry) in inputs.into_iter().flatten() {
        let mut read = |input: String, key: &Span, node: &Node, path: &str, problems: &mut Problems| {
            if let Some(source) = read::text(node, path, problems) {
                operator.inputs.insert(input, InputSpec { port: key.clone(), source });
            }
        };
        let path = format!("{name}.in.{port}");
        match &entry.node.value {
            // Several values by name.
            Value::Map(several) => {
                for (value, inner) in several {
                    check_name(value, &inner.key, problems);
                    let path = format!("{path}.{value}");
                    read(one_of_several(port, value), &inner.key, &inner.node, &path, problems);
                }
            }
            _ => read(port.clone(), &entry.key, &entry.node, &path, problems),
        }
    }
    if let Some(entry) = map.get("with")
        && let Some(fields) = mapping(&entry.node, &format!("{name}.with"), problems)
    {
        operator.with = Node { value: Value::Map(fields.clone()), span: entry.key.clone(), from: None };
    }
    operator.every = map.get("every").and_then(|entry| Some((read_every(&entry.node, problems)?, entry.key.clone())));
    match map.get("kind") {
        Some(entry) => operator.kind = read::text(&entry.node, &format!("{name}.kind"), problems),
        None => {
            let diagnostic = Diagnostic::new(format!("stage `{name}` has no `kind`"), "write `kind: NAME`, or `loop:`");
            problems.push(diagnostic.at(span.clone(), "what does it do?"));
        }
    }
    operator
}

fn read_every(node: &Node, problems: &mut Problems) -> Option<Every> {
    match &node.value {
        Value::Number(_) => read::whole(node, "every", problems).map(Every::Rounds),
        _ => read::choice(node, "every", &[("epoch", Every::Epoch), ("round", Every::Round)], problems),
    }
}

fn read_loop(name: &str, span: &Span, node: &Node, problems: &mut Problems) -> LoopSpec {
    static NOTHING: std::sync::LazyLock<Map> = std::sync::LazyLock::new(Map::new);
    let map = mapping(node, &format!("{name}.loop"), problems);
    let mut broken = map.is_none();
    let map = map.unwrap_or(&NOTHING);
    check_keys(map, &format!("loop `{name}`"), &["windows", "carry", "stages", "rounds", "unroll"], problems);
    let mut windows = IndexMap::new();
    let section = map.get("windows").and_then(|entry| mapping(&entry.node, "windows", problems));
    for (window, entry) in section.into_iter().flatten() {
        check_name(window, &entry.key, problems);
        if let Some(read) = read_window(window, &entry.key, &entry.node, problems) {
            windows.insert(window.clone(), read);
        }
    }
    let mut carry = IndexMap::new();
    let section = map.get("carry").and_then(|entry| mapping(&entry.node, "carry", problems));
    for (value, entry) in section.into_iter().flatten() {
        check_name(value, &entry.key, problems);
        match read_carry(value, &entry.key, &entry.node, problems) {
            Some(read) => {
                carry.insert(value.clone(), read);
            }
            None => broken = true,
        }
    }
    let mut stages = IndexMap::new();
    let section = map.get("stages").and_then(|entry| mapping(&entry.node, "stages", problems));
    for (stage, entry) in section.into_iter().flatten() {
        check_name(stage, &entry.key, problems);
        if entry.node.get("loop").is_some() {
            let message = format!("loop `{name}` holds another loop, `{stage}`");
            let diagnostic = Diagnostic::new(message, "move the inner loop out, or make its work one stage");
            problems.push(diagnostic.at(entry.key.clone(), "loops are not nested"));
            broken = true;
        } else {
            let full = format!("{name}.{stage}");
            stages.insert(stage.clone(), read_operator(&full, &entry.key, &entry.node, problems));
        }
    }
    if map.get("stages").is_none_or(|entry| entry.node.map().is_none_or(Map::is_empty)) {
        let diagnostic = Diagnostic::new(format!("loop `{name}` has no stages"), "add stages under `loop.stages`");
        problems.push(diagnostic.at(span.clone(), "nothing to repeat"));
    }
    let rounds = read::given(map, "rounds").and_then(|entry| read::whole(&entry.node, "rounds", problems));
    let unroll = map.get("unroll").and_then(|entry| read::boolean(&entry.node, "unroll", problems)).unwrap_or(false);
    check_rounds(name, span, map, &windows, problems);
    LoopSpec { span: span.clone(), windows, carry, stages, rounds, unroll, broken }
}

/// One window has `epochs`, or the loop `rounds`: otherwise nothing says when it ends.
fn check_rounds(name: &str, span: &Span, map: &Map, windows: &IndexMap<String, WindowSpec>, problems: &mut Problems) {
    let mut counted = windows.iter().filter_map(|(window, spec)| Some((window, spec.fields.epochs.as_ref()?)));
    let Some((first, (_, first_span))) = counted.next() else {
        if read::given(map, "rounds").is_none() {
            let hint = "give one window `epochs`, or the loop `rounds`";
            let diagnostic = Diagnostic::new(format!("nothing says how many rounds loop `{name}` has"), hint);
            problems.push(diagnostic.at(span.clone(), "endless"));
        }
        return;
    };
    for (second, (_, span)) in counted {
        let message = format!("windows `{first}` and `{second}` of loop `{name}` both have `epochs`");
        let hint = "keep `epochs` on the window that fixes the rounds; others begin again when they end";
        let diagnostic = Diagnostic::new(message, hint);
        problems.push(diagnostic.at(span.clone(), "second").also(first_span.clone(), "first"));
    }
}

fn read_window(name: &str, span: &Span, node: &Node, problems: &mut Problems) -> Option<WindowSpec> {
    let map = mapping(node, name, problems)?;
    check_keys(map, &format!("window `{name}`"), &LOOP_WINDOW_FIELDS, problems);
    let of = map.get("of").and_then(|entry| read::text(&entry.node, "of", problems));
    if !map.contains_key("of") {
        let hint = "write `of: STAGE` with the dataset that enters";
        let diagnostic = Diagnostic::new(format!("window `{name}` does not say what it is `of`"), hint);
        problems.push(diagnostic.at(span.clone(), "`of` is missing"));
    }
    let fields = read_window_fields(map, problems);
    if read::given(map, "take").is_none() {
        problems.push(no_take(&format!("window `{name}`"), span));
    }
    if let Some(repeat) = map.get("repeat") {
        read::choice(&repeat.node, "repeat", &[("forever", ())], problems);
        if let Some((_, epochs)) = &fields.epochs {
            let message = format!("window `{name}` both ends after `epochs` and repeats forever");
            let diagnostic = Diagnostic::new(message, "keep one of `epochs` and `repeat`");
            problems.push(diagnostic.at(repeat.key.clone(), "repeats").also(epochs.clone(), "ends"));
        }
    }
    Some(WindowSpec { of, fields })
}

/// Says that the number of rows a round is missing.
pub(crate) fn no_take(what: &str, span: &Span) -> Diagnostic {
    Diagnostic::new(format!("{what} does not say how many rows a round takes"), "write `take: N`")
        .at(span.clone(), "`take` is missing")
}

/// Reads what a mapping holds of a window's fields, with their defaults.
pub(crate) fn read_window_fields(map: &Map, problems: &mut Problems) -> WindowFields {
    let mut number = |key: &str| {
        let entry = read::given(map, key)?;
        Some((read::whole(&entry.node, key, problems)?, entry.key.clone()))
    };
    let rows = number("rows").map(|(rows, _)| rows);
    let take = number("take").map(|(take, _)| take);
    let epochs = number("epochs");
    let seed = number("seed").map_or(0, |(seed, _)| seed);
    let orders = [("shuffle", Order::Shuffle), ("given", Order::Given)];
    let order = map.get("order").and_then(|entry| read::choice(&entry.node, "order", &orders, problems));
    let lasts = [("drop", Last::Drop), ("short", Last::Short)];
    let last = map.get("last").and_then(|entry| read::choice(&entry.node, "last", &lasts, problems));
    let (order, last) = (order.unwrap_or(Order::Shuffle), last.unwrap_or(Last::Drop));
    let places = map.iter().map(|(key, entry)| (key.clone(), entry.node.origin().place())).collect();
    WindowFields { rows, take, epochs, order, seed, last, places }
}

fn read_carry(name: &str, span: &Span, node: &Node, problems: &mut Problems) -> Option<CarrySpec> {
    let map = mapping(node, name, problems)?;
    check_keys(map, &format!("carried value `{name}`"), &CARRY_FIELDS, problems);
    let from = map.get("from").and_then(|entry| read::text(&entry.node, "from", problems));
    let next = map.get("next").and_then(|entry| read::text(&entry.node, "next", problems));
    if !map.contains_key("next") {
        let hint = "write `next: STAGE.PORT` with what it becomes";
        let diagnostic = Diagnostic::new(format!("carried value `{name}` does not say what it is `next`"), hint);
        problems.push(diagnostic.at(span.clone(), "`next` is missing"));
    }
    let keep = match (map.get("keep"), map.get("keep_with")) {
        (Some(keep), Some(with)) => {
            let message = format!("carried value `{name}` has both `keep` and `keep_with`");
            let diagnostic = Diagnostic::new(message, "keep one of the two");
            problems.push(diagnostic.at(with.key.clone(), "here").also(keep.key.clone(), "and here"));
            None
        }
        (Some(keep), None) => read_keep(&keep.node, problems),
        (None, Some(with)) => read::text(&with.node, "keep_with", problems).map(KeepSpec::With),
        (None, None) => None,
    };
    Some(CarrySpec { span: span.clone(), from, next, keep: keep.unwrap_or(KeepSpec::Last) })
}

fn read_keep(node: &Node, problems: &mut Problems) -> Option<KeepSpec> {
    if node.text() == Some("last") {
        return Some(KeepSpec::Last);
    }
    let Some(map) = node.map() else {
        problems.push(read::wrong_type(node, "keep", "`last` or `{best: STAGE.METRIC, mode: max}`"));
        return None;
    };
    check_keys(map, "`keep`", &["best", "mode"], problems);
    let (Some(best), Some(mode)) = (map.get("best"), map.get("mode")) else {
        let message = "`keep` needs `best` and `mode`";
        let diagnostic = Diagnostic::new(message, "write `keep: {best: STAGE.METRIC, mode: max}`");
        problems.push(diagnostic.at(node.span.clone(), "not complete"));
        return None;
    };
    let mode = read::choice(&mode.node, "mode", &[("max", Mode::Max), ("min", Mode::Min)], problems);
    Some(KeepSpec::Best { metric: read_metric(&best.node, "best", problems)?, mode: mode.unwrap_or(Mode::Max) })
}

/// Text with a dot: `STAGE.METRIC`.
fn read_metric(node: &Node, what: &str, problems: &mut Problems) -> Option<Text> {
    let text = read::text(node, what, problems)?;
    let whole = text.value.split_once('.').is_some_and(|(stage, metric)| !stage.is_empty() && !metric.is_empty());
    if !whole {
        problems.push(read::wrong_type(node, what, "`STAGE.METRIC`"));
    }
    whole.then_some(text)
}

fn read_report(node: &Node, problems: &mut Problems) -> Option<ReportSpec> {
    let map = mapping(node, "report", problems)?;
    check_keys(
        map,
        "`report`",
        &["metric", "metrics", "compare", "baseline", "correlate", "seconds", "rows", "caption"],
        problems,
    );
    let mut metrics = IndexMap::new();
    if let Some(text) = map.get("metric").and_then(|entry| read_metric(&entry.node, "metric", problems)) {
        let heading = text.value.split_once('.').map_or(text.value.as_str(), |(_, metric)| metric);
        metrics.insert(heading.to_owned(), text);
    }
    if let Some(entry) = map.get("metrics") {
        metrics.extend(read_headings(&entry.node, "metrics", problems));
    }
    let mut list = |key| map.get(key).map(|entry| read::texts(&entry.node, key, problems)).unwrap_or_default();
    let (compare, seconds) = (list("compare"), list("seconds"));
    let rows = map.get("rows").and_then(|entry| mapping(&entry.node, "rows", problems));
    let rows = rows.into_iter().flatten();
    let rows = rows.map(|(label, entry)| (label.clone(), read_headings(&entry.node, label, problems))).collect();
    let baseline = map.get("baseline").and_then(|entry| read::text(&entry.node, "baseline", problems));
    if let Some(baseline) =
        baseline.as_ref().filter(|baseline| compare.iter().all(|c: &Text| c.value != baseline.value))
    {
        let names: Vec<&str> = compare.iter().map(|text| text.value.as_str()).collect();
        let hint = did_you_mean(&baseline.value, "variant", names);
        let message = format!("`baseline` names `{}`, which `compare` does not list", baseline.value);
        problems.push(Diagnostic::new(message, hint).at(baseline.span.clone(), "not compared"));
    }
    let correlate = map.get("correlate").and_then(|entry| read::text(&entry.node, "correlate", problems));
    if let Some(correlate) = correlate.as_ref().filter(|correlate| !metrics.contains_key(&correlate.value)) {
        let hint = did_you_mean(&correlate.value, "heading", metrics.keys().map(String::as_str));
        let message = format!("`correlate` names `{}`, which is no heading of `metrics`", correlate.value);
        problems.push(Diagnostic::new(message, hint).at(correlate.span.clone(), "no heading"));
    }
    let caption = map.get("caption").and_then(|entry| read::text(&entry.node, "caption", problems));
    let [baseline, correlate, caption] = [baseline, correlate, caption].map(|text| text.map(|text| text.value));
    Some(ReportSpec { metrics, compare, baseline, correlate, seconds, rows, caption })
}

/// `{heading: STAGE.METRIC}`.
fn read_headings(node: &Node, what: &str, problems: &mut Problems) -> IndexMap<String, Text> {
    let map = mapping(node, what, problems);
    let headings = map.into_iter().flatten();
    headings
        .filter_map(|(heading, entry)| Some((heading.clone(), read_metric(&entry.node, heading, problems)?)))
        .collect()
}
