//! Where a run stands, in host memory.
//!
//! A step depends on the factors, the moments, and a handful of counters: the order of the rows is a function of seed and
//! epoch, a dropout mask one of seed, step and place, the learning rate one of the step. So a run that goes on from its
//! factors ([`extract_adapter`](buzzer_weights::extract_adapter)) and its [`TrainerState`] takes the steps that it would have
//! taken, bit for bit, on the same device with the same build. What it refuses: a state of other factors, other rows or
//! another kind of optimizer.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use buzzer_data::{Cursor, PackedRow, RowStream};
use buzzer_kernels::adamw::BLOCK_8BIT;
use buzzer_kernels::{AdamWState, AdamWState8, KernelBackend};
use buzzer_model::{Llama, Target};
use serde::{Deserialize, Serialize};

use super::{LoraOptimizer, Moments, TrainSettings, Trainer};
use crate::{LossScale, TrainError};

/// All that the next step depends on, besides model, rows and settings.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerState {
    /// Counters.
    pub progress: Progress,
    /// Moments of A and B of every linear that has been trained; none before the first step.
    pub moments: BTreeMap<(usize, Target), [HostMoments; 2]>,
}

/// The counters of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps taken.
    pub step: u64,
    /// Rows that the rest of the run will take.
    pub rows_left: usize,
    /// Where the run stands in the packed stream. Its seed is the key of the dropout masks too.
    pub cursor: Cursor,
    /// Steps that changed the factors: those taken less those skipped in f16.
    pub optimizer_steps: u64,
    /// The scale of the loss.
    pub loss_scale: LossScale,
}

/// The optimizer's moments of one factor of n elements, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub enum HostMoments {
    /// In 32 bits.
    Full {
        /// m `[n]`.
        first: Vec<f32>,
        /// v `[n]`.
        second: Vec<f32>,
    },
    /// In 8 bits, in blocks of [`BLOCK_8BIT`](buzzer_kernels::adamw::BLOCK_8BIT) elements.
    EightBit {
        /// Codes of m, whole blocks.
        first: Vec<u8>,
        /// The largest magnitude of each block of m.
        first_scales: Vec<f32>,
        /// Codes of v, whole blocks.
        second: Vec<u8>,
        /// The largest value of each block of v.
        second_scales: Vec<f32>,
    },
}

impl<B: KernelBackend> Moments<B> {
    fn to_host(&self) -> HostMoments {
        match self {
            Self::Full(AdamWState { first, second }) => {
                HostMoments::Full { first: numbers(first.clone()), second: numbers(second.clone()) }
            }
            Self::EightBit(AdamWState8 { first, first_scales, second, second_scales }) => {
                HostMoments::EightBit {
                    first: codes(first.clone()),
                    first_scales: numbers(first_scales.clone()),
                    second: codes(second.clone()),
                    second_scales: numbers(second_scales.clone()),
                }
            }
        }
    }

    /// Moments of a factor of such dimensions; `None` if they are those of another one or of another kind.
    fn from_host(
        moments: &HostMoments,
        dims: [usize; 2],
        eight_bit: bool,
        device: &B::Device,
    ) -> Option<Self> {
        let blocks = dims.iter().product::<usize>().div_ceil(BLOCK_8BIT);
        match moments {
            HostMoments::Full { first, second } if !eight_bit => Some(Self::Full(AdamWState {
                first: upload(first, dims, device)?,
                second: upload(second, dims, device)?,
            })),
            HostMoments::EightBit { first, first_scales, second, second_scales } if eight_bit => {
                Some(Self::EightBit(AdamWState8 {
                    first: upload_codes(first, blocks, device)?,
                    first_scales: upload(first_scales, [blocks], device)?,
                    second: upload_codes(second, blocks, device)?,
                    second_scales: upload(second_scales, [blocks], device)?,
                }))
            }
            _ => None,
        }
    }
}

fn numbers<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    let data = tensor.into_data();
    data.to_vec().unwrap_or_else(|_| data.iter().collect())
}

/// The bytes of packed words, lowest first.
fn codes<B: Backend>(words: Tensor<B, 1, Int>) -> Vec<u8> {
    words.into_data().iter::<i32>().flat_map(i32::to_le_bytes).collect()
}

