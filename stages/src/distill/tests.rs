//! Several teachers, a second text, and the published training of response priming.

use std::collections::HashMap;

use contract::{Kind, TokenizerFile};
use indexmap::IndexMap;
use lm::{AdamW, AdamWOptions, Family, Gradients};
use serde_json::{Map, Value as Json};

use super::*;
use crate::testing::{Log, Scratch, output, row};

fn tokenizer() -> TokenizerFile {
    TokenizerFile::new("{}", 0, 40)
}

fn model(layers: usize, width: usize, seed: u64) -> Arc<LanguageModel> {
    let shape = Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(Family::Gpt2, layers, width) };
    Arc::new(LanguageModel::init(&shape, tokenizer(), seed, &Device::Cpu).unwrap())
}

/// Four rows of two families in turn.
fn data() -> Arc<Dataset> {
    let texts: [(&[u32], &[u32]); 4] =
        [(&[1, 2, 3], &[4, 5, 0]), (&[6], &[7, 8, 9, 0]), (&[10, 11], &[12]), (&[13, 14], &[15, 16, 0])];
    let rows = texts.into_iter().enumerate().map(|(id, (prompt, response))| contract::Row {
        family: Some(["sum", "letter"][id % 2].into()),
        ..row(id as u64, prompt, response)
    });
    Arc::new(Dataset { rows: rows.collect(), tokenizer: tokenizer() })
}

