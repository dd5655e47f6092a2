//! [`Ops`] by the fused loops of [`kernels`](crate::kernels), with a tape for the way back.
//!
//! To candle a whole forward pass is one operation: its backward pass runs the tape. That saves what candle's own engine
//! does for every intermediate (a zeroed buffer and an addition each), lets gradients be added where they lie, and frees
//! each activation as soon as nothing needs it. Only what leads to a variable is recorded; frozen weights cost no
//! gradient.
//!
//! Gradients of weights do not travel through candle but through [`collect`], which adds up all contributions.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, TensorId, bail};
use rayon::prelude::*;

use super::{Attend, Dropout, Input, Linear, Norm, Ops, Rows, change, elements};
use crate::config::Activation;
use crate::kernels::attention::{self, Attention};
use crate::kernels::matmul::{Matrix, product, product_into};
use crate::kernels::{ROW_BLOCK, elementwise, layer_norm, masks};

/// Runs a forward pass over rows, and remembers it if a gradient will be wanted.
pub(crate) struct Tape {
    rows: Arc<Rows>,
    dropout: Option<Dropout>,
    steps: Vec<Step>,
    nodes: usize,
}

/// A result of the tape.
pub(crate) struct Array {
    data: Arc<Vec<f32>>,
    width: usize,
    /// Where its gradient goes; `None` when it depends on no variable.
    node: Option<usize>,
}

/// One operation's way back.
type Step = Box<dyn FnOnce(&mut Backward) -> Result<()> + Send>;

impl Tape {
    /// A tape for a forward pass over `rows`.
    pub(crate) fn new(rows: Rows, dropout: Option<Dropout>) -> Self {
        Tape { rows: Arc::new(rows), dropout, steps: Vec::new(), nodes: 0 }
    }

    /// The result as a tensor, `[rows, width]`, differentiable where it depends on variables. `anchor` is one of the
    /// variables, if any is, or any other tensor.
    pub(crate) fn finish(self, result: Array, anchor: &Tensor, prompt: Option<&Tensor>) -> Result<Tensor> {
        let shape = Shape::from((result.data.len() / result.width, result.width));
        let Some(node) = result.node else {
            return Tensor::from_vec(take(result.data), shape, anchor.device());
        };
        let pass = Pass {
            output: Mutex::new(Some((take(result.data), shape))),
            tape: Mutex::new(Some(Recorded { steps: self.steps, nodes: self.nodes, last: node })),
        };
        anchor.apply_op2(prompt.unwrap_or(anchor), pass)
    }

    fn array(&mut self, data: Vec<f32>, width: usize, tracked: bool) -> Array {
        let node = tracked.then(|| {
            self.nodes += 1;
            self.nodes - 1
        });
        Array { data: Arc::new(data), width, node }
    }

    fn record(&mut self, step: impl FnOnce(&mut Backward) -> Result<()> + Send + 'static) {
        self.steps.push(Box::new(step));
    }
}

impl Ops for Tape {
    type Array = Array;

