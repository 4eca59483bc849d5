//! Answers held-out clues with a model, with or without an adapter, and judges the answers. With `--template clue` it has clues
//! written instead, and sets their style beside that of the clues in the file.
//!
//! It prints scores with their intervals, by group, with calibration and leaks, and can set the run beside earlier ones.
//! With `--out` all of it goes into `report.json`, every answer into `predictions.jsonl`, and what confidence is worth into
//! `confidence.svg`. It refuses to check leaks against the file the clues are held out from, since every one of them
//! stands in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::{
    Answered, AnswererArgs, Compared, CorpusReport, DataArgs, EarlierRun, Failure, FoundLeak, Prediction,
    Writing, answer_clues, as_judged, bytes, create, describe_assessment, describe_comparison, finish,
    judge_answers, local_file, peak_device_bytes, plot_confidence, run_on, write_predictions, write_report,
    write_written,
};
use buzzer::DeviceJob;
use buzzer::data::Clue;
use buzzer::eval::{
    Answer, AssessOptions, Assessment, ClueText, Facet, KnownClues, Leak, LeakOptions, Scores, find_leaks,
};
use buzzer::kernels::KernelBackend;
use clap::{ArgAction, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Judge a model's answers to the clues that fine-tuning holds out, or, with --template clue, the clues that it writes for their
/// categories and answers.
///
/// The clues are those that `finetune` judges with the same --data, split and --eval-limit.
#[derive(Parser)]
#[command(name = "evaluate")]
struct Args {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    with: AnswererArgs,
    /// Judge clues of the whole file instead of those held out
    #[arg(long, conflicts_with_all = ["eval_from", "eval_fraction", "split"])]
    all: bool,
    /// Group scores by these: round, value, decade, answer_type, category [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    by: Vec<Facet>,
    /// Name so many of the categories with the lowest scores
    #[arg(long, value_name = "N", default_value_t = 10)]
    worst: usize,
    /// Clues that a category must have to be among them
    #[arg(long, value_name = "N", default_value_t = 5)]
    worst_least: usize,
    /// Clue file that the model was trained on, to look for the judged clues in; named as for --data [default: the clues not
    /// held out]
    #[arg(long, value_name = "FILE")]
    train: Option<PathBuf>,
    /// Folder or report.json of an earlier run over the same clues, to test whether this one differs; may be repeated; not with
    /// --template clue
    #[arg(long, value_name = "RUN", action = ArgAction::Append)]
    compare: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    device: String,
    model: PathBuf,
    adapter: Option<PathBuf>,
    data: CorpusReport,
    /// Scores of all answers, as `finetune` writes them.
    eval: Scores,
    assessment: Assessment,
    leak_check: Option<LeakCheck>,
    compared: Vec<Compared>,
    predictions: PathBuf,
    plot: Option<PathBuf>,
    peak_memory_bytes: u64,
    seconds: f64,
}

/// The report where clues are written.
#[derive(Serialize)]
struct WritingReport {
    device: String,
    model: PathBuf,
    adapter: Option<PathBuf>,
    data: CorpusReport,
    /// Scores against the clues of the file.
    eval: Scores,
    style: Writing,
    /// Clues of training that copies were looked for in; none where they are not known.
    known_clues: Option<usize>,
    written: PathBuf,
    peak_memory_bytes: u64,
    seconds: f64,
}

/// What the leak check looked at.
#[derive(Serialize)]
struct LeakCheck {
    /// The file, if it was another one than the judged clues'.
    train: Option<PathBuf>,
    /// Its clues.
    clues: usize,
    options: LeakOptions,
    seconds: f64,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let mut args = Args::parse();
    finish(
        args.check()
            .and_then(|()| args.fetch())
            .and_then(|()| run_on(args.with.device, Evaluate { args: &args })),
    )
}

/// The clues to judge and those the model was trained on, as far as is known.
struct Clues {
    judged: Vec<Clue>,
    train: Vec<Clue>,
    report: CorpusReport,
}

impl Args {
    /// Refuses what does not go together.
    fn check(&self) -> Result<(), Failure> {
        if self.with.template.writes_clues() && !self.compare.is_empty() {
            return Err(Failure::input(
                "--compare: written clues are not right or wrong, so that there is nothing to pair; leave it out, or answer clues \
                 with another --template",
            ));
        }
        Ok(())
    }

    /// Puts paths in the place of names on the hub.
    fn fetch(&mut self) -> Result<(), Failure> {
        self.data.fetch()?;
        if let Some(train) = &mut self.train {
            *train = local_file(train)?;
        }
        self.with.fetch()
    }

    fn clues(&self) -> Result<Clues, Failure> {
        let (mut train, mut judged, report) = if self.all {
            let (clues, report) = self.data.all_clues()?;
            (Vec::new(), clues, report)
        } else {
            self.data.clues()?
        };
        if let Some(file) = &self.train {
            if same_file(file, &self.data.data) {
                let message = "is the file that the judged clues come from, so every one stands in it; leave --train away \
                               to check against the clues that are not held out";
                return Err(Failure::input(format!("--train {} {message}", file.display())));
            }
            train = self.data.clues_of(file)?;
        }
        judged.truncate(self.data.eval_limit);
        Ok(Clues { judged, train, report })
    }

    fn assess_options(&self) -> AssessOptions {
        let by = if self.by.is_empty() { Facet::ALL.to_vec() } else { self.by.clone() };
        AssessOptions { by, worst_least: self.worst_least, worst_count: self.worst }
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

impl Clues {
    /// Looks for the judged clues among those of training; nothing where no training clue is known.
    fn find_leaks(&self, args: &Args) -> Option<(Vec<Option<Leak>>, LeakCheck)> {
        if self.train.is_empty() {
            return None;
        }
        let started = Instant::now();
        let options = LeakOptions::default();
        let leaks = find_leaks(&texts(&self.judged), &texts(&self.train), &options);
        let seconds = started.elapsed().as_secs_f64();
        Some((leaks, LeakCheck { train: args.train.clone(), clues: self.train.len(), options, seconds }))
    }

    /// The clues of training, to find copies of; nothing where none is known.
    fn known(&self) -> Option<KnownClues> {
        let texts = self.train.iter().map(|clue| clue.question.as_str());
        (!self.train.is_empty()).then(|| texts.collect())
    }

    /// The leak of every judged clue, with the training clue's row in its file.
    fn found(&self, leaks: Option<&[Option<Leak>]>) -> Vec<Option<FoundLeak>> {
        let found = |leak: &Leak| {
            let &Leak { kind, train, similarity } = leak;
            FoundLeak { kind, similarity, train_row: self.train[train].row }
        };
        let leak = |place: usize| leaks?[place].as_ref().map(found);
        (0..self.judged.len()).map(leak).collect()
    }
}

fn texts(clues: &[Clue]) -> Vec<ClueText<'_>> {
    clues.iter().map(|Clue { question, answer, .. }| ClueText { question, answer }).collect()
}

struct Evaluate<'a> {
    args: &'a Args,
}

impl DeviceJob for Evaluate<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let started = Instant::now();
        let args = self.args;
        let clues = args.clues()?;
        if args.with.template.writes_clues() {
            return self.judge_writing::<B>(clues, device, started);
        }
        let open = |run: &PathBuf| EarlierRun::open(run, &clues.judged);
        let earlier = args.compare.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        args.with.out.as_deref().map(create).transpose()?;
        let (leaks, leak_check) = clues.find_leaks(args).unzip();
        let answered = self.answer::<B>(&clues.judged, device)?;
        let answers: Vec<Answer<'_>> = answered.iter().map(as_judged).collect();
        let assessment = Assessment::of(&answers, leaks.as_deref(), &args.assess_options());
        println!("{}", describe_assessment(&assessment, args.worst_least));
        let eval = judge_answers(&answered);
        let found = clues.found(leaks.as_deref());
        let predictions: Vec<Prediction> =
            answered.into_iter().zip(found).map(|(answered, leak)| Prediction::new(answered, leak)).collect();
        let compared: Vec<Compared> = earlier.iter().map(|run| run.compare(&predictions)).collect();
        compared.iter().for_each(|compared| println!("{}", describe_comparison(compared)));
        let (seconds, peak) = (started.elapsed().as_secs_f64(), peak_device_bytes::<B>(device));
        println!("done      in {seconds:.1} s, peak memory {}", bytes(peak));
        let Some(out) = &args.with.out else { return Ok(()) };
        let plot = match (&assessment.calibration, &assessment.precision) {
            (Some(calibration), Some(precision)) => Some(plot_confidence(out, calibration, precision)?),
            _ => None,
        };
        let report = Report {
            device: args.with.device.to_string(),
            model: args.with.model.model.clone(),
            adapter: args.with.adapter.clone(),
            data: clues.report,
            eval,
            assessment,
            leak_check,
            compared,
            predictions: write_predictions(out, &predictions)?,
            plot,
            peak_memory_bytes: peak,
            seconds,
        };
        println!("written   {} and {}", report.predictions.display(), write_report(out, &report)?.display());
        Ok(())
    }
}

