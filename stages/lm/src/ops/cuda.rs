//! [`Backend`] by the kernels of [`kernels::cuda`](crate::kernels::cuda), on `f32` or `bf16` in a GPU's memory.
//!
//! Weights are `f32` tensors, or tensors of the type that is computed in; matrices of another type are converted once a
//! pass. Biases, weights of norms and all gradients of weights are f32. Nothing here waits for the device.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DevicePtr};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, InplaceOp1, Layout as TensorLayout, Result, Shape, Storage, StorageRef,
    Tensor, TensorId, WithDType, bail,
};

use super::backend::Backend;
use super::rotary::Rotary;
use super::{Layer, LayerNorm, Layout, Positions, RmsNorm, side_by_side};
use crate::batch::{Input, Packed};
use crate::host::contiguous;
use crate::kernels::attention::Attention;
use crate::kernels::cuda::attention::{self, Heads, Sequences};
use crate::kernels::cuda::embed::{self, Groups, Tables};
use crate::kernels::cuda::matmul::{Matrix, Scalar, product, product_into_columns};
use crate::kernels::cuda::norm::{self, Kind};
use crate::kernels::cuda::{Mask, elementwise, rope, row_keys, rows as row_kernels, unset, upload};
use crate::kernels::rope::Turn;
use crate::terms::activation::Activation;
use crate::terms::dropout::Dropout;
use crate::weights::Weight;

/// What a GPU computes in.
pub(crate) trait Number: Scalar + CudaDType + WithDType {}

impl<T: Scalar + CudaDType + WithDType> Number for T {}

/// A GPU, and what it has been told of the batch that it computes.
#[derive(Clone)]
pub(crate) struct Cuda<T> {
    device: CudaDevice,
    batch: Arc<Batch>,
    /// Weights that were converted.
    converted: Arc<Mutex<HashMap<TensorId, Arc<CudaSlice<T>>>>>,
}

/// The rows of a pass on the device.
struct Batch {
    inputs: CudaSlice<i32>,
    positions: CudaSlice<u32>,
    /// What dropout is keyed by.
    keys: CudaSlice<u32>,
    /// The same of the rows that are wanted, where not all are.
    wanted_keys: Option<CudaSlice<u32>>,
    sequences: Sequences,
    /// Rows that are wanted.
    wanted: Option<CudaSlice<u32>>,
}

impl<T: Number> Cuda<T> {
    /// For passes over a batch.
    pub(crate) fn new(device: &CudaDevice, rows: &Packed) -> Result<Self> {
        let keys = row_keys(&rows.segments, &rows.rows);
        let key = |row: &u32| [keys[2 * *row as usize], keys[2 * *row as usize + 1]];
        let wanted_keys = rows.wanted.as_ref().map(|wanted| wanted.iter().flat_map(key).collect());
        let batch = Batch {
            wanted_keys: wanted_keys.map(|keys| upload(device, keys)).transpose()?,
            inputs: upload(device, rows.inputs.iter().map(|input| embed::code(*input)).collect())?,
            positions: upload(device, rows.positions.clone())?,
            keys: upload(device, keys)?,
            sequences: Sequences::new(device, &rows.segments, &rows.rows)?,
            wanted: rows.wanted.clone().map(|wanted| upload(device, wanted)).transpose()?,
        };
        Ok(Cuda { device: device.clone(), batch: Arc::new(batch), converted: Arc::default() })
    }

    /// For passes over other rows, with the same weights.
    pub(crate) fn over(&self, rows: &Packed) -> Result<Self> {
        Ok(Cuda { converted: self.converted.clone(), ..Cuda::new(&self.device, rows)? })
    }

    /// The position of every row.
    pub(crate) fn row_positions(&self) -> &CudaSlice<u32> {
        &self.batch.positions
    }

