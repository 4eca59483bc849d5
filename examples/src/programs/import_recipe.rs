//! Makes a recipe of somebody else's training script: a Python file, a notebook, or JSON of arguments.
//!
//! Nothing of the script is run. What has no counterpart here is listed line by line with the reason.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;

use crate::import::{Import, Left, Taken, import_recipe};
use crate::recipe::RECIPE_FILE;
use crate::{Failure, create, finish, write_bytes, write_report};

/// Make a recipe of a training script for transformers, PEFT and TRL.
///
/// Reads the literal arguments of TrainingArguments, SFTConfig, SFTTrainer, LoraConfig and BitsAndBytesConfig, and variables that are
/// named like them. Prints a recipe for `finetune --recipe`, with what has no counterpart as comments.
#[derive(Parser)]
#[command(name = "import-recipe")]
struct Args {
    /// Python source, notebook (.ipynb) or JSON (.json)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Folder for recipe.toml and report.json; without it the recipe is printed
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    source: PathBuf,
    recipe: PathBuf,
    taken: Vec<Taken>,
    left: Vec<Left>,
}

/// Runs the program on the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    finish(run(Args::parse()))
}

fn run(args: Args) -> Result<(), Failure> {
    let Import { recipe, taken, left } = import_recipe(&args.file)?;
    let Some(out) = args.out else {
        print!("{recipe}");
        return Ok(());
    };
    create(&out)?;
    let path = out.join(RECIPE_FILE);
    write_bytes(&path, recipe.as_bytes())?;
    for Left { place, argument, why } in &left {
        println!("left      {}: {argument}: {why}", place.as_deref().unwrap_or("left out, so"));
    }
    println!("taken     {} arguments, {} have no counterpart", taken.len(), left.len());
    let report = Report { source: args.file, recipe: path.clone(), taken, left };
    println!("written   {} and {}", path.display(), write_report(&out, &report)?.display());
    Ok(())
}
