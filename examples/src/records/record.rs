//! The records of a run as JSON lines.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use buzzer::data::LossOn;
use buzzer::train::StepReport;
use serde::{Deserialize, Serialize};

use super::Yardstick;
use crate::Failure;

/// A line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum RunRecord {
    /// An optimizer step.
    Step(StepRecord),
    /// The loss on held-out clues.
    HeldOut(HeldOutRecord),
    /// How held-out clues are answered.
    Accuracy(AccuracyRecord),
}

/// What a step did, and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step, from 1.
    pub step: u64,
    /// Seconds since 1970, when it ended.
    pub time: f64,
    /// Mean loss over the step's targets, before the step.
    pub loss: f64,
    /// Which tokens are targets.
    pub loss_on: LossOn,
    /// The rate used.
    pub learning_rate: f64,
    /// Norm of the gradient before clipping; none if it was no finite number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Tokens without padding.
    pub tokens: usize,
    /// Targets among them.
    pub loss_tokens: usize,
    /// Duration of the step.
    pub seconds: f64,
    /// Tokens a second, without padding.
    pub tokens_per_second: f64,
    /// Targets a second.
    pub loss_tokens_per_second: f64,
    /// Share of the card's rate that the step's tokens needed; none where that rate is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// What the device's allocator has taken or, on a processor, the process holds.
    pub memory_bytes: u64,
    /// What the loss was multiplied by; 1 unless computed in f16.
    pub loss_scale: f64,
    /// Whether a gradient left the range of f16 and the factors stayed as they were.
    pub skipped: bool,
}

/// Mean losses on held-out clues; none where they have no such token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOutRecord {
    /// Steps taken.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// On every token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_all: Option<f64>,
    /// On answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_answers: Option<f64>,
}

/// Before or after training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Before.
    Before,
    /// After.
    After,
}

/// How held-out clues are answered.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AccuracyRecord {
    /// Steps taken.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// Before or after training.
    pub when: When,
    /// Share of exact matches.
    pub exact_match: f64,
    /// Mean F1.
    pub f1: f64,
    /// Clues.
    pub n: usize,
}

impl StepRecord {
    pub(super) fn new(report: &StepReport, memory_bytes: u64, yardstick: &Yardstick, time: f64) -> Self {
        let rate = |count: usize| count as f64 / report.seconds.max(f64::MIN_POSITIVE);
        let needed = rate(report.tokens) * yardstick.token_flop;
        Self {
            step: report.step,
            time,
            loss: report.loss,
            loss_on: yardstick.loss_on,
            learning_rate: report.learning_rate,
            grad_norm: Some(report.grad_norm).filter(|norm| norm.is_finite()),
            tokens: report.tokens,
            loss_tokens: report.loss_tokens,
            seconds: report.seconds,
            tokens_per_second: rate(report.tokens),
            loss_tokens_per_second: rate(report.loss_tokens),
            mfu: yardstick.peak_flops.map(|peak| needed / peak),
            memory_bytes,
            loss_scale: report.loss_scale,
            skipped: report.skipped,
        }
    }
}

impl RunRecord {
    pub(super) fn step(&self) -> u64 {
        match self {
            Self::Step(record) => record.step,
            Self::HeldOut(record) => record.step,
            Self::Accuracy(record) => record.step,
        }
    }

    pub(super) fn time(&self) -> f64 {
        match self {
            Self::Step(record) => record.time,
            Self::HeldOut(record) => record.time,
            Self::Accuracy(record) => record.time,
        }
    }

    /// Whether a run that goes on after a step has this behind it.
    pub(super) fn precedes(&self, step: u64) -> bool {
        let is_end = matches!(self, Self::Accuracy(AccuracyRecord { when: When::After, .. }));
        self.step() <= step && !is_end
    }

    /// JSON and a line's end.
    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

/// The records of a file up to the first that is not to be kept, or is no whole line of JSON, and the length of their lines in
/// bytes. A file that is not there has none.
pub(super) fn read_until(
    path: &Path,
    keep: impl Fn(&RunRecord) -> bool,
) -> Result<(Vec<RunRecord>, u64), Failure> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        read => read.map_err(|error| Failure::input(format!("{}: {error}", path.display())))?,
    };
    let (mut records, mut length) = (Vec::new(), 0);
    for line in bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
        match serde_json::from_slice::<RunRecord>(line) {
            Ok(record) if keep(&record) => records.push(record),
            _ => break,
        }
        length += line.len() as u64;
    }
    Ok((records, length))
}
