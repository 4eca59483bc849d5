//! Checkpoints: a run's factors, moments and counters as a folder that appears whole or not at all.
//!
//! ```text
//! step-000100/adapter_config.json         a PEFT directory, which other programs take as it is
//!             adapter_model.safetensors   the factors in f32
//!             optimizer.safetensors       the moments, in f32 or as bytes with their scales
//!             state.json                  counters, what must be the same for a continuation, the program's own records
//!             B3SUMS                      a BLAKE3 hash of each of the files above, in the form of b3sum
//! ```
//!
//! What it trades: every byte is read once more before it is used. What it refuses: a checkpoint with one bit changed, which
//! [`newest_checkpoint`] passes over for the one before; and to go on where [`Checkpoint::check_same`] finds a difference.

mod error;
mod fingerprint;
mod store;
mod tensors;
mod writer;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use buzzer_weights::{Adapter, NewFolder, WeightsError, write_atomic, write_json, write_stored};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Progress, TrainerState};

pub use error::{CheckpointError, Difference};
pub use store::{Found, checkpoint_steps, newest_checkpoint};
pub use writer::{CheckpointJob, CheckpointWriter, Written};

const STATE: &str = "state.json";
const MOMENTS: &str = "optimizer.safetensors";
const SUMS: &str = "B3SUMS";
/// The version of this layout.
const FORMAT: u32 = 1;

/// A moment of a run, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The factors.
    pub adapter: Adapter,
    /// Counters and moments.
    pub state: TrainerState,
    /// What must be the same for the run to go on exactly: a tree of settings and hashes, for [`Self::check_same`].
    pub fingerprint: Value,
    /// What the program wants back.
    pub records: Value,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    progress: Progress,
    fingerprint: Value,
    records: Value,
}

impl Checkpoint {
    /// Writes the folder, in place of an older one.
    ///
    /// # Errors
    /// If a number is not finite or a file cannot be written. What stood there is kept then, and no part of the new one.
    pub fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        let folder = NewFolder::begin(dir)?;
        self.adapter.write_into(&folder)?;
        write_stored(&folder.path().join(MOMENTS), &tensors::to_write(&self.state.moments))?;
        let state = StateFile {
            format: FORMAT,
            progress: self.state.progress,
            fingerprint: self.fingerprint.clone(),
            records: self.records.clone(),
        };
        write_json(&folder.path().join(STATE), &state)?;
        write_sums(folder.path())?;
        folder.replace(&[])?;
        Ok(())
    }

    /// Reads a folder, after every byte of it has been checked.
    ///
    /// # Errors
    /// If a file is missing or not as it was written; the error names it.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        check_sums(dir)?;
        let path = dir.join(STATE);
        let text = fs::read(&path).map_err(|error| CheckpointError::damaged(&path, error))?;
        let state: StateFile =
            serde_json::from_slice(&text).map_err(|error| CheckpointError::damaged(&path, error))?;
        if state.format != FORMAT {
            let message = format!("its format is {}, and this build reads {FORMAT}", state.format);
            return Err(CheckpointError::damaged(&path, message));
        }
        let adapter = Adapter::read(dir)?;
        let moments = tensors::read(&dir.join(MOMENTS), adapter.tensors.keys())?;
        Ok(Self {
            adapter,
            state: TrainerState { progress: state.progress, moments },
            fingerprint: state.fingerprint,
            records: state.records,
        })
    }

    /// That a run which wants to go on from here is this one.
    ///
    /// # Errors
    /// With every difference between the fingerprints: where it is, and both values.
    pub fn check_same(&self, fingerprint: &Value) -> Result<(), CheckpointError> {
        match fingerprint::differences(&self.fingerprint, fingerprint) {
            differences if differences.is_empty() => Ok(()),
            differences => Err(CheckpointError::Different { step: self.state.progress.step, differences }),
        }
    }
}

/// The hash of every file of a folder.
fn write_sums(dir: &Path) -> Result<(), CheckpointError> {
    let mut sums = String::new();
    let fault = |error| WeightsError::write(dir, error);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(fault)? {
        names.push(entry.map_err(fault)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    for name in names {
        let hash = hash_file(&dir.join(&name)).map_err(fault)?;
        sums += &format!("{hash}  {name}\n");
    }
    let path = dir.join(SUMS);
    write_atomic(&path, |file| {
        file.write_all(sums.as_bytes()).map_err(|error| WeightsError::write(&path, error))
    })?;
    Ok(())
}

/// That every file is there and has its hash.
fn check_sums(dir: &Path) -> Result<(), CheckpointError> {
    let path = dir.join(SUMS);
    let text = fs::read_to_string(&path).map_err(|error| CheckpointError::damaged(&path, error))?;
    let sums: BTreeMap<&str, &str> =
        text.lines().filter_map(|line| line.split_once("  ")).map(|(hash, name)| (name, hash)).collect();
    for name in [STATE, MOMENTS].into_iter().chain(Adapter::FILES) {
        let file = dir.join(name);
        let Some(&expected) = sums.get(name) else {
            return Err(CheckpointError::damaged(&path, format!("it has no line for {name}")));
        };
        let found = hash_file(&file).map_err(|error| CheckpointError::damaged(&file, error))?;
        if found != expected {
            let message = format!("its BLAKE3 hash is {found}, and {SUMS} says {expected}");
            return Err(CheckpointError::damaged(&file, message));
        }
    }
    Ok(())
}

fn hash_file(path: &Path) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(path)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}
