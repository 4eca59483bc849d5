//! What can go wrong with checkpoints: the file, what is wrong with it, and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

use buzzer_weights::WeightsError;

/// An error of writing, reading or resuming.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file of a checkpoint is missing or not as it was written.
    #[error("{path}: damaged or missing: {message}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// There is nothing to go on from.
    #[error("{path}: no checkpoint is here; give the folder of a run to --resume, or begin one without it", path = path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// There are checkpoints, and all are damaged.
    #[error(
        "{path}: none of its {count} checkpoints can be used; the newest: {newest}; restore its files from a copy, or begin a new run in another folder",
        path = path.display()
    )]
    NoneUsable {
        /// The folder of the checkpoints.
        path: PathBuf,
        /// How many there are.
        count: usize,
        /// What is wrong with the newest.
        newest: Box<CheckpointError>,
    },
    /// The run that wants to go on is another one.
    #[error(
        "the checkpoint of step {step} belongs to another run: {}; resume with what it began with, or begin a new run in another folder (--out)",
        list(differences)
    )]
    Different {
        /// Steps taken by then.
        step: u64,
        /// All that differs.
        differences: Vec<Difference>,
    },
    /// Another process writes to the same run.
    #[error("{path}: another process trains into this folder; end it first, or give another folder to --out", path = path.display())]
    Busy {
        /// The folder of the checkpoints.
        path: PathBuf,
    },
    /// A file could not be written, or a part of the checkpoint not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// A place at which two fingerprints differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The field's path, as in `recipe.train.batch_rows`.
    pub field: String,
    /// Its value in the checkpoint, as JSON; none if it has no such field.
    pub saved: Option<String>,
    /// Its value now.
    pub now: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".into());
        write!(f, "{} is {} there and {} here", self.field, value(&self.saved), value(&self.now))
    }
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
}

impl CheckpointError {
    pub(super) fn damaged(path: &Path, message: impl fmt::Display) -> Self {
        Self::Damaged { path: path.to_owned(), message: message.to_string() }
    }
}
