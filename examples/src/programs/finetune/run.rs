//! The steps of a run, and what is done between them: held-out losses, checkpoints, an ear for signals.

use std::path::Path;
use std::time::Instant;

use buzzer::kernels::KernelBackend;
use buzzer::model::Llama;
use buzzer::train::{Checkpoint, CheckpointJob, Trainer, TrainerState, token_flop};
use buzzer::weights::{Adapter, extract_adapter};
use serde_json::Value;

use super::Args;
use super::history::History;
use super::saving::Saver;
use crate::{
    Corpus, Failure, Recipe, StopSignal, Watch, When, Yardstick, device_bytes, judge_answers,
    peak_device_bytes, peak_flops, say,
};

/// Names in a run's folder.
pub(super) const ADAPTER: &str = "adapter";
pub(super) const BEST_ADAPTER: &str = "adapter-best";

/// What a run needs besides the model.
pub(super) struct Run<'a> {
    pub(super) args: &'a Args,
    /// As it was asked for.
    pub(super) asked: &'a Recipe,
    /// The same for the model and the rows that there are.
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
    /// For what is measured after the last step.
    pub(super) watch: Watch,
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
        // Not before the saver, which has made sure that no other process writes to the run.
        self.asked.write(self.out)?;
        let mut watch = self.watch(&trainer, state)?;
        if state.is_none() {
            let before = history.answered_before(&self.corpus.eval_clues, self.recipe.template);
            watch.accuracy(0, When::Before, judge_answers(&before));
            // Whatever happens from here on, the run can go on.
            saver.save(self.checkpoint(&trainer, history, false));
        }
        let ended = self.steps(&mut trainer, history, &mut saver, &mut watch);
        watch.finish();
        history.peak_memory_bytes =
            history.peak_memory_bytes.max(peak_device_bytes::<B>(&trainer.model().device()));
        self.conclude(&trainer, history, saver, ended)?;
        let steps = trainer.steps_done();
        Ok(Trained { interrupted: steps < trainer.total_steps(), steps, watch, model: trainer.into_model() })
    }

    /// Begins the records of the run, or goes on with them.
    fn watch<B: KernelBackend>(
        &self,
        trainer: &Trainer<B>,
        state: Option<&TrainerState>,
    ) -> Result<Watch, Failure> {
        let model = trainer.model();
        let yardstick = Yardstick {
            loss_on: self.recipe.packing.loss_on,
            token_flop: token_flop(model.config(), &self.recipe.lora),
            peak_flops: peak_flops::<B>(&model.device(), model.dtype()),
        };
        Watch::new(self.out, yardstick, trainer.total_steps(), state.map(|state| state.progress.step))
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
        watch: &mut Watch,
    ) -> Result<(), Failure> {
        let every = (trainer.total_steps() / self.args.evaluations.max(1)).max(1);
        while !self.stop.is_set() {
            let Some(report) = trainer.step()? else { break };
            history.add(&report);
            watch.step(&report, device_bytes::<B>(&trainer.model().device()));
            let is_evaluated = self.args.evaluations > 0 && report.step % every == 0;
            let improved = is_evaluated && self.evaluate(trainer, history, watch);
            saver.report(watch);
            if improved {
                saver.save(self.checkpoint(trainer, history, true));
            } else {
                saver.save_if_due(report.step, || self.checkpoint(trainer, history, false));
            }
        }
        Ok(())
    }

    /// Takes the losses on held-out rows; true if the one that is trained is the lowest so far.
    fn evaluate<B: KernelBackend>(
        &self,
        trainer: &Trainer<B>,
        history: &mut History,
        watch: &mut Watch,
    ) -> bool {
        let (step, losses) = (trainer.steps_done(), self.corpus.held_out.losses(trainer));
        watch.held_out(step, &losses);
        history.add_held_out(step, &losses)
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
