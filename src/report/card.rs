//! The card of a model that leaves the store: `README.md` as the Hugging Face hub reads it, with what the model was made of, how it
//! scores, and what makes it again. What only a person can say, such as the licence, is left to be filled in.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use cache::Store;
use contract::PortType;
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::{Dfs, EdgeRef, Reversed};
use serde_json::{Map, Value as Json, json};

use crate::graph::{Cell, Entry, Exit, Graph, Subgraph, in_order};
use crate::ground::terminal::{figure, flow, printable};
use crate::plan::Settled;
use crate::plan::results::{self, Measured};
use crate::report::duration;

/// What a card is about.
pub(crate) struct Card<'a> {
    /// What to call the model.
    pub name: &'a str,
    pub graph: &'a Graph,
    pub cell: &'a Cell,
    pub node: NodeIndex,
    /// The output that is the model.
    pub output: &'a Exit,
    pub settled: &'a BTreeMap<NodeIndex, Settled>,
    pub store: &'a Store,
    /// Whether it is an adapter by itself.
    pub is_adapter: bool,
    /// What makes it again.
    pub command: String,
}

/// What a stage said of the model.
struct Score {
    stage: String,
    metric: String,
    measured: Measured,
    data: String,
}

impl Card<'_> {
    /// The text of `README.md`.
    pub(crate) fn markdown(&self) -> Result<String> {
        let chain = self.chain();
        let scores = self.scores()?;
        let base = self.base(self.node, self.output);
        let mut text = front_matter(&self.front(&chain, base.as_deref(), &scores));
        text += &format!("# {}\n\n", plain(self.name));
        text += &format!(
            "Made by `pipeline` {} from `{}` of variant `{}`. The key of its making is `{}`.\n\n",
            env!("CARGO_PKG_VERSION"),
            plain(&self.graph.subgraphs[self.node].name),
            plain(&self.cell.variant),
            self.settled[&self.node].action.key
        );
        text += "## Method\n\n";
        for (name, kind, settings) in self.method() {
            text += &format!("- `{}` ({kind}): {}\n", plain(&name), plain(&settings));
        }
        text += &format!(
            "\nBegins as {}.\n",
            base.map_or_else(|| "random weights".to_owned(), |base| format!("`{}`", plain(&base)))
        );
        let sources = self.sources(&chain, "source");
        if !sources.is_empty() {
            let sources = sources.iter().map(|it| format!("`{}`", plain(it))).collect::<Vec<_>>().join(", ");
            text += &format!("\n## Data\n\n{sources}\n");
        }
        if !scores.is_empty() {
            text += "\n## Scores\n\n| stage | data | metric | value |\n|---|---|---|---:|\n";
            for Score { stage, metric, measured, data } in &scores {
                let interval = measured
                    .interval
                    .map_or_else(String::new, |(low, high)| format!(" [{}, {}]", figure(low), figure(high)));
                text += &format!(
                    "| {} | {} | {} | {}{interval} |\n",
                    cell(stage),
                    cell(data),
                    cell(metric),
                    figure(measured.mean)
                );
            }
            if scores.iter().any(|score| score.measured.interval.is_some()) {
                text += "\n[low, high]: 95 % interval, as the stage measured it.\n";
            }
        }
        text += "\n## Where it comes from\n\n| stage | kind | key | took |\n|---|---|---|---:|\n";
        for node in &chain {
            let Some(settled) = self.settled.get(node) else { continue };
            let kinds: Vec<&str> = kinds(&self.graph.subgraphs[*node].subgraph);
            let took = settled.seconds().map(duration).unwrap_or_default();
            let name = cell(&self.graph.subgraphs[*node].name);
            text += &format!("| {name} | {} | `{}` | {took} |\n", kinds.join(", "), settled.action.key);
        }
        text += &format!("\n## To make it again\n\n    {}\n", printable(&self.command));
        text += "\n## Licence\n\nTo be filled in, with regard to those of the data and of the models that it was made from.\n";
        Ok(text)
    }

    /// The model's stage with all that it needs, in order.
    fn chain(&self) -> Vec<NodeIndex> {
        let mut needed = BTreeSet::new();
        let reversed = Reversed(&self.graph.subgraphs);
        let mut walk = Dfs::new(reversed, self.node);
        while let Some(node) = walk.next(reversed) {
            needed.insert(node);
        }
        in_order(&self.graph.subgraphs).into_iter().filter(|node| needed.contains(node)).collect()
    }

    /// What downloads bring of that field, of the stages given.
    fn sources(&self, chain: &[NodeIndex], field: &str) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for node in chain {
            for operator in
                self.graph.subgraphs[*node].subgraph.operators().into_iter().filter(|it| it.kind == "download")
            {
                if let Some(source) = operator.config.get(field).filter(|it| !it.is_null()).map(flow)
                    && !found.contains(&source)
                {
                    found.push(source);
                }
            }
        }
        found
    }

    /// The model that this one began as, where that came from elsewhere.
    fn base(&self, node: NodeIndex, output: &Exit) -> Option<String> {
        let subgraph = &self.graph.subgraphs[node].subgraph;
        if let Subgraph::Operator(operator) = subgraph
            && operator.kind == "download"
        {
            return operator.config.get("model").map(flow);
        }
        let models = || {
            let edges = self.graph.subgraphs.edges_directed(node, Direction::Incoming);
            edges.filter(|edge| edge.weight().port_type == PortType::Model)
        };
        let carried = match output {
            Exit::Kept(name) => models().find(|edge| edge.weight().input == Entry::Carry(name.clone())),
            Exit::Port(_) | Exit::Metrics(_) => None,
        };
        let is_student = |input: &Entry| match input {
            Entry::Carry(_) => true,
            Entry::Port(port) => port != "teacher",
            Entry::Outside(read) => read.port == "model" || read.port == "student",
            Entry::Window(_) => false,
        };
        let edge = carried.or_else(|| models().find(|edge| is_student(&edge.weight().input)))?;
        self.base(edge.source(), &edge.weight().output)
    }

    /// Each stage that trains, with its main settings.
    fn method(&self) -> Vec<(String, String, String)> {
        const TOLD: [&str; 9] =
            ["init", "divergence", "regulariser", "learning_rate", "schedule", "epochs", "take", "lora", "temperature"];
        let settings = |config: &Json| {
            let told = TOLD
                .iter()
                .filter_map(|field| Some((field, config.get(*field)?)))
                .filter(|(_, value)| !value.is_null());
            told.map(|(field, value)| format!("{field} {}", flow(value))).collect::<Vec<_>>().join(", ")
        };
        match &self.graph.subgraphs[self.node].subgraph {
            Subgraph::Operator(it) => {
                vec![(self.graph.subgraphs[self.node].name.clone(), it.kind.clone(), settings(&it.config))]
            }
            Subgraph::Loop(body) => {
                let stages = body.stages.iter().filter(|(_, it)| it.operator.kind != "evaluate");
                stages
                    .map(|(name, it)| (name.clone(), it.operator.kind.clone(), settings(&it.operator.config)))
                    .collect()
            }
        }
    }

    /// What stages that read the model have measured of it.
    fn scores(&self) -> Result<Vec<Score>> {
        let mut scores = Vec::new();
        for (name, node) in &self.cell.names {
            let mut edges = self.graph.subgraphs.edges_directed(*node, Direction::Incoming);
            let reads = |edge: &petgraph::graph::EdgeReference<'_, crate::graph::Handoff>| {
                edge.source() == self.node
                    && edge.weight().output == *self.output
                    && matches!(&edge.weight().input, Entry::Port(port) if port == "model")
            };
            let (Some(settled), true) = (self.settled.get(node), edges.any(|edge| reads(&edge))) else { continue };
            let Subgraph::Operator(operator) = &self.graph.subgraphs[*node].subgraph else { continue };
            if !operator.ports.outputs.iter().any(|port| port.port_type == PortType::Predictions) {
                continue;
            }
            let data = self.graph.subgraphs.edges_directed(*node, Direction::Incoming);
            let data = data.into_iter().find(|edge| edge.weight().input == Entry::Port("data".into()));
            let data = data.map_or_else(String::new, |edge| {
                format!("{}.{}", self.graph.subgraphs[edge.source()].name, edge.weight().output)
            });
            let metrics: Map<String, Json> = results::metrics(settled, self.store)?;
            for metric in metrics.keys() {
                if let Some(measured) = results::number(&metrics, metric) {
                    scores.push(Score { stage: name.clone(), metric: metric.clone(), measured, data: data.clone() });
                }
            }
        }
        Ok(scores)
    }

    /// The front matter, in the hub's words.
    fn front(&self, chain: &[NodeIndex], base: Option<&str>, scores: &[Score]) -> Json {
        let mut front = json!({
            "library_name": if self.is_adapter { "peft" } else { "transformers" },
            "pipeline_tag": "text-generation",
        });
        if let Some(base) = base.and_then(repository) {
            front["base_model"] = json!(base);
        }
        let sources = self.sources(chain, "source");
        let datasets: Vec<String> = sources.iter().filter_map(|it| repository(it)).collect();
        if !datasets.is_empty() {
            front["datasets"] = json!(datasets);
        }
        let mut tags = vec!["distillation".to_owned()];
        let kinds = kinds(&self.graph.subgraphs[self.node].subgraph);
        tags.extend(kinds.into_iter().filter(|kind| *kind != "evaluate").map(str::to_owned));
        front["tags"] = json!(tags);
        if !scores.is_empty() {
            let mut results: Vec<Json> = Vec::new();
            for score in scores {
                let metric = json!({
                    "type": score.metric,
                    "name": format!("{} ({})", score.metric, score.stage),
                    "value": score.measured.mean,
                });
                let name = if score.data.is_empty() { "data" } else { &score.data };
                match results.iter_mut().find(|result| result["dataset"]["name"] == name) {
                    Some(result) => result["metrics"].as_array_mut().expect("made as a list").push(metric),
                    None => results.push(json!({
                        "task": {"type": "text-generation"},
                        "dataset": {"name": name, "type": datasets.first().map_or(name, String::as_str)},
                        "metrics": [metric],
                    })),
                }
            }
            front["model-index"] = json!([{"name": self.name, "results": results}]);
        }
        front
    }
}

