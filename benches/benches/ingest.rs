//! Times the way of a clue file to packed rows: reading, cleaning, splitting, tokenizing, packing.
//!
//! `cargo bench --bench ingest -- --data FILE --tokenizer FILE --json FILE`. With no arguments it runs on the sample in
//! `datasets/` with the byte tokenizer. Each stage is timed alone, and the total around all of them; with `--repeat` the
//! fastest run is told, since others measure what else the machine was doing. The peak of memory is the whole process's,
//! so use one repeat where it matters. Relative paths start at the workspace's root.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use buzzer_benches::{Row, WriteError, commit, enter_workspace_root, peak_memory_bytes, write_rows};
use buzzer_data::{
    Clue, DataError, PackOptions, PackReport, ReadOptions, Split, clean, pack, read_clues, split,
};
use buzzer_text::{Fields, Renderer, Template, TextError, Tokenizer};
use clap::Parser;

/// Time reading, cleaning, splitting, tokenizing and packing of a clue file.
#[derive(Parser)]
#[command(name = "ingest")]
struct Arguments {
    /// Clue file (CSV, TSV, JSON, JSON lines or Parquet).
    #[arg(long, value_name = "FILE", default_value = "datasets/sample/clues.csv")]
    data: PathBuf,
    /// A tokenizer.json, or its folder; without it, single bytes.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Write the rows of the table here as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Tokens in a packed row.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    row_len: u32,
    /// Read only the first rows.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Run so many times and tell the fastest.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Fraction of the questions held out.
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    eval_fraction: f64,
    /// Cargo passes this to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, thiserror::Error)]
enum IngestError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("the workspace's root: {0}; run the program itself instead of through cargo")]
    Root(std::io::Error),
}

/// The stages in order.
const STAGES: [&str; 6] = ["load tokenizer", "read", "clean", "split", "tokenize", "pack"];

/// One run's times and counts.
struct Run {
    stage_seconds: [f64; STAGES.len()],
    total_seconds: f64,
    rows_read: usize,
    rows_kept: usize,
    train: PackReport,
    eval: PackReport,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match measure(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ingest: {error}");
            ExitCode::from(2)
        }
    }
}

fn measure(arguments: &Arguments) -> Result<(), IngestError> {
    enter_workspace_root().map_err(IngestError::Root)?;
    let mut fastest = run(arguments)?;
    for _ in 1..arguments.repeat {
        let next = run(arguments)?;
        if next.total_seconds < fastest.total_seconds {
            fastest = next;
        }
    }
    let rows = rows(arguments, &fastest);
    print_table(arguments, &fastest, &rows);
    if let Some(path) = &arguments.json {
        write_rows(path, &rows)?;
    }
    Ok(())
}

/// Times consecutive stages.
struct Stopwatch {
    last: Instant,
    seconds: Vec<f64>,
}

impl Stopwatch {
    fn lap(&mut self) {
        let now = Instant::now();
        self.seconds.push((now - self.last).as_secs_f64());
        self.last = now;
    }
}

fn run(arguments: &Arguments) -> Result<Run, IngestError> {
    let begin = Instant::now();
    let mut watch = Stopwatch { last: begin, seconds: Vec::with_capacity(STAGES.len()) };
    let tokenizer = match &arguments.tokenizer {
        Some(path) => Tokenizer::from_file(path)?,
        None => Tokenizer::byte_level_test(),
    };
    let renderer = Renderer::new(tokenizer, Template::Question);
    watch.lap();
    let options = ReadOptions { limit: arguments.limit, ..ReadOptions::default() };
    let raw = read_clues(&arguments.data, &options)?;
    watch.lap();
    let cleaned = clean(raw);
    watch.lap();
    let (rows_read, rows_kept) = (cleaned.report.rows_read, cleaned.report.rows_kept);
    let held_out = Split::Hash { fraction: arguments.eval_fraction, seed: 0 };
    let (train, eval) = split(cleaned.clues, &held_out)?;
    watch.lap();
    let examples = [renderer.examples(&fields(&train))?, renderer.examples(&fields(&eval))?];
    watch.lap();
    let options = PackOptions { row_len: arguments.row_len as usize, ..PackOptions::default() };
    let packed = examples.each_ref().map(|examples| pack(examples, &options));
    watch.lap();
    let [train, eval] = packed.each_ref().map(|packed| packed.report);
    let mut stage_seconds = [0.0; STAGES.len()];
    stage_seconds.copy_from_slice(&watch.seconds);
    let total_seconds = (watch.last - begin).as_secs_f64();
    Ok(Run { stage_seconds, total_seconds, rows_read, rows_kept, train, eval })
}

fn fields(clues: &[Clue]) -> Vec<Fields<'_>> {
    let fields = |clue| {
        let Clue { category, question, answer, .. }: &Clue = clue;
        Fields { category, question, answer }
    };
    clues.iter().map(fields).collect()
}

fn rows(arguments: &Arguments, run: &Run) -> Vec<Row> {
    let shape = format!("{} rows, row length {}", run.rows_read, arguments.row_len);
    let (peak_memory_bytes, commit) = (peak_memory_bytes(), commit());
    let row = |name: &str, value: f64, unit: &'static str| Row {
        name: format!("ingest.{}", name.replace(' ', "_")),
        device: "cpu".to_owned(),
        shape: shape.clone(),
        value,
        unit,
        peak_memory_bytes,
        dtype: "u32",
        commit: commit.clone(),
    };
    let stages = STAGES.iter().zip(run.stage_seconds).map(|(name, seconds)| row(name, seconds, "s"));
    let tokens = run.train.tokens + run.eval.tokens;
    let mut rows: Vec<Row> = stages.collect();
    rows.push(row("total", run.total_seconds, "s"));
    rows.push(row("throughput", run.rows_read as f64 / run.total_seconds, "rows/s"));
    rows.push(row("rows_kept", run.rows_kept as f64, "rows"));
    rows.push(row("tokens", tokens as f64, "tokens"));
    rows.push(row("too_long", (run.train.too_long + run.eval.too_long) as f64, "rows"));
    rows.push(row("packing_efficiency", run.train.efficiency, "of 1"));
    rows
}

fn print_table(arguments: &Arguments, run: &Run, rows: &[Row]) {
    println!("{} ({} rows, {} kept)", arguments.data.display(), run.rows_read, run.rows_kept);
    let tokenizer = arguments.tokenizer.as_deref().map_or("single bytes".into(), Path::to_string_lossy);
    println!("tokenizer {tokenizer}, row length {}, fastest of {}", arguments.row_len, arguments.repeat);
    for (name, pack) in [("train", &run.train), ("eval", &run.eval)] {
        println!(
            "{name}: {} clues and {} tokens in {} rows, {:.2} % full, {} clues too long",
            pack.documents,
            pack.tokens,
            pack.rows,
            100.0 * pack.efficiency,
            pack.too_long
        );
    }
    for row in rows {
        println!("{:<28} {:>14.3} {}", row.name, row.value, row.unit);
    }
    match rows.first().and_then(|row| row.peak_memory_bytes) {
        Some(bytes) => {
            println!("{:<28} {:>14.3} GiB", "peak host memory", bytes as f64 / (1_u64 << 30) as f64)
        }
        None => println!("{:<28} {:>14}", "peak host memory", "unknown"),
    }
}
