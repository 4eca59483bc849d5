//! What an engine may use, and how it keeps keys and values.

use burn::tensor::DType;
use buzzer_kernels::PageFormat;

use crate::InferError;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheDtype {
    /// In the dtype that the model is computed in.
    #[default]
    Compute,
    /// In 8 bits with a scale for each token and head: see [`buzzer_kernels::paged_attention::int8`]. Answers differ a little.
    Int8,
}

impl CacheDtype {
    /// The format of the pages of a model that is computed in a dtype.
    #[must_use]
    pub fn format(self, compute: DType) -> PageFormat {
        match self {
            Self::Compute => PageFormat::Float(compute),
            Self::Int8 => PageFormat::Int8,
        }
    }
}

/// What an engine may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineSettings {
    /// Bytes for keys and values, and for the program of single tokens with the model's own corrections, at most. Less is
    /// taken where `max_batch` requests of the model's whole context need less. Programs for other adapters, which are made
    /// when they are first wanted, take as much each beside it.
    pub budget_bytes: usize,
    /// How keys and values are stored, and so how many pages the budget holds.
    pub cache_dtype: CacheDtype,
    /// Tokens a page holds. Smaller pages waste less at an answer's end and share more; larger ones are read faster.
    pub page_tokens: usize,
    /// Answers in progress at most.
    pub max_batch: usize,
    /// Tokens of prompts in one pass at most. Fewer delay answers in progress less; more prompts run faster.
    pub prefill_chunk: usize,
    /// Run passes of nothing but single tokens as one program, where the device can: see [`buzzer_kernels::step`]. There is none
    /// for a cache in 8 bits.
    pub step_programs: bool,
}

impl Default for EngineSettings {
    /// A GiB, the compute dtype, pages of 16, 64 answers, 512 tokens, and step programs.
    fn default() -> Self {
        Self {
            budget_bytes: 1 << 30,
            cache_dtype: CacheDtype::default(),
            page_tokens: 16,
            max_batch: 64,
            prefill_chunk: 512,
            step_programs: true,
        }
    }
}

impl EngineSettings {
    pub(crate) fn check(&self) -> Result<(), InferError> {
        let sizes = [
            ("page_tokens", self.page_tokens),
            ("max_batch", self.max_batch),
            ("prefill_chunk", self.prefill_chunk),
        ];
        match sizes.into_iter().find(|(_, size)| *size == 0) {
            Some((flag, _)) => Err(InferError::Setting { flag, found: "0".into(), choose: "1 or more" }),
            None => Ok(()),
        }
    }
}
