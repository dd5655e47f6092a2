//! `teacher-generate`: the teacher answers prompts, so that a student can be trained on what it writes.
//!
//! ```yaml
//! taught:
//!   kind: teacher-generate
//!   in: {teacher: teacher, data: data.train}
//!   with: {max_new_tokens: 256, seed: 10}
//! ```
//!
//! Sequence-level distillation (Kim and Rush, "Sequence-level knowledge distillation", 2016, section 3.2) is `finetune` on the
//! rows that come out. With `samples` every prompt is answered so many times, each answer a row of its own. A draw depends on
//! the seed, the row and the number of the answer alone.
//!
//! With `view` the teacher reads other prompts, such as those that `tokenize` primes, and the answers still belong to the
//! prompts of `data`: response priming.
//!
//! With `keep: correct` only answers whose final number is right stay ([`crate::number`]): rejection sampling, for data such as
//! GSM8K. Rows whose right answers have no number lose all of theirs.
//!
//! Inputs: `teacher` and its soft prompt, `data` (its prompts), `view`. Output: `data`, the rows with the teacher's responses and
//! their log-probabilities. Cost: a forward pass a token of each response, once.

use anyhow::ensure;
use contract::dataset::ANSWERS;
use contract::limits;
use contract::random::purpose;
use contract::{
    About, AnyValue, Bounds, ConfigError, Conventions, Dataset, End, Env, Extraction, Facts, Inputs, Operator, Outlook,
    Outputs, PortType, Ports, Result, Row, Sink, Stage, Step,
};
use lm::{Generated, LanguageModel, Prompt, SoftPrompt, generate};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aligned::View;
use crate::finite::{Behind, NEXT_TOKEN, explain};
use crate::text::{SpecialTokens, Text};
use crate::{foresight, number, score, writing};

writing::config! {
    /// The `with` of `teacher-generate`.
    pub struct Config {
        /// Only the first so many rows, as a window's `rows`.
        #[serde(default)]
        #[schemars(range(min = 1, max = limits::ROWS))]
        pub rows: Option<u64>,
        /// Answers to every prompt.
        #[serde(default = "single")]
        #[schemars(range(min = 1, max = limits::BATCH))]
        pub samples: u64,
        /// What becomes of a response that was cut off; left out: as the conventions say.
        #[serde(default)]
        pub cut_off: Option<CutOff>,
        /// Which answers stay, after those that `cut_off` leaves out.
        #[serde(default)]
        pub keep: Keep,
        /// Which number of an answer `keep: correct` takes for its final one.
        #[serde(default)]
        pub extraction: Extraction,
    }
}

/// What becomes of a response that was cut off by its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CutOff {
    /// It stays as it is: there is no end to learn.
    Open,
    /// The end token is put behind it, as the published program does when it tokenises the text again.
    Ended,
    /// Its row is left out.
    Dropped,
}

/// Which answers stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// All of them.
    #[default]
    All,
    /// Those whose final number is that of a right answer.
    Correct,
}

fn single() -> u64 {
    1
}

/// The kind.
pub struct TeacherGenerate;

