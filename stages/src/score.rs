//! Scores of generated text against right answers: ROUGE-L and exact match, as the reference programs compute them, and
//! how often the final number is right ([`crate::number`]).
//!
//! ROUGE-L (Lin, 2004) is the F1 of the longest common subsequence of words. Words are runs of ASCII letters and digits
//! after lower-casing, so an accented letter separates; those of more than three letters are stemmed ([`crate::porter`]).
//! With several right answers the best one counts. No sentence is split. [`Words::Unicode`] is for other scripts, of which
//! the published tokeniser sees nothing. Where no right answer has a word there is nothing to compare: that is not measured, which
//! is not 0.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Result, bail, ensure};
use contract::Scoring;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use unicode_normalization::UnicodeNormalization;
use unicode_segmentation::UnicodeSegmentation;

use crate::records::{self, Record};
use crate::{columns, number, porter};

/// Scores rows of `predictions` (`text`, and `id` where there is one) against rows of `references` (`output`, a text or a
/// list of right answers, and `id`). Both files may have any form that a corpus may have.
///
/// Rows are paired by `id` where every row of both files has one, else line by line; `paired_by` says which. Both sides are
/// cleaned alike ([`clean`]).
///
/// Gives `rouge_l`, `exact_match`, `strict_match` and `accuracy`, means in percent rounded to 4 decimals; `rows`, the pairs;
/// `not_measured`, pairs without a word to compare, which `rouge_l` leaves out (null where it is all of them);
/// `without_number`, pairs whose right answers have no number, which `accuracy` leaves out in the same way; `rules`, how many of
/// the other predictions have their number by which rule, `none` of those that have none; `unscored_references` and
/// `unscored_predictions`, those without a partner. By line, more predictions than references are an error.
pub fn score(files: &Scoring) -> Result<Json> {
    let Scoring { predictions, references, by_line, unicode, extraction } = files;
    let words = if *unicode { Words::Unicode } else { Words::Ascii };
    let guesses = read(predictions, |record| Ok(clean(&columns::text_in(record, "text")?)))?;
    let answers = read(references, |record| Ok(columns::answers(record)?.iter().map(|text| clean(text)).collect()))?;
    ensure!(!guesses.is_empty(), "there are no predictions to score");
    let by_id = !by_line && guesses.iter().all(has_id) && answers.iter().all(has_id) && !answers.is_empty();
    let pairs = if by_id {
        pair_by_id(&guesses, &answers, predictions, references)?
    } else {
        ensure!(
            guesses.len() <= answers.len(),
            "{} predictions, but `{}` has only {} lines",
            guesses.len(),
            references.display(),
            answers.len()
        );
        guesses.iter().zip(&answers).collect()
    };
    let unscored_predictions = guesses.len() - pairs.len();
    let unscored_references = if by_id {
        let scored: std::collections::HashSet<_> = pairs.iter().map(|(_, answer)| &answer.id).collect();
        answers.len() - scored.len()
    } else {
        answers.len() - pairs.len()
    };
    let scores: Vec<Scores> = pairs
        .par_iter()
        .map(|(guess, answer)| {
            let (text, answers) = (&guess.value, &answer.value);
            let found = number::of(text, *extraction);
            Scores {
                rouge_l: rouge_l_by(text, answers, words, Stemming::Porter),
                exact_match: exact_match(text, answers),
                strict_match: strict_match(text, answers),
                correct: number::correct(found.map(|found| found.value), &number::right(answers)),
                rule: found.map_or("none", |found| found.rule.name()),
            }
        })
        .collect();
    let percent = |sum: f64, rows: usize| (100.0 * sum / rows as f64 * 10_000.0).round() / 10_000.0;
    let mean = |values: &[f64]| (!values.is_empty()).then(|| percent(values.iter().sum(), values.len()));
    let share = |holds: fn(&Scores) -> bool| percent(scores.iter().filter(|it| holds(it)).count() as f64, scores.len());
    let measured: Vec<f64> = scores.iter().filter_map(|score| score.rouge_l).collect();
    let correct: Vec<f64> = scores.iter().filter_map(|score| score.correct).map(|it| f64::from(u8::from(it))).collect();
    let mut rules: BTreeMap<&str, usize> = BTreeMap::new();
    for score in scores.iter().filter(|score| score.correct.is_some()) {
        *rules.entry(score.rule).or_default() += 1;
    }
    Ok(json!({
        "rouge_l": mean(&measured),
        "exact_match": share(|score| score.exact_match),
        "strict_match": share(|score| score.strict_match),
        "accuracy": mean(&correct),
        "rows": scores.len(),
        "not_measured": scores.len() - measured.len(),
        "without_number": scores.len() - correct.len(),
        "rules": rules,
        "paired_by": if by_id { "id" } else { "line" },
        "unscored_references": unscored_references,
        "unscored_predictions": unscored_predictions,
    }))
}

