//! Kernels over rows against plain operations, on wgpu and, where there is one, on a CUDA device with their speed.
#![cfg(any(feature = "wgpu", feature = "cuda"))]
#![allow(clippy::single_range_in_vec_init, reason = "a slice of one dimension")]
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::backend::Autodiff;
use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Shape, Tensor, TensorData, TensorPrimitive};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use burn_flex::Flex;
use buzzer_kernels::{
    Cube, Dropout, FrozenWeight, KernelBackend, LinearPart, LoraTerm, Nf4Tensor, ProductRuntime, Spent,
    SplitGradient, dropout, qlora_linear, rms_norm, rotary, swiglu,
};
use common::{Device, noise};

const EPSILON: f64 = 1e-5;
const DROPOUT: Dropout = Dropout { probability: 0.1, key: 0xDEAD_BEEF_0123_4567 };

/// Spare columns behind rows.
const SPARE: [usize; 3] = [0, 8, 5];

/// How rows lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// One after the other, in a buffer of their own.
    Whole,
    /// As columns of wider rows, so many of which precede and follow them.
    Columns(usize),
}

/// Where and in which dtype the kernels run, and against which backend.
struct Runner<'a, R: CubeRuntime, B: Backend> {
    device: &'a Device<R>,
    dtype: DType,
    layout: Layout,
    oracle: B::Device,
    worst: f32,
}

fn host<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
    x.cast(DType::F32).into_data().to_vec().unwrap()
}

fn tensor<R: CubeRuntime, const D: usize>(x: CubeTensor<R>) -> Tensor<Cube<R>, D> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

fn primitive<R: CubeRuntime, const D: usize>(x: Tensor<Cube<R>, D>) -> CubeTensor<R> {
    x.into_primitive().tensor()
}

/// The elements of rows. Columns of wider rows are cut out on the host: Burn's kernels read a view in vectors, wherever
/// it starts.
fn read<R: CubeRuntime>(mut x: CubeTensor<R>) -> Vec<f32> {
    let (offset, dims) = (x.handle.offset_start.take().unwrap_or(0), x.meta.shape().to_vec());
    let (beside, stride) = (offset as usize / x.dtype.size(), x.meta.strides()[0]);
    if offset == 0 {
        return host(tensor::<R, 2>(x));
    }
    x.meta.shape = Shape::from(vec![dims[0], stride]);
    let wide = host(tensor::<R, 2>(x));
    wide.chunks(stride).flat_map(|row| row[beside..][..dims[1]].to_vec()).collect()
}

/// What one element may differ by, in units of which [`Runner::compare`] reports: half a unit in the last place of the
/// dtype for the rounding of the result, and some rounding errors of f32 relative to the greatest element.
fn bound(dtype: DType, expected: f32, greatest: f32) -> f32 {
    let rounding = match dtype {
        DType::BF16 => 2.0_f32.powi(-8),
        DType::F16 => 2.0_f32.powi(-11),
        _ => 2.0_f32.powi(-24),
    };
    rounding * expected.abs() + 3e-6 * (1.0 + greatest)
}

