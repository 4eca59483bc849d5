//! Batches to gradients to a better adapter: one block at a time.
//!
//! Burn's autodiff keeps every tensor of a forward pass. Here the forward pass runs without it and keeps one tensor a
//! block; the backward pass runs each block again under autodiff, so only one block's activations live at a time
//! ([`backward_by_blocks`]). [`Trainer`] is the loop around it, [`Pretrainer`] the plain way for a small dense model that
//! is trained whole. What it refuses: to print, to write a file, to judge an answer. A program does these between steps.

mod batch;
mod error;
mod gradients;
mod plan;
mod pretrain;
mod scaling;
mod schedule;
mod step;
mod trainer;

pub use batch::DeviceBatch;
pub use error::TrainError;
pub use gradients::LoraGradients;
pub use plan::{Engine, FrozenFormat, MemoryPlan, PlanSettings, Shape, StepWork, token_flop};
pub use pretrain::{PretrainSettings, Pretrainer};
pub use schedule::{Schedule, ScheduleKind};
pub use step::{BlockPass, PassSettings, backward_by_blocks, mean_loss};
pub use trainer::{LoraOptimizer, OptimizerSettings, StepReport, TrainSettings, Trainer};
