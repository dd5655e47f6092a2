//! What the stages' tests share: an environment, a sink that keeps what it is told, and the way to the real data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use contract::{AnyValue, Conventions, End, Env, Folder, Inputs, Kind, Outputs, PortType, Row, Sink, Step};
use serde_json::{Map, Value as Json};

/// A row without references, of which only the ids matter.
pub(crate) fn row(id: u64, prompt: &[u32], response: &[u32]) -> Row {
    let (prompt, response) = (prompt.to_vec(), response.to_vec());
    Row { id, prompt, response, end: End::Stop, log_probs: None, references: Vec::new(), family: None }
}

/// Keeps what it is told but progress.
#[derive(Default)]
pub(crate) struct Log {
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    pub(crate) rows: Vec<Map<String, Json>>,
}

impl Sink for Log {
    fn metrics(&mut self, row: Map<String, Json>) {
        self.rows.push(row);
    }
    fn progress(&mut self, _done: u64, _total: u64, _unit: &str) {}
    fn warn(&mut self, text: &str) {
        self.warnings.push(text.into());
    }
    fn note(&mut self, text: &str) {
        self.notes.push(text.into());
    }
}

/// A temporary folder that stages write into.
pub(crate) struct Scratch(tempfile::TempDir, std::cell::Cell<u32>);

impl Scratch {
    pub(crate) fn new() -> Self {
        Scratch(tempfile::tempdir().unwrap(), std::cell::Cell::new(0))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file and returns its path.
    pub(crate) fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Runs a stage once, as the runner would.
    pub(crate) fn run(
        &self,
        kind: &dyn Kind,
        config: Json,
        inputs: Vec<(&str, AnyValue)>,
    ) -> contract::Result<(Outputs, Log)> {
        let config = kind.resolve(&config, Conventions::Sound).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        self.1.set(self.1.get() + 1);
        let scratch = self.path().join(format!("stage{}", self.1.get()));
        std::fs::create_dir(&scratch)?;
        let env = Env { device: "cpu".into(), threads: 2, scratch };
        let mut operator = kind.start(&config, &env, None)?;
        let (mut ports, mut log) = (Inputs::new(), Log::default());
        inputs.into_iter().for_each(|(port, value)| ports.insert(port, value));
        Ok((operator.run(ports, &Step::once(), &mut log)?, log))
    }
}

/// An output as the type it has.
pub(crate) fn output<T: contract::Value>(outputs: &Outputs, port: &str) -> Arc<T> {
    outputs.0[port].clone().into_any().downcast::<T>().ok().unwrap()
}

/// The folder behind an output.
pub(crate) fn folder(outputs: &Outputs, port: &str) -> PathBuf {
    output::<Folder>(outputs, port).path().to_owned()
}

/// Files as an input.
pub(crate) fn input(port_type: PortType, path: &Path) -> AnyValue {
    Arc::new(Folder::new(port_type, path))
}

/// A file or folder of the real data, which is not part of the repository: `PIPELINE_TEST_DATA`, else `shared/data`
/// beside the repository. `None`, with a line that says so, where it is absent.
pub(crate) fn shared_data(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("PIPELINE_TEST_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = root.join(name);
    if !path.exists() {
        println!("skipped: `{}` is not there; set PIPELINE_TEST_DATA", path.display());
        return None;
    }
    Some(path)
}
