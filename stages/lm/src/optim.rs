//! From a loss to new weights: gradients, their norm, AdamW, SGD.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
use candle_core::{Device, Result as TensorResult, Tensor, Var};
use contract::{PortType, Result, Value};
use indexmap::IndexMap;
use rayon::prelude::*;

use crate::files::tensors::{read_tensors, write_tensors};
use crate::host::{change, elements};
#[cfg(feature = "cuda")]
use crate::kernels;
use crate::kernels::BLOCK;
use crate::kernels::adamw::{self, Update};
use crate::ops::collect;
#[cfg(feature = "cuda")]
use crate::ops::cuda;

/// Gradients by parameter name, in the order of the parameters. Each has storage of its own.
pub type Gradients = IndexMap<String, Tensor>;

/// The gradients of a scalar `loss` with respect to all of `parameters` that are variables.
///
/// Errors when one of them gets no gradient, and names all such: a parameter that training would silently leave alone.
pub fn gradients(loss: &Tensor, parameters: &IndexMap<String, Tensor>) -> Result<Gradients> {
    ensure!(loss.elem_count() == 1, "a loss is one number, got shape {:?}", loss.dims());
    let (mut store, mut collected) = collect::collect(loss)?;
    let mut gradients = Gradients::new();
    let mut without = Vec::new();
    for (name, parameter) in parameters.iter().filter(|(_, parameter)| parameter.is_variable()) {
        let direct = store.remove(parameter).map(|gradient| gradient.contiguous()).transpose()?;
        let contributions = collected.remove(&parameter.id()).unwrap_or_default();
        match collect::merge(direct, contributions, parameter)? {
            Some(gradient) => drop(gradients.insert(name.clone(), gradient)),
            None => without.push(format!("`{name}`")),
        }
    }
    ensure!(without.is_empty(), "the loss does not depend on {}: it would not be trained", without.join(", "));
    Ok(gradients)
}

/// Adds `other` to `total` in place: the gradients of the next part of a batch. An empty total takes them as they are.
///
/// Errors when the two do not hold the same parameters.
pub fn accumulate(total: &mut Gradients, other: Gradients) -> Result<()> {
    if total.is_empty() {
        *total = other;
        return Ok(());
    }
    ensure!(total.len() == other.len(), "gradients of {} parameters added to those of {}", other.len(), total.len());
    for (name, gradient) in other {
        let Some(so_far) = total.get_mut(&name) else { bail!("a gradient of `{name}` is added to none") };
        collect::add(so_far, &gradient)?;
    }
    Ok(())
}

/// The 2-norm of all gradients together. The same bits with any number of threads.
pub fn norm(gradients: &Gradients) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if let Some(device) = gpu(gradients) {
        let held: Vec<_> = gradients.values().map(Tensor::storage_and_layout).collect();
        let views =
            held.iter().map(|(storage, layout)| cuda::view_of(storage, layout)).collect::<TensorResult<Vec<_>>>()?;
        let norm = kernels::cuda::adamw::norm(device, &views)?;
        return Ok(device.clone_dtoh(&norm)?[0]);
    }
    let mut squares = 0.0;
    for gradient in gradients.values() {
        let gradient = elements(gradient)?;
        let parts: Vec<f64> = gradient.par_chunks(BLOCK).map(sum_of_squares).collect();
        squares += parts.iter().sum::<f64>();
    }
    Ok(squares.sqrt())
}

/// The GPU that gradients are on, if they are on one.
#[cfg(feature = "cuda")]
fn gpu(gradients: &Gradients) -> Option<&CudaDevice> {
    gradients.values().next().and_then(|gradient| gradient.device().as_cuda_device().ok())
}

fn sum_of_squares(block: &[f32]) -> f64 {
    /// Enough sums side by side that none waits for the one before.
    const LANES: usize = 32;
    let mut lanes = [0.0f64; LANES];
    let chunks = block.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += f64::from(*x) * f64::from(*x));
    }
    lanes.iter().sum::<f64>() + rest
}

/// What AdamW is set to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first and of the second moment, per update.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Each update takes `learning_rate * weight_decay` of a weight away. Which weights: see [`AdamWOptions::decays`].
    pub weight_decay: f64,
    /// Whether weights of norms decay too, where they are not named as in GPT-2: what the published programs do to
    /// OPT and Llama.
    pub decay_norms: bool,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        AdamWOptions { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01, decay_norms: false }
    }
}

