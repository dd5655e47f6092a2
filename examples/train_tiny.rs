//! The language models alone: a tiny GPT-2 learns four sentences by heart, without any pipeline.
//!
//! ```text
//! cargo run --example train_tiny
//! ```
//!
//! Prints the loss of every twentieth update, which falls from about ln 28 = 3.33 (28 tokens, all alike) to nearly 0, and
//! then each sentence as the model completes it from its first word.

use anyhow::Result;
use contract::TokenizerFile;
use contract::random::purpose;
use lm::loss::head_loss;
use lm::sample::Sampling;
use lm::{AdamW, AdamWOptions, Architecture, Family, Generate, LanguageModel, Packed, Prompt, Schedule, Warmup};

const SENTENCES: [&str; 4] = [
    "students learn what a teacher knows",
    "teachers know more than they can say",
    "prompts help a teacher to say it simply",
    "small models run where large ones do not fit",
];
const UPDATES: u64 = 120;
/// The token that ends a sentence; a space is 1, letters follow.
const END: u32 = 0;

fn main() -> Result<()> {
    let shape = Architecture { positions: Some(48), ..Architecture::new(Family::Gpt2, 1, 64) };
    let tokenizer = TokenizerFile::new("", END, 28);
    let model = LanguageModel::init(&shape, tokenizer, 0, &lm::device("cpu")?)?.trainable()?;
    train(&model)?;
    for (row, sentence) in (0..).zip(SENTENCES) {
        let word = sentence.split(' ').next().unwrap_or_default();
        println!("{word}{}", complete(&model, row, word)?);
    }
    Ok(())
}

/// Every token of every sentence is predicted from those before it; all of them are one batch.
fn train(model: &LanguageModel) -> Result<()> {
    let (mut batch, mut labels) = (Packed::new(), Vec::new());
    for (row, sentence) in (0..).zip(SENTENCES) {
        let ids = encode(sentence);
        batch.push(row, &ids);
        labels.extend_from_slice(&ids[1..]);
        labels.push(END);
    }
    let weights = vec![1.0 / labels.len() as f32; labels.len()];
    let mut optimizer = AdamW::new(AdamWOptions::default());
    for update in 0..UPDATES {
        let hidden = model.hidden(&batch, None, None)?; // [N, C]
        let loss = head_loss(&hidden, &model.head()?, Some((&labels, 1.0)), &[], &weights)?.loss; // []
        if update % 20 == 0 || update + 1 == UPDATES {
            println!("update {update:3}  loss {:.3}", loss.to_scalar::<f32>()?);
        }
        let gradients = lm::gradients(&loss, &model.parameters())?;
        let warmup = Warmup { updates: 5, from_zero: false };
        let rate = lm::learning_rate(1e-2, Schedule::cosine(0.1), warmup, update, UPDATES);
        optimizer.step(&model.parameters(), &gradients, rate, 1.0)?;
    }
    Ok(())
}

/// What the model writes after a word, taking the likeliest token always.
fn complete(model: &LanguageModel, row: u64, word: &str) -> Result<String> {
    let options = Generate {
        sampling: Sampling::greedy(),
        max_new_tokens: 48,
        longest: usize::MAX,
        seed: 0,
        purpose: purpose::GENERATE,
        time: 0,
        batch: 1,
    };
    let ids = encode(word);
    let written = lm::generate(&model.frozen(), None, &[Prompt { row, ids: &ids }], &options, &mut |_| {})?;
    Ok(decode(&written[0].ids))
}

fn encode(text: &str) -> Vec<u32> {
    text.bytes().map(|letter| if letter == b' ' { 1 } else { u32::from(letter - b'a') + 2 }).collect()
}

fn decode(ids: &[u32]) -> String {
    let letter = |id: u32| if id == 1 { ' ' } else { char::from(b'a' + (id - 2) as u8) };
    ids.iter().filter(|id| **id != END).map(|id| letter(*id)).collect()
}
