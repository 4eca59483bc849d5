//! How a request's tokens are chosen from their logits.
//!
//! Order of the filters, as in Hugging Face's transformers: repetition penalty, temperature, top-k, top-p, min-p; all but the
//! penalty run where the logits lie ([`buzzer_kernels::choice`]). Ties go to the lower id, so greedy decoding is the same
//! everywhere. The n-th draw of a request is a function of its seed and n, so a request draws the same alone, in a batch,
//! and after a pause.

use buzzer_kernels::TokenChoice;
use buzzer_kernels::choice::{self, argmax, keep_likeliest, likelier, log_sum};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{InferError, LogProb};

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
        self.temperature == 0.0 && !self.penalizes()
    }

    /// Whether the choice depends on what was said before.
    pub(crate) fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// The choice of the token before which `drawn` were drawn for this request, but for the penalty.
    pub(crate) fn token_choice(&self, drawn: usize) -> TokenChoice {
        TokenChoice {
            temperature: self.temperature as f32,
            top_k: self.top_k,
            top_p: self.top_p as f32,
            min_p: self.min_p as f32,
            draw: uniform(self.seed, drawn),
            log_prob: false,
        }
    }

    /// The token after `before` (prompt and answer), of which `drawn` were drawn for this request, or `None` if a
    /// logit is NaN. `logits` is `[v]`.
    #[must_use]
    pub fn choose(&self, logits: &[f32], before: &[u32], drawn: usize) -> Option<u32> {
        let choose =
            |logits: &[f32]| choice::choose(logits, &self.token_choice(drawn)).map(|chosen| chosen.id);
        if !self.penalizes() {
            return choose(logits);
        }
        let mut logits = logits.to_vec();
        self.penalize(&mut logits, before);
        choose(&logits)
    }

    /// Once a token, however often it stands there.
    fn penalize(&self, logits: &mut [f32], before: &[u32]) {
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
}

/// The n-th number of a seed, from 0 up to 1.
fn uniform(seed: u64, n: usize) -> f32 {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_word_pos(2 * n as u128);
    (generator.next_u64() >> 40) as f32 / (1_u32 << 24) as f32
}

/// Log-probabilities of a chosen token and of the `top` likeliest.
pub(crate) fn log_probs(logits: &[f32], chosen: u32, top: usize) -> LogProb {
    let normalizer = log_sum(logits, argmax(logits));
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

    fn one_three_six() -> [f32; 3] {
        [1.0_f32.ln(), 3.0_f32.ln(), 6.0_f32.ln()]
    }

    #[test]
    fn draws_follow_seed_and_place() {
        let sampled = Sampling { temperature: 1.0, ..Sampling::default() };
        let draws = |settings: Sampling| -> Vec<u32> {
            (0..2000).map(|n| settings.choose(&one_three_six(), &[], n).unwrap()).collect()
        };
        let all = draws(sampled);
        let share = |id: u32| all.iter().filter(|&&drawn| drawn == id).count() as f64 / all.len() as f64;
        for (id, expected) in [(0, 0.1), (1, 0.3), (2, 0.6)] {
            assert!((share(id) - expected).abs() < 0.04, "{id}: {}", share(id));
        }
        assert_eq!(all, draws(sampled));
        assert_ne!(all, draws(Sampling { seed: 1, ..sampled }));
        assert_eq!(sampled.choose(&[0.0, f32::NAN], &[], 0), None);
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
            (Sampling { top_p: 0.0, ..Sampling::default() }, "--top-p"),
            (Sampling { temperature: -1.0, ..Sampling::default() }, "--temperature"),
            (Sampling { min_p: 1.5, ..Sampling::default() }, "--min-p"),
            (Sampling { repetition_penalty: 0.0, ..Sampling::default() }, "--repetition-penalty"),
        ];
        for (settings, flag) in wrong {
            assert!(settings.check().unwrap_err().to_string().contains(flag));
        }
    }
}
