//! All printing during a run. Reporters see events and nothing else; data goes to standard output, the rest to standard
//! error.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde_json::{Map, Value as Json};

use crate::events::{Event, Reporter, Status, line};
use crate::ground::output::{self, tell};
use crate::ground::terminal::{self, printable, printable_lines};

/// The reporter for where standard error goes; with `json`, events to standard output.
pub(crate) fn reporter(json: bool, width: usize) -> Box<dyn Reporter> {
    if json {
        Box::new(JsonLines::default())
    } else if io::stderr().is_terminal() {
        Box::new(Bars::new(width))
    } else {
        Box::new(Lines::new(width))
    }
}

/// One event a line to standard output, up to the first that cannot be written.
#[derive(Default)]
struct JsonLines {
    failed: Option<anyhow::Error>,
}

impl Reporter for JsonLines {
    fn show(&mut self, event: &Event) {
        if self.failed.is_none()
            && let Err(error) = output::say(&line(event))
        {
            tell(&format!("warning: {error:#}: the run goes on, and further events are in its folder alone"));
            self.failed = Some(error);
        }
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

/// One line a stage to standard error, and for long stages one now and then.
struct Lines {
    words: Words,
    last: BTreeMap<String, Instant>,
}

/// How often a long stage says how far it is where there are no bars.
const STILL_RUNNING: Duration = Duration::from_secs(30);

impl Lines {
    fn new(width: usize) -> Self {
        Lines { words: Words { width, colours: terminal::has_colours(&io::stderr()) }, last: BTreeMap::new() }
    }
}

impl Reporter for Lines {
    fn show(&mut self, event: &Event) {
        if let Some(text) = self.words.of(event) {
            tell(&text);
        }
        match event {
            Event::StageStarted { stage, .. } => drop(self.last.insert(stage.clone(), Instant::now())),
            Event::StageProgress { stage, part: None, done, total, unit } => {
                let last = self.last.entry(stage.clone()).or_insert_with(Instant::now);
                if last.elapsed() >= STILL_RUNNING {
                    *last = Instant::now();
                    tell(&self.words.row("running", stage, "", &format!("{done} of {total} {unit}")));
                }
            }
            _ => {}
        }
    }
}

/// A bar for each running stage, with rate and time left; finished stages scroll up as lines.
struct Bars {
    words: Words,
    all: MultiProgress,
    running: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn new(width: usize) -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Bars { words: Words { width, colours: terminal::has_colours(&io::stderr()) }, all, running: BTreeMap::new() }
    }

    fn bar(&mut self, stage: &str) -> &ProgressBar {
        let (width, all) = (self.words.width, &self.all);
        self.running.entry(stage.to_owned()).or_insert_with(|| {
            let bar = all.add(ProgressBar::no_length().with_prefix(format!("{stage:width$}")));
            bar.set_style(style(UNKNOWN));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        })
    }
}

/// The line of a stage that does not say how long it takes. A message takes what is left of the width.
const UNKNOWN: &str = "{spinner} running  {prefix}  {elapsed:>6}  {wide_msg}";

/// The line of a stage whose names take up to `names` columns: on a narrow terminal it says less, for a line that does not fit
/// is drawn again and again.
fn template(names: usize, columns: Option<usize>) -> &'static str {
    let left = columns.map_or(usize::MAX, |columns| columns.saturating_sub(names));
    match left {
        95.. => {
            "{spinner} running  {prefix}  {elapsed:>6}  [{bar:20}] {pos}/{len} {unit}, {rate}, {eta} left  {wide_msg}"
        }
        72.. => "{spinner} running  {prefix}  {elapsed:>6}  {pos}/{len} {unit}, {rate}, {eta} left  {wide_msg}",
        42.. => "{spinner} running  {prefix}  {pos}/{len}, {eta} left  {wide_msg}",
        _ => "{prefix}  {percent:>3} %",
    }
}

fn style(template: &str) -> ProgressStyle {
    let rate = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
        // Nothing can be said of a text that cannot be written.
        let _ = write!(text, "{:.1}/s", state.per_sec());
    };
    let style = ProgressStyle::with_template(template).expect("the template is a constant");
    style.with_key("rate", rate).progress_chars("=> ")
}

impl Reporter for Bars {
    fn show(&mut self, event: &Event) {
        match event {
            Event::StageStarted { stage, .. } | Event::StageWaiting { stage, .. } => {
                let text = if matches!(event, Event::StageWaiting { .. }) { "another process runs it" } else { "" };
                self.bar(stage).set_message(text);
            }
            Event::StageProgress { stage, part: None, done, total, unit } => {
                let width = self.words.width;
                let bar = self.bar(stage);
                if bar.length() != Some(*total) {
                    bar.set_style(style(&template(width, terminal::width()).replace("{unit}", unit)));
                    bar.set_length(*total);
                    // What was done by earlier attempts says nothing about the rate of this one.
                    bar.set_position(*done);
                    bar.reset_eta();
                }
                bar.set_position(*done);
            }
            Event::StageMetrics { stage, part, row } => {
                if let Some(text) = key_metric(row) {
                    let part = part.as_ref().map(|part| format!("{part} ")).unwrap_or_default();
                    self.bar(stage).set_message(part + &text);
                }
            }
            Event::StageReused { stage, .. }
            | Event::StageFinished { stage, .. }
            | Event::StageFailed { stage, .. }
            | Event::StageStopped { stage, .. } => {
                if let Some(bar) = self.running.remove(stage) {
                    bar.finish_and_clear();
                }
            }
            _ => {}
        }
        if let Some(text) = self.words.of(event) {
            self.all.suspend(|| tell(&text));
        }
    }
}

