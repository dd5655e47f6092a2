//! Every kernel against its counterpart on the CPU, or against its definition, on the device that opens.

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use contract::random::{philox, uniform};
use half::bf16;

use super::attention::{Heads, Sequences};
use super::norm::Kind;
use super::testing::device;
use super::{Element, Mask, fold, row_keys, upload};
use crate::batch::Input;
use crate::generate::sample::{Choice, Scratch, choose};
use crate::kernels::testing::numbers;
use crate::kernels::{self, masks};
use crate::terms::activation::Activation;
use crate::terms::divergence::Divergence;
use crate::terms::dropout::Dropout;
use crate::terms::sampling::Sampling;

const DROPOUT: Dropout = Dropout { seed: 0x1234_5678_9abc, update: 3, purpose: 0x100 };

/// A type of elements with its conversions, and how near a result of several roundings comes.
trait Number: Element + Default {
    const NEAR: f32;
    fn of(x: f32) -> Self;
    fn value(self) -> f32;
}

impl Number for f32 {
    const NEAR: f32 = 1e-5;
    fn of(x: f32) -> f32 {
        x
    }
    fn value(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    const NEAR: f32 = 1e-2;
    fn of(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// Numbers as the type keeps them, here and on the device.
fn random<T: Number>(device: &CudaDevice, seed: u64, count: usize) -> (Vec<f32>, CudaSlice<T>) {
    let values: Vec<f32> = numbers(seed, count).into_iter().map(|x| T::of(x).value()).collect();
    let there = put::<T>(device, &values);
    (values, there)
}

fn put<T: Number>(device: &CudaDevice, values: &[f32]) -> CudaSlice<T> {
    upload(device, values.iter().map(|x| T::of(*x)).collect()).unwrap()
}

fn get<T: Number>(device: &CudaDevice, buffer: &impl DevicePtr<T>) -> Vec<f32> {
    device.clone_dtoh(buffer).unwrap().into_iter().map(T::value).collect()
}

fn zeros<T: Number>(device: &CudaDevice, count: usize) -> CudaSlice<T> {
    device.alloc_zeros(count).unwrap()
}

/// Results are near: by the type's tolerance, relative to the largest of them.
#[track_caller]
fn near<T: Number>(name: &str, found: &[f32], expected: &[f32]) {
    near_by(name, found, expected, T::NEAR);
}

#[track_caller]
fn near_by(name: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(1e-3f32, |a, b| a.max(b.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (found - expected).abs();
        assert!(difference <= tolerance * largest, "{name}[{i}]: {found}, expected {expected} (largest {largest})");
    }
}

/// Rows of sequences: one of a single token, an empty one, and others.
fn segments(lengths: &[usize]) -> (Vec<std::ops::Range<usize>>, Vec<u64>) {
    let mut end = 0;
    let segments = lengths.iter().map(|length| {
        end += length;
        end - length..end
    });
    (segments.collect(), (0..lengths.len()).map(|i| (i as u64) << 33 | 40).collect())
}

/// The mask of every row, `[N, width]`.
fn mask_rows(lengths: &[usize], rate: f32, site: u32, width: usize) -> Vec<f32> {
    let (segments, ids) = segments(lengths);
    let mut mask = Vec::new();
    for (segment, id) in segments.iter().zip(&ids) {
        for line in 0..segment.len() {
            let mut row = vec![0.0; width];
            masks::fill(&mut row, &DROPOUT, rate, site, *id, line as u32);
            mask.extend(row);
        }
    }
    mask
}

#[test]
fn single_elements() {
    fn check<T: Number>(device: &CudaDevice) {
        for count in [1, 7, 8, 4099] {
            let ((x, there), (y, other)) = (random::<T>(device, 1, count), random::<T>(device, 2, count));
            let mut sum = put::<T>(device, &x);
            super::elementwise::add(device, &mut sum, &other).unwrap();
            near::<T>("sum", &get(device, &sum), &x.iter().zip(&y).map(|(x, y)| x + y).collect::<Vec<_>>());
            let (mut single, mut half) = (zeros::<f32>(device, count), zeros::<bf16>(device, count));
            super::elementwise::cast(device, &mut single, &there).unwrap();
            assert_eq!(get(device, &single), x);
            super::elementwise::cast(device, &mut half, &there).unwrap();
            assert_eq!(get(device, &half), x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect::<Vec<_>>());
            for activation in [Activation::GeluNew, Activation::Gelu, Activation::Relu] {
                let mut out = zeros::<T>(device, count);
                super::elementwise::activation(device, &mut out, &there, activation).unwrap();
                let expected = kernels::elementwise::activation(&x, activation);
                near::<T>("activation", &get(device, &out), &expected);
                let (mut dy, mut expected) = (put::<T>(device, &y), y.clone());
                super::elementwise::activation_backward(device, &mut dy, &there, activation).unwrap();
                kernels::elementwise::activation_backward(&mut expected, &x, activation);
                near::<T>("gradient of activation", &get(device, &dy), &expected);
            }
            // silu(gate) up, by its definition.
            let (dy, dy_there) = random::<T>(device, 3, count);
            let share = |x: f32| 1.0 / (1.0 + (-x).exp());
            let mut out = zeros::<T>(device, count);
            super::elementwise::swiglu(device, &mut out, &there, &other).unwrap();
            let expected: Vec<f32> = x.iter().zip(&y).map(|(g, u)| g * share(*g) * u).collect();
            near::<T>("swiglu", &get(device, &out), &expected);
            let (mut dgate, mut dup) = (zeros::<T>(device, count), zeros::<T>(device, count));
            super::elementwise::swiglu_backward(device, &mut dgate, &mut dup, &dy_there, &there, &other).unwrap();
            let slope = |g: f32| share(g) * (1.0 + g * (1.0 - share(g)));
            let by_gate: Vec<f32> = (0..count).map(|i| dy[i] * y[i] * slope(x[i])).collect();
            let by_up: Vec<f32> = (0..count).map(|i| dy[i] * x[i] * share(x[i])).collect();
            near::<T>("gradient of gate", &get(device, &dgate), &by_gate);
            near::<T>("gradient of up", &get(device, &dup), &by_up);
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn bias_and_dropout() {
    fn check<T: Number>(device: &CudaDevice) {
        let lengths = [1, 0, 37];
        let (segments, ids) = segments(&lengths);
        let keys = upload(device, row_keys(&segments, &ids)).unwrap();
        for width in [1, 33, 64, 768, 2056] {
            let mask = Mask { dropout: DROPOUT, rate: 0.3, site: 5, keys: &keys };
            let masks = mask_rows(&lengths, 0.3, 5, width);
            let (x, _) = random::<T>(device, 1, 38 * width);
            let (bias, bias_there) = random::<f32>(device, 3, width);
            let sums: Vec<f32> = (0..38 * width).map(|i| x[i] + bias[i % width]).collect();
            let run = |bias, mask| {
                let mut out = put::<T>(device, &x);
                super::elementwise::bias_dropout(device, &mut out, bias, mask, width).unwrap();
                get(device, &out)
            };
            let bias = bias_there.as_view();
            let rounded: Vec<f32> = sums.iter().map(|x| T::of(*x).value()).collect();
            assert_eq!(run(Some(&bias), None), rounded);
            let expected: Vec<f32> = sums.iter().zip(&masks).map(|(x, mask)| mask * x).collect();
            near::<T>("dropout of a sum", &run(Some(&bias), Some(mask)), &expected);
            let dropped = |values: &[f32]| values.iter().map(|x| *x == 0.0).collect::<Vec<_>>();
            let found = run(None, Some(mask));
            assert_eq!(dropped(&found), dropped(&masks), "the same elements are dropped as on the CPU");
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn norms() {
    fn check<T: Number>(device: &CudaDevice) {
        for (rows, width) in [(1, 8), (70, 33), (130, 192), (3, 2056)] {
            let count = rows * width;
            let ((x, there), (dy, dy_there)) = (random::<T>(device, 1, count), random::<T>(device, 2, count));
            let (weight, weight_there) = random::<f32>(device, 3, width);
            let (bias, bias_there) = random::<f32>(device, 4, width);
            let bias_there = bias_there.as_view();
            for kind in [Kind::Layer, Kind::Rms] {
                let layer = kind == Kind::Layer;
                let with_bias = layer.then_some(&bias_there);
                let (mut out, mut moments) = (zeros::<T>(device, count), zeros::<f32>(device, 2 * rows));
                super::norm::forward(device, &mut out, &mut moments, &there, &weight_there, with_bias, 1e-5).unwrap();
                let Expected { out: value, mut dx, dweight, dbias } = expected(&x, &weight, &bias, &dy, layer);
                near::<T>("norm", &get(device, &out), &value);

                let mut gradients = [zeros::<T>(device, count), zeros::<T>(device, count), put::<T>(device, &x)];
                for gradient in &mut gradients {
                    super::norm::backward(device, kind, gradient, &there, &weight_there, &moments, &dy_there).unwrap();
                }
                let [gradient, again, added] = gradients.map(|gradient| get(device, &gradient));
                near::<T>("gradient of a norm", &gradient, &dx);
                assert_eq!(gradient, again, "the same bits twice");
                dx.iter_mut().zip(&x).for_each(|(dx, x)| *dx += x);
                near::<T>("added gradient of a norm", &added, &dx);

                let (mut by_weight, mut by_bias) = (zeros::<f32>(device, width), zeros::<f32>(device, width));
                let both = layer.then_some(&mut by_bias);
                super::norm::backward_parameters(device, &mut by_weight, both, &there, &moments, &dy_there).unwrap();
                near_by("gradient of weight", &get(device, &by_weight), &dweight, 1e-5);
                if layer {
                    near_by("gradient of bias", &get(device, &by_bias), &dbias, 1e-5);
                }
            }
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);

    struct Expected {
        out: Vec<f32>,
        dx: Vec<f32>,
        dweight: Vec<f32>,
        dbias: Vec<f32>,
    }

    /// By definition, in f64.
    fn expected(x: &[f32], weight: &[f32], bias: &[f32], dy: &[f32], layer: bool) -> Expected {
        let width = weight.len();
        let (mut out, mut dx) = (Vec::new(), Vec::new());
        let (mut dweight, mut dbias) = (vec![0.0f64; width], vec![0.0f64; width]);
        for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
            let average = |f: &dyn Fn(usize) -> f64| (0..width).map(f).sum::<f64>() / width as f64;
            let mean = if layer { average(&|i| f64::from(x[i])) } else { 0.0 };
            let scale = 1.0 / (average(&|i| (f64::from(x[i]) - mean).powi(2)) + 1e-5).sqrt();
            let n = |i: usize| (f64::from(x[i]) - mean) * scale;
            let g = |i: usize| f64::from(dy[i]) * f64::from(weight[i]);
            let (g_mean, gn_mean) = (if layer { average(&g) } else { 0.0 }, average(&|i| g(i) * n(i)));
            for i in 0..width {
                let bias = if layer { f64::from(bias[i]) } else { 0.0 };
                out.push((n(i) * f64::from(weight[i]) + bias) as f32);
                dx.push((scale * (g(i) - g_mean - n(i) * gn_mean)) as f32);
                dweight[i] += f64::from(dy[i]) * n(i);
                dbias[i] += f64::from(dy[i]);
            }
        }
        let single = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect();
        Expected { out, dx, dweight: single(dweight), dbias: single(dbias) }
    }
}

#[test]
fn rows_are_summed_and_moved() {
    fn check<T: Number>(device: &CudaDevice) {
        for (rows, width) in [(1, 1), (64, 8), (65, 300), (200, 33)] {
            let (x, there) = random::<T>(device, 1, rows * width);
            let mut sum = zeros::<f32>(device, width);
            super::rows::sum_rows(device, &mut sum, &there).unwrap();
            near_by("sum of rows", &get(device, &sum), &kernels::elementwise::sum_rows(&x, width, 0..width), 1e-5);

            let indices: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
            let indices_there = upload(device, indices.clone()).unwrap();
            let mut some = zeros::<T>(device, indices.len() * width);
            super::rows::gather(device, &mut some, &there, &indices_there, width).unwrap();
            let row = |i: &u32| x[*i as usize * width..][..width].to_vec();
            assert_eq!(get(device, &some), indices.iter().flat_map(row).collect::<Vec<_>>());
            let mut back = zeros::<T>(device, rows * width);
            super::rows::scatter(device, &mut back, &some, &indices_there, width).unwrap();
            let expected = (0..rows as u32).flat_map(|i| if indices.contains(&i) { row(&i) } else { vec![0.0; width] });
            assert_eq!(get(device, &back), expected.collect::<Vec<_>>());
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn embeddings_and_their_gradients() {
    fn check<T: Number>(device: &CudaDevice) {
        let (segments, _) = segments(&[1, 0, 9, 40]);
        let inputs: Vec<Input> =
            (0..50).map(|i| if i % 7 == 3 { Input::Prompt(i % 3) } else { Input::Token(i * i % 11) }).collect();
        let at: Vec<u32> = segments.iter().flat_map(|s| 0..s.len() as u32).collect();
        let codes = upload(device, inputs.iter().map(|i| super::embed::code(*i)).collect()).unwrap();
        let at_there = upload(device, at.clone()).unwrap();
        for width in [4, 33, 264] {
            let [(tokens, t), (prompt, p), (positions, q)] =
                [(1, 11), (2, 3), (3, 40)].map(|(seed, count)| random::<T>(device, seed, count * width));
            let (t, p, q) = (t.as_view(), p.as_view(), q.as_view());
            let tables = super::embed::Tables { tokens: &t, prompt: Some(&p), positions: Some(&q) };
            let row = |i: usize| match inputs[i] {
                Input::Token(id) => &tokens[id as usize * width..][..width],
                Input::Prompt(id) => &prompt[id as usize * width..][..width],
            };
            let position = |i: usize, c: usize| positions[at[i] as usize * width + c];
            let sums: Vec<f32> = (0..50)
                .flat_map(|i| (0..width).map(move |c| (i, c)))
                .map(|(i, c)| row(i)[c] + position(i, c))
                .collect();
            let mut out = zeros::<T>(device, 50 * width);
            super::embed::embed(device, &mut out, &codes, &at_there, tables, width).unwrap();
            near::<T>("embedding", &get(device, &out), &sums);

            let (dy, dy_there) = random::<T>(device, 5, 50 * width);
            let pairs = inputs.iter().enumerate().filter_map(|(row, input)| match input {
                Input::Token(id) => Some((row as u32, *id)),
                Input::Prompt(_) => None,
            });
            let pairs: Vec<(u32, u32)> = pairs.collect();
            let (mut table, gradient) = random::<f32>(device, 6, 11 * width);
            let mut gradient = gradient;
            for (row, id) in &pairs {
                for c in 0..width {
                    table[*id as usize * width + c] += dy[*row as usize * width + c];
                }
            }
            let groups = super::embed::Groups::new(device, pairs).unwrap();
            super::embed::add_groups(device, &mut gradient, &dy_there, &groups, width).unwrap();
            near_by("gradient of a table", &get(device, &gradient), &table, 1e-5);
            let none = super::embed::Groups::new(device, []).unwrap();
            super::embed::add_groups(device, &mut gradient, &dy_there, &none, width).unwrap();
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn rotary_positions_turn_pairs_and_turn_them_back() {
    fn check<T: Number>(device: &CudaDevice, width: usize) {
        // With wider heads a part of each is turned.
        let (rows, heads, turned, stride) = (7, 3, 10, 50);
        let angle = |position: u32, pair: usize| f64::from(position) * 10_000f64.powf(-(pair as f64) / 5.0);
        let angles: Vec<f32> = (0..20u32)
            .flat_map(|p| (0..10).map(move |i| if i < 5 { angle(p, i).cos() } else { angle(p, i - 5).sin() } as f32))
            .collect();
        let positions: Vec<u32> = (0..rows as u32).map(|i| i * 5 % 13).collect();
        let (x, _) = random::<T>(device, 1, rows * stride);
        let mut there = put::<T>(device, &x);
        let (angles, positions_there) = (put::<f32>(device, &angles), upload(device, positions.clone()).unwrap());
        let turn = |x: &mut CudaSlice<T>, back| {
            super::rope::rope(device, x, &positions_there, &angles, heads, width, turned, stride, back).unwrap();
        };
        turn(&mut there, false);
        let mut expected = x.clone();
        for (row, position) in positions.iter().enumerate() {
            for head in 0..heads {
                for pair in 0..5 {
                    let (first, second) = (row * stride + head * width + pair, row * stride + head * width + pair + 5);
                    let (sin, cos) = angle(*position, pair).sin_cos();
                    let (a, b) = (f64::from(x[first]), f64::from(x[second]));
                    expected[first] = (a * cos - b * sin) as f32;
                    expected[second] = (b * cos + a * sin) as f32;
                }
            }
        }
        near::<T>("rotated", &get(device, &there), &expected);
        turn(&mut there, true);
        near::<T>("rotated back", &get(device, &there), &x);
    }
    let Some(device) = device() else { return };
    for width in [10, 16] {
        check::<f32>(&device, width);
        check::<bf16>(&device, width);
    }
}

#[test]
fn columns_move_and_heads_change_their_order() {
    fn check<T: Number>(device: &CudaDevice) {
        let (rows, width) = (5, 42);
        let (x, there) = random::<T>(device, 1, rows * width);
        let mut part = zeros::<T>(device, rows * 9);
        super::rows::copy_columns(device, &mut part, &there.slice(11..), [9, width], 9, rows).unwrap();
        assert_eq!(get(device, &part), kernels::columns::part(&x, width, 11, 9));
        let mut wide = zeros::<T>(device, rows * 12);
        super::rows::copy_columns(device, &mut wide.slice_mut(3..), &part, [12, 9], 9, rows).unwrap();
        let (zeros_before, part) = (vec![0.0; rows * 3], get(device, &part));
        assert_eq!(get(device, &wide), kernels::columns::join(&[(zeros_before.as_slice(), 3), (part.as_slice(), 9)]));
        for groups in [[2, 3], [7, 2], [1, 6]] {
            let mut out = zeros::<T>(device, rows * width);
            super::rows::regroup(device, &mut out, &there, groups, width).unwrap();
            assert_eq!(get(device, &out), kernels::columns::regroup(&x, width, groups));
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn terms_of_losses_and_their_slopes() {
    fn check<T: Number>(device: &CudaDevice) {
        let divergences = [
            Divergence::ForwardKl,
            Divergence::ReverseKl,
            Divergence::Jsd { beta: 0.3 },
            Divergence::SkewedForwardKl { alpha: 0.1 },
            Divergence::SkewedReverseKl { alpha: 0.2 },
            Divergence::TotalVariation,
            Divergence::AlphaBeta { alpha: 0.4, beta: 0.7 },
        ];
        for (vocabulary, rows) in [(11, 4), (517, 3), (2003, 1)] {
            for (i, divergence) in divergences.into_iter().enumerate() {
                let temperature = [1.0, 2.0][i % 2];
                let count = rows * vocabulary;
                let [(logits, _), (target, target_there)] = [1, 2].map(|seed| random::<T>(device, seed, count));
                let labels: Vec<u32> = (0..rows as u32).map(|r| r * 7 % vocabulary as u32).collect();
                let weights: Vec<f32> = (0..rows).map(|r| [0.5, 2.0, 0.0, 1.0][r]).collect();
                let (labels_there, weights_there) = (upload(device, labels.clone()).unwrap(), put(device, &weights));

                let (mut terms, mut slopes) = (vec![0.0f64; 2 * rows], vec![0.0f32; count]);
                for r in (0..rows).filter(|r| weights[*r] != 0.0) {
                    let own = &logits[r * vocabulary..][..vocabulary];
                    let slopes = &mut slopes[r * vocabulary..][..vocabulary];
                    let weight = f64::from(weights[r]);
                    let normaliser = kernels::elementary::Normaliser::of(own, 1.0);
                    let label = labels[r] as usize;
                    terms[2 * r] = -f64::from(normaliser.log_probability(own[label]));
                    for (v, slope) in slopes.iter_mut().enumerate() {
                        let probability = normaliser.log_probability(own[v]).exp();
                        *slope += (weight * 0.3) as f32 * (probability - f32::from(u8::from(v == label)));
                    }
                    let mut used = target[r * vocabulary..][..vocabulary].to_vec();
                    terms[2 * r + 1] =
                        kernels::head::divergence(divergence, own, &mut used, temperature, weight * 0.7, slopes);
                }
                let expected: Vec<f32> = terms.iter().map(|x| *x as f32).collect();

                let (labels_view, target_view) = (labels_there.as_view(), target_there.as_view());
                let labels = Some((&labels_view, 0.3));
                let target =
                    Some(super::head::TargetLogits { logits: &target_view, divergence, coefficient: 0.7, temperature });
                let name = divergence.name();
                let run = |labels, target, found: &mut CudaSlice<f64>, column, slopes: super::head::Slopes<'_, T>| {
                    let mut own = put::<T>(device, &logits);
                    let compared = super::head::Compared { labels, target };
                    let weights = &weights_there;
                    super::head::head_terms(device, &mut own, vocabulary, compared, weights, found, 2, column, slopes)
                        .unwrap();
                    get(device, &own)
                };
                let terms_of = |found: &CudaSlice<f64>| -> Vec<f32> {
                    device.clone_dtoh(found).unwrap().into_iter().map(|x| x as f32).collect()
                };
                let mut found = device.alloc_zeros::<f64>(2 * rows).unwrap();
                let in_place = run(labels, target, &mut found, 0, super::head::Slopes::InPlace);
                near_by(name, &terms_of(&found), &expected, 2e-5);
                near::<T>(name, &in_place, &slopes);
                // One term after the other, to a matrix of their own.
                let mut found = device.alloc_zeros::<f64>(2 * rows).unwrap();
                let mut other = zeros::<T>(device, count);
                let into = super::head::Slopes::Into { slopes: &mut other, accumulate: false };
                assert_eq!(run(labels, None, &mut found, 0, into), logits);
                let into = super::head::Slopes::Into { slopes: &mut other, accumulate: true };
                run(None, target, &mut found, 1, into);
                near_by(name, &terms_of(&found), &expected, 2e-5);
                near::<T>(name, &get(device, &other), &slopes);
                let mut found = device.alloc_zeros::<f64>(2 * rows).unwrap();
                assert_eq!(run(labels, target, &mut found, 0, super::head::Slopes::Unwanted), logits);
                near_by(name, &terms_of(&found), &expected, 2e-5);
            }
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn updates_of_all_parameters_at_once() {
    let Some(device) = device() else { return };
    let sizes = [1, 9000, 8192, 70, 20_001];
    let start: Vec<Vec<f32>> = (0..5).map(|i| numbers(i, sizes[i as usize])).collect();
    let mut weights = start.clone();
    let (mut firsts, mut seconds): (Vec<_>, Vec<_>) = sizes.iter().map(|n| (vec![0.0; *n], vec![0.0; *n])).unzip();
    let upload_all = |all: &[Vec<f32>]| all.iter().map(|v| put::<f32>(&device, v)).collect::<Vec<_>>();
    let (w, m, v) = (upload_all(&weights), upload_all(&firsts), upload_all(&seconds));
    for step in 1..=3 {
        let gradients: Vec<Vec<f32>> = (0..5).map(|i| numbers(10 * step + i, sizes[i as usize])).collect();
        let there = upload_all(&gradients);
        let views: Vec<_> = there.iter().map(CudaSlice::as_view).collect();
        let squares = gradients.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>();
        let norm = super::adamw::norm(&device, &views).unwrap();
        let found = device.clone_dtoh(&norm).unwrap()[0];
        assert!((found / squares.sqrt() - 1.0).abs() < 1e-12, "{found}");
        let scale = (2.0 / found) as f32;
        let update = kernels::adamw::Update {
            scale,
            beta1: 0.9,
            beta2: 0.99,
            rest1: 0.1,
            rest2: 0.01,
            eps: 1e-8,
            keep: 0.999,
            step: 0.01,
            correction: 1.5,
        };
        let mut parameters = Vec::new();
        for (i, ((w, m), v)) in w.iter().zip(&m).zip(&v).enumerate() {
            parameters.push(super::adamw::Parameter {
                weight: w.as_view(),
                first: m.as_view(),
                second: v.as_view(),
                gradient: there[i].as_view(),
                keep: if i == 1 { 1.0 } else { 0.999 },
            });
        }
        super::adamw::adamw(&device, &parameters, update, &put::<f32>(&device, &[scale])).unwrap();
        for i in 0..5 {
            let update = kernels::adamw::Update { keep: if i == 1 { 1.0 } else { 0.999 }, ..update };
            kernels::adamw::update(&mut weights[i], &mut firsts[i], &mut seconds[i], &gradients[i], update);
        }
    }
    for i in 0..5 {
        near_by("weight", &get(&device, &w[i]), &weights[i], 1e-6);
        near_by("first moment", &get(&device, &m[i]), &firsts[i], 1e-6);
        near_by("second moment", &get(&device, &v[i]), &seconds[i], 1e-6);
    }
}

/// Packed queries, keys and values in which each head of keys stands once for each head of queries that takes it.
fn spread(qkv: &[f32], heads: Heads) -> Vec<f32> {
    let Heads { queries, keys, width, .. } = heads;
    let head_of_part = |part: usize, head: usize| match part {
        0 => head,
        _ => queries + (part - 1) * keys + head * keys / queries,
    };
    let row = |row: &[f32]| {
        let places = (0..3 * queries).map(|i| head_of_part(i / queries, i % queries) * width);
        places.flat_map(|place| row[place..place + width].to_vec()).collect::<Vec<_>>()
    };
    qkv.chunks(heads.row()).flat_map(row).collect()
}

/// The way back: gradients of heads that were spread, added up.
fn gather(spread: &[f32], heads: Heads) -> Vec<f32> {
    let Heads { queries, keys, width, .. } = heads;
    let mut out = vec![0.0; spread.len() / (3 * queries) * (queries + 2 * keys)];
    for (to, from) in out.chunks_mut(heads.row()).zip(spread.chunks(3 * queries * width)) {
        for i in 0..3 * queries {
            let (part, head) = (i / queries, i % queries);
            let place = if part == 0 { head } else { queries + (part - 1) * keys + head * keys / queries };
            for c in 0..width {
                to[place * width + c] += from[i * width + c];
            }
        }
    }
    out
}

#[test]
fn attention_over_packed_sequences() {
    fn check<T: Number>(device: &CudaDevice) {
        let lengths = [1, 70, 0, 16, 150];
        let rows: usize = lengths.iter().sum();
        let (segments, ids) = segments(&lengths);
        let sequences = Sequences::new(device, &segments, &ids).unwrap();
        for (queries, keys, width, rate, window) in [
            (2, 2, 8, 0.0, None),
            (3, 3, 33, 0.2, None),
            (4, 2, 64, 0.0, None),
            (1, 1, 80, 0.1, None),
            (2, 1, 128, 0.2, None),
            (2, 1, 8, 0.2, Some(5)),
            (1, 1, 33, 0.0, Some(1)),
            (2, 2, 16, 0.1, Some(70)),
        ] {
            let heads = Heads { queries, keys, width, scale: 1.0 / (width as f32).sqrt(), window };
            let dropout = (rate > 0.0).then_some((DROPOUT, rate, 7));
            let (qkv, there) = random::<T>(device, 1, rows * heads.row());
            let (dy, dy_there) = random::<T>(device, 2, rows * queries * width);
            let wide = spread(&qkv, heads);
            let attention = kernels::attention::Attention {
                segments: &segments,
                rows: &ids,
                heads: queries,
                kv_heads: queries,
                scale: heads.scale,
                window,
                dropout,
            };
            let expected = kernels::attention::forward(&wide, queries * width, &attention);
            let gradient = gather(&kernels::attention::backward(&wide, &dy, queries * width, &attention), heads);

            let run = |gradients: &mut CudaSlice<T>| {
                let mut out = zeros::<T>(device, rows * queries * width);
                let mut normalisers = zeros::<f32>(device, rows * queries);
                super::attention::forward(device, &mut out, &mut normalisers, &there, &sequences, heads, dropout)
                    .unwrap();
                super::attention::backward(
                    device,
                    gradients,
                    &there,
                    &out,
                    &dy_there,
                    &normalisers,
                    &sequences,
                    heads,
                    dropout,
                )
                .unwrap();
                get(device, &out)
            };
            let mut packed = zeros::<T>(device, rows * heads.row());
            let out = run(&mut packed);
            let name = format!("{queries}, {keys} heads of {width}");
            near::<T>(&name, &out, &expected);
            near_by(&format!("gradient of {name}"), &get(device, &packed), &gradient, 2.0 * T::NEAR);
            let mut again = zeros::<T>(device, rows * heads.row());
            run(&mut again);
            assert_eq!(get(device, &packed), get(device, &again), "the same bits twice");
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn heads_that_are_too_wide_are_errors() {
    let Some(device) = device() else { return };
    let heads = Heads { queries: 1, keys: 1, width: 160, scale: 1.0, window: None };
    let sequences = Sequences::new(&device, &segments(&[1]).0, &[1]).unwrap();
    let qkv = zeros::<f32>(&device, 480);
    let (mut out, mut normalisers) = (zeros::<f32>(&device, 160), zeros::<f32>(&device, 1));
    let error = super::attention::forward(&device, &mut out, &mut normalisers, &qkv, &sequences, heads, None);
    assert!(error.unwrap_err().to_string().contains("at most 128"));
}

#[test]
fn decoding_attends_to_the_cache() {
    fn check<T: Number>(device: &CudaDevice) {
        for (queries, keys, width, capacity, window) in [
            (2, 2, 8, 40, None),
            (4, 2, 64, 300, None),
            (1, 1, 80, 600, None),
            (2, 1, 12, 300, None),
            (2, 1, 12, 300, Some(7)),
            (1, 1, 8, 600, Some(40)),
            (1, 1, 8, 600, Some(290)),
        ] {
            let heads = Heads { queries, keys, width, scale: 1.0 / (width as f32).sqrt(), window };
            let lengths = [1, capacity, 39, capacity * 9 / 10];
            let rows: usize = lengths.iter().sum();
            let (segments, ids) = segments(&lengths);
            let (qkv, _) = random::<T>(device, 1, rows * heads.row());
            let attention = kernels::attention::Attention {
                segments: &segments,
                rows: &ids,
                heads: queries,
                kv_heads: queries,
                scale: heads.scale,
                window,
                dropout: None,
            };
            let full = kernels::attention::forward(&spread(&qkv, heads), queries * width, &attention);
            let row = |x: &[f32], i: usize, width: usize| x[i * width..(i + 1) * width].to_vec();
            let last = |x: &[f32], width| -> Vec<f32> {
                segments.iter().flat_map(|segment| row(x, segment.end - 1, width)).collect()
            };

            // All but the last rows as a prompt, the last ones as a step.
            let mut prompt = (Vec::new(), Vec::new(), Vec::new());
            for (sequence, segment) in segments.iter().enumerate() {
                for (position, i) in (segment.start..segment.end - 1).enumerate() {
                    prompt.0.extend(row(&qkv, i, heads.row()));
                    prompt.1.push(sequence as u32);
                    prompt.2.push(position as u32);
                }
            }
            let size = lengths.len() * keys * capacity * width;
            let (mut k, mut v) = (zeros::<T>(device, size), zeros::<T>(device, size));
            let (sequences, positions) = (upload(device, prompt.1).unwrap(), upload(device, prompt.2).unwrap());
            let prompt = put::<T>(device, &prompt.0);
            let sequences = sequences.as_view();
            super::decode::append(device, &mut k, &mut v, &prompt, Some(&sequences), &positions, heads, capacity)
                .unwrap();
            let step = put::<T>(device, &last(&qkv, heads.row()));
            let positions = upload(device, lengths.iter().map(|l| *l as u32 - 1).collect()).unwrap();
            super::decode::append(device, &mut k, &mut v, &step, None, &positions, heads, capacity).unwrap();
            let mut out = zeros::<T>(device, lengths.len() * queries * width);
            let mut scratch = zeros::<f32>(device, super::decode::scratch(lengths.len(), heads, capacity));
            super::decode::attend(device, &mut out, &step, &k, &v, &positions, &mut scratch, heads, capacity).unwrap();
            near::<T>("attention to a cache", &get(device, &out), &last(&full, queries * width));
        }
    }
    let Some(device) = device() else { return };
    check::<f32>(&device);
    check::<bf16>(&device);
}

#[test]
fn sampling_chooses_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let settings = [
        Sampling::default(),
        Sampling::greedy(),
        Sampling { temperature: 0.7, top_k: 5, ..Sampling::default() },
        Sampling { top_p: 0.8, ..Sampling::default() },
        Sampling { min_p: 0.05, ..Sampling::default() },
        Sampling { temperature: 1.7, top_p: 0.9, min_p: 0.1, ..Sampling::default() },
        Sampling { temperature: 1.3, top_k: 20, top_p: 0.6, ..Sampling::default() },
        Sampling { repetition_penalty: 1.8, no_repeat_ngram: 2, ..Sampling::default() },
        Sampling { repetition_penalty: 0.5, no_repeat_ngram: 1, top_p: 0.9, ..Sampling::default() },
        Sampling { repetition_penalty: 1.2, no_repeat_ngram: 3, ..Sampling::greedy() },
    ];
    const ROOM: usize = 24;
    const MOST: usize = 12;
    for (vocabulary, tokens) in [(3, 3), (40, 40), (70, 37), (2003, 2003)] {
        for (which, sampling) in settings.iter().enumerate() {
            let rows = 4;
            let ids: Vec<u64> = (0..rows as u64).map(|i| i << 34 | 77).collect();
            let mut histories: Vec<Vec<u32>> =
                (0..rows).map(|r| (0..3 + 2 * r as u32).map(|i| (i * i + 1) % tokens as u32).collect()).collect();
            let prompts: Vec<u32> = histories.iter().map(|h| h.len() as u32).collect();
            let limits = vec![10u32, 4, 12, 12];
            let mut history = vec![0u32; rows * ROOM];
            for (to, from) in history.chunks_mut(ROOM).zip(&histories) {
                to[..from.len()].copy_from_slice(from);
            }
            // One that does not come beside one that does, as a list has them.
            let ends = vec![9999, 2];
            let up = |numbers: Vec<u32>| upload(&device, numbers).unwrap();
            let mut writing = super::sample::Writing {
                ends: up(ends.clone()),
                ids: up(ids.iter().map(|id| fold(*id)).collect()),
                prompts: up(prompts.clone()),
                limits: up(limits.clone()),
                counts: up(prompts.clone()),
                positions: up(prompts.iter().map(|n| n - 1).collect()),
                next: upload(&device, vec![-1i32; rows]).unwrap(),
                finished: up(vec![0; rows]),
                history: up(history),
                log_probs: zeros::<f32>(&device, rows * MOST),
            };
            let mut log_probs: Vec<Vec<f32>> = vec![Vec::new(); rows];
            let mut done = vec![false; rows];
            for step in 0..MOST {
                // Ties, which filters have to break by id.
                let logits: Vec<f32> = numbers(1000 * which as u64 + step as u64, rows * vocabulary)
                    .into_iter()
                    .map(|x| (x * 8.0).round() * 0.25)
                    .collect();
                for (r, logits) in logits.chunks(vocabulary).enumerate() {
                    if done[r] {
                        continue;
                    }
                    let [word, ..] = philox(9, [log_probs[r].len() as u32, fold(ids[r]), 5, 2]);
                    let scratch = &mut Scratch::default();
                    let Choice { token, log_prob } =
                        choose(logits, tokens, &histories[r], sampling, uniform(word), scratch);
                    histories[r].push(token);
                    log_probs[r].push(log_prob);
                    done[r] = ends.contains(&token) || log_probs[r].len() == limits[r] as usize;
                }
                let draws = super::sample::Draws { seed: 9, time: 5, purpose: 2 };
                let logits = put::<f32>(&device, &logits);
                super::sample::sample(&device, &logits, [vocabulary, tokens], &mut writing, sampling, draws).unwrap();
            }
            let counts = device.clone_dtoh(&writing.counts).unwrap();
            let found = device.clone_dtoh(&writing.history).unwrap();
            let probabilities = device.clone_dtoh(&writing.log_probs).unwrap();
            let positions = device.clone_dtoh(&writing.positions).unwrap();
            let next = device.clone_dtoh(&writing.next).unwrap();
            for r in 0..rows {
                let name = format!("{sampling:?} over {vocabulary}, row {r}");
                assert_eq!(found[r * ROOM..][..counts[r] as usize], histories[r], "{name}");
                near_by(&name, &probabilities[r * MOST..][..log_probs[r].len()], &log_probs[r], 1e-5);
                assert_eq!(positions[r], counts[r] - 1, "{name}");
                assert_eq!(next[r] as u32, *histories[r].last().unwrap(), "{name}");
            }
            let finished: Vec<bool> = device.clone_dtoh(&writing.finished).unwrap().iter().map(|f| *f == 1).collect();
            assert_eq!(finished, done);
        }
    }
}
