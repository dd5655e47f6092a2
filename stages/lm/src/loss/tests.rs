use contract::random::{normal, philox};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde::Deserialize;

use super::plain::variable;
use super::*;
use crate::kernels::head::rows_per_chunk;

const CPU: Device = Device::Cpu;

const EVERY_DIVERGENCE: [Divergence; 10] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::Jsd { beta: 0.1 },
    Divergence::Jsd { beta: 0.7 },
    Divergence::SkewedForwardKl { alpha: 0.1 },
    Divergence::SkewedReverseKl { alpha: 0.1 },
    Divergence::TotalVariation,
    Divergence::AlphaBeta { alpha: 0.2, beta: 0.7 },
    Divergence::AlphaBeta { alpha: 1.0, beta: 0.5 },
    Divergence::AdaptiveKl { head: 0.5 },
];

/// Everything a loss is computed from, in f64; [`Case::tensors`] rounds.
struct Case {
    hidden: Vec<f32>,
    head: Vec<f32>,
    target_hidden: Vec<f32>,
    target_head: Vec<f32>,
    labels: Vec<u32>,
    weights: Vec<f32>,
    rows: usize,
    width: usize,
    target_width: usize,
    vocabulary: usize,
}

type Loss = fn(&Tensor, &Tensor, Option<(&[u32], f64)>, &[Target], &[f32]) -> Result<HeadLoss>;

struct Tensors {
    hidden: Tensor,
    head: Tensor,
    target_hidden: Tensor,
    target_head: Tensor,
}

fn noise(seed: u64, count: usize, deviation: f32) -> Vec<f32> {
    (0..count as u32)
        .map(|i| {
            let [a, b, ..] = philox(seed, [i, 0, 0, 0]);
            normal(a, b).0 * deviation
        })
        .collect()
}

impl Case {
    fn new(rows: usize, vocabulary: usize, width: usize, seed: u64) -> Self {
        let target_width = width + 3;
        Case {
            hidden: noise(seed, rows * width, 1.0),
            head: noise(seed + 1, vocabulary * width, 2.0 / (width as f32).sqrt()),
            target_hidden: noise(seed + 2, rows * target_width, 1.0),
            target_head: noise(seed + 3, vocabulary * target_width, 2.5 / (target_width as f32).sqrt()),
            labels: (0..rows as u32).map(|i| philox(seed + 4, [i, 0, 0, 0])[0] % vocabulary as u32).collect(),
            // Every fourth row is left out.
            weights: (0..rows).map(|i| if i % 4 == 3 { 0.0 } else { (1 + i % 3) as f32 / rows as f32 }).collect(),
            rows,
            width,
            target_width,
            vocabulary,
        }
    }

    fn tensors(&self, dtype: DType, trainable_head: bool) -> Tensors {
        let tensor = |values: &[f32], rows: usize, columns: usize| {
            Tensor::from_slice(values, (rows, columns), &CPU).unwrap().to_dtype(dtype).unwrap()
        };
        let head = tensor(&self.head, self.vocabulary, self.width);
        Tensors {
            hidden: variable(&tensor(&self.hidden, self.rows, self.width)).unwrap(),
            head: if trainable_head { variable(&head).unwrap() } else { head },
            target_hidden: tensor(&self.target_hidden, self.rows, self.target_width),
            target_head: tensor(&self.target_head, self.vocabulary, self.target_width),
        }
    }
}

