//! A folder of files that goes when the test ends, invented clues, and random numbers.

use std::fs;
use std::path::PathBuf;

use buzzer_data::{Cleaned, DataError, RawClues, ReadOptions, clean, read_clues};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tempfile::TempDir;

/// The seven columns of the Kaggle layout.
pub(crate) const COLUMNS: [&str; 7] =
    ["Show Number", "Air Date", "Round", "Category", "Value", "Question", "Answer"];

/// Invented clues in the order of [`COLUMNS`], with what a format may trip over: separators, quotes, markup, empty
/// cells, words that look like nothing, numbers that look like numbers, and a date in either spelling.
pub(crate) const ROWS: [[&str; 7]; 12] = [
    [
        "1",
        "2001-02-03",
        "Jeopardy!",
        "INVENTED ISLES",
        "$200",
        "The capital of the isle of Ambra",
        "Port Ambra",
    ],
    [
        "1",
        "2001-02-03",
        "Jeopardy!",
        "INVENTED ISLES",
        "$1,200",
        "Ambra, Brill, and this isle",
        "Corva, or Korva",
    ],
    [
        "1",
        "2001-02-03",
        "Jeopardy!",
        "SAID SO",
        "$600",
        "He said \"no\" to the \"yes\" men",
        "Max \"Yes\" Vane",
    ],
    ["1", "2001-02-03", "Jeopardy!", "NUMBERS", "$800", "Agent of the isle, two zeros first", "007"],
    ["2", "4/5/02", "Double Jeopardy!", "NOTHING", "None", "It is what the isle exports", "None"],
    [
        "2",
        "4/5/02",
        "Double Jeopardy!",
        "ACCENTS",
        "$400 ",
        "Caf\u{e9} of the se\u{f1}or of Ambra \u{1f680}",
        "L'\u{c9}t\u{e9}",
    ],
    [
        "2",
        "4/5/02",
        "Double Jeopardy!",
        "LINKS",
        "$800",
        "<a href=\"http://x.invalid/m.jpg\" target=\"_blank\">This</a> bird of Brill",
        "the brillet",
    ],
    [
        "3",
        "not known",
        "Final Jeopardy!",
        "ENTITIES",
        "",
        "Salt &amp; sand are its <i>only</i> goods",
        "Brill &amp; Sons",
    ],
    ["3", "", "Final Jeopardy!", "", "", "Words with \\'stray\\' backslashes", "the \\\"isle\\\""],
    ["3", "2003-07-08", "Jeopardy!", "EMPTY", "$200", "This clue has no answer", ""],
    [
        "3",
        "2003-07-08",
        "Jeopardy!",
        "MEDIA",
        "$200",
        "<a href=\"http://x.invalid/a.mp3\">[audio clue]</a>",
        "a song",
    ],
    ["3", "2003-07-08", "Jeopardy!", "AGAIN", "$200", "The capital of the isle  of Ambra", "Port Ambra"],
];

/// A folder for one test's files.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

/// Reads bytes as a file of the given name.
pub(crate) fn read(name: &str, bytes: impl AsRef<[u8]>) -> Result<RawClues, DataError> {
    read_with(name, bytes, &ReadOptions::default())
}

pub(crate) fn read_with(
    name: &str,
    bytes: impl AsRef<[u8]>,
    options: &ReadOptions,
) -> Result<RawClues, DataError> {
    let folder = Folder::new();
    read_clues(&folder.write(name, bytes), options)
}

/// Reads and cleans bytes as a file of the given name.
pub(crate) fn cleaned(name: &str, bytes: impl AsRef<[u8]>) -> Cleaned {
    clean(read(name, bytes).unwrap())
}

/// The error of a file that must not be read, whose message must hold all of `says`.
pub(crate) fn refused(name: &str, bytes: impl AsRef<[u8]>, says: &[&str]) -> DataError {
    let error = read(name, bytes).unwrap_err();
    let message = error.to_string();
    for part in says.iter().chain([&name]) {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
    error
}

/// Rows as RFC 4180 writes them, every cell quoted.
pub(crate) fn delimited<const N: usize>(
    columns: [&str; N],
    rows: &[[&str; N]],
    separator: &str,
    line_end: &str,
) -> String {
    let line = |cells: &[&str; N]| {
        let quoted = cells.map(|cell| format!("\"{}\"", cell.replace('"', "\"\"")));
        quoted.join(separator) + line_end
    };
    std::iter::once(&columns).chain(rows).map(line).collect()
}

/// The invented clues as CSV.
pub(crate) fn csv() -> String {
    delimited(COLUMNS, &ROWS, ",", "\n")
}

pub(crate) fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A number from `from` to `to`, both included.
pub(crate) fn between(generator: &mut ChaCha8Rng, from: usize, to: usize) -> usize {
    from + (generator.next_u64() % (to - from + 1) as u64) as usize
}
