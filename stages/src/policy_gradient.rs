//! `policy-gradient`: the student learns from how likely the teacher finds whole responses of its own: MiniLLM.
//!
//! ```yaml
//! learn:
//!   kind: policy-gradient
//!   in: {student: carry.student, teacher: teacher, data: respond, text: windows.text}
//!   with: {learning_rate: 5e-6, passes: 4, batch: 64}
//! ```
//!
//! Reverse KL of whole responses, minimised by policy gradient with the three remedies of Gu et al., "MiniLLM: Knowledge
//! distillation of large language models", 2024, section 2.2. A token's reward is `ln p - ln q`, with `p` the teacher's and
//! `q` the student's probability when the response was written, divided by `reward_scaling` and clipped. Its return is what
//! comes behind it, discounted and divided by the number of tokens there (length normalisation), then whitened. The loss of a
//! token is that of PPO, `max(-A ρ, -A clip(ρ))`, with `ρ = q_new / q_old` times `q_old / w`, where `w` wrote the token (a mixture
//! with the teacher, in `student-generate`); beside it `single_step` times the reverse KL of its own distribution; beside both,
//! on `text`, cross-entropy and forward KL, so that the student keeps what it knew.
//!
//! A round reads its rollouts `passes` times, each time in another order, and makes an update of every `batch` of them.
//!
//! Inputs: `student`, `teacher` and its soft prompt, `data` with its log-probabilities, `text`. Outputs: `model`, and a row of
//! metrics an update. Cost: a forward pass of student and teacher over the rollouts, and in every pass another of both with a
//! backward pass of the student.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, ensure};
use candle_core::{Device, Tensor};
use contract::random::{permutation, purpose};
use contract::{
    About, AnyValue, Cause, ConfigError, Conventions, Dataset, Env, Inputs, Operator, Outlook, Outputs, PortType,
    Ports, Result, Row, Sink, Stage, Step, limits,
};
use lm::loss::{Divergence, Source, Target, head_loss, log_probs};
use lm::{Architecture, Dropout, LanguageModel, Lora, SoftPrompt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::aligned::{Aligned, Reader, View, by_row};
use crate::finite::{Behind, not_finite};
use crate::foresight;
use crate::training::{self, Beside, MicroBatch, Parts, Trainer, Training};

training::config! {
    /// The `with` of `policy-gradient`.
    pub struct Config {
        /// Times that the rollouts of a round are read; 4 as published.
        #[serde(default = "default_passes")]
        #[schemars(range(min = 1, max = limits::BATCH))]
        pub passes: u64,
        /// Rollouts of an update; left out: all of the round. What is left over in a pass is not read in it.
        #[serde(default)]
        #[schemars(range(min = 1, max = limits::BATCH))]
        pub batch: Option<u64>,
        /// What rewards are divided by; 0.5 as published.
        #[serde(default = "half")]
        #[schemars(range(min = 1e-6, max = limits::WEIGHT))]
        pub reward_scaling: f64,
        /// What a reward is at most, and its negative at least.
        #[serde(default = "default_reward_clip")]
        #[schemars(range(min = 0.0, max = limits::WEIGHT))]
        pub reward_clip: f64,
        /// What a reward counts a token earlier.
        #[serde(default = "default_discount")]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub discount: f64,
        /// Where a token's return begins: behind it (`next`), as in the paper, whose single-step term has the token's own reward;
        /// or with it (`own`), as in the published program. Left out: as the conventions say.
        #[serde(default)]
        pub returns: Option<Returns>,
        /// Over what returns are whitened; left out: as the conventions say.
        #[serde(default)]
        pub whitening: Option<Whitening>,
        /// Positions of a response with its padding, where those are whitened, too: `max_new_tokens` of the stage that wrote it.
        #[serde(default)]
        #[schemars(range(min = 1, max = limits::TOKENS))]
        pub padded_to: Option<u64>,
        /// How far `ρ` may be from 1 before it is clipped.
        #[serde(default = "default_ratio_clip")]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub ratio_clip: f64,
        /// What the reverse KL of every token's own distribution counts.
        #[serde(default = "one")]
        #[schemars(range(min = 0.0, max = limits::WEIGHT))]
        pub single_step: f64,
        /// Whether that counts a token by `q_old / w`, as in the paper, or each alike, as in the published program. Left out: as the
        /// conventions say.
        #[serde(default)]
        pub importance_in_single_step: Option<bool>,
        /// What the loss on `text` counts.
        #[serde(default = "one")]
        #[schemars(range(min = 0.0, max = limits::WEIGHT))]
        pub text_weight: f64,
        /// Share of the forward KL to the teacher in the loss on `text`; the rest is cross-entropy.
        #[serde(default = "half")]
        #[schemars(range(min = 0.0, max = 1.0))]
        pub text_divergence: f64,
        /// Shape of a student with random weights; for when no `student` is connected.
        #[serde(default)]
        pub init: Option<Architecture>,
        /// Train a low-rank adapter, and leave the student's own weights as they are.
        #[serde(default)]
        pub lora: Option<Lora>,
        /// Whether the student's dropout is on: off, as published, so that `ρ` is 1 before the first update.
        #[serde(default)]
        pub dropout: bool,
    }
}

/// Where a token's return begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Returns {
    /// With the token behind it.
    Next,
    /// With the token itself.
    Own,
}

