//! The next token from the logits, on the host.
//!
//! Order of the filters, as in Hugging Face's transformers: repetition penalty, temperature, top-k, top-p, min-p.
//! Ties go to the lower id, so greedy decoding is the same everywhere. The n-th draw of a request is a function of
//! its seed and n, so a request draws the same alone, in a batch, and after a pause.

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{InferError, LogProb};

/// Candidates that are put in order at first; most filters need no more.
const FEW: usize = 128;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 takes the likeliest token; higher is more random.
    pub temperature: f64,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Only tokens with at least this share of the likeliest one's probability; 0 for all.
    pub min_p: f64,
    /// Logits of tokens in the prompt or the answer are divided by this if positive, else multiplied; 1 for no penalty.
    pub repetition_penalty: f64,
    /// Another seed, another choice.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// # Errors
    /// If a number is out of range.
    pub fn check(&self) -> Result<(), InferError> {
        let wrong =
            |flag, found: f64, choose| Err(InferError::Setting { flag, found: found.to_string(), choose });
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return wrong("--temperature", self.temperature, "0 (greedy) or a positive number");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return wrong("--top-p", self.top_p, "a number above 0 and up to 1");
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return wrong("--min-p", self.min_p, "a number from 0 to 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return wrong(
                "--repetition-penalty",
                self.repetition_penalty,
                "1 (none) or another positive number",
            );
        }
        Ok(())
    }

    /// Whether the choice is the greatest logit as it is.
    pub(crate) fn is_argmax(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// The token after `before` (prompt and answer), of which `drawn` were drawn for this request, or `None` if a
    /// logit is NaN. `logits` is `[v]`.
    #[must_use]
    pub fn choose(&self, logits: &[f32], before: &[u32], drawn: usize) -> Option<u32> {
        if logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        if self.is_argmax() {
            return Some(argmax(logits));
        }
        let mut logits = logits.to_vec();
        self.penalize(&mut logits, before);
        if self.temperature == 0.0 {
            return Some(argmax(&logits));
        }
        let candidates = self.candidates(&logits);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = uniform(self.seed, drawn) * total;
        for &(id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Some(id);
            }
        }
        // Rounding can leave a rest; a token of no weight is never drawn.
        candidates.iter().rfind(|(_, weight)| *weight > 0.0).map(|&(id, _)| id)
    }

    /// Once a token, however often it stands there.
    fn penalize(&self, logits: &mut [f32], before: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        let mut seen = before.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for logit in seen.iter().map(|&id| id as usize) {
            if let Some(logit) = logits.get_mut(logit) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Tokens that remain, likeliest first or by their ids if no filter put them in order, with weights relative to the likeliest.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let best = f64::from(logits[argmax(logits) as usize]);
        let weight = |logit: f32| ((f64::from(logit) - best) / self.temperature).exp();
        let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&logit| weight(logit))).collect();
        if self.top_k > 0 {
            keep_likeliest(&mut all, self.top_k);
        }
        if self.top_p < 1.0 {
            self.keep_top_p(&mut all);
        }
        if self.min_p > 0.0 {
            all.retain(|&(_, weight)| weight >= self.min_p);
        }
        // Putting a whole vocabulary in order takes longer than all the rest, and a draw needs no order.
        if self.top_k > 0 {
            all.sort_unstable_by(likelier);
        }
        all
    }

    /// The likeliest tokens that together have the probability, found among few before all are put in order.
    fn keep_top_p(&self, all: &mut Vec<(u32, f64)>) {
        let needed = self.top_p * all.iter().map(|(_, weight)| weight).sum::<f64>();
        let mut few = FEW;
        loop {
            let mut some = all.clone();
            keep_likeliest(&mut some, few);
            some.sort_unstable_by(likelier);
            let mut sum = 0.0;
            let enough = some.iter().position(|(_, weight)| {
                sum += weight;
                sum >= needed
            });
            if enough.is_some() || few >= all.len() {
                some.truncate(enough.map_or(some.len(), |place| place + 1));
                *all = some;
                return;
            }
            few *= 8;
        }
    }
}

