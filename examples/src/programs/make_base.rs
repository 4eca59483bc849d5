//! Trains the tiny base model that ships with the project, from nothing, on plain statements of the sample's facts.
//!
//! `make_base` writes `datasets/tiny-llama/`: config.json, model.safetensors (bf16), tokenizer.json. The tokenizer is trained
//! on the statements and the fixed words of the prompt; no clue is read. Equal input, build and machine give an equal
//! model. It takes about a quarter of an hour on two cores.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::{Failure, finish, run_on, write_report};
use buzzer::data::{Batch, LossOn, PackOptions, Packed, Packing, RowStream, pack};
use buzzer::kernels::KernelBackend;
use buzzer::model::{Llama, LlamaConfig};
use buzzer::text::{Example, Tokenizer};
use buzzer::train::{OptimizerSettings, PretrainSettings, Pretrainer, Schedule, ScheduleKind};
use buzzer::weights::{FloatType, model_tensors, write_model};
use buzzer::{Device, DeviceJob};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Train the tiny base model on plain statements.
#[derive(Parser)]
#[command(name = "make_base")]
struct Args {
    /// Text file, one statement a line
    #[arg(long, value_name = "FILE", default_value = "datasets/sample/statements.txt")]
    statements: PathBuf,
    /// Folder to write the model into
    #[arg(long, value_name = "DIR", default_value = "datasets/tiny-llama")]
    out: PathBuf,
    /// Device to train on
    #[arg(long, default_value_t, hide_default_value = true)]
    device: Device,
    /// Passes over the statements
    #[arg(long, value_name = "N", default_value_t = 40.0)]
    epochs: f64,
    /// Stop after so many steps; the schedule ends there too
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 1024)]
    vocab: usize,
    /// Width of the model
    #[arg(long, value_name = "N", default_value_t = 128)]
    hidden: usize,
    /// Blocks
    #[arg(long, value_name = "N", default_value_t = 2)]
    layers: usize,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 2e-3)]
    lr: f64,
    /// Seed of the weights and of the order
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Tokens of a row, and rows of a step: about 2,000 tokens a step.
const ROW_LEN: usize = 128;
const BATCH_ROWS: usize = 16;
/// How often the prompt's fixed words stand in the tokenizer's training text, so that they become whole tokens.
const PROMPT_REPEATS: usize = 200;

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    finish(run_on(args.device, Job { args: &args }))
}

struct Job<'a> {
    args: &'a Args,
}

#[derive(Serialize)]
struct Report {
    device: String,
    statements: usize,
    tokens: usize,
    parameters: usize,
    steps: u64,
    loss: Loss,
    tokens_per_second: f64,
    seconds: f64,
}

#[derive(Serialize)]
struct Loss {
    first: f64,
    last: f64,
}

impl DeviceJob for Job<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let args = self.args;
        let text = fs::read_to_string(&args.statements)
            .map_err(|error| Failure::input(format!("{}: {error}", args.statements.display())))?;
        let statements: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let tokenizer = tokenizer(&statements, args.vocab)?;
        let packed = rows(&tokenizer, &statements, args.seed)?;
        let config = LlamaConfig::new(
            tokenizer.vocab_size(),
            args.hidden,
            344 * args.hidden / 128,
            args.layers,
            4,
            4,
            args.hidden / 4,
        )
        .with_max_position_embeddings(256);
        println!(
            "{} statements, {} tokens, {} rows; {} parameters",
            statements.len(),
            packed.report.tokens,
            packed.rows.len(),
            config.parameters()
        );
        let (model, report) = train::<B>(args, &config, &packed, statements.len(), device)?;
        save(&model, &tokenizer, &args.out)?;
        let path = write_report(&args.out, &report)?;
        println!("loss {:.3} to {:.3}; written to {}", report.loss.first, report.loss.last, path.display());
        Ok(())
    }
}

fn tokenizer(statements: &[&str], vocab: usize) -> Result<Tokenizer, Failure> {
    let fixed = ["### Question:", "### Answer:"]
        .into_iter()
        .flat_map(|words| std::iter::repeat_n(words, PROMPT_REPEATS));
    Ok(Tokenizer::train_llama_style(statements.iter().copied().chain(fixed), vocab)?)
}

/// Each statement a document: begin token, text, end token.
fn rows(tokenizer: &Tokenizer, statements: &[&str], seed: u64) -> Result<Packed, Failure> {
    let document = |text: &&str| {
        let mut ids = vec![tokenizer.bos_id()];
        ids.extend(tokenizer.encode(text)?);
        ids.push(tokenizer.eos_id());
        let loss_mask = vec![true; ids.len()];
        Ok::<_, Failure>(Example { ids, loss_mask })
    };
    let documents = statements.iter().map(document).collect::<Result<Vec<_>, _>>()?;
    Ok(pack(
        &documents,
        &PackOptions { packing: Packing::Isolated, row_len: ROW_LEN, loss_on: LossOn::All, seed },
    ))
}

fn train<B: KernelBackend>(
    args: &Args,
    config: &LlamaConfig,
    packed: &Packed,
    statements: usize,
    device: &B::Device,
) -> Result<(Llama<B>, Report), Failure> {
    let whole = (args.epochs * packed.rows.len() as f64 / BATCH_ROWS as f64).ceil() as u64;
    let steps = args.steps.map_or(whole, |steps| steps.min(whole)).max(1);
    let optimizer = OptimizerSettings {
        beta_2: 0.95,
        weight_decay: 0.3,
        max_grad_norm: Some(1.0),
        ..OptimizerSettings::default()
    };
    let schedule = Schedule::new(ScheduleKind::Cosine, args.lr, steps / 20, steps);
    let mut trainer =
        Pretrainer::<B>::new(config, PretrainSettings { optimizer, schedule, seed: args.seed }, device);
    let mut stream = RowStream::new(packed.rows.len(), args.seed);
    let style = ProgressStyle::with_template("{bar:30} step {pos}/{len}  {msg}  {eta} left")?;
    let bar = ProgressBar::new(steps).with_style(style);
    let (started, mut tokens, mut first, mut last) = (Instant::now(), 0, None, 0.0);
    for _ in 0..steps {
        let rows: Vec<_> = stream.next(BATCH_ROWS).into_iter().map(|row| &packed.rows[row]).collect();
        let batch = Batch::collate(&rows, Some(ROW_LEN));
        tokens += batch.tokens;
        last = trainer.step(&batch)?;
        first.get_or_insert(last);
        bar.set_message(format!(
            "loss {last:.3}  {:.0} tokens/s",
            tokens as f64 / started.elapsed().as_secs_f64()
        ));
        bar.inc(1);
    }
    bar.finish();
    let seconds = started.elapsed().as_secs_f64();
    let report = Report {
        device: args.device.to_string(),
        statements,
        tokens: packed.report.tokens,
        parameters: config.parameters(),
        steps,
        loss: Loss { first: first.unwrap_or(last), last },
        tokens_per_second: tokens as f64 / seconds,
        seconds,
    };
    Ok((trainer.model(), report))
}

fn save<B: KernelBackend>(model: &Llama<B>, tokenizer: &Tokenizer, out: &Path) -> Result<(), Failure> {
    let config = model.config().to_hugging_face(tokenizer.bos_id(), tokenizer.eos_id(), "bfloat16");
    write_model(out, &config, &model_tensors(model), FloatType::Bf16)?;
    tokenizer.save(&out.join("tokenizer.json"))?;
    Ok(())
}
