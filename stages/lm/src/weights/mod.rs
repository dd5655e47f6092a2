//! The parameters of a model, in the types they are kept in and computed with.

pub(crate) mod encoded;
pub(crate) mod low_rank;

use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{DType, Device, Result, Tensor, Var};

use self::encoded::Encoded;
use self::low_rank::LowRank;

/// A parameter: a dense matrix or vector, or a frozen matrix in the type it has on disk, on which something of low rank may
/// lie. A clone is a handle of the same one.
///
/// What is frozen can be read in another type than it is kept in. What it was converted to is kept with the parameter, for
/// all who hold it, so that a teacher is converted once, however many passes read it.
#[derive(Clone)]
pub(crate) struct Weight {
    kept: Kept,
    /// What passes over a dense parameter read where it is not as it is kept: it was converted.
    converted: Option<Tensor>,
    known: Arc<Known>,
    low_rank: Option<LowRank>,
}

/// What a parameter is kept as.
#[derive(Clone)]
enum Kept {
    Dense(Tensor),
    /// A matrix of a model on that device.
    Encoded(Encoded, Device),
}

/// What a parameter was converted to so far.
#[derive(Default)]
struct Known {
    other: Mutex<Option<Tensor>>,
    decoded: OnceLock<Tensor>,
}

impl Weight {
    /// A parameter with these values: trained if they are a variable, else frozen.
    pub(crate) fn new(values: Tensor) -> Self {
        Weight { kept: Kept::Dense(values), converted: None, known: Arc::default(), low_rank: None }
    }

    /// A frozen matrix of a model on a device.
    pub(crate) fn encoded_on(matrix: Encoded, device: &Device) -> Self {
        Weight { kept: Kept::Encoded(matrix, device.clone()), converted: None, known: Arc::default(), low_rank: None }
    }

    /// The same parameter with this on top of it.
    pub(crate) fn with_low_rank(&self, low_rank: LowRank) -> Self {
        Weight { low_rank: Some(low_rank), ..self.clone() }
    }

    /// The parameter below what is of low rank: all other methods but this and [`Weight::low_rank`] speak of it.
    pub(crate) fn base(&self) -> Self {
        Weight { low_rank: None, ..self.clone() }
    }

    /// What lies on top of it.
    pub(crate) fn low_rank(&self) -> Option<&LowRank> {
        self.low_rank.as_ref()
    }

    /// The values as they are kept, what is trained and saved; of an encoded matrix, decoded.
    pub(crate) fn master(&self) -> Result<&Tensor> {
        match &self.kept {
            Kept::Dense(values) => Ok(values),
            Kept::Encoded(matrix, device) => self.known.decoded(matrix, device),
        }
    }

    /// The values as passes read them that know only tensors. An encoded matrix is decoded once.
    pub(crate) fn tensor(&self) -> Result<&Tensor> {
        self.converted.as_ref().map_or_else(|| self.master(), Ok)
    }

    /// The matrix for passes that decode while they compute, where it is kept encoded and in main memory.
    pub(crate) fn encoded(&self) -> Option<&Encoded> {
        match &self.kept {
            Kept::Encoded(matrix, Device::Cpu) => Some(matrix),
            _ => None,
        }
    }

    /// The matrix where it is kept encoded, wherever the model is: what is saved.
    pub(crate) fn kept_encoded(&self) -> Option<&Encoded> {
        match &self.kept {
            Kept::Encoded(matrix, _) => Some(matrix),
            Kept::Dense(_) => None,
        }
    }

    /// Rows and columns of a matrix.
    pub(crate) fn dims2(&self) -> Result<(usize, usize)> {
        match &self.kept {
            Kept::Dense(values) => values.dims2(),
            Kept::Encoded(matrix, _) => Ok((matrix.rows, matrix.columns)),
        }
    }

    /// The values where they are kept dense.
    pub(crate) fn dense(&self) -> Option<&Tensor> {
        match &self.kept {
            Kept::Dense(values) => Some(values),
            Kept::Encoded(..) => None,
        }
    }

