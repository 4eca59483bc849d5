//! Compares the strict judge with the oracle in `golden/triviaqa.py`, pair by pair.
//!
//! F1 is compared within 1e-12: both sides do the same few operations in double precision. The test refuses a golden
//! file that has shrunk or lost its variety.

use buzzer_eval::{exact_match, f1, normalize, triviaqa_exact_match, triviaqa_f1};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    prediction: String,
    gold: String,
    normal_prediction: String,
    normal_gold: String,
    exact_match: bool,
    f1: f64,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("golden/triviaqa.json")).expect("the golden file is a list of cases")
}

#[test]
fn every_pair_scores_as_the_oracle_says() {
    for case in cases() {
        let (prediction, gold) = (&case.prediction, &case.gold);
        assert_eq!(normalize(prediction), case.normal_prediction, "{prediction:?}");
        assert_eq!(normalize(gold), case.normal_gold, "{gold:?}");
        assert_eq!(triviaqa_exact_match(prediction, gold), case.exact_match, "{prediction:?} for {gold:?}");
        let have = triviaqa_f1(prediction, gold);
        assert!((have - case.f1).abs() < 1e-12, "{prediction:?} for {gold:?}: {have}, oracle {}", case.f1);
    }
}

#[test]
fn the_golden_file_has_cases_of_every_kind() {
    let cases = cases();
    let count = |kind: fn(&Case) -> bool| cases.iter().filter(|case| kind(case)).count();
    assert!(cases.len() >= 200);
    assert!(count(|c| c.exact_match) >= 30);
    assert!(count(|c| c.f1 > 0.0 && c.f1 < 1.0) >= 100);
    assert!(count(|c| c.f1 == 0.0) >= 20);
}

#[test]
fn the_show_is_never_stricter_where_something_is_left_to_compare() {
    for case in cases().iter().filter(|case| !case.normal_gold.is_empty()) {
        let (prediction, gold) = (&case.prediction, &case.gold);
        assert!(exact_match(prediction, gold) >= case.exact_match, "{prediction:?} for {gold:?}");
        assert!(f1(prediction, gold) >= case.f1 - 1e-12, "{prediction:?} for {gold:?}");
    }
}
