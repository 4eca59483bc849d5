//! All that is said of a run, in one structure that becomes part of its report.
//!
//! It trades time for completeness: bootstraps of every group make it some hundred milliseconds for thousands of answers.
//! It refuses to leave out what spoils a score: answers whose clue leaked stay in every number but those that say so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::breakdown::{Facet, Facts, Group, breakdown, worst};
use crate::calibration::{Calibration, Confident, PrecisionCurve, calibration, precision_curve};
use crate::forms::in_show_form;
use crate::interval::quantile;
use crate::leak::{Leak, LeakKind};
use crate::metrics::{Scores, triviaqa_judge};
use crate::paired::Mark;

/// A clue and its answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer<'a> {
    /// What is known of the clue.
    pub facts: Facts<'a>,
    /// What was answered.
    pub prediction: &'a str,
    /// Natural logarithm of the probability of the whole answer, if known.
    pub log_prob: Option<f64>,
}

impl Answer<'_> {
    /// Its scores in the show's form.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark::of(self.prediction, self.facts.gold)
    }
}

/// How answers are phrased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Style {
    /// Share in the show's form ("What is ...").
    pub show_form: f64,
    /// Share without any letter or digit.
    pub empty: f64,
    /// Median length in words, phrasing included.
    pub median_words: f64,
    /// Median length in characters, phrasing included.
    pub median_characters: f64,
}

impl Style {
    /// The style of some answers; zeros for none.
    #[must_use]
    pub fn of(answers: &[&str]) -> Self {
        let share = |holds: fn(&str) -> bool| {
            answers.iter().filter(|answer| holds(answer)).count() as f64 / answers.len().max(1) as f64
        };
        let median = |length: fn(&str) -> usize| {
            let mut lengths: Vec<f64> = answers.iter().map(|answer| length(answer) as f64).collect();
            lengths.sort_unstable_by(f64::total_cmp);
            if lengths.is_empty() { 0.0 } else { quantile(&lengths, 0.5) }
        };
        Self {
            show_form: share(in_show_form),
            empty: share(|answer| !answer.chars().any(char::is_alphanumeric)),
            median_words: median(|answer| answer.split_whitespace().count()),
            median_characters: median(|answer| answer.trim().chars().count()),
        }
    }
}

/// What the leak check found, and the scores without it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeakReport {
    /// Clues that stand in the training clues word for word.
    pub exact: usize,
    /// Clues that nearly do.
    pub near: usize,
    /// Scores of both.
    pub leaked: Group,
    /// Scores without those that stand there word for word.
    pub without_exact: Group,
    /// Scores without both.
    pub without_any: Group,
}

impl LeakReport {
    fn of(marks: &[Mark], leaks: &[Option<Leak>]) -> Self {
        let kinds: Vec<Option<LeakKind>> = leaks.iter().map(|leak| leak.map(|leak| leak.kind)).collect();
        let count = |kind| kinds.iter().filter(|found| **found == Some(kind)).count();
        let group = |name: &str, keep: fn(Option<LeakKind>) -> bool| {
            let kept = marks.iter().zip(&kinds).filter(|(_, kind)| keep(**kind)).map(|(mark, _)| *mark);
            Group::of(name, &kept.collect::<Vec<_>>())
        };
        Self {
            exact: count(LeakKind::Exact),
            near: count(LeakKind::Near),
            leaked: group("leaked", |kind| kind.is_some()),
            without_exact: group("without exact leaks", |kind| kind != Some(LeakKind::Exact)),
            without_any: group("without exact and near leaks", |kind| kind.is_none()),
        }
    }
}

/// What an assessment shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssessOptions {
    /// By what answers are grouped.
    pub by: Vec<Facet>,
    /// Clues that a category must have to be among the worst.
    pub worst_least: usize,
    /// How many of the worst categories are named.
    pub worst_count: usize,
}

impl Default for AssessOptions {
    fn default() -> Self {
        Self { by: Facet::ALL.to_vec(), worst_least: 5, worst_count: 10 }
    }
}

/// A run, judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assessment {
    /// Scores of all answers in the show's form.
    pub all: Group,
    /// Scores as TriviaQA's script gives them.
    pub triviaqa: Scores,
    /// How the answers are phrased.
    pub answers: Style,
    /// How the keys are.
    pub keys: Style,
    /// Scores by group.
    pub by: BTreeMap<Facet, Vec<Group>>,
    /// The categories with the lowest scores, among those of a least size.
    pub worst_categories: Vec<Group>,
    /// Calibration of the answers whose probability is known; absent if there are none.
    pub calibration: Option<Calibration>,
    /// Their precision at share answered.
    pub precision: Option<PrecisionCurve>,
    /// The leak check, if there was one.
    pub leaks: Option<LeakReport>,
}

