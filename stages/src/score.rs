//! Scores of generated text against right answers: ROUGE-L and exact match, as the reference programs compute them.
//!
//! ROUGE-L (Lin, 2004) is the F1 of the longest common subsequence of words. Words are runs of ASCII letters and digits
//! after lower-casing, so an accented letter separates; those of more than three letters are stemmed ([`crate::porter`]).
//! With several right answers the best one counts. No sentence is split.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use unicode_segmentation::UnicodeSegmentation;

use crate::{jsonl, porter};

/// Scores `predictions` (JSON lines with `text`) against `references` (JSON lines with `output`, a text or a list of
/// right answers), line by line; either may be gzipped.
///
/// Gives `rouge_l` and `exact_match`, means in percent rounded to 4 decimals, `rows`, and `unscored_references`: lines of
/// references beyond the last prediction. More predictions than references are an error.
pub fn score(predictions: &Path, references: &Path) -> Result<Json> {
    let predictions = read(predictions, |row| row["text"].as_str().map(clean), "`text`")?;
    let references_path = references;
    let references = read(references, answers, "`output` that is a text or a list of texts")?;
    ensure!(!predictions.is_empty(), "there are no predictions to score");
    ensure!(
        predictions.len() <= references.len(),
        "{} predictions, but `{}` has only {} lines",
        predictions.len(),
        references_path.display(),
        references.len()
    );
    let scores: Vec<(f64, f64)> = predictions
        .par_iter()
        .zip(&references)
        .map(|(text, answers)| (rouge_l(text, answers), f64::from(u8::from(exact_match(text, answers)))))
        .collect();
    let mean = |part: fn(&(f64, f64)) -> f64| {
        let mean = 100.0 * scores.iter().map(part).sum::<f64>() / scores.len() as f64;
        (mean * 10_000.0).round() / 10_000.0
    };
    Ok(json!({
        "rouge_l": mean(|s| s.0),
        "exact_match": mean(|s| s.1),
        "rows": scores.len(),
        "unscored_references": references.len() - scores.len(),
    }))
}

/// What is taken for a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Words {
    /// Runs of ASCII letters and digits, as the published scores have it. Of other scripts nothing is seen.
    #[default]
    Ascii,
    /// Words of any script, by the boundaries of Unicode (annex 29): of Chinese each character is one.
    Unicode,
}

/// Best ROUGE-L F1 over the references, 0 to 1, with stemming, as published: 0 where there is nothing to compare.
pub fn rouge_l(prediction: &str, references: &[String]) -> f64 {
    rouge_l_with(prediction, references, Stemming::Porter)
}

/// Best ROUGE-L F1 over the references, 0 to 1. None where no reference has a word: then nothing is measured.
pub fn rouge_l_by(prediction: &str, references: &[String], words: Words, stemming: Stemming) -> Option<f64> {
    let prediction = words.of(prediction, stemming);
    let references = references.iter().map(|reference| words.of(reference, stemming));
    references.filter(|reference| !reference.is_empty()).map(|reference| f1(&prediction, &reference)).reduce(f64::max)
}

/// Whether the prediction equals a reference but for white space at the ends.
pub fn strict_match(prediction: &str, references: &[String]) -> bool {
    references.iter().any(|reference| reference.trim() == prediction.trim())
}

/// Whether words are stemmed before they are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stemming {
    /// Words as they are.
    Off,
    /// Porter stems of words of more than three letters: the published scores.
    Porter,
}

/// [`rouge_l`] with a choice of stemming.
pub fn rouge_l_with(prediction: &str, references: &[String], stemming: Stemming) -> f64 {
    rouge_l_by(prediction, references, Words::Ascii, stemming).unwrap_or(0.0)
}

/// Whether the prediction equals a reference, but for case, ASCII punctuation and white space, as published: so `-2` is
/// taken for `2`, and `2.5` for `25`. [`strict_match`] is not misled.
pub fn exact_match(prediction: &str, references: &[String]) -> bool {
    let prediction = bare(prediction);
    references.iter().any(|reference| bare(reference) == prediction)
}

