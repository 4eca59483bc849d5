//! Checks this build against a golden directory: a run of transformers, PEFT and bitsandbytes.
//!
//! `parity --golden DIR [--device D] [--dtype T] [--out DIR]` prints a row per check with its largest error and its bound, and exits
//! with status 1 if one is over. Any directory of the same layout is checked by its path alone: sizes come from its
//! files. In bf16 and f16 only the losses of the training are compared, since the reference computed in f32. For users who want to trust a new card, and for CI.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::planning::{DtypeArg, device_dtype};
use crate::{Failure, finish, read_json, run_on, write_report};
use buzzer::burn::tensor::{DType, Int, Tensor, TensorData};
use buzzer::data::Batch;
use buzzer::infer::{Engine, EngineSettings, Request};
use buzzer::kernels::{KernelBackend, Nf4Tensor};
use buzzer::model::{BlockContext, Llama, Target, Weight, block_tensor};
use buzzer::text::Tokenizer;
use buzzer::train::{
    DeviceBatch, LoraOptimizer, OptimizerSettings, PassSettings, Schedule, ScheduleKind, backward_by_blocks,
};
use buzzer::weights::{Absmax, Adapter, Checkpoint, Nf4Stored, Quantization, attach_adapter, load_llama};
use buzzer::{Device, DeviceJob};
use clap::Parser;
use serde::{Deserialize, Serialize};

/// Check this build against a golden directory.
#[derive(Parser)]
#[command(name = "parity")]
struct Args {
    /// Directory made by a reference run (model, adapters, logits, training log)
    #[arg(long, value_name = "DIR")]
    golden: PathBuf,
    /// Device to check
    #[arg(long, default_value_t, hide_default_value = true)]
    device: Device,
    /// Dtype to compute in
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    dtype: DtypeArg,
    /// Compare the losses of the training, and nothing else
    #[arg(long)]
    training_only: bool,
    /// Folder for report.json
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Take the driver for one of this version, 12040 for 12.4, to check what happens on it
    #[cfg(feature = "cuda")]
    #[arg(long, hide = true, value_name = "VERSION")]
    assume_driver: Option<u32>,
}

/// One comparison.
#[derive(Serialize)]
struct Check {
    name: String,
    /// Largest absolute error, unless the name says otherwise.
    error: f64,
    bound: f64,
    passed: bool,
}

#[derive(Deserialize)]
struct TrainLog {
    log: Vec<LoggedStep>,
}

#[derive(Deserialize)]
struct LoggedStep {
    loss: f64,
    grad_norm: f64,
    lr: f64,
}

#[derive(Deserialize)]
struct Greedy {
    prompt: String,
    input_ids: Vec<u32>,
    output_ids: Vec<u32>,
}

/// Rows of a step in the reference training.
const TRAIN_ROWS: usize = 4;
/// The flag that names the golden directory, for errors.
const FLAG: &str = "--golden";

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    finish(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Failure> {
    #[cfg(feature = "cuda")]
    if let Some(version) = args.assume_driver {
        buzzer::kernels::assume_driver(version);
    }
    let Args { device, dtype, training_only, .. } = *args;
    let Outcome { checks, losses } = run_on(device, Parity { golden: &args.golden, dtype, training_only })?;
    println!("{:<58} {:>12} {:>12}", "check", "error", "bound");
    for check in &checks {
        let mark = if check.passed { "" } else { "  OVER" };
        println!("{:<58} {:>12.3e} {:>12.3e}{mark}", check.name, check.error, check.bound);
    }
    let failed = checks.iter().filter(|check| !check.passed).count();
    println!("{} passed, {failed} failed", checks.len() - failed);
    if let Some(out) = &args.out {
        #[derive(Serialize)]
        struct Report<'a> {
            device: String,
            golden: &'a Path,
            dtype: String,
            checks: &'a [Check],
            losses: &'a Losses,
        }
        let report = Report {
            device: args.device.to_string(),
            golden: &args.golden,
            dtype: format!("{:?}", args.dtype).to_lowercase(),
            checks: &checks,
            losses: &losses,
        };
        write_report(out, &report)?;
    }
    if failed > 0 { Err(Failure::check(format!("{failed} checks are over their bounds"))) } else { Ok(()) }
}

