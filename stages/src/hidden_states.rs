//! A loss on hidden states: layers of the student come near layers of the teacher.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use contract::{AnyValue, Cause, Env, Outlook, PortType, Result, Value, limits};
use indexmap::IndexMap;
use lm::{LanguageModel, OptimizerState, Projections};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Which hidden states come near which.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HiddenStates {
    /// Pairs `[STUDENT, TEACHER]` of layers, counted from 0: what comes out of the one is compared with what comes out of the
    /// other, before any norm, where response tokens are predicted.
    #[schemars(schema_with = "layers_schema")]
    pub layers: Vec<[usize; 2]>,
    /// How they are compared. Where the two are of different widths, a matrix that is learnt beside the student, and is no part
    /// of it, brings the student's to the teacher's width.
    #[serde(default)]
    pub distance: Distance,
    /// What their mean over the pairs counts in the loss.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0, max = limits::WEIGHT))]
    pub weight: f64,
}

/// How far apart two hidden states are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    /// Mean of the squared differences of their channels.
    #[default]
    Mse,
    /// 1 less the cosine of their angle.
    Cosine,
}

fn layers_schema(_: &mut SchemaGenerator) -> Schema {
    let layer = json!({"type": "integer", "minimum": 0, "maximum": limits::LAYERS});
    let pair = json!({"type": "array", "items": layer, "minItems": 2, "maxItems": 2});
    json_schema!({"type": "array", "items": pair})
}

fn one() -> f64 {
    1.0
}

impl Distance {
    fn name(self) -> &'static str {
        match self {
            Distance::Mse => "hidden_mse",
            Distance::Cosine => "hidden_cosine",
        }
    }

    /// Of every row of `[N, D]`, `[N]`.
    fn of(self, one: &Tensor, other: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Distance::Mse => (one - other)?.sqr()?.mean(1)?,
            Distance::Cosine => {
                let length = |x: &Tensor| x.sqr()?.sum(1)?.maximum(1e-16)?.sqrt();
                let cosine = ((one * other)?.sum(1)? / (length(one)? * length(other)?)?)?;
                cosine.affine(-1.0, 1.0)?
            }
        })
    }
}

impl HiddenStates {
    /// The name of the loss in metrics.
    pub(crate) fn name(&self) -> &'static str {
        self.distance.name()
    }

    /// The student's layers of all pairs.
    pub(crate) fn of_student(&self) -> Vec<usize> {
        self.layers.iter().map(|[student, _]| *student).collect()
    }

    /// The teacher's layers of all pairs.
    pub(crate) fn of_teacher(&self) -> Vec<usize> {
        self.layers.iter().map(|[_, teacher]| *teacher).collect()
    }

    /// New maps from the student's channels to the teacher's; none where there are equally many.
    pub(crate) fn projections(&self, student: &LanguageModel, width: usize, seed: u64) -> Result<Projections> {
        let shape = [width, student.width()];
        let names = (0..self.layers.len()).map(|pair| (format!("projection.{pair}.weight"), shape));
        let shapes: Vec<_> = names.filter(|_| shape[0] != shape[1]).collect();
        Projections::new(&shapes, seed, student.device())
    }

    /// The loss of states `[N, C]` of the student against `[N, D]` of the teacher, a pair each, where a row counts `weight`; and
    /// its value without coefficient.
    pub(crate) fn loss(
        &self,
        own: &[Tensor],
        others: &[Tensor],
        projections: &Projections,
        weight: f32,
    ) -> Result<(Tensor, f64)> {
        let each = own.iter().zip(others).enumerate().map(|(pair, (own, other))| {
            let (own, other) = (own.to_dtype(DType::F32)?, other.detach().to_dtype(DType::F32)?);
            let own = match projections.0.get(&format!("projection.{pair}.weight")) {
                Some(matrix) => own.matmul(&matrix.t()?)?,
                None => own,
            };
            self.distance.of(&own, &other)?.sum_all().map_err(anyhow::Error::from)
        });
        let each = each.collect::<Result<Vec<_>>>()?;
        let mean = (Tensor::stack(&each, 0)?.sum_all()? * (f64::from(weight) / self.layers.len() as f64))?;
        let value = f64::from(mean.to_device(&Device::Cpu)?.to_scalar::<f32>()?);
        Ok(((mean * self.weight)?, value))
    }

    pub(crate) fn foresee(&self, outlook: &mut Outlook) {
        let field = || [Cause::Field("hidden_states.layers".into())];
        if !outlook.has("teacher") || outlook.has("cache") {
            let message = "hidden states of layers are compared with those of one `teacher`";
            outlook.error([Cause::Field("hidden_states".into())], message, "connect `teacher`, and no cache");
            return;
        }
        if self.layers.is_empty() {
            outlook.error(field(), "there is no pair of layers to compare", "`layers: [[STUDENT, TEACHER], ...]`");
        }
        for (port, layers) in [("student", self.of_student()), ("teacher", self.of_teacher())] {
            let count = outlook.input(port).layers;
            if let Some((layer, count)) =
                layers.iter().max().zip(count).filter(|(layer, count)| **layer as u64 >= *count)
            {
                let message = format!("there is no layer {layer}: `{port}` has {count}, counted from 0");
                outlook.error(field(), message, "name layers that are there");
            }
        }
    }
}

/// What a stage that learns by hidden states keeps between rounds.
pub(crate) struct State {
    pub(crate) optimizer: AnyValue,
    pub(crate) projections: Projections,
}

impl State {
    /// Reads what was saved: of a stage without projections the state of its optimiser alone.
    pub(crate) fn load(folder: &Path, env: &Env) -> Result<AnyValue> {
        let device = lm::device(&env.device)?;
        let optimizer: AnyValue = Arc::new(OptimizerState::load(folder, &device)?);
        Ok(match Projections::load(folder, &device)? {
            Some(projections) => Arc::new(State { optimizer, projections }),
            None => optimizer,
        })
    }

    /// The optimiser's state, and the projections where there are any.
    pub(crate) fn split(state: AnyValue) -> (AnyValue, Option<Projections>) {
        match Arc::clone(&state).into_any().downcast::<State>() {
            Ok(state) => (state.optimizer.clone(), Some(state.projections.clone())),
            Err(_) => (state, None),
        }
    }
}

impl Value for State {
    fn port_type(&self) -> PortType {
        PortType::State
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.optimizer.save(folder)?;
        self.projections.save(folder)
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// Parameters of a student and of what is learnt beside it.
pub(crate) fn all_of(student: &LanguageModel, projections: Option<&Projections>) -> IndexMap<String, Tensor> {
    let beside = projections.into_iter().flat_map(|projections| projections.0.clone());
    student.parameters().into_iter().chain(beside).collect()
}
