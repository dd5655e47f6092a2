//! `export`: results as the files that other programs read.
//!
//! ```yaml
//! release:
//!   kind: export
//!   in: {model: train.student, prompt: train.prompt, test: data.test}
//!   with: {dtype: bf16}
//! ```
//!
//! Inputs, at least one: `model`, `prompt`, `adapter`, `tokenizer`, and datasets `train`, `valid`, `test`. Output: `dir`,
//! with a folder of that name for each of the first four (Hugging Face and PEFT layouts) and one folder `data` for the
//! datasets: token files `test_0.bin` and `test_0.idx` as the distillation papers' programs read them, their texts as
//! `test.jsonl`, and the tokenizer. Cost: copying; of a model a tensor at a time is in memory.
//!
//! A model is a Hugging Face folder, its weights in one file or, with `shard`, in several. With `tensor_parallel: 4` its weights
//! are the parts of four ranks, `mp4/pytorch_model_0.bin` and so on. With `gguf: q8_0` it is one file `model.gguf` with tokenizer
//! and chat template, for llama.cpp.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use contract::{
    About, AnyValue, Cause, ConfigError, Dataset, Env, Folder, Inputs, Operator, Outlook, Outputs, PortType, Ports,
    Sink, Stage, Step, TokenizerFile,
};
use lm::{ADAPTER, Format, ModelFolder, families_in_llama_cpp, is_in_llama_cpp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::gguf::tokenizer_metadata;
use crate::mmidx;
use crate::text::{SpecialTokens, Text};

/// The stage kind.
pub struct Export;

/// Its `with`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Precision of the model's weights; as they are (f32 where they were trained, or are quantised) unless given.
    #[serde(default)]
    pub dtype: Option<Precision>,
    /// Most bytes of a file of weights, as `2GB` or `500MiB`; one file unless given.
    #[serde(default)]
    pub shard: Option<String>,
    /// So many ranks of a tensor-parallel program share the weights.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1024))]
    pub tensor_parallel: Option<usize>,
    /// A GGUF file instead, with matrices in this format: those whose rows its blocks do not fill are in the next larger one,
    /// and vectors in f32.
    #[serde(default)]
    pub gguf: Option<Format>,
}

impl Config {
    fn shard(&self) -> Option<u64> {
        self.shard.as_deref().and_then(bytes)
    }
}

/// A number of bytes as people write it: `2GB` is 2,000,000,000, and `2GiB` is 2,147,483,648.
fn bytes(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 7] = [
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
    ];
    let text = text.trim().to_uppercase();
    let (number, unit) = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))?;
    let number: u64 = number.trim_end().parse().ok()?;
    number.checked_mul(unit).filter(|bytes| *bytes > 0)
}

/// A floating-point format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits with the range of f32 and 8 bits of precision.
    Bf16,
    /// 16 bits with 11 bits of precision, up to 65504.
    F16,
}

impl Precision {
    /// Name in a model's `config.json`.
    fn torch_name(self) -> &'static str {
        match self {
            Precision::F32 => "float32",
            Precision::Bf16 => "bfloat16",
            Precision::F16 => "float16",
        }
    }

    fn format(self) -> Format {
        match self {
            Precision::F32 => Format::F32,
            Precision::Bf16 => Format::BF16,
            Precision::F16 => Format::F16,
        }
    }
}

const FOLDERS: [(&str, PortType, &str); 4] = [
    ("model", PortType::Model, "becomes a Hugging Face model folder"),
    ("prompt", PortType::SoftPrompt, "becomes a PEFT prompt-tuning folder"),
    ("adapter", PortType::Adapter, "becomes a PEFT adapter folder"),
    ("tokenizer", PortType::Tokenizer, "becomes a tokenizer folder"),
];

const DATASETS: [&str; 3] = ["train", "valid", "test"];

