//! Rotary position embedding, with the halves of a head as the two coordinates (Hugging Face's convention).
//!
//! ```text
//! y₁ = x₁ cos φ - x₂ sin φ      y₂ = x₂ cos φ + x₁ sin φ      φ[t, i] = position[t] · θ^(-2i / k)
//! ```
//!
//! for the heads x = (x₁, x₂) of width k, split in the middle, that stand first in every row `[n, width]`; what follows them
//! (the values, in joined rows of queries, keys and values) is passed on. Su et al., "RoFormer", <https://arxiv.org/abs/2104.09864>. The
//! gradient is the rotation by -φ. Angles come from explicit positions `[b, t]`, so packed documents each start at 0.

#[cfg(feature = "cubecl")]
pub mod kernel;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::KernelBackend;
use crate::autodiff::{inner, tracked};

/// Cosines and sines of one batch, computed once and used by every layer; f32.
#[derive(Clone, Debug)]
pub struct RotaryAngles<B: Backend> {
    /// `[b, t, k / 2]`.
    pub cos: Tensor<B, 3>,
    /// `[b, t, k / 2]`.
    pub sin: Tensor<B, 3>,
}

/// What a position is multiplied by for each pair of coordinates of a head, `[k / 2]`, for head width k and base θ.
pub(crate) fn frequencies(head_dim: usize, theta: f64) -> Vec<f32> {
    let frequency = |i: usize| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32;
    (0..head_dim / 2).map(frequency).collect()
}

impl<B: Backend> RotaryAngles<B> {
    /// Angles for positions `[b, t]`, head width k and base θ.
    #[must_use]
    pub fn new(positions: Tensor<B, 2, Int>, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let frequencies = TensorData::new(frequencies(head_dim, theta), [1, 1, half]);
        let frequencies = Tensor::<B, 3>::from_data(frequencies, (&positions.device(), DType::F32));
        let angles = positions.float().cast(DType::F32).unsqueeze_dim::<3>(2) * frequencies;
        Self { cos: angles.clone().cos(), sin: angles.sin() }
    }

    pub(crate) fn reversed(&self) -> Self {
        Self { cos: self.cos.clone(), sin: self.sin.clone().neg() }
    }

    /// The same numbers under another backend decorator.
    #[must_use]
    pub fn map<C: Backend>(&self, mut each: impl FnMut(Tensor<B, 3>) -> Tensor<C, 3>) -> RotaryAngles<C> {
        RotaryAngles { cos: each(self.cos.clone()), sin: each(self.sin.clone()) }
    }
}

/// The composition of plain operations.
#[must_use]
pub fn reference<B: Backend>(rows: Tensor<B, 2>, angles: &RotaryAngles<B>, heads: usize) -> Tensor<B, 2> {
    let dtype = rows.dtype();
    let [n, width] = rows.dims();
    let [_, _, half] = angles.cos.dims();
    let turned = heads * 2 * half;
    let per_head = |angles: &Tensor<B, 3>| angles.clone().cast(dtype).reshape([n, 1, half]);
    let (cos, sin) = (per_head(&angles.cos), per_head(&angles.sin));
    let x = rows.clone().narrow(1, 0, turned).reshape([n, heads, 2 * half]);
    let (first, second) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
    let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let turned_second = second * cos + first * sin;
    let heads = Tensor::cat(vec![turned_first, turned_second], 2).reshape([n, turned]);
    if turned == width {
        return heads;
    }
    Tensor::cat(vec![heads, rows.narrow(1, turned, width - turned)], 1)
}

#[derive(Debug)]
struct Step;

impl<B: KernelBackend> Backward<B, 1> for Step {
    type State = (RotaryAngles<B>, usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (angles, heads) = ops.state;
        if let [Some(parent)] = ops.parents {
            let dx = B::rotary_backward(inner(grad), &angles, heads);
            grads.register::<B>(parent.id, dx.into_primitive().tensor());
        }
    }
}

pub(crate) fn tracked_forward<B: KernelBackend, C: CheckpointStrategy>(
    rows: Tensor<Autodiff<B, C>, 2>,
    angles: &RotaryAngles<Autodiff<B, C>>,
    heads: usize,
) -> Tensor<Autodiff<B, C>, 2> {
    let node = rows.clone().into_primitive().tensor().node;
    let angles = angles.map(Tensor::inner);
    let y = B::rotary(rows.inner(), &angles, heads).into_primitive().tensor();
    tracked(match Step.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((angles, heads), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Ad, close, noisy};

    #[test]
    fn gradients_equal_those_of_the_composition() {
        let positions =
            Tensor::<Ad, 2, Int>::from_data([[0, 1, 2, 0, 1], [3, 4, 5, 6, 9]], &Default::default());
        let angles = RotaryAngles::new(positions, 6, 10_000.0);
        for (heads, width) in [(3, 18), (2, 19)] {
            let x = noisy::<Ad, 2>([10, width], 1).require_grad();
            let g = noisy::<Ad, 2>([10, width], 2);
            let (ours, plain) =
                (tracked_forward(x.clone(), &angles, heads), reference(x.clone(), &angles, heads));
            close(ours.clone(), plain.clone(), 1e-6);
            let (ours, plain) = ((ours * g.clone()).sum().backward(), (plain * g).sum().backward());
            close(x.grad(&ours).unwrap(), x.grad(&plain).unwrap(), 1e-5);
        }
    }

    #[test]
    fn the_product_of_two_turned_vectors_depends_on_their_distance_only() {
        let turned = |position: i32, seed| {
            let positions = Tensor::<burn_flex::Flex, 2, Int>::from_data([[position]], &Default::default());
            reference(noisy([1, 8], seed), &RotaryAngles::new(positions, 8, 10_000.0), 1)
        };
        let product = |p, q| (turned(p, 1) * turned(q, 2)).sum();
        close(product(7, 3), product(104, 100), 1e-4);
    }
}
