//! A batch of sequences laid end to end, without padding.
//!
//! Everything but attention works row by row, so a batch of `B` sequences is simply its `N` rows; attention alone looks at
//! where each sequence begins and ends.

use std::ops::Range;

/// One vector of an embedding: what stands at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// A token id.
    Token(u32),
    /// A vector of the soft prompt.
    Prompt(u32),
}

/// Sequences laid end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// What stands in each of the `N` rows.
    pub inputs: Vec<Input>,
    /// Position of each row in its sequence, from 0.
    pub positions: Vec<u32>,
    /// Where each sequence lies in `inputs`.
    pub segments: Vec<Range<usize>>,
    /// Row id of each sequence: what its dropout is keyed by.
    pub rows: Vec<u64>,
    /// Which rows' hidden states are wanted, in ascending order; `None` for all of them. Never those of a soft prompt.
    pub wanted: Option<Vec<u32>>,
}

impl Packed {
    /// A batch without sequences; [`Packed::push`] adds them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a sequence behind the others. An empty one is kept as an empty segment.
    pub fn push(&mut self, row_id: u64, ids: &[u32]) {
        self.extend(row_id, ids.iter().map(|id| Input::Token(*id)));
    }

    fn extend(&mut self, row_id: u64, inputs: impl Iterator<Item = Input>) {
        let start = self.inputs.len();
        self.inputs.extend(inputs);
        self.positions.extend(0..(self.inputs.len() - start) as u32);
        self.segments.push(start..self.inputs.len());
        self.rows.push(row_id);
    }

    /// The batch with the `length` vectors of a soft prompt before each of its sequences.
    pub(crate) fn behind_prompt(&self, length: usize) -> Self {
        let mut all = Packed::new();
        let mut text = Vec::with_capacity(self.inputs.len());
        for (segment, row) in self.segments.iter().zip(&self.rows) {
            let start = all.inputs.len() + length;
            text.extend((start..start + segment.len()).map(|place| place as u32));
            let prompt = (0..length as u32).map(Input::Prompt);
            all.extend(*row, prompt.chain(self.inputs[segment.clone()].iter().copied()));
        }
        all.wanted = match &self.wanted {
            Some(wanted) => Some(wanted.iter().map(|place| text[*place as usize]).collect()),
            None => (length > 0).then_some(text),
        };
        all
    }

    /// What dropout is keyed by, of all rows or of those that are wanted, whichever are `count`: the sequence's row id, and
    /// the place in it.
    pub(crate) fn keys(&self, count: usize) -> Vec<(u64, u32)> {
        let sequences = self.segments.iter().zip(&self.rows);
        let all = sequences.flat_map(|(segment, id)| (0..segment.len() as u32).map(|place| (*id, place)));
        match &self.wanted {
            Some(wanted) if wanted.len() == count => {
                let all: Vec<(u64, u32)> = all.collect();
                wanted.iter().map(|place| all[*place as usize]).collect()
            }
            _ => all.collect(),
        }
    }

    /// One more than the last position, or 0 without rows.
    pub(crate) fn positions_in_use(&self) -> usize {
        self.positions.iter().max().map_or(0, |last| *last as usize + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_start_again_in_each_sequence() {
        let mut batch = Packed::new();
        batch.push(7, &[10, 11, 12]);
        batch.push(9, &[]);
        batch.push(8, &[13, 14]);
        assert_eq!(batch.inputs, [10, 11, 12, 13, 14].map(Input::Token));
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.segments, [0..3, 3..3, 3..5]);
        assert_eq!(batch.rows, [7, 9, 8]);
    }

    #[test]
    fn a_soft_prompt_stands_before_every_sequence() {
        let mut batch = Packed::new();
        batch.push(7, &[10, 11]);
        batch.push(8, &[13]);
        let all = batch.behind_prompt(2);
        let [p, q, t] = [Input::Prompt(0), Input::Prompt(1), Input::Token(13)];
        assert_eq!(all.inputs, [p, q, Input::Token(10), Input::Token(11), p, q, t]);
        assert_eq!(all.positions, [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!((all.segments.as_slice(), all.wanted.as_deref()), (&[0..4, 4..7][..], Some(&[2, 3, 6][..])));
        assert_eq!(all.keys(3), [(7, 2), (7, 3), (8, 2)]);
        batch.wanted = Some(vec![1]);
        assert_eq!(batch.behind_prompt(2).wanted, Some(vec![3]));
        assert_eq!(batch.behind_prompt(0), batch);
    }
}
