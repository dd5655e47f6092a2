//! A language model: its parameters and its tokenizer, whatever the architecture, and the passes that everything else is made
//! of.
//!
//! Dimensions: `N` tokens of the batch, `C` channels, `V` vocabulary.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use candle_core::{Device, Result as TensorResult, Tensor};
use contract::dataset::row_name;
use contract::random::{normal, philox, purpose};
use contract::{Facts, PortType, Result, TokenizerFile, Value};
use indexmap::IndexMap;
use rayon::prelude::*;

use crate::adapter::{A, ADAPTER, Adapter, B, Biases, Lora};
use crate::batch::{Input, Packed};
use crate::dtype::Dtype;
use crate::families::{Architecture, Config, Weights, layer_of};
use crate::files::export::fitting;
use crate::files::folder::ModelFolder;
use crate::files::generation::{self, GenerationConfig};
use crate::files::tensors::{Parameter, write_json, write_parameters};
use crate::finite::{first_not_finite, is_finite};
use crate::head::Head;
use crate::kernels::encode::encode;
use crate::ops::backend::Backend;
use crate::ops::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::ops::cuda::Cuda;
use crate::ops::plain::Plain;
use crate::ops::rotary::Angles;
use crate::ops::tape::Tape;
use crate::ops::{Layout, Ops};
use crate::terms::dropout::Dropout;
use crate::terms::format::Format;
use crate::weights::Weight;
use crate::weights::encoded::{Bytes, Encoded};
use crate::weights::low_rank::LowRank;

/// A model with its tokenizer.
///
/// Its parameters are either all variables, which training changes in place, or all frozen. Of one with an adapter the
/// adapter alone is trained.
pub struct LanguageModel {
    /// Sizes and options.
    pub config: Config,
    /// What gives ids their meaning. Its `json` is empty where the checkpoint had no `tokenizer.json`.
    pub tokenizer: TokenizerFile,
    generation: GenerationConfig,
    ends: Vec<u32>,
    weights: IndexMap<String, Weight>,
    /// Of what the adapter is made that lies on the weights, if one does.
    lora: Option<Lora>,
    device: Device,
    angles: Angles,
    activation_checkpointing: bool,
    dtype: Dtype,
}

impl LanguageModel {
    /// A model with random weights over the vocabulary of `tokenizer`, frozen.
    ///
    /// Matrices are normal with standard deviation 0.02, those that end a residual branch divided by `sqrt(2 layers)`;
    /// norm weights are 1, biases 0. Each number depends on the seed, its parameter's index and its place alone.
    pub fn init(architecture: &Architecture, tokenizer: TokenizerFile, seed: u64, device: &Device) -> Result<Self> {
        let mut config = architecture.config(tokenizer.size as usize, tokenizer.end)?;
        config.set_roles(tokenizer.begin, tokenizer.pad);
        let residual = 1.0 / (2.0 * config.layers() as f64).sqrt();
        let mut parameters = IndexMap::new();
        for (index, (name, shape)) in config.parameter_shapes().into_iter().enumerate() {
            let count = shape.iter().product();
            let values = if name.ends_with("bias") {
                vec![0.0; count]
            } else if shape.len() == 1 {
                vec![1.0; count]
            } else {
                let scale = if config.ends_branch(&name) { residual } else { 1.0 };
                random_values(seed, index as u32, count, (config.sizes().initializer_range * scale) as f32)
            };
            parameters.insert(name, Weight::new(Tensor::from_vec(values, shape, device)?));
        }
        Ok(LanguageModel::of(config, tokenizer, GenerationConfig::default(), parameters, device.clone()))
    }

