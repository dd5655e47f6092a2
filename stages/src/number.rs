//! The final number of a worked answer, and whether it is right: the measure of GSM8K (Cobbe et al., 2021).
//!
//! `strict` and `flexible` are those of lm-evaluation-harness; the pattern of `strict` is that of grade-school-math. Numbers are
//! compared as numbers, so `18`, `18.00` and `$18.` are one; commas and `$` are dropped. A number in words is none. `flexible`
//! takes the last thing that reads as a number, where the harness takes the last match, be it `..`, which is never right. Like
//! the harness it takes any hyphen for a sign: the last number of `5-3` is -3.
//!
//! `published` has the four steps of the program for response priming. They see no signs: an answer of -3 gives 3, which is
//! not the right -3. Its first line is the first of the text given, which is without the prompt and trimmed. Of the published
//! program this is what was meant: there, the third step read text left over from an earlier row, depending on what happened
//! to stand before in the file, and what remained without a number was filled in by a person. Neither can be computed from an
//! answer.

use std::sync::LazyLock;

use contract::Extraction;
use regex::Regex;
use serde::Serialize;

/// A final number, and how it was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// The number, finite.
    pub value: f64,
    /// The rule that found it.
    pub rule: Rule,
}

/// How a number was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Behind `####`.
    Strict,
    /// The last number, with its sign.
    Flexible,
    /// Within `\boxed{}`.
    Boxed,
    /// The first line has no other number.
    FirstLine,
    /// Behind `the answer is`, `the final answer is` or `the correct answer is`.
    AnswerIs,
    /// The last number, without its sign.
    Last,
}

impl Rule {
    /// As it is written in rows and counts.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Strict => "strict",
            Rule::Flexible => "flexible",
            Rule::Boxed => "boxed",
            Rule::FirstLine => "first-line",
            Rule::AnswerIs => "answer-is",
            Rule::Last => "last",
        }
    }
}

/// The final number of an answer; `None` where it has none.
pub fn of(text: &str, extraction: Extraction) -> Option<Found> {
    match extraction {
        Extraction::Strict => strict(text),
        Extraction::Flexible => flexible(text),
        Extraction::Gsm8k => strict(text).or_else(|| flexible(text)),
        Extraction::Published => published(text),
    }
}

/// The numbers of right answers: that behind `####`, else the last one. Those without a number give none.
pub fn right(references: &[impl AsRef<str>]) -> Vec<f64> {
    references.iter().filter_map(|text| of(text.as_ref(), Extraction::Gsm8k)).map(|found| found.value).collect()
}

/// Whether a number, if any, is a right one; `None` where no right one is known.
pub fn correct(found: Option<f64>, right: &[f64]) -> Option<bool> {
    (!right.is_empty()).then(|| found.is_some_and(|value| right.contains(&value)))
}

/// The most frequent number; of several, that which comes first. `None` where there is none.
pub fn majority(votes: &[f64]) -> Option<f64> {
    let count = |value: f64| votes.iter().filter(|&&other| other == value).count();
    // Of equals, `max_by_key` keeps the last.
    votes.iter().copied().rev().max_by_key(|&value| count(value))
}

fn pattern(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a pattern of ours")
}

fn strict(text: &str) -> Option<Found> {
    static MARKED: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (-?[0-9.,]+)"));
    let value = read(&MARKED.captures(text)?[1])?;
    Some(Found { value, rule: Rule::Strict })
}

fn flexible(text: &str) -> Option<Found> {
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| pattern(r"-?[$0-9.,]{2,}|-?[0-9]+"));
    let value = NUMBER.find_iter(text).filter_map(|found| read(found.as_str())).last()?;
    Some(Found { value, rule: Rule::Flexible })
}