impl Stage for Export {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "export",
            version: 2,
            numerics: None,
            summary: "writes models, soft prompts and datasets as the files that other programs read",
            example: "release:\n  kind: export\n  in: {model: train.student}\n  with: {dtype: bf16}\n",
            reads_clock: false,
        }
    }

    fn ports(&self, _config: &Config) -> Ports {
        let ports =
            FOLDERS.iter().fold(Ports::new(), |ports, (name, port_type, doc)| ports.optional(name, *port_type, doc));
        let ports = DATASETS.iter().fold(ports, |ports, name| {
            ports.optional(name, PortType::Dataset, "becomes token files with their texts, in `data`")
        });
        ports.output("dir", PortType::Dir, "a folder for each kind of input")
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let Config { dtype, shard, tensor_parallel, gguf } = config;
        let mut errors = Vec::new();
        if let Some(text) = shard.as_deref().filter(|text| bytes(text).is_none()) {
            errors.push(
                ConfigError::at("shard", format!("`{text}` is no number of bytes"))
                    .hint("write it as `2GB` or `500MiB`"),
            );
        }
        let with_gguf =
            [("dtype", dtype.is_some()), ("shard", shard.is_some()), ("tensor_parallel", tensor_parallel.is_some())];
        for (field, _) in with_gguf.iter().filter(|(_, given)| *given && gguf.is_some()) {
            errors.push(ConfigError::at(field, "a GGUF file has no use for it").hint("leave it out, or `gguf`"));
        }
        if gguf.is_none() && shard.is_some() && tensor_parallel.is_some() {
            errors.push(ConfigError::at("shard", "every rank has one file").hint("leave it out, or `tensor_parallel`"));
        }
        errors
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        outlook.same_vocabulary(&DATASETS);
        if config.gguf.is_some()
            && let Some(family) = outlook.input("model").family
            && !is_in_llama_cpp(&family)
        {
            outlook.error(
                [Cause::Field("gguf".into()), Cause::Input("model".into(), "init.architecture".into())],
                format!("llama.cpp computes no model of type `{family}`"),
                format!("it computes {}: leave `gguf` out for others", families_in_llama_cpp()),
            );
        }
        if config.gguf.is_some()
            && let Some(tokenizer) = outlook.input("model").vocabulary.and_then(|vocabulary| vocabulary.file)
            && let Err(error) = tokenizer_metadata(&tokenizer, 0, &[])
        {
            let causes = [Cause::Field("gguf".into()), Cause::Input("model".into(), "model".into())];
            outlook.error(causes, format!("{error:#}"), "leave `gguf` out for a model with this tokenizer");
        }
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Run { config, folder: env.scratch.join("export") }))
    }
}

struct Run {
    config: Config,
    folder: PathBuf,
}

impl Operator for Run {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, _sink: &mut dyn Sink) -> Result<Outputs> {
        let names = FOLDERS.iter().map(|(name, ..)| name).chain(&DATASETS);
        ensure!(
            names.clone().any(|name| inputs.has(name)),
            "nothing to export; connect {}",
            names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        );
        for (name, ..) in FOLDERS {
            if let Some(value) = inputs.get(name) {
                value.save(&make(&self.folder.join(name))?)?;
            }
        }
        if inputs.has("model") {
            convert_model(&self.folder.join("model"), &self.config)?;
        }
        for name in DATASETS {
            if let Some(dataset) = inputs.take_optional::<Dataset>(name)? {
                write_dataset(&dataset, name, &make(&self.folder.join("data"))?)?;
            }
        }
        Ok(Outputs::new().with("dir", Folder::new(PortType::Dir, &self.folder)))
    }
}

fn make(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
    Ok(folder.to_owned())
}

/// Writes `NAME_0.bin`, `NAME_0.idx`, `NAME.jsonl` and the tokenizer. A line has `prompt` and `output`: the right answers
/// where they are known, else the response.
fn write_dataset(dataset: &Dataset, name: &str, folder: &Path) -> Result<()> {
    mmidx::write(&folder.join(name), &dataset.rows, dataset.tokenizer.size)?;
    dataset.tokenizer.save(folder)?;
    let text = Text::new(&dataset.tokenizer, SpecialTokens::Text)?;
    let mut lines = Vec::new();
    for row in &dataset.rows {
        let output = match row.references.as_slice() {
            [] => json!(text.decode(row.answer())?.trim()),
            [only] => json!(only),
            several => json!(several),
        };
        serde_json::to_writer(&mut lines, &json!({"prompt": text.decode(&row.prompt)?, "output": output}))?;
        lines.push(b'\n');
    }
    contract::value::write(&folder.join(format!("{name}.jsonl")), &lines)
}

