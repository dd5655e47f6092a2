//! A comparison as a table: for a terminal, as Markdown, LaTeX, CSV or JSON. All show the same numbers.

use anyhow::Result;
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};
use serde_json::{Value as Json, json};

use super::comparison::{Better, Comparison, Entry, Figure, Of, Repeat, Settings, Verdict, setting};
use crate::ground::terminal::{figure, printable};
use crate::ground::trouble::BadRequest;

/// A language to write a table in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    Markdown,
    Latex,
    Csv,
    Json,
}

/// What of a comparison is shown, and how.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// Measures run down and variants across.
    pub transpose: bool,
    /// Leaves out measures that are the same for all.
    pub only_differing: bool,
    /// Measures by heading or metric, in this order; none: all.
    pub columns: Vec<String>,
}

/// Writes a comparison. `name` is the pipeline's, `command` what prints the table again: LaTeX keeps both.
pub(crate) fn write(comparison: &Comparison, form: Form, view: &View, name: &str, command: &str) -> Result<String> {
    let comparison = view.of(comparison)?;
    Ok(match form {
        Form::Text => text(&comparison, view),
        Form::Markdown => markdown(&comparison, view),
        Form::Latex => latex(&comparison, view, name, command),
        Form::Csv => csv(&comparison),
        Form::Json => json(&comparison),
    })
}

impl View {
    /// The measures that are to be shown.
    fn of(&self, comparison: &Comparison) -> Result<Comparison> {
        let measures = &comparison.measures;
        let mut shown: Vec<usize> = (0..measures.len()).collect();
        let mut has_seconds = comparison.has_seconds;
        if !self.columns.is_empty() {
            shown.clear();
            has_seconds = false;
            for column in &self.columns {
                let is_meant = |heading: &str, metric: Option<&str>| heading == column || metric == Some(column);
                let found = measures.iter().position(|it| is_meant(&it.heading, it.metric.as_deref()));
                match found {
                    Some(index) => shown.push(index),
                    None if column == SECONDS && comparison.has_seconds => has_seconds = true,
                    None => {
                        let known: Vec<_> = measures.iter().map(|it| format!("`{}`", it.heading)).collect();
                        let message = format!("the report has no column `{column}`; it has {}", known.join(", "));
                        return Err(BadRequest(message).into());
                    }
                }
            }
        }
        if self.only_differing {
            shown.retain(|index| {
                let mut means = comparison.lines.iter().filter_map(|line| Some(line.figures[*index].figure()?.mean));
                let first = means.next();
                means.any(|mean| Some(mean) != first)
            });
        }
        let mut view = comparison.clone();
        let of = |all: &[Entry]| shown.iter().map(|index| all[*index].clone()).collect::<Vec<_>>();
        view.measures = shown.iter().map(|index| measures[*index].clone()).collect();
        view.lines.iter_mut().for_each(|line| line.figures = of(&line.figures));
        for difference in &mut view.differences {
            difference.figures = shown.iter().map(|index| difference.figures[*index].clone()).collect();
        }
        view.has_seconds = has_seconds;
        Ok(view)
    }
}

const SECONDS: &str = "seconds";

/// Cells in rows, ready to be written; the first row and column are headings.
struct Grid {
    rows: Vec<Vec<String>>,
    /// Rows above which something else begins.
    breaks: Vec<usize>,
}

/// How a language writes what a cell shows.
trait Cells {
    fn text(&self, text: &str) -> String;
    fn heading(&self, heading: &str, better: Better) -> String;
    fn entry(&self, entry: &Entry, verdict: Option<Verdict>) -> String;
}