impl AdamWOptions {
    /// Whether a parameter of that name decays: all but biases and weights of norms. GPT-2's norms (`ln_1`, `ln_2`, `ln_f`)
    /// never do; others (`layer_norm`, `norm`, `layernorm`) only with `decay_norms`.
    pub fn decays(&self, name: &str) -> bool {
        decays(name, self.decay_norms)
    }
}

fn decays(name: &str, decay_norms: bool) -> bool {
    let gpt2_norm = name.split('.').any(|part| part.starts_with("ln_"));
    !name.ends_with("bias") && !gpt2_norm && (decay_norms || !name.contains("norm"))
}

/// AdamW (Loshchilov and Hutter, 2019) with moments in f32, as PyTorch computes it.
pub struct AdamW {
    options: AdamWOptions,
    state: OptimizerState,
}

impl AdamW {
    /// Without moments yet.
    pub fn new(options: AdamWOptions) -> Self {
        AdamW { options, state: OptimizerState::default() }
    }

    /// Continues from `state`.
    pub fn from_state(options: AdamWOptions, state: &OptimizerState) -> Result<Self> {
        Ok(AdamW { options, state: state.copy()? })
    }

    /// A copy of the moments, for a checkpoint.
    pub fn to_state(&self) -> Result<OptimizerState> {
        self.state.copy()
    }

    /// How many updates were made.
    pub fn updates(&self) -> u64 {
        self.state.updates
    }

    /// Updates variables in place. Gradients are multiplied by `scale` first: 1, or what clips their norm.
    ///
    /// Errors when there is a gradient for a parameter that is not there, is frozen or has another shape. Parameters
    /// without a gradient stay as they are.
    pub fn step(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        gradients: &Gradients,
        learning_rate: f64,
        scale: f64,
    ) -> Result<()> {
        let updates = self.begin(parameters, gradients, learning_rate, scale)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = gpu(gradients) {
            return Ok(self.apply_on_gpu(device, parameters, gradients, &updates)?);
        }
        // All parameters at once: most are too small to be worth several threads of their own.
        let all: Vec<_> = gradients.iter().zip(&updates).collect();
        all.into_par_iter().try_for_each(|((name, gradient), update)| {
            let (first, second) = &self.state.moments[name];
            apply(&parameters[name], first, second, gradient, *update).with_context(|| format!("updating `{name}`"))
        })
    }

    /// Checks the gradients, makes moments where there are none yet, and gives the update of each parameter.
    fn begin(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        gradients: &Gradients,
        learning_rate: f64,
        scale: f64,
    ) -> Result<Vec<Update>> {
        for (name, gradient) in gradients {
            let parameter = checked(name, gradient, parameters, self.state.moments.get(name).map(|(first, _)| first))?;
            if !self.state.moments.contains_key(name) {
                let zeros = || parameter.detach().zeros_like();
                self.state.moments.insert(name.clone(), (zeros()?, zeros()?));
            }
        }
        self.state.updates += 1;
        let AdamWOptions { betas: (beta1, beta2), eps, weight_decay, .. } = self.options;
        let exponent = i32::try_from(self.state.updates).unwrap_or(i32::MAX);
        let update = |name: &str| {
            let decay = if self.options.decays(name) { weight_decay } else { 0.0 };
            Update {
                scale: scale as f32,
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                rest1: (1.0 - beta1) as f32,
                rest2: (1.0 - beta2) as f32,
                eps: eps as f32,
                keep: (1.0 - learning_rate * decay) as f32,
                step: (learning_rate / (1.0 - beta1.powi(exponent))) as f32,
                correction: (1.0 / (1.0 - beta2.powi(exponent)).sqrt()) as f32,
            }
        };
        Ok(gradients.keys().map(|name| update(name)).collect())
    }

