//! Model folders that something is wrong with, one thing at a time: each is refused where it comes in, by name, and so is
//! every other way to break it that differs only in the file, the field or the tensor.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use contract::outlook::Machine;
use contract::random::purpose;
use contract::{Conventions, Env, Finding, Inputs, Kind, Outlook, Outputs, Sink, Step, TokenizerFile, Value};
use lm::sample::Sampling;
use lm::{Architecture, Family, Generate, LanguageModel, Packed, Prompt, generate};
use serde_json::{Map, Value as Json, json};
use stages::download::Download;
use stages::text::{SpecialTokens, Text};
use tempfile::TempDir;

const SIZE: u32 = 40;

type Tensors = HashMap<String, Tensor>;

/// A small model over a tokenizer of as many words.
fn model(family: Family) -> TempDir {
    let vocabulary: Map<String, Json> = (0..SIZE).map(|id| (format!("t{id}"), json!(id))).collect();
    let json = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}});
    let tokenizer = TokenizerFile::new(json.to_string(), 0, SIZE);
    let tied = Some(family == Family::Gpt2);
    let shape = Architecture { heads: Some(2), positions: Some(32), tied, ..Architecture::new(family, 2, 16) };
    let folder = tempfile::tempdir().unwrap();
    LanguageModel::init(&shape, tokenizer, 1, &Device::Cpu).unwrap().save(folder.path()).unwrap();
    folder
}

fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Json)) {
    let path = folder.join(file);
    let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn set(field: &'static str, value: Json) -> Box<dyn Fn(&Path)> {
    Box::new(move |folder| edit(folder, "config.json", |json| json[field] = value.clone()))
}

fn without(field: &'static str) -> Box<dyn Fn(&Path)> {
    Box::new(move |folder| {
        edit(folder, "config.json", |json| {
            json.as_object_mut().unwrap().shift_remove(field).unwrap();
        });
    })
}

fn write(file: &'static str, content: &'static [u8]) -> Box<dyn Fn(&Path)> {
    Box::new(move |folder| fs::write(folder.join(file), content).unwrap())
}

fn load(folder: &Path) -> Tensors {
    candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap()
}

fn tensors(change: impl Fn(&mut Tensors) + 'static) -> Box<dyn Fn(&Path)> {
    Box::new(move |folder| {
        let mut tensors = load(folder);
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    })
}

/// Two shards with an index: the second holds the tensors whose names contain `of_second`.
fn shard(folder: &Path, of_second: &str) {
    let (second, first): (Tensors, Tensors) = load(folder).into_iter().partition(|(name, _)| name.contains(of_second));
    let mut map = Map::new();
    for (tensors, file) in [(first, "a.safetensors"), (second, "b.safetensors")] {
        map.extend(tensors.keys().map(|name| (name.clone(), json!(file))));
        candle_core::safetensors::save(&tensors, folder.join(file)).unwrap();
    }
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// A tensor with one element that is not what the others are.
fn with_one(tensor: &Tensor, value: f64, dtype: DType) -> Tensor {
    let mut values = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    *values.last_mut().unwrap() = value;
    Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// What is said before anything runs.
fn foresee(folder: &Path) -> Outlook {
    let config = Download.resolve(&json!({"model": folder}), Conventions::Sound).unwrap();
    let mut outlook = Outlook::new(Machine::default(), BTreeMap::new(), None);
    Kind::foresee(&Download, &config, &mut outlook);
    outlook
}

#[derive(Default)]
struct Said(Vec<String>);

impl Sink for Said {
    fn metrics(&mut self, _row: Map<String, Json>) {}
    fn progress(&mut self, _done: u64, _total: u64, _unit: &str) {}
    fn warn(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }
    fn note(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }
}

fn download(folder: &Path, scratch: &Path) -> (contract::Result<Outputs>, Vec<String>) {
    let config = Download.resolve(&json!({"model": folder}), Conventions::Sound).unwrap();
    let env = Env { device: "cpu".into(), threads: 1, scratch: scratch.to_owned() };
    let mut said = Said::default();
    let outputs = Kind::start(&Download, &config, &env, None).unwrap().run(Inputs::new(), &Step::once(), &mut said);
    (outputs, said.0)
}

/// Family, what is broken, and what is said of it.
type Case = (Family, &'static str, Box<dyn Fn(&Path)>, &'static [&'static str]);

fn seen_before() -> Vec<Case> {
    use Family::{Gpt2, Llama};
    let config: &[&str] = &["config.json"];
    let scaling = |json: Json| set("rope_scaling", json);
    vec![
        (Llama, "no vocabulary size", without("vocab_size"), &["config.json", "missing field `vocab_size`"]),
        (Llama, "no width", without("hidden_size"), &["missing field `hidden_size`"]),
        (Gpt2, "no width", without("n_embd"), &["missing field `n_embd`"]),
        (Llama, "a size in words", set("hidden_size", json!("16")), &["`hidden_size`: invalid type: string"]),
        (Gpt2, "half a layer", set("n_layer", json!(1.5)), &["`n_layer`: invalid type: floating point"]),
        (Gpt2, "no layers", set("n_layer", json!(0)), &["layers is 0: expected at least 1"]),
        (Gpt2, "heads that do not fit", set("n_head", json!(3)), &["16 is not a multiple of 3 heads"]),
        (Llama, "heads that cannot share", set("num_key_value_heads", json!(0)), &["heads of keys and values is 0"]),
        (
            Llama,
            "another family",
            set("model_type", json!("bert")),
            &["type `bert`: expected one of `gpt2`, `gpt_neox`"],
        ),
        (Llama, "another gate", set("hidden_act", json!("gelu")), &["activation is `gelu`: expected `silu`"]),
        (Gpt2, "another nonlinearity", set("activation_function", json!("tanh")), &["`activation_function`", "`tanh`"]),
        (Llama, "another rotation", scaling(json!({"type": "yarn", "factor": 2.0})), &["type `yarn`"]),
        (Llama, "no scale", scaling(json!({"type": "linear"})), &["`rope_scaling`", "missing field `factor`"]),
        (
            Llama,
            "a scale of 0",
            scaling(json!({"type": "linear", "factor": 0})),
            &["`factor` of the rotary scaling is 0"],
        ),
        (Llama, "a part is turned", set("partial_rotary_factor", json!(0.5)), &["`partial_rotary_factor` is 0.5"]),
        (
            Llama,
            "quantised",
            set("quantization_config", json!({"bits": 4})),
            &["`quantization_config` is {\"bits\":4}"],
        ),
        (Gpt2, "cross-attention", set("add_cross_attention", json!(true)), &["`add_cross_attention` is true"]),
        (Gpt2, "negative variance", set("layer_norm_epsilon", json!(-1.0)), &["`layer_norm_epsilon` is -1"]),
        (Llama, "a name as end", set("eos_token_id", json!("</s>")), &["`eos_token_id`"]),
        (Llama, "dropout of all", set("attention_dropout", json!(1.0)), &["dropout is 1"]),
        (Gpt2, "no JSON", write("config.json", b"{\"n_layer\": 2,"), &["config.json:1:14` is not JSON"]),
        (Gpt2, "a list", write("config.json", b"[]"), &["config.json` is not a JSON object"]),
        (Gpt2, "nothing", Box::new(|folder| fs::remove_file(folder.join("config.json")).unwrap()), config),
        (
            Gpt2,
            "a folder",
            Box::new(|folder| {
                fs::remove_file(folder.join("config.json")).unwrap();
                fs::create_dir(folder.join("config.json")).unwrap();
            }),
            &["config.json` is a folder"],
        ),
        (
            Gpt2,
            "more layers than there are",
            set("n_layer", json!(3)),
            &["`transformer.h.2.ln_1.weight` is missing (12 of 40"],
        ),
        (
            Gpt2,
            "fewer",
            set("n_layer", json!(1)),
            &["`transformer.h.1.", "is none of the model that `config.json` describes"],
        ),
        (
            Llama,
            "a bias",
            set("attention_bias", json!(true)),
            &["`model.layers.0.self_attn.q_proj.bias` is missing (8 of"],
        ),
        (Llama, "a head of its own", set("tie_word_embeddings", json!(false)), &[]),
        (
            Llama,
            "a tensor less",
            tensors(|t| drop(t.remove("model.norm.weight"))),
            &["`model.norm.weight` is missing (1 of 21"],
        ),
        (
            Llama,
            "a tensor more",
            tensors(|t| drop(t.insert("score.weight".into(), zeros(&[2, 16])))),
            &["tensor `score.weight`", "is none of"],
        ),
        (
            Llama,
            "another shape",
            tensors(|t| drop(t.insert("model.norm.weight".into(), zeros(&[15])))),
            &["`model.norm.weight`", "shape [15], expected [16]"],
        ),
        (
            Gpt2,
            "lying on its side",
            tensors(|t| {
                let weight = t["transformer.h.0.mlp.c_fc.weight"].t().unwrap().contiguous().unwrap();
                t.insert("transformer.h.0.mlp.c_fc.weight".into(), weight);
            }),
            &["`transformer.h.0.mlp.c_fc.weight`", "shape [64, 16], expected [16, 64]"],
        ),
        (
            Gpt2,
            "whole numbers",
            tensors(|t| {
                let norm = t["transformer.ln_f.bias"].to_dtype(DType::I64).unwrap();
                t.insert("transformer.ln_f.bias".into(), norm);
            }),
            &["`transformer.ln_f.bias`", "type I64, expected F32, F16, BF16 or F64"],
        ),
        (
            Gpt2,
            "two names for one",
            tensors(|t| {
                t.insert("ln_f.bias".into(), t["transformer.ln_f.bias"].clone());
            }),
            &["ln_f.bias` in", "is there twice"],
        ),
        (
            Llama,
            "two files with one",
            Box::new(|folder| {
                shard(folder, "norm");
                let both = candle_core::safetensors::load(folder.join("b.safetensors"), &Device::Cpu).unwrap();
                let mut first = candle_core::safetensors::load(folder.join("a.safetensors"), &Device::Cpu).unwrap();
                first.extend(both);
                candle_core::safetensors::save(&first, folder.join("a.safetensors")).unwrap();
            }),
            &["b.safetensors` is there twice", "a.safetensors`: remove one"],
        ),
        (
            Llama,
            "a file that is not there",
            Box::new(|folder| {
                shard(folder, "norm");
                fs::remove_file(folder.join("b.safetensors")).unwrap();
            }),
            &["index.json` names `b.safetensors`, which is not there"],
        ),
        (
            Llama,
            "a file elsewhere",
            Box::new(|folder| {
                shard(folder, "norm");
                edit(folder, "model.safetensors.index.json", |json| {
                    json["weight_map"]["model.norm.weight"] = json!("../b")
                });
            }),
            &["index.json` names `../b`: expected a file beside it"],
        ),
        (
            Llama,
            "an index of nothing",
            Box::new(|folder| {
                shard(folder, "norm");
                fs::write(folder.join("model.safetensors.index.json"), "{}").unwrap();
            }),
            &["index.json` has no object `weight_map`"],
        ),
        (
            Gpt2,
            "cut short",
            Box::new(|folder| {
                let path = folder.join("model.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
            }),
            &["model.safetensors` is not a whole safetensors file", "get it again"],
        ),
        (
            Gpt2,
            "its beginning",
            write("model.safetensors", &[9, 0, 0]),
            &["is not a whole safetensors file (it has 3 bytes)"],
        ),
        (
            Gpt2,
            "where it is to be had",
            write("model.safetensors", b"version https://git-lfs.github.com/spec/v1"),
            &["is not a whole safetensors file"],
        ),
        (
            Gpt2,
            "no weights",
            Box::new(|folder| fs::remove_file(folder.join("model.safetensors")).unwrap()),
            &["no weights in"],
        ),
        (
            Gpt2,
            "packed by hand",
            Box::new(|folder| {
                fs::rename(folder.join("model.safetensors"), folder.join("pytorch_model.bin")).unwrap();
            }),
            &["pytorch_model.bin`", "PyTorch 1.6 or later"],
        ),
        (
            Gpt2,
            "an end in words",
            write("generation_config.json", br#"{"eos_token_id": "</s>"}"#),
            &["generation_config.json` has `eos_token_id: \"</s>\"`"],
        ),
        (
            Gpt2,
            "fewer rows than tokens",
            Box::new(|folder| {
                edit(folder, "config.json", |json| json["vocab_size"] = json!(39));
                tensors(|t| {
                    let embedding = t["transformer.wte.weight"].narrow(0, 0, 39).unwrap().contiguous().unwrap();
                    t.insert("transformer.wte.weight".into(), embedding);
                })(folder);
            }),
            &["a tokenizer of 40 ids and a model of 39"],
        ),
        (
            Gpt2,
            "no tokenizer",
            Box::new(|folder| {
                for file in ["tokenizer.json", "tokenizer_config.json", "pipeline_tokenizer.json"] {
                    fs::remove_file(folder.join(file)).unwrap();
                }
            }),
            &["tokenizer.json"],
        ),
    ]
}

fn seen_in_values() -> Vec<Case> {
    use Family::{Gpt2, Llama};
    let broken = |name: &'static str, value: f64, dtype| {
        tensors(move |t| {
            let tensor = with_one(&t[name], value, dtype);
            t.insert(name.into(), tensor);
        })
    };
    vec![
        (
            Gpt2,
            "no number",
            broken("transformer.h.1.attn.c_attn.weight", f64::NAN, DType::F32),
            &["tensor `transformer.h.1.attn.c_attn.weight`", "NaN (1 of 768 elements", "[15, 47]"],
        ),
        (
            Llama,
            "infinite",
            broken("lm_head.weight", f64::NEG_INFINITY, DType::BF16),
            &["`lm_head.weight`", "-inf (1 of 640"],
        ),
        (Llama, "too large", broken("model.norm.weight", 1e300, DType::F64), &["`model.norm.weight`", "inf (1 of 16"]),
    ]
}

fn error_of(outlook: &Outlook) -> String {
    let errors = outlook.findings.iter().filter(|finding| finding.is_error);
    errors.map(|Finding { message, .. }| message.as_str()).collect::<Vec<_>>().join("; ")
}

#[test]
fn what_is_wrong_with_a_model_is_said_where_it_comes_in() {
    let cases = seen_before();
    assert!(cases.len() >= 40, "{}", cases.len());
    for (family, what, spoil, said) in cases {
        let (folder, scratch) = (model(family), tempfile::tempdir().unwrap());
        assert_eq!(error_of(&foresee(folder.path())), "", "{family:?}, {what}: before");
        spoil(folder.path());
        let foreseen = error_of(&foresee(folder.path()));
        let found = download(folder.path(), scratch.path()).0.err().map(|error| format!("{error:#}"));
        if said.is_empty() {
            assert_eq!((foreseen.as_str(), found), ("", None), "{family:?}, {what}");
            continue;
        }
        let found = found.unwrap_or_else(|| panic!("{family:?}, {what}: nothing is said"));
        for words in said {
            assert!(foreseen.contains(words), "{family:?}, {what}: {foreseen:?}");
            assert!(found.contains(words), "{family:?}, {what}: {found:?}");
        }
        assert!(foreseen.contains(&folder.path().display().to_string()), "{family:?}, {what}: {foreseen:?}");
    }
}

#[test]
fn values_are_looked_at_when_a_model_is_brought_in() {
    for (family, what, spoil, said) in seen_in_values() {
        let (folder, scratch) = (model(family), tempfile::tempdir().unwrap());
        spoil(folder.path());
        assert_eq!(error_of(&foresee(folder.path())), "", "{family:?}, {what}");
        let found = download(folder.path(), scratch.path()).0.err().map(|error| format!("{error:#}")).unwrap();
        assert!(said.iter().all(|words| found.contains(words)), "{family:?}, {what}: {found:?}");
    }
}

#[test]
fn what_is_odd_is_said_and_decided() {
    let folder = model(Family::Llama);
    edit(folder.path(), "config.json", |json| json["eos_token_id"] = json!([7, 9]));
    edit(folder.path(), "config.json", |json| json["bos_token_id"] = json!(5));
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": 11, "top_k": 3}"#).unwrap();
    let outlook = foresee(folder.path());
    let said: Vec<&str> = outlook.findings.iter().map(|finding| finding.message.as_str()).collect();
    assert!(said[0].contains("with token 0, and its `config.json` with 7, 9"), "{said:?}");
    assert!(said[0].ends_with("stops at any of 0, 7, 9, 11"), "{said:?}");
    assert_eq!(outlook.outputs["model"].ends, Some(vec![0, 7, 9, 11]));
    let scratch = tempfile::tempdir().unwrap();
    download(folder.path(), scratch.path()).0.unwrap();
    let model = LanguageModel::load(&scratch.path().join("model"), &Device::Cpu).unwrap();
    assert_eq!(model.ends(), [0, 7, 9, 11]);
    let saved = tempfile::tempdir().unwrap();
    model.save(saved.path()).unwrap();
    let generation: Json =
        serde_json::from_slice(&fs::read(saved.path().join("generation_config.json")).unwrap()).unwrap();
    assert_eq!(generation, json!({"eos_token_id": [0, 7, 9, 11], "top_k": 3}));
    assert_eq!(LanguageModel::load(saved.path(), &Device::Cpu).unwrap().ends(), [0, 7, 9, 11]);
}

/// As in `transformers`: the head is the embedding where the two are equal, and itself where they are not.
#[test]
fn two_matrices_that_are_to_be_one_stay_two() {
    let folder = model(Family::Llama);
    let logits = |folder: &Path| {
        let mut batch = Packed::new();
        batch.push(0, &[1, 2, 3]);
        let model = LanguageModel::load(folder, &Device::Cpu).unwrap();
        let hidden = model.hidden(&batch, None, None).unwrap();
        hidden.matmul(&model.head().unwrap().t().unwrap()).unwrap().to_vec2::<f32>().unwrap()
    };
    let untied = logits(folder.path());
    edit(folder.path(), "config.json", |json| json["tie_word_embeddings"] = json!(true));
    let scratch = tempfile::tempdir().unwrap();
    let (outputs, said) = download(folder.path(), scratch.path());
    outputs.unwrap();
    assert!(said.iter().any(|text| text.contains("they are taken as two matrices")), "{said:?}");
    assert_eq!(logits(&scratch.path().join("model")), untied);
    let saved = tempfile::tempdir().unwrap();
    LanguageModel::load(folder.path(), &Device::Cpu).unwrap().save(saved.path()).unwrap();
    let config: Json = serde_json::from_slice(&fs::read(saved.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], json!(false));
    assert_eq!(logits(saved.path()), untied);

    tensors(|t| {
        t.insert("lm_head.weight".into(), t["model.embed_tokens.weight"].clone());
    })(folder.path());
    let scratch = tempfile::tempdir().unwrap();
    assert!(download(folder.path(), scratch.path()).1.is_empty());
    assert_ne!(logits(folder.path()), untied);
    assert!(LanguageModel::load(folder.path(), &Device::Cpu).unwrap().config.sizes().tied);
}

#[test]
fn only_the_files_of_a_model_are_its_source() {
    let config = Download.resolve(&json!({"model": "m"}), Conventions::Sound).unwrap();
    let sources = Kind::sources(&Download, &config);
    let [source] = &sources[..] else { panic!("{sources:?}") };
    for file in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "mp4/pytorch_model_3.bin",
        "stories.bin",
        "model.safetensors.index.json",
        "tokenizer.json",
        "chat_template.jinja",
    ] {
        assert!(source.takes(file), "{file}");
    }
    for file in ["README.md", ".git/HEAD", "notes.txt", "tf_model.h5", "runs/events.out"] {
        assert!(!source.takes(file), "{file}");
    }
}

/// What PyTorch packed comes in as safetensors, with the same values in the same type.
#[test]
fn packed_weights_become_safetensors() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/checkpoint");
    let (folder, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for file in ["config.json", "pytorch_model.bin"] {
        fs::copy(fixtures.join(file), folder.path().join(file)).unwrap();
    }
    let vocabulary: Map<String, Json> = (0..11).map(|id| (format!("t{id}"), json!(id))).collect();
    let json = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}});
    TokenizerFile::new(json.to_string(), 10, 11).save(folder.path()).unwrap();
    download(folder.path(), scratch.path()).0.unwrap();
    let came = scratch.path().join("model");
    assert!(!came.join("pytorch_model.bin").exists());
    let values = |folder: &Path| {
        let model = LanguageModel::load(folder, &Device::Cpu).unwrap();
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        model.parameters().iter().map(|(name, tensor)| (name.clone(), flat(tensor))).collect::<Vec<_>>()
    };
    assert_eq!(values(&came), values(folder.path()));
}

/// Files that nobody should open: `make_hostile.py`.
#[test]
fn hostile_files_are_refused_where_they_come_in() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/checkpoint/hostile");
    let expected = [
        ("runs-code.bin", "asks Python for `posix.system`, which no tensor needs: nothing of it was run"),
        ("runs-code-in-torch.bin", "asks Python for `posix.system`"),
        ("bomb.bin", "entry `model/data/0` is compressed, to 63.7 KiB of 64.0 MiB"),
        ("before-1.6.bin", "of a version before 1.6: write it anew in Python"),
        ("not-a-state-dict.bin", "it holds no dictionary of tensors: save the model's `state_dict()`"),
        ("a-whole-training.bin", "and has `model`, `epoch`: save the model's `state_dict()` alone"),
        ("storage-of-another-size.bin", "tensor `w`: its storage is said to hold 255 numbers of F32, and has 32 bytes"),
        ("cut-off.bin", "its directory is missing"),
        ("counts.gguf", "is not a whole GGUF file"),
        ("header.safetensors", "is not a whole safetensors file"),
        ("overlap.safetensors", "is not a whole safetensors file"),
        ("sizes.llama2c", "is no whole model of llama2.c"),
    ];
    let there: Vec<String> = fs::read_dir(&fixtures)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !expected.iter().any(|(known, _)| known == name))
        .collect();
    assert!(there.is_empty(), "hostile files that nothing is expected of: {there:?}");
    for (file, expected) in expected {
        let folder = model(Family::Llama);
        fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let name = match file.rsplit_once('.').unwrap().1 {
            "bin" => "pytorch_model.bin",
            "gguf" => "model.gguf",
            "safetensors" => "model.safetensors",
            _ => {
                fs::remove_file(folder.path().join("config.json")).unwrap();
                "model.bin"
            }
        };
        fs::copy(fixtures.join(file), folder.path().join(name)).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let error = format!("{:#}", download(folder.path(), scratch.path()).0.err().expect(file));
        assert!(error.contains(expected) && error.contains(name), "{file}: {error}");
        assert!(error_of(&foresee(folder.path())).contains(expected), "{file}");
    }
}