/// Rewrites the weights of a model folder as they are asked for, and says so in its configuration.
fn convert_model(folder: &Path, config: &Config) -> Result<()> {
    let mut model = ModelFolder::open(folder)?;
    let is_asked_for =
        config.dtype.is_some() || config.shard.is_some() || config.tensor_parallel.is_some() || config.gguf.is_some();
    if !is_asked_for && model.is_plain() {
        return Ok(());
    }
    // Beside it: what is read is replaced when all of it has been read.
    let written = make(&folder.with_file_name("model.new"))?;
    let format = config.dtype.map(Precision::format);
    if let Some(format) = config.gguf {
        ensure!(
            !folder.join(ADAPTER).exists(),
            "the model has an adapter, which has no place in a GGUF file: make one model of the two first (kind `merge`)"
        );
        let tokenizer = TokenizerFile::load(folder)?;
        let metadata = tokenizer_metadata(&tokenizer, model.config.vocab_size(), &model.ends(&tokenizer))
            .context("its tokenizer has no place in a GGUF file")?;
        model.write_gguf(&written.join("model.gguf"), format, metadata)?;
    } else if let Some(ranks) = config.tensor_parallel {
        model.write_tensor_parallel(&written, format, ranks)?;
    } else {
        model.write_safetensors(&written, format, config.shard())?;
    }
    let head_is_its_own = !model.config.sizes().tied;
    drop(model);
    for path in entries(folder)? {
        let ending = path.extension().and_then(|ending| ending.to_str());
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_of_ranks = name.strip_prefix("mp").is_some_and(|ranks| ranks.parse::<usize>().is_ok());
        let is_weights = matches!(ending, Some("safetensors" | "gguf" | "bin")) || name.ends_with(".index.json");
        // Of a GGUF file nothing stays beside it.
        if config.gguf.is_some() || is_weights || is_of_ranks {
            remove(&path)?;
        }
    }
    for path in entries(&written)? {
        let name = path.file_name().context("a file without a name")?;
        fs::rename(&path, folder.join(name)).with_context(|| format!("cannot move `{}`", path.display()))?;
    }
    remove(&written)?;
    if config.gguf.is_some() { Ok(()) } else { describe(folder, config.dtype, head_is_its_own) }
}

/// What is in a folder.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))?;
    entries
        .map(|entry| Ok(entry.with_context(|| format!("cannot read folder `{}`", folder.display()))?.path()))
        .collect()
}

fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.with_context(|| format!("cannot remove `{}`", path.display()))
}

