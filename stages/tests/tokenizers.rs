//! Tokenizer folders of many makers against `AutoTokenizer`. What it says is in `fixtures/tokenizers.json`, which
//! `fixtures/make_tokenizers.py` wrote.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use contract::{TokenizerFile, Value};
use lm::LanguageModel;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use stages::tokenizer::open_tokenizer;
use tokenizers::Tokenizer;

#[derive(Deserialize)]
struct Fixture {
    pieces: Vec<String>,
    bases: BTreeMap<String, Json>,
    folders: Vec<Expected>,
    real: Vec<Expected>,
}

/// A folder, and what `AutoTokenizer` makes of it.
#[derive(Deserialize)]
struct Expected {
    name: String,
    #[serde(default)]
    files: BTreeMap<String, Json>,
    size: u32,
    roles: BTreeMap<String, Option<u32>>,
    first: Vec<Vec<u32>>,
    digests: Vec<String>,
    answers: Vec<String>,
}

impl Fixture {
    fn read() -> Self {
        serde_json::from_str(include_str!("fixtures/tokenizers.json")).unwrap()
    }

    /// The text that the script draws for `index`.
    fn text(&self, index: u64) -> String {
        let mut state = index;
        let mut draw = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        (0..draw(13)).map(|_| self.pieces[draw(self.pieces.len())].as_str()).collect()
    }

    fn write(&self, expected: &Expected) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in &expected.files {
            fs::write(folder.path().join(name), self.content(content)).unwrap();
        }
        folder
    }

    fn content(&self, content: &Json) -> String {
        let base = |key: &str| content[key].as_str().map(|name| &self.bases[name]);
        if let Some(base) = base("vocabulary") {
            return base["model"]["vocab"].to_string();
        }
        if let Some(base) = base("merges") {
            let merges = base["model"]["merges"].as_array().unwrap();
            let line = |pair: &Json| format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
            return format!("#version: 0.2\n{}", merges.iter().map(line).collect::<String>());
        }
        let Some(mut json) = base("base").cloned() else { return content.to_string() };
        for (path, value) in content["set"].as_object().unwrap() {
            *json.pointer_mut(&format!("/{path}")).unwrap_or_else(|| panic!("no {path}")) = value.clone();
        }
        json.to_string()
    }
}