    /// All parameters in one launch.
    #[cfg(feature = "cuda")]
    fn apply_on_gpu(
        &self,
        device: &CudaDevice,
        parameters: &IndexMap<String, Tensor>,
        gradients: &Gradients,
        updates: &[Update],
    ) -> TensorResult<()> {
        let tensors = gradients.iter().map(|(name, gradient)| {
            let (first, second) = &self.state.moments[name];
            [&parameters[name], first, second, gradient].map(Tensor::storage_and_layout)
        });
        let held: Vec<_> = tensors.collect();
        let mut changed = Vec::with_capacity(held.len());
        for ([weight, first, second, gradient], update) in held.iter().zip(updates) {
            changed.push(kernels::cuda::adamw::Parameter {
                weight: cuda::view_of(&weight.0, weight.1)?,
                first: cuda::view_of(&first.0, first.1)?,
                second: cuda::view_of(&second.0, second.1)?,
                gradient: cuda::view_of(&gradient.0, gradient.1)?,
                keep: update.keep,
            });
        }
        let Some(update) = updates.first() else { return Ok(()) };
        let scale = kernels::cuda::upload(device, vec![update.scale])?;
        kernels::cuda::adamw::adamw(device, &changed, *update, &scale)
    }

    /// [`AdamW::step`] by tensor operations: what it is tested against.
    #[cfg(test)]
    fn step_plain(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        gradients: &Gradients,
        learning_rate: f64,
        scale: f64,
    ) -> Result<()> {
        let updates = self.begin(parameters, gradients, learning_rate, scale)?;
        for ((name, gradient), update) in gradients.iter().zip(updates) {
            let (first, second) = &self.state.moments[name];
            apply_plain(&parameters[name], first, second, gradient, update)?;
        }
        Ok(())
    }
}

/// The parameter that a gradient is of, where all fit together: the gradient, and what an optimiser remembers of it.
fn checked<'p>(
    name: &str,
    gradient: &Tensor,
    parameters: &'p IndexMap<String, Tensor>,
    remembered: Option<&Tensor>,
) -> Result<&'p Tensor> {
    let Some(parameter) = parameters.get(name) else { bail!("a gradient of `{name}`, which is no parameter") };
    ensure!(parameter.is_variable(), "a gradient of `{name}`, which is frozen");
    let shapes = (parameter.dims(), gradient.dims());
    ensure!(shapes.0 == shapes.1, "gradient of `{name}` has shape {:?}, expected {:?}", shapes.1, shapes.0);
    if let Some(remembered) = remembered {
        ensure!(
            remembered.dims() == shapes.0,
            "the optimiser's state for `{name}` has shape {:?}, expected {:?}",
            remembered.dims(),
            shapes.0
        );
    }
    Ok(parameter)
}

/// What SGD is set to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdOptions {
    /// Share of the last step's direction that goes into the next; 0: none.
    pub momentum: f64,
    /// Times a weight, added to its gradient. Which weights: see [`AdamWOptions::decays`].
    pub weight_decay: f64,
    /// Whether weights of norms decay too.
    pub decay_norms: bool,
}

/// Stochastic gradient descent with momentum, as PyTorch computes it: `v = momentum v + g`, `w = w - learning_rate v`, where `g` has
/// the decay. By tensor operations.
pub struct Sgd {
    options: SgdOptions,
    state: OptimizerState,
}

impl Sgd {
    /// Without a direction yet.
    pub fn new(options: SgdOptions) -> Self {
        Sgd { options, state: OptimizerState::default() }
    }

    /// Continues from `state`.
    pub fn from_state(options: SgdOptions, state: &OptimizerState) -> Result<Self> {
        Ok(Sgd { options, state: state.copy()? })
    }

    /// A copy of the directions, for a checkpoint.
    pub fn to_state(&self) -> Result<OptimizerState> {
        self.state.copy()
    }

    /// Updates variables in place. Gradients are multiplied by `scale` first.
    ///
    /// Errors as [`AdamW::step`] does.
    pub fn step(
        &mut self,
        parameters: &IndexMap<String, Tensor>,
        gradients: &Gradients,
        learning_rate: f64,
        scale: f64,
    ) -> Result<()> {
        let SgdOptions { momentum, weight_decay, decay_norms } = self.options;
        for (name, gradient) in gradients {
            let parameter = checked(name, gradient, parameters, self.state.velocity.get(name))?;
            let weights = parameter.detach();
            let mut direction = (gradient.detach() * scale)?;
            if weight_decay > 0.0 && decays(name, decay_norms) {
                direction = (direction + (&weights * weight_decay)?)?;
            }
            if let Some(velocity) = self.state.velocity.get(name) {
                direction = ((velocity * momentum)? + direction)?;
            }
            Var::from_tensor(parameter)?.set(&(weights - (&direction * learning_rate)?)?)?;
            self.state.velocity.insert(name.clone(), direction);
        }
        self.state.updates += 1;
        Ok(())
    }
}