struct Parity<'a> {
    golden: &'a Path,
    dtype: DtypeArg,
    training_only: bool,
}

/// What was found.
struct Outcome {
    checks: Vec<Check>,
    losses: Losses,
}

/// Training losses by step: the reference's and ours.
#[derive(Default, Serialize)]
struct Losses {
    reference: Vec<f64>,
    ours: Vec<f64>,
}

impl DeviceJob for Parity<'_> {
    type Output = Result<Outcome, Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Self::Output {
        let values = Checkpoint::open_for(&self.golden.join("golden.safetensors"), FLAG)?;
        let dtype = device_dtype::<B>(Some(self.dtype), device)?;
        let mut golden = Golden::<B> {
            dir: self.golden,
            values,
            dtype,
            training_only: self.training_only,
            device,
            checks: Vec::new(),
        };
        if dtype == DType::F32 && !self.training_only {
            golden.packed_weights("bnb-nf4", false)?;
            golden.packed_weights("bnb-nf4-dq", true)?;
            golden.dense()?;
            golden.quantized("nf4", Quantization::Nf4)?;
            golden.quantized("nf4_dq", Quantization::Nf4Double)?;
            golden.greedy()?;
        }
        let losses = golden.training()?;
        Ok(Outcome { checks: golden.checks, losses })
    }
}

struct Golden<'a, B: KernelBackend> {
    dir: &'a Path,
    values: Checkpoint,
    dtype: DType,
    training_only: bool,
    device: &'a B::Device,
    checks: Vec<Check>,
}

/// Rows of tokens with their places.
struct Rows {
    dims: [usize; 2],
    ids: Vec<i32>,
    documents: Vec<i32>,
    positions: Vec<i32>,
    labels: Vec<i32>,
}