/// Likelier before less likely, of equals the lower id.
fn likelier(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Leaves the k likeliest, in no order.
fn keep_likeliest(all: &mut Vec<(u32, f64)>, k: usize) {
    if k < all.len() {
        all.select_nth_unstable_by(k, likelier);
        all.truncate(k);
    }
}

/// The n-th number of a seed, from 0 up to 1.
fn uniform(seed: u64, n: usize) -> f64 {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_word_pos(2 * n as u128);
    (generator.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// The first of the greatest.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, place: usize| if logits[place] > logits[best] { place } else { best };
    (0..logits.len()).fold(0, better) as u32
}

/// Log-probabilities of a chosen token and of the `top` likeliest.
pub(crate) fn log_probs(logits: &[f32], chosen: u32, top: usize) -> LogProb {
    let best = logits[argmax(logits) as usize];
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - best).exp()).sum();
    let normalizer = f64::from(best) + sum.ln();
    let log_prob = |logit: f64| (logit - normalizer) as f32;
    let all = (0..).zip(logits.iter().map(|&logit| f64::from(logit)));
    // Most ask for none, and a vocabulary is long.
    let mut likeliest: Vec<(u32, f64)> = if top == 0 { Vec::new() } else { all.collect() };
    keep_likeliest(&mut likeliest, top);
    likeliest.sort_unstable_by(likelier);
    LogProb {
        chosen: log_prob(f64::from(logits[chosen as usize])),
        top: likeliest.into_iter().map(|(id, logit)| (id, log_prob(logit))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: Sampling =
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    fn draws(settings: Sampling, logits: &[f32]) -> Vec<u32> {
        (0..2000).map(|n| settings.choose(logits, &[], n).unwrap()).collect()
    }

    fn one_three_six() -> [f32; 3] {
        [1.0_f32.ln(), 3.0_f32.ln(), 6.0_f32.ln()]
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(Sampling::default().choose(&[0.0, 2.0, 2.0, 1.0], &[], 0), Some(1));
        assert_eq!(Sampling::default().choose(&[0.0, f32::NAN], &[], 0), None);
        assert_eq!(SAMPLED.choose(&[0.0, f32::NAN], &[], 0), None);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let all = draws(SAMPLED, &one_three_six());
        let share = |id: u32| all.iter().filter(|&&drawn| drawn == id).count() as f64 / all.len() as f64;
        assert!(
            (share(0) - 0.1).abs() < 0.03 && (share(1) - 0.3).abs() < 0.04 && (share(2) - 0.6).abs() < 0.04
        );
        assert_eq!(all, draws(SAMPLED, &one_three_six()));
        assert_ne!(all, draws(Sampling { seed: 1, ..SAMPLED }, &one_three_six()));
    }

    #[test]
    fn what_has_no_weight_is_never_drawn() {
        // Far ids whose weights round to nothing stand behind the likely ones.
        let mut logits = vec![-1e30_f32; 300];
        logits[7] = 0.0;
        logits[9] = 0.5;
        assert!(draws(SAMPLED, &logits).iter().all(|id| [7, 9].contains(id)));
        assert_eq!(Sampling { temperature: 1e-3, ..SAMPLED }.choose(&logits, &[], 0), Some(9));
    }

    #[test]
    fn filters_leave_the_likeliest() {
        let logits = one_three_six();
        assert!(draws(Sampling { top_k: 2, ..SAMPLED }, &logits).iter().all(|&id| id != 0));
        assert!(draws(Sampling { top_p: 0.59, ..SAMPLED }, &logits).iter().all(|&id| id == 2));
        assert!(draws(Sampling { top_p: 0.61, ..SAMPLED }, &logits).contains(&1));
        assert!(draws(Sampling { min_p: 0.51, ..SAMPLED }, &logits).iter().all(|&id| id == 2));
        let some = draws(Sampling { min_p: 0.4, ..SAMPLED }, &logits);
        assert!(some.contains(&1) && !some.contains(&0));
    }

    #[test]
    fn top_p_of_many_tokens_is_that_of_all_in_order() {
        // Equal tokens, so that a share of the probability is a share of their number; the lower ids stay.
        let settings = Sampling { top_p: 0.5, ..SAMPLED };
        let kept: Vec<u32> = settings.candidates(&[1.0; 3000]).iter().map(|&(id, _)| id).collect();
        assert_eq!(kept, (0..1500).collect::<Vec<u32>>());
    }

    #[test]
    fn a_penalty_makes_what_was_said_less_likely() {
        let settings = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let logits = [3.0, 2.0, -1.0];
        assert_eq!(settings.choose(&logits, &[], 0), Some(0));
        assert_eq!(settings.choose(&logits, &[0, 0, 9], 0), Some(1));
        let mut penalized = logits;
        settings.penalize(&mut penalized, &[2, 0, 2]);
        assert_eq!(penalized, [1.5, 2.0, -2.0]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let LogProb { chosen, top } = log_probs(&one_three_six(), 1, 2);
        assert!((chosen - 0.3_f32.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [2, 1]);
        assert!((top[0].1 - 0.6_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn impossible_settings_name_their_flag() {
        let wrong = [
            (Sampling { top_p: 0.0, ..SAMPLED }, "--top-p"),
            (Sampling { temperature: -1.0, ..SAMPLED }, "--temperature"),
            (Sampling { min_p: 1.5, ..SAMPLED }, "--min-p"),
            (Sampling { repetition_penalty: 0.0, ..SAMPLED }, "--repetition-penalty"),
        ];
        for (settings, flag) in wrong {
            assert!(settings.check().unwrap_err().to_string().contains(flag));
        }
    }
}
