//! `training.svg`: a run's losses over its steps, and how it answered before and after, as two plots side by side.
//!
//! Left, every step's loss, their mean over neighbouring steps, and the losses on held-out clues. Right, exact match with its 95 %
//! interval, and F1. The numbers come from the run's records.

use std::path::{Path, PathBuf};

use buzzer::data::LossOn;
use buzzer::eval::wilson;
use plotters::chart::SeriesLabelPosition;
use plotters::style::{BLUE, Color, RED, RGBAColor, RGBColor};

use super::{Axis, Chart, Drawn, LABELS, Panel, Point, chart, dots, legend, line, write_plot};
use crate::Failure;
use crate::records::{AccuracyRecord, HeldOutRecord, RunRecord, StepRecord};

const FILE: &str = "training.svg";
const GREEN: RGBColor = RGBColor(0, 130, 60);
/// The mean runs over this share of all steps.
const SMOOTHED_SHARE: usize = 25;

/// Draws a run's losses and accuracy into its folder.
///
/// # Errors
/// If the file cannot be written.
pub fn plot_training(dir: &Path, records: &[RunRecord]) -> Result<PathBuf, Failure> {
    let run = Run::new(records);
    write_plot(dir, FILE, |left, right| {
        run.draw_losses(left)?;
        run.draw_accuracy(right)
    })
}

/// Records by kind.
#[derive(Default)]
struct Run {
    steps: Vec<StepRecord>,
    held_out: Vec<HeldOutRecord>,
    accuracy: Vec<AccuracyRecord>,
}

impl Run {
    fn new(records: &[RunRecord]) -> Self {
        let mut run = Self::default();
        for record in records {
            match *record {
                RunRecord::Step(step) => run.steps.push(step),
                RunRecord::HeldOut(held_out) => run.held_out.push(held_out),
                RunRecord::Accuracy(accuracy) => run.accuracy.push(accuracy),
            }
        }
        run
    }

    fn step_axis(&self) -> Axis {
        let last = self.steps.last().map_or(1, |step| step.step.max(1));
        let labels = usize::try_from(last).map_or(LABELS, |last| LABELS.min(last + 1));
        Axis { name: "step", range: 0.0..last as f64, labels, digits: 0 }
    }

    fn draw_losses(&self, area: &Panel<'_>) -> Drawn {
        let losses: Vec<(f64, f64)> = self.steps.iter().map(|step| (step.step as f64, step.loss)).collect();
        let held_out = |loss: fn(&HeldOutRecord) -> Option<f64>| -> Vec<(f64, f64)> {
            self.held_out.iter().filter_map(|record| Some((record.step as f64, loss(record)?))).collect()
        };
        let [all, answers] = [held_out(|record| record.loss_all), held_out(|record| record.loss_answers)];
        let highest =
            [&losses, &all, &answers].into_iter().flatten().map(|&(_, loss)| loss).fold(0.0, f64::max);
        let top = if highest > 0.0 { 1.05 * highest } else { 1.0 };
        let y = Axis {
            name: "loss, nats a token",
            range: 0.0..top,
            labels: LABELS,
            digits: if top < 1.0 { 2 } else { 1 },
        };
        let trained = match self.steps.first().map(|step| step.loss_on) {
            Some(LossOn::Answers) => "trained on: answers",
            _ => "trained on: all tokens",
        };
        let mut chart = chart(area, "loss", [&self.step_axis(), &y])?;
        let smooth = smoothed(&losses, losses.len().div_ceil(SMOOTHED_SHARE));
        line(&mut chart, losses, BLUE.mix(0.25), None)?;
        line(&mut chart, smooth, BLUE.into(), Some(trained))?;
        marked(&mut chart, all, RED, "held out: all tokens")?;
        marked(&mut chart, answers, GREEN, "held out: answers")?;
        legend(&mut chart, SeriesLabelPosition::MiddleRight)
    }

    fn draw_accuracy(&self, area: &Panel<'_>) -> Drawn {
        let exact = |record: &AccuracyRecord| {
            let hits = (record.exact_match * record.n as f64).round() as usize;
            Point::percent(record.step as f64, record.exact_match, wilson(hits, record.n))
        };
        let exact: Vec<Point> = self.accuracy.iter().map(exact).collect();
        let f1: Vec<(f64, f64)> =
            self.accuracy.iter().map(|record| (record.step as f64, 100.0 * record.f1)).collect();
        let highest = exact.iter().map(|point| point.high).chain(f1.iter().map(|&(_, f1)| f1));
        let y = percent_up_to(highest.fold(0.0, f64::max));
        let mut chart = chart(area, "held-out clues answered", [&self.step_axis(), &y])?;
        line(
            &mut chart,
            exact.iter().map(|point| (point.x, point.y)).collect(),
            BLUE.into(),
            Some("exact match"),
        )?;
        dots(&mut chart, &exact, BLUE)?;
        marked(&mut chart, f1, GREEN, "F1")?;
        legend(&mut chart, SeriesLabelPosition::LowerRight)
    }
}

