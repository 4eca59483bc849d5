//! The gate of Llama's MLP.
//!
//! ```text
//! y = silu(a) · c      silu(a) = a σ(a)          gate a, up c, y [n, f]
//! ```
//!
//! Shazeer, "GLU Variants Improve Transformer", <https://arxiv.org/abs/2002.05202>. With upstream gradient g:
//! `dc = g silu(a)` and `da = g c σ(a) (1 + a (1 - σ(a)))`. Bytes moved: a and c read, y written.

#[cfg(feature = "cubecl")]
pub mod kernel;

use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::backend::Backend;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::KernelBackend;
use crate::autodiff::{inner, tracked};

/// The composition of plain operations.
#[must_use]
pub fn reference<B: Backend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    silu(gate) * up
}

pub(crate) fn backward<B: Backend>(
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
    grad: Tensor<B, 2>,
) -> [Tensor<B, 2>; 2] {
    let sigma = sigmoid(gate.clone());
    let activated = gate.clone() * sigma.clone();
    let slope = sigma.clone() + activated.clone() * sigma.neg().add_scalar(1.0);
    [grad.clone() * up * slope, grad * activated]
}

#[derive(Debug)]
struct Step;

impl<B: KernelBackend> Backward<B, 2> for Step {
    type State = (Tensor<B, 2>, Tensor<B, 2>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (gate, up) = ops.state;
        let gradients = B::swiglu_backward(gate, up, inner(grad));
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient.into_primitive().tensor());
            }
        }
    }
}

pub(crate) fn tracked_forward<B: KernelBackend, C: CheckpointStrategy>(
    gate: Tensor<Autodiff<B, C>, 2>,
    up: Tensor<Autodiff<B, C>, 2>,
) -> Tensor<Autodiff<B, C>, 2> {
    let nodes = [&gate, &up].map(|tensor| tensor.clone().into_primitive().tensor().node);
    let (gate, up) = (gate.inner(), up.inner());
    let y = B::swiglu(gate.clone(), up.clone()).into_primitive().tensor();
    tracked(match Step.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((gate, up), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Ad, close, noisy};

    #[test]
    fn gradients_equal_those_of_the_composition() {
        let gate = noisy::<Ad, 2>([5, 9], 1).mul_scalar(4).require_grad();
        let up = noisy::<Ad, 2>([5, 9], 2).require_grad();
        let g = noisy::<Ad, 2>([5, 9], 3);
        let ours = (tracked_forward(gate.clone(), up.clone()) * g.clone()).sum().backward();
        let plain = (reference(gate.clone(), up.clone()) * g).sum().backward();
        close(gate.grad(&ours).unwrap(), gate.grad(&plain).unwrap(), 1e-5);
        close(up.grad(&ours).unwrap(), up.grad(&plain).unwrap(), 1e-5);
    }
}
