//! Where a run begins: anew, or at the newest checkpoint of one that has ended early.
//!
//! A checkpoint holds the command line of its run, so that `--resume` needs no other flag. Flags beside it stand over those; one
//! that would make it another run is refused by [`Start::check`] with what it changes.

use std::path::{Path, PathBuf};

use buzzer::data::hash_rows;
use buzzer::kernels::KernelBackend;
use buzzer::model::LlamaConfig;
use buzzer::train::{CheckpointError, Found, TrainerState, checkpoint_steps, newest_checkpoint};
use buzzer::weights::{Adapter, sample_of_weights};
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use serde_json::{Value, json};

use super::Args;
use super::history::History;
use super::saving::CHECKPOINTS;
use crate::{AnswerArgs, Corpus, Failure, Recipe, device_dtype, last_run_dir, say};

/// The name under which the runs of this program are numbered.
pub(super) const RUNS: &str = "finetune";

/// How a run begins.
pub(super) struct Start {
    /// What to do.
    pub(super) args: Args,
    /// As it was asked for: what is named on the hub has its name here, and the run may be shorter.
    pub(super) recipe: Recipe,
    /// The command line that says so.
    pub(super) arguments: Vec<String>,
    /// Where it goes on, if it does.
    pub(super) from: Option<Found>,
}

impl Start {
    /// Finds out from a command line, of which `matches` are the parts.
    ///
    /// # Errors
    /// If a new run would stand where an old one does, there is nothing to go on from, or the recipe makes no sense.
    pub(super) fn resolve(matches: &ArgMatches) -> Result<Self, Failure> {
        let args = Args::from_arg_matches(matches)?;
        let said = std::env::args_os().skip(1).map(|part| part.to_string_lossy().into_owned());
        let said: Vec<String> = said.collect();
        let Some(named) = args.save.resume.clone() else {
            refuse_old_run(args.out.as_deref())?;
            return Self::settle(matches, said, None);
        };
        let may_begin = named.is_none() && args.out.is_some();
        let Some(out) = named.or(args.out).or_else(|| last_run_dir(RUNS)) else {
            return Err(Failure::input("--resume: there is no run in runs/; give the folder of one"));
        };
        let found = match newest_checkpoint(&out.join(CHECKPOINTS)) {
            Err(CheckpointError::Missing { path }) if may_begin => {
                say!("resume    no checkpoint in {} yet: the run begins", path.display());
                return Self::settle(matches, said, None);
            }
            found => found?,
        };
        for error in &found.damaged {
            say!("warning   {error}");
        }
        let mut arguments = history_of(&found)?.arguments;
        arguments.extend(said);
        let mut start = Self::settle(&parse(&arguments), arguments, Some(found))?;
        start.args.out = Some(out);
        Ok(start)
    }

    fn settle(matches: &ArgMatches, arguments: Vec<String>, from: Option<Found>) -> Result<Self, Failure> {
        let (args, recipe) = Args::settle(matches)?;
        Ok(Self { args, recipe, arguments, from })
    }

    /// That the run which goes on is the one that began.
    ///
    /// # Errors
    /// With every setting that differs.
    pub(super) fn check(&self, fingerprint: &Value) -> Result<(), Failure> {
        let Some(found) = &self.from else { return Ok(()) };
        Ok(found.checkpoint.check_same(fingerprint)?)
    }

    /// The account of the run so far, with which it goes on.
    pub(super) fn history(&self) -> Result<History, Failure> {
        let mut history = self.from.as_ref().map(history_of).transpose()?.unwrap_or_default();
        history.arguments.clone_from(&self.arguments);
        Ok(history)
    }

    /// The state, and the factors with their folder, to go on from.
    pub(super) fn into_state(self) -> Option<(TrainerState, Adapter, PathBuf)> {
        self.from.map(|Found { checkpoint, path, .. }| (checkpoint.state, checkpoint.adapter, path))
    }
}

fn refuse_old_run(out: Option<&Path>) -> Result<(), Failure> {
    let Some(out) = out else { return Ok(()) };
    match checkpoint_steps(&out.join(CHECKPOINTS)).last() {
        None => Ok(()),
        Some(step) => Err(Failure::input(format!(
            "--out {out}: a run is here, with checkpoints up to step {step}; go on with it (--resume {out}), or choose another folder",
            out = out.display()
        ))),
    }
}

fn history_of(found: &Found) -> Result<History, Failure> {
    serde_json::from_value(found.checkpoint.records.clone()).map_err(|error| {
        Failure::input(format!("{}: its records are those of another version: {error}", found.path.display()))
    })
}

/// Reads a command line in which later flags stand over earlier ones; ends the program if it makes no sense.
fn parse(arguments: &[String]) -> ArgMatches {
    let command = Args::command().args_override_self(true);
    command.get_matches_from(std::iter::once(RUNS).chain(arguments.iter().map(String::as_str)))
}

/// All that the bits of a run depend on.
///
/// # Errors
/// If the base cannot be read, or the device does not compute in the dtype.
pub(super) fn fingerprint<B: KernelBackend>(
    args: &Args,
    config: &LlamaConfig,
    recipe: &Recipe,
    corpus: &Corpus,
    device: &B::Device,
) -> Result<Value, Failure> {
    // Named one by one, so that nothing new is left out unseen. Names of files are not what they hold, and limits and the size of a
    // batch of answers decide no bit.
    let Recipe {
        template,
        packing,
        lora,
        train,
        eval,
        answer,
        preset: _,
        device: _,
        steps: _,
        model: _,
        data: _,
        limits: _,
    } = recipe;
    let AnswerArgs { cache_limit, answer_batch, .. } = AnswerArgs::default();
    Ok(json!({
        "build": {
            "version": env!("CARGO_PKG_VERSION"),
            "target": format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        },
        "device": args.device.kind(),
        "dtype": format!("{:?}", device_dtype::<B>(args.model.dtype, device)?),
        "base": {
            "config": config,
            "weights": sample_of_weights(&args.model.model)?,
            "quantization": args.model.quantization,
        },
        "recipe": {
            "template": template,
            "packing": packing,
            "lora": lora,
            "train": train,
            "eval": eval,
            "answer": AnswerArgs { cache_limit, answer_batch, ..*answer },
        },
        "rows": {
            "train": corpus.train.rows.len(),
            "train_hash": hash_rows(&corpus.train.rows),
            "held_out": corpus.held_out.all.len(),
            "held_out_hash": [hash_rows(&corpus.held_out.all), hash_rows(&corpus.held_out.answers)],
            "judged_clues": corpus.eval_clues.len(),
        },
    }))
}
