//! Fine-tunes a model on clues and shows what it learnt: answers before and after, an adapter, a report.
//!
//! With no arguments it teaches the tiny model in `datasets/tiny-llama` the sample in `datasets/sample`. Ctrl-C ends the run
//! after the step in hand, saves the adapter and exits with status 0.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::{
    AnswerArgs, Answered, Budget, Corpus, CorpusReport, CorpusSize, DataArgs, EvalSettings, Failure,
    HeldOutLosses, LimitArgs, ModelArgs, Recipe, RecipeArgs, RunPlan, Watch, When, Yardstick, answer_clues,
    build_corpus, bytes, create, device_bytes, duration, finish, judge_answers, load_base, next_run_dir,
    peak_device_bytes, peak_flops, plot_training, read_records, records_path, run_on, write_report,
};
use buzzer::eval::{Scores, exact_match};
use buzzer::kernels::KernelBackend;
use buzzer::model::{Llama, LlamaConfig};
use buzzer::text::Renderer;
use buzzer::train::{MemoryPlan, StepReport, Trainer, token_flop};
use buzzer::weights::{extract_adapter, read_config};
use buzzer::{Device, DeviceJob};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Teach a Llama 2 model question-and-answer clues with QLoRA.
///
/// With no arguments it fine-tunes the tiny model that ships with the project on its sample of clues.
#[derive(Parser)]
#[command(name = "finetune")]
struct Args {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    answer: AnswerArgs,
    /// Device to train on
    #[arg(long, default_value_t, hide_default_value = true)]
    device: Device,
    /// Measure the loss on held-out clues so many times during the run; the best adapter is kept
    #[arg(long, value_name = "N", default_value_t = EvalSettings::default().evaluations)]
    evaluations: u64,
    /// Folder for adapters, recipe, records and report.json [default: runs/finetune-NNN]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Set by the signal handler.
    #[arg(skip)]
    stop: Arc<AtomicBool>,
}

#[derive(Serialize)]
struct Report {
    device: String,
    model: ModelReport,
    recipe: Recipe,
    data: CorpusReport,
    packing: PackingReport,
    steps: u64,
    interrupted: bool,
    loss: Loss,
    eval_loss: Vec<EvalLoss>,
    tokens_per_second: f64,
    loss_tokens_per_second: f64,
    peak_memory_bytes: u64,
    planned_memory_bytes: usize,
    plan: MemoryPlan,
    eval: Eval,
    adapter: PathBuf,
    adapter_best: Option<PathBuf>,
    /// The file of all settings, which can be given again.
    recipe_file: PathBuf,
    /// One record a step.
    records: PathBuf,
    plot: PathBuf,
    seconds: f64,
}

#[derive(Serialize)]
struct ModelReport {
    base: PathBuf,
    parameters: usize,
    trainable: usize,
}

#[derive(Serialize)]
struct PackingReport {
    rows: usize,
    documents: usize,
    tokens: usize,
    loss_tokens: usize,
    efficiency: f64,
}

#[derive(Serialize)]
struct Loss {
    first: f64,
    last: f64,
}

#[derive(Clone, Copy, Serialize)]
struct EvalLoss {
    step: u64,
    /// The one that is trained.
    loss: f64,
    #[serde(flatten)]
    losses: HeldOutLosses,
}

#[derive(Serialize)]
struct Eval {
    before: Scores,
    after: Scores,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    finish(run(&Args::command().get_matches()))
}

fn run(matches: &ArgMatches) -> Result<(), Failure> {
    let (args, recipe) = Args::settle(matches)?;
    listen(&args.stop)?;
    run_on(args.device, Finetune { args: &args, recipe: &recipe })
}

/// From here on Ctrl-C, a hang-up or a polite kill ends the run after the step in hand.
fn listen(stop: &Arc<AtomicBool>) -> Result<(), Failure> {
    let told = Arc::clone(stop);
    Ok(ctrlc::set_handler(move || told.store(true, Ordering::SeqCst))?)
}

struct Finetune<'a> {
    args: &'a Args,
    /// As it was asked for: the run below may shorten it to what there is.
    recipe: &'a Recipe,
}