fn published(text: &str) -> Option<Found> {
    static BOXED: LazyLock<Regex> = LazyLock::new(|| pattern(r"\\boxed\{([0-9.,]+)\}"));
    static ANSWER_IS: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?i)the (?:(?:final|correct) )?answer is"));
    let boxed = || read(&BOXED.captures(text)?[1]);
    let first_line = || {
        let mut numbers = unsigned(text.lines().next()?);
        let first = numbers.next()?;
        numbers.all(|other| other == first).then_some(first)
    };
    let answer_is = || unsigned(&text[ANSWER_IS.find(text)?.end()..]).next();
    let found = |value, rule| Some(Found { value: value?, rule });
    found(boxed(), Rule::Boxed)
        .or_else(|| found(first_line(), Rule::FirstLine))
        .or_else(|| found(answer_is(), Rule::AnswerIs))
        .or_else(|| found(unsigned(text).last(), Rule::Last))
}

/// The numbers of a text without their signs.
fn unsigned(text: &str) -> impl Iterator<Item = f64> {
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| pattern(r"[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+"));
    NUMBER.find_iter(text).filter_map(|found| read(found.as_str()))
}

/// What is written with digits, points, commas and `$` as a number, where it is one. A sentence may end behind it.
fn read(written: &str) -> Option<f64> {
    let plain = written.replace([',', '$'], "");
    let value: f64 = plain.trim_end_matches('.').parse().ok()?;
    // Nothing tells -0 from 0 but how it is printed.
    value.is_finite().then_some(value + 0.0)
}

#[cfg(test)]
mod tests {
    use serde_json::Value as Json;

    use super::*;
    use crate::records;
    use crate::testing::shared_data;

    fn found(text: &str, extraction: Extraction) -> Option<(f64, &'static str)> {
        of(text, extraction).map(|found| (found.value, found.rule.name()))
    }

    #[test]
    fn the_number_behind_four_hashes_is_found() {
        for (text, value) in [
            ("so 9 * 2 = $<<9*2=18>>18\n#### 18", Some(18.0)),
            ("#### -3", Some(-3.0)),
            ("#### 1,234,567 and 5", Some(1_234_567.0)),
            ("#### 2.50.", Some(2.5)),
            ("#### 5\n\nQuestion 2\n#### 6", Some(5.0)),
            ("####18", None),
            ("#### $18", None),
            ("#### .", None),
            ("### 18", None),
            ("the answer is 18", None),
            ("#### eighteen", None),
            ("", None),
        ] {
            assert_eq!(found(text, Extraction::Strict), value.map(|value| (value, "strict")), "{text}");
        }
    }

    #[test]
    fn the_last_number_is_found_with_its_sign() {
        for (text, value) in [
            ("first 3, then 18", Some(18.0)),
            ("It is $1,234.50.", Some(1234.5)),
            ("-$7", Some(-7.0)),
            ("$-7", Some(-7.0)),
            ("-0", Some(0.0)),
            ("50%", Some(50.0)),
            ("it is 5...", Some(5.0)),
            ("it is 5 ... I think.,", Some(5.0)),
            ("section 7, 1.2.3", Some(7.0)),
            (".5", Some(0.5)),
            ("5-3", Some(-3.0)),
            ("1/2", Some(2.0)),
            ("x3y", Some(3.0)),
            ("水 4 ５", Some(4.0)),
            ("eighteen", None),
            ("$", None),
            ("...", None),
            ("", None),
        ] {
            assert_eq!(found(text, Extraction::Flexible), value.map(|value| (value, "flexible")), "{text}");
        }
        assert_eq!(found(&"9".repeat(400), Extraction::Flexible), None, "more than a number can hold");
    }

    #[test]
    fn by_default_what_is_marked_goes_before_what_is_last() {
        assert_eq!(found("#### 18\nor 5", Extraction::Gsm8k), Some((18.0, "strict")));
        assert_eq!(found("#### $18.", Extraction::Gsm8k), Some((18.0, "flexible")));
        assert_eq!(found("A: 18", Extraction::default()), Some((18.0, "flexible")));
        assert_eq!(found("none", Extraction::Gsm8k), None);
    }

