//! What the tests of this crate share: noise, and a comparison that names the worst place.

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use burn_flex::Flex;

#[path = "../tests/common/noise.rs"]
mod noise;

pub(crate) use noise::noise;

/// The differentiable test backend.
pub(crate) type Ad = Autodiff<Flex>;

pub(crate) fn noisy<B: Backend, const D: usize>(dims: [usize; D], seed: u64) -> Tensor<B, D> {
    let count = dims.iter().product();
    Tensor::from_data(TensorData::new(noise(count, seed), dims), &Default::default())
}

/// Two tensors agree to `bound` plus as much relative to the expected value.
#[track_caller]
pub(crate) fn close<B: Backend, C: Backend, const D: usize>(
    found: Tensor<B, D>,
    expected: Tensor<C, D>,
    bound: f32,
) {
    assert_eq!(found.dims(), expected.dims());
    let pairs = found.into_data().iter::<f32>().zip(expected.into_data().iter::<f32>()).collect::<Vec<_>>();
    for (place, (found, expected)) in pairs.iter().enumerate() {
        let error = (found - expected).abs();
        assert!(error <= bound * (1.0 + expected.abs()), "at {place}: {found} where {expected} is expected");
    }
}
