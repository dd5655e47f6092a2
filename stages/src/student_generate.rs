//! `student-generate`: the student answers prompts, so that it can be taught on its own text.
//!
//! ```yaml
//! respond:
//!   kind: student-generate
//!   in: {model: carry.student, data: windows.batch}
//!   with: {temperature: 1.0, max_new_tokens: 48, seed: 10}
//! ```
//!
//! A response ends with the first end token, or is cut off by `max_new_tokens`, the model's context, or
//! what the stages of the same loop that read it can take. A row's draws depend on the seed, the round and the row alone, so
//! neither batch size nor resumption changes them. With `fraction` some rows keep the response they have: the on-policy
//! fraction λ of GKD (Agarwal et al., "On-policy distillation of language models", 2024, algorithm 1) and ImitKD. With a
//! `teacher` every token is drawn from `(1 - teacher_share)` of the student's and `teacher_share` of the teacher's
//! distribution: the teacher-mixed sampling of MiniLLM (Gu et al., 2024, section 2.2).
//!
//! Inputs: `model`, `data` (its prompts), `teacher`. Outputs: `data`, the same rows with new responses and their
//! log-probabilities under what wrote them. Cost: a forward pass a token of the longest response, over the rows still
//! unfinished.

use contract::random::{philox, purpose, uniform};
use contract::{
    About, AnyValue, Bounds, Cause, ConfigError, Conventions, Dataset, Env, Facts, Inputs, Longest, Operator, Outlook,
    Outputs, PortType, Ports, Result, Row, Sink, Stage, Step,
};
use lm::LanguageModel;

use crate::foresight;
use crate::writing::{self, CutOff, Writer};

writing::config! {
    /// The `with` of `student-generate`.
    pub struct Config {
        /// Share of the rows that are answered anew, drawn row by row in every round; the others keep their response.
        #[serde(default = "all")]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub fraction: f64,
        /// What the distribution of `teacher` counts in every draw.
        #[serde(default = "default_teacher_share")]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub teacher_share: f64,
        /// What becomes of a response that was cut off; left out: as the conventions say.
        #[serde(default)]
        pub cut_off: Option<crate::writing::CutOff>,
    }
}

fn all() -> f64 {
    1.0
}

/// As published.
fn default_teacher_share() -> f64 {
    0.2
}

/// The kind.
pub struct StudentGenerate;

impl Stage for StudentGenerate {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "student-generate",
            version: 3,
            numerics: Some(lm::NUMERICS),
            summary: "lets the student answer prompts, to be taught on its own text",
            example: "kind: student-generate\nin: {model: carry.student, data: windows.batch}\nwith: {max_new_tokens: 48, seed: 10}",
            reads_clock: true,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.cut_off.get_or_insert(CutOff::of(conventions));
        if config.temperature == 0.0 && config.fraction == 1.0 {
            // Nothing is drawn.
            config.seed = 0;
        }
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        writing::sampling_errors(&config.sampling())
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input("model", PortType::Model, "who answers")
            .input("data", PortType::Dataset, "rows with the prompts")
            .optional("teacher", PortType::Model, "has a say in every token")
            .output("data", PortType::Dataset, "the rows with the answers")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        vec!["batch"]
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        outlook.holds("model");
        outlook.holds("teacher");
        outlook.same_vocabulary(&["data", "model", "teacher"]);
        outlook.same_end("data", "model");
        if config.teacher_share != default_teacher_share() && !outlook.has("teacher") {
            outlook.error(
                [Cause::Field("teacher_share".into())],
                "nothing reads `teacher_share` here",
                "connect `teacher`, who is to have a say",
            );
        }
        foresight::computes_in(outlook, config.dtype);
        let data = outlook.input("data");
        let text = outlook.writes("model", None, &outlook.rows("data"), config.max_new_tokens as u64);
        // Rows that keep their response are as long as they were.
        let kept =
            if config.fraction < 1.0 { data.text.most.map(|most| text.most.map(|new| new.max(most))) } else { None };
        let text = kept.map_or(text, Longest::at_most);
        outlook.output("data", Facts { text, responses: Bounds::ANY, ..data });
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, _env: &Env, _state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Generating { config, longest: usize::MAX }))
    }
}

impl Config {
    /// Whether a row is answered anew in this round.
    fn answers(&self, row: &Row, step: &Step) -> bool {
        let drawn = || {
            let id = (row.id ^ row.id >> 32) as u32;
            let [word, ..] = philox(self.seed, [0, id, step.round as u32, purpose::ON_POLICY]);
            f64::from(uniform(word))
        };
        self.fraction == 1.0 || drawn() < self.fraction
    }
}

struct Generating {
    config: Config,
    /// Prompt and response together, as all who read them can take.
    longest: usize,
}

impl Operator for Generating {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let Generating { config, longest } = self;
        let model = inputs.take::<LanguageModel>("model")?.frozen().computed_in(config.dtype)?;
        let teacher = inputs.take_optional::<LanguageModel>("teacher")?;
        let teacher = teacher.map(|teacher| teacher.frozen().computed_in(config.dtype)).transpose()?;
        let data = inputs.take::<Dataset>("data")?;
        let asked: Vec<&Row> = data.rows.iter().filter(|row| config.answers(row, step)).collect();
        let writer = Writer { model: &model, teacher: teacher.as_ref().map(|teacher| (teacher, config.teacher_share)) };
        let options = config.options(*longest, purpose::GENERATE, step.round as u32);
        let force_end = config.cut_off == Some(CutOff::ForcedEnd);
        let mut answered = writer.answer(&asked, &options, force_end, data.tokenizer.end, sink)?.into_iter();
        let rows = data.rows.iter().map(|row| match config.answers(row, step).then(|| answered.next()).flatten() {
            Some(answered) => answered,
            None => row.clone(),
        });
        let rows = rows.collect();
        Ok(Outputs::new().with("data", Dataset { rows, tokenizer: data.tokenizer.clone() }))
    }

    fn make_room(&mut self, longest: u64) {
        self.longest = usize::try_from(longest).unwrap_or(usize::MAX);
    }
}
