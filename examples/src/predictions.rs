//! `predictions.jsonl`: every answer of a run, one JSON object a line, so that another run can be set beside it.
//!
//! Scores are written for the reader; who compares runs judges both anew, so that both have the same judge. It refuses
//! a file with a line that is no prediction, and an earlier run that has no clue in common, before any clue is answered.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use buzzer::data::{Clue, Date};
use buzzer::eval::{Answer, Comparison, Facts, LeakKind, Mark, compare};
use serde::{Deserialize, Serialize};

use crate::output::{create, write_json_lines};
use crate::{Answered, Failure};

/// The file's name in a run's folder.
const FILE: &str = "predictions.jsonl";

/// A clue, its answer and the scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Data row of the clue file, from 1.
    pub row: u32,
    /// The clue's category.
    pub category: String,
    /// Its round.
    pub round: Option<String>,
    /// Its value as the file writes it.
    pub value: Option<String>,
    /// Its air date.
    pub air_date: Option<Date>,
    /// Its text.
    pub question: String,
    /// Its key.
    pub expected: String,
    /// What the model answered.
    pub answer: String,
    /// Whether that matches.
    pub exact_match: bool,
    /// Its token F1.
    pub f1: f64,
    /// Natural logarithm of the answer's probability; none if the clue did not fit the model's context.
    pub log_prob: Option<f64>,
    /// How the clue stands in the training clues, if it does.
    pub leak: Option<FoundLeak>,
}

/// The closest training clue.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FoundLeak {
    /// Exact or near.
    pub kind: LeakKind,
    /// Similarity of the two questions, 0 to 1.
    pub similarity: f64,
    /// The training clue's row in its file, from 1.
    pub train_row: u32,
}

impl Prediction {
    /// The prediction, judged.
    #[must_use]
    pub fn new(answered: Answered, leak: Option<FoundLeak>) -> Self {
        let Answered { clue, answer, log_prob, .. } = answered;
        let Clue { row, category, question, answer: expected, air_date, round, value } = clue;
        let Mark { exact_match, f1 } = Mark::of(&answer, &expected);
        Self {
            row,
            category,
            round,
            value,
            air_date,
            question,
            expected,
            answer,
            exact_match,
            f1,
            log_prob,
            leak,
        }
    }

    fn key(&self) -> (&str, &str) {
        (&self.question, &self.expected)
    }

    fn mark(&self) -> Mark {
        Mark::of(&self.answer, &self.expected)
    }
}

/// An answered clue as the judge sees it.
#[must_use]
pub fn as_judged(answered: &Answered) -> Answer<'_> {
    let Answered { clue, answer, log_prob, .. } = answered;
    let facts = Facts {
        question: &clue.question,
        gold: &clue.answer,
        category: &clue.category,
        round: clue.round.as_deref(),
        value: clue.value.as_deref(),
        year: clue.air_date.map(|date| date.year),
    };
    Answer { facts, prediction: answer, log_prob: *log_prob }
}

/// Writes a run's predictions into its folder, whole or not at all.
///
/// # Errors
/// If the file cannot be written.
pub fn write_predictions(dir: &Path, predictions: &[Prediction]) -> Result<PathBuf, Failure> {
    create(dir)?;
    let path = dir.join(FILE);
    write_json_lines(&path, predictions)?;
    Ok(path)
}

/// Reads the predictions of another run, given by its folder, its `report.json` or the file itself.
///
/// # Errors
/// If the file cannot be read or a line of it is no prediction; the message names the line.
pub fn read_predictions(run: &Path) -> Result<Vec<Prediction>, Failure> {
    let path = if run.is_dir() {
        run.join(FILE)
    } else if run.file_name().is_some_and(|name| name == "report.json") {
        run.with_file_name(FILE)
    } else {
        run.to_owned()
    };
    let text = fs::read_to_string(&path).map_err(|error| {
        let wanted = format!("give --compare a folder with {FILE} that `evaluate --out` wrote");
        Failure::input(format!("{}: {error}; {wanted}", path.display()))
    })?;
    let parse = |(place, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|error| Failure::input(format!("{} line {}: {error}", path.display(), place + 1)))
    };
    text.lines().enumerate().map(parse).collect()
}

