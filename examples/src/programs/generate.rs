//! Answers clues: one from the command line, a file of them, or as they are typed. With `--template clue` it writes them.

use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use crate::{
    AnswerArgs, AnswererArgs, Failure, answer_text, finish, run_on, tell_step_refusal, write_report,
};
use buzzer::DeviceJob;
use buzzer::infer::{Answer as Generated, Engine};
use buzzer::kernels::KernelBackend;
use buzzer::text::Renderer;
use clap::Parser;
use serde::Serialize;

/// Answer clues with a model and, if you like, an adapter.
///
/// Give one clue, or a file with one clue a line; with neither, clues are read from the terminal until an empty line. With
/// --template clue and a model that has learnt to write them, give --category, and --answer if you like, and get clues.
#[derive(Parser)]
#[command(name = "generate")]
struct Args {
    /// The clue to answer
    clue: Option<String>,
    /// Text file, one clue a line
    #[arg(long, value_name = "FILE", conflicts_with = "clue")]
    file: Option<PathBuf>,
    /// Category of the clues, for --template category and --template clue
    #[arg(long, default_value = "")]
    category: String,
    /// With --template clue: what the clue is to ask for
    #[arg(long)]
    answer: Option<String>,
    /// With --template clue: write so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    #[command(flatten)]
    with: AnswererArgs,
}

#[derive(Serialize)]
struct Report {
    device: String,
    model: PathBuf,
    adapter: Option<PathBuf>,
    answers: Vec<Answer>,
    seconds: f64,
}

#[derive(Serialize)]
struct Answer {
    clue: String,
    answer: String,
    tokens: usize,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let mut args = Args::parse();
    finish(
        args.check()
            .and_then(|()| args.with.fetch())
            .and_then(|()| run_on(args.with.device, Generate { args: &args })),
    )
}

impl Args {
    /// Refuses flags of answering where clues are written, and the other way round.
    fn check(&self) -> Result<(), Failure> {
        let writes = self.with.template.writes_clues();
        let wrong = if !writes && self.answer.is_some() {
            "--answer: goes with --template clue, which writes a clue for it; give the clue to have it answered"
        } else if !writes && self.count.is_some() {
            "--count: goes with --template clue; a file of clues is answered with --file"
        } else if writes && (self.clue.is_some() || self.file.is_some()) {
            "--template clue: writes clues and answers none; leave out the clue and --file, or choose another template"
        } else if writes && self.category.is_empty() {
            "--category: is what a clue is written for; name one, as --category \"WORLD CAPITALS\""
        } else {
            return Ok(());
        };
        Err(Failure::input(wrong))
    }
}

struct Generate<'a> {
    args: &'a Args,
}

impl DeviceJob for Generate<'_> {
    type Output = Result<(), Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Result<(), Failure> {
        let started = Instant::now();
        let args = self.args;
        let (model, renderer) = args.with.load::<B>(device)?;
        // One clue at a time, of whatever length the model takes.
        let one = AnswerArgs { answer_batch: 1, ..args.with.answer };
        let engine = one.engine(&model, &renderer, model.config().max_position_embeddings)?;
        let mut answerer = Answerer { args, renderer, engine, count: 0 };
        let answers = match (&args.clue, &args.file) {
            _ if args.with.template.writes_clues() => answerer.write()?,
            (Some(clue), _) => vec![answerer.answer(clue)?],
            (None, Some(path)) => {
                let text = fs::read_to_string(path)
                    .map_err(|error| Failure::input(format!("{}: {error}; check --file", path.display())))?;
                let clues = text.lines().map(str::trim).filter(|line| !line.is_empty());
                clues.map(|clue| answerer.named(clue)).collect::<Result<_, _>>()?
            }
            (None, None) => answerer.converse()?,
        };
        if let Some(out) = &args.with.out {
            let report = Report {
                device: args.with.device.to_string(),
                model: args.with.model.model.clone(),
                adapter: args.with.adapter.clone(),
                answers,
                seconds: started.elapsed().as_secs_f64(),
            };
            write_report(out, &report)?;
        }
        Ok(())
    }
}

struct Answerer<'a, B: KernelBackend> {
    args: &'a Args,
    renderer: Renderer,
    engine: Engine<B>,
    count: u64,
}

impl<B: KernelBackend> Answerer<'_, B> {
    /// Writes clues for one category.
    fn write(&mut self) -> Result<Vec<Answer>, Failure> {
        let given = self.args.answer.as_deref().unwrap_or_default();
        let count = self.args.count.unwrap_or(1);
        let write = |_| {
            let (clue, tokens) = self.stream(given)?;
            Ok(Answer { clue, answer: given.to_owned(), tokens })
        };
        (0..count).map(write).collect()
    }

    /// Answers one clue.
    fn answer(&mut self, clue: &str) -> Result<Answer, Failure> {
        let (answer, tokens) = self.stream(clue)?;
        Ok(Answer { clue: clue.to_owned(), answer, tokens })
    }

    /// What follows the prompt, and its tokens; the text comes out as it is made.
    fn stream(&mut self, given: &str) -> Result<(String, usize), Failure> {
        let prompt = self.renderer.prompt(&self.args.category, given)?;
        let request = self.args.with.answer.request(prompt, self.count);
        self.count += 1;
        let mut answer = Generated::default();
        for event in self.engine.stream(request)? {
            let event = event?;
            print!("{}", event.text());
            io::stdout().flush()?;
            answer.add(event);
        }
        println!();
        tell_step_refusal(&self.engine);
        Ok((answer_text(&answer)?.to_owned(), answer.usage.new_tokens))
    }

    fn named(&mut self, clue: &str) -> Result<Answer, Failure> {
        print!("{clue} => ");
        self.answer(clue)
    }

    /// Reads clues until an empty line or the end of input.
    fn converse(&mut self) -> Result<Vec<Answer>, Failure> {
        let terminal = io::stdin().is_terminal();
        let ask = || {
            if terminal {
                print!("clue> ");
            }
            io::stdout().flush()
        };
        let mut answers = Vec::new();
        ask()?;
        for line in io::stdin().lock().lines() {
            let line = line?;
            if line.trim().is_empty() {
                break;
            }
            answers.push(self.answer(line.trim())?);
            ask()?;
        }
        Ok(answers)
    }
}
