//! Attention kernels against the composition of plain operations, on wgpu and, where there is one, on a CUDA device.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]
#![allow(clippy::single_range_in_vec_init, reason = "a slice of one dimension")]
#![cfg(any(feature = "wgpu", feature = "cuda"))]

mod common;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use burn_flex::Flex;
use buzzer_kernels::attention::{self, AttentionIndex, device};
use buzzer_kernels::{Cube, ProductRuntime};
use common::{Device, noise};

/// How a row is filled.
#[derive(Clone, Copy, Debug)]
enum Rows {
    /// One document as long as the row.
    Dense,
    /// Documents of about so many tokens, and padding after nine tenths of the row.
    Packed(usize),
    /// As before; some keys are also in the document that nobody sees, and some queries see nothing.
    Holes(usize),
}

/// Documents and positions of queries, then of keys, each `[b, t]`.
fn tokens(rows: Rows, b: usize, t: usize) -> [Vec<i32>; 4] {
    let (mut documents, mut positions) = (vec![], vec![]);
    for row in 0..b {
        let (mut document, mut position) = (0, 0);
        for i in 0..t {
            let (length, end) = match rows {
                Rows::Dense => (usize::MAX, t),
                Rows::Packed(n) | Rows::Holes(n) => {
                    (n + (document as usize * 7 + row * 3) % (n / 2 + 1), t * 9 / 10)
                }
            };
            if i >= end {
                documents.push(-1);
                positions.push((i - end) as i32);
                continue;
            }
            if position as usize == length {
                (document, position) = (document + 1, 0);
            }
            documents.push(document);
            positions.push(position);
            position += 1;
        }
    }
    let (mut key_documents, key_positions) = (documents.clone(), positions.clone());
    if matches!(rows, Rows::Holes(_)) {
        for i in (0..b * t).step_by(5) {
            key_documents[i] = -2;
        }
        for i in (0..b * t).step_by(11) {
            documents[i] = 1000;
        }
    }
    [documents, positions, key_documents, key_positions]
}

/// One comparison: shapes, tokens, and what is measured.
#[derive(Clone, Copy, Debug)]
struct Case {
    b: usize,
    h: usize,
    g: usize,
    t: usize,
    w: usize,
    rows: Rows,
}

/// Greatest error of o, lse, dq, dk, dv, relative to 1 + the greatest value.
#[derive(Debug)]
struct Errors([f32; 5]);

impl Errors {
    fn worst(&self) -> f32 {
        self.0.iter().fold(0.0, |a, b| if b.is_nan() { f32::INFINITY } else { a.max(*b) })
    }
}

fn int_tensor<B: Backend>(values: &[i32], dims: [usize; 2], device: &B::Device) -> Tensor<B, 2, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), device)
}

fn index<B: Backend>(case: Case, device: &B::Device) -> AttentionIndex<B> {
    let [a, b, c, d] =
        tokens(case.rows, case.b, case.t).map(|x| int_tensor::<B>(&x, [case.b, case.t], device));
    AttentionIndex {
        query_documents: a,
        query_positions: b,
        key_documents: c,
        key_positions: d,
        ranges: None,
    }
}

fn primitive<R: CubeRuntime>(x: Tensor<Cube<R>, 4>) -> CubeTensor<R> {
    x.into_primitive().tensor()
}

fn floats<R: CubeRuntime, const D: usize>(x: CubeTensor<R>) -> Vec<f32> {
    let x = Tensor::<Cube<R>, D>::from_primitive(burn::tensor::TensorPrimitive::Float(x));
    x.cast(DType::F32).into_data().to_vec().unwrap()
}

/// Hands NaN to whoever allocates buffers of these sizes next.
fn poison<R: CubeRuntime>(elements: usize, dtype: DType, device: &Device<R>) {
    for _ in 0..3 {
        let x = Tensor::<Cube<R>, 1>::full([elements], f32::NAN, (device, dtype));
        let _ = x.slice([0..1]).into_data();
    }
}

