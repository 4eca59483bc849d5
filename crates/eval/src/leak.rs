//! The leak check: which evaluation clues also stand among the training clues, word for word or nearly.
//!
//! A clue is known by its question's character shingles: the question in lower case, apostrophes left out, every other
//! mark a space; each word with a space before and behind; all runs of four characters of that (a shorter word is one
//! shingle itself). Shingles do not reach across words, so the order of words does not count, and one wrong letter
//! touches at most four of them. Rare shingles weigh more: w = 1 + ln((1 + n) / df), where df of the n clues of both
//! sides hold it. The similarity of two questions is their weighted Jaccard index, the weight of the shingles in both over
//! that of the shingles in either, 0 to 1.
//!
//! Two answers agree if they are equal once normalised or their shingles, each of weight 1, have a Jaccard index of at
//! least 0.4. Then a pair of clues is
//!
//! - **exact** if the questions have the same words in the same order and the answers agree;
//! - **near** if the similarity is at least [`LeakOptions::near_same_answer`] and the answers agree, or at least
//!   [`LeakOptions::near`] whatever they are.
//!
//! The condition on answers is there because clues follow patterns: "the largest lake in" some land and "the largest city
//! in" it share most of their letters and are no copies.
//!
//! What it trades: shingles are kept as 22-bit hashes, so that tables are arrays; two that share a slot count as one.
//! What it refuses: to miss a pair. Every training clue is looked at, and a pair is left out only where arithmetic forbids
//! that it reaches the threshold (prefix filtering, Chaudhuri, Ganti and Kaushik, 2006). A clue put in other words
//! altogether is no leak in its eyes.

use std::cmp::Ordering as CmpOrdering;
use std::sync::atomic::{AtomicU32, Ordering};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::normalize::normalize;

/// Bits of a shingle's hash.
const SLOT_BITS: u32 = 22;
/// Characters of a shingle.
const SHINGLE: usize = 4;
/// Jaccard index of the shingles of two answers that agree.
const SAME_ANSWER: f64 = 0.4;

/// A clue as the check sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClueText<'a> {
    /// The clue's text.
    pub question: &'a str,
    /// Its answer.
    pub answer: &'a str,
}

/// From which similarity on two clues are near, above 0 and up to 1; the lower of the two holds where answers agree.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeakOptions {
    /// Whatever the answers are.
    pub near: f64,
    /// Where the answers agree.
    pub near_same_answer: f64,
}

impl Default for LeakOptions {
    fn default() -> Self {
        Self { near: 0.65, near_same_answer: 0.45 }
    }
}

/// How an evaluation clue stands in the training clues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeakKind {
    /// Word for word, with the same answer.
    Exact,
    /// Nearly.
    Near,
}

/// The closest training clue of a leaked evaluation clue.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Leak {
    /// Exact or near.
    pub kind: LeakKind,
    /// Place of the training clue, from 0; the first of those equally close.
    pub train: usize,
    /// Similarity of the questions; 1 where they are exact.
    pub similarity: f64,
}

impl Leak {
    fn beats(&self, other: &Self) -> bool {
        let order = other.kind.cmp(&self.kind).then(self.similarity.total_cmp(&other.similarity));
        order.then(other.train.cmp(&self.train)).is_gt()
    }
}

/// The closest leak of every evaluation clue, in their order; `None` where there is none.
///
/// A question without a letter or digit never leaks. Works on all cores.
#[must_use]
pub fn find_leaks(eval: &[ClueText<'_>], train: &[ClueText<'_>], options: &LeakOptions) -> Vec<Option<Leak>> {
    let weights = Weights::of(eval, train);
    let check = Check::new(eval, &weights, *options);
    train
        .par_iter()
        .enumerate()
        .fold(
            || Found::new(eval.len()),
            |mut found, (place, clue)| {
                check.probe(place, clue, &mut found);
                found
            },
        )
        .map(|found| found.best)
        .reduce(|| vec![None; eval.len()], closest_of)
}

/// Of two findings for each clue, the closer.
fn closest_of(a: Vec<Option<Leak>>, b: Vec<Option<Leak>>) -> Vec<Option<Leak>> {
    a.into_iter().zip(b).map(|(a, b)| closer(a, b)).collect()
}

fn closer(a: Option<Leak>, b: Option<Leak>) -> Option<Leak> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.beats(&a) { b } else { a }),
        (a, b) => a.or(b),
    }
}

