//! The operations a decoder is made of, as an interface with several implementations.
//!
//! A model's forward pass is written once, over [`Ops`]. Who runs it decides what comes out:
//!
//! - [`plain::Plain`]: candle's own tensor operations, on any device, differentiated by candle. The meaning of every
//!   operation, and what the others are tested against;
//! - [`tape::Tape`]: the fused loops of a [`backend::Backend`], which remembers what the backward pass needs;
//!   [`cpu::Cpu`] is one;
//! - `generate::Cached`: the loops of the CPU, one step at a time, with the keys and values of earlier steps.

pub(crate) mod backend;
pub(crate) mod collect;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod plain;
pub(crate) mod tape;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, InplaceOp1, Layout as TensorLayout, Result, Storage, Tensor, bail};

use crate::config::Activation;
use crate::packed::Packed;

/// Random dropping of elements in training. The rates are the model's.
///
/// A mask is a function of the seed, the update, the purpose with the place in the model, the row id and the position:
/// it does not change with the batch a row is in, nor with how a batch is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropout {
    /// The stage's seed.
    pub seed: u64,
    /// The update, from 0.
    pub update: u32,
    /// [`contract::random::purpose::DROPOUT`] or [`contract::random::purpose::TEACHER_DROPOUT`].
    pub purpose: u32,
}

/// One vector of an embedding: what stands at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// A token id.
    Token(u32),
    /// A vector of the soft prompt.
    Prompt(u32),
}

/// The rows that a forward pass computes: those of a batch, and of a soft prompt before each of its sequences.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    pub(crate) inputs: Vec<Input>,
    pub(crate) positions: Vec<u32>,
    pub(crate) segments: Vec<Range<usize>>,
    pub(crate) ids: Vec<u64>,
    /// Which rows' final hidden states are wanted, where not all are, in order: never those of the prompt.
    pub(crate) text: Option<Vec<u32>>,
}

impl Rows {
    /// What dropout is keyed by, of all rows or of those that are wanted, whichever are `count`: a row's id, and its place
    /// in its sequence.
    pub(crate) fn keys(&self, count: usize) -> Vec<(u64, u32)> {
        let sequences = self.segments.iter().zip(&self.ids);
        let all = sequences.flat_map(|(segment, id)| (0..segment.len() as u32).map(|line| (*id, line)));
        match &self.text {
            Some(text) if text.len() == count => {
                let all: Vec<(u64, u32)> = all.collect();
                text.iter().map(|row| all[*row as usize]).collect()
            }
            _ => all.collect(),
        }
    }

    /// One more than the last position, or 0 without rows.
    pub(crate) fn positions_in_use(&self) -> usize {
        self.positions.iter().max().map_or(0, |last| *last as usize + 1)
    }

    /// The rows of a batch behind a soft prompt of `prompt` vectors.
    pub(crate) fn new(batch: &Packed, prompt: usize) -> Self {
        let mut rows = Rows { ids: batch.rows.clone(), ..Rows::default() };
        let mut text = Vec::with_capacity(batch.ids.len());
        for segment in &batch.segments {
            let start = rows.inputs.len();
            rows.inputs.extend((0..prompt as u32).map(Input::Prompt));
            rows.positions.extend(0..prompt as u32);
            text.extend((start + prompt..start + prompt + segment.len()).map(|row| row as u32));
            rows.inputs.extend(batch.ids[segment.clone()].iter().map(|id| Input::Token(*id)));
            rows.positions.extend(batch.positions[segment.clone()].iter().map(|p| p + prompt as u32));
            rows.segments.push(start..rows.inputs.len());
        }
        rows.text = match &batch.wanted {
            Some(wanted) => Some(wanted.iter().map(|token| text[*token as usize]).collect()),
            None => (prompt > 0).then_some(text),
        };
        rows
    }
}

/// Weight and bias of a layer norm, `[C]` each.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: &'a Tensor,
}

/// Weight `[in, out]` and bias `[out]` of a linear layer as GPT-2's checkpoints have it.
#[derive(Clone, Copy)]
pub(crate) struct Linear<'a> {
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: &'a Tensor,
}

