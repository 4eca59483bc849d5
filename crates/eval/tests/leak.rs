//! The leak check on planted copies: 100 word for word, 100 nearly so, among invented clues and among real ones.
//!
//! A near copy is made in one of six ways, or in several at once (see [`near_copy`]). The real files are read where they
//! lie beside the repository, and skipped with a line where they do not.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::PathBuf;
use std::time::Instant;

use buzzer_data::{Clue, ReadOptions, clean, read_clues};
use buzzer_eval::{ClueText, Leak, LeakKind, LeakOptions, find_leaks};

const PLANTED: usize = 100;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        (1..list.len()).rev().for_each(|end| list.swap(end, self.below(end + 1)));
    }
}

type Pair = (String, String);

/// The question with a few words put for others, parts in another order, other punctuation and case, wrong letters,
/// words left out, words put in, or two words changed and one letter wrong and the parts swapped.
fn near_copy(question: &str, kind: usize, other_words: &[String], random: &mut Random) -> String {
    let mut words: Vec<String> = question.split_whitespace().map(str::to_owned).collect();
    let few = (words.len() / 6).clamp(1, 3);
    match kind {
        0 => (0..few).for_each(|_| change_word(&mut words, other_words, random)),
        1 => swap_parts(&mut words, random),
        2 => words.iter_mut().for_each(|word| *word = format!("{},", word.to_uppercase())),
        3 => (0..few).for_each(|_| wrong_letter(&mut words, random)),
        4 if words.len() > 4 => (0..few).for_each(|_| drop(words.remove(random.below(words.len())))),
        5 => (0..few).for_each(|_| words.insert(random.below(words.len()), random.pick(other_words).clone())),
        _ => {
            (0..2).for_each(|_| change_word(&mut words, other_words, random));
            wrong_letter(&mut words, random);
            swap_parts(&mut words, random);
        }
    }
    words.join(" ")
}

fn change_word(words: &mut [String], other_words: &[String], random: &mut Random) {
    words[random.below(words.len())] = random.pick(other_words).clone();
}

fn swap_parts(words: &mut [String], random: &mut Random) {
    words.rotate_left(1 + random.below((words.len() - 1).max(1)) % words.len());
}

fn wrong_letter(words: &mut [String], random: &mut Random) {
    let word = &mut words[random.below(words.len())];
    let mut letters: Vec<char> = word.chars().collect();
    let (place, letter) = (random.below(letters.len()), *random.pick(&['a', 'e', 'n', 'r', 't']));
    letters[place] = letter;
    *word = letters.into_iter().collect();
}

/// Holds out `held_out` of the clues, plants copies of the first among the rest, and checks.
struct Planted {
    leaks: Vec<Option<Leak>>,
    seconds: f64,
}

impl Planted {
    fn check(mut clues: Vec<Pair>, held_out: usize) -> Self {
        let mut random = Random(7);
        random.shuffle(&mut clues);
        let mut train = clues.split_off(held_out);
        let other_words: Vec<String> = train
            .iter()
            .take(5000)
            .flat_map(|(question, _)| question.split_whitespace())
            .map(str::to_owned)
            .collect();
        let copies: Vec<Pair> = clues.iter().take(2 * PLANTED).cloned().collect();
        for (place, (question, answer)) in copies.into_iter().enumerate() {
            let copy = if place < PLANTED {
                question
            } else {
                near_copy(&question, place % 7, &other_words, &mut random)
            };
            train.insert(random.below(train.len()), (copy, answer));
        }
        let (eval, train) = (views(&clues), views(&train));
        let started = Instant::now();
        let leaks = find_leaks(&eval, &train, &LeakOptions::default());
        Self { leaks, seconds: started.elapsed().as_secs_f64() }
    }

    fn exact(&self) -> usize {
        let exact = |leak: &&Leak| leak.kind == LeakKind::Exact;
        self.leaks[..PLANTED].iter().flatten().filter(exact).count()
    }

    fn near(&self) -> usize {
        self.leaks[PLANTED..2 * PLANTED].iter().flatten().count()
    }

    /// Leaks among the clues of which nothing was planted, as a share.
    fn alarms(&self) -> f64 {
        let rest = &self.leaks[2 * PLANTED..];
        rest.iter().flatten().count() as f64 / rest.len() as f64
    }

    fn report(&self, name: &str) {
        println!(
            "{name}: {} of {PLANTED} exact and {} of {PLANTED} near copies found, {:.2} % of {} others flagged, {:.2} s",
            self.exact(),
            self.near(),
            100.0 * self.alarms(),
            self.leaks.len() - 2 * PLANTED,
            self.seconds
        );
    }
}

fn views(pairs: &[Pair]) -> Vec<ClueText<'_>> {
    pairs.iter().map(|(question, answer)| ClueText { question, answer }).collect()
}

/// Invented clues: words of a made-up language, the common ones far more often than the rare.
fn invented(count: usize) -> Vec<Pair> {
    let mut random = Random(1);
    let syllables = ["ba", "ne", "ti", "ko", "lu", "ras", "men", "vil", "tor", "shi", "gan", "pel"];
    let lexicon: Vec<String> =
        (0..4000).map(|_| (0..1 + random.below(4)).map(|_| *random.pick(&syllables)).collect()).collect();
    let word = |random: &mut Random| {
        let rank =
            random.below(lexicon.len()).min(random.below(lexicon.len())).min(random.below(lexicon.len()));
        lexicon[rank].clone()
    };
    let phrase =
        |random: &mut Random, len: usize| (0..len).map(|_| word(random)).collect::<Vec<_>>().join(" ");
    (0..count)
        .map(|_| {
            let len = 6 + random.below(15);
            (phrase(&mut random, len), phrase(&mut random, 2))
        })
        .collect()
}

fn real(name: &str) -> Option<Vec<Pair>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(name);
    if !path.exists() {
        println!("skipped: {} is not here", path.display());
        return None;
    }
    let cleaned = clean(read_clues(&path, &ReadOptions::default()).unwrap());
    Some(cleaned.clues.into_iter().map(|Clue { question, answer, .. }| (question, answer)).collect())
}

#[test]
fn planted_copies_among_invented_clues() {
    let planted = Planted::check(invented(6000), 1000);
    planted.report("invented");
    assert_eq!(planted.exact(), PLANTED);
    assert!(planted.near() >= 95);
    assert!(planted.alarms() < 0.001);
}

#[test]
fn planted_copies_among_20_000_real_clues() {
    let Some(clues) = real("jeopardy_20k.csv") else { return };
    let planted = Planted::check(clues, 2000);
    planted.report("jeopardy_20k.csv");
    assert_eq!(planted.exact(), PLANTED);
    assert!(planted.near() >= 90);
    assert!(planted.alarms() <= 0.01);
}

#[test]
fn a_full_size_file_takes_seconds() {
    let Some(clues) = real("jeopardy_216930.csv") else { return };
    let planted = Planted::check(clues, 2000);
    planted.report("jeopardy_216930.csv");
    assert_eq!(planted.exact(), PLANTED);
    assert!(planted.near() >= 90);
    assert!(planted.seconds < 20.0);
}
