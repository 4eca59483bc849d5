//! The learning rate over the steps: warm-up, then constant, linear or cosine; the values of Hugging Face's schedules.
//!
//! It implements Burn's `LrScheduler`, so it fits into other Burn programs too. burn-optim's own linear and cosine
//! schedules cannot be joined into a warm-up that begins at 0, which is why the formula stands here.

use std::fmt;
use std::str::FromStr;

use burn::lr_scheduler::LrScheduler;
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// The peak to the end.
    Constant,
    /// A line down to 0.
    Linear,
    /// Half a cosine down to 0.
    #[default]
    Cosine,
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
        })
    }
}

impl FromStr for ScheduleKind {
    type Err = TrainError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Self::Constant, Self::Linear, Self::Cosine]
            .into_iter()
            .find(|kind| kind.to_string() == name)
            .ok_or_else(|| TrainError::Setting {
                flag: "--schedule",
                found: name.to_owned(),
                choose: "constant, linear or cosine",
            })
    }
}

/// A learning rate for every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// The highest rate.
    pub peak: f64,
    /// Steps from 0 up to the peak.
    pub warmup: u64,
    /// All steps, warm-up included.
    pub total: u64,
    /// Steps taken.
    step: u64,
}

impl Schedule {
    /// A schedule at its first step.
    #[must_use]
    pub fn new(kind: ScheduleKind, peak: f64, warmup: u64, total: u64) -> Self {
        Self { kind, peak, warmup, total, step: 0 }
    }

    /// The rate of a step, counted from 0.
    #[must_use]
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let rest = self.total.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / rest).min(1.0);
        self.peak
            * match self.kind {
                ScheduleKind::Constant => 1.0,
                ScheduleKind::Linear => 1.0 - progress,
                ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }
}

impl LrScheduler for Schedule {
    type Record<B: Backend> = usize;

    fn step(&mut self) -> f64 {
        self.step += 1;
        self.rate(self.step - 1)
    }

    fn to_record<B: Backend>(&self) -> usize {
        self.step as usize
    }

    fn load_record<B: Backend>(self, record: usize) -> Self {
        Self { step: record as u64, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_hugging_face() {
        // transformers.get_cosine_schedule_with_warmup(optimizer, 2, 10) and its linear and constant kin, peak 1.
        let close = |kind, expected: [f64; 6]| {
            let schedule = Schedule::new(kind, 1.0, 2, 10);
            for (step, expected) in [0, 1, 2, 4, 6, 10].into_iter().zip(expected) {
                assert!((schedule.rate(step) - expected).abs() < 1e-12, "{kind} at {step}");
            }
        };
        close(ScheduleKind::Cosine, [0.0, 0.5, 1.0, 0.853_553_390_593_273_7, 0.5, 0.0]);
        close(ScheduleKind::Linear, [0.0, 0.5, 1.0, 0.75, 0.5, 0.0]);
        close(ScheduleKind::Constant, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(Schedule::new(ScheduleKind::Cosine, 3.0, 0, 1).rate(0), 3.0);
    }
}
