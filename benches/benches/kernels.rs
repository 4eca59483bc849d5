//! Times every operation of `KernelBackend` at the shapes of Llama-2-7B, forward and backward.
//!
//! `cargo bench --bench kernels --features cuda -- --json FILE`. Devices other than CUDA cards get tiny shapes, which show
//! that the operations run and not how fast they are. An operation is held against what it must do: the bytes of its
//! inputs and outputs, each moved once, or its multiplications and additions. The rate is told beside the rate of a
//! large copy or a large product on the same device. Where a composition of Burn's operations exists and its memory is
//! there, it is timed on the same inputs. The compositions of joined layers unpack weights and drop with the
//! operations measured here, since that is all that `FrozenWeight` offers; other dropout in a composition is that of
//! Burn, with masks from its own generator.
//!
//! What it trades: inputs are the same in every call, so what fits into a cache stays there, and a share above 1 is
//! possible for small tensors. What it refuses: grouped queries, which Llama-2-7B does not have.

use std::process::ExitCode;

use buzzer::DeviceJob;
use buzzer::burn::tensor::{DType, Distribution, Int, Tensor, TensorData};
use buzzer::kernels::{
    AdamW, AdamWState, AdamWState8, AttentionIndex, Dropout, FrozenWeight, Heads, KernelBackend, LinearPart,
    LoraTerm, RotaryAngles, Spent, adamw, attention, cross_entropy, nf4, qlora_linear, rms_norm, rotary,
    swiglu,
};
use buzzer_benches::{
    BATCH_SECONDS, BenchError, CommonArgs, Compute, Row, commit, copy_rate, dtype_name, is_large,
    median_seconds, peak_memory_bytes, product_rate, product_rows, random, run_bench,
};
use clap::Parser;

/// Time every operation on the device.
#[derive(Parser)]
#[command(name = "kernels")]
struct Arguments {
    /// Dtype to compute in [default: what the device has].
    #[arg(long, value_enum)]
    dtype: Option<Compute>,
    /// Measure only operations with this in their name.
    #[arg(long, value_name = "NAME", default_value = "")]
    filter: String,
    /// Rows of tokens [default: 8192, tiny 64]; cut to whole sequences.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rows: Option<u32>,
    #[command(flatten)]
    common: CommonArgs,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run_bench("kernels", arguments.common.choose_device(), Job(&arguments))
}

struct Job<'a>(&'a Arguments);

/// What measures some operations.
type Group<B> = fn(&mut Bench<'_, B>) -> Result<(), BenchError>;

impl DeviceJob for Job<'_> {
    type Output = Result<(), BenchError>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Self::Output {
        let groups: [Group<B>; 12] = [
            packing,
            projections,
            projections_backward,
            norms,
            norms_backward,
            rotations,
            attentions,
            gates,
            dropouts,
            losses,
            moments,
            squares,
        ];
        let mut bench = Bench::<B>::new(self.0, device);
        bench.find_ceilings()?;
        let ceilings = bench.rows.len();
        for measure in groups {
            measure(&mut bench)?;
            B::memory_cleanup(device);
        }
        if bench.rows.len() == ceilings {
            return Err(BenchError::Filter(self.0.filter.clone()));
        }
        self.0.common.write(&bench.rows)
    }
}

/// The sizes of everything.
#[derive(Clone, Copy)]
struct Sizes {
    /// Sequences b, their tokens t, and n = b t.
    b: usize,
    t: usize,
    n: usize,
    /// Model width, MLP width, heads, head width, vocabulary, LoRA rank.
    d: usize,
    f: usize,
    h: usize,
    k: usize,
    v: usize,
    r: usize,
    /// Blocks, whose factors have one norm.
    blocks: usize,
    /// Elements of a copy that no cache holds.
    copied: usize,
}