/// Scores of one pair; `None` where there is nothing to compare.
struct Scores {
    rouge_l: Option<f64>,
    exact_match: bool,
    strict_match: bool,
    /// Whether the final number is right.
    correct: Option<bool>,
    /// How it was found.
    rule: &'static str,
}

/// What a file says of one row.
struct Row<T> {
    /// A number or a text, as text.
    id: Option<String>,
    value: T,
    place: String,
}

fn has_id<T>(row: &Row<T>) -> bool {
    row.id.is_some()
}

fn read<T>(path: &Path, parse: impl Fn(&Record) -> Result<T>) -> Result<Vec<Row<T>>> {
    let mut rows = Vec::new();
    records::read(path, |record| {
        let value = parse(&record)?;
        let id = record.fields.get("id").and_then(columns::text);
        rows.push(Row { id, value, place: record.place });
        Ok(())
    })?;
    Ok(rows)
}

/// A prediction and its right answers.
type Pair<'a> = (&'a Row<String>, &'a Row<Vec<String>>);

/// Each prediction that has a reference, with it. Several predictions may have the same: one for each seed.
fn pair_by_id<'a>(
    guesses: &'a [Row<String>],
    answers: &'a [Row<Vec<String>>],
    predictions: &Path,
    references: &Path,
) -> Result<Vec<Pair<'a>>> {
    let mut known: BTreeMap<&Option<String>, &Row<Vec<String>>> = BTreeMap::new();
    for answer in answers {
        if let Some(first) = known.insert(&answer.id, answer) {
            bail!("`{}` and `{}` have the same `id`; pair the files line by line", first.place, answer.place);
        }
    }
    let pairs: Vec<_> = guesses.iter().filter_map(|guess| Some((guess, *known.get(&guess.id)?))).collect();
    ensure!(
        !pairs.is_empty(),
        "no `id` of `{}` is one of `{}`; if they are not meant to be, pair the files line by line",
        predictions.display(),
        references.display()
    );
    Ok(pairs)
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

/// Text as the reference programs take what was generated: up to a literal `<|endoftext|>`, `<n>` as a line break, trimmed.
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
            Words::Unicode => text.nfc().collect::<String>().unicode_words().map(stem).collect(),
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

