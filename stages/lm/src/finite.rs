//! Whether numbers are finite, and where they are not.
//!
//! What a stage computes is looked at where the host reads it anyway: losses, log-probabilities, the norm of gradients. A
//! number that is not finite shows there, since none is ever replaced by another on the way. What caused it is looked for
//! only then.

use std::error::Error;
use std::fmt;

use candle_core::{DType, Device, Result, Tensor};

/// Of what was computed for many tokens or prompts, the first with a number that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// Its place among them.
    pub index: usize,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "what the model says at place {} is not finite", self.index)
    }
}

impl Error for NotFinite {}

/// Whether all elements are finite.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(place(tensor)?.is_none())
}

/// How many elements are not finite, and the first of them: `NaN in 2 of 12 places, the first at [0, 3]`.
pub(crate) fn first_not_finite(tensor: &Tensor) -> Result<Option<String>> {
    let Some((count, index, value)) = place(tensor)? else { return Ok(None) };
    let mut rest = index;
    let mut at: Vec<String> = Vec::with_capacity(tensor.rank());
    for size in tensor.dims().iter().rev() {
        at.push((rest % size).to_string());
        rest /= size;
    }
    at.reverse();
    let all = tensor.elem_count();
    Ok(Some(format!("{value} ({count} of {all} elements are not finite, the first at [{}])", at.join(", "))))
}

/// Number of elements that are not finite, with index and value of the first.
fn place(tensor: &Tensor) -> Result<Option<(usize, usize, f32)>> {
    let values = tensor.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let mut broken = values.iter().enumerate().filter(|(_, value)| !value.is_finite());
    Ok(broken.next().map(|(index, value)| (1 + broken.count(), index, *value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_counted_and_placed() {
        let mut values = vec![0.5_f32; 24];
        let tensor = |values: &[f32]| Tensor::from_slice(values, (2, 3, 4), &Device::Cpu).unwrap();
        assert_eq!(first_not_finite(&tensor(&values)).unwrap(), None);
        (values[17], values[20]) = (f32::NEG_INFINITY, f32::NAN);
        let found = first_not_finite(&tensor(&values)).unwrap().unwrap();
        assert_eq!(found, "-inf (2 of 24 elements are not finite, the first at [1, 1, 1])");
    }
}
