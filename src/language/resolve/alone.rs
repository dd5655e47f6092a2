//! A training kind used alone: short for a loop with this one stage, so that there is one mechanism for windows, keeping
//! the best round and checkpoints.

use contract::{Alone, Check, Conventions, PortType};
use indexmap::IndexMap;

use crate::graph::{
    BodyStage, Carry, Entry, Every, Exit, Keep, Loop, Mode, Operator, Origin, PortRef, Subgraph, Window,
};
use crate::language::diagnostic::{Diagnostic, Problems};
use crate::language::kinds::{KindInfo, Kinds, WINDOW_FIELDS};
use crate::language::read;
use crate::language::resolve::config;
use crate::language::resolve::reference::{Outer, Output, Want};
use crate::language::resolve::{Edge, PortsOf, Wired};
use crate::language::spec::{OperatorSpec, Spec, WindowFields, no_take, read_window_fields};
use crate::language::yaml::Map;

/// The stage itself, in its loop.
const STEP: &str = "step";
/// The stage that measures on a validation set.
const CHECK: &str = "check";

/// A training stage whose configuration is checked.
pub(super) struct Checked<'a> {
    spec: &'a OperatorSpec,
    contract: Alone,
    operator: Operator,
    window: Window,
    rounds: Option<u64>,
    /// Where the validation port is connected.
    check: Option<Operator>,
}

pub(super) fn check<'a>(
    name: &str,
    spec: &'a OperatorSpec,
    contract: &Alone,
    info: &KindInfo,
    all: &Spec,
    kinds: &Kinds,
    problems: &mut Problems,
) -> Option<Checked<'a>> {
    let own_seed = info.schema().fields(&[]).names.iter().any(|field| field == "seed");
    // One seed decides the order of the rows and what the stage draws.
    let aside: Vec<&str> = WINDOW_FIELDS.into_iter().filter(|field| *field != "seed" || !own_seed).collect();
    let operator = config::operator(spec, info, &aside, all.conventions, problems);
    let with = spec.with.map().expect("`with` is read as a mapping");
    let mut fields = with.clone();
    if own_seed && operator.is_none() {
        // The stage has said what is wrong with it.
        fields.shift_remove("seed");
    }
    let window = read_window(name, spec, &fields, own_seed, all.conventions, problems);
    let rounds = read::given(with, "rounds").and_then(|entry| read::whole(&entry.node, "rounds", problems));
    let connected = contract.check.as_ref().and_then(|check| Some((check, spec.inputs.get(check.valid)?)));
    let check = match connected {
        Some((check, input)) => Some(measurement(check, all, kinds, &input.port, problems)?),
        None => None,
    };
    Some(Checked { spec, contract: contract.clone(), operator: operator?, window: window?, rounds, check })
}

fn read_window(
    name: &str,
    spec: &OperatorSpec,
    with: &Map,
    own_seed: bool,
    conventions: Conventions,
    problems: &mut Problems,
) -> Option<Window> {
    let WindowFields { rows, take, epochs, order, seed, last, places } = read_window_fields(with, problems);
    // The published programs shuffle from 0, whatever their seed.
    let from = if own_seed && conventions == Conventions::Reference { 0 } else { seed };
    let own = read::given(with, "order_seed").and_then(|entry| read::whole(&entry.node, "order_seed", problems));
    let seed = own.unwrap_or(from);
    if read::given(with, "take").is_none() {
        problems.push(no_take(&format!("`{name}`"), &spec.span));
    }
    if ["epochs", "rounds"].iter().all(|field| read::given(with, field).is_none()) {
        let message = format!("nothing says how long `{name}` trains");
        let diagnostic = Diagnostic::new(message, "write `epochs: N` or `rounds: N` under `with:`");
        problems.push(diagnostic.at(spec.span.clone(), "endless"));
    }
    Some(Window { rows, take: take?, epochs: epochs.map(|(epochs, _)| epochs), order, seed, last, places })
}

