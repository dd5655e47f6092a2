//! What earlier runs wanted to do, and what has changed since: the exact difference of two preimages.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cache::{Key, Store, Why};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::graph::{Loop, Operator, Place, Subgraph};
use crate::key::{self, Action};
use crate::selection::Alias;

/// `plan.json` of a run: the key of every stage, as far as it came to be known.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PlanFile {
    /// Pipeline file as given.
    pub pipeline: String,
    /// A stage that several cells share stands here once for each.
    pub stages: Vec<PlannedStage>,
}

/// One stage of `plan.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Top-level name, and the cell that calls it so.
    #[serde(flatten)]
    pub alias: Alias,
    /// Its key.
    pub key: Key,
    /// What the places of its preimage were called.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub names: BTreeMap<String, String>,
}

impl PlanFile {
    /// Writes `plan.json` into the folder of a run, all at once.
    pub fn write(&self, run: &Path) -> Result<()> {
        let (draft, path) = (run.join("plan.json.tmp"), run.join("plan.json"));
        let text = serde_json::to_vec_pretty(self)?;
        fs::write(&draft, text).with_context(|| format!("cannot write `{}`", draft.display()))?;
        fs::rename(&draft, &path).with_context(|| format!("cannot write `{}`", path.display()))
    }
}

/// A stage as an earlier run saw it.
pub struct Earlier {
    /// Identifier of that run.
    pub run: String,
    /// The stage then.
    pub stage: PlannedStage,
}

/// One thing that differs between two preimages.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Where, in the words of the file: `learn.learning_rate`, `in.data`.
    pub path: String,
    /// Before; `None` where it was not there or had its default.
    pub old: Option<Json>,
    /// Now.
    pub new: Option<Json>,
    /// Where the new value is written.
    pub place: Option<Place>,
}

/// Plans of earlier runs, newest first; read when first asked for.
pub struct History {
    runs: Vec<PathBuf>,
    plans: OnceCell<Vec<(String, PlanFile)>>,
}

/// How many runs are looked back at: what changed longer ago explains nothing any more.
const REACH: usize = 200;

impl History {
    /// Lists the runs of a store.
    pub fn open(store: &Store) -> Self {
        let entries = fs::read_dir(store.runs()).into_iter().flatten().flatten();
        let mut runs: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        // Identifiers begin with the time.
        runs.sort_unstable_by(|a, b| b.cmp(a));
        runs.truncate(REACH);
        History { runs, plans: OnceCell::new() }
    }

    /// The newest run in which the stage had another key: preferably the stage of the same cell, else one of the same
    /// name, so that a variant that is new is compared with what it varies.
    pub fn before(&self, aliases: &[Alias], key: &Key) -> Option<Earlier> {
        let same_cell = |stage: &PlannedStage| aliases.contains(&stage.alias);
        let same_name = |stage: &PlannedStage| aliases.iter().any(|alias| alias.name == stage.alias.name);
        let find = |fits: &dyn Fn(&PlannedStage) -> bool| {
            self.plans().iter().find_map(|(run, plan)| {
                let stage = plan.stages.iter().find(|stage| fits(stage) && stage.key != *key)?;
                Some(Earlier { run: run.clone(), stage: stage.clone() })
            })
        };
        find(&same_cell).or_else(|| find(&same_name))
    }

    /// Whether any earlier run had this very stage: the same name and key.
    pub fn knows(&self, aliases: &[Alias], key: &Key) -> bool {
        let same =
            |stage: &PlannedStage| stage.key == *key && aliases.iter().any(|alias| alias.name == stage.alias.name);
        self.plans().iter().any(|(_, plan)| plan.stages.iter().any(same))
    }

    /// What has changed about a stage since it last had another key, with the run of that time. `None` when it never had.
    pub fn changes(&self, aliases: &[Alias], action: &Action, store: &Store) -> Result<Option<(String, Vec<Change>)>> {
        let Some(earlier) = self.before(aliases, &action.key) else { return Ok(None) };
        let Some(old) = store.preimage(&earlier.stage.key)? else { return Ok(None) };
        let old = key::with_names(&old, &earlier.stage.names);
        // The store keeps numbers by value, `1.0` as `1`, so that only equal texts are equal values here.
        let new: Json = serde_json::from_str(&cache::canonical(&action.preimage))?;
        let new = key::with_names(&new, &key::names_of(&action.subgraph));
        Ok(Some((earlier.run, differences(&old, &new, &action.subgraph))))
    }

