//! Which devices workers run on.

use anyhow::Result;
use contract::Machine;

use crate::ground::memory;
use crate::ground::output::tell;
use crate::ground::trouble::BadRequest;

/// The devices that `--device` asks for: `auto` takes every GPU that can be used, else the CPU, with a line that says why if the
/// program was built for GPUs.
///
/// Several GPUs are named with commas; one that is named twice serves two stages at a time.
///
/// `gpus` counts those that can be used, or says what they lack; nothing when the program was built without CUDA. Numbers count
/// visible GPUs: a mask in `CUDA_VISIBLE_DEVICES` is respected.
pub(crate) fn devices(wanted: &str, gpus: fn() -> Option<Result<usize>>) -> Result<Vec<String>> {
    if !wanted.contains(',') {
        return named(wanted, gpus);
    }
    let of_list = |name: &str| match name.trim() {
        card if card.starts_with("cuda:") => named(card, gpus),
        other => wrong(format!("`{other}` cannot stand in a list of devices; only GPUs can, as in `cuda:0,cuda:1`")),
    };
    Ok(wanted.split(',').map(of_list).collect::<Result<Vec<_>>>()?.concat())
}

fn named(wanted: &str, gpus: fn() -> Option<Result<usize>>) -> Result<Vec<String>> {
    let number = wanted.strip_prefix("cuda:").map(str::parse::<usize>);
    match (wanted, number) {
        ("cpu", _) => Ok(vec!["cpu".into()]),
        ("auto", _) => match gpus() {
            None => Ok(vec!["cpu".into()]),
            Some(Ok(count)) if count > 0 => Ok((0..count).map(|gpu| format!("cuda:{gpu}")).collect()),
            lacking => {
                tell(&format!("running on the CPU: {}", reason(lacking)));
                Ok(vec!["cpu".into()])
            }
        },
        (_, Some(Ok(number))) => match gpus() {
            None => wrong(format!(
                "`{wanted}` needs a program built with feature `cuda`, and this one was not; use `--device cpu`"
            )),
            Some(Ok(count)) if number < count => Ok(vec![wanted.to_owned()]),
            Some(Ok(count)) if count > 0 => wrong(format!(
                "there is no `{wanted}`; the last one is `cuda:{}`, unless CUDA_VISIBLE_DEVICES hides others",
                count - 1
            )),
            lacking => wrong(format!("`{wanted}` cannot be used: {}; or use `--device cpu`", reason(lacking))),
        },
        _ => wrong(format!("unknown device `{wanted}`; expected `auto`, `cpu` or `cuda:N`")),
    }
}

fn wrong(message: String) -> Result<Vec<String>> {
    Err(BadRequest(message).into())
}

fn reason(gpus: Option<Result<usize>>) -> String {
    match gpus {
        Some(Err(error)) => error.to_string(),
        _ => "no GPU is visible".into(),
    }
}

/// What stages are told of where they will run: the first of the devices, and the memory of a CPU's machine, as far as this
/// process may use it.
pub(crate) fn machine(devices: &[String]) -> Machine {
    let device = devices.first().cloned().unwrap_or_default();
    let memory = if device == "cpu" { memory::limit() } else { None };
    Machine { device, memory }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_driver() -> Option<Result<usize>> {
        Some(Err(anyhow::anyhow!("no driver")))
    }

    #[test]
    fn the_best_device_is_chosen() {
        assert_eq!(devices("auto", || None).unwrap(), ["cpu"]);
        assert_eq!(devices("auto", || Some(Ok(2))).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(devices("auto", || Some(Ok(0))).unwrap(), ["cpu"]);
        assert_eq!(devices("auto", without_driver).unwrap(), ["cpu"]);
    }

    #[test]
    fn what_is_asked_for_is_taken_or_refused() {
        let refusal = |wanted, gpus| devices(wanted, gpus).unwrap_err().to_string();
        assert_eq!(devices("cpu", without_driver).unwrap(), ["cpu"]);
        assert_eq!(devices("cuda:1", || Some(Ok(2))).unwrap(), ["cuda:1"]);
        assert_eq!(
            refusal("cuda:2", || Some(Ok(2))),
            "there is no `cuda:2`; the last one is `cuda:1`, unless CUDA_VISIBLE_DEVICES hides others"
        );
        assert_eq!(refusal("cuda:0", without_driver), "`cuda:0` cannot be used: no driver; or use `--device cpu`");
        assert_eq!(devices("cuda:1,cuda:0,cuda:1", || Some(Ok(2))).unwrap(), ["cuda:1", "cuda:0", "cuda:1"]);
        assert!(refusal("cuda:0,cpu", || Some(Ok(2))).starts_with("`cpu` cannot stand in a list"));
        assert!(refusal("cuda:0,cuda:7", || Some(Ok(2))).starts_with("there is no `cuda:7`"));
        assert!(refusal("cuda:0", || None).contains("built with feature `cuda`"));
        assert_eq!(refusal("gpu", || Some(Ok(2))), "unknown device `gpu`; expected `auto`, `cpu` or `cuda:N`");
    }
}