impl DeviceJob for Finetune<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let started = Instant::now();
        let args = self.args;
        let mut recipe = self.recipe.clone();
        let config = read_config(&args.model.model)?;
        recipe.packing.row_len = recipe.packing.row_len.min(config.max_position_embeddings);
        let renderer = Renderer::new(args.model.open_tokenizer()?, recipe.template);
        renderer.tokenizer().notes().iter().for_each(|note| println!("tokenizer {note}"));
        let corpus = build_corpus(&args.data, &renderer, recipe.packing)?;
        println!("{}", corpus.describe(recipe.packing));
        recipe.limit_steps(corpus.train.rows.len());

        let plan = args.plan::<B>(&config, &recipe, &corpus, device)?;
        let mut model = load_base::<B>(&args.model, device)?.model;
        model.add_lora(&recipe.lora, recipe.train.seed);
        let (parameters, trainable) = (config.parameters(), model.lora_parameters());
        println!("model     {}: {parameters} parameters, {trainable} trainable", args.model.model.display());
        let out = args.out.clone().map_or_else(|| next_run_dir("finetune"), Ok)?;
        create(&out)?;
        let recipe_file = self.recipe.write(&out)?;
        let mut watch = watch(&out, &recipe, &model, corpus.train.rows.len())?;
        let before = answer(&model, &renderer, &corpus, &args.answer, "before")?;
        watch.accuracy(0, When::Before, judge_answers(&before));
        // Buffers of answering have other sizes than those of training.
        B::memory_cleanup(device);
        let run = Run { args, recipe: &recipe, corpus: &corpus, out: &out };
        let trained = run.train(model, &mut watch)?;
        B::memory_cleanup(device);
        let after = answer(&trained.model, &renderer, &corpus, &args.answer, "after")?;
        watch.accuracy(trained.steps, When::After, judge_answers(&after));
        show(&before, &after);

        let packing = corpus.train.report;
        let report = Report {
            device: args.device.to_string(),
            model: ModelReport { base: args.model.model.clone(), parameters, trainable },
            packing: PackingReport {
                rows: packing.rows,
                documents: packing.documents,
                tokens: packing.tokens,
                loss_tokens: packing.loss_tokens,
                efficiency: packing.efficiency,
            },
            steps: trained.steps,
            interrupted: trained.interrupted,
            loss: trained.loss,
            eval_loss: trained.eval_loss,
            tokens_per_second: trained.tokens_per_second,
            loss_tokens_per_second: trained.loss_tokens_per_second,
            peak_memory_bytes: trained.peak_memory_bytes,
            planned_memory_bytes: plan.total(),
            plan,
            eval: Eval { before: judge_answers(&before), after: judge_answers(&after) },
            adapter: out.join("adapter"),
            adapter_best: trained.best.map(|_| out.join("adapter-best")),
            recipe_file,
            records: records_path(&out),
            plot: plot_training(&out, &read_records(&out)?)?,
            seconds: started.elapsed().as_secs_f64(),
            recipe,
            data: corpus.report,
        };
        let path = write_report(&out, &report)?;
        summary(&report, &path);
        Ok(())
    }
}

/// Begins the records of a run over so many rows.
fn watch<B: KernelBackend>(
    out: &Path,
    recipe: &Recipe,
    model: &Llama<B>,
    rows: usize,
) -> Result<Watch, Failure> {
    let yardstick = Yardstick {
        loss_on: recipe.packing.loss_on,
        token_flop: token_flop(model.config(), &recipe.lora),
        peak_flops: peak_flops::<B>(&model.device(), model.dtype()),
    };
    let (_, steps) = recipe.train.length(rows);
    Watch::new(out, yardstick, steps, None)
}

impl Args {
    /// The arguments and the recipe that they and its file make; where the file holds a setting, the arguments hold it too.
    fn settle(matches: &ArgMatches) -> Result<(Self, Recipe), Failure> {
        let recipe = Recipe::resolve(matches, None)?;
        let args = Self {
            data: recipe.data.clone(),
            model: recipe.model.clone(),
            limits: recipe.limits,
            answer: recipe.answer,
            device: recipe.device,
            evaluations: recipe.eval.evaluations,
            ..Self::from_arg_matches(matches)?
        };
        Ok((args, recipe))
    }

    /// Prints the plan, and refuses what does not fit before anything is loaded.
    fn plan<B: KernelBackend>(
        &self,
        config: &LlamaConfig,
        recipe: &Recipe,
        corpus: &Corpus,
        device: &B::Device,
    ) -> Result<MemoryPlan, Failure> {
        self.limits.enforce(self.device)?;
        let budget = Budget::of_device::<B>(self.device, device, self.model.dtype)?.limited(self.limits)?;
        let corpus = CorpusSize::of(corpus);
        let plan = RunPlan::new(config, recipe, self.model.quantization, &corpus, &budget);
        println!("{}", plan.describe());
        let (_, steps) = recipe.train.length(corpus.rows);
        match budget.predict(plan.work) {
            Some(seconds) => {
                let whole = duration(seconds * steps as f64);
                println!("steps     {steps}, {whole} predicted from the card's data sheet");
            }
            None => println!("steps     {steps}"),
        }
        plan.check()?;
        Ok(plan.memory)
    }
}

fn answer<B: KernelBackend>(
    model: &Llama<B>,
    renderer: &Renderer,
    corpus: &Corpus,
    args: &AnswerArgs,
    when: &'static str,
) -> Result<Vec<Answered>, Failure> {
    let style = ProgressStyle::with_template("{msg:9} {bar:30} {pos}/{len} clues answered  {eta} left")?;
    let bar = ProgressBar::new(corpus.eval_clues.len() as u64).with_style(style).with_message(when);
    let answered =
        answer_clues(model, renderer, &corpus.eval_clues, args, |count| bar.set_position(count as u64))?;
    bar.finish_and_clear();
    let Scores { exact_match, f1, n } = judge_answers(&answered);
    println!(
        "{when:9} exact match {:.1} %, F1 {:.1} % on {n} held-out clues",
        100.0 * exact_match,
        100.0 * f1
    );
    Ok(answered)
}

