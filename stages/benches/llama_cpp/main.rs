//! Reading prompts and writing beside llama.cpp, from the same GGUF files and with as many threads:
//!
//! ```text
//! cargo bench --profile dev --workspace --bench llama_cpp -- MODEL.gguf [--format q8_0 ...] [--python PATH]
//! ```
//!
//! The model is measured as it is in its file, and in the formats asked for. For every line each side is a process of its own,
//! which loads the model and then waits; they are asked in turn, and the ratio is the median of the ratios of neighbours.
//! Both write greedily; the last column says how much of the text is the same. (llama.cpp rounds what it multiplies quantised
//! weights with to eight bits; we do not.)
//!
//! Without the Python package our own figures come alone.

#[path = "../torch/child.rs"]
mod child;

use std::fs;
use std::io::{BufRead, stdin};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use clap::Parser;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use contract::random::purpose;
use contract::{AnyValue, Conventions, Env, Folder, Inputs, Sink, Step, TokenizerFile};
use lm::sample::Sampling;
use lm::{Format, Generate, LanguageModel, Prompt};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};
use stages::text::{SpecialTokens, Text};

use child::{Ended, Ran, Ready, Side, memory, say};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the Python program imports, as it was last measured.
const PACKAGE: &str = "llama-cpp-python==0.3.36";

/// Time and memory beside llama.cpp's.
#[derive(Debug, Parser)]
struct Arguments {
    /// A GGUF file.
    #[arg(required_unless_present = "serve")]
    model: Option<PathBuf>,
    /// Formats to measure it in as well; none: `q8_0` and `f16`.
    #[arg(long = "format")]
    formats: Vec<String>,
    /// Threads of each side.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Seconds to spend on the repeats of a line.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// The Python that has the package.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// A process of our side: the file of a task.
    #[arg(long, hide = true)]
    serve: Option<PathBuf>,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What both sides do.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Task {
    /// The file that llama.cpp reads.
    gguf: PathBuf,
    /// The same model as a folder of ours.
    folder: PathBuf,
    threads: usize,
    /// Prompts of one length.
    prompts: Vec<Vec<u32>>,
    /// Tokens to write behind each.
    response: usize,
}

/// Lines of the table: what is done, rows, tokens of a prompt, tokens of a response. A line of several rows is also held
/// against llama.cpp's line before it, of one row.
const LINES: [(&str, usize, usize, usize); 3] =
    [("reads 512 tokens", 1, 512, 1), ("writes, 1 row", 1, 8, 64), ("writes, 16 rows", 16, 8, 64)];

/// A text that goes on for long.
const TEXT: &str = "Once upon a time there was a small village at the edge of a great forest. The people of the village \
    were farmers, and every morning they went out to their fields before the sun had risen. ";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match &arguments.serve {
        Some(task) => serve(task),
        None => compare(&arguments),
    }
}

/// The worker process of our side: answers requests until its input ends.
fn serve(task: &Path) -> Result<()> {
    let idle_kib = memory("VmRSS")?;
    let task: Task = serde_json::from_slice(&fs::read(task)?)?;
    let model = LanguageModel::load(&task.folder, &Device::Cpu)?;
    let prompts: Vec<Prompt<'_>> = (0..).zip(&task.prompts).map(|(row, ids)| Prompt { row, ids }).collect();
    let options = Generate {
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_new_tokens: task.response,
        longest: usize::MAX,
        seed: 0,
        purpose: purpose::GENERATE,
        time: 0,
        batch: prompts.len(),
    };
    say(&Ready { idle_kib })?;
    for request in stdin().lock().lines() {
        if request? == "end" {
            return say(&Ended { peak_kib: memory("VmHWM")?, device_kib: None });
        }
        let start = Instant::now();
        let written = lm::generate(&model, None, &prompts, &options, &mut |_| {})?;
        let seconds = start.elapsed().as_secs_f64();
        let checks: Vec<f64> = written.iter().flat_map(|row| &row.ids).map(|id| f64::from(*id)).collect();
        ensure!(checks.len() == prompts.len() * task.response, "a row ended early");
        say(&Ran { seconds, tokens: checks.len(), checks })?;
    }
    Ok(())
}

