//! What was compared, as charts.

use chart::{Axis, Dots, Estimate, Figure, Heat, Sweep, Swept};
use serde_json::Value as Json;

use crate::report::comparison::{Better, Comparison, Figure as Number, Line, Measure, Of, setting};

/// Lines of one chart: more are not told apart, and the table has them all.
const ROWS: usize = 30;

/// For each measure every line with its repeats, and where a number was varied, what it led to.
pub(crate) fn outcomes(comparison: &Comparison) -> Vec<Figure> {
    let paths = varied(comparison);
    let mut figures = Vec::new();
    for (at, measure) in comparison.measures.iter().enumerate() {
        for path in &paths {
            figures.extend(sweep(comparison, at, measure, path));
        }
        if let [down, across] = paths.as_slice() {
            figures.extend(heat(comparison, at, measure, down, across));
        }
        if paths.is_empty() || !paths.iter().any(|path| is_number(comparison, path)) {
            figures.extend(dots(comparison, at, measure));
            figures.extend(gains(comparison, at, measure));
        }
    }
    figures
}

/// One measure over one setting; over the variants where that is `variant`.
pub(crate) fn by(comparison: &Comparison, at: usize, path: &str) -> Option<Figure> {
    let measure = &comparison.measures[at];
    match path {
        "variant" => dots(comparison, at, measure),
        path if is_number(comparison, path) => sweep(comparison, at, measure, path),
        _ => dots(comparison, at, measure),
    }
}

/// Paths that take more than one value, in order.
pub(crate) fn varied(comparison: &Comparison) -> Vec<String> {
    let mut paths: Vec<(String, Vec<&Json>)> = Vec::new();
    for (path, value) in comparison.lines.iter().flat_map(|line| &line.over) {
        match paths.iter_mut().find(|(known, _)| known == path) {
            Some((_, values)) if values.contains(&value) => {}
            Some((_, values)) => values.push(value),
            None => paths.push((path.clone(), vec![value])),
        }
    }
    paths.into_iter().filter(|(_, values)| values.len() > 1).map(|(path, _)| path).collect()
}

fn values<'c>(comparison: &'c Comparison, path: &'c str) -> impl Iterator<Item = &'c Json> {
    let own = move |line: &'c Line| line.over.iter().find(|(known, _)| known == path).map(|(_, value)| value);
    comparison.lines.iter().filter_map(own)
}

fn is_number(comparison: &Comparison, path: &str) -> bool {
    let mut values = values(comparison, path).peekable();
    values.peek().is_some() && values.all(Json::is_number)
}

fn estimate(figure: &Number) -> Estimate {
    let repeats =
        if figure.of == Of::Repeats { figure.repeats.iter().map(|repeat| repeat.mean).collect() } else { Vec::new() };
    Estimate { repeats, mean: figure.mean, interval: figure.interval }
}

/// `ROUGE-L, higher is better`.
fn axis(measure: &Measure) -> Axis {
    let better = if measure.better == Better::Lower { "lower" } else { "higher" };
    Axis::of(&format!("{}, {better} is better", measure.heading))
}

fn dots(comparison: &Comparison, at: usize, measure: &Measure) -> Option<Figure> {
    let known =
        comparison.lines.iter().filter_map(|line| Some((line.label.clone(), estimate(line.figures[at].figure()?))));
    let mut rows: Vec<(String, Estimate)> = known.collect();
    let all = rows.len();
    let mut title = measure.heading.clone();
    if all > ROWS {
        rows.sort_by(|a, b| measure.better.score(b.1.mean).total_cmp(&measure.better.score(a.1.mean)));
        rows.truncate(ROWS);
        title += &format!(": the best {ROWS} of {all}");
    }
    let baseline = comparison.differences.first().map(|difference| &comparison.lines[difference.baseline]);
    let mark = baseline.and_then(|line| Some(line.figures[at].figure()?.mean));
    (!rows.is_empty()).then(|| Dots { title, description: None, value: axis(measure), rows, mark }.draw())
}

/// Differences to the baseline, around 0.
fn gains(comparison: &Comparison, at: usize, measure: &Measure) -> Option<Figure> {
    let known = comparison.differences.iter().filter_map(|difference| {
        let compared = &difference.figures[at];
        let verdict = compared.verdict.map_or("", |verdict| verdict.words());
        let label = format!("{}: {verdict}", comparison.lines[difference.line].label);
        Some((label, estimate(compared.entry.figure()?)))
    });
    let rows: Vec<_> = known.take(ROWS).collect();
    let than = &comparison.lines[comparison.differences.first()?.baseline].label;
    let title = format!("{}, more than {than}", measure.heading);
    let description =
        comparison.verdicts().into_iter().find(|text| text.starts_with(&format!("{} against", measure.heading)));
    (!rows.is_empty()).then(|| Dots { title, description, value: axis(measure), rows, mark: Some(0.0) }.draw())
}

