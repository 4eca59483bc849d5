//! Root-mean-square normalisation.
//!
//! ```text
//! y = w · x̂     x̂ = x · ρ     ρ = 1 / √(mean(x²) + ε)          x [n, d]   w [d]
//! ```
//!
//! Zhang and Sennrich, "Root Mean Square Layer Normalization", <https://arxiv.org/abs/1910.07467>. With upstream gradient
//! g: `dx = ρ · (g w - x̂ · mean(g w x̂))` and `dw = Σₙ g x̂`. Reduced in f32 whatever the dtype of x. Bytes moved: x read,
//! y written; backward reads x and g and writes dx.

#[cfg(feature = "cubecl")]
pub mod kernel;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::KernelBackend;
use crate::autodiff::{inner, tracked};

/// The composition of plain operations.
#[must_use]
pub fn reference<B: Backend>(x: Tensor<B, 2>, weight: Tensor<B, 1>, epsilon: f64) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let rho = rho(x.clone(), epsilon);
    (x * rho).cast(dtype) * weight.cast(dtype).unsqueeze()
}

fn rho<B: Backend>(x: Tensor<B, 2>, epsilon: f64) -> Tensor<B, 2> {
    x.square().mean_dim(1).add_scalar(epsilon).sqrt().recip()
}

/// The gradients for `x` and, if `with_weight`, for the weight, from plain operations.
#[must_use]
pub fn backward<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    epsilon: f64,
    grad: Tensor<B, 2>,
    with_weight: bool,
) -> (Tensor<B, 2>, Option<Tensor<B, 1>>) {
    let dtype = x.dtype();
    let (x, grad) = (x.cast(DType::F32), grad.cast(DType::F32));
    let rho = rho(x.clone(), epsilon);
    let normal = x * rho.clone();
    let dw = with_weight.then(|| sum_of_rows(grad.clone() * normal.clone()));
    let gw = grad * weight.cast(DType::F32).unsqueeze();
    let along = (gw.clone() * normal.clone()).mean_dim(1);
    (((gw - normal * along) * rho).cast(dtype), dw)
}

/// Rows that are summed in a first round.
const ROUND: usize = 128;

/// The sum `[d]` of rows `[n, d]`, in two rounds where they divide evenly: on a device one unit sums a column, and thousands of rows
/// one by one take longer than the rest of the backward pass.
fn sum_of_rows<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 1> {
    let [n, d] = x.dims();
    let x = if n.is_multiple_of(ROUND) {
        x.reshape([n / ROUND, ROUND, d]).sum_dim(1).reshape([n / ROUND, d])
    } else {
        x
    };
    x.sum_dim(0).reshape([d])
}

#[derive(Debug)]
struct Step;

impl<B: KernelBackend> Backward<B, 2> for Step {
    type State = (Tensor<B, 2>, Tensor<B, 1>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (x, weight, epsilon) = ops.state;
        let [x_parent, weight_parent] = ops.parents;
        let (dx, dw) = B::rms_norm_backward(x, weight, epsilon, inner(grad), weight_parent.is_some());
        if let Some(parent) = x_parent {
            grads.register::<B>(parent.id, dx.into_primitive().tensor());
        }
        if let (Some(parent), Some(dw)) = (weight_parent, dw) {
            grads.register::<B>(parent.id, dw.into_primitive().tensor());
        }
    }
}

pub(crate) fn tracked_forward<B: KernelBackend, C: CheckpointStrategy>(
    x: Tensor<Autodiff<B, C>, 2>,
    weight: Tensor<Autodiff<B, C>, 1>,
    epsilon: f64,
) -> Tensor<Autodiff<B, C>, 2> {
    let nodes = [x.clone().into_primitive().tensor().node, weight.clone().into_primitive().tensor().node];
    let (x, weight) = (x.inner(), weight.inner());
    let y = B::rms_norm(x.clone(), weight.clone(), epsilon).into_primitive().tensor();
    tracked(match Step.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((x, weight, epsilon), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Ad, close, noisy};

    #[test]
    fn gradients_equal_those_of_the_composition() {
        for dims in [[4, 16], [3, 7], [1, 64], [2 * ROUND, 5]] {
            let x = noisy::<Ad, 2>(dims, 1).require_grad();
            let weight = noisy::<Ad, 1>([dims[1]], 2).require_grad();
            let g = noisy::<Ad, 2>(dims, 3);
            let ours = tracked_forward(x.clone(), weight.clone(), 1e-5);
            let plain = reference(x.clone(), weight.clone(), 1e-5);
            close(ours.clone(), plain.clone(), 1e-6);
            let (ours, plain) = ((ours * g.clone()).sum().backward(), (plain * g).sum().backward());
            close(x.grad(&ours).unwrap(), x.grad(&plain).unwrap(), 1e-5);
            close(weight.grad(&ours).unwrap(), weight.grad(&plain).unwrap(), 1e-5);
        }
    }
}
