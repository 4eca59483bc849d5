//! Kernels of weights, losses and optimizers against plain operations, on wgpu and, where there is one, on a CUDA device
//! with their speed.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]
#![allow(clippy::single_range_in_vec_init, reason = "a slice of one dimension")]
#![cfg(any(feature = "wgpu", feature = "cuda"))]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Int, Shape, Tensor, TensorData, TensorPrimitive};
use burn_cubecl::tensor::CubeTensor;
use burn_flex::Flex;
use buzzer_kernels::adamw::{self, AdamW, AdamWState, AdamWState8};
use buzzer_kernels::nf4::{self, Nf4Tensor};
use buzzer_kernels::{Cube, IGNORED, KernelBackend, ProductRuntime, cross_entropy};
use common::{Device, noise};

/// Rounded through the dtype and back.
fn rounded(values: &[f32], dtype: DType) -> Vec<f32> {
    let x = Tensor::<Flex, 1>::from_floats(values, &Default::default());
    x.cast(dtype).cast(DType::F32).into_data().to_vec().unwrap()
}

/// Where the kernels run, and what failed.
struct Runner<'a, R: ProductRuntime> {
    device: &'a Device<R>,
    dtype: DType,
    failed: Vec<String>,
}

impl<R: ProductRuntime> Runner<'_, R> {
    fn upload<const D: usize>(&self, values: &[f32], dims: [usize; D], dtype: DType) -> CubeTensor<R> {
        let data = TensorData::new(values.to_vec(), dims);
        Tensor::<Cube<R>, D>::from_data(data, (self.device, dtype)).into_primitive().tensor()
    }

    /// The same without gaps between rows, which `upload` leaves on CUDA where their length is no power of two.
    fn upload_dense(&self, values: &[f32], dims: [usize; 2], dtype: DType) -> CubeTensor<R> {
        let data = TensorData::new(values.to_vec(), [values.len()]);
        let flat = Tensor::<Cube<R>, 1>::from_data(data, (self.device, dtype));
        flat.reshape(dims).into_primitive().tensor()
    }

    /// Rows inside wider rows of NaN: `before` columns precede them and `after` follow.
    fn view(
        &self,
        values: &[f32],
        [n, d]: [usize; 2],
        before: usize,
        after: usize,
        dtype: DType,
    ) -> CubeTensor<R> {
        let all = before + d + after;
        let mut wide = vec![f32::NAN; n * all];
        for row in 0..n {
            wide[row * all + before..][..d].copy_from_slice(&values[row * d..][..d]);
        }
        let mut x = self.upload_dense(&wide, [n, all], dtype);
        if before > 0 {
            x.handle = x.handle.offset_start((before * dtype.size()) as u64);
        }
        x.meta.shape = Shape::from(vec![n, d]);
        x
    }

    fn download<const D: usize>(&self, x: CubeTensor<R>) -> Vec<f32> {
        let x = Tensor::<Cube<R>, D>::from_primitive(TensorPrimitive::Float(x));
        x.cast(DType::F32).into_data().to_vec().unwrap()
    }

    /// Hands NaN to whoever allocates buffers of so many bytes next.
    fn poison(&self, bytes: usize) {
        let count = bytes.div_ceil(4).max(1);
        let tensors =
            [0, 1, 2].map(|_| Tensor::<Cube<R>, 1>::full([count], f32::NAN, (self.device, DType::F32)));
        for x in tensors {
            let _ = x.slice([0..1]).into_data();
        }
    }

    /// Notes a difference in bits.
    fn same_bits(&mut self, what: String, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
        let wrong = found.iter().zip(expected).filter(|pair| differs(*pair)).count();
        if wrong > 0 {
            let i = found.iter().zip(expected).position(differs).unwrap();
            let line = format!("{what}: {wrong} differ, first {} where {} at {i}", found[i], expected[i]);
            println!("WRONG {line}");
            self.failed.push(line);
        }
    }

    /// Notes an error above a bound, which grows with the expected value.
    fn near(&mut self, what: String, found: &[f32], expected: &[f32], absolute: f32, relative: f32) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let mut worst = (0.0_f32, 0);
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            let error = if a == b { 0.0 } else { (a - b).abs() / (absolute + relative * b.abs()) };
            let error = if error.is_nan() { f32::INFINITY } else { error };
            if error > worst.0 {
                worst = (error, i);
            }
        }
        let (error, i) = worst;
        if error > 1.0 {
            let line = format!("{what}: {error:.3} of the bound, {} where {} at {i}", found[i], expected[i]);
            println!("WRONG {line}");
            self.failed.push(line);
        }
    }

    /// Runs one case; a panic is a failure, but others follow.
    fn case(&mut self, name: String, run: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| run(self))).is_err() {
            println!("WRONG {name}: panicked");
            self.failed.push(name);
        }
    }

    fn finish(self) {
        assert!(self.failed.is_empty(), "{} failed, first: {}", self.failed.len(), self.failed[0]);
    }

    /// Values of a weight whose scales differ from block to block, some of them 0 and some subnormal.
    fn weight(count: usize, seed: u64) -> Vec<f32> {
        let scale = |i: usize| match i / 64 % 7 {
            3 => 0.0,
            5 => 3e-38,
            k => 0.01 + k as f32 * 0.3,
        };
        noise(count, seed).iter().enumerate().map(|(i, x)| x * scale(i)).collect()
    }

    fn dequantize(&mut self, dims: [usize; 2], double: bool) {
        let [n, d] = dims;
        let mut values = Self::weight(n * d, 7);
        if double {
            values.iter_mut().for_each(|x| *x += 0.003);
        }
        let weight = Nf4Tensor::<Cube<R>>::quantize(&values, dims, double, self.device);
        let mut expected = vec![0.0; n * d];
        nf4::dequantize(&weight.host_codes(), &weight.host_absmax(), &mut expected);
        let expected = rounded(&expected, self.dtype);
        let (codes, scales) = weight.device_parts();
        for (before, after) in [(0, 0), (64, 0), (256, 8), (64, 3)] {
            let out = self.view(&vec![f32::NAN; n * d], dims, before, after, self.dtype);
            nf4::kernel::dequantize(codes.clone(), scales.clone(), out.clone());
            let what = format!("dequantize {dims:?} {:?} double {double} in {before}+{after}", self.dtype);
            // What lies beside the rows has to stay.
            let mut whole = out.clone();
            let all = before + d + after;
            whole.handle.offset_start = None;
            whole.meta.shape = Shape::from(vec![n, all]);
            whole.meta.strides = cubecl::zspace::strides![all, 1];
            let whole = self.download::<2>(whole);
            let mut wide = vec![f32::NAN; n * all];
            for row in 0..n {
                wide[row * all + before..][..d].copy_from_slice(&expected[row * d..][..d]);
            }
            self.same_bits(what, &whole, &wide);
        }
    }

    fn quantize(&mut self, dims: [usize; 2], double: bool) {
        let [n, d] = dims;
        let mut values = rounded(&Self::weight(n * d, 11), self.dtype);
        if n * d > 200 {
            values[130..190].fill(f32::NAN);
            values[70] = f32::INFINITY;
        }
        let host = Nf4Tensor::<Flex>::quantize(&values, dims, double, &Default::default());
        for (before, after) in [(0, 0), (64, 3)] {
            let dense = self.view(&values, dims, before, after, self.dtype);
            self.poison(n * d / 2);
            self.poison(n * d / 16);
            let found = nf4::kernel::quantize(dense, double);
            let what = format!("quantize {dims:?} {:?} double {double} in {before}+{after}", self.dtype);
            self.same_bits(format!("scales, {what}"), &found.host_absmax(), &host.host_absmax());
            let words = |codes: Vec<u8>| codes.iter().map(|x| f32::from(*x)).collect::<Vec<_>>();
            self.same_bits(what.clone(), &words(found.host_codes()), &words(host.host_codes()));
            let same = Nf4Tensor::<Cube<R>>::quantize(&values, dims, double, self.device);
            let [found, same] = [found, same].map(|weight| {
                let words = Tensor::<Cube<R>, 1, Int>::from_primitive(weight.device_parts().0);
                words.into_data().iter::<i32>().flat_map(i32::to_le_bytes).collect::<Vec<_>>()
            });
            self.same_bits(format!("whole words, {what}"), &words(found), &words(same));
        }
    }
    /// Double quantization of so many scales.
    fn scales(&mut self, count: usize) {
        let mut absmax: Vec<f32> = noise(count, 8).iter().map(|x: &f32| 0.02 + 0.01 * x * x).collect();
        absmax[count / 2] = 0.0;
        let expected = nf4::double_quantize(&absmax);
        let packed = nf4::Nf4Host { codes: vec![0; 32 * count], absmax };
        let weight = Nf4Tensor::<Cube<R>>::from_parts(packed, [count, nf4::BLOCK], self.device).unwrap();
        self.poison(count);
        let found = weight.with_quantized_scales().host_double().unwrap();
        let parts = |scales: nf4::DoubleQuant| {
            let codes = scales.codes.into_iter().map(f32::from);
            codes.chain(scales.nested_absmax).chain([scales.offset]).collect::<Vec<_>>()
        };
        self.same_bits(format!("{count} scales"), &parts(found), &parts(expected));
    }

    /// Values that go to the device one after the other, into memory that those before them may still be read from.
    fn runs(&mut self, counts: &[usize]) {
        let values = |(seed, &count): (usize, &usize)| rounded(&noise(count, seed as u64), self.dtype);
        let written: Vec<Vec<f32>> = counts.iter().enumerate().map(values).collect();
        let doubled = |values: &Vec<f32>| {
            let data = TensorData::new(values.clone(), [values.len()]).convert_dtype(self.dtype);
            let fill = &mut |out: &mut [u8]| out.copy_from_slice(data.as_bytes());
            Cube::<R>::upload(self.device, self.dtype, values.len(), fill).mul_scalar(2.0)
        };
        let found: Vec<_> = written.iter().map(doubled).collect();
        for (found, written) in found.into_iter().zip(&written) {
            let expected: Vec<f32> = written.iter().map(|value| 2.0 * value).collect();
            let found = self.download::<2>(found.into_primitive().tensor());
            self.same_bits(format!("{} values", written.len()), &found, &expected);
        }
    }

    fn ints(&self, values: &[i32]) -> CubeTensor<R> {
        let data = TensorData::new(values.to_vec(), [values.len()]);
        Tensor::<Cube<R>, 1, Int>::from_data(data, (self.device, DType::I32)).into_primitive()
    }

    /// Losses, with and without the gradient in some dtype, over rows that are views, and in place.
    fn cross_entropy(&mut self, dims: [usize; 2], gradient_dtype: DType) {
        let [n, v] = dims;
        let mut logits = noise(n * v, 3).iter().map(|x| 12.0 * x).collect::<Vec<_>>();
        // A row that rises, so that every unit rescales its sum, and a row with a peak.
        logits[..v].sort_by(f32::total_cmp);
        logits[(n - 1) * v + v / 2] = 60.0;
        let logits = rounded(&logits, self.dtype);
        let targets =
            (0..n).map(|i| if i % 5 == 3 { IGNORED } else { (i * 7919 % v) as i32 }).collect::<Vec<_>>();
        let scale = 0.37;
        let (losses, d) = softmax_losses(&logits, &targets, dims, scale);
        if v <= 300 {
            self.reference_agrees(&logits, &targets, dims, &losses, &d, scale);
        }
        // Half a unit in the last place of the result's dtype, and rounding errors of f32.
        let rounding = rounding(gradient_dtype);
        let device_targets = self.ints(&targets);
        for (before, after) in [(0, 0), (64, 0), (256, 3)] {
            let what = format!("{dims:?} {:?} to {gradient_dtype:?} in {before}+{after}", self.dtype);
            let x = self.view(&logits, dims, before, after, self.dtype);
            self.poison(4 * n);
            let found = cross_entropy::kernel::losses(x.clone(), device_targets.clone());
            let found = self.download::<1>(found);
            self.near(format!("losses {what}"), &found, &losses, 2e-6, 1e-6);
            self.poison(4 * n);
            self.poison(n * v * gradient_dtype.size());
            let (found, gradient) =
                cross_entropy::kernel::rows(x.clone(), device_targets.clone(), scale, gradient_dtype);
            assert_eq!(gradient.dtype, gradient_dtype);
            let found = self.download::<1>(found);
            self.near(format!("losses beside gradient {what}"), &found, &losses, 2e-6, 1e-6);
            let gradient = self.download::<2>(gradient);
            self.near(format!("gradient {what}"), &gradient, &d, 1e-7, 1e-5 + rounding);
            let still = self.download::<2>(x);
            self.same_bits(format!("logits that others hold {what}"), &still, &logits);
        }
        let own = self.upload(&logits, dims, self.dtype);
        assert!(own.can_mut());
        let (found, gradient) = cross_entropy::kernel::rows(own, device_targets, scale, gradient_dtype);
        let what = format!("{dims:?} {:?} to {gradient_dtype:?} in place", self.dtype);
        let (found, gradient) = (self.download::<1>(found), self.download::<2>(gradient));
        self.near(format!("losses {what}"), &found, &losses, 2e-6, 1e-6);
        self.near(format!("gradient {what}"), &gradient, &d, 1e-7, 1e-5 + rounding);
    }

    /// Loss and both gradients from hidden states, over more rows than a chunk has, against the reference.
    fn cross_entropy_of_hidden(&mut self, [n, d, v]: [usize; 3]) {
        let (x, head) = (rounded(&noise(n * d, 5), self.dtype), rounded(&noise(v * d, 6), self.dtype));
        let targets =
            (0..n).map(|i| if i % 7 == 2 { IGNORED } else { (i * 7919 % v) as i32 }).collect::<Vec<_>>();
        let device = Default::default();
        let host = |values: &[f32], dims| {
            Tensor::<Flex, 2>::from_data(TensorData::new(values.to_vec(), dims), &device)
        };
        let line = Tensor::<Flex, 1, Int>::from_data(TensorData::new(targets.clone(), [n]), &device);
        let expected =
            Flex::cross_entropy_with_gradient(host(&x, [n, d]), host(&head, [v, d]), line, 0.25, true);
        let tensor2 = |values: &[f32], dims| {
            let data = TensorData::new(values.to_vec(), dims);
            Tensor::<Cube<R>, 2>::from_data(data, (self.device, DType::F32)).cast(self.dtype)
        };
        let line =
            Tensor::<Cube<R>, 1, Int>::from_data(TensorData::new(targets, [n]), (self.device, DType::I32));
        let (hidden, weight) = (tensor2(&x, [n, d]), tensor2(&head, [v, d]));
        let without =
            Cube::<R>::cross_entropy_with_gradient(hidden.clone(), weight.clone(), line.clone(), 0.25, false);
        assert!(without.head.is_none());
        let found = Cube::<R>::cross_entropy_with_gradient(hidden, weight, line, 0.25, true);
        let what = format!("[{n}, {d}] to {v} {:?}", self.dtype);
        let values = |data: TensorData| data.iter::<f32>().collect::<Vec<_>>();
        let [sum, expected_sum] = [found.loss_sum.into_data(), expected.loss_sum.into_data()].map(values);
        self.near(format!("sum of losses {what}"), &sum, &expected_sum, 0.0, 1e-4);
        // Gradients of logits are rounded before they are multiplied.
        let rounding = 2.0 * rounding(self.dtype);
        let [x, expected_x] = [found.hidden.into_data(), expected.hidden.into_data()].map(values);
        self.near(
            format!("gradient of hidden states {what}"),
            &x,
            &expected_x,
            1e-5 + rounding,
            1e-4 + rounding,
        );
        let head = found.head.expect("it was asked for");
        assert_eq!(head.dtype(), DType::F32);
        let [head, expected_head] =
            [head.into_data(), expected.head.expect("the same").into_data()].map(values);
        self.near(
            format!("gradient of the head {what}"),
            &head,
            &expected_head,
            1e-5 + rounding,
            1e-4 + rounding,
        );
    }

    /// The oracle of this test against the crate's reference, with an identity for the head.
    fn reference_agrees(
        &mut self,
        logits: &[f32],
        targets: &[i32],
        [n, v]: [usize; 2],
        losses: &[f32],
        d: &[f32],
        scale: f32,
    ) {
        let device = Default::default();
        let x = Tensor::<Flex, 2>::from_data(TensorData::new(logits.to_vec(), [n, v]), &device);
        let targets = Tensor::<Flex, 1, Int>::from_data(TensorData::new(targets.to_vec(), [n]), &device);
        let eye = Tensor::<Flex, 2>::eye(v, &device);
        let found = Flex::cross_entropy(x.clone(), eye.clone(), targets.clone());
        let found = found.into_data().to_vec::<f32>().unwrap();
        self.near(format!("reference's losses [{n}, {v}]"), &found, losses, 1e-5, 1e-6);
        let found = Flex::cross_entropy_with_gradient(x, eye, targets, scale.into(), false).hidden;
        let found = found.into_data().to_vec::<f32>().unwrap();
        self.near(format!("reference's gradient [{n}, {v}]"), &found, d, 1e-6, 1e-5);
    }

    fn adamw(&mut self, dims: [usize; 2]) {
        let count = dims[0] * dims[1];
        let settings = settings(7);
        let [p, g, m, v] = [1, 2, 3, 4].map(|seed| noise(count, seed));
        let (g, v) = (rounded(&g, self.dtype), v.iter().map(|x| 0.1 * x * x).collect::<Vec<_>>());
        let scale = 0.25_f32;
        let device = Default::default();
        let flex = |x: &[f32]| Tensor::<Flex, 2>::from_data(TensorData::new(x.to_vec(), dims), &device);
        let state = AdamWState { first: flex(&m), second: flex(&v) };
        let (expected, state) = adamw::reference(flex(&p), flex(&g).mul_scalar(scale), state, &settings);
        let [parameter, first, second] = [&p, &m, &v].map(|x| self.upload_dense(x, dims, DType::F32));
        let gradient = self.view(&g, dims, 64, 5, self.dtype);
        adamw::kernel::step(parameter.clone(), gradient, first.clone(), second.clone(), &settings, scale);
        for (name, found, expected) in [
            ("parameter", parameter, expected),
            ("first", first, state.first),
            ("second", second, state.second),
        ] {
            let (found, expected) =
                (self.download::<2>(found), expected.into_data().to_vec::<f32>().unwrap());
            // Three roundings of numbers up to 1 here, and three in the reference.
            self.near(format!("AdamW's {name} {dims:?} {:?}", self.dtype), &found, &expected, 3.6e-7, 1e-6);
        }
    }

    fn adamw8(&mut self, dims: [usize; 2]) {
        let count = dims[0] * dims[1];
        let device = Default::default();
        let flex = |x: &[f32]| Tensor::<Flex, 2>::from_data(TensorData::new(x.to_vec(), dims), &device);
        let p = noise(count, 1);
        let mut expected = (flex(&p), AdamWState8::<Flex>::zeros(count, &device));
        let found =
            (self.upload_dense(&p, dims, DType::F32), AdamWState8::<Cube<R>>::zeros(count, self.device));
        for step in 1..=4 {
            // Blocks of zeros stay zeros.
            let mut g = noise(count, 10 + step).iter().map(|x| x * x * x).collect::<Vec<_>>();
            g.chunks_mut(256).skip(1).step_by(3).for_each(|block| block.fill(0.0));
            let g = rounded(&g, self.dtype);
            expected = adamw::reference8(expected.0, flex(&g).mul_scalar(0.5), expected.1, &settings(step));
            let gradient = self.upload(&g, dims, self.dtype);
            adamw::kernel::step8(found.0.clone(), gradient, &found.1, &settings(step), 0.5);
            let what = format!("of 8-bit AdamW {dims:?} {:?}, step {step}", self.dtype);
            let (a, b) = (
                self.download::<2>(found.0.clone()),
                expected.0.clone().into_data().to_vec::<f32>().unwrap(),
            );
            // A code that differs in a tie moves the parameter by some percent of a step.
            let bound = if step == 1 { 2e-7 } else { 1e-3 };
            self.near(format!("parameter {what}"), &a, &b, bound, 1e-6);
            let scales = [
                (found.1.first_scales.clone(), expected.1.first_scales.clone()),
                (found.1.second_scales.clone(), expected.1.second_scales.clone()),
            ];
            for (a, b) in scales {
                let (a, b) = (a.into_data().to_vec::<f32>().unwrap(), b.into_data().to_vec::<f32>().unwrap());
                self.near(format!("scales {what}"), &a, &b, 1e-12, if step == 1 { 1e-6 } else { 1e-2 });
            }
            let codes = [
                (found.1.first.clone(), expected.1.first.clone()),
                (found.1.second.clone(), expected.1.second.clone()),
            ];
            for (a, b) in codes {
                let bytes = |x: TensorData| x.iter::<i32>().flat_map(i32::to_le_bytes).collect::<Vec<_>>();
                let (a, b) = (bytes(a.into_data()), bytes(b.into_data()));
                let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
                let most = a.iter().zip(&b).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
                if most > 1 || differ > 1 + count / 2000 * step as usize {
                    let line = format!("codes {what}: {differ} differ, at most by {most}");
                    println!("WRONG {line}");
                    self.failed.push(line);
                }
            }
        }
    }

    /// Fifty steps down a quadratic bowl, in f32 by plain operations and in 8 bits by the kernel.
    fn descent(&mut self) {
        let count = 3000;
        let device = Default::default();
        let (start, aim) = (noise(count, 1), noise(count, 2));
        let curvature = noise(count, 3).iter().map(|x| 1.5 + x).collect::<Vec<_>>();
        let loss = |p: &[f32]| {
            p.iter().zip(&aim).zip(&curvature).map(|((p, a), c)| c * (p - a) * (p - a)).sum::<f32>()
                / count as f32
        };
        let slope = |p: &[f32]| -> Vec<f32> {
            p.iter().zip(&aim).zip(&curvature).map(|((p, a), c)| c * (p - a)).collect()
        };
        let mut plain = Tensor::<Flex, 1>::from_floats(start.as_slice(), &device);
        let mut state = AdamWState::zeros_like(&plain);
        let parameter = self.upload(&start, [count], DType::F32);
        let state8 = AdamWState8::<Cube<R>>::zeros(count, self.device);
        for step in 1..=50 {
            let settings = AdamW { learning_rate: 0.05, weight_decay: 0.0, ..settings(step) };
            let values = plain.clone().into_data().to_vec::<f32>().unwrap();
            let g = Tensor::from_floats(slope(&values).as_slice(), &device);
            (plain, state) = adamw::reference(plain, g, state, &settings);
            let g = slope(&self.download::<1>(parameter.clone()));
            let g = self.upload(&g, [count], DType::F32);
            adamw::kernel::step8(parameter.clone(), g, &state8, &settings, 1.0);
        }
        let [first, plain, eight] =
            [start, plain.into_data().to_vec().unwrap(), self.download::<1>(parameter)].map(|p| loss(&p));
        println!("quadratic bowl: loss {first} before, {plain} after 50 steps in f32, {eight} in 8 bits");
        if !(plain < 0.1 * first && eight < 1.25 * plain + 0.01 * first) {
            self.failed.push(format!("descent in 8 bits to {eight}"));
        }
    }

    fn squares(&mut self) {
        let sizes = [1, 7, 64, 4096, 5000, 16 * 4096, 300_001, 3, 12, 8 * 11_008];
        let values = (0..40)
            .map(|i| rounded(&noise(sizes[i % sizes.len()], i as u64), self.dtype))
            .collect::<Vec<_>>();
        let expected = values.iter().flatten().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() as f32;
        let tensors = values.iter().map(|x| self.upload(x, [x.len()], self.dtype)).collect::<Vec<_>>();
        let found = [0, 1].map(|_| {
            self.poison(4);
            self.poison(4 * 64);
            let total = adamw::kernel::sum_of_squares(tensors.clone()).unwrap();
            self.download::<1>(total)[0]
        });
        self.near(format!("sum of squares {:?}", self.dtype), &found[..1], &[expected], 0.0, 2e-6);
        self.same_bits("sum of squares again".into(), &found[..1], &found[1..]);
        assert!(adamw::kernel::sum_of_squares::<R>(vec![]).is_none());
    }
}

