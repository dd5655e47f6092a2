//! Soft prompts as PEFT prompt-tuning folders.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use candle_core::{Device, Tensor};
use contract::{Facts, PortType, Result, Value};
use serde_json::{Value as Json, json};

use crate::files::tensors::{read, read_tensors, write_json, write_tensors};
use crate::model::LanguageModel;

/// Vectors that stand before a text, in place of tokens (Lester et al., 2021).
pub struct SoftPrompt {
    /// `[n, C]`; a variable while it is trained.
    pub vectors: Tensor,
    /// Layers of the model it is for: PEFT asks.
    pub layers: usize,
    /// Attention heads of the model it is for: PEFT asks.
    pub heads: usize,
}

impl SoftPrompt {
    /// A soft prompt for `model`.
    ///
    /// Errors when `vectors` is not `[n, C]` with `C` the width of the model.
    pub fn new(vectors: Tensor, model: &LanguageModel) -> Result<Self> {
        let (_, width) = vectors.dims2().context("a soft prompt has shape [length, width]")?;
        ensure!(width == model.width(), "soft prompt of width {width} for a model of width {}", model.width());
        Ok(SoftPrompt { vectors, layers: model.config.layers(), heads: model.config.sizes().heads })
    }

    /// Number of vectors `n`.
    pub fn length(&self) -> usize {
        self.vectors.dims()[0]
    }

    /// Reads a PEFT prompt-tuning folder: `adapter_config.json` and `adapter_model.safetensors`.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let path = folder.join("adapter_config.json");
        let config: Json =
            serde_json::from_slice(&read(&path)?).with_context(|| format!("`{}` is not JSON", path.display()))?;
        let kind = config["peft_type"].as_str().unwrap_or("nothing");
        ensure!(kind == "PROMPT_TUNING", "`{}` describes `{kind}`: expected `PROMPT_TUNING`", path.display());
        let number = |key: &str| {
            let number = config[key].as_u64().map(|n| n as usize);
            number.with_context(|| format!("`{}` has no number `{key}`", path.display()))
        };
        let expected = [number("num_virtual_tokens")?, number("token_dim")?];
        let file = folder.join("adapter_model.safetensors");
        let (mut tensors, _) = read_tensors(&file, device)?;
        let vectors = tensors
            .remove("prompt_embeddings")
            .with_context(|| format!("tensor `prompt_embeddings` is missing in `{}`", file.display()))?;
        ensure!(
            vectors.dims() == expected,
            "tensor `prompt_embeddings` in `{}` has shape {:?}, expected {expected:?} by `adapter_config.json`",
            file.display(),
            vectors.dims()
        );
        Ok(SoftPrompt { vectors, layers: number("num_layers")?, heads: number("num_attention_heads")? })
    }
}

impl Value for SoftPrompt {
    fn port_type(&self) -> PortType {
        PortType::SoftPrompt
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let (length, width) = self.vectors.dims2()?;
        let config = json!({
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": null,
            "inference_mode": true,
            "num_virtual_tokens": length,
            "token_dim": width,
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": null,
            "tokenizer_name_or_path": null,
        });
        write_json(&folder.join("adapter_config.json"), &config)?;
        let tensors = [("prompt_embeddings".to_owned(), self.vectors.clone())];
        write_tensors(&folder.join("adapter_model.safetensors"), tensors.iter().map(|(n, t)| (n, t)), None)
    }

    fn facts(&self) -> Facts {
        let [vectors, width] = [0, 1].map(|axis| self.vectors.dims().get(axis).map(|size| *size as u64));
        Facts { vectors, width, ..Facts::default() }
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_soft_prompt_loads_bit_equal() {
        let vectors = Tensor::new(&[[1.0f32, -0.1, f32::MIN_POSITIVE], [1e-30, 3.0, 0.7]], &Device::Cpu).unwrap();
        let prompt = SoftPrompt { vectors, layers: 2, heads: 3 };
        let folder = tempfile::tempdir().unwrap();
        prompt.save(folder.path()).unwrap();
        let loaded = SoftPrompt::load(folder.path(), &Device::Cpu).unwrap();
        assert_eq!(loaded.vectors.to_vec2::<f32>().unwrap(), prompt.vectors.to_vec2::<f32>().unwrap());
        assert_eq!((loaded.length(), loaded.layers, loaded.heads), (2, 2, 3));
    }

    #[test]
    fn a_prompt_of_another_shape_than_announced_is_an_error() {
        let vectors = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        SoftPrompt { vectors, layers: 1, heads: 1 }.save(folder.path()).unwrap();
        let path = folder.path().join("adapter_config.json");
        let text =
            std::fs::read_to_string(&path).unwrap().replace("\"num_virtual_tokens\": 2", "\"num_virtual_tokens\": 5");
        std::fs::write(&path, text).unwrap();
        let error = SoftPrompt::load(folder.path(), &Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("has shape [2, 3], expected [5, 3]"), "{error}");
    }
}
