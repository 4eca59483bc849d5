//! Checkpoints and adapters in and out.
//!
//! The lower half of this crate turns files into plain host numbers and back: [`Checkpoint`] reads safetensors, PyTorch's
//! files and Meta's shards, [`Nf4Stored`] one bitsandbytes weight, [`Gguf`] llama.cpp's file, [`Adapter`] a PEFT directory,
//! and [`write_atomic`] with its kin writes. [`Merge`] is base and adapter in one, for [`write_merged`], [`write_nf4`] and
//! [`write_gguf`], and [`NewFolder`] the folder that they fill. Every file is taken for hostile until its header has been
//! checked. What it trades: mapped files instead of read ones, for checkpoints larger than memory. What it refuses: to run
//! a pickle, silent conversions of shape, anything in an adapter that is not LoRA on Llama's linears, and half-written files.

mod adapter;
mod bnb;
mod checkpoint;
mod error;
mod folder;
mod gguf;
mod header;
mod layout;
mod load;
mod mapped;
mod merge;
mod meta;
mod open;
mod parts;
mod pytorch;
mod sample;
mod write;

pub use adapter::{Adapter, AdapterConfig, Factors, describe};
pub use bnb::{Absmax, Nf4Stored};
pub use checkpoint::Checkpoint;
pub use error::WeightsError;
pub use folder::{NewFolder, remove_folder, remove_partial_folders};
pub use gguf::{BlockType, Gguf, GgufFormat, Metadata, write_gguf};
pub use load::{
    Quantization, adapter_settings, attach_adapter, extract_adapter, load_llama, model_tensors, read_config,
};
pub use merge::{BaseForm, Merge, Nf4Format, write_merged, write_nf4};
pub use open::{WEIGHT_FILES, indexed_files};
pub use safetensors::Dtype;
pub use sample::sample_of_weights;
pub use write::{
    FloatType, StoredTensor, StoredValues, TensorToWrite, write_atomic, write_json, write_model,
    write_safetensors, write_stored,
};