/// An earlier run to set this one beside.
#[derive(Clone, Debug)]
pub struct EarlierRun {
    path: PathBuf,
    predictions: Vec<Prediction>,
}

/// A run beside another.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The other run, which is the second.
    pub with: PathBuf,
    /// Clues of this run that the other did not answer.
    pub only_here: usize,
    /// Clues of the other that this run did not answer.
    pub only_there: usize,
    /// The test over the clues of both.
    #[serde(flatten)]
    pub comparison: Comparison,
}

impl EarlierRun {
    /// Reads a run that will be compared over these clues.
    ///
    /// # Errors
    /// If it cannot be read or answered none of the clues.
    pub fn open(path: &Path, clues: &[Clue]) -> Result<Self, Failure> {
        let predictions = read_predictions(path)?;
        let wanted: HashSet<(&str, &str)> =
            clues.iter().map(|clue| (clue.question.as_str(), clue.answer.as_str())).collect();
        if !predictions.iter().any(|prediction| wanted.contains(&prediction.key())) {
            let message = "has no clue in common with this run; judge both with the same --data, split and --eval-limit";
            return Err(Failure::input(format!("--compare {} {message}", path.display())));
        }
        Ok(Self { path: path.to_owned(), predictions })
    }

    /// Compares predictions with those of the earlier run; a clue is the same if its text and its key are.
    #[must_use]
    pub fn compare(&self, here: &[Prediction]) -> Compared {
        let mut marks: HashMap<(&str, &str), Mark> =
            self.predictions.iter().map(|prediction| (prediction.key(), prediction.mark())).collect();
        let judged = |here: &Prediction| Mark { exact_match: here.exact_match, f1: here.f1 };
        let both = here.iter().filter_map(|here| Some((judged(here), marks.remove(&here.key())?)));
        let pairs: Vec<(Mark, Mark)> = both.collect();
        Compared {
            with: self.path.clone(),
            only_here: here.len() - pairs.len(),
            only_there: marks.len(),
            comparison: compare(&pairs),
        }
    }
}

#[cfg(test)]
mod tests {
    use buzzer::text::Template;

    use super::*;

    fn clue(question: &str, expected: &str) -> Clue {
        Clue {
            row: 1,
            category: "METALS".into(),
            question: question.into(),
            answer: expected.into(),
            air_date: Date::new(2001, 2, 3),
            round: None,
            value: Some("$200".into()),
        }
    }

    fn prediction(question: &str, expected: &str, answer: &str) -> Prediction {
        let answered = Answered {
            clue: clue(question, expected),
            template: Template::Question,
            answer: answer.into(),
            log_prob: Some(-0.5),
        };
        Prediction::new(answered, None)
    }

    #[test]
    fn runs_are_paired_by_clue() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let there =
            [prediction("a", "tin", "tin"), prediction("b", "zinc", "tin"), prediction("c", "lead", "lead")];
        let path = write_predictions(&run, &there).unwrap();
        for path in [&path, &run, &run.join("report.json")] {
            assert_eq!(read_predictions(path).unwrap(), there);
        }
        let here = [
            prediction("b", "zinc", "zinc"),
            prediction("d", "gold", "gold"),
            prediction("a", "tin", "What is tin?"),
        ];
        let compared = EarlierRun::open(&run, &[clue("a", "tin")]).unwrap().compare(&here);
        assert_eq!((compared.only_here, compared.only_there), (1, 1));
        let Comparison { n, both, only_first, only_second, .. } = compared.comparison;
        assert_eq!((n, both, only_first, only_second), (2, 1, 1, 0));
        assert_eq!(serde_json::to_value(&compared).unwrap()["exact_match_p"], 1.0);
    }

    #[test]
    fn what_cannot_be_compared_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let error = || format!("{:?}", EarlierRun::open(dir.path(), &[clue("a", "tin")]).unwrap_err());
        assert!(error().contains("predictions.jsonl") && error().contains("--compare"));
        write_predictions(dir.path(), &[prediction("a", "zinc", "tin")]).unwrap();
        assert!(error().contains("no clue in common"));
        fs::write(dir.path().join(FILE), "{}\n").unwrap();
        assert!(error().contains("line 1"));
    }
}
