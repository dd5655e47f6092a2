//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::language::Request;
use crate::plan::selection::Wanted;

/// Turns a YAML file into a distilled language model, and says exactly what it did
#[derive(Parser)]
#[command(name = "pipeline", version, max_term_width = 110, propagate_version = true)]
#[command(after_help = "Example: pipeline run promptkd.yaml --variant no-prompt\n\
    Exit status: 0 done, 1 a stage failed, 2 wrong request, 3 `plan --check` or `compare` found work, 4 store or disk trouble, \
    130/143 interrupted: the same command goes on")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run a pipeline; what is cached is not run again
    #[command(after_help = "Example: pipeline run promptkd.yaml --variant no-prompt,forward-kl --set params.seed=20")]
    Run(RunArgs),
    /// Print the table of what a pipeline's report compares, as far as there are results
    #[command(after_help = "Example: pipeline compare promptkd.yaml --format latex > results.tex\n\
        Exit status 3 where results are missing: `--run` computes them")]
    Compare(CompareArgs),
    /// Write one page of what was gained, what made it, and how sure that is
    #[command(after_help = "Example: pipeline report promptkd.yaml --ablation methods -o report.html\n\
        It needs no network, and but for `--interactive` no script; it shows what has a result, and computes nothing. \
        As it comes: pipeline report promptkd.yaml --watch")]
    Report(ReportArgs),
    /// Draw one metric over what was varied, as SVG
    #[command(
        mut_arg("stages", |arg| arg.value_name("METRIC").help("Metric to plot: `STAGE.METRIC`, or its heading in the report")),
        after_help = "Example: pipeline plot promptkd.yaml score.rouge_l --ablation prompt-length --by params.prompt_length -o x.svg\n\
        Training curves: pipeline plot promptkd.yaml train.learn.loss --all --by update -o loss.svg"
    )]
    Plot(PlotArgs),
    /// Give what stages have measured to a tracker, after the fact; what is there already is not sent again
    #[command(after_help = "Example: pipeline track tensorboard promptkd.yaml --all --to runs\n\
        `tensorboard` writes event files, a folder a stage, which others read too: `wandb sync` takes such a folder (untried). \
        `trackio` writes the same, and says how it is imported. `mlflow` sends to the server of MLFLOW_TRACKING_URI, with \
        MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")]
    Track(TrackArgs),
    /// Show a run as it goes on, from its events alone, also of another machine's folder
    #[command(after_help = "Example: pipeline watch\n\
        Another machine's: pipeline watch /mnt/box/.pipeline/runs/20260131-235959.123-4567")]
    Watch(WatchArgs),
    /// Check a pipeline without running it
    #[command(after_help = "Example: pipeline check promptkd.yaml --all --origin")]
    Check(CheckArgs),
    /// Show what a run would do, and why
    #[command(after_help = "Example: pipeline plan promptkd.yaml --set params.seed=20 --check")]
    Plan(PlanArgs),
    /// Show keys, outputs and metrics of stages
    #[command(after_help = "Example: pipeline show promptkd.yaml score --json")]
    Show(ShowArgs),
    /// Explain why stages have to run: the exact difference to the last time
    #[command(after_help = "Example: pipeline why promptkd.yaml student --against no-prompt")]
    Why(WhyArgs),
    /// Give the result of a stage a name
    #[command(after_help = "Example: pipeline tag best promptkd.yaml train")]
    Tag(TagArgs),
    /// List the names of results
    #[command(after_help = "Example: pipeline tags --json")]
    Tags(ListArgs),
    /// Take a name away from a result
    #[command(after_help = "Example: pipeline untag best")]
    Untag(UntagArgs),
    /// Keep the key of a stage as it is: a plan in which it is another fails
    #[command(after_help = "Example: pipeline pin promptkd.yaml teacher")]
    Pin(Target),
    /// Let the key of a stage change again
    #[command(after_help = "Example: pipeline unpin promptkd.yaml teacher")]
    Unpin(Target),
    /// List runs, or the stages of one
    #[command(after_help = "Example: pipeline runs 20260131")]
    Runs(RunsArgs),
    /// Print the logs of a run, the newest if none is named
    #[command(after_help = "Example: pipeline logs train --follow")]
    Logs(LogsArgs),
    /// Show what runs now
    #[command(after_help = "Example: pipeline status")]
    Status(StatusArgs),
    /// Draw the graph of a pipeline
    #[command(after_help = "Example: pipeline graph promptkd.yaml --format dot | dot -Tsvg > graph.svg")]
    Graph(GraphArgs),
    /// List stage kinds, or describe one
    #[command(after_help = "Example: pipeline stages distill")]
    Stages {
        /// Kind to describe
        kind: Option<String>,
    },
    /// Print the JSON Schema of pipeline files, for editors
    #[command(after_help = "Example: pipeline schema > pipeline.schema.json")]
    Schema,
    /// Copy an artifact out of the store, its bytes verified
    #[command(after_help = "Example: pipeline export promptkd.yaml train.student --to my-student")]
    Export(ExportArgs),
    /// Make files that are there the result of a stage, as if it had made them
    #[command(after_help = "Example: pipeline import promptkd.yaml teacher --from my-teacher")]
    Import(ImportArgs),
    /// Say what this machine and this store can do
    #[command(after_help = "Example: pipeline doctor")]
    Doctor(DoctorArgs),
    /// Write a copy of a shipped pipeline, to start from
    #[command(after_help = "Example: pipeline init promptkd.yaml")]
    Init {
        /// Name of a shipped pipeline
        name: String,
        /// Folder to write it to
        #[arg(long, value_name = "DIR", default_value = ".")]
        to: PathBuf,
    },
    /// Score predictions against references
    #[command(
        after_help = "Scores are in percent. `rouge_l` and `exact_match` are as published: `exact_match` drops case and \
        punctuation, `strict_match` does not. `accuracy` is the share of answers whose final number is that of a reference, and \
        `rules` counts how the numbers were found.\n\
        Example: pipeline score --predictions answers.jsonl --references references.jsonl --json"
    )]
    Score(ScoreArgs),
    /// Look after the store
    #[command(subcommand, after_help = "Example: pipeline cache du")]
    Cache(CacheCommand),
    /// Print what a shell needs to complete command lines, with the names in a pipeline
    #[command(after_help = "Example: pipeline completions bash >> ~/.bashrc")]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print what the last word may become
    #[command(hide = true)]
    Complete {
        /// The words so far, without the program
        #[arg(last = true)]
        words: Vec<String>,
    },
    /// Run one subgraph for a coordinator
    #[command(hide = true)]
    Worker,
}