    /// Reads a Hugging Face folder: `config.json`; weights from `model.safetensors`, from the shards of
    /// `model.safetensors.index.json`, or from `pytorch_model.bin`; `tokenizer.json` where there is one;
    /// `generation_config.json` for the tokens it stops at; an adapter from the folder `adapter` in it. Names may lack the
    /// prefix `transformer.` or `model.`. The model is frozen.
    ///
    /// Errors name the file, and the tensor with expected and found shape.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let adapter = folder.join(ADAPTER);
        let mut folder = ModelFolder::open(folder)?;
        let tokenizer = folder.tokenizer()?;
        let parameters = folder.parameters(device)?;
        let ModelFolder { config, generation, .. } = folder;
        let model = LanguageModel::of(config, tokenizer, generation, parameters, device.clone());
        if adapter.is_dir() { model.with_adapter(&Adapter::load(&adapter, device)?) } else { Ok(model) }
    }

    fn of(
        config: Config,
        tokenizer: TokenizerFile,
        generation: GenerationConfig,
        parameters: IndexMap<String, Weight>,
        device: Device,
    ) -> Self {
        LanguageModel {
            ends: generation::ends(&tokenizer, &config, &generation),
            config,
            tokenizer,
            generation,
            weights: parameters,
            lora: None,
            device,
            angles: Angles::default(),
            activation_checkpointing: false,
            dtype: Dtype::F32,
        }
    }

    /// An independent, frozen copy, with storage of its own for all that can be trained.
    pub fn deep_clone(&self) -> Result<Self> {
        self.map(|name, weight| {
            let base = if self.trains(name) { weight.deep_clone()? } else { weight.base().frozen() };
            on_top(base, weight, LowRank::deep_clone)
        })
    }

    /// The same model with a new adapter, over the model itself, which is frozen. What it computes is the same until the
    /// adapter is trained. The adapter's matrices depend on the seed, their layer and their place alone.
    ///
    /// Errors when it has one, or a target is none of its layers.
    pub fn with_new_adapter(&self, lora: &Lora, seed: u64) -> Result<Self> {
        self.with_adapter(&Adapter::new(lora, &self.config, seed, &self.device)?)
    }

    /// The same model, frozen, with an adapter, which is taken as it is.
    ///
    /// Errors when it has one, or the adapter does not fit.
    pub fn with_adapter(&self, adapter: &Adapter) -> Result<Self> {
        ensure!(self.lora.is_none(), "the model has an adapter: merge that first");
        let mut model = LanguageModel { lora: Some(adapter.lora.clone()), ..self.frozen() };
        let mut rest: Vec<&String> = adapter.tensors.keys().collect();
        for (layer, low_rank) in adapter.parts(&self.config)? {
            let name = format!("{layer}.weight");
            // A head that is the embedding is a parameter of its own from here on, of the same storage.
            let base = model.weights.get(&name).unwrap_or_else(|| model.head_weight()).base();
            model.weights.insert(name, base.with_low_rank(low_rank));
            rest.retain(|name| name.strip_suffix(A).or(name.strip_suffix(B)) != Some(&layer));
        }
        for name in rest {
            let (values, own) = (&adapter.tensors[name], model.weights.get(name));
            ensure!(
                own.and_then(Weight::dense).is_some_and(|own| own.dims() == values.dims()) && model.trains(name),
                "the adapter has `{name}` of shape {:?}, which this model has not",
                values.dims()
            );
            model.weights.insert(name.clone(), Weight::new(values.clone()));
        }
        Ok(model)
    }

    /// The adapter that lies on the model, if one does.
    pub fn adapter(&self) -> Option<Adapter> {
        let lora = self.lora.clone()?;
        Some(Adapter::of(lora, self.adapted(), &self.config))
    }

    /// Whether an adapter lies on it.
    pub fn has_adapter(&self) -> bool {
        self.lora.is_some()
    }

    /// Errors where an adapter lies on it, and is not as it would be made.
    pub fn check_adapter(&self, lora: &Lora) -> Result<()> {
        let Some(own) = &self.lora else { return Ok(()) };
        let same_layers = lora.layers(&self.config)? == own.layers(&self.config)?;
        let rest = |lora: &Lora| Lora { targets: None, ..lora.clone() };
        ensure!(
            rest(lora) == rest(own) && same_layers,
            "the model has an adapter of rank {}, alpha {}, dropout {}, bias {:?} and rslora {}{}, and `lora` asks for another: \
             give the same to go on with it, or merge the two first (kind `merge`)",
            own.rank,
            own.alpha,
            own.dropout,
            own.bias,
            own.rslora,
            if same_layers { "" } else { " on other layers" }
        );
        Ok(())
    }

    /// The matrices of the adapter and the biases beside it.
    fn adapted(&self) -> IndexMap<String, Tensor> {
        let mut tensors = IndexMap::new();
        for (name, weight) in &self.weights {
            if let Some(LowRank { a, b, .. }) = weight.low_rank() {
                tensors.insert(format!("{}{A}", layer_of(name)), a.clone());
                tensors.insert(format!("{}{B}", layer_of(name)), b.clone());
            }
            if let Some(values) = weight.dense().filter(|_| self.trains(name)) {
                tensors.insert(name.clone(), values.clone());
            }
        }
        tensors
    }

    /// The same model without an adapter, frozen: what that adds to a matrix is added to it. Such matrices are f32 from then
    /// on.
    ///
    /// Errors when it has none.
    pub fn merged(&self) -> Result<Self> {
        ensure!(self.lora.is_some(), "there is nothing to merge: the model has no adapter");
        let head = self.config.head();
        let mut model = self.map(|name, weight| {
            let base = weight.base().frozen();
            match weight.low_rank() {
                None => Ok(base),
                Some(low_rank) => {
                    let product = low_rank.frozen().product()?;
                    let lies_across = name != head && self.config.layout() == Layout::InOut;
                    let product = if lies_across { product.t()? } else { product };
                    Ok(Weight::new((base.master()? + product)?))
                }
            }
        })?;
        if self.config.sizes().tied && model.weights.contains_key(head) {
            model.config.untie();
        }
        model.lora = None;
        Ok(model)
    }

    /// Whether a parameter, below what lies on it, is one that is trained.
    fn trains(&self, name: &str) -> bool {
        let Some(lora) = &self.lora else { return true };
        let Some(layer) = name.strip_suffix(".bias") else { return name.ends_with("bias") && lora.bias == Biases::All };
        match lora.bias {
            Biases::None => false,
            Biases::All => true,
            Biases::LoraOnly => {
                self.weights.get(&format!("{layer}.weight")).is_some_and(|weight| weight.low_rank().is_some())
            }
        }
    }

    /// A frozen model of some of the layers, in rising order, with everything before and behind them.
    ///
    /// Errors when there is no such layer.
    pub fn cut_to(&self, layers: &[usize]) -> Result<Self> {
        let count = self.config.layers();
        if let Some(layer) = layers.iter().find(|layer| **layer >= count) {
            anyhow::bail!("there is no layer {layer}: the model has {count}, counted from 0");
        }
        ensure!(!layers.is_empty(), "a model has at least one layer");
        ensure!(self.lora.is_none(), "the model has an adapter: merge that first");
        let config = self.config.of_layers(layers);
        let weights = config.parameter_shapes().into_iter().map(|(name, _)| {
            let from = with_layer(&name, |layer| layers[layer]);
            (name, self.weights[&from].frozen())
        });
        let weights = weights.collect();
        Ok(LanguageModel { weights, config, angles: Angles::default(), ..self.frozen() })
    }

    /// A frozen model whose matrices are written in `format`, and kept so: those whose rows its blocks do not fill in the format
    /// that llama.cpp takes instead. Vectors and tables of positions stay as they are.
    ///
    /// Errors where a number is none that the format holds: it names the matrix.
    pub fn quantised(&self, format: Format) -> Result<Self> {
        ensure!(self.lora.is_none(), "the model has an adapter: merge that first");
        let quantise = |name: &str, weight: &Weight| -> Result<Weight> {
            if !self.is_quantisable(name, weight) {
                return Ok(weight.frozen());
            }
            let (rows, columns) = weight.dims2()?;
            let format = fitting(format, columns);
            if weight.kept_encoded().is_some_and(|matrix| matrix.format == format) {
                return Ok(weight.clone());
            }
            let values = weight.master()?.to_device(&Device::Cpu)?.to_dtype(candle_core::DType::F32)?;
            let bytes =
                encode(format, &values.flatten_all()?.to_vec1()?).with_context(|| format!("tensor `{name}`"))?;
            let matrix = Encoded::new(format, rows, columns, Bytes::Owned(Arc::new(bytes)))?;
            Ok(Weight::encoded_on(matrix, &self.device))
        };
        let weights = self.weights.iter().map(|(name, weight)| Ok((name.clone(), quantise(name, weight)?)));
        Ok(LanguageModel { weights: weights.collect::<Result<_>>()?, ..self.frozen() })
    }

    /// Whether a parameter is a matrix that is multiplied, or the table of tokens. Tables of positions are added, and small.
    fn is_quantisable(&self, name: &str, weight: &Weight) -> bool {
        weight.dims2().is_ok() && !self.config.is_table(name)
    }

    /// How many matrices that can be quantised are kept otherwise than in `format`, and how many there are.
    pub fn matrices_not_in(&self, format: Format) -> (usize, usize) {
        let matrices = self.weights.iter().filter(|(name, weight)| self.is_quantisable(name, weight));
        let is_in = |weight: &Weight| weight.kept_encoded().is_some_and(|matrix| matrix.format == format);
        matrices.fold((0, 0), |(others, all), (_, weight)| (others + usize::from(!is_in(weight)), all + 1))
    }

    /// Bits of a parameter as it is kept, on average; dense ones have 32.
    pub fn bits_per_weight(&self) -> f64 {
        let bits = |weight: &Weight| match (weight.kept_encoded(), weight.dense()) {
            (Some(matrix), _) => 8 * matrix.rows(0..matrix.rows).len(),
            (None, dense) => 32 * dense.map_or(0, Tensor::elem_count),
        };
        let bits: usize = self.weights.values().map(bits).sum();
        bits as f64 / self.config.parameter_count().max(1) as f64
    }

    /// The norm of the difference of all matrices from those of `other`, a model of the same shape, by the norm of the latter.
    pub fn distance_from(&self, other: &LanguageModel) -> Result<f64> {
        let (mut difference, mut whole) = (0.0, 0.0);
        for (name, weight) in self.weights.iter().filter(|(name, weight)| self.is_quantisable(name, weight)) {
            let values = |weight: &Weight| -> Result<Vec<f32>> {
                let values = match weight.kept_encoded() {
                    // Not kept decoded beside it.
                    Some(matrix) => matrix.tensor(&Device::Cpu)?,
                    None => weight.master()?.to_device(&Device::Cpu)?,
                };
                Ok(values.flatten_all()?.to_vec1()?)
            };
            let (own, others) = (values(weight)?, values(&other.weights[name])?);
            for (own, other) in own.iter().zip(&others) {
                difference += f64::from(own - other).powi(2);
                whole += f64::from(*other).powi(2);
            }
        }
        Ok(if whole == 0.0 { 0.0 } else { (difference / whole).sqrt() })
    }

    /// The model with variables as parameters: all of them, or those of its adapter. Those that are variables already are
    /// taken as they are.
    pub fn trainable(self) -> Result<Self> {
        self.map(|name, weight| {
            let base = if self.trains(name) { weight.base().trainable()? } else { weight.base() };
            on_top(base, weight, LowRank::trainable)
        })
    }

    /// A view of the same weights through which no gradient flows. It sees later updates of the model.
    pub fn frozen(&self) -> Self {
        self.map(|_, weight| Ok(weight.frozen())).expect("a view cannot fail")
    }

    /// The model with activation checkpointing on or off (as it begins): in passes that will be differentiated each block
    /// keeps only its input, and is run again in the backward pass. Less memory, a third more time, the same bits.
    pub fn with_activation_checkpointing(self, on: bool) -> Self {
        LanguageModel { activation_checkpointing: on, ..self }
    }

    /// The model, to be computed in `dtype`. Matrices of a frozen model are converted now; those that are trained stay f32
    /// and are converted in every pass.
    ///
    /// Errors when its device does not compute in that type.
    pub fn computed_in(self, dtype: Dtype) -> Result<Self> {
        dtype.check(&self.device)?;
        Ok(LanguageModel { dtype, ..self.map(|_, weight| weight.read_in(dtype.candle()))? })
    }

    /// The parameters that can be trained, by their names in Hugging Face checkpoints, in a fixed order: all but frozen
    /// matrices that are kept in the type they have on disk. Of a model with an adapter, those of the adapter.
    pub fn parameters(&self) -> IndexMap<String, Tensor> {
        if self.lora.is_some() {
            return self.adapted();
        }
        let dense = self.weights.iter().filter_map(|(name, weight)| Some((name.clone(), weight.dense()?.clone())));
        dense.collect()
    }

    /// The tokens at which it stops when it writes, the tokenizer's first: all that its folder names.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Where the parameters are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it is computed in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Channels `C` of the vectors that go in and of the hidden states that come out.
    pub fn width(&self) -> usize {
        self.config.width()
    }

    /// Rows `V` of the embedding and of the head. May be more than [`LanguageModel::vocabulary`].
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size()
    }

    /// The ids that there are tokens for: those below this. Rows behind them are padding, there for the hardware's sake.
    ///
    /// The one rule for padding: its ids are in no text, so they are never read, drawn, or a label, nor among the likeliest
    /// tokens of a cache. A model's own softmax is over all its rows, as in `transformers`. Two models are compared over all
    /// rows where they have equally many, else over the tokens: see [`Head::beside`].
    pub fn vocabulary(&self) -> usize {
        (self.tokenizer.size as usize).min(self.vocab_size())
    }

    /// The output head by itself, of the same storage.
    pub fn output_head(&self) -> Result<Head> {
        Ok(Head { weight: self.head()?, tokens: self.vocabulary() })
    }

    /// The input embedding `[V, C]`.
    pub fn embedding(&self) -> Result<&Tensor> {
        Ok(self.weights[self.config.embedding()].tensor()?)
    }

    /// The output head `[V, C]`: logits are `hidden head^T`. The input embedding itself where they are tied. With an adapter on
    /// it, a matrix that leads back to that.
    pub fn head(&self) -> Result<Tensor> {
        let head = self.head_weight();
        let base = head.tensor()?;
        Ok(match head.low_rank() {
            None => base.clone(),
            Some(low_rank) => (base + low_rank.product()?.to_dtype(base.dtype())?)?,
        })
    }

    pub(crate) fn head_weight(&self) -> &Weight {
        self.weights.get(self.config.head()).unwrap_or_else(|| &self.weights[self.config.embedding()])
    }

    /// Final hidden states `[N, C]` of a batch, after the last norm: of all tokens, or of those it says are wanted.
    ///
    /// The `n` vectors of `prompt`, `[n, C]`, stand before every sequence at positions `0..n`; text follows from position
    /// `n`, and only its rows are returned. Gradients flow to parameters and prompt where they are variables; on the CPU,
    /// those of parameters are given by [`crate::gradients`].
    ///
    /// Errors when a sequence is longer than the model's positions, an id is not in its vocabulary, or the tokens that are
    /// wanted are not in order or not there.
    pub fn hidden(&self, batch: &Packed, prompt: Option<&Tensor>, dropout: Option<&Dropout>) -> Result<Tensor> {
        self.hidden_beside(batch, prompt, dropout, &[])
    }

    /// The same, and behind it what came out of the blocks `layers`, counted from 0, before any norm: `[N, C]` each.
    ///
    /// Errors also when there is no such block, and where blocks have another width than final hidden states, as in the OPT of
    /// 350 million parameters.
    pub fn states(
        &self,
        batch: &Packed,
        prompt: Option<&Tensor>,
        dropout: Option<&Dropout>,
        layers: &[usize],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let count = self.config.layers();
        if let Some(layer) = layers.iter().find(|layer| **layer >= count) {
            anyhow::bail!("there is no layer {layer}: the model has {count}, counted from 0");
        }
        if layers.is_empty() {
            return Ok((self.hidden(batch, prompt, dropout)?, Vec::new()));
        }
        let all = self.hidden_beside(batch, prompt, dropout, layers)?;
        let beside = (0..count).filter(|layer| layers.contains(layer)).count();
        ensure!(
            all.dim(1)? == self.width() * (1 + beside),
            "what comes out of this model's layers has another width than its final hidden states: it cannot be compared"
        );
        let part = |place: usize| Ok(all.narrow(1, place * self.width(), self.width())?.contiguous()?);
        let before = |layer: usize| (0..layer).filter(|other| layers.contains(other)).count();
        let states = layers.iter().map(|layer| part(1 + before(*layer)));
        Ok((part(0)?, states.collect::<Result<_>>()?))
    }

    /// Final hidden states and those behind some blocks side by side, in the order of the blocks.
    fn hidden_beside(
        &self,
        batch: &Packed,
        prompt: Option<&Tensor>,
        dropout: Option<&Dropout>,
        layers: &[usize],
    ) -> Result<Tensor> {
        let prompt_length = self.check(batch, prompt)?;
        let rows = batch.behind_prompt(prompt_length);
        if rows.inputs.is_empty() || rows.wanted.as_ref().is_some_and(Vec::is_empty) {
            let beside = (0..self.config.layers()).filter(|layer| layers.contains(layer)).count();
            let width = self.width() * (1 + beside);
            return Ok(Tensor::zeros((0, width), candle_core::DType::F32, &self.device)?);
        }
        let dropout = dropout.copied();
        match (&self.device, self.dtype) {
            (Device::Cpu, _) => self.hidden_by(Cpu, rows, prompt, dropout, layers),
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), Dtype::F32) => {
                self.hidden_by(Cuda::<f32>::new(device, &rows)?, rows, prompt, dropout, layers)
            }
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), Dtype::Bf16) => {
                self.hidden_by(Cuda::<half::bf16>::new(device, &rows)?, rows, prompt, dropout, layers)
            }
            #[allow(unreachable_patterns, reason = "with cuda, the device of other systems is left")]
            _ => self.hidden_plain(&rows, prompt, dropout, layers),
        }
    }

    fn hidden_by<B: Backend>(
        &self,
        backend: B,
        rows: Packed,
        prompt: Option<&Tensor>,
        dropout: Option<Dropout>,
        layers: &[usize],
    ) -> Result<Tensor> {
        let prompt = prompt.map(Tensor::contiguous).transpose()?;
        let positions = rows.positions_in_use();
        let new = if self.activation_checkpointing { Tape::checkpointing } else { Tape::new };
        let mut tape = new(backend, rows, dropout).tapping(layers);
        let hidden = self.forward(&mut tape, prompt.as_ref(), positions)?;
        let hidden = tape.with_taps(hidden)?;
        let trained = self.weights.values().find_map(|weight| {
            weight.variable().or(weight.low_rank().map(|low_rank| &low_rank.a).filter(|a| a.is_variable()))
        });
        let anchor = trained.or(prompt.as_ref());
        Ok(tape.finish(hidden, anchor, prompt.as_ref())?)
    }

    /// [`LanguageModel::hidden`] by candle's own operations.
    pub(crate) fn hidden_plain(
        &self,
        rows: &Packed,
        prompt: Option<&Tensor>,
        dropout: Option<Dropout>,
        layers: &[usize],
    ) -> Result<Tensor> {
        let mut plain = Plain::new(rows, dropout).tapping(layers);
        let hidden = self.forward(&mut plain, prompt, rows.positions_in_use())?;
        Ok(plain.with_taps(hidden)?)
    }

    /// How much every position of a text attends to every other, `[H, T, T]` by head, query and key, layer by layer: what the
    /// forward pass multiplies values with. The `n` vectors of `prompt` stand before the text and count in `T`.
    ///
    /// By plain operations and in f32: slower than [`LanguageModel::hidden`], and 4 bytes for each layer, head, query and key.
    /// Errors as that does.
    pub fn attention(&self, text: &[u32], prompt: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let mut batch = Packed::new();
        batch.push(0, text);
        let rows = batch.behind_prompt(self.check(&batch, prompt)?);
        ensure!(!rows.inputs.is_empty(), "a text without tokens attends to nothing");
        let mut layers = Vec::with_capacity(self.config.layers());
        let mut keep = |probabilities: &Tensor| {
            layers.push(probabilities.squeeze(0)?);
            Ok(())
        };
        let model = self.frozen().computed_in(Dtype::F32)?;
        model.forward(&mut Plain::probing(&rows, &mut keep), prompt, rows.positions_in_use())?;
        Ok(layers)
    }

    /// What of a forward pass is not finite, the first thing first, in words: a weight, the soft prompt, the hidden states
    /// behind a block, the logits. `None` where all is finite, in f32.
    ///
    /// Slow: for the message of an error that is certain. Errors as [`LanguageModel::hidden`] does.
    pub fn find_not_finite(&self, batch: &Packed, prompt: Option<&Tensor>) -> Result<Option<String>> {
        for (name, weight) in &self.weights {
            if let Some(found) = first_not_finite(weight.master()?)? {
                return Ok(Some(format!("its weight `{name}` holds {found}")));
            }
        }
        for (name, tensor) in self.adapted().iter().filter(|_| self.lora.is_some()) {
            if let Some(found) = first_not_finite(tensor)? {
                return Ok(Some(format!("its adapter's `{name}` holds {found}")));
            }
        }
        if let Some(found) = prompt.map(first_not_finite).transpose()?.flatten() {
            return Ok(Some(format!("its soft prompt holds {found}")));
        }
        let rows = batch.behind_prompt(self.check(batch, prompt)?);
        if rows.inputs.is_empty() {
            return Ok(None);
        }
        let model = self.frozen().computed_in(Dtype::F32)?;
        let mut plain = Plain::watching(&rows);
        let hidden = model.forward(&mut plain, prompt, rows.positions_in_use())?;
        if let Some(block) = plain.broken_block() {
            let layers = self.config.layers();
            return Ok(Some(format!(
                "its weights are finite, and its hidden states are not behind layer {} of {layers}",
                block + 1
            )));
        }
        if !is_finite(&hidden)? {
            return Ok(Some("its layers are finite, and its final hidden states are not".to_owned()));
        }
        let logits = hidden.matmul(&model.head()?.t()?)?;
        Ok((!is_finite(&logits)?).then(|| "its hidden states are finite, and its logits are not".to_owned()))
    }

    /// Final hidden states by the operations of `ops`, whose rows stand at positions below `positions`.
    pub(crate) fn forward<O: Ops>(
        &self,
        ops: &mut O,
        prompt: Option<&Tensor>,
        positions: usize,
    ) -> TensorResult<O::Array> {
        let weights = Weights {
            parameters: &self.weights,
            layout: self.config.layout(),
            angles: &self.angles,
            device: &self.device,
            positions,
        };
        self.config.forward(&weights, ops, prompt)
    }

    fn check(&self, batch: &Packed, prompt: Option<&Tensor>) -> Result<usize> {
        let prompt_length = match prompt {
            Some(prompt) => {
                let (length, width) = prompt.dims2().context("a soft prompt has shape [length, width]")?;
                ensure!(width == self.width(), "soft prompt of width {width} for a model of width {}", self.width());
                length
            }
            None => 0,
        };
        for (segment, row) in batch.segments.iter().zip(&batch.rows) {
            ensure!(
                segment.len() + prompt_length <= self.config.positions(),
                "{} has {} tokens with the soft prompt: the model has {} positions, so shorten the text",
                row_name(*row),
                segment.len() + prompt_length,
                self.config.positions()
            );
        }
        for input in &batch.inputs {
            let Input::Token(id) = *input else { anyhow::bail!("a batch has a soft prompt of its own") };
            ensure!(
                (id as usize) < self.vocabulary(),
                "token id {id} is not in the model's vocabulary of {}",
                self.vocabulary()
            );
        }
        let wanted = batch.wanted.as_deref().unwrap_or_default();
        ensure!(wanted.is_sorted_by(|a, b| a < b), "the tokens that are wanted must be in order");
        if let Some(token) = wanted.last().filter(|token| **token as usize >= batch.inputs.len()) {
            anyhow::bail!("token {token} is wanted of a batch of {}", batch.inputs.len());
        }
        Ok(prompt_length)
    }

    fn map(&self, f: impl Fn(&str, &Weight) -> TensorResult<Weight>) -> Result<Self> {
        let weights = self.weights.iter().map(|(name, weight)| Ok((name.clone(), f(name, weight)?)));
        Ok(LanguageModel {
            config: self.config.clone(),
            tokenizer: self.tokenizer.clone(),
            generation: self.generation.clone(),
            ends: self.ends.clone(),
            weights: weights.collect::<Result<_>>()?,
            lora: self.lora.clone(),
            device: self.device.clone(),
            angles: self.angles.clone(),
            dtype: self.dtype,
            activation_checkpointing: self.activation_checkpointing,
        })
    }
}