    #[test]
    fn the_published_steps_come_one_after_another_and_see_no_sign() {
        for (text, expected) in [
            (r"5 and \boxed{1,234}, \boxed{7}", Some((1234.0, "boxed"))),
            (r"\boxed{18.}", Some((18.0, "boxed"))),
            // Neither sign nor currency is seen within a box.
            (r"\boxed{-18}", Some((18.0, "first-line"))),
            (r"3 of \boxed{$18}", Some((18.0, "last"))),
            ("18 = 18.0 = $18.00\nor 5", Some((18.0, "first-line"))),
            ("-18 it is.\nor 5", Some((18.0, "first-line"))),
            ("2 + 3 = 5\nThe answer is: -$1,005. Or 7. The final answer is 8.", Some((1005.0, "answer-is"))),
            ("Well.\nthe Correct answer is 5\nand 6", Some((5.0, "answer-is"))),
            ("2 + 3\nThe answer is unknown", Some((3.0, "last"))),
            ("Let us see.\n2 and then -.5%", Some((0.5, "last"))),
            ("two and three", None),
            ("", None),
        ] {
            assert_eq!(found(text, Extraction::Published), expected, "{text}");
        }
    }

    #[test]
    fn an_answer_is_right_when_its_number_is_one_of_the_right_ones() {
        let right_ones = right(&["so\n#### 1,000", "or 7.0", "who knows"]);
        assert_eq!(right_ones, [1000.0, 7.0]);
        assert_eq!(correct(Some(7.0), &right_ones), Some(true));
        assert_eq!(correct(Some(-7.0), &right_ones), Some(false));
        assert_eq!(correct(None, &right_ones), Some(false));
        assert_eq!(correct(Some(7.0), &right(&["who knows"])), None);
    }

    #[test]
    fn a_majority_is_the_most_frequent_and_of_equals_the_first() {
        assert_eq!(majority(&[1.0, 2.0, 2.0]), Some(2.0));
        assert_eq!(majority(&[3.0, 1.0, 2.0, 2.0, 1.0]), Some(1.0));
        assert_eq!(majority(&[3.0, 2.0]), Some(3.0));
        assert_eq!(majority(&[]), None);
    }

    #[test]
    fn published_flags_of_right_answers_are_ours() {
        let Some(path) = shared_data("gsm8k/example_model_solutions-first660.jsonl.gz") else { return };
        let (models, mut flags) =
            (["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"], [0; 4]);
        let mut rows = 0;
        records::read(&path, |record| {
            let text = |value: &Json| value.as_str().unwrap().to_owned();
            let right_ones = right(&[text(&record.fields["ground_truth"])]);
            for (model, flags) in models.iter().zip(&mut flags) {
                let (solution, flag) = (text(&record.fields[*model]["solution"]), &record.fields[*model]["is_correct"]);
                let number = of(&solution, Extraction::Gsm8k).map(|found| found.value);
                assert_eq!(correct(number, &right_ones), flag.as_bool(), "{}, {model}: {solution}", record.place);
                *flags += usize::from(flag == true);
            }
            rows += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!((rows, flags), (660, [146, 266, 225, 371]));
    }

    #[test]
    fn every_answer_of_the_data_has_a_marked_number() {
        let Some(folder) = shared_data("gsm8k") else { return };
        for (name, count) in [("train.jsonl.gz", 7473), ("test-first660.jsonl", 660)] {
            let mut rows = 0;
            records::read(&folder.join(name), |record| {
                let answer = record.fields["answer"].as_str().unwrap();
                let marked: f64 = answer.rsplit("#### ").next().unwrap().replace(',', "").parse().unwrap();
                assert_eq!(found(answer, Extraction::Gsm8k), Some((marked, "strict")), "{}", record.place);
                rows += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(rows, count);
        }
    }
}
