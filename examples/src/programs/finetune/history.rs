//! What a run has been through so far: all that its report needs of steps taken before a resume.
//!
//! It goes into every checkpoint. Losses are stored as text, because reading a fraction from JSON may change its last bit.

use std::fmt;
use std::num::ParseFloatError;

use buzzer::train::StepReport;
use serde::{Deserialize, Serialize};

use crate::{Answered, HeldOutLosses};
use buzzer::data::Clue;
use buzzer::text::Template;

/// The account of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct History {
    /// The command line that the run was begun with, and what later ones added.
    pub(super) arguments: Vec<String>,
    /// What the model answered before training, a clue each.
    pub(super) before: Vec<String>,
    /// Measurements on held-out rows that have targets.
    held_out: Vec<HeldOutEntry>,
    first_loss: Option<Exact>,
    last_loss: Option<Exact>,
    tokens: usize,
    loss_tokens: usize,
    /// Steps left out because a gradient overflowed in f16.
    pub(super) skipped_steps: u64,
    /// Duration of the steps.
    step_seconds: f64,
    /// Duration of the program up to the checkpoint, over all of its starts.
    pub(super) seconds: f64,
    /// The most memory that training took, in bytes.
    pub(super) peak_memory_bytes: u64,
    /// The name of the card, if the run is on one.
    pub(super) card: Option<String>,
}

/// A number that text brings back bit for bit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
struct Exact(f64);

impl From<Exact> for String {
    fn from(number: Exact) -> Self {
        number.to_string()
    }
}

impl TryFrom<String> for Exact {
    type Error = ParseFloatError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl fmt::Display for Exact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// [`EvalLoss`] as a checkpoint keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct HeldOutEntry {
    step: u64,
    trained: Exact,
    all: Option<Exact>,
    answers: Option<Exact>,
}

/// The loss of the first step and of the last one.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Loss {
    first: f64,
    last: f64,
}

/// Losses on held-out rows.
#[derive(Clone, Copy, Serialize)]
pub(super) struct EvalLoss {
    step: u64,
    /// The one that is trained.
    loss: f64,
    /// On every token.
    all: Option<f64>,
    /// On answers.
    answers: Option<f64>,
}

impl History {
    pub(super) fn add(&mut self, report: &StepReport) {
        self.first_loss.get_or_insert(Exact(report.loss));
        self.last_loss = Some(Exact(report.loss));
        self.tokens += report.tokens;
        self.loss_tokens += report.loss_tokens;
        self.skipped_steps += u64::from(report.skipped);
        self.step_seconds += report.seconds;
    }

    /// Takes losses on held-out rows; true if the one that is trained is the lowest so far.
    pub(super) fn add_held_out(&mut self, step: u64, losses: &HeldOutLosses) -> bool {
        let Some(trained) = losses.trained() else { return false };
        let improved = self.best().is_none_or(|best| trained < best.loss);
        self.held_out.push(HeldOutEntry {
            step,
            trained: Exact(trained),
            all: losses.all.map(Exact),
            answers: losses.answers.map(Exact),
        });
        improved
    }

    /// The lowest loss on held-out rows, the earliest if several are.
    pub(super) fn best(&self) -> Option<EvalLoss> {
        self.held_out().min_by(|one, other| one.loss.total_cmp(&other.loss))
    }

    pub(super) fn held_out(&self) -> impl Iterator<Item = EvalLoss> {
        self.held_out.iter().map(|entry| EvalLoss {
            step: entry.step,
            loss: entry.trained.0,
            all: entry.all.map(|Exact(loss)| loss),
            answers: entry.answers.map(|Exact(loss)| loss),
        })
    }

    pub(super) fn loss(&self) -> Loss {
        let number = |loss: Option<Exact>| loss.map_or(0.0, |Exact(loss)| loss);
        Loss { first: number(self.first_loss), last: number(self.last_loss) }
    }

    pub(super) fn tokens_per_second(&self) -> f64 {
        self.rate(self.tokens)
    }

    pub(super) fn loss_tokens_per_second(&self) -> f64 {
        self.rate(self.loss_tokens)
    }

    fn rate(&self, count: usize) -> f64 {
        if self.step_seconds > 0.0 { count as f64 / self.step_seconds } else { 0.0 }
    }

    /// The answers before training beside their clues.
    pub(super) fn answered_before(&self, clues: &[Clue], template: Template) -> Vec<Answered> {
        let answered = |(clue, answer): (&Clue, &String)| Answered {
            clue: clue.clone(),
            template,
            answer: answer.clone(),
            log_prob: None,
        };
        clues.iter().zip(&self.before).map(answered).collect()
    }
}

impl EvalLoss {
    pub(super) fn step(self) -> u64 {
        self.step
    }
}

#[cfg(test)]
mod tests {
    use buzzer::data::LossOn;

    use super::*;

    fn losses(trained: f64) -> HeldOutLosses {
        HeldOutLosses { all: Some(trained / 3.0), answers: Some(trained), loss_on: LossOn::Answers }
    }

    #[test]
    fn losses_come_back_bit_for_bit() {
        for number in 1..1000 {
            let mut history = History::default();
            history.add_held_out(number, &losses(1.0 / (number as f64 + 0.7)));
            let text = serde_json::to_string(&history).unwrap();
            let read: History = serde_json::from_str(&text).unwrap();
            assert_eq!(read.held_out, history.held_out);
        }
    }

    #[test]
    fn the_earliest_of_the_lowest_losses_is_the_best() {
        let mut history = History::default();
        let improved: Vec<bool> = [(3, 0.5), (6, 0.4), (9, 0.4), (12, 0.6)]
            .into_iter()
            .map(|(step, loss)| history.add_held_out(step, &losses(loss)))
            .collect();
        assert_eq!(improved, [true, true, false, false]);
        assert_eq!(history.best().unwrap().step(), 6);
    }
}