    /// The variable that is trained, where it is one. A tensor that is itself computed from variables is none.
    pub(crate) fn variable(&self) -> Option<&Tensor> {
        self.dense().filter(|values| values.is_variable())
    }

    /// An independent, frozen copy with storage of its own; nobody changes what is encoded.
    pub(crate) fn deep_clone(&self) -> Result<Self> {
        match &self.kept {
            Kept::Dense(values) => Ok(Weight::new(values.detach().copy()?)),
            Kept::Encoded(matrix, device) => Ok(Weight::encoded_on(matrix.clone(), device)),
        }
    }

    /// The same as a variable. One that is a variable already is taken as it is.
    pub(crate) fn trainable(&self) -> Result<Self> {
        let values = match &self.kept {
            Kept::Dense(values) => values.clone(),
            Kept::Encoded(matrix, device) => matrix.tensor(device)?,
        };
        Ok(Weight::new(Var::from_tensor(&values)?.into_inner()))
    }

    /// A view through which no gradient flows. It sees later updates.
    pub(crate) fn frozen(&self) -> Self {
        let base = self.variable().map_or_else(|| self.clone(), |values| Weight::new(values.detach()));
        Weight { low_rank: self.low_rank.as_ref().map(LowRank::frozen), ..base }
    }

    /// The same parameter, to be read in `dtype`. A variable, and what is no matrix, is read as it is kept: who computes with
    /// it converts it in every pass. So is what is encoded, in main memory.
    pub(crate) fn read_in(&self, dtype: DType) -> Result<Self> {
        let own = match &self.kept {
            Kept::Dense(values) => values.rank() != 2 || values.is_variable() || values.dtype() == dtype,
            Kept::Encoded(_, device) => device.is_cpu() || dtype == DType::F32,
        };
        if own {
            return Ok(Weight { converted: None, ..self.clone() });
        }
        let mut known = self.known.other.lock().expect("nothing panics while it is held");
        let converted = match (&*known, &self.kept) {
            (Some(known), _) if known.dtype() == dtype => known.clone(),
            (_, Kept::Dense(values)) => known.insert(values.to_dtype(dtype)?).clone(),
            (_, Kept::Encoded(matrix, device)) => known.insert(matrix.tensor(device)?.to_dtype(dtype)?).clone(),
        };
        drop(known);
        Ok(Weight { converted: Some(converted), ..self.clone() })
    }
}

impl Known {
    fn decoded(&self, matrix: &Encoded, device: &Device) -> Result<&Tensor> {
        if let Some(decoded) = self.decoded.get() {
            return Ok(decoded);
        }
        // Should two decode at once, what the slower one made is dropped.
        let decoded = matrix.tensor(device)?;
        Ok(self.decoded.get_or_init(|| decoded))
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
        let id = |weight: &Weight| weight.tensor().unwrap().id();
        let first = weight.read_in(DType::BF16).unwrap();
        assert_eq!(first.tensor().unwrap().dtype(), DType::BF16);
        assert_eq!(id(&first), id(&weight.frozen().read_in(DType::BF16).unwrap()));
        assert_eq!(id(&first), id(&first.read_in(DType::F32).unwrap().read_in(DType::BF16).unwrap()));
        assert_eq!(first.master().unwrap().dtype(), DType::F32);
    }

    #[test]
    fn a_view_of_what_is_trained_sees_every_update() {
        let trained = Weight::new(matrix()).trainable().unwrap();
        assert_eq!(trained.read_in(DType::BF16).unwrap().tensor().unwrap().dtype(), DType::F32);
        let read = || trained.frozen().read_in(DType::BF16).unwrap().tensor().unwrap().to_dtype(DType::F32).unwrap();
        let before = read().to_vec2::<f32>().unwrap();
        Var::from_tensor(trained.master().unwrap()).unwrap().set(&(matrix() * 2.0).unwrap()).unwrap();
        let twice: Vec<Vec<f32>> = before.iter().map(|row| row.iter().map(|x| x * 2.0).collect()).collect();
        assert_eq!(read().to_vec2::<f32>().unwrap(), twice);
    }
}