impl<R: CubeRuntime, B: Backend> Runner<'_, R, B> {
    /// Noise as the dtype holds it.
    fn values(&self, count: usize, seed: u64, scale: f32) -> Vec<f32> {
        let values = noise(count, seed).iter().map(|x| scale * x).collect::<Vec<_>>();
        let x = Tensor::<B, 1>::from_data(TensorData::new(values, [count]), (&self.oracle, DType::F32));
        host(x.cast(self.dtype).cast(DType::F32))
    }

    fn rows_as(&self, values: &[f32], dims: [usize; 2], dtype: DType) -> CubeTensor<R> {
        let [n, d] = dims;
        let beside = if let Layout::Columns(beside) = self.layout { beside } else { 0 };
        let all = d + 2 * beside;
        let mut wide = vec![f32::NAN; n * all];
        for row in 0..n {
            wide[row * all + beside..][..d].copy_from_slice(&values[row * d..][..d]);
        }
        let mut x =
            primitive(Tensor::<Cube<R>, 2>::from_data(TensorData::new(wide, [n, all]), (self.device, dtype)));
        if beside > 0 {
            x.handle = x.handle.offset_start((beside * dtype.size()) as u64);
            x.meta.shape = Shape::from(vec![n, d]);
        }
        x
    }

    fn rows(&self, values: &[f32], dims: [usize; 2]) -> CubeTensor<R> {
        self.rows_as(values, dims, self.dtype)
    }

    fn weight(&self, values: &[f32], dtype: DType) -> CubeTensor<R> {
        let data = TensorData::new(values.to_vec(), [values.len()]);
        primitive(Tensor::<Cube<R>, 1>::from_data(data, (self.device, dtype)))
    }

    /// Values on the backend that is compared with.
    fn oracle<const D: usize>(&self, values: &[f32], dims: [usize; D]) -> Tensor<B, D> {
        Tensor::from_data(TensorData::new(values.to_vec(), dims), (&self.oracle, DType::F32))
    }

    /// Hands NaN to whoever allocates buffers of this size next.
    fn poison(&self, elements: usize) {
        let tensors =
            [0, 1, 2].map(|_| Tensor::<Cube<R>, 1>::full([elements], f32::NAN, (self.device, self.dtype)));
        for x in tensors {
            let _ = x.slice([0..1]).into_data();
        }
    }

    fn compare(&mut self, what: &str, found: CubeTensor<R>, expected: &[f32], dims: [usize; 2]) {
        assert_eq!(found.meta.shape().to_vec(), dims, "{what}");
        assert_eq!(found.dtype, self.dtype, "{what}");
        let found = read(found);
        assert_eq!(found.len(), expected.len());
        let greatest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        let mut worst = (0.0_f32, 0);
        for (i, (x, y)) in found.iter().zip(expected).enumerate() {
            let error = (x - y).abs() / bound(self.dtype, *y, greatest);
            let error = if error.is_nan() { f32::INFINITY } else { error };
            if error > worst.0 {
                worst = (error, i);
            }
        }
        self.worst = self.worst.max(worst.0);
        if worst.0 > 1.0 || dims[0] * dims[1] > 1 << 20 {
            let (error, i) = worst;
            println!(
                "{what} {dims:?} {:?} {:?}: {error:.3} of the bound, {} where {} is expected at {i}",
                self.dtype, self.layout, found[i], expected[i]
            );
        }
    }

    /// [`Self::compare`] for what was computed from a sum that is rounded once more.
    fn compare_sum(&mut self, what: &str, found: CubeTensor<R>, expected: &[f32], dims: [usize; 2]) {
        let worst = std::mem::replace(&mut self.worst, 0.0);
        let rounded = self.dtype != DType::F32;
        self.compare(what, found, expected, dims);
        self.worst = worst.max(if rounded { self.worst / 8.0 } else { self.worst });
    }

    /// A gradient in one part.
    fn whole(&self, values: &[f32], dims: [usize; 2]) -> SplitGradient<R> {
        SplitGradient { base: self.rows(values, dims), low_rank: None, dropout: None }
    }

    /// A gradient in two parts, which add up to the values where the mask is passed.
    fn split(&self, values: &[f32], dims: [usize; 2], dropout: Option<Dropout>) -> SplitGradient<R> {
        let count = dims[0] * dims[1];
        let part = self.values(count, 9, 1.0);
        let passed = dropout.map_or(part.clone(), |dropout| times(&part, &dropout.factors(count)));
        let base = plus(values, &passed.iter().map(|x| -x).collect::<Vec<_>>());
        let low_rank = Some(self.rows(&part, dims));
        SplitGradient { base: self.rows(&base, dims), low_rank, dropout }
    }

    /// Runs one group of comparisons; a panic is a failure, but others follow.
    fn group(&mut self, name: &str, run: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| run(self))).is_err() {
            println!("{name} {:?} {:?}: panicked", self.dtype, self.layout);
            self.worst = f32::INFINITY;
        }
    }

    fn norm(&mut self, dims: [usize; 2], weight_dtype: DType) {
        let [n, d] = dims;
        let [x, g, r] = [(1, 2.0), (2, 1.0), (3, 1.0)].map(|(seed, scale)| self.values(n * d, seed, scale));
        let w = self.values(d, 4, 1.0);
        let input = Tensor::<Autodiff<B>, 2>::from_inner(self.oracle(&x, dims)).require_grad();
        let weight = Tensor::<Autodiff<B>, 1>::from_inner(self.oracle(&w, [d]));
        let y = rms_norm::reference(input.clone(), weight, EPSILON);
        let loss = (y.clone() * Tensor::from_inner(self.oracle(&g, dims))).sum();
        let dx = input.grad(&loss.backward()).unwrap();
        let (y, dx) = (host(y.inner()), host(dx));
        let (input, weight) = (self.rows(&x, dims), self.weight(&w, weight_dtype));
        self.poison(n * d);
        self.compare("norm", rms_norm::kernel::forward(input.clone(), weight.clone(), EPSILON), &y, dims);
        for spare in SPARE {
            self.poison(n * d);
            let (found, dropped) = rms_norm::kernel::forward_dropout(
                input.clone(),
                weight.clone(),
                EPSILON,
                Some(DROPOUT),
                spare,
            );
            self.compare("norm, with dropout", found, &y, dims);
            self.compare("dropped norm", dropped, &times(&y, &DROPOUT.factors(n * d)), dims);
        }
        let backward = |grad, residual| {
            rms_norm::kernel::backward(input.clone(), weight.clone(), EPSILON, grad, residual)
        };
        self.poison(n * d);
        self.compare("norm backward", backward(self.whole(&g, dims), None), &dx, dims);
        let residual = self.rows(&r, dims);
        self.poison(n * d);
        let found = backward(self.whole(&g, dims), Some(residual.clone()));
        self.compare("norm backward with residual", found, &plus(&dx, &r), dims);
        for dropout in [None, Some(DROPOUT)] {
            let split = self.split(&g, dims, dropout);
            self.poison(n * d);
            let found = backward(split, Some(residual.clone()));
            self.compare_sum("norm backward of two parts", found, &plus(&dx, &r), dims);
        }
    }

    fn gate(&mut self, [n, f]: [usize; 2]) {
        let [both, dims] = [[n, 2 * f], [n, f]];
        let (x, g) = (self.values(2 * n * f, 1, 6.0), self.values(n * f, 2, 1.0));
        let input = Tensor::<Autodiff<B>, 2>::from_inner(self.oracle(&x, both)).require_grad();
        let y = silu(input.clone().narrow(1, 0, f)) * input.clone().narrow(1, f, f);
        let loss = (y.clone() * Tensor::from_inner(self.oracle(&g, dims))).sum();
        let dx = host(input.grad(&loss.backward()).unwrap());
        let y = host(y.inner());
        let input = self.rows(&x, both);
        self.poison(n * f);
        self.compare("gate", swiglu::kernel::forward(input.clone()), &y, dims);
        let left = times(&y, &DROPOUT.factors(n * f));
        for spare in SPARE {
            self.poison(n * f);
            let (found, dropped) = swiglu::kernel::forward_dropout(input.clone(), Some(DROPOUT), spare);
            self.compare("gate, with dropout", found, &y, dims);
            self.compare("dropped gate", dropped, &left, dims);
        }
        self.poison(n * f);
        let found = swiglu::kernel::forward_dropped(input.clone(), Some(DROPOUT));
        self.compare("dropped gate alone", found, &left, dims);
        for dropout in [None, Some(DROPOUT)] {
            let split = self.split(&g, dims, dropout);
            self.poison(2 * n * f);
            let found = swiglu::kernel::backward(input.clone(), split);
            self.compare_sum("gate backward of two parts", found, &dx, both);
        }
        let grad = self.whole(&g, dims);
        self.poison(2 * n * f);
        self.compare("gate backward", swiglu::kernel::backward(input, grad), &dx, both);
    }

    fn turn(&mut self, n: usize, heads: usize, k: usize, rest: usize) {
        let dims = [n, heads * k + rest];
        let x = self.values(n * dims[1], 1, 2.0);
        let angles = noise(n * k / 2, 2).iter().map(|x| 3.0 * x).collect::<Vec<_>>();
        let [cos, sin] = [f32::cos, f32::sin].map(|of| angles.iter().map(|x| of(*x)).collect::<Vec<_>>());
        for inverse in [false, true] {
            let expected = self.turned(&x, [&cos, &sin], [n, heads, k, rest], inverse);
            let [c, s] = [&cos, &sin].map(|x| self.rows_as(x, [n, k / 2], DType::F32));
            let shared = self.rows(&x, dims);
            self.poison(n * dims[1]);
            let found = rotary::kernel::apply(shared.clone(), c.clone(), s.clone(), heads, k, inverse);
            self.compare("turned", found, &expected, dims);
            self.compare("rows that others hold", shared, &x, dims);
            let own = self.rows(&x, dims);
            assert!(own.can_mut());
            let found = rotary::kernel::apply(own, c, s, heads, k, inverse);
            self.compare("turned in place", found, &expected, dims);
        }
    }

    fn turned(
        &self,
        x: &[f32],
        [cos, sin]: [&Vec<f32>; 2],
        [n, heads, k, rest]: [usize; 4],
        back: bool,
    ) -> Vec<f32> {
        let half = k / 2;
        let rows = self.oracle(x, [n, heads * k + rest]);
        let [cos, sin] = [cos, sin].map(|x| self.oracle(x, [n, 1, half]));
        let sin = if back { sin.neg() } else { sin };
        let turned = rows.clone().narrow(1, 0, heads * k).reshape([n, heads, k]);
        let (a, b) = (turned.clone().narrow(2, 0, half), turned.narrow(2, half, half));
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let turned = Tensor::cat(vec![first, b * cos + a * sin], 2).reshape([n, heads * k]);
        if rest == 0 {
            return host(turned);
        }
        host(Tensor::cat(vec![turned, rows.narrow(1, heads * k, rest)], 1))
    }

    fn drop(&mut self, dims: [usize; 2]) {
        let [n, d] = dims;
        let (x, base) = (self.values(n * d, 1, 2.0), self.values(n * d, 2, 2.0));
        let dropped = times(&x, &DROPOUT.factors(n * d));
        let input = self.rows(&x, dims);
        self.poison(n * d);
        let found = dropout::kernel::apply(input.clone(), DROPOUT);
        assert!(found.is_contiguous());
        self.compare("dropped", found, &dropped, dims);
        let nothing = Dropout { probability: 0.0, key: 1 };
        self.compare("nothing dropped", dropout::kernel::apply(input.clone(), nothing), &x, dims);
        for (dropout, expected) in [(Some(DROPOUT), &dropped), (Some(nothing), &x), (None, &x)] {
            let sum = plus(&base, expected);
            let shared = self.rows(&base, dims);
            self.poison(n * d);
            let found = dropout::kernel::add(shared.clone(), input.clone(), dropout);
            self.compare("sum", found, &sum, dims);
            self.compare("base that others hold", shared, &base, dims);
            let own = self.rows(&base, dims);
            let found = dropout::kernel::add(own, input.clone(), dropout);
            self.compare("sum in place", found, &sum, dims);
        }
    }
}

