//! What a run leaves for tools and for people: `report.json`, some answers before and after, a summary.

use std::path::{Path, PathBuf};

use buzzer::data::PackReport;
use buzzer::eval::{Scores, exact_match};
use buzzer::train::MemoryPlan;
use serde::Serialize;

use super::history::{EvalLoss, Loss};
use crate::{Answered, CorpusReport, Recipe, bytes, say};

/// Clues whose answers are shown.
const SHOWN: usize = 5;

/// `report.json`.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) device: String,
    pub(super) model: ModelReport,
    pub(super) recipe: Recipe,
    pub(super) data: CorpusReport,
    pub(super) packing: PackingReport,
    pub(super) steps: u64,
    /// Steps among them that f16 overflowed in, and that changed nothing.
    pub(super) skipped_steps: u64,
    /// Whether a signal ended the run before its last step; nothing is answered then.
    pub(super) interrupted: bool,
    /// The step of the checkpoint that the run went on from, if it did.
    pub(super) resumed_from: Option<u64>,
    pub(super) loss: Loss,
    pub(super) eval_loss: Vec<EvalLoss>,
    pub(super) tokens_per_second: f64,
    pub(super) loss_tokens_per_second: f64,
    pub(super) peak_memory_bytes: u64,
    pub(super) planned_memory_bytes: usize,
    pub(super) plan: MemoryPlan,
    pub(super) eval: Eval,
    pub(super) adapter: PathBuf,
    pub(super) adapter_best: Option<PathBuf>,
    pub(super) checkpoints: PathBuf,
    /// The file of all settings, which can be given again.
    pub(super) recipe_file: PathBuf,
    /// One record a step.
    pub(super) records: PathBuf,
    pub(super) plot: PathBuf,
    /// Of all starts together, each up to its last checkpoint.
    pub(super) seconds: f64,
}

#[derive(Clone, Serialize)]
pub(super) struct ModelReport {
    pub(super) base: PathBuf,
    pub(super) parameters: usize,
    pub(super) trainable: usize,
}

#[derive(Serialize)]
pub(super) struct PackingReport {
    rows: usize,
    documents: usize,
    tokens: usize,
    loss_tokens: usize,
    efficiency: f64,
}

#[derive(Serialize)]
pub(super) struct Eval {
    pub(super) before: Scores,
    /// None if the run was interrupted.
    pub(super) after: Option<Scores>,
}

impl From<PackReport> for PackingReport {
    fn from(packing: PackReport) -> Self {
        let PackReport { rows, documents, tokens, loss_tokens, efficiency, .. } = packing;
        Self { rows, documents, tokens, loss_tokens, efficiency }
    }
}

impl Report {
    /// The lines at the end of a run.
    pub(super) fn summarize(&self, path: &Path) {
        say!(
            "done      {} steps in {:.0} s, {:.0} tokens/s, peak memory {} ({} planned)",
            self.steps,
            self.seconds,
            self.tokens_per_second,
            bytes(self.peak_memory_bytes),
            bytes(self.planned_memory_bytes as u64)
        );
        if self.skipped_steps > 0 {
            say!("skipped   {} steps, whose gradients left the range of f16", self.skipped_steps);
        }
        if let Some(after) = self.eval.after {
            let before = self.eval.before;
            let (measure, [before, after]) = if self.recipe.template.writes_clues() {
                ("F1 against the show's clues", [before.f1, after.f1])
            } else {
                ("exact match", [before.exact_match, after.exact_match])
            };
            say!("result    {measure} {:.1} % before, {:.1} % after", 100.0 * before, 100.0 * after);
        }
        let [adapter, report, records] = [&self.adapter, path, &self.records].map(Path::display);
        say!("written   {adapter} and {report}; records in {records}");
    }
}

/// Some clues with the answers before and after.
pub(super) fn show(before: &[Answered], after: &[Answered]) {
    for (before, after) in before.iter().zip(after).take(SHOWN) {
        let [given, expected] = after.given_and_expected();
        let first_line = |answer: &str| answer.lines().next().unwrap_or_default().to_owned();
        let mark = if after.template.writes_clues() {
            say!("answer    {given}, in the category {}", after.clue.category);
            "the show's"
        } else {
            say!("clue      {given}");
            if exact_match(&after.answer, expected) { "right; expected" } else { "wrong; expected" }
        };
        say!("          before: {:?}", first_line(&before.answer));
        say!("          after:  {:?} ({mark} {expected:?})", first_line(&after.answer));
    }
}