impl Sizes {
    fn new(large: bool, rows: Option<usize>) -> Self {
        let (n, t) = if large { (8192, 2048) } else { (64, 32) };
        let n = rows.unwrap_or(n);
        let t = n.min(t);
        let b = n / t;
        let n = b * t;
        if large {
            let (d, f, v) = (4096, 11_008, 32_000);
            Self { b, t, n, d, f, h: 32, k: 128, v, r: 64, blocks: 32, copied: 1 << 26 }
        } else {
            Self { b, t, n, d: 64, f: 176, h: 2, k: 32, v: 256, r: 8, blocks: 2, copied: 1 << 22 }
        }
    }

    /// Layers that share an input: their name, width of the input, widths of the results.
    fn joined(&self) -> [(&'static str, usize, Vec<usize>); 4] {
        let Self { d, f, .. } = *self;
        [("qkv", d, vec![d; 3]), ("o", d, vec![d]), ("gate_up", d, vec![f; 2]), ("down", f, vec![d])]
    }
}

/// What an operation must do.
#[derive(Clone, Copy)]
enum Work {
    /// Move so many bytes.
    Bytes(usize),
    /// Multiply or add so many times.
    Flop(usize),
}

/// One operation at one shape.
struct Case<'a> {
    name: String,
    shape: String,
    work: Work,
    call: Box<dyn FnMut() + 'a>,
    composition: Option<Box<dyn FnMut() + 'a>>,
    /// Bytes that the composition holds beside inputs and outputs, if they are many.
    scratch_bytes: usize,
    /// Whether it computes in f32, whatever the dtype of the rest.
    in_f32: bool,
}

impl<'a> Case<'a> {
    fn new<T>(name: impl Into<String>, shape: String, work: Work, call: impl FnMut() -> T + 'a) -> Self {
        let (name, call) = (name.into(), dropping(call));
        Self { name, shape, work, call, composition: None, scratch_bytes: 0, in_f32: false }
    }

    fn against<T>(mut self, composition: impl FnMut() -> T + 'a) -> Self {
        self.composition = Some(dropping(composition));
        self
    }

    fn in_f32(mut self) -> Self {
        self.in_f32 = true;
        self
    }

    fn holding(mut self, scratch_bytes: usize) -> Self {
        self.scratch_bytes = scratch_bytes;
        self
    }
}

fn dropping<'a, T>(mut call: impl FnMut() -> T + 'a) -> Box<dyn FnMut() + 'a> {
    Box::new(move || drop(call()))
}

/// Steps that each take what the one before gave and nobody else holds, so that they can write in place.
fn stepping<S>(first: S, mut step: impl FnMut(S) -> S) -> impl FnMut() {
    let mut state = Some(first);
    move || state = state.take().map(&mut step)
}

/// Where to run, and what was measured so far.
struct Bench<'a, B: KernelBackend> {
    device: &'a B::Device,
    sizes: Sizes,
    dtype: DType,
    filter: &'a str,
    batch_seconds: f64,
    /// Scratch memory that a composition may take.
    most_scratch_bytes: usize,
    /// Bytes and operations a second.
    ceilings: [f64; 2],
    rows: Vec<Row>,
    device_name: String,
    commit: String,
}

impl<'a, B: KernelBackend> Bench<'a, B> {
    fn new(arguments: &'a Arguments, device: &'a B::Device) -> Self {
        let card = B::card(device);
        let large = is_large(card.as_ref());
        let memory = card.as_ref().and_then(|card| card.memory_bytes).unwrap_or(4 << 30);
        Self {
            device,
            sizes: Sizes::new(large, arguments.rows.map(|rows| rows as usize)),
            dtype: Compute::dtype(arguments.dtype, card.as_ref()),
            filter: &arguments.filter,
            batch_seconds: if large { BATCH_SECONDS } else { BATCH_SECONDS / 10.0 },
            most_scratch_bytes: usize::try_from(memory / 2).unwrap_or(usize::MAX),
            ceilings: [f64::NAN; 2],
            rows: Vec::new(),
            device_name: card.map_or_else(|| arguments.common.device.to_string(), |card| card.name),
            commit: commit(),
        }
    }

