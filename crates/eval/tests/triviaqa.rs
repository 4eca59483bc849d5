//! Compares the strict judge with the oracle in `golden/triviaqa.py`, pair by pair.
//!
//! F1 is compared within 1e-12: both sides do the same few operations in double precision. The test refuses a golden
//! file that has shrunk or lost its variety.

use buzzer_eval::{exact_match, f1, normalize, triviaqa_exact_match, triviaqa_f1};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    prediction: String,
    references: Vec<String>,
    normal_prediction: String,
    exact_match: bool,
    f1: f64,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("golden/triviaqa.json")).expect("the golden file is a list of cases")
}

#[test]
fn every_pair_scores_as_the_oracle_says() {
    for case in cases() {
        let (prediction, references) = (&case.prediction, &case.references);
        assert_eq!(normalize(prediction), case.normal_prediction, "{prediction:?}");
        let have = triviaqa_exact_match(prediction, references);
        assert_eq!(have, case.exact_match, "{prediction:?} for {references:?}");
        let have = triviaqa_f1(prediction, references);
        assert!(
            (have - case.f1).abs() < 1e-12,
            "{prediction:?} for {references:?}: {have}, oracle {}",
            case.f1
        );
    }
}

#[test]
fn the_golden_file_has_cases_of_every_kind() {
    let cases = cases();
    let count = |kind: fn(&Case) -> bool| cases.iter().filter(|case| kind(case)).count();
    assert!(cases.len() >= 1000);
    assert!(count(|c| c.exact_match) >= 100);
    assert!(count(|c| c.f1 > 0.0 && c.f1 < 1.0) >= 500);
    assert!(count(|c| c.f1 == 0.0) >= 100);
    assert!(count(|c| c.references.len() > 1) >= 500);
}

#[test]
fn the_show_is_never_stricter_where_something_is_left_to_compare() {
    for case in cases() {
        let prediction = &case.prediction;
        for gold in case.references.iter().filter(|gold| !normalize(gold).is_empty()) {
            let strict = triviaqa_exact_match(prediction, &[gold]);
            assert!(exact_match(prediction, gold) >= strict, "{prediction:?} for {gold:?}");
            assert!(
                f1(prediction, gold) >= triviaqa_f1(prediction, &[gold]) - 1e-12,
                "{prediction:?} for {gold:?}"
            );
        }
    }
}
