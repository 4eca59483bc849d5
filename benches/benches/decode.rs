//! Times answering: prompts, then tokens, for one user and for many.
//!
//! `cargo bench --bench decode --features cuda -- --model llama2-7b --random-init --adapter-rank 64 --batch 1,8,32
//! --prompt 512 --new 128 --json FILE`. With no arguments and no card it runs a tiny shape on the processor. Speed
//! does not depend on the weights' values, so they are random, and prompts are random tokens without a common
//! beginning. Tokens a second are counted while all answers of a batch are in progress: from the last first token
//! to the first end.

use std::process::ExitCode;
use std::time::Instant;

use buzzer::DeviceJob;
use buzzer::burn::tensor::DType;
use buzzer::infer::{CacheDtype, Engine, EngineSettings, Event, Request};
use buzzer::kernels::{Card, KernelBackend};
use buzzer::model::{Llama, LlamaConfig, LoraSettings, PagedCache, Target};
use buzzer_benches::{
    BATCH_SECONDS, BenchError, CommonArgs, Compute, Row, Shapes, commit, copy_rate, dtype_name, random_ids,
    run_bench, wait,
};
use clap::Parser;

/// Tokens of a page.
const PAGE_TOKENS: usize = 16;
/// Elements of the copy that is the ceiling of memory: no cache holds them.
const COPIED: usize = 1 << 28;
/// The same on the processor.
const COPIED_ON_HOST: usize = 1 << 24;

/// Time answering on a model of random weights.
#[derive(Parser, Clone)]
#[command(name = "decode")]
struct Arguments {
    /// Shape of the model [default: llama2-7b on a card, else tiny].
    #[arg(long, value_enum)]
    model: Option<Shapes>,
    /// Draw the weights, which is the only way here.
    #[arg(long)]
    random_init: bool,
    /// Blocks, if not as many as the shape has.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    layers: Option<u32>,
    /// Rank of a live adapter on all linears; 0 for none.
    #[arg(long, value_name = "R", default_value_t = 0)]
    adapter_rank: usize,
    /// Requests at a time.
    #[arg(long, value_name = "B,B", value_delimiter = ',', default_value = "1,8", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Vec<u32>,
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens of an answer; more than the passes that all prompts of a batch take.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    new: u32,
    /// Tokens of prompts in one pass.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
    /// Submit the operations of a step one by one, also where the device can run them as one program.
    #[arg(long)]
    one_by_one: bool,
    /// Keep keys and values in 8 bits, for which there is no such program.
    #[arg(long)]
    int8_cache: bool,
    /// Dtype to compute in [default: what the device has].
    #[arg(long, value_enum)]
    dtype: Option<Compute>,
    #[command(flatten)]
    common: CommonArgs,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run_bench("decode", arguments.common.choose_device(), Job(&arguments))
}

struct Job<'a>(&'a Arguments);

impl DeviceJob for Job<'_> {
    type Output = Result<(), BenchError>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Self::Output {
        let card = B::card(device);
        let dtype = Compute::dtype(self.0.dtype, card.as_ref());
        let config = self.0.config(card.as_ref());
        let name = card.as_ref().map_or_else(|| self.0.common.device.to_string(), |card| card.name.clone());
        println!(
            "decode on {name}, {dtype:?}: {} parameters, rank {}",
            config.parameters(),
            self.0.adapter_rank
        );
        let elements = if card.is_some() { COPIED } else { COPIED_ON_HOST };
        let bandwidth = copy_rate::<B>(elements, BATCH_SECONDS, device)?;
        let mut model = Llama::<B>::random_frozen(&config, dtype, device);
        if self.0.adapter_rank > 0 {
            let targets = Target::ALL.to_vec();
            model.add_lora(
                &LoraSettings { rank: self.0.adapter_rank, alpha: 16.0, rslora: false, targets },
                0,
            );
        }
        B::memory_cleanup(device);
        wait::<B>(device)?;
        let mut setup = Setup::<B> { arguments: self.0, model, dtype, name, bandwidth, rows: Vec::new() };
        setup.row("copy", "f32", bandwidth / 1e9, "GB/s");
        for &batch in &self.0.batch {
            setup.measure(batch as usize)?;
        }
        self.0.common.write(&setup.rows)
    }
}

impl Arguments {
    fn config(&self, card: Option<&Card>) -> LlamaConfig {
        let config = Shapes::or_of(self.model, card).config();
        let layers = self.layers.map_or(config.num_hidden_layers, |layers| layers as usize);
        LlamaConfig { num_hidden_layers: layers, ..config }
    }

    fn cache_dtype(&self) -> CacheDtype {
        if self.int8_cache { CacheDtype::Int8 } else { CacheDtype::Compute }
    }
}