/// Half a unit in the last place, relative.
fn rounding(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 2.0_f32.powi(-8),
        DType::F16 => 2.0_f32.powi(-11),
        _ => 0.0,
    }
}

fn settings(step: u64) -> AdamW {
    AdamW {
        learning_rate: 0.01,
        beta_1: 0.9,
        beta_2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step,
        gradient_scale: 1.0,
    }
}

/// Losses and the gradient of their scaled sum, in f64.
fn softmax_losses(logits: &[f32], targets: &[i32], [n, v]: [usize; 2], scale: f32) -> (Vec<f32>, Vec<f32>) {
    let (mut losses, mut d) = (vec![0.0; n], vec![0.0; n * v]);
    for row in 0..n {
        let Ok(target) = usize::try_from(targets[row]) else { continue };
        let x = &logits[row * v..][..v];
        let peak = f64::from(x.iter().fold(f32::MIN, |a, b| a.max(*b)));
        let sum = x.iter().map(|x| (f64::from(*x) - peak).exp()).sum::<f64>();
        losses[row] = (sum.ln() + peak - f64::from(x[target])) as f32;
        for (i, x) in x.iter().enumerate() {
            let p = (f64::from(*x) - peak).exp() / sum - f64::from(i == target);
            d[row * v + i] = (p * f64::from(scale)) as f32;
        }
    }
    (losses, d)
}

