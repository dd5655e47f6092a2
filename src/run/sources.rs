//! Sources as a running stage reads them: private copies that hold what the key says they hold.
//!
//! The worker makes them before anything starts, hashing every byte on its way, and puts their paths into the
//! configurations. So what is read is what was hashed, whatever becomes of the originals meanwhile, and a kind that forgets
//! to care cannot get it wrong. What a stage says of a copy is said of the original, as the person wrote it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cache::Digest;
use contract::{Registry, Source};
use serde_json::json;

use crate::graph::{Operator, Subgraph};
use crate::plan::key;
use crate::rounds::find_kind;

/// Makes the copies below `work` and lets the configurations name them. Returns the first source that no longer holds what
/// the key says, if there is one: then the key is that of something else.
pub(crate) fn take(
    subgraph: &mut Subgraph,
    known: &[(Source, Digest)],
    work: &Path,
    registry: &Registry,
) -> Result<Option<PathBuf>> {
    for (index, (source, digest)) in known.iter().enumerate() {
        match cache::copy_source(&source.path, &copy(work, index), &|name| source.takes(name)) {
            Ok(found) if found == *digest => {}
            // One that is gone has changed, too.
            Ok(_) | Err(cache::StoreError::Changed { .. }) => return Ok(Some(source.path.clone())),
            Err(_) if !source.path.exists() => return Ok(Some(source.path.clone())),
            Err(error) => return Err(error.into()),
        }
    }
    for operator in operators(subgraph) {
        let kind = find_kind(registry, &operator.kind)?;
        for source in kind.sources(&operator.config) {
            let index = known.iter().position(|(other, _)| *other == source);
            let index = index.with_context(|| format!("`{}` is not in the key", source.path.display()))?;
            let path = copy(work, index);
            let path = path.to_str().with_context(|| format!("the path `{}` is not UTF-8", path.display()))?;
            key::put(&mut operator.config, &source.field, json!(path), &operator.kind)?;
        }
    }
    Ok(None)
}

/// A text of the worker's in which every copy is called as the person wrote it.
pub(crate) fn as_written(text: &str, known: &[(Source, Digest)], work: &Path) -> String {
    // From the last, for the path of the eleventh copy begins with that of the second.
    known.iter().enumerate().rev().fold(text.to_owned(), |text, (index, (source, _))| {
        text.replace(&copy(work, index).display().to_string(), &source.path.display().to_string())
    })
}

/// Where the copy of a source lies. Its name says nothing of the original's: that is in no key.
fn copy(work: &Path, index: usize) -> PathBuf {
    work.join("sources").join(index.to_string())
}

fn operators(subgraph: &mut Subgraph) -> Vec<&mut Operator> {
    match subgraph {
        Subgraph::Operator(operator) => vec![operator],
        Subgraph::Loop(body) => body.stages.values_mut().map(|stage| &mut stage.operator).collect(),
    }
}
