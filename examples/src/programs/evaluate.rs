//! Answers held-out clues with a model, with or without an adapter, and judges the answers.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use crate::{
    AnswererArgs, DataArgs, Failure, answer_clues, bytes, finish, judge_answers, peak_device_bytes, run_on,
    write_report,
};
use buzzer::DeviceJob;
use buzzer::eval::{Scores, exact_match};
use buzzer::kernels::KernelBackend;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Judge a model's answers to the clues that fine-tuning holds out.
///
/// The clues are those that `finetune` judges with the same --data, split and --eval-limit.
#[derive(Parser)]
#[command(name = "evaluate")]
struct Args {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    with: AnswererArgs,
}

#[derive(Serialize)]
struct Report {
    device: String,
    model: PathBuf,
    adapter: Option<PathBuf>,
    eval: Scores,
    answers: Vec<Answer>,
    peak_memory_bytes: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct Answer {
    row: u32,
    question: String,
    expected: String,
    answer: String,
    exact_match: bool,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    finish(run_on(args.with.device, Evaluate { args: &args }))
}

struct Evaluate<'a> {
    args: &'a Args,
}

impl DeviceJob for Evaluate<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let started = Instant::now();
        let args = self.args;
        let (_, mut clues, _) = args.data.clues()?;
        clues.truncate(args.data.eval_limit);
        let (model, renderer) = args.with.load::<B>(device)?;
        let style = ProgressStyle::with_template("answering {bar:30} {pos}/{len}  {eta} left")?;
        let bar = ProgressBar::new(clues.len() as u64).with_style(style);
        let answered = answer_clues(&model, &renderer, &clues, &args.with.answer, |count| {
            bar.set_position(count as u64)
        })?;
        bar.finish_and_clear();
        let scores = judge_answers(&answered);
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "result    exact match {:.1} %, F1 {:.1} % on {} clues in {seconds:.1} s, peak memory {}",
            100.0 * scores.exact_match,
            100.0 * scores.f1,
            scores.n,
            bytes(peak_device_bytes::<B>(device))
        );
        let Some(out) = &args.with.out else { return Ok(()) };
        let answer = |answered: crate::Answered| Answer {
            row: answered.clue.row,
            exact_match: exact_match(&answered.answer, &answered.clue.answer),
            question: answered.clue.question,
            expected: answered.clue.answer,
            answer: answered.answer,
        };
        let report = Report {
            device: args.with.device.to_string(),
            model: args.with.model.model.clone(),
            adapter: args.with.adapter.clone(),
            eval: scores,
            answers: answered.into_iter().map(answer).collect(),
            peak_memory_bytes: peak_device_bytes::<B>(device),
            seconds,
        };
        println!("written   {}", write_report(out, &report)?.display());
        Ok(())
    }
}