/// Over what returns are whitened: their mean is taken away, and they are divided by their deviation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Whitening {
    /// Not at all.
    Off,
    /// Over the response tokens of all rollouts of the round.
    Tokens,
    /// Over the positions of each micro-batch, padding included, whose return is 0.
    Padded,
}

fn default_passes() -> u64 {
    4
}

fn half() -> f64 {
    0.5
}

fn one() -> f64 {
    1.0
}

fn default_reward_clip() -> f64 {
    100.0
}

fn default_discount() -> f64 {
    0.95
}

fn default_ratio_clip() -> f64 {
    0.2
}

/// The kind.
pub struct PolicyGradient;

impl Stage for PolicyGradient {
    type Config = Config;

    fn about(&self) -> About {
        About {
            name: "policy-gradient",
            version: 1,
            numerics: Some(lm::NUMERICS),
            summary: "trains a student by how likely the teacher finds its whole responses",
            example: "kind: policy-gradient\nin: {student: carry.student, teacher: teacher, data: respond, text: windows.text}\nwith: {learning_rate: 5e-6, passes: 4, batch: 64}",
            reads_clock: true,
        }
    }

    fn fill(&self, config: &mut Config, conventions: Conventions) {
        config.fill_settings(conventions);
        config.init = config.init.take().map(Architecture::without_defaults);
        config.optimizer.fill_for_model(conventions);
        let sound = conventions == Conventions::Sound;
        config.returns.get_or_insert(if sound { Returns::Next } else { Returns::Own });
        config.whitening.get_or_insert(if sound { Whitening::Tokens } else { Whitening::Padded });
        config.importance_in_single_step.get_or_insert(sound);
    }

    fn validate(&self, config: &Config) -> Vec<ConfigError> {
        let mut errors = training::validate_init(config.init.as_ref());
        errors.extend(config.optimizer.errors());
        let padded = config.whitening == Some(Whitening::Padded);
        if padded && config.padded_to.is_none() {
            errors.push(
                ConfigError::at("whitening", "`padded` needs to know how long a padded response is")
                    .hint("give `padded_to`, as `max_new_tokens` of the stage that writes; or `whitening: tokens`"),
            );
        }
        if !padded && config.padded_to.is_some() {
            errors.push(
                ConfigError::at("padded_to", "nothing reads `padded_to` here")
                    .hint("it belongs to `whitening: padded`"),
            );
        }
        errors
    }

