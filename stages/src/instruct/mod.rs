//! The built-in corpus: instructions about a small world, with every right phrasing of each answer.
//!
//! It is made by the program from its own tables and templates, so a pipeline runs without network or account. Thirteen
//! families of tasks ask a model to copy, to recall, to change and to order; some answers can be found in the prompt, for
//! others a fact must be known. A row's target is one phrasing, drawn; all are kept as references.
//!
//! Splits are disjoint by content: a task's facts, not its wording, decide by a hash whether it is for training (78 %),
//! validation (7 %) or test (15 %), whatever the seed. So no test task is seen in training in other words. A fact that
//! only a test task of one family asks for is mostly told in training by another family.
//!
//! A second corpus, of arithmetic word problems, is made in the same way ([`arithmetic`]): with or without text before training
//! problems that says how to answer.

use std::collections::HashSet;

use contract::random::{philox, purpose, uniform};

use crate::corpus::{CorpusRow, Split};

mod arithmetic;
mod families;
mod world;

pub use world::{JOBS, Job, article};

use arithmetic::Manner;
use families::{Draw, Task};

/// How many rows of each split to make.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// To learn from.
    pub train: usize,
    /// To choose by. A few hundred; see [`generate`].
    pub valid: usize,
    /// To report on. A few hundred; see [`generate`].
    pub test: usize,
}

impl Sizes {
    /// Rows of one split.
    pub fn of(&self, split: Split) -> usize {
        match split {
            Split::Train => self.train,
            Split::Valid => self.valid,
            Split::Test => self.test,
        }
    }
}

/// A built-in corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// Instructions about a small world.
    Instruct,
    /// Word problems, to be answered with all steps.
    Arithmetic,
    /// Word problems, of which a third of the training rows asks for all steps, a third for the result alone, and a third says
    /// nothing and is answered in either way.
    ArithmeticTold,
}

impl Builtin {
    /// All of them.
    pub const ALL: [Builtin; 3] = [Builtin::Instruct, Builtin::Arithmetic, Builtin::ArithmeticTold];

    /// As a pipeline names it.
    pub fn name(self) -> &'static str {
        match self {
            Builtin::Instruct => "builtin:instruct",
            Builtin::Arithmetic => "builtin:arithmetic",
            Builtin::ArithmeticTold => "builtin:arithmetic-told",
        }
    }

    fn task(self, draw: &mut Draw) -> (&'static str, Task) {
        match self {
            Builtin::Instruct => {
                let family = draw.family();
                (family.name, (family.task)(draw))
            }
            Builtin::Arithmetic | Builtin::ArithmeticTold => arithmetic::task(draw),
        }
    }

    /// A way to ask, and the answer to it.
    fn phrased(self, draw: &mut Draw, task: &Task, split: Split) -> (String, String) {
        let manner = match self {
            Builtin::Instruct => Manner::Open,
            Builtin::ArithmeticTold if split == Split::Train => *draw.pick(&Manner::ALL),
            Builtin::Arithmetic | Builtin::ArithmeticTold => {
                return (draw.pick(&task.wordings).clone(), task.answers[0].clone());
            }
        };
        let wording = draw.pick(&task.wordings).clone();
        (format!("{}{wording}", manner.before()), manner.pick(draw, &task.answers).clone())
    }
}

/// Makes a corpus: train, valid, test. Row `i` of a split is the same whatever the sizes.
///
/// Training rows may repeat a prompt, with the same or another phrasing as target; prompts to validate or test on are
/// distinct. Every split has tasks of all families and hundreds of thousands of distinct prompts.
pub fn generate(corpus: Builtin, seed: u64, sizes: &Sizes) -> [Vec<CorpusRow>; 3] {
    let mut splits = Split::ALL.map(|split| Vec::with_capacity(sizes.of(split)));
    let mut prompts = HashSet::new();
    for number in 0.. {
        if Split::ALL.iter().all(|&split| splits[split as usize].len() >= sizes.of(split)) {
            break;
        }
        let mut draw = Draw::new(seed, number);
        let (family, task) = corpus.task(&mut draw);
        let split = split_of(family, &task.key);
        let rows: &mut Vec<CorpusRow> = &mut splits[split as usize];
        let (instruction, output) = corpus.phrased(&mut draw, &task, split);
        if rows.len() >= sizes.of(split) || (split != Split::Train && !prompts.insert(instruction.clone())) {
            continue;
        }
        rows.push(CorpusRow {
            id: split.row_id(rows.len()),
            instruction,
            input: String::new(),
            prompt: None,
            turns: Vec::new(),
            output,
            references: task.answers,
            family: Some(family.to_owned()),
        });
    }
    splits
}

