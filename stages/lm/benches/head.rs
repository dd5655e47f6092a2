//! Time of a distillation loss with its gradients, fused and by plain operations:
//!
//!     cargo bench --profile dev -p lm --bench head
//!
//! One column for the engine's path, one for candle's autograd on whole logits; the best of several runs in
//! milliseconds.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use lm::loss::{Divergence, HeadLoss, Source, Target, head_loss, head_loss_plain};

type Loss = fn(&Tensor, &Tensor, Option<(&[u32], f64)>, &[Target], &[f32]) -> anyhow::Result<HeadLoss>;

fn main() -> anyhow::Result<()> {
    println!("{:>6} {:>7} {:>6}  {:>9} {:>9}", "rows", "tokens", "width", "fused ms", "plain ms");
    for (rows, vocabulary, width, repeats) in [(576, 1024, 192, 20), (512, 50_257, 768, 3)] {
        let fused = time(rows, vocabulary, width, repeats, head_loss)?;
        let plain = time(rows, vocabulary, width, repeats.min(5), head_loss_plain)?;
        println!("{rows:>6} {vocabulary:>7} {width:>6}  {fused:>9.2} {plain:>9.2}");
    }
    Ok(())
}

fn time(rows: usize, vocabulary: usize, width: usize, repeats: usize, loss: Loss) -> anyhow::Result<f64> {
    let random = |rows, deviation: f32| Tensor::randn(0.0_f32, deviation, (rows, width), &Device::Cpu);
    let hidden = Var::from_tensor(&random(rows, 1.0)?)?;
    let head = Var::from_tensor(&random(vocabulary, 0.1)?)?;
    let target_hidden = random(rows, 1.0)?;
    let target_head = random(vocabulary, 0.1)?.to_dtype(DType::F32)?;
    let target = Target {
        source: Source::Head { hidden: &target_hidden, head: &target_head },
        divergence: Divergence::ReverseKl,
        coefficient: 1.0,
        temperature: 1.0,
    };
    let weights = vec![1.0 / rows as f32; rows];
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let start = Instant::now();
        let loss = loss(hidden.as_tensor(), head.as_tensor(), None, &[target], &weights)?;
        let gradients = loss.loss.backward()?;
        assert!(gradients.get(head.as_tensor()).is_some());
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(best)
}
