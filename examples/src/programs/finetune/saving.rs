//! When checkpoints are written, and what is said when one cannot be.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use buzzer::train::{CheckpointError, CheckpointJob, CheckpointWriter, Written};
use clap::Args;

use crate::Watch;

/// Where in a run's folder the checkpoints are.
pub(super) const CHECKPOINTS: &str = "checkpoints";

/// Checkpoints, and going on from them.
#[derive(Args, Clone, Debug)]
pub(super) struct SaveArgs {
    /// Go on with the run in this folder from its newest checkpoint, with the flags it was begun with [default: --out, where a
    /// run is begun if there is none yet; without --out the last of runs/finetune-NNN]
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    pub(super) resume: Option<Option<PathBuf>>,
    /// Write a checkpoint every so many steps (50), or so often (90s, 10m, 2h)
    #[arg(long, value_name = "WHEN", default_value_t)]
    save_every: SaveEvery,
    /// Keep so many checkpoints, the newest ones; that of the lowest held-out loss is kept besides
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    keep: u16,
}

/// How often checkpoints are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SaveEvery {
    Steps(u64),
    Seconds(u64),
}

/// A text that is no [`SaveEvery`].
#[derive(Debug, thiserror::Error)]
#[error("choose a number of steps from 1 on, as 50, or a time, as 90s, 10m or 2h")]
struct NoInterval;

impl Default for SaveEvery {
    fn default() -> Self {
        Self::Seconds(600)
    }
}

impl FromStr for SaveEvery {
    type Err = NoInterval;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let number = number.parse().ok().filter(|&number: &u64| number > 0).ok_or(NoInterval)?;
        let seconds = |each: u64| number.checked_mul(each).map(Self::Seconds).ok_or(NoInterval);
        match unit {
            "" => Ok(Self::Steps(number)),
            "s" => seconds(1),
            "m" => seconds(60),
            "h" => seconds(3600),
            _ => Err(NoInterval),
        }
    }
}

impl fmt::Display for SaveEvery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Steps(steps) => write!(f, "{steps}"),
            Self::Seconds(seconds) if seconds % 60 == 0 => write!(f, "{}m", seconds / 60),
            Self::Seconds(seconds) => write!(f, "{seconds}s"),
        }
    }
}

/// Writes a run's checkpoints when they are due.
pub(super) struct Saver {
    writer: CheckpointWriter,
    every: SaveEvery,
    /// The step and the time of the last checkpoint that was begun.
    last: (u64, Instant),
    /// The step of the last one that is on the disk.
    saved: Option<u64>,
}

impl Saver {
    /// A saver for the run in a folder that stands after a step, which is saved or not.
    pub(super) fn open(
        out: &Path,
        args: &SaveArgs,
        step: u64,
        is_saved: bool,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            writer: CheckpointWriter::open(&out.join(CHECKPOINTS), args.keep.into())?,
            every: args.save_every,
            last: (step, Instant::now()),
            saved: is_saved.then_some(step),
        })
    }

    /// Saves now, or as soon as the write that goes on has ended.
    pub(super) fn save(&mut self, job: CheckpointJob) {
        self.last = (job.checkpoint.state.progress.step, Instant::now());
        self.writer.save(job);
    }

    /// Saves if that is due and no write goes on. One that could not be written and waits is tried again first.
    pub(super) fn save_if_due(&mut self, step: u64, job: impl FnOnce() -> CheckpointJob) {
        if self.writer.is_busy() || !self.is_due(step) {
            return;
        }
        self.last = (step, Instant::now());
        if !self.writer.retry() {
            self.writer.save(job());
        }
    }

    fn is_due(&self, step: u64) -> bool {
        let (last_step, last_time) = self.last;
        match self.every {
            SaveEvery::Steps(steps) => step / steps > last_step / steps,
            SaveEvery::Seconds(seconds) => last_time.elapsed() >= Duration::from_secs(seconds),
        }
    }

    /// Says what went wrong with a write that has ended, if one has.
    pub(super) fn report(&mut self, watch: &Watch) {
        if let Some(Written { step, result }) = self.writer.poll() {
            match result {
                Ok(_) => self.saved = Some(step),
                Err(error) => {
                    watch.note(&format!("warning   no checkpoint of step {step}: {error}"));
                    watch.note("          training goes on, and the next checkpoint is tried when it is due");
                }
            }
        }
    }

    /// Waits for what is being written, then writes the last checkpoint, unless that of its step is there.
    ///
    /// # Errors
    /// If the last one, or that of the best factors, is not on the disk.
    pub(super) fn finish(&mut self, last: CheckpointJob) -> Result<(), CheckpointError> {
        // An error of a write that went on is that of the next try, or past.
        if let Some(Written { step, result: Ok(_) }) = self.writer.wait() {
            self.saved = Some(step);
        }
        self.writer.retry();
        self.wait()?;
        if self.saved != Some(last.checkpoint.state.progress.step) {
            self.writer.save(last);
            self.wait()?;
        }
        Ok(())
    }

    /// Whether the best factors could not be written.
    pub(super) fn lacks_best(&self) -> bool {
        self.writer.is_waiting()
    }

    fn wait(&mut self) -> Result<(), CheckpointError> {
        while let Some(Written { step, result }) = self.writer.wait() {
            result?;
            self.saved = Some(step);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_steps_or_times() {
        let cases = [("50", "50"), ("90s", "90s"), ("10m", "10m"), ("120s", "2m"), ("2h", "120m")];
        for (text, shown) in cases {
            assert_eq!(text.parse::<SaveEvery>().unwrap().to_string(), shown);
        }
        for wrong in
            ["", "0", "m", "0m", "-5", "1.5", "10 m", "10d", "99999999999999999999", "6000000000000000000h"]
        {
            assert!(wrong.parse::<SaveEvery>().is_err(), "{wrong}");
        }
        assert_eq!(SaveEvery::default().to_string(), "10m");
    }
}
