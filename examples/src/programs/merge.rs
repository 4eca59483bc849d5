//! Adds an adapter into its base and writes one plain model, with a report of how faithful it is.
//!
//! The folder appears whole or not at all. It is then read back, and what it says to held-out clues is held against base and
//! live adapter. Without an adapter it converts the base.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::model::{GENERATION_CONFIG, TINY_LLAMA, TOKENIZER_FORMS, TOKENIZER_NEIGHBOURS};
use crate::{
    AnswerArgs, Comparison, DataArgs, DtypeArg, Failure, Probe, QuantizationArg, RepoName, Wanted, bytes,
    device_dtype, finish, local, next_run_dir, peak_memory_bytes, run_on, write_report,
};
use buzzer::burn::tensor::DType;
use buzzer::kernels::KernelBackend;
use buzzer::model::Llama;
use buzzer::text::{Renderer, Template, Tokenizer};
use buzzer::weights::{
    Adapter, BaseForm, BlockType, FloatType, GgufFormat, Merge, NewFolder, Nf4Format, Quantization,
    attach_adapter, describe, load_llama, write_atomic, write_gguf, write_merged, write_nf4,
};
use buzzer::{Device, DeviceJob};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Merge an adapter into its base and write a model that other programs load.
///
/// The result is read back and compared, on held-out clues, with the base under the live adapter.
#[derive(Parser)]
#[command(name = "merge", mut_arg("eval_limit", |argument| argument.default_value("64").help(
    "Compare on at most so many of the clues held out; 0 leaves the comparison out"
)))]
struct Args {
    /// Folder of the base model, in 16 or 32 bits or in bitsandbytes' NF4; or the name of a repository on the Hugging Face
    /// hub, org/name or org/name@revision
    #[arg(long, visible_alias = "base", value_name = "DIR", default_value = TINY_LLAMA)]
    model: PathBuf,
    /// What the model is called: the last part of the path or of the repository's name.
    #[arg(skip)]
    name: String,
    /// PEFT adapter to merge, a folder or a repository; without one, the base is converted
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Folder to make; it must not exist, or be empty [default: a new one under runs/]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// What to write
    #[arg(long, value_enum, default_value_t = Format::SafetensorsF16)]
    format: Format,
    /// Round a dense base to NF4 before the adapter is added, as QLoRA did when it was trained
    #[arg(long, value_enum, default_value_t = QuantizationArg::None)]
    quantization: QuantizationArg,
    /// Size of one file of weights at most, in GiB, where its largest tensor allows
    #[arg(long, value_name = "GIB", default_value_t = 4.0)]
    shard_size: f64,
    /// A tokenizer.json or its folder, if it does not lie beside the model
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    /// Prompt of the comparison: question, category, chat or clue
    #[arg(long, default_value = "question")]
    template: Template,
    /// Tokens of a compared answer at most
    #[arg(long, value_name = "N", default_value_t = 24)]
    max_new_tokens: usize,
    /// Dtype to compare in [default: bf16 or f16 on a CUDA card, whichever it has; f32 elsewhere]
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Device to compare on: cpu, cuda, cuda:N or wgpu, as far as they are built in [default: the best one here]
    #[arg(long, default_value_t, hide_default_value = true)]
    device: Device,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Safetensors in f16
    SafetensorsF16,
    /// Safetensors in bf16
    SafetensorsBf16,
    /// bitsandbytes' NF4, scales in f32
    Nf4,
    /// bitsandbytes' NF4, scales in eight bits
    Nf4Double,
    /// GGUF for llama.cpp in f16
    GgufF16,
    /// GGUF in 8 bits
    #[value(name = "gguf-q8_0")]
    GgufQ8,
    /// GGUF in 4 bits; embedding and head in 8
    #[value(name = "gguf-q4_0")]
    GgufQ4,
}

#[derive(Serialize)]
struct Report {
    device: String,
    dtype: String,
    model: PathBuf,
    adapter: Option<PathBuf>,
    format: String,
    base: &'static str,
    merged_into: &'static str,
    out: PathBuf,
    files: Vec<Written>,
    bytes: u64,
    parity: Vec<Comparison>,
    merge_seconds: f64,
    seconds: f64,
    peak_memory_bytes: u64,
}

