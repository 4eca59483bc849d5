//! File formats and reading options.
//!
//! The extension decides unless the user says otherwise; nothing is sniffed except that a `.json` file beginning with
//! `{` is JSON lines, which is what such files are in practice.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::DataError;

/// How a clue file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Comma-separated with a header.
    Csv,
    /// Tab-separated with a header; quotes are optional.
    Tsv,
    /// One array of objects.
    Json,
    /// One object a line.
    JsonLines,
    /// Apache Parquet.
    Parquet,
}

impl Format {
    /// The format that a file's extension names.
    #[must_use]
    pub fn of_path(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "csv" => Some(Self::Csv),
            "tsv" | "tab" => Some(Self::Tsv),
            "json" => Some(Self::Json),
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "parquet" | "pq" => Some(Self::Parquet),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Csv => "csv",
            Self::Tsv => "tsv",
            Self::Json => "json",
            Self::JsonLines => "json-lines",
            Self::Parquet => "parquet",
        })
    }
}

impl FromStr for Format {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Self::Csv, Self::Tsv, Self::Json, Self::JsonLines, Self::Parquet]
            .into_iter()
            .find(|format| format.to_string() == name)
            .ok_or_else(|| DataError::UnknownChoice {
                what: "format",
                name: name.to_owned(),
                flag: "--format",
                choices: "csv, tsv, json, json-lines or parquet",
            })
    }
}

/// Where to find what in a file. The default finds the usual names, however they are spelt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReadOptions {
    /// Overrides the extension.
    pub format: Option<Format>,
    /// Name of the question column (`--question-column`).
    pub question: Option<String>,
    /// Name of the answer column (`--answer-column`).
    pub answer: Option<String>,
    /// Name of the category column (`--category-column`).
    pub category: Option<String>,
    /// Name of the air-date column (`--air-date-column`).
    pub air_date: Option<String>,
    /// Reads only the first rows.
    pub limit: Option<usize>,
}