fn apply(parameter: &Tensor, first: &Tensor, second: &Tensor, gradient: &Tensor, u: Update) -> TensorResult<()> {
    let gradient = elements(gradient)?;
    change(parameter, |weights| {
        change(first, |first| {
            change(second, |second| {
                adamw::update(weights, first, second, &gradient, u);
                Ok(())
            })
        })
    })
}

/// The update by tensor operations.
#[cfg(test)]
fn apply_plain(parameter: &Tensor, first: &Tensor, second: &Tensor, gradient: &Tensor, u: Update) -> TensorResult<()> {
    let [scale, beta1, beta2, rest1, rest2, eps, keep, step, correction] =
        [u.scale, u.beta1, u.beta2, u.rest1, u.rest2, u.eps, u.keep, u.step, u.correction].map(f64::from);
    let g = (gradient * scale)?;
    let new_first = ((first * beta1)? + (&g * rest1)?)?;
    let new_second = ((second * beta2)? + (g.sqr()? * rest2)?)?;
    let direction = new_first.div(&((new_second.sqrt()? * correction)? + eps)?)?;
    let weights = parameter.detach();
    let new_weights = ((weights * keep)? - (direction * step)?)?;
    Var::from_tensor(parameter)?.set(&new_weights)?;
    for (old, new) in [(first, new_first), (second, new_second)] {
        old.slice_set(&new, 0, 0)?;
    }
    Ok(())
}

/// What an optimiser remembers by parameter name: a `state`.
#[derive(Default)]
pub struct OptimizerState {
    updates: u64,
    /// AdamW's.
    moments: IndexMap<String, (Tensor, Tensor)>,
    /// The last direction of SGD.
    velocity: IndexMap<String, Tensor>,
}

const FILE: &str = "optimizer.safetensors";

impl OptimizerState {
    /// Reads what [`Value::save`] wrote.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let path = folder.join(FILE);
        let (mut tensors, metadata) = read_tensors(&path, device)?;
        let updates = metadata.get("updates").and_then(|n| n.parse().ok());
        let updates = updates.with_context(|| format!("`{}` does not say how many updates it saw", path.display()))?;
        let names: Vec<String> = tensors.keys().filter_map(|n| n.strip_suffix(".first").map(str::to_owned)).collect();
        let mut moments = IndexMap::new();
        for name in names {
            let mut moment = |which: &str| {
                let tensor = tensors.remove(&format!("{name}.{which}"));
                tensor.with_context(|| format!("tensor `{name}.{which}` is missing in `{}`", path.display()))
            };
            let pair = (moment("first")?, moment("second")?);
            moments.insert(name, pair);
        }
        let velocity =
            tensors.into_iter().filter_map(|(name, tensor)| Some((name.strip_suffix(".velocity")?.to_owned(), tensor)));
        Ok(OptimizerState { updates, moments, velocity: velocity.collect() })
    }

    fn copy(&self) -> Result<Self> {
        let copy =
            |(name, (first, second)): (&String, &(Tensor, Tensor))| Ok((name.clone(), (first.copy()?, second.copy()?)));
        // Nobody changes a direction in place.
        let velocity = self.velocity.clone();
        Ok(OptimizerState {
            updates: self.updates,
            moments: self.moments.iter().map(copy).collect::<Result<_>>()?,
            velocity,
        })
    }
}

