//! The loss by the fused kernel of the CPU.

use anyhow::Result;
use candle_core::Tensor;

use super::{Answer, Request, Source, Target};
use crate::host::elements;
use crate::kernels::head::{Input, InputSource, InputTarget, head_terms};

impl Request<'_> {
    pub(super) fn fused(&self, hidden_gradient: bool, head_gradient: bool) -> Result<Answer> {
        let dense = |hidden: &Tensor, head: &Tensor| Ok((hidden.contiguous()?, head.contiguous()?));
        let (hidden, head) = dense(self.hidden, self.head)?;
        let (hidden, head) = (elements(&hidden)?, elements(&head)?);
        let of_targets = self.targets.iter().map(|target| match target.source {
            Source::Head { hidden, head } => dense(hidden, head).map(Some),
            Source::TopK(_) => Ok(None),
        });
        let of_targets: Vec<_> = of_targets.collect::<Result<_>>()?;
        let read = of_targets.iter().map(|tensors| match tensors {
            Some((hidden, head)) => Ok(Some((elements(hidden)?, elements(head)?))),
            None => Ok(None),
        });
        let read: Vec<_> = read.collect::<Result<_>>()?;
        let targets = self.targets.iter().zip(&read).map(|(target, read)| {
            let source = match (target.source, read) {
                (Source::TopK(kept), _) => InputSource::TopK(kept),
                (Source::Head { hidden: tensor, .. }, read) => {
                    let (hidden, head) = read.as_ref().expect("every head was read above");
                    InputSource::Head { hidden, head, width: tensor.dim(1)? }
                }
            };
            let Target { divergence, coefficient, temperature, .. } = *target;
            Ok(InputTarget { source, divergence, coefficient, temperature })
        });
        let input = Input {
            hidden: &hidden,
            head: &head,
            width: self.hidden.dim(1)?,
            vocabulary: self.head.dim(0)?,
            labels: self.labels,
            targets: targets.collect::<Result<_>>()?,
            weights: self.weights,
        };
        let output = head_terms(&input, hidden_gradient, head_gradient);
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        Ok(Answer {
            terms: output.terms,
            hidden_gradient: tensor(output.hidden_gradient, self.hidden)?,
            head_gradient: tensor(output.head_gradient, self.head)?,
        })
    }
}