struct Setup<'a, B: KernelBackend> {
    arguments: &'a Arguments,
    model: Llama<B>,
    dtype: DType,
    name: String,
    /// Bytes a second of a copy.
    bandwidth: f64,
    rows: Vec<Row>,
}

/// What one batch took.
struct Measured {
    /// From the requests to the first token of each, seconds.
    first: Vec<f64>,
    /// Tokens a second while all answers were in progress.
    rate: f64,
}

impl<B: KernelBackend> Setup<'_, B> {
    fn row(&mut self, name: &str, shape: &str, value: f64, unit: &'static str) {
        println!("{:<28} {shape:<28} {value:>12.4} {unit}", format!("decode.{name}"));
        self.rows.push(Row {
            name: format!("decode.{name}"),
            device: self.name.clone(),
            shape: shape.to_owned(),
            value,
            unit,
            peak_memory_bytes: B::allocated(&self.model.device()).map(|allocated| allocated.reserved),
            dtype: dtype_name(self.dtype),
            commit: commit(),
        });
    }

    /// Bytes of a page of so many tokens.
    fn page_bytes(&self, tokens: usize) -> usize {
        let format = self.arguments.cache_dtype().format(self.dtype);
        PagedCache::<B>::page_bytes(self.model.config(), tokens, format)
    }

    fn measure(&mut self, batch: usize) -> Result<(), BenchError> {
        let (prompt, new) = (self.arguments.prompt as usize, self.arguments.new as usize);
        let pages = batch * (prompt + new).div_ceil(PAGE_TOKENS) + 1;
        let settings = EngineSettings {
            budget_bytes: pages * self.page_bytes(PAGE_TOKENS)
                + Engine::step_bytes(&self.model, PAGE_TOKENS, self.arguments.cache_dtype()),
            cache_dtype: self.arguments.cache_dtype(),
            page_tokens: PAGE_TOKENS,
            max_batch: batch,
            prefill_chunk: self.arguments.chunk as usize,
            step_programs: !self.arguments.one_by_one,
        };
        let mut engine = Engine::new(self.model.clone(), settings)?;
        // Kernels are compiled in the first run.
        self.answer(&mut engine, batch, 0)?;
        let measured = self.answer(&mut engine, batch, 1)?;
        let cache = if self.arguments.int8_cache { " int8" } else { "" };
        let shape = format!("{batch} x {prompt} + {new} r{}{cache}", self.arguments.adapter_rank);
        let last = measured.first.iter().copied().fold(0.0, f64::max);
        let mean = measured.first.iter().sum::<f64>() / batch as f64;
        let steps = measured.rate / batch as f64;
        self.row("tokens", &shape, measured.rate, "tokens/s");
        self.row("first_token", &shape, mean, "s");
        self.row("prefill", &shape, (batch * prompt) as f64 / last, "tokens/s");
        let share = steps * self.step_bytes(batch, prompt + new / 2) / self.bandwidth;
        self.row("bandwidth", &shape, share, "of copy");
        match engine.step_launches(batch) {
            Ok(Some(launches)) => self.row("launches", &shape, launches as f64, "a token"),
            Ok(None) => {}
            Err(reason) => println!("{reason}"),
        }
        Ok(())
    }

    fn answer(&self, engine: &mut Engine<B>, batch: usize, run: u64) -> Result<Measured, BenchError> {
        for request in 0..batch as u64 {
            let number = ((run << 32) | request) + 1;
            let prompt = random_ids(number, self.arguments.prompt as usize, self.model.config().vocab_size);
            engine.submit(Request::new(prompt).with_max_new_tokens(self.arguments.new as usize))?;
        }
        let begin = Instant::now();
        let mut first = vec![None; batch];
        let base = run as usize * batch;
        let (mut all, mut tokens, mut rate) = (None, 0, f64::NAN);
        while !engine.is_idle() {
            let events = engine.step()?;
            let now = begin.elapsed().as_secs_f64();
            let ended = events.iter().any(|event| matches!(event, Event::Finished { .. }));
            for event in &events {
                first[event.request().0 as usize - base].get_or_insert(now);
            }
            match all {
                None if first.iter().all(Option::is_some) => all = Some(now),
                Some(since) if rate.is_nan() => {
                    tokens += events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
                    if ended {
                        rate = tokens as f64 / (now - since);
                    }
                }
                _ => {}
            }
        }
        Ok(Measured { first: first.into_iter().flatten().collect(), rate })
    }

    /// Bytes that a step has to read: weights, factors in the compute dtype, the head, and keys and values of so
    /// many tokens.
    fn step_bytes(&self, batch: usize, tokens: usize) -> f64 {
        let config = self.model.config();
        let size = self.dtype.size();
        let table = config.vocab_size * config.hidden_size * size;
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        let weights = self.model.weight_bytes() - (tables - 1) * table;
        let cache = batch * self.page_bytes(tokens);
        (weights + self.model.lora_parameters() * size + cache) as f64
    }
}