/// Weight `[out, in]` of a linear layer as Llama's checkpoints have it, and its bias `[out]` if it has one.
#[derive(Clone, Copy)]
pub(crate) struct Projection<'a> {
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: Option<&'a Tensor>,
}

/// What rotary positions turn, and by how much.
#[derive(Clone, Copy)]
pub(crate) struct Rotary<'a> {
    /// Heads at the beginning of each row that are turned.
    pub(crate) heads: usize,
    /// Channels `D` of a head.
    pub(crate) head_width: usize,
    /// Of each position `D / 2` cosines and then `D / 2` sines: `[positions, D]`.
    pub(crate) angles: &'a Tensor,
}

/// Rows of all weights together, `[out, in]` each, and their columns.
pub(crate) fn joined<'a>(weights: impl Iterator<Item = &'a Tensor>) -> Result<(usize, usize)> {
    let (mut width, mut depth) = (0, 0);
    for weight in weights {
        (width, depth) = (width + weight.dim(0)?, weight.dim(1)?);
    }
    Ok((width, depth))
}

/// How one layer attends.
#[derive(Clone, Copy)]
pub(crate) struct Attend {
    pub(crate) layer: usize,
    /// Query heads `H`.
    pub(crate) heads: usize,
    /// Heads of keys and values `G`, a divisor of `H`: each is shared by `H / G` query heads that follow one another.
    pub(crate) kv_heads: usize,
    pub(crate) scale: f32,
    pub(crate) dropout: f32,
    /// Dropout site of head 0; the other heads follow.
    pub(crate) site: u32,
}

impl Attend {
    /// Channels `D` of a head, where queries, keys and values together have `qkv` channels.
    pub(crate) fn head_width(&self, qkv: usize) -> usize {
        qkv / (self.heads + 2 * self.kv_heads)
    }
}

/// A part of a model that may be run a second time in the backward pass. It holds its weights: a clone of a tensor is a
/// handle.
pub(crate) trait Block: Clone + Send + 'static {
    fn forward<O: Ops>(&self, ops: &mut O, x: O::Array) -> Result<O::Array>;
}

/// Operations on rows of channels.
pub(crate) trait Ops: Sized {
    /// `[rows, channels]`.
    type Array;

