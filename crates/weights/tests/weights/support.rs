//! What the tests share: files made by hand, errors looked into, and files beside the workspace.

use std::fs;
use std::path::{Path, PathBuf};

use buzzer_weights::WeightsError;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A tensor of a file made here: name, dtype, shape, bytes.
pub(crate) type Raw<'a> = (&'a str, &'a str, &'a [usize], &'a [u8]);

/// The name of an index.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

pub(crate) fn raw_file(tensors: &[Raw<'_>]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert((*name).into(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

pub(crate) fn folder_with(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn index(pairs: &[(&str, &str)]) -> Vec<u8> {
    let map: serde_json::Map<_, _> = pairs.iter().map(|&(name, shard)| (name.into(), shard.into())).collect();
    json!({"metadata": {"total_size": 8}, "weight_map": map}).to_string().into_bytes()
}

/// The message of an error that must hold every one of these pieces.
#[track_caller]
pub(crate) fn expect<T>(result: Result<T, WeightsError>, pieces: &[&str]) {
    let error = result.err().expect("this must be refused").to_string();
    for piece in pieces {
        assert!(error.contains(piece), "`{piece}` is not in: {error}");
    }
}

/// A file or folder beside the workspace.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    if !path.exists() {
        println!("skipped: there is no {}", path.display());
        return None;
    }
    Some(path)
}