#[cfg(test)]
mod tests {
    use contract::Extraction;
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
        let references = golden.join("dolly-dev-order.jsonl.gz");
        let scores = score(&Scoring { predictions, references, ..Scoring::default() }).unwrap();
        assert_eq!((&scores["rouge_l"], &scores["exact_match"]), (&json!(6.1564), &json!(0.0)));
        let counts = ["rows", "not_measured", "unscored_references", "unscored_predictions"].map(|name| &scores[name]);
        assert_eq!(counts, [1000, 0, 0, 0]);
    }

    /// Scores of files with these contents.
    fn scored(predictions: &str, references: &str, how: Scoring) -> Result<Json> {
        let scratch = Scratch::new();
        let (predictions, references) = (scratch.file("p.jsonl", predictions), scratch.file("r.jsonl", references));
        score(&Scoring { predictions, references, ..how })
    }

    #[test]
    fn lines_are_paired_and_what_does_not_fit_is_an_error() {
        let references = "{\"output\": [\"x\", \"a cat\"]}\n{\"output\": \"yes\"}\n{\"output\": \"z\"}\n";
        let scores = scored("{\"text\": \"A cat.\"}\n{\"text\": \"no\"}\n", references, Scoring::default()).unwrap();
        let expected = json!({
            "rouge_l": 50.0, "exact_match": 50.0, "strict_match": 0.0, "accuracy": null, "rows": 2, "not_measured": 0,
            "without_number": 2, "rules": {},
            "paired_by": "line", "unscored_references": 1, "unscored_predictions": 0,
        });
        assert_eq!(scores, expected);
        let error =
            |predictions: &str| format!("{:#}", scored(predictions, references, Scoring::default()).unwrap_err());
        assert!(error(&"{\"text\": \"\"}\n".repeat(4)).contains("4 predictions"));
        assert!(error("").contains("no predictions"));
        assert!(error("{\"text\": 1.5}\n").contains("p.jsonl:1`: expected text in `text`, got 1.5"));
        assert!(error("{\"txt\": \"\"}\n").contains("p.jsonl:1` has no `text`, only `txt`"));
        let two = error("{\"text\": \"\"}\n{\n{\"a\": 1}");
        assert!(two.contains("p.jsonl:2` is not JSON") && two.contains("p.jsonl:3` has no `text`"), "{two}");
    }

    #[test]
    fn rows_are_paired_by_id_where_all_have_one() {
        let references =
            "{\"id\": 1, \"output\": \"a\"}\n{\"id\": \"2\", \"output\": \"b\"}\n{\"id\": 3, \"output\": \"c\"}\n";
        let guess = |id: &str, text: &str| format!("{{\"id\": {id}, \"text\": \"{text}\"}}\n");
        let counts = |scores: &Json| {
            ["rows", "unscored_references", "unscored_predictions"].map(|name| scores[name].as_u64().unwrap())
        };
        let mixed = [guess("3", "c"), guess("2", "b"), guess("2", "b"), guess("9", "x")].concat();
        let scores = scored(&mixed, references, Scoring::default()).unwrap();
        assert_eq!((scores["strict_match"].as_f64(), &scores["paired_by"]), (Some(100.0), &json!("id")));
        assert_eq!(counts(&scores), [3, 1, 1]);

        let by_line = Scoring { by_line: true, ..Scoring::default() };
        let scores = scored(&[guess("3", "a"), guess("2", "b")].concat(), references, by_line).unwrap();
        assert_eq!((scores["strict_match"].as_f64(), counts(&scores)), (Some(100.0), [2, 1, 0]));
        let scores = scored(&(guess("3", "a") + "{\"text\": \"b\"}"), references, Scoring::default()).unwrap();
        assert_eq!((scores["strict_match"].as_f64(), &scores["paired_by"]), (Some(100.0), &json!("line")));

        let error = scored(&guess("7", "a"), references, Scoring::default()).unwrap_err().to_string();
        assert!(error.contains("no `id` of `") && error.contains("line by line"), "{error}");
        let twice = references.replace('3', "1");
        let error = scored(&guess("1", "a"), &twice, Scoring::default()).unwrap_err().to_string();
        assert!(error.contains("r.jsonl:1` and `") && error.contains("have the same `id`"), "{error}");
    }

    #[test]
    fn what_cannot_be_compared_is_not_measured() {
        let line = |name: &str, text: &str| format!("{}\n", json!({name: text}));
        let (guesses, answers) = (line("text", "猫坐在垫子上"), line("output", "猫在垫子上"));
        let scores = scored(&guesses, &answers, Scoring::default()).unwrap();
        assert_eq!((&scores["rouge_l"], &scores["not_measured"]), (&Json::Null, &json!(1)));
        let both = scored(
            &(guesses.clone() + &line("text", "a")),
            &(answers.clone() + &line("output", "a")),
            Scoring::default(),
        );
        let both = both.unwrap();
        assert_eq!((both["rouge_l"].as_f64(), &both["not_measured"]), (Some(100.0), &json!(1)));
        let unicode = Scoring { unicode: true, ..Scoring::default() };
        let scores = scored(&guesses, &answers, unicode).unwrap();
        assert_eq!((scores["rouge_l"].as_f64(), &scores["not_measured"]), (Some(90.9091), &json!(0)));
        assert_eq!(
            rouge_l_by("", &list(&["a"]), Words::Ascii, Stemming::Porter),
            Some(0.0),
            "an empty answer is wrong"
        );
        assert_eq!(rouge_l_by("a", &list(&["?", "a"]), Words::Ascii, Stemming::Porter), Some(1.0));
    }

    #[test]
    fn the_share_of_right_final_numbers_and_how_they_were_found() {
        let lines = |name: &str, texts: &[&str]| -> String {
            texts.iter().map(|text| format!("{}\n", json!({name: text}))).collect()
        };
        let guesses = lines("text", &["2 + 3 = 5<n>#### 5", "so it is 1,000.\nNo: 7", "who knows", "5"]);
        let answers = lines("output", &["#### 5", "#### 1000", "#### 3", "none"]);
        let scores = |extraction| {
            let scores = scored(&guesses, &answers, Scoring { extraction, ..Scoring::default() }).unwrap();
            assert_eq!(scores["without_number"], 1);
            (scores["accuracy"].as_f64().unwrap(), scores["rules"].clone())
        };
        assert_eq!(scores(Extraction::Gsm8k), (33.3333, json!({"flexible": 1, "none": 1, "strict": 1})));
        assert_eq!(scores(Extraction::Strict), (33.3333, json!({"none": 2, "strict": 1})));
        assert_eq!(scores(Extraction::Flexible), (33.3333, json!({"flexible": 2, "none": 1})));
        assert_eq!(scores(Extraction::Published), (66.6667, json!({"first-line": 1, "last": 1, "none": 1})));
    }

    #[test]
    fn words_of_any_script_are_those_of_unicode() {
        let words = |text: &str| Words::Unicode.of(text, Stemming::Porter).join("|");
        assert_eq!(words("Größe, naïve barked!"), "größe|naïve|bark");
        assert_eq!(words("E\u{301}te\u{301}"), words("Été"));
        assert_eq!(words("猫在2垫"), "猫|在|2|垫");
        assert_eq!(words("Привет, мир — да"), "привет|мир|да");
        assert_eq!(words("…?!"), "");
    }

    proptest! {
        #[test]
        fn a_text_matches_itself_whatever_is_in_it(text in "([a-z .]|<n>|<\\|endoftext\\|>|\\PC|\n){0,20}") {
            let scores = scored(
                &json!({"text": text}).to_string(), &json!({"output": text}).to_string(), Scoring::default(),
            ).unwrap();
            prop_assert_eq!((&scores["strict_match"], &scores["exact_match"]), (&json!(100.0), &json!(100.0)));
            prop_assert!(scores["rouge_l"].is_null() || scores["rouge_l"] == 100.0, "{}", scores);
        }

        #[test]
        fn both_kinds_of_words_agree_on_plain_text(a in "[a-z]{1,8}( [a-z]{1,8}){0,9}", b in "[a-z]{1,8}( [a-z]{1,8}){0,9}") {
            let references = [b];
            let by = |words| rouge_l_by(&a, &references, words, Stemming::Porter);
            prop_assert_eq!(by(Words::Ascii), by(Words::Unicode));
        }
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