fn digest(rows: &[Vec<u32>]) -> String {
    let numbers = rows.iter().flat_map(|row| [row.len() as u32].into_iter().chain(row.iter().copied()));
    let hash = numbers
        .flat_map(u32::to_le_bytes)
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

/// What differs from `AutoTokenizer`, in words.
fn differences(fixture: &Fixture, expected: &Expected, file: &TokenizerFile) -> Vec<String> {
    let mut found = Vec::new();
    let roles = [("bos", file.begin), ("pad", file.pad), ("unk", file.unk)];
    for (role, id) in roles.into_iter().filter(|(role, id)| expected.roles[*role] != *id) {
        found.push(format!("{role} is {id:?}, expected {:?}", expected.roles[role]));
    }
    if expected.roles["eos"].is_some_and(|end| end != file.end) || expected.size != file.size {
        found.push(format!("{file:?}, expected {:?} and size {}", expected.roles, expected.size));
    }
    let tokenizer = Tokenizer::from_bytes(file.json.as_slice()).unwrap();
    let ids = (0..1000).map(|index| {
        let text = fixture.text(index);
        let plain = tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
        [file.prefix.clone(), plain, file.suffix.clone()].concat()
    });
    let ids: Vec<Vec<u32>> = ids.collect();
    for (index, expected) in expected.first.iter().enumerate().filter(|(index, expected)| ids[*index] != **expected) {
        found.push(format!("{:?} has ids {:?}, expected {expected:?}", fixture.text(index as u64), ids[index]));
    }
    let blocks = ids.chunks(100).zip(&expected.digests);
    let wrong = blocks.filter(|(block, expected)| digest(block) != **expected).count();
    if wrong > 0 {
        found.push(format!("{wrong} of 10 blocks of texts have other ids"));
    }
    let answers = ids.iter().map(|ids| tokenizer.decode(ids, true).unwrap().bytes().map(u32::from).collect());
    let answers: Vec<Vec<u32>> = answers.collect();
    let wrong =
        answers.chunks(100).zip(&expected.answers).filter(|(block, expected)| digest(block) != **expected).count();
    if wrong > 0 {
        found.push(format!("{wrong} of 10 blocks of ids become other texts"));
    }
    found
}

#[test]
fn folders_of_any_maker_give_the_ids_of_auto_tokenizer() {
    let fixture = Fixture::read();
    let mut wrong = Vec::new();
    for expected in &fixture.folders {
        let folder = fixture.write(expected);
        let end = expected.roles["eos"].is_none().then_some("</s>");
        let file = open_tokenizer(folder.path(), end).unwrap().tokenizer;
        wrong.extend(
            differences(&fixture, expected, &file).into_iter().map(|text| format!("{}: {text}", expected.name)),
        );
        // The files stay as they were, and mean the same once they are out again.
        for (name, content) in expected.files.iter().filter(|(name, _)| end.is_none() && *name != "config.json") {
            assert_eq!(file.files[name], fixture.content(content).into_bytes(), "{}: {name}", expected.name);
        }
        let saved = tempfile::tempdir().unwrap();
        file.save(saved.path()).unwrap();
        assert_eq!(TokenizerFile::load(saved.path()).unwrap(), file, "{}", expected.name);
        if let Some(config) = expected.files.get("config.json") {
            fs::write(saved.path().join("config.json"), config.to_string()).unwrap();
        }
        assert_eq!(open_tokenizer(saved.path(), None).unwrap().tokenizer, file, "{}", expected.name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn real_tokenizers_give_the_ids_of_auto_tokenizer() {
    let fixture = Fixture::read();
    for expected in &fixture.real {
        let Some(folder) = shared_data(&expected.name) else { continue };
        let file = open_tokenizer(&folder, None).unwrap().tokenizer;
        assert_eq!(differences(&fixture, expected, &file), Vec::<String>::new(), "{}", expected.name);
    }
}

/// The folder of that name, opened.
fn opened(fixture: &Fixture, name: &str) -> TokenizerFile {
    let expected = fixture.folders.iter().find(|folder| folder.name == name).unwrap();
    open_tokenizer(fixture.write(expected).path(), None).unwrap().tokenizer
}

#[test]
fn tokenizers_are_compared_by_what_they_mean() {
    let fixture = Fixture::read();
    let same = ["gpt2", "gpt2 with dropout", "gpt2 with merges as text", "gpt2 of two files", "gpt2 by the model"];
    let other =
        ["gpt2 with a space before", "gpt2 with added tokens", "nfc and lower case", "llama", "words", "unigram"];
    let first = opened(&fixture, "gpt2");
    for name in same {
        let found = opened(&fixture, name);
        assert_eq!(first.difference(&found, "a", "b"), None, "{name}");
        assert_eq!(first.vocabulary().meaning, found.vocabulary().meaning, "{name}");
    }
    for name in other {
        let found = opened(&fixture, name);
        assert!(first.difference(&found, "a", "b").is_some(), "{name}");
        assert_ne!(first.vocabulary().meaning, found.vocabulary().meaning, "{name}");
    }
    // What a tokenizer puts around a text, what it cuts and pads, is no part of what ids mean.
    let bos = opened(&fixture, "bos and eos by the post-processor");
    assert_eq!(bos.difference(&opened(&fixture, "cut and padded"), "a", "b"), None);
}

#[test]
fn a_model_goes_out_with_the_tokenizer_that_came_in() {
    let fixture = Fixture::read();
    let expected = fixture.folders.iter().find(|folder| folder.name == "opt").unwrap();
    let folder = fixture.write(expected);
    let templates = folder.path().join("additional_chat_templates");
    fs::create_dir(&templates).unwrap();
    fs::write(templates.join("tool.jinja"), "{{ tools }}").unwrap();
    fs::write(folder.path().join("chat_template.jinja"), "{% for m in messages %}\r\n{{ m.content }}{% endfor %}")
        .unwrap();
    let file = open_tokenizer(folder.path(), None).unwrap().tokenizer;
    assert_eq!((file.prefix.as_slice(), file.end, file.begin, file.pad), (&[2][..], 2, Some(2), Some(3)));
    let shape = json!({"architecture": "gpt2", "layers": 1, "width": 8, "heads": 1, "positions": 16});
    let model = LanguageModel::init(&serde_json::from_value(shape).unwrap(), file, 1, &Device::Cpu).unwrap();
    let saved = tempfile::tempdir().unwrap();
    LanguageModel::load(&saved_to(&model, saved.path()), &Device::Cpu).unwrap().save(saved.path()).unwrap();
    for name in [
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ] {
        let read = |folder: &Path| fs::read(folder.join(name)).unwrap();
        assert_eq!(read(saved.path()), read(folder.path()), "{name}");
    }
    // `transformers` would read it in place of the two files.
    assert!(!saved.path().join("tokenizer.json").exists());
    let config: Json = serde_json::from_slice(&fs::read(saved.path().join("config.json")).unwrap()).unwrap();
    let ids = ["bos_token_id", "eos_token_id", "pad_token_id"].map(|key| config[key].as_u64());
    assert_eq!(ids, [Some(2), Some(2), Some(3)]);
}

fn saved_to(model: &LanguageModel, folder: &Path) -> PathBuf {
    model.save(folder).unwrap();
    folder.to_owned()
}

#[test]
fn what_is_done_otherwise_is_said() {
    let fixture = Fixture::read();
    let main = |change: &dyn Fn(&mut Json)| {
        let mut json = fixture.bases["bytes"].clone();
        change(&mut json);
        json
    };
    let open = |main: Json, config: Json| {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), main.to_string()).unwrap();
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        open_tokenizer(folder.path(), None).unwrap()
    };
    let general = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"});
    let random = open(main(&|json| json["model"]["dropout"] = json!(0.5)), general.clone());
    assert!(random.notes[0].starts_with("`model.dropout: 0.5` in `tokenizer.json` of "), "{:?}", random.notes);
    let certain = open(main(&|_| ()), general);
    assert_eq!((&certain.notes, certain.tokenizer.difference(&random.tokenizer, "a", "b")), (&vec![], None));
    let effective: Json = serde_json::from_slice(&random.tokenizer.json).unwrap();
    assert_eq!(effective["model"]["dropout"], json!(null));
    let own = open(main(&|_| ()), json!({"tokenizer_class": "GemmaTokenizer", "eos_token": "</s>"}));
    assert!(own.notes[0].contains("of class `GemmaTokenizer`, which is not known here"), "{:?}", own.notes);
}

#[test]
fn an_end_token_that_is_asked_for_is_that_of_the_files_too() {
    let fixture = Fixture::read();
    let folder = fixture.write(fixture.folders.iter().find(|folder| folder.name == "older, general").unwrap());
    let file = open_tokenizer(folder.path(), Some("<pad>")).unwrap().tokenizer;
    assert_eq!(file.end, 3);
    let saved = tempfile::tempdir().unwrap();
    file.save(saved.path()).unwrap();
    assert_eq!(open_tokenizer(saved.path(), None).unwrap().tokenizer, file);
    let error = open_tokenizer(folder.path(), Some("<eot>")).unwrap_err().to_string();
    assert!(error.starts_with("end token `<eot>` is not in the vocabulary of "), "{error}");
}

#[test]
fn a_sentence_piece_model_that_is_cut_short_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.model"), b"\n\x0e\n\x05<unk>").unwrap();
    let error = open_tokenizer(folder.path(), None).unwrap_err().to_string();
    assert!(error.contains("`tokenizer.model` of") && error.contains("cannot be read"), "{error}");
}

fn shared_data(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("PIPELINE_TEST_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = root.join(name);
    if !path.exists() {
        println!("skipped: `{}` is not there; set PIPELINE_TEST_DATA", path.display());
        return None;
    }
    Some(path)
}
