//! The store alone: keep a result under all that made it, find it again, and be told why it is not there.
//!
//! ```text
//! cargo run --example store
//! ```
//!
//! The words of a text are counted four times. It prints `computed` with the reason the first time, `found` the second
//! time, `computed` with the field that changed the third time, and after a byte of the result was damaged `computed` once
//! more: what is not whole is not served.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Result;
use cache::{Digest, Key, Lookup, Store};
use serde_json::{Value as Json, json};

const TEXT: &str = "a student learns from a teacher what the teacher learned from a text";

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let store = Store::open(&folder.path().join("store"))?;
    words_longer_than(3, &store)?;
    let file = words_longer_than(3, &store)?;
    words_longer_than(5, &store)?;

    fs::set_permissions(&file, Permissions::from_mode(0o644))?;
    fs::write(&file, "0")?;
    words_longer_than(3, &store)?;
    Ok(())
}

/// How many words of the text have more letters than that, as a file in the store.
fn words_longer_than(letters: usize, store: &Store) -> Result<PathBuf> {
    // All that may change the result: what is done, in which version, with which settings, to what.
    let preimage = json!({
        "kind": "count-words",
        "version": 1,
        "longer_than": letters,
        "text": Digest::of(TEXT.as_bytes()).to_string(),
    });
    let earlier = store.keys()?;
    let key = store.keep_preimage(&preimage)?;
    let _guard = store.lock(&key)?; // one process computes; the others wait, and find it done
    let record = match store.lookup(&key)? {
        Lookup::Hit(record) => {
            println!("found     longer than {letters}");
            record
        }
        Lookup::Miss(why) => {
            println!("computed  longer than {letters}: {why}{}", difference(&preimage, &earlier, store)?);
            let count = TEXT.split(' ').filter(|word| word.len() > letters).count();
            let work = store.begin(&key)?;
            fs::write(work.output("count")?.join("count.txt"), count.to_string())?;
            store.publish(work, &[("count".into(), "file".into())], json!({"by": "this example"}))?
        }
    };
    // The bytes are verified before the path is handed out.
    Ok(store.open_artifact(&record.outputs["count"])?.join("count.txt"))
}

/// What tells a preimage from the one of an earlier result.
fn difference(preimage: &Json, earlier: &[Key], store: &Store) -> Result<String> {
    let mut text = String::new();
    for key in earlier {
        let Some(before) = store.preimage(key)? else { continue };
        for (field, now) in preimage.as_object().into_iter().flatten().filter(|(field, now)| before[*field] != **now) {
            text += &format!("; `{field}` was {} and is {now}", before[field]);
        }
    }
    Ok(text)
}
