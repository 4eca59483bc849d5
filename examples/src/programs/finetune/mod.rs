//! Fine-tunes a model on clues and shows what it learnt: answers before and after, an adapter, a report.
//!
//! With no arguments it teaches the tiny model in `datasets/tiny-llama` the sample in `datasets/sample`. Ctrl-C ends the run
//! after the step in hand, saves a checkpoint and the adapter, and exits with status 0; `--resume` goes on from there, or from
//! the last checkpoint before a run was killed, to the same bits as if nothing had happened.

mod history;
mod report;
mod resume;
mod run;
mod saving;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use crate::{
    AnswerArgs, Answered, Budget, Corpus, CorpusSize, DataArgs, EvalSettings, Failure, LimitArgs, ModelArgs,
    Recipe, RecipeArgs, RunPlan, StopSignal, Wanted, When, Writing, answer_clues, build_corpus, duration,
    finish, judge_answers, load_base, next_run_dir, plot_training, read_records, records_path, run_on, say,
    write_report,
};
use buzzer::eval::Scores;
use buzzer::kernels::KernelBackend;
use buzzer::model::{Llama, LlamaConfig};
use buzzer::text::Renderer;
use buzzer::train::{MemoryPlan, TrainerState};
use buzzer::weights::{attach_adapter, read_config};
use buzzer::{Device, DeviceJob};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};
use indicatif::{ProgressBar, ProgressStyle};

use crate::recipe::RECIPE_FILE;
use history::History;
use report::{Eval, ModelReport, Report, show};
use resume::{RUNS, Start, fingerprint};
use run::{ADAPTER, BEST_ADAPTER, Run, Trained};
use saving::{CHECKPOINTS, SaveArgs};

/// Teach a Llama 2 model question-and-answer clues with QLoRA.
///
/// With no arguments it fine-tunes the tiny model that ships with the project on its sample of clues.
#[derive(Clone, Parser)]
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
    /// Folder for adapters, recipe, records, checkpoints and report.json [default: runs/finetune-NNN]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    save: SaveArgs,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    finish(start(&Args::command().get_matches()))
}

fn start(matches: &ArgMatches) -> Result<(), Failure> {
    let mut start = Start::resolve(matches)?;
    // Before signals are listened to: they end a download at once.
    start.args.data.fetch()?;
    start.args.model.fetch(Wanted::Model)?;
    let stop = StopSignal::listen()?;
    run_on(start.args.device, Finetune { start, stop })
}

struct Finetune {
    start: Start,
    stop: StopSignal,
}

/// What training needs and a report tells, besides the model.
struct Prepared {
    recipe: Recipe,
    config: LlamaConfig,
    renderer: Renderer,
    corpus: Corpus,
    plan: MemoryPlan,
}

impl DeviceJob for Finetune {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let started = Instant::now();
        let Self { start, stop } = self;
        let prepared = start.args.prepare::<B>(start.recipe.clone(), device)?;
        let Prepared { recipe, config, corpus, .. } = &prepared;
        let fingerprint = fingerprint::<B>(&start.args, config, recipe, corpus, device)?;
        start.check(&fingerprint)?;
        let mut history = start.history()?;
        let (args, asked) = (start.args.clone(), start.recipe.clone());
        let mut model = load_base::<B>(&args.model, device)?.model;
        let state = put_factors(&mut model, recipe, start)?;
        let (parameters, trainable) = (config.parameters(), model.lora_parameters());
        say!("model     {}: {parameters} parameters, {trainable} trainable", args.model.model.display());
        let out = args.out.clone().map_or_else(|| next_run_dir(RUNS), Ok)?;
        let card = B::card(device).map(|card| card.name);
        match &state {
            Some(state) => go_on(state, &history, card.as_deref()),
            None => {
                let before = answer(&model, &prepared, &args.answer, "before")?;
                history.before = before.into_iter().map(|answered| answered.answer).collect();
            }
        }
        history.card = card;
        // Buffers of answering have other sizes than those of training.
        B::memory_cleanup(device);
        let earlier_seconds = history.seconds;
        let run = Run {
            args: &args,
            asked: &asked,
            recipe,
            corpus,
            out: &out,
            stop: &stop,
            fingerprint,
            started,
            earlier_seconds,
        };
        let mut trained = run.train(model, state.as_ref(), &mut history)?;
        B::memory_cleanup(device);
        let before = history.answered_before(&corpus.eval_clues, recipe.template);
        let mut after = None;
        if !trained.interrupted {
            let answers = answer(&trained.model, &prepared, &args.answer, "after")?;
            show(&before, &answers);
            let scores = judge_answers(&answers);
            trained.watch.accuracy(trained.steps, When::After, scores);
            after = Some(scores);
        }
        let eval = Eval { before: judge_answers(&before), after };
        let base = ModelReport { base: args.model.model.clone(), parameters, trainable };
        let report = run.report(&prepared, base, eval, &trained, &history, state.as_ref());
        let written = report.and_then(|report| Ok((write_report(&out, &report)?, report)));
        let (path, report) = written.map_err(|failure| run.resumable(failure))?;
        report.summarize(&path);
        Ok(())
    }
}