#[derive(Serialize)]
struct Written {
    name: String,
    bytes: u64,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let mut args = Args::parse();
    finish(args.fetch().and_then(|()| run_on(args.device, Merging { args: &args })))
}

struct Merging<'a> {
    args: &'a Args,
}

impl DeviceJob for Merging<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let started = Instant::now();
        let args = self.args;
        let (dtype, shard_bytes) = (device_dtype::<B>(args.dtype, device)?, args.shard_bytes()?);
        let adapter =
            args.adapter.as_deref().map(|dir| Ok::<_, Failure>((Adapter::read(dir)?, dir))).transpose()?;
        let adapter = adapter.as_ref().map(|(adapter, dir)| (adapter, *dir));
        let merge = Merge::open(&args.model, adapter, args.quantization.into())?;
        let tokenizer = Tokenizer::from_file(args.tokenizer())?;
        tokenizer.check_vocab(merge.config().vocab_size)?;
        let renderer = Renderer::new(tokenizer, args.template);
        let clues = args.held_out_clues()?;
        let probe = Probe::new(&renderer, &clues, args.answer(), merge.config().max_position_embeddings)?;
        let basis = Basis::of(&merge, args);
        basis.print(&merge, args, adapter);
        let out = args.write(&merge, shard_bytes)?;
        let merge_seconds = started.elapsed().as_secs_f64();
        let files = written(&out)?;
        let total = files.iter().map(|file| file.bytes).sum();
        println!(
            "written   {} in {} files to {}, {merge_seconds:.1} s",
            bytes(total),
            files.len(),
            out.display()
        );
        let models = Models { args, adapter, basis, dtype, device };
        let parity = if clues.is_empty() { Vec::new() } else { models.parity::<B>(&probe, &out)? };
        print_parity(&parity);
        let report = Report {
            device: args.device.to_string(),
            dtype: format!("{dtype:?}"),
            model: args.model.clone(),
            adapter: args.adapter.clone(),
            format: args.format.name(),
            base: basis.base(),
            merged_into: basis.weights(),
            out: out.clone(),
            files,
            bytes: total,
            parity,
            merge_seconds,
            seconds: started.elapsed().as_secs_f64(),
            peak_memory_bytes: peak_memory_bytes(),
        };
        println!("report    {}", write_report(&out, &report)?.display());
        Ok(())
    }
}

impl Args {
    /// Puts paths in the place of names on the hub.
    fn fetch(&mut self) -> Result<(), Failure> {
        let name =
            RepoName::of_model(&self.model).map_or_else(|| self.model.clone(), |name| name.id().into());
        self.name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.data.fetch()?;
        if self.model != Path::new(TINY_LLAMA) {
            self.model = local(&self.model, Wanted::Model)?;
        }
        if let Some(adapter) = &mut self.adapter {
            *adapter = local(adapter, Wanted::Adapter)?;
        }
        Ok(())
    }

    fn tokenizer(&self) -> &Path {
        self.tokenizer.as_deref().unwrap_or(&self.model)
    }

    fn held_out_clues(&self) -> Result<Vec<buzzer::data::Clue>, Failure> {
        if self.data.eval_limit == 0 {
            return Ok(Vec::new());
        }
        let (_, mut clues, _) = self.data.clues()?;
        clues.truncate(self.data.eval_limit);
        Ok(clues)
    }

    /// Greedy, as answers are where nothing else is asked for.
    fn answer(&self) -> AnswerArgs {
        AnswerArgs { max_new_tokens: self.max_new_tokens, ..AnswerArgs::default() }
    }

    fn shard_bytes(&self) -> Result<u64, Failure> {
        let bytes = self.shard_size * f64::from(1_u32 << 30);
        if bytes >= 1.0 {
            return Ok(bytes as u64);
        }
        Err(Failure::input(format!("--shard-size {}: choose a number of GiB above 0", self.shard_size)))
    }

