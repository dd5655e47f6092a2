//! `calibration`: whether a model is as sure of its answers as they are right.
//!
//! ```yaml
//! sure:
//!   kind: calibration
//!   in: {predictions: score.predictions}
//!   with: {bins: 10}
//! ```
//!
//! `evaluate` with `metrics: [accuracy, confidence]` says of every answer whether it is right and how sure the model was of it.
//! Here answers are put into bins by how sure it was; in a calibrated model the share of right ones is that number. The expected
//! calibration error (Naeini et al., 2015; Guo et al., "On calibration of modern neural networks", 2017, section 2) is the mean
//! over answers of the distance between the two in their bin, in percent. Noise counts as error, so it is too large where bins hold few answers.
//! `auroc` is how often a right answer is surer than a wrong one, in percent: 50 where sureness says nothing.
//!
//! `by: max-logit` is the number of the published program for response priming: the largest logit, averaged over the positions of an
//! answer. It is no probability, so there is no calibration error, and bins hold equally many answers.
//!
//! Inputs: `predictions`. Outputs: `metrics`; `table`, one line a bin, with the 95 % interval of its share of right answers
//! (Wilson, 1927); `figure`, the curve. The other intervals are of 95 %, by bootstrap over rows: the answers to one row stay together. Cost: none.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::ensure;
use chart::{Axis, Figure, Lines, Series};
use contract::limits;
use contract::{
    About, AnyValue, Conventions, Env, Folder, Inputs, Metrics, Operator, Outputs, PortType, Ports, Predictions,
    Result, Sink, Stage, Step,
};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use crate::interval::{Resamples, mean, round};

/// The `with` of `calibration`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What says how sure the model was; left out: as the conventions say.
    #[serde(default)]
    pub by: Option<By>,
    /// How many bins.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = limits::BATCH))]
    pub bins: usize,
}

/// What says how sure a model was of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// The probability of its tokens: their geometric mean.
    Probability,
    /// The probability of the likeliest token, averaged over its positions.
    MaxProbability,
    /// The logit of the likeliest token, averaged over its positions: the published number.
    MaxLogit,
}

impl By {
    /// The field of a prediction.
    fn field(self) -> &'static str {
        match self {
            By::Probability => "confidence",
            By::MaxProbability => "max_probability",
            By::MaxLogit => "max_logit",
        }
    }
}

fn ten() -> usize {
    10
}

/// The kind.
pub struct Calibration;

impl Stage for Calibration {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "calibration",
            version: 1,
            numerics: None,
            summary: "measures whether a model is as sure of its answers as they are right",
            example: "kind: calibration\nin: {predictions: score.predictions}\nwith: {bins: 10}",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.by.get_or_insert(match conventions {
            Conventions::Sound => By::Probability,
            Conventions::Reference => By::MaxLogit,
        });
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("predictions", PortType::Predictions, "answers of which it is known whether they are right")
            .output("metrics", PortType::Metrics, "the expected calibration error and what goes with it")
            .output("table", PortType::Table, "the calibration curve: a line a bin")
            .output("figure", PortType::Figure, "the same as a picture")
    }

    fn start(&self, config: Config, env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let folder = env.scratch.join("calibration");
        Ok(Box::new(Calibrating { config, table: folder.join("table"), figure: folder.join("figure") }))
    }
}

struct Calibrating {
    config: Config,
    table: PathBuf,
    figure: PathBuf,
}

/// An answer: how sure the model was, and whether it is right.
type Answer = (f64, bool);

impl Operator for Calibrating {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, _sink: &mut dyn Sink) -> Result<Outputs> {
        let predictions = inputs.take::<Predictions>("predictions")?;
        let by = self.config.by.unwrap_or(By::Probability);
        let rows = answers(&predictions, by)?;
        let all: Vec<Answer> = rows.iter().flatten().copied().collect();
        let bins = Bins::of(&all, by, self.config.bins);
        let resamples = Resamples::of(rows.len());
        let measured = |statistic: &(dyn Fn(&[Answer]) -> Option<f64> + Sync)| match statistic(&all) {
            Some(value) => {
                let drawn = |drawn: &[u32]| -> Vec<Answer> {
                    drawn.iter().flat_map(|row| rows[*row as usize].iter().copied()).collect()
                };
                json!({"mean": round(value), "interval": resamples.interval(|rows| statistic(&drawn(rows)))})
            }
            None => json!({"mean": null, "interval": null, "not_measured": "no answer is right, or none is wrong"}),
        };
        let sureness =
            |right: bool| move |answers: &[Answer]| mean(answers.iter().filter(|it| it.1 == right).map(|it| it.0));
        let mut metrics = Map::new();
        if by != By::MaxLogit {
            metrics.insert("expected_calibration_error".into(), measured(&|answers| Some(bins.error(answers))));
        }
        metrics.insert("auroc".into(), measured(&auroc));
        metrics.insert("accuracy".into(), measured(&|answers| share(answers)));
        metrics.insert("sureness".into(), measured(&|answers| mean(answers.iter().map(|it| it.0))));
        metrics.insert("sureness_of_right".into(), measured(&sureness(true)));
        metrics.insert("sureness_of_wrong".into(), measured(&sureness(false)));
        metrics.insert("answers".into(), json!(all.len()));