    fn random<const D: usize>(&self, dims: [usize; D]) -> Tensor<B, D> {
        random(dims, self.dtype, self.device)
    }

    fn random_f32<const D: usize>(&self, dims: [usize; D]) -> Tensor<B, D> {
        random(dims, DType::F32, self.device)
    }

    fn integers<const D: usize>(
        &self,
        dims: [usize; D],
        value: impl Fn(usize) -> usize,
    ) -> Tensor<B, D, Int> {
        let values = (0..dims.iter().product()).map(|place| value(place) as i32).collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(values, dims), (self.device, DType::I32))
    }

    fn seconds(&self, call: impl FnMut()) -> Result<f64, BenchError> {
        median_seconds::<B>(self.device, self.batch_seconds, call)
    }

    /// A copy reads one tensor and writes another, in f32, since the processor has no half-precision arithmetic; a product is that of the MLP's up projection.
    fn find_ceilings(&mut self) -> Result<(), BenchError> {
        let Sizes { n, d, f, copied, .. } = self.sizes;
        println!("{} in {}, {n} rows", self.device_name, dtype_name(self.dtype));
        let bytes = copy_rate::<B>(copied, self.batch_seconds, self.device)?;
        let rows = product_rows(d);
        let flop = product_rate::<B>([rows, d, f], self.dtype, self.batch_seconds, self.device)?;
        B::memory_cleanup(self.device);
        self.ceilings = [bytes, flop];
        self.row(DType::F32, "copy", &format!("[{copied}]"), bytes / 1e9, "GB/s");
        self.row(self.dtype, "product", &format!("[{rows}, {d}] [{d}, {f}]"), flop / 1e12, "TFLOP/s");
        println!("ceilings: copy {:.1} GB/s, product {:.3} TFLOP/s", bytes / 1e9, flop / 1e12);
        println!(
            "{:<36} {:<28} {:>12} {:>18} {:>8} {:>12} {:>9}",
            "operation", "shape", "time", "rate", "ceiling", "composition", "speed-up"
        );
        Ok(())
    }

    fn row(&mut self, dtype: DType, name: &str, shape: &str, value: f64, unit: &'static str) {
        let reserved = B::allocated(self.device).map(|allocated| allocated.reserved);
        self.rows.push(Row {
            name: format!("kernels.{name}"),
            device: self.device_name.clone(),
            shape: shape.to_owned(),
            value,
            unit,
            peak_memory_bytes: reserved.or_else(peak_memory_bytes),
            dtype: dtype_name(dtype),
            commit: self.commit.clone(),
        });
    }

    fn measure(&mut self, case: Case<'_>) -> Result<(), BenchError> {
        let Case { name, shape, work, call, composition, scratch_bytes, in_f32 } = case;
        let dtype = if in_f32 { DType::F32 } else { self.dtype };
        if !name.contains(self.filter) {
            return Ok(());
        }
        let seconds = self.seconds(call)?;
        let [bytes, flop] = self.ceilings;
        let (rate, unit, share) = match work {
            Work::Bytes(count) => (count as f64 / seconds / 1e9, "GB/s", count as f64 / seconds / bytes),
            Work::Flop(count) => (count as f64 / seconds / 1e12, "TFLOP/s", count as f64 / seconds / flop),
        };
        self.row(dtype, &format!("{name}.time"), &shape, seconds, "s");
        self.row(dtype, &format!("{name}.rate"), &shape, rate, unit);
        let of = if matches!(work, Work::Bytes(_)) { "of copy" } else { "of product" };
        self.row(dtype, &format!("{name}.share"), &shape, share, of);
        let micros = |seconds: f64| format!("{:.1} µs", seconds * 1e6);
        let rate = format!("{rate:.3} {unit}");
        print!("{name:<36} {shape:<28} {:>12} {rate:>18} {:>6.1} %", micros(seconds), 100.0 * share);
        match composition.filter(|_| scratch_bytes <= self.most_scratch_bytes) {
            Some(composition) => {
                B::memory_cleanup(self.device);
                let composed = self.seconds(composition)?;
                self.row(dtype, &format!("{name}.composition"), &shape, composed, "s");
                self.row(dtype, &format!("{name}.speed_up"), &shape, composed / seconds, "times");
                println!(" {:>12} {:>9.2}", micros(composed), composed / seconds);
            }
            None => println!(" {:>12} {:>9}", "-", "-"),
        }
        B::memory_cleanup(self.device);
        Ok(())
    }

    fn packed(&self, dims: [usize; 2]) -> FrozenWeight<B> {
        FrozenWeight::Nf4(B::nf4_quantize(self.random(dims).mul_scalar(0.02), true))
    }

    fn parts(&self, inner: usize, outs: &[usize], with_lora: bool) -> Vec<LinearPart<B>> {
        let r = self.sizes.r;
        let lora = |out: usize| LoraTerm {
            a: self.random_f32([r, inner]).mul_scalar(0.02),
            b: self.random_f32([out, r]).mul_scalar(0.02),
            scale: 16.0 / r as f64,
        };
        let part = |&out: &usize| LinearPart {
            weight: self.packed([out, inner]),
            lora: with_lora.then(|| lora(out)),
        };
        outs.iter().map(part).collect()
    }
}

