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
pub(crate) mod rotary;
pub(crate) mod tape;

use candle_core::{Result, Tensor, bail};

use self::rotary::Rotary;
use crate::terms::activation::Activation;
use crate::weights::Weight;

/// Vectors of positions.
#[derive(Clone, Copy)]
pub(crate) struct Positions<'a> {
    /// `[P, C]`.
    pub(crate) table: &'a Tensor,
    /// Row of the table that belongs to position 0.
    pub(crate) first: usize,
}

impl<'a> Positions<'a> {
    /// A table that begins with position 0.
    pub(crate) fn new(table: &'a Tensor) -> Self {
        Positions { table, first: 0 }
    }
}

/// A layer norm: weight and bias, `[C]` each.
#[derive(Clone)]
pub(crate) struct LayerNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) eps: f32,
}

/// A root mean square norm: weight, `[C]`.
#[derive(Clone)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Tensor,
    pub(crate) eps: f32,
}

/// A linear layer: its matrix, and its bias `[out]` if it has one.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Tensor>,
    pub(crate) layout: Layout,
}

/// How the matrix of a linear layer lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[in, out]`, as in GPT-2's checkpoints.
    InOut,
    /// `[out, in]`, as in all others.
    OutIn,
}

impl Layer {
    /// Channels that come out.
    pub(crate) fn outputs(&self) -> Result<usize> {
        let (rows, columns) = self.weight.dims2()?;
        Ok(if self.layout == Layout::InOut { columns } else { rows })
    }

    /// Channels that go in.
    pub(crate) fn inputs(&self) -> Result<usize> {
        let (rows, columns) = self.weight.dims2()?;
        Ok(if self.layout == Layout::InOut { rows } else { columns })
    }

    /// A layer `[out, in]` without a bias.
    fn thin(weight: &Tensor) -> Self {
        Layer { weight: Weight::new(weight.clone()), bias: None, layout: Layout::OutIn }
    }
}