impl Value for OptimizerState {
    fn port_type(&self) -> PortType {
        PortType::State
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let mut tensors = IndexMap::new();
        for (name, (first, second)) in &self.moments {
            tensors.insert(format!("{name}.first"), first.clone());
            tensors.insert(format!("{name}.second"), second.clone());
        }
        for (name, velocity) in &self.velocity {
            tensors.insert(format!("{name}.velocity"), velocity.clone());
        }
        write_tensors(&folder.join(FILE), tensors.iter(), Some(("updates".to_owned(), self.updates.to_string())))
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{numbers, with_threads};

    fn tensors(seed: u64) -> IndexMap<String, Tensor> {
        let tensor = |(i, (name, shape)): (usize, (&str, Vec<usize>))| {
            let values = numbers(seed + i as u64, shape.iter().product());
            (name.to_owned(), Var::from_vec(values, shape, &Device::Cpu).unwrap().into_inner())
        };
        let shapes = [("h.0.ln_1.weight", vec![7]), ("h.0.c_fc.weight", vec![30, 70]), ("h.0.c_fc.bias", vec![70])];
        shapes.into_iter().enumerate().map(tensor).collect()
    }

    fn detached(tensors: IndexMap<String, Tensor>) -> Gradients {
        tensors.into_iter().map(|(name, tensor)| (name, tensor.detach())).collect()
    }

    #[test]
    fn what_decays_follows_from_the_name() {
        let (sound, reference) =
            (AdamWOptions::default(), AdamWOptions { decay_norms: true, ..AdamWOptions::default() });
        for (name, decays, decays_in_reference) in [
            ("transformer.wte.weight", true, true),
            ("transformer.h.0.attn.c_attn.weight", true, true),
            ("transformer.h.0.attn.c_attn.bias", false, false),
            ("transformer.h.0.ln_1.weight", false, false),
            ("transformer.ln_f.weight", false, false),
            ("model.decoder.layers.0.self_attn_layer_norm.weight", false, true),
            ("model.layers.0.input_layernorm.weight", false, true),
            ("prompt_embeddings", true, true),
        ] {
            assert_eq!((sound.decays(name), reference.decays(name)), (decays, decays_in_reference), "{name}");
        }
    }

    #[test]
    fn fused_and_plain_updates_agree() {
        let [fused, plain] = [(); 2].map(|()| tensors(1));
        let options = AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() };
        let (mut one, mut two) = (AdamW::new(options), AdamW::new(options));
        for update in 0..4 {
            let gradients = detached(tensors(50 + 10 * update));
            one.step(&fused, &gradients, 1e-2, 0.7).unwrap();
            two.step_plain(&plain, &gradients, 1e-2, 0.7).unwrap();
        }
        for (name, fused) in &fused {
            let difference = (fused.detach() - plain[name].detach()).unwrap().abs().unwrap().max_all().unwrap();
            assert!(difference.to_scalar::<f32>().unwrap() < 1e-6, "{name}");
        }
    }

    #[test]
    fn a_first_update_moves_every_weight_by_the_rate() {
        let parameters: IndexMap<String, Tensor> =
            [("w".to_owned(), Var::new(&[1.0f32, -2.0], &Device::Cpu).unwrap().into_inner())].into_iter().collect();
        let gradients: Gradients =
            [("w".to_owned(), Tensor::new(&[0.5f32, -3.0], &Device::Cpu).unwrap())].into_iter().collect();
        let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 0.5, ..AdamWOptions::default() });
        optimizer.step(&parameters, &gradients, 0.1, 1.0).unwrap();
        // w (1 - 0.1 * 0.5) - 0.1 sign(g)
        let found = parameters["w"].to_vec1::<f32>().unwrap();
        assert!((found[0] - 0.85).abs() < 1e-6 && (found[1] + 1.8).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn the_norm_is_exact_and_the_same_with_any_number_of_threads() {
        let values = numbers(3, 200_000);
        let expected = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let gradients: Gradients =
            [("w".to_owned(), Tensor::from_vec(values, 200_000, &Device::Cpu).unwrap())].into_iter().collect();
        let one = with_threads(1, || norm(&gradients).unwrap());
        assert!((one / expected - 1.0).abs() < 1e-12);
        assert_eq!(one, with_threads(3, || norm(&gradients).unwrap()));
    }

    #[test]
    fn gradients_of_strangers_are_errors() {
        let parameters = tensors(1);
        let mut optimizer = AdamW::new(AdamWOptions::default());
        let mut error = |name: &str, parameters: &IndexMap<String, Tensor>, shape: usize| {
            let gradient = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
            let gradients = [(name.to_owned(), gradient)].into_iter().collect();
            optimizer.step(parameters, &gradients, 1e-3, 1.0).unwrap_err().to_string()
        };
        assert!(error("nobody", &parameters, 3).contains("`nobody`, which is no parameter"));
        assert!(error("h.0.c_fc.bias", &parameters, 3).contains("has shape [3], expected [70]"));
        assert!(error("h.0.c_fc.bias", &detached(tensors(1)), 70).contains("which is frozen"));
    }
}
