//! Gradients of the LoRA factors.

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use buzzer_kernels::KernelBackend;
use buzzer_model::Target;

/// Gradients of A `[r, in]` and B `[out, r]` by block and linear; f32.
#[derive(Clone, Debug, Default)]
pub struct LoraGradients<B: Backend> {
    /// The pairs.
    pub factors: BTreeMap<(usize, Target), [Tensor<B, 2>; 2]>,
}

impl<B: Backend> LoraGradients<B> {
    /// Adds another batch's gradients.
    pub fn add(&mut self, other: Self) {
        for (place, gradients) in other.factors {
            match self.factors.remove(&place) {
                None => self.factors.insert(place, gradients),
                Some([a, b]) => {
                    let [other_a, other_b] = gradients;
                    self.factors.insert(place, [a + other_a, b + other_b])
                }
            };
        }
    }
}

impl<B: KernelBackend> LoraGradients<B> {
    /// The Euclidean norm over all factors.
    #[must_use]
    pub fn norm(&self) -> f64 {
        let all = self.factors.values().flatten().cloned().collect();
        B::sum_of_squares(all).map_or(0.0, |sum| f64::from(scalar(sum)).sqrt())
    }

    /// The factor whose gradient is the first, in the order of the backward pass, that is no finite number.
    #[must_use]
    pub fn first_non_finite(&self) -> Option<(usize, Target)> {
        let finite = |gradient: &Tensor<B, 2>| scalar(gradient.clone().abs().sum()).is_finite();
        let mut backwards = self.factors.iter().rev();
        backwards.find(|(_, pair)| !pair.iter().all(finite)).map(|(&place, _)| place)
    }
}

/// The one element of a tensor, read to the host.
pub(crate) fn scalar<B: Backend>(tensor: Tensor<B, 1>) -> f32 {
    tensor.cast(DType::F32).into_data().iter::<f32>().next().unwrap_or(f32::NAN)
}
