//! A teacher with another tokenizer than its student.
//!
//! Both read the same response, each in its own tokens. These are put into the shortest groups that begin and end at the same bytes
//! ([`groups`]), and what is compared depends on the group:
//!
//! - One token of each: both have read the same text and choose what comes next. The teacher's distribution is told in the student's
//!   tokens: each of its tokens counts for the one with which the student begins to spell it ([`Spelling::begins`]). It is compared
//!   with the student's distribution over those tokens; what the student has beside them is neither asked for nor taken away.
//! - Several tokens: each model's probabilities of the tokens are multiplied, which gives that of the group's text. The two are compared
//!   as those of an event and its opposite.
//!
//! With one tokenizer on both sides every group has one token of each, every token counts for itself, and the loss is that of
//! `alignment: ids`. Both comparisons are of coarser distributions than those over all texts, so that with an f-divergence neither is
//! larger than what it stands for, and both are 0 where the models agree on the text.
//!
//! GOLD (of TRL) begins with the same groups. It multiplies the first token's distribution of a group by the probabilities of the other
//! tokens, and so compares numbers that do not add up to 1 for all but the text at hand; and it compares tokens that only one side
//! has by their sorted probabilities, whatever they spell. Neither is done here. The comparison of a group's probabilities is that of
//! approximate likelihood matching (Minixhofer, Vulić and Ponti, 2025), the counting of tokens for their beginnings a case of the
//! projections of X-Token.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use contract::{End, Row, TokenizerFile};
use lm::Response;
use lm::loss::{Divergence, Source, Target, TopK, event_divergence, head_loss, log_probs};

use crate::aligned::{Aligned, View};
use crate::spelling::{Group, Spelling, groups};
use crate::text::{SpecialTokens, Text};

/// Numbers of target distributions that are held at once.
const HELD: usize = 1 << 22;

/// The tokenizers of a student and of its teacher, beside each other.
pub struct Across {
    student: Spelling,
    teacher: Spelling,
    /// The teacher's.
    text: Text,
    ends: (u32, u32),
    /// The tokens of the student that a token of the teacher counts for.
    shared: Vec<u32>,
    /// Of each token of the teacher its place among those.
    classes: Vec<Option<u32>>,
}

/// What a teacher reads in its own tokens beside its student's text.
pub struct Paired {
    /// The teacher's text.
    pub text: Aligned,
    /// Groups of response tokens: places among all of the student's, and among all of the teacher's.
    pub groups: Vec<Group>,
}

/// How the two are compared.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// The distance.
    pub divergence: Divergence,
    /// What it counts in the loss.
    pub coefficient: f64,
    /// Of both models' distributions.
    pub temperature: f64,
}

/// Hidden states where they predict response tokens, with the head and the tokens.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// `[N, C]`.
    pub hidden: &'a Tensor,
    /// `[V, C]`.
    pub head: &'a Tensor,
    /// The N tokens.
    pub labels: &'a [u32],
}

impl Across {
    /// Of the tokenizers of a student and of its teacher.
    ///
    /// Errors where one's tokens do not spell text byte by byte.
    pub fn new(student: &TokenizerFile, teacher: &TokenizerFile) -> Result<Self> {
        let text = Text::new(teacher, SpecialTokens::Text)?;
        let ends = (student.end, teacher.end);
        let student = Spelling::of(student).context("`alignment: bytes` cannot read the student's tokenizer")?;
        let teacher = Spelling::of(teacher).context("`alignment: bytes` cannot read the teacher's tokenizer")?;
        let begins = student.begins(&teacher);
        let mut shared: Vec<u32> = begins.iter().flatten().copied().collect();
        shared.sort_unstable();
        shared.dedup();
        let place = |id: u32| shared.binary_search(&id).expect("it is one of them") as u32;
        let classes = begins.iter().map(|id| id.map(place)).collect();
        Ok(Across { student, teacher, text, ends, classes, shared })
    }