    /// A token's (or the prompt's) vector for every row, plus its position's where positions have vectors.
    fn embed(&mut self, tokens: &Tensor, positions: Option<&Tensor>, prompt: Option<&Tensor>) -> Result<Self::Array>;
    /// Layer norm of each row.
    fn layer_norm(&mut self, x: &Self::Array, norm: Norm<'_>, eps: f32) -> Result<Self::Array>;
    /// Root mean square norm of each row, times `weight`, `[C]`.
    fn rms_norm(&mut self, x: &Self::Array, weight: &Tensor, eps: f32) -> Result<Self::Array>;
    /// `x weight + bias`.
    fn linear(&mut self, x: &Self::Array, linear: Linear<'_>) -> Result<Self::Array>;
    /// `x weight^T + bias` of several layers, side by side.
    fn project(&mut self, x: &Self::Array, layers: &[Projection<'_>]) -> Result<Self::Array>;
    /// Turns heads by the positions of their rows.
    fn rotary(&mut self, x: Self::Array, rotary: Rotary<'_>) -> Result<Self::Array>;
    /// Causal attention within each sequence, `[N, H D]` from queries, keys and values `[N, (H + 2G) D]`.
    fn attention(&mut self, qkv: Self::Array, attend: Attend) -> Result<Self::Array>;
    /// The nonlinearity.
    fn activation(&mut self, x: Self::Array, activation: Activation) -> Result<Self::Array>;
    /// `silu(gate) * up`.
    fn swiglu(&mut self, gate: Self::Array, up: Self::Array) -> Result<Self::Array>;
    /// `x + y`.
    fn add(&mut self, x: Self::Array, y: Self::Array) -> Result<Self::Array>;
    /// Drops elements, where this pass has dropout.
    fn dropout(&mut self, x: Self::Array, rate: f32, site: u32) -> Result<Self::Array>;
    /// The rows that are wanted: text, not prompt.
    fn text(&mut self, x: Self::Array) -> Result<Self::Array>;
    /// Runs a block.
    fn block<T: Block>(&mut self, x: Self::Array, block: &T) -> Result<Self::Array> {
        block.forward(self, x)
    }
}

/// The elements of an `f32` tensor in main memory, without a copy.
///
/// Errors when it is elsewhere, of another type, or not contiguous.
pub(crate) fn elements(tensor: &Tensor) -> Result<impl Deref<Target = [f32]> + '_> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = contiguous(layout)?;
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        bail!("expected a tensor of f32 on the cpu, got {:?} on {:?}", tensor.dtype(), tensor.device().location());
    }
    Ok(Elements { storage, range })
}

/// Lets `f` change the elements of a tensor in place. All who share its storage see the change.
pub(crate) fn change<T>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<T> + Send) -> Result<T>
where
    T: Send,
{
    /// `InplaceOp1` is called through a shared reference, hence the cells.
    struct Change<F, T>(std::sync::Mutex<(Option<F>, Option<T>)>);
    impl<F: FnOnce(&mut [f32]) -> Result<T>, T> InplaceOp1 for Change<F, T> {
        fn name(&self) -> &'static str {
            "change"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &TensorLayout) -> Result<()> {
            let range = contiguous(layout)?;
            let CpuStorage::F32(data) = storage else { bail!("expected a tensor of f32") };
            let mut cells = self.0.lock().expect("nothing panics while it is held");
            let f = cells.0.take().expect("an operation is applied once");
            cells.1 = Some(f(&mut data[range])?);
            Ok(())
        }
    }
    let change = Change(std::sync::Mutex::new((Some(f), None)));
    tensor.inplace_op1(&change)?;
    let (_, result) = change.0.into_inner().expect("nothing panics while it is held");
    Ok(result.expect("an operation that was applied has a result"))
}

struct Elements<S> {
    storage: S,
    range: Range<usize>,
}

impl<S: Deref<Target = Storage>> Deref for Elements<S> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            _ => unreachable!("checked when it was made"),
        }
    }
}

