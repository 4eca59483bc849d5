//! Prompts to answers: prefill, decoding with a key-value cache, sampling.
//!
//! A batch of prompts is padded on the left and decoded together, one token a step for all; a row that has ended is
//! dropped from the batch once half of its rows have. What it trades: the batch's memory follows its longest prompt. What
//! it refuses: an empty prompt, one that leaves no room for an answer, and to print anything.

mod error;
mod generate;
mod sampling;

pub use error::InferError;
pub use generate::{GenerateOptions, Generated, generate, generate_scored};
pub use sampling::{Sampler, Sampling};
