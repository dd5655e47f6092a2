//! What is read and written: files of tensors, and the folders of models.

pub(crate) mod export;
pub(crate) mod folder;
pub(crate) mod generation;
pub(crate) mod gguf;
pub(crate) mod llama2c;
pub(crate) mod parallel;
pub(crate) mod pickle;
pub(crate) mod tensors;
pub(crate) mod tokenizer;
