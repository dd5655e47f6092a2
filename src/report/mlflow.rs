//! MLflow over its REST interface, version 2.0. A stage is a run, told by its key in the tag `pipeline.key`: what was exported
//! before is not exported again, and an export that was cut off is repeated safely, for the same number at the same step counts
//! once.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::{Value as Json, json};
use ureq::Agent;

use crate::ground::trouble::BadRequest;
use crate::report::scalars::Tracked;

/// Items of a batch, in all.
const BATCH: usize = 900;

/// Characters of a value of a setting.
const VALUE: usize = 6000;

/// Times that a request is made before it has failed.
const TRIES: u32 = 4;

/// A server, and how it knows us. The secret is shown nowhere.
pub(crate) struct Server {
    agent: Agent,
    address: String,
    authorization: Option<String>,
    /// Of runs that are made now.
    experiment: String,
}

/// What became of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub new: usize,
    pub known: usize,
}

impl Server {
    /// The server that the environment names, in MLflow's own variables, or `address`.
    pub(crate) fn open(address: Option<&str>, experiment: &str) -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let address = address.map(str::to_owned).or_else(|| variable("MLFLOW_TRACKING_URI"));
        let address = address.filter(|address| address.starts_with("http://") || address.starts_with("https://"));
        let Some(address) = address else {
            let message = "name an MLflow server, `--to http://HOST:PORT` or by MLFLOW_TRACKING_URI; files of MLflow itself are not \
                           written";
            return Err(BadRequest(message.into()).into());
        };
        let basic = variable("MLFLOW_TRACKING_USERNAME").zip(variable("MLFLOW_TRACKING_PASSWORD"));
        let authorization = match (variable("MLFLOW_TRACKING_TOKEN"), basic) {
            (Some(token), _) => Some(format!("Bearer {token}")),
            (None, Some((user, password))) => {
                Some(format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))))
            }
            (None, None) => None,
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .user_agent(concat!("pipeline/", env!("CARGO_PKG_VERSION")))
            .build();
        let address = address.trim_end_matches('/').to_owned();
        let experiment = variable("MLFLOW_EXPERIMENT_NAME").unwrap_or_else(|| experiment.to_owned());
        let mut server = Server { agent: config.into(), address, authorization, experiment };
        server.experiment = server.find_experiment()?;
        Ok(server)
    }

    fn find_experiment(&self) -> Result<String> {
        let name = &self.experiment;
        let known = self.ask(
            "experiments/search",
            &json!({"max_results": 1, "filter": format!("name = '{}'", name.replace('\'', "")) }),
        )?;
        let id = match known["experiments"].get(0) {
            Some(experiment) => experiment["experiment_id"].clone(),
            None => self.ask("experiments/create", &json!({ "name": name }))?["experiment_id"].clone(),
        };
        Ok(id.as_str().context("MLflow names no experiment")?.to_owned())
    }

    /// Sends stages that are not there, or not whole.
    pub(crate) fn send(&self, stages: &[Tracked]) -> Result<Sent> {
        let mut sent = Sent::default();
        for stage in stages {
            match self.find_run(&stage.key)? {
                Some((_, true)) => sent.known += 1,
                Some((run, false)) => {
                    self.fill(&run, stage)?;
                    sent.new += 1;
                }
                None => {
                    let run = self.create_run(stage)?;
                    self.fill(&run, stage)?;
                    sent.new += 1;
                }
            }
        }
        Ok(sent)
    }

    /// The run of a key, and whether all of it was sent.
    fn find_run(&self, key: &str) -> Result<Option<(String, bool)>> {
        let filter = format!("tags.`pipeline.key` = '{key}'");
        let found =
            self.ask("runs/search", &json!({"experiment_ids": [self.experiment], "filter": filter, "max_results": 1}))?;
        let Some(info) = found["runs"].get(0).map(|run| &run["info"]) else { return Ok(None) };
        let id = info["run_id"].as_str().context("MLflow names no run")?;
        Ok(Some((id.to_owned(), info["status"] == "FINISHED")))
    }

    fn create_run(&self, stage: &Tracked) -> Result<String> {
        let tags = [
            ("pipeline.key", &stage.key),
            ("pipeline.kind", &stage.kind),
            ("pipeline.variant", &stage.variant),
            ("pipeline.cell", &stage.cell),
        ];
        let tags: Vec<Json> = tags.iter().map(|(key, value)| json!({"key": key, "value": value})).collect();
        let body = json!({"experiment_id": self.experiment, "run_name": stage.label, "start_time": milliseconds(stage.started()), "tags": tags});
        let made = self.ask("runs/create", &body)?;
        Ok(made["run"]["info"]["run_id"].as_str().context("MLflow names no run")?.to_owned())
    }

    fn fill(&self, run: &str, stage: &Tracked) -> Result<()> {
        let params = stage.params.iter().map(|(key, value)| {
            let value: String = value.chars().take(VALUE).collect();
            json!({"key": allowed(key), "value": value})
        });
        for batch in params.collect::<Vec<_>>().chunks(100) {
            self.ask("runs/log-batch", &json!({"run_id": run, "params": batch}))?;
        }
        let time = stage.clock();
        let numbers = stage.series.iter().flat_map(|(tag, points)| {
            let (tag, time) = (allowed(tag), &time);
            points.iter().map(move |(step, value)| {
                json!({"key": tag, "value": value, "timestamp": milliseconds(time(*step)), "step": step})
            })
        });
        for batch in numbers.collect::<Vec<_>>().chunks(BATCH) {
            self.ask("runs/log-batch", &json!({"run_id": run, "metrics": batch}))?;
        }
        self.ask("runs/update", &json!({"run_id": run, "status": "FINISHED", "end_time": milliseconds(stage.ended)}))
            .map(drop)
    }

    fn ask(&self, what: &str, body: &Json) -> Result<Json> {
        let url = format!("{}/api/2.0/mlflow/{what}", self.address);
        let mut last = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(500 << attempt));
            }
            let mut request = self.agent.post(&url).header("content-type", "application/json");
            if let Some(authorization) = &self.authorization {
                request = request.header("authorization", authorization);
            }
            match request.send(body.to_string()) {
                Err(error) => last = error.to_string(),
                Ok(mut response) => {
                    let status = response.status().as_u16();
                    let text = response.body_mut().read_to_string().unwrap_or_default();
                    match status {
                        200 => {
                            return serde_json::from_str(&text)
                                .with_context(|| format!("MLflow's answer to `{what}` is not JSON"));
                        }
                        429 | 500.. => last = format!("status {status}"),
                        _ => {
                            let said: Json = serde_json::from_str(&text).unwrap_or_default();
                            let said = said["message"].as_str().map_or_else(String::new, |said| format!(": {said}"));
                            bail!("MLflow refuses `{what}` with status {status}{said}");
                        }
                    }
                }
            }
        }
        bail!("MLflow cannot be reached for `{what}`: {last}")
    }
}

/// A time as MLflow has it.
fn milliseconds(seconds: f64) -> i64 {
    (seconds * 1000.0) as i64
}

/// A name as MLflow allows it.
fn allowed(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "_-. /".contains(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_are_allowed() {
        assert_eq!(allowed("train.learn/loss (a)"), "train.learn/loss _a_");
    }
}
