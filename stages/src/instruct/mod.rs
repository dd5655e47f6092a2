//! The built-in corpus: instructions about a small world, with every right phrasing of each answer.
//!
//! It is made by the program from its own tables and templates, so a pipeline runs without network or account. Thirteen
//! families of tasks ask a model to copy, to recall, to change and to order; some answers can be found in the prompt, for
//! others a fact must be known. A row's target is one phrasing, drawn; all are kept as references.
//!
//! Splits are disjoint by content: a task's facts, not its wording, decide by a hash whether it is for training (78 %),
//! validation (7 %) or test (15 %), whatever the seed. So no test task is seen in training in other words. A fact that
//! only a test task of one family asks for is mostly told in training by another family.

use std::collections::HashSet;

use contract::random::{philox, purpose, uniform};

use crate::corpus::{CorpusRow, Split};

mod families;
mod world;

pub use world::{JOBS, Job, article};

use families::Draw;

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

/// Makes the corpus: train, valid, test. Row `i` of a split is the same whatever the sizes.
///
/// Training rows may repeat a prompt, with the same or another phrasing as target; prompts to validate or test on are
/// distinct. Every split has tasks of all families and hundreds of thousands of distinct prompts.
pub fn generate(seed: u64, sizes: &Sizes) -> [Vec<CorpusRow>; 3] {
    let mut splits = Split::ALL.map(|split| Vec::with_capacity(sizes.of(split)));
    let mut prompts = HashSet::new();
    for number in 0.. {
        if Split::ALL.iter().all(|&split| splits[split as usize].len() >= sizes.of(split)) {
            break;
        }
        let mut draw = Draw::new(seed, number);
        let family = draw.family();
        let task = (family.task)(&mut draw);
        let split = split_of(family.name, &task.key);
        let rows: &mut Vec<CorpusRow> = &mut splits[split as usize];
        let instruction = draw.pick(&task.wordings).clone();
        let output = draw.pick(&task.answers).clone();
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
            family: Some(family.name.to_owned()),
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
        let splits = generate(0, &SIZES);
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
        let text = serde_json::to_string(&generate(0, &SIZES)).unwrap();
        assert_eq!(format!("{:016x}", hash(text.bytes())), "266d7cbbe64cbacf");
    }

    #[test]
    fn no_prompt_of_one_split_is_in_another_whatever_the_seed() {
        let [train, valid, test] = generate(0, &SIZES);
        let [other_train, ..] = generate(1, &SIZES);
        let seen: HashSet<&str> = train.iter().chain(&other_train).map(|row| row.instruction.as_str()).collect();
        let held_out: HashSet<&str> = valid.iter().chain(&test).map(|row| row.instruction.as_str()).collect();
        assert_eq!(held_out.len(), 600);
        assert!(held_out.is_disjoint(&seen));
        assert_ne!(train[..50], other_train[..50]);
    }

    #[test]
    fn a_smaller_corpus_is_the_beginning_of_a_larger_one() {
        let [train, valid, test] = generate(3, &Sizes { train: 500, valid: 20, test: 40 });
        let [all_train, all_valid, all_test] = generate(3, &Sizes { train: 900, valid: 90, test: 90 });
        assert_eq!(train[..], all_train[..500]);
        assert_eq!(valid[..], all_valid[..20]);
        assert_eq!(test[..], all_test[..40]);
    }
}
