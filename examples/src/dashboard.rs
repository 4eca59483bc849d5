//! A run as it goes on: a few lines that are drawn again in a terminal, or plain lines now and then elsewhere.
//!
//! What stands there are means over the last steps; every single step is in the run's records. A file or a pipe gets whole lines
//! and no control characters. A terminal that has gone away is no reason to end a run, so writing to it may fail.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::{bytes, duration};
use crate::records::StepRecord;
use crate::{Failure, say};

/// Steps that a mean is taken over.
const RECENT: usize = 20;
/// Characters of the line of losses.
const WIDTH: usize = 32;
/// Its characters, from low to high.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Without a terminal a line is written this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Shows a run's steps.
#[derive(Debug)]
pub struct Dashboard {
    total: u64,
    /// Hidden unless there is a terminal.
    bar: ProgressBar,
    steps: Vec<StepRecord>,
    held_out: Option<f64>,
    last_line: Instant,
}

impl Dashboard {
    /// A run of so many steps, of which so many are done.
    ///
    /// # Errors
    /// If the bar cannot be laid out.
    pub fn new(total: u64, done: u64) -> Result<Self, Failure> {
        let bar = if io::stderr().is_terminal() {
            ProgressBar::new(total)
        } else {
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden())
        };
        let layout = "training  {bar:32} step {pos} of {len}\n          {prefix}\n          {msg}";
        // Nothing is drawn before the first step, for clues are answered first and have a bar of their own.
        let bar = bar.with_style(ProgressStyle::with_template(layout)?).with_position(done);
        Ok(Self { total, bar, steps: Vec::new(), held_out: None, last_line: Instant::now() })
    }

    /// After a step.
    pub fn step(&mut self, record: StepRecord) {
        self.steps.push(record);
        self.bar.set_prefix(format!("{}  {}", sparkline(&self.losses(), WIDTH), self.loss()));
        self.bar.set_message(self.speed());
        self.bar.set_position(record.step);
        let is_due = self.last_line.elapsed() >= PLAIN_INTERVAL || record.step == self.total;
        if self.bar.is_hidden() && is_due {
            self.last_line = Instant::now();
            say!("step      {} of {}  {}  {}", record.step, self.total, self.loss(), self.speed());
        }
    }

    /// After a measurement of the loss on held-out clues.
    pub fn held_out(&mut self, step: u64, loss: f64) {
        self.held_out = Some(loss);
        self.note(&format!("held out  loss {loss:.3} after step {step}"));
    }

    /// A line that stays.
    pub fn note(&self, line: &str) {
        self.bar.suspend(|| say!("{line}"));
    }

    /// Clears what is drawn again.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn recent(&self) -> &[StepRecord] {
        &self.steps[self.steps.len().saturating_sub(RECENT)..]
    }

    fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|step| step.loss).collect()
    }

    fn loss(&self) -> String {
        let loss = mean(self.recent().iter().map(|step| step.loss));
        let held_out = self.held_out.map(|loss| format!("  held out {loss:.3}")).unwrap_or_default();
        let skipped = self.steps.iter().filter(|step| step.skipped).count();
        let skipped = if skipped > 0 { format!("  {skipped} skipped") } else { String::new() };
        format!("loss {loss:.3}{held_out}{skipped}")
    }

    fn speed(&self) -> String {
        let recent = self.recent();
        let seconds: f64 = recent.iter().map(|step| step.seconds).sum();
        let rate = |count: fn(&StepRecord) -> usize| {
            recent.iter().map(count).sum::<usize>() as f64 / seconds.max(f64::MIN_POSITIVE)
        };
        let step = recent.last().map_or(0, |step| step.step);
        let left = self.total.saturating_sub(step) as f64 * seconds / recent.len().max(1) as f64;
        let memory = recent.last().map_or(0, |step| step.memory_bytes);
        let mfu = recent.iter().map(|step| step.mfu).collect::<Option<Vec<f64>>>();
        let mfu = mfu.map(|shares| format!("  MFU {:.0} %", 100.0 * mean(shares))).unwrap_or_default();
        format!(
            "{:.0} tokens/s, {:.0} with loss{mfu}  {}  {} left",
            rate(|step| step.tokens),
            rate(|step| step.loss_tokens),
            bytes(memory),
            duration(left)
        )
    }
}

fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = values.into_iter().fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count.max(1))
}

/// Means of neighbouring values, at most `width` of them, as bars between the lowest and the highest.
fn sparkline(values: &[f64], width: usize) -> String {
    let size = values.len().div_ceil(width).max(1);
    let means: Vec<f64> = values.chunks(size).map(|chunk| mean(chunk.iter().copied())).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = (high - low).max(f64::MIN_POSITIVE);
    let top = (BARS.len() - 1) as f64;
    means.iter().map(|mean| BARS[((mean - low) / span * top).round() as usize]).collect()
}

#[cfg(test)]
mod tests {
    use buzzer::data::LossOn;

    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            time: 0.0,
            loss: 1.0 / step as f64,
            loss_on: LossOn::All,
            learning_rate: 0.1,
            grad_norm: None,
            tokens: 100,
            loss_tokens: 10,
            seconds: 0.5,
            tokens_per_second: 200.0,
            loss_tokens_per_second: 20.0,
            mfu: Some(0.25),
            memory_bytes: 3 << 20,
            loss_scale: 1.0,
            skipped: step == 2,
        }
    }

    #[test]
    fn the_lines_tell_where_a_run_is() {
        let mut dashboard = Dashboard::new(1000, 0).unwrap();
        (1..=40).for_each(|step| dashboard.step(record(step)));
        dashboard.held_out(40, 0.5);
        // The mean of 1/21 to 1/40.
        assert_eq!(dashboard.loss(), "loss 0.034  held out 0.500  1 skipped");
        assert_eq!(dashboard.speed(), "200 tokens/s, 20 with loss  MFU 25 %  3.0 MiB  8 min left");
    }

    #[test]
    fn losses_become_bars() {
        assert_eq!(sparkline(&[3.0, 2.0, 1.0], 8), "█▅▁");
        assert_eq!(sparkline(&[4.0, 2.0, 1.0, 1.0, 0.0], 2), "█▁");
        assert_eq!(sparkline(&[2.0, 2.0], 8), "▁▁");
        assert_eq!(sparkline(&[], 8), "");
    }
}
