//! Which clues train and which are held out.
//!
//! A clue's side depends on its own question and on the seed, so it stays where it is when rows are added, removed or
//! reordered, and a question asked twice stands on one side. The hash is written out here and never changes:
//! std's hasher promises no stability.

use serde::{Deserialize, Serialize};

use crate::{Clue, DataError, Date};

/// How to hold clues out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Everything trains.
    #[default]
    None,
    /// About a fraction of all questions is held out, chosen by a hash of the question.
    Hash {
        /// From 0 up to, but not including, 1.
        fraction: f64,
        /// Another seed holds out other questions.
        seed: u64,
    },
    /// Clues aired on the date or later are held out, as one would meet the future.
    AirDate {
        /// First date of the held-out clues.
        from: Date,
    },
}

/// Training and evaluation clues, each in the order they came.
///
/// # Errors
/// If the fraction is out of range, a clue has no date where one is needed, or a side is empty that should not be: the
/// training side always, the evaluation side when splitting by date.
pub fn split(clues: Vec<Clue>, how: &Split) -> Result<(Vec<Clue>, Vec<Clue>), DataError> {
    let total = clues.len();
    let (train, eval): (Vec<Clue>, Vec<Clue>) = match *how {
        Split::None => return Ok((clues, Vec::new())),
        Split::Hash { fraction, seed } => {
            if !(0.0..1.0).contains(&fraction) {
                return Err(DataError::BadFraction(fraction));
            }
            clues.into_iter().partition(|clue| unit(question_hash(&clue.question, seed)) >= fraction)
        }
        Split::AirDate { from } => {
            if let Some(undated) = clues.iter().find(|clue| clue.air_date.is_none()) {
                return Err(DataError::NoDate { row: undated.row });
            }
            clues.into_iter().partition(|clue| clue.air_date.is_some_and(|date| date < from))
        }
    };
    let empty = |side| Err(DataError::EmptySplit { side, clues: total });
    if train.is_empty() {
        return empty("training");
    }
    if eval.is_empty() && matches!(how, Split::AirDate { .. }) {
        return empty("evaluation");
    }
    Ok((train, eval))
}

/// FNV-1a over the question's letters and digits in lower case, then the finaliser of MurmurHash3.
///
/// <http://www.isthe.com/chongo/tech/comp/fnv/>; the finaliser spreads FNV's weak high bits.
fn question_hash(question: &str, seed: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ finalise(seed);
    let mut buffer = [0; 4];
    for c in question.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase) {
        for byte in c.encode_utf8(&mut buffer).bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    finalise(hash)
}

fn finalise(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// The upper 53 bits as a number from 0 up to 1.
fn unit(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clue(row: u32) -> Clue {
        Clue {
            row,
            category: String::new(),
            question: format!("Clue number {row} of some length"),
            answer: "x".into(),
            air_date: Date::new(2000 + (row % 10) as u16, 1, 1),
            round: None,
            value: None,
        }
    }

    fn rows(clues: &[Clue]) -> Vec<u32> {
        clues.iter().map(|clue| clue.row).collect()
    }

    #[test]
    fn the_hash_is_pinned() {
        assert_eq!(question_hash("Some Clue!", 0), question_hash(" some clue", 0));
        assert_eq!(question_hash("", 0), finalise(0xcbf2_9ce4_8422_2325));
        assert_eq!(finalise(1), 0xb456_bcfc_34c2_cb2c);
        assert_ne!(question_hash("some clue", 0), question_hash("some clue", 1));
    }

    #[test]
    fn a_clue_keeps_its_side_whatever_else_is_there() {
        let how = Split::Hash { fraction: 0.2, seed: 7 };
        let (_, eval) = split((1..=5000).map(clue).collect(), &how).unwrap();
        let (_, eval_more) = split((1..=6000).rev().map(clue).collect(), &how).unwrap();
        let mut kept = rows(&eval_more);
        kept.retain(|&row| row <= 5000);
        kept.reverse();
        assert_eq!(rows(&eval), kept);
        assert!((900..1100).contains(&eval.len()), "{}", eval.len());
    }

    #[test]
    fn dates_split_before_and_from() {
        let from = Date::new(2008, 1, 1).unwrap();
        let (train, eval) = split((0..100).map(clue).collect(), &Split::AirDate { from }).unwrap();
        assert_eq!((train.len(), eval.len()), (80, 20));
        assert!(eval.iter().all(|clue| clue.air_date >= Some(from)));
    }

    #[test]
    fn what_cannot_be_split_is_an_error() {
        let mut undated = clue(3);
        undated.air_date = None;
        let from = Date::new(2008, 1, 1).unwrap();
        let error = split(vec![clue(1), undated], &Split::AirDate { from }).unwrap_err();
        assert!(error.to_string().contains("row 3"), "{error}");
        for fraction in [-0.1, 1.0, f64::NAN] {
            assert!(split(vec![clue(1)], &Split::Hash { fraction, seed: 0 }).is_err());
        }
        let late = Date::new(2100, 1, 1).unwrap();
        assert!(split(vec![clue(1)], &Split::AirDate { from: late }).is_err());
        assert_eq!(split(vec![clue(1)], &Split::None).unwrap().0.len(), 1);
    }
}
