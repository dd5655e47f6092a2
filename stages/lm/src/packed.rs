//! A batch of sequences laid end to end, without padding.
//!
//! Everything but attention works row by row, so a batch of `B` sequences is simply its `N` tokens; attention alone looks
//! at where each sequence begins and ends.

use std::ops::Range;

/// Sequences laid end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// The `N` token ids.
    pub ids: Vec<u32>,
    /// Position of each token in its sequence, from 0.
    pub positions: Vec<u32>,
    /// Where each sequence lies in `ids`.
    pub segments: Vec<Range<usize>>,
    /// Row id of each sequence: what its dropout is keyed by.
    pub rows: Vec<u64>,
    /// Which tokens' hidden states are wanted, in ascending order; `None` for all of them.
    pub wanted: Option<Vec<u32>>,
}

impl Packed {
    /// A batch without sequences; [`Packed::push`] adds them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a sequence behind the others. An empty one is kept as an empty segment.
    pub fn push(&mut self, row_id: u64, ids: &[u32]) {
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        self.segments.push(start..self.ids.len());
        self.rows.push(row_id);
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
        assert_eq!(batch.ids, [10, 11, 12, 13, 14]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.segments, [0..3, 3..3, 3..5]);
        assert_eq!(batch.rows, [7, 9, 8]);
    }
}
