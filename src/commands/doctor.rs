//! `pipeline doctor`: what this machine and this store can do, for who wonders why something is slow or refused.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use cache::Digest;
use contract::files::in_words as bytes;
use serde_json::{Map, Value as Json, json};

use super::{Workbench, pretty, say, store_path};
use crate::cli::DoctorArgs;
use crate::ground::memory;

pub(crate) fn doctor(args: &DoctorArgs, bench: &Workbench) -> Result<()> {
    let mut found = Map::new();
    let mut lines = Vec::new();
    let mut add = |what: &str, value: Json, words: String| {
        found.insert(what.replace(' ', "_"), value);
        lines.push(format!("{what:<14} {words}\n"));
    };
    add(
        "program",
        json!(env!("CARGO_PKG_VERSION")),
        format!("{} for {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH),
    );
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    add("threads", json!(threads), format!("{threads}; instructions: {}", instructions().join(", ")));
    let memory = memory::limit();
    add(
        "memory",
        json!(memory),
        memory.map_or("nobody says how much".into(), |limit| format!("{} at most", bytes(limit))),
    );
    let (gpus, words) = match (bench.gpus)() {
        None => (json!(null), "none: the program was built without CUDA".to_owned()),
        Some(Ok(count)) => (json!(count), format!("{count} can be used")),
        Some(Err(error)) => (json!(0), format!("none: {error:#}")),
    };
    add("gpus", gpus, words);
    let root = store_path(&args.store)?;
    let store = cache::Store::open_to_read(&root)?;
    let there = root.ancestors().find(|folder| folder.exists());
    let free = there.and_then(|there| rustix::fs::statvfs(there).ok()).map(|found| found.f_bavail * found.f_frsize);
    let state = if store.exists()? { "" } else { " (not made yet)" };
    let room = free.map_or(String::new(), |free| format!(", {} free", bytes(free)));
    add(
        "store",
        json!({"path": root.display().to_string(), "free": free}),
        format!("`{}`{state}{room}", root.display()),
    );
    // Into pages that are there already: the first touch of a page costs more than the copy.
    let mut copy = vec![1u8; PART];
    let hashing = rate(|part| keep(Digest::of(part)));
    let copying = rate(|part| {
        copy.copy_from_slice(part);
        keep(&copy);
    });
    let gigabytes = |rate: f64| format!("{:.1} GB/s", rate / 1e9);
    add("hashing", json!(hashing), format!("{} a thread; copying memory {}", gigabytes(hashing), gigabytes(copying)));
    if let Some(there) = there.filter(|_| store.exists().unwrap_or(false)) {
        let sync = sync_time(there);
        let words = sync.map_or("the store cannot be written".to_owned(), |time| {
            format!("{:.1} ms to be sure of a file", time * 1e3)
        });
        add("disk", json!(sync), words);
    }
    say(&if args.json { pretty(&Json::Object(found)) } else { lines.concat() })
}

/// What the processor can do that kernels here use.
fn instructions() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
    let has = |name: &str| flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == name));
    let known = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_tile"];
    let found: Vec<String> = known.into_iter().filter(|name| has(name)).map(str::to_owned).collect();
    if found.is_empty() { vec!["none that kernels here use".into()] } else { found }
}

/// Work that nobody uses is done all the same.
fn keep<T>(made: T) {
    std::hint::black_box(&made);
}

/// Bytes that rates are measured on: more than caches hold.
const PART: usize = 32 << 20;

/// Bytes a second of work on [`PART`], over and over for a tenth of a second.
fn rate(mut work: impl FnMut(&[u8])) -> f64 {
    let part = vec![7u8; PART];
    let since = Instant::now();
    let mut times = 0u32;
    while since.elapsed() < Duration::from_millis(100) {
        work(&part);
        times += 1;
    }
    f64::from(times) * part.len() as f64 / since.elapsed().as_secs_f64()
}

/// Seconds until a new file is on the disk: the middle of five.
fn sync_time(folder: &std::path::Path) -> Option<f64> {
    let path = folder.join(format!("doctor.{}", std::process::id()));
    let mut times = Vec::new();
    for _ in 0..5 {
        let since = Instant::now();
        let written = fs::File::create(&path).and_then(|file| file.sync_all());
        times.push(since.elapsed().as_secs_f64());
        let removed = fs::remove_file(&path);
        written.and(removed).ok()?;
    }
    times.sort_by(f64::total_cmp);
    times.get(2).copied()
}
