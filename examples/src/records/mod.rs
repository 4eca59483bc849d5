//! What a run leaves of every step: `metrics.jsonl`, one JSON object a line, and the same numbers for TensorBoard.
//!
//! Each line is handed to the system before the next step begins, so a killed process loses none but the one it was writing. What
//! cannot be written, for want of room, is kept and written later; a run does not end for its records. What it trades: nothing is
//! forced to the disk a step at a time, so a machine that loses power may lose the last seconds.

mod append;
mod record;
mod tensorboard;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use buzzer::data::LossOn;
use buzzer::eval::Scores;
use buzzer::train::StepReport;
use buzzer::weights::WeightsError;

use self::append::Appender;
pub use self::record::{AccuracyRecord, HeldOutRecord, RunRecord, StepRecord, When};
use self::tensorboard::Event;
use crate::{Failure, create, write_bytes};

/// One record a line.
const LINES: &str = "metrics.jsonl";
/// TensorBoard takes any file with `tfevents` in its name.
const EVENTS: &str = "tensorboard/events.out.tfevents.buzzer";

/// What a run's rates are measured by.
#[derive(Clone, Copy, Debug)]
pub struct Yardstick {
    /// Which tokens bear the loss of a step.
    pub loss_on: LossOn,
    /// Operations that training needs for a token; see [`buzzer::train::token_flop`].
    pub token_flop: f64,
    /// Operations a second of the card's data sheet, in the dtype computed in; none where there is no such card.
    pub peak_flops: Option<f64>,
}

/// Writes the records of a run.
///
/// A method's error says that something could not be written. It is given once, until writing works again; nothing is lost
/// meanwhile.
#[derive(Debug)]
pub struct Recorder {
    yardstick: Yardstick,
    lines: Appender,
    events: Appender,
    failing: bool,
}

impl Recorder {
    /// Begins the records of a run in its folder, in place of older ones.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub fn create(dir: &Path, yardstick: Yardstick) -> Result<Self, Failure> {
        Self::continued(dir, yardstick, &[], 0)
    }

    /// Goes on after a step: what was recorded of later ones is dropped, and so are the answers after training and a line that was
    /// cut short. Without records in the folder they begin here.
    ///
    /// # Errors
    /// If the files cannot be read or written.
    pub fn resume(dir: &Path, step: u64, yardstick: Yardstick) -> Result<Self, Failure> {
        let (kept, length) = record::read_until(&dir.join(LINES), |record| record.precedes(step))?;
        Self::continued(dir, yardstick, &kept, length)
    }

    /// Lines from a length on, and events that repeat the records before it.
    fn continued(dir: &Path, yardstick: Yardstick, kept: &[RunRecord], length: u64) -> Result<Self, Failure> {
        let events = dir.join(EVENTS);
        events.parent().map_or(Ok(()), create)?;
        let mut bytes = Event::version(kept.first().map_or_else(unix_seconds, RunRecord::time)).framed();
        kept.iter().for_each(|record| bytes.extend(Event::of(record).framed()));
        write_bytes(&events, &bytes)?;
        Ok(Self {
            yardstick,
            lines: Appender::open(dir.join(LINES), length)?,
            events: Appender::open(events, bytes.len() as u64)?,
            failing: false,
        })
    }

    /// What there is to record of a step that has just ended; `memory_bytes` is what the device or, on a processor, the process
    /// holds now.
    #[must_use]
    pub fn measure(&self, report: &StepReport, memory_bytes: u64) -> StepRecord {
        StepRecord::new(report, memory_bytes, &self.yardstick, unix_seconds())
    }

    /// The loss on held-out clues after a step.
    ///
    /// # Errors
    /// See [`Recorder`].
    pub fn held_out(
        &mut self,
        step: u64,
        all: Option<f64>,
        answers: Option<f64>,
    ) -> Result<(), WeightsError> {
        let time = unix_seconds();
        self.write(&RunRecord::HeldOut(HeldOutRecord { step, time, loss_all: all, loss_answers: answers }))
    }

    /// How clues are answered after a step.
    ///
    /// # Errors
    /// See [`Recorder`].
    pub fn accuracy(&mut self, step: u64, when: When, scores: Scores) -> Result<(), WeightsError> {
        let Scores { exact_match, f1, n } = scores;
        let time = unix_seconds();
        self.write(&RunRecord::Accuracy(AccuracyRecord { step, time, when, exact_match, f1, n }))
    }

    /// Any record.
    ///
    /// # Errors
    /// See [`Recorder`].
    pub fn write(&mut self, record: &RunRecord) -> Result<(), WeightsError> {
        let line = self.lines.append(&record.line());
        let event = self.events.append(&Event::of(record).framed());
        let told = self.failing;
        let result = line.and(event);
        self.failing = result.is_err();
        if told { Ok(()) } else { result }
    }
}

