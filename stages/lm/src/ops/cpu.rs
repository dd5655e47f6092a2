//! [`Backend`] by the fused loops of [`kernels`](crate::kernels), on `f32` in main memory.

use std::sync::Arc;

use candle_core::{CpuStorage, Device, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::backend::Backend;
use super::rotary::Rotary;
use super::{Layer, LayerNorm, Layout, Positions, RmsNorm, side_by_side};
use crate::batch::{Input, Packed};
use crate::host::elements;
use crate::kernels::attention::{self, Attention};
use crate::kernels::layer_norm::{self, Moments};
use crate::kernels::matmul::{DEPTH, Matrix, product, product_in, product_into, product_into_columns};
use crate::kernels::rope::{self, Heads, Turn};
use crate::kernels::{ROW_BLOCK, buffer, columns, elementwise, masks, rms_norm, swiglu};
use crate::terms::activation::Activation;
use crate::terms::dropout::Dropout;
use crate::weights::Weight;
use crate::weights::encoded::Encoded;

/// The CPU. Gives the same bits with any number of threads.
#[derive(Clone, Copy)]
pub(crate) struct Cpu;

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Moments = Vec<Moments>;
    type Attended = ();

    fn len(buffer: &Vec<f32>) -> usize {
        buffer.len()
    }

    fn zeros(&self, length: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; length])
    }

    fn copy(&self, x: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(x.clone())
    }

    fn buffer(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(elements(tensor)?.to_vec())
    }

    fn tensor(&self, x: Vec<f32>, shape: Shape) -> Result<Tensor> {
        Tensor::from_vec(x, shape, &Device::Cpu)
    }

    fn storage(&self, x: Vec<f32>) -> Result<Storage> {
        Ok(Storage::Cpu(CpuStorage::F32(x)))
    }

    fn embed(
        &self,
        batch: &Packed,
        tokens: &Weight,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> Result<Vec<f32>> {
        embed(&batch.inputs, &batch.positions, tokens, positions, prompt)
    }

    fn embed_backward_prompt(&self, batch: &Packed, dy: &Vec<f32>, width: usize, shape: Shape) -> Result<Tensor> {
        let mut gradient = vec![0.0; shape.elem_count()];
        for (input, dy) in batch.inputs.iter().zip(dy.chunks_exact(width)) {
            if let Input::Prompt(i) = input {
                elementwise::add_to_row(&mut gradient, *i as usize, dy);
            }
        }
        Tensor::from_vec(gradient, shape, &Device::Cpu)
    }

    fn positions(&self, batch: &Packed, positions: Positions<'_>) -> Result<Vec<f32>> {
        self::positions(&batch.positions, positions)
    }

    fn layer_norm(&self, x: &Vec<f32>, norm: &LayerNorm) -> Result<(Vec<f32>, Vec<Moments>)> {
        Ok(layer_norm::forward(x, &elements(&norm.weight)?, &elements(&norm.bias)?, norm.eps))
    }

    fn layer_norm_backward(
        &self,
        dx: &mut Vec<f32>,
        x: &Vec<f32>,
        weight: &Tensor,
        moments: &Vec<Moments>,
        dy: &Vec<f32>,
        parameters: bool,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let gradients = layer_norm::backward(dx, x, &elements(weight)?, moments, dy, parameters);
        let tensor = |gradient| Tensor::from_vec(gradient, weight.shape(), &Device::Cpu);
        gradients.map(|(weight, bias)| Ok((tensor(weight)?, tensor(bias)?))).transpose()
    }

    fn rms_norm(&self, x: &Vec<f32>, norm: &RmsNorm) -> Result<(Vec<f32>, Vec<Moments>)> {
        Ok(rms_norm::forward(x, &elements(&norm.weight)?, norm.eps))
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Vec<f32>,
        x: &Vec<f32>,
        weight: &Tensor,
        moments: &Vec<Moments>,
        dy: &Vec<f32>,
        parameters: bool,
    ) -> Result<Option<Tensor>> {
        let gradient = rms_norm::backward(dx, x, &elements(weight)?, moments, dy, parameters);
        gradient.map(|gradient| Tensor::from_vec(gradient, weight.shape(), &Device::Cpu)).transpose()
    }

    fn linear(&self, x: &Vec<f32>, layers: &[Layer]) -> Result<Vec<f32>> {
        let (width, depth) = side_by_side(layers)?;
        let x = Matrix::new(x, depth);
        let mut out = match layers {
            [Layer { bias: Some(bias), .. }] => elementwise::rows_of(&elements(bias)?, x.rows()),
            _ => vec![0.0; x.rows() * width],
        };
        let mut first = 0;
        for layer in layers {
            if let Some(bias) = &layer.bias
                && layers.len() > 1
            {
                let bias = elements(bias)?;
                out.chunks_exact_mut(width).for_each(|row| row[first..][..bias.len()].copy_from_slice(&bias));
            }
            let accumulate = layer.bias.is_some();
            if let Some(weight) = encoded(layer) {
                by_parts(weight, |row, part| {
                    let part = Matrix::new(part, depth).transposed();
                    product_into_columns(&mut out, width, first + row, x, part, accumulate);
                });
            } else {
                let values = elements(layer.weight.tensor()?)?;
                product_into_columns(&mut out, width, first, x, matrix(&values, layer)?, accumulate);
            }
            first += layer.outputs()?;
        }
        Ok(out)
    }

    fn linear_add(&self, out: &mut Vec<f32>, channels: usize, first: usize, x: &Vec<f32>, layer: &Layer) -> Result<()> {
        let values = elements(layer.weight.tensor()?)?;
        product_into_columns(out, channels, first, Matrix::new(x, layer.inputs()?), matrix(&values, layer)?, true);
        Ok(())
    }

    fn linear_backward_input(
        &self,
        dy: &Vec<f32>,
        channels: usize,
        first: usize,
        layers: &[Layer],
    ) -> Result<Vec<f32>> {
        let (_, depth) = side_by_side(layers)?;
        let mut out = Vec::new();
        let mut column = first;
        for layer in layers {
            if let Some(weight) = encoded(layer) {
                out.resize(dy.len() / channels * depth, 0.0);
                by_parts(weight, |row, part| {
                    let part = Matrix::new(part, depth);
                    let dy = Matrix::part(dy, channels, column + row, part.rows());
                    product_into(&mut out, dy, part, column + row > first);
                });
                column += weight.rows;
                continue;
            }
            let values = elements(layer.weight.tensor()?)?;
            let weight = matrix(&values, layer)?;
            let dy = Matrix::part(dy, channels, column, weight.columns());
            if column == first {
                product_in(&mut out, dy, weight.transposed());
            } else {
                product_into(&mut out, dy, weight.transposed(), true);
            }
            column += weight.columns();
        }
        Ok(out)
    }

    fn linear_backward_weight(
        &self,
        x: &Vec<f32>,
        dy: &Vec<f32>,
        channels: usize,
        first: usize,
        layer: &Layer,
    ) -> Result<Tensor> {
        let (width, depth) = (layer.outputs()?, layer.inputs()?);
        let (x, gradient) = (Matrix::new(x, depth), Matrix::part(dy, channels, first, width));
        let weight = match layer.layout {
            Layout::InOut => product(x.transposed(), gradient),
            Layout::OutIn => product(gradient.transposed(), x),
        };
        Tensor::from_vec(weight, layer.weight.dims2()?, &Device::Cpu)
    }

    fn linear_backward_biases(&self, dy: &Vec<f32>, biases: &[(usize, bool)]) -> Result<Vec<Option<Tensor>>> {
        let channels = biases.iter().map(|(width, _)| width).sum();
        let mut first = 0;
        let gradient = |(width, wanted): &(usize, bool)| {
            let columns = first..first + width;
            first += width;
            let values = wanted.then(|| elementwise::sum_rows(dy, channels, columns));
            values.map(|values| Tensor::from_vec(values, *width, &Device::Cpu)).transpose()
        };
        biases.iter().map(gradient).collect()
    }

    fn join(&self, parts: &[(&Vec<f32>, usize)]) -> Result<Vec<f32>> {
        Ok(columns::join(&parts.iter().map(|(part, width)| (part.as_slice(), *width)).collect::<Vec<_>>()))
    }

    fn columns(&self, x: &Vec<f32>, width: usize, first: usize, count: usize) -> Result<Vec<f32>> {
        Ok(columns::part(x, width, first, count))
    }

    fn regroup(&self, x: &Vec<f32>, width: usize, groups: [usize; 2]) -> Result<Vec<f32>> {
        Ok(columns::regroup(x, width, groups))
    }

    fn rotate(&self, x: &mut Vec<f32>, width: usize, rotary: &Rotary, batch: &Packed, turn: Turn) -> Result<()> {
        rotate(x, width, rotary, &batch.positions, turn)
    }

    fn attention(&self, qkv: &Vec<f32>, width: usize, attention: &Attention<'_>) -> Result<(Arc<Vec<f32>>, ())> {
        Ok((Arc::new(attention::forward(qkv, width, attention)), ()))
    }

    fn attention_backward(
        &self,
        qkv: &Vec<f32>,
        _attended: &(),
        dy: &Vec<f32>,
        width: usize,
        attention: &Attention<'_>,
    ) -> Result<Vec<f32>> {
        Ok(attention::backward(qkv, dy, width, attention))
    }

    fn activation(&self, x: &Vec<f32>, activation: Activation) -> Result<Vec<f32>> {
        Ok(elementwise::activation(x, activation))
    }

    fn activation_backward(&self, dy: &mut Vec<f32>, x: &Vec<f32>, activation: Activation) -> Result<()> {
        elementwise::activation_backward(dy, x, activation);
        Ok(())
    }

    fn swiglu(&self, gate: &Vec<f32>, up: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(swiglu::forward(gate, up))
    }

    fn swiglu_backward(&self, gate: &mut Vec<f32>, up: &mut Vec<f32>, dy: &Vec<f32>) -> Result<()> {
        swiglu::backward(gate, up, dy);
        Ok(())
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>) -> Result<()> {
        elementwise::add(x, y);
        Ok(())
    }

    fn dropout(
        &self,
        x: &mut Vec<f32>,
        width: usize,
        batch: &Packed,
        dropout: &Dropout,
        rate: f32,
        site: u32,
    ) -> Result<()> {
        let keys = batch.keys(x.len() / width);
        x.par_chunks_mut(ROW_BLOCK * width).zip(keys.par_chunks(ROW_BLOCK)).for_each(|(data, keys)| {
            let mut mask = vec![0.0; width];
            for (row, (id, line)) in data.chunks_exact_mut(width).zip(keys) {
                masks::fill(&mut mask, dropout, rate, site, *id, *line);
                row.iter_mut().zip(&mask).for_each(|(x, m)| *x *= m);
            }
        });
        Ok(())
    }

    fn select(&self, x: &Vec<f32>, width: usize, rows: &[u32]) -> Result<Vec<f32>> {
        let mut out = Vec::with_capacity(rows.len() * width);
        rows.iter().for_each(|row| out.extend_from_slice(&x[*row as usize * width..][..width]));
        Ok(out)
    }

    fn select_backward(&self, dy: &Vec<f32>, width: usize, rows: &[u32], count: usize) -> Result<Vec<f32>> {
        let mut dx = vec![0.0; count * width];
        for (row, dy) in rows.iter().zip(dy.chunks_exact(width)) {
            dx[*row as usize * width..][..width].copy_from_slice(dy);
        }
        Ok(dx)
    }
}

