//! Names that people give to results. A name outlives runs and pipelines, and what it stands for is never collected.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::error::{Result, StoreError};
use crate::key::Key;
use crate::record::{seal_text, unseal_text};
use crate::store::{Store, list, read_if_there};

/// The form of names.
const FORM: &str = "pipeline-name-v1";

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// The result.
    pub key: Key,
    /// Where the name comes from: kept for people.
    pub info: Json,
}

impl Store {
    /// Gives a result a name, in the place of what had it.
    ///
    /// Errors when the name is none: letters, digits, `-`, `_` and `.`, not starting with `.`, up to 100 of them.
    pub fn give_name(&self, name: &str, named: &Named) -> Result<()> {
        check(name)?;
        let scratch = self.begin_scratch()?;
        let draft = scratch.path.join("name");
        self.disk.write(&draft, &seal_text(FORM, named))?;
        self.disk.sync(&draft)?;
        let home = self.names_path().join(name);
        self.make_parent(&home)?;
        self.disk.rename(&draft, &home)?;
        self.disk.sync(&self.names_path())
    }

    /// What a name stands for; none if nobody has it. One that is damaged is none.
    pub fn named(&self, name: &str) -> Result<Option<Named>> {
        check(name)?;
        let Some(text) = read_if_there(&self.names_path().join(name))? else { return Ok(None) };
        match unseal_text(FORM, &text) {
            Ok(named) => Ok(Some(named)),
            Err(reason) => {
                tracing::warn!(name, reason, "a name is damaged and is not used; give it again");
                Ok(None)
            }
        }
    }

    /// All names, in order.
    pub fn names(&self) -> Result<BTreeMap<String, Named>> {
        let mut names = BTreeMap::new();
        for (name, _) in list(&self.names_path())? {
            if check(&name).is_ok()
                && let Some(named) = self.named(&name)?
            {
                names.insert(name, named);
            }
        }
        Ok(names)
    }

    /// Takes a name away; whether anything had it. The result stays.
    pub fn take_name(&self, name: &str) -> Result<bool> {
        check(name)?;
        let path = self.names_path().join(name);
        let was_there = path.exists();
        self.disk.remove_file(&path)?;
        Ok(was_there)
    }

    fn names_path(&self) -> std::path::PathBuf {
        self.root().join("names")
    }
}

fn check(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_name = (1..=100).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.');
    if is_name { Ok(()) } else { Err(StoreError::NoName { name: name.into() }) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_name_is_given_moved_and_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let named = |number: u32| Named { key: Key::of(&json!(number)), info: json!({"stage": "train"}) };
        assert_eq!(store.named("best").unwrap(), None);
        store.give_name("best", &named(1)).unwrap();
        store.give_name("v1.0-rc_2", &named(2)).unwrap();
        store.give_name("best", &named(3)).unwrap();
        assert_eq!(store.named("best").unwrap(), Some(named(3)));
        assert_eq!(store.names().unwrap(), BTreeMap::from([("best".into(), named(3)), ("v1.0-rc_2".into(), named(2))]));
        assert!(store.take_name("best").unwrap());
        assert!(!store.take_name("best").unwrap());
        assert_eq!(store.named("best").unwrap(), None);
    }

    #[test]
    fn what_would_be_a_path_is_no_name_and_a_damaged_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let named = Named { key: Key::of(&json!(1)), info: json!(null) };
        for name in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "\u{e9}", &"x".repeat(101)] {
            assert!(matches!(store.give_name(name, &named), Err(StoreError::NoName { .. })), "{name}");
            assert!(store.named(name).is_err() && store.take_name(name).is_err(), "{name}");
        }
        store.give_name("a", &named).unwrap();
        let path = folder.path().join("names/a");
        let text = std::fs::read(&path).unwrap();
        for index in 0..text.len() {
            let mut flipped = text.clone();
            flipped[index] ^= 1;
            std::fs::write(&path, &flipped).unwrap();
            assert_eq!(store.named("a").unwrap(), None, "byte {index}");
        }
        assert!(store.names().unwrap().is_empty());
    }
}
