//! `prompt-init`: the first soft prompt of a teacher.
//!
//! ```yaml
//! prompt0:
//!   kind: prompt-init
//!   in: {model: teacher}
//!   with: {length: 7, text: "Suppose you are a student."}
//! ```
//!
//! From a text: the teacher's input embeddings of its tokens, cut or repeated to `length` vectors (PromptKD, section 3.2;
//! the published start is seven tokens of GPT-2). A teacher that has never seen the text before a task is harmed by it
//! until tuning repairs that, so the stage warns when the text is not exactly `length` tokens.
//! Inputs: `model`. Outputs: `prompt`, `[length, width]`. Cost: none.

use anyhow::ensure;
use candle_core::Tensor;
use contract::random::{normal, philox, purpose};
use contract::{
    About, AnyValue, Cause, ConfigError, Env, Facts, Inputs, Operator, Outlook, Outputs, PortType, Ports, Result, Sink,
    Stage, Step,
};
use contract::{Conventions, limits};
use lm::{LanguageModel, SoftPrompt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::{Bos, SpecialTokens, Text, begun};

/// The `with` of `prompt-init`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Vectors in the prompt.
    #[schemars(range(min = 1, max = limits::TOKENS))]
    pub length: usize,
    /// What the vectors start from.
    #[serde(default)]
    pub from: From,
    /// The text, for `from: text`.
    #[serde(default)]
    pub text: Option<String>,
    /// What becomes of a text that is spelled like a control token: `text` keeps it text, `parse` makes it that token. Left out:
    /// as the conventions say.
    #[serde(default)]
    pub special_tokens: Option<SpecialTokens>,
    /// Whether the text begins with the token that begins a text. Left out: `no`, for the text behind the prompt has its own
    /// (`reference`: `from-tokenizer`, as the published program does).
    #[serde(default)]
    pub bos: Option<Bos>,
    /// Seed of `from: random`.
    #[serde(default)]
    #[schemars(range(min = 0, max = limits::SEED))]
    pub seed: u64,
}

/// What a soft prompt starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// Embeddings of a text's tokens.
    #[default]
    Text,
    /// The embedding of the end token, over and over (the published `PAD`).
    End,
    /// Standard normal numbers.
    Random,
}

/// The kind.
pub struct PromptInit;

impl Stage for PromptInit {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "prompt-init",
            // 2: the spelling of a control token is text.
            version: 2,
            numerics: None,
            summary: "makes the first soft prompt of a teacher, from a text, the end token or at random",
            example: "kind: prompt-init\nin: {model: teacher}\nwith: {length: 7, text: \"Suppose you are a student.\"}",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        if config.from == From::Text {
            let reference = conventions == Conventions::Reference;
            config.special_tokens.get_or_insert(if reference { SpecialTokens::Parse } else { SpecialTokens::Text });
            config.bos.get_or_insert(if reference { Bos::FromTokenizer } else { Bos::No });
        }
        if config.from != From::Random {
            // Nothing is drawn.
            config.seed = 0;
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        match (config.from, &config.text) {
            (From::Text, None) => errors.push(
                ConfigError::at("text", "`from: text` needs a text")
                    .hint("give `text`, or say `from: end` or `from: random`"),
            ),
            (From::Text, Some(text)) if text.is_empty() => errors.push(ConfigError::at("text", "the text is empty")),
            (From::End | From::Random, None) if config.special_tokens.is_some() || config.bos.is_some() => {
                errors.push(ConfigError::at(
                    "",
                    "`special_tokens` and `bos` are about a text, and `from` does not say `text`",
                ));
            }
            (From::End | From::Random, Some(_)) => errors.push(
                ConfigError::at("text", "a text is given, but `from` does not say `text`")
                    .hint("remove one of the two"),
            ),
            _ => {}
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new().input("model", PortType::Model, "the teacher that the prompt is for").output(
            "prompt",
            PortType::SoftPrompt,
            "the prompt, [length, width]",
        )
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let (length, Facts { positions, width, .. }) = (config.length as u64, outlook.input("model"));
        if let Some(positions) = positions.filter(|positions| length >= *positions) {
            outlook.error(
                [Cause::Field("length".into()), Cause::Input("model".into(), "init.positions".into())],
                format!(
                    "a soft prompt of {length} vectors leaves no room for text in the {positions} positions of `model`"
                ),
                format!(
                    "lower `length`: the published prompts have 7 vectors, and {} are the most",
                    positions.saturating_sub(1)
                ),
            );
        }
        outlook.holds("model");
        let bytes = length.saturating_mul(4).saturating_mul(width.unwrap_or(1));
        outlook.needs_bytes(&format!("{length} vectors"), bytes, Cause::Field("length".into()));
        outlook.output("prompt", Facts { vectors: Some(length), width, ..Facts::default() });
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Initialising(config)))
    }
}

struct Initialising(Config);

impl Operator for Initialising {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let Initialising(config) = self;
        let model = inputs.take::<LanguageModel>("model")?.frozen();
        let vectors = match config.from {
            From::Random => random_vectors(config, &model)?,
            From::End => embeddings(&model, &vec![model.tokenizer.end; config.length])?,
            From::Text => {
                let text = config.text.as_deref().unwrap_or_default();
                let special_tokens = config.special_tokens.unwrap_or(SpecialTokens::Text);
                let ids = Text::new(&model.tokenizer, special_tokens)?.encode(text)?;
                let ids = begun(&config.bos.unwrap_or(Bos::No).ids(&model.tokenizer)?, ids);
                if ids.len() != config.length {
                    sink.warn(&format!(
                        "the start text is {} tokens and `length` is {}: it is {} to fit; a teacher that does not know \
                         the result as text may be harmed by it",
                        ids.len(),
                        config.length,
                        if ids.len() > config.length { "cut" } else { "repeated" },
                    ));
                }
                let ids: Vec<u32> = ids.iter().copied().cycle().take(config.length).collect();
                embeddings(&model, &ids)?
            }
        };
        ensure!(
            lm::is_finite(&vectors)?,
            "the embeddings that the prompt is to start from are not all finite: the weights of `model` are broken"
        );
        Ok(Outputs::new().with("prompt", SoftPrompt::new(vectors, &model)?))
    }
}

fn embeddings(model: &LanguageModel, ids: &[u32]) -> Result<Tensor> {
    let ids = Tensor::from_slice(ids, ids.len(), model.device())?;
    Ok(model.embedding()?.index_select(&ids, 0)?)
}

fn random_vectors(config: &Config, model: &LanguageModel) -> Result<Tensor> {
    let count = config.length * model.width();
    let numbers: Vec<f32> = (0..count.div_ceil(2))
        .flat_map(|pair| {
            let [a, b, ..] = philox(config.seed, [pair as u32, 0, 0, purpose::PROMPT_INIT]);
            let (x, y) = normal(a, b);
            [x, y]
        })
        .take(count)
        .collect();
    Ok(Tensor::from_vec(numbers, (config.length, model.width()), model.device())?)
}
