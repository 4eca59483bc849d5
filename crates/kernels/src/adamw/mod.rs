//! One step of AdamW on one parameter.
//!
//! ```text
//! m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²      p ← p (1 - η λ) - η · (m / (1 - β₁ⁿ)) / (√(v / (1 - β₂ⁿ)) + ε)
//! ```
//!
//! at step n, counted from 1, with learning rate η and weight decay λ; PyTorch's order of operations. Loshchilov and
//! Hutter, "Decoupled Weight Decay Regularization", <https://arxiv.org/abs/1711.05101>. Everything is f32: 16 bytes read
//! and 12 written for each element. [`reference8`] keeps the moments in 8 bits instead.

mod eight_bit;
#[cfg(feature = "cubecl")]
pub mod kernel;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

pub use eight_bit::{AdamWState8, BLOCK_8BIT, reference8};

/// The settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// η.
    pub learning_rate: f64,
    /// β₁.
    pub beta_1: f64,
    /// β₂.
    pub beta_2: f64,
    /// ε.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
    /// n, from 1.
    pub step: u64,
    /// What g is multiplied by first, for clipping and for gradients of a scaled loss.
    pub gradient_scale: f64,
}

/// The moments of one parameter.
#[derive(Clone, Debug)]
pub struct AdamWState<B: Backend, const D: usize> {
    /// m.
    pub first: Tensor<B, D>,
    /// v.
    pub second: Tensor<B, D>,
}

impl<B: Backend, const D: usize> AdamWState<B, D> {
    /// No steps taken yet.
    #[must_use]
    pub fn zeros_like(parameter: &Tensor<B, D>) -> Self {
        Self { first: parameter.zeros_like(), second: parameter.zeros_like() }
    }
}

/// The composition of plain operations.
#[must_use]
pub fn reference<B: Backend, const D: usize>(
    parameter: Tensor<B, D>,
    gradient: Tensor<B, D>,
    state: AdamWState<B, D>,
    settings: &AdamW,
) -> (Tensor<B, D>, AdamWState<B, D>) {
    let AdamW { learning_rate, beta_1, beta_2, epsilon, weight_decay, step, gradient_scale } = *settings;
    let gradient = if gradient_scale == 1.0 { gradient } else { gradient.mul_scalar(gradient_scale) };
    let first = state.first.mul_scalar(beta_1) + gradient.clone().mul_scalar(1.0 - beta_1);
    let second = state.second.mul_scalar(beta_2) + gradient.square().mul_scalar(1.0 - beta_2);
    let corrected = |beta: f64| 1.0 - beta.powf(step as f64);
    let root = second.clone().sqrt().mul_scalar(1.0 / corrected(beta_2).sqrt()).add_scalar(epsilon);
    let change = (first.clone() / root).mul_scalar(learning_rate / corrected(beta_1));
    let parameter = parameter.mul_scalar(1.0 - learning_rate * weight_decay) - change;
    (parameter, AdamWState { first, second })
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::close;

    #[test]
    fn the_first_steps_are_those_worked_out_by_hand() {
        let device = Default::default();
        let tensor = |values: [f32; 2]| Tensor::<Flex, 1>::from_data(values, &device);
        let mut settings = AdamW {
            learning_rate: 0.1,
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.5,
            step: 1,
            gradient_scale: 1.0,
        };
        let parameter = tensor([1.0, -2.0]);
        let state = AdamWState::zeros_like(&parameter);
        let (parameter, state) = reference(parameter, tensor([0.3, -4.0]), state, &settings);
        // The first change is the learning rate in the gradient's direction, after decay to 95 %.
        close(parameter.clone(), tensor([0.95 - 0.1, -1.9 + 0.1]), 1e-6);
        settings.step = 2;
        let (parameter, _) = reference(parameter, tensor([0.0, -4.0]), state, &settings);
        let change = (0.1 / 0.19) * (0.9 * 0.1 * 0.3) / (0.999_f32 * 0.001 * 0.09 / 0.001_999).sqrt();
        close(parameter, tensor([0.85 * 0.95 - change, -1.8 * 0.95 + 0.1]), 1e-5);
    }
}