/// Events in words, aligned.
struct Words {
    width: usize,
    colours: bool,
}

impl Words {
    fn of(&self, event: &Event) -> Option<String> {
        Some(match event {
            Event::StageReused { stage, recorded_seconds, metrics, .. } => {
                let took = recorded_seconds.map(|seconds| format!("took {} when made", duration(seconds)));
                let what = key_metric(metrics).or(took).unwrap_or_default();
                self.row("reused", stage, "", &what)
            }
            Event::StageWaiting { stage, .. } => self.row("waiting", stage, "", "another process runs it"),
            Event::StageResumed { stage, round, rounds } => {
                self.row("resumed", stage, "", &format!("after round {round} of {rounds}"))
            }
            Event::StageWarned { stage, part, text } | Event::StageNoted { stage, part, text } => {
                let word = if matches!(event, Event::StageNoted { .. }) { "note" } else { "warning" };
                let place = part.as_ref().map(|part| format!("{part}: ")).unwrap_or_default();
                self.row(word, stage, "", &format!("{place}{text}"))
            }
            Event::RunStopping { seconds, .. } => {
                format!("stopping: what is done is kept, for at most {seconds:.0} s; a second signal ends all at once")
            }
            Event::StageFinished { stage, reason, seconds, metrics, .. } => {
                self.row("ran", stage, &duration(*seconds), &key_metric(metrics).unwrap_or_else(|| reason.clone()))
            }
            Event::StageFailed { stage, error, log, log_end, .. } => {
                let mut text = self.row("failed", stage, "", error);
                for line in log_end {
                    text += &format!("\n    | {}", printable(line));
                }
                if !log_end.is_empty() {
                    text += &format!("\n    log: {}", printable(log));
                }
                text
            }
            Event::StageSkipped { stage, needs } => self.row("skipped", stage, "", &format!("needs `{needs}`")),
            Event::StageStopped { stage, cut } => {
                let what = match cut {
                    Some((round, rounds)) => format!("the next run goes on after round {round} of {rounds}"),
                    None => "the next run begins it anew".into(),
                };
                self.row("stopped", stage, "", &what)
            }
            Event::RunFinished { status, ran, reused, failed, seconds } => {
                let word = match status {
                    Status::Done => "done",
                    Status::Failed => "failed",
                    Status::Interrupted => "interrupted",
                };
                let failed = if *failed > 0 { format!(", {failed} failed") } else { String::new() };
                format!("{word}: {ran} ran, {reused} reused{failed} in {}", duration(*seconds))
            }
            Event::RunStarted { .. }
            | Event::StageStarted { .. }
            | Event::StageProgress { .. }
            | Event::StageMetrics { .. }
            | Event::StageCut { .. } => return None,
        })
    }

    fn row(&self, word: &str, stage: &str, time: &str, what: &str) -> String {
        let (width, what) = (self.width, printable_lines(what));
        let padded = format!("{word:<7}");
        let word = if self.colours { format!("\u{1b}[{}m{padded}\u{1b}[0m", colour(word)) } else { padded };
        format!("{word}  {stage:width$}  {time:>7}  {what}").trim_end().to_owned()
    }
}

fn colour(word: &str) -> &'static str {
    match word {
        "failed" => "31;1",
        "warning" | "stopped" | "skipped" | "waiting" => "33",
        "ran" | "resumed" => "32",
        _ => "2",
    }
}

/// The number that says most about a stage: its first metric that is not a count of rounds.
fn key_metric(metrics: &Map<String, Json>) -> Option<String> {
    const COUNTS: [&str; 6] = ["round", "epoch", "update", "tokens", "learning_rate", "gradient_norm"];
    let wanted =
        ["accuracy", "rouge_l", "loss"].iter().find(|name| metrics.contains_key(**name)).map(|name| (*name).to_owned());
    let first = || metrics.keys().find(|name| !COUNTS.contains(&name.as_str())).cloned();
    let name = wanted.or_else(first)?;
    let value = &metrics[&name];
    if value.get("not_measured").is_some() {
        return Some(format!("{name} not measured"));
    }
    let number = value.as_f64().or_else(|| value.get("mean").and_then(Json::as_f64));
    match (number, value) {
        (Some(number), _) => Some(format!("{name} {}", crate::ground::terminal::figure(number))),
        // The stages of a loop, each with its own: the last that measured something says how it went.
        (None, Json::Object(_)) => metrics
            .iter()
            .rev()
            .find_map(|(part, inner)| key_metric(inner.as_object()?).map(|text| format!("{part} {text}"))),
        _ => None,
    }
}

/// Seconds as people say them: `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 03 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 9.995 => format!("{seconds:.2} s"),
        _ if seconds < 99.95 => format!("{seconds:.1} s"),
        0..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn durations_read_well() {
        let cases = [
            (0.004, "0.00 s"),
            (9.99, "9.99 s"),
            (9.999, "10.0 s"),
            (99.9, "99.9 s"),
            (99.99, "1 min 40 s"),
            (7384.0, "2 h 03 min"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn rows_are_aligned_without_colour() {
        let words = Words { width: 7, colours: false };
        let metrics = json!({"round": 3, "score": {"mean": 61.25}}).as_object().unwrap().clone();
        let (key, reason) = (String::new(), "not run before".into());
        let event = Event::StageFinished { stage: "score".into(), key, reason, seconds: 1.25, metrics };
        assert_eq!(words.of(&event).unwrap(), "ran      score     1.25 s  score 61.25");
        let event = Event::StageSkipped { stage: "after".into(), needs: "score".into() };
        assert_eq!(words.of(&event).unwrap(), "skipped  after             needs `score`");
    }
}
