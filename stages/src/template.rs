//! How a corpus row becomes text: the prompt's template, and the persona line before it.
//!
//! `train-tokenizer` and `tokenize` share this, so that a tokenizer sees in training the very text that it will encode.

use anyhow::{Context, Result, ensure};
use contract::dataset::row_name;
use contract::random::{self, philox, purpose};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::corpus::{CorpusRow, Turn};
use crate::instruct::JOBS;

/// Text around an instruction. Prompt and response are tokenised as one text, prompt first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Template {
    /// The template of Alpaca, which Dolly models of the distillation papers are trained with: a preamble, then
    /// `### Instruction:`, `### Input:` where there is input, and `### Response:`, each on a line of its own.
    #[default]
    Alpaca,
    /// `Task: INSTRUCTION`, the input (if any) on the next line, then `Answer:` on a line of its own and the response
    /// after a space. Five tokens of overhead: for models with a short context.
    Task,
    /// The instruction, the input (if any) on the next line, and the response on the line after.
    None,
    /// The row's own `prompt`, which must be there, with `<n>` read as a line break; the response follows directly.
    Ready,
    /// The chat template that the tokenizer carries, around the whole conversation. `train-tokenizer`, which has none yet,
    /// learns from what is said in it, a turn after the other.
    Chat,
}

impl Template {
    /// The prompt of a row. Errors where the template asks for what the row lacks: `ready` for a prompt, the others for an
    /// instruction where a ready prompt would be lost.
    pub fn prompt(self, row: &CorpusRow) -> Result<String> {
        ensure!(
            self == Template::Chat || row.turns.is_empty(),
            "{} has a conversation of which its instruction is the end, so the rest would be lost; choose `template: chat`",
            row_name(row.id)
        );
        ensure!(
            self == Template::Ready || !row.instruction.is_empty() || row.prompt.as_deref().unwrap_or("").is_empty(),
            "{} has a ready `prompt` and no instruction, so its prompt would be lost; choose `template: ready`, or take the \
             prompt for the instruction with `fields: {{instruction: prompt, prompt: none}}` of `download`",
            row_name(row.id)
        );
        let CorpusRow { instruction, input, .. } = row;
        let lines = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
        Ok(match self {
            Template::Alpaca if input.is_empty() => format!(
                "Below is an instruction that describes a task. Write a response that appropriately completes the \
                 request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
            ),
            Template::Alpaca => format!(
                "Below is an instruction that describes a task, paired with an input that provides further context. \
                 Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n\
                 ### Input:\n{input}\n\n### Response:\n"
            ),
            Template::Task => format!("Task: {lines}\nAnswer:"),
            Template::None => lines,
            Template::Chat => conversation(row).iter().map(|turn| turn.content.as_str()).collect::<Vec<_>>().join("\n"),
            Template::Ready => row
                .prompt
                .as_ref()
                .with_context(|| {
                    let row = row_name(row.id);
                    format!("{row} has no `prompt`; choose a `template` other than `ready`")
                })?
                .replace("<n>", "\n"),
        })
    }

    /// The response as it follows the prompt.
    pub fn response(self, output: &str) -> String {
        match self {
            Template::Alpaca | Template::Ready => output.to_owned(),
            Template::Task => format!(" {output}"),
            Template::None | Template::Chat => format!("\n{output}"),
        }
    }
}

/// What was said before the answer of a row: its turns, or else its instruction, with the input (if any) on the next line.
pub fn conversation(row: &CorpusRow) -> Vec<Turn> {
    if !row.turns.is_empty() {
        return row.turns.clone();
    }
    let CorpusRow { instruction, input, .. } = row;
    let content = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
    vec![Turn { role: "user".to_owned(), content }]
}

/// A line `Suppose you are a PERSONA.` before some prompts. A model trained from random weights must have met such a line
/// before a soft prompt can start from it. The persona is `student` one time in three, else a job of the built-in corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Personas {
    /// Share of rows that get a line, 0 to 1. Half: the model must do as well with the line as without.
    #[serde(default = "half")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub fraction: f64,
    /// Seed of who gets which line.
    #[serde(default)]
    #[schemars(range(min = 0, max = contract::limits::SEED))]
    pub seed: u64,
}

fn half() -> f64 {
    0.5
}

