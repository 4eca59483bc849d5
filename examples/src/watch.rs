//! A run under observation: its steps on the screen and in its records, at once.
//!
//! What it trades: a record that cannot be written yet is a warning and does not end the run.

use std::path::Path;

use buzzer::data::LossOn;
use buzzer::eval::Scores;
use buzzer::kernels::KernelBackend;
use buzzer::train::{StepReport, Trainer};
use buzzer::weights::WeightsError;

use crate::records::{Recorder, RunRecord, When, Yardstick};
use crate::{Dashboard, Failure, HeldOut};

/// Shows and records what a run does.
#[derive(Debug)]
pub struct Watch {
    recorder: Recorder,
    dashboard: Dashboard,
}

/// Mean losses on held-out clues; none where they have no such token.
#[derive(Clone, Copy, Debug)]
pub struct HeldOutLosses {
    /// On every token.
    pub all: Option<f64>,
    /// On answers.
    pub answers: Option<f64>,
    /// Which of the two is trained.
    pub loss_on: LossOn,
}

impl HeldOutLosses {
    /// The loss that is trained.
    #[must_use]
    pub fn trained(&self) -> Option<f64> {
        match self.loss_on {
            LossOn::All => self.all,
            LossOn::Answers => self.answers,
        }
    }
}

impl HeldOut {
    /// Both losses of a model in training.
    #[must_use]
    pub fn losses<B: KernelBackend>(&self, trainer: &Trainer<B>) -> HeldOutLosses {
        let (trained, other) = match self.loss_on {
            LossOn::All => (&self.all, &self.answers),
            LossOn::Answers => (&self.answers, &self.all),
        };
        let losses = trainer.evaluate_each(&[trained, other]);
        let (all, answers) = match self.loss_on {
            LossOn::All => (losses[0], losses[1]),
            LossOn::Answers => (losses[1], losses[0]),
        };
        HeldOutLosses { all, answers, loss_on: self.loss_on }
    }
}

impl Watch {
    /// Begins the records of a run of so many steps in its folder; or goes on with them after a step, if one is given.
    ///
    /// # Errors
    /// If the records cannot be read or written at all.
    pub fn new(
        dir: &Path,
        yardstick: Yardstick,
        total_steps: u64,
        resumed_after: Option<u64>,
    ) -> Result<Self, Failure> {
        let recorder = match resumed_after {
            None => Recorder::create(dir, yardstick),
            Some(step) => Recorder::resume(dir, step, yardstick),
        }?;
        Ok(Self { recorder, dashboard: Dashboard::new(total_steps, resumed_after.unwrap_or(0))? })
    }

    /// After a step; `memory_bytes` is what the device or, on a processor, the process holds now.
    pub fn step(&mut self, report: &StepReport, memory_bytes: u64) {
        let record = self.recorder.measure(report, memory_bytes);
        let written = self.recorder.write(&RunRecord::Step(record));
        self.warn(written);
        self.dashboard.step(record);
    }

    /// After a measurement of the losses on held-out clues.
    pub fn held_out(&mut self, step: u64, losses: &HeldOutLosses) {
        let written = self.recorder.held_out(step, losses.all, losses.answers);
        self.warn(written);
        if let Some(loss) = losses.trained() {
            self.dashboard.held_out(step, loss);
        }
    }

    /// After clues have been answered.
    pub fn accuracy(&mut self, step: u64, when: When, scores: Scores) {
        let written = self.recorder.accuracy(step, when, scores);
        self.warn(written);
    }

    /// A line for people that stays.
    pub fn note(&self, line: &str) {
        self.dashboard.note(line);
    }

    /// No step follows: what is drawn again goes.
    pub fn finish(&self) {
        self.dashboard.finish();
    }

    fn warn(&self, written: Result<(), WeightsError>) {
        if let Err(error) = written {
            self.note(&format!("warning   {error}; the run goes on, and its records wait for room"));
        }
    }
}
