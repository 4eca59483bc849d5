//! Batches to gradients to a better adapter: one block at a time.
//!
//! Burn's autodiff keeps every tensor of a forward pass. Here the forward pass runs without it and keeps one tensor a
//! block; the backward pass runs each block again under autodiff, so only one block's activations live at a time
//! ([`backward_by_blocks`]). [`Trainer`] is the loop around it, [`Pretrainer`] the plain way for a small dense model that
//! is trained whole. [`Trainer::state`] is where a run stands, and a [`Checkpoint`] that on a disk. What it refuses: to print, to
//! judge an answer, to decide when to save. A program does these between steps.

mod batch;
mod checkpoint;
mod error;
mod gradients;
mod plan;
mod pretrain;
mod scaling;
mod schedule;
mod step;
mod trainer;

pub use batch::DeviceBatch;
pub use checkpoint::{
    Checkpoint, CheckpointError, CheckpointJob, CheckpointWriter, Difference, Found, Written,
    checkpoint_steps, newest_checkpoint,
};
pub use error::TrainError;
pub use gradients::LoraGradients;
pub use plan::{
    Engine, FrozenFormat, MemoryPlan, PlanSettings, Shape, StepWork, dense_token_flop, token_flop,
};
pub use pretrain::{PretrainSettings, Pretrainer};
pub use scaling::LossScale;
pub use schedule::{Schedule, ScheduleKind};
pub use step::{BlockPass, PassSettings, backward_by_blocks, mean_loss};
pub use trainer::{
    HostMoments, LoraOptimizer, OptimizerSettings, Progress, StepReport, TrainSettings, Trainer, TrainerState,
};
