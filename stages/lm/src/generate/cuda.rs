//! Writing on a GPU.
//!
//! The rows that are being written have slots: places in a cache of keys and values and in the vectors that the kernels work
//! on. All of a prompt but its last token is fed at once; then each step feeds one token of every slot and chooses the next,
//! without the host, so that a step is one graph, launched again and again. Every few steps the host looks who has
//! finished: their slots go to those who wait, and when nobody waits, rows move together and smaller steps go on.

use std::ops::Range;

use anyhow::Context;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, Result as TensorResult, Tensor};
use contract::{End, Result};

use super::{Generate, Generated, Prompt, how_ended, room};
use crate::batch::{Input, Packed};
use crate::kernels::cuda::attention::{self, Heads, Sequences};
use crate::kernels::cuda::decode;
use crate::kernels::cuda::embed::code;
use crate::kernels::cuda::matmul::{Matrix, product};
use crate::kernels::cuda::sample::{Draws, Writing, sample};
use crate::kernels::cuda::{fold, unset, upload};
use crate::kernels::rope::Turn;
use crate::model::LanguageModel;
use crate::ops::backend::Backend;
use crate::ops::cuda::{Cuda, Number};
use crate::ops::rotary::Rotary;
use crate::ops::{Attend, Layer, LayerNorm, Ops, Positions, RmsNorm};
use crate::terms::activation::Activation;
use crate::weights::Weight;

/// Steps between two looks at who has finished.
const STEPS: usize = 8;

/// Tokens of prompts that are fed together.
const PROMPT_TOKENS: usize = 1 << 16;

/// As [`super::generate`], whose checks have been made.
pub(super) fn generate<T: Number>(
    device: &CudaDevice,
    model: &LanguageModel,
    soft_prompt: Option<&Tensor>,
    prompts: &[Prompt<'_>],
    options: &Generate,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Generated>> {
    let soft_length = soft_prompt.map_or(0, |prompt| prompt.dims()[0]);
    let limit = |prompt: &Prompt<'_>| room(model, soft_length, prompt, options);
    let nothing = Generated { ids: Vec::new(), log_probs: Vec::new(), end: End::Length };
    let mut finished = vec![nothing; prompts.len()];
    // The longest come last, to be taken first: those admitted together tend to be of one length.
    let mut waiting: Vec<usize> = (0..prompts.len()).filter(|i| limit(&prompts[*i]) > 0).collect();
    waiting.sort_by_key(|i| prompts[*i].ids.len());
    let mut done = prompts.len() - waiting.len();
    if waiting.is_empty() {
        progress(done);
        return Ok(finished);
    }
    let sizes = Sizes {
        slots: options.batch.clamp(1, waiting.len()),
        soft_length,
        room: waiting.iter().map(|i| prompts[*i].ids.len() + limit(&prompts[*i])).max().unwrap_or(0),
        most: waiting.iter().map(|i| limit(&prompts[*i])).max().unwrap_or(0),
    };
    let mut writer = Writer::<T>::new(device, model, soft_prompt, options, sizes)?;
    loop {
        let mut admitted = Vec::new();
        for slot in writer.free() {
            let Some(index) = waiting.pop() else { break };
            admitted.push(Admitted { slot, index, prompt: prompts[index], limit: limit(&prompts[index]) });
        }
        writer.admit(&admitted)?;
        if waiting.is_empty() {
            writer.shrink()?;
        }
        if writer.occupied.iter().all(Option::is_none) {
            break;
        }
        writer.steps()?;
        for (index, row) in writer.take_finished(prompts)? {
            finished[index] = row;
            done += 1;
        }
        progress(done);
    }
    Ok(finished)
}

/// How much of everything there is room for.
#[derive(Clone, Copy)]
struct Sizes {
    /// Rows that are written at once.
    slots: usize,
    /// Vectors of the soft prompt.
    soft_length: usize,
    /// Tokens of the longest prompt with its longest response.
    room: usize,
    /// Tokens of the longest response.
    most: usize,
}

impl Sizes {
    /// Positions in the cache: in whole steps of the attention over it.
    fn capacity(&self) -> usize {
        (self.soft_length + self.room).next_multiple_of(16)
    }
}

/// A row on its way to a slot.
struct Admitted<'a> {
    slot: usize,
    /// Its place among the prompts.
    index: usize,
    prompt: Prompt<'a>,
    limit: usize,
}

/// Rows that are being written.
struct Writer<'a, T: Number> {
    device: &'a CudaDevice,
    model: &'a LanguageModel,
    soft_prompt: Option<Tensor>,
    options: &'a Generate,
    sizes: Sizes,
    backend: Cuda<T>,
    cache: Cache<T>,
    writing: Writing,
    /// Which of the prompts each slot writes. Its length is the number of slots that a step computes.
    occupied: Vec<Option<usize>>,
    /// A step over that many slots: launched once by hand, then recorded, then repeated.
    graph: Option<CudaGraph>,
    launched: bool,
}

