//! What is said of models that pad their vocabularies differently.

use contract::Sink;
use lm::LanguageModel;

/// Says once that two models are compared over the tokens that both know.
#[derive(Default)]
pub(crate) struct Padding {
    said: bool,
}

impl Padding {
    pub(crate) fn say(
        &mut self,
        port: &str,
        model: &LanguageModel,
        other_port: &str,
        other: &LanguageModel,
        sink: &mut dyn Sink,
    ) {
        if !self.said && model.vocab_size() != other.vocab_size() {
            self.said = true;
            sink.note(&format!(
                "`{port}` has {} rows in its output head and `{other_port}` {}: they are compared over the {} tokens of their \
                 tokenizer, and what is behind them is padding",
                model.vocab_size(),
                other.vocab_size(),
                model.vocabulary().min(other.vocabulary()),
            ));
        }
    }
}
