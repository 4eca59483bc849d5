//! Errors of this crate: the file, the row, the line, and what to do.
//!
//! Rows count data rows from 1, lines count the file's lines from 1. It refuses plain strings as errors.

use std::path::PathBuf;

use crate::Format;

/// What can go wrong between a file and packed rows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file could not be read.
    #[error("{path}: {source}; check the path given to --data", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The extension names no known format.
    #[error(
        "{path}: the extension names no known format; pass --format csv, tsv, json, json-lines or parquet (and unpack a compressed file first)",
        path = path.display()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// There are no data rows.
    #[error("{path}: no data rows ({what}); pass a file with a header and at least one clue", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What was there instead.
        what: &'static str,
    },
    /// The bytes are no UTF-8.
    #[error(
        "{path}, line {line}: byte {byte} is not UTF-8; convert the file (for example with iconv -t UTF-8) or unpack it",
        path = path.display()
    )]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Line of the first bad byte, from 1.
        line: usize,
        /// Its offset in the file, from 0.
        byte: usize,
    },
    /// A quote is never closed, or closes in the middle of a field.
    #[error("{path}, row {row}, line {line}: {what}; repair the quotes of this row or fetch the file again", path = path.display())]
    BrokenQuote {
        /// The file.
        path: PathBuf,
        /// Data row, from 1; 0 is the header.
        row: usize,
        /// Line where the field begins, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A row has another number of fields than the header.
    #[error(
        "{path}, row {row}, line {line}: {found} fields where the header has {expected}{hint}; repair the row or fetch the file again",
        path = path.display()
    )]
    Ragged {
        /// The file.
        path: PathBuf,
        /// Data row, from 1.
        row: usize,
        /// Line where the row begins, from 1.
        line: usize,
        /// Fields found.
        found: usize,
        /// Fields of the header.
        expected: usize,
        /// A guess at the cause, or nothing.
        hint: &'static str,
    },
    /// The JSON does not parse, or is no list of objects.
    #[error("{path}, row {row}, line {line}, column {column}: {message}; repair the file or fetch it again", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Data row, from 1.
        row: usize,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser said.
        message: String,
    },
    /// The reader of the format failed.
    #[error("{path}: cannot be read as {format}: {message}; fetch the file again, or correct --format", path = path.display())]
    Reader {
        /// The file.
        path: PathBuf,
        /// The format it was read as.
        format: Format,
        /// What the reader said.
        message: String,
    },
    /// A column is not there.
    #[error(
        "{path}: no {role} column{asked}; the columns are {found}; name it with {flag} NAME",
        path = path.display(), found = found.join(", "),
        asked = asked.as_ref().map_or(String::new(), |name| format!(" called `{name}`"))
    )]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// What the column holds: question, answer, category or air date.
        role: &'static str,
        /// The flag that names it.
        flag: &'static str,
        /// The name that was asked for, if one was.
        asked: Option<String>,
        /// The columns that are there.
        found: Vec<String>,
    },
    /// A text is no date.
    #[error("`{0}` is no date; write YYYY-MM-DD or M/D/YYYY")]
    BadDate(String),
    /// A split by air date met a clue without one.
    #[error(
        "row {row}: no readable air date, so it cannot be split by date; name the column with --air-date-column, or split by hash"
    )]
    NoDate {
        /// Data row, from 1.
        row: u32,
    },
    /// A setting that makes no sense.
    #[error("{flag} {found} is not possible; choose {choose}")]
    Setting {
        /// The flag.
        flag: &'static str,
        /// Its value.
        found: String,
        /// What would be possible.
        choose: &'static str,
    },
    /// One side of a split is empty.
    #[error("the split leaves no clue for {side} out of {clues}; choose another date or fraction")]
    EmptySplit {
        /// `training` or `evaluation`.
        side: &'static str,
        /// Clues before the split.
        clues: usize,
    },
    /// A choice that does not exist.
    #[error("unknown {what} `{name}`; {flag} takes {choices}")]
    UnknownChoice {
        /// What was to be chosen.
        what: &'static str,
        /// The name given.
        name: String,
        /// The flag.
        flag: &'static str,
        /// What there is.
        choices: &'static str,
    },
}
