//! Trains a small base model from nothing, on plain statements.
//!
//! `make_base` writes `datasets/tiny-llama/`, the model that ships with the project: config.json, model.safetensors (bf16),
//! tokenizer.json. The tokenizer is trained on the statements and the fixed words of the prompt; no clue is read. Equal input,
//! build and machine give an equal model. It takes about a quarter of an hour on two cores.
//!
//! With `--clues` the statements are the clues that fine-tuning does not hold out, put as running text, for a base that has
//! something to recall when it is fine-tuned on the rest of the game. The loss is then measured on held-out ones too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::{
    DataArgs, DtypeArg, EvalSettings, Failure, HeldOutLosses, Watch, Yardstick, create, device_bytes,
    device_dtype, finish, next_run_dir, peak_flops, records_path, run_on, say, write_report,
};
use buzzer::burn::tensor::DType;
use buzzer::data::{Batch, Clue, LossOn, PackOptions, Packed, PackedRow, Packing, RowStream, pack};
use buzzer::kernels::KernelBackend;
use buzzer::model::{Llama, LlamaConfig};
use buzzer::text::{Example, Tokenizer};
use buzzer::train::{
    OptimizerSettings, PretrainSettings, Pretrainer, Schedule, ScheduleKind, dense_token_flop,
};
use buzzer::weights::{FloatType, model_tensors, write_model};
use buzzer::{Device, DeviceJob};
use clap::Parser;
use serde::Serialize;

/// Train a small base model from nothing on plain statements.
///
/// With no arguments it makes the tiny model that ships with the project.
#[derive(Parser)]
#[command(name = "make_base")]
struct Args {
    /// Text file, one statement a line
    #[arg(long, value_name = "FILE", default_value = "datasets/sample/statements.txt")]
    statements: PathBuf,
    /// Learn the clues of --data that are not held out, as statements, instead of a text file; of those held out, the loss on
    /// --eval-limit is measured
    #[arg(long, conflicts_with = "statements")]
    clues: bool,
    #[command(flatten)]
    data: DataArgs,
    /// Folder to write the model into
    #[arg(long, value_name = "DIR", default_value = "datasets/tiny-llama")]
    out: PathBuf,
    /// Folder for the records of the run [default: runs/make_base-NNN]
    #[arg(long, value_name = "DIR")]
    records: Option<PathBuf>,
    /// Device to train on
    #[arg(long, default_value_t, hide_default_value = true)]
    device: Device,
    /// Dtype to compute in, f32 or bf16; weights are f32 until they are written [default: bf16 on a CUDA card that has it; f32
    /// elsewhere]
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Passes over the statements
    #[arg(long, value_name = "N", default_value_t = 40.0)]
    epochs: f64,
    /// Stop after so many steps; the schedule ends there too
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Rows of a step
    #[arg(long, value_name = "ROWS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens of a row; the model takes twice as many
    #[arg(long, value_name = "N", default_value_t = 128)]
    row_len: usize,
    /// How statements share rows: isolated, wrapped or none
    #[arg(long, default_value_t = Packing::Isolated)]
    packing: Packing,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 2e-3)]
    lr: f64,
    /// Weight decay of matrices
    #[arg(long, value_name = "W", default_value_t = 0.3)]
    weight_decay: f64,
    /// Measure the loss on held-out clues so many times during the run
    #[arg(long, value_name = "N", default_value_t = EvalSettings::default().evaluations)]
    evaluations: u64,
    /// Seed of the weights and of the order
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Sizes of the model.
#[derive(clap::Args)]
struct ShapeArgs {
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 1024)]
    vocab: usize,
    /// Width of the model
    #[arg(long, value_name = "N", default_value_t = 128)]
    hidden: usize,
    /// Width of the MLP
    #[arg(long, value_name = "N", default_value_t = 344)]
    intermediate: usize,
    /// Heads of attention
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    heads: u32,
    /// Blocks
    #[arg(long, value_name = "N", default_value_t = 2)]
    layers: usize,
}

/// How often the prompt's fixed words stand in the tokenizer's training text, so that they become whole tokens.
const PROMPT_REPEATS: usize = 200;
/// Where records are, unless another folder is named.
const RUNS: &str = "make_base";

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let mut args = Args::parse();
    finish(args.check().and_then(|()| run_on(args.device, Job { args: &args })))
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

#[derive(Default, Serialize)]
struct Loss {
    first: f64,
    last: f64,
    /// After the last step, where clues are held out.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_out: Option<f64>,
}