/// The documented text of a model of llama2.c, from the file as it was published with its tokenizer beside it.
#[test]
fn a_model_of_llama2_c_tells_its_story() {
    let data = std::env::var_os("PIPELINE_TEST_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"), std::path::PathBuf::from);
    let published = data.join("weights/stories260K");
    if !published.exists() {
        println!("skipped: `{}` is not there; set PIPELINE_TEST_DATA", published.display());
        return;
    }
    let (folder, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::copy(published.join("stories260K.bin"), folder.path().join("stories260K.bin")).unwrap();
    fs::copy(published.join("tok512.model"), folder.path().join("tokenizer.model")).unwrap();
    let outlook = foresee(folder.path());
    assert!(outlook.findings.iter().all(|finding| !finding.is_error), "{:?}", outlook.findings);
    assert_eq!(outlook.outputs["model"].family.as_deref(), Some("llama"));
    download(folder.path(), scratch.path()).0.unwrap();
    let model = LanguageModel::load(&scratch.path().join("model"), &Device::Cpu).unwrap();
    let options = Generate {
        sampling: Sampling::greedy(),
        max_new_tokens: 200,
        longest: usize::MAX,
        seed: 0,
        purpose: purpose::GENERATE,
        time: 0,
        batch: 1,
    };
    let written = generate(&model, None, &[Prompt { row: 0, ids: &[1] }], &options, &mut |_| {}).unwrap();
    let text = Text::new(&model.tokenizer, SpecialTokens::Text).unwrap().decode(&written[0].ids).unwrap();
    let expected = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she \
                    saw a big, red ball. She wanted to play with it, but it was too high.";
    assert!(text.trim_start().starts_with(expected), "{text}");
}