fn upload<B: Backend, const D: usize>(
    values: &[f32],
    dims: [usize; D],
    device: &B::Device,
) -> Option<Tensor<B, D>> {
    let fits = values.len() == dims.iter().product::<usize>();
    fits.then(|| Tensor::from_data(TensorData::new(values.to_vec(), dims), (device, DType::F32)))
}

fn upload_codes<B: Backend>(codes: &[u8], blocks: usize, device: &B::Device) -> Option<Tensor<B, 1, Int>> {
    let (words, []) = codes.as_chunks() else { return None };
    let words: Vec<i32> = words.iter().map(|&word| i32::from_le_bytes(word)).collect();
    let length = words.len();
    let fits = codes.len() == blocks * BLOCK_8BIT;
    fits.then(|| Tensor::from_data(TensorData::new(words, [length]), (device, DType::I32)))
}

impl<B: KernelBackend> LoraOptimizer<B> {
    fn to_host(&self) -> BTreeMap<(usize, Target), [HostMoments; 2]> {
        let pair = |pair: &[Moments<B>; 2]| [pair[0].to_host(), pair[1].to_host()];
        self.states.iter().map(|(&place, moments)| (place, pair(moments))).collect()
    }

    /// Takes over the moments of the model's factors, and the number of steps that made them.
    fn restore(&mut self, model: &Llama<B>, state: &TrainerState) -> Result<(), TrainError> {
        let device = model.device();
        let factors: BTreeMap<_, _> =
            model.loras().map(|(layer, target, lora)| ((layer, target), [&lora.a, &lora.b])).collect();
        self.steps = state.progress.optimizer_steps;
        for (&place, [a, b]) in &state.moments {
            let (layer, target) = place;
            let misfit = || TrainError::State {
                what: format!("the moments of {} in block {layer}", target.hf_name()),
            };
            let [a_factor, b_factor] = factors.get(&place).ok_or_else(misfit)?;
            let moments = |moments, factor: &Param<Tensor<B, 2>>| {
                let dims = factor.val().dims();
                Moments::from_host(moments, dims, self.settings.eight_bit, &device).ok_or_else(misfit)
            };
            self.states.insert(place, [moments(a, a_factor)?, moments(b, b_factor)?]);
        }
        Ok(())
    }
}

impl<B: KernelBackend> Trainer<B> {
    /// Copies to the host what, with the model's factors, a continuation needs. Waits for the device.
    #[must_use]
    pub fn state(&self) -> TrainerState {
        let progress = Progress {
            step: self.step,
            rows_left: self.rows_left,
            cursor: self.cursor(),
            optimizer_steps: self.optimizer.steps,
            loss_scale: self.loss_scale,
        };
        TrainerState { progress, moments: self.optimizer.to_host() }
    }

    /// A run that goes on from a state. The model must have the factors of that moment; rows and settings must be those
    /// that the run began with.
    ///
    /// # Errors
    /// As [`Trainer::new`], and if the state cannot be one of this run.
    pub fn resume(
        model: Llama<B>,
        rows: Vec<PackedRow>,
        settings: TrainSettings,
        state: &TrainerState,
    ) -> Result<Self, TrainError> {
        let mut trainer = Self::new(model, rows, settings)?;
        let Progress { step, rows_left, cursor, optimizer_steps, loss_scale } = state.progress;
        let refuse = |what: &str| Err(TrainError::State { what: what.into() });
        let taken = cursor.epoch as usize * trainer.rows.len() + cursor.position as usize;
        let expected = step as usize * trainer.settings.rows_per_step();
        if taken + rows_left != trainer.rows_left || taken != expected.min(trainer.rows_left) {
            return refuse("the number of rows, of epochs or of rows in a step");
        }
        if cursor.seed != trainer.settings.seed {
            return refuse("the seed");
        }
        if loss_scale.is_dynamic() != trainer.loss_scale.is_dynamic() {
            return refuse("the dtype");
        }
        if optimizer_steps > step {
            return refuse("the number of the optimizer's steps");
        }
        trainer.optimizer.restore(&trainer.model, state)?;
        trainer.stream = RowStream::resume(trainer.rows.len(), cursor);
        (trainer.rows_left, trainer.step, trainer.loss_scale) = (rows_left, step, loss_scale);
        Ok(trainer)
    }
}