    /// Writes the folder and gives its path.
    fn write(&self, merge: &Merge<'_>, shard_bytes: u64) -> Result<PathBuf, Failure> {
        let out = self.out.clone().map_or_else(|| next_run_dir("merge"), Ok)?;
        let folder = NewFolder::create(&out)?;
        let style = ProgressStyle::with_template("merging {bar:30} {pos}/{len} tensors  {eta} left")?;
        let bar = ProgressBar::new(merge.tensors() as u64).with_style(style);
        let done = || bar.inc(1);
        copy_tokenizer(self.tokenizer(), folder.path())?;
        copy(&self.model.join(GENERATION_CONFIG), &folder.path().join(GENERATION_CONFIG))?;
        match self.format.kind() {
            Kind::Safetensors(float_type) => {
                write_merged(folder.path(), merge, float_type, shard_bytes, done)?;
            }
            Kind::Nf4 { double } => {
                let format = Nf4Format { double, float_type: merge.base_type()? };
                write_nf4(folder.path(), merge, format, shard_bytes, done)?;
            }
            Kind::Gguf(block_type, suffix) => {
                let tokenizer = tokenizer_file(self.tokenizer());
                let format = GgufFormat { block_type, tokenizer: &tokenizer, name: &self.name };
                write_gguf(&folder.path().join(format!("model-{suffix}.gguf")), merge, format, done)?;
            }
        }
        bar.finish_and_clear();
        folder.finish()?;
        Ok(out)
    }
}

/// A format's parts.
enum Kind {
    Safetensors(FloatType),
    Nf4 { double: bool },
    Gguf(BlockType, &'static str),
}

impl Format {
    fn kind(self) -> Kind {
        match self {
            Self::SafetensorsF16 => Kind::Safetensors(FloatType::F16),
            Self::SafetensorsBf16 => Kind::Safetensors(FloatType::Bf16),
            Self::Nf4 => Kind::Nf4 { double: false },
            Self::Nf4Double => Kind::Nf4 { double: true },
            Self::GgufF16 => Kind::Gguf(BlockType::F16, "f16"),
            Self::GgufQ8 => Kind::Gguf(BlockType::Q8_0, "q8_0"),
            Self::GgufQ4 => Kind::Gguf(BlockType::Q4_0, "q4_0"),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Which weights the adapter is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basis {
    /// The dense ones of the base.
    Dense,
    /// The dense ones of the base, rounded to NF4 first.
    Rounded,
    /// Those that bitsandbytes stored in 4 bits.
    Stored,
}

impl Basis {
    fn of(merge: &Merge<'_>, args: &Args) -> Self {
        match (merge.base_form(), args.quantization) {
            (BaseForm::Nf4, _) => Self::Stored,
            (BaseForm::Dense, QuantizationArg::None) => Self::Dense,
            (BaseForm::Dense, _) => Self::Rounded,
        }
    }

    fn base(self) -> &'static str {
        if self == Self::Stored { "nf4" } else { "dense" }
    }

    fn weights(self) -> &'static str {
        match self {
            Self::Dense => "the base's dense weights",
            Self::Rounded => "the base's dense weights, rounded to NF4",
            Self::Stored => "the base's NF4 weights, restored",
        }
    }

    fn print(self, merge: &Merge<'_>, args: &Args, adapter: Option<(&Adapter, &Path)>) {
        println!(
            "base      {}: {} parameters, {}",
            args.model.display(),
            merge.config().parameters(),
            self.base()
        );
        let Some((adapter, _)) = adapter else {
            println!("adapter   none: the base is converted from {}", self.weights());
            return;
        };
        println!("adapter   {}", describe(adapter));
        let consequence = match self {
            Self::Dense => {
                "An adapter of QLoRA was trained over the same weights rounded to NF4, so the merged model is not quite the \
                 one that was trained: the second row below is the distance. `--quantization nf4-double` merges into the \
                 rounded weights instead"
            }
            Self::Rounded => {
                "These are the weights that QLoRA trains over, so the merged model is the trained one but for the format's \
                 rounding. What NF4 took from the base stays lost"
            }
            Self::Stored => {
                "An adapter that was trained over them meets the same weights again, so the merged model is the trained one \
                 but for the format's rounding. What NF4 took from the base stays lost; give the 16-bit base to keep it"
            }
        };
        println!("weights   The adapter is added to {}. {consequence}.", self.weights());
    }
}

/// What the merged model is compared with.
struct Models<'a, D> {
    args: &'a Args,
    adapter: Option<(&'a Adapter, &'a Path)>,
    basis: Basis,
    dtype: DType,
    device: &'a D,
}

impl<D> Models<'_, D> {
    /// One model at a time: first those that are compared with, then the one that was written.
    fn parity<B: KernelBackend<Device = D>>(
        &self,
        probe: &Probe<'_>,
        out: &Path,
    ) -> Result<Vec<Comparison>, Failure> {
        let asked = Quantization::from(self.args.quantization);
        let live = if self.adapter.is_some() { "base + adapter" } else { "base" };
        let mut records = vec![probe.record(live, &self.live::<B>(asked)?)?];
        if self.basis == Basis::Dense && self.adapter.is_some() {
            let trained = self.live::<B>(Quantization::Nf4Double)?;
            records.push(probe.record("base in NF4 + adapter", &trained)?);
        }
        B::memory_cleanup(self.device);
        let merged = load_llama::<B>(out, Quantization::None, self.dtype, self.device)?;
        probe.compare(&merged, &mut records)
    }