/// Layers that share an input of width `inner`: one with packed weights, one with dense ones, one without correction.
struct Layers {
    inner: usize,
    outs: [usize; 3],
    rank: usize,
}

impl Layers {
    fn parts<C: KernelBackend>(&self, count: usize, device: &C::Device) -> Vec<LinearPart<C>> {
        let matrix = |dims: [usize; 2], seed| {
            let values = noise(dims[0] * dims[1], seed);
            Tensor::<C, 2>::from_data(TensorData::new(values, dims), (device, DType::F32))
        };
        let part = |place: usize| {
            let (dims, seed) = ([self.outs[place], self.inner], 10 * place as u64);
            let weight = match place {
                1 => FrozenWeight::Dense(matrix(dims, seed)),
                _ => {
                    let values = noise(dims[0] * dims[1], seed);
                    FrozenWeight::Nf4(Nf4Tensor::quantize(&values, dims, place == 0, device))
                }
            };
            let lora = (place != 2 && self.rank > 0).then(|| LoraTerm {
                a: matrix([self.rank, self.inner], seed + 1),
                b: matrix([dims[0], self.rank], seed + 2),
                scale: 0.7,
            });
            LinearPart { weight, lora }
        };
        (0..count).map(part).collect()
    }
}

impl<R: ProductRuntime> Runner<'_, R, Flex> {
    /// Results and gradients of layers against plain operations in f32, relative to the greatest element of each.
    fn layers(&mut self, n: usize, layers: &Layers, count: usize, dropout: Option<Dropout>) {
        let (inner, rank) = (layers.inner, layers.rank * count.min(2));
        let out = layers.outs[..count].iter().sum::<usize>();
        let one = self.weight(&vec![1.0; inner], DType::F32);
        let rows = |values: Vec<f32>, width| tensor::<R, 2>(self.rows(&values, [n, width]));
        let x = rows(self.values(n * inner, 1, 1.0), inner);
        let grad = rows(self.values(n * out, 2, 1.0), out);
        let residual = rows(self.values(n * out, 3, 1.0), out);
        let oracle = self.oracle;
        let on_host = |x: &Tensor<Cube<R>, 2>, width| {
            let values = read(x.clone().into_primitive().tensor());
            Tensor::<Flex, 2>::from_data(TensorData::new(values, [n, width]), &oracle)
        };
        for spare in [0, rank] {
            let (x, dropped) =
                Cube::<R>::rms_norm_dropout(x.clone(), tensor(one.clone()), EPSILON, dropout, spare);
            let parts = layers.parts::<Cube<R>>(count, self.device);
            let host_parts = layers.parts::<Flex>(count, &self.oracle);
            let host_input = qlora_linear::Input {
                x: on_host(&x.rows(), inner).into(),
                dropped: on_host(&dropped, inner),
                residual: Some(on_host(&residual, out)),
            };
            let host_dropped = host_input.dropped.clone();
            let expected = qlora_linear::reference(host_input, &host_parts).y;
            self.poison(n * out);
            let input = qlora_linear::Input { x, dropped: dropped.clone(), residual: Some(residual.clone()) };
            let found = Cube::<R>::qlora_project(input, &parts);
            let mut pairs = vec![("y".to_string(), found.y, expected)];
            let upstream = qlora_linear::Upstream { grad: on_host(&grad, out), u: None, with_x: true };
            let expected = qlora_linear::backward(host_dropped, &host_parts, dropout, upstream);
            self.poison(n * inner);
            let mut spent = Spent::default();
            spent.offer(Tensor::full([64, spare.max(1)], f32::NAN, (self.device, self.dtype)));
            let upstream = qlora_linear::Upstream { grad: grad.clone(), u: found.u, with_x: true };
            let found =
                Cube::<R>::qlora_linear_backward(dropped.clone(), &parts, dropout, upstream, &mut spent);
            pairs.push(("dx".into(), found.x.unwrap().sum(), expected.x.unwrap().sum()));
            for (place, (found, expected)) in found.factors.into_iter().zip(expected.factors).enumerate() {
                let names = ["dA", "dB"].map(|name| format!("{name} {place}"));
                let both = names.into_iter().zip(found).zip(expected);
                pairs.extend(both.map(|((name, found), expected)| (name, found, expected)));
            }
            for (name, found, expected) in pairs {
                let name = format!("{name} of [{n}, {inner}] to {out}, {rank} and {spare} columns");
                self.near(&name, &host(found), &host(expected));
            }
        }
    }

    fn near(&mut self, what: &str, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let greatest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        let relative = match self.dtype {
            DType::F32 => 1e-5,
            DType::F16 => 4e-3,
            _ => 3e-2,
        };
        let far = |(x, y): (&f32, &f32)| {
            let error = (x - y).abs() / (relative * greatest);
            if error.is_nan() { f32::INFINITY } else { error }
        };
        let worst = found.iter().zip(expected).map(far).fold(0.0_f32, f32::max);
        self.worst = self.worst.max(worst);
        if worst > 1.0 {
            println!("{what} {:?} {:?}: {worst:.3} of the bound", self.dtype, self.layout);
        }
    }

    fn all_layers(&mut self) {
        for (n, inner, outs, rank) in [
            (5, 64, [64, 32, 16], 8),
            (1, 33, [7, 9, 5], 3),
            (70, 96, [48, 16, 24], 4),
            (9, 128, [130, 8, 8], 0),
        ] {
            for dropout in [None, Some(DROPOUT)] {
                for count in [1, 3] {
                    let layers = Layers { inner, outs, rank };
                    self.group("layers", |runner| runner.layers(n, &layers, count, dropout));
                }
            }
        }
    }
}

