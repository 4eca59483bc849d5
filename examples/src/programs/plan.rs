//! Tells memory by part, tokens, steps and expected time of a run before it starts, here or on a card that is not here.
//!
//! On a present device time comes from real steps on random weights of the shape; for a named card from data sheets, and is
//! then called a prediction. A plan that does not fit ends with status 3 and flags that would.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use buzzer::data::{PackedRow, Packing};
use buzzer::kernels::{CardModel, KernelBackend};
use buzzer::model::{Llama, LlamaConfig};
use buzzer::text::Renderer;
use buzzer::train::{MemoryPlan, TrainSettings, Trainer};
use buzzer::weights::read_config;
use buzzer::{Device, DeviceJob};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, ValueEnum};
use serde::Serialize;

use crate::{
    Budget, CorpusSize, DataArgs, Failure, LimitArgs, ModelArgs, Preset, Proposal, Recipe, RecipeArgs,
    RunPlan, Wanted, build_corpus, bytes, duration, finish, run_on, write_report,
};

/// Plan a fine-tuning run: memory by part, tokens, steps, time.
///
/// With --card it plans for a card that need not be here. Exits with status 3 if the plan does not fit.
#[derive(Parser)]
#[command(name = "plan")]
struct Args {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// Plan for a published shape instead of a model's folder; clues are then assumed, as with --clues
    #[arg(long, value_enum, conflicts_with = "model")]
    shape: Option<PublishedShape>,
    /// Assume so many clues instead of reading a file [default with --shape: 216930]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    clues: Option<u32>,
    /// Their mean length in tokens [default: 37.8]
    #[arg(long, value_name = "TOKENS")]
    clue_tokens: Option<f64>,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Card to plan for: t4, l4, a10, 3090, 4090, a100, a100-80, h100 or h200 [default: the device here]
    #[arg(long, value_name = "NAME")]
    card: Option<CardModel>,
    /// Device to plan for and to measure on
    #[arg(long, default_value_t, hide_default_value = true, conflicts_with = "card")]
    device: Device,
    /// Take no measurement; predict
    #[arg(long)]
    no_measurement: bool,
    /// Folder for report.json
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PublishedShape {
    #[value(name = "llama2-7b")]
    Llama2_7b,
    #[value(name = "llama2-13b")]
    Llama2_13b,
    #[value(name = "llama2-70b")]
    Llama2_70b,
}

/// Clues of the whole game's file.
const ALL_CLUES: u32 = 216_930;
/// Steps whose time is taken, after one that compiles kernels.
const TIMED_STEPS: usize = 2;
/// Operations a second that two cores reach, and the longest measurement on a processor.
const HOST_FLOPS: f64 = 60e9;
const HOST_SECONDS: f64 = 60.0;

#[derive(Serialize)]
struct Report {
    device: String,
    dtype: String,
    model: ModelReport,
    recipe: Recipe,
    packing: CorpusSize,
    steps: u64,
    plan: MemoryPlan,
    planned_memory_bytes: usize,
    usable_memory_bytes: Option<u64>,
    fits: bool,
    proposal: Option<Proposal>,
    /// Where the times come from: measured, predicted, or nothing.
    time: &'static str,
    seconds_per_step: Option<f64>,
    tokens_per_second: Option<f64>,
    seconds: Option<f64>,
    /// What the allocator had taken after the measured steps.
    measured_memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct ModelReport {
    parameters: usize,
    trainable: usize,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    finish(run(&Args::command().get_matches()))
}

fn run(matches: &ArgMatches) -> Result<(), Failure> {
    let (mut args, recipe) = Args::settle(matches)?;
    args.fetch()?;
    let (args, recipe) = (&args, &recipe);
    match args.card {
        Some(card) => {
            let budget = Budget::of_card(card, args.model.dtype)?.limited(args.limits)?;
            Ready::new(args, recipe, budget)?.tell(args, None)
        }
        None => run_on(args.device, Here { args, recipe }),
    }
}

impl Args {
    /// The arguments and the recipe that they and its file make; where the file holds a setting, the arguments hold it too.
    fn settle(matches: &ArgMatches) -> Result<(Self, Recipe), Failure> {
        let args = Self::from_arg_matches(matches)?;
        // A shape is no model that ships with the project, whatever the default of --model is.
        let recipe = Recipe::resolve(matches, args.shape.map(|_| Preset::Notebook))?;
        let args = Self {
            data: recipe.data.clone(),
            model: recipe.model.clone(),
            limits: recipe.limits,
            device: recipe.device,
            ..args
        };
        Ok((args, recipe))
    }