/// Single, odd, narrower than a block, and of every vector width.
const SMALL: [[usize; 2]; 10] =
    [[1, 1], [1, 7], [3, 5], [5, 64], [7, 130], [33, 4096], [3, 2053], [9, 1000], [70, 12], [300, 3]];

fn weights<R: ProductRuntime>(runner: &mut Runner<R>) {
    for dims in SMALL {
        for double in [false, true] {
            runner.case(format!("dequantize {dims:?}"), |runner| runner.dequantize(dims, double));
            runner.case(format!("quantize {dims:?}"), |runner| runner.quantize(dims, double));
        }
    }
}

fn runs<R: ProductRuntime>(runner: &mut Runner<R>) {
    let counts = [1, 5, 1000, 1 << 20, 1 << 20, 3, 1 << 20, 1 << 22, 64, 1 << 20];
    runner.case("runs".into(), |runner| runner.runs(&counts));
}

/// On both sides of each change of how the mean is summed.
fn scales<R: ProductRuntime>(runner: &mut Runner<R>) {
    for count in [1, 3, 127, 128, 129, 1000, 2049, 8197, 130_561, 131_073, 140_001] {
        runner.case(format!("{count} scales"), |runner| runner.scales(count));
    }
}

fn losses<R: ProductRuntime>(runner: &mut Runner<R>, gradients: &[DType]) {
    for dims in [[1, 1], [3, 5], [4, 64], [7, 130], [9, 1000], [5, 2053], [6, 12], [2, 32_000], [2, 65_537]] {
        for dtype in gradients {
            runner.case(format!("cross-entropy {dims:?}"), |runner| runner.cross_entropy(dims, *dtype));
        }
    }
    for dims in [[5, 64, 40], [1500, 64, 96]] {
        runner.case(format!("cross-entropy of hidden states {dims:?}"), |runner| {
            runner.cross_entropy_of_hidden(dims);
        });
    }
}

