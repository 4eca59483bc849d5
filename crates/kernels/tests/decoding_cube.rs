//! Kernels for answering against the references, on wgpu and, where there is one, on a CUDA device.
#![cfg(any(feature = "wgpu", feature = "cuda"))]
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::Flex;
use buzzer_kernels::{
    Cube, FloatPages, FrozenWeight, Heads, Int8Pages, Int8Rows, KernelBackend, LoraTerm, Nf4Tensor,
    PageFormat, PagedIndex, PagedSequence, Pages, ProductRuntime, RotaryAngles, RowGroup, TokenChoice,
    choice,
};
use common::{Device, noise};

const PAGE: usize = 16;
/// The row that has a value which is no number: the fifth of the second sequence.
const BROKEN: usize = 24;

/// Where the kernels run, in which dtype, and what an element may differ by.
struct Runner<'a, R: ProductRuntime> {
    device: &'a Device<R>,
    dtype: DType,
    bound: f32,
}

fn host<B: burn::tensor::backend::Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
    x.cast(DType::F32).into_data().to_vec().unwrap()
}

/// The same linear layers on a backend.
struct Layers<B: KernelBackend> {
    x: Tensor<B, 2>,
    weights: Vec<FrozenWeight<B>>,
    groups: Vec<RowGroup<B>>,
    residual: Option<Tensor<B, 2>>,
}

/// What is multiplied: rows and their groups' ranks, and the widths.
#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    groups: &'a [(usize, usize)],
    inner: usize,
    outs: &'a [usize],
    double: bool,
    added: bool,
}

/// Every kind of choice, at several draws.
fn choices() -> Vec<TokenChoice> {
    let greedy = TokenChoice { log_prob: true, ..TokenChoice::default() };
    let sampled = TokenChoice { temperature: 0.8, ..greedy };
    let kinds = [
        greedy,
        sampled,
        TokenChoice { temperature: 3.0, ..sampled },
        TokenChoice { top_k: 5, ..sampled },
        TokenChoice { top_k: 300, temperature: 2.0, ..sampled },
        TokenChoice { top_p: 0.3, ..sampled },
        TokenChoice { top_p: 0.95, temperature: 2.0, ..sampled },
        TokenChoice { min_p: 0.2, ..sampled },
        TokenChoice { top_k: 40, top_p: 0.7, min_p: 0.05, temperature: 1.5, ..sampled },
    ];
    let draws = [0.0, 0.37, 0.911, 1.0_f32.next_down()];
    kinds.iter().flat_map(|kind| draws.map(|draw| TokenChoice { draw, ..*kind })).collect()
}

/// What the host chooses when its sums differ a little from those of the device.
fn possible(logits: &[f32], how: &TokenChoice) -> Vec<Option<u32>> {
    let near = |x: f32| [x, (x - 2e-5).max(0.0), (x + 2e-5).min(1.0)];
    let draws = near(how.draw);
    let shares = if how.top_p < 1.0 { near(how.top_p).to_vec() } else { vec![1.0] };
    let all = draws.iter().flat_map(|&draw| shares.iter().map(move |&top_p| (draw, top_p)));
    let choose = |(draw, top_p)| choice::choose(logits, &TokenChoice { draw, top_p, ..*how });
    all.map(|pair| choose(pair).map(|chosen| chosen.id)).collect()
}

/// Sequences of these lengths and rows, in pages in an order that is not theirs in memory; the first one is the scratch page.
fn sequences(lengths: &[(usize, usize)]) -> Vec<PagedSequence> {
    let (mut next, mut sequences) = (0, Vec::new());
    let total: u32 = lengths.iter().map(|(length, _)| length.div_ceil(PAGE) as u32).sum();
    for &(length, rows) in lengths {
        let count = length.div_ceil(PAGE) as u32;
        let pages = (next..next + count).map(|page| 1 + (total - 1 - page)).collect();
        next += count;
        sequences.push(PagedSequence { pages, length, rows });
    }
    sequences
}

/// Places of all pages up to the last one that a sequence has.
fn places_of(sequences: &[PagedSequence]) -> usize {
    let pages = 1 + sequences.iter().flat_map(|sequence| &sequence.pages).max().unwrap();
    pages as usize * PAGE
}