impl<'a, T: Number> Writer<'a, T> {
    fn new(
        device: &'a CudaDevice,
        model: &'a LanguageModel,
        soft_prompt: Option<&Tensor>,
        options: &'a Generate,
        sizes: Sizes,
    ) -> Result<Self> {
        let slots = sizes.slots;
        let zeros = || device.alloc_zeros::<u32>(slots);
        let writing = Writing {
            ends: upload(device, model.ends().to_vec())?,
            ids: zeros()?,
            prompts: zeros()?,
            limits: zeros()?,
            counts: zeros()?,
            positions: zeros()?,
            next: device.alloc_zeros::<i32>(slots)?,
            // Nobody is there yet.
            finished: upload(device, vec![1; slots])?,
            history: device.alloc_zeros::<u32>(slots * sizes.room)?,
            log_probs: device.alloc_zeros::<f32>(slots * sizes.most)?,
        };
        Ok(Writer {
            device,
            model,
            soft_prompt: soft_prompt.map(|prompt| prompt.detach().contiguous()).transpose()?,
            options,
            sizes,
            backend: Cuda::new(device, &Packed::new())?,
            cache: Cache::new(device, model, slots, sizes.capacity())?,
            writing,
            occupied: vec![None; slots],
            graph: None,
            launched: false,
        })
    }

    fn free(&self) -> Vec<usize> {
        (0..self.occupied.len()).filter(|slot| self.occupied[*slot].is_none()).collect()
    }

