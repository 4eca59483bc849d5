//! Times whole training steps: forward, backward, optimizer, and the upload of each batch.
//!
//! `cargo bench --bench training --features cuda -- --model llama2-7b --random-init --batch 4 --seq 2048 --json FILE`. With no
//! arguments and no card it runs a tiny shape on the processor. Throughput does not depend on the weights' values, so
//! they are random. Tokens are counted without padding. Loss is real, so a step that computes nonsense shows.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use buzzer::DeviceJob;
use buzzer::burn::tensor::DType;
use buzzer::data::{Clue, PackOptions, Packed, PackedRow, ReadOptions, clean, pack, read_clues};
use buzzer::kernels::KernelBackend;
use buzzer::model::{Llama, LlamaConfig, LoraSettings, Target};
use buzzer::text::{Fields, Renderer, Template, Tokenizer};
use buzzer::train::{
    Engine, FrozenFormat, MemoryPlan, OptimizerSettings, PlanSettings, ScheduleKind, Shape, TrainSettings,
    Trainer, token_flop,
};
use buzzer_benches::{
    BATCH_SECONDS, BenchError, CommonArgs, Compute, Row, Shapes, commit, dtype_name, product_rate,
    product_rows, random_ids, run_bench, wait,
};
use clap::{Parser, ValueEnum};

/// Time whole training steps on a model of random weights.
#[derive(Parser, Clone)]
#[command(name = "training")]
struct Arguments {
    /// Shape of the model [default: llama2-7b on a card, else tiny].
    #[arg(long, value_enum)]
    model: Option<Shapes>,
    /// Draw the weights, which is the only way here.
    #[arg(long)]
    random_init: bool,
    /// Rows on the device at a time.
    #[arg(long, value_name = "B", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens of a row [default: 2048, tiny 128].
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(2..))]
    seq: Option<u32>,
    /// LoRA rank.
    #[arg(long, value_name = "R", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// Linears to correct: all, qv, or names like q_proj,v_proj.
    #[arg(long, default_value = "all")]
    targets: String,
    /// Dropout in front of the factors.
    #[arg(long, value_name = "P", default_value_t = 0.1)]
    dropout: f64,
    /// Keep Adam's moments in 8 bits.
    #[arg(long)]
    eight_bit: bool,
    /// Keep the input of every so many blocks only.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    checkpoint_every: u32,
    /// Dtype to compute in [default: what the device has].
    #[arg(long, value_enum)]
    dtype: Option<Compute>,
    /// Rows of one document each, or of packed clues.
    #[arg(long, value_enum, default_value_t = Rows::Dense)]
    packing: Rows,
    /// Clue file for packed rows.
    #[arg(long, value_name = "FILE", default_value = "datasets/sample/clues.csv")]
    data: PathBuf,
    /// Its tokenizer; without one, single bytes.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Clues of a whole epoch, to tell how long one takes.
    #[arg(long, value_name = "N", default_value_t = 216_930)]
    epoch_clues: usize,
    /// Steps before the clock starts: kernels are compiled in the first.
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: usize,
    /// Steps that are timed.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rows {
    /// One document of random tokens a row
    Dense,
    /// Clues, each alone in attention
    Jeopardy,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run_bench("training", arguments.common.choose_device(), Job(&arguments))
}

struct Job<'a>(&'a Arguments);

impl DeviceJob for Job<'_> {
    type Output = Result<(), BenchError>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Self::Output {
        let mut setup = Setup::new::<B>(self.0, device)?;
        println!("{}", setup.describe(self.0));
        let rows = setup.rows(self.0)?;
        let measured = setup.measure::<B>(rows, self.0.warmup, device)?;
        let table = setup.table::<B>(self.0, &measured, device)?;
        for row in &table {
            println!("{:<44} {:>14.3} {}", row.name, row.value, row.unit);
        }
        self.0.common.write(&table)
    }
}

/// Everything that the arguments and the device decide.
struct Setup {
    config: LlamaConfig,
    lora: LoraSettings,
    train: TrainSettings,
    seq: usize,
    dtype: DType,
    steps: usize,
    device: String,
    /// Mean tokens of a packed clue.
    clue_tokens: Option<f64>,
}

struct Measured {
    seconds: f64,
    tokens: usize,
    loss_tokens: usize,
    last_loss: f64,
    planned: usize,
    peak: Option<u64>,
    peak_after_warmup: Option<u64>,
}

