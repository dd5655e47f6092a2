//! What several kinds say of a stage before it runs, beside the rules that every kind shares ([`contract::Outlook`]).

use contract::files::counted;
use contract::{Bounds, Cause, Facts, Learner, Outlook};
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

/// The teacher on `teacher`, which reads in its own tokens the responses of `data` behind the prompts of `view`.
pub(crate) fn teacher_of_other_tokens(outlook: &mut Outlook) {
    let field = || Cause::Field("alignment".into());
    for port in ["teacher", "view"] {
        if !outlook.has(port) {
            let message = match port {
                "view" => "`alignment: bytes` needs `view`, the rows in the teacher's tokens",
                _ => "`alignment: bytes` needs `teacher`",
            };
            let hint = match port {
                "view" => "tokenise the same corpus with the teacher's tokenizer, and connect that",
                _ => "connect the teacher, or leave `alignment` out",
            };
            outlook.error([field()], message, hint);
        }
    }
    outlook.holds("teacher");
    outlook.same_vocabulary(&["view", "teacher"]);
    outlook.same_end("view", "teacher");
    outlook.same_width("teacher", "prompt");
}

/// The rows of an update are those of the recipe. `batch` is the field that gives their number, where it is not all of `data`.
pub(crate) fn effective_batch(outlook: &mut Outlook, recipe: Option<u64>, batch: Option<(&str, u64)>) {
    let Some(recipe) = recipe else { return };
    let rows = batch.map_or_else(|| outlook.input("data").row_count(), |(_, rows)| Bounds::exactly(rows));
    let may_be = (rows.least..=rows.most).contains(&recipe);
    // Where some rounds are shorter, there is one row at least.
    if may_be && (rows.exact().is_some() || rows.least == 0) {
        return;
    }
    let found = match rows.exact() {
        Some(rows) => counted(rows, "row"),
        None => format!("{} to {} rows", rows.least, rows.most),
    };
    let field = Cause::Field("effective_batch".into());
    let (other, hint) = match batch {
        Some((field, _)) => (Cause::Field(field.into()), format!("set `{field}` to {recipe}")),
        None => (
            Cause::Input("data".into(), "take".into()),
            format!("let the window `take` {recipe} rows, with `last: drop`"),
        ),
    };
    outlook.error(
        [field, other],
        format!("`effective_batch` says that an update has {recipe} rows, and here it has {found}"),
        format!("{hint}, or follow another recipe: change `effective_batch`, or leave it out"),
    );
}

/// The type that matrices are multiplied in, on the device that the stage will run on.
pub(crate) fn computes_in(outlook: &mut Outlook, dtype: Dtype) {
    if dtype == Dtype::Bf16 && outlook.machine.device == "cpu" {
        let message = "`dtype: bf16` needs a GPU, and this runs on the CPU";
        outlook.error([Cause::Field("dtype".into())], message, "set `dtype: f32`, or choose another device");
    }
}

#[cfg(test)]
mod tests {
    use contract::Machine;

    use super::*;

    fn outlook(inputs: &[(&str, Facts)]) -> Outlook {
        let inputs = inputs.iter().map(|(port, facts)| ((*port).to_owned(), facts.clone())).collect();
        Outlook::new(Machine::default(), inputs, None)
    }

    fn said(outlook: &Outlook) -> Vec<&str> {
        outlook.findings.iter().filter(|finding| finding.is_error).map(|finding| finding.message.as_str()).collect()
    }

    #[test]
    fn rows_that_end_otherwise_than_a_model_stops_are_refused() {
        for (stops, refused) in [(vec![3], false), (vec![2, 3], false), (vec![2], true)] {
            let ends = |ends: &[u32]| Facts { ends: Some(ends.to_vec()), ..Facts::default() };
            let mut outlook = outlook(&[("data", ends(&[3])), ("teacher", ends(&stops))]);
            reader(&mut outlook, "teacher", None, "data");
            assert_eq!(!said(&outlook).is_empty(), refused, "{stops:?}: {:?}", said(&outlook));
        }
    }

    #[test]
    fn an_update_has_the_rows_of_its_recipe_or_is_refused() {
        let bounds = |least, most| Bounds { least, most };
        for (rows, batch, wrong) in [
            (bounds(64, 64), None, None),
            (bounds(32, 32), None, Some("here it has 32 rows")),
            // Some rounds are short.
            (bounds(1, 64), None, Some("here it has 1 to 64 rows")),
            // Nothing is known yet, or only that there are enough.
            (Bounds::ANY, None, None),
            (bounds(0, 100), None, None),
            (bounds(0, 63), None, Some("here it has 0 to 63 rows")),
            (bounds(256, 256), Some(("batch", 64)), None),
            (bounds(256, 256), Some(("batch", 16)), Some("here it has 16 rows")),
        ] {
            let mut outlook = outlook(&[("data", Facts { rows: vec![rows], ..Facts::default() })]);
            effective_batch(&mut outlook, Some(64), batch);
            match wrong {
                None => assert_eq!(said(&outlook), Vec::<&str>::new(), "{rows:?}"),
                Some(wrong) => assert!(said(&outlook)[0].ends_with(wrong), "{rows:?}: {:?}", said(&outlook)),
            }
            effective_batch(&mut outlook, None, batch);
            assert!(said(&outlook).len() < 2);
        }
    }
}