/// Rounds through the dtype, so that the reference sees what the kernel sees.
fn rounded(values: Vec<f32>, dtype: DType) -> Vec<f32> {
    let x = Tensor::<Flex, 1>::from_floats(values.as_slice(), &Default::default());
    x.cast(dtype).cast(DType::F32).into_data().to_vec().unwrap()
}

fn greatest_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = 1.0 + expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
    found.iter().zip(expected).fold(0.0, |worst, (x, y)| {
        let error = (x - y).abs() / scale;
        if error.is_nan() { f32::INFINITY } else { worst.max(error) }
    })
}

/// What the plain operations give in f32: o `[b, h, t, w]`, lse, and the joined gradient `[b, t, h + 2 g, w]` in its
/// three parts. Rows that see nothing are 0, as their softmax is not defined.
fn expected(case: Case, joined: &[f32], grad: &[f32]) -> [Vec<f32>; 5] {
    let Case { b, h, g, t, w, .. } = case;
    let device = Default::default();
    let all = Tensor::<Flex, 4>::from_data(TensorData::new(joined.to_vec(), [b, t, h + 2 * g, w]), &device)
        .swap_dims(1, 2);
    let grad =
        Tensor::<Flex, 4>::from_data(TensorData::new(grad.to_vec(), [b, t, h, w]), &device).swap_dims(1, 2);
    let part = |from: usize, to: usize| all.clone().slice([0..b, from..to, 0..t, 0..w]);
    let (q, k, v) = (part(0, h), part(h, h + g), part(h + g, h + 2 * g));
    let index = index::<Flex>(case, &device);
    let separate = index
        .key_documents
        .clone()
        .equal_elem(attention::SEPARATE)
        .reshape([b, 1, 1, t])
        .expand([b, 1, t, t]);
    let forbidden = index.forbidden().bool_or(separate).reshape([b, 1, 1, t, t]).expand([b, g, h / g, t, t]);
    let scores = q.clone().reshape([b, g, h / g * t, w]).matmul(k.clone().swap_dims(2, 3)).reshape([
        b,
        g,
        h / g,
        t,
        t,
    ]);
    let scores = (scores / (w as f32).sqrt()).mask_fill(forbidden.clone(), -1e30);
    let peak = scores.clone().max_dim(4);
    let e = (scores - peak.clone()).exp().mask_fill(forbidden, 0.0);
    let sum = e.clone().sum_dim(4);
    let lse = peak + sum.clone().log();
    let empty = sum.clone().equal_elem(0.0);
    let lse = lse.mask_fill(empty, -1e30).reshape([b, h, t]);
    let p = (e / sum.clamp_min(1e-30)).reshape([b, g, h / g * t, t]);
    let o = p.clone().matmul(v.clone()).reshape([b, h, t, w]);
    let grad = grad.reshape([b, g, h / g * t, w]);
    let dv = p.clone().swap_dims(2, 3).matmul(grad.clone());
    let dp = grad.matmul(v.swap_dims(2, 3));
    let ds = p.clone() * (dp.clone() - (p * dp).sum_dim(3)) / (w as f32).sqrt();
    let dq = ds.clone().matmul(k).reshape([b, h, t, w]);
    let dk = ds.swap_dims(2, 3).matmul(q.reshape([b, g, h / g * t, w]));
    let rows = |x: Tensor<Flex, 4>| x.swap_dims(1, 2).into_data().to_vec().unwrap();
    [rows(o), lse.into_data().to_vec().unwrap(), rows(dq), rows(dk), rows(dv)]
}

/// Joined queries, keys and values `[b, t, h + 2 g, w]`, and the gradient of o `[b, t, h, w]`.
fn inputs(case: Case, dtype: DType) -> (Vec<f32>, Vec<f32>) {
    let Case { b, h, g, t, w, .. } = case;
    let joined = noise(b * t * (h + 2 * g) * w, 1).iter().map(|x| 2.0 * x).collect();
    (rounded(joined, dtype), rounded(noise(b * t * h * w, 2), dtype))
}

