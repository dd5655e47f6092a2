//! (being written)

pub mod corpus;
pub mod download;
pub mod export;
pub mod instruct;
pub mod jsonl;
pub mod mmidx;
pub mod porter;
pub mod score;
pub mod template;
#[cfg(test)]
mod testing;
pub mod text;
pub mod tokenize;
pub mod train_tokenizer;
