//! Errors of this crate.

/// What can go wrong between a prompt and its answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// A prompt without tokens.
    #[error("prompt {index} (from 0) has no tokens; a prompt begins with the begin token at least")]
    EmptyPrompt {
        /// Its place in the batch.
        index: usize,
    },
    /// A prompt that fills the model's context.
    #[error("prompt {index} (from 0) has {tokens} tokens and the model takes {context}; shorten it")]
    PromptTooLong {
        /// Its place in the batch.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// Positions of the model.
        context: usize,
    },
    /// A sampling setting that makes no sense.
    #[error("{flag} {found} is not possible; choose {choose}")]
    Setting {
        /// The flag.
        flag: &'static str,
        /// Its value.
        found: String,
        /// What would be possible.
        choose: &'static str,
    },
    /// The model gave a logit that is no number.
    #[error(
        "the model gave NaN for the token after {tokens} tokens of prompt {index}; check its weights and the adapter"
    )]
    NotANumber {
        /// The prompt.
        index: usize,
        /// Tokens so far.
        tokens: usize,
    },
}
