//! Exact match and F1, each in the published form and in the show's.
//!
//! Both take the best over several references: the published form over those it is given, the show's form over what a key
//! accepts. The published F1 gives an empty overlap 0, even of nothing with nothing. Both refuse partial credit for
//! spelling. Scores are fractions, 0 to 1, where the published script prints percent.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::forms::{alternatives, first_line, strip_show_form};
use crate::normalize::{fold_space, normalize, plain};

/// Mean scores over `n` answers; all zero where `n` is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Share of answers that match exactly, 0 to 1.
    pub exact_match: f64,
    /// Mean token F1, 0 to 1.
    pub f1: f64,
    /// Answers judged.
    pub n: usize,
}

/// Whether the prediction equals one of the references once both are normalised: TriviaQA's exact match.
///
/// With no reference nothing matches, where the published script fails.
#[must_use]
pub fn triviaqa_exact_match(prediction: &str, references: &[impl AsRef<str>]) -> bool {
    let prediction = normalize(prediction);
    references.iter().any(|reference| normalize(reference.as_ref()) == prediction)
}

/// The best token F1 of the normalised prediction over the references, TriviaQA's: `2 p r / (p + r)`.
///
/// Tokens in common are counted as often as both hold them; precision p is their share of the prediction's tokens,
/// recall r of the reference's. With none in common it is 0; so it is for two empty texts, which match exactly.
#[must_use]
pub fn triviaqa_f1(prediction: &str, references: &[impl AsRef<str>]) -> f64 {
    let prediction = normalize(prediction);
    let score = |reference: &_| token_f1(&prediction, &normalize(AsRef::<str>::as_ref(reference)));
    references.iter().map(score).fold(0.0, f64::max)
}