        let curve = bins.curve(&all);
        for (folder, name, text) in [
            (&self.table, "calibration.csv", as_table(&curve)),
            (&self.figure, "calibration.svg", drawn(&curve, by).svg()),
        ] {
            std::fs::create_dir_all(folder)?;
            contract::value::write(&folder.join(name), text.as_bytes())?;
        }
        Ok(Outputs::new()
            .with("metrics", Metrics(metrics))
            .with("table", Folder::new(PortType::Table, &self.table))
            .with("figure", Folder::new(PortType::Figure, &self.figure)))
    }
}

/// The answers to each row that it can be said of, in the order of the predictions.
fn answers(predictions: &Predictions, by: By) -> Result<Vec<Vec<Answer>>> {
    let mut rows: IndexMap<String, Vec<Answer>> = IndexMap::new();
    for prediction in &predictions.0 {
        let (sure, right) = (prediction.get(by.field()), prediction.get("correct"));
        let (Some(sure), Some(right)) = (sure.and_then(Json::as_f64), right.and_then(Json::as_bool)) else { continue };
        rows.entry(prediction.get("id").map_or_else(String::new, Json::to_string)).or_default().push((sure, right));
    }
    ensure!(
        !rows.is_empty(),
        "no prediction says both whether it is right and how sure the model was (`{}`): give `evaluate` `metrics: [accuracy, \
         confidence]`, and rows whose right answers have a number",
        by.field()
    );
    Ok(rows.into_values().collect())
}

/// Of right answers, in percent.
fn share(answers: &[Answer]) -> Option<f64> {
    mean(answers.iter().map(|(_, right)| if *right { 100.0 } else { 0.0 }))
}

/// How often a right answer is surer than a wrong one, in percent; equally sure ones count half (Mann and Whitney, 1947).
fn auroc(answers: &[Answer]) -> Option<f64> {
    let mut sorted = answers.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut wrong_before, mut surer) = (0.0, 0.0);
    for equal in sorted.chunk_by(|a, b| a.0 == b.0) {
        let right = equal.iter().filter(|(_, right)| *right).count() as f64;
        let wrong = equal.len() as f64 - right;
        surer += right * (wrong_before + wrong / 2.0);
        wrong_before += wrong;
    }
    let pairs = wrong_before * (answers.len() as f64 - wrong_before);
    (pairs > 0.0).then(|| 100.0 * surer / pairs)
}

/// Ranges of sureness, one after the other.
struct Bins {
    /// Where each but the last ends; an answer as sure as an end is in the bin before it.
    ends: Vec<f64>,
    low: f64,
    high: f64,
}

impl Bins {
    /// Equally wide ones of a probability; of a logit such that each holds as many answers, as far as they differ.
    fn of(answers: &[Answer], by: By, count: usize) -> Self {
        if by != By::MaxLogit {
            let ends = (1..count).map(|bin| bin as f64 / count as f64).collect();
            return Bins { ends, low: 0.0, high: 1.0 };
        }
        let mut sorted: Vec<f64> = answers.iter().map(|(sure, _)| *sure).collect();
        sorted.sort_by(f64::total_cmp);
        let mut ends: Vec<f64> = (1..count).map(|bin| sorted[(bin * sorted.len() / count).max(1) - 1]).collect();
        ends.dedup();
        Bins { ends, low: sorted[0], high: sorted[sorted.len() - 1] }
    }

    fn place(&self, sure: f64) -> usize {
        self.ends.partition_point(|end| *end < sure)
    }

    /// The answers of each.
    fn split(&self, answers: &[Answer]) -> Vec<Vec<Answer>> {
        let mut bins = vec![Vec::new(); self.ends.len() + 1];
        for answer in answers {
            bins[self.place(answer.0)].push(*answer);
        }
        bins
    }

