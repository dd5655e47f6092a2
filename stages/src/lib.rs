//! The stage kinds, one file each, and their [`registry`].
//!
//! A stage reads and makes values; it knows neither keys nor the store. What computes with tensors is in `lm`.

#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use contract::{AnyValue, Dataset, Env, Folder, Metrics, PortType, Predictions, Registry, Result};
pub use lm::gpus;
use lm::{Adapter, LanguageModel, SoftPrompt, TeacherCache};

pub mod across;
pub mod adapt;
pub mod address;
pub mod aligned;
pub mod attention;
pub mod calibration;
pub mod chat;
mod columns;
pub mod command;
pub mod corpus;
pub mod cut_layers;
pub mod distill;
pub mod download;
pub mod evaluate;
pub mod export;
pub mod exposure_bias;
pub mod finetune;
pub mod finite;
mod foresight;
pub mod gguf;
mod hidden_states;
pub mod instruct;
pub mod interval;
pub mod merge;
pub mod mix;
pub mod mmidx;
pub mod number;
mod padding;
mod parquet_rows;
pub mod policy_gradient;
pub mod porter;
pub mod prompt_init;
pub mod prompt_tune;
pub mod quantize;
mod records;
pub mod score;
mod sentencepiece;
pub mod spelling;
pub mod student_generate;
pub mod teacher_cache;
pub mod teacher_generate;
mod teachers;
pub mod template;
#[cfg(test)]
mod testing;
pub mod text;
pub mod tokenize;
pub mod tokenizer;
pub mod train_tokenizer;
pub mod training;
mod writing;

/// All kinds, by name.
pub fn registry() -> Registry {
    Registry::new(load)
        .with(adapt::Adapt)
        .with(attention::Attention)
        .with(calibration::Calibration)
        .with(command::Command)
        .with(cut_layers::CutLayers)
        .with(distill::Distill)
        .with(download::Download)
        .with(evaluate::Evaluate)
        .with(export::Export)
        .with(exposure_bias::ExposureBias)
        .with(finetune::Finetune)
        .with(merge::Merge)
        .with(mix::Mix)
        .with(policy_gradient::PolicyGradient)
        .with(prompt_init::PromptInit)
        .with(prompt_tune::PromptTune)
        .with(quantize::Quantize)
        .with(student_generate::StudentGenerate)
        .with(teacher_cache::TeacherCaching)
        .with(teacher_generate::TeacherGenerate)
        .with(tokenize::Tokenize)
        .with(train_tokenizer::TrainTokenizer)
}

/// Reads a value back from the folder that its `save` wrote.
fn load(port_type: PortType, folder: &Path, env: &Env) -> Result<AnyValue> {
    let device = || lm::device(&env.device);
    Ok(match port_type {
        PortType::Dataset => Arc::new(Dataset::load(folder)?),
        PortType::Model => Arc::new(LanguageModel::load(folder, &device()?)?),
        PortType::Adapter => Arc::new(Adapter::load(folder, &device()?)?),
        PortType::SoftPrompt => Arc::new(SoftPrompt::load(folder, &device()?)?),
        PortType::TeacherCache => Arc::new(TeacherCache::load(folder)?),
        PortType::State => bail!("an inner state is read by the kind of the stage that it is of"),
        PortType::Metrics => Arc::new(Metrics::load(folder)?),
        PortType::Predictions => Arc::new(Predictions::load(folder)?),
        other => Arc::new(Folder::new(other, folder)),
    })
}
