//! How clues are written: by a model, or by the show.
//!
//! A written clue has no right or wrong, so its style is set beside that of real clues for the same answers: length, what it points
//! with ("this river", "he"), statement or question, whether it gives its answer away, whether it is copied. What it trades: the
//! measures see words and no meaning, and a false clue in the show's style passes all of them. It refuses to make one score of them.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::forms::{alternatives, in_show_form};
use crate::interval::{Interval, bootstrap_mean, quantile, wilson};
use crate::normalize::{fold_space, normalize, plain};

/// Words with which a clue names its answer by what it is.
const THIS: [&str; 2] = ["this", "these"];
/// Words with which a clue points at its answer besides.
const PRONOUNS: [&str; 11] = ["he", "him", "his", "she", "her", "hers", "it", "its", "they", "them", "their"];

/// A clue and what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenClue<'a> {
    /// Its text.
    pub text: &'a str,
    /// The key; empty if it was written without one.
    pub answer: &'a str,
}

/// Clues that were there before, to find copies of; case, punctuation and spacing do not count.
#[derive(Clone, Debug, Default)]
pub struct KnownClues(HashSet<String>);

impl<'a> FromIterator<&'a str> for KnownClues {
    fn from_iter<T: IntoIterator<Item = &'a str>>(texts: T) -> Self {
        Self(texts.into_iter().map(words_of).collect())
    }
}

impl KnownClues {
    /// Whether a text with any word at all is one of them.
    #[must_use]
    pub fn contains(&self, text: &str) -> bool {
        let words = words_of(text);
        !words.is_empty() && self.0.contains(&words)
    }
}

/// A share or a mean, with its 95 % interval: Wilson's, or the bootstrap's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The value.
    pub value: f64,
    /// Its interval.
    pub interval: Interval,
}

impl Measured {
    fn share(hits: usize, n: usize) -> Self {
        Self { value: hits as f64 / n.max(1) as f64, interval: wilson(hits, n) }
    }

    fn mean(values: &[f64]) -> Self {
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        Self { value: mean, interval: bootstrap_mean(values) }
    }
}

/// The style of some clues.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClueStyle {
    /// Clues.
    pub n: usize,
    /// Words, on average.
    pub words: Measured,
    /// Their median.
    pub median_words: f64,
    /// Share with "this" or "these".
    pub this: Measured,
    /// Share with one of these or a pronoun (he, her, its ...).
    pub pointing: Measured,
    /// Share put as a question; the others are statements.
    pub questions: Measured,
    /// Share in which the whole of an accepted answer stands, among those with a key.
    pub leaking: Measured,
    /// Share that stands among known clues word for word; none where none are known.
    pub copied: Option<Measured>,
    /// Share of the clues that are left when each text is kept once.
    pub distinct: f64,
}

