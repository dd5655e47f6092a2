//! A model as a user asks for it.

use anyhow::ensure;
use contract::limits;
use contract::{Bounds, Facts, Result, Vocabulary};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Config, Family};

/// A model to be made from random weights. What is not said follows from the width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Family of the model.
    pub architecture: Family,
    /// Number of transformer blocks.
    #[schemars(range(min = 1, max = limits::LAYERS))]
    pub layers: usize,
    /// Channels of the hidden state.
    #[schemars(range(min = 1, max = limits::WIDTH))]
    pub width: usize,
    /// Attention heads, a divisor of `width`. Default: one for every 32 channels, and at least two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::HEADS))]
    pub heads: Option<usize>,
    /// Longest sequence in tokens, soft prompt included. Default: 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::TOKENS))]
    pub positions: Option<usize>,
    /// Probability of dropping an element in training, in the places a family has: embeddings (GPT-2, GPT-NeoX), attention
    /// (all), residual branches (GPT-2, GPT-NeoX, OPT). Default: 0, as small models underfit before they overfit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub dropout: Option<f32>,
    /// Channels inside the feed-forward layer. Default: 4 times `width` for GPT-2, GPT-NeoX and OPT; 8/3 of it for Llama,
    /// Mistral and Qwen, whose layer has three matrices instead of two, rounded up to a multiple of 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::WIDTH))]
    pub inner: Option<usize>,
    /// Whether the output head is the input embedding. Default: yes, as it is most of a small model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tied: Option<bool>,
    /// Heads of keys and values, a divisor of `heads`; of Llama, Mistral and Qwen alone. Default: as many as `heads`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::HEADS))]
    pub kv_heads: Option<usize>,
    /// Base of the rotary angles, larger for longer texts; not of GPT-2 and OPT. Default: 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = limits::ROPE_THETA))]
    pub rope_theta: Option<f64>,
}

impl Architecture {
    /// An architecture of which nothing but the size is said.
    pub fn new(architecture: Family, layers: usize, width: usize) -> Self {
        Architecture {
            architecture,
            layers,
            width,
            heads: None,
            positions: None,
            dropout: None,
            inner: None,
            tied: None,
            kv_heads: None,
            rope_theta: None,
        }
    }

    /// The same without what says no more than the default does: what is written out makes no other model.
    pub fn without_defaults(self) -> Self {
        fn unless<T: PartialEq>(value: Option<T>, default: T) -> Option<T> {
            value.filter(|value| *value != default)
        }
        let plain = Architecture::new(self.architecture, self.layers, self.width);
        let heads = self.heads();
        // What does not belong to a family stays, to be refused.
        let family = self.architecture;
        let kv_heads = if family.takes("kv_heads") { unless(self.kv_heads, heads) } else { self.kv_heads };
        let rope_theta = if family.takes("rope_theta") { unless(self.rope_theta, ROPE_THETA) } else { self.rope_theta };
        Architecture {
            architecture: family,
            layers: self.layers,
            width: self.width,
            heads: unless(self.heads, plain.heads()),
            positions: unless(self.positions, plain.positions()),
            dropout: unless(self.dropout, 0.0),
            inner: unless(self.inner, plain.default_inner()),
            tied: unless(self.tied, true),
            kv_heads,
            rope_theta,
        }
    }

    /// The full configuration over a vocabulary.
    ///
    /// Errors when the numbers do not fit one another, or the family.
    pub fn config(&self, vocab_size: usize, end: u32) -> Result<Config> {
        self.check_sizes()?;
        let family = self.architecture;
        for (option, given) in [("kv_heads", self.kv_heads.is_some()), ("rope_theta", self.rope_theta.is_some())] {
            ensure!(
                !given || family.takes(option),
                "`{option}` is of architecture {} alone: leave it out for `{}`",
                Family::named(|family| family.takes(option)).join(", "),
                family.name()
            );
        }
        let config = family.config(self, vocab_size, end);
        config.validate()?;
        Ok(config)
    }

    /// What is known of a model of this shape over a vocabulary.
    pub fn facts(&self, vocabulary: Option<Vocabulary>, ends: Option<Vec<u32>>) -> Facts {
        let size = vocabulary.as_ref().map_or(Bounds::ANY, |vocabulary| vocabulary.size);
        let with = |size: u64| self.config(size.clamp(1, LARGEST) as usize, 0).ok().map(|config| config.facts());
        let Some(least) = with(size.least) else { return Facts::default() };
        let most = size.exact().map_or(u64::MAX, |_| least.parameters.most);
        let parameters = Bounds { most, ..least.parameters };
        Facts { vocabulary, ends, embeddings: size, parameters, ..least }
    }

    /// Sizes whose products, added up over layers, stay within 64 bits or are counted as more than anyone has.
    fn check_sizes(&self) -> Result<()> {
        let sizes = [
            ("layers", Some(self.layers)),
            ("width", Some(self.width)),
            ("heads", self.heads),
            ("positions", self.positions),
            ("inner", self.inner),
            ("kv_heads", self.kv_heads),
        ];
        for (name, size) in sizes {
            let size = size.unwrap_or(0) as u64;
            ensure!(size <= LARGEST, "`{name}` is {size}: expected at most {LARGEST}");
        }
        Ok(())
    }

    pub(super) fn default_inner(&self) -> usize {
        self.architecture.default_inner(self.width)
    }

    pub(super) fn heads(&self) -> usize {
        self.heads.unwrap_or((self.width / 32).max(2))
    }

    pub(super) fn positions(&self) -> usize {
        self.positions.unwrap_or(512)
    }
}

/// Base of the rotary angles where nothing is said.
pub(super) const ROPE_THETA: f64 = 10_000.0;

/// The largest number that a size can be: far above that of any model, and small enough for its multiples.
const LARGEST: u64 = 1 << 32;
