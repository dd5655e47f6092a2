//! A content-addressed store for results that are expensive to compute.
//!
//! It knows bytes and keys. What a key stands for, and who computes it, is the business of others: this crate runs nothing,
//! reads no configuration, and prints nothing.
//!
//! - A [`Key`] is the hash of a *preimage*: JSON that names everything that may change a result.
//! - A [`Record`] is an accepted result for a key: one [`Artifact`] for each output port, and how it came about.
//! - An [`Artifact`] is a folder of files, addressed by their content. Equal files are kept once.
//! - A [`Cut`] is a checkpoint of work that is not finished.
//!
//! # Layout
//!
//! ```text
//! cas/ab/<62 hex>        blob: the bytes of one file, read-only, written once
//! trees/ab/<62 hex>/     artifact as a folder of links to blobs; can be built again at any time
//! ac/ab/<key>            action record, with a checksum
//! pre/ab/<key>           preimage of a key
//! cut/<key>/<round>/     checkpoint: a checksummed `manifest` beside the folder `files`
//! names/                 names that people gave to results, a checksummed file each
//! runs/                  the runner's own
//! work/<key>.<id>/       the only place where a running stage writes
//! locks/                 the kernel's locks, one file a key while it is held
//! stamps/<boot>          which files were hashed since the machine booted; may be removed at any time
//! format                 name of this layout
//! ```
//!
//! # What holds
//!
//! - A record appears last and in one step. Whatever dies before that leaves nothing that could be served, only a folder in
//!   `work`, which [`Store::sweep`] removes.
//! - What is published survives a loss of power: files and folders are synced before the record is, and the record before
//!   [`Store::publish`] returns.
//! - Nothing in `cas`, `trees` or `ac` is ever changed. Every file has one fixed modification time, so a write to it shows;
//!   and once a file was hashed, so does a write that puts this time back.
//! - Damage is a miss, not an error, and publishing the key again mends it. Whoever gets to read an artifact, by
//!   [`Store::open_artifact`] or [`Store::copy_artifact`], gets bytes that were hashed just then. A [`Store::lookup`] reads
//!   no bytes, so that what a disk loses without a trace can still be a hit; it is found when it is used, or by
//!   [`Store::verify`].
//! - Two processes may do anything at once. The first whole result of a key stays.
//!
//! # Example
//!
//! ```
//! use cache::{Lookup, Store};
//! use serde_json::json;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let root = folder.path().join("store");
//! let store = Store::open(&root)?;
//! let key = store.keep_preimage(&json!({"kind": "greet", "version": 1, "with": {"name": "world"}}))?;
//!
//! let _guard = store.lock(&key)?; // one process computes, the others wait and find it done
//! let record = match store.lookup(&key)? {
//!     Lookup::Hit(record) => record,
//!     Lookup::Miss(why) => {
//!         assert_eq!(why.to_string(), "no result is recorded for this key");
//!         let work = store.begin(&key)?;
//!         std::fs::write(work.output("greeting")?.join("text"), "hello world")?;
//!         store.publish(work, &[("greeting".into(), "file".into())], json!({"seconds": 0.1}))?
//!     }
//! };
//!
//! let path = store.open_artifact(&record.outputs["greeting"])?;
//! assert_eq!(std::fs::read_to_string(path.join("text"))?, "hello world");
//! assert_eq!(store.lookup(&key)?, Lookup::Hit(record));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod artifact;
mod collect;
#[cfg(test)]
mod crash_safety;
mod cut;
mod digest;
mod disk;
mod error;
mod key;
mod lock;
mod name;
mod publish;
mod record;
mod source;
mod stamp;
mod store;
mod usage;
mod verify;
mod work;

pub use collect::{Collection, InUse, Wish};
pub use cut::Cut;
pub use digest::{Digest, FileEntry, NotHexadecimal};
pub use error::{Result, StoreError};
pub use key::{Key, canonical};
pub use lock::{Guard, try_take};
pub use name::Named;
pub use record::{Artifact, Lookup, Record, Why};
pub use source::{Takes, copy_source};
pub use store::Store;
pub use usage::{Size, Usage};
pub use verify::{Damage, Part, Verification};
pub use work::Work;
