//! Gradients of the LoRA factors.

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
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

    /// The Euclidean norm over all factors.
    #[must_use]
    pub fn norm(&self) -> f64 {
        let squares = self.factors.values().flatten().map(|gradient| gradient.clone().square().sum());
        let total = squares.reduce(|sum, next| sum + next);
        total.map_or(0.0, |total| f64::from(scalar(total)).sqrt())
    }

    /// Multiplies every gradient.
    pub fn scale(&mut self, factor: f64) {
        for gradient in self.factors.values_mut().flatten() {
            gradient.inplace(|gradient| gradient.mul_scalar(factor));
        }
    }

    /// Scales all gradients down together so that their norm is at most `most`; returns the norm before.
    ///
    /// PyTorch's rule: multiply by `most / (norm + 1e-6)` where that is below 1.
    pub fn clip(&mut self, most: Option<f64>) -> f64 {
        let norm = self.norm();
        let factor = most.map_or(1.0, |most| most / (norm + 1e-6));
        if factor < 1.0 {
            self.scale(factor);
        }
        norm
    }
}

/// The one element of a tensor, read to the host.
pub(crate) fn scalar<B: Backend>(tensor: Tensor<B, 1>) -> f32 {
    tensor.cast(DType::F32).into_data().iter::<f32>().next().unwrap_or(f32::NAN)
}
