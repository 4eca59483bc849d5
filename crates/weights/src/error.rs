//! Errors of this crate: what was wrong, where (file, tensor), and which flag leads out of it.
//!
//! It trades a few more variants for messages that need no second look; it refuses plain strings as errors. One
//! reader serves models, adapters and golden files, so most variants carry the flag that named the file.

use std::fmt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

/// What can go wrong between files and plain numbers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file could not be read.
    #[error("{path}: {source}; check the path given to {flag}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// A folder has no file of weights that this crate reads.
    #[error(
        "{path}: no {wanted} here{found}; give a folder in Hugging Face's or Meta's form, or a file of weights, to {flag}",
        path = path.display()
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The file names that were looked for.
        wanted: &'static str,
        /// Files of other formats that are there, as part of the sentence; may be empty.
        found: String,
    },
    /// The file is no safetensors file.
    #[error("{path}: not a usable safetensors file: {message}; download it again, or give another to {flag}", path = path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The file begins like one of PyTorch's, and is not one that can be read.
    #[error("{path}: not a usable PyTorch file: {message}; download it again, or give another to {flag}", path = path.display())]
    PyTorch {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The pickle of a PyTorch file names something beyond tensors.
    #[error(
        "{path}: it names `{name}`, which loading it in Python might run, and only tensors are read here; do not trust this file, or save the model's state_dict() alone; give another to {flag}",
        path = path.display()
    )]
    PickledCode {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The function or class, with its module.
        name: String,
    },
    /// Meta's `params.json` or its shards are not usable.
    #[error("{path}: not a usable model in Meta's form: {message}; download it again, or give another to {flag}", path = path.display())]
    Meta {
        /// The file or folder.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor changes what the model computes, and is none of Llama's.
    #[error(
        "{path}: tensor `{tensor}` {message}; only Llama 2's architecture is supported: give another checkpoint to --model",
        path = path.display()
    )]
    ForeignTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why it has no place.
        message: String,
    },
    /// A checkpoint is quantized in a way that is not supported.
    #[error(
        "{path}: the weights are quantized by `{method}`, and only bitsandbytes' nf4 can be used as stored; give a checkpoint in nf4, or one that is not quantized, to --model",
        path = path.display()
    )]
    QuantizedBy {
        /// The configuration.
        path: PathBuf,
        /// The method as the configuration names it.
        method: String,
    },
    /// The file ends before its last tensor does.
    #[error(
        "{path}: cut short: its header promises {promised} bytes and it has {actual}; download it again, or give another to {flag}",
        path = path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// Bytes that the header asks for, itself included.
        promised: u64,
        /// Bytes that there are.
        actual: u64,
    },
    /// The header's entry of one tensor contradicts itself or the other entries.
    #[error("{path}: tensor `{tensor}`: {message}; download the file again, or give another to {flag}", path = path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        message: String,
    },
    /// The index of a sharded checkpoint is not usable.
    #[error("{path}: not a usable index: {message}; download it again, or give another folder to {flag}", path = path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// The flag that named its folder.
        flag: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// An index names a file outside its folder.
    #[error(
        "{path}: tensor `{tensor}` is said to be in `{shard}`, which is outside this folder; do not trust this checkpoint, give another to {flag}",
        path = path.display()
    )]
    ShardOutside {
        /// The index.
        path: PathBuf,
        /// The flag that named its folder.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// The file name in the index.
        shard: String,
    },
    /// A file that an index names is not there.
    #[error(
        "{path}: the shard `{shard}` that it names is not in the folder; download that file, or give a complete folder to {flag}",
        path = path.display()
    )]
    ShardMissing {
        /// The index.
        path: PathBuf,
        /// The flag that named its folder.
        flag: &'static str,
        /// The file name in the index.
        shard: String,
    },
    /// A tensor is not in the shard in which the index puts it.
    #[error(
        "{path}: tensor `{tensor}` should be in `{shard}` but is not; index and shards are of different versions: download them again, or give another folder to {flag}",
        path = path.display()
    )]
    NotInShard {
        /// The index.
        path: PathBuf,
        /// The flag that named its folder.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// The file name in the index.
        shard: String,
    },
    /// The checkpoint has no tensor of this name.
    #[error(
        "{path}: no tensor `{tensor}` among its {count}; check that {flag} names a checkpoint of the right architecture",
        path = path.display()
    )]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// How many tensors there are.
        count: usize,
    },
    /// A tensor's shape is not the one expected.
    #[error(
        "{path}: tensor `{tensor}` has shape {found:?}, expected {expected:?}; check that the config.json and the weights of {flag} belong together",
        path = path.display()
    )]
    Shape {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape that was asked for.
        expected: Vec<usize>,
    },
    /// A tensor's element type is not one that can be read here.
    #[error(
        "{path}: tensor `{tensor}` is stored as {found}, and {accepted} can be read here; give a checkpoint stored so to {flag}",
        path = path.display()
    )]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: Dtype,
        /// The element types that can be read.
        accepted: &'static str,
    },
    /// A tensor holds a NaN or an infinity.
    #[error(
        "{path}: tensor `{tensor}` holds {value} at element {index} (from 0, row by row); the file is damaged or its training diverged: give another to {flag}",
        path = path.display()
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// The first such element, counted from 0 in row-major order.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// A quantized tensor is not stored in the one form that is supported.
    #[error(
        "{path}: quantized tensor `{tensor}`: {message}; give {flag} a bitsandbytes checkpoint in nf4 with block size 64, or one that is not quantized",
        path = path.display()
    )]
    Quantized {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        message: String,
    },
    /// An `adapter_config.json` is not usable.
    #[error("{path}: not a usable PEFT configuration: {message}; give another adapter to --adapter", path = path.display())]
    AdapterConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An adapter uses something beyond plain LoRA.
    #[error(
        "{path}: `{field}` is {value}: {reason}; train the adapter without it, or give another to --adapter",
        path = path.display()
    )]
    AdapterUnsupported {
        /// The file.
        path: PathBuf,
        /// The key of the configuration.
        field: &'static str,
        /// Its value as JSON.
        value: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// An adapter's tensor is none of the factors that this crate knows, or contradicts the others.
    #[error("{path}: key `{key}`: {message}; give another adapter to --adapter", path = path.display())]
    AdapterKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        message: String,
    },
    /// An adapter's factor does not have the shape that the configuration or its siblings ask for.
    #[error(
        "{path}: key `{key}` has shape {found:?}, expected {expected:?} ({reason}); give another adapter to --adapter",
        path = path.display()
    )]
    AdapterShape {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that it should have.
        expected: Vec<usize>,
        /// What asks for that shape.
        reason: String,
    },
    /// The configuration of the model is not one that is run here.
    #[error(transparent)]
    Model(#[from] buzzer_model::ModelError),
    /// The stored parts of a four-bit weight do not belong together.
    #[error("{path}: tensor `{tensor}`: {message}; download the checkpoint again", path = path.display())]
    Packed {
        /// The checkpoint.
        path: PathBuf,
        /// The weight.
        tensor: String,
        /// What is wrong with its parts.
        message: String,
    },
    /// An adapter was made for another model.
    #[error("{path}: the adapter does not fit the model: {what}; give the base that it was trained on to --model", path = path.display())]
    AdapterMisfit {
        /// The adapter's folder.
        path: PathBuf,
        /// Where the two differ, with both shapes.
        what: String,
    },
    /// A file could not be written.
    #[error("{path}: cannot write: {source}; check the space and the rights there, or give another folder to --out", path = path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A tensor cannot be stored as it is; the file that was there before is untouched.
    #[error("{path}: tensor `{tensor}` is not written: {message}; what stood there before is kept", path = path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it, and what to do.
        message: String,
    },
    /// A folder that is to be made is there already.
    #[error("{path}: is there already and not empty; give a folder that does not exist yet to --out", path = path.display())]
    OutOccupied {
        /// The folder.
        path: PathBuf,
    },
    /// The file is no usable GGUF file.
    #[error("{path}: not a usable GGUF file: {message}; give another to {flag}", path = path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The flag that named it.
        flag: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A tokenizer cannot be told in the terms of a GGUF file.
    #[error("{path}: {message}; give a Llama 2 tokenizer.json to --tokenizer, or choose another --format", path = path.display())]
    Vocabulary {
        /// The tokenizer's file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

impl WeightsError {
    /// A failed write, for closures given to [`write_atomic`](crate::write_atomic).
    #[must_use]
    pub fn write(path: &Path, source: impl Into<std::io::Error>) -> Self {
        Self::Write { path: path.to_owned(), source: source.into() }
    }
}

/// Where something was read: the file, and the flag that named it.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) path: &'a Path,
    pub(crate) flag: &'static str,
}

