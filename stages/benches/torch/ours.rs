//! Our side: the work of every case, by the stage kinds where one does it, else by the public interface of `lm`.

use std::io::{BufRead, stdin};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use contract::random::purpose;
use contract::{AnyValue, Conventions, Dataset, End, Env, Inputs, Operator, Row, Sink, Step};
use lm::loss::{Divergence, Source, Target, head_loss};
use lm::sample::Sampling;
use lm::{AdamW, AdamWOptions, Generate, Gradients, LanguageModel, Packed, Prompt, SoftPrompt};
use serde_json::{Map, Value as Json, json};
use stages::aligned::Aligned;
use stages::score::{Stemming, rouge_l_with};
use stages::text::{SpecialTokens, Text};

use crate::WARM_UP;
use crate::child::{Ended, Ran, Ready, memory, say};
use crate::task::{Case, Task};

/// The work of a case. Told whether it is a check, it gives the number of tokens, and what the other side must find too.
type Work = Box<dyn FnMut(bool) -> Result<(usize, Vec<f64>)>>;

/// The worker process: answers requests until its input ends.
pub(crate) fn serve(task: &Path) -> Result<()> {
    let idle_kib = memory("VmRSS")?;
    let task = Task::read(task)?;
    let mut accelerator = (task.device != "cpu").then(|| Accelerator::open(&task.device)).transpose()?;
    let mut work = match task.line.case {
        // The adapter that lies beside the student is what is trained.
        Case::Step | Case::Lora => step(task)?,
        Case::Distill => distill(task)?,
        Case::Cached => cached(task)?,
        Case::Promptkd => promptkd(task)?,
        Case::Generate => generate(task)?,
        Case::Evaluate => evaluate(task)?,
    };
    say(&Ready { idle_kib })?;
    for request in stdin().lock().lines() {
        let request = request?;
        if request == "end" {
            let device_kib = accelerator.map(|accelerator| accelerator.peak_kib);
            return say(&Ended { peak_kib: memory("VmHWM")?, device_kib });
        }
        let start = Instant::now();
        let (tokens, checks) = match &mut accelerator {
            Some(accelerator) if accelerator.watched < WARM_UP => accelerator.watch(|| work(request == "check"))?,
            _ => work(request == "check")?,
        };
        say(&Ran { seconds: start.elapsed().as_secs_f64(), tokens, checks })?;
    }
    Ok(())
}

/// What this process takes of the accelerator's memory, by the driver's account, above what an open device takes.
struct Accelerator {
    open_kib: u64,
    peak_kib: u64,
    /// Runs that were watched: those of the warm-up, since asking the driver takes time.
    watched: usize,
}

impl Accelerator {
    fn open(device: &str) -> Result<Accelerator> {
        lm::device(device)?.synchronize()?;
        Ok(Accelerator { open_kib: used_kib(), peak_kib: 0, watched: 0 })
    }

    fn watch<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        let (result, peak) = thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut peak = used_kib();
                while !done.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(50));
                    peak = peak.max(used_kib());
                }
                peak
            });
            let result = work();
            done.store(true, Ordering::Relaxed);
            (result, watcher.join().expect("the watcher only reads"))
        });
        self.watched += 1;
        self.peak_kib = self.peak_kib.max(peak.saturating_sub(self.open_kib));
        result
    }
}

/// 0 where the driver does not tell processes apart.
fn used_kib() -> u64 {
    let query = ["--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"];
    let Ok(output) = Command::new("nvidia-smi").args(query).output() else { return 0 };
    let own = |line: &str| {
        let (pid, mebibytes) = line.split_once(',')?;
        (pid.trim().parse() == Ok(std::process::id())).then(|| mebibytes.trim().parse::<u64>().ok())?
    };
    String::from_utf8_lossy(&output.stdout).lines().filter_map(own).sum::<u64>() << 10
}

fn load(folder: &Path, task: &Task) -> Result<LanguageModel> {
    LanguageModel::load(folder, &lm::device(&task.device)?)?.computed_in(task.dtype)
}

/// Clipping at norm 1, AdamW.
fn update(optimizer: &mut AdamW, model: &LanguageModel, gradients: &Gradients, task: &Task) -> Result<()> {
    let scale = (1.0 / (lm::norm(gradients)? + 1e-6)).min(1.0);
    optimizer.step(&model.parameters(), gradients, task.learning_rate, scale)
}

/// Forward, backward, update; every token of a row predicts the next.
fn step(task: Task) -> Result<Work> {
    let model = load(&task.student, &task)?.trainable()?;
    let (mut batch, mut labels) = (Packed::new(), Vec::new());
    for (row, (prompt, response)) in (0..).zip(task.prompts.iter().zip(&task.responses)) {
        let ids: Vec<u32> = prompt.iter().chain(response).copied().collect();
        batch.push(row, &ids[..ids.len() - 1]);
        labels.extend_from_slice(&ids[1..]);
    }
    let weights = vec![1.0 / labels.len() as f32; labels.len()];
    let mut optimizer = AdamW::new(AdamWOptions::default());
    Ok(Box::new(move |_| {
        let hidden = model.hidden(&batch, None, None)?; // [N, C]
        let loss = head_loss(&hidden, &model.head()?, Some((&labels, 1.0)), &[], &weights)?;
        let gradients = lm::gradients(&loss.loss, &model.parameters())?;
        update(&mut optimizer, &model, &gradients, &task)?;
        Ok((labels.len(), vec![loss.cross_entropy.expect("there are labels")]))
    }))
}