/// Which pipeline, which of its cells and stages, and where its results are. The same on every command.
#[derive(Args, Clone)]
pub(crate) struct Target {
    /// Pipeline: a path, the name of one in `pipelines/` or of a shipped one, or `-` for standard input
    pub(crate) file: PathBuf,
    /// Stages to look at, with all that they need; `LOOP.STAGE` too. `STAGE+` is a stage with all that needs it. Without any: all
    #[arg(value_name = "STAGE")]
    pub(crate) stages: Vec<String>,
    /// Leave out what needs these stages
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub(crate) until: Vec<String>,
    /// Leave what the named stages need as it is: it must have a result
    #[arg(long, requires = "stages")]
    pub(crate) only: bool,
    /// Where and at what scale to run
    #[arg(long, value_name = "P")]
    profile: Option<String>,
    /// Variants to select; `base` is the file without any
    #[arg(long, value_name = "V", value_delimiter = ',', conflicts_with = "all")]
    variant: Vec<String>,
    /// Select the base and every variant
    #[arg(long)]
    all: bool,
    /// Select the cells of an ablation
    #[arg(long, value_name = "A")]
    ablation: Option<String>,
    /// Change a value, as in `train.learn.learning_rate=1e-3`; may be given many times
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Device to run on: `auto`, `cpu`, `cuda:N`, or several as `cuda:0,cuda:1`; a stage has its GPU for itself
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Threads of all workers together; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), allow_negative_numbers = true)]
    pub(crate) threads: Option<u16>,
    /// Stages to run at a time; they share the threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024), allow_negative_numbers = true)]
    pub(crate) jobs: u16,
}

impl Target {
    /// The stages that are asked for, of which some are to run in any case.
    pub(crate) fn wanted<'a>(&'a self, force: &'a [String]) -> Wanted<'a> {
        Wanted { stages: &self.stages, until: &self.until, force }
    }

    /// The same for another variant alone.
    pub(crate) fn request_of(&self, variant: &str) -> Request {
        let variants = vec![variant.to_owned()];
        Request { variants, all_variants: false, ablation: None, ..self.request() }
    }

    pub(crate) fn request(&self) -> Request {
        Request {
            file: self.file.clone(),
            profile: self.profile.clone(),
            variants: self.variant.clone(),
            all_variants: self.all,
            ablation: self.ablation.clone(),
            set: self.set.clone(),
        }
    }
}

