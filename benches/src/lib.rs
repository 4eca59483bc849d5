//! What the benches share: where they run, what they report, and how they end.
//!
//! A bench prints a table for people and writes rows for machines (DESIGN section 7). It measures one process, so the
//! peak of its memory is the operating system's own count and not an estimate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

/// One measured number.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured, for example `ingest.read`.
    pub name: String,
    /// Where it ran.
    pub device: String,
    /// The size of the input, in words.
    pub shape: String,
    /// The number.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// Peak memory of the process so far on the host, or of the device.
    pub peak_memory_bytes: Option<u64>,
    /// Type of the numbers computed with.
    pub dtype: &'static str,
    /// Commit that was built.
    pub commit: String,
}

/// Rows that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; check the path given to --json", path = path.display())]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// The cause.
    pub source: std::io::Error,
}

/// What stops a bench.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The clue file.
    #[error(transparent)]
    Data(#[from] buzzer::data::DataError),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] buzzer::text::TextError),
    /// A training step.
    #[error(transparent)]
    Train(#[from] buzzer::train::TrainError),
    /// The results.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The workspace.
    #[error("the workspace's root: {0}; run the program itself instead of through cargo")]
    Root(std::io::Error),
    /// The device.
    #[error("the device stopped: {0}; run again with a smaller --batch or --seq if memory ran out")]
    Device(String),
}

/// Writes rows as one JSON array.
///
/// # Errors
/// If the file cannot be written.
pub fn write_rows(path: &Path, rows: &[Row]) -> Result<(), WriteError> {
    let text = serde_json::to_string_pretty(rows).unwrap_or_default() + "\n";
    fs::write(path, text).map_err(|source| WriteError { path: path.to_owned(), source })
}

/// Goes to the workspace's root when cargo runs the program, because cargo starts benches in their own folder while
/// the paths of a command line are meant from the root, where the command is typed.
///
/// # Errors
/// If the folder is gone.
pub fn enter_workspace_root() -> std::io::Result<()> {
    match std::env::var_os("CARGO_MANIFEST_DIR") {
        Some(package) => std::env::set_current_dir(Path::new(&package).join("..")),
        None => Ok(()),
    }
}

/// Most memory that this process has held, in bytes; unknown outside Linux.
#[must_use]
pub fn peak_memory_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// The commit checked out here, or `unknown`.
#[must_use]
pub fn commit() -> String {
    let output = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    let commit = text.and_then(|text| String::from_utf8(text).ok()).map(|text| text.trim().to_owned());
    commit.filter(|commit| !commit.is_empty()).unwrap_or_else(|| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_an_array_of_flat_objects() {
        let row = Row {
            name: "a.b".into(),
            device: "cpu".into(),
            shape: "3 rows".into(),
            value: 1.5,
            unit: "s",
            peak_memory_bytes: None,
            dtype: "u32",
            commit: commit(),
        };
        let json = serde_json::to_value([row]).unwrap();
        assert_eq!(json[0]["value"], 1.5);
        assert!(json[0]["peak_memory_bytes"].is_null());
        assert!(!json[0]["commit"].as_str().unwrap().is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_is_at_least_a_megabyte() {
        assert!(peak_memory_bytes().unwrap() > 1 << 20);
    }
}
