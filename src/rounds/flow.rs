//! Facts flow through one subgraph: what can be known of it before it runs, round after round of a loop. Every kind
//! says what follows for its stage (see [`contract::Outlook`], where the rules are).

use std::collections::{BTreeMap, HashMap};

use contract::outlook::more_than_there_are;
use contract::{Bounds, Cause, Facts, Finding, Machine, Outlook, Registry};

use crate::graph::{Carry, Entry, Exit, Last, Loop, Operator, Order, Origin, PortRef, Subgraph, Window};

/// What is known of values where they enter a subgraph.
pub(crate) type Entering = BTreeMap<Entry, Facts>;

/// What is known of values where they leave a subgraph.
pub(crate) type Leaving = BTreeMap<Exit, Facts>;

/// What is said of one subgraph.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// What will be known of its outputs.
    pub(crate) outputs: Leaving,
    /// What is wrong or odd, and in which part.
    pub(crate) findings: Vec<(Part, Finding)>,
    /// Stages of a loop whose readers in that loop have limits: the longest row that all of them can take.
    pub(crate) rooms: BTreeMap<String, u64>,
    /// Bytes of memory that it needs at least; of a loop, what the stage needs that needs most.
    pub(crate) memory: u64,
}

/// The part of a subgraph that a finding is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The stage that it is.
    Whole,
    /// A stage of a loop.
    Stage(String),
    /// A window of a loop.
    Window(String),
}

/// Looks at one subgraph, of whose entries this is known.
pub(crate) fn look(subgraph: &Subgraph, entries: &Entering, registry: &Registry, machine: &Machine) -> Seen {
    match subgraph {
        Subgraph::Operator(operator) => {
            let inputs = entries.iter().map(|(entry, facts)| (entry.to_string(), facts.clone())).collect();
            let outlook = outlook(operator, inputs, None, registry, machine);
            let memory = outlook.memory();
            let findings = outlook.findings.into_iter().map(|finding| (Part::Whole, finding)).collect();
            let outputs = outlook.outputs.into_iter().map(|(port, facts)| (Exit::Port(port), facts)).collect();
            Seen { outputs, findings, rooms: BTreeMap::new(), memory }
        }
        Subgraph::Loop(body) => look_at_loop(body, entries, registry, machine),
    }
}

/// What a kind says of one stage, of whose ports this is known. A kind that this program does not have says nothing.
pub(crate) fn outlook(
    operator: &Operator,
    inputs: BTreeMap<String, Facts>,
    room: Option<u64>,
    registry: &Registry,
    machine: &Machine,
) -> Outlook {
    let mut outlook = Outlook::new(machine.clone(), inputs, room);
    if let Some(kind) = registry.get(&operator.kind) {
        kind.foresee(&operator.config, &mut outlook);
    }
    outlook.finish()
}

