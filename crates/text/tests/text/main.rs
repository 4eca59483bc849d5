//! Tests of the text crate through its public face, in one binary so that its libraries are linked once.
//!
//! The oracle is the `tokenizers` crate used plainly, in one piece, on the same file. What needs the real Llama 2
//! tokenizer looks for `../shared` beside the repository and says so where it is not there.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod golden;
mod loading;
mod rendering;
mod sentencepiece;
mod streaming;
mod support;
mod training;
mod words;
