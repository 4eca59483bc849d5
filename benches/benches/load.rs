//! Loads a checkpoint to NF4 on a device, as the programs do, and tells what it takes beside reading the files alone.
//!
//! `cargo bench --bench load --features cuda -- --checkpoint DIR --json FILE`. Without `--checkpoint` it writes a tiny one of random
//! weights in several files and loads that. `benches/load/make_checkpoint.py` writes one of Llama-2-7B's shape. The files are read
//! twice before they are loaded: after the first pass the page cache holds what it can of them, so the second pass and the load
//! meet it in the same state, and the first pass tells how far the disk is behind it. A tiny checkpoint is loaded before all, so that
//! kernels are compiled by then.
//!
//! Files are mapped, and what a device does not pack is read through the map, so pages of the page cache count in the resident size while they are looked at, though the kernel can take
//! them back at any time. The figure for memory is therefore the peak of the anonymous pages (`RssAnon`), sampled while the
//! model is loaded; the resident peak (`VmHWM`) of the whole process stands beside it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use buzzer::DeviceJob;
use buzzer::burn::tensor::DType;
use buzzer::kernels::KernelBackend;
use buzzer::model::{Llama, Target};
use buzzer::weights::{
    FloatType, Merge, Quantization, WEIGHT_FILES, indexed_files, load_llama, model_tensors, write_merged,
    write_model,
};
use buzzer_benches::{
    BenchError, CommonArgs, Compute, Row, Shapes, commit, dtype_name, memory_of_process, peak_memory_bytes,
    run_bench, wait,
};
use clap::Parser;
use tempfile::TempDir;

/// Bytes that one read of the plain passes asks for.
const BUFFER_BYTES: usize = 8 << 20;
/// Between two looks at the memory of this process.
const SAMPLED_EVERY: Duration = Duration::from_millis(2);
/// Size of the tiny checkpoint's files, so that there are several.
const TINY_SHARD_BYTES: u64 = 256 << 10;

/// Time loading a checkpoint to NF4.
#[derive(Parser, Clone)]
#[command(name = "load")]
struct Arguments {
    /// Folder of a Hugging Face checkpoint [default: a tiny one of random weights].
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Dtype of what is not packed [default: what the device has].
    #[arg(long, value_enum)]
    dtype: Option<Compute>,
    #[command(flatten)]
    common: CommonArgs,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run_bench("load", arguments.common.choose_device(), Job(&arguments))
}

struct Job<'a>(&'a Arguments);

/// What one load took.
struct Loaded {
    seconds: f64,
    anonymous_before: Option<u64>,
    anonymous_peak: Option<u64>,
    resident_peak: Option<u64>,
    device_peak: Option<u64>,
    model_bytes: usize,
    block_bytes: usize,
}

impl DeviceJob for Job<'_> {
    type Output = Result<(), BenchError>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Self::Output {
        let card = B::card(device);
        let dtype = Compute::dtype(self.0.dtype, card.as_ref());
        let name = card.map_or_else(|| self.0.common.device.to_string(), |card| card.name);
        let tiny = tiny_checkpoint::<B>(device)?;
        let folder = self.0.checkpoint.as_deref().unwrap_or(tiny.path());
        println!("load on {name}, {dtype:?}: {}", folder.display());
        let warm_up = load::<B>(tiny.path(), dtype, device)?;
        println!("a tiny model, with compiling kernels: {:.3} s", warm_up.seconds);
        let files = Files::read_twice(weight_files(folder)?)?;
        let loaded = load::<B>(folder, dtype, device)?;
        let rows = table(&name, dtype, &files, &loaded);
        self.0.common.write(&rows)
    }
}

/// A model of random weights in bf16, in several files.
fn tiny_checkpoint<B: KernelBackend>(device: &B::Device) -> Result<TempDir, BenchError> {
    let folder = || tempfile::tempdir().map_err(BenchError::Temporary);
    let (single, sharded) = (folder()?, folder()?);
    let config = Shapes::Tiny.config();
    let model = Llama::<B>::init(&config, 0, device);
    let json = config.to_hugging_face(1, 2, "bfloat16");
    write_model(single.path(), &json, &model_tensors(&model), FloatType::Bf16)?;
    let merge = Merge::open(single.path(), None, Quantization::None)?;
    write_merged(sharded.path(), &merge, FloatType::Bf16, TINY_SHARD_BYTES, || {})?;
    Ok(sharded)
}