/// One round of `distill`.
fn distill(task: Task) -> Result<Work> {
    let config = json!({
        "divergence": "forward-kl", "weight": 0.5, "cross_entropy": 0.5, "learning_rate": task.learning_rate,
    });
    let mut learn = Stage::start("distill", config, Conventions::Sound, &task)?;
    let teacher: AnyValue = Arc::new(load(&task.teacher, &task)?);
    let data: AnyValue = Arc::new(dataset(&task)?);
    let mut student: AnyValue = Arc::new(load(&task.student, &task)?);
    Ok(Box::new(move |_| {
        // The stage trains in place what nobody else holds.
        let own = std::mem::replace(&mut student, data.clone());
        student = learn.run(vec![("student", own), ("teacher", teacher.clone()), ("data", data.clone())], "model")?;
        Ok((learn.tokens(), vec![learn.metric("loss")]))
    }))
}

/// The same update with the teacher's hidden states made before.
fn cached(task: Task) -> Result<Work> {
    let student = load(&task.student, &task)?.trainable()?;
    let teacher = load(&task.teacher, &task)?;
    let text = Aligned::of(&dataset(&task)?.rows);
    let taught = text.hidden(&teacher, None, None)?;
    let weights = vec![1.0 / text.tokens() as f32; text.tokens()];
    let mut optimizer = AdamW::new(AdamWOptions::default());
    Ok(Box::new(move |_| {
        let hidden = text.hidden(&student, None, None)?; // [tokens, C]
        let target = Target {
            source: Source::Head { hidden: &taught, head: &teacher.head()? },
            divergence: Divergence::ForwardKl,
            coefficient: 0.5,
            temperature: 1.0,
        };
        let loss = head_loss(&hidden, &student.head()?, Some((&text.labels, 0.5)), &[target], &weights)?;
        let gradients = lm::gradients(&loss.loss, &student.parameters())?;
        update(&mut optimizer, &student, &gradients, &task)?;
        let cross_entropy = loss.cross_entropy.expect("there are labels");
        Ok((text.tokens(), vec![0.5 * cross_entropy + 0.5 * loss.divergences[0]]))
    }))
}

/// One round of `student-generate`, `prompt-tune` and `distill` with the published conventions. A check takes the task's
/// responses in place of generated ones.
fn promptkd(task: Task) -> Result<Work> {
    let reference = Conventions::Reference;
    let rate = task.learning_rate;
    let respond = json!({"max_new_tokens": task.line.response, "batch": task.line.rows});
    let mut respond = Stage::start("student-generate", respond, reference, &task)?;
    let regulariser = json!({"coefficient": task.regulariser, "schedule": "constant"});
    let tune = json!({"learning_rate": rate, "regulariser": regulariser});
    let mut tune = Stage::start("prompt-tune", tune, reference, &task)?;
    let learn = json!({"divergence": "reverse-kl", "learning_rate": rate});
    let mut learn = Stage::start("distill", learn, reference, &task)?;

    let data: AnyValue = Arc::new(dataset(&task)?);
    let teacher = Arc::new(load(&task.teacher, &task)?);
    let ids = candle_core::Tensor::new(task.prompt_ids.as_slice(), teacher.device())?;
    let mut prompt: AnyValue = Arc::new(SoftPrompt::new(teacher.embedding()?.index_select(&ids, 0)?, &teacher)?);
    let teacher: AnyValue = teacher;
    let mut student: AnyValue = Arc::new(load(&task.student, &task)?);
    Ok(Box::new(move |check| {
        let text = match check {
            true => data.clone(),
            false => respond.run(vec![("model", student.clone()), ("data", data.clone())], "data")?,
        };
        let inputs = vec![
            ("teacher", teacher.clone()),
            ("student", student.clone()),
            ("prompt", prompt.clone()),
            ("data", text.clone()),
        ];
        prompt = tune.run(inputs, "prompt")?;
        let own = std::mem::replace(&mut student, data.clone());
        let inputs = vec![("teacher", teacher.clone()), ("student", own), ("prompt", prompt.clone()), ("data", text)];
        student = learn.run(inputs, "model")?;
        let losses = [tune.metric("guidance"), tune.metric("regulariser"), learn.metric("reverse_kl")];
        Ok((learn.tokens(), losses.into_iter().filter(|_| check).collect()))
    }))
}