/// Channels that come out of layers side by side, and that go into each.
///
/// Errors when they do not take the same.
pub(crate) fn side_by_side(layers: &[Layer]) -> Result<(usize, usize)> {
    let (mut width, mut depth) = (0, None);
    for layer in layers {
        let inputs = layer.inputs()?;
        if *depth.get_or_insert(inputs) != inputs {
            bail!("linear layers over other channels stand side by side");
        }
        width += layer.outputs()?;
    }
    Ok((width, depth.unwrap_or(0)))
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
    /// Positions that a query sees, its own and those before it; `None` is all.
    pub(crate) window: Option<usize>,
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
    fn embed(
        &mut self,
        tokens: &Weight,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> Result<Self::Array>;
    /// The vector of every row's position, `[N, C]`.
    fn positions(&mut self, positions: Positions<'_>) -> Result<Self::Array>;
    /// Layer norm of each row.
    fn layer_norm(&mut self, x: &Self::Array, norm: &LayerNorm) -> Result<Self::Array>;
    /// Root mean square norm, times the weight: of each row, or where the weight is shorter, of each head of a row, as many
    /// channels as the weight has.
    fn rms_norm(&mut self, x: &Self::Array, norm: &RmsNorm) -> Result<Self::Array>;
    /// What linear layers make of `x`, side by side.
    fn side_by_side(&mut self, x: &Self::Array, layers: &[Layer]) -> Result<Self::Array>;
    /// What a linear layer makes of `x`.
    fn linear(&mut self, x: &Self::Array, layer: &Layer) -> Result<Self::Array> {
        self.side_by_side(x, std::slice::from_ref(layer))
    }
    /// The rows of several arrays side by side.
    fn join(&mut self, parts: Vec<Self::Array>) -> Result<Self::Array>;
    /// Of rows that are `[a, b, D]`, with `[a, b]` as given, rows that are `[b, a, D]`.
    fn regroup(&mut self, x: Self::Array, groups: [usize; 2]) -> Result<Self::Array>;
    /// Turns heads by the positions of their rows.
    fn rotary(&mut self, x: Self::Array, rotary: &Rotary) -> Result<Self::Array>;
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
    /// Of the rows of a batch those that are wanted: never those of a soft prompt.
    fn wanted(&mut self, x: Self::Array) -> Result<Self::Array>;
    /// Runs a block.
    fn block<T: Block>(&mut self, x: Self::Array, block: &T) -> Result<Self::Array> {
        block.forward(self, x)
    }
}

/// What comes out of some blocks, kept beside the result of a pass: of the rows that are wanted.
pub(crate) struct Taps<A> {
    layers: Vec<usize>,
    blocks: usize,
    kept: Vec<(usize, A)>,
}

impl<A> Taps<A> {
    /// Behind the blocks `layers`, counted from 0, in any order.
    pub(crate) fn new(layers: &[usize]) -> Self {
        Taps { layers: layers.to_vec(), blocks: 0, kept: Vec::new() }
    }

    /// Counts a block; whether its result is to be kept, and under which number.
    fn next(&mut self) -> Option<usize> {
        self.blocks += 1;
        let block = self.blocks - 1;
        self.layers.contains(&block).then_some(block)
    }

    /// What was kept, in the order of the blocks.
    fn take(&mut self) -> Vec<A> {
        std::mem::take(&mut self.kept).into_iter().map(|(_, kept)| kept).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::collect::{collect, merge};
    use super::cpu::Cpu;
    use super::plain::Plain;
    use super::*;
    use crate::batch::{Input, Packed};
    use crate::host::change;
    use crate::kernels::testing::{numbers, with_threads, written};
    use crate::terms::dropout::Dropout;
    use crate::terms::format::Format;
    use crate::weights::encoded::{Bytes, Encoded};
    use crate::weights::low_rank::LowRank;

    type Tape = tape::Tape<Cpu>;

    const DROPOUT: Dropout = Dropout { seed: 11, update: 3, purpose: 0x100 };

    fn variable(seed: u64, rows: usize, columns: usize) -> Tensor {
        let shape: Vec<usize> = if rows == 0 { vec![columns] } else { vec![rows, columns] };
        let values = numbers(seed, rows.max(1) * columns);
        Var::from_vec(values, shape, &Device::Cpu).unwrap().into_inner()
    }

    fn rows(lengths: &[usize], prompt: usize) -> Packed {
        let mut batch = Packed::new();
        for (i, length) in lengths.iter().enumerate() {
            let ids: Vec<u32> = (0..*length as u32).map(|t| (t * 7 + i as u32) % 5).collect();
            batch.push(i as u64 + 40, &ids);
        }
        batch.behind_prompt(prompt)
    }

    /// Value, gradient of the input vectors and gradients of `weights`, of a random weighted sum of what `pass` computes
    /// from embedded rows.
    fn run(
        fused: bool,
        rows: &Packed,
        dropout: Option<Dropout>,
        inputs: &[Tensor; 3],
        weights: &[Tensor],
        pass: &dyn Pass,
    ) -> (Vec<f32>, Vec<Vec<f32>>) {
        let [tokens, table, prompt] = inputs;
        let positions = Positions { table, first: 2 };
        let prompted = rows.inputs.iter().any(|i| matches!(i, Input::Prompt(_))).then_some(prompt);
        let out = if fused {
            let mut tape = Tape::new(Cpu, rows.clone(), dropout);
            let x = tape.embed(&Weight::new(tokens.clone()), Some(positions), prompted).unwrap();
            let result = pass.tape(&mut tape, x);
            tape.finish(result, Some(tokens), prompted).unwrap()
        } else {
            let mut plain = Plain::new(rows, dropout);
            let x = plain.embed(&Weight::new(tokens.clone()), Some(positions), prompted).unwrap();
            pass.plain(&mut plain, x)
        };
        let factors = Tensor::from_vec(numbers(77, out.elem_count()), out.shape(), &Device::Cpu).unwrap();
        let loss = (&out * factors).unwrap().sum_all().unwrap();
        let (mut store, mut collected) = collect(&loss).unwrap();
        let leaves = [tokens, table].into_iter().chain(prompted).chain(weights);
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
    fn check(rows: &Packed, width: usize, dropout: Option<Dropout>, weights: &[Tensor], pass: &dyn Pass) {
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
            check(&rows, 12, None, &[], &pass!(|ops, x| ops.wanted(x),));
            check(&rows, 12, Some(DROPOUT), &[], &pass!(|ops, x| ops.dropout(x, 0.3, 2),));
        }
    }

    #[test]
    fn layer_norm() {
        for width in [8, 33, 192] {
            let (weight, bias) = (variable(4, 0, width), variable(5, 0, width));
            let norm = LayerNorm { weight: weight.clone(), bias: bias.clone(), eps: 1e-5 };
            let pass = pass!(|ops, x| ops.layer_norm(&x, norm), norm: LayerNorm = norm);
            check(&rows(&[30, 17, 20], 0), width, None, &[weight, bias], &pass);
        }
    }

    #[test]
    fn rms_norm() {
        for width in [8, 33, 192] {
            let weight = variable(4, 0, width);
            let norm = RmsNorm { weight: weight.clone(), eps: 1e-5 };
            let pass = pass!(|ops, x| ops.rms_norm(&x, norm), norm: RmsNorm = norm);
            check(&rows(&[30, 17, 20], 0), width, None, &[weight], &pass);
        }
    }

    #[test]
    fn rms_norm_of_heads() {
        for (heads, width) in [(1, 8), (3, 11), (6, 32)] {
            let weight = variable(4, 0, width);
            let norm = RmsNorm { weight: weight.clone(), eps: 1e-5 };
            let pass = pass!(|ops, x| ops.rms_norm(&x, norm), norm: RmsNorm = norm);
            check(&rows(&[30, 17, 20], 0), heads * width, None, &[weight], &pass);
        }
    }

    #[test]
    fn vectors_of_positions_that_are_added_later() {
        let table = variable(4, 64, 12);
        let pass = pass!(
            |ops, x| {
                let positions = ops.positions(Positions { table, first: 2 }).unwrap();
                ops.add(x, positions)
            },
            table: Tensor = table.clone()
        );
        check(&rows(&[4, 1, 9], 3), 12, None, &[table], &pass);
    }

    #[test]
    fn arrays_side_by_side_and_heads_in_another_order() {
        let weights = [4, 5].map(|seed| variable(seed, 7, 12));
        let layers = weights.each_ref().map(|weight| layer(weight, None, Layout::OutIn));
        let pass = pass!(
            |ops, x| {
                let [a, b] = layers.each_ref().map(|layer| ops.linear(&x, layer).unwrap());
                let all = ops.join(vec![a, x, b]).unwrap(); // [N, 7 + 12 + 7]
                let all = ops.join(vec![all]).unwrap();
                ops.regroup(all, [2, 13])
            },
            layers: [Layer; 2] = layers
        );
        check(&rows(&[4, 9, 40], 2), 12, None, &weights, &pass);
        for groups in [[3, 4], [4, 3], [1, 6], [2, 2]] {
            let pass = pass!(|ops, x| ops.regroup(x, *groups), groups: [usize; 2] = groups);
            check(&rows(&[4, 9], 0), 24, None, &[], &pass);
        }
    }

    fn layer(weight: &Tensor, bias: Option<&Tensor>, layout: Layout) -> Layer {
        Layer { weight: Weight::new(weight.clone()), bias: bias.cloned(), layout }
    }

    /// A matrix from `inputs` to `outputs` channels.
    fn matrix(seed: u64, inputs: usize, outputs: usize, layout: Layout) -> Tensor {
        match layout {
            Layout::InOut => variable(seed, inputs, outputs),
            Layout::OutIn => variable(seed, outputs, inputs),
        }
    }

    #[test]
    fn a_layer_alone() {
        for (width, out) in [(8, 24), (33, 7), (64, 1), (12, 11)] {
            for (layout, biased) in [Layout::InOut, Layout::OutIn].into_iter().flat_map(|l| [(l, false), (l, true)]) {
                let (weight, bias) = (matrix(4, width, out, layout), biased.then(|| variable(5, 0, out)));
                let layer = layer(&weight, bias.as_ref(), layout);
                let pass = pass!(|ops, x| ops.linear(&x, layer), layer: Layer = layer);
                let leaves: Vec<Tensor> = [weight].into_iter().chain(bias).collect();
                check(&rows(&[30, 17, 20], 2), width, None, &leaves, &pass);
            }
        }
    }

    /// A frozen matrix `[rows, columns]` in a format, and its decoded twin.
    fn encoded(format: Format, seed: u64, rows: usize, columns: usize) -> [Weight; 2] {
        let (bytes, _) = written(format, numbers(seed, rows * columns));
        let matrix = Encoded::new(format, rows, columns, Bytes::Owned(bytes.into())).unwrap();
        let dense = Weight::new(matrix.tensor(&Device::Cpu).unwrap());
        [Weight::encoded_on(matrix, &Device::Cpu), dense]
    }

    #[test]
    fn what_is_kept_encoded_computes_and_leads_back_as_its_decoded_twin_to_the_bit() {
        let batch = rows(&[30, 17, 20], 3);
        let (width, prompt) = (256, variable(3, 3, 256));
        for format in Format::ALL {
            let [table, dense_table] = encoded(format, 7, 5, width);
            // More rows than are decoded at once.
            let ([q, dense_q], [k, dense_k]) = (encoded(format, 8, 600, width), encoded(format, 9, 33, width));
            let bias = variable(5, 0, 33);
            // What is trained on top of it.
            let (a, b) = (variable(21, 4, width), variable(22, 600, 4));
            let low_rank = LowRank { a, b, scale: 0.5, dropout: 0.0, site: 1 << 31 };
            let run = |table: &Weight, q: &Weight, k: &Weight| {
                let q = &q.with_low_rank(low_rank.clone());
                let layer = |weight: &Weight, bias: Option<&Tensor>| Layer {
                    weight: weight.clone(),
                    bias: bias.cloned(),
                    layout: Layout::OutIn,
                };
                let mut tape = Tape::new(Cpu, batch.clone(), None);
                let x = tape.embed(table, None, Some(&prompt)).unwrap();
                let out = tape.side_by_side(&x, &[layer(q, None), layer(k, Some(&bias))]).unwrap();
                let out = tape.finish(out, Some(&bias), Some(&prompt)).unwrap();
                let factors = Tensor::from_vec(numbers(77, out.elem_count()), out.shape(), &Device::Cpu).unwrap();
                let (store, mut rest) = collect(&(&out * factors).unwrap().sum_all().unwrap()).unwrap();
                let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let trained = [&low_rank.a, &low_rank.b].map(|part| {
                    let parts = rest.remove(&part.id()).unwrap();
                    flat(&merge(None, parts, part).unwrap().unwrap())
                });
                (flat(&out), flat(store.get(&prompt).unwrap()), trained)
            };
            assert!(run(&table, &q, &k) == run(&dense_table, &dense_q, &dense_k), "{format}");
        }
    }

    #[test]
    fn layers_side_by_side() {
        use Layout::{InOut, OutIn};
        for (width, outs) in [(8, [8, 4, 4]), (33, [7, 1, 5]), (64, [96, 32, 32])] {
            for layouts in [[OutIn; 3], [InOut; 3], [OutIn, InOut, OutIn]] {
                let weights = [0, 1, 2].map(|i| matrix(4 + i, width, outs[i as usize], layouts[i as usize]));
                let bias = variable(7, 0, outs[1]);
                let layers = [0, 1, 2].map(|i| layer(&weights[i], (i == 1).then_some(&bias), layouts[i]));
                let pass = pass!(|ops, x| ops.side_by_side(&x, layers), layers: [Layer; 3] = layers);
                let leaves: Vec<Tensor> = weights.into_iter().chain([bias]).collect();
                check(&rows(&[30, 17, 20], 0), width, None, &leaves, &pass);
            }
        }
    }

    #[test]
    fn layers_over_other_channels_do_not_stand_side_by_side() {
        let layers = [8, 9].map(|inputs| layer(&variable(1, 4, inputs), None, Layout::OutIn));
        assert!(side_by_side(&layers).unwrap_err().to_string().contains("over other channels"));
    }

    #[test]
    fn rotary_positions_of_some_heads() {
        for (heads, head_width, turned) in [(1, 2, 2), (2, 6, 6), (3, 16, 16), (2, 6, 2), (3, 16, 4)] {
            let angles = (variable(9, 64, turned) * 1.0).unwrap().detach();
            // Two heads more that stay as they are.
            let width = (heads + 2) * head_width;
            let rotary = Rotary { heads, head_width, turned, angles };
            let pass = pass!(|ops, x| ops.rotary(x, rotary), rotary: Rotary = rotary);
            check(&rows(&[4, 1, 40], 2), width, None, &[], &pass);
        }
    }

    #[test]
    fn swiglu() {
        let weights = [4, 5].map(|seed| variable(seed, 20, 12));
        let layers = weights.each_ref().map(|weight| layer(weight, None, Layout::OutIn));
        let pass = pass!(
            |ops, x| {
                let [gate, up] = layers.each_ref().map(|layer| ops.linear(&x, layer).unwrap());
                ops.swiglu(gate, up)
            },
            layers: [Layer; 2] = layers
        );
        check(&rows(&[4, 9, 40], 0), 12, None, &weights, &pass);
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
                let branch = ops.linear(&x, layer).unwrap();
                let branch = ops.dropout(branch, 0.2, 9).unwrap();
                ops.add(x, branch)
            },
            layer: Layer = layer(&weight, Some(&bias), Layout::InOut)
        );
        check(&rows(&[4, 1, 9], 3), 12, Some(DROPOUT), &[weight, bias], &pass);
    }

    #[test]
    fn attention_over_long_short_and_single_tokens() {
        for (heads, kv_heads, d) in [(1, 1, 2), (2, 2, 8), (3, 3, 16), (2, 2, 33), (4, 2, 8), (6, 2, 5), (3, 1, 16)] {
            for (dropout, window) in
                [None, Some(DROPOUT)].into_iter().flat_map(|d| [None, Some(1), Some(5), Some(37)].map(|w| (d, w)))
            {
                let width = heads * d;
                // Small weights, so that no probability is 1.
                let weight = (variable(4, width, (heads + 2 * kv_heads) * d) * 0.3).unwrap();
                let weight = Var::from_tensor(&weight).unwrap().into_inner();
                let bias = variable(5, 0, (heads + 2 * kv_heads) * d);
                let attend =
                    Attend { layer: 0, heads, kv_heads, scale: 1.0 / (d as f32).sqrt(), window, dropout: 0.2, site: 5 };
                let pass = pass!(
                    |ops, x| {
                        let qkv = ops.linear(&x, layer).unwrap();
                        ops.attention(qkv, *attend)
                    },
                    layer: Layer = layer(&weight, Some(&bias), Layout::InOut), attend: Attend = attend
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
                let y = ops.linear(&x, layer).unwrap();
                ops.wanted(y)
            },
            layer: Layer = layer(&weight, Some(&bias), Layout::InOut)
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
        let x = tape.embed(&Weight::new(variable(1, 5, 8)), Some(Positions::new(&variable(2, 64, 8))), None).unwrap();
        let error = tape.linear(&x, &layer(&weight, Some(&bias), Layout::InOut)).err().unwrap();
        assert!(error.to_string().contains("computed from a variable"), "{error}");
    }
}
