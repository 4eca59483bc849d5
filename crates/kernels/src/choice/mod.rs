//! The next token of each row from its logits, chosen where the logits lie.
//!
//! ```text
//! w[i] = exp((l[i] - max l) / T)          candidates: all i, then the filters in this order
//! top-k: the k greatest w        top-p: the greatest w that together have p of their sum        min-p: w ≥ min-p
//! id = the first candidate, by ids, at which the sum of w passes draw · Σ w
//! ```
//!
//! T of 0 takes the greatest logit. Of equal logits the lower ids are likelier. The order of filters is that of Hugging Face's
//! transformers. With the token comes, if it is asked for, its log-probability under `softmax(l)`, whatever T and the filters are.
//!
//! Bytes moved for v logits of a row on a device: some 70 times v elements with filters, all but the first from its cache; n times
//! 8 bytes come back, where the host would read n times v. What it refuses: penalties, which need to know what was said before.

#[cfg(feature = "cubecl")]
pub(crate) mod kernel;

use std::cmp::Ordering;

/// Candidates that are put in order at first; most filters need no more.
const FEW: usize = 128;

/// How the token of a row is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenChoice {
    /// T; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this share; 1 for all.
    pub top_p: f32,
    /// Only tokens with at least this share of the likeliest one's weight; 0 for all.
    pub min_p: f32,
    /// From 0 to below 1.
    pub draw: f32,
    /// Whether its log-probability is asked for, which on the host takes longer than the likeliest token itself.
    pub log_prob: bool,
}

impl Default for TokenChoice {
    /// The likeliest token.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, draw: 0.0, log_prob: false }
    }
}

/// A token and, if it was asked for, its log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChosenToken {
    /// The token.
    pub id: u32,
    /// ln of its share of `softmax(l)`.
    pub log_prob: Option<f32>,
}

/// The operation on the host for one row `[v]`, v at least 1; `None` if a logit is no number.
#[must_use]
pub fn choose(logits: &[f32], choice: &TokenChoice) -> Option<ChosenToken> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    let best = argmax(logits);
    let id = if choice.temperature == 0.0 { best } else { draw(logits, best, choice) };
    let log_prob = choice.log_prob.then(|| (f64::from(logits[id as usize]) - log_sum(logits, best)) as f32);
    Some(ChosenToken { id, log_prob })
}

/// ln Σ exp l, what a logit's log-probability is less than it by; `best` is the place of the greatest.
#[must_use]
pub fn log_sum(logits: &[f32], best: u32) -> f64 {
    let greatest = f64::from(logits[best as usize]);
    greatest + logits.iter().map(|&logit| (f64::from(logit) - greatest).exp()).sum::<f64>().ln()
}

/// The first of the greatest.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, place: usize| if logits[place] > logits[best] { place } else { best };
    (0..logits.len()).fold(0, better) as u32
}

fn draw(logits: &[f32], best: u32, choice: &TokenChoice) -> u32 {
    let candidates = candidates(logits, best, choice);
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    let mut left = f64::from(choice.draw) * total;
    let drawn = candidates.iter().find(|(_, weight)| {
        left -= weight;
        left < 0.0
    });
    // Rounding can leave a rest; a token of no weight is never drawn.
    drawn.or_else(|| candidates.iter().rfind(|(_, weight)| *weight > 0.0)).map_or(best, |&(id, _)| id)
}

/// Tokens that remain, by their ids, with weights relative to the likeliest.
fn candidates(logits: &[f32], best: u32, choice: &TokenChoice) -> Vec<(u32, f64)> {
    let (best, temperature) = (f64::from(logits[best as usize]), f64::from(choice.temperature));
    let weight = |logit: f32| ((f64::from(logit) - best) / temperature).exp();
    let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&logit| weight(logit))).collect();
    if choice.top_k > 0 {
        keep_likeliest(&mut all, choice.top_k);
    }
    if choice.top_p < 1.0 {
        keep_top_p(&mut all, f64::from(choice.top_p));
    }
    if choice.min_p > 0.0 {
        all.retain(|&(_, weight)| weight >= f64::from(choice.min_p));
    }
    all.sort_unstable_by_key(|&(id, _)| id);
    all
}