    /// Why a stage without a result runs, in a few words.
    pub fn reason(&self, aliases: &[Alias], action: &Action, why: &Why, store: &Store) -> String {
        if *why != Why::NoRecord {
            return why.to_string();
        }
        if self.knows(aliases, &action.key) {
            return "not finished, or its result is gone".into();
        }
        match self.changes(aliases, action, store) {
            Ok(Some((_, changes))) => match changes.as_slice() {
                [] => "not run before under this name".into(),
                [only] => only.line(),
                [first, rest @ ..] => format!("{} (and {} more)", first.line(), rest.len()),
            },
            Ok(None) => "not run before".into(),
            Err(error) => format!("no result; what changed cannot be told: {error:#}"),
        }
    }

    /// Plans that can be read: one that was cut off in the middle is none.
    fn plans(&self) -> &[(String, PlanFile)] {
        let read = |run: &PathBuf| {
            let plan = serde_json::from_slice(&fs::read(run.join("plan.json")).ok()?).ok()?;
            Some((run.file_name()?.to_string_lossy().into_owned(), plan))
        };
        self.plans.get_or_init(|| self.runs.iter().filter_map(read).collect())
    }
}

/// Every path at which two preimages differ.
pub fn differences(old: &Json, new: &Json, subgraph: &Subgraph) -> Vec<Change> {
    let mut found = Vec::new();
    collect(Some(old), Some(new), &mut Vec::new(), &mut |path, old, new| {
        let place = place_of(path, subgraph);
        found.push(Change { path: in_words(path), old: old.cloned(), new: new.cloned(), place });
    });
    found
}

fn collect<'a>(
    old: Option<&'a Json>,
    new: Option<&'a Json>,
    path: &mut Vec<String>,
    found: &mut impl FnMut(&[String], Option<&'a Json>, Option<&'a Json>),
) {
    if old == new {
        return;
    }
    let is_content = |value: &Json| value.get("digest").is_some() || value.get("content").is_some();
    match (old, new) {
        (Some(Json::Object(before)), Some(Json::Object(after)))
            if !old.is_some_and(is_content) && !new.is_some_and(is_content) =>
        {
            let names = before.keys().chain(after.keys().filter(|name| !before.contains_key(*name)));
            for name in names {
                path.push(name.clone());
                collect(before.get(name), after.get(name), path, found);
                path.pop();
            }
        }
        _ => found(path, old, new),
    }
}

/// A path of a preimage as the file would write it.
fn in_words(path: &[String]) -> String {
    let mut words: Vec<&str> = Vec::new();
    for (index, part) in path.iter().enumerate() {
        match part.as_str() {
            "stage" | "loop" if index == 0 => {}
            "stages" | "windows" | "carry" if index == 1 => {}
            "config" => {}
            "inputs" => words.push("in"),
            other => words.push(other),
        }
    }
    if words.is_empty() { "all of it".into() } else { words.join(".") }
}

fn place_of(path: &[String], subgraph: &Subgraph) -> Option<Place> {
    let at = path.iter().position(|part| part == "config")?;
    let operator: &Operator = match subgraph {
        Subgraph::Operator(operator) => operator,
        Subgraph::Loop(Loop { stages, .. }) => &stages.get(path.get(at.checked_sub(1)?)?)?.operator,
    };
    let field = &path[at + 1..];
    // A value that was changed inside of a mapping may only be known by the mapping.
    (0..=field.len()).rev().find_map(|length| operator.places.get(&field[..length].join("."))).cloned()
}

/// A value on one line; digests are cut short.
pub fn show_value(value: Option<&Json>, default: &str) -> String {
    let Some(value) = value else { return default.into() };
    let content = value.get("digest").or_else(|| value.get("content")).and_then(Json::as_str);
    match (content, value) {
        (Some(digest), _) => digest.chars().take(12).collect(),
        (None, Json::String(text)) => text.clone(),
        (None, other) => {
            let text = other.to_string();
            if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
        }
    }
}

impl Change {
    /// `learning_rate: 0.1 -> 0.2`.
    pub fn line(&self) -> String {
        let (old, new) = (show_value(self.old.as_ref(), "default"), show_value(self.new.as_ref(), "default"));
        format!("{}: {old} -> {new}", self.path)
    }
}