    /// The vectors of coded inputs and, where they have some, of their positions, added.
    pub(crate) fn embed_inputs(
        &self,
        inputs: &impl DevicePtr<i32>,
        at: &impl DevicePtr<u32>,
        tokens: &Tensor,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> Result<CudaSlice<T>> {
        let width = tokens.dim(1)?;
        let mut out = self.unset(inputs.len() * width)?;
        self.matrix(tokens, |tokens| {
            self.matrix_if(positions.map(|positions| positions.table), |table| {
                // From the row of position 0 on.
                let first = positions.map_or(0, |positions| positions.first);
                let table = table.map(|table| table.slice(first * width..));
                self.matrix_if(prompt, |prompt| {
                    let tables = Tables { tokens, prompt, positions: table.as_ref() };
                    embed::embed(&self.device, &mut out, inputs, at, tables, width)
                })
            })
        })?;
        Ok(out)
    }

    fn matrix_if<R>(
        &self,
        weight: Option<&Tensor>,
        f: impl FnOnce(Option<&CudaView<'_, T>>) -> Result<R>,
    ) -> Result<R> {
        match weight {
            Some(weight) => self.matrix(weight, |weight| f(Some(weight))),
            None => f(None),
        }
    }

    /// Turns heads by the positions `at`.
    pub(crate) fn rotate_at(
        &self,
        x: &mut CudaSlice<T>,
        at: &impl DevicePtr<u32>,
        width: usize,
        rotary: &Rotary,
        turn: Turn,
    ) -> Result<()> {
        let Rotary { heads, head_width, turned, ref angles } = *rotary;
        view(angles, |angles: &CudaView<'_, f32>| {
            rope::rope(&self.device, x, at, angles, heads, head_width, turned, width, turn == Turn::Back)
        })
    }

    /// The vectors of the positions `at`.
    pub(crate) fn positions_at(&self, at: &impl DevicePtr<u32>, positions: Positions<'_>) -> Result<CudaSlice<T>> {
        let Positions { table, first } = positions;
        let width = table.dim(1)?;
        let mut out = self.unset(at.len() * width)?;
        self.matrix(table, |table| {
            // From the row of position 0 on.
            row_kernels::gather(&self.device, &mut out, &table.slice(first * width..), at, width)
        })?;
        Ok(out)
    }

    fn unset(&self, length: usize) -> Result<CudaSlice<T>> {
        unset(&self.device, length)
    }

    fn wanted(&self) -> Result<&CudaSlice<u32>> {
        match &self.batch.wanted {
            Some(wanted) => Ok(wanted),
            None => bail!("rows selected from a batch of which all are wanted"),
        }
    }

    /// A mask of `count` rows: all, or those that are wanted.
    fn mask(&self, count: usize, dropout: &Dropout, rate: f32, site: u32) -> Mask<'_> {
        let Batch { keys, wanted_keys, .. } = &*self.batch;
        let keys = wanted_keys.as_ref().filter(|keys| keys.len() == 2 * count).unwrap_or(keys);
        Mask { dropout: *dropout, rate, site, keys }
    }

