//! What earlier runs wanted to do, and what has changed since: the exact difference of two preimages.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cache::{Key, Store, Why};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::graph::{Loop, Operator, Subgraph};
use crate::ground::source::Place;
use crate::ground::terminal::flow;
use crate::ground::trouble::BadRequest;
use crate::plan::key::{self, Action};
use crate::plan::selection::Alias;

/// `plan.jsonl` of a run: first which pipeline it is, then a line for each key that came to be known. What is said later of
/// a stage counts.
pub(crate) struct PlanLog(File);

/// Which pipeline a plan is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pipeline {
    /// The file as given.
    pub pipeline: String,
    /// Where it is, links resolved; as given where there is no such file.
    pub path: String,
}

impl Pipeline {
    /// Of the file that a command names.
    pub(crate) fn of(file: &Path) -> Self {
        let path = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
        Pipeline { pipeline: file.display().to_string(), path: path.display().to_string() }
    }

    /// The name of the file without its folder: what is left when a project moves.
    fn file_name(&self) -> Option<&std::ffi::OsStr> {
        Path::new(&self.path).file_name()
    }
}

/// One stage of a plan. A stage that several cells share stands there once for each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PlannedStage {
    /// Top-level name, and the cell that calls it so.
    #[serde(flatten)]
    pub alias: Alias,
    /// Its key.
    pub key: Key,
    /// What the places of its preimage were called.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub names: BTreeMap<String, String>,
}

/// Name of the file in the folder of a run.
const PLAN: &str = "plan.jsonl";

impl PlanLog {
    /// Makes the file in the folder of a run.
    pub(crate) fn create(run: &Path, pipeline: &Pipeline) -> Result<Self> {
        let path = run.join(PLAN);
        let mut file = File::create(&path).with_context(|| format!("cannot write `{}`", path.display()))?;
        file.write_all(&line(pipeline)?).with_context(|| format!("cannot write `{}`", path.display()))?;
        Ok(PlanLog(file))
    }

    /// Adds stages.
    pub(crate) fn add(&mut self, stages: impl IntoIterator<Item = PlannedStage>) -> Result<()> {
        let mut text = Vec::new();
        for stage in stages {
            text.extend(line(&stage)?);
        }
        self.0.write_all(&text).context("cannot write the plan of this run")
    }
}

fn line(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// A run as its plan tells.
#[derive(Clone, Debug)]
pub(crate) struct PastRun {
    /// Identifier, which begins with date and time.
    pub(crate) id: String,
    /// Its folder.
    pub(crate) folder: PathBuf,
    /// The pipeline.
    pub(crate) pipeline: Pipeline,
    /// Stages whose key came to be known, the last word on each.
    pub(crate) stages: Vec<PlannedStage>,
}

impl PastRun {
    /// Nothing where there is none. A line that is not whole is the last one of a run that was killed.
    fn read(run: &Path) -> Option<Self> {
        let text = fs::read_to_string(run.join(PLAN)).ok()?;
        let mut lines = text.lines();
        let pipeline = serde_json::from_str(lines.next()?).ok()?;
        let mut stages: IndexMap<Alias, PlannedStage> = IndexMap::new();
        for stage in lines.map_while(|line| serde_json::from_str::<PlannedStage>(line).ok()) {
            stages.insert(stage.alias.clone(), stage);
        }
        let id = run.file_name()?.to_string_lossy().into_owned();
        Some(PastRun { id, folder: run.to_owned(), pipeline, stages: stages.into_values().collect() })
    }
}

/// All runs of a store, the newest first.
pub(crate) fn past_runs(store: &Store) -> impl Iterator<Item = PastRun> {
    folders(store).into_iter().filter_map(|folder| PastRun::read(&folder))
}

/// The newest run whose identifier begins so: a date will do.
pub(crate) fn find_run(store: &Store, start: &str) -> Result<PastRun> {
    let begins = |folder: &PathBuf| folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start));
    let found = folders(store).into_iter().filter(begins).find_map(|folder| PastRun::read(&folder));
    let unknown = || BadRequest(format!("no run begins with `{start}`; `pipeline runs` lists them"));
    found.filter(|_| !start.is_empty()).ok_or_else(|| unknown().into())
}

