//! What several kinds say of a stage before it runs, beside the rules that every kind shares ([`contract::Outlook`]).

use contract::{Cause, Facts, Learner, Outlook};
use lm::{Architecture, Dtype, Lora};

/// The model that a stage trains: the one on `port`, else a new one of the shape `init` over the vocabulary of `data`. Its
/// facts are those of the trained model, too. From here on they stand for `port`, connected or not.
pub(crate) fn learner(
    outlook: &mut Outlook,
    port: &str,
    init: Option<&Architecture>,
    data: &str,
    lora: Option<&Lora>,
    checkpointing: bool,
) -> Facts {
    let connected = outlook.has(port);
    if !connected {
        let Some(init) = init else {
            outlook.error(
                Vec::new(),
                format!("there is no {port} to train"),
                format!("connect `{port}`, or give `init` with the shape of a new one"),
            );
            return Facts::default();
        };
        let Facts { vocabulary, ends, .. } = outlook.input(data);
        outlook.assume(port, init.facts(vocabulary, ends));
    }
    let facts = outlook.input(port);
    outlook.trains(port, data, Learner { is_new: !connected, checkpointing, adapter: lora.is_some() });
    outlook.same_vocabulary(&[data, port]);
    outlook.same_end(data, port);
    outlook.reads(port, None, &outlook.rows(data));
    facts
}

/// A frozen model that the stage runs over the text of `data`, behind its soft prompt where one is connected.
pub(crate) fn reader(outlook: &mut Outlook, model: &str, prompt: Option<&str>, data: &str) {
    outlook.holds(model);
    outlook.same_vocabulary(&[data, model]);
    outlook.same_end(data, model);
    outlook.reads(model, prompt, &outlook.rows(data));
    if let Some(prompt) = prompt {
        outlook.same_width(model, prompt);
    }
}

/// The teacher on a port, and its soft prompt, which reads the responses of `data` behind their prompts, or behind those of
/// `view`.
pub(crate) fn teacher(outlook: &mut Outlook, port: &str, prompt: Option<&str>) {
    outlook.same_vocabulary(&["data", "view"]);
    let read = if outlook.has("view") { "view" } else { "data" };
    reader(outlook, port, prompt, read);
}

/// The type that matrices are multiplied in, on the device that the stage will run on.
pub(crate) fn computes_in(outlook: &mut Outlook, dtype: Dtype) {
    if dtype == Dtype::Bf16 && outlook.machine.device == "cpu" {
        let message = "`dtype: bf16` needs a GPU, and this runs on the CPU";
        outlook.error([Cause::Field("dtype".into())], message, "set `dtype: f32`, or choose another device");
    }
}