    /// The norm of each row, a layer norm where there is a bias, and what its way back wants to know.
    fn norm(
        &self,
        x: &CudaSlice<T>,
        weight: &Tensor,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Result<(CudaSlice<T>, CudaSlice<f32>)> {
        let mut out = self.unset(x.len())?;
        let mut moments = unset(&self.device, 2 * x.len() / weight.elem_count())?;
        view(weight, |weight| {
            view_if(bias, |bias| norm::forward(&self.device, &mut out, &mut moments, x, weight, bias, eps))
        })?;
        Ok((out, moments))
    }

    /// Adds the gradient of `x` to `dx`; gives those of weight and, of a layer norm, bias where `parameters`.
    #[expect(clippy::too_many_arguments, reason = "what goes in and what comes out")]
    fn norm_backward(
        &self,
        kind: Kind,
        dx: &mut CudaSlice<T>,
        x: &CudaSlice<T>,
        weight: &Tensor,
        moments: &CudaSlice<f32>,
        dy: &CudaSlice<T>,
        parameters: bool,
    ) -> Result<Option<(Tensor, Option<Tensor>)>> {
        view(weight, |weight| norm::backward(&self.device, kind, dx, x, weight, moments, dy))?;
        if !parameters {
            return Ok(None);
        }
        let width = weight.elem_count();
        let mut dweight = unset(&self.device, width)?;
        let mut dbias = (kind == Kind::Layer).then(|| unset(&self.device, width)).transpose()?;
        norm::backward_parameters(&self.device, &mut dweight, dbias.as_mut(), x, moments, dy)?;
        let vector = |values| tensor(&self.device, values, width);
        Ok(Some((vector(dweight), dbias.map(vector))))
    }

    /// Writes `x W^T` to the columns of `out`, `[N, width]`, from `first` on, or adds it to what is there.
    fn product_into(
        &self,
        out: &mut CudaSlice<T>,
        width: usize,
        first: usize,
        x: &CudaSlice<T>,
        layer: &Layer,
        adds: bool,
    ) -> Result<()> {
        let (inputs, outputs) = (layer.inputs()?, layer.outputs()?);
        self.matrix(layer.weight.tensor()?, |weight| {
            let weight = match layer.layout {
                Layout::InOut => Matrix::new(weight, outputs),
                Layout::OutIn => Matrix::new(weight, inputs).transposed(),
            };
            product_into_columns(&self.device, out, width, first, Matrix::new(x, inputs), weight, adds)
        })
    }

    /// The biases of layers side by side, zeros where one has none, `[width]`.
    fn biases(&self, layers: &[Layer], width: usize) -> Result<CudaSlice<f32>> {
        let mut all = self.device.alloc_zeros::<f32>(width)?;
        let mut first = 0;
        for layer in layers {
            let outputs = layer.outputs()?;
            if let Some(bias) = &layer.bias {
                view(bias, |bias: &CudaView<'_, f32>| {
                    self.device.memcpy_dtod(bias, &mut all.slice_mut(first..first + outputs))
                })?;
            }
            first += outputs;
        }
        Ok(all)
    }

    /// Lets `f` read a matrix of weights in the type that is computed in.
    pub(crate) fn matrix<R>(&self, weight: &Tensor, f: impl FnOnce(&CudaView<'_, T>) -> Result<R>) -> Result<R> {
        if weight.dtype() == T::DTYPE {
            return view(weight, f);
        }
        let known = self.converted.lock().expect("nothing panics while it is held").get(&weight.id()).cloned();
        let converted = match known {
            Some(known) => known,
            None => {
                let converted = Arc::new(converted(&self.device, weight)?);
                self.converted.lock().expect("nothing panics while it is held").insert(weight.id(), converted.clone());
                converted
            }
        };
        f(&converted.as_view())
    }
}

impl<T: Number> Backend for Cuda<T> {
    type Buffer = CudaSlice<T>;
    type Moments = CudaSlice<f32>;
    /// The result, and the logarithm of each softmax' denominator, `[H, N]`.
    type Attended = (Arc<CudaSlice<T>>, CudaSlice<f32>);

    fn len(buffer: &CudaSlice<T>) -> usize {
        buffer.len()
    }

    fn zeros(&self, length: usize) -> Result<CudaSlice<T>> {
        self.device.alloc_zeros(length)
    }

    fn copy(&self, x: &CudaSlice<T>) -> Result<CudaSlice<T>> {
        let mut copy = self.unset(x.len())?;
        self.device.memcpy_dtod(x, &mut copy)?;
        Ok(copy)
    }

    fn buffer(&self, tensor: &Tensor) -> Result<CudaSlice<T>> {
        view(tensor, |x| {
            let mut copy = self.unset(x.len())?;
            self.device.memcpy_dtod(x, &mut copy)?;
            Ok(copy)
        })
    }

    fn tensor(&self, x: CudaSlice<T>, shape: Shape) -> Result<Tensor> {
        Ok(tensor(&self.device, x, shape))
    }

    fn storage(&self, x: CudaSlice<T>) -> Result<Storage> {
        Ok(Storage::Cuda(CudaStorage::wrap_cuda_slice(x, self.device.clone())))
    }

