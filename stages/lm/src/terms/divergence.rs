//! Divergences: how far the trainee's distribution is from a target's.
//!
//! Each is written once, as a [`Rule`] over [`Number`]s: the loops of the CPU run it on `f32`, the plain operations on
//! tensors, and the code for GPUs is printed from it.

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::formula::Number;

/// How far the trainee's distribution is from a target's.
///
/// With `s` the trainee's and `t` the target's probabilities of the tokens, and the sum over the vocabulary; beside
/// it the derivative by the trainee's logits at temperature 1. At temperature τ both distributions are of
/// `logits / τ`, and the derivative is that of these, divided by τ; no factor τ² is added.
///
/// Logarithms of probabilities are taken as at least -10⁴, so that no token of probability 0 gives an infinity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Divergence {
    /// `KL(t ‖ s) = Σ t (ln t - ln s)`; `s - t`. Spreads over all that the target may say.
    ForwardKl,
    /// `KL(s ‖ t) = Σ s (ln s - ln t)`; `s (ln s - ln t - KL)`. Keeps to what the target says most.
    ReverseKl,
    /// Generalised Jensen-Shannon: `β KL(t ‖ m) + (1 - β) KL(s ‖ m)` with `m = β t + (1 - β) s`;
    /// `(1 - β) s (ln(s / m) - KL(s ‖ m))`.
    Jsd {
        /// Weight of the target in the mixture, above 0 and below 1.
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        beta: f64,
    },
    /// `KL(t ‖ m)` with `m = α t + (1 - α) s`; `(1 - α) s (Σ t s / m - t / m)`.
    SkewedForwardKl {
        /// Weight of the target in the mixture, above 0 and below 1.
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        alpha: f64,
    },
    /// `KL(s ‖ m)` with `m = (1 - α) t + α s`; `h - s Σ h` with `h = s (ln(s / m) - α s / m)`.
    SkewedReverseKl {
        /// Weight of the trainee in the mixture, above 0 and below 1.
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        alpha: f64,
    },
    /// `½ Σ |s - t|`; `h - s Σ h` with `h = ½ s sign(s - t)`.
    TotalVariation,
    /// `-1 / (α β) Σ (t^α s^β - α / (α + β) t^(α + β) - β / (α + β) s^(α + β))`; `h - s Σ h` with
    /// `h = (s^(α + β) - t^α s^β) / α`. Goes to forward KL for α = 1 as β goes to 0, and to reverse KL for β = 1 as α
    /// goes to 0.
    AlphaBeta {
        /// Exponent of the target, above 0.
        #[schemars(extend("exclusiveMinimum" = 0.0), range(max = contract::limits::EXPONENT))]
        alpha: f64,
        /// Exponent of the trainee, above 0.
        #[schemars(extend("exclusiveMinimum" = 0.0), range(max = contract::limits::EXPONENT))]
        beta: f64,
    },
    /// `g KL(t ‖ s) + (1 - g) KL(s ‖ t)`, where `g` is the share of `Σ |t - s|` that lies on the head: on the target's likeliest
    /// tokens, the likeliest in any case, and as many more as have at most the probability `head` together. No gradient flows
    /// through `g`; `g (s - t) + (1 - g) s (ln s - ln t - KL(s ‖ t))`. AKL (Wu et al., "Rethinking Kullback-Leibler divergence in
    /// knowledge distillation for large language models", 2024, section 4).
    AdaptiveKl {
        /// Probability of the head, above 0 and below 1; 0.5 as published.
        #[serde(default = "half")]
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        head: f64,
    },
}

fn half() -> f64 {
    0.5
}

