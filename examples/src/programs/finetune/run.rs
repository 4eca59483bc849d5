//! The steps of a run, and what is done between them: held-out losses, checkpoints, an ear for signals.

use std::path::Path;
use std::time::Instant;

use buzzer::kernels::KernelBackend;
use buzzer::model::Llama;
use buzzer::train::{Checkpoint, CheckpointJob, StepReport, Trainer, TrainerState};
use buzzer::weights::{Adapter, extract_adapter};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::Args;
use super::history::History;
use super::saving::Saver;
use crate::{Corpus, Failure, Recipe, StopSignal, peak_device_bytes, say};

/// Names in a run's folder.
pub(super) const ADAPTER: &str = "adapter";
pub(super) const BEST_ADAPTER: &str = "adapter-best";
/// Steps over which the progress bar takes a mean.
const RECENT: usize = 20;

/// What a run needs besides the model.
pub(super) struct Run<'a> {
    pub(super) args: &'a Args,
    pub(super) recipe: &'a Recipe,
    pub(super) corpus: &'a Corpus,
    pub(super) out: &'a Path,
    pub(super) stop: &'a StopSignal,
    pub(super) fingerprint: Value,
    /// When this process began with the run.
    pub(super) started: Instant,
    /// Seconds of the run before that.
    pub(super) earlier_seconds: f64,
}

/// What a run leaves.
pub(super) struct Trained<B: KernelBackend> {
    pub(super) model: Llama<B>,
    pub(super) steps: u64,
    pub(super) interrupted: bool,
}

impl Run<'_> {
    /// Takes the steps that are left. `state` is where to go on; the model then has the factors of that moment.
    pub(super) fn train<B: KernelBackend>(
        &self,
        model: Llama<B>,
        state: Option<&TrainerState>,
        history: &mut History,
    ) -> Result<Trained<B>, Failure> {
        let (rows, settings) = (self.corpus.train.rows.clone(), self.recipe.train.clone());
        let mut trainer = match state {
            None => Trainer::new(model, rows, settings)?,
            Some(state) => Trainer::resume(model, rows, settings, state)?,
        };
        let mut saver = Saver::open(self.out, &self.args.save, trainer.steps_done(), state.is_some())?;
        if state.is_none() {
            // Whatever happens from here on, the run can go on.
            saver.save(self.checkpoint(&trainer, history, false));
        }
        let style = ProgressStyle::with_template("training  {bar:30} step {pos}/{len}  {msg}  {eta} left")?;
        let bar = ProgressBar::new(trainer.total_steps()).with_style(style);
        bar.set_position(trainer.steps_done());
        bar.reset_eta();
        let ended = self.steps(&mut trainer, history, &mut saver, &bar);
        bar.finish_and_clear();
        history.peak_memory_bytes =
            history.peak_memory_bytes.max(peak_device_bytes::<B>(&trainer.model().device()));
        self.conclude(&trainer, history, saver, ended)?;
        let steps = trainer.steps_done();
        Ok(Trained { interrupted: steps < trainer.total_steps(), steps, model: trainer.into_model() })
    }

    /// Saves what there is, however the steps have ended.
    fn conclude<B: KernelBackend>(
        &self,
        trainer: &Trainer<B>,
        history: &History,
        mut saver: Saver,
        ended: Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (steps, total) = (trainer.steps_done(), trainer.total_steps());
        let interrupted = steps < total;
        if interrupted {
            say!("stopped   after step {steps} of {total}; saving what there is");
        }
        let saved = saver.finish(self.checkpoint(trainer, history, false));
        ended?;
        let adapter = self.adapter(trainer.model()).write(&self.out.join(ADAPTER));
        adapter.map_err(|error| self.resumable(error.into()))?;
        match saved {
            // A run that is done needs its checkpoints no more, unless one was to bring the best adapter.
            Err(error) if interrupted || saver.lacks_best() => Err(self.resumable(error.into())),
            Err(error) => {
                say!("warning   no checkpoint of step {steps}: {error}");
                Ok(())
            }
            Ok(()) if interrupted => {
                say!("go on     finetune --resume {}", self.out.display());
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn steps<B: KernelBackend>(
        &self,
        trainer: &mut Trainer<B>,
        history: &mut History,
        saver: &mut Saver,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let every = (trainer.total_steps() / self.args.evaluations.max(1)).max(1);
        let mut recent: Vec<StepReport> = Vec::new();
        while !self.stop.is_set() {
            let Some(report) = trainer.step()? else { break };
            history.add(&report);
            recent.push(report);
            recent.drain(..recent.len().saturating_sub(RECENT));
            bar.set_message(progress(&recent));
            bar.inc(1);
            let is_evaluated = self.args.evaluations > 0 && report.step % every == 0;
            let improved = is_evaluated && self.evaluate(trainer, history, bar);
            saver.report(bar);
            if improved {
                saver.save(self.checkpoint(trainer, history, true));
            } else {
                saver.save_if_due(report.step, || self.checkpoint(trainer, history, false));
            }
        }
        Ok(())
    }

    /// Takes the loss on held-out rows; true if it is the lowest so far.
    fn evaluate<B: KernelBackend>(
        &self,
        trainer: &Trainer<B>,
        history: &mut History,
        bar: &ProgressBar,
    ) -> bool {
        let Some(loss) = trainer.evaluate(&self.corpus.eval.rows) else { return false };
        let step = trainer.steps_done();
        bar.suspend(|| say!("held out  loss {loss:.3} after step {step}"));
        history.add_held_out(step, loss)
    }

    /// The run as it stands.
    fn checkpoint<B: KernelBackend>(
        &self,
        trainer: &Trainer<B>,
        history: &History,
        is_best: bool,
    ) -> CheckpointJob {
        let mut history = history.clone();
        history.seconds = self.seconds();
        CheckpointJob {
            best: history.best().map(|best| best.step()),
            best_adapter: is_best.then(|| self.out.join(BEST_ADAPTER)),
            checkpoint: Checkpoint {
                adapter: self.adapter(trainer.model()),
                state: trainer.state(),
                fingerprint: self.fingerprint.clone(),
                records: serde_json::json!(history),
            },
        }
    }

    /// Seconds that the run has taken so far.
    pub(super) fn seconds(&self) -> f64 {
        self.earlier_seconds + self.started.elapsed().as_secs_f64()
    }

    fn adapter<B: KernelBackend>(&self, model: &Llama<B>) -> Adapter {
        let base = self.args.model.base_name();
        extract_adapter(model, &self.recipe.lora, self.recipe.train.dropout, Some(base))
    }

    /// A failure to write, after which the run can go on from its last checkpoint.
    pub(super) fn resumable(&self, failure: Failure) -> Failure {
        let advice = "the run goes on from its last checkpoint, when there is room again, with";
        failure.advise(format_args!("{advice} finetune --resume {}", self.out.display()))
    }
}

/// The last steps' mean loss and speed.
fn progress(recent: &[StepReport]) -> String {
    let loss = recent.iter().map(|report| report.loss).sum::<f64>() / recent.len() as f64;
    let tokens: usize = recent.iter().map(|report| report.tokens).sum();
    let seconds: f64 = recent.iter().map(|report| report.seconds).sum();
    format!("loss {loss:.3}  {:.0} tokens/s", tokens as f64 / seconds)
}
