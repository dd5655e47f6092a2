//! `pipeline score`: scores files, for which the stages crate lends its function.

use anyhow::Result;
use serde_json::Value as Json;

use super::{Extras, pretty, say};
use crate::cli::ScoreArgs;

pub(crate) fn score(args: &ScoreArgs, extras: &Extras) -> Result<()> {
    let scores = (extras.score)(&args.predictions, &args.references)?;
    if args.json {
        return say(&pretty(&scores));
    }
    let lines = scores.as_object().into_iter().flatten().map(|(name, value)| match value {
        Json::String(text) => format!("{name} {text}\n"),
        other => format!("{name} {other}\n"),
    });
    say(&lines.collect::<String>())
}