impl<B: KernelBackend> Golden<'_, B> {
    fn check(&mut self, name: impl Into<String>, error: f64, bound: f64) {
        self.checks.push(Check { name: name.into(), error, bound, passed: error <= bound });
    }

    fn model(&self, quantization: Quantization) -> Result<Llama<B>, Failure> {
        Ok(load_llama(&self.dir.join("model"), quantization, self.dtype, self.device)?)
    }

    fn with_adapter(&self, quantization: Quantization, name: &str) -> Result<Llama<B>, Failure> {
        let mut model = self.model(quantization)?;
        let dir = self.dir.join(name);
        attach_adapter(&mut model, &Adapter::read(&dir)?, &dir)?;
        Ok(model)
    }

    fn rows(&self, prefix: &str) -> Result<Rows, Failure> {
        let read = |name: &str| {
            let (shape, values) = self.values.read_i64(&format!("{prefix}{name}"))?;
            Ok::<_, Failure>((shape, values.into_iter().map(|value| value as i32).collect::<Vec<i32>>()))
        };
        let (shape, ids) = read("input_ids")?;
        let [rows, len] = shape[..] else {
            return Err(Failure::input(format!("{prefix}input_ids has shape {shape:?}, not [rows, tokens]")));
        };
        Ok(Rows {
            dims: [rows, len],
            ids,
            documents: read("document_ids")?.1,
            positions: read("position_ids")?.1,
            labels: read("labels")?.1,
        })
    }

    fn int(&self, values: Vec<i32>, dims: [usize; 2]) -> Tensor<B, 2, Int> {
        Tensor::from_data(TensorData::new(values, dims), self.device)
    }

    /// Logits of the evaluation rows as one row of values; plain causal attention unless `packed`.
    fn logits(&self, model: &Llama<B>, packed: bool) -> Result<Vec<f32>, Failure> {
        let rows = self.rows("")?;
        let [b, t] = rows.dims;
        let (documents, positions) = if packed {
            (rows.documents, rows.positions)
        } else {
            (vec![0; b * t], (0..b).flat_map(|_| 0..t as i32).collect())
        };
        let context =
            BlockContext::rows(model.config(), self.int(documents, [b, t]), self.int(positions, [b, t]));
        let hidden = model.hidden(self.int(rows.ids, [b, t]), &context, None);
        Ok(model.logits(hidden).into_data().iter::<f32>().collect())
    }

    fn compare_logits(
        &mut self,
        name: &str,
        values: &Checkpoint,
        found: &[f32],
        bound: f64,
    ) -> Result<(), Failure> {
        let (_, expected) = values.read_f32_any_shape(name)?;
        self.check(name, largest_error(found, &expected), bound);
        Ok(())
    }

    fn dense(&mut self) -> Result<(), Failure> {
        let model = self.model(Quantization::None)?;
        let values = Checkpoint::open_for(&self.dir.join("golden.safetensors"), FLAG)?;
        let found = self.logits(&model, false)?;
        self.compare_logits("logits_dense", &values, &found, 2e-3)?;

        let documents = self.rows("")?.documents;
        let (_, expected) = values.read_f32_any_shape("logits_packed")?;
        let found = self.logits(&model, true)?;
        let width = model.config().vocab_size;
        let real = documents.iter().enumerate().filter(|&(_, &document)| document >= 0);
        let error = real
            .map(|(place, _)| place * width..(place + 1) * width)
            .map(|range| largest_error(&found[range.clone()], &expected[range]))
            .fold(0.0, f64::max);
        self.check("logits_packed", error, 2e-3);

        let mut merged = self.with_adapter(Quantization::None, "adapter-final")?;
        merged.merge_lora();
        let values = Checkpoint::open_for(&self.dir.join("golden_merged.safetensors"), FLAG)?;
        let found = self.logits(&merged, false)?;
        self.compare_logits("logits_merged", &values, &found, 2e-3)
    }

    /// Our quantization of every linear against the stored one: the number of parts that differ in any bit.
    fn packed_weights(&mut self, folder: &str, double: bool) -> Result<(), Failure> {
        let quantization = if double { Quantization::Nf4Double } else { Quantization::Nf4 };
        let model = self.model(quantization)?;
        let stored = Checkpoint::open_for(&self.dir.join(folder), FLAG)?;
        let (mut codes, mut scales) = (0_usize, 0_usize);
        for (layer, block) in model.blocks.iter().enumerate() {
            for target in Target::ALL {
                let name = block_tensor(layer, &format!("{}.weight", target.hf_path()));
                let Weight::Nf4(ours) = &block.linear(target).weight else { continue };
                let theirs = Nf4Stored::read(&stored, &name, ours.dims())?;
                codes += differing(&ours.host_codes(), &theirs.codes);
                scales += differing_scales(ours, &theirs.absmax);
            }
        }
        self.check(format!("{folder}: codes, bytes that differ"), codes as f64, 0.0);
        self.check(format!("{folder}: absmax, values that differ"), scales as f64, 0.0);
        Ok(())
    }

    fn quantized(&mut self, name: &str, quantization: Quantization) -> Result<(), Failure> {
        let model = self.model(quantization)?;
        let values = Checkpoint::open_for(&self.dir.join("golden.safetensors"), FLAG)?;
        let dense = model.blocks[0].linear(Target::Q).weight.dense(DType::F32);
        let dense: Vec<f32> = dense.into_data().iter::<f32>().collect();
        self.compare_logits(&format!("dequant_q0_{name}"), &values, &dense, 1e-6)?;
        let found = self.logits(&model, false)?;
        self.compare_logits(&format!("logits_{name}"), &values, &found, 5e-3)?;
        if quantization == Quantization::Nf4Double {
            let adapted = self.with_adapter(quantization, "adapter-final")?;
            let found = self.logits(&adapted, false)?;
            self.compare_logits("logits_nf4_dq_adapter_final", &values, &found, 5e-3)?;
        }
        Ok(())
    }

    /// The reference training, step by step on the same rows.
    fn training(&mut self) -> Result<Losses, Failure> {
        let TrainLog { log } = read_json(&self.dir.join("train_log.json"))?;
        let rows = self.rows("train_")?;
        // Fixed: gradients of f16 below 6e-8 are none.
        let loss_scale = if self.dtype == DType::F16 { 4096.0 } else { 1.0 };
        let mut losses = Losses::default();
        let mut model = self.with_adapter(Quantization::Nf4Double, "adapter-init")?;
        let mut optimizer = LoraOptimizer::new(OptimizerSettings::default());
        let peak = log.iter().map(|step| step.lr).fold(0.0, f64::max);
        let total = log.len() as u64;
        let schedule = Schedule::new(ScheduleKind::Cosine, peak, total / 10, total);
        let (mut norm_error, mut rate_error) = (0.0_f64, 0.0_f64);
        for (step, logged) in log.iter().enumerate() {
            let batch = DeviceBatch::<B>::new(&rows.batch(step * TRAIN_ROWS, TRAIN_ROWS)?, self.device);
            let scale = 1.0 / batch.loss_tokens as f64;
            let pass = backward_by_blocks(&model, &batch, &PassSettings::new(scale * loss_scale));
            if step == 0 && self.dtype == DType::F32 && !self.training_only {
                self.gradients(&pass.gradients)?;
            }
            let rate = schedule.rate(step as u64);
            losses.reference.push(logged.loss);
            losses.ours.push(pass.loss_sum() * scale);
            let norm = optimizer.step_scaled(&mut model, &pass.gradients, rate, loss_scale);
            norm_error = larger(norm_error, (norm / logged.grad_norm - 1.0).abs());
            rate_error = larger(rate_error, (rate - logged.lr).abs());
        }
        let single = self.dtype == DType::F32;
        self.check(format!("{total} training losses"), losses.worst(), if single { 5e-3 } else { 3e-2 });
        self.check(format!("{total} training losses (relative, mean)"), losses.mean(), 1e-2);
        self.check(format!("{total} learning rates"), rate_error, 1e-9);
        if !single || self.training_only {
            return Ok(losses);
        }
        self.check(format!("{total} gradient norms (relative)"), norm_error, 1e-2);
        let found = self.logits(&model, false)?;
        let (_, expected) = self.values.read_f32_any_shape("logits_nf4_dq_adapter_final")?;
        self.check("logits_nf4_dq_adapter_final, our own training", largest_error(&found, &expected), 3e-2);
        Ok(losses)
    }

    fn gradients(&mut self, found: &buzzer::train::LoraGradients<B>) -> Result<(), Failure> {
        let expected = Checkpoint::open_for(&self.dir.join("grads_step0.safetensors"), FLAG)?;
        let mut worst = 0.0_f64;
        for ((layer, target), factors) in &found.factors {
            for (side, factor) in ["A", "B"].into_iter().zip(factors) {
                let rest = format!("{}.lora_{side}.weight", target.hf_path());
                let name = format!("base_model.model.{}", block_tensor(*layer, &rest));
                let expected = expected.read_f32(&name, &factor.dims())?;
                let found: Vec<f32> = factor.clone().into_data().iter::<f32>().collect();
                worst = larger(worst, relative_error(&found, &expected));
            }
        }
        let missing = expected.names().len() - 2 * found.factors.len();
        self.check("gradients of step 0: factors without one", missing as f64, 0.0);
        self.check("gradients of step 0 (relative L2, worst factor)", worst, 1e-3);
        Ok(())
    }

    fn greedy(&mut self) -> Result<(), Failure> {
        let references: Vec<Greedy> = read_json(&self.dir.join("greedy_base.json"))?;
        let tokenizer = Tokenizer::from_file(&self.dir.join("model"))?;
        let model = self.model(Quantization::None)?;
        tokenizer.check_vocab(model.config().vocab_size)?;
        let (mut prompts, mut requests, mut expected) = (0, Vec::new(), Vec::new());
        for Greedy { prompt: text, input_ids, output_ids } in &references {
            let mut prompt = vec![tokenizer.bos_id()];
            prompt.extend(tokenizer.encode(text)?);
            prompts += usize::from(prompt != *input_ids);
            requests.push(Request::new(input_ids.clone()).with_max_new_tokens(output_ids.len()));
            let end = output_ids.iter().position(|&id| id == tokenizer.eos_id());
            expected.push(&output_ids[..end.unwrap_or(output_ids.len())]);
        }
        let mut engine = Engine::new(model, EngineSettings::default())?.with_tokenizer(tokenizer);
        // Alone, then all together.
        let mut found = Vec::new();
        for request in &requests {
            found.extend(engine.complete([request.clone()], |_, _| {})?);
        }
        found.extend(engine.complete(requests, |_, _| {})?);
        let expected = expected.iter().chain(&expected);
        let answers =
            found.iter().zip(expected).filter(|(found, expected)| found.tokens != **expected).count();
        self.check(
            format!("tokens of {} prompts, prompts that differ", references.len()),
            prompts as f64,
            0.0,
        );
        self.check(
            format!("greedy continuations of {} prompts, alone and together, that differ", references.len()),
            answers as f64,
            0.0,
        );
        Ok(())
    }
}