impl Value for LanguageModel {
    fn port_type(&self) -> PortType {
        PortType::Model
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let config = self.config.to_json()?;
        if let Some(adapter) = self.adapter() {
            let place = folder.join(ADAPTER);
            std::fs::create_dir(&place).with_context(|| format!("cannot make `{}`", place.display()))?;
            adapter.save(&place)?;
        }
        write_json(&folder.join("config.json"), &config)?;
        let weights = self.config.parameter_shapes().into_iter().map(|(name, _)| {
            let weight = &self.weights[&name];
            let parameter = match weight.kept_encoded() {
                Some(matrix) => Parameter::Encoded(matrix),
                None => Parameter::Dense(weight.master()?),
            };
            Ok((name, parameter))
        });
        let weights = weights.collect::<Result<Vec<_>>>()?;
        write_parameters(&folder.join("model.safetensors"), weights.into_iter(), None)?;
        write_json(&folder.join(generation::FILE), &self.generation.beside(&config, &self.ends))?;
        self.tokenizer.save(folder)
    }

    fn facts(&self) -> Facts {
        Facts { vocabulary: Some(self.tokenizer.vocabulary()), ends: Some(self.ends.clone()), ..self.config.facts() }
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// `base` with what lies on `weight`, changed.
fn on_top(base: Weight, weight: &Weight, change: impl Fn(&LowRank) -> TensorResult<LowRank>) -> TensorResult<Weight> {
    match weight.low_rank() {
        None => Ok(base),
        Some(low_rank) => Ok(base.with_low_rank(change(low_rank)?)),
    }
}

/// The name of a parameter with the number of its layer changed: the only part of it that is a number.
fn with_layer(name: &str, change: impl Fn(usize) -> usize) -> String {
    let part = |part: &str| part.parse().map_or_else(|_| part.to_owned(), |layer| change(layer).to_string());
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// Normal numbers with standard deviation `scale`, four from each counter.
fn random_values(seed: u64, parameter: u32, count: usize, scale: f32) -> Vec<f32> {
    let mut values = vec![0.0; count];
    values.par_chunks_mut(4).enumerate().for_each(|(i, out)| {
        let [a, b, c, d] = philox(seed, [i as u32, 0, parameter, purpose::INIT]);
        let ((w, x), (y, z)) = (normal(a, b), normal(c, d));
        out.iter_mut().zip([w, x, y, z]).for_each(|(out, value)| *out = value * scale);
    });
    values
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::families::{Family, Gpt2Config, LlamaConfig, RopeScaling};
    use crate::kernels::testing::numbers;
    use crate::optim::gradients;
    use crate::terms::activation::Activation;

    fn gpt2(change: impl FnOnce(&mut Gpt2Config)) -> LanguageModel {
        let dropout = Some(0.2);
        let architecture = Architecture { heads: Some(3), dropout, ..Architecture::new(Family::Gpt2, 2, 24) };
        let Ok(Config::Gpt2(mut config)) = architecture.config(17, 0) else { panic!("not a GPT-2") };
        change(&mut config);
        model(Config::Gpt2(config))
    }

    fn llama(change: impl FnOnce(&mut LlamaConfig)) -> LanguageModel {
        let dropout = Some(0.2);
        let architecture = Architecture { heads: Some(3), dropout, ..Architecture::new(Family::Llama, 2, 24) };
        let Ok(Config::Llama(mut config)) = architecture.config(17, 0) else { panic!("not a Llama") };
        change(&mut config);
        model(Config::Llama(config))
    }

    fn other(family: Family, fields: &Json) -> LanguageModel {
        let architecture = Architecture { heads: Some(3), dropout: Some(0.2), ..Architecture::new(family, 2, 24) };
        model(architecture.config(17, 0).unwrap().with(fields))
    }

    fn model(config: Config) -> LanguageModel {
        let shapes = config.parameter_shapes().into_iter().zip(0..);
        let parameters = shapes.map(|((name, shape), seed)| {
            let values = numbers(seed, shape.iter().product()).into_iter().map(|x| 0.3 * x).collect();
            (name, Weight::new(Var::from_vec::<_, f32>(values, shape, &Device::Cpu).unwrap().into_inner()))
        });
        let tokenizer = TokenizerFile::new("", 0, 17);
        LanguageModel::of(config, tokenizer, GenerationConfig::default(), parameters.collect(), Device::Cpu)
    }

    /// With an adapter whose matrices are not zero, and dropout before it.
    fn adapted(model: &LanguageModel) -> LanguageModel {
        let targets = Some(["c_attn", "mlp.c_proj", "q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec());
        let targets = targets.map(|all| {
            let layers = model.config.linear_layers();
            all.into_iter().filter(|target| layers.iter().any(|layer| layer.name.ends_with(target))).collect()
        });
        let lora = Lora { rank: 3, alpha: 5.0, dropout: 0.3, targets, bias: Biases::All, rslora: false };
        let model = model.with_new_adapter(&lora, 4).unwrap();
        let mut adapter = model.adapter().unwrap();
        for ((name, tensor), seed) in adapter.tensors.iter_mut().zip(50..) {
            if name.ends_with(B) {
                let values = numbers(seed, tensor.elem_count());
                *tensor = Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap();
            }
        }
        model.merged().unwrap().with_adapter(&adapter).unwrap().trainable().unwrap()
    }

    #[test]
    fn the_fused_model_is_the_plain_one_in_value_and_every_gradient() {
        let mut batch = Packed::new();
        batch.push(3, &[1, 2, 3, 4, 5, 6, 7]);
        batch.push(u64::MAX, &[16]);
        batch.push(5, &(0..33).map(|t| t % 17).collect::<Vec<_>>());
        let dropout = Dropout { seed: 2, update: 9, purpose: purpose::DROPOUT };
        let scaling = |original_max_position_embeddings| RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        };
        let models = [
            gpt2(|_| {}),
            gpt2(|config| config.tie_word_embeddings = false),
            gpt2(|config| config.activation_function = Activation::Relu),
            gpt2(|config| (config.scale_attn_by_inverse_layer_idx, config.n_inner) = (true, Some(50))),
            llama(|_| {}),
            llama(|config| (config.tie_word_embeddings, config.num_key_value_heads) = (false, Some(1))),
            llama(|config| (config.attention_bias, config.mlp_bias, config.head_dim) = (true, true, Some(10))),
            llama(|config| config.rope_scaling = Some(scaling(16))),
            other(Family::Opt, &json!({})),
            other(
                Family::Opt,
                &json!({"word_embed_proj_dim": 10, "do_layer_norm_before": false, "enable_bias": false}),
            ),
            other(Family::Opt, &json!({"_remove_final_layer_norm": true, "activation_function": "gelu"})),
            other(Family::Mistral, &json!({"sliding_window": 5, "num_key_value_heads": 1})),
            other(Family::Qwen2, &json!({"use_sliding_window": true, "sliding_window": 20, "max_window_layers": 1})),
            other(Family::Qwen3, &json!({"head_dim": 6, "num_key_value_heads": 1})),
            other(Family::Qwen3, &json!({"attention_bias": true, "tie_word_embeddings": false})),
            other(Family::GptNeox, &json!({"tie_word_embeddings": false})),
            other(
                Family::GptNeox,
                &json!({"use_parallel_residual": false, "rotary_pct": 1.0, "attention_bias": false}),
            ),
            adapted(&gpt2(|_| {})),
            adapted(&llama(|config| (config.attention_bias, config.mlp_bias) = (true, true))),
        ];
        for model in &models {
            let width = model.width();
            let prompt = Var::from_vec(numbers(99, 4 * width), (4, width), &Device::Cpu).unwrap().into_inner();
            for (prompt, dropout) in
                [(None, None), (Some(&prompt), None), (None, Some(dropout)), (Some(&prompt), Some(dropout))]
            {
                let rows = batch.behind_prompt(if prompt.is_some() { 4 } else { 0 });
                // Sometimes with what comes out of its two blocks.
                let layers: &[usize] = if prompt.is_some() { &[1, 0] } else { &[] };
                let fused = model.hidden_beside(&batch, prompt, dropout.as_ref(), layers).unwrap();
                let plain = model.hidden_plain(&rows, prompt, dropout, layers).unwrap();
                let columns = fused.dim(1).unwrap();
                let mut parameters = model.parameters();
                parameters.shift_remove(model.config.head());
                parameters.extend(prompt.map(|prompt| ("prompt".to_owned(), prompt.clone())));
                let factors = Tensor::from_vec(numbers(7, 41 * columns), (41, columns), &Device::Cpu).unwrap();
                let [(fused, found), (plain, expected)] = [fused, plain].map(|hidden| {
                    let loss = (&hidden * &factors).unwrap().sum_all().unwrap();
                    (hidden, gradients(&loss, &parameters).unwrap())
                });
                let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let near = |what: &str, found: &Tensor, expected: &Tensor| {
                    let (found, expected) = (flat(found), flat(expected));
                    let largest = expected.iter().fold(1e-3f32, |a, b| a.max(b.abs()));
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!((found - expected).abs() < 2e-5 * largest, "{what}: {found}, expected {expected}");
                    }
                };
                near("hidden", &fused, &plain);
                for (name, gradient) in &expected {
                    // A softmax does not see what a bias of keys that are not turned adds to all scores of a query: the
                    // gradient is zero, and rounding is all there is.
                    if !(name.starts_with("model.decoder.") && name.ends_with("k_proj.bias")) {
                        near(name, &found[name], gradient);
                    }
                }
            }
        }
    }

    #[test]
    fn a_model_cut_to_some_layers_has_their_weights_and_all_that_is_outside_of_layers() {
        for model in [gpt2(|config| config.n_layer = 4), llama(|config| config.num_hidden_layers = 4)] {
            let cut = model.cut_to(&[0, 3]).unwrap();
            assert_eq!(cut.config.layers(), 2);
            let values = |model: &LanguageModel, name: &str| {
                model.weights[name].master().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            for name in cut.weights.keys() {
                let from = if name.contains(".1.") { name.replace(".1.", ".3.") } else { name.clone() };
                assert!(values(&cut, name) == values(&model, &from), "{name}");
                assert!(!cut.parameters()[name].is_variable());
            }
            let mut batch = Packed::new();
            batch.push(3, &[1, 2, 3]);
            assert!(is_finite(&cut.hidden(&batch, None, None).unwrap()).unwrap());
            assert!(model.cut_to(&[4]).is_err() && model.cut_to(&[]).is_err());
        }
    }

    #[test]
    fn the_layers_that_are_kept_see_what_they_saw() {
        let config = Architecture::new(Family::Qwen3, 4, 24).config(17, 0).unwrap();
        let sees = |more| {
            let config = config.with(&more).of_layers(&[0, 2, 3]);
            // As a folder that was saved would be read.
            config.with(&serde_json::json!({})).to_json().unwrap()
        };
        let window = serde_json::json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 2});
        assert_eq!(sees(window)["max_window_layers"], 1);
        let [full, slides] = ["full_attention", "sliding_attention"];
        let types = serde_json::json!({"use_sliding_window": true, "sliding_window": 5,
            "layer_types": [full, full, slides, full]});
        assert_eq!(sees(types)["layer_types"], serde_json::json!([full, slides, full]));
    }

    #[test]
    fn activation_checkpointing_changes_no_bit() {
        let mut batch = Packed::new();
        batch.push(3, &[1, 2, 3, 4, 5, 6, 7]);
        batch.push(5, &(0..33).map(|t| t % 17).collect::<Vec<_>>());
        let prompt = Var::from_vec(numbers(99, 4 * 24), (4, 24), &Device::Cpu).unwrap().into_inner();
        let dropout = Dropout { seed: 2, update: 9, purpose: purpose::DROPOUT };
        // GPT-2 has 12 parameters in a block and 4 outside, Llama 9 and 2, OPT 16 and 4, Qwen3 11 and 2, GPT-NeoX 12 and 3.
        for (family, count, frozen) in [
            (Family::Gpt2, 28, false),
            (Family::Gpt2, 0, true),
            (Family::Llama, 20, false),
            (Family::Llama, 0, true),
            (Family::Opt, 36, false),
            (Family::Qwen3, 24, false),
            (Family::GptNeox, 27, false),
            // Two matrices on each of three layers of two blocks.
            (Family::Mistral, 12, false),
        ] {
            let run = |on: bool| {
                let model = match family {
                    Family::Mistral => adapted(&other(family, &json!({}))),
                    Family::Gpt2 => gpt2(|_| {}),
                    Family::Llama => llama(|config| config.num_key_value_heads = Some(1)),
                    family => other(family, &json!({})),
                };
                let model = model.with_activation_checkpointing(on);
                let model = if frozen { model.frozen() } else { model };
                let hidden = model.hidden(&batch, Some(&prompt), Some(&dropout)).unwrap();
                let factors = Tensor::from_vec(numbers(7, 40 * 24), (40, 24), &Device::Cpu).unwrap();
                let loss = (&hidden * &factors).unwrap().sum_all().unwrap();
                let mut parameters = model.parameters();
                parameters.insert("prompt".to_owned(), prompt.clone());
                let gradients = gradients(&loss, &parameters).unwrap();
                let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (flat(&hidden), gradients.values().map(flat).collect::<Vec<_>>())
            };
            let (hidden, gradients) = run(false);
            assert_eq!(gradients.len(), 1 + count);
            assert!((hidden, gradients) == run(true), "{family:?}, frozen {frozen}");
        }
    }

    #[test]
    fn fresh_weights_have_their_scale_and_depend_on_the_seed_alone() {
        let architecture = Architecture::new(Family::Gpt2, 8, 64);
        let tokenizer = TokenizerFile::new("", 0, 300);
        let init = |seed| LanguageModel::init(&architecture, tokenizer.clone(), seed, &Device::Cpu).unwrap();
        let values = |model: &LanguageModel, name: &str| {
            model.weights[name].master().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let model = init(1);
        for (name, expected) in [
            ("transformer.wte.weight", 0.02),
            ("transformer.h.3.attn.c_attn.weight", 0.02),
            ("transformer.h.3.attn.c_proj.weight", 0.005),
            ("transformer.h.7.mlp.c_proj.weight", 0.005),
        ] {
            let values = values(&model, name);
            let deviation = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
            assert!((deviation / expected - 1.0).abs() < 0.05, "{name}: {deviation}");
        }
        assert!(values(&model, "transformer.h.0.ln_1.weight").iter().all(|x| *x == 1.0));
        assert!(values(&model, "transformer.h.0.ln_1.bias").iter().all(|x| *x == 0.0));
        let name = "transformer.h.5.mlp.c_fc.weight";
        assert_eq!(values(&model, name), values(&init(1), name));
        assert_ne!(values(&model, name), values(&init(2), name));
        assert_ne!(values(&model, name)[..100], values(&model, "transformer.h.4.mlp.c_fc.weight")[..100]);
    }

    #[test]
    fn a_fresh_llama_begins_like_a_fresh_gpt2() {
        let architecture = Architecture { tied: Some(false), ..Architecture::new(Family::Llama, 8, 64) };
        let tokenizer = TokenizerFile::new("", 0, 300);
        let model = LanguageModel::init(&architecture, tokenizer, 1, &Device::Cpu).unwrap();
        for (name, expected) in [
            ("model.embed_tokens.weight", 0.02),
            ("lm_head.weight", 0.02),
            ("model.layers.3.self_attn.k_proj.weight", 0.02),
            ("model.layers.3.self_attn.o_proj.weight", 0.005),
            ("model.layers.7.mlp.up_proj.weight", 0.02),
            ("model.layers.7.mlp.down_proj.weight", 0.005),
        ] {
            let values = model.weights[name].master().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let deviation = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
            assert!((deviation / expected - 1.0).abs() < 0.05, "{name}: {deviation}");
        }
        let norm =
            model.weights["model.layers.0.post_attention_layernorm.weight"].master().unwrap().to_vec1::<f32>().unwrap();
        assert!(norm.iter().all(|x| *x == 1.0));
    }
}
