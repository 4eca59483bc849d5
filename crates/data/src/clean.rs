//! Raw columns into clues worth training on, and a count of what was left out.
//!
//! Every row is either kept or counted under one reason. What it trades: a short text that stands wholly inside a link
//! is taken for the caption of a picture and dropped, which loses a few answerable clues to spare the model unanswerable
//! ones. What it refuses: to treat words as missing values. An answer of `None`, `nothing` or `NaN` is an answer; only
//! a missing or empty cell, and the exact spellings `null`, `NULL` and `\N` that databases write for one, are not.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use polars::prelude::StringChunked;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::markup::{normal_space, visible};
use crate::{Date, RawClues};

/// One clue, clean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clue {
    /// Data row of the file it came from, from 1.
    pub row: u32,
    /// Category; empty if the file has none.
    pub category: String,
    /// The clue's text.
    pub question: String,
    /// The expected answer.
    pub answer: String,
    /// Air date, if there is a readable one.
    pub air_date: Option<Date>,
    /// Round, if the file has it.
    pub round: Option<String>,
    /// Value as the file writes it, if it has one.
    pub value: Option<String>,
}

/// Why a row was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropReason {
    /// Nothing but a link, a stage direction or a caption: the clue was a picture or a sound.
    MediaOnly,
    /// No text in the question.
    EmptyQuestion,
    /// No text in the answer.
    EmptyAnswer,
    /// Question and answer are the same as an earlier row's.
    Duplicate,
    /// More tokens than a row holds; counted when packing.
    TooLong,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MediaOnly => "media_only",
            Self::EmptyQuestion => "empty_question",
            Self::EmptyAnswer => "empty_answer",
            Self::Duplicate => "duplicate",
            Self::TooLong => "too_long",
        })
    }
}

/// What became of the rows: `rows_read == rows_kept + sum of dropped`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanReport {
    /// Data rows of the file, up to the limit.
    pub rows_read: usize,
    /// Clues that remain.
    pub rows_kept: usize,
    /// Kept clues without a readable air date.
    pub rows_undated: usize,
    /// Rows left out, by reason; reasons that did not occur are absent.
    pub dropped: BTreeMap<DropReason, usize>,
}

/// Clean clues in the file's order, and the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleaned {
    /// The clues.
    pub clues: Vec<Clue>,
    /// The account.
    pub report: CleanReport,
}

/// Cleans every row, on all cores.
#[must_use]
pub fn clean(raw: RawClues) -> Cleaned {
    let rows = raw.len();
    let unwrap_quotes = questions_are_quoted(&raw.question);
    let rows_done: Vec<Result<Clue, DropReason>> =
        (0..rows).into_par_iter().map(|row| clean_row(&raw, row, unwrap_quotes)).collect();
    drop(raw);
    let mut report = CleanReport { rows_read: rows, ..CleanReport::default() };
    let first = first_of_each(&rows_done);
    let mut clues = Vec::with_capacity(rows);
    for (done, first) in rows_done.into_iter().zip(first) {
        match done {
            Ok(clue) if first => clues.push(clue),
            Ok(_) => *report.dropped.entry(DropReason::Duplicate).or_default() += 1,
            Err(reason) => *report.dropped.entry(reason).or_default() += 1,
        }
    }
    report.rows_kept = clues.len();
    report.rows_undated = clues.iter().filter(|clue| clue.air_date.is_none()).count();
    Cleaned { clues, report }
}

fn first_of_each(rows: &[Result<Clue, DropReason>]) -> Vec<bool> {
    let mut seen: HashSet<(&str, &str)> = HashSet::with_capacity(rows.len());
    let key = |row| match row {
        &Ok(Clue { ref question, ref answer, .. }) => Some((question.as_str(), answer.as_str())),
        Err(_) => None,
    };
    rows.iter().map(key).map(|key| key.is_some_and(|key| seen.insert(key))).collect()
}

/// The well-known JSON dump puts every question between single quotes. A file where nine in ten are so has them all
/// unwrapped; elsewhere a quote belongs to the clue.
fn questions_are_quoted(questions: &StringChunked) -> bool {
    let quoted = questions.iter().flatten().filter(|text| unquoted(text).is_some()).count();
    quoted >= 10 && quoted * 10 >= questions.len() * 9
}

fn unquoted(text: &str) -> Option<&str> {
    text.trim().strip_prefix('\'')?.strip_suffix('\'')
}

