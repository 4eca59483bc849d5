//! 95 % intervals: Wilson's for shares, the bootstrap for means.
//!
//! They answer how far a score would move with other clues of the same kind; they say nothing of another seed of training.
//! What they trade: answers are taken as independent, though clues of one category are a little alike, so intervals are
//! a little too narrow. What they refuse: the normal approximation, which gives nonsense near 0 and 1.

use serde::{Deserialize, Serialize};

use crate::random::Random;

/// The quantile of the normal distribution that leaves 2.5 % above it.
const Z: f64 = 1.959_963_984_540_054;
/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;
/// Seed of all bootstraps, so that a report is the same when made again.
const SEED: u64 = 1;

/// A 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// Wilson's score interval (1927) of `hits` among `n`; 0 to 1 where `n` is 0.
///
/// Center `(p + z²/2n) / (1 + z²/n)`, half width `z √(p(1-p)/n + z²/4n²) / (1 + z²/n)`, with p = hits / n.
#[must_use]
pub fn wilson(hits: usize, n: usize) -> Interval {
    if n == 0 {
        return Interval { low: 0.0, high: 1.0 };
    }
    let (n, p) = (n as f64, hits as f64 / n as f64);
    let square = Z * Z / n;
    let center = (p + square / 2.0) / (1.0 + square);
    let half = Z * (p * (1.0 - p) / n + square / (4.0 * n)).sqrt() / (1.0 + square);
    Interval { low: (center - half).max(0.0), high: (center + half).min(1.0) }
}

/// The percentile bootstrap's interval (Efron, 1979) of the mean: 2,000 resamples of a fixed seed; zeros for no values.
#[must_use]
pub fn bootstrap_mean(values: &[f64]) -> Interval {
    if values.is_empty() {
        return Interval { low: 0.0, high: 0.0 };
    }
    let mut random = Random::new(SEED);
    let mut mean = || {
        let sum: f64 = (0..values.len()).map(|_| values[random.below(values.len())]).sum();
        sum / values.len() as f64
    };
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| mean()).collect();
    means.sort_unstable_by(f64::total_cmp);
    Interval { low: quantile(&means, 0.025), high: quantile(&means, 0.975) }
}

/// The quantile of ascending values, interpolated between the two nearest; there must be one value at least.
pub(crate) fn quantile(ascending: &[f64], q: f64) -> f64 {
    let place = q * (ascending.len() - 1) as f64;
    let (below, above) = (ascending[place.floor() as usize], ascending[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(have: Interval, low: f64, high: f64, tolerance: f64) {
        let near = (have.low - low).abs() <= tolerance && (have.high - high).abs() <= tolerance;
        assert!(near, "{have:?}, expected {low} to {high}");
    }

    #[test]
    fn wilson_as_statsmodels_computes_it() {
        // statsmodels 0.15.0: proportion_confint(hits, n, method="wilson")
        let cases = [
            (0, 10, 0.0, 0.277_532_799_863),
            (10, 10, 0.722_467_200_137, 1.0),
            (3, 10, 0.107_791_267_406, 0.603_221_852_539),
            (1, 1, 0.206_549_314_377, 1.0),
            (50, 300, 0.128_765_331_204, 0.212_996_649_613),
            (700, 2000, 0.329_401_893_455, 0.371_173_220_729),
        ];
        for (hits, n, low, high) in cases {
            close(wilson(hits, n), low, high, 1e-9);
        }
        close(wilson(0, 0), 0.0, 1.0, 0.0);
    }

    #[test]
    fn the_bootstrap_of_shares_follows_the_binomial() {
        // The mean of a resample of 400 values, 120 of them 1, is binomial(400, 0.3) / 400.
        // scipy.stats.binom.ppf([0.025, 0.975], 400, 0.3) / 400
        let values: Vec<f64> = (0..400).map(|place| if place < 120 { 1.0 } else { 0.0 }).collect();
        close(bootstrap_mean(&values), 0.255, 0.345, 0.006);
        assert_eq!(bootstrap_mean(&values), bootstrap_mean(&values));
    }

    #[test]
    fn one_value_and_none() {
        close(bootstrap_mean(&[0.25]), 0.25, 0.25, 0.0);
        close(bootstrap_mean(&[]), 0.0, 0.0, 0.0);
    }

    #[test]
    fn quantiles_are_interpolated() {
        // numpy.quantile([1, 2, 4], [0, 0.25, 0.5, 0.9, 1])
        let have = [0.0, 0.25, 0.5, 0.9, 1.0].map(|q| quantile(&[1.0, 2.0, 4.0], q));
        for (have, want) in have.into_iter().zip([1.0, 1.5, 2.0, 3.6, 4.0]) {
            assert!((have - want).abs() < 1e-12, "{have}, expected {want}");
        }
    }
}