/// What is measured on the validation set.
fn measurement(
    check: &Check,
    all: &Spec,
    kinds: &Kinds,
    port: &crate::ground::source::Span,
    problems: &mut Problems,
) -> Option<Operator> {
    let Check { kind, metric, with, .. } = check;
    let fault = |reason: String| {
        let message = format!("the {metric} on a validation set cannot be measured: {reason}");
        Diagnostic::new(message, "disconnect this input").at(port.clone(), "asks for it")
    };
    let Some(info) = kinds.get(kind) else {
        problems.push(fault(format!("this program has no kind `{kind}`")));
        return None;
    };
    let config = config::built_in(info, with, all.conventions);
    problems.keep(config.map_err(|errors| fault(errors.into_iter().map(|e| e.message).collect::<Vec<_>>().join("; "))))
}

impl Checked<'_> {
    /// Its outputs as those of the stage itself: the carried value, and what it measures.
    pub(super) fn outputs(&self) -> Vec<Output> {
        let output = |name: &str, exit, port_type| Output { name: name.to_owned(), exit, port_type };
        let kept = Exit::Kept(self.contract.next.to_owned());
        let mut outputs = vec![output(self.contract.next, kept, self.carried())];
        if self.operator.ports.find_output("metrics").is_some_and(|port| port.port_type == PortType::Metrics) {
            outputs.push(output("metrics", Exit::Metrics(STEP.to_owned()), PortType::Metrics));
        }
        outputs
    }

    fn carried(&self) -> PortType {
        let next = self.operator.ports.find_output(self.contract.next);
        next.expect("a training kind has the output that its contract names").port_type
    }

    pub(super) fn wire(self, name: &str, outer: &Outer, problems: &mut Problems) -> Wired {
        let extra: Vec<&str> = self.contract.check.iter().map(|check| check.valid).collect();
        let ports = PortsOf { name, keys: &["stages", name], spec: self.spec, operator: &self.operator, extra: &extra };
        ports.check(outer, problems);
        let port_type = self.carried();
        let Alone { data, carry, next, check } = self.contract;
        let mut inputs = IndexMap::from([(carry.to_owned(), Origin::Carry(next.to_owned()))]);
        let mut edges = Vec::new();
        for (port, input) in &self.spec.inputs {
            let own = self.operator.ports.find_input(port).map(|port| port.port_type);
            let valid = check.as_ref().filter(|check| check.valid == port);
            let Some(port_type) = own.or(valid.map(|_| PortType::Dataset)) else { continue };
            let reader = format!("{name}.in.{port}");
            let want = Want { reader: &reader, port, port_type: Some(port_type) };
            let entry = if port == data {
                inputs.insert(port.clone(), Origin::Window(data.to_owned()));
                Entry::Window(data.to_owned())
            } else if port == carry {
                Entry::Carry(next.to_owned())
            } else if let Some(check) = valid {
                Entry::outside(CHECK, check.data)
            } else {
                inputs.insert(port.clone(), Origin::Outside);
                Entry::outside(STEP, port)
            };
            if let Some((stage, output)) = outer.find(name, &input.source, &want, problems) {
                edges.push(Edge::new(entry, stage, output, input.source.span.clone()));
            }
        }
        let next_ref = PortRef { stage: STEP.to_owned(), port: next.to_owned() };
        let step = BodyStage { operator: self.operator, every: Every::Round, inputs };
        let mut stages = IndexMap::from([(STEP.to_owned(), step)]);
        let mut keep = Keep::Last;
        if let (Some(operator), Some(Check { model, data, metric, .. })) = (self.check, check) {
            keep = Keep::Best { stage: CHECK.to_owned(), metric: metric.to_owned(), mode: Mode::Min };
            let inputs = IndexMap::from([
                (model.to_owned(), Origin::Stage(next_ref.clone())),
                (data.to_owned(), Origin::Outside),
            ]);
            stages.insert(CHECK.to_owned(), BodyStage { operator, every: Every::Epoch, inputs });
        }
        let body = Loop {
            windows: IndexMap::from([(data.to_owned(), self.window)]),
            carry: IndexMap::from([(next.to_owned(), Carry { port_type, next: next_ref, keep })]),
            stages,
            rounds: self.rounds,
            unroll: false,
            alone: true,
        };
        Wired { subgraph: Subgraph::Loop(body), edges }
    }
}
