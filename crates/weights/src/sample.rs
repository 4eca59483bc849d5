//! Telling one set of weights from another without reading all of it.
//!
//! Thirteen gigabytes take minutes to read from a slow drive, and whoever goes on with a run only wants to know whether
//! this is the base that it began with. What it trades: weights that differ in a few places only may look the same; those
//! of another training differ everywhere. What it refuses: what [`Checkpoint::open`](crate::Checkpoint::open) refuses.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::gguf::gguf_file;
use crate::{Checkpoint, WeightsError};

/// Places of each file that are looked at.
const WINDOWS: u64 = 16;
/// Bytes at each place.
const WINDOW_BYTES: u64 = 64 << 10;

/// The BLAKE3 hash, in hexadecimal digits, of the sizes of a model's files of weights and of 16 windows of 64 KiB spread
/// over each. A copy of the files elsewhere has the same.
///
/// # Errors
/// If the folder, or the GGUF file, has no weights or one of its files cannot be read.
pub fn sample_of_weights(dir: &Path) -> Result<String, WeightsError> {
    let files: Vec<PathBuf> = match gguf_file(dir) {
        Some(file) => vec![file],
        None => Checkpoint::open(dir)?.files().map(Path::to_owned).collect(),
    };
    let mut hasher = blake3::Hasher::new();
    for file in files {
        add_windows(&file, &mut hasher).map_err(|source| WeightsError::Read {
            path: file,
            flag: "--model",
            source,
        })?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn add_windows(path: &Path, hasher: &mut blake3::Hasher) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    hasher.update(&size.to_le_bytes());
    let last = size.saturating_sub(WINDOW_BYTES);
    let mut window = Vec::with_capacity(WINDOW_BYTES as usize);
    for number in 0..WINDOWS {
        window.clear();
        file.seek(SeekFrom::Start(last * number / (WINDOWS - 1)))?;
        file.by_ref().take(WINDOW_BYTES).read_to_end(&mut window)?;
        hasher.update(&window);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{FloatType, TensorToWrite, write_safetensors};

    fn weights(value_at_end: f32, length: usize) -> String {
        let folder = tempfile::tempdir().unwrap();
        let mut values = vec![1.0; length];
        values[length - 1] = value_at_end;
        let tensor = TensorToWrite { name: "w".into(), shape: vec![length], values: values.into() };
        let path = folder.path().join("model.safetensors");
        write_safetensors(&path, &[tensor], FloatType::F32, &Default::default()).unwrap();
        sample_of_weights(folder.path()).unwrap()
    }

    #[test]
    fn other_weights_have_another_sample() {
        for length in [1, 100, 1 << 20] {
            let sample = weights(1.0, length);
            assert_eq!(sample, weights(1.0, length));
            assert_ne!(sample, weights(2.0, length));
            assert_ne!(sample, weights(1.0, length + 1));
        }
    }

    #[test]
    fn a_folder_without_weights_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert!(sample_of_weights(folder.path()).unwrap_err().to_string().contains("--model"));
    }
}