    fn embed(&mut self, tokens: &Tensor, positions: &Tensor, prompt: Option<&Tensor>) -> Result<Array> {
        let width = tokens.dim(1)?;
        let out = embed(&self.rows.inputs, &self.rows.positions, tokens, positions, prompt)?;
        let (tokens, positions) = (leaf(tokens)?, leaf(positions)?);
        let prompt = prompt.filter(|p| p.track_op()).map(|p| p.elem_count());
        let out = self.array(out, width, tokens.is_some() || positions.is_some() || prompt.is_some());
        if let Some(node) = out.node {
            let rows = self.rows.clone();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                if let Some(tokens) = tokens {
                    let id = |(row, input): (usize, &Input)| match input {
                        Input::Token(id) => Some((row, *id)),
                        Input::Prompt(_) => None,
                    };
                    let places = rows.inputs.iter().enumerate().filter_map(id).collect();
                    deliver(&tokens, Contribution::Rows { places, gradient: dy.clone() })?;
                }
                if let Some(positions) = positions {
                    let places = rows.positions.iter().copied().enumerate().collect();
                    deliver(&positions, Contribution::Rows { places, gradient: dy.clone() })?;
                }
                if let Some(length) = prompt {
                    let mut gradient = vec![0.0; length];
                    for (row, input) in rows.inputs.iter().enumerate() {
                        if let Input::Prompt(i) = input {
                            add_row(&mut gradient, *i as usize, &dy, row, width);
                        }
                    }
                    backward.prompt = Some(gradient);
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn layer_norm(&mut self, x: &Array, norm: Norm<'_>, eps: f32) -> Result<Array> {
        let (out, moments) = layer_norm::forward(&x.data, &elements(norm.weight)?, &elements(norm.bias)?, eps);
        let parameters = leaf(norm.weight)?.zip(leaf(norm.bias)?);
        let out = self.array(out, x.width, x.node.is_some() || parameters.is_some());
        if let Some(node) = out.node {
            let (weight, x_node, x) = (norm.weight.detach(), x.node, x.data.clone());
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let mut dx = x_node.and_then(|node| backward.owned(node)).unwrap_or_else(|| vec![0.0; x.len()]);
                let weight = elements(&weight)?;
                let gradients = layer_norm::backward(&mut dx, &x, &weight, &moments, &dy, parameters.is_some());
                if let Some(((weight, bias), (dweight, dbias))) = parameters.zip(gradients) {
                    deliver(&weight, dense(&weight, dweight)?)?;
                    deliver(&bias, dense(&bias, dbias)?)?;
                }
                if let Some(node) = x_node {
                    backward.gradients[node] = Some(Arc::new(dx));
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn linear(&mut self, x: &Array, linear: Linear<'_>) -> Result<Array> {
        let (depth, width) = linear.weight.dims2()?;
        if x.width != depth {
            bail!("a linear layer over {depth} channels got {}", x.width);
        }
        let mut out = elementwise::rows_of(&elements(linear.bias)?, x.data.len() / depth);
        let weight = elements(linear.weight)?;
        product_into(&mut out, Matrix::new(&x.data, depth), Matrix::new(&weight, width), true);
        drop(weight);
        let parameters = leaf(linear.weight)?.zip(leaf(linear.bias)?);
        let out = self.array(out, width, x.node.is_some() || parameters.is_some());
        if let Some(node) = out.node {
            let (weight, x_node) = (linear.weight.detach(), x.node);
            let kept = parameters.map(|parameters| (parameters, x.data.clone()));
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let dy = Matrix::new(&dy, width);
                if let Some(((weight, bias), x)) = kept {
                    let dweight = product(Matrix::new(&x, depth).transposed(), dy);
                    deliver(&weight, dense(&weight, dweight)?)?;
                    deliver(&bias, dense(&bias, elementwise::sum_rows(dy.elements(), width))?)?;
                }
                if let Some(node) = x_node {
                    let weight = elements(&weight)?;
                    backward.add(node, product(dy, Matrix::new(&weight, width).transposed()));
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn attention(&mut self, qkv: Array, attend: Attend) -> Result<Array> {
        let width = attend.heads * attend.head_width(qkv.width);
        let dropout = self.dropout.filter(|_| attend.dropout > 0.0).map(|d| (d, attend.dropout, attend.site));
        let out = attention::forward(&qkv.data, width, &spec(&self.rows, attend, dropout));
        let out = self.array(out, width, qkv.node.is_some());
        if let Some((node, from)) = out.node.zip(qkv.node) {
            let rows = self.rows.clone();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                backward.add(from, attention::backward(&qkv.data, &dy, width, &spec(&rows, attend, dropout)));
                Ok(())
            });
        }
        Ok(out)
    }

    fn activation(&mut self, x: Array, activation: Activation) -> Result<Array> {
        let out = self.array(elementwise::activation(&x.data, activation), x.width, x.node.is_some());
        if let Some((node, from)) = out.node.zip(x.node) {
            self.record(move |backward| {
                let mut dy = take(backward.take(node)?);
                elementwise::activation_backward(&mut dy, &x.data, activation);
                backward.add(from, dy);
                Ok(())
            });
        }
        Ok(out)
    }

    fn add(&mut self, x: Array, y: Array) -> Result<Array> {
        let tracked = x.node.is_some() || y.node.is_some();
        let mut sum = take(y.data);
        elementwise::add(&mut sum, &x.data);
        let out = self.array(sum, x.width, tracked);
        if let Some(node) = out.node {
            self.record(move |backward| {
                let dy = backward.take(node)?;
                for node in [x.node, y.node].into_iter().flatten() {
                    backward.share(node, &dy);
                }
                Ok(())
            });
        }
        Ok(out)
    }

    fn dropout(&mut self, x: Array, rate: f32, site: u32) -> Result<Array> {
        let Some(dropout) = self.dropout.filter(|_| rate > 0.0) else { return Ok(x) };
        let (width, from) = (x.width, x.node);
        let mut data = take(x.data);
        drop_elements(&mut data, width, &self.rows, &dropout, rate, site);
        let out = self.array(data, width, from.is_some());
        if let Some((node, from)) = out.node.zip(from) {
            let rows = self.rows.clone();
            self.record(move |backward| {
                let mut dy = take(backward.take(node)?);
                drop_elements(&mut dy, width, &rows, &dropout, rate, site);
                backward.add(from, dy);
                Ok(())
            });
        }
        Ok(out)
    }

    fn text(&mut self, x: Array) -> Result<Array> {
        let rows = self.rows.clone();
        let Some(text) = &rows.text else { return Ok(x) };
        let (width, length) = (x.width, x.data.len());
        let mut out = Vec::with_capacity(text.len() * width);
        text.iter().for_each(|row| out.extend_from_slice(&x.data[*row as usize * width..][..width]));
        let out = self.array(out, width, x.node.is_some());
        if let Some((node, from)) = out.node.zip(x.node) {
            let rows = self.rows.clone();
            self.record(move |backward| {
                let dy = backward.take(node)?;
                let mut dx = vec![0.0; length];
                for (row, dy) in rows.text.iter().flatten().zip(dy.chunks_exact(width)) {
                    dx[*row as usize * width..][..width].copy_from_slice(dy);
                }
                backward.add(from, dx);
                Ok(())
            });
        }
        Ok(out)
    }
}

/// The vectors of tokens, prompt and positions, added: `[rows, C]`.
pub(crate) fn embed(
    inputs: &[Input],
    at: &[u32],
    tokens: &Tensor,
    positions: &Tensor,
    prompt: Option<&Tensor>,
) -> Result<Vec<f32>> {
    let width = tokens.dim(1)?;
    let (tokens, positions) = (elements(tokens)?, elements(positions)?);
    let prompt = prompt.map(elements).transpose()?;
    let prompt: &[f32] = prompt.as_deref().unwrap_or(&[]);
    let mut out = Vec::with_capacity(inputs.len() * width);
    for (input, position) in inputs.iter().zip(at) {
        let (table, row) = match input {
            Input::Token(id) => (&*tokens, *id as usize),
            Input::Prompt(i) => (prompt, *i as usize),
        };
        let position = &positions[*position as usize * width..][..width];
        out.extend(table[row * width..][..width].iter().zip(position).map(|(a, b)| a + b));
    }
    Ok(out)
}

fn spec(rows: &Rows, attend: Attend, dropout: Option<(Dropout, f32, u32)>) -> Attention<'_> {
    let Attend { heads, kv_heads, scale, .. } = attend;
    Attention { segments: &rows.segments, rows: &rows.ids, heads, kv_heads, scale, dropout }
}

fn drop_elements(data: &mut [f32], width: usize, rows: &Rows, dropout: &Dropout, rate: f32, site: u32) {
    let keys = rows.segments.iter().zip(&rows.ids);
    let keys: Vec<(u64, u32)> =
        keys.flat_map(|(segment, id)| (0..segment.len() as u32).map(|line| (*id, line))).collect();
    data.par_chunks_mut(ROW_BLOCK * width).zip(keys.par_chunks(ROW_BLOCK)).for_each(|(data, keys)| {
        let mut mask = vec![0.0; width];
        for (row, (id, line)) in data.chunks_exact_mut(width).zip(keys) {
            masks::fill(&mut mask, dropout, rate, site, *id, *line);
            row.iter_mut().zip(&mask).for_each(|(x, m)| *x *= m);
        }
    });
}

fn add_row(to: &mut [f32], to_row: usize, from: &[f32], from_row: usize, width: usize) {
    let to = &mut to[to_row * width..][..width];
    to.iter_mut().zip(&from[from_row * width..][..width]).for_each(|(t, f)| *t += f);
}

/// The data itself where nobody else holds it, else a copy.
fn take(data: Arc<Vec<f32>>) -> Vec<f32> {
    Arc::try_unwrap(data).unwrap_or_else(|shared| shared.to_vec())
}

/// A weight that wants a gradient; `None` for a frozen one.
///
/// Errors for a weight that is itself computed from variables: its gradient would be lost.
fn leaf(weight: &Tensor) -> Result<Option<Tensor>> {
    if !weight.is_variable() && weight.track_op() {
        bail!("a weight was computed from a variable: only variables and frozen tensors can be weights of a model");
    }
    Ok(weight.is_variable().then(|| weight.clone()))
}

/// Gradients on their way back.
struct Backward {
    gradients: Vec<Option<Arc<Vec<f32>>>>,
    prompt: Option<Vec<f32>>,
}

impl Backward {
    /// The whole gradient of a node: all its readers came later, and have run.
    fn take(&mut self, node: usize) -> Result<Arc<Vec<f32>>> {
        match self.gradients[node].take() {
            Some(gradient) => Ok(gradient),
            None => bail!("a result of the model was computed and not used"),
        }
    }

    /// What has been added to a node so far, to add more in place.
    fn owned(&mut self, node: usize) -> Option<Vec<f32>> {
        self.gradients[node].take().map(take)
    }

    fn add(&mut self, node: usize, gradient: Vec<f32>) {
        let gradient = match self.owned(node) {
            Some(mut so_far) => {
                elementwise::add(&mut so_far, &gradient);
                so_far
            }
            None => gradient,
        };
        self.gradients[node] = Some(Arc::new(gradient));
    }

    fn share(&mut self, node: usize, gradient: &Arc<Vec<f32>>) {
        match self.owned(node) {
            Some(mut so_far) => {
                elementwise::add(&mut so_far, gradient);
                self.gradients[node] = Some(Arc::new(so_far));
            }
            None => self.gradients[node] = Some(gradient.clone()),
        }
    }
}

/// A forward pass that was run, as one operation of candle: of the anchor and the prompt.
struct Pass {
    output: Mutex<Option<(Vec<f32>, Shape)>>,
    tape: Mutex<Option<Recorded>>,
}

struct Recorded {
    steps: Vec<Step>,
    nodes: usize,
    last: usize,
}

impl CustomOp2 for Pass {
    fn name(&self) -> &'static str {
        "language-model"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let output = self.output.lock().expect("nothing panics while it is held").take();
        let (data, shape) = output.expect("an operation is applied once");
        Ok((CpuStorage::F32(data), shape))
    }

    fn bwd(
        &self,
        _: &Tensor,
        prompt: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(recorded) = self.tape.lock().expect("nothing panics while it is held").take() else {
            bail!("a second backward pass through the same hidden states: compute them again first");
        };
        let gradient = elements(&gradient.contiguous()?)?.to_vec();
        let mut backward = Backward { gradients: vec![None; recorded.nodes], prompt: None };
        backward.gradients[recorded.last] = Some(Arc::new(gradient));
        for step in recorded.steps.into_iter().rev() {
            step(&mut backward)?;
        }
        let prompt = match backward.prompt {
            Some(gradient) => Some(Tensor::from_vec(gradient, prompt.shape(), prompt.device())?),
            None => None,
        };
        Ok((None, prompt))
    }
}

/// One contribution to the gradient of a parameter.
pub(crate) enum Contribution {
    /// All of its elements; nobody else holds the tensor.
    Dense(Tensor),
    /// Some rows: each place is a row of `gradient` and the row of the parameter that it belongs to.
    Rows { places: Vec<(usize, u32)>, gradient: Arc<Vec<f32>> },
}

thread_local! {
    /// Where gradients of weights go during a backward pass on this thread.
    static COLLECTED: RefCell<Option<HashMap<TensorId, Vec<Contribution>>>> = const { RefCell::new(None) };
}

/// Runs a backward pass; gives what it contributed to each parameter beside what candle keeps.
pub(crate) fn collect<T>(backward: impl FnOnce() -> Result<T>) -> Result<(T, HashMap<TensorId, Vec<Contribution>>)> {
    COLLECTED.replace(Some(HashMap::new()));
    let result = backward();
    let collected = COLLECTED.take().unwrap_or_default();
    Ok((result?, collected))
}

/// Adds the contributions to `total`, the gradient so far, which nobody else may hold.
pub(crate) fn merge(
    total: Option<Tensor>,
    contributions: Vec<Contribution>,
    parameter: &Tensor,
) -> Result<Option<Tensor>> {
    // Whole gradients first: single rows are then added to one of them, and not to zeros made for them.
    let (dense, rows): (Vec<_>, Vec<_>) =
        contributions.into_iter().partition(|contribution| matches!(contribution, Contribution::Dense(_)));
    let mut total = total;
    for contribution in dense.into_iter().chain(rows) {
        total = Some(match (total, contribution) {
            (None, Contribution::Dense(gradient)) => gradient,
            (None, Contribution::Rows { places, gradient }) => {
                let total = parameter.detach().zeros_like()?;
                add_rows(&total, &places, &gradient)?;
                total
            }
            (Some(total), Contribution::Dense(gradient)) => {
                let gradient = elements(&gradient)?;
                change(&total, |total| {
                    elementwise::add(total, &gradient);
                    Ok(())
                })?;
                total
            }
            (Some(total), Contribution::Rows { places, gradient }) => {
                add_rows(&total, &places, &gradient)?;
                total
            }
        });
    }
    Ok(total)
}

fn add_rows(total: &Tensor, places: &[(usize, u32)], gradient: &[f32]) -> Result<()> {
    let width = total.dim(1)?;
    change(total, |total| {
        for (row, place) in places {
            add_row(total, *place as usize, gradient, *row, width);
        }
        Ok(())
    })
}

/// Whether gradients of weights are being collected on this thread.
pub(crate) fn is_collecting() -> bool {
    COLLECTED.with_borrow(Option::is_some)
}

fn dense(parameter: &Tensor, gradient: Vec<f32>) -> Result<Contribution> {
    Ok(Contribution::Dense(Tensor::from_vec(gradient, parameter.shape(), parameter.device())?))
}

/// Gives a contribution to the gradient of `parameter`, a variable, to who collects them.
pub(crate) fn deliver(parameter: &Tensor, contribution: Contribution) -> Result<()> {
    COLLECTED.with_borrow_mut(|collected| match collected {
        Some(collected) => {
            collected.entry(parameter.id()).or_default().push(contribution);
            Ok(())
        }
        None => bail!("gradients of a model's weights are given by `lm::gradients`, not by `backward` alone"),
    })
}