impl Assessment {
    /// Judges answers; `leaks` are those of their clues, in the same order.
    #[must_use]
    pub fn of(answers: &[Answer<'_>], leaks: Option<&[Option<Leak>]>, options: &AssessOptions) -> Self {
        let marks: Vec<Mark> = answers.iter().map(Answer::mark).collect();
        let clues: Vec<(Facts<'_>, Mark)> =
            answers.iter().zip(&marks).map(|(answer, mark)| (answer.facts, *mark)).collect();
        let by: BTreeMap<_, _> = options.by.iter().map(|&facet| (facet, breakdown(facet, &clues))).collect();
        // Each group has its own resamples, and a file has thousands of categories.
        let categories = match by.get(&Facet::Category) {
            Some(categories) => categories,
            None => &breakdown(Facet::Category, &clues),
        };
        let worst_categories = worst(categories, options.worst_least, options.worst_count);
        let confident: Vec<Confident> = answers
            .iter()
            .zip(&marks)
            .filter_map(|(answer, mark)| {
                let confidence = answer.log_prob?.exp().clamp(0.0, 1.0);
                Some(Confident { confidence, right: mark.exact_match })
            })
            .collect();
        let known = !confident.is_empty();
        Self {
            all: Group::of("all", &marks),
            triviaqa: triviaqa_judge(answers.iter().map(|answer| (answer.prediction, answer.facts.gold))),
            answers: Style::of(&answers.iter().map(|answer| answer.prediction).collect::<Vec<_>>()),
            keys: Style::of(&answers.iter().map(|answer| answer.facts.gold).collect::<Vec<_>>()),
            by,
            worst_categories,
            calibration: known.then(|| calibration(&confident)),
            precision: known.then(|| precision_curve(&confident)),
            leaks: leaks.map(|leaks| LeakReport::of(&marks, leaks)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer<'a>(prediction: &'a str, gold: &'a str, log_prob: Option<f64>) -> Answer<'a> {
        let facts = Facts { gold, category: "METALS", year: Some(1999), ..Facts::default() };
        Answer { facts, prediction, log_prob }
    }

    #[test]
    fn phrasing_and_length() {
        let style = Style::of(&["What is tin?", "tin", "who's Ann", "", "a dark blue sea"]);
        let expected = Style { show_form: 0.4, empty: 0.2, median_words: 2.0, median_characters: 9.0 };
        assert_eq!(style, expected);
        assert_eq!(Style::of(&[]), Style::default());
    }

    #[test]
    fn a_run_is_judged_as_a_whole() {
        let leak = |kind| Some(Leak { kind, train: 0, similarity: 1.0 });
        let answers = [
            answer("What is tin?", "tin", Some(0.9_f64.ln())),
            answer("zinc", "zinc", Some(0.5_f64.ln())),
            answer("lead", "gold", Some(0.25_f64.ln())),
            answer("iron", "iron", None),
        ];
        let leaks = [leak(LeakKind::Exact), None, None, leak(LeakKind::Near)];
        let assessed = Assessment::of(&answers, Some(&leaks), &AssessOptions::default());
        assert_eq!((assessed.all.n, assessed.all.exact_match), (4, 0.75));
        assert_eq!(assessed.triviaqa.exact_match, 0.5);
        let leaks = assessed.leaks.as_ref().unwrap();
        assert_eq!((leaks.exact, leaks.near, leaks.leaked.n, leaks.leaked.exact_match), (1, 1, 2, 1.0));
        assert_eq!((leaks.without_exact.n, leaks.without_any.n), (3, 2));
        assert!((leaks.without_any.exact_match - 0.5).abs() < 1e-12);
        let calibration = assessed.calibration.as_ref().unwrap();
        assert_eq!(calibration.n, 3);
        assert!((calibration.ece - (0.1 + 0.5 + 0.25) / 3.0).abs() < 1e-9);
        assert_eq!(assessed.by.len(), 5);
        assert_eq!(assessed.by[&Facet::Decade][0].name, "1990s");
        assert!(assessed.worst_categories.is_empty());
        let json = serde_json::to_value(&assessed).unwrap();
        assert_eq!(json["by"]["answer_type"][0]["name"], "thing");
        assert_eq!(serde_json::from_value::<Assessment>(json).unwrap(), assessed);
    }

    #[test]
    fn without_probabilities_there_is_no_calibration() {
        let options = AssessOptions { by: vec![Facet::Category], worst_least: 1, worst_count: 1 };
        let assessed = Assessment::of(&[answer("tin", "zinc", None)], None, &options);
        assert!(assessed.calibration.is_none() && assessed.precision.is_none() && assessed.leaks.is_none());
        assert_eq!((assessed.by.len(), assessed.worst_categories.len()), (1, 1));
        assert_eq!(Assessment::of(&[], None, &options).all.n, 0);
    }
}