    /// Takes rows in: feeds their prompts but for the last token, which the next step feeds.
    fn admit(&mut self, rows: &[Admitted<'_>]) -> Result<()> {
        let mut rest = rows;
        while !rest.is_empty() {
            let (mut tokens, mut count) = (0, 0);
            while count < rest.len() && (count == 0 || tokens + rest[count].prompt.ids.len() <= PROMPT_TOKENS) {
                tokens += rest[count].prompt.ids.len();
                count += 1;
            }
            let (part, behind) = rest.split_at(count);
            self.feed(part)?;
            rest = behind;
        }
        // Slots side by side are written together.
        for run in rows.chunk_by(|a, b| a.slot + 1 == b.slot) {
            let slots = run[0].slot..run[0].slot + run.len();
            let Sizes { soft_length, room, .. } = self.sizes;
            let each = |f: &dyn Fn(&Admitted<'_>) -> usize| run.iter().map(|row| f(row) as u32).collect::<Vec<_>>();
            let lengths = each(&|row| row.prompt.ids.len());
            let mut history = vec![0; run.len() * room];
            for (row, history) in run.iter().zip(history.chunks_exact_mut(room)) {
                history[..row.prompt.ids.len()].copy_from_slice(row.prompt.ids);
            }
            let last = run.iter().map(|row| row.prompt.ids.last().map_or(0, |id| code(Input::Token(*id))));
            let writing = &mut self.writing;
            put(self.device, &mut writing.ids, &slots, &each(&|row| fold(row.prompt.row) as usize))?;
            put(self.device, &mut writing.prompts, &slots, &lengths)?;
            put(self.device, &mut writing.counts, &slots, &lengths)?;
            put(self.device, &mut writing.limits, &slots, &each(&|row| row.limit))?;
            put(self.device, &mut writing.positions, &slots, &each(&|row| soft_length + row.prompt.ids.len() - 1))?;
            put(self.device, &mut writing.next, &slots, &last.collect::<Vec<_>>())?;
            put(self.device, &mut writing.finished, &slots, &vec![0; run.len()])?;
            put(self.device, &mut writing.history, &slots, &history)?;
            for row in run {
                self.occupied[row.slot] = Some(row.index);
            }
        }
        Ok(())
    }

    fn feed(&mut self, rows: &[Admitted<'_>]) -> Result<()> {
        let mut batch = Packed::new();
        for row in rows {
            batch.push(row.prompt.row, &row.prompt.ids[..row.prompt.ids.len() - 1]);
        }
        let fed = batch.behind_prompt(self.sizes.soft_length);
        if fed.inputs.is_empty() {
            return Ok(());
        }
        let slots = fed.segments.iter().zip(rows).flat_map(|(segment, row)| vec![row.slot as u32; segment.len()]);
        let slots = upload(self.device, slots.collect())?;
        let sequences = Sequences::new(self.device, &fed.segments, &fed.rows)?;
        let backend = self.backend.over(&fed)?;
        let feed = Feed::Prompts { rows: &fed, slots, sequences };
        let mut pass = Pass { device: self.device, backend, cache: &mut self.cache, feed };
        self.model.forward(&mut pass, self.soft_prompt.as_ref(), self.sizes.capacity())?;
        Ok(())
    }

    /// Goes on until the host should look again.
    fn steps(&mut self) -> Result<()> {
        for _ in 0..STEPS.min(self.sizes.most) {
            if let Some(graph) = &self.graph {
                graph.launch().w()?;
            } else if self.launched {
                let graph = self.record()?;
                graph.launch().w()?;
                self.graph = Some(graph);
            } else {
                // By hand first: kernels are loaded and weights converted, which cannot be recorded.
                self.step()?;
                self.launched = true;
            }
        }
        Ok(())
    }

    fn record(&mut self) -> Result<CudaGraph> {
        let stream = self.device.cuda_stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let step = self.step();
        // Also after an error, or the stream would record for ever.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).w();
        step?;
        graph?.ok_or_else(|| anyhow::anyhow!("a step of decoding was recorded and there is nothing in it"))
    }

    /// Feeds one token of every slot, and chooses the next. Only launches.
    fn step(&mut self) -> Result<()> {
        let rows = self.occupied.len();
        let Generate { sampling, seed, time, purpose, .. } = self.options;
        let feed = Feed::Tokens { writing: &self.writing, rows };
        let mut pass = Pass { device: self.device, backend: self.backend.clone(), cache: &mut self.cache, feed };
        // All positions at once: the table of angles must not move while the graph reads it.
        let hidden = self.model.forward(&mut pass, None, self.sizes.capacity())?;
        let (width, vocabulary) = (self.model.width(), self.model.vocab_size());
        let mut logits = unset::<f32>(self.device, rows * vocabulary)?;
        self.backend.matrix(&self.model.head()?, |head| {
            let head = Matrix::new(head, width).transposed();
            product(self.device, &mut logits, Matrix::new(&hidden, width), head, false)
        })?;
        let draws = Draws { seed: *seed, time: *time, purpose: *purpose };
        Ok(sample(self.device, &logits, [vocabulary, self.model.vocabulary()], &mut self.writing, sampling, draws)?)
    }

    /// The rows that have finished, each with its place among the prompts. Their slots become free.
    fn take_finished(&mut self, prompts: &[Prompt<'_>]) -> Result<Vec<(usize, Generated)>> {
        let finished = self.device.clone_dtoh(&self.writing.finished)?;
        let slots: Vec<usize> =
            (0..self.occupied.len()).filter(|slot| finished[*slot] != 0 && self.occupied[*slot].is_some()).collect();
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        let counts = self.device.clone_dtoh(&self.writing.counts)?;
        let Sizes { room, most, .. } = self.sizes;
        let mut rows = Vec::with_capacity(slots.len());
        for slot in slots {
            let Some(index) = self.occupied[slot].take() else { continue };
            let (prompt, count) = (prompts[index].ids.len(), counts[slot] as usize);
            let ids = self.writing.history.slice(slot * room + prompt..slot * room + count);
            let log_probs = self.writing.log_probs.slice(slot * most..slot * most + count - prompt);
            let (ids, log_probs) = (self.device.clone_dtoh(&ids)?, self.device.clone_dtoh(&log_probs)?);
            let end = how_ended(&ids, self.model.ends());
            rows.push((index, Generated { ids, log_probs, end }));
        }
        Ok(rows)
    }

    /// Moves rows together, where half of the slots suffice.
    fn shrink(&mut self) -> Result<()> {
        let rows = self.occupied.iter().flatten().count();
        let mut slots = self.occupied.len();
        while slots > 1 && rows <= slots.div_ceil(2) {
            slots = slots.div_ceil(2);
        }
        if slots == self.occupied.len() || rows == 0 {
            return Ok(());
        }
        let mut free = (0..slots).filter(|slot| self.occupied[*slot].is_none()).collect::<Vec<_>>().into_iter();
        let Sizes { room, most, .. } = self.sizes;
        for from in slots..self.occupied.len() {
            let Some(index) = self.occupied[from] else { continue };
            let Some(to) = free.next() else { break };
            let device = self.device;
            let Writing { ends: _, ids, prompts, limits, counts, positions, next, finished, history, log_probs } =
                &mut self.writing;
            for vector in [ids, prompts, limits, counts, positions, finished] {
                shift(device, vector, from, to, 1)?;
            }
            shift(device, next, from, to, 1)?;
            shift(device, history, from, to, room)?;
            shift(device, log_probs, from, to, most)?;
            for (keys, values) in &mut self.cache.layers {
                shift(device, keys, from, to, self.cache.row)?;
                shift(device, values, from, to, self.cache.row)?;
            }
            self.occupied[to] = Some(index);
        }
        self.occupied.truncate(slots);
        (self.graph, self.launched) = (None, false);
        Ok(())
    }
}

/// Writes the numbers of some slots.
fn put<N: DeviceRepr + 'static>(
    device: &CudaDevice,
    vector: &mut CudaSlice<N>,
    slots: &Range<usize>,
    numbers: &[N],
) -> TensorResult<()> {
    let each = numbers.len() / slots.len();
    device.memcpy_htod(numbers, &mut vector.slice_mut(slots.start * each..slots.end * each))
}

/// Copies `each` elements of slot `from` to an earlier slot.
fn shift<N>(device: &CudaDevice, vector: &mut CudaSlice<N>, from: usize, to: usize, each: usize) -> TensorResult<()> {
    let (mut left, right) = vector.split_at_mut(from * each);
    device.memcpy_dtod(&right.slice(..each), &mut left.slice_mut(to * each..(to + 1) * each))
}

/// Keys and values of all slots.
struct Cache<T> {
    /// Of each layer `[slots, Hkv, capacity, d]`.
    layers: Vec<(CudaSlice<T>, CudaSlice<T>)>,
    capacity: usize,
    /// Elements of a slot.
    row: usize,
}

impl<T: Number> Cache<T> {
    fn new(device: &CudaDevice, model: &LanguageModel, slots: usize, capacity: usize) -> Result<Self> {
        let row = model.config.sizes().kv_width * capacity;
        // Zeros, since slots without a row are computed too.
        let half = || {
            device.alloc_zeros::<T>(slots * row).with_context(|| {
                format!("no memory for the keys and values of {slots} rows of {capacity} tokens: set a smaller `batch`")
            })
        };
        let layers = (0..model.config.layers()).map(|_| Ok((half()?, half()?))).collect::<Result<_>>()?;
        Ok(Cache { layers, capacity, row })
    }
}

/// [`Ops`] over new tokens, with the keys and values of those before.
struct Pass<'a, T: Number> {
    device: &'a CudaDevice,
    backend: Cuda<T>,
    cache: &'a mut Cache<T>,
    feed: Feed<'a>,
}

/// The new tokens.
enum Feed<'a> {
    /// Of slots that were empty.
    Prompts {
        rows: &'a Packed,
        /// The slot of each token.
        slots: CudaSlice<u32>,
        sequences: Sequences,
    },
    /// One of each of the first so many slots.
    Tokens { writing: &'a Writing, rows: usize },
}

impl<T: Number> Pass<'_, T> {
    /// New tokens.
    fn rows(&self) -> usize {
        match &self.feed {
            Feed::Prompts { rows, .. } => rows.positions.len(),
            Feed::Tokens { rows, .. } => *rows,
        }
    }
}

impl<T: Number> Ops for Pass<'_, T> {
    type Array = CudaSlice<T>;