/// Continues all prompts at once. Greedy text is the same on both sides; sampled text has the same length.
fn generate(task: Task) -> Result<Work> {
    let model = load(&task.student, &task)?;
    let crate::task::Sampling { temperature, top_k, top_p } = task.line.sampling;
    let options = Generate {
        sampling: Sampling { temperature, top_k, top_p, ..Sampling::default() },
        max_new_tokens: task.line.response,
        longest: usize::MAX,
        seed: 0,
        purpose: purpose::GENERATE,
        time: 0,
        batch: task.line.rows,
    };
    Ok(Box::new(move |_| {
        let prompts: Vec<Prompt<'_>> = (0..).zip(&task.prompts).map(|(row, ids)| Prompt { row, ids }).collect();
        let written = lm::generate(&model, None, &prompts, &options, &mut |_| {})?;
        let tokens = written.iter().map(|row| row.ids.len()).sum();
        let greedy = temperature == 0.0;
        let checks = written.iter().filter(|_| greedy).flat_map(|row| &row.ids).map(|id| f64::from(*id)).collect();
        Ok((tokens, checks))
    }))
}

/// `evaluate` over all seeds. A check scores the task's responses, since sampled ones differ.
fn evaluate(task: Task) -> Result<Work> {
    let config = json!({
        "metrics": ["rouge_l"], "seeds": task.seeds, "max_new_tokens": task.line.response, "batch": task.batch,
    });
    let mut score = Stage::start("evaluate", config, Conventions::Sound, &task)?;
    let model = Arc::new(load(&task.student, &task)?);
    let words = Text::new(&model.tokenizer, SpecialTokens::Text)?;
    let model: AnyValue = model;
    let data: AnyValue = Arc::new(dataset(&task)?);
    Ok(Box::new(move |check| {
        if check {
            let texts = words.decode_all(&task.responses)?;
            let scores = texts
                .iter()
                .zip(&task.references)
                .map(|(text, reference)| rouge_l_with(text, std::slice::from_ref(reference), Stemming::Porter));
            return Ok((0, vec![100.0 * scores.sum::<f64>() / texts.len() as f64]));
        }
        let written = score.run(vec![("model", model.clone()), ("data", data.clone())], "predictions")?;
        let written = written.into_any().downcast::<contract::Predictions>().ok().context("predictions expected")?;
        let texts: Vec<&str> = written.0.iter().filter_map(|row| row["text"].as_str()).collect();
        // Every token is a word; the one that ends an answer has no text.
        Ok((texts.iter().map(|text| text.split_whitespace().count() + 1).sum(), Vec::new()))
    }))
}

/// The task's rows.
fn dataset(task: &Task) -> Result<Dataset> {
    let rows = (0..).zip(task.prompts.iter().zip(&task.responses)).map(|(id, (prompt, response))| Row {
        id,
        prompt: prompt.clone(),
        response: response.clone(),
        end: if response.last() == Some(&task.end) { End::Stop } else { End::Length },
        log_probs: None,
        references: vec![task.references[id as usize].clone()],
        family: None,
    });
    Ok(Dataset { rows: rows.collect(), tokenizer: load(&task.student, task)?.tokenizer })
}

/// A stage kind that is run round after round, with the last row of its metrics.
struct Stage {
    operator: Box<dyn Operator>,
    round: u64,
    row: Map<String, Json>,
}

impl Stage {
    fn start(kind: &str, mut config: Json, conventions: Conventions, task: &Task) -> Result<Stage> {
        config["dtype"] = json!(task.dtype);
        let registry = stages::registry();
        let kind = registry.get(kind).context("no such kind")?;
        let config = kind.resolve(&config, conventions).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        let env = Env { device: task.device.clone(), threads: task.threads, scratch: std::env::temp_dir() };
        Ok(Stage { operator: kind.start(&config, &env, None)?, round: 0, row: Map::new() })
    }

    /// One round; gives the output of that name.
    fn run(&mut self, inputs: Vec<(&str, AnyValue)>, output: &str) -> Result<AnyValue> {
        let mut ports = Inputs::new();
        inputs.into_iter().for_each(|(port, value)| ports.insert(port, value));
        let step = Step { round: self.round, rounds: 1000, epoch: 0, rounds_per_epoch: 1000 };
        self.round += 1;
        let mut sink = LastRow(&mut self.row);
        self.operator.run(ports, &step, &mut sink)?.0.remove(output).context("the stage gave no such output")
    }

    fn metric(&self, name: &str) -> f64 {
        self.row.get(name).and_then(Json::as_f64).unwrap_or(f64::NAN)
    }

    fn tokens(&self) -> usize {
        self.metric("tokens") as usize
    }
}

struct LastRow<'a>(&'a mut Map<String, Json>);

impl Sink for LastRow<'_> {
    fn metrics(&mut self, row: Map<String, Json>) {
        *self.0 = row;
    }
    fn progress(&mut self, _done: u64, _total: u64, _unit: &str) {}
    fn warn(&mut self, text: &str) {
        eprintln!("warning: {text}");
    }
    fn note(&mut self, _text: &str) {}
}
