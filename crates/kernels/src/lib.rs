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

#![cfg_attr(
    feature = "cubecl",
    allow(
        clippy::duplicate_underscore_argument,
        clippy::manual_is_multiple_of,
        clippy::needless_range_loop,
        clippy::unnecessary_cast,
        reason = "the code that `#[cube]` makes of a kernel, and what it can read of Rust"
    )
)]

pub mod adamw;
pub mod attention;
pub mod choice;
pub mod cross_entropy;
pub mod dropout;
pub mod grouped_linear;
pub mod nf4;
pub mod paged_attention;
pub mod qlora_linear;
pub mod rms_norm;
pub mod rotary;
pub mod step;
pub mod swiglu;

mod autodiff;
mod backend;
mod card;
#[cfg(feature = "cuda")]
mod compiler;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "cubecl")]
mod device;
#[cfg(feature = "cuda")]
mod limits;
#[cfg(feature = "cuda")]
mod module;
#[cfg(feature = "cuda")]
mod pinned;
#[cfg(feature = "cubecl")]
mod product;
#[cfg(feature = "cubecl")]
mod reduce;
#[cfg(feature = "cubecl")]
mod rows;
#[cfg(feature = "cuda")]
mod side_stream;
#[cfg(test)]
mod testing;
mod upload;

pub use adamw::{AdamW, AdamWState, AdamWState8};
pub use attention::{Attended, AttentionIndex, AttentionRanges, Heads, SEPARATE};
pub use choice::{ChosenToken, TokenChoice};
pub use cross_entropy::{CrossEntropyGradient, IGNORED};
pub use dropout::Dropout;
pub use grouped_linear::RowGroup;
pub use nf4::{Nf4Error, Nf4Tensor};
pub use paged_attention::int8::Int8Rows;
pub use paged_attention::{
    FloatPages, Int8Pages, PageFormat, PagedIndex, PagedSequence, Pages, SCRATCH_PAGE,
};
pub use qlora_linear::{FrozenWeight, InputGradient, LinearPart, LoraTerm, Projection, SpaciousRows, Spent};
pub use rotary::RotaryAngles;
pub use step::{StepError, StepOperation, StepProgram, StepRow, StepRunner, StepSource, StepTarget};

pub use backend::{KernelBackend, host_floats};
pub use card::{
    Allocated, BANDWIDTH_EFFICIENCY, Card, CardModel, MATMUL_EFFICIENCY, MODELS, UnknownCard, WORKSPACE_BYTES,
};
#[cfg(feature = "cuda")]
pub use card::{cuda_cards, cuda_target, limit_memory};
#[cfg(feature = "cuda")]
pub use cubecl::cuda::CudaDevice;
#[cfg(feature = "wgpu")]
pub use cubecl::wgpu::WgpuDevice;
#[cfg(feature = "cubecl")]
pub use device::{Cube, SplitGradient};
#[cfg(feature = "cubecl")]
pub use product::ProductRuntime;
#[cfg(feature = "cuda")]
pub use side_stream::assume_driver;

/// Burn's backend for the processor.
pub type Cpu = burn_flex::Flex;

/// Burn's CUDA backend without `fusion`.
#[cfg(feature = "cuda")]
pub type Cuda = Cube<cubecl::cuda::CudaRuntime>;

/// Burn's backend for Vulkan, Metal and WebGPU, without `fusion`.
#[cfg(feature = "wgpu")]
pub type Wgpu = Cube<cubecl::wgpu::WgpuRuntime>;

/// Settings of CubeCL for devices that are opened from now on. Does nothing if its configuration was read or set before.
///
/// Allocators reuse memory by exact size, and never cut it in pieces: a training step asks for the same sizes every time, so
/// what it takes from the card is what it needs, and stays the same from step to step. CubeCL's default takes pages of up to a
/// quarter of the card instead.
///
/// `kept_kernels` is a folder in which kernels in CUDA C++ stay compiled for the next start; it is for one [`cuda_target`]. CubeCL's
/// own are compiled at each start: what CubeCL 0.10 keeps, it finds again by a hash that leaves out part of what a kernel was made
/// for, so that one kernel is taken for another (`docs/decisions/0018-compiled-kernels-stay.md`).
#[cfg(feature = "cubecl")]
pub fn configure(kept_kernels: Option<std::path::PathBuf>) {
    use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig, memory::PersistentMemory};
    #[cfg(feature = "cuda")]
    compiler::keep_in(kept_kernels);
    #[cfg(not(feature = "cuda"))]
    drop(kept_kernels);
    let mut config = CubeClRuntimeConfig::default();
    config.memory.persistent_memory = PersistentMemory::Enforced;
    CubeClRuntimeConfig::storage().lock().get_or_insert_with(|| config.into());
}