    fn embed(
        &mut self,
        tokens: &Weight,
        positions: Option<Positions<'_>>,
        prompt: Option<&Tensor>,
    ) -> TensorResult<CudaSlice<T>> {
        match &self.feed {
            Feed::Prompts { rows, .. } => self.backend.embed(rows, tokens, positions, prompt),
            Feed::Tokens { writing, rows } => {
                let (inputs, at) = (writing.next.slice(..*rows), writing.positions.slice(..*rows));
                self.backend.embed_inputs(&inputs, &at, tokens.tensor()?, positions, prompt)
            }
        }
    }

    fn positions(&mut self, positions: Positions<'_>) -> TensorResult<CudaSlice<T>> {
        match &self.feed {
            Feed::Prompts { rows, .. } => self.backend.positions(rows, positions),
            Feed::Tokens { writing, rows } => self.backend.positions_at(&writing.positions.slice(..*rows), positions),
        }
    }

    fn layer_norm(&mut self, x: &CudaSlice<T>, norm: &LayerNorm) -> TensorResult<CudaSlice<T>> {
        Ok(self.backend.layer_norm(x, norm)?.0)
    }

    fn rms_norm(&mut self, x: &CudaSlice<T>, norm: &RmsNorm) -> TensorResult<CudaSlice<T>> {
        Ok(self.backend.rms_norm(x, norm)?.0)
    }