/// The question's words with one space between them.
fn words(question: &str) -> String {
    let mut out = String::with_capacity(question.len() + 2);
    for c in question.chars().flat_map(char::to_lowercase) {
        if c.is_alphanumeric() {
            out.push(c);
        } else if !matches!(c, '\'' | '’' | '‘') && !out.ends_with(' ') && !out.is_empty() {
            out.push(' ');
        }
    }
    out.truncate(out.trim_end().len());
    out
}

/// The slots of a question's shingles, each once, in ascending order.
fn shingles(words: &str) -> Vec<u32> {
    let mut slots = Vec::with_capacity(words.len() + 2);
    let mut padded = Vec::new();
    for word in words.split(' ').filter(|word| !word.is_empty()) {
        padded.clear();
        padded.push(' ');
        padded.extend(word.chars());
        padded.push(' ');
        slots.extend(padded.windows(SHINGLE.min(padded.len())).map(slot));
    }
    slots.sort_unstable();
    slots.dedup();
    slots
}

/// FNV-1a over the characters, its high bits folded onto the low ones.
fn slot(shingle: &[char]) -> u32 {
    let step = |hash: u64, &c: &char| (hash ^ u64::from(c)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = shingle.iter().fold(0xcbf2_9ce4_8422_2325, step);
    ((hash ^ (hash >> SLOT_BITS) ^ (hash >> (2 * SLOT_BITS))) & ((1 << SLOT_BITS) - 1)) as u32
}

/// The weight of every slot.
struct Weights(Vec<f64>);

impl Weights {
    fn of(eval: &[ClueText<'_>], train: &[ClueText<'_>]) -> Self {
        let counts: Vec<AtomicU32> = (0..1 << SLOT_BITS).map(|_| AtomicU32::new(0)).collect();
        let count = |clue: &ClueText<'_>| {
            for slot in shingles(&words(clue.question)) {
                counts[slot as usize].fetch_add(1, Ordering::Relaxed);
            }
        };
        eval.par_iter().for_each(count);
        train.par_iter().for_each(count);
        let all = (1 + eval.len() + train.len()) as f64;
        let weight = |count: AtomicU32| match count.into_inner() {
            0 => 0.0,
            held => 1.0 + (all / f64::from(held)).ln(),
        };
        Self(counts.into_iter().map(weight).collect())
    }

    fn get(&self, slot: u32) -> f64 {
        self.0[slot as usize]
    }

    fn sum(&self, slots: &[u32]) -> f64 {
        slots.iter().map(|&slot| self.get(slot)).sum()
    }
}

/// An evaluation clue, taken apart.
struct Held<'a> {
    words: String,
    answer: &'a str,
    slots: Vec<u32>,
    weight: f64,
}

/// The evaluation clues, and which of them hold a slot.
struct Check<'a> {
    held: Vec<Held<'a>>,
    /// Where the clues of slot s begin in `holders`; one more than there are slots.
    starts: Vec<u32>,
    holders: Vec<u32>,
    weights: &'a Weights,
    options: LeakOptions,
    /// The lower of the two thresholds.
    least: f64,
}

/// What one thread has found, and its scratch.
struct Found {
    best: Vec<Option<Leak>>,
    /// Weight shared so far with each evaluation clue; all zero between training clues.
    shared: Vec<f64>,
    touched: Vec<u32>,
}

impl Found {
    fn new(clues: usize) -> Self {
        Self { best: vec![None; clues], shared: vec![0.0; clues], touched: Vec::new() }
    }
}

impl<'a> Check<'a> {
    fn new(eval: &[ClueText<'a>], weights: &'a Weights, options: LeakOptions) -> Self {
        let take = |clue: &ClueText<'a>| {
            let words = words(clue.question);
            let slots = shingles(&words);
            Held { weight: weights.sum(&slots), answer: clue.answer, words, slots }
        };
        let held: Vec<Held<'a>> = eval.par_iter().map(take).collect();
        let mut starts = vec![0_u32; (1 << SLOT_BITS) + 1];
        held.iter().flat_map(|clue| &clue.slots).for_each(|&slot| starts[slot as usize + 1] += 1);
        for slot in 1..starts.len() {
            starts[slot] += starts[slot - 1];
        }
        let mut ends = starts.clone();
        let mut holders = vec![0; starts[starts.len() - 1] as usize];
        for (place, clue) in (0..).zip(&held) {
            for &slot in &clue.slots {
                holders[ends[slot as usize] as usize] = place;
                ends[slot as usize] += 1;
            }
        }
        let least = options.near.min(options.near_same_answer);
        Self { held, starts, holders, weights, options, least }
    }

    fn holders(&self, slot: u32) -> &[u32] {
        let [start, end] = [slot, slot + 1].map(|slot| self.starts[slot as usize] as usize);
        &self.holders[start..end]
    }

