//! Every chart, as a file that stands alone and all on one page: `cargo run -p chart --example gallery -- FOLDER`.

use chart::{
    Axis, Bar, Bars, Dots, Edge, Estimate, Figure, Graph, Heat, Line, Lines, Node, Series, Shape, Sweep, Swept, Tone,
};

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let figures = [
        ("lines", lines()),
        ("dots", dots()),
        ("sweep", sweep()),
        ("bars", bars()),
        ("heat", heat()),
        ("graph", graph()),
    ];
    let mut page = format!("<!doctype html><html lang=\"en\"><title>Charts</title><style>{}</style>", chart::style());
    for (name, figure) in &figures {
        std::fs::write(format!("{folder}/{name}.svg"), figure.svg())?;
        page += &figure.html(name);
    }
    std::fs::write(format!("{folder}/gallery.html"), page + "</html>")
}

fn lines() -> Figure {
    let curve = |label: &str, rate: f64, end: f64| {
        let y = |x: f64| end + 2.0 * (-x * rate).exp() + 0.05 * (x * 0.7).sin();
        let points: Vec<(f64, f64)> = (0..375).map(|x| (f64::from(x), y(f64::from(x)))).collect();
        let band = points.iter().map(|(_, y)| (y - 0.12, y + 0.12)).collect();
        Series { label: label.into(), points, band }
    };
    let series = vec![
        curve("base", 0.02, 0.7),
        curve("no-prompt", 0.015, 0.72),
        curve("kd", 0.01, 1.2),
        curve("sft", 0.03, 1.25),
    ];
    Lines {
        title: "Loss of train.learn".into(),
        description: None,
        x: Axis::of("update"),
        y: Axis::of("loss, nats a token"),
        series,
    }
    .draw()
}

fn estimate(mean: f64, spread: f64) -> Estimate {
    let repeats = vec![mean - spread, mean + 0.3 * spread, mean + 0.7 * spread];
    Estimate { repeats, mean, interval: Some((mean - 2.2 * spread, mean + 2.2 * spread)) }
}

fn dots() -> Figure {
    let rows = [("base", 81.2), ("no-prompt", 81.3), ("kd train.learn.learning_rate=0.001", 75.2), ("sft", 75.7)];
    let rows = rows.map(|(label, mean)| (label.to_owned(), estimate(mean, 1.1))).to_vec();
    Dots {
        title: "ROUGE-L sampled".into(),
        description: None,
        value: Axis::of("ROUGE-L, percent"),
        rows,
        mark: Some(75.7),
    }
    .draw()
}

fn sweep() -> Figure {
    let means = [(1e-3, 76.1), (3e-3, 76.9), (6e-3, 77.3), (1e-2, 76.8), (2e-2, 76.4)];
    let series = ["sft", "kd"].iter().enumerate().map(|(index, label)| {
        let shift = 0.8 * index as f64;
        Swept { label: (*label).into(), points: means.map(|(x, mean)| (x, estimate(mean - shift, 0.3))).to_vec() }
    });
    let (x, y) = (Axis::log("train.learn.learning_rate"), Axis::of("ROUGE-L, percent"));
    Sweep { title: "ROUGE-L by learning rate".into(), description: None, x, y, series: series.collect() }.draw()
}

fn bars() -> Figure {
    let stages = [
        ("teacher", 123.0, "2 min 03 s"),
        ("student0", 14.9, "14.9 s"),
        ("train", 32.7, "32.7 s"),
        ("score", 2.6, "2.63 s"),
    ];
    let bar = |(label, value, text): (&str, f64, &str)| Bar {
        label: label.into(),
        value,
        text: Some(text.into()),
        series: 0,
    };
    Bars {
        title: "Time of stages".into(),
        description: None,
        value: Axis::of("seconds"),
        rows: stages.map(bar).to_vec(),
    }
    .draw()
}

