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
//! `test.jsonl`, and the tokenizer. Cost: copying; a model is once in memory.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use contract::{
    About, AnyValue, Dataset, Env, Folder, Inputs, Operator, Outlook, Outputs, PortType, Ports, Sink, Stage, Step,
};
use half::{bf16, f16};
use safetensors::tensor::{TensorView, View};
use safetensors::{Dtype, SafeTensors};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::mmidx;
use crate::text::{SpecialTokens, Text};

/// The stage kind.
pub struct Export;

/// Its `with`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Precision of the model's weights; as they are trained (f32) unless given.
    #[serde(default)]
    pub dtype: Option<Precision>,
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

    fn dtype(self) -> Dtype {
        match self {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::BF16,
            Precision::F16 => Dtype::F16,
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
            version: 1,
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

    fn foresee(&self, _config: &Config, outlook: &mut Outlook) {
        outlook.same_vocabulary(&DATASETS);
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
        if let (Some(precision), true) = (self.config.dtype, inputs.has("model")) {
            convert_model(&self.folder.join("model"), precision)?;
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

/// Rewrites the weights of a model folder in another precision, and says so in its configuration.
fn convert_model(folder: &Path, precision: Precision) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read folder `{}`", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
            let converted = convert(&bytes, precision);
            contract::value::write(&path, &converted.with_context(|| format!("cannot convert `{}`", path.display()))?)?;
        }
    }
    let path = folder.join("config.json");
    let text = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut config: Json =
        serde_json::from_slice(&text).with_context(|| format!("`{}` is not JSON", path.display()))?;
    let config_object = config.as_object_mut().with_context(|| format!("`{}` is not a JSON object", path.display()))?;
    // Newer releases of `transformers` write `dtype`, and read either.
    let key = if config_object.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config_object.insert(key.to_owned(), precision.torch_name().into());
    contract::value::write(&path, format!("{config:#}\n").as_bytes())
}

/// A tensor as it will be written.
struct Converted<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl View for Converted<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// The same tensors with every floating-point one in `precision`, rounded to nearest, ties to even.
fn convert(bytes: &[u8], precision: Precision) -> Result<Vec<u8>> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let mut converted = Vec::new();
    for (name, tensor) in tensors.iter() {
        let shape = tensor.shape().to_vec();
        let tensor = match floats(&tensor) {
            Some(values) if tensor.dtype() != precision.dtype() => {
                let data = narrow(&values, precision).with_context(|| format!("tensor `{name}`"))?;
                Converted { dtype: precision.dtype(), shape, data: Cow::Owned(data) }
            }
            _ => Converted { dtype: tensor.dtype(), shape, data: Cow::Borrowed(tensor.data()) },
        };
        converted.push((name, tensor));
    }
    // The one entry that loaders ask for; more would be written in the order of a hash map.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(safetensors::serialize(converted, Some(metadata))?)
}

/// The values of a floating-point tensor; `None` for others.
fn floats(tensor: &TensorView<'_>) -> Option<Vec<f32>> {
    let data = tensor.data();
    let halves = || data.chunks_exact(2).map(|b| [b[0], b[1]]);
    match tensor.dtype() {
        Dtype::F32 => Some(data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::BF16 => Some(halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
        Dtype::F16 => Some(halves().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
        _ => None,
    }
}

fn narrow(values: &[f32], precision: Precision) -> Result<Vec<u8>> {
    Ok(match precision {
        Precision::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Precision::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Precision::F16 => {
            let lost = values.iter().find(|x| x.is_finite() && f16::from_f32(**x).is_infinite());
            ensure!(lost.is_none(), "{} is beyond the range of f16; use `bf16`", lost.copied().unwrap_or_default());
            values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
        }
    })
}

#[cfg(test)]
mod tests {
    use contract::{End, Row};

    use super::*;
    use crate::testing::{Scratch, folder, input};

    fn weights(values: &[f32]) -> Vec<u8> {
        let floats: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let views = [
            ("w", TensorView::new(Dtype::F32, vec![values.len()], &floats).unwrap()),
            ("n", TensorView::new(Dtype::I64, vec![1], &[7, 0, 0, 0, 0, 0, 0, 0]).unwrap()),
        ];
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    #[test]
    fn a_model_keeps_its_files_and_takes_the_precision_asked() {
        let scratch = Scratch::new();
        let whole = weights(&[1.0, -0.1, 3e38]);
        scratch.file("m/model.safetensors", &whole);
        scratch.file("m/config.json", "{\"model_type\": \"gpt2\", \"torch_dtype\": \"float32\"}");
        scratch.file("m/tokenizer.json", "{}");
        let export = |with| {
            let model = input(PortType::Model, &scratch.path().join("m"));
            scratch.run(&Export, with, vec![("model", model)]).map(|(outputs, _)| folder(&outputs, "dir").join("model"))
        };
        assert_eq!(fs::read(export(json!({})).unwrap().join("model.safetensors")).unwrap(), whole);
        assert_eq!(fs::read(export(json!({"dtype": "f32"})).unwrap().join("model.safetensors")).unwrap(), whole);
        let half = export(json!({"dtype": "bf16"})).unwrap();
        let bytes = fs::read(half.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let values = floats(&tensors.tensor("w").unwrap()).unwrap();
        assert_eq!(tensors.tensor("w").unwrap().dtype(), Dtype::BF16);
        // -0.1 is 0xbdcccccd: rounded to its upper half, 0xbdcd.
        assert_eq!((values[0], values[1].to_bits()), (1.0, 0xbdcd_0000));
        assert_eq!(tensors.tensor("n").unwrap().data()[0], 7);
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        let config: Json = serde_json::from_slice(&fs::read(half.join("config.json")).unwrap()).unwrap();
        assert_eq!(config, json!({"model_type": "gpt2", "torch_dtype": "bfloat16"}));
        assert!(half.join("tokenizer.json").is_file());
        let error = format!("{:#}", export(json!({"dtype": "f16"})).err().unwrap());
        assert!(error.contains("tensor `w`") && error.contains("beyond the range of f16"), "{error}");
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
