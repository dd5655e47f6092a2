//! Learned maps from one model's channels to another's, by which hidden states of different widths are compared.

use std::path::Path;

use candle_core::{Device, Tensor, Var};
use contract::Result;
use contract::random::{normal, philox, purpose};
use indexmap::IndexMap;

use crate::files::tensors::{read_tensors, write_tensors};

const FILE: &str = "projections.safetensors";

/// Matrices `[D, C]` by name, variables: of hidden states `h` of width C each gives `h Wᵀ` of width D.
#[derive(Clone)]
pub struct Projections(pub IndexMap<String, Tensor>);

impl Projections {
    /// Of these names and shapes, normal with deviation `1 / sqrt(C)`. Each number depends on the seed, the place of its matrix
    /// and its own alone.
    pub fn new(shapes: &[(String, [usize; 2])], seed: u64, device: &Device) -> Result<Self> {
        let matrix = |(index, (name, [d, c])): (usize, &(String, [usize; 2]))| {
            let scale = 1.0 / (*c as f32).sqrt();
            let value = |place: usize| {
                let [a, b, ..] = philox(seed, [place as u32, 0, index as u32, purpose::PROJECTION]);
                normal(a, b).0 * scale
            };
            let values: Vec<f32> = (0..d * c).map(value).collect();
            Ok((name.clone(), Var::from_vec(values, (*d, *c), device)?.into_inner()))
        };
        Ok(Projections(shapes.iter().enumerate().map(matrix).collect::<Result<_>>()?))
    }

    /// Copies of the values, which later updates do not change.
    pub fn copy(&self) -> Result<Self> {
        let copy = |(name, matrix): (&String, &Tensor)| Ok((name.clone(), matrix.detach().copy()?));
        Ok(Projections(self.0.iter().map(copy).collect::<Result<_>>()?))
    }

    /// Writes them into a folder.
    pub fn save(&self, folder: &Path) -> Result<()> {
        write_tensors(&folder.join(FILE), self.0.iter(), None)
    }

    /// Reads what [`Projections::save`] wrote; `None` where nothing was.
    pub fn load(folder: &Path, device: &Device) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let (tensors, _) = read_tensors(&path, device)?;
        let matrix = |(name, matrix): (String, Tensor)| Ok((name, Var::from_tensor(&matrix)?.into_inner()));
        Ok(Some(Projections(tensors.into_iter().map(matrix).collect::<Result<_>>()?)))
    }
}