impl Evaluate<'_> {
    fn judge_writing<B: KernelBackend>(
        &self,
        clues: Clues,
        device: &B::Device,
        started: Instant,
    ) -> Result<(), Failure> {
        let args = &self.args.with;
        args.out.as_deref().map(create).transpose()?;
        let known = clues.known();
        let answered = self.answer::<B>(&clues.judged, device)?;
        let style = Writing::of(&answered, known.as_ref());
        println!("{}", style.describe());
        let (seconds, peak) = (started.elapsed().as_secs_f64(), peak_device_bytes::<B>(device));
        println!("done      in {seconds:.1} s, peak memory {}", bytes(peak));
        let Some(out) = &args.out else { return Ok(()) };
        let report = WritingReport {
            device: args.device.to_string(),
            model: args.model.model.clone(),
            adapter: args.adapter.clone(),
            data: clues.report,
            eval: judge_answers(&answered),
            style,
            known_clues: known.is_some().then_some(clues.train.len()),
            written: write_written(out, &answered, known.as_ref())?,
            peak_memory_bytes: peak,
            seconds,
        };
        println!("written   {} and {}", report.written.display(), write_report(out, &report)?.display());
        Ok(())
    }

    fn answer<B: KernelBackend>(&self, clues: &[Clue], device: &B::Device) -> Result<Vec<Answered>, Failure> {
        let (model, renderer) = self.args.with.load::<B>(device)?;
        let style = ProgressStyle::with_template("answering {bar:30} {pos}/{len}  {eta} left")?;
        let bar = ProgressBar::new(clues.len() as u64).with_style(style);
        let done = |count: usize| bar.set_position(count as u64);
        let started = Instant::now();
        let answered = answer_clues(&model, &renderer, clues, &self.args.with.answer, done)?;
        bar.finish_and_clear();
        println!("answered  {} clues in {:.1} s", clues.len(), started.elapsed().as_secs_f64());
        Ok(answered)
    }
}
