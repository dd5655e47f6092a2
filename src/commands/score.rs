//! `pipeline score`: scores files, for which the stages crate lends its function.

use anyhow::Result;
use contract::Scoring;
use serde_json::Value as Json;

use super::{Extras, pretty, say};
use crate::cli::{Extraction, PairBy, ScoreArgs, Words};

pub(crate) fn score(args: &ScoreArgs, extras: &Extras) -> Result<()> {
    let ScoreArgs { predictions, references, by, words, extraction, json } = args.clone();
    let (by_line, unicode) = (by == PairBy::Line, words == Words::Unicode);
    let extraction = match extraction {
        Extraction::Strict => contract::Extraction::Strict,
        Extraction::Flexible => contract::Extraction::Flexible,
        Extraction::Gsm8k => contract::Extraction::Gsm8k,
        Extraction::Published => contract::Extraction::Published,
    };
    let scores = (extras.score)(&Scoring { predictions, references, by_line, unicode, extraction })?;
    if json {
        return say(&pretty(&scores));
    }
    let lines = scores.as_object().into_iter().flatten().map(|(name, value)| match value {
        Json::String(text) => format!("{name} {text}\n"),
        Json::Null => format!("{name} not measured\n"),
        Json::Object(counts) => {
            let counts: String = counts.iter().map(|(what, count)| format!(" {what} {count}")).collect();
            format!("{name}{}\n", if counts.is_empty() { " none" } else { &counts })
        }
        other => format!("{name} {other}\n"),
    });
    say(&lines.collect::<String>())
}