/// The places of some positions of each sequence.
fn places(
    sequences: &[PagedSequence],
    positions: impl Fn(&PagedSequence) -> Range<usize>,
) -> BTreeSet<usize> {
    let of_sequence = |sequence| positions(sequence).map(|at| PagedSequence::place(sequence, at, PAGE));
    sequences.iter().flat_map(of_sequence).collect()
}

/// Words, and the bits of scales.
fn bits(rows: &Int8Rows<Flex>) -> (Vec<i32>, Vec<u32>) {
    let scales = host(rows.scales.clone()).iter().map(|scale| scale.to_bits()).collect();
    (rows.codes.to_data().to_vec().unwrap(), scales)
}

/// Heads that were stored have the scale of their largest number and are restored to half a step of what they exactly are `[places,
/// g k]`; others are as they were before. Angles are off by their own roundings, as they are for floats.
fn stored_to_half_a_step(
    what: &str,
    heads: Heads,
    [found, before]: [&Int8Rows<Flex>; 2],
    exact: &[f32],
    stored: &BTreeSet<usize>,
) {
    let ((codes, scales), (codes_before, scales_before)) = (bits(found), bits(before));
    let (words, restored) = (heads.width.div_ceil(4), host(found.restored(heads)));
    for (head, (&scale, &scale_before)) in scales.iter().zip(&scales_before).enumerate() {
        let own = head * words..(head + 1) * words;
        let scale = f32::from_bits(scale);
        if !stored.contains(&(head / heads.keys)) {
            assert_eq!(codes[own.clone()], codes_before[own], "codes of head {head}, {what}");
            let before = f32::from_bits(scale_before);
            let kept = scale == before || (scale.is_nan() && before.is_nan());
            assert!(kept, "{scale} for {before} of head {head}, {what}");
            continue;
        }
        let exact = &exact[head * heads.width..][..heads.width];
        let most = exact.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let rounding = 2e-5 * (1.0 + most);
        assert!((scale * 127.0 - most).abs() <= rounding, "{scale} for {most} of head {head}, {what}");
        for (found, exact) in restored[head * heads.width..].iter().zip(exact) {
            let error = (found - exact).abs();
            assert!(error <= scale / 2.0 + rounding, "{found} for {exact} in head {head}, {what}");
        }
    }
    // Bytes behind the end of a head are zero.
    let spare = words * 4 - heads.width;
    let mut last = codes.iter().skip(words - 1).step_by(words);
    assert!(spare == 0 || last.all(|word| word.cast_unsigned() >> (32 - 8 * spare) == 0), "{what}");
}

/// The same codes and scales on another backend, without gaps between rows.
fn moved<A: KernelBackend, B: KernelBackend>(rows: &Int8Rows<A>, device: &B::Device) -> Int8Rows<B> {
    let (codes, scales) = (rows.codes.to_data(), rows.scales.to_data());
    let ([places, words], [_, heads]) = (rows.codes.dims(), rows.scales.dims());
    let codes = TensorData::new(codes.to_vec::<i32>().unwrap(), [places * words]);
    let scales = TensorData::new(scales.to_vec::<f32>().unwrap(), [places * heads]);
    Int8Rows {
        codes: Tensor::<B, 1, Int>::from_data(codes, (device, DType::I32)).reshape([places, words]),
        scales: Tensor::<B, 1>::from_data(scales, (device, DType::F32)).reshape([places, heads]),
    }
}