/// The records that a run has left in its folder; none if it has left none.
///
/// # Errors
/// If the file is there and cannot be read.
pub fn read_records(dir: &Path) -> Result<Vec<RunRecord>, Failure> {
    Ok(record::read_until(&dir.join(LINES), |_| true)?.0)
}

/// Where a run's records are, for people.
#[must_use]
pub fn records_path(dir: &Path) -> PathBuf {
    dir.join(LINES)
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const YARDSTICK: Yardstick =
        Yardstick { loss_on: LossOn::Answers, token_flop: 1e9, peak_flops: Some(1e12) };

    fn report(step: u64) -> StepReport {
        StepReport {
            step,
            loss: 4.0 / step as f64,
            grad_norm: if step == 2 { f64::INFINITY } else { 0.5 },
            learning_rate: 1e-3,
            tokens: 500,
            loss_tokens: 50,
            seconds: 0.5,
            loss_scale: 65_536.0,
            skipped: step == 2,
        }
    }

    fn scores(exact_match: f64) -> Scores {
        Scores { exact_match, f1: exact_match, n: 10 }
    }

    /// Records of a run of so many steps, measured every second one.
    fn record(recorder: &mut Recorder, steps: std::ops::RangeInclusive<u64>) {
        for step in steps {
            let record = recorder.measure(&report(step), 1 << 20);
            recorder.write(&RunRecord::Step(record)).unwrap();
            if step % 2 == 0 {
                recorder.held_out(step, Some(3.0), None).unwrap();
            }
        }
    }

    /// The file's lines without their times.
    fn lines(dir: &Path) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(records_path(dir)).unwrap();
        let parse = |line: &str| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            value.as_object_mut().unwrap().remove("time").unwrap();
            value
        };
        text.lines().map(parse).collect()
    }

    #[test]
    fn a_line_holds_what_a_step_did() {
        let dir = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::create(dir.path(), YARDSTICK).unwrap();
        recorder.accuracy(0, When::Before, scores(0.1)).unwrap();
        record(&mut recorder, 1..=2);
        let lines = lines(dir.path());
        let kinds: Vec<_> = lines.iter().map(|line| line["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["accuracy", "step", "step", "held-out"]);
        assert_eq!((&lines[1]["loss_on"], &lines[1]["mfu"]), (&"answers".into(), &1.0.into()));
        assert_eq!(
            (&lines[1]["tokens_per_second"], &lines[1]["loss_tokens_per_second"]),
            (&1000.0.into(), &100.0.into())
        );
        // A gradient out of range has no norm, and no number in JSON.
        assert!(lines[2].get("grad_norm").is_none() && lines[2]["skipped"] == true);
        assert!(lines[3].get("loss_answers").is_none());
    }

    #[test]
    fn a_resumed_run_leaves_the_records_of_one_that_was_never_stopped() {
        let [whole, cut] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let end = |recorder: &mut Recorder, step| recorder.accuracy(step, When::After, scores(0.9)).unwrap();
        let begin = |dir: &Path| {
            let mut recorder = Recorder::create(dir, YARDSTICK).unwrap();
            recorder.accuracy(0, When::Before, scores(0.1)).unwrap();
            recorder
        };
        let mut recorder = begin(whole.path());
        record(&mut recorder, 1..=6);
        end(&mut recorder, 6);

        let mut recorder = begin(cut.path());
        record(&mut recorder, 1..=5);
        drop(recorder);
        let path = records_path(cut.path());
        let half = fs::read_to_string(&path).unwrap() + "{\"kind\":\"step\",\"st";
        fs::write(&path, half).unwrap();
        // Stopped after its fourth step and answered; then it goes on.
        let mut recorder = Recorder::resume(cut.path(), 4, YARDSTICK).unwrap();
        end(&mut recorder, 4);
        drop(recorder);
        let mut recorder = Recorder::resume(cut.path(), 4, YARDSTICK).unwrap();
        record(&mut recorder, 5..=6);
        end(&mut recorder, 6);
        assert_eq!(lines(cut.path()), lines(whole.path()));
        let scalars = |dir: &Path| tensorboard::tests::scalars(&fs::read(dir.join(EVENTS)).unwrap());
        assert_eq!(scalars(cut.path()), scalars(whole.path()));
        assert!(scalars(whole.path()).len() > 6 * 6);
    }

    #[test]
    fn a_folder_without_records_begins_them() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_records(dir.path()).unwrap().is_empty());
        let mut recorder = Recorder::resume(dir.path(), 3, YARDSTICK).unwrap();
        record(&mut recorder, 4..=4);
        assert_eq!(read_records(dir.path()).unwrap().len(), 2);
    }
}