/// Walks a loop until nothing new comes to be known: of values that are carried without a first one, and of the room that
/// those have who read what a stage writes.
fn look_at_loop(body: &Loop, entries: &Entering, registry: &Registry, machine: &Machine) -> Seen {
    let mut seen = Seen::default();
    let mut windows: BTreeMap<&String, Facts> = BTreeMap::new();
    for (name, window) in &body.windows {
        let data = entries.get(&Entry::Window(name.clone())).cloned().unwrap_or_default();
        let (facts, findings) = look_at_window(window, data);
        windows.insert(name, facts);
        seen.findings.extend(findings.into_iter().map(|finding| (Part::Window(name.clone()), finding)));
    }
    let first = |name: &String| entries.get(&Entry::Carry(name.clone())).cloned();
    let mut carried: BTreeMap<&String, Option<Facts>> = body.carry.keys().map(|name| (name, first(name))).collect();
    for _ in 0..body.stages.len() + 2 {
        let mut made: HashMap<(&str, &str), Facts> = HashMap::new();
        // What was only odd may have been so because less was known.
        seen.findings.retain(|(part, finding)| finding.is_error || matches!(part, Part::Window(_)));
        let mut rooms = BTreeMap::new();
        for (name, stage) in &body.stages {
            let inputs = stage.inputs.iter().filter_map(|(port, origin)| {
                let facts = match origin {
                    Origin::Outside => entries.get(&Entry::outside(name, port)).cloned().unwrap_or_default(),
                    Origin::Window(window) => windows.get(window).cloned().unwrap_or_default(),
                    Origin::Carry(carry) => carried.get(carry).cloned().flatten()?,
                    Origin::Stage(PortRef { stage, port }) => {
                        made.get(&(stage.as_str(), port.as_str())).cloned().unwrap_or_default()
                    }
                };
                Some((port.clone(), facts))
            });
            let room = seen.rooms.get(name).copied();
            let outlook = outlook(&stage.operator, inputs.collect(), room, registry, machine);
            seen.memory = seen.memory.max(outlook.memory());
            for (port, facts) in outlook.outputs {
                if let Some(port) = stage.operator.ports.find_output(&port) {
                    made.insert((name, &port.name), facts);
                }
            }
            for (port, room) in outlook.rooms {
                if let Some(Origin::Stage(writer)) = stage.inputs.get(&port) {
                    let least = rooms.entry(writer.stage.clone()).or_insert(room);
                    *least = room.min(*least);
                }
            }
            for finding in outlook.findings {
                let finding = (Part::Stage(name.clone()), finding);
                if !seen.findings.contains(&finding) {
                    seen.findings.push(finding);
                }
            }
        }
        let next = |carry: &Carry| made.get(&(carry.next.stage.as_str(), carry.next.port.as_str())).cloned();
        let kept = |(name, carry): (&String, &Carry)| (Exit::Kept(name.clone()), next(carry).unwrap_or_default());
        let outputs = body.carry.iter().map(kept).collect();
        let mut settled = seen.rooms == rooms && seen.outputs == outputs;
        for (name, facts) in carried.iter_mut().filter(|(_, facts)| facts.is_none()) {
            *facts = next(&body.carry[*name]);
            settled &= facts.is_none();
        }
        (seen.rooms, seen.outputs) = (rooms, outputs);
        if settled {
            break;
        }
    }
    seen
}

/// What a round sees of a dataset.
fn look_at_window(window: &Window, data: Facts) -> (Facts, Vec<Finding>) {
    let Window { rows: limit, take, last, order, .. } = window;
    let known = data.row_count();
    let rows = limit.map_or(known, |limit| known.min(limit));
    let at = |field: &str| vec![Cause::Field(field.into())];
    let mut outlook = Outlook::default();
    if let Some(limit) = limit.filter(|limit| *limit > known.most) {
        let message = more_than_there_are("rows", limit, "the dataset", known);
        outlook.warn(at("rows"), message, "leave `rows` out to take all");
    }
    if rows.most == 0 {
        outlook.error(at("take"), "the dataset has no rows to take", "choose another split, or give it rows");
    } else if *last == Last::Drop && rows.most < *take {
        let message = format!("{take} rows are taken a round, and there are only {}", rows.most);
        outlook.error(at("take"), message, "lower `take`, or set `last: short`");
    } else if let (Last::Drop, Order::Given, Some(rows)) = (last, order, rows.exact())
        && !rows.is_multiple_of(*take)
    {
        let message = format!(
            "the last {} of {rows} rows are in no round: `order: given` is the same in every epoch, and `last: drop` \
             leaves out what does not fill a round of {take}",
            rows % take
        );
        outlook.warn(
            at("take"),
            message,
            "set `last: short` to use them, or `order: shuffle` to leave out others each time",
        );
    }
    let most = rows.most.min(*take);
    // A round that would not be full is none, unless it may be short.
    let least = if *last == Last::Short { 1.min(rows.least) } else { most };
    let facts = Facts {
        rows: vec![Bounds { least, most }],
        prompt: limit.map_or(data.prompt.clone(), |limit| data.prompt.of_first(limit)),
        text: limit.map_or(data.text.clone(), |limit| data.text.of_first(limit)),
        // Of one round, not of all.
        responses: Bounds { least: 0, ..data.responses },
        ..data
    };
    (facts, outlook.findings)
}