fn grid(comparison: &Comparison, view: &View, cells: &impl Cells) -> Grid {
    let measures = &comparison.measures;
    let headings = measures.iter().map(|measure| cells.heading(&measure.heading, measure.better));
    let seconds = comparison.has_seconds.then(|| cells.text(SECONDS));
    let mut rows = vec![[cells.text("variant")].into_iter().chain(headings).chain(seconds).collect::<Vec<_>>()];
    for (index, line) in comparison.lines.iter().enumerate() {
        let difference = comparison.differences.iter().find(|difference| difference.line == index);
        let verdict = |at: usize| difference.and_then(|difference| difference.figures[at].verdict);
        let figures = line.figures.iter().enumerate().map(|(at, entry)| cells.entry(entry, verdict(at)));
        let seconds = match line.seconds {
            Some(seconds) => format!("{seconds:.1}"),
            None if line.variant.is_some() => "-".to_owned(),
            None => String::new(),
        };
        let seconds = comparison.has_seconds.then_some(seconds);
        rows.push([cells.text(&line.label)].into_iter().chain(figures).chain(seconds).collect());
    }
    let mut breaks = vec![rows.len()];
    for difference in &comparison.differences {
        let figures = difference.figures.iter().map(|compared| cells.entry(&compared.entry, None));
        let label = cells.text(&comparison.difference_label(difference));
        let seconds = comparison.has_seconds.then(String::new);
        rows.push([label].into_iter().chain(figures).chain(seconds).collect());
    }
    if view.transpose {
        rows = (0..rows[0].len()).map(|at| rows.iter().map(|row| row[at].clone()).collect()).collect();
        breaks.clear();
    }
    Grid { rows, breaks }
}

/// `81.25 ± 5.76`, `90.91 [89.32, 92.35]`, `7.2`.
pub(crate) fn in_words(shown: &Figure) -> String {
    let mean = figure(shown.mean);
    match (shown.interval, shown.of) {
        (Some((low, high)), Of::Repeats) => format!("{mean} ± {}", figure((high - low) / 2.0)),
        (Some((low, high)), _) => format!("{mean} [{}, {}]", figure(low), figure(high)),
        (None, _) => mean,
    }
}

struct Plain;

impl Cells for Plain {
    fn text(&self, text: &str) -> String {
        printable(text)
    }

    fn heading(&self, heading: &str, _better: Better) -> String {
        printable(heading)
    }

    fn entry(&self, entry: &Entry, _verdict: Option<Verdict>) -> String {
        match entry {
            Entry::Empty => String::new(),
            Entry::Missing => "-".into(),
            Entry::NotMeasured => "not measured".into(),
            Entry::Measured(figure) => in_words(figure),
        }
    }
}

/// What stands below a table.
fn below(comparison: &Comparison) -> Vec<String> {
    let (verdicts, notes) = (comparison.verdicts(), comparison.notes());
    verdicts.into_iter().chain(notes).map(|line| printable(&line)).collect()
}

fn text(comparison: &Comparison, view: &View) -> String {
    let grid = grid(comparison, view, &Plain);
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none())).set_header(&grid.rows[0]);
    for row in &grid.rows[1..] {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.set_content_arrangement(ContentArrangement::Disabled);
    let below: String = below(comparison).into_iter().map(|line| line + "\n").collect();
    format!("{}\n{below}", table.trim_fmt())
}

fn markdown(comparison: &Comparison, view: &View) -> String {
    let mut rows = grid(comparison, view, &Plain).rows;
    rows.iter_mut().flatten().for_each(|cell| *cell = cell.replace('\\', "\\\\").replace('|', "\\|"));
    let columns = rows[0].len();
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0).max(3);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (at, cell) in row.iter().enumerate() {
            let width = widths[at];
            text += &if at == 0 { format!("| {cell:width$} |") } else { format!(" {cell:>width$} |") };
        }
        text.push('\n');
        if index == 0 {
            let rule = |(at, width): (usize, &usize)| match at {
                0 => format!("|{}|", "-".repeat(width + 2)),
                _ => format!("{}:|", "-".repeat(width + 1)),
            };
            text += &(widths.iter().enumerate().map(rule).collect::<String>() + "\n");
        }
    }
    // Lines of a paragraph would flow into one.
    let below = below(comparison).join("  \n");
    if below.is_empty() { text } else { format!("{text}\n{below}\n") }
}

