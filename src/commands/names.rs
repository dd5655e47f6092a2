//! `pipeline tag`, `tags`, `untag`, `pin` and `unpin`: names for results, so that nobody types a hash.

use anyhow::Result;
use cache::{Named, Store};
use contract::files::in_words as bytes;
use petgraph::graph::NodeIndex;
use serde_json::{Value as Json, json};

use super::{BadRequest, Workbench, existing_store, no_result, open_store, pretty, say};
use crate::cli::{ListArgs, TagArgs, Target, UntagArgs};
use crate::graph::{Cell, Graph};
use crate::plan::history::Pipeline;
use crate::plan::names::{Of, find_pin};
use crate::plan::selection::{self, Wanted};
use crate::plan::{self, Settled, key};

/// Gives the result of a stage a name.
pub(crate) fn tag(args: &TagArgs, bench: &Workbench) -> Result<()> {
    let one = one(&args.target, bench)?;
    if let Some(other) = one.store.named(&args.name)?
        && other.key != one.settled.action.key
        && !args.r#move
    {
        let of = Of::read(&other);
        let message =
            format!("`{}` is the name of {of}; give it to this one with `--move`, or choose another", args.name);
        return Err(BadRequest(message).into());
    }
    open_store(&args.target.store)?.give_name(&args.name, &one.named(false))?;
    say(&format!("{}  {}\n", args.name, one.of))
}

/// Takes a name away.
pub(crate) fn untag(args: &UntagArgs) -> Result<()> {
    let store = existing_store(&args.store)?;
    match store.take_name(&args.name)? {
        true => Ok(()),
        false => Err(BadRequest(format!("nothing is called `{}`; `pipeline tags` lists all names", args.name)).into()),
    }
}

/// Lists the names.
pub(crate) fn tags(args: &ListArgs) -> Result<()> {
    let store = existing_store(&args.store)?;
    let names = store.names()?;
    let width = names.keys().map(String::len).max().unwrap_or_default();
    let mut text = String::new();
    let mut all = serde_json::Map::new();
    for (name, named) in &names {
        let size = store.lookup(&named.key)?.hit().map(|record| record.bytes());
        let of = Of::read(named);
        let what = size.map_or_else(|| "its result is gone; run the stage again".to_owned(), bytes);
        let pinned = if of.pinned { "  pinned" } else { "" };
        text += &format!("{name:width$}  {of}  {what}{pinned}\n");
        all.insert(name.clone(), json!({"key": named.key, "of": named.info, "bytes": size}));
    }
    say(&if args.json { pretty(&Json::Object(all)) } else { text })
}

/// Says that the key of a stage is to stay as it is.
pub(crate) fn pin(target: &Target, bench: &Workbench) -> Result<()> {
    let one = one(target, bench)?;
    let name = pin_name(&one.of);
    open_store(&target.store)?.give_name(&name, &one.named(true))?;
    say(&format!("{name}  {}  pinned: a plan in which its key is another fails\n", one.of))
}

/// Lets the key of a stage change again.
pub(crate) fn unpin(target: &Target, bench: &Workbench) -> Result<()> {
    let graph = bench.load(target)?;
    let (cell, stage, _) = one_stage(&graph, target)?;
    let store = existing_store(&target.store)?;
    match find_pin(&store, &Pipeline::of(&target.file), &cell.label, stage)? {
        Some((name, _)) => store.take_name(&name).map(drop).map_err(Into::into),
        None => Err(BadRequest(format!("`{stage}` is not pinned; `pipeline tags` lists what is")).into()),
    }
}

/// A name that says what is pinned.
fn pin_name(of: &Of) -> String {
    let file = std::path::Path::new(&of.path).file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let cell = if of.cell == "base" { String::new() } else { format!(".{}", of.cell) };
    let name = format!("{}.{}{cell}", file.unwrap_or_default(), of.stage);
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    name.trim_start_matches('.').chars().map(plain).take(100).collect()
}

/// One stage with its result.
struct One {
    store: Store,
    settled: Settled,
    of: Of,
}

impl One {
    fn named(&self, pinned: bool) -> Named {
        let of = Of { pinned, names: key::names_of(&self.settled.action.subgraph), ..self.of.clone() };
        Named { key: self.settled.action.key, info: serde_json::to_value(of).expect("texts are JSON") }
    }
}

/// The one stage that is named, which must have a result.
fn one(target: &Target, bench: &Workbench) -> Result<One> {
    let graph = bench.load(target)?;
    let (cell, stage, node) = one_stage(&graph, target)?;
    let selection = selection::select(&graph, &Wanted { stages: &target.stages, ..Wanted::default() })?;
    let store = existing_store(&target.store)?;
    let mut settled = plan::plan(&graph, &selection, bench.registry, &store)?.settled();
    let settled = settled.remove(&node).ok_or_else(|| no_result(stage))?;
    let Pipeline { pipeline, path } = Pipeline::of(&target.file);
    let of = Of { pipeline, path, cell: cell.label.clone(), stage: stage.to_owned(), ..Of::default() };
    Ok(One { store, settled, of })
}

/// The top-level stage that the command names, in the one cell that it selects.
pub(crate) fn one_stage<'g>(graph: &'g Graph, target: &Target) -> Result<(&'g Cell, &'g str, NodeIndex)> {
    let [name] = target.stages.as_slice() else {
        return Err(BadRequest("name one stage, after the file".into()).into());
    };
    let [cell] = graph.cells.as_slice() else {
        let labels: Vec<String> = graph.cells.iter().map(|cell| format!("`{}`", cell.label)).collect();
        return Err(BadRequest(format!("`{name}` may be of {}; select one variant", labels.join(", "))).into());
    };
    let node = selection::find(graph, cell, name);
    let found = node.and_then(|node| cell.names.iter().find(|(_, other)| **other == node));
    match found {
        Some((stage, node)) => Ok((cell, stage, *node)),
        None => Err(selection::unknown(graph, name).into()),
    }
}
