//! Learning rates over the updates of a training.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// How the learning rate falls from its peak. Written `constant`, `cosine`, `linear`, or with a floor as
/// `{cosine: {floor: 0.1}}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The peak, always.
    #[default]
    Constant,
    /// Half a cosine from the peak to `floor`.
    Cosine {
        /// Rate after the last update, as a fraction of the peak.
        floor: f64,
    },
    /// A straight line from the peak to `floor`.
    Linear {
        /// Rate after the last update, as a fraction of the peak.
        floor: f64,
    },
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
/// `1 - (1 - floor) t`, both times the peak. Past the end, the rate stays at the floor.
pub fn learning_rate(peak: f64, schedule: Schedule, warmup: Warmup, update: u64, total: u64) -> f64 {
    if update < warmup.updates {
        let done = if warmup.from_zero { update } else { update + 1 };
        return peak * done as f64 / warmup.updates as f64;
    }
    let span = total.saturating_sub(warmup.updates).max(1);
    let progress = ((update - warmup.updates) as f64 / span as f64).min(1.0);
    let fraction = match schedule {
        Schedule::Constant => 1.0,
        Schedule::Cosine { floor } => floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
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
struct Shape {
    #[serde(default)]
    floor: f64,
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
            "cosine" => Ok(Schedule::Cosine { floor: 0.0 }),
            "linear" => Ok(Schedule::Linear { floor: 0.0 }),
            other => Err(E::unknown_variant(other, NAMES)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Schedule, A::Error> {
        let name: Cow<'_, str> = map.next_key()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
        let schedule = match name.as_ref() {
            "cosine" => Schedule::Cosine { floor: map.next_value::<Shape>()?.floor },
            "linear" => Schedule::Linear { floor: map.next_value::<Shape>()?.floor },
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
        let shape = |description: &str| {
            json_schema!({
                "description": description,
                "type": "object",
                "properties": {"floor": {
                    "description": "Rate after the last update, as a fraction of the peak.",
                    "type": "number",
                    "minimum": 0.0,
                    "maximum": 1.0
                }},
                "additionalProperties": false
            })
        };
        let cosine = shape("Half a cosine from the peak to `floor`.");
        let linear = shape("A straight line from the peak to `floor`.");
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
            let rate = learning_rate(1e-3, Schedule::Cosine { floor: 0.0 }, OFF, update as u64, 5);
            assert!((rate - expected).abs() < 1e-18, "{update}: {rate}");
        }
    }

    #[test]
    fn a_floor_is_where_the_curve_ends() {
        for schedule in [Schedule::Cosine { floor: 0.1 }, Schedule::Linear { floor: 0.1 }] {
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
        assert_eq!(read(r#""cosine""#).unwrap(), Schedule::Cosine { floor: 0.0 });
        assert_eq!(read(r#"{"linear": {"floor": 0.5}}"#).unwrap(), Schedule::Linear { floor: 0.5 });
        for wrong in [r#""cosin""#, r#"{"constant": {}}"#, r#"{"cosine": {"flor": 1}}"#, "{}", "1"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        let schedule = Schedule::Cosine { floor: 0.25 };
        assert_eq!(read(&serde_json::to_string(&schedule).unwrap()).unwrap(), schedule);
    }
}