impl Stage for TeacherGenerate {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "teacher-generate",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "lets the teacher answer prompts, for a student to be trained on its text",
            example: "kind: teacher-generate\nin: {teacher: teacher, data: data.train}\nwith: {max_new_tokens: 256, seed: 10}",
            reads_clock: false,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.cut_off.get_or_insert(match conventions {
            Conventions::Sound => CutOff::Open,
            Conventions::Reference => CutOff::Ended,
        });
        if config.temperature == 0.0 {
            // Nothing is drawn.
            config.seed = 0;
        }
        if config.keep == Keep::All {
            config.extraction = Extraction::default();
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = writing::sampling_errors(&config.sampling());
        if config.temperature == 0.0 && config.samples > 1 {
            errors.push(
                ConfigError::at("samples", "greedy answers to one prompt are all the same")
                    .hint("set `temperature`, or leave `samples` out"),
            );
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("teacher", PortType::Model, "who answers")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the teacher")
            .input("data", PortType::Dataset, "rows with the prompts")
            .optional("view", PortType::Dataset, "rows of the same ids whose prompts the teacher reads instead")
            .output("data", PortType::Dataset, "the rows with the answers")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        outlook.holds("teacher");
        outlook.same_vocabulary(&["data", "view", "teacher"]);
        outlook.same_end("data", "teacher");
        outlook.same_width("teacher", "prompt");
        foresight::computes_in(outlook, config.dtype);
        let data = outlook.input("data");
        outlook.takes_rows("data", "rows", config.rows);
        let rows = outlook.rows("data").of_first(config.rows);
        let text = outlook.writes("teacher", Some("prompt"), &rows, config.max_new_tokens as u64);
        let many = |n: u64| n.min(config.rows.unwrap_or(u64::MAX)).saturating_mul(config.samples);
        let rows = data.rows.iter().map(|rows| Bounds {
            least: if config.leaves_out() { 0 } else { many(rows.least) },
            most: many(rows.most),
        });
        outlook.output("data", Facts { text, rows: rows.collect(), responses: Bounds::ANY, ..data });
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Generating { config }))
    }
}

impl Config {
    /// Whether rows may be missing from what comes out.
    fn leaves_out(&self) -> bool {
        self.cut_off == Some(CutOff::Dropped) || self.keep == Keep::Correct
    }
}

struct Generating {
    config: Config,
}

impl Operator for Generating {
    fn run(&mut self, mut inputs: Inputs, _step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let config = &self.config;
        let teacher = inputs.take::<LanguageModel>("teacher")?.frozen().computed_in(config.dtype)?;
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let data = inputs.take::<Dataset>("data")?;
        let view = View::take(&mut inputs)?;
        let asked = &data.rows[..data.rows.len().min(config.rows.map_or(usize::MAX, |rows| rows as usize))];
        let prompts = asked.iter().map(|row| {
            let ids = view.as_ref().map_or(Ok(row.prompt.as_slice()), |view| view.prompt_of(row.id))?;
            Ok(Prompt { row: row.id, ids })
        });
        let prompts: Vec<Prompt<'_>> = prompts.collect::<Result<_>>()?;
        let (count, total) = (asked.len() as u64, asked.len() as u64 * config.samples);
        let judge = (config.keep == Keep::Correct).then(|| Judge::new(&data, asked, config, sink)).transpose()?;
        let mut rows = Vec::with_capacity(total as usize);
        let (mut cut, mut wrong) = (0, 0);
        for sample in 0..config.samples {
            let options = config.options(usize::MAX, purpose::TEACH, sample as u32);
            let mut progress = |done| sink.progress(sample * count + done as u64, total, "answers");
            let generated = generate(&teacher, prompt.as_ref(), &prompts, &options, &mut progress);
            let behind = [Behind::new("teacher", &teacher, prompt.as_ref())];
            let generated = generated.map_err(|error| explain(error, NEXT_TOKEN, |at| asked.get(at), &behind))?;
            for (index, (row, generated)) in asked.iter().zip(generated).enumerate() {
                let correct = judge.as_ref().map_or(Ok(true), |judge| judge.finds_right(index, generated.answer()))?;
                match config.answered(row, generated, data.tokenizer.end) {
                    None => cut += 1,
                    Some(_) if !correct => wrong += 1,
                    Some(row) => rows.push(Row { id: row.id + sample * ANSWERS, ..row }),
                }
            }
        }
        ensure!(cut < total || total == 0, "every answer was cut off: raise `max_new_tokens`");
        ensure!(
            !rows.is_empty() || total == 0,
            "no answer is right, and `keep: correct` leaves nothing over: ask more of the teacher with `samples` or another \
             prompt, see whether `max_new_tokens` cuts answers off before their number, or say `keep: all`"
        );
        if cut > 0 {
            sink.note(&format!("{cut} of {total} answers were cut off and are left out"));
        }
        if wrong > 0 {
            sink.note(&format!("{wrong} of {total} answers have not the right number and are left out"));
        }
        Ok(Outputs::new().with("data", Dataset { rows, tokenizer: data.tokenizer.clone() }))
    }
}

