//! Our side: the work of every case, by the public interface of `lm` and the stage kinds.

use std::fs;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use contract::random::purpose;
use lm::loss::head_loss;
use lm::sample::Sampling;
use lm::{AdamW, AdamWOptions, Generate, LanguageModel, Packed, Prompt};
use serde::Serialize;

use crate::child::{Ended, Ran, Ready};
use crate::task::{Case, Task};

/// The work of a case: done once, it gives the number of tokens and what the other side must find as well.
type Work = Box<dyn FnMut() -> Result<(usize, Vec<f64>)>>;

/// The worker process: answers requests until its input ends.
pub(crate) fn serve(task: &Path) -> Result<()> {
    let idle_kib = memory("VmRSS")?;
    let task = Task::read(task)?;
    let mut work = match task.line.case {
        Case::Step => step(task)?,
        Case::Generate => generate(task)?,
    };
    say(&Ready { idle_kib })?;
    for request in stdin().lock().lines() {
        if request? == "end" {
            return say(&Ended { peak_kib: memory("VmHWM")?, device_kib: 0 });
        }
        let start = Instant::now();
        let (tokens, checks) = work()?;
        say(&Ran { seconds: start.elapsed().as_secs_f64(), tokens, checks })?;
    }
    Ok(())
}

fn say(answer: &impl Serialize) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer)?)?;
    Ok(out.flush()?)
}

/// A field of the kernel's account of this process, KiB.
fn memory(field: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("memory is measured on Linux only")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    number.with_context(|| format!("the kernel tells no `{field}`"))
}

/// Forward, backward, clipping at norm 1, AdamW; every token of a row predicts the next.
fn step(task: Task) -> Result<Work> {
    let model = LanguageModel::load(&task.student, &lm::device(&task.device)?)?.trainable()?;
    let (mut batch, mut labels) = (Packed::new(), Vec::new());
    for (row, (prompt, response)) in task.prompts.iter().zip(&task.responses).enumerate() {
        let ids: Vec<u32> = prompt.iter().chain(response).copied().collect();
        batch.push(row as u64, &ids[..ids.len() - 1]);
        labels.extend_from_slice(&ids[1..]);
    }
    let weights = vec![1.0 / labels.len() as f32; labels.len()];
    let mut optimizer = AdamW::new(AdamWOptions::default());
    Ok(Box::new(move || {
        let hidden = model.hidden(&batch, None, None)?; // [N, C]
        let loss = head_loss(&hidden, model.head(), Some((&labels, 1.0)), &[], &weights)?;
        let gradients = lm::gradients(&loss.loss, model.parameters())?;
        let scale = (1.0 / (lm::norm(&gradients)? + 1e-6)).min(1.0);
        optimizer.step(model.parameters(), &gradients, task.learning_rate, scale)?;
        Ok((labels.len(), vec![loss.cross_entropy.expect("there are labels")]))
    }))
}

/// Continues all prompts at once. Greedy text is the same on both sides; sampled text has the same length.
fn generate(task: Task) -> Result<Work> {
    let model = LanguageModel::load(&task.student, &lm::device(&task.device)?)?;
    let crate::task::Sampling { temperature, top_k, top_p } = task.line.sampling;
    let options = Generate {
        sampling: Sampling { temperature, top_k, top_p, ..Sampling::default() },
        max_new_tokens: task.line.response,
        seed: 0,
        purpose: purpose::GENERATE,
        time: 0,
        batch: task.line.rows,
    };
    Ok(Box::new(move || {
        let prompts: Vec<Prompt<'_>> = (0..).zip(&task.prompts).map(|(row, ids)| Prompt { row, ids }).collect();
        let written = lm::generate(&model, None, &prompts, &options, &mut |_| {})?;
        let tokens = written.iter().map(|row| row.ids.len()).sum();
        let greedy = temperature == 0.0;
        let checks = written.iter().filter(|_| greedy).flat_map(|row| &row.ids).map(|id| f64::from(*id)).collect();
        Ok((tokens, checks))
    }))
}
