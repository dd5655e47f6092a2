//! What a configuration may say.

use anyhow::ensure;
use contract::Result;
use serde_json::{Value as Json, json};

/// Options that change what `transformers` computes and are not known here, each with the values that change nothing.
/// Options that neither knows are nobody's.
pub(super) fn refuse_options(config: &Json) -> Result<()> {
    let off = [Json::Null, json!(false), json!({}), json!([])];
    for option in
        ["quantization_config", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads"]
    {
        let value = config.get(option).unwrap_or(&Json::Null);
        ensure!(off.contains(value), "`{option}` is {}", short(value));
    }
    let turned = config.get("partial_rotary_factor").unwrap_or(&Json::Null);
    ensure!(
        turned.is_null() || turned.as_f64() == Some(1.0),
        "`partial_rotary_factor` is {}: expected 1",
        short(turned)
    );
    Ok(())
}

fn short(value: &Json) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 { text } else { format!("{}...", text.chars().take(80).collect::<String>()) }
}

pub(super) fn at_least_one(sizes: &[(&str, usize)]) -> Result<()> {
    for (name, size) in sizes {
        ensure!(*size > 0, "{name} is 0: expected at least 1");
    }
    Ok(())
}

pub(super) fn not_negative(numbers: &[(&str, f64)]) -> Result<()> {
    for (name, number) in numbers {
        ensure!(number.is_finite() && *number >= 0.0, "{name} is {number}: expected at least 0");
    }
    Ok(())
}

/// Errors when `rate` is no probability of dropping an element.
pub(super) fn rate(rate: f32) -> Result<()> {
    ensure!((0.0..1.0).contains(&rate), "dropout is {rate}: expected at least 0 and less than 1");
    Ok(())
}

pub(super) fn multiple(name: &str, size: usize, heads: usize) -> Result<()> {
    ensure!(size.is_multiple_of(heads), "{name} {size} is not a multiple of {heads} heads: change one of them");
    Ok(())
}
