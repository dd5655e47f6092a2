//! Language models: what they compute, how they are trained, how they write, how they are kept on disk.
//!
//! Knows tensors; knows no YAML, no key and no path policy. The way of data:
//!
//! - [`LanguageModel`] is a model with its tokenizer, read from and written to a Hugging Face folder;
//! - [`Packed`] is a batch: sequences laid end to end, without padding;
//! - [`LanguageModel::hidden`] turns a batch into hidden states, and [`loss`] those into a number: the logits of a whole
//!   batch never exist;
//! - [`gradients`] turns that number into [`Gradients`], and [`AdamW`] into new weights;
//! - [`TeacherCache`] keeps what a frozen model says of a text, so that it need not run again;
//! - [`generate()`] lets a model write, choosing tokens by [`sample`].
//!
//! The operations are fused by hand (`kernels`), on the CPU, where they give the same bits with any number of threads, and on
//! NVIDIA's GPUs.

mod adapter;
mod batch;
mod device;
mod dtype;
mod families;
mod files;
mod finite;
mod generate;
mod head;
mod host;
mod kernels;
pub mod loss;
mod model;
mod ops;
mod optim;
mod projection;
mod prompt;
mod schedule;
mod teacher_cache;
mod terms;
mod weights;

pub use adapter::{ADAPTER, ADAPTER_FILES, Adapter, Biases, Lora};
pub use batch::{Input, Packed};
pub use device::{device, gpus};
pub use dtype::Dtype;
pub use families::{
    Architecture, Config, EndTokens, Family, Gpt2Config, GptNeoxConfig, LayerType, LlamaConfig, MistralConfig,
    OptConfig, Qwen2Config, Qwen3Config, RopeScaling, Sizes,
};
pub use files::export::{families_in_llama_cpp, is_in_llama_cpp};
pub use files::folder::{MODEL_FILES, ModelFolder};
pub use files::gguf::{Gguf, GgufModel, GgufTensor, GgufValue, ModelTensor, Order, row_order};
pub use finite::{NotFinite, is_finite};
pub use generate::{Generate, Generated, Mixed, Prompt, generate, generate_mixed, sample};
pub use head::Head;
pub use model::LanguageModel;
pub use optim::{AdamW, AdamWOptions, Gradients, OptimizerState, Sgd, SgdOptions, accumulate, gradients, norm};
pub use projection::Projections;
pub use prompt::SoftPrompt;
pub use schedule::{Schedule, Warmup, learning_rate};
pub use teacher_cache::{Keep, Prompts, Response, Said, Storage, TeacherCache, TeacherCacheWriter};
pub use terms::activation::Activation;
pub use terms::dropout::Dropout;
pub use terms::format::Format;

/// Version of the numbers this crate computes: part of the key of every stage that uses it. Bumped when the same inputs
/// give other bits on the same machine.
pub const NUMERICS: u32 = 3;
