//! Rotary positions, as configurations ask for them.

use anyhow::{bail, ensure};
use contract::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// Changes of the rotary angles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Every angle is divided by `factor` (Chen et al., "Extending context window of large language models via positional
    /// interpolation", 2023).
    Linear {
        /// How much longer texts may be.
        factor: f64,
    },
    /// The base of the angles grows with a text that is longer than all positions (Peng et al., "YaRN", 2023, on dynamic NTK). A
    /// model has no rows at positions behind `max_position_embeddings`, and up to there the angles are the plain ones.
    Dynamic {
        /// How much longer texts may be.
        factor: f64,
    },
    /// Llama 3.1: slow angles are divided by `factor`, fast ones stay, those between are mixed.
    Llama3 {
        /// How much longer texts may be.
        factor: f64,
        /// Angles that turn fewer times than this in the original length are slow.
        low_freq_factor: f64,
        /// Angles that turn more often than this in the original length are fast.
        high_freq_factor: f64,
        /// The original length in tokens.
        original_max_position_embeddings: usize,
    },
}

impl RopeScaling {
    pub(super) fn validate(&self) -> Result<()> {
        let above = |name: &str, number: f64, least: f64| {
            ensure!(
                number.is_finite() && number > least,
                "`{name}` of the rotary scaling is {number}: expected more than {least}"
            );
            Ok(())
        };
        match *self {
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => above("factor", factor, 0.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                above("factor", factor, 0.0)?;
                above("low_freq_factor", low_freq_factor, 0.0)?;
                above("high_freq_factor", high_freq_factor, low_freq_factor)?;
                above("original_max_position_embeddings", original_max_position_embeddings as f64, 0.0)
            }
        }
    }
}

/// By how much each pair of the `turned` channels of a head turns from one position to the next, `[R / 2]`, in radians. Every
/// step is rounded as in `transformers`: at position 100 000 the last bit of an angle decides its third digit.
pub(crate) fn frequencies(turned: usize, theta: f64, scaling: Option<&RopeScaling>) -> Vec<f32> {
    let plain = (0..turned).step_by(2).map(|i| {
        let power = f64::from(i as f32 / turned as f32);
        1.0 / theta.powf(power) as f32
    });
    match scaling.cloned() {
        None | Some(RopeScaling::Dynamic { .. }) => plain.collect(),
        Some(RopeScaling::Linear { factor }) => plain.map(|frequency| frequency / factor as f32).collect(),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
            let length = original_max_position_embeddings as f64;
            let scale = |frequency: f32| {
                let wavelength = std::f32::consts::TAU / frequency;
                if f64::from(wavelength) < length / high_freq_factor {
                    frequency
                } else if f64::from(wavelength) > length / low_freq_factor {
                    frequency / factor as f32
                } else {
                    let range = (high_freq_factor - low_freq_factor) as f32;
                    let fast = (length as f32 / wavelength - low_freq_factor as f32) / range;
                    (1.0 - fast) * frequency / factor as f32 + fast * frequency
                }
            };
            plain.map(scale).collect()
        }
    }
}

/// Turns every form in which files keep the base of the angles and their scaling into the oldest: `rope_scaling` with its
/// `rope_type`, and beside it the base, called `theta`. Gives the share of a head's channels that is to be turned, where newer
/// files say it.
pub(super) fn unify(json: &mut Json, theta: &str) -> Result<Option<Json>> {
    let mut share = None;
    // Newer files keep all of it together.
    if let Some(mut parameters) = json.as_object_mut().and_then(|json| json.remove("rope_parameters"))
        && let Some(fields) = parameters.as_object_mut()
    {
        if let Some(base) = fields.remove("rope_theta") {
            json[theta] = base;
        }
        share = fields.remove("partial_rotary_factor").filter(|share| !share.is_null());
        json["rope_scaling"] = parameters;
    }
    let scaling = &mut json["rope_scaling"];
    // Older files call the type `type`.
    let kind = scaling.get("rope_type").or(scaling.get("type")).and_then(Json::as_str).map(str::to_owned);
    match kind.as_deref() {
        None | Some("default") => *scaling = Json::Null,
        Some(kind @ ("linear" | "dynamic" | "llama3")) => scaling["rope_type"] = kind.into(),
        Some(other) => {
            bail!("rotary positions of type `{other}`: expected `default`, `linear`, `dynamic` or `llama3`")
        }
    }
    Ok(share)
}