/// The files that are loaded, in the order of their names.
fn weight_files(folder: &Path) -> Result<BTreeSet<PathBuf>, BenchError> {
    let found = WEIGHT_FILES.iter().map(|name| folder.join(name)).find(|file| file.is_file());
    match found {
        Some(index) if index.extension().is_some_and(|extension| extension == "json") => {
            let names = indexed_files(&index, "--checkpoint")?;
            Ok(names.into_iter().map(|name| folder.join(name)).collect())
        }
        Some(file) => Ok(BTreeSet::from([file])),
        None => Err(BenchError::Checkpoint(folder.to_owned())),
    }
}

/// The files, and what it takes to read them alone.
struct Files {
    paths: BTreeSet<PathBuf>,
    bytes: u64,
    first_seconds: f64,
    second_seconds: f64,
}

impl Files {
    fn read_twice(paths: BTreeSet<PathBuf>) -> Result<Self, BenchError> {
        let (bytes, first_seconds) = read_all(&paths)?;
        let (_, second_seconds) = read_all(&paths)?;
        Ok(Self { paths, bytes, first_seconds, second_seconds })
    }
}

/// Reads files from beginning to end; their bytes, and the seconds that it took.
fn read_all(files: &BTreeSet<PathBuf>) -> Result<(u64, f64), BenchError> {
    let begin = Instant::now();
    let (mut buffer, mut bytes) = (vec![0; BUFFER_BYTES], 0);
    for path in files {
        let fault = |source| BenchError::Read { path: path.clone(), source };
        let mut file = File::open(path).map_err(fault)?;
        loop {
            match file.read(&mut buffer).map_err(fault)? {
                0 => break,
                count => bytes += count as u64,
            }
        }
    }
    Ok((bytes, begin.elapsed().as_secs_f64()))
}

fn load<B: KernelBackend>(folder: &Path, dtype: DType, device: &B::Device) -> Result<Loaded, BenchError> {
    wait::<B>(device)?;
    let anonymous_before = memory_of_process("RssAnon:");
    let done = AtomicBool::new(false);
    let (model, seconds, anonymous_peak) = thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peak = None;
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(memory_of_process("RssAnon:"));
                thread::sleep(SAMPLED_EVERY);
            }
            peak
        });
        let begin = Instant::now();
        let model = load_llama::<B>(folder, Quantization::Nf4Double, dtype, device)
            .map_err(BenchError::from)
            .and_then(|model| wait::<B>(device).map(|()| model));
        let seconds = begin.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        (model, seconds, sampler.join().ok().flatten())
    });
    let model = model?;
    let linears =
        model.blocks.first().map(|block| Target::ALL.map(|target| block.linear(target).weight.bytes()));
    Ok(Loaded {
        seconds,
        anonymous_before,
        anonymous_peak,
        resident_peak: peak_memory_bytes(),
        device_peak: B::allocated(device).map(|allocated| allocated.reserved),
        model_bytes: model.weight_bytes(),
        block_bytes: linears.map_or(0, |linears| linears.iter().sum()),
    })
}

/// Prints the figures that are known here, and gives them as rows.
fn table(device: &str, dtype: DType, files: &Files, loaded: &Loaded) -> Vec<Row> {
    let shape = format!("{} files, {} bytes", files.paths.len(), files.bytes);
    let commit = commit();
    let row = |(name, value, unit): (&str, f64, &'static str)| Row {
        name: format!("load.{name}"),
        device: device.to_owned(),
        shape: shape.clone(),
        value,
        unit,
        peak_memory_bytes: loaded.device_peak.or(loaded.anonymous_peak),
        dtype: dtype_name(dtype),
        commit: commit.clone(),
    };
    let bytes = |name, bytes: Option<u64>| bytes.map(|bytes| (name, bytes as f64, "bytes"));
    let figures = [
        bytes("files", Some(files.bytes)),
        Some(("first_read", files.first_seconds, "s")),
        Some(("second_read", files.second_seconds, "s")),
        Some(("load", loaded.seconds, "s")),
        Some(("load_rate", files.bytes as f64 / loaded.seconds / 1e9, "GB/s")),
        Some(("load_to_second_read", loaded.seconds / files.second_seconds, "times")),
        bytes("host_anonymous_before", loaded.anonymous_before),
        bytes("host_anonymous_peak", loaded.anonymous_peak),
        bytes("host_resident_peak", loaded.resident_peak),
        bytes("device_peak", loaded.device_peak),
        bytes("model", Some(loaded.model_bytes as u64)),
        bytes("linears_of_a_block", Some(loaded.block_bytes as u64)),
    ];
    for (name, value, unit) in figures.iter().flatten() {
        let digits = if *unit == "bytes" { 0 } else { 3 };
        println!("{name:<24}{value:>18.digits$} {unit}");
    }
    figures.into_iter().flatten().map(row).collect()
}