fn compare(arguments: &Arguments) -> Result<()> {
    let found = Command::new(&arguments.python).args(["-c", "import llama_cpp, numpy"]).output();
    let with_llama_cpp = found.is_ok_and(|output| output.status.success());
    if !with_llama_cpp {
        println!("`{}` lacks the package to compare with, so these are our figures alone", arguments.python.display());
        println!("to compare, `pip install {PACKAGE}` and give that Python with `--python`\n");
    }
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let given = arguments.model.clone().context("no model is given")?;
    let model = run("download", json!({"model": given}), vec![], "model", scratch.path())?;
    let mut files = vec![("as given".to_owned(), given, model.clone())];
    let usual = ["q8_0".to_owned(), "f16".to_owned()];
    for format in if arguments.formats.is_empty() { &usual[..] } else { &arguments.formats } {
        let _: Format = serde_json::from_value(json!(format)).with_context(|| format!("`{format}` is no format"))?;
        let place = scratch.path().join(format);
        let folder = run("export", json!({"gguf": format}), vec![("model", model.clone())], "dir", &place)?;
        let folder = folder.into_any().downcast::<Folder>().ok().context("a folder expected")?;
        let file = folder.path().join("model/model.gguf");
        let model = run("download", json!({"model": file}), vec![], "model", &place)?;
        files.push((format.clone(), file, model));
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header([
        "weights",
        "work",
        "ours tok/s",
        "llama.cpp tok/s",
        "times as fast",
        "of its single row",
        "ours MiB",
        "llama.cpp MiB",
        "same",
    ]);
    for (index, (name, gguf, model)) in files.into_iter().enumerate() {
        let folder = scratch.path().join(format!("ours-{index}"));
        fs::create_dir(&folder)?;
        model.save(&folder)?;
        never_end(&folder)?;
        let ids = words(&folder)?;
        let mut single = None;
        for (work, rows, prompt, response) in LINES {
            let prompts = (0..rows).map(|row| ids.iter().cycle().skip(3 * row).take(prompt).copied().collect());
            let (gguf, folder) = (gguf.clone(), folder.clone());
            let task = Task { gguf, folder, threads: arguments.threads, prompts: prompts.collect(), response };
            let tokens = if response == 1 { rows * prompt } else { rows * response };
            let sides = measure(&task, arguments, with_llama_cpp, scratch.path())?;
            let cells = cells(&sides, tokens, &mut single, rows > 1);
            let row: Vec<String> = [name.clone(), work.to_owned()].into_iter().chain(cells).collect();
            eprintln!("{}", row.join(" | "));
            table.add_row(row);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}\n");
    println!("medians, of ratios those of neighbours [least, most]; {} threads each", arguments.threads);
    println!("writing includes reading a prompt of 8 tokens; memory is the largest of the process");
    Ok(())
}

/// Runs a stage kind once; gives the output of that name.
fn run(kind: &str, with: Json, inputs: Vec<(&str, AnyValue)>, output: &str, scratch: &Path) -> Result<AnyValue> {
    struct Warnings;

    impl Sink for Warnings {
        fn metrics(&mut self, _row: Map<String, Json>) {}
        fn progress(&mut self, _done: u64, _total: u64, _unit: &str) {}
        fn warn(&mut self, text: &str) {
            eprintln!("warning: {text}");
        }
        fn note(&mut self, _text: &str) {}
    }

    let registry = stages::registry();
    let kind = registry.get(kind).context("no such kind")?;
    let config = kind.resolve(&with, Conventions::Sound).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    fs::create_dir_all(scratch)?;
    let env = Env { device: "cpu".to_owned(), threads: 1, scratch: scratch.to_owned() };
    let mut ports = Inputs::new();
    inputs.into_iter().for_each(|(port, value)| ports.insert(port, value));
    let step = Step { round: 0, rounds: 1, epoch: 0, rounds_per_epoch: 1 };
    let mut outputs = kind.start(&config, &env, None)?.run(ports, &step, &mut Warnings)?;
    outputs.0.remove(output).context("the stage gave no such output")
}

/// Takes the tokens away at which a model stops, so that every row has its full length.
fn never_end(folder: &Path) -> Result<()> {
    for (file, key, value) in
        [("config.json", "eos_token_id", Json::Null), ("pipeline_tokenizer.json", "end", json!(u32::MAX))]
    {
        let path = folder.join(file);
        let mut json: Json = serde_json::from_slice(&fs::read(&path)?)?;
        json[key] = value;
        fs::write(path, json.to_string())?;
    }
    Ok(())
}

/// The ids of a text by the tokenizer of a model.
fn words(folder: &Path) -> Result<Vec<u32>> {
    Text::new(&TokenizerFile::load(folder)?, SpecialTokens::Text)?.encode(TEXT)
}

/// Runs of a side before it is timed.
const WARM_UP: usize = 1;

/// What one side did.
struct Runs {
    seconds: Vec<f64>,
    written: Vec<f64>,
    peak_kib: u64,
}

/// All that the sides did, ours first.
fn measure(task: &Task, arguments: &Arguments, with_llama_cpp: bool, scratch: &Path) -> Result<Vec<Runs>> {
    let path = scratch.join("task.json");
    fs::write(&path, serde_json::to_vec(task)?)?;
    let mut ours = Command::new(std::env::current_exe()?);
    ours.env("RAYON_NUM_THREADS", arguments.threads.to_string()).env("MIMALLOC_PURGE_DELAY", "60000");
    let mut sides = vec![Side::start("our side", ours.arg("--serve").arg(&path))?];
    if with_llama_cpp {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/llama_cpp/peer.py");
        let mut theirs = Command::new(&arguments.python);
        sides.push(Side::start("llama.cpp", theirs.arg(program).arg(&path).env("PYTHONDONTWRITEBYTECODE", "1"))?);
    }
    let mut runs: Vec<Vec<Ran>> = sides.iter().map(|_| Vec::new()).collect();
    let mut turn = || -> Result<f64> {
        let mut seconds = 0.0;
        for (side, runs) in sides.iter_mut().zip(&mut runs) {
            // The threads of the side before go to sleep first.
            std::thread::sleep(Duration::from_millis(20));
            runs.push(side.run(false)?);
            seconds += runs.last().map_or(0.0, |ran| ran.seconds);
        }
        Ok(seconds)
    };
    let once = (0..WARM_UP).map(|_| turn()).last().expect("at least once")?;
    for _ in 0..((arguments.seconds / once) as usize).clamp(3, 25) {
        turn()?;
    }
    let sides = sides.into_iter().zip(runs).map(|(side, mut runs)| {
        let timed = runs.split_off(WARM_UP);
        let written = timed[0].checks.clone();
        Ok(Runs { seconds: timed.iter().map(|ran| ran.seconds).collect(), written, peak_kib: side.end()?.peak_kib })
    });
    sides.collect()
}

/// The cells of a line behind its name. `single` is the rate of llama.cpp on the last line of one row.
fn cells(sides: &[Runs], tokens: usize, single: &mut Option<f64>, is_batch: bool) -> Vec<String> {
    let rate = |side: &Runs| tokens as f64 / median(&side.seconds);
    let mib = |side: &Runs| format!("{:.0}", side.peak_kib as f64 / 1024.0);
    let (ours, theirs) = (&sides[0], sides.get(1));
    let beside = |cell: &dyn Fn(&Runs) -> String| theirs.map_or(String::new(), cell);
    let of_single = single.filter(|_| is_batch).map_or(String::new(), |single| format!("{:.1}", rate(ours) / single));
    if !is_batch {
        *single = theirs.map(rate);
    }
    vec![
        format!("{:.0}", rate(ours)),
        beside(&|side| format!("{:.0}", rate(side))),
        beside(&|side| {
            let ratios: Vec<f64> = side.seconds.iter().zip(&ours.seconds).map(|(theirs, ours)| theirs / ours).collect();
            let [least, most] =
                [f64::min, f64::max].map(|f| ratios.iter().copied().reduce(f).expect("there are repeats"));
            format!("{:.2} [{least:.2}, {most:.2}]", median(&ratios))
        }),
        of_single,
        mib(ours),
        beside(&mib),
        beside(&|side| {
            let same = ours.written.iter().zip(&side.written).filter(|(ours, theirs)| ours == theirs).count();
            format!("{:.0} %", 100.0 * same as f64 / ours.written.len() as f64)
        }),
    ]
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
