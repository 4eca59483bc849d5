//! The folder of a run's checkpoints: which there are, the newest that is whole, and which may go.

use std::fs;
use std::path::{Path, PathBuf};

use buzzer_weights::remove_folder;

use super::{Checkpoint, CheckpointError};

const PREFIX: &str = "step-";

/// A checkpoint that can be used.
#[derive(Debug)]
pub struct Found {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with newer ones, newest first.
    pub damaged: Vec<CheckpointError>,
}

/// The folder of a step's checkpoint.
pub(super) fn folder_of(root: &Path, step: u64) -> PathBuf {
    root.join(format!("{PREFIX}{step:06}"))
}

/// The steps of which there are checkpoints, whole or not, from the oldest on. A folder that does not exist has none.
#[must_use]
pub fn checkpoint_steps(root: &Path) -> Vec<u64> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let step = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok();
    let mut steps: Vec<u64> = entries.filter_map(step).collect();
    steps.sort_unstable();
    steps
}

/// The newest checkpoint in which every file is whole.
///
/// # Errors
/// If there is none, or all are damaged.
pub fn newest_checkpoint(root: &Path) -> Result<Found, CheckpointError> {
    let steps = checkpoint_steps(root);
    let mut damaged = Vec::new();
    for path in steps.iter().rev().map(|&step| folder_of(root, step)) {
        match Checkpoint::read(&path) {
            Ok(checkpoint) => return Ok(Found { checkpoint, path, damaged }),
            Err(error) => damaged.push(error),
        }
    }
    if damaged.is_empty() {
        return Err(CheckpointError::Missing { path: root.to_owned() });
    }
    let (path, count) = (root.to_owned(), damaged.len());
    Err(CheckpointError::NoneUsable { path, count, newest: Box::new(damaged.swap_remove(0)) })
}

/// Removes all checkpoints up to the one of `step` but the `keep` newest of them and that of the step `best`. Later ones, from which
/// the run did not go on, stay until the run writes them anew.
pub(super) fn prune(root: &Path, step: u64, keep: usize, best: Option<u64>) -> Result<(), CheckpointError> {
    let mut steps = checkpoint_steps(root);
    steps.retain(|&other| other <= step);
    steps.truncate(steps.len().saturating_sub(keep.max(1)));
    for step in steps.into_iter().filter(|&step| Some(step) != best) {
        remove_folder(&folder_of(root, step))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_the_best_are_kept() {
        let root = tempfile::tempdir().unwrap();
        for step in [0, 5, 10, 1_000_000, 15, 20] {
            fs::create_dir(folder_of(root.path(), step)).unwrap();
        }
        fs::write(root.path().join("notes"), "of the user").unwrap();
        prune(root.path(), 20, 2, Some(5)).unwrap();
        assert_eq!(checkpoint_steps(root.path()), [5, 15, 20, 1_000_000]);
        prune(root.path(), 20, 0, None).unwrap();
        assert_eq!(checkpoint_steps(root.path()), [20, 1_000_000]);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3);
    }

    #[test]
    fn nothing_to_go_on_from_says_so() {
        let root = tempfile::tempdir().unwrap();
        let nowhere = root.path().join("nowhere");
        assert!(newest_checkpoint(&nowhere).unwrap_err().to_string().contains("--resume"));
        fs::create_dir(folder_of(root.path(), 3)).unwrap();
        let error = newest_checkpoint(root.path()).unwrap_err().to_string();
        assert!(error.contains("none of its 1") && error.contains("step-000003/B3SUMS"), "{error}");
    }
}
