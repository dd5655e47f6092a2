//! A cut: all that a loop holds between two stage runs, in a folder.
//!
//! ```text
//! cut.json            where the loop stands, scores, and which slots share which value
//! values/<n>/         one folder for each distinct value
//! metrics/<n>.jsonl   rows of each stage so far
//! ```
//!
//! Stages, windows and carried values are named by their index, for names are in no key: a cut must fit a pipeline that
//! calls its stages differently.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use contract::{AnyValue, Env, PortType, Registry, Result};
use serde::{Deserialize, Serialize};

use super::keep::Scores;
use super::program::Slot;
use super::{MetricsRow, Position, find_kind};
use crate::graph::Loop;

/// What a loop holds. `values` holds the inner states of stages too.
#[derive(Default)]
pub(super) struct Held {
    pub(super) position: Position,
    pub(super) values: BTreeMap<Slot, AnyValue>,
    /// Score of the kept value, by carried value.
    pub(super) scores: Scores,
    /// Scores measured in this round, not yet compared.
    pub(super) measured: Scores,
    /// Rows of each stage.
    pub(super) rows: Vec<Vec<MetricsRow>>,
}

/// `cut.json`.
#[derive(Serialize, Deserialize)]
struct Manifest {
    version: u32,
    position: Position,
    rounds: u64,
    seconds: f64,
    values: Vec<SharedValue>,
    // Bits, because JSON has no infinity.
    scores: Vec<(usize, u64)>,
    measured: Vec<(usize, u64)>,
}

/// A value and every slot that holds it: one `Arc` before the cut is one `Arc` after it.
#[derive(Serialize, Deserialize)]
struct SharedValue {
    port_type: PortType,
    slots: Vec<Slot>,
}

const VERSION: u32 = 1;

/// Where a saved loop stands, without its values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Whole rounds done.
    pub round: u64,
    /// Rounds it has.
    pub rounds: u64,
    /// Seconds spent so far, over all attempts.
    pub seconds: f64,
}

/// Reads where a saved loop stands.
pub fn standing(folder: &Path) -> Result<Standing> {
    let manifest = read_manifest(folder)?;
    Ok(Standing { round: manifest.position.round, rounds: manifest.rounds, seconds: manifest.seconds })
}

pub(super) fn save(held: &Held, rounds: u64, seconds: f64, folder: &Path) -> Result<()> {
    let mut values = Vec::new();
    for (index, (value, slots)) in distinct(&held.values).into_iter().enumerate() {
        let target = folder.join("values").join(index.to_string());
        make(&target)?;
        value.save(&target)?;
        values.push(SharedValue { port_type: value.port_type(), slots });
    }
    make(&folder.join("metrics"))?;
    for (index, rows) in held.rows.iter().enumerate() {
        write_rows(&folder.join("metrics").join(format!("{index}.jsonl")), rows)?;
    }
    let bits = |scores: &Scores| scores.iter().map(|(&carry, score)| (carry, score.to_bits())).collect();
    let manifest = Manifest {
        version: VERSION,
        position: held.position,
        rounds,
        seconds,
        values,
        scores: bits(&held.scores),
        measured: bits(&held.measured),
    };
    contract::value::write(&folder.join("cut.json"), &serde_json::to_vec_pretty(&manifest)?)
}

pub(super) fn load(folder: &Path, body: &Loop, registry: &Registry, env: &Env) -> Result<(Held, f64)> {
    let manifest = read_manifest(folder)?;
    let mut values = BTreeMap::new();
    for (index, shared) in manifest.values.into_iter().enumerate() {
        let folder = folder.join("values").join(index.to_string());
        let value = match shared.slots.first() {
            Some(Slot::State(stage)) => {
                let (name, stage) = body.stages.get_index(*stage).context("a state of a stage that is not there")?;
                let state = find_kind(registry, &stage.operator.kind)?.load_state(&folder, env);
                state.with_context(|| format!("inner state of stage `{name}`"))?
            }
            _ => registry.load(shared.port_type, &folder, env)?,
        };
        values.extend(shared.slots.into_iter().map(|slot| (slot, Arc::clone(&value))));
    }
    let rows = (0..body.stages.len()).map(|index| read_rows(&folder.join("metrics").join(format!("{index}.jsonl"))));
    let scores =
        |bits: Vec<(usize, u64)>| bits.into_iter().map(|(carry, bits)| (carry, f64::from_bits(bits))).collect();
    let held = Held {
        position: manifest.position,
        values,
        scores: scores(manifest.scores),
        measured: scores(manifest.measured),
        rows: rows.collect::<Result<_>>()?,
    };
    Ok((held, manifest.seconds))
}

/// Writes rows as JSON lines.
pub(super) fn write_rows(path: &Path, rows: &[MetricsRow]) -> Result<()> {
    let mut text = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut text, row)?;
        text.write_all(b"\n")?;
    }
    contract::value::write(path, &text)
}

fn read_rows(path: &Path) -> Result<Vec<MetricsRow>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let rows = text.lines().map(serde_json::from_str).collect::<Result<_, _>>();
    rows.with_context(|| format!("`{}` is not JSON lines", path.display()))
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join("cut.json");
    let bytes = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).with_context(|| format!("cannot parse `{}`", path.display()))?;
    ensure!(
        manifest.version == VERSION,
        "`{}` has version {}, and this program reads version {VERSION}",
        path.display(),
        manifest.version
    );
    Ok(manifest)
}

/// Values by identity, each with the slots that hold it, in the order of the first slot.
fn distinct(values: &BTreeMap<Slot, AnyValue>) -> Vec<(&AnyValue, Vec<Slot>)> {
    let mut found: Vec<(&AnyValue, Vec<Slot>)> = Vec::new();
    for (slot, value) in values {
        match found.iter_mut().find(|(known, _)| same(known, value)) {
            Some((_, slots)) => slots.push(slot.clone()),
            None => found.push((value, vec![slot.clone()])),
        }
    }
    found
}

fn same(a: &AnyValue, b: &AnyValue) -> bool {
    // The address alone: the same value may be seen through different vtables, and a value without size has no content.
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make folder `{}`", folder.display()))
}