    /// The expected calibration error, in percent. There is an answer.
    fn error(&self, answers: &[Answer]) -> f64 {
        let gap = |bin: &Vec<Answer>| {
            let sure: f64 = bin.iter().map(|(sure, _)| 100.0 * sure).sum();
            let right: f64 = bin.iter().map(|(_, right)| if *right { 100.0 } else { 0.0 }).sum();
            (sure - right).abs()
        };
        self.split(answers).iter().map(gap).sum::<f64>() / answers.len() as f64
    }

    /// What is to be said of each that holds answers.
    fn curve(&self, answers: &[Answer]) -> Vec<Bin> {
        let bin = |(index, answers): (usize, &Vec<Answer>)| {
            let (sureness, accuracy) = mean(answers.iter().map(|it| it.0)).zip(share(answers))?;
            let low = index.checked_sub(1).map_or(self.low, |before| self.ends[before]);
            let high = self.ends.get(index).copied().unwrap_or(self.high);
            let interval = wilson(accuracy / 100.0, answers.len()).map(|share| round(100.0 * share));
            Some(Bin { low, high, answers: answers.len(), sureness, accuracy, interval })
        };
        self.split(answers).iter().enumerate().filter_map(bin).collect()
    }
}

/// The answers of a range of sureness.
struct Bin {
    low: f64,
    high: f64,
    answers: usize,
    /// Mean.
    sureness: f64,
    /// Right ones, in percent.
    accuracy: f64,
    interval: [f64; 2],
}

fn as_table(curve: &[Bin]) -> String {
    let mut table = "low,high,answers,sureness,accuracy,accuracy_low,accuracy_high\n".to_owned();
    for Bin { low, high, answers, sureness, accuracy, interval: [from, to] } in curve {
        let _ = writeln!(table, "{low},{high},{answers},{sureness},{accuracy},{from},{to}");
    }
    table
}

/// The curve, beside that of a model which is as sure as it is right.
fn drawn(curve: &[Bin], by: By) -> Figure {
    let points = curve.iter().map(|bin| (bin.sureness, bin.accuracy)).collect();
    let band = curve.iter().map(|bin| (bin.interval[0], bin.interval[1])).collect();
    let mut series = vec![Series { label: "answers".into(), points, band }];
    if by != By::MaxLogit {
        let points = vec![(0.0, 0.0), (1.0, 100.0)];
        series.push(Series { label: "calibrated".into(), points, band: Vec::new() });
    }
    Lines {
        title: "Right answers by sureness".into(),
        description: None,
        x: Axis::of(&by.field().replace('_', " ")),
        y: Axis::of("right answers, percent; band: 95 % interval"),
        series,
    }
    .draw()
}