impl Config {
    /// The row with this response; `None` where it is left out.
    fn answered(&self, row: &Row, generated: Generated, end_token: u32) -> Option<Row> {
        let Generated { mut ids, log_probs, mut end } = generated;
        let mut log_probs = Some(log_probs);
        match self.cut_off {
            Some(CutOff::Dropped) if end == End::Length => return None,
            Some(CutOff::Ended) if end == End::Length => {
                ids.push(end_token);
                // Nobody wrote that token.
                (log_probs, end) = (None, End::Stop);
            }
            _ => {}
        }
        Some(Row { response: ids, end, log_probs, ..row.clone() })
    }
}

/// Reads answers for `keep: correct`.
struct Judge {
    text: Text,
    extraction: Extraction,
    /// The right numbers of each row.
    right: Vec<Vec<f64>>,
}

impl Judge {
    fn new(data: &Dataset, asked: &[Row], config: &Config, sink: &mut dyn Sink) -> Result<Self> {
        let cleaned = |row: &Row| row.references.iter().map(|text| score::clean(text)).collect::<Vec<_>>();
        let right: Vec<Vec<f64>> = asked.iter().map(|row| number::right(&cleaned(row))).collect();
        let (without, all) = (right.iter().filter(|numbers| numbers.is_empty()).count(), right.len());
        ensure!(
            without < all || all == 0,
            "none of the {all} rows has a right answer with a number, by which `keep: correct` goes: say `keep: all`, or take data \
             with such answers"
        );
        if without > 0 {
            sink.warn(&format!(
                "{without} of {all} rows have no right answer with a number: `keep: correct` leaves them out"
            ));
        }
        Ok(Judge { text: Text::new(&data.tokenizer, SpecialTokens::Text)?, extraction: config.extraction, right })
    }

