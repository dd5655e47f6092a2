//! `pipeline cache`: looks after the store.

use std::process::ExitCode;

use anyhow::Result;
use contract::files::in_words as bytes;

use super::{existing_store, pretty, say, status};
use crate::cli::CacheCommand;

pub(crate) fn cache(command: &CacheCommand) -> Result<ExitCode> {
    match command {
        CacheCommand::Du(args) => {
            let usage = existing_store(&args.store)?.usage()?;
            if args.json {
                say(&pretty(&serde_json::to_value(usage)?))?;
                return Ok(ExitCode::SUCCESS);
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
            ))?;
            Ok(ExitCode::SUCCESS)
        }
        CacheCommand::Verify(args) => {
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
    }
}