    /// The teacher's reading of responses: prompts as `view` has them, in the teacher's tokens, and the same text behind. At most
    /// `room` tokens of a row are read.
    ///
    /// Errors when a row has no prompt there.
    pub fn pair(&self, rows: &[Response<'_>], view: &View, room: usize) -> Result<Paired> {
        let (mut read, mut found) = (Vec::new(), Vec::new());
        let (mut own, mut others) = (0, 0);
        for Response { row, tokens, .. } in rows {
            let prompt = view.prompt_of(*row)?;
            let text = self.student.text(tokens);
            let mut response = self.behind(prompt, &text)?;
            let student = self.student.each(tokens);
            let mut of_row = groups(&student, &self.teacher.each(&response));
            let ended = tokens.last() == Some(&self.ends.0) && student.len() + 1 == tokens.len();
            let all = of_row.last().map_or((0, 0), |group| (group.student.end, group.teacher.end));
            response.extend(ended.then_some(self.ends.1));
            if ended && all == (student.len(), response.len() - 1) {
                of_row.push(Group { student: all.0..all.0 + 1, teacher: all.1..all.1 + 1 });
            }
            // The last token is only predicted.
            response.truncate((room + 1).saturating_sub(prompt.len()));
            of_row.retain(|group| group.teacher.end <= response.len());
            let moved = |group: Group| Group {
                student: group.student.start + own..group.student.end + own,
                teacher: group.teacher.start + others..group.teacher.end + others,
            };
            found.extend(of_row.into_iter().map(moved));
            (own, others) = (own + tokens.len(), others + response.len());
            let prompt = prompt.to_vec();
            read.push(Row {
                id: *row,
                prompt,
                response,
                end: End::Length,
                log_probs: None,
                references: Vec::new(),
                family: None,
            });
        }
        Ok(Paired { text: Aligned::of(&read), groups: found })
    }

    /// The teacher's ids of a text behind a prompt.
    fn behind(&self, prompt: &[u32], text: &str) -> Result<Vec<u32>> {
        // What stands behind the last token that steers is one text with the response.
        let start = prompt.iter().rposition(|id| self.teacher.bytes(*id).is_none()).map_or(0, |place| place + 1);
        let tail = self.teacher.text(&prompt[start..]);
        // The first space may be the tokenizer's own.
        for before in [tail.as_str(), tail.strip_prefix(' ').unwrap_or(&tail)] {
            if let Some(ids) = self.text.encode(&format!("{before}{text}"))?.strip_prefix(&prompt[start..]) {
                return Ok(ids.to_vec());
            }
        }
        self.text.encode(text)
    }

    /// The loss of grouped tokens, and the sum of their weighted divergences. `weights` are those of the student's tokens; a group has
    /// that of its first. Gradients flow into the student's hidden states and head.
    pub fn loss(
        &self,
        paired: &[Group],
        student: Side<'_>,
        teacher: Side<'_>,
        comparison: Comparison,
        weights: &[f32],
    ) -> Result<(Tensor, f64)> {
        let alone = |group: &&Group| group.student.len() == 1 && group.teacher.len() == 1;
        let (single, several): (Vec<&Group>, Vec<&Group>) = paired.iter().partition(alone);
        let (losses, sum) = self.of_distributions(&single, student, teacher, comparison, weights)?;
        let (more, more_sum) = of_events(&several, student, teacher, comparison, weights)?;
        let mut loss: Option<Tensor> = None;
        for part in losses.into_iter().chain(more) {
            loss = Some(match loss {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        let loss = match loss {
            Some(loss) => loss,
            // Where nothing is compared, gradients are zeros.
            None => ((student.hidden.sum_all()? + student.head.sum_all()?)? * 0.0)?,
        };
        Ok((loss, sum + more_sum))
    }

    fn of_distributions(
        &self,
        groups: &[&Group],
        student: Side<'_>,
        teacher: Side<'_>,
        Comparison { divergence, coefficient, temperature }: Comparison,
        weights: &[f32],
    ) -> Result<(Vec<Tensor>, f64)> {
        if groups.is_empty() {
            return Ok((Vec::new(), 0.0));
        }
        let classes = self.classes_of(teacher.head.dim(0)?);
        let device = student.hidden.device();
        let is_whole = self.shared.len() == student.head.dim(0)?;
        let head = if is_whole { student.head.clone() } else { rows(student.head, &self.shared, device)? };
        let (mut losses, mut sum) = (Vec::new(), 0.0);
        for groups in groups.chunks((HELD / self.shared.len()).max(16)) {
            let own: Vec<u32> = groups.iter().map(|group| group.student.start as u32).collect();
            let others: Vec<u32> = groups.iter().map(|group| group.teacher.start as u32).collect();
            let weights: Vec<f32> = own.iter().map(|place| weights[*place as usize]).collect();
            let said = rows(teacher.hidden, &others, device)?;
            let said = TopK::of_classes(&said, teacher.head, &classes, self.shared.len(), temperature)?;
            let target = Target { source: Source::TopK(&said), divergence, coefficient, temperature };
            let loss = head_loss(&rows(student.hidden, &own, device)?, &head, None, &[target], &weights)?;
            sum += loss.divergences[0];
            losses.push(loss.loss);
        }
        Ok((losses, sum))
    }

    /// Padding of the teacher's head is of no class.
    fn classes_of(&self, rows: usize) -> Vec<Option<u32>> {
        let mut classes = self.classes.clone();
        classes.resize(rows, None);
        classes
    }
}

/// The loss of groups of several tokens.
fn of_events(
    groups: &[&Group],
    student: Side<'_>,
    teacher: Side<'_>,
    Comparison { divergence, coefficient, temperature }: Comparison,
    weights: &[f32],
) -> Result<(Option<Tensor>, f64)> {
    if groups.is_empty() {
        return Ok((None, 0.0));
    }
    let device = student.hidden.device();
    // Logits at a temperature are those of hidden states divided by it.
    let chosen = |side: Side<'_>, places: &[u32]| -> Result<(Tensor, Vec<u32>)> {
        let labels = places.iter().map(|place| side.labels[*place as usize]).collect();
        Ok(((rows(side.hidden, places, device)? / temperature)?, labels))
    };
    let own: Vec<u32> = groups.iter().flat_map(|group| group.student.clone()).map(|place| place as u32).collect();
    let others: Vec<u32> = groups.iter().flat_map(|group| group.teacher.clone()).map(|place| place as u32).collect();
    let (hidden, labels) = chosen(student, &own)?;
    let (read, read_labels) = chosen(teacher, &others)?;
    let log_s = log_probs(&hidden.detach(), &student.head.detach(), &labels)?;
    let log_t = log_probs(&read, teacher.head, &read_labels)?;
    let (mut log_s, mut log_t) = (log_s.as_slice(), log_t.as_slice());
    let next = |length: usize, logs: &mut &[f32]| {
        let (of_group, rest) = logs.split_at(length);
        *logs = rest;
        of_group.iter().map(|log| f64::from(*log)).sum::<f64>()
    };
    // The gradient of a group's divergence is that of its tokens' cross-entropy, times what the divergence gains by it.
    let (mut slopes, mut sum) = (Vec::with_capacity(own.len()), 0.0);
    for group in groups {
        let weight = f64::from(weights[group.student.start]);
        let both = (next(group.student.len(), &mut log_s), next(group.teacher.len(), &mut log_t));
        let (value, slope) = event_divergence(divergence, both.0, both.1);
        sum += weight * value;
        slopes.extend(group.student.clone().map(|_| (-weight * slope) as f32));
    }
    let loss = head_loss(&hidden, student.head, Some((&labels, coefficient)), &[], &slopes)?;
    let value = coefficient * sum - coefficient * loss.cross_entropy.context("there are labels")?;
    Ok((Some((loss.loss + value)?), sum))
}

/// Rows of a matrix.
fn rows(matrix: &Tensor, places: &[u32], device: &Device) -> Result<Tensor> {
    Ok(matrix.index_select(&Tensor::new(places, device)?, 0)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::{DType, Var};
    use contract::{AnyValue, Dataset, Kind};
    use lm::{Architecture, Family, LanguageModel};
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::distill::Distill;
    use crate::testing::{Scratch, row};
    use crate::train_tokenizer::from_merges;

    const CPU: Device = Device::Cpu;

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn near(found: &[f64], right: &[f64], tolerance: f64, what: &str) {
        let largest = right.iter().fold(1e-30_f64, |most, x| most.max(x.abs()));
        assert_eq!(found.len(), right.len(), "{what}");
        let worst = found.iter().zip(right).fold(0.0_f64, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst <= tolerance * largest, "{what}: off by {worst:e} of {largest}");
    }

    fn ids(json: &Json) -> Vec<u32> {
        serde_json::from_value(json.clone()).unwrap()
    }

    /// `tests/fixtures/parity/make_across.py` is that program.
    #[test]
    fn groups_values_and_gradients_are_those_of_an_independent_program() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/across");
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        let expected: Json = serde_json::from_slice(&read("expected.json")).unwrap();
        let tensors = candle_core::safetensors::load(folder.join("tensors.safetensors"), &CPU).unwrap();
        let [student, teacher] = ["student", "teacher"].map(|name| {
            let head = tensors[&format!("{name}_head")].dim(0).unwrap();
            TokenizerFile::new(read(&format!("{name}.json")), 0, head as u32)
        });
        let across = Across::new(&student, &teacher).unwrap();
        assert_eq!(across.shared.len() as u64, expected["shared"].as_u64().unwrap());

        let rows = expected["rows"].as_array().unwrap();
        let of = |name: &str| rows.iter().map(|row| ids(&row[name])).collect::<Vec<_>>();
        let (prompts, responses) = (of("student_prompt"), of("student"));
        let texts = prompts.iter().zip(&responses).zip(0..);
        let texts: Vec<Response<'_>> = texts.map(|((prompt, tokens), row)| Response { row, prompt, tokens }).collect();
        let seen = (0..).zip(of("teacher_prompt")).map(|(id, prompt)| row(id, &prompt, &[])).collect();
        let view = View::of(Arc::new(Dataset { rows: seen, tokenizer: teacher }));
        let paired = across.pair(&texts, &view, 1000).unwrap();
        assert_eq!(paired.text.labels, of("teacher").concat());
        let read_prompts: Vec<Vec<u32>> = paired.text.rows().iter().map(|it| it.prompt.to_vec()).collect();
        assert_eq!(read_prompts, of("teacher_prompt"));
        let range = |json: &Json| ids(json)[0] as usize..ids(json)[1] as usize;
        let groups = expected["groups"].as_array().unwrap().iter();
        let groups: Vec<Group> =
            groups.map(|it| Group { student: range(&it["student"]), teacher: range(&it["teacher"]) }).collect();
        assert_eq!(paired.groups, groups);
        // A teacher with less room reads less.
        let short = across.pair(&texts, &view, 8).unwrap();
        assert!(
            short.groups.len() < groups.len()
                && short.text.rows().iter().all(|it| it.prompt.len() + it.tokens.len() <= 9)
        );

        let weights: Vec<f32> = tensors["weights"].to_vec1().unwrap();
        let labels = responses.concat();
        for (name, case) in expected["cases"].as_object().unwrap() {
            let variable = |part: &str| Var::from_tensor(&tensors[part]).unwrap().into_inner();
            let (hidden, head) = (variable("student_hidden"), variable("student_head"));
            let comparison = Comparison {
                divergence: serde_json::from_value(case["divergence"].clone()).unwrap(),
                coefficient: 0.7,
                temperature: case["temperature"].as_f64().unwrap(),
            };
            let student = Side { hidden: &hidden, head: &head, labels: &labels };
            let said = Side {
                hidden: &tensors["teacher_hidden"],
                head: &tensors["teacher_head"],
                labels: &paired.text.labels,
            };
            let (loss, sum) = across.loss(&paired.groups, student, said, comparison, &weights).unwrap();
            let right = case["value"].as_f64().unwrap();
            near(&[sum, numbers(&loss)[0]], &[right, 0.7 * right], 1e-5, name);
            let store = loss.backward().unwrap();
            for (part, variable) in [("hidden", &hidden), ("head", &head)] {
                let right = numbers(&tensors[&format!("{name}_{part}_gradient")]);
                near(&numbers(store.get(variable).unwrap()), &right, 1e-5, &format!("{name}, {part}"));
            }
        }
    }

    /// Through the stage: metrics of an update, with one tokenizer on both sides.
    #[test]
    fn with_one_tokenizer_the_loss_is_that_of_its_ids() {
        let tokenizer = from_merges(&["h e", "he l", "Ġ w"]);
        let model = |layers: usize, seed: u64| -> AnyValue {
            let shape =
                Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(Family::Gpt2, layers, 16) };
            Arc::new(LanguageModel::init(&shape, tokenizer.clone(), seed, &CPU).unwrap())
        };
        let text = Text::new(&tokenizer, SpecialTokens::Text).unwrap();
        let rows = [("say", "hello we"), ("what", "é 😀 hel")].iter().zip(1..).map(|((prompt, response), id)| {
            let response = [text.encode(response).unwrap(), vec![0]].concat();
            row(id, &text.encode(prompt).unwrap(), &response)
        });
        let rows: Vec<_> = rows.collect();
        let data = || -> AnyValue { Arc::new(Dataset { rows: rows.clone(), tokenizer: tokenizer.clone() }) };
        for divergence in [json!("forward-kl"), json!("reverse-kl"), json!({"jsd": {"beta": 0.3}})] {
            let learnt = |more: &[(&str, Json)], view: bool| -> HashMap<String, f64> {
                let mut config =
                    json!({"divergence": divergence, "learning_rate": 1e-2, "cross_entropy": 0.5, "micro_batch": 1});
                more.iter().for_each(|(name, value)| config[*name] = value.clone());
                let mut inputs = vec![("student", model(1, 3)), ("teacher", model(2, 4)), ("data", data())];
                inputs.extend(view.then(|| ("view", data())));
                let (_, log) = Scratch::new().run(&Distill, config, inputs).unwrap();
                log.rows[0].iter().map(|(name, value)| (name.clone(), value.as_f64().unwrap())).collect()
            };
            let right = learnt(&[], false);
            let found = learnt(&[("alignment", json!("bytes"))], true);
            assert!((found["aligned"] - 1.0).abs() < 1e-6, "{found:?}");
            for (name, right) in right {
                assert!(
                    (found[&name] - right).abs() <= 1e-6 * right.abs().max(1.0),
                    "{name}: {} {right}",
                    found[&name]
                );
            }
        }
    }

    #[test]
    fn another_tokenizer_must_be_meant_and_needs_a_view() {
        let (own, other) = (from_merges(&["h e"]), from_merges(&["h e", "l l"]));
        let model = |tokenizer: &TokenizerFile| -> AnyValue {
            let shape = Architecture { heads: Some(2), positions: Some(32), ..Architecture::new(Family::Gpt2, 1, 8) };
            Arc::new(LanguageModel::init(&shape, tokenizer.clone(), 1, &CPU).unwrap())
        };
        let data = |tokenizer: &TokenizerFile| -> AnyValue {
            Arc::new(Dataset { rows: vec![row(1, &[5], &[6, 0])], tokenizer: tokenizer.clone() })
        };
        let inputs = |view: Option<&TokenizerFile>| {
            let mut inputs = vec![("student", model(&own)), ("teacher", model(&other)), ("data", data(&own))];
            inputs.extend(view.map(|view| ("view", data(view))));
            inputs
        };
        let findings = |config: Json, inputs: &[(&str, AnyValue)]| {
            let config = Distill.resolve(&config, contract::Conventions::Sound).unwrap();
            let facts = inputs.iter().map(|(port, value)| ((*port).to_owned(), value.facts())).collect();
            let mut outlook = contract::Outlook::new(contract::Machine::default(), facts, None);
            Kind::foresee(&Distill, &config, &mut outlook);
            outlook.findings.into_iter().map(|finding| finding.message).collect::<Vec<_>>().join("; ")
        };
        let ids = json!({"divergence": "forward-kl", "learning_rate": 1e-2});
        let bytes = json!({"divergence": "forward-kl", "learning_rate": 1e-2, "alignment": "bytes"});
        assert!(findings(ids, &inputs(None)).contains("inputs `data` and `teacher` must have the same vocabulary"));
        assert!(findings(bytes.clone(), &inputs(None)).contains("needs `view`"));
        assert!(
            findings(bytes.clone(), &inputs(Some(&own)))
                .contains("inputs `view` and `teacher` must have the same vocabulary")
        );
        assert_eq!(findings(bytes, &inputs(Some(&other))), "");
    }
}