    fn ports(&self, _config: &Config) -> Ports {
        Ports::new()
            .input(
                "data",
                PortType::Dataset,
                "responses with their log-probabilities, as `student-generate` writes them",
            )
            .input("teacher", PortType::Model, "the teacher, frozen")
            .optional("student", PortType::Model, "the student; without it, `init` says the shape")
            .optional("view", PortType::Dataset, "rows of the same ids whose prompts the teacher reads instead")
            .optional("prompt", PortType::SoftPrompt, "soft prompt of the teacher")
            .optional("text", PortType::Dataset, "text on which the student keeps what it knew")
            .output("model", PortType::Model, "the trained student")
    }

    fn outside_key(&self, _config: &Config) -> Vec<&'static str> {
        training::OUTSIDE_KEY.to_vec()
    }

    fn load_state(&self, folder: &Path, env: &Env) -> Result<AnyValue> {
        Trainer::load_state(folder, env)
    }

    fn foresee(&self, config: &Config, outlook: &mut Outlook) {
        let (init, lora) = (config.init.as_ref(), config.lora.as_ref());
        let model = foresight::learner(outlook, "student", init, "data", lora, config.activation_checkpointing);
        foresight::effective_batch(outlook, config.effective_batch, config.batch.map(|batch| ("batch", batch)));
        foresight::computes_in(outlook, config.dtype);
        outlook.output("model", model);
        foresight::teacher(outlook, "teacher", Some("prompt"));
        if outlook.has("text") {
            outlook.same_vocabulary(&["data", "text"]);
            outlook.reads("student", None, &outlook.rows("text"));
        }
        let rows = outlook.input("data").row_count();
        if let Some(batch) = config.batch.filter(|batch| rows.most < *batch) {
            outlook.error(
                [Cause::Field("batch".into())],
                format!("`batch` asks for {batch} rollouts, and a round has {}", rows.most),
                "raise `take` of the window, or lower `batch`",
            );
        }
    }

    fn needs(&self, _: &Config) -> contract::Needs {
        contract::Needs::GPU
    }

    fn start(&self, config: Config, env: &Env, state: Option<AnyValue>) -> Result<Box<dyn Operator>> {
        let trainer = Trainer::new(config.settings(), 1e-2, state);
        Ok(Box::new(Learning { device: lm::device(&env.device)?, trainer, config }))
    }
}

struct Learning {
    config: Config,
    device: Device,
    trainer: Trainer,
}

impl Operator for Learning {
    fn run(&mut self, mut inputs: Inputs, step: &Step, sink: &mut dyn Sink) -> Result<Outputs> {
        let data = inputs.take::<Dataset>("data")?;
        let text = inputs.take_optional::<Dataset>("text")?;
        let Config { seed, dtype, .. } = self.config;
        let (config, settings) = (self.config.clone(), self.config.settings());
        let shape = (config.init.as_ref(), config.lora.as_ref());
        let student = training::learner(&mut inputs, "student", shape, &settings, &data, &self.device)?;
        let teacher = inputs.take::<LanguageModel>("teacher")?.frozen().computed_in(dtype)?;
        let prompt = inputs.take_optional::<SoftPrompt>("prompt")?.map(|prompt| prompt.vectors.detach());
        let view = View::take(&mut inputs)?;
        let teacher = Reader { model: &teacher, prompt: prompt.as_ref(), view: view.as_ref() };
        let head = teacher.model.output_head()?.beside(student.vocab_size())?;
        let policy = Policy { config: &config, student: &student, teacher, head };
        let rollouts = policy.judge(&data)?;

        let rows = data.rows.len();
        let batch = config.batch.map_or(rows, |batch| batch as usize);
        ensure!(batch <= rows, "`batch` asks for {batch} rollouts, and this round has {rows}");
        let updates = config.passes * (rows / batch) as u64;
        let mut update = step.round * updates;
        let behind = [Behind::new("student", &student, None), Behind::new("teacher", teacher.model, teacher.prompt)];
        for pass in 0..config.passes {
            let time = step.round * config.passes + pass;
            let order = permutation(rows, seed, purpose::PASS, time as u32);
            for (index, part) in order.chunks_exact(batch).enumerate() {
                let step = Step { round: update, rounds: step.rounds * updates, ..*step };
                let dropout = training::dropout(config.dropout, seed, &step, purpose::DROPOUT);
                let kept =
                    text.as_ref().map(|text| share_of(text, pass * (rows / batch) as u64 + index as u64, updates));
                let mut texts = kept.map(|rows| Beside::new(rows, settings.mean(), NO_TEXT)).transpose()?;
                let loss = |batch: &MicroBatch, parts: &mut Parts| {
                    let mut loss = policy.loss(batch, &rollouts, dropout.as_ref(), parts)?;
                    if let Some((text, weight)) = texts.as_mut().and_then(|texts| texts.next(batch)) {
                        loss = (loss + policy.text_loss(&text, weight, dropout.as_ref(), parts)?)?;
                    }
                    Ok(loss)
                };
                let part = data.select(part);
                let mut row = self.trainer.update(&student.parameters(), &part, &step, sink, &behind, loss)?;
                row.insert("length".into(), json!(mean_length(&part)));
                sink.metrics(row);
                update += 1;
            }
        }
        Ok(Outputs::new().with("model", student))
    }