    fn embed(
        &self,
        _batch: &Packed,
        tokens: &Weight,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> Result<CudaSlice<T>> {
        self.embed_inputs(&self.batch.inputs, &self.batch.positions, tokens.tensor()?, positions, prompt)
    }

    fn embed_backward_prompt(&self, rows: &Packed, dy: &CudaSlice<T>, width: usize, shape: Shape) -> Result<Tensor> {
        let places = rows.inputs.iter().zip(0u32..).filter_map(|(input, row)| match input {
            Input::Token(_) => None,
            Input::Prompt(i) => Some((row, *i)),
        });
        let groups = Groups::new(&self.device, places)?;
        let mut gradient = self.device.alloc_zeros::<f32>(shape.elem_count())?;
        embed::add_groups(&self.device, &mut gradient, dy, &groups, width)?;
        Ok(tensor(&self.device, gradient, shape))
    }

    fn positions(&self, _batch: &Packed, positions: Positions<'_>) -> Result<CudaSlice<T>> {
        self.positions_at(&self.batch.positions, positions)
    }

    fn layer_norm(&self, x: &CudaSlice<T>, norm: &LayerNorm) -> Result<(CudaSlice<T>, CudaSlice<f32>)> {
        self.norm(x, &norm.weight, Some(&norm.bias), norm.eps)
    }

    fn layer_norm_backward(
        &self,
        dx: &mut CudaSlice<T>,
        x: &CudaSlice<T>,
        weight: &Tensor,
        moments: &CudaSlice<f32>,
        dy: &CudaSlice<T>,
        parameters: bool,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let gradients = self.norm_backward(Kind::Layer, dx, x, weight, moments, dy, parameters)?;
        Ok(gradients.and_then(|(dweight, dbias)| Some(dweight).zip(dbias)))
    }

    fn rms_norm(&self, x: &CudaSlice<T>, norm: &RmsNorm) -> Result<(CudaSlice<T>, CudaSlice<f32>)> {
        self.norm(x, &norm.weight, None, norm.eps)
    }

    fn rms_norm_backward(
        &self,
        dx: &mut CudaSlice<T>,
        x: &CudaSlice<T>,
        weight: &Tensor,
        moments: &CudaSlice<f32>,
        dy: &CudaSlice<T>,
        parameters: bool,
    ) -> Result<Option<Tensor>> {
        let gradients = self.norm_backward(Kind::Rms, dx, x, weight, moments, dy, parameters)?;
        Ok(gradients.map(|(dweight, _)| dweight))
    }

    fn linear(&self, x: &CudaSlice<T>, layers: &[Layer]) -> Result<CudaSlice<T>> {
        let (width, depth) = side_by_side(layers)?;
        let mut out = self.unset(x.len() / depth * width)?;
        let mut first = 0;
        for layer in layers {
            self.product_into(&mut out, width, first, x, layer, false)?;
            first += layer.outputs()?;
        }
        if let [Layer { bias: Some(bias), .. }] = layers {
            view(bias, |bias| elementwise::bias_dropout(&self.device, &mut out, Some(bias), None, width))?;
        } else if layers.iter().any(|layer| layer.bias.is_some()) {
            let biases = self.biases(layers, width)?;
            elementwise::bias_dropout(&self.device, &mut out, Some(&biases.as_view()), None, width)?;
        }
        Ok(out)
    }

    fn linear_add(
        &self,
        out: &mut CudaSlice<T>,
        channels: usize,
        first: usize,
        x: &CudaSlice<T>,
        layer: &Layer,
    ) -> Result<()> {
        self.product_into(out, channels, first, x, layer, true)
    }

    fn linear_backward_input(
        &self,
        dy: &CudaSlice<T>,
        channels: usize,
        first: usize,
        layers: &[Layer],
    ) -> Result<CudaSlice<T>> {
        let (_, depth) = side_by_side(layers)?;
        let mut dx = self.unset(dy.len() / channels * depth)?;
        let mut column = first;
        for layer in layers {
            let (inputs, outputs) = (layer.inputs()?, layer.outputs()?);
            self.matrix(layer.weight.tensor()?, |weight| {
                let weight = match layer.layout {
                    Layout::InOut => Matrix::new(weight, outputs).transposed(),
                    Layout::OutIn => Matrix::new(weight, inputs),
                };
                let dy = Matrix::part(dy, channels, column, outputs);
                product(&self.device, &mut dx, dy, weight, column > first)
            })?;
            column += outputs;
        }
        Ok(dx)
    }

    fn linear_backward_weight(
        &self,
        x: &CudaSlice<T>,
        dy: &CudaSlice<T>,
        channels: usize,
        first: usize,
        layer: &Layer,
    ) -> Result<Tensor> {
        let (depth, width) = (layer.inputs()?, layer.outputs()?);
        let mut dweight = unset::<f32>(&self.device, width * depth)?;
        let (x, gradient) = (Matrix::new(x, depth), Matrix::part(dy, channels, first, width));
        match layer.layout {
            Layout::InOut => product(&self.device, &mut dweight, x.transposed(), gradient, false)?,
            Layout::OutIn => product(&self.device, &mut dweight, gradient.transposed(), x, false)?,
        }
        Ok(tensor(&self.device, dweight, layer.weight.dims2()?))
    }

    fn linear_backward_biases(&self, dy: &CudaSlice<T>, biases: &[(usize, bool)]) -> Result<Vec<Option<Tensor>>> {
        let channels = biases.iter().map(|(width, _)| width).sum();
        let mut sums = unset::<f32>(&self.device, channels)?;
        row_kernels::sum_rows(&self.device, &mut sums, dy)?;
        if let [(_, true)] = biases {
            return Ok(vec![Some(tensor(&self.device, sums, channels))]);
        }
        let mut first = 0;
        let gradient = |(width, wanted): &(usize, bool)| {
            let columns = sums.slice(first..first + width);
            first += width;
            if !wanted {
                return Ok(None);
            }
            let mut gradient = unset::<f32>(&self.device, *width)?;
            self.device.memcpy_dtod(&columns, &mut gradient)?;
            Ok(Some(tensor(&self.device, gradient, *width)))
        };
        biases.iter().map(gradient).collect()
    }

    fn join(&self, parts: &[(&CudaSlice<T>, usize)]) -> Result<CudaSlice<T>> {
        let width: usize = parts.iter().map(|(_, width)| width).sum();
        let mut out = self.unset(parts.iter().map(|(part, _)| part.len()).sum())?;
        let (rows, mut first) = (out.len() / width, 0);
        for (part, count) in parts {
            let place = &mut out.slice_mut(first..);
            row_kernels::copy_columns(&self.device, place, *part, [width, *count], *count, rows)?;
            first += count;
        }
        Ok(out)
    }

    fn columns(&self, x: &CudaSlice<T>, width: usize, first: usize, count: usize) -> Result<CudaSlice<T>> {
        let rows = x.len() / width;
        let mut out = self.unset(rows * count)?;
        row_kernels::copy_columns(&self.device, &mut out, &x.slice(first..), [count, width], count, rows)?;
        Ok(out)
    }

    fn regroup(&self, x: &CudaSlice<T>, width: usize, groups: [usize; 2]) -> Result<CudaSlice<T>> {
        let mut out = self.unset(x.len())?;
        row_kernels::regroup(&self.device, &mut out, x, groups, width)?;
        Ok(out)
    }

    fn rotate(&self, x: &mut CudaSlice<T>, width: usize, rotary: &Rotary, _batch: &Packed, turn: Turn) -> Result<()> {
        self.rotate_at(x, &self.batch.positions, width, rotary, turn)
    }

    fn attention(
        &self,
        qkv: &CudaSlice<T>,
        width: usize,
        spec: &Attention<'_>,
    ) -> Result<(Arc<CudaSlice<T>>, Self::Attended)> {
        let rows = qkv.len() / heads(width, spec).row();
        let mut out = self.unset(rows * width)?;
        let mut normalisers = unset(&self.device, rows * spec.heads)?;
        let (sequences, heads) = (&self.batch.sequences, heads(width, spec));
        attention::forward(&self.device, &mut out, &mut normalisers, qkv, sequences, heads, spec.dropout)?;
        let out = Arc::new(out);
        Ok((out.clone(), (out, normalisers)))
    }

    fn attention_backward(
        &self,
        qkv: &CudaSlice<T>,
        (out, normalisers): &Self::Attended,
        dy: &CudaSlice<T>,
        width: usize,
        spec: &Attention<'_>,
    ) -> Result<CudaSlice<T>> {
        let mut gradient = self.unset(qkv.len())?;
        attention::backward(
            &self.device,
            &mut gradient,
            qkv,
            &**out,
            dy,
            normalisers,
            &self.batch.sequences,
            heads(width, spec),
            spec.dropout,
        )?;
        Ok(gradient)
    }

    fn activation(&self, x: &CudaSlice<T>, activation: Activation) -> Result<CudaSlice<T>> {
        let mut out = self.unset(x.len())?;
        elementwise::activation(&self.device, &mut out, x, activation)?;
        Ok(out)
    }

    fn activation_backward(&self, dy: &mut CudaSlice<T>, x: &CudaSlice<T>, activation: Activation) -> Result<()> {
        elementwise::activation_backward(&self.device, dy, x, activation)
    }

    fn swiglu(&self, gate: &CudaSlice<T>, up: &CudaSlice<T>) -> Result<CudaSlice<T>> {
        let mut out = self.unset(gate.len())?;
        elementwise::swiglu(&self.device, &mut out, gate, up)?;
        Ok(out)
    }

    fn swiglu_backward(&self, gate: &mut CudaSlice<T>, up: &mut CudaSlice<T>, dy: &CudaSlice<T>) -> Result<()> {
        let (mut dgate, mut dup) = (self.unset(dy.len())?, self.unset(dy.len())?);
        elementwise::swiglu_backward(&self.device, &mut dgate, &mut dup, dy, gate, up)?;
        (*gate, *up) = (dgate, dup);
        Ok(())
    }

    fn add(&self, x: &mut CudaSlice<T>, y: &CudaSlice<T>) -> Result<()> {
        elementwise::add(&self.device, x, y)
    }

    fn dropout(
        &self,
        x: &mut CudaSlice<T>,
        width: usize,
        _batch: &Packed,
        dropout: &Dropout,
        rate: f32,
        site: u32,
    ) -> Result<()> {
        let mask = self.mask(x.len() / width, dropout, rate, site);
        elementwise::bias_dropout(&self.device, x, None, Some(mask), width)
    }

    fn select(&self, x: &CudaSlice<T>, width: usize, rows: &[u32]) -> Result<CudaSlice<T>> {
        let mut out = self.unset(rows.len() * width)?;
        row_kernels::gather(&self.device, &mut out, x, &self.wanted()?.slice(..rows.len()), width)?;
        Ok(out)
    }

    fn select_backward(&self, dy: &CudaSlice<T>, width: usize, rows: &[u32], count: usize) -> Result<CudaSlice<T>> {
        let mut dx = self.zeros(count * width)?;
        row_kernels::scatter(&self.device, &mut dx, dy, &self.wanted()?.slice(..rows.len()), width)?;
        Ok(dx)
    }
}

fn heads(width: usize, spec: &Attention<'_>) -> Heads {
    let Attention { heads: queries, kv_heads: keys, scale, window, .. } = *spec;
    Heads { queries, keys, width: width / queries, scale, window }
}

/// A buffer as a tensor.
pub(crate) fn tensor<T: CudaDType>(device: &CudaDevice, x: CudaSlice<T>, shape: impl Into<Shape>) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(x, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Lets `f` read the elements of a tensor on a GPU.
///
/// Errors when it is elsewhere, of another type, or not contiguous.
pub(crate) fn view<T: CudaDType, R>(tensor: &Tensor, f: impl FnOnce(&CudaView<'_, T>) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    f(&view_of(&storage, layout)?)
}

/// The same of a tensor's storage.
pub(crate) fn view_of<'a, T: CudaDType>(storage: &'a Storage, layout: &TensorLayout) -> Result<CudaView<'a, T>> {
    let Storage::Cuda(storage) = storage else { bail!("expected a tensor on a gpu, found one elsewhere") };
    Ok(storage.as_cuda_slice::<T>()?.slice(contiguous(layout)?))
}

/// As [`view`], of a tensor that need not be there.
fn view_if<T: CudaDType, R>(
    tensor: Option<&Tensor>,
    f: impl FnOnce(Option<&CudaView<'_, T>>) -> Result<R>,
) -> Result<R> {
    match tensor {
        Some(tensor) => view(tensor, |tensor| f(Some(tensor))),
        None => f(None),
    }
}

/// A tensor to compute with in `T`: its own elements, or converted ones.
pub(crate) enum Operand<'a, T> {
    Tensor(StorageRef<'a>, &'a TensorLayout),
    Own(CudaSlice<T>),
}

impl<'a, T: Number> Operand<'a, T> {
    pub(crate) fn of(device: &CudaDevice, tensor: &'a Tensor) -> Result<Self> {
        if tensor.dtype() != T::DTYPE {
            return Ok(Operand::Own(converted(device, tensor)?));
        }
        let (storage, layout) = tensor.storage_and_layout();
        Ok(Operand::Tensor(storage, layout))
    }