impl Setup {
    fn new<B: KernelBackend>(arguments: &Arguments, device: &B::Device) -> Result<Self, BenchError> {
        let card = B::card(device);
        let shape = Shapes::or_of(arguments.model, card.as_ref());
        let targets = Target::parse_list(&arguments.targets)?;
        Ok(Self {
            config: shape.config(),
            lora: LoraSettings { rank: arguments.rank as usize, alpha: 16.0, rslora: false, targets },
            train: TrainSettings {
                batch_rows: arguments.batch as usize,
                accumulation: 1,
                epochs: 1.0,
                learning_rate: 2e-4,
                schedule: ScheduleKind::Constant,
                warmup_ratio: 0.0,
                optimizer: OptimizerSettings {
                    weight_decay: 1e-3,
                    eight_bit: arguments.eight_bit,
                    ..OptimizerSettings::default()
                },
                dropout: arguments.dropout,
                seed: 0,
                checkpoint_every: arguments.checkpoint_every as usize,
            },
            seq: arguments.seq.map_or(if shape == Shapes::Tiny { 128 } else { 2048 }, |seq| seq as usize),
            dtype: Compute::dtype(arguments.dtype, card.as_ref()),
            steps: arguments.steps as usize,
            clue_tokens: None,
            device: card.map_or_else(|| arguments.common.device.to_string(), |card| card.name),
        })
    }

    fn describe(&self, arguments: &Arguments) -> String {
        format!(
            "training on {}, {:?}: {} parameters, {} x {} {:?} rows, rank {} on {} linears, dropout {}",
            self.device,
            self.dtype,
            self.config.parameters(),
            self.train.batch_rows,
            self.seq,
            arguments.packing,
            self.lora.rank,
            self.lora.targets.len(),
            self.train.dropout,
        )
    }

    /// As many rows as all steps need.
    fn rows(&mut self, arguments: &Arguments) -> Result<Vec<PackedRow>, BenchError> {
        let count = (arguments.warmup + self.steps) * self.train.batch_rows;
        let mut rows = match arguments.packing {
            Rows::Dense => (0..count).map(|row| self.dense_row(row as u64)).collect(),
            Rows::Jeopardy => {
                let packed = self.packed_rows(arguments)?;
                self.clue_tokens = Some(packed.report.mean_len);
                packed.rows
            }
        };
        let cycle = rows.len();
        // No rows at all are an error of the trainer's.
        while cycle > 0 && rows.len() < count {
            rows.push(rows[rows.len() - cycle].clone());
        }
        rows.truncate(count);
        Ok(rows)
    }

    fn dense_row(&self, row: u64) -> PackedRow {
        let ids = random_ids(row, self.seq, self.config.vocab_size);
        let labels = ids.iter().enumerate().map(|(place, &id)| if place == 0 { -100 } else { id as i32 });
        PackedRow {
            labels: labels.collect(),
            positions: (0..self.seq as u32).collect(),
            documents: vec![0; self.seq],
            ids,
        }
    }

    fn packed_rows(&self, arguments: &Arguments) -> Result<Packed, BenchError> {
        let tokenizer = match &arguments.tokenizer {
            Some(path) => Tokenizer::from_file(path)?,
            None => Tokenizer::byte_level_test(),
        };
        let renderer = Renderer::new(tokenizer, Template::Question);
        let clues = clean(read_clues(&arguments.data, &ReadOptions::default())?).clues;
        let examples = renderer.examples(&clues.iter().map(fields).collect::<Vec<_>>())?;
        let options = PackOptions { row_len: self.seq, ..PackOptions::default() };
        Ok(pack(&examples, &options))
    }

    fn measure<B: KernelBackend>(
        &self,
        rows: Vec<PackedRow>,
        warmup: usize,
        device: &B::Device,
    ) -> Result<Measured, BenchError> {
        let begin = Instant::now();
        let mut model = Llama::<B>::random_frozen(&self.config, self.dtype, device);
        wait::<B>(device)?;
        println!("model drawn and packed in {:.1} s", begin.elapsed().as_secs_f64());
        model.add_lora(&self.lora, 0);
        B::memory_cleanup(device);
        let plan = self.plan(&rows, B::card(device).is_some());
        for (part, bytes) in plan.parts() {
            println!("planned {part:<36} {bytes:>14}");
        }
        let mut trainer = Trainer::new(model, rows, self.train.clone())?;
        for _ in 0..warmup {
            trainer.step()?;
        }
        wait::<B>(device)?;
        let peak_after_warmup = B::allocated(device).map(|allocated| allocated.reserved);
        let begin = Instant::now();
        let (mut tokens, mut loss_tokens, mut last_loss) = (0, 0, 0.0);
        while let Some(report) = trainer.step()? {
            tokens += report.tokens;
            loss_tokens += report.loss_tokens;
            last_loss = report.loss;
        }
        wait::<B>(device)?;
        Ok(Measured {
            seconds: begin.elapsed().as_secs_f64(),
            tokens,
            loss_tokens,
            last_loss,
            planned: plan.total(),
            peak: B::allocated(device).map(|allocated| allocated.reserved),
            peak_after_warmup,
        })
    }