/// What a variable of the environment says, else `default`. Not left to the parser, which would name the flag in the usage of
/// every command as if it had been given.
fn from_environment(name: &str, default: &str) -> OsString {
    std::env::var_os(name).filter(|value| !value.is_empty()).unwrap_or_else(|| default.into())
}

static CUT_SECONDS: LazyLock<String> =
    LazyLock::new(|| from_environment("PIPELINE_CUT_SECONDS", "30").to_string_lossy().into_owned());

#[derive(Args, Clone)]
pub(crate) struct StoreArgs {
    /// Folder of the store; may be shared between checkouts. PIPELINE_STORE says another than `.pipeline`
    #[arg(long, value_name = "DIR", default_value_os_t = from_environment("PIPELINE_STORE", ".pipeline").into())]
    pub(crate) store: PathBuf,
}

#[derive(Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Run these stages although they have a result, and say whether they give the same bytes
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub(crate) force: Vec<String>,
    /// Stop as soon as a stage fails; without, what does not need it goes on
    #[arg(long)]
    pub(crate) fail_fast: bool,
    /// Print events, one JSON object a line, in place of the table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) table: TableArgs,
    /// Seconds between two checkpoints of a loop. PIPELINE_CUT_SECONDS says others than 30
    #[arg(long, value_name = "SECONDS", default_value = CUT_SECONDS.as_str())]
    pub(crate) cut_every: f64,
    /// Save and load everything after every stage run of a loop: slow, with the same results; keeps no checkpoint by itself
    #[arg(long)]
    pub(crate) unroll: bool,
}

/// How a comparison is written.
#[derive(Args, Clone)]
pub(crate) struct TableArgs {
    /// What to write the table in; CSV and JSON have every repeat, interval and key
    #[arg(long, value_enum, default_value_t = TableFormat::Text, conflicts_with = "json")]
    pub(crate) format: TableFormat,
    /// The same as `--format markdown`
    #[arg(long, conflicts_with_all = ["json", "format"])]
    pub(crate) markdown: bool,
    /// What was measured runs down, and variants across
    #[arg(long)]
    pub(crate) transpose: bool,
    /// Leave out columns that are the same for all
    #[arg(long)]
    pub(crate) only_differing: bool,
    /// Columns to show, by heading or as `STAGE.METRIC`, in this order
    #[arg(long, value_name = "C", value_delimiter = ',')]
    pub(crate) columns: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TableFormat {
    Text,
    Markdown,
    /// With `booktabs`
    Latex,
    /// A measurement a row
    Csv,
    Json,
}

#[derive(Args)]
pub(crate) struct CompareArgs {
    /// Run what has no result yet
    #[arg(long)]
    pub(crate) run: bool,
    #[command(flatten)]
    pub(crate) how: RunArgs,
}

#[derive(Args)]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// File to write; `-` for standard output
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    pub(crate) output: PathBuf,
    /// With a script of its own: tables sort, stages are searched, curves say their values
    #[arg(long)]
    pub(crate) interactive: bool,
    /// Write it again whenever the run has come further, until that ends; a browser shows it anew
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Args)]
pub(crate) struct PlotArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// What runs along the axis: a setting that an ablation varies, `variant`, or `update` for training curves
    #[arg(long, value_name = "PARAM", default_value = "variant")]
    pub(crate) by: String,
    /// File to write; `-` for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
}

#[derive(Args)]
pub(crate) struct TrackArgs {
    /// Tracker to give it to
    #[arg(value_enum)]
    pub(crate) tracker: Tracker,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Folder to write to, `runs` if not given; for `mlflow` the address of its server
    #[arg(long, value_name = "DIR|URL")]
    pub(crate) to: Option<String>,
    /// Go on as long as the newest run of the pipeline does
    #[arg(long)]
    pub(crate) follow: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tracker {
    Tensorboard,
    Mlflow,
    Trackio,
}

#[derive(Args)]
pub(crate) struct WatchArgs {
    /// Run: its identifier, or its folder; the newest of the store if not given
    pub(crate) run: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Show what has happened so far, and end
    #[arg(long)]
    pub(crate) once: bool,
    /// Print events, one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Print every value of every stage, and where it is written
    #[arg(long)]
    pub(crate) origin: bool,
}

#[derive(Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Plan these stages to run although they have a result
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub(crate) force: Vec<String>,
    /// Exit with status 3 if there is work
    #[arg(long)]
    pub(crate) check: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct WhyArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Compare with this instead: a run (the beginning of its name), the name of a result, or a variant
    #[arg(long, value_name = "RUN|NAME|VARIANT")]
    pub(crate) against: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Args)]
