//! Arithmetic word problems of one to three steps, with numbers up to 20: the last number of an answer says whether it is right.
//!
//! A problem is answered in two ways, with a line for every step or with the number alone; both end in `#### 7`, as in GSM8K.
//! [`Manner`] is text that asks for one of them, for a teacher that is to be told how to answer.

use super::families::{Draw, Task};
use super::world::{NAMES, OBJECTS, plural};

/// Largest number that occurs.
const MOST: usize = 20;

/// How an answer is asked for.
#[derive(Clone, Copy)]
pub(super) enum Manner {
    /// Not at all: either answer will do.
    Open,
    /// With all steps.
    Steps,
    /// Without.
    Short,
}

impl Manner {
    pub(super) const ALL: [Manner; 3] = [Manner::Open, Manner::Steps, Manner::Short];

    /// What stands before a problem.
    pub(super) fn before(self) -> &'static str {
        match self {
            Manner::Open => "",
            Manner::Steps => "Explain every step. ",
            Manner::Short => "Say only the result. ",
        }
    }

    /// The one that is asked for, of the answers of a problem.
    pub(super) fn pick<'a>(self, draw: &mut Draw, answers: &'a [String]) -> &'a String {
        match self {
            Manner::Open => draw.pick(answers),
            Manner::Steps => &answers[0],
            Manner::Short => &answers[1],
        }
    }
}

/// What happens to a number of things.
enum Step {
    Add(usize),
    Subtract(usize),
    Double,
}

impl Step {
    /// One that leaves a number from 1 to [`MOST`].
    fn draw(draw: &mut Draw, have: usize) -> Self {
        let room = MOST - have;
        match draw.below(5) {
            0 | 1 if room > 0 => Step::Add(1 + draw.below(room.min(9))),
            2 if have <= room => Step::Double,
            _ if have > 1 => Step::Subtract(1 + draw.below((have - 1).min(9))),
            _ => Step::Add(1 + draw.below(room.min(9))),
        }
    }

    fn of(&self, have: usize) -> usize {
        match self {
            Step::Add(number) => have + number,
            Step::Subtract(number) => have - number,
            Step::Double => 2 * have,
        }
    }

    /// As it is worked out.
    fn worked(&self, have: usize) -> String {
        let result = self.of(have);
        match self {
            Step::Add(number) => format!("{have} + {number} = {result}."),
            Step::Subtract(number) => format!("{have} - {number} = {result}."),
            Step::Double => format!("{have} + {have} = {result}."),
        }
    }

    /// As it is told.
    fn told(&self, draw: &mut Draw, name: &str, other: &str) -> String {
        let ways = match self {
            Step::Add(number) => vec![
                format!("{name} buys {number} more."),
                format!("{name} finds {number} more."),
                format!("{other} gives {name} {number} more."),
            ],
            Step::Subtract(number) => vec![
                format!("{name} loses {number} of them."),
                format!("{name} sells {number} of them."),
                format!("{name} gives {number} of them to {other}."),
            ],
            Step::Double => vec![format!("{name} gets as many again."), "Then their number doubles.".to_owned()],
        };
        draw.pick(&ways).clone()
    }
}

/// Draws a problem: the name of its family, and the problem with the answer that shows all steps before the short one.
pub(super) fn task(draw: &mut Draw) -> (&'static str, Task) {
    let count = draw.below(3);
    let ((name, other), thing) = (draw.two(&NAMES), *draw.pick(&OBJECTS));
    let things = plural(thing);
    let start = 2 + draw.below(11);
    let (mut have, mut key, mut told, mut worked) = (start, start.to_string(), String::new(), String::new());
    for _ in 0..=count {
        let step = Step::draw(draw, have);
        let line = step.worked(have);
        key += &format!(" {line}");
        worked += &format!("{line} ");
        told += &format!("{} ", step.told(draw, name, other));
        have = step.of(have);
    }
    let wordings = [
        format!("{name} has {start} {things}. {told}How many {things} does {name} have now?"),
        format!("{name} has {start} {things}. {told}How many are there in the end?"),
    ];
    let answers = [format!("{worked}#### {have}"), format!("#### {have}")];
    (["one step", "two steps", "three steps"][count], Task { key, wordings: wordings.into(), answers: answers.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a line such as `7 + 5 = 12.` says, if it is right.
    fn checked(line: &str) -> Option<i64> {
        let (sum, result) = line.split_once(" = ")?;
        let words: Vec<&str> = sum.split(' ').collect();
        let (a, b): (i64, i64) = (words[0].parse().ok()?, words[2].parse().ok()?);
        let found = if words[1] == "+" { a + b } else { a - b };
        (result.parse() == Ok(found)).then_some(found)
    }

    #[test]
    fn every_step_of_every_answer_is_right_and_leads_to_the_next() {
        let mut counts = [0; 3];
        for row in 0..3000 {
            let (family, task) = task(&mut Draw::new(1, row));
            let [worked, short] = task.answers.as_slice() else { panic!("two answers") };
            let (lines, result) = worked.split_once("#### ").unwrap();
            let lines: Vec<&str> = lines.split_terminator(". ").collect();
            counts[lines.len() - 1] += 1;
            assert_eq!(family, ["one step", "two steps", "three steps"][lines.len() - 1]);
            let mut have: i64 = task.key.split(' ').next().unwrap().parse().unwrap();
            for line in &lines {
                assert_eq!(line.split(' ').next().unwrap().parse(), Ok(have), "{worked}");
                have = checked(line).unwrap_or_else(|| panic!("{worked}"));
                assert!((1..=MOST as i64).contains(&have), "{worked}");
            }
            assert_eq!((result.parse(), short), (Ok(have), &format!("#### {have}")), "{worked}");
            for wording in &task.wordings {
                assert!(wording.ends_with('?') && !wording.contains("  "), "{wording}");
            }
        }
        assert!(counts.iter().all(|count| *count > 900), "{counts:?}");
    }
}