    fn side_by_side(&mut self, x: &CudaSlice<T>, layers: &[Layer]) -> TensorResult<CudaSlice<T>> {
        self.backend.linear(x, layers)
    }

    fn join(&mut self, parts: Vec<CudaSlice<T>>) -> TensorResult<CudaSlice<T>> {
        let rows = self.rows();
        self.backend.join(&parts.iter().map(|part| (part, part.len() / rows)).collect::<Vec<_>>())
    }

    fn regroup(&mut self, x: CudaSlice<T>, groups: [usize; 2]) -> TensorResult<CudaSlice<T>> {
        self.backend.regroup(&x, x.len() / self.rows(), groups)
    }

    fn rotary(&mut self, mut x: CudaSlice<T>, rotary: &Rotary) -> TensorResult<CudaSlice<T>> {
        let width = x.len() / self.rows();
        match &self.feed {
            Feed::Prompts { rows, .. } => self.backend.rotate(&mut x, width, rotary, rows, Turn::Forth)?,
            Feed::Tokens { writing, rows } => {
                let at = writing.positions.slice(..*rows);
                self.backend.rotate_at(&mut x, &at, width, rotary, Turn::Forth)?;
            }
        }
        Ok(x)
    }

    fn attention(&mut self, qkv: CudaSlice<T>, attend: Attend) -> TensorResult<CudaSlice<T>> {
        let (device, capacity) = (self.device, self.cache.capacity);
        let d = self.cache.row / capacity / attend.kv_heads;
        let width = attend.heads * d;
        let Attend { heads: queries, kv_heads: keys, scale, window, .. } = attend;
        let heads = Heads { queries, keys, width: d, scale, window };
        let (keys, values) = &mut self.cache.layers[attend.layer];
        let count = qkv.len() / heads.row();
        let mut out = unset::<T>(device, count * width)?;
        match &self.feed {
            Feed::Prompts { slots, sequences, .. } => {
                let (places, positions) = (slots.as_view(), self.backend.row_positions());
                decode::append(device, keys, values, &qkv, Some(&places), positions, heads, capacity)?;
                let mut normalisers = unset::<f32>(device, count * heads.queries)?;
                attention::forward(device, &mut out, &mut normalisers, &qkv, sequences, heads, None)?;
            }
            Feed::Tokens { writing, rows } => {
                let positions = writing.positions.slice(..*rows);
                decode::append(device, keys, values, &qkv, None, &positions, heads, capacity)?;
                let mut scratch = unset::<f32>(device, decode::scratch(*rows, heads, capacity))?;
                decode::attend(device, &mut out, &qkv, keys, values, &positions, &mut scratch, heads, capacity)?;
            }
        }
        Ok(out)
    }

    fn activation(&mut self, x: CudaSlice<T>, activation: Activation) -> TensorResult<CudaSlice<T>> {
        self.backend.activation(&x, activation)
    }

    fn swiglu(&mut self, gate: CudaSlice<T>, up: CudaSlice<T>) -> TensorResult<CudaSlice<T>> {
        self.backend.swiglu(&gate, &up)
    }

    fn add(&mut self, mut x: CudaSlice<T>, y: CudaSlice<T>) -> TensorResult<CudaSlice<T>> {
        self.backend.add(&mut x, &y)?;
        Ok(x)
    }

    fn dropout(&mut self, x: CudaSlice<T>, _rate: f32, _site: u32) -> TensorResult<CudaSlice<T>> {
        Ok(x)
    }

    /// Of prompts nothing is wanted but what is in the cache.
    fn wanted(&mut self, x: CudaSlice<T>) -> TensorResult<CudaSlice<T>> {
        Ok(x)
    }
}
