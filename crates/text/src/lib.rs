//! Text to tokens and back: prompt templates, the tokenizer, and streaming decode.
//!
//! One renderer makes the prompts for training and for answering, so the two cannot drift apart. What it trades: only
//! tokenizers of Llama 2's kind are decoded (pieces with `▁` and byte fallback), because decoding is done here, one
//! token at a time, and must agree with itself at every cut. What it refuses: to inherit truncation or padding from a
//! tokenizer file, to let a clue's literal `</s>` become the end of a sequence, and to print anything.

mod error;
mod load;
mod render;
mod sentencepiece;
mod stream;
mod template;
mod tokenizer;
mod words;

pub use error::TextError;
pub use render::{Example, Fields, Renderer, show_masked};
pub use stream::StreamDecoder;
pub use template::Template;
pub use tokenizer::{Tokenizer, TokenizerNote};
