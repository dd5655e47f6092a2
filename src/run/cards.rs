//! Cards, which all runs on this machine share out among them: a worker has its card for itself, whichever run started it.
//! A card is held by a lock of the kernel, which ends with the process whatever happens to it.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result};
use cache::Guard;

/// The cards that one run holds now.
pub(crate) struct Cards {
    /// Where the locks of one person's runs are.
    folder: PathBuf,
    held: Mutex<HashMap<String, Weak<Guard>>>,
}

/// A card is held as long as this is there.
pub(crate) struct Held(#[expect(dead_code, reason = "dropping the last one unlocks the card")] Arc<Guard>);

impl Cards {
    /// Those of this machine.
    pub(crate) fn new() -> Self {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| folder.is_dir());
        let user = rustix::process::getuid().as_raw();
        let folder = match runtime {
            Some(runtime) => runtime.join("pipeline-cards"),
            None => std::env::temp_dir().join(format!("pipeline-cards-{user}")),
        };
        Cards::in_folder(folder)
    }

    fn in_folder(folder: PathBuf) -> Self {
        Cards { folder, held: Mutex::new(HashMap::new()) }
    }

    /// Takes a card, by its name for the whole machine; nothing while another run has it. Workers of this run that were given
    /// the same card share it, for that is what was asked for.
    pub(crate) fn take(&self, card: &str) -> Result<Option<Held>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = held.get(card).and_then(Weak::upgrade) {
            return Ok(Some(Held(lock)));
        }
        fs::create_dir_all(&self.folder).with_context(|| format!("cannot make folder `{}`", self.folder.display()))?;
        let name = card.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "_");
        let Some(lock) = cache::try_take(&self.folder.join(name))? else { return Ok(None) };
        let lock = Arc::new(lock);
        held.insert(card.to_owned(), Arc::downgrade(&lock));
        Ok(Some(Held(lock)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_runs_never_have_the_same_card() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = [(), ()].map(|()| Cards::in_folder(folder.path().join("cards")));
        let first = one.take("GPU-8a/1").unwrap().unwrap();
        let second = one.take("GPU-8a/1").unwrap().expect("a run shares with itself");
        assert!(other.take("GPU-8a/1").unwrap().is_none());
        assert!(other.take("GPU-8a/2").unwrap().is_some(), "another card");
        drop(first);
        assert!(other.take("GPU-8a/1").unwrap().is_none(), "one of the two still has it");
        drop(second);
        let third = other.take("GPU-8a/1").unwrap().unwrap();
        assert!(one.take("GPU-8a/1").unwrap().is_none());
        drop(third);
    }
}
