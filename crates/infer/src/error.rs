//! Errors of this crate: requests that are refused, and settings that make no sense.

use buzzer_model::Target;

/// What can go wrong between a prompt and its answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// A prompt without tokens.
    #[error("the prompt has no tokens; a prompt begins with the begin token at least")]
    EmptyPrompt,
    /// A prompt that fills the model's context.
    #[error("the prompt has {tokens} tokens and the model takes {context}; shorten it")]
    PromptTooLong {
        /// Its tokens.
        tokens: usize,
        /// Positions of the model.
        context: usize,
    },
    /// A token that the model has no row for.
    #[error(
        "token {token} at place {place} (from 0) of the prompt is not below the model's vocabulary of {vocab}"
    )]
    UnknownToken {
        /// The token.
        token: u32,
        /// Its place.
        place: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The device refused a step.
    #[error(transparent)]
    Step(#[from] buzzer_kernels::StepError),
    /// An adapter that was not added.
    #[error("there is no adapter `{name}`; there are: {known}")]
    UnknownAdapter {
        /// What the request named.
        name: String,
        /// What there is.
        known: String,
    },
    /// An adapter for another number of blocks.
    #[error(
        "adapter `{name}` has {found} layers and the model {needed}; take one that was trained on this model"
    )]
    AdapterMisfit {
        /// Its name.
        name: String,
        /// Its layers.
        found: usize,
        /// The model's.
        needed: usize,
    },
    /// An adapter for linears of other widths.
    #[error(
        "adapter `{name}`: its {target} in layer {layer} is for a weight {found:?}, the model's is {expected:?}; take one that \
         was trained on this model"
    )]
    AdapterShape {
        /// Its name.
        name: String,
        /// The block.
        layer: usize,
        /// The linear.
        target: Target,
        /// `[out, in]` that its factors are for.
        found: [usize; 2],
        /// The model's.
        expected: [usize; 2],
    },
    /// A request that the cache could not hold even alone.
    #[error(
        "a prompt of {prompt} tokens and {new} new ones need {needed} pages of the cache, which has {pages}; \
         ask for fewer new tokens, or give the cache more memory"
    )]
    TooLarge {
        /// Tokens of the prompt.
        prompt: usize,
        /// New tokens at most.
        new: usize,
        /// Pages needed.
        needed: usize,
        /// Pages there are.
        pages: usize,
    },
    /// A budget below two pages.
    #[error("a cache of {budget} bytes does not hold two pages of {page} bytes; give it more memory")]
    BudgetTooSmall {
        /// The budget.
        budget: usize,
        /// Bytes of a page.
        page: usize,
    },
    /// Stop strings without a tokenizer.
    #[error("stop strings need text; give the engine a tokenizer, or name stop tokens instead")]
    NoTokenizer,
    /// A setting that makes no sense.
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
    #[error("the model gave NaN for the token after {tokens} tokens; check its weights and the adapter")]
    NotANumber {
        /// Tokens so far.
        tokens: usize,
    },
    /// A token that has no text.
    #[error(transparent)]
    Text(#[from] buzzer_text::TextError),
}