impl<R: ProductRuntime> Runner<'_, R> {
    /// Logits of a vocabulary: noise, with equal ones, with ones that weigh nothing, and with one that is no number.
    fn logits(&self, vocabulary: usize) -> [Vec<f32>; 4] {
        let plain = self.values(vocabulary, 3, 6.0);
        let equal = plain.iter().map(|x| x.round()).collect();
        let light = plain.iter().enumerate().map(|(i, &x)| if i % 7 == 3 { f32::NEG_INFINITY } else { x });
        let mut wrong = plain.clone();
        wrong[vocabulary / 2] = f32::NAN;
        [plain.clone(), equal, light.collect(), wrong]
    }

    fn tokens(&self) {
        let choices = choices();
        for vocabulary in [1, 7, 255, 1000, 32_000] {
            for (kind, logits) in self.logits(vocabulary).into_iter().enumerate() {
                let rows = logits.repeat(choices.len());
                let rows = TensorData::new(rows, [choices.len(), vocabulary]);
                let rows = Tensor::<Cube<R>, 2>::from_data(rows, (self.device, self.dtype));
                let found = Cube::<R>::choose_tokens(rows, &choices);
                for (how, found) in choices.iter().zip(found) {
                    let what = format!("{vocabulary} logits of kind {kind}, {how:?}");
                    let possible = possible(&logits, how);
                    assert!(
                        possible.contains(&found.map(|found| found.id)),
                        "{what}: {found:?}, not {possible:?}"
                    );
                    let Some(found) = found else { continue };
                    let greatest = logits.iter().copied().fold(f32::MIN, f32::max);
                    let sum: f64 = logits.iter().map(|x| f64::from(x - greatest).exp()).sum();
                    let expected = f64::from(logits[found.id as usize] - greatest) - sum.ln();
                    assert!(
                        (f64::from(found.log_prob.unwrap()) - expected).abs() < 1e-4,
                        "{what}: {found:?}"
                    );
                }
            }
        }
    }

    /// Noise as the dtype holds it, on both sides.
    fn values(&self, count: usize, seed: u64, scale: f32) -> Vec<f32> {
        let values: Vec<f32> = noise(count, seed).iter().map(|x| x * scale).collect();
        let x = Tensor::<Flex, 1>::from_data(TensorData::new(values, [count]), &Default::default());
        host(x.cast(self.dtype))
    }

    fn layers<B: KernelBackend>(&self, case: Case<'_>, device: &B::Device, dtype: DType) -> Layers<B> {
        let tensor = |values: Vec<f32>, dims: [usize; 2], dtype: DType| {
            Tensor::<B, 2>::from_data(TensorData::new(values, dims), (device, dtype))
        };
        let Case { groups, inner, outs, double, added } = case;
        let (n, out) = (groups.iter().map(|(rows, _)| rows).sum::<usize>(), outs.iter().sum::<usize>());
        let weight = |(seed, &out): (u64, &usize)| {
            let values: Vec<f32> = noise(out * inner, seed).iter().map(|x| x * 0.1).collect();
            FrozenWeight::Nf4(Nf4Tensor::quantize(&values, [out, inner], double, device))
        };
        let lora = |rank: usize, seed: u64, out: usize| LoraTerm {
            a: tensor(self.values(rank * inner, seed, 0.1), [rank, inner], DType::F32),
            b: tensor(self.values(out * rank, seed + 1, 0.1), [out, rank], DType::F32),
            scale: 0.5,
        };
        // The middle one of three layers has no correction.
        let has = |layer: usize, rank: usize| rank > 0 && (layer != 1 || outs.len() < 3);
        let group = |(number, &(rows, rank)): (u64, &(usize, usize))| RowGroup {
            rows,
            loras: (0..outs.len())
                .map(|layer| {
                    has(layer, rank).then(|| lora(rank, 100 * number + 10 * layer as u64 + 50, outs[layer]))
                })
                .collect(),
        };
        Layers {
            x: tensor(self.values(n * inner, 7, 1.0), [n, inner], dtype),
            weights: (1..).zip(outs).map(weight).collect(),
            groups: (0..).zip(groups).map(group).collect(),
            residual: added.then(|| tensor(self.values(n * out, 9, 1.0), [n, out], dtype)),
        }
    }

    fn linear(&self, case: Case<'_>) {
        let run = |layers: Layers<Cube<R>>| {
            host(Cube::<R>::grouped_linear(layers.x, &layers.weights, &layers.groups, layers.residual))
        };
        let found = run(self.layers(case, self.device, self.dtype));
        let expected = self.layers::<Flex>(case, &Default::default(), DType::F32);
        let expected =
            Flex::grouped_linear(expected.x, &expected.weights, &expected.groups, expected.residual);
        self.close(&format!("{case:?}"), &found, &host(expected));
    }

    fn close(&self, what: &str, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - expected).abs();
            assert!(
                error <= self.bound * (1.0 + expected.abs()),
                "{what} at {place}: {found} for {expected}"
            );
        }
    }

    fn linears(&self) {
        let case = Case { groups: &[(1, 0)], inner: 64, outs: &[8], double: true, added: false };
        self.linear(case);
        self.linear(Case { outs: &[7], double: false, ..case });
        self.linear(Case { outs: &[5, 9, 6], inner: 320, groups: &[(3, 4)], added: true, ..case });
        self.linear(Case { outs: &[33], inner: 2048 + 192, groups: &[(2, 40)], ..case });
        self.linear(Case { outs: &[12, 20], inner: 192, groups: &[(8, 3)], double: false, ..case });
        self.linear(Case { outs: &[12], inner: 192, groups: &[(13, 0)], added: true, ..case });
        self.linear(Case {
            outs: &[6, 6, 6],
            inner: 128,
            groups: &[(2, 3), (1, 0), (4, 5)],
            added: true,
            ..case
        });
        self.linear(Case { outs: &[12], inner: 128, groups: &[(17, 2)], ..case });
        self.linear(Case { outs: &[12], inner: 96, groups: &[(2, 2)], ..case });
    }

    /// Noise on a backend; rows lie side by side without gaps, as places do.
    fn tensor<B: KernelBackend>(
        &self,
        dims: [usize; 2],
        seed: u64,
        (device, dtype): (&B::Device, DType),
    ) -> Tensor<B, 2> {
        let values = self.values(dims[0] * dims[1], seed, 1.0);
        Tensor::<B, 1>::from_data(TensorData::new(values, [dims[0] * dims[1]]), (device, dtype)).reshape(dims)
    }

    /// Rows stored and attended for, on a backend.
    fn paged<B: KernelBackend>(
        &self,
        heads: Heads,
        sequences: &[PagedSequence],
        device: &B::Device,
        dtype: DType,
    ) -> [Vec<f32>; 3] {
        let index = PagedIndex::<B>::new(sequences.to_vec(), PAGE, device);
        let all = [places_of(sequences), heads.keys * heads.width];
        let full = |seed| self.tensor::<B>(all, seed, (device, dtype));
        let mut pages = Pages::Float(FloatPages { keys: full(1), values: full(2) });
        let rows = [index.rows(), (heads.queries + 2 * heads.keys) * heads.width];
        let rows = self.tensor(rows, 3, (device, dtype));
        let angles = RotaryAngles::new(index.positions(), heads.width, 10_000.0);
        let q = B::paged_store(rows, &angles, heads, &mut pages, &index);
        let o = B::paged_attention(q, heads, &pages, &index);
        let Pages::Float(FloatPages { keys, values }) = pages else { unreachable!("as they were made") };
        [host(o), host(keys), host(values)]
    }

    fn attention(&self, heads: Heads, lengths: &[(usize, usize)]) {
        let sequences = sequences(lengths);
        let found = self.paged::<Cube<R>>(heads, &sequences, self.device, self.dtype);
        let expected = self.paged::<Flex>(heads, &sequences, &Default::default(), DType::F32);
        for (what, (found, expected)) in ["o", "keys", "values"].iter().zip(found.iter().zip(&expected)) {
            self.close(&format!("{what} of {heads:?} {lengths:?}"), found, expected);
        }
        self.attention_in_8_bits(heads, &sequences);
    }

    /// What is stored against half a step, and what is attended for against the reference on the same pages.
    fn attention_in_8_bits(&self, heads: Heads, sequences: &[PagedSequence]) {
        let what = format!("8 bits, {heads:?} {sequences:?}");
        let before = self.poisoned(heads, sequences);
        let rows = sequences.iter().map(|sequence| sequence.rows).sum();
        let rows = self.special_rows([rows, (heads.queries + 2 * heads.keys) * heads.width], heads);

        let index = PagedIndex::<Cube<R>>::new(sequences.to_vec(), PAGE, self.device);
        let angles = RotaryAngles::new(index.positions(), heads.width, 10_000.0);
        let [keys, values] = before.each_ref().map(|rows| moved(rows, self.device));
        let mut pages = Pages::Int8(Int8Pages { keys, values });
        let own = Tensor::from_data(rows.to_data(), (self.device, self.dtype));
        let q = Cube::<R>::paged_store(own, &angles, heads, &mut pages, &index);
        let o = Cube::<R>::paged_attention(q.clone(), heads, &pages, &index);
        let Pages::Int8(Int8Pages { keys, values }) = pages else { unreachable!("as they were made") };
        let found = [&keys, &values].map(|rows| moved::<_, Flex>(rows, &Default::default()));

        let index = PagedIndex::<Flex>::new(sequences.to_vec(), PAGE, &Default::default());
        let angles = RotaryAngles::new(index.positions(), heads.width, 10_000.0);
        let format = PageFormat::Float(DType::F32);
        let mut exact = Pages::<Flex>::zeros(places_of(sequences), heads, format, &Default::default());
        let exact_q = Flex::paged_store(rows, &angles, heads, &mut exact, &index);
        let Pages::Float(FloatPages { keys, values }) = exact else { unreachable!("as they were made") };
        self.close(&format!("q, {what}"), &host(q.clone()), &host(exact_q));
        let stored = places(sequences, PagedSequence::positions);
        for (found, (before, exact)) in found.iter().zip(before.iter().zip([keys, values])) {
            stored_to_half_a_step(&what, heads, [found, before], &host(exact), &stored);
        }
        let [keys, values] = found;
        let pages = Pages::Int8(Int8Pages { keys, values });
        let q = Tensor::from_data(q.cast(DType::F32).into_data(), &Default::default());
        self.close(&format!("o, {what}"), &host(o), &host(Flex::paged_attention(q, heads, &pages, &index)));
    }

    /// Keys and values of all places: noise, and where no sequence sees them keys whose scale is no number, as that of a broken row.
    fn poisoned(&self, heads: Heads, sequences: &[PagedSequence]) -> [Int8Rows<Flex>; 2] {
        let all = [places_of(sequences), heads.keys * heads.width];
        let [mut keys, values] = [1, 2].map(|seed| {
            Int8Rows::of(self.tensor::<Flex>(all, seed, (&Default::default(), DType::F32)), heads)
        });
        let seen = places(sequences, |sequence| 0..sequence.length);
        for place in (0..all[0]).filter(|place| !seen.contains(place)) {
            let poison = Tensor::full([1, heads.keys], f32::NAN, &Default::default());
            keys.scales = keys.scales.slice_assign([place..place + 1, 0..heads.keys], poison);
        }
        [keys, values]
    }

    /// Noise in which the first row has a head of values that are all zero, and the last one, if there are two, a key and a value
    /// that are large.
    fn special_rows(&self, [n, width]: [usize; 2], heads: Heads) -> Tensor<Flex, 2> {
        let mut rows = self.values(n * width, 3, 1.0);
        let (keys, values) = (heads.queries * heads.width, (heads.queries + heads.keys) * heads.width);
        rows[values..][..heads.width].fill(0.0);
        if n > 1 {
            rows[(n - 1) * width + keys] = 4.0;
            rows[(n - 1) * width + values + 1] = 1024.0;
        }
        Tensor::from_data(TensorData::new(rows, [n, width]), &Default::default())
    }

    /// A number that is none among the rows of one of three sequences that are stored and attended for together, in a value, or
    /// in a key where pages are in 8 bits. `keeps_nan` says whether the device promises that NaN stays NaN, which Vulkan does not.
    fn containment(&self, keeps_nan: bool) {
        let value = 7 * 32 + 5;
        self.contained(PageFormat::Float(self.dtype), value, keeps_nan);
        self.contained(PageFormat::Int8, value, keeps_nan);
        self.contained(PageFormat::Int8, 5 * 32 + 5, keeps_nan);
    }

    fn contained(&self, format: PageFormat, column: usize, keeps_nan: bool) {
        let heads = Heads { queries: 4, keys: 2, width: 32 };
        let sequences: Vec<_> = [(1..3, 20), (3..6, 33), (6..7, 9)]
            .map(|(pages, length)| PagedSequence { pages: pages.collect(), length, rows: length })
            .into();
        let all = |broken: Option<f32>| {
            let index = PagedIndex::<Cube<R>>::new(sequences.clone(), PAGE, self.device);
            let mut pages = Pages::zeros(7 * PAGE, heads, format, self.device);
            let rows = [index.rows(), (heads.queries + 2 * heads.keys) * heads.width];
            let mut rows = self.tensor::<Cube<R>>(rows, 3, (self.device, self.dtype));
            if let Some(value) = broken {
                let one = Tensor::full([1, 1], value, (self.device, self.dtype));
                rows = rows.slice_assign([BROKEN..BROKEN + 1, column..column + 1], one);
            }
            let angles = RotaryAngles::new(index.positions(), heads.width, 10_000.0);
            let q = Cube::<R>::paged_store(rows, &angles, heads, &mut pages, &index);
            host(Cube::<R>::paged_attention(q, heads, &pages, &index))
        };
        let whole = all(None);
        for endless in [f32::NAN, f32::INFINITY] {
            for (at, (found, whole)) in all(Some(endless)).iter().zip(&whole).enumerate() {
                let what = format!("{endless} in column {column}, {format:?}, at {at}");
                let (row, column) = (at / 128, at % 128);
                let sees = (BROKEN..53).contains(&row) && column >= 64;
                assert!(found.is_nan() || !(sees && keeps_nan), "{what}: {found}");
                let near = (found - whole).abs() <= self.bound * (1.0 + whole.abs());
                assert!(sees || near, "{what}: {found} for {whole}");
            }
        }
    }

    fn attentions(&self) {
        let heads = Heads { queries: 4, keys: 2, width: 32 };
        self.attention(heads, &[(1, 1)]);
        self.attention(heads, &[(128, 1), (5, 1), (129, 1), (300, 1)]);
        self.attention(Heads { queries: 3, keys: 3, width: 128 }, &[(77, 1), (520, 1)]);
        self.attention(Heads { queries: 6, keys: 1, width: 20 }, &[(40, 1)]);
        self.attention(heads, &[(20, 1), (33, 1), (50, 17), (16, 16), (9, 2)]);
        self.attention(heads, &[(30, 30)]);
        // Words of a head that make no whole vector, and numbers that make no whole word.
        self.attention(Heads { queries: 2, keys: 2, width: 6 }, &[(50, 1), (140, 1), (20, 4)]);
        self.attention(Heads { queries: 2, keys: 1, width: 34 }, &[(17, 1), (3, 3)]);
    }
}