/// `OWNER/NAME` of an address of the hub.
fn repository(address: &str) -> Option<String> {
    let path = address.strip_prefix("hub:")?;
    let path = path.strip_prefix("datasets/").unwrap_or(path);
    let mut parts = path.split(['/', '@']);
    Some(format!("{}/{}", parts.next()?, parts.next()?))
}

fn kinds(subgraph: &Subgraph) -> Vec<&str> {
    let mut kinds: Vec<&str> = Vec::new();
    for operator in subgraph.operators() {
        if !kinds.contains(&operator.kind.as_str()) {
            kinds.push(&operator.kind);
        }
    }
    kinds
}

/// YAML between two lines of dashes; JSON is YAML, so that every text is quoted as it must be.
fn front_matter(front: &Json) -> String {
    let mut text = String::from("---\n# To be filled in: license, language.\n# license: apache-2.0\n# language: en\n");
    for (field, value) in front.as_object().into_iter().flatten() {
        text += &format!("{field}: {value}\n");
    }
    text + "---\n\n"
}

/// Text that is only text to a reader of Markdown.
fn plain(text: &str) -> String {
    printable(text).replace('`', "'")
}

/// The same in a table.
fn cell(text: &str) -> String {
    plain(text).replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_named_as_the_hub_names_them() {
        let cases = [
            ("hub:owner/name@0123/file.gguf", Some("owner/name")),
            ("hub:datasets/openai/gsm8k/main", Some("openai/gsm8k")),
            ("builtin:instruct", None),
            ("hub:odd", None),
        ];
        for (address, expected) in cases {
            assert_eq!(repository(address).as_deref(), expected);
        }
    }

    #[test]
    fn what_is_hostile_stays_text() {
        let text = front_matter(&json!({"tags": ["a\n---\nb: \"c\""]}));
        assert_eq!(text.lines().filter(|line| *line == "---").count(), 2, "{text}");
        assert_eq!(cell("a|<b>`\n"), "a\\|&lt;b>'\\\\n");
    }
}