/// Compares a case on a device, in a dtype, with what plain operations give.
fn run<R: ProductRuntime>(case: Case, dtype: DType, device: &Device<R>) -> Errors {
    let (joined, grad) = inputs(case, dtype);
    let expected = expected(case, &joined, &grad);
    let found = computed::<R>(case, dtype, device, joined, grad);
    Errors([0, 1, 2, 3, 4].map(|i| {
        if i == 1 {
            let clip = |x: &[f32]| x.iter().map(|x| x.max(-50.0)).collect::<Vec<_>>();
            return greatest_error(&clip(&found[1]), &clip(&expected[1]));
        }
        greatest_error(&found[i], &expected[i])
    }))
}

/// o, lse, dq, dk and dv of a device, with q, k, v as views of one joined buffer.
fn computed<R: ProductRuntime>(
    case: Case,
    dtype: DType,
    device: &Device<R>,
    joined: Vec<f32>,
    grad: Vec<f32>,
) -> [Vec<f32>; 5] {
    let Case { b, h, g, t, w, .. } = case;
    let all = h + 2 * g;
    let upload = |values: Vec<f32>, heads: usize| {
        let data = TensorData::new(values, [b, t, heads, w]);
        Tensor::<Cube<R>, 4>::from_data(data, (device, dtype)).swap_dims(1, 2)
    };
    let (x, grad) = (upload(joined, all), upload(grad, h));
    let part = |from: usize, to: usize| primitive::<R>(x.clone().slice([0..b, from..to, 0..t, 0..w]));
    let (q, k, v) = (part(0, h), part(h, h + g), part(h + g, all));
    let index = index::<Cube<R>>(case, device);
    let index = [index.query_documents, index.query_positions, index.key_documents, index.key_positions];
    let index = device::Index::new(index.map(|x| x.into_primitive()));
    poison::<R>(b * t * h * w, dtype, device);
    poison::<R>(b * t * h, DType::F32, device);
    let (o, lse) = device::forward(q.clone(), k.clone(), v.clone(), index.clone());
    assert_eq!(o.meta.strides()[1], w);
    poison::<R>(b * t * all * w, dtype, device);
    // Forward finds its ranges itself, backward is given them.
    let gradient = device::backward(q, k, v, o.clone(), lse.clone(), primitive(grad), index.prepared());
    assert_eq!(gradient.dtype, dtype);
    let gradient = Tensor::<Cube<R>, 4>::from_primitive(burn::tensor::TensorPrimitive::Float(gradient));
    let part = |from: usize, to: usize| {
        let x = gradient.clone().slice([0..b, 0..t, from..to, 0..w]).cast(DType::F32);
        x.into_data().to_vec::<f32>().unwrap()
    };
    let o = Tensor::<Cube<R>, 4>::from_primitive(burn::tensor::TensorPrimitive::Float(o)).swap_dims(1, 2);
    let o = o.cast(DType::F32).into_data().to_vec::<f32>().unwrap();
    [o, floats::<R, 3>(lse), part(0, h), part(h, h + g), part(h + g, all)]
}