impl Losses {
    fn differences(&self) -> impl Iterator<Item = (f64, f64)> {
        self.reference.iter().zip(&self.ours).map(|(reference, ours)| ((ours - reference).abs(), *reference))
    }

    fn worst(&self) -> f64 {
        self.differences().map(|(difference, _)| difference).fold(0.0, larger)
    }

    fn mean(&self) -> f64 {
        let relative = self.differences().map(|(difference, reference)| difference / reference);
        relative.sum::<f64>() / self.reference.len().max(1) as f64
    }
}

impl Rows {
    fn batch(&self, first: usize, count: usize) -> Result<Batch, Failure> {
        let [rows, len] = self.dims;
        if first + count > rows {
            return Err(Failure::input(format!(
                "train_input_ids has {rows} rows, the log needs {}",
                first + count
            )));
        }
        let part = |column: &[i32]| column[first * len..(first + count) * len].to_vec();
        let (documents, labels) = (part(&self.documents), part(&self.labels));
        Ok(Batch {
            rows: count,
            len,
            ids: part(&self.ids),
            positions: part(&self.positions),
            tokens: documents.iter().filter(|&&document| document >= 0).count(),
            loss_tokens: labels.iter().filter(|&&label| label >= 0).count(),
            documents,
            labels,
        })
    }
}

