//! Sources as a running stage reads them: private copies that hold what the key says they hold.
//!
//! The worker makes them before anything starts, hashing every byte on its way, and puts their paths into the
//! configurations. So what is read is what was hashed, whatever becomes of the originals meanwhile, and a kind that forgets
//! to care cannot get it wrong. What is elsewhere is fetched first. What a stage says of a copy is said of the original, as the
//! person wrote it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use contract::{Location, Registry, Source};
use serde_json::json;

use crate::graph::Subgraph;
use crate::plan::content::REMOTE;
use crate::plan::key::{self, SourcePart};
use crate::rounds::find_kind;

/// Told how much of a file that is fetched is there, in bytes, and how much there will be.
pub(crate) type Tell<'a> = &'a mut dyn FnMut(u64, Option<u64>);

/// Makes the copies below `work` and lets the configurations name them. Returns the first source that no longer holds what
/// the key says, if there is one: then the key is that of something else.
pub(crate) fn take(
    subgraph: &mut Subgraph,
    known: &[(Source, SourcePart)],
    work: &Path,
    registry: &Registry,
    tell: Tell,
) -> Result<Option<PathBuf>> {
    for (index, (source, part)) in known.iter().enumerate() {
        if !copy_of(source, part, &copy(work, index), tell)? {
            return Ok(Some(source.at.to_string().into()));
        }
    }
    for operator in subgraph.operators_mut() {
        let kind = find_kind(registry, &operator.kind)?;
        for source in kind.sources(&operator.config) {
            let index = known.iter().position(|(other, _)| *other == source);
            let index = index.with_context(|| format!("`{}` is not in the key", source.at))?;
            let path = copy(work, index);
            let path = path.to_str().with_context(|| format!("the path `{}` is not UTF-8", path.display()))?;
            key::put(&mut operator.config, &source.field, json!(path), &operator.kind)?;
        }
    }
    Ok(None)
}

/// Makes the copy of a source; false where it no longer holds what the key says.
fn copy_of(source: &Source, part: &SourcePart, to: &Path, tell: Tell) -> Result<bool> {
    let takes = |name: &str| source.takes(name);
    match (&source.at, part) {
        (Location::Local(path), part) => match cache::copy_source(path, to, &takes) {
            Ok(content) => Ok(*part == SourcePart::Content { content }),
            // One that is gone has changed, too.
            Err(cache::StoreError::Changed { .. }) => Ok(false),
            Err(_) if !path.exists() => Ok(false),
            Err(error) => Err(error.into()),
        },
        (Location::Hub(at), SourcePart::Hub { commit, .. }) => {
            let path = REMOTE.fetch(at, commit, &|names| source.choose(names), tell)?;
            cache::copy_source(&path, to, &takes)?;
            Ok(true)
        }
        (Location::Web(file), _) => {
            let path = REMOTE.fetch_web(file, tell)?;
            let content = cache::copy_source(&path, to, &takes)?;
            // Cut short or written to since it was looked at, by whoever else has this cache.
            Ok(!matches!(part, SourcePart::Content { .. }) || *part == SourcePart::Content { content })
        }
        (Location::Hub(_), part) => anyhow::bail!("`{}` is in the key as {part:?}: a fault of the program", source.at),
    }
}

/// A text of the worker's in which every copy is called as the person wrote it.
pub(crate) fn as_written(text: &str, known: &[(Source, SourcePart)], work: &Path) -> String {
    // From the last, for the path of the eleventh copy begins with that of the second.
    known.iter().enumerate().rev().fold(text.to_owned(), |text, (index, (source, _))| {
        text.replace(&copy(work, index).display().to_string(), &source.at.to_string())
    })
}

/// Where the copy of a source lies. Its name says nothing of the original's: that is in no key.
fn copy(work: &Path, index: usize) -> PathBuf {
    work.join("sources").join(index.to_string())
}