const DROPOUT: Dropout = Dropout { probability: 0.1, key: 7 };

/// What `burn::nn::Dropout` does.
fn burn_dropout<B: KernelBackend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let kept = 1.0 - DROPOUT.probability;
    let mask = x.random_like(Distribution::Bernoulli(kept));
    (x * mask).div_scalar(kept)
}

fn packing<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { d, f, .. } = bench.sizes;
    let dtype = bench.dtype;
    for [out, inner] in [[d, d], [f, d]] {
        let count = out * inner;
        let shape = format!("[{out}, {inner}]");
        let dense = bench.random([out, inner]);
        for (double, kind) in [(false, "plain"), (true, "double")] {
            let packed = B::nf4_quantize(dense.clone(), double);
            let bytes = Work::Bytes(packed.bytes() + count * dtype.size());
            let call = || B::nf4_dequantize(&packed, dtype);
            let case = Case::new(format!("nf4_dequantize.{kind}"), shape.clone(), bytes, call);
            // Codes, levels and their stacks take four bytes a value each.
            bench.measure(case.against(|| nf4::reference(&packed, dtype)).holding(20 * count))?;
            let call = || B::nf4_quantize(dense.clone(), double);
            bench.measure(Case::new(format!("nf4_quantize.{kind}"), shape.clone(), bytes, call))?;
        }
    }
    Ok(())
}

fn projections<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { n, r, .. } = bench.sizes;
    for (name, inner, outs) in bench.sizes.joined() {
        let out = outs.iter().sum::<usize>();
        let (x, dropped) = (bench.random([n, inner]), bench.random([n, inner]));
        let input = qlora_linear::Input { x: x.into(), dropped, residual: None };
        for (with_lora, suffix) in [(false, ""), (true, "_lora")] {
            let parts = bench.parts(inner, &outs, with_lora);
            let factors = if with_lora { 2 * n * r * (inner * outs.len() + out) } else { 0 };
            let case = Case::new(
                format!("qlora_project.{name}{suffix}"),
                format!("[{n}, {inner}] [{inner}, {out}]"),
                Work::Flop(2 * n * inner * out + factors),
                || B::qlora_project(input.clone(), &parts),
            );
            bench.measure(case.against(|| qlora_linear::reference(input.clone(), &parts)))?;
        }
    }
    Ok(())
}