/// The likeliest tokens that together have the share, found among few before all are put in order.
fn keep_top_p(all: &mut Vec<(u32, f64)>, share: f64) {
    let needed = share * all.iter().map(|(_, weight)| weight).sum::<f64>();
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

/// Likelier tokens, with their weights, before less likely ones, of equals the lower id.
#[must_use]
pub fn likelier(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Leaves the k likeliest, in no order.
pub fn keep_likeliest(all: &mut Vec<(u32, f64)>, k: usize) {
    if k < all.len() {
        all.select_nth_unstable_by(k, likelier);
        all.truncate(k);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: TokenChoice =
        TokenChoice { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, draw: 0.0, log_prob: false };

    /// Ids that evenly spread draws give.
    fn draws(choice: TokenChoice, logits: &[f32]) -> Vec<u32> {
        let draw = |n: u32| choose(logits, &TokenChoice { draw: n as f32 / 1000.0, ..choice }).unwrap().id;
        (0..1000).map(draw).collect()
    }

    fn one_three_six() -> [f32; 3] {
        [1.0_f32.ln(), 3.0_f32.ln(), 6.0_f32.ln()]
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let id = |logits: &[f32]| choose(logits, &TokenChoice::default()).map(|chosen| chosen.id);
        assert_eq!(id(&[0.0, 2.0, 2.0, 1.0]), Some(1));
        assert_eq!(id(&[0.0, f32::NAN]), None);
        assert_eq!(choose(&[0.0, f32::NAN], &SAMPLED), None);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let all = draws(SAMPLED, &one_three_six());
        let count = |id: u32| all.iter().filter(|&&drawn| drawn == id).count();
        assert!(count(0).abs_diff(100) < 2 && count(1).abs_diff(300) < 2, "{} {}", count(0), count(1));
        assert!(all.is_sorted(), "by ids");
    }

    #[test]
    fn filters_leave_the_likeliest() {
        let logits = one_three_six();
        assert!(draws(TokenChoice { top_k: 2, ..SAMPLED }, &logits).iter().all(|&id| id != 0));
        assert!(draws(TokenChoice { top_p: 0.59, ..SAMPLED }, &logits).iter().all(|&id| id == 2));
        assert!(draws(TokenChoice { top_p: 0.61, ..SAMPLED }, &logits).contains(&1));
        assert!(draws(TokenChoice { min_p: 0.51, ..SAMPLED }, &logits).iter().all(|&id| id == 2));
        let some = draws(TokenChoice { min_p: 0.4, ..SAMPLED }, &logits);
        assert!(some.contains(&1) && !some.contains(&0));
    }

    #[test]
    fn top_p_of_many_tokens_is_that_of_all_in_order() {
        // Equal tokens, so that a share of the probability is a share of their number; the lower ids stay.
        let choice = TokenChoice { top_p: 0.5, ..SAMPLED };
        let kept: Vec<u32> = candidates(&[1.0; 3000], 0, &choice).iter().map(|&(id, _)| id).collect();
        assert_eq!(kept, (0..1500).collect::<Vec<u32>>());
    }

    #[test]
    fn what_has_no_weight_is_never_drawn() {
        // Far ids whose weights round to nothing stand around the likely ones.
        let mut logits = vec![-1e30_f32; 300];
        (logits[7], logits[9]) = (0.0, 0.5);
        assert!(draws(SAMPLED, &logits).iter().all(|id| [7, 9].contains(id)));
        let last = TokenChoice { draw: 1.0_f32.next_down(), ..SAMPLED };
        assert_eq!(choose(&logits, &last).unwrap().id, 9);
    }

    #[test]
    fn the_log_probability_is_that_of_the_softmax() {
        for choice in [TokenChoice::default(), TokenChoice { temperature: 0.3, top_k: 1, ..SAMPLED }] {
            let chosen = choose(&one_three_six(), &TokenChoice { log_prob: true, ..choice }).unwrap();
            assert_eq!(chosen.id, 2);
            assert!((chosen.log_prob.unwrap() - 0.6_f32.ln()).abs() < 1e-6);
            assert_eq!(choose(&one_three_six(), &choice).unwrap().log_prob, None);
        }
    }
}