/// What is learnt, and what is not.
struct Statements {
    learnt: Vec<String>,
    held_out: Vec<String>,
}

/// The same as rows.
struct Rows {
    learnt: Packed,
    held_out: Vec<PackedRow>,
}

impl DeviceJob for Job<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let args = self.args;
        let dtype = args.dtype::<B>(device)?;
        let statements = args.statements()?;
        let tokenizer = tokenizer(&statements.learnt, args.shape.vocab)?;
        let rows = Rows {
            learnt: args.rows(&tokenizer, &statements.learnt)?,
            held_out: args.rows(&tokenizer, &statements.held_out)?.rows,
        };
        let config = args.config(tokenizer.vocab_size());
        let count = statements.learnt.len();
        say!(
            "{count} statements, {} tokens, {} rows; {} parameters, in {dtype:?}",
            rows.learnt.report.tokens,
            rows.learnt.rows.len(),
            config.parameters()
        );
        let trainer = Pretrainer::<B>::new(&config, args.settings(rows.learnt.rows.len(), dtype), device);
        let (model, report) = Training { args, rows: &rows, statements: count }.run(trainer, device)?;
        save(&model, &tokenizer, &args.out)?;
        let path = write_report(&args.out, &report)?;
        say!("loss {:.3} to {:.3}; written to {}", report.loss.first, report.loss.last, path.display());
        Ok(())
    }
}

impl Args {
    /// Refuses what no model has, and fetches the clues.
    fn check(&mut self) -> Result<(), Failure> {
        let ShapeArgs { hidden, heads, .. } = self.shape;
        // Halves of a head are turned.
        if hidden == 0 || !hidden.is_multiple_of(2 * heads as usize) {
            return Err(Failure::input(format!(
                "--hidden {hidden}: not possible with --heads {heads}; choose a multiple of {}",
                2 * heads
            )));
        }
        self.pack_options().check()?;
        if self.clues {
            self.data.fetch()?;
            self.data.check()?;
        }
        Ok(())
    }

    fn dtype<B: KernelBackend>(&self, device: &B::Device) -> Result<DType, Failure> {
        match device_dtype::<B>(self.dtype, device)? {
            DType::F16 => Err(Failure::input(
                "--dtype f16: gradients of a whole model leave its range, and nothing scales them here; use --dtype f32",
            )),
            dtype => Ok(dtype),
        }
    }

    fn statements(&self) -> Result<Statements, Failure> {
        if self.clues {
            let (learnt, mut held_out, _) = self.data.clues()?;
            held_out.truncate(self.data.eval_limit);
            let texts = |clues: &[Clue]| clues.iter().map(statement).collect();
            return Ok(Statements { learnt: texts(&learnt), held_out: texts(&held_out) });
        }
        let text = fs::read_to_string(&self.statements)
            .map_err(|error| Failure::input(format!("{}: {error}", self.statements.display())))?;
        let learnt = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
        Ok(Statements { learnt, held_out: Vec::new() })
    }

    fn pack_options(&self) -> PackOptions {
        PackOptions { packing: self.packing, row_len: self.row_len, loss_on: LossOn::All, seed: self.seed }
    }

    /// Each statement a document: begin token, text, end token.
    fn rows(&self, tokenizer: &Tokenizer, statements: &[String]) -> Result<Packed, Failure> {
        let document = |text: &String| {
            let mut ids = vec![tokenizer.bos_id()];
            ids.extend(tokenizer.encode(text)?);
            ids.push(tokenizer.eos_id());
            let loss_mask = vec![true; ids.len()];
            Ok::<_, Failure>(Example { ids, loss_mask })
        };
        let documents = statements.iter().map(document).collect::<Result<Vec<_>, _>>()?;
        Ok(pack(&documents, &self.pack_options()))
    }

    fn config(&self, vocab_size: usize) -> LlamaConfig {
        let ShapeArgs { hidden, intermediate, heads, layers, .. } = self.shape;
        let heads = heads as usize;
        LlamaConfig::new(vocab_size, hidden, intermediate, layers, heads, heads, hidden / heads)
            .with_max_position_embeddings(2 * self.row_len)
    }

