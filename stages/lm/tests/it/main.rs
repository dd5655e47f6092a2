//! The crate from outside: one binary, so that it is linked once.

mod checkpoint;
#[cfg(feature = "cuda")]
mod cuda;
mod generation;
mod gguf;
mod llama;
mod lora;
mod parity;
mod training;

use candle_core::{Device, Tensor};
use contract::TokenizerFile;
use lm::{Architecture, Config, Family, LanguageModel};

/// A small random model of two layers over 40 ids, the end token being 0.
fn small_model(dropout: f32) -> LanguageModel {
    let architecture = Architecture::new(Family::Gpt2, 2, 32);
    lively(&Architecture { positions: Some(32), dropout: Some(dropout), ..architecture })
}

/// The same as a Llama whose query heads share keys and values.
fn small_llama() -> LanguageModel {
    let architecture = Architecture::new(Family::Llama, 2, 32);
    lively(&Architecture { positions: Some(32), heads: Some(4), kv_heads: Some(2), ..architecture })
}

/// Whether a parameter's gradient is zero but for rounding: a softmax does not see what the biases of OPT's keys add to all
/// scores of a query.
fn is_noise(name: &str) -> bool {
    name.starts_with("model.decoder.") && name.ends_with("k_proj.bias")
}

/// A small one of every family; Mistral's with a window.
fn small_models() -> Vec<LanguageModel> {
    let small = |family: &Family| match family {
        Family::Gpt2 => small_model(0.1),
        Family::Llama => small_llama(),
        family => {
            let shape = Architecture::new(*family, 2, 32);
            let mut model = lively(&Architecture { positions: Some(32), heads: Some(4), dropout: Some(0.1), ..shape });
            if let Config::Mistral(config) = &mut model.config {
                config.sliding_window = Some(5);
            }
            model
        }
    };
    Family::ALL.iter().map(small).collect()
}

fn lively(architecture: &Architecture) -> LanguageModel {
    let tokenizer = TokenizerFile::new("", 0, 40);
    let model = LanguageModel::init(architecture, tokenizer, 5, &Device::Cpu).unwrap();
    // Larger weights than a fresh model has, so that its distributions are far from uniform.
    let model = model.trainable().unwrap();
    for parameter in model.parameters().values().filter(|p| p.rank() == 2) {
        let var = candle_core::Var::from_tensor(parameter).unwrap();
        var.set(&(parameter.detach() * 8.0).unwrap()).unwrap();
    }
    model.frozen()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference relative to the largest entry.
fn gap(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |a, b| a.max(b.abs()));
    let difference = found.iter().zip(expected).fold(0f32, |a, (f, e)| a.max((f - e).abs()));
    f64::from(difference) / f64::from(largest)
}

fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}