const SMALL: [Case; 9] = [
    Case { b: 2, h: 3, g: 3, t: 37, w: 20, rows: Rows::Packed(7) },
    Case { b: 1, h: 4, g: 2, t: 33, w: 6, rows: Rows::Dense },
    Case { b: 2, h: 2, g: 1, t: 16, w: 16, rows: Rows::Dense },
    Case { b: 1, h: 1, g: 1, t: 1, w: 8, rows: Rows::Dense },
    Case { b: 1, h: 2, g: 2, t: 50, w: 5, rows: Rows::Holes(9) },
    Case { b: 3, h: 2, g: 2, t: 90, w: 32, rows: Rows::Holes(35) },
    Case { b: 1, h: 2, g: 1, t: 65, w: 128, rows: Rows::Packed(35) },
    Case { b: 1, h: 1, g: 1, t: 1100, w: 8, rows: Rows::Packed(35) },
    Case { b: 1, h: 1, g: 1, t: 150, w: 64, rows: Rows::Dense },
];

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_equals_the_composition() {
    let device = burn_wgpu::WgpuDevice::default();
    if std::panic::catch_unwind(|| {
        Tensor::<Cube<cubecl::wgpu::WgpuRuntime>, 1>::zeros([1], &device).into_data()
    })
    .is_err()
    {
        println!("no wgpu adapter: nothing compared");
        return;
    }
    let mut worst = 0.0_f32;
    for case in SMALL {
        let errors = run::<cubecl::wgpu::WgpuRuntime>(case, DType::F32, &device);
        println!("{case:?}: {errors:?}");
        worst = worst.max(errors.worst());
    }
    assert!(worst < 2e-5, "{worst}");
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::time::Instant;

    use super::*;

    type Cuda = cubecl::cuda::CudaRuntime;

    /// The device, if a driver is there that knows one.
    fn device() -> Option<Device<Cuda>> {
        // Where no driver library is found, cudarc panics.
        let count = std::panic::catch_unwind(|| {
            cudarc::driver::result::init().ok()?;
            cudarc::driver::result::device::get_count().ok()
        });
        match count {
            Ok(Some(count)) if count > 0 => Some(Device::<Cuda>::default()),
            _ => {
                println!("no CUDA device: nothing compared");
                None
            }
        }
    }

    const WIDE: [Case; 12] = [
        Case { b: 2, h: 4, g: 4, t: 77, w: 128, rows: Rows::Packed(20) },
        Case { b: 2, h: 4, g: 4, t: 77, w: 128, rows: Rows::Dense },
        Case { b: 1, h: 2, g: 2, t: 1, w: 128, rows: Rows::Dense },
        Case { b: 1, h: 2, g: 2, t: 300, w: 64, rows: Rows::Packed(35) },
        Case { b: 1, h: 2, g: 1, t: 300, w: 64, rows: Rows::Dense },
        Case { b: 2, h: 8, g: 2, t: 257, w: 128, rows: Rows::Packed(100) },
        Case { b: 2, h: 2, g: 2, t: 128, w: 128, rows: Rows::Dense },
        Case { b: 3, h: 2, g: 1, t: 190, w: 128, rows: Rows::Holes(35) },
        Case { b: 1, h: 2, g: 2, t: 200, w: 64, rows: Rows::Holes(9) },
        Case { b: 1, h: 2, g: 2, t: 90, w: 72, rows: Rows::Packed(20) },
        Case { b: 1, h: 1, g: 1, t: 4096, w: 128, rows: Rows::Dense },
        Case { b: 1, h: 1, g: 1, t: 4096, w: 128, rows: Rows::Packed(35) },
    ];

    /// Rows that end before, at and behind the end of a tile.
    fn at_edges() -> impl Iterator<Item = Case> {
        let case = |t, rows| Case { b: 2, h: 4, g: 2, t, w: 128, rows };
        let short = [1, 63, 64, 65, 127, 129];
        let rows = [Rows::Dense, Rows::Packed(35), Rows::Holes(20)];
        let pairs = short.into_iter().flat_map(move |t| rows.into_iter().map(move |rows| case(t, rows)));
        pairs.chain([Case { b: 1, h: 2, ..case(2048, Rows::Packed(35)) }])
    }

    /// f16 and bf16 round q, k, v and P: errors of one rounding, relative to the greatest value.
    fn bound(dtype: DType) -> f32 {
        match dtype {
            DType::BF16 => 1.5e-2,
            DType::F16 => 2e-3,
            _ => 5e-5,
        }
    }

    #[test]
    fn cuda_equals_the_composition() {
        let Some(device) = device() else { return };
        let mut failed = vec![];
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for case in WIDE.into_iter().chain(SMALL).chain(at_edges()) {
                // For the emulator, on which long rows take minutes.
                if case.t > 1000 && std::env::var_os("SHORT_ROWS_ONLY").is_some() {
                    continue;
                }
                let errors = run::<Cuda>(case, dtype, &device);
                println!("{dtype:?} {case:?}: {errors:?}");
                if errors.worst() > bound(dtype) {
                    println!("    ABOVE {}", bound(dtype));
                    failed.push((dtype, case));
                }
            }
        }
        assert!(failed.is_empty(), "{failed:?}");
    }

    /// Whether the kernels for Hopper serve this device. On Hopper they must.
    fn has_own_kernels(device: &Device<Cuda>, dtype: DType) -> bool {
        let obstacle = attention::hopper::obstacle(device, dtype);
        let capability = Cuda::card(device).compute_capability;
        assert!(obstacle.is_none() || capability != Some(90), "{obstacle:?}");
        obstacle.is_none()
    }

    #[test]
    fn hopper_gives_the_same_bits_each_time() {
        let Some(device) = device() else { return };
        let case = Case { b: 2, h: 4, g: 2, t: 700, w: 128, rows: Rows::Packed(90) };
        for dtype in [DType::BF16, DType::F16] {
            if !has_own_kernels(&device, dtype) {
                println!("not Hopper: nothing compared");
                return;
            }
            let compute = || {
                let (joined, grad) = inputs(case, dtype);
                computed::<Cuda>(case, dtype, &device, joined, grad)
                    .map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            };
            let first = compute();
            for _ in 0..3 {
                assert!(compute() == first, "{dtype:?}");
            }
        }
    }

    #[test]
    fn hopper_hides_no_score_that_is_no_number() {
        let Some(device) = device() else { return };
        let dtype = DType::BF16;
        if !has_own_kernels(&device, dtype) {
            println!("not Hopper: nothing compared");
            return;
        }
        let (t, row) = (200, 77);
        let case = Case { b: 1, h: 1, g: 1, t, w: 128, rows: Rows::Dense };
        let (mut joined, grad) = inputs(case, dtype);
        joined[row * 3 * 128] = f32::NAN;
        let [o, lse, dq, dk, dv] = computed::<Cuda>(case, dtype, &device, joined, grad);
        // The query sees keys 0 to `row`, and nobody else sees it.
        let of =
            |x: &[f32]| x.chunks(x.len() / t).map(|row| row.iter().any(|x| x.is_nan())).collect::<Vec<_>>();
        for found in [o, lse, dq] {
            assert!(of(&found).into_iter().eq((0..t).map(|i| i == row)));
        }
        for found in [dk, dv] {
            assert!(of(&found)[..=row].iter().all(|is_nan| *is_nan));
        }
    }

    #[test]
    fn time_at_llama_7b() {
        let Some(device) = device() else { return };
        let (b, h, t, w) = (4, 32, 2048, 128);
        for (dtype, rows) in [
            (DType::BF16, Rows::Dense),
            (DType::BF16, Rows::Packed(35)),
            (DType::F16, Rows::Dense),
            (DType::F16, Rows::Packed(35)),
        ] {
            let case = Case { b, h, g: h, t, w, rows };
            // Noise for a few heads of one row, repeated: the host is slow.
            let data = TensorData::new(noise(t * 3 * h / 8 * w, 3), [1, t, 3 * h / 8, w]);
            let x = Tensor::<Cube<Cuda>, 4>::from_data(data, (&device, dtype))
                .repeat_dim(0, b)
                .repeat_dim(2, 8)
                .swap_dims(1, 2);
            let part = |from: usize| primitive::<Cuda>(x.clone().slice([0..b, from..from + h, 0..t, 0..w]));
            let (q, k, v, grad) = (part(0), part(h), part(2 * h), part(h));
            let index = index::<Cube<Cuda>>(case, &device);
            let index =
                [index.query_documents, index.query_positions, index.key_documents, index.key_positions];
            let index = device::Index::new(index.map(|x| x.into_primitive())).prepared();
            let sync = || cubecl::future::block_on(q.client.sync()).unwrap();
            let forward = || device::forward(q.clone(), k.clone(), v.clone(), index.clone());
            let (o, lse) = forward();
            let backward = || {
                let (o, lse, grad) = (o.clone(), lse.clone(), grad.clone());
                device::backward(q.clone(), k.clone(), v.clone(), o, lse, grad, index.clone())
            };
            let time = |what: &dyn Fn()| {
                (0..3).for_each(|_| what());
                sync();
                let start = Instant::now();
                (0..20).for_each(|_| what());
                sync();
                start.elapsed().as_secs_f64() * 1000.0 / 20.0
            };
            let (first, second) = (time(&|| drop(forward())), time(&|| drop(backward())));
            println!("{dtype:?} {rows:?} {b}x{h}x{t}x{w}: forward {first:.3} ms, backward {second:.3} ms");
        }
    }
}