struct Latex;

impl Cells for Latex {
    fn text(&self, text: &str) -> String {
        tex(text)
    }

    fn heading(&self, heading: &str, better: Better) -> String {
        let arrow = if better == Better::Lower { "\\downarrow" } else { "\\uparrow" };
        format!("{} ${arrow}$", tex(heading))
    }

    fn entry(&self, entry: &Entry, verdict: Option<Verdict>) -> String {
        let shown = match entry {
            Entry::Empty => return String::new(),
            Entry::Missing => return "--".into(),
            Entry::NotMeasured => return "not measured".into(),
            Entry::Measured(shown) => shown,
        };
        // Bold is what is better than the baseline beyond doubt, not what happens to be highest.
        let mean = figure(shown.mean);
        let mean = if verdict == Some(Verdict::Better) { format!("\\mathbf{{{mean}}}") } else { mean };
        match (shown.interval, shown.of) {
            (Some((low, high)), Of::Repeats) => format!("${mean} \\pm {}$", figure((high - low) / 2.0)),
            (Some((low, high)), _) => format!("${mean}$ {{\\footnotesize $[{}, {}]$}}", figure(low), figure(high)),
            (None, _) => format!("${mean}$"),
        }
    }
}

/// Text as LaTeX prints it, whatever it holds.
fn tex(text: &str) -> String {
    let mut escaped = String::new();
    for c in printable(text).chars() {
        match c {
            '%' | '_' | '&' | '#' | '$' | '{' | '}' => escaped.extend(['\\', c]),
            '~' => escaped.push_str("\\textasciitilde{}"),
            '^' => escaped.push_str("\\textasciicircum{}"),
            '\\' => escaped.push_str("\\textbackslash{}"),
            '<' => escaped.push_str("\\textless{}"),
            '>' => escaped.push_str("\\textgreater{}"),
            '±' => escaped.push_str("$\\pm$"),
            // What begins a row would be taken for the length of a gap or the option of a command.
            '[' | ']' => escaped.extend(['{', c, '}']),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The table alone, with `booktabs`: no document around it, no rules down.
fn latex(comparison: &Comparison, view: &View, name: &str, command: &str) -> String {
    let grid = grid(comparison, view, &Latex);
    let mut text = format!("% {}\n% pipeline {}\n", printable(command), env!("CARGO_PKG_VERSION"));
    for repeat in measured(comparison) {
        text += &format!("% {} {}: {}\n", repeat.key, printable(&repeat.stage), printable(&repeat.cell));
    }
    let columns = "r".repeat(grid.rows[0].len() - 1);
    text += "\\begin{table}\n  \\centering\n";
    text += &format!("  \\caption{{{}}}\n  \\label{{tab:{}}}\n", tex(&below(comparison).join(". ")), label(name));
    text += &format!("  \\begin{{tabular}}{{l{columns}}}\n    \\toprule\n");
    for (index, row) in grid.rows.iter().enumerate() {
        if index == 1 || index > 1 && grid.breaks.contains(&index) {
            text += "    \\midrule\n";
        }
        text += &format!("    {} \\\\\n", row.join(" & "));
    }
    text + "    \\bottomrule\n  \\end{tabular}\n\\end{table}\n"
}

/// A name that references can use.
fn label(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

/// Every measurement that a table rests on, each once.
fn measured(comparison: &Comparison) -> Vec<&Repeat> {
    let mut found: Vec<&Repeat> = Vec::new();
    for repeat in
        comparison.lines.iter().flat_map(|line| &line.figures).filter_map(Entry::figure).flat_map(|it| &it.repeats)
    {
        if found.iter().all(|other| other.key != repeat.key) {
            found.push(repeat);
        }
    }
    found
}

/// In long form, with full precision: a measurement a row, then means, then differences. Who reads it pivots it.
fn csv(comparison: &Comparison) -> String {
    let over = paths(comparison.lines.iter().map(|line| &line.over));
    let figures = comparison.lines.iter().flat_map(|line| &line.figures).filter_map(Entry::figure);
    let repeats = paths(figures.flat_map(|figure| &figure.repeats).map(|repeat| &repeat.settings));
    let mut text = String::new();
    let mut row = |fields: Vec<String>| text += &(fields.join(",") + "\n");
    let fixed = ["level", "label", "variant"].map(str::to_owned);
    let rest = ["metric", "value", "low", "high", "n", "of", "p", "p_corrected", "verdict", "stage", "key"];
    row(fixed
        .into_iter()
        .chain(over.iter().chain(&repeats).map(|path| quoted(path)))
        .chain(rest.map(str::to_owned))
        .collect());
    let value_of = |settings: &[(String, Json)], path: &str| {
        settings.iter().find(|(known, _)| known == path).map_or(String::new(), |(_, value)| quoted(&setting(value)))
    };
    let number = |number: f64| number.to_string();
    let ends = |interval: Option<(f64, f64)>| {
        interval.map_or_else(Default::default, |(low, high)| [number(low), number(high)])
    };
    let of = |of: Of| match of {
        Of::Nothing => "",
        Of::Stage => "stage",
        Of::Repeats => "repeats",
        Of::Rows => "rows",
    };
    for (at, measure) in comparison.measures.iter().enumerate() {
        let metric = quoted(&measure.heading);
        for line in &comparison.lines {
            let Some(shown) = line.figures[at].figure() else { continue };
            let head = |level: &str, settings: &[(String, Json)]| {
                let label =
                    [level.to_owned(), quoted(&line.label), quoted(line.variant.as_deref().unwrap_or_default())];
                let over = over.iter().map(|path| value_of(&line.over, path));
                let repeats = repeats.iter().map(|path| value_of(settings, path));
                label.into_iter().chain(over).chain(repeats).collect::<Vec<_>>()
            };
            for repeat in &shown.repeats {
                let [low, high] = ends(repeat.interval);
                let own = if repeat.interval.is_some() { "stage" } else { "" };
                let none = String::new;
                let tail =
                    [metric.clone(), number(repeat.mean), low, high, "1".into(), own.into(), none(), none(), none()];
                let from = [quoted(&repeat.stage), repeat.key.to_string()];
                row(head("repeat", &repeat.settings).into_iter().chain(tail).chain(from).collect());
            }
            let [low, high] = ends(shown.interval);
            let tail = [metric.clone(), number(shown.mean), low, high, shown.n.to_string(), of(shown.of).into()];
            row(head("mean", &[]).into_iter().chain(tail).chain(vec![String::new(); 5]).collect());
        }
        for difference in &comparison.differences {
            let compared = &difference.figures[at];
            let Some(shown) = compared.entry.figure() else { continue };
            let line = &comparison.lines[difference.line];
            let label = quoted(&comparison.difference_label(difference));
            let head = ["difference".to_owned(), label, quoted(line.variant.as_deref().unwrap_or_default())];
            let over = over.iter().map(|path| value_of(&line.over, path));
            let [low, high] = ends(shown.interval);
            let chance = |p: Option<f64>| p.map_or(String::new(), number);
            let verdict = compared.verdict.map_or("", Verdict::words);
            let tail = [metric.clone(), number(shown.mean), low, high, shown.n.to_string(), of(shown.of).into()];
            let judged = [chance(compared.p), chance(compared.corrected), verdict.into(), String::new(), String::new()];
            let empty = repeats.iter().map(|_| String::new());
            row(head.into_iter().chain(over).chain(empty).chain(tail).chain(judged).collect());
        }
    }
    text
}

/// The paths of all these settings, each once.
fn paths<'s>(all: impl Iterator<Item = &'s Settings>) -> Vec<String> {
    let mut paths: Vec<String> = Vec::new();
    for (path, _) in all.flatten() {
        if !paths.contains(path) {
            paths.push(path.clone());
        }
    }
    paths
}

/// A field as RFC 4180 has it; what a spreadsheet would take for a formula is kept from that by an apostrophe.
fn quoted(text: &str) -> String {
    let is_number = text.parse::<f64>().is_ok();
    let text = if text.starts_with(['=', '+', '-', '@']) && !is_number { format!("'{text}") } else { text.to_owned() };
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

fn json(comparison: &Comparison) -> String {
    let mut whole = json!({ "schema": 1 });
    whole["comparison"] = serde_json::to_value(comparison).expect("a comparison is JSON");
    let lines = comparison.differences.iter().map(|it| json!(comparison.difference_label(it)));
    whole["differences"] = lines.collect();
    whole["notes"] = json!(below(comparison));
    let mut text = serde_json::to_string_pretty(&whole).expect("JSON can be written");
    text.push('\n');
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use cache::Key;

    use super::*;
    use crate::report::comparison::{Compared, Correlation, Difference, Line, Measure};

    /// Two variants with three repeats, and a teacher.
    pub(crate) fn sample() -> Comparison {
        let key = Key::of(&json!({"a": 1}));
        let repeat = |seed: u64, mean: f64| Repeat {
            settings: vec![("params.seed".into(), json!(seed))],
            mean,
            interval: Some((mean - 2.0, mean + 2.0)),
            key,
            stage: "score".into(),
            cell: format!("kd seed={seed}"),
        };
        let over = |means: [f64; 3]| {
            let estimated = crate::report::statistics::of_repeats(&means).unwrap();
            let repeats = [10, 20, 30].into_iter().zip(means).map(|(seed, mean)| repeat(seed, mean)).collect();
            Entry::Measured(Figure {
                mean: estimated.mean,
                interval: Some(estimated.interval),
                n: 3,
                of: Of::Repeats,
                repeats,
            })
        };
        let own =
            Figure { mean: 90.0, interval: Some((88.0, 92.0)), n: 1, of: Of::Stage, repeats: vec![repeat(0, 90.0)] };
        let line = |label: &str, variant: Option<&str>, figures| Line {
            label: label.into(),
            variant: variant.map(str::to_owned),
            over: Vec::new(),
            figures,
            seconds: variant.map(|_| 12.34),
            cells: vec![label.into()],
        };
        let measure = |heading: &str, better| Measure {
            heading: heading.into(),
            metric: Some(format!("score.{heading}")),
            better,
        };
        let difference = over([1.0, 1.5, 2.0]);
        let compared =
            |entry: Entry| Compared { entry, p: Some(0.003), corrected: Some(0.006), verdict: Some(Verdict::Better) };
        let empty = Compared { entry: Entry::Missing, p: None, corrected: None, verdict: None };
        Comparison {
            measures: vec![measure("rouge_l", Better::Higher), measure("a|b", Better::Lower)],
            lines: vec![
                line("kd", Some("kd"), vec![over([81.0, 82.0, 83.0]), Entry::NotMeasured]),
                line("sft", Some("sft"), vec![over([80.0, 80.9, 81.8]), Entry::Missing]),
                line("teacher_1", None, vec![Entry::Measured(own), Entry::Empty]),
            ],
            differences: vec![Difference { line: 0, baseline: 1, figures: vec![compared(difference), empty] }],
            correlations: vec![Correlation {
                measure: "a|b".into(),
                with: "rouge_l".into(),
                r: -0.5,
                interval: (-0.9, 0.25),
                n: 6,
                p: 0.3,
                corrected: 0.3,
            }],
            same: BTreeSet::new(),
            has_seconds: true,
            caption: Some("in percent: 100 % is all".into()),
        }
    }

    fn written(form: Form, view: &View) -> String {
        write(&sample(), form, view, "my table", "pipeline compare x.yaml").unwrap()
    }

    #[test]
    fn a_table_for_a_terminal_and_in_markdown() {
        let text = written(Form::Text, &View::default());
        let row = text.lines().find(|line| line.trim_start().starts_with("kd ")).unwrap();
        assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["kd", "82", "±", "2.48", "not", "measured", "12.3"]);
        assert!(text.contains("rouge_l against sft: better: kd"), "{text}");
        assert!(text.contains("a|b is not shown to go with rouge_l: r -0.50 [-0.90, 0.25] over 6 cells"), "{text}");
        let markdown = written(Form::Markdown, &View::default());
        assert!(markdown.contains(" a\\|b |") && markdown.contains("-:|"), "{markdown}");
        assert!(markdown.contains("|  1.5 ± 1.24 |"), "{markdown}");
    }

    #[test]
    fn latex_needs_booktabs_alone() {
        let latex = written(Form::Latex, &View::default());
        for part in [
            "$\\mathbf{82} \\pm 2.48$",
            "teacher\\_1 & $90$ {\\footnotesize $[88, 92]$} &  &",
            "rouge\\_l $\\uparrow$",
            "a|b $\\downarrow$",
            "100 \\% is all",
            "\\label{tab:my-table}",
            "\\toprule",
        ] {
            assert!(latex.contains(part), "{part} in {latex}");
        }
        assert_eq!(tex("a\\b~c^d{e}[f]"), "a\\textbackslash{}b\\textasciitilde{}c\\textasciicircum{}d\\{e\\}{[}f{]}");
    }

    #[test]
    fn csv_is_long_and_exact() {
        let csv = written(Form::Csv, &View::default());
        let lines: Vec<&str> = csv.lines().collect();
        let head = "level,label,variant,params.seed,metric,value,low,high,n,of,p,p_corrected,verdict,stage,key";
        assert_eq!(lines[0], head);
        assert!(lines[1].starts_with("repeat,kd,kd,10,rouge_l,81,79,83,1,stage,,,,score,"), "{}", lines[1]);
        assert!(
            lines[4].starts_with("mean,kd,kd,,rouge_l,82,79.5158") && lines[4].contains(",3,repeats,"),
            "{}",
            lines[4]
        );
        let difference = lines.iter().find(|line| line.starts_with("difference")).unwrap();
        assert!(
            difference.starts_with("difference,kd - sft,kd,,rouge_l,1.5,")
                && difference.ends_with(",3,repeats,0.003,0.006,better,,")
        );
        let commas = |line: &&str| line.matches(',').count();
        assert!(lines.iter().all(|line| commas(line) == commas(&head)), "{csv}");
        assert_eq!([quoted("=1+1"), quoted("-3"), quoted("a,\"b\"")], ["'=1+1", "-3", "\"a,\"\"b\"\"\""]);
    }

    #[test]
    fn json_has_all_numbers() {
        let json: Json = serde_json::from_str(&written(Form::Json, &View::default())).unwrap();
        assert_eq!(json["comparison"]["lines"][0]["figures"][0]["mean"], 82.0);
        assert_eq!(json["comparison"]["differences"][0]["figures"][0]["verdict"], "better");
        assert_eq!(json["comparison"]["lines"][0]["figures"][0]["repeats"][1]["settings"][0][1], 20);
    }

    #[test]
    fn columns_can_be_chosen_and_turned() {
        let chosen = View { columns: vec!["score.rouge_l".into()], ..View::default() };
        let text = written(Form::Markdown, &chosen);
        assert!(!text.contains("a\\|b") && !text.contains("seconds"), "{text}");
        let turned = written(Form::Markdown, &View { transpose: true, ..View::default() });
        assert!(
            turned.starts_with("| variant |") && turned.lines().next().unwrap().contains(" kd - sft |"),
            "{turned}"
        );
        assert!(turned.lines().any(|line| line.starts_with("| seconds |")), "{turned}");
        let differing = written(Form::Markdown, &View { only_differing: true, ..View::default() });
        assert!(differing.contains("rouge_l") && !differing.contains("a\\|b"), "{differing}");
        let error =
            write(&sample(), Form::Text, &View { columns: vec!["x".into()], ..View::default() }, "", "").unwrap_err();
        assert_eq!(error.to_string(), "the report has no column `x`; it has `rouge_l`, `a|b`");
    }
}