    fn live<B: KernelBackend<Device = D>>(&self, quantization: Quantization) -> Result<Llama<B>, Failure> {
        let mut model = load_llama::<B>(&self.args.model, quantization, self.dtype, self.device)?;
        if let Some((adapter, dir)) = self.adapter {
            attach_adapter(&mut model, adapter, dir)?;
        }
        Ok(model)
    }
}

fn print_parity(parity: &[Comparison]) {
    if parity.is_empty() {
        println!("parity    left out");
        return;
    }
    let header = ["largest", "mean logit", "mean KL", "largest KL", "top token", "answers"];
    let [largest, mean, kl, largest_kl, token, answers] = header;
    println!(
        "parity    {:<24}{largest:>10}{mean:>12}{kl:>10}{largest_kl:>12}{token:>11}{answers:>12}",
        "merged against"
    );
    for row in parity {
        let Comparison { reference, logit_difference: logits, kl_divergence: kl, answers, .. } = row;
        println!(
            "          {reference:<24}{:>10.2e}{:>12.2e}{:>10.2e}{:>12.2e}{:>9.2} %{:>9.1} %",
            logits.largest,
            logits.mean,
            kl.mean,
            kl.largest,
            100.0 * row.likeliest_token_changed,
            100.0 * answers.share_changed,
        );
    }
    let first = &parity[0];
    println!(
        "          over {} positions of {} held-out clues; of {} greedy answers, exact match {:.1} % before, {:.1} % merged",
        first.positions,
        first.documents,
        first.answers.n,
        100.0 * first.answers.exact_match_reference,
        100.0 * first.answers.exact_match,
    );
}

fn tokenizer_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() }
}

/// Copies a tokenizer and what is read with it. A file that was named by itself gets the usual name, under which the folder's
/// readers look for it; the other form, if one lies beside it, is left where it is.
fn copy_tokenizer(source: &Path, folder: &Path) -> Result<(), Failure> {
    if source.is_dir() {
        for name in TOKENIZER_FORMS {
            copy(&source.join(name), &folder.join(name))?;
        }
    } else {
        let [json, sentencepiece] = TOKENIZER_FORMS;
        let is_sentencepiece = source.extension().is_some_and(|extension| extension == "model");
        copy(source, &folder.join(if is_sentencepiece { sentencepiece } else { json }))?;
    }
    let beside = if source.is_dir() { source } else { source.parent().unwrap_or(Path::new("")) };
    TOKENIZER_NEIGHBOURS.iter().try_for_each(|name| copy(&beside.join(name), &folder.join(name)))
}

/// Copies a file, if it is there.
fn copy(file: &Path, target: &Path) -> Result<(), Failure> {
    if !file.is_file() {
        return Ok(());
    }
    let content = fs::read(file).map_err(|error| Failure::input(format!("{}: {error}", file.display())))?;
    write_atomic(target, |out| {
        out.write_all(&content).map_err(|error| buzzer::weights::WeightsError::write(target, error))
    })?;
    Ok(())
}

/// What a folder holds, in order.
fn written(folder: &Path) -> Result<Vec<Written>, Failure> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.push(Written { name, bytes: entry.metadata()?.len() });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}
