//! Keys of actions: the hash of a preimage, in a form that does not depend on how it was written down.

use std::fmt::Write;

use serde_json::{Number, Value as Json};

use crate::digest::hexadecimal;

/// What an action is addressed by: equal keys mean that the same thing was asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key([u8; 32]);

hexadecimal!(Key);

impl Key {
    /// `blake3("pipeline-action-v1" ‖ canonical(preimage))`.
    pub fn of(preimage: &Json) -> Key {
        Key::of_text(&canonical(preimage))
    }

    /// Of a preimage in its canonical text.
    pub(crate) fn of_text(text: &str) -> Key {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"pipeline-action-v1");
        hasher.update(text.as_bytes());
        Key(*hasher.finalize().as_bytes())
    }
}

/// The canonical text of a JSON value: no white space, the keys of objects sorted by their UTF-8 bytes, numbers by value.
///
/// JSON has one type of number, so `1`, `1.0` and `1e0` are the same number and give the same text, `1`; integers keep all
/// their digits (2^53 and 2^53 + 1 differ), other numbers are the shortest text that reads back as the same `f64`.
/// Minus zero keeps its sign, because arithmetic can tell it from zero. Reading the text gives a value with the same text.
pub fn canonical(value: &Json) -> String {
    let mut text = String::new();
    write_value(value, &mut text);
    text
}

fn write_value(value: &Json, text: &mut String) {
    match value {
        Json::Null => text.push_str("null"),
        Json::Bool(value) => text.push_str(if *value { "true" } else { "false" }),
        Json::Number(number) => write_number(number, text),
        Json::String(string) => write_string(string, text),
        Json::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_value(item, text);
            }
            text.push(']');
        }
        Json::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_unstable_by_key(|(name, _)| *name);
            text.push('{');
            for (index, (name, value)) in fields.into_iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_string(name, text);
                text.push(':');
                write_value(value, text);
            }
            text.push('}');
        }
    }
}

fn write_number(number: &Number, text: &mut String) {
    // Integers that serde_json reads exactly span these bounds; a float outside of them never meets an integer.
    const LOWEST: f64 = i64::MIN as f64;
    const ABOVE: f64 = u64::MAX as f64; // rounds to 2^64, which is out of range
    match number.as_f64() {
        Some(float) if number.is_f64() && float.fract() == 0.0 && (LOWEST..ABOVE).contains(&float) => {
            let negative_zero = float == 0.0 && float.is_sign_negative();
            if negative_zero { text.push_str("-0.0") } else { push(text, float as i128) }
        }
        _ => push(text, number),
    }
}

fn push(text: &mut String, value: impl std::fmt::Display) {
    write!(text, "{value}").expect("writing to a string succeeds");
}

fn write_string(string: &str, text: &mut String) {
    text.push_str(&serde_json::to_string(string).expect("a string is always valid JSON"));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, json};

    use super::*;

    #[test]
    fn keys_do_not_change_from_one_version_to_the_next() {
        let preimage =
            json!({"kind": "distill", "version": 3, "with": {"learning_rate": 5e-4, "texts": ["é\n\"", null]}});
        assert_eq!(
            canonical(&preimage),
            r#"{"kind":"distill","version":3,"with":{"learning_rate":0.0005,"texts":["é\n\"",null]}}"#
        );
        let by_hand = [b"pipeline-action-v1", canonical(&preimage).as_bytes()].concat();
        assert_eq!(Key::of(&preimage).to_string(), blake3::hash(&by_hand).to_hex().as_str());
    }

    #[test]
    fn numbers_are_compared_by_value() {
        let text = |source: &str| canonical(&serde_json::from_str(source).unwrap());
        for (source, expected) in [
            ("1", "1"),
            ("1.0", "1"),
            ("10e-1", "1"),
            ("-3.0", "-3"),
            ("0", "0"),
            ("0.0", "0"),
            ("-0.0", "-0.0"),
            ("0.1", "0.1"),
            ("1e-4", "0.0001"),
            ("9007199254740992", "9007199254740992"),
            ("9007199254740993", "9007199254740993"),
            ("9007199254740992.0", "9007199254740992"),
            ("1e19", "10000000000000000000"),
            ("18446744073709551615", "18446744073709551615"),
            ("-9223372036854775808", "-9223372036854775808"),
        ] {
            assert_eq!(text(source), expected, "{source}");
        }
        assert_ne!(text("1e20"), text("1e21"));
        assert_ne!(text("1"), text("\"1\""));
        assert_ne!(text("1"), text("true"));
    }

    fn json_values() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            any::<u64>().prop_map(Json::from),
            any::<i32>().prop_map(|whole| Json::from(f64::from(whole))),
            any::<f64>()
                .prop_filter_map("JSON has no such number", |float| Some(Json::Number(Number::from_f64(float)?))),
            any::<String>().prop_map(Json::from),
        ];
        leaf.prop_recursive(4, 48, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Json::from),
                prop::collection::vec((".{0,4}", inner), 0..6)
                    .prop_map(|fields| Json::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// Every object with its fields the other way round.
    fn reversed(value: &Json) -> Json {
        match value {
            Json::Array(items) => items.iter().map(reversed).collect(),
            Json::Object(fields) => {
                Json::Object(fields.iter().rev().map(|(name, value)| (name.clone(), reversed(value))).collect())
            }
            other => other.clone(),
        }
    }

    /// Every value that differs from `value` in one place: a leaf changed, a field left out, an item left out.
    fn neighbours(value: &Json) -> Vec<Json> {
        let mut all = vec![json!({"was": value})];
        match value {
            Json::Array(items) => {
                for index in 0..items.len() {
                    let mut fewer = items.clone();
                    fewer.remove(index);
                    all.push(Json::Array(fewer));
                    all.extend(neighbours(&items[index]).into_iter().map(|item| {
                        let mut changed = items.clone();
                        changed[index] = item;
                        Json::Array(changed)
                    }));
                }
            }
            Json::Object(fields) => {
                for (name, field) in fields {
                    let fewer: Map<String, Json> = fields
                        .iter()
                        .filter(|(other, _)| *other != name)
                        .map(|(n, v)| (n.clone(), v.clone()))
                        .collect();
                    all.push(Json::Object(fewer));
                    all.extend(neighbours(field).into_iter().map(|field| {
                        let mut changed = fields.clone();
                        changed[name] = field;
                        Json::Object(changed)
                    }));
                }
            }
            _ => {}
        }
        all
    }

    proptest! {
        #[test]
        fn the_order_of_fields_does_not_matter(value in json_values()) {
            prop_assert_eq!(Key::of(&value), Key::of(&reversed(&value)));
        }

        #[test]
        fn canonical_text_reads_back_as_the_same_value(value in json_values()) {
            let text = canonical(&value);
            let read: Json = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(canonical(&read), text);
            prop_assert_eq!(Key::of(&read), Key::of(&value));
        }

        #[test]
        fn any_change_changes_the_key(value in json_values()) {
            for neighbour in neighbours(&value) {
                prop_assert_ne!(Key::of(&neighbour), Key::of(&value), "{} and {}", neighbour, value);
            }
        }

        #[test]
        fn floats_keep_every_bit(left in any::<f64>(), right in any::<f64>()) {
            prop_assume!(left.is_finite() && right.is_finite() && left.to_bits() != right.to_bits());
            prop_assert_ne!(Key::of(&json!(left)), Key::of(&json!(right)));
        }
    }
}
