//! Time and memory of training, distillation and generation beside PyTorch's, on the same weights and token ids:
//!
//! ```text
//! cargo bench --profile dev --workspace --bench torch -- [CASE ...] [--scale tiny|small|published] \
//!     [--device cpu|cuda:0] [--growth] [--python PATH]
//! ```
//!
//! For every line of the table each side is a process of its own, which loads its models and then waits. They are asked in
//! turn (ours, theirs, ours, theirs, ...), so that what else the machine does falls on both; the ratio is the median of
//! the ratios of neighbours. Where PyTorch has several ways to do the work each is a process, and the fastest is the one
//! to beat. Both sides must find the same losses, and write the same greedy text; the last column says how nearly.
//!
//! Without the Python packages our own figures come alone.

mod child;
mod ours;
mod roofline;
mod table;
mod task;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use lm::Dtype;

use child::{Ended, Ran, Side};
use roofline::Rates;
use task::{Case, Line, Scale, Task};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the Python programs import, as they were last measured.
const PACKAGES: &str = "torch==2.15.0 transformers==5.23.0 rouge_score==0.1.2";

/// Time and memory beside PyTorch's.
#[derive(Debug, Parser)]
struct Arguments {
    /// Cases to measure; none: all.
    #[arg(value_enum)]
    cases: Vec<Case>,
    /// Scales to measure; none: `tiny` and `small` on the CPU, `published` on a GPU.
    #[arg(long = "scale", alias = "shape", value_enum)]
    scales: Vec<Scale>,
    /// Only lines whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Only this way of PyTorch's; none: all.
    #[arg(long)]
    way: Option<String>,
    /// How time and memory grow with rows, length, vocabulary and width, instead of the table.
    #[arg(long)]
    growth: bool,
    /// Where to compute: `cpu` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Threads of each side.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Seconds to spend on the repeats of a line.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// The Python that has the packages.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// A process of our side: `rates`, or the file of a task.
    #[arg(long, hide = true)]
    serve: Option<PathBuf>,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // The depth of a backward pass is that of the model's graph.
    let work = move || match &arguments.serve {
        Some(what) if what == Path::new("rates") => {
            let rates = roofline::measure(&lm::device(&arguments.device)?)?;
            println!("{}", serde_json::to_string(&rates)?);
            Ok(())
        }
        Some(task) => ours::serve(task),
        None => compare(&arguments),
    };
    thread::Builder::new().stack_size(256 << 20).spawn(work)?.join().expect("a panic has said why")
}

fn compare(arguments: &Arguments) -> Result<()> {
    let with_torch = has_packages(arguments);
    let rates = rates(arguments, with_torch)?;
    let cases = if arguments.cases.is_empty() { Case::value_variants() } else { &arguments.cases };
    let usual: &[Scale] = if arguments.device == "cpu" { &[Scale::Tiny, Scale::Small] } else { &[Scale::Published] };
    let scales = if arguments.scales.is_empty() { usual } else { &arguments.scales };
    let lines = cases.iter().flat_map(|case| scales.iter().flat_map(|scale| task::lines(*case, *scale)));
    let lines: Vec<Line> = lines.filter(|line| line.name.contains(&arguments.only)).collect();
    if arguments.growth {
        return lines.iter().try_for_each(|line| growth(line, arguments, with_torch));
    }
    let mut measured = Vec::new();
    for line in lines {
        measured.push(measure(line, arguments, with_torch)?);
        // The table comes at the end; whoever waits for it sees how far it is.
        table::rows(measured.last().expect("it was just measured"), rates)
            .iter()
            .for_each(|row| eprintln!("{}", row.join(" | ")));
    }
    table::print(&measured, rates);
    Ok(())
}

/// How time and memory of a line grow when one of its sizes is doubled, and doubled again.
fn growth(line: &Line, arguments: &Arguments, with_torch: bool) -> Result<()> {
    let mut measured = Vec::new();
    for (size, factor, line) in task::doubled(line) {
        eprintln!("{} ...", line.name);
        measured.push((size, factor, measure(line, arguments, with_torch)?));
    }
    table::print_growth(line, &measured);
    Ok(())
}

/// Whether there is a PyTorch to compare with; says how to get one where not.
fn has_packages(arguments: &Arguments) -> bool {
    let found = Command::new(&arguments.python).args(["-c", "import torch, transformers, rouge_score"]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        println!("`{}` lacks the packages to compare with, so these are our figures alone", arguments.python.display());
        println!("to compare, `pip install {PACKAGES}` and give that Python with `--python`\n");
    }
    found
}