impl Place<'_> {
    pub(crate) fn read(self, source: std::io::Error) -> WeightsError {
        WeightsError::Read { path: self.path.to_owned(), flag: self.flag, source }
    }

    pub(crate) fn header(self, message: impl fmt::Display) -> WeightsError {
        WeightsError::Header { path: self.path.to_owned(), flag: self.flag, message: message.to_string() }
    }

    pub(crate) fn pytorch(self, message: String) -> WeightsError {
        WeightsError::PyTorch { path: self.path.to_owned(), flag: self.flag, message }
    }

    pub(crate) fn index(self, message: String) -> WeightsError {
        WeightsError::Index { path: self.path.to_owned(), flag: self.flag, message }
    }

    pub(crate) fn meta(self, message: String) -> WeightsError {
        WeightsError::Meta { path: self.path.to_owned(), flag: self.flag, message }
    }

    pub(crate) fn entry(self, tensor: &str, message: String) -> WeightsError {
        WeightsError::Entry {
            path: self.path.to_owned(),
            flag: self.flag,
            tensor: tensor.to_owned(),
            message,
        }
    }

    pub(crate) fn quantized(self, tensor: &str, message: String) -> WeightsError {
        let (path, tensor) = (self.path.to_owned(), tensor.to_owned());
        WeightsError::Quantized { path, flag: self.flag, tensor, message }
    }
}
