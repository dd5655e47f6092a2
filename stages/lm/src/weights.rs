//! The parameters of a model, in the types they are computed with.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Result, Tensor, Var};

/// A parameter: a dense matrix or vector. A clone is a handle of the same one.
///
/// Frozen ones that are matrices can be read in another type than they are kept in. What they were converted to is kept
/// with the parameter, for all who hold it, so that a teacher is converted once, however many passes read it.
#[derive(Clone)]
pub(crate) struct Weight {
    master: Tensor,
    /// What passes read: the master itself, or what it was converted to.
    read: Tensor,
    converted: Arc<Mutex<Option<Tensor>>>,
}

impl Weight {
    /// A parameter with these values: trained if they are a variable, else frozen.
    pub(crate) fn new(master: Tensor) -> Self {
        Weight { read: master.clone(), master, converted: Arc::default() }
    }

    /// The values as they are kept: what is trained and saved.
    pub(crate) fn master(&self) -> &Tensor {
        &self.master
    }

    /// The values as passes read them.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.read
    }

    /// An independent, frozen copy with storage of its own.
    pub(crate) fn deep_clone(&self) -> Result<Self> {
        Ok(Weight::new(self.master.detach().copy()?))
    }

    /// The same as a variable. One that is a variable already is taken as it is.
    pub(crate) fn trainable(&self) -> Result<Self> {
        Ok(Weight::new(Var::from_tensor(&self.master)?.into_inner()))
    }

    /// A view through which no gradient flows. It sees later updates.
    pub(crate) fn frozen(&self) -> Self {
        if self.master.is_variable() { Weight::new(self.master.detach()) } else { self.clone() }
    }

    /// The same parameter, to be read in `dtype`. A variable, and what is no matrix, is read as it is kept: who computes with
    /// it converts it in every pass.
    pub(crate) fn read_in(&self, dtype: DType) -> Result<Self> {
        if self.master.rank() != 2 || self.master.is_variable() || self.master.dtype() == dtype {
            return Ok(Weight { read: self.master.clone(), ..self.clone() });
        }
        let mut converted = self.converted.lock().expect("nothing panics while it is held");
        let read = match &*converted {
            Some(known) if known.dtype() == dtype => known.clone(),
            _ => converted.insert(self.master.to_dtype(dtype)?).clone(),
        };
        drop(converted);
        Ok(Weight { read, ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn matrix() -> Tensor {
        Tensor::new(&[[1.0_f32, 2.5], [3.0, -4.0]], &Device::Cpu).unwrap()
    }

    #[test]
    fn what_is_frozen_is_converted_once() {
        let weight = Weight::new(matrix());
        let id = |weight: &Weight| weight.tensor().id();
        let first = weight.read_in(DType::BF16).unwrap();
        assert_eq!(first.tensor().dtype(), DType::BF16);
        assert_eq!(id(&first), id(&weight.frozen().read_in(DType::BF16).unwrap()));
        assert_eq!(id(&first), id(&first.read_in(DType::F32).unwrap().read_in(DType::BF16).unwrap()));
        assert_eq!(first.master().dtype(), DType::F32);
    }

    #[test]
    fn a_view_of_what_is_trained_sees_every_update() {
        let trained = Weight::new(matrix()).trainable().unwrap();
        assert_eq!(trained.read_in(DType::BF16).unwrap().tensor().dtype(), DType::F32);
        let read = || trained.frozen().read_in(DType::BF16).unwrap().tensor().to_dtype(DType::F32).unwrap();
        let before = read().to_vec2::<f32>().unwrap();
        Var::from_tensor(trained.master()).unwrap().set(&(matrix() * 2.0).unwrap()).unwrap();
        let twice: Vec<Vec<f32>> = before.iter().map(|row| row.iter().map(|x| x * 2.0).collect()).collect();
        assert_eq!(read().to_vec2::<f32>().unwrap(), twice);
    }
}
