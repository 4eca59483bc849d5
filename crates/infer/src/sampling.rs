//! The next token from the logits, on the host.
//!
//! Order of the filters, as in Hugging Face's transformers: temperature, top-k, top-p. Ties go to the lower id, so
//! greedy decoding is the same everywhere.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::InferError;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 takes the likeliest token; higher is more random.
    pub temperature: f64,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Another seed, another choice.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
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
        Ok(())
    }
}

/// Chooses the tokens of one row.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Sampling,
    generator: ChaCha8Rng,
}

impl Sampler {
    /// A sampler for row `stream`; rows of one seed draw independently, whatever batch they are in.
    #[must_use]
    pub fn new(settings: Sampling, stream: u64) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(settings.seed);
        generator.set_stream(stream);
        Self { settings, generator }
    }

    /// The next token, or `None` if a logit is NaN. `logits` is `[v]`.
    pub fn next(&mut self, logits: &[f32]) -> Option<u32> {
        if logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        if self.settings.temperature == 0.0 {
            return Some(argmax(logits));
        }
        let candidates = self.candidates(logits);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let unit = (self.generator.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let mut left = unit * total;
        for &(id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Some(id);
            }
        }
        candidates.last().map(|&(id, _)| id)
    }

    /// Tokens that remain, likeliest first, with weights relative to the first.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let best = f64::from(logits[argmax(logits) as usize]);
        let weight = |logit: f32| ((f64::from(logit) - best) / self.settings.temperature).exp();
        let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&logit| weight(logit))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.settings.top_k > 0 {
            all.truncate(self.settings.top_k);
        }
        let needed = self.settings.top_p * all.iter().map(|(_, weight)| weight).sum::<f64>();
        let mut sum = 0.0;
        let enough = all.iter().position(|(_, weight)| {
            sum += weight;
            sum >= needed
        });
        all.truncate(enough.map_or(all.len(), |place| place + 1));
        all
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, place: usize| if logits[place] > logits[best] { place } else { best };
    (0..logits.len()).fold(0, better) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(settings: Sampling, logits: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(settings, 0);
        (0..2000).map(|_| sampler.next(logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(Sampler::new(Sampling::default(), 0).next(&[0.0, 2.0, 2.0, 1.0]), Some(1));
        assert_eq!(Sampler::new(Sampling::default(), 0).next(&[0.0, f32::NAN]), None);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1.0_f32.ln(), 3.0_f32.ln(), 6.0_f32.ln()];
        let settings = Sampling { temperature: 1.0, ..Sampling::default() };
        let all = draws(settings, &logits);
        let share = |id: u32| all.iter().filter(|&&drawn| drawn == id).count() as f64 / all.len() as f64;
        assert!(
            (share(0) - 0.1).abs() < 0.03 && (share(1) - 0.3).abs() < 0.04 && (share(2) - 0.6).abs() < 0.04
        );
        assert_eq!(all, draws(settings, &logits));
        assert_ne!(all, draws(Sampling { seed: 1, ..settings }, &logits));
    }

    #[test]
    fn filters_leave_the_likeliest() {
        let logits = [1.0_f32.ln(), 3.0_f32.ln(), 6.0_f32.ln()];
        let settings = Sampling { temperature: 1.0, ..Sampling::default() };
        assert!(draws(Sampling { top_k: 2, ..settings }, &logits).iter().all(|&id| id != 0));
        assert!(draws(Sampling { top_p: 0.59, ..settings }, &logits).iter().all(|&id| id == 2));
        assert!(draws(Sampling { top_p: 0.61, ..settings }, &logits).contains(&1));
    }

    #[test]
    fn impossible_settings_name_their_flag() {
        let settings = Sampling { top_p: 0.0, ..Sampling::default() };
        assert!(settings.check().unwrap_err().to_string().contains("--top-p"));
        let settings = Sampling { temperature: -1.0, ..Sampling::default() };
        assert!(settings.check().unwrap_err().to_string().contains("--temperature"));
    }
}
