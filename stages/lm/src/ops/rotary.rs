//! Rotary positions: Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021.

use std::sync::{Arc, Mutex};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

/// What rotary positions turn, and by how much.
#[derive(Clone)]
pub(crate) struct Rotary {
    /// Heads at the beginning of each row that are turned.
    pub(crate) heads: usize,
    /// Channels `D` of a head.
    pub(crate) head_width: usize,
    /// Channels `R` at the beginning of each head that are turned, in pairs that lie `R / 2` apart.
    pub(crate) turned: usize,
    /// Of each position `R / 2` cosines and then `R / 2` sines: `[positions, R]`.
    pub(crate) angles: Tensor,
}

/// Cosines and sines of the rotary positions of one model, for as many positions as were asked for so far. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Angles(Arc<Mutex<Option<Tensor>>>);

impl Angles {
    /// `[P, R]` with `P` at least `positions`: for each position the `R / 2` cosines and then the `R / 2` sines. Each pair of
    /// channels turns by one of the `frequencies`, `[R / 2]`, from one position to the next, in radians.
    pub(crate) fn table(
        &self,
        frequencies: impl FnOnce() -> Vec<f32>,
        positions: usize,
        device: &Device,
    ) -> Result<Tensor> {
        let mut known = self.0.lock().expect("nothing panics while it is held");
        if let Some(table) = &*known
            && table.dim(0)? >= positions
        {
            return Ok(table.clone());
        }
        let positions = positions.next_power_of_two();
        let frequencies = frequencies();
        let width = 2 * frequencies.len();
        let mut table = vec![0.0; positions * width];
        table.par_chunks_exact_mut(width).enumerate().for_each(|(position, row)| {
            let (cosines, sines) = row.split_at_mut(width / 2);
            for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&frequencies) {
                // The angle is rounded as in `transformers`; what follows is exact to the last bit but one.
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                (*cosine, *sine) = (c as f32, s as f32);
            }
        });
        let table = Tensor::from_vec(table, (positions, width), device)?;
        *known = Some(table.clone());
        Ok(table)
    }
}
