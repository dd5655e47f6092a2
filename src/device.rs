//! Which devices workers run on.

use anyhow::Result;

use crate::commands::BadRequest;

/// The devices that `--device` asks for: `auto` takes every visible GPU if the program was built for GPUs, else the CPU.
///
/// Numbers count visible GPUs: a mask in `CUDA_VISIBLE_DEVICES` is respected, and workers inherit it.
pub(crate) fn devices(wanted: &str) -> Result<Vec<String>> {
    let built_for_gpus = cfg!(feature = "cuda");
    let visible = if built_for_gpus { visible_gpus() } else { 0 };
    let number = wanted.strip_prefix("cuda:").map(str::parse::<usize>);
    match (wanted, number) {
        ("auto", _) if visible == 0 => Ok(vec!["cpu".into()]),
        ("auto", _) => Ok((0..visible).map(|gpu| format!("cuda:{gpu}")).collect()),
        ("cpu", _) => Ok(vec!["cpu".into()]),
        (_, Some(Ok(_))) if !built_for_gpus => Err(BadRequest(format!(
            "`{wanted}` needs a program built with feature `cuda`, and this one was not; use `--device cpu`"
        ))
        .into()),
        (_, Some(Ok(_))) => Ok(vec![wanted.to_owned()]),
        _ => Err(BadRequest(format!("unknown device `{wanted}`; expected `auto`, `cpu` or `cuda:N`")).into()),
    }
}

fn visible_gpus() -> usize {
    let present = (0..).take_while(|gpu| std::path::Path::new(&format!("/dev/nvidia{gpu}")).exists()).count();
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        // The driver stops reading at the first entry it does not know; `-1` and the empty text hide all.
        Ok(mask) => mask.split(',').map(str::trim).take_while(|id| !id.is_empty() && *id != "-1").count().min(present),
        Err(_) => present,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_device_is_named_with_the_right_ones() {
        assert_eq!(devices("cpu").unwrap(), ["cpu"]);
        let error = devices("gpu").unwrap_err().to_string();
        assert_eq!(error, "unknown device `gpu`; expected `auto`, `cpu` or `cuda:N`");
    }
}