/// Generated text as the reference programs take it: up to a literal `<|endoftext|>`, `<n>` as a line break, trimmed.
pub fn clean(text: &str) -> String {
    let text = text.split("<|endoftext|>").next().unwrap_or_default();
    text.replace("<n>", "\n").trim().to_owned()
}

fn bare(text: &str) -> String {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Words {
    fn of(self, text: &str, stemming: Stemming) -> Vec<String> {
        let stem = |word: &str| match stemming {
            Stemming::Porter if word.len() > 3 && word.is_ascii() => porter::stem(word).into_owned(),
            _ => word.to_owned(),
        };
        let text = text.to_lowercase();
        match self {
            Words::Ascii => {
                let words = text.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
                words.filter(|word| !word.is_empty()).map(stem).collect()
            }
            Words::Unicode => text.unicode_words().map(stem).collect(),
        }
    }
}

/// F1 = 2PR / (P + R) with P = l / |prediction| and R = l / |reference|.
fn f1(prediction: &[String], reference: &[String]) -> f64 {
    let common = common_subsequence(prediction, reference) as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / prediction.len() as f64, common / reference.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Length of the longest common subsequence, a bit a word of `a`: 64 cells of the usual table in one operation
/// (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004).
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let blocks = a.len().div_ceil(64);
    let mut places: HashMap<&str, Vec<u64>> = HashMap::new();
    for (i, word) in a.iter().enumerate() {
        places.entry(word).or_insert_with(|| vec![0; blocks])[i / 64] |= 1 << (i % 64);
    }
    // A zero bit is a cell by which its row grows.
    let mut row = vec![u64::MAX; blocks];
    for word in b {
        let Some(matches) = places.get(word.as_str()) else { continue };
        let mut carry = false;
        for (block, matches) in row.iter_mut().zip(matches) {
            let hits = *block & matches;
            let (sum, over) = block.carrying_sum(hits, carry);
            carry = over;
            *block = sum | (*block & !matches);
        }
    }
    (0..a.len()).filter(|i| row[i / 64] >> (i % 64) & 1 == 0).count()
}

/// Addition over several words.
trait CarryingSum {
    fn carrying_sum(self, other: u64, carry: bool) -> (u64, bool);
}

impl CarryingSum for u64 {
    fn carrying_sum(self, other: u64, carry: bool) -> (u64, bool) {
        let (sum, first) = self.overflowing_add(other);
        let (sum, second) = sum.overflowing_add(u64::from(carry));
        (sum, first || second)
    }
}

fn answers(row: &Json) -> Option<Vec<String>> {
    match &row["output"] {
        Json::String(text) => Some(vec![text.clone()]),
        Json::Array(list) => list.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

fn read<T>(path: &Path, parse: impl Fn(&Json) -> Option<T>, expected: &str) -> Result<Vec<T>> {
    let records = jsonl::read(path)?;
    let parsed = records
        .iter()
        .map(|record| parse(&record.json).with_context(|| format!("`{}` has no {expected}", record.place)));
    parsed.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Scratch, shared_data};

    fn list(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| t.to_string()).collect()
    }

    #[derive(Deserialize)]
    struct Case {
        prediction: String,
        references: Vec<String>,
        rouge_l: f64,
        exact_match: bool,
    }

    #[test]
    fn scores_are_those_of_rouge_score_and_of_the_reference() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/parity/rouge/cases.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(cases.len() > 40);
        for Case { prediction, references, rouge_l: expected, exact_match: exact } in cases {
            let got = rouge_l(&prediction, &references);
            assert!((got - expected).abs() < 1e-12, "{prediction:?} {references:?}: expected {expected}, got {got}");
            assert_eq!(exact_match(&prediction, &references), exact, "{prediction:?} {references:?}");
        }
    }

    #[test]
    fn stemming_may_be_left_out() {
        let references = list(&["the dog barked"]);
        assert_eq!(rouge_l_with("the dogs barking", &references, Stemming::Off), 1.0 / 3.0);
        assert_eq!(rouge_l("the dogs barking", &references), 1.0);
        assert_eq!(rouge_l("anything", &[]), 0.0);
    }

    #[test]
    fn words_of_other_scripts_are_compared_when_asked_for() {
        let by = |words, prediction: &str, references: &[&str]| {
            rouge_l_by(prediction, &list(references), words, Stemming::Porter)
        };
        for (prediction, reference, score) in [
            ("水是冰", "水是冷", 2.0 / 3.0),
            ("кот спит", "кот ест", 0.5),
            ("Straße", "straße", 1.0),
            ("水", "火", 0.0),
        ] {
            let found = by(Words::Unicode, prediction, &[reference]).unwrap();
            assert!((found - score).abs() < 1e-12, "{prediction}: {found}");
        }
        assert_eq!(by(Words::Ascii, "水是冰", &["水是冷", "火"]), None);
        assert_eq!(by(Words::Ascii, "水", &["火 1"]), Some(0.0));
        assert_eq!(
            by(Words::Unicode, "dogs barking", &["the dog barked"]),
            by(Words::Ascii, "dogs barking", &["the dog barked"])
        );
        for nothing in [&[][..], &["", "?!"]] {
            assert_eq!(by(Words::Unicode, "text", nothing), None);
        }
    }

    #[test]
    fn a_strict_match_sees_signs_points_and_case() {
        for (prediction, reference, normalised, strict) in
            [("-2", "2", true, false), ("2.5", "25", true, false), ("a", "A", true, false), (" 2 ", "2\n", true, true)]
        {
            assert_eq!(exact_match(prediction, &list(&[reference])), normalised, "{prediction}");
            assert_eq!(strict_match(prediction, &list(&[reference])), strict, "{prediction}");
        }
    }

    #[test]
    fn generated_text_is_cleaned() {
        assert_eq!(clean(" one<n>two \n<|endoftext|> three"), "one\ntwo");
        assert_eq!(clean("<|endoftext|>"), "");
    }

    #[test]
    fn published_answers_get_their_published_score() {
        let Some(golden) = shared_data("golden") else { return };
        let predictions = golden.join("gpt2-base-answers.jsonl.gz");
        let scores = score(&predictions, &golden.join("dolly-dev-order.jsonl.gz")).unwrap();
        let expected = json!({"rouge_l": 6.1564, "exact_match": 0.0, "rows": 1000, "unscored_references": 0});
        assert_eq!(scores, expected);
    }

    #[test]
    fn lines_are_paired_and_what_does_not_fit_is_an_error() {
        let scratch = Scratch::new();
        let predictions = scratch.file("p.jsonl", "{\"text\": \"A cat.\"}\n{\"text\": \"no\"}\n");
        let references =
            scratch.file("r.jsonl", "{\"output\": [\"x\", \"a cat\"]}\n{\"output\": \"yes\"}\n{\"output\": \"z\"}\n");
        let scores = score(&predictions, &references).unwrap();
        let expected = json!({"rouge_l": 50.0, "exact_match": 50.0, "rows": 2, "unscored_references": 1});
        assert_eq!(scores, expected);
        let error =
            |predictions: &str| format!("{:#}", score(&scratch.file("p.jsonl", predictions), &references).unwrap_err());
        assert!(error(&"{\"text\": \"\"}\n".repeat(4)).contains("4 predictions"));
        assert!(error("").contains("no predictions"));
        assert!(error("{\"text\": 1}\n").contains("p.jsonl:1` has no `text`"));
        assert!(error("{\"text\": \"\"}\n{").contains("p.jsonl:2` is not JSON"));
    }

    /// The usual table, row by row.
    fn common_subsequence_by_table(a: &[String], b: &[String]) -> usize {
        let mut row = vec![0; b.len() + 1];
        for x in a {
            let mut diagonal = 0;
            for (j, y) in b.iter().enumerate() {
                let above = row[j + 1];
                row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
                diagonal = above;
            }
        }
        row[b.len()]
    }

    proptest! {
        #[test]
        fn bits_and_table_agree(a in "[abc]{0,200}", b in "[abcd]{0,200}") {
            let split = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
            let (a, b) = (split(&a), split(&b));
            prop_assert_eq!(common_subsequence(&a, &b), common_subsequence_by_table(&a, &b));
        }
    }
}