    fn state(&self) -> Result<Option<AnyValue>> {
        self.trainer.state()
    }
}

/// What is known of the tokens of a response from when it was written.
struct Rollout {
    /// `ln q` of each under the student.
    log_q: Vec<f64>,
    /// `q / w` of each, where `w` wrote it.
    importance: Vec<f64>,
    /// The return of each; whitened where that is done over the whole round.
    returns: Vec<f64>,
}

/// The student, and who judges it.
struct Policy<'a> {
    config: &'a Config,
    student: &'a LanguageModel,
    teacher: Reader<'a>,
    /// The teacher's, over the student's tokens.
    head: Tensor,
}

impl Policy<'_> {
    /// The returns of a round's responses, by row id.
    fn judge(&self, data: &Dataset) -> Result<HashMap<u64, Rollout>> {
        let size = self.config.micro_batch.map_or(data.rows.len(), |rows| rows as usize).max(1);
        let mut rollouts = HashMap::with_capacity(data.rows.len());
        for rows in data.rows.chunks(size) {
            let text = Aligned::of(rows);
            if text.tokens() == 0 {
                continue;
            }
            let own = log_probs(&text.hidden(self.student, None, None)?, &self.student.head()?, &text.labels)?;
            let other = log_probs(&self.teacher.hidden(&text)?, &self.teacher.model.head()?, &text.labels)?;
            for ((row, own), (_, other)) in by_row(rows, &own).zip(by_row(rows, &other)) {
                if !own.is_empty() {
                    rollouts.insert(row.id, self.rollout(row, own, other)?);
                }
            }
        }
        if self.config.whitening == Some(Whitening::Tokens) {
            let all = || data.rows.iter().filter_map(|row| rollouts.get(&row.id)).flat_map(|rollout| &rollout.returns);
            let white = White::of(all().copied(), all().count());
            rollouts.values_mut().for_each(|rollout| rollout.returns.iter_mut().for_each(|x| *x = white.of_one(*x)));
        }
        Ok(rollouts)
    }

    fn rollout(&self, row: &Row, own: &[f32], other: &[f32]) -> Result<Rollout> {
        let Config { reward_scaling, reward_clip, discount, returns, .. } = self.config;
        let rewards = own.iter().zip(other).map(|(own, other)| {
            ((f64::from(*other) - f64::from(*own)) / reward_scaling).clamp(-reward_clip, *reward_clip)
        });
        let rewards: Vec<f64> = rewards.collect();
        if !rewards.iter().all(|reward| reward.is_finite()) {
            let Reader { model, prompt, .. } = self.teacher;
            let models = [Behind::new("student", self.student, None), Behind::new("teacher", model, prompt)];
            return Err(not_finite("the reward", row, &models));
        }
        let written = row.log_probs.as_ref().context(
            "`data` does not say how likely its responses were when they were written: connect what `student-generate` \
             gives",
        )?;
        let skipped = written.len() - own.len();
        let importance = own.iter().zip(&written[skipped..]).map(|(own, w)| (f64::from(*own) - f64::from(*w)).exp());
        let log_q = own.iter().map(|own| f64::from(*own)).collect();
        let returns = returns_of(&rewards, *discount, *returns == Some(Returns::Own));
        Ok(Rollout { log_q, importance: importance.collect(), returns })
    }

    /// The loss of some responses.
    fn loss(
        &self,
        batch: &MicroBatch,
        rollouts: &HashMap<u64, Rollout>,
        dropout: Option<&Dropout>,
        parts: &mut Parts,
    ) -> Result<Tensor> {
        let Config { ratio_clip, single_step, .. } = self.config;
        let (text, weight) = (&batch.text, f64::from(batch.token_weight));
        let hidden = text.hidden(self.student, None, dropout)?; // [tokens, C]
        let head = self.student.head()?;
        let new = log_probs(&hidden.detach(), &head.detach(), &text.labels)?;
        let before: Vec<&Rollout> = text.packed.rows.iter().map(|row| &rollouts[row]).collect();
        let advantages = self.advantages(&before);

        let mut policy_weights = Vec::with_capacity(new.len()); // of -ln q, so that its gradient is that of the loss
        let mut single_weights = Vec::with_capacity(new.len());
        let (mut policy, mut divergence, mut clipped) = (0.0, 0.0, 0.0);
        let tokens = before.iter().flat_map(|rollout| rollout.log_q.iter().zip(&rollout.importance)).zip(&advantages);
        for (((log_q, importance), advantage), new) in tokens.zip(&new) {
            let rho = (f64::from(*new) - log_q).exp() * importance;
            let [plain, limited] = [rho, rho.clamp(1.0 - ratio_clip, 1.0 + ratio_clip)].map(|rho| -advantage * rho);
            let is_clipped = limited > plain;
            policy += weight * plain.max(limited);
            clipped += weight * f64::from(u8::from(is_clipped));
            policy_weights.push(if is_clipped { 0.0 } else { (weight * advantage * rho) as f32 });
            let counts = if self.config.importance_in_single_step == Some(true) { *importance } else { 1.0 };
            single_weights.push((weight * counts) as f32);
        }
        let mut loss = head_loss(&hidden, &head, Some((&text.labels, 1.0)), &[], &policy_weights)?.loss;
        parts.add("policy_gradient", policy);
        parts.add("loss", policy);
        if *single_step > 0.0 {
            let target = Target {
                source: Source::Head { hidden: &self.teacher.hidden(text)?, head: &self.head },
                divergence: Divergence::ReverseKl,
                coefficient: *single_step,
                temperature: 1.0,
            };
            let single = head_loss(&hidden, &head, None, &[target], &single_weights)?;
            divergence = single.divergences[0];
            parts.add("loss", single_step * divergence);
            loss = (loss + single.loss)?;
        }
        parts.add("single_step", divergence);
        parts.add("clipped", clipped);
        Ok(loss)
    }

    /// The advantage of every token of some responses.
    fn advantages(&self, rollouts: &[&Rollout]) -> Vec<f64> {
        let returns = || rollouts.iter().flat_map(|rollout| &rollout.returns).copied();
        let Some(padded_to) = self.config.padded_to.filter(|_| self.config.whitening == Some(Whitening::Padded)) else {
            return returns().collect();
        };
        let white = White::of(returns(), (rollouts.len() * padded_to as usize).max(returns().count()));
        returns().map(|x| white.of_one(x)).collect()
    }

    /// The loss of some text that the student is to keep.
    fn text_loss(&self, text: &Aligned, weight: f32, dropout: Option<&Dropout>, parts: &mut Parts) -> Result<Tensor> {
        let Config { text_weight, text_divergence, .. } = self.config;
        let hidden = text.hidden(self.student, None, dropout)?;
        let target = Target {
            source: Source::Head { hidden: &text.hidden(self.teacher.model, None, None)?, head: &self.head },
            divergence: Divergence::ForwardKl,
            coefficient: text_weight * text_divergence,
            temperature: 1.0,
        };
        let labels = Some((text.labels.as_slice(), text_weight * (1.0 - text_divergence)));
        let loss = head_loss(&hidden, &self.student.head()?, labels, &[target], &vec![weight; text.tokens()])?;
        let cross_entropy = loss.cross_entropy.unwrap_or_default();
        parts.add("text_cross_entropy", cross_entropy);
        parts.add("text_forward_kl", loss.divergences[0]);
        let value = (1.0 - text_divergence) * cross_entropy + text_divergence * loss.divergences[0];
        parts.add("loss", text_weight * value);
        Ok(loss.loss)
    }
}