/// The matrix of a layer that is decoded while it is read, where its rows are outputs.
fn encoded(layer: &Layer) -> Option<&Encoded> {
    layer.weight.encoded().filter(|_| layer.layout == Layout::OutIn)
}

/// Decodes a matrix some rows at a time, `[rows, columns]`, and hands each part out with the number of its first row. Parts
/// begin where [`product`] would cut a sum over rows, so that it has the bits that it has over the whole matrix.
fn by_parts(matrix: &Encoded, mut f: impl FnMut(usize, &[f32])) {
    const PART: usize = DEPTH;
    let mut part = vec![0.0; PART.min(matrix.rows) * matrix.columns];
    for first in (0..matrix.rows).step_by(PART) {
        let rows = PART.min(matrix.rows - first);
        let part = &mut part[..rows * matrix.columns];
        let share = rows.div_ceil(rayon::current_num_threads()).max(1);
        part.par_chunks_mut(share * matrix.columns).enumerate().for_each(|(i, part)| {
            let first = first + i * share;
            matrix.decode(first..first + part.len() / matrix.columns, part);
        });
        f(first, part);
    }
}

/// The matrix of a layer as what `x` is multiplied by, `[in, out]`.
fn matrix<'a>(values: &'a [f32], layer: &Layer) -> Result<Matrix<'a>> {
    Ok(match layer.layout {
        Layout::InOut => Matrix::new(values, layer.outputs()?),
        Layout::OutIn => Matrix::new(values, layer.inputs()?).transposed(),
    })
}

