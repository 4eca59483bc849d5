//! Does the model know what it knows: calibration, and precision at the share of clues it would answer.
//!
//! Confidence is the probability that the model gave its whole answer, 0 to 1. Calibration asks whether of the answers
//! given with confidence 0.8 four in five are right (Guo et al., 2017). Precision at share answered is the measure of
//! Watson's team (Ferrucci et al., 2010): the clues are ranked by confidence, the surest part is answered, the rest
//! is passed, and the answers are judged. The first changes when all confidences are squared, the second does not.
//!
//! What it trades: bins of equal width, as published, so that bins in the middle may hold few answers. It refuses to let
//! the order of clues matter: where equal confidences stand on the border of the share, their mean counts.

use serde::{Deserialize, Serialize};

use crate::interval::{Interval, wilson};

const BINS: usize = 10;
/// Points of a curve.
const POINTS: usize = 20;

/// An answer's confidence and whether it was right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Confident {
    /// Probability of the whole answer, 0 to 1.
    pub confidence: f64,
    /// Whether it matches exactly.
    pub right: bool,
}

/// The answers of one range of confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// The range's lower end, which belongs to the bin below (but 0 to the first).
    pub from: f64,
    /// Its upper end.
    pub to: f64,
    /// Answers in it.
    pub n: usize,
    /// Their mean confidence; 0 if there are none.
    pub confidence: f64,
    /// The share of them that is right; 0 if there are none.
    pub accuracy: f64,
    /// Its interval.
    pub accuracy_interval: Interval,
}

/// How far confidence and accuracy are apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Answers with a confidence.
    pub n: usize,
    /// Expected calibration error: mean over answers of |accuracy - confidence| of their bin.
    pub ece: f64,
    /// Mean squared distance of confidence and outcome, right being 1 (Brier, 1950).
    pub brier: f64,
    /// Mean confidence.
    pub confidence: f64,
    /// Share that is right.
    pub accuracy: f64,
    /// Ten ranges of equal width.
    pub bins: Vec<Bin>,
}

/// Calibration of answers; all zero for none.
#[must_use]
pub fn calibration(answers: &[Confident]) -> Calibration {
    let n = answers.len();
    let mean = |sum: f64| sum / n.max(1) as f64;
    let outcome = |answer: &Confident| f64::from(u8::from(answer.right));
    let bins: Vec<Bin> = (0..BINS).map(|place| bin(place, answers)).collect();
    let gap = |bin: &Bin| bin.n as f64 * (bin.accuracy - bin.confidence).abs();
    Calibration {
        n,
        ece: mean(bins.iter().map(gap).sum()),
        brier: mean(answers.iter().map(|answer| (answer.confidence - outcome(answer)).powi(2)).sum()),
        confidence: mean(answers.iter().map(|answer| answer.confidence).sum()),
        accuracy: mean(answers.iter().map(outcome).sum()),
        bins,
    }
}

fn bin(place: usize, answers: &[Confident]) -> Bin {
    let [from, to] = [place, place + 1].map(|edge| edge as f64 / BINS as f64);
    let inside = |answer: &&Confident| {
        answer.confidence <= to && (answer.confidence > from || (place == 0 && answer.confidence == 0.0))
    };
    let (mut n, mut right, mut confidence) = (0, 0, 0.0);
    for answer in answers.iter().filter(inside) {
        n += 1;
        right += usize::from(answer.right);
        confidence += answer.confidence;
    }
    let count = n.max(1) as f64;
    Bin {
        from,
        to,
        n,
        confidence: confidence / count,
        accuracy: right as f64 / count,
        accuracy_interval: wilson(right, n),
    }
}

/// Precision when only the surest part of the clues is answered.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Precision {
    /// Share of clues answered, above 0 and up to 1.
    pub share: f64,
    /// Clues answered: the share, rounded up.
    pub n: usize,
    /// Share of the answered clues that is right.
    pub precision: f64,
    /// Its interval.
    pub precision_interval: Interval,
    /// The lowest confidence that is answered.
    pub threshold: f64,
}

/// Precision at each share answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecisionCurve {
    /// At 70 % answered, the share at which Watson's team measured.
    pub at_70: Option<Precision>,
    /// At 5, 10 ... 100 %.
    pub points: Vec<Precision>,
}

/// The curve of answers; no points for none.
#[must_use]
pub fn precision_curve(answers: &[Confident]) -> PrecisionCurve {
    let mut ranked = answers.to_vec();
    ranked.sort_unstable_by(|a, b| b.confidence.total_cmp(&a.confidence));
    let points = (1..=POINTS).filter_map(|point| precision_of(&ranked, point as f64 / POINTS as f64));
    PrecisionCurve { at_70: precision_of(&ranked, 0.7), points: points.collect() }
}