    /// Puts paths in the place of names on the hub; a plan needs no weights.
    fn fetch(&mut self) -> Result<(), Failure> {
        self.data.fetch()?;
        if self.shape.is_some() { Ok(()) } else { self.model.fetch(Wanted::Description) }
    }
}

/// A plan for the device that the program runs on.
struct Here<'a> {
    args: &'a Args,
    recipe: &'a Recipe,
}

impl DeviceJob for Here<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let args = self.args;
        args.limits.enforce(args.device)?;
        let budget = Budget::of_device::<B>(args.device, device, args.model.dtype)?.limited(args.limits)?;
        let ready = Ready::new(args, self.recipe, budget)?;
        let measured = (ready.plan.fits() && !args.no_measurement && ready.is_quick())
            .then(|| ready.measure::<B>(device))
            .transpose()?;
        ready.tell(args, measured)
    }
}

/// Everything that the arguments decide.
struct Ready {
    config: LlamaConfig,
    recipe: Recipe,
    corpus: CorpusSize,
    budget: Budget,
    plan: RunPlan,
    steps: u64,
}

struct Measured {
    seconds_per_step: f64,
    memory_bytes: Option<u64>,
}

impl Ready {
    fn new(args: &Args, recipe: &Recipe, budget: Budget) -> Result<Self, Failure> {
        let mut recipe = recipe.clone();
        let config = match args.shape {
            Some(PublishedShape::Llama2_7b) => LlamaConfig::llama2_7b(),
            Some(PublishedShape::Llama2_13b) => LlamaConfig::llama2_13b(),
            Some(PublishedShape::Llama2_70b) => LlamaConfig::llama2_70b(),
            None => read_config(&args.model.model)?,
        };
        recipe.packing.row_len = recipe.packing.row_len.min(config.max_position_embeddings);
        let corpus = match (args.clues, args.shape) {
            (None, None) => {
                let renderer = Renderer::new(args.model.open_tokenizer()?, recipe.template);
                CorpusSize::of(&build_corpus(&args.data, &renderer, recipe.packing)?)
            }
            (clues, _) => CorpusSize::assumed(clues.unwrap_or(ALL_CLUES) as usize, args.clue_tokens, &recipe),
        };
        recipe.limit_steps(corpus.rows);
        let (_, steps) = recipe.train.length(corpus.rows);
        let plan = RunPlan::new(&config, &recipe, args.model.quantization, &corpus, &budget);
        Ok(Self { config, recipe, corpus, budget, plan, steps })
    }

    /// Whether steps can be tried: always on a card, and on a processor if they take seconds.
    fn is_quick(&self) -> bool {
        self.budget.model.is_some() || self.host_seconds() * (TIMED_STEPS + 1) as f64 <= HOST_SECONDS
    }

    fn host_seconds(&self) -> f64 {
        self.plan.work.flop / HOST_FLOPS
    }

    /// Real steps on random weights.
    fn measure<B: KernelBackend>(&self, device: &B::Device) -> Result<Measured, Failure> {
        println!("measuring {} steps on random weights", TIMED_STEPS + 1);
        let mut model = Llama::<B>::random_frozen(&self.config, self.budget.dtype, device);
        model.add_lora(&self.recipe.lora, 0);
        B::memory_cleanup(device);
        // Two batches show what each further one costs, and that gradients are added up.
        let accumulation = self.recipe.train.accumulation.min(2);
        let settings = TrainSettings { accumulation, epochs: 1.0, ..self.recipe.train.clone() };
        let count = settings.rows_per_step() * (TIMED_STEPS + 1);
        let rows = (0..count).map(|row| self.row(row as u32)).collect();
        let mut trainer = Trainer::new(model, rows, settings)?;
        trainer.step()?;
        let sync =
            || B::sync(device).map_err(|error| Failure::input(format!("the device failed: {error:?}")));
        sync()?;
        let started = Instant::now();
        while trainer.step()?.is_some() {}
        sync()?;
        let repeats = self.recipe.train.accumulation as f64 / accumulation as f64;
        Ok(Measured {
            seconds_per_step: started.elapsed().as_secs_f64() / TIMED_STEPS as f64 * repeats,
            memory_bytes: B::allocated(device).map(|allocated| allocated.reserved),
        })
    }

