//! Who teaches which token: one teacher, several that are weighted, or several of whom each has its rows.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anyhow::Context;
use candle_core::Tensor;
use contract::dataset::{ANSWERS, row_name};
use contract::port::{one_of_several, several_of};
use contract::{Cause, Dataset, Inputs, Outlook, Result, Row};
use lm::loss::Source;
use lm::{Dtype, Head, LanguageModel, Said};

use crate::aligned::Aligned;
use crate::foresight;

/// In a route, the teacher of all families that it does not name.
const OTHERWISE: &str = "otherwise";

/// What decides between several teachers.
#[derive(Clone, Copy)]
pub(crate) enum By<'a> {
    /// What each counts, by name; of none each counts alike.
    Weights(&'a BTreeMap<String, f64>),
    /// Which teacher a family has. One that is not named has the teacher of its own name, else [`OTHERWISE`].
    Route(&'a BTreeMap<String, String>),
}

/// A frozen teacher.
pub(crate) struct Teacher {
    /// What it is called among several; of one by itself none.
    name: Option<String>,
    model: LanguageModel,
    /// Its whole output head.
    whole: Head,
    /// That over the tokens of the student, `[U, D]`.
    head: Tensor,
}

/// Teachers, and what decides between them.
pub(crate) struct Teachers<'a> {
    all: Vec<Teacher>,
    by: By<'a>,
    /// Of the rows that are learnt from, by id.
    families: HashMap<u64, String>,
}

/// Some tokens of a text, and what is said there by those who are to be learnt from.
pub(crate) struct Lesson<'a> {
    /// Which tokens; none where it is all of them.
    pub(crate) tokens: Option<Vec<u32>>,
    /// What is said of these tokens.
    pub(crate) heard: Vec<Heard<'a>>,
}

/// What one teacher says.
pub(crate) struct Heard<'a> {
    /// Its name among several.
    pub(crate) name: Option<&'a str>,
    /// What it counts.
    pub(crate) share: f64,
    /// What it says.
    pub(crate) said: Said,
    /// The head that hidden states are multiplied with.
    pub(crate) head: Option<&'a Tensor>,
    /// What came out of the layers that were asked for.
    pub(crate) states: Vec<Tensor>,
}

impl Heard<'_> {
    /// The same, for a loss.
    pub(crate) fn source(&self) -> Result<Source<'_>> {
        Ok(match &self.said {
            Said::TopK(kept) => Source::TopK(kept),
            Said::Hidden(hidden) => Source::Head { hidden, head: self.head.context("there is no head")? },
        })
    }
}

impl Lesson<'_> {
    /// Of all tokens, whatever they have, `[tokens, ...]`, that of its own.
    pub(crate) fn rows_of(&self, all: &Tensor) -> Result<Tensor> {
        Ok(match &self.tokens {
            None => all.clone(),
            Some(tokens) => all.index_select(&Tensor::new(tokens.as_slice(), all.device())?, 0)?,
        })
    }

    /// Of the labels of all tokens those of its own.
    pub(crate) fn labels_of(&self, all: &[u32]) -> Vec<u32> {
        match &self.tokens {
            None => all.to_vec(),
            Some(tokens) => tokens.iter().map(|token| all[*token as usize]).collect(),
        }
    }
}

/// What is known to be wrong with several teachers before they teach, and what each of them reads.
pub(crate) fn foresee(outlook: &mut Outlook, by: By<'_>) {
    let several = outlook.several("teachers");
    let names: Vec<&str> = several.iter().filter_map(|port| Some(several_of(port)?.1)).collect();
    let (field, unknown): (&str, Vec<&String>) = match by {
        By::Weights(weights) => ("weights", weights.keys().collect()),
        By::Route(route) => ("route", route.values().collect()),
    };
    if let Some(name) = unknown.into_iter().find(|name| !names.contains(&name.as_str())) {
        let message = format!("`{field}` names `{name}`, who is none of the `teachers`");
        outlook.error([Cause::Field(field.into())], message, "name teachers as the input `teachers` does");
    }
    let forgotten =
        |name: &&&str| matches!(by, By::Weights(weights) if !weights.is_empty() && !weights.contains_key(**name));
    if let Some(name) = names.iter().find(forgotten) {
        let message = format!("`weights` does not say what `{name}` counts");
        outlook.error([Cause::Field("weights".into())], message, "give every one of the `teachers` a weight");
    }
    for (other, what) in [("teacher", "connect it as one of `teachers`"), ("prompt", "leave one `teacher` connected")] {
        if !several.is_empty() && outlook.has(other) {
            outlook.error(Vec::new(), format!("`{other}` is connected beside `teachers`"), what);
        }
    }
    for port in several {
        foresight::teacher(outlook, &port, None);
    }
}