impl Tensors {
    fn target(&self, divergence: Divergence, coefficient: f64, temperature: f64) -> Target<'_> {
        let source = Source::Head { hidden: &self.target_hidden, head: &self.target_head };
        Target { source, divergence, coefficient, temperature }
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, relative to the largest of the right numbers.
fn gap(found: &[f64], right: &[f64]) -> f64 {
    assert_eq!(found.len(), right.len());
    let scale = right.iter().fold(1e-30_f64, |scale, x| scale.max(x.abs()));
    let gap = found
        .iter()
        .zip(right)
        .fold(0.0_f64, |gap, (a, b)| if (a - b).is_nan() { f64::NAN } else { gap.max((a - b).abs()) });
    gap / scale
}

fn assert_close(found: &[f64], right: &[f64], tolerance: f64, what: &str) {
    let gap = gap(found, right);
    assert!(gap < tolerance, "{what} is off by {gap:e}");
}

/// The value and both gradients of `loss`, the latter scaled by its backward pass from `loss * 3`.
fn gradients(loss: &HeadLoss, tensors: &Tensors) -> (Vec<f64>, Vec<f64>) {
    let gradients = (&loss.loss * 3.0).unwrap().backward().unwrap();
    (numbers(gradients.get(&tensors.hidden).unwrap()), numbers(gradients.get(&tensors.head).unwrap()))
}

/// [`head_loss`] in f32 against its twin in f64.
fn check_against_the_twin(case: &Case, labels: Option<f64>, terms: &[(Divergence, f64, f64)]) {
    let (narrow, wide) = (case.tensors(DType::F32, true), case.tensors(DType::F64, true));
    let targets = |tensors| -> Vec<Target> {
        let tensors: &Tensors = tensors;
        terms
            .iter()
            .map(|&(divergence, coefficient, temperature)| tensors.target(divergence, coefficient, temperature))
            .collect()
    };
    let labels = labels.map(|coefficient| (case.labels.as_slice(), coefficient));
    let fused = head_loss(&narrow.hidden, &narrow.head, labels, &targets(&narrow), &case.weights).unwrap();
    let twin = head_loss_plain(&wide.hidden, &wide.head, labels, &targets(&wide), &case.weights).unwrap();
    let what = format!("{terms:?} at {} rows, {} tokens", case.rows, case.vocabulary);
    let (fused_loss, twin_loss) = (scalar(&fused.loss).unwrap(), scalar(&twin.loss).unwrap());
    assert_close(&[fused_loss], &[twin_loss], 1e-5, &format!("loss of {what}"));
    assert_close(&fused.divergences, &twin.divergences, 1e-5, &format!("divergences of {what}"));
    assert_eq!(fused.cross_entropy.is_some(), twin.cross_entropy.is_some());
    if let (Some(fused), Some(twin)) = (fused.cross_entropy, twin.cross_entropy) {
        assert_close(&[fused], &[twin], 1e-5, &format!("cross-entropy of {what}"));
    }
    let ((hidden, head), (right_hidden, right_head)) = (gradients(&fused, &narrow), gradients(&twin, &wide));
    assert_close(&hidden, &right_hidden, 1e-5, &format!("hidden gradient of {what}"));
    assert_close(&head, &right_head, 1e-5, &format!("head gradient of {what}"));
}

#[test]
fn the_kernel_agrees_with_its_twin_for_every_divergence_and_shape() {
    for (rows, vocabulary, width) in [(1, 5, 4), (7, 33, 8), (9, 512, 16), (5, 1030, 12)] {
        let case = Case::new(rows, vocabulary, width, 11);
        for divergence in EVERY_DIVERGENCE {
            check_against_the_twin(&case, None, &[(divergence, 1.0, 1.0)]);
            check_against_the_twin(&case, None, &[(divergence, 0.5, 2.0)]);
        }
    }
}

#[test]
fn the_kernel_agrees_with_its_twin_for_sums_of_terms() {
    let case = Case::new(13, 101, 8, 5);
    check_against_the_twin(&case, Some(1.0), &[]);
    check_against_the_twin(&case, Some(0.5), &[(Divergence::ForwardKl, 0.5, 1.0)]);
    let (guidance, regulariser) = ((Divergence::ReverseKl, 1.0, 1.0), (Divergence::ReverseKl, -0.25, 1.5));
    check_against_the_twin(&case, None, &[guidance, regulariser]);
}

#[test]
fn the_kernel_agrees_with_its_twin_across_chunks() {
    let vocabulary = 70_001;
    // 113 rows have weight: one more than a chunk.
    assert_eq!(rows_per_chunk(vocabulary), 112);
    check_against_the_twin(&Case::new(150, vocabulary, 4, 3), Some(0.5), &[(Divergence::ReverseKl, 0.5, 1.0)]);
}

#[test]
fn chunks_of_plain_operations_agree_with_the_twin() {
    let case = Case::new(11, 37, 6, 8);
    for trainable_head in [true, false] {
        let (tensors, twin_tensors) = (case.tensors(DType::F64, trainable_head), case.tensors(DType::F64, true));
        let labels = Some((case.labels.as_slice(), 0.3));
        let target = tensors.target(Divergence::Jsd { beta: 0.4 }, 0.7, 1.3);
        let targets = [target];
        let request = Request::new(&tensors.hidden, &tensors.head, labels, &targets, &case.weights).unwrap();
        let answer = request.by_chunks(true, trainable_head, 3).unwrap();
        assert_eq!(answer.head_gradient.is_some(), trainable_head);
        let twin_targets = [twin_tensors.target(Divergence::Jsd { beta: 0.4 }, 0.7, 1.3)];
        let twin =
            head_loss_plain(&twin_tensors.hidden, &twin_tensors.head, labels, &twin_targets, &case.weights).unwrap();
        let (cross_entropy, divergences) = request.totals(&answer.terms);
        assert_close(&[cross_entropy.unwrap()], &[twin.cross_entropy.unwrap()], 1e-12, "cross-entropy");
        assert_close(&divergences, &twin.divergences, 1e-12, "divergence");
        let loss = attach(request.loss(cross_entropy, &divergences), &tensors.hidden, &tensors.head, answer).unwrap();
        assert_close(&numbers(&loss), &numbers(&twin.loss), 1e-12, "loss");
        let (found, right) =
            ((&loss * 2.0).unwrap().backward().unwrap(), (&twin.loss * 2.0).unwrap().backward().unwrap());
        let of = |store: &candle_core::backprop::GradStore, tensor: &Tensor| numbers(store.get(tensor).unwrap());
        assert_close(&of(&found, &tensors.hidden), &of(&right, &twin_tensors.hidden), 1e-12, "hidden gradient");
        if trainable_head {
            assert_close(&of(&found, &tensors.head), &of(&right, &twin_tensors.head), 1e-12, "head gradient");
        }
    }
}

#[test]
fn the_twin_agrees_with_finite_differences() {
    // No gradient flows through the share of an adaptive one.
    let case = Case::new(3, 7, 4, 21);
    for divergence in EVERY_DIVERGENCE.into_iter().filter(|divergence| !divergence.is_adaptive()) {
        let tensors = case.tensors(DType::F64, true);
        let value = |hidden: &Tensor, head: &Tensor| -> HeadLoss {
            let labels = Some((case.labels.as_slice(), 0.2));
            head_loss_plain(hidden, head, labels, &[tensors.target(divergence, 0.8, 1.7)], &case.weights).unwrap()
        };
        let gradients = value(&tensors.hidden, &tensors.head).loss.backward().unwrap();
        for (which, tensor) in [&tensors.hidden, &tensors.head].into_iter().enumerate() {
            let analytic = numbers(gradients.get(tensor).unwrap());
            let at = numbers(tensor);
            for i in 0..at.len() {
                let moved = |step: f64| {
                    let mut moved = at.clone();
                    moved[i] += step;
                    let moved = Tensor::from_vec(moved, tensor.shape(), &CPU).unwrap();
                    let loss = if which == 0 { value(&moved, &tensors.head) } else { value(&tensors.hidden, &moved) };
                    scalar(&loss.loss).unwrap()
                };
                let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!((slope - analytic[i]).abs() < 1e-7, "{divergence:?}: element {i} of argument {which}");
            }
        }
    }
}

/// A case of the fixtures.
#[derive(Deserialize)]
struct Fixture {
    name: String,
    kind: String,
    temperature: f64,
    alpha: Option<f64>,
    beta: Option<f64>,
    head: Option<f64>,
    values: Vec<f64>,
}

impl Fixture {
    fn divergence(&self) -> Option<Divergence> {
        let (alpha, beta) = (self.alpha.unwrap_or(f64::NAN), self.beta.unwrap_or(f64::NAN));
        Some(match self.kind.as_str() {
            "cross_entropy" => return None,
            "forward_kl" => Divergence::ForwardKl,
            "reverse_kl" => Divergence::ReverseKl,
            "jsd" => Divergence::Jsd { beta },
            "skewed_forward" => Divergence::SkewedForwardKl { alpha },
            "skewed_reverse" => Divergence::SkewedReverseKl { alpha },
            "total_variation" => Divergence::TotalVariation,
            "alpha_beta" => Divergence::AlphaBeta { alpha, beta },
            "adaptive_kl" => Divergence::AdaptiveKl { head: self.head.unwrap() },
            other => panic!("unknown kind {other}"),
        })
    }
}

/// With the identity as head, hidden states are logits.
#[test]
fn values_and_gradients_agree_with_the_ones_computed_by_others() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/parity/divergences");
    let fixtures: Vec<Fixture> =
        serde_json::from_slice(&std::fs::read(format!("{folder}/cases.json")).unwrap()).unwrap();
    let bytes = std::fs::read(format!("{folder}/expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &str| -> Tensor {
        let view = file.tensor(name).unwrap();
        let values: Vec<f32> = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Tensor::from_vec(values, view.shape(), &CPU).unwrap()
    };
    let labels: Vec<u32> = (file.tensor("labels").unwrap().data().chunks(8))
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
        .collect();
    let (student, teacher) = (variable(&read("student_logits")).unwrap(), read("teacher_logits"));
    let (rows, vocabulary) = student.dims2().unwrap();
    let identity = Tensor::eye(vocabulary, DType::F32, &CPU).unwrap();
    assert_eq!(fixtures.len(), 17);
    for fixture in &fixtures {
        let target = fixture.divergence().map(|divergence| Target {
            source: Source::Head { hidden: &teacher, head: &identity },
            divergence,
            coefficient: 1.0,
            temperature: fixture.temperature,
        });
        let targets: Vec<Target> = target.into_iter().collect();
        let with_labels = targets.is_empty().then_some((labels.as_slice(), 1.0));
        let values = match with_labels {
            Some((labels, _)) => {
                log_probs(&student, &identity, labels).unwrap().iter().map(|&x| -f64::from(x)).collect()
            }
            None => divergence_values(&student, &identity, &targets).unwrap().remove(0),
        };
        for (found, right) in values.iter().zip(&fixture.values) {
            assert!((found / right - 1.0).abs() < 1e-5, "{}: {found}, expected {right}", fixture.name);
        }
        let gradient = numbers(&read(&format!("{}.grad", fixture.name)));
        for loss in [head_loss, head_loss_plain] {
            let loss = loss(&student, &identity, with_labels, &targets, &vec![1.0; rows]).unwrap();
            let total: f64 = fixture.values.iter().sum();
            assert_close(&[scalar(&loss.loss).unwrap()], &[total], 1e-5, &fixture.name);
            let store = loss.loss.backward().unwrap();
            assert_close(&numbers(store.get(&student).unwrap()), &gradient, 1e-5, &fixture.name);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for case in [Case::new(200, 1024, 48, 1), Case::new(75, 50_257, 16, 2)] {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let tensors = case.tensors(DType::F32, true);
                let targets = [tensors.target(Divergence::ReverseKl, 0.5, 1.0)];
                let labels = Some((case.labels.as_slice(), 0.5));
                let loss = head_loss(&tensors.hidden, &tensors.head, labels, &targets, &case.weights).unwrap();
                let (hidden, head) = gradients(&loss, &tensors);
                (loss.divergences, loss.cross_entropy, hidden, head)
            })
        };
        let alone = run(1);
        for threads in [2, 3] {
            assert!(run(threads) == alone, "{threads} threads at vocabulary {}", case.vocabulary);
        }
    }
}