fn projections_backward<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { n, r, .. } = bench.sizes;
    for (name, inner, outs) in bench.sizes.joined() {
        let out = outs.iter().sum::<usize>();
        let (dropped, grad) = (bench.random([n, inner]), bench.random([n, out]));
        for (with_lora, suffix) in [(false, ""), (true, "_lora")] {
            let parts = bench.parts(inner, &outs, with_lora);
            let dropout = with_lora.then_some(DROPOUT);
            let (x, same) = (dropped.clone(), dropped.clone());
            let input = qlora_linear::Input { x: x.into(), dropped: same, residual: None };
            let u = if with_lora { B::qlora_project(input, &parts).u } else { None };
            let upstream = qlora_linear::Upstream { grad: grad.clone(), u, with_x: true };
            // dB and h along the results, dA and h A along the input.
            let factors = if with_lora { 4 * n * r * (inner * outs.len() + out) } else { 0 };
            let case = Case::new(
                format!("qlora_linear_backward.{name}{suffix}"),
                format!("[{n}, {out}] [{out}, {inner}]"),
                Work::Flop(2 * n * inner * out + factors),
                || {
                    let upstream = upstream.clone();
                    B::qlora_linear_backward(
                        dropped.clone(),
                        &parts,
                        dropout,
                        upstream,
                        &mut Spent::default(),
                    )
                },
            );
            let composition = || qlora_linear::backward(dropped.clone(), &parts, dropout, upstream.clone());
            bench.measure(case.against(composition))?;
        }
    }
    Ok(())
}

const EPSILON: f64 = 1e-5;

fn norms<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { n, d, .. } = bench.sizes;
    let (x, weight) = (bench.random([n, d]), bench.random_f32([d]));
    let reference = || rms_norm::reference(x.clone(), weight.clone(), EPSILON);
    let shape = format!("[{n}, {d}]");
    let bytes = |tensors: usize| Work::Bytes(tensors * n * d * x.dtype().size() + 4 * d);
    let case =
        Case::new("rms_norm", shape.clone(), bytes(2), || B::rms_norm(x.clone(), weight.clone(), EPSILON));
    bench.measure(case.against(reference))?;
    let case = Case::new("rms_norm_dropout", shape, bytes(3), || {
        B::rms_norm_dropout(x.clone(), weight.clone(), EPSILON, Some(DROPOUT), 0)
    });
    bench.measure(case.against(|| {
        let y = reference();
        (y.clone(), burn_dropout(y))
    }))
}

fn norms_backward<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { n, d, .. } = bench.sizes;
    let (x, weight, grad) = (bench.random([n, d]), bench.random_f32([d]), bench.random([n, d]));
    let residual = bench.random([n, d]);
    let reference = || rms_norm::backward(x.clone(), weight.clone(), EPSILON, grad.clone(), false).0;
    let shape = format!("[{n}, {d}]");
    let bytes = |tensors: usize| Work::Bytes(tensors * n * d * x.dtype().size() + 4 * d);
    let case = Case::new("rms_norm_backward", shape.clone(), bytes(3), || {
        B::rms_norm_backward(x.clone(), weight.clone(), EPSILON, grad.clone(), false)
    });
    bench.measure(case.against(reference))?;
    let case = Case::new("rms_norm_backward_residual", shape, bytes(4), || {
        let (grad, residual) = (grad.clone().into(), residual.clone());
        B::rms_norm_backward_residual(x.clone(), weight.clone(), EPSILON, grad, residual)
    });
    bench.measure(case.against(|| residual.clone() + reference()))
}

/// Rows are turned in place, as they are in training; the values among them stay.
fn rotations<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { b, t, n, d, h, k, .. } = bench.sizes;
    let rows = bench.random([n, 3 * h * k]);
    let angles = RotaryAngles::new(bench.integers([b, t], |place| place % t), k, 1e4);
    let back = RotaryAngles { cos: angles.cos.clone(), sin: angles.sin.clone().neg() };
    let shape = format!("[{n}, {}]", 3 * d);
    let bytes = Work::Bytes(2 * n * 2 * h * k * rows.dtype().size() + 4 * n * k);
    let turn = stepping(rows.clone(), |rows| B::rotary(rows, &angles, 2 * h));
    let case = Case::new("rotary", shape.clone(), bytes, turn);
    bench.measure(case.against(|| rotary::reference(rows.clone(), &angles, 2 * h)))?;
    let turn = stepping(rows.clone(), |rows| B::rotary_backward(rows, &angles, 2 * h));
    let case = Case::new("rotary_backward", shape, bytes, turn);
    bench.measure(case.against(|| rotary::reference(rows.clone(), &back, 2 * h)))
}