    fn plan(&self, rows: &[PackedRow], on_card: bool) -> MemoryPlan {
        // The first token of a row is nobody's successor, whatever its label.
        let targets =
            rows.iter().flat_map(|row| row.labels.iter().skip(1)).filter(|&&label| label >= 0).count();
        MemoryPlan::new(&PlanSettings {
            config: self.config.clone(),
            lora: self.lora.clone(),
            shape: Shape { batch_rows: self.train.batch_rows, row_len: self.seq },
            accumulation: self.train.accumulation,
            frozen: FrozenFormat::Nf4Double,
            element: self.dtype.size(),
            eight_bit: self.train.optimizer.eight_bit,
            dropout: self.train.dropout > 0.0,
            checkpoint_every: self.train.checkpoint_every,
            loss_share: targets as f64 / (rows.len() * self.seq).max(1) as f64,
            engine: if on_card { Engine::Card } else { Engine::Host },
        })
    }

    /// What recomputation adds: every product of a block but the last.
    fn recomputed_flop(&self) -> f64 {
        let run_again = Target::ALL.into_iter().filter(|&target| target != Target::Down);
        let weights: usize =
            run_again.map(|target| self.config.linear_shape(target).iter().product::<usize>()).sum();
        2.0 * (self.config.num_hidden_layers * weights) as f64
    }

    fn table<B: KernelBackend>(
        &self,
        arguments: &Arguments,
        measured: &Measured,
        device: &B::Device,
    ) -> Result<Vec<Row>, BenchError> {
        let rate = measured.tokens as f64 / measured.seconds;
        let (d, f) = (self.config.hidden_size, self.config.intermediate_size);
        let ceiling = product_rate::<B>([product_rows(d), d, f], self.dtype, BATCH_SECONDS, device)?;
        let commit = commit();
        let shape = format!(
            "{}x{} r{} {} dropout {} {:?}",
            self.train.batch_rows,
            self.seq,
            self.lora.rank,
            arguments.targets,
            self.train.dropout,
            arguments.packing
        );
        let row = |name: &str, value, unit| Row {
            name: format!("training.{name}"),
            device: self.device.clone(),
            shape: shape.clone(),
            value,
            unit,
            peak_memory_bytes: measured.peak,
            dtype: dtype_name(self.dtype),
            commit: commit.clone(),
        };
        let bytes = |bytes: Option<u64>| bytes.map_or(f64::NAN, |bytes| bytes as f64);
        let flop = token_flop(&self.config, &self.lora);
        let mut table = vec![
            row("step", measured.seconds / self.steps as f64, "s"),
            row("tokens", rate, "tokens/s"),
            row("loss_tokens", measured.loss_tokens as f64 / measured.seconds, "tokens/s"),
            row("matmul", ceiling / 1e12, "TFLOP/s"),
            row("mfu", rate * flop / ceiling, "of matmul"),
            row("hfu", rate * (flop + self.recomputed_flop()) / ceiling, "of matmul"),
            row("loss", measured.last_loss, "nats"),
            row("planned_memory", measured.planned as f64, "bytes"),
        ];
        if measured.peak.is_some() {
            table.push(row("peak_memory", bytes(measured.peak), "bytes"));
            table.push(row("peak_memory_after_warmup", bytes(measured.peak_after_warmup), "bytes"));
        }
        if let Some(clue_tokens) = self.clue_tokens {
            table.push(row("clue", clue_tokens, "tokens"));
            table.push(row("epoch", arguments.epoch_clues as f64 * clue_tokens / rate, "s"));
        }
        Ok(table)
    }
}

fn fields(clue: &Clue) -> Fields<'_> {
    Fields { category: &clue.category, question: &clue.question, answer: &clue.answer }
}