    fn settings(&self, rows: usize, dtype: DType) -> PretrainSettings {
        let whole = (self.epochs * rows as f64 / f64::from(self.batch)).ceil() as u64;
        let steps = self.steps.map_or(whole, |steps| steps.min(whole)).max(1);
        let optimizer = OptimizerSettings {
            beta_2: 0.95,
            weight_decay: self.weight_decay,
            max_grad_norm: Some(1.0),
            ..OptimizerSettings::default()
        };
        let schedule = Schedule::new(ScheduleKind::Cosine, self.lr, steps / 20, steps);
        PretrainSettings { optimizer, schedule, seed: self.seed, dtype }
    }
}

/// A clue as running text. No prompt has this form, so that the form is left for fine-tuning to teach.
fn statement(clue: &Clue) -> String {
    let Clue { category, question, answer, .. } = clue;
    format!("{question} That is {answer}, in the category {category}.")
}

fn tokenizer(statements: &[String], vocab: usize) -> Result<Tokenizer, Failure> {
    let fixed = ["### Question:", "### Answer:"]
        .into_iter()
        .flat_map(|words| std::iter::repeat_n(words, PROMPT_REPEATS));
    Ok(Tokenizer::train_llama_style(statements.iter().map(String::as_str).chain(fixed), vocab)?)
}

/// The steps over rows.
struct Training<'a> {
    args: &'a Args,
    rows: &'a Rows,
    statements: usize,
}

impl Training<'_> {
    fn run<B: KernelBackend>(
        &self,
        mut trainer: Pretrainer<B>,
        device: &B::Device,
    ) -> Result<(Llama<B>, Report), Failure> {
        let args = self.args;
        let steps = trainer.settings().schedule.total;
        let mut watch = self.watch(&trainer, device)?;
        let mut stream = RowStream::new(self.rows.learnt.rows.len(), args.seed);
        let every = (steps / args.evaluations.max(1)).max(1);
        let (started, mut tokens) = (Instant::now(), 0);
        let mut loss = Loss::default();
        for _ in 0..steps {
            let rows = stream.next(args.batch as usize);
            let step = trainer.step(&self.batch(rows.iter().map(|&row| &self.rows.learnt.rows[row])))?;
            tokens += step.tokens;
            if step.step == 1 {
                loss.first = step.loss;
            }
            loss.last = step.loss;
            watch.step(&step, device_bytes::<B>(device));
            if args.evaluations > 0 && (step.step % every == 0 || step.step == steps) {
                loss.held_out = self.evaluate(&trainer);
                watch.held_out(
                    step.step,
                    &HeldOutLosses { all: loss.held_out, answers: None, loss_on: LossOn::All },
                );
            }
        }
        watch.finish();
        let seconds = started.elapsed().as_secs_f64();
        let report = Report {
            device: args.device.to_string(),
            statements: self.statements,
            tokens: self.rows.learnt.report.tokens,
            parameters: trainer.config().parameters(),
            steps,
            loss,
            tokens_per_second: tokens as f64 / seconds,
            seconds,
        };
        Ok((trainer.model(), report))
    }

    fn watch<B: KernelBackend>(&self, trainer: &Pretrainer<B>, device: &B::Device) -> Result<Watch, Failure> {
        let dir = self.args.records.clone().map_or_else(|| next_run_dir(RUNS), Ok)?;
        create(&dir)?;
        say!("records in {}", records_path(&dir).display());
        let settings = trainer.settings();
        let yardstick = Yardstick {
            loss_on: LossOn::All,
            token_flop: dense_token_flop(trainer.config()),
            peak_flops: peak_flops::<B>(device, settings.dtype),
        };
        Watch::new(&dir, yardstick, settings.schedule.total, None)
    }

    fn batch<'a>(&self, rows: impl Iterator<Item = &'a PackedRow>) -> Batch {
        Batch::collate(&rows.collect::<Vec<_>>(), Some(self.args.row_len))
    }

    fn evaluate<B: KernelBackend>(&self, trainer: &Pretrainer<B>) -> Option<f64> {
        let batches = self.rows.held_out.chunks(self.args.batch as usize);
        trainer.evaluate(batches.map(|rows| self.batch(rows.iter())))
    }
}

fn save<B: KernelBackend>(model: &Llama<B>, tokenizer: &Tokenizer, out: &Path) -> Result<(), Failure> {
    let config = model.config().to_hugging_face(tokenizer.bos_id(), tokenizer.eos_id(), "bfloat16");
    write_model(out, &config, &model_tensors(model), FloatType::Bf16)?;
    tokenizer.save(&out.join("tokenizer.json"))?;
    Ok(())
}