fn contiguous(layout: &TensorLayout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::collect::{collect, merge};
    use super::cpu::Cpu;
    use super::plain::Plain;
    use super::*;
    use crate::kernels::testing::{numbers, with_threads};

    type Tape = tape::Tape<Cpu>;

    const DROPOUT: Dropout = Dropout { seed: 11, update: 3, purpose: 0x100 };

    fn variable(seed: u64, rows: usize, columns: usize) -> Tensor {
        let shape: Vec<usize> = if rows == 0 { vec![columns] } else { vec![rows, columns] };
        let values = numbers(seed, rows.max(1) * columns);
        Var::from_vec(values, shape, &Device::Cpu).unwrap().into_inner()
    }

    fn rows(lengths: &[usize], prompt: usize) -> Rows {
        let mut batch = Packed::new();
        for (i, length) in lengths.iter().enumerate() {
            let ids: Vec<u32> = (0..*length as u32).map(|t| (t * 7 + i as u32) % 5).collect();
            batch.push(i as u64 + 40, &ids);
        }
        Rows::new(&batch, prompt)
    }

    /// Value, gradient of the input vectors and gradients of `weights`, of a random weighted sum of what `pass` computes
    /// from embedded rows.
    fn run(
        fused: bool,
        rows: &Rows,
        dropout: Option<Dropout>,
        inputs: &[Tensor; 3],
        weights: &[Tensor],
        pass: &dyn Pass,
    ) -> (Vec<f32>, Vec<Vec<f32>>) {
        let [tokens, positions, prompt] = inputs;
        let prompted = rows.inputs.iter().any(|i| matches!(i, Input::Prompt(_))).then_some(prompt);
        let out = if fused {
            let mut tape = Tape::new(Cpu, rows.clone(), dropout);
            let x = tape.embed(tokens, Some(positions), prompted).unwrap();
            let result = pass.tape(&mut tape, x);
            tape.finish(result, tokens, prompted).unwrap()
        } else {
            let mut plain = Plain::new(rows, dropout);
            let x = plain.embed(tokens, Some(positions), prompted).unwrap();
            pass.plain(&mut plain, x)
        };
        let factors = Tensor::from_vec(numbers(77, out.elem_count()), out.shape(), &Device::Cpu).unwrap();
        let loss = (&out * factors).unwrap().sum_all().unwrap();
        let (mut store, mut collected) = collect(&loss).unwrap();
        let leaves = [tokens, positions].into_iter().chain(prompted).chain(weights);
        let gradients = leaves.filter(|leaf| leaf.is_variable()).map(|leaf| {
            let parts = collected.remove(&leaf.id()).unwrap_or_default();
            let gradient = merge(store.remove(leaf), parts, leaf).unwrap().expect("a gradient");
            gradient.flatten_all().unwrap().to_vec1().unwrap()
        });
        let gradients = gradients.collect();
        (out.flatten_all().unwrap().to_vec1().unwrap(), gradients)
    }

    /// One operation, for both implementations: a closure cannot be generic.
    trait Pass: Sync {
        fn tape(&self, ops: &mut Tape, x: <Tape as Ops>::Array) -> <Tape as Ops>::Array;
        fn plain(&self, ops: &mut Plain<'_>, x: Tensor) -> Tensor;
    }

    macro_rules! pass {
        (|$ops:ident, $x:ident| $body:expr, $($name:ident: $type:ty = $value:expr),*) => {{
            struct Body { $($name: $type),* }
            impl Pass for Body {
                fn tape(&self, $ops: &mut Tape, $x: <Tape as Ops>::Array) -> <Tape as Ops>::Array {
                    let Body { $($name),* } = self;
                    $body.unwrap()
                }
                fn plain(&self, $ops: &mut Plain<'_>, $x: Tensor) -> Tensor {
                    let Body { $($name),* } = self;
                    $body.unwrap()
                }
            }
            Body { $($name: $value),* }
        }};
    }

    fn near(name: &str, found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(1e-3f32, |a, b| a.max(b.abs()));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() <= tolerance * largest, "{name}[{i}]: {found}, expected {expected}");
        }
    }

    /// The fused operation has the value and the gradients of the plain one, the same bits with any number of threads,
    /// and the gradients that differences of its value give.
    fn check(rows: &Rows, width: usize, dropout: Option<Dropout>, weights: &[Tensor], pass: &dyn Pass) {
        let inputs = [variable(1, 5, width), variable(2, 64, width), variable(3, 3, width)];
        let (value, gradients) = run(true, rows, dropout, &inputs, weights, pass);
        let (expected, expected_gradients) = run(false, rows, dropout, &inputs, weights, pass);
        near("value", &value, &expected, 5e-6);
        assert_eq!(gradients.len(), expected_gradients.len());
        for (i, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
            near(&format!("gradient {i}"), gradient, expected, 1e-5);
        }
        for threads in [1, 3] {
            let again = with_threads(threads, || run(true, rows, dropout, &inputs, weights, pass));
            assert!(again == (value.clone(), gradients.clone()), "bits change with {threads} threads");
        }
        // Central differences at one element of each leaf.
        let factors = numbers(77, value.len());
        let total = || {
            let (value, _) = run(true, rows, dropout, &inputs, weights, pass);
            value.iter().zip(&factors).map(|(v, f)| f64::from(*v) * f64::from(*f)).sum::<f64>()
        };
        let prompted = gradients.len() - weights.len() == 3;
        let leaves = inputs.iter().take(if prompted { 3 } else { 2 }).chain(weights);
        for (leaf, gradient) in leaves.zip(&gradients) {
            let place = gradient.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap().0;
            let step = 2e-3;
            let moved = |by: f32| {
                change(leaf, |values| {
                    values[place] += by;
                    Ok(())
                })
                .unwrap();
                total()
            };
            let (high, low) = (moved(step), moved(-2.0 * step));
            moved(step);
            let difference = (high - low) / f64::from(2.0 * step);
            let gradient = f64::from(gradient[place]);
            assert!((difference - gradient).abs() < 2e-2 * gradient.abs().max(1.0), "{difference} {gradient}");
        }
    }

    #[test]
    fn embeddings_with_and_without_a_prompt() {
        for prompt in [0, 3] {
            let rows = rows(&[4, 1, 9], prompt);
            check(&rows, 12, None, &[], &pass!(|ops, x| ops.text(x),));
            check(&rows, 12, Some(DROPOUT), &[], &pass!(|ops, x| ops.dropout(x, 0.3, 2),));
        }
    }

    #[test]
    fn layer_norm() {
        for width in [8, 33, 192] {
            let (weight, bias) = (variable(4, 0, width), variable(5, 0, width));
            let pass = pass!(
                |ops, x| ops.layer_norm(&x, Norm { weight, bias }, 1e-5),
                weight: Tensor = weight.clone(), bias: Tensor = bias.clone()
            );
            check(&rows(&[30, 17, 20], 0), width, None, &[weight, bias], &pass);
        }
    }

    #[test]
    fn linear() {
        for (width, out) in [(8, 24), (33, 7), (64, 1)] {
            let (weight, bias) = (variable(4, width, out), variable(5, 0, out));
            let pass = pass!(
                |ops, x| ops.linear(&x, Linear { weight, bias }),
                weight: Tensor = weight.clone(), bias: Tensor = bias.clone()
            );
            check(&rows(&[30, 17, 20], 0), width, None, &[weight, bias], &pass);
        }
    }

    #[test]
    fn rms_norm() {
        for width in [8, 33, 192] {
            let weight = variable(4, 0, width);
            let pass = pass!(|ops, x| ops.rms_norm(&x, weight, 1e-5), weight: Tensor = weight.clone());
            check(&rows(&[30, 17, 20], 0), width, None, &[weight], &pass);
        }
    }

    #[test]
    fn projections_side_by_side() {
        for (width, outs) in [(8, [8, 4, 4]), (33, [7, 1, 5]), (64, [96, 32, 32])] {
            let weights = [0, 1, 2].map(|i| variable(4 + i, outs[i as usize], width));
            let bias = variable(7, 0, outs[1]);
            let pass = pass!(
                |ops, x| {
                    let layer = |i: usize| Projection { weight: &weights[i], bias: (i == 1).then_some(bias) };
                    ops.project(&x, &[layer(0), layer(1), layer(2)])
                },
                weights: [Tensor; 3] = weights.clone(), bias: Tensor = bias.clone()
            );
            let leaves: Vec<Tensor> = weights.into_iter().chain([bias]).collect();
            check(&rows(&[30, 17, 20], 0), width, None, &leaves, &pass);
        }
    }

    #[test]
    fn a_projection_alone() {
        let (weight, bias) = (variable(4, 11, 12), variable(5, 0, 11));
        for biased in [false, true] {
            let pass = pass!(
                |ops, x| ops.project(&x, &[Projection { weight, bias: bias.as_ref() }]),
                weight: Tensor = weight.clone(), bias: Option<Tensor> = biased.then(|| bias.clone())
            );
            let leaves: Vec<Tensor> = [weight.clone()].into_iter().chain(biased.then(|| bias.clone())).collect();
            check(&rows(&[3, 5], 2), 12, None, &leaves, &pass);
        }
    }

    #[test]
    fn rotary_positions_of_some_heads() {
        for (heads, head_width) in [(1, 2), (2, 6), (3, 16)] {
            let angles = (variable(9, 64, head_width) * 1.0).unwrap().detach();
            // Two heads more that stay as they are.
            let width = (heads + 2) * head_width;
            let pass = pass!(
                |ops, x| ops.rotary(x, Rotary { heads: *heads, head_width: *head_width, angles }),
                heads: usize = heads, head_width: usize = head_width, angles: Tensor = angles
            );
            check(&rows(&[4, 1, 40], 2), width, None, &[], &pass);
        }
    }

    #[test]
    fn swiglu() {
        let [gate, up] = [4, 5].map(|seed| variable(seed, 20, 12));
        let pass = pass!(
            |ops, x| {
                let [gate, up] = [gate, up].map(|weight| Projection { weight, bias: None });
                let (gate, up) = (ops.project(&x, &[gate]).unwrap(), ops.project(&x, &[up]).unwrap());
                ops.swiglu(gate, up)
            },
            gate: Tensor = gate.clone(), up: Tensor = up.clone()
        );
        check(&rows(&[4, 9, 40], 0), 12, None, &[gate, up], &pass);
    }

    #[test]
    fn activations() {
        for activation in [Activation::GeluNew, Activation::Gelu, Activation::Relu] {
            let pass = pass!(|ops, x| ops.activation(x, *activation), activation: Activation = activation);
            check(&rows(&[4, 9], 0), 20, None, &[], &pass);
        }
    }

    #[test]
    fn a_residual_branch() {
        let (weight, bias) = (variable(4, 12, 12), variable(5, 0, 12));
        let pass = pass!(
            |ops, x| {
                let branch = ops.linear(&x, Linear { weight, bias }).unwrap();
                let branch = ops.dropout(branch, 0.2, 9).unwrap();
                ops.add(x, branch)
            },
            weight: Tensor = weight.clone(), bias: Tensor = bias.clone()
        );
        check(&rows(&[4, 1, 9], 3), 12, Some(DROPOUT), &[weight, bias], &pass);
    }

    #[test]
    fn attention_over_long_short_and_single_tokens() {
        for (heads, kv_heads, d) in [(1, 1, 2), (2, 2, 8), (3, 3, 16), (2, 2, 33), (4, 2, 8), (6, 2, 5), (3, 1, 16)] {
            for dropout in [None, Some(DROPOUT)] {
                let width = heads * d;
                // Small weights, so that no probability is 1.
                let weight = (variable(4, width, (heads + 2 * kv_heads) * d) * 0.3).unwrap();
                let weight = Var::from_tensor(&weight).unwrap().into_inner();
                let bias = variable(5, 0, (heads + 2 * kv_heads) * d);
                let attend =
                    Attend { layer: 0, heads, kv_heads, scale: 1.0 / (d as f32).sqrt(), dropout: 0.2, site: 5 };
                let pass = pass!(
                    |ops, x| {
                        let qkv = ops.linear(&x, Linear { weight, bias }).unwrap();
                        ops.attention(qkv, *attend)
                    },
                    weight: Tensor = weight.clone(), bias: Tensor = bias.clone(), attend: Attend = attend
                );
                check(&rows(&[1, 40, 16, 0, 33], 2), width, dropout, &[weight, bias], &pass);
            }
        }
    }

    #[test]
    fn frozen_weights_get_no_gradient_and_do_not_stop_that_of_the_prompt() {
        let [tokens, positions] = [variable(1, 5, 8), variable(2, 64, 8)].map(|t| t.detach());
        let (weight, bias) = (variable(4, 8, 8).detach(), variable(5, 0, 8).detach());
        let prompt = variable(3, 3, 8);
        let pass = pass!(
            |ops, x| {
                let y = ops.linear(&x, Linear { weight, bias }).unwrap();
                ops.text(y)
            },
            weight: Tensor = weight, bias: Tensor = bias
        );
        // Text rows see the prompt through attention only: here its gradient is zero, but it is there.
        let (_, gradients) = run(true, &rows(&[4, 2], 3), None, &[tokens, positions, prompt], &[], &pass);
        assert_eq!(gradients, [vec![0.0; 24]]);
    }

    #[test]
    fn a_weight_computed_from_a_variable_is_an_error() {
        let weight = (variable(4, 8, 8) * 2.0).unwrap();
        let bias = variable(5, 0, 8);
        let mut tape = Tape::new(Cpu, rows(&[3], 0), None);
        let x = tape.embed(&variable(1, 5, 8), Some(&variable(2, 64, 8)), None).unwrap();
        let error = tape.linear(&x, Linear { weight: &weight, bias: &bias }).err().unwrap();
        assert!(error.to_string().contains("computed from a variable"), "{error}");
    }
}