/// Gives a model the factors that training begins or goes on with; the state to go on from, if there is one.
fn put_factors<B: KernelBackend>(
    model: &mut Llama<B>,
    recipe: &Recipe,
    start: Start,
) -> Result<Option<TrainerState>, Failure> {
    let Some((state, adapter, path)) = start.into_state() else {
        model.add_lora(&recipe.lora, recipe.train.seed);
        return Ok(None);
    };
    attach_adapter(model, &adapter, &path)?;
    Ok(Some(state))
}

/// Says where a run goes on, and whether that may be felt.
fn go_on(state: &TrainerState, history: &History, card: Option<&str>) {
    say!("resumed   after step {}", state.progress.step);
    if history.card.as_deref() != card {
        let name = |card: Option<&str>| card.unwrap_or("no card").to_owned();
        let (there, here) = (name(history.card.as_deref()), name(card));
        say!("warning   the run began on {there} and goes on on {here}: it may end with other bits");
    }
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

    /// Reads all but the weights, and says what came of it. The recipe comes back as what there is makes it.
    fn prepare<B: KernelBackend>(&self, mut recipe: Recipe, device: &B::Device) -> Result<Prepared, Failure> {
        let config = read_config(&self.model.model)?;
        recipe.packing.row_len = recipe.packing.row_len.min(config.max_position_embeddings);
        let renderer = Renderer::new(self.model.open_tokenizer()?, recipe.template);
        renderer.tokenizer().notes().iter().for_each(|note| say!("tokenizer {note}"));
        let corpus = build_corpus(&self.data, &renderer, recipe.packing)?;
        say!("{}", corpus.describe(recipe.packing));
        recipe.limit_steps(corpus.train.rows.len());
        let plan = self.plan::<B>(&config, &recipe, &corpus, device)?;
        Ok(Prepared { recipe, config, renderer, corpus, plan })
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
        say!("{}", plan.describe());
        let (_, steps) = recipe.train.length(corpus.rows);
        match budget.predict(plan.work) {
            Some(seconds) => {
                let whole = duration(seconds * steps as f64);
                say!("steps     {steps}, {whole} predicted from the card's data sheet");
            }
            None => say!("steps     {steps}"),
        }
        plan.check()?;
        Ok(plan.memory)
    }
}

fn answer<B: KernelBackend>(
    model: &Llama<B>,
    prepared: &Prepared,
    args: &AnswerArgs,
    when: &'static str,
) -> Result<Vec<Answered>, Failure> {
    let Prepared { renderer, corpus, .. } = prepared;
    let style = ProgressStyle::with_template("{msg:9} {bar:30} {pos}/{len} clues answered  {eta} left")?;
    let bar = ProgressBar::new(corpus.eval_clues.len() as u64).with_style(style).with_message(when);
    let answered =
        answer_clues(model, renderer, &corpus.eval_clues, args, |count| bar.set_position(count as u64))?;
    bar.finish_and_clear();
    let Scores { exact_match, f1, n } = judge_answers(&answered);
    if renderer.template().writes_clues() {
        say!(
            "{when:9} F1 {:.1} % against the show's clues, for {n} held-out categories and answers",
            100.0 * f1
        );
        say!("{}", Writing::of(&answered, None).describe());
        return Ok(answered);
    }
    say!("{when:9} exact match {:.1} %, F1 {:.1} % on {n} held-out clues", 100.0 * exact_match, 100.0 * f1);
    Ok(answered)
}

impl Run<'_> {
    /// What `report.json` holds, of which the plot is drawn here.
    fn report<B: KernelBackend>(
        &self,
        prepared: &Prepared,
        model: ModelReport,
        eval: Eval,
        trained: &Trained<B>,
        history: &History,
        state: Option<&TrainerState>,
    ) -> Result<Report, Failure> {
        Ok(Report {
            device: self.args.device.to_string(),
            model,
            recipe: self.recipe.clone(),
            data: self.corpus.report.clone(),
            packing: self.corpus.train.report.into(),
            steps: trained.steps,
            skipped_steps: history.skipped_steps,
            interrupted: trained.interrupted,
            resumed_from: state.map(|state| state.progress.step),
            loss: history.loss(),
            eval_loss: history.held_out().collect(),
            tokens_per_second: history.tokens_per_second(),
            loss_tokens_per_second: history.loss_tokens_per_second(),
            peak_memory_bytes: history.peak_memory_bytes,
            planned_memory_bytes: prepared.plan.total(),
            plan: prepared.plan,
            eval,
            adapter: self.out.join(ADAPTER),
            adapter_best: history.best().map(|_| self.out.join(BEST_ADAPTER)),
            checkpoints: self.out.join(CHECKPOINTS),
            recipe_file: self.out.join(RECIPE_FILE),
            records: records_path(self.out),
            plot: plot_training(self.out, &read_records(self.out)?)?,
            seconds: self.seconds(),
        })
    }
}
