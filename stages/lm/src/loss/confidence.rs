//! How sure a model is of tokens.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Tensor};

use crate::kernels::head::rows_per_chunk;

/// What a model says of a token, and of all that may stand in its place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Confidence {
    /// Log-probability of the token.
    pub log_prob: f64,
    /// Log-probability of the likeliest token.
    pub top_log_prob: f64,
    /// Logit of the likeliest token, as it comes from the head.
    pub top_logit: f64,
}

/// Of each row's label under `softmax(hidden headᵀ)`. `hidden` is `[N, C]`, `head` `[V, C]`. Chunked, in f32; no gradient.
///
/// Errors when shapes do not fit, or a label is not below V.
pub fn confidences(hidden: &Tensor, head: &Tensor, labels: &[u32]) -> Result<Vec<Confidence>> {
    let ((rows, width), (vocabulary, head_width)) = (hidden.dims2()?, head.dims2()?);
    ensure!(width == head_width && rows == labels.len(), "hidden states of {rows} rows for {} labels", labels.len());
    ensure!(labels.iter().all(|label| (*label as usize) < vocabulary), "a label is outside of the vocabulary");
    let head = head.detach().to_dtype(DType::F32)?.t()?;
    let mut found = Vec::with_capacity(rows);
    let chunk = rows_per_chunk(vocabulary);
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        let hidden = hidden.detach().narrow(0, start, count)?.to_dtype(DType::F32)?;
        let logits = hidden.matmul(&head)?; // [R, V]
        let labels = Tensor::from_slice(&labels[start..start + count], (count, 1), logits.device())?;
        let top = logits.max_keepdim(D::Minus1)?; // [R, 1]
        let of_label = logits.gather(&labels, 1)?; // [R, 1]
        let log_sum = logits.broadcast_sub(&top)?.exp()?.sum_keepdim(D::Minus1)?.log()?; // [R, 1], less the largest logit
        let columns = [&(of_label - &top)?, &log_sum, &top].map(|column| column.flatten_all()?.to_vec1::<f32>());
        let [of_label, log_sum, top] = columns;
        for ((of_label, log_sum), top) in of_label?.into_iter().zip(log_sum?).zip(top?) {
            let [of_label, log_sum, top] = [of_label, log_sum, top].map(f64::from);
            found.push(Confidence { log_prob: of_label - log_sum, top_log_prob: -log_sum, top_logit: top });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::kernels::testing::numbers;
    use crate::loss::log_probs;

    #[test]
    fn it_is_what_the_logits_say() {
        let (rows, width, vocabulary) = (9, 5, 37);
        let tensor =
            |seed, rows: usize| Tensor::from_vec(numbers(seed, rows * width), (rows, width), &Device::Cpu).unwrap();
        let (hidden, head) = ((tensor(1, rows) * 3.0).unwrap(), tensor(2, vocabulary));
        let labels: Vec<u32> = (0..rows as u32).map(|row| row * 4 % vocabulary as u32).collect();
        let found = confidences(&hidden, &head, &labels).unwrap();
        let logits: Vec<Vec<f32>> = hidden.matmul(&head.t().unwrap()).unwrap().to_vec2().unwrap();
        let expected = log_probs(&hidden, &head, &labels).unwrap();
        for (row, it) in found.iter().enumerate() {
            let logits: Vec<f64> = logits[row].iter().map(|logit| f64::from(*logit)).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            assert!((it.log_prob - f64::from(expected[row])).abs() < 1e-5);
            assert!((it.top_log_prob - (top - sum.ln())).abs() < 1e-5 && (it.top_logit - top).abs() < 1e-5);
        }
        assert!(confidences(&hidden, &head, &[40; 9]).is_err() && confidences(&hidden, &head, &labels[1..]).is_err());
    }
}