#[test]
fn a_frozen_head_gets_no_gradient_and_a_frozen_loss_has_none() {
    let case = Case::new(4, 10, 4, 2);
    let tensors = case.tensors(DType::F32, false);
    let targets = [tensors.target(Divergence::ForwardKl, 1.0, 1.0)];
    let loss = head_loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
    let store = loss.loss.backward().unwrap();
    assert!(store.get(&tensors.head).is_none());
    assert!(store.get(&tensors.hidden).is_some());
    assert!(store.get(&tensors.target_hidden).is_none() && store.get(&tensors.target_head).is_none());

    let request = Request::new(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
    assert!(request.answer(true, false).unwrap().head_gradient.is_none());
    let frozen = head_loss(&tensors.hidden.detach(), &tensors.head, None, &targets, &case.weights).unwrap();
    assert!(!frozen.loss.track_op());
    assert_eq!(scalar(&frozen.loss).unwrap(), scalar(&loss.loss).unwrap());
}

#[test]
fn a_head_computed_from_a_variable_gets_its_gradient() {
    let case = Case::new(4, 10, 4, 2);
    let tensors = case.tensors(DType::F32, true);
    let targets = [tensors.target(Divergence::ForwardKl, 1.0, 1.0)];
    let doubled = (&tensors.head * 2.0).unwrap();
    let through = head_loss(&tensors.hidden, &doubled, None, &targets, &case.weights).unwrap();
    let right = head_loss_plain(&tensors.hidden, &doubled, None, &targets, &case.weights).unwrap();
    let of = |loss: &HeadLoss| numbers(loss.loss.backward().unwrap().get(&tensors.head).unwrap());
    assert_close(&of(&through), &of(&right), 1e-5, "head gradient");
}

#[test]
fn rows_of_weight_zero_change_nothing_and_get_no_gradient() {
    let case = Case::new(8, 20, 4, 9);
    let tensors = case.tensors(DType::F32, true);
    let targets = [tensors.target(Divergence::ReverseKl, 1.0, 1.0)];
    let loss = head_loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
    let (hidden, _) = gradients(&loss, &tensors);
    for row in 0..8 {
        let silent = hidden[row * 4..][..4].iter().all(|&x| x == 0.0);
        assert_eq!(silent, row % 4 == 3, "row {row}");
    }
    for weights in [vec![0.0; 8], Vec::new()] {
        let rows = weights.len();
        let hidden = variable(&tensors.hidden.narrow(0, 0, rows).unwrap()).unwrap();
        let target_hidden = tensors.target_hidden.narrow(0, 0, rows).unwrap();
        let targets =
            [Target { source: Source::Head { hidden: &target_hidden, head: &tensors.target_head }, ..targets[0] }];
        let loss = head_loss(&hidden, &tensors.head, None, &targets, &weights).unwrap();
        assert_eq!(scalar(&loss.loss).unwrap(), 0.0);
        let store = loss.loss.backward().unwrap();
        assert!(numbers(store.get(&tensors.head).unwrap()).iter().all(|&x| x == 0.0));
    }
}

#[test]
fn a_view_with_gaps_is_read_as_what_it_shows() {
    let case = Case::new(4, 10, 4, 2);
    let tensors = case.tensors(DType::F32, true);
    let target_head = tensors.target_head.t().unwrap().contiguous().unwrap().t().unwrap();
    let targets = [tensors.target(Divergence::ForwardKl, 1.0, 1.0)];
    let shown = [Target { source: Source::Head { hidden: &tensors.target_hidden, head: &target_head }, ..targets[0] }];
    let values = |targets: &[Target]| divergence_values(&tensors.hidden, &tensors.head, targets).unwrap();
    assert_eq!(values(&shown), values(&targets));
}

#[test]
fn a_broken_model_gives_nan_and_not_a_number() {
    let case = Case::new(4, 600, 4, 2);
    let mut tensors = case.tensors(DType::F32, true);
    let mut broken = case.target_hidden.clone();
    broken[0] = f32::NAN;
    tensors.target_hidden = Tensor::from_vec(broken, (4, 7), &CPU).unwrap();
    for divergence in EVERY_DIVERGENCE {
        let targets = [tensors.target(divergence, 1.0, 1.0)];
        for loss in [head_loss, head_loss_plain] {
            let loss = loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
            assert!(loss.divergences[0].is_nan(), "{divergence:?} hides a NaN");
        }
    }
}

/// Logits of some hundreds: most probabilities are 0 in f32, and models are sure of different tokens.
#[test]
fn far_apart_distributions_give_finite_losses_and_gradients() {
    let case = Case::new(4, 40, 4, 6);
    let scaled = |dtype| {
        let mut tensors = case.tensors(dtype, true);
        tensors.hidden = variable(&(&tensors.hidden * 128.0).unwrap()).unwrap();
        tensors.target_hidden = (&tensors.target_hidden * 128.0).unwrap();
        tensors
    };
    let (narrow, wide) = (scaled(DType::F32), scaled(DType::F64));
    for divergence in EVERY_DIVERGENCE {
        let run = |loss: fn(&Tensor, &Tensor, _, &[Target], &[f32]) -> Result<HeadLoss>, tensors: &Tensors| {
            let targets = [tensors.target(divergence, 1.0, 1.0)];
            let loss = loss(&tensors.hidden, &tensors.head, None, &targets, &case.weights).unwrap();
            let (hidden, head) = gradients(&loss, tensors);
            (loss.divergences[0], hidden, head)
        };
        let (value, hidden, head) = run(head_loss, &narrow);
        let (right_value, right_hidden, right_head) = run(head_loss_plain, &wide);
        assert!((value - right_value).abs() < 1e-3 + 1e-5 * right_value, "{divergence:?}: {value}, not {right_value}");
        // The gradients may be close to 0, the head's because of inputs of some hundreds less so.
        let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).fold(0.0_f64, |gap, (a, b)| gap.max((a - b).abs()));
        assert!(hidden.iter().chain(&head).all(|x| x.is_finite()), "{divergence:?}");
        assert!(apart(&hidden, &right_hidden) < 1e-2, "{divergence:?}: {}", apart(&hidden, &right_hidden));
        assert!(apart(&head, &right_head) < 1.0, "{divergence:?}: {}", apart(&head, &right_head));
    }
}