#[cfg(feature = "wgpu")]
fn vulkan() -> Runner<'static, cubecl::wgpu::WgpuRuntime> {
    Runner { device: &buzzer_kernels::WgpuDevice::DefaultDevice, dtype: DType::F32, bound: 2e-5 }
}

#[cfg(feature = "wgpu")]
#[test]
fn grouped_layers_on_wgpu() {
    vulkan().linears();
}

#[cfg(feature = "wgpu")]
#[test]
fn tokens_on_wgpu() {
    vulkan().tokens();
}

#[cfg(feature = "wgpu")]
#[test]
fn pages_on_wgpu() {
    vulkan().attentions();
    vulkan().containment(false);
}

/// In f32, and in 16 bits with a bound of some units of a sum's last place.
#[cfg(feature = "cuda")]
fn on_cuda(run: impl Fn(Runner<'_, cubecl::cuda::CudaRuntime>)) {
    if buzzer_kernels::cuda_cards() == 0 {
        println!("skipped: no CUDA device");
        return;
    }
    let device = buzzer_kernels::CudaDevice::new(0);
    for (dtype, bound) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        println!("{dtype:?}");
        run(Runner { device: &device, dtype, bound });
    }
}

#[cfg(feature = "cuda")]
#[test]
fn grouped_layers_on_cuda() {
    on_cuda(|runner| runner.linears());
}

#[cfg(feature = "cuda")]
#[test]
fn tokens_on_cuda() {
    on_cuda(|runner| runner.tokens());
}

#[cfg(feature = "cuda")]
#[test]
fn pages_on_cuda() {
    on_cuda(|runner| {
        runner.attentions();
        runner.containment(true);
    });
}