pub(crate) struct ImportArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// The folder or file; of a stage with several outputs, `OUTPUT=PATH` for each
    #[arg(long, value_name = "PATH", required = true)]
    pub(crate) from: Vec<String>,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct TagArgs {
    /// Letters, digits, `-`, `_` and `.`
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Take the name from the result that has it
    #[arg(long)]
    pub(crate) r#move: bool,
}

#[derive(Args)]
pub(crate) struct UntagArgs {
    /// The name
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct RunsArgs {
    /// One of them, by the beginning of its name; of several the newest
    pub(crate) run: Option<String>,
    /// How many to list
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) last: usize,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct LogsArgs {
    /// A run, a stage of the newest, or both
    #[arg(value_names = ["RUN", "STAGE"], num_args = 0..=2)]
    pub(crate) names: Vec<String>,
    /// Go on as long as the run does
    #[arg(long, short)]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct GraphArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Language to draw in
    #[arg(long, value_enum, default_value_t = Format::Mermaid)]
    pub(crate) format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    Mermaid,
    Dot,
}

#[derive(Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
}

#[derive(Args, Clone)]
pub(crate) struct ScoreArgs {
    /// Predictions, a row each: `text`, and `id` where there is one. JSON lines, a JSON list, CSV or TSV, also gzipped
    #[arg(long, value_name = "FILE")]
    pub(crate) predictions: PathBuf,
    /// References, a row each: `output` (a text or a list of right ones; also `response`, `answer` or `completion`), and `id`
    #[arg(long, value_name = "FILE")]
    pub(crate) references: PathBuf,
    /// How rows are paired: by `id` where every row of both files has one, else line by line; or line by line in any case
    #[arg(long, value_enum, default_value_t = PairBy::Id)]
    pub(crate) by: PairBy,
    /// What ROUGE-L takes for a word: runs of ASCII letters and digits, as published, or words of any script
    #[arg(long, value_enum, default_value_t = Words::Ascii)]
    pub(crate) words: Words,
    /// Which number of an answer `accuracy` takes for its final one
    #[arg(long, value_enum, default_value_t = Extraction::Gsm8k)]
    pub(crate) extraction: Extraction,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PairBy {
    Id,
    Line,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Words {
    Ascii,
    Unicode,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Extraction {
    /// That behind `####`
    Strict,
    /// The last one
    Flexible,
    /// That behind `####`, else the last one
    Gsm8k,
    /// As published for response priming, without signs: boxed, alone on the first line, behind `the answer is`, the last one
    Published,
}

#[derive(Subcommand)]
pub(crate) enum CacheCommand {
    /// Measure what the store takes up
    #[command(after_help = "Example: pipeline cache du --stages")]
    Du(DuArgs),
    /// Drop results that nobody wants any more: what has a name or was in a run of the last days stays
    #[command(after_help = "Example: pipeline cache gc --days 14 --limit 50GiB --dry-run")]
    Gc(GcArgs),
    /// Hash everything in the store; what is damaged is removed and will be computed again
    #[command(after_help = "Example: pipeline cache verify")]
    Verify(CacheArgs),
}

#[derive(Args)]
pub(crate) struct DuArgs {
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// Tell what each stage takes up, the most first
    #[arg(long)]
    pub(crate) stages: bool,
}

#[derive(Args)]
pub(crate) struct GcArgs {
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// Keep what runs of so many last days wanted
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) days: u64,
    /// Drop no more than it takes for artifacts to fit in here, as `50GiB`; the longest unwanted go first
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) limit: Option<u64>,
    /// Only say what would go
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// A number of bytes: `1000`, `1.5GB`, `20GiB`.
fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()));
    let factor: f64 = match unit.trim() {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => f64::from(1 << 20),
        "GiB" => f64::from(1 << 30),
        "TiB" => 1024.0 * f64::from(1 << 30),
        other => {
            return Err(format!("`{other}` is no unit; write `KiB`, `MiB`, `GiB`, `TiB`, `kB`, `MB`, `GB` or `TB`"));
        }
    };
    let number: f64 = digits.parse().map_err(|_| format!("`{text}` is no size; write for example `20GiB`"))?;
    Ok((number * factor) as u64)
}

#[derive(Args)]
pub(crate) struct CacheArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("0", 0), ("1000", 1000), ("1.5GB", 1_500_000_000), ("20GiB", 20 << 30), ("2 MiB", 2 << 20)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "1Gi", "-1", "1.2.3"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_line_is_consistent_and_every_visible_command_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        let examples = |command: &clap::Command| command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for command in cli.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help") {
            assert!(examples(command).contains("Example: pipeline"), "`{}` has no example", command.get_name());
        }
    }
}