fn config(more: Json) -> Json {
    let mut config = json!({"divergence": "reverse-kl", "cross_entropy": 0.25, "learning_rate": 1e-2, "seed": 1});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn learn(more: Json, inputs: Vec<(&str, AnyValue)>) -> Result<(Arc<LanguageModel>, Map<String, Json>)> {
    let inputs = inputs.into_iter().chain([("student", model(1, 16, 1) as AnyValue)]).collect();
    let (outputs, Log { mut rows, .. }) = Scratch::new().run(&Distill, config(more), inputs)?;
    Ok((output(&outputs, "model"), rows.remove(0)))
}

fn values(parameters: &IndexMap<String, Tensor>) -> Vec<Vec<u32>> {
    let bits = |tensor: &Tensor| {
        let values: Vec<f32> = tensor.detach().flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    parameters.values().map(bits).collect()
}

/// The loss of one row by one teacher, and its gradient, where a token counts `weight`.
fn alone(student: &LanguageModel, teacher: &LanguageModel, row: &contract::Row, weight: f32) -> (f64, Gradients) {
    let text = Aligned::of([row]);
    let said = lm::Said::Hidden(text.hidden(&teacher.frozen(), None, None).unwrap());
    let head = teacher.frozen().head().unwrap();
    let heard = Heard { name: None, share: 1.0, said, head: Some(&head), states: Vec::new() };
    let lesson = Lesson { tokens: None, heard: vec![heard] };
    let learning =
        Learning { student, temperature: 1.0, alignment: Alignment::Response, dropout: None, projections: None };
    let resolved = Kind::resolve(&Distill, &config(json!({})), Conventions::Sound).unwrap();
    let task = Task::of(&serde_json::from_value(resolved).unwrap());
    let mut parts = Parts::default();
    let loss = learning.loss(&task, &text, weight, &[lesson], &mut parts).unwrap();
    let value = parts.iter().find(|(name, _)| *name == "reverse_kl").unwrap().1;
    (value, lm::gradients(&loss, &student.parameters()).unwrap())
}

/// Every row of a routed run has the loss and the gradient that it has in a run with its teacher alone, and their sum is
/// made in the same order: so it can be made here, and the weights that come out have the same bits.
#[test]
fn two_routed_teachers_are_two_runs_bit_for_bit() {
    let (maths, prose, data) = (model(2, 24, 2), model(3, 20, 3), data());
    let inputs = || -> Vec<(&str, AnyValue)> {
        vec![("teachers/maths", maths.clone()), ("teachers/prose", prose.clone()), ("data", data.clone())]
    };
    let routed = json!({"route": {"sum": "maths", "otherwise": "prose"}, "micro_batch": 1});
    let (found, metrics) = learn(routed.clone(), inputs()).unwrap();

    let student = Arc::try_unwrap(model(1, 16, 1)).ok().unwrap().trainable().unwrap();
    let tokens: usize = data.rows.iter().map(Aligned::tokens_of).sum();
    let weight = 1.0 / tokens as f32;
    let rows = data.rows.iter().zip([&maths, &prose, &maths, &prose]);
    let (losses, gradients): (Vec<f64>, Vec<Gradients>) =
        rows.map(|(row, teacher)| alone(&student, teacher, row, weight)).unzip();
    let [mut first, second, mut third, fourth] = <[Gradients; 4]>::try_from(gradients).ok().unwrap();
    lm::accumulate(&mut first, second).unwrap();
    lm::accumulate(&mut third, fourth).unwrap();
    lm::accumulate(&mut first, third).unwrap();
    let norm = lm::norm(&first).unwrap();
    assert_eq!(metrics["gradient_norm"].as_f64().unwrap().to_bits(), norm.to_bits());
    let mut optimizer = AdamW::new(AdamWOptions::default());
    optimizer.step(&student.parameters(), &first, 1e-2, (1.0 / (norm + 1e-6)).min(1.0)).unwrap();
    assert!(values(&found.parameters()) == values(&student.parameters()), "other bits");
    for (name, right) in [
        ("reverse_kl_maths", losses[0] + losses[2]),
        ("reverse_kl_prose", losses[1] + losses[3]),
        ("reverse_kl", losses[0] + losses[1] + losses[2] + losses[3]),
    ] {
        assert_eq!(metrics[name].as_f64().unwrap().to_bits(), right.to_bits(), "{name}");
    }

    // All rows at once, in which each teacher reads its own and the student all, say the same but for rounding.
    let mut at_once = routed;
    at_once.as_object_mut().unwrap().remove("micro_batch");
    let (_, together) = learn(at_once, inputs()).unwrap();
    for name in ["loss", "cross_entropy", "reverse_kl", "reverse_kl_maths", "gradient_norm"] {
        let [a, b] = [&metrics, &together].map(|row| row[name].as_f64().unwrap());
        assert!((a / b - 1.0).abs() < 1e-5, "{name}: {a} and {b}");
    }
    // Where all rows have one teacher, the run is that with this teacher alone.
    let (all, _) = learn(json!({"route": {"otherwise": "prose"}}), inputs()).unwrap();
    let (one, _) = learn(json!({}), vec![("teacher", prose.clone()), ("data", data.clone())]).unwrap();
    assert!(values(&all.parameters()) == values(&one.parameters()));
}

#[test]
fn a_family_has_the_teacher_of_its_name_and_none_is_an_error() {
    let (maths, prose, data) = (model(2, 24, 2), model(3, 20, 3), data());
    let learn = |route: Json, [first, second]: [&str; 2]| {
        learn(
            json!({"route": route}),
            vec![(first, maths.clone() as AnyValue), (second, prose.clone()), ("data", data.clone())],
        )
    };
    let by_name = learn(json!({}), ["teachers/sum", "teachers/letter"]).unwrap();
    let by_route = learn(json!({"sum": "a", "letter": "b"}), ["teachers/a", "teachers/b"]).unwrap();
    assert!(values(&by_name.0.parameters()) == values(&by_route.0.parameters()));
    let error = learn(json!({"sum": "a"}), ["teachers/a", "teachers/b"]).err().unwrap().to_string();
    assert!(error.contains("nobody teaches row 2 of `train`, which is of family `letter`"), "{error}");
}

#[test]
fn weights_are_shares_of_the_divergence() {
    let (maths, prose, data) = (model(2, 24, 2), model(3, 20, 3), data());
    let inputs = || -> Vec<(&str, AnyValue)> {
        vec![("teachers/maths", maths.clone()), ("teachers/prose", prose.clone()), ("data", data.clone())]
    };
    let (model, metrics) = learn(json!({"weights": {"maths": 1.0, "prose": 0.0}}), inputs()).unwrap();
    let (one, alone) = learn(json!({}), vec![("teacher", maths.clone()), ("data", data.clone())]).unwrap();
    assert_eq!((&metrics["loss"], &metrics["reverse_kl"]), (&alone["loss"], &alone["reverse_kl"]));
    assert!(values(&model.parameters()) == values(&one.parameters()));
    let (_, alike) = learn(json!({}), inputs()).unwrap();
    let number = |name: &str| alike[name].as_f64().unwrap();
    let mean = (number("reverse_kl_maths") + number("reverse_kl_prose")) / 2.0;
    assert!((number("reverse_kl") - mean).abs() < 1e-12);
}

#[test]
fn what_is_said_of_teachers_that_are_not_there_is_refused() {
    let known = |ports: &[&str]| {
        let facts = ports.iter().map(|port| ((*port).to_owned(), contract::Facts::default()));
        Outlook::new(contract::Machine::default(), facts.collect(), None)
    };
    let several = &["student", "data", "teachers/maths", "teachers/prose"][..];
    for (more, ports, expected) in [
        (json!({"weights": {"maths": 1.0}}), several, "`weights` does not say what `prose` counts"),
        (json!({"weights": {"x": 1.0}}), several, "`weights` names `x`, who is none of the `teachers`"),
        (json!({"route": {"sum": "math"}}), several, "`route` names `math`, who is none of the `teachers`"),
        (json!({}), &["student", "data", "teacher", "teachers/a"], "`teacher` is connected beside `teachers`"),
        (json!({}), &["student", "data", "teacher", "contrast"], "nothing says how `contrast` is learnt"),
        (
            json!({"contrast": {"divergence": "reverse-kl"}}),
            &["student", "data", "teacher"],
            "nothing comes in by `contrast`",
        ),
    ] {
        let config = Kind::resolve(&Distill, &config(more), Conventions::Sound).unwrap();
        let mut outlook = known(ports);
        Kind::foresee(&Distill, &config, &mut outlook);
        let found: Vec<_> = outlook.findings.iter().filter(|finding| finding.is_error).collect();
        assert!(found.iter().any(|finding| finding.message == expected), "{expected}: {found:?}");
    }
    let both = config(json!({"route": {}, "weights": {"a": 1.0}}));
    assert!(Kind::resolve(&Distill, &both, Conventions::Sound).is_err());
}

#[test]
fn a_contrast_is_a_second_loss_in_the_same_update() {
    let (teacher, data) = (model(2, 24, 2), data());
    let other: AnyValue = Arc::new(data.select(&[2, 1]));
    let inputs = |contrast: bool| -> Vec<(&str, AnyValue)> {
        let contrast = contrast.then(|| ("contrast", other.clone()));
        [("teacher", teacher.clone() as AnyValue), ("data", data.clone())].into_iter().chain(contrast).collect()
    };
    let contrast = json!({"contrast": {"divergence": "forward-kl", "weight": 0.5}});
    let (_, found) = learn(contrast.clone(), inputs(true)).unwrap();
    let (_, own) = learn(json!({}), inputs(false)).unwrap();
    let beside = vec![("teacher", teacher.clone() as AnyValue), ("data", other.clone())];
    let (_, beside) = learn(json!({"divergence": "forward-kl", "cross_entropy": 0.0}), beside).unwrap();
    let number = |row: &Map<String, Json>, name: &str| row[name].as_f64().unwrap();
    assert_eq!(found["reverse_kl"], own["reverse_kl"]);
    assert_eq!(found["contrast_forward_kl"], beside["forward_kl"]);
    let right = number(&own, "loss") + 0.5 * number(&beside, "loss");
    assert!((number(&found, "loss") - right).abs() < 1e-12);
    // Split into micro-batches it is the same mean over tokens.
    let mut split = contrast;
    split["micro_batch"] = json!(1);
    let (_, split) = learn(split, inputs(true)).unwrap();
    for name in ["loss", "contrast_forward_kl", "gradient_norm"] {
        assert!((number(&found, name) / number(&split, name) - 1.0).abs() < 1e-5, "{name}");
    }
}

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(name)
}

fn published(name: &str) -> LanguageModel {
    LanguageModel::load(&fixture(&format!("promptkd/{name}")), &Device::Cpu).unwrap()
}

/// `make_priming.py` is the other program: questions by index, sorted as words, the published loss, SGD, a cosine that rises
/// again.
#[test]
fn the_published_training_of_response_priming_is_that_of_pytorch() {
    let expected: Json = serde_json::from_slice(&std::fs::read(fixture("priming/expected.json")).unwrap()).unwrap();
    let ids = |json: &Json| serde_json::from_value::<Vec<u32>>(json.clone()).unwrap();
    let (prefix, items) = (ids(&expected["prefix"]), expected["items"].as_array().unwrap());
    let tokenizer = TokenizerFile::new("", 0, 61);
    let rows = |before: &[u32]| {
        let of_item = |(id, item): (usize, &Json)| {
            row(id as u64, &[before, &ids(&item["question"])].concat(), &ids(&item["answer"]))
        };
        items.iter().enumerate().map(of_item).collect::<Vec<_>>()
    };
    let (data, view) = (rows(&[]), Dataset { rows: rows(&prefix), tokenizer: tokenizer.clone() });
    let view: AnyValue = Arc::new(view);

    let config = json!({
        "divergence": "reverse-kl", "alpha": expected["alpha"], "temperature": expected["temperature"],
        "temperature_squared": true, "alignment": "index", "pairing": "lexicographic",
        "learning_rate": expected["rate"], "schedule": {"cosine": {"falls_for": 0.5}},
        "optimizer": {"method": "sgd", "momentum": expected["momentum"], "weight_decay": expected["weight_decay"], "clip": 0.0},
    });
    let kind: &dyn Kind = &Distill;
    let env = Env { device: "cpu".into(), threads: 1, scratch: std::env::temp_dir() };
    let config = kind.resolve(&config, Conventions::Sound).unwrap();
    let mut operator = kind.start(&config, &env, None).unwrap();
    let teacher: AnyValue = Arc::new(published("teacher"));
    let mut student: AnyValue = Arc::new(published("student"));
    let updates = expected["updates"].as_array().unwrap();
    for (round, right) in updates.iter().enumerate() {
        if round == updates.len() / 2 {
            // What is remembered goes through a file on the way.
            let folder = tempfile::tempdir().unwrap();
            operator.state().unwrap().unwrap().save(folder.path()).unwrap();
            let state = kind.load_state(folder.path(), &env).unwrap();
            operator = kind.start(&config, &env, Some(state)).unwrap();
        }
        let mut inputs = Inputs::new();
        let window = Dataset { rows: vec![data[round % data.len()].clone()], tokenizer: tokenizer.clone() };
        inputs.insert("data", Arc::new(window));
        inputs.insert("student", student);
        inputs.insert("teacher", teacher.clone());
        inputs.insert("view", view.clone());
        let per_epoch = data.len() as u64;
        let step = Step {
            round: round as u64,
            rounds: 2 * per_epoch,
            epoch: round as u64 / per_epoch,
            rounds_per_epoch: per_epoch,
        };
        let mut log = Log::default();
        student = operator.run(inputs, &step, &mut log).unwrap().0.remove("model").unwrap();
        for name in ["loss", "cross_entropy", "reverse_kl", "learning_rate"] {
            let (found, right) = (log.rows[0][name].as_f64().unwrap(), right[name].as_f64().unwrap());
            let tolerance = if name == "learning_rate" { 1e-12 } else { 1e-4 };
            assert!(
                (found - right).abs() <= tolerance * right.abs().max(1.0),
                "{name} of update {round}: {found}, {right}"
            );
        }
    }
    let Ok(student) = student.into_any().downcast::<LanguageModel>() else { panic!("a model") };
    let right: HashMap<String, Tensor> =
        candle_core::safetensors::load(fixture("priming/final.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(right.len(), student.parameters().len());
    for (name, found) in student.parameters() {
        let gap = (found.detach() - &right[&name]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(gap.to_scalar::<f32>().unwrap() < 1e-4, "{name}: {gap}");
    }
}

#[test]
fn options_that_disagree_are_named() {
    let faults = |config: Json| {
        let mut config = config;
        config["divergence"] = json!("reverse-kl");
        config["learning_rate"] = json!(1e-3);
        let kind: &dyn Kind = &Distill;
        let errors = kind.resolve(&config, Conventions::Sound).err().unwrap_or_default();
        errors.iter().map(|error| error.path.join(".")).collect::<Vec<_>>()
    };
    assert_eq!(faults(json!({"alpha": 0.5, "weight": 0.5})), ["alpha"]);
    assert_eq!(faults(json!({"optimizer": {"momentum": 0.9}})), ["optimizer.momentum"]);
    assert_eq!(faults(json!({"optimizer": {"method": "sgd", "eps": 1e-6}})), ["optimizer.eps"]);
    assert_eq!(faults(json!({"alpha": 1.0, "optimizer": {"method": "sgd"}})), [""; 0]);
}