/// The split of a task, from a hash of what it is about.
fn split_of(family: &str, key: &str) -> Split {
    let hash = hash(family.bytes().chain([0]).chain(key.bytes()));
    match uniform(philox(hash, [0, 0, 0, purpose::CORPUS])[0]) {
        share if share < 0.15 => Split::Test,
        share if share < 0.22 => Split::Valid,
        _ => Split::Train,
    }
}

/// FNV-1a, 64 bits.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const SIZES: Sizes = Sizes { train: 8000, valid: 200, test: 400 };

    #[test]
    fn sizes_ids_and_families_are_as_asked() {
        let splits = generate(Builtin::Instruct, 0, &SIZES);
        assert_eq!(splits.each_ref().map(Vec::len), [8000, 200, 400]);
        for (split, rows) in Split::ALL.into_iter().zip(&splits) {
            let mut families: HashMap<&str, usize> = HashMap::new();
            for (index, row) in rows.iter().enumerate() {
                assert_eq!(row.id, split.row_id(index));
                assert!(row.references.contains(&row.output));
                *families.entry(row.family.as_deref().unwrap()).or_default() += 1;
            }
            assert_eq!(families.len(), 13, "{split:?}: {families:?}");
        }
    }

    /// Whoever changes the corpus gives `download` a new version: cached corpora are then made again.
    #[test]
    fn the_corpus_is_the_one_that_this_version_of_download_makes() {
        let text = serde_json::to_string(&generate(Builtin::Instruct, 0, &SIZES)).unwrap();
        assert_eq!(format!("{:016x}", hash(text.bytes())), "266d7cbbe64cbacf");
    }

    /// The same of the word problems.
    #[test]
    fn word_problems_are_those_that_this_version_of_download_makes() {
        for (corpus, expected) in
            [(Builtin::Arithmetic, "d90c11cf93ba194a"), (Builtin::ArithmeticTold, "b040c949b8c119eb")]
        {
            let text = serde_json::to_string(&generate(corpus, 0, &SIZES)).unwrap();
            assert_eq!(format!("{:016x}", hash(text.bytes())), expected, "{corpus:?}");
        }
    }

    #[test]
    fn word_problems_say_how_to_answer_in_training_alone_and_share_no_problem_between_splits() {
        let [train, valid, test] = generate(Builtin::ArithmeticTold, 0, &SIZES);
        let asked =
            |rows: &[CorpusRow], before: &str| rows.iter().filter(|row| row.instruction.starts_with(before)).count();
        for (before, steps) in [("Explain every step. ", true), ("Say only the result. ", false)] {
            assert!((2300..3100).contains(&asked(&train, before)), "{before}");
            assert_eq!(asked(&valid, before) + asked(&test, before), 0);
            let told = train.iter().filter(|row| row.instruction.starts_with(before));
            assert!(told.into_iter().all(|row| row.output.contains(" = ") == steps), "{before}");
        }
        assert!(test.iter().all(|row| row.output.contains(" = ")));
        // By what is worked out.
        let worked = |rows: &[CorpusRow]| rows.iter().map(|row| row.references[0].clone()).collect::<HashSet<_>>();
        assert!(worked(&train).is_disjoint(&worked(&test)) && worked(&train).is_disjoint(&worked(&valid)));
    }

    #[test]
    fn no_prompt_of_one_split_is_in_another_whatever_the_seed() {
        let [train, valid, test] = generate(Builtin::Instruct, 0, &SIZES);
        let [other_train, ..] = generate(Builtin::Instruct, 1, &SIZES);
        let seen: HashSet<&str> = train.iter().chain(&other_train).map(|row| row.instruction.as_str()).collect();
        let held_out: HashSet<&str> = valid.iter().chain(&test).map(|row| row.instruction.as_str()).collect();
        assert_eq!(held_out.len(), 600);
        assert!(held_out.is_disjoint(&seen));
        assert_ne!(train[..50], other_train[..50]);
    }

    #[test]
    fn a_smaller_corpus_is_the_beginning_of_a_larger_one() {
        let [train, valid, test] = generate(Builtin::Instruct, 3, &Sizes { train: 500, valid: 20, test: 40 });
        let [all_train, all_valid, all_test] =
            generate(Builtin::Instruct, 3, &Sizes { train: 900, valid: 90, test: 90 });
        assert_eq!(train[..], all_train[..500]);
        assert_eq!(valid[..], all_valid[..20]);
        assert_eq!(test[..], all_test[..40]);
    }
}
