//! Learning rates over the updates of a training.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// How the learning rate falls from its peak. Written `constant`, `cosine`, `linear`, or with what else they have, as
/// `{cosine: {floor: 0.1}}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The peak, always.
    #[default]
    Constant,
    /// Half a cosine from the peak to `floor`.
    Cosine {
        /// Lowest rate, as a fraction of the peak.
        floor: f64,
        /// The part of the run behind the warm-up in which the rate falls; then it rises again, as it fell. 1: all of it.
        #[serde(skip_serializing_if = "is_all")]
        falls_for: f64,
    },
    /// A straight line from the peak to `floor`.
    Linear {
        /// Rate after the last update, as a fraction of the peak.
        floor: f64,
    },
}

impl Schedule {
    /// Half a cosine to `floor` over the whole run.
    pub fn cosine(floor: f64) -> Self {
        Schedule::Cosine { floor, falls_for: 1.0 }
    }
}

/// The first updates, during which the rate climbs to its peak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Warmup {
    /// How many updates; 0 is off.
    pub updates: u64,
    /// Off: update `k` (from 0) has `(k + 1) / updates` of the peak, so that none is wasted. On: `k / updates`, as the
    /// published programs do, where the first update has rate 0.
    #[serde(default)]
    pub from_zero: bool,
}

/// The learning rate of update `update`, counted from 0, of `total`.
///
/// After the warmup of `w` updates the schedule runs over the other `total - w`, with progress
/// `t = (update - w) / (total - w)`: cosine is `floor + (1 - floor) (1 + cos(pi t)) / 2`, linear
/// `1 - (1 - floor) t`, both times the peak. A cosine that falls for a part `f` of the run has `t / f` for `t`: for a half of it the
/// rate is at the peak again in the end, as with PyTorch's `CosineAnnealingLR` behind its `T_max`. Past the end, the rate stays
/// what it is there.
pub fn learning_rate(peak: f64, schedule: Schedule, warmup: Warmup, update: u64, total: u64) -> f64 {
    if update < warmup.updates {
        let done = if warmup.from_zero { update } else { update + 1 };
        return peak * done as f64 / warmup.updates as f64;
    }
    let span = total.saturating_sub(warmup.updates).max(1);
    let progress = ((update - warmup.updates) as f64 / span as f64).min(1.0);
    let fraction = match schedule {
        Schedule::Constant => 1.0,
        Schedule::Cosine { floor, falls_for } => {
            floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress / falls_for).cos())
        }
        Schedule::Linear { floor } => 1.0 - (1.0 - floor) * progress,
    };
    peak * fraction
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScheduleVisitor)
    }
}

