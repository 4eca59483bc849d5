//! What the tests of this crate share: noise, and a comparison that names the worst place.

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use burn_flex::Flex;

/// The differentiable test backend.
pub(crate) type Ad = Autodiff<Flex>;

/// Numbers between -1 and 1 that look random, the same on every machine.
pub(crate) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

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
