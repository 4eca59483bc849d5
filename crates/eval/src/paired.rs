//! Two runs over the same clues: is one better, or were the clues kind to it?
//!
//! Right and wrong are compared with McNemar's test in its exact form, F1 with the sign test: both look only at the
//! clues on which the runs differ, and ask how likely so uneven a division is if either run were as good. The size of
//! the difference has an interval from a bootstrap over pairs. What it trades: clues are taken as independent. It refuses
//! to compare runs over different clues; the caller pairs them.

use serde::{Deserialize, Serialize};

use crate::interval::{Interval, bootstrap_mean};
use crate::metrics::{exact_match, f1};

/// A clue's score in one run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    /// Whether the answer matches exactly.
    pub exact_match: bool,
    /// Token F1, 0 to 1.
    pub f1: f64,
}

impl Mark {
    /// The scores of an answer against a key, in the show's form.
    #[must_use]
    pub fn of(prediction: &str, gold: &str) -> Self {
        Self { exact_match: exact_match(prediction, gold), f1: f1(prediction, gold) }
    }
}

/// The first run against the second. Differences are first minus second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Clues that both runs answered.
    pub n: usize,
    /// Right in both.
    pub both: usize,
    /// Right in the first run only.
    pub only_first: usize,
    /// Right in the second run only.
    pub only_second: usize,
    /// Right in neither.
    pub neither: usize,
    /// Difference of the shares of exact matches.
    pub exact_match_difference: f64,
    /// Its interval.
    pub exact_match_interval: Interval,
    /// Two-sided p-value of McNemar's exact test.
    pub exact_match_p: f64,
    /// Difference of the mean F1.
    pub f1_difference: f64,
    /// Its interval.
    pub f1_interval: Interval,
    /// Two-sided p-value of the sign test on F1; clues of equal F1 do not count.
    pub f1_p: f64,
}

/// Compares two runs, given as each clue's marks in the first and in the second.
#[must_use]
pub fn compare(pairs: &[(Mark, Mark)]) -> Comparison {
    let count = |kind: fn(&Mark, &Mark) -> bool| pairs.iter().filter(|(a, b)| kind(a, b)).count();
    let only_first = count(|a, b| a.exact_match && !b.exact_match);
    let only_second = count(|a, b| b.exact_match && !a.exact_match);
    let [better, worse] = [count(|a, b| a.f1 > b.f1), count(|a, b| a.f1 < b.f1)];
    let share = |mark: &Mark| f64::from(u8::from(mark.exact_match));
    let exact: Vec<f64> = pairs.iter().map(|(a, b)| share(a) - share(b)).collect();
    let f1: Vec<f64> = pairs.iter().map(|(a, b)| a.f1 - b.f1).collect();
    Comparison {
        n: pairs.len(),
        both: count(|a, b| a.exact_match && b.exact_match),
        only_first,
        only_second,
        neither: count(|a, b| !a.exact_match && !b.exact_match),
        exact_match_difference: mean(&exact),
        exact_match_interval: bootstrap_mean(&exact),
        exact_match_p: sign_test(only_first, only_second),
        f1_difference: mean(&f1),
        f1_interval: bootstrap_mean(&f1),
        f1_p: sign_test(better, worse),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The probability of a division of a + b fair coins at least as uneven as a to b; on discordant pairs this is McNemar's
/// exact test.
///
/// `min(1, 2 P(X <= min(a, b)))`, X binomial(a + b, 1/2).
#[must_use]
pub fn sign_test(a: usize, b: usize) -> f64 {
    let (n, few) = ((a + b) as f64, a.min(b));
    // Logarithm of the probability of k heads, from k = 0 on; each follows from the one before.
    let mut log_term = -n * std::f64::consts::LN_2;
    let mut log_terms = vec![log_term];
    for k in 0..few {
        log_term += ((n - k as f64) / (k + 1) as f64).ln();
        log_terms.push(log_term);
    }
    let tail: f64 = log_terms.into_iter().map(f64::exp).sum();
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_values_as_scipy_computes_them() {
        // scipy 1.17.1: binomtest(a, a + b).pvalue; statsmodels 0.15.0 gives the same for mcnemar(table, exact=True).
        let cases = [
            (0, 0, 1.0),
            (1, 0, 1.0),
            (5, 0, 0.0625),
            (12, 2, 0.012_939_453_125),
            (2, 12, 0.012_939_453_125),
            (7, 7, 1.0),
            (30, 18, 0.111_402_891_061_018_78),
            (150, 200, 0.008_720_036_530_555_947),
            (3000, 3300, 0.000_164_756_076_697_483_63),
        ];
        for (a, b, want) in cases {
            let have = sign_test(a, b);
            assert!((have - want).abs() < 1e-9 * want, "{a} to {b}: {have}, expected {want}");
        }
        assert!(sign_test(9000, 1000) < 1e-300);
    }

    #[test]
    fn the_table_and_the_differences() {
        let mark = |f1: f64| Mark { exact_match: f1 == 1.0, f1 };
        let pair = |a: f64, b: f64| (mark(a), mark(b));
        let mut pairs = vec![pair(1.0, 0.0); 12];
        pairs.extend(vec![pair(0.0, 1.0); 2]);
        pairs.extend(vec![pair(1.0, 1.0); 30]);
        pairs.extend(vec![pair(0.5, 0.25); 6]);
        pairs.extend(vec![pair(0.0, 0.0); 50]);
        let compared = compare(&pairs);
        let table = (compared.n, compared.both, compared.only_first, compared.only_second, compared.neither);
        assert_eq!(table, (100, 30, 12, 2, 56));
        assert!((compared.exact_match_difference - 0.1).abs() < 1e-12);
        assert!((compared.f1_difference - (12.0 - 2.0 + 1.5) / 100.0).abs() < 1e-12);
        assert_eq!(compared.exact_match_p, sign_test(12, 2));
        assert_eq!(compared.f1_p, sign_test(18, 2));
        // Standard error of the mean difference: sqrt(0.14 - 0.1²) / 10 = 0.0361; 1.96 of it to either side.
        let Interval { low, high } = compared.exact_match_interval;
        assert!((low - 0.029).abs() < 0.012 && (high - 0.171).abs() < 0.012, "{low} to {high}");
        assert!(compared.f1_interval.low > 0.0);
    }

    #[test]
    fn a_run_against_itself_and_no_run() {
        let mark = Mark { exact_match: true, f1: 1.0 };
        let same = compare(&[(mark, mark); 5]);
        assert_eq!((same.exact_match_p, same.f1_p, same.f1_difference), (1.0, 1.0, 0.0));
        assert_eq!((compare(&[]).n, compare(&[]).exact_match_p), (0, 1.0));
    }
}
