//! Llama 2: configurations, frozen linears with LoRA, blocks, the whole model and its key-value cache.
//!
//! The model is a Burn `Module`, generic over the backend, in pieces that a trainer can run one at a time: embedding,
//! blocks, final norm, head. What it trades: a block flattens batch and tokens into rows for everything but attention.
//! What it refuses: to open a file, to know a tokenizer, and to run any architecture but Llama's.

mod block;
mod cache;
mod config;
mod error;
mod linear;
mod llama;
mod names;
mod recompute;

pub use block::{Block, BlockContext};
pub use cache::{AdapterRows, LoraSet, PagedCache, PagedPass};
pub use config::LlamaConfig;
pub use error::ModelError;
pub use linear::{Lora, LoraLinear, LoraSettings, Weight};
pub use llama::Llama;
pub use names::{Target, block_tensor};
pub use recompute::BlockGradients;