    pub(crate) fn view(&self) -> Result<CudaView<'_, T>> {
        match self {
            Operand::Tensor(storage, layout) => view_of(storage, layout),
            Operand::Own(slice) => Ok(slice.as_view()),
        }
    }
}

/// The elements of a tensor on a GPU, f32 or bf16, converted.
pub(crate) fn converted<T: Number>(device: &CudaDevice, from: &Tensor) -> Result<CudaSlice<T>> {
    let mut out = unset(device, from.elem_count())?;
    if from.dtype() == f32::DTYPE {
        view(from, |from: &CudaView<'_, f32>| elementwise::cast(device, &mut out, from))?;
    } else {
        view(from, |from: &CudaView<'_, half::bf16>| elementwise::cast(device, &mut out, from))?;
    }
    Ok(out)
}

/// Lets `f` change the elements of a tensor on a GPU in place. All who share its storage see the change.
pub(crate) fn change<T, F>(tensor: &Tensor, f: F) -> Result<()>
where
    T: CudaDType + Send + Sync,
    F: FnOnce(&mut CudaViewMut<'_, T>) -> Result<()> + Send,
{
    struct Change<T, F>(Mutex<Option<F>>, PhantomData<T>);
    impl<T: CudaDType, F: FnOnce(&mut CudaViewMut<'_, T>) -> Result<()>> InplaceOp1 for Change<T, F> {
        fn name(&self) -> &'static str {
            "change"
        }
        fn cpu_fwd(&self, _: &mut CpuStorage, _: &TensorLayout) -> Result<()> {
            bail!("expected a tensor on a gpu, found one on the cpu")
        }
        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &TensorLayout) -> Result<()> {
            let f = self.0.lock().expect("nothing panics while it is held").take();
            let f = f.expect("an operation is applied once");
            f(&mut storage.as_cuda_slice_mut::<T>()?.slice_mut(contiguous(layout)?))
        }
    }
    tensor.inplace_op1(&Change(Mutex::new(Some(f)), PhantomData))
}

/// Adds rows of `gradient`, f32 or bf16, to those of `total` that they belong to.
pub(crate) fn add_rows(
    device: &CudaDevice,
    total: &Tensor,
    places: &[(usize, u32)],
    gradient: &Tensor,
    width: usize,
) -> Result<()> {
    fn add<T: Number>(
        device: &CudaDevice,
        total: &Tensor,
        groups: &Groups,
        gradient: &Tensor,
        width: usize,
    ) -> Result<()> {
        view(gradient, |gradient: &CudaView<'_, T>| {
            change(total, |total| embed::add_groups(device, total, gradient, groups, width))
        })
    }
    let groups = Groups::new(device, places.iter().map(|(row, place)| (*row as u32, *place)))?;
    if gradient.dtype() == f32::DTYPE {
        add::<f32>(device, total, &groups, gradient, width)
    } else {
        add::<half::bf16>(device, total, &groups, gradient, width)
    }
}