impl Divergence {
    /// Its name in metrics, such as `reverse_kl`.
    pub fn name(self) -> &'static str {
        for_rule!(self, R(_a, _b) => R::NAME)
    }

    /// Whether a parameter of its rule is another one at every position.
    #[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "only GPUs and tests ask"))]
    pub(crate) fn is_adaptive(self) -> bool {
        matches!(self, Divergence::AdaptiveKl { .. })
    }

    /// The parameters of its rule at a position where `share` gives that of a head's gap.
    pub(crate) fn parameters(self, share: impl FnOnce(f64) -> f64) -> [f64; 2] {
        match self {
            Divergence::AdaptiveKl { head } => [share(head), 0.0],
            other => for_rule!(other, R(a, b) => (R::NAME, [a, b]).1),
        }
    }

    /// Errors when a parameter is out of its range, and says what to use at the limit.
    pub fn validate(self) -> Result<()> {
        let between = |name: &str, value: f64, limits: &str| -> Result<()> {
            ensure!(
                value > 0.0 && value < 1.0,
                "`{name}` of divergence `{}` is {value}, expected a number above 0 and below 1; {limits}",
                self.name()
            );
            Ok(())
        };
        match self {
            Divergence::ForwardKl | Divergence::ReverseKl | Divergence::TotalVariation => Ok(()),
            Divergence::Jsd { beta } => {
                between("beta", beta, "it vanishes at both ends: use `forward-kl` or `reverse-kl`")
            }
            Divergence::SkewedForwardKl { alpha } => between("alpha", alpha, "for 0 use `forward-kl`"),
            Divergence::SkewedReverseKl { alpha } => between("alpha", alpha, "for 0 use `reverse-kl`"),
            Divergence::AdaptiveKl { head } => between("head", head, "all head is `forward-kl`, and none `reverse-kl`"),
            Divergence::AlphaBeta { alpha, beta } => {
                for (name, value, limit) in [("alpha", alpha, "reverse-kl"), ("beta", beta, "forward-kl")] {
                    ensure!(
                        value > 0.0 && value.is_finite(),
                        "`{name}` of divergence `alpha_beta` is {value}, expected a number above 0; for 0 use `{limit}`"
                    );
                }
                Ok(())
            }
        }
    }
}

/// A divergence `D = sum_v f(s_v, t_v)` by its summand.
pub(crate) trait Rule {
    /// Its name in metrics.
    const NAME: &str;
    /// Its number in the code for GPUs.
    #[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "only GPUs go by number"))]
    const NUMBER: usize;

    /// The summand of a token, where `a` and `b` are the divergence's parameters in their order.
    fn summand<N: Number>(token: Token<N>, a: N, b: N) -> Summand<N>;
}

/// Probabilities of one token: `s` the trainee's, `t` the target's. Logarithms are finite; a probability may be 0.
#[derive(Clone, Copy)]
pub(crate) struct Token<N> {
    pub(crate) s: N,
    pub(crate) log_s: N,
    pub(crate) t: N,
    pub(crate) log_t: N,
}

/// What a token adds to a divergence.
#[derive(Clone, Copy)]
pub(crate) struct Summand<N> {
    /// `f`.
    pub(crate) value: N,
    /// `h = s df/ds`, up to a multiple of `s`, which drops out of the derivative by the logits: that is `h - s sum(h)`.
    pub(crate) slope: N,
}

/// Runs `$run` with `$rule` standing for the [`Rule`] of a divergence, and its parameters, numbers of type `f64`.
macro_rules! for_rule {
    ($divergence:expr, $rule:ident($a:ident, $b:ident) => $run:expr) => {
        for_rule!(
            @of $divergence, $rule($a, $b) => $run;
            ForwardKl => (0.0, 0.0),
            ReverseKl => (0.0, 0.0),
            Jsd { beta } => (beta, 0.0),
            SkewedForwardKl { alpha } => (alpha, 0.0),
            SkewedReverseKl { alpha } => (alpha, 0.0),
            TotalVariation => (0.0, 0.0),
            AlphaBeta { alpha, beta } => (alpha, beta),
            AdaptiveKl { head } => (head, 0.0),
        )
    };
    (@of $divergence:expr, $rule:ident($a:ident, $b:ident) => $run:expr;
     $($name:ident $({ $($field:ident),* })? => $parameters:expr,)*) => {
        match $divergence {
            $($crate::terms::divergence::Divergence::$name $({ $($field),* })? => {
                type $rule = $crate::terms::divergence::$name;
                let ($a, $b): (f64, f64) = $parameters;
                $run
            })*
        }
    };
}
pub(crate) use for_rule;

