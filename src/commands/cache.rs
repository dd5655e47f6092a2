//! `pipeline cache`: looks after the store.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use anyhow::Result;
use cache::{Key, Store, Wish};
use contract::files::{counted, in_words as bytes};
use serde_json::json;

use super::{existing_store, pretty, say, status};
use crate::cli::{CacheArgs, CacheCommand, DuArgs, GcArgs};
use crate::plan::history::past_runs;
use crate::plan::names::Of;
use crate::run::folder::days_ago;

pub(crate) fn cache(command: &CacheCommand) -> Result<ExitCode> {
    match command {
        CacheCommand::Du(args) if args.stages => stages(args)?,
        CacheCommand::Du(args) => parts(&args.cache)?,
        CacheCommand::Gc(args) => collect(args)?,
        CacheCommand::Verify(args) => return verify(args),
    }
    Ok(ExitCode::SUCCESS)
}

/// What each part of the store takes up.
fn parts(args: &CacheArgs) -> Result<()> {
    let usage = existing_store(&args.store)?.usage()?;
    if args.json {
        return say(&pretty(&serde_json::to_value(usage)?));
    }
    let parts = [
        ("artifacts", usage.cas, "each file once"),
        ("copies", usage.trees, "of artifacts, where links are not possible"),
        ("records", usage.ac, ""),
        ("preimages", usage.pre, ""),
        ("checkpoints", usage.cut, ""),
        ("runs", usage.runs, "events and logs"),
        ("work", usage.work, "of stages that are running"),
    ];
    for (part, size, what) in parts {
        say(format!("{part:<12} {:>10}  {:>7} files  {what}", bytes(size.bytes), size.files).trim_end())?;
        say("\n")?;
    }
    say(&format!("{:<12} {:>10}\n", "all", bytes(usage.bytes())))?;
    say(&format!(
        "without sharing, its {} artifacts would take {}\n",
        usage.artifacts.files,
        bytes(usage.artifacts.bytes)
    ))
}

/// What the results of each stage take up, the most first.
fn stages(args: &DuArgs) -> Result<()> {
    let store = existing_store(&args.cache.store)?;
    let wanted = Wanted::read(&store)?;
    // Of the results of every stage: their number, their bytes, and of those what no other stage has.
    let mut files: BTreeMap<cache::Digest, (u64, BTreeSet<String>)> = BTreeMap::new();
    let mut results: BTreeMap<String, u64> = BTreeMap::new();
    for key in store.keys()? {
        let Some(record) = store.record(&key)? else { continue };
        let stage = wanted.what(&key);
        for file in record.outputs.values().flat_map(|artifact| &artifact.files) {
            files.entry(file.digest).or_insert((file.bytes, BTreeSet::new())).1.insert(stage.clone());
        }
        *results.entry(stage).or_default() += 1;
    }
    let mut sizes: BTreeMap<&String, (u64, u64)> = results.keys().map(|stage| (stage, (0, 0))).collect();
    for (size, stages) in files.values() {
        for stage in stages {
            let (all, own) = sizes.get_mut(stage).expect("it was seen with this file");
            *all += size;
            *own += if stages.len() == 1 { *size } else { 0 };
        }
    }
    let mut sizes: Vec<_> = sizes.into_iter().collect();
    sizes.sort_by_key(|(stage, (all, _))| (std::cmp::Reverse(*all), *stage));
    if args.cache.json {
        let stage = |(stage, (all, own)): &(&String, (u64, u64))| json!({"stage": stage, "results": results[*stage], "bytes": all, "own": own});
        return say(&pretty(&sizes.iter().map(stage).collect()));
    }
    let width = sizes.iter().map(|(stage, _)| stage.chars().count()).max().unwrap_or_default();
    for (stage, (all, own)) in &sizes {
        let shared = if own < all { format!("  {} its own", bytes(*own)) } else { String::new() };
        let number = counted(results[*stage], "result");
        say(&format!("{:>10}  {stage:width$}  {number}{shared}\n", bytes(*all)))?;
    }
    Ok(())
}

/// Drops what nobody wants.
fn collect(args: &GcArgs) -> Result<()> {
    let store = existing_store(&args.cache.store)?;
    let wanted = Wanted::read(&store)?;
    let since = days_ago(args.days);
    let named = store.names()?.into_values().map(|named| named.key);
    let recent = wanted.last.iter().filter(|(_, (run, _))| *run >= since).map(|(key, _)| *key);
    let wish = Wish {
        keep: named.chain(recent).collect(),
        last_wanted: wanted.last.iter().map(|(key, (run, _))| (*key, run.as_str())).collect(),
        limit: args.limit,
        dry_run: args.dry_run,
    };
    let collection = store.collect(&wish)?;
    if args.cache.json {
        let result = |(key, size): &(Key, u64)| json!({"key": key, "stage": wanted.what(key), "bytes": size});
        let results: Vec<_> = collection.results.iter().map(result).collect();
        let (files, checkpoints, left) = (collection.files, collection.checkpoints, collection.left);
        let shown = json!({
            "dry_run": args.dry_run, "results": results, "files": files, "checkpoints": checkpoints, "left": left,
        });
        return say(&pretty(&shown));
    }
    for (key, size) in &collection.results {
        say(&format!("{:>10}  {}\n", bytes(*size), wanted.what(key)))?;
    }
    let verb = if args.dry_run { "would drop" } else { "dropped" };
    say(&format!(
        "{verb} {}, {} of files and {} of checkpoints; {} stay\n",
        counted(collection.results.len() as u64, "result"),
        bytes(collection.files.bytes),
        bytes(collection.checkpoints.bytes),
        bytes(collection.left.bytes)
    ))
}

/// Hashes everything.
fn verify(args: &CacheArgs) -> Result<ExitCode> {
    let found = existing_store(&args.store)?.verify()?;
    if args.json {
        say(&pretty(&serde_json::to_value(&found)?))?;
    } else {
        for damage in &found.damage {
            say(&format!("{damage}\n"))?;
        }
        let (blobs, records, damaged) = (found.blobs, found.records, found.damage.len());
        say(&format!("{} in {blobs} files, {records} records: {damaged} damaged\n", bytes(found.bytes)))?;
    }
    Ok(if found.damage.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(status::STORE) })
}

/// What results were wanted for.
struct Wanted {
    /// The last run that wanted each, and the stage that it was there.
    last: BTreeMap<Key, (String, String)>,
    /// The stages that named results are of.
    named: BTreeMap<Key, String>,
}

impl Wanted {
    fn read(store: &Store) -> Result<Self> {
        let mut last = BTreeMap::new();
        // From the newest.
        for run in past_runs(store) {
            for stage in &run.stages {
                let of = Of {
                    pipeline: run.pipeline.pipeline.clone(),
                    cell: stage.alias.cell.clone(),
                    stage: stage.alias.name.clone(),
                    ..Of::default()
                };
                last.entry(stage.key).or_insert_with(|| (run.id.clone(), of.to_string()));
            }
        }
        let named = store.names()?.into_values().map(|named| (named.key, Of::read(&named).to_string())).collect();
        Ok(Wanted { last, named })
    }

    /// The stage that a result is of.
    fn what(&self, key: &Key) -> String {
        let of = self.last.get(key).map(|(_, of)| of).or_else(|| self.named.get(key));
        of.cloned().unwrap_or_else(|| format!("{}, of no run that is left", key.short()))
    }
}