/// What the machine can do by either side's product of matrices.
fn rates(arguments: &Arguments, with_torch: bool) -> Result<Rates> {
    let parse = |command: &mut Command| -> Result<Rates> {
        let output = command.output()?;
        ensure!(output.status.success(), "rates: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let own = parse(ours(arguments)?.args(["--serve", "rates", "--device", &arguments.device]))?;
    if !with_torch {
        return Ok(own);
    }
    let threads = arguments.threads.to_string();
    Ok(own.best(parse(python(arguments, "rates.py").args([&arguments.device, &threads]))?))
}

fn ours(arguments: &Arguments) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env("RAYON_NUM_THREADS", arguments.threads.to_string());
    // As the program starts its workers: freed memory is kept.
    command.env("MIMALLOC_PURGE_DELAY", "60000");
    Ok(command)
}

/// A program beside this file, with an allocator that keeps what it has: without that, PyTorch gives large blocks back
/// to the kernel and faults them in again at every step.
fn python(arguments: &Arguments, program: &str) -> Command {
    let mut command = Command::new(&arguments.python);
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/torch").join(program))
        .env("OMP_NUM_THREADS", arguments.threads.to_string())
        .env("MALLOC_MMAP_THRESHOLD_", "4294967296")
        .env("MALLOC_TRIM_THRESHOLD_", "17179869184")
        .env("MALLOC_TOP_PAD_", "268435456")
        .env("HF_HUB_OFFLINE", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("TRANSFORMERS_VERBOSITY", "error");
    command
}

/// What one side did.
pub(crate) struct Runs {
    /// `ours`, or the way of PyTorch's.
    pub(crate) way: String,
    /// Every repeat, the warm-up left out.
    pub(crate) runs: Vec<Ran>,
    /// Resident memory before any model was loaded, KiB.
    pub(crate) idle_kib: u64,
    /// Memory at the end.
    pub(crate) ended: Ended,
    /// All that must be the same on both sides, of the warm-up too.
    pub(crate) checks: Vec<f64>,
}

/// A line with what all sides did, ours first.
pub(crate) struct Measured {
    /// The line.
    pub(crate) line: Line,
    /// Bytes of an element of what is frozen.
    pub(crate) element: f64,
    /// The sides.
    pub(crate) sides: Vec<Runs>,
}

/// Runs of a side before it is timed, the first of them a check.
const WARM_UP: usize = 2;

fn measure(line: Line, arguments: &Arguments, with_torch: bool) -> Result<Measured> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let task = Task::write(&line, &arguments.device, arguments.threads, folder.path())?;
    let path = folder.path().join("task.json");
    let mut sides = vec![("ours".to_owned(), Side::start("our side", ours(arguments)?.arg("--serve").arg(&path))?)];
    let ways = line.case.ways().iter().filter(|way| arguments.way.as_ref().is_none_or(|wanted| wanted == *way));
    for way in ways.filter(|_| with_torch) {
        let mut command = python(arguments, line.case.program());
        sides.push(((*way).to_owned(), Side::start(way, command.arg(&path).arg(way))?));
    }
    let mut runs: Vec<Vec<Ran>> = vec![Vec::new(); sides.len()];
    let mut turn = |runs: &mut Vec<Vec<Ran>>, check: bool| -> Result<f64> {
        for ((_, side), runs) in sides.iter_mut().zip(runs.iter_mut()) {
            // The threads of the side before go to sleep first.
            thread::sleep(Duration::from_millis(20));
            runs.push(side.run(check)?);
        }
        Ok(runs.iter().filter_map(|runs| runs.last()).map(|ran| ran.seconds).sum())
    };
    let mut once = 0.0;
    for index in 0..WARM_UP {
        once = turn(&mut runs, index == 0)?;
    }
    for _ in 0..((arguments.seconds / once) as usize).clamp(3, 15) {
        turn(&mut runs, false)?;
    }
    let sides = sides.into_iter().zip(runs).map(|((way, side), mut runs)| {
        let checks = runs.iter().flat_map(|ran| ran.checks.iter().copied()).collect();
        runs.drain(..WARM_UP);
        Ok(Runs { way, runs, idle_kib: side.idle_kib, ended: side.end()?, checks })
    });
    let element = if task.dtype == Dtype::F32 { 4.0 } else { 2.0 };
    Ok(Measured { line, element, sides: sides.collect::<Result<_>>()? })
}