/// Says in `config.json` what the weights have become.
fn describe(folder: &Path, precision: Option<Precision>, head_is_its_own: bool) -> Result<()> {
    let path = folder.join("config.json");
    let text = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut config: Json =
        serde_json::from_slice(&text).with_context(|| format!("`{}` is not JSON", path.display()))?;
    let config_object = config.as_object_mut().with_context(|| format!("`{}` is not a JSON object", path.display()))?;
    if let Some(precision) = precision {
        // Newer releases of `transformers` write `dtype`, and read either.
        let key = if config_object.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config_object.insert(key.to_owned(), precision.torch_name().into());
    }
    if head_is_its_own {
        config_object.insert("tie_word_embeddings".to_owned(), false.into());
    }
    contract::value::write(&path, format!("{config:#}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;
    use contract::outlook::Machine;
    use contract::{End, Facts, Row, Value};
    use lm::{Architecture, LanguageModel, Packed};

    use super::*;
    use crate::testing::{Scratch, folder, input};
    use crate::text::{SpecialTokens, Text};

    const FAMILIES: [&str; 7] = ["gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"];

    fn model(family: &str) -> LanguageModel {
        let (kv_heads, tied) = (["llama", "mistral", "qwen2", "qwen3"].contains(&family).then_some(4), family != "opt");
        let architecture =
            json!({"architecture": family, "layers": 2, "width": 64, "heads": 4, "kv_heads": kv_heads, "tied": tied});
        let mut architecture = architecture;
        if kv_heads.is_none() {
            architecture.as_object_mut().unwrap().remove("kv_heads");
        }
        let architecture: Architecture = serde_json::from_value(architecture).unwrap();
        let tokenizer = crate::train_tokenizer::from_merges(&["h e", "l l", "he ll", "Ġ w"]);
        // Of a size that ranks share.
        let tokenizer = TokenizerFile { size: 264, ..tokenizer };
        LanguageModel::init(&architecture, tokenizer, 7, &Device::Cpu).unwrap()
    }

    fn export(scratch: &Scratch, model: AnyValue, with: Json) -> Result<PathBuf> {
        scratch.run(&Export, with, vec![("model", model)]).map(|(outputs, _)| folder(&outputs, "dir").join("model"))
    }

    fn logits(model: &LanguageModel) -> Vec<f32> {
        let mut batch = Packed::new();
        batch.push(0, &[3, 200, 17, 80, 9]);
        let hidden = model.hidden(&batch, None, None).unwrap();
        hidden.matmul(&model.head().unwrap().t().unwrap()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn opened(folder: &Path) -> LanguageModel {
        LanguageModel::load(folder, &Device::Cpu).unwrap()
    }

    #[test]
    fn every_precision_and_shard_opens_as_the_same_model() {
        for family in FAMILIES {
            let (scratch, model) = (Scratch::new(), Arc::new(model(family)));
            let expected = logits(&model);
            let export = |with| export(&scratch, model.clone(), with).unwrap();
            assert!(logits(&opened(&export(json!({})))) == expected, "{family}");
            let sharded = export(json!({"dtype": "f32", "shard": "70kB"}));
            let names: Vec<String> = entries(&sharded)
                .unwrap()
                .iter()
                .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
                .filter(|name| name.ends_with(".safetensors"))
                .collect();
            let count = names.len();
            assert!(
                count > 2 && names.contains(&format!("model-00001-of-{count:05}.safetensors")),
                "{family}: {names:?}"
            );
            let index: Json =
                serde_json::from_slice(&fs::read(sharded.join("model.safetensors.index.json")).unwrap()).unwrap();
            let numbers = model.config.parameter_count();
            assert_eq!(index["metadata"], json!({"total_parameters": numbers, "total_size": 4 * numbers}));
            assert!(logits(&opened(&sharded)) == expected, "{family}");
            for (dtype, torch, precision) in [("bf16", "bfloat16", 2e-2), ("f16", "float16", 2e-3)] {
                let half = export(json!({"dtype": dtype}));
                let config: Json = serde_json::from_slice(&fs::read(half.join("config.json")).unwrap()).unwrap();
                assert_eq!(config["torch_dtype"], torch);
                let largest = expected.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
                let gap = logits(&opened(&half)).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(gap > 0.0 && gap < precision * largest, "{family}, {dtype}: {gap} of {largest}");
            }
        }
    }

    #[test]
    fn ranks_of_any_number_hold_the_same_model() {
        for family in FAMILIES {
            let (scratch, model) = (Scratch::new(), Arc::new(model(family)));
            let expected = logits(&model);
            let mut value: AnyValue = model.clone();
            for (step, ranks) in [1, 4, 2, 1].into_iter().enumerate() {
                let parts = export(&scratch, value, json!({"tensor_parallel": ranks})).unwrap();
                assert!(parts.join(format!("mp{ranks}/pytorch_model_{}.bin", ranks - 1)).is_file());
                assert!(!parts.join("model.safetensors").exists());
                assert!(logits(&opened(&parts)) == expected, "{family}, {ranks} ranks");
                // As `download` brings it in: whole again.
                let whole = scratch.path().join(format!("whole{step}"));
                fs::create_dir(&whole).unwrap();
                let folder = ModelFolder::open(&parts).unwrap();
                assert_eq!(folder.check_values().unwrap(), Vec::<String>::new());
                folder.copy(&whole).unwrap();
                TokenizerFile::load(&parts).unwrap().save(&whole).unwrap();
                assert!(logits(&opened(&whole)) == expected, "{family}, {ranks} ranks");
                value = input(PortType::Model, &parts);
            }
            let error = format!("{:#}", export(&scratch, model, json!({"tensor_parallel": 8})).err().unwrap());
            assert!(
                error.contains("which 8 ranks do not share evenly") && error.contains("4 heads"),
                "{family}: {error}"
            );
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_named() {
        let (scratch, model) = (Scratch::new(), Arc::new(model("llama")));
        let parts = export(&scratch, model.clone(), json!({"tensor_parallel": 2})).unwrap();
        let error = || format!("{:#}", ModelFolder::open(&parts).err().unwrap());
        let path = |rank: usize| parts.join(format!("mp2/pytorch_model_{rank}.bin"));
        let second = fs::read(path(1)).unwrap();
        fs::remove_file(path(1)).unwrap();
        assert!(error().contains("has no `mp2/pytorch_model_1.bin`: get the parts of all 2 ranks"));
        let other =
            export(&scratch, Arc::new(self::model("llama").cut_to(&[1]).unwrap()), json!({"tensor_parallel": 2}))
                .unwrap();
        fs::copy(other.join("mp2/pytorch_model_1.bin"), path(1)).unwrap();
        assert!(error().contains("is missing in") && error().contains("pytorch_model_1.bin"), "{}", error());
        fs::write(path(1), &second).unwrap();
        fs::create_dir(parts.join("mp4")).unwrap();
        assert!(error().contains("`mp2` and `mp4`: keep one"));
        fs::remove_dir(parts.join("mp4")).unwrap();
        // A norm, which every rank has whole, of another moment.
        let norm = 1.0_f32.to_le_bytes().repeat(64);
        let place = second.windows(norm.len()).rposition(|window| window == norm).unwrap();
        let mut changed = second;
        changed[place..place + 4].copy_from_slice(&2.0_f32.to_le_bytes());
        fs::write(path(1), changed).unwrap();
        let error = format!("{:#}", ModelFolder::open(&parts).unwrap().check_values().unwrap_err());
        assert!(error.contains("is not that of the first rank"), "{error}");
        let error = format!("{:#}", export(&scratch, model, json!({"tensor_parallel": 3})).err().unwrap());
        assert!(
            error.contains("tensor `model.layers.0.self_attn.q_proj.weight` has 4 heads, which 3 ranks"),
            "{error}"
        );
    }

    #[test]
    fn gguf_files_hold_model_and_tokenizer() {
        for family in ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"] {
            let (scratch, model) = (Scratch::new(), Arc::new(model(family)));
            let expected = logits(&model);
            let largest = expected.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
            for (format, precision) in [("f32", 0.0), ("f16", 1e-3), ("q8_0", 2e-2), ("q4_0", 0.3), ("q6_k", 2e-2)] {
                let folder = export(&scratch, model.clone(), json!({"gguf": format})).unwrap();
                assert_eq!(entries(&folder).unwrap(), [folder.join("model.gguf")]);
                let read = opened(&folder);
                let gap = logits(&read).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(gap <= precision * largest, "{family}, {format}: {gap} of {largest}");
                let tokenizer = crate::gguf::open_any_tokenizer(&folder, None).unwrap().tokenizer;
                let [one, other] = [&tokenizer, &model.tokenizer].map(|tokenizer| {
                    Text::new(tokenizer, SpecialTokens::Text).unwrap().encode("hello world, hell").unwrap()
                });
                assert_eq!((one, tokenizer.end), (other, model.tokenizer.end), "{family}");
            }
        }
    }

    #[test]
    fn tokenizers_of_every_make_survive_the_way_through_gguf() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf");
        let texts: Json = serde_json::from_slice(&fs::read(folder.join("ids.json")).unwrap()).unwrap();
        for name in ["smollm", "llama-bpe", "qwen2", "llama"] {
            let scratch = Scratch::new();
            let open = |path: &Path| crate::gguf::open_any_tokenizer(path, None).unwrap().tokenizer;
            let tokenizer = open(&folder.join(format!("{name}.gguf")));
            let architecture =
                serde_json::from_value(json!({"architecture": "llama", "layers": 1, "width": 32})).unwrap();
            let model = LanguageModel::init(&architecture, tokenizer.clone(), 1, &Device::Cpu).unwrap();
            let exported = export(&scratch, Arc::new(model), json!({"gguf": "f16"})).unwrap();
            let again = open(&exported);
            let roles = |tokenizer: &TokenizerFile| {
                let TokenizerFile { begin, end, pad, unk, size, .. } = *tokenizer;
                (begin, end, pad, unk, size, tokenizer.prefix.clone(), tokenizer.suffix.clone())
            };
            assert_eq!(roles(&again), roles(&tokenizer), "{name}");
            let text = Text::new(&again, SpecialTokens::Parse).unwrap();
            for (sample, ids) in texts["texts"].as_array().unwrap().iter().zip(texts[name].as_array().unwrap()) {
                assert_eq!(json!(text.encode(sample.as_str().unwrap()).unwrap()), *ids, "{name}: {sample}");
            }
            let template = |tokenizer: &TokenizerFile| crate::chat::template_in(tokenizer).unwrap();
            assert_eq!(template(&again), template(&tokenizer), "{name}");
        }
    }

    #[test]
    fn tokenizers_that_llama_cpp_cannot_follow_are_refused() {
        let plain = crate::train_tokenizer::from_merges(&["h e"]);
        let with = |change: &dyn Fn(&mut Json)| {
            let mut json: Json = serde_json::from_slice(&plain.json).unwrap();
            change(&mut json);
            let tokenizer = TokenizerFile { json: Arc::new(json.to_string().into_bytes()), ..plain.clone() };
            format!("{:#}", tokenizer_metadata(&tokenizer, 300, &[0]).unwrap_err())
        };
        let split = json!({"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let sequence = json!({"type": "Sequence", "pretokenizers": [split, bytes]});
        for (error, expected) in [
            (with(&|json| json["model"]["type"] = json!("Unigram")), "of type \"Unigram\""),
            (with(&|json| json["pre_tokenizer"] = sequence.clone()), "no rule that divides text into words as"),
            (with(&|json| json["pre_tokenizer"]["add_prefix_space"] = json!(true)), "puts a space before a text"),
            (with(&|json| json["normalizer"] = json!({"type": "Lowercase"})), "changes text before it divides it"),
            (with(&|json| json["pre_tokenizer"] = Json::Null), "neither one of bytes nor of SentencePiece's"),
        ] {
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let prefixed = TokenizerFile { prefix: vec![5, 6], ..plain };
        assert!(
            tokenizer_metadata(&prefixed, 300, &[0])
                .unwrap_err()
                .to_string()
                .contains("puts the ids [5, 6] before a text")
        );
        assert!(
            tokenizer_metadata(&TokenizerFile::new("", 0, 9), 9, &[0])
                .unwrap_err()
                .to_string()
                .contains("no tokenizer")
        );
    }

    #[test]
    fn what_llama_cpp_does_not_compute_is_refused() {
        let scratch = Scratch::new();
        let error = export(&scratch, Arc::new(model("opt")), json!({"gguf": "f16"})).err().unwrap();
        let expected = "llama.cpp computes no model of type `opt`: expected one of `gpt2`, `gpt_neox`, `llama`";
        assert!(format!("{error:#}").contains(expected), "{error:#}");
        let facts = Facts { family: Some("opt".into()), ..Facts::default() };
        let mut outlook = Outlook::new(Machine::default(), [("model".to_owned(), facts)].into(), None);
        let config: Config = serde_json::from_value(json!({"gguf": "q8_0"})).unwrap();
        Export.foresee(&config, &mut outlook);
        assert_eq!(outlook.findings[0].message, "llama.cpp computes no model of type `opt`");
    }

    #[test]
    fn an_adapter_is_not_lost_on_the_way_to_gguf() {
        let scratch = Scratch::new();
        let lora = serde_json::from_value(json!({"rank": 2})).unwrap();
        let adapted = model("llama").with_new_adapter(&lora, 3).unwrap();
        let merged = Arc::new(adapted.merged().unwrap());
        let error = export(&scratch, Arc::new(adapted), json!({"gguf": "f16"})).err().unwrap();
        assert!(format!("{error:#}").contains("the model has an adapter"), "{error:#}");
        export(&Scratch::new(), merged, json!({"gguf": "f16"})).unwrap();
    }

    #[test]
    fn what_is_quantised_leaves_as_it_is_or_as_f32() {
        let scratch = Scratch::new();
        let small = Arc::new(model("llama").quantised(Format::Q4_0).unwrap());
        let expected = logits(&small);
        let gguf = export(&scratch, small.clone(), json!({"gguf": "q4_0"})).unwrap();
        assert!(logits(&opened(&gguf)) == expected);
        let plain = export(&scratch, small, json!({})).unwrap();
        assert!(opened(&plain).parameters().len() == opened(&plain).config.parameter_shapes().len());
        assert!(logits(&opened(&plain)) == expected);
        // A file of llama.cpp comes in and goes out in the terms of Hugging Face.
        let scratch = Scratch::new();
        let back = export(&scratch, input(PortType::Model, &with_tokenizer(&gguf)), json!({"dtype": "f32"})).unwrap();
        assert!(back.join("config.json").is_file() && !back.join("model.gguf").exists());
        assert!(logits(&opened(&back)) == expected);
    }

    /// The folder as `download` leaves it.
    fn with_tokenizer(gguf: &Path) -> PathBuf {
        let whole = make(&gguf.with_file_name("whole")).unwrap();
        ModelFolder::open(gguf).unwrap().copy(&whole).unwrap();
        crate::gguf::open_any_tokenizer(gguf, None).unwrap().tokenizer.save(&whole).unwrap();
        whole
    }

    #[test]
    fn options_that_do_not_go_together_are_errors() {
        let errors = |with: Json| {
            let errors = Export.validate(&serde_json::from_value(with).unwrap());
            errors.iter().map(|error| error.path.join(".")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(errors(json!({"shard": "2 things"})), "shard");
        assert_eq!(
            errors(json!({"gguf": "q4_0", "dtype": "f16", "shard": "2GB", "tensor_parallel": 2})),
            "dtype shard tensor_parallel"
        );
        assert_eq!(errors(json!({"shard": "2GB", "tensor_parallel": 2})), "shard");
        assert_eq!(
            (bytes("2GB"), bytes("5 MiB"), bytes("7b"), bytes("0KB")),
            (Some(2_000_000_000), Some(5 << 20), Some(7), None)
        );
    }

    #[test]
    fn numbers_beyond_the_range_of_a_type_are_errors() {
        let (scratch, model) = (Scratch::new(), model("llama"));
        let saved = make(&scratch.path().join("saved")).unwrap();
        model.save(&saved).unwrap();
        let path = saved.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&3e38_f32.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let export = |with| export(&scratch, input(PortType::Model, &saved), with);
        let error = format!("{:#}", export(json!({"dtype": "f16"})).err().unwrap());
        assert!(
            error.contains("tensor `model.")
                && error.contains("cannot be written in F16, which holds numbers up to 65504"),
            "{error}"
        );
        export(json!({"dtype": "bf16"})).unwrap();
    }

    #[test]
    fn datasets_become_token_files_that_read_back() {
        let scratch = Scratch::new();
        let tokenizer = crate::train_tokenizer::from_merges(&[]);
        let text = Text::new(&tokenizer, SpecialTokens::Text).unwrap();
        let row = |id, references: &[&str]| Row {
            id,
            prompt: text.encode("Q:").unwrap(),
            response: [text.encode(" yes").unwrap(), vec![0]].concat(),
            end: End::Stop,
            log_probs: None,
            references: references.iter().map(|r| r.to_string()).collect(),
            family: None,
        };
        let rows = vec![row(0, &[]), row(1, &["yes"]), row(2, &["yes", "yea"])];
        let dataset: AnyValue = std::sync::Arc::new(Dataset { rows, tokenizer });
        let (outputs, _) = scratch.run(&Export, json!({}), vec![("test", dataset)]).unwrap();
        let data = folder(&outputs, "dir").join("data");
        let lines = fs::read_to_string(data.join("test.jsonl")).unwrap();
        let outputs = lines.lines().map(|line| serde_json::from_str::<Json>(line).unwrap()["output"].clone());
        assert_eq!(outputs.collect::<Vec<_>>(), [json!("yes"), json!("yes"), json!(["yes", "yea"])]);
        let with = json!({"bin": data, "tokenizer": data});
        let (outputs, _) = scratch.run(&crate::download::Download, with, vec![]).unwrap();
        let back = crate::testing::output::<Dataset>(&outputs, "test");
        assert_eq!((back.rows.len(), back.rows[0].end), (3, End::Stop));
        assert_eq!(back.rows[2].references, ["yes", "yea"]);
        assert_eq!(text.decode(&back.rows[0].response).unwrap(), " yes");
    }

    #[test]
    fn nothing_connected_is_an_error() {
        let error = Scratch::new().run(&Export, json!({}), vec![]).err().unwrap().to_string();
        assert!(error.starts_with("nothing to export; connect `model`, `prompt`"), "{error}");
    }
}