/// The return of every token: the discounted rewards from it, or from behind it, divided by their number; 0 of none.
fn returns_of(rewards: &[f64], discount: f64, own: bool) -> Vec<f64> {
    let mut sum = 0.0;
    let mut returns: Vec<f64> = rewards
        .iter()
        .rev()
        .enumerate()
        .map(|(behind, reward)| {
            let after = sum;
            sum = reward + discount * sum;
            if own { sum / (behind + 1) as f64 } else { after / behind.max(1) as f64 }
        })
        .collect();
    returns.reverse();
    returns
}

/// Mean and deviation of numbers.
struct White {
    mean: f64,
    scale: f64,
}

impl White {
    /// Of these numbers and as many zeros as `count` is more.
    fn of(values: impl Iterator<Item = f64> + Clone, count: usize) -> Self {
        let count = count.max(1) as f64;
        let mean = values.clone().sum::<f64>() / count;
        let squares = values.map(|x| x * x).sum::<f64>() / count;
        White { mean, scale: 1.0 / ((squares - mean * mean).max(0.0) + 1e-8).sqrt() }
    }

    fn of_one(&self, value: f64) -> f64 {
        (value - self.mean) * self.scale
    }
}

/// Response tokens of a row, on average.
fn mean_length(data: &Dataset) -> f64 {
    data.rows.iter().map(|row| row.response.len() as f64).sum::<f64>() / data.rows.len() as f64
}

