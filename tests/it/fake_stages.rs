//! The runner with fake stages. Tests of the command line run this program, as people run `pipeline`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

#[allow(unreachable_pub, reason = "the unit tests of the runner are made of the same file")]
mod fakes;

/// A pipeline that is compiled in.
const SHIPPED: &[(&str, &str)] = &[(
    "shipped.yaml",
    "version: 1\nname: shipped\nstages:\n  data: {kind: rows, with: {rows: 4}}\n  model: {kind: init}\n",
)];

fn main() -> ExitCode {
    promptkd::main(fakes::registry(), SHIPPED, &promptkd::Extras { score, texts, gpus })
}

/// As many GPUs as a test says there are.
fn gpus() -> Option<anyhow::Result<usize>> {
    let count = std::env::var("FAKE_GPUS").ok()?;
    Some(count.parse().context("FAKE_GPUS is no number"))
}

/// Ids as numbers.
fn texts(_: &contract::TokenizerFile, ids: &[&[u32]]) -> anyhow::Result<Vec<String>> {
    Ok(ids.iter().map(|ids| format!("{ids:?}")).collect())
}

fn score(request: &contract::Scoring) -> anyhow::Result<serde_json::Value> {
    let lines = |path: &Path| {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()));
        text.map(|text| text.lines().count())
    };
    Ok(serde_json::json!({"predictions": lines(&request.predictions)?, "references": lines(&request.references)?}))
}
