//! One token for each of many sequences, as one program that a device runs without its host.
//!
//! An answer is one pass over the model a token, and on a fast card a pass takes less time than a host needs to submit its
//! operations one by one. So the operations of a pass are written down once, as a [`StepProgram`], and a backend that can
//! makes a [`StepRunner`] of it: weights, factors and pages are found once, kernels for a few rows read four-bit weights
//! where they lie, and a step is one submission. Products are
//!
//! ```text
//! y = x Wᵀ + s · (x Aᵀ) Bᵀ        x [n, in]   W [out, in]   A [r, in]   B [out, r]
//! ```
//!
//! for n of at most [`StepRunner::most_rows`], with the sums in f32. The residual stream is kept in f32. What it trades: memory for
//! intermediate results of its own. What it refuses: f32 weights, pages in 8 bits, shapes whose inner dimension is no multiple of
//! 256, and more than one new token a sequence; the operations one by one are there for those, and are the reference.
//!
//! Bytes moved for one step: all weights and factors once, keys and values of the sequences once.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::{ChosenToken, Heads, LinearPart, PageFormat, PagedSequence};

/// Where the rows come from that linear layers multiply.
#[derive(Clone, Debug)]
pub enum StepSource<B: Backend> {
    /// The residual stream, normalised: weight `[d]` and ε.
    Residual(Tensor<B, 1>, f64),
    /// The result of the last attention.
    Attention,
    /// What the last layers with [`StepTarget::Activated`] left.
    Activated,
}

/// Where the results of linear layers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepTarget {
    /// To the next attention: joined queries, keys and values.
    Joined,
    /// Added to the residual stream.
    Residual,
    /// `silu(first) · second` of two layers.
    Activated,
    /// The logits.
    Logits,
}

/// One operation of a pass.
#[derive(Clone, Debug)]
pub enum StepOperation<B: Backend> {
    /// Layers that share an input.
    Linear {
        /// Their input.
        source: StepSource<B>,
        /// The layers.
        parts: Vec<LinearPart<B>>,
        /// What becomes of the result.
        target: StepTarget,
    },
    /// Turns the joined rows by their positions, puts keys and values into their pages, and attends. The n-th attention has
    /// the n-th pages.
    Attention,
}

/// The operations of one pass in order.
#[derive(Clone, Debug)]
pub struct StepProgram<B: Backend> {
    /// `[v, d]`; its dtype is that of everything that is not packed.
    pub embedding: Tensor<B, 2>,
    /// What happens to the rows.
    pub operations: Vec<StepOperation<B>>,
    /// Heads of every attention.
    pub heads: Heads,
    /// Base of the rotations.
    pub theta: f64,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// How keys and values are stored in the pages that it runs on.
    pub page_format: PageFormat,
    /// Tokens of a sequence at most.
    pub context: usize,
}

/// A sequence's new token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepRow {
    /// The token.
    pub id: u32,
    /// The sequence, with one row.
    pub sequence: PagedSequence,
}

/// Why a program or a step cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// There are no kernels for this device, dtype or shape.
    #[error("steps as one program: {0}")]
    Unsupported(String),
    /// The device, its driver or its compiler refused what there are kernels for.
    #[error("steps as one program: {0}")]
    Refused(String),
}

/// A program that is ready to run.
pub trait StepRunner<B: Backend>: std::fmt::Debug + Send {
    /// Rows of a step at most.
    fn most_rows(&self) -> usize;

    /// Kernels that a step launches.
    fn launches(&self) -> usize;

    /// Makes what steps of so many rows need, if it is not there yet. Touches no page.
    ///
    /// # Errors
    /// If the device, its driver or its compiler refuse it, or there are too many rows.
    fn prepare(&mut self, rows: usize) -> Result<(), StepError>;

    /// Lets the next step run after everything that was asked of the device until now. A step runs after those before it by itself, and
    /// what is asked later runs after it, because it waits for its result.
    fn follow(&mut self);

    /// Runs one step; gives each row's likeliest next token with its log-probability, `None` where a logit is no number. Waits for the
    /// result.
    ///
    /// Pages that one row fills must not be read by another one in the same step.
    ///
    /// # Errors
    /// If the device refuses; nothing can be said of the pages of these rows then.
    fn run(&mut self, rows: &[StepRow]) -> Result<Vec<Option<ChosenToken>>, StepError>;

    /// The logits `[n, v]` of the last step, f32, until the next one.
    fn logits(&self) -> Tensor<B, 2>;
}