const NO_TEXT: &str =
    "there is no `text` beside an update: its window must `take` at least as many rows as a round has updates";

/// The rows of `text` that belong to one of the updates of a round.
fn share_of(text: &Dataset, index: u64, updates: u64) -> &[Row] {
    let place = |index: u64| (text.rows.len() as u64 * index / updates) as usize;
    &text.rows[place(index)..place(index + 1)]
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use contract::{End, Kind, TokenizerFile};
    use serde_json::Value as Json;

    use super::*;
    use crate::testing::{Log, output, row};
    use crate::training::Mean;

    #[test]
    fn returns_begin_with_a_token_or_behind_it() {
        let near = |found: Vec<f64>, expected: [f64; 3]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        };
        near(returns_of(&[1.0, 2.0, 4.0], 0.5, true), [3.0 / 3.0, 4.0 / 2.0, 4.0]);
        near(returns_of(&[1.0, 2.0, 4.0], 0.5, false), [4.0 / 2.0, 4.0, 0.0]);
    }

    #[test]
    fn padding_counts_as_zeros() {
        let white = White::of([1.0, 3.0].into_iter(), 4);
        assert!((white.mean - 1.0).abs() < 1e-12 && (white.scale - 1.0 / 1.5_f64.sqrt()).abs() < 1e-6);
    }

    #[test]
    fn every_update_has_its_share_of_the_text() {
        let rows = (0..7).map(|id| row(id, &[1], &[2])).collect();
        let text = Dataset { rows, tokenizer: TokenizerFile::new("", 0, 9) };
        let shares: Vec<usize> = (0..3).map(|index| share_of(&text, index, 3).len()).collect();
        assert_eq!((shares.iter().sum::<usize>(), shares), (7, vec![2, 2, 3]));
        let nothing = Beside::new(share_of(&text, 0, 9), Mean::Tokens, NO_TEXT).err().unwrap();
        assert!(nothing.to_string().contains("`take` at least"));
    }

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(name)
    }

    fn json(name: &str) -> Json {
        serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
    }

    fn rows(list: &Json) -> Vec<Row> {
        let ids = |list: &Json| -> Vec<u32> { serde_json::from_value(list.clone()).unwrap() };
        let rows = list.as_array().unwrap().iter().enumerate();
        let rows = rows.map(|(id, it)| Row {
            log_probs: serde_json::from_value(it["log_probs"].clone()).unwrap_or_default(),
            end: End::Length,
            ..row(id as u64, &ids(&it["prompt"]), &ids(&it["response"]))
        });
        rows.collect()
    }

    /// Two rounds of two passes, for three families under both conventions. `make_minillm.py` is the other program.
    #[test]
    fn a_student_learns_as_an_independent_program_says() {
        let (given, expected) = (json("minillm/rollouts.json"), json("minillm/expected.json"));
        let students = [("gpt2", "promptkd/student"), ("llama", "llama/llama2"), ("opt", "families/opt")];
        for ((name, folder), conventions) in
            students.into_iter().flat_map(|it| [Conventions::Sound, Conventions::Reference].map(|c| (it, c)))
        {
            let reference = conventions == Conventions::Reference;
            let convention = if reference { "reference" } else { "sound" };
            let mut config = json!({
                "learning_rate": 2e-3, "passes": 2, "reward_clip": 2.0, "optimizer": {"weight_decay": 0.1},
            });
            if reference {
                config["padded_to"] = 12.into();
            }
            let config = Kind::resolve(&PolicyGradient, &config, conventions).unwrap();
            let env = Env { device: "cpu".into(), threads: 1, scratch: std::env::temp_dir() };
            let mut operator = Kind::start(&PolicyGradient, &config, &env, None).unwrap();
            let teacher = Arc::new(LanguageModel::load(&fixture("promptkd/teacher"), &Device::Cpu).unwrap());
            let mut student = Arc::new(LanguageModel::load(&fixture(folder), &Device::Cpu).unwrap());
            let tokenizer = teacher.tokenizer.clone();
            let mut log = Log::default();
            for round in 0..2 {
                let mut inputs = Inputs::new();
                for (port, name) in [("data", "rollouts"), ("text", "texts")] {
                    let rows = rows(&given[name][round]);
                    inputs.insert(port, Arc::new(Dataset { rows, tokenizer: tokenizer.clone() }));
                }
                inputs.insert("teacher", teacher.clone());
                inputs.insert("student", student);
                let step = Step { round: round as u64, rounds: 2, epoch: 0, rounds_per_epoch: 2 };
                student = output(&operator.run(inputs, &step, &mut log).unwrap(), "model");
            }
            let expected = expected[name][convention].as_array().unwrap();
            assert_eq!(log.rows.len(), expected.len());
            for (update, (found, expected)) in log.rows.iter().zip(expected).enumerate() {
                assert_eq!(found["update"], update);
                for (field, right) in expected.as_object().unwrap() {
                    let (found, right) = (found[field].as_f64().unwrap(), right.as_f64().unwrap());
                    let gap = (found - right).abs() / right.abs().max(1e-2);
                    assert!(gap < 1e-4, "{name}, {convention}, {field} of update {update}: {found}, expected {right}");
                }
            }
            let path = fixture(&format!("minillm/final_{name}_{convention}.safetensors"));
            let finals: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
            assert_eq!(finals.len(), student.parameters().len());
            // A softmax does not see what the biases of keys add, where those are not turned: their gradient is rounding.
            let parameters = student.parameters().into_iter();
            for (parameter, found) in
                parameters.filter(|(name, _)| !name.ends_with("attn.bias") && !name.ends_with("k_proj.bias"))
            {
                let noise = parameter.ends_with("c_attn.bias");
                let difference = (found.detach() - &finals[&parameter]).unwrap().abs().unwrap().flatten_all().unwrap();
                let difference = difference.max(0).unwrap().to_scalar::<f32>().unwrap();
                assert!(noise || difference < 1e-4, "{name}, {convention}: `{parameter}` is off by {difference}");
            }
        }
    }
}
