//! What the benches share: where they run, what they report, and how they end.
//!
//! A bench prints a table for people and writes rows for machines (DESIGN section 7). It measures one process, so the
//! peak of its memory is the operating system's own count and not an estimate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use buzzer::burn::tensor::{DType, Distribution, Tensor};
use buzzer::kernels::{Card, FrozenWeight, KernelBackend, LinearPart, qlora_linear};
use buzzer::model::LlamaConfig;
use buzzer::{Device, DeviceJob};
use clap::{Args, ValueEnum};
use serde::Serialize;

/// Seconds that the calls between two waits for the device take together, so that waiting and launching are hidden.
pub const BATCH_SECONDS: f64 = 0.05;

/// Batches of calls that are timed; the median of them is told.
const REPEATS: usize = 7;

/// Most calls between two waits.
const MOST_CALLS: f64 = 100.0;

/// What every bench on a device takes.
#[derive(Args, Clone, Debug)]
pub struct CommonArgs {
    /// Where to run [default: the best device here].
    #[arg(long, default_value_t, hide_default_value = true)]
    pub device: Device,
    /// Take the driver for one of this version, 12040 for 12.4, to measure what happens on it.
    #[cfg(feature = "cuda")]
    #[arg(long, hide = true, value_name = "VERSION")]
    assume_driver: Option<u32>,
    /// Write the rows of the table here as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Cargo passes this to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

impl CommonArgs {
    /// The device to run on, taken with the driver that was asked for.
    #[must_use]
    pub fn choose_device(&self) -> Device {
        #[cfg(feature = "cuda")]
        if let Some(version) = self.assume_driver {
            buzzer::kernels::assume_driver(version);
        }
        self.device
    }

    /// Writes the rows where they were asked for.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, rows: &[Row]) -> Result<(), BenchError> {
        match &self.json {
            Some(path) => Ok(write_rows(path, rows)?),
            None => Ok(()),
        }
    }
}

/// One measured number.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured, for example `ingest.read`.
    pub name: String,
    /// Where it ran.
    pub device: String,
    /// The size of the input, in words.
    pub shape: String,
    /// The number.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// Peak memory of the process so far on the host, or of the device.
    pub peak_memory_bytes: Option<u64>,
    /// Type of the numbers computed with.
    pub dtype: &'static str,
    /// Commit that was built.
    pub commit: String,
}

/// Rows that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; check the path given to --json", path = path.display())]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// The cause.
    pub source: std::io::Error,
}