/// Folders of runs, the newest first.
pub(crate) fn folders(store: &Store) -> Vec<PathBuf> {
    let entries = fs::read_dir(store.runs()).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    // Identifiers begin with the time.
    folders.sort_unstable_by(|a, b| b.cmp(a));
    folders
}

/// A stage as an earlier run saw it.
pub(crate) struct Earlier {
    /// Identifier of that run.
    pub run: String,
    /// The stage then.
    pub stage: PlannedStage,
}

/// What a stage cost when it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cost {
    /// Seconds, over all attempts.
    pub(crate) seconds: f64,
    /// Bytes of its outputs.
    pub(crate) bytes: u64,
}

/// One thing that differs between two preimages.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Change {
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
pub(crate) struct History {
    pipeline: Pipeline,
    runs: Vec<PathBuf>,
    plans: OnceCell<Plans>,
}

/// Plans of one pipeline, the newest first, and where each stage is in them.
struct Plans {
    runs: Vec<PastRun>,
    /// By name: number of the run, and of the stage in it.
    by_name: HashMap<String, Vec<(usize, usize)>>,
}

/// How many runs are looked back at: what changed longer ago explains nothing any more.
const REACH: usize = 200;

impl History {
    /// Lists the runs of a store, for a pipeline.
    pub(crate) fn open(store: &Store, pipeline: Pipeline) -> Self {
        let mut runs = folders(store);
        runs.truncate(REACH);
        History { pipeline, runs, plans: OnceCell::new() }
    }

    /// Every earlier sight of a stage, under any of its names: the newest first.
    fn sights(&self, aliases: &[Alias]) -> impl Iterator<Item = (&PastRun, &PlannedStage)> {
        let plans = self.plans();
        let mut names: Vec<&str> = aliases.iter().map(|alias| alias.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let mut places: Vec<(usize, usize)> =
            names.into_iter().filter_map(|name| plans.by_name.get(name)).flatten().copied().collect();
        places.sort_unstable();
        places.into_iter().map(|(run, stage)| (&plans.runs[run], &plans.runs[run].stages[stage]))
    }

    /// Folders of the runs of this pipeline, the newest first.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &Path> {
        self.plans().runs.iter().map(|run| run.folder.as_path())
    }

    /// The newest run of the same pipeline in which the stage had another key: preferably the stage of the same cell, else
    /// one of the same name, so that a variant that is new is compared with what it varies.
    pub(crate) fn before(&self, aliases: &[Alias], key: &Key) -> Option<Earlier> {
        let others = || self.sights(aliases).filter(|(_, stage)| stage.key != *key);
        let found = others().find(|(_, stage)| aliases.contains(&stage.alias)).or_else(|| others().next());
        found.map(|(run, stage)| Earlier { run: run.id.clone(), stage: stage.clone() })
    }

    /// Whether any earlier run had this very stage: the same name and key.
    pub(crate) fn knows(&self, aliases: &[Alias], key: &Key) -> bool {
        self.sights(aliases).any(|(_, stage)| stage.key == *key)
    }

    /// The first run in reach that had this very stage.
    pub(crate) fn first_with(&self, aliases: &[Alias], key: &Key) -> Option<String> {
        self.sights(aliases).filter(|(_, stage)| stage.key == *key).last().map(|(run, _)| run.id.clone())
    }

    /// What the stage cost when a run last made it, whatever has changed since; preferably that of the same cell.
    pub(crate) fn cost(&self, aliases: &[Alias], store: &Store) -> Option<Cost> {
        let cost = |stage: &PlannedStage| {
            let record = store.record(&stage.key).ok()??;
            Some(Cost { seconds: record.info.get("seconds")?.as_f64()?, bytes: record.bytes() })
        };
        // A few are enough: a stage that was not made in its last runs is another one by now.
        let own = self.sights(aliases).filter(|(_, stage)| aliases.contains(&stage.alias)).take(8);
        let all = self.sights(aliases).take(8);
        own.chain(all).find_map(|(_, stage)| cost(stage))
    }