/// Tokens of a packed document.
const DOCUMENT: usize = 35;

fn attentions<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { b, t, n, h, k, .. } = bench.sizes;
    let heads = Heads { queries: h, keys: h, width: k };
    let [q, key, v] = heads.split(bench.random([n, 3 * h * k]), [b, t]);
    let grad = bench.random([b, t, h, k]).swap_dims(1, 2);
    let element_bytes = bench.dtype.size();
    let pairs = |length: usize| length * (length + 1) / 2;
    for (name, length) in [("dense", t), ("packed", DOCUMENT)] {
        let document = bench.integers([b, t], |place| place % t / length);
        let position = bench.integers([b, t], |place| place % t % length);
        let index = AttentionIndex::rows(document, position).prepared();
        let seen = b * h * (t / length * pairs(length) + pairs(t % length));
        // Short documents give less to multiply than there is to move.
        let work = |products: usize, tensors: usize| match name {
            "dense" => Work::Flop(products * 2 * k * seen),
            _ => Work::Bytes(tensors * n * h * k * element_bytes + 4 * n * h),
        };
        let shape = format!("{b} x {t}, {h} heads of {k}");
        let attended = <B as KernelBackend>::attention(q.clone(), key.clone(), v.clone(), &index);
        let case = Case::new(format!("attention.{name}"), shape.clone(), work(2, 4), || {
            <B as KernelBackend>::attention(q.clone(), key.clone(), v.clone(), &index)
        });
        let composition = || attention::reference(q.clone(), key.clone(), v.clone(), &index);
        let scores = 4 * b * h * t * t;
        bench.measure(case.against(composition).holding(4 * scores))?;
        let case = Case::new(format!("attention_backward.{name}"), shape, work(5, 8), || {
            let qkv = [q.clone(), key.clone(), v.clone()];
            B::attention_backward(qkv, attended.clone(), &index, grad.clone())
        });
        let composition = || attention::backward([q.clone(), key.clone(), v.clone()], &index, grad.clone());
        bench.measure(case.against(composition).holding(6 * scores))?;
    }
    Ok(())
}

fn gates<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { n, f, .. } = bench.sizes;
    let (gate_up, grad) = (bench.random([n, 2 * f]), bench.random([n, f]));
    let shape = format!("[{n}, {}]", 2 * f);
    let bytes = |tensors: usize| Work::Bytes(tensors * n * f * grad.dtype().size());
    let case = Case::new("swiglu", shape.clone(), bytes(3), || B::swiglu(gate_up.clone()));
    bench.measure(case.against(|| swiglu::reference(gate_up.clone())))?;
    let call = || B::swiglu_dropout(gate_up.clone(), Some(DROPOUT), 0);
    let case = Case::new("swiglu_dropout", shape.clone(), bytes(4), call);
    bench.measure(case.against(|| {
        let y = swiglu::reference(gate_up.clone());
        (y.clone(), burn_dropout(y))
    }))?;
    let call = || B::swiglu_backward(gate_up.clone(), grad.clone().into());
    let case = Case::new("swiglu_backward", shape, bytes(5), call);
    bench.measure(case.against(|| swiglu::backward(gate_up.clone(), grad.clone())))
}

fn dropouts<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { n, d, .. } = bench.sizes;
    let x = bench.random([n, d]);
    let bytes = Work::Bytes(2 * n * d * x.dtype().size());
    let case = Case::new("dropout", format!("[{n}, {d}]"), bytes, || B::dropout(x.clone(), DROPOUT));
    bench.measure(case.against(|| burn_dropout(x.clone())))
}

