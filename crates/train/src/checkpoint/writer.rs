//! Checkpoints on their way to the disk while training goes on.
//!
//! One write goes on at a time, in a thread of its own; training waits for the copy to the host and not for the drive. A checkpoint
//! that comes meanwhile, or that could not be written and holds the best factors so far, waits in host memory, and a newer one
//! takes its place. What it refuses: two processes that write into one folder.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use buzzer_weights::{WeightsError, remove_partial_folders};

use super::store::{folder_of, prune};
use super::{Checkpoint, CheckpointError};

/// A checkpoint, and what its writing brings with it.
#[derive(Clone, Debug)]
pub struct CheckpointJob {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The step of the best factors so far, whose checkpoint is kept.
    pub best: Option<u64>,
    /// A folder for the adapter alone, written first, if its factors are the best so far.
    pub best_adapter: Option<PathBuf>,
}

/// What became of a checkpoint.
#[derive(Debug)]
pub struct Written {
    /// Its step.
    pub step: u64,
    /// Its folder.
    pub result: Result<PathBuf, CheckpointError>,
}

/// Writes a run's checkpoints. Dropped, it waits for the write that goes on.
#[derive(Debug)]
pub struct CheckpointWriter {
    root: PathBuf,
    keep: usize,
    writing: Option<JoinHandle<(CheckpointJob, Result<PathBuf, CheckpointError>)>>,
    waiting: Option<CheckpointJob>,
    /// Held as long as this process writes here.
    _lock: File,
}

impl CheckpointWriter {
    /// A writer into a folder, which is created, and in which the `keep` newest checkpoints are kept (one at least) and the best.
    /// Removes what a killed process has left there.
    ///
    /// # Errors
    /// If the folder cannot be made, or another process writes into it.
    pub fn open(root: &Path, keep: usize) -> Result<Self, CheckpointError> {
        let fault = |error| WeightsError::write(root, error);
        fs::create_dir_all(root).map_err(fault)?;
        let lock = File::open(root).map_err(fault)?;
        // Some network file systems know no locks; there nothing is refused.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(CheckpointError::Busy { path: root.to_owned() });
        }
        remove_partial_folders(root);
        Ok(Self { root: root.to_owned(), keep, writing: None, waiting: None, _lock: lock })
    }

    /// Whether a write goes on.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.writing.is_some()
    }

    /// Whether a checkpoint waits: for the one that is being written, or to be tried again.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Writes a checkpoint as soon as none is being written. One that waited until now is given up for it.
    pub fn save(&mut self, job: CheckpointJob) {
        self.waiting = Some(job);
        if !self.is_busy() {
            self.retry();
        }
    }

    /// Begins to write what waits; false if nothing does, or a write goes on.
    pub fn retry(&mut self) -> bool {
        if self.is_busy() {
            return false;
        }
        let Some(job) = self.waiting.take() else { return false };
        let (root, keep) = (self.root.clone(), self.keep);
        self.writing = Some(thread::spawn(move || {
            let result = job.write(&root, keep);
            (job, result)
        }));
        true
    }

    /// What became of a write that has ended since the last call. Does not wait.
    pub fn poll(&mut self) -> Option<Written> {
        let finished = self.writing.as_ref().is_some_and(JoinHandle::is_finished);
        if finished { self.wait() } else { None }
    }

    /// What became of the write that goes on, if one does. Waits for it, and begins the next if one waits.
    pub fn wait(&mut self) -> Option<Written> {
        let (job, result) = match self.writing.take()?.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let step = job.checkpoint.state.progress.step;
        if result.is_ok() {
            self.retry();
        } else if job.best_adapter.is_some() {
            self.waiting.get_or_insert(job);
        }
        Some(Written { step, result })
    }
}

impl CheckpointJob {
    fn write(&self, root: &Path, keep: usize) -> Result<PathBuf, CheckpointError> {
        let step = self.checkpoint.state.progress.step;
        if let Some(dir) = &self.best_adapter {
            self.checkpoint.adapter.write(dir)?;
        }
        let path = folder_of(root, step);
        self.checkpoint.write(&path)?;
        prune(root, step, keep, self.best)?;
        Ok(path)
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        while self.wait().is_some() {}
    }
}