fn times(x: &[f32], y: &[f32]) -> Vec<f32> {
    x.iter().zip(y).map(|(x, y)| x * y).collect()
}

fn plus(x: &[f32], y: &[f32]) -> Vec<f32> {
    x.iter().zip(y).map(|(x, y)| x + y).collect()
}

/// Rows and widths: single, odd, narrower and wider than a cube, and of every vector width.
const SMALL: [[usize; 2]; 11] = [
    [1, 1],
    [1, 7],
    [3, 5],
    [5, 64],
    [7, 130],
    [2, 4096],
    [3, 2053],
    [9, 1000],
    [70, 12],
    [1, 5120],
    [300, 3],
];

fn small<R: CubeRuntime, B: Backend>(runner: &mut Runner<R, B>, weights: &[DType]) {
    for dims in SMALL {
        for weight in weights {
            runner.group("norm", |runner| runner.norm(dims, *weight));
        }
        runner.group("gate", |runner| runner.gate(dims));
        runner.group("dropout", |runner| runner.drop(dims));
    }
    for [n, heads, k, rest] in [
        [1, 1, 2, 0],
        [3, 2, 6, 6],
        [5, 3, 20, 7],
        [7, 4, 64, 128],
        [2, 64, 128, 4096],
        [9, 5, 8, 4],
        [1, 1, 4, 1],
    ] {
        runner.group("rotary", |runner| runner.turn(n, heads, k, rest));
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_equals_plain_operations() {
    use cubecl::wgpu::WgpuRuntime;
    let device = burn_wgpu::WgpuDevice::default();
    if catch_unwind(|| Tensor::<Cube<WgpuRuntime>, 1>::zeros([1], &device).into_data()).is_err() {
        println!("no wgpu adapter: nothing compared");
        return;
    }
    for layout in [Layout::Whole, Layout::Columns(64)] {
        let mut runner = Runner::<WgpuRuntime, Flex> {
            device: &device,
            dtype: DType::F32,
            layout,
            oracle: Default::default(),
            worst: 0.0,
        };
        small(&mut runner, &[DType::F32]);
        runner.all_layers();
        println!("{layout:?}: at most {:.3} of the bound", runner.worst);
        assert!(runner.worst <= 1.0);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::time::Instant;

    use cubecl::cuda::CudaRuntime as Cuda;

    use super::*;

    /// The device, if a driver is there that knows one.
    fn device() -> Option<Device<Cuda>> {
        // SAFETY: only asks whether the driver's library can be opened.
        let there = unsafe { cudarc::driver::sys::is_culib_present() };
        let count = there.then(cudarc::driver::CudaContext::device_count).and_then(Result::ok);
        if count.is_none_or(|count| count == 0) {
            println!("no CUDA device: nothing compared");
            return None;
        }
        Some(Device::<Cuda>::default())
    }

    #[test]
    fn cuda_equals_plain_operations() {
        let Some(device) = device() else { return };
        let mut worst = 0.0_f32;
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for layout in [Layout::Whole, Layout::Columns(64), Layout::Columns(4), Layout::Columns(1)] {
                let (device, oracle) = (&device, Default::default());
                let mut runner = Runner::<Cuda, Flex> { device, dtype, layout, oracle, worst: 0.0 };
                small(&mut runner, &[DType::F32, dtype]);
                runner.all_layers();
                println!("{dtype:?} {layout:?}: at most {:.3} of the bound", runner.worst);
                worst = worst.max(runner.worst);
            }
            let (device, layout, oracle) = (&device, Layout::Whole, device.clone());
            let mut runner = Runner::<Cuda, Cube<Cuda>> { device, dtype, layout, oracle, worst: 0.0 };
            runner.group("norm", |runner| runner.norm([8192, 4096], DType::F32));
            runner.group("gate", |runner| runner.gate([4096, 11_008]));
            runner.group("dropout", |runner| runner.drop([8192, 4096]));
            runner.group("rotary", |runner| runner.turn(4096, 64, 128, 4096));
            println!("{dtype:?} at full size: at most {:.3} of the bound", runner.worst);
            worst = worst.max(runner.worst);
        }
        assert!(worst <= 1.0, "{worst} of the bound");
    }

    /// Prints the median of 20 measurements of 10 runs each.
    fn time(device: &Device<Cuda>, what: &str, bytes: usize, mut run: impl FnMut()) {
        let mut times = vec![];
        for _ in 0..21 {
            Cube::<Cuda>::sync(device).unwrap();
            let start = Instant::now();
            for _ in 0..10 {
                run();
            }
            Cube::<Cuda>::sync(device).unwrap();
            times.push(start.elapsed().as_secs_f64() / 10.0);
        }
        // The first compiles.
        times.remove(0);
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        println!("{what:32} {:8.1} us {:8.0} GB/s", median * 1e6, bytes as f64 / median * 1e-9);
    }

    fn full(device: &Device<Cuda>, dims: [usize; 2], dtype: DType) -> CubeTensor<Cuda> {
        let x = Tensor::<Cube<Cuda>, 2>::random(dims, burn::tensor::Distribution::Default, (device, dtype));
        primitive(x)
    }

    #[test]
    fn time_at_llama_7b() {
        let Some(device) = device() else { return };
        for dtype in [DType::BF16, DType::F32] {
            println!("{dtype:?}");
            time_norm_and_dropout(&device, dtype);
            time_gate_and_rotary(&device, dtype);
        }
    }

    fn time_norm_and_dropout(device: &Device<Cuda>, dtype: DType) {
        let [n, d] = [8192, 4096];
        let unit = n * d * dtype.size();
        let [x, g, r] = [0; 3].map(|_| full(device, [n, d], dtype));
        let w = primitive(Tensor::<Cube<Cuda>, 1>::ones([d], (device, DType::F32)));
        time(device, "copy", 2 * unit, || drop(x.clone().copy()));
        let norm = || rms_norm::kernel::forward(x.clone(), w.clone(), EPSILON);
        time(device, "norm", 2 * unit, || drop(norm()));
        let norm = || rms_norm::kernel::forward_dropout(x.clone(), w.clone(), EPSILON, Some(DROPOUT), 192);
        time(device, "norm with dropout", 3 * unit, || drop(norm()));
        let split = |low_rank: Option<&CubeTensor<Cuda>>| SplitGradient {
            base: g.clone(),
            low_rank: low_rank.cloned(),
            dropout: low_rank.map(|_| DROPOUT),
        };
        let back = |r| rms_norm::kernel::backward(x.clone(), w.clone(), EPSILON, split(None), r);
        time(device, "norm backward", 3 * unit, || drop(back(None)));
        time(device, "norm backward with residual", 4 * unit, || drop(back(Some(r.clone()))));
        let back =
            || rms_norm::kernel::backward(x.clone(), w.clone(), EPSILON, split(Some(&x)), Some(r.clone()));
        time(device, "norm backward of two parts", 5 * unit, || drop(back()));
        time(device, "dropout", 2 * unit, || drop(dropout::kernel::apply(x.clone(), DROPOUT)));
        time(device, "add", 3 * unit, || drop(dropout::kernel::add(g.clone(), x.clone(), None)));
        for (what, dropout) in [("add in place", None), ("add dropped in place", Some(DROPOUT))] {
            let mut base = Some(full(device, [n, d], dtype));
            time(device, what, 3 * unit, || {
                base = base.take().map(|base| dropout::kernel::add(base, x.clone(), dropout));
            });
        }
    }

    fn time_gate_and_rotary(device: &Device<Cuda>, dtype: DType) {
        let [n, f, k] = [8192, 11_008, 128];
        let unit = n * f * dtype.size();
        let x = full(device, [n, 2 * f], dtype);
        let g = full(device, [n, f], dtype);
        time(device, "gate", 3 * unit, || drop(swiglu::kernel::forward(x.clone())));
        let gate = || swiglu::kernel::forward_dropout(x.clone(), Some(DROPOUT), 64);
        time(device, "gate with dropout", 4 * unit, || drop(gate()));
        let dropped = || swiglu::kernel::forward_dropped(x.clone(), Some(DROPOUT));
        time(device, "dropped gate", 3 * unit, || drop(dropped()));
        let whole = SplitGradient { base: g.clone(), low_rank: None, dropout: None };
        time(device, "gate backward", 5 * unit, || drop(swiglu::kernel::backward(x.clone(), whole.clone())));
        let split = SplitGradient { low_rank: Some(g), dropout: Some(DROPOUT), ..whole };
        let back = || swiglu::kernel::backward(x.clone(), split.clone());
        time(device, "gate backward of two parts", 6 * unit, || drop(back()));
        let [cos, sin] = [0; 2].map(|_| full(device, [n, k / 2], DType::F32));
        let turned = n * 64 * k * dtype.size();
        let rows = full(device, [n, 96 * k], dtype);
        let turn = |rows| rotary::kernel::apply(rows, cos.clone(), sin.clone(), 64, k, false);
        time(device, "rotary", 3 * turned, || drop(turn(rows.clone())));
        let mut rows = Some(rows);
        time(device, "rotary in place", 2 * turned, || rows = rows.take().map(turn));
    }
}