    /// A full row of documents of the mean length, with as many targets as the corpus has.
    fn row(&self, number: u32) -> PackedRow {
        let length = self.plan.settings.shape.row_len;
        let document = match self.recipe.packing.packing {
            Packing::Isolated => (self.corpus.mean_len.round() as usize).clamp(2, length),
            Packing::Wrapped | Packing::None => length,
        };
        let vocabulary = self.config.vocab_size as u32;
        let id = |place: usize| {
            (number.wrapping_mul(0x9E37_79B9) ^ (place as u32).wrapping_mul(0x85EB_CA6B)) % vocabulary
        };
        let first_target = ((1.0 - self.corpus.loss_share) * document as f64) as usize;
        let is_target = |place: usize| !place.is_multiple_of(document) && place % document >= first_target;
        PackedRow {
            ids: (0..length).map(id).collect(),
            labels: (0..length).map(|place| if is_target(place) { id(place) as i32 } else { -100 }).collect(),
            positions: (0..length).map(|place| (place % document) as u32).collect(),
            documents: (0..length).map(|place| (place / document) as i32).collect(),
        }
    }

    /// Prints, writes the report, and ends with status 3 if the plan does not fit.
    fn tell(self, args: &Args, measured: Option<Measured>) -> Result<(), Failure> {
        let predicted = || {
            let host = self.budget.name == "cpu";
            self.budget.predict(self.plan.work).or_else(|| host.then(|| self.host_seconds()))
        };
        let (time, seconds_per_step) = match &measured {
            Some(measured) => ("measured", Some(measured.seconds_per_step)),
            None => predicted().map_or(("none", None), |seconds| ("predicted", Some(seconds))),
        };
        let per_epoch = |seconds: f64| seconds * self.steps as f64;
        let tokens_of_step = self.corpus.tokens as f64 / self.corpus.rows.max(1) as f64
            * self.recipe.train.rows_per_step() as f64;
        println!("{}", self.plan.describe());
        println!(
            "steps     {} of {} rows; {} documents, {} tokens in {} rows",
            self.steps,
            self.recipe.train.rows_per_step(),
            self.corpus.documents,
            self.corpus.tokens,
            self.corpus.rows,
        );
        match seconds_per_step {
            Some(seconds) => println!(
                "time      {} ({time}: {seconds:.2} s a step, {:.0} tokens/s)",
                duration(per_epoch(seconds)),
                tokens_of_step / seconds
            ),
            None => println!("time      not known for {}", self.budget.name),
        }
        if let Some(held) = measured.as_ref().and_then(|measured| measured.memory_bytes) {
            println!("memory    {} taken by the measured steps", bytes(held));
        }
        let fits = self.plan.check();
        let report = Report {
            device: self.budget.name.clone(),
            dtype: format!("{:?}", self.budget.dtype).to_lowercase(),
            model: ModelReport {
                parameters: self.config.parameters(),
                trainable: self.plan.settings.lora_parameters(),
            },
            packing: self.corpus,
            steps: self.steps,
            plan: self.plan.memory,
            planned_memory_bytes: self.plan.memory.total(),
            usable_memory_bytes: self.budget.usable_bytes,
            fits: fits.is_ok(),
            proposal: if fits.is_ok() { None } else { self.plan.propose() },
            time,
            seconds_per_step,
            tokens_per_second: seconds_per_step.map(|seconds| tokens_of_step / seconds),
            seconds: seconds_per_step.map(per_epoch),
            measured_memory_bytes: measured.and_then(|measured| measured.memory_bytes),
            recipe: self.recipe,
        };
        if let Some(out) = &args.out {
            println!("written   {}", write_report(out, &report)?.display());
        }
        fits
    }
}