/// What stops a bench.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The clue file.
    #[error(transparent)]
    Data(#[from] buzzer::data::DataError),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] buzzer::text::TextError),
    /// A request.
    #[error(transparent)]
    Infer(#[from] buzzer::infer::InferError),
    /// A training step.
    #[error(transparent)]
    Train(#[from] buzzer::train::TrainError),
    /// The list of linears.
    #[error(transparent)]
    Model(#[from] buzzer::model::ModelError),
    /// The results.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A checkpoint's tensors.
    #[error(transparent)]
    Weights(#[from] buzzer::weights::WeightsError),
    /// A folder that is no checkpoint.
    #[error("{path}: no weights of a Hugging Face checkpoint; give a folder with safetensors or PyTorch files to --checkpoint", path = .0.display())]
    Checkpoint(PathBuf),
    /// A file of a checkpoint.
    #[error("{path}: {source}; check --checkpoint", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// No temporary folder.
    #[error("no temporary folder: {0}; set TMPDIR to a folder with space")]
    Temporary(std::io::Error),
    /// The workspace.
    #[error("the workspace's root: {0}; run the program itself instead of through cargo")]
    Root(std::io::Error),
    /// The device.
    #[error("the device stopped: {0}; run again with a smaller --batch, --seq or --rows if memory ran out")]
    Device(String),
    /// No operation to measure.
    #[error(
        "--filter {0}: no operation has this in its name; see the names in the table of a run without --filter"
    )]
    Filter(String),
}

/// Writes rows as one JSON array.
///
/// # Errors
/// If the file cannot be written.
pub fn write_rows(path: &Path, rows: &[Row]) -> Result<(), WriteError> {
    let text = serde_json::to_string_pretty(rows).unwrap_or_default() + "\n";
    fs::write(path, text).map_err(|source| WriteError { path: path.to_owned(), source })
}

/// Goes to the workspace's root when cargo runs the program, because cargo starts benches in their own folder while
/// the paths of a command line are meant from the root, where the command is typed.
///
/// # Errors
/// If the folder is gone.
pub fn enter_workspace_root() -> std::io::Result<()> {
    match std::env::var_os("CARGO_MANIFEST_DIR") {
        Some(package) => std::env::set_current_dir(Path::new(&package).join("..")),
        None => Ok(()),
    }
}

/// Runs a bench on a device, from the workspace's root, and says what stopped it; status 2 if something did.
pub fn run_bench<J: DeviceJob<Output = Result<(), BenchError>>>(
    name: &str,
    device: Device,
    job: J,
) -> ExitCode {
    match enter_workspace_root().map_err(BenchError::Root).and_then(|()| device.run(job)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::from(2)
        }
    }
}

/// Most memory that this process has held, in bytes; unknown outside Linux.
#[must_use]
pub fn peak_memory_bytes() -> Option<u64> {
    memory_of_process("VmHWM:")
}

/// What a line of `/proc/self/status` says of this process's memory, in bytes; unknown outside Linux.
#[must_use]
pub fn memory_of_process(line: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = status.lines().find_map(|text| text.strip_prefix(line))?;
    let kibibytes: u64 = kibibytes.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The commit checked out here, or `unknown`.
#[must_use]
pub fn commit() -> String {
    let output = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    let commit = text.and_then(|text| String::from_utf8(text).ok()).map(|text| text.trim().to_owned());
    commit.filter(|commit| !commit.is_empty()).unwrap_or_else(|| "unknown".to_owned())
}

/// A dtype to compute in, as named on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compute {
    /// 32 bits.
    F32,
    /// 16 bits, 10 of them fraction.
    F16,
    /// 16 bits, 7 of them fraction.
    Bf16,
}

impl Compute {
    /// What was chosen, or what the card has; f32 on the processor.
    #[must_use]
    pub fn dtype(choice: Option<Self>, card: Option<&Card>) -> DType {
        match choice {
            Some(Self::F32) => DType::F32,
            Some(Self::F16) => DType::F16,
            Some(Self::Bf16) => DType::BF16,
            None => card.map_or(DType::F32, Card::compute_dtype),
        }
    }
}

/// Name of a dtype in a row.
#[must_use]
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// Whether a device is measured at Llama-2-7B's shapes by default: a CUDA card is, other devices get tiny shapes.
#[must_use]
pub fn is_large(card: Option<&Card>) -> bool {
    card.is_some_and(|card| card.compute_capability.is_some())
}

/// Normal random numbers (σ 1).
#[must_use]
pub fn random<B: KernelBackend, const D: usize>(
    dims: [usize; D],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::<B, D>::random(dims, Distribution::Normal(0.0, 1.0), (device, DType::F32)).cast(dtype)
}

/// Waits until the device has done all that it was given.
///
/// # Errors
/// If the device failed at any of it.
pub fn wait<B: KernelBackend>(device: &B::Device) -> Result<(), BenchError> {
    B::sync(device).map_err(|error| BenchError::Device(format!("{error:?}")))
}

/// Median seconds of a call, over batches of calls that take about `batch_seconds` each. Calls that are not counted go
/// before: kernels are compiled and tuned in the first, and clocks rise in the rest.
///
/// # Errors
/// If the device fails.
pub fn median_seconds<B: KernelBackend>(
    device: &B::Device,
    batch_seconds: f64,
    mut call: impl FnMut(),
) -> Result<f64, BenchError> {
    let mut timed = |calls: usize| {
        let begin = Instant::now();
        for _ in 0..calls {
            call();
        }
        wait::<B>(device).map(|()| begin.elapsed().as_secs_f64() / calls as f64)
    };
    timed(2)?;
    let calls = (batch_seconds / timed(1)?.max(1e-9)).clamp(1.0, MOST_CALLS) as usize;
    // A single call shows what launching costs; several show what the call takes.
    let calls = (batch_seconds / timed(calls)?.max(1e-9)).clamp(1.0, MOST_CALLS) as usize;
    let mut seconds = (0..REPEATS).map(|_| timed(calls)).collect::<Result<Vec<_>, _>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[REPEATS / 2])
}