fn clean_row(raw: &RawClues, row: usize, unwrap_quotes: bool) -> Result<Clue, DropReason> {
    let cell = |column: &StringChunked| column.get(row).map(str::to_owned);
    let maybe = |column: &Option<StringChunked>| column.as_ref().and_then(cell);
    let question = present(raw.question.get(row)).ok_or(DropReason::EmptyQuestion)?;
    let question = if unwrap_quotes { unquoted(question).unwrap_or(question) } else { question };
    let question = visible(question);
    if is_media_only(&question.text, question.outside_links.as_deref()) {
        return Err(DropReason::MediaOnly);
    }
    if question.text.is_empty() {
        return Err(DropReason::EmptyQuestion);
    }
    let answer = present(raw.answer.get(row)).ok_or(DropReason::EmptyAnswer)?;
    let answer = visible(answer).text;
    if answer.is_empty() {
        return Err(DropReason::EmptyAnswer);
    }
    let tidy = |text: String| Some(normal_space(&text)).filter(|text| !text.is_empty());
    Ok(Clue {
        row: row as u32 + 1,
        category: maybe(&raw.category).map(|text| visible(&text).text).unwrap_or_default(),
        question: question.text,
        answer,
        air_date: raw.air_date.as_ref().and_then(|column| column.get(row)?.parse().ok()),
        round: maybe(&raw.round).and_then(tidy),
        value: maybe(&raw.value).and_then(tidy),
    })
}

fn present(cell: Option<&str>) -> Option<&str> {
    cell.filter(|text| !matches!(text.trim(), "" | "null" | "NULL" | "\\N"))
}

/// Link texts of this many words or more are the clue itself, spoken in the recording.
const SPOKEN_WORDS: usize = 6;

/// What a bracketed text says when it stands for a picture or a sound.
const DIRECTIONS: &[&str] = &[
    "audio",
    "video",
    "filler",
    "seen here",
    "heard here",
    "shown here",
    "pictured here",
    "clue missing",
    "monitor",
];

fn is_media_only(text: &str, outside_links: Option<&str>) -> bool {
    let says_something = |text: &str| without_brackets(text).chars().any(char::is_alphanumeric);
    match outside_links {
        Some(outside) => {
            let words = without_brackets(text).split_whitespace().count();
            !says_something(outside) && words < SPOKEN_WORDS
        }
        None if text.contains(['(', '[']) && !says_something(text) => {
            let lower = text.to_lowercase();
            DIRECTIONS.iter().any(|direction| lower.contains(direction))
        }
        None => false,
    }
}

/// The text less what stands between brackets. A bracket that is never closed encloses nothing.
fn without_brackets(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut opened = Vec::new();
    for c in text.chars() {
        match c {
            '(' | '[' => {
                opened.push(out.len());
                out.push(c);
            }
            ')' | ']' => out.truncate(opened.pop().unwrap_or(out.len())),
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn media(cell: &str) -> bool {
        let seen = visible(cell);
        is_media_only(&seen.text, seen.outside_links.as_deref())
    }

    #[test]
    fn media_only_clues_are_told_from_bracketed_ones() {
        for cell in [
            "[audio clue]",
            "(Seen here)",
            "<a href=x.jpg>[video clue]</a>",
            "<a href=x.jpg>On a map</a>",
            "<a href=x.jpg></a>",
            "<a href=x.jpg>On a chart</a> (take your time)",
        ] {
            assert!(media(cell), "{cell}");
        }
        for cell in [
            "(Maker of a cereal)",
            "(\"Some Song\")",
            "<a href=x.mp3>A long text that the host spoke in the recording</a>",
            "This <a href=x.jpg>bird</a> cannot fly",
            "(Sam of the crew stands by a lake.) It is the deepest",
            "(Sam of the crew points at the monitor. This lake is the deepest",
            "video killed the radio star",
            "?",
        ] {
            assert!(!media(cell), "{cell}");
        }
    }

    #[test]
    fn words_for_nothing_are_answers() {
        for text in ["None", "none", "nothing", "NaN", "n/a", "Null Island", "0"] {
            assert_eq!(present(Some(text)), Some(text));
        }
        for text in ["", "  ", "null", " NULL ", "\\N"] {
            assert_eq!(present(Some(text)), None);
        }
        assert_eq!(present(None), None);
    }

    #[test]
    fn reasons_serialise_as_they_print() {
        for reason in [DropReason::MediaOnly, DropReason::EmptyAnswer, DropReason::TooLong] {
            assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{reason}\""));
        }
    }
}
