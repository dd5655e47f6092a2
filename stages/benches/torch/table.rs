//! The table: a row for every line and way of PyTorch's.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::roofline::{Rates, phases};
use crate::task::Line;
use crate::{Measured, Runs};

const HEADINGS: [&str; 12] = [
    "line",
    "PyTorch's way",
    "ours ms",
    "theirs ms",
    "ours/theirs",
    "ours tok/s",
    "theirs tok/s",
    "of roofline",
    "ours MiB (above idle)",
    "theirs MiB (above idle)",
    "memory ours/theirs",
    "same",
];

/// Prints the figures of all lines.
pub(crate) fn print(measured: &[Measured], rates: Rates) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(HEADINGS);
    for measured in measured {
        for row in rows(measured, rates) {
            table.add_row(row);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}\n");
    println!(
        "* the fastest of PyTorch's ways; times are medians; ours/theirs is the median of neighbours' ratios [least, most]"
    );
    println!(
        "memory is the largest of the process, its models' loading included; in brackets what is above an idle one"
    );
    println!(
        "roofline: products of matrices at {:.0} GFLOP/s, memory at {:.1} GB/s, as measured in this run",
        rates.operations / 1e9,
        rates.bytes / 1e9
    );
}

/// The rows of a line, one for each of PyTorch's ways.
pub(crate) fn rows(measured: &Measured, rates: Rates) -> Vec<Vec<String>> {
    let (ours, theirs) = measured.sides.split_first().expect("our side is always there");
    let own = median(ours.seconds());
    let share = rates.bound(&phases(&measured.line, measured.element, ours.tokens())) / own;
    let fastest = theirs.iter().map(|side| median(side.seconds())).fold(f64::INFINITY, f64::min);
    let row = |theirs: Option<&Runs>| {
        let beside = |cell: &dyn Fn(&Runs) -> String| theirs.map_or(String::new(), cell);
        vec![
            measured.line.name.clone(),
            beside(&|side| format!("{}{}", side.way, if median(side.seconds()) == fastest { " *" } else { "" })),
            milliseconds(own),
            beside(&|side| milliseconds(median(side.seconds()))),
            beside(&|side| ratio(ours, side)),
            format!("{:.0}", ours.rate()),
            beside(&|side| format!("{:.0}", side.rate())),
            format!("{:.0} %", 100.0 * share),
            memory(ours),
            beside(&memory),
            beside(&|side| {
                let above = ours.above_idle() as f64 / side.above_idle() as f64;
                format!("{:.2} ({above:.2})", ours.peak() as f64 / side.peak() as f64)
            }),
            beside(&|side| agreement(&ours.checks, &side.checks)),
        ]
    };
    if theirs.is_empty() { vec![row(None)] } else { theirs.iter().map(|side| row(Some(side))).collect() }
}

/// Prints time and memory of a line with one size larger, each beside the line itself.
pub(crate) fn print_growth(line: &Line, measured: &[(&str, usize, Measured)]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([&line.name, "ours ms", "theirs ms", "ours MiB above idle", "theirs MiB above idle"]);
    let figures = |measured: &Measured| -> Vec<f64> {
        let (ours, theirs) = measured.sides.split_first().expect("our side is always there");
        let fastest = theirs.iter().min_by(|a, b| median(a.seconds()).total_cmp(&median(b.seconds())));
        let of = |figure: &dyn Fn(&Runs) -> f64| [figure(ours), fastest.map_or(f64::NAN, figure)];
        let [times, memories] =
            [of(&|side| 1e3 * median(side.seconds())), of(&|side| side.above_idle() as f64 / 1024.0)];
        [times, memories].concat()
    };
    let start = figures(&measured[0].2);
    for (size, factor, measured) in measured {
        let cells = figures(measured).into_iter().zip(&start).map(|(figure, start)| match *factor {
            // There is no PyTorch to compare with.
            _ if figure.is_nan() => String::new(),
            1 => format!("{figure:.0}"),
            _ => format!("{figure:.0} (x {:.2})", figure / start),
        });
        let label = if *factor == 1 { "as it is".to_owned() } else { format!("{size} x {factor}") };
        table.add_row(std::iter::once(label).chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}\n");
}

impl Runs {
    fn seconds(&self) -> Vec<f64> {
        self.runs.iter().map(|ran| ran.seconds).collect()
    }

    /// Tokens of a run, on average.
    fn tokens(&self) -> f64 {
        self.runs.iter().map(|ran| ran.tokens).sum::<usize>() as f64 / self.runs.len() as f64
    }

    /// Tokens a second.
    fn rate(&self) -> f64 {
        self.tokens() * self.runs.len() as f64 / self.seconds().iter().sum::<f64>()
    }

    /// Largest memory, KiB: of the accelerator where there is one, else of the process.
    fn peak(&self) -> u64 {
        self.ended.device_kib.unwrap_or(self.ended.peak_kib)
    }

    /// What of that was taken since the models were loaded; on an accelerator, all.
    fn above_idle(&self) -> u64 {
        self.peak().saturating_sub(self.ended.device_kib.map_or(self.idle_kib, |_| 0))
    }
}

fn milliseconds(seconds: f64) -> String {
    let digits = if seconds < 0.1 { 1 } else { 0 };
    format!("{:.digits$}", 1e3 * seconds)
}

fn memory(side: &Runs) -> String {
    format!("{} ({})", side.peak() >> 10, side.above_idle() >> 10)
}

/// The median of neighbours' ratios with the least and the largest, and the ratio of the two least times.
fn ratio(ours: &Runs, theirs: &Runs) -> String {
    let ratios: Vec<f64> = ours.seconds().iter().zip(theirs.seconds()).map(|(own, other)| own / other).collect();
    let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    let best = least(&ours.seconds()) / least(&theirs.seconds());
    format!("{:.2} [{:.2}, {most:.2}] {best:.2}", median(ratios.clone()), least(&ratios))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// How far the two sides' numbers are apart: the largest relative difference, `yes` where it is 0.
fn agreement(ours: &[f64], theirs: &[f64]) -> String {
    if ours.len() != theirs.len() {
        return format!("NO: {} and {} numbers", ours.len(), theirs.len());
    }
    if ours.is_empty() {
        return "-".to_owned();
    }
    let worst = ours.iter().zip(theirs).map(|(own, other)| (own - other).abs() / other.abs().max(1e-30));
    let worst = worst.fold(0.0, f64::max);
    match worst {
        0.0 => "yes".to_owned(),
        close if close <= 1e-4 => format!("to {close:.0e}"),
        far => format!("NO: {far:.1e}"),
    }
}