/// Shapes of models that benches draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shapes {
    /// Llama-2-7B
    #[value(name = "llama2-7b")]
    Llama2_7b,
    /// Two narrow blocks
    Tiny,
}

impl Shapes {
    /// The one asked for, or the one that the device is for.
    #[must_use]
    pub fn or_of(asked: Option<Self>, card: Option<&Card>) -> Self {
        asked.unwrap_or(if is_large(card) { Self::Llama2_7b } else { Self::Tiny })
    }

    /// Its sizes.
    #[must_use]
    pub fn config(self) -> LlamaConfig {
        match self {
            Self::Llama2_7b => LlamaConfig::llama2_7b(),
            Self::Tiny => LlamaConfig {
                vocab_size: 512,
                hidden_size: 128,
                intermediate_size: 352,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                num_key_value_heads: 4,
                head_dim: 32,
                ..LlamaConfig::llama2_7b()
            },
        }
    }
}

/// Token ids below `vocabulary` that look random, others for every number.
#[must_use]
pub fn random_ids(number: u64, count: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut id = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocabulary as u64) as u32
    };
    (0..count).map(|_| id()).collect()
}

/// Bytes a second that a copy of so many numbers in f32 reads and writes, the ceiling of everything that moves memory.
///
/// # Errors
/// If the device fails.
pub fn copy_rate<B: KernelBackend>(
    elements: usize,
    batch_seconds: f64,
    device: &B::Device,
) -> Result<f64, BenchError> {
    let x = random::<B, 1>([elements], DType::F32, device);
    let seconds = median_seconds::<B>(device, batch_seconds, || drop(x.clone().mul_scalar(1.0)))?;
    Ok((2 * size_of::<f32>() * elements) as f64 / seconds)
}

/// Rows of a product that is as fast as products of this width get.
#[must_use]
pub fn product_rows(d: usize) -> usize {
    if d < 1024 { 512 } else { 8192 }
}

/// Operations a second of a plain product `[n, d] [d, f]`, the ceiling of everything that multiplies.
///
/// # Errors
/// If the device fails.
pub fn product_rate<B: KernelBackend>(
    [n, d, f]: [usize; 3],
    dtype: DType,
    batch_seconds: f64,
    device: &B::Device,
) -> Result<f64, BenchError> {
    let x = random::<B, 2>([n, d], dtype, device);
    let weight = FrozenWeight::Dense(random::<B, 2>([f, d], dtype, device));
    let part = [LinearPart { weight, lora: None }];
    let seconds = median_seconds::<B>(device, batch_seconds, || {
        let input = qlora_linear::Input { x: x.clone().into(), dropped: x.clone(), residual: None };
        drop(B::qlora_project(input, &part));
    })?;
    Ok((2 * n * d * f) as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_an_array_of_flat_objects() {
        let row = Row {
            name: "a.b".into(),
            device: "cpu".into(),
            shape: "3 rows".into(),
            value: 1.5,
            unit: "s",
            peak_memory_bytes: None,
            dtype: "u32",
            commit: commit(),
        };
        let json = serde_json::to_value([row]).unwrap();
        assert_eq!(json[0]["value"], 1.5);
        assert!(json[0]["peak_memory_bytes"].is_null());
        assert!(!json[0]["commit"].as_str().unwrap().is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_is_at_least_a_megabyte() {
        assert!(peak_memory_bytes().unwrap() > 1 << 20);
    }
}