fn sweep(comparison: &Comparison, at: usize, measure: &Measure, path: &str) -> Option<Figure> {
    if !is_number(comparison, path) {
        return None;
    }
    let mut series: Vec<Swept> = Vec::new();
    for line in &comparison.lines {
        let set = line.over.iter().find(|(known, _)| known == path).and_then(|(_, value)| value.as_f64());
        let (Some(x), Some(figure)) = (set, line.figures[at].figure()) else { continue };
        let others = line.over.iter().filter(|(known, _)| known != path);
        let others: String = others.map(|(path, value)| format!(" {}={}", last(path), setting(value))).collect();
        let label = format!("{}{others}", line.variant.as_deref().unwrap_or_default());
        match series.iter_mut().find(|swept| swept.label == label) {
            Some(swept) => swept.points.push((x, estimate(figure))),
            None => series.push(Swept { label, points: vec![(x, estimate(figure))] }),
        }
    }
    series.iter_mut().for_each(|swept| swept.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    // Those that came furthest, where there are too many to tell apart.
    let best = |swept: &Swept| {
        let scores = swept.points.iter().map(|(_, estimate)| measure.better.score(estimate.mean));
        scores.fold(f64::NEG_INFINITY, f64::max)
    };
    series.sort_by(|a, b| best(b).total_cmp(&best(a)));
    series.truncate(8);
    if let [alone] = series.as_mut_slice() {
        alone.label.clear();
    }
    let xs: Vec<f64> = series.iter().flat_map(|swept| &swept.points).map(|point| point.0).collect();
    let (low, high) = xs.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(*x), b.max(*x)));
    let x = if low > 0.0 && high / low >= 8.0 { Axis::log(path) } else { Axis::of(path) };
    let title = format!("{} by {}", measure.heading, last(path));
    (!series.is_empty()).then(|| Sweep { title, description: None, x, y: axis(measure), series }.draw())
}

fn heat(comparison: &Comparison, at: usize, measure: &Measure, down: &str, across: &str) -> Option<Figure> {
    let names = |path| {
        let mut names: Vec<String> = Vec::new();
        for name in values(comparison, path).map(setting) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    };
    let (rows, columns) = (names(down), names(across));
    let best = comparison.best().and_then(|best| comparison.lines[best].variant.clone())?;
    let mut values = vec![vec![None; columns.len()]; rows.len()];
    for line in comparison.lines.iter().filter(|line| line.variant.as_ref() == Some(&best)) {
        let set = |path: &str| line.over.iter().find(|(known, _)| known == path).map(|(_, value)| setting(value));
        let place = (set(down), set(across));
        let row = rows.iter().position(|row| Some(row) == place.0.as_ref());
        let column = columns.iter().position(|column| Some(column) == place.1.as_ref());
        if let (Some(row), Some(column)) = (row, column) {
            values[row][column] = line.figures[at].figure().map(|figure| figure.mean);
        }
    }
    if values.iter().flatten().all(Option::is_none) {
        return None;
    }
    let title = format!("{} of {best} by {} and {}", measure.heading, last(down), last(across));
    let (down, across) = ((down.to_owned(), rows), (across.to_owned(), columns));
    Some(Heat { title, description: None, value: measure.heading.clone(), down, across, values }.draw())
}

/// `learning_rate` of `train.learn.learning_rate`.
fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::table::tests::sample;
    use serde_json::json;

    #[test]
    fn variants_are_dots_and_settings_are_sweeps() {
        let mut comparison = sample();
        let titles = |comparison: &Comparison| outcomes(comparison).into_iter().map(|it| it.title).collect::<Vec<_>>();
        assert_eq!(titles(&comparison), ["rouge_l", "rouge_l, more than sft"]);
        for (line, rate) in comparison.lines.iter_mut().zip([0.001, 0.1]) {
            line.over = vec![("learn.rate".into(), json!(rate))];
            line.variant = Some("kd".into());
        }
        assert_eq!(titles(&comparison), ["rouge_l by rate"]);
        for (line, layers) in comparison.lines.iter_mut().zip([2, 4]) {
            line.over.push(("layers".into(), json!(layers)));
        }
        assert_eq!(titles(&comparison), ["rouge_l by rate", "rouge_l by layers", "rouge_l of kd by rate and layers"]);
    }
}