/// What a run needs besides the model.
struct Run<'a> {
    args: &'a Args,
    recipe: &'a Recipe,
    corpus: &'a Corpus,
    out: &'a Path,
}

/// What a run leaves.
struct Trained<B: KernelBackend> {
    model: Llama<B>,
    steps: u64,
    interrupted: bool,
    loss: Loss,
    eval_loss: Vec<EvalLoss>,
    best: Option<f64>,
    tokens_per_second: f64,
    loss_tokens_per_second: f64,
    /// Of the training, beside which the plan stands.
    peak_memory_bytes: u64,
}

impl Run<'_> {
    fn train<B: KernelBackend>(&self, model: Llama<B>, watch: &mut Watch) -> Result<Trained<B>, Failure> {
        let stop = &self.args.stop;
        let mut trainer = Trainer::new(model, self.corpus.train.rows.clone(), self.recipe.train.clone())?;
        let total = trainer.total_steps();
        let every = (total / self.args.evaluations.max(1)).max(1);
        let mut reports: Vec<StepReport> = Vec::with_capacity(total as usize);
        let (mut eval_loss, mut best) = (Vec::new(), None);
        while !stop.load(Ordering::SeqCst) {
            let Some(report) = trainer.step()? else { break };
            reports.push(report);
            watch.step(&report, device_bytes::<B>(&trainer.model().device()));
            if self.args.evaluations > 0 && report.step % every == 0 {
                self.evaluate(&trainer, &mut eval_loss, &mut best, watch)?;
            }
        }
        watch.finish();
        let interrupted = stop.load(Ordering::SeqCst);
        if interrupted {
            println!("stopped   after step {} of {total}; saving the adapter", trainer.steps_done());
        }
        self.save(trainer.model(), "adapter")?;
        let seconds: f64 = reports.iter().map(|report| report.seconds).sum();
        let rate = |count: usize| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        Ok(Trained {
            steps: trainer.steps_done(),
            interrupted,
            loss: Loss {
                first: reports.first().map_or(0.0, |report| report.loss),
                last: reports.last().map_or(0.0, |report| report.loss),
            },
            eval_loss,
            best,
            tokens_per_second: rate(reports.iter().map(|report| report.tokens).sum()),
            loss_tokens_per_second: rate(reports.iter().map(|report| report.loss_tokens).sum()),
            peak_memory_bytes: peak_device_bytes::<B>(&trainer.model().device()),
            model: trainer.into_model(),
        })
    }

    /// The loss on held-out rows; keeps the adapter if it is the best so far.
    fn evaluate<B: KernelBackend>(
        &self,
        trainer: &Trainer<B>,
        losses: &mut Vec<EvalLoss>,
        best: &mut Option<f64>,
        watch: &mut Watch,
    ) -> Result<(), Failure> {
        let (step, found) = (trainer.steps_done(), self.corpus.held_out.losses(trainer));
        watch.held_out(step, &found);
        let Some(loss) = found.trained() else { return Ok(()) };
        losses.push(EvalLoss { step, loss, losses: found });
        if best.is_none_or(|best| loss < best) {
            *best = Some(loss);
            self.save(trainer.model(), "adapter-best")?;
        }
        Ok(())
    }

    fn save<B: KernelBackend>(&self, model: &Llama<B>, name: &str) -> Result<(), Failure> {
        let base = self.args.model.model.display().to_string();
        let adapter = extract_adapter(model, &self.recipe.lora, self.recipe.train.dropout, Some(base));
        Ok(adapter.write(&self.out.join(name))?)
    }
}

/// Five clues with the answers before and after.
fn show(before: &[Answered], after: &[Answered]) {
    for (before, after) in before.iter().zip(after).take(5) {
        let mark = if exact_match(&after.answer, &after.clue.answer) { "right" } else { "wrong" };
        let first_line = |answer: &str| answer.lines().next().unwrap_or_default().to_owned();
        println!("clue      {}", after.clue.question);
        println!("          before: {:?}", first_line(&before.answer));
        println!(
            "          after:  {:?} ({mark}; expected {:?})",
            first_line(&after.answer),
            after.clue.answer
        );
    }
}

fn summary(report: &Report, path: &Path) {
    println!(
        "done      {} steps in {:.0} s, {:.0} tokens/s, peak memory {} ({} planned)",
        report.steps,
        report.seconds,
        report.tokens_per_second,
        bytes(report.peak_memory_bytes),
        bytes(report.planned_memory_bytes as u64)
    );
    println!(
        "result    exact match {:.1} % before, {:.1} % after",
        100.0 * report.eval.before.exact_match,
        100.0 * report.eval.after.exact_match
    );
    println!(
        "written   {} and {}; records in {}",
        report.adapter.display(),
        path.display(),
        report.records.display()
    );
}