impl ClueStyle {
    /// The style of clues; `known` are those that the writer has seen.
    #[must_use]
    pub fn of(clues: &[WrittenClue<'_>], known: Option<&KnownClues>) -> Self {
        let n = clues.len();
        let share = |holds: &dyn Fn(&WrittenClue<'_>) -> bool| {
            Measured::share(clues.iter().filter(|clue| holds(clue)).count(), n)
        };
        let mut lengths: Vec<f64> =
            clues.iter().map(|clue| clue.text.split_whitespace().count() as f64).collect();
        let words = Measured::mean(&lengths);
        lengths.sort_unstable_by(f64::total_cmp);
        let keyed: Vec<_> = clues.iter().filter(|clue| !clue.answer.trim().is_empty()).collect();
        let leaking = keyed.iter().filter(|clue| gives_itself_away(clue)).count();
        let texts: HashSet<String> = clues.iter().map(|clue| words_of(clue.text)).collect();
        Self {
            n,
            words,
            median_words: if lengths.is_empty() { 0.0 } else { quantile(&lengths, 0.5) },
            this: share(&|clue| has_word(clue.text, &THIS)),
            pointing: share(&|clue| has_word(clue.text, &THIS) || has_word(clue.text, &PRONOUNS)),
            questions: share(&|clue| is_question(clue.text)),
            leaking: Measured::share(leaking, keyed.len()),
            copied: known.map(|known| share(&|clue| known.contains(clue.text))),
            distinct: texts.len() as f64 / n.max(1) as f64,
        }
    }
}

/// The words in lower case without punctuation, one space between them.
fn words_of(text: &str) -> String {
    fold_space(&plain(text))
}

/// An apostrophe ends a word, so that "it's" points like "it".
fn has_word(text: &str, words: &[&str]) -> bool {
    words_of(text).split(' ').any(|word| words.contains(&word))
}

/// A question mark at the end, whatever closes behind it, or the show's form of an answer.
fn is_question(text: &str) -> bool {
    let end = text.trim_end().trim_end_matches(['"', '\'', '”', '’', ')', ' ']);
    end.ends_with('?') || in_show_form(text)
}

/// Whether the words of an accepted answer stand in the clue side by side.
fn gives_itself_away(clue: &WrittenClue<'_>) -> bool {
    let text = format!(" {} ", normalize(clue.text));
    let stands = |answer: &String| {
        let answer = normalize(answer);
        !answer.is_empty() && text.contains(&format!(" {answer} "))
    };
    alternatives(clue.answer).iter().any(stands)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clue<'a>(text: &'a str, answer: &'a str) -> WrittenClue<'a> {
        WrittenClue { text, answer }
    }

    fn shares(style: &ClueStyle) -> [f64; 4] {
        [style.this, style.pointing, style.questions, style.leaking].map(|measured| measured.value)
    }

    #[test]
    fn each_measure_counts_what_it_says() {
        let clues = [
            clue("This windy island has one inn", "Borrow"),
            clue("In 1912 he sailed there; it's said twice", "Ann Other"),
            clue("Which river passes the \"Red Inn\"?", "the (Red) Brook"),
            clue("The brook of the north passes Borrow", "the (Red) Brook"),
        ];
        let style = ClueStyle::of(&clues, None);
        assert_eq!((style.n, style.copied, style.distinct), (4, None, 1.0));
        assert_eq!(shares(&style), [0.25, 0.5, 0.25, 0.25]);
        // 6, 8, 6 and 7 words.
        assert_eq!((style.words.value, style.median_words), (6.75, 6.5));
        assert!(style.words.interval.low < 6.75 && 6.75 < style.words.interval.high);
        assert_eq!(style.this.interval, wilson(1, 4));
    }

    #[test]
    fn whole_words_point_and_give_away() {
        let hidden = ["Thistles and theses", "Its inn", "A heron's shelter"];
        assert_eq!(hidden.map(|text| has_word(text, &THIS)), [false; 3]);
        assert_eq!(hidden.map(|text| has_word(text, &PRONOUNS)), [false, true, false]);
        assert!(has_word("THESE, he said", &THIS));
        assert!(!gives_itself_away(&clue("The Borrower's tale", "Borrow")));
        assert!(gives_itself_away(&clue("It's on BORROW, the isle", "\"Borrow\"")));
        // An answer of articles and marks alone is no word to find.
        assert!(!gives_itself_away(&clue("The A in the name", "A")));
    }

    #[test]
    fn questions_end_in_their_mark_or_begin_in_the_shows_form() {
        let of = |text| is_question(text);
        assert!(of("Who keeps it?") && of("He asked \"Who?\"") && of("What is tin") && of("(Where is it?)"));
        assert!(!of("It keeps the inn") && !of("\"Why?\" is its first word") && !of(""));
    }

    #[test]
    fn copies_are_found_whatever_their_marks_and_without_a_word_nothing_is_one() {
        let known: KnownClues = ["This island has one inn", "!"].into_iter().collect();
        let clues =
            [clue("this island -- has one INN!", ""), clue("This island has an inn", ""), clue("?", "")];
        let style = ClueStyle::of(&clues, Some(&known));
        assert_eq!(style.copied, Some(Measured::share(1, 3)));
        // Nothing has a key.
        assert_eq!(style.leaking, Measured::share(0, 0));
    }

    #[test]
    fn a_writer_who_repeats_himself_is_found_out_and_no_clue_has_no_style() {
        let same = [clue("It is an inn", "a"), clue("It is an inn!", "b"), clue("It is an isle", "c")];
        assert!((ClueStyle::of(&same, None).distinct - 2.0 / 3.0).abs() < 1e-12);
        let nothing = ClueStyle::of(&[], None);
        assert_eq!(
            (nothing.n, nothing.words.value, nothing.median_words, nothing.distinct),
            (0, 0.0, 0.0, 0.0)
        );
    }
}
