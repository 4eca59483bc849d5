//! Hands bytes to a reader as its file, and reads on whatever it accepts.
//!
//! Shared by libFuzzer's targets here and by the seeded test in `crates/weights/tests/hostile`, which names this file by
//! its path. It trades a file written for every input against a second way into the readers that only tests would use.

use std::fs;
use std::path::Path;

use buzzer_weights::{Adapter, Checkpoint, Gguf, Nf4Stored, WeightsError, describe, read_config};
use tempfile::TempDir;

/// Two shards, so that an index has something to point at.
const SHARD: &str = "a.safetensors";
const PICKLED_SHARD: &str = "b.bin";

/// Reads bytes as the file of a folder that they are.
type Run = fn(&Path, &[u8]) -> Result<(), WeightsError>;

/// A reader and the folder in which it finds its files.
pub struct Reader {
    /// Its name, that of the fuzz target.
    pub name: &'static str,
    folder: TempDir,
    run: Run,
}

impl Reader {
    /// Every reader of untrusted bytes in `buzzer-weights`. `forms` is `crates/weights/tests/weights/forms`.
    ///
    /// # Panics
    /// If a folder cannot be made.
    #[must_use]
    pub fn all(forms: &Path) -> Vec<Self> {
        let readers: [(&'static str, Run); 9] = [
            ("safetensors", weights),
            ("pytorch", weights),
            ("pickle", pickle),
            ("index", index),
            ("config", config),
            ("params", params),
            ("adapter_config", adapter_config),
            ("adapter", adapter),
            ("gguf", gguf),
        ];
        let make = |(name, run)| Self { name, folder: prepared(name, forms), run };
        readers.map(make).into()
    }

    /// Reads the bytes; whether they were accepted.
    pub fn accepts(&self, bytes: &[u8]) -> bool {
        match (self.run)(self.folder.path(), bytes) {
            Ok(()) => true,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                false
            }
        }
    }
}

/// A folder with the files that a reader does not get from its input.
fn prepared(name: &str, forms: &Path) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let copies: &[(&str, &str)] = match name {
        "index" => &[("hf/model.safetensors", SHARD), ("bin/pytorch_model.bin", PICKLED_SHARD)],
        "params" => &[
            ("meta/consolidated.00.pth", "consolidated.00.pth"),
            ("meta/consolidated.01.pth", "consolidated.01.pth"),
        ],
        "adapter_config" => &[("adapters/patterns/adapter_model.safetensors", "adapter_model.safetensors")],
        "adapter" => &[("adapters/patterns/adapter_config.json", "adapter_config.json")],
        _ => &[],
    };
    for (from, to) in copies {
        fs::copy(forms.join(from), folder.path().join(to)).expect("a form to copy");
    }
    folder
}

fn put(path: &Path, bytes: &[u8]) {
    // Some file systems force a file to the disk when it takes the place of its own old content.
    let _ = fs::remove_file(path);
    fs::write(path, bytes).expect("room for an input");
}

/// Reads every tensor in every way that its type allows.
fn read_all(checkpoint: &Checkpoint) {
    for name in checkpoint.names() {
        let _ = checkpoint.read_f32_any_shape(name);
        let _ = checkpoint.read_i64(name);
        let _ = checkpoint.read_bytes(name);
        if Nf4Stored::is_stored(checkpoint, name) {
            let _ = Nf4Stored::read_any_shape(checkpoint, name).map(|stored| stored.absmax.to_f32());
        }
    }
}

fn weights(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    let path = folder.join("model.safetensors");
    put(&path, bytes);
    Checkpoint::open(&path).map(|checkpoint| read_all(&checkpoint))
}

/// In an archive with the storages of `bin-odd/views.bin`.
fn pickle(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    let storages = [("data/0", &[1; 24][..]), ("data/1", &[1; 8]), ("data/2", &[1; 16])];
    weights(folder, &archive(&[&[("data.pkl", bytes)], &storages[..]].concat()))
}

fn index(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    let path = folder.join("model.safetensors.index.json");
    put(&path, bytes);
    Checkpoint::open(&path).map(|checkpoint| read_all(&checkpoint))
}

fn config(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    put(&folder.join("config.json"), bytes);
    read_config(folder).map(|config| assert!(config.parameters() > 0))
}

fn params(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    put(&folder.join("params.json"), bytes);
    let config = read_config(folder)?;
    assert!(config.parameters() > 0);
    Checkpoint::open(folder).map(|checkpoint| read_all(&checkpoint))
}

fn adapter_config(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    put(&folder.join("adapter_config.json"), bytes);
    Adapter::read(folder).map(|adapter| assert!(!describe(&adapter).is_empty()))
}

fn adapter(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    put(&folder.join("adapter_model.safetensors"), bytes);
    Adapter::read(folder).map(|adapter| assert!(!describe(&adapter).is_empty()))
}

/// The header, every tensor, and the sizes of the model.
fn gguf(folder: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    let path = folder.join("model.gguf");
    put(&path, bytes);
    let file = Gguf::open(&path, "--model")?;
    let mut values = Vec::new();
    for name in file.names() {
        if let Some((_, shape)) = file.tensor(name) {
            let _ = file.read_f32_into(name, shape, &mut values);
        }
    }
    read_config(&path).map(|config| assert!(config.parameters() > 0))
}

/// A zip archive of members stored as they are, so that what is inside is reached whatever it is.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut table) = (Vec::new(), Vec::new());
    for (name, content) in members {
        let header = bytes.len() as u32;
        let (size, length) = ((content.len() as u32).to_le_bytes(), (name.len() as u16).to_le_bytes());
        let numbers = [&[0; 14][..], &size, &size, &length, &[0; 2]].concat();
        bytes.extend([b"PK\x03\x04", &numbers[..], name.as_bytes(), content].concat());
        let entry = [b"PK\x01\x02\0\0", &numbers[..], &[0; 10], &header.to_le_bytes(), name.as_bytes()];
        table.extend(entry.concat());
    }
    let count = (members.len() as u16).to_le_bytes();
    let (length, start) = ((table.len() as u32).to_le_bytes(), (bytes.len() as u32).to_le_bytes());
    let end = [b"PK\x05\x06\0\0\0\0", &count[..], &count, &length, &start, &[0; 2]].concat();
    [bytes, table, end].concat()
}