/// Precision of the surest `share` of answers, given from the surest on; `None` where there are none.
fn precision_of(ranked: &[Confident], share: f64) -> Option<Precision> {
    // A little less, so that rounding in 0.7 * 10 does not answer an eighth clue.
    let n = ((share * ranked.len() as f64 - 1e-9).ceil().max(1.0) as usize).min(ranked.len());
    let threshold = ranked.get(n.checked_sub(1)?)?.confidence;
    let right = |answers: &[Confident]| answers.iter().filter(|answer| answer.right).count() as f64;
    let surer = ranked.partition_point(|answer| answer.confidence > threshold);
    let end = ranked.partition_point(|answer| answer.confidence >= threshold);
    let equal = right(&ranked[surer..end]) / (end - surer) as f64;
    let hits = right(&ranked[..surer]) + equal * (n - surer) as f64;
    Some(Precision {
        share,
        n,
        precision: hits / n as f64,
        precision_interval: wilson(hits.round() as usize, n),
        threshold,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(of: &[(f64, u8)]) -> Vec<Confident> {
        of.iter().map(|&(confidence, right)| Confident { confidence, right: right == 1 }).collect()
    }

    const TWELVE: [(f64, u8); 12] = [
        (0.0, 0),
        (0.05, 0),
        (0.1, 0),
        (0.15, 1),
        (0.31, 0),
        (0.3, 1),
        (0.55, 1),
        (0.55, 0),
        (0.72, 1),
        (0.8, 1),
        (0.93, 1),
        (1.0, 1),
    ];

    #[test]
    fn calibration_as_numpy_computes_it() {
        // Bins by numpy: conf > edge and conf <= next edge; ece = sum(n_b / n * |mean(right) - mean(conf)|),
        // brier = mean((conf - right)²).
        let have = calibration(&answers(&TWELVE));
        assert!((have.ece - 0.221_666_666_666_666_65).abs() < 1e-12, "{have:?}");
        assert!((have.brier - 0.162_45).abs() < 1e-12, "{have:?}");
        assert!((have.confidence - 0.455).abs() < 1e-12 && (have.accuracy - 7.0 / 12.0).abs() < 1e-12);
        assert_eq!(have.bins.iter().map(|bin| bin.n).collect::<Vec<_>>(), [3, 1, 1, 1, 0, 2, 0, 2, 0, 2]);
        assert!(
            (have.bins[5].accuracy - 0.5).abs() < 1e-12 && (have.bins[5].confidence - 0.55).abs() < 1e-12
        );
    }

    #[test]
    fn what_is_right_as_often_as_it_says_is_calibrated() {
        let of: Vec<(f64, u8)> = (0..1000).map(|place| (0.8, u8::from(place % 5 != 0))).collect();
        assert!(calibration(&answers(&of)).ece < 1e-12);
        let boasts: Vec<(f64, u8)> = (0..1000).map(|place| (1.0, u8::from(place % 2 == 0))).collect();
        assert!((calibration(&answers(&boasts)).ece - 0.5).abs() < 1e-12);
    }

    #[test]
    fn the_surest_are_answered_first() {
        let curve = precision_curve(&answers(&TWELVE));
        let at = |share: f64| curve.points.iter().find(|point| (point.share - share).abs() < 1e-9).unwrap();
        // 3 of 12 are answered: 1.0, 0.93 and 0.8, all right.
        assert_eq!((at(0.25).n, at(0.25).precision, at(0.25).threshold), (3, 1.0, 0.8));
        // 5 of 12: four right ones, and half of the two at 0.55.
        assert_eq!((at(0.4).n, at(0.4).threshold), (5, 0.55));
        assert!((at(0.4).precision - 4.5 / 5.0).abs() < 1e-12);
        let at_70 = curve.at_70.unwrap();
        assert_eq!((at_70.n, at_70.threshold), (9, 0.15));
        assert!((at_70.precision - 7.0 / 9.0).abs() < 1e-12);
        assert!((at(1.0).precision - 7.0 / 12.0).abs() < 1e-12 && at(1.0).n == 12);
        let mut reversed = TWELVE;
        reversed.reverse();
        assert_eq!(precision_curve(&answers(&reversed)), curve);
        let ten = precision_curve(&answers(&TWELVE[..10]));
        assert_eq!(ten.at_70.unwrap().n, 7);
    }

    #[test]
    fn no_answers_make_no_curve() {
        let curve = precision_curve(&[]);
        assert!(curve.at_70.is_none() && curve.points.is_empty());
        let none = calibration(&[]);
        assert_eq!((none.n, none.ece, none.bins.len()), (0, 0.0, 10));
    }
}
