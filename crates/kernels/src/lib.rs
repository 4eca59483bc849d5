//! Device operations of QLoRA training: each with its equation, its reference, its gradient and its tests.
//!
//! [`KernelBackend`] extends Burn's `Backend` by one method an operation. The default body of a method is a composition
//! of plain Burn operations: it is the reference, it runs on every backend, and it is what faster kernels are tested
//! against. `Autodiff<B>` implements the same trait with custom backward steps, which keep only what the gradient
//! needs. What it trades: operations take two-dimensional rows where a layer has three dimensions, so that one product
//! serves a whole batch. What it refuses: to know a model, a file or a file format.
//!
//! One letter alphabet holds everywhere: b batch, t tokens, d width, h heads, k head width, v vocabulary, r rank;
//! n rows where batch and tokens are one dimension.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod nf4;
pub mod qlora_linear;
pub mod rms_norm;
pub mod rotary;
pub mod swiglu;

mod autodiff;
mod backend;
#[cfg(test)]
mod testing;

pub use adamw::{AdamW, AdamWState};
pub use attention::{Attended, AttentionIndex, Heads, SEPARATE};
pub use cross_entropy::{CrossEntropyGradient, IGNORED};
pub use dropout::Dropout;
pub use nf4::{Nf4Error, Nf4Tensor};
pub use qlora_linear::{FrozenWeight, LinearPart, LoraTerm, Projection};
pub use rotary::RotaryAngles;

pub use autodiff::seeded;
pub use backend::KernelBackend;