fn optimizer<R: ProductRuntime>(runner: &mut Runner<R>) {
    for dims in [[1, 1], [1, 7], [3, 5], [16, 64], [7, 130], [3, 2053], [16, 4096]] {
        runner.case(format!("AdamW {dims:?}"), |runner| runner.adamw(dims));
        runner.case(format!("8-bit AdamW {dims:?}"), |runner| runner.adamw8(dims));
    }
    runner.case("descent".into(), Runner::descent);
    runner.case("squares".into(), Runner::squares);
}

#[test]
fn the_unsigned_map_has_twice_the_magnitudes() {
    let code = nf4::unsigned_dynamic_code();
    assert!(code.windows(2).all(|w| w[0] < w[1]));
    assert_eq!((code[0], code[255]), (0.0, 1.0));
    // Two midpoints in the least decade, at 1/4 and 3/4 of [1e-7, 1e-6], and 128 in the greatest.
    let expected =
        [(1, 3.25e-7), (2, 7.75e-7), (3, 2.125e-6), (127, 0.1 + 0.9 / 256.0), (254, 1.0 - 0.9 / 256.0)];
    for (i, expected) in expected {
        assert!((code[i] / expected - 1.0).abs() < 1e-6, "{} at {i}", code[i]);
    }
}

/// Without memory of the past the moments are g and g², which shows how the reference rounds them.
#[test]
fn the_reference_keeps_the_nearest_level() {
    let device = Default::default();
    let count = 700;
    let g = noise(count, 3);
    let zeros = Tensor::<Flex, 1>::zeros([count], &device);
    let state = AdamWState8::<Flex>::zeros(count, &device);
    assert_eq!((state.first.dims(), state.first_scales.dims()), ([192], [3]));
    for moment in state.moments(count) {
        assert!(moment.into_data().iter::<f32>().all(|x| x == 0.0));
    }
    let settings = AdamW { beta_1: 0.0, beta_2: 0.0, ..settings(1) };
    let (_, state) = adamw::reference8(zeros, Tensor::from_floats(g.as_slice(), &device), state, &settings);
    let squares = g.iter().map(|x| x * x).collect::<Vec<_>>();
    let maps = [nf4::dynamic_code(), nf4::unsigned_dynamic_code()];
    for ((values, map), found) in [g, squares].iter().zip(maps).zip(state.moments(count)) {
        let found = found.into_data().to_vec::<f32>().unwrap();
        for (values, found) in values.chunks(256).zip(found.chunks(256)) {
            let scale = values.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
            for (x, found) in values.iter().zip(found) {
                let least = map.iter().map(|level| (level * scale - x).abs()).fold(f32::MAX, f32::min);
                assert!((found - x).abs() <= least * 1.001 + 1e-9, "{found} for {x} of {scale}");
            }
        }
    }
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use super::*;

    type Wgpu = cubecl::wgpu::WgpuRuntime;

    fn with_runner(run: impl FnOnce(&mut Runner<Wgpu>)) {
        let device = burn_wgpu::WgpuDevice::default();
        if catch_unwind(|| Tensor::<Cube<Wgpu>, 1>::zeros([1], &device).into_data()).is_err() {
            println!("no wgpu adapter: nothing compared");
            return;
        }
        let mut runner = Runner { device: &device, dtype: DType::F32, failed: vec![] };
        run(&mut runner);
        runner.finish();
    }

    #[test]
    fn wgpu_weights_are_the_hosts() {
        with_runner(weights);
    }

    #[test]
    fn wgpu_has_the_values_that_were_written() {
        with_runner(runs);
    }

    #[test]
    fn wgpu_scales_are_the_hosts() {
        with_runner(scales);
    }

    #[test]
    fn wgpu_losses_are_those_of_f64() {
        with_runner(|runner| losses(runner, &[DType::F32]));
    }

    #[test]
    fn wgpu_optimizer_takes_the_reference_steps() {
        with_runner(optimizer);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::time::Instant;

    use burn::tensor::backend::Backend;

    use super::*;

    type Cuda = cubecl::cuda::CudaRuntime;

    /// The device, if a driver is there that knows one.
    fn device() -> Option<Device<Cuda>> {
        // Where no driver library is found, cudarc panics.
        let count = catch_unwind(|| {
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

    #[test]
    fn cuda_scales_are_the_hosts() {
        let Some(device) = device() else { return };
        let mut runner = Runner::<Cuda> { device: &device, dtype: DType::F32, failed: vec![] };
        scales(&mut runner);
        assert!(runner.failed.is_empty(), "{} failed, first: {}", runner.failed.len(), runner.failed[0]);
    }

    fn in_every_dtype(run: impl Fn(&mut Runner<Cuda>)) {
        let Some(device) = device() else { return };
        let mut failed = vec![];
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let mut runner = Runner { device: &device, dtype, failed: vec![] };
            run(&mut runner);
            println!("{dtype:?}: {} failed", runner.failed.len());
            failed.extend(runner.failed);
        }
        assert!(failed.is_empty(), "{} failed, first: {}", failed.len(), failed[0]);
    }

    #[test]
    fn cuda_has_the_values_that_were_written() {
        in_every_dtype(runs);
    }

    #[test]
    fn cuda_weights_are_the_hosts() {
        in_every_dtype(|runner| {
            weights(runner);
            for dims in [[4096, 4096], [11_008, 4096], [4096, 11_008]] {
                runner.case(format!("dequantize {dims:?}"), |runner| runner.dequantize(dims, true));
            }
            runner.case("quantize 4096".into(), |runner| runner.quantize([4096, 4096], true));
        });
    }

    #[test]
    fn cuda_losses_are_those_of_f64() {
        in_every_dtype(|runner| {
            losses(runner, &[DType::F32, DType::BF16, DType::F16]);
            runner
                .case("cross-entropy 600".into(), |runner| runner.cross_entropy([600, 32_000], runner.dtype));
        });
    }

    #[test]
    fn cuda_optimizer_takes_the_reference_steps() {
        in_every_dtype(|runner| {
            optimizer(runner);
            runner.case("AdamW 4096".into(), |runner| runner.adamw([1024, 4096]));
        });
    }

    /// Prints the median time of 20 loops of ten calls, and the bytes moved in it.
    fn time(device: &Device<Cuda>, what: &str, bytes: usize, run: impl Fn()) {
        let sync = || Cube::<Cuda>::sync(device).unwrap();
        (0..3).for_each(|_| run());
        sync();
        let mut times = (0..20)
            .map(|_| {
                let start = Instant::now();
                (0..10).for_each(|_| run());
                sync();
                start.elapsed().as_secs_f64() / 10.0
            })
            .collect::<Vec<_>>();
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        println!("{what}: {:.1} us, {:.0} GB/s", 1e6 * median, bytes as f64 / median / 1e9);
    }

    #[test]
    fn time_at_llama_7b() {
        let Some(device) = device() else { return };
        let runner = Runner::<Cuda> { device: &device, dtype: DType::BF16, failed: vec![] };
        let source = runner.upload(&noise(1 << 26, 1), [1 << 26], DType::BF16);
        time(&device, "copy of 128 MiB, to compare with", 2 * (2 << 26), || drop(source.copy()));
        for dims in [[4096, 4096], [11_008, 4096], [4096, 11_008]] {
            times_of_weight(&runner, dims);
        }
        times_of_rows(&runner);
        times_of_optimizer(&runner);
    }

    fn times_of_weight(runner: &Runner<Cuda>, dims: [usize; 2]) {
        let device = runner.device;
        let count = dims[0] * dims[1];
        let values = noise(count, 5);
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let dense = runner.upload(&values, dims, dtype);
            for double in [true, false] {
                let weight = nf4::kernel::quantize(dense.clone(), double);
                let (codes, scales) = weight.device_parts();
                let bytes = count / 2 + count / 64 * if double { 1 } else { 4 } + count * dtype.size();
                let what = format!("dequantize {dims:?} {dtype:?} double {double}");
                time(device, &what, bytes, || {
                    nf4::kernel::dequantize(codes.clone(), scales.clone(), dense.clone());
                });
                let wide = runner.upload(&vec![0.0; 2 * count], [dims[0], 2 * dims[1]], dtype);
                let mut half = wide;
                half.meta.shape = Shape::from(dims.to_vec());
                time(device, &format!("{what}, strided"), bytes, || {
                    nf4::kernel::dequantize(codes.clone(), scales.clone(), half.clone());
                });
            }
            let bytes = count / 2 + count / 16 + count * dtype.size();
            let quantize = || drop(nf4::kernel::quantize(dense.clone(), false));
            time(device, &format!("quantize {dims:?} {dtype:?}"), bytes, quantize);
        }
    }

    fn times_of_rows(runner: &Runner<Cuda>) {
        let (n, v) = (1024, 32_000);
        let values = noise(n * v, 5);
        let targets = runner.ints(&(0..n).map(|i| (i * 31 % v) as i32).collect::<Vec<_>>());
        for (dtype, to) in [
            (DType::BF16, DType::BF16),
            (DType::F16, DType::F16),
            (DType::F32, DType::F32),
            (DType::F32, DType::BF16),
            (DType::BF16, DType::F32),
        ] {
            let x = runner.upload(&values, [n, v], dtype);
            let what = format!("cross-entropy [{n}, {v}] {dtype:?}");
            time(runner.device, &format!("{what}, losses"), n * v * dtype.size(), || {
                drop(cross_entropy::kernel::losses(x.clone(), targets.clone()));
            });
            time(runner.device, &format!("{what} to {to:?}"), n * v * (dtype.size() + to.size()), || {
                drop(cross_entropy::kernel::rows(x.clone(), targets.clone(), 1.0, to));
            });
        }
    }

    fn times_of_optimizer(runner: &Runner<Cuda>) {
        let device = runner.device;
        let tensors = (0..224).flat_map(|_| [16 * 4096, 16 * 4096]).collect::<Vec<_>>();
        let bytes = tensors.iter().sum::<usize>() * 4;
        let tensors =
            tensors.iter().map(|n| runner.upload(&vec![0.5; *n], [*n], DType::F32)).collect::<Vec<_>>();
        time(device, "sum of squares of 448 tensors", bytes, || {
            drop(adamw::kernel::sum_of_squares(tensors.clone()));
        });
        for count in [16 * 4096, 1 << 26] {
            let values = noise(count, 9);
            let [p, g, m, v] = [0; 4].map(|_| runner.upload(&values, [count], DType::F32));
            time(device, &format!("AdamW of {count}"), 28 * count, || {
                adamw::kernel::step(p.clone(), g.clone(), m.clone(), v.clone(), &settings(3), 1.0);
            });
            let state = AdamWState8::<Cube<Cuda>>::zeros(count, device);
            time(device, &format!("8-bit AdamW of {count}"), 16 * count, || {
                adamw::kernel::step8(p.clone(), g.clone(), &state, &settings(3), 1.0);
            });
        }
    }
}