const NAMES: &[&str] = &["constant", "cosine", "linear"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Linear {
    #[serde(default)]
    floor: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cosine {
    #[serde(default)]
    floor: f64,
    #[serde(default = "all")]
    falls_for: f64,
}

fn all() -> f64 {
    1.0
}

fn is_all(part: &f64) -> bool {
    *part == 1.0
}

struct ScheduleVisitor;

impl<'de> Visitor<'de> for ScheduleVisitor {
    type Value = Schedule;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("`constant`, `cosine`, `linear`, or `{cosine: {floor: 0.1}}`")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Schedule, E> {
        match name {
            "constant" => Ok(Schedule::Constant),
            "cosine" => Ok(Schedule::cosine(0.0)),
            "linear" => Ok(Schedule::Linear { floor: 0.0 }),
            other => Err(E::unknown_variant(other, NAMES)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Schedule, A::Error> {
        let name: Cow<'_, str> = map.next_key()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
        let schedule = match name.as_ref() {
            "cosine" => {
                let Cosine { floor, falls_for } = map.next_value()?;
                Schedule::Cosine { floor, falls_for }
            }
            "linear" => Schedule::Linear { floor: map.next_value::<Linear>()?.floor },
            other => return Err(de::Error::unknown_variant(other, &NAMES[1..])),
        };
        if map.next_key::<Cow<'_, str>>()?.is_some() {
            return Err(de::Error::invalid_length(2, &"one schedule"));
        }
        Ok(schedule)
    }
}

impl JsonSchema for Schedule {
    fn schema_name() -> Cow<'static, str> {
        "Schedule".into()
    }

    fn json_schema(_generator: &mut SchemaGenerator) -> Schema {
        let floor = json_schema!({
            "description": "Lowest rate, as a fraction of the peak.",
            "type": "number",
            "minimum": 0.0,
            "maximum": 1.0
        });
        let cosine = json_schema!({
            "description": "Half a cosine from the peak to `floor`.",
            "type": "object",
            "properties": {
                "floor": floor.clone(),
                "falls_for": {
                    "description": "The part of the run in which it falls; then it rises again. 1: all of it; 0.5 as the published program for response priming.",
                    "type": "number",
                    "exclusiveMinimum": 0.0,
                    "maximum": 1.0
                }
            },
            "additionalProperties": false
        });
        let linear = json_schema!({
            "description": "A straight line from the peak to `floor`.",
            "type": "object",
            "properties": {"floor": floor},
            "additionalProperties": false
        });
        json_schema!({
            "description": "How the learning rate falls from its peak; `floor` is a fraction of the peak.",
            "oneOf": [
                {"type": "string", "enum": NAMES},
                {
                    "type": "object",
                    "properties": {"cosine": cosine, "linear": linear},
                    "additionalProperties": false,
                    "minProperties": 1,
                    "maxProperties": 1
                }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFF: Warmup = Warmup { updates: 0, from_zero: false };

    #[test]
    fn cosine_without_warmup_is_the_reference_curve() {
        // 1e-3 (1 + cos(pi k / 5)) / 2 for k = 0..4, from the parity fixture.
        let expected = [1e-3, 9.045084971874737e-4, 6.545084971874737e-4, 3.4549150281252633e-4, 9.549150281252633e-5];
        for (update, expected) in expected.into_iter().enumerate() {
            let rate = learning_rate(1e-3, Schedule::cosine(0.0), OFF, update as u64, 5);
            assert!((rate - expected).abs() < 1e-18, "{update}: {rate}");
        }
    }

    /// `make_priming.py` has them from PyTorch's scheduler, which goes on from one rate to the next.
    #[test]
    fn a_cosine_that_falls_for_half_of_the_run_has_the_published_rates() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/parity/priming/expected.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let rates: Vec<(u64, f64)> = serde_json::from_value(json["published_rates"].clone()).unwrap();
        assert!(rates.len() > 170);
        for (update, expected) in rates {
            let rate = learning_rate(5e-6, Schedule::Cosine { floor: 0.0, falls_for: 0.5 }, OFF, update, 2 * 2638);
            assert!((rate - expected).abs() < 5e-6 * 1e-9, "{update}: {rate}, expected {expected}");
        }
    }

    #[test]
    fn a_floor_is_where_the_curve_ends() {
        for schedule in [Schedule::cosine(0.1), Schedule::Linear { floor: 0.1 }] {
            assert!((learning_rate(2.0, schedule, OFF, 5, 10) - 1.1).abs() < 1e-12);
            assert!((learning_rate(2.0, schedule, OFF, 10, 10) - 0.2).abs() < 1e-12);
            assert!((learning_rate(2.0, schedule, OFF, 99, 10) - 0.2).abs() < 1e-12);
        }
    }

    #[test]
    fn warmup_from_zero_wastes_an_update_and_the_sound_one_does_not() {
        let rate =
            |from_zero, update| learning_rate(1.0, Schedule::Constant, Warmup { updates: 4, from_zero }, update, 100);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|k| rate(true, k)), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|k| rate(false, k)), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn a_schedule_reads_as_a_word_or_with_a_floor() {
        let read = serde_json::from_str::<Schedule>;
        assert_eq!(read(r#""constant""#).unwrap(), Schedule::Constant);
        assert_eq!(read(r#""cosine""#).unwrap(), Schedule::cosine(0.0));
        assert_eq!(read(r#"{"linear": {"floor": 0.5}}"#).unwrap(), Schedule::Linear { floor: 0.5 });
        for wrong in [r#""cosin""#, r#"{"constant": {}}"#, r#"{"cosine": {"flor": 1}}"#, "{}", "1"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        assert_eq!(serde_json::to_string(&Schedule::cosine(0.25)).unwrap(), r#"{"cosine":{"floor":0.25}}"#);
        for schedule in [Schedule::cosine(0.25), Schedule::Cosine { floor: 0.0, falls_for: 0.5 }] {
            let text = serde_json::to_string(&schedule).unwrap();
            assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule);
        }
    }
}