fn largest_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let error = |(a, b): (&f32, &f32)| f64::from((a - b).abs());
    found.iter().zip(expected).map(error).fold(0.0, larger)
}

/// The larger of two errors. A NaN is the largest there is; `max` would pass over it.
fn larger(most: f64, error: f64) -> f64 {
    if error.is_nan() { f64::INFINITY } else { most.max(error) }
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    let size = norm(&mut expected.iter().map(|&value| f64::from(value)));
    if difference == 0.0 { 0.0 } else { difference / size }
}

fn differing<T: PartialEq>(ours: &[T], theirs: &[T]) -> usize {
    ours.len().abs_diff(theirs.len()) + ours.iter().zip(theirs).filter(|(a, b)| a != b).count()
}

fn differing_scales<B: KernelBackend>(ours: &Nf4Tensor<B>, theirs: &Absmax) -> usize {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    match (ours.host_double(), theirs) {
        (None, Absmax::Plain(theirs)) => differing(&bits(&ours.host_absmax()), &bits(theirs)),
        (Some(ours), Absmax::Double(theirs)) => {
            differing(&ours.codes, &theirs.codes)
                + differing(&bits(&ours.nested_absmax), &bits(&theirs.nested_absmax))
                + usize::from(ours.offset.to_bits() != theirs.offset.to_bits())
        }
        _ => usize::MAX,
    }
}