/// An axis of percents from 0 to the first of a few round numbers that is not below the highest value.
fn percent_up_to(highest: f64) -> Axis {
    let top = [5.0, 10.0, 20.0, 50.0].into_iter().find(|&top| highest <= top).unwrap_or(100.0);
    Axis { range: 0.0..top, digits: if top < 10.0 { 1 } else { 0 }, ..Axis::percent("%") }
}

/// A line with a dot at each of its points, if it has any.
fn marked(chart: &mut Chart<'_, '_>, points: Vec<(f64, f64)>, color: RGBColor, label: &str) -> Drawn {
    if points.is_empty() {
        return Ok(());
    }
    let bare: Vec<Point> = points.iter().map(|&(x, y)| Point { x, y, low: y, high: y }).collect();
    line(chart, points, RGBAColor::from(color), Some(label))?;
    dots(chart, &bare, color)
}

/// The mean of each value and its neighbours, `reach` on either side as far as there are so many.
fn smoothed(points: &[(f64, f64)], reach: usize) -> Vec<(f64, f64)> {
    let mean = |place: usize| {
        let reach = reach.min(place).min(points.len() - 1 - place);
        let near = &points[place - reach..=place + reach];
        near.iter().map(|&(_, y)| y).sum::<f64>() / near.len() as f64
    };
    points.iter().enumerate().map(|(place, &(x, _))| (x, mean(place))).collect()
}

#[cfg(test)]
mod tests {
    use buzzer::train::StepReport;

    use super::*;
    use crate::records::{Recorder, When, Yardstick, read_records};

    #[test]
    fn the_plot_shows_every_series_that_was_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let yardstick = Yardstick { loss_on: LossOn::Answers, token_flop: 1.0, peak_flops: None };
        let mut recorder = Recorder::create(dir.path(), yardstick).unwrap();
        let scores = |exact_match| buzzer::eval::Scores { exact_match, f1: exact_match + 0.02, n: 300 };
        recorder.accuracy(0, When::Before, scores(0.03)).unwrap();
        for step in 1..=200_u64 {
            let report = StepReport {
                step,
                loss: 3.0 / (1.0 + step as f64 / 20.0) + (step * 37 % 11) as f64 / 30.0,
                grad_norm: 1.0,
                learning_rate: 1e-3,
                tokens: 1,
                loss_tokens: 1,
                seconds: 1.0,
                loss_scale: 1.0,
                skipped: false,
            };
            let record = recorder.measure(&report, 0);
            recorder.write(&RunRecord::Step(record)).unwrap();
            if step % 50 == 0 {
                recorder.held_out(step, Some(2.0), Some(40.0 / step as f64)).unwrap();
            }
        }
        recorder.accuracy(200, When::After, scores(0.88)).unwrap();
        let path = plot_training(dir.path(), &read_records(dir.path()).unwrap()).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        for label in
            ["step", "loss, nats a token", "trained on: answers", "held out: all tokens", "exact match", "F1"]
        {
            assert!(svg.contains(label), "{label}");
        }
        // Four measurements of two losses, and two of exact match and F1; each has a dot and the one of its error bar.
        assert_eq!(svg.matches("<circle").count(), 2 * (2 * 4 + 2 * 2));
    }

    #[test]
    fn a_run_without_a_step_still_has_a_plot() {
        let dir = tempfile::tempdir().unwrap();
        assert!(plot_training(dir.path(), &[]).unwrap().is_file());
    }

    #[test]
    fn low_scores_have_a_low_axis() {
        let top = |highest| percent_up_to(highest).range.end;
        assert_eq!([0.0, 5.0, 5.1, 30.0, 50.1, 100.0].map(top), [5.0, 5.0, 10.0, 50.0, 100.0, 100.0]);
    }

    #[test]
    fn means_run_over_neighbours_on_both_sides() {
        let points = [(0.0, 1.0), (1.0, 4.0), (2.0, 1.0), (3.0, 4.0)];
        assert_eq!(smoothed(&points, 1), [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]);
    }
}
