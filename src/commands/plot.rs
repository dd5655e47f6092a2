//! `pipeline plot`: one chart as a file, of what has a result.

use anyhow::Result;
use indexmap::IndexMap;

use super::report::write;
use super::{BadRequest, Workbench, read_store};
use crate::cli::PlotArgs;
use crate::graph::{Graph, MetricRef, Report};
use crate::plan::{self, selection};
use crate::report::charts;
use crate::report::comparison::{self, Comparison};
use crate::report::curves::{self, Group};

pub(crate) fn plot(args: &PlotArgs, bench: &Workbench) -> Result<()> {
    let target = &args.target;
    let [metric] = target.stages.as_slice() else {
        return Err(
            BadRequest("name one metric to plot, as `STAGE.METRIC` or by its heading in the report".into()).into()
        );
    };
    let (graph, _) = bench.load_compared(target)?;
    let selection = selection::select(&graph, &selection::Wanted::default())?;
    let store = read_store(&target.store)?;
    let settled = plan::plan(&graph, &selection, bench.registry, &store)?.settled();
    let found = find(&graph, metric)?;
    let report = Report {
        metrics: IndexMap::from([(metric.clone(), found.clone())]),
        baseline: comparison::report(&graph).and_then(|report| report.baseline.clone()),
        ..Report::default()
    };
    let compared = comparison::compare_as(&report, &graph, &settled, &store)?;
    let figure = if ["update", "round", "epoch"].contains(&args.by.as_str()) {
        let name = format!("{}.{}", found.stage, found.metric);
        let groups: Vec<Group<'_>> = lines(&graph, compared.as_ref());
        let mut rows = |node| settled.get(&node).map_or(Ok(Vec::new()), |settled| curves::rows(settled, &store));
        let all = curves::curves(&graph, &groups, &mut rows)?;
        all.into_iter()
            .find(|curves| format!("{}.{}", curves.stage, curves.name) == name)
            .map(|curves| curves.lines.draw())
    } else {
        let Some(comparison) = &compared else { return Err(nothing(metric)) };
        let paths = charts::varied(comparison);
        if args.by != "variant" && !paths.contains(&args.by) {
            let known: Vec<String> =
                paths.iter().map(|path| format!("`{path}`")).chain(["`variant`".into(), "`update`".into()]).collect();
            let message = format!("nothing that is selected varies `{}`; `--by` takes {}", args.by, known.join(", "));
            return Err(BadRequest(message).into());
        }
        charts::by(comparison, 0, &args.by)
    };
    let figure = figure.ok_or_else(|| nothing(metric))?;
    write(&args.output, &figure.svg())
}

fn nothing(metric: &str) -> anyhow::Error {
    BadRequest(format!("there is no result yet that has `{metric}`; run it first: `pipeline run FILE`")).into()
}

/// A metric by its heading in the report, or as `STAGE.METRIC` of a stage that is there.
fn find(graph: &Graph, metric: &str) -> Result<MetricRef> {
    if let Some(found) = comparison::report(graph).and_then(|report| report.metrics.get(metric)) {
        return Ok(found.clone());
    }
    let is_stage = |name: &str| graph.cells.iter().any(|cell| cell.names.contains_key(name));
    match metric.split_once('.') {
        Some((stage, inner)) if is_stage(stage) => Ok(MetricRef { stage: stage.to_owned(), metric: inner.to_owned() }),
        _ => {
            let headings = comparison::report(graph).into_iter().flat_map(|report| report.metrics.keys());
            let known: Vec<String> = headings.map(|heading| format!("`{heading}`")).collect();
            let hint = if known.is_empty() { String::new() } else { format!(", or one of {}", known.join(", ")) };
            Err(BadRequest(format!("`{metric}` is no metric: expected `STAGE.METRIC`{hint}")).into())
        }
    }
}

/// The lines of a comparison with their cells; without one, the cells.
fn lines<'g>(graph: &'g Graph, compared: Option<&Comparison>) -> Vec<Group<'g>> {
    let Some(compared) = compared else {
        return graph.cells.iter().map(|cell| Group { label: cell.label.clone(), cells: vec![cell] }).collect();
    };
    let cells = |labels: &[String]| graph.cells.iter().filter(|cell| labels.contains(&cell.label)).collect();
    compared.lines.iter().map(|line| Group { label: line.label.clone(), cells: cells(&line.cells) }).collect()
}
