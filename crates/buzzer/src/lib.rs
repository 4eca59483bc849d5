//! Buzzer: fine-tune Llama 2 on question-and-answer corpora, and use the result.
//!
//! One import for the crates below it, in the order in which data flows, and the choice of a device. There is nothing
//! else here: what a crate does is documented in the crate.

pub use buzzer_data as data;
pub use buzzer_eval as eval;
pub use buzzer_infer as infer;
pub use buzzer_kernels as kernels;
pub use buzzer_model as model;
pub use buzzer_text as text;
pub use buzzer_train as train;
pub use buzzer_weights as weights;

/// Burn, in the version that these crates are built with.
pub use burn;

mod device;

pub use device::{Device, DeviceError, DeviceJob};