#[test]
fn a_chunk_has_bounded_logits_and_enough_rows() {
    for vocabulary in [1, 61, 1024, 32_000, 50_257, 151_936, 262_144] {
        let rows = rows_per_chunk(vocabulary);
        assert!((16..=1024).contains(&rows), "{rows} rows at {vocabulary}");
        assert!(rows == 16 || rows * vocabulary * 4 <= 32 << 20, "{rows} rows at {vocabulary}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    /// Each is zero between equal distributions and positive otherwise; the gradient has no component that
    /// softmax ignores.
    #[test]
    fn divergences_are_distances(which in 0..EVERY_DIVERGENCE.len(), seed in 0..1000_u64, temperature in 0.5..3.0) {
        let case = Case::new(3, 30, 30, seed);
        let tensors = case.tensors(DType::F32, false);
        let identity = Tensor::eye(30, DType::F32, &CPU).unwrap();
        let divergence = EVERY_DIVERGENCE[which];
        let other = Tensor::from_vec(noise(seed + 9, 90, 2.0), (3, 30), &CPU).unwrap();
        let target = |hidden| {
            let source = Source::Head { hidden, head: &identity };
            Target { source, divergence, coefficient: 1.0, temperature }
        };
        let twin = tensors.hidden.detach();
        let same = divergence_values(&tensors.hidden, &identity, &[target(&twin)]).unwrap().remove(0);
        prop_assert!(same.iter().all(|value| value.abs() < 1e-5), "{same:?}");
        let loss = head_loss(&tensors.hidden, &identity, None, &[target(&other)], &[1.0; 3]).unwrap();
        prop_assert!(loss.divergences[0] > 1e-3);
        let store = loss.loss.backward().unwrap();
        for row in numbers(store.get(&tensors.hidden).unwrap()).chunks(30) {
            prop_assert!(row.iter().sum::<f64>().abs() < 1e-5);
        }
    }
}

#[test]
fn divergences_are_written_as_strings_or_maps() {
    let read = |text: &str| serde_json::from_str::<Divergence>(text);
    assert_eq!(read(r#""reverse-kl""#).unwrap(), Divergence::ReverseKl);
    assert_eq!(read(r#"{"jsd": {"beta": 0.5}}"#).unwrap(), Divergence::Jsd { beta: 0.5 });
    let alpha_beta = Divergence::AlphaBeta { alpha: 0.2, beta: 0.7 };
    assert_eq!(read(r#"{"alpha-beta": {"alpha": 0.2, "beta": 0.7}}"#).unwrap(), alpha_beta);
    assert!(read(r#"{"jsd": {"beta": 0.5, "alpha": 1.0}}"#).is_err());
    assert!(read(r#""jsd""#).is_err());
    for divergence in EVERY_DIVERGENCE {
        assert_eq!(read(&serde_json::to_string(&divergence).unwrap()).unwrap(), divergence);
        divergence.validate().unwrap();
    }
}

/// A trainee whose head has eleven rows of padding: a target without them sees it as if they were not there, while the
/// cross-entropy is over all rows.
#[test]
fn a_target_over_fewer_tokens_is_compared_over_those() {
    let case = Case::new(9, 30, 6, 5);
    let (narrow, wide) = (case.tensors(DType::F32, true), case.tensors(DType::F64, true));
    for divergence in EVERY_DIVERGENCE {
        for temperature in [1.0, 1.7] {
            let parts = |tensors: &Tensors, loss: Loss| {
                let head = tensors.target_head.narrow(0, 0, 19).unwrap();
                let source = Source::Head { hidden: &tensors.target_hidden, head: &head };
                let target = Target { source, divergence, coefficient: 0.6, temperature };
                let labels = Some((case.labels.as_slice(), 0.4));
                let loss: HeadLoss = loss(&tensors.hidden, &tensors.head, labels, &[target], &case.weights).unwrap();
                let store = loss.loss.backward().unwrap();
                let gradients = [&tensors.hidden, &tensors.head].map(|tensor| numbers(store.get(tensor).unwrap()));
                let alone = tensors.head.detach().narrow(0, 0, 19).unwrap();
                let values = divergence_values(&tensors.hidden.detach(), &alone, &[target]).unwrap().remove(0);
                let expected: f64 = values.iter().zip(&case.weights).map(|(v, w)| v * f64::from(*w)).sum();
                (loss.cross_entropy.unwrap(), loss.divergences[0], expected, gradients)
            };
            let (found, right) = (parts(&narrow, head_loss), parts(&wide, head_loss_plain));
            let chunked = parts(&wide, head_loss);
            for found in [&found, &chunked] {
                assert!((found.0 - right.0).abs() < 1e-5 && (found.1 - right.1).abs() < 1e-5, "{divergence:?}");
                assert!((found.1 - found.2).abs() < 1e-6, "{divergence:?}: {} {}", found.1, found.2);
                for (found, right) in found.3.iter().flatten().zip(right.3.iter().flatten()) {
                    assert!((found - right).abs() < 1e-5, "{divergence:?}: {found} {right}");
                }
            }
        }
    }
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let case = Case::new(2, 10, 4, 2);
    let tensors = case.tensors(DType::F32, true);
    let labels = |labels: &'static [u32]| Some((labels, 1.0));
    let message = |labels, targets: &[Target], weights: &[f32]| {
        let result = head_loss(&tensors.hidden, &tensors.head, labels, targets, weights);
        result.err().map(|error| format!("{error:#}")).expect("an error")
    };
    let both = [1.0, 1.0];
    assert_eq!(message(None, &[], &both), "a loss needs labels or a target, found neither");
    assert_eq!(message(labels(&[0]), &[], &both), "found 1 labels, expected 2, one a row");
    assert_eq!(message(labels(&[0, 1]), &[], &[1.0]), "found 1 weights, expected 2, one a row");
    let outside = "label 10 of row 1 is outside of the vocabulary, expected less than 10";
    assert_eq!(message(labels(&[0, 10]), &[], &both), outside);
    let target = tensors.target(Divergence::ForwardKl, 1.0, 1.0);
    let larger = Tensor::cat(&[&tensors.target_head, &tensors.target_head], 0).unwrap();
    let other = "`head` of target 0 has shape [20, 7], expected [10, 7]: both models must share a vocabulary";
    assert_eq!(
        message(
            None,
            &[Target { source: Source::Head { hidden: &tensors.target_hidden, head: &larger }, ..target }],
            &both
        ),
        other
    );
    for temperature in [0.0, 1e-60, 1e39, 1e308, f64::INFINITY, f64::NAN] {
        let found = message(None, &[Target { temperature, ..target }], &both);
        assert!(found.starts_with("temperature of target 0: expected a number above 0"), "{found}");
        assert!(found.ends_with(&format!("got {temperature:?}")), "{found}");
    }
    let skewed = Divergence::SkewedReverseKl { alpha: 1.0 };
    let range =
        "`alpha` of divergence `skewed_reverse_kl` is 1, expected a number above 0 and below 1; for 0 use `reverse-kl`";
    assert_eq!(message(None, &[Target { divergence: skewed, ..target }], &both), range);
}