    /// Whether this answer to a row, by its index, has a right number.
    fn finds_right(&self, row: usize, answer: &[u32]) -> Result<bool> {
        let found = number::of(&score::clean(&self.text.decode(answer)?), self.extraction);
        Ok(number::correct(found.map(|found| found.value), &self.right[row]) == Some(true))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;
    use contract::{Kind, TokenizerFile};
    use lm::{Architecture, Family};
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::testing::{Log, Scratch, output, row};

    fn write(config: Json) -> Arc<Dataset> {
        write_for(|_| Vec::new(), config).unwrap().0
    }

    /// Answers to twelve prompts with these right answers, and what was said of them.
    fn write_for(references: impl Fn(u64) -> Vec<String>, config: Json) -> Result<(Arc<Dataset>, Log)> {
        let words: serde_json::Map<String, Json> = (0..40).map(|id| (format!("t{id}"), json!(id))).collect();
        let json = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}});
        let tokenizer = TokenizerFile::new(json.to_string(), 0, 40);
        let shape = Architecture { heads: Some(2), positions: Some(64), ..Architecture::new(Family::Gpt2, 1, 16) };
        let model = LanguageModel::init(&shape, tokenizer.clone(), 1, &Device::Cpu).unwrap();
        let rows = (0..12).map(|id| Row { references: references(id), ..row(id, &[1 + id as u32, 2], &[3]) }).collect();
        let inputs: Vec<(&str, AnyValue)> =
            vec![("teacher", Arc::new(model)), ("data", Arc::new(Dataset { rows, tokenizer }))];
        let kind: &dyn Kind = &TeacherGenerate;
        let (outputs, log) = Scratch::new().run(kind, config, inputs.into_iter().collect())?;
        Ok((output(&outputs, "data"), log))
    }

    #[test]
    fn every_prompt_is_answered_so_many_times_and_the_first_answers_are_those_of_one() {
        let one = write(json!({"max_new_tokens": 10, "seed": 5}));
        let three = write(json!({"max_new_tokens": 10, "seed": 5, "samples": 3, "batch": 5}));
        assert_eq!((one.rows.len(), three.rows.len()), (12, 36));
        assert_eq!(one.rows, three.rows[..12]);
        let answers = |sample: usize| three.rows[12 * sample..][..12].iter().map(|row| row.response.clone());
        assert!(answers(0).ne(answers(1)) && answers(1).ne(answers(2)));
        let ids: std::collections::BTreeSet<u64> = three.rows.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), 36);
        for row in &three.rows {
            assert_eq!(row.log_probs.as_ref().unwrap().len(), row.response.len());
        }
    }

    #[test]
    fn what_was_cut_off_stays_open_is_ended_or_is_dropped() {
        let rows = |cut_off: &str| write(json!({"max_new_tokens": 20, "seed": 5, "cut_off": cut_off})).rows.clone();
        let (open, ended, dropped) = (rows("open"), rows("ended"), rows("dropped"));
        let cut: Vec<&Row> = open.iter().filter(|row| row.end == End::Length).collect();
        assert!(!cut.is_empty() && cut.len() < open.len());
        assert_eq!(dropped.len(), open.len() - cut.len());
        assert!(dropped.iter().all(|row| row.end == End::Stop));
        for (open, ended) in open.iter().zip(&ended) {
            assert_eq!((ended.end, ended.response.last()), (End::Stop, Some(&0)));
            assert_eq!(ended.response[..open.response.len()], open.response);
        }
    }

    #[test]
    fn only_answers_with_the_right_number_stay_when_asked_for() {
        let all = write(json!({"max_new_tokens": 10, "seed": 5, "samples": 3}));
        let number = |row: &Row| row.response.iter().rev().find(|&&id| id != 0).copied();
        // Right is what the first answer to an even row says; odd rows have no right number.
        let references = |id: u64| match number(&all.rows[id as usize]) {
            Some(right) if id.is_multiple_of(2) => vec![format!("so\n#### {right}.0")],
            _ => vec!["who knows".to_owned()],
        };
        let asked = |keep: &str| {
            let config = json!({"max_new_tokens": 10, "seed": 5, "samples": 3, "keep": keep});
            write_for(references, config).unwrap()
        };
        let right = |row: &&Row| {
            let first = &all.rows[(row.id % ANSWERS) as usize];
            first.id.is_multiple_of(2) && number(first).is_some() && number(row) == number(first)
        };
        let expected: Vec<&Row> = all.rows.iter().filter(right).collect();
        let (kept, log) = asked("correct");
        assert!((2..30).contains(&kept.rows.len()));
        assert!(
            kept.rows.iter().map(|row| (row.id, &row.response)).eq(expected.iter().map(|row| (row.id, &row.response)))
        );
        assert_eq!(
            log.notes,
            [format!("{} of 36 answers have not the right number and are left out", 36 - expected.len())]
        );
        assert!(
            log.warnings[0].ends_with("of 12 rows have no right answer with a number: `keep: correct` leaves them out")
        );
        assert_eq!(asked("all").0.rows.len(), 36);
    }

    #[test]
    fn nothing_right_is_an_error_that_says_what_to_do() {
        let error = |reference: &str| {
            let config = json!({"max_new_tokens": 10, "keep": "correct"});
            write_for(|_| vec![reference.to_owned()], config).err().unwrap().to_string()
        };
        assert!(error("words").starts_with("none of the 12 rows has a right answer with a number"));
        assert!(error("#### 99").starts_with("no answer is right, and `keep: correct` leaves nothing over"));
    }
}
