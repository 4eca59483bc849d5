//! Errors of this crate.

/// What can go wrong while training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// There is nothing to train on.
    #[error("there are no rows to train on; use more clues, or longer rows (--row-len) if all were too long")]
    NoRows,
    /// No row of a step has a target.
    #[error("step {step}: none of its rows has a target; use --loss-on all, or larger batches")]
    NoTargets {
        /// The step, from 1.
        step: u64,
    },
    /// The loss or a gradient stopped being a number.
    #[error(
        "step {step}: the {what} is {value}, first in {place}; lower --lr, or check the base model's weights. Factors and checkpoints are those from before this step"
    )]
    NonFinite {
        /// The step, from 1.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Where the first such number appeared: a block and its part.
        place: String,
    },
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
    /// A state is not one of the run that it is to continue.
    #[error(
        "the saved state does not fit this run: {what} differs; resume with the model, rows and settings it was made with"
    )]
    State {
        /// What differs.
        what: String,
    },
    /// The model has no correction to train.
    #[error("the model has no LoRA factors to train; name linears with --targets")]
    NoFactors,
}
