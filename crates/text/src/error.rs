//! Errors of this crate: what was wrong, where, and what to do about it.
//!
//! It trades a few more variants for messages that need no second look; it refuses plain strings as errors.

use std::path::PathBuf;

/// What can go wrong between text and tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A tokenizer file could not be read or written.
    #[error("{path}: {source}; check the path given to --tokenizer", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The text is no tokenizer.json.
    #[error(
        "{origin}: not a usable tokenizer.json: {message}; download the file again or convert it from tokenizer.model"
    )]
    Parse {
        /// The file, or `bytes` when it came from memory.
        origin: String,
        /// What the parser said, with its line and column.
        message: String,
    },
    /// The bytes are no `tokenizer.model` of Llama's kind.
    #[error(
        "{origin}: not a usable tokenizer.model: {message}; download the file again, or use the tokenizer.json or tokenizer.model of a Llama 2 model"
    )]
    Model {
        /// The file, or `bytes` when it came from memory.
        origin: String,
        /// What is wrong with it.
        message: String,
    },
    /// A folder has no tokenizer.
    #[error("{path}: no tokenizer.json or tokenizer.model here; name one with --tokenizer", path = path.display())]
    NoTokenizer {
        /// The folder.
        path: PathBuf,
    },
    /// The begin or end token is not in the vocabulary.
    #[error(
        "{origin}: no {role} token: `{token}` is not in the vocabulary; name it in the tokenizer_config.json beside the file"
    )]
    MissingToken {
        /// The file, or `bytes`.
        origin: String,
        /// `begin-of-sequence` or `end-of-sequence`.
        role: &'static str,
        /// The text that was looked up.
        token: String,
    },
    /// The tokenizer decodes in a way this crate does not know.
    #[error(
        "{origin}: decoder step `{step}` is not one of Llama 2's (Replace, ByteFallback, Fuse, Strip); use the tokenizer.json of a Llama 2 model"
    )]
    UnsupportedDecoder {
        /// The file, or `bytes`.
        origin: String,
        /// The step's type as the file names it.
        step: String,
    },
    /// The tokenizer can produce ids that the model has no row for.
    #[error(
        "the tokenizer has ids up to {max_id}, so it needs {tokenizer} rows, but the model's vocabulary has {model}; use the tokenizer that belongs to the model"
    )]
    VocabTooLarge {
        /// The largest id of the tokenizer.
        max_id: usize,
        /// Rows that the tokenizer needs.
        tokenizer: usize,
        /// Rows that the model has.
        model: usize,
    },
    /// The tokenizer library failed on a text.
    #[error(
        "cannot tokenize the text: {0}; this is a fault of the tokenizer file, so check it against its source"
    )]
    Encode(String),
    /// The prompt alone and the prompt in front of an answer tokenize differently.
    #[error(
        "the prompt's {prompt} tokens are no prefix of the whole text's {whole}: a piece of this tokenizer spans the place where the answer begins; choose another --template or tokenizer"
    )]
    PromptNotPrefix {
        /// Tokens of the prompt alone.
        prompt: usize,
        /// Tokens of prompt and answer together.
        whole: usize,
    },
    /// A begin or end token stands inside a document, for example a doubled one at its edge.
    #[error(
        "token {id} (begin or end of sequence) stands at place {place} of a document as well as at its edge; the tokenizer adds it a second time"
    )]
    SpecialInside {
        /// The token.
        id: u32,
        /// Its place in the document, from 0.
        place: usize,
    },
    /// One of many examples failed.
    #[error("example {index} (from 0): {source}")]
    Example {
        /// Its place in the slice, from 0.
        index: usize,
        /// The cause.
        source: Box<TextError>,
    },
    /// A template name that does not exist.
    #[error("unknown template `{0}`; --template takes question, category, chat or clue")]
    UnknownTemplate(String),
    /// A tokenizer could not be trained.
    #[error("cannot train a tokenizer of {vocab_size} tokens: {message}")]
    Train {
        /// The size that was asked for.
        vocab_size: usize,
        /// Why not, and what to do.
        message: String,
    },
}