pub(crate) struct ForwardKl;

impl Rule for ForwardKl {
    const NAME: &str = "forward_kl";
    const NUMBER: usize = 0;

    #[inline(always)]
    fn summand<N: Number>(Token { log_s, t, log_t, .. }: Token<N>, _: N, _: N) -> Summand<N> {
        Summand { value: t * (log_t - log_s), slope: -t }
    }
}

pub(crate) struct ReverseKl;

impl Rule for ReverseKl {
    const NAME: &str = "reverse_kl";
    const NUMBER: usize = 1;

    #[inline(always)]
    fn summand<N: Number>(Token { s, log_s, log_t, .. }: Token<N>, _: N, _: N) -> Summand<N> {
        let value = s * (log_s - log_t);
        Summand { value, slope: value }
    }
}

pub(crate) struct Jsd;

impl Rule for Jsd {
    const NAME: &str = "jsd";
    const NUMBER: usize = 2;

    #[inline(always)]
    fn summand<N: Number>(Token { s, t, .. }: Token<N>, beta: N, _: N) -> Summand<N> {
        let mixture = mix(beta, t, s);
        let slope = beta.complement() * s * s.log_ratio(mixture);
        Summand { value: beta * t * t.log_ratio(mixture) + slope, slope }
    }
}

pub(crate) struct SkewedForwardKl;

impl Rule for SkewedForwardKl {
    const NAME: &str = "skewed_forward_kl";
    const NUMBER: usize = 3;

    #[inline(always)]
    fn summand<N: Number>(Token { s, t, .. }: Token<N>, alpha: N, _: N) -> Summand<N> {
        let mixture = mix(alpha, t, s);
        Summand { value: t * t.log_ratio(mixture), slope: -alpha.complement() * t * (s / mixture) }
    }
}

pub(crate) struct SkewedReverseKl;

impl Rule for SkewedReverseKl {
    const NAME: &str = "skewed_reverse_kl";
    const NUMBER: usize = 4;

    #[inline(always)]
    fn summand<N: Number>(Token { s, t, .. }: Token<N>, alpha: N, _: N) -> Summand<N> {
        let mixture = mix(alpha, s, t);
        let value = s * s.log_ratio(mixture);
        Summand { value, slope: value - alpha * s * (s / mixture) }
    }
}

pub(crate) struct TotalVariation;

impl Rule for TotalVariation {
    const NAME: &str = "total_variation";
    const NUMBER: usize = 5;

    #[inline(always)]
    fn summand<N: Number>(Token { s, t, .. }: Token<N>, _: N, _: N) -> Summand<N> {
        let difference = s - t;
        Summand { value: difference.abs().half(), slope: difference.sign().half() * s }
    }
}

pub(crate) struct AlphaBeta;

impl Rule for AlphaBeta {
    const NAME: &str = "alpha_beta";
    const NUMBER: usize = 6;

    #[inline(always)]
    fn summand<N: Number>(Token { log_s, log_t, .. }: Token<N>, alpha: N, beta: N) -> Summand<N> {
        let both = alpha + beta;
        let cross = (alpha * log_t + beta * log_s).exp();
        let (pure_t, pure_s) = ((both * log_t).exp(), (both * log_s).exp());
        let inner = cross - alpha / both * pure_t - beta / both * pure_s;
        Summand { value: -inner / (alpha * beta), slope: (pure_s - cross) / alpha }
    }
}

/// Its first parameter is `g`, which [`Divergence::parameters`] finds.
pub(crate) struct AdaptiveKl;