#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
pub(crate) fn token_f1(prediction: &str, gold: &str) -> f64 {
    let mut left: HashMap<&str, usize> = HashMap::new();
    for token in gold.split_whitespace() {
        *left.entry(token).or_default() += 1;
    }
    let gold_len = left.values().sum::<usize>();
    let (mut common, mut prediction_len) = (0_usize, 0_usize);
    for token in prediction.split_whitespace() {
        prediction_len += 1;
        if let Some(count) = left.get_mut(token).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    let precision = common as f64 / prediction_len as f64;
    let recall = common as f64 / gold_len as f64;
    2.0 * precision * recall / (precision + recall)
}

/// The comparable form of an answer: normalised, or, where that leaves nothing, with its articles ("A", "The The"), or
/// else as it stands ("@").
fn comparable(answer: &str) -> String {
    let first = Some(normalize(answer)).filter(|form| !form.is_empty());
    let second = || Some(fold_space(&plain(answer))).filter(|form| !form.is_empty());
    first.or_else(second).unwrap_or_else(|| answer.trim().to_lowercase())
}

/// The readings of a prediction: without the show's phrasing, and as it stands, since a title may open like a question.
fn readings(prediction: &str) -> [String; 2] {
    [strip_show_form(prediction), first_line(prediction)].map(comparable)
}

/// Whether a prediction matches one of the answers that the key accepts (see [`alternatives`]).
///
/// An empty answer matches nothing.
#[must_use]
pub fn exact_match(prediction: &str, gold: &str) -> bool {
    let readings = readings(prediction);
    let accepted = alternatives(gold);
    accepted
        .iter()
        .map(|answer| comparable(answer))
        .any(|answer| !answer.is_empty() && readings.contains(&answer))
}

/// The best token F1 of a prediction over the answers that the key accepts; 1 wherever [`exact_match`] holds.
#[must_use]
pub fn f1(prediction: &str, gold: &str) -> f64 {
    let readings = readings(prediction);
    let accepted = alternatives(gold);
    let scores = accepted.iter().map(|answer| comparable(answer)).flat_map(|answer| {
        let each = |reading: &String| token_f1(reading, &answer);
        readings.iter().map(each).collect::<Vec<f64>>()
    });
    scores.fold(0.0, f64::max)
}

/// Judges pairs of (prediction, key) in the show's form and takes the means.
pub fn judge<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Scores {
    means(pairs.into_iter().map(|(prediction, gold)| (exact_match(prediction, gold), f1(prediction, gold))))
}

/// Judges pairs of (prediction, key) as TriviaQA's script would that knows the key as its only reference.
pub fn triviaqa_judge<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Scores {
    let score = |(prediction, gold): (&str, &str)| {
        (triviaqa_exact_match(prediction, &[gold]), triviaqa_f1(prediction, &[gold]))
    };
    means(pairs.into_iter().map(score))
}

#[expect(clippy::cast_precision_loss, reason = "the number of answers is far below 2^52")]
fn means(scores: impl Iterator<Item = (bool, f64)>) -> Scores {
    let (mut matches, mut f1_sum, mut n) = (0_usize, 0.0, 0_usize);
    for (exact_match, f1) in scores {
        matches += usize::from(exact_match);
        f1_sum += f1;
        n += 1;
    }
    let count = n.max(1) as f64;
    Scores { exact_match: matches as f64 / count, f1: f1_sum / count, n }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shows_forms_match() {
        let right = [
            ("What is the Nile?", "Nile"),
            ("Who is Jefferson?", "(Thomas) Jefferson"),
            ("Thomas Jefferson", "(Thomas) Jefferson"),
            ("couch", "the sofa (or couch)"),
            ("What is a sofa?", "the sofa (or couch)"),
            ("Remus", "(1 of) Romulus & Remus"),
            ("What is Trick or Treat?", "Trick or Treat"),
            ("Who's Afraid of Virginia Woolf?", "Who's Afraid of Virginia Woolf?"),
            ("What is \"Who's Afraid of Virginia Woolf?\"", "Who's Afraid of Virginia Woolf?"),
            ("What is A?", "A"),
            ("What is @?", "@"),
            ("a", "a"),
            ("gold\nor tin", "gold"),
        ];
        for (prediction, gold) in right {
            assert!(exact_match(prediction, gold), "{prediction:?} for {gold:?}");
            assert!((f1(prediction, gold) - 1.0).abs() < 1e-12, "{prediction:?} for {gold:?}");
        }
    }

    #[test]
    fn wrong_and_empty_answers_do_not() {
        let wrong =
            [("tin", "zinc"), ("", "gold"), ("gold", ""), ("", ""), ("?", "?!"), ("The", "A"), ("", "The")];
        for (prediction, gold) in wrong {
            assert!(!exact_match(prediction, gold), "{prediction:?} for {gold:?}");
            assert!(f1(prediction, gold).abs() < 1e-12, "{prediction:?} for {gold:?}");
        }
        assert!(!exact_match("Romulus", "Romulus & Remus"));
        assert!(!exact_match("red", "(2 of) red, white & blue"));
    }

    #[test]
    fn f1_counts_tokens_as_often_as_both_hold_them() {
        assert!((triviaqa_f1("new york new york", &["new york"]) - 2.0 / 3.0).abs() < 1e-12);
        assert!((triviaqa_f1("blue", &["dark blue sea"]) - 0.5).abs() < 1e-12);
        assert!((f1("John Adams", "(John Quincy) Adams") - 0.8).abs() < 1e-12);
    }

    #[test]
    fn the_published_form_knows_no_show() {
        assert!(!triviaqa_exact_match("What is the Nile?", &["Nile"]));
        assert!(triviaqa_exact_match("The A", &["an"]));
        assert!(triviaqa_f1("The A", &["an"]).abs() < 1e-12);
        let pairs = [("What is gold?", "gold"), ("Jefferson", "(Thomas) Jefferson"), ("tin", "tin")];
        let scores = triviaqa_judge(pairs);
        assert_eq!((scores.exact_match, scores.n), (1.0 / 3.0, 3));
        assert!((scores.f1 - (0.5 + 2.0 / 3.0 + 1.0) / 3.0).abs() < 1e-12);
        assert!((judge(pairs).exact_match - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_best_reference_counts() {
        let none: [&str; 0] = [];
        assert!(!triviaqa_exact_match("", &none));
        assert!(triviaqa_f1("gold", &none).abs() < 1e-12);
        assert!(triviaqa_exact_match("gold", &["tin", "The Gold"]));
        assert!((triviaqa_f1("dark blue", &["sea", "blue", "dark sea blue"]) - 0.8).abs() < 1e-12);
    }

    #[test]
    fn means_are_fractions_and_nothing_gives_zeros() {
        assert_eq!(judge([]), Scores::default());
        let scores = judge([("What is gold?", "gold"), ("tin", "zinc"), ("dark sea", "sea"), ("x", "y")]);
        assert_eq!((scores.exact_match, scores.n), (0.25, 4));
        assert!((scores.f1 - (1.0 + 2.0 / 3.0) / 4.0).abs() < 1e-12);
    }

    #[test]
    fn scores_keep_their_names_in_json() {
        let json = serde_json::to_string(&Scores { exact_match: 0.5, f1: 0.75, n: 4 }).unwrap();
        assert_eq!(json, r#"{"exact_match":0.5,"f1":0.75,"n":4}"#);
        assert_eq!(serde_json::from_str::<Scores>(&json).unwrap().n, 4);
    }
}