/// The 95 % interval of a share of so many (Wilson, 1927).
fn wilson(share: f64, count: usize) -> [f64; 2] {
    const Z: f64 = 1.959_963_984_540_054;
    let count = count as f64;
    let middle = share + Z * Z / (2.0 * count);
    let half = Z * (share * (1.0 - share) / count + (Z / (2.0 * count)).powi(2)).sqrt();
    [-1.0, 1.0].map(|side| ((middle + side * half) / (1.0 + Z * Z / count)).clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use contract::Kind;

    use super::*;
    use crate::testing::{Scratch, output};

    fn predictions(answers: &[(u64, f64, Option<bool>)]) -> AnyValue {
        let row = |(id, sure, right): &(u64, f64, Option<bool>)| {
            let row = json!({"id": id, "seed": 1, "text": "", "correct": right, "confidence": sure, "max_logit": 20.0 * sure});
            row.as_object().unwrap().clone()
        };
        Arc::new(Predictions(answers.iter().map(row).collect()))
    }

    /// Metrics, and the rows of the table.
    type Ran = (Map<String, Json>, Vec<Vec<f64>>);

    fn run(config: Json, answers: &[(u64, f64, Option<bool>)]) -> Result<Ran> {
        let (kind, scratch): (&dyn Kind, _) = (&Calibration, Scratch::new());
        let outputs = scratch.run(kind, config, vec![("predictions", predictions(answers))])?.0;
        let table = output::<Folder>(&outputs, "table").path().join("calibration.csv");
        let table = std::fs::read_to_string(table).unwrap();
        let lines = table.lines().skip(1).map(|line| line.split(',').map(|cell| cell.parse().unwrap()).collect());
        Ok((output::<Metrics>(&outputs, "metrics").0.clone(), lines.collect()))
    }

    fn outputs_figure(config: Json, answers: &[(u64, f64, Option<bool>)]) -> String {
        let (kind, scratch): (&dyn Kind, _) = (&Calibration, Scratch::new());
        let outputs = scratch.run(kind, config, vec![("predictions", predictions(answers))]).unwrap().0;
        std::fs::read_to_string(output::<Folder>(&outputs, "figure").path().join("calibration.svg")).unwrap()
    }

    #[test]
    fn the_error_is_the_distance_of_sureness_and_truth_in_each_bin() {
        // Two bins: 0.1 and 0.3 with none right, |0.2 - 0|; 0.6, 0.8 and 1.0 with two right, |0.8 - 2/3|.
        let answers = [
            (0, 0.1, Some(false)),
            (1, 0.3, Some(false)),
            (2, 0.6, Some(true)),
            (3, 0.8, Some(false)),
            (4, 1.0, Some(true)),
            (5, 0.9, None),
        ];
        let (metrics, lines) = run(json!({"bins": 2}), &answers).unwrap();
        let mean = |name: &str| metrics[name]["mean"].as_f64().unwrap();
        let expected = 100.0 * (0.4 * 0.2 + 0.6 * (0.8 - 2.0 / 3.0));
        assert!((mean("expected_calibration_error") - expected).abs() < 1e-6, "{metrics:?}");
        // Of six pairs of a right and a wrong one, 0.6 is below 0.8.
        assert!((mean("auroc") - 500.0 / 6.0).abs() < 1e-6);
        assert_eq!((mean("accuracy"), mean("sureness_of_right"), &metrics["answers"]), (40.0, 0.8, &json!(5)));
        assert_eq!(lines.len(), 2);
        let figure = &outputs_figure(json!({"bins": 2}), &answers);
        assert!(
            figure.contains("answers goes from 0 to 66.") && figure.contains("calibrated goes from 0 to 100"),
            "{figure}"
        );
        assert_eq!(lines[0][..5], [0.0, 0.5, 2.0, 0.2, 0.0]);
        // Wilson's interval of 2 of 3: 20.8 to 93.9 percent.
        assert!((lines[1][5] - 20.7655).abs() < 1e-3 && (lines[1][6] - 93.8508).abs() < 1e-3, "{lines:?}");
    }

    #[test]
    fn a_calibrated_model_has_little_error_and_a_sure_one_that_errs_much() {
        let answers =
            |sure: f64| -> Vec<(u64, f64, Option<bool>)> { (0..200).map(|id| (id, sure, Some(id % 10 < 7))).collect() };
        for (sure, expected) in [(0.7, 0.0), (0.95, 25.0)] {
            let (metrics, _) = run(json!({}), &answers(sure)).unwrap();
            let error = &metrics["expected_calibration_error"];
            assert!((error["mean"].as_f64().unwrap() - expected).abs() < 1e-6, "{error}");
            // One number for all tells nothing apart.
            assert_eq!(metrics["auroc"]["mean"], 50.0);
        }
    }

    #[test]
    fn logits_are_put_into_bins_of_equal_size_and_have_no_error() {
        let answers: Vec<_> = (0..40).map(|id| (id / 2, 0.5 + f64::from(id as u32) / 100.0, Some(id >= 20))).collect();
        let (metrics, lines) = run(json!({"by": "max-logit", "bins": 4}), &answers).unwrap();
        assert!(!metrics.contains_key("expected_calibration_error"));
        assert_eq!(metrics["auroc"], json!({"mean": 100.0, "interval": [100.0, 100.0]}));
        assert_eq!(
            lines.iter().map(|line| (line[2], line[4])).collect::<Vec<_>>(),
            [(10.0, 0.0), (10.0, 0.0), (10.0, 100.0), (10.0, 100.0)]
        );
    }

    #[test]
    fn what_cannot_be_said_is_not_measured() {
        let (metrics, _) = run(json!({}), &[(0, 0.5, Some(false)), (1, 0.6, Some(false))]).unwrap();
        assert!(metrics["auroc"]["mean"].is_null() && metrics["sureness_of_right"]["mean"].is_null());
        let error = run(json!({}), &[(0, 0.5, None)]).err().unwrap().to_string();
        assert!(error.contains("give `evaluate` `metrics: [accuracy, confidence]`"), "{error}");
    }
}