impl Rule for AdaptiveKl {
    const NAME: &str = "adaptive_kl";
    const NUMBER: usize = 7;

    #[inline(always)]
    fn summand<N: Number>(Token { s, log_s, t, log_t }: Token<N>, g: N, _: N) -> Summand<N> {
        let gap = log_s - log_t;
        let reverse = g.complement() * s * gap;
        Summand { value: reverse - g * t * gap, slope: reverse - g * t }
    }
}

/// `weight a + (1 - weight) b`, kept above 0 so that it can be divided by.
#[inline(always)]
fn mix<N: Number>(weight: N, a: N, b: N) -> N {
    (weight * a + weight.complement() * b).above_zero()
}

/// Errors when a temperature is not above 0, or so large or small that logits divided by it are no numbers or all the same.
pub fn check_temperature(temperature: f64) -> Result<()> {
    // Logits are multiplied by its inverse, in f32.
    ensure!(
        temperature > 0.0 && ((1.0 / temperature) as f32).is_normal(),
        "expected a number above 0, at most 1e37, got {temperature:?}"
    );
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::formula::{Formula, Given};
    use super::*;

    /// One of each.
    pub(crate) const EVERY_DIVERGENCE: [Divergence; 8] = [
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta: 0.3 },
        Divergence::SkewedForwardKl { alpha: 0.1 },
        Divergence::SkewedReverseKl { alpha: 0.1 },
        Divergence::TotalVariation,
        Divergence::AlphaBeta { alpha: 0.2, beta: 0.7 },
        Divergence::AdaptiveKl { head: 0.5 },
    ];

    /// The rules in CUDA.
    fn cuda() -> String {
        let mut text = String::from(
            "// The rules of `terms/divergence.rs`, printed from there by a test of that file.\n\n\
             // A summand f of a divergence, and h = s df/ds up to a multiple of s.\n\
             struct Summand {\n    float value, slope;\n};\n\n\
             template <class T> struct Rules {\n",
        );
        let mut cases = String::new();
        for (number, divergence) in EVERY_DIVERGENCE.into_iter().enumerate() {
            let debug = format!("{divergence:?}");
            let name = debug.split_whitespace().next().unwrap();
            let formula = Formula::default();
            let [s, log_s, t, log_t, a, b] = Given::ALL.map(|given| formula.given(given));
            let token = Token { s, log_s, t, log_t };
            let Summand { value, slope } = for_rule!(divergence, R(_a, _b) => {
                assert_eq!(R::NUMBER, number, "the numbers of divergences follow one another");
                R::summand(token, a, b)
            });
            text += &format!(
                "    struct {name} {{\n        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, \
                 float a, float b) {{\n{}            return {{{}, {}}};\n        }}\n    }};\n",
                formula.cuda("            "),
                formula.name(value),
                formula.name(slope),
            );
            cases += &format!(" CASE({number}, {name})");
        }
        format!("{text}}};\n\n#define FOR_EVERY_RULE(CASE){cases}\n")
    }

    /// One that is missing in the list would be missing on GPUs.
    #[test]
    fn every_divergence_is_in_the_list() {
        let schema = serde_json::to_value(schemars::schema_for!(Divergence)).unwrap();
        assert_eq!(schema["oneOf"].as_array().unwrap().len(), EVERY_DIVERGENCE.len());
    }

    /// The compiler of one language does not see the other.
    #[test]
    fn the_cuda_code_has_the_same_rules() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/kernels/cuda/divergences.cuh");
        let (found, right) = (std::fs::read_to_string(path).unwrap_or_default(), cuda());
        if found != right && std::env::var_os("UPDATE_CUDA").is_some() {
            std::fs::write(path, &right).unwrap();
        } else {
            assert!(
                found == right,
                "`{path}` is not what the rules say: print it anew with `UPDATE_CUDA=1 cargo test -p lm cuda_code`"
            );
        }
    }
}
