//! What goes into the engine, and what comes out.

use std::time::Instant;

use crate::Sampling;

/// A text to go on with.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids, the begin token first.
    pub prompt: Vec<u32>,
    /// New tokens at most. With 0, the request ends at once without running the model.
    pub max_new_tokens: usize,
    /// How to choose each token.
    pub sampling: Sampling,
    /// Tokens that end the answer and are no part of it, beside the tokenizer's end token.
    pub stop_tokens: Vec<u32>,
    /// Whether the tokenizer's end token is a token like others.
    pub ignore_end: bool,
    /// Texts that end the answer and are no part of its text. They are looked for in whole characters, wherever
    /// tokens begin and end; the first one to be complete counts, and of several that end together the first in
    /// this list.
    pub stop_strings: Vec<String>,
    /// The adapter by name; the model as it was given if there is none.
    pub adapter: Option<String>,
    /// When to end the answer, finished or not.
    pub deadline: Option<Instant>,
    /// Report log-probabilities: of each chosen token, and of so many of the likeliest.
    pub log_probs: Option<usize>,
}

/// The number of a request, in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A token's log-probability under the model, before penalty, temperature and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProb {
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens with theirs, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Something that happened to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A new token.
    Token {
        /// Whose.
        request: RequestId,
        /// The token.
        token: u32,
        /// The text that is certain now: it can be empty, since half a character or what may become a stop string
        /// is held back.
        text: String,
        /// If it was asked for.
        log_prob: Option<LogProb>,
    },
    /// The end; nothing follows for this request.
    Finished {
        /// Whose.
        request: RequestId,
        /// Why.
        reason: FinishReason,
        /// Text that was held back and turned out to be no stop string.
        text: String,
        /// Of the token that ended the answer, if one did and it was asked for.
        log_prob: Option<LogProb>,
        /// What was counted.
        usage: Usage,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The end token or a stop token.
    Stop,
    /// The stop string at this place of the request's list.
    StopString(usize),
    /// As many tokens as were asked for, or as the model's context has.
    Length,
    /// It was cancelled.
    Cancelled,
    /// Its deadline passed.
    Deadline,
    /// The model gave NaN.
    NotANumber,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of the prompt, those whose keys and values another request had computed.
    pub cached_tokens: usize,
    /// New ones, without the one that ended the answer.
    pub new_tokens: usize,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The new tokens, without an end or stop token. Those of a stop string are among them.
    pub tokens: Vec<u32>,
    /// Their text up to a stop string; empty without a tokenizer.
    pub text: String,
    /// One a token, if they were asked for.
    pub log_probs: Vec<LogProb>,
    /// Of the token that ended it, if one did and it was asked for.
    pub end_log_prob: Option<LogProb>,
    /// Why it ended.
    pub reason: FinishReason,
    /// What was counted.
    pub usage: Usage,
}

impl Request {
    /// A greedy answer of at most 128 tokens.
    #[must_use]
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            max_new_tokens: 128,
            sampling: Sampling::default(),
            stop_tokens: Vec::new(),
            ignore_end: false,
            stop_strings: Vec::new(),
            adapter: None,
            deadline: None,
            log_probs: None,
        }
    }

    /// The same with another limit.
    #[must_use]
    pub fn with_max_new_tokens(self, max_new_tokens: usize) -> Self {
        Self { max_new_tokens, ..self }
    }

    /// The same with another way to choose.
    #[must_use]
    pub fn with_sampling(self, sampling: Sampling) -> Self {
        Self { sampling, ..self }
    }

    /// The same with an adapter.
    #[must_use]
    pub fn with_adapter(self, name: impl Into<String>) -> Self {
        Self { adapter: Some(name.into()), ..self }
    }

    /// The same with one more stop string.
    #[must_use]
    pub fn with_stop(mut self, text: impl Into<String>) -> Self {
        self.stop_strings.push(text.into());
        self
    }
}

impl Event {
    /// Whose event it is.
    #[must_use]
    pub fn request(&self) -> RequestId {
        match self {
            Self::Token { request, .. } | Self::Finished { request, .. } => *request,
        }
    }

    /// The text that it brings.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Token { text, .. } | Self::Finished { text, .. } => text,
        }
    }
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            text: String::new(),
            log_probs: Vec::new(),
            end_log_prob: None,
            reason: FinishReason::Cancelled,
            usage: Usage::default(),
        }
    }
}

impl Answer {
    /// Takes in the next event of its request; says whether it was the last.
    pub fn add(&mut self, event: Event) -> bool {
        self.text.push_str(event.text());
        match event {
            Event::Token { token, log_prob, .. } => {
                self.tokens.push(token);
                self.log_probs.extend(log_prob);
                false
            }
            Event::Finished { reason, usage, log_prob, .. } => {
                (self.reason, self.usage, self.end_log_prob) = (reason, usage, log_prob);
                true
            }
        }
    }

    /// Natural logarithm of the probability of all its tokens, and of the one that ended it if one did; 0 if
    /// log-probabilities were not asked for.
    #[must_use]
    pub fn log_prob(&self) -> f64 {
        self.log_probs.iter().chain(&self.end_log_prob).map(|log_prob| f64::from(log_prob.chosen)).sum()
    }
}