    /// What has changed about a stage since it last had another key, with the run of that time. `None` when it never had.
    pub(crate) fn changes(
        &self,
        aliases: &[Alias],
        action: &Action,
        store: &Store,
    ) -> Result<Option<(String, Vec<Change>)>> {
        let Some(earlier) = self.before(aliases, &action.key) else { return Ok(None) };
        let Some(old) = store.preimage(&earlier.stage.key)? else { return Ok(None) };
        Ok(Some((earlier.run, changes_since(&old, &earlier.stage.names, action)?)))
    }

    /// Why a stage without a result runs, in a few words.
    pub(crate) fn reason(&self, aliases: &[Alias], action: &Action, why: &Why, store: &Store) -> String {
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

    /// Plans of this pipeline that can be read. Where none is of this very file, those of files with its name: a project may
    /// have moved.
    fn plans(&self) -> &Plans {
        self.plans.get_or_init(|| {
            let runs: Vec<PastRun> = self.runs.iter().filter_map(|run| PastRun::read(run)).collect();
            let own = runs.iter().any(|run| run.pipeline.path == self.pipeline.path);
            let fits = |run: &PastRun| match own {
                true => run.pipeline.path == self.pipeline.path,
                false => run.pipeline.file_name() == self.pipeline.file_name(),
            };
            let runs: Vec<PastRun> = runs.into_iter().filter(fits).collect();
            let mut by_name: HashMap<String, Vec<(usize, usize)>> = HashMap::new();
            for (at, run) in runs.iter().enumerate() {
                for (place, stage) in run.stages.iter().enumerate() {
                    by_name.entry(stage.alias.name.clone()).or_default().push((at, place));
                }
            }
            Plans { runs, by_name }
        })
    }
}

/// What differs between a preimage that the store kept, in which places had these names, and that of an action.
pub(crate) fn changes_since(old: &Json, names: &BTreeMap<String, String>, action: &Action) -> Result<Vec<Change>> {
    Ok(differences(&key::with_names(old, names), &named(action)?, &action.subgraph))
}

/// What differs between the preimages of two actions; places are those of the new one.
pub(crate) fn changes_between(old: &Action, new: &Action) -> Result<Vec<Change>> {
    Ok(differences(&named(old)?, &named(new)?, &new.subgraph))
}

/// The preimage of an action as the store keeps it, with names for places.
fn named(action: &Action) -> Result<Json> {
    Ok(key::with_names(&as_kept(action)?, &key::names_of(&action.subgraph)))
}

/// The preimage of an action as the store keeps it: numbers by value, `1.0` as `1`, so that only equal texts are equal values.
pub(crate) fn as_kept(action: &Action) -> Result<Json> {
    Ok(serde_json::from_str(&cache::canonical(&action.preimage))?)
}

/// Every path at which two preimages differ.
fn differences(old: &Json, new: &Json, subgraph: &Subgraph) -> Vec<Change> {
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
        (Some(Json::Array(before)), Some(Json::Array(after))) if before.len() == after.len() => {
            for (place, (old, new)) in before.iter().zip(after).enumerate() {
                path.push(place.to_string());
                collect(Some(old), Some(new), path, found);
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
pub(crate) fn show_value(value: Option<&Json>, default: &str) -> String {
    let Some(value) = value else { return default.into() };
    let content = value.get("digest").or_else(|| value.get("content")).and_then(Json::as_str);
    match (content, value) {
        (Some(digest), _) => digest.chars().take(12).collect(),
        (None, Json::String(text)) => text.clone(),
        (None, other) => {
            let text = flow(other);
            if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
        }
    }
}

impl Change {
    /// `learning_rate: 0.1 -> 0.2`.
    pub(crate) fn line(&self) -> String {
        let (old, new) = (show_value(self.old.as_ref(), "default"), show_value(self.new.as_ref(), "default"));
        format!("{}: {old} -> {new}", self.path)
    }

    /// The same with the place where the new value is written.
    pub(crate) fn line_with_place(&self) -> String {
        match &self.place {
            Some(Place { file, line, column }) => format!("{} ({file}:{line}:{column})", self.line()),
            None => self.line(),
        }
    }
}