impl<'a> Teachers<'a> {
    /// The models on `teacher` and `teachers`, frozen, for rows of `data`; `None` where neither is connected.
    ///
    /// Errors when their vocabularies do not fit the student's `[V, C]` head.
    pub(crate) fn take(
        inputs: &mut Inputs,
        data: &Dataset,
        by: By<'a>,
        dtype: Dtype,
        student: &LanguageModel,
    ) -> Result<Option<Self>> {
        let one = inputs.take_optional::<LanguageModel>("teacher")?.map(|model| (None, model));
        let several = inputs.take_several::<LanguageModel>("teachers")?;
        let all = one.into_iter().chain(several.into_iter().map(|(name, model)| (Some(name), model)));
        let teacher = |(name, model): (Option<String>, Arc<LanguageModel>)| -> Result<Teacher> {
            let model = model.frozen().computed_in(dtype)?;
            let whole = model.output_head()?;
            let head = whole.beside(student.vocab_size())?;
            Ok(Teacher { name, model, whole, head })
        };
        let all: Vec<Teacher> = all.map(teacher).collect::<Result<_>>()?;
        let family = |row: &Row| Some((row.id % ANSWERS, row.family.clone()?));
        let families = data.rows.iter().filter_map(family).collect();
        Ok((!all.is_empty()).then_some(Teachers { all, by, families }))
    }

    /// The channels of the first.
    pub(crate) fn width(&self) -> Option<usize> {
        self.all.first().map(|teacher| teacher.model.width())
    }

    /// Each by its port.
    pub(crate) fn models(&self) -> Vec<(String, &LanguageModel)> {
        self.all.iter().map(|teacher| (teacher.port(), &teacher.model)).collect()
    }

    /// The whole output head of each by its port.
    pub(crate) fn heads(&self) -> Vec<(String, &Head)> {
        self.all.iter().map(|teacher| (teacher.port(), &teacher.whole)).collect()
    }

    /// What there is to learn of a text; `read` gives a teacher's hidden states where it predicts response tokens, `[tokens, width]`,
    /// and beside them what comes out of the layers that are learnt from.
    ///
    /// Errors when nobody teaches one of its rows.
    pub(crate) fn lessons(
        &self,
        text: &Aligned,
        read: impl Fn(&LanguageModel, &Aligned) -> Result<(Tensor, Vec<Tensor>)>,
    ) -> Result<Vec<Lesson<'_>>> {
        match self.by {
            By::Weights(weights) => {
                let alike = 1.0 / self.all.len() as f64;
                let share = |teacher: &Teacher| teacher.name.as_ref().and_then(|name| weights.get(name)).copied();
                let heard = self.all.iter().map(|teacher| {
                    let said = read(&teacher.model, text)?;
                    Ok(teacher.says(share(teacher).unwrap_or(alike), said))
                });
                Ok(vec![Lesson { tokens: None, heard: heard.collect::<Result<_>>()? }])
            }
            By::Route(route) => {
                let mut rows: Vec<Vec<usize>> = vec![Vec::new(); self.all.len()];
                for (place, response) in text.rows().iter().enumerate() {
                    rows[self.teacher_of(response.row, route)?].push(place);
                }
                let mut lessons = Vec::new();
                for (teacher, rows) in self.all.iter().zip(&rows).filter(|(_, rows)| !rows.is_empty()) {
                    let tokens = rows.iter().flat_map(|row| text.responses[*row].clone()).map(|at| at as u32);
                    let said = read(&teacher.model, &text.part(rows))?;
                    lessons.push(Lesson { tokens: Some(tokens.collect()), heard: vec![teacher.says(1.0, said)] });
                }
                Ok(lessons)
            }
        }
    }

    /// The place of the teacher of a row.
    fn teacher_of(&self, row: u64, route: &BTreeMap<String, String>) -> Result<usize> {
        let place = |name: &str| self.all.iter().position(|teacher| teacher.name.as_deref() == Some(name));
        let family = self.families.get(&(row % ANSWERS)).map(String::as_str);
        let named = family.and_then(|family| route.get(family).map(String::as_str).or(place(family).map(|_| family)));
        let name = named.or_else(|| route.get(OTHERWISE).map(String::as_str));
        let found = name.and_then(place);
        found.with_context(|| match family {
            Some(family) => format!(
                "nobody teaches {}, which is of family `{family}`: name its teacher under `route`, or one for all other \
                 families as `{OTHERWISE}`",
                row_name(row)
            ),
            None => format!(
                "nobody teaches {}, which has no family: set `keep_family: true` where the rows are made (`tokenize`), or name \
                 a teacher as `{OTHERWISE}` under `route`",
                row_name(row)
            ),
        })
    }
}

impl Teacher {
    fn port(&self) -> String {
        self.name.as_ref().map_or("teacher".to_owned(), |name| one_of_several("teachers", name))
    }

    fn says(&self, share: f64, (hidden, states): (Tensor, Vec<Tensor>)) -> Heard<'_> {
        Heard { name: self.name.as_deref(), share, said: Said::Hidden(hidden), head: Some(&self.head), states }
    }
}