    /// Compares one training clue with every evaluation clue that may be near.
    fn probe(&self, place: usize, clue: &ClueText<'_>, found: &mut Found) {
        let words = words(clue.question);
        let slots = shingles(&words);
        let weight = self.weights.sum(&slots);
        let left_over = self.share_rarest(&slots, weight, found);
        for held in found.touched.drain(..) {
            let shared = std::mem::take(&mut found.shared[held as usize]);
            let held_weight = self.held[held as usize].weight;
            let most = (shared + left_over).min(held_weight);
            if most < self.least * ROUNDING * (weight + held_weight - most) {
                continue;
            }
            let pair = self.compare(&self.held[held as usize], clue, &words, &slots);
            let leak = pair.map(|(kind, similarity)| Leak { kind, train: place, similarity });
            let best = &mut found.best[held as usize];
            *best = closer(*best, leak);
        }
    }

    /// Adds up what each evaluation clue shares of the rarest shingles, and returns the weight of those not looked at.
    ///
    /// It stops where these weigh less than the threshold times the whole: a clue that shares nothing else cannot
    /// reach it.
    fn share_rarest(&self, slots: &[u32], weight: f64, found: &mut Found) -> f64 {
        let mut rarest_first = slots.to_vec();
        rarest_first.sort_unstable_by(|&a, &b| self.weights.get(b).total_cmp(&self.weights.get(a)));
        let mut left_over = weight;
        for slot in rarest_first {
            if left_over < self.least * weight * ROUNDING {
                break;
            }
            let weight = self.weights.get(slot);
            left_over -= weight;
            for &held in self.holders(slot) {
                let shared = &mut found.shared[held as usize];
                if *shared == 0.0 {
                    found.touched.push(held);
                }
                *shared += weight;
            }
        }
        left_over
    }

    fn compare(
        &self,
        held: &Held<'_>,
        clue: &ClueText<'_>,
        words: &str,
        slots: &[u32],
    ) -> Option<(LeakKind, f64)> {
        let similarity = similarity(&held.slots, slots, self.weights);
        if similarity < self.least {
            return None;
        }
        let agree = answers_agree(held.answer, clue.answer);
        let kind = if agree && held.words == words { LeakKind::Exact } else { LeakKind::Near };
        (agree || similarity >= self.options.near).then_some((kind, similarity))
    }
}

/// Bounds are taken a little lower, because sums in another order differ in their last bits.
const ROUNDING: f64 = 1.0 - 1e-9;

/// The weighted Jaccard index of two ascending lists of slots.
fn similarity(a: &[u32], b: &[u32], weights: &Weights) -> f64 {
    let (mut shared, mut all) = (0.0, 0.0);
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        let order = match (a.get(i), b.get(j)) {
            (Some(a), Some(b)) => a.cmp(b),
            (Some(_), None) => CmpOrdering::Less,
            _ => CmpOrdering::Greater,
        };
        let weight = weights.get(if order.is_gt() { b[j] } else { a[i] });
        all += weight;
        shared += if order.is_eq() { weight } else { 0.0 };
        i += usize::from(order.is_le());
        j += usize::from(order.is_ge());
    }
    if all > 0.0 { shared / all } else { 0.0 }
}

