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
    /// Clues of the latest dates are held out: whole days, as few of them as hold the fraction.
    Latest {
        /// From 0 up to, but not including, 1.
        fraction: f64,
    },
}

/// Training and evaluation clues, each in the order they came.
///
/// # Errors
/// If the fraction is out of range, a clue has no date where one is needed, or a side is empty that should not be: the
/// training side always, the evaluation side when splitting by date.
pub fn split(clues: Vec<Clue>, how: &Split) -> Result<(Vec<Clue>, Vec<Clue>), DataError> {
    let total = clues.len();
    how.check()?;
    let how = how.with_date(&clues)?;
    let (train, eval): (Vec<Clue>, Vec<Clue>) = match how {
        Split::None | Split::Latest { .. } => return Ok((clues, Vec::new())),
        Split::Hash { fraction, seed } => {
            clues.into_iter().partition(|clue| unit(question_hash(&clue.question, seed)) >= fraction)
        }
        Split::AirDate { from } => {
            dates(&clues)?;
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

impl Split {
    /// # Errors
    /// If the fraction is out of range.
    pub fn check(&self) -> Result<(), DataError> {
        let (Self::Hash { fraction, .. } | Self::Latest { fraction }) = self else { return Ok(()) };
        if !(0.0..1.0).contains(fraction) {
            let choose = "a share from 0 up to, but not including, 1";
            return Err(DataError::Setting { flag: "--eval-fraction", found: fraction.to_string(), choose });
        }
        Ok(())
    }

    /// [`Split::Latest`] with its first date found, unless nothing is to be held out; anything else as it is.
    fn with_date(self, clues: &[Clue]) -> Result<Self, DataError> {
        let Self::Latest { fraction } = self else { return Ok(self) };
        let mut dates = dates(clues)?;
        dates.sort_unstable();
        let held_out = (fraction * dates.len() as f64).ceil() as usize;
        let first = dates.len().checked_sub(held_out).and_then(|place| dates.get(place));
        Ok(first.map_or(self, |&from| Self::AirDate { from }))
    }
}

/// The date of every clue.
fn dates(clues: &[Clue]) -> Result<Vec<Date>, DataError> {
    let dated = |clue: &Clue| clue.air_date.ok_or(DataError::NoDate { row: clue.row });
    clues.iter().map(dated).collect()
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
    fn the_latest_days_are_held_out_whole() {
        let latest = |fraction| split((0..100).map(clue).collect(), &Split::Latest { fraction });
        // Ten clues a date, from 2000-01-01 to 2009-01-01.
        for (fraction, held_out) in [(0.1, 10), (0.05, 10), (0.11, 20), (0.5, 50)] {
            let (train, eval) = latest(fraction).unwrap();
            assert_eq!((train.len(), eval.len()), (100 - held_out, held_out), "{fraction}");
            let first = eval.iter().filter_map(|clue| clue.air_date).min().unwrap();
            assert!(train.iter().all(|clue| clue.air_date < Some(first)));
        }
        assert_eq!(latest(0.0).unwrap().1.len(), 0);
        assert!(latest(0.95).is_err(), "nothing is left to train on");
        assert!(latest(1.0).is_err());
    }

    #[test]
    fn what_cannot_be_split_is_an_error() {
        let mut undated = clue(3);
        undated.air_date = None;
        let from = Date::new(2008, 1, 1).unwrap();
        let error = split(vec![clue(1), undated], &Split::AirDate { from }).unwrap_err();
        assert!(error.to_string().contains("row 3"), "{error}");
        let mut undated = clue(3);
        undated.air_date = None;
        let error = split(vec![clue(1), undated], &Split::Latest { fraction: 0.5 }).unwrap_err();
        assert!(error.to_string().contains("row 3"), "{error}");
        for fraction in [-0.1, 1.0, f64::NAN] {
            assert!(split(vec![clue(1)], &Split::Hash { fraction, seed: 0 }).is_err());
        }
        let late = Date::new(2100, 1, 1).unwrap();
        assert!(split(vec![clue(1)], &Split::AirDate { from: late }).is_err());
        assert_eq!(split(vec![clue(1)], &Split::None).unwrap().0.len(), 1);
    }
}