fn losses<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { t, d, v, .. } = bench.sizes;
    let (hidden, head) = (bench.random([t, d]), bench.random([v, d]).mul_scalar(0.02));
    let targets = bench.integers([t], |place| place * 7919 % v);
    let inputs = || (hidden.clone(), head.clone(), targets.clone());
    let shape = format!("[{t}, {d}] [{d}, {v}]");
    let scale = 1.0 / t as f64;
    let case = Case::new("cross_entropy", shape.clone(), Work::Flop(2 * t * d * v), || {
        let (hidden, head, targets) = inputs();
        B::cross_entropy(hidden, head, targets)
    });
    bench.measure(case.against(|| {
        let (hidden, head, targets) = inputs();
        cross_entropy::losses(hidden, head, targets)
    }))?;
    let case = Case::new("cross_entropy_with_gradient", shape, Work::Flop(4 * t * d * v), || {
        let (hidden, head, targets) = inputs();
        B::cross_entropy_with_gradient(hidden, head, targets, scale, false)
    });
    bench.measure(case.against(|| {
        let (hidden, head, targets) = inputs();
        cross_entropy::with_gradient(hidden, head, targets, scale, false)
    }))
}

/// One of LoRA's factors, which a cache may hold, and a parameter as large as a whole weight.
fn moments<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { d, f, r, .. } = bench.sizes;
    let settings = AdamW {
        learning_rate: 2e-4,
        beta_1: 0.9,
        beta_2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        step: 10,
        gradient_scale: 1.0,
    };
    for [out, inner] in [[f, r], [f, d]] {
        let count = out * inner;
        let shape = format!("[{out}, {inner}]");
        let (parameter, gradient) = (bench.random_f32([out, inner]), bench.random_f32([out, inner]));
        let state = || (parameter.clone(), AdamWState::zeros_like(&parameter));
        let call = stepping(state(), |(p, state)| B::adamw_step(p, gradient.clone(), state, &settings));
        let case = Case::new("adamw_step", shape.clone(), Work::Bytes(28 * count), call);
        let composition =
            stepping(state(), |(p, state)| adamw::reference(p, gradient.clone(), state, &settings));
        bench.measure(case.against(composition).in_f32())?;
        let state = || (parameter.clone(), AdamWState8::zeros(count, bench.device));
        let call = stepping(state(), |(p, state)| B::adamw_step8(p, gradient.clone(), state, &settings));
        // Two moments of a byte and the scales of their blocks, read and written.
        let bytes = 12 * count + 2 * 2 * (count + 4 * count.div_ceil(adamw::BLOCK_8BIT));
        let composition =
            stepping(state(), |(p, state)| adamw::reference8(p, gradient.clone(), state, &settings));
        let case = Case::new("adamw_step8", shape, Work::Bytes(bytes), call);
        // The search for the nearest levels holds indices and levels, of four bytes each or more.
        bench.measure(case.against(composition).holding(64 * count).in_f32())?;
    }
    Ok(())
}

/// All factors of a model, as for the norm of its gradients.
fn squares<B: KernelBackend>(bench: &mut Bench<'_, B>) -> Result<(), BenchError> {
    let Sizes { r, blocks, .. } = bench.sizes;
    let mut factors = Vec::new();
    for _ in 0..blocks {
        for (_, inner, outs) in bench.sizes.joined() {
            for out in outs {
                factors.extend([bench.random_f32([r, inner]), bench.random_f32([out, r])]);
            }
        }
    }
    let bytes = 4 * factors.iter().map(|factor| factor.dims().iter().product::<usize>()).sum::<usize>();
    let shape = format!("{} tensors", factors.len());
    let case = Case::new("sum_of_squares", shape, Work::Bytes(bytes), || B::sum_of_squares(factors.clone()));
    bench.measure(case.in_f32().against(|| {
        let sums = factors.iter().map(|factor| factor.clone().square().sum());
        sums.reduce(|sum, next| sum + next)
    }))
}