/// Whether two answers are equal once normalised, or share enough of their shingles, each of one weight.
fn answers_agree(a: &str, b: &str) -> bool {
    let [a, b] = [a, b].map(normalize);
    if a == b {
        return true;
    }
    let [a, b] = [a, b].map(|answer| shingles(&words(&answer)));
    let shared = a.iter().filter(|slot| b.binary_search(slot).is_ok()).count();
    shared as f64 >= SAME_ANSWER * (a.len() + b.len() - shared) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn clue<'a>(question: &'a str, answer: &'a str) -> ClueText<'a> {
        ClueText { question, answer }
    }

    #[test]
    fn words_and_shingles() {
        assert_eq!(words("  \"It’s\" Rock-a-bye,  O'Neil!? "), "its rock a bye oneil");
        assert_eq!(words("?!"), "");
        assert_eq!(shingles("a").len(), 1);
        assert_eq!(shingles("tin").len(), 2);
        assert_eq!(shingles("tin tin").len(), 2);
        assert_eq!(shingles("blue sea"), shingles("sea blue"));
        assert!(shingles("").is_empty());
        assert_ne!(shingles("blue"), shingles("glue"));
    }

    #[test]
    fn exact_near_and_neither() {
        let train = [
            clue("This grey metal melts at 232 degrees Celsius and lines many cans", "tin"),
            clue("The Golden Lantern inn stands on this windy island", "Borrow"),
            clue("A lantern, a golden lantern", "inn sign"),
            clue("Ann Other", "her brother"),
            clue("?!", "nothing"),
        ];
        let eval = [
            clue("this GREY metal melts at 232 degrees celsius & and lines many cans!", "Tin"),
            clue("On this windy island the Golden Lantern stands", "the Borrow"),
            clue("It orbits the sun every 88 days", "Mercury"),
            clue("Ann Other", "Borrow's mayor"),
            clue("?!", "nothing"),
            clue("Lines many grey cans", "zinc"),
        ];
        let leaks = find_leaks(&eval, &train, &LeakOptions::default());
        let short: Vec<_> = leaks.iter().map(|leak| leak.map(|leak| (leak.kind, leak.train))).collect();
        let expected = [
            Some((LeakKind::Exact, 0)),
            Some((LeakKind::Near, 1)),
            None,
            Some((LeakKind::Near, 3)),
            None,
            None,
        ];
        assert_eq!(short, expected);
        assert!((leaks[3].unwrap().similarity - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_closest_and_first_is_named() {
        let eval = [clue("the dark blue sea of Borrow", "Borrow")];
        let train = [
            clue("the dark blue sea of old Borrow", "Borrow"),
            clue("sea of Borrow, the dark blue", "Borrow"),
            clue("The dark, blue sea of Borrow", "Borrow"),
            clue("the dark blue sea of Borrow", "Borrow"),
        ];
        let leak = find_leaks(&eval, &train, &LeakOptions::default())[0].unwrap();
        assert_eq!((leak.kind, leak.train), (LeakKind::Exact, 2));
        let leak = find_leaks(&eval, &train[..2], &LeakOptions::default())[0].unwrap();
        assert_eq!((leak.kind, leak.train), (LeakKind::Near, 1));
    }

    #[test]
    fn nothing_to_compare_is_no_leak() {
        let one = [clue("the dark blue sea", "x")];
        assert!(find_leaks(&[], &one, &LeakOptions::default()).is_empty());
        assert_eq!(find_leaks(&one, &[], &LeakOptions::default()), [None]);
    }

    /// Sentences of few words, so that many pairs are alike to every degree.
    fn sentences(random: &mut Random, count: usize) -> Vec<(String, String)> {
        let word = |random: &mut Random| {
            let syllables = ["ka", "lo", "mi", "ru", "ten", "sol"];
            (0..1 + random.below(3)).map(|_| syllables[random.below(6)]).collect::<String>()
        };
        let sentence = |random: &mut Random, words: usize| {
            (0..words).map(|_| word(random)).collect::<Vec<_>>().join(" ")
        };
        (0..count)
            .map(|_| {
                let words = 2 + random.below(6);
                (sentence(random, words), word(random))
            })
            .collect()
    }

    #[test]
    fn no_pair_is_missed_by_the_index() {
        let mut random = Random::new(5);
        let [eval, mut train] = [60, 400].map(|count| sentences(&mut random, count));
        let reversed = |(question, answer): &(String, String)| {
            (question.split(' ').rev().collect::<Vec<_>>().join(" "), answer.clone())
        };
        train.extend(eval.iter().take(10).map(reversed));
        let [eval, train] =
            [&eval, &train].map(|pairs| pairs.iter().map(|(q, a)| clue(q, a)).collect::<Vec<_>>());
        for (near, near_same_answer) in [(0.65, 0.45), (0.3, 0.2), (0.9, 0.9)] {
            let options = LeakOptions { near, near_same_answer };
            let weights = Weights::of(&eval, &train);
            let pair = |held: &ClueText<'_>, clue: &ClueText<'_>| {
                let [a, b] = [held, clue].map(|text| words(text.question));
                let similarity = similarity(&shingles(&a), &shingles(&b), &weights);
                let agree = answers_agree(held.answer, clue.answer);
                let kind = if agree && a == b { LeakKind::Exact } else { LeakKind::Near };
                (similarity >= if agree { near_same_answer } else { near }).then_some((kind, similarity))
            };
            let slow = |held: &ClueText<'_>| {
                let leaks = train.iter().enumerate().filter_map(|(place, clue)| {
                    pair(held, clue).map(|(kind, similarity)| Leak { kind, train: place, similarity })
                });
                leaks.fold(None, |best, leak| closer(best, Some(leak)))
            };
            let slow: Vec<Option<Leak>> = eval.iter().map(slow).collect();
            assert!(slow.iter().flatten().count() > 3);
            assert_eq!(find_leaks(&eval, &train, &options), slow);
        }
    }
}