/// Turns heads in place, by the positions `at`.
pub(crate) fn rotate(x: &mut [f32], width: usize, rotary: &Rotary, at: &[u32], turn: Turn) -> Result<()> {
    let Rotary { heads, head_width, turned, ref angles } = *rotary;
    rope::rotate(x, width, Heads { count: heads, width: head_width, turned }, &elements(angles)?, at, turn);
    Ok(())
}

/// The vectors of the positions `at`, `[rows, C]`.
pub(crate) fn positions(at: &[u32], Positions { table, first }: Positions<'_>) -> Result<Vec<f32>> {
    let inputs: Vec<Input> = at.iter().map(|position| Input::Token(first as u32 + position)).collect();
    embed(&inputs, at, &Weight::new(table.clone()), None, None)
}

/// The vectors of tokens, prompt and, where they have some, positions, added: `[rows, C]`.
pub(crate) fn embed(
    inputs: &[Input],
    at: &[u32],
    tokens: &Weight,
    positions: Option<Positions<'_>>,
    prompt: Option<&Tensor>,
) -> Result<Vec<f32>> {
    let (_, width) = tokens.dims2()?;
    if inputs.len() != at.len() {
        bail!("{} positions for {} rows", at.len(), inputs.len());
    }
    // What is encoded is decoded for the tokens of these rows alone.
    let decoded = tokens.encoded().map(|table| {
        let mut vectors = vec![0.0; inputs.len() * width];
        vectors.par_chunks_exact_mut(width).zip(inputs).for_each(|(vector, input)| {
            if let Input::Token(id) = input {
                table.decode(*id as usize..*id as usize + 1, vector);
            }
        });
        vectors
    });
    let dense = if decoded.is_none() { Some(elements(tokens.tensor()?)?) } else { None };
    let prompt = prompt.map(elements).transpose()?;
    let (dense, prompt): (&[f32], &[f32]) = (dense.as_deref().unwrap_or(&[]), prompt.as_deref().unwrap_or(&[]));
    let vector = |row: usize| {
        let (table, place) = match (inputs[row], &decoded) {
            (Input::Token(_), Some(decoded)) => (decoded.as_slice(), row),
            (Input::Token(id), None) => (dense, id as usize),
            (Input::Prompt(i), _) => (prompt, i as usize),
        };
        &table[place * width..][..width]
    };
    let Some(Positions { table, first }) = positions else {
        return Ok(buffer::matrix(inputs.len(), width, |row| {
            let vector = vector(row);
            move |c| vector[c]
        }));
    };
    let table = elements(table)?;
    let table: &[f32] = &table;
    Ok(buffer::matrix(inputs.len(), width, |row| {
        let vector = vector(row);
        let position = &table[(first + at[row] as usize) * width..][..width];
        move |c| vector[c] + position[c]
    }))
}