fn heat() -> Figure {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let values = (0..3)
        .map(|row| (0..4).map(|column| Some(75.0 + f64::from(row * 2) + f64::from(column) * 0.8)).collect())
        .collect();
    Heat {
        title: "ROUGE-L by temperature and prompt length".into(),
        description: None,
        value: "ROUGE-L".into(),
        down: ("temperature".into(), names(&["0.5", "1", "2"])),
        across: ("prompt length".into(), names(&["1", "3", "7", "20"])),
        values,
    }
    .draw()
}

fn graph() -> Figure {
    let node = |name: &str, kind: &str, parent: Option<usize>, shape: Shape, tone: Tone| {
        let lines = [name, kind].iter().filter(|line| !line.is_empty()).map(|line| (*line).to_owned()).collect();
        Node { lines, shape, tone, parent }
    };
    let (stage, good, faint) = (Shape::Box, Tone::Good, Tone::Faint);
    let nodes = vec![
        node("corpus", "download", None, stage, good),
        node("tokenizer", "train-tokenizer", None, stage, good),
        node("lessons", "tokenize", None, stage, good),
        node("data", "tokenize", None, stage, good),
        node("teacher", "finetune, 4 epochs", None, stage, good),
        node("student0", "finetune, 32 epochs", None, stage, good),
        node("prompt0", "prompt-init", None, stage, good),
        node("train: 4 epochs", "", None, stage, Tone::Bad),
        node("batch", "16 rows a round", Some(7), Shape::Slanted, Tone::Plain),
        node("student", "", Some(7), Shape::Round, Tone::Plain),
        node("prompt", "", Some(7), Shape::Round, Tone::Plain),
        node("respond", "student-generate", Some(7), stage, Tone::Plain),
        node("tune", "prompt-tune", Some(7), stage, Tone::Plain),
        node("learn", "distill", Some(7), stage, Tone::Plain),
        node("check", "evaluate, every epoch", Some(7), stage, Tone::Plain),
        node("score", "evaluate", None, stage, faint),
        node("greedy", "evaluate", None, stage, faint),
        node("score-first", "evaluate", None, stage, good),
        node("score-teacher", "evaluate", None, stage, good),
    ];
    let handoffs = [
        (0, 1, "corpus"),
        (0, 2, "corpus"),
        (1, 2, "tokenizer"),
        (0, 3, "corpus"),
        (1, 3, "tokenizer"),
        (2, 4, "dataset"),
        (3, 4, "dataset"),
        (3, 5, "dataset"),
        (4, 6, "model"),
        (3, 8, "dataset"),
        (5, 9, "model"),
        (6, 10, "soft-prompt"),
        (4, 12, "model"),
        (4, 13, "model"),
        (3, 14, "dataset"),
        (9, 15, "model"),
        (4, 15, "model"),
        (3, 15, "dataset"),
        (9, 16, "model"),
        (3, 16, "dataset"),
        (5, 17, "model"),
        (4, 17, "model"),
        (3, 17, "dataset"),
        (4, 18, "model"),
        (3, 18, "dataset"),
    ];
    let inner = [
        (9, 11, "model"),
        (8, 11, "dataset"),
        (9, 12, "model"),
        (10, 12, "soft-prompt"),
        (11, 12, "dataset"),
        (9, 13, "model"),
        (12, 13, "soft-prompt"),
        (11, 13, "dataset"),
        (13, 14, "model"),
    ];
    let edge = |line: Line| move |(from, to, label): (usize, usize, &str)| Edge { from, to, label: label.into(), line };
    let mut edges: Vec<Edge> = handoffs.map(edge(Line::Thick)).to_vec();
    edges.extend(inner.map(edge(Line::Thin)));
    edges.extend([(13, 9, "model"), (12, 10, "soft-prompt")].map(edge(Line::Dotted)));
    Graph { title: "promptkd".into(), description: None, nodes, edges }.draw()
}