impl Personas {
    /// The line for a row, with its line break; `None` for rows that get none. Depends on the seed and the row's id only.
    pub fn line(&self, row_id: u64) -> Option<String> {
        let counter = [0, row_id as u32, (row_id >> 32) as u32, purpose::PERSONA];
        let [whether, who, high, low] = philox(self.seed, counter);
        (f64::from(random::uniform(whether)) < self.fraction).then(|| {
            let persona = match random::below(who, 0, 3) {
                0 => "student",
                _ => JOBS[random::below(high, low, JOBS.len() as u64) as usize].name,
            };
            persona_line(persona)
        })
    }
}

/// The line for one persona.
pub fn persona_line(persona: &str) -> String {
    let article = crate::instruct::article(persona);
    format!("Suppose you are {article} {persona}.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(input: &str) -> CorpusRow {
        CorpusRow {
            id: 4,
            instruction: "Add.".into(),
            input: input.into(),
            prompt: None,
            turns: Vec::new(),
            output: "3".into(),
            references: vec!["3".into()],
            family: None,
        }
    }

    #[test]
    fn the_input_has_a_place_in_every_template() {
        let whole =
            |t: Template, input| format!("{}|{}", t.prompt(&row(input)).unwrap(), t.response("3")).replace('\n', "/");
        assert_eq!(whole(Template::Task, ""), "Task: Add./Answer:| 3");
        assert_eq!(whole(Template::Task, "1 2"), "Task: Add./1 2/Answer:| 3");
        assert_eq!(whole(Template::None, "1 2"), "Add./1 2|/3");
        assert!(whole(Template::Alpaca, "").ends_with("request.//### Instruction:/Add.//### Response:/|3"));
        assert!(whole(Template::Alpaca, "1 2").ends_with("/Add.//### Input:/1 2//### Response:/|3"));
    }

    #[test]
    fn a_ready_prompt_is_taken_as_it_is_and_must_be_there() {
        let ready = CorpusRow { prompt: Some("a<n>b".into()), ..row("") };
        assert_eq!(Template::Ready.prompt(&ready).unwrap(), "a\nb");
        let error = Template::Ready.prompt(&row("")).unwrap_err().to_string();
        assert!(error.contains("row 5 of `train` has no `prompt`"), "{error}");
    }

    #[test]
    fn only_the_chat_template_takes_a_conversation() {
        let turn = |role: &str, content: &str| Turn { role: role.into(), content: content.into() };
        let turns = vec![turn("system", "Be brief."), turn("user", "Add.")];
        assert_eq!(conversation(&row("1 2")), [turn("user", "Add.\n1 2")]);
        let row = CorpusRow { turns: turns.clone(), ..row("") };
        assert_eq!(conversation(&row), turns);
        assert_eq!(Template::Chat.prompt(&row).unwrap() + &Template::Chat.response("3"), "Be brief.\nAdd.\n3");
        for template in [Template::Alpaca, Template::Task, Template::None, Template::Ready] {
            let error = template.prompt(&row).unwrap_err().to_string();
            assert!(
                error.contains("row 5 of `train` has a conversation") && error.contains("`template: chat`"),
                "{error}"
            );
        }
    }

    #[test]
    fn no_template_loses_a_prompt() {
        let row = CorpusRow { instruction: String::new(), prompt: Some("a".into()), ..row("x") };
        for template in [Template::Alpaca, Template::Task, Template::None] {
            let error = template.prompt(&row).unwrap_err().to_string();
            assert!(error.contains("row 5 of `train` has a ready `prompt` and no instruction"), "{error}");
        }
        assert_eq!(Template::Ready.prompt(&row).unwrap(), "a");
    }

    #[test]
    fn personas_follow_their_fraction_and_a_third_are_students() {
        let personas = Personas { fraction: 0.5, seed: 3 };
        let lines: Vec<_> = (0..6000).filter_map(|id| personas.line(id)).collect();
        assert!((2800..3200).contains(&lines.len()), "{}", lines.len());
        let students = lines.iter().filter(|l| *l == "Suppose you are a student.\n").count();
        assert!((850..1150).contains(&students), "{students}");
        assert_eq!(personas.line(5), personas.line(5));
        assert_eq!(Personas { fraction: 0.0, seed: 3 }.line(1), None);
        assert!((0..100).all(|id| Personas { fraction: 1.0, seed: 3 }.line(id).is_some()));
    }
}
